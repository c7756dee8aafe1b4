"""What a run will take of the device's memory, estimated from the model's shape before any weight is loaded.

Exact for weights, optimizer and key-value cache (they are sums of sizes; 8-bit moments up to the small tensors that
stay float32); activations are an estimate for decoders of Llama's kind. Nothing is downloaded: a model whose
config.json is not on this machine has no estimate, unless a preset names it.
"""

from __future__ import annotations

from dataclasses import dataclass

from autotool_fast import distributed
from autotool_fast.config import TrainConfig
from autotool_fast.errors import UserError

GIB = 1 << 30
MOMENT_BYTES_8BIT = 2 * (1 + 4 / 256)
"""Bytes per parameter of Adam's two 8-bit moments, a float32 scale for every 256 numbers included."""
QWEN = {"num_hidden_layers": 28, "vocab_size": 151936, "tie_word_embeddings": True}
KNOWN: dict[str, tuple[str, dict[str, object]]] = {
    "Qwen/Qwen2.5-7B-Instruct": (
        "qwen2",
        {**QWEN, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
        | {"vocab_size": 152064, "tie_word_embeddings": False},
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": (
        "qwen2",
        {**QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
    ),
    "Qwen/Qwen3-0.6B": (
        "qwen3",
        {**QWEN, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"head_dim": 128},
    ),
}
"""The presets' models: type and sizes as their config.json has them, so that a plan needs no download."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder that memory depends on; `adapter` counts the parameters of a LoRA adapter of rank 1."""

    parameters: int
    adapter: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    positions: int | None


def shape_of(source: str, *, own_code: bool = False) -> Shape | None:
    """Sizes of a preset's model, the model in a folder or a downloaded hub model; None without a config.json here.

    `own_code` lets code that comes with the model run.

    Raises:
        UserError: the folder's config.json is damaged, or of a kind that transformers does not know.
    """
    import torch
    from transformers import AutoConfig

    from autotool_fast import loading

    try:
        if source in KNOWN:
            kind, sizes = KNOWN[source]
            config = AutoConfig.for_model(kind, **sizes)
        else:
            config = loading.read_config(source, local=True, own_code=own_code)
        model = loading.empty_model(config, own_code=own_code)
    except loading.Unusable as error:
        if error.absent:
            return None
        problem, remedy = f"has a config.json that cannot be read ({error})", error.code_remedy
        raise UserError(problem, where=f"model.path ({source})", remedy=remedy) from error
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    text = config.get_text_config()
    heads = text.num_attention_heads
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        adapter=sum(m.in_features + m.out_features for m in linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=getattr(text, "intermediate_size", 4 * text.hidden_size),
        vocab=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None),
    )


def estimate(shape: Shape, config: TrainConfig, ranks: int = 1) -> dict[str, int]:
    """Bytes by what holds them, at the peak of an RL step, in each of `ranks` processes.

    Of several processes each has the whole model and a share of its trained copy; the layers that it gathers from the
    others for a moment are left out. An offloaded optimizer leaves one gradient at a time on the device, the largest
    that of the embeddings; what it takes elsewhere is `offloaded`'s.
    """
    low = config.model.dtype == "bfloat16"
    width = 2 if low else 4
    rank = config.lora.rank
    trained = shape.adapter * rank if rank else shape.parameters
    rollout = config.rollout
    cached = 2 * shape.layers * shape.kv_heads * shape.head_dim
    # Saved for the backward pass by token: residuals, queries, keys, values, attention, gated MLP; norms in float32.
    kept = 5 * shape.hidden + 2 * (shape.heads + shape.kv_heads) * shape.head_dim + 4 * shape.intermediate
    layer, rows = kept * width + 3 * shape.hidden * 4, shape.hidden * width
    saved = shape.layers * rows + layer if config.model.gradient_checkpointing else shape.layers * layer
    tokens = max(config.rl.micro_tokens, config.model.max_positions)
    away = config.optim.kind == "offload"
    moments = MOMENT_BYTES_8BIT if config.optim.kind == "adamw-8bit" else 8.0
    return {
        "weights": (shape.parameters + (trained if rank else 0)) * width,
        "float32 copies": trained * 4 if low and ranks == 1 and not away else 0,
        "shards": (trained * 4 + (shape.parameters * width if rank else 0)) // ranks if ranks > 1 else 0,
        "gradients": min(trained, shape.vocab * shape.hidden) * width if away else trained * 4 // ranks,
        "Adam": 0 if away else int(trained * moments) // ranks,
        "key-value cache": cached * rollout.slots * config.model.max_positions * width,
        "activations": tokens * saved + rollout.slots * shape.vocab * 4,
    }


def offloaded(shape: Shape, config: TrainConfig) -> int:
    """Bytes of the machine's memory that an offloaded optimizer takes: float32 copies, gradients and two moments."""
    trained = shape.adapter * config.lora.rank if config.lora.rank else shape.parameters
    return 16 * trained if config.optim.kind == "offload" else 0


def describe(config: TrainConfig) -> str:
    """The estimate in one line, with what to do when the device has less.

    Raises:
        UserError: see `shape_of`; or the model has fewer positions than the run is to use.
    """
    shape = shape_of(config.model.path, own_code=config.model.trust_remote_code)
    if shape is None:
        return "not known before the model is downloaded"
    if shape.positions is not None and config.model.max_positions > shape.positions:
        problem = f"is beyond the {shape.positions} positions of the model"
        raise UserError(problem, where="model.max_positions", remedy="lower it")
    ranks = distributed.world()
    parts = estimate(shape, config, ranks)
    total = sum(parts.values())
    detail = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    each = " in each process" if ranks > 1 else ""
    line = f"about {_size(total)}{each} for {shape.parameters / 1e9:.3g} B parameters ({detail})"
    if away := offloaded(shape, config):
        line += f", and {_size(away)} of the machine's memory for the optimizer"
    room = device_memory(config.device)
    if room is None or total <= room:
        return line
    if config.lora.rank:
        advice = "lower rollout.slots or rl.micro_tokens, or recompute with --model.gradient-checkpointing"
    else:
        advice = "train an adapter with --lora.rank 32, or see --optim.kind"
    return f"{line}; the {config.device} device has {_size(room)}: {advice}"


def device_memory(device: str) -> int | None:
    """Bytes of memory of the device, or None where that is not known."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
    import os

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / (1 << 20):.1f} MiB"
