"""One GRPO step with scripted replies: the sampler's choices are given, its log-probs are the model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from autotool_kernels.results import SampledTokens
from transformers import PreTrainedModel

import autotool_fast.rollout.engine as engine_module
from autotool_fast.chat import ChatFormat
from autotool_fast.config import from_dict
from autotool_fast.loop import StageState, StepResult, make_optimizers
from autotool_fast.metrics import Timer
from autotool_fast.rl import PolicyTrainer
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.rollout.rng import row_seeds
from autotool_fast.tasks import tiny
from autotool_fast.tasks.record import Task
from autotool_fast.tasks.rendering import solution
from autotool_fast.tasks.world import World

WORLD = World(("set", "hop", "chain"), 4)
GROUP = 4
SET, OTHER_SET, HOP, CHAIN = (
    WORLD.task(family, k, "train", seed)
    for family, k, seed in (("set", 0, "0"), ("set", 0, "1"), ("hop", 4, "0"), ("chain", 2, "0"))
)
SHORT, LONG, WRONG_SHORT, WRONG_LONG, MALFORMED = "short", "long", "wrong short", "wrong long", "malformed"
TASKS = [SET, HOP, CHAIN]
MIXED = [[SHORT, LONG, WRONG_SHORT, MALFORMED], [LONG, WRONG_LONG, LONG, SHORT], [LONG, SHORT, MALFORMED, LONG]]


def written(task: Task, kind: str) -> list[str]:
    """The turns of a reply of some kind, as text."""
    if kind == MALFORMED:
        return ["so: 3"]
    if kind.startswith("wrong"):  # asks for another thing than the task does
        task = OTHER_SET if task.family == "set" else WORLD.task(task.family, task.difficulty, "train", "other")
        return solution(task, think="long" in kind)[-1:]
    return solution(task, think="long" in kind)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, or the whole of one that several processes share out."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Setting:
    """A trainer on a small untrained model, with scripted replies."""

    script: ClassVar[dict[int, list[int]]] = {}  # a row's seed -> tokens still to come

    def __init__(
        self,
        monkeypatch,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        tied: bool = True,
        prepare: Callable[[PreTrainedModel], None] = lambda model: None,
        rl=None,
        **values,
    ) -> None:
        options = {"group_size": GROUP, "prompts_per_step": 3, "lr": 1e-2, **(rl or {})}
        sizes = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "intermediate": 16}
        self.config = from_dict({"rl": options, "model": sizes, "rollout": {"slots": 8}, **values})
        tokenizer = tiny.build_tokenizer()
        self.chat = ChatFormat(tokenizer)
        self.model = tiny.build_model(self.config.model, tokenizer, seed).to(dtype)
        if not tied:
            self.model.config.tie_word_embeddings = False
            self.model.lm_head.weight = torch.nn.Parameter(self.model.lm_head.weight.detach().flip(0).clone())
        prepare(self.model)
        optimizers = make_optimizers(self.model, lr=options["lr"], weight_decay=0.0)
        self.state = StageState(self.model, tokenizer, optimizers)
        self.engine = SlotEngine(self.model, slots=8, max_len=256)
        self.trainer = PolicyTrainer(self.config, self.state, self.engine, self.chat, Timer())
        self.gradient: dict[str, torch.Tensor] = {}
        monkeypatch.setattr(engine_module, "sample_logp_entropy", self._sample)
        step = optimizers.step

        def keep_gradient(*args, **kwargs):
            named = zip(self.model.named_parameters(), optimizers.trained.parameters(), strict=True)
            self.gradient = {name: whole(p.grad).clone() for (name, _), p in named if p.grad is not None}
            return step(*args, **kwargs)

        optimizers.step = keep_gradient

    def _sample(self, logits, *, temperature, seed, offset) -> SampledTokens:
        token = torch.tensor([self.script[row].pop(0) for row in seed.tolist()])
        logp = (logits.double() / (temperature or 1.0)).log_softmax(-1)
        return SampledTokens(token, logp.gather(1, token[:, None])[:, 0], -(logp.exp() * logp).sum(-1))

    def write(self, tasks: Sequence[Task], kinds: Sequence[Sequence[str]], step: int = 0, mode: str = "auto") -> None:
        """Have the sampler give these replies at `step`."""
        for group, (task, row) in enumerate(zip(tasks, kinds, strict=True)):
            seeds = row_seeds(self.config.seed, step, group, np.arange(len(row))).tolist()
            for seed, kind in zip(seeds, row, strict=True):
                turns = [reply.removeprefix(f"[{mode}]\n") + self.chat.stop for reply in written(task, kind)]
                self.script[seed] = [token for turn in turns for token in self.chat.encode_text(turn)]

    def step(self, tasks: Sequence[Task], kinds: Sequence[Sequence[str]], step: int = 0) -> StepResult:
        self.write(tasks, kinds, step)
        self.trainer.start_controller(tasks)
        return self.trainer.step(tasks, step)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}
