"""Several processes under torchrun: who this one is, what they exchange, how they start, end and fail together.

Guarantees: in one process every function is a no-op that loads no torch; only rank 0 speaks and writes; a process that
fails says why once, and ends the job instead of leaving the others waiting; one that is killed is named by another of
the same machine. Collectives (all but `rank`, `world`, `is_main`, `lost` and `fail`) must be called by every rank, in
the same order. Sharding the model is left to `sharding`, the launch and the killing of what is left after a failure to
torchrun.
"""

from __future__ import annotations

import math
import os
import platform
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from autotool_fast.errors import Interrupted, UserError
from autotool_fast.metrics import phase

T = TypeVar("T")

TIMEOUT = timedelta(days=1)
"""Of a collective. The launcher notices a rank that failed; ranks that wait for a slow one are no failure."""
FOLLOWER_DELAY = 5.0
"""Seconds that another rank leaves rank 0 to report a problem that all of them have found."""

LOOK_EVERY = 0.5
"""Seconds between looks at the other ranks."""
GRACE = 25.0
"""Seconds after SIGTERM when a rank that still works says so; torchrun kills it after 30, or `--shutdown-timeout`."""
PATIENCE = 2.0
"""Seconds in which a rank whose connections broke is seen to be gone."""

_store: Any = None
_peers: list[tuple[str, int]] = []  # machine and process of each rank
_failing = threading.Lock()


def rank() -> int:
    """Number of this process in the job."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def world() -> int:
    """Number of processes of the job, as torchrun announces it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def silence() -> None:
    """Keep every rank but the first from writing to the terminal; `fail` still can."""
    if not is_main():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


@contextmanager
def processes(device: str, remedy: str = "start the job again") -> Iterator[None]:
    """Connect the ranks for the length of the block: gloo between CPUs, NCCL between GPUs, one GPU for each rank.

    A rank that vanishes meanwhile ends this process within seconds, whatever it waits for. So does a SIGTERM, except
    while its handler is another one: that is expected to save and to end, and torchrun kills what does not.

    Args:
        remedy: what to do about that, one clause.

    Raises:
        UserError: a machine has fewer GPUs than processes.
    """
    global _store
    if world() == 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if device == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"process {local} of this machine has none of its {count} GPUs", where="--nproc_per_node")
        torch.cuda.set_device(local)
    _store, number, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store, rank=number, world_size=size, timeout=TIMEOUT)
    _peers[:] = gather((_machine(), os.getpid()))
    done = _watch(remedy)
    yield
    done.set()  # from here on a rank that is gone has finished
    barrier()


def _watch(remedy: str) -> threading.Event:
    """Look after the other ranks, in a thread of its own, until the event is set.

    A signal is noticed through the wakeup descriptor: its Python handler would wait until the main thread comes back
    from a collective. torchrun sends SIGTERM to the ranks that are left.
    """
    done = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, _wait)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def look() -> None:
        late = math.inf
        while not done.is_set():
            readable, _, _ = select.select([reader], [], [], LOOK_EVERY)
            told = bool(readable) and signal.SIGTERM in os.read(reader, 256)
            reason = lost(PATIENCE if told else 0.0)
            if done.is_set():
                return
            if reason:
                fail(f"error: {reason}; {remedy}", 1)
            elif told and signal.getsignal(signal.SIGTERM) is not _wait:
                late = time.monotonic() + GRACE
            elif time.monotonic() >= late:
                late = math.inf
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    waits = "told to end, but the step under way takes long, or a rank on another machine is gone"
                    print(f"{waits}; if nothing is saved, {remedy}", file=sys.__stderr__, flush=True)
            elif told:
                fail(f"error: told to end (SIGTERM), or a rank on another machine is gone; {remedy}", 143)

    threading.Thread(target=look, daemon=True).start()
    return done


def _wait(signum: int, frame: object) -> None:
    """The handler of a SIGTERM that nobody handles: the watching thread does."""


def lost(patience: float) -> str | None:
    """Which rank of this machine has vanished, looking for up to `patience` seconds; None if all are there."""
    end = time.monotonic() + patience
    while True:
        for number, (machine, process) in enumerate(_peers):
            if machine == _machine() and not _lives(process):
                return f"rank {number} (process {process}) is gone: it was killed or crashed, or memory ran out"
        if time.monotonic() >= end:
            return None
        time.sleep(0.05)


@cache
def _machine() -> str:
    """What processes that can see one another's numbers have in common."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):  # where there is /proc: one that has ended and was not waited for does not live
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True


def leave(code: int) -> int:
    """The exit code of what is done. One of several processes ends here; its threads of collectives do not always
    survive the interpreter's orderly end.
    """
    if world() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def fail(message: str, code: int) -> int:
    """Report what ended this process. Returns the exit code; one of several processes ends here, at once.

    Of the ranks that fail, the first speaks: the others fail because it left them, or for the same reason.
    """
    if world() == 1:
        print(message, file=sys.stderr)
        return code
    _failing.acquire()  # for good: the thread that is first here ends the process
    first = True
    if _store is not None:
        with suppress(RuntimeError):  # without the launcher there is nobody to agree with
            first = _store.add("autotool_fast/failures", 1) == 1
    elif not is_main():
        time.sleep(FOLLOWER_DELAY)
    if first:
        print(message if is_main() else f"rank {rank()}: {message}", file=sys.__stderr__, flush=True)
    return leave(code)  # not by closing the process group, which would wait for ranks that wait for this one


def barrier() -> None:
    """Wait until every rank is here."""
    gather(None)


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order, on every rank; they are pickled, tensors should be on the CPU."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world()
    with phase("sync"):
        dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return any(gather(flag))


def on_main(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 while the others wait; its result, which must be picklable, on every rank."""
    if world() == 1:
        return work()
    import torch.distributed as dist

    box = [work() if is_main() else None]
    with phase("sync"):
        dist.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def spread(count: int, work: Callable[[Sequence[int]], Sequence[T]]) -> list[T]:
    """Results for items 0..count-1, on every rank: `work` gets the numbers of this rank's items.

    Raises:
        Exception: what `work` raises; on the other ranks of an `Interrupted` one, that as well.
    """
    if world() == 1:
        return list(work(range(count)))
    try:
        mine: Sequence[T] | None = work(range(rank(), count, world()))
    except Interrupted:
        mine = None
    parts = gather(mine)
    if any(part is None for part in parts):
        raise Interrupted
    return [parts[i % world()][i // world()] for i in range(count)]  # type: ignore[index]


def deal(lengths: Sequence[int]) -> list[list[int]]:
    """Which of the pieces of work with these lengths each rank does; those of a single process in their order."""
    return [list(range(len(lengths)))] if world() == 1 else to_and_fro(lengths, world())


def to_and_fro(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Indices in `count` shares of about the same length: dealt longest first, every second round backwards."""
    shares: list[list[int]] = [[] for _ in range(count)]
    for turn, i in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        lap, seat = divmod(turn, count)
        shares[seat if lap % 2 == 0 else -1 - seat].append(i)
    return shares
