"""The tables a run ends with, printed from results.json, and the alarms there were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from autotool_fast.alarms import spells
from autotool_fast.metrics import read_rows
from autotool_fast.tasks.world import BANDS

_STYLE: dict[str, Any] = {"box": box.SIMPLE, "title_justify": "left", "caption_justify": "left", "padding": (0, 1)}

MIN_WIDTH = 110
"""Columns the tables need; narrower terminals wrap lines rather than lose figures."""

MODEL_NAMES = {"base": "base", "distilled": "always-think SFT", "warmup": "warm-up SFT", "rl": "AutoTool RL"}


def print_summary(run: Path, report: Path | None, console: Console | None = None) -> None:
    """Print the outcome of a run: models by band, and forced modes by family and difficulty."""
    console = console or Console(width=max(Console().width, MIN_WIDTH))
    path = run / "results.json"
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        for table in (outcome_table(results), premise_table(results)):
            console.print(table)
    if (run / "metrics.jsonl").exists():
        for spell in spells(read_rows(run / "metrics.jsonl")):
            console.print(f"alarm: {spell} (docs/metrics.md)", highlight=False, soft_wrap=True)
    console.print(f"run folder: {run}", highlight=False, soft_wrap=True)
    if report is not None:
        console.print(f"report: {report}", highlight=False, soft_wrap=True)


def outcome_table(results: dict[str, Any]) -> Table:
    """One row per model: accuracy, thinking rate and tokens over the test mix and by band, in auto mode."""
    table = Table(title="Test split, mode auto: accuracy, thinking rate, mean response tokens", **_STYLE)
    for title in ("model", "whole mix", "ACU", "regret", *BANDS):
        table.add_column(title, justify="left" if title == "model" else "right", no_wrap=True)
    for key, title in MODEL_NAMES.items():
        if key in results["models"]:
            auto = results["models"][key]["auto"]
            bands = [_triple(auto["bands"][band]) if band in auto["bands"] else "-" for band in BANDS]
            lost = results.get("routing_regret", {}).get(key)
            figures = (f"{auto['overall']['acu']:.1f}", "-" if lost is None else f"{lost:.2f}")
            table.add_row(title, _triple(auto["overall"]), *figures, *bands)
    unit = results["acu_unit"]
    table.caption = f"ACU: {unit}\nregret: mean reward lost against the better mode for each kind of task"
    return table


def premise_table(results: dict[str, Any]) -> Table:
    """Forced no_think against forced think of the base model, by family and difficulty."""
    models = results["models"]
    key = "base" if "base" in models else next(iter(models))
    cells = {
        mode: {(c["family"], c["difficulty"]): c for c in models[key][mode]["cells"]} for mode in ("no_think", "think")
    }
    levels = sorted({k for _, k in cells["think"]})
    title = f"The premise ({MODEL_NAMES[key]}): % right when forced not to think / to think"
    table = Table(title=title, **_STYLE)
    table.add_column("family", no_wrap=True)
    for k in levels:
        table.add_column(f"k={k}", justify="right", no_wrap=True)
    for family in dict.fromkeys(family for family, _ in cells["think"]):
        row = []
        for k in levels:
            pair = [cells[mode].get((family, k)) for mode in ("no_think", "think")]
            row.append("" if None in pair else " / ".join(f"{100 * c['accuracy']:.0f}" for c in pair))
        table.add_row(family, *row)
    return table


def _triple(values: dict[str, float]) -> str:
    return f"{_percent(values['accuracy'])} {_percent(values['think_rate']):>4} {values['tokens']:5.1f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"
