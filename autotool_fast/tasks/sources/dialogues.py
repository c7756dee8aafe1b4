"""Dialogues taken apart into one example per assistant turn.

A data set's reader turns its rows into `Turn`s; this module gives every assistant turn its history, its label and its
checks. Text that directly follows a user turn is a label for making no call; text that follows anything else is a
summary. A turn that cannot be read is yielded as an error, and so are all later ones, whose history it would be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from autotool_fast.chat import ToolCall
from autotool_fast.tasks.example import Example, call_message
from autotool_fast.tasks.sources.rows import RowError
from autotool_fast.tasks.sources.schemas import check_calls

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Names of roles in data sets -> those of messages."""

# What a prompt says about the present, which the answer may need; the rest of a system text is wire format.
_DATE_LINE = re.compile(
    r"[^\n]*\b(?:today(?:'s)?|current (?:date|time)|the time is|date is)\b[^\n]*\d[^\n]*", re.IGNORECASE
)
_LABEL_ONLY = ("empty_reply", "no_prompt", "no_user_message")
_HAN = re.compile("[\u3400-\u9fff]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue.

    Attributes:
        role: system, user, assistant or tool.
        text: what it says besides calls.
        calls: of an assistant turn.
        think: of an assistant turn.
        results: of a tool turn, one text per message.
        error: why an assistant turn could not be read.
        raw: its text in the file, for the rejects.
    """

    role: str
    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    think: str | None = None
    results: tuple[str, ...] = ()
    error: RowError | None = None
    raw: str = ""


def examples(
    source: str,
    row_id: str,
    tools: tuple[dict, ...],
    turns: Sequence[Turn],
    *,
    notes: set[str],
    meta: dict[str, Any] | None = None,
    last_only: bool = False,
) -> Iterator[Example | RowError]:
    """One example, or one error, per assistant turn.

    Args:
        source: name of the data set.
        row_id: unique and stable; the turn's number is added to it.
        tools: from `schemas.read_tools`.
        turns: in order.
        notes: what was repaired in the tools.
        meta: what else to keep.
        last_only: only the last assistant turn is asked for; the others are history.

    Raises:
        RowError: no_answer when there is no assistant turn.
    """
    count = sum(turn.role == "assistant" for turn in turns)
    if not count:
        raise RowError("no_answer")
    messages: list[dict[str, Any]] = []
    number, broken, previous = -1, False, ""
    names: list[str] = []
    for turn in turns:
        if turn.role == "assistant":
            number += 1
            asked = not last_only or number == count - 1
            try:
                example = _example(source, f"{row_id}-t{number}", tools, messages, turn, previous, notes, meta, number)
                if broken:
                    raise RowError("after_unreadable_turn")
            except RowError as error:
                # A turn that is refused for its label alone still belongs into the history.
                broken = broken or turn.error is not None or error.reason not in _LABEL_ONLY
                if asked:
                    yield error.at(turn=number, excerpt=turn.raw or turn.text)
            else:
                if asked:
                    yield example
            messages.append(call_message(turn.text, turn.calls))
            names = [call.name for call in turn.calls]
        elif turn.role == "tool":
            results = turn.results or (turn.text,)
            messages += [
                {"role": "tool", **({"name": names[i]} if len(names) == len(results) else {}), "content": result}
                for i, result in enumerate(results)
            ]
        else:
            messages.append({"role": turn.role, "content": turn.text})
        previous = turn.role


def _example(
    source: str,
    id: str,
    tools: tuple[dict, ...],
    messages: list[dict[str, Any]],
    turn: Turn,
    previous: str,
    notes: set[str],
    meta: dict[str, Any] | None,
    number: int,
) -> Example:
    if turn.error is not None:
        raise turn.error
    notes = notes | check_calls(turn.calls, tools)
    said = [message["content"] for message in messages if message["role"] == "user"]
    if not any(text.strip() for text in said):
        raise RowError("no_user_message")
    if previous not in ("user", "tool"):
        raise RowError("no_prompt")
    if not turn.calls and not turn.text.strip():
        raise RowError("empty_reply")
    return Example(
        id=id,
        source=source,
        tools=tools,
        messages=tuple(messages),
        answer=turn.calls,
        no_call=not turn.calls and previous == "user",
        text=turn.text,
        think=turn.think,
        meta={
            "n_calls": len(turn.calls),
            "turn": number,
            "name_map": {},
            "language": language(said[-1]),
            "notes": sorted(notes),
            **(meta or {}),
        },
    )


def role_of(value: Any, key: str = "from") -> str:
    """The role of a turn, or a RowError (bad_row, unknown_role)."""
    if not isinstance(value, dict) or not isinstance(value.get("value"), str):
        raise RowError("bad_row", "a turn has no text")
    role = ROLES.get(str(value.get(key)).lower())
    if role is None:
        raise RowError("unknown_role", str(value.get(key)))
    return role


def text_field(row: dict[str, Any], name: str) -> str:
    """A text of the row, or a RowError (bad_row)."""
    if not isinstance(row.get(name), str):
        raise RowError("bad_row", f"{name} is no text" if name in row else f"{name} is missing")
    return row[name]


def present(system: str) -> tuple[Turn, ...]:
    """The lines of a system text that tell the date or the time, as a system turn, if there are any."""
    lines = [line.strip() for line in _DATE_LINE.findall(system)]
    return (Turn("system", "\n".join(lines)),) if lines else ()


def result_text(value: Any) -> str:
    """A tool's result as the text of a message."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def language(text: str) -> str:
    """en, zh or other, by the script of the letters: a rough count, not a detector."""
    han, latin = len(_HAN.findall(text)), len(_LATIN.findall(text))
    if han and han * 2 >= latin:  # a name or a unit in Latin letters leaves a Chinese text Chinese
        return "zh"
    return "en" if latin else "other"
