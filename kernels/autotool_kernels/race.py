"""The sampler's exponential race on a CPU: noise only for the columns that can win.

The winner has the least E_j / e_j, with e_j = e^(z_j - max z) at hand for the entropy. u <= E = -log(1 - u), so
r_j = u_j / e_j is a lower bound without a logarithm. The least r says which columns a better one can hide among, for
the most part itself alone, and those few are raced exactly as `sampler.sample_forward` races all columns: the same
float32 operations on the same bits, so the same token, down to ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import philox
from .reference import EXP_FLOOR

TILE_ELEMENTS = 1 << 16  # per thread: three buffers of float32 within its cache
DEPTH = 64  # columns of a set; a set is a candidate or not as a whole


def draw(
    logits: Tensor,  # [B, V]
    t: Tensor | float | None,  # [B, 1] temperatures, one, or None for 1
    seed: Tensor,  # [B]
    offset: Tensor,  # [B]
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Token (int64), its scaled logit, and `reference.reduce_`'s (m, s, u), all [B, 1] and float32."""
    rows, v = logits.shape
    sets = -(-v // DEPTH)
    bits = philox.random_bits(seed, offset, v)
    m, s, u = torch.empty(3, rows, 1).unbind(0)
    least = torch.empty(rows, sets)
    # Never one row alone out of several: threads would share its sums out, and round otherwise than with neighbours.
    tile = min(rows, max(2, TILE_ELEMENTS * torch.get_num_threads() // v))
    x, e = torch.empty(2, tile, v).unbind(0)
    ratio = torch.full((tile, DEPTH * sets), float("inf"))
    for start in range(0, rows, tile):
        r = slice(min(start, rows - tile), min(start + tile, rows))
        z = _scaled(logits[r], t, r)
        torch.amax(z, 1, keepdim=True, out=m[r])
        torch.sub(z, m[r].masked_fill(m[r] == float("-inf"), 0.0), out=x).clamp_(min=EXP_FLOOR)
        torch.exp(x, out=e)
        torch.sum(e, 1, keepdim=True, out=s[r])
        torch.sum(x.mul_(e), 1, keepdim=True, out=u[r])
        torch.div(x.copy_(bits[r, :v].view(torch.uint32)).add_(0.5), e, out=ratio[:, :v])
        torch.amin(ratio.view(-1, DEPTH, sets), 1, out=least[r])
    token = _winner(logits, t, bits, least.mul_(2.0**-32), m)
    return token, _scaled(logits.gather(1, token), t), (m, s, u)


def _scaled(logits: Tensor, t: Tensor | float | None, r: slice | Tensor = slice(None)) -> Tensor:
    z = logits.float()
    return z if t is None else z / (t[r] if isinstance(t, Tensor) else t)


def _winner(logits: Tensor, t: Tensor | float | None, bits: Tensor, least: Tensor, m: Tensor) -> Tensor:
    """Token [B, 1] by an exact race of the sets whose least r [B, sets] leaves them a chance.

    Let rho be the row's least r and u* its number. e* <= 1, so u* <= rho, and E / u grows with u: the best E / e is
    rho E(rho) / rho at most. Rounding of e, noise and score moves the logarithm of a ratio by less than `slack`.
    """
    (rows, v), sets = logits.shape, least.shape[1]
    rho = least.amin(1, keepdim=True)
    below_one = rho.clamp(max=philox.LARGEST_U)
    slack = (m.abs() + 64.0) * 2.0**-21
    bound = rho * (below_one.neg().log1p_().neg_() / below_one) * slack.exp_()
    # Not `least <= bound`: rows that hold NaN race in full, as do those whose bound is infinite.
    row, first = (~(least > bound)).nonzero(as_tuple=True)
    # [n, DEPTH]; beyond the last column stands the last one, which may race in any set.
    column = (first[:, None] + sets * torch.arange(DEPTH)).clamp_(max=v - 1)
    at = (row[:, None], column)
    noise = philox.gumbel_(philox.as_uniforms_(bits[at].view(torch.uint32).float()))
    score = noise.add_(_scaled(logits[at], t, row))
    best = torch.full((rows,), float("-inf")).scatter_reduce_(0, row, score.amax(1), "amax")
    # As argmax: the first of equal scores, NaN above all.
    wins = (score == best[row, None]) | score.isnan()
    column = torch.where(wins, column, v - 1).amin(1)
    return torch.full((rows,), v - 1).scatter_reduce_(0, row, column, "amin")[:, None]
