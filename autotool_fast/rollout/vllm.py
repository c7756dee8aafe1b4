"""Rollouts on a vLLM server: `VllmEngine` offers the driver what the slot engine does, over HTTP.

Every turn is one completion request of token ids, never text. Guarantees:

- a session begins with the trainer's weights on the server. They are sent whenever a parameter has changed since they
  last were, the prefix cache is emptied after them, and the server's weight version is compared at the beginning and
  at the end: tokens of a server that was restarted in between, or that another run has used, are never returned;
- ids and log-probs are the server's, of the very distribution sampled from; a row's stop tokens are the driver's alone
  and no sampling setting of the model folder applies. A server knows no entropies: `Row.entropy` is -logp, the estimate
  from one sample, while the loss has the trainer's own;
- what cannot work is a `UserError`: no answer within the deadline, another model, answers without ids or log-probs.

It does not sample the same tokens again: a server batches as it likes, so a seed does not fix a run. A turn is known
when it is complete, so a deadline cuts between turns and waits for an episode's first. HTTP and the way of the weights
are left to `server`, the correction for the server's numerics to `objective.capped_old_logp`.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autotool_fast.config import TrainConfig
from autotool_fast.errors import UserError
from autotool_fast.metrics import phase
from autotool_fast.rollout.records import Row
from autotool_fast.rollout.rng import row_seeds
from autotool_fast.rollout.server import (
    VERSIONS,
    Call,
    FolderTransfer,
    NcclTransfer,
    Transfer,
    VllmServer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLL_S = 0.5
"""Longest time that `step` waits, so that the driver can look at deadlines."""


@dataclass
class _Row:
    """One sequence; `call` is the request for its current turn."""

    ids: list[int]
    logp: list[float]
    seed: int
    limit: int  # tokens that the current turn may sample
    started: float  # seconds, time.monotonic
    sampled: bool = False
    call: Call = field(default_factory=Call)


class VllmEngine:
    """Samples many sequences at once on a server; the methods are those of `engine.SlotEngine`.

    Args:
        model: whose weights the server is to have; nothing is computed with it.
        served_model: the name the server knows it by.
        slots: requests under way at once.
        max_len: tokens a row can hold.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        server: VllmServer,
        transfer: Transfer,
        *,
        served_model: str,
        slots: int,
        max_len: int,
    ) -> None:
        self.model, self.slots, self.max_len = model, slots, max_len
        self._server, self._transfer, self._served_model = server, transfer, served_model
        self._run, self._syncs = uuid.uuid4().hex, 0
        self._version = ""
        self._sent: list[int] | None = None  # the parameters' change counters when they were sent
        self._pending: deque[tuple[list[int], int, int, int]] = deque()  # (prompt, key, seed, limit)
        self._rows: dict[int, _Row] = {}
        self._answers: queue.SimpleQueue[tuple[int, Call, Any]] = queue.SimpleQueue()
        self._stop_ids: frozenset[int] = frozenset()
        self._temperature = 1.0
        self._open = False

    @contextmanager
    def session(self, *, stop_ids: Collection[int], temperature: float) -> Iterator[VllmEngine]:
        """Use the server for sampling; on exit requests under way are given up.

        Args:
            stop_ids: token ids that end a turn.
            temperature: of the sampling distribution; 0 is greedy.

        Raises:
            UserError: the server cannot serve this model or temperature, or has not had the right weights all along.
        """
        assert not self._open, "sessions do not nest"
        self._stop_ids, self._temperature = frozenset(stop_ids), temperature
        if self._sent is None:
            self._server.probe(self._served_model, self.max_len)
        self._check_log_probs()
        # Optimizers write in place, which torch counts: a step that changed nothing sends nothing.
        now = [parameter._version for parameter in self.model.parameters()]
        if now == self._sent:
            self._check_version()
        else:
            with phase("sync"):
                self._send_weights()
            self._sent = now
        self._open = True
        try:
            yield self
            self._check_version()
        finally:
            self._open = False
            self._pending.clear()
            for key in list(self._rows):
                self.release(key)

    def _send_weights(self) -> None:
        self._syncs += 1
        version = f"{self._run}-{self._syncs}"
        self._server.tell("/pause?mode=abort")
        self._transfer.send(self.model, version)
        self._server.empty_prefix_cache()
        self._server.tell("/resume")
        self._version = version
        self._check_version()

    def _check_version(self) -> None:
        answer = self._server.ask("GET", "/weight_info") or {}
        if answer.get("weight_version") != self._version:
            what = "does not have the weights it was sent: it was restarted, or another run uses it"
            raise self._server.problem(what, "repeat the command with --resume, one run per server")

    def _check_log_probs(self) -> None:
        """A server may report log-probs from before the temperature is applied; at 0 and 1 they are the same."""
        if self._temperature in (0.0, 1.0):
            return
        info = self._server.ask("GET", "/server_info?config_format=json") or {}
        mode = ((info.get("vllm_config") or {}).get("model_config") or {}).get("logprobs_mode")
        if mode != "processed_logprobs":
            what = f"reports log-probs without the temperature ({self._temperature:g})"
            raise self._server.problem(what, "start it with --logprobs-mode processed_logprobs")

    def submit(self, prompt: Sequence[int], keys: Sequence[int], seeds: np.ndarray, max_new_tokens: int) -> None:
        """Queue a group of rows that start from one prompt; the server's prefix cache reads it once."""
        assert len(prompt) > 0 < max_new_tokens
        assert len(prompt) + max_new_tokens <= self.max_len
        ids = [int(i) for i in prompt]
        self._pending += [(ids, key, seed, max_new_tokens) for key, seed in zip(keys, seeds.tolist(), strict=True)]

    def extend(self, key: int, ids: Sequence[int], max_new_tokens: int) -> None:
        """Append tokens to a row whose turn ended, and let it go on sampling for up to `max_new_tokens`."""
        row = self._rows[key]
        assert 0 < max_new_tokens <= self.room(key) - len(ids)
        row.ids += [int(i) for i in ids]
        row.logp += [0.0] * len(ids)
        row.limit = max_new_tokens
        self._request(key, row)

    def row(self, key: int) -> Row:
        """The tokens of a row so far; logp and entropy (-logp) are 0 where not sampled."""
        row = self._rows[key]
        logp = np.array(row.logp, np.float32)
        return Row(np.array(row.ids, np.int64), logp, -logp)

    def room(self, key: int) -> int:
        """Tokens that still fit into the row."""
        return self.max_len - len(self._rows[key].ids)

    def age(self, key: int) -> float:
        """Seconds since a row's first request, without excused ones."""
        return time.monotonic() - self._rows[key].started

    def excuse(self, key: int, seconds: float) -> None:
        """Leave out of the age of all rows but `key` the last `seconds`, in which only that one was served."""
        for other, row in self._rows.items():
            if other != key:
                row.started += seconds

    def older_than(self, seconds: float) -> list[int]:
        """Keys of the rows whose first request is more than `seconds` old and has been answered."""
        limit = time.monotonic() - seconds
        return [key for key, row in self._rows.items() if row.sampled and row.started < limit]

    def release(self, key: int) -> None:
        """Forget a row; a request under way for it is given up."""
        self._rows.pop(key).call.give_up()

    @property
    def busy(self) -> bool:
        """Whether any row is queued or has requests to come."""
        return bool(self._pending or self._rows)

    def step(self) -> list[tuple[int, bool]]:
        """Send what may be sent, then wait a moment for answers.

        Returns:
            (key, stopped) of the rows whose turn ended: by a stop token, or (stopped False) by their token limit; none
            if no answer came in time.

        Raises:
            UserError: the server failed, or its answer is not what was asked for.
        """
        assert self._open, "step needs a session"
        while self._pending and len(self._rows) < self.slots:
            prompt, key, seed, limit = self._pending.popleft()
            self._rows[key] = row = _Row(list(prompt), [0.0] * len(prompt), seed, limit, time.monotonic())
            self._request(key, row)
        ended = []
        with suppress(queue.Empty):
            answer = self._answers.get(timeout=POLL_S)
            while True:
                ended += self._take(*answer)
                answer = self._answers.get_nowait()
        return ended

    def _request(self, key: int, row: _Row) -> None:
        row.call = call = Call()
        body = {
            "model": self._served_model,
            "prompt": list(row.ids),
            "max_tokens": row.limit,
            "temperature": self._temperature,
            "seed": int(row_seeds(row.seed, len(row.ids), 0, np.zeros(1, np.int64))[0]) & (2**63 - 1),
            "stop_token_ids": sorted(self._stop_ids),
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        answers = self._answers

        def work() -> None:
            try:
                answers.put((key, call, self._server.ask("POST", "/v1/completions", body, call=call)))
            except Exception as error:  # raised again by `step`, in the caller's thread
                answers.put((key, call, error))

        threading.Thread(target=work, daemon=True).start()

    def _take(self, key: int, call: Call, answer: Any) -> list[tuple[int, bool]]:
        """Append an answer to its row; returns the turn that ended, if the row still waits for it."""
        if call.given_up:
            return []
        if isinstance(answer, Exception):
            raise answer
        row = self._rows[key]
        ids, logp = self._read(answer, row)
        row.ids += ids
        row.logp += logp
        row.sampled, row.call = True, Call()
        return [(key, ids[-1] in self._stop_ids)]

    def _read(self, answer: Any, row: _Row) -> tuple[list[int], list[float]]:
        """The sampled ids and their log-probs.

        Raises:
            UserError: there are none, or they are not what was asked for.
        """
        try:
            (choice,) = answer["choices"]
            ids, logp, reason = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
            usable = all(type(i) is int for i in ids) and all(map(math.isfinite, logp))
            usable = usable and 0 < len(ids) == len(logp) and choice["prompt_token_ids"] == row.ids
        except (KeyError, TypeError, ValueError):
            usable = False
        if not usable:
            raise self._server.problem("answered without token ids and their log-probs", f"it must be {VERSIONS}")
        stops = [place for place, token in enumerate(ids) if token in self._stop_ids]
        if stops not in ([], [len(ids) - 1]) or len(ids) > row.limit or (not stops and len(ids) < row.limit):
            what = f"ended a reply of {len(ids)} tokens ({reason}) neither at a stop token nor at its limit"
            raise self._server.problem(what, "use it for one run alone, without --override-generation-config")
        return ids, logp


def check_server(config: TrainConfig) -> None:
    """Refuse a run whose server does not answer or does not serve its model.

    Raises:
        UserError: what is wrong with it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        remedy = "leave torchrun out, or use rollout.backend engine"
        raise UserError("vllm takes weights from one process only", where="rollout.backend", remedy=remedy)
    _server(config).probe(_served_model(config), config.model.max_positions)


def open_transfer(config: TrainConfig, folder: Path) -> Transfer:
    """The way to the server's weights; one serves all models of a run.

    Args:
        folder: for weights that go through files.
    """
    server = _server(config)
    return FolderTransfer(server, folder) if config.rollout.sync == "folder" else NcclTransfer(server)


def open_engine(config: TrainConfig, model: PreTrainedModel, transfer: Transfer) -> VllmEngine:
    """An engine that samples from `model` on the configured server."""
    return VllmEngine(
        model,
        _server(config),
        transfer,
        served_model=_served_model(config),
        slots=config.rollout.slots,
        max_len=config.model.max_positions,
    )


def _server(config: TrainConfig) -> VllmServer:
    return VllmServer(config.rollout.server, timeout_s=config.rollout.timeout_s)


def _served_model(config: TrainConfig) -> str:
    return config.rollout.served_model or config.model.path
