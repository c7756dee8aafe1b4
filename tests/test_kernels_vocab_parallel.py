"""The vocabulary-parallel head against the whole one: shards merged here, and by gloo in two and three processes."""

from __future__ import annotations

import socket
from itertools import pairwise

import kernels_oracle as oracle
import pytest
import torch
import torch.distributed as dist
from autotool_kernels import linear_logp_entropy, merge_vocab_parallel, vocab_parallel_linear_logp_entropy
from autotool_kernels.vocab_parallel import merge_shards
from kernels_oracle import QUIET

pytestmark = pytest.mark.filterwarnings(QUIET)
N, H, V = 12, 6, 50
CUTS = {1: [0, 50], 2: [0, 11, 50], 3: [0, 30, 33, 50]}
# Half a dozen float32 roundings of logits and gradients below 20.
TOLERANCE = 1e-5


def problem(dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    hidden, weight, bias = (torch.randn(*shape, generator=g).to(dtype) for shape in ((N, H), (V, H), (V,)))
    target = torch.randint(0, V, (N,), generator=g)
    target[:4] = torch.tensor([0, 10, 11, 49])  # around the cuts
    target[5] = 7  # the ignored row, by a number that is also a label of every shard
    return hidden, weight, bias, target, torch.randn(2, N, generator=g)


OPTIONS = {"temperature": 0.8, "logit_scale": 0.7, "softcap": 5.0, "ignore_index": 7}


def run(hidden, weight, bias, target, upstream, op, **options):
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    out = op(leaves[0], leaves[1], target, bias=leaves[2], **options)
    return *(o.detach() for o in out), *oracle.gradients(out, leaves, upstream)


def check_rank(group, world: int, rank: int) -> None:
    """What every rank of a group of `world` does: stored and recomputed logits, and a shard of excluded tokens."""
    start, stop = CUTS[world][rank : rank + 2]
    for backend, rows, excluded in (("torch", 0, False), ("torch", 5, True), ("triton", 0, True), ("triton", 5, False)):
        hidden, weight, bias, target, upstream = problem()
        options = dict(OPTIONS)
        if excluded:
            options.pop("softcap")  # which would make -inf finite
            bias[30:33] = float("-inf")
            target[(target >= 30) & (target < 33)] = 0
        whole = run(hidden, weight, bias, target, upstream, linear_logp_entropy, **options)
        shard = run(
            hidden, weight[start:stop], bias[start:stop], target, upstream, vocab_parallel_linear_logp_entropy,
            vocab_start=start, group=group, store_bytes=rows * (stop - start) * 4, backend=backend, **options,
        )  # fmt: skip
        wanted = *whole[:3], whole[3][start:stop], whole[4][start:stop]
        for name, a, w in zip(("logp", "entropy", "dx", "dw", "dbias"), shard, wanted, strict=True):
            assert (a - w).abs().max() <= TOLERANCE, (backend, world, rank, rows, excluded, name)
        for mine in shard[:3]:
            others = [torch.empty_like(mine) for _ in range(world)]
            dist.all_gather(others, mine.contiguous(), group=group)
            assert all(torch.equal(mine, other) for other in others), (backend, world, rank, rows, "ranks differ")


def worker(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    pair = dist.new_group([0, 1])
    if rank < 2:
        check_rank(pair, 2, rank)
    check_rank(None, 3, rank)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter")
def test_two_and_three_processes_with_uneven_shards_agree_with_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port,), nprocs=3)  # an assertion that fails in a worker fails here


def statistics(z, target, start, stop):
    part = z[:, start:stop]
    m = part.amax(1)
    e = (part - m[:, None]).exp()
    owned = (target >= start) & (target < stop)
    label = part.gather(1, (target - start).clamp(0, stop - start - 1)[:, None])[:, 0]
    return m, e.sum(1), (e * (part - m[:, None])).sum(1), torch.where(owned, label, float("nan"))


def test_merged_statistics_are_those_of_the_whole_row():
    hidden, weight, _, target, _ = problem(torch.float64)
    z = hidden @ weight.T - 300.0  # below where e^z underflows
    wanted = oracle.logp_entropy(z, target)
    for cuts in CUTS.values():
        merged = merge_shards([statistics(z, target, a, b) for a, b in pairwise(cuts)])
        assert (merged.logp - wanted[0]).abs().max() <= 1e-12
        assert (merged.entropy - wanted[1]).abs().max() <= 1e-12
        assert (merged.row_max + merged.log_sum - z.logsumexp(1)).abs().max() <= 1e-12


def test_an_empty_shard_is_the_identity():
    hidden, weight, _, target, _ = problem()
    shard = statistics(hidden @ weight.T, target, 0, V)
    empty = torch.full((N,), float("-inf")), torch.zeros(N), torch.zeros(N), torch.full((N,), float("nan"))
    alone = merge_shards([shard])
    for shards in ([empty, shard], [shard, empty]):
        for a, b in zip(merge_shards(shards), alone, strict=True):
            assert torch.equal(a, b)


def test_a_label_that_nobody_owns_is_nan_and_one_of_probability_zero_is_not():
    hidden, weight, _, target, _ = problem()
    z = hidden @ weight.T
    z[1, 10] = float("-inf")
    target[2] = V
    logp, entropy, *_ = merge_shards([statistics(z, target, a, b) for a, b in ((0, 11), (11, V))])
    assert logp.isnan().nonzero()[:, 0].tolist() == [2]
    assert logp[1] == float("-inf")
    # A row with a -inf logit needs a guarded u, which `statistics` here does not have.
    assert entropy[[0, *range(2, N)]].isfinite().all()


@pytest.fixture
def alone():
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_is_the_whole(alone):
    hidden, weight, bias, target, upstream = problem()
    whole = run(hidden, weight, bias, target, upstream, linear_logp_entropy, **OPTIONS)
    shard = run(hidden, weight, bias, target, upstream, vocab_parallel_linear_logp_entropy, vocab_start=0, **OPTIONS)
    for a, w in zip(shard, whole, strict=True):
        assert (a - w).abs().max() <= TOLERANCE


def test_only_what_requires_a_gradient_gets_one(alone):
    hidden, weight, bias, target, _ = problem()
    args = {"vocab_start": 0, "bias": bias, **OPTIONS}
    out = vocab_parallel_linear_logp_entropy(hidden, weight.requires_grad_(), target, **args)
    out.entropy.sum().backward()
    assert weight.grad.abs().max() > 0
    assert hidden.grad is None
    with torch.no_grad():
        assert not vocab_parallel_linear_logp_entropy(hidden, weight, target, **args).logp.requires_grad


def test_bad_arguments_are_named_in_one_line(alone):
    hidden, weight, bias, target, _ = problem()
    for change, message in (
        ({"vocab_start": -1}, "vocab_start must be the index"),
        ({"vocab_start": 1.5}, "vocab_start must be the index"),
        ({"bias": bias[:9]}, r"bias must be \[50\]"),
        ({"store_bytes": -1}, "store_bytes must be"),
        ({"softcap": 0.0}, "softcap must be positive"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            vocab_parallel_linear_logp_entropy(hidden, weight, target, **{"vocab_start": 0, **change})
        assert "\n" not in str(caught.value)


def test_without_a_process_group_it_says_so():
    row = torch.zeros(2)
    with pytest.raises(ValueError, match=r"group: torch\.distributed is not initialised"):
        merge_vocab_parallel(row, row, row, row)
