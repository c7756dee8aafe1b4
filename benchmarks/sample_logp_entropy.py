"""`sample_logp_entropy` against sampling, log-prob and entropy in PyTorch operations.

    python -m benchmarks.sample_logp_entropy [--quick | --full] [--vocab 151936] [--batch 1 64 512] [--out FILE]

GB/s counts one read of the logits, which is all that the op needs, the same for everybody; the next column divides it
by the bandwidth of a large copy measured here. Inputs rotate through as many copies of the logits as fill several
last-level caches. Modes: nograd (as called) and graph (inside a CUDA graph of one call on each copy, 20 at least; a GPU
only). Errors are those of log-prob and entropy at the token that was drawn, against float64; whether tokens follow the
distribution is for the tests.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import autotool_kernels
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import measure
from benchmarks.measure import Call, graphed, interleaved, one_line
from benchmarks.peers import own_backends
from benchmarks.problems import make_problem, max_error
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
    small,
    timed,
    wanted,
)

MODES = ("nograd", "graph")
LEAST_CALLS = 20  # of a CUDA graph, so that its own cost is shared
NOT_CAPTURED = {"eager": "not in a CUDA graph: torch.multinomial reads a number back from the device"}
COLUMNS = (
    *(column for column in TIME_COLUMNS if column.key != "gradients"),
    Column("gb_s", "GB/s", lambda x: f"{x:.4g}"),
    Column("roofline", "of copy", percent),
    Column("dlogp", "max|dlogp|", small),
    Column("dentropy", "max|dH|", small),
)
NOTE = "GB/s: one read of the logits, for everybody. Errors: against float64 at the drawn tokens."


class Drawn(NamedTuple):
    """One token per row and its statistics."""

    token: Tensor
    logp: Tensor
    entropy: Tensor


Sampler = Callable[[Tensor, Tensor, Tensor], Drawn]


def plain_sample(logits: Tensor, seed: Tensor, offset: Tensor) -> Drawn:
    """Multinomial from one float32 softmax; seeds are not per row."""
    log_p = functional.log_softmax(logits.float(), -1)
    p = log_p.exp()
    token = torch.multinomial(p, 1)
    return Drawn(token[:, 0], log_p.gather(1, token)[:, 0], -(p * log_p).sum(-1))


def plain_gumbel(logits: Tensor, seed: Tensor, offset: Tensor) -> Drawn:
    """The same draw as an argmax over exponential noise, which compiles into few kernels."""
    log_p = functional.log_softmax(logits.float(), -1)
    noise = -torch.empty_like(log_p).exponential_().log()
    token = (log_p + noise).argmax(-1)
    return Drawn(token, log_p.gather(1, token[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1))


def samplers(device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Sampler], dict[str, str]]:
    """Samplers by name, and the reasons of those that cannot run here."""
    able, absent = own_backends("sample_logp_entropy", device, dtype)

    def own(backend: str) -> Sampler:
        def sample(logits: Tensor, seed: Tensor, offset: Tensor) -> Drawn:
            return Drawn(*autotool_kernels.sample_logp_entropy(logits, seed=seed, offset=offset, backend=backend))

        return sample

    found = {f"autotool_{backend}": own(backend) for backend in able}
    torch._dynamo.reset()
    found["eager"] = plain_sample
    found["compile"] = torch.compile(plain_gumbel, dynamic=False)
    return found, {f"autotool_{backend}": why for backend, why in absent.items()}


def run_contest(
    copies: list[Tensor],
    found: dict[str, Sampler],
    modes: Sequence[str],
    args: argparse.Namespace,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """All rows of one table; `keep` gets those so far after each mode."""
    logits = copies[0]
    device, batch = logits.device, logits.shape[0]
    seed = torch.arange(batch, device=device)
    offset = torch.zeros(batch, dtype=torch.int64, device=device)
    truth = logits.double().log_softmax(-1)
    true_entropy = -(truth.exp() * truth).sum(-1)
    rows: list[Row] = []
    errors: dict[str, Row] = {}
    for name, sample in found.items():
        try:
            out = sample(logits, seed, offset)
            errors[name] = {
                "dlogp": max_error(out.logp, truth.gather(1, out.token[:, None])[:, 0]),
                "dentropy": max_error(out.entropy, true_entropy),
            }
        except Exception as error:  # a sampler's failure is its row
            rows.append({"provider": name, "error": one_line(error)})
    del truth
    for mode in modes:
        calls = {}
        for name in errors:
            sample = found[name]
            if mode == "nograd":
                calls[name] = Call(lambda z, sample=sample: sample(z, seed, offset), lambda i: copies[i % len(copies)])
                continue
            if name in NOT_CAPTURED:
                rows.append({"provider": name, "mode": mode, "error": NOT_CAPTURED[name]})
                continue
            try:
                turn = itertools.cycle(copies)
                draw = lambda sample=sample, turn=turn: sample(next(turn), seed, offset)  # noqa: E731
                calls[name] = graphed(draw, max(LEAST_CALLS, len(copies)))
            except Exception as error:  # a sampler that cannot be captured says so
                rows.append({"provider": name, "mode": mode, "error": one_line(error)})
        for name, result in interleaved(calls, device, args.repetitions, args.seconds).items():
            row: Row = {"provider": name, "mode": mode, **timed(result), **errors[name]}
            if "ms" in row:
                row["gb_s"] = logits.nbytes / row["ms"] / 1e6
            rows.append(row)
        keep(rows)
    return rows


def parser() -> argparse.ArgumentParser:
    """Options of this script."""
    p = common_parser(__doc__)
    p.add_argument("--vocab", nargs="+", type=int)
    p.add_argument("--batch", nargs="+", type=int)
    p.add_argument("--modes", nargs="+", choices=MODES, help="default: nograd; graph too on a GPU")
    p.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default bfloat16; float32 on a CPU")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    device = set_up(args)
    gpu = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    modes = args.modes or (MODES if gpu else ("nograd",))
    if "graph" in modes and not gpu:
        raise SystemExit("--modes graph: there is no CUDA device")
    report = Report("sample_logp_entropy", device, measure.ceilings(device, args.quick), args.out, NOTE)
    vocabs = args.vocab or ((152064, 151936, 32000) if args.full else (151936,) if gpu or not args.quick else (8192,))
    batches = args.batch or ((1, 16, 64, 512) if args.full else (64, 512) if gpu else (16,))
    for vocab, batch in in_part(itertools.product(vocabs, batches), args.part):
        problem = make_problem(batch, 128, vocab, torch.float32, device, "peaked")
        logits = (problem.hidden @ problem.weight.t()).to(dtype)
        copies = measure.copies_beyond_caches(logits)
        found, missing = samplers(device, dtype)
        found = {name: f for name, f in found.items() if wanted(name, args.providers)}
        if args.quick and gpu and not args.providers:
            del found["compile"]  # compiling costs more than the rest together
        name = str(dtype).removeprefix("torch.")
        title = f"B={batch} V={vocab} {name}, peaked rows"
        facts = {"problem": {"batch": batch, "vocab": vocab, "dtype": name, "data": "peaked"}}
        rows = run_contest(
            copies, found, modes, args, lambda rows, title=title, facts=facts: report.keep(title, facts, rows)
        )
        rows += [absent(name, why) for name, why in missing.items() if wanted(name, args.providers)]
        notes = [
            f"inputs rotate through {len(copies)} copies of {logits.nbytes / 1e6:.1f} MB",
            "eager: torch.multinomial of a float32 softmax; compile: torch.compile of an argmax over exponential noise",
        ]
        report.add(title, facts, COLUMNS, rows, notes)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
