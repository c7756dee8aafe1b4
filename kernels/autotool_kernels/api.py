"""The four public functions: defaults and documentation in front of the registered ops; `arguments` checks."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import (
    check_index,
    check_policy,
    check_reusable,
    check_rows,
    check_sample,
    check_store,
    gate_arguments,
    head_options,
    linear_inputs,
    normalization,
    scaling,
)
from .dispatch import check_backend
from .library import ops
from .policy import METRICS
from .results import LogpEntropy, PolicyLoss, SampledTokens


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
    rounded to the low precision. Under torch.autocast all but float64 are first cast to its dtype, as `F.linear`
    does, and gradients come back in the dtypes of the arguments. logit_scale and softcap are those of Granite, Cohere
    and Gemma heads (a logit *divisor* d is logit_scale = 1 / d). temperature is a positive number, or a tensor [] or
    [N] (not differentiable). Rows whose target is `ignore_index` give zeros and exactly zero gradients. Returns
    (logp [N] <= 0, entropy [N] >= 0) in nats, float32 (float64 for float64 inputs); both carry gradients to
    hidden, weight and bias.

    The backward computes the logits again. `store_bytes` lets the forward keep those of the first rows, up to that
    many bytes, and saves their product: all N rows take N V 2 bytes (2.03 with the maxima) for bfloat16 and float16
    inputs, N V 4 for float32. Gradients are the same to rounding; for low-precision inputs a logit is then wrong by
    at most 2^-11 of its distance to the largest of its 128 neighbours, so probable tokens are nearly exact. Nothing
    is kept when no gradient is wanted.

    Raises ValueError or TypeError naming the argument; a label outside 0..V-1 raises on a CPU, and gives a
    NaN logp on other devices, where looking would stop the host. There are no second derivatives. torch.compile
    makes a graph for each value of a number and gives up after eight: a temperature that changes has to be a tensor.
    """
    hidden, weight, bias = linear_inputs(hidden, weight, target, bias)
    softcap = head_options(logit_scale, softcap)
    check_store(store_bytes)
    check_index(ignore_index)
    check_backend(backend)
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
    (a leaf, a view of one, and rows that share memory are refused), and a second backward, or another one that
    saved the logits, fails with PyTorch's error about a modified tensor. Inside torch.compile the flag has no
    effect: the compiler plans the memory itself.

    Everything else as in `linear_logp_entropy`.
    """
    check_rows("logits", logits, target)
    if logits.shape[1] < 1:
        raise ValueError("logits must have at least one column")
    check_index(ignore_index)
    check_backend(backend)
    inplace = bool(inplace_backward) and not torch.compiler.is_compiling()
    if inplace:
        check_reusable(logits)
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
    normalize: str | float | Tensor = "tokens",
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
    belongs to a whole response: pass whole sequences. Targets, coefficients and c may be numbers or 0-d
    tensors; H_i and entropies are in nats. torch.compile makes a graph for each value of a number, and gives up
    after eight: what changes from step to step, such as a token count c, has to be a tensor there.

    Returns (loss [], sequence_entropy [B] = H_i detached, metrics: dict of 0-d float32 tensors, see
    `policy.METRICS`).
    """
    check_policy(logp, old_logp, entropy, advantages, cu_seqlens, mask, is_short, clip_low, clip_high)
    check_backend(backend)
    mode, constant, divisor = normalization(normalize, logp)
    gate, gate_tensor = gate_arguments(logp, target_short, target_long, beta_short, beta_long)
    loss, sequence_entropy, metrics, _, _ = ops.policy_loss(
        logp, old_logp.detach(), entropy, advantages.detach(), cu_seqlens, mask.bool(), is_short, gate,
        gate_tensor, clip_low, clip_high, mode, constant, backend,
    )  # fmt: skip
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    if divisor is not None:
        loss = loss / divisor
        named.update({name: named[name] / divisor.to(metrics.dtype) for name in ("policy_loss", "entropy_bonus")})
    return PolicyLoss(loss, sequence_entropy, named)


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
    check_sample(logits, seed, offset)
    check_backend(backend)
    scale, row_temperature = scaling(temperature, logits, zero_is_greedy=True)
    return SampledTokens(*ops.sample_logp_entropy(logits.detach(), scale, row_temperature, seed, offset, backend))
