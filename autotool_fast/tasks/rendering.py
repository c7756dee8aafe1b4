"""How the embedded world's problems and solutions read, in two renderings.

`compact` is made of fragments the tiny model's tokenizer holds as single tokens; its calls are nevertheless real
JSON in the production reply format. `natural` is prose for models that know English. Both carry the same requests,
calls and steps of thought. A think trace restates the request and weighs every tool offered before it works, on easy
tasks too: that is the cost of overthinking.
"""

from __future__ import annotations

from autotool_fast.chat import ToolCall, render_reply
from autotool_fast.tasks.families import (
    FAMILIES,
    Spec,
    chain_reads,
    cup_positions,
    expected_calls,
    hop_path,
    missing_tool,
    reg_values,
)
from autotool_fast.tasks.record import Task

RENDERINGS = ("compact", "natural")


def request(family: str, spec: Spec, rendering: str) -> str:
    """The user's first message."""
    return (_compact_request if rendering == "compact" else _natural_request)(family, spec)


def missing_value(spec: Spec, rendering: str) -> str:
    """What the user answers when asked for the missing value."""
    return str(spec["value"]) if rendering == "compact" else f"Level {spec['value']}, please."


def _compact_request(family: str, spec: Spec) -> str:
    if family == "set":
        return f"set {spec['item']}={spec['value']}"
    if family == "parallel":
        return "set " + " and ".join(f"{item}={value}" for item, value in spec["settings"])
    if family == "irrelevant":
        return _compact_request(spec["family"], spec["spec"])
    if family == "missing":
        return f"set {spec['item']}=?"
    if family == "hop":
        pairs = "".join(f"{a}>{b}" for a, b in spec["map"])
        return f"map {pairs} from {spec['start']} hop {spec['hops']}"
    if family == "reg":
        ops = "".join(f" #{i} {'+' if op == 'add' else '-'}{n}" for i, (op, n) in enumerate(spec["ops"], 1))
        return f"reg {spec['start']}{ops}"
    if family == "cups":
        swaps = "".join(f" #{i} {a}{b}" for i, (a, b) in enumerate(spec["swaps"], 1))
        return f"cups {spec['balls'][0]}{spec['balls'][1]} swap{swaps}"
    return f"chain{_compact_goal(family, spec)}"


def _compact_goal(family: str, spec: Spec) -> str:
    """The request without its data: what a think trace restates."""
    if family == "irrelevant":
        return _compact_goal(spec["family"], spec["spec"])
    if family == "hop":
        return _compact_request(family, spec)
    if family == "reg":
        return f"reg {spec['start']}"
    if family == "cups":
        return f"cups {spec['balls'][0]}{spec['balls'][1]}"
    if family == "chain":
        return f" from {spec['start']} reads {spec['reads']}"
    return _compact_request(family, spec)


def _needed(family: str, spec: Spec) -> tuple[str, ...]:
    return (missing_tool(spec),) if family == "irrelevant" else FAMILIES[family].needs(spec)


def _compact_think(task: Task, turn: int) -> str:
    family, spec = task.family, task.spec["problem"]
    if turn > 0:
        return f"so: {_compact_work(family, spec, turn)}"
    needed = _needed(family, spec)
    weighed = "".join(f"{name} {'yes' if name in needed else 'no'} " for name in task.spec["tools"])
    return f"need: {_compact_goal(family, spec)}; tools: {weighed}; so: {_compact_work(family, spec, turn)}"


def _compact_work(family: str, spec: Spec, turn: int) -> str:
    if family == "irrelevant":
        return "no tool"
    if family == "missing":
        return "missing value" if turn == 0 else f"{spec['item']}={spec['value']}"
    if family == "hop":
        return "".join(hop_path(spec))
    if family == "reg":
        return "".join(f" #{i} {value}" for i, value in enumerate(reg_values(spec), 1))
    if family == "cups":
        return "".join(f" #{i} {a}{b}" for i, (a, b) in enumerate(cup_positions(spec), 1))
    if family == "chain":
        read = chain_reads(spec)[:turn]
        return f"sum {sum(value for _, value in read) % 10} left {spec['reads'] - turn}"
    return _compact_request(family, spec)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _natural_request(family: str, spec: Spec) -> str:
    if family == "set":
        return f"Please set the {spec['item']} to level {spec['value']}."
    if family == "parallel":
        return "Please set " + " and ".join(f"the {item} to level {value}" for item, value in spec["settings"]) + "."
    if family == "irrelevant":
        return _natural_request(spec["family"], spec["spec"])
    if family == "missing":
        return f"Please change the level of the {spec['item']}."
    if family == "hop":
        roads = ", ".join(f"{a} to {b}" for a, b in spec["map"])
        return (
            f"One-way roads lead from {roads}. I stand at {spec['start']} and follow {_count(spec['hops'], 'road')}. "
            "Go to the place where I end up."
        )
    if family == "reg":
        ops = "; ".join(
            f"step {i}: {'add' if op == 'add' else 'subtract'} {n}" for i, (op, n) in enumerate(spec["ops"], 1)
        )
        return (
            f"A counter that wraps around after 9 (9 plus 1 is 0) shows {spec['start']}. {ops.capitalize()}. "
            "Submit what it shows in the end."
        )
    if family == "cups":
        swaps = "; ".join(f"swap {i}: cups {a} and {b}" for i, (a, b) in enumerate(spec["swaps"], 1))
        return (
            f"Five cups stand in a row. The first ball is under cup {spec['balls'][0]}, the second under cup "
            f"{spec['balls'][1]}. {swaps.capitalize()}. Pick the cups that hide the balls now, first ball first."
        )
    return (
        f"Read the key {spec['start']}; every answer names the key to read next. Read {_count(spec['reads'], 'key')} "
        "in all and submit the last digit of the sum of the values found."
    )


def _natural_think(task: Task, turn: int) -> str:
    family, spec = task.family, task.spec["problem"]
    if turn > 0:
        return _natural_work(family, spec, turn)
    needed = _needed(family, spec)
    weighed = " ".join(
        f"{name} {'is what I need' if name in needed else 'does not help'}." for name in task.spec["tools"]
    )
    return f"The request is: {task.messages[0]['content']} The tools: {weighed} {_natural_work(family, spec, turn)}"


def _natural_work(family: str, spec: Spec, turn: int) -> str:
    if family == "irrelevant":
        return f"The request needs {missing_tool(spec)}, which is not offered, so I call nothing."
    if family == "missing":
        return "The level is missing, so I ask for it." if turn == 0 else f"Now I know the level: {spec['value']}."
    if family == "hop":
        return "Following the roads: " + " to ".join(hop_path(spec)) + "."
    if family == "reg":
        return " ".join(f"After step {i} it shows {value}." for i, value in enumerate(reg_values(spec), 1))
    if family == "cups":
        steps = (f"After swap {i} the balls are under {a} and {b}." for i, (a, b) in enumerate(cup_positions(spec), 1))
        return " ".join(steps)
    if family == "chain":
        read = chain_reads(spec)[:turn]
        total, left = sum(value for _, value in read) % 10, spec["reads"] - turn
        return f"The sum so far ends in {total}; {_count(left, 'key')} left to read."
    settings = spec["settings"] if family == "parallel" else [(spec["item"], spec["value"])]
    return "I set " + ", ".join(f"{item} to {value}" for item, value in settings) + "."


_NO_CALL = {
    ("irrelevant", "compact"): "no tool",
    ("irrelevant", "natural"): "None of the tools I have can do that.",
    ("missing", "compact"): "missing value",
    ("missing", "natural"): "Which level should I set?",
}


def solution(task: Task, *, think: bool) -> list[str]:
    """The replies of a perfect solver, one per assistant turn, in the production reply format."""
    family, rendering = task.family, task.spec["rendering"]
    replies = []
    for turn, calls in enumerate(expected_calls(family, task.spec["problem"])):
        trace = None
        if think:
            trace = (_compact_think if rendering == "compact" else _natural_think)(task, turn)
        text = "" if calls else _NO_CALL[family, rendering]
        replies.append(render_reply(trace, tuple(calls), text))
    return replies


def compact_fragments() -> list[str]:
    """Every text fragment of the compact rendering: the tiny tokenizer's vocabulary, special tokens excluded.

    Their concatenations are exactly the compact prompts, replies and tool results.
    """
    from autotool_fast.tasks.families import ITEMS, PLACES
    from autotool_fast.tasks.world import TOOLS

    def opening(name: str, argument: str, quote: str) -> str:
        return ToolCall(name, {argument: 0}).to_json().split("0}}")[0].join(("<tool_call>\n", quote))

    return [
        *("[think]\n", "[no_think]\n", "<think>\n", "\n</think>\n", "\n"),
        *(
            opening("set", "item", '"'),
            '", "value": ',
            opening("goto", "place", '"'),
            opening("submit", "value", ""),
        ),
        *(opening("pick", "cup1", ""), ', "cup2": ', opening("read", "key", '"')),
        *("}}\n</tool_call>", '"}}\n</tool_call>', '{"value": ', ', "next": "', '"}', "error"),
        *(f"{name} " for name in TOOLS),
        *("yes ", "no ", "need: ", "; tools: ", "; so: ", "so: ", "no tool", "missing value"),
        *("map ", " from ", " hop ", "reg ", "cups ", " swap", "chain", " reads "),
        *("sum ", " left ", " and ", "?"),
        *ITEMS,
        *(f"{item}=" for item in ITEMS),
        *PLACES,
        *(f"{place}>" for place in PLACES),
        *(str(digit) for digit in range(10)),
        *(f"{sign}{amount}" for sign in "+-" for amount in range(1, 4)),
        *(f" #{index} " for index in range(1, 9)),
    ]
