"""Triton backend of `sample_logp_entropy`: one program per row reads its logits once.

Draws the same Philox bits as `philox.uniforms`; -log(1 - u) is rounded differently in the last bits, so two
backends can disagree only where two candidates tie to about 1e-6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_logits import finish, load_temperature, online_update, temperature_arguments

MAX_BLOCK = 1024


@triton.jit
def uniform(bits):
    """uint32 -> float32 in (0, 1), finest near 0."""
    return tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)


@triton.jit
def gumbel(u):
    """-log(-log(1 - u)); a series where 1 - u would round away the digits of a small u."""
    series = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * (0.25 + u * 0.2))))
    return -tl.log(tl.where(u < 0.01, series, -tl.log(1.0 - u)))


@triton.jit
def _better(value, index, best, best_index):
    """The larger value, or the smaller column of equal ones; NaN never wins."""
    wins = (value > best) | ((value == best) & (index < best_index))
    return tl.where(wins, value, best), tl.where(wins, index, best_index)


@triton.jit
def _sample(
    logits, temperature, temperature_ptr, temperature_stride, seed, offset,
    token_out, logp_out, entropy_out, V, stride_n, stride_v,
    HAS_ROW_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # [1]
    t = load_temperature(temperature, temperature_ptr, row, row >= 0, temperature_stride, HAS_ROW_T)
    greedy = t == 0
    t = tl.where(greedy, 1.0, t)
    key, counter = tl.load(seed + row), tl.load(offset + row)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    start = logits + row * stride_n
    m = tl.full((1,), float("-inf"), tl.float32)
    s = tl.zeros((1,), tl.float32)
    u = tl.zeros((1,), tl.float32)
    best = tl.full((1, BLOCK), float("-inf"), tl.float32)
    best_column = tl.full((1, BLOCK), 2147483647, tl.int32)
    for block0 in range(0, tl.cdiv(V, 4), BLOCK):
        block = block0 + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK] counters, four columns each
        zero = tl.zeros((1, BLOCK), tl.uint32)
        words = tl.philox(key[:, None], block.to(tl.uint32), zero, low[:, None] + zero, high[:, None] + zero)
        for word in tl.static_range(4):
            column = block * 4 + word
            pointers = start[:, None] + column.to(tl.int64) * stride_v
            x = tl.load(pointers, mask=column < V, other=float("-inf")).to(tl.float32) / t[:, None]
            m, s, u = online_update(m, s, u, x)
            noise = tl.where(greedy[:, None], 0.0, gumbel(uniform(words[word])))
            best, best_column = _better(x + noise, column, best, best_column)
    top = tl.max(best, 1)
    token = tl.min(tl.where(best == top[:, None], best_column, 2147483647), 1)
    token = tl.where(token < V, token, 0)  # only a row of NaN or -inf has no candidate
    chosen = tl.load(start + token.to(tl.int64) * stride_v).to(tl.float32) / t
    logp, entropy, _ = finish(chosen, m, s, u)
    tl.store(token_out + row, token.to(tl.int64))
    tl.store(logp_out + row, logp)
    tl.store(entropy_out + row, entropy)


def sample_forward(
    logits: Tensor,  # [B, V]
    temperature: float,
    row_temperature: Tensor | None,
    seed: Tensor,  # [B]
    offset: Tensor,  # [B]
) -> tuple[Tensor, Tensor, Tensor]:
    rows, v = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logp, entropy = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows:
        t, stride = temperature_arguments(row_temperature, logits)
        _sample[(rows,)](
            logits, temperature, t, stride, seed.contiguous(), offset.contiguous(), token, logp, entropy,
            v, logits.stride(0), logits.stride(1), HAS_ROW_T=row_temperature is not None,
            BLOCK=min(MAX_BLOCK, triton.next_power_of_2(triton.cdiv(v, 4))), num_warps=4,
        )  # fmt: skip
    return token, logp, entropy
