"""Prepared data as a source of problems: what is left out, and why."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_models import LLAMA31, QWEN25, make_tokenizer

from autotool_fast.chat import ChatFormat, ToolCall, chat_format, render_reply
from autotool_fast.label_stage import _writable
from autotool_fast.problems import DataProblems
from autotool_fast.teacher import Lesson

TOOL = {"type": "function", "function": {"name": "dim", "parameters": {"type": "object", "properties": {"to": {}}}}}
ONE, TWO = {"name": "dim", "arguments": {"to": 1}}, {"name": "dim", "arguments": {"to": 2}}
ASKED = [{"role": "user", "content": "Dim."}]
CALLED_TWICE = [
    *ASKED,
    {"role": "assistant", "content": "", "tool_calls": [ONE, TWO]},
    {"role": "tool", "content": "1"},
    {"role": "tool", "content": "2"},
    {"role": "user", "content": "Again."},
]
ROWS = {
    "one": {"messages": ASKED, "answer": [ONE]},
    "two": {"messages": ASKED, "answer": [ONE, TWO]},
    "said": {"messages": ASKED, "answer": [ONE], "text": "At once."},
    "json": {"messages": ASKED, "answer": [], "text": "{}"},
    "history": {"messages": CALLED_TWICE, "answer": [ONE]},
    "summary": {"messages": [*ASKED, {"role": "user", "content": "Thanks."}], "answer": [], "no_call": False},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    lines = [json.dumps({"id": name, "tools": [TOOL], **row}) + "\n" for name, row in ROWS.items()]
    for part in ("sft", "rl", "test"):
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    return tmp_path


def problems(folder: Path, chat: ChatFormat) -> DataProblems:
    def unusable(task):
        return next((f"{r} in the history" for r in map(chat.unwritable_message, task.messages) if r), None)

    return DataProblems(folder, 0, unusable=unusable, unwritable=chat.unwritable)


def ids(tasks) -> set[str]:
    return {task.id for task in tasks}


def test_a_format_with_one_call_a_turn_leaves_out_what_it_cannot_write(folder):
    made = problems(folder, chat_format(make_tokenizer(LLAMA31)))
    history = {"several calls in one turn in the history": 1}
    written = {"several calls in one turn": 1, "text beside a call": 1, "text that would be read as a call": 1}
    summary = {"reports results, nothing to judge": 1}
    trained, asked = written | history | summary, history | summary
    assert made.left_out == {"sft": trained, "rl": trained, "test": asked}
    assert ids(made.training(9, "label")) == ids(made.training(9, "rl")) == {"one"}
    assert ids(made.held_out(9, "eval")) == {"one", "two", "said", "json"}  # it cannot answer all, and is asked
    assert "data: 1 examples of sft.jsonl left out, several calls in one turn" in made.notices


def test_a_format_that_writes_everything_leaves_out_only_what_cannot_be_judged(folder):
    made = problems(folder, chat_format(make_tokenizer(QWEN25)))
    assert set(map(len, made.left_out.values())) == {1}
    assert ids(made.training(9, "rl")) == set(ROWS) - {"summary"}


def test_what_is_left_out_is_exactly_what_cannot_be_written_and_read_back():
    chat = chat_format(make_tokenizer(LLAMA31))
    call = ToolCall("dim", {"to": 1})
    for calls, text in [((call,), ""), ((), "Fine."), ((call, call), ""), ((call,), "At once."), ((), " {1}")]:
        if chat.unwritable(calls, text) is None:
            parsed = chat.parse(chat.write_reply(None, calls, text))
            assert (parsed.calls, parsed.text, parsed.errors) == (calls, text, ())
        else:
            with pytest.raises(Exception, match="cannot be written"):
                chat.write_reply(None, calls, text)


def test_a_teacher_s_answer_that_cannot_be_written_teaches_nothing():
    said: list[str] = []
    chat = chat_format(make_tokenizer(LLAMA31))
    p = SimpleNamespace(chat=chat, context=SimpleNamespace(progress=SimpleNamespace(say=said.append)))
    call = ToolCall("dim", {"to": 1})
    good = Lesson(2, (render_reply("so", (call,)),))
    chatty = Lesson(1, (render_reply("so", (call,), "At once."),))
    lessons = _writable([good, chatty, Lesson(0, None), chatty], p)
    assert lessons == [good, Lesson(0, None), Lesson(0, None), Lesson(0, None)]
    assert said == ["label: 2 long answers of the teacher left out, text beside a call"]
