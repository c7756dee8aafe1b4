"""Stage 2: GRPO with (decoupled, adaptive) entropy constraints, as pure functions.

For response i with mode flag m_i (1 short, 0 long), advantage A_i and entropy H_i:

    beta_i = beta_s * m_i * 1[H_i <= H_s] + beta_l * (1 - m_i) * 1[H_i <= H_l]
    L      = mean of [ -min(rho A_i, clip(rho, 1 - clip_low, 1 + clip_high) A_i) - beta_i H_i ]

H_i carries gradient; the indicator (inclusive) and beta do not. Malformed responses (flag -1) have no
entropy term. A step reads: `group_advantages` on the rewards of all groups, `policy_objective` per
micro-batch with the controller's `coefficients`, then one `update` of the controller with the sum of the
`EntropyStats`.

The log-ratio, the clip and the entropy term of the scope "reply" are `autotool_kernels.policy_loss`. The
controllers are in `controller.py` and are offered here too. Packing, reduction over ranks, the optimizer and
the measurement of relative targets are left to the trainer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from autotool_kernels import policy_loss
from torch import Tensor

from autotool_fast.controller import (
    Coefficients,
    EntropyController,
    EntropyStats,
    coefficients,
    resolve_targets,
    update,
)
from autotool_fast.errors import UserError

__all__ = [
    "Coefficients",
    "EntropyController",
    "EntropyStats",
    "GroupAdvantages",
    "LossSettings",
    "Objective",
    "ScopedEntropy",
    "capped_old_logp",
    "coefficients",
    "gated_beta",
    "group_advantages",
    "merge_metrics",
    "mismatch_metrics",
    "policy_objective",
    "resolve_targets",
    "scoped_entropy",
    "update",
]

Scope = Literal["reply", "think", "mode", "blend"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


class GroupAdvantages(NamedTuple):
    """Advantages of all responses and which of them carry no signal."""

    advantages: Tensor  # [N] float32
    constant: Tensor  # [N] bool: the response's whole group earned the same


def group_advantages(
    rewards: Tensor,  # [N]
    groups: Tensor | int,  # [N] ids in any order, or the size of consecutive groups
    *,
    scale: Literal["std", "none"] = "std",
    tolerance: float = 1e-6,
) -> GroupAdvantages:
    """GRPO advantages: reward minus the group's mean, divided by its standard deviation unless scale "none".

    A group is constant when its largest reward exceeds its smallest by at most `tolerance`; its advantages
    are exactly 0. The standard deviation cannot tell: that of equal floats is often a tiny positive number,
    which would blow rounding up to advantages of size 1. Since constant groups are taken out first the
    division needs no epsilon, so advantages do not depend on the unit of reward. The deviation is the
    unbiased one (G - 1), as in TRL and verl.

    Raises:
        ValueError: rewards not finite, or groups that do not fit them.
    """
    reward = rewards.double()
    n = reward.numel()
    if reward.dim() != 1 or not torch.isfinite(reward).all():
        raise ValueError("rewards must be a finite vector")
    if isinstance(groups, int):
        if groups < 1 or n % groups:
            raise ValueError(f"{n} rewards do not divide into groups of {groups}")
        index = torch.arange(n, device=reward.device) // groups
    else:
        if groups.shape != reward.shape:
            raise ValueError(f"groups must have the shape of rewards, got {tuple(groups.shape)}")
        index = torch.unique(groups, return_inverse=True)[1]
    n_groups = int(index.max()) + 1 if n else 0

    def per_group(values: Tensor, reduce: str) -> Tensor:
        out = values.new_zeros(n_groups)
        return out.scatter_reduce(0, index, values, reduce, include_self=False)[index]

    constant = per_group(reward, "amax") - per_group(reward, "amin") <= tolerance
    advantage = reward - per_group(reward, "mean")
    if scale == "std":
        freedom = (per_group(torch.ones_like(reward), "sum") - 1).clamp(min=1)
        advantage = advantage / (per_group(advantage.square(), "sum") / freedom).sqrt()
    elif scale != "none":
        raise ValueError(f"scale must be 'std' or 'none', got {scale!r}")
    return GroupAdvantages(advantage.masked_fill(constant, 0.0).float(), constant)


class ScopedEntropy(NamedTuple):
    """H_i over the tokens of a scope."""

    mean: Tensor  # [B] nats, carries the gradient of `entropy`; 0 where undefined
    defined: Tensor  # [B] bool: the response has trained tokens in the scope
    n_tokens: Tensor  # [B] float64, trained tokens of the whole response


def scoped_entropy(
    entropy: Tensor,  # [T]
    cu_seqlens: Tensor,  # [B + 1]
    mask: Tensor,  # [T] bool
    scope: Scope = "reply",
    mode_mask: Tensor | None = None,  # [T] bool
    think_mask: Tensor | None = None,  # [T] bool
) -> ScopedEntropy:
    """Mean token entropy of each response over its trained tokens in the scope; nothing else enters it.

    "reply" takes all trained tokens, "think" those of the thinking, "mode" those of the mode tag (one run per
    turn), "blend" half the mean over the mode tag and half the mean over the reply (the reply alone where the
    tag was forced and so not sampled). In a mean over a reply of n tokens the tag, which is the choice to
    think, has weight 1/n: the other scopes are there because that weight can be too small to act.

    Sums run in float64 and are rounded once, as in `policy_loss`: a response whose entropies all equal the
    target passes the inclusive gate.
    """

    def mean_over(selected: Tensor) -> tuple[Tensor, Tensor]:
        count = _segment_sum(selected, cu_seqlens)
        total = _segment_sum(torch.where(selected, entropy, 0.0), cu_seqlens)
        return total / count.clamp(min=1.0), count

    reply, n_tokens = mean_over(mask)
    if scope == "reply":
        mean, count = reply, n_tokens
    elif scope == "think":
        mean, count = mean_over(mask & _required(think_mask, "think_mask", scope))
    else:
        mean, count = mean_over(mask & _required(mode_mask, "mode_mask", scope))
        if scope == "blend":
            mean, count = torch.where(count > 0, 0.5 * mean + 0.5 * reply, reply), n_tokens
    dtype = torch.promote_types(entropy.dtype, torch.float32)
    return ScopedEntropy(mean.to(dtype), count > 0, n_tokens)


def gated_beta(entropy: ScopedEntropy, is_short: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
    """(beta_i [B], gate open [B] bool) of each response, both without gradient.

    The indicator is inclusive; a malformed response, or one without a defined H_i, has beta 0 and a shut
    gate.
    """
    h = entropy.mean.detach()
    table = h.new_tensor([c.target_short, c.target_long, c.beta_short, c.beta_long])  # rounded like H_i
    short, long = (is_short == 1) & entropy.defined, (is_short == 0) & entropy.defined
    open_short, open_long = short & (h <= table[0]), long & (h <= table[1])
    return open_short * table[2] + open_long * table[3], open_short | open_long


@dataclass(frozen=True)
class LossSettings:
    """Settings of the loss that do not change during a run."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    normalize: Literal["tokens", "sequences"] | float = "tokens"
    """tokens: 1/n_tok sum_i sum_t; sequences: 1/N sum_i mean_t (the paper's formula); a number: the sum over
    trained tokens divided by it."""
    scope: Scope = "reply"
    """Tokens that make up H_i, see `scoped_entropy`."""
    constant_groups: Literal["entropy", "exclude"] = "entropy"
    """What becomes of groups without a reward difference. entropy: they leave the policy gradient (their
    advantage is 0) and keep their entropy term; exclude: they leave the loss and its normaliser."""

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise UserError(
                f"unknown {self.scope!r}", where="rl.entropy_scope", remedy=f"use one of {SCOPES}"
            )
        if self.constant_groups not in ("entropy", "exclude"):
            raise UserError(
                f"unknown {self.constant_groups!r}",
                where="rl.constant_groups",
                remedy="use entropy or exclude",
            )


class Objective(NamedTuple):
    """Loss of one micro-batch and what was measured on the way."""

    loss: Tensor  # [] carries the gradient to logp and entropy, also when it is zero
    sequence_entropy: Tensor  # [B] H_i over the scope, detached
    stats: EntropyStats
    metrics: dict[str, float]  # join those of a step with `merge_metrics`


def policy_objective(
    logp: Tensor,  # [T]
    old_logp: Tensor,  # [T]
    entropy: Tensor,  # [T]
    advantages: Tensor,  # [B]
    cu_seqlens: Tensor,  # [B + 1] int32
    mask: Tensor,  # [T] bool: sampled tokens; prompt and tool tokens are False and enter no mean
    is_short: Tensor,  # [B] 1 short, 0 long, -1 malformed
    c: Coefficients,
    settings: LossSettings,
    *,
    mode_mask: Tensor | None = None,  # [T] bool
    think_mask: Tensor | None = None,  # [T] bool
    constant: Tensor | None = None,  # [B] bool
    n_tokens_global: float | None = None,
    n_sequences_global: float | None = None,
    backend: str = "auto",
) -> Objective:
    """The loss of one micro-batch of whole responses (H_i belongs to a whole response: never split one).

    Constant groups. In the formula every response enters, those with A_i = 0 through their entropy term
    alone: the entropy constraint is no policy gradient, and a batch in which all groups are constant is
    just where a collapsed policy needs it. So by default they stay, their tokens count in n_tok and N, and
    the size of a step does not jump with the share of constant groups. "exclude" removes them from the
    loss, n_tok and N, which holds the size of the policy gradient per informative group instead. Either way
    they are part of `stats`, for L_b knows no advantage.

    Normalisation. With the global counts given, the losses of micro-batches and ranks add up to the loss of
    the whole batch (the trainer undoes an averaging of gradients over ranks). They count what stays in the
    loss: trained tokens, or sequences, of all micro-batches, less those of excluded groups. Without them
    this call counts as the whole batch. For the scopes other than "reply" the entropy term of response i is
    weighted like its policy gradient, n_i / n_tok or 1 / N, so that a coefficient means the same under
    every scope.

    Args:
        c: of the controller's state before this step.
        mode_mask: sampled tokens of the mode tags, for the scopes "mode" and "blend" and the metric
            entropy/mode.
        think_mask: tokens of the thinking, for the scope "think".
        constant: from `group_advantages`; required to exclude constant groups.
        n_tokens_global: trained tokens of the whole batch, for normalize "tokens".
        n_sequences_global: responses of the whole batch, for normalize "sequences".
        backend: of `autotool_kernels.policy_loss`.

    Raises:
        ValueError: an input that the settings need is missing.
    """
    n_sequences = advantages.shape[0]
    trained = mask
    kept = torch.ones_like(is_short, dtype=torch.bool)
    if settings.constant_groups == "exclude":
        kept = ~_required(constant, "constant", "constant_groups 'exclude'")
        trained = mask & kept.repeat_interleave(cu_seqlens.diff().long(), output_size=mask.shape[0])
    h = scoped_entropy(entropy, cu_seqlens, mask, settings.scope, mode_mask, think_mask)
    beta, gate_open = gated_beta(h, is_short, c)

    normalize, factor = settings.normalize, 1.0
    if normalize == "tokens" and n_tokens_global is not None:
        normalize = max(float(n_tokens_global), 1.0)
    elif normalize == "sequences":
        total = int(kept.sum()) if n_sequences_global is None else n_sequences_global
        factor = n_sequences / max(total, 1)
    in_kernel = settings.scope == "reply"
    result = policy_loss(
        logp,
        old_logp,
        entropy if in_kernel else entropy.detach(),
        advantages,
        cu_seqlens,
        trained,
        is_short,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        **(c if in_kernel else c._replace(beta_short=0.0, beta_long=0.0))._asdict(),
        normalize=normalize,
        backend=backend,
    )
    loss = result.loss * factor
    bonus = result.metrics["entropy_bonus"] * factor
    if not in_kernel:
        weight = _response_weight(h.n_tokens * kept, normalize, factor / max(n_sequences, 1))
        scoped_bonus = (weight * beta * h.mean * kept).sum()
        loss = loss - scoped_bonus.to(loss.dtype)
        bonus = scoped_bonus.detach()

    measured = {
        "loss/policy": result.metrics["policy_loss"] * factor,
        "loss/entropy": -bonus,
        "clip/low": result.metrics["clip_fraction_low"],
        "clip/high": result.metrics["clip_fraction_high"],
        "kl/old": result.metrics["approx_kl"],
        "ratio/mean": result.metrics["ratio_mean"],
        "ratio/max": result.metrics["ratio_max"],
        "tokens/trained": result.metrics["n_tokens"],
    }
    sums = _entropy_sums(h, gate_open, is_short, entropy, mask, mode_mask)
    values = torch.stack(
        [v.double() for v in (*measured.values(), *sums)]
    ).tolist()  # one read from the device
    metrics = dict(zip(measured, values[: len(measured)], strict=True))
    return Objective(loss, h.mean.detach(), EntropyStats(*values[len(measured) :]), metrics)


def capped_old_logp(logp: Tensor, sampler_logp: Tensor, cap: float) -> Tensor:
    """Old log-probs [T] that turn the ratio into a truncated importance weight of the sampler's tokens.

    With w_t = min(exp(logp_t - sampler_logp_t), cap), the ratio exp(logp_t - result_t) has the value w_t, and the
    gradient of -ratio * A is -w_t * A * grad logp_t: the policy gradient, each token weighted by w_t without gradient.
    That holds as long as no clip bites: 1 - clip_low at most 0, and clip_high some way above cap - 1.
    """
    return torch.maximum(sampler_logp, logp.detach() - math.log(cap))


def mismatch_metrics(logp: Tensor, sampler_logp: Tensor, cap: float) -> dict[str, float]:
    """How far another implementation of the policy samples from the trainer's, over tokens [T] of a micro-batch.

    mismatch/capped is the share of tokens whose importance weight was cut to `cap`; mismatch/kl the mean of
    r - 1 - log r with r = exp(logp - sampler_logp), an estimate of KL(sampler, trainer) in nats.
    """
    log_ratio = logp.detach().double() - sampler_logp.double()
    kl = (torch.expm1(log_ratio) - log_ratio).mean()
    capped = (log_ratio > math.log(cap)).double().mean()
    return {"mismatch/kl": float(kl), "mismatch/capped": float(capped)}


def merge_metrics(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step from those of its micro-batches and ranks: sums, token-weighted means, maximum."""
    tokens = sum(part["tokens/trained"] for part in parts)
    merged = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name == "ratio/max":
            merged[name] = max(values)
        elif name in ("loss/policy", "loss/entropy", "tokens/trained"):
            merged[name] = sum(values)
        else:
            weighted = (v * part["tokens/trained"] for v, part in zip(values, parts, strict=True))
            merged[name] = sum(weighted) / max(tokens, 1)
    return merged


def _response_weight(n_tokens: Tensor, normalize: str | float, per_sequence: float) -> Tensor:
    """Weight [B] float64 of a response's mean in the loss, the same that `policy_loss` gives to it."""
    if normalize == "sequences":
        return torch.full_like(n_tokens, per_sequence)
    return n_tokens / (n_tokens.sum().clamp(min=1.0) if normalize == "tokens" else normalize)


def _entropy_sums(
    h: ScopedEntropy,
    gate_open: Tensor,
    is_short: Tensor,
    entropy: Tensor,
    mask: Tensor,
    mode_mask: Tensor | None,
) -> list[Tensor]:
    """The ten numbers of `EntropyStats`, in its order, still on the device."""
    mean = h.mean.detach().double()
    sums = []
    for flag in (0, 1):
        members = (is_short == flag) & h.defined
        sums += [(mean * members).sum(), members.sum(), (members & gate_open).sum()]
    sums += [(mean * h.defined).sum(), h.defined.sum()]
    tags = torch.zeros_like(mask) if mode_mask is None else mask & mode_mask
    return [*sums, torch.where(tags, entropy.detach(), 0.0).double().sum(), tags.sum()]


def _segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums [T] over the segments into float64 [B] in a fixed order; an empty segment gives 0."""
    return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.long(), initial=0.0)


def _required(value: Tensor | None, name: str, purpose: str) -> Tensor:
    if value is None:
        raise ValueError(f"{name} is needed for {purpose}")
    return value
