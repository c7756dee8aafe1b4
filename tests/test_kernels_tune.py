"""The tuning tool: measured times come from a parameter, everything else runs as on a GPU (kernels interpreted)."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from kernels_oracle import DEVICE, QUIET

pytest.importorskip("triton")
from autotool_kernels import configs, triton_linear, tune
from autotool_kernels.configs import KERNELS, Entry, Tile

pytestmark = pytest.mark.filterwarnings(QUIET)

ARCHITECTURE = "sm_90"
SHAPE = tune.Shape(hidden=40, vocab=300, dtype=torch.float32)
SMALL = Tile(rows=64, cols=128, depth=32, warps=4, stages=2, tma=True)
DEEP = dataclasses.replace(SMALL, stages=3)  # the bits of SMALL
WIDE = dataclasses.replace(SMALL, cols=256)  # other bits
ABOUT = {"device": "none", "date": "2000-01-01", "torch": "0", "triton": "0"}


def every_candidate(kernel):
    return [SMALL, DEEP, WIDE]


def nothing_wrong(kernel, variants):
    return [tune.Verdict("", [])] * len(variants)


class FakeTimer:
    """Milliseconds by tile; remembers what it was asked to time. Another group or loop is slower."""

    def __init__(self, milliseconds):
        self.milliseconds, self.seen = milliseconds, set()

    def __call__(self, runs, repetitions):
        self.seen |= set(runs)
        plain = {"group": SMALL.group, "flatten": SMALL.flatten}
        cost = {t: self.milliseconds[dataclasses.replace(t, **plain)] for t in runs}
        slower = {t: (abs(t.group - SMALL.group) + (t.flatten != SMALL.flatten)) / 1000 for t in runs}
        return {t: [cost[t] + slower[t] + i / 1e6 for i in range(repetitions)] for t in runs}


def tuned(timer, tokens=(70,), **options):
    options = {"made": every_candidate, "inspect": nothing_wrong, "about": ABOUT, **options}
    return tune.tune(SHAPE, tokens, ARCHITECTURE, timer=timer, device=DEVICE, **options)


@pytest.fixture(autouse=True)
def two_groups(monkeypatch):
    """The interpreter is slow, and each group is a candidate."""
    monkeypatch.setattr(tune, "GROUPS", (SMALL.group, 16))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "TUNED", tmp_path)
    configs._select.cache_clear()
    yield tmp_path
    configs._select.cache_clear()


def entry(kernel="forward", tokens=64, tile=SMALL, hidden=SHAPE.hidden):
    measured = {"ms": 1.0}
    return Entry(hidden, SHAPE.vocab, SHAPE.dtype_name, tokens, kernel, tile, "measured", measured)


def test_the_fastest_tile_is_written_and_selected(folder):
    timer = FakeTimer({SMALL: 3.0, DEEP: 1.0, WIDE: 2.0})
    entries = tuned(timer, tokens=(5, 70))
    assert {(e.kernel, e.tokens) for e in entries} == {(k, n) for k in KERNELS for n in (5, 70)}
    assert tune.write(entries, ARCHITECTURE, folder) == []
    for n in (1, 5, 70, 10**6):
        found = configs.select(ARCHITECTURE, *SHAPE[:2], n, SHAPE.dtype)
        assert {getattr(found, k) for k in KERNELS} == {DEEP}
    measured = entries[0].measured
    assert measured["ms"] == pytest.approx(1.0, abs=1e-4)
    assert measured["p20"] <= measured["ms"] <= measured["p80"]
    assert measured["default_ms"] == pytest.approx(3.0, abs=1e-4)
    assert measured["device"] == "none"


def test_runner_up_is_recorded():
    timer = FakeTimer({SMALL: 3.0, DEEP: 1.0, WIDE: 1.0005})
    measured = tuned(timer, kernels=["grad_hidden"])[0].measured
    assert measured["runner_up"]["config"] == dataclasses.asdict(WIDE)
    assert measured["repetitions"] == tune.SECOND_ROUND


def test_other_orders_of_tiles_are_tried_on_the_winner_only():
    timer = FakeTimer({SMALL: 1.0, DEEP: 2.0, WIDE: 3.0})
    tuned(timer, kernels=["grad_weight"])
    assert timer.seen - set(every_candidate("")) == set(tune.neighbours(SMALL))
    assert dataclasses.replace(SMALL, group=16) in timer.seen


def test_forward_shares_what_decides_bits_and_keeps_the_rest_free():
    """WIDE is best at 64 tokens by 10 %, but loses by half at 8192: all take the bits of SMALL and DEEP."""
    times = {
        64: {SMALL: [1.0], DEEP: [1.1], WIDE: [0.9]},
        8192: {SMALL: [11.0], DEEP: [10.0], WIDE: [15.0]},
    }
    assert tune.choose("forward", ARCHITECTURE, times) == {64: [SMALL, DEEP], 8192: [DEEP, SMALL]}
    free = tune.choose("dlogits", ARCHITECTURE, times)
    assert (free[64][0], free[8192][0]) == (WIDE, DEEP)


def test_bits_of_a_tile_that_is_missing_somewhere_are_no_choice():
    times = {64: {SMALL: [2.0], WIDE: [1.0]}, 8192: {SMALL: [2.0]}}
    assert tune.choose("forward", ARCHITECTURE, times)[64] == [SMALL]


@pytest.mark.parametrize(
    ("function", "kernel", "reason"),
    [("linear_forward", "forward", "max |dlogp|"), ("linear_backward", "dlogits", "relative error of dW")],
)
def test_a_wrong_candidate_is_not_timed(function, kernel, reason, monkeypatch):
    """One entry of a result is off: a sampled log-prob, or the last row of dW."""
    right, said = getattr(triton_linear, function), []

    def spoiled(*args, config, **kwargs):
        out = right(*args, config=config, **kwargs)
        damaged = out[0].logp if function == "linear_forward" else out[1]
        if getattr(config, kernel) == DEEP and damaged is not None:
            damaged[-1] += 0.01
        return out

    monkeypatch.setattr(triton_linear, function, spoiled)
    timer = FakeTimer({SMALL: 3.0, DEEP: 1.0, WIDE: 5.0})
    (found,) = tuned(timer, kernels=[kernel], say=said.append)
    assert DEEP not in timer.seen
    assert found.config == SMALL
    assert [line for line in said if tune.describe(DEEP) in line and reason in line]


def test_bad_machine_code_is_not_timed():
    def inspect(kernel, variants):
        return [tune.Verdict("", ["spills"] if c.grad_weight.cols == 256 else []) for c in variants]

    timer = FakeTimer({SMALL: 3.0, DEEP: 2.0, WIDE: 1.0})
    (found,) = tuned(timer, kernels=["grad_weight"], inspect=inspect)
    assert found.config == DEEP
    assert WIDE not in timer.seen


def test_settings_that_do_not_go_together_are_left_out():
    """grad_weight must step through whole tiles of dlogits rows."""
    steps = dataclasses.replace(SMALL, depth=256)
    timer = FakeTimer({SMALL: 3.0, steps: 1.0})
    (found,) = tuned(timer, kernels=["grad_weight"], made=lambda kernel: [SMALL, steps])
    assert found.config == SMALL


def test_nothing_left_is_an_error():
    def inspect(kernel, variants):
        return [tune.Verdict("", ["spills"])] * len(variants)

    with pytest.raises(RuntimeError, match="grad_hidden: no candidate"):
        tuned(FakeTimer({}), tokens=(5,), kernels=["grad_hidden"], inspect=inspect)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 70])
def test_sound_settings_pass_the_check(dtype, tokens):
    work = tune.Workload(SHAPE._replace(dtype=dtype), tokens, DEVICE)
    config = configs.LinearConfig(SMALL, WIDE, SMALL, DEEP)
    assert [work.error(kernel, config) for kernel in KERNELS] == [None] * 4


def test_writing_merges_and_replaces(folder):
    other = entry(hidden=48), entry("grad_weight")
    tune.write([*other, entry(tile=SMALL)], ARCHITECTURE, folder)
    assert tune.write([entry(tile=DEEP), entry(tokens=8192, tile=DEEP)], ARCHITECTURE, folder) == []
    found = configs.load(ARCHITECTURE)
    assert all(e in found for e in other)
    forward = [(e.tokens, e.config) for e in found if (e.kernel, e.hidden) == ("forward", SHAPE.hidden)]
    assert forward == [(64, DEEP), (8192, DEEP)]
    assert [p.name for p in folder.iterdir()] == [f"{ARCHITECTURE}.json"]


def test_an_entry_replaces_the_one_that_serves_the_same_tokens(folder):
    tune.write([entry(tokens=1000), entry(tokens=8192)], ARCHITECTURE, folder)
    tune.write([entry(tokens=1024)], ARCHITECTURE, folder)
    assert [e.tokens for e in configs.load(ARCHITECTURE)] == [1024, 8192]


def test_numbers_of_tokens_that_share_an_entry_are_refused_before_measuring(capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main(["--model", "qwen2.5-7b", "--tokens", "600", "1000", "8192"])
    assert stop.value.code == 2
    assert "--tokens: one number per power of two" in capsys.readouterr().err


def test_entries_with_other_bits_are_dropped_and_named(folder):
    tune.write([entry(tokens=8192, tile=WIDE), entry(tokens=8192, tile=WIDE, hidden=48)], ARCHITECTURE, folder)
    (dropped,) = tune.write([entry(tile=SMALL)], ARCHITECTURE, folder)
    assert "N=8192" in dropped
    assert f"H={SHAPE.hidden}" in dropped
    assert [(e.hidden, e.tokens) for e in configs.load(ARCHITECTURE)] == [(SHAPE.hidden, 64), (48, 8192)]


def test_a_file_that_cannot_be_read_is_left_as_it_is(folder):
    path = folder / f"{ARCHITECTURE}.json"
    path.write_text('{"architecture": "sm_80", "entries": []}')
    with pytest.raises(ValueError, match="architecture"):
        tune.write([entry()], ARCHITECTURE, folder)
    assert json.loads(path.read_text())["architecture"] == "sm_80"


def test_what_select_would_refuse_is_not_written(folder):
    with pytest.raises(ValueError, match="bits"):
        tune.write([entry(tile=SMALL), entry(tokens=8192, tile=WIDE)], ARCHITECTURE, folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_fit(architecture, dtype, kernel):
    shape = tune.Shape(3584, 152064, dtype)
    tiles = tune.candidates(kernel, architecture, shape, 8192)
    assert tiles[0] == getattr(configs.defaults(architecture, *shape[:2], 8192, dtype), kernel)
    assert len(set(tiles)) == len(tiles) > 10
    assert all(t.shared_bytes(dtype.itemsize) * t.programs <= configs.SHARED_BYTES[architecture] for t in tiles)


def test_refuses_under_the_interpreter(capsys, monkeypatch):
    monkeypatch.setattr(tune.triton.knobs.runtime, "interpret", True)
    assert tune.main(["--model", "qwen2.5-7b", "--dry-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def command(*arguments):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    line = [sys.executable, "-W", "ignore", "-m", "autotool_kernels.tune", *arguments]
    return subprocess.run(line, env=env, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_one_line_and_exit_2():
    done = command("--model", "qwen2.5-7b")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tune: no CUDA device to measure on; --dry-run lists the candidates without one\n"


@pytest.mark.slow
def test_dry_run_lists_machine_code():
    done = command("--model", "qwen2.5-0.5b", "--tokens", "8192", "--dry-run", "--kernel", "grad_weight",
                   "--architecture", "sm_80", "--limit", "2", "--workers", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("registers" in line and line.startswith("grad_weight") for line in lines)


@pytest.mark.gpu
def test_measures_on_the_gpu():
    shape = tune.Shape(256, 2048, torch.bfloat16)
    architecture = tune.current_architecture()
    entries = tune.tune(
        shape, [256], architecture, kernels=["forward"], inspect=nothing_wrong,
        made=lambda kernel: tune.candidates(kernel, architecture, shape, 256)[:3],
    )  # fmt: skip
    assert 0 < entries[0].measured["p20"] <= entries[0].measured["p80"]
