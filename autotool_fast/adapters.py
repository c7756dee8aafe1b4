"""Low-rank adapters (LoRA) through peft: a stage trains a small addition to every linear layer of the decoder.

The model stays the same object and class, so the rollout engine and the packed forward see nothing of it; checkpoints
hold the adapter alone. At its end a stage exports the model with the adapter merged in, which any tool loads, and the
next stage begins a new one. Merging into bfloat16 weights rounds to bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from autotool_fast.config import LoraConfig


def add(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Freeze the weights and put an adapter beside every linear layer but the head; it starts as no change."""
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules="all-linear"))


def present(model: PreTrainedModel) -> bool:
    """Whether the model has an adapter."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def merge(model: PreTrainedModel) -> None:
    """Add the adapter to the weights, in place, and remove it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer())
    model.requires_grad_(True)
    model._hf_peft_config_loaded = False
    del model.peft_config


def merged_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of the weights as a stage exports them, one at a time; an adapter stays apart in the model.

    Weights that share memory (a tied head) come once.
    """
    layers = {}
    if present(model):
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".base_layer.")
        if owner in layers:
            value = parameter.detach()
            if own == "weight":
                (adapter,) = layers[owner].active_adapters
                value = value + layers[owner].get_delta_weight(adapter).detach().to(value.dtype)
            yield f"{owner}.{own}", value
        elif not any(name.startswith(f"{layer}.") for layer in layers):
            yield name, parameter.detach()


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy a saved adapter into the one that `model` has."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    assert not result.unexpected_keys, result.unexpected_keys
