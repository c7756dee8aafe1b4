"""Where tokens lie in a packed row and what attends to what; which sequences share a micro-batch."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from autotool_fast import distributed
from autotool_fast.packing import by_tokens, micro_batches, pack

# Eleven lengths that fall into two buckets, a repeated one, the shortest possible and one of a single token.
LENGTHS = [31, 3, 30, 29, 28, 30, 27, 26, 26, 2, 1]


def make_sequences(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 23, length).astype(np.int32) for length in lengths]


def make_groups(seed: int) -> tuple[list[np.ndarray], list[int]]:
    """Groups of different prompts and sizes, mixed; and the lengths of their prompts, some of them 0."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(5):
        shared = int(rng.integers(0, 12))
        prompt = np.r_[np.full(min(shared, 1), 100 + number), rng.integers(0, 23, max(shared - 1, 0))]
        for _ in range(int(rng.integers(1, 12))):
            found.append((np.concatenate([prompt, rng.integers(0, 23, int(rng.integers(1, 15)))]), shared))
    order = rng.permutation(len(found))
    return [found[i][0].astype(np.int32) for i in order], [found[i][1] for i in order]


def attended(batch) -> dict[str, list[list[int]]]:
    """For each row what it attends to, in order: by the plan for kernels, and by that for padded batches."""
    plan, kernel = batch.varlen, []
    stream = range(batch.tokens) if plan.kv_rows is None else plan.kv_rows.tolist()
    spans = (itertools.pairwise(cu.tolist()) for cu in (plan.cu_seqlens_q, plan.cu_seqlens_k))
    for (q, q_end), (k, k_end) in zip(*spans, strict=True):
        assert q_end - q <= plan.max_seqlen_q
        assert k_end - k <= plan.max_seqlen_k
        kernel += [list(stream[k : k_end - (q_end - row) + 1]) for row in range(q, q_end)]
    padded, flat = {}, []
    for bucket in batch.buckets.members:
        keys = bucket.queries if bucket.keys is None else bucket.keys
        for i, (queries, row_keys) in enumerate(zip(bucket.queries.tolist(), keys.tolist(), strict=True)):
            for j, query in enumerate(queries):
                flat.append(query)
                seen = row_keys[: j + 1]
                if bucket.mask is not None:
                    mask = bucket.mask[i if len(bucket.mask) > 1 else 0, 0, j].tolist()
                    seen = [key for key, visible in zip(row_keys, mask, strict=True) if visible]
                if query < batch.tokens:
                    assert query not in padded
                    padded[query] = seen
    assert [flat[at] for at in batch.buckets.order.tolist()] == list(range(batch.tokens))
    return {"kernel": kernel, "padded": [padded[row] for row in range(batch.tokens)]}


def test_the_layout_of_a_batch():
    sequences = make_sequences(LENGTHS)
    batch = pack(sequences)
    total = sum(LENGTHS)
    assert batch.tokens == total
    assert batch.longest == 31
    assert batch.ids.dtype == batch.rows.dtype == batch.positions.dtype == batch.buckets.order.dtype
    assert batch.ids.tolist() == [token for s in sequences for token in s.tolist()]
    assert batch.positions.tolist() == [j for n in LENGTHS for j in range(n)]
    assert batch.cu_seqlens.tolist() == batch.varlen.cu_seqlens_q.tolist() == [0, *itertools.accumulate(LENGTHS)]
    assert batch.rows.tolist() == list(range(total))
    assert str(batch.cu_seqlens.dtype) == str(batch.varlen.cu_seqlens_k.dtype) == "torch.int32"
    assert batch.varlen.kv_rows is None
    assert (batch.varlen.max_seqlen_q, batch.varlen.max_seqlen_k) == (31, 31)
    assert len(batch.buckets.members) > 1
    assert all(bucket.mask is None for bucket in batch.buckets.members)
    starts = np.repeat(np.cumsum([0, *LENGTHS[:-1]]), LENGTHS)
    wanted = [list(range(start, row + 1)) for row, start in enumerate(starts)]
    assert attended(batch) == {"kernel": wanted, "padded": wanted}


@pytest.mark.parametrize("seed", range(8))
def test_sequences_of_a_group_share_their_prompts_rows_and_nothing_else(seed):
    sequences, prompts = make_groups(seed)
    batch = pack(sequences, prompts=prompts)
    distinct = {tuple(s[:n].tolist()): n for s, n in zip(sequences, prompts, strict=True)}
    assert batch.tokens == sum(distinct.values()) + sum(len(s) - n for s, n in zip(sequences, prompts, strict=True))
    assert batch.longest == max(map(len, sequences))
    assert batch.ids[batch.rows].tolist() == np.concatenate(sequences).tolist()
    assert batch.positions[batch.rows].tolist() == [j for s in sequences for j in range(len(s))]
    assert batch.cu_seqlens.tolist() == [0, *itertools.accumulate(map(len, sequences))]
    seen = attended(batch)
    for begin, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        rows = batch.rows[begin:end].tolist()
        for j, row in enumerate(rows):
            assert seen["kernel"][row] == rows[: j + 1]
            # A padded plan may show a query that is not there anything, but what is there its own prefix alone.
            assert seen["padded"][row] == rows[: j + 1]


def test_sequences_that_begin_alike_but_shorter_do_not_share_more_than_they_may():
    same = np.arange(6)
    batch = pack([same, same], prompts=[4, 4])
    assert batch.ids.tolist() == [0, 1, 2, 3, 4, 5, 4, 5]
    assert batch.rows.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7]
    assert pack([same, same], prompts=[4, 3]).tokens == 12
    assert pack([same, same], prompts=[0, 0]).tokens == 12


def test_buckets_keep_padding_low():
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 200, 100)
    batch = pack(make_sequences(lengths.tolist()))
    cells = sum(bucket.queries.numel() for bucket in batch.buckets.members)
    # Lengths in a bucket are at least 0.8 of its longest, but for a last bucket of the eight shortest.
    assert cells < lengths.sum() / 0.8 + 8 * lengths.max()
    assert all(len(bucket.queries) >= 8 for bucket in batch.buckets.members[:-1])


def test_responses_to_long_and_to_short_prompts_are_not_padded_together():
    rng = np.random.default_rng(0)
    prompts = [n for n in (20, 200, 1000) for _ in range(8)]
    sequences = [np.r_[np.full(n, n), rng.integers(0, 9, rng.integers(10, 30))] for n in prompts]
    batch = pack(sequences, prompts=prompts)
    cells = sum(bucket.keys.numel() for bucket in batch.buckets.members if bucket.keys is not None)
    assert cells <= 1.25 * sum(map(len, sequences))


@pytest.mark.parametrize("sequences", [[], [np.zeros(0, np.int32)], [np.ones(2, np.int32), np.zeros(0, np.int32)]])
def test_an_empty_sequence_cannot_be_packed(sequences):
    with pytest.raises((AssertionError, ValueError)):
        pack(sequences)


def test_a_sequence_that_is_all_prompt_cannot_be_packed():
    with pytest.raises(AssertionError, match="of its own"):
        pack([np.arange(3), np.arange(4)], prompts=[3, 3])


# Micro-batches


@pytest.mark.parametrize("budget", [1, 7, 10, 1000])
def test_groups_keep_to_the_budget_and_lose_nothing(budget):
    lengths = [3, 9, 1, 4, 4, 12, 2, 2]
    groups = by_tokens(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= budget
    ordered = [lengths[i] for group in groups for i in group]
    assert ordered == sorted(lengths, reverse=True)
    assert micro_batches(lengths, budget) == groups
    assert by_tokens([], budget) == []


def rows_of(part, lengths, prompts, groups) -> int:
    """Tokens that a micro-batch lays down."""
    return sum({groups[i]: prompts[i] for i in part}.values()) + sum(lengths[i] - prompts[i] for i in part)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1, 30, 60, 200, 10_000])
def test_micro_batches_of_groups_lose_nothing_and_keep_to_the_budget(monkeypatch, world, budget):
    rng = np.random.default_rng(budget + world)
    groups = [g for g in range(5) for _ in range(4)]
    prompts = [int(n) for n in rng.integers(3, 20, 5) for _ in range(4)]
    lengths = [n + int(rng.integers(1, 15)) for n in prompts]
    monkeypatch.setattr(distributed, "world", lambda: world)
    found = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append(micro_batches(lengths, budget, prompts=prompts, groups=groups))
    assert len(set(map(len, found))) == 1
    parts = [part for parts in found for part in parts if part]
    assert sorted(i for part in parts for i in part) == list(range(20))
    for part in parts:
        assert len(part) == 1 or rows_of(part, lengths, prompts, groups) <= budget
    loads = [sum(rows_of(p, lengths, prompts, groups) for p in parts if p) for parts in found]
    if budget == 10_000 and world <= 3:
        assert max(loads) <= 1.5 * min(loads)


def test_a_group_stays_together_and_its_prompt_counts_once():
    # Two groups of three: 10 + 3 * 2 = 16 rows each; apart, a sequence takes 12.
    lengths, prompts, groups = [12] * 6, [10] * 6, [0, 1, 0, 1, 0, 1]
    for budget, wanted in ((16, [[0, 2, 4], [1, 3, 5]]), (31, [[0, 2, 4], [1, 3, 5]]), (32, [[0, 2, 4, 1, 3, 5]])):
        assert micro_batches(lengths, budget, prompts=prompts, groups=groups) == wanted
    assert micro_batches(lengths, 15, prompts=prompts, groups=groups) == [[2, 4], [3, 5], [0], [1]]
    assert micro_batches(lengths, 36) == [[0, 1, 2], [3, 4, 5]]


def test_a_group_beyond_a_ranks_fair_share_is_cut(monkeypatch):
    """10 + 8 * 5 = 50 rows for two ranks: twice 10 + 4 * 5 in place of 50 and nothing."""
    monkeypatch.setattr(distributed, "world", lambda: 2)
    found = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append(micro_batches([15] * 8, 1000, prompts=[10] * 8, groups=[0] * 8))
    assert [[len(part) for part in parts] for parts in found] == [[4], [4]]


def test_work_is_dealt_evenly_to_the_ranks(monkeypatch):
    generator = random.Random(0)
    lengths = [generator.randint(100, 1000) for _ in range(24)]
    monkeypatch.setattr(distributed, "world", lambda: 8)
    shares = distributed.deal(lengths)
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert sorted(i for share in shares for i in share) == list(range(24))
    # Dealt always in one direction, the first rank would get nearly one length more than the last.
    assert max(loads) - min(loads) <= 0.5 * max(lengths)
