"""ToolACE: `{"system", "conversations": [{"from", "value"}]}`, tools inside the system text, calls in Python syntax.

The system text is wire format and is left out of the messages, except lines that tell the date. Tool results are JSON
lists with one entry per call, and become one message each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from autotool_fast.tasks.example import Example
from autotool_fast.tasks.sources.dialogues import Turn, examples, present, result_text, role_of, text_field
from autotool_fast.tasks.sources.literal import read_value, tokens
from autotool_fast.tasks.sources.pycalls import holds_calls, parse_calls
from autotool_fast.tasks.sources.rows import RowError
from autotool_fast.tasks.sources.schemas import read_tools

NAME = "toolace"
_LIST_START = re.compile(r"\[\s*[{\]]")
_MARKER = re.compile(r"functions in JSON format[^\n:]*:", re.IGNORECASE)


def matches(row: dict[str, Any]) -> bool:
    """Whether a row looks like this data set's."""
    return isinstance(row.get("system"), str) and isinstance(row.get("conversations"), list)


def read_row(row: dict[str, Any], row_id: str) -> Iterator[Example | RowError]:
    """The examples of one dialogue.

    Raises:
        RowError: when the whole row is unusable.
    """
    system = text_field(row, "system")
    listed, rest = _tool_list(system)
    tools, notes = read_tools(listed)
    names = [tool["function"]["name"] for tool in tools]
    if not isinstance(row.get("conversations"), list):
        raise RowError("bad_row", "conversations is no list")
    turns: list[Turn] = [*present(rest)]
    for value in row["conversations"]:
        role, text = role_of(value), value["value"]
        if role == "assistant":
            turns.append(_assistant(text, names))
        elif role == "tool":
            turns.append(Turn(role, text, results=_results(text)))
        else:
            turns.append(Turn(role, text))
    yield from examples(NAME, row_id, tools, turns, notes=notes)


def _tool_list(system: str) -> tuple[Any, str]:
    """The tool list inside the system text, and the text around it."""
    marker = _MARKER.search(system)
    start = _LIST_START.search(system, marker.end() if marker else 0)
    if start is None:
        raise RowError("no_tools", excerpt=system)
    depth = 0
    for token in tokens(system, start.start()):
        if token.group() in ("[", "{"):
            depth += 1
        elif token.group() in ("]", "}"):
            depth -= 1
        if depth == 0:
            text = system[start.start() : token.end()]
            try:
                return read_value(text), system[: start.start()] + system[token.end() :]
            except RowError as error:
                raise RowError("bad_tools", str(error), excerpt=text) from None
    raise RowError("bad_tools", "the list is never closed", excerpt=system[start.start() :])


def _assistant(text: str, names: list[str]) -> Turn:
    if text.strip() == "[]":
        return Turn("assistant", raw=text)
    if not holds_calls(text, names):
        return Turn("assistant", text.strip(), raw=text)
    try:
        return Turn("assistant", calls=parse_calls(text, names), raw=text)
    except RowError as error:
        bare = text.strip()
        if not bare.startswith("["):
            error = RowError("calls_in_text", str(error), excerpt=text)
        return Turn("assistant", text, error=error, raw=text)


def _results(text: str) -> tuple[str, ...]:
    """One text per call where the turn is a list of named results, else the turn as it is."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return (text,)
    if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
        return (text,)
    if not all("name" in value and "results" in value for value in values):
        return (text,)
    return tuple(result_text(value["results"]) for value in values)
