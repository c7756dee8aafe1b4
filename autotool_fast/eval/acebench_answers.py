"""ACEBench's answers: as what a perfect policy would say, and the rules that are not in its checker.

Milestones are calls as text with quotes that Python cannot read (`title='Today's list'`); they are read by a small
scanner, never run.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from autotool_fast.chat import ToolCall

# The phrases that the benchmark looks for in replies to special tasks.
MISSING, INCORRECT = "Missing necessary parameters", "There is incorrect value"
BEYOND = "the limitations of the function"
_NUMBERED = re.compile(r"_\d+$")
_CALL = re.compile(r"([A-Za-z_][\w.]*)\(")
_KEY = re.compile(r"\s*,?\s*([A-Za-z_]\w*)\s*=")
_NEXT = re.compile(r"'\s*(?:,\s*[A-Za-z_]\w*\s*=|\)\s*(?:,\s*[A-Za-z_][\w.]*\(|\]))")
_NOISE = re.compile(r"[\s'\"\\]")


def calls(answer: Any) -> tuple[ToolCall, ...]:
    """The calls of the first accepted answer; a number at the end of a name tells equal names apart."""
    first = answer[0] if isinstance(answer, list) else answer
    return tuple(ToolCall(_NUMBERED.sub("", name), arguments) for name, arguments in first.items())


def sentence(category: str, answer: Any) -> str:
    """What is to be said in a special task."""
    if category == "special_irrelevant":
        return f"Due to {BEYOND}, this cannot be done."
    parts = []
    for name, values in answer.items():
        listed = ", ".join(str(value) for value in values)
        if category == "special_incomplete":
            parts.append(f"{MISSING} ({listed}) for the api ({name})")
        else:
            parts.append(f"{INCORRECT} ({listed}) for the parameters ({name}) in the conversation history.")
    return " ".join(parts)


def special_problem(category: str, answer: Any, text: str) -> str | None:
    """Why a reply to a special task is wrong: not noticed, or not said of what; None when it is right."""
    if category == "special_irrelevant":
        return None if BEYOND in text else "error_detection"
    if (MISSING if category == "special_incomplete" else INCORRECT) not in text:
        return "error_detection"
    wanted = [str(value) for values in answer.values() for value in values]
    if category == "special_incomplete":
        wanted += list(answer)
    return None if all(word in text for word in wanted) else "error_correction"


def without_blanks(value: Any) -> Any:
    """The value with all white space taken out of its texts, as the benchmark does before it reads such replies."""
    if isinstance(value, str):
        return "".join(value.split())
    if isinstance(value, Mapping):
        return {without_blanks(key): without_blanks(item) for key, item in value.items()}
    return [without_blanks(item) for item in value] if isinstance(value, list) else value


def call_text(made: Sequence[ToolCall]) -> str:
    """Calls as the benchmark writes them."""
    texts = (f"{c.name}({', '.join(f'{key}={value!r}' for key, value in c.arguments.items())})" for c in made)
    return f"[{', '.join(texts)}]"


def milestone_share(milestones: Sequence[Any], made: Sequence[str]) -> float:
    """Share of the milestones that occur among `made` in order; the best of the accepted lists."""
    lists = milestones if milestones and isinstance(milestones[0], list) else [milestones]
    shares = []
    for wanted in lists:
        position, hits = 0, 0
        for stone in (_NOISE.sub("", text) for text in wanted):
            found = next((i for i in range(position, len(made)) if _NOISE.sub("", made[i]) == stone), None)
            if found is None:
                break  # the benchmark looks for the next milestone behind the end
            hits, position = hits + 1, found + 1
        shares.append(hits / len(wanted) if wanted else 1.0)
    return max(shares)


def milestone_calls(milestones: Sequence[Any]) -> list[tuple[ToolCall, ...]]:
    """The calls of the first accepted list, step by step."""
    first = milestones[0] if milestones and isinstance(milestones[0], list) else milestones
    return [read_calls(text) for text in first]


def read_calls(text: str) -> tuple[ToolCall, ...]:
    """The calls in `[f(a='x'), g()]`, where texts may hold quotes.

    Raises:
        ValueError: the text is not of that form.
    """
    found, position = [], text.index("[") + 1
    while (head := _CALL.search(text, position)) is not None:
        arguments, position = {}, head.end()
        while (key := _KEY.match(text, position)) is not None:
            arguments[key[1]], position = _value(text, key.end())
        found.append(ToolCall(head[1], arguments))
        position = text.index(")", position) + 1
    return tuple(found)


def _value(text: str, start: int) -> tuple[Any, int]:
    """The value at `start` and the position behind it."""
    if text[start] == "'":
        end = _NEXT.search(text, start + 1)
        if end is None:
            raise ValueError(f"a text does not end: {text[start:]}")
        return text[start + 1 : end.start()], end.start() + 1
    if text[start] in "[{":
        for end in range(start + 1, len(text) + 1):
            try:
                return json.loads(json.dumps(ast.literal_eval(text[start:end]))), end
            except (SyntaxError, ValueError):
                continue
        raise ValueError(f"not a literal: {text[start:]}")
    word = re.compile(r"[^,)\]]+").match(text, start)
    return ast.literal_eval(word[0].strip()), word.end()
