"""What `benchmarks.rollout` and `benchmarks.train_step` share: options, clock, the table beside ours.

The options are known before torch is loaded. A contestant whose work is not the expected work has no time, only the
line that says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotool_fast.errors import UserError

if TYPE_CHECKING:
    import torch

    from benchmarks.report import Row

PEERS = ("trl", "vllm", "accelerate", "datasets")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are `UserError`s."""

    def error(self, message: str) -> Any:
        raise UserError(message, remedy="see --help")


def parser(description: str | None, module: str) -> argparse.ArgumentParser:
    """The options of both scripts."""
    p = Parser(prog=f"python -m benchmarks.{module}", description=description)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--prompts", type=positive, default=2, metavar="N", help="groups (default 2)")
    p.add_argument("--group", type=positive, default=16, metavar="N", help="samples of a prompt (default 16)")
    p.add_argument("--hidden", type=positive, default=256, metavar="N", help="width of the model (default 256)")
    p.add_argument("--layers", type=positive, default=4, metavar="N", help="its layers (default 4)")
    p.add_argument("--heads", type=positive, default=4, metavar="N", help="its attention heads (default 4)")
    p.add_argument("--kv-heads", type=positive, default=2, metavar="N", help="its key-value heads (default 2)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    p.add_argument("--providers", nargs="+", metavar="NAME", help="names or beginnings of names; 'ours' is autotool")
    p.add_argument("--repetitions", type=positive, default=3, metavar="N", help="timed ones (default 3)")
    p.add_argument("--seconds", type=float, default=600.0, metavar="S", help="bound of a contest, after three")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default 1)")
    p.add_argument("--out", type=Path, metavar="FILE", help="results as JSON")
    p.add_argument("--no-memory", action="store_true", help="leave out the extra run that measures memory")
    return p


def positive(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: got {text}")
    return value


def check_out(path: Path | None) -> None:
    """See that results can be written before anything is measured.

    Raises:
        UserError: they cannot.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise UserError(problem, where=f"--out ({path})", remedy="name another file") from error


def check(args: argparse.Namespace, contestants: Sequence[str]) -> None:
    """Refuse sizes that make no model, providers that are none of the `contestants`, and results with no place to go.

    Raises:
        UserError: what does not fit.
    """
    check_out(args.out)
    if args.hidden % (2 * args.heads):
        raise UserError(f"{args.hidden} is not an even multiple of {args.heads} heads", where="--hidden, --heads")
    if args.heads % args.kv_heads:
        raise UserError(f"{args.heads} heads do not share {args.kv_heads} evenly", where="--heads, --kv-heads")
    for given in args.providers or ():
        if not any(name.startswith("autotool" if given == "ours" else given) for name in contestants):
            known = ", ".join(contestants)
            raise UserError(f"there is no {given!r} for this device", where="--providers", remedy=f"use {known}")


def versions() -> dict[str, str]:
    """The peers that are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def contest(
    runs: Mapping[str, Callable[[int], int]],
    device: torch.device,
    repetitions: int,
    seconds: float,
    memory: bool,
    ours: str = "autotool",
) -> list[Row]:
    """Time contestants in turns.

    Args:
        runs: by name; each takes the number of the repetition and returns the tokens it sampled.
        memory: measure each one's peak in a run of its own, after the timing.
        ours: the name that the others' ratios are against.

    Returns:
        A row for each: its times, sampled tokens per second, how many times as fast ours is (median against median; in
        processor time too, which other work on the machine lengthens less), and peak extra bytes; or its error.
    """
    from benchmarks.measure import Call, interleaved, one_line, peak_extra_bytes
    from benchmarks.report import timed

    tokens: dict[str, int] = {}

    def call(name: str) -> Call:
        def run(i: int) -> None:
            tokens[name] = runs[name](i)

        return Call(run)

    times = interleaved({name: call(name) for name in runs}, device, repetitions, seconds)
    rows: list[Row] = []
    for name in runs:
        row = {"provider": name, **timed(times[name])}
        if "error" not in row:
            rates = {"tokens_s": "ms", "slowest": "p80", "fastest": "p20", "tokens_cpu_s": "cpu_ms"}
            row |= {rate: 1e3 * tokens[name] / row[ms] for rate, ms in rates.items() if row.get(ms)}
            row["tokens"] = tokens[name]
            if memory:
                try:
                    row["peak_bytes"] = peak_extra_bytes(lambda name=name: runs[name](0), device, warm=False)
                except Exception as error:  # a contestant's failure is a result, whatever its type
                    row["memory_error"] = one_line(error)
        rows.append(row)
    base = next((row for row in rows if row["provider"] == ours and "error" not in row), None)
    for row in rows:
        if base is not None and row is not base and "error" not in row:
            row["ours_faster"] = base["tokens_s"] / row["tokens_s"]
            if base.get("tokens_cpu_s") and row.get("tokens_cpu_s"):
                row["ours_faster_cpu"] = base["tokens_cpu_s"] / row["tokens_cpu_s"]
            if base.get("peak_bytes") and row.get("peak_bytes"):
                row["ours_memory"] = base["peak_bytes"] / row["peak_bytes"]
    return rows


def checked(name: str, got: Any, want: Any) -> None:
    """Refuse a contestant that did other work.

    Raises:
        RuntimeError: `got` is not `want`.
    """
    if got != want:
        raise RuntimeError(f"{name} did other work: {got} in place of {want}"[:150])


def columns() -> Sequence[Any]:
    """Of both tables."""
    from benchmarks.report import Column, percent

    def rate(value: float) -> str:
        return f"{value:.0f}"

    def times(value: float) -> str:
        return f"{value:.2f}x"

    return (
        Column("provider", "provider"),
        Column("tokens_s", "tokens/s", rate),
        Column("slowest", "p20", rate),
        Column("fastest", "p80", rate),
        Column("tokens_cpu_s", "per CPU s", rate),
        Column("ours_faster", "ours faster", times),
        Column("ours_faster_cpu", "in CPU time", times),
        Column("peak_bytes", "peak MiB", lambda value: f"{value / 2**20:.0f}"),
        Column("ours_memory", "ours / its peak", percent),
    )
