"""CUDA C++ backend of `logits_logp_entropy`, `sample_logp_entropy` and `policy_loss`.

Finds, loads and calls the extension built from `csrc/` (`make ext`). It loads under a CPU build of torch
too, so its schemas can be checked without a GPU; only a call needs one.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .policy import METRICS, PolicyParts
from .reference import RowStats

TARGET_VERSION = "0x020b000000000000"  # torch 2.11, the oldest that may load the library
LIBRARY_GLOB = "_cuda_*.so"
# Sizes that csrc/ checks: float32 values per row of a sampler's workspace, and what policy_loss needs beside four
# float64 values per sequence.
SAMPLE_WORKSPACE = 40
POLICY_WORKSPACE = 1024
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


def architectures() -> tuple[str, ...]:
    """What the loaded library was built for, such as ("80", "90a", "100")."""
    name = ctypes.CDLL(str(library_path())).autotool_architectures
    name.restype = ctypes.c_char_p
    return tuple(name().decode().split())


def serves(capability: tuple[int, int], built: tuple[str, ...]) -> bool:
    """Whether machine code for one of `built` runs on a device: later minor versions of a major one too."""
    codes = (divmod(int(name.rstrip("af")), 10) for name in built)
    return any(major == capability[0] and minor <= capability[1] for major, minor in codes)


def logits_forward(
    logits: Tensor,
    target: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    ignore_index: int,
) -> RowStats:
    """Statistics of each row; `row_max` is that of the logits as given, not divided by the temperature."""
    stats = RowStats(*torch.empty((4, logits.shape[0]), dtype=torch.float32, device=logits.device).unbind())
    torch.ops.autotool_kernels_cuda.logits_forward(logits, target, temperature, row_temperature, ignore_index, *stats)
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
    out: Tensor | None = None,
) -> Tensor:
    """dL/dlogits, written to `out` (any strides; it may be the logits themselves) or to a new tensor."""
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    torch.ops.autotool_kernels_cuda.logits_backward(
        grad_logp, grad_entropy, logits, target, *stats[1:], temperature, row_temperature, ignore_index, out
    )
    return out


def sample_forward(
    logits: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    seed: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token int64, logp float32, entropy float32), each [B], by the CUDA extension; arguments as of
    `sampler.sample_forward`.
    """
    rows, device = logits.shape[0], logits.device
    token = torch.empty(rows, dtype=torch.int64, device=device)
    logp, entropy = torch.empty((2, rows), dtype=torch.float32, device=device).unbind()
    workspace = torch.empty((rows, SAMPLE_WORKSPACE), dtype=torch.float32, device=device)
    torch.ops.autotool_kernels_cuda.sample(
        logits, temperature, row_temperature, seed, offset, token, logp, entropy, workspace
    )
    return token, logp, entropy


def policy_forward(
    logp: Tensor,  # [T]
    old_logp: Tensor,
    entropy: Tensor,
    advantages: Tensor,  # [B]
    cu_seqlens: Tensor,  # [B + 1]
    mask: Tensor,
    is_short: Tensor,
    gate: list[float],
    gate_tensor: Tensor | None,
    clip_low: float,
    clip_high: float,
    normalize: int,
    constant: float,
) -> PolicyParts:
    """One launch for float32 inputs; others are converted, and their gradients back, by launches of torch."""
    n_seq, device = advantages.shape[0], logp.device
    floats = [t.float().contiguous() for t in (logp, old_logp, entropy, advantages)]
    cu_seqlens, mask = cu_seqlens.contiguous(), mask.contiguous()
    is_short = (
        is_short.int() if is_short.is_floating_point() or is_short.element_size() == 2 else is_short
    ).contiguous()
    new = {"dtype": torch.float32, "device": device}
    loss, metrics = torch.empty((), **new), torch.empty(len(METRICS), **new)
    sequence_entropy = torch.empty(n_seq, **new)
    grad_logp, grad_entropy = torch.empty(logp.shape, **new), torch.empty(logp.shape, **new)
    workspace = torch.empty(4 * n_seq + POLICY_WORKSPACE, dtype=torch.float64, device=device)
    torch.ops.autotool_kernels_cuda.policy_loss(
        *floats, cu_seqlens, mask.contiguous(), is_short, *(gate if gate_tensor is None else (0.0,) * 4),
        None if gate_tensor is None else gate_tensor.float(), clip_low, clip_high, normalize, constant,
        loss, sequence_entropy, metrics, grad_logp, grad_entropy, workspace,
    )  # fmt: skip
    return PolicyParts(loss, sequence_entropy, metrics, grad_logp.to(logp.dtype), grad_entropy.to(entropy.dtype))
