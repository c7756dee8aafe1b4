"""The think teacher: a server, a model folder, or the data set's own reasoning."""

from __future__ import annotations

import pytest
from teacher_server import Server

from autotool_fast.chat import ChatFormat, parse_reply
from autotool_fast.config import LabelConfig, ModelConfig
from autotool_fast.errors import UserError
from autotool_fast.eval import engine_policy
from autotool_fast.tasks.rendering import solution
from autotool_fast.tasks.tiny import build_model, build_tokenizer
from autotool_fast.tasks.world import World
from autotool_fast.teacher import Lesson, make_teacher
from autotool_fast.warmup import demonstrate

WORLD = World(("set", "chain", "hop"), 4, "natural")
TASKS = [WORLD.task(family, k, "train", "0") for family, k in (("set", 0), ("chain", 2), ("hop", 4))]


def teach(config: LabelConfig, tasks=TASKS) -> tuple[list[Lesson], list[int]]:
    done: list[int] = []
    teacher = make_teacher(config, seed=3, max_len=512, max_new_tokens=64)
    return teacher.teach(tasks, done.append, lambda name, make: make()), done


def test_a_server_teaches_through_real_tools_turn_by_turn():
    with Server(TASKS, wrong={"hop"}) as server:
        lessons, done = teach(LabelConfig(k=2, teacher=server.url, teacher_model="m", teacher_temperature=0.7))
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
    with Server(TASKS, silent=True) as server:
        lessons, _ = teach(LabelConfig(k=1, teacher=server.url, teacher_model="m"), TASKS[:1])
    assert lessons == [Lesson(0, None)]


def test_answers_that_the_server_cut_are_no_lesson():
    with Server(TASKS, finish="length") as server:
        config = LabelConfig(k=1, teacher=server.url, teacher_model="m")
        teacher = make_teacher(config, seed=0, max_len=512, max_new_tokens=64)
        lessons = teacher.teach(TASKS, lambda done: None, lambda name, make: make())
    assert lessons == [Lesson(0, None)] * 3
    assert teacher.notices == ["3 of 3 samples of the teacher count as wrong, cut at rollout.max_new_tokens"]


def test_a_refused_prompt_is_one_that_the_teacher_cannot_solve():
    with Server(TASKS, fails=lambda task, number: 400 if task.family == "chain" else None) as server:
        config = LabelConfig(k=2, teacher=server.url, teacher_model="m")
        teacher = make_teacher(config, seed=0, max_len=512, max_new_tokens=64)
        lessons = teacher.teach(TASKS, lambda done: None, lambda name, make: make())
    assert [lesson.correct for lesson in lessons] == [2, 0, 2]
    (notice,) = teacher.notices
    assert notice == (
        "2 of 6 samples of the teacher count as wrong, refused by the server, such as: answered 400 (at most 9 tokens)"
    )


def test_a_failing_server_is_blamed_on_the_setting_that_names_it():
    with Server(TASKS, fails=lambda task, number: 404) as server, pytest.raises(UserError) as caught:
        teach(LabelConfig(k=1, teacher=server.url, teacher_model="m"))
    assert str(caught.value).startswith(f"label.teacher ({server.url}): answered 404")
    assert "label.teacher_model m" in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    tokenizer = build_tokenizer()
    sizes = ModelConfig(layers=1, hidden=16, heads=2, kv_heads=2, intermediate=16)
    build_model(sizes, tokenizer, 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_damaged_model_folder_is_blamed_on_the_setting_that_names_it(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        teach(LabelConfig(k=1, teacher=str(folder)))
    assert caught.value.where == f"label.teacher ({folder})"
    assert caught.value.remedy


def test_a_model_folder_without_a_known_template_gets_no_advice_that_cannot_be_taken(folder):
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match="no known format") as caught:
        teach(LabelConfig(k=1, teacher=str(folder)))
    assert caught.value.where == f"label.teacher ({folder})"
    assert "chat-format" not in caught.value.remedy


def test_a_model_folder_runs_where_the_run_does(folder, monkeypatch):
    used = []
    monkeypatch.setattr(engine_policy, "load_checkpoint", lambda folder, device, *, where: used.append(device))
    with pytest.raises(TypeError):  # nothing was loaded
        make_teacher(LabelConfig(teacher=str(folder)), seed=0, max_len=64, max_new_tokens=16, device="meta")
    assert used == ["meta"]


def test_a_model_folder_teaches(folder):
    compact = World(("set",), 0).task("set", 0, "train", "0")
    lessons, done = teach(LabelConfig(k=2, teacher=str(folder)), [compact])
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
