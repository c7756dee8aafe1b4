"""The embedded tool world as a benchmark: held-out tasks of every family and difficulty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from autotool_fast.chat import ParsedReply, parse_reply
from autotool_fast.eval.bfcl import expand
from autotool_fast.eval.records import Solution, Verdict
from autotool_fast.tasks import rendering
from autotool_fast.tasks.families import FAMILIES
from autotool_fast.tasks.record import Task
from autotool_fast.tasks.world import World, WorldEpisode


class Embedded:
    """The world's test split.

    Args:
        categories: families; empty means all.
        style: rendering, "compact" or "natural".
        per_cell: tasks of each family and difficulty.
    """

    name = "world"
    quiet = frozenset({"irrelevant"})

    def __init__(self, categories: Sequence[str] = (), *, style: str = "compact", per_cell: int = 8) -> None:
        self.categories = expand(categories, tuple(FAMILIES), {})
        self._style, self._per_cell = style, per_cell

    def config(self) -> dict[str, Any]:
        """What the tasks depend on."""
        chosen = {"categories": list(self.categories), "rendering": self._style, "per_cell": self._per_cell}
        return {"benchmark": self.name, **chosen}

    def tasks(self, limit: int | None = None) -> list[Task]:
        """The grid of held-out tasks."""
        tasks = World(self.categories, rendering=self._style).grid(self._per_cell, "test", "eval")
        counts: dict[str, int] = {}
        kept = []
        for task in tasks:
            counts[task.family] = counts.get(task.family, 0) + 1
            if limit is None or counts[task.family] <= limit:
                kept.append(replace(task, start=EmbeddedEpisode))
        return kept

    def aggregates(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """None of its own."""
        return []

    def close(self) -> None:
        """Nothing to end."""


class EmbeddedEpisode:
    """A world episode with the perfect solver's replies."""

    def __init__(self, task: Task) -> None:
        self._episode = WorldEpisode(task)
        self._solutions = [parse_reply(text) for text in rendering.solution(task, think=False)]
        self._turn = 0
        self.tools = list(task.tools)

    def step(self, reply: ParsedReply) -> list[dict] | None:
        """See `world.WorldEpisode`."""
        self._turn += 1
        return self._episode.step(reply)

    def score(self) -> bool:
        """See `world.WorldEpisode`."""
        return self._episode.score()

    def solution(self) -> Solution:
        """The solver's reply of this turn."""
        reply = self._solutions[min(self._turn, len(self._solutions) - 1)]
        return Solution(reply.calls, reply.text)

    def verdict(self) -> Verdict:
        """Solved or not; there is no second reading."""
        solved = self._turn > 0 and self._episode.score()
        return Verdict(solved, solved, None if solved else "not_solved")

    def record(self) -> dict[str, Any]:
        """Nothing beyond the row."""
        return {}

    def close(self) -> None:
        """Nothing to give back."""
