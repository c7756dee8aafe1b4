"""Stage 1 labels from success counts."""

from __future__ import annotations

import pytest

from autotool_fast.errors import UserError
from autotool_fast.labeling import Outcome, label, label_table


@pytest.mark.parametrize(
    ("no_think", "think", "expected"),
    [(1, 0, "short"), (8, 8, "short"), (0, 1, "long"), (0, 8, "long"), (0, 0, "drop")],
)
def test_any_of_k_takes_one_success(no_think, think, expected):
    assert label(no_think, think, 8, "any") == expected


@pytest.mark.parametrize(
    ("no_think", "think", "expected"),
    [(4, 0, "short"), (3, 8, "long"), (3, 1, "long"), (3, 0, "drop"), (0, 0, "drop"), (8, 0, "short")],
)
def test_threshold_is_inclusive_and_sends_lucky_prompts_to_thinking(no_think, think, expected):
    assert label(no_think, think, 8, "threshold", 0.5) == expected


def test_threshold_of_one_needs_every_sample():
    assert label(7, 8, 8, "threshold", 1.0) == "long"
    assert label(8, 8, 8, "threshold", 1.0) == "short"


def test_rules_agree_at_the_smallest_threshold():
    for no_think in range(9):
        for think in range(9):
            assert label(no_think, think, 8, "any") == label(no_think, think, 8, "threshold", 1 / 8)


@pytest.mark.parametrize(("rule", "threshold"), [("mean", 0.5), ("threshold", 0.0), ("threshold", 1.5)])
def test_bad_settings_are_named(rule, threshold):
    with pytest.raises(UserError, match=r"label\."):
        label(1, 1, 8, rule, threshold)


@pytest.mark.parametrize(("no_think", "think", "k"), [(9, 0, 8), (0, 9, 8), (-1, 0, 8), (0, 0, 0)])
def test_impossible_counts_are_refused(no_think, think, k):
    with pytest.raises(ValueError, match="counts"):
        label(no_think, think, k)


def test_table_counts_labels_and_success_by_difficulty():
    outcomes = [
        Outcome(difficulty=4, no_think_correct=1, think_correct=8, k=8),
        Outcome(difficulty=0, no_think_correct=8, think_correct=8, k=8),
        Outcome(difficulty=4, no_think_correct=0, think_correct=0, k=8),
    ]
    easy, hard, total = label_table(outcomes, "threshold", 0.5)
    assert (easy.difficulty, easy.prompts, easy.short, easy.long, easy.drop) == (0, 1, 1, 0, 0)
    assert (hard.difficulty, hard.prompts, hard.short, hard.long, hard.drop) == (4, 2, 0, 1, 1)
    assert (total.difficulty, total.prompts, total.short, total.long, total.drop) == (None, 3, 1, 1, 1)
    assert hard.no_think_accuracy == 1 / 16
    assert hard.think_accuracy == 0.5
    assert (hard.no_think_pass, hard.think_pass) == (0.5, 0.5)
    assert hard.share("long") == 0.5
    assert label_table(outcomes, "any")[1].short == 1


def test_table_of_nothing_is_empty():
    assert label_table([]) == []


def test_threshold_is_exact_where_its_product_with_k_rounds_up():
    assert 0.28 * 25 > 7
    assert label(7, 0, 25, "threshold", 0.28) == "short"
