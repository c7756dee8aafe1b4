"""The study of the method on the embedded world: `python -m benchmarks.reproduce`, one command, resumable.

Every unit is one RL stage and its evaluation in a process of its own, from a start model that all units of the same
seed and start share, with the same number of steps and the same prompts in the same order:

    main         every entropy arm from every start (cold, noisy, clean), five seeds
    refinement   the paper's arm with data refinement, from every start, five seeds
    scope        tokens over which a response's entropy is averaged, cold start, three seeds
    target       entropy target H_l, cold start, three seeds
    coefficient  constants for the arms that hold one, start and step size for the one that adapts it, three seeds

Seeds differ in everything: base model, labels, prompts, draws. Seeds of the main comparison come first, so a study cut
short has whole seeds. Figures of finished units are kept in the results file and are not made again; Ctrl-C saves what
runs, and the same command goes on. Tables and figures are `benchmarks.study`'s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from autotool_fast import alarms, files
from autotool_fast.config import AlarmsConfig
from autotool_fast.controller import ARMS
from autotool_fast.metrics import read_rows
from benchmarks import study
from benchmarks.collapse import WINDOW, recovery, smooth
from benchmarks.provenance import RESULTS, provenance

STEPS = {"cold": 400, "noisy": 240, "clean": 240}
"""RL steps of every unit from a start: past the dip of thinking and its return."""
MAIN_SEEDS, SWEEP_SEEDS = range(5), range(3)
EVERY = 4
"""Curves are kept at every fourth step."""
Changes = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Unit:
    """One RL run: where it starts, its arm, and the settings in which it departs from the preset."""

    start: str
    arm: str
    seed: int
    changes: Changes = ()

    @property
    def variant(self) -> str:
        """Name without the seed."""
        return " ".join([f"{self.start}/{self.arm}", *(f"{name}={value}" for name, value in self.changes)])

    @property
    def key(self) -> str:
        """Name in the results."""
        return f"{self.variant} seed={self.seed}"

    @property
    def folder(self) -> str:
        """Name of the run folder."""
        return self.key.replace("/", "-").replace(" ", "+")

    def options(self, base: Path, steps: int) -> list[str]:
        """Options of the trainer."""
        refined = dict(self.changes).get("refine.enabled") == "true"
        settings = [o for name, value in self.changes if name != "refine.enabled" for o in (f"--{name}", value)]
        return [
            *("--stages", "base,refine,rl,eval" if refined else "base,rl,eval"),
            *("--start", "cold", "--base.reuse", str(base)),  # the start model stands in for the base
            *(() if refined else ("--refine.no-enabled",)),
            *("--arm", self.arm, "--seed", str(self.seed), "--rl.steps", str(steps), "--rl.eval-every", "0"),
            *settings,
        ]


def _sweep(arm: str, name: str, values: Iterable[object]) -> list[tuple[str, str, Changes]]:
    return [("cold", arm, ((name, str(value)),)) for value in values]


PAPER = (
    ("rl.entropy-scope", "reply"),
    ("rl.target-long", "0.2"),
    ("rl.beta-long", "0.01"),
    ("rl.beta-lr", "0.01"),
    ("rl.beta-max", "0.5"),
)
"""The paper's entropy settings, which are the library's defaults but not the preset's."""

STUDIES: dict[str, tuple[Sequence[int], list[tuple[str, str, Changes]]]] = {
    "main": (MAIN_SEEDS, [(start, arm, ()) for start in STEPS for arm in ARMS]),
    "refinement": (MAIN_SEEDS, [(start, "decoupled", (("refine.enabled", "true"),)) for start in STEPS]),
    "scope": (
        SWEEP_SEEDS,
        [*_sweep("decoupled", "rl.entropy-scope", ("reply", "think", "blend")), ("cold", "decoupled", PAPER)],
    ),
    "target": (SWEEP_SEEDS, _sweep("decoupled", "rl.target-long", (0.1, 0.2, 0.6))),
    "coefficient": (
        SWEEP_SEEDS,
        [
            *_sweep("fixed", "rl.beta-long", (0.03, 0.1, 1.0)),
            *_sweep("decoupled-fixed", "rl.beta-long", (0.03, 0.1, 1.0)),
            *_sweep("decoupled", "rl.beta-long", (0.0, 0.1, 1.0)),
            *_sweep("decoupled", "rl.beta-lr", (0.01, 0.2)),
        ],
    ),
}


def units(names: Iterable[str], seeds: Sequence[int] | None = None) -> list[Unit]:
    """Units of the named studies, each once, seed by seed within a study."""
    found: dict[Unit, None] = {}
    for name in names:
        own, variants = STUDIES[name]
        for seed in own if seeds is None else seeds:
            found |= {Unit(start, arm, seed, changes): None for start, arm, changes in variants}
    return list(found)


def _known(reduce: Callable[[np.ndarray], float], values: np.ndarray) -> float | None:
    """A reduction over the known values; None if there are none."""
    return None if np.isnan(values).all() else float(reduce(values))


def alarmed(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Alarms that the trainer's limits raise at some step."""
    watch, seen = alarms.Watch(), set()
    for row in rows:
        watch, begun, _ = alarms.advance(watch, row, AlarmsConfig())
        seen.update(begun)
    return sorted(seen)


def measure(run: Path) -> dict[str, Any]:
    """The figures of a finished unit: its course over the RL steps, and its evaluation."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["stage"] == "rl"]
    curves = {
        name: smooth([row.get(key) for row in rows])
        for name, key in (
            ("think_hard", "think_rate/hard"),
            ("think_easy", "think_rate/easy"),
            ("acc_hard", "acc/hard"),
            ("tokens", "tokens/response"),
        )
    }
    beta = [row["beta/long"] for row in rows]
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    auto = results["models"]["rl"]["auto"]
    return {
        "steps": len(rows),
        "seconds": rows[-1]["seconds"],
        "lowest_think_hard": _known(np.nanmin, curves["think_hard"][min(WINDOW, len(rows)) - 1 :]),
        "recovery_step": recovery(curves["think_hard"]),
        "acc_hard_area": _known(np.nanmean, np.array([row.get("acc/hard") for row in rows], float)),
        "beta_peak": max(beta),
        "beta_final": beta[-1],
        "alarms": alarmed(rows),
        "eval": {
            "accuracy": auto["overall"]["accuracy"],
            "tokens": auto["overall"]["tokens"],
            "acu": auto["overall"]["acu"],
            "malformed": auto["overall"]["malformed"],
            "regret": results["routing_regret"]["rl"],
            **{f"acc_{name}": values["accuracy"] for name, values in auto["bands"].items()},
            **{f"think_{name}": values["think_rate"] for name, values in auto["bands"].items()},
        },
        "start_eval": {
            "accuracy": results["models"]["base"]["auto"]["overall"]["accuracy"],
            "acc_hard": results["models"]["base"]["auto"]["bands"]["hard"]["accuracy"],
            "think_hard": results["models"]["base"]["auto"]["bands"]["hard"]["think_rate"],
        },
        "curves": {
            name: [None if np.isnan(x) else round(float(x), 4) for x in values[EVERY - 1 :: EVERY]]
            for name, values in (curves | {"beta": beta}).items()
        },
    }


class Results:
    """The results file: written anew after every unit, read again at the start."""

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.path, self.fingerprint, self._lock = path, fingerprint, threading.Lock()
        self.units: dict[str, Any] = {}
        if path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["settings"] != fingerprint:
                raise SystemExit(f"{path} holds units of other settings {saved['settings']}: move it or use --results")
            self.units = saved["units"]

    def add(self, unit: Unit, figures: dict[str, Any]) -> None:
        """Keep a unit's figures, with the machine and versions that made them."""
        facts = {"start": unit.start, "arm": unit.arm, "seed": unit.seed, "changes": dict(unit.changes)}
        with self._lock:
            self.units[unit.key] = {**facts, "variant": unit.variant, **figures, "provenance": provenance()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One unit a line: indented, its curves would be hundreds.
            lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in self.units.items())
            settings, rows = json.dumps(self.fingerprint), ",\n".join(lines)
            files.write_text(self.path, f'{{"settings": {settings}, "units": {{\n{rows}\n}}}}\n')


class Stopped(Exception):
    """The user asked to stop; what ran has been saved."""


def launch(command: list[str], log: TextIO) -> int:
    """Run a command with its output in `log`; returns its exit code."""
    return subprocess.run(command, stdout=log, stderr=log, check=False).returncode


class Trainer:
    """Runs the trainer in processes, each with a log beside its run folder, and stops them together."""

    def __init__(self, out: Path, options: list[str]) -> None:
        self.out, self.extra = out, options
        self.stopping = threading.Event()
        self._making: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def run(self, name: str, options: list[str]) -> Path:
        """Train, or go on with, the run folder `name`; does nothing if it has been finished."""
        folder = self.out / name
        done = folder.with_name(f"{name}.done")
        if done.exists():
            return folder
        if self.stopping.is_set():
            raise Stopped
        begun = (folder / "config.json").exists()
        command = [sys.executable, "-m", "autotool_fast.train", "--out", str(folder)]
        command += ["--resume"] if begun else ["--overwrite"]
        with folder.with_name(f"{name}.log").open("a", encoding="utf-8") as log:
            code = launch([*command, *options, *self.extra], log)
        if code == 130:
            self.stopping.set()
        if self.stopping.is_set() and code:
            raise Stopped
        if code:
            raise RuntimeError(f"{name} ended with code {code}; see {log.name}")
        done.touch()
        return folder

    def start_model(self, start: str, seed: int) -> Path:
        """The model from which the units of a start and seed begin; made by whoever needs it first."""
        base = self._once(f"base-{seed}", ["--stages", "base", "--seed", str(seed)]) / "models" / "base"
        if start == "cold":
            return base
        made = ["--stages", "base,label,warmup", "--start", start, "--seed", str(seed), "--base.reuse", str(base)]
        return self._once(f"{start}-{seed}", made) / "models" / "warmup"

    def _once(self, name: str, options: list[str]) -> Path:
        with self._guard:
            lock = self._making.setdefault(name, threading.Lock())
        with lock:
            return self.run(name, options)


def run_units(todo: Sequence[Unit], trainer: Trainer, results: Results, jobs: int, steps: dict[str, int]) -> list[str]:
    """Run units side by side; returns what failed. A failed unit does not stop the others."""
    begin, failures = time.perf_counter(), []
    finished = 0

    def one(unit: Unit) -> None:
        nonlocal finished
        try:
            base = trainer.start_model(unit.start, unit.seed)
            results.add(unit, measure(trainer.run(unit.folder, unit.options(base, steps[unit.start]))))
        except Stopped:
            return
        except (RuntimeError, OSError, KeyError, ValueError) as error:
            failures.append(f"{unit.key}: {error}")
            print(f"  failed: {failures[-1]}", flush=True)
            return
        finished += 1
        print(f"  {finished}/{len(todo)} {unit.key}, after {(time.perf_counter() - begin) / 60:.1f} min", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(one, unit) for unit in todo]
        try:
            for future in waiting:
                future.result()
        except KeyboardInterrupt:  # the trainers got it too: they save and leave
            trainer.stopping.set()
            print("stopping: waiting for the runs to save", flush=True)
            for future in waiting:
                future.cancel()
    return failures


def plan(todo: Sequence[Unit], steps: dict[str, int], say: Callable[[str], None] = print) -> None:
    """What a call will do."""
    total = sum(steps[unit.start] for unit in todo)
    say(f"{len(todo)} units, {total:,} RL steps in all")
    for unit in todo:
        say(f"  {unit.key}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS / "reproduce.json", help="file for the figures")
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), default=list(STUDIES), help="parts of the study")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of every part, in place of its own")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--steps", type=int, help="RL steps of every unit, in place of each start's own")
    parser.add_argument("--plan", action="store_true", help="list the units and stop")
    parser.add_argument("--report-only", action="store_true", help="tables and figures of what the results file has")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where study.md and its images go")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="-- and further options of the trainer, for all runs")
    args = parser.parse_args()
    extra = [option for option in args.options if option != "--"]
    steps = STEPS if args.steps is None else dict.fromkeys(STEPS, args.steps)
    todo = units(args.only, args.seeds)
    if args.plan:
        plan(todo, steps)
        return 0
    results = Results(args.results, {"steps": steps, "options": extra})
    failures: list[str] = []
    stopping = False
    if not args.report_only:
        todo = [unit for unit in todo if unit.key not in results.units]
        args.out.mkdir(parents=True, exist_ok=True)
        print(f"{len(todo)} units to run, {len(results.units)} there already, {args.jobs} at a time", flush=True)
        trainer = Trainer(args.out, extra)
        failures = run_units(todo, trainer, results, args.jobs, steps)
        stopping = trainer.stopping.is_set()
    if results.units:
        study.write(list(results.units.values()), args.docs)
        print((args.docs / "study.md").read_text(encoding="utf-8"))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if stopping:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
