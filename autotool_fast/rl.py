"""Stage 2, one GRPO step at a time: rollout, reward, advantage, packed loss, optimizer, entropy controller.

`PolicyTrainer.step` is the whole of it, top to bottom. The trainer owns what changes from step to step (weights,
optimizer, controller); prompts are handed in, and evaluation never passes through here. In several processes each
plays and trains on a share, and all know all trajectories, sums and coefficients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from autotool_fast import distributed
from autotool_fast.chat import SOURCE_SAMPLED, ChatFormat
from autotool_fast.config import RLConfig, RolloutConfig, TrainConfig
from autotool_fast.loop import Optimizers, StageState, StepResult, make_optimizers, trapezoid
from autotool_fast.metrics import Timer
from autotool_fast.objective import (
    EntropyController,
    EntropyStats,
    LossSettings,
    capped_old_logp,
    coefficients,
    group_advantages,
    merge_metrics,
    mismatch_metrics,
    policy_objective,
    resolve_targets,
    scoped_entropy,
    update,
)
from autotool_fast.packing import micro_batches, pack
from autotool_fast.policy import packed_logp_entropy
from autotool_fast.rewards import RewardTable, reward
from autotool_fast.rollout.driver import Engine, RolloutLimits
from autotool_fast.rollout.ranks import rollout_over_ranks
from autotool_fast.rollout.records import OUT_OF_BUDGET, Trajectory
from autotool_fast.tasks.record import Task
from autotool_fast.tasks.world import BANDS, band
from autotool_fast.warmup import idle_backward


def rollout_limits(config: RolloutConfig) -> RolloutLimits:
    """The episode budgets of a configuration."""
    return RolloutLimits(
        max_turns=config.max_turns,
        max_new_tokens=config.max_new_tokens,
        max_turn_tokens=config.max_turn_tokens,
        max_calls=config.max_calls,
        deadline_s=config.deadline_s,
    )


def reward_table(config: RLConfig) -> RewardTable:
    """The rewards of a configuration."""
    return RewardTable(
        correct_short=config.correct_short,
        correct_long=config.correct_long,
        wrong_long=config.wrong_long,
        wrong_short=config.wrong_short,
        malformed=config.malformed,
        format_mode=config.format_mode,
    )


@dataclass(frozen=True)
class ResponseTokens:
    """The sampled tokens of several trajectories, laid end to end; prompt and tool tokens are left out.

    Attributes:
        old_logp: sampler's log-prob, float32 [R].
        entropy: sampler's entropy in nats, float32 [R].
        cu_seqlens: trajectory boundaries, int32 [B + 1].
        is_short: 1 short, 0 long, -1 malformed, int64 [B].
        mode_mask: tokens of the sampled mode tags, bool [R].
        think_mask: tokens inside think blocks, bool [R].
    """

    old_logp: torch.Tensor
    entropy: torch.Tensor
    cu_seqlens: torch.Tensor
    is_short: torch.Tensor
    mode_mask: torch.Tensor
    think_mask: torch.Tensor

    @classmethod
    def of(
        cls, trajectories: Sequence[Trajectory], chat: ChatFormat, device: torch.device | str = "cpu"
    ) -> ResponseTokens:
        """Collect them on `device`; the order of tokens is that of `packed_logp_entropy` on the same trajectories."""
        sampled = [t.source == SOURCE_SAMPLED for t in trajectories]
        marks = [_marks(t, chat) for t in trajectories]

        def join(values: list[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate([v[s] for v, s in zip(values, sampled, strict=True)])).to(device)

        lengths = np.array([int(s.sum()) for s in sampled])
        return cls(
            old_logp=join([t.logp for t in trajectories]),
            entropy=join([t.entropy for t in trajectories]),
            cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device),
            is_short=torch.tensor([t.length_class for t in trajectories], device=device),
            mode_mask=join([mode for mode, _ in marks]),
            think_mask=join([think for _, think in marks]),
        )


def _marks(trajectory: Trajectory, chat: ChatFormat) -> tuple[np.ndarray, np.ndarray]:
    """(mode tag tokens, think tokens) as bool [T] over a trajectory."""
    mode = np.zeros(len(trajectory.ids), dtype=bool)
    think = np.zeros(len(trajectory.ids), dtype=bool)
    for (start, _), reply in zip(trajectory.turn_spans, trajectory.replies, strict=True):
        tag = chat.encode_mode(reply.mode) if reply.mode else []
        if tag and trajectory.ids[start : start + len(tag)].tolist() == tag:
            mode[start : start + len(tag)] = True
    for start, end in trajectory.think_spans:
        think[start:end] = True
    return mode, think


class PolicyTrainer:
    """GRPO on one model.

    Args:
        config: of the run; `config.rl` and `config.arm` decide the objective.
        state: model, optimizers and the JSON-able `extra`, in which the controller lives under "controller".
        engine: samples from the same model.
        timer: collects milliseconds per phase.
    """

    def __init__(
        self, config: TrainConfig, state: StageState, engine: Engine, chat: ChatFormat, timer: Timer
    ) -> None:
        self.config, self.state, self.engine, self.chat, self.timer = config, state, engine, chat, timer
        self.limits = rollout_limits(config.rollout)
        self.table = reward_table(config.rl)
        rl = config.rl
        self.cap = rl.importance_cap if config.rollout.backend == "vllm" else None
        self.settings = LossSettings(  # a clip that leaves capped ratios alone, or that of the configuration
            clip_low=rl.clip_low if self.cap is None else 1.0,
            clip_high=rl.clip_high if self.cap is None else self.cap,
            normalize=rl.normalize,
            scope=rl.entropy_scope,
            constant_groups=rl.constant_groups,
        )
        self.last: list[Trajectory] = []
        self.last_rewards: list[float] = []

    @property
    def controller(self) -> EntropyController:
        """The entropy controller's state."""
        return EntropyController.from_dict(self.state.extra["controller"])

    def start_controller(self, tasks: Sequence[Task]) -> None:
        """Set the controller up before the first step; relative targets are measured on one rollout of `tasks`."""
        if "controller" in self.state.extra:
            return
        rl, measured = self.config.rl, None
        if rl.target_mode == "relative":
            trajectories = self._sample(tasks, step=-1)
            tokens = ResponseTokens.of(trajectories, self.chat)
            everything = torch.ones_like(tokens.mode_mask)
            h = scoped_entropy(
                tokens.entropy,
                tokens.cu_seqlens,
                everything,
                rl.entropy_scope,
                tokens.mode_mask,
                tokens.think_mask,
            )
            long, short = ((tokens.is_short == flag) & h.defined for flag in (0, 1))
            measured = EntropyStats(
                long_sum=float(h.mean[long].sum()),
                long_count=float(long.sum()),
                short_sum=float(h.mean[short].sum()),
                short_count=float(short.sum()),
            )
        short_target, long_target = resolve_targets(
            rl.target_mode,
            target_short=rl.target_short,
            target_long=rl.target_long,
            ratio=rl.target_ratio,
            measured=measured,
        )
        self.state.extra["controller"] = EntropyController(
            arm=self.config.arm,
            beta_short=rl.beta_short,
            beta_long=rl.beta_long,
            target_short=short_target,
            target_long=long_target,
            beta_lr=rl.beta_lr,
            beta_max=rl.beta_max,
            delta=rl.beta_delta,
        ).to_dict()

    def _sample(self, tasks: Sequence[Task], step: int) -> list[Trajectory]:
        return rollout_over_ranks(
            self.engine,
            tasks,
            chat=self.chat,
            group_size=self.config.rl.group_size,
            seed=self.config.seed,
            step=step,
            temperature=self.config.rl.temperature,
            limits=self.limits,
        )

    def step(self, tasks: Sequence[Task], step: int, *, updates: int | None = None) -> StepResult:
        """One on-policy update on the groups of `tasks`.

        Args:
            step: names the stream of random numbers, together with the run's seed.
            updates: updates made before this one, for the learning rate; `step` if not given.
        """
        with self.timer.phase("rollout"):
            trajectories = self._sample(tasks, step)
        rewards = [reward(t.length_class, t.correct, self.table) for t in trajectories]
        self.last, self.last_rewards = trajectories, rewards
        advantages, constant = group_advantages(torch.tensor(rewards), self.config.rl.group_size)

        controller = self.controller
        now = coefficients(controller)
        in_loss = torch.ones_like(constant) if self.settings.constant_groups == "entropy" else ~constant
        lengths = torch.tensor([int((t.source == SOURCE_SAMPLED).sum()) for t in trajectories])
        parts, stats, mismatch, loss_sum = [], EntropyStats(), [], 0.0
        device = self.state.model.device
        prompts = [t.n_prompt for t in trajectories] if self.config.rl.share_prompts else None
        for chosen in micro_batches(
            [len(t.ids) for t in trajectories],
            self.config.rl.micro_tokens,
            prompts=prompts,
            groups=[t.group for t in trajectories],
        ):
            if not chosen:
                idle_backward(self.state.trained, self.config.model.attention)
                continue
            part = [trajectories[i] for i in chosen]
            tokens = ResponseTokens.of(part, self.chat, device)
            with self.timer.phase("logprob"):
                sampled = torch.from_numpy(np.concatenate([t.source == SOURCE_SAMPLED for t in part]))
                logp, entropy = packed_logp_entropy(
                    self.state.trained,
                    pack(
                        [t.ids for t in part],
                        device,
                        prompts=prompts and [prompts[i] for i in chosen],
                        attention=self.config.model.attention,
                    ),
                    sampled,
                    temperature=self.config.rl.temperature,
                )
            gap, extra = (logp.detach() - tokens.old_logp).abs(), {}
            reused = self._reuses(gap)
            old_logp = tokens.old_logp if reused else logp.detach()
            if self.cap is not None:
                extra = mismatch_metrics(logp, old_logp, self.cap)
                old_logp = capped_old_logp(logp, old_logp, self.cap)
            with self.timer.phase("loss"):
                objective = policy_objective(
                    logp,
                    old_logp,
                    entropy,
                    advantages[chosen].to(device),
                    tokens.cu_seqlens,
                    torch.ones_like(tokens.mode_mask),
                    tokens.is_short,
                    now,
                    self.settings,
                    mode_mask=tokens.mode_mask,
                    think_mask=tokens.think_mask,
                    constant=constant[chosen].to(device),
                    n_tokens_global=int(lengths[in_loss].sum()),
                    n_sequences_global=int(in_loss.sum()),
                )
            with self.timer.phase("backward"):
                objective.loss.backward()
            parts.append(objective.metrics | extra)
            stats = stats + objective.stats
            loss_sum += float(objective.loss.detach())
            mismatch.append((gap, reused))
        parts, stats, loss_sum, gaps = _joined(parts, stats, loss_sum, mismatch)
        with self.timer.phase("optimizer"):
            measured = (loss_sum, *astuple(stats), gaps["mismatch/mean"])
            rl, done = self.config.rl, step if updates is None else updates
            scale = trapezoid(done, rl.steps, rl.warmup_steps, rl.decay)
            norm, finite = self.state.optimizers.step(self.config.rl.grad_clip, scale, measured=measured)
        if finite:
            self.state.extra["controller"] = update(controller, stats).to_dict()
        metrics = {
            **merge_metrics(parts),
            **stats.metrics(),
            **rollout_metrics(trajectories, rewards),
            "loss/total": loss_sum,
            "grad_norm": norm,
            "groups/constant": float(constant.float().mean()),
            "beta/long": now.beta_long,
            "beta/short": now.beta_short,
            "target/long": controller.target_long,
            "target/short": controller.target_short,
            **gaps,
        }
        return StepResult(metrics, finite, None if finite else [_as_json(t) for t in trajectories])

    def _reuses(self, gap: torch.Tensor) -> bool:
        """Whether a micro-batch uses the sampler's log-probs, which are `gap` from the trainer's."""
        rl = self.config.rl
        if self.cap is not None or rl.old_logp != "auto":
            return self.cap is not None or rl.old_logp == "sampler"
        return float(gap.mean()) <= rl.mismatch_limit


def _joined(
    parts: list[dict[str, float]], stats: EntropyStats, loss: float, mismatch: list[tuple[torch.Tensor, bool]]
) -> tuple[list[dict[str, float]], EntropyStats, float, dict[str, float]]:
    """What the micro-batches of all ranks measured, the same on every rank."""
    gaps = torch.cat([gap for gap, _ in mismatch]) if mismatch else torch.zeros(0)
    reused = sum(len(gap) for gap, kept in mismatch if kept)
    extent = (float(gaps.max()), float(gaps.mean()), reused, len(gaps)) if mismatch else (0.0, 0.0, 0, 0)
    every_part, every_stats, losses, extents = zip(*distributed.gather((parts, stats, loss, extent)), strict=True)
    total = sum(count for *_, count in extents)
    return (
        [part for some in every_part for part in some],
        sum(every_stats, EntropyStats()),
        sum(losses),
        {
            "mismatch/max": max(largest for largest, *_ in extents),
            "mismatch/mean": sum(mean * (count / total) for _, mean, _, count in extents),
            "mismatch/reused": sum(kept for _, _, kept, _ in extents) / total,
        },
    )


def rollout_metrics(trajectories: Sequence[Trajectory], rewards: Sequence[float]) -> dict[str, float]:
    """Reward, accuracy, thinking and lengths over a batch, by band and by difficulty where it has any."""
    correct = np.array([t.correct for t in trajectories], dtype=float)
    thinks = np.array([t.length_class == 0 for t in trajectories], dtype=float)
    tokens = np.array([t.n_response_tokens for t in trajectories], dtype=float)
    metrics = {
        "reward/mean": float(np.mean(rewards)),
        "acc/all": float(correct.mean()),
        "think_rate/all": float(thinks.mean()),
        "malformed": float(np.mean([t.length_class < 0 for t in trajectories])),
        "truncated": float(np.mean([t.stop_reason in OUT_OF_BUDGET for t in trajectories])),
        "tokens/response": float(tokens.mean()),
        "tokens/prompt": float(np.mean([t.n_prompt for t in trajectories])),
    }
    for name, values in (
        ("long", thinks == 1),
        ("short", np.array([t.length_class == 1 for t in trajectories])),
    ):
        if values.any():
            metrics[f"tokens/{name}"] = float(tokens[values].mean())
    members: dict[str, list[int]] = defaultdict(list)
    for i, trajectory in enumerate(trajectories):
        members[band(trajectory.task.difficulty)].append(i)
        members[f"k{trajectory.task.difficulty}"].append(i)
    order = [*BANDS, *sorted(name for name in members if name not in BANDS)]
    for name in order:
        if members[name]:
            metrics[f"acc/{name}"] = float(correct[members[name]].mean())
            metrics[f"think_rate/{name}"] = float(thinks[members[name]].mean())
            metrics[f"tokens/{name}"] = float(tokens[members[name]].mean())
    return metrics


def _as_json(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "task": trajectory.task.id,
        "ids": trajectory.ids.tolist(),
        "source": trajectory.source.tolist(),
        "logp": [float(x) for x in trajectory.logp],
    }


def policy_optimizers(config: TrainConfig, model: Any) -> Optimizers:
    """The RL stage's optimizer: AdamW on everything."""
    rl = config.rl
    return make_optimizers(model, lr=rl.lr, weight_decay=rl.weight_decay, kind=config.optim.kind)
