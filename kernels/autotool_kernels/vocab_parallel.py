"""`linear_logp_entropy` with the vocabulary sharded over the ranks of a process group (a tensor-parallel head).

Each rank computes the statistics of its own rows of the weight, one all-gather of four numbers per token joins them,
in the order of the ranks, so that every rank holds the same bits. The backward needs no exchange but one sum of dX.
All ranks must call in step with the same hidden, target and options. Runs eagerly: a function compiled around it
is split in two there.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .arguments import check_index, check_store, head_options, linear_inputs, scaling
from .dispatch import check_backend
from .library import ops
from .reference import RowStats, compute_dtype, merge
from .results import LogpEntropy


def merge_vocab_parallel(
    m: Tensor,  # [N] maximum of the rank's scaled logits z
    s: Tensor,  # [N] sum of e^(z - m)
    u: Tensor,  # [N] sum of e^(z - m) (z - m)
    target_logit: Tensor,  # [N] z of the label; NaN or -inf on ranks that do not own it
    group: dist.ProcessGroup | None = None,
) -> RowStats:
    """(logp, entropy, row_max, log_sum), each [N], of the whole vocabulary, from the statistics of its shards.

    Deterministic: gathered, then merged in the order of the ranks; (-inf, 0, 0) stands for an empty shard. logp is
    NaN where every rank passes NaN (no rank owns the label). The derivation of the merge is in kernels/README.md.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: torch.distributed is not initialised")
    packed = torch.stack((m, s, u, target_logit))
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed, group=group)
    return merge_shards([tuple(shard) for shard in gathered])


def merge_shards(shards: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> RowStats:
    """`merge_vocab_parallel` of (m, s, u, target_logit) that are all here."""
    *total, label = shards[0]
    for *part, part_label in shards[1:]:
        total, label = merge(total, part), torch.fmax(label, part_label)
    m, s, u = total
    log_s = s.log()
    logp = ((label - m) - log_s).clamp(max=0.0)
    return RowStats(logp, (log_s - u / s).clamp(min=0.0), m, log_s)


def vocab_parallel_linear_logp_entropy(
    hidden: Tensor,  # [N, H], the same on every rank
    weight_shard: Tensor,  # [V_r, H], rows vocab_start..vocab_start + V_r of the weight
    target: Tensor,  # [N] int32 or int64, labels of the whole vocabulary
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,  # [V_r], the shard's
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    store_bytes: int = 0,
    backend: str = "auto",
) -> LogpEntropy:
    """`linear_logp_entropy` of a weight whose rows are spread over `group`; shards may differ in size.

    Returns the same (logp [N], entropy [N]) on every rank; the gradients of the outputs must be the same there too.
    The gradient to hidden is summed over the group in float32 (float64), so it is complete on every rank (for
    low-precision inputs each rank's share is rounded once before the sum); weight_shard and bias get their own rows'.
    `store_bytes` counts on each rank. A label that no rank owns gives a NaN logp. Other arguments and errors as in
    `linear_logp_entropy`; ValueError if torch.distributed is not initialised.
    """
    hidden, weight_shard, bias = linear_inputs(hidden, weight_shard, target, bias)
    check_store(store_bytes)
    check_index(ignore_index)
    check_backend(backend)
    if not isinstance(vocab_start, int) or vocab_start < 0:
        raise ValueError(f"vocab_start must be the index of the shard's first row, 0 or more: got {vocab_start!r}")
    scale, row_temperature = scaling(temperature, hidden)
    options = (scale, logit_scale, head_options(logit_scale, softcap), -100, backend)
    store_bytes = store_bytes if torch.is_grad_enabled() else 0
    run = torch.compiler.disable(_VocabParallel.apply) if torch.compiler.is_compiling() else _VocabParallel.apply
    return LogpEntropy(
        *run(
            hidden, weight_shard, bias, target, row_temperature, vocab_start, ignore_index, store_bytes, options, group
        )
    )


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, row_temperature, start, ignore_index, store_bytes, options, group):
        live, v = target != ignore_index, weight.shape[0]
        owned = live & (target >= start) & (target < start + v)
        # Ignored rows are -100 here, whatever they were: a caller's ignore_index may be another row's local label.
        local = torch.where(owned, target - start, 0).masked_fill_(~live, -100)
        outputs = ops.linear_logp_entropy(
            hidden, weight, local, bias, row_temperature, *options, store_bytes if any(ctx.needs_input_grad) else 0
        )
        shard, store = RowStats(*outputs[:4]), outputs[4:]
        s = shard.log_sum.exp()
        # A shard whose tokens are all excluded (bias -inf) has s = 0, where entropy and logp are NaN.
        u = torch.where(s > 0, s * (shard.log_sum - shard.entropy), 0.0)
        label = torch.where(s > 0, (shard.logp + shard.log_sum) + shard.row_max, float("-inf"))
        stats = merge_vocab_parallel(shard.row_max, s, u, label.masked_fill_(~owned, float("nan")), group)
        logp, entropy, row_max, log_sum = (column.masked_fill_(~live, 0.0) for column in stats)
        # In the backward a label of another rank lies outside the shard, and adds no 1[j = y].
        local.masked_fill_(live & ~owned, v)
        ctx.save_for_backward(hidden, weight, local, entropy, row_max, log_sum, *store, bias, row_temperature)
        ctx.options, ctx.group = options, group
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        needs = ctx.needs_input_grad[:3]
        gradients = ops.linear_logp_entropy_backward(grad_logp, grad_entropy, *ctx.saved_tensors, *ctx.options, *needs)
        dx, dw, dbias = (g if need else None for g, need in zip(gradients, needs, strict=True))
        if dx is not None:
            total = dx.to(compute_dtype(dx.dtype))
            dist.all_reduce(total, group=ctx.group)
            dx = total.to(dx.dtype)
        return dx, dw, dbias, *[None] * 7
