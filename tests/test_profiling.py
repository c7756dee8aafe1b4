"""--profile: the trace, the table of phases, and that neither changes a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_runs import tensors_of

from autotool_fast.errors import Interrupted
from autotool_fast.metrics import Timer, read_rows, strip_timings
from autotool_fast.profiling import Profiler
from autotool_fast.train import main

torch.set_num_threads(1)
SMALL = """
[world]
families = ["set", "hop"]
[model]
layers = 1
hidden = 16
heads = 1
kv_heads = 1
intermediate = 32
[base]
steps = 4
batch = 4
warmup_steps = 1
[refine]
enabled = false
prompts = 4
[rl]
steps = 4
prompts_per_step = 2
group_size = 2
eval_every = 2
checkpoint_every = 1
[rollout]
slots = 4
max_new_tokens = 48
max_turn_tokens = 48
[eval]
per_cell = 1
interim_per_cell = 1
"""


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def train(folder: Path, name: str, *more: str) -> Path:
    preset = folder / "small.toml"
    preset.write_text(SMALL)
    options = ["--preset", str(preset), "--start", "cold", "--stages", "base,rl,eval", "--out", str(folder / name)]
    assert main([*options, *more]) == 0
    return folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """The same run without and with a profile."""
    folder = tmp_path_factory.mktemp("profile")
    return train(folder, "plain"), train(folder, "profiled", "--profile")


def table(run: Path, stage: str) -> dict[str, dict]:
    entry = json.loads((run / "profile" / "phases.json").read_text())[stage]
    assert sum(row["seconds"] for row in entry["phases"]) == pytest.approx(entry["seconds"])
    assert sum(row["share"] for row in entry["phases"]) == pytest.approx(1.0)
    assert all(row["seconds"] >= 0 for row in entry["phases"])
    return {row["phase"]: row for row in entry["phases"]}


def test_a_profile_changes_nothing_but_times(runs):
    plain, profiled = runs
    assert [strip_timings(row) for row in read_rows(plain / "metrics.jsonl")] == [
        strip_timings(row) for row in read_rows(profiled / "metrics.jsonl")
    ]
    assert tensors_of(plain / "models" / "rl") == tensors_of(profiled / "models" / "rl")
    assert (plain / "results.json").read_text() == (profiled / "results.json").read_text()
    assert not (plain / "profile").exists()


def test_every_phase_of_a_step_is_in_the_table(runs):
    rl = table(runs[1], "rl")
    assert {"rollout", "log-prob", "loss", "backward", "optimizer", "checkpoint", "eval", "other"} <= rl.keys()
    assert rl["optimizer"]["calls"] == 3  # the fourth step is in the trace
    assert rl["rollout"]["ms_per_step"] == pytest.approx(1e3 * rl["rollout"]["seconds"] / 3)
    assert {"data", "log-prob", "backward", "optimizer"} <= table(runs[1], "base").keys()
    assert table(runs[1], "eval")["eval"]["ms_per_step"] is None
    text = (runs[1] / "profile" / "phases.md").read_text()
    assert "| rollout | " in text
    assert text.count("## ") == 3


def test_the_trace_holds_the_wanted_steps_with_their_phases(runs):
    events = json.loads((runs[1] / "profile" / "rl-rank0.trace.json").read_text())["traceEvents"]
    spans = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert spans.count("rollout") == spans.count("optimizer") == 1
    assert any(event["name"].startswith("aten::") for event in events)
    assert {path.name for path in (runs[1] / "profile").iterdir()} == {
        "base-rank0.trace.json", "rl-rank0.trace.json", "phases.json", "phases.md",
    }  # fmt: skip


def test_the_table_is_printed_at_the_end(tmp_path, capsys):
    train(tmp_path, "run", "--profile", "--base.steps", "2", "--rl.steps", "1")
    printed = capsys.readouterr().out
    assert "## base:" in printed
    assert "| other | " in printed


def test_steps_in_the_trace_and_writing_it_are_left_out(tmp_path, monkeypatch):
    clock = Clock()

    def export(trace, path: str) -> None:
        clock.now += 50.0

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", export)
    timer = Timer(clock)
    profiler = Profiler(timer, tmp_path / "profile", 2, "cpu")
    with profiler.stage("rl"):
        clock.now += 1.0
        for step in profiler.steps(range(6)):
            with timer.phase("rollout"):
                clock.now += 100.0 if step in (2, 3) else 2.0
                with timer.phase("tools"):
                    clock.now += 1.0
    found = table(tmp_path, "rl")
    assert {name: row["seconds"] for name, row in found.items()} == {
        "rollout": 8.0, "rollout / tool wait": 4.0, "other": 1.0,
    }  # fmt: skip
    assert found["rollout"]["calls"] == 4
    assert found["rollout"]["share"] == pytest.approx(8 / 13)


def test_a_trace_prints_nothing(tmp_path, capfd):
    profiler = Profiler(Timer(), tmp_path / "profile", 1, "cpu")
    with profiler.stage("base"):
        for _ in profiler.steps(range(1)):
            torch.ones(1)
    assert (tmp_path / "profile" / "base-rank0.trace.json").exists()
    assert capfd.readouterr() == ("", "")


def test_a_stage_of_one_step_is_traced_and_has_a_table(tmp_path):
    clock = Clock()
    timer = Timer(clock)
    profiler = Profiler(timer, tmp_path / "profile", 3, "cpu")
    with profiler.stage("base"):
        for _ in profiler.steps(range(1)):
            with timer.phase("backward"):
                clock.now += 2.0
    assert table(tmp_path, "base")["backward"]["calls"] == 1
    assert (tmp_path / "profile" / "base-rank0.trace.json").exists()


def test_a_stopped_stage_has_its_table_and_a_failed_one_does_not_hinder_the_next(tmp_path):
    timer = Timer()

    def fail(stage: str, error: type[Exception]) -> None:
        profiler = Profiler(timer, tmp_path / "profile", 9, "cpu")
        with profiler.stage(stage):
            for step in profiler.steps(range(9)):
                if step == 4:
                    raise error

    for error, stage in ((Interrupted, "base"), (ValueError, "warmup"), (Interrupted, "rl")):
        with pytest.raises(error):
            fail(stage, error)
    assert list(json.loads((tmp_path / "profile" / "phases.json").read_text())) == ["base", "rl"]
    traces = sorted(path.name for path in (tmp_path / "profile").glob("*.trace.json"))
    assert traces == ["base-rank0.trace.json", "rl-rank0.trace.json"]
