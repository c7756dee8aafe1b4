"""One decoding step on static tensors: the part of the late engine that a GPU can run as a captured graph.

A step takes every active slot from its pending token to the next one: embed, decode, sample, write the token where the
next step finds it. It reads and writes the tensors of `DecodeState`, the KV cache and the weights, always at the same
addresses. What is a Python number in it (rows of the batch, positions to look at) follows from its key alone, and there
are few keys: rows and positions are rounded up. Slots of the batch that are not active take part with one position, and
write where no row reads. A captured step keeps the modules and hooks that the model had then.

Which slots are active, when a turn ends and what happens to the tokens is the engine's business.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from autotool_kernels import SampledTokens
from torch import Tensor
from transformers import PreTrainedModel

from autotool_fast.rollout.attention import Batch, upload
from autotool_fast.rollout.kv_attention import DecodeBatch, Kernels

Replay = Callable[[], object]
Capture = Callable[[Callable[[], None]], Replay]
"""Runs a step until it is warm and returns what repeats it on the same tensors."""

_SHORTEST = 256  # positions of the smallest bounded attention


def batch_bucket(rows: int, slots: int) -> int:
    """Rows of the smallest batch that holds so many: 1, 2, 4, 8, 16, 24, ... 256, 288, 320, ... but at most `slots`."""
    if rows <= 4:
        size = 1 << (rows - 1).bit_length()
    else:
        step = 8 if rows <= 256 else 32
        size = -(-rows // step) * step
    return min(size, slots)


def length_bucket(length: int, max_len: int) -> int:
    """Positions of the smallest bounded attention that looks at so many: 256, 512, 1024, ... but at most `max_len`."""
    return min(max(_SHORTEST, 1 << (length - 1).bit_length()), max_len)


class DecodeState:
    """What a decoding step knows of the slots.

    Attributes:
        plan: int64 [3, slots], the rows `active`, `position` and `seed`: 1 or 0; index of the pending token in its row,
            for inactive slots the last one; seed of the row.
        token: int64 [slots], the pending tokens.
        temperature: float32 [slots].
        results: float64 [3, slots], the last step's tokens, log-probs and entropies. In one tensor of a type that holds
            all three exactly, so that the host copies once.
    """

    def __init__(self, slots: int, max_len: int, device: torch.device) -> None:
        self.max_len = max_len
        self.slots = torch.arange(slots, device=device)
        self.plan = torch.zeros((3, slots), dtype=torch.int64, device=device)
        self.active, self.position, self.seed = (self.plan[row] for row in range(3))
        self.token = torch.zeros(slots, dtype=torch.int64, device=device)
        self.temperature = torch.ones(slots, dtype=torch.float32, device=device)
        self.results = torch.zeros((3, slots), dtype=torch.float64, device=device)
        self.set_plan(np.zeros(slots, bool), np.zeros(slots, np.int64), np.zeros(slots, np.int64))

    def set_plan(self, active: np.ndarray, position: np.ndarray, seed: np.ndarray) -> None:
        """Say which slots take part in the next steps, from which position and with which seed; each [slots]."""
        # No row reads what lies at the last position: a token there could have no successor.
        position = np.where(active, position, self.max_len - 1)
        self.plan.copy_(upload(np.stack([active.astype(np.int64), position, seed]), self.plan.device))

    def put(self, slots: Tensor, tokens: Tensor) -> None:
        """Set the pending tokens of some slots."""
        self.token.index_copy_(0, slots, tokens)

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Carry pending tokens over to other slots."""
        sources, targets = (upload(s, self.token.device) for s in (sources, targets))
        self.put(targets, self.token[sources])


class Decoder:
    """Runs decoding steps, each under its key.

    Args:
        state: what it reads and writes.
        hidden: (tokens [b], rotary positions [b], batch) -> last hidden states [b, H]; writes keys and values.
        logits: hidden states -> logits [b, V].
        sample: `sample_logp_entropy`.
        kernels: attention over the slots.
        capture: makes a repeatable step of a function; None runs every step as it is.
    """

    def __init__(
        self,
        state: DecodeState,
        *,
        hidden: Callable[[Tensor, Tensor, Batch], Tensor],
        logits: Callable[[Tensor], Tensor],
        sample: Callable[..., SampledTokens],
        kernels: Kernels,
        capture: Capture | None = None,
    ) -> None:
        self.state = state
        self._hidden, self._logits, self._sample = hidden, logits, sample
        self._kernels, self._capture = kernels, capture
        self._captured: dict[tuple[int, int], Replay] = {}
        self._addresses: tuple[int, ...] = ()

    @property
    def captured(self) -> list[tuple[int, int]]:
        """Keys (rows, positions) of the steps that were captured."""
        return sorted(self._captured)

    def key(self, rows: int, longest: int) -> tuple[int, int]:
        """(rows of the batch, positions its attention looks at) for the first `rows` slots, none longer than that."""
        max_len = self.state.max_len
        bounded = self._kernels.bounded
        return batch_bucket(rows, len(self.state.slots)), length_bucket(longest, max_len) if bounded else max_len

    def check_weights(self, model: PreTrainedModel) -> None:
        """Forget the captured steps if the model's weights have moved; new values where they are need nothing."""
        addresses = tuple(t.data_ptr() for t in itertools.chain(model.parameters(), model.buffers()))
        if addresses != self._addresses:
            self._captured.clear()
        self._addresses = addresses

    def run(self, key: tuple[int, int]) -> None:
        """One step of the slots that `key` covers."""
        if self._capture is None:
            return self.step(*key)
        if key not in self._captured:
            self._captured[key] = self._first(key, self._capture)
        self._captured[key]()
        return None

    def _first(self, key: tuple[int, int], capture: Capture) -> Replay:
        """Capture a step while no slot is active, so that warming up moves no row on."""
        state = self.state
        plan, token = state.plan.clone(), state.token.clone()
        nothing = np.zeros(len(state.slots), np.int64)
        state.set_plan(nothing.astype(bool), nothing, nothing)
        replay = capture(lambda: self.step(*key))
        state.plan.copy_(plan)
        state.token.copy_(token)
        return replay

    def step(self, rows: int, longest: int) -> None:
        """What is captured: no host value but `rows` and `longest` in it, and nothing that waits for the device."""
        state = self.state
        active, position = state.active[:rows], state.position[:rows]
        seen = position * active  # an inactive slot looks at its first position
        attend = self._kernels.decode((seen + 1).int(), longest)
        hidden = self._hidden(state.token[:rows], seen, DecodeBatch(state.slots[:rows], position, attend))
        drawn = self._sample(
            self._logits(hidden),
            temperature=state.temperature[:rows],
            seed=state.seed[:rows],
            offset=position + 1,  # of the token that is drawn
        )
        state.token[:rows] = drawn.token
        for row, value in enumerate(drawn):
            state.results[row, :rows] = value
        position += active


class CudaGraphs:
    """A `Capture`: CUDA graphs that share one memory pool, which lives as long as they do."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream()

    def __call__(self, run: Callable[[], None]) -> Replay:
        current, side = torch.cuda.current_stream(), self._side
        side.wait_stream(current)
        with torch.cuda.stream(side):  # lazy initialisation and kernel compilation cannot be captured
            for _ in range(2):
                run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Tools may use CUDA in other threads meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            run()
        return graph.replay
