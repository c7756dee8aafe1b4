"""A rank that is killed ends the job soon, with one message that names it, and the run goes on from its checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_rl import options
from test_distributed import ROOT, torchrun

from autotool_fast import checkpoint, distributed
from autotool_fast.metrics import read_rows
from autotool_fast.train import main

torch.set_num_threads(1)
pytestmark = pytest.mark.slow
BOUND_S = 20.0
"""Longest time from a rank's death to the end of the job; it is about 2 s on an idle machine."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    assert main([*options(folder, folder / "run"), "--stages", "base"]) == 0
    return folder / "run" / "models" / "base"


@pytest.mark.parametrize(
    ("place", "call", "victim", "left"),
    [
        ("alone", 4, 1, 2),
        ("update", 4, 0, 2),
        ("shards", 2, 1, 2),
        ("checkpoint", 2, 0, 2),
    ],
)
def test_a_killed_rank_ends_the_job_and_the_run_resumes(base, tmp_path, place, call, victim, left):
    arguments = options(tmp_path, tmp_path / "run", "--base.reuse", str(base))
    script, stamp = ROOT / "tests" / "faults" / "dying_rank.py", tmp_path / "stamp"
    done = torchrun(2, script, stamp, place, call, victim, *arguments)
    assert time.time() - stamp.stat().st_mtime < BOUND_S
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(said) == 1, done.stderr
    assert f"error: rank {victim} (process " in said[0]
    assert said[0].endswith("; repeat the command with --resume to continue from the newest checkpoint")
    assert done.stderr.count("Traceback") == 1  # torchrun shows its own
    found = checkpoint.latest(tmp_path / "run" / "checkpoints" / "rl")
    assert found is not None
    assert found.step == left
    assert main([*arguments, "--resume"]) == 0
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "run" / "models" / "rl" / "config.json").exists()


def test_a_process_that_has_ended_is_gone_before_it_was_waited_for():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert distributed._lives(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while distributed._lives(process.pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not distributed._lives(process.pid)
    process.wait()
    assert not distributed._lives(process.pid)


def test_processes_of_another_machine_are_not_judged(monkeypatch):
    monkeypatch.setattr(distributed, "_peers", [("another machine", 2**22 + 5)])
    assert distributed.lost(0.0) is None
    monkeypatch.setattr(distributed, "_peers", [(distributed._machine(), 2**22 + 5)])  # above any process number
    assert distributed.lost(0.0).startswith("rank 0 (process 4194309) is gone")
