"""Calls written as a list in Python syntax: `[Pool Temperature(pool_id=3, unit="C"), Close()]`.

Neither tool names nor argument names need be identifiers: they may hold spaces, dots, slashes, hyphens, keywords. The
text is split by a scanner that knows quotes and brackets; only the values are handed to `literal`. Whether the tools
and arguments exist is left to `schemas`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from autotool_fast.chat import ToolCall
from autotool_fast.tasks.sources.literal import read_python, tokens
from autotool_fast.tasks.sources.rows import RowError

_CLOSES = {"(": ")", "[": "]", "{": "}"}
_SPACE = re.compile(r"\s*")


def holds_calls(text: str, names: Collection[str]) -> bool:
    """Whether the text is or contains an attempt at calls: a bracketed list, or a tool's name before a parenthesis."""
    bare = text.strip()
    if bare.startswith("[") and bare.endswith("]") and "(" in bare:
        return True
    known = "|".join(map(re.escape, names))
    return bool(known) and re.search(rf"(?<!\w)(?:{known})\(", text) is not None


def parse_calls(text: str, names: Collection[str] = ()) -> tuple[ToolCall, ...]:
    """Read a call list, with or without its outer brackets.

    Args:
        text: the whole reply; white space around it and after the last comma is accepted.
        names: tools on offer; needed only for names that contain a parenthesis.

    Raises:
        RowError: unreadable_calls, unclosed_call, text_around_calls, positional_argument, duplicate_argument,
            argument_not_literal, or as for `literal.read_python`.
    """
    position = _skip(text, 0)
    listed = text.startswith("[", position)
    position = _skip(text, position + 1) if listed else position
    calls: list[ToolCall] = []
    while True:
        if listed and text.startswith("]", position):
            break
        name, position = _read_name(text, position, names)
        arguments, position = _read_arguments(text, position)
        calls.append(ToolCall(name, arguments))
        position = _skip(text, position)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
        elif position == len(text) and not listed:
            return tuple(calls)
        elif not (listed and text.startswith("]", position)):
            raise RowError("unclosed_call" if position == len(text) else "text_around_calls", excerpt=text[position:])
    end = _skip(text, position + 1)
    if end < len(text):
        raise RowError("text_around_calls", excerpt=text[end:])
    return tuple(calls)


def _skip(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()


def _read_name(text: str, start: int, names: Collection[str]) -> tuple[str, int]:
    """The name at `start` and the position after its opening parenthesis."""
    for name in sorted(names, key=len, reverse=True):
        if name and text.startswith(name, start):
            end = _skip(text, start + len(name))
            if text.startswith("(", end):
                return name, end + 1
    end = text.find("(", start)
    name = text[start:end].strip()
    if end < 0 or not name:
        raise RowError("unclosed_call" if start >= len(text) else "unreadable_calls", excerpt=text[start:])
    return name, end + 1


def _read_arguments(text: str, start: int) -> tuple[dict[str, Any], int]:
    """The arguments from `start` on, and the position after the closing parenthesis."""
    arguments: dict[str, Any] = {}
    open_brackets: list[str] = []
    key_end = -1
    for token in tokens(text, start):
        mark, place = token.group(), token.start()
        if mark in _CLOSES:
            open_brackets.append(_CLOSES[mark])
        elif open_brackets and mark in (")", "]", "}"):
            if mark != open_brackets.pop():
                raise RowError("unreadable_calls", "brackets do not match", excerpt=text[place:])
        elif open_brackets:
            continue
        elif mark == "=" and key_end < 0:
            key_end = place
        elif mark in (",", ")"):
            _add_argument(arguments, text, start, key_end, place, last=mark == ")")
            start, key_end = token.end(), -1
            if mark == ")":
                return arguments, start
        elif mark in ("]", "}"):
            raise RowError("unreadable_calls", "brackets do not match", excerpt=text[place:])
    raise RowError("unclosed_call", excerpt=text[start:])


def _add_argument(
    arguments: dict[str, Any], text: str, start: int, key_end: int, end: int, *, last: bool
) -> None:
    if key_end < 0:
        if not text[start:end].strip() and last:
            return  # no arguments, or a comma after the last
        raise RowError("positional_argument", excerpt=text[start:end])
    key, value = text[start:key_end].strip(), text[key_end + 1 : end]
    if key[:1] in ("'", '"'):
        key = read_python(key)
    if not isinstance(key, str) or not key:
        raise RowError("unreadable_calls", "an argument has no name", excerpt=text[start:end])
    if key in arguments:
        raise RowError("duplicate_argument", key)
    try:
        arguments[key] = read_python(value)
    except RowError as error:
        if error.reason == "not_a_literal":
            raise RowError("argument_not_literal", key, excerpt=value) from None
        raise
