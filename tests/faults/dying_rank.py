"""A training run in which a rank is killed: torchrun ... tests/faults/dying_rank.py STAMP PLACE CALL VICTIM OPTION...

The victim writes STAMP and kills itself in the CALL-th call of PLACE. With PLACE `alone`, a rollout,
the others meet nobody for a minute meanwhile, as when theirs is a long one.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from autotool_fast import checkpoint, distributed, rl
from autotool_fast.train import main

PLACES = {
    "alone": (rl, "rollout_over_ranks"),
    "update": (rl, "packed_logp_entropy"),
    "shards": (checkpoint, "_save_sharded"),
    "checkpoint": (checkpoint, "_publish"),
}


def killing(work: Callable[..., Any], stamp: Path, place: str, call: int, victim: int) -> Callable[..., Any]:
    calls = [0]

    def wrapped(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and distributed.rank() == victim:
            stamp.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        if calls[0] == call and place == "alone":
            time.sleep(60)
        return work(*args, **options)

    return wrapped


if __name__ == "__main__":
    torch.set_num_threads(1)
    stamp, place, call, victim, *options = sys.argv[1:]
    module, name = PLACES[place]
    setattr(module, name, killing(getattr(module, name), Path(stamp), place, int(call), int(victim)))
    sys.exit(main(options))
