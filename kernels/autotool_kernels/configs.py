"""Tile settings of the Triton linear op: data by architecture and shape, and derived defaults where nothing was tuned.

`select` returns the entry of `tuned/<architecture>.json` that fits, or else settings derived from shared memory and
problem size. Bad data is an error that names the file and the entry. What a row's log-prob is made of (vocabulary
tile, depth of a step, how a row lies in the warps) must not depend on the number of tokens, or a row's result would
change with its batch: that is checked when a file is read. Measuring is left to `tune`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from .reference import STORE_TILE

TUNED = Path(__file__).with_name("tuned")
KERNELS = ("forward", "dlogits", "grad_weight", "grad_hidden")
MATMULS = ("triton", "cublas")
INTERPRETER = "interpreter"
# Largest shared memory of one block in bytes by architecture (CUDA programming guide, compute capabilities).
SHARED_BYTES = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_87": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10,
    "sm_100": 227 << 10, "sm_103": 227 << 10, "sm_120": 99 << 10, "sm_121": 99 << 10,
}  # fmt: skip
# The backward zeroes this many token rows behind the last live one, and a tile must not read past them.
LARGEST_BLOCK = 256
# Row tiles of one group keep about this much of the row operand in the L2 cache.
GROUP_BYTES = 16 << 20


@dataclass(frozen=True)
class Tile:
    """One product kernel: out[rows, cols] is a sum over depth.

    forward, dlogits: rows = tokens, cols = vocabulary, depth = H; grad_weight: vocabulary, H, tokens; grad_hidden:
    tokens, H, vocabulary.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8  # row tiles that run side by side for one column tile
    programs: int = 1  # resident programs per multiprocessor; more than one overlap an epilogue with a product
    tma: bool = False  # operands through tensor descriptors where the tensors allow it, else through pointers
    flatten: bool = True  # one loop over tiles and depth: loads of the next tile start under the epilogue
    specialize: bool = False  # producer and consumer warps (needs 4 warps)

    def __post_init__(self) -> None:
        for field in ("rows", "cols", "depth", "warps", "stages", "group", "programs"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} must be a positive integer: got {value!r}")
        for field in ("rows", "cols", "depth", "warps"):
            if getattr(self, field) & (getattr(self, field) - 1):
                raise ValueError(f"{field} must be a power of two: got {getattr(self, field)}")
            if field != "warps" and not 16 <= getattr(self, field) <= LARGEST_BLOCK:
                raise ValueError(f"{field} must be in 16..{LARGEST_BLOCK}: got {getattr(self, field)}")
        if self.specialize and self.warps != 4:
            raise ValueError(f"specialize needs warps = 4, with others Triton ignores it: got {self.warps}")

    def shared_bytes(self, itemsize: int) -> int:
        """Operand buffers; the epilogue's staging comes on top."""
        return self.stages * (self.rows + self.cols) * self.depth * itemsize


@dataclass(frozen=True)
class LinearConfig:
    """Settings of one call of the linear op."""

    forward: Tile
    dlogits: Tile
    grad_weight: Tile
    grad_hidden: Tile
    matmul: str = "triton"  # dX and dW: "triton" skips dead rows, "cublas" multiplies zeros

    def __post_init__(self) -> None:
        if self.matmul not in MATMULS:
            raise ValueError(f"matmul must be one of {', '.join(MATMULS)}: got {self.matmul!r}")
        for name in ("forward", "dlogits"):
            if getattr(self, name).cols not in (STORE_TILE, 2 * STORE_TILE):
                got = getattr(self, name).cols
                raise ValueError(f"{name}.cols must be {STORE_TILE} or {2 * STORE_TILE}: got {got}")
        if self.dlogits.rows % self.grad_weight.depth:
            # grad_weight reads whole steps of token rows, and dlogits zeroes dead rows up to its own tile only.
            raise ValueError(
                f"dlogits.rows must be a multiple of grad_weight.depth: got {self.dlogits.rows}, "
                f"{self.grad_weight.depth}"
            )


def select(architecture: str, hidden: int, vocab: int, tokens: int, dtype: torch.dtype) -> LinearConfig:
    """Settings for hidden [tokens, hidden], weight [vocab, hidden] of `dtype` on `architecture` ("sm_90")."""
    return _select(architecture, hidden, vocab, bucket(tokens), dtype)


def bucket(tokens: int) -> int:
    """Numbers of tokens up to a power of two, 64 at least, share settings."""
    return max(64, 1 << max(0, tokens - 1).bit_length())


def bits_key(architecture: str, forward: Tile) -> tuple:
    """What the bits of a row's log-prob depend on; must be the same for every number of tokens.

    On sm_90 each warp holds whole rows while there are 16 rows per warp, so the number of rows may vary. Elsewhere
    the number of rows and warps decides over how many warps a row is split.
    """
    if architecture in ("sm_90", INTERPRETER) and forward.rows >= 16 * forward.warps:
        return forward.cols, forward.depth, "whole rows"
    return forward.cols, forward.depth, forward.rows, forward.warps


def defaults(architecture: str, hidden: int, vocab: int, tokens: int, dtype: torch.dtype) -> LinearConfig:
    """Untuned settings: derived, never measured.

    Warp specialisation is left to the tuner: on sm_90 Triton 3.6 applies it to the forward with 128 columns alone,
    3.9 to none of these kernels, and other tiles spill or fail to compile with it.
    """
    if architecture == INTERPRETER:
        tile = Tile(rows=32, cols=128, depth=32, warps=4, stages=1, group=2, tma=True)
        return LinearConfig(tile, tile, tile, tile)
    tma = _generation(architecture) >= 9
    if dtype.itemsize == 4:
        # Three tf32 products per float32 product: mma.sync holds both halves of every operand in registers.
        lean = _generation(architecture) in (9, 10)
        tile = Tile(rows=64, cols=128, depth=32, warps=4 if lean else 8, stages=2, tma=lean, flatten=lean)
        # Beyond sm_100 the sums of dX and dW need what half of the columns leaves.
        product = dataclasses.replace(tile, cols=64) if _generation(architecture) > 10 else tile
        return LinearConfig(tile, tile, product, product)
    shared = SHARED_BYTES.get(architecture, min(SHARED_BYTES.values()))
    group = max(1, min(64, GROUP_BYTES // (128 * hidden * dtype.itemsize)))
    wide = Tile(rows=128, cols=256, depth=64, warps=8, stages=3, tma=True)
    if shared < 128 << 10:
        tile = Tile(rows=128, cols=128, depth=32, warps=8, stages=4, flatten=False)
        logits, product = dataclasses.replace(tile, group=group), tile
    elif not tma:
        # Pointers and mma.sync fragments take the registers that a flattened loop would need.
        tile = Tile(rows=128, cols=256, depth=32, warps=8, stages=4, flatten=False)
        logits, product = dataclasses.replace(tile, group=group), tile
    elif architecture == "sm_90":
        # A shallow product is over before its epilogue pays: two programs per multiprocessor overlap the two.
        narrow = Tile(rows=128, cols=128, depth=64, warps=4, stages=3, tma=True, programs=2)
        logits, product = dataclasses.replace(wide if hidden >= 2048 else narrow, group=group), wide
    else:
        # Tensor memory gives a thread half a row at once: of 256 columns, more than its registers hold.
        tile = Tile(rows=128, cols=128, depth=64, warps=8, stages=3, tma=True)
        logits, product = dataclasses.replace(tile, group=group), wide
    forward = dataclasses.replace(logits, rows=64, warps=4) if tokens <= 64 and architecture == "sm_90" else logits
    return LinearConfig(forward, logits, product, product)


def unaligned(config: LinearConfig) -> LinearConfig:
    """Takes the place of `config` where rows do not start and end on 16 bytes, e.g. with an odd row length.

    Such rows go through registers, element by element if need be, and only a small tile has registers to spare: for
    none of a flattened loop.
    """
    tile = Tile(rows=64, cols=128, depth=32, warps=8, stages=3, flatten=False)
    return dataclasses.replace(
        config, **{name: dataclasses.replace(tile, group=getattr(config, name).group) for name in KERNELS}
    )


def for_column_work(architecture: str, tile: Tile, missing: bool) -> Tile:
    """The forward's tile when its epilogue has values per column: bias, softcap, or columns that are `missing`.

    Such an epilogue has registers for 64 products per thread, not for 128, and for no second program. Where columns
    are missing, stored rows start anywhere: their 16-bit stores cost an address each, which leaves room for 32 on
    most architectures. On tensor memory, and with loads through pointers, a flattened loop takes what is left. The
    same with and without a store, so that both give the same bits.
    """
    if architecture == INTERPRETER:
        return tile
    rows = min(tile.rows, 128)
    rows, warps = (64, 8) if missing and architecture not in ("sm_80", "sm_90") else (rows, max(tile.warps, rows // 16))
    flatten = tile.flatten and tile.tma and not _tensor_memory(architecture)
    return dataclasses.replace(
        tile, rows=rows, cols=STORE_TILE, warps=warps, programs=1, flatten=flatten, specialize=False
    )


def _tensor_memory(architecture: str) -> bool:
    return _generation(architecture) == 10


def _generation(architecture: str) -> int:
    return int(architecture.removeprefix("sm_")[:-1])


@functools.lru_cache(maxsize=1024)
def _select(architecture: str, hidden: int, vocab: int, tokens: int, dtype: torch.dtype) -> LinearConfig:
    config = defaults(architecture, hidden, vocab, tokens, dtype)
    name = str(dtype).removeprefix("torch.")
    fitting = [e for e in load(architecture) if (e.hidden, e.vocab, e.dtype) == (hidden, vocab, name)]
    for kernel in KERNELS:
        entries = sorted((e for e in fitting if e.kernel == kernel), key=lambda e: e.tokens)
        entry = next((e for e in entries if bucket(e.tokens) >= tokens), entries[-1] if entries else None)
        if entry is not None:
            try:
                config = dataclasses.replace(config, **{kernel: entry.config})
            except ValueError as error:
                where = f"{TUNED / architecture}.json: {kernel} for {hidden} x {vocab}, {entry.tokens} tokens"
                raise ValueError(f"{where}: {error}") from error
    return config


@dataclass(frozen=True)
class Entry:
    """One line of a tuned file."""

    hidden: int
    vocab: int
    dtype: str
    tokens: int  # what it was made for; it serves the bucket that this falls into
    kernel: str
    config: Tile
    source: str  # "measured" or "compiled"
    measured: dict | None = None


def load(architecture: str) -> tuple[Entry, ...]:
    """Entries of tuned/<architecture>.json, checked; none where there is no file."""
    path = TUNED / f"{architecture}.json"
    return _load(path, path.stat().st_mtime_ns) if path.exists() else ()


@functools.lru_cache(maxsize=32)
def _load(path: Path, _modified: int) -> tuple[Entry, ...]:
    try:
        data = json.loads(path.read_text())
        raw = data["entries"]
        if data["architecture"] != path.stem:
            raise ValueError(f"architecture must be {path.stem!r}: got {data['architecture']!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of tuned settings: {error!r}") from error
    entries = tuple(_entry(path, i, item) for i, item in enumerate(raw))
    keys: dict[tuple, tuple[tuple, int]] = {}
    places: dict[tuple, int] = {}
    for i, entry in enumerate(entries):
        place = entry.hidden, entry.vocab, entry.dtype, entry.kernel, bucket(entry.tokens)
        if places.setdefault(place, i) != i:
            most = bucket(entry.tokens)
            raise ValueError(f"{path}: entries {places[place]} and {i} both serve {entry.kernel} up to {most} tokens")
        if entry.kernel != "forward":
            continue
        shape = (entry.hidden, entry.vocab, entry.dtype)
        bits = bits_key(path.stem, entry.config)
        first, where = keys.setdefault(shape, (bits, i))
        if first != bits:
            raise ValueError(f"{path}: entries {where} and {i} differ in settings that change a row's bits with tokens")
    return entries


def _entry(path: Path, index: int, item: dict) -> Entry:
    try:
        tile = Tile(**item["config"])
        entry = Entry(**{**item, "config": tile})
        if type(entry.tokens) is not int or entry.tokens < 1:
            raise ValueError(f"tokens must be a positive integer: got {entry.tokens!r}")
        if entry.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}: got {entry.kernel!r}")
        if entry.source not in ("measured", "compiled"):
            raise ValueError(f"source must be 'measured' or 'compiled': got {entry.source!r}")
        if (entry.source == "measured") != (entry.measured is not None):
            raise ValueError("measured must hold the measurement if source is 'measured', else null")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: entry {index}: {error}") from error
    return entry
