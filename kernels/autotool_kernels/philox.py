"""Counter-based random numbers (Philox4x32-10, Salmon et al., SC 2011) and the sampler built on them.

Column j of a row draws word j % 4 of the block with counter (j // 4, 0, offset low, offset high) and key
(seed low, seed high). A token is therefore a function of (logits row, temperature, seed, offset) and of
nothing else: not of the batch, the row's place in it, or the backend that drew the bits.

Sampling is the exponential race: argmax_j z_j - log E_j with E_j = -log(1 - u_j), which is Gumbel-max.
Small u_j decide it, and a float32 u = (bits + 1/2) 2^-32 is finest near 0, so ties stay rare at a
vocabulary of 150k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import TILE_ELEMENTS, compute_dtype, reduce_

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
LARGEST_U = 1.0 - 2.0**-24  # the float32 below 1; u = 1 would give E = inf


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four int64 counter and two key words in 0..2^32-1 -> four such words; counters 0, 2 set the shape."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The products wrap in int64, but their bit patterns are the unsigned ones.
        p0, p1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0 = (p1 >> 32).bitwise_xor_(x1 ^ k0).bitwise_and_(MASK)
        x2 = (p0 >> 32).bitwise_xor_(x3 ^ k1).bitwise_and_(MASK)
        x1, x3 = p1.bitwise_and_(MASK), p0.bitwise_and_(MASK)
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return x0, x1, x2, x3


def uniforms(seed: Tensor, offset: Tensor, columns: int) -> Tensor:
    """float32 [B, columns] in (0, 1) for int64 seed and offset [B]."""
    blocks = -(-columns // 4)
    rows = seed.shape[0]
    key = (seed & MASK)[:, None], (seed >> 32 & MASK)[:, None]
    # Full shape from the first round on, because the rounds work in place.
    block = torch.arange(blocks, device=seed.device).expand(rows, blocks).contiguous()
    low, high = (offset & MASK)[:, None].expand(rows, blocks), (offset >> 32 & MASK)[:, None]
    words = philox_4x32((block, torch.zeros_like(offset)[:, None], low.contiguous(), high), key)
    bits = torch.stack([w.float() for w in words], 2).view(rows, 4 * blocks)[:, :columns]
    return bits.add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST_U)


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
    parts = []
    for start in range(0, rows, step):
        r = slice(start, start + step)
        z = logits[r].to(dtype, copy=True)
        noise = None
        if row_temperature is not None:
            if row_temperature.device.type == "cpu" and not (row_temperature >= 0).all():
                raise ValueError(f"temperature must not be negative: got {row_temperature.min().item()}")
            t = row_temperature[r, None].to(dtype)
            greedy = t == 0
            z.div_(t.masked_fill(greedy, 1.0))
            noise = _gumbel(seed[r], offset[r], v).masked_fill_(greedy, 0.0)
        elif temperature != 0:
            if temperature != 1.0:
                z.div_(temperature)
            noise = _gumbel(seed[r], offset[r], v)
        token = (z if noise is None else noise.to(dtype).add_(z)).argmax(1, keepdim=True)
        chosen = z.gather(1, token)
        m, s, u = reduce_(z, guard=True)
        log_s = s.log()
        logp = (chosen - m).sub_(log_s).clamp_(max=0.0)
        parts.append((token[:, 0], logp[:, 0], (log_s - u / s).clamp_(min=0.0)[:, 0]))
    if not parts:
        empty = torch.zeros(0, dtype=dtype, device=logits.device)
        return empty.long(), empty, empty.clone()
    return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _gumbel(seed: Tensor, offset: Tensor, columns: int) -> Tensor:
    return uniforms(seed, offset, columns).neg_().log1p_().neg_().log_().neg_()
