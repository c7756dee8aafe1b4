"""What each stage reads, leaves behind and refuses; runs from end to end are in test_train.py."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from small_runs import tensors_of, write_preset

import autotool_fast.stages as stages
import autotool_fast.warmup as warmup_module
from autotool_fast.cli import load_preset
from autotool_fast.config import STAGES, from_dict, to_dict
from autotool_fast.errors import UserError
from autotool_fast.metrics import read_rows
from autotool_fast.pipeline import Pipeline
from autotool_fast.runs import RunFolder
from autotool_fast.stages import epochs, open_context
from autotool_fast.tasks.tiny import build_model

torch.set_num_threads(1)


def merged(values: dict, changes: dict) -> dict:
    return {**values, **{k: merged(values.get(k, {}), v) if isinstance(v, dict) else v for k, v in changes.items()}}


@pytest.fixture
def pipeline(tmp_path):
    """Makes a pipeline with an open run folder from the small preset and changes to it."""
    small = to_dict(load_preset(str(write_preset(tmp_path))))
    with contextlib.ExitStack() as stack:

        def build(out: str = "run", **changes) -> Pipeline:
            config = from_dict(merged(small, {"out": str(tmp_path / out), **changes}))
            run = stack.enter_context(RunFolder.create(config))
            return Pipeline(stack.enter_context(open_context(config, run)))

        yield build


def untrained(p: Pipeline, seed: int = 0):
    return build_model(p.config.model, p.tokenizer, seed)


def label_row(p: Pipeline, label: str, index: int = 0) -> dict:
    """A row as stage label writes it, with recognisable demonstrations."""
    short, long = ({"ids": [kind, index, 5], "trained": [0, 1, 1]} for kind in (1, 2))
    return {"label": label, "short": short, "long": None if label == "short" else long}


def write_labels(p: Pipeline, labels: list[str]) -> None:
    rows = [label_row(p, label, i) for i, label in enumerate(labels)]
    (p.run.path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_epochs_pass_through_every_item_before_any_comes_again():
    batches = [epochs(10, 4, step, (3, 1)) for step in range(5)]
    flat = [i for batch in batches for i in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert epochs(10, 4, 3, (3, 1)) == batches[3]  # of the step alone: a resumed run finds its place
    assert [epochs(10, 4, step, (4, 1)) for step in range(5)] != batches


@pytest.mark.parametrize(("budget", "passes"), [(1, [1, 1, 1, 1]), (100_000, [4])])
def test_fine_tuning_keeps_to_the_token_budget_of_a_forward_pass(pipeline, monkeypatch, budget, passes):
    p = pipeline(rl={"micro_tokens": budget}, warmup={"steps": 1, "batch": 4, "warmup_steps": 0})
    write_labels(p, ["short"] * 4)
    p.save(untrained(p), "base")
    sizes = []
    pack = warmup_module.pack
    monkeypatch.setattr(warmup_module, "pack", lambda ids, *a, **k: (sizes.append(len(ids)), pack(ids, *a, **k))[1])
    stages.warmup(p)
    assert sizes == passes


def test_epochs_of_fewer_items_than_a_batch_repeat_them():
    assert sorted(epochs(2, 6, 0, (0,))) == [0, 0, 0, 1, 1, 1]


def test_a_model_is_saved_whole_or_not_at_all(pipeline, monkeypatch):
    p = pipeline()
    model = untrained(p)
    p.save(model, "base")
    before = tensors_of(p.run.model("base"))
    save = type(model).save_pretrained

    def full(self, folder, **kwargs):
        save(self, folder, **kwargs)
        raise SafetensorError("No space left on device")

    for parameter in model.parameters():
        parameter.data += 1.0
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", full)
        with pytest.raises(UserError, match="No space left"):
            p.save(model, "base")
        with pytest.raises(UserError, match="No space left"):
            p.save(model, "rl")
    assert tensors_of(p.run.model("base")) == before
    with pytest.raises(UserError, match="run stage rl first"):
        p.load("rl")
    p.save(model, "base")  # what was left over is no obstacle
    assert tensors_of(p.run.model("base")) != before
    assert [path.name for path in (p.run.path / "models").iterdir() if path.name.startswith(".base")] == []
    loaded = dict(p.load("base").named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in model.named_parameters())


def test_a_model_is_flushed_to_the_disk_before_it_gets_its_name(pipeline, monkeypatch):
    flushed, unflushed, fsync, rename = set(), [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda number: (flushed.add(os.fstat(number).st_ino), fsync(number))[1])

    def watched(source, target):
        unflushed.extend(path for path in [source, *source.rglob("*")] if path.stat().st_ino not in flushed)
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", watched)
    p = pipeline()
    p.save(untrained(p), "base")
    assert unflushed == []
    assert p.run.model("base").parent.stat().st_ino in flushed


def test_a_failing_disk_is_a_user_error_that_says_how_to_continue(tmp_path):
    config = from_dict({"out": str(tmp_path / "run")})
    errors = [
        (PermissionError(13, "Permission denied", "labels.jsonl"), "labels.jsonl"),
        (SafetensorError("os error 28"), "os error 28"),
    ]
    with RunFolder.create(config) as run:
        for error, part in errors:
            with pytest.raises(UserError, match=part) as caught, open_context(config, run):
                raise error
            assert "--resume" in str(caught.value)
        with pytest.raises(ValueError, match="a bug"), open_context(config, run):
            raise ValueError("a bug")  # keeps its traceback


def test_the_base_model_of_another_run_is_taken_over_bit_for_bit(pipeline):
    source = pipeline("source")
    source.save(untrained(source, seed=5), "base")
    folder = str(source.run.model("base"))
    p = pipeline(base={"reuse": folder})
    assert stages.base(p) == {"reused": folder}
    assert tensors_of(p.run.model("base")) == tensors_of(source.run.model("base"))
    assert not p.run.metrics.read_text()


def test_a_base_model_with_another_vocabulary_is_refused(pipeline):
    source = pipeline("source")
    source.tokenizer.add_tokens(["another"])
    source.save(untrained(source), "base")
    p = pipeline(base={"reuse": str(source.run.model("base"))})
    with pytest.raises(UserError, match="another vocabulary"):
        stages.base(p)
    assert not p.run.model("base").exists()


@pytest.mark.parametrize(
    ("stage", "missing"),
    [
        ("label", "models/base"),
        ("warmup", "labels.jsonl"),
        ("distill", "labels.jsonl"),
        ("refine", "models/warmup"),
        ("rl", "refined.json"),
        ("eval", "models"),
    ],
)
def test_a_missing_input_names_the_file_and_the_stage_that_writes_it(pipeline, stage, missing):
    p = pipeline()
    with pytest.raises(UserError, match="run stage") as caught:
        stages.STAGES[stage](p)
    assert str(p.run.path / missing) in str(caught.value)


def test_a_cold_start_skips_the_warm_up_and_starts_rl_from_the_base_model(pipeline):
    p = pipeline(start="cold")
    assert stages.warmup(p) == {"skipped": "cold start"}
    p.save(untrained(p), "base")
    start = dict(stages._start_model(p).named_parameters())
    assert all(torch.equal(start[name], value) for name, value in untrained(p).named_parameters())
    warm = pipeline("warm")
    with pytest.raises(UserError, match="run stage warmup first"):
        stages._start_model(warm)


@pytest.fixture
def fine_tuned(monkeypatch):
    """Calls of `Pipeline.sft`, not carried out: (stage, steps, demonstrations of an epoch)."""
    calls = []

    def record(self, stage, model, config, batch, *, steps=None, matrix="adamw"):
        demos = {tuple(demo.ids.tolist()): demo.trained.tolist() for step in range(4) for demo in batch(step)}
        calls.append((stage, config.steps if steps is None else steps, demos))

    monkeypatch.setattr(Pipeline, "sft", record)
    monkeypatch.setattr(Pipeline, "load", lambda self, name: name)
    return calls


def test_the_warm_up_imitates_what_the_labels_say_and_leaves_dropped_prompts_out(pipeline, fine_tuned):
    p = pipeline()
    write_labels(p, ["short", "long", "drop", "short"])
    assert stages.warmup(p) == {"demonstrations": 3}
    ((stage, steps, demos),) = fine_tuned
    assert (stage, steps) == ("warmup", 4)
    assert demos == {ids: [False, True, True] for ids in [(1, 0, 5), (2, 1, 5), (1, 3, 5)]}


@pytest.mark.parametrize(
    ("changes", "steps"), [({}, 4), ({"distill": {"steps": 0}}, 4 + 5), ({"distill": {"steps": 0}, "start": "cold"}, 5)]
)
def test_the_baseline_imitates_every_long_trace_with_as_many_updates(pipeline, fine_tuned, changes, steps):
    p = pipeline(**changes)
    write_labels(p, ["short", "long", "drop", "long"])  # a dropped prompt may have a long trace under another rule
    stages.distill(p)
    ((stage, taken, demos),) = fine_tuned
    assert (stage, taken) == ("distill", steps)
    assert set(demos) == {(2, 1, 5), (2, 2, 5), (2, 3, 5)}


@pytest.mark.parametrize(
    ("stage", "label", "what"),
    [("warmup", "drop", "no prompt has a usable label"), ("distill", "short", "no prompt was solved by thinking")],
)
def test_labels_without_a_demonstration_say_what_to_do(pipeline, stage, label, what):
    p = pipeline()
    write_labels(p, [label])
    with pytest.raises(UserError, match=what) as caught:
        stages.STAGES[stage](p)
    assert "train the base model for longer" in str(caught.value)


def test_without_refinement_rl_draws_from_the_whole_pool(pipeline):
    p = pipeline(refine={"enabled": False})
    pool = p.problems.training(9, "rl")
    assert stages._rl_prompts(p) == pool  # the stage need not even run
    assert stages.refine_prompts(p) == {"kept": 9, "pool": 9}
    assert stages._rl_prompts(p) == pool
    assert all(task.split == "train" for task in pool)


def test_refinement_measures_every_prompt_in_every_round_and_throws_the_copy_away(pipeline, monkeypatch):
    p = pipeline(start="cold")
    p.save(untrained(p), "base")
    before = tensors_of(p.run.model("base"))
    given = {}
    refine = stages.refine

    def record(rewards, success, difficulty, **options):
        given.update(rewards=np.array(rewards), success=np.array(success), difficulty=difficulty)
        return refine(rewards, success, difficulty, **options)

    monkeypatch.setattr(stages, "refine", record)
    steps, earned = [], {}
    step = stages.PolicyTrainer.step

    def watch(self, tasks, number, *, updates):
        steps.append((number, [task.id for task in tasks]))
        result = step(self, tasks, number, updates=updates)
        # Rewards of their own for every prompt and round, or an untrained model would earn nearly the same everywhere.
        self.last_rewards = [len(steps) + i / 8 for i in range(len(self.last))]
        for i, task in enumerate(tasks):
            earned.setdefault(task.id, []).append(sum(self.last_rewards[4 * i : 4 * i + 4]) / 4)
        return result

    monkeypatch.setattr(stages.PolicyTrainer, "step", watch)
    summary = stages.refine_prompts(p)
    pool = [task.id for task in p.problems.training(9, "rl")]
    for part in (steps[:3], steps[3:]):
        assert sorted(i for _, ids in part for i in ids) == sorted(pool)
    assert [number for number, _ in steps] == [-2, -3, -4, -5, -6, -7]  # never those of RL or of the targets
    assert given["rewards"].tolist() == [earned[name] for name in pool]
    assert given["success"].shape == (9,)
    kept = json.loads((p.run.path / "refined.json").read_text())["kept"]
    assert summary["kept"] == len(kept) == len(stages._rl_prompts(p))
    assert tensors_of(p.run.model("base")) == before
    assert len([row for row in read_rows(p.run.metrics) if row["stage"] == "refine"]) == 6


def test_a_refinement_that_keeps_nothing_is_a_clear_error(pipeline):
    p = pipeline()
    (p.run.path / "refined.json").write_text(json.dumps({"kept": [], "report": {}}))
    with pytest.raises(UserError, match="kept no prompt") as caught:
        stages.rl(p)
    assert "refine.drop_easy" in str(caught.value)


def test_evaluation_and_training_prompts_come_from_different_splits(pipeline):
    p = pipeline()
    tasks = p.problems.training(200, "rl") + p.problems.training(200, "label")
    drawn = {json.dumps(task.spec["problem"], sort_keys=True) for task in tasks}
    held_out = {json.dumps(task.spec["problem"], sort_keys=True) for task in p.problems.held_out(20, "eval")}
    assert not drawn & held_out


def test_every_stage_of_the_configuration_exists():
    assert tuple(stages.STAGES) == STAGES
