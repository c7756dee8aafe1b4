"""Several processes under torchrun: who this one is, what they exchange, how they start, end and fail together.

Guarantees: in one process every function is a no-op that loads no torch; only rank 0 speaks and writes; a process that
fails says why once, and ends the job instead of leaving the others waiting. Collectives (all but `rank`, `world`,
`is_main` and `fail`) must be called by every rank, in the same order. Sharding the model is left to `sharding`, the
launch and the killing of what is left after a failure to torchrun.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from autotool_fast.errors import Interrupted, UserError
from autotool_fast.metrics import phase

T = TypeVar("T")

TIMEOUT = timedelta(days=1)
"""Of a collective. The launcher notices a rank that failed; ranks that wait for a slow one are no failure."""
FOLLOWER_DELAY = 5.0
"""Seconds that another rank leaves rank 0 to report a problem that all of them have found."""

_store: Any = None


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
def processes(device: str) -> Iterator[None]:
    """Connect the ranks for the length of the block: gloo between CPUs, NCCL between GPUs, one GPU for each rank.

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
    yield
    barrier()


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
    if _store is not None:
        first = _store.add("autotool_fast/failures", 1) == 1
    else:
        first = True
        if not is_main():
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
    """Which of the sequences with these lengths each rank trains on: dealt longest first, so that loads are alike."""
    if world() == 1:
        return [list(range(len(lengths)))]
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [longest_first[to :: world()] for to in range(world())]
