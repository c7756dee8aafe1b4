"""Loss and gradients of a linear head in one pass over chunks of whole sequences: 6 N V H operations, bounded memory.

A chunk's logits are made once, kept, reduced to log-probs and entropies, given to the loss function, turned into
gradients by what the loss asks for, and dropped. Recomputing them, as `linear_logp_entropy` does by default, costs
8 N V H; keeping all of them costs the memory of N x V. Chunks hold whole sequences, because losses such as the
entropy terms of `policy_loss` need the mean over a response.

The function reads `cu_seqlens` on the host and calls Python per chunk, so it runs eagerly: a function compiled
around it is split in two there (an error under fullgraph=True), and `loss_fn` may itself be compiled.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .arguments import check_index, head_options, linear_inputs, scaling
from .dispatch import check_backend, implementation
from .reference import Head, compute_dtype, store_row_bytes
from .results import ChunkedStep

# Stored logits of one chunk when `chunk_tokens` is not given: on a CPU several hundred rows, which is where larger
# products stop being faster; on a GPU enough that a read and a write of the float32 sum of dW do not count.
CHUNK_BYTES = {"cpu": 160 << 20, "cuda": 2 << 30}


@dataclass(frozen=True)
class Chunk:
    """The part of the batch that a call of the loss function sees."""

    tokens: slice  # of the packed batch
    sequences: slice  # of the batch's sequences
    cu_seqlens: Tensor  # [sequences + 1], from 0, on the device of hidden


def chunked_policy_step(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N] int32 or int64
    cu_seqlens: Tensor | Sequence[int],  # [B + 1]
    loss_fn: Callable[..., Tensor],
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> ChunkedStep:
    """Sum over chunks of `loss_fn(logp, entropy)`, with the gradients to hidden, weight and bias already made.

    Sequence i of the packed batch is tokens cu_seqlens[i]..cu_seqlens[i+1]; cu_seqlens is read on the host, so a
    list or CPU tensor is preferred (a CUDA tensor costs one synchronisation). A chunk is as many whole sequences as
    fit into `chunk_tokens` tokens (default: by memory, 160 MiB of logits on a CPU, 2 GiB on a GPU). A longer sequence
    is a chunk of its own, and its tokens beyond chunk_tokens are computed twice instead of stored.

    loss_fn takes (logp [n], entropy [n]) of a chunk, leaves that require gradients, and returns a scalar; with three
    required arguments it also gets the `Chunk` (tokens, sequences, cu_seqlens), to slice what else it needs. Chunk
    losses are added: normalise by totals of the batch, not of the chunk. It may be any PyTorch function; parameters
    of its own get no gradient. Example:

        def loss_fn(logp, entropy, chunk):
            return policy_loss(logp, old_logp[chunk.tokens], entropy, advantages[chunk.sequences], chunk.cu_seqlens,
                               mask[chunk.tokens], is_short[chunk.sequences], normalize=trained_tokens).loss

    Returns (loss [], logp [N], entropy [N]); the last two are detached, float32 (float64). The backward of the loss
    scales gradients that exist already, so it may be called again with retain_graph. They are summed and kept in
    float32 (for low-precision inputs twice the memory of hidden and weight, until the graph is freed) and rounded
    once, after scaling, so 1 / accumulation steps costs no precision. (On a GPU dL/dlogits is rounded to the inputs'
    dtype before: the loss scale that float16 needs belongs into loss_fn.) Under no_grad, or if nothing
    requires a gradient, only the statistics are computed.
    Other arguments and errors as in `linear_logp_entropy`.
    """
    # Traced, the loop over chunks and tiles would be unrolled into one graph per shape of the batch.
    step = torch.compiler.disable(_step) if torch.compiler.is_compiling() else _step
    return step(
        hidden, weight, target, cu_seqlens, loss_fn, bias, temperature, logit_scale, softcap, ignore_index,
        chunk_tokens, backend,
    )  # fmt: skip


def _step(
    hidden, weight, target, cu_seqlens, loss_fn, bias, temperature, logit_scale, softcap, ignore_index,
    chunk_tokens, backend,
) -> ChunkedStep:  # fmt: skip
    hidden, weight, bias = linear_inputs(hidden, weight, target, bias)
    check_index(ignore_index)
    check_backend(backend)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (logp, entropy): got {type(loss_fn).__name__}")
    scale, row_temperature = scaling(temperature, hidden)
    head = Head(bias, scale, row_temperature, logit_scale, head_options(logit_scale, softcap), ignore_index)
    bounds = _bounds(cu_seqlens, hidden.shape[0])
    if chunk_tokens is not None and (type(chunk_tokens) is not int or chunk_tokens < 1):
        raise ValueError(f"chunk_tokens must be a positive number of tokens: got {chunk_tokens!r}")
    row_bytes = store_row_bytes(weight.shape[0], hidden.dtype)
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"]) // row_bytes)
    if not isinstance(cu_seqlens, Tensor):
        cu_seqlens = torch.tensor(bounds)
    cu_seqlens = cu_seqlens.to(hidden.device, non_blocking=True)
    chunks = []
    for first, last in plan(bounds, chunk_tokens):
        cu = cu_seqlens[first : last + 1]
        chunks.append(Chunk(slice(bounds[first], bounds[last]), slice(first, last), cu - cu[:1]))

    inputs = (hidden, weight, bias)
    needs = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in inputs]
    run = _Run(hidden.detach(), weight.detach(), target, head, backend, needs, chunk_tokens * row_bytes)
    takes_chunk = _required_arguments(loss_fn) == 3
    loss = hidden.new_zeros((), dtype=compute_dtype(hidden.dtype))
    for chunk in chunks:
        loss = loss + run.chunk(chunk, loss_fn, takes_chunk)
    if any(needs):
        loss = _Scaled.apply(loss, *inputs, *run.gradients())
    return ChunkedStep(loss, run.logp, run.entropy)


def plan(bounds: Sequence[int], chunk_tokens: int) -> list[tuple[int, int]]:
    """Chunks as ranges of sequences: greedy, in order, at most chunk_tokens tokens unless it is one sequence."""
    chunks, first = [], 0
    for i in range(1, len(bounds)):
        if bounds[i] - bounds[first] > chunk_tokens and i - 1 > first:
            chunks.append((first, i - 1))
            first = i - 1
    if first < len(bounds) - 1:
        chunks.append((first, len(bounds) - 1))
    return chunks


class _Run:
    """The batch, and what accumulates over its chunks."""

    def __init__(self, hidden, weight, target, head: Head, backend: str, needs: list[bool], store_bytes: int) -> None:
        self.hidden, self.weight, self.target, self.head = hidden, weight, target, head
        self.needs, self.store_bytes = needs, store_bytes if any(needs) else 0
        kind = hidden.device.type, hidden.dtype, backend
        self.forward = implementation("linear_logp_entropy", *kind)
        self.backward = implementation("linear_logp_entropy_backward", *kind)
        dtype = compute_dtype(hidden.dtype)
        new = {"dtype": dtype, "device": hidden.device}
        self.logp, self.entropy = (torch.zeros(hidden.shape[0], **new) for _ in range(2))
        self.dx = torch.zeros(hidden.shape, **new) if needs[0] else None
        self.dw = torch.zeros(weight.shape, **new) if needs[1] else None
        self.dbias = torch.zeros(weight.shape[0], **new) if needs[2] else None

    def chunk(self, chunk: Chunk, loss_fn: Callable[..., Tensor], takes_chunk: bool) -> Tensor:
        """Loss of one chunk, detached; adds its gradients to the sums."""
        tokens = chunk.tokens
        head = self.head
        if head.row_temperature is not None:
            head = head._replace(row_temperature=head.row_temperature[tokens])
        hidden, target = self.hidden[tokens], self.target[tokens]
        device = hidden.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            stats, store = self.forward(hidden, self.weight, target, head, self.store_bytes)
            self.logp[tokens], self.entropy[tokens] = stats.logp, stats.entropy
        # Copies: the backward needs the statistics, whatever loss_fn writes into what it is given.
        leaves = [t.clone().requires_grad_(any(self.needs)) for t in (stats.logp, stats.entropy)]
        with torch.set_grad_enabled(any(self.needs)):
            loss = loss_fn(*leaves, chunk) if takes_chunk else loss_fn(*leaves)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor: got {got}")
        if loss.requires_grad and any(self.needs):
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            with torch.no_grad(), torch.autocast(device, enabled=False):
                dx, _, dbias = self.backward(
                    *grads, hidden, self.weight, target, stats, store, head, *self.needs, weight_sum=self.dw,
                    rounded=False,
                )  # fmt: skip
                if dx is not None:
                    self.dx[tokens] = dx
                if dbias is not None:
                    self.dbias += dbias
        return loss.detach()

    def gradients(self) -> tuple[Tensor | None, ...]:
        """dX, dW, dbias in the compute dtype."""
        return self.dx, self.dw, self.dbias


class _Scaled(torch.autograd.Function):
    """A loss whose gradients to hidden, weight and bias are known, in the compute dtype."""

    @staticmethod
    def forward(ctx, loss, hidden, weight, bias, *gradients):
        ctx.save_for_backward(*gradients)
        ctx.dtype = hidden.dtype
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, *(g if g is None else _scaled(g, grad, ctx.dtype) for g in ctx.saved_tensors), None, None, None


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, rounded once, to `dtype`."""
    # Looking costs nothing on a CPU, and saves a second copy of dW in the usual loss.backward().
    if factor.device.type == "cpu" and factor == 1:
        return gradient.to(dtype)
    # No product of the size of dW in float32 beside the result.
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _bounds(cu_seqlens: Tensor | Sequence[int], n: int) -> list[int]:
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.device.type == "meta":
            raise ValueError("cu_seqlens must be on a device that holds its values: got meta")
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be int32 or int64 [B + 1]: got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            )
        cu_seqlens = cu_seqlens.tolist()
    try:
        bounds = [operator.index(b) for b in cu_seqlens]
    except TypeError as error:
        raise TypeError(f"cu_seqlens must be a tensor or a list of integers: {error}") from None
    rising = all(a <= b for a, b in pairwise(bounds))
    if not bounds or bounds[0] != 0 or bounds[-1] != n or not rising:
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {n}: got {bounds[:3]}..{bounds[-1:]}")
    return bounds


def _required_arguments(fn: Callable[..., Tensor]) -> int:
    try:
        # A module's own call takes anything.
        parameters = inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn).parameters.values()
    except ValueError:  # a builtin without a signature
        return 2
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)
