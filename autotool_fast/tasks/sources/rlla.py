"""ToolRL's rlla: `{"instruction", "input", "output"}`, or its parquet form with the same texts in `extra_info`.

The whole dialogue stands in one text, every turn between tags; it is taken apart into messages again. A row is one
assistant turn already, so only the output is asked for. The default "" means none here, and thoughts that are the same
stock sentence in every row are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from autotool_fast.tasks.example import Example
from autotool_fast.tasks.sources.dialogues import Turn, examples, present, text_field
from autotool_fast.tasks.sources.literal import read_value
from autotool_fast.tasks.sources.rows import RowError
from autotool_fast.tasks.sources.schemas import read_tools
from autotool_fast.tasks.sources.tagged import read_tagged

NAME = "rlla"
_TEXTS = ("instruction", "input", "output")
_SECTION = re.compile(r"\*\*Available Tools\*\*(.*?)(?=^\*\*|\Z)", re.DOTALL | re.MULTILINE)
_ENTRY = re.compile(r"^[ \t]*\d+\.[ \t]*\**Name:[ \t]*", re.MULTILINE)
_DESCRIPTION = re.compile(r"\**\s*^[ \t]*Description:[ \t]*", re.MULTILINE)
_PARAMETERS = re.compile(r"^[ \t]*Parameters:[ \t]*", re.MULTILINE)
_HISTORY = re.compile(r"\*\*Dialogue Records History\*\*")
_TAG = re.compile(r"\s*<(user|think|tool_call|response|obs)>")
_STOCK = re.compile(r"I should (?:use|directly)\b.{0,90}", re.DOTALL)


def matches(row: dict[str, Any]) -> bool:
    """Whether a row looks like this data set's, in either form."""
    extra = row.get("extra_info")
    return set(_TEXTS) <= set(row) or (isinstance(extra, dict) and set(_TEXTS) <= set(extra))


def read_row(row: dict[str, Any], row_id: str) -> Iterator[Example | RowError]:
    """The example of one row.

    Raises:
        RowError: when the row is unusable.
    """
    row = row if "instruction" in row else row.get("extra_info")
    if not isinstance(row, dict):
        raise RowError("bad_row", "extra_info is no object")
    instruction, history, output = (text_field(row, name) for name in _TEXTS)
    tools, notes = read_tools(_tool_list(instruction), empty_default=False)
    past = _read_turns(_HISTORY.sub("", history, count=1))
    last = _read_turns(output)
    if any(turn.error is not None for turn in past):
        raise RowError("unreadable_history", excerpt=history)
    if len(last) != 1 or last[0].role != "assistant":
        raise RowError("no_answer", "the output is not one assistant turn", excerpt=output)
    turns = [*present(_SECTION.sub("", instruction)), *past, *last]
    yield from examples(NAME, row_id, tools, turns, notes=notes, last_only=True)


def _tool_list(instruction: str) -> list[dict[str, Any]]:
    """The numbered tools of the instruction: name, description, flat parameters."""
    section = _SECTION.search(instruction)
    if section is None:
        raise RowError("no_tools", excerpt=instruction)
    result = []
    for entry in _ENTRY.split(section[1])[1:]:
        found = list(_PARAMETERS.finditer(entry))
        if not found:
            raise RowError("bad_tools", "a tool has no parameters", excerpt=entry)
        head, parameters = entry[: found[-1].start()], entry[found[-1].end() :]
        name, description = (*_DESCRIPTION.split(head, maxsplit=1), "")[:2]
        try:
            value = read_value(parameters)
        except RowError as error:
            raise RowError("bad_tools", str(error), excerpt=parameters) from None
        result.append(
            {"name": name.strip().strip("*").strip(), "description": description.strip(), "parameters": value or {}}
        )
    return result


def _read_turns(text: str) -> list[Turn]:
    """Turns out of tagged text; thoughts, calls and a response that follow each other are one assistant turn."""
    turns: list[Turn] = []
    think: str | None = None
    blocks: list[str] = []
    response = ""

    def close() -> None:
        nonlocal think, response
        if think is None and not blocks and not response:
            return
        raw = "\n".join([*blocks, response])
        try:
            calls = read_tagged("\n".join(blocks)).calls
            turns.append(Turn("assistant", response, calls, None if _is_stock(think) else think, raw=raw))
        except RowError as error:
            turns.append(Turn("assistant", response, error=error, raw=raw))
        blocks.clear()
        think, response = None, ""

    position = 0
    while text[position:].strip():
        tag = _TAG.match(text, position)
        if tag is None:
            raise RowError("unreadable_history", "text stands between the tags", excerpt=text[position:])
        name, start = tag[1], tag.end()
        end = _block_end(text, start, name)
        content = text[start:end].strip()
        position = end + len(f"</{name}>")
        if name in ("user", "obs"):
            close()
            turns.append(Turn("user" if name == "user" else "tool", content))
        elif name == "think":
            if think is not None or blocks or response:
                close()
            think = content
        elif name == "tool_call":
            if response:
                close()
            blocks.append(f"<tool_call>{content}</tool_call>")
        else:
            response = f"{response}\n{content}".strip()
    close()
    return turns


def _block_end(text: str, start: int, name: str) -> int:
    """Where the block's closing tag is; one that another tag (or the end) follows, since texts may mention tags."""
    close = f"</{name}>"
    end = text.find(close, start)
    if end < 0:
        raise RowError("unclosed_call" if name == "tool_call" else "unreadable_history", f"no {close}", excerpt=text)
    while True:
        after = end + len(close)
        if not text[after:].strip() or _TAG.match(text, after):
            return end
        end = text.find(close, after)
        if end < 0:
            raise RowError("unreadable_history", "text stands between the tags", excerpt=text[after:])


def _is_stock(think: str | None) -> bool:
    return think is None or not think or _STOCK.fullmatch(think) is not None
