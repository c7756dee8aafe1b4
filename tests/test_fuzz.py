"""The fuzzer: a small budget of it finds nothing, a fault is found and saved, the same numbers make the same inputs."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace

import pytest

from benchmarks import fuzz

BUDGET = 6000


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "_folder", [str(tmp_path)])
    return tmp_path / "crashes"


def test_a_small_budget_crashes_nothing_and_reaches_both_sides_of_every_reader(out, capsys):
    assert fuzz.main(["--inputs", str(BUDGET), "--seed", "1", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(fuzz.TARGETS) + 1
    for line in lines:
        inputs, accepted, refused, crashed, _ = line[24:].replace(",", "").split()
        assert int(accepted) > 0, line
        assert int(refused) > 0, line
        assert int(crashed) == 0
    assert int(inputs) == pytest.approx(BUDGET, rel=0.01)
    assert not out.exists()


def test_the_shares_of_the_targets_are_all_inputs():
    assert sum(target.share for target in fuzz.TARGETS.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_an_input_is_a_function_of_seed_target_and_number(name):
    target = fuzz.TARGETS[name]
    one, two = (target.make(random.Random(f"0/{name}/3")) for _ in range(2))
    assert one == two
    assert json.loads(json.dumps(one)) == one
    assert target.make(random.Random(f"0/{name}/4")) != one or target.make(random.Random(f"0/{name}/5")) != one


def test_a_fault_is_counted_saved_and_can_be_replayed(out, monkeypatch, capsys):
    name = "reply, tagged"

    def faulty(text: str) -> bool:
        if "</think>" in text:
            raise IndexError("here")
        return True

    monkeypatch.setitem(fuzz.TARGETS, name, replace(fuzz.TARGETS[name], read=faulty))
    assert fuzz.main(["--inputs", "60", "--only", name, "--out", str(out)]) == 1
    shown = capsys.readouterr()
    assert "IndexError: here" in shown.err
    saved = sorted(out.iterdir())
    assert saved
    record = json.loads(saved[0].read_text())
    assert "</think>" in record["input"]
    assert fuzz.main(["--replay", str(saved[0])]) == 1
    monkeypatch.undo()
    assert fuzz.main(["--replay", str(saved[0])]) == 0


def test_what_never_ends_is_a_crash(out, monkeypatch):
    monkeypatch.setattr(fuzz, "DEADLINE", 0.05)
    target = fuzz.Target(1.0, lambda rng: "x", lambda text: time.sleep(5) or True)
    monkeypatch.setitem(fuzz.TARGETS, "slow", target)
    assert fuzz.fuzz("slow", 1, 0, out) == {"accepted": 0, "refused": 0, "crashed": 1}
