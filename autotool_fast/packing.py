"""How sequences become micro-batches, and a micro-batch one row of tokens without padding.

What several sequences begin with (the prompt of a GRPO group) can be laid down once: the row then holds the prompt,
followed by what each of them has behind it. Planned here, on the host: which sequences go together, where each token
lies, and what each stretch of the row attends to. Attention itself is left to `attention`, the model to `policy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from autotool_fast import distributed


@dataclass(frozen=True)
class Varlen:
    """What variable-length attention kernels are told: segment i of the queries attends to segment i of the keys,
    aligned at their ends.

    Attributes:
        kv_rows: row whose key and value is next in the stream of keys, int64 [K]; None: the rows as they are.
        cu_seqlens_q: segment boundaries in the row, int32 [S + 1].
        cu_seqlens_k: the same in the stream of keys.
        max_seqlen_q: longest segment, on the host.
        max_seqlen_k: the same of the keys.
    """

    kv_rows: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Bucket:
    """B segments of similar size, padded.

    Attributes:
        queries: row of each query, or T past the end of its segment, int64 [B, L].
        keys: the same of each key, int64 [B, K]; None where keys and queries are the same rows.
        mask: which keys a query attends to, bool [1 or B, 1, L, K]; None for causal attention.
    """

    queries: torch.Tensor
    keys: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class Buckets:
    """All segments in padded form; `order` int64 [T] says where packed row t lies in their flattened queries."""

    members: tuple[Bucket, ...]
    order: torch.Tensor


@dataclass(frozen=True)
class Segments:
    """S stretches of the packed row, end to end, each attending causally to itself and before that to a shared prompt.

    Attributes:
        lengths: tokens of each, int64 [S], on the host.
        prompt_starts: row at which its shared prompt begins, int64 [S].
        prompt_lengths: tokens of that prompt, 0 for none, int64 [S].
    """

    lengths: np.ndarray
    prompt_starts: np.ndarray
    prompt_lengths: np.ndarray

    @property
    def boundaries(self) -> np.ndarray:
        """Where each begins, and the end; int64 [S + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)])


@dataclass(frozen=True)
class PackedBatch:
    """Sequences of N tokens in all, laid down as T <= N rows.

    Attributes:
        ids: token id of each row, int64 [T].
        positions: position of each row in its sequence, int64 [T].
        cu_seqlens: boundaries of the sequences laid end to end, int32 [sequences + 1].
        rows: row of each token of the sequences laid end to end, int64 [N]; tokens of a shared prompt have the same.
        segments: what attends to what.
        attention: the setting `model.attention`.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    segments: Segments
    attention: str = "auto"

    @property
    def tokens(self) -> int:
        """Number of rows T."""
        return self.ids.numel()

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int((self.segments.lengths + self.segments.prompt_lengths).max())

    @cached_property
    def varlen(self) -> Varlen:
        """The segments for variable-length attention kernels."""
        s, device = self.segments, self.ids.device
        key_lengths = s.prompt_lengths + s.lengths
        boundaries_k = np.concatenate([[0], np.cumsum(key_lengths)])
        kv_rows = None
        if s.prompt_lengths.any():
            column = np.arange(boundaries_k[-1]) - np.repeat(boundaries_k[:-1], key_lengths)
            kv_rows = torch.from_numpy(_key_rows(s, np.repeat(np.arange(len(s.lengths)), key_lengths), column))
            kv_rows = kv_rows.to(device)
        return Varlen(
            kv_rows=kv_rows,
            cu_seqlens_q=torch.from_numpy(s.boundaries.astype(np.int32)).to(device),
            cu_seqlens_k=torch.from_numpy(boundaries_k.astype(np.int32)).to(device),
            max_seqlen_q=int(s.lengths.max()),
            max_seqlen_k=int(key_lengths.max()),
        )

    @cached_property
    def buckets(self) -> Buckets:
        """The segments for attention over padded batches."""
        s, device, total = self.segments, self.ids.device, self.tokens
        starts = s.boundaries
        members, order, offset = [], np.empty(total, dtype=np.int64), 0
        for chosen in _similar(s):
            lengths, prompts = s.lengths[chosen], s.prompt_lengths[chosen]
            column = np.arange(lengths.max())
            inside = column < lengths[:, None]
            queries = np.where(inside, starts[chosen, None] + column, total)
            order[queries[inside]] = offset + np.flatnonzero(inside)
            offset += queries.size
            keys = mask = None
            if prompts.any():
                key = np.arange((prompts + lengths).max())
                keys = np.where(key < (prompts + lengths)[:, None], _key_rows(s, chosen[:, None], key), total)
                first = prompts[:1] if (prompts == prompts[0]).all() else prompts
                mask = torch.from_numpy(key <= first[:, None, None, None] + column[:, None]).to(device)
                keys = torch.from_numpy(keys).to(device)
            members.append(Bucket(torch.from_numpy(queries).to(device), keys, mask))
        return Buckets(tuple(members), torch.from_numpy(order).to(device))


def _key_rows(s: Segments, segment: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Row of the `column`-th key of a segment: of its prompt first, then of the segment."""
    behind = column - s.prompt_lengths[segment]
    return np.where(behind < 0, s.prompt_starts[segment] + column, s.boundaries[segment] + behind)


def pack(
    sequences: Sequence[np.ndarray],
    device: torch.device | str = "cpu",
    *,
    prompts: Sequence[int] | None = None,
    attention: str = "auto",
) -> PackedBatch:
    """Lay token id arrays (each [T_i], T_i >= 1) down, tensors on `device`.

    Args:
        prompts: how many leading tokens of each may be shared, fewer than it has; sequences whose leading tokens are
            the same share them. None: every sequence is a stretch of its own.
        attention: the setting `model.attention`.
    """
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    assert lengths.size > 0 and lengths.min() > 0, "a sequence has at least one token"  # noqa: PT018
    families: dict[object, list[int]] = {}
    for i, sequence in enumerate(sequences):
        shared = 0 if prompts is None else prompts[i]
        assert shared < lengths[i], "a sequence has tokens of its own"
        key = np.asarray(sequence[:shared], np.int64).tobytes() if shared else i
        families.setdefault(key, []).append(i)
    pieces, positions, segments = [], [], []
    rows: list[np.ndarray] = [np.empty(0, np.int64)] * len(sequences)
    end = 0

    def lay(ids: np.ndarray, prompt: tuple[int, int]) -> np.ndarray:
        nonlocal end
        pieces.append(ids)
        positions.append(prompt[1] + np.arange(len(ids)))
        segments.append((len(ids), *prompt))
        end += len(ids)
        return np.arange(end - len(ids), end)

    for family in families.values():
        shared = prompts[family[0]] if prompts is not None and len(family) > 1 else 0
        begin = lay(sequences[family[0]][:shared], (0, 0)) if shared else np.empty(0, np.int64)
        for i in family:
            prompt = (int(begin[0]), shared) if shared else (0, 0)
            rows[i] = np.concatenate([begin, lay(sequences[i][shared:], prompt)])
    return PackedBatch(
        ids=torch.from_numpy(np.concatenate(pieces).astype(np.int64)).to(device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device),
        rows=torch.from_numpy(np.concatenate(rows)).to(device),
        segments=Segments(*np.array(segments, dtype=np.int64).T),
        attention=attention,
    )


def _similar(s: Segments) -> list[np.ndarray]:
    """Segment numbers grouped for padding, those with and without a prompt apart: by its length, then by their own."""
    groups = []
    for chosen in (np.flatnonzero(s.prompt_lengths == 0), np.flatnonzero(s.prompt_lengths)):
        if chosen.size:
            for near in _length_buckets(s.prompt_lengths[chosen]):
                groups += [chosen[near[some]] for some in _length_buckets(s.lengths[chosen[near]])]
    return groups


def _length_buckets(lengths: np.ndarray, ratio: float = 0.8, smallest: int = 8) -> list[np.ndarray]:
    """Sequence numbers grouped so that, within a bucket of more than `smallest`, lengths differ by `ratio` at most."""
    descending = np.argsort(-lengths, kind="stable")
    cuts, first = [], 0
    for i in range(1, len(descending)):
        if i - first >= smallest and lengths[descending[i]] < ratio * lengths[descending[first]]:
            cuts.append(i)
            first = i
    return np.split(descending, cuts)


def micro_batches(
    lengths: Sequence[int], budget: int, *, prompts: Sequence[int] | None = None, groups: Sequence[int] | None = None
) -> list[list[int]]:
    """Which sequences this rank trains on together; as many micro-batches on every rank, empty where a rank has fewer.

    An empty one is `warmup.idle_backward`'s. Members of a group stay together, unless they exceed the budget or a
    rank's fair share; their prompt counts once for each part.

    Args:
        lengths: tokens of each sequence.
        budget: most tokens of a micro-batch that is not a single sequence.
        prompts: how many leading tokens each shares with its group; None: none.
        groups: the group of each, needed with `prompts`.
    """
    families: dict[object, list[int]] = {}
    for i in range(len(lengths)):
        families.setdefault(groups[i] if prompts is not None and groups is not None else (i,), []).append(i)

    def cost(members: Sequence[int]) -> int:
        shared = 0 if prompts is None else prompts[members[0]]
        return shared + sum(lengths[i] - shared for i in members)

    fair = -(-sum(map(cost, families.values())) // distributed.world())
    units = [part for members in families.values() for part in _cut(members, lengths, cost, budget, fair)]
    costs = [cost(unit) for unit in units]
    ranks = []
    for share in distributed.deal(costs):
        parts = by_tokens([costs[u] for u in share], budget)
        ranks.append([[i for u in part for i in units[share[u]]] for part in parts])
    mine = ranks[distributed.rank()]
    return mine + [[]] * (max(map(len, ranks)) - len(mine))


def _cut(
    members: list[int], lengths: Sequence[int], cost: Callable[[Sequence[int]], int], budget: int, fair: int
) -> list[list[int]]:
    """The members in as few even parts as keep to the budget and come to about a fair share, or one by one."""
    for count in range(-(-cost(members) // fair), len(members)):
        shares = distributed.to_and_fro([lengths[i] for i in members], count)
        parts = [[members[i] for i in share] for share in shares]
        if max(map(cost, parts)) <= budget:
            return parts
    return [[i] for i in members]


def by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped, longest first, so that a group holds at most `budget` tokens or a single sequence."""
    groups: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not groups or lengths[i] > room:
            groups.append([])
            room = budget
        groups[-1].append(i)
        room -= lengths[i]
    return groups
