"""Rollouts dealt to the ranks of a job: each plays whole groups, and every rank gets all trajectories.

Seeds follow a group's place among all tasks, so what is sampled does not depend on the number of ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from autotool_fast import distributed
from autotool_fast.rollout.driver import Engine, rollout
from autotool_fast.rollout.records import Trajectory
from autotool_fast.tasks.record import Task


def rollout_over_ranks(
    engine: Engine,
    tasks: Sequence[Task],
    *,
    group_size: int,
    groups: Sequence[int] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[Trajectory]:
    """`rollout` of all tasks, with its arguments and results.

    Args:
        on_progress: told of all episodes, as far as this rank's share lets it guess.

    Raises:
        Interrupted: on every rank, when `on_progress` raises it on any.
        UserError: see `rollout`.
    """
    if distributed.world() == 1:
        return rollout(engine, tasks, group_size=group_size, groups=groups, on_progress=on_progress, **options)
    numbers = range(len(tasks)) if groups is None else groups
    total = len(tasks) * group_size

    def report(done: int, share: int) -> None:
        if on_progress is not None:
            on_progress(done * total // share, total)

    def play(mine: Sequence[int]) -> list[list[Trajectory]]:
        share = [tasks[i] for i in mine]
        mine = [numbers[i] for i in mine]
        played = rollout(engine, share, group_size=group_size, groups=mine, on_progress=report, **options)
        bare = [dataclasses.replace(t, task=None) for t in played]  # tasks hold functions, which do not travel
        return [bare[i : i + group_size] for i in range(0, len(bare), group_size)]

    played = distributed.spread(len(tasks), play)
    return [
        dataclasses.replace(t, task=task, group=number)
        for number, (task, group) in enumerate(zip(tasks, played, strict=True))
        for t in group
    ]
