"""The policy's training forward: packed variable-length sequences through any Hugging Face decoder.

A batch is one row of tokens without padding (see `packing`); linear layers see it whole, attention works per sequence,
and only the hidden rows that predict a trained token reach the head, which is `autotool_kernels.linear_logp_entropy`.
The model's own code is used as it is: attention attaches through `transformers.AttentionInterface` (see `attention`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from autotool_kernels import LogpEntropy, linear_logp_entropy
from transformers import PretrainedConfig, PreTrainedModel

from autotool_fast.attention import PACKED_ATTENTION
from autotool_fast.packing import PackedBatch


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run the model with another registered attention function; restores the one it had."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def recompute_activations(model: PreTrainedModel) -> None:
    """Make training steps recompute each layer's activations in the backward pass.

    The recomputation happens after the forward pass has ended, so the packed attention stays set; the model is put into
    training mode, without which transformers recomputes nothing.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.config._attn_implementation = PACKED_ATTENTION
    model.train()


def packed_hidden(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Last hidden states of a packed batch's rows, [T, H]."""
    with attention(model, PACKED_ATTENTION):
        output = model.base_model(
            input_ids=batch.ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            attention_mask=None,
            use_cache=False,
            packed=batch,
        )
    return output.last_hidden_state[0]


def packed_logp_entropy(
    model: PreTrainedModel | PolicyModule,
    batch: PackedBatch,
    trained: torch.Tensor,  # [N] bool, on the CPU: tokens whose log-prob is wanted
    *,
    temperature: float = 1.0,
    backend: str = "auto",
) -> LogpEntropy:
    """Log-prob and entropy (nats) of the marked tokens, each given its own prefix; float32 [number marked].

    Marks and results are those of the sequences laid end to end, whatever is shared in the batch.
    A token at the start of a sequence has no prefix and cannot be marked. Raises ValueError for a model whose
    attention does more than this forward computes.
    """
    if isinstance(model, PolicyModule):
        return model(batch, trained, temperature=temperature, backend=backend)
    assert not batch.ids.is_cpu or not bool(trained[batch.cu_seqlens[:-1].long()].any()), "a first token has no prefix"
    targets = trained.nonzero().squeeze(-1).to(batch.ids.device)
    hidden = packed_hidden(model, batch)[batch.rows[targets - 1]]
    head = model.get_output_embeddings()
    logit_scale, softcap = logit_options(model.config)
    return linear_logp_entropy(
        hidden,
        head.weight,
        batch.ids[batch.rows[targets]],
        bias=getattr(head, "bias", None),
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        backend=backend,
    )


class PolicyModule(torch.nn.Module):
    """`packed_logp_entropy` of a model as a module's forward pass, for wrappers that act around a root module's."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.device

    def forward(
        self, batch: PackedBatch, trained: torch.Tensor, *, temperature: float = 1.0, backend: str = "auto"
    ) -> LogpEntropy:
        """See `packed_logp_entropy`."""
        result = packed_logp_entropy(self.model, batch, trained, temperature=temperature, backend=backend)
        return LogpEntropy(*(value.clone() for value in result))  # wrappers hang hooks on it, which a view may lose


def logit_options(config: PretrainedConfig) -> tuple[float, float | None]:
    """What a model does to its head's output: a factor (Cohere multiplies, Granite divides) and a soft cap (Gemma)."""
    text = config.get_text_config()
    scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
    return scale, getattr(text, "final_logit_softcapping", None)
