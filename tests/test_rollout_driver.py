"""The turn loop: a small random model, a chat format of word fragments, a scripted or real sampler."""

from __future__ import annotations

import sys
import time
from collections import defaultdict

import numpy as np
import pytest
import torch
from autotool_kernels import linear_logp_entropy
from autotool_kernels.results import SampledTokens
from transformers import Qwen3Config, Qwen3ForCausalLM

import autotool_fast.rollout.engine as engine_module
from autotool_fast.chat import SOURCE_PROMPT, SOURCE_SAMPLED, SOURCE_TOOL, parse_reply
from autotool_fast.errors import UserError
from autotool_fast.rollout.driver import RolloutLimits, rollout
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.rollout.late import LateEngine
from autotool_fast.rollout.records import StopReason
from autotool_fast.rollout.rng import row_seeds
from autotool_fast.tasks.record import Task

PIECES = [
    "<|im_end|>", "[think]\n", "[no_think]\n", "<think>\n", "\n</think>\n", "<tool_call>\n",
    '{"name": "f", "arguments": {}}', "\n</tool_call>", "<user>", "<assistant>", "<tool>", "a", "a", "b", "c",
    "d",
    *(f" w{i}" for i in range(14)),
]  # fmt: skip
END, THINK, NO_THINK, OPEN, CLOSE, CALL, JSON, CALLED, USER, ASSISTANT, TOOL, A, A_TWIN, B, C, D = range(16)
SHORT = [NO_THINK, CALL, JSON, CALLED, END]
LONG = [THINK, OPEN, A, B, C, CLOSE, CALL, JSON, CALLED, END]


class FakeChat:
    """Decodes ids 11 and 12 to the same text, so no encoder could give back what was sampled."""

    stop_ids = frozenset([END])

    def __init__(self):
        self.encoded = []

    def encode_prompt(self, messages, tools):
        return [USER, *(B for _ in messages[0]["content"]), ASSISTANT]

    def encode_mode(self, mode):
        return [THINK if mode == "think" else NO_THINK]

    def encode_continuation(self, messages):
        self.encoded.append(messages)
        return [TOOL, *(D for _ in messages[0]["content"]), ASSISTANT]

    def decode(self, ids):
        return "".join(PIECES[i] for i in ids)

    def parse(self, text):
        return parse_reply(text)


class FakeEpisode:
    """Over after `turns` replies; solved if every reply had a call. Tool results are `width` characters."""

    def __init__(self, turns, width, seconds):
        self.left, self.width, self.seconds = turns, width, seconds
        self.replies = []

    def step(self, reply):
        self.replies.append(reply)
        self.left -= 1
        time.sleep(self.seconds)
        return [{"role": "tool", "content": "x" * self.width}] if self.left else None

    def score(self):
        return all(reply.calls for reply in self.replies)


def make_task(turns=1, *, prompt=4, width=3, seconds=0.0, log=None):
    def start(task):
        episode = FakeEpisode(turns, width, seconds)
        if log is not None:
            log.append(episode)
        return episode

    messages = ({"role": "user", "content": "x" * prompt},)
    return Task(f"t{turns}-{prompt}", "fake", 0, (), messages, {}, "train", start)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(PIECES),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        max_position_embeddings=256,
    )
    return Qwen3ForCausalLM(config).eval()


def make_engine(model, slots=4, max_len=160, chunk=8):
    return SlotEngine(model, slots=slots, max_len=max_len, prefill_chunk=chunk)


@pytest.fixture
def script(monkeypatch):
    """Replaces the draw, not the model: `script(group, sample, tokens)` says what a row samples, in order."""
    queues = defaultdict(list)

    def sampler(logits, *, temperature, seed, offset):
        token = torch.tensor([queues[s].pop(0) for s in seed.tolist()])
        logp = logits.log_softmax(-1)
        return SampledTokens(token, logp.gather(1, token[:, None])[:, 0], -(logp.exp() * logp).sum(-1))

    monkeypatch.setattr(engine_module, "sample_logp_entropy", sampler)

    def write(group, sample, tokens):
        queues[int(row_seeds(0, 0, group, np.array([sample]))[0])] = list(tokens)

    return write


def run(engine, tasks, group_size=1, *, chat=None, limits=None, **kwargs):
    return rollout(
        engine,
        tasks,
        chat=chat or FakeChat(),
        group_size=group_size,
        seed=0,
        step=0,
        limits=limits or RolloutLimits(),
        **kwargs,
    )


def run_one(model, script, tokens, task, *, mode="auto", **limits):
    script(0, 0, tokens)
    return run(make_engine(model), [task], mode=mode, limits=RolloutLimits(**limits))[0]


def test_a_finished_episode_is_recorded_token_by_token(model, script):
    log = []
    trajectory = run_one(model, script, LONG + SHORT, make_task(2, log=log))
    prompt, tool = [USER, B, B, B, B, ASSISTANT], [TOOL, D, D, D, ASSISTANT]
    assert trajectory.ids.tolist() == prompt + LONG + tool + SHORT
    assert trajectory.ids.dtype == np.int32
    assert trajectory.source.tolist() == (
        [SOURCE_PROMPT] * 6 + [SOURCE_SAMPLED] * 10 + [SOURCE_TOOL] * 5 + [SOURCE_SAMPLED] * 5
    )
    assert trajectory.turn_spans == ((6, 16), (21, 26))
    assert trajectory.stop_reason is StopReason.FINISHED
    assert trajectory.correct
    assert [reply.mode for reply in trajectory.replies] == ["think", "no_think"]
    assert [reply.text for reply in trajectory.replies] == ["", ""]  # the stop token is not part of the text
    assert tuple(log[0].replies) == trajectory.replies
    assert (trajectory.n_prompt, trajectory.n_response_tokens, trajectory.n_think_tokens) == (6, 15, 3)
    assert (trajectory.length_class, trajectory.mode) == (0, "think")
    sampled = trajectory.source == SOURCE_SAMPLED
    assert (trajectory.logp[sampled] < 0).all()
    assert (trajectory.entropy[sampled] > 0).all()
    assert not trajectory.logp[~sampled].any()
    assert not trajectory.entropy[~sampled].any()


def test_a_finished_but_wrong_episode_is_not_correct(model, script):
    trajectory = run_one(model, script, [NO_THINK, A, END], make_task())
    assert (trajectory.stop_reason, trajectory.correct) == (StopReason.FINISHED, False)
    assert (trajectory.length_class, trajectory.mode) == (1, "no_think")


CUTS = {
    "turns": (SHORT * 2, 3, {"max_turns": 2}, StopReason.MAX_TURNS, 2, 2),
    "turn tokens": (LONG, 1, {"max_turn_tokens": 9}, StopReason.MAX_TURN_TOKENS, 1, 0),
    "episode tokens": (SHORT + LONG, 2, {"max_new_tokens": 14}, StopReason.MAX_TOKENS, 2, 1),
    "no token left": (SHORT, 2, {"max_new_tokens": 5}, StopReason.MAX_TOKENS, 1, 1),
    "calls": (SHORT * 2, 3, {"max_calls": 1}, StopReason.MAX_CALLS, 2, 1),
    "malformed": ([CALL, JSON, CALLED, END], 1, {}, StopReason.MALFORMED, 1, 0),
}


@pytest.mark.parametrize("name", list(CUTS))
def test_each_budget_stops_the_episode_with_its_reason(model, script, name):
    tokens, turns, limits, reason, replies, executed = CUTS[name]
    log = []
    trajectory = run_one(model, script, tokens, make_task(turns, log=log), **limits)
    assert trajectory.stop_reason is reason
    assert not trajectory.correct
    assert trajectory.length_class == -1
    assert len(trajectory.replies) == replies
    assert len(log[0].replies) == executed  # the reply that broke the budget did not run, earlier ones did
    assert trajectory.turn_spans[-1][1] == len(trajectory.ids) == len(trajectory.source)


def test_a_turn_may_use_its_budget_to_the_last_token(model, script):
    limits = {"max_turn_tokens": 5, "max_new_tokens": 5, "max_turns": 1, "max_calls": 1}
    assert run_one(model, script, SHORT, make_task(), **limits).stop_reason is StopReason.FINISHED


def test_a_tool_result_that_does_not_fit_stops_the_episode(model, script):
    trajectory = run_one(model, script, SHORT * 2, make_task(2, width=300))
    assert trajectory.stop_reason is StopReason.MAX_TOKENS
    assert trajectory.ids.tolist()[6:] == SHORT


def test_deadline_between_turns(model, script):
    trajectory = run_one(model, script, SHORT * 2, make_task(2, seconds=0.3), deadline_s=0.2)
    assert trajectory.stop_reason is StopReason.DEADLINE
    assert not trajectory.correct
    assert trajectory.tool_seconds >= 0.3
    assert trajectory.ids.tolist()[6:] == SHORT


def test_deadline_inside_a_turn_keeps_what_was_sampled(model, script):
    log = []
    trajectory = run_one(model, script, LONG, make_task(log=log), deadline_s=0.0)
    assert trajectory.stop_reason is StopReason.DEADLINE
    assert trajectory.ids.tolist()[6:] == LONG[: len(trajectory.ids) - 6]
    assert 1 <= len(trajectory.ids) - 6 < len(LONG)
    assert not log[0].replies


def test_slow_tools_of_one_episode_do_not_lose_the_others(model, script):
    script(0, 0, SHORT * 2)
    script(1, 0, SHORT)
    tasks = [make_task(2, seconds=0.01), make_task()]
    assert [t.stop_reason for t in run(make_engine(model), tasks)] == [StopReason.FINISHED] * 2


def test_slow_tools_count_against_the_deadline_of_their_own_episode_only(model, script):
    script(0, 0, SHORT * 2)
    script(1, 0, SHORT * 2)
    tasks = [make_task(2, seconds=0.6), make_task(2)]
    slow, other = run(make_engine(model), tasks, limits=RolloutLimits(deadline_s=0.5))
    assert (slow.stop_reason, other.stop_reason) == (StopReason.DEADLINE, StopReason.FINISHED)


@pytest.mark.parametrize(("mode", "tag"), [("think", THINK), ("no_think", NO_THINK)])
def test_a_forced_mode_opens_every_turn_and_is_not_sampled(model, script, mode, tag):
    body = LONG[1:] if mode == "think" else SHORT[1:]
    trajectory = run_one(model, script, body * 2, make_task(2), mode=mode)
    ids, source = trajectory.ids, trajectory.source
    assert [reply.mode for reply in trajectory.replies] == [mode] * 2
    assert not any(reply.errors for reply in trajectory.replies)
    for start, end in trajectory.turn_spans:
        assert (ids[start - 1], source[start - 1]) == (tag, SOURCE_PROMPT)
        assert ids[start:end].tolist() == body
    assert (trajectory.n_prompt, trajectory.n_forced_tokens) == (7, 2)
    assert trajectory.n_response_tokens == 2 * (len(body) + 1)
    assert trajectory.n_think_tokens == (6 if mode == "think" else 0)
    assert (source == SOURCE_TOOL).sum() == 5


def test_sampled_tokens_are_never_encoded_again(model, script):
    twin = [A_TWIN if token == A else token for token in LONG]
    fed = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: fed.extend(args[0].flatten().tolist())
    )
    chat = FakeChat()
    script(0, 0, twin + SHORT)
    trajectory = run(make_engine(model), [make_task(2)], chat=chat)[0]
    hook.remove()
    assert trajectory.ids[6:16].tolist() == twin
    assert A not in fed
    assert A_TWIN in fed
    assert chat.encoded == [[{"role": "tool", "content": "xxx"}]]  # never the assistant's message


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_more_episodes_than_slots_all_run_in_order(model, script, slots):
    tasks = [make_task(1 + group % 3, prompt=1 + 3 * group) for group in range(5)]
    for group in range(5):
        for sample in range(3):
            turns = 1 + group % 3
            script(group, sample, (LONG if sample == 1 else SHORT) * turns)
    seen = []
    trajectories = run(
        make_engine(model, slots), tasks, 3, on_progress=lambda done, total: seen.append((done, total))
    )
    assert [(t.group, t.sample) for t in trajectories] == [(g, s) for g in range(5) for s in range(3)]
    for trajectory in trajectories:
        assert trajectory.task is tasks[trajectory.group]
        assert trajectory.stop_reason is StopReason.FINISHED
        assert trajectory.length_class == (0 if trajectory.sample == 1 else 1)
        assert len(trajectory.turn_spans) == 1 + trajectory.group % 3
    assert seen[-1] == (15, 15)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def sampled_rollout(model, *, slots, chunk=8, group_size=4, tasks=None, seed=0, temperature=1.0, max_turns=6):
    tasks = tasks or [make_task(3, prompt=2), make_task(2, prompt=9), make_task(1, prompt=17)]
    return rollout(
        make_engine(model, slots, 160, chunk),
        tasks,
        chat=FakeChat(),
        group_size=group_size,
        seed=seed,
        step=0,
        mode="no_think",  # plain words are a well-formed reply then, so episodes get further turns
        temperature=temperature,
        limits=RolloutLimits(max_new_tokens=100, max_turn_tokens=60, max_turns=max_turns),
    )


def test_trajectories_do_not_depend_on_batch_layout(model):
    wide = sampled_rollout(model, slots=64)
    assert len({len(t.turn_spans) for t in wide}) > 1
    for slots, chunk in ((4, 8), (5, 2)):
        for one, other in zip(wide, sampled_rollout(model, slots=slots, chunk=chunk), strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            assert one.stop_reason is other.stop_reason
    alone = sampled_rollout(model, slots=4, group_size=1, tasks=[wide[0].task])
    assert alone[0].ids.tolist() == wide[0].ids.tolist()


def test_the_late_engine_plays_the_same_trajectories(model, monkeypatch):
    expected = sampled_rollout(model, slots=5)
    monkeypatch.setattr(sys.modules[__name__], "SlotEngine", LateEngine)
    for one, other in zip(sampled_rollout(model, slots=5), expected, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.source.tolist() == other.source.tolist()
        assert (one.stop_reason, one.turn_spans) == (other.stop_reason, other.turn_spans)


def test_a_deadline_with_the_late_engine_keeps_what_was_sampled(model):
    engine = LateEngine(model, slots=2, max_len=160, prefill_chunk=4)
    limits = RolloutLimits(deadline_s=0.0)
    for trajectory in run(engine, [make_task(prompt=20)], 5, mode="no_think", limits=limits):
        assert trajectory.stop_reason in (StopReason.DEADLINE, StopReason.MALFORMED)
        assert len(trajectory.ids) > trajectory.n_prompt > 20


def test_seed_changes_the_draws(model):
    one, other = (sampled_rollout(model, slots=16, seed=seed) for seed in (0, 1))
    assert all(a.ids.tolist() != b.ids.tolist() for a, b in zip(one, other, strict=True))


def test_recorded_statistics_are_the_trainers(model):
    trajectories = sampled_rollout(model, slots=5, temperature=0.8)
    assert max(len(t.turn_spans) for t in trajectories) > 1
    for trajectory in trajectories:
        ids = torch.from_numpy(trajectory.ids).long()
        with torch.no_grad():
            hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
            expected = linear_logp_entropy(hidden, model.lm_head.weight, ids[1:], temperature=0.8)
        rows = np.flatnonzero(trajectory.source == SOURCE_SAMPLED)
        # Rounding of float32 logits of size 5 in a different summation order; see test_rollout_engine.
        np.testing.assert_allclose(trajectory.logp[rows], expected.logp[rows - 1], atol=1e-5)
        np.testing.assert_allclose(trajectory.entropy[rows], expected.entropy[rows - 1], atol=1e-5)


def test_a_prompt_that_cannot_fit_is_refused_by_name(model):
    with pytest.raises(UserError, match=r"rollout\.max_new_tokens.*task t1-50.*model\.max_positions to 116"):
        run(make_engine(model, max_len=100), [make_task(prompt=50)], limits=RolloutLimits(max_new_tokens=64))


def test_limits_are_checked():
    with pytest.raises(UserError, match=r"rollout\.max_turns"):
        RolloutLimits(max_turns=0)


def test_think_tokens_of_markers_that_span_tokens():
    from autotool_fast.rollout.driver import _ThinkFinder

    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    find = _ThinkFinder(Letters())

    def thinking(text: str) -> str:
        start, end = find([ord(c) for c in text])
        return text[start:end]

    assert thinking("[think]<think>abcd</think>x") == "abcd"
    assert thinking("[think]<think>abcd") == "abcd"
    assert thinking("[think]<think></think>") == ""
    assert thinking("[no_think] abc") == ""
