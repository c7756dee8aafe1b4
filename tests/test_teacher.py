"""The think teacher: a server, a model folder, or the data set's own reasoning."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from autotool_fast.chat import ChatFormat, parse_reply
from autotool_fast.config import LabelConfig, ModelConfig
from autotool_fast.errors import UserError
from autotool_fast.tasks.rendering import solution
from autotool_fast.tasks.tiny import build_model, build_tokenizer
from autotool_fast.tasks.world import World
from autotool_fast.teacher import Lesson, make_teacher
from autotool_fast.warmup import demonstrate

WORLD = World(("set", "chain", "hop"), 4, "natural")
TASKS = [WORLD.task(family, k, "train", "0") for family, k in (("set", 0), ("chain", 2), ("hop", 4))]


class Server(ThreadingHTTPServer):
    """Thinks and plays the solution of the task that the first user message asks; says no to `wrong` families."""

    def __init__(self, wrong: set[str] = frozenset(), silent: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.wrong, self.silent = wrong, silent
        self.asked: list[dict] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        first = next(m["content"] for m in body["messages"] if m["role"] == "user")
        task = next(t for t in TASKS if t.messages[0]["content"] == first)
        turn = sum(m["role"] == "assistant" for m in body["messages"])
        reply = parse_reply(solution(task, think=True)[turn])
        message = {"role": "assistant", "content": "No." if task.family in self.server.wrong else ""}
        if not self.server.silent:
            message["reasoning_content"] = f"turn {turn}"
        if not message["content"]:
            message["tool_calls"] = [
                {"id": str(i), "type": "function", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}}
                for i, c in enumerate(reply.calls)
            ]
        data = json.dumps({"choices": [{"message": message}], "usage": {}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def teach(config: LabelConfig, tasks=TASKS) -> tuple[list[Lesson], list[int]]:
    done: list[int] = []
    return make_teacher(config, seed=3, max_len=512, max_new_tokens=64).teach(tasks, done.append), done


def test_a_server_teaches_through_real_tools_turn_by_turn():
    with Server(wrong={"hop"}) as server:
        lessons, done = teach(LabelConfig(k=2, teacher=server.url, teacher_model="m", teacher_temperature=0.7))
        server.shutdown()
    assert [lesson.correct for lesson in lessons] == [2, 2, 0]
    assert lessons[2].replies is None
    assert done == [3, 6]
    chat = ChatFormat(build_tokenizer())
    for task, lesson in zip(TASKS[:2], lessons, strict=False):
        thoughts = [parse_reply(reply).think.strip() for reply in lesson.replies]
        assert thoughts == [f"turn {i}" for i in range(len(thoughts))]
        assert len(lesson.replies) == len(solution(task, think=True))
        text = chat.decode(demonstrate(task, lesson.replies, chat).ids.tolist())
        assert text.count("[think]") == len(lesson.replies)
    assert {body["seed"] for body in server.asked} == {3, 4}
    assert {body["temperature"] for body in server.asked} == {0.7}


def test_answers_without_thinking_are_no_lesson():
    with Server(silent=True) as server:
        lessons, _ = teach(LabelConfig(k=1, teacher=server.url, teacher_model="m"), TASKS[:1])
        server.shutdown()
    assert lessons == [Lesson(0, None)]


def test_a_model_folder_teaches(tmp_path):
    tokenizer = build_tokenizer()
    sizes = ModelConfig(layers=1, hidden=16, heads=2, kv_heads=2, intermediate=16)
    build_model(sizes, tokenizer, 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    compact = World(("set",), 0).task("set", 0, "train", "0")
    lessons, done = teach(LabelConfig(k=2, teacher=str(tmp_path)), [compact])
    assert lessons == [Lesson(0, None)]  # an untrained model solves nothing
    assert done == [1, 2]


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (LabelConfig(teacher="nowhere"), "label.teacher (nowhere)"),
        (LabelConfig(teacher="http://127.0.0.1:9/v1"), "label.teacher_model"),
        (LabelConfig(teacher="http://127.0.0.1:9/v1", teacher_model="m"), "label.teacher (http://127.0.0.1:9/v1)"),
    ],
)
def test_a_teacher_that_cannot_be_asked_is_one_line(config, where):
    with pytest.raises(UserError) as error:
        make_teacher(config, seed=0, max_len=64, max_new_tokens=16)
    assert error.value.where == where


def test_without_a_teacher_the_base_model_is_its_own():
    assert make_teacher(LabelConfig(), seed=0, max_len=64, max_new_tokens=16) is None
