"""What the tuning tool times, and float64 truth for it: random tensors of one size, calls, and their errors.

The truth covers some rows and columns, straight from the definitions in README.md; it shares no code with the kernels
or with their PyTorch counterparts. A whole float64 result would not fit next to the tensors of a real model.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import triton_linear
from .configs import LinearConfig
from .reference import Head, RowStats, Store

SAMPLES = 32  # rows and columns compared with float64
# Errors allowed: max |dlogp|, max |dentropy| (nats), relative Frobenius of dX and of dW. In 16 bits the gradients
# carry the roundings of dL/dlogits and of the result, in bfloat16 up to 2^-8 of a number and 1.5e-3 in the root mean
# square each; in float32 the products are tf32x3, about 2^-21 per term, and dW takes the float32 statistics of a
# whole row.
ERRORS = {2: (5e-4, 1e-4, 4e-3, 3.5e-3), 4: (5e-5, 5e-5, 2e-5, 2e-5)}


class Shape(NamedTuple):
    """What settings are keyed by, besides the architecture and the number of tokens."""

    hidden: int
    vocab: int
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """Name of the dtype as in settings files."""
        return str(self.dtype).removeprefix("torch.")


class Workload:
    """Tensors of one (shape, tokens), float64 truth for some of their rows and columns, and the calls to time."""

    def __init__(self, shape: Shape, tokens: int, device: torch.device | str, seed: int = 0):
        g = torch.Generator(device=device).manual_seed(seed) if torch.device(device).type != "meta" else None
        new = {"device": device, "generator": g}
        self.shape, self.tokens = shape, tokens
        self.hidden = torch.randn(tokens, shape.hidden, **new).to(shape.dtype)
        # Logits of standard deviation 2: rows with an entropy of some nats, as a language model has.
        self.weight = (torch.randn(shape.vocab, shape.hidden, **new) * (2 * shape.hidden**-0.5)).to(shape.dtype)
        self.target = torch.randint(shape.vocab, (tokens,), **new)
        self.grad_logp, self.grad_entropy = torch.randn(2, tokens, **new)
        self.store = Store(self.weight.new_empty((0, shape.vocab)), self.grad_logp.new_empty((0, 0)))

    def run(self, kernel: str, config: LinearConfig) -> Any:
        """The shortest call that launches `kernel`."""
        if kernel == "forward":
            return self.forward(config)
        return self.backward(config, self.stats, kernel == "grad_hidden", kernel == "grad_weight")

    @cached_property
    def stats(self) -> RowStats:
        """Real ones: how much power a product draws, and so how fast it runs, depends on the numbers."""
        return self.forward(None)

    def forward(self, config: LinearConfig | None) -> RowStats:
        """The forward pass under a setting; None for the one in force."""
        return triton_linear.linear_forward(self.hidden, self.weight, self.target, Head(), config=config)[0]

    def backward(self, config: LinearConfig, stats: RowStats, need_hidden=True, need_weight=True):
        """The backward pass under a setting: the gradients that are needed."""
        return triton_linear.linear_backward(
            self.grad_logp, self.grad_entropy, self.hidden, self.weight, self.target, stats, self.store, Head(),
            need_hidden, need_weight, config=config,
        )  # fmt: skip

    @cached_property
    def truth(self) -> tuple[Tensor, RowStats, Tensor]:
        """Sampled row numbers, their statistics and dX in float64."""
        rows = sampled(self.tokens, self.hidden.device)
        weight = self.weight.double()
        z = self.hidden[rows].double() @ weight.T
        log_p = z.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        logp = log_p.gather(1, self.target[rows, None])[:, 0]
        row_max = z.amax(-1)
        stats = RowStats(logp, entropy, row_max, z.logsumexp(-1) - row_max)
        columns = torch.arange(self.shape.vocab, device=z.device)
        return rows, stats, self._dlogits(log_p, columns, rows, entropy) @ weight

    def _dlogits(self, log_p: Tensor, columns: Tensor, rows: Tensor, entropy: Tensor) -> Tensor:
        g, h = self.grad_logp[rows, None].double(), self.grad_entropy[rows, None].double()
        label = (self.target[rows, None] == columns).double()
        return g * label - log_p.exp() * (g + h * (log_p + entropy[:, None]))

    def error(self, kernel: str, config: LinearConfig) -> str | None:
        """What a candidate computes wrongly, or None; "forward" looks at the statistics, the others at dX and dW."""
        limits = ERRORS[self.shape.dtype.itemsize]
        rows, expected, dx = self.truth
        stats = self.forward(config)
        if kernel == "forward":
            found = [largest(getattr(stats, k)[rows] - getattr(expected, k)) for k in ("logp", "entropy")]
            names, limits = ("max |dlogp|", "max |dentropy|"), limits[:2]
        else:
            got_x, got_w, _ = self.backward(config, stats)
            columns = sampled(self.shape.vocab, self.hidden.device)
            every = torch.arange(self.tokens, device=self.hidden.device)
            hidden = self.hidden.double()
            log_p = hidden @ self.weight[columns].double().T - (stats.row_max.double() + stats.log_sum)[:, None]
            dw = self._dlogits(log_p, columns, every, stats.entropy.double()).T @ hidden
            found = [frobenius(got_x[rows], dx), frobenius(got_w[columns], dw)]
            names, limits = ("relative error of dX", "relative error of dW"), limits[2:]
        wrong = [f"{n} {f:.1e} > {top:.1e}" for n, f, top in zip(names, found, limits, strict=True) if not f <= top]
        return ", ".join(wrong) or None


def sampled(n: int, device: torch.device) -> Tensor:
    """Up to SAMPLES indices, first and last among them."""
    return torch.linspace(0, n - 1, min(n, SAMPLES), device=device, dtype=torch.float64).round().long()


def largest(difference: Tensor) -> float:
    """Largest absolute value."""
    return difference.abs().max().item()


def frobenius(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the error over that of the expected matrix."""
    return ((found - expected).norm() / expected.norm()).item()
