"""The example for TRL, beside TRL's own trainer: the same training, without its head. Only where TRL is installed."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "trl"))

from datasets import Dataset  # noqa: E402
from fused_grpo import FusedGRPOTrainer  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 60,
    "eos_token_id": 61,
    "bos_token_id": None,
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(60)} | {"<pad>": 60, "<eos>": 61, "<unk>": 62}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def train(trainer, model, folder, adapter=None):
    """Three steps on prompts of one to three tokens, so that there is padding on both sides; returns the trainer."""
    torch.manual_seed(0)
    prompts = [{"prompt": " ".join(f"w{i + j}" for j in range(1 + i % 3))} for i in range(8)]
    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=3,
        report_to=[],
        use_cpu=True,
        bf16=False,
        temperature=0.9,
        logging_steps=1,
        learning_rate=1e-2,
        seed=1,
        save_strategy="no",
    )
    made = trainer(
        copy.deepcopy(model),
        reward_funcs=lambda completions, **_: [float(len(text) % 3) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer(),
        peft_config=adapter,
    )
    made.train()
    return made


def assert_alike(ours, theirs):
    rows = [[r for r in t.state.log_history if "loss" in r] for t in (ours, theirs)]
    assert len(rows[0]) == len(rows[1]) == 3
    for mine, other in zip(*rows, strict=True):
        for name in ("loss", "grad_norm", "entropy"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        # Adam's first steps divide rounding by rounding where a gradient is near zero.
        assert (mine - other).abs().mean() < 1e-5


def without_their_head(monkeypatch):
    def forbidden(*_args, **_kwargs):
        raise AssertionError("TRL's own head was used")

    monkeypatch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", forbidden)


@pytest.mark.parametrize("tied", [True, False])
def test_training_is_trls_without_its_head(tmp_path, monkeypatch, tied):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=tied))
    theirs = train(trl.GRPOTrainer, model, tmp_path)
    without_their_head(monkeypatch)
    assert_alike(train(FusedGRPOTrainer, model, tmp_path), theirs)


def test_an_adapter_is_trained_alike(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs = train(trl.GRPOTrainer, model, tmp_path, adapter)
    without_their_head(monkeypatch)
    assert_alike(train(FusedGRPOTrainer, model, tmp_path, adapter), theirs)


def test_a_head_with_a_cap_is_left_to_trl(tmp_path):
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=5.0))
    theirs = train(trl.GRPOTrainer, model, tmp_path)
    assert_alike(train(FusedGRPOTrainer, model, tmp_path), theirs)
