"""Types of arguments as data sets write them, read into JSON schema.

Understood are JSON schema's own names, Python annotations (`List[int]`, `Dict[str, float]`, `Optional[str]`,
`int | None`, `Literal['a', 'b']`), common names from elsewhere (`dict`, `double`, `varchar`), and the suffix
`, optional`. Text that is none of these is None, for the caller to count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Schema = dict[str, Any]

_NAMES = {
    "string": "str string text char varchar character uuid url uri email path date time datetime timestamp enum regex",
    "integer": "int integer long bigint int32 int64 uint short",
    "number": "float number double decimal numeric real float32 float64",
    "boolean": "bool boolean",
    "array": "list array tuple set frozenset sequence iterable collection vector",
    "object": "dict object map mapping hash json struct dictionary hashmap",
    "null": "none null nonetype void",
    "": "any anything unknown",
}
_TYPES = {name: kind for kind, names in _NAMES.items() for name in names.split()}

_OPTIONAL = re.compile(r"[,;]?\s*\(?\boptional\b\)?(?!\s*\[)", re.IGNORECASE)
_REQUIRED = re.compile(r"[,;]\s*\(?\brequired\b\)?", re.IGNORECASE)
_DEFAULT = re.compile(r"[,;]\s*\(?\bdefaults?\b.*", re.IGNORECASE | re.DOTALL)
_OF = re.compile(r"^\s*(?:list|array|sequence|set)s?\s+of\s+(.+?)\s*$", re.IGNORECASE | re.DOTALL)
_PART = re.compile(r"""\s*([A-Za-z_][\w.]*|\.\.\.|[\[\]|,]|'[^']*'|"[^"]*"|-?\d+(?:\.\d+)?)""")
_MAX_TEXT = 400


@dataclass(frozen=True)
class Annotation:
    """A type that was read: its schema ({} for any value), and whether the text makes the argument optional."""

    schema: Schema
    optional: bool


class _Unreadable(ValueError):
    pass


@lru_cache(maxsize=4096)
def read_annotation(text: str) -> Annotation | None:
    """The schema a type's text stands for, or None when it cannot be read. The result is shared: do not change it."""
    text = text[:_MAX_TEXT].replace("<", "[").replace(">", "]")
    text = _REQUIRED.sub("", text)
    without = _OPTIONAL.sub("", _DEFAULT.sub("", text))
    optional = without != text
    of = _OF.match(without)
    if of is not None:
        inner = of[1] if of[1].lower() in _TYPES else of[1].removesuffix("s")
        without = f"List[{inner}]"
    parts = _split(without)
    if parts is None:
        return None
    try:
        schema, is_null = _Parser(parts).parse()
    except (_Unreadable, RecursionError):
        return None
    return Annotation(schema, optional or is_null)


def union(members: list[Schema]) -> tuple[Schema, bool]:
    """One schema that accepts what any member does, null left out; and whether null was among them."""
    kept = [member for member in members if member.get("type") != "null"]
    nullable = len(kept) < len(members)
    unique = [member for i, member in enumerate(kept) if member not in kept[:i]]
    if not unique or {} in unique:
        return {}, nullable
    if len(unique) == 1:
        return unique[0], nullable
    if all(set(member) == {"type"} and isinstance(member["type"], str) for member in unique):
        return {"type": [member["type"] for member in unique]}, nullable
    return {"anyOf": unique}, nullable


def _split(text: str) -> list[str] | None:
    parts, position, text = [], 0, text.strip()
    while position < len(text):
        part = _PART.match(text, position)
        if part is None:
            return None
        parts.append(part[1])
        position = part.end()
    return parts


class _Parser:
    """`A | B[C, D]` by recursive descent."""

    def __init__(self, parts: list[str]) -> None:
        self._parts, self._next = parts, 0

    def parse(self) -> tuple[Schema, bool]:
        result = self._union()
        if self._next != len(self._parts):
            raise _Unreadable
        return result

    def _peek(self) -> str:
        return self._parts[self._next] if self._next < len(self._parts) else ""

    def _take(self) -> str:
        part = self._peek()
        self._next += 1
        return part

    def _union(self) -> tuple[Schema, bool]:
        members, optional = [], False
        while True:
            schema, is_optional = self._single()
            members.append(schema)
            optional |= is_optional
            if self._peek() != "|":
                schema, nullable = union(members)
                return schema, optional or nullable
            self._take()

    def _single(self) -> tuple[Schema, bool]:
        name = self._take().rpartition(".")[2].lower()
        if name == "literal":
            return {"enum": self._values()}, False
        if name in ("optional", "union", "annotated", "required", "notrequired"):
            members = self._members()
            if not members:
                raise _Unreadable
            if name in ("annotated", "required", "notrequired"):
                return members[0], name == "notrequired"
            schema, nullable = union(members)
            return schema, nullable or name == "optional"
        if name not in _TYPES:
            raise _Unreadable
        kind = _TYPES[name]
        members = self._members() if self._peek() == "[" else None
        if kind == "array" and members:
            return _array(name, members), False
        if kind == "object" and members and len(members) == 2:
            values = members[1]
            return ({"type": "object", "additionalProperties": values} if values else {"type": "object"}), False
        return ({"type": kind} if kind else {}), False

    def _members(self) -> list[Schema]:
        """The schemas between brackets; an ellipsis, or text in quotes, is left out."""
        if self._take() != "[":
            raise _Unreadable
        members: list[Schema] = []
        while True:
            if self._peek() == "...":
                self._take()
                members.append({"...": True})
            elif self._peek()[:1] in ("'", '"'):
                self._take()
            else:
                members.append(self._union()[0])
            closing = self._take()
            if closing == "]":
                return members
            if closing != ",":
                raise _Unreadable

    def _values(self) -> list[Any]:
        if self._take() != "[":
            raise _Unreadable
        values: list[Any] = []
        while True:
            part = self._take()
            if part[:1] in ("'", '"'):
                values.append(part[1:-1])
            elif re.fullmatch(r"-?\d+", part):
                values.append(int(part))
            elif part.lower() in ("true", "false"):
                values.append(part.lower() == "true")
            else:
                raise _Unreadable
            closing = self._take()
            if closing == "]":
                return values
            if closing != ",":
                raise _Unreadable


def _array(name: str, members: list[Schema]) -> Schema:
    endless = {"...": True} in members
    members = [member for member in members if "..." not in member]
    if not members:
        return {"type": "array"}
    if name == "tuple" and not endless and any(member != members[0] for member in members):
        return {"type": "array", "prefixItems": members}
    return {"type": "array", "items": members[0]} if members[0] else {"type": "array"}
