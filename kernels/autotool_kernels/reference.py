"""What every backend of the log-prob/entropy ops shares, and the row arithmetic of the PyTorch backend.

Records (`Head`, `Store`, `RowStats`) are the arguments and results of the backend functions; the PyTorch
functions themselves are in `reference_linear` and `reference_logits`, which every other backend is tested
against. On a CPU ignored rows, and rows whose two gradients are zero, are left out of the work by compaction; on
other devices, where counting them would stop the host, they are masked.

Notation: z = scaled logits, m = max z, x = z - m, s = sum e^x, u = sum x e^x; logp = x_y - log s, entropy =
log s - u / s. The shifted entropy keeps its precision at any logit offset, which `lse - sum p z` does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

STORE_TILE = 128
TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # 4 MiB of float32 (near a core's cache), 256 MiB
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

    Low-precision inputs keep float16 differences to the maximum of each STORE_TILE columns: the rounding is
    relative to a difference that is small wherever the probability is not, and what float16 cannot hold has none.
    Others keep z as computed.
    """

    logits: Tensor  # [S, V] float16 z - tile_max, or z in the compute dtype
    tile_max: Tensor  # [S, ceil(V / STORE_TILE)] float32, or [S, 0]


class Rows(NamedTuple):
    """The rows to work on, in order."""

    target: Tensor  # [n, 1] int64
    index: Tensor | None  # [n] their place in the batch; None: all of it, in order
    place: Tensor | None  # [n] their number among the live rows; None: counted from 0
    dead: Tensor | None  # [n] bool: masked, where compaction would stop the host
    invalid: Tensor | None  # [n] bool: label out of range, where raising would stop the host

    def take(self, t: Tensor) -> Tensor:
        """The rows of `t` [N, ...] to work on, in their order."""
        return t if self.index is None else t.index_select(0, self.index)


def host_may_look(tensor: Tensor) -> bool:
    """Whether reading values costs nothing; elsewhere it would stop the host until the device is done."""
    return tensor.device.type == "cpu"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed and returned in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def store_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits of inputs of this dtype are stored in."""
    return dtype if dtype == compute_dtype(dtype) else torch.float16


def store_tiles(v: int, dtype: torch.dtype) -> int:
    """Columns of `Store.tile_max`."""
    return -(-v // STORE_TILE) if dtype != compute_dtype(dtype) else 0


def store_row_bytes(v: int, dtype: torch.dtype) -> int:
    """Bytes of one stored row."""
    return v * store_dtype(dtype).itemsize + 4 * store_tiles(v, dtype)


def stored_rows(n: int, v: int, dtype: torch.dtype, store_bytes: int) -> int:
    """How many of n rows of v logits fit into `store_bytes`; n may be symbolic."""
    return torch.sym_min(n, store_bytes // store_row_bytes(v, dtype)) if store_bytes else 0


def new_store(like: Tensor, n: int, v: int, store_bytes: int) -> Store:
    """An empty Store for n rows of v logits of inputs `like`."""
    rows = stored_rows(n, v, like.dtype, store_bytes)
    return Store(
        like.new_empty((rows, v), dtype=store_dtype(like.dtype)),
        like.new_empty((rows, store_tiles(v, like.dtype)), dtype=torch.float32),
    )


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


def select_rows(target: Tensor, v: int, ignore_index: int, *grads: Tensor | None, ordered: bool = False) -> Rows:
    """The rows that need work: in a forward the live ones, in a backward those with a gradient besides.

    `ordered` (something is stored): live rows come first on every device, and know their place in the store.
    """
    ignored = target == ignore_index
    useless = None
    if grads:
        useless = torch.ones_like(ignored)
        for g in grads:
            if g is not None:
                useless &= g == 0
    if not host_may_look(target):
        index = torch.argsort(ignored, stable=True) if ordered else None
        invalid = ((target < 0) | (target >= v)) & ~ignored
        dead = ignored if useless is None else ignored | useless
        rows = Rows(target.long()[:, None], index, None, dead, invalid)
        return rows._replace(**{name: rows.take(getattr(rows, name)) for name in ("target", "dead", "invalid")})
    dead = ignored if useless is None else ignored | useless
    index = place = None
    if dead.any():
        index = (~dead).nonzero()[:, 0]
        if ordered and useless is not None and (useless & ~ignored).any():
            place = (~ignored).cumsum(0).sub_(1).index_select(0, index)
        target = target.index_select(0, index)
    if not grads and target.numel():
        low, high = torch.aminmax(target)
        if low < 0 or high >= v:
            bad = int(low) if low < 0 else int(high)
            raise ValueError(f"target holds {bad}, outside 0..{v - 1} and not ignore_index ({ignore_index})")
    return Rows(target.long()[:, None], index, place, None, None)


def row_scale(rows: Rows, temperature: float, row_temperature: Tensor | None) -> Tensor | float | None:
    """Temperature as a column [n, 1], a number, or None for 1; that of rows left out may be anything."""
    if row_temperature is not None:
        t = rows.take(row_temperature)
        if rows.dead is not None:
            t = t.masked_fill(rows.dead, 1.0)
        if host_may_look(t) and (bad := ~((t > 0) & (t < float("inf")))).any():
            raise ValueError(f"temperature must be positive and finite: got {t[bad][0].item()}")
        return t[:, None]
    return None if temperature == 1.0 else temperature


def scale_(z: Tensor, t: Tensor | float | None, r: slice) -> Tensor:
    """Divides logits z, rows `r` of the batch, by their temperature in place."""
    if t is None:
        return z
    return z.div_(t[r] if isinstance(t, Tensor) else t)


def reduce_(z: Tensor, guard: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(m, s, u), each [n, 1]; destroys z. `guard`: z may hold -inf."""
    m = z.amax(1, keepdim=True)
    if guard:
        z.sub_(m.masked_fill(m == float("-inf"), 0.0)).clamp_(min=EXP_FLOOR)
    else:
        z.sub_(m)
    e = z.exp()
    return m, e.sum(1, keepdim=True), z.mul_(e).sum(1, keepdim=True)


def finish(rows: Rows, n: int, dtype: torch.dtype, like: Tensor, parts: list[tuple[Tensor, ...]]) -> RowStats:
    """Statistics of the whole batch from (label logit, m, s, u) of the row blocks, each [n, 1]."""
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
        columns = [torch.zeros(n, dtype=dtype, device=c.device).index_copy_(0, rows.index, c) for c in columns]
    return RowStats(*columns)


def coefficients(
    rows: Rows,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    stats: RowStats,
    t: Tensor | float | None,
    dtype: torch.dtype,
    logit_scale: float = 1.0,
) -> tuple[Tensor | None, ...]:
    """dL/dlogit = e^x (a + b x) + at_label * 1[j = y], with everything of row size folded into a, b, at_label."""
    g, h = (None if grad is None else rows.take(grad).to(dtype) for grad in (grad_logp, grad_entropy))
    m, log_s = rows.take(stats.row_max), rows.take(stats.log_sum)
    gain = None  # dz/dlogit
    if t is not None or logit_scale != 1.0:
        gain = logit_scale / (1.0 if t is None else t[:, 0] if isinstance(t, Tensor) else t)
    scale = torch.exp(-log_s)
    if gain is not None:
        scale *= gain
    a = None if g is None else g * scale
    b = None
    if h is not None:
        b = h * scale
        from_entropy = b * (rows.take(stats.entropy) - log_s)
        a = from_entropy if a is None else a + from_entropy
        b = b.neg_()[:, None]
    a = torch.zeros_like(m) if a is None else a.neg_()
    if g is not None and gain is not None:
        g = g * gain  # the same product as in `scale`: a certain row (p = 1) cancels exactly
    columns = [a[:, None], b, None if g is None else g[:, None], m[:, None]]
    if rows.dead is not None:
        columns = [None if c is None else c.masked_fill(rows.dead[:, None], 0.0) for c in columns]
    return tuple(columns)


def dlogits_(z: Tensor, y: Tensor, columns: tuple[Tensor | None, ...], r: slice, guard: bool = False) -> Tensor:
    """Turns scaled logits z into dL/dlogits in place; y [n, 1] counts from the tile's first column.

    A label outside the tile adds nothing, wherever it lies: vocabulary shards rely on that.
    """
    a, b, at_label, m = (None if c is None else c[r] for c in columns)
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


def slices(total: int, step: int, start: int = 0) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover start..total."""
    return (slice(i, min(i + step, total)) for i in range(start, total, step))
