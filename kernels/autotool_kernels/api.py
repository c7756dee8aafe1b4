"""The four public functions: argument checks, defaults and documentation in front of the registered ops.

Checks here use shapes and dtypes only, so they cost no device synchronisation and trace under
torch.compile. Checks that must read values (labels in range, positive per-row temperatures, cu_seqlens) are
made by the CPU path alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import ops
from .policy import METRICS, NORMALIZE_CONSTANT, NORMALIZE_SEQUENCES, NORMALIZE_TOKENS
from .reference import compute_dtype
from .results import LogpEntropy, PolicyLoss, SampledTokens

_INTEGERS = (torch.int32, torch.int64)


def linear_logp_entropy(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N] int32 or int64
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    store_bytes: int = 0,
    backend: str = "auto",
) -> LogpEntropy:
    """Log-probability of `target` and entropy of softmax(z), without ever holding the N x V logits z.

        b = logit_scale * (hidden @ weight.T + bias);   c = softcap * tanh(b / softcap), or b;   z = c / temperature

    hidden, weight and bias share dtype (float64, float32, bfloat16, float16) and device; the logits are never
    rounded to the low precision. logit_scale and softcap are those of Granite, Cohere and Gemma heads (a logit
    *divisor* d is logit_scale = 1 / d). temperature is a positive number, or a tensor [] or [N] (not
    differentiable). Rows whose target is `ignore_index` give zeros and exactly zero gradients. Returns
    (logp [N] <= 0, entropy [N] >= 0) in nats, float32 (float64 for float64 inputs); both carry gradients to
    hidden, weight and bias.

    The backward computes the logits again. `store_bytes` lets the forward keep those of the first rows, up to that
    many bytes, and saves their product: all N rows take N V 2 bytes (2.03 with the maxima) for bfloat16 and float16
    inputs, N V 4 for float32. Gradients are the same to rounding; for low-precision inputs a logit is then wrong by
    at most 2^-8 of its distance to the largest of its 128 neighbours, so probable tokens are nearly exact. Nothing
    is kept when no gradient is wanted.

    Raises ValueError or TypeError naming the argument; a label outside 0..V-1 raises on a CPU, and gives a
    NaN logp on other devices, where looking would stop the host.
    """
    check_linear(hidden, weight, target, bias)
    softcap = check_head(logit_scale, softcap)
    store_bytes = check_store(store_bytes)
    scale, row_temperature = scaling(temperature, hidden)
    wanted = torch.is_grad_enabled() and (
        hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    logp, entropy, *_ = ops.linear_logp_entropy(
        hidden, weight, target, bias, row_temperature, scale, logit_scale, softcap, ignore_index, backend,
        store_bytes if wanted else 0,
    )  # fmt: skip
    return LogpEntropy(logp, entropy)


def logits_logp_entropy(
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N] int32 or int64
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> LogpEntropy:
    """Log-probability of `target` and entropy of softmax(logits / temperature), with gradients to logits.

    logits may have any row stride and may hold -inf (a masked token has probability 0 and adds nothing to
    the entropy).

    inplace_backward: the backward overwrites the logits with their gradient, which saves the memory of another
    N x V. Then the logits must come from an operation that does not need its own output, as a matrix product
    (a leaf or an expanded tensor is refused), and a second backward, or another one that saved the logits, fails
    with PyTorch's error about a modified tensor. Inside torch.compile the flag has no effect: the compiler
    plans the memory itself.

    Everything else as in `linear_logp_entropy`.
    """
    _check_rows("logits", logits, target)
    if logits.shape[1] < 1:
        raise ValueError("logits must have at least one column")
    if inplace_backward and logits.requires_grad and logits.is_leaf:
        raise ValueError("logits must not be a leaf that requires a gradient when inplace_backward=True")
    if inplace_backward and any(step == 0 < size - 1 for step, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError("logits must not be expanded when inplace_backward=True: rows or columns share their memory")
    inplace = inplace_backward and not torch.compiler.is_compiling()
    scale, row_temperature = scaling(temperature, logits)
    logp, entropy, _, _ = ops.logits_logp_entropy(
        logits, target, scale, row_temperature, ignore_index, backend, inplace
    )
    return LogpEntropy(logp, entropy)


def policy_loss(
    logp: Tensor,  # [T]
    old_logp: Tensor,  # [T]
    entropy: Tensor,  # [T]
    advantages: Tensor,  # [B]
    cu_seqlens: Tensor,  # [B + 1] int32 or int64
    mask: Tensor,  # [T]
    is_short: Tensor,  # [B]
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    target_short: float | Tensor = 0.1,
    target_long: float | Tensor = 0.2,
    beta_short: float | Tensor = 0.0,
    beta_long: float | Tensor = 0.01,
    normalize: str | float = "tokens",
    backend: str = "auto",
) -> PolicyLoss:
    """Clipped policy gradient with the decoupled entropy terms of AutoTool (arXiv 2603.13348).

    Sequence i is tokens cu_seqlens[i]..cu_seqlens[i+1]; `mask` marks its trained tokens (holes allowed) and
    n_i counts them. With rho_t = exp(logp_t - old_logp_t), A_i = advantages[i] and e_t = entropy_t:

        pg_t   = -min(rho_t A_i, clip(rho_t, 1 - clip_low, 1 + clip_high) A_i)
        H_i    = 1/n_i sum_t e_t                                  over trained tokens; 0 if there are none
        beta_i = beta_short 1[H_i <= target_short]  if is_short[i] == 1
                 beta_long  1[H_i <= target_long]   if is_short[i] == 0
                 0                                  otherwise (-1: malformed response)
        "tokens"     L = 1/sum_i n_i  sum_i sum_t (pg_t - beta_i e_t)
        "sequences"  L = 1/B          sum_i (mean_t pg_t - beta_i H_i)
        a number c   L = 1/c          sum_i sum_t (pg_t - beta_i e_t)

    beta_i is detached; e_t is not. The loss has gradients to logp and entropy only. A sequence without
    trained tokens adds 0 (and still counts in B); without any, the loss is a differentiable zero. H_i
    belongs to a whole response: pass whole sequences. Targets and coefficients may be numbers or 0-d
    tensors; H_i and entropies are in nats.

    Returns (loss [], sequence_entropy [B] = H_i detached, metrics: dict of 0-d float32 tensors, see
    `policy.METRICS`).
    """
    n_tok, n_seq = (
        logp.shape[0] if logp.ndim == 1 else -1,
        advantages.shape[0] if advantages.ndim == 1 else -1,
    )
    if n_tok < 0 or not logp.is_floating_point():
        raise ValueError(f"logp must be a floating-point vector [T]: got {logp.dtype} {list(logp.shape)}")
    for name, tensor in (("old_logp", old_logp), ("entropy", entropy), ("mask", mask)):
        if tensor.shape != logp.shape:
            raise ValueError(f"{name} must have the shape of logp, [{n_tok}]: got {list(tensor.shape)}")
        _check_device(name, tensor, logp)
    if n_seq < 0:
        raise ValueError(f"advantages must be a vector [B]: got {list(advantages.shape)}")
    if is_short.shape != advantages.shape:
        raise ValueError(f"is_short must have the shape of advantages, [{n_seq}]: got {list(is_short.shape)}")
    if cu_seqlens.shape != (n_seq + 1,) or cu_seqlens.dtype not in _INTEGERS:
        raise ValueError(
            f"cu_seqlens must be int32 or int64 [{n_seq + 1}]: got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    for name, tensor in (("advantages", advantages), ("cu_seqlens", cu_seqlens), ("is_short", is_short)):
        _check_device(name, tensor, logp)
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative: got {value}")
    mode, constant = _normalization(normalize)
    gate, gate_tensor = _gate(logp, target_short, target_long, beta_short, beta_long)
    loss, sequence_entropy, metrics, _, _ = ops.policy_loss(
        logp, old_logp.detach(), entropy, advantages.detach(), cu_seqlens, mask.bool(), is_short, gate,
        gate_tensor, clip_low, clip_high, mode, constant, backend,
    )  # fmt: skip
    return PolicyLoss(loss, sequence_entropy, dict(zip(METRICS, metrics.unbind(), strict=True)))


def sample_logp_entropy(
    logits: Tensor,  # [B, V]
    *,
    temperature: float | Tensor = 1.0,
    seed: Tensor,  # [B] int64
    offset: Tensor,  # [B] int64
    backend: str = "auto",
) -> SampledTokens:
    """Draws one token per row from softmax(logits / temperature), with its log-prob and the row's entropy.

    A row's token depends on (logits row, temperature, seed, offset) alone, whatever else is in the batch:
    advance `offset` by one per decoded token. temperature is a number or a tensor [] or [B]; 0 takes the
    first largest logit and reports logp and entropy at temperature 1. Returns (token [B] int64, logp [B],
    entropy [B]) without gradients.
    """
    if logits.ndim != 2 or logits.shape[1] < 1 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating-point [B, V], V >= 1: got {logits.dtype} {list(logits.shape)}")
    for name, tensor in (("seed", seed), ("offset", offset)):
        if tensor.shape != logits.shape[:1] or tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 [{logits.shape[0]}]: got {tensor.dtype} {list(tensor.shape)}")
        _check_device(name, tensor, logits)
    scale, row_temperature = scaling(temperature, logits, zero_is_greedy=True)
    return SampledTokens(*ops.sample_logp_entropy(logits.detach(), scale, row_temperature, seed, offset, backend))


def check_linear(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    """Shapes, dtypes and devices of the tensors of a linear head; ValueError or TypeError names the argument."""
    _check_rows("hidden", hidden, target)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"weight must be [V, {hidden.shape[1]}] like hidden, V >= 1: got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], one number per row of weight: got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            if tensor.dtype != hidden.dtype:
                raise TypeError(f"{name} must have the dtype of hidden ({hidden.dtype}): got {tensor.dtype}")
            _check_device(name, tensor, hidden)


def check_head(logit_scale: float, softcap: float | None) -> float:
    """The softcap as the ops take it (0 for none)."""
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if isinstance(value, bool) or not (isinstance(value, (int, float)) or (name == "softcap" and value is None)):
            raise TypeError(f"{name} must be a number: got {type(value).__name__}")
    if not 0 < logit_scale < float("inf"):
        raise ValueError(f"logit_scale must be positive and finite: got {logit_scale}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, or None: got {softcap}")
    return 0.0 if softcap is None else float(softcap)


def check_store(store_bytes: int) -> int:
    if not isinstance(store_bytes, int) or store_bytes < 0:
        raise ValueError(f"store_bytes must be a number of bytes, 0 or more: got {store_bytes!r}")
    return store_bytes


def _check_rows(name: str, rows: Tensor, target: Tensor) -> None:
    if rows.ndim != 2:
        raise ValueError(f"{name} must have two dimensions (flatten leading ones): got {list(rows.shape)}")
    if not rows.is_floating_point():
        raise TypeError(f"{name} must be floating point: got {rows.dtype}")
    if target.shape != rows.shape[:1]:
        raise ValueError(f"target must be [{rows.shape[0]}], one label per row of {name}: got {list(target.shape)}")
    if target.dtype not in _INTEGERS:
        raise TypeError(f"target must be int32 or int64: got {target.dtype}")
    _check_device("target", target, rows)


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the first argument: got {tensor.device}")


def scaling(temperature, rows: Tensor, zero_is_greedy: bool = False) -> tuple[float, Tensor | None]:
    """A temperature as the ops take it: (number, None) or (1, tensor [N] in the compute dtype)."""
    if isinstance(temperature, Tensor):
        if (temperature.ndim and temperature.shape != rows.shape[:1]) or not temperature.is_floating_point():
            raise ValueError(
                f"temperature must be a number or a floating-point tensor [] or [{rows.shape[0]}]: "
                f"got {temperature.dtype} {list(temperature.shape)}"
            )
        _check_device("temperature", temperature, rows)
        return 1.0, temperature.detach().to(compute_dtype(rows.dtype)).expand(rows.shape[0])
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number or a tensor: got {type(temperature).__name__}")
    # Comparisons only: math.isfinite does not trace a symbolic float.
    if not (0 < temperature < float("inf") or (zero_is_greedy and temperature == 0)):
        raise ValueError(f"temperature must be positive{' or 0' * zero_is_greedy} and finite: got {temperature}")
    return float(temperature), None


def _normalization(normalize: str | float) -> tuple[int, float]:
    if normalize == "tokens":
        return NORMALIZE_TOKENS, 1.0
    if normalize == "sequences":
        return NORMALIZE_SEQUENCES, 1.0
    if isinstance(normalize, (int, float)) and normalize > 0:
        return NORMALIZE_CONSTANT, float(normalize)
    raise ValueError(f"normalize must be 'tokens', 'sequences' or a positive number: got {normalize!r}")


def _gate(like: Tensor, *values: float | Tensor) -> tuple[list[float], Tensor | None]:
    """Four numbers, or one tensor if any is a tensor, so that the host reads none."""
    if not any(isinstance(v, Tensor) for v in values):
        return [float(v) for v in values], None
    columns = [v.detach().to(like) if isinstance(v, Tensor) else like.new_full((), v) for v in values]
    return [], torch.stack(columns)
