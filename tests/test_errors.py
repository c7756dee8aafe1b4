"""What a user reads when something is wrong."""

from __future__ import annotations

import pytest

from autotool_fast.errors import UserError


@pytest.mark.parametrize(
    ("where", "remedy", "line"),
    [
        (None, None, "is wrong"),
        ("rl.lr", None, "rl.lr: is wrong"),
        (None, "change it", "is wrong; change it"),
        ("rl.lr", "change it", "rl.lr: is wrong; change it"),
    ],
)
def test_where_comes_first_and_the_remedy_last(where, remedy, line):
    assert str(UserError("is wrong", where=where, remedy=remedy)) == line


def test_a_reason_of_several_lines_becomes_one():
    assert str(UserError("the template fails: unexpected 'x'\n  line 3", where="a\nb")).splitlines() == [
        "a b: the template fails: unexpected 'x'   line 3"
    ]
