"""Triton backend of `policy_loss`: one program per sequence, three launches, no host synchronisation.

(1) mean entropy, gate and token count of every sequence; (2) gradients of every token and one row of partial
sums per sequence; (3) one program adds the rows in order. Two steps are needed before the gradients because
"tokens" divides by a count over the whole batch. Sums run in float64, as in the PyTorch backend, so that the
inclusive test H_i <= target agrees between the two; there are no atomics, so repeats are bitwise equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .policy import METRICS, NORMALIZE_CONSTANT, NORMALIZE_SEQUENCES, NORMALIZE_TOKENS, PolicyParts

BLOCK = 1024
BLOCK_B = 128
# Columns of the partial sums.
PARTIALS = ("policy", "bonus", "low", "high", "kl", "ratio", "ratio_max")


@triton.jit
def _gate(
    entropy, cu_seqlens, mask, is_short, gate_tensor, target_short, target_long, beta_short, beta_long,
    count_out, entropy_out, beta_out, HAS_GATE_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    start, stop = tl.load(cu_seqlens + i).to(tl.int64), tl.load(cu_seqlens + i + 1).to(tl.int64)
    count = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for t0 in range(start, stop, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        used = tl.load(mask + t, mask=t < stop, other=0) != 0
        count += used.to(tl.float64)
        total += tl.load(entropy + t, mask=used, other=0.0).to(tl.float64)
    n = tl.sum(count, 0)
    mean = (tl.sum(total, 0) / tl.maximum(n, 1.0)).to(tl.float32)
    if HAS_GATE_TENSOR:
        target_short, target_long = tl.load(gate_tensor), tl.load(gate_tensor + 1)
        beta_short, beta_long = tl.load(gate_tensor + 2), tl.load(gate_tensor + 3)
    kind = tl.load(is_short + i).to(tl.int32)
    beta = tl.where((kind == 1) & (mean <= target_short), beta_short, 0.0)
    beta += tl.where((kind == 0) & (mean <= target_long), beta_long, 0.0)
    tl.store(count_out + i, n)
    tl.store(entropy_out + i, mean)
    tl.store(beta_out + i, beta)


@triton.jit
def _total(counts, B, BLOCK_B: tl.constexpr):
    acc = tl.zeros((BLOCK_B,), tl.float64)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        acc += tl.load(counts + b, mask=b < B, other=0.0)
    return tl.sum(acc, 0)


@triton.jit
def _gradients(
    logp, old_logp, entropy, advantages, cu_seqlens, mask, counts, betas,
    grad_logp, grad_entropy, partials, B, clip_low, clip_high, constant,
    TOKENS: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    start, stop = tl.load(cu_seqlens + i).to(tl.int64), tl.load(cu_seqlens + i + 1).to(tl.int64)
    advantage = tl.load(advantages + i + tl.arange(0, 1)).to(tl.float32)  # [1]
    beta = tl.load(betas + i)
    divisor = tl.full((), 1.0, tl.float64) * constant
    if TOKENS:
        divisor = tl.maximum(_total(counts, B, BLOCK_B), 1.0)
    if SEQUENCES:
        divisor = tl.maximum(tl.load(counts + i), 1.0) * B
    weight = (1.0 / divisor).to(tl.float32)

    policy = tl.zeros((BLOCK,), tl.float64)
    bonus = tl.zeros((BLOCK,), tl.float64)
    low = tl.zeros((BLOCK,), tl.float64)
    high = tl.zeros((BLOCK,), tl.float64)
    kl = tl.zeros((BLOCK,), tl.float64)
    ratio_sum = tl.zeros((BLOCK,), tl.float64)
    ratio_max = tl.zeros((BLOCK,), tl.float32)
    for t0 in range(start, stop, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        inside = t < stop
        used = tl.load(mask + t, mask=inside, other=0) != 0
        # Masked before exp: a token that does not count must not bring inf or NaN in.
        difference = tl.load(logp + t, mask=used, other=0.0).to(tl.float32)
        difference -= tl.load(old_logp + t, mask=used, other=0.0).to(tl.float32)
        every_ratio = tl.exp(difference)
        ratio = tl.where(advantage != 0, every_ratio, 1.0)
        clipped_high = used & (advantage > 0) & (ratio > 1.0 + clip_high)
        clipped_low = used & (advantage < 0) & (ratio < 1.0 - clip_low)
        bounded = tl.where(clipped_high, 1.0 + clip_high, tl.where(clipped_low, 1.0 - clip_low, ratio))
        e = tl.load(entropy + t, mask=used, other=0.0).to(tl.float32)
        w = tl.where(used, weight, 0.0)
        policy -= (bounded * advantage * w).to(tl.float64)
        bonus += (beta * w * e).to(tl.float64)
        low += clipped_low.to(tl.float64)
        high += clipped_high.to(tl.float64)
        kl += tl.where(used, every_ratio - 1.0 - difference, 0.0).to(tl.float64)
        ratio_sum += tl.where(used, every_ratio, 0.0).to(tl.float64)
        ratio_max = tl.maximum(ratio_max, tl.where(used, every_ratio, 0.0))
        dlogp = tl.where(clipped_high | clipped_low, 0.0, -advantage * ratio * w)
        tl.store(grad_logp + t, dlogp.to(grad_logp.dtype.element_ty), mask=inside)
        tl.store(grad_entropy + t, (-beta * w).to(grad_entropy.dtype.element_ty), mask=inside)
    out = partials + i * 7
    tl.store(out, tl.sum(policy, 0))
    tl.store(out + 1, tl.sum(bonus, 0))
    tl.store(out + 2, tl.sum(low, 0))
    tl.store(out + 3, tl.sum(high, 0))
    tl.store(out + 4, tl.sum(kl, 0))
    tl.store(out + 5, tl.sum(ratio_sum, 0))
    tl.store(out + 6, tl.max(ratio_max, 0).to(tl.float64))


@triton.jit
def _column(partials, column: tl.constexpr, B, BLOCK_B: tl.constexpr):
    acc = tl.zeros((BLOCK_B,), tl.float64)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        acc += tl.load(partials + b * 7 + column, mask=b < B, other=0.0)
    return tl.sum(acc, 0)


@triton.jit
def _set_metrics(
    out, kind: tl.constexpr, sequence_entropy, is_short, counts, gate_tensor, target, B,
    HAS_GATE_TENSOR: tl.constexpr, TARGET: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Mean entropy, share of open gates and number of the sequences of one kind; stride 2 between metrics."""
    if HAS_GATE_TENSOR:
        target = tl.load(gate_tensor + TARGET)
    n = tl.zeros((BLOCK_B,), tl.float64)
    n_open = tl.zeros((BLOCK_B,), tl.float64)
    total = tl.zeros((BLOCK_B,), tl.float64)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        member = (tl.load(is_short + b, mask=b < B, other=-1).to(tl.int32) == kind) & (b < B)
        member = member & (tl.load(counts + b, mask=b < B, other=0.0) > 0)
        h = tl.load(sequence_entropy + b, mask=member, other=0.0)
        n += member.to(tl.float64)
        n_open += (member & (h <= target)).to(tl.float64)
        total += h.to(tl.float64)
    members = tl.sum(n, 0)
    tl.store(out, (tl.sum(total, 0) / tl.maximum(members, 1.0)).to(tl.float32))
    tl.store(out + 2, (tl.sum(n_open, 0) / tl.maximum(members, 1.0)).to(tl.float32))
    tl.store(out + 4, members.to(tl.float32))


@triton.jit
def _finish(
    partials, counts, sequence_entropy, is_short, gate_tensor, target_short, target_long, loss, metrics, B,
    HAS_GATE_TENSOR: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    policy, bonus = _column(partials, 0, B, BLOCK_B), _column(partials, 1, B, BLOCK_B)
    total = _total(counts, B, BLOCK_B)
    tokens = tl.maximum(total, 1.0)
    tl.store(loss, (policy - bonus).to(tl.float32))
    tl.store(metrics, policy.to(tl.float32))
    tl.store(metrics + 1, bonus.to(tl.float32))
    tl.store(metrics + 2, (_column(partials, 2, B, BLOCK_B) / tokens).to(tl.float32))
    tl.store(metrics + 3, (_column(partials, 3, B, BLOCK_B) / tokens).to(tl.float32))
    tl.store(metrics + 4, (_column(partials, 4, B, BLOCK_B) / tokens).to(tl.float32))
    tl.store(metrics + 5, (_column(partials, 5, B, BLOCK_B) / tokens).to(tl.float32))
    largest = tl.zeros((BLOCK_B,), tl.float64)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        largest = tl.maximum(largest, tl.load(partials + b * 7 + 6, mask=b < B, other=0.0))
    tl.store(metrics + 6, tl.max(largest, 0).to(tl.float32))
    tl.store(metrics + 7, total.to(tl.float32))
    _set_metrics(
        metrics + 8, 0, sequence_entropy, is_short, counts, gate_tensor, target_long, B,
        HAS_GATE_TENSOR, 1, BLOCK_B,
    )  # fmt: skip
    _set_metrics(
        metrics + 9, 1, sequence_entropy, is_short, counts, gate_tensor, target_short, B,
        HAS_GATE_TENSOR, 0, BLOCK_B,
    )  # fmt: skip


def policy_forward(
    logp: Tensor,  # [T]
    old_logp: Tensor,
    entropy: Tensor,
    advantages: Tensor,  # [B]
    cu_seqlens: Tensor,  # [B + 1]
    mask: Tensor,
    is_short: Tensor,
    gate: list[float],
    gate_tensor: Tensor | None,
    clip_low: float,
    clip_high: float,
    normalize: int,
    constant: float,
) -> PolicyParts:
    n_seq, device = advantages.shape[0], logp.device
    logp, old_logp, entropy, advantages, cu_seqlens, mask, is_short = (
        t.contiguous() for t in (logp, old_logp, entropy, advantages, cu_seqlens, mask, is_short)
    )
    has_tensor = gate_tensor is not None
    target_short, target_long, beta_short, beta_long = (0.0,) * 4 if has_tensor else gate
    gate_tensor = gate_tensor.float() if has_tensor else advantages
    counts = torch.empty(n_seq, dtype=torch.float64, device=device)
    sequence_entropy, betas = (torch.empty(n_seq, dtype=torch.float32, device=device) for _ in range(2))
    partials = torch.empty((n_seq, len(PARTIALS)), dtype=torch.float64, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    metrics = torch.empty(len(METRICS), dtype=torch.float32, device=device)
    # Zeros: tokens outside cu_seqlens, which only a CPU can refuse, must not hold uninitialised gradients.
    grad_logp, grad_entropy = torch.zeros_like(logp), torch.zeros_like(entropy)
    if n_seq:
        _gate[(n_seq,)](
            entropy, cu_seqlens, mask, is_short, gate_tensor, target_short, target_long, beta_short,
            beta_long, counts, sequence_entropy, betas, HAS_GATE_TENSOR=has_tensor, BLOCK=BLOCK,
        )  # fmt: skip
        _gradients[(n_seq,)](
            logp, old_logp, entropy, advantages, cu_seqlens, mask, counts, betas,
            grad_logp, grad_entropy, partials, n_seq, clip_low, clip_high,
            constant if normalize == NORMALIZE_CONSTANT else 1.0, TOKENS=normalize == NORMALIZE_TOKENS,
            SEQUENCES=normalize == NORMALIZE_SEQUENCES, BLOCK=BLOCK, BLOCK_B=BLOCK_B,
        )  # fmt: skip
    _finish[(1,)](
        partials, counts, sequence_entropy, is_short, gate_tensor, target_short, target_long, loss, metrics,
        n_seq, HAS_GATE_TENSOR=has_tensor, BLOCK_B=BLOCK_B,
    )  # fmt: skip
    return PolicyParts(loss, sequence_entropy, metrics, grad_logp, grad_entropy)
