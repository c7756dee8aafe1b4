"""The whole pipeline on a pretrained model and prepared data: a small random Qwen2 and hand-written data sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_models import LLAMA31, QWEN25, make_tokenizer
from lamp_data import write_lamp_data
from lamp_environment import small_model, write_lamp_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from autotool_fast.chat import chat_format
from autotool_fast.data import main as data_main
from autotool_fast.metrics import read_rows
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.train import main

FIXTURES = Path(__file__).parent / "fixtures" / "data"
SOURCES = ("toolace", "xlam", "hermes", "rlla_raw")
SETTINGS = """
[model]
max_positions = 3072
[label]
prompts = 6
k = 2
teacher = "data"
unsolved = "short"
[warmup]
steps = 3
batch = 2
warmup_steps = 1
[distill]
steps = 2
batch = 2
warmup_steps = 1
[refine]
prompts = 6
rounds = 2
drop_hard = 0.0
keep = 1.0
[rl]
steps = 2
prompts_per_step = 2
group_size = 2
eval_every = 1
checkpoint_every = 1
[rollout]
slots = 8
prefill_chunk = 512
max_new_tokens = 12
max_turn_tokens = 12
[eval]
per_cell = 1
interim_per_cell = 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, prepared data and settings."""
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = make_tokenizer(QWEN25)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    inputs = [str(FIXTURES / source) for source in SOURCES]
    sizes = ["--sft", "6", "--rl", "6", "--test-share", "0.3", "--max-rejects", "1"]
    assert data_main(["prepare", *inputs, "--out", str(folder / "data"), *sizes]) == 0
    (folder / "small.toml").write_text(SETTINGS)
    return folder


def options(place: Path, out: str, *more: str) -> list[str]:
    return [
        "--preset", str(place / "small.toml"), "--model", str(place / "model"), "--data", str(place / "data"),
        "--out", str(place / out), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(place) -> Path:
    assert main(options(place, "run")) == 0
    return place / "run"


@pytest.mark.slow
def test_every_stage_runs_on_a_pretrained_model_and_prepared_data(run):
    labels = [json.loads(line) for line in (run / "labels.jsonl").read_text().splitlines()]
    # A random model solves nothing: rlla's reasoning makes long labels, the rest fall back to the reference answer.
    assert {row["label"] for row in labels} == {"short", "long"}
    assert all((row["label"] == "long") == row["family"].startswith("rlla/") for row in labels)
    stages = {row["stage"] for row in read_rows(run / "metrics.jsonl")}
    assert stages == {"warmup", "distill", "refine", "rl"}
    results = json.loads((run / "results.json").read_text())
    assert set(results["models"]) == {"base", "warmup", "distilled", "rl"}
    families = {tuple(cell["family"].split("/")) for cell in results["models"]["rl"]["auto"]["cells"]}
    assert {source for source, _ in families} <= {"toolace", "xlam", "hermes", "rlla"}
    assert {kind for _, kind in families} <= {"call", "no_call"}
    assert not (run / "models" / "base").exists()  # the pretrained model stays where it is
    assert (run / "report.html").exists()


def weights(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.slow
def test_the_warm_up_moves_the_weights_and_rl_without_a_reward_difference_does_not(run, place):
    start, warm, final = (weights(f) for f in (place / "model", run / "models" / "warmup", run / "models" / "rl"))
    assert not torch.equal(start, warm)
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["stage"] == "rl"]
    assert [(row["groups/constant"], row["malformed"]) for row in rows] == [(1.0, 1.0)] * 2
    assert torch.equal(warm, final)


@pytest.mark.slow
def test_a_checkpoint_generates_what_the_engine_generates(run):
    folder = run / "models" / "rl"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = chat_format(tokenizer, "auto")
    assert chat.wire.name == "qwen2.5"
    prompt = chat.encode_prompt([{"role": "user", "content": "How warm is pool 3?"}], [])
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=sorted(chat.stop_ids)
        )[0].tolist()
    engine = SlotEngine(model, slots=1, max_len=1024)
    with engine.session(stop_ids=chat.stop_ids, temperature=0.0):
        engine.submit(prompt, [0], np.array([1]), 24)
        while not engine.step():
            pass
        assert engine.row(0).ids.tolist() == expected


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_was_not_stopped(run, place):
    assert main(options(place, "parts", "--stages", "base,label,warmup")) == 0
    assert main(options(place, "parts", "--resume")) == 0
    for name in ("warmup", "distilled", "rl"):
        weights = [(place / out / "models" / name / "model.safetensors").read_bytes() for out in ("run", "parts")]
        assert weights[0] == weights[1], name


LEARNING = """
stages = ["label", "warmup", "refine", "rl", "eval"]
[model]
max_positions = 512
[label]
prompts = 40
k = 2
unsolved = "short"
[warmup]
steps = 100
batch = 8
lr = 4e-3
warmup_steps = 5
[refine]
prompts = 12
rounds = 2
drop_hard = 0.0
keep = 1.0
[rl]
steps = 2
prompts_per_step = 6
group_size = 4
lr = 1e-4
eval_every = 1
[rollout]
slots = 24
prefill_chunk = 512
max_new_tokens = 48
max_turn_tokens = 48
[eval]
per_cell = 4
interim_per_cell = 2
"""


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> Path:
    """A run whose warm-up is long enough for a small model to be right about half of the time."""
    folder = tmp_path_factory.mktemp("learnt")
    (folder / "raw").mkdir()
    write_lamp_model(folder / "model")
    sizes = ["--sft", "22", "--rl", "12", "--test-share", "0.2"]
    assert data_main(["prepare", *write_lamp_data(folder / "raw"), "--out", str(folder / "data"), *sizes]) == 0
    (folder / "small.toml").write_text(LEARNING)
    assert main(options(folder, "run")) == 0
    return folder


@pytest.mark.slow
def test_a_warmed_up_model_earns_rewards_that_differ_within_groups(learnt):
    rows = [row for row in read_rows(learnt / "run" / "metrics.jsonl") if row["stage"] in ("refine", "rl")]
    assert len(rows) == 6
    assert all(row["groups/constant"] < 1 for row in rows)
    assert all(0 < row["acc/all"] < 1 for row in rows)
    report = json.loads((learnt / "run" / "refined.json").read_text())["report"]
    assert report["variance_limit"] > 0  # rewards moved from round to round


@pytest.mark.slow
def test_rl_on_earned_rewards_changes_the_weights(learnt):
    warm, final = (weights(learnt / "run" / "models" / name) for name in ("warmup", "rl"))
    assert not torch.equal(warm, final)
    rows = [row for row in read_rows(learnt / "run" / "metrics.jsonl") if row["stage"] == "rl"]
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.slow
def test_what_was_learnt_answers_held_out_requests(learnt):
    results = json.loads((learnt / "run" / "results.json").read_text())
    accuracy = {name: modes["auto"]["overall"]["accuracy"] for name, modes in results["models"].items()}
    assert accuracy["base"] == 0
    assert accuracy["warmup"] > 0
    assert accuracy["rl"] > 0
    right = {cell["family"] for cell in results["models"]["rl"]["auto"]["cells"] if cell["accuracy"] > 0}
    assert any(family.endswith("/call") for family in right)  # not by refusing everything


def test_examples_that_a_chat_format_cannot_write_are_counted_and_left_out(place, tmp_path, capsys):
    tokenizer = make_tokenizer(LLAMA31)
    small_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = ["--data", str(place / "data"), "--preset", str(place / "small.toml"), "--stages", "label,warmup"]
    assert main([*data, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().err
    assert "of sft.jsonl left out, several calls in one turn" in lines
    labels = [json.loads(line) for line in (tmp_path / "run" / "labels.jsonl").read_text().splitlines()]
    assert labels


def refusal(capsys, *argv: str) -> str:
    assert main(list(argv)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_a_wrong_model_or_data_folder_is_one_line(place, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    assert "needs a pretrained model" in refusal(capsys, "--data", str(place / "data"), *out)
    line = refusal(capsys, "--model", str(place / "model"), "--data", str(tmp_path / "nowhere"), *out)
    assert "data.path" in line
    assert "autotool_fast.data prepare" in line
    line = refusal(capsys, "--model", str(tmp_path / "nowhere"), "--data", str(place / "data"), *out)
    assert "model.path" in line
    (tmp_path / "empty").mkdir()
    line = refusal(capsys, "--model", str(place / "model"), "--data", str(tmp_path / "empty"), *out, "--overwrite")
    assert "holds no sft.jsonl" in line


def test_a_model_without_a_template_or_a_tokenizer_is_one_line(place, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)
    (model / "chat_template.jinja").unlink()
    argv = ["--preset", str(place / "small.toml"), "--data", str(place / "data"), "--model", str(model)]
    line = refusal(capsys, *argv, "--out", str(tmp_path / "a"))
    assert "no chat template; name a format with --model.chat-format (qwen2.5, qwen3, hermes, llama3.1)" in line
    for path in model.glob("tokenizer*"):
        path.unlink()
    line = refusal(capsys, *argv, "--out", str(tmp_path / "b"), "--model.chat-format", "qwen2.5")
    assert "holds no tokenizer; give the folder of a whole Hugging Face model" in line


def test_data_without_a_usable_prompt_says_why(place, tmp_path, capsys):
    argv = options(place, "short", "--model.max-positions", "64")
    line = refusal(capsys, *argv)
    assert "prompt too long" in line
    assert "model.max_positions" in line


def test_the_plan_names_model_and_data(place, capsys):
    assert main(options(place, "planned", "--dry-run")) == 0
    text = capsys.readouterr().out
    assert str(place / "model") in text
    assert str(place / "data") in text
    assert not (place / "planned").exists()


@pytest.mark.slow
def test_a_run_with_adapters_keeps_them_in_checkpoints_and_exports_whole_models(place):
    more = ["--lora.rank", "2", "--warmup.lr", "0.01", "--refine.no-enabled", "--label.prompts", "3"]
    assert main(options(place, "lora", *more, "--stages", "base,label,warmup,rl")) == 0
    exported = place / "lora" / "models" / "warmup"
    assert not (exported / "adapter_config.json").exists()
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (place / "model", exported))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("proj" in name and name.endswith("weight") for name in moved)
    newest = max((place / "lora" / "checkpoints" / "rl").glob("step-*"))
    assert {path.name for path in (newest / "model").glob("*.safetensors")} == {"adapter_model.safetensors"}


@pytest.mark.slow
def test_recomputed_activations_change_nothing_but_memory(run, place, monkeypatch):
    recomputed = []
    layer = Qwen2DecoderLayer.forward

    def counted(self, *args, **kwargs):
        recomputed.append(torch.is_grad_enabled() and self.training)
        return layer(self, *args, **kwargs)

    monkeypatch.setattr(Qwen2DecoderLayer, "forward", counted)
    stages = ["--stages", "base,label,warmup,refine,rl"]
    assert main(options(place, "recompute", "--model.gradient-checkpointing", *stages)) == 0
    for name in ("warmup", "rl"):
        weights = [(place / out / "models" / name / "model.safetensors").read_bytes() for out in ("run", "recompute")]
        assert weights[0] == weights[1], name
    # Three steps of the warm-up and at least two of RL run each layer again in the backward pass.
    assert sum(recomputed) >= 5
