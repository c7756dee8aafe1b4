"""One aligned table per question, and the same numbers as JSON.

A row is a dict of plain values; a column says which value it shows and how. What a table prints is read from the rows
that go to the file, so the two cannot differ. The title says what was measured on what; a table measured on a CPU says
"CPU" there, and nothing is ever printed for a device that was not there.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import measure
from benchmarks.measure import Ceilings, Times, keep_freed_memory
from benchmarks.provenance import provenance, write_results

Row = dict[str, Any]
BUSY = 1.5  # load average before the start from which the closing lines say so
STEADY = 0.9  # two readings of a ceiling that differ by more give no share of it


class Column(NamedTuple):
    """One column: the row's key, the heading, and how a value is written. Missing values are "-"."""

    key: str
    heading: str
    write: Callable[[Any], str] = str


def milliseconds(value: float) -> str:
    """Three significant digits or more."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def small(value: float) -> str:
    """An error: two digits."""
    return f"{value:.1e}"


def percent(value: float) -> str:
    """A share of 1, in per cent."""
    return f"{100 * value:.0f}%"


TIME_COLUMNS = (
    Column("provider", "provider"),
    Column("mode", "mode"),
    Column("gradients", "gradients"),
    Column("ms", "ms", milliseconds),
    Column("p20", "p20", milliseconds),
    Column("p80", "p80", milliseconds),
    Column("cpu_ms", "CPU ms", milliseconds),
)


def timed(times: Times | str) -> Row:
    """A row's time fields, or its error."""
    if isinstance(times, str):
        return {"error": times}
    return {key: value for key, value in times._asdict().items() if value is not None}


def device_name(device: torch.device) -> str:
    """For titles: the GPU's name, or "CPU" with its threads and name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"CPU ({provenance()['device']}; {count} thread{'s' * (count > 1)})"


class Report:
    """The tables of one script: printed one by one, and written to `out` after each, so that a stop loses little.

    A table's shares of a ceiling ("roofline") are of the larger of two readings, before and after its contest; where
    these differ by more than a tenth, the machine had other work, and the table has no shares.
    """

    def __init__(self, op: str, device: torch.device, ceilings: Ceilings, out: Path | None, note: str = "") -> None:
        self.op, self.device, self.out, self.note = op, device, out, note
        self._ceilings = ceilings
        self._load = os.getloadavg()[0]
        self._said: set[str] = set()
        self.tables: list[dict[str, Any]] = []
        self._console = Console(width=200, soft_wrap=True, highlight=False, markup=False)

    def add(
        self, problem: str, facts: Row, columns: Sequence[Column], rows: list[Row], notes: Sequence[str] = ()
    ) -> None:
        """Print one table under its title, with the notes not yet said below it, and save everything so far."""
        notes = [*notes, *self._add_shares(rows)]
        title = self._title(problem)
        self.tables.append({"title": title, **facts, "rows": [plain(row) for row in rows], "notes": list(notes)})
        self._console.print()
        self._console.print(title)
        self._console.print(render(columns, self.tables[-1]["rows"]))
        notes = [*notes, *not_measured(rows)]
        for note in notes:
            if note not in self._said:
                self._console.print(f"  {note}")
        self._said.update(notes)
        self.save()

    def keep(self, problem: str, facts: Row, rows: list[Row]) -> None:
        """Save a table whose contest is not over, without printing it."""
        table = {"title": self._title(problem), **facts, "rows": [plain(row) for row in rows], "unfinished": True}
        self.save([*self.tables, table])

    def finish(self) -> None:
        """The ceilings' last reading, the closing line, the file."""
        self._read("copy_gb_s")
        self._read("matmul_tflops")
        c = self._ceilings
        self._console.print(
            f"\nceilings measured here, before and after: copy {c.copy_gb_s:.4g} and {c.copy_gb_s_after:.4g} GB/s "
            f"(read + write); {c.matmul} product {c.matmul_tflops:.3g} and {c.matmul_tflops_after:.3g} TFLOP/s"
        )
        if self._load > BUSY:
            self._console.print(f"the machine was busy with other work: load average {self._load:.1f} at the start")
        if self.note:
            self._console.print(self.note)
        self.save()
        if self.out:
            self._console.print(f"written: {self.out}")

    def _title(self, problem: str) -> str:
        return f"{self.op} on {device_name(self.device)}: {problem}"

    def _read(self, ceiling: str) -> float:
        """Measures a ceiling again; the first reading is kept beside it."""
        copied = self._ceilings.copy_bytes
        rates = {"copy_gb_s": lambda: measure.copy_gb_s(self.device, copied),
                 "matmul_tflops": lambda: measure.matmul_tflops(self.device)}  # fmt: skip
        self._ceilings = dataclasses.replace(self._ceilings, **{f"{ceiling}_after": rates[ceiling]()})
        return getattr(self._ceilings, f"{ceiling}_after")

    def _add_shares(self, rows: list[Row]) -> list[str]:
        """Each row's "roofline"; a note in their place where the ceiling was not steady."""
        notes = []
        for key, ceiling in (("tflops", "matmul_tflops"), ("gb_s", "copy_gb_s")):
            rated = [row for row in rows if key in row]
            if not rated:
                continue
            last = getattr(self._ceilings, f"{ceiling}_after")
            before = getattr(self._ceilings, ceiling) if last is None else last
            after = self._read(ceiling)
            if min(before, after) < STEADY * max(before, after):
                unit = {"tflops": "TFLOP/s", "gb_s": "GB/s"}[key]
                notes.append(f"no shares of a ceiling that read {before:.3g} {unit} before and {after:.3g} after")
                continue
            for row in rated:
                row["roofline"] = row[key] / max(before, after)
        return notes

    def save(self, tables: Sequence[dict[str, Any]] | None = None) -> None:
        """Write all tables with their provenance, if a file was asked for."""
        if self.out is None:
            return
        results = {
            "benchmark": self.op,
            "measured_on": device_name(self.device),
            "load_average_at_start": self._load,
            "ceilings": dataclasses.asdict(self._ceilings),
            "note": self.note,
            "tables": self.tables if tables is None else tables,
        }
        write_results(self.out.stem, results, self.out.parent)


def render(columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """The measured rows as a table; columns that no row fills are left out."""
    rows = [row for row in rows if not row.get("error")]
    shown = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    table = Table(box=None, pad_edge=False)
    for column in shown:
        number = any(isinstance(row.get(column.key), (int, float)) for row in rows)
        table.add_column(column.heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(column, row.get(column.key)) for column in shown))
    return table


def not_measured(rows: Sequence[Row]) -> list[str]:
    """One line per row that has an error in place of numbers."""
    lines = []
    for row in rows:
        if row.get("error"):
            where = ", ".join(row[key] for key in ("mode", "gradients") if row.get(key))
            lines.append(f"{row['provider']}{f' ({where})' if where else ''}: not measured: {row['error']}")
    return lines


def _cell(column: Column, value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else column.write(value)


def plain(row: Row) -> Row:
    """Values JSON can hold: non-finite numbers become text."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def common_parser(description: str) -> argparse.ArgumentParser:
    """The options that all four scripts share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few shapes, seconds to a minute")
    size.add_argument("--full", action="store_true", help="every shape and share")
    parser.add_argument("--providers", nargs="+", help="names or beginnings of names; 'ours' is short for autotool")
    parser.add_argument("--repetitions", type=int, help="timed repetitions (default 30 on a GPU, 5 on a CPU)")
    parser.add_argument("--seconds", type=float, default=60.0, help="bound of one contest, after three repetitions")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--part", type=part, default=(1, 1), metavar="I/K", help="every K-th table from the I-th on")
    parser.add_argument("--out", type=Path, help="results as JSON")
    return parser


def set_up(args: argparse.Namespace) -> torch.device:
    """Device, threads, repetitions and allocator, as the options say."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA device")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.repetitions is None:
        args.repetitions = 30 if device.type == "cuda" else 3 if args.quick else 5
    if device.type == "cpu":
        keep_freed_memory(True)
    torch.manual_seed(0)
    return device


def wanted(name: str, providers: Sequence[str] | None) -> bool:
    """Whether a provider was asked for; `name` may carry details after a space."""
    if not providers:
        return True
    return any(name.startswith("autotool" if p == "ours" else p) for p in providers)


def part(text: str) -> tuple[int, int]:
    """The text 2/8 as (2, 8)."""
    try:
        index, count = (int(number) for number in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a part is two numbers like 2/8: got {text!r}") from None
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"a part I/K has 1 <= I <= K: got {text!r}")
    return index, count


def in_part(problems: Iterable[Any], chosen: tuple[int, int]) -> list[Any]:
    """The problems of a part."""
    index, count = chosen
    return list(problems)[index - 1 :: count]


def absent(name: str, why: str) -> Row:
    """The row of a contestant that cannot run here, which is no failure."""
    return {"provider": name, "error": why, "absent": True}


def shape_pair(text: str) -> tuple[int, int]:
    """The text 896x151936 as (896, 151936)."""
    try:
        first, second = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape is two numbers like 896x151936: got {text!r}") from None
    if first < 1 or second < 1:
        raise argparse.ArgumentTypeError(f"both numbers of a shape must be positive: got {text!r}")
    return first, second


def share(text: str) -> float:
    """The text 55 as 0.55."""
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"a share is 0 to 100 per cent: got {text}")
    return value / 100
