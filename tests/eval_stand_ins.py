"""The benchmarks' stand-ins for tests, and what plays them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from autotool_fast.chat import ToolCall, parse_reply, render_reply
from autotool_fast.eval.policies import Stepwise
from autotool_fast.eval.records import Reply, Request
from autotool_fast.rollout.engine import Row

STAND_INS = Path(__file__).parent / "fixtures" / "eval"
STOP = 0
SINGLE_TURN = ("simple_python", "simple_java", "parallel", "irrelevance", "live_relevance")
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_long_context")


def reply_text(*calls: tuple[str, dict], text: str = "") -> str:
    """A reply without thinking."""
    return render_reply(None, tuple(ToolCall(name, arguments) for name, arguments in calls), text)


class Scripted(Stepwise):
    """Replies with what `script(task messages so far)` writes; keeps the requests."""

    name = "scripted"

    def __init__(self, script: Callable[[Request], str], tokens: int | None = None) -> None:
        self.script, self.tokens, self.requests, self.parameters = script, tokens, [], None

    def config(self) -> dict:
        return {"policy": self.name}

    def act(self, requests: Sequence[Request], mode: str) -> list[Reply]:
        self.requests += [(list(r.messages), [t["function"]["name"] for t in r.tools], mode) for r in requests]
        texts = [self.script(request) for request in requests]
        return [Reply(parse_reply(text), text, self.tokens, self.tokens, self.tokens) for text in texts]


class CharacterChat:
    """A chat format whose tokens are characters; id 0 ends a turn."""

    stop_ids = frozenset([STOP])

    def encode_prompt(self, messages, tools):
        return [ord(c) for c in "".join(m["content"] for m in messages)]

    def encode_mode(self, mode):
        return [ord(c) for c in f"[{mode}]\n"]

    def encode_continuation(self, messages):
        return [ord(c) for c in "".join(m["content"] for m in messages)]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def parse(self, text):
        return parse_reply(text)


class ScriptedEngine:
    """What the rollout driver needs of the slot engine, with replies out of `script[sample][turn]`."""

    max_len = 100_000
    slots = 1000

    def __init__(self, script: Sequence[Sequence[str]]) -> None:
        self.script, self.rows, self.turns, self.reading = script, {}, {}, []

    @contextmanager
    def session(self, *, stop_ids, temperature):
        yield self

    @property
    def busy(self):
        return bool(self.rows)

    def submit(self, prompt, keys, seeds, max_new_tokens):
        for key in keys:
            self.rows[key], self.turns[key] = list(prompt), 0
            self.reading.append(key)

    def extend(self, key, ids, max_new_tokens):
        self.rows[key] += ids
        self.reading.append(key)

    def step(self):
        keys, self.reading = self.reading, []
        for key in keys:
            self.rows[key] += [*map(ord, self.script[key][self.turns[key]]), STOP]
            self.turns[key] += 1
        return [(key, True) for key in keys]

    def row(self, key):
        ids = np.array(self.rows[key])
        return Row(ids, np.zeros(ids.size, np.float32), np.zeros(ids.size, np.float32))

    def room(self, key):
        return self.max_len - len(self.rows[key])

    def older_than(self, seconds):
        return []

    def age(self, key):
        return 0.0

    def excuse(self, key, seconds):
        pass

    def release(self, key):
        del self.rows[key]
