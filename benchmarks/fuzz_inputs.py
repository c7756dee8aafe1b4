"""Inputs for `benchmarks.fuzz`: replies, rows, files and options that are right, almost right, or nothing of the kind.

Grammars write what a reader expects, with values of every sort in it; mutations then break it. Everything is drawn from
the `random.Random` that is handed in.
"""

from __future__ import annotations

import json
import string
from random import Random
from typing import Any

PIECES = (
    "[think]", "[no_think]", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "<tools>",
    "</tools>", "<|python_tag|>", "<|im_end|>", "<user>", "</user>", "<obs>", "<response>", "</response>",
    "{", "}", "[", "]", "(", ")", '"', "'", '"""', "\\", "\\u", "\\ud800", ",", ":", "=", "\n", "\r", "\t", "\0", " ",
    "\u2028", "\ufeff", "\ud800", "😀", "é", "null", "None", "true", "True", "NaN", "-Infinity", "1e999", "-0", "0x1F",
    "1_000", "9" * 400, "9" * 5000, "1j", "b'x'", "f'{a}'", "lambda: 0", '"name"', '"arguments"', '"parameters"', "#",
    "1. Name: ", "Parameters: {", "**Available Tools**", "%s", "{}", "../..", "[" * 200, "{" * 200, "(" * 200,
    '{"a":' * 150, "-" * 300, "a" * 1000, "[" * 5000,
)  # fmt: skip
WORDS = ("set", "light", "pool temp", "a.b/c", "from", "класс", "值", "x" * 60, "", " ", "name", "class", "1st")


def word(rng: Random) -> str:
    """A short text, a name now and then."""
    if rng.random() < 0.7:
        return rng.choice(WORDS)
    return "".join(rng.choice(string.printable) for _ in range(rng.randrange(8)))


def value(rng: Random, depth: int = 3) -> Any:
    """A JSON value."""
    kind = rng.randrange(9 if depth else 6)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice((0, -1, 3, 2**70, 10**30))
    if kind == 2:
        return rng.choice((0.5, -0.0, 1e300, 1e-300))
    if kind < 6:
        return word(rng) if rng.random() < 0.8 else rng.choice(PIECES)
    if kind == 6:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {word(rng): value(rng, depth - 1) for _ in range(rng.randrange(4))}


def broken(rng: Random, text: str, most: int = 4) -> str:
    """The text with a few cuts, copies and insertions; one in five times as it is."""
    if rng.random() < 0.2:
        return text
    for _ in range(rng.randint(1, most)):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        change = rng.randrange(6)
        if change == 0:
            text = text[:a] + text[min(b, a + 12) :]
        elif change == 1:
            text = text[:a] + rng.choice(PIECES) + text[a:]
        elif change == 2:
            text = text[:a] + rng.choice(PIECES) + text[a + 1 :]
        elif change == 3:
            text = text[:a] + text[a : min(b, a + 60)] * 2 + text[a:]
        elif change == 4:
            text = text[:b]
        else:
            text = text[:a] + chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) + text[a:]
    return text


def broken_bytes(rng: Random, data: bytes) -> bytes:
    """Bytes with bits flipped, cut or put in."""
    data = bytearray(data)
    for _ in range(rng.randint(0, 4)):
        place = rng.randrange(len(data) + 1)
        change = rng.randrange(4)
        if change == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(6)))
        elif change == 2:
            del data[place : place + rng.randrange(20)]
        elif change == 3:
            data[place:place] = rng.choice(PIECES).encode("utf-8", "surrogatepass")
    return bytes(data)


def broken_value(rng: Random, tree: Any) -> Any:
    """A JSON value in which a few places hold something else, are gone, or have a broken text."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(0, 3)):
        parent, key = None, None
        node = tree
        while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.8):
            parent, key = node, rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            node = parent[key]
        if parent is None:
            return value(rng)
        change = rng.randrange(5)
        if change == 0:
            del parent[key]
        elif change == 1:
            parent[key] = value(rng)
        elif change == 2 and isinstance(parent, dict):
            parent[word(rng)] = value(rng)
        elif change == 2:
            parent.insert(key, parent[key])
        else:
            parent[key] = broken(rng, node) if isinstance(node, str) else [node]
    return tree


def call(rng: Random, key: str = "arguments") -> dict[str, Any]:
    """A tool call as JSON."""
    return {"name": word(rng) or "f", key: {word(rng): value(rng, 2) for _ in range(rng.randrange(3))}}


def reply(rng: Random, syntax: str) -> str:
    """An assistant's turn."""
    think = rng.random() < 0.5
    parts = ["[think]\n<think>\n", word(rng), "\n</think>\n"] if think else ["[no_think]\n"]
    if syntax == "bare":
        parts.append(json.dumps(call(rng, "parameters")) if rng.random() < 0.7 else word(rng))
    else:
        for _ in range(rng.randrange(3)):
            written = json.dumps(call(rng), ensure_ascii=rng.random() < 0.5)
            parts += [rng.choice(("", word(rng))), "<tool_call>\n", written, "\n</tool_call>"]
        parts.append(word(rng))
    return broken(rng, "".join(parts))


def python_calls(rng: Random) -> str:
    """Calls as a list in Python syntax."""
    calls = (
        f"{word(rng) or 'f'}({', '.join(f'{word(rng)}={value(rng, 2)!r}' for _ in range(rng.randrange(3)))})"
        for _ in range(rng.randrange(3))
    )
    return broken(rng, f"[{', '.join(calls)}]")


def _tool(rng: Random) -> dict[str, Any]:
    kinds = ("int", "string", "str, optional", "List[int]", "Dict[str, Any]", "object", "array", "float = 1", "Tuple[")
    properties = {
        word(rng): {"type": rng.choice(kinds), "description": word(rng), "default": value(rng, 1)}
        for _ in range(rng.randrange(3))
    }
    if rng.random() < 0.5:
        return {"name": rng.choice(("f", "g h")), "description": word(rng), "parameters": properties}
    schema = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    tool = {"name": rng.choice(("f", "g h")), "description": word(rng), "parameters": schema}
    return {"type": "function", "function": tool} if rng.random() < 0.5 else tool


def _answers(rng: Random, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls that the tools allow, mostly."""
    found = []
    for _ in range(rng.randrange(3)):
        tool = rng.choice(tools)
        tool = tool.get("function", tool)
        properties = tool["parameters"].get("properties", tool["parameters"])
        named = {name: value(rng, 1) for name in properties} if rng.random() < 0.8 else {word(rng): 1}
        found.append({"name": tool["name"], "arguments": named})
    return found


def row(rng: Random, source: str) -> dict[str, Any]:
    """A row of a data set that is read here, broken or not."""
    tools = [_tool(rng) for _ in range(rng.randint(1, 2))]
    answers = _answers(rng, tools)
    quoted = repr if rng.random() < 0.3 else json.dumps
    blocks = "\n".join(f"<tool_call>\n{quoted(answer)}\n</tool_call>" for answer in answers)
    if source == "toolace":
        written = ", ".join(
            f"{a['name']}({', '.join(f'{k}={v!r}' for k, v in a['arguments'].items())})" for a in answers
        )
        turns = [("user", word(rng) or "hi"), ("assistant", f"[{written}]"), ("tool", json.dumps([value(rng)]))]
        turns.append(("assistant", word(rng) or "done"))
        result: dict[str, Any] = {
            "system": f"These are functions in JSON format that you can invoke:\n{json.dumps(tools)}. \n{word(rng)}",
            "conversations": [{"from": role, "value": text} for role, text in turns],
        }
    elif source == "hermes":
        turns = [("system", f"<tools></tools> <tools>\n{quoted(tools)}\n</tools>"), ("human", word(rng) or "hi")]
        turns += [("gpt", blocks or "no"), ("tool", f"<tool_response>\n{quoted(value(rng))}\n</tool_response>")]
        turns += [("gpt", word(rng) or "done")]
        result = {"conversations": [{"from": role, "value": text} for role, text in turns]}
        if rng.random() < 0.3:
            result["tools"] = json.dumps(tools)
    elif source == "xlam":
        result = {"query": word(rng) or "hi", "answers": json.dumps(answers), "tools": json.dumps(tools)}
    elif source == "rlla":
        listed = "\n".join(
            f"{i}. Name: {t.get('function', t)['name']}\nDescription: {word(rng)}\n"
            f"Parameters: {quoted(t.get('function', t)['parameters'])}"
            for i, t in enumerate(tools, 1)
        )
        result = {
            "instruction": f"Use tools.\n\n**Available Tools**\n{listed}\n\n**Steps**\n",
            "input": f"**Dialogue Records History**\n<user> {word(rng) or 'hi'} </user>\n",
            "output": f"<think> {word(rng)} </think>\n{blocks or '<response> hi </response>'}",
        }
    else:
        result = {
            "id": word(rng),
            "source": "own",
            "tools": [t if "function" in t else {"type": "function", "function": t} for t in tools],
            "messages": [{"role": "user", "content": word(rng) or "hi"}],
            "answer": answers,
        }
        if not answers:
            result["no_call"] = "none fits"
    result = broken_value(rng, result)
    if isinstance(result, dict) and rng.random() < 0.3 and (texts := [k for k in result if isinstance(result[k], str)]):
        key = rng.choice(texts)
        result[key] = broken(rng, result[key])
    return result if isinstance(result, dict) else {"row": result}


def toml(rng: Random, settings: dict[str, Any]) -> str:
    """A preset: settings with some values replaced, written as TOML and broken now and then."""
    lines = []
    for section in rng.sample(sorted(settings), k=min(4, len(settings))):
        content = settings[section]
        if not isinstance(content, dict):
            lines.insert(0, f"{section} = {json.dumps(content)}")
            continue
        lines.append(f"[{section}]")
        for name in rng.sample(sorted(content), k=rng.randint(0, min(4, len(content)))):
            given = content[name] if rng.random() < 0.7 else value(rng, 1)
            lines.append(f"{name} = {json.dumps(given)}")
    text = "\n".join(lines) + "\n"
    return broken(rng, text) if rng.random() < 0.6 else text


def options(rng: Random, known: list[str]) -> list[str]:
    """Arguments of the command line."""
    arguments = []
    for _ in range(rng.randint(1, 4)):
        name = rng.choice(known) if rng.random() < 0.8 else "--" + word(rng)
        arguments.append(broken(rng, name, 1) if rng.random() < 0.2 else name)
        if rng.random() < 0.8:
            arguments.append(str(rng.choice((value(rng, 1), "1", "0.5", "none", "rl,eval"))))
    return [a.replace("\0", "") for a in arguments if a not in ("--help", "-h")]
