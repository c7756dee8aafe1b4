"""BFCL: oracle and null on a stand-in with the package's layout (and on the package where there is one), and the
hazards of its simulators."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from eval_stand_ins import MULTI_TURN, SINGLE_TURN, STAND_INS, CharacterChat, Scripted, ScriptedEngine, reply_text

from autotool_fast.chat import parse_reply
from autotool_fast.errors import UserError
from autotool_fast.eval import bfcl, bfcl_scores
from autotool_fast.eval.bfcl import Bfcl
from autotool_fast.eval.bfcl_answers import java_text, multi_turn_calls, single_turn_calls
from autotool_fast.eval.harness import judge, run
from autotool_fast.eval.policies import Null, Oracle
from autotool_fast.rollout.driver import RolloutLimits, rollout
from autotool_fast.rollout.records import StopReason

DONE = reply_text(text="Done.")
PACKAGE = os.environ.get("AUTOTOOL_BFCL")


@pytest.fixture(scope="module")
def stand_in():
    made = Bfcl(STAND_INS / "bfcl", (*SINGLE_TURN, *MULTI_TURN), deadline_s=1.0)
    yield made
    made.close()


def task_of(benchmark, category, number=0):
    return [task for task in benchmark.tasks() if task.family == category][number]


def played(benchmark, category, *replies):
    """The row of one task, answered with `replies` one after the other."""
    left = list(replies)
    policy = Scripted(lambda request: left.pop(0))
    (episode,) = policy.play([task_of(benchmark, category)], "auto")
    return judge(episode, "auto"), policy


@pytest.mark.parametrize("mode", ["auto", "think"])
def test_oracle_is_right_everywhere(stand_in, tmp_path, mode):
    rows = run(stand_in, Oracle(), tmp_path / "out", modes=(mode,))
    assert {row["category"] for row in rows} == {*SINGLE_TURN, *MULTI_TURN}
    assert [row["id"] for row in rows if not (row["correct"] and row["strict"])] == []
    assert {row["thinks"] for row in rows} == {mode == "think"}


def test_null_is_right_only_where_nothing_is_to_be_done(stand_in, tmp_path):
    rows = run(stand_in, Null(), tmp_path / "out")
    assert {row["category"] for row in rows if row["correct"]} == {"irrelevance"}
    assert all(row["correct"] for row in rows if row["category"] == "irrelevance")


def test_a_category_whose_file_is_missing_is_named_with_the_way_to_get_it():
    incomplete = Bfcl(STAND_INS / "bfcl", ("simple_javascript",), deadline_s=1.0)
    try:
        with pytest.raises(UserError, match=r"the data of simple_javascript cannot be read .*pip download"):
            incomplete.tasks()
    finally:
        incomplete.close()


@pytest.mark.skipif(PACKAGE is None, reason="AUTOTOOL_BFCL names no unzipped bfcl-eval")
@pytest.mark.slow
def test_the_package_s_own_answers_pass(tmp_path):
    benchmark = Bfcl(Path(PACKAGE))
    rows = run(benchmark, Oracle(), tmp_path / "oracle")
    multi_turn = [row["correct"] for row in rows if row["category"] in bfcl.MULTI_TURN]
    single_turn = [row["correct"] for row in rows if row["category"] not in bfcl.MULTI_TURN]
    assert (len(multi_turn), len(single_turn)) == (800, 3641)
    assert all(multi_turn)
    assert sum(single_turn) / len(single_turn) >= 0.997
    nothing = run(benchmark, Null(), tmp_path / "null")
    assert {row["category"] for row in nothing if row["correct"]} == Bfcl.quiet
    assert all(row["correct"] for row in nothing if row["category"] in Bfcl.quiet)
    benchmark.close()


@pytest.mark.parametrize(
    ("category", "reply", "correct"),
    [
        ("simple_python", reply_text(("pool.temperature", {"pool": 3, "unit": "F"})), True),
        ("simple_python", reply_text(("pool.temperature", {"pool": 3, "unit": "C"})), False),
        ("simple_python", reply_text(("pool_temperature", {"pool": 3, "unit": "F"})), False),
        ("simple_java", reply_text(("Pool.open", {"gate": "northGate", "now": "true"})), True),
        ("simple_java", reply_text(("Pool.open", {"gate": "northGate", "now": True})), False),
        ("parallel", reply_text(("pool.temperature", {"pool": 4}), ("pool.temperature", {"pool": 3})), True),
        ("parallel", reply_text(("pool.temperature", {"pool": 3})), False),
        ("irrelevance", reply_text(("pool.temperature", {"pool": 3})), False),
        ("live_relevance", reply_text(("book_sauna", {})), True),
        ("live_relevance", reply_text(text="Which pool?"), False),
    ],
)
def test_single_turn_verdicts(stand_in, category, reply, correct):
    row, _ = played(stand_in, category, reply)
    assert (row["correct"], row["stop"]) == (correct, "finished")


def test_a_malformed_reply_made_no_call(stand_in):
    broken = "[no_think]\n<tool_call>\n{'name'"
    quiet, _ = played(stand_in, "irrelevance", broken)
    assert (quiet["correct"], quiet["strict"], quiet["malformed"], quiet["stop"]) == (True, False, True, "malformed")
    assert quiet["errors"] == ["bad_json"]
    asked, _ = played(stand_in, "simple_python", broken)
    assert (asked["correct"], asked["reason"]) == (False, "no_call_made")


def test_a_dialogue_is_judged_by_the_state_after_each_turn(stand_in):
    hall = reply_text(("switch", {"lamp": "hall"}))
    desk = reply_text(("switch", {"lamp": "desk", "to": "on"}))
    look = reply_text(("look", {}))
    row, policy = played(stand_in, "multi_turn_base", hall, DONE, desk, look, DONE)
    assert row["correct"]
    assert (row["calls"], len(row["replies"])) == (3, 5)
    messages = policy.requests[-1][0]
    assert [m["role"] for m in messages] == [
        "user",
        *["assistant", "tool", "assistant", "user"],
        *["assistant", "tool"] * 2,
    ]
    assert json.loads(messages[-1]["content"]) == {"hall": "on", "desk": "on"}
    late, _ = played(stand_in, "multi_turn_base", look, DONE, hall, desk, DONE)
    assert (late["correct"], late["reason"]) == (False, "stand_in:state")


BROKEN = '[no_think]\n<tool_call>\n{"name": "switch", "arguments": {"lamp": "desk"}}\n</tool_call>\n<tool_call>\n{'
HALL = reply_text(("switch", {"lamp": "hall"}))
DESK = reply_text(("switch", {"lamp": "desk"}), ("look", {}))


def test_a_malformed_reply_ends_the_user_s_turn_of_a_dialogue(stand_in):
    row, policy = played(stand_in, "multi_turn_base", HALL, BROKEN, DESK, DONE)
    assert (row["correct"], row["strict"], row["malformed"], row["stop"]) == (True, False, True, "finished")
    before, said, following = policy.requests[2][0][-3:]
    assert (before["role"], said, following["role"]) == ("tool", {"role": "assistant", "content": BROKEN}, "user")
    assert row["record"]["result"][0][1] == ""  # the well-formed call beside the broken one is made by nobody
    last, _ = played(stand_in, "multi_turn_base", HALL, DONE, BROKEN)
    assert (last["correct"], last["stop"], last["reason"]) == (False, "finished", "stand_in:empty_turn")


def test_a_checkpoint_goes_on_after_a_malformed_reply_and_a_trained_episode_does_not(stand_in):
    task, limits = task_of(stand_in, "multi_turn_base"), RolloutLimits(20, 9000, 3000)
    script = [[HALL, BROKEN[:40], DESK, DONE]]
    options = {"chat": CharacterChat(), "group_size": 1, "seed": 0, "step": 0, "limits": limits}
    (evaluated,) = rollout(ScriptedEngine(script), [task], malformed_ends=False, **options)
    assert (evaluated.correct, evaluated.stop_reason, evaluated.length_class) == (True, StopReason.FINISHED, -1)
    assert evaluated.ids.tolist()[evaluated.turn_spans[1][1] :][:4] == [ord(c) for c in "And "]  # the next user's turn
    (trained,) = rollout(ScriptedEngine(script), [task], **options)
    assert (trained.correct, trained.stop_reason) == (False, StopReason.MALFORMED)


def test_held_out_functions_arrive_with_their_turn(stand_in):
    switch = reply_text(("switch", {"lamp": "hall"}))
    row, policy = played(stand_in, "multi_turn_miss_func", DONE, switch, DONE)
    assert row["correct"]
    assert "switch" not in policy.requests[0][1]
    assert policy.requests[1][1] == [*policy.requests[0][1], "switch"]
    announced = policy.requests[1][0][-1]
    assert announced["role"] == "user"
    assert announced["content"].startswith('New: {"name": "switch"')
    # A call where none is wanted is forgiven by BFCL as long as the state is right, but not strictly.
    early, _ = played(stand_in, "multi_turn_miss_func", reply_text(("look", {})), DONE, switch, DONE)
    assert (early["correct"], early["strict"]) == (True, False)


def test_too_many_steps_in_one_turn_end_the_episode(stand_in):
    look = reply_text(("look", {}))
    row, policy = played(stand_in, "multi_turn_base", *[look] * 9)
    assert (row["correct"], row["reason"]) == (False, "step_limit")
    assert len(policy.requests) == 4  # the stand-in allows 3 steps and stops at the next
    assert len(row["record"]["result"]) == 1


@pytest.mark.parametrize(
    "call",
    [
        ("__import__('pathlib').Path('{file}').touch", {}),
        ("look() or __import__('pathlib').Path('{file}').touch", {}),
        ("switch", {"lamp=__import__('pathlib').Path('{file}').touch(), to": "on"}),
        ("switch", {"lamp": "__import__('pathlib').Path('{file}').touch()"}),
        ("switch", {"lamp": "'+str(__import__('pathlib').Path('{file}').touch())+'"}),
        ("_load_scenario", {"scenario": {}}),
    ],
)
def test_model_text_is_never_evaluated(stand_in, tmp_path, call):
    file = tmp_path / "touched"
    name, arguments = json.loads(json.dumps(call).replace("{file}", str(file)))
    row, policy = played(stand_in, "multi_turn_base", reply_text((name, arguments)), DONE, DONE)
    assert not file.exists()
    assert policy.requests[1][0][-1]["content"].startswith("Error during execution")
    assert not row["correct"]


def test_a_call_past_its_deadline_fails_the_episode_and_nothing_else(stand_in):
    wait = reply_text(("wait", {"seconds": 30}))
    row, policy = played(stand_in, "multi_turn_base", wait, reply_text(("look", {})), DONE, DONE)
    assert (row["correct"], row["reason"]) == (False, "call_deadline")
    assert "too long" in policy.requests[1][0][-1]["content"]
    assert "stopped" in policy.requests[2][0][-1]["content"]


def test_a_simulator_that_crashes_fails_the_episode_and_nothing_else(stand_in):
    leave = reply_text(("quit_process", {}))
    row, policy = played(stand_in, "multi_turn_base", leave, HALL, DONE, DESK, DONE)
    assert (row["correct"], row["reason"]) == (False, "simulator_crashed")
    assert "crashed" in policy.requests[1][0][-1]["content"]
    assert "stopped" in policy.requests[2][0][-1]["content"]


def test_a_simulator_that_cannot_be_made_fails_the_episode_and_nothing_else(stand_in):
    task = task_of(stand_in, "multi_turn_base")
    entry = {**task.spec["entry"], "initial_config": {"House": {"lamps": 3}}}
    episode = replace(task, spec={**task.spec, "entry": entry}).episode()
    (answer,) = episode.step(parse_reply(HALL))
    assert "crashed" in answer["content"]
    assert episode.verdict().reason == "simulator_crashed"


def test_episodes_train_through_the_rollout_driver(stand_in):
    task = task_of(stand_in, "multi_turn_base")
    hall, desk = (reply_text(("switch", {"lamp": lamp, "to": "on"})) for lamp in ("hall", "desk"))
    script = [
        [hall, DONE, reply_text(("switch", {"lamp": "desk", "to": "on"}), ("look", {})), DONE],
        [desk, DONE, DONE],  # the same lamps: a state shared with the first sample would pass
        [hall, "[no_think]\n<tool_call>{"],
        [hall, DONE, reply_text(("wait", {"seconds": 30})), DONE],
    ]
    limits = RolloutLimits(max_turns=20, max_new_tokens=5000, max_turn_tokens=2000, max_calls=50)
    engine, chat = ScriptedEngine(script), CharacterChat()
    trajectories = rollout(engine, [task], chat=chat, group_size=4, seed=0, step=0, limits=limits)
    assert [t.correct for t in trajectories] == [True, False, False, False]
    assert [t.stop_reason for t in trajectories] == [StopReason.FINISHED] * 2 + [
        StopReason.MALFORMED,
        StopReason.FINISHED,
    ]


def test_export_is_what_the_leaderboard_s_scorer_reads(stand_in, tmp_path):
    rows = run(stand_in, Oracle(), tmp_path / "out")
    files = bfcl_scores.export(rows, tmp_path / "project", "Qwen/Qwen3-8B-FC")
    root = tmp_path / "project" / "result" / "Qwen_Qwen3-8B-FC"
    names = {str(path.relative_to(root)) for path in files}
    assert "non_live/BFCL_v4_simple_java_result.json" in names
    assert "live/BFCL_v4_live_relevance_result.json" in names
    assert "multi_turn/BFCL_v4_multi_turn_base_result.json" in names
    (single,) = _lines(root / "non_live/BFCL_v4_parallel_result.json")
    assert single["id"] == "parallel_0"
    assert single["result"].count("<tool_call>\n") == 2
    assert "think" not in single["result"]
    (dialogue,) = _lines(root / "multi_turn/BFCL_v4_multi_turn_base_result.json")
    assert [len(turn) for turn in dialogue["result"]] == [2, 2]
    assert dialogue["result"][0][1] == "Done."


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_aggregates_by_hand():
    accuracy = dict.fromkeys(bfcl.CATEGORIES, 0.0)
    accuracy |= {"simple_python": 0.9, "simple_java": 0.6, "simple_javascript": 0.3, "multiple": 1.0}
    accuracy |= {"live_simple": 0.5, "live_irrelevance": 1.0, "multi_turn_base": 0.8}
    counts = dict.fromkeys(bfcl.CATEGORIES, 100) | {"live_simple": 300, "live_irrelevance": 400}
    v3, v4 = bfcl_scores.aggregates(accuracy, counts)
    assert v4["parts"]["non_live"]["value"] == pytest.approx((0.6 + 1.0) / 4)
    assert v4["parts"]["live"]["value"] == pytest.approx(0.5 * 300 / 600)
    assert v4["parts"]["irrelevance"]["value"] == pytest.approx(0.5)
    assert v4["value"] == pytest.approx(0.1 * 0.4 + 0.1 * 0.25 + 0.1 * 0.5 + 0.3 * 0.2)
    assert (v4["of"], v4["not_run"]) == (pytest.approx(0.6), ["agentic"])
    assert v3["parts"]["non_live"]["value"] == pytest.approx(1.6 / 5)
    assert v3["parts"]["live"]["value"] == pytest.approx((0.5 * 300 + 400) / 1100)
    assert v3["value"] == pytest.approx((1.6 / 5 + 550 / 1100 + 0.2) / 3)


def test_a_part_with_a_missing_category_is_not_run():
    v3, v4 = bfcl_scores.aggregates(
        {"irrelevance": 1.0, "live_irrelevance": 1.0}, {"irrelevance": 1, "live_irrelevance": 1}
    )
    assert (v4["value"], v4["of"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert v3["not_run"] == ["non_live", "live", "multi_turn"]


def test_answers_choose_accepted_values():
    functions = [
        {
            "name": "f",
            "parameters": {
                "properties": {"a": {"type": "dict"}, "b": {"type": "array"}, "c": {"type": "string"}},
                "required": ["b"],
            },
        }
    ]
    answer = [{"f": {"a": [{"x": ["", 1], "y": [""]}], "b": [""], "c": ["", "z"], "d": ["", 1]}}]
    (call,) = single_turn_calls("simple_python", functions, answer)
    assert call.arguments == {"a": {"x": 1}, "b": [], "c": "z"}


@pytest.mark.parametrize(
    ("value", "kind", "element", "text"),
    [
        (True, "boolean", None, "true"),
        (7, "long", None, "7L"),
        (1.5, "float", None, "1.5f"),
        (1.5, "double", None, "1.5"),
        ("x", "any", None, "x"),
        ([1, 2], "ArrayList", "long", "new ArrayList<>(Arrays.asList(1L, 2L))"),
        (["a"], "ArrayList", "String", 'new ArrayList<>(Arrays.asList("a"))'),
        (["a"], "Array", "String", "new String[]{a}"),
        ({"k": "v"}, "HashMap", None, 'new HashMap<String, Object>() {{ put("k", "v"); }}'),
    ],
)
def test_java_values_as_source(value, kind, element, text):
    assert java_text(value, kind, element) == text


def test_dialogue_answers_are_parsed_not_run():
    functions = [{"name": "f", "parameters": {"properties": {"a": {}, "b": {}}}}]
    (call,) = multi_turn_calls(["f('x', b=[(1, 2), -3])"], functions)
    assert call.arguments == {"a": "x", "b": [[1, 2], -3]}
    for text in ("g()", "f(a=open('x'))", "f.g()", "1"):
        with pytest.raises(ValueError, match=r"call|literal|malformed"):
            multi_turn_calls([text], functions)


@pytest.mark.parametrize(
    ("folder", "words"),
    [("missing", "no such folder"), ("empty", "holds no folder bfcl_eval"), ("old", "of version 2025.1.1")],
)
def test_a_wrong_folder_is_one_line_with_the_command(tmp_path, folder, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "old" / "bfcl_eval" / "data").mkdir(parents=True)
    (tmp_path / "old" / "bfcl_eval-2025.1.1.dist-info").mkdir()
    with pytest.raises(UserError) as caught:
        Bfcl(tmp_path / folder)
    assert words in str(caught.value)
    assert "pip download --no-deps bfcl-eval==" in str(caught.value)


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr(bfcl.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="bfcl-eval is not installed; run: pip download --no-deps"):
        Bfcl()


def test_an_unknown_category_names_the_known_ones():
    with pytest.raises(UserError, match="unknown category 'simpel'; choose from single_turn, "):
        Bfcl(STAND_INS / "bfcl", ["simpel"])


def test_groups_expand_in_the_usual_order():
    known = bfcl.expand(["multi_turn", "irrelevance"], bfcl.CATEGORIES, bfcl.GROUPS)
    assert known == ("irrelevance", *bfcl.MULTI_TURN)
