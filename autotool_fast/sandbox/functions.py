"""A service for `worker`: a user's file of plain functions, called by name with arguments that fit their schemas.

What the file may define:

    functions with type hints and a docstring   the tools; every public one that the file itself defines, or
    TOOLS = [add, (lookup, {...}), ...]         those, with a JSON schema beside the ones that need one
    setup(given) -> state                       an episode's state, of what the problem gives; a copy of that without it
    score(state, transcript) -> bool or float   whether an episode solved its problem

A tool whose first parameter is `state` gets the episode's state; module variables are the episode's own as well, since
every episode has a process of its own. Whatever a tool returns becomes text; whatever it raises becomes one line.
"""

import ast
import contextlib
import copy
import importlib.util
import inspect
import json
import os
import re
import sys

import jsonschema
import referencing

_HERE = os.path.dirname(os.path.abspath(__file__))
_RESERVED = ("setup", "score")
_NAME = re.compile(r"[\w.-]{1,64}")
_ERROR_CHARS = 300
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def _import(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


schemas = _import(os.path.join(_HERE, "schemas.py"), "schemas")


class ToolFileError(Exception):
    """What is wrong with the file, in words for its author."""


def load(argument):
    """Read the file that `argument` (JSON: path, result_chars) names; returns (operations, facts)."""
    chosen = json.loads(argument)
    path = chosen["path"]
    sys.path.insert(0, os.path.dirname(path))
    try:
        module = _import(path, "user_tools")
    except BaseException as error:
        raise ToolFileError(f"{describe_error(error)}{_line_of(error, path)}") from None
    tools = read_tools(module)
    scoring = {name: getattr(module, name, None) for name in _RESERVED}
    for name, function in scoring.items():
        if function is not None and not callable(function):
            raise ToolFileError(f"{name} is no function")
    episode = Episode(tools, scoring["setup"], scoring["score"], chosen["result_chars"])
    operations = {"start": episode.start, "call": episode.call, "score": episode.score}
    facts = {
        "tools": [tool.schema for tool in tools.values()],
        "defaults": {tool.name: tool.defaults() for tool in tools.values()},
        "scores": scoring["score"] is not None,
    }
    return operations, facts


def _line_of(error, path):
    """Where the file itself raised, as text in brackets."""
    number = error.lineno if isinstance(error, SyntaxError) and error.filename == path else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            number = trace.tb_lineno
        trace = trace.tb_next
    return "" if number is None else f" (line {number})"


class Tool:
    """A function, the schema shown to the model, and the check of its arguments."""

    def __init__(self, function, schema):
        self.function, self.schema = function, schema
        described = schema["function"]
        self.name = described["name"]
        self.takes_state = schemas.takes_state(function)
        self.names = list(described["parameters"].get("properties", {}))
        self.takes_others = not described["parameters"].keys().isdisjoint(("additionalProperties", "patternProperties"))
        # An empty registry: a reference in a schema can name no file and no address.
        checked = _with_null(described["parameters"])
        self.validator = jsonschema.Draft202012Validator(checked, registry=referencing.Registry())

    def defaults(self):
        """Argument -> its default, where that is JSON."""
        found = {}
        for argument in schemas.arguments(self.function):
            if argument.name in self.names and argument.default is not argument.empty:
                with contextlib.suppress(TypeError, ValueError):
                    found[argument.name] = json.loads(json.dumps(argument.default, allow_nan=False))
        return found

    def problem(self, arguments):
        """Why the arguments do not fit, or None."""
        unknown = sorted(set(arguments) - set(self.names))
        if unknown and not self.takes_others:
            return f"unknown argument {unknown[0]!r}; the arguments are: {', '.join(self.names) or 'none'}"
        error = jsonschema.exceptions.best_match(self.validator.iter_errors(arguments))
        if error is None:
            return None
        place = ".".join(str(part) for part in error.absolute_path)
        return f"{place}: {error.message}" if place else error.message


def _with_null(schema):
    """The schema with `nullable`, which chat templates know and JSON schema does not, spelled out."""
    if isinstance(schema, list):
        return [_with_null(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _with_null(part) for key, part in schema.items()}
    if schema.get("nullable") is True:
        del schema["nullable"]
        return {"anyOf": [schema, {"type": "null"}]}
    return schema


def read_tools(module):
    """The tools of a module by name, in the file's order.

    Raises:
        ToolFileError: there is none, two have one name, or one cannot be described.
    """
    entries = getattr(module, "TOOLS", None)
    if entries is None:
        own = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
        public = [f for f in own if not f.__name__.startswith("_") and f.__name__ not in _RESERVED]
        entries = list(dict.fromkeys(public))
        _refuse_redefinitions(module)
    if not isinstance(entries, (list, tuple)):
        raise ToolFileError("TOOLS is no list of functions")
    tools = {}
    for entry in entries:
        tool = _read_tool(entry)
        if tool.name in tools:
            raise ToolFileError(f"two tools are named {tool.name}")
        tools[tool.name] = tool
    if not tools:
        raise ToolFileError("it defines no tool: a public function with type hints and a docstring")
    return tools


def _refuse_redefinitions(module):
    """Python keeps the last of two functions of one name without a word."""
    with open(module.__file__, encoding="utf-8") as file:
        names = [node.name for node in ast.parse(file.read()).body if isinstance(node, ast.FunctionDef)]
    for name in names:
        if names.count(name) > 1:
            raise ToolFileError(f"two functions are named {name}")


def _read_tool(entry):
    function, schema = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
    if not callable(function):
        raise ToolFileError(f"TOOLS holds {function!r}, which is no function")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise ToolFileError(f"{function.__name__} is asynchronous or a generator; a tool returns its result")
    try:
        if schema is None:
            schema = schemas.describe(function)
        else:
            schema = _whole(function, schema)
        return Tool(function, schema)
    except schemas.SignatureError as error:
        raise ToolFileError(str(error)) from None


def _whole(function, schema):
    """An explicit schema, with or without its wrapper, as chat templates take it."""
    label = getattr(function, "__name__", "a tool")
    inner = schema.get("function", schema) if isinstance(schema, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("parameters"), dict):
        raise ToolFileError(f"{label}: its schema has no parameters")
    name = inner.get("name", label)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ToolFileError(f"{label}: its schema's name is not letters, digits, '_', '.' or '-'")
    try:
        jsonschema.Draft202012Validator.check_schema(inner["parameters"])
        json.dumps(inner, allow_nan=False)
    except jsonschema.SchemaError as error:
        raise ToolFileError(f"{label}: its schema is not valid ({error.message})") from None
    except (TypeError, ValueError) as error:
        raise ToolFileError(f"{label}: its schema is no JSON ({error})") from None
    description = inner.get("description") or inspect.getdoc(function) or ""
    return {"type": "function", "function": {**inner, "name": name, "description": description}}


class Episode:
    """What this process, which plays one episode, remembers."""

    def __init__(self, tools, setup, score, result_chars):
        self.tools, self.make_state, self.judge, self.result_chars = tools, setup, score, result_chars
        self.state = None

    def start(self, given):
        """Make the state; returns None, or what went wrong."""
        try:
            self.state = copy.deepcopy(given) if self.make_state is None else self.make_state(given)
        except BaseException as error:
            return f"setup failed: {describe_error(error)}"
        return None

    def call(self, name, arguments):
        """Run one call: {"text": for the model, "ran": whether the arguments fitted and the tool returned}."""
        tool = self.tools.get(name)
        if tool is None:
            return self._error(f"there is no tool {name!r}; the tools are: {', '.join(self.tools)}")
        try:
            problem = tool.problem(arguments)
            if problem is not None:
                return self._error(f"{name}: {problem}")
            result = tool.function(self.state, **arguments) if tool.takes_state else tool.function(**arguments)
            return {"text": cut(as_text(result), self.result_chars), "ran": True}
        except BaseException as error:
            return self._error(f"{name}: {describe_error(error)}")

    def score(self, transcript):
        """What the file's score says: {"value": a number} or {"error": text}."""
        try:
            value = self.judge(self.state, transcript)
            if not isinstance(value, (bool, int, float)):
                return {"error": f"score returned {type(value).__name__}, not a truth value or a number"}
            return {"value": float(value)} if value == value else {"error": "score returned NaN"}
        except BaseException as error:
            return {"error": f"score failed: {describe_error(error)}"}

    def _error(self, text):
        return {"text": cut(f"Error: {text}", self.result_chars), "ran": False}


def as_text(result):
    """What the model reads of a result: text as it is, anything else as JSON."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"the result is not JSON ({reason})") from None


def cut(text, size):
    """The text, or its two ends with a note between them, `size` characters in all."""
    if len(text) <= size:
        return text
    note = f" ... {len(text) - size} characters left out ... "
    note = f" ... {len(text) - size + len(note)} characters left out ... "
    head = max(0, size - len(note) + 1) // 2
    tail = max(0, size - len(note) - head)
    return text[:head] + note + text[len(text) - tail :]


def describe_error(error):
    """An exception as one short line that can be shown, without traceback and without paths."""
    try:
        said = str(error)
    except BaseException:
        said = ""
    name = type(error).__name__
    line = " ".join((f"{name}: {said}" if said else name).split())
    line = re.sub(r"(?:/[\w.+-]+){2,}", lambda path: os.path.basename(path.group()), line)
    return cut(_HIDDEN.sub("?", line), _ERROR_CHARS)
