"""Whole runs with rollouts on a server, and what is refused before one begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chat_models import QWEN25, make_tokenizer
from lamp_data import corpus, write_lamp_data
from lamp_environment import small_model
from transformers import AutoModelForCausalLM
from vllm_stand_in import VllmStandIn

from autotool_fast import distributed
from autotool_fast.chat.formats import MODE_INSTRUCTION
from autotool_fast.data import main as data_main
from autotool_fast.metrics import read_rows
from autotool_fast.train import main

torch.set_num_threads(1)
LEARNING = """
[model]
max_positions = 2048
[label]
prompts = 22
k = 2
unsolved = "short"
[warmup]
steps = 70
batch = 8
lr = 4e-3
warmup_steps = 5
[refine]
enabled = false
prompts = 12
[rl]
steps = 2
prompts_per_step = 3
group_size = 4
lr = 1e-4
eval_every = 0
checkpoint_every = 1
[rollout]
slots = 24
max_new_tokens = 48
max_turn_tokens = 48
deadline_s = 600.0
[eval]
per_cell = 1
interim_per_cell = 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data, settings, and a model that is right about half of the time."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "raw").mkdir()
    tokenizer = make_tokenizer(QWEN25, corpus=[MODE_INSTRUCTION, *corpus()])
    small_model(len(tokenizer), hidden=64, layers=2).save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")
    sizes = ["--sft", "22", "--rl", "12", "--test-share", "0.2"]
    assert data_main(["prepare", *write_lamp_data(folder / "raw"), "--out", str(folder / "data"), *sizes]) == 0
    (folder / "small.toml").write_text(LEARNING)
    assert main([*options(folder, "first"), "--model", str(folder / "random"), "--stages", "label", "warmup"]) == 0
    (folder / "first" / "models" / "warmup").rename(folder / "model")
    return folder


def options(place: Path, out: str, *more: str) -> list[str]:
    return ["--preset", str(place / "small.toml"), "--data", str(place / "data"), "--out", str(place / out), *more]


def served(place: Path, out: str, url: str, *more: str) -> list[str]:
    where = ["--model", str(place / "model"), "--rollout.backend", "vllm", "--rollout.server", url]
    return options(place, out, *where, "--start", "cold", "--stages", "rl", *more)


@pytest.fixture
def lamp_server(place):
    return VllmStandIn(AutoModelForCausalLM.from_pretrained(place / "model"), str(place / "model"))


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.slow
def test_a_whole_rl_stage_runs_on_a_server(place, lamp_server):
    before = weights(lamp_server.model).clone()
    with lamp_server.running() as url:
        assert main(served(place, "run", url)) == 0
    rows = [row for row in read_rows(place / "run" / "metrics.jsonl") if row["stage"] == "rl"]
    assert len(rows) == 2
    assert lamp_server.log.count("collective_rpc") == 2  # before either rollout
    assert any(row["groups/constant"] < 1 for row in rows)
    assert not torch.equal(weights(lamp_server.model), before)
    for row in rows:  # the stand-in computes what the trainer does, in another order
        assert row["mismatch/max"] < 1e-3
        assert abs(row["mismatch/kl"]) < 1e-6
        assert row["mismatch/capped"] == 0
        assert row["clip/low"] == row["clip/high"] == 0
        assert abs(row["ratio/mean"] - 1) < 1e-4


def test_a_run_whose_server_does_not_answer_is_refused_before_it_writes(place, capsys):
    assert main(served(place, "none", "http://127.0.0.1:9")) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert error.startswith("error: rollout.server (http://127.0.0.1:9): cannot be reached")
    assert not (place / "none").exists()
    assert main(served(place, "none", "http://127.0.0.1:9", "--dry-run")) == 0
    assert "vLLM at http://127.0.0.1:9, 24 requests at once" in capsys.readouterr().out


def test_stages_without_rollouts_need_no_server(place):
    argv = [*served(place, "none", "http://127.0.0.1:9"), "--stages", "base"]
    assert main(argv) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rollout.server", "localhost:8000"], "rollout.server: 'localhost:8000' is no http address"),
        (["--rollout.sync", "nccl"], "rollout.sync: nccl needs a GPU here too"),
        (["--rollout.backend", "sglang"], "rollout.backend"),
        (["--rl.importance-cap", "0.5"], "rl.importance_cap"),
    ],
)
def test_settings_that_cannot_work_are_refused(place, capsys, more, said):
    assert main([*served(place, "none", "http://127.0.0.1:9"), *more]) == 2
    assert said in capsys.readouterr().err


def test_the_embedded_model_has_no_server(tmp_path, capsys):
    assert main(["--rollout.backend", "vllm", "--out", str(tmp_path / "run")]) == 2
    assert "rollout.backend: vllm needs a pretrained model; add --model" in capsys.readouterr().err


def test_several_processes_are_refused(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(distributed, "fail", lambda message, code: said.append(message) or code)
    said = []
    assert main(served(place, "none", "http://127.0.0.1:9")) == 2
    assert "vllm takes weights from one process only" in said[0]
