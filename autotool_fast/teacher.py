"""Who writes the long demonstrations when it is not the base model itself: the think teacher of stage label.

A second model's folder, an OpenAI-compatible endpoint, or the reasoning that the data set brings. A teacher's replies
are text: they are written anew in the trained model's own format and tokens (`warmup.demonstrate`). Errors name
`label.teacher`, whoever it is.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from autotool_fast.chat import ParsedReply, render_reply
from autotool_fast.config import LabelConfig
from autotool_fast.errors import UserError
from autotool_fast.tasks.record import Episode, Task

if TYPE_CHECKING:
    from autotool_fast.eval.records import Played, Policy

Keep = Callable[[str, Callable[[], Any]], Any]
"""Gives the JSON value of a named part, made now or kept from before; see `partial.PartialResults.part`."""

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

    def teach(self, tasks: Sequence[Task], on_sample: Callable[[int], None], keep: Keep) -> list[Lesson]:
        """One lesson for each task; `on_sample` is told how many samples (of tasks times k) are done.

        What costs time is done in parts that `keep` is given.
        """

    @property
    def notices(self) -> Sequence[str]:
        """What the user should know of the lessons, such as prompts that could not be asked."""


class DataTeacher:
    """The data set's own reasoning; a prompt that has none is one the teacher cannot solve."""

    notices = ()

    def __init__(self, k: int) -> None:
        self._k = k

    def teach(self, tasks: Sequence[Task], on_sample: Callable[[int], None], keep: Keep) -> list[Lesson]:
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
        self._lost: Counter[str] = Counter()
        self._said: list[str] = []

    def teach(self, tasks: Sequence[Task], on_sample: Callable[[int], None], keep: Keep) -> list[Lesson]:
        """Play every task k times; an attempt that is malformed, cut, refused or does not think is wrong."""
        starts = {task.id: task.start for task in tasks}
        asked = [dataclasses.replace(task, start=lambda task: _Attempt(task, starts[task.id])) for task in tasks]
        correct, replies = [0] * len(tasks), [None] * len(tasks)
        for sample in range(self._k):
            for first in range(0, len(tasks), self._chunk):
                part = asked[first : first + self._chunk]
                name = f"lesson/{sample}/{first}-{first + len(part)}"
                attempts = keep(name, lambda sample=sample, part=part: self._ask(sample, part))
                for place, attempt in enumerate(attempts, first):
                    correct[place] += attempt["right"]
                    if attempt["right"] and replies[place] is None:
                        replies[place] = tuple(attempt["replies"])
                self._lost.update(attempt["stop"] for attempt in attempts)
                on_sample(sample * len(tasks) + first + len(part))
        return [Lesson(*lesson) for lesson in zip(correct, replies, strict=True)]

    def _ask(self, sample: int, part: Sequence[Task]) -> list[dict[str, Any]]:
        """One attempt at each prompt, as JSON values."""
        policy = self._policy(sample)
        attempts = [self._judge(played) for played in policy.play(part, "think")]
        self._said += getattr(policy, "refusals", ())[:1]
        return attempts

    @staticmethod
    def _judge(played: Played) -> dict[str, Any]:
        thinks = any(reply.parsed.length_class == 0 for reply in played.replies)
        whole = played.stop == "finished" and not any(reply.parsed.errors for reply in played.replies)
        right = bool(thinks and whole and played.episode.score())
        written = [_written(reply.parsed) for reply in played.replies] if right else []
        return {"right": right, "replies": written, "stop": played.stop}

    @property
    def notices(self) -> list[str]:
        """Attempts that no reply of the teacher's decided, counted."""
        said = f", such as: {self._said[0]}" if self._said else ""
        reasons = {
            "refused": f"refused by the server{said}",
            "prompt_too_long": "their prompts are too long for the teacher",
            "max_turn_tokens": "cut at rollout.max_new_tokens",
        }
        total = sum(self._lost.values())
        return [
            f"{self._lost[stop]} of {total} samples of the teacher count as wrong, {reason}"
            for stop, reason in reasons.items()
            if self._lost[stop]
        ]


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


def make_teacher(
    config: LabelConfig, *, seed: int, max_len: int, max_new_tokens: int, device: str = "cpu"
) -> Teacher | None:
    """The teacher that `label.teacher` names; None when the base model is its own.

    Args:
        config: section `label`.
        seed: of the run; sample i is drawn with seed + i.
        max_len: tokens of an attempt in a model folder; one that takes fewer has fewer.
        max_new_tokens: tokens of one reply.
        device: where a model folder runs.

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

        def seeded(sample: int) -> Endpoint:
            own = dataclasses.replace(settings, seed=seed + sample)
            return Endpoint(own, where="label.teacher", model_option="label.teacher_model")

        seeded(0).probe()
        return PolicyTeacher(seeded, config.k)
    if not Path(name).is_dir():
        remedy = f"give a model folder, an http address, or '{FROM_DATA}'"
        raise UserError("is no model folder", where=f"label.teacher ({name})", remedy=remedy)
    from autotool_fast.eval.engine_policy import EngineSettings, LocalEngine

    settings = EngineSettings(
        name,
        max_len=max_len,
        shorten=True,
        device=device,
        max_turn_tokens=max_new_tokens,
        max_new_tokens=max_new_tokens,
        temperature=config.teacher_temperature,
    )
    engine = LocalEngine(settings, where="label.teacher", format_option=None)

    def reseeded(sample: int) -> LocalEngine:
        engine.settings = dataclasses.replace(settings, seed=seed + sample)
        return engine

    return PolicyTeacher(reseeded, config.k)
