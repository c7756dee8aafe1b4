"""What a run was set to, against its preset and against other runs.

Guarantees: a preset that cannot be read is named with the reason, never taken for a run without differences. Leaves to
others: whether a difference matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autotool_fast.cli import preset_settings
from autotool_fast.config import TrainConfig, to_dict
from autotool_fast.errors import UserError
from autotool_fast.report.load import Run, flatten
from autotool_fast.report.tables import DASH, Cell, Table

NO_DIFFERENCE = frozenset({"preset", "out", "resume", "overwrite", "dry_run", "threads", "profile", "profile_steps"})
"""Settings that say where, in how many parts and how closely watched a run was made, not what it computes."""


def write(value: Any) -> str:
    """A setting as a preset file has it, near enough to be typed."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(write, value)) or "(none)"
    if isinstance(value, bool):
        return str(value).lower()
    return "(empty)" if value in ("", None) else str(value)


def leaves(config: dict[str, Any]) -> dict[str, str]:
    """Settings that tell runs apart, as dotted name -> text."""
    return {key: write(value) for key, value in flatten(config) if key and key not in NO_DIFFERENCE}


def preset_table(run: Run) -> tuple[Table | None, str]:
    """The settings that a run changed from its preset, and a sentence that says how many or why it is not known."""
    name = run.setting("preset")
    if not isinstance(name, str) or not name:
        return None, "The configuration names no preset."
    try:
        preset = leaves(preset_settings(name))
    except UserError as error:
        return None, f"What differs from the preset is not known: {error}."
    defaults = leaves(to_dict(TrainConfig()))
    own = leaves(run.config)
    rows = []
    for key, value in own.items():
        before = preset.get(key, defaults.get(key, DASH))
        if value != before:
            rows.append((key, (Cell(value), Cell(before))))
    if not rows:
        return None, f"Every setting is that of preset {name}."
    count = "1 setting differs" if len(rows) == 1 else f"{len(rows)} settings differ"
    return Table("", ("this run", f"preset {name}"), tuple(rows), corner="setting"), f"{count} from preset {name}."


def run_table(names: Sequence[str], configs: Sequence[dict[str, str]]) -> Table | None:
    """The settings in which runs differ, one column per run; None if there are none.

    Args:
        names: heads of the columns.
        configs: dotted name -> text for each column; one that a run lacks is a dash.
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = []
    for key in keys:
        values = [config.get(key, DASH) for config in configs]
        if len(set(values)) > 1:
            rows.append((key, tuple(Cell(value) for value in values)))
    return Table("", tuple(names), tuple(rows), corner="setting") if rows else None
