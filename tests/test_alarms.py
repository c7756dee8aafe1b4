"""Alarms: what sets each off, that a healthy run sets off none, and that a stopped run goes on with the same ones."""

from __future__ import annotations

import io
import math
import random
import re
from typing import ClassVar

import pytest
from rich.console import Console
from test_loop import Training, same, weights

from autotool_fast import alarms
from autotool_fast.alarms import Monitor, Watch, advance, spells
from autotool_fast.config import AlarmsConfig, TrainConfig, from_dict
from autotool_fast.errors import UserError
from autotool_fast.loop import Interrupted, StepResult
from autotool_fast.metrics import read_rows, strip_timings
from autotool_fast.schema import leaf_paths
from autotool_fast.summary import print_summary

WINDOW = 4
CONFIG = AlarmsConfig(window=WINDOW)
GOOD = {
    "entropy/all": 0.2,
    "acc/all": 0.8,
    "reward/mean": 0.5,
    "malformed": 0.02,
    "truncated": 0.01,
    "mismatch/mean": 0.001,
}


def healthy(steps: int) -> list[dict[str, float]]:
    """A run that learns: accuracy and reward rise, entropy falls to a third, everything jitters."""
    rng = random.Random(0)
    rows = []
    for step in range(steps):
        learnt = 1 - math.exp(-step / 40)
        accuracy = 0.5 + 0.4 * learnt + rng.uniform(-0.1, 0.1)
        rows.append(
            {
                "entropy/all": (0.3 - 0.2 * learnt) * rng.uniform(0.6, 1.4),
                "acc/all": accuracy,
                "reward/mean": 1.6 * accuracy - 0.7 + rng.uniform(-0.05, 0.05),
                "malformed": (0.1 - 0.09 * learnt) * rng.uniform(0.0, 2.0),
                "truncated": 0.02 * rng.uniform(0.0, 2.0),
                "mismatch/mean": 0.002 * rng.uniform(0.5, 2.0),
            }
        )
    return rows


def watched(rows, config=CONFIG) -> tuple[list[str], list[dict]]:
    said: list[str] = []
    monitor = Monitor(config, said.append)
    marked = [row | monitor.see(step, row) | {"step": step} for step, row in enumerate(rows, 1)]
    return said, marked


def test_a_healthy_run_sets_nothing_off_and_its_rows_stay_as_they_are():
    rows = healthy(240)
    said, marked = watched(rows, AlarmsConfig())
    assert said == []
    assert [row | {"step": step} for step, row in enumerate(rows, 1)] == marked


TROUBLE = {
    "entropy_explosion": {"entropy/all": 1.5},
    "entropy_collapse": {"entropy/all": 0.009},  # relative: a twentieth is 0.01
    "reward_hacking": {"acc/all": 0.65, "reward/mean": 0.6},
    "format_loss": {"malformed": 0.3},
    "truncation": {"truncated": 0.3},
    "mismatch": {"mismatch/mean": 0.2},
}


@pytest.mark.parametrize("name", TROUBLE)
def test_each_trouble_is_said_once_when_it_begins_and_once_when_it_ends(name):
    bad = GOOD | TROUBLE[name]
    said, rows = watched([GOOD] * 6 + [bad] * 10 + [GOOD] * 12)
    assert len(said) == 2, said
    assert said[0].startswith(f"alarm: {alarms.NAMES[name]} at step ")
    assert said[1].startswith(f"alarm over: {alarms.NAMES[name]}, at step ")
    marked = [row["step"] for row in rows if f"alarm/{name}" in row]
    # On at the latest when a whole window is bad; off when the condition has been gone for a window.
    assert 7 <= marked[0] <= 6 + WINDOW
    assert 16 < marked[-1] <= 16 + 2 * WINDOW
    assert marked == list(range(marked[0], marked[-1] + 1))
    assert not [key for row in rows for key in row if key.startswith("alarm/") and key != f"alarm/{name}"]
    assert spells(rows) == [f"{alarms.NAMES[name]}, steps {marked[0]} to {marked[-1]}"]


def test_every_alarm_says_what_to_do_with_settings_that_exist():
    known = leaf_paths(TrainConfig)
    assert alarms.ADVICE.keys() == alarms.NAMES.keys()
    for name, advice in alarms.ADVICE.items():
        named = re.findall(r"[a-z]+\.[a-z_]+", advice) + re.findall(r"--(\w+)", advice)
        assert named, name
        assert [setting for setting in named if setting not in known] == []
        said, _ = watched([GOOD] * 6 + [GOOD | TROUBLE[name]] * 4)
        assert said[0].endswith(f"(last {WINDOW} steps); {advice}")


def test_replies_that_gain_form_and_lose_answers_are_reward_without_answers():
    early = GOOD | {"malformed": 0.5, "acc/all": 0.5}
    late = GOOD | {"malformed": 0.05, "acc/all": 0.3, "reward/mean": 0.1}
    said, _ = watched([early] * 5 + [late] * 6)
    assert [line for line in said if line.startswith("alarm: reward without answers")]
    said, _ = watched([GOOD] * 5 + [GOOD | {"acc/all": 0.3, "reward/mean": 0.1}] * 6)
    assert said == []  # worse in everything is no hacking


def test_entropy_close_to_zero_is_a_collapse_even_where_it_began():
    said, _ = watched([GOOD | {"entropy/all": 0.004}] * 6)
    assert len(said) == 1
    assert "entropy collapse at step 4" in said[0]


def test_one_bad_step_and_missing_or_non_finite_values_are_no_alarm():
    rows = [dict(GOOD) for _ in range(20)]
    rows[10] |= {"entropy/all": 0.001, "mismatch/mean": math.nan, "acc/all": None}
    rows[12] = {}
    assert watched(rows)[0] == []
    assert watched([{}] * 20)[0] == []


def test_watching_is_a_function_of_the_rows_alone():
    rows = [GOOD] * 6 + [GOOD | TROUBLE["truncation"]] * 10
    watch = Watch()
    for row in rows:
        watch, _, _ = advance(watch, row, CONFIG)
    said, _ = watched(rows)
    again: list[str] = []
    monitor = Monitor(CONFIG, again.append, rows[:11])
    assert again == []  # what was said before the stop is not said again
    marks = [monitor.see(step, row) for step, row in enumerate(rows[11:], 12)]
    assert monitor._watch == watch
    assert again == []
    assert len(said) == 1
    assert marks == [{"alarm/truncation": 1}] * 5


def test_alarms_can_be_turned_off():
    said, rows = watched([GOOD | TROUBLE["truncation"]] * 20, AlarmsConfig(window=WINDOW, enabled=False))
    assert said == []
    assert not [key for row in rows for key in row if key.startswith("alarm/")]
    with pytest.raises(UserError, match=r"at least 1"):
        from_dict({"alarms": {"window": 0}})


class Collapsing(Training):
    """A stage whose entropy metric collapses after its fifth step."""

    settings: ClassVar[dict] = {"alarms": {"window": 2}}

    def step(self, index: int) -> StepResult:
        result = super().step(index)
        result.metrics |= GOOD | ({"entropy/all": 0.001} if index >= 5 else {})
        return result


def test_other_stages_are_not_watched(tmp_path, capsys):
    Collapsing().run(tmp_path / "run")
    assert "alarm" not in capsys.readouterr().err


def test_an_alarm_goes_on_over_a_stop_and_the_summary_tells_of_it(tmp_path, capsys):
    straight = Collapsing()
    straight.run(tmp_path / "straight", stage="rl")
    assert capsys.readouterr().err.count("alarm: entropy collapse at step 7") == 1
    with pytest.raises(Interrupted):
        Collapsing(stop_at=6).run(tmp_path / "run", stage="rl")
    assert capsys.readouterr().err.count("alarm: entropy collapse") == 1
    resumed = Collapsing(seed=99)
    resumed.run(tmp_path / "run", resume=True, stage="rl")
    assert capsys.readouterr().err.count("alarm: entropy collapse") == 0
    rows = [strip_timings(row) for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert rows == [strip_timings(row) for row in read_rows(tmp_path / "straight" / "metrics.jsonl")]
    assert [row["step"] for row in rows if "alarm/entropy_collapse" in row] == [7, 8]
    assert same(weights(resumed.state.model), weights(straight.state.model))
    shown = io.StringIO()
    print_summary(tmp_path / "run", None, Console(file=shown, width=200))
    assert "alarm: entropy collapse, steps 7 to 8" in shown.getvalue()
