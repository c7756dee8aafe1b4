"""One GRPO step: what is sampled is what is trained, constant groups, targets, arms, scopes, micro-batches.

Replies are scripted (see `scripted_rl`), so every kind of reply occurs on demand.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from scripted_rl import (
    CHAIN,
    GROUP,
    HOP,
    LONG,
    MALFORMED,
    MIXED,
    SET,
    SHORT,
    TASKS,
    WORLD,
    WRONG_LONG,
    WRONG_SHORT,
    Setting,
    written,
)

import autotool_fast.rl as rl_module
from autotool_fast.chat import SOURCE_PROMPT, SOURCE_SAMPLED, SOURCE_TOOL
from autotool_fast.config import from_dict
from autotool_fast.controller import ARMS, EntropyStats
from autotool_fast.evaluate import cell_weights, evaluate
from autotool_fast.metrics import Timer
from autotool_fast.objective import SCOPES
from autotool_fast.packing import pack
from autotool_fast.policy import packed_logp_entropy
from autotool_fast.rl import ResponseTokens, reward_table, rollout_limits
from autotool_fast.rollout.driver import rollout
from autotool_fast.tasks import tiny

torch.set_num_threads(1)


@pytest.fixture
def make(monkeypatch):
    Setting.script.clear()

    def build(**values) -> Setting:
        return Setting(monkeypatch, **values)

    return build


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_step_moves_weights_and_controller_and_reports_what_it_did(make):
    setting = make()
    before = setting.weights()
    result = setting.step(TASKS, MIXED)
    assert result.finite
    assert result.batch is None
    assert not same(setting.weights(), before)
    trajectories = setting.trainer.last
    assert [t.length_class for t in trajectories] == [1, 0, 1, -1, 0, 0, 0, 1, 0, 1, -1, 0]
    assert [t.correct for t in trajectories] == [
        True,
        True,
        False,
        False,
        True,
        False,
        True,
        True,
        True,
        True,
        False,
        True,
    ]
    # METHOD's table: right 1.0 / 0.5, wrong -0.5 / -1.0 (think / no-think), malformed -1.5.
    rewards = [1.0, 0.5, -1.0, -1.5, 0.5, -0.5, 0.5, 1.0, 0.5, 1.0, -1.5, 0.5]
    assert setting.trainer.last_rewards == rewards
    metrics = result.metrics
    assert metrics["reward/mean"] == pytest.approx(np.mean(rewards))
    assert metrics["acc/all"] == 8 / 12
    assert metrics["acc/easy"] == 0.5
    assert metrics["acc/hard"] == metrics["acc/k4"] == 0.75
    assert metrics["think_rate/all"] == 6 / 12
    assert metrics["think_rate/hard"] == 0.75
    by_level = [t.n_response_tokens for t in trajectories if t.task.difficulty == 4]
    assert metrics["tokens/k4"] == metrics["tokens/hard"] == np.mean(by_level)
    assert metrics["malformed"] == 2 / 12
    assert metrics["groups/constant"] == 0.0
    assert metrics["beta/long"] == 0.01  # the coefficient that served this step
    # beta_l integrates the missing entropy of long responses, here far above their target.
    assert metrics["entropy/long"] > 0.2
    moved = 0.01 + 0.01 * (0.2 - metrics["entropy/long"])
    assert setting.trainer.controller.beta_long == pytest.approx(max(moved, 0.0))
    assert metrics["tokens/trained"] == sum((t.source == SOURCE_SAMPLED).sum() for t in trajectories)


def test_sampler_and_trainer_agree_and_the_gap_is_logged(make):
    setting = make()
    for step in range(3):
        metrics = setting.step(TASKS, MIXED, step).metrics
        # Two float32 forward passes in different batch shapes; log-probs here are about -4, so 1e-5 is 20 ulp.
        assert metrics["mismatch/max"] <= 1e-5
        assert 0 <= metrics["mismatch/mean"] <= metrics["mismatch/max"]
        assert metrics["ratio/max"] == pytest.approx(1.0, abs=1e-5)


def test_sampler_and_trainer_compute_the_same_number(make):
    """With logits as large as a trained model's only rounding is left: in float64 nothing but storage as float32."""
    setting = make(dtype=torch.float64)
    with torch.no_grad():
        setting.model.get_output_embeddings().weight.mul_(30)
    setting.write(TASKS, MIXED)
    trajectories = setting.trainer._sample(TASKS, 0)
    sampled = torch.from_numpy(np.concatenate([t.source == SOURCE_SAMPLED for t in trajectories]))
    with torch.no_grad():
        logp = packed_logp_entropy(setting.model, pack([t.ids for t in trajectories]), sampled).logp
    old = torch.from_numpy(np.concatenate([t.logp for t in trajectories]))[sampled]
    assert logp.min() < -8  # sharp enough for float32 arithmetic to miss this tolerance
    assert ((logp - old).abs() <= 2.0**-24 * logp.abs() + 1e-12).all()


def test_a_sampler_of_other_weights_shows_in_the_mismatch(make):
    setting = make()
    setting.write(TASKS, MIXED)
    sample = setting.trainer._sample

    def other_weights(tasks, step):
        with torch.no_grad():
            setting.model.get_input_embeddings().weight.mul_(1.05)
            trajectories = sample(tasks, step)
            setting.model.get_input_embeddings().weight.div_(1.05)
        return trajectories

    setting.trainer._sample = other_weights
    setting.trainer.start_controller(TASKS)
    assert setting.trainer.step(TASKS, 0).metrics["mismatch/max"] > 1e-3


def tokens_in_the_loss(setting: Setting, module: types.ModuleType, monkeypatch) -> list[list[int]]:
    """Trained token ids per trajectory, as the loss of one step sees them, on tasks of one turn."""
    seen: list[list[int]] = []

    def record(model, batch, trained, **options):
        spans = zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True)
        seen.extend(batch.ids[batch.rows[a:b]][trained[a:b]].tolist() for a, b in spans)
        return packed_logp_entropy(model, batch, trained, **options)

    monkeypatch.setattr(module, "packed_logp_entropy", record)
    trainer = module.PolicyTrainer(setting.config, setting.state, setting.engine, setting.chat, Timer())
    trainer.start_controller([SET])
    trainer.step([SET], 0)
    return seen


MERGE = "33"  # a word of this tokenizer, so the text of two tokens "3" encodes to one


def check_sampled_tokens_reach_the_loss(module: types.ModuleType, monkeypatch) -> None:
    fragments = tiny.compact_fragments()
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "compact_fragments", lambda: [*fragments, MERGE])
        Setting.script.clear()
        setting = Setting(patch, rl={"prompts_per_step": 1})
        vocabulary = setting.chat.tokenizer.get_vocab()
        setting.write([SET], [[SHORT, LONG, WRONG_SHORT, MALFORMED]])
        for tokens in setting.script.values():
            tokens[-1:-1] = [vocabulary["3"]] * 2
        sampled = sorted(list(tokens) for tokens in setting.script.values())
        assert all(setting.chat.encode_text(setting.chat.decode(tokens)) != tokens for tokens in sampled)
        assert sorted(tokens_in_the_loss(setting, module, patch)) == sampled


def test_sampled_tokens_reach_the_loss_unchanged(monkeypatch):
    check_sampled_tokens_reach_the_loss(rl_module, monkeypatch)


def test_re_encoding_sampled_tokens_is_noticed(monkeypatch):
    old = "[t.ids for t in part],\n                        device,"
    new = "[np.array(self.chat.encode_text(self.chat.decode(t.ids))) for t in part], device,"
    source = Path(rl_module.__file__).read_text()
    assert source.count(old) == 1, "point this at the new form of the call"
    mutant = types.ModuleType("autotool_fast.rl")
    monkeypatch.setitem(sys.modules, "autotool_fast.rl", mutant)
    exec(compile(source.replace(old, new), rl_module.__file__, "exec"), mutant.__dict__)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):  # other lengths may not even fit together
        check_sampled_tokens_reach_the_loss(mutant, monkeypatch)


@pytest.mark.parametrize("mode", ["auto", "think", "no_think"])
def test_prompt_tool_and_forced_tokens_are_never_trained(make, mode):
    setting = make()
    kind = SHORT if mode == "no_think" else LONG
    setting.write([CHAIN], [[kind]], mode=mode)
    limits = rollout_limits(setting.config.rollout)
    (trajectory,) = rollout(
        setting.engine, [CHAIN], chat=setting.chat, group_size=1, seed=0, step=0, mode=mode, limits=limits
    )
    assert trajectory.correct
    turns = [
        setting.chat.encode_text(reply.removeprefix(f"[{mode}]\n") + setting.chat.stop)
        for reply in written(CHAIN, kind)
    ]
    assert len(turns) == 3
    sampled = trajectory.source == SOURCE_SAMPLED
    assert trajectory.ids[sampled].tolist() == [token for turn in turns for token in turn]
    assert {SOURCE_PROMPT, SOURCE_SAMPLED, SOURCE_TOOL} == set(trajectory.source.tolist())
    tokens = ResponseTokens.of([trajectory], setting.chat)
    assert tokens.old_logp.shape == tokens.entropy.shape == (sampled.sum(),)
    assert tokens.cu_seqlens.tolist() == [0, sampled.sum()]
    assert int(tokens.mode_mask.sum()) == (3 if mode == "auto" else 0)  # a forced tag is not sampled
    words = [setting.chat.decode([i]) for i in trajectory.ids[sampled][tokens.think_mask.numpy()].tolist()]
    assert bool(words) == (kind == LONG)
    assert not {"<think>\n", "\n</think>\n", "[think]\n"} & set(words)


def test_the_loss_does_not_see_tool_tokens(make):
    """Their log-probs are never asked for: the trained rows are the sampled ones, position by position."""
    setting = make()
    asked = []

    def record(model, batch, trained, **options):
        asked.append((batch, trained))
        return packed_logp_entropy(model, batch, trained, **options)

    setting.write([CHAIN], [[LONG, SHORT, MALFORMED, WRONG_LONG]])
    setting.trainer.start_controller([CHAIN])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl_module, "packed_logp_entropy", record)
        setting.trainer.step([CHAIN], 0)
    ((batch, trained),) = asked
    ordered = sorted(setting.trainer.last, key=lambda t: -len(t.ids))
    assert batch.ids[batch.rows].tolist() == np.concatenate([t.ids for t in ordered]).tolist()
    assert batch.tokens == sum(len(t.ids) - t.n_prompt for t in ordered) + ordered[0].n_prompt
    assert trained.tolist() == np.concatenate([t.source == SOURCE_SAMPLED for t in ordered]).tolist()


@pytest.mark.parametrize("normalize", ["tokens", "sequences", 100.0])
@pytest.mark.parametrize("scope", ["reply", "mode"])
@pytest.mark.parametrize("constant_groups", ["entropy", "exclude"])
def test_micro_batches_change_neither_loss_nor_gradient(make, normalize, scope, constant_groups):
    results = []
    kinds = [*MIXED[:2], [LONG] * GROUP]
    for micro_tokens in (100_000, 150, 1):
        rl = {
            "micro_tokens": micro_tokens,
            "normalize": normalize,
            "entropy_scope": scope,
            "constant_groups": constant_groups,
            "target_long": 10.0,  # the gate is open, so the entropy term takes part
        }
        setting = make(dtype=torch.float64, rl=rl)
        results.append((setting.step(TASKS, kinds).metrics, setting.gradient))
    metrics, gradient = results[0]
    assert metrics["loss/entropy"] != 0.0
    for other, other_gradient in results[1:]:
        # float64 sums in another order; the losses themselves are rounded to float32 by the op.
        for name in ("loss/total", "loss/policy", "loss/entropy", "entropy/long", "grad_norm", "tokens/trained"):
            assert other[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-7), name
        for name, value in gradient.items():
            torch.testing.assert_close(other_gradient[name], value, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("micro_tokens", [100_000, 150, 1])
def test_sharing_prompts_changes_neither_loss_nor_gradient(make, micro_tokens):
    results = []
    for share in (False, True):
        rl = {"micro_tokens": micro_tokens, "share_prompts": share, "target_long": 10.0}
        setting = make(dtype=torch.float64, rl=rl)
        results.append((setting.step(TASKS, MIXED).metrics, setting.gradient))
    (metrics, gradient), (other, other_gradient) = results
    for name, value in metrics.items():
        assert other[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name
    for name, value in gradient.items():
        # The op hands float32 numbers back, and the model's norms compute in float32.
        assert float((other_gradient[name] - value).norm() / value.norm()) <= 1e-6, name


def elsewhere(setting: Setting, noise: float) -> None:
    """Have the sampler's log-probs be off by +-`noise` nats."""
    sample = setting.trainer._sample

    def off(tasks, step):
        sign = itertools.cycle([1, -1])
        played = sample(tasks, step)
        return [
            dataclasses.replace(t, logp=t.logp + np.array([noise * next(sign) for _ in t.ids], np.float32))
            for t in played
        ]

    setting.trainer._sample = off


@pytest.mark.parametrize(
    ("old_logp", "noise", "reused"),
    [("auto", 0.01, 1), ("auto", 0.03, 0), ("sampler", 0.03, 1), ("trainer", 0.0, 0)],
)
def test_the_samplers_log_probs_serve_while_they_agree(make, old_logp, noise, reused):
    setting = make(rl={"old_logp": old_logp, "mismatch_limit": 0.02})
    elsewhere(setting, noise)
    metrics = setting.step(TASKS, MIXED).metrics
    assert metrics["mismatch/reused"] == reused
    assert metrics["mismatch/mean"] == pytest.approx(noise, abs=1e-5)
    assert metrics["ratio/max"] == pytest.approx(np.exp(noise) if reused else 1.0, abs=1e-5)


def test_each_forward_pass_decides_on_its_own_log_probs(make):
    setting = make(rl={"micro_tokens": 1, "mismatch_limit": 0.02})
    sample = setting.trainer._sample

    def first_off(tasks, step):
        first, *others = sample(tasks, step)
        return [dataclasses.replace(first, logp=first.logp - np.float32(0.1)), *others]

    setting.trainer._sample = first_off
    metrics = setting.step(TASKS, MIXED).metrics
    lengths = [int((t.source == SOURCE_SAMPLED).sum()) for t in setting.trainer.last]
    assert metrics["mismatch/reused"] == pytest.approx(1 - lengths[0] / sum(lengths))
    assert metrics["ratio/max"] == pytest.approx(1.0, abs=1e-5)


def test_constant_groups_alone_leave_plain_grpo_where_it_is(make):
    setting = make(arm="none")
    before = setting.weights()
    result = setting.step(TASKS, [[SHORT] * GROUP, [LONG] * GROUP, [MALFORMED] * GROUP])
    assert result.finite
    assert result.metrics["groups/constant"] == 1.0
    assert result.metrics["grad_norm"] == 0.0
    assert same(setting.weights(), before)


def entropy_gradient(setting: Setting, weight: float) -> dict[str, torch.Tensor]:
    """The gradient of -weight * (mean over all responses of H_i of the long ones), written out."""
    setting.model.zero_grad()
    trajectories = setting.trainer.last
    total = torch.zeros((), dtype=torch.float64)
    for t in trajectories:
        if t.length_class == 0:
            sampled = torch.from_numpy(t.source == SOURCE_SAMPLED)
            total = total + packed_logp_entropy(setting.model, pack([t.ids]), sampled).entropy.double().mean()
    (-weight * total / len(trajectories)).backward()
    return {name: p.grad.clone() for name, p in setting.model.named_parameters() if p.grad is not None}


def test_constant_groups_keep_their_entropy_term_and_nothing_else(make):
    rl = {"normalize": "sequences", "target_long": 10.0, "beta_long": 0.25}
    setting = make(dtype=torch.float64, rl=rl)
    setting.state.optimizers.members = []  # the weights stay, for the comparison below
    setting.step(TASKS, [[SHORT] * GROUP, [LONG] * GROUP, [MALFORMED] * GROUP])
    expected = entropy_gradient(setting, 0.25)
    clip = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    assert 0 < clip < setting.config.rl.grad_clip
    for name, value in expected.items():
        # The op returns its gradient in float32 where its input is; the model is float64, sums differ in order.
        torch.testing.assert_close(setting.gradient[name], value, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
def test_excluded_constant_groups_leave_the_loss_and_its_normaliser(make, normalize):
    """The step is that of the other groups alone."""
    rl = {"normalize": normalize, "constant_groups": "exclude", "target_long": 10.0}
    both = make(dtype=torch.float64, rl=rl)
    loss = both.step([SET, HOP], [MIXED[0], [LONG] * GROUP]).metrics["loss/total"]
    alone = make(dtype=torch.float64, rl=rl)
    assert alone.step([SET], [MIXED[0]]).metrics["loss/total"] == pytest.approx(loss, rel=1e-5)
    for name, value in alone.gradient.items():
        torch.testing.assert_close(both.gradient[name], value, rtol=1e-5, atol=1e-9)


def test_excluding_every_group_is_a_step_of_zero(make):
    setting = make(rl={"constant_groups": "exclude"})
    before = setting.weights()
    result = setting.step(TASKS, [[SHORT] * GROUP, [LONG] * GROUP, [MALFORMED] * GROUP])
    assert result.finite
    assert result.metrics["grad_norm"] == 0.0
    assert same(setting.weights(), before)


def test_only_malformed_replies_are_a_working_step(make):
    setting = make()
    result = setting.step(TASKS, [[MALFORMED] * GROUP] * 3)
    assert result.finite
    assert result.metrics["malformed"] == 1.0
    assert result.metrics["reward/mean"] == -1.5
    assert not {"entropy/long", "entropy/short", "tokens/long", "tokens/short"} & result.metrics.keys()
    assert setting.trainer.controller.beta_long == 0.01  # no long response, so it does not move


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("scope", SCOPES)
def test_every_arm_and_scope_trains(make, arm, scope):
    setting = make(arm=arm, rl={"entropy_scope": scope, "target_long": 10.0, "beta_short": 0.02})
    before = setting.weights()
    result = setting.step(TASKS, MIXED)
    assert result.finite
    assert not same(setting.weights(), before)
    term = result.metrics["loss/entropy"]
    assert term == 0.0 if arm == "none" else term < 0.0
    beta = setting.trainer.controller.beta_long
    assert beta == 0.01 if arm in ("none", "fixed", "decoupled-fixed") else beta > 0.01


def test_the_format_mode_reaches_the_reward():
    assert reward_table(from_dict({"rl": {"format_mode": "add"}}).rl).format_mode == "add"
    names = ["correct_short", "correct_long", "wrong_long", "wrong_short", "malformed"]
    changed = dict(zip(names, (5.0, 4.0, 3.0, 2.0, 1.0), strict=True))
    table = reward_table(from_dict({"rl": changed}).rl)
    assert dataclasses.asdict(table) == {**changed, "format_mode": "gate"}


@pytest.mark.parametrize("scope", ["reply", "mode"])
def test_relative_targets_are_measured_on_the_start_model_before_the_first_step(make, scope):
    setting = make(rl={"target_mode": "relative", "target_ratio": 0.5, "entropy_scope": scope})
    setting.write(TASKS, MIXED, step=-1)
    before = setting.weights()
    setting.trainer.start_controller(TASKS)
    assert same(setting.weights(), before)
    setting.write(TASKS, MIXED, step=-1)
    means: dict[int, list[float]] = {0: [], 1: [], -1: []}
    for t in setting.trainer._sample(TASKS, -1):
        entropy = t.entropy[t.source == SOURCE_SAMPLED]
        if scope == "mode":
            entropy = np.array([t.entropy[start] for start, _ in t.turn_spans])
        means[t.length_class].append(float(entropy.mean(dtype=np.float64)))
    controller = setting.trainer.controller
    # Means of float32 entropies, rounded once more to float32.
    assert controller.target_long == pytest.approx(0.5 * np.mean(means[0]), rel=1e-6)
    assert controller.target_short == pytest.approx(0.5 * np.mean(means[1]), rel=1e-6)
    for step in range(2):  # measured once
        metrics = setting.step(TASKS, MIXED, step).metrics
        assert (metrics["target/long"], metrics["target/short"]) == (controller.target_long, controller.target_short)


def test_the_controller_lives_in_the_json_able_state_and_continues_from_there(make):
    setting = make()
    setting.step(TASKS, MIXED)
    extra = json.loads(json.dumps(setting.state.extra))
    resumed = make()
    resumed.state.extra.update(extra)
    resumed.model.load_state_dict(setting.model.state_dict())
    tensors, rest = copy.deepcopy(setting.state.optimizers.pack())
    resumed.state.optimizers.unpack(tensors, rest)
    results = [s.step(TASKS, MIXED, 1).metrics for s in (setting, resumed)]
    assert results[0] == results[1]
    assert resumed.trainer.controller == setting.trainer.controller
    assert same(resumed.weights(), setting.weights())


def test_evaluation_moves_neither_weights_nor_controller_nor_generators(make):
    setting = make()
    setting.step(TASKS, MIXED)
    setting.write([SET, HOP], [[SHORT], [LONG]])
    weights, extra = setting.weights(), copy.deepcopy(setting.state.extra)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    limits = rollout_limits(setting.config.rollout)
    mix = cell_weights(WORLD, 0.5)
    result = evaluate(setting.engine, setting.chat, [SET, HOP], mix, limits=limits, modes=("auto",))
    assert result["auto"]["overall"]["accuracy"] > 0
    assert same(setting.weights(), weights)
    assert setting.state.extra == extra
    assert all(p.grad is None for p in setting.model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert random.getstate() == states[2]
    assert setting.model.training


@pytest.mark.parametrize("where", ["logp", "entropy", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing_and_hands_over_its_batch(make, monkeypatch, where):
    setting = make(rl={"target_long": 10.0})  # so that the coefficient would rise
    setting.step(TASKS, MIXED)
    weights, extra = setting.weights(), copy.deepcopy(setting.state.extra)
    optimizer = {name: tensor.clone() for name, tensor in setting.state.optimizers.pack()[0].items()}

    def broken(model, batch, trained, **options):
        logp, entropy = packed_logp_entropy(model, batch, trained, **options)
        poison = torch.zeros_like(logp)
        poison[0] = float("nan")
        if where == "logp":
            return logp + poison, entropy
        if where == "entropy":
            return logp, entropy + poison
        logp.register_hook(lambda gradient: gradient + poison)
        return logp, entropy

    monkeypatch.setattr(rl_module, "packed_logp_entropy", broken)
    torch.manual_seed(5)
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    result = setting.step(TASKS, MIXED, 1)
    assert not result.finite
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.random.get_state()[1].tolist() == generators[1]  # noqa: NPY002
    assert random.getstate() == generators[2]
    assert len(result.batch) == 12
    assert result.batch[0]["ids"] == setting.trainer.last[0].ids.tolist()
    json.dumps(result.batch)
    assert same(setting.weights(), weights)
    assert setting.state.extra == extra
    assert same(setting.state.optimizers.pack()[0], optimizer)


def test_stats_are_summed_over_micro_batches_before_the_one_update(make, monkeypatch):
    calls: list[EntropyStats] = []

    def record(controller, stats):
        calls.append(stats)
        return controller

    monkeypatch.setattr(rl_module, "update", record)
    setting = make(rl={"micro_tokens": 1})
    setting.step(TASKS, MIXED)
    (stats,) = calls
    assert (stats.long_count, stats.short_count, stats.all_count) == (6, 4, 12)


def test_the_rate_is_constant_unless_told_to_warm_up_and_to_fall(make):
    setting, scales = make(rl={"steps": 100, "warmup_steps": 20, "decay": 0.3}), []
    step = setting.state.optimizers.step

    def record(max_norm, scale=1.0, **rest):
        scales.append(scale)
        return step(max_norm, scale, **rest)

    setting.state.optimizers.step = record
    for number in (0, 10, 20, 70, 85, 100):
        setting.step(TASKS, MIXED, number)
    assert scales == pytest.approx([1 / 21, 11 / 21, 1.0, 1.0, 0.5, 0.02])
    constant = make(rl={"steps": 100})
    step = constant.state.optimizers.step
    scales.clear()
    constant.state.optimizers.step = record
    for number in (0, 50, 99):
        constant.step(TASKS, MIXED, number)
    assert scales == [1.0, 1.0, 1.0]


def test_with_a_server_each_token_is_weighted_by_its_capped_ratio(make):
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "intermediate": 16, "path": "some model"}
    served = {"slots": 8, "backend": "vllm"}
    setting = make(
        dtype=torch.float64, model=sizes, rollout=served, arm="none", rl={"grad_clip": 1e9, "importance_cap": 1.5}
    )
    sample, rng = setting.trainer._sample, np.random.default_rng(0)

    def elsewhere(tasks, step):
        played = sample(tasks, step)
        return [dataclasses.replace(t, logp=t.logp + rng.normal(0, 0.5, len(t.ids)).astype(np.float32)) for t in played]

    setting.trainer._sample = elsewhere
    before = copy.deepcopy(setting.model)
    metrics = setting.step(TASKS, MIXED).metrics

    trajectories = setting.trainer.last
    sampled = torch.from_numpy(np.concatenate([t.source == SOURCE_SAMPLED for t in trajectories]))
    logp = packed_logp_entropy(before, pack([t.ids for t in trajectories]), sampled).logp
    theirs = torch.from_numpy(np.concatenate([t.logp for t in trajectories]))[sampled]
    weight = (logp.detach() - theirs).exp().clamp(max=1.5)
    rewards = torch.tensor(setting.trainer.last_rewards, dtype=torch.float64).view(-1, GROUP)
    advantage = ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)).flatten().float()
    lengths = torch.tensor([int((t.source == SOURCE_SAMPLED).sum()) for t in trajectories])
    (-(weight * advantage.repeat_interleave(lengths) * logp).sum() / lengths.sum()).backward()
    for name, parameter in before.named_parameters():
        # Advantages are float32.
        torch.testing.assert_close(setting.gradient[name], parameter.grad, rtol=1e-5, atol=1e-9)
    assert 0 < metrics["mismatch/capped"] < 1
    assert metrics["mismatch/kl"] > 0.01
    assert metrics["ratio/max"] == pytest.approx(1.5)
    assert metrics["mismatch/reused"] == 1.0


def test_without_a_server_nothing_is_weighted(make):
    setting = make(rl={"importance_cap": 1.0})
    metrics = setting.step(TASKS, MIXED).metrics
    assert setting.trainer.settings.clip_high == setting.config.rl.clip_high
    assert not {"mismatch/kl", "mismatch/capped"} & metrics.keys()
