"""Dense float64 definitions for the kernel tests: straight from the formulas, gradients by autograd."""

from __future__ import annotations

import torch
from autotool_kernels import backends
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")
# The CUDA C++ extension serves the two ops on logits, where it is built and there is a device.
LOGITS_BACKENDS = (*BACKENDS, "cuda") if backends()["cuda"].available else BACKENDS
# Triton's interpreter computes with numpy, which warns about -inf arithmetic that the kernels select away.
QUIET = "ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"


def logp_entropy(
    logits: Tensor, target: Tensor, temperature=1.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) of float64 logits [N, V]; zeros where ignored."""
    if isinstance(temperature, Tensor) and temperature.ndim:
        temperature = temperature[:, None]
    log_p = (logits / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    keep = target != ignore_index
    logp = log_p.gather(1, target.long().clamp(min=0)[:, None])[:, 0]
    return torch.where(keep, logp, 0.0), torch.where(keep, entropy, 0.0)


def linear(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature=1.0, ignore_index: int = -100,
    bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logp_entropy(logits, target, temperature, ignore_index)


def policy_loss(
    logp, old_logp, entropy, advantages, cu_seqlens, mask, is_short, *, clip_low=0.2, clip_high=0.2,
    target_short=0.1, target_long=0.2, beta_short=0.0, beta_long=0.01, normalize="tokens",
):  # fmt: skip
    """Loss of the docstring's formula, one Python loop per sequence -> (loss, H [B])."""
    terms, means = [], []
    for i in range(len(advantages)):
        span = torch.arange(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        span = span[mask[span].bool().cpu()]
        e = entropy[span]
        mean = e.mean() if len(span) else entropy.new_zeros(())
        rho = (logp[span] - old_logp[span]).exp()
        pg = -torch.minimum(rho * advantages[i], rho.clamp(1 - clip_low, 1 + clip_high) * advantages[i])
        kind = int(is_short[i])
        target, beta = {1: (target_short, beta_short), 0: (target_long, beta_long)}.get(kind, (0.0, 0.0))
        beta = float(beta) if kind in (0, 1) and float(mean.detach()) <= float(target) else 0.0
        terms.append((pg, e, beta))
        means.append(mean)
    if normalize == "sequences":
        loss = sum(((p - b * e).mean() if len(e) else e.sum()) for p, e, b in terms) / len(terms)
    else:
        count = sum(len(e) for _, e, _ in terms)
        loss = sum((p - b * e).sum() for p, e, b in terms) / (count if normalize == "tokens" else normalize)
    return loss, torch.stack(means)


def gradients(outputs, inputs, upstream):
    """Gradients of sum_k <upstream_k, outputs_k> with respect to inputs."""
    return torch.autograd.grad(sum((o * u).sum() for o, u in zip(outputs, upstream, strict=True)), inputs)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over the expected norm."""
    difference = actual.double() - expected.double()
    return (difference.norm() / expected.double().norm().clamp(min=1e-300)).item()
