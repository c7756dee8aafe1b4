"""ACEBench on a hand-written stand-in: formats, the rules outside its checker, oracle and null."""

import pytest
from eval_stand_ins import STAND_INS, Scripted, reply_text

from autotool_fast.chat import ToolCall
from autotool_fast.errors import UserError
from autotool_fast.eval import acebench_answers as answers
from autotool_fast.eval.acebench import NORMAL, AceBench, dialogue, whole_dialogues, with_parameters
from autotool_fast.eval.harness import judge, run
from autotool_fast.eval.policies import Null, Oracle

CATEGORIES = (
    "normal_single_turn_single_function",
    "normal_single_turn_parallel_function",
    "normal_multi_turn_user_adjust",
    "normal_preference",
    "normal_atom_list",
    "special",
    "agent",
)
DONE = reply_text(text="Done.")


@pytest.fixture(scope="module")
def ace():
    made = AceBench(STAND_INS / "acebench", CATEGORIES, deadline_s=2.0)
    yield made
    made.close()


def row_of(ace, category, *replies, number=0):
    task = [task for task in ace.tasks() if task.family == category][number]
    left = list(replies)
    (played,) = Scripted(lambda request: left.pop(0)).play([task], "auto")
    return judge(played, "auto")


def test_oracle_is_right_and_null_is_not(ace, tmp_path):
    rows = run(ace, Oracle(), tmp_path / "oracle")
    assert [row["id"] for row in rows if not row["correct"]] == []
    assert len(rows) == 10
    assert not any(row["correct"] for row in run(ace, Null(), tmp_path / "null"))


def test_white_space_is_taken_out_strictly_only_in_dialogues(ace):
    call = ("plan_trip", {"city": "Split", "days": 3, "wishes": {"sights": ["old towns", "quiet bays"]}})
    in_dialogue = row_of(ace, "normal_multi_turn_user_adjust", reply_text(call))
    assert (in_dialogue["correct"], in_dialogue["strict"]) == (True, False)
    alone = row_of(ace, "normal_atom_list", reply_text(call))
    assert (alone["correct"], alone["strict"]) == (True, True)


def test_any_of_several_answers_will_do(ace):
    assert row_of(ace, "normal_atom_list", reply_text(("hire_boat", {"seats": 2})))["correct"]
    wrong = row_of(ace, "normal_atom_list", reply_text(("hire_boat", {"seats": 3})))
    assert (wrong["correct"], wrong["reason"]) == (False, "stand_in:no_match")


@pytest.mark.parametrize(
    ("category", "text", "reason"),
    [
        ("special_incomplete", "Missing necessary parameters (seats) for the api (hire_boat)", None),
        ("special_incomplete", "Missing necessary parameters (days) for the api (hire_boat)", "error_correction"),
        ("special_incomplete", "Missing necessary parameters (seats) for it", "error_correction"),
        ("special_incomplete", "The seats of hire_boat?", "error_detection"),
        ("special_error_param", "There is incorrect value (minus two) for seats", None),
        ("special_error_param", "There is incorrect value", "error_correction"),
        ("special_irrelevant", "Due to the limitations of the function, no.", None),
        ("special_irrelevant", "No.", "error_detection"),
    ],
)
def test_special_replies_are_judged_by_their_words(ace, category, text, reason):
    row = row_of(ace, category, reply_text(text=text))
    assert (row["correct"], row["reason"]) == (reason is None, reason)


def test_special_prompts_are_the_checkout_s_own(ace):
    task = next(task for task in ace.tasks() if task.family == "special_incomplete")
    assert task.messages[0]["content"] == 'Say what is missing. Today is Monday.\nFunctions: ["plan_trip", "hire_boat"]'
    profile = next(task for task in ace.tasks() if task.family == "normal_preference")
    assert profile.messages[0]["content"] == "{'seats': 6}"


def test_flattened_dialogues_become_chat_messages():
    text = "Hello.\nuser: A trip.\nsystem: Which city,\nand when?\nuser: ask system: now\n"
    assert dialogue(text) == [
        {"role": "user", "content": "Hello."},
        {"role": "user", "content": "A trip."},
        {"role": "assistant", "content": "Which city,\nand when?"},
        {"role": "user", "content": "ask system: now"},
    ]


@pytest.mark.parametrize("key", ["parameters", "arguments", "_arguments"])
def test_the_schema_is_found_under_any_of_its_names(key):
    assert with_parameters({"name": "f", key: {"type": "object"}})["parameters"] == {"type": "object"}


def test_a_task_on_simulators_is_judged_by_its_state_and_its_milestones(ace):
    on, note = reply_text(("turn_on", {})), reply_text(("add_note", {"text": "Ann's tea"}))
    right = row_of(ace, "agent_multi_step", on, note, DONE)
    assert (right["correct"], right["details"]) == (True, {"process": 1.0})
    assert right["record"]["process"] == ["[turn_on()]", '[add_note(text="Ann\'s tea")]']
    early = row_of(ace, "agent_multi_step", note, on, DONE)
    assert (early["correct"], early["reason"], early["details"]["process"]) == (False, "wrong_state", 0.5)
    idle = row_of(ace, "agent_multi_step", DONE)
    assert (idle["correct"], idle["reason"], idle["details"]["process"]) == (False, "no_call_made", 0.0)


@pytest.mark.parametrize("name", ["_load_scenario", "__init__", "on", "nothing"])
def test_only_public_methods_can_be_called(ace, name):
    replies = [reply_text((name, {"scenario": {"on": True}})), DONE]
    task = next(task for task in ace.tasks() if task.family == "agent_multi_step")
    policy = Scripted(lambda request: replies.pop(0))
    (played,) = policy.play([task], "auto")
    assert policy.requests[1][0][-1]["content"].startswith("Error during execution")
    assert not judge(played, "auto")["correct"]


def test_two_attempts_share_no_state(ace):
    on, note = reply_text(("turn_on", {})), reply_text(("add_note", {"text": "Ann's tea"}))
    for _ in range(2):
        assert row_of(ace, "agent_multi_step", on, note, DONE)["correct"]


def test_dialogues_count_whole_and_the_missing_category_keeps_its_weight(ace, tmp_path):
    rows = [{"id": f"normal_x_{d}_{t}", "correct": (d, t) != (1, 0)} for d in range(3) for t in range(2)]
    assert whole_dialogues(rows) == pytest.approx(2 / 3)
    category = "normal_multi_turn_user_adjust"
    halves = [{"id": f"{category}_0_{t}", "category": category, "correct": not t} for t in range(2)]
    others = [{"id": name, "category": name, "correct": True} for name in NORMAL if name != category]
    (overall,) = ace.aggregates([*halves, *others])
    assert overall["parts"]["normal"]["value"] == pytest.approx(11 / 12)
    (overall,) = ace.aggregates(run(ace, Oracle(), tmp_path))
    assert overall["not_run"] == ["normal", "agent multi-turn"]
    assert overall["of"] == pytest.approx(0.2676 + 0.1545 / 2)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[f()]", [("f", {})]),
        (" [f(a='Ann's tea', b=2)] ", [("f", {"a": "Ann's tea", "b": 2})]),
        ("[f(a='x, b=y'), g(c=True)]", [("f", {"a": "x, b=y"}), ("g", {"c": True})]),
        ("[f(it=[{'p': 'T', 'n': 1}, {'p':'M'}])]", [("f", {"it": [{"p": "T", "n": 1}, {"p": "M"}]})]),
        ("[f(a='(x)', b=-1.5)]", [("f", {"a": "(x)", "b": -1.5})]),
    ],
)  # fmt: skip
def test_milestones_are_read_whatever_their_quotes(text, calls):
    assert [(call.name, call.arguments) for call in answers.read_calls(text)] == calls


def test_milestones_count_in_order_and_the_best_list_wins():
    made = ["[a()]", '[b(x="it\'s")]', "[d()]"]
    assert answers.milestone_share(["[a()]", "[b(x='it's')] "], made) == 1.0
    assert answers.milestone_share(["[b(x='it's')]", "[a()]"], made) == 0.5
    assert answers.milestone_share(["[a()]", "[a()]"], made) == 0.5
    assert answers.milestone_share(["[a()]", "[c()]", "[d()]"], made) == pytest.approx(1 / 3)
    assert answers.milestone_share([["[c()]"], ["[a()]", "[c()]"]], made) == 0.5


def test_call_texts_and_blanks():
    assert answers.call_text([ToolCall("f", {"a": "x", "b": [1]}), ToolCall("g", {})]) == "[f(a='x', b=[1]), g()]"
    assert answers.without_blanks({"a b": [" x\ty ", 1, None]}) == {"ab": ["xy", 1, None]}


def test_prompts_and_answers_must_belong_together(tmp_path):
    data = tmp_path / "data_all" / "data_en"
    (data / "possible_answer").mkdir(parents=True)
    name = "data_normal_preference.json"
    (data / name).write_text('{"id": "a", "question": "q", "function": []}')
    (data / "possible_answer" / name).write_text('{"id": "b", "ground_truth": {}}')
    with pytest.raises(UserError, match="do not belong together"):
        AceBench(tmp_path, ["normal_preference"]).tasks()
    (data / name).write_text('{"id": "a"}')
    with pytest.raises(UserError, match=r"data_normal_preference\.json: line 1 is no entry"):
        AceBench(tmp_path, ["normal_preference"]).tasks()
