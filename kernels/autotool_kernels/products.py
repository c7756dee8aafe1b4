"""Matrix products of the PyTorch backend: accumulated and returned in float32 (float64), whatever the inputs.

On a CPU large float32 products go to oneDNN: torch.mm calls MKL, which stays with AVX2 on processors it does not
know (an AMD EPYC with AVX-512: 98 GFLOP/s against 215 on one core). oneDNN builds code for each new shape,
up to a millisecond, so small products stay with torch.mm; `torch.backends.mkldnn.flags(enabled=False)` keeps all.
"""

from __future__ import annotations

import torch
from torch import Tensor

ONEDNN_FLOPS = 1 << 26


def project(x: Tensor, w: Tensor, dtype: torch.dtype, blocked: Tensor | None = None) -> Tensor:
    """x [n, k] @ w [m, k].T in `dtype`, never rounded to the inputs' low precision; `blocked` is `block_weight`'s w."""
    if x.is_cuda and x.dtype != dtype:
        return torch.mm(x, w.t(), out_dtype=dtype)
    if blocked is not None and _worth_onednn(x.shape[0], w) and _onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), blocked, None, "none", [], "")
    return _times_transposed(x.to(dtype), w.to(dtype))


def block_weight(w: Tensor, dtype: torch.dtype, rows: int) -> Tensor | None:
    """A copy of w [m, k] in oneDNN's own layout, for many products with up to `rows` rows; None where no product would
    use it.

    They are the same bit by bit, without rearranging (or widening) w each time: a quarter of the time at 32 rows.
    """
    if dtype != torch.float32 or not (_worth_onednn(rows, w) and _onednn(w)):
        return None
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(w.detach().to(dtype).contiguous(), rows)


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a [n, k] @ b [k, m] in `dtype`; a has that dtype, or on a GPU the low precision of b."""
    if b.is_cuda and b.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return _times_transposed(a, b.to(dtype).t())


def _times_transposed(x: Tensor, w: Tensor) -> Tensor:
    if x.dtype == torch.float32 and _worth_onednn(x.shape[0], w) and _onednn(x):
        # Without a dense second operand oneDNN falls back to a loop that is a thousand times slower.
        if not (w.is_contiguous() or w.t().is_contiguous()):
            w = w.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.mm(x, w.t())


def _worth_onednn(rows: int, w: Tensor) -> bool:
    return 2 * rows * w.numel() >= ONEDNN_FLOPS


def _onednn(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
