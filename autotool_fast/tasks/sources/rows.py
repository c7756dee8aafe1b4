"""Rows of a data file that cannot be used: why, and where they are.

A reader raises `RowError` with a code out of `REASONS`; the codes are stable, counted and documented. Whoever knows the
file and the row turns it into a `Reject`, which is what the rejects file holds. Nothing is dropped without one.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

REASONS = {
    "after_unreadable_turn": "an earlier turn of the dialogue could not be read, so the history is incomplete",
    "argument_not_literal": "an argument of a call in Python syntax is no literal value",
    "bad_arguments": "the arguments of a call are no object",
    "bad_call": "a call is no object with a name and arguments",
    "bad_json": "the line is no JSON",
    "bad_row": "the row, or one of its fields, is missing or has the wrong kind",
    "bad_tools": "the list of tools cannot be read",
    "calls_in_text": "a call stands inside prose",
    "duplicate_argument": "an argument is given twice",
    "duplicate_key": "an object has a key twice",
    "duplicate_tool": "two different tools have one name",
    "empty_reply": "the assistant's turn is empty",
    "lone_surrogate": "a text holds half a surrogate pair, which has no UTF-8 form",
    "nested_too_deeply": "brackets are nested too deeply",
    "no_answer": "the dialogue has no assistant turn",
    "no_prompt": "the turn follows neither a user's nor a tool's turn",
    "no_tools": "the row offers no tool",
    "no_user_message": "no user message comes before the assistant's turn",
    "non_finite_number": "a number is not finite, or too large",
    "non_string_key": "a key of an object is no string",
    "not_a_literal": "the value is neither JSON nor a Python literal",
    "not_json_value": "the Python literal has no JSON form (a set, bytes, a complex number)",
    "positional_argument": "a call in Python syntax has an argument without a name",
    "text_around_calls": "text stands before or after the calls, where the format has none",
    "unclosed_call": "a call block or bracket is never closed",
    "unknown_argument": "a call has an argument that its tool does not have",
    "unknown_role": "a turn has an unknown role",
    "unknown_tool": "a call names a tool that is not offered",
    "unreadable_calls": "the calls do not follow the format",
    "unreadable_history": "the dialogue history does not follow the format",
}

NOTES = {
    "answer_misses_required": "a call leaves out an argument that its tool requires",
    "answer_type_mismatch": "an argument does not have the type its tool declares",
    "default_of_other_type": "a default does not fit its type and was left out",
    "required_unknown": "a required argument is not among the tool's arguments and was left out",
    "unknown_type": "an argument's type could not be read, any value is accepted",
}
"""What was repaired in, or is suspicious about, a record that is kept (`meta["notes"]`)."""

_EXCERPT = 160
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class RowError(Exception):
    """A row, or one turn of it, that cannot be used.

    Args:
        reason: a code out of `REASONS`.
        detail: what exactly, in a few words; may be empty.
        excerpt: the text at fault; shortened.
        turn: index of the assistant turn, or None when it is the whole row.
    """

    def __init__(self, reason: str, detail: str = "", *, excerpt: str = "", turn: int | None = None) -> None:
        assert reason in REASONS, reason
        self.reason, self.detail, self.turn = reason, shorten(detail), turn
        self.excerpt = shorten(excerpt)
        super().__init__(f"{reason}: {detail}" if detail else reason)

    def at(self, *, turn: int | None = None, excerpt: str = "") -> RowError:
        """The same error with a place or an excerpt, where it has none yet."""
        return RowError(
            self.reason,
            self.detail,
            excerpt=self.excerpt or excerpt,
            turn=turn if self.turn is None else self.turn,
        )


@dataclass(frozen=True)
class Reject:
    """One entry of the rejects file.

    Attributes:
        file: path of the data file.
        row: zero-based position of the row; of the line, counting empty ones, in JSONL.
        turn: zero-based index of the assistant turn, or None when it is the whole row.
        reason: a code out of `REASONS`.
    """

    file: str
    row: int
    turn: int | None
    reason: str
    detail: str
    excerpt: str

    @classmethod
    def of(cls, error: RowError, file: str, row: int) -> Reject:
        """The error with its position."""
        return cls(file, row, error.turn, error.reason, error.detail, error.excerpt)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def shorten(text: str, limit: int = _EXCERPT) -> str:
    """The text on one line, at most `limit` characters long; control characters and half surrogate pairs become ?."""
    line = _HIDDEN.sub("?", " ".join(text[: 4 * limit].split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"
