"""Evaluation on the embedded world: accuracy, thinking and tokens by mode, family and difficulty.

Every (family, difficulty) cell gets the same number of held-out tasks; means over bands and over the whole test mix are
weighted by how often the mix draws each cell, so they are means over the mix without its sampling noise. Evaluation
trains nothing and moves no controller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from autotool_fast.chat import MODES, ChatFormat
from autotool_fast.rewards import RewardTable, routing_regret
from autotool_fast.rollout.driver import Engine, RolloutLimits
from autotool_fast.rollout.ranks import rollout_over_ranks
from autotool_fast.rollout.records import Trajectory
from autotool_fast.tasks.record import Task
from autotool_fast.tasks.world import BANDS, World, band

Cell = tuple[str, int]
"""(family, difficulty)."""
ALL_MODES = ("auto", *MODES)
ACU_UNIT = "accuracy in percent / (millions of parameters x mean response tokens)"

_MEASURES: dict[str, Callable[[Trajectory], float]] = {
    "accuracy": lambda t: float(t.correct),
    "think_rate": lambda t: float(t.length_class == 0),
    "tokens": lambda t: float(t.n_response_tokens),
    "think_tokens": lambda t: float(t.n_think_tokens),
    "prompt_tokens": lambda t: float(t.n_prompt),
    "malformed": lambda t: float(t.length_class < 0),
}


def cell_weights(world: World, easy_share: float) -> dict[Cell, float]:
    """Probability that `World.draw(easy_share=...)` draws each (family, difficulty); sums to 1."""
    families: dict[str, list[int]] = defaultdict(list)
    for family, difficulty in world.cells:
        families[family].append(difficulty)
    easy = [family for family, levels in families.items() if 0 in levels]
    steps = [family for family, levels in families.items() if 0 not in levels]
    share = {True: easy_share if steps else 1.0, False: 1 - easy_share if easy else 1.0}
    return {
        (family, k): share[family in easy] / len(easy if family in easy else steps) / len(families[family])
        for family, k in world.cells
    }


def summarise(
    trajectories: Sequence[Trajectory], weights: dict[Cell, float], parameters: int
) -> dict[str, Any]:
    """Means per cell, per band and over the mix.

    Args:
        trajectories: of one mode, any number per cell.
        weights: from `cell_weights`; cells without trajectories are left out and the rest renormalised. Cells that
            all have weight 0 count alike.
        parameters: of the model, for ACU = accuracy % / (millions of parameters x mean response tokens).
    """
    groups: dict[Cell, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        groups[trajectory.task.family, trajectory.task.difficulty].append(trajectory)
    means = {
        cell: {name: float(np.mean([measure(t) for t in members])) for name, measure in _MEASURES.items()}
        for cell, members in groups.items()
    }

    def weighted(cells: list[Cell]) -> dict[str, float]:
        total = sum(weights[cell] for cell in cells)
        # Cells that the mix never draws still have means of their own, and so does a band of such cells.
        share = {cell: weights[cell] / total if total > 0 else 1 / len(cells) for cell in cells}
        result = {name: sum(share[cell] * means[cell][name] for cell in cells) for name in _MEASURES}
        tokens = max(result["tokens"], 1e-9)
        result["acu"] = 100 * result["accuracy"] / (parameters / 1e6 * tokens)
        return {"n": sum(len(groups[cell]) for cell in cells), **result}

    cells = sorted(groups, key=list(weights).index)
    in_band = {name: [cell for cell in cells if band(cell[1]) == name] for name in BANDS}
    return {
        "overall": weighted(cells),
        "bands": {name: weighted(members) for name, members in in_band.items() if members},
        "cells": [{"family": cell[0], "difficulty": cell[1], **weighted([cell])} for cell in cells],
    }


def evaluate(
    engine: Engine,
    chat: ChatFormat,
    tasks: Sequence[Task],
    weights: dict[Cell, float],
    *,
    limits: RolloutLimits,
    modes: Sequence[str] = ALL_MODES,
    temperature: float = 0.0,
    seed: int = 0,
    on_mode: Callable[[str, list[Trajectory]], None] | None = None,
) -> dict[str, Any]:
    """One sample of every task in every mode; returns {mode: `summarise`}. `on_mode` sees the trajectories."""
    parameters = sum(p.numel() for p in engine.model.parameters())
    results = {}
    for mode in modes:
        trajectories = rollout_over_ranks(
            engine,
            tasks,
            chat=chat,
            group_size=1,
            seed=seed,
            step=0,
            mode=mode,
            temperature=temperature,
            limits=limits,
        )
        if on_mode is not None:
            on_mode(mode, trajectories)
        results[mode] = summarise(trajectories, weights, parameters)
    return results


def regret(modes: dict[str, Any], weights: dict[Cell, float], table: RewardTable) -> float:
    """Mean reward lost in mode auto against an oracle that picks the better forced mode for every cell.

    Args:
        modes: from `evaluate`, with all three modes.
        weights: from `cell_weights`.
        table: the rewards that decide which mode is better.
    """
    auto, direct, think = (modes[mode]["cells"] for mode in ("auto", "no_think", "think"))
    return routing_regret(
        [cell["think_rate"] for cell in auto],
        [cell["accuracy"] for cell in direct],
        [cell["accuracy"] for cell in think],
        table,
        weights=[weights[cell["family"], cell["difficulty"]] for cell in auto],
    )
