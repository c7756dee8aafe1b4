"""Calls written the way data sets write them, and strategies for calls and broken text. Independent of the readers."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from autotool_fast.chat import ToolCall

# Names the Python-call syntax can carry: anything without the characters that structure it.
NAMES = st.text(st.sampled_from("abz09 ._/-|?$:中é'\""), min_size=1, max_size=12).filter(
    lambda name: name == name.strip() and name[0] not in "'\"" and "," not in name
)
KEYS = st.one_of(
    st.sampled_from(["class", "from", "max-price", "a b", "x.y", "True", "参数", "1st", "$id"]),
    st.text(st.sampled_from("abz09 ._/-?$:中é"), min_size=1, max_size=8).filter(lambda key: key == key.strip()),
)
TEXTS = st.one_of(
    st.sampled_from(["a, b)", "x=1", "[f(a=1)]", "it's", '"', "\\", "\n", "</tool_call>", "{'a': 1}", "None", "😀"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False))
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
CALLS = st.builds(ToolCall, NAMES, st.dictionaries(KEYS, VALUES, max_size=4))
CALL_LISTS = st.lists(CALLS, min_size=1, max_size=4)

PIECES = (
    "[", "]", "(", ")", "{", "}", ",", "=", "'", '"', "'''", "\\", "\n", " ", "f", "Pool 3", "a=1", "a", "1", "-", "+",
    "1e999", "NaN", "0x" + "f" * 900, "None", "true", "b'x'", "{1}", "1j", "lambda: 0", "__import__('os')", "f'{a}'",
    "\x00", "-" * 300, "\ud800", "<tool_call>", "</tool_call>", "<tools>", "<user>", "</user>", "<think>", '"name"',
    '"arguments"', ":", '{"name": "f", "arguments": {}}', "f(a=1)", "中", "1. Name: f\n", "Parameters: {", "\u2028",
    "(" * 70,
)  # fmt: skip
JUNK = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=24).map("".join))
"""Strings that are almost, or not at all, what a reader expects."""


def python_list(calls: list[ToolCall]) -> str:
    """`[name(key=value, ...), ...]`, values as Python literals."""
    items = (f"{c.name}({', '.join(f'{key}={value!r}' for key, value in c.arguments.items())})" for c in calls)
    return f"[{', '.join(items)}]"


def json_list(calls: list[ToolCall]) -> str:
    """A JSON list of `{"name", "arguments"}`."""
    return json.dumps([{"name": c.name, "arguments": c.arguments} for c in calls])


def repr_blocks(calls: list[ToolCall]) -> str:
    """A tag pair around the Python literal of each call."""
    bodies = (repr({"arguments": c.arguments, "name": c.name}) for c in calls)
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def json_blocks(calls: list[ToolCall]) -> str:
    """A tag pair around the JSON of each call."""
    bodies = (json.dumps({"name": c.name, "arguments": c.arguments}, ensure_ascii=False) for c in calls)
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def json_lines(calls: list[ToolCall]) -> str:
    """One tag pair around one JSON object per line, with `parameters`."""
    lines = (json.dumps({"name": c.name, "parameters": c.arguments}) for c in calls)
    return "<tool_call>\n" + "\n".join(lines) + "\n</tool_call>"
