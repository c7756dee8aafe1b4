"""Checks of the public functions' arguments, and the form in which the ops take them.

Every error is one line that names the argument: TypeError for what it is, ValueError for its shape or value. Checks
use types, shapes and dtypes only, so they cost no device synchronisation and trace under torch.compile. Those that
must read values (labels in range, positive per-row temperatures, cu_seqlens, is_short) are made by the CPU path alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .policy import NORMALIZE_CONSTANT, NORMALIZE_SEQUENCES, NORMALIZE_TOKENS
from .reference import compute_dtype

_INTEGERS = (torch.int32, torch.int64)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 2**63 - 1


def linear_inputs(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias of a linear head, checked against each other; under autocast cast to its dtype."""
    for name, value in (("hidden", hidden), ("weight", weight)):
        check_tensor(name, value)
    if bias is not None:
        check_tensor("bias", bias)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    check_rows("hidden", hidden, target)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"weight must be [V, {hidden.shape[1]}] like hidden, V >= 1: got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], one number per row of weight: got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            if tensor.dtype != hidden.dtype:
                raise TypeError(f"{name} must have the dtype of hidden ({hidden.dtype}): got {tensor.dtype}")
            check_device(name, tensor, hidden)
    return hidden, weight, bias


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast does to the operands of a matrix product: float64 and integers stay."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype not in _FLOATS[1:] else t.to(dtype) for t in tensors]


def head_options(logit_scale: float, softcap: float | None) -> float:
    """Checks the options of a head; the softcap as the ops take it (0 for none)."""
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if name == "softcap" and value is None:
            continue
        check_number(name, value)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite{', or None' * (name == 'softcap')}: got {value}")
    return 0.0 if softcap is None else float(softcap)


def check_store(store_bytes: int) -> None:
    """A number of bytes that a 64-bit op argument holds; else ValueError."""
    if not _is_integer(store_bytes) or not 0 <= store_bytes <= _LARGEST:
        raise ValueError(f"store_bytes must be a number of bytes, 0 to 2^63 - 1: got {store_bytes!r}")


def check_index(ignore_index: int) -> None:
    """A 64-bit integer; else ValueError."""
    if not _is_integer(ignore_index) or not -_LARGEST <= ignore_index <= _LARGEST:
        raise ValueError(f"ignore_index must be a 64-bit integer: got {ignore_index!r}")


def check_rows(name: str, rows: Tensor, target: Tensor) -> None:
    """Rows [N, anything] and one label for each."""
    check_tensor(name, rows)
    check_tensor("target", target)
    if rows.ndim != 2:
        raise ValueError(f"{name} must have two dimensions (flatten leading ones): got {list(rows.shape)}")
    check_floating(name, rows)
    if target.shape != rows.shape[:1]:
        raise ValueError(f"target must be [{rows.shape[0]}], one label per row of {name}: got {list(target.shape)}")
    if target.dtype not in _INTEGERS:
        raise TypeError(f"target must be int32 or int64: got {target.dtype}")
    check_device("target", target, rows)


def check_reusable(logits: Tensor) -> None:
    """Whether a backward may overwrite logits [N, V]."""
    base = logits._base if logits._is_view() else logits
    if logits.requires_grad and base.requires_grad and base.is_leaf:
        what = "a leaf" if base is logits else "a view of a leaf"
        raise ValueError(f"logits must not be {what} that requires a gradient when inplace_backward=True")
    (step, size), (far_step, far_size) = sorted(zip(logits.stride(), logits.shape, strict=True))
    if (size > 1 and step == 0) or (far_size > 1 and size and far_step <= (size - 1) * step):
        raise ValueError("logits must not be expanded when inplace_backward=True: rows or columns share their memory")


def check_policy(
    logp: Tensor, old_logp: Tensor, entropy: Tensor, advantages: Tensor, cu_seqlens: Tensor, mask: Tensor,
    is_short: Tensor, clip_low: float, clip_high: float,
) -> None:  # fmt: skip
    """Shapes, dtypes and devices of `policy_loss`: ValueError or TypeError names the argument."""
    tensors = {
        "logp": logp, "old_logp": old_logp, "entropy": entropy, "mask": mask, "advantages": advantages,
        "is_short": is_short, "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    if logp.ndim != 1:
        raise ValueError(f"logp must be a floating-point vector [T]: got {logp.dtype} {list(logp.shape)}")
    for name in ("logp", "old_logp", "entropy"):
        check_floating(name, tensors[name])
    for name in ("old_logp", "entropy", "mask"):
        if tensors[name].shape != logp.shape:
            shape = list(tensors[name].shape)
            raise ValueError(f"{name} must have the shape of logp, {list(logp.shape)}: got {shape}")
    if advantages.ndim != 1:
        raise ValueError(f"advantages must be a vector [B]: got {list(advantages.shape)}")
    if is_short.shape != advantages.shape:
        shapes = f"{list(advantages.shape)}: got {list(is_short.shape)}"
        raise ValueError(f"is_short must have the shape of advantages, {shapes}")
    n_seq = advantages.shape[0]
    if cu_seqlens.shape != (n_seq + 1,) or cu_seqlens.dtype not in _INTEGERS:
        got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens must be int32 or int64 [{n_seq + 1}]: got {got}")
    for name, tensor in tensors.items():
        check_device(name, tensor, logp)
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        check_number(name, value)
        if not value >= 0:
            raise ValueError(f"{name} must not be negative: got {value}")


def check_sample(logits: Tensor, seed: Tensor, offset: Tensor) -> None:
    """Shapes, dtypes and devices of `sample_logp_entropy`: ValueError or TypeError names the argument."""
    for name, tensor in (("logits", logits), ("seed", seed), ("offset", offset)):
        check_tensor(name, tensor)
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must be floating-point [B, V], V >= 1: got {logits.dtype} {list(logits.shape)}")
    check_floating("logits", logits)
    for name, tensor in (("seed", seed), ("offset", offset)):
        if tensor.shape != logits.shape[:1] or tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 [{logits.shape[0]}]: got {tensor.dtype} {list(tensor.shape)}")
        check_device(name, tensor, logits)


def scaling(temperature: float | Tensor, rows: Tensor, zero_is_greedy: bool = False) -> tuple[float, Tensor | None]:
    """A temperature as the ops take it: (number, None) or (1, tensor [N] in the compute dtype)."""
    if isinstance(temperature, Tensor):
        if (temperature.ndim and temperature.shape != rows.shape[:1]) or not temperature.is_floating_point():
            raise ValueError(
                f"temperature must be a number or a floating-point tensor [] or [{rows.shape[0]}]: "
                f"got {temperature.dtype} {list(temperature.shape)}"
            )
        check_device("temperature", temperature, rows)
        return 1.0, temperature.detach().to(compute_dtype(rows.dtype)).expand(rows.shape[0])
    check_number("temperature", temperature, "a number or a tensor")
    # Comparisons only: math.isfinite does not trace a symbolic float.
    if not (0 < temperature < float("inf") or (zero_is_greedy and temperature == 0)):
        raise ValueError(f"temperature must be positive{' or 0' * zero_is_greedy} and finite: got {temperature}")
    return float(temperature), None


def normalization(normalize: str | float | Tensor, like: Tensor) -> tuple[int, float, Tensor | None]:
    """(mode, constant, divisor or None) of `policy_loss`; a divisor is applied to what the op returns."""
    if isinstance(normalize, Tensor):
        _check_scalar("normalize", normalize, like)
        dtype = torch.promote_types(like.dtype, torch.float32)
        divisor = normalize.detach().to(device=like.device, dtype=dtype, non_blocking=True)
        return NORMALIZE_CONSTANT, 1.0, divisor
    if isinstance(normalize, str) and normalize == "tokens":
        return NORMALIZE_TOKENS, 1.0, None
    if isinstance(normalize, str) and normalize == "sequences":
        return NORMALIZE_SEQUENCES, 1.0, None
    if _is_number(normalize) and 0 < normalize < float("inf"):
        return NORMALIZE_CONSTANT, float(normalize), None
    raise ValueError(f"normalize must be 'tokens', 'sequences' or a positive number: got {normalize!r}")


def gate_arguments(
    like: Tensor, target_short: float | Tensor, target_long: float | Tensor, beta_short: float | Tensor,
    beta_long: float | Tensor,
) -> tuple[list[float], Tensor | None]:  # fmt: skip
    """Four numbers, or one tensor if any is a tensor, so that the host reads none."""
    values = {
        "target_short": target_short, "target_long": target_long, "beta_short": beta_short, "beta_long": beta_long
    }  # fmt: skip
    for name, value in values.items():
        if isinstance(value, Tensor):
            _check_scalar(name, value, like)
            continue
        check_number(name, value, "a number or a 0-d tensor")
        if value != value or (name.startswith("beta") and not -float("inf") < value < float("inf")):
            raise ValueError(f"{name} must not be {value}")
    if not any(isinstance(v, Tensor) for v in values.values()):
        return [float(v) for v in values.values()], None
    # H_i is compared in this dtype: a target rounded to bfloat16 would open other gates than the number does.
    new = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
    columns = [
        v.detach().to(**new) if isinstance(v, Tensor) else torch.full((), v, **new) for v in values.values()
    ]  # fmt: skip
    return [], torch.stack(columns)


def check_tensor(name: str, value: Tensor) -> None:
    """A dense tensor; else TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor: got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor: got {value.layout}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Of a floating-point type that the ops compute with; else TypeError."""
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be floating point (64, 32 or 16 bits): got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """On the device of `like`, the first argument; else ValueError."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the first argument: got {tensor.device}")


def check_number(name: str, value: float, what: str = "a number") -> None:
    """An int or float and no bool; else TypeError."""
    if not _is_number(value):
        raise TypeError(f"{name} must be {what}: got {type(value).__name__}")


def _check_scalar(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.ndim:
        raise ValueError(f"{name} must be a number or a 0-d tensor: got {list(tensor.shape)}")
    if tensor.device != like.device and tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on {like.device} like the first argument, or on cpu: got {tensor.device}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
