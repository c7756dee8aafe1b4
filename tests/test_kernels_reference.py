"""What only the PyTorch backend promises: masking without host synchronisation, bounded tiles, its products."""

from __future__ import annotations

import kernels_oracle as oracle
import pytest
import torch
from autotool_kernels import linear_logp_entropy, products, reference, reference_linear, reference_logits
from kernels_oracle import DEVICE
from test_kernels_linear import TOLERANCE, assert_close, expected, problem, run, stored
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture
def blind(monkeypatch):
    """As on a device whose values the host must not read."""
    for module in (reference, reference_linear):
        monkeypatch.setattr(module, "host_may_look", lambda tensor: False)


@pytest.mark.parametrize("rows", [0, 7, 1000])
def test_devices_that_must_not_stop_the_host_mask_instead(blind, monkeypatch, rows):
    monkeypatch.setitem(reference_linear.TILES, DEVICE, (8, 128))
    hidden, weight, target, upstream = problem(20, 8, 150)
    target[::3] = -100
    hidden[::3] = float("nan")
    # A row without gradient is masked too, whatever it holds.
    hidden[4] = float("nan")
    for u in upstream:
        u[4:8] = 0
    actual = run(hidden, weight, target, upstream, backend="torch", store_bytes=stored(rows, 150))
    wanted = expected(hidden.nan_to_num(0.0), weight, target, upstream)
    assert actual[2][::3].count_nonzero() == actual[2][4:8].count_nonzero() == 0
    keep = [i for i in range(20) if i != 4]
    assert_close([a[keep] for a in actual[:3]], [w[keep] for w in wanted[:3]])
    assert_close(actual[3:], wanted[3:])


def test_temperature_of_a_masked_row_reaches_no_gradient(blind):
    hidden, weight, target, upstream = problem(9, 8, 150)
    target[::3] = -100
    temperature = torch.ones(9, device=DEVICE)
    wanted = expected(hidden, weight, target, upstream)
    temperature[::3] = 0
    assert_close(run(hidden, weight, target, upstream, temperature=temperature, backend="torch"), wanted)


def test_a_label_out_of_range_is_nan_where_the_host_must_not_look(blind):
    hidden, weight, target, _ = problem(20, 8, 50)
    target[1], target[2] = 50, -3
    logp, entropy = linear_logp_entropy(hidden, weight, target, backend="torch")
    assert logp.isnan().nonzero()[:, 0].tolist() == [1, 2]
    assert entropy.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 4, 1000])
def test_no_value_is_read_by_the_host(blind, dtype, rows):
    """Fake tensors have shapes and no values: .item(), nonzero() and branches on values raise."""
    with FakeTensorMode():
        hidden, weight = torch.empty(50, 8, dtype=dtype), torch.empty(300, 8, dtype=dtype)
        target, rowwise = torch.empty(50, dtype=torch.int64), torch.empty(50)
        head = reference.Head(torch.empty(300, dtype=dtype), 1.0, rowwise, 0.5, 2.0)
        stats, store = reference_linear.linear_forward(hidden, weight, target, head, stored(rows, 300, dtype))
        gradients = reference_linear.linear_backward(
            rowwise, rowwise, hidden, weight, target, stats, store, head, need_bias=True
        )
        assert [g.shape for g in gradients] == [hidden.shape, weight.shape, (300,)]
        logits = torch.empty(50, 300, dtype=dtype)
        stats = reference_logits.logits_forward(logits, target, 0.5, rowwise, -100)
        dz = reference_logits.logits_backward(rowwise, None, logits, target, stats, 0.5, rowwise, -100)
        assert dz.shape == logits.shape


def test_low_precision_store_of_excluded_tokens(monkeypatch):
    """bias -inf over a whole stored tile: its maximum is -inf too, and -inf minus -inf would be NaN."""
    monkeypatch.setitem(reference_linear.TILES, DEVICE, (16, 128))
    hidden, weight, target, upstream = problem(9, 4, 300, torch.bfloat16)
    bias = torch.zeros(300, dtype=torch.bfloat16, device=DEVICE)
    bias[:140] = float("-inf")
    target[:] = 200
    budgets = 0, stored(9, 300, torch.bfloat16)
    plain, kept = (
        run(hidden, weight, target, upstream, bias=bias, store_bytes=budget, backend="torch") for budget in budgets
    )
    # Gradients are rounded to bfloat16, and logits to 2^-8 of differences up to about 10.
    for a, w in zip(kept, plain, strict=True):
        assert oracle.relative_error(a, w) <= 2e-2
    assert kept[3][:140].count_nonzero() == 0


class Allocated(TorchDispatchMode):
    """Element counts of the storages that operations make, those of `inputs` left out."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in inputs}
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.sizes.add(t.untyped_storage().nbytes() // t.itemsize)
        return out


@pytest.mark.parametrize("need", ["hidden", "weight", "bias"])
def test_a_gradient_that_is_not_needed_allocates_nothing(monkeypatch, need):
    monkeypatch.setitem(reference_linear.TILES, DEVICE, (16, 128))
    hidden, weight, target, (g, h) = problem(200, 70, 400)
    head = reference.Head(torch.zeros(400, device=DEVICE))
    stats, store = reference_linear.linear_forward(hidden, weight, target, head)
    needs = [need == name for name in ("hidden", "weight", "bias")]
    with Allocated(hidden, weight) as seen:
        reference_linear.linear_backward(g, h, hidden, weight, target, stats, store, head, *needs)
    largest_product_of_a_tile = 128 * 70
    assert largest_product_of_a_tile < hidden.numel() < weight.numel()
    large = {size for size in seen.sizes if size > largest_product_of_a_tile}
    assert large == {"hidden": {hidden.numel()}, "weight": {weight.numel()}, "bias": set()}[need]


@pytest.mark.parametrize("needed", ["hidden", "weight"])
def test_an_op_returns_nothing_for_what_is_not_needed(needed):
    hidden, weight, target, _ = problem(9, 4, 30)
    out = linear_logp_entropy(
        hidden.requires_grad_(needed == "hidden"), weight.requires_grad_(needed == "weight"), target
    )
    shapes = []

    class Outputs(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "linear_logp_entropy_backward" in str(func):
                shapes.extend(tuple(t.shape) for t in out)
            return out

    with Outputs():
        out.logp.sum().backward()
    assert shapes == {"hidden": [(9, 4), (0,), (0,)], "weight": [(0,), (30, 4), (0,)]}[needed]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_products_use_onednn_and_agree(monkeypatch, layout, dtype):
    monkeypatch.setattr(products, "ONEDNN_FLOPS", 0)
    monkeypatch.setitem(reference_linear.TILES, DEVICE, (16, 128))
    hidden, weight, target, upstream = problem(40, 24, 300, dtype)
    if layout == "transposed":
        weight = weight.T.contiguous().T
    elif layout == "padded":
        hidden, weight = torch.cat((hidden, hidden), 1)[:, :24], torch.cat((weight, weight), 1)[:, :24]
    wanted = expected(hidden, weight, target, upstream)
    actual = run(hidden, weight, target, upstream, backend="torch")
    assert_close(actual[:2], wanted[:2])
    # Written once: half a unit in the last place of bfloat16 at most.
    tolerance = TOLERANCE if dtype == torch.float32 else 2.0**-8
    assert max(oracle.relative_error(a, w) for a, w in zip(actual[2:], wanted[2:], strict=True)) <= tolerance


@pytest.mark.skipif(DEVICE != "cpu", reason="oneDNN's layout")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_blocked_once_gives_the_same_products(monkeypatch, dtype):
    monkeypatch.setattr(products, "ONEDNN_FLOPS", 2 * 4 * 40 * 300)
    make = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 40, generator=make).to(dtype)
    blocked = products.block_weight(weight, torch.float32, 4)
    for rows in (1, 4, 33):
        x = torch.randn(rows, 40, generator=make).to(dtype)
        assert torch.equal(
            products.project(x, weight, torch.float32, blocked), products.project(x, weight, torch.float32)
        )
    weight.zero_()  # the larger product reads the copy
    assert products.project(x, weight, torch.float32, blocked).any()
    assert not products.project(x[:1], weight, torch.float32, blocked).any()


def test_weights_of_small_or_wide_products_are_not_blocked():
    assert products.block_weight(torch.zeros(300, 40, device=DEVICE), torch.float32, 4) is None
    large = torch.zeros(products.ONEDNN_FLOPS // 64, 32, dtype=torch.float64, device=DEVICE)
    assert products.block_weight(large, torch.float64, 4) is None
