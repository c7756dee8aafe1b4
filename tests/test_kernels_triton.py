"""What only the Triton kernels promise: batch invariance, neutral blocks and slabs, compaction, shared bits."""

from __future__ import annotations

import dataclasses

import kernels_oracle as oracle
import pytest
import torch
from autotool_kernels import configs, linear_logp_entropy, philox, reference
from autotool_kernels.reference import Head
from kernels_oracle import DEVICE, QUIET
from torch.utils._python_dispatch import TorchDispatchMode

triton_linear = pytest.importorskip("autotool_kernels.triton_linear")
triton_sample = pytest.importorskip("autotool_kernels.triton_sample")
tl = pytest.importorskip("triton.language")
import triton  # noqa: E402

pytestmark = pytest.mark.filterwarnings(QUIET)
TILE = configs.Tile(rows=32, cols=128, depth=32, warps=1, stages=2, group=2, tma=True)


def uniform(**changes) -> configs.LinearConfig:
    """The same small tile for every product."""
    tile = dataclasses.replace(TILE, **changes)
    return configs.LinearConfig(tile, tile, tile, tile)


def problem(n, h, v):
    """Multiples of 1/8: their products sum exactly, because numpy's matmul is not batch invariant."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randint(-16, 17, (rows, h), generator=g) / 8 for rows in (n, v))
    target = torch.randint(0, v, (n,), generator=g)
    return hidden.to(DEVICE), weight.to(DEVICE), target.to(DEVICE)


def gradients(n, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g).to(DEVICE), torch.randn(n, generator=g).to(DEVICE)


def step(args, upstream, head=Head(), store_bytes=0, config=None, **needs):  # noqa: B008
    """(stats, store, (dX, dW, dbias)) straight from the backend's functions."""
    stats, store = triton_linear.linear_forward(*args, head, store_bytes, config=config)
    grads = triton_linear.linear_backward(*upstream, *args, stats, store, head, config=config, **needs)
    return stats, store, grads


def expected(args, upstream, live=None, **options):
    """Outputs and gradients in float64; rows outside `live` do not exist."""
    hidden, weight, target = args
    live = torch.ones_like(target, dtype=torch.bool) if live is None else live
    x, w = hidden[live].double().requires_grad_(), weight.double().requires_grad_()
    out = oracle.linear(x, w, target[live], **options)
    dx_live, dw = oracle.gradients(out, (x, w), [u[live].double() for u in upstream])
    dx = torch.zeros(hidden.shape, dtype=torch.float64, device=DEVICE)
    dx[live] = dx_live
    return *(o.detach() for o in out), dx, dw


def assert_close(actual, wanted):
    # float32 sums of up to 1e3 terms of size up to ~20: 20 * 2^-24 * sqrt(1e3) is 4e-5.
    assert (actual - wanted).abs().max() <= 5e-5 * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize(
    "config",
    [
        uniform(),
        uniform(tma=False),
        uniform(tma=False, flatten=False, group=1),
        uniform(cols=256, rows=16, depth=16, programs=2),
        dataclasses.replace(uniform(), matmul="cublas"),
    ],
    ids=["tma", "pointers", "nested loops", "two groups of columns", "cublas"],
)
@pytest.mark.parametrize(("n", "h", "v"), [(70, 40, 650), (33, 24, 384)])  # ragged; V ends with half of a wide tile
def test_every_path_matches_float64(config, n, h, v):
    args, upstream = problem(n, h, v), gradients(n)
    # Room for 40 rows: one whole tile of stored rows, and a tile of which only some rows are stored.
    for store_bytes in (0, 40 * 4 * v):
        stats, store, (dx, dw, _) = step(args, upstream, store_bytes=store_bytes, config=config)
        assert store.logits.shape[0] == min(n, store_bytes // (4 * v))
        for actual, wanted in zip((stats.logp, stats.entropy, dx, dw), expected(args, upstream), strict=True):
            assert_close(actual, wanted)


@pytest.mark.parametrize("h", [7, 12])  # rows that are no multiple of 16 bytes
def test_unaligned_and_strided_weights_take_the_pointer_path(h):
    hidden, weight, target = problem(20, h, 150)
    upstream = gradients(20)
    wanted = expected((hidden, weight, target), upstream)
    shifted = torch.empty(weight.numel() + 1, device=DEVICE)[1:].view(weight.shape).copy_(weight)
    for w in (weight, shifted, weight.t().contiguous().t()):
        stats, _, (dx, dw, _) = step((hidden, w, target), upstream)
        for actual, want in zip((stats.logp, stats.entropy, dx, dw), wanted, strict=True):
            assert_close(actual, want)


@pytest.mark.parametrize("config", [uniform(), uniform(tma=False), dataclasses.replace(uniform(), matmul="cublas")])
@pytest.mark.parametrize("store_bytes", [0, 1 << 30])
def test_dead_rows_are_left_out_whatever_they_hold(config, store_bytes):
    hidden, weight, target = problem(75, 24, 200)
    upstream = gradients(75)
    target[::3] = -100
    clean, live = hidden.clone(), target != -100
    hidden[::3] = float("nan")
    stats, store = triton_linear.linear_forward(hidden, weight, target, Head(), store_bytes, config=config)
    # Rows without gradient: the backward must not look at them either.
    for u in upstream:
        u[1::6] = 0
    upstream[0][2::6] = 0  # one gradient is enough to be worked on
    upstream[1][4::6] = 0
    hidden[1::6] = float("inf")
    with_gradient = live.clone()
    with_gradient[1::6] = False
    dx, dw, _ = triton_linear.linear_backward(
        *upstream, hidden, weight, target, stats, store, Head(), config=config
    )  # fmt: skip
    assert dx[~with_gradient].count_nonzero() == 0
    for column in stats:
        assert column[~live].count_nonzero() == 0
    wanted = expected((clean, weight, target), upstream, with_gradient)
    assert_close(dx, wanted[2])
    assert_close(dw, wanted[3])


def test_all_rows_dead_and_one_row():
    hidden, weight, target = problem(40, 16, 130)
    dead = torch.full_like(target, -100)
    stats, _, grads = step((hidden, weight, dead), gradients(40), need_bias=False)
    assert all(t.count_nonzero() == 0 for t in (*stats, *grads[:2]))
    args, upstream = (hidden[:1], weight[:1], target[:1] * 0), gradients(1)
    stats, _, grads = step(args, upstream)
    assert all(t.count_nonzero() == 0 for t in (*stats[:2], *grads[:2]))  # V = 1: certain


def test_stored_rows_follow_the_live_rows_of_the_forward():
    """Row r of the store is the r-th live row of the forward, also when the backward leaves other rows out."""
    hidden, weight, target = problem(70, 16, 200)
    upstream = gradients(70)
    target[::4] = -100
    for u in upstream:
        u[5:30] = 0
    live = (target != -100) & (upstream[0] != 0)
    for rows in (1, 33, 70):
        head = Head(row_temperature=torch.linspace(0.5, 2, 70, device=DEVICE), softcap=6.0, logit_scale=0.5)
        _, store, (dx, dw, _) = step((hidden, weight, target), upstream, head, 4 * 200 * rows, uniform())
        assert store.logits.shape[0] == rows
        wanted = expected(
            (hidden, weight, target), upstream, live, temperature=head.row_temperature[live], softcap=6.0,
            logit_scale=0.5,
        )  # fmt: skip
        assert_close(dx, wanted[2])
        assert_close(dw, wanted[3])


def test_store_holds_scaled_logits_relative_to_group_maxima():
    hidden, weight, target = problem(40, 16, 300)
    target[3] = -100
    live = target != -100
    z = (hidden[live].double() @ weight.double().T) / 0.7
    _, whole = triton_linear.linear_forward(hidden, weight, target, Head(temperature=0.7), 1 << 30, config=uniform())
    assert (whole.logits[: len(z)] - z).abs().max() <= 1e-5
    low = (hidden.bfloat16(), weight.bfloat16(), target)  # multiples of 1/8 are exact
    for cols in (128, 256):
        _, store = triton_linear.linear_forward(*low, Head(temperature=0.7), 1 << 30, config=uniform(cols=cols))
        assert store.logits.dtype == torch.float16
        for i, group in enumerate(z.split(128, 1)):
            assert (store.tile_max[: len(z), i] - group.amax(1)).abs().max() <= 1e-5
            relative = group - group.amax(1, keepdim=True)
            # float16 has 11 bits.
            stored = store.logits[: len(z), 128 * i : 128 * (i + 1)]
            assert ((stored - relative).abs() <= 2.0**-11 * relative.abs() + 1e-5).all()


@pytest.mark.parametrize("need", ["need_hidden", "need_weight", "need_bias"])
def test_only_what_is_needed_comes_back(need):
    args, upstream = problem(10, 16, 130), gradients(10)
    head = Head(bias=torch.linspace(-1, 1, 130, device=DEVICE))
    everything = step(args, upstream, head, need_bias=True)[2]
    needs = {name: name == need for name in ("need_hidden", "need_weight", "need_bias")}
    for name, grad, whole in zip(needs, step(args, upstream, head, **needs)[2], everything, strict=True):
        assert (grad is None) == (name != need)
        assert grad is None or torch.equal(grad, whole)


@pytest.mark.parametrize("store_bytes", [0, 1 << 30])
def test_bias_gradient_is_the_column_sum_over_live_rows(store_bytes):
    hidden, weight, target = problem(40, 16, 700)
    upstream = gradients(40)
    target[::5] = -100
    head = Head(bias=torch.linspace(-1, 1, 700, device=DEVICE))
    dbias = step((hidden, weight, target), upstream, head, store_bytes, need_bias=True)[2][2]
    bias = head.bias.double().requires_grad_()
    out = oracle.linear(hidden.double(), weight.double(), target, bias=bias)
    (wanted,) = oracle.gradients(out, (bias,), upstream)
    assert_close(dbias, wanted)


@pytest.mark.parametrize(("size", "temperature"), [(100.0, 1.0), (-100.0, 1.0), (300.0, 1.0), (10.0, 0.1)])
@pytest.mark.parametrize("store_bytes", [0, 4 * 150 * 10])
def test_dead_rows_bring_nothing_in_when_the_bias_is_large(size, temperature, store_bytes):
    """Their logits are the bias alone: e^100 is inf. Without ignored rows they are what fills the last tile."""
    hidden, weight, target = problem(40, 8, 150)
    upstream = gradients(40)
    head = Head(bias=torch.full((150,), size, device=DEVICE), temperature=temperature)
    for labels in (target, target.clone().index_fill_(0, torch.arange(0, 40, 3, device=DEVICE), -100)):
        got = step((hidden, weight, labels), upstream, head, store_bytes, need_bias=True)[2]
        leaves = [t.double().requires_grad_() for t in (hidden, weight, head.bias)]
        out = oracle.linear(*leaves[:2], labels, bias=leaves[2], temperature=temperature)
        for actual, wanted in zip(got, oracle.gradients(out, leaves, upstream), strict=True):
            # Logits near 300 are float32 with a spacing of 3e-5, divided by the temperature.
            assert (actual - wanted).abs().max() <= 2e-3 * max(1.0, wanted.abs().max().item())


def test_nothing_of_the_weights_size_is_allocated_beside_a_running_sum():
    args, upstream = problem(4, 16, 130), gradients(4)
    stats, store = triton_linear.linear_forward(*args, Head())
    made = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "empty" in str(func) or "zeros" in str(func):
                made.append(tuple(out.shape))
            return out

    for total in (None, torch.zeros(130, 16, device=DEVICE)):
        made.clear()
        with Allocations():
            triton_linear.linear_backward(*upstream, *args, stats, store, Head(), weight_sum=total)
        assert ((130, 16) in made) == (total is None)


def test_weight_gradient_is_added_to_a_running_sum():
    args, upstream = problem(40, 16, 200), gradients(40)
    total = torch.ones(200, 16, device=DEVICE)
    _, _, (_, dw, _) = step(args, upstream, weight_sum=total)
    assert dw is None
    assert_close(total - 1, expected(args, upstream)[3])


def test_a_row_does_not_depend_on_its_neighbours_or_its_place():
    hidden, weight, target = problem(130, 40, 700)
    target[::9] = -100
    whole = linear_logp_entropy(hidden, weight, target, backend="triton")
    rows = torch.tensor([129, 0, 64, 63, 7], device=DEVICE)
    some = linear_logp_entropy(hidden[rows], weight, target[rows], backend="triton")
    alone = linear_logp_entropy(hidden[64:65], weight, target[64:65], backend="triton")
    for a, b, c in zip(whole, some, alone, strict=True):
        assert torch.equal(a[rows], b)
        assert torch.equal(a[64:65], c)


@pytest.mark.parametrize(
    "change", [{"rows": 64}, {"rows": 16}, {"stages": 3}, {"group": 7}, {"programs": 3}, {"tma": False}], ids=str
)
def test_settings_that_may_follow_the_number_of_tokens_are_bit_neutral(change):
    hidden, weight, target = problem(70, 40, 300)
    head = Head(temperature=0.9)
    first, _ = triton_linear.linear_forward(hidden, weight, target, head, config=uniform())
    config = dataclasses.replace(uniform(), forward=dataclasses.replace(TILE, **change))
    assert configs.bits_key("sm_90", config.forward) == configs.bits_key("sm_90", TILE)
    other, _ = triton_linear.linear_forward(hidden, weight, target, head, config=config)
    for a, b in zip(first, other, strict=True):
        assert torch.equal(a, b)


def test_row_slabs_of_the_forward_are_bit_neutral(monkeypatch):
    args = problem(300, 8, 300)
    args[2][::7] = -100
    whole, whole_store = triton_linear.linear_forward(*args, Head(), 4 * 300 * 200)
    monkeypatch.setattr(triton_linear, "PARTIAL_BYTES", 1)  # slabs of one step: 128 rows
    slabs, store = triton_linear.linear_forward(*args, Head(), 4 * 300 * 200)
    for a, b in zip((*whole, whole_store.logits), (*slabs, store.logits), strict=True):
        assert torch.equal(a, b)


def test_slabs_of_the_backward_change_nothing_but_rounding(monkeypatch):
    args, upstream = problem(40, 8, 1300), gradients(40)
    whole = step(args, upstream, need_bias=True, head=Head(bias=torch.zeros(1300, device=DEVICE)))[2]
    monkeypatch.setattr(triton_linear, "DLOGITS_BYTES", 1)
    slabs = step(args, upstream, need_bias=True, head=Head(bias=torch.zeros(1300, device=DEVICE)))[2]
    for a, b in zip(whole, slabs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_row_kernels_walk_more_than_one_block(monkeypatch):
    """Compaction, gathering, merging and scattering with blocks far smaller than the problem."""
    hidden, weight, target = problem(45, 40, 600)
    target[::4] = -100
    args, upstream = (hidden, weight, target), gradients(45)
    for u in upstream:
        u[7:20] = 0
    whole = step(args, upstream, store_bytes=4 * 600 * 20)
    for name, size in (("ORDER_BLOCK", 16), ("HIDDEN_BLOCK", 16), ("MERGE_TILES", 2), ("COEFFICIENT_ROWS", 16)):
        monkeypatch.setattr(triton_linear, name, size)
    blocks = step(args, upstream, store_bytes=4 * 600 * 20)
    for a, b in zip(whole[2][:2], blocks[2][:2], strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    for a, b in zip((*whole[0], *whole[1]), (*blocks[0], *blocks[1]), strict=True):
        assert a.shape == b.shape
        assert a.numel() == 0 or (a - b).abs().max() <= 1e-5


def test_repeats_are_bitwise_equal():
    args, upstream = problem(50, 16, 260), gradients(50)
    first, second = (step(args, upstream, store_bytes=4 * 260 * 20) for _ in range(2))
    for a, b in zip((*first[0], *first[2][:2]), (*second[0], *second[2][:2]), strict=True):
        assert torch.equal(a, b)


def test_rows_far_below_zero_survive_the_merge_of_tiles():
    """Two vocabulary tiles whose logits all lie below -88, where a maximum that starts at 0 gives NaN."""
    v = 133
    hidden = torch.full((2, 1), -1.0, device=DEVICE)
    weight = torch.linspace(200, 210, v, device=DEVICE)[:, None]
    target = torch.tensor([0, v - 1], device=DEVICE)
    logp, entropy = linear_logp_entropy(hidden, weight, target, backend="triton")
    log_p = (-weight[:, 0].double()).log_softmax(0)
    # Logits near -200 are float32 with a spacing of 1.5e-5.
    assert (logp - log_p[target]).abs().max() <= 5e-5
    assert (entropy + (log_p.exp() * log_p).sum()).abs().max() <= 5e-5


@pytest.mark.parametrize("cols", [128, 256])
def test_missing_columns_of_the_last_tile_carry_no_probability(cols):
    """All logits are -50: one phantom logit of 0 would take the whole mass."""
    for v in (129, 384):
        hidden, weight = torch.full((1, 8), -1.0, device=DEVICE), torch.full((v, 8), 6.25, device=DEVICE)
        stats, _ = triton_linear.linear_forward(
            hidden, weight, torch.tensor([v - 1], device=DEVICE), Head(), config=uniform(cols=cols)
        )
        assert stats.entropy.item() == pytest.approx(torch.tensor(float(v)).log().item(), abs=2e-6)
        assert stats.logp.item() == pytest.approx(-stats.entropy.item(), abs=2e-6)


def test_merge_identity():
    empty = tuple(torch.tensor([x]) for x in (float("-inf"), 0.0, 0.0))
    part = tuple(torch.tensor([x]) for x in (-300.0, 2.0, -0.5))
    for pair in ((empty, part), (part, empty)):
        assert all(torch.equal(a, b) for a, b in zip(reference.merge(*pair), part, strict=True))
    assert [t.item() for t in reference.merge(empty, empty)] == [float("-inf"), 0.0, 0.0]


class LargestTensor(TorchDispatchMode):
    """Remembers the element count of the largest floating-point tensor any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            # The interpreter copies storages as bytes.
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.numel = max(self.numel, t.numel())
        return out


def test_logits_are_never_whole(monkeypatch):
    n, h, v = 40, 4, 2000
    budget = n * triton_linear.SLAB_STEP
    monkeypatch.setattr(triton_linear, "DLOGITS_BYTES", 4 * budget)
    args, upstream = problem(n, h, v), gradients(n)
    with LargestTensor() as largest:
        step(args, upstream)
    assert largest.numel <= budget < n * v


def test_workspaces_are_bounded_at_every_size():
    for n in (1, 5000, 8192, 65537, 1 << 20):
        for v in (1, 151936, 256000):
            columns = triton_linear.slab_columns(n, v, 2)
            least = min(triton_linear.SLAB_STEP, v + 127)
            assert 1 <= columns <= v + 127
            assert columns * n * 2 <= max(triton_linear.DLOGITS_BYTES, n * 2 * least)
            assert columns % 128 == 0
            # Chunks of the vocabulary begin on tiles of the label map.
            assert columns >= v or columns % 256 == 0


@triton.jit
def _words(seed, offset, out, BLOCK: tl.constexpr):
    row = tl.arange(0, 1)
    key, counter = tl.load(seed + row), tl.load(offset + row)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    block = tl.arange(0, BLOCK)[None, :]
    zero = tl.zeros((1, BLOCK), tl.uint32)
    words = tl.philox(key[:, None], block.to(tl.uint32), zero, low[:, None] + zero, high[:, None] + zero)
    for w in tl.static_range(4):
        tl.store(out + block * 4 + w, words[w].to(tl.int64))


def test_triton_draws_the_same_bits():
    for seed, offset in ((0, 0), (-7, 5), (2**40 + 3, 2**33 + 1), (2**63 - 1, -1)):
        s, o = torch.tensor([seed]), torch.tensor([offset])
        out = torch.zeros(64, dtype=torch.int64, device=DEVICE)
        _words[(1,)](s.to(DEVICE), o.to(DEVICE), out, BLOCK=16)
        u = ((out.cpu() & philox.MASK).float() + 0.5) * 2.0**-32
        assert torch.equal(u.clamp(max=philox.LARGEST_U), philox.uniforms(s, o, 64)[0])
