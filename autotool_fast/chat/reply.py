"""What an assistant turn says: modes, calls, the strict parser and its inverse.

`parse_reply` is the one parser of the project: reward, rollout, evaluation and chat all read replies through it. It
accepts any string and never raises; what it cannot accept it reports as one of `ERROR_KINDS`. Formats differ only in
how a call is written (`SYNTAXES`). Token ids are `rendering`'s business; what a call does is left to `tools` and the
tasks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autotool_fast.errors import UserError

MODES = ("think", "no_think")
THINK_TAG, NO_THINK_TAG = "[think]", "[no_think]"
_TAGS = {THINK_TAG: "think", NO_THINK_TAG: "no_think"}

SYNTAXES = ("tagged", "bare")
"""How calls are written. tagged: any number of `<tool_call>{"name", "arguments"}</tool_call>`, text around them.
bare: the whole body is one `{"name", "parameters"}`, `<|python_tag|>` allowed before it; any other body is text."""

ERROR_KINDS = {
    "no_mode_tag": "the reply does not open with [think] or [no_think]",
    "no_think_block": "[think] is not followed by a <think> block",
    "unclosed_think": "the <think> block has no end",
    "think_in_no_think": "a [no_think] reply thinks",
    "stray_tag": "a tag outside its place, such as a second think block or an end tag without its start",
    "bad_json": "a call is not JSON (strict: no raw control characters), or nests deeper than 100 levels",
    "non_finite_number": "a call holds NaN, Infinity or a number beyond float range",
    "duplicate_key": "an object in a call has the same key twice",
    "unclosed_call": "the reply ends before </tool_call>",
    "trailing_text_in_call": "something follows the JSON object inside a call, a second object for instance",
    "bad_call_shape": "a call is not an object with a name and arguments alone",
    "bad_name": "the name of a call is missing, empty or not a string",
    "bad_arguments": "the arguments of a call are missing or not an object",
    "empty_reply": "neither text nor a call",
}
"""Every error kind the parser reports, and what it means. The names are stable."""

_MAX_DEPTH = 100  # a fixed limit, so that a reply's verdict does not depend on the caller's stack
_PYTHON_TAG = "<|python_tag|>"
_WHITESPACE = re.compile(r"[ \t\r\n]*")
_BODY_TAG = {
    "tagged": re.compile(r"</?tool_call>|</?think>"),
    "bare": re.compile(r"</?tool_call>|</?think>|" + re.escape(_PYTHON_TAG)),
}
_ARGUMENTS = {"tagged": "arguments", "bare": "parameters"}
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class ToolCall:
    """One call: the tool's name and its arguments (a JSON object)."""

    name: str
    arguments: dict[str, Any]

    def to_json(self, syntax: str = "tagged") -> str:
        """The call as the JSON object the model is asked to write."""
        text = json.dumps({"name": self.name, _ARGUMENTS[syntax]: self.arguments}, ensure_ascii=False)
        return _SURROGATE.sub(lambda half: f"\\u{ord(half.group()):04x}", text)  # half a pair has no UTF-8 form


@dataclass(frozen=True)
class ParsedReply:
    """What one assistant turn says. `errors` is empty exactly when the reply is well formed."""

    mode: str | None
    think: str | None
    calls: tuple[ToolCall, ...]
    text: str
    errors: tuple[str, ...] = ()

    @property
    def length_class(self) -> int:
        """1 short, 0 long, -1 malformed. An empty think block counts as short."""
        if self.errors:
            return -1
        return 0 if self.mode == "think" and self.think and self.think.strip() else 1


class _BadCall(ValueError):
    """A tool call that is not acceptable; the argument is the error kind."""


def _reject_constant(name: str) -> Any:
    raise _BadCall("non_finite_number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _BadCall("non_finite_number")
    return value


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _BadCall("duplicate_key")
    return result


_DECODER = json.JSONDecoder(
    parse_constant=_reject_constant, parse_float=_finite_float, object_pairs_hook=_unique_object, strict=True
)


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def _decode(text: str, start: int) -> tuple[Any, int]:
    """The JSON value at `start` and the position after it, white space on both sides skipped."""
    try:
        value, end = _DECODER.raw_decode(text, _WHITESPACE.match(text, start).end())
    except _BadCall:
        raise
    except (ValueError, RecursionError):
        raise _BadCall("bad_json") from None
    if _too_deep(value):
        raise _BadCall("bad_json")
    return value, _WHITESPACE.match(text, end).end()


def _as_call(value: Any, syntax: str) -> ToolCall:
    key = _ARGUMENTS[syntax]
    if not isinstance(value, dict) or not set(value) <= {"name", key}:
        raise _BadCall("bad_call_shape")
    if not isinstance(value.get("name"), str) or not value["name"]:
        raise _BadCall("bad_name")
    if not isinstance(value.get(key), dict):
        raise _BadCall("bad_arguments")
    return ToolCall(value["name"], value[key])


def _read_tagged(text: str, start: int) -> tuple[ToolCall, int]:
    """Read one JSON call at `start` up to and including its closing tag; returns it and the end position.

    The JSON is decoded before the closing tag is looked for, so a tag inside a string is part of the string.
    """
    value, end = _decode(text, start)
    if not text.startswith("</tool_call>", end):
        raise _BadCall("unclosed_call" if end == len(text) else "trailing_text_in_call")
    return _as_call(value, "tagged"), end + len("</tool_call>")


def _read_bare(body: str) -> ToolCall | None:
    """The call that is the whole body, or None when the body is no call."""
    start = _WHITESPACE.match(body).end()
    if body.startswith(_PYTHON_TAG, start):
        start += len(_PYTHON_TAG)
    elif not body.startswith("{", start):
        return None
    value, end = _decode(body, start)
    if end != len(body):
        raise _BadCall("trailing_text_in_call")
    return _as_call(value, "bare")


def _read_body(body: str, syntax: str) -> tuple[list[ToolCall], str, list[str]]:
    calls: list[ToolCall] = []
    texts: list[str] = []
    position = 0
    try:
        if syntax == "bare" and (call := _read_bare(body)) is not None:
            return [call], "", []
        while True:
            tag = _BODY_TAG[syntax].search(body, position)
            if tag is None:
                texts.append(body[position:])
                return calls, "".join(texts).strip(), []
            texts.append(body[position : tag.start()])
            if syntax == "bare" or tag.group() != "<tool_call>":
                raise _BadCall("stray_tag")
            call, position = _read_tagged(body, tag.end())
            calls.append(call)
    except _BadCall as error:
        return calls, "".join(texts).strip(), [str(error)]


def parse_reply(text: str, syntax: str = "tagged") -> ParsedReply:
    """Parse one assistant turn (stop token removed). Never raises.

    Accepted: `[think]` followed by a `<think>` block, or `[no_think]`; then text and calls in the given syntax (see
    `SYNTAXES`), each one JSON object. White space before the tag, text around tagged calls and an empty think block
    are accepted; the order of keys is free. Error kinds: no_mode_tag, no_think_block, unclosed_think,
    think_in_no_think, stray_tag, bad_json, non_finite_number, duplicate_key, unclosed_call, trailing_text_in_call,
    bad_call_shape, bad_name, bad_arguments, empty_reply.
    """
    start = _WHITESPACE.match(text).end()
    tag = next((tag for tag in _TAGS if text.startswith(tag, start)), None)
    if tag is None:
        return ParsedReply(None, None, (), text.strip(), ("no_mode_tag",))
    mode = _TAGS[tag]
    position = _WHITESPACE.match(text, start + len(tag)).end()
    think = None
    if text.startswith("<think>", position):
        end = text.find("</think>", position)
        if end < 0:
            return ParsedReply(mode, text[position + len("<think>") :], (), "", ("unclosed_think",))
        think = text[position + len("<think>") : end]
        position = end + len("</think>")
        if mode == "no_think" and think.strip():
            return ParsedReply(mode, think, (), text[position:].strip(), ("think_in_no_think",))
    elif mode == "think":
        return ParsedReply(mode, None, (), text[position:].strip(), ("no_think_block",))
    calls, body, errors = _read_body(text[position:], syntax)
    if not errors and not calls and not body:
        errors = ["empty_reply"]
    return ParsedReply(mode, think, tuple(calls), body, tuple(errors))


def unwritable(calls: Sequence[ToolCall], text: str, syntax: str) -> str | None:
    """Why a reply of calls and text has no form in a syntax, in a few words; None when it has."""
    if syntax == "bare":
        if len(calls) > 1:
            return "several calls in one turn"
        if calls and text:
            return "text beside a call"
        if text.lstrip().startswith(("{", _PYTHON_TAG)):
            return "text that would be read as a call"
    return None


def render_reply(
    think: str | None, calls: tuple[ToolCall, ...] = (), text: str = "", syntax: str = "tagged"
) -> str:
    """The reply text that `parse_reply` reads back: think None gives a `[no_think]` reply.

    Raises:
        UserError: a bare reply holds one call without text, or text that is not read as a call.
    """
    head = f"{NO_THINK_TAG}\n" if think is None else f"{THINK_TAG}\n<think>\n{think}\n</think>\n"
    if syntax == "bare":
        if problem := unwritable(calls, text, syntax):
            remedy = "this format takes one call, or plain text"
            raise UserError(f"a reply cannot be written: {problem}", where="chat format", remedy=remedy)
        return head + (calls[0].to_json(syntax) if calls else text)
    blocks = [f"<tool_call>\n{call.to_json()}\n</tool_call>" for call in calls]
    return head + "\n".join(([text] if text else []) + blocks)
