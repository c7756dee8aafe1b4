"""Six steps are three steps, SIGTERM and three more, bit for bit: every stage, arm and embedded preset."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from scripted_rl import LONG, MIXED, TASKS, Setting
from small_rl import options
from small_runs import ctrl_c_at, tensors_of
from test_distributed import ROOT
from test_loop import rows, same

from autotool_fast import checkpoint
from autotool_fast.config import from_dict
from autotool_fast.controller import ARMS
from autotool_fast.loop import Context, Interrupted, StepResult, StopFlag, run_steps
from autotool_fast.metrics import MetricsWriter, Progress, read_rows
from autotool_fast.runs import RunFolder
from autotool_fast.train import main

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

# Over a preset: sizes and counts alone.
SMALL = """
extends = "{preset}"
[world]
families = ["set", "hop"]
max_difficulty = 2
easy_share = 0.8
[model]
layers = 2
hidden = 32
heads = 2
kv_heads = 2
intermediate = 96
[base]
steps = 6
batch = 8
warmup_steps = 1
{reuse}
[label]
prompts = 12
k = 2
unsolved = "short"
[warmup]
steps = 6
batch = 4
warmup_steps = 1
[distill]
steps = 6
batch = 4
warmup_steps = 1
[refine]
prompts = 6
[rl]
steps = 6
prompts_per_step = 2
group_size = 3
eval_every = 4
checkpoint_every = 0
[rollout]
slots = 12
[eval]
per_cell = 1
interim_per_cell = 1
"""


def files_of(run: Path) -> dict[str, object]:
    """What a run leaves: weights, rows without clock readings, results."""
    found: dict[str, object] = {path.parent.name: tensors_of(path.parent) for path in run.glob("models/*/config.json")}
    found["rows"] = rows(run)
    for name in ("labels.jsonl", "refined.json", "results.json", "transcripts.jsonl"):
        found[name] = (run / name).read_bytes() if (run / name).exists() else None
    return found


def continued(argv: list[str], out: Path, stops: list[tuple[str, int]]) -> None:
    """The run of `argv` with a SIGTERM at each of the stops."""
    for number, (stage, step) in enumerate(stops):
        with ctrl_c_at(stage, step, number=signal.SIGTERM):
            assert main([*argv, "--out", str(out), *(["--resume"] if number else [])]) == 143, stage
    assert main([*argv, "--out", str(out), "--resume"]) == 0


@pytest.mark.parametrize("preset", ["mini", "mini-full", "smoke"])
def test_every_stage_of_a_preset_goes_on_after_sigterm_as_if_nothing_had_been(trained, tmp_path, preset):
    path = tmp_path / "small.toml"
    path.write_text(SMALL.format(preset=preset, reuse=f'reuse = "{trained}"'))
    argv = ["--preset", str(path)]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    stops = [("label", 13), ("warmup", 3), ("distill", 3), ("refine", 3), ("rl", 3), ("eval", 2)]
    continued(argv, tmp_path / "parts", stops)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    trained_rows = [row for row in rows(tmp_path / "whole") if row["stage"] == "rl"]
    assert any(row["grad_norm"] for row in trained_rows)


@pytest.mark.parametrize("preset", ["mini", "mini-full", "smoke"])
def test_base_training_of_a_preset_goes_on_after_sigterm_as_if_nothing_had_been(tmp_path, preset):
    path = tmp_path / "small.toml"
    path.write_text(SMALL.format(preset=preset, reuse=""))
    argv = ["--preset", str(path), "--stages", "base"]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    continued(argv, tmp_path / "parts", [("base", 3)])
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


class Stage:
    """Six RL steps on scripted replies, of all kinds, so that every arm has something to do."""

    def __init__(self, monkeypatch, arm: str, seed: int = 0) -> None:
        Setting.script.clear()
        rl = {"steps": 6, "decay": 0.3, "warmup_steps": 1, "target_mode": "relative", "target_ratio": 1.5}
        self.setting = Setting(monkeypatch, seed=seed, arm=arm, rl=rl)

    def run(self, out: Path, *, resume: bool = False, stop_at: int | None = None) -> None:
        setting = self.setting

        def step(index: int) -> StepResult:
            if index == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            if "controller" not in setting.state.extra:
                setting.write(TASKS, [[LONG] * 4] * 3, -1)  # what relative targets are measured on
            return setting.step(TASKS, MIXED, index)

        config = from_dict({"out": str(out), "resume": resume})
        with RunFolder.create(config) as run, Progress() as progress:
            context = Context(config, run, MetricsWriter.open(run.metrics, lambda row: True), progress, StopFlag())
            with context.stop.installed(progress.say):
                try:
                    run_steps(context, "rl", setting.state, 6, step, shown=())
                finally:
                    context.metrics.close()


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_goes_on_after_sigterm_as_if_nothing_had_been(monkeypatch, tmp_path, arm):
    whole = Stage(monkeypatch, arm)
    whole.run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        Stage(monkeypatch, arm).run(tmp_path / "parts", stop_at=2)
    assert checkpoint.latest(tmp_path / "parts" / "checkpoints" / "rl").step == 3
    again = Stage(monkeypatch, arm, seed=7)
    again.run(tmp_path / "parts", resume=True)
    assert same(again.setting.weights(), whole.setting.weights())
    ours, theirs = again.setting.state, whole.setting.state
    assert same(ours.optimizers.pack()[0], theirs.optimizers.pack()[0])
    assert ours.optimizers.pack()[1] == theirs.optimizers.pack()[1]
    assert ours.extra == theirs.extra
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    betas = {row["beta/long"] for row in rows(tmp_path / "whole")}
    assert (len(betas) > 1) == (arm in ("adaptive", "decoupled"))


def test_sigterm_saves_once(tmp_path, monkeypatch, capsys):
    saved = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: saved.append(a[1]) or save(*a, **k))
    argv = options(tmp_path, tmp_path / "run", "--rl.checkpoint-every", "0")
    with ctrl_c_at("rl", 2, number=signal.SIGTERM):
        assert main(argv) == 143
    assert saved == [2]
    shown = capsys.readouterr().err.splitlines()
    assert len([line for line in shown if line.startswith("told to end: stopping")]) == 1
    assert shown[-1].startswith("interrupted; saved in ")


def test_torchrun_that_is_told_to_end_leaves_a_checkpoint_of_the_step_under_way(tmp_path):
    argv = options(tmp_path, tmp_path / "run", "--rl.checkpoint-every", "0", "--rl.steps", "400")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "autotool_fast.train", *argv]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as job:
        lines = []
        for line in job.stderr:
            lines.append(line.strip())
            if line.startswith("rl ") and int(line.split()[1].partition("/")[0]) >= 3:
                break
        told = time.monotonic()
        job.send_signal(signal.SIGTERM)
        lines += [line.strip() for line in job.stderr]
    assert time.monotonic() - told < 30
    assert job.returncode != 0
    assert [line for line in lines if line.startswith("interrupted; saved in ")], lines
    found = checkpoint.latest(tmp_path / "run" / "checkpoints" / "rl")
    steps = [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "rl"]
    assert found.step == len(steps) >= 3
    with ctrl_c_at("rl", found.step + 1):
        assert main([*argv, "--resume"]) == 130
