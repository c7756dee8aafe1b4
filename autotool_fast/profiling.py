"""`--profile`: where the time of a run goes, by stage.

    profile/<stage>-rank0.trace.json   a few steps as a Chrome trace (Perfetto, chrome://tracing), phases named in it
    profile/phases.json, phases.md     seconds, share and calls of every phase of every stage

Guarantees: rows do not overlap and, with "other", add up to the stage's time; the steps in the trace, which recording
slows down, and writing it are left out of the table unless a stage has no other step; nothing that is computed changes.
On CUDA a phase ends when the device has done its work, so steps that would overlap phases take longer than unobserved
ones. What the phases are is decided where they are timed; one process (rank 0) is looked at.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from autotool_fast import files
from autotool_fast.config import STAGES
from autotool_fast.errors import Interrupted
from autotool_fast.metrics import Phase, Timer

SKIPPED_STEPS = 2
"""Steps before the trace begins: the first ones warm caches up."""
TRACE = "trace"
LABELS = {
    "data": "data",
    "rollout": "rollout",
    "tools": "tool wait",
    "logprob": "log-prob",
    "loss": "loss",
    "backward": "backward",
    "optimizer": "optimizer",
    "sync": "sync",
    "checkpoint": "checkpoint",
    "eval": "eval",
}
"""Phases in the order of the table, and how it calls them. One inside another is "outer / inner"."""
Totals = Mapping[Phase, tuple[int, float]]


class Profiler:
    """Observes the phases of a timer, stage by stage.

    Args:
        timer: its clock and annotations become the profiler's.
        folder: for what is written; made when there is something to write.
        traced: steps of each stage in its trace.
        device: "cpu" or "cuda".
    """

    def __init__(self, timer: Timer, folder: Path, traced: int, device: str) -> None:
        self._timer, self._folder, self._wanted, self._cuda = timer, folder, traced, device == "cuda"
        timer.annotate = record_function
        if self._cuda:
            timer.clock = _settled_clock
        self._stage = ""
        self._steps = 0
        self._trace: profile | None = None
        self._window: list[tuple[int, float, dict[Phase, tuple[int, float]]]] = []  # marks where it begins and ends

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Observe a stage; its table is written when it is done or was stopped by the user."""
        self._stage, self._steps, self._window = name, 0, []
        begin = self._mark()
        try:
            yield
        except Interrupted:
            self._finish(begin)
            raise
        self._finish(begin)

    def steps(self, numbers: range) -> Iterator[int]:
        """The numbers, one for each step; some of the steps are recorded."""
        first = min(SKIPPED_STEPS, max(len(numbers) - 1, 0))
        for place, number in enumerate(numbers):
            if place == first:
                self._begin_trace()
            yield number
            self._steps += 1
            if place + 1 == first + self._wanted:
                self._end_trace()
        self._end_trace()

    def text(self) -> str:
        """The tables of all stages of the run, as Markdown."""
        return "\n".join(_markdown(name, entry) for name, entry in self._read().items())

    def _mark(self) -> tuple[int, float, dict[Phase, tuple[int, float]]]:
        return self._steps, self._timer.clock(), dict(self._timer.totals)

    def _begin_trace(self) -> None:
        self._folder.mkdir(exist_ok=True)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it prints lines of its own at each start and stop
        with self._timer.phase(TRACE):
            self._trace = profile(activities=activities)
            self._trace.start()
        self._window = [self._mark()]

    def _end_trace(self) -> None:
        if self._trace is None:
            return
        self._window.append(self._mark())
        trace, self._trace = self._trace, None
        with self._timer.phase(TRACE):
            trace.stop()
            trace.export_chrome_trace(str(self._folder / f"{self._stage}-rank0.trace.json"))

    def _finish(self, begin: tuple[int, float, dict[Phase, tuple[int, float]]]) -> None:
        self._end_trace()
        steps, seconds, totals = _between(begin, self._mark())
        if self._window:
            traced, taken, spent = _between(*self._window)
            if traced < steps:
                steps, seconds, totals = steps - traced, seconds - taken, _less(totals, spent)
        seconds -= totals.pop((TRACE,), (0, 0.0))[1]
        entry = {"seconds": seconds, "steps": steps, "phases": _rows(totals, seconds, steps)}
        known = self._read() | {self._stage: entry}
        self._folder.mkdir(exist_ok=True)
        files.write_json(self._folder / "phases.json", {name: known[name] for name in STAGES if name in known})
        files.write_text(self._folder / "phases.md", self.text())

    def _read(self) -> dict[str, Any]:
        path = self._folder / "phases.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _settled_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _between(begin: tuple[int, float, Totals], end: tuple[int, float, Totals]) -> tuple[int, float, dict]:
    return end[0] - begin[0], end[1] - begin[1], _less(end[2], begin[2])


def _less(totals: Totals, earlier: Totals) -> dict[Phase, tuple[int, float]]:
    """Calls and seconds of the phases that `totals` has more of."""
    rest = {}
    for phase, (calls, seconds) in totals.items():
        before = earlier.get(phase, (0, 0.0))
        if calls > before[0]:
            rest[phase] = (calls - before[0], seconds - before[1])
    return rest


def _rows(totals: Totals, seconds: float, steps: int) -> list[dict[str, Any]]:
    """One row per phase, outer before inner, and "other" for what none of them covers."""
    order = list(LABELS)

    def place(phase: Phase) -> list[int]:
        return [order.index(name) if name in LABELS else len(order) for name in phase]

    found = [(" / ".join(LABELS.get(name, name) for name in p), *totals[p]) for p in sorted(totals, key=place)]
    found.append(("other", 0, seconds - sum(own for _, _, own in found)))
    return [
        {
            "phase": label,
            "seconds": own,
            "share": own / seconds,
            "ms_per_step": 1e3 * own / steps if steps else None,
            "calls": calls,
        }
        for label, calls, own in found
    ]


def _markdown(stage: str, entry: Mapping[str, Any]) -> str:
    steps = f" in {entry['steps']} steps" if entry["steps"] else ""
    lines = [
        f"## {stage}: {entry['seconds']:.2f} s{steps}",
        "",
        "| phase | seconds | share | ms per step | calls |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in entry["phases"]:
        each = "-" if row["ms_per_step"] is None else f"{row['ms_per_step']:.1f}"
        calls = row["calls"] or "-"
        lines.append(f"| {row['phase']} | {row['seconds']:.3f} | {row['share']:.1%} | {each} | {calls} |")
    return "\n".join([*lines, ""])
