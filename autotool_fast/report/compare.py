"""Several runs in one self-contained page: overlaid curves, final figures with differences, settings that differ.

Guarantees: those of `page`; runs may have different lengths and stages, what one lacks is a dash or ends its curve.
Differences are taken seed by seed where the experiments share seeds. Leaves to others: which runs belong together
(`variants`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from autotool_fast.report import tables
from autotool_fast.report.charts import Series, mean, percent, plain, smooth
from autotool_fast.report.figures import Figure, frontier_note, iso_lines, line_figure, window_of
from autotool_fast.report.load import STAGE_NAMES, Run, flatten, get
from autotool_fast.report.page import fill, write_page
from autotool_fast.report.scatter import Point, scatter
from autotool_fast.report.settings import run_table
from autotool_fast.report.tables import DASH, RECENT, Cell, Table, change, model_name, model_order, show
from autotool_fast.report.times import duration, stage_seconds
from autotool_fast.report.variants import Variant, load_variants

COMPARISON_NAME = "comparison.html"

FINAL = (
    ("Solved, %", "accuracy", "overall", tables.points),
    ("Solved, hard", "accuracy", "hard", tables.points),
    ("Thinks, hard", "think_rate", "hard", tables.points),
    ("Thinks, easy", "think_rate", "easy", tables.points),
    ("Tokens", "tokens", "overall", tables.tokens),
    ("ACU", "acu", "overall", tables.significant),
)
CURVES = (
    ("Reward", "reward/mean", "mean reward per reply", False),
    ("Response length", "tokens/response", "tokens per reply (mean)", False),
    ("Accuracy, all tasks", "acc/all", "sampled replies solved (%)", True),
    ("Accuracy, hard tasks", "acc/hard", "sampled replies solved (%)", True),
    ("Thinking rate, hard tasks", "think_rate/hard", "replies that think (%)", True),
    ("Thinking rate, easy tasks", "think_rate/easy", "replies that think (%)", True),
    ("Entropy of long replies", "entropy/long", "mean token entropy (nats)", False),
    ("Coefficient β long", "beta/long", "coefficient (per nat)", False),
    ("Held-out accuracy", "eval/accuracy", "held-out tasks solved (%)", True),
    ("Held-out response length", "eval/tokens", "tokens per task (mean)", False),
)
MAX_SENTENCES = 4
NOT_EVALUATED = "No two of these experiments have been evaluated on the test split yet."
SFT_STAGES = ("base", "warmup", "distill")


def write_comparison(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the comparison of two or more runs; the first one is what the others are compared with.

    Args:
        out: the file to write; comparison.html beside the first run if not given.

    Returns:
        The path of the page.

    Raises:
        UserError: a folder that is no run or comes twice, too many experiments, or a file that cannot be written.
    """
    variants = load_variants(folders)
    return write_page(out or folders[0].resolve().parent / COMPARISON_NAME, render(variants))


def render(variants: Sequence[Variant]) -> str:
    """The page as a string."""
    every = [(name, run) for v in variants for name, run in zip(v.names, v.runs, strict=True)]
    versions = run_table([name for name, _ in every], [{k: str(x) for k, x in flatten(r.versions)} for _, r in every])
    overview, facts = _overview(variants)
    known = [v for v in variants if v.settings]
    total = len({key for v in known for key in v.settings})
    settings = run_table([v.label for v in known], [v.settings for v in known])
    return fill(
        "compare.html",
        name=" · ".join(v.label for v in variants),
        variants=variants,
        overview=overview,
        facts=facts,
        headline=headline(variants),
        final=final_table(variants),
        training=training_table(variants),
        trade=trade_figure(variants),
        curves=[figure for figure in (curve(variants, "rl", *c) for c in CURVES) if figure.svg],
        sft=sft_figures(variants),
        settings=settings,
        same=total - (len(settings.rows) if settings else 0),
        versions=versions,
        problems=[(name, found) for name, run in every if (found := _problems(run))],
    )


def _problems(run: Run) -> list[str]:
    """What could not be read of the files that a comparison uses."""
    return [problem for problem in run.problems if not problem.startswith("transcripts.jsonl")]


def final_model(run: Run) -> str | None:
    """The model a run is judged by: RL, else the last one evaluated in auto mode."""
    models = [model for model in model_order(run) if run.cell(model) is not None]
    return "rl" if "rl" in models else models[-1] if models else None


def final_value(run: Run, key: str, band: str) -> float | None:
    """A figure of the run's final model in auto mode."""
    model = final_model(run)
    return get(run.cell(model, "auto", band), key) if model else None


def difference(variant: Variant, reference: Variant, key: str, band: str) -> tuple[float | None, float | None, int]:
    """(mean, mean of the reference, seeds paired) over the seeds that both have, over all runs if they share none."""

    def by_seed(v: Variant) -> dict[str, float]:
        values = {seed: final_value(run, key, band) for seed, run in zip(v.seeds, v.runs, strict=True) if seed}
        return {seed: value for seed, value in values.items() if value is not None}

    new, old = by_seed(variant), by_seed(reference)
    seeds = [seed for seed in new if seed in old]
    if seeds:
        return mean([new[s] for s in seeds]), mean([old[s] for s in seeds]), len(seeds)
    return (
        mean([final_value(run, key, band) for run in variant.runs]),
        mean([final_value(run, key, band) for run in reference.runs]),
        0,
    )


def final_table(variants: Sequence[Variant]) -> Table | None:
    """Test figures of every run's final model, means over seeds, and differences from the first experiment."""
    if not any(final_model(run) for v in variants for run in v.runs):
        return None
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for variant in variants:
        rows += _rows(variant, [(lambda run, k=key, b=band: final_value(run, k, b), w) for _, key, band, w in FINAL])
        if variant is not variants[0]:
            rows.append((f"{variant.label} − {variants[0].label}", tuple(_differences(variant, variants[0]))))
    # a test split without tasks of a band has nothing to show in its columns
    kept = [i for i in range(len(FINAL)) if any(cells[i].text != DASH for _, cells in rows)]
    kept_rows = tuple((label, tuple(cells[i] for i in kept)) for label, cells in rows)
    return Table("", tuple(FINAL[i][0] for i in kept), kept_rows, corner="run")


def _differences(variant: Variant, reference: Variant) -> list[Cell]:
    cells = []
    for _, key, band, _ in FINAL:
        new, old, paired = difference(variant, reference, key, band)
        tip = f"mean over {paired} shared seed{'s' * (paired != 1)}" if paired else "no shared seed: means of all runs"
        cells.append(Cell(change(new, old, key), tip))
    return cells


def _rows(
    variant: Variant, measures: Sequence[tuple[Callable[[Run], float | None], Callable[[float], str]]]
) -> list[tuple[str, tuple[Cell, ...]]]:
    """One row per run and, above several, their mean."""
    rows = []
    if len(variant.runs) > 1:
        cells = []
        for measure, write in measures:
            values = [v for run in variant.runs if (v := measure(run)) is not None]
            tip = f"{len(values)} seeds, {write(min(values))} to {write(max(values))}" if values else ""
            cells.append(Cell(show(mean(values), write), tip))
        rows.append((f"{variant.label}, mean of {len(variant.runs)}", tuple(cells)))
    for name, seed, run in zip(variant.names, variant.seeds, variant.runs, strict=True):
        model = final_model(run)
        label = f"seed {seed}" if len(variant.runs) > 1 else variant.label
        label += f" ({model_name(model)})" if model not in (None, "rl") else ""
        rows.append((label, tuple(Cell(show(measure(run), write), name) for measure, write in measures)))
    return rows


def training_table(variants: Sequence[Variant]) -> Table:
    """What the RL stage measured on its own rollouts, and the time of the whole run."""

    def recent(key: str) -> Callable[[Run], float | None]:
        return lambda run: mean([get(row, key) for row in run.rows("rl")[-RECENT:]])

    def recovered(key: str) -> Callable[[Run], float | None]:
        return lambda run: (tables.recovery(run) or {}).get(key)

    def last_step(run: Run) -> float | None:
        rows = run.rows("rl")
        return get(rows[-1], "step") if rows else None

    def peak(run: Run) -> float | None:
        return max((v for row in run.rows("rl") if (v := get(row, "beta/long")) is not None), default=None)

    def seconds(run: Run) -> float | None:
        return sum(map(stage_seconds, run.stages.values())) or None

    measures = (
        ("RL steps", last_step, plain),
        ("Reward", recent("reward/mean"), "{:.2f}".format),
        ("Solved, %", recent("acc/all"), tables.points),
        ("Solved, hard", recent("acc/hard"), tables.points),
        ("Thinks, hard", recent("think_rate/hard"), tables.points),
        ("lowest", recovered("low"), tables.points),
        ("above 70% from", recovered("step"), plain),
        ("β long, peak", peak, tables.significant),
        ("Time", seconds, duration),
    )
    rows = [row for v in variants for row in _rows(v, [(measure, write) for _, measure, write in measures])]
    return Table("", tuple(head for head, *_ in measures), tuple(rows), corner="run")


def headline(variants: Sequence[Variant]) -> str:
    """The outcome against the first experiment, a sentence for each of the others."""
    reference, *others = variants
    if not others:
        runs = len(reference.runs)
        accuracy = [final_value(run, "accuracy", "overall") for run in reference.runs]
        known = [value for value in accuracy if value is not None]
        if not known:
            return f"{runs} seeds of one experiment, none evaluated on the test split yet."
        return (
            f"{runs} seeds of one experiment: they solve {percent(min(known))} to {percent(max(known))} of the test "
            f"mix, {show(mean(known), percent)} on average."
        )
    if len(variants) > MAX_SENTENCES:
        return _span(variants)
    sentences = []
    for variant in others:
        new, old, paired = difference(variant, reference, "accuracy", "overall")
        if new is None or old is None:
            continue
        hard = difference(variant, reference, "accuracy", "hard")
        length = difference(variant, reference, "tokens", "overall")
        sentence = f"Against {reference.label}, {variant.label} solves {_points(new, old)} of the test mix"
        if hard[0] is not None and hard[1] is not None:
            sentence += f" and {_points(hard[0], hard[1])} of the hard tasks"
        if length[0] is not None and length[1]:
            ratio = length[0] / length[1] - 1
            amount = "as many" if abs(ratio) < 0.0005 else f"{percent(abs(ratio))} {'fewer' if ratio < 0 else 'more'}"
            sentence += f", with {amount} response tokens"
        sentences.append(sentence + (f" (mean over {paired} shared seeds)." if paired > 1 else "."))
    return " ".join(sentences) or NOT_EVALUATED


def _span(variants: Sequence[Variant]) -> str:
    """The best and the worst of many experiments, where a sentence for each would be a wall of text."""
    solved = {v.label: mean([final_value(run, "accuracy", "overall") for run in v.runs]) for v in variants}
    known = {label: value for label, value in solved.items() if value is not None}
    if not known:
        return NOT_EVALUATED
    best, worst = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
    text = (
        f"Of {len(variants)} experiments {best} solves most of the test mix ({percent(known[best])}), "
        f"{worst} least ({percent(known[worst])})"
    )
    reference = variants[0].label
    if reference in known and reference not in (best, worst):
        text += f"; {reference}, with which the others are compared, solves {percent(known[reference])}"
    return text + "."


def _points(new: float, old: float) -> str:
    change_in_points = 100 * (new - old)
    if abs(change_in_points) < 0.05:
        return "the same share"
    return f"{abs(change_in_points):.1f} points {'more' if change_in_points > 0 else 'less'}"


def _facts(run: Run) -> dict[str, str]:
    found = {key: run.setting(key) for key in ("preset", "arm", "start", "seed")}
    return {key: DASH if value in (None, "") else str(value) for key, value in found.items()}


def _overview(variants: Sequence[Variant]) -> tuple[Table, list[str]]:
    """What tells the runs apart, as a table, and what they have in common, as facts."""
    every = [(v, name, run, _facts(run)) for v in variants for name, run in zip(v.names, v.runs, strict=True)]
    keys = ("arm", "start", "preset", "seed")
    apart = [key for key in keys if len({facts[key] for *_, facts in every}) > 1]
    common = every[0][3]
    named = any(variant.label != name for variant, name, *_ in every)
    rows = []
    for variant, name, run, facts in every:
        planned, done = run.setting("rl.steps"), run.rows("rl")
        reached = plain(float(done[-1]["step"])) if done else "0"
        steps = f"{reached} of {planned}" if isinstance(planned, int) else reached
        texts = [*(facts[key] for key in apart), steps, *([variant.label] if named else [])]
        rows.append((name, tuple(map(Cell, texts))))
    heads = (*apart, "RL steps", *(["in charts"] if named else []))
    shared = [f"{key} {common[key]}" for key in keys if key not in apart and common[key] != DASH]
    return Table("Runs", heads, tuple(rows), corner="folder"), shared


def curve(
    variants: Sequence[Variant],
    stage: str,
    title: str,
    key: str,
    unit: str,
    as_percent: bool = False,
    log: bool = False,
) -> Figure:
    """One metric of a stage over its steps, a line per experiment: the mean over seeds, with their range."""
    series, notes = [], set()
    for variant in variants:
        found = [smoothed for run in variant.runs if (smoothed := _smoothed(run, stage, key, notes))]
        if found:
            series.append(_over_seeds(variant, found))
    caption = "Means over neighbouring points." if notes - {1} else "Not smoothed."
    if any(s.band for s in series):
        caption = f"Line: mean over seeds, as far as all of them go; shaded: their range. {caption}"
    return line_figure(
        title,
        series,
        caption,
        x_label=f"{STAGE_NAMES[stage]} step",
        y_label=unit,
        as_percent=as_percent,
        y_range=(0, 1) if as_percent else None,
        log_y=log,
    )


def _smoothed(run: Run, stage: str, key: str, notes: set[int]) -> dict[float, float]:
    rows = [row for row in run.rows(stage) if get(row, key) is not None]
    if not rows:
        return {}
    window = window_of(rows)
    notes.add(window)
    values = smooth([get(row, key) for row in rows], window)
    return {float(row["step"]): v for row, v in zip(rows, values, strict=True) if v is not None}


def _over_seeds(variant: Variant, found: Sequence[dict[float, float]]) -> Series:
    steps = sorted({step for values in found for step in values})
    if len(found) == 1:
        return Series(variant.label, steps, [found[0][step] for step in steps], variant.colour)
    common = [step for step in steps if all(step in values for values in found)]
    at = [[values[step] for values in found] for step in common]
    band = ([min(v) for v in at], [max(v) for v in at])
    return Series(variant.label, common, [mean(v) for v in at], variant.colour, band=band)


def sft_figures(variants: Sequence[Variant]) -> list[Figure]:
    """Training loss of the supervised stages, those that a run has."""
    unit = "loss (nats per trained token), log scale"
    figures = [curve(variants, stage, STAGE_NAMES[stage], "loss/sft", unit, log=True) for stage in SFT_STAGES]
    return [figure for figure in figures if figure.svg]


def trade_figure(variants: Sequence[Variant]) -> Figure:
    """Accuracy against response tokens of the final models and the always-think ones, with lines of equal ACU."""
    points, ratios = [], []
    for variant in variants:
        for name, run in zip(variant.names, variant.runs, strict=True):
            for model, shape in ((final_model(run), "circle"), ("distilled", "square")):
                cell = run.cell(model) if model else None
                accuracy, length, acu = (get(cell, key) for key in ("accuracy", "tokens", "acu"))
                if accuracy is None or length is None or (shape == "square" and model == final_model(run)):
                    continue
                if acu and accuracy > 0 and length > 0:
                    ratios.append(acu * length / accuracy)
                tip = f"{name}, {model_name(model)}: {percent(accuracy)} solved, {tables.tokens(length)} tokens"
                label = variant.label if shape == "circle" and run is variant.runs[0] else ""
                points.append(Point(length, accuracy, variant.colour, shape, tip, label))
    iso = iso_lines(points, ratios)
    shapes = [("final model, auto", "c-ink", "circle")]
    if any(point.shape == "square" for point in points):
        shapes.append(("distilled, auto", "c-ink", "square"))
    svg = scatter(
        points,
        iso,
        x_label="response tokens per task (mean)",
        y_label="test tasks solved (%)",
        description="Accuracy against response tokens of every run; the table beside it has the figures",
        legend=(shapes,),
    )
    caption = f"Up and to the left is better. A mark for each run.{frontier_note(points)}"
    if iso:
        caption += " Grey: lines of equal ACU."
    return Figure("Accuracy against response tokens", svg, caption)
