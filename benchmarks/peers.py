"""Other implementations of the same ops, one small adapter each.

An adapter says how its package is run (version, settings: at its best, never at a bad default) and which parts it
lacks: some peers have no entropy, some take a gradient for the sum over tokens only. A package that is not installed,
or needs a GPU where there is none, is an `Absent` with the reason; errors of a peer at run time are the caller's to
report. Nothing is imported before it is asked for. They are no dependencies of this project:
`pip install liger-kernel cut-cross-entropy trl quack-kernels fla-core` brings them, and verl is a checkout.

Peers get the active rows only (`compact`), gathered inside the timed call, as TRL does; leaving ignored rows out
helps every one of them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import autotool_kernels
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import one_line


class Outputs(NamedTuple):
    """What an implementation returns for a batch; `total` in place of logp where it gives the sum over tokens only."""

    logp: Tensor | None
    entropy: Tensor | None = None
    total: Tensor | None = None


@dataclass(frozen=True)
class Provider:
    """An implementation. `run(hidden, weight, target, entropy)`, or `run(logits, target, entropy)`; `entropy` says
    whether the entropy is wanted."""

    name: str
    run: Callable[..., Outputs]
    how: str
    entropy: bool = True  # has an entropy with a gradient
    per_token: bool = True  # takes an upstream gradient per token
    compact: bool = True  # gets the active rows only
    consumes: bool = False  # its backward destroys the logits
    bare: int = 0  # > 0: that many matrix products without the op between them, nothing to check


class Absent(NamedTuple):
    """A provider that cannot run here."""

    name: str
    why: str


class Unavailable(Exception):
    """Raised by an adapter; its text is the reason."""


def collect(adapters: dict[str, Callable[[], Provider]]) -> list[Provider | Absent]:
    """Every adapter's provider, or why it is absent."""
    found: list[Provider | Absent] = []
    for name, adapter in adapters.items():
        try:
            found.append(adapter())
        except Unavailable as reason:
            found.append(Absent(name, str(reason)))
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name
            found.append(Absent(name, f"not installed: {error.name}" if missing else one_line(error)))
        except Exception as error:  # whatever a package does while it is imported
            found.append(Absent(name, one_line(error)))
    return found


def own_backends(op: str, device: torch.device, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    """Backends of ours that serve the op here, and why the others do not; an interpreted kernel is not timed."""
    able, absent = [], {}
    for backend in autotool_kernels.dispatch.NAMES:
        try:
            autotool_kernels.choose(op, device.type, backend, dtype)
        except ValueError as reason:
            absent[backend] = str(reason)
            continue
        if device.type == "cpu" and backend == "triton":
            absent[backend] = "Triton's interpreter is for tests"
        else:
            able.append(backend)
    return able, absent


def linear_peers(device: torch.device, dtype: torch.dtype, verl: Path | None = None) -> list[Provider | Absent]:
    """Implementations of log-prob and entropy from hidden states and a head."""
    wide = dtype == torch.float32
    return collect(
        {
            "eager": lambda: _eager("eager", low_precision=not wide),
            **({} if wide else {"eager_fp32": lambda: _eager("eager_fp32", low_precision=False)}),
            "compile": lambda: _compiled(low_precision=not wide),
            "torch_lce": lambda: _torch_lce("sum", device, dtype),
            "torch_lce_none": lambda: _torch_lce("none", device, dtype),
            "liger": _liger,
            "cce": lambda: _cut_cross_entropy(device),
            "trl": _trl,
            "verl": lambda: _verl(device, verl),
            "quack": lambda: _quack(device),
            "fla": lambda: _fla(device),
            "gemm3": lambda: _bare(3),
            "gemm4": lambda: _bare(4),
        }
    )


def logits_peers(device: torch.device) -> list[Provider | Absent]:
    """Implementations of log-prob and entropy from logits."""
    return collect(
        {
            "eager": lambda: Provider("eager", eager_logits, "log_softmax of float32 logits, gather, sum"),
            "compile": _compiled_logits,
            "cross_entropy": lambda: Provider(
                "cross_entropy", _cross_entropy, "F.cross_entropy of float32 logits, reduction none", entropy=False
            ),
            "trl": _trl_logits,
            "quack": lambda: _quack_logits(device),
        }
    )


def eager_logits(logits: Tensor, target: Tensor, entropy: bool) -> Outputs:
    """The textbook: everything from one float32 log_softmax."""
    log_p = functional.log_softmax(logits.float(), -1)
    logp = log_p.gather(-1, target[:, None])[:, 0]
    return Outputs(logp, -(log_p.exp() * log_p).sum(-1) if entropy else None)


def eager_linear(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> Outputs:
    """Logits in the dtype of the inputs, then `eager_logits`."""
    return eager_logits(hidden @ weight.t(), target, entropy)


def _eager_fp32(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> Outputs:
    return eager_logits(hidden.float() @ weight.float().t(), target, entropy)


def _eager(name: str, low_precision: bool) -> Provider:
    run = eager_linear if low_precision else _eager_fp32
    logits = "logits in the inputs' dtype" if low_precision else "float32 logits"
    return Provider(name, run, f"torch {torch.__version__}: {logits}, float32 log_softmax")


def _compiled(low_precision: bool) -> Provider:
    torch._dynamo.reset()  # the recompilation limit counts per function, over all shapes of this process
    run = torch.compile(eager_linear if low_precision else _eager_fp32, dynamic=False)
    return Provider("compile", run, "torch.compile of eager, static shapes; compiled before it is timed")


def _compiled_logits() -> Provider:
    torch._dynamo.reset()
    run = torch.compile(eager_logits, dynamic=False)
    return Provider("compile", run, "torch.compile of eager, static shapes; compiled before it is timed")


def _cross_entropy(logits: Tensor, target: Tensor, entropy: bool) -> Outputs:
    return Outputs(-functional.cross_entropy(logits.float(), target, reduction="none"))


def _torch_lce(reduction: str, device: torch.device, dtype: torch.dtype) -> Provider:
    if not hasattr(functional, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")
    # Its automatic chunks are made for GPUs: in float32 on a CPU they hold few rows and take several times as long.
    chunk = 256 if device.type == "cpu" and dtype == torch.float32 else None
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def run(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> Outputs:
        loss = functional.linear_cross_entropy(hidden, weight, target, reduction=reduction, options=options)
        return Outputs(-loss) if reduction == "none" else Outputs(None, total=-loss)

    name = "torch_lce" if reduction == "sum" else "torch_lce_none"
    chunks = "automatic chunks" if chunk is None else f"chunks of {chunk} rows"
    how = f"F.linear_cross_entropy, {chunks}, reduction {reduction}"
    return Provider(name, run, how, entropy=False, per_token=reduction == "none")


def _liger() -> Provider:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as fused

    def run(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> Outputs:
        result = fused.apply(hidden, weight, target, 1.0, -100, 1, entropy)
        return Outputs(-result[0], result[1]) if entropy else Outputs(-result)

    how = f"liger-kernel {_version('liger_kernel')}, LigerFusedLinearScaledCrossEntropyFunction as it dispatches"
    return Provider("liger", run, how)


def _cut_cross_entropy(device: torch.device) -> Provider:
    from cut_cross_entropy import linear_cross_entropy

    kind = "cce" if device.type == "cuda" else "torch_compile"

    def run(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> Outputs:
        return Outputs(-linear_cross_entropy(hidden, weight, target, reduction="none", impl=kind))

    filtered = ", default gradient filter" if kind == "cce" else ""
    how = f"cut-cross-entropy {_version('cut_cross_entropy')}, implementation {kind}{filtered}"
    return Provider("cce", run, how, entropy=False)


def _trl() -> Provider:
    from trl.kernels import ChunkedLogProbFunction as chunked

    selects = "outputs" in inspect.signature(chunked.forward).parameters
    width = getattr(importlib.import_module("trl.trainer.utils"), "_CHUNKED_LOGPROB_CHUNK_SIZE", 32768)

    def run(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> Outputs:
        extra = (("entropy",) if entropy else (),) if selects else ()
        logp, h, *_ = chunked.apply(hidden, weight, None, target, 1.0, width, None, 1.0, *extra)
        return Outputs(logp, h if entropy else None)

    how = f"trl {_version('trl')}, trl.kernels.ChunkedLogProbFunction, vocabulary chunk {width} (its trainers')"
    return Provider("trl", run, how)


def _trl_logits() -> Provider:
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    def run(logits: Tensor, target: Tensor, entropy: bool) -> Outputs:
        if not entropy:
            return Outputs(selective_log_softmax(logits, target))
        return Outputs(*selective_log_softmax_and_entropy(logits, target))

    return Provider("trl", run, f"trl {_version('trl')}, selective_log_softmax_and_entropy")


def _verl(device: torch.device, path: Path | None) -> Provider:
    if path is None:
        raise Unavailable("give a checkout with --verl PATH")
    function = load_verl(path)
    if device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    names = [n for n in inspect.signature(function.forward).parameters if n != "ctx"]
    order = [n for n in names if n in ("temperature", "reduction")]
    settings = tuple({"temperature": 1.0, "reduction": "none"}[n] for n in order)

    def run(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> Outputs:
        logp, h = function.apply(hidden, weight, target, *settings)
        return Outputs(logp, h)

    return Provider("verl", run, "verl's linear_cross_entropy, its default backward")


def load_verl(path: Path) -> type[torch.autograd.Function]:
    """LinearCrossEntropy of a verl checkout, without running verl's own __init__ and what that needs.

    `path` is the checkout, its package, its kernel folder or a file in that.
    """
    candidates = [path, path / "verl" / "utils" / "kernel", path / "utils" / "kernel", path.parent]
    folder = next((c.resolve() for c in candidates if (c / "linear_cross_entropy.py").is_file()), None)
    if folder is None:
        raise Unavailable(f"no verl/utils/kernel/linear_cross_entropy.py under {path}")
    for name, place in (("verl", folder.parents[1]), ("verl.utils", folder.parent), ("verl.utils.kernel", folder)):
        package = types.ModuleType(name)
        package.__path__ = [str(place)]
        sys.modules[name] = package
    return importlib.import_module("verl.utils.kernel.linear_cross_entropy").LinearCrossEntropy


def _quack(device: torch.device) -> Provider:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    _need_gpu(device)

    def run(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> Outputs:
        return Outputs(None, total=-chunked_linear_cross_entropy(hidden, weight, target, reduction="sum"))

    how = f"quack {_version('quack-kernels')}, chunked_linear_cross_entropy, its pipeline for the device"
    return Provider("quack", run, how, entropy=False, per_token=False)


def _quack_logits(device: torch.device) -> Provider:
    from quack.cross_entropy import cross_entropy

    _need_gpu(device)

    def run(logits: Tensor, target: Tensor, entropy: bool) -> Outputs:
        return Outputs(-cross_entropy(logits, target, reduction="none"))

    return Provider("quack", run, f"quack {_version('quack-kernels')}, cross_entropy, reduction none", entropy=False)


def _fla(device: torch.device) -> Provider:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    _need_gpu(device)

    def run(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> Outputs:
        return Outputs(None, total=-fused_linear_cross_entropy_loss(hidden, target, weight, reduction="sum"))

    how = f"fla-core {_version('fla-core')}, fused_linear_cross_entropy_loss, eight chunks (its default)"
    return Provider("fla", run, how, entropy=False, per_token=False)


def _bare(products: int) -> Provider:
    def run(*_: object) -> Outputs:
        raise NotImplementedError("timed by the script, which knows the direction")

    flops = "6NHV" if products == 3 else "8NHV, logits computed twice"
    how = f"bare {flops}: forward one product, forward+backward {products}, nothing between them; not an implementation"
    return Provider(f"gemm{products}", run, how, bare=products)


def _need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("needs a CUDA device")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "?"
