"""Tools: JSON-schema descriptions that really execute.

A `Tool` couples a schema with a function; a `Toolbox` validates arguments against the schema before it runs anything
and turns every call that does not fit into an error the episode can show the model. Functions here run in this process
and must be trusted and quick; they never see model text, only validated JSON arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from jsonschema import Draft202012Validator

from autotool_fast.chat import ToolCall


@dataclass(frozen=True)
class Tool:
    """A function the model may call.

    Args:
        name: what the model writes.
        description: one sentence for the prompt.
        parameters: JSON schema of the arguments, `{"type": "object", ...}`.
        function: called as `function(state, **arguments)`; returns a JSON value.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[..., Any] = field(repr=False)
    _validator: Draft202012Validator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        Draft202012Validator.check_schema(self.parameters)
        object.__setattr__(self, "_validator", Draft202012Validator(self.parameters))

    @property
    def schema(self) -> dict[str, Any]:
        """The description in the form chat templates take."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def problem(self, arguments: dict[str, Any]) -> str | None:
        """Why the arguments do not fit the schema, or None."""
        try:
            error = next(iter(self._validator.iter_errors(arguments)), None)
        except RecursionError:
            return "the arguments are nested too deeply"
        return None if error is None else error.message


@dataclass(frozen=True)
class ToolResult:
    """Outcome of one call: a JSON value, or the kind of error."""

    value: Any = None
    error: str | None = None


class Toolbox:
    """The tools of one episode, by name."""

    def __init__(self, tools: Iterable[Tool]) -> None:
        self.tools = {tool.name: tool for tool in tools}

    def execute(self, call: ToolCall, state: Any) -> ToolResult:
        """Validate and run one call against `state`. Unknown names and bad arguments never reach a function."""
        tool = self.tools.get(call.name)
        if tool is None:
            return ToolResult(error=f"unknown tool {call.name!r}")
        problem = tool.problem(call.arguments)
        if problem is not None:
            return ToolResult(error=problem)
        return ToolResult(value=tool.function(state, **call.arguments))
