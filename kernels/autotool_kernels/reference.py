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

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

VOCAB_TILE = 16384
TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # 4 MiB of float32 (a core's cache), 256 MiB
# Below this e^x is exactly 0 in every dtype; clamping there turns a -inf logit's x * e^x from NaN into 0.
EXP_FLOOR = -1e4


class RowStats(NamedTuple):
    """Outputs of a forward: what the caller gets, and what the backward needs."""

    logp: Tensor  # [N]
    entropy: Tensor  # [N]
    row_max: Tensor  # [N] m; kept apart from log_sum because their sum loses digits at large offsets
    log_sum: Tensor  # [N] log s


class _Rows(NamedTuple):
    """Rows to work on. `index` is None when all rows are; `dead` masks rows where compaction is not possible."""

    index: Tensor | None
    target: Tensor  # [n, 1] int64, inside the vocabulary
    dead: Tensor | None  # [n] bool
    invalid: Tensor | None  # [n] bool: label out of range, found on a device that must not stop the host

    def take(self, t: Tensor) -> Tensor:
        return t if self.index is None else t.index_select(0, self.index)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed and returned in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    """Recomputes the logits vocabulary-major: each slice of dW is written once, only dX accumulates (in float32)."""
    v = weight.shape[0]
    dtype = compute_dtype(hidden.dtype)
    rows = _select_rows(target, v, ignore_index, grad_logp, grad_entropy)
    n = rows.target.shape[0]
    x, t = rows.take(hidden), _row_scale(rows, temperature, row_temperature)
    if rows.dead is not None and need_weight:
        x = x.masked_fill(rows.dead[:, None], 0)
    coefficients = _coefficients(rows, grad_logp, grad_entropy, stats, t, dtype)
    width = min(v, VOCAB_TILE)
    tile = _row_tile(hidden, width)
    one_vocab_tile = v <= width
    dx = None if one_vocab_tile or not need_hidden else x.new_zeros(x.shape, dtype=dtype)
    dx_parts: list[Tensor] = []
    dw = _zeros_like(weight) if need_weight and (n == 0 or not one_vocab_tile) else None
    for c in _slices(v, width) if n else ():
        w = weight[c]
        dw_tile = None
        for r in _slices(n, tile):
            z = _scale_(_project(x[r], w, dtype), t, r)
            y = rows.target[r]
            dz = _dlogits_(z, y if one_vocab_tile else y - c.start, coefficients, r)
            if need_hidden:
                part = _matmul(dz, w)
                if dx is None:
                    dx_parts.append(part)
                else:
                    dx[r] += part
            if need_weight:
                part = _matmul(dz.t(), x[r])
                dw_tile = part if dw_tile is None else dw_tile.add_(part)
        if need_weight and one_vocab_tile:
            dw = dw_tile.to(weight.dtype)
        elif need_weight:
            dw[c] = dw_tile
    if need_hidden and dx is None:
        dx = dx_parts[0] if len(dx_parts) == 1 else torch.cat(dx_parts) if dx_parts else x.new_zeros(x.shape)
    return _scatter(rows, dx, hidden) if need_hidden else None, dw


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
    out = (
        torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if whole else _zeros_like(logits)
    )
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


def merge(
    a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
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
    if target.device.type != "cpu":
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


def _finish(
    rows: _Rows, n: int, dtype: torch.dtype, like: Tensor, parts: list[tuple[Tensor, ...]]
) -> RowStats:
    if not parts:
        return RowStats(*(torch.zeros(n, dtype=dtype, device=like.device) for _ in range(4)))
    label, m, s, u = (
        parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts, strict=True))
    )
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
    scale = torch.exp(-log_s)
    if t is not None:
        t = t[:, 0] if isinstance(t, Tensor) else t
        scale = scale / t
    a = None if g is None else g * scale
    b = None
    if h is not None:
        b = h * scale
        from_entropy = b * (rows.take(stats.entropy) - log_s)
        a = from_entropy if a is None else a + from_entropy
        b = b.neg_()[:, None]
    a = torch.zeros_like(m) if a is None else a.neg_()
    if g is not None and t is not None:
        g = g / t
    columns = [a[:, None], b, None if g is None else g[:, None], m[:, None]]
    if rows.dead is not None:
        columns = [None if c is None else c.masked_fill(rows.dead[:, None], 0.0) for c in columns]
    return tuple(columns)


def _dlogits_(
    z: Tensor, y: Tensor, coefficients: tuple[Tensor | None, ...], r: slice, guard: bool = False
) -> Tensor:
    """Turns scaled logits z into dL/dlogits in place; y [n, 1] counts from the tile's first column."""
    a, b, at_label, m = (None if c is None else c[r] for c in coefficients)
    z.sub_(m)
    if guard:
        z.clamp_(min=EXP_FLOOR)
    if b is None:
        dz = z.exp_().mul_(a)
    else:
        e = z.exp()
        dz = torch.addcmul(a, z, b, out=z).mul_(e)
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
    if dz.dtype == b.dtype:
        return torch.mm(dz, b)
    if dz.is_cuda:
        return torch.mm(dz.to(b.dtype), b, out_dtype=dz.dtype)
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
