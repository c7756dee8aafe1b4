"""A server that fails in the middle of a run: one line, the steps before are saved, and the run goes on from there."""

from __future__ import annotations

import pytest
import torch
from test_loop import Training, rows, same, weights
from test_rollout_vllm_runs import lamp_server, place, served  # noqa: F401
from vllm_stand_in import Fault, dropped, slow, status

from autotool_fast import checkpoint
from autotool_fast.errors import UserError
from autotool_fast.loop import StepResult
from autotool_fast.metrics import read_rows
from autotool_fast.train import main

torch.set_num_threads(1)
PROBLEM = UserError("does not answer", where="rollout.server", remedy="continue with --resume")


class Failing(Training):
    """Training whose rollout loses its server in the steps given, or whose update breaks in half."""

    def __init__(self, *, fails: int = -1, breaks: int = -1, **options) -> None:
        super().__init__(**options)
        self.fails, self.breaks = fails, breaks

    def step(self, index: int) -> StepResult:
        torch.rand(3)  # as a rollout may, before it fails
        if index == self.fails:
            raise PROBLEM
        result = super().step(index)
        if index == self.breaks:
            raise PROBLEM
        return result


@pytest.fixture
def straight(tmp_path) -> Failing:
    training = Failing()
    training.run(tmp_path / "straight")
    return training


def test_the_steps_before_a_failure_are_saved_and_continued_bit_by_bit(tmp_path, straight, capsys):
    with pytest.raises(UserError, match="does not answer"):
        Failing(fails=5).run(tmp_path / "run")
    assert "base: saved after step 5" in capsys.readouterr().err
    resumed = Failing(seed=99)
    resumed.run(tmp_path / "run", resume=True)
    assert resumed.state.extra["seen"] == list(range(8))
    assert same(weights(resumed.state.model), weights(straight.state.model))
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")


def test_a_step_that_fails_after_its_update_is_not_taken_for_the_one_before(tmp_path, straight):
    training = Failing(breaks=5)
    with pytest.raises(UserError, match="does not answer"):
        training.run(tmp_path / "run", every=2)
    assert training.checkpoints() == ["step-00000002", "step-00000004"]
    resumed = Failing(seed=99)
    resumed.run(tmp_path / "run", resume=True)
    assert same(weights(resumed.state.model), weights(straight.state.model))


@pytest.mark.parametrize("at", [3, 8])
def test_an_evaluation_that_fails_costs_its_figures_alone(tmp_path, straight, at):
    def after(done: int) -> dict[str, float]:
        if done == at:
            raise PROBLEM
        return {"eval/x": done}

    with pytest.raises(UserError, match="does not answer"):
        Failing().run(tmp_path / "run", after=after)
    resumed = Failing(seed=99)
    resumed.run(tmp_path / "run", resume=True, after=lambda done: {"eval/x": done})
    assert same(weights(resumed.state.model), weights(straight.state.model))
    found = {row["step"]: row.get("eval/x") for row in rows(tmp_path / "run")}
    assert found == {step: None if step == at else step for step in range(1, 9)}


def test_a_failure_that_cannot_be_saved_is_still_the_one_reported(tmp_path, monkeypatch):
    def full(*args, **options):
        raise UserError("cannot be written (No space left on device)")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(UserError, match="does not answer"):
        Failing(fails=5).run(tmp_path / "run")


FAULTS = {
    "dies": (status(422, "broken"), "answered /v1/completions with 422"),
    "drops": (dropped, "cannot be reached"),
    "hangs": (slow(30.0), "/v1/completions"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", FAULTS)
def test_a_run_whose_rollout_server_fails_keeps_its_last_step(place, lamp_server, capsys, how):  # noqa: F811
    fault, words = FAULTS[how]
    out = f"server-{how}"
    more = ["--rl.checkpoint-every", "0", "--rollout.timeout-s", "4"]
    with lamp_server.running() as url:

        def leave(handler, body) -> bool:
            if lamp_server.log.count("collective_rpc") == 2:  # weights are sent before either rollout
                lamp_server.faults["/v1/completions"] = [fault] * 999
                return fault(handler, body)
            lamp_server.faults["/v1/completions"].append(leave)
            return False

        faults: list[Fault] = [leave]
        lamp_server.faults["/v1/completions"] = faults
        assert main(served(place, out, url, *more)) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith(f"error: rollout.server ({url}): ")
        assert words in lines[-1]
        assert "rl: saved after step 1" in lines
        lamp_server.faults.clear()
    assert checkpoint.latest(place / out / "checkpoints" / "rl").step == 1
    with lamp_server.running() as another:  # started again, on another port
        assert main(served(place, out, another, *more, "--resume")) == 0
    steps = [row["step"] for row in read_rows(place / out / "metrics.jsonl") if row["stage"] == "rl"]
    assert steps == [1, 2]
