"""The model that a stage trains under several processes: parameters, gradients and optimizer state sharded by FSDP2.

Each rank keeps the whole model as well, in its own dtype, for sampling, evaluation and export; the shards are float32
(or float64). After every optimizer step the whole model takes over what the shards became. FSDP's hooks run in the
training forward alone, where all ranks take the same number of micro-batches (`warmup.micro_batches`). Gradients are
sums over ranks, since losses are normalised by global counts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from autotool_fast import distributed
from autotool_fast.loop import Optimizers
from autotool_fast.metrics import phase
from autotool_fast.policy import PolicyModule

FULL_PRECISION = (torch.float32, torch.float64)


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> PolicyModule:
    """A sharded copy of the model, decoder layer by decoder layer, with float32 parameters where it trains.

    Beside the shards no more than one layer, or the embeddings and the head, is copied at a time. The forward pass of
    a low-precision model runs in its own dtype; gradients are reduced in float32.
    """
    low = model.dtype not in FULL_PRECISION
    precision = (
        # The layers' inputs have the model's dtype already; what else they are given is not to be cast.
        MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if low
        else MixedPrecisionPolicy()
    )
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    memo: dict[int, Any] = {id(model.config): model.config}  # one choice of attention for both

    def sharded(module: torch.nn.Module) -> torch.nn.Module:
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.dtype not in FULL_PRECISION:
                parameter.data = parameter.data.float()
        fully_shard(module, mesh=mesh, mp_policy=precision)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it sums
        return module

    for layer in [module for module in model.modules() if type(module).__name__ in kinds]:
        sharded(copy.deepcopy(layer, memo))
        for parameter in layer.parameters():
            memo.pop(id(parameter))  # the only reference to the unsharded copy
    return sharded(PolicyModule(copy.deepcopy(model, memo)))


class ShardedOptimizers(Optimizers):
    """`Optimizers` over the shards of a model, which is kept equal to them.

    Its state is made of DTensors, under the names that a single process gives to the same state; 8-bit state has names
    of its own.
    """

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        assert options.get("kind") != "offload", "plan.check refuses it"
        self.mesh = init_device_mesh(model.device.type, (distributed.world(),))
        super().__init__(shard(model, self.mesh), **options)
        pairs = zip(model.parameters(), self.trained.parameters(), strict=True)
        self._pairs = [(whole, part) for whole, part in pairs if whole.requires_grad]
        self._low = [part for whole, part in self._pairs if whole.dtype not in FULL_PRECISION]

    def step(self, max_norm: float, scale: float = 1.0, *, measured: Iterable[float] = ()) -> tuple[float, bool]:
        """As in one process; `measured` must be the same on every rank."""
        norm, finite = super().step(max_norm, scale, measured=measured)
        if finite:
            with phase("sync"), torch.no_grad():
                for whole, part in self._pairs:
                    whole.copy_(part.full_tensor())
        return norm, finite

    def _clip(self, max_norm: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, max_norm).full_tensor())

    def pack(self) -> tuple[dict[str, torch.Tensor], list[Any]]:
        """State as (tensors, JSON-able rest); what belongs to a parameter is a DTensor."""
        tensors, rest = super().pack()
        return tensors | {f"float32/{i}": part.detach() for i, part in enumerate(self._low)}, rest

    def unpack(self, tensors: Mapping[str, torch.Tensor], rest: Sequence[Any]) -> None:
        """Restore what `pack` took, here or in one process, into a model that has its weights back already."""
        mine = {k: self._part(v) for k, v in tensors.items() if k.startswith("optimizer")}
        super().unpack(mine, rest)
        with torch.no_grad():
            for whole, part in self._pairs:
                part.copy_(self._part(whole.detach().to(part.dtype)))
            for i, part in enumerate(self._low):
                part.copy_(self._part(tensors[f"float32/{i}"]))

    def _part(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rank's share of a tensor of a parameter's shape; counters and what is shared out already stay."""
        if isinstance(tensor, DTensor) or not tensor.ndim:
            return tensor
        return distribute_tensor(tensor.to(self.mesh.device_type), self.mesh, [Shard(0)], src_data_rank=None)
