"""gpu_check: sections end as they should, what was found before a stop is kept, and nothing broken passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, report


def run_gpu_check(out: Path, *options: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(gpu_check.ROOT / "benchmarks" / "gpu_check.py"), "--out", str(out), *options]
    paths = {"PYTHONPATH": f"{gpu_check.ROOT}{os.pathsep}{gpu_check.ROOT / 'kernels'}"}
    return subprocess.run(command, capture_output=True, text=True, cwd=out.parent, env=os.environ | paths | env)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_runs_its_small_form_and_says_that_it_is_on_a_cpu(tmp_path):
    done = run_gpu_check(tmp_path / "out", "--only", "tests", "accuracy", "policy")
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["check.json", "policy_loss.json"]
    record = json.loads((tmp_path / "out" / "check.json").read_text())
    assert record["measured_on"].startswith("CPU")
    assert [(o["section"], o["state"]) for o in record["summary"]] == [
        ("tests", "not run"),
        ("accuracy", "passed"),
        ("policy", "passed"),
    ]
    assert len(record["accuracy"]) > 6
    table = done.stdout[done.stdout.rindex("gpu_check on a CPU") :]
    assert "accuracy     passed" in table
    assert "policy_loss on CPU" in table


def test_the_quick_budgets_fit_nine_minutes():
    assert sum(gpu_check.BUDGETS.values()) <= gpu_check.QUICK_SECONDS < 540
    assert set(gpu_check.BENCHMARKS) | set(gpu_check.SECTIONS) == set(gpu_check.BUDGETS)


def test_a_section_that_hangs_or_dies_is_a_line(tmp_path, monkeypatch):
    args = gpu_check.parser().parse_args(["--out", str(tmp_path)])
    code, _ = gpu_check._run([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert code is None
    code, text = gpu_check._run([sys.executable, "-c", "import os; print('here'); os.abort()"], 30)
    assert code == -6
    assert "here" in text
    monkeypatch.setattr(gpu_check, "_run", lambda command, seconds: (-11, "Segmentation fault"))
    outcome, details = gpu_check._section("accuracy", args, 10)
    assert (outcome.state, outcome.detail, details) == ("failed", "exit -11: Segmentation fault", None)
    monkeypatch.setattr(gpu_check, "_run", lambda command, seconds: (None, ""))
    outcome, _ = gpu_check._section("accuracy", args, 10)
    assert (outcome.state, outcome.detail) == ("failed", "stopped after 10 s; until then: nothing")


@pytest.mark.parametrize(
    ("so_far", "state"), [("passed", "stopped"), ("under way", "stopped"), ("failed", "failed")]
)
def test_a_section_out_of_time_failed_only_if_it_had_failed(so_far, state, tmp_path, monkeypatch):
    def run(command, seconds):
        found = {"state": so_far, "detail": "4 checks passed", "details": [1]}
        Path(command[command.index("--result") + 1]).write_text(json.dumps(found))
        return None, ""

    monkeypatch.setattr(gpu_check, "_run", run)
    args = gpu_check.parser().parse_args(["--out", str(tmp_path)])
    outcome, details = gpu_check._section("accuracy", args, 10)
    assert (outcome.state, details) == (state, [1])
    assert outcome.detail == "stopped after 10 s; until then: 4 checks passed"


def test_failing_lines_of_pytest_are_known():
    for line in ("..F. [ 5%]", "E", ".s..FF", "FAILED tests/test_x.py::test_y", "ERROR tests/test_x.py"):
        assert gpu_check.FAILING_LINE.match(line), line
    for line in ("....s..x [ 5%]", "bringing up nodes...", "tests/test_x.py: 3 workers", "12 passed in 3 s"):
        assert not gpu_check.FAILING_LINE.match(line), line


def fake_benchmark(monkeypatch, *runs):
    """`_run` that takes its (exit code, rows written or None) from `runs`; returns the commands it was given."""
    commands: list[list[str]] = []

    def run(command, seconds):
        code, rows = runs[len(commands)]
        commands.append(command)
        if rows is not None:
            out = Path(command[len(command) - 1 - command[::-1].index("--out") + 1])
            out.write_text(json.dumps({"tables": [{"title": "a table", "rows": rows}]}))
        return code, "an illegal memory access" if code else ""

    monkeypatch.setattr(gpu_check, "_run", run)
    return commands


OURS = {"provider": "autotool_triton", "mode": "both", "ms": 1.0}
MISSING = report.absent("autotool_cuda", "the extension is not built")


def test_a_benchmark_that_dies_is_repeated_with_ours_alone(tmp_path, monkeypatch):
    commands = fake_benchmark(monkeypatch, (-11, None), (0, [OURS, MISSING]))
    args = gpu_check.parser().parse_args(["--out", str(tmp_path)])
    outcome, path = gpu_check._benchmark("logits", args, True, 100)
    assert outcome.state == "passed"
    assert "an illegal memory access" in outcome.detail
    assert commands[1][-4:-2] == ["--providers", "ours"]
    assert path == tmp_path / "logits_logp_entropy_ours.json"
    assert gpu_check._headlines([path]) == ["a table", "  both : autotool_triton 1 ms"]


def test_what_a_benchmark_saved_before_it_was_stopped_is_kept(tmp_path, monkeypatch):
    args = gpu_check.parser().parse_args(["--out", str(tmp_path)])
    commands = fake_benchmark(monkeypatch, (None, [OURS]))
    outcome, path = gpu_check._benchmark("policy", args, True, 100)
    assert (outcome.state, len(commands)) == ("stopped", 1)
    assert "stopped after 70 s" in outcome.detail
    assert path.name == "policy_loss.json"
    assert commands[0][commands[0].index("--seconds") + 1] == "10.0"
    commands = fake_benchmark(monkeypatch, (None, [{"provider": "eager", "mode": "both", "ms": 1.0}]), (0, [OURS]))
    assert gpu_check._benchmark("policy", args, True, 100)[0].state == "passed"
    assert len(commands) == 2


def test_an_older_runs_file_is_no_result(tmp_path, monkeypatch):
    args = gpu_check.parser().parse_args(["--out", str(tmp_path)])
    for name in ("policy_loss.json", "policy_loss_ours.json"):
        (tmp_path / name).write_text(json.dumps({"tables": [{"title": "old", "rows": [OURS]}]}))
    fake_benchmark(monkeypatch, (None, None), (1, None))
    outcome, path = gpu_check._benchmark("policy", args, True, 100)
    assert outcome.state == "failed"
    assert not path.exists()
    assert gpu_check._headlines([path]) == []


@pytest.mark.parametrize("error", ["AttributeError: 'Tensor' has no attribute 'x'", "ValueError: it cannot serve"])
def test_a_broken_row_of_ours_is_a_failure_whatever_it_says(error, tmp_path, monkeypatch):
    args = gpu_check.parser().parse_args(["--out", str(tmp_path)])
    fake_benchmark(monkeypatch, (0, [OURS, {"provider": "autotool_cuda", "error": error}]))
    outcome, _ = gpu_check._benchmark("policy", args, True, 100)
    assert outcome.state == "failed"
    assert error in outcome.detail


def test_parts_of_the_full_set_go_to_files_of_their_own(tmp_path, monkeypatch):
    args = gpu_check.parser().parse_args(["--out", str(tmp_path), "--full", "--part", "2/8"])
    commands = fake_benchmark(monkeypatch, (0, [OURS]))
    assert gpu_check._benchmark("linear", args, True, 570)[1].name == "linear_logp_entropy_2of8.json"
    assert commands[0][commands[0].index("--part") + 1] == "2/8"


PLAYED = {"provider": "autotool", "tokens_s": 900.0}
NO_GRAPHS = {"provider": "autotool_no_graphs", "tokens_s": 300.0}


@pytest.mark.parametrize(
    ("tests", "rows", "state"),
    [
        (0, [PLAYED, NO_GRAPHS], "passed"),
        (1, [PLAYED, NO_GRAPHS], "failed"),
        (0, [PLAYED, {"provider": "autotool_no_graphs", "error": "out of memory"}], "failed"),
        (0, [], "failed"),
    ],
)
def test_rollouts_on_a_gpu_are_tested_and_timed(tests, rows, state, tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        if "pytest" in command:
            return subprocess.CompletedProcess(command, tests, "5 passed in 3 s", "")
        out = Path(command[command.index("--out") + 1])
        out.write_text(json.dumps({"tables": [{"title": "a table", "rows": rows}]}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    args = gpu_check.parser().parse_args(["--out", str(tmp_path), "--result", str(tmp_path / "result.json")])
    assert gpu_check.rollouts(args) == int(state == "failed")
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["state"] == state
    assert found["detail"].startswith("tests: 5 passed")
    if rows:
        assert "autotool 900 tokens/s" in found["detail"]
    assert all((gpu_check.ROOT / "tests" / name).exists() for name in gpu_check.ENGINE_TESTS)
    from benchmarks import rollout

    options = commands[1][commands[1].index("benchmarks.rollout") + 1 :]
    assert rollout.parser().parse_args(options).shape == "qwen2.5-0.5b"


def test_the_smoke_run_needs_no_parser_of_the_command_line_and_names_a_missing_package(tmp_path, monkeypatch):
    """A machine lent with a GPU has torch and transformers, but not every package of this project."""
    stub = "import sys; sys.modules['tyro'] = None\n"
    config = "load_preset('smoke'), out=sys.argv[1], device=sys.argv[2])\n"
    assert config.replace("'", '"') in gpu_check.SMOKE_RUN
    checked = gpu_check.SMOKE_RUN.partition("with RunFolder")[0] + "print(config.out, config.device, config.preset)"
    done = subprocess.run(
        [sys.executable, "-c", stub + checked, "there", "cpu"], capture_output=True, text=True, cwd=gpu_check.ROOT
    )
    assert done.stdout.split() == ["there", "cpu", "smoke"], done.stderr
    monkeypatch.setattr(gpu_check, "SMOKE_RUN", "import not_installed_here.part")
    args = gpu_check.parser().parse_args(["--out", str(tmp_path), "--result", str(tmp_path / "result.json")])
    assert gpu_check.training(args) == 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["state"] == "not run"
    assert found["detail"].endswith("-m pip install not_installed_here")
