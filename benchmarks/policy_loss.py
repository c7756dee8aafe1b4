"""`policy_loss` against the same formula in PyTorch operations.

    python -m benchmarks.policy_loss [--quick | --full] [--tokens 65536 ...] [--sequences 64] [--out FILE]

Modes: both (forward and backward, as a trainer calls it) and graph (the same inside a CUDA graph of 20 calls, which
leaves the host out; a GPU only). The arithmetic is nothing: launches and passes decide. "launches" counts the device
kernels of one call, by torch's profiler. Errors are against the formula in float64: absolute for the loss, relative in
the Frobenius norm for the gradients.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import autotool_kernels
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Call, graphed, interleaved, one_line
from benchmarks.peers import own_backends
from benchmarks.problems import relative_error
from benchmarks.report import (
    TIME_COLUMNS,
    Column,
    Report,
    Row,
    absent,
    common_parser,
    in_part,
    set_up,
    small,
    timed,
    wanted,
)

MODES = ("both", "graph")
COLUMNS = (
    *(column for column in TIME_COLUMNS if column.key != "gradients"),
    Column("launches", "launches"),
    Column("dloss", "|dloss|", small),
    Column("dlogp", "rel dlogp", small),
    Column("dentropy", "rel dH", small),
)
TARGET_SHORT, TARGET_LONG, BETA_SHORT, BETA_LONG, CLIP = 0.1, 0.2, 0.02, 0.01, 0.2
NOTE = "Errors: against the same formula in float64; the loss absolute, its gradients relative."


@dataclass(frozen=True)
class Batch:
    """Packed sequences as a rollout gives them: holes in the mask, half of the sequences near their entropy target."""

    logp: Tensor  # [T] float32
    old_logp: Tensor  # [T]
    entropy: Tensor  # [T]
    advantages: Tensor  # [B]
    cu_seqlens: Tensor  # [B + 1] int32
    mask: Tensor  # [T] bool
    is_short: Tensor  # [B] int32
    sequence: Tensor  # [T] int64, the sequence of each token, for the plain formula


class Result(NamedTuple):
    """What is compared."""

    loss: Tensor
    grad_logp: Tensor
    grad_entropy: Tensor


def make_batch(tokens: int, sequences: int, device: torch.device, seed: int = 0) -> Batch:
    """Random batch; lengths vary by a factor of about four."""
    make = torch.Generator(device=device).manual_seed(seed)
    rand = torch.rand(sequences, generator=make, device=device) + 0.3
    ends = (rand.cumsum(0) / rand.sum() * tokens).round().int()
    ends[-1] = tokens
    cu_seqlens = torch.cat([ends.new_zeros(1), ends])
    sequence = torch.repeat_interleave(torch.arange(sequences, device=device), cu_seqlens.diff().long())
    logp = -torch.rand(tokens, generator=make, device=device)
    old = logp + 0.1 * torch.randn(tokens, generator=make, device=device)
    level = 0.3 * torch.rand(sequences, generator=make, device=device)
    entropy = torch.rand(tokens, generator=make, device=device) * 2 * level[sequence]
    advantages = torch.randn(sequences, generator=make, device=device)
    mask = torch.rand(tokens, generator=make, device=device) < 0.8
    is_short = torch.randint(2, (sequences,), generator=make, device=device).int()
    return Batch(logp, old, entropy, advantages, cu_seqlens, mask, is_short, sequence)


def plain_loss(logp: Tensor, entropy: Tensor, old: Tensor, batch: Batch) -> Tensor:
    """The loss over tokens of `autotool_kernels.policy_loss`'s documentation, in PyTorch operations."""
    mask, sequence = batch.mask.to(logp.dtype), batch.sequence
    zeros = torch.zeros_like(batch.advantages, dtype=logp.dtype)
    count = zeros.index_add(0, sequence, mask)
    mean = zeros.index_add(0, sequence, entropy.detach() * mask) / count.clamp(min=1)
    short = batch.is_short.to(logp.dtype)
    target = short * TARGET_SHORT + (1 - short) * TARGET_LONG
    beta = (short * BETA_SHORT + (1 - short) * BETA_LONG) * (mean <= target)
    rho = torch.where(batch.mask, logp - old, 0).exp()
    advantage = batch.advantages.to(logp.dtype)[sequence]
    clipped = rho.clamp(1 - CLIP, 1 + CLIP)
    loss = -torch.minimum(rho * advantage, clipped * advantage) - beta[sequence] * entropy
    return (loss * mask).sum() / mask.sum()


def plain_step(loss: Callable[..., Tensor], batch: Batch, dtype: torch.dtype = torch.float32) -> Result:
    """Forward and backward of `plain_loss`, or of its compiled form."""
    logp, entropy = (t.detach().to(dtype).requires_grad_() for t in (batch.logp, batch.entropy))
    value = loss(logp, entropy, batch.old_logp.to(dtype), batch)
    return Result(value, *torch.autograd.grad(value, (logp, entropy)))


def own_step(batch: Batch, backend: str) -> Result:
    """Forward and backward of our op."""
    logp, entropy = batch.logp.detach().requires_grad_(), batch.entropy.detach().requires_grad_()
    out = autotool_kernels.policy_loss(
        logp, batch.old_logp, entropy, batch.advantages, batch.cu_seqlens, batch.mask, batch.is_short,
        clip_low=CLIP, clip_high=CLIP, target_short=TARGET_SHORT, target_long=TARGET_LONG,
        beta_short=BETA_SHORT, beta_long=BETA_LONG, backend=backend,
    )  # fmt: skip
    return Result(out.loss, *torch.autograd.grad(out.loss, (logp, entropy)))


def providers(device: torch.device) -> tuple[dict[str, Callable[[Batch], Result]], dict[str, str]]:
    """Steps by name, and the reasons of those that cannot run here."""
    able, absent = own_backends("policy_loss", device, torch.float32)
    steps: dict[str, Callable[[Batch], Result]] = {
        f"autotool_{backend}": lambda batch, backend=backend: own_step(batch, backend) for backend in able
    }
    steps["eager"] = lambda batch: plain_step(plain_loss, batch)
    torch._dynamo.reset()
    compiled = torch.compile(plain_loss, dynamic=False)
    steps["compile"] = lambda batch: plain_step(compiled, batch)
    return steps, {f"autotool_{backend}": why for backend, why in absent.items()}


def launches(run: Callable[[], Any]) -> int | None:
    """Device kernels, copies and fills of one call; None without a GPU or where the profiler cannot run."""
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            run()
            torch.cuda.synchronize()
    except RuntimeError:
        return None
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())


def run_contest(
    batch: Batch,
    steps: dict[str, Callable[[Batch], Result]],
    modes: Sequence[str],
    repetitions: int,
    seconds: float,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """All rows of one table; `keep` gets those so far after each mode."""
    device = batch.logp.device
    truth = plain_step(plain_loss, batch, torch.float64)
    rows: list[Row] = []
    errors: dict[str, Row] = {}
    for name, step in steps.items():
        try:
            result = step(batch)
            errors[name] = {
                "dloss": (result.loss.double() - truth.loss).abs().item(),
                "dlogp": relative_error(result.grad_logp, truth.grad_logp),
                "dentropy": relative_error(result.grad_entropy, truth.grad_entropy),
                "launches": launches(lambda step=step: step(batch)),
            }
        except Exception as error:  # a provider's failure is its row
            rows.append({"provider": name, "error": one_line(error)})
    for mode in modes:
        calls = {}
        for name in errors:
            run = lambda step=steps[name]: step(batch)  # noqa: E731
            if mode == "both":
                calls[name] = Call(lambda _, run=run: run())
                continue
            try:
                calls[name] = graphed(run)
            except Exception as error:  # a provider that cannot be captured says so
                rows.append({"provider": name, "mode": mode, "error": one_line(error)})
        times = interleaved(calls, device, repetitions, seconds)
        rows += [{"provider": name, "mode": mode, **timed(t), **errors[name]} for name, t in times.items()]
        keep(rows)
    return rows


def parser() -> argparse.ArgumentParser:
    """Options of this script."""
    p = common_parser(__doc__)
    p.add_argument("--tokens", nargs="+", type=int)
    p.add_argument("--sequences", type=int, default=64)
    p.add_argument("--modes", nargs="+", choices=MODES, help="default: both; graph too on a GPU")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    device = set_up(args)
    gpu = device.type == "cuda"
    modes = args.modes or (MODES if gpu else ("both",))
    if "graph" in modes and not gpu:
        raise SystemExit("--modes graph: there is no CUDA device")
    report = Report("policy_loss", device, measure.ceilings(device, args.quick), args.out, NOTE)
    sizes = args.tokens or ((4096, 65536, 1 << 20) if args.full else (65536,) if gpu else (8192,))
    for tokens in in_part(sizes, args.part):
        batch = make_batch(tokens, args.sequences, device)
        steps, missing = providers(device)
        steps = {name: step for name, step in steps.items() if wanted(name, args.providers)}
        if args.quick and gpu and not args.providers:
            del steps["compile"]  # compiling costs more than the rest together
        title = f"T={tokens}, {args.sequences} sequences, 80% of tokens trained"
        facts = {"problem": {"tokens": tokens, "sequences": args.sequences, "dtype": "float32"}}
        rows = run_contest(
            batch, steps, modes, args.repetitions, args.seconds,
            lambda rows, title=title, facts=facts: report.keep(title, facts, rows),
        )  # fmt: skip
        rows += [absent(name, why) for name, why in missing.items() if wanted(name, args.providers)]
        report.add(title, facts, COLUMNS, rows)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
