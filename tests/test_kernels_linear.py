"""linear_logp_entropy: every backend against the dense float64 definition, forward and both gradients."""

from __future__ import annotations

import kernels_oracle as oracle
import pytest
import torch
from autotool_kernels import linear_logp_entropy, reference, reference_linear
from kernels_oracle import BACKENDS, DEVICE, QUIET

pytestmark = pytest.mark.filterwarnings(QUIET)
# float32 logits of size ~6 from 40 products: 40 * 6 * 2^-24 is 1.4e-5; statistics add a few roundings.
TOLERANCE = 3e-5


def problem(n, h, v, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, h, generator=g), torch.randn(v, h, generator=g)
    target = torch.randint(0, v, (n,), generator=g)
    upstream = torch.randn(n, generator=g), torch.randn(n, generator=g)
    to = {"device": DEVICE}
    return (
        hidden.to(dtype=dtype, **to),
        weight.to(dtype=dtype, **to),
        target.to(**to),
        [u.to(**to) for u in upstream],
    )


def run(hidden, weight, target, upstream, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logp_entropy(hidden, weight, target, **options)
    return *(o.detach() for o in out), *oracle.gradients(out, (hidden, weight), upstream)


def expected(hidden, weight, target, upstream, temperature=1.0, ignore_index=-100):
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    out = oracle.linear(hidden, weight, target, temperature, ignore_index)
    return *(o.detach() for o in out), *oracle.gradients(out, (hidden, weight), upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("n", "h", "v"),
    [
        (1, 1, 2),
        (70, 40, 1500),  # ragged in every tile, two vocabulary splits
        (65, 33, 1024),  # a row block with one row; the vocabulary ends on a split
        (5, 3, 1),  # V = 1: logp and entropy are 0, and so is every gradient
    ],
)
def test_matches_dense_float64(backend, n, h, v):
    args = problem(n, h, v)
    actual, wanted = run(*args, backend=backend), expected(*args)
    for a, w in zip(actual[:2], wanted[:2], strict=True):
        assert (a - w).abs().max() <= TOLERANCE
    for a, w in zip(actual[2:], wanted[2:], strict=True):
        assert (a - w).abs().max() <= TOLERANCE * max(1.0, w.abs().max().item())


def test_vocabulary_and_row_tiles_merge_in_float64(monkeypatch):
    monkeypatch.setitem(reference_linear.TILES, DEVICE, (3, 7))
    args = problem(10, 4, 30, torch.float64)
    args[2][3] = -100
    for a, w in zip(run(*args, backend="torch"), expected(*args), strict=True):
        assert (a - w).abs().max() <= 1e-12


def test_gradcheck_in_float64():
    hidden, weight, target, _ = problem(4, 3, 5, torch.float64)
    target[1] = -100
    temperature = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64, device=DEVICE)
    hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: tuple(linear_logp_entropy(x, w, target, temperature=temperature)), (hidden, weight)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_keep_float32_statistics(backend, dtype):
    args = problem(40, 32, 200, dtype)
    logp, entropy, dx, dw = run(*args, backend=backend)
    wanted = expected(*args)
    assert logp.dtype == entropy.dtype == torch.float32
    assert dx.dtype == dw.dtype == dtype
    assert (logp - wanted[0]).abs().max() <= TOLERANCE
    assert (entropy - wanted[1]).abs().max() <= TOLERANCE
    # Written once from float32: half a unit in the last place, 2^-9 for bfloat16 (twice that when truncated).
    assert oracle.relative_error(dx, wanted[2]) <= 4e-3
    assert oracle.relative_error(dw, wanted[3]) <= 4e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_per_row_scalar_and_tensor(backend):
    hidden, weight, target, upstream = problem(20, 8, 50)
    rows = torch.linspace(0.4, 2.0, 20, device=DEVICE)
    for given, same in ((rows, rows), (0.7, 0.7), (torch.tensor(0.7, device=DEVICE), 0.7)):
        actual = run(hidden, weight, target, upstream, temperature=given, backend=backend)
        wanted = expected(hidden, weight, target, upstream, temperature=same)
        for a, w in zip(actual, wanted, strict=True):
            assert (a - w).abs().max() <= TOLERANCE * max(1.0, w.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_ignored_rows_give_zeros_and_exactly_zero_gradient(backend, index_dtype):
    hidden, weight, target, upstream = problem(70, 8, 50)
    target[::3] = -7
    hidden[::3] = float("nan")  # whatever an ignored row holds
    clean = hidden.nan_to_num(0.0)
    actual = run(hidden, weight, target.to(index_dtype), upstream, ignore_index=-7, backend=backend)
    wanted = expected(clean, weight, target, upstream, ignore_index=-7)
    assert actual[0][::3].count_nonzero() == actual[1][::3].count_nonzero() == 0
    assert actual[2][::3].count_nonzero() == 0
    for a, w in zip(actual, wanted, strict=True):
        assert (a - w).abs().max() <= TOLERANCE * max(1.0, w.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_ignored(backend):
    hidden, weight, target, upstream = problem(6, 4, 9)
    out = run(hidden, weight, torch.full_like(target, -100), upstream, backend=backend)
    assert all(t.count_nonzero() == 0 for t in out)
    assert [t.shape for t in out[2:]] == [hidden.shape, weight.shape]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    logp, entropy, dx, dw = run(*problem(0, 4, 9), backend=backend)
    assert logp.shape == entropy.shape == (0,)
    assert dx.shape == (0, 4)
    assert dw.shape == (9, 4)
    assert dw.count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [0, 1])
def test_each_output_alone_carries_gradient(backend, which):
    hidden, weight, target, upstream = problem(12, 6, 30)
    upstream[1 - which] = torch.zeros_like(upstream[0])
    wanted = expected(hidden, weight, target, upstream)[2:]
    hidden.requires_grad_(), weight.requires_grad_()
    out = linear_logp_entropy(hidden, weight, target, backend=backend)[which]
    actual = torch.autograd.grad((out * upstream[which]).sum(), (hidden, weight))
    for a, w in zip(actual, wanted, strict=True):
        assert w.abs().max() > 0.1
        assert (a - w).abs().max() <= TOLERANCE * max(1.0, w.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradient_that_is_needed(backend):
    hidden, weight, target, upstream = problem(9, 6, 30)
    full = run(hidden, weight, target, upstream, backend=backend)
    for needed, index in ((hidden, 2), (weight, 3)):
        needed = needed.requires_grad_()
        out = linear_logp_entropy(hidden, weight, target, backend=backend)
        (alone,) = oracle.gradients(out, (needed,), upstream)
        assert torch.equal(alone, full[index])
        needed.requires_grad_(False)


def test_zero_upstream_rows_are_left_out_exactly():
    hidden, weight, target, upstream = problem(30, 6, 40, torch.float64)
    for u in upstream:
        u[5:20] = 0
    actual, wanted = run(hidden, weight, target, upstream), expected(hidden, weight, target, upstream)
    assert actual[2][5:20].count_nonzero() == 0
    for a, w in zip(actual, wanted, strict=True):
        assert (a - w).abs().max() <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    hidden, weight, target, upstream = problem(12, 10, 30)
    wide = torch.cat((hidden, hidden), 1)
    transposed = weight.T.contiguous().T
    actual = run(wide[:, :10], transposed, target, upstream, backend=backend)
    for a, w in zip(actual, expected(hidden, weight, target, upstream), strict=True):
        assert (a - w).abs().max() <= TOLERANCE * max(1.0, w.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_certain_rows_stay_inside_their_bounds(backend):
    hidden = torch.eye(4, device=DEVICE) * 200.0
    weight = torch.eye(4, device=DEVICE)
    logp, entropy = linear_logp_entropy(hidden, weight, torch.arange(4, device=DEVICE), backend=backend)
    assert (logp <= 0).all()
    assert (entropy >= 0).all()
    assert logp.abs().max() == 0
    assert entropy.abs().max() == 0


def test_repeats_are_bitwise_equal():
    args = problem(70, 40, 300)
    for backend in BACKENDS:
        first, second = run(*args, backend=backend), run(*args, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_devices_that_must_not_stop_the_host_mask_instead(monkeypatch):
    monkeypatch.setattr(reference, "host_may_look", lambda tensor: False)
    hidden, weight, target, upstream = problem(20, 8, 50)
    target[::3] = -100
    hidden[::3] = float("nan")
    actual = run(hidden, weight, target, upstream, backend="torch")
    wanted = expected(hidden.nan_to_num(0.0), weight, target, upstream)
    assert actual[2][::3].count_nonzero() == 0
    for a, w in zip(actual, wanted, strict=True):
        assert (a - w).abs().max() <= TOLERANCE * max(1.0, w.abs().max().item())
    target[1] = 50
    logp, entropy = linear_logp_entropy(hidden, weight, target, backend="torch")
    assert logp.isnan().nonzero()[:, 0].tolist() == [1]
    assert entropy.isfinite().all()


@pytest.mark.skipif(DEVICE != "cpu", reason="labels are only read by the host on a CPU")
@pytest.mark.parametrize("label", [30, -1, -101])
def test_label_out_of_range_is_refused(label):
    hidden, weight, target, _ = problem(5, 4, 30)
    target[2] = label
    with pytest.raises(ValueError, match=f"target holds {label}"):
        linear_logp_entropy(hidden, weight, target)


def test_label_out_of_range_is_nan_without_host_synchronisation():
    hidden, weight, target, _ = problem(5, 4, 30)
    target[2], target[3] = 30, -5
    logp, entropy = linear_logp_entropy(hidden, weight, target, backend="triton")
    assert logp.isnan().tolist() == [False, False, True, True, False]
    assert entropy.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, ValueError, "hidden must have two dimensions"),
        ({"hidden": torch.zeros(5, 4, dtype=torch.int64)}, TypeError, "hidden must be floating point"),
        ({"weight": torch.zeros(9, 5)}, ValueError, r"weight must be \[V, 4\]"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "weight must be"),
        ({"weight": torch.zeros(9, 4, dtype=torch.float64)}, TypeError, "weight must have the dtype"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"target must be \[5\]"),
        ({"target": torch.zeros(5)}, TypeError, "target must be int32 or int64"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": float("nan")}, ValueError, "temperature must be positive"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        (
            {"temperature": torch.ones(3)},
            ValueError,
            "temperature must be a number or a floating-point tensor",
        ),
        ({"temperature": torch.zeros(5)}, ValueError, "temperature must be positive"),
        ({"backend": "cublas"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named_in_one_line(change, error, message):
    args = {
        "hidden": torch.zeros(5, 4),
        "weight": torch.zeros(9, 4),
        "target": torch.zeros(5, dtype=torch.int64),
    }
    with pytest.raises(error, match=message) as caught:
        linear_logp_entropy(**{**args, **change})
    assert "\n" not in str(caught.value)
