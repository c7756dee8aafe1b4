"""The policy's training forward: packed variable-length sequences through any Hugging Face decoder.

Sequences are concatenated without padding; linear layers see one long row, attention works per sequence, and only the
hidden rows that predict a trained token reach the head, which is `autotool_kernels.linear_logp_entropy`. The model's
own code is used as it is: attention attaches through `transformers.AttentionInterface`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from autotool_kernels import LogpEntropy, linear_logp_entropy
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

PACKED_ATTENTION = "autotool_packed"


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end.

    Attributes:
        ids: token ids, int64 [T].
        positions: position of each token in its own sequence, int64 [T].
        cu_seqlens: sequence boundaries, int32 [S + 1].
        buckets: index maps [S_b, L_b] int64 of the sequences grouped by length: where token (s, j) lies in the packed
            row, or T past the end of its sequence.
        order: where packed token t lies in the concatenation of the flattened buckets, int64 [T].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    buckets: tuple[torch.Tensor, ...]
    order: torch.Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens T."""
        return self.ids.numel()


def pack(sequences: Sequence[np.ndarray], device: torch.device | str = "cpu") -> PackedBatch:
    """Pack token id arrays (each [T_i], T_i >= 1) into one row, its tensors on `device`."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    assert lengths.size > 0 and lengths.min() > 0, "a sequence has at least one token"  # noqa: PT018
    starts = np.concatenate([[0], np.cumsum(lengths)])
    total = int(starts[-1])
    buckets, order, offset = [], np.empty(total, dtype=np.int64), 0
    for rows in _length_buckets(lengths):
        longest = int(lengths[rows].max())
        column = np.arange(longest)
        inside = column < lengths[rows, None]
        index = np.where(inside, starts[rows, None] + column, total)
        order[index[inside]] = offset + np.flatnonzero(inside)
        offset += index.size
        buckets.append(torch.from_numpy(index).to(device))
    return PackedBatch(
        ids=torch.from_numpy(np.concatenate(sequences).astype(np.int64)).to(device),
        positions=torch.from_numpy(np.arange(total) - np.repeat(starts[:-1], lengths)).to(device),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)).to(device),
        buckets=tuple(buckets),
        order=torch.from_numpy(order).to(device),
    )


def _length_buckets(lengths: np.ndarray, ratio: float = 0.8, smallest: int = 8) -> list[np.ndarray]:
    """Sequence numbers grouped so that, within a bucket of more than `smallest`, lengths differ by `ratio` at most."""
    descending = np.argsort(-lengths, kind="stable")
    cuts, first = [], 0
    for i in range(1, len(descending)):
        if i - first >= smallest and lengths[descending[i]] < ratio * lengths[descending[first]]:
            cuts.append(i)
            first = i
    return np.split(descending, cuts)


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, T, D]
    key: torch.Tensor,  # [1, kv_heads, T, D]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedBatch,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each packed sequence: pads for the attention alone, then packs again."""

    longest = max(index.shape[1] for index in packed.buckets)
    windowed = sliding_window is not None and sliding_window < longest
    if windowed or softcap is not None or s_aux is not None:
        raise ValueError("packed attention has no sliding window, soft cap or sinks")

    def rows(states: torch.Tensor) -> torch.Tensor:  # [1, h, T, D] -> [T + 1, h, D], the last row zero
        return torch.nn.functional.pad(states[0].transpose(0, 1), (0, 0, 0, 0, 0, 1))

    rows_q, rows_k, rows_v = rows(query), rows(key), rows(value)
    outputs = []
    for index in packed.buckets:
        out = torch.nn.functional.scaled_dot_product_attention(
            rows_q[index].transpose(1, 2),
            rows_k[index].transpose(1, 2),
            rows_v[index].transpose(1, 2),
            is_causal=True,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(out.transpose(1, 2).reshape(-1, *rows_q.shape[1:]))
    return torch.cat(outputs)[packed.order].unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)


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
    """Last hidden states of a packed batch, [T, H]."""
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
    trained: torch.Tensor,  # [T] bool, on the CPU: tokens whose log-prob is wanted
    *,
    temperature: float = 1.0,
    backend: str = "auto",
) -> LogpEntropy:
    """Log-prob and entropy (nats) of the marked tokens, each given its own prefix; float32 [number marked].

    A token at the start of a sequence has no prefix and cannot be marked. Raises ValueError for a model whose
    attention does more than this forward computes.
    """
    if isinstance(model, PolicyModule):
        return model(batch, trained, temperature=temperature, backend=backend)
    assert not batch.ids.is_cpu or not bool(trained[batch.cu_seqlens[:-1].long()].any()), "a first token has no prefix"
    targets = trained.nonzero().squeeze(-1).to(batch.ids.device)
    hidden = packed_hidden(model, batch)[targets - 1]
    head = model.get_output_embeddings()
    logit_scale, softcap = logit_options(model.config)
    return linear_logp_entropy(
        hidden,
        head.weight,
        batch.ids[targets],
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
