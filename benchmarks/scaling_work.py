"""What `benchmarks.scaling` measures: series of calls whose size grows along one axis.

Update: packed forward, head op, backward, through the functions that every stage trains with. Head: the op alone, both
gradients. Rollout: decoding by the slot engine, prompts read before the clock starts. Ranks: an optimizer step of one
and of several gloo processes under FSDP2 on the same sequences, in processes of their own.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from autotool_kernels import linear_logp_entropy
from transformers import PreTrainedModel

from autotool_fast import distributed
from autotool_fast.loop import make_optimizers
from autotool_fast.packing import pack
from autotool_fast.policy import PolicyModule, packed_logp_entropy
from autotool_fast.rollout.late import open_slot_engine
from benchmarks.episodes import Shape, make_model
from benchmarks.measure import Call, one_line

TRAINED_SHARE = 2  # one of so many tokens of a sequence, at its end, is trained
LR, CLIP = 1e-5, 1.0


@dataclass(frozen=True)
class Sizes:
    """The points of every series."""

    length: int = 256  # of a sequence
    sequences: tuple[int, ...] = (1, 2, 4, 8, 16)
    total: int = 2048  # tokens of an update that are split into ever more sequences
    splits: tuple[int, ...] = (2, 4, 8, 16, 32)
    vocabularies: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072)
    head_tokens: tuple[int, ...] = (64, 128, 256, 512, 1024)
    episodes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    contexts: tuple[int, ...] = (64, 256, 512, 1024, 1536)
    new_tokens: int = 24
    ranks: tuple[int, ...] = (1, 2, 4)
    rank_sequences: int = 8


SMALL = Sizes(16, (1, 2, 4), 64, (1, 2, 4), (512, 1024, 2048), (8, 16, 32), (1, 2, 4), (16, 32, 64), 4, (1, 2), 4)


@dataclass(frozen=True)
class Series:
    """One axis: calls by their size `x`; `per` names what a point's time is divided by for the figure, `units` each."""

    name: str
    x: str
    per: str
    what: str
    calls: dict[int, Call]
    units: dict[int, int]


def series(part: str, sizes: Sizes, shape: Shape, device: torch.device) -> Iterator[Series]:
    """The series of a part, made one after the other, so that each one's memory goes with it."""
    makers = {
        "update": (_update_by_tokens, _update_by_sequences),
        "head": (_head_by_vocabulary, _head_by_tokens),
        "rollout": (_rollout_by_episodes, _rollout_by_context),
    }
    return (make(sizes, shape, device) for make in makers[part])


def _sequences(count: int, length: int, vocab: int) -> list[np.ndarray]:
    make = np.random.default_rng(0)
    return [make.integers(0, vocab, length) for _ in range(count)]


def backward(model: PreTrainedModel | PolicyModule, sequences: Sequence[np.ndarray], device: torch.device) -> None:
    """Log-prob and entropy of the later part of each sequence, and the gradients of a loss of both."""
    batch = pack(sequences, device)
    starts = np.cumsum([0, *map(len, sequences)])
    trained = torch.zeros(batch.tokens, dtype=torch.bool)
    for start, end in itertools.pairwise(starts):
        trained[end - max(1, (end - start) // TRAINED_SHARE) : end] = True
    out = packed_logp_entropy(model, batch, trained)
    (out.logp.sum() + 0.01 * out.entropy.sum()).div(out.logp.numel()).backward()


def _update(shape: Shape, device: torch.device, batches: dict[int, tuple[int, int]]) -> dict[int, Call]:
    """Calls by x for (sequences, length)."""
    model = make_model(shape, device).train()

    def call(count: int, length: int) -> Call:
        sequences = _sequences(count, length, shape.vocab)

        def run(_: Any) -> None:
            model.zero_grad(set_to_none=True)
            backward(model, sequences, device)

        return Call(run)

    return {x: call(*batch) for x, batch in batches.items()}


def _update_by_tokens(sizes: Sizes, shape: Shape, device: torch.device) -> Series:
    batches = {count * sizes.length: (count, sizes.length) for count in sizes.sequences}
    what = f"forward and backward, sequences of {sizes.length} tokens, half of them trained"
    return Series("update, tokens", "tokens", "token", what, _update(shape, device, batches), {x: x for x in batches})


def _update_by_sequences(sizes: Sizes, shape: Shape, device: torch.device) -> Series:
    batches = {count: (count, sizes.total // count) for count in sizes.splits}
    what = f"forward and backward of {sizes.total} tokens, half of them trained, in ever more and shorter sequences"
    units = dict.fromkeys(batches, sizes.total)
    return Series("update, sequences", "sequences", "token", what, _update(shape, device, batches), units)


def _head(tokens: int, vocab: int, hidden: int, device: torch.device) -> Call:
    make = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(n, hidden, generator=make).div_(hidden**0.25).to(device).requires_grad_() for n in (tokens, vocab)
    )
    target = torch.randint(vocab, (tokens,), generator=make).to(device)

    def run(_: Any) -> None:
        x.grad = w.grad = None
        out = linear_logp_entropy(x, w, target)
        (out.logp.sum() + 0.01 * out.entropy.sum()).backward()

    return Call(run)


def _head_by_vocabulary(sizes: Sizes, shape: Shape, device: torch.device) -> Series:
    tokens = sizes.head_tokens[len(sizes.head_tokens) // 2]
    calls = {vocab: _head(tokens, vocab, shape.hidden, device) for vocab in sizes.vocabularies}
    what = f"linear_logp_entropy, both gradients, {tokens} tokens, width {shape.hidden}"
    return Series("head, vocabulary", "vocabulary", "column", what, calls, {x: x for x in calls})


def _head_by_tokens(sizes: Sizes, shape: Shape, device: torch.device) -> Series:
    calls = {tokens: _head(tokens, shape.vocab, shape.hidden, device) for tokens in sizes.head_tokens}
    what = f"linear_logp_entropy, both gradients, vocabulary {shape.vocab}, width {shape.hidden}"
    return Series("head, tokens", "tokens", "token", what, calls, {x: x for x in calls})


def _decode(shape: Shape, device: torch.device, new: int, points: dict[int, tuple[int, int]]) -> dict[int, Call]:
    """Calls by x for (episodes, prompt length): `new - 1` tokens of each episode after the first one."""
    model = make_model(shape, device).eval()

    def call(episodes: int, prompt: int) -> Call:
        ids = _sequences(1, prompt, shape.vocab)[0].tolist()

        def prepare(i: int) -> Any:
            engine = open_slot_engine(model, slots=episodes, max_len=prompt + new)
            session = engine.session(stop_ids=[], temperature=1.0)
            session.__enter__()
            engine.submit(ids, range(episodes), np.arange(episodes) + i, new)
            while len(engine.row(0).ids if engine.stats.steps else ()) <= prompt:
                engine.step()
            return engine, session

        def run(state: Any) -> None:
            engine, session = state
            ended: list[tuple[int, bool]] = []
            while len(ended) < episodes:
                ended += engine.step()
            session.__exit__(None, None, None)

        return Call(run, prepare)

    return {x: call(*point) for x, point in points.items()}


def _rollout_by_episodes(sizes: Sizes, shape: Shape, device: torch.device) -> Series:
    prompt = sizes.contexts[1]
    calls = _decode(shape, device, sizes.new_tokens, {count: (count, prompt) for count in sizes.episodes})
    what = f"{sizes.new_tokens - 1} decoding steps behind a prompt of {prompt} tokens"
    units = {count: count * (sizes.new_tokens - 1) for count in calls}
    return Series("rollout, episodes", "concurrent episodes", "sampled token", what, calls, units)


def _rollout_by_context(sizes: Sizes, shape: Shape, device: torch.device) -> Series:
    episodes = min(16, sizes.episodes[-1])
    calls = _decode(shape, device, sizes.new_tokens, {prompt: (episodes, prompt) for prompt in sizes.contexts})
    what = f"{sizes.new_tokens - 1} decoding steps of {episodes} episodes"
    units = dict.fromkeys(calls, episodes * (sizes.new_tokens - 1))
    return Series("rollout, context", "tokens of context", "sampled token", what, calls, units)


def rank_step(shape: Shape, sizes: Sizes, repetitions: int) -> list[float]:
    """Wall milliseconds of optimizer steps on all sequences, those of the slowest rank; called by every rank."""
    device = torch.device("cpu")
    model = make_model(shape, device)
    optimizers = make_optimizers(model, lr=LR, weight_decay=0.0)
    sequences = _sequences(sizes.rank_sequences, sizes.length, shape.vocab)[distributed.rank() :: distributed.world()]
    times = []
    for _ in range(repetitions + 1):
        distributed.barrier()
        begin = time.perf_counter()
        backward(optimizers.trained, sequences, device)
        optimizers.step(CLIP)
        times.append(max(distributed.gather(1e3 * (time.perf_counter() - begin))))
    return times[1:]


def measure_ranks(ranks: int, options: Sequence[str], out: Path) -> list[float] | str:
    """Milliseconds of `rank_step` in `ranks` processes of one thread each, or why there are none."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "benchmarks.scaling", "--rank-out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=600)
        return json.loads(out.read_text(encoding="utf-8"))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        return next((line for line in lines if "Error" in line), one_line(error))[:160]
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        return one_line(error)
