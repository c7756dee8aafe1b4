"""BFCL's ground truth as the calls a perfect policy would make.

Single-turn answers list the accepted values of each argument ("" = may be left out); here one of each is chosen. Java
and JavaScript arguments are written as source text, which is what those categories ask for and what the checker
converts. Multi-turn answers are Python calls as text; they are parsed, not run.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from autotool_fast.chat import ToolCall

_LEFT_OUT = object()
_JAVA_ELEMENT = {"integer": "int", "long": "long", "double": "double", "float": "float", "boolean": "boolean"}


def single_turn_calls(
    category: str, functions: Sequence[Mapping[str, Any]], answer: Sequence[Mapping[str, Any]]
) -> tuple[ToolCall, ...]:
    """One accepted call for each expected one. `functions` are typed as the checker sees them."""
    by_name = {function["name"]: function["parameters"] for function in functions}
    calls = []
    for expected in answer:
        ((name, accepted),) = expected.items()
        properties, required = by_name[name]["properties"], by_name[name].get("required", ())
        arguments = {}
        for key, values in accepted.items():
            value = _choose(values)
            undocumented = key not in properties and "" in values
            if undocumented or (value is _LEFT_OUT and key not in required):
                continue
            if value is _LEFT_OUT:  # must be given, and nothing but "" is accepted
                value = {"array": [], "dict": {}}.get(properties[key]["type"], "")
            if category == "simple_java":
                value = java_text(value, properties[key]["type"], properties[key].get("items", {}).get("type"))
            elif category == "simple_javascript":
                value = javascript_text(value)
            arguments[key] = value
        calls.append(ToolCall(name, arguments))
    return tuple(calls)


def _choose(accepted: Any) -> Any:
    """The first value that is given; inside objects, every field lists its accepted values in turn."""
    if not isinstance(accepted, list):
        return accepted
    given = [value for value in accepted if value != ""]
    if not given:
        return _LEFT_OUT
    return _fields(given[0])


def _fields(value: Any) -> Any:
    if isinstance(value, dict):
        chosen = {key: _choose(accepted) for key, accepted in value.items()}
        return {key: item for key, item in chosen.items() if item is not _LEFT_OUT}
    if isinstance(value, list):
        return [_fields(item) if isinstance(item, dict) else item for item in value]
    return value


def java_text(value: Any, kind: str, element: str | None = None) -> str:
    """A value as Java source."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        inner = element or "any"
        quoted = kind == "ArrayList" and inner in ("String", "any", "char")
        items = ", ".join(_java_element(item, inner, quoted) for item in value)
        if kind == "ArrayList":
            return f"new ArrayList<>(Arrays.asList({items}))"
        return f"new {_JAVA_ELEMENT.get(inner, 'String')}[]{{{items}}}"
    if isinstance(value, dict):
        puts = " ".join(f"put({json.dumps(key)}, {_java_element(item, 'any', True)});" for key, item in value.items())
        return f"new HashMap<String, Object>() {{{{ {puts} }}}}"
    return f"{value}{ {'long': 'L', 'float': 'f'}.get(kind, '') }"


def _java_element(value: Any, kind: str, quoted: bool) -> str:
    return json.dumps(value, ensure_ascii=False) if quoted and isinstance(value, str) else java_text(value, kind)


def javascript_text(value: Any) -> str:
    """A value as JavaScript source."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def multi_turn_calls(turn: Sequence[str], functions: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
    """The calls of one turn; positional arguments get their names from the functions' documents.

    Raises:
        ValueError: a text is not a call of a documented function with literal arguments.
    """
    names = {function["name"]: list(function["parameters"]["properties"]) for function in functions}
    calls = []
    for text in turn:
        node = ast.parse(text, mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in names:
            raise ValueError(f"not a call of a documented function: {text}")
        arguments = dict(zip(names[node.func.id], map(ast.literal_eval, node.args), strict=False))
        arguments.update({keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords})
        calls.append(ToolCall(node.func.id, json.loads(json.dumps(arguments))))  # tuples become arrays
    return tuple(calls)
