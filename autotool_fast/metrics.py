"""What a run measures, written as it happens: metrics.jsonl, phase timings and the progress display.

Guarantees: every row is one flushed line; keys are in a fixed order and numbers in a fixed format, so that
two runs of one seed write the same bytes once `strip_timings` has removed the clock readings; a file cut
short by a crash can be continued. Which metrics there are is left to the stages, tables to the report.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from autotool_fast import files
from autotool_fast.errors import UserError

SIGNIFICANT_DIGITS = 9
"""Enough to tell any two float32 numbers apart."""

Row = dict[str, Any]


class MetricsWriter:
    """Appends rows to a JSON-lines file; use `open` to continue a file that an earlier process wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    @classmethod
    def open(cls, path: Path, keep: Callable[[Row], bool]) -> MetricsWriter:
        """Continue `path` after removing the rows that `keep` rejects (those a resumed run will repeat).

        A last line cut short by a crash is removed as well; a missing file is an empty one.

        Raises:
            UserError: a broken line elsewhere.
        """
        if path.exists():
            rows = read_rows(path)
            files.write_text(path, "".join(_line(row) for row in rows if keep(row)))
        return cls(path)

    def write(
        self,
        stage: str,
        step: int,
        metrics: Mapping[str, float],
        *,
        seconds: float,
        timings: Mapping[str, float] | None = None,
    ) -> Row:
        """Append one row and flush it.

        Args:
            metrics: flat names such as "reward/mean" -> numbers (0-dimensional arrays too); non-finite ones
                are written as null.
            seconds: wall time since the stage began.
            timings: phase -> milliseconds, written as "time/<phase>".

        Returns:
            The row as written.

        Raises:
            OSError: naming the file.
        """
        assert not {"stage", "step", "seconds"} & metrics.keys()
        row = {"stage": stage, "step": step, "seconds": plain(seconds)}
        row |= {f"time/{phase}": plain(ms) for phase, ms in sorted((timings or {}).items())}
        row |= {name: plain(value) for name, value in sorted(metrics.items())}
        with files.naming(self.path):
            self._file.write(_line(row))
            self._file.flush()
        return row

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics file, without a last line that was cut short.

    Raises:
        UserError: a broken line that is not the last.
    """
    # Lines end in "\n" alone: other separators are legal inside a JSON string.
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise UserError("is not a metrics row", where=f"{path}, line {number}", remedy="remove the line")
    return rows


def strip_timings(row: Mapping[str, Any]) -> Row:
    """The row without what the clock decides: "seconds" and "time/*"."""
    return {k: v for k, v in row.items() if k != "seconds" and not k.startswith("time/")}


def plain(value: Any) -> int | float | None:
    """A number in the file's format: integers as they are, floats to 9 digits, null when not finite."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    value = float(value)
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


Phase = tuple[str, ...]
"""Names from the outermost phase to the innermost."""

_current: ContextVar[Timer | None] = ContextVar("timer", default=None)


class Timer:
    """Adds up the wall time of named phases. They nest, and a moment counts once: for the innermost phase it is in.

    Args:
        clock: seconds, monotonic.

    `clock` and `annotate`, entered with the name of each phase, may be replaced between phases.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.annotate: Callable[[str], AbstractContextManager[Any]] = nullcontext
        self.totals: dict[Phase, tuple[int, float]] = {}
        """Calls and own seconds of each phase since the timer was made."""
        self._ms: dict[str, float] = {}
        self._path: Phase = ()
        self._inside = 0.0  # seconds of the finished phases directly inside the current one

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block, also when it raises; repeated phases add up."""
        outer, beside = self._path, self._inside
        self._path, self._inside = (*outer, name), 0.0
        begin = self.clock()
        try:
            with self.annotate(name):
                yield
        finally:
            seconds = self.clock() - begin
            own = seconds - self._inside
            calls, total = self.totals.get(self._path, (0, 0.0))
            self.totals[self._path] = (calls + 1, total + own)
            self._ms[name] = self._ms.get(name, 0.0) + 1e3 * own
            self._path, self._inside = outer, beside + seconds

    def take(self) -> dict[str, float]:
        """Milliseconds per name of a phase, wherever it was, since the last call."""
        taken, self._ms = self._ms, {}
        return taken

    @contextmanager
    def current(self) -> Iterator[Timer]:
        """Have `phase` of this module report here inside the block."""
        token = _current.set(self)
        try:
            yield self
        finally:
            _current.reset(token)


def phase(name: str) -> AbstractContextManager[None]:
    """A phase of the timer in use; without one it times nothing. For code that is not handed a timer."""
    timer = _current.get()
    return nullcontext() if timer is None else timer.phase(name)


class Progress:
    """Shows how far a stage is: a live line on a terminal, plain lines elsewhere.

    A terminal that is gone, or a pipe that nobody reads any more, costs the lines and not the run.

    Plain lines come one per step in stages started with `every_step`, else at most once per `interval` seconds, the
    first and the last step always among them.

    Args:
        stream: where to write; standard error if not given.
        interval: least time between plain lines, seconds.
        clock: seconds, monotonic.
    """

    def __init__(
        self, stream: TextIO | None = None, interval: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._interval, self._clock = interval, clock
        self._live = self._live_display() if self._stream.isatty() else None
        self._task: Any = None
        self._stage, self._total, self._first, self._every_step = "", 0, 0, False
        self._begin = self._shown_at = 0.0
        self._pending: str | None = None

    def _live_display(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Live

        columns = (
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
        )
        live = Live(*columns, console=Console(file=self._stream))
        live.start()
        return live

    def start(self, stage: str, total: int, done: int = 0, *, every_step: bool = False) -> None:
        """Begin a stage of `total` steps, `done` of which an earlier process took."""
        self.finish()
        self._stage, self._total, self._first, self._every_step = stage, total, done, every_step
        self._begin, self._shown_at = self._clock(), -math.inf
        if self._live:
            self._task = self._live.add_task(stage, total=total, completed=done, figures="")

    def update(self, step: int, figures: Mapping[str, float] | None = None) -> None:
        """Report that `step` steps (counted from 1) are done, with key figures to show."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in (figures or {}).items())
        if self._live:
            self._live.update(self._task, completed=step, figures=shown)
            return
        now = self._clock()
        rest = (now - self._begin) / max(step - self._first, 1) * (self._total - step)
        counted = f"{self._stage:<8} {step:>{len(str(self._total))}}/{self._total}"
        self._pending = f"{counted}  eta {_clock_time(rest)}  {shown}".rstrip()
        if self._every_step or step >= self._total or now - self._shown_at >= self._interval:
            self._print_pending()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        with suppress(OSError):
            if self._live:
                self._live.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=self._stream, flush=True)

    def finish(self) -> None:
        """End the stage; its last step is shown if it was not yet."""
        self._print_pending()
        if self._live and self._task is not None:
            self._live.stop_task(self._task)
            self._task = None

    def _print_pending(self) -> None:
        if self._pending is not None:
            with suppress(OSError):
                print(self._pending, file=self._stream, flush=True)
            self._pending, self._shown_at = None, self._clock()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        if self._live:
            with suppress(OSError):
                self._live.stop()


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
