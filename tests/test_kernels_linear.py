"""linear_logp_entropy: every backend against the dense float64 definition, forward and both gradients."""

from __future__ import annotations

import kernels_oracle as oracle
import pytest
import torch
from autotool_kernels import linear_logp_entropy, reference, reference_linear
from kernels_oracle import BACKENDS, DEVICE, QUIET
from torch.utils._python_dispatch import TorchDispatchMode

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


def run(hidden, weight, target, upstream, bias=None, **options):
    """logp, entropy and the gradients of hidden, weight and (where there is one) bias."""
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    out = linear_logp_entropy(*leaves[:2], target, bias=leaves[2] if bias is not None else None, **options)
    return *(o.detach() for o in out), *oracle.gradients(out, leaves, upstream)


def expected(hidden, weight, target, upstream, bias=None, **options):
    leaves = [t.double().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    out = oracle.linear(*leaves[:2], target, bias=leaves[2] if bias is not None else None, **options)
    return *(o.detach() for o in out), *oracle.gradients(out, leaves, upstream)


def assert_close(actual, wanted, tolerance=TOLERANCE):
    """Within `tolerance` of each tensor's largest element, or of 1 where that is smaller."""
    for a, w in zip(actual, wanted, strict=True):
        assert (a - w).abs().max() <= tolerance * max(1.0, w.abs().max().item())


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
    assert_close(actual[2:], wanted[2:])


def test_vocabulary_and_row_tiles_merge_in_float64(monkeypatch):
    monkeypatch.setitem(reference_linear.TILES, DEVICE, (3, 7))
    args = problem(10, 4, 30, torch.float64)
    args[2][3] = -100
    assert_close(run(*args, backend="torch"), expected(*args), 1e-12)


def test_gradcheck_in_float64(monkeypatch):
    """Every option at once; rows 0, 2 and 3 are stored, row 4 is recomputed, row 1 is ignored."""
    monkeypatch.setitem(reference_linear.TILES, DEVICE, (2, 3))
    hidden, weight, target, _ = problem(5, 3, 5, torch.float64)
    bias = torch.linspace(-1, 1, 5, dtype=torch.float64, device=DEVICE)
    target[1] = -100
    temperature = torch.tensor([0.5, 1.0, 1.5, 2.0, 0.7], dtype=torch.float64, device=DEVICE)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def statistics(x, w, b):
        options = {"bias": b, "temperature": temperature, "softcap": 1.7, "logit_scale": 0.6}
        return tuple(linear_logp_entropy(x, w, target, store_bytes=3 * 5 * 8, **options))

    assert torch.autograd.gradcheck(statistics, leaves)


OPTIONS = {
    "bias": {"bias": True},
    "logit_scale": {"logit_scale": 0.5},
    "softcap": {"softcap": 4.0},
    "softcap and temperature": {"softcap": 4.0, "temperature": 0.7},
    "all": {"bias": True, "logit_scale": 1.5, "softcap": 6.0, "temperature": 1.3},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_head(backend, name):
    options = dict(OPTIONS[name])
    args = problem(20, 8, 150)
    if options.pop("bias", False):
        options["bias"] = torch.randn(150, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    without = expected(*args)
    wanted = expected(*args, **options)
    assert (wanted[0] - without[0]).abs().max() > 0.1  # the option matters here
    assert_close(run(*args, **options, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_of_minus_infinity_excludes_a_token(backend, monkeypatch):
    monkeypatch.setitem(reference_linear.TILES, DEVICE, (16, 128))
    hidden, weight, target, upstream = problem(9, 4, 300)
    bias = torch.zeros(300, device=DEVICE)
    bias[:260] = float("-inf")  # whole tiles among them
    target[:] = 270
    kept = expected(hidden, weight[260:], target - 260, upstream)
    actual = run(hidden, weight, target, upstream, bias=bias, backend=backend)
    assert_close(actual[:3], kept[:3])
    assert_close([actual[3][260:]], kept[3:])
    assert actual[3][:260].count_nonzero() == actual[4][:260].count_nonzero() == 0


def stored(n, v, dtype=torch.float32):
    """store_bytes for n rows."""
    return n * reference.store_row_bytes(v, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 37, 1000])
def test_stored_logits_give_the_same_gradients(backend, rows, monkeypatch):
    """Ignored rows take no place in the store, rows without gradient do; 1000 rows are more than there are."""
    monkeypatch.setitem(reference_linear.TILES, DEVICE, (16, 128))
    hidden, weight, target, upstream = problem(70, 8, 300)
    target[::5] = -100
    hidden[::5] = float("nan")
    if rows < 1000:
        for u in upstream:
            u[20:30] = 0
    options = {"bias": torch.linspace(-1, 1, 300, device=DEVICE), "softcap": 5.0, "temperature": 0.8}
    wanted = expected(hidden.nan_to_num(0.0), weight, target, upstream, **options)
    actual = run(hidden, weight, target, upstream, **options, store_bytes=stored(rows, 300), backend=backend)
    assert_close(actual, wanted)
    assert actual[2][::5].count_nonzero() == 0
    assert rows == 1000 or actual[2][20:30].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_store_errs_as_its_rounding_does(backend):
    """Logits are kept as float16 z - tile_max, wrong by at most 2^-11 of that difference.

    To first order that changes dL/dz = -p (g + h (log p + H)) by 2^-11 |z - tile_max| p (|g| + |h| (|log p + H| + 1));
    unrounded dW is compared with the sum of those bounds.
    """
    unit = 2.0**-11
    module = reference_linear if backend == "torch" else pytest.importorskip("autotool_kernels.triton_linear")
    hidden, weight, target, (g, h) = problem(24, 16, 300, torch.bfloat16)
    weight = weight / 2
    head = reference.Head()
    sums = []
    for budget in (0, stored(24, 300, torch.bfloat16)):
        stats, store = module.linear_forward(hidden, weight, target, head, budget)
        dw = torch.zeros(300, 16, device=DEVICE)
        module.linear_backward(g, h, hidden, weight, target, stats, store, head, False, True, weight_sum=dw)
        sums.append(dw)
    assert store.logits.dtype == torch.float16
    z = hidden.double() @ weight.double().T
    log_p = z.log_softmax(1)
    p, entropy = log_p.exp(), -(log_p.exp() * log_p).sum(1, keepdim=True)
    tiles = torch.nn.functional.pad(z, (0, -300 % 128), value=float("-inf")).unflatten(1, (-1, 128))
    difference = z - tiles.amax(2).repeat_interleave(128, 1)[:, :300]
    slope = g[:, None].abs() + h[:, None].abs() * ((log_p + entropy).abs() + 1)
    bound = (p * slope * difference.abs() * unit).T @ hidden.double().abs()
    # 1e-6: sums of float32.
    assert ((sums[1] - sums[0]).abs() <= 1.01 * bound + 1e-6).all()
    assert (sums[1] - sums[0]).abs().max() > 1e-5  # something was rounded


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstreams", [(1, 1), (0, 1)], ids=["both", "entropy"])
def test_low_precision_store_keeps_the_accuracy_of_the_gradients(backend, upstreams):
    """Flat rows, where every token has a probability to get wrong; the target is 4e-3 for dX and 3.5e-3 for dW."""
    hidden, weight, target, upstream = problem(32, 64, 512, torch.bfloat16)
    weight = weight / 80
    upstream = [u * on for u, on in zip(upstream, upstreams, strict=True)]
    wanted = expected(hidden, weight, target, upstream)
    plain = run(hidden, weight, target, upstream, backend=backend)
    kept = run(hidden, weight, target, upstream, backend=backend, store_bytes=stored(32, 512, torch.bfloat16))
    for i in (2, 3):
        # The gradients' own rounding, to 8 bits, hides that of the store, to 11.
        assert oracle.relative_error(kept[i], wanted[i]) <= 1.1 * oracle.relative_error(plain[i], wanted[i])
        assert DEVICE == "cpu" or oracle.relative_error(kept[i], wanted[i]) <= 3.5e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_differences_that_the_store_cannot_hold_have_no_probability(backend):
    """Logits of 1e5 below others are past the range of float16."""
    hidden, weight, target, upstream = problem(6, 4, 140, torch.bfloat16)
    weight[::3] = 0
    hidden, weight[1::3] = hidden.abs() + 1, weight[1::3].abs() * -3e4
    target[:] = 0
    plain = run(hidden, weight, target, upstream, backend=backend)
    kept = run(hidden, weight, target, upstream, backend=backend, store_bytes=stored(6, 140, torch.bfloat16))
    for a, w in zip(kept, plain, strict=True):
        assert w.isfinite().all()
        assert oracle.relative_error(a, w) <= 1e-2


def test_nothing_is_stored_without_a_gradient():
    args = problem(9, 4, 30)[:3]
    ops = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "linear_logp_entropy" in str(func):
                ops.append(out[4].numel())
            return out

    with Calls():
        linear_logp_entropy(*args, store_bytes=1 << 20)
        with torch.no_grad():
            linear_logp_entropy(args[0].requires_grad_(), *args[1:], store_bytes=1 << 20)
        linear_logp_entropy(*args, store_bytes=1 << 20)
    assert ops == [0, 0, 9 * 30]


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_sum_is_added_to(backend):
    """What the chunked step builds on: dW added to a float32 sum, not rounded to the weight's dtype."""
    module = reference_linear if backend == "torch" else pytest.importorskip("autotool_kernels.triton_linear")
    hidden, weight, target, (g, h) = problem(9, 4, 140, torch.bfloat16)
    head = reference.Head()
    stats, store = module.linear_forward(hidden, weight, target, head)
    total = torch.ones(140, 4, device=DEVICE)
    gradients = module.linear_backward(g, h, hidden, weight, target, stats, store, head, weight_sum=total)
    assert gradients[1] is gradients[2] is None
    wanted = expected(hidden, weight, target, (g, h))
    assert_close([total - 1], [wanted[3]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unrounded_gradients_are_in_float32(backend, dtype):
    """Whether dW is asked for or not: the chunked step adds them up."""
    module = reference_linear if backend == "torch" else pytest.importorskip("autotool_kernels.triton_linear")
    hidden, weight, target, (g, h) = problem(40, 32, 200, dtype)
    bias = torch.linspace(-1, 1, 200, device=DEVICE).to(dtype)
    wanted = expected(hidden, weight, target, (g, h), bias)
    head = reference.Head(bias=bias)
    stats, store = module.linear_forward(hidden, weight, target, head)
    for total in (None, torch.zeros(200, 32, device=DEVICE)):
        dx, _, dbias = module.linear_backward(
            g, h, hidden, weight, target, stats, store, head, True, total is not None, True, weight_sum=total,
            rounded=False,
        )  # fmt: skip
        # Rounded, they would be wrong by 1e-3 (float16: 2e-4).
        for actual, want in ((dx, wanted[2]), (dbias, wanted[4])):
            assert actual.dtype == torch.float32
            assert oracle.relative_error(actual, want) <= 2e-5


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
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_of_an_ignored_row_may_be_anything(backend, value):
    hidden, weight, target, upstream = problem(6, 8, 50)
    target[[0, 4]] = -100
    temperature = torch.linspace(0.4, 2.0, 6, device=DEVICE)
    wanted = run(hidden, weight, target, upstream, temperature=temperature.clone(), backend=backend)
    temperature[[0, 4]] = value
    actual = run(hidden, weight, target, upstream, temperature=temperature, backend=backend)
    assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))


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
    assert_close(actual, wanted)


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
    upstream[0][20:23] = 0  # rows with one gradient are not left out
    upstream[1][25:28] = 0
    actual, wanted = run(hidden, weight, target, upstream), expected(hidden, weight, target, upstream)
    assert actual[2][5:20].count_nonzero() == 0
    for a, w in zip(actual, wanted, strict=True):
        assert (a - w).abs().max() <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    hidden, weight, target, upstream = problem(12, 10, 30)
    wide = torch.cat((hidden, hidden), 1)
    transposed = weight.T.contiguous().T
    bias = torch.linspace(-2, 2, 30, device=DEVICE)
    every_other = torch.stack((bias, torch.full_like(bias, 77.0)), 1).flatten()[::2].requires_grad_()
    inputs = [wide[:, :10].requires_grad_(), transposed.requires_grad_(), every_other]
    out = linear_logp_entropy(*inputs[:2], target, bias=every_other, backend=backend)
    actual = (*out, *oracle.gradients(out, inputs, upstream))
    assert_close([t.detach() for t in actual], expected(hidden, weight, target, upstream, bias))


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
        ({"weight": torch.zeros(4)}, ValueError, r"weight must be \[V, 4\]"),
        ({"weight": torch.zeros(9, 4, device="meta")}, ValueError, "weight must be on cpu"),
        ({"target": torch.zeros(5, dtype=torch.int64, device="meta")}, ValueError, "target must be on cpu"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must be \[9\]"),
        ({"bias": torch.zeros(9, dtype=torch.float16)}, TypeError, "bias must have the dtype"),
        ({"bias": torch.zeros(9, device="meta")}, ValueError, "bias must be on cpu"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be positive"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale must be positive"),
        ({"logit_scale": None}, TypeError, "logit_scale must be a number"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"softcap": "30"}, TypeError, "softcap must be a number"),
        ({"store_bytes": -1}, ValueError, "store_bytes must be"),
        ({"store_bytes": 1e9}, ValueError, "store_bytes must be"),
        ({"store_bytes": 2**63}, ValueError, "store_bytes must be"),
        ({"store_bytes": True}, ValueError, "store_bytes must be"),
        ({"hidden": [[1.0]]}, TypeError, "hidden must be a tensor: got list"),
        ({"hidden": torch.zeros(5, 4).to_sparse()}, TypeError, "hidden must be a dense tensor"),
        ({"hidden": torch.zeros(5, 4).to(torch.float8_e4m3fn)}, TypeError, "hidden must be floating point"),
        ({"weight": None}, TypeError, "weight must be a tensor: got NoneType"),
        ({"target": [0] * 5}, TypeError, "target must be a tensor: got list"),
        ({"bias": [0.0] * 9}, TypeError, "bias must be a tensor: got list"),
        ({"ignore_index": None}, ValueError, "ignore_index must be a 64-bit integer: got None"),
        ({"ignore_index": 1.5}, ValueError, "ignore_index must be a 64-bit integer"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index must be a 64-bit integer"),
        ({"temperature": True}, TypeError, "temperature must be a number"),
        ({"temperature": torch.full((5,), float("inf"))}, ValueError, "temperature must be positive and finite"),
        ({"backend": None}, ValueError, "backend must be one of"),
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
