"""AdamW with 8-bit moments from torchao, and its state as plain tensors for a checkpoint.

A moment of at least 4,096 numbers is kept as 8-bit codes with one float32 scale for every 256 of them, smaller ones
(and those that 256 does not divide) as float32. A continued run gets the very codes back. Under several processes
blocks lie within a rank's rows, so such a state can be taken up only by as many processes as wrote it; `flatten` then
keeps each rank's part as bytes. The arithmetic is torchao's: compiled on a GPU, eager on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import torch as safetensors
from torch.distributed.tensor import DTensor, Shard

from autotool_fast import distributed
from autotool_fast.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

CODES, SCALE, RANKS = "codes", "scale", "ranks"
LENGTH_BYTES = 8
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def adamw_8bit(
    parameters: Iterable[torch.nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW on float32 parameters (or DTensors of them) whose moments have 8 bits."""
    from torchao.optim import AdamW8bit

    class Adam(AdamW8bit):
        def step(self, closure: Any = None) -> Any:
            on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
            with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
                return super().step(closure)

    return Adam(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


def flatten(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State tensors as plain ones: a moment under "<name>/codes" and "<name>/scale".

    Those that ranks share out become "<name>/ranks", a uint8 DTensor with one row for each rank; all ranks must call.
    """
    plain: dict[str, torch.Tensor] = {}
    local: dict[str, bytes] = {}
    meshes: list[DeviceMesh] = []
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            meshes.append(tensor.device_mesh)
            with torch.no_grad():
                local[name] = safetensors.save(_parts(tensor.to_local()))
        else:
            plain |= {f"{name}/{part}" if part else name: value for part, value in _parts(tensor).items()}
    widths = distributed.gather([len(data) for data in local.values()]) if local else []
    for place, (name, data) in enumerate(local.items()):
        row = len(data).to_bytes(LENGTH_BYTES, "little") + data
        row += bytes(LENGTH_BYTES + max(width[place] for width in widths) - len(row))
        row_tensor = torch.frombuffer(bytearray(row), dtype=torch.uint8)[None]
        plain[f"{name}/{RANKS}"] = DTensor.from_local(row_tensor, meshes[0], [Shard(0)])
    return plain


def restore(
    tensors: Mapping[str, torch.Tensor], parameters: Sequence[torch.nn.Parameter], mesh: DeviceMesh | None
) -> dict[str, torch.Tensor]:
    """What `flatten` was given.

    Args:
        tensors: named "<optimizer>/<index of a parameter>/<moment>/<part>"; others pass through.
        parameters: the optimizer's, in its order.
        mesh: the ranks that share the state out now, if any do.

    Raises:
        UserError: another number of processes wrote it.
    """
    values: dict[str, Any] = {}
    for name, tensor in tensors.items():
        moment, _, part = name.rpartition("/")
        if part not in (CODES, RANKS):
            if part != SCALE:
                values[name] = tensor
            continue
        wrote = tensor.shape[0] if part == RANKS else 1
        if wrote != distributed.world():
            remedy = f"continue with {wrote}, or start a new run with --optim.kind adamw"
            problem = f"8-bit state of {wrote} processes cannot be taken up by {distributed.world()}"
            raise UserError(problem, where="optim.kind", remedy=remedy)
        if part == CODES:
            values[moment] = _moment(moment, {CODES: tensor, SCALE: tensors[f"{moment}/{SCALE}"]})
            continue
        assert mesh is not None
        assert isinstance(tensor, DTensor)
        data = bytes(tensor.to_local()[0].tolist())
        end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
        like = parameters[int(moment.split("/")[1])]
        values[moment] = DTensor.from_local(
            _moment(moment, safetensors.load(data[LENGTH_BYTES:end])).to(like.device),
            mesh,
            [Shard(0)],
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
    return values


def _parts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Plain tensors by the name of the part; a tensor that is plain itself has none."""
    if not hasattr(tensor, CODES):
        return {"": tensor.detach()}
    return {CODES: tensor.codes, SCALE: tensor.scale}


def _moment(name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "" in parts:
        return parts[""]
    from torchao.optim.subclass_8bit import OptimState8bit

    codes, scale = parts[CODES], parts[SCALE]
    signed = SIGNED[name.rpartition("/")[2]]
    block = codes.numel() // scale.numel()
    made = OptimState8bit.zeros(codes.shape, signed, block, codes.device, dtype=torch.float32)
    made.codes.copy_(codes)
    made.scale.copy_(scale)
    return made
