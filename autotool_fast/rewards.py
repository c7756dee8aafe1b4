"""The asymmetric reward of a finished trajectory, and what it implies for the choice of mode.

The reward depends on the length class (1 no-think, 0 think, -1 malformed or cut) and on correctness alone.
The decision rule that a table implies and the regret of a policy against it are here as well, because both
follow from the table. Deciding correctness is left to the task, the length class to the reply parser and the
rollout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from autotool_fast.errors import UserError


@dataclass(frozen=True)
class RewardTable:
    """Rewards per outcome.

    `format_mode` says how the format takes part:
    - "gate": a malformed or cut trajectory gets `malformed`, whatever its answer.
    - "add": a malformed or cut trajectory gets `malformed` on top of its answer's reward, taken from the
      think rows since it has no class of its own. A solved but badly closed trajectory then keeps part of its
      signal, at the price that a wrong answer costs more when malformed than under the gate.
    """

    correct_short: float = 1.0
    """Correct without thinking."""
    correct_long: float = 0.5
    """Correct after thinking."""
    wrong_long: float = -0.5
    """Wrong after thinking."""
    wrong_short: float = -1.0
    """Wrong without thinking."""
    malformed: float = -1.5
    """No mode tag, a broken block, or a trajectory that ran out of budget."""
    format_mode: Literal["gate", "add"] = "gate"
    """How the format enters: in place of the answer's reward, or added to it."""

    def __post_init__(self) -> None:
        for field in fields(self)[:5]:
            if not math.isfinite(getattr(self, field.name)):
                raise UserError("must be finite", where=f"rl.{field.name}", remedy="give a number")
        if self.format_mode not in ("gate", "add"):
            raise UserError(
                f"unknown format mode {self.format_mode!r}",
                where="rl.format_mode",
                remedy="use 'gate' or 'add'",
            )
        if self.correct_short <= self.wrong_short:
            raise UserError(
                "a correct short reply must earn more than a wrong one",
                where="rl.correct_short",
                remedy="raise it above rl.wrong_short",
            )


def reward(length_class: int, correct: bool, table: RewardTable) -> float:
    """Reward of one trajectory.

    Args:
        length_class: 1 no-think, 0 think, -1 malformed or cut by a budget.
        correct: the task's verdict.
        table: the rewards.
    """
    if length_class == 1:
        return table.correct_short if correct else table.wrong_short
    answer = table.correct_long if correct else table.wrong_long
    if length_class == 0:
        return answer
    if length_class != -1:
        raise ValueError(f"length_class must be 1, 0 or -1, got {length_class}")
    return table.malformed if table.format_mode == "gate" else answer + table.malformed


def expected_rewards(
    p_nothink: ArrayLike, p_think: ArrayLike, table: RewardTable
) -> tuple[np.ndarray, np.ndarray]:
    """Expected reward of answering without and with thinking, from the success probabilities of both modes.

    Well-formed replies are assumed. With the default table not thinking is the better choice exactly when
    p_nothink > (p_think + 0.5) / 2. Both results are float64 of the inputs' broadcast shape.
    """
    p_nothink, p_think = np.broadcast_arrays(
        np.asarray(p_nothink, np.float64), np.asarray(p_think, np.float64)
    )
    short = p_nothink * table.correct_short + (1 - p_nothink) * table.wrong_short
    long = p_think * table.correct_long + (1 - p_think) * table.wrong_long
    return short, long


def routing_regret(
    think_rate: ArrayLike,
    p_nothink: ArrayLike,
    p_think: ArrayLike,
    table: RewardTable,
    *,
    weights: ArrayLike | None = None,
) -> float:
    """Mean expected reward lost against an oracle that picks the better mode for every task.

    Args:
        think_rate: [M] share of the policy's replies that think, per task or per difficulty.
        p_nothink: [M] success probability when forced not to think.
        p_think: [M] success probability when forced to think.
        table: the rewards.
        weights: [M] weight of each entry, for instance its number of tasks; equal when absent.

    Returns:
        A number >= 0, in units of reward; 0 exactly when every entry is routed to a best mode.
    """
    short, long = expected_rewards(p_nothink, p_think, table)
    rate = np.asarray(think_rate, np.float64)
    regret = np.where(long > short, (1 - rate) * (long - short), rate * (short - long))
    return float(np.average(regret, weights=None if weights is None else np.asarray(weights, np.float64)))
