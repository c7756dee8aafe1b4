"""logits_logp_entropy: every backend against the dense float64 definition, and its numerical traps."""

from __future__ import annotations

import kernels_oracle as oracle
import pytest
import torch
from autotool_kernels import logits_logp_entropy, reference
from kernels_oracle import DEVICE, LOGITS_BACKENDS, QUIET

pytestmark = pytest.mark.filterwarnings(QUIET)
# Logits are given, so only the statistics round: float32 sums of up to 5000 terms, and exp of |x| < 20.
TOLERANCE = 3e-6


def problem(n, v, scale=2.0, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, v, generator=g) * scale).to(dtype)
    target = torch.randint(0, v, (n,), generator=g)
    upstream = [torch.randn(n, generator=g).to(DEVICE) for _ in range(2)]
    return logits.to(DEVICE), target.to(DEVICE), upstream


def run(logits, target, upstream, **options):
    leaf = logits.detach().requires_grad_()  # keeps the strides, which clone would not
    out = logits_logp_entropy(leaf, target, **options)
    return *(o.detach() for o in out), *oracle.gradients(out, (leaf,), upstream)


def expected(logits, target, upstream, temperature=1.0, ignore_index=-100):
    leaf = logits.double().requires_grad_()
    out = oracle.logp_entropy(leaf, target, temperature, ignore_index)
    return *(o.detach() for o in out), *oracle.gradients(out, (leaf,), upstream)


def assert_close(actual, wanted, tolerance=TOLERANCE):
    for a, w in zip(actual, wanted, strict=True):
        assert (a - w).abs().max() <= tolerance * max(1.0, w.abs().max().item())


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
@pytest.mark.parametrize(("n", "v"), [(1, 2), (7, 131), (3, 5000), (5, 1), (0, 9)])
def test_matches_dense_float64(backend, n, v):
    args = problem(n, v)
    if n:
        assert_close(run(*args, backend=backend), expected(*args))
    else:
        assert [t.shape[0] for t in run(*args, backend=backend)] == [0, 0, 0]


def test_gradcheck_in_float64():
    logits, target, _ = problem(4, 6, dtype=torch.float64)
    target[2] = -100
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: tuple(logits_logp_entropy(z, target, temperature=0.7)), (logits,))


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
@pytest.mark.parametrize("offset", [-200.0, 1e4, -1e4])
def test_offset_of_all_logits_changes_nothing(backend, offset):
    """A maximum that starts at 0 gives NaN below -88, and unshifted entropy loses digits at 1e4."""
    logits, target, upstream = problem(6, 5000)
    logits = (logits * 64).round() / 64  # exact under the offset: float32 spacing at 1e4 is 2^-10
    assert_close(run(logits + offset, target, upstream, backend=backend), expected(logits, target, upstream))


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_masked_tokens_carry_no_probability(backend):
    logits, target, upstream = problem(5, 5000)
    hidden_away = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.5
    hidden_away[:, :4500] = True  # whole tiles of -inf
    hidden_away[torch.arange(5), target] = False
    masked = logits.masked_fill(hidden_away, float("-inf"))
    actual = run(masked, target, upstream, backend=backend)
    finite = expected(logits.masked_fill(hidden_away, -1e5), target, upstream)
    assert_close(actual, finite)
    assert actual[2][hidden_away].count_nonzero() == 0


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_peaked_rows(backend):
    """Rows as confident as a trained model's: errors must not grow with the largest logit."""
    logits, target, upstream = problem(8, 3000)
    logits[torch.arange(8), target] += torch.linspace(5, 30, 8, device=DEVICE)
    assert_close(run(logits, target, upstream, backend=backend), expected(logits, target, upstream), 5e-6)


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_gradient_rows_sum_to_zero(backend):
    logits, target, upstream = problem(6, 4000)
    (_, _, dz) = run(logits, target, upstream, backend=backend)
    # 4000 terms of about 1e-3, each with 2^-24 relative error, summed exactly.
    assert dz.double().sum(1).abs().max() <= 2e-6


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_any_strides(backend):
    logits, target, upstream = problem(6, 40)
    padded = torch.full((6, 64), float("nan"), device=DEVICE)
    padded[:, :40] = logits
    every_other = torch.stack((logits, logits + 1), 2)[..., 0]
    wanted = expected(logits, target, upstream)
    for view in (padded[:, :40], every_other, logits.T.contiguous().T):
        assert_close(run(view, target, upstream, backend=backend), wanted)


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_ignored_rows_and_row_temperatures(backend):
    logits, target, upstream = problem(9, 40)
    target[::2] = -100
    logits[::2] = float("nan")
    temperature = torch.linspace(0.5, 2, 9, device=DEVICE)
    actual = run(logits, target, upstream, temperature=temperature, backend=backend)
    assert all(t[::2].count_nonzero() == 0 for t in actual)
    assert_close(actual, expected(logits.nan_to_num(0.0), target, upstream, temperature=temperature))


def test_devices_that_must_not_stop_the_host_mask_instead(monkeypatch):
    monkeypatch.setattr(reference, "host_may_look", lambda tensor: False)
    logits, target, upstream = problem(9, 40)
    target[::2] = -100
    logits[::2] = float("nan")
    actual = run(logits, target, upstream, backend="torch")
    assert all(t[::2].count_nonzero() == 0 for t in actual)
    assert_close(actual, expected(logits.nan_to_num(0.0), target, upstream))


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_expanded_upstream_gradient(backend):
    logits, target, _ = problem(5, 30)
    logits.requires_grad_()
    out = logits_logp_entropy(logits, target, backend=backend)
    (dz,) = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (logits,))
    ones = [torch.ones(5, device=DEVICE)] * 2
    assert_close((dz,), expected(logits.detach(), target, ones)[2:])


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_low_precision_logits(backend):
    args = problem(5, 300, dtype=torch.bfloat16)
    logp, entropy, dz = run(*args, backend=backend)
    wanted = expected(*args)
    assert_close((logp, entropy), wanted[:2])
    assert dz.dtype == torch.bfloat16
    # One bfloat16 rounding, 2^-9; the interpreter truncates instead, 2^-8.
    assert oracle.relative_error(dz, wanted[2]) <= 4e-3


def test_logits_are_not_written_to():
    logits, target, upstream = problem(5, 30)
    before = logits.clone()
    for backend in LOGITS_BACKENDS:
        run(logits, target, upstream, temperature=0.5, backend=backend)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("backend", LOGITS_BACKENDS[1:])  # PyTorch's divides first
def test_temperature_does_not_amplify_an_offset(backend):
    """x - m is exact; scaling first would round at the size of the logits, 1e-3 here."""
    logits, target, upstream = problem(3, 500)
    logits = (logits * 64).round() / 64
    actual = run(logits + 1e4, target, upstream, temperature=0.7, backend=backend)
    assert_close(actual, expected(logits, target, upstream, temperature=0.7))


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_the_lowest_float_masks_like_minus_infinity(backend):
    logits, target, upstream = problem(3, 700)
    lowest = torch.finfo(torch.float32).min
    for value in (lowest, float("-inf")):
        masked = logits.clone()
        masked[:, 50:] = value
        actual = run(masked, target % 50, upstream, backend=backend)
        wanted = expected(logits[:, :50], target % 50, upstream)
        assert_close((*actual[:2], actual[2][:, :50]), wanted)
        assert actual[2][:, 50:].count_nonzero() == 0


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_a_nan_logit_is_not_hidden(backend):
    logits, target, _ = problem(3, 300)
    logits[1, 77] = float("nan")
    out = logits_logp_entropy(logits, target, backend=backend)
    for column in out:
        assert column.isnan().tolist() == [False, True, False]


triton_logits = pytest.importorskip("autotool_kernels.triton_logits")
SPLIT = triton_logits.SPLIT


def test_rows_over_split_boundaries():
    """Labels at both sides of a boundary; a split of -inf alone; a last split of one column."""
    logits, target, upstream = problem(4, 2 * SPLIT + 1)
    target[:] = torch.tensor([SPLIT - 1, SPLIT, 2 * SPLIT, 0])
    logits[3, SPLIT : 2 * SPLIT] = float("-inf")
    logits[2, : 2 * SPLIT] -= 300  # the last column alone has the mass
    leaf = logits.double().masked_fill(logits == float("-inf"), -1e6)
    wanted = expected(leaf, target, upstream, temperature=0.8)
    # 2^-24 relative of terms up to 300 / 0.8.
    assert_close(run(logits, target, upstream, temperature=0.8, backend="triton"), wanted, 3e-5)


def test_triton_rows_do_not_depend_on_the_batch():
    logits, target, upstream = problem(5, SPLIT + 40)
    whole = run(logits, target, upstream, backend="triton")
    again = run(logits, target, upstream, backend="triton")
    order = torch.tensor([3, 0, 4], device=DEVICE)
    some = run(logits[order], target[order], [u[order] for u in upstream], backend="triton")
    for a, b, c in zip(whole, again, some, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[order], c)


def test_triton_backward_writes_into_any_rows():
    """In place and into rows of another stride: the same bits, zeros in dead rows, nothing beside the rows."""
    logits, target, (g, h) = problem(4, 300)
    logits[1:3] = float("nan")
    target[1] = -100
    g[2] = h[2] = 0.0
    rest = (target, triton_logits.logits_forward(logits, target, 1.0, None, -100), 1.0, None, -100)
    new = triton_logits.logits_backward(g, h, logits, *rest)
    wide = torch.full((4, 320), 7.0, device=DEVICE)
    inplace = logits.clone()
    for out in (wide[:, 8:308], inplace, logits.t().contiguous().t()):
        source = inplace if out is inplace else logits
        assert triton_logits.logits_backward(g, h, source, *rest, out=out) is out
        assert torch.equal(out, new)
    assert new[1:3].count_nonzero() == 0
    assert (wide[:, :8] == 7).all()
    assert (wide[:, 308:] == 7).all()


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="logits must have at least one column"):
        logits_logp_entropy(torch.zeros(3, 0), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="logits must have two dimensions"):
        logits_logp_entropy(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="logits must be a dense tensor"):
        logits_logp_entropy(torch.zeros(2, 3).to_sparse(), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="ignore_index must be a 64-bit integer: got None"):
        logits_logp_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), ignore_index=None)
