"""The PyTorch backend of `policy_loss`: loss, its gradients and its metrics in one pass.

The loss is linear in its upstream gradient, so the forward also returns dL/dlogp and dL/dentropy and the
backward only scales them. Sums over a sequence run in float64 and are rounded once, so that the inclusive
test H_i <= target does not depend on the order of summation: a sequence whose entropies all equal the
target passes it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

METRICS = (
    "policy_loss",  # normalised sum of pg_t
    "entropy_bonus",  # normalised sum of beta_i e_t; loss = policy_loss - entropy_bonus
    "clip_fraction_low",  # share of trained tokens held by 1 - clip_low (negative advantage)
    "clip_fraction_high",  # share held by 1 + clip_high (positive advantage)
    "approx_kl",  # mean of rho - 1 - log rho, the k3 estimate of KL(old || new)
    "ratio_mean",
    "ratio_max",
    "n_tokens",  # trained tokens
    "entropy_long",  # mean H_i over long sequences with trained tokens; 0 when there are none
    "entropy_short",
    "gate_long",  # share of those long sequences with H_i <= target_long
    "gate_short",
    "n_long",  # long sequences with trained tokens
    "n_short",
)
NORMALIZE_TOKENS, NORMALIZE_SEQUENCES, NORMALIZE_CONSTANT = 0, 1, 2


class PolicyParts(NamedTuple):
    """Outputs of the forward pass."""

    loss: Tensor  # []
    sequence_entropy: Tensor  # [B]
    metrics: Tensor  # [len(METRICS)] float32
    grad_logp: Tensor  # [T] dL/dlogp
    grad_entropy: Tensor  # [T] dL/dentropy


def policy_forward(
    logp: Tensor,  # [T]
    old_logp: Tensor,  # [T]
    entropy: Tensor,  # [T]
    advantages: Tensor,  # [B]
    cu_seqlens: Tensor,  # [B + 1]
    mask: Tensor,  # [T] bool
    is_short: Tensor,  # [B] 1, 0 or -1
    gate: list[float],  # target_short, target_long, beta_short, beta_long
    gate_tensor: Tensor | None,  # [4] the same, replaces gate
    clip_low: float,
    clip_high: float,
    normalize: int,
    constant: float,
) -> PolicyParts:
    """Loss, its parts and both gradients in PyTorch operations; the arguments are those of the op `policy_loss`."""
    n_seq, n_tok = advantages.shape[0], logp.shape[0]
    dtype = torch.promote_types(logp.dtype, torch.float32)
    if logp.device.type == "cpu":
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != n_tok or (cu_seqlens.diff() < 0).any():
            got = f"{cu_seqlens[:3].tolist()}..{cu_seqlens[-1:].tolist()}"
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens ({n_tok}): got {got}")
        if (known := (is_short == 0) | (is_short == 1) | (is_short == -1)).logical_not().any():
            raise ValueError(f"is_short must hold 1, 0 or -1: got {is_short[~known][0].item()}")
    lengths = cu_seqlens.diff()
    segment = torch.repeat_interleave(lengths, output_size=n_tok)
    offsets = cu_seqlens.long()

    counts = _segment_sum(mask, offsets)  # [B] float64
    trained = counts > 0
    token_entropy = torch.where(mask, entropy, 0.0).to(dtype)
    safe_counts = counts.clamp(min=1.0)
    sequence_entropy = (_segment_sum(token_entropy, offsets) / safe_counts).to(dtype)

    gate = gate if gate_tensor is None else gate_tensor.to(dtype)
    short, long = (is_short == 1) & trained, (is_short == 0) & trained
    open_short, open_long = short & (sequence_entropy <= gate[0]), long & (sequence_entropy <= gate[1])
    beta = open_short.to(dtype) * gate[2] + open_long.to(dtype) * gate[3]  # [B]

    total = counts.sum()
    if normalize == NORMALIZE_TOKENS:
        per_sequence = (1.0 / total.clamp(min=1.0)).expand(n_seq)
    elif normalize == NORMALIZE_SEQUENCES:
        per_sequence = 1.0 / (safe_counts * max(n_seq, 1))
    else:
        per_sequence = counts.new_full((n_seq,), 1.0 / constant)
    # One gather spreads everything of sequence size over the tokens.
    spread = torch.stack((advantages.to(dtype), per_sequence.to(dtype), beta))[:, segment]  # [3, T]
    advantage, weight, token_beta = spread[0], spread[1] * mask, spread[2]

    # Masked before exp: a wild log-ratio on a token that does not count must not reach the loss as inf * 0.
    log_ratio = torch.where(mask & (advantage != 0), logp.to(dtype) - old_logp.to(dtype), 0.0)
    ratio = log_ratio.exp()
    clipped_high = (advantage > 0) & (ratio > 1.0 + clip_high)
    clipped_low = (advantage < 0) & (ratio < 1.0 - clip_low)
    bounded = torch.where(clipped_high, 1.0 + clip_high, torch.where(clipped_low, 1.0 - clip_low, ratio))
    policy = -(bounded * advantage * weight).sum(dtype=torch.float64)
    weighted_beta = token_beta * weight
    bonus = (weighted_beta * token_entropy).sum(dtype=torch.float64)

    every_log_ratio = torch.where(mask, logp.to(dtype) - old_logp.to(dtype), 0.0)
    every_ratio = every_log_ratio.exp()
    k3 = every_ratio - 1.0 - every_log_ratio
    tokens = total.clamp(min=1.0)
    token_means = torch.stack((clipped_low.to(dtype), clipped_high.to(dtype), k3, every_ratio * mask)).sum(1) / tokens
    ratio_max = torch.where(mask, every_ratio, 0.0).max() if n_tok else total.new_zeros(())
    groups = torch.stack((long, short, open_long, open_short)).double()  # [4, B]
    n_group = groups.sum(1)
    shares = n_group[2:] / n_group[:2].clamp(min=1.0)
    group_entropy = (groups[:2] * sequence_entropy).sum(1) / n_group[:2].clamp(min=1.0)
    metrics = torch.cat(
        (
            torch.stack((policy, bonus)),
            token_means.double(),
            torch.stack((ratio_max.double(), total)),
            group_entropy,
            shares,
            n_group[:2],
        )
    ).float()
    return PolicyParts(
        loss=(policy - bonus).to(dtype),
        sequence_entropy=sequence_entropy,
        metrics=metrics,
        grad_logp=torch.where(clipped_high | clipped_low, 0.0, -advantage * ratio * weight).to(logp.dtype),
        grad_entropy=(-weighted_beta).to(entropy.dtype),
    )


def _segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums [T] over segments into float64 [B], in a fixed order (no atomics); empty segments give 0."""
    return torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0.0)
