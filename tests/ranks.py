"""What tests/test_distributed.py does in one process and in several, to compare.

    torchrun --nproc_per_node=2 tests/ranks.py FOLDER CASE...

A case is a function of (monkeypatch, folder) that returns named tensors and plain values; they should be the same on
every rank and whatever the number of ranks. Those of each rank are saved as FOLDER/<case>-<rank>-of-<ranks>.pt.
`broken` in place of cases is a training run in which rank 1 fails while the others wait for it.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_rl import GROUP, HOP, LONG, MALFORMED, MIXED, SET, SHORT, TASKS, WRONG_LONG, Setting, whole

import autotool_fast.rl as rl_module
from autotool_fast import adapters, checkpoint, distributed
from autotool_fast.config import LoraConfig
from autotool_fast.errors import Interrupted, UserError
from autotool_fast.evaluate import cell_weights, evaluate
from autotool_fast.loop import Context, StageState, StopFlag, make_optimizers, open_metrics, run_steps
from autotool_fast.metrics import Progress
from autotool_fast.policy import packed_logp_entropy, recompute_activations
from autotool_fast.rl import rollout_limits
from autotool_fast.rollout.ranks import rollout_over_ranks
from autotool_fast.runs import RunFolder
from autotool_fast.tasks.rendering import solution
from autotool_fast.tasks.tiny import build_model
from autotool_fast.tasks.world import World
from autotool_fast.train import main
from autotool_fast.warmup import demonstrate, sft_backward

Result = dict[str, Any]
FIVE_TASKS = [*TASKS, SET, HOP]
FIVE_KINDS = [*MIXED, [LONG] * GROUP, [MALFORMED, LONG, WRONG_LONG, SHORT]]
CONSTANT = [[SHORT] * GROUP, [LONG] * GROUP, [MALFORMED] * GROUP]
OPEN_GATE = {"target_long": 10.0}  # so that the entropy term takes part


def step_of(setting: Setting, tasks=FIVE_TASKS, kinds=FIVE_KINDS) -> Result:
    """One RL step: what it reports and what it leaves."""
    result = setting.step(tasks, kinds)
    return {
        "metrics": result.metrics,
        "finite": result.finite,
        "gradient": setting.gradient,
        "weights": setting.weights(),
        "controller": setting.state.extra["controller"],
        "rewards": setting.trainer.last_rewards,
        "ids": [t.ids.tolist() for t in setting.trainer.last],
        "tasks": [(t.task.id, t.group, t.sample) for t in setting.trainer.last],
    }


def tied(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """Five groups, several micro-batches."""
    return step_of(Setting(patch, rl={"micro_tokens": 150, **OPEN_GATE}))


def untied(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """A head of its own."""
    return step_of(Setting(patch, tied=False, rl={"micro_tokens": 150, **OPEN_GATE}))


def double(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """A float64 model."""
    return step_of(Setting(patch, dtype=torch.float64, rl=OPEN_GATE))


def low(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """A bfloat16 model."""
    return step_of(Setting(patch, dtype=torch.bfloat16, rl=OPEN_GATE))


def recomputed(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """Activations are computed again in the backward pass."""
    return step_of(Setting(patch, rl=OPEN_GATE, prepare=recompute_activations))


def adapter(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """An adapter beside frozen weights."""
    return step_of(Setting(patch, rl=OPEN_GATE, prepare=partial(adapters.add, config=LoraConfig(rank=2), seed=0)))


def low_adapter(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """An adapter beside frozen bfloat16 weights."""
    add = partial(adapters.add, config=LoraConfig(rank=2), seed=0)
    return step_of(Setting(patch, dtype=torch.bfloat16, rl=OPEN_GATE, prepare=add))


def scoped(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """The other normaliser, constant groups left out, entropy of the mode tag."""
    rl = {"entropy_scope": "mode", "normalize": "sequences", "constant_groups": "exclude", **OPEN_GATE}
    return step_of(Setting(patch, rl=rl))


def two_sequences(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """Fewer groups than ranks, and with four ranks fewer sequences."""
    return step_of(Setting(patch, rl={"group_size": 2, **OPEN_GATE}), [HOP], [[SHORT, LONG]])


def constant(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """No group has a reward difference, and nothing else pulls."""
    return step_of(Setting(patch, arm="none"), TASKS, CONSTANT)


def relative(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """Targets measured on a first rollout."""
    setting = Setting(patch, rl={"target_mode": "relative", "target_ratio": 0.5})
    setting.write(FIVE_TASKS, FIVE_KINDS, step=-1)
    return step_of(setting)


def poisoned(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """A gradient that is not finite, on one rank alone."""
    setting = Setting(patch, rl=OPEN_GATE)
    setting.step(FIVE_TASKS, FIVE_KINDS)
    before, extra = setting.weights(), dict(setting.state.extra)

    def broken(*args, **options):
        logp, entropy = packed_logp_entropy(*args, **options)
        logp.register_hook(lambda gradient: gradient * float("nan"))
        return logp, entropy

    if distributed.rank() == distributed.world() - 1:
        patch.setattr(rl_module, "packed_logp_entropy", broken)
    setting.write(FIVE_TASKS, FIVE_KINDS, 1)
    result = setting.trainer.step(FIVE_TASKS, 1)
    moved = [name for name, p in setting.weights().items() if not torch.equal(p, before[name])]
    return {"finite": result.finite, "moved": moved, "controller_moved": setting.state.extra != extra}


def sft(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """One supervised step on five demonstrations, in float64; then one of Muon in float32."""
    world = World(("set", "hop"), 4)
    tasks = [world.task("hop", 1 + k % 4, "train", str(k)) for k in range(5)]
    found: Result = {}
    for name, dtype, matrix in (("adamw", torch.float64, "adamw"), ("muon", torch.float32, "muon")):
        setting = Setting(patch)
        model = build_model(setting.config.model, setting.chat.tokenizer, 0).to(dtype)
        demos = [demonstrate(task, solution(task, think=True), setting.chat) for task in tasks]
        optimizers = make_optimizers(model, lr=1e-2, weight_decay=0.1, matrix=matrix)
        loss = sft_backward(optimizers.trained, demos, micro_tokens=100)
        gradient = [whole(p.grad).clone() for p in optimizers.trained.parameters()]
        norm, _ = optimizers.step(0.1)
        weights = [p.detach().clone() for p in model.parameters()]
        found[name] = {"loss": loss, "gradient": gradient, "norm": norm, "weights": weights}
    return found


def low_bit(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """Six supervised steps with 8-bit moments, in one go and over a checkpoint after the third."""
    setting = Setting(patch)
    sizes = dataclasses.replace(setting.config.model, layers=2, hidden=128, intermediate=128)
    world = World(("set", "hop"), 4)
    demos = [
        demonstrate(task, solution(task, think=True), setting.chat)
        for task in (world.task("hop", 1 + k % 4, "train", str(k)) for k in range(5))
    ]

    def start() -> StageState:
        model = build_model(sizes, setting.chat.tokenizer, 0)
        optimizers = make_optimizers(model, lr=3e-3, weight_decay=0.01, kind="adamw-8bit")
        return StageState(model, setting.chat.tokenizer, optimizers)

    def train(state: StageState, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(sft_backward(state.trained, demos))
            assert state.optimizers.step(1.0)[1]
        return losses

    state = start()
    losses = train(state, 3)
    tensors, rest = state.optimizers.pack()
    where = folder / f"low-bit-{distributed.world()}"
    values = {"optimizers": rest}
    saved = checkpoint.save(where, 3, model=state.model, tokenizer=state.tokenizer, tensors=tensors, state=values)
    again = start()
    saved.load_weights(again.model)
    again.optimizers.unpack(saved.tensors(again.optimizers.mesh), saved.state()["optimizers"])
    losses += train(state, 3)
    kinds = {
        type(moment.to_local() if hasattr(moment, "to_local") else moment).__name__
        for moments in state.optimizers.members[0].state.values()
        for name, moment in moments.items()
        if name != "step"
    }
    return {
        "losses": losses,
        "same losses": train(again, 3) == losses[3:],
        "same weights": all(map(torch.equal, state.model.parameters(), again.model.parameters())),
        "kinds": sorted(kinds),
    }


def sampled(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """Free sampling from an untrained model, and an evaluation."""
    setting = Setting(patch)
    patch.undo()  # it samples for itself
    world = World(("set", "hop"), 4)
    tasks = [world.task("hop", 1 + k % 4, "train", str(k)) for k in range(5)]
    limits = rollout_limits(setting.config.rollout)
    seen = []
    trajectories = rollout_over_ranks(
        setting.engine,
        tasks,
        chat=setting.chat,
        group_size=2,
        seed=3,
        step=1,
        limits=limits,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    weights = cell_weights(world, 0.5)
    result = evaluate(setting.engine, setting.chat, tasks, weights, limits=limits, modes=("auto", "think"))
    return {
        "ids": [t.ids.tolist() for t in trajectories],
        "of": [(t.task.id, t.group, t.sample) for t in trajectories],
        "last_progress": seen[-1],
        "result": result,
    }


def interrupted_sampling(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """One rank is told to stop in the middle of its share."""
    setting = Setting(patch)
    setting.write(FIVE_TASKS, FIVE_KINDS)

    def stop(done: int, total: int) -> None:
        if distributed.rank() == distributed.world() - 1:
            raise Interrupted

    try:
        rollout_over_ranks(
            setting.engine, FIVE_TASKS, chat=setting.chat, group_size=GROUP, seed=0, step=0, on_progress=stop
        )
    except Interrupted:
        return {"stopped": True}
    return {"stopped": False}


def stages_of(patch: pytest.MonkeyPatch, out: Path, dtype: torch.dtype, stop_after: int = -1, **options) -> Result:
    """A stage of three steps; `stop_after` is the step during which the last rank alone hears of a Ctrl-C."""
    Setting.script.clear()
    setting = Setting(patch, dtype=dtype, out=str(out), **options)
    for number in range(3):
        setting.write(TASKS, MIXED, number)
    setting.trainer.start_controller(TASKS)
    run = RunFolder.create(setting.config) if distributed.is_main() else RunFolder(out)
    distributed.barrier()
    done = []
    with run, Progress() as progress:
        context = Context(setting.config, run, open_metrics(run, lambda row: True), progress, StopFlag())

        def step(index: int):
            done.append(index)
            last = distributed.rank() == distributed.world() - 1
            context.stop.signal = signal.SIGINT if last and index == stop_after else None
            return setting.trainer.step(TASKS, index)

        try:
            run_steps(context, "rl", setting.state, 3, step, shown=())
        except Interrupted:
            done.append("stopped")
        context.metrics.close()
    distributed.barrier()
    return {"steps": done, "weights": setting.weights(), "controller": setting.state.extra["controller"]}


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def saved(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """A stage that is stopped in its second step; its checkpoint stays in FOLDER/from<ranks>-<dtype>."""
    begun = f"from{distributed.world()}-"
    return {name: stages_of(patch, folder / (begun + name), dtype, stop_after=1) for name, dtype in DTYPES.items()}


def continued(patch: pytest.MonkeyPatch, folder: Path) -> Result:
    """Stages stopped by another number of ranks, to their ends."""
    begun = distributed.on_main(lambda: sorted(path.name for path in folder.glob("from*")))
    return {
        name: stages_of(patch, folder / name, DTYPES[name.partition("-")[2]], resume=True)
        for name in begun
        if not name.startswith(f"from{distributed.world()}-")
    }


CASES = {
    case.__name__: case
    for case in (
        tied,
        untied,
        double,
        low,
        recomputed,
        adapter,
        low_adapter,
        scoped,
        two_sequences,
        constant,
        relative,
        poisoned,
        sft,
        low_bit,
        sampled,
        interrupted_sampling,
        saved,
        continued,
    )
}


def perform(case: str, folder: Path) -> Result:
    """The results of one case."""
    Setting.script.clear()
    with pytest.MonkeyPatch.context() as patch:
        return CASES[case](patch, folder)


def broken(folder: Path) -> int:
    """A run in which rank 1 fails."""
    from autotool_fast import stages

    def base(pipeline: Any) -> dict:
        if distributed.rank() == 1:
            raise UserError("is on fire", where="this rank", remedy="call the fire brigade")
        distributed.barrier()
        return {}

    stages.STAGES["base"] = base
    return main(["--out", str(folder / "broken"), "--overwrite", "--stages", "base"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    if sys.argv[2] == "broken":
        sys.exit(broken(target))
    distributed.silence()
    try:
        with distributed.processes("cpu"):
            for chosen in sys.argv[2:]:
                part = f"{chosen}-{distributed.rank()}-of-{distributed.world()}.pt"
                torch.save(perform(chosen, target), target / part)
        distributed.leave(0)
    except Exception:
        import traceback

        distributed.fail(traceback.format_exc(), 1)
