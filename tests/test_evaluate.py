"""Evaluation: means over cells, bands and the mix, by hand; and one pass through the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autotool_fast.chat import SOURCE_PROMPT, SOURCE_SAMPLED, ChatFormat, parse_reply
from autotool_fast.config import ModelConfig
from autotool_fast.evaluate import ALL_MODES, cell_weights, evaluate, regret, summarise
from autotool_fast.rewards import RewardTable
from autotool_fast.rollout.driver import RolloutLimits
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.rollout.records import StopReason, Trajectory
from autotool_fast.tasks.tiny import build_model, build_tokenizer
from autotool_fast.tasks.world import World

torch.set_num_threads(1)
LONG = parse_reply("[think]\n<think>\nx\n</think>\ny")
SHORT = parse_reply("[no_think]\ny")
BROKEN = parse_reply("y")


def trajectory(family, difficulty, correct, reply=SHORT, *, tokens=10, prompt=5, think=0, stop=StopReason.FINISHED):
    return Trajectory(
        task=World().task(family, difficulty, "test", "e"),
        group=0,
        sample=0,
        ids=np.zeros(prompt + tokens, np.int32),
        source=np.repeat(np.array([SOURCE_PROMPT, SOURCE_SAMPLED], np.int8), [prompt, tokens]),
        logp=np.zeros(prompt + tokens, np.float32),
        entropy=np.zeros(prompt + tokens, np.float32),
        replies=(reply,),
        correct=correct,
        stop_reason=stop,
        turn_spans=((prompt, prompt + tokens),),
        tool_seconds=0.0,
        think_spans=((prompt, prompt + think),) if think else (),
    )


def by_cell(summary):
    return {(cell["family"], cell["difficulty"]): cell for cell in summary["cells"]}


def test_weights_by_hand():
    # easy: set, missing share 0.6; steps: hop with k = 1, 2 and chain with k = 1, 2 share 0.4
    weights = cell_weights(World(("set", "missing", "hop", "chain"), 2), 0.6)
    assert weights == pytest.approx(
        {
            ("set", 0): 0.3,
            ("missing", 0): 0.3,
            ("hop", 1): 0.1,
            ("hop", 2): 0.1,
            ("chain", 1): 0.1,
            ("chain", 2): 0.1,
        }
    )


@pytest.mark.parametrize(("families", "cells"), [(("set", "missing"), 2), (("hop",), 6)])
def test_a_world_of_one_kind_ignores_the_share(families, cells):
    assert cell_weights(World(families), 0.6) == pytest.approx(dict.fromkeys(World(families).cells, 1 / cells))


def test_a_summary_by_hand():
    weights = {("set", 0): 0.6, ("hop", 2): 0.1, ("hop", 4): 0.3}
    trajectories = [
        trajectory("set", 0, True, tokens=10),
        trajectory("set", 0, False, LONG, tokens=30, think=12, prompt=7),
        trajectory("hop", 2, True, LONG, tokens=20, think=8),
        trajectory("hop", 4, False, BROKEN, tokens=40),
        trajectory("hop", 4, False, LONG, tokens=60, think=50, stop=StopReason.MAX_TOKENS),
        trajectory("hop", 4, True, LONG, tokens=20, think=10),
        trajectory("hop", 4, True, SHORT, tokens=40),
    ]
    summary = summarise(trajectories, weights, parameters=2_000_000)
    cells = by_cell(summary)
    # set: 1 of 2 right, 1 of 2 thinks, tokens (10 + 30) / 2
    assert cells["set", 0] == pytest.approx(
        {
            "family": "set",
            "difficulty": 0,
            "n": 2,
            "accuracy": 0.5,
            "think_rate": 0.5,
            "tokens": 20.0,
            "think_tokens": 6.0,
            "prompt_tokens": 6.0,
            "malformed": 0.0,
            "acu": 50 / (2 * 20),
        }
    )
    # A cut reply is in neither class, whatever its tag.
    assert (cells["hop", 4]["think_rate"], cells["hop", 4]["malformed"]) == (0.25, 0.5)
    assert cells["hop", 4]["tokens"] == 40
    overall = summary["overall"]
    assert overall["n"] == 7
    assert overall["accuracy"] == pytest.approx(0.6 * 0.5 + 0.1 * 1 + 0.3 * 0.5)
    assert overall["think_rate"] == pytest.approx(0.6 * 0.5 + 0.1 * 1 + 0.3 * 0.25)
    assert overall["tokens"] == pytest.approx(0.6 * 20 + 0.1 * 20 + 0.3 * 40)
    assert overall["think_tokens"] == pytest.approx(0.6 * 6 + 0.1 * 8 + 0.3 * 15)
    assert overall["malformed"] == pytest.approx(0.3 * 0.5)
    assert overall["acu"] == pytest.approx(100 * 0.55 / (2 * 26))
    assert list(summary["bands"]) == ["easy", "medium", "hard"]
    assert summary["bands"]["medium"]["accuracy"] == 1
    assert summary["bands"]["hard"]["accuracy"] == 0.5


def test_a_band_is_weighted_by_the_mix_inside_it():
    weights = {("hop", 1): 0.1, ("hop", 3): 0.3}
    one_each = [trajectory("hop", 1, True), trajectory("hop", 3, False)]
    # Sampling a cell more often must not move the mean.
    for extra in ([], [one_each[0]] * 5):
        summary = summarise([*one_each, *extra], weights, 1_000_000)
        assert summary["bands"]["medium"]["accuracy"] == pytest.approx(0.25)
        assert summary["overall"]["accuracy"] == pytest.approx(0.25)
        assert "easy" not in summary["bands"]


def test_cells_without_samples_are_left_out_and_the_rest_renormalised():
    weights = {("set", 0): 0.5, ("hop", 1): 0.125, ("hop", 3): 0.375}
    summary = summarise([trajectory("hop", 1, True), trajectory("hop", 3, False)], weights, 1_000_000)
    assert summary["overall"]["accuracy"] == pytest.approx(0.25)
    assert [(c["family"], c["difficulty"]) for c in summary["cells"]] == [("hop", 1), ("hop", 3)]


@pytest.mark.parametrize("easy_share", [0.0, 1.0])
def test_cells_that_the_mix_never_draws_still_have_means(easy_share):
    world = World(("set", "hop"), 2)
    weights = cell_weights(world, easy_share)
    trajectories = [trajectory("set", 0, True), trajectory("hop", 1, True), trajectory("hop", 2, False)]
    summary = summarise(trajectories, weights, 1_000_000)
    assert [cell["accuracy"] for cell in summary["cells"]] == [1, 1, 0]
    assert summary["bands"]["medium"]["accuracy"] == 0.5
    assert summary["overall"]["accuracy"] == (1 if easy_share else 0.5)


def test_every_mode_is_sampled_once_per_task_and_forced_modes_are_kept():
    tokenizer = build_tokenizer()
    chat = ChatFormat(tokenizer)
    world = World(("set", "hop"), 1)
    tasks = world.grid(2, "test", "m")
    model = build_model(ModelConfig(layers=1, hidden=16, heads=2, kv_heads=2, intermediate=16), tokenizer, 0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    engine = SlotEngine(model, slots=4, max_len=96)
    seen = {}
    results = evaluate(
        engine,
        chat,
        tasks,
        cell_weights(world, 0.5),
        limits=RolloutLimits(max_new_tokens=8, max_turn_tokens=8),
        on_mode=lambda mode, trajectories: seen.update({mode: trajectories}),
    )
    assert tuple(results) == tuple(seen) == ALL_MODES == ("auto", "think", "no_think")
    for mode, trajectories in seen.items():
        assert [t.task.id for t in trajectories] == [task.id for task in tasks]
        assert results[mode]["overall"]["n"] == len(tasks)
        forced = chat.encode_mode(mode) if mode != "auto" else []
        for t in trajectories:
            start = t.turn_spans[0][0]
            assert t.ids[start - len(forced) : start].tolist() == forced
            assert t.n_forced_tokens >= len(forced)
    acu, parameters = results["auto"]["overall"], sum(p.numel() for p in model.parameters())
    assert acu["acu"] == pytest.approx(100 * acu["accuracy"] / (parameters / 1e6 * acu["tokens"]))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_regret_is_the_reward_lost_against_the_better_mode_of_each_cell():
    def cells(*rows):
        return {"cells": [{"family": f, "difficulty": k, "accuracy": a, "think_rate": t} for f, k, a, t in rows]}

    modes = {
        "auto": cells(("set", 0, 1.0, 0.25), ("hop", 4, 0.5, 0.5)),
        "no_think": cells(("set", 0, 1.0, 0.0), ("hop", 4, 0.0, 0.0)),
        "think": cells(("set", 0, 1.0, 1.0), ("hop", 4, 1.0, 1.0)),
    }
    # set: a quarter of the replies earns 0.5 instead of 1; hop: half of them -1 instead of 0.5.
    expected = 0.6 * 0.25 * 0.5 + 0.4 * 0.5 * 1.5
    assert regret(modes, {("set", 0): 0.6, ("hop", 4): 0.4}, RewardTable()) == pytest.approx(expected, rel=1e-12)
