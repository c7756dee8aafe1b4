"""RL data refinement."""

from __future__ import annotations

import json

import numpy as np
import pytest

from autotool_fast.errors import UserError
from autotool_fast.refine import refine, reward_variance

RNG = np.random.default_rng(0)


def pool(n_easy: int, n_hard: int, n_rest: int, rounds: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Constant easy and hard prompts, then informative ones whose variance grows with their index."""
    n = n_easy + n_hard + n_rest
    success = np.r_[np.ones(n_easy), np.zeros(n_hard), np.full(n_rest, 0.5)]
    rewards = np.repeat(2 * success[:, None] - 1, rounds, axis=1)
    rewards[n_easy + n_hard :] += np.linspace(0.1, 1, n_rest)[:, None] * np.linspace(-1, 1, rounds)
    return rewards, success, np.repeat([0, 6, 3], [n_easy, n_hard, n_rest])[:n]


def test_variance_is_the_unbiased_one_over_rounds():
    rewards = RNG.normal(size=(5, 4))
    expected = [sum((r - sum(row) / 4) ** 2 for r in row) / 3 for row in rewards.tolist()]
    np.testing.assert_allclose(reward_variance(rewards), expected, rtol=1e-12)


def test_equal_floats_have_zero_variance():
    # The mean of three times 0.1 is not 0.1 in float64, so a variance computed from it is positive.
    assert np.full(3, 0.1).var(ddof=1) > 0
    assert reward_variance([[0.1, 0.1, 0.1]]) == 0.0


def test_half_of_the_too_easy_and_of_the_too_hard_go():
    rewards, success, difficulty = pool(10, 7, 8)
    result = refine(rewards, success, difficulty, seed=0, keep=1.0)
    assert result.report["dropped_too_easy"] == 5
    assert result.report["dropped_too_hard"] == 3
    assert result.report["dropped_variance"] == 0
    assert np.count_nonzero(success[result.kept] == 1) == 5
    assert np.count_nonzero(success[result.kept] == 0) == 4
    assert set(range(17, 25)) <= set(result.kept.tolist())


def test_only_exact_extremes_count_as_too_easy_or_too_hard():
    rewards, success, _ = pool(0, 0, 4)
    success[:] = [1.0, 1.0 - 1 / 24, 1 / 24, 0.0]
    result = refine(rewards, success, seed=0, drop_easy=1.0, drop_hard=1.0, keep=1.0)
    assert result.kept.tolist() == [1, 2]


def test_lowest_variance_is_kept():
    rewards, success, _ = pool(0, 0, 10)
    result = refine(rewards, success, seed=3, keep=0.3)
    assert result.kept.tolist() == [0, 1, 2]
    assert result.report["variance_limit"] == pytest.approx(reward_variance(rewards)[2])


def test_plain_ranking_prefers_constant_prompts_and_the_option_protects_informative_ones():
    rewards, success, _ = pool(8, 0, 8)
    plain = refine(rewards, success, seed=0, keep=0.5)
    assert plain.report["kept_constant"] == 4  # all survivors of the easy half
    assert plain.kept[plain.kept >= 8].tolist() == [8, 9]
    fair = refine(rewards, success, seed=0, keep=0.5, rank="informative")
    assert fair.report["kept_constant"] == 4
    assert fair.kept[fair.kept >= 8].tolist() == [8, 9, 10, 11]


def test_choice_depends_on_the_seed_alone():
    rewards, success, difficulty = pool(20, 20, 20)
    first, again = (refine(rewards, success, difficulty, seed=5) for _ in range(2))
    assert first.kept.tolist() == again.kept.tolist()
    assert first.report == again.report
    assert first.kept.tolist() != refine(rewards, success, difficulty, seed=6).kept.tolist()


def test_equal_variances_are_not_decided_by_pool_order():
    success = np.full(200, 0.5)
    kept = refine(np.zeros((200, 2)), success, seed=0, keep=0.5).kept
    # A fair draw of 100 of 200 has 50 +- 3.5 in the first half; taking the pool's order would give 100.
    assert 30 <= np.count_nonzero(kept < 100) <= 70


def test_report_adds_up_and_is_json():
    rewards, success, difficulty = pool(9, 9, 9)
    result = refine(rewards, success, difficulty, seed=1)
    report = json.loads(json.dumps(result.report))
    parts = report["by_difficulty"]
    assert set(parts) == {"0", "3", "6"}
    for name in ("pool", "kept", "dropped_too_easy", "dropped_too_hard", "dropped_variance", "kept_constant"):
        assert report[name] == sum(part[name] for part in parts.values())
    dropped = sum(report[f"dropped_{reason}"] for reason in ("too_easy", "too_hard", "variance"))
    assert report["pool"] == report["kept"] + dropped == 27
    assert len(result.kept) == report["kept"]
    assert (np.diff(result.kept) > 0).all()


def test_shares_count_whole_prompts_in_spite_of_float_products():
    # 0.29 * 100 is 28.999999999999996 and 0.07 * 100 is 7.000000000000001.
    rewards, success, _ = pool(100, 0, 0)
    assert refine(rewards, success, seed=0, drop_easy=0.29, keep=1.0).report["dropped_too_easy"] == 29
    rewards, success, _ = pool(0, 0, 100)
    assert len(refine(rewards, success, seed=0, keep=0.07).kept) == 7


@pytest.mark.parametrize(
    "options", [{"drop_easy": 1.5}, {"drop_hard": -0.1}, {"keep": 2.0}, {"rank": "best"}], ids=str
)
def test_bad_options_are_named(options):
    with pytest.raises(UserError, match=rf"refine\.{next(iter(options))}"):
        refine(np.zeros((2, 2)), [0.5, 0.5], seed=0, **options)


def test_one_round_has_no_variance():
    with pytest.raises(UserError, match="two rounds"):
        refine(np.zeros((2, 1)), [0.5, 0.5], seed=0)


@pytest.mark.parametrize(
    ("rewards", "success", "difficulty"),
    [
        (np.zeros((2, 2)), [0.5], None),
        (np.zeros((2, 2)), [0.5, 1.5], None),
        (np.zeros((2, 2)), [0.5, np.nan], None),
        (np.full((2, 2), np.nan), [0.5, 0.5], None),
        (np.zeros(2), [0.5, 0.5], None),
        (np.zeros((2, 2)), [0.5, 0.5], [1]),
    ],
)
def test_arrays_that_do_not_fit_are_refused(rewards, success, difficulty):
    with pytest.raises(ValueError, match="must"):
        refine(rewards, success, difficulty, seed=0)


def test_an_empty_pool_stays_empty():
    result = refine(np.zeros((0, 2)), np.zeros(0), np.zeros(0, int), seed=0)
    assert len(result.kept) == 0
    assert result.report["variance_limit"] is None
