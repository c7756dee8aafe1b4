"""Tool calls that run beside decoding: other rows go on, the tokens stay the same, deadlines and the watchdog hold."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_rollout_driver import SHORT, FakeChat, make_engine, make_task, model, script  # noqa: F401
from test_rollout_driver import run as run_rollout

from autotool_fast.rollout.driver import RolloutLimits, rollout
from autotool_fast.rollout.records import StopReason
from autotool_fast.tasks.record import Task


class Slow:
    """Works for a while in a thread of its own; the other tasks are `test_rollout_driver`'s."""

    def __init__(self, pool, seconds, told):
        self.pool, self.seconds, self.told, self.left = pool, seconds, told, 2

    def begin(self, reply):
        return self.pool.submit(self.step, reply)

    def step(self, reply):
        self.left -= 1
        time.sleep(self.seconds if self.left else 0.0)
        return [{"role": "tool", "content": "xxx"}] if self.left else None

    def score(self):
        return True

    def waited(self, idle_s, waits):
        self.told.append((idle_s, waits))


@pytest.fixture
def slow_task():
    pool, told = ThreadPoolExecutor(8), []

    def make(seconds):
        messages = ({"role": "user", "content": "xxxx"},)
        return Task(f"slow-{seconds}", "fake", 0, (), messages, {}, "train", lambda _: Slow(pool, seconds, told))

    make.told = told
    yield make
    pool.shutdown(wait=False)


def test_other_rows_go_on_while_a_call_hangs(model, script, slow_task):  # noqa: F811
    ended = []
    for group in range(4):
        script(group, 0, SHORT * 2)
    tasks = [slow_task(1.5), *(make_task(2) for _ in range(3))]
    began = time.monotonic()
    done = run_rollout(
        make_engine(model), tasks, on_progress=lambda count, total: ended.append((count, time.monotonic() - began))
    )
    assert [t.stop_reason for t in done] == [StopReason.FINISHED] * 4
    assert max(seconds for count, seconds in ended if count <= 3) < 1.2  # three were done before the call was
    assert ended[-1][1] >= 1.5
    assert done[0].tool_seconds >= 1.5
    assert max(t.tool_seconds for t in done[1:]) < 0.5


def test_calls_beside_decoding_give_the_tokens_of_calls_between(model):  # noqa: F811
    """The same episodes, served here and elsewhere, token by token and number by number."""
    pool = ThreadPoolExecutor(4)

    def elsewhere(task):
        def start(_):
            episode = task.episode()
            episode.begin = lambda reply: pool.submit(episode.step, reply)
            return episode

        return dataclasses.replace(task, start=start)

    tasks = [make_task(3, prompt=2), make_task(2, prompt=9), make_task(1, prompt=17)]
    played = [
        rollout(make_engine(model, 5), chosen, chat=FakeChat(), group_size=4, seed=0, step=0, mode="no_think",
                limits=RolloutLimits(max_new_tokens=100, max_turn_tokens=60))
        for chosen in (tasks, [elsewhere(task) for task in tasks])
    ]  # fmt: skip
    pool.shutdown()
    for one, other in zip(*played, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.logp, other.logp)
        assert one.stop_reason is other.stop_reason


def test_an_episode_s_deadline_cuts_a_call_under_way(model, script, slow_task):  # noqa: F811
    script(0, 0, SHORT * 2)
    began = time.monotonic()
    (cut,) = run_rollout(make_engine(model), [slow_task(3.0)], limits=RolloutLimits(deadline_s=0.5))
    assert time.monotonic() - began < 2
    assert cut.stop_reason is StopReason.DEADLINE
    assert cut.ids.tolist()[6:] == SHORT
    assert len(cut.replies) == 1


def test_a_rollout_with_nothing_to_do_says_what_it_waits_for(model, script, slow_task):  # noqa: F811
    script(0, 0, SHORT * 2)
    script(1, 0, SHORT * 2)
    run_rollout(make_engine(model), [slow_task(1.0), make_task(2)])
    idle, waits = slow_task.told[-1]
    assert 0.3 < idle <= waits[0].seconds < 1.2
    assert [(wait.task_id, wait.tools) for wait in waits] == [("slow-1.0", ("f",))]
