"""How tasks and perfect solutions read, in both renderings."""

from __future__ import annotations

import re

import pytest

from autotool_fast.chat import parse_reply
from autotool_fast.tasks.families import FAMILIES, expected_calls, missing_tool
from autotool_fast.tasks.record import Task
from autotool_fast.tasks.rendering import RENDERINGS, solution
from autotool_fast.tasks.tiny import build_tokenizer
from autotool_fast.tasks.world import World

CELLS = World().cells
EASY = [family for family, k in CELLS if k == 0]
both_renderings = pytest.mark.parametrize("rendering", RENDERINGS)
every_cell = pytest.mark.parametrize(("family", "difficulty"), CELLS)


def tasks_of(family: str, difficulty: int, rendering: str, count: int = 6) -> list[Task]:
    world = World(rendering=rendering)
    return [world.task(family, difficulty, "train", f"r{i}") for i in range(count)]


def trace(task: Task, turn: int = 0) -> str:
    return parse_reply(solution(task, think=True)[turn]).think.strip()


@both_renderings
@every_cell
def test_both_modes_make_the_same_calls(family, difficulty, rendering):
    for task in tasks_of(family, difficulty, rendering):
        long, short = ([parse_reply(r) for r in solution(task, think=t)] for t in (True, False))
        assert [r.calls for r in long] == [r.calls for r in short]
        assert [r.text for r in long] == [r.text for r in short]
        assert [list(r.calls) for r in short] == expected_calls(family, task.spec["problem"])
        assert all((r.text == "") == bool(r.calls) for r in short)


@pytest.mark.parametrize("family", EASY)
def test_thinking_at_least_doubles_the_tokens_of_an_easy_task(family):
    tokenizer = build_tokenizer()
    for task in tasks_of(family, 0, "compact"):
        long, short = (sum(len(tokenizer.encode(r)) for r in solution(task, think=t)) for t in (True, False))
        assert long >= 2 * short, task.id


@pytest.mark.parametrize("family", EASY)
def test_thinking_costs_words_on_easy_tasks_in_prose_too(family):
    for task in tasks_of(family, 0, "natural"):
        long, short = (sum(len(r.split()) for r in solution(task, think=t)) for t in (True, False))
        assert long >= 2 * short, task.id


@both_renderings
@every_cell
def test_a_trace_weighs_every_tool_offered_in_the_order_shown(family, difficulty, rendering):
    for task in tasks_of(family, difficulty, rendering):
        spec = task.spec["problem"]
        needed = {missing_tool(spec)} if family == "irrelevant" else set(FAMILIES[family].needs(spec))
        verdict = r"\b(set|goto|submit|pick|read) " + ("(yes|no)" if rendering == "compact" else "(is|does not)")
        weighed = re.findall(verdict, trace(task))
        assert [name for name, _ in weighed] == task.spec["tools"]
        assert {name for name, said in weighed if said in ("yes", "is")} == needed & set(task.spec["tools"])


def test_the_thinking_cannot_be_written_from_the_tag_alone():
    """The same request under other tool headers is thought about differently, and in no fixed position."""
    for family, k in CELLS:
        assert len({trace(task) for task in tasks_of(family, k, "compact", 12)}) >= 10, family
    tasks = tasks_of("set", 0, "compact", 300)
    by_request: dict[str, set[str]] = {}
    for task in tasks:
        by_request.setdefault(task.messages[0]["content"], set()).add(trace(task))
    assert max(map(len, by_request.values())) > 3


def test_a_natural_trace_restates_the_request():
    for family, k in CELLS:
        for task in tasks_of(family, k, "natural", 2):
            assert task.messages[0]["content"] in trace(task)


STEPS = {
    "hop": lambda task: re.findall(r"\b[a-h]\b", trace(task).split("Following the roads")[1]),
    "reg": lambda task: re.findall(r"it shows (\d)\.", trace(task).split("The tools")[1]),
    "cups": lambda task: re.findall(r"under (\d) and (\d)\.", trace(task)),
    "chain": lambda task: solution(task, think=True)[1:],
}


@pytest.mark.parametrize(("family", "difficulty"), [cell for cell in CELLS if cell[1]])
def test_a_trace_takes_one_step_at_a_time_and_ends_at_the_answer(family, difficulty):
    for task in tasks_of(family, difficulty, "natural"):
        steps = STEPS[family](task)
        assert len(steps) == difficulty + (family == "hop")
        last = expected_calls(family, task.spec["problem"])[-1][0].arguments
        if family == "chain":
            ends = re.search(r"ends in (\d); (\d) keys? left", trace(task, difficulty)).groups()
            assert ends == (str(last["value"]), "0")
        else:
            answer = steps[-1] if isinstance(steps[-1], tuple) else (steps[-1],)
            assert answer == tuple(str(value) for value in last.values())


@pytest.mark.parametrize(("family", "difficulty"), CELLS)
def test_prose_counts_nouns_properly(family, difficulty):
    for task in tasks_of(family, difficulty, "natural"):
        text = " ".join([task.messages[0]["content"], *solution(task, think=True)])
        assert not re.search(r"\b1 (roads|keys)\b|\b[02-9] (road|key)\b", text)


def test_a_trace_never_gives_away_what_was_not_read_yet():
    """The running sum of a chain uses only the results so far."""
    for task in tasks_of("chain", 3, "natural"):
        cells, key = task.spec["problem"]["cells"], task.spec["problem"]["start"]
        total = 0
        for turn in range(4):
            assert f"ends in {total % 10};" in trace(task, turn)
            total, key = total + cells[key][0], cells[key][1]


@both_renderings
def test_the_thinking_about_a_missing_value_does_not_know_it(rendering):
    for task in tasks_of("missing", 0, rendering):
        first, second = solution(task, think=True)
        assert str(task.spec["problem"]["value"]) not in first
        assert str(task.spec["problem"]["value"]) in second


def test_both_renderings_pose_the_same_problem():
    for family, k in CELLS:
        for compact, natural in zip(tasks_of(family, k, "compact"), tasks_of(family, k, "natural"), strict=True):
            assert compact.spec["problem"] == natural.spec["problem"]
            assert compact.tools == natural.tools
            assert compact.messages != natural.messages
