"""What the ops return: plain named tuples, so that callers can unpack them or use the names."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogpEntropy(NamedTuple):
    """Per-row statistics of a categorical distribution, in nats."""

    logp: Tensor  # [N] log-probability of the target, <= 0
    entropy: Tensor  # [N] entropy over the whole vocabulary, >= 0


class PolicyLoss(NamedTuple):
    """Clipped policy-gradient loss with the gated entropy terms."""

    loss: Tensor  # [] carries the gradient to logp and entropy
    sequence_entropy: Tensor  # [B] mean entropy of each sequence's trained tokens, detached; 0 where it has none
    metrics: dict[str, Tensor]  # 0-d, detached; names in `policy.METRICS`


class SampledTokens(NamedTuple):
    """One sampled token per row and its statistics under the sampling distribution, in nats."""

    token: Tensor  # [B] int64
    logp: Tensor  # [B]
    entropy: Tensor  # [B]


class ChunkedStep(NamedTuple):
    """Loss of a packed batch whose gradients are already computed, and its per-token statistics."""

    loss: Tensor  # [] sum of the chunks' losses; its backward only scales the gradients
    logp: Tensor  # [N] detached
    entropy: Tensor  # [N] detached
