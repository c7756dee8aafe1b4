"""Triton kernels of `linear_logp_entropy` that work on rows: compaction, gathering, merging, scattering.

Compact order: live rows first, in their order, then the dead ones. Its length stays in device memory, so nothing
waits for the host and a CUDA graph can replay it with other targets. The products are in `triton_gemm`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_gemm import EXP_FLOOR
from .triton_logits import finish, load_gradients


@triton.jit
def _live(target, grad_logp, grad_entropy, stride_t, stride_g, stride_gh, i, N, ignore_index,
          BACKWARD: tl.constexpr, HAS_G: tl.constexpr, HAS_H: tl.constexpr):  # fmt: skip
    """(rows that the forward worked on, rows that are worked on now) as int32 flags."""
    y = tl.load(target + i.to(tl.int64) * stride_t, mask=i < N, other=0).to(tl.int64)
    labelled = (y != ignore_index) & (i < N)
    live = labelled
    if BACKWARD:
        g, h = load_gradients(grad_logp, grad_entropy, i.to(tl.int64), labelled, stride_g, stride_gh, HAS_G, HAS_H)
        live = labelled & ((g != 0) | (h != 0))
    return labelled.to(tl.int32), live.to(tl.int32)


@triton.jit
def order_kernel(
    target, grad_logp, grad_entropy, stride_t, stride_g, stride_gh, order, rank, counts, N, stored, ignore_index,
    BACKWARD: tl.constexpr, HAS_G: tl.constexpr, HAS_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program. order [N]: rows, live ones first; counts = (live rows, live rows whose logits are stored).

    BACKWARD: a row without gradient is dead too, and rank [N] is each live row's place in the forward's order.
    """
    total = 0
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        _, live = _live(target, grad_logp, grad_entropy, stride_t, stride_g, stride_gh, i, N, ignore_index,
                        BACKWARD, HAS_G, HAS_H)  # fmt: skip
        total += tl.sum(live, 0)
    seen, forward_seen, in_store = 0, 0, 0
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        labelled, live = _live(target, grad_logp, grad_entropy, stride_t, stride_g, stride_gh, i, N, ignore_index,
                               BACKWARD, HAS_G, HAS_H)  # fmt: skip
        before = seen + tl.cumsum(live, 0) - live
        place = tl.where(live != 0, before, total + i - before)
        tl.store(order + place, i, mask=i < N)
        if BACKWARD:
            forward_place = forward_seen + tl.cumsum(labelled, 0) - labelled
            tl.store(rank + place, forward_place, mask=live != 0)
            in_store += tl.sum(live * (forward_place < stored).to(tl.int32), 0)
            forward_seen += tl.sum(labelled, 0)
        seen += tl.sum(live, 0)
    tl.store(counts, total)
    tl.store(counts + 1, in_store)


@triton.jit
def gather_kernel(
    hidden, target, row_temperature, order, counts, x, labels, row_factor, label_tiles,
    first_row, slab_rows, H, V, column_tiles, scale, stride_n, stride_h, stride_t, stride_temperature, stride_x,
    HAS_ROW_T: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr, PAD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Compact rows `first_row`.. of a slab: x [slab_rows, H], labels (-1: out of range), row_factor = scale / T.

    Dead rows up to PAD behind the last live one become zeros, whatever `hidden` holds there: a product over rows
    reads whole tiles, and 0 * NaN is not 0. label_tiles [row tiles, column_tiles], zero before, marks the (TILE_R x
    TILE_C) tiles that own a label.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = tl.load(counts) - first_row
    if tl.program_id(0) * BLOCK_R < live + PAD:
        inside, alive = r < slab_rows, r < tl.minimum(live, slab_rows)
        row = tl.load(order + first_row + r, mask=alive, other=0).to(tl.int64)
        y = tl.load(target + row * stride_t, mask=alive, other=-1).to(tl.int64)
        y = tl.where((y >= 0) & (y < V), y, -1).to(tl.int32)
        tl.store(labels + r, y, mask=inside)
        tl.store(label_tiles + (r // TILE_R) * column_tiles + y // TILE_C, tl.full((BLOCK_R,), 1, tl.int8), mask=y >= 0)
        if HAS_ROW_T:
            t = tl.load(row_temperature + row * stride_temperature, mask=alive, other=1.0)
            tl.store(row_factor + r, scale / t, mask=inside)
        for h0 in range(0, H, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)
            value = tl.load(
                hidden + row[:, None] * stride_n + h.to(tl.int64)[None, :] * stride_h,
                mask=alive[:, None] & (h < H)[None, :], other=0.0,
            )  # fmt: skip
            out = x + r.to(tl.int64)[:, None] * stride_x + h[None, :]
            tl.store(out, value, mask=inside[:, None] & (h < H)[None, :])


@triton.jit
def merge_kernel(
    partial, label_logit, labels, order, counts, logp_out, entropy_out, max_out, log_sum_out,
    first_row, slab_rows, column_tiles, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Joins partial [column_tiles, 3, slab_rows] and writes each row's outputs to its place in the batch.

    The order of the sums follows from the number of tiles and BLOCK_T, so from V alone. Dead rows get zeros.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < slab_rows
    alive = inside & (r < tl.load(counts) - first_row)
    row = tl.load(order + first_row + r, mask=inside, other=0)
    tiles = tl.where(tl.sum(alive.to(tl.int32), 0) > 0, column_tiles, 0)
    offsets = tl.arange(0, BLOCK_T)[:, None].to(tl.int64) * 3 * slab_rows + r[None, :]
    step = tl.full((), 3 * BLOCK_T, tl.int64) * slab_rows

    m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    pointers = partial + offsets
    for t0 in range(0, tiles, BLOCK_T):
        mask = (t0 + tl.arange(0, BLOCK_T) < tiles)[:, None] & alive[None, :]
        m = tl.maximum(m, tl.max(tl.load(pointers, mask=mask, other=float("-inf")), 0))
        pointers += step
    base = tl.where(m == float("-inf"), 0.0, m)

    s = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    u = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    pointers = partial + offsets
    for t0 in range(0, tiles, BLOCK_T):
        mask = (t0 + tl.arange(0, BLOCK_T) < tiles)[:, None] & alive[None, :]
        part_m = tl.load(pointers, mask=mask, other=float("-inf"))
        part_s = tl.load(pointers + slab_rows, mask=mask, other=0.0)
        part_u = tl.load(pointers + 2 * slab_rows, mask=mask, other=0.0)
        shift = tl.maximum(part_m - base[None, :], EXP_FLOOR)
        scale = tl.exp(shift)
        s += part_s * scale
        u += (part_u + part_s * shift) * scale
        pointers += step

    y = tl.load(labels + r, mask=alive, other=-1)
    label = tl.load(label_logit + r, mask=alive & (y >= 0), other=float("nan"))
    logp, entropy, log_s = finish(label, m, tl.sum(s, 0), tl.sum(u, 0))
    tl.store(logp_out + row, tl.where(alive, logp, 0.0), mask=inside)
    tl.store(entropy_out + row, tl.where(alive, entropy, 0.0), mask=inside)
    tl.store(max_out + row, tl.where(alive, m, 0.0), mask=inside)
    tl.store(log_sum_out + row, tl.where(alive, log_s, 0.0), mask=inside)


@triton.jit
def coefficients_kernel(
    grad_logp, grad_entropy, stride_g, stride_gh, entropy_ptr, max_ptr, log_sum_ptr, row_factor, factor, slope,
    order, counts, coefficients, N,
    HAS_G: tl.constexpr, HAS_H: tl.constexpr, ROW_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """coefficients [4, N] = (a, b, at_label, m) in compact order: with x = z - m,

        dL/da_j = e^x_j (a + b x_j) + at_label 1[j = y]      a = -k (g + h (entropy - log s)) / s
                                                             b = -k h / s,  at_label = k g

    where k = slope * factor (or row_factor) is dz/da at softcap's origin. A certain row (p = 1) cancels exactly.
    """
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = r < tl.load(counts)
    row = tl.load(order + r, mask=alive, other=0).to(tl.int64)
    g, h = load_gradients(grad_logp, grad_entropy, row, alive, stride_g, stride_gh, HAS_G, HAS_H)
    k = tl.full((BLOCK,), 1.0, tl.float32) * factor
    if ROW_FACTOR:
        k = tl.load(row_factor + r, mask=alive, other=1.0)
    k *= slope
    log_s = tl.load(log_sum_ptr + row, mask=alive, other=0.0)
    entropy = tl.load(entropy_ptr + row, mask=alive, other=0.0)
    p_max = tl.exp(-log_s)
    gk, hk = g * k, h * k
    tl.store(coefficients + r, -(gk * p_max) - hk * p_max * (entropy - log_s), mask=alive)
    tl.store(coefficients + N + r, -(hk * p_max), mask=alive)
    tl.store(coefficients + 2 * N + r, gk, mask=alive)
    tl.store(coefficients + 3 * N + r, tl.load(max_ptr + row, mask=alive, other=0.0), mask=alive)


@triton.jit
def scatter_kernel(
    compact, order, counts, out, N, H, stride_c, stride_o,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out[order[r]] = compact[r], rounded here; zeros for dead rows."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside, alive = r < N, r < tl.load(counts)
    row = tl.load(order + r, mask=inside, other=0).to(tl.int64)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        value = tl.load(
            compact + r.to(tl.int64)[:, None] * stride_c + h[None, :],
            mask=alive[:, None] & (h < H)[None, :], other=0.0,
        )  # fmt: skip
        tl.store(
            out + row[:, None] * stride_o + h[None, :], value.to(out.dtype.element_ty),
            mask=inside[:, None] & (h < H)[None, :],
        )  # fmt: skip
