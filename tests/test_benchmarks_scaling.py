"""benchmarks.scaling: fits, options, the file of results and the figure, and a run from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from autotool_fast.errors import UserError
from benchmarks import measure, scaling, scaling_work
from benchmarks.episodes import Shape, make_model

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = Shape(hidden=32, layers=1, vocab=96, heads=2, kv_heads=1, max_len=64, tied=True)


@pytest.fixture
def small_ceilings(monkeypatch):
    """Canary and copy of a size that costs nothing."""
    monkeypatch.setitem(measure.CANARY_SIZE, "cpu", 32)
    monkeypatch.setattr(measure, "copy_gb_s", lambda device, size=None: 10.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    measure.keep_freed_memory(False)


def test_a_line_and_a_power_are_found():
    line = scaling.fit([1, 2, 4, 8], [3 + 2 * x for x in (1, 2, 4, 8)])
    assert (line["intercept"], line["slope"], line["r2"]) == pytest.approx((3, 2, 1))
    power = scaling.fit([1, 2, 4, 8], [5 * x**1.5 for x in (1, 2, 4, 8)])
    assert power["exponent"] == pytest.approx(1.5)
    assert power["exponent_error"] == pytest.approx(0, abs=1e-7)
    assert power["r2"] < 1


def test_fits_of_scattered_points_agree_with_numpy():
    make = np.random.default_rng(0)
    x = np.array([1.0, 2, 3, 5, 8])
    t = 4 + 3 * x + make.normal(0, 0.5, 5)
    found = scaling.fit(x.tolist(), t.tolist())
    slope, intercept = np.polyfit(x, t, 1)
    assert (found["slope"], found["intercept"]) == pytest.approx((slope, intercept))
    assert found["r2"] == pytest.approx(np.corrcoef(x, t)[0, 1] ** 2)
    # polyfit's covariance with its default scaling is that of n - 2 degrees of freedom.
    (exponent, _), covariance = np.polyfit(np.log(x), np.log(t), 1, cov=True)
    assert found["exponent"] == pytest.approx(exponent)
    assert found["exponent_error"] == pytest.approx(covariance[0, 0] ** 0.5)


def test_fits_need_three_points():
    with pytest.raises(AssertionError, match="three points"):
        scaling.fit([1, 2], [1, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "kernels"], "kernels"),
        (["--repetitions", "0"], "at least 1"),
        (["--plot-only", "--out", "absent.json"], "no results yet (absent.json)"),
        (["--plot-only", "--out", str(ROOT / "pyproject.toml")], "not a file of results"),
        (["--plot-only", "--out", str(ROOT / "benchmarks" / "results" / "rollout_cpu.json")], "not a file of results"),
    ],
)
def test_bad_options_are_one_line(options, message, capsys):
    assert scaling.main(options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message.split(" (")[0] in error


def test_help_needs_no_torch():
    code = "import sys; from benchmarks import scaling; scaling.parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def series(units=1000):
    calls = dict.fromkeys((1, 2, 4))
    return scaling_work.Series("head, tokens", "tokens", "token", "the op", calls, {x: x * units for x in calls})


class Kept:
    """Takes the place of a report."""

    def add(self, problem, facts, columns, rows, notes):
        self.table = {"title": problem, **facts, "rows": rows, "notes": notes}


def test_fits_use_processor_time_where_there_is_one_and_skip_failures():
    report, one = Kept(), series()
    times = {str(x): measure.Times(100.0, 90.0, 110.0, 3, 2.0 * x) for x in (1, 2, 4)}
    scaling.add(report, one, "a model", times)
    assert report.table["fit"]["slope"] == pytest.approx(2)
    assert [row["us_per"] for row in report.table["rows"]] == pytest.approx([2.0] * 3)
    scaling.add(report, one, "a model", {**times, "4": "out of memory"})
    assert report.table["fit"] is None
    assert report.table["rows"][2]["error"] == "out of memory"


def test_gradients_reach_the_trained_half_of_every_sequence():
    model = make_model(TINY, CPU)
    sequences = [np.arange(6), np.arange(10, 14)]
    seen = {}
    packed = scaling_work.packed_logp_entropy
    with pytest.MonkeyPatch.context() as patch:
        spy = lambda m, batch, trained: seen.setdefault("out", packed(m, batch, seen.setdefault("trained", trained)))  # noqa: E731
        patch.setattr(scaling_work, "packed_logp_entropy", spy)
        scaling_work.backward(model, sequences, CPU)
    assert seen["trained"].tolist() == [False] * 3 + [True] * 3 + [False] * 2 + [True] * 2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_decoding_is_timed_behind_the_prompt(monkeypatch):
    stats = []
    open_engine = scaling_work.open_slot_engine

    def engine(*args, **kwargs):
        made = open_engine(*args, **kwargs)
        stats.append(made)
        return made

    monkeypatch.setattr(scaling_work, "open_slot_engine", engine)
    (call,) = scaling_work._decode(TINY, CPU, 5, {3: (3, 20)}).values()
    state = call.prepare(0)
    assert (stats[0].stats.prefill_tokens, stats[0].stats.decode_tokens) == (20, 0)
    call.run(state)
    assert stats[0].stats.decode_tokens == 3 * 4  # the fifth token is sampled and not read


def test_tiny_run_writes_what_the_figure_is_drawn_from(tmp_path, small_ceilings, capsys):
    out, figure = tmp_path / "r.json", tmp_path / "f.svg"
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "plot", lambda results, path: drawn.append(results))
        options = ["--quick", "--hidden", "32", "--layers", "1", "--vocab", "96", "--repetitions", "1"]
        options += ["--only", "update", "head", "rollout", "--out", str(out), "--figure", str(figure)]
        assert scaling.main(options) == 0
    results = json.loads(out.read_text())
    assert drawn == [results] == [scaling.read_results(out)]
    assert results["provenance"]["versions"]["torch"]
    tables = results["tables"]
    assert [table["series"] for table in tables] == [
        f"{part}, {axis}"
        for part, axes in {
            "update": ("tokens", "sequences"),
            "head": ("vocabulary", "tokens"),
            "rollout": ("episodes", "context"),
        }.items()
        for axis in axes
    ]
    for table in tables:
        assert [row["t"] > 0 for row in table["rows"]] == [True] * 3
        assert table["fit"]["slope"] == pytest.approx(
            scaling.fit([row["x"] for row in table["rows"]], [row["t"] for row in table["rows"]])["slope"]
        )
    assert "R^2" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert scaling.main(["--plot-only", "--out", str(out), "--figure", str(figure)]) == 0
    first = figure.read_text()
    scaling.plot(results, figure)
    assert figure.read_text() == first  # the same results, the same file


@pytest.mark.slow
def test_ranks_take_the_same_step(tmp_path):
    options = ["--quick", "--hidden=32", "--layers=1", "--vocab=96", "--repetitions=2"]
    for ranks in (1, 2):
        times = scaling_work.measure_ranks(ranks, options, tmp_path / f"{ranks}.json")
        assert isinstance(times, list), times
        assert len(times) == 2
        assert min(times) > 0


def test_a_failing_rank_is_a_line_in_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling_work.sys, "executable", "/bin/false")
    assert isinstance(scaling_work.measure_ranks(1, [], tmp_path / "r.json"), str)


def test_too_many_ranks_are_said(monkeypatch):
    monkeypatch.setattr(scaling_work, "measure_ranks", lambda ranks, options, out: [8.0 / ranks] * 3)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    args = types.SimpleNamespace(vocab=1, hidden=1, layers=1, repetitions=1, quick=True)
    report = Kept()
    scaling._add_ranks(args, report, scaling_work.SMALL, "a model")
    assert [row["faster"] for row in report.table["rows"][1:]] == [2.0]
    assert report.table["notes"] == ["more ranks than the 1 cores share them"]


def test_another_scripts_results_are_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"benchmark": "rollout"}')
    with pytest.raises(UserError, match="not a file of results"):
        scaling.read_results(path)
