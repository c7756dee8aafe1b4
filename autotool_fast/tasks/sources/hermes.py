"""Hermes function calling: `{"conversations": [{"from", "value"}], "tools"?}`, calls and results between tags.

Tools stand in the `tools` column (JSON or a Python literal, in a string) or between `<tools>` tags of the system text;
the prose there mentions an empty pair of these tags first. The system text is wire format and is left out, except lines
that tell the date. JSON-mode rows, which the data set also has, offer no tools.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from autotool_fast.tasks.example import Example
from autotool_fast.tasks.sources.dialogues import Turn, examples, present, result_text, role_of
from autotool_fast.tasks.sources.literal import read_value, read_values
from autotool_fast.tasks.sources.rows import RowError
from autotool_fast.tasks.sources.schemas import read_tools
from autotool_fast.tasks.sources.tagged import read_tagged

NAME = "hermes"
_TOOLS = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)


def matches(row: dict[str, Any]) -> bool:
    """Whether a row looks like this data set's."""
    turns = row.get("conversations")
    return isinstance(turns, list) and bool(turns) and all(isinstance(t, dict) and "from" in t for t in turns)


def is_json_mode(row: dict[str, Any]) -> bool:
    """Whether a row is of the data set's JSON mode: a schema to fill in, no tools."""
    system = " ".join(str(turn.get("value")) for turn in row["conversations"] if turn.get("from") == "system")
    return not row.get("tools") and "<schema>" in system and "<tools>" not in system


def read_row(row: dict[str, Any], row_id: str) -> Iterator[Example | RowError]:
    """The examples of one dialogue.

    Raises:
        RowError: when the whole row is unusable.
    """
    if not isinstance(row.get("conversations"), list):
        raise RowError("bad_row", "conversations is no list")
    said = [(role_of(value), value["value"]) for value in row["conversations"]]
    system = "\n".join(text for role, text in said if role == "system")
    tools, notes = read_tools(_tool_list(row, system))
    turns: list[Turn] = [*present(_TOOLS.sub("", system))]
    for role, text in said:
        if role == "assistant":
            turns.append(_assistant(text))
        elif role == "tool":
            turns.append(Turn(role, text, results=_results(text)))
        elif role == "user":
            turns.append(Turn(role, text))
    meta = {key: row[key] for key in ("category", "subcategory", "task") if isinstance(row.get(key), str)}
    yield from examples(NAME, row_id, tools, turns, notes=notes, meta=meta)


def _tool_list(row: dict[str, Any], system: str) -> list[Any]:
    problem: RowError | None = None
    column = row.get("tools")
    if column:
        try:
            listed = read_value(column) if isinstance(column, str) else column
            listed = [listed] if isinstance(listed, dict) else listed
            if listed:
                return listed
        except RowError as error:
            problem = RowError("bad_tools", str(error), excerpt=str(column))
    for block in _TOOLS.findall(system):
        if not block.strip():
            continue
        try:
            values = read_values(block)
        except RowError as error:
            problem = problem or RowError("bad_tools", str(error), excerpt=block)
            continue
        listed = [tool for value in values for tool in (value if isinstance(value, list) else [value])]
        # The prose may put words between an empty-looking pair; a block of tools holds objects.
        if listed and all(isinstance(tool, dict) for tool in listed):
            return listed
    raise problem or RowError("no_tools", excerpt=system)


def _assistant(text: str) -> Turn:
    try:
        reply = read_tagged(text)
    except RowError as error:
        return Turn("assistant", text, error=error, raw=text)
    return Turn("assistant", reply.text, reply.calls, raw=text)


def _results(text: str) -> tuple[str, ...]:
    """One text per response block: its content, where it is an object with one."""
    results = []
    for block in _RESPONSE.findall(text) or [text]:
        try:
            value = read_value(block)
        except RowError:
            value = None
        held = isinstance(value, dict) and "content" in value
        results.append(result_text(value["content"]) if held else block.strip())
    return tuple(results)
