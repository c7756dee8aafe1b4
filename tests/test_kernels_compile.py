"""torch.library contracts, torch.compile without graph breaks."""

from __future__ import annotations

import pytest
import torch
from autotool_kernels import linear_logp_entropy, logits_logp_entropy, policy_loss, sample_logp_entropy
from torch.utils.checkpoint import checkpoint

OPS = torch.ops.autotool_kernels


def linear_args(n=6, grad=True):
    g = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, 4, generator=g), torch.randn(9, 4, generator=g)
    target = torch.randint(0, 9, (n,), generator=g)
    target[0] = -100
    return hidden.requires_grad_(grad), weight.requires_grad_(grad), target


def policy_args(n=6):
    g = torch.Generator().manual_seed(n)
    logp, old, entropy = (-torch.rand(n, generator=g) for _ in range(3))
    cu_seqlens = torch.tensor([0, 2, n])
    advantages, is_short = torch.tensor([1.0, -1.0]), torch.tensor([1, 0])
    mask = torch.ones(n, dtype=torch.bool)
    return logp.requires_grad_(), old, entropy.neg().requires_grad_(), advantages, cu_seqlens, mask, is_short


def op_calls():
    hidden, weight, target = linear_args()
    temperature = torch.rand(6) + 0.5
    plain = [t.detach() for t in (hidden, weight)]
    bias = torch.randn(9)
    head = (bias, temperature, 1.0, 0.5, 2.0, -100, "auto")
    # Two stored rows and a recomputed rest.
    outputs = OPS.linear_logp_entropy(*plain, target, *head, 2 * 9 * 4)
    logit_stats = OPS.logits_logp_entropy(plain[0], target.clamp(max=3), 1.0, None, -100, "auto", False)
    grads = torch.randn(6), torch.randn(6)
    logp, old, entropy, *rest = policy_args()
    return {
        "linear_logp_entropy": (hidden, weight, target, bias.clone().requires_grad_(), *head[1:], 2 * 9 * 4),
        "linear_logp_entropy_backward": (*grads, *plain, target, *outputs[1:], *head, True, False, True),
        "logits_logp_entropy": (hidden, target.clamp(max=3), 0.5, None, -100, "auto", False),
        "logits_logp_entropy_backward": (
            None, grads[1], plain[0], target.clamp(max=3), *logit_stats[1:], 1.0, None, -100, "auto"
        ),
        "logits_logp_entropy_backward_": (
            *grads, plain[0].clone(), target.clamp(max=3), *logit_stats[1:], 1.0, None, -100, "auto"
        ),
        "policy_loss": (
            logp, old, entropy, *rest, [0.1, 0.2, 0.0, 0.01], None, 0.2, 0.2, 0, 1.0, "auto"
        ),
        "sample_logp_entropy": (plain[0], 1.0, None, torch.arange(6), torch.arange(6), "auto"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(op_calls()))
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name).default, op_calls()[name])


def step(hidden, weight, target, old_logp, advantages, cu_seqlens, mask, is_short, beta_long):
    """The trainer's way from hidden states to a loss."""
    logp, entropy = linear_logp_entropy(hidden, weight, target, temperature=0.9)
    out = policy_loss(
        logp, old_logp, entropy, advantages, cu_seqlens, mask, is_short, beta_long=beta_long, target_long=5.0
    )
    return out.loss, out.sequence_entropy, out.metrics["approx_kl"]


COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
SIZES = (6, 11, 17, 64, 5)


class Counted:
    """A compiler that counts the graphs it is given: forward and backward of one are traced together."""

    def __init__(self, name: str) -> None:
        self.compile, self.graphs = torch._dynamo.lookup_backend(name), 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.compile(graph, inputs)


def compare(fn, compiler, arguments, inputs):
    """`fn` compiled as one graph against eager, forward and gradients, on arguments(n) of five sizes."""
    torch._dynamo.reset()
    counted = Counted(compiler)
    compiled = torch.compile(fn, backend=counted, fullgraph=True)
    for n in SIZES:
        args = arguments(n)
        results = []
        for run in (fn, compiled):
            loss, *others = run(*args)
            results.append((loss, *others, *torch.autograd.grad(loss, inputs(args))))
        (eager_loss, *eager), (traced_loss, *traced) = results
        # The compiler sums up to 128 numbers in another order; everything before and after that is the same.
        assert (eager_loss - traced_loss).abs() <= 128 * 2.0**-24 * eager_loss.abs().clamp(min=1)
        assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))
    assert counted.graphs <= 3  # the first and two recompilations


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_as_one_graph_with_dynamic_tokens(compiler):
    def arguments(n):
        _, old, _, advantages, cu_seqlens, mask, is_short = policy_args(n)
        return *linear_args(n), old, advantages, cu_seqlens, mask, is_short, torch.tensor(0.3)

    compare(step, compiler, arguments, lambda args: args[:2])


@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_option_compiles_with_dynamic_tokens(compiler):
    """Eight rows are stored: less than the batch in some sizes, more in others."""

    def loss(hidden, weight, target, bias, temperature):
        logp, entropy = linear_logp_entropy(
            hidden, weight, target, bias=bias, temperature=temperature, softcap=3.0, logit_scale=0.5,
            store_bytes=8 * 9 * 4,
        )  # fmt: skip
        return (logp.square() + entropy).sum(), logp

    def arguments(n):
        return *linear_args(n), torch.linspace(-1, 1, 9).requires_grad_(), torch.linspace(0.5, 2.0, n)

    compare(loss, compiler, arguments, lambda args: (*args[:2], args[3]))


def small_loss(hidden, weight, target):
    logp, entropy = linear_logp_entropy(hidden, weight, target, store_bytes=100)
    return (logp * 2 + entropy.square()).sum()


def test_checkpoint_retain_graph_and_calls_in_a_row():
    hidden, weight, target = linear_args(20)
    wanted = torch.autograd.grad(small_loss(hidden, weight, target), (hidden, weight))
    for reentrant in (False, True):
        hidden.grad = weight.grad = None
        checkpoint(small_loss, hidden, weight, target, use_reentrant=reentrant).backward()
        assert torch.equal(hidden.grad, wanted[0])
        assert torch.equal(weight.grad, wanted[1])
    # The same op twice in a graph, and its backward twice.
    twice = small_loss(hidden, weight, target) + small_loss(hidden * 1, weight, target)
    for retain in (True, False):
        for g, w in zip(torch.autograd.grad(twice, (hidden, weight), retain_graph=retain), wanted, strict=True):
            assert torch.equal(g, 2 * w)


def test_no_grad_and_inference_mode_give_the_same_numbers():
    hidden, weight, target = linear_args(20)
    wanted = linear_logp_entropy(hidden, weight, target)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = linear_logp_entropy(hidden, weight, target)
        assert not out.logp.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))


def test_a_second_derivative_is_refused():
    hidden, weight, target = linear_args()
    loss = linear_logp_entropy(hidden, weight, target).logp.sum()
    (dx,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


def test_logits_and_sampling_compile_as_one_graph():
    torch._dynamo.reset()

    def both(logits, target, seed, offset):
        sampled = sample_logp_entropy(logits, temperature=0.7, seed=seed, offset=offset)
        return logits_logp_entropy(logits, target).entropy + sampled.logp, sampled.token

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (3, 5):
        args = torch.randn(n, 7), torch.arange(n), torch.arange(n), torch.arange(n)
        for eager, traced in zip(both(*args), compiled(*args), strict=True):
            assert torch.equal(eager, traced)


def test_autocast_does_not_reach_the_logits():
    hidden, weight, target = linear_args(40, grad=False)
    plain = linear_logp_entropy(hidden, weight, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = linear_logp_entropy(hidden, weight, target)
    assert torch.equal(plain.logp, mixed.logp)
