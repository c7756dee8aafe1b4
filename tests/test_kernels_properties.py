"""Properties of the linear op that hold for any input, drawn by hypothesis.

The PyTorch backend's products are MKL's or oneDNN's, which choose their summation order by the shape: there a row alone
equals the row in a batch to rounding. Triton's kernels fix the order, and are bitwise equal.
"""

from __future__ import annotations

import math

import kernels_oracle as oracle
import pytest
import torch
from autotool_kernels import linear_logp_entropy, reference, reference_linear
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_oracle import DEVICE, QUIET

pytestmark = pytest.mark.filterwarnings(QUIET)
MANY = settings(derandomize=True, max_examples=25, deadline=None)
FEW = settings(derandomize=True, max_examples=4, deadline=None)
# float64 sums of up to 300 terms of size 100.
ROUNDING = 1e-10


@st.composite
def problems(draw, dtype=torch.float64, max_rows=9):
    n, h, v = draw(st.integers(1, max_rows)), draw(st.integers(1, 7)), draw(st.integers(1, 300))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # From flat rows to rows that are certain.
    scale = draw(st.sampled_from([0.01, 1.0, 8.0]))
    hidden, weight = torch.randn(n, h, generator=g) * scale, torch.randn(v, h, generator=g)
    target = torch.randint(0, v, (n,), generator=g)
    target[torch.rand(n, generator=g) < 0.2] = -100
    to = {"device": DEVICE, "dtype": dtype}
    return hidden.to(**to), weight.to(**to), target.to(DEVICE), torch.randn(2, n, generator=g).to(DEVICE), g


def run(hidden, weight, target, upstream, **options):
    """(logp, entropy, dX, dW)."""
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    out = linear_logp_entropy(*leaves, target, **options)
    return *(o.detach() for o in out), *oracle.gradients(out, leaves, upstream)


def close(a, b, tolerance=ROUNDING):
    return (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@MANY
@given(problems(), st.floats(-300, 300))
def test_a_shift_of_all_logits_changes_nothing(problem, shift):
    hidden, weight, target, upstream, _ = problem
    plain = run(hidden, weight, target, upstream)
    bias = torch.full((weight.shape[0],), shift, dtype=hidden.dtype, device=DEVICE)
    assert all(close(a, b) for a, b in zip(run(hidden, weight, target, upstream, bias=bias), plain, strict=True))


@FEW
@given(problems(torch.float32), st.sampled_from([-300.0, -100.0, 100.0, 300.0]))
def test_a_shift_of_all_logits_changes_only_rounding_in_triton(problem, shift):
    """Rows that fill up a tile have the bias for their logits, and e^100 is inf."""
    hidden, weight, target, upstream, _ = problem
    plain = run(hidden, weight, target, upstream, backend="triton")
    bias = torch.full((weight.shape[0],), shift, dtype=hidden.dtype, device=DEVICE)
    shifted = run(hidden, weight, target, upstream, bias=bias, backend="triton")
    # Logits near 400 are float32 with a spacing of 3e-5, and a gradient sums up to 300 of their errors.
    assert all(close(a, b, 1e-3) for a, b in zip(shifted, plain, strict=True))


@MANY
@given(problems())
def test_a_permutation_of_the_vocabulary_permutes_dw_and_nothing_else(problem):
    hidden, weight, target, upstream, g = problem
    order = torch.randperm(weight.shape[0], generator=g).to(DEVICE)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=DEVICE)
    moved = torch.where(target == -100, target, place[target.clamp(min=0)])
    *plain, dw = run(hidden, weight, target, upstream)
    *permuted, dw_permuted = run(hidden, weight[order], moved, upstream)
    assert all(close(a, b) for a, b in zip(permuted, plain, strict=True))
    assert close(dw_permuted, dw[order])


@MANY
@given(problems(torch.float32))
def test_bounds(problem):
    hidden, weight, target, _, _ = problem
    logp, entropy = linear_logp_entropy(hidden, weight, target)
    assert (logp <= 0).all()
    assert (entropy >= 0).all()
    # log s and u / s each carry a few roundings of up to ln V.
    assert (entropy <= math.log(weight.shape[0]) * (1 + 2e-6) + 2e-6).all()


@MANY
@given(problems(torch.float32))
def test_a_permutation_of_the_tokens_permutes_them(problem):
    hidden, weight, target, upstream, g = problem
    order = torch.randperm(len(target), generator=g).to(DEVICE)
    logp, entropy, _, dw = run(hidden, weight, target, upstream)
    logp_permuted, entropy_permuted, _, dw_permuted = run(hidden[order], weight, target[order], upstream[:, order])
    # float32 logits up to about 60 are wrong by a few roundings of 2^-24 of that.
    assert close(logp_permuted, logp[order], 2e-5)
    assert close(entropy_permuted, entropy[order], 2e-5)
    assert close(dw_permuted, dw, 1e-4)


@FEW
@given(problems(torch.float32, max_rows=40), st.booleans())
def test_triton_rows_permuted_or_taken_out_are_bitwise_the_same(problem, all_of_them):
    """Multiples of 1/8: numpy, which multiplies in the interpreter, sums those exactly in any order."""
    hidden, weight, target, upstream, g = problem
    hidden, weight = ((t * 4).round().clamp(-16, 16) / 8 for t in (hidden, weight))
    whole = run(hidden, weight, target, upstream, backend="triton")[:3]
    taken = len(target) if all_of_them else max(1, len(target) // 2)
    some = torch.randperm(len(target), generator=g)[:taken].to(DEVICE)
    part = run(hidden[some], weight, target[some], upstream[:, some], backend="triton")[:3]
    for a, b in zip(part[:2], whole[:2], strict=True):
        assert torch.equal(a, b[some])
    assert close(part[2], whole[2][some], 1e-5)


@MANY
@given(problems())
def test_a_row_alone_equals_the_row_in_a_batch(problem):
    hidden, weight, target, upstream, _ = problem
    whole = run(hidden, weight, target, upstream)[:3]
    for i in range(len(target)):
        alone = run(hidden[i : i + 1], weight, target[i : i + 1], upstream[:, i : i + 1])[:3]
        assert all(close(a[0], w[i]) for a, w in zip(alone, whole, strict=True))


@MANY
@given(problems())
def test_dw_of_a_batch_is_the_sum_over_its_parts(problem):
    hidden, weight, target, upstream, _ = problem
    cut = len(target) // 2
    whole = run(hidden, weight, target, upstream)[3]
    parts = [run(hidden[s], weight, target[s], upstream[:, s])[3] for s in (slice(0, cut), slice(cut, None))]
    assert close(parts[0] + parts[1], whole)


@MANY
@given(problems(), st.booleans())
def test_rows_of_dz_sum_to_zero(problem, store):
    """dX of a weight with a column of ones holds the row sums of dL/dlogits; dbias its column sums."""
    hidden, weight, target, upstream, _ = problem
    weight = torch.cat((weight, torch.ones_like(weight[:, :1])), 1)
    hidden = torch.cat((hidden, torch.zeros_like(hidden[:, :1])), 1)
    dx = run(hidden, weight, target, upstream, store_bytes=1 << 20 if store else 0)[2]
    assert dx[:, -1].abs().max() <= ROUNDING
    head = reference.Head(torch.zeros_like(weight[:, 0]))
    stats, kept = reference_linear.linear_forward(hidden, weight, target, head)
    dbias = reference_linear.linear_backward(
        *upstream, hidden, weight, target, stats, kept, head, False, False, need_bias=True
    )[2]
    assert dbias.sum().abs() <= ROUNDING


@MANY
@given(problems(), st.integers(0, 10))
def test_stored_and_recomputed_logits_give_the_same_gradients(problem, rows):
    hidden, weight, target, upstream, _ = problem
    plain = run(hidden, weight, target, upstream)
    budget = rows * reference.store_row_bytes(weight.shape[0], hidden.dtype)
    stored = run(hidden, weight, target, upstream, store_bytes=budget)
    assert all(close(a, b) for a, b in zip(stored, plain, strict=True))


@FEW
@given(problems(torch.float32, max_rows=20))
def test_backends_agree(problem):
    hidden, weight, target, upstream, _ = problem
    both = [run(hidden, weight, target, upstream, backend=b) for b in ("torch", "triton")]
    # float32 logits up to about 60 are wrong by 7 roundings of 2^-24 of that.
    assert all(close(a, b, 1e-4) for a, b in zip(*both, strict=True))
