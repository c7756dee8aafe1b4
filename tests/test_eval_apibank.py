"""API-Bank on a hand-written stand-in: formats, rules, oracle and null."""

import json
import os

import pytest
from eval_stand_ins import STAND_INS, Scripted, reply_text

from autotool_fast.errors import UserError
from autotool_fast.eval.apibank import ApiBank, as_text, read_tools
from autotool_fast.eval.harness import judge, run
from autotool_fast.eval.policies import Null, Oracle

FOLDER = STAND_INS / "apibank"
DESK = {"token": "t1", "people": "['Ann', 'Ben']", "floor": "2"}


@pytest.fixture(scope="module", params=["match", "execute"])
def bank(request):
    made = ApiBank(FOLDER, rule=request.param)
    yield made
    made.close()


def test_oracle_is_right_and_null_is_not(bank, tmp_path):
    rows = run(bank, Oracle(), tmp_path / "oracle")
    assert [row["category"] for row in rows] == ["level-1"] * 2 + ["level-2"] * 2 + ["level-2-search"]
    assert all(row["correct"] and row["strict"] for row in rows)
    assert not any(row["correct"] for row in run(bank, Null(), tmp_path / "null"))


def row_of(bank, identifier, *calls):
    task = next(task for task in bank.tasks() if task.id == identifier)
    (played,) = Scripted(lambda request: reply_text(*calls)).play([task], "auto")
    return judge(played, "auto")


def test_dialogues_become_chat_messages_with_calls():
    tasks = {task.id: task for task in ApiBank(FOLDER).tasks()}
    task = tasks["level-1/desk-1/3"]
    assert [m["role"] for m in task.messages] == ["system", "user", "assistant", "tool"]
    made = task.messages[2]
    assert made["content"] == "I sign you in."
    assert made["tool_calls"][0]["function"] == {"name": "GetToken", "arguments": {"name": "Ann"}}
    assert json.loads(task.messages[3]["content"]) == ["name"]
    assert [t["function"]["name"] for t in task.tools] == ["BookDesk", "GetToken"]


def test_level_2_offers_the_search_and_what_it_found():
    tools = {task.id: [t["function"]["name"] for t in task.tools] for task in ApiBank(FOLDER).tasks()}
    assert tools["level-2/desk-2/1"] == ["ToolSearcher"]
    assert tools["level-2/desk-2/3"] == ["ToolSearcher", "GetToken", "BookDesk"]


def test_tools_are_read_without_running_their_source():
    tools = read_tools(FOLDER / "apis")
    assert "APIBANK_STAND_IN_WAS_RUN" not in os.environ
    properties = tools["BookDesk"]["function"]["parameters"]["properties"]
    assert {name: schema["type"] for name, schema in properties.items()} == {
        "token": "string",
        "people": "array",
        "floor": "integer",
    }


def test_values_match_as_text_and_strictly_as_written():
    bank = ApiBank(FOLDER)
    typed = ("BookDesk", {"floor": 2, "people": ["Ann", "Ben"], "token": " t1"})
    row = row_of(bank, "level-1/desk-1/3", typed)
    assert (row["correct"], row["strict"]) == (True, False)
    exact = row_of(bank, "level-1/desk-1/3", ("BookDesk", DESK))
    assert exact["strict"]
    several = row_of(bank, "level-1/desk-1/3", ("GetToken", {"name": "Ann"}), ("BookDesk", DESK))
    assert (several["correct"], several["strict"]) == (True, False)
    for wrong in ({**DESK, "floor": "3"}, {**DESK, "extra": "1"}, {"token": "t1"}):
        row = row_of(bank, "level-1/desk-1/3", ("BookDesk", wrong))
        assert (row["correct"], row["reason"]) == (False, "wrong_arguments")
    assert row_of(bank, "level-1/desk-1/3", ("GetToken", {}))["reason"] == "wrong_tool"


def test_execution_judges_by_the_tool():
    bank = ApiBank(FOLDER, rule="execute")
    other = row_of(bank, "level-1/desk-1/3", ("BookDesk", {**DESK, "floor": 7, "people": ["Eve"]}))
    assert other["correct"]  # the stand-in's tool looks at the names of arguments alone
    assert not other["strict"]
    assert not row_of(bank, "level-1/desk-1/3", ("BookDesk", {"token": "t1"}))["correct"]
    assert not row_of(bank, "level-1/desk-1/3", ("BookDesk", {**DESK, "unknown": 1}))["correct"]
    bank.close()


def test_any_keywords_are_a_search():
    bank = ApiBank(FOLDER)
    search = "level-2/desk-2/1"
    assert row_of(bank, search, ("ToolSearcher", {"keywords": "reserve a place"}))["correct"]
    for arguments in ({"keywords": " "}, {}, {"keywords": None}):
        assert not row_of(bank, search, ("ToolSearcher", arguments))["correct"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2, "2"), ("2", "2"), (True, "True"), (" a ", "a"), (["a"], '["a"]'), ("['a']", '["a"]'), ("[a", "[a")],
)
def test_values_as_text(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize("damage", ['{"role": "API"}', "{", '{"text": "x"}', "3"])
def test_a_damaged_dialogue_names_its_line(tmp_path, damage):
    samples = tmp_path / "lv1-lv2-samples" / "level-1-given-desc"
    samples.mkdir(parents=True)
    (tmp_path / "apis").mkdir()
    (samples / "a.jsonl").write_text('{"role": "User", "text": "x"}\n' + damage + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl: line 2 is no dialogue line"):
        ApiBank(tmp_path).tasks()


def test_a_dialogue_with_an_unknown_tool_is_an_error(tmp_path):
    samples = tmp_path / "lv1-lv2-samples" / "level-1-given-desc"
    samples.mkdir(parents=True)
    (tmp_path / "apis").mkdir()
    line = {"role": "API", "api_name": "Fly", "param_dict": {}, "result": {}}
    (samples / "a.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match="uses the tool Fly"):
        ApiBank(tmp_path).tasks()
