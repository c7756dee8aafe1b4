"""Triton backend of `logits_logp_entropy`: one program per row, and the pieces the Triton kernels share.

Compute is float32 (float64 inputs belong to the PyTorch backend). Row offsets are 64-bit, because N * V
passes 2^31 at 16384 x 152064. Grids have one dimension, because the others stop at 65535.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import RowStats

MAX_BLOCK = 4096


@triton.jit
def online_update(m, s, u, x):
    """Adds a tile x [R, C] of logits (-inf: absent) to each row's (m, s, u), u = sum e^(x-m) (x-m).

    The identity is (-inf, 0, 0): a maximum that starts at 0 loses rows whose logits all lie below -88.
    """
    new_m = tl.maximum(m, tl.max(x, 1))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)  # -inf - -inf would be NaN
    shift = tl.where(m == float("-inf"), 0.0, m - base)
    scale = tl.where(m == float("-inf"), 0.0, tl.exp(shift))
    d = x - base[:, None]
    e = tl.exp(d)
    tile_u = tl.sum(tl.where(e > 0, e * d, 0.0), 1)
    return new_m, s * scale + tl.sum(e, 1), (u + s * shift) * scale + tile_u


@triton.jit
def finish(label, m, s, u):
    """(logp, entropy, log s) from merged statistics and the label's logit; logp <= 0 <= entropy."""
    log_s = tl.log(s)
    logp = (label - m) - log_s
    entropy = log_s - u / s
    # Comparisons, not minimum and maximum: a NaN stays a NaN.
    return tl.where(logp > 0, 0.0, logp), tl.where(entropy < 0, 0.0, entropy), log_s


@triton.jit
def dlogits(x, columns, y, g, h, entropy, m, log_s, t):
    """dL/dlogits of scaled logits x [R, C]: (g (1[j=y] - p_j) - h p_j (log p_j + entropy)) / T."""
    log_p = (x - m[:, None]) - log_s[:, None]
    p = tl.exp(log_p)
    # p = 0 for -inf logits, whose log p times 0 would be NaN.
    spread = tl.where(p > 0, p * (g[:, None] + h[:, None] * (log_p + entropy[:, None])), 0.0)
    return (tl.where(columns[None, :] == y[:, None], g[:, None], 0.0) - spread) / t[:, None]


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
def _forward(
    logits, target, temperature, temperature_ptr, temperature_stride,
    logp_out, entropy_out, max_out, log_sum_out,
    V, stride_n, stride_v, ignore_index,
    HAS_ROW_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # [1]
    every = row >= 0
    y = tl.load(target + row).to(tl.int64)
    live = y != ignore_index
    t = load_temperature(temperature, temperature_ptr, row, every, temperature_stride, HAS_ROW_T)
    m = tl.full((1,), float("-inf"), tl.float32)
    s = tl.zeros((1,), tl.float32)
    u = tl.zeros((1,), tl.float32)
    start = logits + row * stride_n
    stop = tl.where(tl.sum(live.to(tl.int32), 0) > 0, V, 0)
    for v0 in range(0, stop, BLOCK):
        columns = v0 + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(start[:, None] + columns[None, :] * stride_v, mask=columns[None, :] < V, other=float("-inf"))
        m, s, u = online_update(m, s, u, x.to(tl.float32) / t[:, None])
    label = tl.load(start + y * stride_v, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32) / t
    logp, entropy, log_s = finish(label, m, s, u)
    tl.store(logp_out + row, tl.where(live, logp, 0.0))
    tl.store(entropy_out + row, tl.where(live, entropy, 0.0))
    tl.store(max_out + row, tl.where(live, m, 0.0))
    tl.store(log_sum_out + row, tl.where(live, log_s, 0.0))


@triton.jit
def _backward(
    grad_logp, grad_entropy, stride_g, stride_h, logits, target, entropy_ptr, max_ptr, log_sum_ptr,
    temperature, temperature_ptr, temperature_stride, out,
    V, stride_n, stride_v, ignore_index,
    HAS_G: tl.constexpr, HAS_H: tl.constexpr, HAS_ROW_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # [1]
    every = row >= 0
    y = tl.load(target + row).to(tl.int64)
    g, h = load_gradients(grad_logp, grad_entropy, row, y != ignore_index, stride_g, stride_h, HAS_G, HAS_H)
    live = (g != 0) | (h != 0)  # the logits of other rows are not read
    t = load_temperature(temperature, temperature_ptr, row, every, temperature_stride, HAS_ROW_T)
    entropy, m, log_s = tl.load(entropy_ptr + row), tl.load(max_ptr + row), tl.load(log_sum_ptr + row)
    start = logits + row * stride_n
    for v0 in range(0, V, BLOCK):
        columns = v0 + tl.arange(0, BLOCK).to(tl.int64)
        inside = columns[None, :] < V
        x = tl.load(start[:, None] + columns[None, :] * stride_v, mask=inside & live[:, None], other=0.0)
        dz = dlogits(x.to(tl.float32) / t[:, None], columns, y, g, h, entropy, m, log_s, t)
        dz = tl.where(live[:, None], dz, 0.0)
        tl.store(out + row[:, None] * V + columns[None, :], dz.to(out.dtype.element_ty), mask=inside)


def logits_forward(
    logits: Tensor,  # [N, V]
    target: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    ignore_index: int,
) -> RowStats:
    n, v = logits.shape
    stats = RowStats(*(torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(4)))
    if n:
        t, stride = temperature_arguments(row_temperature, logits)
        _forward[(n,)](
            logits, target.contiguous(), temperature, t, stride, *stats,
            v, logits.stride(0), logits.stride(1), ignore_index,
            HAS_ROW_T=row_temperature is not None, BLOCK=block_size(v), num_warps=8,
        )  # fmt: skip
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
) -> Tensor:
    n, v = logits.shape
    out = torch.empty((n, v), dtype=logits.dtype, device=logits.device)
    if n:
        t, stride = temperature_arguments(row_temperature, logits)
        _backward[(n,)](
            *gradient_arguments(grad_logp, grad_entropy, logits), logits, target.contiguous(), *stats[1:],
            temperature, t, stride, out, v, logits.stride(0), logits.stride(1), ignore_index,
            HAS_G=grad_logp is not None, HAS_H=grad_entropy is not None,
            HAS_ROW_T=row_temperature is not None, BLOCK=block_size(v), num_warps=8,
        )  # fmt: skip
    return out


def temperature_arguments(row_temperature: Tensor | None, unused: Tensor) -> tuple[Tensor, int]:
    """A pointer and stride that a kernel may take; `unused` stands in where there is no tensor."""
    return (unused, 0) if row_temperature is None else (row_temperature, row_temperature.stride(0))


def gradient_arguments(
    grad_logp: Tensor | None, grad_entropy: Tensor | None, unused: Tensor
) -> tuple[Tensor, Tensor, int, int]:
    """Pointers and strides of the upstream gradients (an expanded gradient has stride 0)."""
    g, h = (unused if grad is None else grad for grad in (grad_logp, grad_entropy))
    return g, h, g.stride(0), h.stride(0)


def block_size(v: int) -> int:
    return min(MAX_BLOCK, triton.next_power_of_2(v))
