"""The embedded world: its answers, its judge and its draws."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from autotool_fast.chat import ToolCall, parse_reply, render_reply
from autotool_fast.errors import UserError
from autotool_fast.evaluate import cell_weights
from autotool_fast.tasks.families import FAMILIES, expected_calls, missing_tool
from autotool_fast.tasks.record import Task
from autotool_fast.tasks.rendering import RENDERINGS, solution
from autotool_fast.tasks.world import TOOLS, World, _in_test, band

WORLDS = {rendering: World(rendering=rendering) for rendering in RENDERINGS}
CELLS = WORLDS["compact"].cells
PER_CELL = 8
every_cell = pytest.mark.parametrize(("family", "difficulty"), CELLS)
both_renderings = pytest.mark.parametrize("rendering", RENDERINGS)


def tasks_of(family: str, difficulty: int, rendering: str = "compact", count: int = PER_CELL) -> list[Task]:
    return [WORLDS[rendering].task(family, difficulty, "test", f"t{i}") for i in range(count)]


def play(task: Task, replies: list[str]) -> tuple[bool, int]:
    """(solved, replies used); stops where the episode does."""
    episode = task.episode()
    for used, text in enumerate(replies, 1):
        reply = parse_reply(text)
        assert not reply.errors, (text, reply.errors)
        if episode.step(reply) is None:
            return episode.score(), used
    return episode.score(), len(replies)


def turns_of(task: Task) -> list[list[ToolCall]]:
    return expected_calls(task.family, task.spec["problem"])


def texts(turns: list[list[ToolCall]]) -> list[str]:
    return [render_reply(None, tuple(calls), "" if calls else "well") for calls in turns]


# The judge


@both_renderings
@every_cell
def test_the_perfect_solver_solves_everything_in_both_modes(family, difficulty, rendering):
    for task in tasks_of(family, difficulty, rendering):
        for think in (False, True):
            replies = solution(task, think=think)
            assert play(task, replies) == (True, len(replies)), task.id
            classes = {parse_reply(reply).length_class for reply in replies}
            assert classes == ({0} if think else {1})


@every_cell
def test_a_reply_without_calls_solves_only_irrelevant_requests(family, difficulty):
    for task in tasks_of(family, difficulty):
        for replies in (["[no_think]\nno"], ["[no_think]\nno"] * 6, ["[think]\n<think>\nhm\n</think>\nno"] * 6):
            assert play(task, replies)[0] == (family == "irrelevant")


def _other_value(value):
    """A different argument that the schema may well accept."""
    if isinstance(value, str):
        return (
            "fan" if value in ("lamp", "door", "bell") else "lamp" if value == "fan" else "b" if value == "a" else "a"
        )
    return value % 5 + 1


@every_cell
def test_any_wrong_argument_fails(family, difficulty):
    for task in tasks_of(family, difficulty):
        turns = turns_of(task)
        for t, calls in enumerate(turns):
            for c, call in enumerate(calls):
                for name, value in call.arguments.items():
                    changed = [list(calls) for calls in turns]
                    changed[t][c] = ToolCall(call.name, {**call.arguments, name: _other_value(value)})
                    assert not play(task, texts(changed))[0], (task.id, changed)


@every_cell
def test_arguments_that_break_the_schema_fail(family, difficulty):
    for task in tasks_of(family, difficulty, count=3):
        turns = turns_of(task)
        for t, calls in enumerate(turns):
            for c, call in enumerate(calls):
                for bad in (
                    {**call.arguments, "note": 1},
                    {name: str(value) + " " for name, value in call.arguments.items()},
                    dict.fromkeys(call.arguments),
                    dict.fromkeys(call.arguments, True),
                    dict.fromkeys(call.arguments, 99),
                    {},
                ):
                    changed = [list(calls) for calls in turns]
                    changed[t][c] = ToolCall(call.name, bad)
                    assert not play(task, texts(changed))[0], (task.id, bad)


@every_cell
def test_extra_missing_and_repeated_calls_fail(family, difficulty):
    for task in tasks_of(family, difficulty):
        turns = turns_of(task)
        extras = [
            ToolCall("goto", {"place": "a"}),
            ToolCall("set", {"item": "oven", "value": 1}),
            ToolCall("fly", {}),
        ]
        for t, calls in enumerate(turns):
            for extra in [*extras, *calls]:
                more = [*turns[:t], [*calls, extra], *turns[t + 1 :]]
                assert not play(task, texts(more))[0], (task.id, more)
            for c in range(len(calls)):
                fewer = [*turns[:t], calls[:c] + calls[c + 1 :], *turns[t + 1 :]]
                assert not play(task, texts(fewer))[0], (task.id, fewer)
        assert not play(task, texts([[], *turns]))[0] or family == "irrelevant"
        assert not play(task, texts(turns[1:] or [[ToolCall("fly", {})]]))[0]


@every_cell
def test_another_tool_with_the_same_arguments_fails(family, difficulty):
    for task in tasks_of(family, difficulty, count=2):
        turns = turns_of(task)
        changed = [[ToolCall("submit" if c.name == "goto" else "goto", c.arguments) for c in calls] for calls in turns]
        assert not play(task, texts(changed))[0] or not any(turns)


def test_calls_of_a_parallel_request_are_free_in_order_but_belong_in_one_reply():
    for task in tasks_of("parallel", 0):
        (calls,) = turns_of(task)
        assert play(task, texts([calls[::-1]]))[0]
        assert not play(task, texts([[call] for call in calls]))[0]


def test_a_number_of_equal_value_is_the_same_answer():
    for task in tasks_of("reg", 2):
        ((call,),) = turns_of(task)
        assert play(task, texts([[ToolCall("submit", {"value": float(call.arguments["value"])})]]))[0]


def test_each_attempt_starts_afresh():
    (task,) = tasks_of("parallel", 0, count=1)
    (calls,) = turns_of(task)
    assert not play(task, texts([calls[:1]]))[0]
    assert play(task, texts([calls]))[0]


def test_a_tool_that_is_not_offered_does_not_run():
    for task in tasks_of("irrelevant", 0):
        offered = {tool["function"]["name"] for tool in task.tools}
        assert missing_tool(task.spec["problem"]) not in offered
        spec = task.spec["problem"]
        wanted = expected_calls(spec["family"], spec["spec"])
        assert not play(task, texts(wanted))[0]


# The missing parameter and the chain


@both_renderings
def test_the_user_gives_the_missing_value_when_asked(rendering):
    for task in tasks_of("missing", 0, rendering):
        value = task.spec["problem"]["value"]
        assert not re.search(r"\d", task.messages[0]["content"])
        episode = task.episode()
        (answer,) = episode.step(parse_reply("[no_think]\nWhich?"))
        assert answer["role"] == "user"
        assert re.findall(r"\d+", answer["content"]) == [str(value)]
        assert not episode.score()
        call = ToolCall("set", task.spec["problem"])
        assert episode.step(parse_reply(render_reply(None, (call,)))) is None
        assert episode.score()


def test_guessing_the_missing_value_fails_even_when_right():
    for task in tasks_of("missing", 0):
        call = ToolCall("set", task.spec["problem"])
        assert play(task, texts([[call], [call]])) == (False, 1)
        assert play(task, texts([[], [], [call]])) == (False, 2)


@both_renderings
def test_a_chain_is_solved_from_what_the_tool_says_alone(rendering):
    """An independent player that sees only the request and the tool results."""
    for k in FAMILIES["chain"].difficulties:
        for task in tasks_of("chain", k, rendering):
            request = task.messages[0]["content"]
            key = re.search(r"(?:from|key) ([a-h])\b", request).group(1)
            reads = int(re.search(r"\d+", request).group())
            assert reads == k
            episode, total = task.episode(), 0
            for _ in range(reads):
                call = ToolCall("read", {"key": key})
                (message,) = episode.step(parse_reply(render_reply(None, (call,))))
                assert message["role"] == "tool"
                result = json.loads(message["content"])
                total, key = total + result["value"], result["next"]
            answer = render_reply(None, (ToolCall("submit", {"value": total % 10}),))
            assert episode.step(parse_reply(answer)) is None
            assert episode.score()


def test_a_chain_asks_for_the_last_digit_of_the_sum():
    spec = {"cells": {"a": [7, "b"], "b": [8, "a"]}, "start": "a", "reads": 3}
    assert expected_calls("chain", spec)[-1] == [ToolCall("submit", {"value": 2})]


def test_a_chain_answer_without_its_reads_fails_even_when_right():
    for task in tasks_of("chain", 2):
        turns = turns_of(task)
        assert play(task, texts(turns[-1:])) == (False, 1)
        assert not play(task, texts([[call for calls in turns for call in calls]]))[0]
        assert not play(task, texts([turns[0], turns[2]]))[0]


def test_a_failed_read_answers_error_and_the_chain_goes_on():
    (task,) = tasks_of("chain", 2, count=1)
    bad = render_reply(None, (ToolCall("read", {"key": "z"}), ToolCall("fly", {})))
    assert task.episode().step(parse_reply(bad)) == [{"role": "tool", "content": "error"}] * 2


@pytest.mark.parametrize("acting", ["submit", "set", "goto", "pick"])
def test_acting_ends_a_chain(acting):
    arguments = {"submit": {"value": 1}, "set": {"item": "fan", "value": 1}, "goto": {"place": "a"}}
    for task in tasks_of("chain", 2):
        if acting not in task.spec["tools"]:
            continue
        call = ToolCall(acting, arguments.get(acting, {"cup1": 1, "cup2": 2}))
        read = turns_of(task)[0][0]
        assert play(task, texts([[read, call], [read]])) == (False, 1)


# The answers, against references of their own, read off the natural request


def _reference(family: str, request: str) -> list[ToolCall]:
    if family in ("set", "parallel"):
        return [
            ToolCall("set", {"item": item, "value": int(value)})
            for item, value in re.findall(r"the (\w+) to level (\d)", request)
        ]
    if family == "hop":
        # The k-th power of the successor matrix.
        matrix = np.zeros((8, 8), int)
        for a, b in re.findall(r"([a-h]) to ([a-h])", request):
            matrix[ord(a) - 97, ord(b) - 97] = 1
        start, k = re.search(r"stand at ([a-h]) and follow (\d) roads?\.", request).groups()
        assert matrix.sum(0).tolist() == matrix.sum(1).tolist() == [1] * 8
        end = np.linalg.matrix_power(matrix, int(k))[ord(start) - 97].argmax()
        return [ToolCall("goto", {"place": chr(97 + end)})]
    if family == "reg":
        start = int(re.search(r"shows (\d)\.", request).group(1))
        signed = [int(n) * (1 if op == "add" else -1) for op, n in re.findall(r"(add|subtract) (\d)", request)]
        return [ToolCall("submit", {"value": (start + sum(signed)) % 10})]
    # cups: the product of the transpositions as one permutation matrix
    product = np.eye(5, dtype=int)
    for a, b in re.findall(r"cups (\d) and (\d)", request):
        swap = np.eye(5, dtype=int)
        swap[[int(a) - 1, int(b) - 1]] = swap[[int(b) - 1, int(a) - 1]]
        product = product @ swap
    balls = [int(n) for n in re.search(r"under cup (\d), the second under cup (\d)\.", request).groups()]
    first, second = (int(product[ball - 1].argmax()) + 1 for ball in balls)
    return [ToolCall("pick", {"cup1": first, "cup2": second})]


@pytest.mark.parametrize(
    ("family", "difficulty"), [c for c in CELLS if c[0] in ("set", "parallel", "hop", "reg", "cups")]
)
def test_expected_calls_agree_with_an_independent_reading_of_the_request(family, difficulty):
    for task in tasks_of(family, difficulty, "natural", count=20):
        assert turns_of(task) == [_reference(family, task.messages[0]["content"])], task.id


@pytest.mark.parametrize(("family", "difficulty"), [c for c in CELLS if c[1] > 0])
def test_difficulty_is_the_number_of_steps(family, difficulty):
    for task in tasks_of(family, difficulty):
        spec = task.spec["problem"]
        steps = {"hop": "hops", "chain": "reads", "reg": "ops", "cups": "swaps"}[family]
        length = spec[steps] if isinstance(spec[steps], int) else len(spec[steps])
        assert length == task.difficulty == difficulty


def test_no_constant_answer_is_better_than_chance():
    for family, chance in (("hop", 7), ("reg", 10), ("cups", 20)):
        answers = Counter(str(turns_of(task)) for task in tasks_of(family, 5, count=400))
        # 400 draws over `chance` answers; 20 expected for cups, and 5 standard deviations are 22 more.
        assert max(answers.values()) < 400 / chance + 5 * (400 / chance) ** 0.5


def test_bands():
    assert [band(k) for k in (0, 1, 3, 4, 6)] == ["easy", "medium", "medium", "hard", "hard"]


# Prompts


@every_cell
def test_the_tools_shown_hold_what_is_needed_among_distractors_in_any_order(family, difficulty):
    tasks = tasks_of(family, difficulty, count=60)
    places = Counter()
    for task in tasks:
        names = task.spec["tools"]
        assert [tool["function"]["name"] for tool in task.tools] == names
        assert len(set(names)) == 4
        needed = {call.name for calls in turns_of(task) for call in calls}
        assert needed <= set(names)
        for name in needed or set(names):
            places[names.index(name)] += 1
    assert len(places) == 4
    # Uniform over four places: 5 standard deviations of a count of n draws at 1/4.
    n = places.total()
    assert max(places.values()) < n / 4 + 5 * (n * 3 / 16) ** 0.5
    assert len({tuple(task.spec["tools"]) for task in tasks}) > 6


def test_a_task_is_json_and_rebuilds_from_it():
    for task in WORLDS["compact"].grid(1, "test", "j"):
        values = {name: value for name, value in vars(task).items() if name != "start"}
        back = json.loads(json.dumps(values))
        again = replace(task, spec=back["spec"], tools=tuple(back["tools"]), messages=tuple(back["messages"]))
        assert again == task
        assert play(again, solution(again, think=True))[0]


# Draws


def test_the_same_arguments_draw_the_same_tasks_in_another_process():
    code = (
        "from autotool_fast.tasks.world import World;"
        "print([(t.id, t.spec, t.messages) for t in World().draw(6, 'train', '7/rl', 0.5)])"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "123"}
    ).stdout
    here = [(t.id, t.spec, t.messages) for t in World().draw(6, "train", "7/rl", 0.5)]
    assert there.strip() == str(here)


def test_a_draw_depends_on_its_index_and_not_on_the_count():
    few, many = (list(World().draw(n, "train", "s", 0.6)) for n in (5, 40))
    assert few == many[:5]
    assert len({task.id for task in many}) == 40


@pytest.mark.parametrize("other", [("test", "s"), ("train", "s2")])
def test_seeds_and_splits_draw_different_tasks(other):
    drawn = [task.spec["problem"] for task in World().draw(40, "train", "s", 0.0)]
    others = [task.spec["problem"] for task in World().draw(40, *other, 0.0)]
    assert sum(a == b for a, b in zip(drawn, others, strict=True)) < 3


@pytest.mark.parametrize("family", FAMILIES)
def test_train_and_test_share_no_content(family):
    content = {
        split: {
            json.dumps(FAMILIES[family].content(task.spec["problem"]), sort_keys=True)
            for k in FAMILIES[family].difficulties
            for i in range(60)
            for task in [World().task(family, k, split, str(i))]
        }
        for split in ("train", "test")
    }
    assert content["train"]
    assert content["test"]
    assert not content["train"] & content["test"]


def test_hop_is_held_out_by_map_and_start_whatever_the_number_of_hops():
    content = FAMILIES["hop"].content
    spec = World().task("hop", 2, "test", "0").spec["problem"]
    same = {**spec, "map": spec["map"][::-1], "hops": 5}
    assert content(spec) == content(same)
    assert content(spec) != content({**spec, "start": next(p for p in "ab" if p != spec["start"])})


def test_a_fifth_of_the_content_is_held_out():
    specs = [{"start": n % 10, "ops": [["add", n]]} for n in range(4000)]
    share = np.mean([_in_test("reg", spec) for spec in specs])
    assert abs(share - 0.2) < 4.5 * (0.2 * 0.8 / 4000) ** 0.5  # 4.5 standard errors


@pytest.mark.parametrize("easy_share", [0.0, 0.15, 0.6, 1.0])
@pytest.mark.parametrize(
    ("families", "limit"), [(tuple(FAMILIES), 6), (("set", "hop"), 3), (("hop", "chain"), 6), (("set", "missing"), 6)]
)
def test_weights_are_the_frequencies_of_the_draw(families, limit, easy_share):
    world = World(families, limit)
    weights = cell_weights(world, easy_share)
    assert sum(weights.values()) == pytest.approx(1)
    n = 600
    counts = Counter((task.family, task.difficulty) for task in world.draw(n, "train", "w", easy_share))
    assert set(counts) <= {cell for cell, weight in weights.items() if weight > 0}
    for cell, weight in weights.items():
        # 4.5 standard deviations of a binomial count, for some 60 cells
        assert abs(counts[cell] - n * weight) <= 4.5 * (n * weight * (1 - weight)) ** 0.5 + 1e-9, cell


def test_without_a_share_every_family_is_drawn_alike():
    n = 800
    counts = Counter(task.family for task in World().draw(n, "train", "even"))
    for family in FAMILIES:
        assert abs(counts[family] - n / 8) < 4.5 * (n * 7 / 64) ** 0.5


def test_the_grid_has_every_cell_equally_often():
    world = World(max_difficulty=3)
    counts = Counter((task.family, task.difficulty) for task in world.grid(3, "test", "g"))
    assert counts == dict.fromkeys(world.cells, 3)
    assert max(k for _, k in world.cells) == 3
    assert len({task.id for task in world.grid(3, "test", "g")}) == 3 * len(world.cells)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"families": ("set", "hops")}, "'hops'.*choose from set, .*hop"),
        ({"families": ("hop",), "max_difficulty": 0}, "max_difficulty"),
        ({"rendering": "compakt"}, "'compakt'.*compact, natural"),
    ],
)
def test_a_world_without_tasks_is_refused(arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        World(**arguments)


def test_every_tool_is_needed_somewhere():
    needed = {
        call.name for task in WORLDS["compact"].grid(1, "test", "n") for calls in turns_of(task) for call in calls
    }
    assert needed == set(TOOLS)
