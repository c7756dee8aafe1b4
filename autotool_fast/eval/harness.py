"""Playing a benchmark with a policy, and keeping the results.

A results folder holds `config.json` (what the results depend on), `episodes.jsonl` (one row per episode and mode) and
`summary.json`. Running the same command again continues where it stopped; a folder of another configuration is
refused. Tasks are played in chunks whose bounds depend on the task list alone, and a chunk's rows are written together,
so rows stand in task order and a stop loses one chunk at most. A damaged folder is named, with the line, and left as it
is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autotool_fast import files
from autotool_fast.errors import UserError
from autotool_fast.eval.records import REFUSED, Benchmark, Played, Policy, Verdict
from autotool_fast.tasks.record import Task

FORMAT = 1
EPISODES, CONFIG = "episodes.jsonl", "config.json"
_UNFINISHED = {"max_turn_tokens", "max_tokens", REFUSED}
_FIELDS = {
    "id": str, "category": str, "mode": str, "correct": bool, "strict": bool, "details": dict, "thinks": bool,
    "malformed": bool, "stop": str, "replies": list, "seconds": (int, float), "record": dict,
}  # fmt: skip
_COUNTS = ("prompt_tokens", "output_tokens", "think_tokens")


class Results:
    """The rows of a results folder.

    Raises:
        UserError: the folder belongs to something else, or to another configuration, or is damaged.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self._path = folder / EPISODES
        self._claim(config)
        self.rows = self._read()

    def _claim(self, config: dict[str, Any]) -> None:
        path = self.folder / CONFIG
        if path.is_file():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                before = None
            if not isinstance(before, dict):
                remedy = f"restore it, or give another --out; {EPISODES} beside it is left as it is"
                raise UserError("is damaged: it is no JSON object", where=str(path), remedy=remedy)
            names = sorted({*before, *config})
            changed = [name for name in names if before.get(name) != json.loads(json.dumps(config.get(name)))]
            if changed:
                remedy = "give another --out, or the settings it was made with"
                problem = f"holds results of another configuration ({', '.join(changed)} differ)"
                raise UserError(problem, where=str(self.folder), remedy=remedy)
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError("is no results folder", where=str(self.folder), remedy="give an empty or new --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_json(path, config)

    def _read(self) -> list[dict[str, Any]]:
        """The rows so far. A last line that a crash cut off is dropped from the file."""
        if not self._path.exists():
            return []
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        rows = [self._row(number, line) for number, line in enumerate(whole.split(b"\n"), 1) if line]
        if whole != data:
            files.write_text(self._path, whole.decode())
        return rows

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            problem = "it is no JSON"
        else:
            problem = _missing(row)
            if problem is None:
                return row
        remedy = "repair the line, or delete it to have its episode played again"
        raise UserError(f"line {number} is damaged: {problem}", where=str(self._path), remedy=remedy)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows and flush them to the disk."""
        with files.naming(self._path):
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows))
                file.flush()
            files.sync(self._path)
        self.rows += rows


def _missing(row: Any) -> str | None:
    """What keeps a JSON value from being a result row."""
    if not isinstance(row, dict):
        return "it is no JSON object"
    for name, kind in _FIELDS.items():
        if not isinstance(row.get(name), kind):
            return f"it has no {name}"
    for name in _COUNTS:
        if not isinstance(row.get(name, ""), (int, type(None))):
            return f"it has no {name}"
    return None


def fingerprint(tasks: Sequence[Task]) -> str:
    """A hash of what is asked."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(json.dumps([task.id, task.messages], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def run(
    benchmark: Benchmark,
    policy: Policy,
    folder: Path,
    *,
    modes: Sequence[str] = ("auto",),
    limit: int | None = None,
    chunk: int = 64,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Play every task in every mode that has no row yet.

    Args:
        benchmark: what is played; its tasks must have distinct ids.
        policy: who plays.
        folder: the results folder.
        modes: out of `records.MODES`.
        limit: tasks of each category.
        chunk: tasks played side by side.
        on_progress: called with (mode, episodes done, episodes in all) after each chunk.

    Returns:
        All rows, modes in the order given, tasks in the benchmark's order.

    Raises:
        UserError: from the folder, the benchmark or the policy.
        KeyboardInterrupt: rows written so far stay.
    """
    tasks = benchmark.tasks(limit)
    if not tasks:
        raise UserError("there are no tasks to play", where="--categories")
    config = {
        "format": FORMAT,
        "benchmark": benchmark.config(),
        "policy": policy.config(),
        "limit": limit,
        "chunk": chunk,
        "tasks": fingerprint(tasks),
    }
    results = Results(folder, config)
    order = {task.id: index for index, task in enumerate(tasks)}
    if strange := next((row["id"] for row in results.rows if row["id"] not in order), None):
        problem, remedy = f"a row names a task that is not played here ({strange})", "delete its line"
        raise UserError(problem, where=str(folder / EPISODES), remedy=remedy)
    done = {(row["mode"], row["id"]) for row in results.rows}
    for mode in modes:
        for first in range(0, len(tasks), chunk):
            todo = [task for task in tasks[first : first + chunk] if (mode, task.id) not in done]
            if todo:
                results.add([judge(played, mode) for played in policy.play(todo, mode)])
            if on_progress is not None:
                on_progress(mode, min(first + chunk, len(tasks)), len(tasks))
    rows = [row for row in results.rows if row["mode"] in modes]
    return sorted(rows, key=lambda row: (modes.index(row["mode"]), order[row["id"]]))


def judge(played: Played, mode: str) -> dict[str, Any]:
    """The result row of an episode, which is closed.

    Token counts are sums over the replies, the prompt's that of the first one; None where the policy has none.
    """
    try:
        # Where nothing was said, or what was said is not whole, doing nothing was no choice of the policy.
        verdict = played.episode.verdict() if played.replies else Verdict(False, False)
        if played.stop in _UNFINISHED or not played.replies:
            verdict = Verdict(False, False, played.stop, verdict.details)
        record = played.episode.record()
    finally:
        played.episode.close()
    replies = played.replies

    def total(name: str) -> int | None:
        counts = [getattr(reply, name) for reply in replies]
        return None if None in counts else sum(counts)

    return {
        "id": played.task.id,
        "category": played.task.family,
        "mode": mode,
        "correct": verdict.correct,
        "strict": verdict.strict,
        "reason": verdict.reason,
        "details": dict(verdict.details),
        "thinks": any(reply.parsed.length_class == 0 for reply in replies),
        "malformed": any(reply.parsed.errors for reply in replies),
        "errors": sorted({error for reply in replies for error in reply.parsed.errors}),
        "stop": played.stop,
        "replies": [reply.text for reply in replies],
        "calls": sum(len(reply.parsed.calls) for reply in replies),
        "prompt_tokens": replies[0].prompt_tokens if replies else None,
        "output_tokens": total("output_tokens"),
        "think_tokens": total("think_tokens"),
        "seconds": round(played.seconds, 4),
        "record": record,
    }
