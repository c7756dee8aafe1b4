"""The figures of a run's report: which measurements make a chart, how they are named, smoothed and explained.

Guarantees: every line chart and heat map comes with a table of its values, for readers who cannot see or print it.
Leaves to others: drawing (`charts`, `scatter`) and the page (`build`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autotool_fast.report import tables
from autotool_fast.report.charts import (
    Series,
    bins,
    heat_map,
    line_chart,
    log_ticks,
    mean,
    nice_ticks,
    percent,
    plain,
    smooth,
)
from autotool_fast.report.load import Row, Run, get, number
from autotool_fast.report.scatter import IsoLine, Point, frontier, scatter
from autotool_fast.report.tables import Cell, Table

STEP = "RL step"
DATA_ROWS = 12
MODEL_COLOURS = {"base": "c-base", "distilled": "c-distilled", "warmup": "c-warmup", "rl": "c-rl"}
MODE_SHAPES = {"auto": "circle", "think": "triangle", "no_think": "square"}


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and its values; `svg` is None where the run has no data for it."""

    title: str
    svg: str | None
    caption: str = ""
    data: Table | None = None


def _column(rows: Sequence[Row], key: str) -> list[float | None]:
    return [number(row.get(key)) for row in rows]


def window_of(rows: Sequence[Row]) -> int:
    """Odd smoothing window in logged steps: a twentieth of the stage, at most 15, none for short ones."""
    return 1 if len(rows) < 60 else min(15, len(rows) // 20 // 2 * 2 + 1)


def _series(
    rows: Sequence[Row], key: str, label: str, colour: str, window: int = 1, dashed: bool = False
) -> Series:
    x = [float(row["step"]) for row in rows]
    y = _column(rows, key)
    if window > 1:
        return Series(label, x, smooth(y, window), colour, raw=y, dashed=dashed)
    return Series(label, x, y, colour, dashed=dashed)


def _smoothing_note(window: int) -> str:
    if window == 1:
        return "Not smoothed."
    return f"Bold: mean over {window} neighbouring points; thin: each point."


def _by_band(rows: Sequence[Row], metric: str, window: int) -> list[Series]:
    names = (("easy", "easy", "c-easy"), ("medium", "medium", "c-medium"), ("hard", "hard", "c-hard"))
    return [_series(rows, f"{metric}/{key}", label, colour, window) for key, label, colour in names]


def line_figure(
    title: str,
    series: Sequence[Series],
    caption: str,
    *,
    x_label: str,
    y_label: str,
    as_percent: bool = False,
    y_range: tuple[float, float] | None = None,
    log_y: bool = False,
    height: float = 240,
) -> Figure:
    """A line chart with its data; without a finite value the figure has neither."""
    lines = [s for s in series if any(v is not None for v in s.y)]
    names = ", ".join(s.label for s in lines)
    svg = line_chart(
        series,
        x_label=x_label,
        y_label=y_label,
        description=f"{title}: {y_label} by {x_label}. Lines: {names}.",
        y_range=y_range,
        log_y=log_y,
        as_percent=as_percent,
        height=height,
    )
    if svg is None:
        return Figure(title, None)
    write = percent if as_percent else tables.significant
    return Figure(title, svg, caption, _data(lines, x_label, y_label, write))


def _data(series: Sequence[Series], x_label: str, y_label: str, write: Callable[[float], str]) -> Table:
    """The lines at about `DATA_ROWS` of their positions, the first and the last among them."""
    xs = sorted({x for s in series for x in s.x})
    last = len(xs) - 1
    shown = sorted({xs[round(i * last / (DATA_ROWS - 1))] for i in range(DATA_ROWS)})
    values = [dict(zip(s.x, s.y, strict=True)) for s in series]
    rows = tuple((plain(x), tuple(Cell(tables.show(v.get(x), write)) for v in values)) for x in shown)
    return Table(y_label, tuple(s.label for s in series), rows, corner=x_label)


def rl_figures(run: Run) -> list[Figure]:
    """Reward, length, accuracy, thinking rate, entropies and coefficients over RL."""
    rows = run.rows("rl")
    window = window_of(rows)
    note = _smoothing_note(window)
    entropies = [
        _series(rows, "entropy/long", "long", "c-long", window),
        _series(rows, "target/long", "target long", "c-long", dashed=True),
        _series(rows, "entropy/short", "short", "c-short", window),
        _series(rows, "target/short", "target short", "c-short", dashed=True),
        _series(rows, "entropy/mode", "mode token", "c-mode", window),
    ]
    lengths = [
        _series(rows, "tokens/response", "all", "c-ink", window),
        _series(rows, "tokens/long", "long", "c-long", window),
        _series(rows, "tokens/short", "short", "c-short", window),
    ]
    coefficients = [
        _series(rows, "beta/long", "β long", "c-long"),
        _series(rows, "beta/short", "β short", "c-short"),
    ]
    return [
        line_figure(
            "Reward",
            [_series(rows, "reward/mean", "reward", "c-ink", window)],
            note,
            x_label=STEP,
            y_label="mean reward per reply",
        ),
        line_figure("Response length", lengths, note, x_label=STEP, y_label="tokens per reply (mean)"),
        line_figure(
            "Accuracy by band",
            [*_by_band(rows, "acc", window), _series(rows, "acc/all", "all", "c-ink", window)],
            f"Training prompts, sampled at training temperature. {note}",
            x_label=STEP,
            y_label="sampled replies solved (% of replies)",
            y_range=(0, 1),
            as_percent=True,
        ),
        line_figure(
            "Thinking rate by band",
            _by_band(rows, "think_rate", window),
            f"{_recovery_text(run)} {note}".strip(),
            x_label=STEP,
            y_label="replies that think (% of replies)",
            y_range=(0, 1),
            as_percent=True,
        ),
        line_figure(
            "Entropies and their targets",
            entropies,
            f"Per reply, {_scope_text(run)}. Dashed: target; the bonus acts on replies at or below it. {note}",
            x_label=STEP,
            y_label="mean token entropy (nats)",
        ),
        line_figure(
            "Entropy coefficients",
            coefficients,
            "Weight of the bonus that pushes entropy up to its target. Not smoothed.",
            x_label=STEP,
            y_label="coefficient (per nat)",
        ),
    ]


def held_out_figures(run: Run) -> list[Figure]:
    """Accuracy, thinking rate and length on held-out tasks during RL, if the run measured them."""
    rows = [row for row in run.rows("rl") if get(row, "eval/accuracy") is not None]
    note = "A small held-out set in auto mode, greedy by default. Not smoothed."
    figures = [
        line_figure(
            title,
            _by_band(rows, f"eval/{metric}", 1),
            note,
            x_label=STEP,
            y_label=unit,
            y_range=(0, 1),
            as_percent=True,
        )
        for metric, title, unit in (
            ("acc", "Held-out accuracy", "held-out tasks solved (%)"),
            ("think_rate", "Held-out thinking rate", "held-out tasks with thinking (%)"),
        )
    ]
    length = [_series(rows, "eval/tokens", "all", "c-ink")]
    unit = "tokens per task (mean)"
    figures.append(line_figure("Held-out response length", length, note, x_label=STEP, y_label=unit))
    return [figure for figure in figures if figure.svg is not None]


def _scope_text(run: Run) -> str:
    """Which tokens make up the entropy of a reply."""
    scopes = {
        "think": "over the sampled tokens of the thinking",
        "mode": "over the sampled mode tag",
        "blend": "half over the sampled mode tag, half over all sampled tokens",
    }
    return scopes.get(run.setting("rl.entropy_scope"), "over sampled tokens")


def _recovery_text(run: Run) -> str:
    found = tables.recovery(run)
    if found is None:
        return ""
    text = f"Hard tasks, mean over the last {found['window']} steps: lowest {percent(found['low'])}"
    text += f" (step {plain(found['low_step'])})"
    if found["low"] > found["level"]:
        return f"{text}, last {percent(found['last'])}."
    back = (
        f"above {percent(found['level'])} from step {plain(found['step'])}"
        if found["step"] is not None
        else (f"not back above {percent(found['level'])}")
    )
    return f"{text}, {back}, last {percent(found['last'])}."


def diagnostic_figures(run: Run) -> list[Figure]:
    """Loss, gradient norm, constant groups and sampler mismatch over RL, those that were logged."""
    rows = run.rows("rl")
    window = window_of(rows)
    # a count of groups, where one is logged instead of a share, keeps its own unit
    share = all(v is None or v <= 1 for v in _column(rows, "groups/constant"))
    groups = "equal rewards (% of groups)" if share else "equal rewards (groups)"
    gap = "largest |Δ log-prob| (nats), log scale"
    figures = []
    for title, key, label, unit, log, as_percent in (
        ("Policy loss", "loss/policy", "loss", "policy loss", False, False),
        ("Gradient norm", "grad_norm", "norm", "gradient norm before clipping", False, False),
        ("Groups without signal", "groups/constant", "constant", groups, False, share),
        ("Sampler against trainer", "mismatch/max", "largest", gap, True, False),
        ("Sampler's log-probs kept", "mismatch/reused", "kept", "tokens (%)", False, True),
    ):
        smoothing = 1 if log else window
        figure = line_figure(
            title,
            [_series(rows, key, label, "c-ink", smoothing)],
            _smoothing_note(smoothing),
            x_label=STEP,
            y_label=unit,
            log_y=log,
            as_percent=as_percent,
            y_range=(0, 1) if as_percent else None,
            height=210,
        )
        if figure.svg is not None:
            figures.append(figure)
    return figures


def heat_figures(run: Run) -> list[Figure]:
    """Thinking rate, accuracy and response tokens by RL step and difficulty; tokens only where they were logged."""
    rows = run.rows("rl")
    figures = [_heat_figure(rows, "think_rate", "Thinking rate"), _heat_figure(rows, "acc", "Accuracy")]
    length = _heat_figure(rows, "tokens", "Response tokens")
    return [*figures, length] if length.svg is not None else figures


def _heat_figure(rows: Sequence[Row], metric: str, name: str) -> Figure:
    prefix = f"{metric}/k"
    names = {key for row in rows for key in row if key.startswith(prefix)}
    levels = sorted(int(key[len(prefix) :]) for key in names if key[len(prefix) :].isdecimal())
    columns = [(f"k={k}", _column(rows, f"{prefix}{k}")) for k in levels]
    shares = metric != "tokens"
    highest = max((v for _, values in columns for v in values if v is not None), default=1.0)
    title = f"{name} by step and difficulty"
    write = percent if shares else plain
    svg = heat_map(
        columns,
        [float(row["step"]) for row in rows],
        x_label=STEP,
        y_label="difficulty k",
        description=f"{title}, a cell for each difficulty and stretch of steps",
        limits=(0.0, 1.0 if shares else nice_ticks(0, max(highest, 1.0))[-1]),
        write=write,
    )
    if svg is None:
        return Figure(title, None)
    caption = "Each cell is the mean over its steps and has a tooltip; crossed out: no sample."
    parts = bins(len(rows), DATA_ROWS)
    steps = [plain(float(rows[part[len(part) // 2]]["step"])) for part in parts]
    data = tuple(
        (steps[i], tuple(Cell(tables.show(mean([values[c] for c in part]), write)) for _, values in columns))
        for i, part in enumerate(parts)
    )
    unit = "mean response tokens" if not shares else f"{name.lower()}, %"
    return Figure(title, svg, caption, Table(unit, tuple(label for label, _ in columns), data, corner=f"around {STEP}"))


def trade_figure(run: Run) -> Figure:
    """Accuracy against response tokens of every model and mode, with lines of equal ACU."""
    points, ratios = [], []
    for model in tables.model_order(run):
        for mode in tables.MODES:
            cell = run.cell(model, mode) or {}
            accuracy, length, acu = (number(cell.get(key)) for key in ("accuracy", "tokens", "acu"))
            if accuracy is None or length is None:
                continue
            name = f"{tables.model_name(model)}, {mode}"
            tip = f"{name}: {percent(accuracy)} solved, {tables.tokens(length)} tokens"
            if acu is not None:
                tip += f", ACU {tables.significant(acu)}"
                if accuracy > 0 and length > 0 and acu > 0:
                    ratios.append(acu * length / accuracy)
            label = tables.model_name(model) if mode == "auto" else ""
            points.append(
                Point(length, accuracy, MODEL_COLOURS.get(model, "c-ink"), MODE_SHAPES[mode], tip, label)
            )
    models = [m for m in tables.model_order(run) if run.models[m]]
    legend = (
        [(tables.model_name(m), MODEL_COLOURS.get(m, "c-ink"), "circle") for m in models],
        [
            ("auto", "c-ink", "circle"),
            ("forced think", "c-ink", "triangle"),
            ("forced no_think", "c-ink", "square"),
        ],
    )
    iso = iso_lines(points, ratios)
    svg = scatter(
        points,
        iso,
        x_label="response tokens per task (mean)",
        y_label="test tasks solved (%)",
        description="Accuracy against response tokens of every model and mode; the table beside it has the figures",
        legend=legend,
    )
    caption = "Up and to the left is better."
    caption += frontier_note(points)
    if iso:
        caption += f" Grey: lines of equal ACU ({run.acu_unit or 'unit not recorded'})."
    elif ratios:
        caption += " No ACU lines: the models' ACU do not follow from accuracy and tokens by one factor."
    return Figure("Accuracy against response tokens", svg, caption)


def frontier_note(points: Sequence[Point]) -> str:
    """What the dotted stair is, if there is one."""
    return " Dotted: the frontier, from one unbeaten mark to the next." if len(frontier(points)) > 1 else ""


def iso_lines(points: Sequence[Point], ratios: Sequence[float]) -> list[IsoLine]:
    """Round ACU values across the points, if one factor (unit and model size) links all of them."""
    # 2 %: room for figures that were rounded on their way into results.json, far below a change of model size
    if not ratios or max(ratios) > 1.02 * min(ratios):
        return []
    factor = sorted(ratios)[len(ratios) // 2]
    values = [factor * p.y / p.x for p in points if p.y > 0 and p.x > 0]
    low, high = min(values), max(values)
    if high < 10 * low:
        inside = [value for value in nice_ticks(0.7 * low, 1.4 * high, 5) if value > 0]
    else:
        inside = log_ticks(low, high)
    return [IsoLine(value / factor, f"ACU {plain(value)}") for value in inside]


def sft_figures(run: Run) -> list[Figure]:
    """Training loss of the supervised stages; without a chart those that are awaited, none that was not asked for."""
    base = [("base", "base", "c-base")]
    tuned = [("warmup", "warm-up", "c-warmup"), ("distill", "distilled", "c-distilled")]
    figures = []
    for title, stages in (("Base training", base), ("Warm-up and distilled SFT", tuned)):
        series = []
        for stage, label, colour in stages:
            rows = run.rows(stage)
            key = next((k for row in rows for k in row if k == "loss" or k.startswith("loss/")), None)
            if key is not None:
                series.append(_series(rows, key, label, colour, window_of(rows)))
        values = [v for s in series for v in s.y if v is not None]
        wide = bool(values) and min(values) > 0 and max(values) > 20 * min(values)
        windows = sorted({window_of(run.rows(stage)) for stage, _, _ in stages if run.rows(stage)})
        caption = " ".join(dict.fromkeys(_smoothing_note(w) for w in windows))
        unit = "loss (nats per trained token)" + (", log scale" if wide else "")
        figure = line_figure(title, series, caption, x_label="SFT step", y_label=unit, log_y=wide)
        if figure.svg is not None or run.awaits(*(stage for stage, _, _ in stages)):
            figures.append(figure)
    return figures
