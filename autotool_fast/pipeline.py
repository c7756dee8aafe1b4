"""What all stages of a run share: model, tokenizer, chat format and problems, loading and saving, supervised training.

Which stage reads and writes what is in `stages`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from autotool_fast import adapters, distributed, files, loading, memory
from autotool_fast.attention import select
from autotool_fast.chat import MODES, ChatFormat, chat_format
from autotool_fast.checkpoint import write_model
from autotool_fast.config import SftConfig, Stage, TrainConfig
from autotool_fast.environment import SimulatorProblems
from autotool_fast.errors import UserError, cannot_write
from autotool_fast.loop import Context, StageState, StepResult, make_optimizers, run_steps, trapezoid
from autotool_fast.own_tools import ToolProblems
from autotool_fast.policy import recompute_activations
from autotool_fast.problems import DataProblems, Problems, WorldProblems
from autotool_fast.rl import rollout_limits
from autotool_fast.rollout import vllm
from autotool_fast.rollout.driver import Engine
from autotool_fast.rollout.late import open_slot_engine
from autotool_fast.tasks.record import Task
from autotool_fast.tasks.tiny import build_tokenizer
from autotool_fast.warmup import Demonstration, sft_backward

COMPLETE = "give a complete model folder, or a hub name on a machine that can reach the hub"
MODEL_OF_STAGE: dict[Stage, str] = {"base": "base", "warmup": "warmup", "distill": "distilled", "rl": "rl"}


class Pipeline:
    """The objects that all stages of one run use."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.config: TrainConfig = context.config
        self.run = context.run
        model = self.config.model
        if model.path:
            context.progress.say(f"memory: {memory.describe(self.config)}")
        if model.path:
            self.tokenizer = load_tokenizer(model.path, own_code=model.trust_remote_code)
            self.chat = chat_format(self.tokenizer, model.chat_format, option="--model.chat-format")
        else:
            self.tokenizer = build_tokenizer()
            self.chat = ChatFormat(self.tokenizer)
        self.limits = rollout_limits(self.config.rollout)
        self.device = torch.device(self.config.device)
        attention = select(model.attention, self.device, getattr(torch, model.dtype))
        if self.device.type == "cuda":
            context.progress.say(f"attention: {attention}")
        self.problems = self._problems()
        self.weights = self.problems.weights
        for notice in self.problems.notices:
            context.progress.say(notice)

    def _problems(self) -> Problems:
        config = self.config
        if not config.data.path and config.environment.kind == "none":
            return WorldProblems(config.world, config.seed, "natural" if config.model.path else "compact")
        room = config.model.max_positions - self.limits.max_new_tokens - max(map(len, self._mode_tags()))

        def unusable(task: Task) -> str | None:
            for message in task.messages:
                if reason := self.chat.unwritable_message(message):
                    return f"{reason} in the history"
            prompt = self.chat.encode_prompt(list(task.messages), list(task.tools))
            return None if len(prompt) <= room else "prompt too long"

        data = None
        if config.data.path:
            data = DataProblems(
                Path(config.data.path),
                config.seed,
                unusable=unusable,
                unwritable=self.chat.unwritable,
                strict=config.data.strict,
            )
        if config.environment.kind == "none":
            return data
        options = {"data": data, "warn": self.context.progress.say, "slots": config.rollout.slots}
        if config.environment.kind == "tools":
            return ToolProblems(config.environment, config.seed, unusable=unusable, **options)
        turns = self.limits.max_turns
        return SimulatorProblems(config.environment, config.seed, unusable=unusable, max_turns=turns, **options)

    def _mode_tags(self) -> list[list[int]]:
        return [self.chat.encode_mode(mode) for mode in MODES]

    def close(self) -> None:
        """Give back what the problems hold."""
        self.problems.close()

    def load(self, name: str) -> PreTrainedModel:
        """A model that an earlier stage saved, or (base) the pretrained one."""
        config = self.config.model
        if name == "base" and config.path:
            where, own_code = f"model.path ({config.path})", config.trust_remote_code
            return load_model(config.path, config.dtype, where=where, own_code=own_code).to(self.device)
        folder = self.run.model(name)
        if not (folder / "config.json").exists():
            stage = next(stage for stage, model in MODEL_OF_STAGE.items() if model == name)
            raise UserError("is missing", where=str(folder), remedy=f"run stage {stage} first")
        return load_model(folder, config.dtype, own_code=config.trust_remote_code).to(self.device)

    def trainable(self, name: str) -> PreTrainedModel:
        """A model that an earlier stage saved, to be trained on: all of it, or an adapter beside it."""
        model = self.load(name)
        if self.config.lora.rank:
            adapters.add(model, self.config.lora, self.config.seed)
        if self.config.model.gradient_checkpointing:
            recompute_activations(model)
        return model

    def save(self, model: PreTrainedModel, name: str) -> None:
        """Export a model as a Hugging Face folder, which is whole or absent; an adapter is merged into it first."""
        with self.context.timer.phase("checkpoint"):
            distributed.on_main(lambda: self._save(model, name))

    def _save(self, model: PreTrainedModel, name: str) -> None:
        if adapters.present(model):
            adapters.merge(model)
        folder = self.run.model(name)
        beside = folder.with_name(f".{name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        try:
            write_model(beside, model, self.tokenizer)
            files.sync_tree(beside)
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
            files.sync(folder.parent)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise cannot_write(error, folder) from error

    def models(self) -> list[str]:
        """Names of the models the run has, in the order of the stages that make them."""
        pretrained = bool(self.config.model.path)
        names = ("base", "distilled", "warmup", "rl")
        return [n for n in names if (n == "base" and pretrained) or (self.run.model(n) / "config.json").exists()]

    @cached_property
    def _transfer(self) -> vllm.Transfer:
        return vllm.open_transfer(self.config, self.run.path / "server_weights")

    def engine(self, model: PreTrainedModel) -> Engine:
        """A rollout engine on a model: the slot engine, or a server that gets its weights."""
        rollout_config = self.config.rollout
        if rollout_config.backend == "vllm":
            return vllm.open_engine(self.config, model, self._transfer)
        return open_slot_engine(
            model,
            slots=rollout_config.slots,
            max_len=self.config.model.max_positions,
            prefill_chunk=rollout_config.prefill_chunk,
            cuda_graphs=rollout_config.cuda_graphs,
        )

    def sft(
        self,
        stage: Stage,
        model: PreTrainedModel,
        config: SftConfig,
        batch: Callable[[int], Sequence[Demonstration]],
        *,
        steps: int | None = None,
        matrix: str = "adamw",
    ) -> None:
        """Fine-tune `model` on `batch(step)`, with a trapezoidal learning rate, and save it."""
        steps = config.steps if steps is None else steps
        kind = self.config.optim.kind
        optimizers = make_optimizers(
            model, lr=config.lr, weight_decay=config.weight_decay, matrix=matrix, kind=kind
        )
        timer = self.context.timer

        def step(index: int) -> StepResult:
            with timer.phase("data"):
                demos = batch(index)
            loss = sft_backward(
                optimizers.trained,
                demos,
                micro_tokens=self.config.rl.micro_tokens,
                attention=self.config.model.attention,
            )
            with timer.phase("optimizer"):
                scale = trapezoid(index, steps, config.warmup_steps)
                norm, finite = optimizers.step(config.grad_clip, scale, measured=(loss,))
            metrics = {"loss/sft": loss, "grad_norm": norm}
            return StepResult(metrics, finite, None if finite else [demo.ids.tolist() for demo in demos])

        optimizers.trained.train()
        state = StageState(model, self.tokenizer, optimizers)
        run_steps(
            self.context,
            stage,
            state,
            steps,
            step,
            shown=("loss/sft",),
            checkpoint_every=config.checkpoint_every,
        )
        self.save(model, MODEL_OF_STAGE[stage])


def load_model(
    source: Path | str, dtype: str = "float32", *, where: str | None = None, own_code: bool = False
) -> PreTrainedModel:
    """A model folder, or a model of the hub, its weights in safetensors.

    Args:
        own_code: run code that comes with the model, if it has any.

    Raises:
        UserError: there is no model, or a damaged one; `where` names the setting to blame.
    """
    try:
        return loading.read_model(
            source, dtype=getattr(torch, dtype), local=isinstance(source, Path), own_code=own_code
        )
    except loading.Unusable as error:
        problem = f"holds no model that can be loaded ({error})"
        raise UserError(problem, where=where or str(source), remedy=error.code_remedy or COMPLETE) from error


def load_tokenizer(source: str, *, own_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a pretrained model; `own_code` as in `load_model`.

    Raises:
        UserError: there is none, or a damaged one.
    """
    try:
        return loading.read_tokenizer(source, local=False, own_code=own_code)
    except loading.Unusable as error:
        problem, remedy = f"holds no tokenizer that can be loaded ({error})", error.code_remedy or COMPLETE
        raise UserError(problem, where=f"model.path ({source})", remedy=remedy) from error
