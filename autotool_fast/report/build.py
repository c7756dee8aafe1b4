"""Build report.html of a run folder: one self-contained file that explains the run to a person.

Guarantees: no network, no external resource; a Content-Security-Policy in the page allows only its own style
sheet and script, by hash. Everything that comes from the run is escaped (autoescape on; charts escape their
text). A run that stopped early gives a shorter report that says what is missing. The file is replaced in one
step.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib import resources
from pathlib import Path

import jinja2

from autotool_fast.errors import UserError
from autotool_fast.report import tables, transcripts
from autotool_fast.report.charts import (
    IsoLine,
    Point,
    Series,
    heat_map,
    line_chart,
    log_ticks,
    nice_ticks,
    percent,
    plain,
    scatter,
    smooth,
)
from autotool_fast.report.load import Row, Run, flatten, load_run, number

REPORT_NAME = "report.html"
STEP = "RL step"
MODEL_COLOURS = {"base": "c-base", "distilled": "c-distilled", "warmup": "c-warmup", "rl": "c-rl"}
MODE_SHAPES = {"auto": "circle", "think": "triangle", "no_think": "square"}


@dataclass(frozen=True)
class Figure:
    """A chart with its heading; `svg` is None where the run has no data for it."""

    title: str
    svg: str | None
    caption: str = ""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from whatever the run has written so far.

    Returns:
        The path of the report.

    Raises:
        UserError: `run_dir` is not a run folder, or the report cannot be written there.
    """
    run_dir = Path(run_dir)
    page = render(load_run(run_dir))
    path = run_dir / REPORT_NAME
    temporary = run_dir / f".{REPORT_NAME}.{os.getpid()}"
    try:
        # "replace": a token may hold half a surrogate pair, which UTF-8 cannot encode
        temporary.write_bytes(page.encode("utf-8", "replace"))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write the report: {error.strerror or error}",
            where=str(path),
            remedy="check the permissions and the free space of the run folder",
        ) from error
    return path


def render(run: Run) -> str:
    """The page as a string."""
    chosen = transcripts.choose(run.transcripts)
    css, script = _asset("style.css"), _asset("script.js")
    return _template().render(
        run=run,
        name=run.path.resolve().name,
        facts=_facts(run),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        css=css,
        css_hash=_csp_hash(css),
        script=script,
        script_hash=_csp_hash(script),
        headline=tables.headline(run),
        tiles=tables.tiles(run),
        final=tables.final_tables(run),
        band_note=tables.band_note(run),
        interval_note=tables.interval_note(run),
        premise=tables.premise_tables(run),
        curves=rl_figures(run),
        held_out=held_out_figures(run),
        heat=heat_figures(run),
        trade=trade_figure(run),
        trade_table=tables.mode_table(run),
        diagnostics=diagnostic_figures(run),
        sft=sft_figures(run),
        labels=tables.label_table(run),
        refinement=tables.refine_table(run),
        timings=tables.timings(run),
        transcripts=[transcripts.transcript(row) for row in chosen],
        n_transcripts=len(run.transcripts),
        entropy_legend=transcripts.legend(),
        config=[(key, str(value)) for key, value in flatten(run.config)],
        versions=[(key, str(value)) for key, value in flatten(run.versions)],
    )


@cache
def _asset(name: str) -> str:
    return resources.files("autotool_fast.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("page.html"))


def _csp_hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def _facts(run: Run) -> list[str]:
    """The settings that tell runs apart, as far as the configuration has them."""
    values = [(name, run.setting(name)) for name in ("preset", "arm", "start", "seed")]
    return [f"{name} {value}" for name, value in values if isinstance(value, (str, int)) and value != ""]


def _column(rows: Sequence[Row], key: str) -> list[float | None]:
    return [number(row.get(key)) for row in rows]


def _window(rows: Sequence[Row]) -> int:
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


def rl_figures(run: Run) -> list[Figure]:
    """Reward, accuracy, thinking rate, entropies, coefficients and length over RL."""
    rows = run.rows("rl")
    window = _window(rows)
    note = _smoothing_note(window)
    entropies = [
        _series(rows, "entropy/long", "long", "c-long", window),
        _series(rows, "target/long", "target long", "c-long", dashed=True),
        _series(rows, "entropy/short", "short", "c-short", window),
        _series(rows, "target/short", "target short", "c-short", dashed=True),
        _series(rows, "entropy/mode", "mode token", "c-mode", window),
    ]
    figures = [
        (
            "Reward",
            line_chart(
                [_series(rows, "reward/mean", "reward", "c-ink", window)],
                x_label=STEP,
                y_label="mean reward per reply",
                description="Mean reward over RL steps",
            ),
            note,
        ),
        (
            "Accuracy by band",
            line_chart(
                [*_by_band(rows, "acc", window), _series(rows, "acc/all", "all", "c-ink", window)],
                x_label=STEP,
                y_label="sampled replies solved (% of replies)",
                description="Accuracy of sampled replies by difficulty band over RL steps",
                y_range=(0, 1),
                as_percent=True,
            ),
            f"Training prompts, sampled at training temperature. {note}",
        ),
        (
            "Thinking rate by band",
            line_chart(
                _by_band(rows, "think_rate", window),
                x_label=STEP,
                y_label="replies that think (% of replies)",
                description="Thinking rate by difficulty band over RL steps",
                y_range=(0, 1),
                as_percent=True,
            ),
            f"{_recovery_text(run)} {note}".strip(),
        ),
        (
            "Entropies and their targets",
            line_chart(
                entropies,
                x_label=STEP,
                y_label="mean token entropy (nats)",
                description="Entropy of long replies, short replies and the mode token, with targets",
            ),
            f"Per reply, {_scope_text(run)}. Dashed: target; the bonus acts on replies at or below it. {note}",
        ),
        (
            "Entropy coefficients",
            line_chart(
                [
                    _series(rows, "beta/long", "β long", "c-long"),
                    _series(rows, "beta/short", "β short", "c-short"),
                ],
                x_label=STEP,
                y_label="coefficient (per nat)",
                description="Entropy coefficients over RL steps",
            ),
            "Not smoothed.",
        ),
        (
            "Response length",
            line_chart(
                [
                    _series(rows, "tokens/response", "all", "c-ink", window),
                    _series(rows, "tokens/long", "long", "c-long", window),
                    _series(rows, "tokens/short", "short", "c-short", window),
                ],
                x_label=STEP,
                y_label="tokens per reply (mean)",
                description="Mean response tokens over RL steps",
            ),
            note,
        ),
    ]
    return [Figure(title, svg, caption) for title, svg, caption in figures]


def held_out_figures(run: Run) -> list[Figure]:
    """Accuracy and thinking rate on held-out tasks during RL, if the run measured them."""
    rows = [row for row in run.rows("rl") if number(row.get("eval/accuracy")) is not None]
    figures = []
    for metric, title, unit in (
        ("acc", "Held-out accuracy", "held-out tasks solved (%)"),
        ("think_rate", "Held-out thinking rate", "held-out tasks with thinking (%)"),
    ):
        svg = line_chart(
            _by_band(rows, f"eval/{metric}", 1),
            x_label=STEP,
            y_label=unit,
            description=f"{title} by band over RL steps",
            y_range=(0, 1),
            as_percent=True,
        )
        if svg is not None:
            figures.append(
                Figure(title, svg, "A small held-out set in auto mode, greedy by default. Not smoothed.")
            )
    return figures


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
    window = _window(rows)
    wanted = (
        ("Policy loss", "loss/policy", "loss", "policy loss", False, False),
        ("Gradient norm", "grad_norm", "norm", "gradient norm before clipping", False, False),
        (
            "Groups without signal",
            "groups/constant",
            "constant",
            "equal rewards (% of groups)",
            False,
            True,
        ),
        ("Sampler against trainer", "mismatch/max", "largest", "largest |Δ log-prob| (nats)", True, False),
    )
    figures = []
    for title, key, label, unit, log, share in wanted:
        # a count of groups, where one is logged instead of a share, keeps its own unit
        share = share and all(v is None or v <= 1 for v in _column(rows, key))
        if key == "groups/constant" and not share:
            unit = "equal rewards (groups)"
        svg = line_chart(
            [_series(rows, key, label, "c-ink", 1 if log else window)],
            x_label=STEP,
            y_label=unit,
            description=f"{title} over RL steps",
            log_y=log,
            as_percent=share,
            height=230,
        )
        if svg is not None:
            figures.append(Figure(title, svg, _smoothing_note(1 if log else window)))
    return figures


def heat_figures(run: Run) -> list[Figure]:
    """Thinking rate and accuracy by RL step and difficulty."""
    rows = run.rows("rl")
    figures = []
    for metric, title in (("think_rate", "Thinking rate"), ("acc", "Accuracy")):
        prefix = f"{metric}/k"
        names = {key for row in rows for key in row if key.startswith(prefix)}
        levels = sorted(int(key[len(prefix) :]) for key in names if key[len(prefix) :].isdecimal())
        svg = heat_map(
            [(f"k={k}", _column(rows, f"{prefix}{k}")) for k in levels],
            [float(row["step"]) for row in rows],
            x_label=STEP,
            y_label="difficulty k",
            description=f"{title} by RL step and difficulty",
        )
        caption = (
            "Each cell is the mean over its steps; colours in steps of 10 points, crossed out: no sample."
        )
        figures.append(Figure(f"{title} by step and difficulty", svg, caption))
    return figures


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
    iso = _iso_lines(points, ratios)
    svg = scatter(
        points,
        iso,
        x_label="response tokens per task (mean)",
        y_label="test tasks solved (%)",
        description="Accuracy against response tokens of every model and mode",
        legend=legend,
    )
    caption = "Up and to the left is better."
    if iso:
        caption += f" Grey: lines of equal ACU ({run.acu_unit or 'unit not recorded'})."
    elif ratios:
        caption += " No ACU lines: the models' ACU do not follow from accuracy and tokens by one factor."
    return Figure("Accuracy against response tokens", svg, caption)


def _iso_lines(points: Sequence[Point], ratios: Sequence[float]) -> list[IsoLine]:
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
    """Training loss of the supervised stages."""
    base = [("base", "base", "c-base")]
    tuned = [("warmup", "warm-up", "c-warmup"), ("distill", "distilled", "c-distilled")]
    figures = []
    for title, stages in (("Base training", base), ("Warm-up and distilled SFT", tuned)):
        series = []
        for stage, label, colour in stages:
            rows = run.rows(stage)
            key = next((k for row in rows for k in row if k == "loss" or k.startswith("loss/")), None)
            if key is not None:
                series.append(_series(rows, key, label, colour, _window(rows)))
        values = [v for s in series for v in s.y if v is not None]
        wide = bool(values) and min(values) > 0 and max(values) > 20 * min(values)
        svg = line_chart(
            series,
            x_label="SFT step",
            y_label="loss (nats per trained token)" + (", log scale" if wide else ""),
            description=f"Loss of {title.lower()}",
            log_y=wide,
        )
        windows = sorted({_window(run.rows(stage)) for stage, _, _ in stages if run.rows(stage)})
        caption = " ".join(dict.fromkeys(_smoothing_note(w) for w in windows))
        figures.append(Figure(title, svg, caption))
    return figures
