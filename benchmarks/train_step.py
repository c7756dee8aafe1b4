"""A whole GRPO step, ours against TRL's GRPOTrainer: sample, score, log-probs, loss, backward, AdamW.

    python -m benchmarks.train_step [--quick] [--vocab 32768 151936] [--tokens 64] [--device cuda] [--out FILE]

Same random Qwen2-shaped model with tied embeddings, prompts, group size, reply lengths, optimizer and micro-batch (all
sequences at once; --micro-tokens splits ours). Two tables for each vocabulary: the whole step, and the update alone on
replies sampled before. Tokens per second count sampled tokens, which must be equal; peak memory is what a step takes
beyond weights and optimizer state. TRL runs twice: with its defaults, which compute activations again in the backward,
and with activations stored, as ours does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from autotool_fast.errors import UserError
from benchmarks import end_to_end

if TYPE_CHECKING:
    import torch

    from benchmarks.report import Report, Row


CONTESTANTS = ("autotool", "trl", "trl_stored")


def parser() -> argparse.ArgumentParser:
    """Options of this script."""
    p = end_to_end.parser(__doc__, "train_step")
    p.add_argument("--quick", action="store_true", help="the first vocabulary alone, ours alone")
    p.add_argument(
        "--vocab", nargs="+", type=end_to_end.positive, default=[32768, 151936], metavar="N", help="vocabularies"
    )
    p.add_argument("--tokens", type=end_to_end.positive, default=64, metavar="N", help="of a reply (default 64)")
    p.add_argument("--micro-tokens", type=end_to_end.positive, metavar="N", help="of our micro-batches (default: one)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    try:
        args = parser().parse_args(argv)
        if args.tokens < 3 or args.group < 2:
            raise UserError("a reply has at least 3 tokens and a group 2 samples", where="--tokens, --group")
        end_to_end.check(args, CONTESTANTS)
        _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(args: argparse.Namespace) -> None:
    from benchmarks import measure
    from benchmarks.report import Report, set_up

    device = set_up(args)
    if args.quick:
        args.vocab, args.providers = args.vocab[:1], args.providers or ["ours"]
    note = "ours faster: our median sampled tokens/s divided by that row's. p20, p80: percentiles of the repetitions."
    report = Report("train_step", device, measure.ceilings(device, quick=True), args.out, note)
    for vocab in args.vocab:
        compare(args, vocab, device, report)
    report.finish()


def compare(args: argparse.Namespace, vocab: int, device: torch.device, report: Report) -> None:
    """Two tables for one vocabulary: the step and the update."""
    import torch

    from benchmarks.episodes import Shape
    from benchmarks.peers import Absent
    from benchmarks.report import wanted
    from benchmarks.train_contestants import Batch, contestants

    shape = Shape(
        hidden=args.hidden, layers=args.layers, vocab=vocab, heads=args.heads, kv_heads=args.kv_heads, tied=True
    )
    batch = Batch(args.prompts, args.group, args.tokens)
    found = contestants(
        batch, shape, device, getattr(torch, args.dtype), lambda name: wanted(name, args.providers), args.micro_tokens
    )
    present = [c for c in found if not isinstance(c, Absent)]
    absent: list[Row] = [{"provider": c.name, "error": c.why} for c in found if isinstance(c, Absent)]
    problem = (
        f"{batch.prompts} x {batch.group} replies of {batch.tokens} tokens to prompts of {batch.prompt_tokens}; "
        f"Qwen2, {shape.layers} layers of {shape.hidden}, vocabulary {vocab}, {args.dtype}"
    )
    facts = {
        "problem": {**vars(batch), **vars(shape), "prompt_tokens": batch.prompt_tokens, "dtype": args.dtype},
        "threads": args.threads,
        "peer_versions": end_to_end.versions(),
    }
    notes = [f"{c.name}: {c.how}" for c in present]
    for what, part in (("step", lambda c: c.step), ("update", lambda c: c.update)):
        runs = {c.name: _checked(c.name, part(c), batch.sampled) for c in present}
        rows = end_to_end.contest(runs, device, args.repetitions, args.seconds, not args.no_memory)
        report.add(f"{what}, {problem}", {"measures": what, **facts}, end_to_end.columns(), [*rows, *absent], notes)


def _checked(name: str, run: Callable[[int], int], want: int) -> Callable[[int], int]:
    def checked(i: int) -> int:
        tokens = run(i)
        end_to_end.checked(name, tokens, want)
        return tokens

    return checked


if __name__ == "__main__":
    sys.exit(main())
