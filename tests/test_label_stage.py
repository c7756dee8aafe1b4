"""Stage label: what a stop or a failing teacher costs, and that it changes no label."""

from __future__ import annotations

import contextlib
import errno
import json
from pathlib import Path

import pytest
from small_runs import ctrl_c_at, write_preset
from teacher_server import Server

from autotool_fast import files, label_stage
from autotool_fast.metrics import Progress
from autotool_fast.tasks.world import World
from autotool_fast.teacher import PolicyTeacher
from autotool_fast.train import main

PROMPTS, K = 16, 3


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a preset, a base model that solves a part of the tasks, and a run without a teacher."""
    folder = tmp_path_factory.mktemp("label")
    preset = ["--preset", str(write_preset(folder))]
    assert main([*preset, "--out", str(folder / "own"), "--stages", "base,label"]) == 0
    return folder


def start(place: Path, out: str, *more: str) -> int:
    argv = ["--preset", str(place / "small.toml"), "--base.reuse", str(place / "own" / "models" / "base")]
    return main([*argv, "--out", str(place / out), "--stages", "base,label", *more])


def labels(place: Path, out: str) -> list[dict]:
    return [json.loads(line) for line in (place / out / "labels.jsonl").read_text().splitlines()]


def same(place: Path, out: str, reference: str) -> bool:
    """Whether two runs have the same labels; neither may have a partial file left."""
    assert not (place / out / "label.partial.jsonl").exists()
    return (place / out / "labels.jsonl").read_bytes() == (place / reference / "labels.jsonl").read_bytes()


@pytest.fixture
def rollouts(monkeypatch) -> list[str]:
    """The modes of the rollouts that stage label begins."""
    modes = []
    rollout = label_stage.rollout_over_ranks

    def watch(*args, **options):
        modes.append(options["mode"])
        return rollout(*args, **options)

    monkeypatch.setattr(label_stage, "rollout_over_ranks", watch)
    return modes


def test_ctrl_c_keeps_the_pass_that_is_done_and_changes_no_label(place, rollouts):
    assert {row["label"] for row in labels(place, "own")} >= {"short", "long"}
    with ctrl_c_at("label", PROMPTS * K + 2):
        assert start(place, "stopped") == 130
    assert rollouts == ["no_think", "think"]
    assert not (place / "stopped" / "labels.jsonl").exists()
    assert start(place, "stopped", "--resume") == 0
    assert rollouts == ["no_think", "think", "think"]
    assert same(place, "stopped", "own")


def test_a_stop_at_the_end_of_a_pass_comes_after_it_is_kept(place, rollouts):
    with ctrl_c_at("label", PROMPTS * K):
        assert start(place, "edge") == 130
    assert start(place, "edge", "--resume") == 0
    assert rollouts == ["no_think", "think"]
    assert same(place, "edge", "own")


def test_samples_are_not_lost_when_the_labels_cannot_be_written(place, rollouts, monkeypatch):
    write = files.write_text

    def refuse(path, text):
        if path.name == "labels.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", refuse)
        assert start(place, "refused_labels") == 2
    assert start(place, "refused_labels", "--resume") == 0
    assert rollouts == ["no_think", "think"]
    assert same(place, "refused_labels", "own")


def test_prompts_sampled_in_several_parts_have_the_same_draws(place, rollouts, monkeypatch):
    monkeypatch.setattr(label_stage, "PROMPTS_AT_ONCE", 5)
    assert start(place, "parts") == 0
    assert rollouts == ["no_think"] * 4 + ["think"] * 4
    assert same(place, "parts", "own")
    with ctrl_c_at("label", 12 * K):
        assert start(place, "cut") == 130
    assert start(place, "cut", "--resume") == 0
    assert rollouts[8:] == ["no_think"] * 3 + ["no_think"] * 2 + ["think"] * 4
    assert same(place, "cut", "own")


def serve(**options) -> Server:
    """A teacher of all training tasks of the small preset."""
    world = World(("set", "hop"), 4)
    return Server(list(world.draw(PROMPTS, "train", "0/label", 0.7)), **options)


def taught(server: Server) -> list[str]:
    return ["--label.teacher", server.url, "--label.teacher-model", "m"]


@pytest.fixture
def small_chunks(monkeypatch):
    """Lessons are kept by four, and a server that fails has failed."""
    begin = PolicyTeacher.__init__
    monkeypatch.setattr(PolicyTeacher, "__init__", lambda self, policy, k: begin(self, policy, k, chunk=4))
    monkeypatch.setattr("autotool_fast.eval.endpoint._RETRIED", set())


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr(Progress, "say", lambda self, text: lines.append(text))
    return lines


def test_a_refused_prompt_is_unsolved_and_everything_else_is_kept(place, small_chunks, said):
    with serve(fails=lambda task, number: 400 if number == 30 else None) as server:
        assert start(place, "refused", *taught(server)) == 0
    rows = labels(place, "refused")
    assert len(rows) == PROMPTS
    assert sum(row["think_correct"] for row in rows) == PROMPTS * K - 1
    (line,) = [line for line in said if "refused" in line]
    assert line.startswith(f"label: 1 of {PROMPTS * K} samples of the teacher count as wrong, refused by the server")


def test_lessons_are_kept_when_the_server_fails_and_the_run_goes_on_with_another(place, small_chunks, rollouts, capsys):
    with serve() as server:
        assert start(place, "whole", *taught(server)) == 0
        needed = len(server.asked)
    with serve(fails=lambda task, number: 500 if number >= needed // 2 else None) as server:
        assert start(place, "lost", *taught(server)) == 2
        assert f"label.teacher ({server.url}): answered 500" in capsys.readouterr().err
    kept = (place / "lost" / "label.partial.jsonl").read_text().splitlines()
    assert rollouts == ["no_think", "no_think"]
    with serve() as server:
        assert start(place, "lost", *taught(server), "--resume") == 0
        assert 0 < len(server.asked) < needed * 0.7
    assert len(kept) > 3
    assert rollouts == ["no_think", "no_think"]
    assert same(place, "lost", "whole")


def test_partial_results_of_other_prompts_are_refused(place, capsys):
    with ctrl_c_at("label", PROMPTS * K + 2), contextlib.suppress(SystemExit):
        start(place, "other")
    path = place / "other" / "label.partial.jsonl"
    path.write_text(path.read_text().replace('"prompts": "', '"prompts": "x'))
    assert start(place, "other", "--resume") == 2
    assert "made with something else (prompts)" in capsys.readouterr().err
