"""From a cold start, plain GRPO forgets how to think; decoupled entropy constraints bring it back.

`python -m benchmarks.collapse` trains one base model, then runs the RL stage from it (`--start cold`: no warm-up, mode
tags 50/50) with `--arm none` and `--arm decoupled`, two seeds each, and prints for every run how far thinking on hard
tasks (k >= 4) falls, when it comes back, and where the run ends. Rates are those of the training rollouts, averaged
over 15 steps. Writes benchmarks/results/collapse.json and docs/images/collapse.png.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from autotool_fast.metrics import read_rows
from benchmarks.provenance import ROOT, write_results

WINDOW = 15
COLLAPSED, RECOVERED = 0.10, 0.70
ARMS = ("none", "decoupled")


def smooth(values: list[float | None], window: int = WINDOW) -> np.ndarray:
    """Trailing mean over at most `window` steps; steps without a value (None) are left out, NaN if all are."""
    means = []
    for end in range(1, len(values) + 1):
        known = [value for value in values[max(0, end - window) : end] if value is not None]
        means.append(float(np.mean(known)) if known else float("nan"))
    return np.array(means)


def recovery(rate: np.ndarray, level: float = RECOVERED) -> int | None:
    """Step (from 1) from which the rate stays at `level` or above: 0 if never below it, None if below at the end."""
    below = np.flatnonzero(rate < level)
    if not len(below):
        return 0
    return None if below[-1] == len(rate) - 1 else int(below[-1]) + 2


def measure(run: Path) -> dict[str, Any]:
    """The figures of one run's RL stage."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["stage"] == "rl"]
    hard = smooth([row.get("think_rate/hard") for row in rows])
    easy = smooth([row.get("think_rate/easy") for row in rows])
    accuracy = smooth([row.get("acc/hard") for row in rows])
    beta = [row["beta/long"] for row in rows]
    return {
        "steps": len(rows),
        "dip": float(np.nanmin(hard)),
        "recovery_step": recovery(hard),
        "think_hard": float(hard[-1]),
        "think_easy": float(easy[-1]),
        "acc_hard": float(accuracy[-1]),
        "acc_hard_area": float(np.nanmean(accuracy)),
        "beta_peak": max(beta),
        "beta_final": beta[-1],
        "seconds": rows[-1]["seconds"],
        "curve_think_hard": [None if np.isnan(x) else round(float(x), 4) for x in hard],
        "curve_beta": [round(float(x), 5) for x in beta],
    }


def train(out: Path, *options: str) -> None:
    """One run of the trainer in a process of its own; its progress goes to <out>.log."""
    command = [sys.executable, "-m", "autotool_fast.train", "--out", str(out), "--overwrite", *options]
    with out.with_suffix(".log").open("w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if code:
        raise SystemExit(f"{' '.join(command)} ended with code {code}; see {log.name}")


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Thinking rate on hard tasks and beta_l against steps, all runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"none": "#b4532a", "decoupled": "#1f6f8b"}
    names = {"none": "plain GRPO", "decoupled": "decoupled entropy constraints"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for key, values in results.items():
        arm, seed = key.split("/")
        style = {"color": colours[arm], "linestyle": ("-", "--", ":", "-.")[int(seed) % 4], "linewidth": 1.6}
        steps = np.arange(1, values["steps"] + 1)
        left.plot(steps, np.array(values["curve_think_hard"], float), **style, label=f"{names[arm]}, seed {seed}")
        if arm == "decoupled":
            right.plot(steps, values["curve_beta"], **style, label=f"seed {seed}")
    left.axhline(RECOVERED, color="0.7", linewidth=0.8)
    left.axhline(COLLAPSED, color="0.7", linewidth=0.8)
    left.set(xlabel="RL step", ylabel="thinking rate, hard tasks", ylim=(-0.02, 1.02), title="Thinking on hard tasks")
    right.set(xlabel="RL step", ylabel="beta_l", title="The entropy coefficient moves by itself")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/collapse"), help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--base", type=Path, help="a trained models/base folder to use instead of training one")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="-- and further options of the trainer, for all runs")
    args = parser.parse_args()
    options = [option for option in args.options if option != "--"]
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    base = args.base
    if base is None:
        print("training the base model", flush=True)
        train(args.out / "base", "--stages", "base", *options)
        base = args.out / "base" / "models" / "base"
    jobs = [(arm, seed) for seed in args.seeds for arm in ARMS]
    print(f"running {len(jobs)} RL stages, {args.jobs} at a time", flush=True)

    def run(job: tuple[str, int]) -> tuple[str, dict[str, Any]]:
        arm, seed = job
        out = args.out / f"{arm}-{seed}"
        fixed = ("--stages", "base,rl", "--start", "cold", "--refine.no-enabled")
        train(out, *fixed, "--arm", arm, "--seed", str(seed), "--base.reuse", str(base), *options)
        print(f"  {arm} seed {seed}: done after {time.perf_counter() - begin:.0f} s", flush=True)
        return f"{arm}/{seed}", measure(out)

    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(pool.map(run, jobs))
    seconds = time.perf_counter() - begin
    print_table(results, seconds)
    figure = ROOT / "docs" / "images" / "collapse.png"
    plot(results, figure)
    print(f"written: {write_results('collapse', {'seconds': seconds, 'options': options, 'runs': results})}, {figure}")


def print_table(results: dict[str, dict[str, Any]], seconds: float) -> None:
    """The table of the claim."""
    print(f"\nCold start, thinking on hard tasks (k >= 4), {WINDOW}-step means; {seconds / 60:.1f} min in all")
    print("arm        seed  steps  lowest  recovered at  final think hard / easy  final acc hard  beta_l peak -> final")
    for key, v in results.items():
        arm, seed = key.split("/")
        step = "never" if v["recovery_step"] is None else str(v["recovery_step"])
        print(
            f"{arm:<10} {seed:>4} {v['steps']:>6} {v['dip']:>7.2f} {step:>13}"
            f" {v['think_hard']:>14.2f} / {v['think_easy']:.2f} {v['acc_hard']:>15.2f}"
            f" {v['beta_peak']:>12.3f} -> {v['beta_final']:.3f}"
        )


if __name__ == "__main__":
    main()
