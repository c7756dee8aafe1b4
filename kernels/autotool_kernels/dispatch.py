"""Which backend serves a call, and why.

A backend asked for by name that cannot serve the call is an error that says the reason. "auto" picks by the rule in
`choose` without a message; `choose` puts the pick and its reason into words.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

NAMES = ("torch", "triton", "cuda")
# Module of each backend's implementation of each op; all implementations of an op take the same arguments.
_MODULES = {
    "linear_logp_entropy": {"torch": "reference_linear", "triton": "triton_linear"},
    "linear_logp_entropy_backward": {"torch": "reference_linear", "triton": "triton_linear"},
    "logits_logp_entropy": {"torch": "reference_logits", "triton": "triton_logits", "cuda": "cuda"},
    "logits_logp_entropy_backward": {"torch": "reference_logits", "triton": "triton_logits", "cuda": "cuda"},
    "policy_loss": {"torch": "policy", "triton": "triton_policy", "cuda": "cuda"},
    "sample_logp_entropy": {"torch": "sampler", "triton": "triton_sample", "cuda": "cuda"},
}
_FUNCTIONS = {
    "linear_logp_entropy": "linear_forward",
    "linear_logp_entropy_backward": "linear_backward",
    "logits_logp_entropy": "logits_forward",
    "logits_logp_entropy_backward": "logits_backward",
    "policy_loss": "policy_forward",
    "sample_logp_entropy": "sample_forward",
}


@dataclass(frozen=True)
class Backend:
    """Whether a backend can serve tensors on this machine, and on what, or what is missing."""

    available: bool
    reason: str


@dataclass(frozen=True)
class Choice:
    """The backend that serves a call, and why."""

    name: str
    reason: str


def backends() -> dict[str, Backend]:
    """State of every backend on this machine, by name ("torch", "triton", "cuda")."""
    return {
        "torch": Backend(True, "PyTorch operations, every device and dtype"),
        "triton": _triton(),
        "cuda": _cuda(),
    }


def choose(op: str, device_type: str, backend: str = "auto", dtype: torch.dtype = torch.float32) -> Choice:
    """The backend for `op` on such tensors, and why; ValueError says why an explicit one cannot serve.

    "auto": the Triton kernels on CUDA tensors, PyTorch everywhere else. The CUDA C++ kernels serve only when
    asked for by name.
    """
    if op not in _MODULES:
        raise ValueError(f"op must be one of {', '.join(_MODULES)}: got {op!r}")
    check_backend(backend)
    if backend == "auto":
        if device_type != "cuda":
            return Choice("torch", f"{device_type} tensors are served by PyTorch")
        reason = _why_not(op, device_type, "triton", dtype)
        return Choice("triton", "CUDA tensors") if reason is None else Choice("torch", f"Triton cannot: {reason}")
    reason = _why_not(op, device_type, backend, dtype)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot serve {op}: {reason}")
    return Choice(backend, "asked for by name")


def check_backend(backend: str) -> None:
    """A name that `backend=` takes; else ValueError."""
    if backend not in ("auto", *NAMES):
        raise ValueError(f"backend must be one of auto, {', '.join(NAMES)}: got {backend!r}")


@lru_cache(maxsize=256)
def implementation(op: str, device_type: str, dtype: torch.dtype, backend: str) -> Callable:
    """The function that serves `op`; cached, because small calls come in thousands."""
    name = choose(op, device_type, backend, dtype).name
    module = importlib.import_module(f".{_MODULES[op][name]}", __package__)
    return getattr(module, _FUNCTIONS[op])


def _why_not(op: str, device_type: str, backend: str, dtype: torch.dtype) -> str | None:
    if backend not in _MODULES[op]:
        return f"the {backend} backend does not have this op"
    if backend == "torch":
        return None
    state = backends()[backend]
    if not state.available:
        return state.reason
    if dtype == torch.float64:
        return "its kernels compute in float32, and the tensors are float64"
    if device_type == "cpu" and backend == "triton" and interpreting():
        return None
    return None if device_type == "cuda" else f"it needs CUDA tensors, these are on {device_type}"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, "triton is not installed")
    if interpreting():
        return Backend(True, "Triton's interpreter (TRITON_INTERPRET=1): CPU tensors, for tests only")
    if not torch.cuda.is_available():
        return Backend(False, "no CUDA device, and TRITON_INTERPRET=1 is not set")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return Backend(False, f"needs compute capability 8.0 or newer, this device has {major}.{minor}")
    return Backend(True, f"compiles for sm_{major}{minor}")


def _cuda() -> Backend:
    from . import cuda

    reason = cuda.load()
    if reason is not None:
        return Backend(False, reason)
    if not torch.cuda.is_available():
        return Backend(False, "the extension is built and loads, but there is no CUDA device")
    built = cuda.architectures()
    major, minor = torch.cuda.get_device_capability()
    names = ", ".join(f"sm_{name}" for name in built)
    if not cuda.serves((major, minor), built):
        return Backend(False, f"the extension is built for {names}, and this device has {major}.{minor}")
    return Backend(True, f"logits_logp_entropy, sample_logp_entropy and policy_loss, built for {names}")
