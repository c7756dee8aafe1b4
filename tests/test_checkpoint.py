"""Checkpoints: whole or absent, recognised when damaged, and exact to the bit."""

import json
import os
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autotool_fast import checkpoint
from autotool_fast.config import ModelConfig
from autotool_fast.errors import UserError
from autotool_fast.tasks.tiny import build_model, build_tokenizer

torch.set_num_threads(1)
TINY = ModelConfig(layers=1, hidden=16, heads=2, kv_heads=1, intermediate=24, max_positions=32)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def save(tmp_path, tokenizer):
    model = build_model(TINY, tokenizer, seed=0)

    def save(step=1, **changes):
        arguments = {
            "model": model,
            "tokenizer": tokenizer,
            "tensors": {"x": torch.arange(3)},
            "state": {"n": step},
        }
        return checkpoint.save(tmp_path, step, **(arguments | changes))

    return save


@pytest.fixture
def flushed(monkeypatch):
    """Numbers of the files and folders that were flushed to the disk so far."""
    seen, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (seen.add(os.fstat(number).st_ino), fsync(number))[1])
    return seen


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def warnings_of(folder):
    lines = []
    return checkpoint.latest(folder, lines.append), lines


def test_what_was_saved_comes_back(save, tmp_path, tokenizer):
    shared = torch.arange(6.0)
    tensors = {"a": shared.view(2, 3).t(), "b": shared, "half": torch.ones(2, dtype=torch.bfloat16)}
    save(7, tensors=tensors, state={"beta": 0.1, "list": [1, None]})
    found = checkpoint.latest(tmp_path)
    assert found.step == 7
    assert found.state() == {"beta": 0.1, "list": [1, None]}
    loaded = found.tensors()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], tensors[k]) and loaded[k].dtype == tensors[k].dtype for k in tensors)


def test_the_model_folder_is_an_ordinary_hugging_face_model(save, tokenizer):
    folder = save().model
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = build_model(TINY, tokenizer, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    text = "<|im_start|>user\n"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids


def test_weights_are_loaded_into_the_same_parameters(save, tokenizer):
    model = build_model(TINY, tokenizer, seed=1)
    before = list(model.parameters())
    save().load_weights(model)
    expected = build_model(TINY, tokenizer, seed=0)
    for old, new, right in zip(before, model.parameters(), expected.parameters(), strict=True):
        assert old is new
        assert torch.equal(new, right)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_nothing_is_pickled(save):
    assert {path.suffix for path in save().path.rglob("*") if path.is_file()} <= {
        ".json",
        ".safetensors",
        ".jinja",
    }


def test_only_the_newest_are_kept(save, tmp_path):
    for step in (1, 2, 10):
        save(step, keep_last=2)
    assert names(tmp_path) == ["step-00000002", "step-00000010"]


def test_a_step_can_be_saved_again(save, tmp_path):
    save(3, state={"take": 1})
    save(3, state={"take": 2})
    assert checkpoint.latest(tmp_path).state() == {"take": 2}
    assert names(tmp_path) == ["step-00000003"]


def test_a_damaged_later_checkpoint_does_not_outlive_the_new_one(save, tmp_path):
    save(2)
    damaged = save(3)
    (damaged.path / "manifest.json").unlink()
    save(2, keep_last=1)
    assert names(tmp_path) == ["step-00000002"]


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest(tmp_path / "missing") is None
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("failing", ["_write_contents", "_publish"])
def test_an_interrupted_save_leaves_the_older_checkpoint(save, tmp_path, monkeypatch, failing):
    save(1)
    original = getattr(checkpoint, failing)

    def interrupted(*arguments):
        if failing == "_write_contents":
            original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, failing, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(2)
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoint.latest(tmp_path).step == 1


def test_everything_is_flushed_to_the_disk_before_it_gets_its_name(save, tmp_path, monkeypatch, flushed):
    """A power failure may otherwise leave a name without contents."""
    renamed, replace = [], os.replace

    def watched(source, target):
        parts = [source, *source.rglob("*")] if source.is_dir() else [source]
        assert [part for part in parts if part.stat().st_ino not in flushed] == []
        renamed.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    save(1)
    assert renamed == ["manifest.json", "step-00000001"]
    assert tmp_path.stat().st_ino in flushed  # the name itself


def killed_at_rename(number, save):
    """Run `save` in a child process that dies just before its `number`-th rename of a checkpoint folder."""
    child = os.fork()
    if child == 0:
        replace, left = os.replace, number

        def replace_or_die(source, target):
            nonlocal left
            left -= "manifest" not in str(target)
            if left == 0:
                os._exit(9)
            replace(source, target)

        os.replace = replace_or_die
        try:
            save()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


# A save of a new step renames once, a second save of the same step moves the old folder aside before that.
@pytest.mark.parametrize(("step", "rename"), [(2, 1), (1, 1), (1, 2)])
def test_a_kill_between_writing_and_renaming_loses_nothing(save, tmp_path, step, rename):
    save(1, state={"take": 1})
    killed_at_rename(rename, lambda: save(step, state={"take": 2}))
    assert any(name.startswith(".tmp-step") for name in names(tmp_path))
    found, lines = warnings_of(tmp_path)
    assert (found.step, found.state(), lines) == (1, {"take": 1}, [])
    save(2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("file", "harm", "reason"),
    [
        ("tensors.safetensors", flip_a_bit, "tensors.safetensors does not match its SHA-256"),
        ("model/model.safetensors", flip_a_bit, "model/model.safetensors does not match its SHA-256"),
        ("model/model.safetensors", cut, "bytes instead of"),
        ("state.json", cut, "state.json has"),
        ("state.json", remove, "state.json is missing"),
        ("model/tokenizer.json", remove, "model/tokenizer.json is missing"),
        ("manifest.json", remove, "manifest.json is missing"),
        ("manifest.json", lambda path: path.write_text("[]"), "manifest.json cannot be read"),
        (
            "manifest.json",
            lambda path: path.write_bytes(path.read_bytes()[:99]),
            "manifest.json cannot be read",
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_said_why(save, tmp_path, file, harm, reason):
    save(1)
    harm(save(2).path / file)
    found, lines = warnings_of(tmp_path)
    assert found.step == 1
    assert len(lines) == 1
    assert reason in lines[0]
    assert "step-00000002" in lines[0]


def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed(save):
    path = save(1).path / "manifest.json"
    content = path.read_bytes()
    # Every seventh byte, to be quick; the final newline is not part of the JSON value.
    for i in range(0, len(content) - 1, 7):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        try:
            assert checkpoint.damage(path.parent) is not None, content[: i + 1]
        except UserError as error:
            assert "has format" in error.what  # noqa: PT017


def test_a_file_that_the_manifest_does_not_list_is_not_trusted(save, tmp_path):
    path = save(1).path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["tensors.safetensors"]
    path.write_text(json.dumps(manifest))
    assert checkpoint.damage(path.parent) == "manifest.json does not list tensors.safetensors"


def of_another_version(path):
    path = path / "manifest.json"
    path.write_text(path.read_text().replace("checkpoint/1", "checkpoint/9"))


def test_another_format_version_is_refused_by_name_and_the_one_before_is_used(save, tmp_path):
    save(1)
    of_another_version(save(2).path)
    found, lines = warnings_of(tmp_path)
    assert found.step == 1
    assert len(lines) == 1
    assert "step-00000002: has format 'autotool_fast.checkpoint/9'" in lines[0]


def test_checkpoints_of_another_version_alone_are_not_taken_for_none(save, tmp_path):
    of_another_version(save(1).path)
    remove(save(2).path / "state.json")
    with pytest.raises(UserError, match=r"autotool_fast\.checkpoint/9"):
        warnings_of(tmp_path)


@pytest.mark.parametrize("extra", ["model/modeling.py", "notes", "model/more/deep.safetensors"])
def test_a_file_too_many_is_refused_by_name(save, tmp_path, extra):
    save(1)
    path = save(2).path / extra
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("nowhere") if extra == "notes" else path.write_text("")
    found, lines = warnings_of(tmp_path)
    assert (found.step, len(lines)) == (1, 1)
    assert f"manifest.json does not list {extra}" in lines[0]


def test_a_manifest_names_no_file_outside_its_folder(save, tmp_path):
    (tmp_path / "secret").write_text("")
    path = save(1).path / "manifest.json"
    manifest = json.loads(path.read_text())
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    manifest["files"]["../secret"] = {"bytes": 0, "sha256": empty}
    path.write_text(json.dumps(manifest))
    assert checkpoint.damage(path.parent) == "../secret is missing"


def test_looking_for_the_newest_changes_nothing_on_the_disk(save, tmp_path):
    save(1)
    (tmp_path / ".tmp-step-00000002-1").mkdir()
    os.replace(tmp_path / "step-00000001", tmp_path / ".old-step-00000001")
    found, lines = warnings_of(tmp_path)
    assert (found.state(), lines) == ({"n": 1}, [])
    assert names(tmp_path) == [".old-step-00000001", ".tmp-step-00000002-1"]


def test_state_must_be_plain_json(save, tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        save(1, state={"x": float("nan")})
    with pytest.raises(TypeError, match="JSON serializable"):
        save(1, state={"x": object()})
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_one_line(save, tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    model = build_model(TINY, tokenizer, seed=0)
    with pytest.raises(UserError, match="cannot be written") as caught:
        checkpoint.save(tmp_path / "file", 1, model=model, tokenizer=tokenizer, tensors={}, state={})
    assert "--resume" in str(caught.value)


def optimizers(model):
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    decay = [{"params": rest[:2], "weight_decay": 0.1}, {"params": rest[2:], "betas": (0.8, 0.95)}]
    return {"adamw": torch.optim.AdamW(decay, lr=1e-2), "muon": torch.optim.Muon(matrices, lr=1e-2)}


def train(model, used, steps):
    # Draws from every generator, so that a wrongly restored one changes the weights.
    for _ in range(steps):
        ids = torch.randint(0, 20, (2, 6)) + random.randrange(5) + int(np.random.randint(5))  # noqa: NPY002
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for optimizer in used.values():
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.step()
            optimizer.zero_grad()


def seed_everything():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002


def test_six_steps_equal_three_steps_a_checkpoint_and_three_more(tmp_path, tokenizer):
    whole = build_model(TINY, tokenizer, seed=0)
    seed_everything()
    train(whole, optimizers(whole), 6)

    first = build_model(TINY, tokenizer, seed=0)
    used = optimizers(first)
    seed_everything()
    train(first, used, 3)
    tensors, state = checkpoint.capture_rng(), {}
    for name, optimizer in used.items():
        packed, state[name] = checkpoint.pack_optimizer(optimizer, name)
        tensors |= packed
    checkpoint.save(tmp_path, 3, model=first, tokenizer=tokenizer, tensors=tensors, state=state)

    resumed = build_model(TINY, tokenizer, seed=99)
    found = checkpoint.latest(tmp_path)
    found.load_weights(resumed)
    used, tensors, state = optimizers(resumed), found.tensors(), found.state()
    for name, optimizer in used.items():
        checkpoint.unpack_optimizer(optimizer, tensors, state[name], name)
    checkpoint.restore_rng(tensors)
    assert used["adamw"].param_groups[1]["betas"] == (0.8, 0.95)
    train(resumed, used, 3)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_before_its_first_step_and_with_a_tensor_lr():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=torch.tensor(0.5), capturable=False, foreach=False)
    tensors, state = checkpoint.pack_optimizer(optimizer)
    assert list(tensors) == ["optimizer/group0/lr"]
    json.dumps(state)
    other = torch.optim.AdamW([weight], lr=torch.tensor(0.1), foreach=False)
    checkpoint.unpack_optimizer(other, tensors, state)
    assert float(other.param_groups[0]["lr"]) == 0.5


def test_an_optimizer_over_other_parameters_is_refused():
    weight = torch.nn.Parameter(torch.ones(2))
    tensors, state = checkpoint.pack_optimizer(torch.optim.AdamW([weight]))
    with pytest.raises(ValueError, match="param"):
        checkpoint.unpack_optimizer(torch.optim.AdamW([weight, torch.nn.Parameter(weight)]), tensors, state)


def test_random_generators_continue_where_they_were():
    seed_everything()
    random.gauss(0, 1)  # leaves a cached second value, which is part of the state
    np.random.randn()  # noqa: NPY002
    states = checkpoint.capture_rng()
    assert all(state.dtype == torch.uint8 for state in states.values())

    def draw():
        return random.gauss(0, 1), random.random(), np.random.randn(), torch.rand(3).tolist()  # noqa: NPY002

    expected = draw()
    draw()
    checkpoint.restore_rng(states)
    assert draw() == expected
