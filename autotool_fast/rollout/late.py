"""The slot engine for a GPU: the host is one step behind the device.

`LateEngine.step` first gives the device the next step's work and then looks at the tokens of the step before, which
were copied to pinned memory meanwhile. So while the driver parses replies and runs tools, the device decodes. It does
what `engine.SlotEngine` does, with these differences:

- decoding rows live on the device (`decode.Decoder`): nothing is uploaded from step to step unless rows come or go, and
  on a GPU a step is one captured graph;
- prompts and tool results are read in a forward pass of their own, after the decoding step;
- a row whose turn has ended takes part in one more step, whose token is dropped: only the key and value of its last
  token were written, and they are written again when the row goes on.

Rows are the same as with `SlotEngine`, up to rounding: a draw depends on the row's seed and the token's position only.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from autotool_kernels import sample_logp_entropy
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from autotool_fast.rollout.attention import Batch, upload
from autotool_fast.rollout.decode import Capture, CudaGraphs, Decoder, DecodeState
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.rollout.kv_attention import Kernels, choose_kernels, plan_chunks

logger = logging.getLogger(__name__)

_NO_SLOTS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class _Flight:
    """Sampled tokens under way to the host.

    Attributes:
        keys: [n] rows they belong to.
        columns: [n] where each row's token is in `results`.
        wanted: [n] bool; cleared for rows whose turn turns out to have ended before.
        results: float64 [3, ...] tokens, log-probs and entropies, on the host.
        landed: recorded behind the copy on the device's stream; None where copies are immediate.
    """

    keys: np.ndarray
    columns: np.ndarray
    wanted: np.ndarray
    results: Tensor
    landed: torch.cuda.Event | None


class LateEngine(SlotEngine):
    """A `SlotEngine` whose host work overlaps the device's.

    `stats.decode_tokens` counts the dropped tokens too.

    Args:
        model, slots, max_len, prefill_chunk: see `SlotEngine`.
        kernels: attention; the best that is there if not given.
        capture: makes decoding steps repeatable, see `decode.Decoder`; None runs them as they are.
    """

    _POSITIONS_FIRST = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        max_len: int,
        prefill_chunk: int = 64,
        kernels: Kernels | None = None,
        capture: Capture | None = None,
    ) -> None:
        super().__init__(model, slots=slots, max_len=max_len, prefill_chunk=prefill_chunk)
        self.kernels = kernels or choose_kernels(model.device, model.dtype, self._cache.kv.shape[-1])
        self.decoder = Decoder(
            DecodeState(slots, max_len, model.device),
            hidden=self._hidden,
            logits=self._logits,
            sample=sample_logp_entropy,
            kernels=self.kernels,
            capture=capture,
        )
        self._decoding = np.zeros(slots, bool)  # has a pending token, on the device
        self._stale = True  # the device's plan is not the host's
        self._flights: deque[_Flight] = deque()

    @contextmanager
    def session(self, *, stop_ids: Collection[int], temperature: float) -> Iterator[LateEngine]:
        """See `SlotEngine.session`. Captured steps outlive it, and so does their memory."""
        with super().session(stop_ids=stop_ids, temperature=temperature):
            self.decoder.check_weights(self.model)
            self.decoder.state.temperature.fill_(temperature)
            try:
                yield self
            finally:
                self._flights.clear()

    def release(self, key: int) -> None:
        """See `SlotEngine.release`."""
        self._halt(np.array([self._slot[key]]))
        super().release(key)

    def step(self) -> list[tuple[int, bool]]:
        """Fill free slots, start one step on the device, and take the tokens of the one before from it.

        Returns and raises what `SlotEngine.step` does; also when the log-prob of a dropped token is not finite.
        """
        assert self._open, "step needs a session"
        landing = len(self._flights)
        self._admit()
        self._compact()
        self._decode()
        self._read()
        return [end for _ in range(landing) for end in self._land(self._flights.popleft())]

    def _decode(self) -> None:
        """Start a decoding step for the rows that may sample another token."""
        rows = np.flatnonzero(self._decoding & (self._cached + 1 < self._limit))
        if not rows.size:
            return
        state = self.decoder.state
        if self._stale:
            active = np.zeros(self.slots, bool)
            active[rows] = True
            state.set_plan(active, self._cached, self._seed)
            self._stale = False
        self.decoder.run(self.decoder.key(int(rows[-1]) + 1, int(self._cached[rows].max()) + 1))
        self._cached[rows] += 1
        self.stats.steps += 1
        self.stats.decode_tokens += rows.size
        self._send(rows, rows, state.results)

    def _read(self) -> None:
        """Start the next chunk of every row that has known tokens to read."""
        todo = np.where(self._reading & ~self._decoding, self._length - self._cached, 0)
        chunk_slots = np.flatnonzero(todo)
        if chunk_slots.size:
            self._forward(_NO_SLOTS, chunk_slots, np.minimum(todo[chunk_slots], self.prefill_chunk))

    def _plan(
        self,
        slots: np.ndarray,
        positions: np.ndarray,
        n_decode: int,
        chunk_slots: np.ndarray,
        chunk_lengths: np.ndarray,
    ) -> Batch:
        if self.kernels.varlen is None:
            return super()._plan(slots, positions, n_decode, chunk_slots, chunk_lengths)
        return plan_chunks(slots, positions, chunk_slots, chunk_lengths, self._cache, self.kernels.varlen)

    def _sample(self, slots: np.ndarray, logits: Tensor) -> list[tuple[int, bool]]:
        """Draw the first token of rows that have read all they know; they decode from the next step on."""
        if slots.size:
            drawn = self._draw(slots, logits)
            self.decoder.state.put(upload(slots, logits.device), drawn.token)
            self._decoding[slots] = True
            self._stale = True
            self._send(slots, np.arange(slots.size), torch.stack([value.double() for value in drawn]))
        return []

    def _send(self, slots: np.ndarray, columns: np.ndarray, results: Tensor) -> None:
        """Let results follow to the host, in stream order."""
        on_gpu = results.is_cuda
        host = torch.empty(results.shape, dtype=results.dtype, pin_memory=on_gpu)
        host.copy_(results, non_blocking=True)
        landed = torch.cuda.Event() if on_gpu else None
        if landed is not None:
            landed.record()
        self._flights.append(_Flight(self._key[slots], columns, np.ones(slots.size, bool), host, landed))

    def _land(self, flight: _Flight) -> list[tuple[int, bool]]:
        """Record the tokens of a flight, but for dropped ones; returns the turns that end with them."""
        if flight.landed is not None:
            flight.landed.synchronize()
        values = flight.results.numpy()[:, flight.columns]
        # A dropped token's keys and values lie in the cache as well.
        self._check_finite(values[1])
        token, logp, entropy = values[:, flight.wanted]
        slots = np.array([self._slot[key] for key in flight.keys[flight.wanted].tolist()], np.int64)
        ended = self._record(slots, token.astype(np.int64), logp.astype(np.float32), entropy.astype(np.float32))
        if ended:
            over = np.array([self._slot[key] for key, _ in ended])
            self._halt(over)
            self._cached[over] = self._length[over] - 1
        return ended

    def _halt(self, slots: np.ndarray) -> None:
        """Stop rows from decoding and drop their tokens under way."""
        for flight in self._flights:
            flight.wanted[np.isin(flight.keys, self._key[slots])] = False
        self._decoding[slots] = False
        self._stale = True

    def _move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        super()._move(sources, targets)
        self.decoder.state.move(sources, targets)
        self._decoding[targets] = self._decoding[sources]
        self._decoding[sources] = False
        self._stale = True


def open_slot_engine(
    model: PreTrainedModel, *, slots: int, max_len: int, prefill_chunk: int = 64, cuda_graphs: bool = True
) -> SlotEngine:
    """The engine for the device that the model is on.

    Args:
        model, slots, max_len, prefill_chunk: see `SlotEngine`.
        cuda_graphs: capture decoding steps, where the model allows it; on a GPU only.

    Raises:
        UserError: see `SlotEngine`.
    """
    if model.device.type != "cuda":
        return SlotEngine(model, slots=slots, max_len=max_len, prefill_chunk=prefill_chunk)
    problem = uncapturable(model) if cuda_graphs else ""
    capture = CudaGraphs() if cuda_graphs and not problem else None
    engine = LateEngine(model, slots=slots, max_len=max_len, prefill_chunk=prefill_chunk, capture=capture)
    if problem:
        _warn_once(f"decoding without CUDA graphs: {problem}")
    if engine.kernels.name == "sdpa":
        _warn_once(f"decoding attention by PyTorch's general kernel: {engine.kernels.reason}")
    return engine


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def uncapturable(model: PreTrainedModel) -> str:
    """Why a model's decoding step cannot be a CUDA graph, or nothing."""
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers does not say that {type(model).__name__} runs without looking at its data"
    waiting = _rope_types(model.config) & {"dynamic", "longrope"}
    return f"rotary embedding of type {waiting.pop()} looks at the positions" if waiting else ""


def _rope_types(config: PretrainedConfig) -> set[str]:
    found: set[str] = set()
    left: Sequence[object] = [getattr(config, "rope_parameters", None)]
    while left:
        found |= {value["rope_type"] for value in left if isinstance(value, dict) and "rope_type" in value}
        left = [inner for value in left if isinstance(value, dict) for inner in value.values()]
    return found
