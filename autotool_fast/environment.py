"""Environments to train in: RL prompts and held-out tasks whose episodes run code, alone or beside prepared data.

`Mixed` is what they have in common, `SimulatorProblems` BFCL's multi-turn entries, or one's own of their form; a user's
tools are in `own_tools`.

Entries come from a folder of the layout of `bfcl-eval`. Those that share a user's message or a state to begin with are
on one side of the split, which a hash of their content decides: nothing that is trained on is evaluated, whatever the
seed.

An episode has simulators of its own, in a process that starts with its first call and is closed with the episode. One
whose simulators pass the deadline of a call or crash is over and wrong; such episodes are counted and reported, and
nothing else suffers. Calls run in threads, so that the rollout goes on meanwhile.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from autotool_fast.chat import ParsedReply
from autotool_fast.config import EnvironmentConfig
from autotool_fast.errors import UserError
from autotool_fast.eval.bfcl import Bfcl, MultiTurn
from autotool_fast.evaluate import Cell
from autotool_fast.problems import DataProblems, per_cell_first
from autotool_fast.tasks.record import Task, Wait

OPTION = "--environment.path"
_COMMON = 8
"""A message that more tasks hold is a phrase ("Thanks."), such a state a default; variants of one entry are fewer."""


class Mixed:
    """Tasks of an environment, alone or beside prepared data.

    Label prompts and their answers are the data's; RL prompts are mixed by `config.share`; both are held out.

    Args:
        config: how large the shares are.
        seed: of the run; orders the prompts.
        data: prepared data, if the run has any.
        warn: told about lost episodes.
        slots: episodes that run side by side, so that one's call does not wait for another's.

    Attributes:
        lost: reason -> number of episodes that lost their environment.
    """

    notices: Sequence[str]
    weights: Mapping[Cell, float]
    lost_what = "their simulators"

    def __init__(
        self,
        config: EnvironmentConfig,
        seed: int,
        *,
        data: DataProblems | None,
        warn: Callable[[str], None],
        slots: int,
    ) -> None:
        self._config, self._seed, self._data, self._warn = config, seed, data, warn
        self._share = config.share if data else 1.0
        self._parts: dict[str, list[Task]] = {"train": [], "test": []}
        self.lost: Counter[str] = Counter()
        self._told = 0.0
        self.pool = ThreadPoolExecutor(slots, thread_name_prefix="calls")

    def _use(self, left_out: Counter[str]) -> None:
        """Take the tasks in `_parts` into use, once they are there.

        Raises:
            UserError: a side of the split has no task.
        """
        for split, tasks in self._parts.items():
            if not tasks:
                why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none left out"
                remedy = "give more entries, or change environment.test_share, model.max_positions, rollout.max_turns"
                raise UserError(f"the {split} split has no usable entry ({why})", where="environment", remedy=remedy)
        self.notices = (
            *(self._data.notices if self._data else ()),
            *(f"environment: {count} entries left out, {reason}" for reason, count in left_out.items()),
        )
        counts = Counter((task.family, task.difficulty) for tasks in self._parts.values() for task in tasks)
        weights = {cell: self._share * count / counts.total() for cell, count in sorted(counts.items())}
        rest = self._data.weights if self._data else {}
        self.weights = weights | {cell: (1 - self._share) * weight for cell, weight in rest.items()}

    def report(self, reason: str, task: Task, words: str = "") -> None:
        """Count a lost episode, and tell of it now and then."""
        self.lost[reason] += 1
        total = self.lost.total()
        if total & (total - 1) == 0:  # 1, 2, 4, ...: seen at once, without flooding the progress
            self._warn(f"environment: {self.lost_text()}; the last one of {task.id}{f': {words}' if words else ''}")

    def waited(self, idle_s: float, waits: Sequence[Wait]) -> None:
        """Say which tools a rollout is waiting for, after `environment.slow_call_s` and whenever that has doubled."""
        if idle_s < self._told:
            self._told = 0.0
        if idle_s < max(self._config.slow_call_s, 2 * self._told):
            return
        self._told = idle_s
        slowest = sorted(waits, key=lambda wait: -wait.seconds)
        shown = "; ".join(f"{w.task_id}: {', '.join(w.tools) or 'score'} ({w.seconds:.0f} s)" for w in slowest[:5])
        more = f" and {len(slowest) - 5} more" if len(slowest) > 5 else ""
        self._warn(f"environment: nothing to do for {idle_s:.0f} s but wait for {shown}{more}")

    def lost_text(self) -> str:
        """How many episodes lost their environment, by reason."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.lost.items()))
        return f"{self.lost.total()} episodes lost {self.lost_what} and count as wrong ({reasons or 'none'})"

    def training(self, count: int, purpose: str) -> list[Task]:
        """Up to `count` prompts: for "rl" a mix, for "label" the data's.

        Where one source has too few, the other one's number stays what its share is.
        """
        if purpose != "rl":
            assert self._data is not None, "the settings refuse to label an environment's tasks"
            return self._data.training(count, purpose)
        wanted = round(count * self._share)
        tasks = self._parts["train"]
        order = np.random.default_rng([self._seed, len(tasks)]).permutation(len(tasks))
        mine = [tasks[i] for i in order[:wanted]]
        return mine + (self._data.training(count - wanted, purpose) if self._data and count > wanted else [])

    def held_out(self, per_cell: int, purpose: str) -> list[Task]:
        """The first `per_cell` held-out tasks of every cell, the data's after the environment's."""
        mine = per_cell_first(self._parts["test"], per_cell)
        return mine + (self._data.held_out(per_cell, purpose) if self._data else [])

    def answer(self, task: Task) -> list[str]:
        """The data set's reply."""
        assert self._data is not None, "the settings refuse to label an environment's tasks"
        return self._data.answer(task)

    def close(self) -> None:
        """Say how many episodes were lost."""
        if self.lost:
            self._warn(f"environment: {self.lost_text()}")
        self.pool.shutdown(wait=False, cancel_futures=True)


class SimulatorProblems(Mixed):
    """Tasks on simulators.

    A task's family is bfcl/<category>, its difficulty the number of user turns beyond the first.

    Args:
        config: which entries.
        unusable: why a task's prompt cannot be used, or None.
        max_turns: replies of an episode; entries that cannot be solved with so many are left out.
        options: of `Mixed`.

    Raises:
        UserError: the package or its data cannot be loaded, or a side of the split has no usable task.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        seed: int,
        *,
        unusable: Callable[[Task], str | None],
        max_turns: int,
        **options: Any,
    ) -> None:
        super().__init__(config, seed, **options)
        folder = Path(config.path) if config.path else None
        self._benchmark = Bfcl(folder, config.categories, deadline_s=config.call_deadline_s, option=OPTION)
        try:
            tasks = self._benchmark.tasks()
            held_out = held_out_ids(tasks, config.test_share)
            left_out: Counter[str] = Counter()
            for task in tasks:
                turns = "more turns than rollout.max_turns" if replies_needed(task) > max_turns else None
                if reason := turns or unusable(task):
                    left_out[reason] += 1
                    continue
                split = "test" if task.id in held_out else "train"
                self._parts[split].append(self._prepared(task, split))
            self._use(left_out)
        except BaseException:
            self.close()
            raise

    def _prepared(self, task: Task, split: str) -> Task:
        return dataclasses.replace(
            task,
            family=f"bfcl/{task.family}",
            difficulty=len(task.spec["entry"]["question"]) - 1,
            split=split,
            start=lambda _: Attempt(task, self._benchmark, self),
        )

    def close(self) -> None:
        """End every simulator, and say how many episodes were lost."""
        super().close()
        self._benchmark.close()


class Attempt:
    """One training episode: ends, wrong, when its simulators are gone."""

    def __init__(self, task: Task, benchmark: Bfcl, problems: Mixed) -> None:
        self._task, self._problems = task, problems
        self._episode = MultiTurn(task, benchmark.host)
        self._reported = False

    def begin(self, reply: ParsedReply) -> Future[list[dict] | None]:
        """`step` in a thread; what ends the episode is judged there as well."""

        def work() -> list[dict] | None:
            following = self.step(reply)
            if following is None:
                self.close()  # the checker has simulators of its own
                self._episode.verdict()
            return following

        return self._problems.pool.submit(work)

    def waited(self, idle_s: float, waits: Sequence[Wait]) -> None:
        """Told when a rollout has nothing to do but wait for simulators; see `Mixed.waited`."""
        self._problems.waited(idle_s, waits)

    def step(self, reply: ParsedReply) -> list[dict] | None:
        """Run the calls; a reply without calls ends the user's turn."""
        following = self._episode.step(reply)
        if self._episode.lost is None:
            return following
        return None

    def score(self) -> bool:
        """BFCL's verdict."""
        verdict = self._episode.verdict()
        lost = self._episode.lost or ("checker_failed" if verdict.reason == "checker_failed" else None)
        if lost and not self._reported:
            self._reported = True
            self._problems.report(lost, self._task)
        return verdict.correct

    def close(self) -> None:
        """End the simulators' process."""
        self._episode.close()


def replies_needed(task: Task) -> int:
    """The fewest replies that can solve a task: one ends a user's turn, one more makes the calls if any are wanted."""
    return sum(2 if calls else 1 for calls in task.spec["answer"])


def held_out_ids(tasks: Sequence[Task], share: float) -> frozenset[str]:
    """Ids of the tasks that are held out: about `share` of the groups of tasks that have something in common."""
    holders: dict[str, list[str]] = defaultdict(list)
    for task in tasks:
        for trait in _traits(task):
            holders[trait].append(task.id)
    leader = {task.id: task.id for task in tasks}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    for names in holders.values():
        if len(names) <= _COMMON:
            for name in names[1:]:
                leader[find(name)] = find(names[0])
    digests: dict[str, bytes] = {}
    for task in tasks:
        group, mine = find(task.id), _digest(task)
        digests[group] = min(digests.get(group, mine), mine)
    return frozenset(task.id for task in tasks if _unit(digests[find(task.id)]) < share)


def _traits(task: Task) -> set[str]:
    """What variants of a task share: things the user says, case and white space aside, and the state to begin with."""
    entry = task.spec["entry"]
    said = (m["content"] for turn in entry["question"] for m in turn if m["role"] == "user")
    state = json.dumps([entry["initial_config"], entry["involved_classes"]], sort_keys=True)
    return {state, *(" ".join(text.casefold().split()) for text in said)}


def _digest(task: Task) -> bytes:
    """A hash of what the task asks, in which state of which simulators; its id has no part in it."""
    entry = task.spec["entry"]
    content = [entry["question"], entry["initial_config"], entry["involved_classes"]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def _unit(digest: bytes) -> float:
    """A number in [0, 1) out of a group's least digest, hashed once more: the least of many is small."""
    return int.from_bytes(hashlib.sha256(digest).digest()[:8], "big") / 2**64
