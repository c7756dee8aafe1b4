"""Kernels that must not ship, each for one reason: the machine-code gate is tested on them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from autotool_kernels import machine_code
from kernels_offline import Problem


@triton.jit
def _spilling(x, out, SIZE: tl.constexpr):
    """Holds 256 numbers per thread, and their successors, over a loop."""
    offsets = tl.arange(0, SIZE)
    total = tl.load(x + offsets)
    for step in range(1, 9):
        total = total * tl.load(x + step * SIZE + offsets) + total
    tl.store(out + offsets, total)


@triton.jit
def _crowded(x, out, SIZE: tl.constexpr, PROGRAMS: tl.constexpr):
    """32 warps that need more than 32 registers per thread: two such programs do not fit on a multiprocessor."""
    offsets = tl.program_id(0) + tl.arange(0, SIZE)
    values = tl.load(x + offsets)
    more = tl.load(x + SIZE + offsets)
    tl.store(out + offsets, values * tl.sum(values * more, 0) + more * tl.sum(more, 0))


@triton.jit
def _product(a, b, out, UPCAST: tl.constexpr, BLOCK: tl.constexpr):
    """One product of 16-bit blocks: with two warps it cannot be a wgmma, in float32 no tensor core takes it."""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    left, right = tl.load(a + rows * BLOCK + columns), tl.load(b + rows * BLOCK + columns)
    if UPCAST:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        total = tl.dot(left, right)
    tl.store(out + rows * BLOCK + columns, total)


@triton.jit
def _greedy(a, b, out, K, BLOCK: tl.constexpr):
    """Five stages of two 128 x 128 blocks: 288 KiB of shared memory, more than any card has."""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in tl.range(0, K, BLOCK, num_stages=5):
        left = tl.load(a + rows * K + k + columns)
        right = tl.load(b + (k + rows) * BLOCK + columns)
        total = tl.dot(left, right, total)
    tl.store(out + rows * BLOCK + columns, total)


@triton.jit
def _forgotten(x, BLOCK: tl.constexpr):
    """Launched by nothing that `problems` runs."""
    tl.store(x + tl.arange(0, BLOCK), 0.0)


def problems() -> list[Problem]:
    def new(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    crowded = 2 * machine_code.MULTIPROCESSORS[90]
    x, square, out = new(9, 8192, dtype=torch.float32), new(64, 64), new(64, 64, dtype=torch.float32)
    wide, result = new(128, 4096), new(128, 128, dtype=torch.float32)
    return [
        Problem("spilling", lambda: _spilling[(1,)](x, x, SIZE=8192, num_warps=1), (90,)),
        Problem("crowded", lambda: _crowded[(crowded,)](x, x, SIZE=16384, PROGRAMS=crowded, num_warps=32), (90,)),
        Problem("half a warpgroup", lambda: _product[(1,)](square, square, out, False, 64, num_warps=2), (90,)),
        Problem("float32 product", lambda: _product[(1,)](square, square, out, True, 32), (80,)),
        Problem("greedy", lambda: _greedy[(1,)](wide, wide, result, 4096, 128), (90,)),
        Problem("host stop", lambda: x.sum().item(), (90,)),
    ]
