"""The data sets' readers on hand-made miniatures: every pitfall, and that no row can raise anything but a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from call_syntax import JUNK
from hypothesis import given, settings
from hypothesis import strategies as st

from autotool_fast.chat import ToolCall
from autotool_fast.tasks.example import NO_CALL_TEXT, Example
from autotool_fast.tasks.sources import hermes, plain, rlla, toolace, xlam
from autotool_fast.tasks.sources.dialogues import language
from autotool_fast.tasks.sources.literal import clean
from autotool_fast.tasks.sources.load import SOURCES, find_inputs, read_input
from autotool_fast.tasks.sources.rows import REASONS, Reject, RowError

DATA = Path(__file__).parent / "fixtures" / "data"


def load(path) -> dict[str, Example | Reject]:
    """Everything at a path, by `row-tTURN` (a reject of a whole row: `row`)."""
    items = {}
    for item in find_inputs(DATA / path).inputs:
        for found in read_input(item):
            if isinstance(found, Reject):
                key = str(found.row) if found.turn is None else f"{found.row}-t{found.turn}"
            else:
                key = found.id.removeprefix(f"{item.source}-{item.label}-")
            assert key not in items
            items[key] = found
    return items


def calls(example) -> list[tuple]:
    return [(call.name, call.arguments) for call in example.answer]


def reasons(items) -> dict[str, str]:
    return {key: item.reason for key, item in items.items() if isinstance(item, Reject)}


def roles(example) -> str:
    return " ".join(message["role"][0] for message in example.messages)


# ToolACE


def test_toolace_one_record_per_assistant_turn():
    items = load("toolace")
    kinds = {key: item.kind for key, item in items.items() if isinstance(item, Example)}
    assert kinds == {
        "0-t0": "call", "0-t1": "summary", "0-t2": "no_call", "1-t0": "call", "2-t0": "call", "2-t1": "call",
        "2-t2": "summary", "3-t0": "call", "4-t0": "no_call",
    }  # fmt: skip
    assert reasons(items) == {"4-t1": "positional_argument", "4-t2": "after_unreadable_turn", "5": "no_tools"}
    assert items["4-t1"].excerpt == "2"
    assert items["4-t1"].file.endswith("data.json")


def test_toolace_names_with_spaces_dots_slashes_and_parentheses():
    items = load("toolace")
    assert calls(items["0-t0"]) == [
        ("Pool Temperature", {"pool_id": 3}),
        ("Pool Temperature", {"pool_id": 4, "unit": "F"}),
    ]
    assert calls(items["1-t0"]) == [
        ("sauna.book/v2", {
            "guest-name": "Ann (VIP), 'the first'", "from": "7pm", "extras": ["towels, big", "tea)"],
            "notes": {"a": [1, 2.5, True, None]},
        }),
        ("Lockers (new)", {"hall": [1, 2]}),
    ]  # fmt: skip
    assert calls(items["2-t0"]) == [("Close?", {})]


def test_toolace_tools_come_out_of_the_system_text_as_json_schema():
    (tool, _) = load("toolace")["0-t0"].tools
    assert tool["function"]["description"].endswith('[Celsius]; it\'s "live".')
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "pool_id": {"type": "integer", "description": "number"},
            "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
        },
        "required": ["pool_id"],
    }


def test_toolace_history_is_messages_with_one_result_per_call():
    last = load("toolace")["0-t2"]
    assert roles(last) == "u a t t a u"
    assert last.messages[1]["tool_calls"][1]["function"]["arguments"] == {"pool_id": 4, "unit": "F"}
    assert [(m["name"], m["content"]) for m in last.messages[2:4]] == [
        ("Pool Temperature", '{"t": 26}'),
        ("Pool Temperature", "75 F"),
    ]
    assert load("toolace")["2-t1"].messages[-1] == {"role": "tool", "name": "Close?", "content": "closed"}


def test_toolace_keeps_the_date_and_leaves_the_wire_format_out():
    items = load("toolace")
    assert items["1-t0"].messages[0] == {"role": "system", "content": "Today is 2031-05-06, Tuesday."}
    assert roles(items["0-t0"]) == "u"


def test_languages_are_told_by_script():
    assert load("toolace")["3-t0"].meta["language"] == "zh"
    assert [language(text) for text in ("Where?", "去 Rome 怎么走", "東京 is where I want to go", "42")] == [
        "en", "zh", "en", "other",
    ]  # fmt: skip


def toolace_row(reply, tool='[{"name": "f", "parameters": {"type": "dict", "properties": {"a": {"type": "int"}}}}]'):
    system = f"Here is a list of functions in JSON format that you can invoke:\n{tool}. \nShould you decide"
    return {"system": system, "conversations": [{"from": "user", "value": "x"}, {"from": "assistant", "value": reply}]}


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("I will: [f(a=1)]", "calls_in_text"),
        ("[f(a=1)] done", "text_around_calls"),
        ("[g(a=1)]", "unknown_tool"),
        ("[f(b=1)]", "unknown_argument"),
        ("[f(a=1)", "unclosed_call"),
        ("[]", "empty_reply"),
        (" ", "empty_reply"),
    ],
)
def test_toolace_replies_that_are_neither_calls_nor_text(reply, code):
    (item,) = toolace.read_row(toolace_row(reply), "x")
    assert (item.reason, item.turn) == (code, 0)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (toolace_row("x", tool="[]"), "no_tools"),
        (toolace_row("x", tool='[{"name": "f", '), "bad_tools"),
        ({"system": "[{}]", "conversations": []}, "bad_tools"),
        ({**toolace_row("x"), "conversations": []}, "no_answer"),
        ({**toolace_row("x"), "conversations": [{"from": "narrator", "value": "x"}]}, "unknown_role"),
        ({**toolace_row("x"), "conversations": [{"from": "user"}]}, "bad_row"),
        ({**toolace_row("x"), "conversations": "x"}, "bad_row"),
    ],
)
def test_toolace_rows_that_cannot_be_used(row, code):
    with pytest.raises(RowError) as caught:
        list(toolace.read_row(row, "x"))
    assert caught.value.reason == code


def test_a_turn_refused_for_its_label_alone_leaves_the_later_ones_readable():
    row = toolace_row(" ")
    row["conversations"] += [{"from": "user", "value": "again"}, {"from": "assistant", "value": "[f(a=1)]"}]
    first, second = toolace.read_row(row, "x")
    assert (first.reason, second.kind) == ("empty_reply", "call")


def test_a_turn_that_nothing_asks_for_is_refused():
    row = toolace_row("Let me look.")
    row["conversations"] += [{"from": "assistant", "value": "[f(a=1)]"}, {"from": "user", "value": "More."},
                             {"from": "system", "value": "Be brief."}, {"from": "assistant", "value": "[f(a=2)]"},
                             {"from": "tool", "value": "ok"}, {"from": "assistant", "value": "[f(a=3)]"}]  # fmt: skip
    items = list(toolace.read_row(row, "x"))
    found = [item.reason if isinstance(item, RowError) else item.kind for item in items]
    assert found == ["no_call", "no_prompt", "no_prompt", "call"]


# xLAM


def test_xlam_rows():
    items = load("xlam")
    assert reasons(items) == {"5-t0": "unknown_argument", "6-t0": "unknown_tool", "7": "not_a_literal"}
    assert len(calls(items["0-t0"])) == 2
    assert items["0-t0"].tools[0]["function"]["parameters"]["required"] == ["pool_id"]
    assert calls(items["3-t0"]) == [("pool_temp", {"pool_id": 9})]
    assert items["4-t0"].meta["notes"] == ["answer_type_mismatch"]


def test_xlam_python_annotations():
    route = load("xlam")["1-t0"].tools[0]["function"]["parameters"]
    assert route["required"] == ["stops", "costs", "odd"]
    assert route["properties"]["stops"]["items"] == {"type": "array", "items": {"type": "number"}}
    assert route["properties"]["costs"]["additionalProperties"] == {"type": "number"}
    assert route["properties"]["speed"] == {"type": ["integer", "number"], "description": "km/h", "default": 30}
    assert "type" not in route["properties"]["odd"]
    assert load("xlam")["1-t0"].meta["notes"] == ["unknown_type"]


def test_xlam_rows_without_answers_are_no_call_rows():
    item = load("xlam")["2-t0"]
    assert (item.kind, item.text, item.answer) == ("no_call", NO_CALL_TEXT, ())


# Hermes


def test_hermes_python_literals_json_and_both_in_one_reply():
    items = load("hermes")
    assert reasons(items) == {"4-t0": "not_json_value", "4-t1": "after_unreadable_turn"}
    assert calls(items["0-t0"]) == [("pool_temp", {"pool_id": 3, "heated": True, "label": None})]
    assert calls(items["1-t0"]) == [
        ("pool_temp", {"pool_id": 1, "label": "it's </tool_call> here"}),
        ("pool_temp", {"pool_id": 2, "heated": False, "label": "it's"}),
    ]
    assert items["1-t0"].text == "Looking both up."
    assert calls(items["3-t0"]) == [("pool_temp", {"pool_id": 4})]


def test_hermes_tools_stand_between_tags_or_in_the_column():
    items = load("hermes")
    expected = items["0-t0"].tools
    assert expected[0]["function"]["parameters"]["required"] == ["pool_id"]
    for key in ("1-t0", "2-t0", "3-t0"):
        assert items[key].tools == expected, key


def test_hermes_labels_and_results():
    items = load("hermes")
    assert (items["0-t1"].kind, items["2-t0"].kind) == ("summary", "no_call")
    assert items["0-t1"].messages[-1] == {"role": "tool", "name": "pool_temp", "content": '{"t": 26}'}
    assert items["0-t0"].meta["category"] == "Pools"


def test_hermes_replies_are_written_anew_as_json():
    reply = load("hermes")["0-t0"].reply()
    assert '{"name": "pool_temp", "arguments": {"pool_id": 3, "heated": true, "label": null}}' in reply


def test_hermes_json_mode_is_left_out_of_a_folder():
    found = find_inputs(DATA / "hermes")
    assert [item.path.name for item in found.inputs] == ["func-calling-miniature.json"]
    assert "JSON mode" in found.skipped[0][1]


# rlla


def test_rlla_rows():
    items = load("rlla_raw")
    assert reasons(items) == {"4-t0": "not_a_literal"}
    assert calls(items["0-t0"]) == [("Pool Temperature", {"pool_id": 3}), ("Pool Temperature", {"pool_id": 4})]
    assert items["0-t0"].think == "Two pools, two calls."
    assert (items["2-t0"].kind, items["2-t0"].text) == ("no_call", "I cannot sing, and no tool here can.")
    assert items["3-t1"].kind == "summary"


def test_rlla_tools_are_numbered_in_the_instruction():
    pool, close = load("rlla_raw")["0-t0"].tools
    assert pool["function"]["description"] == "Water temperature.\nSecond line: with a colon."
    assert pool["function"]["parameters"]["required"] == ["pool_id"]
    assert "default" not in pool["function"]["parameters"]["properties"]["pool_id"]
    assert close["function"]["parameters"]["properties"] == {}


def test_rlla_history_becomes_messages_and_only_the_output_is_asked_for():
    items = load("rlla_raw")
    (key,) = [key for key in items if key.startswith("1")]
    item = items[key]
    assert (key, roles(item)) == ("1-t1", "u a t")
    assert item.messages[1]["tool_calls"][0]["function"] == {"name": "Pool Temperature", "arguments": {"pool_id": 1}}
    assert item.messages[2]["content"] == '{"t": 21}'
    assert (calls(item), item.text) == ([("Close", {})], "21 degrees; closing now.")


def test_rlla_stock_thoughts_are_left_out():
    assert load("rlla_raw")["1-t1"].think is None


def test_rlla_parquet_rows_hold_the_same_texts():
    row = json.loads((DATA / "rlla_raw" / "rlla_miniature.json").read_text())[0]
    (raw,) = rlla.read_row(row, "x")
    (other,) = rlla.read_row({"data_source": "rlla", "prompt": [], "extra_info": {**row, "split": "train"}}, "x")
    assert raw == other


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"instruction": "no tools"}, "no_tools"),
        ({"instruction": "**Available Tools**\n1. Name: f\nDescription: d\n"}, "bad_tools"),
        ({"instruction": "**Available Tools**\n1. Name: f\nDescription: d\nParameters: {\n"}, "bad_tools"),
        ({"input": "hello"}, "unreadable_history"),
        ({"input": "<user> x </user><tool_call>{</tool_call>"}, "unreadable_history"),
        ({"input": "<user> x"}, "unreadable_history"),
        ({"output": ""}, "no_answer"),
        ({"output": "<user> x </user>"}, "no_answer"),
        ({"output": "<tool_call>\n{}"}, "unclosed_call"),
        ({"output": 3}, "bad_row"),
    ],
)
def test_rlla_rows_that_cannot_be_used(change, code):
    row = json.loads((DATA / "rlla_raw" / "rlla_miniature.json").read_text())[0]
    with pytest.raises(RowError) as caught:
        list(rlla.read_row({**row, **change}, "x"))
    assert caught.value.reason == code


# A file is told by its first rows


@pytest.mark.parametrize("source", ["toolace", "hermes"])
def test_a_row_without_its_dialogue_is_a_reject(source):
    with pytest.raises(RowError) as caught:
        list(SOURCES[source].read_row({"system": TOOL}, "x"))
    assert caught.value.reason == "bad_row"


# Plain records


def test_plain_records_and_broken_lines():
    items = {
        item.row if isinstance(item, Reject) else item.id: item
        for item in read_input(find_inputs(DATA / "plain.jsonl").inputs[0])
    }
    assert set(items) == {"own-0", "own-1", 3, 4}
    assert (items[3].reason, items[4].reason) == ("bad_json", "bad_row")
    assert items[4].detail == "unknown field answers"
    assert items["own-0"].answer == (ToolCall("dim", {"lamp": "hall", "level": 3}),)
    assert (items["own-1"].kind, roles(items["own-1"])) == ("no_call", "u a t u")


# No row can do harm

TURNS = st.lists(st.fixed_dictionaries({
    "from": st.sampled_from(["user", "human", "gpt", "assistant", "tool", "system", "x"]),
    "value": st.one_of(
        JUNK, st.sampled_from(["[f(a=1)]", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', "hi"])
    ),
}), max_size=5)  # fmt: skip
TOOL = '[{"name": "f", "parameters": {"a": {"type": "int"}}}]'
ROWS = {
    "toolace": st.fixed_dictionaries({
        "system": JUNK.map(lambda text: f"{TOOL} {text}"), "conversations": TURNS,
    }),
    "hermes": st.fixed_dictionaries({"conversations": TURNS, "tools": st.one_of(JUNK, st.just(TOOL))}),
    "xlam": st.fixed_dictionaries({"query": JUNK, "answers": JUNK, "tools": st.one_of(JUNK, st.just(TOOL))}),
    "rlla": st.fixed_dictionaries({
        "instruction": JUNK.map(lambda text: f'**Available Tools**\n1. Name: f\nParameters: {{"a": {{}}}}\n{text}'),
        "input": JUNK.map(lambda text: f"<user> x </user>{text}"),
        "output": st.one_of(JUNK, JUNK.map(lambda text: f"<tool_call>{text}</tool_call>")),
    }),
    "jsonl": st.dictionaries(
        st.sampled_from(["id", "tools", "messages", "answer", "no_call", "think", "meta"]),
        st.recursive(st.one_of(JUNK, st.none(), st.booleans(), st.integers()), lambda v: st.one_of(
            st.lists(v, max_size=2), st.dictionaries(st.sampled_from(["role", "content", "name", "notes"]), v),
        ), max_leaves=6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", sorted(SOURCES))
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_row_raises_anything_but_a_reason(source, data):
    module = {module.NAME: module for module in (toolace, xlam, hermes, rlla, plain)}[source]
    row = data.draw(ROWS[source])
    found = []
    reason = None
    try:
        found = list(module.read_row(clean(row), "x"))
    except RowError as error:
        reason = error.reason
    assert reason is None or reason in REASONS
    for item in found:
        if isinstance(item, RowError):
            assert item.turn is not None
            continue
        line = item.to_line()
        line.encode("utf-8")
        assert line.count("\n") == 1
        assert Example.from_json(json.loads(line)) == item
