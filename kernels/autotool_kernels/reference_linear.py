"""The PyTorch backend of `linear_logp_entropy`: matrix products tile by tile, every device and dtype.

N x V is never held: a tile has `TILES` rows and columns, and what survives it has the size of a row. Logits are never
rounded below float32. The vocabulary tile depends on the device alone, so that a row's tiles do not depend on
the batch. The backward walks the vocabulary outermost: a slice of dW is summed in float32 and written once, and only
dX accumulates over the vocabulary, in float32 too (summed in bfloat16 it biases training within dozens of steps).
Rows with stored logits skip the product that makes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import matmul, project
from .reference import (
    STORE_TILE,
    Head,
    Rows,
    RowStats,
    Store,
    coefficients,
    compute_dtype,
    dlogits_,
    finish,
    host_may_look,
    merge,
    new_store,
    reduce_,
    row_scale,
    scale_,
    select_rows,
    slices,
)

# (rows, columns; a multiple of STORE_TILE). CPU: 4 MiB of float32, which a core's caches hold beside its operands.
TILES = {"cpu": (1024, 1024), "cuda": (4096, 16384)}


def linear_forward(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N]
    head: Head,
    store_bytes: int = 0,
) -> tuple[RowStats, Store]:
    """Statistics of every row, and the logits of as many live rows as `store_bytes` hold."""
    n, v = hidden.shape[0], weight.shape[0]
    dtype = compute_dtype(hidden.dtype)
    store = new_store(hidden, n, v, store_bytes)
    keep = store.logits.shape[0]
    rows = select_rows(target, v, head.ignore_index, ordered=keep > 0)
    x, t = _operand(rows, hidden, mask=keep > 0), row_scale(rows, head.temperature, head.row_temperature)
    row_tile, width = _tiles(hidden)
    parts = []
    for r in slices(x.shape[0], row_tile):
        y = rows.target[r]
        m = s = u = label = None
        for c in slices(v, width):
            z = _logits(x[r], weight, head, t, r, c, dtype)
            if r.start < keep:
                _write(store, z, r, c)
            tile_label = z.gather(1, (y - c.start).clamp_(0, z.shape[1] - 1))
            part = reduce_(z, guard=head.bias is not None)
            if m is None:
                (m, s, u), label = part, tile_label
            else:
                label = torch.where((y >= c.start) & (y < c.stop), tile_label, label)
                m, s, u = merge((m, s, u), part)
        parts.append((label, m, s, u))
    if host_may_look(target):
        for part in store:
            part[x.shape[0] :].zero_()
    return finish(rows, n, dtype, hidden, parts), store


def linear_backward(
    grad_logp: Tensor | None,  # [N] or None for zeros
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    stats: RowStats,
    store: Store,
    head: Head,
    need_hidden: bool = True,
    need_weight: bool = True,
    need_bias: bool = False,
    weight_sum: Tensor | None = None,  # [V, H] compute dtype: dW is added to it, and None returned in its place
    rounded: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dW, dbias), each only if needed; dX and dbias are in the compute dtype if not `rounded` to the inputs'.

    A label outside the vocabulary has no column here and adds no 1[j = y].
    """
    v = weight.shape[0]
    dtype = compute_dtype(hidden.dtype)
    keep = store.logits.shape[0]
    # A difference past the range of float16 is stored as -inf.
    guard = head.bias is not None or store.tile_max.numel() > 0
    rows = select_rows(target, v, head.ignore_index, grad_logp, grad_entropy, ordered=keep > 0)
    # A masked row's dz is 0, but 0 * NaN is not.
    x, t = _operand(rows, hidden, mask=True), row_scale(rows, head.temperature, head.row_temperature)
    n = x.shape[0]
    columns = coefficients(rows, grad_logp, grad_entropy, stats, t, dtype, head.logit_scale)
    stored = n if rows.place is None else int((rows.place < keep).sum())
    stored = min(stored, keep)
    row_tile, width = _tiles(hidden)
    row_slices = [*slices(stored, row_tile), *slices(n, row_tile, start=stored)]

    dx = torch.empty(x.shape, dtype=dtype, device=x.device) if need_hidden else None
    dw = dbias = None
    if need_weight and weight_sum is None:
        dw = (torch.empty if n else torch.zeros)(weight.shape, dtype=weight.dtype, device=weight.device)
    if need_bias:
        dbias = torch.zeros(v, dtype=dtype, device=x.device)
    for c in slices(v, width) if n else ():
        w_sum = None if weight_sum is None else weight_sum[c]
        for r in row_slices:
            if r.start < stored:
                z = _read(store, rows, r, c, dtype)
            else:
                z = _logits(x[r], weight, head, t, r, c, dtype)
            slope = _softcap_slope(z, head, t, r)
            dz = dlogits_(z, rows.target[r] - c.start, columns, r, guard=guard)
            if slope is not None:
                dz.mul_(slope)
            if rows.dead is not None and r.start < stored:
                dz.masked_fill_(rows.dead[r, None], 0)
            if need_bias:
                dbias[c].add_(dz.sum(0))
            if dz.is_cuda:
                dz = dz.to(x.dtype)  # once for both products
            if need_hidden:
                part = matmul(dz, weight[c], dtype)
                if c.start == 0:
                    dx[r] = part
                else:
                    dx[r].add_(part)
            if need_weight:
                part = matmul(dz.t(), x[r], dtype)
                w_sum = part if w_sum is None else w_sum.add_(part)
        if dw is not None:
            dw[c] = w_sum
    if need_hidden:
        dx = dx.to(hidden.dtype) if rounded else dx
        if rows.index is not None:
            dx = torch.zeros(hidden.shape, dtype=dx.dtype, device=dx.device).index_copy_(0, rows.index, dx)
    if need_bias and rounded:
        dbias = dbias.to(head.bias.dtype)
    return dx, dw, dbias


def _operand(rows: Rows, hidden: Tensor, mask: bool) -> Tensor:
    x = rows.take(hidden)
    if mask and rows.dead is not None:
        x = x.masked_fill(rows.dead[:, None], 0)
    return x if x.is_cuda else x.to(compute_dtype(x.dtype)).contiguous()


def _logits(
    x: Tensor, weight: Tensor, head: Head, t: Tensor | float | None, r: slice, c: slice, dtype: torch.dtype
) -> Tensor:
    """Scaled logits of one tile; x holds the rows r already."""
    z = project(x, weight[c], dtype)
    if head.bias is not None:
        z.add_(head.bias[c])
    if head.logit_scale != 1.0:
        z.mul_(head.logit_scale)
    if head.softcap:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return scale_(z, t, r)


def _softcap_slope(z: Tensor, head: Head, t: Tensor | float | None, r: slice) -> Tensor | None:
    """dc/db = 1 - tanh(b / softcap)^2, from the scaled logits."""
    if not head.softcap:
        return None
    tanh = z / head.softcap if t is None else z * ((t[r] if isinstance(t, Tensor) else t) / head.softcap)
    return tanh.square_().neg_().add_(1.0)


def _write(store: Store, z: Tensor, r: slice, c: slice) -> None:
    """Keeps the tile's rows that have a place in the store."""
    stop = min(r.stop, store.logits.shape[0])
    z = z[: stop - r.start]
    if store.tile_max.shape[1]:
        padded = torch.nn.functional.pad(z, (0, -z.shape[1] % STORE_TILE), value=float("-inf"))
        tile_max = padded.unflatten(1, (-1, STORE_TILE)).amax(2)
        # -inf minus -inf is NaN: a tile of excluded tokens is stored against 0.
        tile_max.masked_fill_(tile_max == float("-inf"), 0.0)
        store.tile_max[r.start : stop, _store_tiles(c)] = tile_max
        z = z - _per_column(tile_max, z)
    store.logits[r.start : stop, c] = z


def _read(store: Store, rows: Rows, r: slice, c: slice, dtype: torch.dtype) -> Tensor:
    def pick(part: Tensor) -> Tensor:
        return part[r] if rows.place is None else part.index_select(0, rows.place[r])

    z = pick(store.logits[:, c]).to(dtype, copy=rows.place is None)
    if store.tile_max.shape[1]:
        z.add_(_per_column(pick(store.tile_max[:, _store_tiles(c)]), z))
    return z


def _store_tiles(c: slice) -> slice:
    return slice(c.start // STORE_TILE, -(-c.stop // STORE_TILE))


def _per_column(tile_max: Tensor, z: Tensor) -> Tensor:
    return tile_max.repeat_interleave(STORE_TILE, 1)[:, : z.shape[1]]


def _tiles(like: Tensor) -> tuple[int, int]:
    return TILES.get(like.device.type, TILES["cpu"])
