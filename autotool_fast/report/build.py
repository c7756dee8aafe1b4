"""Build report.html of a run folder: one self-contained file that explains the run to a person.

Guarantees: those of `page`; everything that comes from the run is escaped (charts escape their text). A run that
stopped early gives a shorter report that says what is missing; what it was not asked for is not mentioned.
"""

from __future__ import annotations

from pathlib import Path

from autotool_fast.alarms import spells
from autotool_fast.report import figures, settings, tables, times, transcripts
from autotool_fast.report.load import Run, flatten, load_run
from autotool_fast.report.page import fill, write_page

REPORT_NAME = "report.html"


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of `run_dir` from whatever the run has written so far.

    Args:
        out: the file to write; `run_dir`/report.html if not given.

    Returns:
        The path of the report.

    Raises:
        UserError: `run_dir` is not a run folder, or the report cannot be written there.
    """
    run_dir = Path(run_dir)
    return write_page(out or run_dir / REPORT_NAME, render(load_run(run_dir)))


def render(run: Run) -> str:
    """The page as a string."""
    chosen = transcripts.choose(run.transcripts)
    changed, preset_note = settings.preset_table(run)
    final, premise, trade = tables.final_tables(run), tables.premise_tables(run), figures.trade_figure(run)
    sft, data = figures.sft_figures(run), tables.data_tables(run)
    sections = (
        ("result", "Result", final or run.planned("eval")),
        ("trade", "Cost", trade.svg),
        ("premise", "Premise", premise),
        ("rl", "RL", run.rows("rl") or run.planned("rl")),
        ("sft", "SFT", sft),
        ("data", "Data", data),
        ("time", "Time", True),
        ("transcripts", "Transcripts", chosen or run.planned("rl", "eval")),
        ("config", "Configuration", True),
    )
    return fill(
        "page.html",
        run=run,
        sections={anchor: title for anchor, title, shown in sections if shown},
        name=run.name,
        facts=_facts(run),
        headline=tables.headline(run),
        tiles=tables.tiles(run),
        final=final,
        band_note=tables.band_note(run),
        interval_note=tables.interval_note(run),
        premise=premise,
        alarms=spells(run.rows("rl")),
        curves=figures.rl_figures(run),
        held_out=figures.held_out_figures(run),
        heat=figures.heat_figures(run),
        trade=trade,
        trade_table=tables.mode_table(run),
        diagnostics=figures.diagnostic_figures(run),
        sft=sft,
        data=data,
        timings=times.timings(run),
        profile=times.profile_tables(run),
        transcripts=[transcripts.transcript(row) for row in chosen],
        n_transcripts=len(run.transcripts),
        entropy_legend=transcripts.legend(),
        changed=changed,
        preset_note=preset_note,
        config=[(key, settings.write(value)) for key, value in flatten(run.config)],
        versions=[(key, str(value)) for key, value in flatten(run.versions)],
    )


def _facts(run: Run) -> list[str]:
    """The settings that tell runs apart, as far as the configuration has them."""
    values = [(name, run.setting(name)) for name in ("preset", "arm", "start", "seed")]
    return [f"{name} {value}" for name, value in values if isinstance(value, (str, int)) and value != ""]
