"""Finished parts of a long stage on disk, so that a stop or an error costs the part under way alone.

A file of JSON lines: what the parts belong to, then one line per part, flushed to the disk when it is made. Values pass
through JSON whether they were made now or before, so a continued stage cannot differ from one that was not stopped.
What a part is, and when the file has served, is the stage's business. Under several processes rank 0 reads and writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autotool_fast import distributed, files
from autotool_fast.errors import UserError

FORMAT = 1


class PartialResults:
    """The parts kept in a file.

    Args:
        path: the file; made when there is a part to keep.
        belongs_to: what the values depend on, JSON values.

    Raises:
        UserError: the file is damaged, or holds parts of something else.
    """

    def __init__(self, path: Path, belongs_to: Mapping[str, Any]) -> None:
        self._path = path
        self._head = {"format": FORMAT, **json.loads(json.dumps(belongs_to))}
        self._parts: dict[str, Any] = distributed.on_main(lambda: self._read() if path.exists() else {})

    def __len__(self) -> int:
        return len(self._parts)

    def _read(self) -> dict[str, Any]:
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a crash may have cut the last line off
        lines = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                lines.append(json.loads(line.decode()))
                if number > 1:
                    hash(lines[-1]["part"]), lines[-1]["value"]
            except (ValueError, TypeError, KeyError, RecursionError):
                problem, remedy = f"line {number} is damaged", "delete that line to have its part made again"
                raise UserError(problem, where=str(self._path), remedy=remedy) from None
        if not lines:
            self._path.unlink()
            return {}
        if lines[0] != self._head:
            names = sorted({*lines[0], *self._head}) if isinstance(lines[0], dict) else []
            differ = ", ".join(name for name in names if lines[0].get(name) != self._head.get(name)) or "first line"
            remedy = "put back what it was made with, or delete the file to start the stage anew"
            raise UserError(f"holds results made with something else ({differ})", where=str(self._path), remedy=remedy)
        if whole != data:
            files.write_text(self._path, whole.decode())
        return {line["part"]: line["value"] for line in lines[1:]}

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of a part: the kept one, or what `make` returns (a JSON value), which is kept from now on."""
        if name not in self._parts:
            text = json.dumps(make())
            if distributed.is_main():
                self._append(f'{{"part": {json.dumps(name)}, "value": {text}}}\n')
            self._parts[name] = json.loads(text)
        return self._parts[name]

    def _append(self, line: str) -> None:
        if not self._path.exists():
            files.write_text(self._path, json.dumps(self._head) + "\n")
        with files.naming(self._path):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
            files.sync(self._path)

    def remove(self) -> None:
        """Delete the file."""
        distributed.on_main(lambda: self._path.unlink(missing_ok=True))
