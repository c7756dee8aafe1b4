"""The slot engine: continuous batching of token sequences on static KV slots.

It samples from any Hugging Face decoder that dispatches attention through `AttentionInterface`. Every step is
one forward pass over one flat batch: the pending token of each decoding slot, plus up to `prefill_chunk`
tokens of each slot that has more to read (a new prompt, or tool results after a turn). Guarantees:

- each token enters the model once: a group's prompt is read by one slot, its keys and values are copied to
  the rest, and a row keeps its cache across turns;
- token ids are append-only, and log-prob and entropy are those of the very distribution sampled from;
- a row's draws depend on its seed and the token's position only, not on slots, neighbours or arrival order.
  (Logits may differ by rounding between batch shapes, as in any batched matrix product.)

What a turn means, budgets beyond a row's token limit, and tools are the driver's business. On a GPU `late.LateEngine`
takes its place, which does the same without waiting for each step's tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from autotool_kernels import SampledTokens, sample_logp_entropy
from autotool_kernels.products import block_weight, project
from torch import Tensor
from transformers import PreTrainedModel

from autotool_fast.errors import UserError
from autotool_fast.policy import logit_options
from autotool_fast.rollout.attention import ATTENTION_NAME, Batch, SlotCache, plan_batch, upload
from autotool_fast.rollout.records import Row

_FREE = -1


@dataclass
class _Group:
    """Rows that share a prompt. `waiting` rows sit in slots until the first of them has read the prompt."""

    prompt: np.ndarray
    queue: deque[tuple[int, int]]  # (key, seed) without a slot yet
    limit: int
    waiting: list[int] = field(default_factory=list)  # keys
    prefix: Tensor | None = None  # saved keys and values, if rows were still queued when the prompt was read
    logits: Tensor | None = None  # [V] next-token logits after the prompt, saved with it


@dataclass
class EngineStats:
    """Counts since the session began: forward passes, tokens fed in chunks, tokens fed one per row."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0


class SlotEngine:
    """Samples many sequences at once from one model.

    Args:
        model: a causal decoder whose attention goes through `AttentionInterface`, with full attention in
            every layer and a linear head (with bias, scale or soft cap as the model has them).
        slots: sequences decoded at once.
        max_len: tokens a slot can hold.
        prefill_chunk: most tokens of one sequence that enter the model per step.

    Raises:
        UserError: when the model is not of that kind.
    """

    _POSITIONS_FIRST = False  # of the cache's layout: heads first suits a CPU

    def __init__(self, model: PreTrainedModel, *, slots: int, max_len: int, prefill_chunk: int = 64) -> None:
        config = model.config
        if not getattr(model, "_supports_attention_backend", False):
            raise UserError(
                f"{type(model).__name__} does not take a custom attention function",
                where="model",
                remedy="use a decoder such as Qwen2, Qwen3 or Llama",
            )
        if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
            raise UserError("the model has layers without full attention", where="model")
        if getattr(config, "attn_logit_softcapping", None) is not None:
            raise UserError("the model caps its attention logits (attn_logit_softcapping)", where="model")
        self._scale, self._softcap = logit_options(config)
        self.model = model
        self.max_len = max_len
        self.prefill_chunk = prefill_chunk
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = (config.num_hidden_layers, 2, slots, kv_heads, max_len, head_dim)
        self._cache = SlotCache(shape, model.dtype, model.device, self._POSITIONS_FIRST)
        self._ids = np.zeros((slots, max_len), np.int64)
        self._logp = np.zeros((slots, max_len), np.float32)
        self._entropy = np.zeros((slots, max_len), np.float32)
        self._key = np.full(slots, _FREE, np.int64)
        self._length = np.zeros(slots, np.int64)  # tokens known
        self._cached = np.zeros(slots, np.int64)  # tokens whose keys and values are in the cache
        self._limit = np.zeros(slots, np.int64)  # length at which the turn is cut
        self._seed = np.zeros(slots, np.int64)
        self._reading = np.zeros(slots, bool)  # takes part in forward passes
        self._begun = np.zeros(slots, bool)  # has a sampled token
        self._started = np.zeros(slots, np.float64)  # seconds, time.monotonic
        self._slot: dict[int, int] = {}  # key -> slot
        self._pending: deque[_Group] = deque()
        self._leader: dict[int, _Group] = {}  # key of the row that reads the group's prompt
        self._is_stop = np.zeros(0, bool)
        self._temperature = 1.0
        self._blocked_head: Tensor | None = None  # the head as large products on a CPU want it
        self._open = False
        self.stats = EngineStats()

    @property
    def slots(self) -> int:
        """Sequences decoded at once."""
        return self._key.size

    @contextmanager
    def session(self, *, stop_ids: Collection[int], temperature: float) -> Iterator[SlotEngine]:
        """Borrow the model for sampling; on exit it is as it was and the engine is empty.

        Args:
            stop_ids: token ids that end a turn.
            temperature: of the sampling distribution; 0 is greedy.
        """
        assert not self._open, "sessions do not nest"
        model, implementation = self.model, self.model.config._attn_implementation
        training = [module for module in model.modules() if module.training]
        self._is_stop = np.zeros(model.config.vocab_size, bool)
        self._is_stop[list(stop_ids)] = True
        self._temperature = temperature
        self.stats = EngineStats()
        model.config._attn_implementation = ATTENTION_NAME
        model.eval()
        head = model.get_output_embeddings().weight
        self._blocked_head = block_weight(head, torch.promote_types(head.dtype, torch.float32), self.slots)
        self._open = True
        try:
            with torch.inference_mode():
                yield self
        finally:
            self._open = False
            self._blocked_head = None
            model.config._attn_implementation = implementation
            for module in training:
                module.training = True
            self._pending.clear()
            self._leader.clear()
            for key in list(self._slot):
                self.release(key)

    def submit(
        self, prompt: Sequence[int], keys: Sequence[int], seeds: np.ndarray, max_new_tokens: int
    ) -> None:
        """Queue a group of rows that start from one prompt.

        Args:
            prompt: its token ids, at least one.
            keys: names of the rows, non-negative and not in use.
            seeds: int64, one per row.
            max_new_tokens: cut the first turn after this many sampled tokens.
        """
        assert len(prompt) > 0 < max_new_tokens
        assert len(prompt) + max_new_tokens <= self.max_len
        queue = deque(zip(keys, seeds.tolist(), strict=True))
        self._pending.append(_Group(np.asarray(prompt, np.int64), queue, len(prompt) + max_new_tokens))

    def extend(self, key: int, ids: Sequence[int], max_new_tokens: int) -> None:
        """Append tokens to a row whose turn ended, and let it go on sampling for up to `max_new_tokens`."""
        slot = self._slot[key]
        start, end = self._length[slot], self._length[slot] + len(ids)
        assert not self._reading[slot]
        assert 0 < max_new_tokens <= self.max_len - end
        self._ids[slot, start:end] = ids
        self._logp[slot, start:end] = 0.0
        self._entropy[slot, start:end] = 0.0
        self._length[slot] = end
        self._limit[slot] = end + max_new_tokens
        self._reading[slot] = True

    def row(self, key: int) -> Row:
        """The tokens of a row so far; logp and entropy are 0 where not sampled."""
        slot = self._slot[key]
        end = self._length[slot]
        return Row(self._ids[slot, :end], self._logp[slot, :end], self._entropy[slot, :end])

    def room(self, key: int) -> int:
        """Tokens that still fit into the row's slot."""
        return self.max_len - int(self._length[self._slot[key]])

    def age(self, key: int) -> float:
        """Seconds since a row took its slot, without excused ones."""
        return time.monotonic() - float(self._started[self._slot[key]])

    def excuse(self, key: int, seconds: float) -> None:
        """Leave out of the age of all rows but `key` the last `seconds`, in which only that one was served."""
        others = self._key != _FREE
        others[self._slot[key]] = False
        self._started[others] += seconds

    def older_than(self, seconds: float) -> list[int]:
        """Keys of the rows that took their slot more than `seconds` ago and have sampled a token since."""
        old = (self._key != _FREE) & self._begun & (self._started < time.monotonic() - seconds)
        return self._key[old].tolist()

    def release(self, key: int) -> None:
        """Give a row's slot back."""
        slot = self._slot.pop(key)
        self._key[slot] = _FREE
        self._reading[slot] = False

    @property
    def busy(self) -> bool:
        """Whether any row is queued or holds a slot."""
        return bool(self._pending or self._slot)

    def step(self) -> list[tuple[int, bool]]:
        """Fill free slots, run one forward pass, sample.

        Returns:
            (key, stopped) of the rows whose turn ended: by a stop token, or (stopped False) by their token
            limit. They hold their slots until `extend` or `release`.

        Raises:
            FloatingPointError: when a sampled token's log-prob is not finite.
        """
        assert self._open, "step needs a session"
        ended = self._admit()
        self._compact()
        todo = np.where(self._reading, self._length - self._cached, 0)
        decode = np.flatnonzero(todo == 1)
        chunk_slots = np.flatnonzero(todo > 1)
        if decode.size or chunk_slots.size:
            ended += self._forward(decode, chunk_slots, np.minimum(todo[chunk_slots], self.prefill_chunk))
        return ended

    def _forward(self, decode: np.ndarray, chunk_slots: np.ndarray, chunk_lengths: np.ndarray) -> list:
        slots = np.concatenate([decode, np.repeat(chunk_slots, chunk_lengths)])
        ends = np.cumsum(chunk_lengths)
        positions = self._cached[slots]
        positions[decode.size :] += np.arange(ends[-1] if ends.size else 0)
        positions[decode.size :] -= np.repeat(ends - chunk_lengths, chunk_lengths)
        batch = self._plan(slots, positions, decode.size, chunk_slots, chunk_lengths)
        device = batch.slots.device
        hidden = self._hidden(upload(self._ids[slots, positions], device), batch.positions, batch)
        self._cached[decode] += 1
        self._cached[chunk_slots] += chunk_lengths
        self.stats.steps += 1
        self.stats.decode_tokens += decode.size
        self.stats.prefill_tokens += int(chunk_lengths.sum())

        slots = np.concatenate([decode, chunk_slots])
        last = np.concatenate([np.arange(decode.size), decode.size + ends - 1])
        read = self._cached[slots] == self._length[slots]
        slots, last = slots[read], last[read]
        logits = self._logits(hidden[upload(last, device)])  # [rows, V]
        if self._leader:
            slots, logits = self._share_prompts(slots, logits)
        return self._sample(slots, logits)

    def _plan(
        self,
        slots: np.ndarray,
        positions: np.ndarray,
        n_decode: int,
        chunk_slots: np.ndarray,
        chunk_lengths: np.ndarray,
    ) -> Batch:
        return plan_batch(slots, positions, n_decode, chunk_slots, chunk_lengths, self._cache)

    def _hidden(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """Last hidden states [N, H] of a flat batch of tokens [N], at rotary positions [N]."""
        self._cache.batch = batch
        return self.model.base_model(
            input_ids=tokens[None],
            position_ids=positions[None],
            past_key_values=self._cache,
            use_cache=True,
            slot_batch=batch,
        ).last_hidden_state[0]

    def _logits(self, hidden: Tensor) -> Tensor:
        """The model's logits [rows, V] of hidden states [rows, H]; float32 also of low-precision weights."""
        head = self.model.get_output_embeddings()
        bias, wide = getattr(head, "bias", None), torch.promote_types(head.weight.dtype, torch.float32)
        if wide == head.weight.dtype and (bias is not None or type(head) is not torch.nn.Linear):
            logits = head(hidden)
        else:  # as the trainer computes them: bfloat16 logits would be off by up to 2^-9 of their size
            logits = project(hidden, head.weight, wide, self._blocked_head)
            if bias is not None:
                logits += bias
        if self._scale != 1.0:
            logits = logits * self._scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def _share_prompts(self, slots: np.ndarray, logits: Tensor) -> tuple[np.ndarray, Tensor]:
        """Hand finished prompts to the rows waiting for them; returns all rows to sample and their logits."""
        all_slots, source = list(slots), list(range(len(slots)))
        for index, slot in enumerate(slots):
            group = self._leader.pop(int(self._key[slot]), None)
            if group is None:
                continue
            length = int(self._length[slot])
            if group.waiting:
                followers = np.array([self._slot[key] for key in group.waiting])
                self._cache.copy(slot, followers, length)
                self._cached[followers] = length
                self._reading[followers] = True
                all_slots += followers.tolist()
                source += [index] * followers.size
            if group.queue:
                group.prefix, group.logits = self._cache.save(slot, length), logits[index].clone()
        return np.array(all_slots, np.int64), logits[upload(np.array(source, np.int64), logits.device)]

    def _sample(self, slots: np.ndarray, logits: Tensor) -> list[tuple[int, bool]]:
        """Draw one token for each slot; returns the turns that end with it."""
        if not slots.size:
            return []
        drawn = self._draw(slots, logits)
        token, logp, entropy = drawn.token.cpu(), drawn.logp.float().cpu(), drawn.entropy.float().cpu()
        return self._record(slots, token.numpy(), logp.numpy(), entropy.numpy())

    def _draw(self, slots: np.ndarray, logits: Tensor) -> SampledTokens:
        """The next token of each slot, all of whose tokens are known."""
        seed, offset = (upload(x[slots], logits.device) for x in (self._seed, self._length))
        return sample_logp_entropy(logits, temperature=self._temperature, seed=seed, offset=offset)

    def _record(
        self, slots: np.ndarray, token: np.ndarray, logp: np.ndarray, entropy: np.ndarray
    ) -> list[tuple[int, bool]]:
        """Append one sampled token to each slot; returns the turns that end with it."""
        self._check_finite(logp)
        at = self._length[slots]
        self._ids[slots, at] = token
        self._logp[slots, at] = logp
        self._entropy[slots, at] = entropy
        self._length[slots] = at + 1
        self._begun[slots] = True
        stopped = self._is_stop[token]
        over = stopped | (at + 1 >= self._limit[slots])
        ended = slots[over]
        self._reading[ended] = False
        return list(zip(self._key[ended].tolist(), stopped[over].tolist(), strict=True))

    def _check_finite(self, logp: np.ndarray) -> None:
        if not np.isfinite(logp).all():
            self._cache.kv.zero_()
            raise FloatingPointError("the model's logits are not finite")

    def _admit(self) -> list[tuple[int, bool]]:
        """Give free slots to queued rows, in order; samples at once for those whose prompt has been read."""
        free = deque(np.flatnonzero(self._key == _FREE).tolist()) if self._pending else ()
        ended = []
        while self._pending and free:
            group = self._pending[0]
            taken = [free.popleft() for _ in range(min(len(free), len(group.queue)))]
            entries = [group.queue.popleft() for _ in taken]
            self._place(group, np.array(taken), entries)
            if group.prefix is not None:
                self._cache.load(group.prefix, np.array(taken))
                self._cached[taken] = group.prompt.size
                self._reading[taken] = True
                ended += self._sample(np.array(taken), group.logits.expand(len(taken), -1))
            elif any(waiting is group for waiting in self._leader.values()):
                group.waiting += [key for key, _ in entries]
            else:
                leader, *followers = (key for key, _ in entries)
                self._leader[leader] = group
                self._reading[taken[0]] = True
                group.waiting += followers
            if not group.queue:
                self._pending.popleft()
        return ended

    def _place(self, group: _Group, taken: np.ndarray, entries: list[tuple[int, int]]) -> None:
        length = group.prompt.size
        self._ids[taken, :length] = group.prompt
        self._logp[taken, :length] = 0.0
        self._entropy[taken, :length] = 0.0
        self._key[taken], self._seed[taken] = np.array(entries, np.int64).T
        self._length[taken] = length
        self._cached[taken] = 0
        self._limit[taken] = group.limit
        self._reading[taken] = False
        self._begun[taken] = False
        self._started[taken] = time.monotonic()
        self._slot.update((key, slot) for (key, _), slot in zip(entries, taken.tolist(), strict=True))

    def _compact(self) -> None:
        """Move the last rows into free slots, so that decode attention spans no more slots than rows."""
        count = len(self._slot)
        used = self._key != _FREE
        sources = np.flatnonzero(used[count:]) + count
        if not sources.size:
            return
        self._move(sources, np.flatnonzero(~used[:count]))

    def _move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self._cache.move(sources, targets, int(self._cached[sources].max()))
        for tokens in (self._ids, self._logp, self._entropy):
            tokens[targets] = tokens[sources]
        for state in (self._key, self._length, self._cached, self._limit, self._seed):
            state[targets] = state[sources]
        for state in (self._reading, self._begun, self._started):
            state[targets] = state[sources]
        self._key[sources] = _FREE
        self._reading[sources] = False
        self._slot.update(zip(self._key[targets].tolist(), targets.tolist(), strict=True))
