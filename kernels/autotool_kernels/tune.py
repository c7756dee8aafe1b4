"""Measures tile settings of the Triton linear op and writes them to `tuned/<architecture>.json`.

    python -m autotool_kernels.tune --model qwen2.5-7b --tokens 1024 8192 65536
    python -m autotool_kernels.tune --hidden 4096 --vocab 128256 --dry-run --architecture sm_90

Candidates are cut down in three steps: what does not fit or spills (compiled, no GPU needed: `machine_code`), what
computes something else than float64 arithmetic does, what is slow. Times are medians of repetitions interleaved over
the candidates. What a row's bits depend on is chosen once for all numbers of tokens, the rest for each. `configs`
says what the settings mean, checks the files and picks an entry; untouched entries of a file are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from . import configs
from .configs import KERNELS, Entry, LinearConfig, Tile
from .tune_workload import Shape, Workload

# Hidden size and vocabulary by model.
MODELS = {
    "qwen2.5-0.5b": (896, 151936), "qwen2.5-1.5b": (1536, 151936), "qwen2.5-3b": (2048, 151936),
    "qwen2.5-7b": (3584, 152064), "llama-3-8b": (4096, 128256),
}  # fmt: skip
TOKENS = (1024, 8192, 65536)
LAUNCHED = {"forward": "forward_kernel", "dlogits": "dlogits_kernel"}  # the other two launch product_kernel
FIRST_ROUND, SECOND_ROUND, FINALISTS = 5, 30, 6  # repetitions for all, then for the fastest
GROUPS = (4, 8, 16, 32, 64)

Runs = Mapping[Tile, Callable[[], Any]]
Times = dict[Tile, list[float]]  # milliseconds


class Verdict(NamedTuple):
    """Machine code of one candidate: figures for a reader, and what is wrong with it."""

    figures: str
    wrong: list[str]


Inspect = Callable[[str, list[LinearConfig]], Iterable[Verdict]]
Timer = Callable[[Runs, int], Times]


def candidates(kernel: str, architecture: str, shape: Shape, tokens: int) -> list[Tile]:
    """The untuned default first, then every tile that fits the shared memory and the registers of `architecture`."""
    default = getattr(configs.defaults(architecture, shape.hidden, shape.vocab, tokens, shape.dtype), kernel)
    itemsize = shape.dtype.itemsize
    # (warps, programs per multiprocessor, warp specialisation)
    teams = [(4, 1, False), (4, 2, False), (8, 1, False), (8, 2, False)] + [(4, 1, True)] * default.tma
    depths = (64, 128) if default.tma else (32, 64)
    # Specialised warps trade registers, and tcgen05 keeps accumulators in tensor memory: there the compiler decides.
    tensor_memory = architecture.startswith("sm_10")
    tiles = [default]
    for rows, cols, depth in ((r, c, 2 * d // itemsize) for r in (64, 128, 256) for c in (128, 256) for d in depths):
        for warps, programs, specialize in teams:
            accumulators = rows * cols // (32 * warps)  # float32 numbers per thread
            most = 256 if specialize or tensor_memory else 128
            # The 64 Ki registers of a multiprocessor hold the accumulators of its programs twice.
            if not 32 <= accumulators <= most or programs * rows * cols > 32 << 10 or rows < 16 * warps:
                continue
            team = {"warps": warps, "programs": programs, "specialize": specialize}
            tile = dataclasses.replace(default, rows=rows, cols=cols, depth=depth, **team)
            room = configs.SHARED_BYTES[architecture] // programs
            # The two deepest pipelines that fit: the epilogue's staging may take the room of the deepest.
            staged = (dataclasses.replace(tile, stages=stages) for stages in (5, 4, 3, 2))
            tiles += [one for one in staged if one.shared_bytes(itemsize) <= room][:2]
    return list(dict.fromkeys(tiles))


def inspect_config(shape: Shape, tokens: int, capability: int, kernel: str, config: LinearConfig) -> Verdict:
    """Compiles the kernel that `config` launches; no GPU is needed, Triton's interpreter must be off."""
    from . import machine_code

    with machine_code.recording(capability) as launches:
        Workload(shape, tokens, "meta").run(kernel, config)
    name = LAUNCHED.get(kernel, "product_kernel")
    texts, wrong = [], []
    for launch in {one.key: one for one in launches if one.kernel.fn.__name__ == name}.values():
        try:
            found = machine_code.figures(launch)
        except Exception as error:  # whatever a compiler raises, the candidate is out, and the reason is listed
            wrong.append(f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
            continue
        texts.append(f"{found.registers} registers, {found.local_bytes} B local, {found.shared} B shared")
        wrong += machine_code.shortcomings(found, capability)
        programs = getattr(config, kernel).programs
        if programs > 1 and programs > (together := machine_code.resident(found, capability)):
            wrong.append(f"only {together} of {programs} programs fit on a multiprocessor")
    if not texts and not wrong:
        wrong.append(f"{name} was not launched")
    return Verdict("; ".join(texts), wrong)


def compiled_inspector(shape: Shape, tokens: int, architecture: str, workers: int) -> Inspect:
    """Inspects candidates in processes of their own."""
    capability = int(architecture.removeprefix("sm_"))

    def inspect(kernel: str, candidates: list[LinearConfig]) -> Iterator[Verdict]:
        # Spawned: a process that holds a CUDA context must not be forked.
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            jobs = [pool.submit(inspect_config, shape, tokens, capability, kernel, c) for c in candidates]
            yield from (job.result() for job in jobs)

    return inspect


def cuda_times(runs: Runs, repetitions: int) -> Times:
    """Milliseconds of every repetition, taken in turns, so that clocks and heat treat all candidates alike."""
    times: Times = {tile: [] for tile in runs}
    for run in runs.values():
        run()  # compiles and warms up
    for _ in range(repetitions):
        for tile, run in runs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times[tile].append(start.elapsed_time(stop))
    return times


def race(runs: Runs, timer: Timer) -> Times:
    """A few repetitions of all, then many of the fastest."""
    times = timer(runs, FIRST_ROUND)
    finalists = sorted(runs, key=lambda tile: statistics.median(times[tile]))[:FINALISTS]
    return times | timer({tile: runs[tile] for tile in finalists}, SECOND_ROUND)


def choose(kernel: str, architecture: str, times: Mapping[int, Times]) -> dict[int, list[Tile]]:
    """For each number of tokens the tiles that may serve it, fastest first.

    Forward tiles are first restricted to one value of `configs.bits_key`: the one whose fastest tiles lose least,
    as a geometric mean over the numbers of tokens.
    """
    ranked = {n: sorted(found, key=lambda tile: statistics.median(found[tile])) for n, found in times.items()}
    if kernel != "forward":
        return ranked
    keys = {configs.bits_key(architecture, tile) for tiles in ranked.values() for tile in tiles}
    of_key = {
        key: {n: [t for t in tiles if configs.bits_key(architecture, t) == key] for n, tiles in ranked.items()}
        for key in keys
    }
    everywhere = {key: tiles for key, tiles in of_key.items() if all(tiles.values())}
    if not everywhere:
        raise RuntimeError("no forward candidate works for every number of tokens")

    def loss(key: tuple) -> float:
        best = everywhere[key]
        return sum(math.log(statistics.median(times[n][tiles[0]])) for n, tiles in best.items())

    return everywhere[min(everywhere, key=lambda key: (loss(key), key))]


def tune(
    shape: Shape,
    tokens: Sequence[int],
    architecture: str,
    *,
    kernels: Sequence[str] = KERNELS,
    inspect: Inspect,
    timer: Timer = cuda_times,
    device: torch.device | str = "cuda",
    made: Callable[[str], list[Tile]] | None = None,
    about: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Entry]:
    """Measured entries for every kernel and number of tokens.

    `made` lists the candidates of a kernel (default `candidates`), `inspect` judges their machine code, `timer`
    measures the correct ones; `about` goes into every entry (device, date, versions). RuntimeError if no candidate
    of a kernel is left.
    """
    current = {n: configs.select(architecture, *shape[:2], n, shape.dtype) for n in tokens}
    work = {n: Workload(shape, n, device) for n in tokens}
    entries = []
    for kernel in kernels:
        tiles = made(kernel) if made else candidates(kernel, architecture, shape, max(tokens))
        default = tiles[0]
        times: dict[int, Times] = {}
        for refined in (False, True):
            if refined:
                best = {tile for ranked in choose(kernel, architecture, times).values() for tile in ranked[:1]}
                tiles = [other for tile in best for other in neighbours(tile)]
            tiles = list(usable(kernel, tiles, current, work, inspect, say))
            for n in tokens:
                variants = {tile: dataclasses.replace(current[n], **{kernel: tile}) for tile in tiles}
                runs = {tile: partial(work[n].run, kernel, config) for tile, config in variants.items()}
                times[n] = times.get(n, {}) | (race(runs, timer) if runs else {})
            if not times[tokens[0]]:
                raise RuntimeError(f"{kernel}: no candidate compiles and computes the right thing")
        for n, ranked in choose(kernel, architecture, times).items():
            current[n] = dataclasses.replace(current[n], **{kernel: ranked[0]})
            measured = {**summary(times[n], ranked, default), **(about or {})}
            entry = Entry(shape.hidden, shape.vocab, shape.dtype_name, n, kernel, ranked[0], "measured", measured)
            say(f"{kernel} N={n}: {measured['ms']:.3f} ms with {describe(entry.config)}")
            entries.append(entry)
    return entries


def neighbours(tile: Tile) -> list[Tile]:
    """The same tile in other orders, and with the loop over tiles flattened or not: of the best only, bit-neutral."""
    grouped = [dataclasses.replace(tile, group=g) for g in GROUPS if g != tile.group]
    return [*grouped, dataclasses.replace(tile, flatten=not tile.flatten)]


def usable(kernel: str, tiles: list[Tile], current, work: Mapping[int, Workload], inspect: Inspect, say):
    """The tiles that go with the other kernels' settings, whose machine code is sound and whose results are right."""
    checked = []
    for tile in tiles:
        try:
            checked.append((tile, [dataclasses.replace(c, **{kernel: tile}) for c in current.values()]))
        except ValueError as error:
            say(f"{kernel} {describe(tile)}: left out: {error}")
    verdicts = inspect(kernel, [variants[-1] for _, variants in checked])
    for (tile, variants), verdict in zip(checked, verdicts, strict=True):
        reason = "; ".join(verdict.wrong)
        for n, config in zip(work, variants, strict=True):
            reason = reason or work[n].error(kernel, config)
        if reason:
            say(f"{kernel} {describe(tile)}: left out: {reason}")
        else:
            yield tile


def summary(times: Times, ranked: Sequence[Tile], default: Tile) -> dict[str, Any]:
    """Median, p20 and p80 of the winner in ms, the runner-up and the untuned default."""
    ordered = sorted(times[ranked[0]])
    out = {
        "ms": round(statistics.median(ordered), 5),
        "p20": round(ordered[int(0.2 * (len(ordered) - 1))], 5),
        "p80": round(ordered[math.ceil(0.8 * (len(ordered) - 1))], 5),
        "repetitions": len(ordered),
        "runner_up": None,
        "default_ms": round(statistics.median(times[default]), 5) if default in times else None,
    }
    if len(ranked) > 1:
        ms = round(statistics.median(times[ranked[1]]), 5)
        out["runner_up"] = {"config": dataclasses.asdict(ranked[1]), "ms": ms}
    return out


def write(entries: Sequence[Entry], architecture: str, folder: Path) -> list[str]:
    """Merges entries into folder/<architecture>.json in one step; returns what was dropped, in words.

    An entry replaces the one with its shape, bucket of tokens and kernel. Forward entries of the same shape whose
    bits would differ from the new ones are dropped: a file must not hold both.
    """
    path = folder / f"{architecture}.json"
    kept, dropped = [], []
    for old in read(path) if path.exists() else ():
        rivals = [new for new in entries if new.kernel == old.kernel and same_shape(new, old)]
        if any(configs.bucket(new.tokens) == configs.bucket(old.tokens) for new in rivals):
            continue
        if old.kernel == "forward" and any(
            configs.bits_key(architecture, new.config) != configs.bits_key(architecture, old.config) for new in rivals
        ):
            size = f"H={old.hidden} V={old.vocab} {old.dtype} N={old.tokens}"
            dropped.append(f"forward {size}: its results would differ in bits from the new ones")
            continue
        kept.append(old)
    merged = sorted(
        [*kept, *entries], key=lambda e: (e.hidden, e.vocab, e.dtype, KERNELS.index(e.kernel), e.tokens)
    )
    data = {"architecture": architecture, "entries": [dataclasses.asdict(e) for e in merged]}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        fresh = Path(part, path.name)
        fresh.write_text(json.dumps(data, indent=1) + "\n")
        read(fresh)  # what `select` would refuse is not written
        fresh.replace(path)
    configs._select.cache_clear()  # it remembers what it picked before
    return dropped


def read(path: Path) -> tuple[Entry, ...]:
    """The entries of a settings file, as `configs.select` would read it; it raises what that would."""
    return configs._load(path, path.stat().st_mtime_ns)


def same_shape(a: Entry, b: Entry) -> bool:
    """Whether two entries are for the same head and dtype."""
    return (a.hidden, a.vocab, a.dtype) == (b.hidden, b.vocab, b.dtype)


def describe(tile: Tile) -> str:
    """A tile in one line: block sizes, warps, stages, programs, group, flags."""
    flags = [name for name in ("tma", "specialize") if getattr(tile, name)]
    numbers = f"w{tile.warps} s{tile.stages} p{tile.programs} g{tile.group}"
    return " ".join([f"{tile.rows}x{tile.cols}x{tile.depth}", numbers, *flags])


def dry_run(shape: Shape, tokens: int, architecture: str, kernels, limit: int | None, inspect: Inspect) -> None:
    """Prints every candidate with its machine-code figures."""
    current = configs.select(architecture, shape.hidden, shape.vocab, tokens, shape.dtype)
    for kernel in kernels:
        tiles = candidates(kernel, architecture, shape, tokens)[:limit]
        variants = []
        for tile in tiles:
            try:
                variants.append(dataclasses.replace(current, **{kernel: tile}))
            except ValueError as error:
                print(f"{kernel:<12} {describe(tile):<34} left out: {error}")
        for config, verdict in zip(variants, inspect(kernel, variants), strict=True):
            wrong = f"  left out: {'; '.join(verdict.wrong)}" if verdict.wrong else ""
            print(f"{kernel:<12} {describe(getattr(config, kernel)):<34} {verdict.figures}{wrong}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m autotool_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="hidden size and vocabulary by name")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="numbers of tokens to tune for")
    parser.add_argument("--kernel", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--architecture", choices=configs.SHARED_BYTES, help="with --dry-run: compile for it")
    parser.add_argument("--dry-run", action="store_true", help="list candidates and their machine code; no GPU needed")
    parser.add_argument("--limit", type=int, help="with --dry-run: only the first candidates of each kernel")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="compiler processes")
    parser.add_argument("--out", type=Path, default=configs.TUNED, help="folder of the tuned files")
    args = parser.parse_args(arguments)
    if (args.model is None) == (args.hidden is None or args.vocab is None):
        parser.error("give --model, or --hidden and --vocab")
    buckets = [configs.bucket(n) for n in set(args.tokens)]
    if len(set(buckets)) < len(buckets):
        parser.error("--tokens: one number per power of two, because a file holds one entry for each")
    if triton.knobs.runtime.interpret:
        return refuse("Triton's interpreter is on (TRITON_INTERPRET): kernels cannot be compiled")
    gpu = torch.cuda.is_available()
    if not gpu and not args.dry_run:
        return refuse("no CUDA device to measure on; --dry-run lists the candidates without one")
    if args.dry_run:
        architecture = args.architecture or (current_architecture() if gpu else "sm_90")
    elif args.architecture not in (None, current_architecture()):
        return refuse(f"this device is {current_architecture()}, not {args.architecture}")
    else:
        architecture = current_architecture()
    size = MODELS[args.model] if args.model else (args.hidden, args.vocab)
    shape, tokens = Shape(*size, getattr(torch, args.dtype)), sorted(set(args.tokens))
    inspect = compiled_inspector(shape, tokens[-1], architecture, args.workers)
    if args.dry_run:
        dry_run(shape, tokens[-1], architecture, args.kernel, args.limit, inspect)
        return 0
    about = {
        "device": torch.cuda.get_device_name(), "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": torch.__version__, "triton": triton.__version__,
    }  # fmt: skip
    entries = tune(shape, tokens, architecture, kernels=args.kernel, inspect=inspect, about=about, say=print)
    for line in write(entries, architecture, args.out):
        print(f"dropped {line}")
    print(f"{len(entries)} entries written to {args.out / architecture}.json")
    return 0


def current_architecture() -> str:
    """Architecture of the current GPU, such as sm_90."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def refuse(reason: str) -> int:
    """Say why there is nothing to do; returns the exit code."""
    print(f"tune: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
