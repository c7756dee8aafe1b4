"""Validated settings: the dataclass machinery under `autotool_fast.config`.

A section is a frozen dataclass that derives from `Section`. Construction coerces each field to its annotated
type (lists become tuples, whole numbers become floats) and checks the bounds that `number(...)` recorded, so
a field is added or removed by editing one line. Every problem is a `UserError` whose `where` is the dotted
name (`rl.lr`). What the settings mean is left to `config.py`; files and the command line to `cli.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, TypeVar, Union

from autotool_fast.errors import UserError

S = TypeVar("S", bound="Section")


def number(
    default: float | int,
    *,
    above: float | None = None,
    low: float | None = None,
    below: float | None = None,
    high: float | None = None,
) -> Any:
    """A numeric field with bounds: `above`/`below` exclusive, `low`/`high` inclusive."""
    bounds = {"above": above, "low": low, "below": below, "high": high}
    return dataclasses.field(default=default, metadata={k: v for k, v in bounds.items() if v is not None})


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None when nothing is close.

    A dotted candidate is also compared by its last part, so that `lr` and `r1.lr` both find `rl.lr`.
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if not close:
        tail = difflib.get_close_matches(_tail(name), {_tail(k): None for k in known}, n=1)
        same_tail = [k for k in known if [_tail(k)] == tail]
        close = difflib.get_close_matches(name, same_tail, n=1, cutoff=0.0)
    return close[0] if close else None


def _tail(dotted: str) -> str:
    return dotted.rpartition(".")[2]


class Section:
    """Base of every settings section; see the module docstring."""

    section: ClassVar[str] = ""
    """Dotted prefix of the section in error messages; empty for the root."""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            where = self.dotted(field.name)
            value = _conform(getattr(self, field.name), hints[field.name], where)
            _check_bounds(value, field.metadata, where)
            object.__setattr__(self, field.name, value)
        self.validate()

    def validate(self) -> None:
        """Checks that involve several fields; overridden where there are any."""

    def dotted(self, name: str) -> str:
        """Dotted name of one of this section's fields."""
        return f"{self.section}.{name}" if self.section else name

    def require(self, holds: bool, name: str, what: str, remedy: str | None = None) -> None:
        """Raise `UserError(what)` at field `name` unless `holds`."""
        if not holds:
            raise UserError(what, where=self.dotted(name), remedy=remedy)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def to_dict(settings: Section) -> dict[str, Any]:
    """The settings as nested JSON-able dicts (tuples become lists), in field order."""

    def plain(value: Any) -> Any:
        if isinstance(value, Section):
            return to_dict(value)
        return list(value) if isinstance(value, tuple) else value

    return {f.name: plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}  # type: ignore[arg-type]


def from_dict(cls: type[S], values: dict[str, Any], *, source: str | None = None) -> S:
    """Build `cls` from nested dicts; keys left out keep their defaults.

    Args:
        values: as read from TOML or JSON.
        source: the file, named in the message about an unknown key.

    Raises:
        UserError: an unknown key (naming the nearest known one), a bad type or value, a failed check.
    """
    return _build(cls, values, source, "", leaf_paths(cls))


def leaf_paths(cls: type[Section], prefix: str = "") -> dict[str, Any]:
    """Dotted name of every leaf field of a section class -> its type annotation, in field order."""
    paths: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = _hints(cls)[field.name]
        if isinstance(hint, type) and issubclass(hint, Section):
            paths.update(leaf_paths(hint, f"{prefix}{field.name}."))
        else:
            paths[prefix + field.name] = hint
    return paths


def _build(cls: type[S], values: Any, source: str | None, prefix: str, known: Iterable[str]) -> S:
    if not isinstance(values, dict):
        raise UserError(f"must be a table of settings, got {values!r}", where=prefix.rstrip("."))
    fields = {f.name: _hints(cls)[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            # A misspelt section is named as a section, a misspelt setting by its full dotted name.
            candidates = [k for k in fields if isinstance(value, dict)] or list(known)
            guess = nearest(prefix + key, candidates)
            raise UserError(
                f"unknown setting '{prefix}{key}'",
                where=source,
                remedy=f"did you mean '{guess}'?" if guess else "see --help for the settings",
            )
        hint = fields[key]
        nested = isinstance(hint, type) and issubclass(hint, Section)
        arguments[key] = _build(hint, value, source, f"{prefix}{key}.", known) if nested else value
    return cls(**arguments)


def check_text(text: str, hint: Any, where: str) -> None:
    """Check that `text`, one value from a command line, reads as the annotated type (or as its items).

    Raises:
        UserError: at `where`, saying what the setting takes.
    """
    item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
    readings: list[Any] = [text]
    for number_type in (int, float):
        with contextlib.suppress(ValueError):
            readings.append(number_type(text))
    for reading in reversed(readings[1:]):
        with contextlib.suppress(UserError):
            _conform(reading, item, where)
            return
    _conform(text, item, where)


def _conform(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type, or a `UserError`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _conform(value, option, where)
            except UserError:
                continue
        raise UserError(f"must be {' or '.join(map(_describe, args))}, got {value!r}", where=where)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        guess = nearest(value, map(str, args)) if isinstance(value, str) else None
        raise UserError(
            f"must be {_describe(hint)}, got {value!r}",
            where=where,
            remedy=f"did you mean '{guess}'?" if guess else None,
        )
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"must be a list, got {value!r}", where=where)
        return tuple(_conform(item, args[0], where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    matches = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not matches:
        raise UserError(f"must be {_describe(hint)}, got {value!r}", where=where)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"must be finite, got {value}", where=where)
    return value


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _check_bounds(value: Any, bounds: typing.Mapping[str, float], where: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    checks = (
        ("above", "greater than", lambda limit: value > limit),
        ("low", "at least", lambda limit: value >= limit),
        ("below", "less than", lambda limit: value < limit),
        ("high", "at most", lambda limit: value <= limit),
    )
    for key, words, holds in checks:
        if key in bounds and not holds(bounds[key]):
            raise UserError(f"must be {words} {bounds[key]:g}, got {value:g}", where=where)
