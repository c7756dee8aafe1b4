"""Where a run's tasks come from: the embedded world, or prepared data. Simulators are in `environment`.

Each gives training prompts by purpose, a held-out grid, the share of each (family, difficulty) cell in the mix, and the
reference replies that a short demonstration shows. The same arguments give the same tasks, whatever was asked before.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from autotool_fast.chat import ToolCall
from autotool_fast.config import WorldConfig
from autotool_fast.errors import UserError
from autotool_fast.evaluate import Cell, cell_weights
from autotool_fast.tasks.example import Example, read_examples, to_task
from autotool_fast.tasks.record import Task
from autotool_fast.tasks.rendering import solution
from autotool_fast.tasks.world import World

PARTS = {"label": "sft", "rl": "rl"}
"""Purpose of training prompts -> the part of prepared data that serves it."""


class Problems(Protocol):
    """A source of tasks."""

    weights: dict[Cell, float]
    """Share of each (family, difficulty) in the mix; sums to 1."""
    notices: Sequence[str]
    """What the user should know of them, such as examples left out."""

    def training(self, count: int, purpose: str) -> list[Task]:
        """Up to `count` training prompts for a purpose, "label" or "rl"."""

    def held_out(self, per_cell: int, purpose: str) -> list[Task]:
        """Up to `per_cell` test tasks of every cell."""

    def answer(self, task: Task) -> list[str]:
        """The reference replies without thinking, one per turn."""

    def close(self) -> None:
        """Give back what the tasks hold."""


class WorldProblems:
    """Tasks drawn from the embedded world.

    Args:
        config: which tasks.
        seed: of the run.
        rendering: "compact" for the embedded model, "natural" for one that knows English.
    """

    notices = ()

    def __init__(self, config: WorldConfig, seed: int, rendering: str = "compact") -> None:
        self.world = World(config.families, config.max_difficulty, rendering)
        self.weights = cell_weights(self.world, config.easy_share)
        self._easy_share, self._seed = config.easy_share, seed

    def training(self, count: int, purpose: str) -> list[Task]:
        """`count` prompts of the training split."""
        return list(self.world.draw(count, "train", f"{self._seed}/{purpose}", self._easy_share))

    def held_out(self, per_cell: int, purpose: str) -> list[Task]:
        """`per_cell` tasks of the test split for every cell."""
        return self.world.grid(per_cell, "test", f"{self._seed}/{purpose}")

    def answer(self, task: Task) -> list[str]:
        """The solution's replies."""
        return solution(task, think=False)

    def close(self) -> None:
        """Nothing to give back."""


class DataProblems:
    """Examples of a folder that `python -m autotool_fast.data prepare` wrote.

    A task's family is its source and kind (such as toolace/call), its difficulty the number of calls beyond the first.
    Turns that only report results cannot be judged and are left out; so are prompts that cannot be used, and training
    examples whose reply cannot be written.

    Args:
        folder: holds sft.jsonl, rl.jsonl and test.jsonl.
        seed: of the run; orders the prompts.
        unusable: why a task's prompt cannot be used, or None.
        unwritable: why a reply of calls and text cannot be written in the model's format, or None. Held-out tasks are
            kept: a model that cannot write the answer is wrong.
        strict: tell 3 from 3.0 in arguments.

    Attributes:
        left_out: part -> reason -> number of examples.

    Raises:
        UserError: the folder holds no prepared data, or a part has no usable example.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        unusable: Callable[[Task], str | None],
        unwritable: Callable[[Sequence[ToolCall], str], str | None],
        strict: bool = False,
    ) -> None:
        self._seed, self._strict = seed, strict
        self._unusable, self._unwritable = unusable, unwritable
        self.left_out: dict[str, Counter[str]] = {}
        self._parts = {part: self._read(folder, part) for part in ("sft", "rl", "test")}
        self.notices = tuple(
            f"data: {count} examples of {part}.jsonl left out, {reason}"
            for part, reasons in self.left_out.items()
            for reason, count in reasons.items()
        )
        counts = Counter((task.family, task.difficulty) for tasks in self._parts.values() for task in tasks)
        total = sum(counts.values())
        self.weights = {cell: count / total for cell, count in sorted(counts.items())}

    def _read(self, folder: Path, part: str) -> list[Task]:
        path = folder / f"{part}.jsonl"
        if not path.is_file():
            remedy = "write the folder with python -m autotool_fast.data prepare"
            raise UserError(f"holds no {path.name}", where=f"data.path ({folder})", remedy=remedy)
        left_out = self.left_out[part] = Counter()
        tasks = []
        for example in read_examples(path):
            reason, task = self._use(example, trained=part != "test")
            if reason is None:
                tasks.append(task)
            else:
                left_out[reason] += 1
        if not tasks:
            why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "the file is empty"
            remedy = "prepare more data" + (", or raise model.max_positions" if left_out else "")
            raise UserError(f"no example can be used ({why})", where=str(path), remedy=remedy)
        return tasks

    def _use(self, example: Example, *, trained: bool) -> tuple[str | None, Task | None]:
        """An example as (None, task), or (why it is left out, None)."""
        if example.kind == "summary":
            return "reports results, nothing to judge", None
        if trained and (reason := self._unwritable(example.answer, example.text)):
            return reason, None
        task = _as_task(example, self._strict)
        reason = self._unusable(task)
        return reason, None if reason else task

    def training(self, count: int, purpose: str) -> list[Task]:
        """The first `count` examples of the purpose's part, or all, in an order that the seed decides."""
        tasks = self._parts[PARTS[purpose]]
        order = np.random.default_rng([self._seed, len(tasks)]).permutation(len(tasks))
        return [tasks[i] for i in order[:count]]

    def held_out(self, per_cell: int, purpose: str) -> list[Task]:
        """The first `per_cell` test examples of every cell; the same for every purpose."""
        return per_cell_first(self._parts["test"], per_cell)

    def answer(self, task: Task) -> list[str]:
        """The data set's reply."""
        return [task.spec["reply"]]

    def close(self) -> None:
        """Nothing to give back."""


def per_cell_first(tasks: Iterable[Task], per_cell: int) -> list[Task]:
    """The first `per_cell` tasks of every (family, difficulty), cells in order."""
    cells = defaultdict(list)
    for task in tasks:
        cells[task.family, task.difficulty].append(task)
    return [task for cell in sorted(cells) for task in cells[cell][:per_cell]]


def _as_task(example: Example, strict: bool) -> Task:
    task = to_task(example, strict=strict)
    family = f"{example.source}/{example.kind}"
    spec = {**task.spec, "think_replies": [example.reply(think=True)] if example.think else None}
    return dataclasses.replace(task, family=family, difficulty=max(0, len(example.answer) - 1), spec=spec)
