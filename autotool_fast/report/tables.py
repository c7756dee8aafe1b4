"""The numbers of the report: headline, comparison, premise and stage tables.

Pure functions from a `Run` to plain data (strings and small dataclasses) that page.html lays out. A figure
that the run does not have is a dash. Percentages are of tasks, tokens are sampled response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autotool_fast.report.charts import heat_level, mean, percent, plain
from autotool_fast.report.load import STAGE_NAMES, STAGES, Row, Run, as_dict, get
from autotool_fast.tasks.world import BANDS

DASH = "–"
MODES = ("auto", "think", "no_think")
MODEL_NAMES = {"base": "Base", "distilled": "Distilled", "warmup": "Warm-up", "rl": "RL"}
RECENT = 10


@dataclass(frozen=True)
class Cell:
    """One table cell; `level` is a heat colour or None, `tip` a tooltip."""

    text: str
    tip: str = ""
    level: int | None = None


@dataclass(frozen=True)
class Table:
    """`columns` head the cells of each (row label, cells); `emphasis` is the label of the row to stress."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    note: str = ""
    emphasis: str = ""
    corner: str = ""


def model_order(run: Run) -> list[str]:
    """Models of the run in the order of training, unknown ones last."""
    return [m for m in MODEL_NAMES if m in run.models] + [m for m in run.models if m not in MODEL_NAMES]


def model_name(model: str) -> str:
    """The name a reader sees."""
    return MODEL_NAMES.get(model, model)


def rate(value: float) -> str:
    """A share in [0, 1] as a percentage with one decimal, so that a column lines up."""
    return f"{100 * value:.1f}%"


def points(value: float) -> str:
    """A share in [0, 1] in percent, without the sign: for tables that state the unit."""
    return f"{100 * value:.1f}"


def whole_points(value: float) -> str:
    """A share in [0, 1] in whole percent, for tables with many columns."""
    return f"{100 * value:.0f}"


def tokens(value: float) -> str:
    """A token count: one decimal below 100, thousands separated above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def significant(value: float) -> str:
    """Three significant digits, but at most three decimals down to 0.001; no exponent up to a million."""
    if value == 0 or not 1e-3 <= abs(value) < 1e6:
        return plain(value)
    digits = min(3, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:,.{digits}f}"


def wilson(p: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): unlike p +- z * se it has a width at p = 0 and p = 1."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(0.0, p * (1 - p) / n + z * z / (4 * n * n)))
    return max(0.0, centre - half), min(1.0, centre + half)


def show(value: float | None, write: Callable[[float], str]) -> str:
    """The value as `write` gives it, a dash without one."""
    return DASH if value is None else write(value)


MEASURES = (
    ("Accuracy", "accuracy", points),
    ("Thinking rate", "think_rate", points),
    ("Response tokens", "tokens", tokens),
    ("ACU", "acu", significant),
)


def headline(run: Run) -> str:
    """The outcome in one or two computed sentences, for whatever the run has reached."""
    rl = run.cell("rl")
    if rl is None:
        return _unfinished_headline(run)
    hardest, easiest = _extreme_bands(run)
    ends = dict.fromkeys((hardest, easiest))
    thinks = " and ".join(f"{_share(run, 'rl', 'think_rate', scope)} of the{_kind(scope)}" for scope in ends)
    text = (
        f"In auto mode the RL model thinks on {thinks} test tasks, solves {_share(run, 'rl', 'accuracy')} of the "
        f"test mix and writes {show(get(rl, 'tokens'), tokens)} response tokens per task."
    )
    reference = reference_model(run)
    if reference is None:
        return text + " There is no other model to compare it with."
    length = get(run.cell(reference), "tokens")
    name = "always-think (distilled)" if reference == "distilled" else MODEL_NAMES[reference].lower()
    text += (
        f" {'The' if reference == 'distilled' else 'Before RL, the'} {name} model solves "
        f"{_share(run, reference, 'accuracy')} with {show(length, tokens)} tokens: the RL model uses "
        f"{_relative(get(rl, 'tokens'), length)}"
    )
    if hardest == "overall":
        return text + "."
    return text + (
        f", and solves {_share(run, 'rl', 'accuracy', hardest)} of the{_kind(hardest)} tasks against "
        f"{_share(run, reference, 'accuracy', hardest)}."
    )


def reference_model(run: Run) -> str | None:
    """What RL is compared with: the always-think model, else the one it began with; None without either."""
    return next((m for m in ("distilled", "warmup", "base") if run.cell(m) is not None), None)


def scopes(run: Run) -> list[str]:
    """"overall" and the bands that the test split has tasks of."""
    models = model_order(run)
    return ["overall", *(band for band in BANDS if any(run.cell(m, "auto", band) for m in models))]


def _extreme_bands(run: Run) -> tuple[str, str]:
    """The hardest and the easiest band of the test split, "overall" for both without any."""
    bands = [band for band in scopes(run) if run.cell("rl", "auto", band)]
    return bands[-1], bands[min(1, len(bands) - 1)]


def _kind(scope: str) -> str:
    return "" if scope == "overall" else f" {scope}"


def _share(run: Run, model: str, key: str, band: str = "overall") -> str:
    return show(get(run.cell(model, "auto", band), key), percent)


def _relative(value: float | None, reference: float | None) -> str:
    if value is None or not reference:
        return "an unknown share of them"
    change = value / reference - 1
    return (
        "as many" if abs(change) < 0.0005 else f"{percent(abs(change))} {'fewer' if change < 0 else 'more'}"
    )


def _unfinished_headline(run: Run) -> str:
    rows = run.rows("rl")
    if not rows:
        reached = [STAGE_NAMES[s] for s in STAGES if run.rows(s)]
        where = (
            f"the last stage with measurements is {reached[-1]}"
            if reached
            else "nothing has been measured yet"
        )
        return f"This run has no RL result: {where}."
    recent = rows[-RECENT:]

    def last(key: str, write: Callable[[float], str] = percent) -> str:
        return show(mean([get(row, key) for row in recent]), write)

    planned = run.setting("rl.steps")
    of = f" of {planned}" if isinstance(planned, int) else ""
    over = f"Over its last {len(recent)} steps" if len(recent) > 1 else "In that step"
    return (
        f"RL is at step {plain(float(rows[-1]['step']))}{of} and has not been evaluated on the test split. "
        f"{over} it thinks on {last('think_rate/hard')} of the hard and "
        f"{last('think_rate/easy')} of the easy training tasks, solves {last('acc/all')} and writes "
        f"{last('tokens/response', tokens)} response tokens per task."
    )


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, comparison) of the outcome figures; empty without an evaluated RL model."""
    if run.cell("rl") is None:
        return []

    reference = reference_model(run)
    hardest, easiest = _extreme_bands(run)

    def tile(label: str, key: str, band: str, write: Callable[[float], str]) -> tuple[str, str, str]:
        value = get(run.cell("rl", "auto", band), key)
        before = get(run.cell(reference, "auto", band), key) if reference else None
        against = "" if before is None else f"{model_name(reference).lower()} {write(before)}"
        return label, show(value, write), against

    found = [tile("Accuracy", "accuracy", "overall", rate)]
    if hardest != "overall":
        found.append(tile(f"Accuracy, {hardest}", "accuracy", hardest, rate))
        found.append(tile(f"Thinks on {hardest}", "think_rate", hardest, rate))
    if easiest != hardest:
        found.append(tile(f"Thinks on {easiest}", "think_rate", easiest, rate))
    return [
        *found,
        tile("Response tokens", "tokens", "overall", tokens),
        tile("ACU", "acu", "overall", significant),
    ]


def final_tables(run: Run) -> list[Table]:
    """Accuracy, thinking rate, tokens and ACU in auto mode: models as rows, bands as columns."""
    models = [m for m in model_order(run) if run.cell(m) is not None]
    if not models:
        return []
    notes = (
        "% of tasks solved",
        "% of replies that open with [think]",
        "mean per task",
        run.acu_unit or "unit not recorded",
    )
    return [_measure_table(run, models, *m, note) for m, note in zip(MEASURES, notes, strict=True)]


def _measure_table(
    run: Run, models: list[str], title: str, key: str, write: Callable[[float], str], note: str
) -> Table:
    rows = []
    for model in models:
        cells = []
        for band in scopes(run):
            cell = run.cell(model, "auto", band)
            value, n = get(cell, key), get(cell, "n")
            tip = f"n = {plain(n)}" if n else ""
            if value is not None and n and key in ("accuracy", "think_rate") and 0 <= value <= 1:
                low, high = wilson(value, n)
                tip = f"95% interval {percent(low)} to {percent(high)}, {tip}"
            cells.append(Cell(show(value, write), tip))
        rows.append((model_name(model), tuple(cells)))
    if "rl" in models and "distilled" in models:
        changes = []
        for band in scopes(run):
            new, old = (get(run.cell(m, "auto", band), key) for m in ("rl", "distilled"))
            changes.append(Cell(change(new, old, key)))
        rows.append(("RL − distilled", tuple(changes)))
    columns = tuple("All" if scope == "overall" else scope.capitalize() for scope in scopes(run))
    return Table(title, columns, tuple(rows), note, emphasis=model_name("rl"))


def mode_table(run: Run) -> Table | None:
    """Overall figures of every model in every mode, None without an evaluation."""
    rows = []
    for model in model_order(run):
        for mode in MODES:
            cell = run.cell(model, mode)
            if cell is not None:
                values = ((get(cell, key), write) for _, key, write in MEASURES)
                rows.append((f"{model_name(model)} · {mode}", tuple(Cell(show(*v)) for v in values)))
    if not rows:
        return None
    return Table(
        "All models and modes", ("Solved, %", "Thinks, %", "Tokens", "ACU"), tuple(rows), emphasis="RL · auto"
    )


def change(new: float | None, old: float | None, key: str) -> str:
    """New against old: points for shares, percent for tokens and ACU; a dash where one is unknown."""
    if new is None or old is None:
        return DASH
    if key in ("accuracy", "think_rate"):
        text = f"{100 * (new - old):+.1f}"
    else:
        text = f"{100 * (new / old - 1):+.0f}%" if old else DASH
    return text.replace("-", "−")


def interval_note(run: Run) -> str:
    """How wide the accuracy intervals of the final table are at most, overall and in one band."""
    widths: dict[bool, list[float]] = {True: [], False: []}
    for model in model_order(run):
        for band in scopes(run):
            cell = run.cell(model, "auto", band)
            p, n = get(cell, "accuracy"), get(cell, "n")
            if p is not None and n and 0 <= p <= 1:
                low, high = wilson(p, n)
                widths[band == "overall"].append((high - low) / 2)
    if not widths[True] or not widths[False]:
        return ""
    return (
        "Half-width of the 95% interval of an accuracy (Wilson, all tasks counted alike): at most "
        f"{100 * max(widths[True]):.1f} points overall, {100 * max(widths[False]):.1f} in a band."
    )


def band_note(run: Run) -> str:
    """What the bands are and how the test mix weights them."""
    limits = {
        name: f"k = {low}" if low == high else f"k = {low} to {high}" for name, (low, high) in BANDS.items()
    }
    limits["hard"] = f"k ≥ {BANDS['hard'][0]}"
    text = ", ".join(f"{name}: {limit}" for name, limit in limits.items() if name in scopes(run))
    text = f"{text.capitalize()}." if text else ""
    if run.easy_share is not None and not _own_problems(run):
        text += f" All: the test mix, {percent(run.easy_share)} of it from families that need no steps."
    return text.strip()


def _own_problems(run: Run) -> bool:
    """Whether the problems are data or an environment; the share of easy families then says nothing."""
    return bool(run.setting("data.path")) or run.setting("environment.kind") not in (None, "none")


def premise_tables(run: Run) -> list[Table]:
    """Accuracy with the mode forced, by family and difficulty: the first model, RL, then the others."""
    tables = []
    models = model_order(run)
    for model in sorted(models, key=lambda m: 0 if m == models[0] else 1 if m == "rl" else 2):
        found: dict[tuple[str, float], dict[str, Row]] = {}
        for mode in ("no_think", "think"):
            cells = run.models[model].get(mode)
            listed = as_dict(cells).get("cells")
            for cell in listed if isinstance(listed, list) else []:
                k = get(as_dict(cell), "difficulty")
                if k is not None:
                    found.setdefault((str(cell.get("family")), k), {})[mode] = cell
        if found:
            tables.append(_premise_table(model, found))
    return tables


def _premise_table(model: str, found: dict[tuple[str, float], dict[str, Row]]) -> Table:
    difficulties = sorted({k for _, k in found})
    families = list(dict.fromkeys(family for family, _ in found))
    rows = []
    for family in families:
        for mode in ("no_think", "think"):
            cells = []
            for k in difficulties:
                cell = found.get((family, k), {}).get(mode)
                value, n = get(cell, "accuracy"), get(cell, "n")
                if value is None:
                    cells.append(Cell("", "not in the test split"))
                    continue
                tip = f"{family}, k = {plain(k)}, {mode}: {percent(value)}" + (
                    f", n = {plain(n)}" if n else ""
                )
                cells.append(Cell(whole_points(value), tip, heat_level(value)))
            rows.append((f"{family} · {mode}", tuple(cells)))
    return Table(
        model_name(model),
        tuple(f"k={plain(k)}" for k in difficulties),
        tuple(rows),
        corner="family · forced mode",
    )


LABEL_ROWS = (
    ("prompts", "prompts"),
    ("short", "labelled short"),
    ("long", "labelled long"),
    ("drop", "dropped"),
    ("no_think_accuracy", "no_think accuracy, %"),
    ("think_accuracy", "think accuracy, %"),
    ("no_think_pass", "no_think pass@k, %"),
    ("think_pass", "think pass@k, %"),
)
REFINE_ROWS = (
    ("pool", "pool"),
    ("dropped_too_easy", "dropped, too easy"),
    ("dropped_too_hard", "dropped, too hard"),
    ("dropped_variance", "dropped, variance"),
    ("kept", "kept"),
    ("kept_constant", "kept, constant reward"),
)


def data_tables(run: Run) -> list[tuple[str, Table | None]]:
    """(title, table) of labelling and refinement; None while the stage is awaited, left out if it was not asked for."""
    found = (("Labels", "label", label_table(run)), ("Refinement", "refine", refine_table(run)))
    return [(title, table) for title, stage, table in found if table is not None or run.awaits(stage)]


def label_table(run: Run) -> Table | None:
    """Prompts by label and difficulty, None before labelling is finished."""
    summary = as_dict(run.summaries.get("label"))
    listed = summary.get("table")
    columns = []
    for row in map(as_dict, listed if isinstance(listed, list) else []):
        k = get(row, "difficulty")
        columns.append(("all" if k is None else f"k={plain(k)}", row))
    note = f"rule {summary.get('rule')}, {summary.get('k')} samples per prompt and mode"
    return _transposed("Labels", note, columns, LABEL_ROWS)


def refine_table(run: Run) -> Table | None:
    """What refinement dropped and kept by difficulty, None before it is finished."""
    summary = as_dict(run.summaries.get("refine"))
    levels = {k: row for k, row in as_dict(summary.get("by_difficulty")).items() if k.isdecimal()}
    columns = [(f"k={k}", as_dict(levels[k])) for k in sorted(levels, key=int)]
    return _transposed("Refinement", "prompts", [*columns, ("all", summary)], REFINE_ROWS)


def _transposed(
    title: str, note: str, columns: Sequence[tuple[str, Row]], names: Sequence[tuple[str, str]]
) -> Table | None:
    rows = []
    for key, label in names:
        values = [get(column, key) for _, column in columns]
        if any(value is not None for value in values):
            write = whole_points if label.endswith("%") else "{:,.0f}".format
            rows.append((label, tuple(Cell(show(value, write)) for value in values)))
    return Table(title, tuple(head for head, _ in columns), tuple(rows), note) if rows else None


def recovery(run: Run, window: int = 15, level: float = 0.7) -> dict[str, Any] | None:
    """How deep thinking on hard tasks fell in RL, and when it came back.

    Uses the trailing `window`-step mean of `think_rate/hard`. None with fewer than `window` measured steps.

    Returns:
        `low` and `low_step`: the smallest mean and its step; `step`: the first later step with a mean above
        `level`, None if never; `last`: the last mean.
    """
    points = [(float(r["step"]), v) for r in run.rows("rl") if (v := get(r, "think_rate/hard")) is not None]
    if len(points) < window:
        return None
    means = [
        (points[i][0], sum(v for _, v in points[i - window + 1 : i + 1]) / window)
        for i in range(window - 1, len(points))
    ]
    low_step, low = min(means, key=lambda pair: pair[1])
    step = next((s for s, m in means if s > low_step and m > level), None) if low <= level else None
    return {
        "low": low,
        "low_step": low_step,
        "step": step,
        "last": means[-1][1],
        "window": window,
        "level": level,
    }
