"""Who takes the steps of `benchmarks.train_step`: our `PolicyTrainer` and TRL's `GRPOTrainer`.

Both train a random model on the same prompts with the same group size, reply lengths and AdamW, all sequences in one
micro-batch, no reference model and no entropy bonus. `FixedLength` is the hook that makes replies equally long: the
mode tag is forced, the stop token too, at a fixed position and nowhere else; the tokens between are sampled freely, so
that log-probs, entropies and gradients are of ordinary size. It works alike while sampling and while training.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from autotool_fast.chat import SOURCE_SAMPLED, ParsedReply
from autotool_fast.config import from_dict
from autotool_fast.loop import Optimizers, StageState
from autotool_fast.metrics import Timer
from autotool_fast.rl import PolicyTrainer
from autotool_fast.rollout.late import open_slot_engine
from autotool_fast.tasks.record import Task
from benchmarks.episodes import OPENING, STRENGTH, Shape, make_chat, make_model, question, tool_schema
from benchmarks.peers import Absent, collect
from benchmarks.rollout_contestants import trl_trainer

LR, CLIP, BETAS, WEIGHT_DECAY = 1e-5, 1.0, (0.9, 0.95), 0.0


@dataclass(frozen=True)
class Batch:
    """One step: `prompts * group` replies of `tokens` sampled tokens to prompts of `prompt_tokens`."""

    prompts: int
    group: int
    tokens: int

    @property
    def sampled(self) -> int:
        """Sampled tokens of a step."""
        return self.prompts * self.group * self.tokens

    @property
    def prompt_tokens(self) -> int:
        """Length of every prompt; they are of one length."""
        chat = make_chat()
        lengths = {len(chat.encode_prompt(question(i), [tool_schema()])) for i in range(self.prompts)}
        assert len(lengths) == 1, lengths
        return lengths.pop()


@dataclass(frozen=True)
class Contestant:
    """`step(i)` samples, scores and updates; `update(i)` does the latter two on what `step` sampled last. Both return
    the sampled tokens."""

    name: str
    step: Callable[[int], int]
    update: Callable[[int], int]
    how: str


class FixedLength:
    """The hook: replies of one length to prompts of one length."""

    def __init__(self, model: PreTrainedModel, batch: Batch) -> None:
        ids = make_chat().tokenizer.convert_tokens_to_ids
        self._opening, self._stop = ids(OPENING), ids("<|im_end|>")
        self._first = batch.prompt_tokens - 1  # the position whose output is a reply's first token
        self._last = batch.prompt_tokens + batch.tokens - 2
        self._head = model.get_output_embeddings()
        model.base_model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Push hidden states [b, T, H] towards or away from tokens, by position."""
        hidden = output.last_hidden_state
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
        opening, stop = (self._unit(token) for token in (self._opening, self._stop))
        at_first, at_last = ((positions == at).unsqueeze(-1) for at in (self._first, self._last))
        push = torch.where(at_first, opening, torch.where(at_last, stop, -stop))
        output.last_hidden_state = hidden + STRENGTH * push
        return output

    def _unit(self, token: int) -> torch.Tensor:
        row = self._head.weight.detach()[token]
        return row / row.float().square().sum().to(row.dtype)


class _Reply:
    """An episode of one reply that is right for every other sample, so that no group is without a difference."""

    def __init__(self, right: bool) -> None:
        self._right = right

    def step(self, reply: ParsedReply) -> list[dict] | None:
        """The episode is over."""
        return None

    def score(self) -> bool:
        """Fixed from the start."""
        return self._right


def _tasks(batch: Batch) -> list[Task]:
    started = iter(range(batch.prompts * batch.group))
    return [
        Task(
            id=f"one-{prompt}",
            family="one",
            difficulty=0,
            tools=(tool_schema(),),
            messages=tuple(question(prompt)),
            spec={},
            split="train",
            start=lambda task: _Reply(next(started) % 2 == 0),
        )
        for prompt in range(batch.prompts)
    ]


def contestants(
    batch: Batch,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    wanted: Callable[[str], bool],
    micro_tokens: int | None = None,
) -> list[Contestant | Absent]:
    """Those that are wanted, or why one is absent. `micro_tokens`: of our micro-batches; None for one."""

    def model() -> PreTrainedModel:
        made = make_model(shape, device, dtype)
        FixedLength(made, batch)
        return made

    adapters = {
        "autotool": lambda: _ours(batch, model(), micro_tokens),
        "trl": lambda: _trl(batch, model(), "trl", recompute=True),
        "trl_stored": lambda: _trl(batch, model(), "trl_stored", recompute=False),
    }
    return collect({name: make for name, make in adapters.items() if wanted(name)})


def _ours(batch: Batch, model: PreTrainedModel, micro_tokens: int | None) -> Contestant:
    chat, sequences = make_chat(), batch.prompts * batch.group
    length = batch.prompt_tokens + batch.tokens
    config = from_dict(
        {
            "arm": "none",
            "rl": {
                "prompts_per_step": batch.prompts,
                "group_size": batch.group,
                "lr": LR,
                "weight_decay": WEIGHT_DECAY,
                "grad_clip": CLIP,
                "micro_tokens": micro_tokens or sequences * length,
            },
            "rollout": {"slots": sequences, "max_new_tokens": batch.tokens, "max_turn_tokens": batch.tokens},
        }
    )
    state = StageState(model, chat.tokenizer, Optimizers(model, lr=LR, weight_decay=WEIGHT_DECAY))
    engine = open_slot_engine(model, slots=sequences, max_len=length)
    trainer = PolicyTrainer(config, state, engine, chat, Timer())
    sample = trainer._sample

    def step(i: int) -> int:
        tasks = _tasks(batch)
        trainer.start_controller(tasks)
        trainer.step(tasks, i)
        return sum(int((t.source == SOURCE_SAMPLED).sum()) for t in trainer.last)

    def update(i: int) -> int:
        played = trainer.last
        trainer._sample = lambda tasks, step: played
        try:
            return step(i)
        finally:
            trainer._sample = sample

    parts = "one micro-batch" if micro_tokens is None else f"micro-batches of {micro_tokens} tokens"
    how = f"PolicyTrainer.step, {parts}, prompts shared, no activation checkpointing"
    return Contestant("autotool", step, update, how)


def _score(completions: list, **_: Any) -> list[float]:
    return [float(i % 2 == 0) for i in range(len(completions))]


def _trl(batch: Batch, model: PreTrainedModel, name: str, recompute: bool) -> Contestant:
    import trl

    folder = tempfile.TemporaryDirectory()
    trainer = trl_trainer(
        model,
        folder.name,
        batch.prompts,
        batch.group,
        reward_funcs=_score,
        max_completion_length=batch.tokens,
        max_steps=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        gradient_checkpointing=recompute,
    )
    trainer._tokenize_prompts = _with_tools()
    generate, kept = trainer._generate_and_score_completions, {}

    def sample(inputs: Any) -> Any:
        kept["rollout"] = generate(inputs)
        return dict(kept["rollout"])

    def train(source: Callable[[Any], Any]) -> int:
        trainer._generate_and_score_completions = source
        trainer.train()
        return int(kept["rollout"]["completion_mask"].sum())

    def step(i: int) -> int:
        torch.manual_seed(i)
        return train(sample)

    def update(i: int) -> int:
        return train(lambda inputs: dict(kept["rollout"]))

    step.folder = folder  # deleted with it
    how = "activation checkpointing, its default" if recompute else "activations stored"
    return Contestant(name, step, update, f"TRL {trl.__version__} GRPOTrainer.train() for one step, {how}")


def _with_tools() -> Callable[[list], tuple[list[list[int]], None, dict]]:
    """Prompts as ours are, with the tool shown; without a tool loop, which a single turn does not need."""

    chat = make_chat()

    def tokenize(prompts: list) -> tuple[list[list[int]], None, dict]:
        return [chat.encode_prompt(messages, [tool_schema()]) for messages in prompts], None, {}

    return tokenize
