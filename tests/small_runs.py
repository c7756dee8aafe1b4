"""The smallest runs of the whole trainer, for end-to-end tests: seconds, every stage, every file."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from autotool_fast.metrics import Progress

# Everything that matters is set here, so that tuning the presets changes no test. After 140 steps the base model solves
# a good part of the easy tasks in both modes: enough for labels of both kinds and for groups with unequal rewards.
PRESET = """
[world]
families = ["set", "hop"]
max_difficulty = 4
easy_share = 0.7
[model]
layers = 2
hidden = 32
heads = 2
kv_heads = 2
intermediate = 96
[base]
steps = 140
batch = 24
lr = 6e-3
warmup_steps = 5
easy_share = 0.8
[label]
prompts = 16
k = 3
[warmup]
steps = 4
batch = 8
lr = 1e-3
warmup_steps = 1
[distill]
steps = 4
batch = 8
lr = 1e-3
warmup_steps = 1
[refine]
prompts = 9
rounds = 2
[rl]
steps = 5
prompts_per_step = 4
group_size = 4
eval_every = 2
checkpoint_every = 2
[rollout]
slots = 24
max_new_tokens = 64
max_turn_tokens = 48
[eval]
per_cell = 1
interim_per_cell = 1
"""
MODELS = ("base", "warmup", "distilled", "rl")
FILES = ("labels.jsonl", "refined.json", "results.json", "transcripts.jsonl")


def write_preset(folder: Path) -> Path:
    """PRESET as a file."""
    path = folder / "small.toml"
    path.write_text(PRESET)
    return path


def tensors_of(folder: Path) -> dict[str, bytes]:
    """The weights of a saved model, bit by bit."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).view(torch.uint8).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


@contextmanager
def ctrl_c_at(stage: str, step: int, times: int = 1, number: int = signal.SIGINT) -> Iterator[None]:
    """Send SIGINT, as a terminal does, or another signal, when a stage first shows that it has reached `step`."""
    start, update = Progress.start, Progress.update
    current, sent = [""], [0]

    def watched_start(self, name, total, done=0, **options):
        current[0] = name
        start(self, name, total, done, **options)

    def watched_update(self, done, figures=None):
        update(self, done, figures)
        while current[0] == stage and done >= step and sent[0] < times:
            sent[0] += 1
            os.kill(os.getpid(), number)

    Progress.start, Progress.update = watched_start, watched_update
    try:
        yield
    finally:
        Progress.start, Progress.update = start, update
    assert sent[0] == times, f"{stage} never reached step {step}"
