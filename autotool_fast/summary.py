"""The tables a run ends with, printed from results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

MODEL_NAMES = {"base": "base", "distilled": "always-think SFT", "warmup": "warm-up SFT", "rl": "AutoTool RL"}


def print_summary(run: Path, report: Path | None, console: Console | None = None) -> None:
    """Print the outcome of a run: models by band, and forced modes by family and difficulty."""
    console = console or Console()
    path = run / "results.json"
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        for table in (outcome_table(results), premise_table(results)):
            console.print(table)
    console.print(f"run folder: {run}", highlight=False, soft_wrap=True)
    if report is not None:
        console.print(f"report: {report}", highlight=False, soft_wrap=True)


def outcome_table(results: dict[str, Any]) -> Table:
    """One row per model: accuracy, thinking rate and tokens over the test mix and by band, in auto mode."""
    table = Table(title="Test split, mode auto", box=box.SIMPLE, title_justify="left")
    table.add_column("model")
    for name in ("accuracy", "thinks", "tokens", "ACU"):
        table.add_column(name, justify="right")
    for band in ("easy", "medium", "hard"):
        table.add_column(f"{band}:\nacc", justify="right")
        table.add_column("\nthinks", justify="right")
        table.add_column("\ntokens", justify="right")
    for key, title in MODEL_NAMES.items():
        if key not in results["models"]:
            continue
        auto = results["models"][key]["auto"]
        overall = auto["overall"]
        cells = [_percent(overall["accuracy"]), _percent(overall["think_rate"]), f"{overall['tokens']:.1f}"]
        cells.append(f"{overall['acu']:.1f}")
        for band in ("easy", "medium", "hard"):
            values = auto["bands"].get(band)
            cells += (
                ["-"] * 3
                if values is None
                else [_percent(values["accuracy"]), _percent(values["think_rate"]), f"{values['tokens']:.1f}"]
            )
        table.add_row(title, *cells)
    table.caption = f"tokens: mean response tokens; ACU: {results['acu_unit']}"
    table.caption_justify = "left"
    return table


def premise_table(results: dict[str, Any]) -> Table:
    """Forced no_think against forced think of the base model, by family and difficulty."""
    models = results["models"]
    key = "base" if "base" in models else next(iter(models))
    cells = {
        mode: {(c["family"], c["difficulty"]): c for c in models[key][mode]["cells"]} for mode in ("no_think", "think")
    }
    levels = sorted({k for _, k in cells["think"]})
    table = Table(
        title=f"The premise ({MODEL_NAMES[key]}): accuracy forced not to think / forced to think",
        box=box.SIMPLE,
        title_justify="left",
    )
    table.add_column("family")
    for k in levels:
        table.add_column(f"k={k}", justify="right")
    for family in dict.fromkeys(family for family, _ in cells["think"]):
        row = []
        for k in levels:
            pair = [cells[mode].get((family, k)) for mode in ("no_think", "think")]
            row.append("" if None in pair else " / ".join(_percent(c["accuracy"]) for c in pair))
        table.add_row(family, *row)
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"
