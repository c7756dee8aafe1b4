"""Triton backend of `policy_loss`: two launches over blocks of tokens, no atomics, no host synchronisation.

(1) Each block of tokens is cut into pieces at the sequence bounds, and the sums of every piece are kept, with the
block's share of the metrics. (2) Each block adds up the pieces of its tokens' sequences, which gives their mean
entropies, gates and weights, and writes the gradients; one more program adds up the loss and the metrics. Two launches
are needed because "tokens" divides by a count over the whole batch, and a gate needs its whole sequence.

The work of a launch depends on the number of tokens, not on how they are cut: one long sequence and many short ones
cost the same. Sums run in float64 in a fixed order: repeats are bitwise equal, and the inclusive test H_i <= target
agrees with the PyTorch backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .policy import METRICS, NORMALIZE_CONSTANT, NORMALIZE_SEQUENCES, NORMALIZE_TOKENS, PolicyParts

BLOCK = 512  # tokens of a program
PIECES = 4  # sequences of a block summed at a time
BLOCK_B = 512  # sequences that program takes at a time
# Rows of the sums of a piece, and of the metrics of a block.
PIECE_SUMS = ("count", "entropy", "policy")
BLOCK_SUMS = ("count", "low", "high", "kl", "ratio", "ratio_max")


@triton.jit
def _ratios(logp, old_logp, t, used, advantage, clip_low, clip_high):
    """(log ratio, ratio, held by 1 + clip_high, held by 1 - clip_low) of tokens t; 0 and 1 where not used."""
    # Masked before exp: a token that does not count must not bring inf or NaN in.
    difference = tl.load(logp + t, mask=used, other=0.0).to(tl.float32)
    difference -= tl.load(old_logp + t, mask=used, other=0.0).to(tl.float32)
    ratio = tl.exp(difference)
    clipped_high = used & (advantage > 0) & (ratio > 1.0 + clip_high)
    clipped_low = used & (advantage < 0) & (ratio < 1.0 - clip_low)
    return difference, ratio, clipped_high, clipped_low


@triton.jit
def _pieces(
    logp, old_logp, entropy, advantages, cu_seqlens, mask, segment_out, pieces, blocks, T, B, K, steps,
    clip_low, clip_high, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0)
    t = k.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = t < T
    # Binary search: the number of sequences that start at or before t, among the first B bounds.
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.full((BLOCK,), 0, tl.int32) + B
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        right = open_ & (tl.load(cu_seqlens + middle, mask=open_, other=0).to(tl.int64) <= t)
        high = tl.where(open_ & ~right, middle, high)
        low = tl.where(right, middle + 1, low)
    segment = low - 1  # -1: before the first sequence
    known = inside & (segment >= 0)
    known &= t < tl.load(cu_seqlens + segment + 1, mask=known, other=0).to(tl.int64)
    segment = tl.where(known, segment, -1)
    tl.store(segment_out + t, segment, mask=inside)

    used = known & (tl.load(mask + t, mask=known, other=0) != 0)
    advantage = tl.load(advantages + segment, mask=known, other=0.0).to(tl.float32)
    difference, ratio, clipped_high, clipped_low = _ratios(
        logp, old_logp, t, used, advantage, clip_low, clip_high
    )  # fmt: skip
    bounded = tl.where(clipped_high, 1.0 + clip_high, tl.where(clipped_low, 1.0 - clip_low, ratio))
    policy = tl.where(used & (advantage != 0), -bounded * advantage, 0.0)
    e = tl.load(entropy + t, mask=used, other=0.0).to(tl.float32)

    first = tl.min(tl.where(known, segment, B), 0)
    last = tl.max(segment, 0)
    for i0 in range(first, last + 1, PIECES):
        i = i0 + tl.arange(0, PIECES)
        mine = i[:, None] == segment[None, :]  # [PIECES, BLOCK]
        # Sequence i has its piece of block k at i + k: both rise along the tokens, so no two pieces share a place.
        out = pieces + (i + k)
        held = i <= last
        count = tl.sum((mine & used[None, :]).to(tl.int32), 1)
        tl.store(out, count.to(tl.float64), mask=held)
        tl.store(out + (B + K), tl.sum(tl.where(mine, e[None, :], 0.0).to(tl.float64), 1), mask=held)
        tl.store(out + 2 * (B + K), tl.sum(tl.where(mine, policy[None, :], 0.0).to(tl.float64), 1), mask=held)

    tl.store(blocks + k, tl.sum(used.to(tl.int32), 0).to(tl.float64))
    tl.store(blocks + K + k, tl.sum(clipped_low.to(tl.int32), 0).to(tl.float64))
    tl.store(blocks + 2 * K + k, tl.sum(clipped_high.to(tl.int32), 0).to(tl.float64))
    tl.store(blocks + 3 * K + k, tl.sum(tl.where(used, ratio - 1.0 - difference, 0.0).to(tl.float64), 0))
    tl.store(blocks + 4 * K + k, tl.sum(tl.where(used, ratio, 0.0).to(tl.float64), 0))
    tl.store(blocks + 5 * K + k, tl.max(tl.where(used, ratio, 0.0), 0).to(tl.float64))


@triton.jit
def _column(values, n, BLOCK_B: tl.constexpr):
    """Sum of n float64 values."""
    acc = tl.zeros((BLOCK_B,), tl.float64)
    for b0 in range(0, n, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        acc += tl.load(values + b, mask=b < n, other=0.0)
    return tl.sum(acc, 0)


@triton.jit
def _sequences(
    i, known, cu_seqlens, pieces, is_short, gate_tensor, target_short, target_long, beta_short, beta_long, tokens,
    constant, T, B, K,
    HAS_GATE_TENSOR: tl.constexpr, TOKENS: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of sequences i (where known): entropy sum, policy sum, mean entropy, kind (-1: none), gate, beta, 1 / divisor."""
    start = tl.load(cu_seqlens + i, mask=known, other=0).to(tl.int64)
    stop = tl.load(cu_seqlens + i + 1, mask=known, other=0).to(tl.int64)
    # Clamped: bounds outside the tokens, which only a CPU can refuse, must not reach outside the workspace.
    begin = tl.minimum(tl.maximum(start, 0), T) // BLOCK
    end = (tl.minimum(stop, T) + BLOCK - 1) // BLOCK
    end = tl.where(known & (start < stop), end, begin)
    count = tl.zeros(i.shape, tl.float64)
    total = tl.zeros(i.shape, tl.float64)
    policy = tl.zeros(i.shape, tl.float64)
    for step in range(tl.max(end - begin, 0)):
        at = i + begin + step
        held = begin + step < end
        count += tl.load(pieces + at, mask=held, other=0.0)
        total += tl.load(pieces + (B + K) + at, mask=held, other=0.0)
        policy += tl.load(pieces + 2 * (B + K) + at, mask=held, other=0.0)
    mean = (total / tl.maximum(count, 1.0)).to(tl.float32)
    if HAS_GATE_TENSOR:
        target_short, target_long = tl.load(gate_tensor).to(tl.float32), tl.load(gate_tensor + 1).to(tl.float32)
        beta_short, beta_long = tl.load(gate_tensor + 2).to(tl.float32), tl.load(gate_tensor + 3).to(tl.float32)
    kind = tl.load(is_short + i, mask=known, other=-1).to(tl.int32)
    kind = tl.where(count > 0, kind, -1)
    gate = ((kind == 1) & (mean <= target_short)) | ((kind == 0) & (mean <= target_long))
    beta = tl.where(gate, tl.where(kind == 1, beta_short, beta_long), 0.0)
    divisor = tl.full(i.shape, 1.0, tl.float64) * constant
    if TOKENS:
        divisor = tl.full(i.shape, 1.0, tl.float64) * tokens
    if SEQUENCES:
        divisor = tl.maximum(count, 1.0) * B
    return total, policy, mean, kind, gate, beta, 1.0 / divisor


@triton.jit
def _store_group(metrics, n, n_open, total):
    """Mean entropy, share of open gates and number of the sequences of one kind; stride 2 between metrics."""
    members = tl.sum(n, 0)
    tl.store(metrics, (tl.sum(total, 0) / tl.maximum(members, 1.0)).to(tl.float32))
    tl.store(metrics + 2, (tl.sum(n_open, 0) / tl.maximum(members, 1.0)).to(tl.float32))
    tl.store(metrics + 4, members.to(tl.float32))


@triton.jit
def _gradients(
    logp, old_logp, advantages, cu_seqlens, mask, is_short, gate_tensor, target_short, target_long,
    beta_short, beta_long, segments, pieces, blocks, loss, sequence_entropy, metrics, grad_logp, grad_entropy,
    T, B, K, clip_low, clip_high, constant,
    HAS_GATE_TENSOR: tl.constexpr, TOKENS: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    tokens = tl.maximum(_column(blocks, K, BLOCK_B), 1.0)
    k = tl.program_id(0) - 1  # the program of the totals has most to do and starts first
    if k >= 0:
        t = k.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = t < T
        segment = tl.load(segments + t, mask=inside, other=-1)
        known = segment >= 0
        _, _, _, _, _, beta, weight = _sequences(
            segment, known, cu_seqlens, pieces, is_short, gate_tensor, target_short, target_long, beta_short,
            beta_long, tokens, constant, T, B, K, HAS_GATE_TENSOR, TOKENS, SEQUENCES, BLOCK,
        )  # fmt: skip
        used = known & (tl.load(mask + t, mask=known, other=0) != 0)
        advantage = tl.load(advantages + segment, mask=known, other=0.0).to(tl.float32)
        trained = used & (advantage != 0)  # a wild ratio times an advantage of 0 would be NaN
        _, ratio, clipped_high, clipped_low = _ratios(logp, old_logp, t, trained, advantage, clip_low, clip_high)
        w = tl.where(used, weight.to(tl.float32), 0.0)
        dlogp = tl.where(clipped_high | clipped_low, 0.0, -advantage * ratio * w)
        tl.store(grad_logp + t, dlogp.to(grad_logp.dtype.element_ty), mask=inside)
        tl.store(grad_entropy + t, (-beta * w).to(grad_entropy.dtype.element_ty), mask=inside)
    else:
        loss_sum = tl.zeros((BLOCK_B,), tl.float64)
        bonus = tl.zeros((BLOCK_B,), tl.float64)
        n_long = tl.zeros((BLOCK_B,), tl.float64)
        n_short = tl.zeros((BLOCK_B,), tl.float64)
        open_long = tl.zeros((BLOCK_B,), tl.float64)
        open_short = tl.zeros((BLOCK_B,), tl.float64)
        h_long = tl.zeros((BLOCK_B,), tl.float64)
        h_short = tl.zeros((BLOCK_B,), tl.float64)
        for b0 in range(0, B, BLOCK_B):
            b = b0 + tl.arange(0, BLOCK_B)
            known_b = b < B
            total, policy, mean, kind, gate, beta_b, weight_b = _sequences(
                b, known_b, cu_seqlens, pieces, is_short, gate_tensor, target_short, target_long, beta_short,
                beta_long, tokens, constant, T, B, K, HAS_GATE_TENSOR, TOKENS, SEQUENCES, BLOCK,
            )  # fmt: skip
            tl.store(sequence_entropy + b, mean, mask=known_b)
            loss_sum += policy * weight_b
            bonus += beta_b.to(tl.float64) * total * weight_b
            long, short, opened = (kind == 0).to(tl.float64), (kind == 1).to(tl.float64), gate.to(tl.float64)
            n_long += long
            n_short += short
            open_long += long * opened
            open_short += short * opened
            h_long += tl.where(kind == 0, mean, 0.0).to(tl.float64)
            h_short += tl.where(kind == 1, mean, 0.0).to(tl.float64)
        policy_sum, bonus_sum = tl.sum(loss_sum, 0), tl.sum(bonus, 0)
        tl.store(loss, (policy_sum - bonus_sum).to(tl.float32))
        tl.store(metrics, policy_sum.to(tl.float32))
        tl.store(metrics + 1, bonus_sum.to(tl.float32))
        for column in tl.static_range(1, 5):
            tl.store(metrics + 1 + column, (_column(blocks + column * K, K, BLOCK_B) / tokens).to(tl.float32))
        largest = tl.zeros((BLOCK_B,), tl.float64)
        for b0 in range(0, K, BLOCK_B):
            b = b0 + tl.arange(0, BLOCK_B)
            largest = tl.maximum(largest, tl.load(blocks + 5 * K + b, mask=b < K, other=0.0))
        tl.store(metrics + 6, tl.max(largest, 0).to(tl.float32))
        tl.store(metrics + 7, _column(blocks, K, BLOCK_B).to(tl.float32))
        _store_group(metrics + 8, n_long, open_long, h_long)
        _store_group(metrics + 9, n_short, open_short, h_short)


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
    """Loss, its parts and both gradients in two launches; arguments as of `policy.policy_forward`."""
    n_tok, n_seq, device = logp.shape[0], advantages.shape[0], logp.device
    logp, old_logp, entropy, advantages, cu_seqlens, mask, is_short = (
        t.contiguous() for t in (logp, old_logp, entropy, advantages, cu_seqlens, mask, is_short)
    )
    has_tensor = gate_tensor is not None
    gate_arguments = (gate_tensor, 0.0, 0.0, 0.0, 0.0) if has_tensor else (advantages, *gate)
    n_blocks = triton.cdiv(n_tok, BLOCK)
    segments = torch.empty(n_tok, dtype=torch.int32, device=device)
    pieces = torch.empty((len(PIECE_SUMS), n_seq + n_blocks), dtype=torch.float64, device=device)
    blocks = torch.empty((len(BLOCK_SUMS), n_blocks), dtype=torch.float64, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    sequence_entropy = torch.empty(n_seq, dtype=torch.float32, device=device)
    metrics = torch.empty(len(METRICS), dtype=torch.float32, device=device)
    grad_logp, grad_entropy = torch.empty_like(logp), torch.empty_like(entropy)
    if n_tok:
        _pieces[(n_blocks,)](
            logp, old_logp, entropy, advantages, cu_seqlens, mask, segments, pieces, blocks, n_tok, n_seq, n_blocks,
            n_seq.bit_length(), clip_low, clip_high, BLOCK=BLOCK, PIECES=PIECES, num_warps=8,
        )  # fmt: skip
    _gradients[(n_blocks + 1,)](
        logp, old_logp, advantages, cu_seqlens, mask, is_short, *gate_arguments, segments, pieces, blocks,
        loss, sequence_entropy, metrics, grad_logp, grad_entropy, n_tok, n_seq, n_blocks, clip_low, clip_high,
        constant if normalize == NORMALIZE_CONSTANT else 1.0, HAS_GATE_TENSOR=has_tensor,
        TOKENS=normalize == NORMALIZE_TOKENS, SEQUENCES=normalize == NORMALIZE_SEQUENCES,
        BLOCK=BLOCK, BLOCK_B=BLOCK_B, num_warps=8,
    )  # fmt: skip
    return PolicyParts(loss, sequence_entropy, metrics, grad_logp, grad_entropy)
