"""One parser for every format: what is written is read back, and nothing makes it raise."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_chat import ANY_TEXT, JSON_VALUES, _no_pairs, _strings

from autotool_fast.chat import ERROR_KINDS, FORMATS, ToolCall, parse_reply, render_reply

CALL = st.builds(ToolCall, ANY_TEXT.filter(bool), st.dictionaries(ANY_TEXT, JSON_VALUES, max_size=3))


def bare(text: str) -> str:
    return f"[no_think]\n{text}"


# Calls without tags


def test_a_bare_call_is_read():
    for text in ('{"name": "f", "parameters": {"a": 1}}', '\n {"parameters":{"a":1},"name":"f"}\n '):
        for head in ("", "<|python_tag|>", " \n<|python_tag|> "):
            reply = parse_reply(bare(head + text), "bare")
            assert (reply.errors, reply.calls, reply.text) == ((), (ToolCall("f", {"a": 1}),), "")


def test_a_bare_call_after_thinking_is_read():
    reply = parse_reply('[think]\n<think>\n{"name": 1}\n</think>\n{"name": "f", "parameters": {}}', "bare")
    assert (reply.think, reply.calls, reply.length_class) == ('\n{"name": 1}\n', (ToolCall("f", {}),), 0)


def test_a_bare_reply_that_is_no_object_is_text():
    for text in ("Which pool?", 'I would write {"name": "f", "parameters": {}}', "[1, 2]", "f(a=1)"):
        reply = parse_reply(bare(text), "bare")
        assert (reply.errors, reply.calls, reply.text) == ((), (), text)


BARE = [
    ("", "empty_reply"),
    ("{", "bad_json"),
    ("{'name': 'f', 'parameters': {}}", "bad_json"),
    ("<|python_tag|>f.call(a=1)", "bad_json"),
    ('{"name": "f", "parameters": {"a": NaN}}', "non_finite_number"),
    ('{"name": "f", "parameters": {"a": 1, "a": 1}}', "duplicate_key"),
    ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "trailing_text_in_call"),
    ('{"name": "f", "parameters": {}}\n{"name": "g", "parameters": {}}', "trailing_text_in_call"),
    ('{"name": "f", "parameters": {}} done', "trailing_text_in_call"),
    ('{"name": "f", "arguments": {}}', "bad_call_shape"),
    ('{"type": "function", "name": "f", "parameters": {}}', "bad_call_shape"),
    ('{"parameters": {}}', "bad_name"),
    ('{"name": "f", "parameters": null}', "bad_arguments"),
    ('{"name": "f", "parameters": "{}"}', "bad_arguments"),
    ("so <think>x</think>", "stray_tag"),
    ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', "stray_tag"),
    ('Calling <|python_tag|>{"name": "f", "parameters": {}}', "stray_tag"),
]


@pytest.mark.parametrize(("text", "kind"), BARE)
def test_malformed_bare_replies_are_named(text, kind):
    reply = parse_reply(bare(text), "bare")
    assert (reply.errors, reply.calls, reply.length_class) == ((kind,), (), -1)


def test_a_call_of_another_format_is_not_read():
    assert parse_reply(bare('{"name": "f", "parameters": {}}')).calls == ()
    assert parse_reply(render_reply(None, (ToolCall("f", {}),)), "bare").errors == ("stray_tag",)


@pytest.mark.parametrize(("depth", "errors"), [(90, ()), (105, ("bad_json",))])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")])
def test_the_depth_of_a_call_is_limited_wherever_the_parser_is_called_from(depth, errors, brackets):
    value = brackets[0] * depth + ("1" if brackets[0] != "[" else "") + brackets[1] * depth
    text = f'[no_think]\n<tool_call>{{"name": "f", "arguments": {{"a": {value}}}}}</tool_call>'

    def deep(levels: int):
        return deep(levels - 1) if levels else parse_reply(text)

    assert parse_reply(text).errors == deep(300).errors == errors


# The table


def test_the_guide_lists_every_error_kind():
    guide = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", guide.split("### Error kinds")[1], re.MULTILINE)
    assert dict(rows) == ERROR_KINDS
    listed = set(parse_reply.__doc__.split("Error kinds:")[1].replace(".", "").replace(",", "").split())
    assert listed == set(ERROR_KINDS)


# Round trips


@pytest.mark.parametrize("name", list(FORMATS))
@settings(max_examples=80, deadline=None)
@given(
    calls=st.lists(CALL, min_size=1, max_size=3),
    think=st.none() | st.just("some thought"),
)
def test_any_call_is_read_back_in_every_format(name, calls, think):
    assume(all(_no_pairs(word) for call in calls for word in _strings([call.name, call.arguments])))
    syntax = FORMATS[name].syntax
    calls = tuple(calls if syntax == "tagged" else calls[:1])
    reply = parse_reply(render_reply(think, calls, syntax=syntax), syntax)
    assert reply.errors == ()
    assert [json.dumps(vars(call)) for call in reply.calls] == [json.dumps(vars(call)) for call in calls]
    assert (reply.mode, (reply.think or "").strip()) == ("no_think" if think is None else "think", think or "")


# Fuzzing

SEEDS = [
    ("tagged", '[no_think]\n<tool_call>\n{"name": "f", "arguments": {"a": [1, 2.5, null, "\\u00e9 x"]}}\n</tool_call>'),
    ("tagged", '[think]\n<think>\nwhy\n</think>\nso\n<tool_call>\n{"arguments": {}, "name": "g h"}\n</tool_call>\nend'),
    ("tagged", "[no_think]\nWhich level, please?"),
    ("tagged", "[no_think]\n<think>\n\n</think>\nWhich level, please?"),
    ("bare", '[no_think]\n{"name": "f", "parameters": {"a": {"b": [-1e3, "x"]}}}'),
    ("bare", '[think]\n<think>\n\n</think>\n<|python_tag|>{"name": "f", "parameters": {}}'),
]
TOKENS = [
    *("[think]", "[no_think]", "<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "<|im_end|>"),
    *('"', "\\", "\\u", "\\ud800", "{", "}", "[", "]", ":", ",", "NaN", "-Infinity", "1e999", "01", "\x00", "\t", "\n"),
    *("null", '"name"', '"arguments": {}', "{" * 200, "[" * 3000, "9" * 5000,
    "\ud800", "\U0001f600", "\xff", "'"),
]


def mutations(count: int, seed: int):
    """(syntax, reply) pairs: well-formed replies with pieces cut out, doubled, swapped or put in."""
    draw = random.Random(seed)
    for _ in range(count):
        syntax, text = SEEDS[draw.randrange(len(SEEDS))]
        kept = draw.choice((0, text.index("\n")))  # half of them keep their mode tag
        for _ in range(draw.randrange(1, 5)):
            i, j = sorted(draw.randrange(min(kept, len(text)), len(text) + 1) for _ in range(2))
            kind = draw.randrange(5)
            if kind == 0:
                text = text[:i] + text[j:]
            elif kind == 1:
                text = text[:j] + text[i:]
            elif kind == 2:
                text = text[:i] + TOKENS[draw.randrange(len(TOKENS))] + text[i:]
            elif kind == 3:
                text = text[:i]
            else:
                text = text[:i] + chr(draw.randrange(0x180)) + text[i + 1 :]
        yield syntax, text


def test_a_hundred_thousand_broken_replies_raise_nothing():
    kinds = set()
    for syntax, text in mutations(100_000, seed=0):
        reply = parse_reply(text, syntax)
        kinds.update(reply.errors)
        assert len(reply.errors) <= 1
        if not reply.errors:
            kinds.add("well formed")
            assert reply.mode
            assert reply.calls or reply.text
    assert kinds == {*ERROR_KINDS, "well formed"}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["latin-1", "utf-16-le", "utf-8"]), st.sampled_from(["tagged", "bare"]))
def test_no_bytes_raise_anything(data, encoding, syntax):
    text = data.decode(encoding, errors="surrogateescape" if encoding == "utf-8" else "replace")
    for head in ("", "[no_think]", "[think]<think></think>", "[no_think]<tool_call>", '[no_think]{"name":'):
        assert parse_reply(head + text, syntax).length_class in (-1, 0, 1)
