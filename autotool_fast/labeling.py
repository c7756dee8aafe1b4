"""Stage 1 labels: is the short ground-truth answer or the long trace the training target of a prompt?

A prompt is sampled k times without and k times with thinking. If not thinking is good enough the label is
"short"; otherwise, if thinking succeeds at all, "long"; otherwise the prompt is dropped (or, by choice, labelled
short). Sampling, scoring and building the training text are left to others; these functions see success counts alone.

Two readings of "good enough" are offered:
- "any": one success in k (pass@k, as published). With few possible answers a guess succeeds sooner or
  later, so prompts that cannot be solved without thinking are labelled short by luck: with 5 equally likely
  answers and k = 8 that is 1 - (4/5)^8 = 83 % of them.
- "threshold": a success rate of at least `threshold`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from autotool_fast.errors import UserError

Label = Literal["short", "long", "drop"]
LabelRule = Literal["any", "threshold"]


@dataclass(frozen=True)
class Outcome:
    """Success counts of one prompt in both modes."""

    difficulty: int
    no_think_correct: int
    """Correct ones of `k` replies without thinking."""
    think_correct: int
    """Correct ones of `k` replies with thinking."""
    k: int
    """Replies sampled per mode."""


@dataclass(frozen=True)
class LabelRow:
    """Labels and success of all prompts of one difficulty, or of all of them (`difficulty` None)."""

    difficulty: int | None
    prompts: int
    short: int
    long: int
    drop: int
    no_think_accuracy: float
    """Mean success rate without thinking."""
    think_accuracy: float
    """Mean success rate with thinking."""
    no_think_pass: float
    """Share of prompts with at least one success without thinking (pass@k)."""
    think_pass: float
    """Share of prompts with at least one success with thinking (pass@k)."""

    def share(self, label: Label) -> float:
        """Share of the prompts that carry `label`."""
        return getattr(self, label) / self.prompts


def label(
    no_think_correct: int,
    think_correct: int,
    k: int,
    rule: LabelRule = "any",
    threshold: float = 0.5,
    unsolved: Label = "drop",
) -> Label:
    """The label of one prompt.

    Args:
        no_think_correct: correct ones of k replies without thinking.
        think_correct: correct ones of k replies with thinking.
        k: replies per mode.
        rule: when not thinking is good enough, see the module docstring.
        threshold: smallest success rate that the rule "threshold" accepts, in (0, 1].
        unsolved: the label of a prompt that neither mode solves.

    Raises:
        UserError: an unknown rule, or a threshold outside (0, 1].
        ValueError: counts outside 0..k.
    """
    if rule not in get_args(LabelRule):
        raise UserError(f"unknown label rule {rule!r}", where="label.rule", remedy="use any or threshold")
    if not 0 < threshold <= 1:
        raise UserError(
            f"{threshold} is outside (0, 1]", where="label.threshold", remedy="give a success rate"
        )
    if k < 1 or not 0 <= no_think_correct <= k or not 0 <= think_correct <= k:
        raise ValueError(
            f"counts {no_think_correct} and {think_correct} must be within 0..k, with k = {k} >= 1"
        )
    # A quotient, not threshold * k: 0.28 * 25 rounds to more than 7, 7 / 25 is 0.28.
    good_enough = no_think_correct > 0 if rule == "any" else no_think_correct / k >= threshold
    if good_enough:
        return "short"
    return "long" if think_correct else unsolved


def label_table(
    outcomes: Iterable[Outcome],
    rule: LabelRule = "any",
    threshold: float = 0.5,
    unsolved: Label = "drop",
) -> list[LabelRow]:
    """One row per difficulty in ascending order, then one over all prompts; empty without prompts."""
    by_difficulty: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        by_difficulty.setdefault(outcome.difficulty, []).append(outcome)
    rows = [_row(k, by_difficulty[k], rule, threshold, unsolved) for k in sorted(by_difficulty)]
    if rows:
        everything = [outcome for group in by_difficulty.values() for outcome in group]
        rows.append(_row(None, everything, rule, threshold, unsolved))
    return rows


def _row(
    difficulty: int | None, outcomes: Sequence[Outcome], rule: LabelRule, threshold: float, unsolved: Label
) -> LabelRow:
    labels = [label(o.no_think_correct, o.think_correct, o.k, rule, threshold, unsolved) for o in outcomes]
    n = len(outcomes)
    return LabelRow(
        difficulty=difficulty,
        prompts=n,
        short=labels.count("short"),
        long=labels.count("long"),
        drop=labels.count("drop"),
        no_think_accuracy=sum(o.no_think_correct / o.k for o in outcomes) / n,
        think_accuracy=sum(o.think_correct / o.k for o in outcomes) / n,
        no_think_pass=sum(o.no_think_correct > 0 for o in outcomes) / n,
        think_pass=sum(o.think_correct > 0 for o in outcomes) / n,
    )
