"""Triton backend of `linear_logp_entropy`.

Forward: a program owns a block of rows and one vocabulary split, walks the split tile by tile (a
float32 accumulator that is never rounded) and leaves (m, s, u) per row; a second kernel merges the
splits in order. Tile width and number of splits depend on V alone, so a row's result does not depend on
the other rows. Backward: one kernel recomputes a bounded slab of logits and turns it into dL/dlogits in
its epilogue; dX and dW are plain matrix products of that slab, in the order of
`reference.accumulate_gradients`. No atomics: repeats are bitwise equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import interpreting
from .reference import RowStats, accumulate_gradients
from .triton_logits import (
    dlogits,
    finish,
    gradient_arguments,
    load_gradients,
    load_temperature,
    online_update,
    temperature_arguments,
)

BLOCK_N, BLOCK_V, BLOCK_H = 64, 128, 32
MERGE_ROWS = 64
SPLIT_TILES = 8  # vocabulary tiles walked by one program
SLAB_COLUMNS = 16384


@triton.jit
def _logits_tile(
    hidden, weight, rows, columns, N, V, H, stride_n, stride_h, stride_v, stride_wh,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """float32 hidden[rows] @ weight[columns].T, zeros read outside."""
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for h0 in range(0, H, BLOCK_H):
        k = h0 + tl.arange(0, BLOCK_H)
        x = tl.load(
            hidden + rows[:, None] * stride_n + k[None, :] * stride_h,
            mask=(rows[:, None] < N) & (k[None, :] < H), other=0.0,
        )  # fmt: skip
        w = tl.load(
            weight + columns[None, :] * stride_v + k[:, None] * stride_wh,
            mask=(columns[None, :] < V) & (k[:, None] < H), other=0.0,
        )  # fmt: skip
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def _forward(
    hidden, weight, target, temperature, temperature_ptr, temperature_stride, label_out, partial,
    N, V, H, stride_n, stride_h, stride_v, stride_wh, ignore_index,
    HAS_ROW_T: tl.constexpr, SPLITS: tl.constexpr, SPLIT_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Programs of one vocabulary split are neighbours, so that its weights are read from memory once.
    blocks = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // blocks
    rows = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    y = tl.load(target + rows, mask=inside, other=ignore_index).to(tl.int64)
    t = load_temperature(temperature, temperature_ptr, rows, inside, temperature_stride, HAS_ROW_T)
    m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    u = tl.zeros((BLOCK_N,), tl.float32)
    first = split * SPLIT_TILES * BLOCK_V
    last = tl.minimum(first + SPLIT_TILES * BLOCK_V, V)
    last = tl.where(tl.sum((y != ignore_index).to(tl.int32), 0) > 0, last, first)  # a block of ignored rows is free
    for v0 in range(first, last, BLOCK_V):
        columns = v0 + tl.arange(0, BLOCK_V).to(tl.int64)
        z = _logits_tile(
            hidden, weight, rows, columns, N, V, H, stride_n, stride_h, stride_v, stride_wh,
            BLOCK_N, BLOCK_V, BLOCK_H, UPCAST,
        ) / t[:, None]  # fmt: skip
        owned = columns[None, :] == y[:, None]
        label = tl.sum(tl.where(owned, z, 0.0), 1)
        tl.store(label_out + rows, label, mask=inside & (y >= v0) & (y < v0 + BLOCK_V) & (y < V))
        # A ragged last tile's missing columns carry no probability.
        m, s, u = online_update(m, s, u, tl.where(columns[None, :] < V, z, float("-inf")))
    out = partial + split.to(tl.int64) * 3 * N + rows
    tl.store(out, m, mask=inside)
    tl.store(out + N, s, mask=inside)
    tl.store(out + 2 * N, u, mask=inside)


@triton.jit
def _merge(
    label_ptr, partial, target, logp_out, entropy_out, max_out, log_sum_out, N, V, ignore_index,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    y = tl.load(target + rows, mask=inside, other=ignore_index).to(tl.int64)
    live = y != ignore_index
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    u = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        start = partial + tl.full((), split, tl.int64) * 3 * N + rows
        part_m = tl.load(start, mask=inside, other=float("-inf"))
        part_s = tl.load(start + N, mask=inside, other=0.0)
        part_u = tl.load(start + 2 * N, mask=inside, other=0.0)
        new_m = tl.maximum(m, part_m)
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
        shift = tl.where(m == float("-inf"), 0.0, m - base)
        scale = tl.where(m == float("-inf"), 0.0, tl.exp(shift))
        part_shift = tl.where(part_m == float("-inf"), 0.0, part_m - base)
        part_scale = tl.where(part_m == float("-inf"), 0.0, tl.exp(part_shift))
        u = (u + s * shift) * scale + (part_u + part_s * part_shift) * part_scale
        s = s * scale + part_s * part_scale
        m = new_m
    label = tl.load(label_ptr + rows, mask=inside & live & (y >= 0) & (y < V), other=float("nan"))
    logp, entropy, log_s = finish(label, m, s, u)
    tl.store(logp_out + rows, tl.where(live, logp, 0.0), mask=inside)
    tl.store(entropy_out + rows, tl.where(live, entropy, 0.0), mask=inside)
    tl.store(max_out + rows, tl.where(live, m, 0.0), mask=inside)
    tl.store(log_sum_out + rows, tl.where(live, log_s, 0.0), mask=inside)


@triton.jit
def _dlogits(
    grad_logp, grad_entropy, stride_g, stride_gh, hidden, weight, target, entropy_ptr, max_ptr, log_sum_ptr,
    temperature, temperature_ptr, temperature_stride, out,
    N, V, H, first_column, stride_n, stride_h, stride_v, stride_wh, ignore_index,
    HAS_G: tl.constexpr, HAS_H: tl.constexpr, HAS_ROW_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dL/dlogits [N, V] of one slab; V counts the slab's columns, `first_column` is where it starts."""
    blocks = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = rows < N
    y = tl.load(target + rows, mask=inside, other=ignore_index).to(tl.int64)
    used = inside & (y != ignore_index)
    g, h = load_gradients(grad_logp, grad_entropy, rows, used, stride_g, stride_gh, HAS_G, HAS_H)
    live = (g != 0) | (h != 0)
    depth = tl.where(tl.sum(live.to(tl.int32), 0) > 0, H, 0)  # a block of rows without gradient is free
    t = load_temperature(temperature, temperature_ptr, rows, inside, temperature_stride, HAS_ROW_T)
    z = _logits_tile(
        hidden, weight, rows, columns, N, V, depth, stride_n, stride_h, stride_v, stride_wh,
        BLOCK_N, BLOCK_V, BLOCK_H, UPCAST,
    ) / t[:, None]  # fmt: skip
    entropy = tl.load(entropy_ptr + rows, mask=live, other=0.0)
    m = tl.load(max_ptr + rows, mask=live, other=0.0)
    log_s = tl.load(log_sum_ptr + rows, mask=live, other=0.0)
    dz = tl.where(live[:, None], dlogits(z, columns + first_column, y, g, h, entropy, m, log_s, t), 0.0)
    tl.store(
        out + rows[:, None] * V + columns[None, :], dz.to(out.dtype.element_ty),
        mask=inside[:, None] & (columns[None, :] < V),
    )  # fmt: skip


def linear_forward(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    ignore_index: int,
) -> RowStats:
    (n, depth), v = hidden.shape, weight.shape[0]
    new = {"dtype": torch.float32, "device": hidden.device}
    stats = RowStats(*(torch.empty(n, **new) for _ in range(4)))
    if not n:
        return stats
    target = target.contiguous()
    splits = triton.cdiv(v, BLOCK_V * SPLIT_TILES)
    label, partial = torch.empty(n, **new), torch.empty((splits, 3, n), **new)
    t, t_stride = temperature_arguments(row_temperature, hidden)
    _forward[(triton.cdiv(n, BLOCK_N) * splits,)](
        hidden, weight, target, temperature, t, t_stride, label, partial,
        n, v, depth, *hidden.stride(), *weight.stride(), ignore_index,
        HAS_ROW_T=row_temperature is not None, SPLITS=splits, SPLIT_TILES=SPLIT_TILES, **_tiles(),
    )  # fmt: skip
    _merge[(triton.cdiv(n, MERGE_ROWS),)](
        label, partial, target, *stats, n, v, ignore_index, SPLITS=splits, BLOCK=MERGE_ROWS
    )
    return stats


def linear_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    stats: RowStats,
    temperature: float,
    row_temperature: Tensor | None,
    ignore_index: int,
    need_hidden: bool = True,
    need_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    target = target.contiguous()
    # Slabs feed low-precision products on a GPU; the interpreter's products are float32.
    slab_dtype = torch.float32 if hidden.device.type == "cpu" else hidden.dtype

    def slab(r: slice, c: slice) -> Tensor:
        x, w = hidden[r], weight[c]
        out = torch.empty((x.shape[0], w.shape[0]), dtype=slab_dtype, device=x.device)
        g, h = (None if grad is None else grad[r] for grad in (grad_logp, grad_entropy))
        t, t_stride = temperature_arguments(None if row_temperature is None else row_temperature[r], x)
        _dlogits[(triton.cdiv(x.shape[0], BLOCK_N) * triton.cdiv(w.shape[0], BLOCK_V),)](
            *gradient_arguments(g, h, x), x, w, target[r], *(column[r] for column in stats[1:]),
            temperature, t, t_stride, out, *out.shape, x.shape[1], c.start,
            *x.stride(), *w.stride(), ignore_index,
            HAS_G=g is not None, HAS_H=h is not None, HAS_ROW_T=row_temperature is not None, **_tiles(),
        )  # fmt: skip
        return out

    x = hidden
    if need_weight:
        # A dead row's slab is 0, but 0 * NaN is not.
        x = hidden.masked_fill((target == ignore_index)[:, None], 0)
    return accumulate_gradients(x, weight, slab, SLAB_COLUMNS, need_hidden, need_weight)


def _tiles() -> dict[str, int | bool]:
    # The interpreter's dot is wrong on bfloat16.
    return {"BLOCK_N": BLOCK_N, "BLOCK_V": BLOCK_V, "BLOCK_H": BLOCK_H, "UPCAST": interpreting()}
