"""Triton backend of `logits_logp_entropy`, and pieces that the Triton kernels share.

Forward: a program reads one split of a row once and leaves (m, s, u); a second, tiny kernel merges a row's splits.
The splits depend on V and the dtype alone, so few long rows fill the device and a row's result does not depend on the
batch. Each thread keeps statistics of its own and meets the others once per split. Backward: one read, one write,
also in place.

Inside, d = x - m is taken of the logits as given and only then divided by the temperature: exact wherever it matters,
at any offset of the logits and any temperature. Compute is float32 (float64 inputs belong to the PyTorch backend).
Row offsets are 64-bit, because N * V passes 2^31 at 16384 x 152064. Grids have one dimension, because the others stop
at 65535.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import RowStats

SPLIT = 16384  # logits of a row that one program reads
TILE_BYTES = 16384  # read per step of a program: four 16-byte loads in flight for each of 256 threads
VECTOR_BYTES = 16  # widest load
STAGES = 3  # a step at work and two in flight: the whole split of a bfloat16 row
MERGE_ROWS = 16
LOG2E = tl.constexpr(1.4426950408889634)
# e^FLOOR is 0 for any temperature, and FLOOR times a count still is a number: -inf stands for it after clamping.
FLOOR = tl.constexpr(-1e30)
# The same for log p, which is multiplied by gradients.
LOG_FLOOR = tl.constexpr(-1e4)


@triton.jit
def accumulate(m, s, u, x, log2_scale):
    """Adds x [R, C] (-inf: absent) to each row's m = max x, s = sum e, u = sum e (x - m), e = 2^(log2_scale (x - m)).

    The identity is (-inf, 0, 0): a maximum that starts at 0 loses rows whose logits all lie below -88.
    """
    new_m = tl.maximum(m, tl.max(x, 1))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)  # -inf - -inf would be NaN
    shift = tl.maximum(m - base, FLOOR)
    scale = tl.exp2(shift * log2_scale)
    # Clamped, because 0 * -inf would be NaN; a NaN logit stays NaN.
    d = tl.maximum(x - base[:, None], FLOOR, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(d * log2_scale)
    return new_m, s * scale + tl.sum(e, 1), (u + s * shift) * scale + tl.sum(e * d, 1)


@triton.jit
def merge(m, s, u, log2_scale):
    """Joins statistics [R, C] of disjoint columns along axis 1 -> [R] each."""
    top = tl.max(m, 1)
    base = tl.where(top == float("-inf"), 0.0, top)
    shift = tl.maximum(m - base[:, None], FLOOR)
    scale = tl.exp2(shift * log2_scale)
    return top, tl.sum(s * scale, 1), tl.sum((u + s * shift) * scale, 1)


@triton.jit
def finish(label, m, s, u):
    """(logp, entropy, log s) from merged statistics and the label's logit; logp <= 0 <= entropy."""
    log_s = tl.log(s)
    logp = (label - m) - log_s
    entropy = log_s - u / s
    # Comparisons, not minimum and maximum: a NaN stays a NaN.
    return tl.where(logp > 0, 0.0, logp), tl.where(entropy < 0, 0.0, entropy), log_s


@triton.jit
def load_temperature(temperature, temperature_ptr, rows, mask, stride, HAS_ROW_T: tl.constexpr):
    """float32 temperature of each row, from one number or from a tensor of any stride."""
    if HAS_ROW_T:
        return tl.load(temperature_ptr + rows * stride, mask=mask, other=1.0)
    else:
        return tl.full(rows.shape, 1.0, tl.float32) * temperature


@triton.jit
def load_gradients(grad_logp, grad_entropy, rows, mask, stride_g, stride_h, HAS_G: tl.constexpr, HAS_H: tl.constexpr):
    """Upstream gradients of rows where `mask`, 0 elsewhere and where the pointer is absent."""
    g = tl.zeros(rows.shape, tl.float32)
    h = tl.zeros(rows.shape, tl.float32)
    if HAS_G:
        g = tl.load(grad_logp + rows * stride_g, mask=mask, other=0.0)
    if HAS_H:
        h = tl.load(grad_entropy + rows * stride_h, mask=mask, other=0.0)
    return g, h


@triton.jit
def tile_columns(TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Column offsets [TILE / VECTOR, VECTOR]: a thread's columns lie side by side, so that its loads are wide."""
    return tl.arange(0, TILE // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _split_statistics(
    start, first, stop, stride_v, log2_scale, TILE: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr
):
    """(m, s, u), each [1], of columns first..stop-1 of the row at `start`."""
    m = tl.full((TILE // VECTOR,), float("-inf"), tl.float32)
    s = tl.zeros((TILE // VECTOR,), tl.float32)
    u = tl.zeros((TILE // VECTOR,), tl.float32)
    columns = tile_columns(TILE, VECTOR)
    whole = first + (stop - first) // TILE * TILE
    for v0 in tl.range(first, whole, TILE, num_stages=STAGES):
        x = tl.load(start + (v0 + columns).to(tl.int64) * stride_v)
        m, s, u = accumulate(m, s, u, x.to(tl.float32), log2_scale)
    if whole < stop:
        last = whole + columns
        x = tl.load(start + last.to(tl.int64) * stride_v, mask=last < stop, other=float("-inf"))
        m, s, u = accumulate(m, s, u, x.to(tl.float32), log2_scale)
    return merge(m[None, :], s[None, :], u[None, :], log2_scale)


@triton.jit
def _finish_rows(
    rows, y, live, m, s, u, inverse_t, logits, logp_out, entropy_out, max_out, log_sum_out,
    V, stride_n, stride_v, inside,
):  # fmt: skip
    label = tl.load(
        logits + rows * stride_n + y * stride_v, mask=live & (y >= 0) & (y < V), other=float("nan")
    ).to(tl.float32)  # fmt: skip
    logp, entropy, log_s = finish((label - m) * inverse_t, 0.0, s, u * inverse_t)
    tl.store(logp_out + rows, tl.where(live, logp, 0.0), mask=inside)
    tl.store(entropy_out + rows, tl.where(live, entropy, 0.0), mask=inside)
    tl.store(max_out + rows, tl.where(live, m, 0.0), mask=inside)
    tl.store(log_sum_out + rows, tl.where(live, log_s, 0.0), mask=inside)


@triton.jit
def _forward(
    logits, target, temperature, temperature_ptr, temperature_stride, partial,
    logp_out, entropy_out, max_out, log_sum_out, N, V, stride_n, stride_v, stride_y, ignore_index,
    HAS_ROW_T: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr,
    TILE: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // SPLITS + tl.arange(0, 1)  # [1]
    y = tl.load(target + row * stride_y).to(tl.int64)
    live = y != ignore_index
    inverse_t = 1.0 / load_temperature(temperature, temperature_ptr, row, live, temperature_stride, HAS_ROW_T)
    first = (program % SPLITS).to(tl.int32) * SPLIT
    stop = tl.minimum(first + SPLIT, V)
    stop = tl.where(tl.sum(live.to(tl.int32), 0) > 0, stop, first)  # an ignored row is not read
    start = logits + tl.sum(row, 0) * stride_n
    log2_scale = tl.sum(inverse_t, 0) * LOG2E
    m, s, u = _split_statistics(start, first, stop, stride_v, log2_scale, TILE, VECTOR, STAGES)
    if SPLITS == 1:
        _finish_rows(
            row, y, live, m, s, u, inverse_t, logits, logp_out, entropy_out, max_out, log_sum_out,
            V, stride_n, stride_v, row >= 0,
        )  # fmt: skip
    else:
        out = partial + program + tl.arange(0, 1)
        count = tl.full((), SPLITS, tl.int64) * N
        tl.store(out, m)
        tl.store(out + count, s)
        tl.store(out + 2 * count, u)


@triton.jit
def _merge(
    logits, target, temperature, temperature_ptr, temperature_stride, partial,
    logp_out, entropy_out, max_out, log_sum_out, N, V, stride_n, stride_v, stride_y, ignore_index,
    HAS_ROW_T: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    y = tl.load(target + rows * stride_y, mask=inside, other=ignore_index).to(tl.int64)
    live = y != ignore_index
    inverse_t = 1.0 / load_temperature(temperature, temperature_ptr, rows, live, temperature_stride, HAS_ROW_T)
    splits = tl.arange(0, PADDED)[None, :]
    parts = partial + rows[:, None] * SPLITS + splits
    count = tl.full((), SPLITS, tl.int64) * N
    used = live[:, None] & (splits < SPLITS)
    m = tl.load(parts, mask=used, other=float("-inf"))
    s = tl.load(parts + count, mask=used, other=0.0)
    u = tl.load(parts + 2 * count, mask=used, other=0.0)
    m, s, u = merge(m, s, u, inverse_t[:, None] * LOG2E)
    _finish_rows(
        rows, y, live, m, s, u, inverse_t, logits, logp_out, entropy_out, max_out, log_sum_out,
        V, stride_n, stride_v, inside,
    )  # fmt: skip


@triton.jit
def _backward(
    grad_logp, grad_entropy, stride_g, stride_h, logits, target, entropy_ptr, max_ptr, log_sum_ptr,
    temperature, temperature_ptr, temperature_stride, out,
    V, stride_n, stride_v, out_stride_n, out_stride_v, stride_y, ignore_index,
    HAS_G: tl.constexpr, HAS_H: tl.constexpr, HAS_ROW_T: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr,
    TILE: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // SPLITS + tl.arange(0, 1)  # [1]
    y = tl.load(target + row * stride_y).to(tl.int64)
    used = y != ignore_index
    g, h = load_gradients(grad_logp, grad_entropy, row, used, stride_g, stride_h, HAS_G, HAS_H)
    inverse_t = 1.0 / load_temperature(temperature, temperature_ptr, row, used, temperature_stride, HAS_ROW_T)
    entropy, m, log_s = tl.load(entropy_ptr + row), tl.load(max_ptr + row), tl.load(log_sum_ptr + row)
    label = tl.where((y >= 0) & (y < V), y, -1).to(tl.int32)[:, None]
    first = (program % SPLITS).to(tl.int32) * SPLIT
    stop = tl.minimum(first + SPLIT, V)
    start = logits + tl.sum(row, 0) * stride_n
    out_start = out + tl.sum(row, 0) * out_stride_n
    g, h, inverse_t = g[:, None], h[:, None], inverse_t[:, None]
    entropy, m, log_s = entropy[:, None], m[:, None], log_s[:, None]
    live = (g != 0) | (h != 0)
    for v0 in tl.range(first, stop, TILE, num_stages=STAGES):
        columns = v0 + tile_columns(TILE, VECTOR)
        inside = columns < stop
        # A row without gradient is not read, but written: in place it still holds its logits.
        x = tl.load(start + columns.to(tl.int64) * stride_v, mask=inside & live, other=0.0).to(tl.float32)
        log_p = tl.maximum((x - m) * inverse_t - log_s, LOG_FLOOR, propagate_nan=tl.PropagateNan.ALL)
        dz = tl.where(columns == label, g, 0.0) - tl.exp2(log_p * LOG2E) * (g + h * (log_p + entropy))
        dz = tl.where(live, dz * inverse_t, 0.0)
        tl.store(out_start + columns.to(tl.int64) * out_stride_v, dz.to(out.dtype.element_ty), mask=inside)


def logits_forward(
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N]
    temperature: float,
    row_temperature: Tensor | None,
    ignore_index: int,
) -> RowStats:
    """Statistics of each row; `row_max` is that of the logits as given, not divided by the temperature."""
    n, v = logits.shape
    stats = RowStats(*torch.empty((4, n), dtype=torch.float32, device=logits.device).unbind())
    if n:
        splits = triton.cdiv(v, SPLIT)
        # One split needs no workspace.
        partial = torch.empty((3, n, splits), dtype=torch.float32, device=logits.device) if splits > 1 else logits
        t, stride = temperature_arguments(row_temperature, logits)
        arguments = (
            logits, target, temperature, t, stride, partial, *stats,
            n, v, *logits.stride(), target.stride(0), ignore_index,
        )  # fmt: skip
        common = {"HAS_ROW_T": row_temperature is not None, "SPLITS": splits}
        _forward[(n * splits,)](*arguments, **common, **tile_options(v, logits.element_size()))
        if splits > 1:
            padded = triton.next_power_of_2(splits)
            _merge[(triton.cdiv(n, MERGE_ROWS),)](
                *arguments, **common, PADDED=padded, ROWS=MERGE_ROWS, num_warps=1 if padded <= 32 else 4
            )
    return stats


def logits_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    target: Tensor,
    stats: RowStats,
    temperature: float,
    row_temperature: Tensor | None,
    ignore_index: int,
    out: Tensor | None = None,
) -> Tensor:
    """dL/dlogits, written to `out` (any strides; it may be the logits themselves) or to a new tensor."""
    n, v = logits.shape
    if out is None:
        out = torch.empty((n, v), dtype=logits.dtype, device=logits.device)
    if n:
        t, stride = temperature_arguments(row_temperature, logits)
        splits = triton.cdiv(v, SPLIT)
        _backward[(n * splits,)](
            *gradient_arguments(grad_logp, grad_entropy, logits), logits, target, *stats[1:],
            temperature, t, stride, out, v, *logits.stride(), *out.stride(), target.stride(0), ignore_index,
            HAS_G=grad_logp is not None, HAS_H=grad_entropy is not None, HAS_ROW_T=row_temperature is not None,
            SPLITS=splits, **tile_options(v, logits.element_size(), TILE_BYTES // 2),
        )  # fmt: skip
    return out


def tile_options(v: int, item: int, tile_bytes: int = TILE_BYTES) -> dict[str, int]:
    """How a program walks its split: by V and the element size alone, because sums depend on it."""
    vector = VECTOR_BYTES // item
    tile = min(tile_bytes // item, max(vector, triton.next_power_of_2(v)))
    return {
        "SPLIT": SPLIT, "TILE": tile, "VECTOR": vector, "STAGES": STAGES,
        "num_warps": max(1, min(8, tile * item // 1024)),
    }  # fmt: skip


def temperature_arguments(row_temperature: Tensor | None, unused: Tensor) -> tuple[Tensor, int]:
    """A pointer and stride that a kernel may take; `unused` stands in where there is no tensor."""
    return (unused, 0) if row_temperature is None else (row_temperature, row_temperature.stride(0))


def gradient_arguments(
    grad_logp: Tensor | None, grad_entropy: Tensor | None, unused: Tensor
) -> tuple[Tensor, Tensor, int, int]:
    """Pointers and strides of the upstream gradients (an expanded gradient has stride 0)."""
    g, h = (unused if grad is None else grad for grad in (grad_logp, grad_entropy))
    return g, h, g.stride(0), h.stride(0)
