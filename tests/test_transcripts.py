"""transcripts.jsonl: one readable row per sampled episode, one place per stage and step."""

from __future__ import annotations

import json

import numpy as np
import pytest

from autotool_fast.chat import SOURCE_PROMPT, SOURCE_SAMPLED, SOURCE_TOOL, ChatFormat, parse_reply
from autotool_fast.rewards import RewardTable
from autotool_fast.rollout.records import StopReason, Trajectory
from autotool_fast.tasks.rendering import solution
from autotool_fast.tasks.tiny import build_tokenizer
from autotool_fast.tasks.world import World
from autotool_fast.transcripts import Transcripts, one_per_cell, rewards_of


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(build_tokenizer())


def played(chat, family="chain", difficulty=1, seed="t", think=True, correct=True) -> Trajectory:
    """A perfect episode with made-up log-probs and entropies."""
    task = World().task(family, difficulty, "test", seed)
    segments = [(chat.encode_prompt(list(task.messages), list(task.tools)), SOURCE_PROMPT)]
    episode, replies, spans = task.episode(), [], []
    for text in solution(task, think=think):
        start = sum(len(ids) for ids, _ in segments)
        segments.append((chat.encode_text(text + chat.stop), SOURCE_SAMPLED))
        spans.append((start, start + len(segments[-1][0])))
        replies.append(parse_reply(text))
        messages = episode.step(replies[-1])
        if messages:
            segments.append((chat.encode_continuation(messages), SOURCE_TOOL))
    ids = np.concatenate([ids for ids, _ in segments]).astype(np.int32)
    source = np.concatenate([[kind] * len(ids) for ids, kind in segments]).astype(np.int8)
    sampled = source == SOURCE_SAMPLED
    return Trajectory(
        task=task,
        group=0,
        sample=0,
        ids=ids,
        source=source,
        logp=np.where(sampled, -np.arange(len(ids)) / 3, 0).astype(np.float32),
        entropy=np.where(sampled, np.arange(len(ids)) / 7, 0).astype(np.float32),
        replies=tuple(replies),
        correct=correct,
        stop_reason=StopReason.FINISHED,
        turn_spans=tuple(spans),
        tool_seconds=0.0,
    )


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_row_says_what_happened_token_by_token(chat, tmp_path):
    trajectory = played(chat)
    Transcripts(tmp_path / "t.jsonl", chat).replace("rl", 7, [trajectory], [0.5])
    (row,) = read(tmp_path / "t.jsonl")
    tokens = row.pop("tokens")
    assert row == {
        "stage": "rl",
        "step": 7,
        "task_id": trajectory.task.id,
        "family": "chain",
        "difficulty": 1,
        "mode": "think",
        "correct": True,
        "reward": 0.5,
        "stop_reason": "finished",
    }
    assert "".join(token["text"] for token in tokens) == chat.decode(trajectory.ids.tolist())
    assert [token["source"] for token in tokens] == trajectory.source.tolist()
    assert {0, 1, 2} == {token["source"] for token in tokens}
    for name in ("logp", "entropy"):
        # Five decimals are written.
        np.testing.assert_allclose([token[name] for token in tokens], getattr(trajectory, name), atol=6e-6)


def steps_of(path):
    return [(row["stage"], row["step"], row["task_id"]) for row in read(path)]


def test_repeating_a_step_replaces_it_and_what_came_after(chat, tmp_path):
    """As after a resume from an earlier checkpoint."""
    file = Transcripts(tmp_path / "t.jsonl", chat)
    a, b = played(chat, seed="a"), played(chat, seed="b")
    for step in (10, 20, 30):
        file.replace("rl", step, [a], [1.0])
    file.replace("eval", 0, [b], [1.0])
    file.replace("rl", 20, [b, a], [1.0, 0.5])
    assert sorted(steps_of(tmp_path / "t.jsonl")) == sorted(
        [("rl", 10, a.task.id), ("eval", 0, b.task.id), ("rl", 20, b.task.id), ("rl", 20, a.task.id)]
    )
    again = Transcripts(tmp_path / "t.jsonl", chat)
    again.replace("rl", 5, [], [])
    assert steps_of(tmp_path / "t.jsonl") == [("eval", 0, b.task.id)]


def test_every_trajectory_needs_its_reward(chat, tmp_path):
    with pytest.raises(ValueError, match="zip"):
        Transcripts(tmp_path / "t.jsonl", chat).replace("rl", 1, [played(chat)], [])
    assert not (tmp_path / "t.jsonl").exists()


def test_a_crash_while_writing_keeps_the_old_file(chat, tmp_path, monkeypatch):
    file = Transcripts(tmp_path / "t.jsonl", chat)
    file.replace("rl", 1, [played(chat)], [1.0])
    before = (tmp_path / "t.jsonl").read_bytes()

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="disk full"):
        file.replace("rl", 2, [played(chat)], [1.0])
    assert (tmp_path / "t.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


def test_the_easiest_and_hardest_of_every_family_are_shown(chat):
    trajectories = [
        played(chat, family, k, seed)
        for family, k in [("hop", 3), ("hop", 1), ("set", 0), ("hop", 6), ("chain", 2)]
        for seed in "xy"
    ]
    shown = [(t.task.family, t.task.difficulty, t.task.id[-1]) for t in one_per_cell(trajectories)]
    assert sorted(shown) == [("chain", 2, "x"), ("hop", 1, "x"), ("hop", 6, "x"), ("set", 0, "x")]


def test_rewards_follow_mode_and_verdict(chat):
    table = RewardTable(correct_short=4.0, correct_long=3.0, wrong_long=-3.0, wrong_short=-4.0)
    cases = [(False, True), (True, True), (True, False), (False, False)]
    trajectories = [played(chat, think=think, correct=correct) for think, correct in cases]
    assert rewards_of(trajectories, table) == [4.0, 3.0, -3.0, -4.0]
