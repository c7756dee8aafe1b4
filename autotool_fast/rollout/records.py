"""What an engine tells of a row, and what a rollout returns: one `Trajectory` per sample, and why it stopped.

Token ids are kept exactly as the model saw and sampled them; each carries its source (see `chat`). Rewards,
losses and metrics are computed elsewhere from these records.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from autotool_fast.chat import SOURCE_SAMPLED, ParsedReply
from autotool_fast.tasks.record import Task


@dataclass(frozen=True)
class Row:
    """Views of one row's T tokens, valid until the next engine call: ids int64, logp and entropy float32."""

    ids: np.ndarray
    logp: np.ndarray
    entropy: np.ndarray


class StopReason(str, Enum):
    """Why an episode ended. All but FINISHED count as not solved."""

    FINISHED = "finished"
    """The task said that the episode is over."""
    MAX_TURNS = "max_turns"
    """The task wanted another turn than the budget allows."""
    MAX_TOKENS = "max_tokens"
    """The episode's token budget, or its slot, was full before a turn ended."""
    MAX_TURN_TOKENS = "max_turn_tokens"
    """A turn reached its token budget without a stop token."""
    MAX_CALLS = "max_calls"
    """A reply asked for more tool calls than were left; none of its calls ran."""
    DEADLINE = "deadline"
    """The episode's wall-clock limit passed."""
    MALFORMED = "malformed"
    """A reply could not be parsed; none of its calls ran."""


OUT_OF_BUDGET = frozenset(StopReason) - {StopReason.FINISHED, StopReason.MALFORMED}
"""Ends that a limit brought about, not the model."""


@dataclass(frozen=True)
class Trajectory:
    """One sampled episode of T tokens.

    Attributes:
        task: the task it tried.
        group: index of the task in the rollout, shared by its samples.
        sample: index in the group.
        ids: int32 [T] token ids, prompt first.
        source: int8 [T] SOURCE_PROMPT, SOURCE_SAMPLED or SOURCE_TOOL; forced mode tags count as prompt.
        logp: float32 [T] log-prob of each sampled token under the sampling distribution, nats; else 0.
        entropy: float32 [T] entropy of the distribution each sampled token was drawn from, nats; else 0.
        replies: the parsed assistant turns; a turn that was cut is parsed as far as it got.
        correct: the task's verdict; False unless the episode finished.
        stop_reason: why it ended.
        turn_spans: (start, end) of each turn's sampled tokens in `ids`, the stop token included.
        tool_seconds: time spent in the task's own code.
        n_forced_tokens: tokens of forced mode tags, over all turns.
        think_spans: (start, end) in `ids` of the tokens inside each think block, the markers left out.
    """

    task: Task
    group: int
    sample: int
    ids: np.ndarray
    source: np.ndarray
    logp: np.ndarray = field(repr=False)
    entropy: np.ndarray = field(repr=False)
    replies: tuple[ParsedReply, ...]
    correct: bool
    stop_reason: StopReason
    turn_spans: tuple[tuple[int, int], ...]
    tool_seconds: float
    n_forced_tokens: int = 0
    think_spans: tuple[tuple[int, int], ...] = ()

    @property
    def n_prompt(self) -> int:
        """Tokens before the first sampled one, a forced tag included."""
        return self.turn_spans[0][0]

    @property
    def n_response_tokens(self) -> int:
        """Tokens of the assistant's turns: sampled ones and forced tags."""
        return int((self.source == SOURCE_SAMPLED).sum()) + self.n_forced_tokens

    @property
    def n_think_tokens(self) -> int:
        """Tokens inside think blocks."""
        return sum(end - start for start, end in self.think_spans)

    @property
    def length_class(self) -> int:
        """1 if every reply is short, 0 if any is long, -1 if one is malformed or the episode was cut."""
        classes = [reply.length_class for reply in self.replies]
        if self.stop_reason is not StopReason.FINISHED or -1 in classes:
            return -1
        return min(classes)

    @property
    def mode(self) -> str | None:
        """Tag of the episode: "think" if any reply has it, "no_think" if all have that, else None."""
        modes = {reply.mode for reply in self.replies}
        if "think" in modes:
            return "think"
        return "no_think" if modes == {"no_think"} else None
