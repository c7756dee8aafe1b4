"""From a file or folder to examples: which data set it is, told by content, and its rows with their positions.

`find_inputs` lists the files and the source of each; `read_input` streams examples and rejects. Rejects are counted by
whoever reads (`inspection`, `preparation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType

from autotool_fast.errors import UserError
from autotool_fast.tasks.example import Example
from autotool_fast.tasks.sources import hermes, plain, rlla, toolace, xlam
from autotool_fast.tasks.sources.files import SUFFIXES, rows
from autotool_fast.tasks.sources.literal import clean
from autotool_fast.tasks.sources.rows import Reject, RowError

SOURCES: dict[str, ModuleType] = {module.NAME: module for module in (toolace, xlam, hermes, rlla, plain)}
"""In the order in which a row is matched: ToolACE's rows have all that Hermes' have, and a system text."""

_WHERE = {
    "toolace": "download data.json of Team-ACE/ToolACE into it",
    "xlam": "accept the terms of Salesforce/xlam-function-calling-60k while logged in, then download its JSON file",
    "hermes": "download the func-calling files of NousResearch/hermes-function-calling-v1 into it",
    "rlla": "clone ToolRL and give its dataset/rlla_4k_raw folder",
    "jsonl": "put records into it, one JSON object per line",
    "auto": "download the data set first; a gated one only after accepting its terms",
}
_LOOKED_AT = 8  # rows from which a file is recognised
_NOT_DATA = {"dataset_infos.json", "dataset_info.json", "manifest.json", "package.json", "config.json", "rejects.jsonl"}


@dataclass(frozen=True)
class Input:
    """A data file: where it is, whose it is, and the name its examples' ids start with."""

    path: Path
    source: str
    label: str


@dataclass(frozen=True)
class Found:
    """What a path holds: files to read, and files that were left out with the reason."""

    inputs: tuple[Input, ...]
    skipped: tuple[tuple[Path, str], ...] = ()


def find_inputs(path: Path, source: str = "auto") -> Found:
    """The data files at a path, in a stable order.

    Args:
        path: a file, or a folder that is searched with its sub-folders (hidden ones left out).
        source: name out of `SOURCES`, or "auto"; in a folder, files of other sources are left out.

    Raises:
        UserError: nothing there, nothing recognised, or another data set than asked for.
    """
    if source != "auto" and source not in SOURCES:
        raise UserError(f"unknown source '{source}'", where="--source", remedy=f"use auto, {', '.join(SOURCES)}")
    if not path.exists():
        raise UserError("no such file or folder", where=str(path), remedy=_WHERE[source])
    if path.is_file():
        name, reason = _recognise(path, source)
        if name is None:
            raise UserError(reason, where=str(path), remedy="docs/data.md lists the formats")
        return Found((Input(path, name, path.stem),))
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in SUFFIXES and file.is_file() and not _hidden(file.relative_to(path))
    )
    inputs, skipped = [], []
    for file in files:
        if file.name in _NOT_DATA or _prepared_without_records(file):
            continue
        name, reason = _recognise(file, "auto")
        if name is not None and source not in ("auto", name):
            name, reason = None, f"is {name} data"
        if name is None:
            skipped.append((file, reason))
        else:
            inputs.append(Input(file, name, "-".join(file.relative_to(path).with_suffix("").parts)))
    if any(input.source == "rlla" and input.path.suffix != ".parquet" for input in inputs):
        doubled = [input for input in inputs if input.source == "rlla" and input.path.suffix == ".parquet"]
        skipped += [(input.path, "holds the rows of the JSON files again") for input in doubled]
        inputs = [input for input in inputs if input not in doubled]
    if not inputs:
        wanted = "a data set that is known here" if source == "auto" else f"{source} data"
        tried = f" ({skipped[0][0].name} {skipped[0][1]})" if skipped else ""
        raise UserError(f"no file of this folder holds {wanted}{tried}", where=str(path), remedy=_WHERE[source])
    return Found(tuple(inputs), tuple(skipped))


def _prepared_without_records(file: Path) -> bool:
    """A part of a prepared set that got no record, as the held-out part of a small one: not a failed download."""
    parts = ("sft.jsonl", "rl.jsonl", "test.jsonl")
    return file.name in parts and file.stat().st_size == 0 and (file.parent / "manifest.json").is_file()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _recognise(path: Path, source: str) -> tuple[str | None, str]:
    """The source of a file and "", or None and why it has none. A file that cannot be read raises, except parquet."""
    try:
        first = [row for _, row in islice(rows(path), _LOOKED_AT)]
    except UserError as error:
        if "pyarrow" in error.what and source == "auto":
            return None, error.what
        raise
    objects = [row for row in first if isinstance(row, dict)]
    for row in objects:
        for name, module in SOURCES.items():
            if not module.matches(row):
                continue
            if name == "hermes" and all(hermes.matches(row) and hermes.is_json_mode(row) for row in objects):
                return None, "is Hermes' JSON mode, which has no tools"
            if source not in ("auto", name):
                return None, f"is {name} data, not {source}"
            return name, ""
    if source != "auto" and objects:
        return source, ""
    keys = ", ".join(sorted(map(str, objects[0]))[:8]) if objects else "no objects"
    return None, f"is none of {', '.join(SOURCES)} (its rows have {keys})"


def read_input(input: Input, on_row: Callable[[int], None] | None = None) -> Iterator[Example | Reject]:
    """Examples and rejects of a file, in order.

    Args:
        input: from `find_inputs`.
        on_row: called with the position of every row before it is read.

    Raises:
        UserError: when the file cannot be read to its end.
    """
    module = SOURCES[input.source]
    file = str(input.path)
    for position, row in rows(input.path):
        if on_row is not None:
            on_row(position)
        try:
            if isinstance(row, RowError):
                raise row
            if not isinstance(row, dict):
                raise RowError("bad_row", "no object", excerpt=str(row))
            for item in module.read_row(clean(row), f"{input.source}-{input.label}-{position}"):
                yield Reject.of(item, file, position) if isinstance(item, RowError) else item
        except RowError as error:
            yield Reject.of(error, file, position)
