"""Supervised fine-tuning of stage 1: demonstrations and their loss.

A demonstration is a token sequence with the tokens to learn marked: replies written by a teacher, or a sampled
trajectory taken over id by id. Used by base training, warm-up and the always-think baseline, which differ only in the
demonstrations they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from autotool_fast import distributed
from autotool_fast.chat import SOURCE_SAMPLED, SYNTAXES, ChatFormat, parse_reply
from autotool_fast.metrics import phase
from autotool_fast.packing import micro_batches, pack
from autotool_fast.policy import PolicyModule, packed_logp_entropy
from autotool_fast.rollout.records import Trajectory
from autotool_fast.tasks.record import Task


@dataclass(frozen=True)
class Demonstration:
    """One sequence to imitate: `ids` int32 [T], `trained` bool [T] marks the tokens that enter the loss."""

    ids: np.ndarray
    trained: np.ndarray


def demonstrate(task: Task, replies: Sequence[str], chat: ChatFormat) -> Demonstration:
    """Play `replies` (text of the default syntax, one per assistant turn) through an episode.

    Reply tokens and stop tokens are trained.
    """
    ids = chat.encode_prompt(list(task.messages), list(task.tools))
    trained = [False] * len(ids)
    episode = task.episode()
    for number, reply in enumerate(replies, 1):
        parsed = parse_reply(reply)
        if chat.wire.syntax != SYNTAXES[0]:
            think = None if parsed.think is None else parsed.think.strip("\n")
            reply = chat.write_reply(think, parsed.calls, parsed.text)
        turn = [*chat.encode_reply(reply), chat.stop_id]
        ids += turn
        trained += [True] * len(turn)
        messages = episode.step(parsed) if number < len(replies) else None
        if messages is None:
            break
        continuation = chat.encode_continuation(messages)
        ids += continuation
        trained += [False] * len(continuation)
    return Demonstration(np.asarray(ids, np.int32), np.asarray(trained))


def imitate(trajectory: Trajectory, chat: ChatFormat) -> Demonstration:
    """A sampled trajectory as a demonstration; forced mode tags are trained too, or no mode would be learnt."""
    trained = trajectory.source == SOURCE_SAMPLED
    for (start, _), reply in zip(trajectory.turn_spans, trajectory.replies, strict=True):
        tag = chat.encode_mode(reply.mode) if reply.mode else []
        if tag and trajectory.ids[start - len(tag) : start].tolist() == tag:
            trained[start - len(tag) : start] = True
    return Demonstration(trajectory.ids, trained)


def sft_backward(
    model: PreTrainedModel | PolicyModule,
    batch: Sequence[Demonstration],
    *,
    micro_tokens: int = 8192,
    attention: str = "auto",
    backend: str = "auto",
) -> float:
    """Accumulate the gradient of the mean negative log-prob over all trained tokens of `batch`; returns it, in nats.

    Micro-batches of at most `micro_tokens` tokens (or one sequence) do not change the result: each is weighted by the
    batch's token count. In several processes each computes its share of `batch`, which is the same on all of them.
    """
    total = sum(int(demo.trained.sum()) for demo in batch)
    assert total, "a batch has at least one trained token"
    loss_sum = 0.0
    for part in micro_batches([len(demo.ids) for demo in batch], micro_tokens):
        if not part:
            idle_backward(model, attention)
            continue
        demos = [batch[i] for i in part]
        trained = torch.from_numpy(np.concatenate([demo.trained for demo in demos]))
        packed = pack([demo.ids for demo in demos], model.device, attention=attention)
        with phase("logprob"):
            logp = packed_logp_entropy(model, packed, trained, backend=backend).logp
        with phase("loss"):
            loss = -logp.sum() / total
        with phase("backward"):
            loss.backward()
        loss_sum += loss.item()
    return sum(distributed.gather(loss_sum))


def idle_backward(policy: PolicyModule, attention: str = "auto") -> None:
    """Take part in the other ranks' forward and backward pass without adding to the gradient."""
    two_tokens = pack([np.zeros(2, np.int64)], policy.device, attention=attention)
    logp, entropy = policy(two_tokens, torch.tensor([False, True]))
    (0.0 * (logp.sum() + entropy.sum())).backward()
