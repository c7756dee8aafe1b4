"""Rollouts of four-turn tool episodes: ours, `model.generate`, continuous batching, TRL's tool loop, vLLM.

    python -m benchmarks.rollout [--quick] [--turn-tokens 12 60] [--vocab 32768] [--device cuda] [--out FILE]
    python -m benchmarks.rollout --device cuda --shape qwen2.5-0.5b --prompts 16     # CUDA graphs on against off

All play the same episodes of a random Qwen2-shaped model, whose script (`benchmarks.episodes`) fixes what is said, so
turns and sampled tokens are equal, and checked. Two tables: turns of one length, the best case of lock-step batches,
and turns of mixed lengths. Tokens per second count sampled tokens over the whole rollout: reading prompts and tool
results, parsing, calling tools. Peak memory is what a rollout takes beyond the model; on a GPU, where our engine and
its captured graphs are kept from rollout to rollout as a trainer keeps them, beyond those.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autotool_fast.errors import UserError
from benchmarks import end_to_end

if TYPE_CHECKING:
    import torch

    from benchmarks.episodes import Shape, Work
    from benchmarks.report import Report

CONTESTANTS = ("autotool", "generate", "generate_kept", "continuous", "trl", "vllm")
ON_GPU = ("autotool_no_graphs",)
"""Contestants on a GPU alone."""
SHORTEST_TURN = 8
"""Tokens of a turn that is nothing but a tool call, and one word."""
SHAPES = {
    "qwen2.5-0.5b": {
        "hidden": 896,
        "layers": 24,
        "heads": 14,
        "kv_heads": 2,
        "intermediate": 4864,
        "vocab": 151936,
        "tied": True,
    }
}


def parser() -> argparse.ArgumentParser:
    """Options of this script."""
    p = end_to_end.parser(__doc__, "rollout")
    p.add_argument("--quick", action="store_true", help="one prompt, ours and model.generate")
    p.add_argument("--vocab", type=end_to_end.positive, default=32768, metavar="N", help="vocabulary (default 32768)")
    p.add_argument(
        "--turn-tokens",
        nargs=2,
        type=end_to_end.positive,
        default=(12, 60),
        metavar=("LEAST", "MOST"),
        help="sampled tokens of a turn (default 12 60)",
    )
    p.add_argument(
        "--shape", choices=tuple(SHAPES), help="a published model's sizes and bfloat16, in place of the options above"
    )
    p.add_argument("--tool-tokens", type=end_to_end.positive, default=24, metavar="N", help="most of a tool result")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    try:
        args = parser().parse_args(argv)
        end_to_end.check(args, CONTESTANTS + (ON_GPU if args.device == "cuda" else ()))
        least, most = args.turn_tokens
        if not SHORTEST_TURN <= least <= most:
            problem = f"must be two numbers from {SHORTEST_TURN}, the smaller one first: got {least} {most}"
            raise UserError(problem, where="--turn-tokens")
        _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(args: argparse.Namespace) -> None:
    from benchmarks import measure
    from benchmarks.episodes import Shape, Work
    from benchmarks.report import Report, set_up

    device = set_up(args)
    if args.quick:
        args.prompts, args.providers = 1, args.providers or ["ours", "generate"]
    if args.shape:
        shape, args.dtype = Shape(**SHAPES[args.shape]), "bfloat16"
    else:
        shape = Shape(
            hidden=args.hidden, layers=args.layers, vocab=args.vocab, heads=args.heads, kv_heads=args.kv_heads
        )
    least, most = args.turn_tokens
    mixed = Work(args.prompts, args.group, least, most, args.tool_tokens)
    same = Work(args.prompts, args.group, (least + most) // 2, (least + most) // 2, args.tool_tokens)
    note = "ours faster: our median sampled tokens/s divided by that row's. p20, p80: percentiles of the repetitions."
    report = Report("rollout", device, measure.ceilings(device, quick=True), args.out, note)
    for work in (same, mixed) if least < most else (mixed,):
        compare(args, shape, work, device, report)
    report.finish()


def compare(args: argparse.Namespace, shape: Shape, work: Work, device: torch.device, report: Report) -> None:
    """One table: every contestant on the same episodes."""
    import torch

    from benchmarks.episodes import TURNS, expected
    from benchmarks.peers import Absent
    from benchmarks.report import wanted
    from benchmarks.rollout_contestants import Setting, contestants

    setting = Setting.of(work, shape, device, getattr(torch, args.dtype))
    want = expected(work, setting.script, setting.chat)
    found = contestants(setting, lambda name: wanted(name, args.providers))
    runs = {}
    for c in found:
        if not isinstance(c, Absent):

            def run(i: int, c=c) -> int:
                counts = c.run(i)
                end_to_end.checked(c.name, counts, want)
                return counts.total

            runs[c.name] = run
    rows = end_to_end.contest(runs, device, args.repetitions, args.seconds, not args.no_memory)
    rows += [{"provider": c.name, "error": c.why} for c in found if isinstance(c, Absent)]
    lengths = f"{work.shortest}" if work.shortest == work.longest else f"{work.shortest}-{work.longest}"
    problem = (
        f"{work.prompts} x {work.group} episodes of {TURNS} turns of {lengths} tokens, tool results of up to "
        f"{work.result_tokens}; Qwen2, {shape.layers} layers of {shape.hidden}, vocabulary {shape.vocab}, {args.dtype}"
    )
    facts = {
        "problem": {**vars(work), **vars(shape), "turns": TURNS, "dtype": args.dtype, "threads": args.threads},
        "sampled_tokens": want.total,
        "peer_versions": end_to_end.versions(),
    }
    notes = [f"{c.name}: {c.how}" for c in found if not isinstance(c, Absent)]
    report.add(problem, facts, end_to_end.columns(), rows, notes)


if __name__ == "__main__":
    sys.exit(main())
