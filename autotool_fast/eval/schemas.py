"""Function descriptions of benchmarks as JSON schemas.

Benchmarks type parameters in words of their own ("dict", "float", "list(string)"); chat templates and servers expect
JSON schema. Types without a counterpart are left out, so that anything fits.
"""

from __future__ import annotations

from typing import Any

_TYPES = {
    "dict": "object", "object": "object", "HashMap": "object",
    "string": "string", "str": "string", "String": "string", "char": "string", "enum": "string",
    "integer": "integer", "int": "integer", "long": "integer",
    "float": "number", "double": "number", "number": "number",
    "boolean": "boolean", "bool": "boolean", "Boolean": "boolean",
    "array": "array", "list": "array", "tuple": "array", "Array": "array", "ArrayList": "array",
    "list(string)": "array", "list(enum)": "array", "list(str)": "array", "objectArray": "array",
    "null": "null",
}  # fmt: skip


def json_schema(schema: Any) -> dict[str, Any]:
    """One parameter's description as a JSON schema; unknown keys are kept."""
    if not isinstance(schema, dict):
        return {}
    result = {key: value for key, value in schema.items() if key not in ("type", "properties", "items", "required")}
    kind = schema.get("type")
    if isinstance(kind, str) and kind in _TYPES:
        result["type"] = _TYPES[kind]
    if isinstance(schema.get("properties"), dict):
        result["properties"] = {name: json_schema(value) for name, value in schema["properties"].items()}
    if "items" in schema:
        result["items"] = json_schema(schema["items"])
    if isinstance(schema.get("required"), list):
        result["required"] = schema["required"]
    return result


def tool(name: str, description: str, parameters: Any) -> dict[str, Any]:
    """A function in the form chat templates take."""
    schema = {"properties": {}, **json_schema(parameters), "type": "object"}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}
