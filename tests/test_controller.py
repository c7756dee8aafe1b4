"""The entropy coefficients: five arms, their updates and targets.

Tests take the module as the fixture `controller`: test_mutations.py runs them on broken copies of it.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

import autotool_fast.controller as controller_module
from autotool_fast.errors import UserError

ARMS = ("none", "fixed", "adaptive", "decoupled-fixed", "decoupled")


@pytest.fixture
def controller():
    return controller_module


def stats(controller, long=(), short=()):
    return controller.EntropyStats(
        long_sum=sum(long), long_count=len(long), short_sum=sum(short), short_count=len(short)
    )


def make(controller, arm="decoupled", **values):
    return controller.EntropyController(arm=arm, **values)


def test_coefficients_of_every_arm(controller):
    values = {"beta_short": 0.03, "beta_long": 0.05, "target_short": 0.1, "target_long": 0.2}
    expected = {
        "none": (0.0, 0.0, 0.1, 0.2),
        "fixed": (0.05, 0.05, math.inf, math.inf),
        "adaptive": (0.05, 0.05, 0.2, 0.2),
        "decoupled-fixed": (0.03, 0.05, 0.1, 0.2),
        "decoupled": (0.03, 0.05, 0.1, 0.2),
    }
    for arm in ARMS:
        assert tuple(controller.coefficients(make(controller, arm, **values))) == expected[arm]


def test_defaults_are_the_papers(controller):
    state = controller.EntropyController()
    assert state.arm == "decoupled"
    assert tuple(controller.coefficients(state)) == (0.0, 1e-2, 0.1, 0.2)


def test_beta_long_integrates_the_missing_entropy_of_long_responses_only(controller):
    state = make(controller, beta_long=0.05, beta_lr=0.1)
    after = controller.update(state, stats(controller, long=[0.1, 0.15], short=[9.0]))
    assert after.beta_long == pytest.approx(0.05 + 0.1 * (0.2 - 0.125), rel=1e-12)
    assert dataclasses.replace(after, beta_long=0.05) == state, "nothing else moves"


def test_beta_long_rises_below_the_target_and_falls_above(controller):
    state = make(controller, beta_long=0.05)
    assert controller.update(state, stats(controller, long=[0.19])).beta_long > 0.05
    assert controller.update(state, stats(controller, long=[0.21])).beta_long < 0.05
    assert controller.update(state, stats(controller, long=[0.2])).beta_long == 0.05


@pytest.mark.parametrize("arm", ARMS)
def test_nothing_moves_without_responses_to_measure(controller, arm):
    state = make(controller, arm, beta_long=0.05)
    assert controller.update(state, stats(controller)) == state
    if arm != "adaptive":
        assert controller.update(state, stats(controller, short=[0.0, 5.0])) == state


@pytest.mark.parametrize("arm", ["adaptive", "decoupled"])
def test_coefficient_stays_within_zero_and_beta_max(controller, arm):
    high = make(controller, arm, beta_long=0.3, beta_max=0.3, beta_lr=10.0, delta=0.2)
    assert controller.update(high, stats(controller, long=[0.0])).beta_long == 0.3
    low = dataclasses.replace(high, beta_long=0.0)
    assert controller.update(low, stats(controller, long=[5.0])).beta_long == 0.0


@pytest.mark.parametrize("arm", ["none", "fixed", "decoupled-fixed"])
def test_constant_arms_never_move(controller, arm):
    state = make(controller, arm)
    assert controller.update(state, stats(controller, long=[0.0], short=[0.0])) == state


def test_single_coefficient_steps_by_delta_towards_its_target_on_the_mean_of_both_classes(controller):
    state = make(controller, "adaptive", beta_long=0.05, delta=0.004)
    low, high = stats(controller, [0.3], [0.0, 0.0]), stats(controller, [0.3], [0.3])
    assert controller.update(state, low).beta_long == pytest.approx(0.054)
    assert controller.update(state, high).beta_long == pytest.approx(0.046)
    exactly = stats(controller, [0.2])
    assert controller.update(state, exactly).beta_long == pytest.approx(0.054), "at the target it rises"


def test_sums_over_micro_batches_and_ranks_decide_not_means_of_means(controller):
    state = make(controller, beta_long=0.05, beta_lr=0.1)
    parts = [stats(controller, [0.4]), stats(controller, [0.1, 0.1, 0.1]), stats(controller, [], [3.0])]
    joined = parts[0] + parts[1] + parts[2]
    after = controller.update(state, joined)
    assert after.beta_long == pytest.approx(0.05 + 0.1 * (0.2 - 0.7 / 4), rel=1e-12)
    assert joined == parts[2] + parts[0] + parts[1]
    assert controller.EntropyStats(*dataclasses.astuple(joined)) == joined


def test_updating_leaves_the_state_it_was_given(controller):
    state = make(controller, beta_long=0.05)
    controller.update(state, stats(controller, long=[0.0]))
    assert state.beta_long == 0.05
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.beta_long = 1.0


@pytest.mark.parametrize("arm", ARMS)
def test_state_survives_a_checkpoint(controller, arm):
    state = make(controller, arm, beta_short=0.02, beta_long=0.07)
    state = controller.update(state, stats(controller, [0.05], [0.01]))
    assert controller.EntropyController.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_non_finite_entropy_is_refused_rather_than_clamped(controller):
    with pytest.raises(ValueError, match="finite"):
        controller.update(make(controller), stats(controller, long=[math.nan]))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"arm": "decoupeld"}, "arm"),
        ({"beta_long": -0.1}, "rl.beta_long"),
        ({"target_long": math.nan}, "rl.target_long"),
        ({"beta_long": 0.6, "beta_max": 0.5}, "rl.beta_long"),
    ],
)
def test_bad_values_are_named(controller, values, name):
    with pytest.raises(UserError) as caught:
        controller.EntropyController(**values)
    assert str(caught.value).startswith(f"{name}:")


def test_absolute_targets_are_taken_as_given(controller):
    measured = stats(controller, [0.5], [0.5])
    assert controller.resolve_targets("absolute", target_short=0.1, target_long=0.3, measured=measured) == (
        0.1,
        0.3,
    )


def test_relative_targets_follow_the_measured_entropies(controller):
    measured = stats(controller, long=[0.06, 0.04], short=[0.01])
    short, long = controller.resolve_targets("relative", ratio=1.5, measured=measured)
    assert (short, long) == pytest.approx((0.015, 0.075))


def test_relative_short_target_falls_back_when_no_short_response_was_sampled(controller):
    short, long = controller.resolve_targets(
        "relative", target_short=0.1, ratio=2.0, measured=stats(controller, long=[0.1])
    )
    assert (short, long) == pytest.approx((0.1, 0.2))


@pytest.mark.parametrize("measured", [None, (1.0,)])
def test_relative_target_needs_long_responses(controller, measured):
    measured = None if measured is None else stats(controller, short=measured)
    with pytest.raises(UserError, match="no long response"):
        controller.resolve_targets("relative", measured=measured)


def test_metrics_leave_out_what_was_not_measured(controller):
    values = controller.EntropyStats(long_sum=0.6, long_count=3, long_open=1).metrics()
    assert values == pytest.approx({"entropy/long": 0.2, "gate/long": 1 / 3})


def test_closed_loop_finds_the_coefficient_that_holds_the_target(controller):
    """A policy whose long entropy is 0.05 + 2 beta: the integrator must settle where that is 0.2."""
    state = make(controller, beta_long=0.0, beta_lr=0.1)
    for _ in range(200):
        state = controller.update(state, stats(controller, long=[0.05 + 2 * state.beta_long]))
    # The error shrinks by 1 - 0.2 per step: 0.8^200 is far below the tolerance.
    assert state.beta_long == pytest.approx(0.075, abs=1e-9)
