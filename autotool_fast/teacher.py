"""Who writes the long demonstrations when it is not the base model itself: the think teacher of stage label.

A second model's folder, an OpenAI-compatible endpoint, or the reasoning that the data set brings. A teacher's replies
are text: they are written anew in the trained model's own format and tokens (`warmup.demonstrate`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from autotool_fast.chat import ParsedReply, render_reply
from autotool_fast.config import LabelConfig
from autotool_fast.errors import UserError
from autotool_fast.tasks.record import Episode, Task

if TYPE_CHECKING:
    from autotool_fast.eval.records import Policy

FROM_DATA = "data"


@dataclass(frozen=True)
class Lesson:
    """A teacher's attempts at one prompt.

    Attributes:
        correct: right ones among them.
        replies: the first right and thinking attempt, one reply a turn in the default syntax; None if there is none.
    """

    correct: int
    replies: tuple[str, ...] | None


class Teacher(Protocol):
    """Solves prompts by thinking."""

    def teach(self, tasks: Sequence[Task], on_sample: Callable[[int], None]) -> list[Lesson]:
        """One lesson for each task; `on_sample` is told how many samples (of tasks times k) are done."""


class DataTeacher:
    """The data set's own reasoning; a prompt that has none is one the teacher cannot solve."""

    def __init__(self, k: int) -> None:
        self._k = k

    def teach(self, tasks: Sequence[Task], on_sample: Callable[[int], None]) -> list[Lesson]:
        """Read from the tasks' examples."""
        lessons = [self._lesson(task) for task in tasks]
        on_sample(len(tasks) * self._k)
        return lessons

    def _lesson(self, task: Task) -> Lesson:
        replies = task.spec.get("think_replies")
        return Lesson(self._k, tuple(replies)) if replies else Lesson(0, None)


class PolicyTeacher:
    """A policy of the evaluation harness, asked k times in mode think.

    Args:
        policy: gives the policy for sample 0..k-1; they differ in their seeds.
        k: samples of each prompt.
        chunk: prompts played side by side.
    """

    def __init__(self, policy: Callable[[int], Policy], k: int, chunk: int = 64) -> None:
        self._policy, self._k, self._chunk = policy, k, chunk

    def teach(self, tasks: Sequence[Task], on_sample: Callable[[int], None]) -> list[Lesson]:
        """Play every task k times; an attempt that is malformed, cut or does not think is wrong."""
        starts = {task.id: task.start for task in tasks}
        asked = [dataclasses.replace(task, start=lambda task: _Attempt(task, starts[task.id])) for task in tasks]
        correct, replies = [0] * len(tasks), [None] * len(tasks)
        for sample in range(self._k):
            policy = self._policy(sample)
            for first in range(0, len(tasks), self._chunk):
                part = asked[first : first + self._chunk]
                for place, played in enumerate(policy.play(part, "think"), first):
                    thinks = any(reply.parsed.length_class == 0 for reply in played.replies)
                    whole = played.stop == "finished" and not any(reply.parsed.errors for reply in played.replies)
                    right = thinks and whole and played.episode.score()
                    correct[place] += right
                    if right and replies[place] is None:
                        replies[place] = tuple(_written(reply.parsed) for reply in played.replies)
                on_sample(sample * len(tasks) + first + len(part))
        return [Lesson(*lesson) for lesson in zip(correct, replies, strict=True)]


class _Attempt:
    """A training episode as the harness plays it."""

    def __init__(self, task: Task, start: Callable[[Task], Episode]) -> None:
        self.tools = list(task.tools)
        episode = start(task)
        self.step, self.score = episode.step, episode.score

    def solution(self) -> None:
        """A teacher is not told."""
        raise AssertionError("a teacher is asked, not told")


def _written(reply: ParsedReply) -> str:
    return render_reply((reply.think or "").strip("\n"), reply.calls, reply.text)


def make_teacher(config: LabelConfig, *, seed: int, max_len: int, max_new_tokens: int) -> Teacher | None:
    """The teacher that `label.teacher` names; None when the base model is its own.

    Raises:
        UserError: there is no such model, no answering server, or an endpoint without `label.teacher_model`.
    """
    name = config.teacher
    if not name:
        return None
    if name == FROM_DATA:
        return DataTeacher(config.k)
    if name.startswith(("http://", "https://")):
        from autotool_fast.eval.endpoint import Endpoint, EndpointSettings

        if not config.teacher_model:
            remedy = "give the name the server knows the model by"
            raise UserError("is missing", where="label.teacher_model", remedy=remedy)
        settings = EndpointSettings(
            name,
            config.teacher_model,
            mode_switch=config.teacher_switch,
            max_tokens=max_new_tokens,
            temperature=config.teacher_temperature,
        )
        Endpoint(settings).probe("label.teacher")
        return PolicyTeacher(lambda sample: Endpoint(dataclasses.replace(settings, seed=seed + sample)), config.k)
    if not Path(name).is_dir():
        remedy = f"give a model folder, an http address, or '{FROM_DATA}'"
        raise UserError("is no model folder", where=f"label.teacher ({name})", remedy=remedy)
    from autotool_fast.eval.engine_policy import EngineSettings, LocalEngine

    settings = EngineSettings(
        name,
        max_len=max_len,
        max_turn_tokens=max_new_tokens,
        max_new_tokens=max_new_tokens,
        temperature=config.teacher_temperature,
    )
    engine = LocalEngine(settings)

    def reseeded(sample: int) -> LocalEngine:
        engine.settings = dataclasses.replace(settings, seed=seed + sample)
        return engine

    return PolicyTeacher(reseeded, config.k)
