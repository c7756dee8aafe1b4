"""Row seeds: which random stream a sampled sequence draws from.

A row's seed is a pure function of (run seed, step, group, sample); with the token's absolute position as the
counter offset it fixes every draw, whatever the batch it is decoded in. The counter-based generator itself is
the sampler's.
"""

from __future__ import annotations

import numpy as np

_INCREMENT = 0x9E3779B97F4A7C15


def _mix(state: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def row_seeds(seed: int, step: int, group: int, samples: np.ndarray) -> np.ndarray:
    """Seeds of several samples of one group.

    Args:
        seed, step, group: the run's seed, the training step and the group's index in the step.
        samples: [G] sample indices.

    Returns:
        int64 [G], all 64 bits in use.
    """
    state = np.zeros(len(samples), np.uint64)
    for word in (seed, step, group, samples):
        word = np.asarray(word).astype(np.int64).view(np.uint64)
        state = _mix((state ^ word) + np.uint64(_INCREMENT))
    return state.view(np.int64)
