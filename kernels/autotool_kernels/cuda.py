"""CUDA C++ backend of `logits_logp_entropy` and `sample_logp_entropy`.

Finds, loads and calls the extension built from `csrc/` (`make ext`). It loads under a CPU build of torch
too, so its schemas can be checked without a GPU; only a call needs one.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .reference import RowStats

TARGET_VERSION = "0x020b000000000000"  # torch 2.11, the oldest that may load the library
LIBRARY_GLOB = "_cuda_*.so"
_PACKAGE = Path(__file__).parent
_SOURCES = _PACKAGE.parents[1] / "csrc"


def library_path() -> Path:
    """The library for the present sources; a package without sources takes the one it ships with."""
    files = sorted((*_SOURCES.glob("*.cu"), *_SOURCES.glob("*.cuh"), *_SOURCES.glob("build.py")))
    if not files:
        return next(iter(sorted(_PACKAGE.glob(LIBRARY_GLOB))), _PACKAGE / "_cuda_none.so")
    digest = hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()[:12]
    return _PACKAGE / f"_cuda_{digest}.so"


@lru_cache(maxsize=1)
def load() -> str | None:
    """Loads the extension once; None, or why it cannot be used."""
    path = library_path()
    if not path.exists():
        stale = any(_PACKAGE.glob(LIBRARY_GLOB))
        return f"the extension is {'out of date' if stale else 'not built'} (make ext)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {str(error).splitlines()[0]}"
    return None


def logits_forward(
    logits: Tensor,
    target: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    ignore_index: int,
) -> RowStats:
    stats = RowStats(*(torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(4)))
    torch.ops.autotool_kernels_cuda.logits_forward(
        logits, target.long().contiguous(), temperature, row_temperature, ignore_index, *stats
    )
    return stats


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
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    torch.ops.autotool_kernels_cuda.logits_backward(
        grad_logp, grad_entropy, logits, target.long().contiguous(), *stats[1:],
        temperature, row_temperature, ignore_index, out,
    )  # fmt: skip
    return out


def sample_forward(
    logits: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    seed: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, device = logits.shape[0], logits.device
    token = torch.empty(rows, dtype=torch.int64, device=device)
    logp, entropy = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    torch.ops.autotool_kernels_cuda.sample(
        logits, temperature, row_temperature, seed.contiguous(), offset.contiguous(), token, logp, entropy
    )
    return token, logp, entropy
