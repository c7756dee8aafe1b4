"""LoRA: what is trained, what checkpoints hold, and the exported model."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from autotool_fast import adapters
from autotool_fast.config import LoraConfig
from autotool_fast.loop import Optimizers
from autotool_fast.train import main

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def small() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def trained_by_one_step(model) -> None:
    optimizers = Optimizers(model, lr=0.05, weight_decay=0.0)
    for _ in range(2):  # the first moves the second factor alone: it starts at zero
        model(IDS).logits.logsumexp(-1).sum().backward()
        optimizers.step(1.0)


def test_an_adapter_starts_as_no_change_and_is_the_same_for_the_same_seed():
    model, again, other = small(), small(), small()
    before = model(IDS).logits
    state = torch.get_rng_state()
    for m, seed in ((model, 1), (again, 1), (other, 2)):
        adapters.add(m, LoraConfig(rank=4), seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(IDS).logits, before)
    first = [dict(m.named_parameters()) for m in (model, again, other)]
    name = next(name for name in first[0] if "lora_A" in name)
    assert torch.equal(first[0][name], first[1][name])
    assert not torch.equal(first[0][name], first[2][name])


def test_only_the_adapter_is_trained_and_the_head_has_none():
    model = small()
    adapters.add(model, LoraConfig(rank=4), seed=0)
    frozen = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    trained_by_one_step(model)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert {"lora_" in name for name, p in model.named_parameters() if p.requires_grad} == {True}
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_merging_gives_a_plain_model_that_computes_the_same(tmp_path):
    model = small()
    start = model(IDS).logits
    adapters.add(model, LoraConfig(rank=4), seed=0)
    trained_by_one_step(model)
    expected = model(IDS).logits
    assert (expected - start).abs().max() > 1e-2
    adapters.merge(model)
    assert not adapters.present(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(loaded.state_dict()) == set(small().state_dict())
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_saved_adapter_is_restored_bit_for_bit(tmp_path):
    model, fresh = small(), small()
    adapters.add(model, LoraConfig(rank=4), seed=0)
    trained_by_one_step(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    adapters.add(fresh, LoraConfig(rank=4), seed=5)
    adapters.load_weights(fresh, tmp_path)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_a_missing_peft_and_a_model_from_scratch_are_refused_in_one_line(monkeypatch, capsys):
    assert main(["--lora.rank", "4", "--dry-run"]) == 2
    assert "lora.rank: needs a pretrained model" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--model", "nobody/model", "--lora.rank", "4", "--dry-run"]) == 2
    assert "lora.rank: needs peft; install it with pip install peft" in capsys.readouterr().err


def test_parameters_listed_as_merged_are_those_of_the_merged_model():
    model = small()
    plain = dict(adapters.merged_parameters(model))
    assert all(torch.equal(p, plain[name]) for name, p in model.named_parameters())
    adapters.add(model, LoraConfig(rank=4), seed=0)
    trained_by_one_step(model)
    listed = dict(adapters.merged_parameters(model))
    assert any("lora_" in name for name, _ in model.named_parameters())  # the adapter is still beside the weights
    adapters.merge(model)
    merged = dict(model.named_parameters())
    assert list(listed) == list(plain) == list(merged)
    assert all(torch.equal(value, merged[name]) for name, value in listed.items())
    assert any(not torch.equal(value, plain[name]) for name, value in listed.items())
