"""The stages of a run, in order, and what each leaves in the run folder for the next.

    base     -> models/base
    label    -> labels.jsonl            counts, label and both demonstrations of every prompt
    warmup   -> models/warmup
    distill  -> models/distilled
    refine   -> refined.json            indices kept out of the RL prompt pool, and why the rest is not
    rl       -> models/rl, transcripts.jsonl
    eval     -> results.json, transcripts.jsonl

Every random choice is a function of (seed, stage, step), so a stage gives the same result alone, together with others
or after a stop. Stage label is in `label_stage`, what a step of RL does in `rl`, of SFT in `warmup`, the loop around
them in `loop`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from autotool_fast import distributed, files, loading
from autotool_fast.config import Stage, TrainConfig
from autotool_fast.errors import UserError
from autotool_fast.evaluate import ACU_UNIT, ALL_MODES, evaluate, regret
from autotool_fast.label_stage import label_prompts
from autotool_fast.loop import (
    Context,
    Interrupted,
    StageState,
    StepResult,
    StopFlag,
    open_metrics,
    run_steps,
)
from autotool_fast.metrics import Progress
from autotool_fast.pipeline import Pipeline, load_model
from autotool_fast.profiling import Profiler
from autotool_fast.refine import refine
from autotool_fast.rl import PolicyTrainer, policy_optimizers, reward_table
from autotool_fast.rollout.records import Trajectory
from autotool_fast.runs import RunFolder
from autotool_fast.tasks.record import Task
from autotool_fast.tasks.rendering import solution
from autotool_fast.tasks.tiny import build_model
from autotool_fast.transcripts import Transcripts, one_per_cell, rewards_of
from autotool_fast.warmup import Demonstration, demonstrate


def base(p: Pipeline) -> dict[str, Any]:
    """Train the tiny model from scratch, or take over the one `base.reuse` names; a pretrained one is used as it is."""
    if p.config.model.path:
        return {"pretrained": p.config.model.path}
    config = p.config.base
    if config.reuse:
        p.save(_reused(Path(config.reuse), p), "base")
        return {"reused": config.reuse}
    model = build_model(p.config.model, p.tokenizer, p.config.seed).to(p.device)

    def batch(step: int) -> list[Demonstration]:
        rng = np.random.default_rng([p.config.seed, step])
        seed, progress = f"{p.config.seed}/base/{step}", step / config.steps
        tasks = p.problems.world.draw(config.batch, "train", seed, config.easy_share, progress=progress)
        return [demonstrate(task, solution(task, think=rng.random() < 0.5), p.chat) for task in tasks]

    p.sft("base", model, config, batch, matrix=config.optimizer)
    return {"parameters": model.num_parameters()}


def _reused(source: Path, p: Pipeline) -> PreTrainedModel:
    where = f"base.reuse ({source})"
    try:
        model = load_model(source)
        tokenizer = loading.read_tokenizer(source, local=True)
    except (UserError, loading.Unusable) as error:
        reason = error.what if isinstance(error, UserError) else "holds no tokenizer"
        raise UserError(reason, where=where, remedy="name a models/base folder") from error
    if tokenizer.get_vocab() != p.tokenizer.get_vocab():
        raise UserError("has another vocabulary", where=where, remedy="train the base anew")
    return model


def _write_json(path: Path, value: Any) -> None:
    distributed.on_main(lambda: files.write_json(path, value))


def _read_labels(p: Pipeline) -> list[dict[str, Any]]:
    path = p.run.path / "labels.jsonl"
    if not path.exists():
        raise UserError("is missing", where=str(path), remedy="run stage label first")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _demo(values: dict[str, list[int]]) -> Demonstration:
    return Demonstration(np.array(values["ids"], np.int32), np.array(values["trained"], bool))


def epochs(count: int, size: int, step: int, seed: Sequence[int]) -> list[int]:
    """Indices of batch `step` when `count` items are passed through in shuffled epochs, `size` at a time."""
    chosen = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, count)
        chosen.append(int(np.random.default_rng([*seed, epoch]).permutation(count)[place]))
    return chosen


def warmup(p: Pipeline) -> dict[str, Any]:
    """SFT on short answers where they are good enough and long traces where not; a cold start skips it."""
    if p.config.start == "cold":
        return {"skipped": "cold start"}
    demos = [_demo(row[row["label"]]) for row in _read_labels(p) if row["label"] != "drop"]
    if not demos:
        raise UserError("no prompt has a usable label", where="label", remedy="train the base model for longer")
    config = p.config.warmup
    p.sft(
        "warmup",
        p.trainable("base"),
        config,
        lambda step: [demos[i] for i in epochs(len(demos), config.batch, step, (p.config.seed, 1))],
    )
    return {"demonstrations": len(demos)}


def distill(p: Pipeline) -> dict[str, Any]:
    """The always-think baseline: SFT on long traces alone, with as many updates as warm-up and RL together."""
    demos = [_demo(row["long"]) for row in _read_labels(p) if row["long"] is not None]
    if not demos:
        raise UserError("no prompt was solved by thinking", where="label", remedy="train the base model for longer")
    config = p.config.distill
    steps = p.config.distill_steps
    p.sft(
        "distill",
        p.trainable("base"),
        config,
        lambda step: [demos[i] for i in epochs(len(demos), config.batch, step, (p.config.seed, 2))],
        steps=steps,
    )
    return {"demonstrations": len(demos), "steps": steps}


def _start_model(p: Pipeline) -> PreTrainedModel:
    return p.trainable("base" if p.config.start == "cold" else "warmup")


def refine_prompts(p: Pipeline) -> dict[str, Any]:
    """Measure every prompt of the pool over a few GRPO rounds, then choose; the trained copy is thrown away."""
    config, rl = p.config.refine, p.config.rl
    pool = p.problems.training(config.prompts, "rl")
    if not config.enabled:
        _write_json(p.run.path / "refined.json", {"kept": list(range(len(pool))), "report": {}})
        return {"kept": len(pool), "pool": len(pool)}
    model = _start_model(p)
    state = StageState(model, p.tokenizer, policy_optimizers(p.config, model))
    trainer = PolicyTrainer(p.config, state, p.engine(model), p.chat, p.context.timer)
    trainer.start_controller(pool[: rl.prompts_per_step])
    size = rl.prompts_per_step
    batches = -(-len(pool) // size)
    rewards, success = np.zeros((len(pool), config.rounds)), np.zeros((len(pool), config.rounds))
    state.extra |= {"rewards": rewards.tolist(), "success": success.tolist()}

    def step(index: int) -> StepResult:
        turn, part = divmod(index, batches)
        order = np.random.default_rng([p.config.seed, 3, turn]).permutation(len(pool))
        chosen = order[part * size : (part + 1) * size]
        # Steps before -1 are streams of random numbers that the RL stage never uses.
        result = trainer.step([pool[i] for i in chosen], -2 - index, updates=index)
        for place, i in enumerate(chosen):
            mine = slice(place * rl.group_size, (place + 1) * rl.group_size)
            state.extra["rewards"][i][turn] = float(np.mean(trainer.last_rewards[mine]))
            state.extra["success"][i][turn] = float(np.mean([t.correct for t in trainer.last[mine]]))
        return result

    run_steps(
        p.context,
        "refine",
        state,
        config.rounds * batches,
        step,
        shown=("reward/mean",),
        checkpoint_every=rl.checkpoint_every,
    )
    result = refine(
        state.extra["rewards"],
        np.mean(state.extra["success"], axis=1),
        [task.difficulty for task in pool],
        seed=p.config.seed,
        drop_easy=config.drop_easy,
        drop_hard=config.drop_hard,
        keep=config.keep,
        rank=config.rank,
    )
    _write_json(p.run.path / "refined.json", {"kept": result.kept.tolist(), "report": result.report})
    return {"kept": len(result.kept), **result.report}


def _rl_prompts(p: Pipeline) -> list[Task]:
    pool = p.problems.training(p.config.refine.prompts, "rl")
    path = p.run.path / "refined.json"
    if not path.exists():
        if p.config.refine.enabled:
            raise UserError("is missing", where=str(path), remedy="run stage refine first")
        return pool
    kept = json.loads(path.read_text(encoding="utf-8"))["kept"]
    if not kept:
        remedy = "lower refine.drop_easy and refine.drop_hard, or raise refine.prompts"
        raise UserError("refinement kept no prompt", where="refine", remedy=remedy)
    return [pool[i] for i in kept]


def rl(p: Pipeline) -> dict[str, Any]:
    """GRPO with the entropy arm of the run."""
    config = p.config.rl
    prompts = _rl_prompts(p)
    model = _start_model(p)
    state = StageState(model, p.tokenizer, policy_optimizers(p.config, model))
    engine = p.engine(model)
    trainer = PolicyTrainer(p.config, state, engine, p.chat, p.context.timer)
    held_out = p.problems.held_out(p.config.eval.interim_per_cell, "interim")
    transcripts = Transcripts(p.run.path / "transcripts.jsonl", p.chat)

    def batch(index: int) -> list[Task]:
        return [prompts[i] for i in epochs(len(prompts), config.prompts_per_step, index, (p.config.seed, 4))]

    def step(index: int) -> StepResult:
        trainer.start_controller(batch(0))
        return trainer.step(batch(index), index)

    def after(done: int) -> dict[str, float]:
        if not config.eval_every or (done % config.eval_every and done != config.steps):
            return {}
        first = slice(0, 4 * config.group_size, config.group_size)
        distributed.on_main(lambda: transcripts.replace("rl", done, trainer.last[first], trainer.last_rewards[first]))
        with p.context.timer.phase("eval"):
            result = evaluate(engine, p.chat, held_out, p.weights, limits=p.limits, modes=("auto",))["auto"]
        metrics = {f"eval/{name}": result["overall"][name] for name in ("accuracy", "think_rate", "tokens")}
        for name, values in result["bands"].items():
            metrics |= {
                f"eval/acc/{name}": values["accuracy"],
                f"eval/think_rate/{name}": values["think_rate"],
            }
        return metrics

    run_steps(
        p.context,
        "rl",
        state,
        config.steps,
        step,
        shown=(
            "reward/mean",
            "acc/hard",
            "think_rate/hard",
            "think_rate/easy",
            "tokens/response",
            "beta/long",
        ),
        checkpoint_every=config.checkpoint_every,
        after=after,
    )
    p.save(model, "rl")
    return {"prompts": len(prompts), "controller": state.extra["controller"] if state.extra else None}


def eval_models(p: Pipeline) -> dict[str, Any]:
    """Every model of the run in every mode on the held-out grid; writes results.json."""
    config, progress = p.config.eval, p.context.progress
    tasks = p.problems.held_out(config.per_cell, "eval")
    names = distributed.on_main(p.models)
    if not names:
        raise UserError(
            "there is no model to evaluate", where=str(p.run.path / "models"), remedy="run stage base first"
        )
    transcripts = Transcripts(p.run.path / "transcripts.jsonl", p.chat)
    table = reward_table(p.config.rl)
    progress.start("eval", len(names))
    models = {}
    for number, name in enumerate(names, 1):

        def keep(mode: str, trajectories: list[Trajectory], name: str = name) -> None:
            p.context.stop.check()
            if name == names[-1] and mode == "auto":
                shown = one_per_cell(trajectories)
                distributed.on_main(lambda: transcripts.replace("eval", 0, shown, rewards_of(shown, table)))

        engine = p.engine(p.load(name))
        with p.context.timer.phase("eval"):
            models[name] = evaluate(
                engine,
                p.chat,
                tasks,
                p.weights,
                limits=p.limits,
                modes=ALL_MODES,
                temperature=config.temperature,
                seed=p.config.seed,
                on_mode=keep,
            )
        progress.update(number, {f"{name} accuracy": models[name]["auto"]["overall"]["accuracy"]})
    progress.finish()
    results = {
        "models": models,
        "routing_regret": {name: regret(modes, p.weights, table) for name, modes in models.items()},
        "acu_unit": ACU_UNIT,
        "per_cell": config.per_cell,
        "easy_share": p.config.world.easy_share,
        "vocabulary": len(p.tokenizer),
    }
    _write_json(p.run.path / "results.json", results)
    return {name: values["auto"]["overall"] for name, values in models.items()}


def is_done(p: Pipeline, stage: Stage) -> bool:
    """Whether a stage needs not run (again). Models that came after an evaluation call for another one."""
    if stage != "eval" or not p.run.is_finished(stage):
        return p.run.is_finished(stage)
    return set(p.run.summary("eval")) == set(p.models())


STAGES: dict[Stage, Callable[[Pipeline], dict[str, Any]]] = {
    "base": base,
    "label": label_prompts,
    "warmup": warmup,
    "distill": distill,
    "refine": refine_prompts,
    "rl": rl,
    "eval": eval_models,
}


@contextmanager
def open_context(config: TrainConfig, run: RunFolder) -> Iterator[Context]:
    """Metrics and progress of a run, with Ctrl-C, SIGTERM, SIGHUP and a failing disk handled.

    Raises:
        UserError: a file cannot be read or written, or the model has diverged.
    """
    with Progress() as progress:
        try:
            metrics = open_metrics(run, lambda row: True)
            context = Context(config, run, metrics, progress, StopFlag())
            if config.profile and distributed.is_main():
                context.profiler = Profiler(context.timer, run.path / "profile", config.profile_steps, config.device)
            try:
                with context.stop.installed(progress.say), context.timer.current():
                    yield context
            finally:
                with suppress(OSError):  # what a full disk refused was reported when it was written
                    context.metrics.close()
        except (OSError, SafetensorError) as error:
            if isinstance(error, OSError) and not error.strerror:
                raise
            where = str(getattr(error, "filename", None) or run.path)
            reason = getattr(error, "strerror", None) or error
            remedy = "free some space or check the permissions, then repeat the command with --resume"
            raise UserError(f"cannot be read or written ({reason})", where=where, remedy=remedy) from error
        except FloatingPointError as error:
            remedy = "start a new run with a lower learning rate"
            raise UserError(str(error), where=str(run.path), remedy=remedy) from error


def run_stages(config: TrainConfig, run: RunFolder) -> int:
    """Run the configured stages in an open run folder.

    Returns:
        The exit code: 0, or that of a stop: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.

    Raises:
        UserError: what the user can fix; finished stages and checkpoints stay.
    """
    from autotool_fast.report import write_report
    from autotool_fast.summary import print_summary

    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with open_context(config, run) as context:
        try:
            with closing(Pipeline(context)) as pipeline:
                for stage in config.stages:
                    if distributed.on_main(partial(is_done, pipeline, stage)):
                        context.progress.say(f"{stage}: finished before")
                        continue
                    context.stop.check()
                    with context.profiler.stage(stage) if context.profiler else nullcontext():
                        summary = STAGES[stage](pipeline)
                    distributed.on_main(partial(run.finish_stage, stage, summary))
        except Interrupted:
            context.progress.finish()
            flag = "--resume in place of --overwrite" if config.overwrite else "--resume"
            context.progress.say(f"interrupted; saved in {run.path}, repeat the command with {flag} to continue")
            distributed.on_main(lambda: write_report(run.path))
            return max(distributed.gather(context.stop.exit_code))
        report = distributed.on_main(lambda: write_report(run.path))
    print_summary(run.path, report)
    if context.profiler:
        print(context.profiler.text())
    return 0
