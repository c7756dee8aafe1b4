"""Runs side by side: which of them are the same experiment under several seeds, and what to call them.

A variant is a set of runs whose settings differ in the seed alone, and in base models named after it, each seed once.
Where a seed comes twice, or a run has no configuration, every run stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from autotool_fast.errors import UserError
from autotool_fast.report.load import Run, load_run
from autotool_fast.report.settings import leaves

MAX_VARIANTS = 8
MAX_LABEL = 18
REUSE = "base.reuse"
PLAIN = ("arm", "start", "preset")


@dataclass(frozen=True)
class Variant:
    """Runs of one experiment in order of seed; `settings` are those that they share."""

    label: str
    colour: str
    runs: tuple[Run, ...]
    names: tuple[str, ...]
    """What to call each run."""
    settings: dict[str, str]

    @property
    def seeds(self) -> tuple[str, ...]:
        """The seed of each run, as text."""
        return tuple(_seed(run) for run in self.runs)


def load_variants(folders: Sequence[Path]) -> list[Variant]:
    """Read the run folders and group them; the variant of the first folder comes first.

    Raises:
        UserError: a folder that is no run or comes twice, or more than `MAX_VARIANTS` variants.
    """
    seen: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in seen:
            raise UserError("is given twice", where=str(folder), remedy="name every run once")
        seen[folder.resolve()] = folder
    runs = [load_run(folder) for folder in folders]
    groups = _groups(runs)
    if len(groups) > MAX_VARIANTS:
        raise UserError(
            f"{len(groups)} different experiments in {len(runs)} runs",
            where="RUN_DIR",
            remedy=f"compare at most {MAX_VARIANTS} at a time; runs that differ in the seed alone count as one",
        )
    names = dict(zip(map(id, runs), _run_names(runs), strict=True))
    shared = [_shared(group) for group in groups]
    labels = _labels(groups, shared, names)
    return [
        Variant(label, f"c-v{i}", tuple(group), tuple(names[id(run)] for run in group), settings)
        for i, (label, group, settings) in enumerate(zip(labels, groups, shared, strict=True))
    ]


def _seed(run: Run) -> str:
    seed = run.config.get("seed")
    return str(seed) if isinstance(seed, int) else ""


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
    found: dict[object, list[Run]] = {}
    for run in runs:
        own = leaves(run.config)
        seed = own.pop("seed", "")
        if seed and REUSE in own:
            own[REUSE] = re.sub(rf"(?<!\d){re.escape(seed)}(?!\d)", "SEED", own[REUSE])
        found.setdefault(tuple(sorted(own.items())) or id(run), []).append(run)
    if any(len({_seed(run) for run in group}) < len(group) for group in found.values()):
        return [[run] for run in runs]
    return [sorted(group, key=lambda run: (len(_seed(run)), _seed(run))) for group in found.values()]


def _shared(group: Sequence[Run]) -> dict[str, str]:
    first, *others = (leaves(run.config) for run in group)
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _run_names(runs: Sequence[Run]) -> list[str]:
    """The shortest endings of the runs' paths that tell them apart."""
    paths = [run.path.resolve() for run in runs]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _labels(groups: Sequence[Sequence[Run]], shared: Sequence[dict[str, str]], names: dict[int, str]) -> list[str]:
    labels = [names[id(group[0])] for group in groups]
    if any(len(group) > 1 for group in groups):
        keys = dict.fromkeys(key for settings in shared for key in settings if key != "seed")
        differing = [key for key in keys if len({settings.get(key) for settings in shared}) > 1]
        if 1 <= len(differing) <= 2:
            labels = [", ".join(_setting(key, settings.get(key, "–")) for key in differing) for settings in shared]
    labels = _trim(labels)
    short = [_cut(label) for label in labels]
    return [label if short.count(label) == 1 else f"{_cut(label, 4)} ({i})" for i, label in enumerate(short, start=1)]


def _setting(key: str, value: str) -> str:
    return value if key in PLAIN else f"{key.rpartition('.')[2]} {value}"


def _trim(labels: list[str]) -> list[str]:
    """Labels too long for a chart without the words that all of them begin or end with."""
    if len(labels) < 2 or max(map(len, labels)) <= MAX_LABEL:
        return labels
    rest = ["".join(words) for words in _without_start([re.split(r"(?<=[\W_])", label) for label in labels])]
    ends = _without_start([re.split(r"(?=[\W_])", label)[::-1] for label in rest])
    trimmed = ["".join(words[::-1]) for words in ends]
    return trimmed if all(trimmed) else labels


def _without_start(lists: list[list[str]]) -> list[list[str]]:
    """The lists without the words that all of them begin with."""
    shared = len(list(takewhile(lambda words: len(set(words)) == 1, zip(*lists, strict=False))))
    return [words[shared:] for words in lists]


def _cut(label: str, less: int = 0) -> str:
    room = MAX_LABEL - less
    return label if len(label) <= room else label[: room // 2] + "…" + label[len(label) - (room - room // 2 - 1) :]
