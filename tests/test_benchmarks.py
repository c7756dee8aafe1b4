"""The figures of the collapse benchmark, its commands, and the provenance of results."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from autotool_fast.config import parse_args
from autotool_fast.metrics import MetricsWriter
from autotool_fast.plan import check
from benchmarks import collapse, provenance
from benchmarks.default_run import claims


def test_smoothing_is_a_trailing_mean_over_the_known_values():
    assert collapse.smooth([1.0, 2.0, 6.0, 0.0], window=3).tolist() == [1.0, 1.5, 3.0, 8 / 3]
    assert collapse.smooth([1.0, None, 3.0], window=2).tolist() == [1.0, 1.0, 3.0]


def test_smoothing_without_any_value_is_nan_and_warns_of_nothing(recwarn):
    smoothed = collapse.smooth([None, None, 0.5], window=2)
    assert [math.isnan(x) for x in smoothed] == [True, True, False]
    assert not recwarn.list


@pytest.mark.parametrize(
    ("rate", "step"),
    [
        ([0.9, 0.2, 0.8, 0.8], 3),
        ([0.9, 0.2, 0.8, 0.3, 0.9], 5),  # for good: the first recovery did not last
        ([0.2, 0.7], 2),  # at the level counts
        ([0.9, 0.8], 0),
        ([0.9, 0.2], None),
        ([0.2] * 3, None),
    ],
)
def test_recovery_is_the_step_from_which_the_rate_stays_up(rate, step):
    assert collapse.recovery(np.array(rate), 0.7) == step


def write_run(folder, think: list[float | None]) -> None:
    folder.mkdir(parents=True)
    with MetricsWriter(folder / "metrics.jsonl") as metrics:
        metrics.write("base", 1, {"loss/sft": 1.0}, seconds=1.0)
        for step, rate in enumerate(think, 1):
            values = {"think_rate/easy": 0.0, "acc/hard": 0.5, "beta/long": 0.01 * step}
            if rate is not None:
                values["think_rate/hard"] = rate
            metrics.write("rl", step, values, seconds=2.0 * step)


def test_a_run_is_measured_from_its_rl_rows(tmp_path):
    write_run(tmp_path / "run", [None, 0.5] + [0.0] * 15 + [1.0] * 20)
    figures = collapse.measure(tmp_path / "run")
    assert figures["steps"] == 37
    assert figures["dip"] == 0.0
    assert figures["think_hard"] == 1.0
    assert figures["recovery_step"] == 28  # eleven ones among the last fifteen are the first above 0.7
    assert figures["beta_peak"] == figures["beta_final"] == pytest.approx(0.37)
    assert figures["seconds"] == 74.0
    assert figures["curve_think_hard"][0] is None
    json.dumps(figures, allow_nan=False)


def test_the_benchmark_gives_the_trainer_options_that_it_takes(tmp_path, monkeypatch, capsys):
    """Four runs of the RL stage from one base model, and the table of what they did."""
    commands = {}

    def train(out, *options):
        config = parse_args(["--out", str(out), *options])
        commands[out.name] = config
        if out.name == "base":
            (out / "models" / "base").mkdir(parents=True)
            (out / "models" / "base" / "config.json").write_text("{}")
        else:
            write_run(out, [0.5] * 20 if config.arm == "none" else [0.0] * 20 + [0.9] * 20)
        check(config)

    monkeypatch.setattr(collapse, "train", train)
    monkeypatch.setattr(collapse, "ROOT", tmp_path)
    monkeypatch.setattr(collapse, "plot", lambda results, path: None)
    monkeypatch.setattr(
        collapse, "write_results", lambda name, results: provenance.write_results(name, results, tmp_path)
    )
    monkeypatch.setattr(
        sys, "argv", ["collapse", "--out", str(tmp_path / "runs"), "--jobs", "1", "--", "--rl.steps", "20"]
    )
    collapse.main()
    assert set(commands) == {"base", "none-0", "none-1", "decoupled-0", "decoupled-1"}
    for name in set(commands) - {"base"}:
        config = commands[name]
        assert (config.arm, str(config.seed)) == tuple(name.split("-"))
        assert config.start == "cold"
        assert config.stages == ("base", "rl")
        assert not config.refine.enabled
        assert config.rl.steps == 20
        assert config.base.reuse == str(tmp_path / "runs" / "base" / "models" / "base")
    assert commands["base"].stages == ("base",)
    table = capsys.readouterr().out
    assert [line.split()[:3] for line in table.splitlines() if line.startswith(("none ", "decoupled "))] == [
        ["none", "0", "20"],
        ["decoupled", "0", "40"],
        ["none", "1", "20"],
        ["decoupled", "1", "40"],
    ]
    assert table.count("never") == 2
    results = json.loads((tmp_path / "collapse.json").read_text())
    assert set(results["runs"]) == {"none/0", "none/1", "decoupled/0", "decoupled/1"}
    assert results["provenance"]["versions"]["torch"] != "none"


def test_a_failed_run_ends_the_benchmark_and_names_its_log(tmp_path):
    with pytest.raises(SystemExit, match=r"ended with code 2; see .*run\.log"):
        collapse.train(tmp_path / "run", "--no-such-option", "1")
    assert "unknown option" in (tmp_path / "run.log").read_text()


def test_results_say_when_where_and_with_what_they_were_measured(tmp_path):
    path = provenance.write_results("x", {"value": 1}, tmp_path / "results")
    written = json.loads(path.read_text())
    assert written["value"] == 1
    assert {"date", "device", "versions"} == set(written["provenance"])
    assert written["provenance"]["device"]


def test_the_plot_draws_runs_with_gaps(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "run", [None, 0.5, 0.2])
    figures = collapse.measure(tmp_path / "run")
    path = tmp_path / "images" / "collapse.png"
    collapse.plot({"none/0": figures, "decoupled/0": figures}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_claims_of_a_default_run_are_read_from_its_results():
    def auto(tokens, hard, think_hard):
        bands = {"easy": {"accuracy": 1.0, "think_rate": 0.02}, "hard": {"accuracy": hard, "think_rate": think_hard}}
        return {"overall": {"tokens": tokens}, "bands": bands}

    def cells(accuracy):
        rows = [("hop", 1, 0.9), ("hop", 2, accuracy), ("hop", 3, accuracy + 0.2), ("reg", 2, 0.5)]
        return {"cells": [{"family": f, "difficulty": k, "accuracy": a} for f, k, a in rows]}

    found = claims(
        {
            "models": {
                "base": {"no_think": cells(0.1), "think": cells(0.8)},
                "distilled": {"auto": auto(40.0, 0.7, 1.0)},
                "rl": {"auto": auto(18.0, 0.75, 0.9)},
            }
        }
    )
    assert found["hop_no_think"] == pytest.approx(0.2)
    assert found["hop_think"] == pytest.approx(0.9)
    assert (found["think_hard"], found["think_easy"]) == (0.9, 0.02)
    assert (found["acc_hard"], found["acc_hard_always_think"]) == (0.75, 0.7)
    assert found["tokens_saved"] == pytest.approx(0.55)
