"""The turn loop: tasks in, trajectories out.

Each sample is an episode: sample a turn, parse it, let the task execute it, append the messages it gives back, and
so on until the task is over or a budget is. Episodes run side by side in the slot engine; those whose turn ended
are served between two decoding steps while the rest go on (on a GPU, while it computes the next step); the time
that takes counts against their own deadline only. An episode with `begin` (see `tasks.record`) works elsewhere
meanwhile: what is done within `PATIENCE_S` is waited for, so that quick calls leave the order of turns as it is, and
what is not joins later. A cut or malformed turn never executes. An episode is closed when it is over, however it
ended, and all of them are when the rollout is left by an exception. Sampled tokens are decoded for the parser only:
ids are append-only. Rewards and batching for training are elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from autotool_fast.chat import SOURCE_PROMPT, SOURCE_SAMPLED, SOURCE_TOOL, ParsedReply
from autotool_fast.errors import UserError
from autotool_fast.metrics import phase
from autotool_fast.rollout.records import Row, StopReason, Trajectory
from autotool_fast.rollout.rng import row_seeds
from autotool_fast.tasks.record import Episode, Task, Wait, close_episode

T = TypeVar("T")
PATIENCE_S = 0.5
"""Seconds that decoding waits for calls it has just started."""
_POLL_S = 0.1


class Engine(Protocol):
    """What the driver needs of an engine; `engine.SlotEngine` says what each method does."""

    model: Any
    max_len: int

    @property
    def slots(self) -> int: ...
    def session(
        self, *, stop_ids: Collection[int], temperature: float
    ) -> AbstractContextManager[Engine]: ...
    def submit(
        self, prompt: Sequence[int], keys: Sequence[int], seeds: np.ndarray, max_new_tokens: int
    ) -> None: ...
    def extend(self, key: int, ids: Sequence[int], max_new_tokens: int) -> None: ...
    def step(self) -> list[tuple[int, bool]]: ...
    def row(self, key: int) -> Row: ...
    def room(self, key: int) -> int: ...
    def age(self, key: int) -> float: ...
    def excuse(self, key: int, seconds: float) -> None: ...
    def older_than(self, seconds: float) -> list[int]: ...
    def release(self, key: int) -> None: ...
    @property
    def busy(self) -> bool: ...


class Chat(Protocol):
    """What the driver needs of `chat.ChatFormat`."""

    stop_ids: frozenset[int]

    def encode_prompt(self, messages: list[dict], tools: list[dict]) -> list[int]: ...
    def encode_mode(self, mode: str) -> list[int]: ...
    def encode_continuation(self, messages: list[dict]) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def parse(self, text: str) -> ParsedReply: ...


@dataclass(frozen=True)
class RolloutLimits:
    """Budgets of one episode.

    They are checked in this order. While a turn is sampled: deadline, then the token budgets. After a turn:
    malformed reply, calls, the task's own end, deadline, turns, tokens left for another turn.

    Attributes:
        max_turns: assistant replies.
        max_new_tokens: sampled tokens.
        max_turn_tokens: sampled tokens of one reply.
        max_calls: tool calls.
        deadline_s: seconds since the episode got a slot, those spent in other episodes' tools left out; None for no
            limit.
    """

    max_turns: int = 6
    max_new_tokens: int = 128
    max_turn_tokens: int = 64
    max_calls: int = 12
    deadline_s: float | None = 60.0

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_new_tokens", "max_turn_tokens"):
            if getattr(self, name) < 1:
                raise UserError("must be at least 1", where=f"rollout.{name}")


@dataclass
class _Sample:
    """One running episode."""

    group: int
    sample: int
    episode: Episode
    prompt_end: int  # where the current turn's sampled tokens begin
    segments: list[tuple[int, int]]  # (tokens, source) in order
    replies: list[ParsedReply] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    calls: int = 0
    sampled: int = 0
    forced: int = 0
    thinking: list[tuple[int, int]] = field(default_factory=list)
    tool_seconds: float = 0.0


@dataclass(frozen=True)
class _Calls:
    """An episode's work under way elsewhere. `began` is in seconds, time.perf_counter."""

    future: Future[list[dict] | None]
    tools: tuple[str, ...]
    began: float


class _ThinkFinder:
    """Finds the tokens of a turn that lie strictly between the think markers.

    Works on the concatenation of each token's own text, remembered per id. The markers are ASCII, so they are
    found there whether they are one token or several; a token that holds part of a marker is left out.
    """

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._pieces: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> tuple[int, int]:
        """(start, end) of the thinking in `ids`; an empty range when there is none."""
        for token in ids:
            if token not in self._pieces:
                self._pieces[token] = self._chat.decode([token])
        pieces = [self._pieces[token] for token in ids]
        text = "".join(pieces)
        opening = text.find("<think>")
        if opening < 0:
            return 0, 0
        opening += len("<think>")
        closing = text.find("</think>", opening)
        ends = np.cumsum([len(piece) for piece in pieces])
        first = int(np.searchsorted(ends, opening)) + 1  # first token after the one that completes the marker
        last = len(pieces) if closing < 0 else int(np.searchsorted(ends, closing, side="right"))
        return first, max(first, last)


class _Driver:
    """One call of `rollout`."""

    def __init__(
        self,
        engine: Engine,
        chat: Chat,
        tasks: Sequence[Task],
        mode: str,
        limits: RolloutLimits,
        malformed_ends: bool,
        close: bool,
    ) -> None:
        self.engine, self.chat, self.tasks, self.limits = engine, chat, tasks, limits
        self.malformed_ends, self.close = malformed_ends, close
        self.tag = [] if mode == "auto" else list(chat.encode_mode(mode))
        self.find_think = _ThinkFinder(chat)
        self.running: dict[int, _Sample] = {}
        self.done: dict[int, Trajectory] = {}
        self.calls: dict[int, _Calls] = {}
        self.idle_since: float | None = None

    def submit(self, group: int, group_size: int, seeds: np.ndarray) -> None:
        """Queue the samples of one task."""
        task, limits = self.tasks[group], self.limits
        prompt = [*self.chat.encode_prompt(list(task.messages), list(task.tools)), *self.tag]
        need = len(prompt) + limits.max_new_tokens
        if need > self.engine.max_len:
            raise UserError(
                f"the prompt of task {task.id} ({len(prompt)} tokens) and the new tokens "
                f"({limits.max_new_tokens}) do not fit into {self.engine.max_len} positions",
                where="rollout.max_new_tokens",
                remedy=f"lower it, or raise model.max_positions to {need}",
            )
        keys = [group * group_size + sample for sample in range(group_size)]
        for sample, key in enumerate(keys):
            self.running[key] = _Sample(
                group,
                sample,
                task.episode(),
                len(prompt),
                [(len(prompt), SOURCE_PROMPT)],
                forced=len(self.tag),
            )
        self.engine.submit(prompt, keys, seeds, min(limits.max_turn_tokens, limits.max_new_tokens))

    def end_turn(self, key: int, stopped: bool) -> None:
        """Serve a row whose turn ended: parse, execute, then extend it or close its episode."""
        state, limits = self.running[key], self.limits
        reply = self._read_turn(key, state, stopped)
        if not stopped:
            cut_by_turn = state.spans[-1][1] - state.spans[-1][0] >= limits.max_turn_tokens
            return self._close(key, StopReason.MAX_TURN_TOKENS if cut_by_turn else StopReason.MAX_TOKENS)
        if reply.length_class < 0:
            serve = None if self.malformed_ends else getattr(state.episode, "malformed", None)
            if serve is None:
                return self._close(key, StopReason.MALFORMED)
        else:
            serve = state.episode.step
            if state.calls + len(reply.calls) > limits.max_calls:
                return self._close(key, StopReason.MAX_CALLS)
            state.calls += len(reply.calls)
            begin = getattr(state.episode, "begin", None)
            if begin is not None:
                began, names = time.perf_counter(), tuple(call.name for call in reply.calls)
                self.calls[key] = _Calls(begin(reply), names, began)
                return None
        return self._go_on(key, self._timed(key, state, lambda: serve(reply)))

    def _go_on(self, key: int, messages: list[dict] | None) -> None:
        """Extend a row with what its episode answered, or close it."""
        state, limits = self.running[key], self.limits
        if messages is None:
            return self._close(key, StopReason.FINISHED)
        if limits.deadline_s is not None and self.engine.age(key) > limits.deadline_s:
            return self._close(key, StopReason.DEADLINE)
        if len(state.replies) >= limits.max_turns:
            return self._close(key, StopReason.MAX_TURNS)
        tool = self.chat.encode_continuation(messages)
        added = len(tool) + len(self.tag)
        budget = min(
            limits.max_turn_tokens, limits.max_new_tokens - state.sampled, self.engine.room(key) - added
        )
        if budget < 1:
            return self._close(key, StopReason.MAX_TOKENS)
        self.engine.extend(key, [*tool, *self.tag], budget)
        state.segments += [(len(tool), SOURCE_TOOL), (len(self.tag), SOURCE_PROMPT)]
        state.prompt_end += added
        state.forced += len(self.tag)
        return None

    def take_results(self) -> None:
        """Go on with the episodes whose calls are done; wait for some if there is nothing else to do."""
        if not self.calls:
            self.idle_since = None
            return
        now = time.perf_counter()
        fresh = [calls for calls in self.calls.values() if now < calls.began + PATIENCE_S]
        if fresh:
            with phase("tools"):
                wait([calls.future for calls in fresh], max(calls.began for calls in fresh) + PATIENCE_S - now)
        if len(self.calls) >= min(self.engine.slots, len(self.running)):  # no row is being sampled
            self.idle_since = self.idle_since or now
            with phase("tools"):
                done = wait([calls.future for calls in self.calls.values()], _POLL_S, FIRST_COMPLETED).done
            if not done:
                self._tell_waits()
        else:
            self.idle_since = None
        for key in [key for key, calls in self.calls.items() if calls.future.done()]:
            self.idle_since = None
            self._go_on(key, self._forget_calls(key).future.result())

    def _forget_calls(self, key: int) -> _Calls:
        calls = self.calls.pop(key)
        self.running[key].tool_seconds += time.perf_counter() - calls.began
        return calls

    def _tell_waits(self) -> None:
        now = time.perf_counter()
        listener = getattr(self.running[next(iter(self.calls))].episode, "waited", None)
        if listener is not None:
            waits = [
                Wait(self.tasks[self.running[key].group].id, calls.tools, now - calls.began)
                for key, calls in self.calls.items()
            ]
            listener(now - self.idle_since, waits)

    def _timed(self, key: int, state: _Sample, work: Callable[[], T]) -> T:
        """Run an episode's own code; the other episodes are not charged for the time."""
        began = time.perf_counter()
        with phase("tools"):
            result = work()
        seconds = time.perf_counter() - began
        state.tool_seconds += seconds
        self.engine.excuse(key, seconds)
        return result

    def close_all(self) -> None:
        """Close the episodes that are not over."""
        for state in self.running.values():
            close_episode(state.episode)

    def cut(self, key: int) -> None:
        """Close an episode whose time is up, in the middle of a turn or of its calls."""
        state = self.running[key]
        if key in self.calls:
            self._forget_calls(key).future.cancel()
        elif len(self.engine.row(key).ids) > state.prompt_end:
            self._read_turn(key, state, stopped=False)
        self._close(key, StopReason.DEADLINE)

    def _read_turn(self, key: int, state: _Sample, stopped: bool) -> ParsedReply:
        ids = self.engine.row(key).ids
        start, end = state.prompt_end, len(ids)
        turn = [*self.tag, *ids[start : end - 1 if stopped else end].tolist()]
        reply = self.chat.parse(self.chat.decode(turn))
        state.replies.append(reply)
        state.spans.append((start, end))
        state.segments.append((end - start, SOURCE_SAMPLED))
        state.sampled += end - start
        first, last = self.find_think(turn)
        if last > first:
            shift = start - len(self.tag)
            state.thinking.append((first + shift, last + shift))
        state.prompt_end = end
        return reply

    def _close(self, key: int, reason: StopReason) -> None:
        state, row = self.running[key], self.engine.row(key)
        correct = reason is StopReason.FINISHED and bool(self._timed(key, state, state.episode.score))
        del self.running[key]
        if self.close:
            close_episode(state.episode)
        lengths, sources = zip(*state.segments, strict=True)
        self.done[key] = Trajectory(
            task=self.tasks[state.group],
            group=state.group,
            sample=state.sample,
            ids=row.ids.astype(np.int32),
            source=np.repeat(np.array(sources, np.int8), lengths),
            logp=row.logp.copy(),
            entropy=row.entropy.copy(),
            replies=tuple(state.replies),
            correct=correct,
            stop_reason=reason,
            turn_spans=tuple(state.spans),
            tool_seconds=state.tool_seconds,
            n_forced_tokens=state.forced,
            think_spans=tuple(state.thinking),
        )
        self.engine.release(key)


def rollout(
    engine: Engine,
    tasks: Sequence[Task],
    *,
    chat: Chat,
    group_size: int,
    seed: int,
    step: int,
    mode: str = "auto",
    temperature: float = 1.0,
    limits: RolloutLimits | None = None,
    groups: Sequence[int] | None = None,
    malformed_ends: bool = True,
    close: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Trajectory]:
    """Sample `group_size` episodes of each task.

    Args:
        engine: the model, ready to sample.
        tasks: one group each; a group's index is its place here.
        chat: turns messages into token ids and back.
        group_size: samples per task.
        seed, step: together with group and sample they fix every draw.
        mode: "auto" lets the model write the mode tag; "think" and "no_think" put it before every turn.
        temperature: of the sampling distribution; 0 is greedy.
        limits: budgets of each episode.
        groups: numbers that stand for the groups in their seeds, so that the tasks of one rollout can be played in
            several; their places here if not given.
        malformed_ends: whether a malformed reply ends every episode; else one that has `malformed` says itself what
            follows such a reply (a list of messages, or None when it is over).
        close: whether an episode is closed once it is over; else that is left to whoever keeps it.
        on_progress: called with (episodes done, episodes in all) whenever the first number grows.

    Returns:
        Trajectories ordered by task, then sample.

    Raises:
        UserError: when a prompt and the token budget do not fit into the engine's slots.
    """
    limits = limits or RolloutLimits()
    driver = _Driver(engine, chat, tasks, mode, limits, malformed_ends, close)
    total = len(tasks) * group_size
    with ExitStack() as stack:
        stack.enter_context(engine.session(stop_ids=chat.stop_ids, temperature=temperature))
        stack.callback(driver.close_all)
        for group, number in enumerate(range(len(tasks)) if groups is None else groups):
            driver.submit(group, group_size, row_seeds(seed, step, number, np.arange(group_size)))
        reported = 0
        while engine.busy:
            for key, stopped in engine.step():
                driver.end_turn(key, stopped)
            driver.take_results()
            if limits.deadline_s is not None:
                for key in engine.older_than(limits.deadline_s):
                    driver.cut(key)
            if on_progress is not None and len(driver.done) > reported:
                reported = len(driver.done)
                on_progress(reported, total)
    return [driver.done[key] for key in range(total)]
