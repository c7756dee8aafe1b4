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


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="logits must have at least one column"):
        logits_logp_entropy(torch.zeros(3, 0), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="logits must have two dimensions"):
        logits_logp_entropy(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
