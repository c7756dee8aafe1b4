"""Triton backend of `sample_logp_entropy`: one read of the logits, rows split over programs.

A program draws the best candidate of one split of a row, with the split's softmax statistics; a second, tiny kernel
merges. The splits depend on V alone: small batches fill the device, and a row's token and numbers do not depend on the
batch. The splits cannot change the token, because the column, not the program, names the random bits.

Draws the same bits as `philox.random_bits`; -log(1 - u) is rounded differently in the last bits, so two
backends can disagree only where two candidates tie to about 1e-5.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import interpreting
from .triton_logits import FLOOR, LOG2E, finish, load_temperature, merge, temperature_arguments

SPLIT = 4096  # logits of a row that one program reads at once
MERGE_ROWS = 4
NO_COLUMN = tl.constexpr(2147483647)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log2(x, FAST: tl.constexpr):
    """FAST: one instruction, 2^-22 relative or absolute, where tl.log2 takes some thirty."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 words; products 32 x 32 -> 64, one instruction where tl.philox takes two."""
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def low_high(x):
    """The two uint32 halves of int64 words."""
    return (x & 0xFFFFFFFF).to(tl.uint32), ((x >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def uniform(bits):
    """uint32 -> float32 in (0, 1), finest near 0."""
    return tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)


@triton.jit
def gumbel(u, FAST: tl.constexpr):
    """-log(-log(1 - u)); below 1/8 a series, because 1 - u would round away the digits of a small u."""
    series = 0.16666666666666666 + u * (0.14285714285714285 + u * 0.125)
    series = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * (0.25 + u * (0.2 + u * series)))))
    exponential = tl.where(u < 0.125, series, _log2(1.0 - u, FAST) * -LN2)
    return _log2(exponential, FAST) * -LN2


@triton.jit
def _finish_rows(
    rows, m, s, u, column, inverse_t, logits, token_out, logp_out, entropy_out, V, stride_n, stride_v, inside,
):  # fmt: skip
    token = tl.where(column < V, column, 0).to(tl.int64)  # only a row of NaN or -inf has no candidate
    chosen = tl.load(logits + rows * stride_n + token * stride_v, mask=inside, other=0.0).to(tl.float32)
    logp, entropy, _ = finish((chosen - m) * inverse_t, 0.0, s, u * inverse_t)
    tl.store(token_out + rows, token, mask=inside)
    tl.store(logp_out + rows, logp, mask=inside)
    tl.store(entropy_out + rows, entropy, mask=inside)


@triton.jit
def _sample(
    logits, temperature, temperature_ptr, temperature_stride, partial, columns_out,
    token_out, logp_out, entropy_out, B, V, stride_n, stride_v, seed, offset, seed_stride, offset_stride,
    HAS_ROW_T: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // SPLITS + tl.arange(0, 1)  # [1]
    t = load_temperature(temperature, temperature_ptr, row, row >= 0, temperature_stride, HAS_ROW_T)
    greedy = t == 0
    inverse_t = 1.0 / tl.where(greedy, 1.0, t)
    block = (program % SPLITS).to(tl.int32) * (SPLIT // 4) + tl.arange(0, SPLIT // 4)  # counters, four columns each
    column = block[:, None] * 4 + tl.arange(0, 4)[None, :]  # [SPLIT / 4, 4]
    start = logits + tl.sum(row, 0) * stride_n
    x = tl.load(start + column.to(tl.int64) * stride_v, mask=column < V, other=float("-inf")).to(tl.float32)

    m = tl.max(tl.max(x, 1), 0)
    base = tl.where(m == float("-inf"), 0.0, m)
    d = tl.maximum(x - base, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(d * (inverse_t[:, None] * LOG2E))
    s, u = tl.sum(tl.sum(e, 1), 0), tl.sum(tl.sum(e * d, 1), 0)

    k0, k1 = low_high(tl.load(seed + row * seed_stride))
    c2, c3 = low_high(tl.load(offset + row * offset_stride))
    zero = tl.zeros((SPLIT // 4,), tl.uint32)
    w0, w1, w2, w3 = philox(block.to(tl.uint32), zero, c2 + zero, c3 + zero, k0, k1)
    bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (SPLIT // 4, 4))
    noise = tl.where(greedy[:, None], 0.0, gumbel(uniform(bits), FAST))
    score = x * inverse_t[:, None] + noise
    best = tl.max(tl.max(score, 1), 0)
    # The first of equal ones.
    first = tl.min(tl.min(tl.where(score == best, column, NO_COLUMN), 1), 0)

    one = tl.arange(0, 1)
    if SPLITS == 1:
        _finish_rows(
            row, m, s, u, first + one, inverse_t, logits, token_out, logp_out, entropy_out,
            V, stride_n, stride_v, row >= 0,
        )  # fmt: skip
    else:
        out = partial + program + one
        count = tl.full((), SPLITS, tl.int64) * B
        tl.store(out, m + tl.zeros((1,), tl.float32))
        tl.store(out + count, s + tl.zeros((1,), tl.float32))
        tl.store(out + 2 * count, u + tl.zeros((1,), tl.float32))
        tl.store(out + 3 * count, best + tl.zeros((1,), tl.float32))
        tl.store(columns_out + program + one, first + one)


@triton.jit
def _merge(
    logits, temperature, temperature_ptr, temperature_stride, partial, columns_out,
    token_out, logp_out, entropy_out, B, V, stride_n, stride_v,
    HAS_ROW_T: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < B
    t = load_temperature(temperature, temperature_ptr, rows, inside, temperature_stride, HAS_ROW_T)
    inverse_t = 1.0 / tl.where(t == 0, 1.0, t)
    splits = tl.arange(0, PADDED)[None, :]
    at = rows[:, None] * SPLITS + splits
    count = tl.full((), SPLITS, tl.int64) * B
    used = inside[:, None] & (splits < SPLITS)
    m = tl.load(partial + at, mask=used, other=float("-inf"))
    s = tl.load(partial + count + at, mask=used, other=0.0)
    u = tl.load(partial + 2 * count + at, mask=used, other=0.0)
    score = tl.load(partial + 3 * count + at, mask=used, other=float("-inf"))
    column = tl.load(columns_out + at, mask=used, other=NO_COLUMN)
    best = tl.max(score, 1)
    first = tl.min(tl.where(score == best[:, None], column, NO_COLUMN), 1)
    m, s, u = merge(m, s, u, inverse_t[:, None] * LOG2E)
    _finish_rows(
        rows, m, s, u, first, inverse_t, logits, token_out, logp_out, entropy_out,
        V, stride_n, stride_v, inside,
    )  # fmt: skip


def sample_forward(
    logits: Tensor,  # [B, V]
    temperature: float,
    row_temperature: Tensor | None,
    seed: Tensor,  # [B]
    offset: Tensor,  # [B]
) -> tuple[Tensor, Tensor, Tensor]:
    """(token int64, logp float32, entropy float32), each [B]; arguments as of `sampler.sample_forward`."""
    (rows, v), device = logits.shape, logits.device
    token = torch.empty(rows, dtype=torch.int64, device=device)
    logp, entropy = torch.empty((2, rows), dtype=torch.float32, device=device).unbind()
    if rows:
        split = min(SPLIT, max(4, triton.next_power_of_2(v)))
        splits = triton.cdiv(v, split)
        partial, columns = logits, token  # one split needs no workspace
        if splits > 1:
            partial = torch.empty((4, rows, splits), dtype=torch.float32, device=device)
            columns = torch.empty((rows, splits), dtype=torch.int32, device=device)
        t, stride = temperature_arguments(row_temperature, logits)
        arguments = (
            logits, temperature, t, stride, partial, columns, token, logp, entropy, rows, v, *logits.stride(),
        )  # fmt: skip
        common = {"HAS_ROW_T": row_temperature is not None, "SPLITS": splits}
        _sample[(rows * splits,)](
            *arguments, seed, offset, seed.stride(0), offset.stride(0), **common,
            SPLIT=split, FAST=not interpreting(), num_warps=max(1, min(8, split // 512)),
        )  # fmt: skip
        if splits > 1:
            padded = triton.next_power_of_2(splits)
            _merge[(triton.cdiv(rows, MERGE_ROWS),)](
                *arguments, **common, PADDED=padded, ROWS=MERGE_ROWS, num_warps=1 if padded <= 64 else 4
            )
    return token, logp, entropy
