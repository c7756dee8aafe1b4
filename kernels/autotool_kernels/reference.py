"""The PyTorch backend of `linear_logp_entropy` and `logits_logp_entropy`: forward and hand-derived backward.

Serves every device and dtype, float64 included, and is what the Triton and CUDA backends are tested
against. Works tile by tile (rows x vocabulary), so that N x V is never held; low-precision inputs are
multiplied and reduced in float32. The vocabulary tile depends on V alone. On a CPU ignored rows, and rows
whose two gradients are zero, are left out of the work by compaction; on other devices, where counting them
would stop the host, they are masked.

Notation: z = logits / T, m = max z, x = z - m, s = sum e^x, u = sum x e^x; logp = x_y - log s, entropy =
log s - u / s. The shifted entropy keeps its precision at any logit offset, which `lse - sum p z` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

VOCAB_TILE = 16384
STORE_TILE = 128
TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # 4 MiB of float32 (a core's cache), 256 MiB
# Below this e^x is exactly 0 in every dtype; clamping there turns a -inf logit's x * e^x from NaN into 0.
EXP_FLOOR = -1e4


class RowStats(NamedTuple):
    """Outputs of a forward: what the caller gets, and what the backward needs."""

    logp: Tensor  # [N]
    entropy: Tensor  # [N]
    row_max: Tensor  # [N] m; kept apart from log_sum because their sum loses digits at large offsets
    log_sum: Tensor  # [N] log s


class Head(NamedTuple):
    """How products become logits: b = logit_scale (x W' + bias), c = softcap tanh(b / softcap), z = c / T."""

    bias: Tensor | None = None  # [V], dtype of weight
    temperature: float = 1.0
    row_temperature: Tensor | None = None  # [N], replaces temperature
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: none
    ignore_index: int = -100


class Store(NamedTuple):
    """Logits kept for the backward: row r is the r-th live row of the batch (target is not ignore_index).

    Low-precision inputs keep bfloat16 differences to the maximum of each STORE_TILE columns: the rounding is
    relative to a difference that is small wherever the probability is not. Others keep z as computed.
    """

    logits: Tensor  # [S, V] bfloat16 z - tile_max, or z in the compute dtype
    tile_max: Tensor  # [S, ceil(V / STORE_TILE)] float32, or [S, 0]


class _Rows(NamedTuple):
    """Rows to work on; `index` is None for all of them, `dead` masks where compaction is not possible."""

    index: Tensor | None
    target: Tensor  # [n, 1] int64, inside the vocabulary
    dead: Tensor | None  # [n] bool
    invalid: Tensor | None  # [n] bool: label out of range, found on a device that must not stop the host

    def take(self, t: Tensor) -> Tensor:
        return t if self.index is None else t.index_select(0, self.index)


def host_may_look(tensor: Tensor) -> bool:
    """Whether reading values costs nothing; elsewhere it would stop the host until the device is done."""
    return tensor.device.type == "cpu"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed and returned in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def store_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits of inputs of this dtype are stored in."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.bfloat16


def stored_rows(n: int, v: int, dtype: torch.dtype, store_bytes: int) -> int:
    """How many of n rows of v logits fit into `store_bytes`; n may be symbolic."""
    row = v * store_dtype(dtype).itemsize + 4 * store_tiles(v, dtype)
    return torch.sym_min(n, store_bytes // row) if store_bytes else 0


def store_tiles(v: int, dtype: torch.dtype) -> int:
    """Columns of `Store.tile_max`."""
    return -(-v // STORE_TILE) if dtype in (torch.bfloat16, torch.float16) else 0


def linear_forward(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N]
    temperature: float,
    row_temperature: Tensor | None,  # [N], replaces temperature
    ignore_index: int,
) -> RowStats:
    n, v = hidden.shape[0], weight.shape[0]
    dtype = compute_dtype(hidden.dtype)
    rows = _select_rows(target, v, ignore_index)
    x, t = rows.take(hidden), _row_scale(rows, temperature, row_temperature)
    width = min(v, VOCAB_TILE)
    parts = []
    for r in _slices(rows.target.shape[0], _row_tile(hidden, width)):
        y = rows.target[r]
        m = s = u = label = None
        for c in _slices(v, width):
            z = _scale_(_project(x[r], weight[c], dtype), t, r)
            tile_label = z.gather(1, y if v <= width else (y - c.start).clamp_(0, c.stop - c.start - 1))
            tm, ts, tu = reduce_(z)
            if m is None:
                m, s, u, label = tm, ts, tu, tile_label
            else:
                label = torch.where((y >= c.start) & (y < c.stop), tile_label, label)
                m, s, u = merge((m, s, u), (tm, ts, tu))
        parts.append((label, m, s, u))
    return _finish(rows, n, dtype, hidden, parts)


def linear_backward(
    grad_logp: Tensor | None,  # [N] or None for zeros
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    stats: RowStats,
    temperature: float,
    row_temperature: Tensor | None,
    ignore_index: int,
    need_hidden: bool = True,
    need_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Recomputes logits vocabulary-major: each slice of dW is written once, only dX accumulates (float32)."""
    v = weight.shape[0]
    dtype = compute_dtype(hidden.dtype)
    rows = _select_rows(target, v, ignore_index, grad_logp, grad_entropy)
    x, t = rows.take(hidden), _row_scale(rows, temperature, row_temperature)
    if rows.dead is not None and need_weight:
        x = x.masked_fill(rows.dead[:, None], 0)  # a dead row's dz is 0, but 0 * NaN is not
    coefficients = _coefficients(rows, grad_logp, grad_entropy, stats, t, dtype)
    width = min(v, VOCAB_TILE)

    def slab(r: slice, c: slice) -> Tensor:
        z = _scale_(_project(x[r], weight[c], dtype), t, r)
        return _dlogits_(z, rows.target[r] if v <= width else rows.target[r] - c.start, coefficients, r)

    dx, dw = accumulate_gradients(x, weight, slab, width, need_hidden, need_weight)
    return dx if dx is None else _scatter(rows, dx, hidden), dw


def accumulate_gradients(
    x: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    slab: Callable[[slice, slice], Tensor],
    width: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dX and dW from `slab(rows, columns)`, the dL/dlogits of one tile.

    Vocabulary-major: a slice of dW is summed in float32 and written once, and only dX accumulates over the
    vocabulary, in float32 too: summed in bfloat16 it biases training within dozens of steps.
    """
    n, v = x.shape[0], weight.shape[0]
    dtype = compute_dtype(x.dtype)
    tile = _row_tile(x, min(v, width))
    one_slab = n <= tile and v <= width
    dx = torch.zeros(x.shape, dtype=dtype, device=x.device) if need_hidden and not one_slab else None
    dw = _zeros_like(weight) if need_weight and not (one_slab and n) else None
    for c in _slices(v, width) if n else ():
        dw_slice = None
        for r in _slices(n, tile):
            dz = slab(r, c)
            if need_hidden:
                part = _matmul(dz, weight[c])
                if one_slab:
                    dx = part
                else:
                    dx[r] += part
            if need_weight:
                part = _matmul(dz.t(), x[r])
                dw_slice = part if dw_slice is None else dw_slice.add_(part)
        if need_weight and one_slab:
            dw = dw_slice.to(weight.dtype)
        elif need_weight:
            dw[c] = dw_slice
    if need_hidden:
        dx = torch.zeros_like(x) if dx is None else dx.to(x.dtype)
    return dx, dw


def logits_forward(
    logits: Tensor,  # [N, V], any row stride
    target: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    ignore_index: int,
) -> RowStats:
    n, v = logits.shape
    dtype = compute_dtype(logits.dtype)
    rows = _select_rows(target, v, ignore_index)
    t = _row_scale(rows, temperature, row_temperature)
    parts = []
    for r in _slices(rows.target.shape[0], _row_tile(logits, v)):
        z = _scaled_copy(_logit_rows(logits, rows, r), dtype, t, r)
        label = z.gather(1, rows.target[r])
        parts.append((label, *reduce_(z, guard=True)))
    return _finish(rows, n, dtype, logits, parts)


def logits_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    target: Tensor,
    stats: RowStats,
    temperature: float,
    row_temperature: Tensor | None,
    ignore_index: int,
) -> Tensor:
    v = logits.shape[1]
    dtype = compute_dtype(logits.dtype)
    rows = _select_rows(target, v, ignore_index, grad_logp, grad_entropy)
    n = rows.target.shape[0]
    t = _row_scale(rows, temperature, row_temperature)
    coefficients = _coefficients(rows, grad_logp, grad_entropy, stats, t, dtype)
    whole = rows.index is None and n > 0
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if whole else _zeros_like(logits)
    for r in _slices(n, _row_tile(logits, v)):
        z = _scaled_copy(_logit_rows(logits, rows, r), dtype, t, r)
        dz = _dlogits_(z, rows.target[r], coefficients, r, guard=True)
        if rows.dead is not None:
            dz.masked_fill_(rows.dead[r, None], 0)
        if whole:
            out[r] = dz
        else:
            out.index_copy_(0, rows.index[r], dz.to(out.dtype))
    return out


def merge(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Joins (m, s, u) of two disjoint column sets; the identity is (-inf, 0, 0)."""
    m = torch.maximum(a[0], b[0])
    s = u = 0.0
    for part_m, part_s, part_u in (a, b):
        shift = torch.where(part_m == float("-inf"), EXP_FLOOR, part_m - m)
        scale = shift.exp()
        s = s + part_s * scale
        u = u + (part_u + part_s * shift) * scale
    return m, s, u


def _select_rows(target: Tensor, v: int, ignore_index: int, *grads: Tensor | None) -> _Rows:
    ignored = target == ignore_index
    if not host_may_look(target):
        invalid = ((target < 0) | (target >= v)) & ~ignored
        return _Rows(None, target.long().clamp(0, v - 1)[:, None], ignored, invalid)
    if grads:
        useless = [g == 0 for g in grads if g is not None]
        for u in useless[1:]:
            useless[0] &= u
        ignored = ignored | useless[0] if useless else torch.ones_like(ignored)
    if ignored.any():
        index = (~ignored).nonzero()[:, 0]
        target = target.index_select(0, index)
    else:
        index = None
    if not grads and target.numel():
        low, high = torch.aminmax(target)
        if low < 0 or high >= v:
            bad = int(low) if low < 0 else int(high)
            raise ValueError(f"target holds {bad}, outside 0..{v - 1} and not ignore_index ({ignore_index})")
    return _Rows(index, target.long()[:, None], None, None)


def _row_scale(rows: _Rows, temperature: float, row_temperature: Tensor | None) -> Tensor | float | None:
    if row_temperature is not None:
        if host_may_look(row_temperature) and not (row_temperature > 0).all():
            raise ValueError(f"temperature must be positive: got {row_temperature.min().item()}")
        return rows.take(row_temperature)[:, None]
    return None if temperature == 1.0 else temperature


def _scale_(z: Tensor, t: Tensor | float | None, r: slice) -> Tensor:
    if t is None:
        return z
    return z.div_(t[r] if isinstance(t, Tensor) else t)


def _scaled_copy(logits: Tensor, dtype: torch.dtype, t: Tensor | float | None, r: slice) -> Tensor:
    return _scale_(logits.to(dtype, copy=True), t, r)


def _logit_rows(logits: Tensor, rows: _Rows, r: slice) -> Tensor:
    return logits[r] if rows.index is None else logits.index_select(0, rows.index[r])


def reduce_(z: Tensor, guard: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(m, s, u), each [n, 1]; destroys z."""
    m = z.amax(1, keepdim=True)
    z.sub_(m)
    if guard:
        z.clamp_(min=EXP_FLOOR)
    e = z.exp()
    return m, e.sum(1, keepdim=True), z.mul_(e).sum(1, keepdim=True)


def _finish(rows: _Rows, n: int, dtype: torch.dtype, like: Tensor, parts: list[tuple[Tensor, ...]]) -> RowStats:
    if not parts:
        return RowStats(*(torch.zeros(n, dtype=dtype, device=like.device) for _ in range(4)))
    label, m, s, u = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts, strict=True))
    log_s = s.log()
    logp = (label - m).sub_(log_s).clamp_(max=0.0)[:, 0]
    entropy = (log_s - u / s).clamp_(min=0.0)[:, 0]
    columns = [logp, entropy, m[:, 0], log_s[:, 0]]
    if rows.dead is not None:
        columns = [c.masked_fill_(rows.dead, 0.0) for c in columns]
        columns[0].masked_fill_(rows.invalid, float("nan"))
    if rows.index is not None:
        columns = [torch.zeros(n, dtype=dtype).index_copy_(0, rows.index, c) for c in columns]
    return RowStats(*columns)


def _coefficients(rows, grad_logp, grad_entropy, stats: RowStats, t, dtype) -> tuple[Tensor | None, ...]:
    """dz = e^x (a + b x) + at_label * 1[j = y], with everything of row size folded into a, b and at_label."""
    g, h = (None if grad is None else rows.take(grad).to(dtype) for grad in (grad_logp, grad_entropy))
    m, log_s = rows.take(stats.row_max), rows.take(stats.log_sum)
    inverse_t = None if t is None else 1.0 / (t[:, 0] if isinstance(t, Tensor) else t)
    scale = torch.exp(-log_s)
    if t is not None:
        scale *= inverse_t
    a = None if g is None else g * scale
    b = None
    if h is not None:
        b = h * scale
        from_entropy = b * (rows.take(stats.entropy) - log_s)
        a = from_entropy if a is None else a + from_entropy
        b = b.neg_()[:, None]
    a = torch.zeros_like(m) if a is None else a.neg_()
    if g is not None and t is not None:
        g = g * inverse_t  # the same product as in `scale`: a certain row (p = 1) cancels exactly
    columns = [a[:, None], b, None if g is None else g[:, None], m[:, None]]
    if rows.dead is not None:
        columns = [None if c is None else c.masked_fill(rows.dead[:, None], 0.0) for c in columns]
    return tuple(columns)


def _dlogits_(z: Tensor, y: Tensor, coefficients: tuple[Tensor | None, ...], r: slice, guard: bool = False) -> Tensor:
    """Turns scaled logits z into dL/dlogits in place; y [n, 1] counts from the tile's first column."""
    a, b, at_label, m = (None if c is None else c[r] for c in coefficients)
    z.sub_(m)
    if guard:
        z.clamp_(min=EXP_FLOOR)
    if b is None:
        dz = z.exp_().mul_(a)
    else:
        e = z.exp()
        dz = z.mul_(b).add_(a).mul_(e)
    if at_label is not None:
        inside = (y >= 0) & (y < z.shape[1])
        dz.scatter_add_(1, y.clamp(0, z.shape[1] - 1), at_label * inside)
    return dz


def _project(x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ w.T accumulated and returned in `dtype`: never rounded to the inputs' low precision."""
    if x.dtype == dtype:
        return torch.mm(x, w.t())
    if x.is_cuda:
        return torch.mm(x, w.t(), out_dtype=dtype)
    return torch.mm(x.to(dtype), w.to(dtype).t())


def _matmul(dz: Tensor, b: Tensor) -> Tensor:
    """Product accumulated and returned in float32 (float64), whatever the inputs' precision."""
    if b.is_cuda and b.dtype != compute_dtype(b.dtype):
        return torch.mm(dz.to(b.dtype), b, out_dtype=torch.float32)
    return torch.mm(dz, b.to(dz.dtype))


def _scatter(rows: _Rows, compact: Tensor, like: Tensor) -> Tensor:
    if rows.index is None:
        return compact.to(like.dtype)
    return _zeros_like(like).index_copy_(0, rows.index, compact.to(like.dtype))


def _zeros_like(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def _row_tile(like: Tensor, width: int) -> int:
    return max(1, TILE_ELEMENTS.get(like.device.type, TILE_ELEMENTS["cpu"]) // max(1, width))


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))
