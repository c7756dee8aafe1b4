"""Triton matrix products of `linear_logp_entropy`, each with its epilogue on the float32 accumulator.

`forward_kernel`: logits -> per (row, vocabulary tile) statistics, the label's logit, and optionally stored logits.
`dlogits_kernel`: logits again -> dL/dlogits of a slab of the vocabulary. `product_kernel`: dX and dW from that slab.
All three are persistent, share one product loop, and take their operands through tensor descriptors (TMA) or through
pointers. Rows are compact: the first `n_live` (a number in device memory) are worked on, tiles beyond them cost
nothing. No atomics, one-dimensional grids; row offsets are 64-bit. What runs before and after is in `triton_rows`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reference import STORE_TILE

LOG2_E = tl.constexpr(1.4426950408889634)
# In units of scaled logits: e^x is exactly 0 there, and x e^x is 0, not NaN as for -inf.
EXP_FLOOR = tl.constexpr(-1.0e4)
GROUP_COLUMNS = tl.constexpr(STORE_TILE)
PART_COLUMNS = tl.constexpr(64)  # of a tile that an epilogue works on at once, to stay within the registers
# Where V ends: with a tile (0), with half a tile of two groups, or anywhere, so that single columns are masked.
RAGGED_GROUP, RAGGED_COLUMN = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def tile_position(index, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) number `index`: the row tiles of a group run side by side, column tile by column tile.

    They share the column operand, and the group's row operand stays in the L2 cache meanwhile.
    """
    group = index // (GROUP * column_tiles)
    first = group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = index - first * column_tiles
    return first + inside % height, inside // height


@triton.jit
def product_tile(
    acc, a, b, r0, c0, ROWS, COLUMNS, DEPTH, stride_ar, stride_ad, stride_bc, stride_bd,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    A_DEPTH_MAJOR: tl.constexpr, B_DEPTH_MAJOR: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_R, BLOCK_C] + A[r0:, :DEPTH] @ B[c0:, :DEPTH].T; zeros are read outside.

    A_DEPTH_MAJOR: memory holds A as [depth, rows]; B_DEPTH_MAJOR: memory holds B as [depth, columns].
    """
    if TMA:
        for d in range(0, DEPTH, BLOCK_D):
            if A_DEPTH_MAJOR:
                x = a.load([d, r0]).T
            else:
                x = a.load([r0, d])
            if B_DEPTH_MAJOR:
                y = b.load([d, c0])
            else:
                y = b.load([c0, d]).T
            if UPCAST:
                x, y = x.to(tl.float32), y.to(tl.float32)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
    else:
        d = tl.arange(0, BLOCK_D)
        r = r0 + tl.arange(0, BLOCK_R)
        c = c0 + tl.arange(0, BLOCK_C)
        row_inside, column_inside = (r < ROWS)[:, None], (c < COLUMNS)[None, :]
        # 64-bit only where it is added up once per tile.
        a_tile = a + r.to(tl.int64)[:, None] * stride_ar + d[None, :] * stride_ad
        b_tile = b + c.to(tl.int64)[None, :] * stride_bc + d[:, None] * stride_bd
        a_step, b_step = tl.full((), BLOCK_D, tl.int64) * stride_ad, tl.full((), BLOCK_D, tl.int64) * stride_bd
        for d0 in range(0, DEPTH, BLOCK_D):
            x = tl.load(a_tile, mask=row_inside & (d[None, :] < DEPTH - d0), other=0.0)
            y = tl.load(b_tile, mask=column_inside & (d[:, None] < DEPTH - d0), other=0.0)
            if UPCAST:
                x, y = x.to(tl.float32), y.to(tl.float32)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
            a_tile += a_step
            b_tile += b_step
    return acc


@triton.jit
def split_columns(tile, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Left and right half of [BLOCK_R, BLOCK_C]."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_R, 2, BLOCK_C // 2)), (0, 2, 1)))


@triton.jit
def shifted_sums(z, m, k, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, GUARD: tl.constexpr):
    """(sum e^(k x), sum x e^(k x)) over the columns, x = z - m. GUARD: z may hold -inf."""
    if BLOCK_C > PART_COLUMNS:
        left, right = split_columns(z, BLOCK_R, BLOCK_C)
        s, u = shifted_sums(left, m, k, BLOCK_R, BLOCK_C // 2, GUARD)
        right_s, right_u = shifted_sums(right, m, k, BLOCK_R, BLOCK_C // 2, GUARD)
        return s + right_s, u + right_u
    else:
        d = z - tl.where(m == float("-inf"), 0.0, m)[:, None]  # -inf - -inf would be NaN
        if GUARD:
            d = tl.maximum(d, ((1.0 / k) * EXP_FLOOR)[:, None])
        e = tl.exp2(d * (k * LOG2_E)[:, None])
        return tl.sum(e, 1), tl.sum(e * d, 1)


@triton.jit
def finish_logits(
    z, bias, cap, cap_factor, c0, V,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, RAGGED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Bias, softcap and missing columns of the products of columns c0.. ."""
    c = c0 + tl.arange(0, BLOCK_C)
    if HAS_BIAS:
        z += tl.load(bias + c, mask=c < V, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        z = cap * tanh(z * cap_factor)
    if RAGGED == RAGGED_COLUMN:
        z = tl.where((c < V)[None, :], z, float("-inf"))
    return z


@triton.jit
def label_column(z, y, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """z[:, y] of each row, 0 where y is no column of the tile."""
    if BLOCK_C > PART_COLUMNS:
        left, right = split_columns(z, BLOCK_R, BLOCK_C)
        label = label_column(left, y, BLOCK_R, BLOCK_C // 2)
        return label + label_column(right, y - BLOCK_C // 2, BLOCK_R, BLOCK_C // 2)
    else:
        return tl.sum(tl.where(tl.arange(0, BLOCK_C)[None, :] == y[:, None], z, 0.0), 1)


@triton.jit
def store_logits(
    store, store_max, z, m, k, r, c0, first_row, live, stored, V, BLOCK_R: tl.constexpr, RELATIVE: tl.constexpr
):
    """Keeps the scaled logits of GROUP_COLUMNS columns, RELATIVE to their maximum m in low precision."""
    position = (first_row + r).to(tl.int64)
    kept = (r < live) & (position < stored)
    base = tl.zeros_like(m)
    if RELATIVE:
        base = tl.where(m == float("-inf"), 0.0, m)
        mask = kept & (c0 + tl.zeros_like(r) < V)
        tl.store(store_max + position * tl.cdiv(V, GROUP_COLUMNS) + c0 // GROUP_COLUMNS, m * k, mask=mask)
    store_scaled(store + position * V, z, base, k, kept, c0, V, BLOCK_R, GROUP_COLUMNS)


@triton.jit
def store_scaled(rows, z, base, k, kept, c0, V, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    if BLOCK_C > PART_COLUMNS:
        left, right = split_columns(z, BLOCK_R, BLOCK_C)
        store_scaled(rows, left, base, k, kept, c0, V, BLOCK_R, BLOCK_C // 2)
        store_scaled(rows, right, base, k, kept, c0 + BLOCK_C // 2, V, BLOCK_R, BLOCK_C // 2)
    else:
        c = c0 + tl.arange(0, BLOCK_C)
        z = (z - base[:, None]) * k[:, None]
        tl.store(rows[:, None] + c[None, :], z.to(rows.dtype.element_ty), mask=kept[:, None] & (c < V)[None, :])


@triton.jit
def forward_kernel(
    x, weight, bias, labels, label_tiles, row_factor, factor, cap, cap_factor,
    partial, label_logit, store, store_max, n_live_ptr, first_row, slab_rows, V, H, stored,
    stride_xr, stride_xd, stride_wc, stride_wd,
    HAS_BIAS: tl.constexpr, ROW_FACTOR: tl.constexpr, SOFTCAP: tl.constexpr, RAGGED: tl.constexpr,
    STORE: tl.constexpr, STORE_RELATIVE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Statistics of z = factor * logits for `slab_rows` compact rows from `first_row` on (x and labels start there).

    partial [column tiles, 3, slab_rows] receives (m, s, u); label_logit [slab_rows] the label's z, from the tile that
    owns it; store [stored, V] the first `stored` compact rows of the batch. label_tiles [row tiles, column tiles] says
    which tiles own a label, so that the others do not look.
    """
    live = tl.minimum(tl.maximum(tl.load(n_live_ptr) - first_row, 0), slab_rows)
    row_tiles, column_tiles = tl.cdiv(live, BLOCK_R), tl.cdiv(V, BLOCK_C)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=FLATTEN, warp_specialize=SPECIALIZE
    ):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        r0, c0 = row_tile * BLOCK_R, column_tile * BLOCK_C
        z = product_tile(
            tl.zeros((BLOCK_R, BLOCK_C), tl.float32), x, weight, r0, c0, slab_rows, V, H,
            stride_xr, stride_xd, stride_wc, stride_wd,
            BLOCK_R, BLOCK_C, BLOCK_D, False, False, TMA, UPCAST, PRECISION,
        )  # fmt: skip
        r = r0 + tl.arange(0, BLOCK_R)
        k = tl.full((BLOCK_R,), 1.0, tl.float32) * factor
        if ROW_FACTOR:
            k = tl.load(row_factor + r, mask=r < live, other=1.0)
        # The logits are not scaled yet: the factor is applied to differences and to results, once per row.
        GUARD: tl.constexpr = HAS_BIAS or RAGGED == RAGGED_COLUMN
        y = tl.full((BLOCK_R,), -1, tl.int32)
        labelled = tl.load(label_tiles + row_tile * column_tiles + column_tile) != 0
        if labelled:
            y = tl.load(labels + r, mask=r < live, other=-1) - c0
        if BLOCK_C == GROUP_COLUMNS:
            z = finish_logits(z, bias, cap, cap_factor, c0, V, HAS_BIAS, SOFTCAP, RAGGED, GROUP_COLUMNS)
            if labelled:
                owned = (y >= 0) & (y < GROUP_COLUMNS)
                tl.store(label_logit + r, label_column(z, y, BLOCK_R, GROUP_COLUMNS) * k, mask=owned)
            m = tl.max(z, 1)
            if STORE:
                store_logits(store, store_max, z, m, k, r, c0, first_row, live, stored, V, BLOCK_R, STORE_RELATIVE)
            s, u = shifted_sums(z, m, k, BLOCK_R, BLOCK_C, GUARD)
        else:
            tl.static_assert(BLOCK_C == 2 * GROUP_COLUMNS)
            left, right = split_columns(z, BLOCK_R, BLOCK_C)
            left = finish_logits(left, bias, cap, cap_factor, c0, V, HAS_BIAS, SOFTCAP, RAGGED, GROUP_COLUMNS)
            right = finish_logits(
                right, bias, cap, cap_factor, c0 + GROUP_COLUMNS, V, HAS_BIAS, SOFTCAP, RAGGED, GROUP_COLUMNS
            )
            if labelled:
                label = label_column(left, y, BLOCK_R, GROUP_COLUMNS)
                label += label_column(right, y - GROUP_COLUMNS, BLOCK_R, GROUP_COLUMNS)
                tl.store(label_logit + r, label * k, mask=(y >= 0) & (y < BLOCK_C))
            left_m, right_m = tl.max(left, 1), tl.max(right, 1)
            if STORE:
                store_logits(
                    store, store_max, left, left_m, k, r, c0, first_row, live, stored, V, BLOCK_R, STORE_RELATIVE
                )
                store_logits(
                    store, store_max, right, right_m, k, r, c0 + GROUP_COLUMNS, first_row, live, stored, V, BLOCK_R,
                    STORE_RELATIVE,
                )  # fmt: skip
            if RAGGED == RAGGED_GROUP:
                right_inside = c0 + GROUP_COLUMNS + tl.zeros_like(r) < V
                right_m = tl.where(right_inside, right_m, float("-inf"))
            m = tl.maximum(left_m, right_m)
            s, u = shifted_sums(left, m, k, BLOCK_R, GROUP_COLUMNS, GUARD)
            right_s, right_u = shifted_sums(right, m, k, BLOCK_R, GROUP_COLUMNS, GUARD)
            if RAGGED == RAGGED_GROUP:
                right_s, right_u = tl.where(right_inside, right_s, 0.0), tl.where(right_inside, right_u, 0.0)
            s, u = s + right_s, u + right_u
        out = partial + column_tile.to(tl.int64) * 3 * slab_rows + r
        tl.store(out, m * k, mask=r < live)
        tl.store(out + slab_rows, s, mask=r < live)
        tl.store(out + 2 * slab_rows, u * k, mask=r < live)


@triton.jit
def dlogits_columns(
    z, k, m, a, b, at_label, y, labelled, bias, bias_partial, dz, stride_dz, cap, cap_factor, r0, c0, rows, V,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, NEED_BIAS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Turns products z into dL/da and writes them, PART columns at a time."""
    if BLOCK_C > PART:
        left, right = split_columns(z, BLOCK_R, BLOCK_C)
        dlogits_columns(
            left, k, m, a, b, at_label, y, labelled, bias, bias_partial, dz, stride_dz, cap, cap_factor,
            r0, c0, rows, V, HAS_BIAS, SOFTCAP, NEED_BIAS, TMA, BLOCK_R, BLOCK_C // 2, PART,
        )  # fmt: skip
        dlogits_columns(
            right, k, m, a, b, at_label, y, labelled, bias, bias_partial, dz, stride_dz, cap, cap_factor,
            r0, c0 + BLOCK_C // 2, rows, V, HAS_BIAS, SOFTCAP, NEED_BIAS, TMA, BLOCK_R, BLOCK_C // 2, PART,
        )  # fmt: skip
    else:
        r, c = r0 + tl.arange(0, BLOCK_R), c0 + tl.arange(0, BLOCK_C)
        if HAS_BIAS:
            z += tl.load(bias + c, mask=c < V, other=0.0).to(tl.float32)[None, :]
        t = z
        if SOFTCAP:
            t = tanh(z * cap_factor)
            z = cap * t
        d = z * k[:, None] - m[:, None]
        if HAS_BIAS:
            d = tl.maximum(d, EXP_FLOOR)
        g = tl.exp(d) * (a[:, None] + b[:, None] * d)
        if labelled:
            g += tl.where(c[None, :] == y[:, None], at_label[:, None], 0.0)
        if SOFTCAP:
            g *= 1.0 - t * t
        if NEED_BIAS:
            tl.store(bias_partial + c, tl.sum(g, 0), mask=c < V)
        if TMA:
            dz.store([r0, c0], g.to(dz.dtype))
        else:
            tl.store(
                dz + r.to(tl.int64)[:, None] * stride_dz + c[None, :], g.to(dz.dtype.element_ty),
                mask=(r < rows)[:, None] & (c < V)[None, :],
            )  # fmt: skip


@triton.jit
def dlogits_kernel(
    x, weight, bias, labels, label_tiles, row_factor, factor, cap, cap_factor,
    coefficients, dz, bias_partial, counts, rows, V, H, first_column,
    stride_xr, stride_xd, stride_wc, stride_wd, stride_dz, label_stride,
    HAS_BIAS: tl.constexpr, ROW_FACTOR: tl.constexpr, SOFTCAP: tl.constexpr, NEED_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """dL/da [rows, V] of a slab whose columns (weight, bias) start at `first_column`; V counts the slab's columns.

    coefficients [4, rows] as `triton_rows.coefficients_kernel` writes them. counts = (n_live, n_stored): row tiles
    that `stored_dlogits_kernel` fills are left to it. Dead rows of the last tile become zeros. bias_partial
    [row tiles, V] receives column sums before rounding.
    """
    live = tl.load(counts)
    first_tile = first_recomputed_tile(live, tl.load(counts + 1), BLOCK_R)
    row_tiles, column_tiles = tl.cdiv(live, BLOCK_R) - first_tile, tl.cdiv(V, BLOCK_C)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=FLATTEN, warp_specialize=SPECIALIZE
    ):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        row_tile += first_tile
        r0, c0 = row_tile * BLOCK_R, column_tile * BLOCK_C
        z = product_tile(
            tl.zeros((BLOCK_R, BLOCK_C), tl.float32), x, weight, r0, c0, rows, V, H,
            stride_xr, stride_xd, stride_wc, stride_wd,
            BLOCK_R, BLOCK_C, BLOCK_D, False, False, TMA, UPCAST, PRECISION,
        )  # fmt: skip
        r = r0 + tl.arange(0, BLOCK_R)
        k = tl.full((BLOCK_R,), 1.0, tl.float32) * factor
        if ROW_FACTOR:
            k = tl.load(row_factor + r, mask=r < live, other=1.0)
        a, b, at_label, m = load_coefficients(coefficients, r, rows, live)
        y = tl.load(labels + r, mask=r < live, other=-1) - first_column
        labelled = tl.load(label_tiles + row_tile * label_stride + first_column // BLOCK_C + column_tile) != 0
        dlogits_columns(
            z, k, m, a, b, at_label, y, labelled, bias, bias_partial + row_tile.to(tl.int64) * V, dz, stride_dz,
            cap, cap_factor, r0, c0, rows, V, HAS_BIAS, SOFTCAP, NEED_BIAS, TMA, BLOCK_R, BLOCK_C, PART,
        )  # fmt: skip


@triton.jit
def stored_dlogits_kernel(
    store, store_max, rank, labels, cap_slope, factor, row_factor, coefficients, dz, bias_partial, counts, rows, V,
    first_column, vocabulary, stride_dz,
    ROW_FACTOR: tl.constexpr, SOFTCAP: tl.constexpr, NEED_BIAS: tl.constexpr, RELATIVE: tl.constexpr,
    TILE_R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The rows of `dlogits_kernel` whose logits were stored: rank [rows] is the row of `store` they are in.

    One program per (row tile of `dlogits_kernel`, block of columns), because they share bias_partial's rows.
    """
    live = tl.load(counts)
    column_blocks = tl.cdiv(V, BLOCK_C)
    row_tile = tl.program_id(0) // column_blocks
    c = (tl.program_id(0) % column_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = first_column + c
    inside = c < V
    stop = tl.minimum(tl.minimum(tl.cdiv(live, TILE_R) * TILE_R, rows), (row_tile + 1) * TILE_R)
    ours = row_tile < first_recomputed_tile(live, tl.load(counts + 1), TILE_R)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for r0 in range(row_tile * TILE_R, tl.where(ours, stop, 0), BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        position = tl.load(rank + r, mask=r < live, other=0).to(tl.int64)
        mask = (r < live)[:, None] & inside[None, :]
        z = tl.load(store + position[:, None] * vocabulary + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if RELATIVE:
            groups = tl.cdiv(vocabulary, GROUP_COLUMNS)
            group = store_max + position[:, None] * groups + (column // GROUP_COLUMNS)[None, :]
            z += tl.load(group, mask=mask, other=0.0)
        a, b, at_label, m = load_coefficients(coefficients, r, rows, live)
        d = tl.maximum(z - m[:, None], EXP_FLOOR)
        y = tl.load(labels + r, mask=r < live, other=-1)
        g = tl.exp(d) * (a[:, None] + b[:, None] * d) + tl.where(column[None, :] == y[:, None], at_label[:, None], 0.0)
        if SOFTCAP:
            k = tl.full((BLOCK_R,), 1.0, tl.float32) * factor
            if ROW_FACTOR:
                k = tl.load(row_factor + r, mask=r < live, other=1.0)
            t = z * (cap_slope / k)[:, None]  # z = k cap t
            g *= 1.0 - t * t
        g = tl.where(mask, g, 0.0)
        sums += tl.sum(g, 0)
        tl.store(
            dz + r.to(tl.int64)[:, None] * stride_dz + c[None, :], g.to(dz.dtype.element_ty),
            mask=(r < rows)[:, None] & inside[None, :],
        )  # fmt: skip
    if NEED_BIAS and ours:
        tl.store(bias_partial + row_tile.to(tl.int64) * V + c, sums, mask=inside)


@triton.jit
def store_columns(
    out, acc, r0, c0, ROWS, COLUMNS, stride_out, ACCUMULATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    if BLOCK_C > PART_COLUMNS:
        left, right = split_columns(acc, BLOCK_R, BLOCK_C)
        store_columns(out, left, r0, c0, ROWS, COLUMNS, stride_out, ACCUMULATE, BLOCK_R, BLOCK_C // 2)
        store_columns(out, right, r0, c0 + BLOCK_C // 2, ROWS, COLUMNS, stride_out, ACCUMULATE, BLOCK_R, BLOCK_C // 2)
    else:
        r, c = r0 + tl.arange(0, BLOCK_R), c0 + tl.arange(0, BLOCK_C)
        pointers = out + r.to(tl.int64)[:, None] * stride_out + c[None, :]
        mask = (r < ROWS)[:, None] & (c < COLUMNS)[None, :]
        if ACCUMULATE:
            acc += tl.load(pointers, mask=mask, other=0.0)
        tl.store(pointers, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def product_kernel(
    a, b, out, counts, ROWS, COLUMNS, DEPTH, stride_ar, stride_ad, stride_bc, stride_bd, stride_out,
    LIVE_ROWS: tl.constexpr, ACCUMULATE: tl.constexpr, A_DEPTH_MAJOR: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [ROWS, COLUMNS] = A @ B, float32 sums rounded once; B is held as [depth, columns].

    The number of live rows, read from `counts`, bounds the rows (LIVE_ROWS) or else the depth. ACCUMULATE adds to
    what float32 `out` holds.
    """
    live = tl.load(counts)
    if LIVE_ROWS:
        row_tiles, depth = tl.cdiv(live, BLOCK_R), DEPTH
    else:
        row_tiles, depth = tl.cdiv(ROWS, BLOCK_R), live
    column_tiles = tl.cdiv(COLUMNS, BLOCK_C)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=FLATTEN, warp_specialize=SPECIALIZE
    ):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        r0, c0 = row_tile * BLOCK_R, column_tile * BLOCK_C
        acc = product_tile(
            tl.zeros((BLOCK_R, BLOCK_C), tl.float32), a, b, r0, c0, ROWS, COLUMNS, depth,
            stride_ar, stride_ad, stride_bc, stride_bd,
            BLOCK_R, BLOCK_C, BLOCK_D, A_DEPTH_MAJOR, True, TMA, UPCAST, PRECISION,
        )  # fmt: skip
        store_columns(out, acc, r0, c0, ROWS, COLUMNS, stride_out, ACCUMULATE, BLOCK_R, BLOCK_C)


@triton.jit
def first_recomputed_tile(live, stored, BLOCK_R: tl.constexpr):
    """Row tiles before it come from the store: whole tiles of stored rows, or all if every row is stored."""
    return tl.where(stored >= live, tl.cdiv(live, BLOCK_R), stored // BLOCK_R)


@triton.jit
def load_coefficients(coefficients, r, rows, live):
    inside = r < live
    a = tl.load(coefficients + r, mask=inside, other=0.0)
    b = tl.load(coefficients + rows + r, mask=inside, other=0.0)
    at_label = tl.load(coefficients + 2 * rows + r, mask=inside, other=0.0)
    # A dead row's logits are the bias alone: e^x from a maximum of 0 could be inf, and inf * 0 is NaN.
    m = tl.load(coefficients + 3 * rows + r, mask=inside, other=1e30)
    return a, b, at_label, m


@triton.jit
def tanh(x):
    """1 - 2 / (e^2x + 1), absolute error 1e-7; correct at +-inf."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
