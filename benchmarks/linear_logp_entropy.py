"""`linear_logp_entropy` against its peers: time, memory and error of every contestant in one table per problem.

    python -m benchmarks.linear_logp_entropy [--quick | --full] [--shapes 896x151936] [--tokens 1024] [--out FILE]

On a GPU --full is 35 problems and more than an hour; --part 1/8 is every eighth of them.

TFLOP/s counts useful work only, the same for everybody: 2NHV for a forward over the active rows and 4NHV for a
backward over the rows with a gradient, so 6NHV for both, whatever an implementation recomputes. The roofline column
divides it by the rate of a large matrix product measured here. Peak extra GB is memory beyond the inputs and the
gradients. Errors are against float64 on the same rounded inputs: the largest over all active rows for logp and
entropy, relative in the Frobenius norm for slices of dX and dW.

Modes: nograd (forward without a graph), forward, backward, both. Gradients: of logp alone, or of logp and entropy; an
implementation without an entropy gradient appears only in the first. Where an op takes a gradient for the sum over
tokens only, it gets that, and its errors are against that gradient.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import autotool_kernels
import torch
from autotool_kernels.products import matmul, project
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Call, interleaved, one_line
from benchmarks.peers import Absent, Outputs, Provider, linear_peers
from benchmarks.problems import DATA, Problem, Reference, make_problem, max_error, relative_error
from benchmarks.report import (
    TIME_COLUMNS,
    Column,
    Report,
    Row,
    absent,
    common_parser,
    in_part,
    percent,
    set_up,
    shape_pair,
    share,
    small,
    timed,
    wanted,
)

MODES = ("nograd", "forward", "backward", "both")
GRADIENTS = ("logp", "logp+entropy")
QWEN_7B, QWEN_05B = (3584, 152064), (896, 151936)
SHAPES = (QWEN_7B, QWEN_05B, (2048, 151936), (4096, 131072), (4096, 128256))
COLUMNS = (
    *TIME_COLUMNS,
    Column("tflops", "TFLOP/s", lambda x: f"{x:.3g}"),
    Column("roofline", "of matmul", percent),
    Column("extra_gb", "extra GB", lambda x: f"{x:.3f}"),
    Column("dlogp", "max|dlogp|", small),
    Column("dentropy", "max|dH|", small),
    Column("dx", "rel dX", small),
    Column("dw", "rel dW", small),
)


class Case(NamedTuple):
    """One problem to be measured."""

    hidden: int
    vocab: int
    tokens: int
    data: str
    active: float
    zero_advantage: float


def own_providers(problem: Problem) -> list[Provider | Absent]:
    """Our schedules, as far as the package has them."""
    n, _, v = problem.shape
    parameters = inspect.signature(autotool_kernels.linear_logp_entropy).parameters

    def schedule(**options: Any):
        def run(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> Outputs:
            return Outputs(*autotool_kernels.linear_logp_entropy(hidden, weight, target, **options))

        return run

    choice = autotool_kernels.choose("linear_logp_entropy", problem.hidden.device.type, dtype=problem.hidden.dtype)
    onednn = problem.hidden.device.type == "cpu" and problem.hidden.dtype == torch.float32
    library = " (large float32 products by oneDNN; the peers' by torch.mm)" if onednn else ""
    found: list[Provider | Absent] = [
        Provider("autotool_recompute", schedule(), f"backend {choice.name}{library}, 8NHV", compact=False)
    ]
    if "store_bytes" in parameters:
        size = 4 if problem.hidden.dtype == torch.float32 else 2
        budget = n * (v * size + math.ceil(v / 128) * 4)
        how = f"backend {choice.name}, every row's logits stored ({budget / 1e9:.2f} GB), 6NHV"
        found.append(Provider("autotool_store", schedule(store_bytes=budget), how, compact=False))
    else:
        found.append(Absent("autotool_store", "linear_logp_entropy has no store_bytes"))
    if hasattr(autotool_kernels, "chunked_policy_step"):
        found.append(_chunked(problem, choice.name))
    else:
        found.append(Absent("autotool_chunked", "the package has no chunked_policy_step"))
    if choice.name != "torch":
        how = "backend torch: library products over chunks, float32 logits"
        found.append(Provider("autotool_torch", schedule(backend="torch"), how, compact=False))
    return found


def _chunked(problem: Problem, backend: str) -> Provider:
    """Sixteen sequences; the loss has the problem's upstream gradients."""
    n, active = problem.shape[0], max(1, len(problem.live))
    bounds = torch.linspace(0, n, min(16, max(1, n)) + 1).long().tolist()
    upstream = {entropy: problem.upstream(entropy, True) for entropy in (False, True)}

    def run(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> Outputs:
        g, h = upstream[entropy]

        def loss(logp: Tensor, entropies: Tensor, chunk: Any) -> Tensor:
            value = (logp * g[chunk.tokens]).sum()
            return value if h is None else value + (entropies * h[chunk.tokens]).sum()

        step = autotool_kernels.chunked_policy_step(hidden, weight, target, bounds, loss)
        return Outputs(step.logp, step.entropy, total=step.loss * active)

    how = f"backend {backend}, chunked_policy_step over 16 sequences, gradients during the forward, 6NHV"
    return Provider("autotool_chunked", run, how, compact=False)


class Contest:
    """The calls of every provider on one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.hidden = problem.hidden.detach().requires_grad_()
        self.weight = problem.weight.detach().requires_grad_()
        self._all = len(problem.live) == problem.shape[0]
        self._live_target = problem.target[problem.live]

    def outputs(self, provider: Provider, entropy: bool) -> Outputs:
        """One forward, over the active rows alone for those who would otherwise compute the others too."""
        if not provider.compact:
            return provider.run(self.hidden, self.weight, self.problem.target, entropy)
        rows = self.hidden if self._all else self.hidden.index_select(0, self.problem.live)
        return provider.run(rows, self.weight, self._live_target, entropy)

    def gradients(self, provider: Provider, out: Outputs, entropy: bool) -> tuple[Tensor, Tensor]:
        """dX and dW for the problem's upstream gradients."""
        if out.total is not None:
            scale = torch.full_like(out.total, 1 / max(1, len(self.problem.live)))
            return torch.autograd.grad(out.total, (self.hidden, self.weight), scale)
        up = self.problem.upstream(entropy, provider.per_token)
        grads = [up.logp, up.entropy] if entropy else [up.logp]
        if provider.compact and not self._all:
            grads = [g[self.problem.live] for g in grads]
        outs = [out.logp, out.entropy][: len(grads)]
        grads = [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]
        return torch.autograd.grad(outs, (self.hidden, self.weight), grads)

    def call(self, provider: Provider, mode: str, entropy: bool) -> Call:
        """What is timed for this mode."""
        if provider.bare:
            return _bare_call(self.problem, provider.bare, mode)
        if mode == "nograd":
            return Call(torch.no_grad()(lambda _: self.outputs(provider, entropy)))
        if mode == "forward":
            return Call(lambda _: self.outputs(provider, entropy))
        if mode == "backward":
            return Call(lambda out: self.gradients(provider, out, entropy), lambda _: self.outputs(provider, entropy))
        return Call(lambda _: self.gradients(provider, self.outputs(provider, entropy), entropy))

    def errors(self, provider: Provider, entropy: bool, reference: Reference) -> Row:
        """Against float64."""
        out = self.outputs(provider, entropy)
        row: Row = {}
        live = slice(None) if provider.compact else self.problem.live
        if out.logp is not None:
            row["dlogp"] = max_error(out.logp.detach()[live], reference.logp)
        if out.entropy is not None:
            row["dentropy"] = max_error(out.entropy.detach()[live], reference.entropy)
        dx, dw = self.gradients(provider, out, entropy)
        true_dx, true_dw = reference.gradients(entropy, provider.per_token)
        row["dx"] = relative_error(dx[reference.rows], true_dx)
        row["dw"] = relative_error(dw[reference.columns], true_dw)
        return row


def _bare_call(problem: Problem, products: int, mode: str) -> Call:
    """The matrix products alone, over chunks of rows, the logits and the gradients in buffers made beforehand."""
    v = problem.shape[2]
    x, w = problem.hidden[problem.live], problem.weight
    cpu = x.device.type == "cpu"
    chunk = min(len(x), 4096, max(1, (1 << 29) // v) if cpu else 4096)
    logits = torch.empty(chunk, v, dtype=x.dtype, device=x.device).normal_()  # products of zeros are faster
    backward = mode in ("backward", "both")
    dx, dw = (torch.empty_like(x), torch.empty_like(w)) if backward else (None, None)
    forwards = (mode != "backward") + (backward and products == 4)

    def library(rows: slice) -> None:
        z = logits[: len(x[rows])]
        for _ in range(forwards):
            torch.mm(x[rows], w.t(), out=z)
        if backward:
            torch.mm(z, w, out=dx[rows])
            torch.addmm(dw, z.t(), x[rows], beta=float(rows.start > 0), out=dw)

    def faster_library(rows: slice) -> None:
        """On a CPU: oneDNN where it beats torch.mm, and it has no form that writes into a buffer."""
        z = logits[: len(x[rows])]
        for _ in range(forwards):
            z = project(x[rows], w, x.dtype)
        if backward:
            dx[rows] = matmul(z, w, x.dtype)
            part = matmul(z.t(), x[rows], x.dtype)
            dw.copy_(part) if rows.start == 0 else dw.add_(part)

    def run(_: Any) -> None:
        for start in range(0, len(x), chunk):
            (faster_library if cpu else library)(slice(start, start + chunk))

    return Call(run)


def useful_flops(problem: Problem, mode: str) -> float:
    """2NHV per product: one for the forward over active rows, two for the backward over rows with a gradient."""
    _, h, v = problem.shape
    forward = 2.0 * len(problem.live) * h * v
    backward = 4.0 * problem.paid.sum().item() * h * v
    return {"nograd": forward, "forward": forward, "backward": backward, "both": forward + backward}[mode]


def run_contest(
    problem: Problem,
    reference: Reference,
    providers: Sequence[Provider | Absent],
    modes: Sequence[str],
    gradients: Sequence[str],
    repetitions: int,
    seconds: float,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """All rows of one problem's table: first every error, then the times in turns, then memory.

    `keep` gets the rows so far after each mode.
    """
    device = problem.hidden.device
    contest = Contest(problem)
    rows: list[Row] = []
    kept = problem.hidden.nbytes + problem.weight.nbytes  # dX and dW
    for kind in gradients:
        entropy = kind == "logp+entropy"
        able, errors, failed = [], {}, {}
        for provider in providers:
            if isinstance(provider, Absent) or (entropy and not provider.entropy):
                continue
            if provider.bare and kind != gradients[0]:
                continue
            try:
                bare = {"bare": True}
                errors[provider.name] = bare if provider.bare else contest.errors(provider, entropy, reference)
                able.append(provider)
            except Exception as error:  # a provider's failure is its row
                failed[provider.name] = one_line(error)
        rows += [{"provider": name, "gradients": kind, "error": text} for name, text in failed.items()]
        for mode in modes:
            calls = {p.name: contest.call(p, mode, entropy) for p in able if mode == "both" or _has_mode(p)}
            times = interleaved(calls, device, repetitions, seconds)
            for name, result in times.items():
                row: Row = {"provider": name, "mode": mode, "gradients": kind, **timed(result)}
                if "ms" in row:
                    row["tflops"] = useful_flops(problem, mode) / row["ms"] / 1e9
                    if "bare" not in errors[name]:
                        row["extra_gb"] = _extra_gb(calls[name], device, kept if mode in ("backward", "both") else 0)
                    shown = ("dlogp", "dentropy") if mode in ("nograd", "forward") else ("dx", "dw")
                    shown = ("dlogp", "dentropy", "dx", "dw") if mode == "both" else shown
                    row |= {key: value for key, value in errors[name].items() if key in shown}
                rows.append(row)
            calls.clear()
            keep(rows)
    rows += [absent(p.name, p.why) for p in providers if isinstance(p, Absent)]
    names = [p.name for p in providers]
    columns = [*itertools.product(gradients, modes)]
    place = {pair: i for i, pair in enumerate(columns)}
    return sorted(
        rows,
        key=lambda r: (place.get((r.get("gradients"), r.get("mode")), len(columns)), names.index(r["provider"])),
    )


def _has_mode(provider: Provider) -> bool:
    """The chunked step has no forward of its own."""
    return provider.name != "autotool_chunked"


def _extra_gb(call: Call, device: torch.device, kept: int) -> float | None:
    try:
        peak = measure.peak_extra_bytes(lambda: call.run(call.prepare(0)), device, warm=False)  # timed before
    except Exception:  # out of memory on the way to a measurement is no result of the contest
        return None
    return None if peak is None else max(0, peak - kept) / 1e9


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """The problems that the options ask for."""
    gpu = device.type == "cuda"
    if args.shapes:
        shapes = args.shapes
    elif gpu:
        shapes = SHAPES if args.full else (QWEN_7B, QWEN_05B)
    else:
        shapes = (QWEN_05B,) if args.full else ((128, 4096),) if args.quick else ((256, 32768),)
    usual = (1024, 8192, 65536) if args.full else (8192,)
    tokens = args.tokens or (usual if gpu else (1024,) if args.full else (256,))
    data = args.data or (("peaked",) if args.quick and gpu else DATA)
    actives, zeros = args.active or [1.0], args.zero_advantage or [0.0]
    found = [
        Case(*shape, n, kind, a, z) for shape, n, kind, a, z in itertools.product(shapes, tokens, data, actives, zeros)
    ]
    if args.full and not (args.active or args.zero_advantage):
        n = 8192 if gpu else tokens[0]
        shares = [pair for pair in itertools.product((1.0, 0.55, 0.25), (0.0, 0.3)) if pair != (1.0, 0.0)]
        found += [Case(*shapes[0], n, "peaked", a, z) for a, z in shares]
    return found


def parser() -> argparse.ArgumentParser:
    """Options of this script."""
    p = common_parser(__doc__)
    p.add_argument("--shapes", nargs="+", type=shape_pair, metavar="HxV", help="hidden size x vocabulary")
    p.add_argument("--tokens", nargs="+", type=int, help="rows N")
    p.add_argument("--modes", nargs="+", choices=MODES, help="default: nograd and both; all with --full")
    p.add_argument("--gradients", nargs="+", choices=GRADIENTS, help="default: logp+entropy; both with --full")
    p.add_argument("--data", nargs="+", choices=DATA)
    p.add_argument("--active", nargs="+", type=share, metavar="PERCENT", help="rows with a token, such as 100 55 25")
    p.add_argument("--zero-advantage", nargs="+", type=share, metavar="PERCENT", help="active rows without a gradient")
    p.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default bfloat16; float32 on a CPU")
    p.add_argument("--verl", type=Path, help="a checkout of verl, whose kernel file is loaded by path")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    device = set_up(args)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    modes = args.modes or (MODES if args.full else ("nograd", "both"))
    gradients = args.gradients or (GRADIENTS if args.full else ("logp+entropy",))
    report = Report("linear_logp_entropy", device, measure.ceilings(device, args.quick), args.out, NOTE)
    for case in in_part(cases(args, device), args.part):
        problem = make_problem(
            case.tokens, case.hidden, case.vocab, dtype, device, case.data, case.active, case.zero_advantage
        )
        reference = Reference(problem)
        providers = [*own_providers(problem), *linear_peers(device, dtype, args.verl)]
        providers = [p for p in providers if wanted(p.name, args.providers)]
        if args.quick and device.type == "cuda" and not args.providers:
            providers = [p for p in providers if p.name != "compile"]  # compiling costs more than the rest together
        facts = {
            "problem": case._asdict() | {"dtype": str(dtype).removeprefix("torch.")},
            "median_entropy": reference.median_entropy,
            "above_one_nat": reference.above_one_nat,
        }
        rows = run_contest(
            problem, reference, providers, modes, gradients, args.repetitions, args.seconds,
            lambda rows, problem=problem, facts=facts: report.keep(problem.label(), facts, rows),
        )  # fmt: skip
        entropies = f"entropy: median {reference.median_entropy:.2f} nat, {reference.above_one_nat:.0%} above 1 nat"
        hows = [f"{p.name}: {p.how}" for p in providers if isinstance(p, Provider)]
        report.add(problem.label(), facts, COLUMNS, rows, [entropies, *hows])
    report.finish()
    return 0


NOTE = (
    "TFLOP/s: useful work, 6NHV for forward+backward for everybody. extra GB: peak beyond inputs and gradients. "
    "Errors: against float64 on the same rounded inputs."
)


if __name__ == "__main__":
    sys.exit(main())
