"""What the parts of the harness hand to each other.

A benchmark makes tasks (`tasks.record.Task`, family = category); a task starts an `EvalEpisode`, which any rollout
driver can play; a policy plays tasks and gives back one `Played` each; the verdict is the benchmark's own.

A malformed reply ends an episode for every policy, unless the episode has `malformed(reply)`, which says as `step` does
what follows. What was done is judged as the benchmark judges it (a malformed reply made no call), and the row says
that a reply was malformed. An episode whose last reply was cut at a token budget is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from autotool_fast.chat import ParsedReply, ToolCall
from autotool_fast.tasks.record import Task

MODES = ("auto", "think", "no_think")
PROMPT_TOO_LONG, REFUSED = "prompt_too_long", "refused"
"""Reasons to stop beside `rollout.records.StopReason`: no room for a reply; a server that will not take the request."""


@dataclass(frozen=True)
class Verdict:
    """How an episode ended.

    Attributes:
        correct: by the benchmark's own rule.
        strict: by the harsher reading that the adapter documents; never True where `correct` is False.
        reason: a short, stable kind of failure; None when correct.
        details: figures of the benchmark's own, JSON values.
    """

    correct: bool
    strict: bool
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Solution:
    """What a perfect policy answers now."""

    calls: tuple[ToolCall, ...] = ()
    text: str = ""


class EvalEpisode(Protocol):
    """One attempt at a benchmark's task; `step` and `score` are those of `tasks.record.Episode`."""

    tools: list[dict]
    """The tools offered now, in the form chat templates take."""

    def step(self, reply: ParsedReply) -> list[dict] | None:
        """Execute a well-formed reply; the messages that follow it, or None when the episode is over."""

    def score(self) -> bool:
        """Whether the task is solved."""

    def solution(self) -> Solution:
        """What the ground truth would reply at this point."""

    def verdict(self) -> Verdict:
        """Judge what has been done so far."""

    def record(self) -> dict[str, Any]:
        """What an exporter needs of this attempt, JSON values."""

    def close(self) -> None:
        """Give back what the episode holds."""


@dataclass(frozen=True)
class Request:
    """One turn to play: the conversation so far and the tools offered.

    Assistant messages of the history are as `call_message` makes them; the tool messages after one answer its calls in
    order.
    """

    messages: Sequence[dict]
    tools: Sequence[dict]
    solve: Callable[[], Solution]


@dataclass(frozen=True)
class Reply:
    """A policy's answer to one turn.

    Token counts are None where the policy does not know them. `stop` is why the episode ends here although the reply
    does not say so: it was cut at its budget, or there is none because the request was refused.
    """

    parsed: ParsedReply
    text: str
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    think_tokens: int | None = None
    stop: str | None = None


@dataclass(frozen=True)
class Played:
    """One episode that is over. `stop` is a `rollout.records.StopReason` value, `PROMPT_TOO_LONG` or `REFUSED`."""

    task: Task
    episode: EvalEpisode
    replies: Sequence[Reply]
    stop: str
    seconds: float


class Benchmark(Protocol):
    """A source of tasks."""

    name: str
    quiet: frozenset[str]
    """Categories where doing nothing is right."""

    def config(self) -> dict[str, Any]:
        """What the results depend on: version, categories, rules."""

    def tasks(self, limit: int | None = None) -> list[Task]:
        """All tasks, in an order that never changes; at most `limit` of each category."""

    def aggregates(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The benchmark's own summary figures of one mode's rows, made with `weighted`."""

    def close(self) -> None:
        """End the processes it holds."""


class Policy(Protocol):
    """Who plays."""

    name: str

    def config(self) -> dict[str, Any]:
        """What its replies depend on, secrets left out."""

    @property
    def parameters(self) -> int | None:
        """Of the model, for ACU; None if unknown."""

    def play(self, tasks: Sequence[Task], mode: str) -> list[Played]:
        """One episode of each task, in order."""


def call_message(content: str, calls: Iterable[ToolCall]) -> dict[str, Any]:
    """An assistant message with calls, in the form chat templates take."""
    made = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    return {"role": "assistant", "content": content, **({"tool_calls": made} if made else {})}


def accuracies(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
    """Accuracy in 0..1 and number of rows by category, in the rows' order."""
    counts: dict[str, int] = {}
    right: dict[str, int] = {}
    for row in rows:
        counts[row["category"]] = counts.get(row["category"], 0) + 1
        right[row["category"]] = right.get(row["category"], 0) + bool(row["correct"])
    return {name: right[name] / count for name, count in counts.items()}, counts


def mean(parts: Iterable[float | None]) -> float | None:
    """Mean of the parts; None when one is missing or there are none."""
    values = list(parts)
    return None if None in values or not values else sum(values) / len(values)


def weighted(name: str, parts: Mapping[str, float | None], weights: Mapping[str, float]) -> dict[str, Any]:
    """A summary row `{name, value, of, parts, not_run}` of values in 0..1.

    `value` is the sum of weight times value over the parts that were run, `of` the sum of their weights: 0.55 of 0.6
    says that parts with 40 % of the weight were not run. Nothing is rescaled.
    """
    run = {part: value for part, value in parts.items() if value is not None}
    return {
        "name": name,
        "value": sum(weights[part] * value for part, value in run.items()),
        "of": sum(weights[part] for part in run),
        "parts": {part: {"weight": weights[part], "value": value} for part, value in parts.items()},
        "not_run": [part for part in parts if part not in run],
    }
