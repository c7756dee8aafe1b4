"""Attention over static KV slots, plugged into Hugging Face decoders.

One forward pass carries a flat batch of tokens, `[1, N]`: first one token for each decoding slot, then the
prefill chunks. `SlotCache` stands in for `past_key_values`: it writes the new keys and values into their
slots and hands the whole layer to `slot_attention`, which is registered with transformers as
"autotool_slots". The model's own code (norms, projections, rotary embedding) runs unchanged on packed tokens.
Which tokens go into a batch is the engine's business; batches for a GPU's attention kernels are in `kv_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION_NAME = "autotool_slots"
_KV_ROUND = 16


class Batch(Protocol):
    """What a forward pass needs to know of its flat batch of N tokens.

    Attributes:
        slots: [N] int64, slot of each token.
        positions: [N] int64, where its key and value go in that slot.
    """

    slots: Tensor
    positions: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of queries [N, H, D] to a layer's slots [slots, KV, max_len, D]; returns [N, H, D]."""
        ...


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device. A GPU gets it from pinned memory, in stream order: the host does not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class _Chunks:
    """Prefill chunks of similar length, padded to [b, T]."""

    slots: Tensor  # [b] int64
    token: Tensor  # [b, T] index into the flat batch; padding repeats the chunk's last token
    bias: Tensor  # [b, 1, T, L] 0 where attended, -inf elsewhere


@dataclass(frozen=True)
class SlotBatch:
    """Where each token of a flat batch lives, and what it may attend to.

    Attributes:
        slots: [N] int64, slot of each token.
        positions: [N] int64, absolute position of each token.
        n_decode: how many of the N tokens (the first ones) are single-token rows.
        span: decode attention runs over slots 0..span-1 in place.
        decode_bias: [span, 1, 1, L].
        chunks: prefill attention, in buckets of similar length.
        gather: [N] where each token's output is among the span's rows followed by the chunks' padded rows;
            None when the batch is exactly slots 0..span-1, in order, each with one token.
    """

    slots: Tensor
    positions: Tensor
    n_decode: int
    span: int
    decode_bias: Tensor
    chunks: tuple[_Chunks, ...]
    gather: Tensor | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `Batch`."""
        outputs = []
        n, span = self.n_decode, self.span
        if n:
            length = self.decode_bias.shape[-1]
            rows = query[:n]
            if span > n:
                # In-place views of the cache beat gathering it, even when some slots of the span decode nothing.
                rows = rows.new_zeros(span, *rows.shape[1:]).index_copy_(0, self.slots[:n], rows)
            keys, values = key[:span, :, :length], value[:span, :, :length]
            outputs.append(folded_attention(rows.unsqueeze(1), keys, values, self.decode_bias, scale).squeeze(1))
        for chunk in self.chunks:
            length = chunk.bias.shape[-1]
            keys, values = key[chunk.slots, :, :length], value[chunk.slots, :, :length]
            outputs.append(folded_attention(query[chunk.token], keys, values, chunk.bias, scale).flatten(0, 1))
        return outputs[0] if self.gather is None else torch.cat(outputs)[self.gather]


def round_up(length: int, limit: int) -> int:
    """`length` rounded up to whole blocks of positions, at most `limit`."""
    return min(-(-length // _KV_ROUND) * _KV_ROUND, limit)


def causal_bias(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Additive causal mask: [..., L] with 0 up to and including each position, -inf after it."""
    keys = torch.arange(length, device=positions.device)
    blocked = keys > positions.unsqueeze(-1)
    bias = torch.zeros(blocked.shape, dtype=dtype, device=positions.device)
    return bias.masked_fill_(blocked, float("-inf"))


def plan_batch(
    slots: np.ndarray,
    positions: np.ndarray,
    n_decode: int,
    chunk_slots: np.ndarray,
    chunk_lengths: np.ndarray,
    cache: SlotCache,
) -> SlotBatch:
    """Lay out one forward pass.

    Args:
        slots, positions: [N] where each token goes; the first `n_decode` in rising slot order.
        n_decode: single-token rows.
        chunk_slots, chunk_lengths: [c] the slots of the chunks that make up the rest, and their tokens.
        cache: the cache it will run on.
    """
    device, dtype, limit = cache.kv.device, cache.kv.dtype, cache.max_len
    decode = slots[:n_decode]
    ends = n_decode + np.cumsum(chunk_lengths)
    span = int(decode[-1]) + 1 if n_decode else 0
    decode_positions = np.zeros(span, np.int64)
    decode_positions[decode] = positions[:n_decode]
    length = round_up(int(decode_positions.max()) + 1, limit) if span else 0

    gather = slots.copy()
    filled = span
    buckets = []
    widths = np.frexp(chunk_lengths)[1]  # chunks whose lengths share a power of two are padded together
    for width in np.unique(widths):
        members = np.flatnonzero(widths == width)
        longest = chunk_lengths[members].max()
        first = (ends - chunk_lengths)[members]
        column = np.minimum(np.arange(longest), chunk_lengths[members, None] - 1)
        token = first[:, None] + column
        gather[token] = filled + np.arange(members.size)[:, None] * longest + column
        filled += token.size
        chunk_positions = positions[token]
        reach = round_up(int(chunk_positions.max()) + 1, limit)
        buckets.append(
            _Chunks(
                slots=upload(chunk_slots[members], device),
                token=upload(token, device),
                bias=causal_bias(upload(chunk_positions, device), reach, dtype).unsqueeze(1),
            )
        )
    return SlotBatch(
        slots=upload(slots, device),
        positions=upload(positions, device),
        n_decode=n_decode,
        span=span,
        decode_bias=causal_bias(upload(decode_positions, device), length, dtype)[:, None, None],
        chunks=tuple(buckets),
        gather=upload(gather, device) if buckets or span > n_decode else None,
    )


class SlotCache:
    """Keys and values of all slots, one allocation: [layers, 2, slots, kv_heads, max_len, head_dim].

    Zero-filled, because a masked position still multiplies its value by a zero weight. What lies beyond a
    row's length is stale and never attended to.

    Args:
        positions_first: in memory positions come before heads, as a GPU's attention kernels want them; `kv` then is a
            view with the shape above.
    """

    is_compileable = False

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, positions_first: bool = False
    ) -> None:
        layers, two, slots, kv_heads, self.max_len, head_dim = shape
        if positions_first:
            memory = (layers, two, slots, self.max_len, kv_heads, head_dim)
            self.kv = torch.zeros(memory, dtype=dtype, device=device).transpose(3, 4)
        else:
            self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.batch: Batch | None = None

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write a flat batch's keys and values ([1, kv_heads, N, head_dim]); returns the layer's slots."""
        keys, values = self.kv[layer_idx]  # [slots, kv_heads, max_len, head_dim]
        where = (self.batch.slots, self.batch.positions)
        keys.transpose(1, 2)[where] = key[0].transpose(0, 1)
        values.transpose(1, 2)[where] = value[0].transpose(0, 1)
        return keys, values

    def copy(self, source: int, targets: np.ndarray, length: int) -> None:
        """Copy the first `length` positions of one slot to others."""
        targets = upload(targets, self.kv.device)
        self.kv[:, :, targets, :, :length] = self.kv[:, :, source : source + 1, :, :length]

    def move(self, sources: np.ndarray, targets: np.ndarray, length: int) -> None:
        """Copy the first `length` positions of each source slot to its target; the two sets are disjoint."""
        sources, targets = (upload(s, self.kv.device) for s in (sources, targets))
        self.kv[:, :, targets, :, :length] = self.kv[:, :, sources, :, :length]

    def save(self, slot: int, length: int) -> Tensor:
        """A copy of the first `length` positions of a slot: [layers, 2, kv_heads, length, head_dim]."""
        return self.kv[:, :, slot, :, :length].clone()

    def load(self, saved: Tensor, targets: np.ndarray) -> None:
        """Put a saved prefix into slots."""
        targets = upload(targets, self.kv.device)
        self.kv[:, :, targets, :, : saved.shape[3]] = saved.unsqueeze(2)


def folded_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """[b, T, H, D] queries against [b, KV, L, D] keys; bias [b, 1, T, L]. Returns [b, T, H, D].

    Query heads that share a key-value head are folded into the query length, so keys are never repeated.
    """
    b, t, heads, dim = query.shape
    kv_heads = key.shape[1]
    share = heads // kv_heads
    folded = query.view(b, t, kv_heads, share, dim).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(b, kv_heads, share * t, dim)
    if share > 1 and t > 1:
        bias = bias.repeat(1, 1, share, 1)
    out = scaled_dot_product_attention(folded, key, value, attn_mask=bias, scale=scale)
    return out.view(b, kv_heads, share, t, dim).permute(0, 3, 1, 2, 4).reshape(b, t, heads, dim)


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    slot_batch: Batch | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of a flat batch: query [1, H, N, D]; key, value as `SlotCache.update` returns them.

    Masking comes from `slot_batch` alone. No mask function is registered, so transformers builds none.
    """
    if slot_batch is None:
        raise ValueError(f"{ATTENTION_NAME} attention runs only inside the slot engine")
    windowed = sliding_window is not None and sliding_window < key.shape[2]
    if windowed or softcap is not None or s_aux is not None:
        raise ValueError("the slot engine has no sliding-window, soft-capped or sink attention")
    return slot_batch.attend(query[0].transpose(0, 1), key, value, scaling).unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, slot_attention)
