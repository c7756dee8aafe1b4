"""Call comparison: what is one answer and what is another."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotool_fast.matching import calls_match, canonical_json


def call(name: str, **arguments: object) -> SimpleNamespace:
    return SimpleNamespace(name=name, arguments=arguments)


def test_three_equals_three_point_zero_only_when_normalised():
    assert calls_match([call("submit", value=3.0)], [call("submit", value=3)])
    assert not calls_match([call("submit", value=3.0)], [call("submit", value=3)], strict=True)


def test_numbers_are_joined_at_any_depth():
    assert calls_match([call("f", a=[{"b": [1.0, 2]}])], [call("f", a=[{"b": [1, 2.0]}])])
    assert not calls_match([call("f", a=[{"b": [1.0, 2]}])], [call("f", a=[{"b": [1, 2.0]}])], strict=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("left", "right"), [(True, 1), (False, 0), (True, 1.0), ("3", 3), (None, 0), ("", None)]
)
def test_values_of_different_json_types_never_match(left, right, strict):
    assert not calls_match([call("f", x=left)], [call("f", x=right)], strict=strict)
    assert not calls_match([call("f", x=[left])], [call("f", x=[right])], strict=strict)


def test_call_order_is_free_and_counts_matter():
    calls = [
        call("set", item="lamp", value=3),
        call("set", item="fan", value=4),
        call("set", item="fan", value=4),
    ]
    for order in itertools.permutations(calls):
        assert calls_match(order, calls)
    assert not calls_match(calls[:2], calls)
    assert not calls_match([calls[0], calls[0], calls[1]], calls)


def test_key_order_is_free_and_array_order_is_not():
    assert calls_match([call("f", a=1, b=2)], [call("f", b=2, a=1)])
    assert not calls_match([call("pick", cups=[1, 2])], [call("pick", cups=[2, 1])])


def test_name_and_argument_set_must_agree():
    assert not calls_match([call("f", a=1)], [call("g", a=1)])
    assert not calls_match([call("f", a=1, b=None)], [call("f", a=1)])
    assert not calls_match([call("f")], [])
    assert calls_match([], [])


def test_large_integers_are_not_rounded_through_float():
    assert not calls_match([call("f", x=2**53 + 1)], [call("f", x=float(2**53))])
    assert calls_match([call("f", x=2**53)], [call("f", x=float(2**53))])


def test_negative_zero_is_zero_when_normalised():
    assert calls_match([call("f", x=-0.0)], [call("f", x=0)])


def test_an_argument_equal_to_its_default_counts_as_absent_when_defaults_are_given():
    defaults = {"search": {"limit": 10, "unit": "C"}}
    assert not calls_match([call("search", q="a", limit=10.0)], [call("search", q="a")])
    assert calls_match([call("search", q="a", limit=10.0)], [call("search", q="a")], defaults=defaults)
    assert not calls_match([call("search", q="a", limit=9)], [call("search", q="a")], defaults=defaults)
    assert not calls_match(
        [call("search", q="a", limit=10.0)], [call("search", q="a")], strict=True, defaults=defaults
    )


def test_model_output_cannot_crash_the_comparison():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    assert not calls_match([call("f", x=deep)], [call("f", x=[])])
    assert not calls_match([call("f", x=json.loads("1e999"))], [call("f", x=1)])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def equal(left: object, right: object, strict: bool) -> bool:
    """Independent statement of equality: structural recursion with explicit type rules."""
    if isinstance(left, bool) or isinstance(right, bool):
        return isinstance(left, bool) and isinstance(right, bool) and left == right
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        if strict:
            return type(left) is type(right) and repr(left) == repr(right)
        return left == right
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(equal(a, b, strict) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k], strict) for k in left)
    return type(left) is type(right) and left == right


@given(json_values, json_values, st.booleans())
def test_canonical_text_decides_equality_as_the_structural_definition_does(left, right, strict):
    for a, b in ((left, right), (left, json.loads(json.dumps(left)))):
        assert (canonical_json(a, strict=strict) == canonical_json(b, strict=strict)) == equal(a, b, strict)
