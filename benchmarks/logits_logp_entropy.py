"""`logits_logp_entropy` against its peers, and against the bandwidth of a plain copy.

    python -m benchmarks.logits_logp_entropy [--quick | --full] [--vocab 151936 ...] [--rows 8192 ...] [--out FILE]

GB/s counts the bytes that cannot be avoided, the same for everybody: a forward reads the logits once, a backward reads
them once and writes their gradient once. The next column divides that by the bandwidth of a large copy measured here.
Inputs rotate through as many copies as fill several last-level caches, so that no repetition finds its logits cached.
Errors are against float64 on the same rounded logits. An in-place backward gets a fresh copy of the logits before each
timed call.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import autotool_kernels
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Call, interleaved, one_line
from benchmarks.peers import Absent, Outputs, Provider, logits_peers, own_backends
from benchmarks.problems import DATA, IGNORE, make_problem, max_error, relative_error
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
    share,
    small,
    timed,
    wanted,
)

MODES = ("nograd", "forward", "backward", "both")
GRADIENTS = ("logp", "logp+entropy")
PASSES = {"nograd": 1, "forward": 1, "backward": 2, "both": 3}
COLUMNS = (
    *TIME_COLUMNS,
    Column("gb_s", "GB/s", lambda x: f"{x:.4g}"),
    Column("roofline", "of copy", percent),
    Column("extra_gb", "extra GB", lambda x: f"{x:.3f}"),
    Column("dlogp", "max|dlogp|", small),
    Column("dentropy", "max|dH|", small),
    Column("dz", "rel dlogits", small),
)
NOTE = (
    "GB/s: unavoidable bytes, one pass over the logits forward, two backward, for everybody. extra GB: peak beyond "
    "the logits and their gradient; negative: the gradient took the logits' place. Errors: against float64 on the "
    "same rounded logits."
)


def own_providers(device: torch.device, dtype: torch.dtype) -> list[Provider | Absent]:
    """Each of our backends that can serve, and the in-place backward if the package has it."""
    parameters = inspect.signature(autotool_kernels.logits_logp_entropy).parameters

    def run(backend: str, **options: Any):
        def call(logits: Tensor, target: Tensor, entropy: bool) -> Outputs:
            return Outputs(*autotool_kernels.logits_logp_entropy(logits, target, backend=backend, **options))

        return call

    able, absent = own_backends("logits_logp_entropy", device, dtype)
    found: list[Provider | Absent] = []
    for backend in able:
        name = f"autotool_{backend}"
        found.append(Provider(name, run(backend), f"backend {backend}", compact=False))
        if "inplace_backward" in parameters:
            how = f"backend {backend}, gradient written over the logits"
            call = run(backend, inplace_backward=True)
            found.append(Provider(f"{name}_inplace", call, how, compact=False, consumes=True))
    found += [Absent(f"autotool_{backend}", why) for backend, why in absent.items()]
    return found


class Batch:
    """Logits in as many copies as it takes to leave the caches, targets, upstream gradients, and the truth."""

    def __init__(
        self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device, data: str, active: float
    ) -> None:
        problem = make_problem(rows, 128, vocab, torch.float32, device, data, active)
        self.logits = (problem.hidden @ problem.weight.t()).to(dtype).detach()
        self.target, self.live = problem.target, problem.live
        self.all_live = len(self.live) == rows
        self.copies = measure.copies_beyond_caches(self.logits)
        for copy in self.copies:
            copy.requires_grad_()
        up = problem.upstream(True, True)
        self.grad_logp, self.grad_entropy = up
        self._truth: dict[bool, Tensor] = {}
        with torch.no_grad():
            self.checked = self.live[torch.randperm(len(self.live), device=device)[:128]]
            log_p = [self.logits[rows].double().log_softmax(-1) for rows in self.live.split(512)]
            labels = [self.target[rows][:, None] for rows in self.live.split(512)]
            self.logp = torch.cat([p.gather(1, y)[:, 0] for p, y in zip(log_p, labels, strict=True)])
            self.entropy = torch.cat([-(p.exp() * p).nan_to_num(0).sum(-1) for p in log_p])

    def dlogits(self, entropy: bool) -> Tensor:
        """Gradient of the checked rows in float64, by autograd through log_softmax."""
        if entropy not in self._truth:
            z = self.logits.detach()[self.checked].double().requires_grad_()
            log_p = z.log_softmax(-1)
            logp = log_p.gather(1, self.target[self.checked][:, None])[:, 0]
            loss = (logp * self.grad_logp[self.checked]).sum()
            if entropy:
                loss = loss - ((log_p.exp() * log_p).sum(-1) * self.grad_entropy[self.checked]).sum()
            self._truth[entropy] = torch.autograd.grad(loss, z)[0]
        return self._truth[entropy]

    def input(self, provider: Provider, i: int) -> Tensor:
        """The i-th turn's logits; a fresh copy for a backward that destroys them."""
        logits = self.copies[i % len(self.copies)]
        return logits.clone() if provider.consumes else logits  # a clone of a leaf, as a model's logits are

    def outputs(self, provider: Provider, logits: Tensor, entropy: bool) -> Outputs:
        """One forward; the active rows alone for those who would compute the others too."""
        if not provider.compact or self.all_live:
            target = self.target if not provider.compact else self.target[self.live]
            return provider.run(logits, target, entropy)
        return provider.run(logits.index_select(0, self.live), self.target[self.live], entropy)

    def gradients(self, provider: Provider, logits: Tensor, out: Outputs, entropy: bool) -> Tensor:
        """dL/dlogits [N, V]."""
        grads = [self.grad_logp, self.grad_entropy][: 1 + entropy]
        if provider.compact and not self.all_live:
            grads = [g[self.live] for g in grads]
        outs = [out.logp, out.entropy][: len(grads)]
        grads = [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]
        return torch.autograd.grad(outs, logits, grads)[0]

    def call(self, provider: Provider, mode: str, entropy: bool) -> Call:
        """What is timed for this mode."""
        if provider.name == "copy":
            spare = torch.empty_like(self.logits)
            return Call(lambda logits: spare.copy_(logits), lambda i: self.copies[i % len(self.copies)].detach())

        def fresh(i: int) -> Tensor:
            return self.input(provider, i)

        def graph(i: int) -> tuple[Tensor, Outputs]:
            logits = fresh(i)
            return logits, self.outputs(provider, logits, entropy)

        if mode == "nograd":
            return Call(torch.no_grad()(lambda logits: self.outputs(provider, logits, entropy)), fresh)
        if mode == "forward":
            return Call(lambda logits: self.outputs(provider, logits, entropy), fresh)
        if mode == "backward":
            return Call(lambda state: self.gradients(provider, *state, entropy), graph)
        return Call(
            lambda logits: self.gradients(provider, logits, self.outputs(provider, logits, entropy), entropy), fresh
        )

    def errors(self, provider: Provider, entropy: bool) -> Row:
        """Against float64."""
        logits = self.input(provider, 0)
        out = self.outputs(provider, logits, entropy)
        live = slice(None) if provider.compact else self.live
        row: Row = {"dlogp": max_error(out.logp.detach()[live], self.logp)}
        if out.entropy is not None:
            row["dentropy"] = max_error(out.entropy.detach()[live], self.entropy)
        gradient = self.gradients(provider, logits, out, entropy)
        row["dz"] = relative_error(gradient[self.checked], self.dlogits(entropy))
        return row


def run_contest(
    batch: Batch,
    providers: Sequence[Provider | Absent],
    modes: Sequence[str],
    gradients: Sequence[str],
    repetitions: int,
    seconds: float,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """All rows of one table; `keep` gets those so far after each mode."""
    device = batch.logits.device
    rows: list[Row] = []
    for kind in gradients:
        entropy = kind == "logp+entropy"
        able, errors = [], {}
        for provider in providers:
            if isinstance(provider, Absent) or (entropy and not provider.entropy):
                continue
            try:
                errors[provider.name] = {} if provider.bare else batch.errors(provider, entropy)
                able.append(provider)
            except Exception as error:  # a provider's failure is its row
                rows.append({"provider": provider.name, "gradients": kind, "error": one_line(error)})
        for mode in modes:
            calls = {p.name: batch.call(p, mode, entropy) for p in able if not p.bare or mode == modes[0]}
            for name, result in interleaved(calls, device, repetitions, seconds).items():
                bare = name == "copy"
                row: Row = {"provider": name, "mode": "-" if bare else mode, "gradients": kind, **timed(result)}
                if "ms" in row:
                    passes = 2 if bare else PASSES[mode]
                    row["gb_s"] = passes * batch.logits.nbytes / row["ms"] / 1e6
                    if not bare:
                        row["extra_gb"] = _extra_gb(calls[name], device, batch.logits.nbytes * (PASSES[mode] > 1))
                    keys = ("dlogp", "dentropy") if mode in ("nograd", "forward") else ("dlogp", "dentropy", "dz")
                    row |= {key: value for key, value in errors[name].items() if key in keys}
                rows.append(row)
            keep(rows)
    return rows + [absent(p.name, p.why) for p in providers if isinstance(p, Absent)]


def _extra_gb(call: Call, device: torch.device, kept: int) -> float | None:
    try:
        state = call.prepare(1)
        call.run(state)
        state = call.prepare(2)
        peak = measure.peak_extra_bytes(lambda: call.run(state), device, warm=False)
    except Exception:  # out of memory on the way to a measurement is no result of the contest
        return None
    return None if peak is None else (peak - kept) / 1e9


def parser() -> argparse.ArgumentParser:
    """Options of this script."""
    p = common_parser(__doc__)
    p.add_argument("--vocab", nargs="+", type=int)
    p.add_argument("--rows", nargs="+", type=int)
    p.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    p.add_argument("--gradients", nargs="+", choices=GRADIENTS, help="default: logp+entropy; both with --full")
    p.add_argument("--data", nargs="+", choices=DATA)
    p.add_argument("--active", nargs="+", type=share, default=[1.0], metavar="PERCENT", help="rows with a token")
    p.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default bfloat16; float32 on a CPU")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    device = set_up(args)
    gpu = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    vocabs = args.vocab or ((152064, 151936, 128256) if args.full else (151936,) if gpu or not args.quick else (8192,))
    rows = args.rows or (((1024, 8192, 65536) if args.full else (8192,)) if gpu else (64,))
    data = args.data or (("peaked",) if args.quick else DATA)
    gradients = args.gradients or (GRADIENTS if args.full else ("logp+entropy",))
    report = Report("logits_logp_entropy", device, measure.ceilings(device, args.quick), args.out, NOTE)
    for vocab, n, kind, active in in_part(itertools.product(vocabs, rows, data, args.active), args.part):
        batch = Batch(n, vocab, dtype, device, kind, active)
        copy = Provider("copy", lambda *_: Outputs(None), "one copy of the logits: reads and writes them once", bare=1)
        providers = [*own_providers(device, dtype), *logits_peers(device), copy]
        providers = [p for p in providers if wanted(p.name, args.providers)]
        if args.quick and gpu and not args.providers:
            providers = [p for p in providers if p.name != "compile"]  # compiling costs more than the rest together
        name = str(dtype).removeprefix("torch.")
        title = f"N={n} V={vocab} {name}, {kind} rows, active {active:.0%}"
        facts = {
            "problem": {"rows": n, "vocab": vocab, "dtype": name, "data": kind, "active": active},
            "median_entropy": batch.entropy.median().item(),
            "ignore_index": IGNORE,
        }
        table = run_contest(
            batch, providers, args.modes, gradients, args.repetitions, args.seconds,
            lambda rows, title=title, facts=facts: report.keep(title, facts, rows),
        )  # fmt: skip
        rotation = f"inputs rotate through {len(batch.copies)} copies of {batch.logits.nbytes / 1e6:.0f} MB"
        hows = [f"{p.name}: {p.how}" for p in providers if isinstance(p, Provider)]
        report.add(title, facts, COLUMNS, table, [rotation, *hows])
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
