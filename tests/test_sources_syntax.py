"""Call syntaxes: Python-call lists, JSON, Python literals, tagged blocks; and that nothing is ever evaluated."""

from __future__ import annotations

import json
from functools import partial

import pytest
from call_syntax import CALL_LISTS, JUNK, json_blocks, json_lines, json_list, python_list, repr_blocks
from hypothesis import example, given, settings

from autotool_fast.chat import ToolCall
from autotool_fast.tasks.example import read_call
from autotool_fast.tasks.sources.literal import MAX_DEPTH, clean, read_python, read_value, read_values
from autotool_fast.tasks.sources.pycalls import holds_calls, parse_calls
from autotool_fast.tasks.sources.rows import REASONS, RowError
from autotool_fast.tasks.sources.tagged import read_tagged


def reason(function, *args) -> str:
    with pytest.raises(RowError) as caught:
        function(*args)
    return caught.value.reason


def same(calls, expected) -> bool:
    """Equal, and with equal types of numbers at any depth."""
    return json.dumps([[c.name, c.arguments] for c in calls]) == json.dumps([[c.name, c.arguments] for c in expected])


# Round trips


@given(CALL_LISTS)
@settings(max_examples=100, deadline=None)
def test_python_call_lists_come_back_as_they_were_written(calls):
    assert same(parse_calls(python_list(calls), {call.name for call in calls}), calls)


@given(CALL_LISTS)
@settings(max_examples=80, deadline=None)
def test_json_and_python_literals_come_back_as_they_were_written(calls):
    for text in (json_list(calls), repr([{"name": c.name, "arguments": c.arguments} for c in calls])):
        assert same([read_call(value) for value in read_value(text)], calls)


@given(CALL_LISTS)
@settings(max_examples=80, deadline=None)
def test_tagged_blocks_come_back_as_they_were_written(calls):
    for text in (repr_blocks(calls), json_blocks(calls), json_lines(calls), f"First this. {json_blocks(calls)}"):
        assert same(read_tagged(text).calls, calls)


# Python-call lists


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("[Pool Temperature(pool_id=3)]", "Pool Temperature", {"pool_id": 3}),
        ("[a.b/c-d?|e(x=1)]", "a.b/c-d?|e", {"x": 1}),
        ("[Women's Shoes(size=38)]", "Women's Shoes", {"size": 38}),
        ("[f()]", "f", {}),
        ("[f( )]", "f", {}),
        (" [ f ( a = 1 , ) , ] \n", "f", {"a": 1}),
        ("f(a=1)", "f", {"a": 1}),
        ("[f(class='x', max-price=2, a b=3, x.y=4)]", "f", {"class": "x", "max-price": 2, "a b": 3, "x.y": 4}),
        ("[f('a,b'=1)]", "f", {"a,b": 1}),
        ("[f(a='x), g(b=\"y', c=[1, (2, 3)])]", "f", {"a": "x), g(b=\"y", "c": [1, [2, 3]]}),
        ("[f(d={'k': {'l': ')'}}, e=[{'m': '],'}])]", "f", {"d": {"k": {"l": ")"}}, "e": [{"m": "],"}]}),
        ("[f(a='b=c', d='it\\'s')]", "f", {"a": "b=c", "d": "it's"}),
        ("[f(a=-1.5e3, b=True, c=None)]", "f", {"a": -1500.0, "b": True, "c": None}),
        ("[f(d=true, e=null, g=[false])]", "f", {"d": True, "e": None, "g": [False]}),
        ("[f(a='one\ntwo', b='''x'\ny''')]", "f", {"a": "one\ntwo", "b": "x'\ny"}),
        ("[f(a='\\d+')]", "f", {"a": "\\d+"}),
        ("[f(a='\\ud83d\\ude00')]", "f", {"a": "😀"}),
    ],
)  # fmt: skip
def test_one_call_in_python_syntax(text, name, arguments):
    assert same(parse_calls(text), [ToolCall(name, arguments)])


def test_parallel_calls_keep_their_order():
    assert [c.name for c in parse_calls("[b(x=1), a(x='), c('),b ()]")] == ["b", "a", "b"]


def test_a_name_with_parentheses_is_read_when_it_is_on_offer():
    text = "[Lockers (new)(hall=1), Lockers (old) (hall=2)]"
    calls = parse_calls(text, ["Lockers", "Lockers (new)", "Lockers (old)"])
    assert [call.name for call in calls] == ["Lockers (new)", "Lockers (old)"]
    assert reason(parse_calls, text) == "positional_argument"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[f(3)]", "positional_argument"),
        ("[f(a=1, 3)]", "positional_argument"),
        ("[f(,)]", "positional_argument"),
        ("[f(**{'a': 1})]", "positional_argument"),
        ("[f(a=1, a=2)]", "duplicate_argument"),
        ("[f(=1)]", "unreadable_calls"),
        ("[f(a=b)]", "argument_not_literal"),
        ("[f(a=g(1))]", "argument_not_literal"),
        ("[f(a=1+1)]", "argument_not_literal"),
        ("[f(a=[x for x in y])]", "argument_not_literal"),
        ("[f(a=__import__('os').system('x'))]", "argument_not_literal"),
        ("[f(a=f'{b}')]", "argument_not_literal"),
        ("[f(a=)]", "argument_not_literal"),
        ("[f(a={1, 2})]", "not_json_value"),
        ("[f(a=b'x')]", "not_json_value"),
        ("[f(a=1+2j)]", "not_json_value"),
        ("[f(a=...)]", "not_json_value"),
        ("[f(a={1: 2})]", "non_string_key"),
        ("[f(a={'x': 1, 'x': 2})]", "duplicate_key"),
        ("[f(a=1e999)]", "non_finite_number"),
        ("[f(a=0x" + "f" * 900 + ")]", "non_finite_number"),
        ("[f(a='\\ud800')]", "lone_surrogate"),
        ("[f(a=1)", "unclosed_call"),
        ("[f(a=1", "unclosed_call"),
        ("[f(a='1)]", "unclosed_call"),
        ("[f", "unreadable_calls"),
        ("[", "unclosed_call"),
        ("", "unclosed_call"),
        ("hello", "unreadable_calls"),
        ("[f(a=1]]", "unreadable_calls"),
        ("[f(a=[1)]", "unreadable_calls"),
        ("[f(a=1)] and more", "text_around_calls"),
        ("[f(a=1) g(b=1)]", "text_around_calls"),
        ("[f(a=" + "[" * 70 + "]" * 70 + ")]", "nested_too_deeply"),
    ],
)
def test_what_is_no_call_list_has_a_reason(text, code):
    assert reason(parse_calls, text) == code


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("[anything(a=1)]", True),
        ("Sure: [f(a=1)]", True),
        ("f(a=1)", True),
        ("I would use f, if I could (really).", False),
        ("use of(a)", False),
        ("[see below]", False),
        ("", False),
    ],
)
def test_attempts_at_calls_are_told_from_prose(text, holds):
    assert holds_calls(text, ["f"]) is holds


# Values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": true, "b": null}', {"a": True, "b": None}),
        ("{'a': True, 'b': None, 'c': (1, 2)}", {"a": True, "b": None, "c": [1, 2]}),
        ("{'a': true, \"b\": False}", {"a": True, "b": False}),
        ("{'it': \"it's\"}", {"it": "it's"}),
        ('{"a": "one\ttwo"}', {"a": "one\ttwo"}),
        ('"\\ud83d\\ude00"', "😀"),
        (" 3 ", 3),
    ],
)
def test_json_and_python_literals_give_the_same_values(text, value):
    assert read_value(text) == value


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "not_a_literal"),
        ("{", "not_a_literal"),
        ("NaN", "non_finite_number"),
        ('{"a": -Infinity}', "non_finite_number"),
        ('{"a": 1e999}', "non_finite_number"),
        ('{"a": 1, "a": 1}', "duplicate_key"),
        ("{'a': {'b': 1, 'b': 2}}", "duplicate_key"),
        ('"\\ud800"', "lone_surrogate"),
        ("[" * 5000 + "]" * 5000, "nested_too_deeply"),
        ("a.b", "not_a_literal"),
        ("1; 2", "not_a_literal"),
    ],
)
def test_what_is_no_value_has_a_reason(text, code):
    assert reason(read_value, text) == code


def test_values_may_stand_one_after_another():
    assert read_values('{"a": 1}\n{"b": 2}') == [{"a": 1}, {"b": 2}]
    assert read_values('{"a": 1}, {"b": []}') == [[{"a": 1}, {"b": []}]]
    assert read_values("{'a': 1}\n\n{'b': True}") == [{"a": 1}, {"b": True}]
    assert reason(read_values, '{"a": 1} and') == "not_a_literal"


def test_brackets_inside_strings_do_not_count_as_nesting():
    assert read_value(json.dumps("[" * 500)) == "[" * 500
    assert read_value("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None


# Tagged blocks


@pytest.mark.parametrize(
    ("text", "calls", "rest"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', [("f", {"a": "</tool_call>"})], ""),  # noqa: E501
        ("Now <tool_call>{'name': 'f', 'arguments': {'a': '<think>'}}</tool_call> go", [("f", {"a": "<think>"})], "Now  go"),  # noqa: E501
        ('<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "parameters": {}}]</tool_call>', [("f", {}), ("g", {})], ""),  # noqa: E501
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})], ""),
        ('<tool_call>{"type": "function", "function": {"name": "f", "arguments": {}}}</tool_call>', [("f", {})], ""),
        ("just text", [], "just text"),
    ],
)  # fmt: skip
def test_tagged_replies(text, calls, rest):
    reply = read_tagged(text)
    assert (reply.calls, reply.text) == (tuple(ToolCall(*call) for call in calls), rest)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('<tool_call>{"name": "f", "arguments": {}}', "unclosed_call"),
        ("<tool_call></tool_call>", "not_a_literal"),
        ('<tool_call>{"name": "f", "arguments": {}</tool_call>', "not_a_literal"),
        ('{"name": "f", "arguments": {}}</tool_call>', "unreadable_calls"),
        ("<tool_call >x", "unreadable_calls"),
        ("<tool_call>3</tool_call>", "bad_call"),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', "bad_call"),
        ('<tool_call>{"name": "f"}</tool_call>', "bad_arguments"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "bad_arguments"),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "not_a_literal"),
    ],
)
def test_broken_tagged_replies_have_a_reason(text, code):
    assert reason(read_tagged, text) == code


# Any string at all


@given(JUNK)
@settings(max_examples=400, deadline=None)
@example("-" * 100_000 + "1")
@example("(" * 100_000)
@example("'\\" * 20_000)
@example("[f(a=" + "1+" * 20_000 + "1)]")
def test_readers_raise_nothing_but_row_errors(text):
    named = partial(parse_calls, names=["f", "Pool 3"])
    for read in (read_value, read_values, read_python, parse_calls, named, read_tagged):
        refused = None
        try:
            result = read(text)
        except RowError as error:
            refused = error
        if refused is not None:
            assert refused.reason in REASONS
            assert len(refused.excerpt.encode("utf-8")) <= 4 * 160
            continue
        values = [c.arguments for c in result] if isinstance(result, tuple) else result
        json.dumps(getattr(values, "text", values), allow_nan=False).encode("utf-8", "surrogatepass")
    holds_calls(text, ["f", "Pool 3"])


@pytest.mark.parametrize("value", [{1: 2}, {"a": {3}}, b"x", 1j, float("nan"), "\udc00", 2**2000, object()])
def test_only_json_values_are_clean(value):
    with pytest.raises(RowError):
        clean(value)
