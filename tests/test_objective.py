"""The RL objective: advantages, entropy terms, masks and normalisation.

Tests take the module as the fixture `objective`: test_mutations.py runs them on broken copies of it.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from autotool_kernels import logits_logp_entropy

import autotool_fast.objective as objective_module
from autotool_fast.controller import Coefficients, EntropyController, EntropyStats, coefficients
from autotool_fast.errors import UserError

SHUT, OPEN = 0.0, math.inf
# Powers of two, so that no coefficient is rounded on its way.
GATED = Coefficients(beta_short=2**-5, beta_long=2**-2, target_short=0.2, target_long=0.3)
SCOPES = ("reply", "think", "mode", "blend")


@pytest.fixture
def objective():
    return objective_module


class Batch:
    """Five packed responses: short, long with two turns, malformed, long, short. Token kinds by letter:
    p prompt, m mode tag, t thinking, c call, o tool output, f forced tag (in the prompt)."""

    kinds = ("ppmcc", "ppmttcooomtc", "pmt", "pftttc", "pmc")
    flags = (1, 0, -1, 0, 1)

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        text = "".join(self.kinds)

        def draw(low: float, high: float) -> torch.Tensor:
            return torch.rand(len(text), generator=generator, dtype=torch.float64).mul(high - low).add(low)

        self.logp = draw(-2.0, -0.1).to(dtype).requires_grad_()
        self.old_logp = (self.logp.detach() + draw(-0.5, 0.5)).to(dtype)
        # Responses 0 and 1 lie below the targets of GATED, 3 and 4 above.
        level = torch.tensor([0.1, 0.15, 0.3, 0.4, 0.5], dtype=torch.float64)
        level = level.repeat_interleave(torch.tensor([len(kind) for kind in self.kinds]))
        self.entropy = (level + draw(-0.05, 0.05)).to(dtype).requires_grad_()
        self.mask = torch.tensor([kind in "mtc" for kind in text])
        self.mode_mask = torch.tensor([kind == "m" for kind in text])
        self.think_mask = torch.tensor([kind == "t" for kind in text])
        self.is_short = torch.tensor(self.flags)
        self.advantages = torch.tensor([1.0, -1.0, -0.5, 0.0, 0.7], dtype=dtype)
        self.constant = self.advantages == 0
        lengths = torch.tensor([0, *(len(kind) for kind in self.kinds)])
        self.cu_seqlens = lengths.cumsum(0).to(torch.int32)

    def tokens(self, i: int) -> slice:
        return slice(int(self.cu_seqlens[i]), int(self.cu_seqlens[i + 1]))

    def run(self, objective, c: Coefficients, parts=((0, 5),), **options):
        """Objectives of contiguous micro-batches; `options` go to the settings or to the call by name."""
        settings = {f.name for f in dataclasses.fields(objective.LossSettings)} & options.keys()
        settings = objective.LossSettings(**{name: options.pop(name) for name in settings})
        results = []
        for first, last in parts:
            t = slice(int(self.cu_seqlens[first]), int(self.cu_seqlens[last]))
            b = slice(first, last)
            results.append(
                objective.policy_objective(
                    self.logp[t],
                    self.old_logp[t],
                    self.entropy[t],
                    self.advantages[b],
                    self.cu_seqlens[first : last + 1] - self.cu_seqlens[first],
                    self.mask[t],
                    self.is_short[b],
                    c,
                    settings,
                    mode_mask=self.mode_mask[t],
                    think_mask=self.think_mask[t],
                    constant=self.constant[b],
                    **options,
                )
            )
        return results

    def gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.autograd.grad(loss, (self.logp, self.entropy), retain_graph=True, materialize_grads=True)


def reference(batch: Batch, c: Coefficients, normalize, scope: str, exclude: bool = False) -> torch.Tensor:
    """The formulas, one response and one token at a time."""

    def mean(values: list[torch.Tensor]) -> torch.Tensor:
        return sum(values) / len(values)

    responses = [i for i in range(5) if not (exclude and batch.constant[i])]
    n_tokens = sum(int(batch.mask[batch.tokens(i)].sum()) for i in responses)
    loss = torch.zeros((), dtype=torch.float64)
    for i in responses:
        t, a = batch.tokens(i), batch.advantages[i]
        rows = [
            (batch.logp[j], batch.old_logp[j], batch.entropy[j], kind)
            for j, kind in enumerate("".join(batch.kinds)[t], start=t.start)
            if kind in "mtc"
        ]
        policy = []
        for logp, old, _, _ in rows:
            ratio = (logp - old).exp()
            policy.append(-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a))
        reply = [e for *_, e, kind in rows]
        chosen = {"think": "t", "mode": "m", "blend": "m", "reply": "mtc"}[scope]
        inside = [e for *_, e, kind in rows if kind in chosen]
        if scope == "blend":
            h = 0.5 * mean(inside) + 0.5 * mean(reply) if inside else mean(reply)
        else:
            h = mean(inside) if inside else None
        beta = 0.0
        if h is not None and batch.flags[i] == 1:
            beta = c.beta_short if h.item() <= c.target_short else 0.0
        elif h is not None and batch.flags[i] == 0:
            beta = c.beta_long if h.item() <= c.target_long else 0.0
        bonus = beta * h if beta else 0.0
        if normalize == "sequences":
            loss = loss + (mean(policy) - bonus) / len(responses)
        else:
            loss = loss + (sum(policy) - len(rows) * bonus) / (
                n_tokens if normalize == "tokens" else normalize
            )
    return loss


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("normalize", ["tokens", "sequences", 40.0])
@pytest.mark.parametrize("scope", SCOPES)
def test_loss_and_both_gradients_are_the_formulas(objective, scope, normalize, exclude):
    batch = Batch()
    expected = reference(batch, GATED, normalize, scope, exclude)
    option = "exclude" if exclude else "entropy"
    (result,) = batch.run(objective, GATED, scope=scope, normalize=normalize, constant_groups=option)
    # float64 throughout, sums of 25 terms below 1: rounding stays below 1e-14.
    torch.testing.assert_close(result.loss, expected, atol=1e-13, rtol=0)
    want = batch.gradients(expected)
    for g, w in zip(batch.gradients(result.loss), want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-13, rtol=0)
    assert want[1].abs().max() > 0


def test_entropy_term_moves_the_logits_and_raises_the_entropy(objective):
    """Through the real op: with zero advantages, one step down the loss must raise the entropy."""
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    target = torch.tensor([1, 2, 3, 4])

    def run(values: torch.Tensor):
        logp, entropy = logits_logp_entropy(values, target)
        return entropy, objective.policy_objective(
            logp, logp.detach(), entropy, torch.zeros(1), torch.tensor([0, 4], dtype=torch.int32),
            torch.ones(4, dtype=torch.bool), torch.tensor([0]), Coefficients(0.0, 0.1, 0.0, OPEN),
            objective.LossSettings(),
        )  # fmt: skip

    before, result = run(logits)
    (gradient,) = torch.autograd.grad(result.loss, logits)
    assert (gradient.abs().amax(dim=1) > 0).all(), "every token's entropy must carry gradient"
    after, _ = run((logits - gradient).detach())
    assert after.mean() > before.mean()


@pytest.mark.parametrize("scope", SCOPES)
def test_entropy_gradient_is_minus_beta_times_the_tokens_weight(objective, scope):
    batch = Batch()
    (result,) = batch.run(objective, Coefficients(0.0, 0.25, SHUT, OPEN), scope=scope, normalize="sequences")
    gradient = batch.gradients(result.loss)[1][batch.tokens(1)]
    weights = {  # of the tokens m t t c (tool output) m t c: 7 trained, 2 mode tags, 3 of thinking
        "reply": {"m": 1 / 7, "t": 1 / 7, "c": 1 / 7},
        "think": {"t": 1 / 3},
        "mode": {"m": 1 / 2},
        "blend": {"m": 0.5 / 2 + 0.5 / 7, "t": 0.5 / 7, "c": 0.5 / 7},
    }[scope]
    expected = [-0.25 / 5 * weights.get(kind, 0.0) for kind in batch.kinds[1]]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("flag", [0, 1])
def test_gate_is_inclusive(objective, scope, flag):
    """A response whose entropies all equal the target, in float32, where 0.2 has no exact value."""
    batch = Batch(torch.float32)
    batch.entropy = torch.full_like(batch.entropy, 0.2).requires_grad_()
    batch.is_short = torch.full((5,), flag)
    batch.think_mask = batch.mask
    for target, is_open in ((0.2, True), (math.nextafter(0.2, 0) - 1e-7, False)):
        (result,) = batch.run(objective, Coefficients(0.1, 0.1, target, target), scope=scope)
        gradient = batch.gradients(result.loss)[1]
        assert bool((gradient != 0).any()) == is_open
        share = result.stats.long_open + result.stats.short_open
        defined = result.stats.long_count + result.stats.short_count
        assert share == (defined if is_open else 0)


def test_class_is_the_mode_flag_not_the_length(objective):
    batch = Batch()
    batch.is_short = torch.tensor([0, 1, -1, 1, 0])  # now the two long texts carry the short flag
    (result,) = batch.run(objective, Coefficients(0.0, 0.1, OPEN, OPEN))
    gradient = batch.gradients(result.loss)[1]
    touched = [bool((gradient[batch.tokens(i)] != 0).any()) for i in range(5)]
    assert touched == [True, False, False, False, True]


def test_malformed_responses_have_no_entropy_term_and_are_in_neither_set(objective):
    batch = Batch()
    batch.is_short = torch.full((5,), -1)
    (result,) = batch.run(objective, Coefficients(0.3, 0.3, OPEN, OPEN))
    assert not batch.gradients(result.loss)[1].any()
    assert result.stats.long_count == result.stats.short_count == 0
    assert result.stats.all_count == 5
    assert batch.gradients(result.loss)[0].any(), "their policy gradient stays"


@pytest.mark.parametrize("scope", SCOPES)
def test_prompt_and_tool_tokens_enter_no_mean(objective, scope):
    batch = Batch()
    (clean,) = batch.run(objective, GATED, scope=scope)
    clean_gradients = batch.gradients(clean.loss)
    with torch.no_grad():
        batch.entropy[~batch.mask] = 1e3
        batch.logp[~batch.mask] = -1e3
    batch.mode_mask |= ~batch.mask
    batch.think_mask |= ~batch.mask
    (dirty,) = batch.run(objective, GATED, scope=scope)
    assert torch.equal(dirty.loss, clean.loss)
    assert torch.equal(dirty.sequence_entropy, clean.sequence_entropy)
    assert dirty.stats == clean.stats
    assert dirty.metrics == clean.metrics
    for before, after in zip(clean_gradients, batch.gradients(dirty.loss), strict=True):
        assert torch.equal(before, after)
        assert not after[~batch.mask].any()


def test_sequence_entropy_is_the_mean_over_sampled_tokens(objective):
    batch = Batch(torch.float32)
    (result,) = batch.run(objective, Coefficients(0.0, 0.1, OPEN, OPEN))
    for i in range(5):
        t = batch.tokens(i)
        expected = batch.entropy[t][batch.mask[t]].double().mean()
        # Both round the exact mean to float32 once.
        torch.testing.assert_close(result.sequence_entropy[i].double(), expected, atol=0, rtol=2**-23)
    kernel = objective.policy_loss(
        batch.logp,
        batch.old_logp,
        batch.entropy,
        batch.advantages,
        batch.cu_seqlens,
        batch.mask,
        batch.is_short,
    )
    assert torch.equal(kernel.sequence_entropy, result.sequence_entropy)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("scope", ["reply", "mode"])
def test_log_ratio_is_masked_before_exp(objective, scope, sign):
    """exp(300) is inf in float32; on tokens that do not count it must stay out of loss and gradients."""
    batch = Batch(torch.float32)
    batch.advantages = torch.full((5,), sign)
    batch.old_logp[~batch.mask] = -300.0
    (result,) = batch.run(objective, Coefficients(0.0, 0.1, OPEN, OPEN), scope=scope)
    assert result.loss.isfinite()
    assert all(math.isfinite(value) for value in result.metrics.values())
    for gradient in batch.gradients(result.loss):
        assert gradient.isfinite().all()
        assert not gradient[~batch.mask].any()


def test_constant_groups_keep_their_entropy_term_alone_by_default(objective):
    batch = Batch()
    c = Coefficients(0.0, 0.1, OPEN, OPEN)
    third = batch.tokens(3)  # long, advantage 0
    (kept,) = batch.run(objective, c)
    d_logp, d_entropy = batch.gradients(kept.loss)
    assert not d_logp[third].any()
    assert d_entropy[third].any()
    (excluded,) = batch.run(objective, c, constant_groups="exclude")
    d_logp, d_entropy = batch.gradients(excluded.loss)
    assert not d_logp[third].any()
    assert not d_entropy[third].any()
    n_excluded = int(batch.mask[third].sum())
    assert excluded.metrics["tokens/trained"] == kept.metrics["tokens/trained"] - n_excluded
    assert excluded.stats == kept.stats, "the controller measures every response"


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalize", ["tokens", "sequences", 40.0])
def test_all_groups_constant_give_a_differentiable_zero(objective, scope, normalize):
    batch = Batch()
    batch.advantages = torch.zeros(5, dtype=torch.float64)
    batch.constant = torch.ones(5, dtype=torch.bool)
    for option, c in (
        ("exclude", Coefficients(0.1, 0.1, OPEN, OPEN)),
        ("entropy", Coefficients(0, 0, 0.1, 0.2)),
    ):
        (result,) = batch.run(objective, c, scope=scope, normalize=normalize, constant_groups=option)
        assert result.loss == 0
        assert result.loss.requires_grad
        for gradient in batch.gradients(result.loss):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("normalize", ["tokens", "sequences", 40.0])
@pytest.mark.parametrize("scope", SCOPES)
def test_micro_batches_of_whole_responses_add_up(objective, scope, normalize, exclude):
    batch = Batch()
    options = {"scope": scope, "normalize": normalize, "constant_groups": "exclude" if exclude else "entropy"}
    (whole,) = batch.run(objective, GATED, **options)
    left_out = batch.constant if exclude else torch.zeros(5, dtype=torch.bool)
    n_tokens = sum(int(batch.mask[batch.tokens(i)].sum()) for i in range(5) if not left_out[i])
    parts = batch.run(
        objective,
        GATED,
        ((0, 1), (1, 3), (3, 4), (4, 5)),
        **options,
        n_tokens_global=n_tokens,
        n_sequences_global=5 - int(left_out.sum()),
    )
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss, atol=1e-13, rtol=0)
    for got, want in zip(batch.gradients(total), batch.gradients(whole.loss), strict=True):
        torch.testing.assert_close(got, want, atol=1e-13, rtol=0)
    stats = sum((part.stats for part in parts), EntropyStats())
    assert dataclasses.astuple(stats) == pytest.approx(dataclasses.astuple(whole.stats), abs=1e-12)
    # Metrics leave policy_loss in float32.
    assert objective.merge_metrics([part.metrics for part in parts]) == pytest.approx(whole.metrics, rel=1e-5)


def test_metrics_add_up_to_the_loss_and_count_the_tokens(objective):
    batch = Batch()
    for scope in SCOPES:
        (result,) = batch.run(objective, GATED, scope=scope)
        # The two parts are float32.
        parts = result.metrics["loss/policy"] + result.metrics["loss/entropy"]
        assert result.loss.item() == pytest.approx(parts, abs=1e-6)
        assert result.metrics["tokens/trained"] == int(batch.mask.sum())


def test_stats_of_the_batch(objective):
    batch = Batch()
    (result,) = batch.run(objective, GATED)
    h = result.sequence_entropy.tolist()
    stats = result.stats
    assert (stats.long_count, stats.short_count, stats.all_count) == (2, 2, 5)
    assert stats.long_sum == pytest.approx(h[1] + h[3])
    assert stats.short_sum == pytest.approx(h[0] + h[4])
    assert stats.all_sum == pytest.approx(sum(h))
    assert (stats.long_open, stats.short_open) == (1, 1)
    tags = batch.entropy[batch.mode_mask]
    assert stats.mode_count == 5
    assert stats.mode_sum == pytest.approx(tags.sum().item())


def test_scope_without_tokens_in_a_response_leaves_that_response_out(objective):
    batch = Batch()
    c = Coefficients(0.1, 0.1, OPEN, OPEN)
    (think,) = batch.run(objective, c, scope="think")
    assert think.stats.short_count == 0, "short replies hold no thinking"
    assert not batch.gradients(think.loss)[1][batch.tokens(0)].any()
    (mode,) = batch.run(objective, c, scope="mode")
    assert mode.stats.long_count == 1, "a forced tag was not sampled"
    (blend,) = batch.run(objective, c, scope="blend")
    assert blend.stats.long_count == 2, "blend falls back to the reply"


def test_evaluating_the_objective_does_not_move_the_controller(objective):
    controller = EntropyController()
    batch = Batch()
    batch.run(objective, coefficients(controller))
    assert controller == EntropyController()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"scope": "think", "think_mask": None}, ValueError, "think_mask"),
        ({"scope": "blend", "mode_mask": None}, ValueError, "mode_mask"),
        ({"constant_groups": "exclude", "constant": None}, ValueError, "constant"),
    ],
)
def test_missing_inputs_are_named(objective, options, error, match):
    batch = Batch()
    settings = objective.LossSettings(**{k: v for k, v in options.items() if isinstance(v, str)})
    with pytest.raises(error, match=match):
        objective.policy_objective(
            batch.logp, batch.old_logp, batch.entropy, batch.advantages, batch.cu_seqlens, batch.mask,
            batch.is_short, Coefficients(0, 0, 0, 0), settings,
        )  # fmt: skip


@pytest.mark.parametrize("setting", [{"scope": "replies"}, {"constant_groups": "drop"}])
def test_unknown_settings_are_named(objective, setting):
    with pytest.raises(UserError, match=next(iter(setting.values()))):
        objective.LossSettings(**setting)


def test_advantages_are_standardised_per_group(objective):
    rewards = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.5, 0.5, 0.5, -1.0])
    advantages, constant = objective.group_advantages(rewards, 4)
    for g in range(2):
        group = rewards[4 * g : 4 * g + 4].double()
        expected = (group - group.mean()) / group.std()  # torch's std is the unbiased one
        torch.testing.assert_close(advantages[4 * g : 4 * g + 4], expected.float(), rtol=1e-6, atol=1e-7)
    assert not constant.any()
    centred, _ = objective.group_advantages(rewards, 4, scale="none")
    torch.testing.assert_close(centred[:4], rewards[:4], rtol=0, atol=1e-7)


def test_groups_may_be_ids_in_any_order(objective):
    rewards = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.5, 1.0])
    ids = torch.tensor([7, 7, 7, 3, 3, 3])
    order = torch.tensor([3, 0, 4, 1, 5, 2])
    straight = objective.group_advantages(rewards, 3)
    shuffled = objective.group_advantages(rewards[order], ids[order])
    torch.testing.assert_close(shuffled.advantages, straight.advantages[order])


@pytest.mark.parametrize("value", [0.1, 0.7, -1.5, 1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 7, 8, 24])
def test_equal_rewards_give_exactly_zero_advantage(objective, value, dtype, size):
    advantages, constant = objective.group_advantages(torch.full((2 * size,), value, dtype=dtype), size)
    assert constant.all()
    assert torch.equal(advantages, torch.zeros(2 * size))


def test_rewards_equal_up_to_rounding_are_constant(objective):
    rewards = torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.3], dtype=torch.float64)
    assert rewards.std() > 0
    advantages, constant = objective.group_advantages(rewards, 4)
    assert constant.all()
    assert not advantages.any()


def test_one_constant_group_leaves_the_others_alone(objective):
    rewards = torch.tensor([0.5, 0.5, 1.0, -1.0])
    advantages, constant = objective.group_advantages(rewards, 2)
    assert constant.tolist() == [True, True, False, False]
    assert advantages.tolist() == pytest.approx([0, 0, 2**-0.5, -(2**-0.5)])


def test_advantages_do_not_depend_on_the_unit_of_reward(objective):
    rewards = torch.tensor([1.0, 0.5, -0.5, -1.0, -1.5, 1.0])
    plain = objective.group_advantages(rewards, 6).advantages
    torch.testing.assert_close(objective.group_advantages(rewards * 1e-3 + 5, 6).advantages, plain,
                               rtol=1e-3, atol=1e-3)  # fmt: skip  # float32 keeps 5.001 to 5e-7


@pytest.mark.parametrize(
    ("rewards", "groups"),
    [([1.0, 2.0, 3.0], 2), ([1.0, math.nan], 2), ([[1.0]], 1), ([1.0], torch.tensor([1, 2])), ([1.0], 0)],
)
def test_bad_groups_are_refused(objective, rewards, groups):
    with pytest.raises(ValueError, match=r"must|divide"):
        objective.group_advantages(torch.tensor(rewards), groups)


@pytest.mark.parametrize("spread", [0.5, 6.0])
@pytest.mark.parametrize("normalize", ["tokens", "sequences", 7.0])
def test_capped_old_log_probs_weight_each_token_by_its_truncated_ratio(objective, normalize, spread):
    batch, cap = Batch(), 2.0
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch.logp.shape, generator=generator, dtype=torch.float64)
    sampler_logp = batch.logp.detach() + spread * noise
    sampler_logp[::5] = batch.logp.detach()[::5] - math.log(cap)  # right at the cap
    batch.old_logp = objective.capped_old_logp(batch.logp, sampler_logp, cap)
    no_bonus = GATED._replace(beta_short=0.0, beta_long=0.0)
    (result,) = batch.run(objective, no_bonus, clip_low=1.0, clip_high=cap, normalize=normalize)
    result.loss.backward()

    logp = batch.logp.detach().requires_grad_()
    weight = (logp.detach() - sampler_logp).exp().clamp(max=cap)
    lengths = batch.cu_seqlens.diff().long()
    advantage = batch.advantages.repeat_interleave(lengths)
    counts = torch.stack([batch.mask[batch.tokens(i)].sum() for i in range(5)])
    share = {
        "tokens": torch.ones(5, dtype=torch.float64) / counts.sum(),
        "sequences": 1 / (5 * counts.double()),
        7.0: torch.ones(5, dtype=torch.float64) / 7.0,
    }[normalize].repeat_interleave(lengths)
    policy = -(share * weight * advantage * batch.mask)
    (policy * logp).sum().backward()
    torch.testing.assert_close(batch.logp.grad, logp.grad, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(result.loss.detach(), policy.sum(), rtol=1e-13, atol=1e-15)
    assert result.metrics["clip/low"] == result.metrics["clip/high"] == 0
    capped = weight[batch.mask] == cap
    assert capped.any()
    assert not capped.all()


def test_mismatch_metrics_are_those_of_the_ratio(objective):
    sampler_logp = torch.tensor([-1.0, -2.0, -3.0, -0.5], dtype=torch.float32)
    ratio = torch.tensor([1.0, 2.5, 0.25, 1.5], dtype=torch.float64)
    logp = (sampler_logp.double() + ratio.log()).requires_grad_()
    metrics = objective.mismatch_metrics(logp, sampler_logp, 2.0)
    assert metrics["mismatch/capped"] == 0.25
    assert metrics["mismatch/kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()), rel=1e-12)
