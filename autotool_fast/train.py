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

The command line, the plan and the run folder are checked before torch is loaded: `--help`, errors and the embedded
model's `--dry-run` answer at once; a pretrained model's takes seconds, for its memory is counted on the model without
weights. What is wrong is one line; only a bug leaves a traceback.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from autotool_fast import distributed
from autotool_fast.config import TrainConfig, parse_args
from autotool_fast.errors import UserError, readers_may_leave
from autotool_fast.plan import check, describe
from autotool_fast.runs import RunFolder


@readers_may_leave
def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer; returns the exit code: 0 done, 2 a user's error, 130, 143, 129: stopped by a signal."""
    config = None
    distributed.silence()
    try:
        config = parse_args(argv)
        check(config)
        if config.dry_run:
            print(describe(config))
            return 0
        with distributed.processes(config.device, _continue(config)), _open(config) as run:
            from autotool_fast.stages import run_stages

            code = run_stages(config, run)
        return distributed.leave(code)
    except UserError as error:
        return distributed.fail(f"error: {error}", error.exit_code)
    except KeyboardInterrupt as stop:
        code = 143 if signal.SIGTERM in stop.args else 130
        return distributed.fail(f"interrupted at once; {_continue(config)}", code)
    except Exception:
        if distributed.world() == 1:
            raise
        trace = traceback.format_exc()
        reason = distributed.lost(distributed.PATIENCE)  # a collective that failed may be its doing
        return distributed.fail(f"error: {reason}; {_continue(config)}" if reason else trace, 1)


def _continue(config: TrainConfig | None) -> str:
    flag = "--resume in place of --overwrite" if config and config.overwrite else "--resume"
    return f"repeat the command with {flag} to continue from the newest checkpoint"


def _open(config: TrainConfig) -> RunFolder:
    run = RunFolder.create(config) if distributed.is_main() else RunFolder(Path(config.out))
    distributed.barrier()
    return run


if __name__ == "__main__":
    sys.exit(main())
