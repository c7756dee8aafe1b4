"""Refinement of the RL prompts: fewer trivial ones, then those with a steady reward.

Two steps, on figures from several short GRPO rounds over the whole pool:
1. Of the prompts solved by every sample (too easy) and by none (too hard), a share is dropped at random.
2. Of what is left, the share with the lowest reward variance is kept, where for a prompt with mean reward
   r_i in round i of n, `Var(r) = 1/(n-1) sum_i (r_i - mean)^2`.

The variance is over rounds, not inside one group: it measures how far a prompt's mean reward moves while
the policy trains, by learning or by sampling noise (at least the variance inside a group divided by its
size). A prompt whose groups are constant has variance zero although it teaches nothing, so a plain ranking
keeps every constant prompt that survived step 1 and pays with informative ones. `rank="all"` is that plain
ranking; `rank="informative"` leaves the surviving too easy and too hard prompts in, outside of the ranking,
and applies the share to the others.

Pure functions of arrays; collecting rewards and choosing the pool are left to others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from autotool_fast.errors import UserError

Rank = Literal["all", "informative"]


@dataclass(frozen=True)
class Refinement:
    """What is kept, and why the rest is not."""

    kept: np.ndarray
    """[K] int64, ascending indices into the pool."""
    report: dict[str, Any]
    """JSON-able: `pool`, `kept`, `dropped_too_easy`, `dropped_too_hard`, `dropped_variance`,
    `kept_constant` (kept prompts whose reward never moved), `variance_limit` (largest kept, null if nothing
    is), and `by_difficulty`, the same counts per difficulty."""


def reward_variance(rewards: ArrayLike) -> np.ndarray:
    """Unbiased variance over rounds, [P] float64, of `rewards` [P, R] (mean reward per prompt and round).

    Raises:
        UserError: fewer than two rounds.
        ValueError: not a matrix, or a value that is not finite.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 2 or not np.isfinite(rewards).all():
        raise ValueError(f"rewards must be a finite [prompts, rounds] matrix, got shape {rewards.shape}")
    if rewards.shape[1] < 2:
        raise UserError(
            "a variance over rounds needs at least two rounds", where="refine.rounds", remedy="raise it"
        )
    moved = rewards.max(axis=1) > rewards.min(axis=1)
    return np.where(moved, rewards.var(axis=1, ddof=1), 0.0)


def refine(
    rewards: ArrayLike,
    success: ArrayLike,
    difficulty: ArrayLike | None = None,
    *,
    seed: int,
    drop_easy: float = 0.5,
    drop_hard: float = 0.5,
    keep: float = 0.5,
    rank: Rank = "all",
) -> Refinement:
    """Chooses the prompts for RL; the same arguments give the same choice.

    Args:
        rewards: [P, R] mean reward of each prompt's group in each round.
        success: [P] mean success over all samples and rounds; exactly 1 is too easy, exactly 0 too hard.
        difficulty: [P] ints for the report; left out of it when absent.
        seed: decides which too easy and too hard prompts go, and the order among equal variances.
        drop_easy: share of the too easy prompts dropped, rounded down to whole prompts.
        drop_hard: share of the too hard prompts dropped, likewise.
        keep: share of the ranked prompts kept, rounded up.
        rank: what the variance ranking covers, see the module docstring.

    Raises:
        UserError: an option out of range, or fewer than two rounds.
        ValueError: arrays that do not fit together.
    """
    for name, value in (("drop_easy", drop_easy), ("drop_hard", drop_hard), ("keep", keep)):
        if not 0 <= value <= 1:
            raise UserError(f"{value} is outside [0, 1]", where=f"refine.{name}", remedy="give a share")
    if rank not in get_args(Rank):
        raise UserError(f"unknown {rank!r}", where="refine.rank", remedy="use 'all' or 'informative'")
    variance = reward_variance(rewards)
    success = np.asarray(success, dtype=np.float64)
    n = len(variance)
    if success.shape != (n,) or not ((success >= 0) & (success <= 1)).all():
        raise ValueError(f"success must be {n} rates within [0, 1]")

    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(n)
    too_easy, too_hard = success == 1, success == 0
    drop_reason = np.full(n, "", dtype="<U8")
    for reason, extreme, share in (("too_easy", too_easy, drop_easy), ("too_hard", too_hard, drop_hard)):
        members = shuffled[extreme[shuffled]]
        drop_reason[members[: _down(share * len(members))]] = reason

    ranked = drop_reason == ""
    if rank == "informative":
        ranked &= ~too_easy & ~too_hard
    # Sorting the shuffled order keeps the pool's order (often by family) from deciding between equal
    # variances.
    order = shuffled[ranked[shuffled]]
    order = order[np.argsort(variance[order], kind="stable")]
    drop_reason[order[_up(keep * len(order)) :]] = "variance"

    kept = np.flatnonzero(drop_reason == "")
    report = _counts(drop_reason, variance)
    report["variance_limit"] = float(variance[kept].max()) if len(kept) else None
    if difficulty is not None:
        difficulty = np.asarray(difficulty)
        if difficulty.shape != (n,):
            raise ValueError(f"difficulty must have {n} entries")
        report["by_difficulty"] = {
            str(k): _counts(drop_reason[difficulty == k], variance[difficulty == k])
            for k in np.unique(difficulty)
        }
    return Refinement(kept, report)


def _down(amount: float) -> int:
    # 0.29 * 100 is a little less than 29 in float.
    return math.floor(amount + 1e-9)


def _up(amount: float) -> int:
    return math.ceil(amount - 1e-9)


def _counts(drop_reason: np.ndarray, variance: np.ndarray) -> dict[str, Any]:
    counts: dict[str, Any] = {"pool": len(drop_reason), "kept": int((drop_reason == "").sum())}
    for reason in ("too_easy", "too_hard", "variance"):
        counts[f"dropped_{reason}"] = int((drop_reason == reason).sum())
    counts["kept_constant"] = int(((drop_reason == "") & (variance == 0)).sum())
    return counts
