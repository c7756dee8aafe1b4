"""Statistics, tables and figures of the study that `benchmarks.reproduce` runs.

A figure is a mean over seeds with the half-width of its 95 % confidence interval (Student's t: seeds are few). Arms of
one start share base models, prompts and draws by seed, so they are compared by their differences within a seed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autotool_fast import files
from autotool_fast.alarms import NAMES
from autotool_fast.controller import ARMS

Result = dict[str, Any]
T_975 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, 97.5 % quantile, for 2 to 9 degrees of freedom."""
STARTS = ("cold", "noisy", "clean")
COLOURS = {
    "none": "#b4532a",
    "fixed": "#c9a227",
    "adaptive": "#7a9e4f",
    "decoupled-fixed": "#8a6fb0",
    "decoupled": "#1f6f8b",
}


class Estimate(NamedTuple):
    """Mean of n values, and the half-width of its 95 % confidence interval (NaN for fewer than three)."""

    mean: float
    half: float
    n: int

    def text(self, digits: int = 2, scale: float = 1.0, sign: bool = False) -> str:
        """`mean ± half`, times `scale`."""
        if not self.n:
            return "-"
        mean = f"{scale * self.mean:+.{digits}f}" if sign else f"{scale * self.mean:.{digits}f}"
        return mean if math.isnan(self.half) else f"{mean} ± {scale * self.half:.{digits}f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and confidence interval of independent values; unknown ones (NaN) are left out."""
    values = [value for value in values if not math.isnan(value)]
    n = len(values)
    if n < 3:  # two values have an interval, twelve times their distance
        return Estimate(float(np.mean(values)) if n else math.nan, math.nan, n)
    t = T_975[n - 3] if n - 3 < len(T_975) else 1.96
    return Estimate(float(np.mean(values)), float(t * np.std(values, ddof=1) / math.sqrt(n)), n)


def value(result: Result, name: str) -> float:
    """A figure of a unit by name, those of its evaluation with the prefix `eval.`; NaN if it is not known."""
    section, _, rest = name.rpartition(".")
    found = result[section].get(rest) if section else result[name]
    return math.nan if found is None else float(found)


def by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Units of each variant, by rising seed."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda r: r["seed"]):
        groups[result["variant"]].append(result)
    return dict(groups)


def difference(ours: Sequence[Result], others: Sequence[Result], name: str) -> Estimate:
    """Mean difference of a figure within the seeds that both have."""
    theirs = {r["seed"]: value(r, name) for r in others}
    return estimate([value(r, name) - theirs[r["seed"]] for r in ours if r["seed"] in theirs])


def recovered(members: Sequence[Result]) -> str:
    """How many seeds end with their thinking on hard tasks up, and the median step from which it stays up."""
    steps = [r["recovery_step"] for r in members if r["recovery_step"] is not None]
    count = f"{len(steps)}/{len(members)}"
    return count if not steps else f"{count}, {np.median(steps):.0f}"


COLUMNS: tuple[tuple[str, Callable[[Sequence[Result]], str]], ...] = (
    ("seeds", lambda m: str(len(m))),
    ("lowest thinking on hard", lambda m: estimate([value(r, "lowest_think_hard") for r in m]).text()),
    ("recovered, at step", recovered),
    ("thinks hard", lambda m: estimate([value(r, "eval.think_hard") for r in m]).text()),
    ("thinks medium", lambda m: estimate([value(r, "eval.think_medium") for r in m]).text()),
    ("thinks easy", lambda m: estimate([value(r, "eval.think_easy") for r in m]).text()),
    ("accuracy hard, %", lambda m: estimate([value(r, "eval.acc_hard") for r in m]).text(1, 100)),
    ("worst seed, %", lambda m: f"{100 * min(value(r, 'eval.acc_hard') for r in m):.1f}"),
    ("area under hard accuracy", lambda m: estimate([value(r, "acc_hard_area") for r in m]).text(3)),
    ("accuracy, %", lambda m: estimate([value(r, "eval.accuracy") for r in m]).text(1, 100)),
    ("tokens", lambda m: estimate([value(r, "eval.tokens") for r in m]).text(1)),
    ("ACU", lambda m: estimate([value(r, "eval.acu") for r in m]).text(1)),
    ("routing regret", lambda m: estimate([value(r, "eval.regret") for r in m]).text(3)),
)


def table(rows: Sequence[tuple[str, Sequence[Result]]]) -> str:
    """One Markdown row per variant."""
    lines = [
        "| | " + " | ".join(heading for heading, _ in COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    lines += [f"| {name} | " + " | ".join(write(members) for _, write in COLUMNS) + " |" for name, members in rows]
    return "\n".join(lines)


DIFFERENCES = (
    ("eval.acc_hard", "accuracy hard, points", 1, 100.0),
    ("acc_hard_area", "area under hard accuracy", 3, 1.0),
    ("eval.think_hard", "thinks hard", 2, 1.0),
    ("eval.tokens", "tokens", 1, 1.0),
    ("eval.acu", "ACU", 1, 1.0),
    ("eval.regret", "routing regret", 3, 1.0),
)


def differences(rows: Sequence[tuple[str, Sequence[Result], Sequence[Result]]]) -> str:
    """One Markdown row per pair: what the first has more than the second, within seeds."""
    lines = [
        "| | seeds | " + " | ".join(heading for _, heading, _, _ in DIFFERENCES) + " |",
        "|---|" + "---:|" * (len(DIFFERENCES) + 1),
    ]
    for name, ours, others in rows:
        seeds = len({r["seed"] for r in ours} & {r["seed"] for r in others})
        cells = [difference(ours, others, key).text(digits, scale, sign=True) for key, _, digits, scale in DIFFERENCES]
        lines.append(f"| {name} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def alarm_table(rows: Sequence[tuple[str, Sequence[Result]]]) -> str:
    """In how many runs of each variant each alarm was raised."""
    names = [name for name in NAMES if any(name in r["alarms"] for _, members in rows for r in members)]
    lines = [
        "| | runs | none | " + " | ".join(NAMES[name] for name in names) + " |",
        "|---|" + "---:|" * (len(names) + 2),
    ]
    for title, members in rows:
        counts = [sum(not r["alarms"] for r in members), *(sum(name in r["alarms"] for r in members) for name in names)]
        lines.append(f"| {title} | {len(members)} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def document(results: Sequence[Result]) -> str:
    """The study's tables as Markdown."""
    groups = by_variant(results)
    dates = sorted({r["provenance"]["date"] for r in results})
    devices = sorted({r["provenance"]["device"] for r in results})
    steps = {start: sorted({r["steps"] for r in results if r["start"] == start}) for start in STARTS}
    lines = [
        "# The study, in tables",
        "",
        "Written by `python -m benchmarks.reproduce` from `benchmarks/results/reproduce.json`; what it means is in",
        "[results](results.md). A figure is the mean over seeds ± the half-width of its 95 % confidence interval",
        "(Student's t); fewer than three seeds have none. RL steps: "
        + ", ".join(f"{start} {'/'.join(map(str, count))}" for start, count in steps.items() if count)
        + f". Made {dates[0]} to {dates[-1]} on {'; '.join(devices)}:",
        f"{len(results)} runs of one thread, {sum(r['steps'] for r in results):,} RL steps in "
        + f"{sum(r['seconds'] for r in results) / 3600:.1f} hours of RL in all, beside other work.",
        "",
        "Thinking rates, accuracy, tokens (mean response), ACU and routing regret are those of the final evaluation on",
        "held-out tasks, greedy, the mode chosen by the model. The lowest thinking rate, recovery (the step from which",
        "thinking on hard tasks stays at 70 % or above, 0 if it never fell below) and the area (mean over all steps)",
        "are of the training rollouts in 15-step means. Hard: four or more serial steps;",
        "medium: one to three; easy: none.",
    ]
    for start in STARTS:
        rows = [(arm, groups[f"{start}/{arm}"]) for arm in ARMS if f"{start}/{arm}" in groups]
        if not rows:
            continue
        lines += ["", f"## From a {start} start", "", table(rows)]
        ours = groups.get(f"{start}/decoupled", [])
        pairs = [(f"decoupled - {arm}", ours, members) for arm, members in rows if arm != "decoupled"]
        refined = groups.get(f"{start}/decoupled refine.enabled=true")
        if refined:
            pairs.append(("with refinement - without", refined, ours))
        if ours and pairs:
            lines += ["", "Differences within seeds:", "", differences(pairs)]
    changed = [(name, members) for name, members in groups.items() if members[0]["changes"]]
    if changed:
        used = {name.partition(" ")[0] for name, _ in changed}
        plain = [(name, groups[name]) for name in groups if name in used]
        lines += ["", "## Variants", "", table(sorted([*plain, *changed]))]
    rows = [(f"{start}/{arm}", groups.get(f"{start}/{arm}", [])) for start in STARTS for arm in ARMS]
    lines += ["", "## Alarms", "", "Runs in which an [alarm](metrics.md#alarms) was raised, and those without any.", ""]
    lines.append(alarm_table([(name, members) for name, members in rows if members]))
    return "\n".join(lines) + "\n"


MARKS = ("<!-- study: written by python -m benchmarks.reproduce -->", "<!-- end of study -->")
"""What stands around the study's table in a document."""


def summary(results: Sequence[Result]) -> str:
    """One Markdown row per arm: its recovery from the first start, its final evaluation from every start."""
    groups = by_variant(results)
    starts = [start for start in STARTS if any(f"{start}/{arm}" in groups for arm in ARMS)]
    heads = [f"{start}: {column}" for start in starts for column in ("thinks hard / easy", "accuracy hard, %")]
    heads[1] += ", worst seed"
    lines = [f"| arm | recovered, at step | {' | '.join(heads)} |", "|---|" + "---:|" * (1 + len(heads))]
    for arm in ARMS:
        cells = [recovered(groups.get(f"{starts[0]}/{arm}", []))]
        for start in starts:
            members = groups.get(f"{start}/{arm}", [])
            thinks = [estimate([value(r, f"eval.think_{band}") for r in members]).mean for band in ("hard", "easy")]
            cells.append(" / ".join(f"{rate:.2f}" for rate in thinks))
            accuracy = [value(r, "eval.acc_hard") for r in members]
            worst = f", {100 * min(accuracy):.0f}" if start == starts[0] and accuracy else ""
            cells.append(estimate(accuracy).text(0, 100) + worst)
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def insert(document: Path, results: Sequence[Result]) -> None:
    """Renew the summary between the marks of a document; one without them is left alone."""
    begin, end = MARKS
    text = document.read_text(encoding="utf-8") if document.exists() else ""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if found and closed:
        files.write_text(document, f"{before}{begin}\n\n{summary(results)}\n\n{end}{after}")


def _curves(members: Sequence[Result], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [T], one curve a seed [seeds, T])."""
    curves = [np.array(r["curves"][name], float) for r in members]
    length = min(map(len, curves))
    every = members[0]["steps"] / max(len(curves[0]), 1)
    return np.arange(1, length + 1) * every, np.stack([curve[:length] for curve in curves])


def plot_courses(results: Sequence[Result], path: Path) -> None:
    """Thinking on hard tasks over RL, a panel for each start and arm: every seed, their mean, and mean accuracy."""
    plt = _pyplot()
    groups = by_variant(results)
    starts = [s for s in STARTS if any(f"{s}/{arm}" in groups for arm in ARMS)]
    figure, axes = plt.subplots(
        len(starts),
        len(ARMS),
        figsize=(11, 2 * len(starts) + 0.5),
        squeeze=False,
        sharex="row",
        sharey=True,
        constrained_layout=True,
    )
    for row, start in enumerate(starts):
        for column, arm in enumerate(ARMS):
            axis = axes[row, column]
            if members := groups.get(f"{start}/{arm}"):
                steps, thinking = _curves(members, "think_hard")
                _, accuracy = _curves(members, "acc_hard")
                axis.plot(steps, thinking.T, color=COLOURS[arm], linewidth=0.8, alpha=0.45)
                axis.plot(steps, thinking.mean(0), color=COLOURS[arm], linewidth=2.2)
                axis.plot(steps, accuracy.mean(0), color="0.25", linewidth=1, linestyle=(0, (2, 2)))
            axis.set(ylim=(-0.03, 1.03))
            axis.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axis.set_title(arm, color=COLOURS[arm], fontsize=11)
        axes[row, 0].set_ylabel(f"{start} start")
    grey = {"color": "0.45"}
    handles = [
        plt.Line2D([], [], **grey, linewidth=0.8, label="thinking rate on hard tasks, a seed"),
        plt.Line2D([], [], **grey, linewidth=2.2, label="mean over seeds"),
        plt.Line2D([], [], color="0.25", linewidth=1, linestyle=(0, (2, 2)), label="accuracy on hard tasks, mean"),
    ]
    for axis in axes[-1]:
        axis.set_xlabel("RL step")
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_frontier(results: Sequence[Result], path: Path) -> None:
    """Accuracy against tokens of every start and arm: seeds faint, their mean strong, and lines of equal ACU."""
    plt = _pyplot()
    groups = by_variant(results)
    figure, axis = plt.subplots(figsize=(6.8, 4.2), constrained_layout=True)
    marks = dict(zip(STARTS, "os^", strict=True))
    shown = [r for start in STARTS for arm in ARMS for r in groups.get(f"{start}/{arm}", ())]
    for start in STARTS:
        for arm in ARMS:
            if not (members := groups.get(f"{start}/{arm}")):
                continue
            tokens = [value(r, "eval.tokens") for r in members]
            accuracy = [100 * value(r, "eval.accuracy") for r in members]
            style = {"color": COLOURS[arm], "marker": marks[start], "linestyle": ""}
            axis.plot(tokens, accuracy, **style, markersize=4, alpha=0.3, markeredgewidth=0)
            axis.plot(np.mean(tokens), np.mean(accuracy), **style, markersize=8, markeredgecolor="white")
    right = 1.05 * max(value(r, "eval.tokens") for r in shown)
    low, high = 100 * min(value(r, "eval.accuracy") for r in shown) - 3, 102.0
    # ACU = accuracy in % / (M tokens), so equal ACU is a ray from the origin; M is the same for all.
    ratios = [100 * value(r, "eval.accuracy") / value(r, "eval.tokens") for r in shown]
    per_acu = float(np.median([q / value(r, "eval.acu") for q, r in zip(ratios, shown, strict=True)]))
    for acu in (10, 20, 30, 40, 60, 80):
        slope = acu * per_acu
        if low < slope * right and min(ratios) / 1.1 < slope < 1.1 * max(ratios):
            axis.plot([0, right], [0, slope * right], color="0.85", linewidth=0.8, zorder=0)
            x = min(right, high / slope)
            axis.annotate(f"ACU {acu}", (x, slope * x), fontsize=7, color="0.5", ha="center", va="bottom")
    axis.set(xlim=(0, right), ylim=(low, high), xlabel="mean response tokens", ylabel="accuracy, %")
    arms = [plt.Line2D([], [], color=COLOURS[arm], marker="o", linestyle="", label=arm) for arm in ARMS]
    starts = [plt.Line2D([], [], color="0.4", marker=marks[s], linestyle="", label=f"{s} start") for s in STARTS]
    axis.legend(handles=[*arms, *starts], frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write(results: Sequence[Result], docs: Path) -> None:
    """Write `<docs>/study.md`, the README's summary beside `docs` and, with matplotlib, figures in `<docs>/images`."""
    (docs / "images").mkdir(parents=True, exist_ok=True)
    files.write_text(docs / "study.md", document(results))
    main = [r for r in results if not r["changes"]]
    if not main:
        return
    insert(docs.parent / "README.md", main)
    try:
        _pyplot()
    except ImportError:
        print("matplotlib is not installed: no figures (pip install 'autotool_fast[bench]')")
        return
    plot_courses(main, docs / "images" / "study_courses.png")
    plot_frontier(main, docs / "images" / "study_frontier.png")
