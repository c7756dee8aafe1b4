"""Values written as JSON or as Python literals, read without ever evaluating anything.

Data sets mix both, even in one reply. `read_value` tries JSON, then a Python literal; whatever comes out is a plain
JSON value: objects with string keys, lists, strings without half surrogate pairs, finite numbers, no key twice.
Anything else is a `RowError`, on any string. What a value means is left to the readers.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

from autotool_fast.tasks.sources.rows import RowError

MAX_DEPTH = 64
_MAX_INT_BITS = 1024  # beyond this no tool means the number, and printing it can fail

TOKEN = re.compile(
    r"'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''"
    r'|"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'
    r"|'[^'\\]*(?:\\.[^'\\]*)*'"
    r'|"[^"\\]*(?:\\.[^"\\]*)*"'
    r"""|['"()\[\]{},=]""",
    re.DOTALL,
)
"""A whole quoted string, a quote that is never closed, or one character of structure."""

_CONSTANTS = {"true": True, "false": False, "null": None}
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_RAW_NEWLINE = re.compile(r"(?<!\\)\r?\n")


def tokens(text: str, start: int = 0) -> Iterator[re.Match[str]]:
    """Quoted strings and structure from `start` on; a quote that is never closed is the last token."""
    for token in TOKEN.finditer(text, start):
        yield token
        if token.group() in ("'", '"'):
            return


def read_value(text: str) -> Any:
    """A JSON value out of JSON or a Python literal (`true`, `false`, `null` are understood in either).

    Raises:
        RowError: for anything that is not exactly one such value.
    """
    text = text.strip()
    check_depth(text)
    try:
        value = _JSON.decode(text)
    except (ValueError, RecursionError):
        return read_python(text)
    return clean(value)


def read_values(text: str) -> list[Any]:
    """One value, or several JSON values written one after another; never empty.

    Raises:
        RowError: as for `read_value`.
    """
    try:
        return [read_value(text)]
    except RowError as error:
        whole = error
    values, position, text = [], 0, text.strip()
    while position < len(text):
        try:
            value, position = _JSON.raw_decode(text, position)
        except (ValueError, RecursionError):
            break
        values.append(clean(value))
        position = _BETWEEN.match(text, position).end()
    if values and position >= len(text):
        return values
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        raise whole
    return [read_value(line) for line in lines]


def read_python(text: str) -> Any:
    """A JSON value out of a Python literal; a raw line break inside quotes counts as its escape.

    Raises:
        RowError: not_a_literal, not_json_value, or as for `clean`.
    """
    check_depth(text)
    if "\n" in text:
        text = _escape_newlines(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in a string warns, and means what it says
        try:
            node = _Constants().visit(ast.parse(text.strip(), mode="eval").body)
            for part in ast.walk(node):
                if isinstance(part, ast.Dict):
                    keys = [key.value for key in part.keys if isinstance(key, ast.Constant)]
                    if len(set(keys)) < len(keys):
                        raise RowError("duplicate_key", excerpt=text)
            value = ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise RowError("not_a_literal", excerpt=text) from None
    return clean(value)


def check_depth(text: str) -> None:
    """Refuse brackets nested deeper than `MAX_DEPTH`: parsers recurse, and the interpreter's own can crash."""
    if sum(map(text.count, "([{")) <= MAX_DEPTH:
        return
    depth = 0
    for token in tokens(text):
        if token.group() in ("(", "[", "{"):
            depth += 1
            if depth > MAX_DEPTH:
                raise RowError("nested_too_deeply", excerpt=text)
        elif token.group() in (")", "]", "}"):
            depth -= 1


def clean(value: Any, depth: int = 0) -> Any:
    """A decoded value as plain JSON: tuples become lists, halves of surrogate pairs are joined.

    Raises:
        RowError: not_json_value, non_string_key, non_finite_number, lone_surrogate or nested_too_deeply.
    """
    if depth > MAX_DEPTH:
        raise RowError("nested_too_deeply")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, int):
        if value.bit_length() > _MAX_INT_BITS:
            raise RowError("non_finite_number", "an integer is too large")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RowError("non_finite_number")
        return value
    if isinstance(value, (list, tuple)):
        return [clean(item, depth + 1) for item in value]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise RowError("non_string_key", repr(key))
        return {clean_text(key): clean(item, depth + 1) for key, item in value.items()}
    raise RowError("not_json_value", type(value).__name__)


def clean_text(text: str) -> str:
    """The text with surrogate pairs joined; half a pair is a RowError (lone_surrogate)."""
    if _SURROGATE.search(text) is None:
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise RowError("lone_surrogate", excerpt=text) from None


def _escape_newlines(text: str) -> str:
    """Write line breaks inside plain quotes as escapes."""
    pieces, position = [], 0
    for token in tokens(text):
        quoted = token.group()
        if len(quoted) > 1 and not quoted.startswith(("'''", '"""')):
            pieces += [text[position : token.start()], _RAW_NEWLINE.sub(r"\\n", quoted)]
            position = token.end()
    return "".join([*pieces, text[position:]])


class _Constants(ast.NodeTransformer):
    """JSON's constants, where Python sees names."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in _CONSTANTS:
            return ast.copy_location(ast.Constant(_CONSTANTS[node.id]), node)
        return node


def _reject_constant(name: str) -> Any:
    raise RowError("non_finite_number", name)


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise RowError("duplicate_key")
    return result


# strict=False: a raw control character inside quotes can only mean itself, and data sets have them.
_JSON = json.JSONDecoder(parse_constant=_reject_constant, object_pairs_hook=_unique_object, strict=False)
