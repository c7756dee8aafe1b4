"""The study: which runs it makes, how it goes on after a stop, and the statistics and tables it prints."""

from __future__ import annotations

import json
import math
import statistics
import sys
import threading

import pytest

from autotool_fast.config import parse_args
from autotool_fast.controller import ARMS
from autotool_fast.metrics import MetricsWriter
from benchmarks import reproduce, study
from benchmarks.reproduce import STUDIES, Results, Unit, measure, units


def write_run(folder, think: list[float], *, accuracy: float = 0.6, tokens: float = 20.0) -> None:
    folder.mkdir(parents=True)
    with MetricsWriter(folder / "metrics.jsonl") as metrics:
        metrics.write("base", 1, {"loss/sft": 1.0}, seconds=1.0)
        for step, rate in enumerate(think, 1):
            values = {
                "think_rate/hard": rate,
                "think_rate/easy": 0.1,
                "acc/hard": rate / 2,
                "tokens/response": 9.0,
                "beta/long": 0.01 * step,
            }
            metrics.write("rl", step, values, seconds=2.0 * step)
    bands = {name: {"accuracy": accuracy, "think_rate": 0.5} for name in ("easy", "medium", "hard")}
    overall = {"accuracy": accuracy, "tokens": tokens, "acu": 100 * accuracy / tokens, "malformed": 0.0}
    model = {"auto": {"overall": overall, "bands": bands}}
    results = {"models": {"base": model, "rl": model}, "routing_regret": {"rl": 0.25}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.json").write_text("{}")


def test_every_unit_gives_the_trainer_options_that_it_takes(tmp_path):
    for unit in units(STUDIES, [1]):
        config = parse_args(["--out", "x", *unit.options(tmp_path, 7)])
        assert (config.arm, config.seed, config.rl.steps) == (unit.arm, unit.seed, 7)
        assert config.start == "cold"
        assert config.base.reuse == str(tmp_path)
        assert config.refine.enabled == ("refine" in config.stages) == (("refine.enabled", "true") in unit.changes)
        if unit == Unit("cold", "decoupled", 1, reproduce.PAPER):
            assert (config.rl.entropy_scope, config.rl.target_long, config.rl.beta_long) == ("reply", 0.2, 0.01)


def test_the_main_comparison_has_every_arm_from_every_start_on_five_seeds():
    main = units(["main"])
    wanted = {(s, arm, seed) for s in ("cold", "noisy", "clean") for arm in ARMS for seed in range(5)}
    assert {(u.start, u.arm, u.seed) for u in main} == wanted
    assert len(main) == 75
    assert [u.seed for u in main] == sorted(u.seed for u in main)  # whole seeds first


def test_no_two_units_share_a_name():
    every = units(STUDIES)
    assert len({u.key for u in every}) == len({u.folder for u in every}) == len(every)


def test_a_finished_unit_is_measured(tmp_path):
    write_run(tmp_path / "run", [0.9] * 20 + [0.0] * 40 + [1.0] * 40)
    figures = measure(tmp_path / "run")
    assert figures["steps"] == 100
    assert figures["lowest_think_hard"] == 0.0
    assert figures["recovery_step"] == 71
    assert figures["acc_hard_area"] == pytest.approx(0.29)
    assert figures["beta_peak"] == pytest.approx(1.0)
    assert figures["eval"]["regret"] == 0.25
    assert figures["eval"]["acc_hard"] == 0.6
    assert len(figures["curves"]["think_hard"]) == 25
    json.dumps(figures, allow_nan=False)


def test_alarms_that_a_run_would_raise_are_measured():
    steady = [{"step": step, "entropy/all": 0.3, "acc/all": 0.5} for step in range(1, 61)]
    faded = [{"step": step, "entropy/all": 1e-6, "acc/all": 0.5} for step in range(61, 121)]
    assert reproduce.alarmed(steady) == []
    assert reproduce.alarmed(steady + faded) == ["entropy_collapse"]


def fake_trainer(monkeypatch, fail: str = "", interrupt: str = ""):
    """Runs of the trainer replaced by folders as it would leave them; returns the commands."""
    commands, one_at_a_time = [], threading.Lock()

    def launch(command, log):
        options = command[3:]
        with one_at_a_time:
            commands.append(options)
            config = parse_args(options)
        folder = reproduce.Path(config.out)
        if fail and fail in folder.name:
            return 2
        if interrupt and interrupt in folder.name:
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            return 130
        if "rl" in config.stages:
            for path in (folder / "config.json",):
                path.unlink(missing_ok=True)
            if folder.exists():
                folder.rmdir()
            write_run(folder, [0.2 + 0.1 * config.seed] * 20, accuracy=0.5 + 0.1 * (config.arm == "decoupled"))
        else:
            for name in ("base", "warmup"):
                (folder / "models" / name).mkdir(parents=True)
                (folder / "models" / name / "config.json").write_text("{}")
        return 0

    monkeypatch.setattr(reproduce, "launch", launch)
    return commands


def call(monkeypatch, tmp_path, *options: str) -> int:
    places = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "r.json"), "--docs", str(tmp_path / "docs")]
    monkeypatch.setattr(sys, "argv", ["reproduce", *places, "--jobs", "2", *options])
    return reproduce.main()


def test_units_of_a_start_share_its_model(monkeypatch, tmp_path):
    commands = fake_trainer(monkeypatch)
    assert call(monkeypatch, tmp_path, "--only", "main", "--seeds", "0", "1") == 0
    stages = [parse_args(c).stages for c in commands]
    assert stages.count(("base",)) == 2
    assert stages.count(("base", "label", "warmup")) == 4
    assert stages.count(("base", "rl", "eval")) == 30
    for config in map(parse_args, commands):
        if "rl" in config.stages:
            start = reproduce.Path(config.out).name.partition("-")[0]
            source = "base-{0}/models/base" if start == "cold" else start + "-{0}/models/warmup"
            assert config.base.reuse.endswith(source.format(config.seed))
        if "warmup" in config.stages:
            assert config.out.endswith(f"{config.start}-{config.seed}")


def test_finished_units_are_not_made_again(monkeypatch, tmp_path):
    commands = fake_trainer(monkeypatch)
    assert call(monkeypatch, tmp_path, "--only", "main", "--seeds", "0") == 0
    commands.clear()
    assert call(monkeypatch, tmp_path, "--only", "main", "--seeds", "0") == 0
    assert not commands
    assert call(monkeypatch, tmp_path, "--only", "main", "refinement", "--seeds", "0") == 0
    assert [parse_args(c).refine.enabled for c in commands] == [True] * 3  # and their start models are there


def test_results_of_other_settings_are_not_mixed(monkeypatch, tmp_path):
    fake_trainer(monkeypatch)
    call(monkeypatch, tmp_path, "--only", "main", "--seeds", "0")
    with pytest.raises(SystemExit, match="other settings"):
        call(monkeypatch, tmp_path, "--only", "main", "--seeds", "0", "--steps", "9")


def test_a_failed_unit_leaves_the_others_and_the_exit_code_says_so(monkeypatch, tmp_path, capsys):
    fake_trainer(monkeypatch, fail="cold-fixed")
    assert call(monkeypatch, tmp_path, "--only", "main", "--seeds", "0") == 1
    assert "cold/fixed seed=0: cold-fixed+seed=0 ended with code 2; see" in capsys.readouterr().err
    kept = Results(tmp_path / "r.json", {"steps": reproduce.STEPS, "options": []}).units
    assert len(kept) == 14


def test_an_interrupted_study_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    fake_trainer(monkeypatch, interrupt="cold-adaptive")
    assert call(monkeypatch, tmp_path, "--only", "main", "--seeds", "0", "--jobs", "1") == 130
    assert "the same command goes on" in capsys.readouterr().err
    done = set(json.loads((tmp_path / "r.json").read_text())["units"])
    assert done == {"cold/none seed=0", "cold/fixed seed=0"}
    commands = fake_trainer(monkeypatch)
    assert call(monkeypatch, tmp_path, "--only", "main", "--seeds", "0", "--jobs", "1") == 0
    assert "--resume" in commands[0]
    assert commands[0][commands[0].index("--out") + 1].endswith("cold-adaptive+seed=0")
    assert all("--resume" not in c for c in commands[1:])
    assert len(json.loads((tmp_path / "r.json").read_text())["units"]) == 15


@pytest.mark.slow
def test_units_are_really_trained_and_measured(tmp_path):
    """The trainer itself, cut down: a unit from a cold and one from a warmed-up start."""
    small = ["--preset", "smoke", "--eval.per-cell", "1"]
    todo = [Unit("cold", "decoupled", 0), Unit("clean", "none", 0)]
    results = Results(tmp_path / "r.json", {})
    trainer = reproduce.Trainer(tmp_path, small)
    assert reproduce.run_units(todo, trainer, results, 2, {"cold": 4, "clean": 3}) == []
    found = {unit.start: results.units[unit.key] for unit in todo}
    assert (found["cold"]["steps"], found["clean"]["steps"]) == (4, 3)
    for figures in found.values():
        assert 0 <= figures["eval"]["accuracy"] <= 1
        assert figures["eval"]["tokens"] > 0
    warmed = (tmp_path / "clean-0" / "models" / "warmup" / "model.safetensors").read_bytes()
    begun = (tmp_path / todo[1].folder / "models" / "base" / "model.safetensors").read_bytes()
    assert begun == warmed != (tmp_path / "base-0" / "models" / "base" / "model.safetensors").read_bytes()


def test_the_document_has_every_arm_and_its_differences(monkeypatch, tmp_path, capsys):
    fake_trainer(monkeypatch)
    call(monkeypatch, tmp_path, "--only", "main", "refinement", "--seeds", "0", "1", "2")
    text = (tmp_path / "docs" / "study.md").read_text()
    assert text in capsys.readouterr().out
    for start in study.STARTS:
        assert f"## From a {start} start" in text
    rows = [line for line in text.splitlines() if line.startswith("| decoupled - none |")]
    assert len(rows) == 3
    assert rows[0].split("|")[2:4] == [" 3 ", " +10.0 ± 0.0 "]
    assert "| with refinement - without | 3 | +0.0 ± 0.0 |" in text
    assert "| cold/none | 3 | 3 |" in text.partition("## Alarms")[2]
    assert (tmp_path / "docs" / "images" / "study_courses.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "docs" / "images" / "study_frontier.png").read_bytes().startswith(b"\x89PNG")


def test_an_interval_is_students():
    values = [0.2, 0.5, 0.4, 0.9, 0.3]
    found = study.estimate(values)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.half == pytest.approx(2.7764 * statistics.stdev(values) / math.sqrt(5), rel=1e-3)
    assert study.estimate([0.5]).text() == "0.50"
    assert study.estimate([]).text() == "-"
    assert study.estimate([0.5, math.nan]).n == 1
    assert study.estimate([0.123, 0.125]).text(1, 100) == "12.4"
    assert study.estimate([0.123, 0.124, 0.125]).text(1, 100) == "12.4 ± 0.2"


def test_arms_are_compared_within_seeds():
    def unit(seed, value):
        return {"seed": seed, "eval": {"acc_hard": value}}

    ours, others = [unit(s, 0.1 * s + 0.05) for s in range(4)], [unit(s, 0.1 * s) for s in range(1, 6)]
    found = study.difference(ours, others, "eval.acc_hard")
    assert found.n == 3
    assert found.mean == pytest.approx(0.05)
    assert found.half == pytest.approx(0.0, abs=1e-12)


def test_recovery_is_counted_over_seeds():
    members = [{"recovery_step": step} for step in (200, None, 100, 220)]
    assert study.recovered(members) == "3/4, 200"
    assert study.recovered([{"recovery_step": None}]) == "0/1"


def test_the_summary_is_renewed_between_its_marks_alone(monkeypatch, tmp_path):
    fake_trainer(monkeypatch)
    readme = tmp_path / "README.md"
    begin, end = study.MARKS
    readme.write_text(f"before\n\n{begin}\nformer\n{end}\n\nafter\n")
    call(monkeypatch, tmp_path, "--only", "main", "--seeds", "0", "1")
    text = readme.read_text()
    assert text.startswith(f"before\n\n{begin}\n")
    assert text.endswith(f"{end}\n\nafter\n")
    assert "former" not in text
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| `")}
    assert set(rows) == {f"| `{arm}`" for arm in ARMS}
    others = 2 * "| 0.50 / 0.50 | 60 "
    assert rows["| `decoupled`"] == f"| `decoupled` | 0/2 | 0.50 / 0.50 | 60, 60 {others}|"
    readme.write_text("no marks\n")
    call(monkeypatch, tmp_path, "--report-only")
    assert readme.read_text() == "no marks\n"


def test_the_published_tables_are_those_of_the_results():
    root = reproduce.RESULTS.parent.parent
    saved = json.loads((reproduce.RESULTS / "reproduce.json").read_text(encoding="utf-8"))
    results = list(saved["units"].values())
    assert (root / "docs" / "study.md").read_text(encoding="utf-8") == study.document(results)
    begin, end = study.MARKS
    block = (root / "README.md").read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    assert block.strip() == study.summary([r for r in results if not r["changes"]])
    main = [r for r in results if not r["changes"]]
    assert {(r["start"], r["arm"], r["seed"]) for r in main} == {(u.start, u.arm, u.seed) for u in units(["main"])}
