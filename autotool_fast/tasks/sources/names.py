"""Tool names for wire formats that cannot carry every name.

The project's own reply format is JSON and carries any name. Chat-completion endpoints accept letters, digits, `_` and
`-` up to 64 characters; `with_safe_names` gives an example such names and keeps the originals in `meta["name_map"]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from autotool_fast.chat import ToolCall
from autotool_fast.tasks.example import Example, call_message, read_call

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_LENGTH = 64


def safe_names(names: Iterable[str]) -> dict[str, str]:
    """Original -> safe name, without collisions; safe names stay as they are. Depends on the order only in a clash."""
    names = list(dict.fromkeys(names))
    result = {name: name for name in names if name and len(name) <= _LENGTH and not _UNSAFE.search(name)}
    taken = set(result)
    for name in names:
        if name in result:
            continue
        base = _UNSAFE.sub("_", name).strip("_")[:_LENGTH] or "tool"
        safe, count = base, 1
        while safe in taken:
            count += 1
            safe = f"{base[: _LENGTH - len(str(count)) - 1]}_{count}"
        result[name] = safe
        taken.add(safe)
    return {name: result[name] for name in names}


def with_safe_names(example: Example) -> Example:
    """The example with safe names in its tools, history and answer."""
    history = [read_call(call) for message in example.messages for call in message.get("tool_calls", ())]
    offered = [tool["function"]["name"] for tool in example.tools]
    spoken = [message["name"] for message in example.messages if "name" in message]
    renamed = safe_names([*offered, *(call.name for call in history), *spoken])

    def rename(call: ToolCall) -> ToolCall:
        return ToolCall(renamed[call.name], call.arguments)

    def message(value: dict) -> dict:
        if "tool_calls" in value:
            return call_message(value["content"], tuple(rename(read_call(call)) for call in value["tool_calls"]))
        return {**value, "name": renamed[value["name"]]} if "name" in value else value

    return replace(
        example,
        tools=tuple(
            {**tool, "function": {**tool["function"], "name": renamed[tool["function"]["name"]]}}
            for tool in example.tools
        ),
        messages=tuple(map(message, example.messages)),
        answer=tuple(map(rename, example.answer)),
        meta={**example.meta, "name_map": {safe: name for name, safe in renamed.items() if safe != name}},
    )
