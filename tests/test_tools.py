"""Tools: what reaches a function and what is turned away."""

from __future__ import annotations

import pytest
from jsonschema.exceptions import SchemaError

from autotool_fast.chat import ToolCall
from autotool_fast.tasks.world import TOOLS, WorldState
from autotool_fast.tools import Tool, Toolbox, ToolResult

SCHEMA = {
    "type": "object",
    "properties": {"level": {"type": "integer", "minimum": 0}, "name": {"type": "string", "enum": ["a", "b"]}},
    "required": ["level"],
    "additionalProperties": False,
}


@pytest.fixture
def box():
    return Toolbox([Tool("f", "Does f.", SCHEMA, lambda state, **arguments: state.append(arguments) or len(state))])


def test_a_fitting_call_runs_and_its_value_comes_back(box):
    state = ["before"]
    assert box.execute(ToolCall("f", {"level": 3, "name": "b"}), state) == ToolResult(value=2)
    assert state == ["before", {"level": 3, "name": "b"}]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"name": "a"},
        {"level": -1},
        {"level": "3"},
        {"level": 3.5},
        {"level": None},
        {"level": True},
        {"level": 3, "name": "c"},
        {"level": 3, "other": 1},
    ],
)
def test_arguments_that_break_the_schema_never_reach_the_function(box, arguments):
    state = []
    result = box.execute(ToolCall("f", arguments), state)
    assert result.error
    assert result.value is None
    assert state == []


def test_an_unknown_tool_is_an_error_that_names_it(box):
    result = box.execute(ToolCall("g", {"level": 3}), [])
    assert "'g'" in result.error


def test_arguments_nested_beyond_the_interpreter_are_an_error(box):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    state = []
    assert "nested" in box.execute(ToolCall("f", {"level": deep}), state).error
    assert state == []


def test_a_falsy_value_is_not_an_error():
    box = Toolbox([Tool("zero", "Zero.", {"type": "object"}, lambda state: 0)])
    assert box.execute(ToolCall("zero", {}), None) == ToolResult(value=0, error=None)


def test_a_broken_schema_is_refused_at_once():
    with pytest.raises(SchemaError):
        Tool("f", "Does f.", {"type": "objekt"}, print)


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_schemas_have_the_form_that_chat_templates_take(tool):
    assert tool.schema["type"] == "function"
    function = tool.schema["function"]
    assert (function["name"], function["description"]) == (tool.name, tool.description)
    parameters = function["parameters"]
    assert parameters["type"] == "object"
    assert set(parameters["required"]) == set(parameters["properties"])
    assert all("description" in value for value in parameters["properties"].values())


@pytest.mark.parametrize(
    ("name", "arguments", "value", "outcome"),
    [
        ("set", {"item": "fan", "value": 4}, "ok", ((("fan", 4),), None, None, None)),
        ("goto", {"place": "c"}, "ok", ((), "c", None, None)),
        ("submit", {"value": 7}, "ok", ((), None, 7, None)),
        ("pick", {"cup1": 5, "cup2": 2}, "ok", ((), None, None, (5, 2))),
        ("read", {"key": "b"}, {"value": 2, "next": "d"}, ((), None, None, None)),
        ("read", {"key": "c"}, "error", ((), None, None, None)),
    ],
)
def test_world_tools_act_on_the_state(name, arguments, value, outcome):
    state = WorldState(cells={"b": [2, "d"]})
    assert Toolbox(TOOLS.values()).execute(ToolCall(name, arguments), state) == ToolResult(value=value)
    assert state.outcome() == outcome


def test_setting_an_item_again_replaces_its_level():
    state, box = WorldState(), Toolbox(TOOLS.values())
    for value in (4, 6):
        box.execute(ToolCall("set", {"item": "fan", "value": value}), state)
    assert state.items == {"fan": 6}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("set", {"item": "oven", "value": 4}),
        ("set", {"item": "fan", "value": 10}),
        ("set", {"item": "fan"}),
        ("goto", {"place": "i"}),
        ("goto", {"place": 3}),
        ("submit", {"value": -1}),
        ("submit", {"value": "7"}),
        ("pick", {"cup1": 0, "cup2": 1}),
        ("pick", {"cup1": 1, "cup2": 6}),
        ("read", {"key": "b", "why": "so"}),
    ],
)
def test_world_tools_check_their_ranges(name, arguments):
    state = WorldState(cells={"b": [2, "d"]})
    assert Toolbox(TOOLS.values()).execute(ToolCall(name, arguments), state).error
    assert state == WorldState(cells={"b": [2, "d"]})
