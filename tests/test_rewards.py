"""The reward table and the routing rule it implies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotool_fast.errors import UserError
from autotool_fast.rewards import (
    RewardTable,
    expected_rewards,
    reward,
    routing_regret,
)

DEFAULT = RewardTable()


@pytest.mark.parametrize(
    ("length_class", "correct", "value"),
    [(1, True, 1.0), (0, True, 0.5), (0, False, -0.5), (1, False, -1.0), (-1, True, -1.5), (-1, False, -1.5)],
)
def test_default_table_is_the_papers(length_class, correct, value):
    assert reward(length_class, correct, DEFAULT) == value


def test_added_format_term_keeps_the_answers_difference():
    table = RewardTable(format_mode="add", malformed=-1.0)
    assert reward(-1, True, table) == -0.5
    assert reward(-1, False, table) == -1.5
    for length_class in (0, 1):
        for correct in (False, True):
            assert reward(length_class, correct, table) == reward(length_class, correct, DEFAULT)


def test_unknown_length_class_is_a_bug_not_a_reward():
    with pytest.raises(ValueError, match="length_class"):
        reward(2, True, DEFAULT)


@pytest.mark.parametrize(
    "bad",
    [{"format_mode": "gated"}, {"malformed": math.nan}, {"correct_short": -1.0}, {"wrong_long": math.inf}],
)
def test_bad_tables_are_refused_in_the_users_words(bad):
    with pytest.raises(UserError) as caught:
        RewardTable(**bad)
    assert f"rl.{next(iter(bad))}" in str(caught.value)


def test_with_the_default_table_not_thinking_is_better_above_half_of_p_think_and_a_half():
    for p_think in np.linspace(0, 1, 11):
        threshold = (p_think + 0.5) / 2
        # A margin far above rounding and far below the spacing of the grid.
        short, long = expected_rewards(np.array([threshold - 1e-9, threshold + 1e-9]), p_think, DEFAULT)
        assert short[0] < long[0]
        assert short[1] > long[1]


probability = st.floats(0, 1)
amount = st.floats(-4, 4)


@given(probability, probability, amount, st.floats(0.1, 4), amount, amount)
def test_expected_rewards_are_those_of_the_two_outcomes(p_n, p_t, wrong_short, gap, correct_long, wrong_long):
    table = RewardTable(
        correct_short=wrong_short + gap,
        wrong_short=wrong_short,
        correct_long=correct_long,
        wrong_long=wrong_long,
    )
    short = p_n * reward(1, True, table) + (1 - p_n) * reward(1, False, table)
    long = p_t * reward(0, True, table) + (1 - p_t) * reward(0, False, table)
    # Values of size 4: a few ulp.
    np.testing.assert_allclose(expected_rewards(p_n, p_t, table), (short, long), atol=1e-14)


def test_regret_of_the_two_constant_policies_and_of_the_oracle():
    p_nothink, p_think = np.array([1.0, 0.1]), np.array([1.0, 0.9])
    # Task 0: 1.0 short against 0.5 long. Task 1: -0.8 short against 0.4 long.
    assert routing_regret([0, 1], p_nothink, p_think, DEFAULT) == 0.0
    assert routing_regret([1, 1], p_nothink, p_think, DEFAULT) == pytest.approx(0.25)
    assert routing_regret([0, 0], p_nothink, p_think, DEFAULT) == pytest.approx(0.6)
    assert routing_regret([0, 0], p_nothink, p_think, DEFAULT, weights=[3, 1]) == pytest.approx(0.3)


@given(st.lists(st.tuples(probability, probability, probability), min_size=1, max_size=5))
def test_regret_is_oracle_minus_policy_and_never_negative(rows):
    rate, p_n, p_t = (np.array(column) for column in zip(*rows, strict=True))
    short, long = expected_rewards(p_n, p_t, DEFAULT)
    regret = routing_regret(rate, p_n, p_t, DEFAULT)
    assert regret >= 0
    oracle, policy = np.maximum(short, long).mean(), (rate * long + (1 - rate) * short).mean()
    assert regret == pytest.approx(oracle - policy, abs=1e-12)
