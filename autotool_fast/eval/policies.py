"""Policies that answer turn by turn, and the two that need no model: the oracle and the null policy.

The oracle writes the ground truth in the reply format and reads it back with the parser, so that a benchmark's data,
adapter and checker, and the format itself, are proven together. The null policy never calls anything.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from autotool_fast.chat import parse_reply, render_reply
from autotool_fast.eval.records import REFUSED, Played, Reply, Request, call_message
from autotool_fast.tasks.record import Task

MAX_REPLIES = 256
"""Replies after which an episode is cut; benchmarks have caps of their own, all below."""


class Stepwise(ABC):
    """A policy that needs the whole conversation for every turn. Subclasses say how a batch of turns is answered."""

    name: str
    parameters: int | None = None

    @abstractmethod
    def act(self, requests: Sequence[Request], mode: str) -> list[Reply]:
        """One reply to each request, in order."""

    def play(self, tasks: Sequence[Task], mode: str) -> list[Played]:
        """Play the tasks side by side, one turn of each at a time."""
        episodes = [task.episode() for task in tasks]
        messages = [list(task.messages) for task in tasks]
        replies: list[list[Reply]] = [[] for _ in tasks]
        seconds = [0.0] * len(tasks)  # an equal share of each batch, and the episode's own steps
        stops: dict[int, str] = {}
        while len(stops) < len(tasks):
            live = [i for i in range(len(tasks)) if i not in stops]
            requests = [Request(messages[i], episodes[i].tools, episodes[i].solution) for i in live]
            began = time.perf_counter()
            answers = self.act(requests, mode)
            share = (time.perf_counter() - began) / len(live)
            for i, reply in zip(live, answers, strict=True):
                began = time.perf_counter()
                if reply.stop != REFUSED:
                    replies[i].append(reply)
                stop = reply.stop or self._serve(episodes[i], messages[i], reply)
                if stop is None and len(replies[i]) >= MAX_REPLIES:
                    stop = "max_turns"
                if stop is not None:
                    stops[i] = stop
                seconds[i] += share + time.perf_counter() - began
        return [Played(task, episodes[i], replies[i], stops[i], seconds[i]) for i, task in enumerate(tasks)]

    @staticmethod
    def _serve(episode: Any, messages: list[dict], reply: Reply) -> str | None:
        if reply.parsed.errors:
            serve = getattr(episode, "malformed", None)
            if serve is None:
                return "malformed"
            said = call_message(reply.text, ())  # as it was written
        else:
            serve, said = episode.step, call_message(reply.parsed.text, reply.parsed.calls)
        following = serve(reply.parsed)
        if following is None:
            return "finished"
        messages += [said, *following]
        return None


class Oracle(Stepwise):
    """Replies with the ground truth. In mode think it thinks first, in auto it does not."""

    name = "oracle"

    def config(self) -> dict[str, Any]:
        """Nothing to choose."""
        return {"policy": self.name}

    def act(self, requests: Sequence[Request], mode: str) -> list[Reply]:
        """The solution of each request, rendered and parsed."""
        replies = []
        for request in requests:
            solution = request.solve()
            text = render_reply("The ground truth." if mode == "think" else None, solution.calls, solution.text)
            replies.append(Reply(parse_reply(text), text))
        return replies


class Null(Stepwise):
    """Never calls a function."""

    name = "null"

    def config(self) -> dict[str, Any]:
        """Nothing to choose."""
        return {"policy": self.name}

    def act(self, requests: Sequence[Request], mode: str) -> list[Reply]:
        """The same words to everything."""
        text = render_reply("Nothing." if mode == "think" else None, (), "I make no call.")
        return [Reply(parse_reply(text), text) for _ in requests]
