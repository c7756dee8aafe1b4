"""logits_logp_entropy(inplace_backward=True): the gradient takes the logits' memory, and autograd knows."""

from __future__ import annotations

import kernels_oracle as oracle
import pytest
import torch
from autotool_kernels import linear_logp_entropy, logits_logp_entropy
from kernels_oracle import DEVICE, LOGITS_BACKENDS, QUIET

pytestmark = pytest.mark.filterwarnings(QUIET)


def problem(n=20, h=6, v=150):
    g = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(rows, h, generator=g).to(DEVICE).requires_grad_() for rows in (n, v))
    target = torch.randint(0, v, (n,), generator=g)
    target[[2, 9]] = -100
    upstream = torch.randn(2, n, generator=g)
    upstream[:, 5] = 0  # a row without gradient must still be overwritten, with zeros
    return hidden, weight, target.to(DEVICE), upstream.to(DEVICE)


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "padded rows"])
def test_gradient_is_the_same_and_lies_where_the_logits_were(backend, layout):
    hidden, weight, target, upstream = problem()

    def project():
        logits = hidden @ weight.T
        return logits if layout == "contiguous" else torch.nn.functional.pad(logits, (0, 9))[:, :150]

    wanted, actual = [], []
    for inplace, gradients in ((False, wanted), (True, actual)):
        logits = project()
        out = logits_logp_entropy(logits, target, temperature=0.7, inplace_backward=inplace, backend=backend)
        gradients += torch.autograd.grad(
            (torch.stack(out) * upstream).sum(), (logits, hidden, weight), retain_graph=False
        )
    for a, w in zip(actual, wanted, strict=True):
        assert torch.equal(a, w)
    assert actual[0].data_ptr() == logits.data_ptr()
    assert actual[0][[2, 5, 9]].count_nonzero() == 0


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_a_second_backward_fails_with_autograds_own_error(backend):
    hidden, weight, target, upstream = problem()
    out = logits_logp_entropy(hidden @ weight.T, target, inplace_backward=True, backend=backend)
    loss = (torch.stack(out) * upstream).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_user_of_the_logits_notices():
    hidden, weight, target, _ = problem()
    logits = hidden @ weight.T
    other = logits.square().sum()
    logits_logp_entropy(logits, target, inplace_backward=True).logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_without_a_gradient_nothing_is_written():
    hidden, weight, target, _ = problem()
    logits = (hidden @ weight.T).detach()
    before = logits.clone()
    logits_logp_entropy(logits, target, inplace_backward=True)
    assert torch.equal(logits, before)


def test_inside_the_compiler_the_flag_has_no_effect():
    torch._dynamo.reset()
    hidden, weight, target, _ = problem()

    def entropy(x, w, inplace):
        return logits_logp_entropy(x @ w.T, target, inplace_backward=inplace).entropy.sum()

    compiled = torch.compile(entropy, backend="aot_eager", fullgraph=True)
    wanted = torch.autograd.grad(entropy(hidden, weight, False), (hidden, weight))
    loss = compiled(hidden, weight, True)
    for a, w in zip(torch.autograd.grad(loss, (hidden, weight), retain_graph=True), wanted, strict=True):
        assert torch.equal(a, w)
    loss.backward()  # a second time: nothing was overwritten


def test_what_cannot_be_overwritten_is_refused():
    leaf = torch.zeros(3, 5, device=DEVICE, requires_grad=True)
    target = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="logits must not be a leaf"):
        logits_logp_entropy(leaf, target, inplace_backward=True)
    with pytest.raises(ValueError, match="logits must not be expanded"):
        logits_logp_entropy((leaf[:1] * 1).expand(3, 5), target, inplace_backward=True)


@pytest.mark.parametrize(
    "view", [lambda p: p.view(3, 5), lambda p: p[:, :], lambda p: p.t().t(), lambda p: p.detach().requires_grad_()[:]]
)
def test_a_view_of_a_parameter_is_refused(view):
    """Its memory is the parameter's: the gradient would overwrite it."""
    parameter = torch.zeros(3, 5, device=DEVICE, requires_grad=True)
    target = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="logits must not be a view of a leaf"):
        logits_logp_entropy(view(parameter), target, inplace_backward=True)
    logits_logp_entropy(view(parameter).detach(), target, inplace_backward=True)  # nothing will be written


@pytest.mark.parametrize("strides", [(1, 1), (4, 1), (1, 2), (0, 1), (5, 0)])
def test_rows_that_share_memory_are_refused(strides):
    flat = torch.zeros(40, device=DEVICE, requires_grad=True) * 1
    target = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="logits must not be expanded"):
        logits_logp_entropy(flat.as_strided((3, 5), strides), target, inplace_backward=True)


@pytest.mark.parametrize("strides", [(5, 1), (7, 1), (1, 3), (10, 2)])
def test_rows_with_memory_of_their_own_are_served(strides):
    flat = torch.linspace(-2, 2, 40, device=DEVICE)
    target = torch.tensor([0, 3, 4], device=DEVICE)
    wanted, actual = (
        torch.autograd.grad(logits_logp_entropy(z, target, inplace_backward=inplace).entropy.sum(), z)[0]
        for inplace in (False, True)
        for z in [(flat.clone().requires_grad_() * 1).as_strided((3, 5), strides)]
    )
    assert torch.equal(wanted, actual)


def test_memory_of_one_more_matrix_is_saved():
    """The dispatcher sees no output of the logits' size in the backward of the op."""
    hidden, weight, target, _ = problem()
    shapes = []

    class Outputs(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "logits_logp_entropy_backward" in str(func):
                shapes.append(None if out is None else tuple(out.shape))
            return out

    for inplace in (False, True):
        out = logits_logp_entropy(hidden @ weight.T, target, inplace_backward=inplace)
        with Outputs():
            out.logp.sum().backward()
    assert shapes == [(20, 150), None]


def test_linear_and_logits_ops_agree():
    hidden, weight, target, upstream = problem()
    whole = linear_logp_entropy(hidden, weight, target, temperature=0.7)
    parts = logits_logp_entropy(hidden @ weight.T, target, temperature=0.7, inplace_backward=True)
    gradients = [oracle.gradients(out, (hidden, weight), upstream) for out in (whole, parts)]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
