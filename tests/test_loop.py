"""The loop under the stages: steps and skipped steps, checkpoints, Ctrl-C, resuming; optimizers and the rate."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from autotool_fast import loop
from autotool_fast.config import from_dict
from autotool_fast.errors import UserError
from autotool_fast.loop import (
    Context,
    Interrupted,
    Optimizers,
    StageState,
    StepResult,
    StopFlag,
    run_steps,
    trapezoid,
)
from autotool_fast.metrics import MetricsWriter, Progress, read_rows, strip_timings
from autotool_fast.plan import check
from autotool_fast.runs import RunFolder
from autotool_fast.tasks.tiny import build_tokenizer
from autotool_fast.train import main

torch.set_num_threads(1)
TOKENIZER = build_tokenizer()


def tiny_model(seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    settings = Qwen3Config(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(settings)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Training:
    """A stage with random data from the global generator, which a resumed run must find where it was."""

    settings: ClassVar[dict] = {}

    def __init__(self, *, bad_steps: tuple[int, ...] = (), stop_at: int | None = None, seed: int = 0):
        self.state = StageState(tiny_model(), TOKENIZER, None)
        self.state.optimizers = Optimizers(self.state.model, lr=1e-2, weight_decay=0.01, matrix="muon")
        self.state.extra["seen"] = []
        self.bad_steps, self.stop_at = bad_steps, stop_at
        self.context: Context | None = None
        torch.manual_seed(seed)

    def step(self, index: int) -> StepResult:
        if index == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        ids = torch.randint(0, 16, (2, 6))
        loss = self.state.model(ids, labels=ids).loss
        loss.backward()
        value = float("nan") if index in self.bad_steps else float(loss.detach())
        norm, finite = self.state.optimizers.step(1.0, trapezoid(index, 8, 2), measured=(value,))
        if finite:
            self.state.extra["seen"].append(index)
        return StepResult({"loss": value, "norm": norm}, finite, None if finite else ids.tolist())

    def run(
        self, folder: Path, steps: int = 8, *, resume: bool = False, every: int = 0, stage: str = "base", **options
    ) -> None:
        config = from_dict({"out": str(folder), "resume": resume, **self.settings})
        with RunFolder.create(config) as run, Progress() as progress:
            metrics = MetricsWriter.open(run.metrics, lambda row: True)
            self.context = Context(config, run, metrics, progress, StopFlag())
            try:
                with self.context.stop.installed(progress.say):
                    run_steps(
                        self.context,
                        stage,
                        self.state,
                        steps,
                        self.step,
                        shown=("loss",),
                        checkpoint_every=every,
                        **options,
                    )
            finally:
                self.context.metrics.close()

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.context.run.checkpoints("base").iterdir())


def rows(folder: Path) -> list[dict]:
    return [strip_timings(row) for row in read_rows(folder / "metrics.jsonl")]


@pytest.fixture
def reference(tmp_path) -> Training:
    """Eight steps without a stop."""
    training = Training()
    training.run(tmp_path / "reference")
    return training


@pytest.mark.parametrize("stop_at", [0, 3, 6])
def test_a_stopped_and_resumed_stage_equals_one_that_was_not_stopped(tmp_path, reference, stop_at, capsys):
    with pytest.raises(Interrupted):
        Training(stop_at=stop_at).run(tmp_path / "run")
    assert "press Ctrl-C again" in capsys.readouterr().err
    resumed = Training(seed=99)  # the generator's state comes from the checkpoint
    resumed.run(tmp_path / "run", resume=True)
    assert resumed.state.extra["seen"] == list(range(8))
    assert same(weights(resumed.state.model), weights(reference.state.model))
    assert rows(tmp_path / "run") == rows(tmp_path / "reference")


def test_the_time_a_stage_took_before_a_stop_counts(tmp_path):
    with pytest.raises(Interrupted):
        Training(stop_at=1).run(tmp_path / "run", after=lambda done: time.sleep(0.2) or {})
    Training().run(tmp_path / "run", resume=True)
    seconds = [row["seconds"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert len(seconds) == 8
    assert seconds == sorted(seconds)
    assert seconds[2] > 0.4  # two steps took that long before the stop


def test_a_stop_during_the_last_step_leaves_the_finished_stage_to_its_caller(tmp_path, reference):
    training = Training(stop_at=7)
    training.run(tmp_path / "run")
    assert training.context.stop.requested
    assert same(weights(training.state.model), weights(reference.state.model))


def test_a_killed_stage_repeats_the_steps_after_its_last_checkpoint(tmp_path, reference):
    def die(done: int) -> dict[str, float]:
        if done == 6:
            raise KeyboardInterrupt
        return {}

    killed = Training()
    with pytest.raises(KeyboardInterrupt):
        killed.run(tmp_path / "run", every=2, after=die)
    assert killed.checkpoints() == ["step-00000002", "step-00000004"]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5]
    resumed = Training(seed=99)
    resumed.run(tmp_path / "run", resume=True, every=2)
    assert same(weights(resumed.state.model), weights(reference.state.model))
    assert rows(tmp_path / "run") == rows(tmp_path / "reference")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, reference, capsys):
    with pytest.raises(Interrupted):
        Training(stop_at=4).run(tmp_path / "run", every=2)
    damaged = tmp_path / "run" / "checkpoints" / "base" / "step-00000005" / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    resumed = Training(seed=99)
    resumed.run(tmp_path / "run", resume=True)
    assert "passed over" in capsys.readouterr().err
    assert same(weights(resumed.state.model), weights(reference.state.model))
    assert rows(tmp_path / "run") == rows(tmp_path / "reference")


def test_a_stage_that_starts_anew_drops_its_own_rows_only(tmp_path):
    (tmp_path / "run").mkdir()
    Training().run(tmp_path / "run", steps=2)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "rl", "step": 1, "seconds": 0.0}) + "\n")
    Training().run(tmp_path / "run", steps=1, resume=True)
    assert [(row["stage"], row["step"]) for row in rows(tmp_path / "run")] == [("rl", 1), ("base", 1)]


def test_what_runs_after_a_step_joins_its_row(tmp_path):
    Training().run(tmp_path / "run", steps=3, after=lambda done: {"eval/x": done} if done == 2 else {})
    assert [row.get("eval/x") for row in rows(tmp_path / "run")] == [None, 2, None]


def test_a_skipped_step_changes_nothing_and_keeps_its_batch(tmp_path, capsys):
    training = Training(bad_steps=(0,))
    before = weights(training.state.model)
    training.run(tmp_path / "run", steps=1)
    assert same(weights(training.state.model), before)
    assert all(not optimizer.state for optimizer in training.state.optimizers.members)
    assert all(p.grad is None for p in training.state.model.parameters())
    kept = json.loads((tmp_path / "run" / "bad_batches" / "base-1.json").read_text())
    assert len(kept) == 2
    assert "step skipped" in capsys.readouterr().err
    assert rows(tmp_path / "run")[0]["loss"] is None


def test_three_skipped_steps_in_a_row_end_the_run(tmp_path):
    with pytest.raises(UserError, match="3 steps in a row were not finite"):
        Training(bad_steps=(2, 3, 4)).run(tmp_path / "run")
    assert len(list((tmp_path / "run" / "bad_batches").iterdir())) == 3
    assert len(rows(tmp_path / "run")) == 5


def test_skipped_steps_do_not_push_good_checkpoints_out(tmp_path):
    failing = Training(bad_steps=(4, 5, 6))
    with pytest.raises(UserError, match="3 steps in a row"):
        failing.run(tmp_path / "run", every=1)
    assert failing.checkpoints()[-1] == "step-00000004"
    delayed = Training(bad_steps=(3,))
    delayed.run(tmp_path / "other", every=4, steps=7)
    assert delayed.checkpoints() == ["step-00000005"]  # the fourth step was skipped


def test_skipped_steps_with_a_good_one_between_do_not_end_the_run(tmp_path):
    training = Training(bad_steps=(1, 2, 4, 5))
    training.run(tmp_path / "run")
    assert training.state.extra["seen"] == [0, 3, 6, 7]


def test_the_steps_after_a_skipped_one_see_the_data_they_would_have_seen(tmp_path, reference):
    drawn = torch.get_rng_state()
    Training(bad_steps=(2, 5)).run(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [row["step"] for row in rows(tmp_path / "run") if row["loss"] is None] == [3, 6]


def test_skipped_steps_are_counted_across_a_stop(tmp_path):
    with pytest.raises(Interrupted):
        Training(bad_steps=(1, 2, 3), stop_at=2).run(tmp_path / "run")
    with pytest.raises(UserError, match="3 steps in a row"):
        Training(bad_steps=(1, 2, 3)).run(tmp_path / "run", resume=True)
    assert len(rows(tmp_path / "run")) == 4


def test_a_second_ctrl_c_interrupts_at_once_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGINT)
    said = []
    stop = StopFlag()
    with stop.installed(said.append):
        stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert len(said) == 1
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_asks_for_a_stop_like_ctrl_c_and_has_its_own_exit_code(first, second):
    before = signal.getsignal(signal.SIGTERM)
    stop = StopFlag()
    with stop.installed(lambda text: None):
        os.kill(os.getpid(), first)
        with pytest.raises(Interrupted):
            stop.check()
        assert stop.exit_code == {signal.SIGINT: 130, signal.SIGTERM: 143}[first]
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), second)
        assert caught.value.args == (second,)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_terminal_that_goes_away_asks_for_a_stop_however_often_it_says_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        stop = StopFlag()
        with stop.installed(lambda text: None):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Interrupted):
                stop.check()
            assert stop.exit_code == 129
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_terminal_that_goes_away_is_no_news():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopFlag()
        with stop.installed(lambda text: None):
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_that_is_told_twice_to_end_still_saves(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # a scheduler tells the ranks, and so does torchrun
    stop = StopFlag()
    with stop.installed(lambda text: None):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_another_version_of_a_package_is_said_on_resuming(tmp_path, reference, capsys, monkeypatch):
    with pytest.raises(Interrupted):
        Training(stop_at=3).run(tmp_path / "run")
    now = loop.versions()
    monkeypatch.setattr(loop, "versions", lambda: now | {"torch": "9.9"})
    resumed = Training(seed=99)
    resumed.run(tmp_path / "run", resume=True)
    assert f"saved with other versions (torch {now['torch']} -> 9.9)" in capsys.readouterr().err
    assert same(weights(resumed.state.model), weights(reference.state.model))


def test_a_ctrl_c_inside_a_write_to_the_same_stream_is_not_lost():
    def refuse(text: str) -> None:
        raise RuntimeError("reentrant call")

    stop = StopFlag()
    with stop.installed(refuse):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested


@pytest.mark.parametrize("matrix", ["adamw", "muon"])
def test_every_parameter_has_exactly_one_optimizer(matrix):
    model = tiny_model()
    optimizers = Optimizers(model, lr=1e-3, weight_decay=0.0, matrix=matrix)
    held = [id(p) for o in optimizers.members for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert len(optimizers.members) == (2 if matrix == "muon" else 1)
    in_first = {id(p) for group in optimizers.members[0].param_groups for p in group["params"]}
    if matrix == "muon":  # embeddings and norms are not matrices of the decoder
        assert {name for name, p in model.named_parameters() if id(p) in in_first} == {
            name for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name
        }


@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_optimizers_do_not_move_on_a_number_that_is_not_finite(bad):
    model = tiny_model()
    optimizers = Optimizers(model, lr=1e-2, weight_decay=0.5)
    ids = torch.arange(6)[None]
    model(ids, labels=ids).loss.backward()
    optimizers.step(1.0)
    before, state = weights(model), optimizers.pack()[0]
    state = {name: tensor.clone() for name, tensor in state.items()}
    model(ids, labels=ids).loss.backward()
    if bad == "gradient":
        next(model.parameters()).grad[0, 0] = float("inf")
    _, finite = optimizers.step(1.0, measured=(float("nan") if bad == "loss" else 1.0,))
    assert not finite
    assert same(weights(model), before)
    assert same(optimizers.pack()[0], state)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_reported():
    model = tiny_model()
    optimizers = Optimizers(model, lr=1e-2, weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    count = sum(p.numel() for p in model.parameters())
    seen = []
    hook = optimizers.members[0].register_step_pre_hook(
        lambda *_: seen.append(sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5)
    )
    norm, finite = optimizers.step(0.5)
    hook.remove()
    assert finite
    assert norm == pytest.approx(3.0 * count**0.5, rel=1e-5)  # float32 sums
    assert seen[0] == pytest.approx(0.5, rel=1e-4)  # torch adds 1e-6 to the norm it divides by


def test_the_rate_rises_linearly_stays_and_falls_linearly_to_its_floor():
    rates = [trapezoid(step, 100, 9) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9:71] == [1.0] * 62
    assert all(a > b for a, b in itertools.pairwise(rates[70:]))
    assert rates[85] == pytest.approx(0.5)
    assert trapezoid(100, 100, 9) == pytest.approx(0.02)
    assert all(0 < trapezoid(step, 3, 5) <= 1 for step in range(3))  # more warm-up than steps


def bfloat16_pair(matrix: str = "adamw") -> tuple[Qwen3ForCausalLM, Qwen3ForCausalLM, Optimizers, Optimizers]:
    """The same numbers in bfloat16 and in float32, each with optimizers whose steps are too small for bfloat16."""
    low = tiny_model().to(torch.bfloat16)
    full = tiny_model().float()
    full.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    return low, full, *(Optimizers(m, lr=1e-4, weight_decay=0.0, matrix=matrix) for m in (low, full))


def give_gradients(low, full, seed: int) -> None:
    """The same bfloat16-exact gradients to both, through a real backward, in two micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        for p, q in zip(low.parameters(), full.parameters(), strict=True):
            slope = (1 + torch.randn(p.shape, generator=generator) / 4).to(torch.bfloat16)
            (p * slope).sum().backward()
            (q * slope.float()).sum().backward()


@pytest.mark.parametrize("matrix", ["adamw", "muon"])
def test_updates_too_small_for_bfloat16_add_up(matrix):
    low, full, low_optimizers, full_optimizers = bfloat16_pair(matrix)
    start = weights(low)
    for step in range(40):
        give_gradients(low, full, step)
        norms = [o.step(1.0)[0] for o in (low_optimizers, full_optimizers)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert all(p.grad is None for p in low.parameters())
    for (name, p), q in zip(low.named_parameters(), full.parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        # The float32 copy follows the float32 model; the parameter is that, rounded.
        assert (p.float() - q).abs().max() <= 2.0**-8 * q.abs().max() + 1e-6, name
    assert not torch.equal(low.model.norm.weight, start["model.norm.weight"])  # ones: one step is below their spacing


def test_the_float32_copies_survive_a_checkpoint():
    low, full, optimizers, _ = bfloat16_pair()
    again, _, restored, _ = bfloat16_pair()
    for step in range(3):
        give_gradients(low, full, step)
        optimizers.step(1.0)
    tensors, rest = optimizers.pack()
    again.load_state_dict(low.state_dict())
    restored.unpack({name: t.clone() for name, t in tensors.items()}, rest)
    for step in range(3, 43):
        for model, o in ((low, optimizers), (again, restored)):
            give_gradients(model, full, step)
            o.step(1.0)
    assert same(weights(low), weights(again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_optimizer_takes_the_same_steps_and_keeps_nothing_on_the_model(dtype):
    plain, away = tiny_model().to(dtype), tiny_model().to(dtype)
    steps = Optimizers(plain, lr=1e-2, weight_decay=0.1), Optimizers(away, lr=1e-2, weight_decay=0.1, kind="offload")
    for number in range(6):
        give_gradients(plain, away, number)
        assert all(p.grad is None for p in away.parameters())
        norms = [o.step(0.5)[0] for o in steps]
        # Gradients of float32 slopes were rounded to bfloat16 before, in `give_gradients`.
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    own = {p.untyped_storage().data_ptr() for p in away.parameters()}
    assert not own & {p.untyped_storage().data_ptr() for p in steps[1].parameters}
    for p, q in zip(plain.parameters(), away.parameters(), strict=True):
        # The fused kernel rounds in another order; a parameter in bfloat16 may fall on the neighbouring number.
        assert torch.allclose(p.float(), q.float(), rtol=1e-5 if dtype == torch.float32 else 2.0**-7, atol=1e-6)


def test_an_offloaded_optimizer_is_continued_bit_by_bit():
    def start() -> tuple[Qwen3ForCausalLM, Optimizers]:
        model = tiny_model().to(torch.bfloat16)
        return model, Optimizers(model, lr=1e-3, weight_decay=0.1, kind="offload")

    model, optimizers = start()
    again, restored = start()
    other = tiny_model()
    for step in range(3):
        give_gradients(model, other, step)
        optimizers.step(1.0)
    tensors, rest = optimizers.pack()
    again.load_state_dict(model.state_dict())
    restored.unpack({name: t.clone() for name, t in tensors.items()}, rest)
    for step in range(3, 6):
        for each, o in ((model, optimizers), (again, restored)):
            give_gradients(each, other, step)
            o.step(1.0)
    assert same(weights(model), weights(again))
    assert same(optimizers.pack()[0], restored.pack()[0])


def test_settings_of_the_optimizer_that_cannot_work_are_refused_before_anything_is_written(
    tmp_path, capsys, monkeypatch
):
    def refused(*options: str) -> str:
        assert main([*options, "--out", str(tmp_path / "run")]) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err.strip()

    message = "error: optim.kind: offload moves state away from a GPU, and there is none; add --device cuda"
    assert refused("--optim.kind", "offload").startswith(message)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = 'error: optim.kind: adamw-8bit needs torchao; install it with pip install "autotool_fast[memory]"'
    assert refused("--optim.kind", "adamw-8bit") == message
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="offload works in one process only"):
        check(from_dict({"device": "cuda", "optim": {"kind": "offload"}}))
