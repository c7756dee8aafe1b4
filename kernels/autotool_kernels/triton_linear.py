"""Triton backend of `linear_logp_entropy`: what is launched, on which workspace, in which order.

Forward: rows are compacted and gathered slab by slab, one product kernel leaves statistics per (row, vocabulary tile),
a merge kernel joins them in an order fixed by V. So a row's result does not depend on the other rows. Backward:
vocabulary-major. A slab of dL/dlogits is recomputed (or taken from stored logits), gives its slice of dW, written
once, and its share of dX, summed in float32. Ignored rows, and in the backward rows without gradient, cost nothing.
Nothing waits for the host, repeats are bitwise equal, and workspaces are bounded by the constants below (dX and the
gathered rows of the backward have the size of hidden). Tile settings come from `configs`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import INTERPRETER, LARGEST_BLOCK, LinearConfig, Tile, for_column_work, select, unaligned
from .dispatch import interpreting
from .reference import STORE_TILE, Head, RowStats, Store, store_dtype, store_tiles, stored_rows
from .triton_gemm import (
    PART_COLUMNS,
    RAGGED_COLUMN,
    RAGGED_GROUP,
    dlogits_kernel,
    forward_kernel,
    product_kernel,
    stored_dlogits_kernel,
)
from .triton_logits import gradient_arguments, temperature_arguments
from .triton_rows import coefficients_kernel, gather_kernel, merge_kernel, order_kernel, scatter_kernel

PARTIAL_BYTES = 64 << 20  # forward: statistics of one slab of rows
DLOGITS_BYTES = 512 << 20  # backward: dL/dlogits of one slab of the vocabulary
ORDER_BLOCK = 2048
ROW_BLOCK, HIDDEN_BLOCK = 8, 512
MERGE_ROWS, MERGE_TILES = 16, 64
SLAB_STEP = 512
STORED_ROWS, STORED_COLUMNS = 8, 256
COEFFICIENT_ROWS = 256
FLOAT32_PRECISION = "tf32x3"


class Device(NamedTuple):
    """What tile settings are chosen for."""

    architecture: str  # "sm_90", or "interpreter"
    processors: int  # streaming multiprocessors


def linear_forward(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N]
    head: Head,
    store_bytes: int = 0,
    *,
    config: LinearConfig | None = None,
) -> tuple[RowStats, Store]:
    """Statistics of every row (zeros where ignored) and as many stored logits as `store_bytes` hold."""
    (n, depth), v = hidden.shape, weight.shape[0]
    head = _contiguous(head)
    device = _device(hidden)
    new = {"dtype": torch.float32, "device": hidden.device}
    stats = RowStats(*(torch.empty(n, **new) for _ in range(4)))
    stored = stored_rows(n, v, hidden.dtype, store_bytes)
    store = Store(
        torch.empty((stored, v), dtype=store_dtype(hidden.dtype), device=hidden.device),
        torch.empty((stored, store_tiles(v, hidden.dtype)), **new),
    )
    if not n:
        return stats, store
    tile = _usable(config or select(device.architecture, depth, v, n, hidden.dtype), weight).forward
    missing = v % STORE_TILE > 0
    if head.softcap or head.bias is not None or missing:
        tile = for_column_work(device.architecture, tile, missing)
    ragged = _ragged(v, tile)
    order, _, counts = _order(target, head.ignore_index)
    column_tiles = triton.cdiv(v, tile.cols)
    slab = _even_slab(n, PARTIAL_BYTES // (12 * column_tiles), max(tile.rows, 128))
    partial, label_logit = torch.empty((column_tiles, 3, slab), **new), torch.empty(slab, **new)
    for first in range(0, n, slab):
        rows = min(slab, n - first)
        x, labels, row_factor, label_tiles = _gather(hidden, target, order, counts, head, v, first, rows, tile)
        programs, grid = _programs(device, tile, rows, v)
        forward_kernel[(grid,)](
            *_operands(x, weight, tile), _or(head.bias, x), labels, label_tiles, _or(row_factor, x),
            *_factors(head), partial, label_logit, store.logits, store.tile_max, counts, first, rows, v, depth,
            stored, *x.stride(), *weight.stride(),
            HAS_BIAS=head.bias is not None, ROW_FACTOR=row_factor is not None, SOFTCAP=head.softcap > 0,
            RAGGED=ragged, STORE=first < stored, STORE_RELATIVE=store.tile_max.shape[1] > 0,
            PROGRAMS=programs, **_constants(tile, hidden),
        )  # fmt: skip
        merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
            partial, label_logit, labels, order, counts, *stats, first, rows, column_tiles,
            BLOCK_R=MERGE_ROWS, BLOCK_T=MERGE_TILES,
        )  # fmt: skip
    return stats, store


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
    weight_sum: Tensor | None = None,  # [V, H] float32: dW is added to it and not returned
    rounded: bool = True,
    *,
    config: LinearConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; only those asked for are computed. dX and dbias float32 if not rounded."""
    (n, depth), v = hidden.shape, weight.shape[0]
    head = _contiguous(head)
    result = hidden.dtype if rounded else torch.float32
    if not n:
        dx = torch.zeros_like(hidden, dtype=result) if need_hidden else None
        dw = torch.zeros_like(weight) if need_weight and weight_sum is None else None
        return dx, dw, torch.zeros_like(head.bias, dtype=result) if need_bias else None
    device = _device(hidden)
    config = _usable(config or select(device.architecture, depth, v, n, hidden.dtype), weight)
    tile, cublas = config.dlogits, config.matmul == "cublas"
    stored = store.logits.shape[0]
    order, rank, counts = _order(target, head.ignore_index, grad_logp, grad_entropy, stored)
    x, labels, row_factor, label_tiles = _gather(
        hidden, target, order, counts, head, v, 0, n, tile, clear=cublas and need_weight
    )
    coefficients = _coefficients(grad_logp, grad_entropy, stats, head, order, counts, row_factor)

    new = {"dtype": torch.float32, "device": hidden.device}
    # The interpreter's products are float32; on a GPU low-precision slabs feed low-precision products.
    dtype = torch.float32 if interpreting() else hidden.dtype
    width = slab_columns(n, v, dtype.itemsize)
    dz_slab = (torch.zeros if cublas else torch.empty)((n, width), dtype=dtype, device=hidden.device)
    dx = torch.empty((n, depth), **new) if need_hidden else None
    dw = None
    if need_weight and weight_sum is None:
        dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = torch.empty(v, **new) if need_bias else None
    weight_out = dw if weight_sum is None else weight_sum
    row_tiles = triton.cdiv(n, tile.rows)
    # What an option keeps per element must fit into the registers beside the product.
    part = PART_COLUMNS.value // 2 if head.softcap or head.bias is not None else PART_COLUMNS.value

    for first in range(0, v, width):
        columns = slice(first, min(first + width, v))
        w = weight[columns]
        cols = w.shape[0]
        dz = dz_slab[:, :cols]
        bias_partial = torch.zeros((row_tiles, cols), **new) if need_bias else None
        programs, grid = _programs(device, tile, n, cols)
        bias = None if head.bias is None else head.bias[columns]
        dz_out = TensorDescriptor.from_tensor(dz, [tile.rows, part]) if tile.tma else dz
        dlogits_kernel[(grid,)](
            *_operands(x, w, tile), _or(bias, x), labels, label_tiles, _or(row_factor, x), *_factors(head),
            coefficients, dz_out, _or(bias_partial, x), counts, n, cols, depth, first,
            *x.stride(), *w.stride(), dz.stride(0), label_tiles.shape[1],
            HAS_BIAS=bias is not None, ROW_FACTOR=row_factor is not None, SOFTCAP=head.softcap > 0,
            NEED_BIAS=need_bias, PROGRAMS=programs, PART=part,
            **_constants(tile, hidden),
        )  # fmt: skip
        if stored:
            factor, cap, _ = _factors(head)
            blocks = triton.cdiv(cols, STORED_COLUMNS) * triton.cdiv(stored, tile.rows)
            stored_dlogits_kernel[(blocks,)](
                store.logits, store.tile_max, rank, labels, 1.0 / cap, factor, _or(row_factor, x), coefficients, dz,
                _or(bias_partial, x), counts, n, cols, first, v, dz.stride(0),
                ROW_FACTOR=row_factor is not None, SOFTCAP=head.softcap > 0, NEED_BIAS=need_bias,
                RELATIVE=store.tile_max.shape[1] > 0, TILE_R=tile.rows, BLOCK_R=STORED_ROWS, BLOCK_C=STORED_COLUMNS,
            )  # fmt: skip
        if need_weight:
            _weight_product(config, device, dz, x, weight_out[columns], counts, weight_sum is not None)
        if need_hidden:
            _hidden_product(config, device, dz, w, dx, counts, first > 0)
        if need_bias:
            torch.sum(bias_partial, 0, out=dbias[columns])

    if need_hidden:
        dx = _scatter(dx, order, counts, result)
    return dx, dw, dbias if dbias is None else dbias.to(result)


def slab_columns(n: int, v: int, itemsize: int) -> int:
    """Vocabulary columns of one slab of dL/dlogits [n, columns]: all, or as many as DLOGITS_BYTES hold."""
    fitting = DLOGITS_BYTES // (n * itemsize) // SLAB_STEP * SLAB_STEP
    return min(max(fitting, SLAB_STEP), triton.cdiv(v, STORE_TILE) * STORE_TILE)


def _order(
    target: Tensor,
    ignore_index: int,
    grad_logp: Tensor | None = None,
    grad_entropy: Tensor | None = None,
    stored: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(order [N], rank [N], counts [2]) of `order_kernel`; for a backward when `stored` is given."""
    n = target.shape[0]
    order, rank = (torch.empty(n, dtype=torch.int32, device=target.device) for _ in range(2))
    counts = torch.empty(2, dtype=torch.int32, device=target.device)
    backward = stored is not None
    g, h, stride_g, stride_h = gradient_arguments(grad_logp, grad_entropy, target)
    order_kernel[(1,)](
        target, g, h, target.stride(0), stride_g, stride_h, order, rank, counts, n, stored or 0, ignore_index,
        BACKWARD=backward, HAS_G=grad_logp is not None, HAS_H=grad_entropy is not None,
        BLOCK=ORDER_BLOCK, num_warps=8,
    )  # fmt: skip
    return order, rank, counts


def _gather(
    hidden: Tensor, target: Tensor, order: Tensor, counts: Tensor, head: Head, v: int, first: int, rows: int,
    tile: Tile, clear: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Compact rows of one slab: x [rows, H], labels [rows], row_factor [rows] or None, label_tiles."""
    depth, device = hidden.shape[1], hidden.device
    step = 16 // hidden.element_size()  # tensor descriptors want row strides of 16 bytes
    new = torch.zeros if clear else torch.empty
    x = new((rows, triton.cdiv(depth, step) * step), dtype=hidden.dtype, device=device)[:, :depth]
    labels = torch.empty(rows, dtype=torch.int32, device=device)
    row_factor = torch.empty(rows, dtype=torch.float32, device=device) if head.row_temperature is not None else None
    tiles = triton.cdiv(rows, tile.rows), triton.cdiv(v, tile.cols)
    label_tiles = torch.zeros(tiles, dtype=torch.int8, device=device)
    t, t_stride = temperature_arguments(head.row_temperature, hidden)
    gather_kernel[(triton.cdiv(rows, ROW_BLOCK),)](
        hidden, target, t, order, counts, x, labels, _or(row_factor, labels), label_tiles,
        first, rows, depth, v, tiles[1], 1.0 if head.softcap else float(head.logit_scale),
        *hidden.stride(), target.stride(0), t_stride, x.stride(0),
        HAS_ROW_T=row_factor is not None, TILE_R=tile.rows, TILE_C=tile.cols, PAD=LARGEST_BLOCK,
        BLOCK_R=ROW_BLOCK, BLOCK_H=HIDDEN_BLOCK,
    )  # fmt: skip
    return x, labels, row_factor, label_tiles


def _coefficients(grad_logp, grad_entropy, stats, head: Head, order, counts, row_factor) -> Tensor:
    n = order.shape[0]
    out = torch.empty((4, n), dtype=torch.float32, device=order.device)
    coefficients_kernel[(triton.cdiv(n, COEFFICIENT_ROWS),)](
        *gradient_arguments(grad_logp, grad_entropy, order), stats.entropy, stats.row_max, stats.log_sum,
        _or(row_factor, out), _factors(head)[0], float(head.logit_scale) if head.softcap else 1.0,
        order, counts, out, n,
        HAS_G=grad_logp is not None, HAS_H=grad_entropy is not None, ROW_FACTOR=row_factor is not None,
        BLOCK=COEFFICIENT_ROWS,
    )  # fmt: skip
    return out


def _weight_product(config: LinearConfig, device, dz: Tensor, x: Tensor, out: Tensor, counts: Tensor, add: bool):
    """out [cols, H] (+)= dz.T @ x over the live rows."""
    if config.matmul == "cublas":
        product = _mm(dz.t(), x)
        out.add_(product) if add else out.copy_(product)
        return
    tile = config.grad_weight
    a, b = dz, x
    if tile.tma:
        a = TensorDescriptor.from_tensor(dz, [tile.depth, tile.rows])
        b = TensorDescriptor.from_tensor(x, [tile.depth, tile.cols])
    programs, grid = _programs(device, tile, *out.shape)
    product_kernel[(grid,)](
        a, b, out, counts, *out.shape, dz.shape[0], dz.stride(1), dz.stride(0), x.stride(1), x.stride(0),
        out.stride(0), LIVE_ROWS=False, ACCUMULATE=add, A_DEPTH_MAJOR=True, PROGRAMS=programs,
        **_constants(tile, x),
    )  # fmt: skip


def _hidden_product(config: LinearConfig, device, dz: Tensor, w: Tensor, out: Tensor, counts: Tensor, add: bool):
    """out [N, H] (+)= dz @ w for the live rows."""
    if config.matmul == "cublas":
        product = _mm(dz, w)
        out.add_(product) if add else out.copy_(product)
        return
    tile = config.grad_hidden
    a, b = dz, w
    if tile.tma:
        a = TensorDescriptor.from_tensor(dz, [tile.rows, tile.depth])
        b = TensorDescriptor.from_tensor(w, [tile.depth, tile.cols])
    programs, grid = _programs(device, tile, *out.shape)
    product_kernel[(grid,)](
        a, b, out, counts, *out.shape, dz.shape[1], *dz.stride(), w.stride(1), w.stride(0), out.stride(0),
        LIVE_ROWS=True, ACCUMULATE=add, A_DEPTH_MAJOR=False, PROGRAMS=programs, **_constants(tile, w),
    )  # fmt: skip


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in float32."""
    if a.dtype == torch.float32:
        return a @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _scatter(dx: Tensor, order: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    n, depth = dx.shape
    out = torch.empty((n, depth), dtype=dtype, device=dx.device)
    scatter_kernel[(triton.cdiv(n, ROW_BLOCK),)](
        dx, order, counts, out, n, depth, dx.stride(0), out.stride(0), BLOCK_R=ROW_BLOCK, BLOCK_H=HIDDEN_BLOCK
    )
    return out


def _ragged(v: int, tile: Tile) -> int:
    """How `forward_kernel` keeps columns past the end of the vocabulary from carrying probability."""
    if v % STORE_TILE:
        return RAGGED_COLUMN.value
    return RAGGED_GROUP.value if v % tile.cols else 0


def _operands(x: Tensor, w: Tensor, tile: Tile) -> tuple:
    if not tile.tma:
        return x, w
    return (
        TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(w, [tile.cols, tile.depth]),
    )


def _usable(config: LinearConfig, weight: Tensor) -> LinearConfig:
    """`config` if rows of weight start and end on 16 bytes, as descriptors and wide loads want; else a fallback."""
    size = weight.element_size()
    in_place = weight.stride(1) == 1 and weight.data_ptr() % 16 == 0
    aligned = in_place and weight.stride(0) * size % 16 == 0 and weight.shape[1] * size % 16 == 0
    return config if aligned else unaligned(config)


def _constants(tile: Tile, operand: Tensor) -> dict:
    """Compile-time settings shared by the product kernels, and Triton's own options."""
    return {
        "BLOCK_R": tile.rows, "BLOCK_C": tile.cols, "BLOCK_D": tile.depth, "GROUP": tile.group,
        "FLATTEN": tile.flatten, "SPECIALIZE": tile.specialize, "TMA": tile.tma,
        # The interpreter's dot is wrong on bfloat16.
        "UPCAST": interpreting(), "PRECISION": "ieee" if operand.dtype != torch.float32 else FLOAT32_PRECISION,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _programs(device: Device, tile: Tile, rows: int, cols: int) -> tuple[int, int]:
    """(programs of a full grid, programs that have a tile): the first is compiled in and must not follow N."""
    most = device.processors * tile.programs
    return most, min(most, triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols))


def _factors(head: Head) -> tuple[float, float, float]:
    """(k, cap, cap_factor): z = k a without softcap, z = k cap tanh(cap_factor a) with it."""
    if head.softcap:
        return 1.0 / head.temperature, head.softcap, head.logit_scale / head.softcap
    return head.logit_scale / head.temperature, 1.0, 1.0


def _even_slab(n: int, most: int, step: int) -> int:
    """Rows of one slab: a multiple of step, at most `most` (but one step), all slabs nearly equal."""
    slabs = triton.cdiv(n, max(step, most // step * step))
    return min(n, triton.cdiv(triton.cdiv(n, slabs), step) * step)


def _contiguous(head: Head) -> Head:
    """`head` as the kernels read it: their bias has no stride."""
    return head if head.bias is None else head._replace(bias=head.bias.contiguous())


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """A pointer that a kernel may take; `unused` stands in where there is no tensor."""
    return unused if tensor is None else tensor


def _device(tensor: Tensor) -> Device:
    if interpreting():
        return Device(INTERPRETER, 3)  # few, so that a program walks more than one tile
    properties = torch.cuda.get_device_properties(tensor.device if tensor.is_cuda else None)
    return Device(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)
