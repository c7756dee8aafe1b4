"""Simulators as a training environment: the split, the mix, what a failing simulator costs, and a whole run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_stand_ins import CharacterChat, ScriptedEngine, reply_text
from lamp_data import write_lamp_data
from lamp_environment import live_processes, write_environment, write_model
from small_runs import ctrl_c_at
from transformers import AutoModelForCausalLM

from autotool_fast.chat import parse_reply
from autotool_fast.config import MULTI_TURN, EnvironmentConfig, from_dict
from autotool_fast.data import main as data_main
from autotool_fast.environment import SimulatorProblems, held_out_ids, replies_needed
from autotool_fast.errors import UserError
from autotool_fast.eval import bfcl
from autotool_fast.metrics import read_rows
from autotool_fast.rollout.driver import RolloutLimits, rollout
from autotool_fast.rollout.records import StopReason
from autotool_fast.sandbox.host import WorkerDied, WorkerHost
from autotool_fast.tasks.record import Task
from autotool_fast.train import main

DONE = reply_text(text="Done.")
LOOK = reply_text(("look", {}))
WAIT = reply_text(("wait", {"seconds": 60}))
LEAVE = reply_text(("quit_process", {}))
TOOLS = ("switch", "look", "wait", "quit_process")
LIMITS = RolloutLimits(max_turns=20, max_new_tokens=9000, max_turn_tokens=3000)


def light(*lamps: str) -> str:
    return reply_text(*(("switch", {"lamp": lamp}) for lamp in lamps))


def lamps_of(task: Task) -> list[str]:
    return task.messages[0]["content"].removeprefix("Light ").removesuffix(".").split(" and ")


def wait_until(condition) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_environment(tmp_path_factory.mktemp("lamps") / "all", tools=TOOLS)


def simulators(folder: Path, said: list[str] | None = None, **options) -> SimulatorProblems:
    arguments = {"unusable": lambda task: None, "max_turns": 8, "slots": 8, "data": None, **options}
    config = EnvironmentConfig(kind="bfcl", path=str(folder), test_share=0.3, call_deadline_s=1.0)
    config = dataclasses.replace(config, **arguments.pop("config", {}))
    return SimulatorProblems(config, 0, warn=(said if said is not None else []).append, **arguments)


@pytest.fixture
def problems(folder):
    made = simulators(folder)
    yield made
    made.close()


def play(problems: SimulatorProblems, script: list[list[str]], task: Task | None = None):
    task = task or problems.training(1, "rl")[0]
    engine, chat = ScriptedEngine(script), CharacterChat()
    return rollout(engine, [task], chat=chat, group_size=len(script), seed=0, step=0, limits=LIMITS)



def entry(name: str, *turns: str, lamps: str = "ab") -> Task:
    content = {
        "question": [[{"role": "user", "content": text}] for text in turns],
        "initial_config": {"House": {"lamps": dict.fromkeys(lamps, "off")}},
        "involved_classes": ["House"],
    }
    return Task(name, "f", 0, (), (), {"entry": content, "answer": []}, "test", lambda task: None)


def test_tasks_that_share_a_user_s_words_are_on_one_side():
    pairs = [(entry(f"a{i}", f"Do {i}.", "Thanks."), entry(f"b{i}", f"do  {i}.", f"And {i}.")) for i in range(60)]
    chains = [entry(f"c{i}", f"And {i}.", "Thanks.") for i in range(60)]
    held = held_out_ids([task for pair in pairs for task in pair] + chains, 0.3)
    assert 8 < len([i for i in range(60) if f"a{i}" in held]) < 30  # 60 groups: 18 expected, deviation 3.5
    for i in range(60):
        assert len({f"{letter}{i}" in held for letter in "abc"}) == 1, i


def test_the_split_follows_content_not_names_order_or_neighbours():
    tasks = [entry(f"a{i}", f"Do {i}.") for i in range(40)]
    held = held_out_ids(tasks, 0.3)
    renamed = [dataclasses.replace(task, id=f"x{task.id}") for task in reversed(tasks)]
    assert {name.removeprefix("x") for name in held_out_ids(renamed, 0.3)} == held
    assert held_out_ids(tasks[:20], 0.3) == {name for name in held if int(name[1:]) < 20}
    assert held != held_out_ids([entry(f"a{i}", f"Do {i}.", lamps="cd") for i in range(40)], 0.3)


def test_variants_in_other_words_are_known_by_their_state():
    lamps = "abcdefghijklmnopqrst"
    pairs = [(entry(f"a{lamp}", f"Do {lamp}.", lamps=lamp), entry(f"b{lamp}", lamp, lamps=lamp)) for lamp in lamps]
    held = held_out_ids([task for pair in pairs for task in pair], 0.5)
    assert 0 < len(held) < 40
    assert all((one.id in held) == (other.id in held) for one, other in pairs)


def test_tasks_without_words_of_their_own_are_told_apart_by_their_state():
    lamps = "abcdefghijklmnopqrst"
    held = held_out_ids([entry(lamp, "Light it.", lamps=lamp) for lamp in lamps], 0.5)
    assert 0 < len(held) < len(lamps)


def test_nothing_that_is_trained_on_is_held_out(problems):
    train, test = problems.training(99, "rl"), problems.held_out(99, "eval")
    assert train
    assert test
    assert len(train) + len(test) == 12
    assert not {t.messages[0]["content"] for t in train} & {t.messages[0]["content"] for t in test}
    assert {t.split for t in train} == {"train"}
    assert {(t.family, t.difficulty, t.split) for t in test} == {("bfcl/multi_turn_base", 1, "test")}


def test_the_order_of_prompts_depends_on_the_seed_alone(folder, problems):
    again = simulators(folder)
    again.close()
    assert [t.id for t in again.training(4, "rl")] == [t.id for t in problems.training(4, "rl")]
    assert [t.id for t in problems.training(4, "rl")] == [t.id for t in problems.training(9, "rl")][:4]



class Data:
    """Stands in for prepared data."""

    def __init__(self) -> None:
        self.notices = ("data: none",)
        self.weights = {("xlam/call", 0): 0.75, ("xlam/call", 1): 0.25}

    def training(self, count, purpose):
        return [f"{purpose}{i}" for i in range(count)]

    def held_out(self, per_cell, purpose):
        return ["held out"]

    def answer(self, task):
        return ["answer"]


def test_rl_prompts_are_mixed_and_labels_are_the_data_s(folder):
    problems = simulators(folder, data=Data(), config={"share": 0.25})
    problems.close()
    mixed = problems.training(8, "rl")
    assert [isinstance(task, Task) for task in mixed] == [True] * 2 + [False] * 6
    assert problems.training(3, "label") == ["label0", "label1", "label2"]
    assert problems.answer("label0") == ["answer"]
    assert problems.held_out(1, "eval")[-1] == "held out"
    cells = {("bfcl/multi_turn_base", 1): 0.25, ("xlam/call", 0): 0.5625, ("xlam/call", 1): 0.1875}
    assert problems.weights == pytest.approx(cells)
    assert problems.notices == ("data: none",)


def test_entries_that_cannot_be_solved_or_read_are_counted(folder, problems):
    assert replies_needed(problems.training(1, "rl")[0]) == 4
    with pytest.raises(UserError, match=r"no usable entry \(12 more turns than rollout.max_turns\)"):
        simulators(folder, max_turns=3)
    long = simulators(folder, unusable=lambda task: "prompt too long" if task.id.endswith("_1") else None)
    long.close()
    assert long.notices == ("environment: 1 entries left out, prompt too long",)



def test_an_episode_is_judged_by_the_state_of_its_own_simulators(problems):
    one, two = lamps_of(task := problems.training(1, "rl")[0])
    script = [[light(one, two), DONE, LOOK, DONE], [light(one), DONE, LOOK, DONE], ["[no_think]\n<tool_call>"]]
    played = play(problems, script, task)
    assert [t.correct for t in played] == [True, False, False]
    assert [t.stop_reason for t in played] == [StopReason.FINISHED] * 2 + [StopReason.MALFORMED]
    assert not problems.lost


@pytest.mark.parametrize(("call", "reason"), [(WAIT, "call_deadline"), (LEAVE, "simulator_crashed")])
def test_a_lost_simulator_ends_its_own_episode_wrong_and_is_counted(folder, call, reason):
    said: list[str] = []
    problems = simulators(folder, said)
    one, two = lamps_of(task := problems.training(1, "rl")[0])
    good = [light(one, two), DONE, LOOK, DONE]
    played = play(problems, [good, [light(one), call], good, [call], [call]], task)
    assert [t.correct for t in played] == [True, False, True, False, False]
    assert [len(t.replies) for t in played] == [4, 2, 4, 1, 1]  # nothing is sampled after the loss
    assert {t.stop_reason for t in played} == {StopReason.FINISHED}
    assert {t.length_class for t in played} == {1}  # wrong, not malformed
    assert problems.lost == {reason: 3}
    assert [line.partition(" episodes")[0] for line in said] == ["environment: 1", "environment: 2"]
    assert said[-1].endswith(f"the last one of {task.id}")
    problems.close()
    assert said[-1] == f"environment: 3 episodes lost their simulators and count as wrong (3 {reason})"


def test_the_watchdog_names_the_entries_and_calls_a_rollout_waits_for(folder):
    said: list[str] = []
    problems = simulators(folder, said, config={"slow_call_s": 0.3})
    task = problems.training(1, "rl")[0]
    play(problems, [[WAIT], [WAIT]], task)
    problems.close()
    first = next(line for line in said if "wait for" in line)
    assert first == f"environment: nothing to do for 1 s but wait for {task.id}: wait (1 s); {task.id}: wait (1 s)"


def test_a_checker_that_fails_is_counted(problems, monkeypatch):
    def fail(self, op, **args):
        raise WorkerDied(op)

    one, two = lamps_of(task := problems.training(1, "rl")[0])
    episode = task.episode()
    for reply in (light(one, two), DONE, LOOK, DONE):
        episode.step(parse_reply(reply))
    monkeypatch.setattr("autotool_fast.sandbox.host.Session.call", fail)
    assert not episode.score()
    assert problems.lost == {"checker_failed": 1}


def test_a_server_that_dies_is_started_anew(problems, folder):
    task = problems.training(1, "rl")[0]
    one, two = lamps_of(task)
    good = [light(one, two), DONE, LOOK, DONE]
    assert play(problems, [good], task)[0].correct
    for process in live_processes(folder):
        with suppress(ProcessLookupError):  # the server takes its own with it
            os.kill(process, signal.SIGKILL)
    assert wait_until(lambda: not live_processes(folder))
    assert play(problems, [good], task)[0].correct


def remembered(task: Task) -> tuple[Task, list]:
    """The task, and its episodes: what is kept is not closed by being forgotten."""
    episodes = []

    def start(_: Task):
        episodes.append(task.episode())
        return episodes[-1]

    return dataclasses.replace(task, start=start), episodes


class Interrupting(ScriptedEngine):
    """Is interrupted when it is asked to decode for the third time."""

    def __init__(self, script, error):
        super().__init__(script)
        self.left, self.error = 2, error

    def step(self):
        if not self.left:
            raise self.error
        self.left -= 1
        return super().step()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_no_simulator_outlives_a_rollout_that_is_left(problems, folder, error):
    task, episodes = remembered(problems.training(1, "rl")[0])
    problems._benchmark.host.call("entries", category="multi_turn_base")  # the server and its shared session
    before = set(live_processes(folder))
    engine = Interrupting([[light(*lamps_of(task)), LOOK, LOOK]] * 3, error)
    with pytest.raises(type(error)):
        rollout(engine, [task], chat=CharacterChat(), group_size=3, seed=0, step=0, limits=LIMITS)
    assert len(episodes) == 3
    assert wait_until(lambda: set(live_processes(folder)) == before)


def test_simulators_are_closed_when_their_episodes_are_over_or_cut(problems, folder):
    one, two = lamps_of(plain := problems.training(1, "rl")[0])
    task, episodes = remembered(plain)
    problems._benchmark.host.call("entries", category="multi_turn_base")
    before = set(live_processes(folder))
    both = light(one, two)
    script = [[light(one), DONE, DONE], [LOOK, "[no_think]\n<tool_call>"], [LOOK] * 9, [both, both, DONE, DONE]]
    limits = dataclasses.replace(LIMITS, max_turns=3)
    played = rollout(
        ScriptedEngine(script), [task], chat=CharacterChat(), group_size=4, seed=0, step=0, limits=limits
    )
    assert [t.stop_reason.value for t in played] == ["finished", "malformed", "max_turns", "max_turns"]
    assert len(episodes) == 4
    assert wait_until(lambda: set(live_processes(folder)) == before)


def test_closing_ends_simulators_in_the_middle_of_a_call(folder):
    problems = simulators(folder, config={"call_deadline_s": 600.0})
    task = problems.training(1, "rl")[0]
    entry = task.spec["entry"]
    session = problems._benchmark.host.open()
    session.call("start", entry=entry, known=["wait"])
    request = {"id": 2, "op": "execute", "args": {"calls": [["wait", {"seconds": 60}]]}}
    session._connection.sendall(json.dumps(request).encode() + b"\n")
    assert len(live_processes(folder)) == 5  # the server; its shared session and this one, two processes each
    problems.close()
    assert wait_until(lambda: not live_processes(folder))



def test_categories_are_the_adapter_s():
    assert MULTI_TURN == bfcl.MULTI_TURN


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "environment.kind: needs a pretrained model; add --model"),
        ({"model": {"path": "m"}}, "stage label needs prepared data: simulators give no replies to learn from"),
        ({"model": {"path": "m"}, "start": "cold"}, "stage label needs prepared data"),
        ({"model": {"path": "m"}, "stages": ["warmup"]}, "stage warmup needs prepared data"),
        ({"model": {"path": "m"}, "environment": {"kind": "bfcl", "share": 0.5}}, "must be 1 without prepared data"),
        ({"environment": {"kind": "bfcl", "categories": []}}, "must name at least one category"),
    ],
)
def test_what_simulators_cannot_do_is_refused_with_the_remedy(values, words):
    with pytest.raises(UserError, match=words):
        from_dict({"environment": {"kind": "bfcl"}, **values})


def test_what_they_can_do_is_not():
    cold = {"model": {"path": "m"}, "start": "cold", "stages": ["refine", "rl", "eval"]}
    assert from_dict({"environment": {"kind": "bfcl"}, **cold}).environment.share == 1.0
    assert from_dict({"environment": {"kind": "bfcl", "share": 0.5}, "model": {"path": "m"}, "data": {"path": "d"}})


COLD = ("--start", "cold", "--stages", "refine,rl,eval")


def test_a_missing_package_is_one_line_before_anything_is_written(tmp_path, capsys):
    argv = ["--model", "m", "--environment", "bfcl", *COLD, "--out", str(tmp_path / "run")]
    assert main([*argv, "--environment.path", str(tmp_path / "nowhere")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --environment.path ")
    assert "no such folder" in line
    assert "pip download --no-deps bfcl-eval==" in line
    assert not (tmp_path / "run").exists()


def test_the_plan_names_the_environment(folder, capsys):
    argv = ["--model", "m", "--environment", "bfcl", "--environment.path", str(folder), *COLD, "--dry-run"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert f"bfcl in {folder}: multi_turn_base; 100% of the RL prompts" in text
    assert "world" not in text


SETTINGS = """
start = "cold"
stages = ["refine", "rl", "eval"]
[model]
max_positions = 900
[environment]
test_share = 0.3
[refine]
prompts = 4
rounds = 2
drop_hard = 0.0
keep = 1.0
[rl]
steps = 2
prompts_per_step = 3
group_size = 4
lr = 1e-4
eval_every = 1
checkpoint_every = 1
[rollout]
slots = 5
prefill_chunk = 512
max_new_tokens = 330
max_turn_tokens = 110
[eval]
per_cell = 2
interim_per_cell = 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an environment, a model that has learnt some of it, and settings."""
    folder = tmp_path_factory.mktemp("environment")
    write_environment(folder / "lamps")
    write_model(folder / "model", folder / "lamps", steps=120)
    (folder / "small.toml").write_text(SETTINGS)
    return folder


def options(place: Path, out: str, *more: str) -> list[str]:
    where = ["--environment", "bfcl", "--environment.path", str(place / "lamps"), "--out", str(place / out)]
    return ["--preset", str(place / "small.toml"), "--model", str(place / "model"), *where, *more]


def weights(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


@pytest.mark.slow
def test_a_model_is_refined_trained_and_evaluated_on_simulators(place, monkeypatch):
    sessions, most = [], [0]
    open_session = WorkerHost.open

    def counted(host):
        sessions.append(open_session(host))  # kept, so that none is closed by being forgotten
        most[0] = max(most[0], sum(session._connection.fileno() >= 0 for session in sessions))
        return sessions[-1]

    monkeypatch.setattr(WorkerHost, "open", counted)
    assert main(options(place, "run")) == 0
    assert all(session._connection.fileno() < 0 for session in sessions)
    assert wait_until(lambda: not live_processes(place / "lamps"))
    assert len(sessions) > 20  # episodes called functions
    assert 3 <= most[0] <= 5 + 2  # slots, the server's shared session and a checker's
    rows = [row for row in read_rows(place / "run" / "metrics.jsonl") if row["stage"] == "rl"]
    assert min(row["groups/constant"] for row in rows) < 1
    everything = [*rows, *(row for row in read_rows(place / "run" / "metrics.jsonl") if row["stage"] == "refine")]
    assert max(row["acc/all"] for row in everything) > 0
    assert not np.array_equal(weights(place / "model"), weights(place / "run" / "models" / "rl"))
    results = json.loads((place / "run" / "results.json").read_text())
    assert set(results["models"]) == {"base", "rl"}
    (cell,) = results["models"]["base"]["auto"]["cells"]
    assert (cell["family"], cell["difficulty"], cell["n"]) == ("bfcl/multi_turn_base", 1, 2)


@pytest.mark.slow
def test_a_run_labels_and_warms_up_on_data_and_trains_on_data_and_simulators(place):
    (place / "raw").mkdir()
    data = ["prepare", *write_lamp_data(place / "raw"), "--out", str(place / "data"), "--sft", "20", "--rl", "10"]
    assert data_main([*data, "--test-share", "0.2"]) == 0
    stages = ["--start", "clean", "--stages", "label,warmup,refine,rl,eval", "--environment.share", "0.5"]
    short = ["--label.prompts", "4", "--label.k", "1", "--label.unsolved", "short", "--eval.per-cell", "1"]
    warm = ["--warmup.steps", "2", "--warmup.batch", "2", "--warmup.warmup-steps", "1", "--warmup.lr", "1e-4"]
    assert main(options(place, "mixed", "--data", str(place / "data"), *stages, *short, *warm)) == 0
    labels = [json.loads(line) for line in (place / "mixed" / "labels.jsonl").read_text().splitlines()]
    assert not [row for row in labels if row["family"].startswith("bfcl/")]
    cells = json.loads((place / "mixed" / "results.json").read_text())["models"]["rl"]["auto"]["cells"]
    assert {cell["family"].partition("/")[0] for cell in cells} >= {"bfcl", "xlam"}
    pool = json.loads((place / "mixed" / "refined.json").read_text())["report"]
    assert pool["by_difficulty"]["1"]["pool"] == 2  # half of four prompts; the data's have difficulty 0
    assert wait_until(lambda: not live_processes(place / "lamps"))


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_simulator_and_resumes_to_the_same_weights(place):
    assert main(options(place, "whole", "--stages", "refine,rl")) == 0
    with ctrl_c_at("rl", 1):
        assert main(options(place, "parts", "--stages", "refine,rl")) == 130
    assert wait_until(lambda: not live_processes(place / "lamps"))
    assert main(options(place, "parts", "--stages", "refine,rl", "--resume")) == 0
    first, second = (place / out / "models" / "rl" / "model.safetensors" for out in ("whole", "parts"))
    assert first.read_bytes() == second.read_bytes()
