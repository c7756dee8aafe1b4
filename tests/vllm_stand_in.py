"""A server that speaks the part of vLLM's HTTP that rollouts use, and really samples, from a model of its own.

It is stricter than the original: while it is paused, or has kept keys and values of older weights, it refuses to
sample. Faults can be put in the way of the next requests to a path.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from autotool_kernels import sample_logp_entropy
from safetensors.torch import load_file
from transformers import DynamicCache

Fault = Callable[["Handler", dict], bool]
"""Serves a request in another way and returns True, or returns False to have it served as usual."""


def status(code: int, message: str = "out of order") -> Fault:
    """Answer with an error."""

    def fault(handler: Handler, body: dict) -> bool:
        handler.answer({"error": {"message": message}}, code)
        return True

    return fault


def dropped(handler: Handler, body: dict) -> bool:
    """Close the connection without an answer."""
    handler.close_connection = True
    return True


def slow(seconds: float) -> Fault:
    """Serve it late."""

    def fault(handler: Handler, body: dict) -> bool:
        time.sleep(seconds)
        return False

    return fault


def saying(answer: Any) -> Fault:
    """Answer with this."""

    def fault(handler: Handler, body: dict) -> bool:
        handler.answer(answer)
        return True

    return fault


class VllmStandIn:
    """See the module.

    Args:
        model: what it samples from until weights are sent; it is changed in place.
        name: the model's name.
    """

    def __init__(self, model: torch.nn.Module, name: str, *, max_model_len: int = 4096, key: str = "") -> None:
        self.model, self.name, self.max_model_len, self.key = model.eval(), name, max_model_len, key
        self.log: list[str] = []
        self.requests: list[dict] = []
        self.connections = 0
        self.under_way = self.most_under_way = 0
        self.version, self.paused, self.cache_is_old = "default", False, False
        self.logprobs_mode = "raw_logprobs"
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.lock = threading.Lock()
        self.http: ThreadingHTTPServer | None = None

    @contextmanager
    def running(self, port: int = 0):
        """Serve inside the block; gives the address."""
        stand_in = self

        class Own(Handler):
            server_of = stand_in

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Own)
        self.http.daemon_threads = True
        thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{self.http.server_address[1]}"
        finally:
            self.stop()
            thread.join()

    def stop(self) -> None:
        """Stop listening; requests find nobody."""
        if self.http is not None:
            http, self.http = self.http, None
            http.shutdown()
            http.server_close()

    @torch.inference_mode()
    def complete(self, body: dict) -> dict:
        """Sample one completion: counter-based, so that a seed and a prompt always give the same."""
        ids, logp = list(body["prompt"]), []
        reason, read = "length", ids
        with self.lock:
            cache = DynamicCache(config=self.model.config)
            for _ in range(body["max_tokens"]):
                logits = self.model(torch.tensor([read]), past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
                seed, offset = torch.tensor([body["seed"]]), torch.tensor([len(ids)])
                drawn = sample_logp_entropy(logits, temperature=body["temperature"], seed=seed, offset=offset)
                read = [int(drawn.token)]
                ids += read
                logp.append(float(drawn.logp))
                if ids[-1] in body["stop_token_ids"]:
                    reason = "stop"
                    break
        count = len(body["prompt"])
        choice = {"index": 0, "text": "", "finish_reason": reason, "token_ids": ids[count:]}
        choice |= {"logprobs": {"token_logprobs": logp}, "prompt_token_ids": ids[:count]}
        return {"object": "text_completion", "model": self.name, "choices": [choice]}

    def reload(self, folder: str) -> None:
        """Take weights from a folder, all of them."""
        weights = load_file(Path(folder) / "model.safetensors")
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        assert set(missing) <= tied, missing
        assert not unexpected, unexpected
        self.cache_is_old = True


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server_of: VllmStandIn
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server_of.connections += 1

    def do_GET(self) -> None:
        self._serve({})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._serve(json.loads(self.rfile.read(length)) if length else {})

    def _serve(self, body: dict) -> None:
        server, path = self.server_of, urlsplit(self.path).path
        server.log.append(path.removeprefix("/"))
        faults = server.faults[path]
        if faults and faults.pop(0)(self, body):
            return
        if path.startswith("/v1") and server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            return self.answer({"error": "Unauthorized"}, 401)
        route = getattr(self, "on_" + path.strip("/").replace("/", "_"), None)
        if route is None:
            return self.answer({"detail": "Not Found"}, 404)
        return route(server, body)

    def on_v1_models(self, server: VllmStandIn, body: dict) -> None:
        self.answer({"object": "list", "data": [{"id": server.name, "max_model_len": server.max_model_len}]})

    def on_v1_completions(self, server: VllmStandIn, body: dict) -> None:
        if server.paused:
            return self.answer({"error": {"message": "paused"}}, 400)
        if server.cache_is_old:
            return self.answer({"error": {"message": "the prefix cache is of older weights"}}, 400)
        server.under_way += 1
        server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            server.requests.append(body)
            return self.answer(server.complete(body))
        finally:
            server.under_way -= 1

    def on_pause(self, server: VllmStandIn, body: dict) -> None:
        server.paused = True
        self.answer({"status": "paused"})

    def on_resume(self, server: VllmStandIn, body: dict) -> None:
        server.paused = False
        self.answer({"status": "resumed"})

    def on_collective_rpc(self, server: VllmStandIn, body: dict) -> None:
        assert body["method"] == "reload_weights"
        server.reload(body["kwargs"]["weights_path"])
        self.answer({"results": [None]})

    def on_update_weight_version(self, server: VllmStandIn, body: dict) -> None:
        server.version = body["new_version"]
        self.answer({"success": True})

    def on_weight_info(self, server: VllmStandIn, body: dict) -> None:
        self.answer({"weight_version": server.version})

    def on_reset_prefix_cache(self, server: VllmStandIn, body: dict) -> None:
        server.cache_is_old = False
        self.answer({"success": True})

    def on_server_info(self, server: VllmStandIn, body: dict) -> None:
        self.answer({"vllm_config": {"model_config": {"logprobs_mode": server.logprobs_mode}}})

    def on_get_world_size(self, server: VllmStandIn, body: dict) -> None:
        self.answer({"world_size": 2})

    def on_init_weight_transfer_engine(self, server: VllmStandIn, body: dict) -> None:
        assert body["init_info"]
        self.answer({"message": "initialized"})

    def on_start_weight_update(self, server: VllmStandIn, body: dict) -> None:
        self.answer({"message": "started"})

    def on_update_weights(self, server: VllmStandIn, body: dict) -> None:
        assert body["update_info"]
        server.cache_is_old = True
        self.answer({"message": "updated"})

    def on_finish_weight_update(self, server: VllmStandIn, body: dict) -> None:
        server.version = body["weight_version"]
        self.answer({"message": "finished"})

    def answer(self, said: Any, code: int = 200) -> None:
        """Send JSON."""
        data = said if isinstance(said, bytes) else json.dumps(said).encode()
        with suppress(OSError):  # the client may have given the request up
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
