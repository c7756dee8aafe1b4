"""chunked_policy_step: the gradients of the whole batch, chunk by chunk of whole sequences."""

from __future__ import annotations

import functools

import kernels_oracle as oracle
import pytest
import torch
from autotool_kernels import chunked, chunked_policy_step, linear_logp_entropy, policy_loss, reference
from kernels_oracle import BACKENDS, DEVICE, QUIET
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.filterwarnings(QUIET)
BOUNDS = [0, 5, 5, 9, 20, 23]  # an empty sequence; one of 11 tokens
N, H, V = 23, 6, 140
# float32 sums in another order: a few roundings of 2^-24 of gradients up to about 10.
TOLERANCE = 5e-6


def problem(dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in ((N, H), (V, H), (V,)))
    target = torch.randint(0, V, (N,), generator=g)
    target[[3, 6]] = -100
    upstream = torch.randn(2, N, generator=g).to(DEVICE)
    inputs = [t.to(device=DEVICE, dtype=dtype).requires_grad_() for t in (hidden, weight, bias)]
    return inputs, target.to(DEVICE), upstream


def linear_loss(upstream):
    return lambda logp, entropy, chunk: (logp * upstream[0, chunk.tokens] + entropy * upstream[1, chunk.tokens]).sum()


OPTIONS = {"temperature": 0.8, "logit_scale": 0.7, "softcap": 5.0}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 9, 1000, None])
def test_gradients_are_those_of_the_whole_batch(backend, chunk_tokens):
    (hidden, weight, bias), target, upstream = problem()
    whole = linear_logp_entropy(hidden, weight, target, bias=bias, **OPTIONS, backend=backend)
    wanted = oracle.gradients(whole, (hidden, weight, bias), upstream)
    step = chunked_policy_step(
        hidden, weight, target, BOUNDS, linear_loss(upstream), bias=bias, **OPTIONS, chunk_tokens=chunk_tokens,
        backend=backend,
    )  # fmt: skip
    assert not step.logp.requires_grad
    assert not step.entropy.requires_grad
    assert (step.logp - whole.logp).abs().max() <= TOLERANCE
    assert (step.entropy - whole.entropy).abs().max() <= TOLERANCE
    assert abs(step.loss.item() - (torch.stack(whole) * upstream).sum().item()) <= 1e-4
    for a, w in zip(torch.autograd.grad(step.loss, (hidden, weight, bias)), wanted, strict=True):
        assert (a - w).abs().max() <= TOLERANCE * max(1.0, w.abs().max().item())


def test_matches_dense_float64_with_the_policy_loss():
    """A loss that needs whole sequences: the gate looks at their mean entropy."""
    (hidden, weight, _), target, upstream = problem(torch.float64)
    target = target.clamp(min=0)
    advantages, is_short = torch.tensor([1.0, 2.0, -1.0, 0.5, -0.7]).double(), torch.tensor([1, 1, 0, 0, 1])
    advantages, is_short = advantages.to(DEVICE), is_short.to(DEVICE)
    mask, cu = upstream[0] > -1, torch.tensor(BOUNDS, device=DEVICE)
    total = int(mask.sum())
    old = oracle.linear(hidden, weight, target)[0].detach() + 0.1 * upstream[1]
    logp, entropy = oracle.linear(hidden, weight, target)
    _, means = oracle.policy_loss(logp, old, entropy, advantages, cu, mask, is_short)
    # Some sequences above their target, some below; sequence 1 is empty.
    gate = means[[0, 2, 3, 4]].median().item() + 1e-6
    options = {"beta_short": 0.3, "beta_long": 0.2, "target_short": gate, "target_long": gate}

    def loss_fn(logp, entropy, chunk):
        t, s = chunk.tokens, chunk.sequences
        return policy_loss(
            logp, old[t], entropy, advantages[s], chunk.cu_seqlens, mask[t], is_short[s], normalize=total, **options
        ).loss

    step = chunked_policy_step(hidden, weight, target, cu.cpu(), loss_fn, chunk_tokens=10)
    wanted, _ = oracle.policy_loss(logp, old, entropy, advantages, cu, mask, is_short, **options)
    assert abs(step.loss.item() - wanted.item()) <= 1e-12
    for a, w in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (step.loss, wanted)), strict=True):
        assert w.abs().max() > 1e-3
        assert (a - w).abs().max() <= 1e-12


def test_chunks_are_whole_sequences_up_to_the_limit():
    assert chunked.plan(BOUNDS, 9) == [(0, 3), (3, 4), (4, 5)]
    assert chunked.plan(BOUNDS, 8) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert chunked.plan(BOUNDS, 14) == [(0, 3), (3, 5)]
    assert chunked.plan([0, 30, 31], 5) == [(0, 1), (1, 2)]
    assert chunked.plan([0], 5) == []
    assert chunked.plan([0, 0], 5) == [(0, 1)]


def test_the_loss_function_sees_its_part_of_the_batch():
    (hidden, weight, _), target, _ = problem()
    seen = []

    def loss_fn(logp, entropy, chunk):
        assert logp.requires_grad
        assert logp.is_leaf
        assert torch.is_grad_enabled()
        assert logp.shape == entropy.shape == target[chunk.tokens].shape
        seen.append((chunk.tokens, chunk.sequences, chunk.cu_seqlens.tolist()))
        return logp.sum()

    chunked_policy_step(hidden, weight, target, BOUNDS, loss_fn, chunk_tokens=9)
    assert seen == [
        (slice(0, 9), slice(0, 3), [0, 5, 5, 9]),
        (slice(9, 20), slice(3, 4), [0, 11]),
        (slice(20, 23), slice(4, 5), [0, 3]),
    ]


class Module(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, logp, entropy):
        return (self.factor * logp + entropy).sum()


class ModuleWithChunk(Module):
    def forward(self, logp, entropy, chunk):
        assert isinstance(chunk, chunked.Chunk)
        return super().forward(logp, entropy)


def test_two_arguments_are_enough_and_defaults_stay_the_callers():
    (hidden, weight, _), target, _ = problem()
    losses = []
    for loss_fn in (
        lambda logp, entropy: (2 * logp + entropy).sum(),
        lambda logp, entropy, factor=2: (factor * logp + entropy).sum(),
        functools.partial(lambda factor, logp, entropy: (factor * logp + entropy).sum(), 2),
        lambda *statistics: (2 * statistics[0] + statistics[1]).sum(),
        Module(2),
        ModuleWithChunk(2),
    ):
        losses.append(chunked_policy_step(hidden, weight, target, BOUNDS, loss_fn, chunk_tokens=9).loss.item())
    assert len(set(losses)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_a_chunk_are_stored_and_only_those_of_a_long_sequence_recomputed(backend, monkeypatch):
    (hidden, weight, _), target, upstream = problem()
    stores, serve = [], chunked.implementation

    def implementation(op, *kind):
        run = serve(op, *kind)

        def forward(*args):
            stats, store = run(*args)
            stores.append(tuple(store.logits.shape))
            return stats, store

        return run if op.endswith("backward") else forward

    monkeypatch.setattr(chunked, "implementation", implementation)
    loss_fn = linear_loss(upstream)
    chunked_policy_step(hidden, weight, target, BOUNDS, loss_fn, chunk_tokens=9, backend=backend)
    assert stores == [(9, V), (9, V), (3, V)]
    with torch.no_grad():
        chunked_policy_step(hidden, weight, target, BOUNDS, loss_fn, chunk_tokens=9, backend=backend)
    assert stores[3:] == [(0, V)] * 3


def test_default_chunk_is_bounded_by_memory(monkeypatch):
    (hidden, weight, _), target, _ = problem()
    sizes = []

    def loss_fn(logp, entropy):
        sizes.append(logp.numel())
        return logp.sum()

    monkeypatch.setitem(chunked.CHUNK_BYTES, DEVICE, 9 * reference.store_row_bytes(V, torch.float32) + 3)
    chunked_policy_step(hidden, weight, target, BOUNDS, loss_fn)
    assert sizes == [9, 11, 3]


def test_backward_scales_and_may_be_repeated():
    (hidden, weight, bias), target, upstream = problem()
    step = chunked_policy_step(hidden, weight, target, BOUNDS, linear_loss(upstream), bias=bias, chunk_tokens=9)
    inputs = (hidden, weight, bias)
    once = torch.autograd.grad(step.loss, inputs, retain_graph=True)
    kept = [g.clone() for g in once]
    step.loss.backward(retain_graph=True)
    (step.loss * 3).backward()
    for t, g, k in zip(inputs, once, kept, strict=True):
        assert torch.equal(g, k)  # accumulating did not touch what was handed out before
        assert torch.allclose(t.grad, 4 * g, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaled_loss_scales_before_anything_is_rounded(backend, dtype):
    """1 + 2^-8 is 1 in bfloat16; 1 / 3 is off by 1e-3; what 2^-20 leaves of a gradient is little in float16."""
    inputs, target, upstream = problem(dtype)
    double = [t.detach().double().requires_grad_() for t in inputs]
    wanted = oracle.gradients(oracle.linear(*double[:2], target, bias=double[2]), double, upstream)

    def step(size):
        def loss_fn(logp, entropy, chunk):
            return size * linear_loss(upstream)(logp, entropy, chunk)

        return chunked_policy_step(
            *inputs[:2], target, BOUNDS, loss_fn, bias=inputs[2], chunk_tokens=9, backend=backend
        ).loss

    # Rounded once: 1.5e-3 in the root mean square for bfloat16, twice that where the interpreter truncates.
    limit = (4e-3 if backend == "triton" else 2.2e-3) if dtype == torch.bfloat16 else 5e-4
    # A GPU rounds dL/dlogits for its products, before the scale is known.
    small = [(2.0**-20, 2.0**20)] if DEVICE == "cpu" else []
    for size, scale in ((1.0, 1 + 2.0**-8), (1.0, 1 / 3), *small):
        for actual, want in zip(torch.autograd.grad(step(size) * scale, inputs), wanted, strict=True):
            assert actual.dtype == dtype
            assert oracle.relative_error(actual, want * (size * scale)) <= limit
    exact = torch.autograd.grad(step(1.0), inputs)
    for actual, once in zip(torch.autograd.grad(step(1.0) * (1 + 2.0**-8), inputs), exact, strict=True):
        # A factor that is rounded away moves nothing; here about half of all numbers move by their last bit.
        assert (actual != once).float().mean() > 0.2


def test_what_the_loss_function_writes_does_not_reach_the_gradients():
    (hidden, weight, _), target, upstream = problem()
    plain = linear_loss(upstream)

    def scribbling(logp, entropy, chunk):
        loss = plain(logp, entropy, chunk)
        logp.data.zero_(), entropy.data.zero_()
        return loss

    steps = [chunked_policy_step(hidden, weight, target, BOUNDS, fn, chunk_tokens=9) for fn in (plain, scribbling)]
    assert torch.equal(steps[0].logp, steps[1].logp)
    for a, b in zip(*(torch.autograd.grad(step.loss, (hidden, weight)) for step in steps), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), ()])
def test_only_what_requires_a_gradient_is_computed(needed, monkeypatch):
    inputs, target, upstream = problem()
    full = chunked_policy_step(*inputs[:2], target, BOUNDS, linear_loss(upstream), bias=inputs[2], chunk_tokens=9)
    wanted = torch.autograd.grad(full.loss, inputs)
    asked, serve = [], chunked.implementation

    def implementation(op, *kind):
        run = serve(op, *kind)
        if not op.endswith("backward"):
            return run
        return lambda *args, **options: (asked.append(args[8:11]), run(*args, **options))[1]

    monkeypatch.setattr(chunked, "implementation", implementation)
    for i, t in enumerate(inputs):
        t.requires_grad_(i in needed)
    step = chunked_policy_step(*inputs[:2], target, BOUNDS, linear_loss(upstream), bias=inputs[2], chunk_tokens=9)
    assert step.loss.requires_grad == bool(needed)
    assert asked == [tuple(i in needed for i in range(3))] * 3 if needed else not asked
    for i, g in zip(needed, torch.autograd.grad(step.loss, [inputs[i] for i in needed]) if needed else (), strict=True):
        assert torch.equal(g, wanted[i])


def test_low_precision_weights_are_summed_in_float32_and_rounded_once():
    (hidden, weight, _), target, upstream = problem(torch.bfloat16)
    step = chunked_policy_step(hidden, weight, target, BOUNDS, linear_loss(upstream), chunk_tokens=1)
    dx, dw = torch.autograd.grad(step.loss, (hidden, weight))
    x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    wanted = oracle.gradients(oracle.linear(x, w, target), (x, w), upstream)
    assert dx.dtype == dw.dtype == torch.bfloat16
    assert step.logp.dtype == torch.float32
    # Half a unit in the last place of bfloat16 is at most 2^-8 of a number, 2^-9 on average.
    assert oracle.relative_error(dw, wanted[1]) <= 4e-3
    assert oracle.relative_error(dx, wanted[0]) <= 4e-3


def test_under_no_grad_and_inference_mode_only_statistics_are_computed():
    (hidden, weight, _), target, upstream = problem()
    wanted = chunked_policy_step(hidden, weight, target, BOUNDS, linear_loss(upstream))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            step = chunked_policy_step(hidden, weight, target, BOUNDS, linear_loss(upstream))
        assert not step.loss.requires_grad
        assert torch.equal(step.loss, wanted.loss.detach())
        assert torch.equal(step.logp, wanted.logp)


def test_autocast_casts_the_head_and_gradients_keep_their_dtypes():
    (hidden, weight, bias), target, upstream = problem()
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight, bias)]

    def gradients(inputs):
        step = chunked_policy_step(
            *inputs[:2], target, BOUNDS, linear_loss(upstream), bias=inputs[2], chunk_tokens=9
        )
        return step.logp, *torch.autograd.grad(step.loss, inputs)

    wanted = gradients(low)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = gradients([low[0], weight, bias])  # as a model under autocast leaves them
    assert [t.dtype for t in actual] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    for a, w in zip(actual, wanted, strict=True):
        assert torch.equal(a, w.to(a.dtype))


def test_under_checkpoint():
    (hidden, weight, _), target, upstream = problem()

    def step(x, w):
        return chunked_policy_step(x * 1, w, target, BOUNDS, linear_loss(upstream), chunk_tokens=9).loss

    def gradients(run):
        hidden.grad = weight.grad = None
        run(hidden, weight).backward()  # reentrant checkpoints take no torch.autograd.grad
        return hidden.grad, weight.grad

    wanted = gradients(step)
    runs = [functools.partial(checkpoint, step, use_reentrant=reentrant) for reentrant in (False, True)]
    for run in runs:
        for a, w in zip(gradients(run), wanted, strict=True):
            assert torch.equal(a, w)


def test_a_compiled_function_is_split_around_it_and_a_compiled_loss_serves():
    torch._dynamo.reset()
    (hidden, weight, _), target, upstream = problem()
    loss_fn = linear_loss(upstream)

    def outer(x, w, loss_fn):
        return chunked_policy_step(x * 2, w, target, BOUNDS, loss_fn, chunk_tokens=9).loss * 3

    compiled_loss = torch.compile(loss_fn, backend="aot_eager", dynamic=True)
    wanted = chunked_policy_step(hidden * 2, weight, target, BOUNDS, loss_fn, chunk_tokens=9).loss * 3
    wanted = torch.autograd.grad(wanted, (hidden, weight))
    for loss in (
        torch.compile(outer, backend="aot_eager")(hidden, weight, loss_fn),
        outer(hidden, weight, compiled_loss),
    ):
        for a, w in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
            assert torch.equal(a, w)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(outer, backend="aot_eager", fullgraph=True)(hidden, weight, loss_fn)


def test_a_loss_without_gradient_and_an_empty_batch():
    (hidden, weight, _), target, _ = problem()
    step = chunked_policy_step(
        hidden, weight, target, BOUNDS, lambda logp, entropy: logp.new_tensor(2.0), chunk_tokens=9
    )
    assert step.loss.item() == 6.0
    assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(step.loss, (hidden, weight)))
    for bounds in ([0], [0, 0]):
        step = chunked_policy_step(hidden[:0], weight, target[:0], bounds, lambda logp, entropy: logp.sum())
        assert step.loss.item() == 0
        assert step.logp.shape == (0,)
        assert torch.autograd.grad(step.loss, weight)[0].count_nonzero() == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens": [0, 5, 22]}, ValueError, "cu_seqlens must rise from 0 to the number of tokens, 23"),
        ({"cu_seqlens": [1, 23]}, ValueError, "cu_seqlens must rise"),
        ({"cu_seqlens": [0, 9, 5, 23]}, ValueError, "cu_seqlens must rise"),
        ({"cu_seqlens": []}, ValueError, "cu_seqlens must rise"),
        ({"cu_seqlens": torch.tensor([0.0, 23.0])}, ValueError, "cu_seqlens must be int32 or int64"),
        ({"cu_seqlens": [0, 3.7, 23]}, TypeError, "cu_seqlens must be a tensor or a list of integers"),
        ({"cu_seqlens": None}, TypeError, "cu_seqlens must be a tensor or a list of integers"),
        ({"cu_seqlens": torch.tensor([0, 23], device="meta")}, ValueError, "cu_seqlens must be on a device that holds"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be a function"),
        ({"ignore_index": None}, ValueError, "ignore_index must be a 64-bit integer"),
        ({"backend": None}, ValueError, "backend must be one of"),
        ({"bias": [0.0]}, TypeError, "bias must be a tensor"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be a positive number"),
        ({"chunk_tokens": 2.5}, ValueError, "chunk_tokens must be a positive number"),
        ({"loss_fn": lambda logp, entropy: logp}, ValueError, "loss_fn must return a scalar tensor"),
        ({"loss_fn": lambda logp, entropy: 0.0}, ValueError, "loss_fn must return a scalar tensor: got float"),
        ({"weight": torch.zeros(9, 5)}, ValueError, "weight must be"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
    ],
)
def test_bad_arguments_are_named_in_one_line(change, error, message):
    (hidden, weight, _), target, _ = problem()
    args = {
        "hidden": hidden, "weight": weight, "target": target, "cu_seqlens": BOUNDS,
        "loss_fn": lambda logp, entropy: logp.sum(),
    }  # fmt: skip
    with pytest.raises(error, match=message) as caught:
        chunked_policy_step(**{**args, **change})
    assert "\n" not in str(caught.value)
