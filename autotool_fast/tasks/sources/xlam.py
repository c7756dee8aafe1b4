"""xLAM function calling: `{"id", "query", "answers", "tools"}`, the last two often JSON in a string, single turn.

Parameters are a flat map with Python annotations; what is required is inferred (neither optional nor with a default). A
row with an empty answer is one where no call is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autotool_fast.tasks.example import NO_CALL_TEXT, Example, read_call
from autotool_fast.tasks.sources.dialogues import Turn, examples, text_field
from autotool_fast.tasks.sources.literal import read_value
from autotool_fast.tasks.sources.rows import RowError
from autotool_fast.tasks.sources.schemas import read_tools

NAME = "xlam"
_ENCODINGS = 3


def matches(row: dict[str, Any]) -> bool:
    """Whether a row looks like this data set's."""
    return {"query", "answers", "tools"} <= set(row)


def read_row(row: dict[str, Any], row_id: str) -> Iterator[Example | RowError]:
    """The example of one row.

    Raises:
        RowError: when the row is unusable.
    """
    query = text_field(row, "query")
    try:
        listed = _decode(row, "tools")
    except RowError as error:
        raise RowError("bad_tools", str(error), excerpt=str(row.get("tools"))) from None
    tools, notes = read_tools(listed)
    answers = _decode(row, "answers")
    answers = [answers] if isinstance(answers, dict) else answers
    if not isinstance(answers, list):
        raise RowError("bad_row", "answers is no list", excerpt=str(row["answers"]))
    calls = tuple(read_call(answer) for answer in answers)
    answer = Turn("assistant", "" if calls else NO_CALL_TEXT, calls, raw=str(row["answers"]))
    yield from examples(NAME, row_id, tools, [Turn("user", query), answer], notes=notes)


def _decode(row: dict[str, Any], name: str) -> Any:
    """A field that may be JSON in a string, even in a string in a string."""
    if name not in row:
        raise RowError("bad_row", f"{name} is missing")
    value = row[name]
    for _ in range(_ENCODINGS):
        if not isinstance(value, str):
            break
        value = read_value(value)
    return value
