"""One vLLM server: requests, and the ways weights get there.

Requests are JSON over HTTP from the standard library, on connections that stay open. What can pass (a broken
connection, a server that is busy) is tried again until the deadline; the rest is a `UserError` of one line. Weights go
through files or over NCCL, under a version that the server can be asked for. Which weights, when, and what they mean
for requests under way are left to `vllm`.

Read against vLLM's source in the versions of `VERSIONS`; tested against a stand-in that speaks the same HTTP.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from autotool_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

VERSIONS = "vllm>=0.28,<0.34"
KEY_VARIABLE = "VLLM_API_KEY"
RETRIES = 5
BACKOFF_S = 0.25
"""Pause before the first retry; every further one is twice as long."""
PROBE_S = 5.0

_RETRIED = {408, 429, 500, 502, 503, 504}
AGAIN = "look at its log, start it again, and repeat the command with --resume"


@dataclass(eq=False)
class Call:
    """A request under way, which another thread can give up."""

    connection: HTTPConnection | None = None
    given_up: bool = False

    def give_up(self) -> None:
        """Close the connection, which makes the server drop the request."""
        self.given_up = True
        if self.connection is not None and self.connection.sock is not None:
            with suppress(OSError):
                self.connection.sock.shutdown(socket.SHUT_RDWR)


class VllmServer:
    """JSON over HTTP with one server, on connections that stay open; for use by several threads.

    Args:
        url: its address, without /v1.
        timeout_s: seconds for one answer, retries included.
    """

    def __init__(self, url: str, *, timeout_s: float = 600.0) -> None:
        parts = urlsplit(url)
        self.url, self.host, self.timeout_s = url.rstrip("/"), parts.hostname or "", timeout_s
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._netloc, self._prefix = parts.netloc, parts.path.rstrip("/")
        self._idle: list[HTTPConnection] = []
        self._lock = threading.Lock()

    def probe(self, model: str, max_len: int) -> None:
        """Check that the server answers, and serves `model` with room for `max_len` tokens.

        Raises:
            UserError: it does not.
        """
        first = f"start it (docs/training.md), or correct the address; it must be {VERSIONS}"
        cards = self.ask("GET", "/v1/models", retries=0, timeout_s=min(PROBE_S, self.timeout_s), remedy=first)
        try:
            rooms = {card["id"]: card.get("max_model_len") for card in cards["data"]}
        except (KeyError, TypeError, AttributeError):
            raise self.problem("does not list its models", "is it a vLLM server?") from None
        if model not in rooms:
            remedy = "name one with --rollout.served-model, or start the server with the model of --model"
            raise self.problem(f"serves {', '.join(rooms) or 'nothing'}, not {model}", remedy)
        if rooms[model] is not None and rooms[model] < max_len:
            remedy = f"start it with --max-model-len {max_len}, or lower --model.max-positions"
            raise self.problem(f"takes {rooms[model]} tokens, fewer than model.max_positions ({max_len})", remedy)

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        retries: int = RETRIES,
        timeout_s: float | None = None,
        remedy: str = AGAIN,
        call: Call | None = None,
    ) -> Any:
        """Send one request and return the answer, read as JSON (None if it is empty).

        Args:
            retries: attempts after a broken connection or an answer that says "later" or "broken"; with 0 the request
                has a connection of its own and is sent once.
            timeout_s: in place of the server's.
            remedy: for when it cannot be reached.
            call: handle for giving it up.

        Raises:
            UserError: what went wrong, in one line.
        """
        call = call or Call()
        limit = self.timeout_s if timeout_s is None else timeout_s
        deadline, attempt = time.monotonic() + limit, 0
        while True:
            again = remedy
            try:
                status, answer = self._exchange(method, path, body, deadline, call, fresh=retries == 0)
            except TimeoutError:
                raise self.problem(f"did not answer {path} within {limit:g} s", remedy) from None
            except (OSError, HTTPException) as error:
                what = f"cannot be reached ({error or type(error).__name__})"
            else:
                if status == 200:
                    try:
                        return json.loads(answer) if answer else None
                    except ValueError:
                        raise self.problem(f"answered {path} with something else than JSON", AGAIN) from None
                what = f"answered {path} with {status} ({_words(answer)})"
                if status in (401, 403):
                    again = f"put its API key into the environment variable {KEY_VARIABLE}"
                elif status == 404 and not path.startswith("/v1"):
                    again = f"start it with VLLM_SERVER_DEV_MODE=1; it must be {VERSIONS}"
                if status not in _RETRIED:
                    raise self.problem(what, again)
            attempt += 1
            pause = BACKOFF_S * 2 ** (attempt - 1)
            if call.given_up or attempt > retries or time.monotonic() + pause > deadline:
                raise self.problem(what, again)
            time.sleep(pause)

    def tell(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Post what must not happen twice: sent once, whatever becomes of it."""
        return self.ask("POST", path, body, retries=0)

    def empty_prefix_cache(self) -> None:
        """Make the server forget the keys and values it has kept."""
        for attempt in range(RETRIES + 1):  # blocks of requests given up may still be held
            if (self.ask("POST", "/reset_prefix_cache") or {}).get("success"):
                return
            time.sleep(BACKOFF_S * 2**attempt)
        raise self.problem("cannot empty its prefix cache", "does something else use it?")

    def problem(self, what: str, remedy: str) -> UserError:
        """An error that names the server."""
        return UserError(what, where=f"rollout.server ({self.url})", remedy=remedy)

    def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, deadline: float, call: Call, *, fresh: bool
    ) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        sent = None if body is None else json.dumps(body)
        while True:
            with self._lock:
                kept = self._idle.pop() if self._idle and not fresh else None
            connection = call.connection = kept or self._kind(self._netloc)
            try:
                if call.given_up:
                    raise ConnectionAbortedError("given up")
                connection.timeout = max(deadline - time.monotonic(), 1e-3)
                if connection.sock is not None:
                    connection.sock.settimeout(connection.timeout)
                connection.request(method, self._prefix + path, sent, headers)
                response = connection.getresponse()
                answer = response.read()
            except BaseException as error:
                connection.close()
                # A server may close a connection that was idle for too long: no failure of this request.
                if kept is not None and isinstance(error, (ConnectionError, HTTPException)) and not call.given_up:
                    continue
                raise
            if fresh or response.will_close:
                connection.close()
            else:
                with self._lock:
                    self._idle.append(connection)
            return response.status, answer


def _words(answer: bytes) -> str:
    """What a server says about an error, in at most 200 characters."""
    text = answer.decode("utf-8", "replace")
    with suppress(ValueError, AttributeError):
        said = json.loads(text)
        said = said.get("error") or said.get("detail") or said
        text = str(said.get("message", said) if isinstance(said, dict) else said)
    return " ".join(text.split())[:200] or "no reason given"


class Transfer(Protocol):
    """Puts a model's weights on the server, under the name of a version."""

    def send(self, model: PreTrainedModel, version: str) -> None: ...


class FolderTransfer:
    """Weights as a safetensors file that the server reads: for servers on the same machine or file system.

    Args:
        folder: there while they are transferred.
    """

    def __init__(self, server: VllmServer, folder: Path) -> None:
        self._server, self._folder = server, folder.resolve()

    def send(self, model: PreTrainedModel, version: str) -> None:
        """See `Transfer`.

        Raises:
            UserError: the server refuses them.
            OSError: the folder cannot be written.
        """
        from safetensors.torch import save_file

        from autotool_fast.adapters import merged_parameters

        self._folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.cpu().contiguous() for name, value in merged_parameters(model)}
        try:
            save_file(weights, self._folder / "model.safetensors", metadata={"format": "pt"})
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(self._folder)}}
            self._server.tell("/collective_rpc", body)
        finally:
            shutil.rmtree(self._folder)
        self._server.tell("/update_weight_version", {"new_version": version})


class NcclTransfer:
    """Weights broadcast from this process's GPU to the server's, by vLLM's own trainer-side engine.

    The server must run on other GPUs and have been started with `--weight-transfer-config '{"backend": "nccl"}'`.
    """

    def __init__(self, server: VllmServer) -> None:
        self._server, self._weights, self._engine = server, _Weights(), None
        self.version = ""

    def send(self, model: PreTrainedModel, version: str) -> None:
        """See `Transfer`.

        Raises:
            UserError: vLLM is not installed here, or refuses.
        """
        self._weights.model, self.version = model, version
        try:
            if self._engine is None:
                self._engine = self._open()
            self._engine.send_weights()
        except (RuntimeError, ValueError) as error:
            raise self._server.problem(f"did not take the weights over NCCL ({error})", AGAIN) from error

    def _open(self) -> Any:
        try:
            from vllm.distributed.weight_transfer.base import ModuleSource
            from vllm.distributed.weight_transfer.nccl_engine import (
                NCCLTrainerInitInfo,
                NCCLTrainerWeightTransferEngine,
            )
        except ImportError as error:
            remedy = f"install {VERSIONS} here too, or use --rollout.sync folder"
            raise UserError(f"nccl needs vLLM ({error})", where="rollout.sync", remedy=remedy) from error
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:  # which of our addresses the server sees
            route.connect((self._server.host, 9))
            address = route.getsockname()[0]
        with socket.socket() as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
        workers = self._server.ask("GET", "/get_world_size")["world_size"]
        info = NCCLTrainerInitInfo(rank=0, master_address=address, master_port=port, world_size=1 + workers)
        return NCCLTrainerWeightTransferEngine.trainer_init(info, client=self, source=ModuleSource(self._weights))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """For vLLM's engine, as are the next three."""
        self._server.tell("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """The server prepares for weights."""
        self._server.tell("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The server receives what is broadcast meanwhile."""
        self._server.tell("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The weights are complete."""
        self._server.tell("/finish_weight_update", {"weight_version": weight_version or self.version})


@dataclass
class _Weights:
    """A model as vLLM's `ModuleSource` reads it, with an adapter added in."""

    model: PreTrainedModel | None = None

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        from autotool_fast.adapters import merged_parameters

        return merged_parameters(self.model)
