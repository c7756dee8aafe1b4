"""A run whose RL stage takes a second, for the tests of failures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from autotool_fast.metrics import Progress

PRESET = """
start = "cold"
[world]
families = ["set", "hop"]
max_difficulty = 2
[model]
layers = 1
hidden = 32
heads = 1
kv_heads = 1
intermediate = 64
[base]
steps = 12
batch = 8
lr = 6e-3
warmup_steps = 1
[label]
prompts = 4
k = 2
[refine]
enabled = false
prompts = 4
[rl]
steps = 5
prompts_per_step = 2
group_size = 2
eval_every = 0
checkpoint_every = 2
[rollout]
slots = 4
max_new_tokens = 48
max_turn_tokens = 48
[eval]
per_cell = 1
interim_per_cell = 1
"""


def options(folder: Path, out: Path, *more: str) -> list[str]:
    """Arguments of a run of stages base and rl from a cold start; the preset is written into `folder`."""
    preset = folder / "small.toml"
    preset.write_text(PRESET)
    return ["--preset", str(preset), "--stages", "base,rl", "--out", str(out), *more]


@contextmanager
def when(stage: str, step: int, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` once, when a stage first shows that it has reached `step`."""
    start, update = Progress.start, Progress.update
    current, acted = [""], []

    def watched_start(self, name, *args, **options):
        current[0] = name
        start(self, name, *args, **options)

    def watched_update(self, done, figures=None):
        update(self, done, figures)
        if current[0] == stage and done >= step and not acted:
            acted.append(os.getpid())
            act()

    Progress.start, Progress.update = watched_start, watched_update
    try:
        yield
    finally:
        Progress.start, Progress.update = start, update
    assert acted, f"{stage} never reached step {step}"
