"""The loop under every training stage: steps, metrics, checkpoints, interruption.

Guarantees: Ctrl-C, SIGTERM and SIGHUP take effect between two steps, after a checkpoint; a resumed stage continues from
its newest verified checkpoint as if it had not stopped; one whose step fails (a server that stopped answering) saves
the steps before it; a step whose loss or gradient is not finite changes nothing, its batch is kept, and three in a row
end the run. What a step does, and saving the finished model, is the stage's business.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from autotool_fast import checkpoint, distributed, files
from autotool_fast.alarms import Monitor
from autotool_fast.config import OptimizerKind, Stage, TrainConfig
from autotool_fast.errors import Interrupted, UserError
from autotool_fast.metrics import MetricsWriter, Progress, Row, Timer, read_rows
from autotool_fast.runs import RunFolder, versions

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from autotool_fast.profiling import Profiler

MAX_SKIPPED = 3
BETAS = (0.9, 0.95)


class StopFlag:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a flag that loops read between steps; a second one interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The signal that asked for a stop."""

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a process that was stopped by it exits with: 130, or 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + (self.signal or signal.SIGINT)

    @contextmanager
    def installed(self, notify: Callable[[str], None]) -> Iterator[StopFlag]:
        """Handle SIGINT, SIGTERM and SIGHUP inside the block; the earlier handlers come back after it.

        SIGHUP, a terminal that goes away, stays ignored where it was (nohup).

        Raises:
            KeyboardInterrupt: for a second signal, whose number is its argument.
        """

        def handle(signum: int, frame: object) -> None:
            if self.requested:
                if signum == signal.SIGHUP or (signum == signal.SIGTERM and distributed.world() > 1):
                    return  # a shell and the terminal both tell; a scheduler tells the ranks, and so does torchrun
                raise KeyboardInterrupt(signum)
            self.signal = signum
            told, again = ("", "press Ctrl-C again") if signum == signal.SIGINT else ("told to end: ", "signal again")
            # The signal may arrive inside a write to the same stream, which refuses to be entered twice.
            with suppress(RuntimeError):
                notify(f"{told}stopping at the next safe point; {again} to stop at once")

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Interrupted` when a stop was asked for, of any rank. Every rank must call it."""
        if distributed.any_rank(self.requested):
            raise Interrupted


@dataclass
class Context:
    """What every stage of a run shares."""

    config: TrainConfig
    run: RunFolder
    metrics: MetricsWriter
    progress: Progress
    stop: StopFlag
    timer: Timer = field(default_factory=Timer)
    profiler: Profiler | None = None


class Optimizers:
    """One or several torch optimizers over disjoint parameters, stepped together.

    Parameters in low precision are updated through float32 copies, which also sum their gradients over micro-batches:
    a relative change below 2^-9 would be lost in bfloat16, and updates are smaller. Offloaded, every parameter has
    such a copy in the machine's memory, where gradients are summed and moments kept: each micro-batch sends its
    gradients there, each step the weights back.

    Args:
        model: its parameters are split by shape; kept as `trained`.
        lr: peak learning rate.
        weight_decay: decoupled.
        matrix: "adamw" for AdamW on everything, "muon" for Muon on the decoder's weight matrices and AdamW on the rest
            (embeddings, norms). Muon's update is scaled to AdamW's root mean square, so one `lr` serves both.
        kind: AdamW's moments: "adamw" in float32, "adamw-8bit" in 8 bits (see `lowbit`), "offload" off the device.
    """

    mesh: DeviceMesh | None = None
    """The ranks that share the state out, if it is sharded."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        lr: float,
        weight_decay: float,
        matrix: str = "adamw",
        kind: OptimizerKind = "adamw",
    ) -> None:
        self.trained, self.kind = model, kind
        self.updates = 0  # begun by this object
        self._copies: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []  # (parameter, its float32 copy)
        named = [(name, self._held(p)) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
        if matrix == "adamw":
            matrices = []
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        self.parameters = [p for _, p in named]
        self.lr = lr
        self.members: list[torch.optim.Optimizer] = [self._adamw(rest, lr, weight_decay)]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.members.append(muon)

    def _adamw(self, parameters: list[torch.nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        if self.kind == "adamw-8bit":
            from autotool_fast.lowbit import adamw_8bit

            return adamw_8bit(parameters, lr=lr, betas=BETAS, weight_decay=weight_decay)
        fused = True if self.kind == "offload" else None  # on a CPU much faster than the default
        return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=weight_decay, fused=fused)

    def _held(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        """What the optimizer holds for a parameter: itself, or a copy that takes over its gradients."""
        full = parameter.dtype in (torch.float32, torch.float64)
        if full and self.kind != "offload":
            return parameter
        device = "cpu" if self.kind == "offload" else parameter.device
        dtype = parameter.dtype if full else torch.float32
        copy = torch.nn.Parameter(parameter.detach().to(device, dtype, copy=True))

        def take(parameter: torch.nn.Parameter) -> None:
            gradient = parameter.grad.to(copy)
            copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(take)
        self._copies.append((parameter, copy))
        return copy

    def step(self, max_norm: float, scale: float = 1.0, *, measured: Iterable[float] = ()) -> tuple[float, bool]:
        """Clip, step at `scale` times the peak rate, clear. Returns the gradient norm and whether all was finite.

        A gradient norm, or one of the `measured` numbers (the loss), that is not finite clears the gradients and
        changes nothing else.
        """
        norm = self._clip(max_norm)
        finite = all(map(math.isfinite, (norm, *measured)))
        self.updates += finite
        for optimizer in self.members:
            if finite:
                for group in optimizer.param_groups:
                    if isinstance(group["lr"], torch.Tensor):
                        group["lr"].fill_(self.lr * scale)
                    else:
                        group["lr"] = self.lr * scale
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if finite:
            with torch.no_grad():
                for parameter, copy in self._copies:
                    parameter.copy_(copy)
        return norm, finite

    def _clip(self, max_norm: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, max_norm))

    def pack(self) -> tuple[dict[str, torch.Tensor], list[Any]]:
        """State as (tensors, JSON-able rest)."""
        tensors, rest = {}, []
        for i, optimizer in enumerate(self.members):
            more, state = checkpoint.pack_optimizer(optimizer, f"optimizer{i}")
            if self.kind == "adamw-8bit" and i == 0:
                from autotool_fast import lowbit

                more = lowbit.flatten(more)
            tensors |= more
            rest.append(state)
        tensors |= {f"float32/{i}": copy.detach() for i, (_, copy) in enumerate(self._copies)}
        return tensors, rest

    def unpack(self, tensors: Mapping[str, torch.Tensor], rest: Sequence[Any]) -> None:
        """Restore what `pack` took.

        Raises:
            UserError: 8-bit state of another number of processes.
        """
        for i, optimizer in enumerate(self.members):
            mine = {name: t for name, t in tensors.items() if name.startswith(f"optimizer{i}/")}
            if self.kind == "adamw-8bit" and i == 0:
                from autotool_fast import lowbit

                mine = lowbit.restore(mine, optimizer.param_groups[0]["params"], self.mesh)
            checkpoint.unpack_optimizer(optimizer, mine, rest[i], f"optimizer{i}")
        with torch.no_grad():
            for i, (_, copy) in enumerate(self._copies):
                copy.copy_(tensors[f"float32/{i}"])


def make_optimizers(model: PreTrainedModel, **options: Any) -> Optimizers:
    """`Optimizers` with these options over the model, or in several processes over shards of it."""
    if distributed.world() > 1:
        from autotool_fast.sharding import ShardedOptimizers

        return ShardedOptimizers(model, **options)
    return Optimizers(model, **options)


def trapezoid(step: int, steps: int, warmup: int, decay: float = 0.3, floor: float = 0.02) -> float:
    """Learning-rate factor: up from 0 over `warmup` steps, 1, down to `floor` over the last share `decay` of them."""
    rise = (step + 1) / (warmup + 1)
    fall = (steps - step) / (decay * steps) if decay else 1.0
    return max(min(rise, fall, 1.0), floor if step >= warmup else 0.0)


@dataclass
class StepResult:
    """What a step reports. `finite` False means that it changed nothing; `batch` is kept for inspection then."""

    metrics: dict[str, float]
    finite: bool = True
    batch: Any = None


@dataclass
class StageState:
    """What a stage trains and must find again after a stop. `extra` is JSON-able and owned by the stage."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    optimizers: Optimizers
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> torch.nn.Module:
        """What computes log-probs with gradients: the model itself, or its shards."""
        return self.optimizers.trained


def run_steps(
    context: Context,
    stage: Stage,
    state: StageState,
    steps: int,
    step: Callable[[int], StepResult],
    *,
    shown: Sequence[str],
    checkpoint_every: int = 0,
    after: Callable[[int], dict[str, float]] | None = None,
) -> None:
    """Run `step(0) .. step(steps - 1)`, or what is left of them.

    Args:
        shown: metrics for the progress line.
        checkpoint_every: steps between checkpoints; 0 for none but the one at an interruption.
        after: called with the number of finished steps; its metrics join the step's row (interim evaluations).

    A stop asked for during the last step is left to the caller, who has the finished model to save first. A step that
    fails before its update must have changed nothing else: the steps before it are saved then. One whose evaluation
    fails keeps its row, without the evaluation.

    Raises:
        Interrupted: after a checkpoint, when the user asked to stop.
        UserError: when three steps in a row were not finite; what a step or `after` raises.
    """
    folder = context.run.checkpoints(stage)
    found = None
    if context.config.resume:
        found = distributed.on_main(lambda: checkpoint.latest(folder, warn=context.progress.say))
    first, elapsed, skipped = (0, 0.0, 0) if found is None else (found.step, *_restore(found, state, context))
    context.metrics.close()  # and drop the rows that this stage is about to write again
    context.metrics = open_metrics(context.run, lambda row: row["stage"] != stage or row["step"] <= first)
    monitor = _monitor(context, stage)
    context.progress.start(stage, steps, first, every_step=True)
    context.timer.take()
    begin, seconds = time.perf_counter() - elapsed, elapsed
    kept, due = first, False
    indices = range(first, steps)
    for index in context.profiler.steps(indices) if context.profiler else indices:
        generators, updates = checkpoint.capture_rng(), state.optimizers.updates
        try:
            result = step(index)
        except (UserError, OSError):
            if kept < index and updates == state.optimizers.updates:
                _rescue(context, stage, index, state, seconds, skipped, generators)
            raise
        extra, failure = {}, None
        try:
            extra = after(index + 1) if after is not None else {}
        except (UserError, OSError) as error:  # of an evaluation: the step itself is done
            failure = error
        seconds = time.perf_counter() - begin
        extra |= monitor.see(index + 1, result.metrics) if monitor else {}
        row = context.metrics.write(
            stage, index + 1, result.metrics | extra, seconds=seconds, timings=context.timer.take()
        )
        context.progress.update(index + 1, {name: row[name] for name in shown if row.get(name) is not None})
        skipped = 0 if result.finite else skipped + 1
        if not result.finite:
            _keep_bad_batch(context, stage, index + 1, result.batch, skipped)
        if failure is not None:
            _rescue(context, stage, index + 1, state, seconds, skipped, checkpoint.capture_rng())
            raise failure
        if index + 1 < steps:
            stop = distributed.any_rank(context.stop.requested)
            due = due or bool(checkpoint_every and (index + 1) % checkpoint_every == 0)
            if stop or (due and result.finite):  # weights that are damaged must not push the good ones out
                _save(context, stage, index + 1, state, seconds, skipped, checkpoint.capture_rng())
                kept, due = index + 1, False
            if stop:
                raise Interrupted
    context.progress.finish()


def _monitor(context: Context, stage: Stage) -> Monitor | None:
    """The alarms of stage rl, which know the steps before a stop."""
    if stage != "rl":
        return None
    rows = read_rows(context.run.metrics) if distributed.is_main() else []
    return Monitor(context.config.alarms, context.progress.say, (row for row in rows if row["stage"] == stage))


def _rescue(context: Context, stage: Stage, step: int, *rest: Any) -> None:
    """Save the last finished step before a failure ends the run. Several processes cannot: one has left the others."""
    if distributed.world() > 1:
        return
    try:
        _save(context, stage, step, *rest)
    except UserError:
        return  # a full disk, say; what ends the run is the first failure
    context.progress.say(f"{stage}: saved after step {step}")


def _save(
    context: Context,
    stage: Stage,
    step: int,
    state: StageState,
    seconds: float,
    skipped: int,
    generators: Mapping[str, torch.Tensor],
) -> None:
    with context.timer.phase("checkpoint"):
        tensors, rest = state.optimizers.pack()
        checkpoint.save(
            context.run.checkpoints(stage),
            step,
            model=state.model,
            tokenizer=state.tokenizer,
            tensors=tensors | generators,
            state={
                "optimizers": rest,
                "extra": state.extra,
                "seconds": seconds,
                "skipped": skipped,
                "versions": versions(),
            },
            keep_last=context.config.rl.keep_checkpoints,
        )


def _restore(found: checkpoint.Checkpoint, state: StageState, context: Context) -> tuple[float, int]:
    """Put the state back; returns the seconds the stage had taken and its skipped steps in a row."""
    saved, tensors = found.state(), found.tensors(state.optimizers.mesh)
    before, now = saved.get("versions", {}), versions()
    changed = [f"{name} {value} -> {now.get(name)}" for name, value in before.items() if now.get(name) != value]
    if changed:
        context.progress.say(f"saved with other versions ({', '.join(changed)}): results may differ in rounding")
    found.load_weights(state.model)
    state.optimizers.unpack(tensors, saved["optimizers"])
    state.extra.clear()
    state.extra.update(saved["extra"])
    checkpoint.restore_rng(tensors)
    return saved["seconds"], saved["skipped"]


def open_metrics(run: RunFolder, keep: Callable[[Row], bool]) -> MetricsWriter:
    """Continue the run's metrics.jsonl (see `MetricsWriter.open`) on rank 0; other ranks write theirs to nowhere."""
    return MetricsWriter.open(run.metrics, keep) if distributed.is_main() else MetricsWriter(Path(os.devnull))


def _keep_bad_batch(context: Context, stage: Stage, step: int, batch: Any, skipped: int) -> None:
    path = context.run.path / "bad_batches" / f"{stage}-{step}.json"
    if distributed.is_main():
        path.parent.mkdir(exist_ok=True)
        files.write_text(path, json.dumps(batch))
    context.progress.say(f"{stage} step {step}: loss or gradient not finite, step skipped, batch kept in {path}")
    if skipped >= MAX_SKIPPED:
        raise UserError(
            f"{MAX_SKIPPED} steps in a row were not finite",
            where=stage,
            remedy=f"look at {path.parent} and start a new run with a lower learning rate",
        )
