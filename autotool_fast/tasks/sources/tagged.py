"""Replies with `<tool_call>` blocks around calls, as JSON or as Python literals.

The content of a block is decoded before its closing tag is believed, so a tag inside a string is part of the string.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from autotool_fast.chat import ToolCall
from autotool_fast.tasks.example import read_call
from autotool_fast.tasks.sources.literal import read_values
from autotool_fast.tasks.sources.rows import RowError

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_TRIES = 16  # closing tags tried per block


@dataclass(frozen=True)
class TaggedReply:
    """The calls of a reply, and the text around them."""

    calls: tuple[ToolCall, ...]
    text: str


def read_tagged(text: str) -> TaggedReply:
    """Read every block of a reply; one block may hold one call, a list of calls, or one call per line.

    Raises:
        RowError: unclosed_call, bad_call, bad_arguments, unreadable_calls (a closing tag without a block), or as for
            `literal.read_values`.
    """
    calls: list[ToolCall] = []
    texts: list[str] = []
    position = 0
    while (start := text.find(_OPEN, position)) >= 0:
        texts.append(text[position:start])
        values, position = read_block(text, start + len(_OPEN), _CLOSE)
        for value in values:
            calls += map(read_call, value if isinstance(value, list) else [value])
    texts.append(text[position:])
    rest = "".join(texts)
    if _CLOSE in rest or re.search(r"<tool_call\b", rest):
        raise RowError("unreadable_calls", "a tag without its partner", excerpt=text)
    return TaggedReply(tuple(calls), rest.strip())


def read_block(text: str, start: int, close: str) -> tuple[list[Any], int]:
    """The values between `start` and the first closing tag that leaves something readable; and the end position.

    Raises:
        RowError: unclosed_call, or why the text up to the first closing tag cannot be read.
    """
    problem: RowError | None = None
    end = start
    for _ in range(_TRIES):
        end = text.find(close, end)
        if end < 0:
            break
        try:
            return read_values(text[start:end]), end + len(close)
        except RowError as error:
            problem = problem or error
        end += len(close)
    raise problem or RowError("unclosed_call", excerpt=text[start:])
