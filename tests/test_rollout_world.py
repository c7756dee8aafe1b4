"""A perfect solver, sampled through the engine, the production chat format and the embedded world."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from autotool_kernels.results import SampledTokens

import autotool_fast.rollout.engine as engine_module
from autotool_fast.chat import ChatFormat
from autotool_fast.config import ModelConfig
from autotool_fast.rollout.driver import rollout
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.rollout.records import StopReason
from autotool_fast.rollout.rng import row_seeds
from autotool_fast.tasks.rendering import solution
from autotool_fast.tasks.tiny import build_model, build_tokenizer
from autotool_fast.tasks.world import World


@pytest.mark.parametrize("mode", ["auto", "think", "no_think"])
def test_perfect_replies_solve_every_family(monkeypatch, mode):
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    chat = ChatFormat(tokenizer)
    tasks = World().grid(1, "test", "0")
    think = mode != "no_think"
    script = {}
    for group, task in enumerate(tasks):
        tokens = []
        for reply in solution(task, think=think):
            written = reply if mode == "auto" else reply.removeprefix(f"[{mode}]\n")
            tokens += tokenizer.encode(written + chat.stop, add_special_tokens=False)
        script[int(row_seeds(3, 7, group, np.array([0]))[0])] = tokens

    def sampler(logits, *, temperature, seed, offset):
        token = torch.tensor([script[row].pop(0) for row in seed.tolist()])
        return SampledTokens(token, -torch.ones(len(token)), torch.ones(len(token)))

    monkeypatch.setattr(engine_module, "sample_logp_entropy", sampler)
    engine = SlotEngine(build_model(ModelConfig(), tokenizer, 0), slots=16, max_len=256)
    trajectories = rollout(engine, tasks, chat=chat, group_size=1, seed=3, step=7, mode=mode)
    for task, trajectory in zip(tasks, trajectories, strict=True):
        assert trajectory.stop_reason is StopReason.FINISHED, task.id
        assert trajectory.correct, task.id
        assert trajectory.mode == ("think" if think else "no_think")
        assert (trajectory.n_think_tokens > 0) == think
        assert len(trajectory.replies) == len(solution(task, think=think))
    assert not any(script.values())
    assert {task.family for task in tasks} >= {"set", "chain", "missing"}
    # Forcing the tag moves tokens from sampled to prompt; they count as response either way.
    for trajectory in trajectories:
        tags = trajectory.n_forced_tokens
        assert tags == (0 if mode == "auto" else len(chat.encode_mode(mode)) * len(trajectory.replies))
        assert trajectory.n_response_tokens == tags + sum(end - start for start, end in trajectory.turn_spans)
