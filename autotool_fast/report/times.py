"""Where the time of a run went: phases by stage from metrics.jsonl, and the table of a profiled run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from autotool_fast.report.charts import share_bar
from autotool_fast.report.load import STAGE_NAMES, STAGES, Row, Run, as_dict, get
from autotool_fast.report.tables import DASH, Cell, Table, rate, show


@dataclass(frozen=True)
class Timing:
    """Wall-clock time of one stage; a phase is (name, total, median ms per row, share, bar SVG)."""

    stage: str
    steps: int
    total: str
    phases: tuple[tuple[str, str, str, str, str], ...]


def duration(seconds: float) -> str:
    """Seconds as 46 ms, 8.3 s, 2 min 05 s or 1 h 20 min."""
    if 0 < seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def stage_seconds(rows: Sequence[Row]) -> float:
    """Wall-clock seconds of a stage; a resumed run restarts the clock, so each fall begins a new stretch."""
    total = last = 0.0
    for row in rows:
        seconds = get(row, "seconds")
        if seconds is not None:
            if seconds < last:
                total += last
            last = seconds
    return total + last


def timings(run: Run) -> list[Timing]:
    """Wall-clock time by stage, and the phases (`time/...`, milliseconds per logged step) inside it."""
    stages = [s for s in STAGES if run.rows(s)] + [s for s in run.stages if s not in STAGES]
    return [_timing(STAGE_NAMES.get(stage, stage), run.rows(stage)) for stage in stages]


def _timing(name: str, rows: Sequence[Row]) -> Timing:
    wall = stage_seconds(rows)
    phases = []
    for key in dict.fromkeys(key for row in rows for key in row if key.startswith("time/")):
        ms = [v for row in rows if (v := get(row, key)) is not None]
        if ms:
            phases.append((key.removeprefix("time/"), sum(ms) / 1000, f"{median(ms):,.1f}"))
    # rows of a stage that logs every n-th step do not add up to its time
    sparse = float(rows[-1]["step"]) - float(rows[0]["step"]) + 1 > 1.5 * len(rows)
    if sparse:
        return Timing(name, len(rows), duration(wall), tuple((n, DASH, ms, DASH, "") for n, _, ms in phases))
    timed = sum(seconds for _, seconds, _ in phases)
    if phases and wall > timed * 1.005:
        phases.append(("not timed", wall - timed, DASH))
    whole = max(wall, timed) or 1.0
    shares = ((n, s, ms, s / whole) for n, s, ms in phases)
    return Timing(
        name,
        len(rows),
        duration(wall),
        tuple((n, duration(s), ms, rate(share), share_bar(share)) for n, s, ms, share in shares),
    )


def profile_tables(run: Run) -> list[Table]:
    """Phases of each profiled stage; they do not overlap and add up to the stage. Empty without a profile."""
    tables = []
    for stage, entry in run.profile.items():
        listed = as_dict(entry).get("phases")
        rows = []
        for phase in map(as_dict, listed if isinstance(listed, list) else []):
            texts = (
                show(get(phase, "seconds"), duration),
                show(get(phase, "share"), rate),
                show(get(phase, "ms_per_step"), "{:,.1f}".format),
                show(get(phase, "calls") or None, "{:,.0f}".format),
            )
            rows.append((str(phase.get("phase")), tuple(Cell(text) for text in texts)))
        if rows:
            seconds, steps = get(entry, "seconds"), get(entry, "steps")
            note = f"{show(seconds, duration)} in {show(steps, '{:,.0f}'.format)} steps"
            columns = ("total", "share", "ms per step", "calls")
            tables.append(Table(STAGE_NAMES.get(stage, stage), columns, tuple(rows), note))
    return tables
