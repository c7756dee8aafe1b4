"""Tool descriptions of every shape become valid JSON schema; calls are checked against them."""

from __future__ import annotations

import json

import pytest
from call_syntax import JUNK
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from autotool_fast.chat import ToolCall
from autotool_fast.tasks.sources.annotations import read_annotation
from autotool_fast.tasks.sources.names import safe_names
from autotool_fast.tasks.sources.rows import NOTES, RowError
from autotool_fast.tasks.sources.schemas import check_calls, defaults, fits, read_tool, read_tools

INT, STR, NUM = {"type": "integer"}, {"type": "string"}, {"type": "number"}


def parameters(value, notes=None, **options):
    notes = set() if notes is None else notes
    return read_tool({"name": "f", "parameters": value}, notes, **options)["function"]["parameters"]


def properties(value, notes=None, **options):
    return parameters(value, notes, **options)["properties"]


# Types


@pytest.mark.parametrize(
    ("text", "schema", "optional"),
    [
        ("int", INT, False),
        ("Integer", INT, False),
        ("str, optional", STR, True),
        ("int (optional)", INT, True),
        ("optional str", STR, True),
        ("str, required", STR, False),
        ("str, default 'a'", STR, True),
        ("double", NUM, False),
        ("dict", {"type": "object"}, False),
        ("any", {}, False),
        ("List", {"type": "array"}, False),
        ("List[int]", {"type": "array", "items": INT}, False),
        ("typing.List[str], optional", {"type": "array", "items": STR}, True),
        ("list of strings", {"type": "array", "items": STR}, False),
        ("array<string>", {"type": "array", "items": STR}, False),
        ("Dict[str, float]", {"type": "object", "additionalProperties": NUM}, False),
        ("Dict[str, Any]", {"type": "object"}, False),
        ("Union[int, str]", {"type": ["integer", "string"]}, False),
        ("int | float | int", {"type": ["integer", "number"]}, False),
        ("str | None", STR, True),
        ("Optional[List[int]]", {"type": "array", "items": INT}, True),
        ("Union[List[int], str]", {"anyOf": [{"type": "array", "items": INT}, STR]}, False),
        ("Union[int, Any]", {}, False),
        ("Tuple[int, str]", {"type": "array", "prefixItems": [INT, STR]}, False),
        ("Tuple[float, float]", {"type": "array", "items": NUM}, False),
        ("Tuple[int, ...]", {"type": "array", "items": INT}, False),
        ("List[Tuple[float, float]]", {"type": "array", "items": {"type": "array", "items": NUM}}, False),
        ("List[Dict[str, int]]", {"type": "array", "items": {"type": "object", "additionalProperties": INT}}, False),
        ("Literal['a', 1, True]", {"enum": ["a", 1, True]}, False),
        ("None", {}, True),
    ],
)
def test_types_are_read(text, schema, optional):
    read = read_annotation(text)
    assert (read.schema, read.optional) == (schema, optional)


UNREADABLE = ["Quaternion", "Callable[[int], str]", "List[", "List[int", "a b c", "int]", "|", "[int]"]


@pytest.mark.parametrize("text", UNREADABLE)
def test_types_that_cannot_be_read_are_counted_and_left_open(text):
    notes = set()
    assert read_annotation(text) is None
    assert properties({"x": {"type": text, "description": "d"}}, notes) == {"x": {"description": "d"}}
    assert notes == {"unknown_type"}


# Shapes of descriptions


def test_a_flat_map_becomes_a_schema_with_inferred_requirements():
    flat = {
        "a": {"type": "int", "description": "first"},
        "b": {"type": "str, optional"},
        "c": {"type": "float", "default": "1.5"},
        "d": {"type": "bool", "default": None},
    }
    assert parameters(flat) == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "first"},
            "b": STR,
            "c": {"type": "number", "default": 1.5},
            "d": {"type": "boolean"},
        },
        "required": ["a"],
    }


def test_a_flat_map_may_have_parameters_called_like_keywords():
    flat = {name: {"type": "str", "description": "d"} for name in ("type", "properties", "required")}
    assert set(properties(flat)) == {"type", "properties", "required"}
    assert set(properties({"properties": {"type": "str"}})) == {"properties"}
    assert set(properties({"type": "dict", "properties": {"type": {"type": "string"}}})) == {"type"}


@pytest.mark.parametrize("nothing", [None, {}, "", {"type": "object"}, {"type": "dict", "properties": {}}, {"type": "dict", "properties": None}])  # noqa: E501
def test_no_parameters_is_an_empty_object(nothing):
    assert parameters(nothing) == {"type": "object", "properties": {}, "required": []}


@pytest.mark.parametrize(
    "tool",
    [
        {"parameters": {"type": "dict", "properties": {"a": {"type": "int"}, "b": {"type": "int"}}, "required": ["a"]}},
        {"parameters": {"properties": {"a": {"type": "int"}, "b": {"type": "int"}}}, "required": ["a"]},
        {"parameters": {"properties": {"a": {"type": "int"}, "b": {"type": "int"}}, "required": None}, "required": ["a"]},  # noqa: E501
        {"parameters": {"properties": {"a": {"type": "int", "required": True}, "b": {"type": "int"}}}},
        {"parameters": {"properties": {"a": {"type": "int", "required": "true"}, "b": "int"}}},
        {"parameters": json.dumps({"type": "object", "properties": {"a": {"type": "int"}, "b": {"type": "int"}}, "required": ["a"]})},  # noqa: E501
        {"arguments": {"type": "object", "properties": {"a": {"type": "int"}, "b": {"type": "int"}}, "required": ["a"]}},  # noqa: E501
    ],
)
def test_required_is_found_wherever_it_stands(tool):
    read = read_tool({"name": "f", **tool}, set())
    assert read["function"]["parameters"] == {"type": "object", "properties": {"a": INT, "b": INT}, "required": ["a"]}


def test_nothing_is_required_where_a_schema_says_so():
    assert parameters({"type": "dict", "properties": {"a": {"type": "int"}}, "required": None})["required"] == []


def test_nested_types_are_normalised_too():
    given_ = {"type": "dict", "properties": {"a": {"type": "list", "items": {"type": "dict", "properties": {
        "b": {"type": "float", "optional": True}, "c": "str"}, "required": ["c", "gone"]}}}}  # fmt: skip
    notes = set()
    inner = properties(given_, notes)["a"]["items"]
    assert inner == {"type": "object", "properties": {"b": NUM, "c": STR}, "required": ["c"]}
    assert notes == {"required_unknown"}


@pytest.mark.parametrize(
    ("spec", "schema", "noted"),
    [
        ({"type": "int", "default": 3}, {"type": "integer", "default": 3}, False),
        ({"type": "int", "default": "3"}, {"type": "integer", "default": 3}, False),
        ({"type": "bool", "default": "False"}, {"type": "boolean", "default": False}, False),
        ({"type": "List[int]", "default": "[1]"}, {"type": "array", "items": INT, "default": [1]}, False),
        ({"type": "str", "default": "3"}, {"type": "string", "default": "3"}, False),
        ({"type": "str", "default": ""}, {"type": "string", "default": ""}, False),
        ({"type": "int", "default": ""}, INT, True),
        ({"type": "int", "default": "many"}, INT, True),
        ({"type": "int", "default": True}, INT, True),
        ({"type": "str", "enum": ["a", "b"], "default": "c"}, {"type": "string", "enum": ["a", "b"]}, True),
    ],
)
def test_defaults_are_kept_where_they_fit(spec, schema, noted):
    notes = set()
    read = parameters({"x": spec}, notes)
    assert (read["properties"]["x"], read["required"]) == (schema, [])
    assert notes == ({"default_of_other_type"} if noted else set())


def test_an_empty_default_can_mean_none():
    assert parameters({"x": {"type": "int", "default": ""}}, empty_default=False)["required"] == ["x"]


@pytest.mark.parametrize(
    ("tools", "code"),
    [
        ([], "no_tools"),
        ("x", "bad_tools"),
        (None, "bad_tools"),
        ([3], "bad_tools"),
        ([{"description": "d"}], "bad_tools"),
        ([{"name": " "}], "bad_tools"),
        ([{"name": "f", "parameters": [1]}], "bad_tools"),
        ([{"name": "f"}, {"name": "f", "description": "other"}], "duplicate_tool"),
    ],
)
def test_tools_that_cannot_be_used_have_a_reason(tools, code):
    with pytest.raises(RowError) as caught:
        read_tools(tools)
    assert caught.value.reason == code


def test_the_same_tool_twice_is_one_tool():
    assert len(read_tools([{"name": "f"}, {"name": "f", "parameters": {}}])[0]) == 1


SPECS = st.recursive(
    st.one_of(JUNK, st.none(), st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False),
              st.sampled_from(["int", "str, optional", "List[Union[int, str]]", "dict", "Tuple[int, str]", "array"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
        st.one_of(st.sampled_from(["type", "properties", "required", "items", "default", "enum", "anyOf", "minimum",
                                   "format", "description", "additionalProperties", "maxItems", "prefixItems"]),
                  st.text(max_size=3)), inner, max_size=5)),
    max_leaves=20,
)  # fmt: skip


@given(SPECS)
@settings(max_examples=400, deadline=None)
def test_whatever_comes_in_what_comes_out_is_a_valid_schema_that_reads_back(spec):
    notes: set[str] = set()
    try:
        tool = read_tool({"name": "f", "parameters": spec}, notes)
    except RowError:
        return
    Draft202012Validator.check_schema(tool["function"]["parameters"])
    assert notes <= set(NOTES)
    again = set()
    assert read_tool(tool, again) == tool
    assert "default_of_other_type" not in again
    for schema in tool["function"]["parameters"]["properties"].values():
        assert "default" not in schema or Draft202012Validator(schema).is_valid(schema["default"]) or set(schema) & {
            "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
            "minItems", "maxItems", "minLength", "maxLength",
        }  # fmt: skip


# Calls against tools

TOOLS, _ = read_tools([
    {"name": "f", "parameters": {"a": {"type": "int"}, "b": {"type": "str", "default": "x"}}},
    {"name": "open", "parameters": {"type": "object", "properties": {}, "additionalProperties": {"type": "int"}}},
])  # fmt: skip


@pytest.mark.parametrize(
    ("call", "notes"),
    [
        (ToolCall("f", {"a": 1}), set()),
        (ToolCall("f", {"a": 1.0, "b": "y"}), set()),
        (ToolCall("f", {"a": "1"}), {"answer_type_mismatch"}),
        (ToolCall("f", {"a": True}), {"answer_type_mismatch"}),
        (ToolCall("f", {"b": "y"}), {"answer_misses_required"}),
        (ToolCall("open", {"anything": 3}), set()),
        (ToolCall("open", {"anything": "3"}), {"answer_type_mismatch"}),
    ],
)
def test_suspicious_answers_are_noted(call, notes):
    assert check_calls([call], TOOLS) == notes


@pytest.mark.parametrize(
    ("call", "code"), [(ToolCall("g", {}), "unknown_tool"), (ToolCall("f", {"a": 1, "c": 2}), "unknown_argument")]
)
def test_answers_outside_the_tools_are_refused(call, code):
    with pytest.raises(RowError) as caught:
        check_calls([call], TOOLS)
    assert caught.value.reason == code


def test_defaults_are_collected_by_tool():
    assert defaults(TOOLS) == {"f": {"b": "x"}}


SMALL = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from([1.0, 0.5, "a", "1"])),
                     lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(st.sampled_from("ab"), v)),
                     max_leaves=4)  # fmt: skip
TYPES = st.sampled_from(["int", "str", "float", "bool", "list", "dict", "List[int]", "Dict[str, int]", "any",
                         "Union[int, str]",
                         "Tuple[int, str]", "Union[List[int], bool]", "Literal['a', 'b']"])  # fmt: skip


@given(TYPES, SMALL)
@settings(max_examples=300, deadline=None)
def test_fits_agrees_with_a_full_validator(text, value):
    schema = read_annotation(text).schema
    assert fits(value, schema) == Draft202012Validator(schema).is_valid(value)


# Names for endpoints


def test_safe_names_are_safe_unique_and_leave_safe_ones_alone():
    names = ["ok-1", "Pool Temp", "Pool/Temp", "Pool_Temp", "温度", "湿度", "x" * 80, "y" * 64]
    safe = safe_names(names)
    assert list(safe) == names
    assert safe["ok-1"] == "ok-1"
    assert safe["Pool_Temp"] == "Pool_Temp"
    assert len(set(safe.values())) == len(names)
    assert all(0 < len(name) <= 64 and name.replace("_", "").replace("-", "").isalnum() and name.isascii() for name in safe.values())  # noqa: E501
