"""Playing and judging the embedded tool world.

The tools here really execute, on a `WorldState` of the episode's own; an episode is solved when exactly the expected
calls were made and the state they leave is the expected one. `World` draws tasks: a pure function of (seed, split,
index), with train and test separated by a hash of each task's content.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from autotool_fast.chat import ParsedReply, ToolCall
from autotool_fast.errors import UserError
from autotool_fast.matching import calls_match
from autotool_fast.tasks import rendering
from autotool_fast.tasks.families import CUPS, FAMILIES, ITEMS, PLACES, expected_calls, missing_tool
from autotool_fast.tasks.record import Task
from autotool_fast.tasks.rendering import RENDERINGS
from autotool_fast.tools import Tool, Toolbox

TEST_SHARE = 5  # one content hash in five belongs to the test split
TOOLS_SHOWN = 4
BANDS = {"easy": (0, 0), "medium": (1, 3), "hard": (4, 99)}


def band(difficulty: int) -> str:
    """easy (read off the prompt), medium (one to three serial steps) or hard (four or more)."""
    return next(name for name, (low, high) in BANDS.items() if low <= difficulty <= high)


@dataclass
class WorldState:
    """What the tools act on."""

    cells: dict[str, list] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    place: str | None = None
    submitted: int | None = None
    picked: tuple[int, int] | None = None
    calls: list[ToolCall] = field(default_factory=list)

    def outcome(self) -> tuple:
        """The part of the state that a task asks for."""
        return (tuple(sorted(self.items.items())), self.place, self.submitted, self.picked)


def _set(state: WorldState, item: str, value: int) -> str:
    state.items[item] = int(value)
    return "ok"


def _goto(state: WorldState, place: str) -> str:
    state.place = place
    return "ok"


def _submit(state: WorldState, value: int) -> str:
    state.submitted = int(value)
    return "ok"


def _pick(state: WorldState, cup1: int, cup2: int) -> str:
    state.picked = (int(cup1), int(cup2))
    return "ok"


def _read(state: WorldState, key: str) -> Any:
    if key not in state.cells:
        return "error"
    value, following = state.cells[key]
    return {"value": value, "next": following}


def _object(**properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _digit(description: str, low: int = 0, high: int = 9) -> dict:
    return {"type": "integer", "minimum": low, "maximum": high, "description": description}


def _letter(description: str) -> dict:
    return {"type": "string", "enum": list(PLACES), "description": description}


TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            "set",
            "Set an item of the house to a level.",
            _object(
                item={"type": "string", "enum": list(ITEMS), "description": "the item"},
                value=_digit("the level"),
            ),
            _set,
        ),
        Tool("goto", "Walk to a place.", _object(place=_letter("the place")), _goto),
        Tool("submit", "Hand in a number as the answer.", _object(value=_digit("the answer")), _submit),
        Tool(
            "pick",
            "Lift the two cups that hide the balls.",
            _object(cup1=_digit("cup of the first ball", 1, CUPS), cup2=_digit("cup of the second ball", 1, CUPS)),
            _pick,
        ),
        Tool(
            "read",
            "Read the value stored under a key, and the key that follows it.",
            _object(key=_letter("the key")),
            _read,
        ),
    )
}


class WorldEpisode:
    """One attempt at a world task: executes calls, answers with their results, keeps the log that is judged."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._family, self._spec = task.family, task.spec["problem"]
        self._toolbox = Toolbox(TOOLS[tool["function"]["name"]] for tool in task.tools)
        self._state = self._fresh_state()
        self._turn = 0

    def _fresh_state(self) -> WorldState:
        return WorldState(cells=self._spec["cells"] if self._family == "chain" else {})

    def step(self, reply: ParsedReply) -> list[dict] | None:
        """Execute the calls; the next messages, or None at the end (see `Episode`).

        Reading leaves a chain open; any call that acts on the world ends it, since no later call can take it back.
        """
        self._turn += 1
        results = []
        for call in reply.calls:
            result = self._toolbox.execute(call, self._state)
            self._state.calls.append(call)
            results.append("error" if result.error else result.value)
        if self._family == "missing" and self._turn == 1 and not reply.calls:
            value = rendering.missing_value(self._spec, self._task.spec["rendering"])
            return [{"role": "user", "content": value}]
        if self._family == "chain" and reply.calls and self._state.outcome() == self._fresh_state().outcome():
            texts = (result if isinstance(result, str) else json.dumps(result) for result in results)
            return [{"role": "tool", "content": text} for text in texts]
        return None

    def score(self) -> bool:
        """Exactly the expected calls, in any order within the episode, and the state they leave."""
        turns = expected_calls(self._family, self._spec)
        expected = [call for turn in turns for call in turn]
        if self._turn != len(turns) or not calls_match(self._state.calls, expected):
            return False
        ideal = self._fresh_state()
        for call in expected:
            self._toolbox.execute(call, ideal)
        return ideal.outcome() == self._state.outcome()


def _in_test(family: str, spec: dict) -> bool:
    key = json.dumps([family, FAMILIES[family].content(spec)], sort_keys=True)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % TEST_SHARE == 0


class World:
    """Draws tasks.

    Args:
        families: names out of `FAMILIES`.
        max_difficulty: largest k drawn.
        rendering: "compact" (for the tiny model and its tokenizer) or "natural" (prose and full schemas).
    """

    def __init__(
        self, families: Sequence[str] = tuple(FAMILIES), max_difficulty: int = 6, rendering: str = "compact"
    ) -> None:
        for name in families:
            if name not in FAMILIES:
                raise UserError(
                    f"unknown family {name!r}",
                    where="world.families",
                    remedy=f"choose from {', '.join(FAMILIES)}",
                )
        if rendering not in RENDERINGS:
            raise UserError(f"unknown rendering {rendering!r}", remedy=f"choose from {', '.join(RENDERINGS)}")
        self.rendering = rendering
        self.cells = [
            (name, k)
            for name in FAMILIES
            if name in families
            for k in FAMILIES[name].difficulties
            if k <= max_difficulty
        ]
        if not self.cells:
            raise UserError(
                "no family draws a task this easy", where="world.max_difficulty", remedy="raise it or add a family"
            )
        self.easy = [cell for cell in self.cells if cell[1] == 0]
        self.steps = [cell for cell in self.cells if cell[1] > 0]

    def task(self, family: str, difficulty: int, split: str, seed: str) -> Task:
        """The task of one cell named by a seed string; the same arguments give the same task anywhere."""
        rng = random.Random(f"{family}/{difficulty}/{split}/{seed}")
        while True:
            spec = FAMILIES[family].draw(rng, difficulty)
            if _in_test(family, spec) == (split == "test"):
                break
        needed = FAMILIES[family].needs(spec)
        banned = {missing_tool(spec)} if family == "irrelevant" else set()
        others = [name for name in TOOLS if name not in needed and name not in banned]
        names = [*needed, *rng.sample(others, TOOLS_SHOWN - len(needed))]
        rng.shuffle(names)
        return Task(
            id=f"{family}-{difficulty}-{split}-{seed}",
            family=family,
            difficulty=difficulty,
            tools=tuple(TOOLS[name].schema for name in names),
            messages=({"role": "user", "content": rendering.request(family, spec, self.rendering)},),
            spec={"problem": spec, "rendering": self.rendering, "tools": names},
            split=split,
            start=WorldEpisode,
        )

    def draw(
        self, count: int, split: str, seed: str, easy_share: float | None = None, *, progress: float = 1.0
    ) -> Iterator[Task]:
        """`count` tasks: a share of easy ones (difficulty 0), the rest spread evenly over families, then over k.

        Args:
            easy_share: probability of an easy task; None spreads evenly over all families.
            progress: share of base training that is done; families that join later are left out, unless none is left.
        """
        groups = {}
        for name, cells in (("easy", self.easy), ("steps", self.steps)):
            families = sorted({family for family, _ in cells})
            groups[name] = [family for family in families if FAMILIES[family].joins <= progress] or families
        for index in range(count):
            rng = random.Random(f"draw/{split}/{seed}/{index}")
            if easy_share is None:
                family = rng.choice(groups["easy"] + groups["steps"])
            else:
                easy = rng.random() < easy_share
                family = rng.choice(groups["easy" if (easy and groups["easy"]) or not groups["steps"] else "steps"])
            difficulty = rng.choice([k for name, k in self.cells if name == family])
            yield self.task(family, difficulty, split, f"{seed}/{index}")

    def grid(self, per_cell: int, split: str, seed: str) -> list[Task]:
        """`per_cell` tasks of every (family, difficulty)."""
        return [self.task(family, k, split, f"{seed}/{i}") for family, k in self.cells for i in range(per_cell)]
