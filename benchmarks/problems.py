"""Inputs of the kernel benchmarks, and what they should give in float64.

Two kinds of rows. "random": hidden states and weights independent and dense, logits of standard deviation 1, entropy
near ln V, targets uniform (the habit of kernel benchmarks). "peaked": rows as a trained policy has them, each hidden
state aligned with one weight row until its distribution has a wanted entropy, drawn log-normally with median 0.3 nat
and 20 % above 1 nat; the target is that row with its probability, else another token. `Problem.median_entropy` and
`above_one_nat` say what came out.

Shares. `active` is the share of rows with a target (the others hold -100, in spans of 64, like prompts and tool
output); `zero_advantage` the share of the active rows whose two upstream gradients are zero (in spans of 256, like
groups without advantage).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100
MEDIAN_ENTROPY, ABOVE_ONE_NAT = 0.3, 0.2
_SPREAD = math.log(1 / MEDIAN_ENTROPY) / 0.8416  # 0.8416: the normal distribution's 80th percentile
_SPAN, _GROUP = 64, 256
_ROWS, _VOCAB_TILE = 2048, 16384
DATA = ("random", "peaked")


class Upstream(NamedTuple):
    """dL/dlogp and dL/dentropy of every row."""

    logp: Tensor  # [N]
    entropy: Tensor | None  # [N]; None: the loss does not use the entropy


@dataclass(frozen=True)
class Problem:
    """A head, its rows and the gradients that come back to them."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [N] int64, IGNORE where there is no token
    live: Tensor  # [n] indices of the active rows
    paid: Tensor  # [N] 1.0 where the upstream gradients are not zero
    noise: Tensor  # [2, N] float32
    data: str
    active: float
    zero_advantage: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, H, V)."""
        return self.hidden.shape[0], self.hidden.shape[1], self.weight.shape[0]

    def upstream(self, entropy: bool, per_token: bool) -> Upstream:
        """Gradients per token, or the same for every active row where an op takes only a sum over tokens."""
        n = max(1, len(self.live))
        if per_token:
            g, h = self.noise * self.paid / n
        else:
            g = h = (self.target != IGNORE).float() / n
        return Upstream(g, h if entropy else None)

    def label(self) -> str:
        """Shape and data in one phrase."""
        n, h, v = self.shape
        shares = f"active {self.active:.0%}, zero advantage {self.zero_advantage:.0%}"
        return f"N={n} H={h} V={v} {str(self.hidden.dtype).removeprefix('torch.')}, {self.data} rows, {shares}"


def make_problem(
    n: int,
    hidden_size: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    data: str = "random",
    active: float = 1.0,
    zero_advantage: float = 0.0,
    seed: int = 0,
) -> Problem:
    """Random inputs; the same seed gives the same ones on the same device."""
    if data not in DATA:
        raise ValueError(f"data must be one of {', '.join(DATA)}: got {data!r}")
    make = torch.Generator(device=device).manual_seed(seed)
    weight = torch.empty(vocab, hidden_size, dtype=dtype, device=device)
    for rows in _slices(vocab, _VOCAB_TILE):  # in pieces: float32 of a large head would double its memory
        shape = weight[rows].shape
        weight[rows] = torch.randn(shape, generator=make, device=device).div_(math.sqrt(hidden_size))
    hidden = torch.randn(n, hidden_size, generator=make, device=device)
    target = torch.randint(vocab, (n,), generator=make, device=device)
    if data == "peaked":
        hidden, target = _peaked(hidden, weight, target, make)
    on = _spans(n, _SPAN, 1 - active, make)
    target = torch.where(on, target, IGNORE)
    live = on.nonzero()[:, 0]
    paid = torch.zeros(n, device=device)
    paid[live] = _spans(len(live), _GROUP, zero_advantage, make).float()
    noise = torch.randn(2, n, generator=make, device=device)
    return Problem(hidden.to(dtype), weight, target, live, paid, noise, data, active, zero_advantage)


def _spans(n: int, length: int, off: float, make: torch.Generator) -> Tensor:
    """[n] bool, False on a share `off` of spans of `length`; shorter spans where there would be too few."""
    length = max(1, min(length, n // 20))
    count = -(-n // length) if n else 0
    order = torch.rand(count, generator=make, device=make.device).argsort()
    keep = torch.ones(count, dtype=torch.bool, device=make.device)
    keep[order[: round(off * count)]] = False
    return keep.repeat_interleave(length)[:n]


def _peaked(hidden: Tensor, weight: Tensor, other: Tensor, make: torch.Generator) -> tuple[Tensor, Tensor]:
    """Adds to each row a multiple of one weight row, solved for a wanted entropy."""
    n, size = hidden.shape
    vocab = weight.shape[0]
    flat = math.log(max(2, vocab - 1)) - 0.5  # entropy of the other tokens: normal logits of deviation 1
    wanted = MEDIAN_ENTROPY * (_SPREAD * torch.randn(n, generator=make, device=hidden.device)).exp()
    margin = _margin(wanted.clamp(max=0.8 * flat), flat)
    top = torch.randint(vocab, (n,), generator=make, device=hidden.device)
    row = weight[top].float()
    norm = row.square().sum(1)
    # The added multiple a of the row also widens the other logits, to variance (|x|^2 + a^2 / |w|^2) / H.
    start = hidden.square().sum(1) / size
    a = margin
    for _ in range(20):
        a = margin + math.log(max(2, vocab - 1)) + (start + a.square() / (norm * size)) / 2 - (hidden * row).sum(1)
        a = a.clamp(-100, 100)
    p = torch.sigmoid(margin)
    target = torch.where(torch.rand(n, generator=make, device=hidden.device) < p, top, other)
    return hidden + (a / norm)[:, None] * row, target


def _margin(entropy: Tensor, flat: float) -> Tensor:
    """d such that one token of probability sigmoid(d) over a rest of entropy `flat` has this entropy; bisection."""
    low, high = torch.zeros_like(entropy), torch.full_like(entropy, 40.0)
    for _ in range(40):
        middle = (low + high) / 2
        p, q = torch.sigmoid(middle), torch.sigmoid(-middle)
        value = -p * p.log() - q * q.log() + q * flat
        low, high = torch.where(value > entropy, middle, low), torch.where(value > entropy, high, middle)
    return (low + high) / 2


class Reference:
    """Log-probs, entropies and slices of the gradients in float64, from the same rounded inputs.

    dX is taken on `rows` rows over the whole vocabulary, dW on `columns` vocabulary rows (half of them targets) over
    all tokens, so that large heads stay affordable.
    """

    def __init__(self, problem: Problem, rows: int = 128, columns: int = 256) -> None:
        self.problem = problem
        make = torch.Generator().manual_seed(1)
        live = problem.live.cpu()
        self.rows = live[torch.randperm(len(live), generator=make)[:rows]].to(problem.hidden.device)
        targets = problem.target[problem.live].unique().cpu()
        targets = targets[torch.randperm(len(targets), generator=make)[: columns // 2]]
        anything = torch.randperm(problem.weight.shape[0], generator=make)[: columns - len(targets)]
        self.columns = torch.cat([targets, anything]).unique().to(problem.hidden.device)
        self.logp, self.entropy, self._lse = self._forward()
        self._gradients: dict[tuple[bool, bool], tuple[Tensor, Tensor]] = {}

    @property
    def median_entropy(self) -> float:
        """In nats, over the active rows."""
        return self.entropy.median().item() if len(self.entropy) else 0.0

    @property
    def above_one_nat(self) -> float:
        """Share of the active rows."""
        return (self.entropy > 1).double().mean().item() if len(self.entropy) else 0.0

    def _forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """(logp, entropy, lse) of the active rows, each [n]."""
        p = self.problem
        parts = []
        for r in _slices(len(p.live), _ROWS):
            x, y = p.hidden[p.live[r]].double(), p.target[p.live[r]]
            m = x.new_full((len(x),), -math.inf)
            s, u, label = (torch.zeros_like(m) for _ in range(3))
            for c in _slices(p.weight.shape[0], _VOCAB_TILE):
                z = x @ p.weight[c].double().t()
                new = torch.maximum(m, z.amax(1))
                shift = torch.where(m.isinf(), 0.0, m - new)
                u = (u + s * shift) * shift.exp()
                s = s * shift.exp()
                inside = (y >= c.start) & (y < c.stop)
                at = (y - c.start).clamp(0, z.shape[1] - 1)[:, None]
                label = torch.where(inside, z.gather(1, at)[:, 0], label)
                z -= new[:, None]
                e = z.exp()
                s, u, m = s + e.sum(1), u + (z * e).sum(1), new
            lse = m + s.log()
            parts.append(torch.stack([label - lse, s.log() - u / s, lse]))
        return tuple(torch.cat(parts, 1)) if parts else tuple(p.hidden.new_zeros(3, 0, dtype=torch.float64))

    def gradients(self, entropy: bool, per_token: bool) -> tuple[Tensor, Tensor]:
        """dX of `rows` [rows, H] and dW of `columns` [columns, H]."""
        key = (entropy, per_token)
        if key not in self._gradients:
            self._gradients[key] = self._backward(self.problem.upstream(entropy, per_token))
        return self._gradients[key]

    def _backward(self, up: Upstream) -> tuple[Tensor, Tensor]:
        p = self.problem
        position = torch.full((p.shape[0],), -1, dtype=torch.long, device=p.hidden.device)
        position[p.live] = torch.arange(len(p.live), device=p.hidden.device)
        g = up.logp.double()
        h = torch.zeros_like(g) if up.entropy is None else up.entropy.double()

        def dlogits(rows: Tensor, z: Tensor, columns: Tensor) -> Tensor:
            at = position[rows]
            log_p = z - self._lse[at][:, None]
            one = (columns[None] == p.target[rows][:, None]).double()
            prob = log_p.exp()
            return g[rows][:, None] * (one - prob) - h[rows][:, None] * prob * (log_p + self.entropy[at][:, None])

        x = p.hidden[self.rows].double()
        dx = torch.zeros_like(x)
        for c in _slices(p.weight.shape[0], _VOCAB_TILE):
            w = p.weight[c].double()
            columns = torch.arange(c.start, c.stop, device=w.device)
            dx += dlogits(self.rows, x @ w.t(), columns) @ w
        w = p.weight[self.columns].double()
        dw = torch.zeros_like(w)
        for r in _slices(len(p.live), _ROWS):
            rows = p.live[r]
            x = p.hidden[rows].double()
            dw += dlogits(rows, x @ w.t(), self.columns).t() @ x
        return dx, dw


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over the expected norm; NaN stays NaN."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; NaN stays NaN."""
    return (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))
