"""The embedded tool world: problem families with an exact answer and an explicit difficulty.

Each family draws a JSON-able spec of difficulty k (the number of serial steps between prompt and answer), names the
tools it needs, and gives the calls a perfect solver makes. How a spec reads as text is `rendering`'s business; how it
is played and judged is `world`'s.

    set         copy a value into one call                                   k = 0
    parallel    two or three independent settings in one reply               k = 0
    irrelevant  the tool the request needs is not offered                    k = 0
    missing     a value is missing; the user gives it when asked             k = 0
    hop         follow a random cycle of eight places k times                k = 1..6
    reg         k additions and subtractions modulo 10                       k = 1..6
    cups        where two balls are after k swaps of five cups               k = 1..6
    chain       read k keys, each naming the next, and submit the sum        k = 1..3
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autotool_fast.chat import ToolCall

Spec = dict[str, Any]

ITEMS = ("lamp", "fan", "door", "bell")
PLACES = tuple("abcdefgh")
CUPS = 5
MODULUS = 10


@dataclass(frozen=True)
class Family:
    """A kind of problem.

    Attributes:
        draw: (rng, difficulty) -> spec.
        difficulties: the difficulties it can draw.
        needs: spec -> names of the tools a solution uses.
        content: spec -> what must not be shared between the splits.
        joins: share of base training after which the family joins in. Looking things up, which `hop` is made of, is
            learnt last and helps with the rest, so it comes first.
    """

    name: str
    draw: Callable[[random.Random, int], Spec]
    difficulties: tuple[int, ...]
    needs: Callable[[Spec], tuple[str, ...]]
    content: Callable[[Spec], Any]
    joins: float = 0.0


def _draw_set(rng: random.Random, k: int) -> Spec:
    return {"item": rng.choice(ITEMS), "value": rng.randrange(10)}


def _draw_parallel(rng: random.Random, k: int) -> Spec:
    items = rng.sample(ITEMS, rng.choice((2, 3)))
    return {"settings": [[item, rng.randrange(10)] for item in items]}


def _draw_hop(rng: random.Random, k: int) -> Spec:
    cycle = rng.sample(PLACES, len(PLACES))
    pairs = [[place, cycle[(i + 1) % len(cycle)]] for i, place in enumerate(cycle)]
    rng.shuffle(pairs)
    return {"map": pairs, "start": rng.choice(PLACES), "hops": k}


def _draw_reg(rng: random.Random, k: int) -> Spec:
    return {
        "start": rng.randrange(10),
        "ops": [[rng.choice(("add", "sub")), rng.randrange(1, 4)] for _ in range(k)],
    }


def _draw_cups(rng: random.Random, k: int) -> Spec:
    swaps = [sorted(rng.sample(range(1, CUPS + 1), 2)) for _ in range(k)]
    return {"balls": rng.sample(range(1, CUPS + 1), 2), "swaps": swaps}


def _draw_chain(rng: random.Random, k: int) -> Spec:
    cycle = rng.sample(PLACES, len(PLACES))
    cells = {place: [rng.randrange(1, 4), cycle[(i + 1) % len(cycle)]] for i, place in enumerate(cycle)}
    return {"cells": cells, "start": cycle[0], "reads": k}


def _draw_irrelevant(rng: random.Random, k: int) -> Spec:
    inner = rng.choice(("set", "hop"))
    depth = rng.randrange(1, 7) if inner == "hop" else 0
    return {"family": inner, "spec": FAMILIES[inner].draw(rng, depth)}


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("set", _draw_set, (0,), lambda s: ("set",), lambda s: s),
        Family("parallel", _draw_parallel, (0,), lambda s: ("set",), lambda s: sorted(s["settings"])),
        Family("irrelevant", _draw_irrelevant, (0,), lambda s: (), lambda s: s),
        Family("missing", _draw_set, (0,), lambda s: ("set",), lambda s: s),
        Family(
            "hop",
            _draw_hop,
            tuple(range(1, 7)),
            lambda s: ("goto",),
            lambda s: [sorted(s["map"]), s["start"]],
        ),
        Family("reg", _draw_reg, tuple(range(1, 7)), lambda s: ("submit",), lambda s: s, joins=0.25),
        Family("cups", _draw_cups, tuple(range(1, 7)), lambda s: ("pick",), lambda s: s, joins=0.25),
        Family(
            "chain", _draw_chain, tuple(range(1, 4)), lambda s: ("read", "submit"), lambda s: s["cells"], joins=0.25
        ),
    )
}


def missing_tool(spec: Spec) -> str:
    """The tool an `irrelevant` request would need."""
    return FAMILIES[spec["family"]].needs(spec["spec"])[0]


def hop_path(spec: Spec) -> list[str]:
    """Places visited, start included; k + 1 of them."""
    step = dict(map(tuple, spec["map"]))
    path = [spec["start"]]
    for _ in range(spec["hops"]):
        path.append(step[path[-1]])
    return path


def reg_values(spec: Spec) -> list[int]:
    """The register after each operation; k values."""
    value, values = spec["start"], []
    for op, amount in spec["ops"]:
        value = (value + amount if op == "add" else value - amount) % MODULUS
        values.append(value)
    return values


def cup_positions(spec: Spec) -> list[tuple[int, int]]:
    """Cups of the two balls after each swap; k pairs."""
    balls, positions = list(spec["balls"]), []
    for a, b in spec["swaps"]:
        balls = [b if cup == a else a if cup == b else cup for cup in balls]
        positions.append((balls[0], balls[1]))
    return positions


def chain_reads(spec: Spec) -> list[tuple[str, int]]:
    """Keys read and the values found there, in order; k pairs."""
    key, reads = spec["start"], []
    for _ in range(spec["reads"]):
        value, following = spec["cells"][key]
        reads.append((key, value))
        key = following
    return reads


def expected_calls(family: str, spec: Spec) -> list[list[ToolCall]]:
    """The calls of a perfect solver, one list per assistant turn (empty: the turn is plain text)."""
    if family == "set":
        return [[ToolCall("set", {"item": spec["item"], "value": spec["value"]})]]
    if family == "parallel":
        return [[ToolCall("set", {"item": item, "value": value}) for item, value in spec["settings"]]]
    if family == "irrelevant":
        return [[]]
    if family == "missing":
        return [[], *expected_calls("set", spec)]
    if family == "hop":
        return [[ToolCall("goto", {"place": hop_path(spec)[-1]})]]
    if family == "reg":
        return [[ToolCall("submit", {"value": reg_values(spec)[-1]})]]
    if family == "cups":
        first, second = cup_positions(spec)[-1]
        return [[ToolCall("pick", {"cup1": first, "cup2": second})]]
    reads = chain_reads(spec)
    total = sum(value for _, value in reads) % MODULUS
    return [*([ToolCall("read", {"key": key})] for key, _ in reads), [ToolCall("submit", {"value": total})]]
