"""JSON schemas out of functions: type hints say what an argument is, the docstring what it means.

The result is that of `transformers.utils.get_json_schema` for functions that it accepts (Google's docstring style, an
`Args:` section). More is accepted here: arguments that are not described, hints of `TypedDict` and `tuple`. Stands
alone (the standard library only), because it runs inside the sandbox.
"""

import collections.abc
import inspect
import re
import types
import typing

STATE = "state"
"""A first parameter of this name gets the episode's state and is not shown to the model."""

_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_SECTION = re.compile(r"^\s*(Args|Arguments|Returns|Raises|Yields|Example|Examples|Note|Notes):\s*$")
_ARGUMENT = re.compile(r"^\s*(\w+)(?:\s*\([^)]*\))?:\s*(.*)$")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


class SignatureError(Exception):
    """A function that cannot be described; says which and why."""


def describe(function):
    """The schema of a function in the form chat templates take.

    Raises:
        SignatureError: an argument without a type hint, a hint that has no JSON form, `*args`, or no docstring.
    """
    name = function.__name__
    text = inspect.getdoc(function)
    if not text:
        raise SignatureError(f"{name} has no docstring; its first lines tell the model what it does")
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:
        raise SignatureError(f"{name}: its type hints cannot be read ({error})") from None
    description, about = split_docstring(text)
    properties, required = {}, []
    for argument in arguments(function):
        if argument.kind not in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY):
            raise SignatureError(f"{name}: {argument.name} cannot be given by name")
        if argument.name not in hints:
            raise SignatureError(f"{name}: argument {argument.name} has no type hint")
        try:
            schema = of_hint(hints[argument.name])
        except TypeError as error:
            raise SignatureError(f"{name}: argument {argument.name}: {error}") from None
        said = about.get(argument.name, "")
        choices = _CHOICES.search(said)
        if choices:
            schema["enum"] = [choice.strip().strip("\"'") for choice in choices.group(1).strip("[]").split(",")]
            said = said[: choices.start()].strip()
        if said:
            schema["description"] = said
        properties[argument.name] = schema
        if argument.default is argument.empty:
            required.append(argument.name)
    unknown = sorted(set(about) - set(properties) - {STATE})
    if unknown:
        raise SignatureError(f"{name}: the docstring describes {unknown[0]}, which is no argument")
    parameters = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def arguments(function):
    """The parameters that the model gives."""
    given = list(inspect.signature(function).parameters.values())
    return given[1:] if takes_state(function) else given


def takes_state(function):
    """Whether the function gets the episode's state."""
    return next(iter(inspect.signature(function).parameters), None) == STATE


def of_hint(hint):
    """The JSON schema of a type hint.

    Raises:
        TypeError: it has none.
    """
    if hint is typing.Any:
        return {}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _of_union(parts)
    if origin is typing.Literal:
        kinds = {_PLAIN.get(type(choice)) for choice in parts}
        one = {"type": kinds.pop()} if len(kinds) == 1 else {}
        return {**one, "enum": list(parts)}
    if typing.is_typeddict(hint):
        fields = {name: of_hint(part) for name, part in typing.get_type_hints(hint).items()}
        return {"type": "object", "properties": fields, "required": sorted(hint.__required_keys__)}
    kind = origin or hint
    if kind in (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable):
        if kind is tuple and parts and parts[-1] is not Ellipsis:
            return {"type": "array", "prefixItems": [of_hint(part) for part in parts]}
        return {"type": "array", "items": of_hint(parts[0])} if parts else {"type": "array"}
    if kind in (dict, collections.abc.Mapping):
        return {"type": "object", "additionalProperties": of_hint(parts[1])} if parts else {"type": "object"}
    raise TypeError(f"the type hint {getattr(hint, '__name__', hint)} has no JSON form")


def _of_union(parts):
    schemas = [of_hint(part) for part in parts if part is not type(None)]
    if len(schemas) == 1:
        schema = schemas[0]
    elif all(set(schema) == {"type"} for schema in schemas):
        schema = {"type": sorted(schema["type"] for schema in schemas)}
    else:
        schema = {"anyOf": schemas}
    return {**schema, "nullable": True} if type(None) in parts else schema


def split_docstring(text):
    """What a Google-style docstring says first, and what it says of each argument: (text, {name: text})."""
    lines, about, section, last, depth = [], {}, None, None, 0
    for line in text.splitlines():
        heading = _SECTION.match(line)
        if heading:
            section, last = heading.group(1), None
        elif section is None:
            lines.append(line)
        elif section in ("Args", "Arguments"):
            found = _ARGUMENT.match(line)
            if found and (last is None or _indent(line) <= depth):
                last, depth = found.group(1), _indent(line)
                about[last] = found.group(2).strip()
            elif last is not None and line.strip():
                about[last] += " " + line.strip()
    return " ".join(line.strip() for line in lines if line.strip()), about


def _indent(line):
    return len(line) - len(line.lstrip())
