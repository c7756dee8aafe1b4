"""Problems for one's own tools: a JSONL file of prompts, and how success is told.

One JSON object per line. `prompt` (a text) or `messages` is required; one of `expected`, `answer`, or a `score` in the
tools' file must tell success.

    prompt / messages   what the user asks
    tools               names of the tools on offer, in this order; all if left out
    state               what the tools' file makes the episode's state of
    expected            calls to make: [{"name", "arguments"}, ...], in any order
    answer              what the last reply must say
    id, family, difficulty (serial steps), split ("train", "test")   for tables; split is decided by content if left out

Files are read as data: nothing in them names a file to open or code to run.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotool_fast.chat import ToolCall
from autotool_fast.errors import UserError
from autotool_fast.schema import nearest
from autotool_fast.tasks.example import read_call, read_messages
from autotool_fast.tasks.sources.literal import clean
from autotool_fast.tasks.sources.rows import RowError, shorten
from autotool_fast.tasks.sources.schemas import fits

FIELDS = ("id", "prompt", "messages", "tools", "state", "expected", "answer", "family", "difficulty", "split")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """One line of the file.

    Attributes:
        id: unique in the file.
        messages: the first messages, in the form chat templates take.
        tools: names of the tools on offer, or None for all.
        state: JSON, for the tools' file.
        expected: the calls to make, or None.
        answer: what the last reply must say, or None.
        family, difficulty: the cell in tables.
        split: "train", "test", or None if its content decides.
    """

    id: str
    messages: tuple[dict, ...]
    tools: tuple[str, ...] | None
    state: Any
    expected: tuple[ToolCall, ...] | None
    answer: str | None
    family: str
    difficulty: int
    split: str | None

    def draw(self) -> float:
        """A number in [0, 1) out of what the user says and the state; equal for equal problems."""
        said = [" ".join(m["content"].casefold().split()) for m in self.messages if m["role"] == "user"]
        content = json.dumps([said, self.state], sort_keys=True)
        return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2**64


def read_problems(path: Path, schemas: Mapping[str, dict], *, scored: bool) -> list[Problem]:
    """All problems of a file.

    Args:
        schemas: tool name -> its description.
        scored: whether the tools' file has a `score`.

    Raises:
        UserError: the file cannot be read or is empty, or a line is not as the module says; names line and field.
    """
    problems, seen = [], {}
    for number, text in _lines(path):
        where = f"{path} line {number}"
        try:
            problem = _read(text, number, schemas, scored)
        except (RowError, ValueError, RecursionError) as error:
            raise UserError(str(error), where=where, remedy="see docs/tools.md") from None
        if problem.id in seen:
            raise UserError(f"has the id {problem.id!r} of line {seen[problem.id]}", where=where, remedy="rename one")
        seen[problem.id] = number
        problems.append(problem)
    if not problems:
        raise UserError("holds no problem", where=str(path), remedy="write one JSON object per line")
    return problems


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"cannot be read ({reason})", where=str(path), remedy="check environment.problems") from None


def _read(text: str, number: int, schemas: Mapping[str, dict], scored: bool) -> Problem:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("is no JSON object")
    value = clean(value)
    for name in value:
        if name not in FIELDS:
            guess = nearest(name, FIELDS)
            raise ValueError(f"unknown key {name!r}" + (f", did you mean {guess!r}?" if guess else ""))
    for name, kind in (("id", str), ("prompt", str), ("messages", list), ("tools", list), ("expected", list)):
        _check(value, name, kind)
    _check(value, "family", str)
    _check(value, "difficulty", int)
    if ("prompt" in value) == ("messages" in value):
        raise ValueError("needs either prompt or messages")
    messages = value.get("messages") or [{"role": "user", "content": value.get("prompt", "")}]
    tools = _read_tool_names(value.get("tools"), schemas)
    expected = None if "expected" not in value else tuple(read_call(call) for call in value["expected"])
    offered = set(schemas if tools is None else tools)
    for call in expected or ():
        _check_call(call, offered, schemas)
    answer = value.get("answer")
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, (str, int, float))):
        raise ValueError("answer is no text and no number")
    if expected is None and answer is None and not scored:
        raise ValueError("has neither expected nor answer, and the tools' file has no function score")
    if value.get("split") not in (None, "train", "test"):
        raise ValueError(f"split is {value['split']!r}, not train or test")
    difficulty = value.get("difficulty", max(0, len(expected or ()) - 1))
    if difficulty < 0:
        raise ValueError("difficulty is negative")
    return Problem(
        id=value.get("id", f"line-{number}"),
        messages=tuple(read_messages(messages)),
        tools=tools,
        state=value.get("state"),
        expected=expected,
        answer=None if answer is None else str(answer),
        family=value.get("family", "own"),
        difficulty=difficulty,
        split=value.get("split"),
    )


def _check(value: Mapping[str, Any], name: str, kind: type) -> None:
    words = {str: "text", list: "a list", int: "a whole number"}
    if name in value and (not isinstance(value[name], kind) or isinstance(value[name], bool)):
        raise ValueError(f"{name} is not {words[kind]}")
    if name in ("id", "family") and not str(value.get(name, "")).isprintable():  # tables and progress show it
        raise ValueError(f"{name} holds control characters")


def _read_tool_names(names: Any, schemas: Mapping[str, dict]) -> tuple[str, ...] | None:
    for name in names or ():
        if not isinstance(name, str) or name not in schemas:
            raise ValueError(_unknown_tool(name, schemas))
    if names is not None and len(set(names)) < len(names):
        raise ValueError("tools names one twice")
    return None if names is None else tuple(names)


def _unknown_tool(name: Any, known: Any) -> str:
    guess = nearest(name, known) if isinstance(name, str) else None
    hint = f"did you mean {guess!r}?" if guess else f"there are {', '.join(sorted(known))}"
    return f"unknown tool {name!r}; {hint}"


def _check_call(call: ToolCall, offered: set[str], schemas: Mapping[str, dict]) -> None:
    if call.name not in offered:
        raise ValueError(f"expected: {_unknown_tool(call.name, offered)}")
    parameters = schemas[call.name]["function"]["parameters"]
    properties = parameters.get("properties", {})
    for name in call.arguments:
        if name not in properties and parameters.keys().isdisjoint(("additionalProperties", "patternProperties")):
            raise ValueError(f"expected: {call.name} has no argument {name!r}")
        if not fits(call.arguments[name], properties.get(name)):
            said = json.dumps(call.arguments[name])
            raise ValueError(f"expected: {call.name}: {name} is {shorten(said, 40)}, which its schema does not allow")
    for name in parameters.get("required", ()):
        if name not in call.arguments:
            raise ValueError(f"expected: {call.name} is called without {name!r}, which it requires")


def split_problems(problems: Sequence[Problem], test_share: float) -> dict[str, list[Problem]]:
    """Training and held-out problems: as the file says, else by content, so that equal ones are on one side.

    At least one is held out, and at least one is not.
    """
    parts: dict[str, list[Problem]] = {"train": [], "test": []}
    for problem in problems:
        parts[problem.split or ("test" if problem.draw() < test_share else "train")].append(problem)
    for empty, full, pick in (("test", "train", min), ("train", "test", max)):
        free = [problem for problem in parts[full] if problem.split is None]
        if not parts[empty] and len(parts[full]) > 1 and free:
            moved = pick(free, key=Problem.draw)
            parts[full].remove(moved)
            parts[empty].append(moved)
    return parts


def says(text: str, answer: str) -> bool:
    """Whether a reply gives the answer.

    A number must be the last one in the text (7, 7.0 and "7" are equal); other answers must stand in it as whole words,
    case and white space aside.
    """
    wanted = _as_number(answer)
    if wanted is not None:
        found = _NUMBER.findall(text)
        return bool(found) and math.isclose(_as_number(found[-1]), wanted, rel_tol=1e-9, abs_tol=1e-9)
    words = re.escape(" ".join(answer.casefold().split()))
    return re.search(rf"(?<!\w){words}(?!\w)", " ".join(text.casefold().split())) is not None


def _as_number(text: str) -> float | None:
    text = text.strip()
    return float(text.replace(",", "")) if _NUMBER.fullmatch(text) else None
