"""The memory estimate of a plan."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from autotool_fast import memory
from autotool_fast.cli import load_preset
from autotool_fast.config import TrainConfig, from_dict
from autotool_fast.errors import UserError
from autotool_fast.loop import Optimizers
from autotool_fast.packing import pack
from autotool_fast.policy import packed_logp_entropy
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.train import main

PRESETS = {"qwen2.5-7b": 7_615_616_512, "qwen2.5-1.5b": 1_543_714_304, "qwen3-0.6b": 596_049_920}


def small() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    small().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    return tmp_path / "model"


def settings(folder, **model) -> TrainConfig:
    return from_dict({"model": {"path": str(folder), "max_positions": 256, **model}, "rollout": {"slots": 5}})


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_models_have_their_published_number_of_parameters(name):
    shape = memory.shape_of(load_preset(name).model.path)
    assert shape.parameters == PRESETS[name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_optimizer_and_cache_are_exactly_what_is_allocated(folder, dtype):
    config = settings(folder, dtype=dtype)
    found = memory.estimate(memory.shape_of(str(folder)), config)
    model = small().to(getattr(torch, dtype))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert found["weights"] == weights
    engine = SlotEngine(model, slots=5, max_len=256)
    assert found["key-value cache"] == engine._cache.kv.numel() * engine._cache.kv.element_size()
    optimizers = Optimizers(model, lr=1e-3, weight_decay=0.0)
    model(torch.tensor([[1, 2, 3]])).logits.float().sum().backward()
    optimizers.step(1.0)
    tensors, _ = optimizers.pack()
    held = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    assert found["Adam"] == sum(size for name, size in held.items() if "exp_avg" in name)
    assert found["float32 copies"] == sum(size for name, size in held.items() if name.startswith("float32"))


def test_an_adapter_saves_the_memory_of_gradients_and_optimizer(folder):
    whole = settings(folder)
    shape = memory.shape_of(str(folder))
    lora = dataclasses.replace(whole, lora=dataclasses.replace(whole.lora, rank=2))
    before, after = memory.estimate(shape, whole), memory.estimate(shape, lora)
    from autotool_fast import adapters

    model = small()
    adapters.add(model, lora.lora, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert after["Adam"] == 8 * trained < before["Adam"]
    assert after["weights"] == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_of_the_activations_is_near_what_the_forward_saves(folder, dtype):
    model = small().to(getattr(torch, dtype))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch, trained = pack([np.arange(64) for _ in range(8)]), torch.zeros(512, dtype=torch.bool)
    trained[5] = True
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed_logp_entropy(model, batch, trained)
    config = settings(folder, dtype=dtype, max_positions=512)
    config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, micro_tokens=512))
    found = memory.estimate(memory.shape_of(str(folder)), config)["activations"] - 5 * 96 * 4
    assert found == pytest.approx(sum(tensor.untyped_storage().nbytes() for tensor in saved.values()), rel=0.25)


def test_checkpointing_and_micro_batches_lower_the_activations(folder):
    shape, config = memory.shape_of(str(folder)), settings(folder)
    plain = memory.estimate(shape, config)["activations"]
    rl = dataclasses.replace(config, rl=dataclasses.replace(config.rl, micro_tokens=1024))
    assert memory.estimate(shape, rl)["activations"] < plain
    assert memory.estimate(shape, settings(folder, gradient_checkpointing=True))["activations"] < plain


def test_a_plan_shows_the_estimate_and_what_to_do_when_the_device_is_too_small(folder, monkeypatch, capsys):
    arguments = ["--model", str(folder), "--dry-run"]
    assert main(arguments) == 0
    assert "parameters (weights" in (line := memory_line(capsys))
    assert "device has" not in line
    monkeypatch.setattr(memory, "device_memory", lambda device: 1 << 20)
    assert main(arguments) == 0
    assert "the cpu device has 1.0 MiB: train an adapter with --lora.rank 32" in memory_line(capsys)


def test_a_model_that_is_not_here_has_no_estimate_and_nothing_is_downloaded(capsys):
    assert main(["--model", "nobody/nothing", "--dry-run"]) == 0
    assert "not known before the model is downloaded" in memory_line(capsys)


def test_a_damaged_config_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(UserError, match=r"a config\.json that cannot be read"):
        memory.shape_of(str(tmp_path))


def memory_line(capsys) -> str:
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory"))


def test_each_of_several_processes_holds_the_model_and_a_share_of_its_training(folder):
    config = settings(folder)
    shape = memory.shape_of(str(folder))
    one, four = memory.estimate(shape, config), memory.estimate(shape, config, ranks=4)
    for name in ("gradients", "Adam"):
        assert four[name] == one[name] // 4
    assert four["weights"] == one["weights"]
    assert four["shards"] == shape.parameters  # float32, a quarter of them
    assert one["shards"] == 0


@pytest.mark.parametrize(("kind", "held"), [("adamw", 8.0), ("adamw-8bit", 2.03125), ("offload", 0.0)])
def test_the_plan_counts_the_optimizers_state_where_it_is(folder, capsys, kind, held):
    config = settings(folder, dtype="bfloat16")
    config = dataclasses.replace(config, device="cuda", optim=dataclasses.replace(config.optim, kind=kind))
    shape = memory.shape_of(str(folder))
    found = memory.estimate(shape, config)
    assert found["Adam"] == int(held * shape.parameters)
    if kind == "offload":
        assert found["float32 copies"] == 0
        assert found["gradients"] == 2 * 96 * 32  # of one matrix, in bfloat16
        assert memory.offloaded(shape, config) == 16 * shape.parameters
        assert "of the machine's memory for the optimizer" in memory.describe(config)
    else:
        assert found["float32 copies"] == found["gradients"] == 4 * shape.parameters
        assert "machine's memory" not in memory.describe(config)


def test_recomputed_activations_are_in_the_plan_of_the_command_line(folder, capsys):
    lines = []
    for more in ([], ["--model.gradient-checkpointing"]):
        assert main(["--model", str(folder), "--dry-run", *more]) == 0
        lines.append(memory_line(capsys))
    assert lines[0] != lines[1]
