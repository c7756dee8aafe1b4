"""Counter-based random numbers (Philox4x32-10, Salmon et al., SC 2011).

Column j of a row draws word j % 4 of the block with counter (j // 4, 0, offset low, offset high) and key
(seed low, seed high): a function of seed, offset and column, not of the batch, the row's place in it, or the backend
that drew the bits.

A float32 u = (bits + 1/2) 2^-32 is finest near 0, and small u_j decide the race -log(1 - u_j) / e^(z_j), so ties stay
rare at a vocabulary of 150k.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
LARGEST_U = 1.0 - 2.0**-24  # the float32 below 1; u = 1 would give E = inf
TILE_BLOCKS = 1 << 14  # per thread of a CPU: the three pairs of words fill 768 KiB of its cache
# Operands as tensors of no dimension: a Python number costs as much again as a short operation.
_M0, _M1, _MASK, _32 = (torch.tensor(value, device="cpu") for value in (*MULTIPLIERS, MASK, 32))


def random_bits(seed: Tensor, offset: Tensor, columns: int) -> Tensor:
    """The words as int32 [B, columns rounded up to 4], to be read as uint32, for int64 seed and offset [B].

    One round of Philox maps words x0..x3 with p0 = x0 * M0 and p1 = x2 * M1 to

        x0 = high(p1) ^ x1 ^ key0    x1 = low(p1)    x2 = high(p0) ^ x3 ^ key1    x3 = low(p0)

    so x1 and x3 need not be kept: they are low halves of the products before. Two rounds' keys enter by one
    operation, through the high halves of a product and the low halves that the round after reads.
    """
    device, rows, blocks = seed.device, seed.shape[0], -(-columns // 4)
    shift = torch.tensor([[0], [32]], device=device)
    weyl = torch.tensor(WEYL, device=device)[:, None] * torch.arange(ROUNDS, device=device)
    seeds, offsets = ((words >> shift).bitwise_and_(_MASK)[..., None] for words in (seed, offset))  # [2, B, 1]
    keys = (seeds[:, None] + (weyl & _MASK)[..., None, None]).bitwise_and_(_MASK)  # [2, ROUNDS, B, 1]
    # The counter's words 1 to 3 are the same in all columns, and so is half of the first two rounds.
    p1 = offsets[0] * _M1
    p0 = (_high(p1) ^ keys[0, 0]) * _M0
    key1 = offsets[1] ^ keys[1, 0]
    key2 = torch.stack((p1 & _MASK, _high(p0))).bitwise_xor_(keys[:, 1])
    low3 = p0 & _MASK
    pairs = (keys[:, 2::2] << _32).bitwise_or_(keys[:, 3::2])  # [2, 4, B, 1]
    product = torch.arange(blocks, device=device) * _M0
    high, low = _high(product), product & _MASK

    out = torch.empty(rows, blocks, 2, dtype=torch.int64, device=device)
    tile = TILE_BLOCKS * torch.get_num_threads() // max(1, blocks) if device.type == "cpu" else rows
    tile = min(max(1, tile), rows)
    scratch = torch.empty(3, 2, tile, blocks, dtype=torch.int64, device=device)
    for start in range(0, rows, max(1, tile)):
        r = slice(start, min(start + tile, rows))
        x, p, q = scratch[:, :, : r.stop - start].unbind(0)
        (x0, x2), (p1, p0), (q1, q0) = x.unbind(0), p.unbind(0), q.unbind(0)
        torch.bitwise_xor(high, key1[r], out=x2)
        torch.mul(x2, _M1, out=p1)
        p0.copy_(low3[r])
        torch.bitwise_right_shift(p1, _32, out=x0).bitwise_xor_(key2[0, r]).bitwise_and_(_MASK)
        torch.bitwise_xor(low, key2[1, r], out=x2)
        for pair in pairs[:, :, r].unbind(1):
            # The products wrap in int64, but their bit patterns are the unsigned ones.
            torch.mul(x2, _M1, out=q1)
            torch.mul(x0, _M0, out=q0)
            q.bitwise_xor_(pair)
            torch.bitwise_right_shift(q, _32, out=x).bitwise_xor_(p).bitwise_and_(_MASK)
            torch.mul(x2, _M1, out=p1)
            torch.mul(x0, _M0, out=p0)
            torch.bitwise_right_shift(p, _32, out=x).bitwise_xor_(q).bitwise_and_(_MASK)
        p.bitwise_left_shift_(_32)
        torch.bitwise_or(p1, x0, out=out[r, :, 0])
        torch.bitwise_or(p0, x2, out=out[r, :, 1])
    return out.view(torch.int32).view(rows, 4 * blocks)


def _high(product: Tensor) -> Tensor:
    return (product >> _32).bitwise_and_(_MASK)


def uniforms(seed: Tensor, offset: Tensor, columns: int) -> Tensor:
    """float32 [B, columns] in (0, 1) for int64 seed and offset [B]."""
    return as_uniforms_(random_bits(seed, offset, columns)[:, :columns].view(torch.uint32).float())


def as_uniforms_(words: Tensor) -> Tensor:
    """Words 0..2^32-1, as float32, to numbers in (0, 1); in place."""
    return words.add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST_U)


def gumbel_(u: Tensor) -> Tensor:
    """-log(-log(1 - u)), in place."""
    return u.neg_().log1p_().neg_().log_().neg_()
