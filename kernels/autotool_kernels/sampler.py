"""The sampler of the PyTorch backend, on the random numbers of `philox`.

Sampling is the exponential race: argmax_j z_j - log E_j with E_j = -log(1 - u_j), which is Gumbel-max. A token is a
function of (logits row, temperature, seed, offset) and of nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import race
from .philox import gumbel_, uniforms
from .reference import TILE_ELEMENTS, compute_dtype, reduce_, scale_

RACE_COLUMNS = 8192  # vocabularies below cost less in a few large steps than the search for candidates


def sample_forward(
    logits: Tensor,  # [B, V]
    temperature: float,
    row_temperature: Tensor | None,  # [B]
    seed: Tensor,  # [B]
    offset: Tensor,  # [B]
) -> tuple[Tensor, Tensor, Tensor]:
    """(token int64, logp, entropy); temperature 0 takes the first largest logit, at temperature 1."""
    dtype = compute_dtype(logits.dtype)
    rows, v = logits.shape
    step = max(1, TILE_ELEMENTS.get(logits.device.type, TILE_ELEMENTS["cpu"]) // v)
    pruned = logits.device.type == "cpu" and dtype == torch.float32 and v >= RACE_COLUMNS
    parts = []
    for start in range(0, rows, step):
        r = slice(start, start + step)
        t: Tensor | float | None = None if temperature in (0, 1) else temperature
        greedy: Tensor | bool = temperature == 0
        if row_temperature is not None:
            if row_temperature.device.type == "cpu" and not (row_temperature >= 0).all():
                raise ValueError(f"temperature must not be negative: got {row_temperature.min().item()}")
            t = row_temperature[r, None].to(dtype)
            greedy = t == 0
            t = t.masked_fill(greedy, 1.0)
        if pruned and not (greedy.any() if isinstance(greedy, Tensor) else greedy):
            token, chosen, (m, s, u) = race.draw(logits[r], t, seed[r], offset[r])
        else:
            z = scale_(logits[r].to(dtype, copy=True), t, slice(None))
            token = _drawn(z, greedy, seed[r], offset[r])
            chosen = z.gather(1, token)
            m, s, u = reduce_(z, guard=True)
        log_s = s.log()
        logp = (chosen - m).sub_(log_s).clamp_(max=0.0)
        parts.append((token[:, 0], logp[:, 0], (log_s - u / s).clamp_(min=0.0)[:, 0]))
    if not parts:
        empty = torch.zeros(0, dtype=dtype, device=logits.device)
        return empty.long(), empty, empty.clone()
    return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _drawn(z: Tensor, greedy: Tensor | bool, seed: Tensor, offset: Tensor) -> Tensor:
    """Tokens [B, 1] by a race of all columns; `greedy` rows take the largest of z."""
    if greedy is True:
        return z.argmax(1, keepdim=True)
    noise = gumbel_(uniforms(seed, offset, z.shape[1]))
    if isinstance(greedy, Tensor):
        noise.masked_fill_(greedy, 0.0)
    return noise.to(z.dtype).add_(z).argmax(1, keepdim=True)
