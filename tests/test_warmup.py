"""Supervised fine-tuning: which tokens are learnt, and that micro-batches change nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from autotool_kernels.results import SampledTokens
from transformers import Qwen3Config, Qwen3ForCausalLM

import autotool_fast.rollout.engine as engine_module
from autotool_fast.chat import SOURCE_PROMPT, SOURCE_SAMPLED, SOURCE_TOOL, ChatFormat, parse_reply
from autotool_fast.rollout.driver import rollout
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.rollout.records import StopReason, Trajectory
from autotool_fast.tasks.rendering import solution
from autotool_fast.tasks.tiny import build_tokenizer
from autotool_fast.tasks.world import World
from autotool_fast.warmup import Demonstration, demonstrate, imitate, sft_backward

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(build_tokenizer())


@pytest.fixture(scope="module")
def tasks():
    return World().grid(2, "train", "warm")


@pytest.fixture(scope="module")
def model(chat):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(chat.tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).double()


# Demonstrations


@pytest.mark.parametrize("think", [False, True])
def test_a_demonstration_trains_the_replies_and_their_stop_tokens_alone(chat, tasks, think):
    for task in tasks:
        replies = solution(task, think=think)
        demo = demonstrate(task, replies, chat)
        assert demo.ids.dtype == np.int32
        assert demo.trained.dtype == bool
        assert demo.ids.shape == demo.trained.shape
        trained = chat.decode(demo.ids[demo.trained].tolist())
        assert trained == "".join(reply + chat.stop for reply in replies), task.id
        assert not demo.trained[: len(chat.encode_prompt(list(task.messages), list(task.tools)))].any()
        assert demo.ids[-1] in chat.stop_ids


def test_a_demonstration_is_the_conversation_the_episode_leads_to(chat, tasks):
    for task in tasks:
        replies, messages, episode = solution(task, think=True), list(task.messages), task.episode()
        for reply in replies:
            messages.append({"role": "assistant", "content": reply})
            messages += episode.step(parse_reply(reply)) or []
        text = chat.decode(demonstrate(task, replies, chat).ids.tolist())
        assert text + "\n" == chat.render(messages, list(task.tools), generate=False)


def test_a_demonstration_ends_with_its_last_reply(chat):
    task = World().task("chain", 3, "train", "cut")
    for count in (1, 2, 3):
        demo = demonstrate(task, solution(task, think=False)[:count], chat)
        assert (
            sum(int(token in chat.stop_ids) and bool(t) for token, t in zip(demo.ids, demo.trained, strict=True))
            == count
        )
        assert demo.trained[-1]


# Sampled trajectories


def sampled(chat, tasks, model, monkeypatch, mode) -> list[Trajectory]:
    """Perfect replies, sampled through the engine."""
    from autotool_fast.rollout.rng import row_seeds

    script = {}
    for group, task in enumerate(tasks):
        tokens = []
        for reply in solution(task, think=mode != "no_think"):
            tokens += chat.encode_text((reply if mode == "auto" else reply.removeprefix(f"[{mode}]\n")) + chat.stop)
        script[int(row_seeds(0, 0, group, np.array([0]))[0])] = tokens

    def sampler(logits, *, temperature, seed, offset):
        token = torch.tensor([script[row].pop(0) for row in seed.tolist()])
        return SampledTokens(token, -torch.ones(len(token)), torch.ones(len(token)))

    monkeypatch.setattr(engine_module, "sample_logp_entropy", sampler)
    engine = SlotEngine(copy.deepcopy(model).float(), slots=8, max_len=256)
    return rollout(engine, tasks, chat=chat, group_size=1, seed=0, step=0, mode=mode)


@pytest.mark.parametrize("mode", ["auto", "think", "no_think"])
def test_imitating_a_perfect_sample_is_its_demonstration_forced_tags_included(chat, model, monkeypatch, mode):
    tasks = World().grid(1, "train", "imitate")
    for task, trajectory in zip(tasks, sampled(chat, tasks, model, monkeypatch, mode), strict=True):
        before = trajectory.source.copy()
        demo = imitate(trajectory, chat)
        wanted = demonstrate(task, solution(task, think=mode != "no_think"), chat)
        assert demo.ids.tolist() == wanted.ids.tolist(), task.id
        assert demo.trained.tolist() == wanted.trained.tolist(), task.id
        assert (trajectory.source == before).all()


def test_prompt_and_tool_tokens_are_never_imitated(chat):
    """Not even those that read like a mode tag, unless they are the forced tag just before a turn."""
    tag = chat.encode_mode("no_think")
    assert len(tag) == 1
    header, stop, other = chat.encode_text("<|im_start|>assistant\n"), *chat.stop_ids, chat.encode_text("a")[0]
    #      prompt with a tag in it   forced  sampled        tool with a tag in it     forced  sampled
    ids = [other, *tag, *header, *tag, other, stop, *tag, other, *header, *tag, *tag, stop]
    P, S, T = SOURCE_PROMPT, SOURCE_SAMPLED, SOURCE_TOOL
    source = [P, P, P, P, S, S, T, T, T, P, S, S]
    reply = parse_reply("[no_think]\na")
    trajectory = Trajectory(
        task=World().task("set", 0, "train", "x"),
        group=0,
        sample=0,
        ids=np.array(ids, np.int32),
        source=np.array(source, np.int8),
        logp=np.zeros(12, np.float32),
        entropy=np.zeros(12, np.float32),
        replies=(reply, reply),
        correct=True,
        stop_reason=StopReason.FINISHED,
        turn_spans=((4, 6), (10, 12)),
        tool_seconds=0.0,
    )
    assert imitate(trajectory, chat).trained.astype(int).tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]


# The loss


def reference(model, demos) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean over all trained tokens of the batch, from the model's own logits."""
    model.zero_grad()
    losses = []
    for demo in demos:
        ids = torch.from_numpy(demo.ids.astype(np.int64))
        logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        losses.append(-logp.gather(-1, ids[1:, None])[:, 0][torch.from_numpy(demo.trained)[1:]])
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


# From one sequence per micro-batch to all in one.
@pytest.mark.parametrize("micro_tokens", [1, 60, 200, 8192])
def test_micro_batches_do_not_change_loss_or_gradient(chat, tasks, model, micro_tokens):
    demos = [demonstrate(task, solution(task, think=i % 2 == 0), chat) for i, task in enumerate(tasks[::4])]
    loss, wanted = reference(model, demos)
    model.zero_grad()
    assert sft_backward(model, demos, micro_tokens=micro_tokens) == pytest.approx(loss, rel=1e-12)
    for name, p in model.named_parameters():
        # float64 sums of some hundred tokens in another order
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-9, atol=1e-12, msg=name)


def test_gradients_accumulate_over_calls(chat, tasks, model):
    demos = [demonstrate(task, solution(task, think=False), chat) for task in tasks[:3]]
    _, once = reference(model, demos)
    model.zero_grad()
    for _ in range(2):
        sft_backward(model, demos)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name], rtol=1e-9, atol=1e-12)


def test_a_batch_without_trained_tokens_is_an_error(model):
    with pytest.raises(AssertionError, match="trained"):
        sft_backward(model, [Demonstration(np.array([1, 2, 3], np.int32), np.zeros(3, bool))])


def test_training_on_a_demonstration_teaches_it(chat, model):
    """A few steps make the trained tokens likely: sign and target of the loss are right."""
    model = copy.deepcopy(model)
    task = World().task("set", 0, "train", "learn")
    demo = demonstrate(task, solution(task, think=False), chat)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(sft_backward(model, [demo]))
        optimizer.step()
    assert losses[0] > 4  # log of the vocabulary's size is 4.6 nats
    assert losses[-1] < 1
