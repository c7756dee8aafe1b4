"""Tool descriptions of any data set as real JSON schema, and calls checked against them.

`read_tool` accepts a bare function or the `{"type": "function", ...}` wrapper, JSON-schema-like parameters or a flat
map of them, types of every spelling (`annotations`), and `required` wherever it stands. What comes out is valid under
draft 2020-12 and is left alone by a second reading. Repairs are noted by code (`rows.NOTES`), not hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from autotool_fast.chat import ToolCall
from autotool_fast.matching import canonical_json
from autotool_fast.tasks.sources.annotations import Schema, read_annotation, union
from autotool_fast.tasks.sources.literal import read_value
from autotool_fast.tasks.sources.rows import RowError

_NUMERIC_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_COUNT_LIMITS = ("minItems", "maxItems", "minLength", "maxLength")
_KINDS = {"string", "integer", "number", "boolean", "array", "object", "null"}


def read_tools(values: Any, *, empty_default: bool = True) -> tuple[tuple[dict, ...], set[str]]:
    """The tools of one row in the form chat templates take, and what had to be repaired.

    Args:
        values: a list of tool descriptions, or one.
        empty_default: whether the default "" is a default; some data sets write it for "none".

    Raises:
        RowError: bad_tools, no_tools or duplicate_tool.
    """
    values = [values] if isinstance(values, dict) else values
    if not isinstance(values, list):
        raise RowError("bad_tools", "no list")
    if not values:
        raise RowError("no_tools")
    notes: set[str] = set()
    tools: dict[str, dict] = {}
    for value in values:
        tool = read_tool(value, notes, empty_default=empty_default)
        name = tool["function"]["name"]
        if tools.setdefault(name, tool) != tool:
            raise RowError("duplicate_tool", name)
    return tuple(tools.values()), notes


def read_tool(value: Any, notes: set[str], *, empty_default: bool = True) -> dict[str, Any]:
    """One tool as `{"type": "function", "function": {name, description, parameters}}`.

    Args:
        value: the description.
        notes: codes out of `rows.NOTES` are added here.
        empty_default: see `read_tools`.

    Raises:
        RowError: bad_tools.
    """
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowError("bad_tools", "a tool has no name")
    parameters = function.get("parameters", function.get("arguments"))
    if isinstance(parameters, str):
        parameters = read_value(parameters) if parameters.strip() else None
    if parameters is not None and not isinstance(parameters, dict):
        raise RowError("bad_tools", f"the parameters of {function['name']} are no object")
    reader = _Reader(notes, empty_default)
    if _is_schema(parameters or {}):
        properties = parameters.get("properties") or {}
        stated = parameters.get("required")
        stated = function.get("required") if stated is None else stated
        required = stated if isinstance(stated, list) else []
        result = reader.object(properties, required, infer=False)
        _copy_additional(parameters, result, reader)
    else:
        result = reader.object(parameters or {}, [], infer=True)
    description = function.get("description")
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": description if isinstance(description, str) else "",
            "parameters": result,
        },
    }


def check_calls(calls: Iterable[ToolCall], tools: Sequence[dict]) -> set[str]:
    """Check an answer against the tools on offer; returns notes about what is suspicious but kept.

    Raises:
        RowError: unknown_tool or unknown_argument.
    """
    notes: set[str] = set()
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    for call in calls:
        if call.name not in schemas:
            raise RowError("unknown_tool", call.name)
        schema = schemas[call.name]
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", False)
        for name, value in call.arguments.items():
            if name not in properties and others is False:
                raise RowError("unknown_argument", f"{call.name}: {name}")
            if not fits(value, properties.get(name, others)):
                notes.add("answer_type_mismatch")
        if any(name not in call.arguments for name in schema.get("required", ())):
            notes.add("answer_misses_required")
    return notes


def defaults(tools: Iterable[dict]) -> dict[str, dict[str, Any]]:
    """Tool name -> argument name -> default, as `matching` takes them."""
    result = {}
    for tool in tools:
        properties = tool["function"]["parameters"].get("properties", {})
        stated = {name: schema["default"] for name, schema in properties.items() if "default" in schema}
        if stated:
            result[tool["function"]["name"]] = stated
    return result


def fits(value: Any, schema: Any) -> bool:
    """Whether a JSON value is valid under a schema that `read_tool` wrote (limits of size are not looked at).

    What other schemas hold beside that, such as references, is not looked at either.
    """
    if not isinstance(schema, dict):
        return schema is not False
    if value is None and schema.get("nullable") is True:
        return True
    if "enum" in schema and not any(value == item and type(value) is type(item) for item in schema["enum"]):
        return False
    if "anyOf" in schema and not any(fits(value, member) for member in schema["anyOf"]):
        return False
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is_kind(value, kind) for kind in kinds):
        return False
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        rest = value[len(first) :]
        return all(map(fits, value, first)) and all(fits(item, schema.get("items", {})) for item in rest)
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return all(name in value for name in schema.get("required", ())) and all(
            fits(item, properties.get(name, others)) for name, item in value.items()
        )
    return True


def _is_kind(value: Any, kind: str) -> bool:
    if kind == "integer":
        return not isinstance(value, bool) and (
            isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        )
    if kind == "number":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    types = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}
    return isinstance(value, types[kind])


def _is_schema(parameters: dict[str, Any]) -> bool:
    """Whether this is a schema, not a flat map of parameters (which may be called type or properties)."""
    if isinstance(parameters.get("type", ""), dict):
        return False
    properties = parameters.get("properties")
    if properties is None:
        return "type" in parameters and not any(isinstance(value, dict) for value in parameters.values())
    return isinstance(properties, dict) and all(isinstance(value, (dict, str)) for value in properties.values()) and (
        not isinstance(properties.get("type"), str) or "type" in parameters
    )


def _copy_additional(source: dict[str, Any], result: Schema, reader: _Reader) -> None:
    additional = source.get("additionalProperties")
    if isinstance(additional, bool):
        result["additionalProperties"] = additional
    elif isinstance(additional, dict):
        result["additionalProperties"] = reader.property(additional)[0]


class _Reader:
    """Reads parts of a description, noting what it repairs."""

    def __init__(self, notes: set[str], empty_default: bool) -> None:
        self._notes, self._empty_default = notes, empty_default

    def object(self, properties: dict[str, Any], required: Iterable[Any], *, infer: bool) -> Schema:
        """An object's schema. With `infer`, whatever is neither optional nor has a default is required."""
        stated = [name for name in required if isinstance(name, str)]
        if any(name not in properties for name in stated):
            self._notes.add("required_unknown")
        result: dict[str, Schema] = {}
        needed = []
        for name, value in properties.items():
            result[name], optional = self.property(value)
            own = value.get("required") if isinstance(value, dict) else None
            own = own if isinstance(own, bool) else {"true": True, "false": False}.get(str(own).lower())
            if own if own is not None else (name in stated or (infer and not optional)):
                needed.append(name)
        return {"type": "object", "properties": result, "required": needed}

    def property(self, value: Any) -> tuple[Schema, bool]:
        """The schema of one argument, and whether it may be left out."""
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, dict):
            self._notes.add("unknown_type")
            return {}, False
        schema, optional = self._type(value)
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if "array" in kinds:
            self._items(value, schema)
        if "object" in kinds:
            nested = value.get("properties")
            if isinstance(nested, dict):
                required = value.get("required")
                schema |= {
                    key: part
                    for key, part in self.object(
                        nested, required if isinstance(required, list) else [], infer=False
                    ).items()
                    if key != "type"
                }
            _copy_additional(value, schema, self)
        if isinstance(value.get("enum"), list) and value["enum"]:
            schema["enum"] = list({canonical_json(item, strict=True): item for item in value["enum"]}.values())
        if isinstance(value.get("description"), str) and value["description"]:
            schema["description"] = value["description"]
        for key in (*_NUMERIC_LIMITS, *_COUNT_LIMITS):
            limit = value.get(key)
            whole = isinstance(limit, int) and not isinstance(limit, bool)
            if (whole and limit >= 0) or (key in _NUMERIC_LIMITS and (whole or isinstance(limit, float))):
                schema[key] = limit
        if isinstance(value.get("format"), str):
            schema["format"] = value["format"]
        has_default = self._default(value, schema)
        optional = optional or has_default or value.get("optional") is True
        return schema, optional

    def _type(self, value: dict[str, Any]) -> tuple[Schema, bool]:
        kind = value.get("type")
        if isinstance(kind, dict):
            return self.property(kind)
        if isinstance(kind, str) and kind.strip():
            if kind in _KINDS:
                return {"type": kind}, False
            annotation = read_annotation(kind)
            if annotation is not None:
                return dict(annotation.schema), annotation.optional
            self._notes.add("unknown_type")
            return {}, False
        members = kind if isinstance(kind, list) else value.get("anyOf", value.get("oneOf"))
        if isinstance(members, list) and members:
            read = [self.property(member) for member in members]
            schema, nullable = union([schema for schema, _ in read])
            return dict(schema), nullable or any(optional for _, optional in read)
        if isinstance(value.get("properties"), dict):
            return {"type": "object"}, False
        if "items" in value or "prefixItems" in value:
            return {"type": "array"}, False
        if kind is not None or not (set(value) & {"enum", "description", "default"} or not value):
            self._notes.add("unknown_type")
        return {}, False

    def _items(self, value: dict[str, Any], schema: Schema) -> None:
        first = value.get("prefixItems", value.get("items"))
        if isinstance(first, list) and first:
            schema.pop("items", None)
            schema["prefixItems"] = [self.property(item)[0] for item in first]
        items = value.get("items")
        if isinstance(items, (dict, str)):
            read = self.property(items)[0]
            if read:
                schema["items"] = read

    def _default(self, value: dict[str, Any], schema: Schema) -> bool:
        """Put the default into the schema where it fits; returns whether the argument can be left out."""
        if "default" not in value:
            return False
        default = value["default"]
        if default == "" and not self._empty_default:
            return False
        if default is None:
            return True
        if not fits(default, schema) and isinstance(default, str):
            # Flat maps write every default as text: "10" for an int, "True" for a bool.
            try:
                default = read_value(default)
            except RowError:
                default = None
        if default is None or not fits(default, schema):
            self._notes.add("default_of_other_type")
        else:
            schema["default"] = default
        return True
