"""The record of one assistant turn: JSON and back, as a task, and how its episode is judged."""

from __future__ import annotations

import json

import pytest

from autotool_fast.chat import ToolCall, parse_reply, render_reply
from autotool_fast.errors import UserError
from autotool_fast.tasks.example import NO_CALL_TEXT, Example, read_call, read_examples, to_task
from autotool_fast.tasks.sources.names import with_safe_names
from autotool_fast.tasks.sources.rows import RowError

DIM = {
    "type": "function",
    "function": {
        "name": "Dim Lamp",
        "description": "Dim a lamp.",
        "parameters": {
            "type": "object",
            "properties": {"lamp": {"type": "string"}, "level": {"type": "integer", "default": 5}},
            "required": ["lamp"],
        },
    },
}
RECORD = {
    "id": "own-0",
    "tools": [DIM],
    "messages": [{"role": "user", "content": "Dim the hall and the attic."}],
    "answer": [
        {"name": "Dim Lamp", "arguments": {"lamp": "hall", "level": 3}},
        {"name": "Dim Lamp", "arguments": {"lamp": "attic"}},
    ],
}
SINGLE = {**RECORD, "answer": RECORD["answer"][:1]}
NO_CALL = {**RECORD, "answer": [], "text": "I cannot do this."}


def solved(record: dict, reply: str, **options) -> bool:
    episode = to_task(Example.from_json(record), **options).episode()
    assert episode.step(parse_reply(reply)) is None
    return episode.score()


def reply(*calls: dict, name: str = "Dim Lamp", text: str = "") -> str:
    return render_reply(None, tuple(ToolCall(name, arguments) for arguments in calls), text)


def test_a_record_comes_back_from_its_line():
    example = Example.from_json(RECORD)
    assert Example.from_json(json.loads(example.to_line())) == example
    assert (example.kind, example.meta["n_calls"], example.source) == ("call", 2, "jsonl")


def test_kinds():
    assert Example.from_json(NO_CALL).kind == "no_call"
    assert Example.from_json({**NO_CALL, "no_call": False}).kind == "summary"


def test_the_reference_reply_solves_its_own_task():
    for record in (RECORD, SINGLE, NO_CALL, {**NO_CALL, "text": ""}):
        assert solved(record, Example.from_json(record).reply())
    thought = Example.from_json({**RECORD, "think": "Two lamps."}).reply(think=True)
    assert parse_reply(thought).think.strip() == "Two lamps."
    assert solved(RECORD, thought)
    assert NO_CALL_TEXT in Example.from_json({**NO_CALL, "text": ""}).reply()


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ([{"lamp": "attic"}, {"level": 3, "lamp": "hall"}], True),
        ([{"lamp": "hall", "level": 3.0}, {"lamp": "attic"}], True),
        ([{"lamp": "hall", "level": 3}, {"lamp": "attic", "level": 5}], True),
        ([{"lamp": "hall", "level": 3}, {"lamp": "attic", "level": 4}], False),
        ([{"lamp": "hall", "level": "3"}, {"lamp": "attic"}], False),
        ([{"lamp": "hall", "level": 3}], False),
        ([{"lamp": "hall", "level": 3}, {"lamp": "attic"}, {"lamp": "attic"}], False),
        ([], False),
    ],
)
def test_an_answer_is_judged_as_a_multiset_of_calls(arguments, right):
    assert solved(RECORD, reply(*arguments, text="ok")) is right


def test_strict_and_default_options():
    assert solved(SINGLE, reply({"lamp": "hall", "level": 3}), strict=True)
    assert not solved(SINGLE, reply({"lamp": "hall", "level": 3.0}), strict=True)
    attic = {**RECORD, "answer": RECORD["answer"][1:]}
    assert solved(attic, reply({"lamp": "attic", "level": 5}))
    assert not solved(attic, reply({"lamp": "attic", "level": 5}), defaults_are_absent=False)


def test_a_no_call_is_solved_by_any_well_formed_reply_without_calls():
    assert solved(NO_CALL, "[no_think]\nNo lamp of that kind.")
    assert solved(NO_CALL, "[think]\n<think>hm</think>\nWhich lamp?")
    assert not solved(NO_CALL, reply({"lamp": "hall"}))
    assert not solved(NO_CALL, "No tag.")
    assert not solved(NO_CALL, "[no_think]\n<tool_call>broken")


def test_an_episode_without_a_reply_is_not_solved():
    assert not to_task(Example.from_json(NO_CALL)).episode().score()


def test_tasks_carry_what_the_rollout_needs():
    task = to_task(Example.from_json({**RECORD, "source": "own", "meta": {"split": "test"}}))
    assert (task.id, task.family, task.difficulty, task.split) == ("own-0", "own", 0, "test")
    assert task.tools[0] == DIM
    json.dumps(task.spec)


def test_a_summary_is_no_task():
    with pytest.raises(ValueError, match="summary"):
        to_task(Example.from_json({**NO_CALL, "no_call": False}))


@pytest.mark.parametrize(
    ("change", "code", "detail"),
    [
        ({"tools": []}, "no_tools", ""),
        ({"tools": None}, "bad_row", "tools"),
        ({"answer": {"name": "Dim Lamp"}}, "bad_row", "answer"),
        ({"answer": [{"name": "Dim Lamp"}]}, "bad_arguments", "Dim Lamp"),
        ({"answer": [{"name": "dim", "arguments": {}}]}, "unknown_tool", "dim"),
        ({"answer": [{"name": "Dim Lamp", "arguments": {"colour": 1}}]}, "unknown_argument", "colour"),
        ({"no_call": True}, "bad_row", "no_call"),
        ({"no_call": "yes"}, "bad_row", "no_call"),
        ({"messages": []}, "no_user_message", ""),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no_user_message", ""),
        ({"messages": [{"role": "boss", "content": "x"}]}, "unknown_role", "boss"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "bad_row", "content"),
        ({"messages": [*RECORD["messages"], {"role": "assistant", "content": "x"}]}, "bad_row", "last message"),
        ({"think": 3}, "bad_row", "think"),
        ({"meta": [1]}, "bad_row", "meta"),
        ({"text": None}, "bad_row", "text"),
        ({"answers": []}, "bad_row", "answers"),
        ({"source": "a\x1b[31m"}, "bad_row", "source holds control characters"),
        ({"id": "a\nb"}, "bad_row", "id holds control characters"),
        ({"text": "\ud800"}, "lone_surrogate", ""),
        ({"meta": {"x": float("inf")}}, "non_finite_number", ""),
    ],
)
def test_records_that_cannot_be_used_say_why(change, code, detail):
    with pytest.raises(RowError) as caught:
        Example.from_json({**RECORD, **change})
    assert caught.value.reason == code
    assert detail in caught.value.detail


def test_calls_are_read_in_every_wrapping():
    expected = ToolCall("f", {"a": 1})
    for value in (
        {"name": "f", "arguments": {"a": 1}},
        {"name": "f", "parameters": {"a": 1}},
        {"name": "f", "arguments": '{"a": 1}'},
        {"type": "function", "id": "c1", "function": {"name": "f", "arguments": "{'a': 1}"}},
    ):
        assert read_call(value) == expected


def test_safe_names_reach_tools_history_and_answer():
    history = [
        {"role": "user", "content": "Dim the hall."},
        {"role": "assistant", "tool_calls": [{"function": {"name": "Dim Lamp", "arguments": {"lamp": "hall"}}}]},
        {"role": "tool", "name": "Dim Lamp", "content": "ok"},
        {"role": "user", "content": "And the attic."},
    ]  # fmt: skip
    example = with_safe_names(Example.from_json({**RECORD, "messages": history}))
    assert "Dim Lamp" not in json.dumps({**example.to_json(), "meta": {}})
    assert example.meta["name_map"] == {"Dim_Lamp": "Dim Lamp"}
    assert Example.from_json(json.loads(example.to_line())) == example
    assert with_safe_names(example).tools == example.tools


def test_prepared_files_are_read_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "sft.jsonl"
    path.write_text(Example.from_json(RECORD).to_line() * 2)
    assert [example.id for example in read_examples(path)] == ["own-0", "own-0"]
    path.write_text(Example.from_json(RECORD).to_line() + '{"tools": [')
    with pytest.raises(UserError, match="line 2"):
        list(read_examples(path))
    with pytest.raises(UserError, match="cannot be read"):
        list(read_examples(tmp_path / "none.jsonl"))
