"""Attention over the KV slots by a GPU's own kernels.

Two kinds of batches for `attention.slot_attention`: one pending token of each of the first slots, where everything that
changes from step to step is a tensor, so that a step can be captured in a CUDA graph; and prefill chunks that read
their slots in place, without padding. Of the kernels that are there the best is chosen, with the reason for not taking
a better one: flash-attn's decoding kernel, torch's `varlen_attn` where it takes cache lengths, else scaled dot product
attention with a mask computed from the lengths.

The cache has its positions before its heads in memory (`SlotCache(positions_first=True)`), so no kernel copies it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autotool_fast.rollout.attention import SlotCache, causal_bias, folded_attention, round_up, upload

Attend = Callable[[Tensor, Tensor, Tensor, "float | None"], Tensor]
"""Queries [N, H, D], a layer's keys and values [slots, KV, max_len, D], scale -> [N, H, D]."""


@dataclass(frozen=True)
class DecodeBatch:
    """One token of each of slots 0..b-1.

    Attributes:
        slots: [b] int64, 0..b-1.
        positions: [b] int64, where each token's key and value go.
        kernel: the attention, which knows how far each slot may be read.
    """

    slots: Tensor
    positions: Tensor
    kernel: Attend

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `attention.Batch`."""
        return self.kernel(query, key, value, scale)


@dataclass(frozen=True)
class ChunkBatch:
    """Prefill chunks end to end, for `varlen_attn`: a chunk's queries are the last of its slot's `used` positions.

    Attributes:
        slots, positions: [N] int64.
        cu_queries: [c + 1] int32, where each chunk begins among the N tokens.
        cu_keys: [c + 1] int32, where each chunk's slot begins among the slots' positions laid end to end.
        used: [c] int32, positions of that slot in use, the chunk's own included.
        longest_chunk, longest: upper bounds of chunk lengths and of `used`.
        varlen: `torch.nn.attention.varlen.varlen_attn`.
    """

    slots: Tensor
    positions: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    used: Tensor
    longest_chunk: int
    longest: int
    varlen: Callable[..., Tensor]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `attention.Batch`."""
        return self.varlen(
            query,
            _end_to_end(key),
            _end_to_end(value),
            self.cu_queries,
            self.cu_keys,
            self.longest_chunk,
            self.longest,
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
            seqused_k=self.used,
        )


def plan_chunks(
    slots: np.ndarray,
    positions: np.ndarray,
    chunk_slots: np.ndarray,
    chunk_lengths: np.ndarray,
    cache: SlotCache,
    varlen: Callable[..., Tensor],
) -> ChunkBatch:
    """Lay out prefill chunks.

    Args:
        slots, positions: [N] where each token goes, chunk by chunk.
        chunk_slots, chunk_lengths: [c] the chunks' slots, in rising order, and their tokens.
        cache: the cache they will be read into.
    """
    device = cache.kv.device
    ends = np.cumsum(chunk_lengths)
    used = positions[ends - 1] + 1
    starts = np.append(chunk_slots, chunk_slots[-1] + 1) * cache.max_len
    return ChunkBatch(
        slots=upload(slots, device),
        positions=upload(positions, device),
        cu_queries=upload(np.append(0, ends).astype(np.int32), device),
        cu_keys=upload(starts.astype(np.int32), device),
        used=upload(used.astype(np.int32), device),
        longest_chunk=int(chunk_lengths.max()),
        longest=round_up(int(used.max()), cache.max_len),
        varlen=varlen,
    )


@dataclass(frozen=True)
class Kernels:
    """What a device's attention is computed with.

    Attributes:
        name: of the decoding kernel: flash-attn, varlen or sdpa.
        decode: (lengths int32 [b], number of positions to look at) -> the attention of a step, in which slot i is read
            up to its length.
        bounded: whether `decode` uses its second argument: then a captured step is good for that many positions only.
        varlen: `varlen_attn` for prefill chunks; None leaves them to `attention.plan_batch`.
        reason: why not a better one; empty if there is none.
    """

    name: str
    decode: Callable[[Tensor, int], Attend]
    bounded: bool = False
    varlen: Callable[..., Tensor] | None = None
    reason: str = ""


def flash_kernel(call: Callable[..., Tensor]) -> Callable[[Tensor, int], Attend]:
    """Decoding by `flash_attn.flash_attn_with_kvcache`."""

    def prepare(lengths: Tensor, longest: int) -> Attend:
        def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
            b = query.shape[0]
            keys, values = key[:b].transpose(1, 2), value[:b].transpose(1, 2)  # [b, max_len, KV, D], contiguous
            # The new token is already in the cache, so the kernel appends nothing, and its query sees all of it.
            return call(query.unsqueeze(1), keys, values, cache_seqlens=lengths, softmax_scale=scale).squeeze(1)

        return attend

    return prepare


def varlen_kernel(call: Callable[..., Tensor]) -> Callable[[Tensor, int], Attend]:
    """Decoding by `torch.nn.attention.varlen.varlen_attn` with `seqused_k`."""

    def prepare(lengths: Tensor, longest: int) -> Attend:
        counts = torch.arange(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)

        def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
            b, max_len = query.shape[0], key.shape[2]
            return call(
                query,
                _end_to_end(key[:b]),
                _end_to_end(value[:b]),
                counts,
                counts * max_len,
                1,
                max_len,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
                seqused_k=lengths,
            )

        return attend

    return prepare


def sdpa_kernel(dtype: torch.dtype) -> Callable[[Tensor, int], Attend]:
    """Decoding by scaled dot product attention in `dtype`: the first `longest` positions under a mask."""

    def prepare(lengths: Tensor, longest: int) -> Attend:
        bias = causal_bias(lengths - 1, longest, dtype)[:, None, None]  # [b, 1, 1, longest]

        def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
            b = query.shape[0]
            keys, values = key[:b, :, :longest], value[:b, :, :longest]
            return folded_attention(query.unsqueeze(1), keys, values, bias, scale).squeeze(1)

        return attend

    return prepare


def _end_to_end(layer: Tensor) -> Tensor:
    """Slots [n, KV, max_len, D] as one row of positions [n * max_len, KV, D]; a view, or an error."""
    slots, kv_heads, max_len, dim = layer.shape
    return layer.transpose(1, 2).view(slots * max_len, kv_heads, dim)


def choose_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernels:
    """The best kernels for a cache of that kind, and what stood in the way of a better one."""
    problem = _unsuited(device, dtype, head_dim)
    if problem:
        return Kernels("sdpa", sdpa_kernel(dtype), bounded=True, reason=problem)
    varlen, no_varlen = _varlen()
    flash, no_flash = _flash()
    if flash is not None:
        return Kernels("flash-attn", flash_kernel(flash), varlen=varlen)
    if varlen is not None:
        return Kernels("varlen", varlen_kernel(varlen), varlen=varlen, reason=no_flash)
    return Kernels("sdpa", sdpa_kernel(dtype), bounded=True, reason=f"{no_flash}; {no_varlen}")


def _unsuited(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why neither flash-attn's nor torch's kernel can serve, or nothing."""
    if device.type != "cuda":
        return f"the others need a GPU, this is a {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the others take no {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"the others take no heads of {head_dim}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"the others need sm_80, this is sm_{major}{minor}"


def _flash() -> tuple[Callable[..., Tensor] | None, str]:
    if importlib.util.find_spec("flash_attn") is None:
        return None, "flash-attn is not installed"
    try:
        return importlib.import_module("flash_attn").flash_attn_with_kvcache, ""
    except (ImportError, AttributeError) as error:
        return None, f"flash-attn cannot be imported ({error})"


def _varlen() -> tuple[Callable[..., Tensor] | None, str]:
    from torch.nn.attention.varlen import varlen_attn

    if {"seqused_k", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return varlen_attn, ""
    return None, f"varlen_attn of torch {torch.__version__} takes no cache lengths"
