"""Attention of the packed training forward, attached to any Hugging Face decoder by `AttentionInterface`.

Three backends compute the same: flash-attn and torch's `varlen_attn`, variable-length kernels for 16-bit tensors on a
GPU, and torch's scaled dot product attention (SDPA), which takes padded batches and everything else. Which one serves
follows from the setting `model.attention` and from the tensors; what attends to what is planned in `packing`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from autotool_fast.config import FLASH_MODULES
from autotool_fast.errors import UserError
from autotool_fast.packing import PackedBatch, Varlen

PACKED_ATTENTION = "autotool_packed"
LARGEST_HEAD = 256
"""Head size up to which the variable-length kernels go; it is a multiple of 8 for them."""
TIPS = {
    "flash": 'pip install "autotool_fast[flash]" (compiled for this torch), or use auto',
    "varlen": "install torch for CUDA, 2.11 or newer, or use auto",
}

Kernel = Callable[[Tensor, Tensor, Tensor, Varlen, float | None], Tensor]
"""(query [T, heads, D], key [K, kv_heads, D], value, plan, scale) -> [T, heads, D]; causal, aligned at the ends."""


@dataclass(frozen=True)
class Choice:
    """A backend's name, its kernel (None for SDPA), and why none before it was taken ("" if it is the first)."""

    name: str
    kernel: Kernel | None
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


@lru_cache
def select(setting: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> Choice:
    """The backend that serves tensors of this kind.

    Args:
        setting: of `model.attention`.
        head_dim: size of a head; None if it is not known yet.

    Raises:
        UserError: the setting names a backend that is not installed, or that does not take such tensors.
    """
    if setting == "sdpa":
        return Choice("sdpa", None)
    unfit = _unfit(device, dtype, head_dim)
    if setting != "auto":
        kernel = None if unfit else _find(setting, device)
        if kernel is None:
            remedy = "use auto" if unfit else TIPS[setting]
            raise UserError(unfit or "cannot be loaded", where=f"model.attention {setting}", remedy=remedy)
        return Choice(setting, kernel)
    if unfit:
        return Choice("sdpa", None, f"the first choice {unfit}")
    absent: list[str] = []
    for name in ("flash", "varlen"):
        if kernel := _find(name, device):
            return Choice(name, kernel, ", ".join(absent))
        absent.append(f"{name} cannot be loaded")
    return Choice("sdpa", None, ", ".join(absent))


def _unfit(device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why variable-length kernels do not take such tensors, or None."""
    if device.type != "cuda":
        return f"needs a GPU, not device {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs 16-bit weights (model.dtype bfloat16), not {str(dtype).removeprefix('torch.')}"
    if head_dim is not None and (head_dim > LARGEST_HEAD or head_dim % 8):
        return f"takes heads of a multiple of 8 up to {LARGEST_HEAD} dimensions, not {head_dim}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs a GPU of compute capability 8.0 or more, not {torch.cuda.get_device_name(device)}"
    return None


def _find(name: str, device: torch.device) -> Kernel | None:
    """A backend, if it can be loaded; of flash-attn's versions the third on the GPUs that it is for."""
    if name == "varlen":
        function = _load("torch.nn.attention.varlen", "varlen_attn")
        return _varlen(function) if function else None
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    for module in FLASH_MODULES if hopper else FLASH_MODULES[1:]:
        if function := _load(module, "flash_attn_varlen_func"):
            return _flash(function)
    return None


def _load(module: str, name: str) -> Callable[..., Any] | None:
    try:
        return getattr(import_module(module), name)
    except (ImportError, OSError, AttributeError):  # also one that was compiled for another torch
        return None


def _flash(function: Callable[..., Any]) -> Kernel:
    def attend(query: Tensor, key: Tensor, value: Tensor, plan: Varlen, scale: float | None) -> Tensor:
        out = function(
            query,
            key,
            value,
            cu_seqlens_q=plan.cu_seqlens_q,
            cu_seqlens_k=plan.cu_seqlens_k,
            max_seqlen_q=plan.max_seqlen_q,
            max_seqlen_k=plan.max_seqlen_k,
            softmax_scale=scale,
            causal=True,
        )
        return out[0] if isinstance(out, tuple) else out  # some releases add the log-sum-exp

    return attend


def _varlen(function: Callable[..., Any]) -> Kernel:
    # torch 2.11 takes fewer key-value heads than query heads without being told.
    options = {"enable_gqa": True} if "enable_gqa" in inspect.signature(function).parameters else {}

    def attend(query: Tensor, key: Tensor, value: Tensor, plan: Varlen, scale: float | None) -> Tensor:
        return function(
            query,
            key,
            value,
            plan.cu_seqlens_q,
            plan.cu_seqlens_k,
            plan.max_seqlen_q,
            plan.max_seqlen_k,
            scale=scale,
            window_size=(-1, 0),
            **options,
        )

    return attend


def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, kv_heads, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedBatch,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a packed row."""
    windowed = sliding_window is not None and sliding_window < packed.longest
    if windowed or softcap is not None or s_aux is not None:
        raise ValueError("packed attention has no sliding window, soft cap or sinks")
    kernel = None if dropout else select(packed.attention, query.device, query.dtype, query.shape[-1]).kernel
    if kernel is None:
        return _padded(query, key, value, packed, scaling, dropout).unsqueeze(0), None
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    rows = packed.varlen.kv_rows
    if rows is not None:
        key, value = key[rows], value[rows]
    return kernel(query, key, value, packed.varlen, scaling).unsqueeze(0), None


def _padded(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, scale: float | None, dropout: float
) -> Tensor:
    """SDPA over padded buckets, packed again: [T, heads, D]."""

    def rows(states: Tensor) -> Tensor:  # [1, h, T, D] -> [T + 1, h, D], the last row zero
        return torch.nn.functional.pad(states[0].transpose(0, 1), (0, 0, 0, 0, 0, 1))

    rows_q, rows_k, rows_v = rows(query), rows(key), rows(value)
    outputs = []
    for bucket in packed.buckets.members:
        keys = bucket.queries if bucket.keys is None else bucket.keys
        out = torch.nn.functional.scaled_dot_product_attention(
            rows_q[bucket.queries].transpose(1, 2),
            rows_k[keys].transpose(1, 2),
            rows_v[keys].transpose(1, 2),
            attn_mask=bucket.mask,
            is_causal=bucket.mask is None,
            scale=scale,
            dropout_p=dropout,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(out.transpose(1, 2).reshape(-1, *rows_q.shape[1:]))
    return torch.cat(outputs)[packed.buckets.order]


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
