"""Read a run folder for the report, whatever state the run was left in.

Guarantees: never fails on a missing, truncated or partly written file. What could not be read is listed in
`Run.problems`, one sentence each. A step that was logged twice (a resumed run repeats steps) keeps its last
row.
Leaves to others: what the numbers mean (`tables`, `build`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autotool_fast.errors import UserError

RUN_FILES = ("config.json", "metrics.jsonl", "results.json", "transcripts.jsonl")
STAGE_NAMES = {
    "base": "Base training",
    "label": "Labelling",
    "warmup": "Warm-up SFT",
    "distill": "Distilled SFT",
    "refine": "Data refinement",
    "rl": "RL",
    "eval": "Evaluation",
}
STAGES = tuple(STAGE_NAMES)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """The readable part of a run folder."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, list[Row]] = field(default_factory=dict)
    """Metric rows by stage, in order of step."""
    models: dict[str, Any] = field(default_factory=dict)
    """Model -> mode -> {"overall": cell, "bands": ..., "cells": ...}; see `cell`."""
    acu_unit: str = ""
    easy_share: float | None = None
    """Share of the easy families in the test mix that "overall" figures are weighted for."""
    transcripts: list[Row] = field(default_factory=list)
    summaries: dict[str, Row] = field(default_factory=dict)
    """What each finished stage recorded about itself (stages/<stage>.json)."""
    profile: dict[str, Any] = field(default_factory=dict)
    """Stage -> where a profiled run spent its time (profile/phases.json)."""
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name

    def rows(self, stage: str) -> list[Row]:
        """Metric rows of one stage, empty if the run did not reach it."""
        return self.stages.get(stage, [])

    def planned(self, *stages: str) -> bool:
        """Whether the configuration asks for one of the stages; without a list of stages it asks for all."""
        wanted = self.config.get("stages")
        return not isinstance(wanted, list) or any(stage in wanted for stage in stages)

    def awaits(self, *stages: str) -> bool:
        """Whether one of the stages was asked for and has not finished."""
        return any(self.planned(stage) and stage not in self.summaries for stage in stages)

    def cell(self, model: str, mode: str = "auto", band: str = "overall") -> Row | None:
        """Evaluation figures of one model in one mode, over all tasks or one difficulty band."""
        result = as_dict(as_dict(self.models.get(model)).get(mode))
        found = result.get("overall") if band == "overall" else as_dict(result.get("bands")).get(band)
        return found if isinstance(found, dict) and found else None

    def setting(self, name: str) -> Any:
        """First configuration value whose dotted name is `name` or ends with `.name`, else None."""
        for key, value in flatten(self.config):
            if key == name or key.endswith("." + name):
                return value
        return None


def as_dict(value: Any) -> dict[str, Any]:
    """`value` if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """A finite float, or None for anything else (bool included)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def get(row: Row | None, key: str) -> float | None:
    """The finite number under `key`, None without one."""
    return number(row.get(key)) if row is not None else None


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict as (dotted name, value) pairs, in order."""
    if isinstance(tree, dict) and (tree or not prefix):
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def load_run(run_dir: Path) -> Run:
    """Read `run_dir`.

    Raises:
        UserError: not a folder, one that cannot be listed, or it holds none of `RUN_FILES`.
    """
    try:
        names = os.listdir(run_dir)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            "no such run folder", where=str(run_dir), remedy="pass the folder a training run wrote"
        ) from error
    except OSError as error:
        raise UserError(
            f"the run folder cannot be read: {error.strerror or error}",
            where=str(run_dir),
            remedy="check its permissions",
        ) from error
    if not set(RUN_FILES) & set(names):
        raise UserError(
            "not a run folder: it has none of " + ", ".join(RUN_FILES),
            where=str(run_dir),
            remedy="pass the folder a training run wrote",
        )
    problems: list[str] = []
    config = _read_json(run_dir / "config.json", problems)
    settings = as_dict(config.get("config"))
    wanted = settings.get("stages")
    wanted = list(map(str, wanted)) if isinstance(wanted, list) else list(STAGES)
    metrics = _read_rows(run_dir / "metrics.jsonl", problems)
    results: dict[str, Any] = {}
    if "eval" in wanted or "results.json" in names:
        results = _read_json(run_dir / "results.json", problems)
    transcripts: list[Row] = []
    if {"rl", "eval"} & set(wanted) or "transcripts.jsonl" in names:
        transcripts = _read_rows(run_dir / "transcripts.jsonl", problems)
    stages = _by_stage(metrics)
    summaries = {}
    for stage in STAGES:
        if _there(run_dir / "stages" / f"{stage}.json"):
            summaries[stage] = _read_json(run_dir / "stages" / f"{stage}.json", problems)
    profile = {}
    if _there(run_dir / "profile" / "phases.json"):
        profile = _read_json(run_dir / "profile" / "phases.json", problems)
    open_stages = [stage for stage in wanted if stage not in summaries]
    if open_stages:
        problems.append(f"Not finished: {', '.join(STAGE_NAMES.get(s, s) for s in open_stages)}.")
    return Run(
        path=run_dir,
        config=settings,
        versions=as_dict(config.get("versions")),
        stages=stages,
        models={
            name: value for name, value in as_dict(results.get("models")).items() if isinstance(value, dict)
        },
        acu_unit=str(results.get("acu_unit") or ""),
        easy_share=number(results.get("easy_share")),
        transcripts=transcripts,
        summaries=summaries,
        profile=profile,
        problems=problems,
    )


def _there(path: Path) -> bool:
    """Whether a file is there; one that cannot be looked at is, and its reader says why it cannot be read."""
    try:
        return path.exists()
    except OSError:
        return True


def _by_stage(rows: list[Row]) -> dict[str, list[Row]]:
    stages: dict[str, dict[float, Row]] = {}
    for row in rows:
        step = number(row.get("step"))
        if step is not None:
            stages.setdefault(str(row.get("stage")), {})[step] = row
    return {stage: [by_step[step] for step in sorted(by_step)] for stage, by_step in stages.items()}


def _read_text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        problems.append(f"{path.name} is not there.")
    except OSError as error:
        problems.append(f"{path.name} could not be read: {error.strerror or error}.")
    return ""


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    text = _read_text(path, problems)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        problems.append(f"{path.name} is not a complete JSON object and was left out.")
        return {}
    return value


def _read_rows(path: Path, problems: list[str]) -> list[Row]:
    rows: list[Row] = []
    bad: list[int] = []
    # split on "\n" alone: splitlines would also cut at separators that are legal inside a JSON string
    for index, line in enumerate(_read_text(path, problems).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad.append(index)
    if bad:
        problems.append(f"{path.name}: {len(bad)} unreadable line(s) left out, the first is line {bad[0]}.")
    return rows
