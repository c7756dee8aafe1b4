"""Checkpoints that are whole or absent, and that carry everything a run needs to continue bit for bit.

    step-00000040/
      model/               Hugging Face folder: AutoModelForCausalLM.from_pretrained loads it (LoRA: the adapter alone)
      tensors.safetensors  optimizer state, random-generator states, anything else that is a tensor
      sharded/             of several processes: what they share out (torch.distributed.checkpoint's safetensors)
      state.json           counters, controllers, optimizer hyper-parameters
      manifest.json        format, step, and the size and SHA-256 of every other file; written last

Guarantees: a checkpoint appears under its name only after all of it, manifest included, is on the disk; one
that is damaged afterwards, has a file too many or another format is recognised, named and passed over; reading changes
nothing and may go on beside a process that saves; nothing is pickled; any number of processes can restore it,
whatever number wrote it. What goes into `tensors` and `state` is left to the stages. Restore the random generators
last: building a model draws from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotool_fast import distributed, files
from autotool_fast.errors import UserError, cannot_write

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = "autotool_fast.checkpoint/1"
MANIFEST, STATE, TENSORS, MODEL = "manifest.json", "state.json", "tensors.safetensors", "model"
SHARDED = "sharded"
STEP_NAME = re.compile(r"step-(\d{8,})")
ASIDE, TEMPORARY = ".old-", ".tmp-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int

    @property
    def model(self) -> Path:
        """The Hugging Face model folder."""
        return self.path / MODEL

    def state(self) -> dict[str, Any]:
        """The JSON-able state that was saved."""
        return json.loads((self.path / STATE).read_text(encoding="utf-8"))

    def tensors(self, mesh: DeviceMesh | None = None) -> dict[str, torch.Tensor]:
        """The tensors that were saved, on the CPU.

        Args:
            mesh: the ranks over which to share out, by rows, those that were saved so; all of them must call.
        """
        from safetensors.torch import load_file

        tensors = load_file(self.path / TENSORS)
        if (self.path / SHARDED).is_dir():
            tensors |= _load_sharded(self.path / SHARDED, mesh)
        return tensors

    def load_weights(self, model: PreTrainedModel) -> None:
        """Copy the saved weights into `model`, in place, so that optimizers keep their parameters."""
        from autotool_fast import adapters, loading

        if adapters.present(model):
            adapters.load_weights(model, self.model)
            return
        with no_progress_bars():
            loading.refuse_pickles(self.model, local=True)
            saved = type(model).from_pretrained(
                self.model, config=model.config, dtype=model.dtype, local_files_only=True, use_safetensors=True
            )
        model.load_state_dict(saved.state_dict())


def save(
    directory: Path,
    step: int,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep_last: int = 2,
) -> Checkpoint:
    """Write the checkpoint of `step` below `directory`, then remove older ones beyond `keep_last`.

    Checkpoints of later steps are removed too: they belong to a continuation that was abandoned. In several processes
    all call it: each writes its part of the DTensors among `tensors`, rank 0 the rest.

    Raises:
        UserError: the disk refuses the write; what was there before is untouched.
        ValueError, TypeError: `state` is not JSON-able or holds a non-finite number.
    """
    from safetensors import SafetensorError

    assert keep_last >= 1
    final = directory / _name(step)
    temporary = directory / f"{TEMPORARY}{final.name}-{distributed.on_main(os.getpid)}"

    def begin() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        _recover(directory)
        temporary.mkdir()

    def finish() -> None:
        _write_contents(temporary, step, model, tokenizer, tensors, state)
        _publish(temporary, final)

    try:
        distributed.on_main(begin)
        if distributed.world() > 1:
            tensors = _save_sharded(temporary / SHARDED, tensors)
        distributed.on_main(finish)
    except (OSError, SafetensorError) as error:
        raise cannot_write(error, final) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if distributed.is_main():
        found = _folders(directory)
        kept = [s for s in sorted(found) if s <= step][-keep_last:]
        for old, (path, _) in found.items():
            if old not in kept:
                _remove(path)
    return Checkpoint(final, step)


def latest(
    directory: Path, warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr)
) -> Checkpoint | None:
    """The newest checkpoint below `directory` that is whole, or None.

    Args:
        warn: called with one line for every checkpoint that is passed over.

    Raises:
        UserError: none is whole, and one was written in another format version.
    """
    refused: UserError | None = None
    passed_over: set[_Folder] = set()
    while left := {step: folder for step, folder in _folders(directory).items() if folder not in passed_over}:
        step = max(left)
        path, _ = left[step]
        try:
            problem = damage(path)
        except UserError as error:
            problem, refused = error.what, refused or error
        if problem is None:
            return Checkpoint(path, step)
        if _folders(directory).get(step) != left[step]:
            continue  # a process that saves has replaced or removed it meanwhile
        passed_over.add(left[step])
        warn(f"{path}: {problem}; passed over")
    if refused is not None:
        raise refused
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file is as its manifest says.

    Raises:
        UserError: the manifest names another format version.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, step = str(manifest["format"]), int(manifest["step"])
        recorded = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        present = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()} - {MANIFEST}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return f"{MANIFEST} cannot be read"
    if version != FORMAT:
        problem = f"has format {version!r}, this version reads {FORMAT!r}"
        raise UserError(problem, where=str(path), remedy="resume with the version that wrote it")
    if path.name.removeprefix(ASIDE) != _name(step):
        return f"{MANIFEST} is of step {step}"
    for name in (STATE, TENSORS):
        if name not in recorded:
            return f"{MANIFEST} does not list {name}"
    if too_many := sorted(present - recorded.keys()):
        return f"{MANIFEST} does not list {too_many[0]}"
    for name, (size, sha256) in recorded.items():
        if name not in present:
            return f"{name} is missing"
        try:
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if _sha256(path / name) != sha256:
                return f"{name} does not match its SHA-256"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def pack_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str = "optimizer"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state_dict as (named tensors, JSON-able rest), for any optimizer of torch.optim's shape.

    Tensors are named "<prefix>/<parameter index>/<name>" and, for tensor hyper-parameters such as a tensor
    learning rate, "<prefix>/group<i>/<name>".
    """
    import torch

    state_dict = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state_dict["state"].items():
        scalars[str(index)] = {}
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}/{index}/{name}"] = value
            else:
                scalars[str(index)][name] = value
    groups = []
    for i, group in enumerate(state_dict["param_groups"]):
        groups.append({k: v for k, v in group.items() if not isinstance(v, torch.Tensor)})
        tensors |= {f"{prefix}/group{i}/{k}": v for k, v in group.items() if isinstance(v, torch.Tensor)}
    return tensors, {"scalars": scalars, "groups": groups}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    prefix: str = "optimizer",
) -> None:
    """Restore what `pack_optimizer` took, into an optimizer built over the same parameters.

    Raises:
        ValueError: the groups or their parameters do not match (from torch).
    """
    current = optimizer.state_dict()["param_groups"]
    groups = []
    for i, saved in enumerate(state["groups"]):
        group = dict(saved)
        for name, value in (current[i] if i < len(current) else {}).items():
            if isinstance(value, tuple) and isinstance(group.get(name), list):
                group[name] = tuple(group[name])
        groups.append(group)
    values = {int(index): dict(scalars) for index, scalars in state["scalars"].items()}
    for key, tensor in tensors.items():
        owner, _, name = key.removeprefix(f"{prefix}/").partition("/")
        if not key.startswith(f"{prefix}/"):
            continue
        if owner.startswith("group"):
            groups[int(owner.removeprefix("group"))][name] = tensor
        else:
            values[int(owner)][name] = tensor
    optimizer.load_state_dict({"state": values, "param_groups": groups})


def capture_rng() -> dict[str, torch.Tensor]:
    """States of torch's (CPU, each CUDA device), NumPy's and Python's random generators, as uint8 tensors."""
    import random

    import numpy as np
    import torch

    # The global generator, since libraries draw from it; our own code uses seeded Generators.
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    states = {
        "rng/torch": torch.get_rng_state(),
        "rng/numpy": _encode([kind, keys.tolist(), *rest]),
        "rng/python": _encode(random.getstate()),
    }
    if torch.cuda.is_available():
        states |= {f"rng/cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_rng(tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the random generators back where `capture_rng` found them; other tensors are ignored."""
    import random

    import numpy as np
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"rng/cuda{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng/cuda{i}"], i)
    torch.set_rng_state(tensors["rng/torch"])
    kind, keys, *rest = _decode(tensors["rng/numpy"])
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = _decode(tensors["rng/python"])
    random.setstate((version, tuple(internal), gauss))


def write_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a Hugging Face folder: configuration, weights and tokenizer.

    Raises:
        OSError: the disk refuses the write.
    """
    with no_progress_bars(), files.naming(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing its own bars over the run's progress display."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _encode(value: Any) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(tensor: torch.Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))


def _write_contents(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> None:
    from safetensors.torch import save_file

    write_model(folder / MODEL, model, tokenizer)
    with files.naming(folder / TENSORS):
        # Cloned, because safetensors refuses tensors that share memory.
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(state, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    recorded = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in written
    }
    files.sync_tree(folder)
    files.write_json(folder / MANIFEST, {"format": FORMAT, "step": step, "files": recorded})


def _save_sharded(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write the DTensors, every rank its part; returns the tensors that are none."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.tensor import DTensor

    shared = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    try:
        dcp.save(shared, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise reason from error
    return {name: tensor for name, tensor in tensors.items() if name not in shared}


def _load_sharded(folder: Path, mesh: DeviceMesh | None) -> dict[str, torch.Tensor]:
    """What `_save_sharded` wrote: whole tensors without a mesh, else DTensors shared out over it by rows."""
    import torch
    from torch.distributed import checkpoint as dcp
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor import empty as empty_shared

    tensors = {}
    for name, saved in dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        if mesh is None:
            tensors[name] = torch.empty(saved.size, dtype=saved.properties.dtype)
        else:
            rows = {"device_mesh": mesh, "placements": [Shard(0)]}
            tensors[name] = empty_shared(saved.size, dtype=saved.properties.dtype, **rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process is alone is not news
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=mesh is None)
    return tensors


def _publish(temporary: Path, final: Path) -> None:
    """Rename a complete folder into place; one of the same name steps aside first."""
    if final.exists():
        aside = final.with_name(f"{ASIDE}{final.name}")
        os.replace(final, aside)
        os.replace(temporary, final)
        _remove(aside)
    else:
        os.replace(temporary, final)
    files.sync(final.parent)


def _remove(path: Path) -> None:
    """Delete a folder, which others see whole or not at all."""
    going = path.with_name(f"{TEMPORARY}{path.name.removeprefix(ASIDE)}-old")
    os.replace(path, going)
    shutil.rmtree(going)


def _recover(directory: Path) -> None:
    """Clean up after a killed process; the run folder's lock says that nobody else is writing here."""
    for path in list(directory.glob(f"{ASIDE}step-*")):
        final = path.with_name(path.name.removeprefix(ASIDE))
        if not final.exists():
            os.replace(path, final)
    for pattern in (f"{ASIDE}step-*", f"{TEMPORARY}step-*"):
        for path in list(directory.glob(pattern)):
            shutil.rmtree(path)


def _name(step: int) -> str:
    return f"step-{step:08}"


_Folder = tuple[Path, int]
"""A path and the number of the folder that was there, which tells another one of the same name."""


def _folders(directory: Path) -> dict[int, _Folder]:
    """Checkpoint folders by step; one that stepped aside counts where a kill left it without a successor."""
    plain: dict[int, _Folder] = {}
    aside: dict[int, _Folder] = {}
    # The plain names again at the end: one that was missing at first may have got its successor by then.
    for prefix, found in (("", plain), (ASIDE, aside), ("", plain)):
        for path in directory.glob(f"{prefix}step-*"):
            match = STEP_NAME.fullmatch(path.name.removeprefix(prefix))
            if match:
                with suppress(FileNotFoundError):
                    found[int(match[1])] = path, path.stat().st_ino
    return aside | plain


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
