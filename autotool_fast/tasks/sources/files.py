"""Rows of data files, streamed: JSON arrays, JSONL and (with pyarrow) parquet, told apart by content.

One row is in memory at a time, plus a read buffer of a few MiB (for parquet one batch of rows). What a user can fix is
a `UserError`: a Git LFS pointer, a web page or an error message saved in place of a gated file, an archive, a file
that is cut off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from autotool_fast.errors import UserError
from autotool_fast.tasks.sources.rows import RowError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
_CHUNK = 1 << 20  # characters per read
_MAX_ROW = 64 << 20  # characters; a row longer than this is a broken file, not a row
_PARQUET_BATCH = 256  # rows
_SPACE = re.compile(r"\s*")
_ERROR_KEYS = {"error", "errors", "message", "code", "status", "statusCode", "detail", "url", "requestId", "cause"}
_ABOUT_ACCESS = re.compile(r"(Access to|Invalid (username|credentials)|Unauthorized|Forbidden|You (must|need))\b")
_LFS = b"version https://git-lfs.github.com/spec/"
_ARCHIVES = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"(\xb5/\xfd": "zstandard", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(position, row) of every row: a decoded JSON value, or a RowError for a line of JSONL that is none.

    The position counts from 0: elements of an array or a table, lines of JSONL (empty lines are counted and skipped).

    Raises:
        UserError: when the file cannot be read as a whole.
    """
    kind = _kind(path)
    try:
        if kind == "parquet":
            yield from _parquet_rows(path)
            return
        with path.open(encoding="utf-8-sig") as file:
            yield from _array_rows(path, file) if kind == "array" else _line_rows(file)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", where=str(path)) from None
    except UnicodeDecodeError as error:
        remedy = "download it again, or convert it"
        raise UserError(f"is not UTF-8 text (byte {error.start})", where=str(path), remedy=remedy) from None


def _kind(path: Path) -> str:
    """array, lines or parquet, from the first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", where=str(path)) from None
    where = str(path)
    if head.startswith(_LFS):
        raise UserError("is a Git LFS pointer, not the data", where=where, remedy="run 'git lfs pull' in its folder")
    if head.startswith(b"PAR1"):
        return "parquet"
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            raise UserError(f"is compressed ({name})", where=where, remedy="unpack it first")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        raise UserError("is empty", where=where, remedy="download it again")
    gated = "the data set may be gated: accept its terms while logged in, then download the file again"
    if text.startswith(b"<"):
        raise UserError("is a web page, not data", where=where, remedy=gated)
    if said := _server_error(text):
        raise UserError(f"is a server's error message, not data ({said})", where=where, remedy=gated)
    if text.startswith(b"["):
        return "array"
    if text.startswith(b"{"):
        return "lines"
    raise UserError("is neither JSON nor JSONL nor parquet", where=where, remedy="give a data file")


def _server_error(head: bytes) -> str | None:
    """What a server said, if a file starts with nothing but its refusal: JSON about an error, or a sentence."""
    text = head.decode("utf-8", "replace").strip()
    if _ABOUT_ACCESS.match(text):
        return " ".join(text.split())[:120]
    if not text.startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None  # rows, or one row longer than the head
    if not value.keys() & {"error", "errors"} or value.keys() - _ERROR_KEYS:
        return None
    said = value.get("error") or value.get("errors")
    return " ".join(str(said.get("message", said) if isinstance(said, dict) else said).split())[:120]


def _line_rows(file: TextIO) -> Iterator[tuple[int, Any]]:
    for position, line in enumerate(file):
        if not line.strip():
            continue
        try:
            yield position, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield position, RowError("bad_json", str(error), excerpt=line)


def _array_rows(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    """Elements of one JSON array, decoded as the text comes in.

    An element counts only when what follows it has been seen too: a number, or a file, could go on in the next chunk.
    """
    decoder = json.JSONDecoder(strict=False)
    buffer, row, ended = "", 0, False
    while "[" not in buffer:  # there is one: `_kind` saw it
        buffer += file.read(_CHUNK)
    place = buffer.index("[") + 1
    while True:
        place = _SPACE.match(buffer, place).end()
        if buffer.startswith("]", place):
            return
        problem = ""
        try:
            value, end = decoder.raw_decode(buffer, place)
            end = _SPACE.match(buffer, end).end()
            if buffer.startswith((",", "]"), end):
                yield row, value
                row += 1
                place = end + buffer.startswith(",", end)
                continue
            problem = "a comma or ] is missing" if end < len(buffer) else ""
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if ended or len(buffer) - place > _MAX_ROW:
            # A file that ends like an array is wrong inside; one that does not has lost its end.
            whole = buffer.rstrip().endswith("]") and place < len(buffer.rstrip())
            what = f"is not valid JSON ({problem})" if whole or not ended else "is cut off"
            raise UserError(f"{what} after {row} rows", where=str(path), remedy="download it again")
        chunk = file.read(_CHUNK)
        ended = not chunk
        buffer, place = buffer[place:] + chunk, 0


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        remedy = "pip install pyarrow (the extra data), or use the raw JSON files of the data set"
        raise UserError("parquet needs pyarrow, which is not installed", where=str(path), remedy=remedy) from None
    position = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=_PARQUET_BATCH):
            for row in batch.to_pylist():
                yield position, row
                position += 1
    except pyarrow.ArrowException as error:
        problem = f"is no readable parquet file ({error})"
        raise UserError(problem, where=str(path), remedy="download it again") from None
