"""A run on a pretrained model that SIGTERM stops in every stage ends bit for bit where one without a stop does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chat_models import QWEN3, make_tokenizer
from lamp_data import write_lamp_data
from lamp_environment import write_environment, write_lamp_model
from test_faults_resume import continued, files_of
from test_loop import rows
from transformers import Qwen3Config, Qwen3ForCausalLM

from autotool_fast.data import main as data_main
from autotool_fast.train import main

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

REASONING = Path(__file__).parents[1] / "fixtures" / "data" / "rlla_raw"
WARM = """
stages = ["label", "warmup"]
[model]
max_positions = 512
[label]
prompts = 40
k = 1
unsolved = "short"
[warmup]
steps = 100
batch = 8
lr = 4e-3
warmup_steps = 5
[rollout]
slots = 24
max_new_tokens = 48
max_turn_tokens = 48
"""
# Over a preset: the device, sizes, counts, and rates that a small model feels.
SMALL = """
extends = "{preset}"
device = "cpu"
[model]
path = "{model}"
max_positions = 3072
[label]
prompts = 12
k = 2
teacher = "data"
unsolved = "short"
[warmup]
steps = 4
batch = 2
lr = 1e-3
warmup_steps = 1
checkpoint_every = 0
[distill]
steps = 4
batch = 2
lr = 1e-3
warmup_steps = 1
checkpoint_every = 0
[refine]
prompts = 6
keep = 1.0
drop_easy = 0.0
drop_hard = 0.0
[rl]
steps = 4
prompts_per_step = 3
group_size = 4
lr = 1e-3
eval_every = 2
checkpoint_every = 0
[rollout]
slots = 12
max_turns = 2
max_new_tokens = 48
max_turn_tokens = 48
[eval]
per_cell = 1
interim_per_cell = 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Data, and two models: one that is right now and then, and a random one that thinks by its own template."""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "raw").mkdir()
    lamps = write_lamp_data(folder / "raw")
    write_lamp_model(folder / "model")
    sizes = ["--sft", "22", "--rl", "12", "--test-share", "0.2"]
    assert data_main(["prepare", *lamps, "--out", str(folder / "lamps"), *sizes]) == 0
    reasons = [*lamps, str(REASONING), "--out", str(folder / "data"), "--max-rejects", "1"]
    assert data_main(["prepare", *reasons, *sizes]) == 0
    (folder / "warm.toml").write_text(WARM)
    argv = ["--preset", str(folder / "warm.toml"), "--model", str(folder / "model"), "--data", str(folder / "lamps")]
    assert main([*argv, "--out", str(folder / "warm")]) == 0

    torch.manual_seed(0)
    tokenizer = make_tokenizer(QWEN3)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=4096, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder / "thinker")
    tokenizer.save_pretrained(folder / "thinker")
    write_environment(folder / "house")
    return folder


STOPS = {"label": 1, "warmup": 2, "distill": 2, "refine": 3, "rl": 2, "eval": 2}
"""The step of every stage in which the signal arrives."""


@pytest.mark.parametrize(
    ("preset", "model", "stages", "more"),
    [
        ("qwen2.5-7b", "warm/models/warmup", [*STOPS], []),  # bfloat16 with float32 copies, activations computed again
        ("qwen2.5-1.5b", "warm/models/warmup", ["label", "warmup", "rl"], ["--lora.rank", "2", "--refine.no-enabled"]),
        (
            "qwen2.5-7b-bfcl",
            "warm/models/warmup",
            ["refine", "rl"],
            ["--start", "cold", "--environment.path", "house", "--rollout.max-turns", "6"],
        ),
        ("qwen3-0.6b", "thinker", ["label", "warmup", "refine", "rl"], []),
    ],
    ids=["7b", "1.5b with adapters", "7b on simulators", "qwen3"],
)
def test_every_stage_on_a_pretrained_model_goes_on_as_if_nothing_had_been(
    place, tmp_path, monkeypatch, preset, model, stages, more
):
    monkeypatch.chdir(place)
    path = tmp_path / "small.toml"
    path.write_text(SMALL.format(preset=preset, model=place / model))
    argv = ["--preset", str(path), "--data", "data", "--stages", ",".join(stages), *more]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    continued(argv, tmp_path / "parts", [(stage, STOPS[stage]) for stage in stages])
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    # The random model earns the same reward everywhere, so RL does not move it.
    still = {"refine", "rl"} if model == "thinker" else set()
    moved = {row["stage"] for row in rows(tmp_path / "whole") if row["grad_norm"]}
    assert moved == {"warmup", "distill", "refine", "rl"} & set(stages) - still
