"""The PyTorch backend of `logits_logp_entropy`: a bounded block of rows at a time, every device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import (
    TILE_ELEMENTS,
    Rows,
    RowStats,
    coefficients,
    compute_dtype,
    dlogits_,
    finish,
    reduce_,
    row_scale,
    scale_,
    select_rows,
    slices,
)


def logits_forward(
    logits: Tensor,  # [N, V], any row stride
    target: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    ignore_index: int,
) -> RowStats:
    """Statistics of every row in PyTorch operations, a block of rows at a time; zeros where ignored."""
    n, v = logits.shape
    dtype = compute_dtype(logits.dtype)
    rows = select_rows(target, v, ignore_index)
    t = row_scale(rows, temperature, row_temperature)
    parts = []
    for r in slices(rows.target.shape[0], _row_block(logits)):
        z = _scaled_copy(logits, rows, t, r)
        # A label out of range (refused on a CPU) must not read outside the row.
        label = z.gather(1, rows.target[r].clamp(0, v - 1))
        parts.append((label, *reduce_(z, guard=True)))
    return finish(rows, n, dtype, logits, parts)


def logits_backward(
    grad_logp: Tensor | None,  # [N] or None for zeros
    grad_entropy: Tensor | None,
    logits: Tensor,
    target: Tensor,
    stats: RowStats,
    temperature: float,
    row_temperature: Tensor | None,
    ignore_index: int,
    out: Tensor | None = None,
) -> Tensor:
    """dL/dlogits, written to `out` if given; it may be the logits themselves."""
    v = logits.shape[1]
    rows = select_rows(target, v, ignore_index, grad_logp, grad_entropy)
    t = row_scale(rows, temperature, row_temperature)
    columns = coefficients(rows, grad_logp, grad_entropy, stats, t, compute_dtype(logits.dtype))
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for r in slices(rows.target.shape[0], _row_block(logits)):
        dz = dlogits_(_scaled_copy(logits, rows, t, r), rows.target[r], columns, r, guard=True)
        if rows.dead is not None:
            dz.masked_fill_(rows.dead[r, None], 0)
        if rows.index is None:
            out[r] = dz
        else:
            out.index_copy_(0, rows.index[r], dz.to(out.dtype))
    if rows.index is not None:
        unused = torch.ones(logits.shape[0], dtype=torch.bool).index_fill_(0, rows.index, False)
        out.index_fill_(0, unused.nonzero()[:, 0], 0)
    return out


def _scaled_copy(logits: Tensor, rows: Rows, t: Tensor | float | None, r: slice) -> Tensor:
    block = logits[r] if rows.index is None else logits.index_select(0, rows.index[r])
    return scale_(block.to(compute_dtype(logits.dtype), copy=rows.index is None), t, r)


def _row_block(logits: Tensor) -> int:
    elements = TILE_ELEMENTS.get(logits.device.type, TILE_ELEMENTS["cpu"])
    return max(1, elements // max(1, logits.shape[1]))
