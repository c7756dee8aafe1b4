"""What is not finite, in every stage that trains: the step is skipped, its batch kept, three in a row are the end."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from test_faults_resume import SMALL

import autotool_fast.pipeline as pipeline_module
import autotool_fast.rl as rl_module
import autotool_fast.stages as stages_module
from autotool_fast import checkpoint
from autotool_fast.loop import StageState, StepResult, run_steps
from autotool_fast.metrics import read_rows
from autotool_fast.train import main

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

BAD = (1, 3, 4, 5)
"""Indices of the steps that are poisoned: one alone, then three in a row."""
MEASURED = ("rewards", "success")
"""What refinement measures in a rollout, which is done before the update."""


class Poison:
    """Has the steps `BAD` of a stage come out not finite, and keeps what each step changed."""

    def __init__(self, stage: str, patch: pytest.MonkeyPatch, gradient: bool) -> None:
        self.stage, self.gradient, self.on = stage, gradient, False
        self.moved: list[bool] = []
        self.drawn: list[bool] = []
        sft_backward, forward = pipeline_module.sft_backward, rl_module.packed_logp_entropy

        def poisoned_sft(model: torch.nn.Module, *args, **options) -> float:
            loss = sft_backward(model, *args, **options)
            if self.on and self.gradient:
                next(model.parameters()).grad.flatten()[0] = float("nan")
            return float("inf") if self.on and not self.gradient else loss

        def poisoned_rl(*args, **options) -> tuple[torch.Tensor, torch.Tensor]:
            logp, entropy = forward(*args, **options)
            poison = torch.zeros_like(logp)
            poison[0] = float("nan")
            if self.on and self.gradient:
                logp.register_hook(lambda gradient: gradient + poison)
            return (logp + poison if self.on and not self.gradient else logp), entropy

        patch.setattr(pipeline_module, "sft_backward", poisoned_sft)
        patch.setattr(rl_module, "packed_logp_entropy", poisoned_rl)
        for module in (pipeline_module, stages_module):
            patch.setattr(module, "run_steps", self.run_steps)

    def run_steps(self, context, stage, state, steps, step: Callable[[int], StepResult], **options) -> None:
        def watched(index: int) -> StepResult:
            before, generators = self.contents(state), checkpoint.capture_rng()
            self.on = index in BAD
            try:
                return step(index)
            finally:
                self.on = False
                self.moved.append(self.contents(state) != before)
                now = checkpoint.capture_rng()
                self.drawn.append(any(not torch.equal(now[name], generators[name]) for name in now))

        run_steps(context, stage, state, steps, watched if stage == self.stage else step, **options)

    @staticmethod
    def contents(state: StageState) -> object:
        """Weights, optimizer and what the stage keeps, the refinement's measurements apart."""
        tensors, rest = state.optimizers.pack()
        tensors = tensors | dict(state.model.named_parameters())
        values = {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}
        assert all(p.grad is None for p in state.model.parameters())
        return values, json.dumps([rest, {k: v for k, v in state.extra.items() if k not in MEASURED}])


@pytest.mark.parametrize(
    ("stages", "gradient", "more"),
    [
        ("base", False, []),
        ("base,label,warmup", True, []),
        ("base,label,distill", False, []),
        ("base,refine", True, ["--start", "cold"]),
        ("base,rl", False, ["--start", "cold", "--refine.no-enabled"]),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_three_in_a_row_end_the_run(
    trained, tmp_path, monkeypatch, capsys, stages, gradient, more
):
    stage = stages.rpartition(",")[2]
    path, run = tmp_path / "small.toml", tmp_path / "run"
    path.write_text(SMALL.format(preset="mini", reuse="" if stage == "base" else f'reuse = "{trained}"'))
    poison = Poison(stage, monkeypatch, gradient)
    assert main(["--preset", str(path), "--out", str(run), "--stages", stages, *more]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {stage}: 3 steps in a row were not finite; ")
    assert not [index for index in BAD if poison.moved[index]]
    assert [index for index in (0, 2) if poison.moved[index]]
    assert poison.drawn == [False] * 6
    kept = sorted(path.name for path in (run / "bad_batches").iterdir())
    assert kept == [f"{stage}-{index + 1}.json" for index in BAD]
    for name in kept:
        assert json.loads((run / "bad_batches" / name).read_text())
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["stage"] == stage]
    assert [row["step"] - 1 for row in rows if None in row.values()] == list(BAD)
