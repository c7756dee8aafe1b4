"""Files that are either whole or absent after a crash: write beside, flush to disk, rename into place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError of the block name `path`; one from writing to an open file names none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else a message of its own would be hidden
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically with `text` in UTF-8.

    Raises:
        OSError: naming `path`; what it held is untouched.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            beside.write_text(text, encoding="utf-8")
            sync(beside)
            os.replace(beside, path)
        finally:
            with suppress(OSError):  # a folder that cannot be written has said so
                beside.unlink(missing_ok=True)
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically with indented JSON; non-finite numbers are a ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
