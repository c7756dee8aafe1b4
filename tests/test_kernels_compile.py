"""torch.library contracts, torch.compile without graph breaks."""

from __future__ import annotations

import kernels_oracle as oracle
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


@pytest.mark.parametrize("name", ["linear_logp_entropy", "logits_logp_entropy", "policy_loss"])
@pytest.mark.parametrize("factor", [1.0, torch.tensor(2.0, requires_grad=True)])
def test_a_second_derivative_is_refused_in_words(name, factor):
    hidden, weight, target = linear_args()
    logp, old, entropy, *rest = policy_args()
    losses = {
        "linear_logp_entropy": (lambda: linear_logp_entropy(hidden, weight, target).logp.sum(), hidden),
        "logits_logp_entropy": (lambda: logits_logp_entropy(hidden @ weight.T, target).entropy.sum(), hidden),
        "policy_loss": (lambda: policy_loss(logp, old, entropy, *rest).loss, logp),
    }
    loss, leaf = losses[name]
    (plain,) = torch.autograd.grad(loss(), leaf)
    (gradient,) = torch.autograd.grad(loss() * factor, leaf, create_graph=True)
    assert torch.equal(gradient, plain * factor)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        gradient.square().sum().backward()


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


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_the_operands_and_never_the_logits(compiled):
    """bfloat16 activations and float32 parameters, which is what a model under autocast leaves."""
    hidden, weight, target = linear_args(40)
    bias = torch.randn(9, generator=torch.Generator().manual_seed(1)).requires_grad_()
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight, bias)]

    def loss(x, w, b):
        logp, entropy = linear_logp_entropy(x, w, target, bias=b)
        return (logp + entropy.square()).sum(), logp

    torch._dynamo.reset()
    run = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    value, logp = loss(*low)
    wanted = torch.autograd.grad(value, low)
    exact = oracle.linear(low[0].double(), low[1].double(), target, bias=low[2].double())[0]
    # Rounded to bfloat16, logits of size 4 would be wrong by 1e-2.
    assert (logp - exact).abs().max() <= 3e-6
    for x in (hidden, low[0]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value, mixed = run(x, weight, bias)
        assert torch.equal(mixed, logp)
        assert mixed.dtype == torch.float32
        gradients = torch.autograd.grad(value, (x, weight, bias))
        assert [g.dtype for g in gradients] == [x.dtype, torch.float32, torch.float32]
        assert all(torch.equal(g, w.to(g.dtype)) for g, w in zip(gradients, wanted, strict=True))


def test_autocast_leaves_float64_and_disabled_regions_alone():
    hidden, weight, target = linear_args(40, grad=False)
    plain = linear_logp_entropy(hidden, weight, target)
    double = linear_logp_entropy(hidden.double(), weight.double(), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_logp_entropy(hidden.double(), weight.double(), target).logp, double.logp)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(linear_logp_entropy(hidden, weight, target).logp, plain.logp)
    with pytest.raises(TypeError, match="weight must have the dtype of hidden"):
        linear_logp_entropy(hidden.bfloat16(), weight, target)


def test_a_divisor_that_changes_every_step_compiles_once():
    """A token count: as a number each value is a graph of its own, of which the compiler makes eight."""
    logp, old, entropy, *rest = policy_args()
    torch._dynamo.reset()
    counted = Counted("aot_eager")

    def loss(logp, divisor):
        return policy_loss(logp, old, entropy, *rest, normalize=divisor).loss

    compiled = torch.compile(loss, backend=counted, fullgraph=True)
    for count in range(100, 112):
        value = compiled(logp, torch.tensor(count))
        assert torch.equal(value, loss(logp, torch.tensor(count)))
        torch.testing.assert_close(value, loss(logp, float(count)))
    assert counted.graphs == 1
