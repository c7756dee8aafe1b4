"""Clocks, memory and ceilings: how every kernel benchmark of this folder measures.

Time. Contestants take turns within each repetition, in an order that changes from one repetition to the next, so that
a drifting clock or a busy neighbour meets them all. On a GPU a repetition is one pair of CUDA events; a short spin
before the first event lets the host run ahead, so that launch overhead shorter than the spin is not timed. On a CPU it
is `time.perf_counter`, and beside it the processor time of the process over all its threads, which other work on the
machine does not lengthen much. Reported are the median and the 20th and 80th percentile.

Memory. On a GPU the peak of the caching allocator above what was allocated before the call. On a CPU the kernel's
high-water mark of the resident set (VmHWM, reset through /proc/self/clear_refs) above the resident set before the
call, after a first call has loaded code and freed pages have been returned. Blocks from 1 MiB are mapped one by one
for that, so that a freed one leaves the resident set at once; holes in the heap that could serve them are plugged.

Allocator on a CPU. Timed calls run with a heap that keeps freed memory (`keep_freed_memory`), the same for every
contestant: with glibc's defaults the page faults of fresh logits cost more than the arithmetic.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from autotool_kernels.products import project
from torch import Tensor

WARM_UP_SECONDS = {"cuda": 0.2, "cpu": 0.0}
CANARY_SIZE = {"cuda": 8192, "cpu": 2048}
CACHES = {"cuda": 256 << 20, "cpu": 128 << 20}  # several last-level caches
MOST_COPIES = 4096
SPIN_CYCLES = 1_000_000  # about half a millisecond on a GPU: longer than the host needs to enqueue one call
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # mallopt(3)
_MAPPED_FROM = 1 << 20


class Call(NamedTuple):
    """One thing to time. `prepare(i)` is not timed; its result goes to `run`. `i` counts the calls of the contest, so
    that contestants who rotate through inputs by it never find one in the cache that another has just read."""

    run: Callable[[Any], Any]
    prepare: Callable[[int], Any] = lambda i: i
    count: int = 1  # how many calls one `run` makes; times are per call


class Times(NamedTuple):
    """Milliseconds over all repetitions."""

    ms: float  # median
    p20: float
    p80: float
    repetitions: int
    cpu_ms: float | None = None  # median processor time of this process, all threads; on a CPU only


@dataclass(frozen=True)
class Ceilings:
    """What the device was seen to reach, before the contest and after it."""

    copy_gb_s: float  # bytes read plus bytes written
    matmul_tflops: float  # the canary
    copy_bytes: int
    matmul: str  # what was multiplied
    copy_gb_s_after: float | None = None
    matmul_tflops_after: float | None = None


def one_line(error: BaseException) -> str:
    """An exception as one short line."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def interleaved(
    calls: Mapping[str, Call], device: torch.device, repetitions: int, seconds: float = float("inf")
) -> dict[str, Times | str]:
    """Times of every call, or the line of the error that took it out of the contest.

    `seconds` bounds the contest: no repetition beyond the third starts after it.
    """
    clock = _cuda_ms if device.type == "cuda" else _cpu_ms
    results: dict[str, Times | str] = {}
    samples: dict[str, list[tuple[float, float | None]]] = {}
    for name, call in calls.items():
        try:
            _warm_up(call, device)
            samples[name] = []
        except Exception as error:  # a contestant's failure is a result, whatever its type
            results[name] = one_line(error)
    begin, turns = time.perf_counter(), itertools.count()
    for i in range(repetitions):
        if i >= 3 and time.perf_counter() - begin > seconds:
            break
        names = list(samples)
        turn = i % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            try:
                samples[name].append(clock(calls[name], next(turns)))
            except Exception as error:
                results[name] = one_line(error)
                del samples[name]
    for name, values in samples.items():
        results[name] = _summary(values, calls[name].count)
    return results


def _summary(values: list[tuple[float, float | None]], count: int) -> Times:
    wall = torch.tensor([value for value, _ in values], dtype=torch.float64) / count
    low, high = (wall.quantile(q).item() for q in (0.2, 0.8))
    cpu = [value / count for _, value in values if value is not None]
    median = statistics.median(wall.tolist())
    return Times(median, low, high, len(values), statistics.median(cpu) if cpu else None)


def _warm_up(call: Call, device: torch.device) -> None:
    begin = time.perf_counter()
    while True:
        call.run(call.prepare(0))
        synchronize(device)
        if time.perf_counter() - begin >= WARM_UP_SECONDS[device.type]:
            return


def _cuda_ms(call: Call, i: int) -> tuple[float, None]:
    state = call.prepare(i)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    result = call.run(state)
    stop.record()
    stop.synchronize()
    del result
    return start.elapsed_time(stop), None


def _cpu_ms(call: Call, i: int) -> tuple[float, float]:
    state = call.prepare(i)
    cpu, begin = time.process_time(), time.perf_counter()
    result = call.run(state)
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    del result
    return 1e3 * wall, 1e3 * cpu


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graphed(run: Callable[[], Any], count: int = 20, warm_ups: int = 3) -> Call:
    """`count` calls of `run` captured in one CUDA graph, so that a replay's own cost is shared among them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph, kept = captured(lambda: [run() for _ in range(count)])
    return Call(lambda _, keep=kept: graph.replay(), count=count)


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`run` in a CUDA graph, and what it returned; whatever it raises leaves nothing behind that others would meet.

    Where a capture fails, torch does not come to putting back the current stream, and the random generator goes on
    recording: every later launch or random number of the process would fail.
    """
    stream, generator = torch.cuda.current_stream(), torch.cuda.default_generators[torch.cuda.current_device()]
    before, graph = generator.clone_state(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = run()
    except BaseException:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(before)
        raise
    return graph, kept


def copies_beyond_caches(tensor: Tensor) -> list[Tensor]:
    """The tensor and as many copies of it as fill several last-level caches (at most MOST_COPIES)."""
    count = -(-CACHES[tensor.device.type] // max(1, tensor.nbytes))
    return [tensor, *(tensor.clone() for _ in range(min(count, MOST_COPIES) - 1))]


def keep_freed_memory(keep: bool) -> bool:
    """Whether the C heap keeps freed blocks for the next call, or maps and unmaps those from 1 MiB; glibc only."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        settings = (
            [(_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)]
            if keep
            else [(_M_MMAP_MAX, 65536), (_M_MMAP_THRESHOLD, _MAPPED_FROM), (_M_TRIM_THRESHOLD, _MAPPED_FROM)]
        )
        return all(libc.mallopt(option, value) == 1 for option, value in settings)
    except (OSError, AttributeError):
        return False


def peak_extra_bytes(run: Callable[[], Any], device: torch.device, warm: bool = True) -> int | None:
    """Peak memory of `run()` beyond what was held before it, its result included; None where it cannot be measured.

    `warm`: run it once before, so that code loading and compilation are not counted.
    """
    if warm:
        run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not keep_freed_memory(False):
        return None
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc_trim(0)
    plugs = _plug_holes(libc)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None
    finally:
        for plug in plugs:
            libc.free(ctypes.c_void_p(plug))
        keep_freed_memory(True)


def _plug_holes(libc: ctypes.CDLL) -> list[int]:
    """Untouched blocks in every free stretch of the heap that a block of 1 MiB would fit in."""
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    end, plugs = libc.sbrk(0), []
    while not plugs or 0 < plugs[-1] < end:
        plugs.append(libc.malloc(_MAPPED_FROM - 4096) or 0)
    return plugs


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def matmul_tflops(device: torch.device, size: int | None = None, repetitions: int = 5) -> float:
    """Rate of a square product of random matrices: bfloat16 on a GPU, float32 on a CPU.

    On a CPU the faster of torch.mm and oneDNN: on some processors torch.mm reaches half of what they can do.
    """
    size = size or CANARY_SIZE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    make = torch.Generator(device=device).manual_seed(0)  # its own: a contestant may have broken the default one
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=make) for _ in range(2))
    calls = {"torch.mm": Call(lambda _: torch.mm(a, b.t()))}
    if device.type == "cpu":
        calls["oneDNN"] = Call(lambda _: project(a, b, dtype))
    times = interleaved(calls, device, repetitions)
    measured = [t.ms for t in times.values() if not isinstance(t, str)]
    if not measured:
        raise RuntimeError(f"the {size}^3 matmul failed: {times['torch.mm']}")
    return 2 * size**3 / min(measured) / 1e9


def copy_gb_s(device: torch.device, size: int, repetitions: int = 5) -> float:
    """Bandwidth of a copy of `size` bytes, bytes read plus bytes written."""
    make = torch.Generator(device=device).manual_seed(0)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(generator=make)
    target = torch.empty_like(source)
    times = interleaved({"copy": Call(lambda _: target.copy_(source))}, device, repetitions)["copy"]
    if isinstance(times, str):
        raise RuntimeError(f"the copy of {size} bytes failed: {times}")
    return 2 * size / times.ms / 1e6


def ceilings(device: torch.device, quick: bool = False) -> Ceilings:
    """Measured now; `Report` adds later readings."""
    size = CANARY_SIZE[device.type]
    kind = "bfloat16" if device.type == "cuda" else "float32"
    copied = 1 << 32 if device.type == "cuda" else 1 << 26 if quick else 1 << 28
    return Ceilings(copy_gb_s(device, copied), matmul_tflops(device), copied, f"{size}^3 {kind}")
