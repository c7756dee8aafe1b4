"""The tests of the objective notice when a rule of the method is broken.

Each row breaks one rule in a copy of a module's source and names the test that must fail on the copy; the
same test passes on the untouched source. If a row no longer finds its text, point it at the new form of the
rule.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import autotool_kernels.policy
import pytest
import test_controller as controller_tests
import test_objective as objective_tests
from autotool_kernels import library

import autotool_fast.controller
import autotool_fast.objective
from autotool_fast.errors import UserError

KERNEL, OBJECTIVE, CONTROLLER = autotool_kernels.policy, autotool_fast.objective, autotool_fast.controller
ON_POLICY_RATIO = "torch.where(mask & (advantage != 0), logp.to(dtype) - old_logp.to(dtype), 0.0)"

MUTATIONS = {
    "entropy detached, reply": (
        KERNEL,
        "grad_entropy=(-weighted_beta)",
        "grad_entropy=(0 * weighted_beta)",
        objective_tests.test_entropy_term_moves_the_logits_and_raises_the_entropy,
        (),
    ),
    "entropy detached, other scopes": (
        OBJECTIVE,
        "weight * beta * h.mean * kept",
        "weight * beta * h.mean.detach() * kept",
        objective_tests.test_entropy_gradient_is_minus_beta_times_the_tokens_weight,
        ("mode",),
    ),
    "gate of long responses strict, reply": (
        KERNEL,
        "sequence_entropy <= gate[1]",
        "sequence_entropy < gate[1]",
        objective_tests.test_gate_is_inclusive,
        ("reply", 0),
    ),
    "gate of short responses strict, reply": (
        KERNEL,
        "sequence_entropy <= gate[0]",
        "sequence_entropy < gate[0]",
        objective_tests.test_gate_is_inclusive,
        ("reply", 1),
    ),
    "gate strict, other scopes": (
        OBJECTIVE,
        "h <= table[1]",
        "h < table[1]",
        objective_tests.test_gate_is_inclusive,
        ("blend", 0),
    ),
    "mask applied after exp": (
        KERNEL,
        f"log_ratio = {ON_POLICY_RATIO}",
        "log_ratio = logp.to(dtype) - old_logp.to(dtype)",
        objective_tests.test_log_ratio_is_masked_before_exp,
        ("reply", -1.0),
    ),
    "tool tokens in the mean, reply": (
        KERNEL,
        "counts = _segment_sum(mask, offsets)",
        "counts = _segment_sum(torch.ones_like(mask), offsets)",
        objective_tests.test_loss_and_both_gradients_are_the_formulas,
        ("reply", "sequences", False),
    ),
    "entropy of tool tokens in the mean, reply": (
        KERNEL,
        "token_entropy = torch.where(mask, entropy, 0.0)",
        "token_entropy = entropy",
        objective_tests.test_prompt_and_tool_tokens_enter_no_mean,
        ("reply",),
    ),
    "tool tokens in the mean, other scopes": (
        OBJECTIVE,
        'mean_over(mask & _required(mode_mask, "mode_mask", scope))',
        'mean_over(_required(mode_mask, "mode_mask", scope))',
        objective_tests.test_prompt_and_tool_tokens_enter_no_mean,
        ("mode",),
    ),
    "malformed responses counted as long": (
        OBJECTIVE,
        "members = (is_short == flag) & h.defined",
        "members = (is_short.clamp(min=0) == flag) & h.defined",
        objective_tests.test_malformed_responses_have_no_entropy_term_and_are_in_neither_set,
        (),
    ),
    "constant groups found by their deviation": (
        OBJECTIVE,
        'per_group(reward, "amax") - per_group(reward, "amin") <= tolerance',
        'per_group((reward - per_group(reward, "mean")).square(), "sum") == 0',
        objective_tests.test_equal_rewards_give_exactly_zero_advantage,
        (0.1, objective_tests.torch.float64, 3),
    ),
    "micro-batches normalised on their own": (
        OBJECTIVE,
        "normalize = max(float(n_tokens_global), 1.0)",
        'normalize = "tokens"',
        objective_tests.test_micro_batches_of_whole_responses_add_up,
        ("reply", "tokens", False),
    ),
    "beta_long moved on an empty long set": (
        CONTROLLER,
        "if not count:\n        return controller",
        "count = max(count, 1)",
        controller_tests.test_nothing_moves_without_responses_to_measure,
        ("decoupled",),
    ),
    "beta_long moved by short responses": (
        CONTROLLER,
        "total, count = stats.long_sum, stats.long_count",
        "total, count = stats.long_sum + stats.short_sum, stats.long_count + stats.short_count",
        controller_tests.test_beta_long_integrates_the_missing_entropy_of_long_responses_only,
        (),
    ),
    "beta_long moved the wrong way": (
        CONTROLLER,
        "step = controller.beta_lr * missing",
        "step = -controller.beta_lr * missing",
        controller_tests.test_beta_long_rises_below_the_target_and_falls_above,
        (),
    ),
    "coefficient not clamped": (
        CONTROLLER,
        "beta = min(max(controller.beta_long + step, 0.0), controller.beta_max)",
        "beta = controller.beta_long + step",
        controller_tests.test_coefficient_stays_within_zero_and_beta_max,
        ("decoupled",),
    ),
    "one coefficient for both classes in the decoupled arm": (
        CONTROLLER,
        "return Coefficients(c.beta_short, c.beta_long,",
        "return Coefficients(c.beta_long, c.beta_long,",
        controller_tests.test_coefficients_of_every_arm,
        (),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_rule_is_noticed(name, monkeypatch):
    module, old, new, check, arguments = MUTATIONS[name]
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{module.__name__} no longer reads {old!r} exactly once"
    mutant = types.ModuleType(module.__name__)
    mutant.__package__, mutant.__file__ = module.__package__, module.__file__
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, mutant)  # dataclasses look their module up
        exec(compile(source.replace(old, new), module.__file__, "exec"), mutant.__dict__)
    subject = CONTROLLER if module is CONTROLLER else OBJECTIVE
    check(subject, *arguments)
    if module is KERNEL:
        serve = library.implementation

        def implementation(op, *rest):
            return mutant.policy_forward if op == "policy_loss" else serve(op, *rest)

        monkeypatch.setattr(library, "implementation", implementation)
    else:
        subject = mutant
    with pytest.raises((AssertionError, UserError)):  # any other error: the copy does not even run
        check(subject, *arguments)
