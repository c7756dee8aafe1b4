"""Several processes do what one does: steps, sampling, stages, checkpoints, whole runs; and they fail together.

What is compared is in `ranks`; torchrun plays it with 2 and with 4 processes on the CPU (gloo), once for all tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from small_runs import write_preset

from autotool_fast import distributed
from autotool_fast.metrics import read_rows, strip_timings
from autotool_fast.train import main

torch.set_num_threads(1)
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
STEPS = ("tied", "untied", "recomputed", "adapter", "scoped", "two_sequences", "relative")
OTHERS = ("double", "low", "low_adapter", "constant", "poisoned", "sft", "sampled", "interrupted_sampling")
STAGES = ("saved", "continued")
ON_TWO = (*STEPS, *OTHERS, *STAGES)
ON_FOUR = ("tied", "two_sequences", "poisoned", "sft", "continued")


def torchrun(count: int, *arguments: str | Path, timeout: float = 120.0) -> subprocess.CompletedProcess:
    """Start `count` processes of a script or module, and wait for their end."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", *map(str, arguments)]
    paths = [ROOT, ROOT / "kernels", ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[int, str], Any]:
    """(number of processes, case) -> the results of one process, or of every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    one = {case: ranks.perform(case, folder) for case in ON_TWO if case != "continued"}
    for count, cases in ((2, ON_TWO), (4, ON_FOUR)):
        before = folder / f"before-{count}"  # a stage that was continued is over
        before.mkdir()
        for path in folder.glob("from*"):
            shutil.copytree(path, before / path.name)
        done = torchrun(count, ROOT / "tests" / "ranks.py", before, *cases)
        assert done.returncode == 0, done.stderr
        for path in before.glob(f"from{count}-*"):
            shutil.copytree(path, folder / path.name)
    one["continued"] = ranks.perform("continued", folder)
    results: dict[tuple[int, str], Any] = {(1, case): value for case, value in one.items()}
    for count, cases in ((2, ON_TWO), (4, ON_FOUR)):
        for case in cases:
            files = [folder / f"before-{count}" / f"{case}-{rank}-of-{count}.pt" for rank in range(count)]
            results[count, case] = [torch.load(path) for path in files]
    return results


def distance(a: Any, b: Any) -> float:
    """Largest difference of tensors, relative to the largest entry of `b`."""
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


def assert_step(one: dict, every: list[dict], *, relative: float, weights: float) -> None:
    for rank in every:
        assert rank["ids"] == one["ids"]
        assert rank["tasks"] == one["tasks"]
        assert rank["rewards"] == one["rewards"]
        assert rank["metrics"].keys() == one["metrics"].keys()
        for name, value in one["metrics"].items():
            assert rank["metrics"][name] == pytest.approx(value, rel=relative, abs=relative), name
        assert rank["gradient"].keys() == one["gradient"].keys()
        for name, value in one["gradient"].items():
            assert distance(rank["gradient"][name], value) <= relative, name
        for name, value in one["weights"].items():
            assert distance(rank["weights"][name], value) <= weights, name
            assert torch.equal(rank["weights"][name], every[0]["weights"][name])
        assert rank["controller"] == every[0]["controller"]
        assert rank["metrics"] == every[0]["metrics"]


@pytest.mark.parametrize(("count", "case"), [*((2, case) for case in STEPS), (4, "tied"), (4, "two_sequences")])
def test_a_step_of_several_processes_is_that_of_one(found, count, case):
    one = found[1, case]
    assert one["finite"]
    assert one["metrics"]["loss/entropy"] != 0.0 or case == "relative"
    assert one["metrics"]["grad_norm"] > 0.0
    # float32 sums in another order; AdamW's first step divides a gradient by its own size, so where that is near its
    # rounding error the step is not determined: a hundredth of the learning rate (1e-2), over weights of about 0.3.
    assert_step(one, found[count, case], relative=1e-5, weights=1e-3)


def test_a_float64_step_shows_that_only_rounding_is_left(found):
    # The loss op hands float32 numbers back, so its own rounding (6e-8) stays; the sums are float64.
    assert_step(found[1, "double"], found[2, "double"], relative=1e-7, weights=1e-5)


@pytest.mark.parametrize("case", ["low", "low_adapter"])
def test_a_bfloat16_model_trains_on_float32_shards(found, case):
    one, every = found[1, case], found[2, case]
    for rank in every:
        for name, value in one["gradient"].items():
            assert rank["gradient"][name].dtype == torch.float32
            # bfloat16 has 8 bits; gradients are sums of a dozen such numbers.
            assert distance(rank["gradient"][name], value) <= 0.05, name
        for name, value in one["weights"].items():
            assert rank["weights"][name].dtype == torch.bfloat16
            assert distance(rank["weights"][name], value) <= 0.05, name
            assert torch.equal(rank["weights"][name], every[0]["weights"][name])


def test_constant_groups_alone_are_a_step_of_zero(found):
    for rank in found[2, "constant"]:
        assert rank["finite"]
        assert rank["metrics"]["grad_norm"] == 0.0
        for name, value in found[1, "constant"]["weights"].items():
            assert torch.equal(rank["weights"][name], value)


@pytest.mark.parametrize("count", [2, 4])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(found, count):
    skipped = {"finite": False, "moved": [], "controller_moved": False}
    assert found[1, "poisoned"] == skipped
    assert found[count, "poisoned"] == [skipped] * count


@pytest.mark.parametrize("count", [2, 4])
def test_a_supervised_step_of_several_processes_is_that_of_one(found, count):
    one = found[1, "sft"]["adamw"]
    for rank in found[count, "sft"]:
        assert rank["adamw"]["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert rank["adamw"]["norm"] == pytest.approx(one["norm"], rel=1e-6)
        for mine, value in zip(rank["adamw"]["gradient"], one["gradient"], strict=True):
            assert distance(mine, value) <= 1e-6


def test_muon_orthogonalises_whole_matrices(found):
    """Up to the rounding of its bfloat16 iterations, which reaches a few per cent of its step of 2e-3 x sqrt(32)."""
    for rank in found[2, "sft"]:
        for mine, value in zip(rank["muon"]["weights"], found[1, "sft"]["muon"]["weights"], strict=True):
            assert (mine - value).abs().max() <= 1e-3


def test_what_is_sampled_does_not_depend_on_the_number_of_ranks(found):
    one = found[1, "sampled"]
    assert one["last_progress"] == (10, 10)
    assert len({tuple(ids) for ids in one["ids"]}) == 10
    for rank in found[2, "sampled"]:
        assert rank == one


def test_a_rank_that_stops_sampling_stops_all(found):
    assert found[2, "interrupted_sampling"] == [{"stopped": True}] * 2


def test_all_ranks_stop_after_the_step_in_which_one_was_told_to(found):
    for dtype in ("float32", "bfloat16"):
        for rank in found[2, "saved"]:
            assert rank[dtype]["steps"] == [0, 1, "stopped"]


@pytest.mark.parametrize(("wrote", "reads"), [(1, 2), (2, 1), (2, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_continued_by_another_number_of_processes(found, tmp_path, wrote, reads, dtype):
    with pytest.MonkeyPatch.context() as patch:
        straight = ranks.stages_of(patch, tmp_path / "straight", ranks.DTYPES[dtype])
    results = found[reads, "continued"]
    # Three steps of AdamW at 1e-2 on rounding differences of float32; and of bfloat16, whose steps are 2^-8 of a value.
    limit = 1e-3 if dtype == "float32" else 0.05
    for rank in results if reads > 1 else [results]:
        rank = rank[f"from{wrote}-{dtype}"]
        assert rank["steps"] == [2]
        for name, value in straight["weights"].items():
            assert distance(rank["weights"][name], value) <= limit, name
        assert rank["controller"]["beta_long"] == pytest.approx(straight["controller"]["beta_long"], rel=1e-2)


def test_a_run_of_two_processes_is_that_of_one(tmp_path):
    """From one base model, since 140 steps of base training let rounding grow until samples differ."""
    preset = write_preset(tmp_path)
    options = ["--preset", str(preset), "--profile"]
    assert main([*options, "--out", str(tmp_path / "base"), "--stages", "base"]) == 0
    options += ["--base.reuse", str(tmp_path / "base" / "models" / "base")]
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    done = torchrun(2, "-m", "autotool_fast.train", *options, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == 1
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert len(rows[0]) == 19
    for ours, theirs in zip(*rows, strict=True):
        ours, theirs = strip_timings(ours), strip_timings(theirs)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if name == "stage":
                assert theirs[name] == value
            else:
                assert theirs[name] == pytest.approx(value, rel=1e-4, abs=1e-4), (ours["stage"], ours["step"], name)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in ("", "models/rl", "stages"):
        assert {path.name for path in (two / folder).iterdir()} == {path.name for path in (one / folder).iterdir()}
    assert (two / "labels.jsonl").read_text() == (one / "labels.jsonl").read_text()
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    assert results[0] == results[1]
    phases = [json.loads((run / "profile" / "phases.json").read_text())["rl"]["phases"] for run in (one, two)]
    assert [any("sync" in row["phase"] for row in rows) for rows in phases] == [False, True]


def test_a_rank_that_fails_ends_the_job_with_its_message(tmp_path):
    begin = time.monotonic()
    done = torchrun(2, ROOT / "tests" / "ranks.py", tmp_path, "broken")
    assert time.monotonic() - begin < 60
    assert done.returncode != 0
    assert "rank 1: error: this rank: is on fire; call the fire brigade" in done.stderr.splitlines()
    assert "exitcode  : 2 " in done.stderr
    assert "ranks.py\", line" not in done.stderr  # no traceback of the rank that was left


def test_a_bug_in_one_rank_ends_it_at_once(monkeypatch):
    ended = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(distributed, "fail", lambda message, code: ended.append(message) or code)
    monkeypatch.setattr("autotool_fast.train.parse_args", lambda argv: 1 // 0)
    assert main([]) == 1
    assert ended[0].splitlines()[-1].startswith("ZeroDivisionError")


def test_an_error_that_all_ranks_find_is_reported_once(tmp_path):
    done = torchrun(2, "-m", "autotool_fast.train", "--out", tmp_path, "--rl.stepz", "3")
    assert done.returncode != 0
    assert done.stderr.count("unknown option --rl.stepz; did you mean --rl.steps?") == 1


def test_sequences_are_dealt_evenly_and_once(monkeypatch):
    lengths = [5, 40, 7, 31, 12, 30, 9]
    assert distributed.deal(lengths) == [[0, 1, 2, 3, 4, 5, 6]]
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    shares = distributed.deal(lengths)
    assert sorted(i for share in shares for i in share) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) == 1
    assert max(sum(lengths[i] for i in share) for share in shares) <= sum(lengths) / 3 + max(lengths) / 2
