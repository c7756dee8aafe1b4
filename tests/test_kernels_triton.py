"""What only the Triton kernels promise: batch invariance, merge identities, bounded slabs, shared bits."""

from __future__ import annotations

import pytest
import torch
from autotool_kernels import linear_logp_entropy, philox, reference
from kernels_oracle import DEVICE, QUIET
from torch.utils._python_dispatch import TorchDispatchMode

triton_linear = pytest.importorskip("autotool_kernels.triton_linear")
triton_sample = pytest.importorskip("autotool_kernels.triton_sample")
tl = pytest.importorskip("triton.language")
import triton  # noqa: E402

pytestmark = pytest.mark.filterwarnings(QUIET)


def problem(n, h, v):
    """Multiples of 1/8: their products sum exactly, because numpy's matmul is not batch invariant."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randint(-16, 17, (rows, h), generator=g) / 8 for rows in (n, v))
    target = torch.randint(0, v, (n,), generator=g)
    return hidden.to(DEVICE), weight.to(DEVICE), target.to(DEVICE)


def test_a_row_does_not_depend_on_its_neighbours_or_its_place():
    hidden, weight, target = problem(130, 40, 1100)
    whole = linear_logp_entropy(hidden, weight, target, backend="triton")
    rows = torch.tensor([129, 0, 64, 63, 7], device=DEVICE)
    some = linear_logp_entropy(hidden[rows], weight, target[rows], backend="triton")
    for a, b in zip(whole, some, strict=True):
        assert torch.equal(a[rows], b)


def test_row_block_is_bit_neutral(monkeypatch):
    args = problem(70, 40, 300)
    reference_out = linear_logp_entropy(*args, backend="triton")
    monkeypatch.setattr(triton_linear, "BLOCK_N", 32)
    for a, b in zip(reference_out, linear_logp_entropy(*args, backend="triton"), strict=True):
        assert torch.equal(a, b)


def test_rows_far_below_zero_survive_the_split_merge():
    """Two vocabulary splits whose logits all lie below -88, where a maximum that starts at 0 gives NaN."""
    v = triton_linear.BLOCK_V * triton_linear.SPLIT_TILES + 5
    hidden = torch.full((2, 1), -1.0, device=DEVICE)
    weight = torch.linspace(200, 210, v, device=DEVICE)[:, None]
    target = torch.tensor([0, v - 1], device=DEVICE)
    logp, entropy = linear_logp_entropy(hidden, weight, target, backend="triton")
    log_p = (-weight[:, 0].double()).log_softmax(0)
    # Logits near -200 are float32 with a spacing of 1.5e-5.
    assert (logp - log_p[target]).abs().max() <= 5e-5
    assert (entropy + (log_p.exp() * log_p).sum()).abs().max() <= 5e-5


def test_merge_identity():
    empty = tuple(torch.tensor([x]) for x in (float("-inf"), 0.0, 0.0))
    part = tuple(torch.tensor([x]) for x in (-300.0, 2.0, -0.5))
    for pair in ((empty, part), (part, empty)):
        assert all(torch.equal(a, b) for a, b in zip(reference.merge(*pair), part, strict=True))
    assert [t.item() for t in reference.merge(empty, empty)] == [float("-inf"), 0.0, 0.0]


def test_slabs_of_the_backward_change_nothing_but_rounding(monkeypatch):
    hidden, weight, target = problem(70, 8, 300)

    def gradients():
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_logp_entropy(x, w, target, backend="triton")
        return torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (x, w))

    whole = gradients()
    monkeypatch.setattr(triton_linear, "SLAB_COLUMNS", 128)
    monkeypatch.setitem(reference.TILE_ELEMENTS, DEVICE, 128 * 32)
    for a, b in zip(whole, gradients(), strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


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


@pytest.mark.parametrize("module", [reference, triton_linear])
def test_logits_are_never_whole(module, monkeypatch):
    n, h, v, budget = 300, 4, 700, 5000
    monkeypatch.setattr(reference, "VOCAB_TILE", 100)
    monkeypatch.setattr(triton_linear, "SLAB_COLUMNS", 100)
    monkeypatch.setitem(reference.TILE_ELEMENTS, DEVICE, budget)
    hidden, weight, target = problem(n, h, v)
    ones = torch.ones(n, device=DEVICE)
    with LargestTensor() as largest:
        stats = module.linear_forward(hidden, weight, target, 1.0, None, -100)
        module.linear_backward(ones, ones, hidden, weight, target, stats, 1.0, None, -100)
    assert largest.numel <= budget < n * v


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
