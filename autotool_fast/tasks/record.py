"""The task record: one problem, whatever it came from.

A `Task` is plain data (it can be written as JSON); `Task.episode()` gives a fresh, stateful episode that executes the
reply's calls and judges the end. Sources of tasks live beside this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from autotool_fast.chat import ParsedReply


class Episode(Protocol):
    """One attempt at a task.

    One that holds more than memory (a process, say) also has `close`, see `close_episode`. One whose calls take time
    also has `begin`, which a rollout prefers to `step`: it starts the same work elsewhere and returns a
    `concurrent.futures.Future` of the messages, so that other episodes go on; and it may have
    `waited(idle_s, waits)`, which is told how long, and for what, a rollout has done nothing but wait.
    """

    def step(self, reply: ParsedReply) -> list[dict] | None:
        """Execute a well-formed reply. Returns the messages to append, or None when the episode is over."""

    def score(self) -> bool:
        """Whether the task is solved."""


@dataclass(frozen=True)
class Wait:
    """Calls under way: of which task, to which tools, for how many seconds."""

    task_id: str
    tools: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Task:
    """One problem.

    Attributes:
        id: unique and stable.
        family: kind of problem.
        difficulty: number of serial steps a solution needs; 0 means it can be read off the prompt.
        tools: JSON-schema descriptions, in the order shown to the model.
        messages: the first messages, user messages mostly.
        spec: what the source needs to rebuild and judge the problem.
        split: "train" or "test".
        start: makes a fresh episode.
    """

    id: str
    family: str
    difficulty: int
    tools: tuple[dict, ...]
    messages: tuple[dict, ...]
    spec: dict[str, Any]
    split: str
    start: Callable[[Task], Episode] = field(repr=False, compare=False)

    def episode(self) -> Episode:
        """A fresh attempt."""
        return self.start(self)


def close_episode(episode: Episode) -> None:
    """Give back what an episode holds, if it has `close`; calling it again does nothing."""
    close = getattr(episode, "close", None)
    if close is not None:
        close()
