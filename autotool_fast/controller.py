"""The entropy coefficients of the RL stage: five arms, one state, one update per optimizer step.

With H_i the mean token entropy of response i in nats and the long responses those that think:

    L_b = mean over long i of beta_l * (H_i - H_l)
    beta_l <- clamp(beta_l - beta_lr * dL_b/dbeta_l, 0, beta_max)

The coefficients of the state before a step serve its whole accumulation window; `update` then gets the sums
over all micro-batches and ranks. Evaluation never calls `update`, nor does a skipped step. The state is a
frozen dataclass and goes into the checkpoint as `to_dict()`. The gate on H_i is part of the loss, not of the
state.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from autotool_fast.errors import UserError

Arm = Literal["none", "fixed", "adaptive", "decoupled-fixed", "decoupled"]
ARMS: tuple[Arm, ...] = get_args(Arm)


class Coefficients(NamedTuple):
    """What one step needs from the controller; the names are keyword arguments of `policy_loss`."""

    beta_short: float
    beta_long: float
    target_short: float  # nats
    target_long: float  # nats


@dataclass(frozen=True)
class EntropyStats:
    """Sums of H_i and counts of responses; `+` joins micro-batches and ranks.

    `dataclasses.astuple` gives the ten numbers for an all-reduce (sum, float64) and
    `EntropyStats(*numbers)` is the way back. Only responses for which H_i is defined are counted.
    """

    long_sum: float = 0.0
    long_count: float = 0.0
    long_open: float = 0.0
    """Long responses with H_i <= H_l."""
    short_sum: float = 0.0
    short_count: float = 0.0
    short_open: float = 0.0
    """Short responses with H_i <= H_s."""
    all_sum: float = 0.0
    """Over every response, malformed ones included."""
    all_count: float = 0.0
    mode_sum: float = 0.0
    """Entropy of the sampled mode-tag tokens (counts tokens, not responses)."""
    mode_count: float = 0.0

    def __add__(self, other: EntropyStats) -> EntropyStats:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return EntropyStats(*(a + b for a, b in pairs))

    def metrics(self) -> dict[str, float]:
        """Means in nats and shares of open gates. A set without members has no entry rather than a zero."""
        ratios = {
            "entropy/long": (self.long_sum, self.long_count),
            "entropy/short": (self.short_sum, self.short_count),
            "entropy/all": (self.all_sum, self.all_count),
            "entropy/mode": (self.mode_sum, self.mode_count),
            "gate/long": (self.long_open, self.long_count),
            "gate/short": (self.short_open, self.short_count),
        }
        return {name: total / count for name, (total, count) in ratios.items() if count}


@dataclass(frozen=True)
class EntropyController:
    """State of the entropy coefficients; `coefficients` reads it, `update` returns the next one.

    The arms:
    - "none": plain GRPO.
    - "fixed": one constant coefficient (`beta_long`) on every well-formed response, no gate.
    - "adaptive": one coefficient (`beta_long`) and one target (`target_long`) for both classes. The
      coefficient moves by `delta` towards the target on the mean over all well-formed responses, the rule of
      Skywork-OR1 and TRL. They gate the whole batch on that mean; here each response is gated on its own
      H_i, so that the arms differ in coefficients and targets alone.
    - "decoupled-fixed": constant coefficients, each class with its own gate.
    - "decoupled": the same with `beta_long` integrating L_b, the arm of the paper.
    """

    arm: Arm = "decoupled"
    beta_short: float = 0.0
    beta_long: float = 0.01
    target_short: float = 0.1
    """H_s, nats."""
    target_long: float = 0.2
    """H_l, nats."""
    beta_lr: float = 0.01
    """Change of beta_long per nat of missing entropy and step ("decoupled")."""
    beta_max: float = 0.5
    """Upper clamp of an adapted coefficient; the lower one is 0."""
    delta: float = 0.005
    """Change of the coefficient per step ("adaptive")."""

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise UserError(f"unknown arm {self.arm!r}", where="arm", remedy=f"use one of {ARMS}")
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise UserError(f"{value} must be >= 0", where=f"rl.{field.name}", remedy="change it")
        for name in ("beta_short", "beta_long"):
            if getattr(self, name) > self.beta_max:
                raise UserError("must be at most rl.beta_max", where=f"rl.{name}", remedy="lower it")

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON-able values, for a checkpoint."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> EntropyController:
        """Inverse of `to_dict`. Raises TypeError for unknown keys."""
        return EntropyController(**values)


def coefficients(controller: EntropyController) -> Coefficients:
    """Coefficients and targets of the next step; serve the whole accumulation window."""
    c = controller
    if c.arm == "none":
        return Coefficients(0.0, 0.0, c.target_short, c.target_long)
    if c.arm == "fixed":
        return Coefficients(c.beta_long, c.beta_long, math.inf, math.inf)
    if c.arm == "adaptive":
        return Coefficients(c.beta_long, c.beta_long, c.target_long, c.target_long)
    return Coefficients(c.beta_short, c.beta_long, c.target_short, c.target_long)


def update(controller: EntropyController, stats: EntropyStats) -> EntropyController:
    """The state after one optimizer step, from the sums over its whole batch on all ranks.

    "decoupled": dL_b/dbeta_l = mean over long responses of (H_i - H_l), so beta_l rises while their entropy
    is below H_l. "adaptive": one `delta` up when the mean over well-formed responses is at most the target,
    else down. Neither moves without responses to measure, both stay within [0, beta_max]; the other arms
    never move.

    Raises:
        ValueError: sums that are not finite (such a step is to be skipped).
    """
    if controller.arm == "decoupled":
        total, count = stats.long_sum, stats.long_count
    elif controller.arm == "adaptive":
        total, count = stats.long_sum + stats.short_sum, stats.long_count + stats.short_count
    else:
        return controller
    if not count:
        return controller
    missing = controller.target_long - total / count
    if not math.isfinite(missing):
        raise ValueError(f"entropy sums must be finite, got {total} over {count} responses")
    if controller.arm == "decoupled":
        step = controller.beta_lr * missing
    else:
        step = controller.delta if missing >= 0 else -controller.delta
    beta = min(max(controller.beta_long + step, 0.0), controller.beta_max)
    return dataclasses.replace(controller, beta_long=beta)


def resolve_targets(
    mode: Literal["absolute", "relative"],
    *,
    target_short: float = 0.1,
    target_long: float = 0.2,
    ratio: float = 1.0,
    measured: EntropyStats | None = None,
) -> tuple[float, float]:
    """(H_s, H_l) in nats: as given, or `ratio` times the entropies measured before the first step.

    `measured` must come from responses sampled like those of the RL stage and averaged over the same scope.
    A class that was not sampled keeps its absolute short target; without long responses a relative target
    has no meaning.

    Raises:
        UserError: relative targets without measured long responses, or an unknown mode.
    """
    if mode == "absolute":
        return target_short, target_long
    if mode != "relative":
        raise UserError(f"unknown mode {mode!r}", where="rl.target_mode", remedy="use absolute or relative")
    if measured is None or not measured.long_count:
        raise UserError(
            "no long response was sampled to measure its entropy",
            where="rl.target_mode",
            remedy="use absolute targets, or start from a model that thinks",
        )
    if measured.short_count:
        target_short = ratio * measured.short_sum / measured.short_count
    return target_short, ratio * measured.long_sum / measured.long_count
