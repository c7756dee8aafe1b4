"""`python -m autotool_fast.train`: the method from the first random weight to the report.

Stages, in this order; each reads what the earlier ones left in the run folder, so they can be run together or one at a
time (`--stages`):

    base     train the tiny model from scratch on both modes, tags drawn 50/50
    label    sample every prompt k times in both modes; short, long or drop
    warmup   SFT on the labelled mix of short answers and long traces
    distill  the baseline: SFT on long traces alone, with as many updates as warm-up and RL together
    refine   choose the RL prompts: fewer trivial ones, those with a steady reward
    rl       GRPO with an entropy arm
    eval     every model in modes auto, think and no_think on held-out tasks; results.json and report.html

The command line is parsed before torch is loaded: `--help`, `--dry-run` and errors answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from autotool_fast.config import parse_args
from autotool_fast.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer; returns the exit code: 0 done, 2 a user's error, 130 interrupted."""
    try:
        config = parse_args(argv)
        if config.dry_run:
            from autotool_fast.plan import describe

            print(describe(config))
            return 0
        from autotool_fast.stages import run_stages

        return run_stages(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted at once; continue from the newest checkpoint with --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
