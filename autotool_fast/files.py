"""Files that are either whole or absent after a crash: write beside, flush to disk, rename into place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust name an error of the system; tokenizers raises it as a bare Exception."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error of the system inside the block be an OSError that names `path`.

    One from writing to an open file names none, and some libraries have exceptions of their own for it.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else a message of its own would be hidden
            error.filename = str(path)
        raise
    except Exception as error:
        found = OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def sync(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush all files below a folder, and its directories, to the disk."""
    below = sorted(folder.rglob("*"))
    for path in [*(path for path in below if path.is_file()), *(path for path in below if path.is_dir()), folder]:
        sync(path)


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
