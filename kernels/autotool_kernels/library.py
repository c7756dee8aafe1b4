"""The torch.library registrations: schemas, shape functions for tracing, and autograd formulas.

The ops are opaque to torch.compile and choose their backend when they run. Statistics needed by a backward
are extra outputs; the public functions in `api` hide them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .dispatch import implementation
from .policy import METRICS
from .reference import Head, RowStats, Store, compute_dtype, new_store

NAMESPACE = "autotool_kernels"
_STATS = "(Tensor logp, Tensor entropy, Tensor row_max, Tensor log_sum)"
_HEAD = (
    "Tensor? bias, Tensor? row_temperature, float temperature, float logit_scale, float softcap, int ignore_index, "
    "str backend"
)
_SCALING = "float temperature, Tensor? row_temperature, int ignore_index, str backend"
_GRADS = "Tensor? grad_logp, Tensor? grad_entropy"
SCHEMAS = (
    f"linear_logp_entropy(Tensor hidden, Tensor weight, Tensor target, {_HEAD}, int store_bytes) -> "
    "(Tensor logp, Tensor entropy, Tensor row_max, Tensor log_sum, Tensor store_logits, Tensor store_max)",
    f"linear_logp_entropy_backward({_GRADS}, Tensor hidden, Tensor weight, Tensor target, Tensor entropy, "
    f"Tensor row_max, Tensor log_sum, Tensor store_logits, Tensor store_max, {_HEAD}, bool need_hidden, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    f"logits_logp_entropy(Tensor logits, Tensor target, {_SCALING}, bool inplace_backward) -> {_STATS}",
    f"logits_logp_entropy_backward({_GRADS}, Tensor logits, Tensor target, Tensor entropy, Tensor row_max, "
    f"Tensor log_sum, {_SCALING}) -> Tensor",
    f"logits_logp_entropy_backward_({_GRADS}, Tensor(a!) logits, Tensor target, Tensor entropy, Tensor row_max, "
    f"Tensor log_sum, {_SCALING}) -> ()",
    "policy_loss(Tensor logp, Tensor old_logp, Tensor entropy, Tensor advantages, Tensor cu_seqlens, "
    "Tensor mask, Tensor is_short, float[] gate, Tensor? gate_tensor, float clip_low, float clip_high, "
    "int normalize, float constant, str backend) -> (Tensor loss, Tensor sequence_entropy, Tensor metrics, "
    "Tensor grad_logp, Tensor grad_entropy)",
    "sample_logp_entropy(Tensor logits, float temperature, Tensor? row_temperature, Tensor seed, "
    "Tensor offset, str backend) -> (Tensor token, Tensor logp, Tensor entropy)",
)

_lib = torch.library.Library(NAMESPACE, "DEF")
for _schema in SCHEMAS:
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
ops = getattr(torch.ops, NAMESPACE)


def _register(kind: str):
    """`kind` is "run" (the implementation) or "fake" (its shapes); the op has the function's name."""

    def decorate(fn):
        name = fn.__name__.removesuffix("_fake")
        if kind == "run":
            _lib.impl(name, _outside_autocast(fn), "CompositeExplicitAutograd")
        else:
            torch.library.register_fake(f"{NAMESPACE}::{name}", fn, lib=_lib)
        return fn

    return decorate


def _outside_autocast(fn):
    """Autocast would round the logits to its low precision, which the ops promise not to do."""

    @functools.wraps(fn)
    def run(*args):
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        if not torch.is_autocast_enabled(device):
            return fn(*args)
        with torch.autocast(device, enabled=False):
            return fn(*args)

    return run


@_register("run")
def linear_logp_entropy(
    hidden, weight, target, bias, row_temperature, temperature, logit_scale, softcap, ignore_index, backend, store_bytes
):
    """The four statistics of every row and the stored logits, by the backend that serves these inputs."""
    run = implementation("linear_logp_entropy", hidden.device.type, hidden.dtype, backend)
    head = Head(bias, temperature, row_temperature, logit_scale, softcap, ignore_index)
    stats, store = run(hidden, weight, target, head, store_bytes)
    return *stats, *store


@_register("run")
def linear_logp_entropy_backward(
    grad_logp, grad_entropy, hidden, weight, target, entropy, row_max, log_sum, store_logits, store_max,
    bias, row_temperature, temperature, logit_scale, softcap, ignore_index, backend,
    need_hidden, need_weight, need_bias,
):  # fmt: skip
    """dL/dhidden, dL/dweight, dL/dbias; an empty tensor for each that is not needed."""
    run = implementation("linear_logp_entropy_backward", hidden.device.type, hidden.dtype, backend)
    head = Head(bias, temperature, row_temperature, logit_scale, softcap, ignore_index)
    gradients = run(
        grad_logp, grad_entropy, hidden, weight, target, RowStats(entropy, entropy, row_max, log_sum),
        Store(store_logits, store_max), head, need_hidden, need_weight, need_bias,
    )  # fmt: skip
    # An op cannot return None.
    return tuple(hidden.new_empty(0) if g is None else g for g in gradients)


@_register("run")
def logits_logp_entropy(logits, target, temperature, row_temperature, ignore_index, backend, inplace_backward):
    """The four statistics of every row."""
    run = implementation("logits_logp_entropy", logits.device.type, logits.dtype, backend)
    return tuple(run(logits, target, temperature, row_temperature, ignore_index))


@_register("run")
def logits_logp_entropy_backward(
    grad_logp, grad_entropy, logits, target, entropy, row_max, log_sum,
    temperature, row_temperature, ignore_index, backend,
):  # fmt: skip
    """dL/dlogits in a new tensor."""
    run = implementation("logits_logp_entropy_backward", logits.device.type, logits.dtype, backend)
    stats = RowStats(entropy, entropy, row_max, log_sum)
    return run(grad_logp, grad_entropy, logits, target, stats, temperature, row_temperature, ignore_index)


@_register("run")
def logits_logp_entropy_backward_(
    grad_logp, grad_entropy, logits, target, entropy, row_max, log_sum,
    temperature, row_temperature, ignore_index, backend,
):  # fmt: skip
    """dL/dlogits, written over the logits."""
    run = implementation("logits_logp_entropy_backward", logits.device.type, logits.dtype, backend)
    stats = RowStats(entropy, entropy, row_max, log_sum)
    run(grad_logp, grad_entropy, logits, target, stats, temperature, row_temperature, ignore_index, out=logits)


@_register("run")
def policy_loss(logp, *args):
    """Loss, responses' entropies, metrics, and the two gradients that the backward pass scales."""
    *args, backend = args
    return tuple(implementation("policy_loss", logp.device.type, logp.dtype, backend)(logp, *args))


@_register("run")
def sample_logp_entropy(logits, temperature, row_temperature, seed, offset, backend):
    """Token, log-prob and entropy of every row."""
    run = implementation("sample_logp_entropy", logits.device.type, logits.dtype, backend)
    return tuple(run(logits, temperature, row_temperature, seed, offset))


@_register("fake")
def linear_logp_entropy_fake(
    hidden, weight, target, bias, row_temperature, temperature, logit_scale, softcap, ignore_index, backend, store_bytes
):
    """Shapes and dtypes of `linear_logp_entropy`."""
    dtype = compute_dtype(hidden.dtype)
    stats = [hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(4)]
    return *stats, *new_store(hidden, hidden.shape[0], weight.shape[0], store_bytes)


@_register("fake")
def linear_logp_entropy_backward_fake(grad_logp, grad_entropy, hidden, weight, *rest):
    """Shapes and dtypes of `linear_logp_entropy_backward`."""
    bias, (need_hidden, need_weight, need_bias) = rest[6], rest[-3:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        bias.new_empty(bias.shape) if need_bias else hidden.new_empty(0),
    )


@_register("fake")
def logits_logp_entropy_fake(logits, target, temperature, row_temperature, ignore_index, backend, inplace_backward):
    """Shapes and dtypes of `logits_logp_entropy`."""
    dtype = compute_dtype(logits.dtype)
    return tuple(logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(4))


@_register("fake")
def logits_logp_entropy_backward_fake(
    grad_logp, grad_entropy, logits, target, entropy, row_max, log_sum,
    temperature, row_temperature, ignore_index, backend,
):  # fmt: skip
    """Shape and dtype of `logits_logp_entropy_backward`."""
    return logits.new_empty(logits.shape)


@_register("fake")
def logits_logp_entropy_backward__fake(*args):
    """The op in place returns nothing."""
    return None


@_register("fake")
def policy_loss_fake(logp, old_logp, entropy, advantages, *args):
    """Shapes and dtypes of `policy_loss`."""
    dtype = torch.promote_types(logp.dtype, torch.float32)
    return (
        logp.new_empty((), dtype=dtype),
        entropy.new_empty(advantages.shape[0], dtype=dtype),
        logp.new_empty(len(METRICS), dtype=torch.float32),
        logp.new_empty(logp.shape),
        entropy.new_empty(entropy.shape),
    )


@_register("fake")
def sample_logp_entropy_fake(logits, temperature, row_temperature, seed, offset, backend):
    """Shapes and dtypes of `sample_logp_entropy`."""
    rows, dtype = logits.shape[0], compute_dtype(logits.dtype)
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
    )


def _save_linear(ctx, inputs, output):
    hidden, weight, target, bias, row_temperature, *ctx.options, _ = inputs
    _, entropy, *rest = output
    ctx.save_for_backward(hidden, weight, target, entropy, *rest, bias, row_temperature)
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)


def _linear_gradient(ctx, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = ops.linear_logp_entropy_backward(grad_logp, grad_entropy, *ctx.saved_tensors, *ctx.options, *needs)
    dx, dw, dbias = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return dx, dw, None, dbias, *[None] * 7


def _save_logits(ctx, inputs, output):
    logits, target, ctx.temperature, row_temperature, ctx.ignore_index, ctx.backend, ctx.inplace = inputs
    _, entropy, row_max, log_sum = output
    ctx.save_for_backward(logits, target, entropy, row_max, log_sum, row_temperature)
    ctx.mark_non_differentiable(row_max, log_sum)
    ctx.set_materialize_grads(False)


def _logits_gradient(ctx, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_):
    *saved, row_temperature = ctx.saved_tensors
    arguments = (
        grad_logp, grad_entropy, *saved, ctx.temperature, row_temperature, ctx.ignore_index, ctx.backend
    )  # fmt: skip
    if ctx.inplace:
        ops.logits_logp_entropy_backward_(*arguments)
        # The op runs below autograd: whoever saved the logits must notice that they are gone.
        torch.autograd.graph.increment_version(saved[0])
        dz = saved[0].detach()
    else:
        dz = ops.logits_logp_entropy_backward(*arguments)
    return dz, *[None] * 6


def _save_policy(ctx, inputs, output):
    _, *detached = output
    ctx.save_for_backward(*detached[-2:])
    ctx.mark_non_differentiable(*detached)
    ctx.set_materialize_grads(False)


def _policy_gradient(ctx, grad_loss: Tensor | None, *_):
    grads = [None] * 14
    if grad_loss is not None:
        dlogp, dentropy = ctx.saved_tensors
        # The factor is not rounded to a low precision: all gradients would share its error.
        dtype = grad_loss.dtype
        if ctx.needs_input_grad[0]:
            grads[0] = (dlogp.to(dtype) * grad_loss).to(dlogp.dtype)
        if ctx.needs_input_grad[2]:
            grads[2] = (dentropy.to(dtype) * grad_loss).to(dentropy.dtype)
    return tuple(grads)


def _first_order(name: str, gradient):
    """`gradient`, whose results raise when they are differentiated themselves."""
    message = f"{name} has no second derivative"

    @functools.wraps(gradient)
    def run(ctx, *upstream):
        with torch.no_grad():
            found = gradient(ctx, *upstream)
        if not torch.is_grad_enabled():  # nobody asked for a graph of the gradients
            return found
        made = [i for i, g in enumerate(found) if g is not None]
        refuse = torch._C._functions.DelayedError(message.encode(), len(made))
        guarded = refuse(*(found[i].detach().requires_grad_() for i in made))
        guarded = dict(zip(made, guarded if isinstance(guarded, tuple) else (guarded,), strict=True))
        return tuple(guarded.get(i) for i in range(len(found)))

    return run


for _name, _gradient, _save in (
    ("linear_logp_entropy", _linear_gradient, _save_linear),
    ("logits_logp_entropy", _logits_gradient, _save_logits),
    ("policy_loss", _policy_gradient, _save_policy),
):
    torch.library.register_autograd(
        f"{NAMESPACE}::{_name}", _first_order(_name, _gradient), setup_context=_save, lib=_lib
    )
