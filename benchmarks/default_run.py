"""The default run, measured: `python -m benchmarks.default_run` is `make train` per seed, with time and peak memory.

Prints the README's table and the claims it is held to, and writes benchmarks/results/default_run.json and
docs/images/default_run.png. Runs are made one at a time so that the clock means something.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from autotool_fast.metrics import read_rows
from benchmarks.collapse import smooth
from benchmarks.provenance import write_results

NAMES = {"base": "base", "distilled": "always-think SFT", "warmup": "warm-up SFT", "rl": "AutoTool RL"}


def run_once(out: Path, seed: int, options: list[str]) -> dict[str, Any]:
    """One run in a process of its own; returns wall seconds and peak resident memory in MiB."""
    code = (
        "import resource, sys; from autotool_fast.train import main; status = main(sys.argv[1:]); "
        "print('peak_kib', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "--out", str(out), "--overwrite", "--seed", str(seed), *options]
    begin = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"seed {seed} ended with code {done.returncode}")
    peak = int(re.search(r"peak_kib (\d+)", done.stdout).group(1))
    return {"seconds": seconds, "peak_mib": peak / 1024}


def claims(results: dict[str, Any]) -> dict[str, Any]:
    """What the default run is held to, as numbers."""
    rl, always = results["models"]["rl"]["auto"], results["models"]["distilled"]["auto"]
    base = results["models"]["base"]
    hop = {
        mode: [c["accuracy"] for c in base[mode]["cells"] if c["family"] == "hop" and c["difficulty"] >= 2]
        for mode in ("no_think", "think")
    }
    return {
        "hop_no_think": sum(hop["no_think"]) / len(hop["no_think"]),
        "hop_think": sum(hop["think"]) / len(hop["think"]),
        "think_hard": rl["bands"]["hard"]["think_rate"],
        "think_easy": rl["bands"]["easy"]["think_rate"],
        "acc_hard": rl["bands"]["hard"]["accuracy"],
        "acc_hard_always_think": always["bands"]["hard"]["accuracy"],
        "tokens": rl["overall"]["tokens"],
        "tokens_always_think": always["overall"]["tokens"],
        "tokens_saved": 1 - rl["overall"]["tokens"] / always["overall"]["tokens"],
    }


def hard_accuracy(run: Path, per_cell: int = 200) -> dict[str, float]:
    """Accuracy on hard tasks in mode auto, RL and always-think, over many more tasks than the run's own evaluation.

    The two models get the same tasks; `difference_se` is the standard error of the difference over these pairs.
    """
    import numpy as np
    import torch

    from autotool_fast.chat import ChatFormat
    from autotool_fast.pipeline import load_model
    from autotool_fast.rl import rollout_limits
    from autotool_fast.rollout.driver import rollout
    from autotool_fast.rollout.engine import SlotEngine
    from autotool_fast.runs import read_config
    from autotool_fast.tasks.tiny import build_tokenizer
    from autotool_fast.tasks.world import World, band

    torch.set_num_threads(1)
    config, chat = read_config(run), ChatFormat(build_tokenizer())
    world = World(config.world.families, config.world.max_difficulty)
    tasks = [task for task in world.grid(per_cell, "test", "benchmark") if band(task.difficulty) == "hard"]
    correct = {}
    for name in ("rl", "distilled"):
        model = load_model(run / "models" / name)
        engine = SlotEngine(model, slots=config.rollout.slots, max_len=config.model.max_positions)
        limits = rollout_limits(config.rollout)
        done = rollout(engine, tasks, chat=chat, group_size=1, seed=0, step=0, temperature=0.0, limits=limits)
        correct[name] = np.array([trajectory.correct for trajectory in done], dtype=float)
    difference = correct["rl"] - correct["distilled"]
    return {
        "tasks": len(tasks),
        "rl": float(correct["rl"].mean()),
        "always_think": float(correct["distilled"].mean()),
        "difference": float(difference.mean()),
        "difference_se": float(difference.std(ddof=1) / len(tasks) ** 0.5),
    }


def markdown(results: dict[str, Any]) -> str:
    """The models of one run as a Markdown table."""
    lines = [
        "| model | accuracy | thinks | tokens | ACU | easy: acc / thinks | medium | hard (k >= 4) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key, name in NAMES.items():
        auto = results["models"][key]["auto"]
        overall, bands = auto["overall"], auto["bands"]
        cells = [f"{100 * bands[b]['accuracy']:.0f} % / {100 * bands[b]['think_rate']:.0f} %" for b in bands]
        lines.append(
            f"| {name} | {100 * overall['accuracy']:.1f} % | {100 * overall['think_rate']:.0f} % |"
            f" {overall['tokens']:.1f} | {overall['acu']:.1f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def plot(run: Path, results: dict[str, Any], path: Path) -> None:
    """Thinking by band over RL, and accuracy against tokens of every model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in read_rows(run / "metrics.jsonl") if row["stage"] == "rl"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for name, colour in (("hard", "#1f6f8b"), ("medium", "#7a9e4f"), ("easy", "#b4532a")):
        rate = smooth([row.get(f"think_rate/{name}") for row in rows])
        left.plot(range(1, len(rate) + 1), rate, color=colour, linewidth=1.6, label=name)
    left.set(xlabel="RL step", ylabel="thinking rate (15-step mean)", ylim=(-0.02, 1.02), title="When it thinks")
    left.legend(frameon=False, fontsize=8, title="tasks", title_fontsize=8)
    for key, name in NAMES.items():
        overall = results["models"][key]["auto"]["overall"]
        colour = "#1f6f8b" if key == "rl" else "0.45"
        right.scatter(overall["tokens"], 100 * overall["accuracy"], color=colour, zorder=3)
        place = {"textcoords": "offset points", "xytext": (6, -10 if key == "warmup" else 5), "fontsize": 8}
        right.annotate(name, (overall["tokens"], 100 * overall["accuracy"]), **place)
    right.set(xlabel="mean response tokens", ylabel="accuracy, %", title="What it costs")
    right.margins(0.2)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/default"), help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--measured-only", action="store_true", help="read finished runs below --out again")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="-- and further options of the trainer")
    args = parser.parse_args()
    options = [option for option in args.options if option != "--"]
    args.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Any] = {}
    for seed in args.seeds:
        folder = args.out / f"seed-{seed}"
        cost_file = args.out / f"seed-{seed}.cost.json"
        if not args.measured_only:
            cost_file.write_text(json.dumps(run_once(folder, seed, options)), encoding="utf-8")
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        cost = json.loads(cost_file.read_text(encoding="utf-8"))
        hard = hard_accuracy(folder)
        runs[str(seed)] = {**cost, **claims(results), "hard_many": hard, "models": results["models"]}
        if seed == args.seeds[0]:
            print(markdown(results))
            plot(folder, results, Path("docs/images/default_run.png"))
    print("\nseed  min  peak MiB  hop no-think/think  thinks hard/easy  acc hard RL/always-think  tokens saved")
    for seed, v in runs.items():
        cells = (
            f"{v['seconds'] / 60:.1f}",
            f"{v['peak_mib']:9.0f}",
            f"{v['hop_no_think']:12.2f} / {v['hop_think']:.2f}",
            f"{v['think_hard']:11.2f} / {v['think_easy']:.2f}",
            f"{v['acc_hard']:18.3f} / {v['acc_hard_always_think']:.3f}",
            f"{100 * v['tokens_saved']:11.0f} %",
        )
        print(f"{seed:>4}  {'  '.join(cells)}")
    print("\nhard tasks again, the same ones for both models: RL, always-think, difference +- standard error")
    for seed, v in runs.items():
        m = v["hard_many"]
        numbers = f"{m['rl']:.3f}  {m['always_think']:.3f}  {m['difference']:+.3f} +- {m['difference_se']:.3f}"
        print(f"{seed:>4}  {numbers}  ({m['tasks']} tasks)")
    print(f"written: {write_results('default_run', {'options': options, 'runs': runs})}, docs/images/default_run.png")


if __name__ == "__main__":
    main()
