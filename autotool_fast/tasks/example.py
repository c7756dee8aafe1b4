"""One assistant turn with its right answer: the record that every data set is read into.

An `Example` holds the tools on offer, the conversation so far, and either the calls to make, or that none is to be
made, or (a summary) that the turn reports what tools returned and cannot be judged. It is plain JSON, one object per
line; `read_examples` reads such a file back, and `to_task` makes it a problem for the rollout.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autotool_fast.chat import ParsedReply, ToolCall, render_reply
from autotool_fast.errors import UserError
from autotool_fast.matching import calls_match
from autotool_fast.tasks.record import Task
from autotool_fast.tasks.sources.literal import clean, read_value
from autotool_fast.tasks.sources.rows import RowError
from autotool_fast.tasks.sources.schemas import check_calls, defaults, read_tools

KINDS = ("call", "no_call", "summary")
NO_CALL_TEXT = "None of the tools on offer can do this."
"""What a reply without calls says where the data set gives no text."""

_FIELDS = ("id", "source", "tools", "messages", "answer", "no_call", "text", "think", "meta")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """One assistant turn.

    Attributes:
        id: unique and stable: source, file, row and turn.
        source: the data set.
        tools: JSON-schema descriptions in the form chat templates take, in the data set's order.
        messages: the conversation before the turn, in the form chat templates take; every message has `content`, and
            an assistant message with calls has `tool_calls`.
        answer: the calls to make, in any order; empty when there are none.
        no_call: whether making no call is the right answer.
        text: what the turn says besides its calls.
        think: the data set's own reasoning, or None.
        meta: n_calls, turn (zero-based), name_map (model's name -> original, where they differ), language, notes
            (codes out of `rows.NOTES`), and what else the source tells.
    """

    id: str
    source: str
    tools: tuple[dict, ...]
    messages: tuple[dict, ...]
    answer: tuple[ToolCall, ...]
    no_call: bool = False
    text: str = ""
    think: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """call, no_call or summary."""
        return "call" if self.answer else "no_call" if self.no_call else "summary"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "id": self.id,
            "source": self.source,
            "tools": list(self.tools),
            "messages": list(self.messages),
            "answer": [{"name": call.name, "arguments": call.arguments} for call in self.answer],
            "no_call": self.no_call,
            "text": self.text,
            "think": self.think,
            "meta": self.meta,
        }

    def to_line(self) -> str:
        """As one line of JSONL, with its line break."""
        return json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, value: Any) -> Example:
        """Read and check a record; all but tools, messages and answer may be left out.

        Raises:
            RowError: bad_row naming the field, or what is wrong with its tools or answer.
        """
        if not isinstance(value, dict):
            raise RowError("bad_row", "no object")
        value = clean(value)
        for name in value:
            if name not in _FIELDS:
                raise RowError("bad_row", f"unknown field {name}")
        tools, notes = read_tools(_take(value, "tools", list))
        answer = tuple(read_call(call) for call in _take(value, "answer", list))
        no_call = _take(value, "no_call", bool, default=not answer)
        if no_call and answer:
            raise RowError("bad_row", "no_call is true and answer is not empty")
        notes |= check_calls(answer, tools)
        meta = dict(_take(value, "meta", dict, default={}))
        meta = {"turn": 0, "name_map": {}, **meta, "n_calls": len(answer)}
        meta["notes"] = sorted(notes | set(_take(meta, "notes", list, default=[])))
        think = value.get("think")
        if think is not None and not isinstance(think, str):
            raise RowError("bad_row", "think is no text")
        return cls(
            id=_take_label(value, "id", ""),
            source=_take_label(value, "source", "jsonl"),
            tools=tools,
            messages=tuple(read_messages(_take(value, "messages", list))),
            answer=answer,
            no_call=no_call,
            text=_take(value, "text", str, default=""),
            think=think,
            meta=meta,
        )

    def reply(self, *, think: bool = False) -> str:
        """The reference reply in the format the model is asked for; with `think`, after the data set's reasoning."""
        text = self.text or ("" if self.answer else NO_CALL_TEXT)
        return render_reply(self.think if think else None, self.answer, text)


def read_call(value: Any) -> ToolCall:
    """A call out of `{"name", "arguments"}`, as JSON data sets write it.

    `parameters` for `arguments`, arguments that are encoded JSON and the `{"function": ...}` wrapper are accepted.

    Raises:
        RowError: bad_call or bad_arguments.
    """
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise RowError("bad_call", excerpt=str(value))
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = read_value(arguments)
    if not isinstance(arguments, dict):
        raise RowError("bad_arguments", value["name"])
    return ToolCall(value["name"], arguments)


def call_message(text: str, calls: tuple[ToolCall, ...]) -> dict[str, Any]:
    """An assistant message in the form chat templates take."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
        ]
    return message


def _take(value: dict[str, Any], name: str, kind: type, **default: Any) -> Any:
    if name not in value and default:
        return default["default"]
    if not isinstance(value.get(name), kind):
        raise RowError("bad_row", f"{name} is missing" if name not in value else f"{name} is no {kind.__name__}")
    return value[name]


def _take_label(value: dict[str, Any], name: str, default: str) -> str:
    label = _take(value, name, str, default=default)
    if not label.isprintable():  # tables and progress show it
        raise RowError("bad_row", f"{name} holds control characters")
    return label


def read_messages(values: list[Any]) -> Iterator[dict[str, Any]]:
    """Messages in the form chat templates take, out of what a record holds.

    Raises:
        RowError: a message has another form, or the last one is neither the user's nor a tool's.
    """
    for value in values:
        if not isinstance(value, dict) or value.get("role") not in _ROLES:
            raise RowError("unknown_role", str(value.get("role") if isinstance(value, dict) else value))
        content = value.get("content")
        if content is not None and not isinstance(content, str):
            raise RowError("bad_row", "the content of a message is no text")
        if value["role"] != "assistant":
            message = {"role": value["role"], "content": content or ""}
            if isinstance(value.get("name"), str):
                message["name"] = value["name"]
            yield message
            continue
        calls = value.get("tool_calls") or []
        if not isinstance(calls, list):
            raise RowError("bad_row", "tool_calls is no list")
        yield call_message(content or "", tuple(map(read_call, calls)))
    if not any(isinstance(value, dict) and value.get("role") == "user" for value in values):
        raise RowError("no_user_message")
    if values[-1]["role"] not in ("user", "tool"):
        raise RowError("bad_row", "the last message is neither the user's nor a tool's")


class ExampleEpisode:
    """One attempt at an example: a single reply, judged by its calls alone."""

    def __init__(self, task: Task) -> None:
        self._spec, self._tools = task.spec, task.tools
        self._reply: ParsedReply | None = None

    def step(self, reply: ParsedReply) -> None:
        """Keep the reply; the episode is over."""
        self._reply = reply

    def score(self) -> bool:
        """Whether a well-formed reply makes exactly the calls of the answer."""
        if self._reply is None or self._reply.errors:
            return False
        return calls_match(
            self._reply.calls,
            [ToolCall(call["name"], call["arguments"]) for call in self._spec["answer"]],
            strict=self._spec["strict"],
            defaults=defaults(self._tools) if self._spec["defaults_are_absent"] else None,
        )


def to_task(example: Example, *, strict: bool = False, defaults_are_absent: bool = True) -> Task:
    """The example as a problem.

    Args:
        example: a call or a no-call.
        strict: tell 3 from 3.0 (see `matching`).
        defaults_are_absent: whether an argument equal to its schema's default may as well be left out.

    Raises:
        ValueError: for a summary, which has no answer to compare with.
    """
    if example.kind == "summary":
        raise ValueError(f"{example.id} is a summary and cannot be judged")
    return Task(
        id=example.id,
        family=example.source,
        difficulty=0,
        tools=example.tools,
        messages=example.messages,
        spec={
            "answer": example.to_json()["answer"],
            "strict": strict,
            "defaults_are_absent": defaults_are_absent,
            "reply": example.reply(),
            "think": example.think,
        },
        split=example.meta.get("split", "train"),
        start=ExampleEpisode,
    )


def read_examples(path: Path) -> Iterator[Example]:
    """The examples of a prepared JSONL file, one at a time.

    Raises:
        UserError: the file cannot be read, or a line of it is no example; prepared files have no bad rows.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield Example.from_json(json.loads(line))
                except (RowError, ValueError, RecursionError) as error:
                    remedy = "write it with python -m autotool_fast.data prepare"
                    raise UserError(f"line {number} is no example: {error}", where=str(path), remedy=remedy) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path)) from None
