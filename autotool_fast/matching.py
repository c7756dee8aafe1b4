"""When two lists of tool calls are the same answer.

Calls are compared as a multiset of (name, canonical arguments): the order of calls and of object keys is
free, the order inside arrays is not. `strict` keeps JSON numbers apart as written (3 is not 3.0); the
normalised comparison joins numbers of equal value. A boolean is never a number in either. Strings are
compared exactly.

Parsing, schema checks and rewards are left to others; any object with `.name` and `.arguments` is a call.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Protocol


class Call(Protocol):
    """What is compared: a tool name and its JSON arguments."""

    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> Mapping[str, Any]: ...


def _join_numbers(value: Any) -> Any:
    """Replace every float of integral value by that integer, at any depth (bool is left alone)."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _join_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_join_numbers(item) for item in value]
    return value


def canonical_json(value: Any, *, strict: bool = False) -> str:
    """One text per JSON value: sorted keys, no white space, equal numbers alike unless `strict`.

    The text is a comparison key, not a document: a float overflow such as 1e999 becomes `Infinity`, so that a
    model's output cannot raise here. Raises TypeError for values that are not JSON.
    """
    if not strict:
        value = _join_numbers(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def canonical_calls(
    calls: Iterable[Call],
    *,
    strict: bool = False,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> Counter[tuple[str, str]]:
    """The multiset of (name, canonical arguments).

    Args:
        calls: the calls of one reply.
        strict: see `canonical_json`.
        defaults: tool name -> argument name -> the schema's default. An argument that equals its default
            counts as absent, since data sets write it in some answers and leave it out of others.
    """
    keys: Counter[tuple[str, str]] = Counter()
    for call in calls:
        implied = {
            name: canonical_json(value, strict=strict)
            for name, value in ((defaults or {}).get(call.name) or {}).items()
        }
        said = {
            name: value
            for name, value in call.arguments.items()
            if name not in implied or canonical_json(value, strict=strict) != implied[name]
        }
        keys[call.name, canonical_json(said, strict=strict)] += 1
    return keys


def calls_match(
    predicted: Iterable[Call],
    expected: Iterable[Call],
    *,
    strict: bool = False,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> bool:
    """True when both lists hold the same calls equally often (arguments as in `canonical_calls`).

    Two empty lists match: no call was wanted and none was made.
    """
    wanted = canonical_calls(expected, strict=strict, defaults=defaults)
    try:
        made = canonical_calls(predicted, strict=strict, defaults=defaults)
    except RecursionError:
        # A model can nest deeper than the interpreter recurses; the expected calls did not, so they differ.
        return False
    return made == wanted
