"""What a run is going to do: checks before anything is written, and the text of `--dry-run`.

Neither needs torch, unless a GPU or a pretrained model is asked for.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

from autotool_fast import distributed, memory
from autotool_fast.config import FLASH_MODULES, EnvironmentConfig, Stage, TrainConfig
from autotool_fast.errors import UserError
from autotool_fast.tasks.world import World

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
VOCAB_ESTIMATE = 128
"""Upper bound of the embedded tokenizer's vocabulary, used for the parameter estimate only."""


def check(config: TrainConfig) -> None:
    """Refuse a run that cannot succeed, while what the run folder holds is still untouched.

    Raises:
        UserError: no task can be drawn; the environment's package is missing, or the user's tools or problems are not
            in order; there is no GPU or no rollout server (a dry run needs neither), or no peft or torchao where one is
            asked for; several processes are to offload; a stage of a new run needs one that is not run; `base.reuse`
            holds no model, or is about to be removed by
            --overwrite.
    """
    if config.environment.kind == "bfcl":
        from autotool_fast.eval.bfcl import locate

        locate(Path(config.environment.path) if config.environment.path else None, "--environment.path")
    elif config.environment.kind == "tools":
        inspect_tools(config.environment)
    elif not config.data.path:
        World(config.world.families, config.world.max_difficulty)
    if config.data.path and not Path(config.data.path).is_dir():
        remedy = "write the folder with python -m autotool_fast.data prepare"
        raise UserError("is no folder", where=f"data.path ({config.data.path})", remedy=remedy)
    for part in ("sft", "rl", "test") if config.data.path else ():
        file = Path(config.data.path) / f"{part}.jsonl"
        if not file.is_file() or not file.stat().st_size:
            problem = f"{file.name} is empty" if file.is_file() else f"holds no {file.name}"
            remedy = "write the folder with python -m autotool_fast.data prepare, from enough data for all its parts"
            raise UserError(problem, where=f"data.path ({config.data.path})", remedy=remedy)
    dialogues = config.environment.kind != "none" and config.rollout.max_turns < 2
    if dialogues:
        remedy = "raise it: every request of the user takes one reply and one for each round of calls"
        raise UserError("allows no dialogue with an environment", where="rollout.max_turns", remedy=remedy)
    _check_model(config.model.path)
    if config.lora.rank and importlib.util.find_spec("peft") is None:
        raise UserError("needs peft", where="lora.rank", remedy="install it with pip install peft")
    if config.model.attention == "flash" and not any(map(importlib.util.find_spec, FLASH_MODULES)):
        remedy = 'install it with pip install "autotool_fast[flash]", or use auto'
        raise UserError("flash needs flash-attn", where="model.attention", remedy=remedy)
    if config.optim.kind == "adamw-8bit" and importlib.util.find_spec("torchao") is None:
        remedy = 'install it with pip install "autotool_fast[memory]"'
        raise UserError("adamw-8bit needs torchao", where="optim.kind", remedy=remedy)
    if config.optim.kind == "offload" and distributed.world() > 1:
        remedy = "leave torchrun out, or use adamw-8bit; several processes share the optimizer out already"
        raise UserError("offload works in one process only", where="optim.kind", remedy=remedy)
    if config.device == "cuda" and not config.dry_run:
        import torch  # only a run that asks for a GPU pays for it here

        if not torch.cuda.is_available():
            raise UserError("torch finds no CUDA device", where="device", remedy="use --device cpu")
    if config.rollout.backend == "vllm" and not config.dry_run and any(_samples(config, s) for s in config.stages):
        from autotool_fast.rollout.vllm import check_server

        check_server(config)
    if not config.resume:
        _check_inputs(config)
    if config.base.reuse and "base" in config.stages:
        source = Path(config.base.reuse)
        if not (source / "config.json").exists():
            raise UserError("holds no model", where=f"base.reuse ({source})", remedy="name a models/base folder")
        if config.overwrite and Path(config.out).resolve() in source.resolve().parents:
            remedy = "choose another folder with --out"
            raise UserError("is inside the run that --overwrite removes", where=f"base.reuse ({source})", remedy=remedy)


def _check_model(path: str) -> None:
    """What is not a folder must be able to be a hub name; a folder holds the settings of a model and a tokenizer."""
    where = f"model.path ({path})"
    folder = Path(path)
    if not path:
        return
    if not folder.is_dir():
        if folder.exists() or not _HUB_NAME.fullmatch(path):
            raise UserError("is no folder and no hub name", where=where, remedy="give a model folder, or OWNER/NAME")
        return
    remedy = "give the folder of a whole Hugging Face model"
    if not (folder / "config.json").is_file():
        raise UserError("holds no config.json", where=where, remedy=remedy)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError("holds no tokenizer", where=where, remedy=remedy)


def _samples(config: TrainConfig, stage: Stage) -> bool:
    """Whether a stage has rollouts."""
    return stage == "eval" or stage_tokens(config, stage) > 0


def _check_inputs(config: TrainConfig) -> None:
    """Every stage of a new run finds what it reads: the models and files of stages that run before it."""
    cold = config.start == "cold"
    start: Stage = "base" if cold else "warmup"
    needs: dict[Stage, tuple[Stage, ...]] = {
        "label": ("base",),
        "warmup": () if cold else ("base", "label"),
        "distill": ("base", "label"),
        "refine": (start,) if config.refine.enabled else (),
        "rl": (start, "refine") if config.refine.enabled else (start,),
    }
    have = {"base"} if config.model.path else set()
    for stage in config.stages:
        for needed in needs.get(stage, ()):
            if needed not in config.stages and needed not in have:
                remedy = "add it to --stages, or --resume a run that has it"
                raise UserError(f"stage {stage} of a new run needs stage {needed}", where="stages", remedy=remedy)
    if config.stages == ("eval",) and not have:
        remedy = "add stages that train one, or --resume a run that has one"
        raise UserError("stage eval of a new run has no model to evaluate", where="stages", remedy=remedy)


def describe(config: TrainConfig) -> str:
    """The resolved plan: run folder, model size, arm, and each stage's steps, sequences and token budget."""
    model, world = config.model, config.world
    embedded = (
        f"Qwen3, {model.layers} layers of {model.hidden}, at most {model.parameters(VOCAB_ESTIMATE):,} parameters"
    )
    sources = [("data", config.data.path)] if config.data.path else []
    if config.environment.kind != "none":
        sources.append(("environment", _environment_text(config)))
    if not sources:
        note = " (no --data given)" if model.path else ""
        families = ", ".join(world.families)
        sources.append(("world", f"{families}; difficulty 0-{world.max_difficulty}{note}"))
    adapter = f", adapters of rank {config.lora.rank}" if config.lora.rank else ""
    rows = [
        ("preset", config.preset),
        ("run folder", f"{config.out}{_folder_note(config)}"),
        ("seed", str(config.seed)),
        ("arm", f"{config.arm}, {config.start} start"),
        *sources,
        ("model", f"{model.path}, {model.dtype}{adapter}" if model.path else embedded),
        *([("memory", memory.describe(config))] if model.path else []),
        *([("rollouts", _server_text(config))] if config.rollout.backend == "vllm" else []),
        *((f"stage {stage}", stage_summary(config, stage)) for stage in config.stages),
    ]
    sampled = sum(stage_tokens(config, stage) for stage in config.stages)
    rows.append(("token budget", f"at most {sampled:,} sampled tokens before evaluation"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


@functools.lru_cache(maxsize=1)
def inspect_tools(config: EnvironmentConfig) -> str:
    """A line about the user's tools and problems, which are loaded and checked; see `own_tools.inspect`."""
    from autotool_fast import own_tools

    return own_tools.inspect(config)


def _environment_text(config: TrainConfig) -> str:
    chosen = config.environment
    if chosen.kind == "tools":
        files = f"{chosen.tools} with {chosen.problems}"
        return f"{files}: {inspect_tools(chosen)}; {chosen.share:.0%} of the RL prompts"
    where = chosen.path or "the installed package"
    return f"{chosen.kind} in {where}: {', '.join(chosen.categories)}; {chosen.share:.0%} of the RL prompts"


def _server_text(config: TrainConfig) -> str:
    chosen = config.rollout
    way = "through the run folder" if chosen.sync == "folder" else "over NCCL"
    return f"vLLM at {chosen.server}, {chosen.slots} requests at once, weights {way}"


def stage_summary(config: TrainConfig, stage: Stage) -> str:
    """One line on what a stage does, with its counts."""
    label, refine, rl = config.label, config.refine, config.rl
    if stage in ("base", "warmup", "distill"):
        sft = {"base": config.base, "warmup": config.warmup, "distill": config.distill}[stage]
        if stage == "warmup" and config.start == "cold":
            return "none: a cold start skips the warm-up"
        if stage == "base" and config.model.path:
            return "none: the model is pretrained"
        if stage == "base" and config.base.reuse:
            return f"none: the model in {config.base.reuse} is taken over"
        steps = config.distill_steps if stage == "distill" else sft.steps
        return f"{steps:,} steps of {sft.batch} sequences, lr {sft.lr:g}"
    if stage == "label":
        rule = f"threshold {label.threshold:g}" if config.label_rule == "threshold" else "any"
        return f"{label.prompts:,} prompts, {label.k} samples each and mode, rule {rule}"
    if stage == "refine":
        if not refine.enabled:
            return f"off: all {refine.prompts:,} prompts are used"
        return f"{refine.prompts:,} prompts, {refine.rounds} rounds of {rl.group_size} responses"
    if stage == "rl":
        batch = f"{rl.prompts_per_step} prompts, {rl.group_size} responses each"
        return f"{rl.steps:,} steps of {batch}, lr {rl.lr:g}"
    return f"{config.eval.per_cell} held-out tasks per family and difficulty, modes auto, think, no_think"


def stage_tokens(config: TrainConfig, stage: Stage) -> int:
    """Upper bound of the tokens a training stage samples (episodes times `rollout.max_new_tokens`)."""
    refine, rl = config.refine, config.rl
    episodes = {
        "label": config.label.prompts * config.label.k * 2,  # both modes
        "refine": refine.enabled * refine.prompts * refine.rounds * rl.group_size,
        "rl": rl.steps * rl.prompts_per_step * rl.group_size,
    }
    return episodes.get(stage, 0) * config.rollout.max_new_tokens


def _folder_note(config: TrainConfig) -> str:
    return " (resumed)" if config.resume else " (overwritten)" if config.overwrite else ""
