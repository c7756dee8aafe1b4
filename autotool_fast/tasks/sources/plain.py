"""Plain records: `tasks.example.Example` as JSON. Users bring data of their own in it, and `prepare` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from autotool_fast.tasks.example import Example
from autotool_fast.tasks.sources.dialogues import language
from autotool_fast.tasks.sources.rows import RowError

NAME = "jsonl"


def matches(row: dict[str, Any]) -> bool:
    """Whether a row looks like a record."""
    return {"tools", "messages", "answer"} <= set(row)


def read_row(row: dict[str, Any], row_id: str) -> Iterator[Example | RowError]:
    """The record itself; an id, a language or a text that is missing is filled in.

    Raises:
        RowError: when the row is unusable.
    """
    example = Example.from_json(row)
    said = [message["content"] for message in example.messages if message["role"] == "user"]
    yield replace(example, id=example.id or row_id, meta={"language": language(said[-1]), **example.meta})
