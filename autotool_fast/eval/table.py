"""The figures of a results folder by mode and category, and the table that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from autotool_fast.eval.records import Benchmark

WIDTH = 140


def figures(rows: Sequence[Mapping[str, Any]], parameters: int | None) -> dict[str, Any]:
    """Means over rows. Shares are in 0..1, tokens per episode; seconds are the wall time of playing, in all.

    `details` are means of the numbers that the benchmark gives for every row. `acu` is accuracy in percent /
    (millions of parameters x mean output tokens), None without either.
    """

    details = [row["details"] for row in rows]
    shared = [name for name in details[0] if all(isinstance(d.get(name), (int, float)) for d in details)]

    def mean(name: str) -> float | None:
        values = [row[name] for row in rows if row["replies"] or name != "prompt_tokens"]
        return None if None in values or not values else sum(values) / len(values)

    tokens = mean("output_tokens")
    accuracy = mean("correct")
    return {
        "n": len(rows),
        "accuracy": accuracy,
        "strict": mean("strict"),
        "think_rate": mean("thinks"),
        "malformed": mean("malformed"),
        "prompt_tokens": mean("prompt_tokens"),
        "output_tokens": tokens,
        "think_tokens": mean("think_tokens"),
        "acu": 100 * accuracy / (parameters / 1e6 * tokens) if parameters and tokens else None,
        "seconds": sum(row["seconds"] for row in rows),
        "details": {name: sum(d[name] for d in details) / len(rows) for name in shared},
    }


def summarise(
    benchmark: Benchmark, rows: Sequence[Mapping[str, Any]], modes: Sequence[str], parameters: int | None
) -> dict[str, Any]:
    """`{modes: {mode: {categories: {name: figures}, overall: figures, aggregates: [...]}}, failures_by_reason}`.

    `overall` weighs every episode alike; the benchmark's own way of summing up is in `aggregates`.
    """
    result: dict[str, Any] = {"parameters": parameters, "modes": {}}
    for mode in modes:
        mine = [row for row in rows if row["mode"] == mode]
        if not mine:
            continue
        names = list(dict.fromkeys(row["category"] for row in mine))
        categories = {name: figures([row for row in mine if row["category"] == name], parameters) for name in names}
        reasons: dict[str, int] = {}
        for row in mine:
            if not row["correct"]:
                reasons[str(row["reason"])] = reasons.get(str(row["reason"]), 0) + 1
        result["modes"][mode] = {
            "categories": categories,
            "overall": figures(mine, parameters),
            "aggregates": benchmark.aggregates(mine),
            "failures_by_reason": dict(sorted(reasons.items(), key=lambda item: -item[1])),
        }
    return result


_COLUMNS = (
    ("n", "n", "{:d}", 1),
    ("accuracy", "acc %", "{:.1f}", 100),
    ("strict", "strict %", "{:.1f}", 100),
    ("think_rate", "thinks %", "{:.0f}", 100),
    ("malformed", "malf. %", "{:.1f}", 100),
    ("prompt_tokens", "prompt", "{:.0f}", 1),
    ("output_tokens", "output", "{:.1f}", 1),
    ("think_tokens", "think", "{:.1f}", 1),
    ("acu", "ACU", "{:.2f}", 1),
    ("seconds", "s", "{:.1f}", 1),
)


def print_tables(title: str, summary: Mapping[str, Any], console: Console | None = None) -> None:
    """One table per mode, then the benchmark's aggregates with their weights."""
    console = console or Console(width=max(Console().width, WIDTH))
    for mode, values in summary["modes"].items():
        table = Table(title=f"{title}, mode {mode}", box=box.SIMPLE, title_justify="left", padding=(0, 1))
        table.add_column("category", no_wrap=True)
        for _, heading, _, _ in _COLUMNS:
            table.add_column(heading, justify="right", no_wrap=True)
        for name, cells in values["categories"].items():
            table.add_row(name, *_cells(cells))
        table.add_section()
        table.add_row("all episodes", *_cells(values["overall"]))
        console.print(table)
        for name, cells in values["categories"].items():
            for detail, value in cells["details"].items():
                console.print(f"{name}: {detail} {100 * value:.1f} %", highlight=False, soft_wrap=True)
        for row in values["aggregates"]:
            console.print(describe(row), highlight=False, soft_wrap=True)


def _cells(values: Mapping[str, Any]) -> list[str]:
    return [
        "-" if values[name] is None else form.format(values[name] * scale) for name, _, form, scale in _COLUMNS
    ]


def describe(row: Mapping[str, Any]) -> str:
    """An aggregate as one line: value, the weight it could reach, and every part with its weight."""
    parts = [
        f"{100 * part['weight']:.1f} % {name} " + ("not run" if part["value"] is None else f"{100 * part['value']:.2f}")
        for name, part in row["parts"].items()
    ]
    return f"{row['name']}: {100 * row['value']:.2f} of {100 * row['of']:.1f} ({'; '.join(parts)})"
