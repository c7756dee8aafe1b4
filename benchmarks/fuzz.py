"""`python -m benchmarks.fuzz --inputs 1000000`: no input makes a reader fail in a way that it does not document.

Targets are the reply parser, the loaders, checkpoints, a run's files, presets and the command line. An input is a
function of (seed, target, number). A crash is any exception but the documented one, a result that breaks the target's
promise, or more than `DEADLINE` seconds; its input is saved, and `--replay FILE` runs it again. Prints a table; exit
code 1 after a crash.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotool_fast import checkpoint, cli, metrics, partial, runs
from autotool_fast.chat import ERROR_KINDS, parse_reply
from autotool_fast.config import TrainConfig, to_dict
from autotool_fast.errors import UserError
from autotool_fast.tasks.example import Example
from autotool_fast.tasks.sources import files as source_files
from autotool_fast.tasks.sources.literal import clean
from autotool_fast.tasks.sources.load import SOURCES
from autotool_fast.tasks.sources.pycalls import parse_calls
from autotool_fast.tasks.sources.rows import RowError
from benchmarks import fuzz_inputs as make

DEADLINE = 10.0
"""Seconds that one input may take."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        share: part of all inputs.
        make: an input, JSON-able, from random numbers.
        read: whether the input is accepted; raises `refusals` when it is refused with a reason.
        refusals: the documented errors.
    """

    share: float
    make: Callable[[random.Random], Any]
    read: Callable[[Any], bool]
    refusals: tuple[type[Exception], ...] = ()


def _reply(syntax: str) -> Callable[[str], bool]:
    def read(text: str) -> bool:
        reply = parse_reply(text, syntax)
        assert set(reply.errors) <= set(ERROR_KINDS)
        assert reply.length_class in (-1, 0, 1)
        for call in reply.calls:
            again = json.loads(call.to_json(syntax).encode())
            assert again["name"] == call.name
        return not reply.errors

    return read


def _row(source: str) -> Callable[[Any], bool]:
    def read(row: dict[str, Any]) -> bool:
        accepted = False
        for item in SOURCES[source].read_row(clean(row), "x-0"):
            if isinstance(item, RowError):
                continue
            line = item.to_line()
            assert line.encode().count(b"\n") == 1
            assert Example.from_json(json.loads(line)) == item
            accepted = True
        return accepted

    return read


def _in_file(name: str, read: Callable[[Path], Any]) -> Callable[[str], bool]:
    """A reader of a file, as one of its content: bytes in hexadecimal."""

    def given(content: str) -> bool:
        path = Path(_folder[0]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes.fromhex(content))
        read(path)
        return True

    return given


def _damaged(rng: random.Random, *contents: str) -> str:
    return make.broken_bytes(rng, rng.choice(contents).encode("utf-8", "surrogatepass")).hex()


_folder: list[str] = []
_RUN = {"format": runs.FORMAT, "config": to_dict(TrainConfig()), "versions": {}}


def _checkpoint(content: str) -> bool:
    """A manifest and the state beside it, both in hexadecimal; a state that is accepted must be the one written."""
    folder = Path(_folder[0]) / "checkpoints" / "step-00000007"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for name in (checkpoint.STATE, checkpoint.TENSORS):
            (folder / name).write_text(name)
    manifest, state = (bytes.fromhex(part) for part in content.split(" "))
    (folder / checkpoint.STATE).write_bytes(state)
    (folder / checkpoint.MANIFEST).write_bytes(manifest)
    if checkpoint.damage(folder) is not None:
        return False
    assert state == checkpoint.STATE.encode()
    assert json.loads(manifest)["files"].keys() == _whole_manifest()["files"].keys()
    return True


def _whole_manifest() -> dict[str, Any]:
    def entry(name: str) -> dict[str, Any]:
        return {"bytes": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()}

    names = (checkpoint.STATE, checkpoint.TENSORS)
    return {"format": checkpoint.FORMAT, "step": 7, "files": {name: entry(name) for name in names}}


def _make_checkpoint(rng: random.Random) -> str:
    manifest = _whole_manifest()
    if rng.random() < 0.5:
        manifest = make.broken_value(rng, manifest)
    state = checkpoint.STATE.encode()
    return f"{_damaged(rng, json.dumps(manifest, indent=2))} {make.broken_bytes(rng, state).hex()}"


def _partial(path: Path) -> None:
    partial.PartialResults(path, {"k": 1})


def _make_partial(rng: random.Random) -> str:
    head = json.dumps({"format": partial.FORMAT, "k": 1})
    return _damaged(rng, head + "\n" + "".join(f'{{"part": "{i}", "value": [{i}]}}\n' for i in range(3)))


def _options(arguments: list[str]) -> bool:
    cli._read_options(arguments)
    return True


def _make_file(rng: random.Random) -> str:
    rows = [make.row(rng, rng.choice(list(SOURCES))) for _ in range(rng.randint(1, 3))]
    lines = "\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows)
    return _damaged(rng, lines, json.dumps(rows), json.dumps(rows, indent=1))


def _make_metrics(rng: random.Random) -> str:
    rows = ({"stage": "rl", "step": i, "seconds": 0.5, make.word(rng): 1.0} for i in range(3))
    return _damaged(rng, "".join(json.dumps(row) + "\n" for row in rows))


TARGETS: dict[str, Target] = {
    "reply, tagged": Target(0.30, lambda rng: make.reply(rng, "tagged"), _reply("tagged")),
    "reply, bare": Target(0.15, lambda rng: make.reply(rng, "bare"), _reply("bare")),
    "calls in Python syntax": Target(0.08, make.python_calls, lambda text: bool(parse_calls(text)), (RowError,)),
    **{
        f"rows of {source}": Target(0.07, lambda rng, s=source: make.row(rng, s), _row(source), (RowError,))
        for source in SOURCES
    },
    "data files": Target(
        0.04, _make_file, _in_file("data.json", lambda path: list(source_files.rows(path))), (UserError,)
    ),
    "checkpoints": Target(0.03, _make_checkpoint, _checkpoint, (UserError,)),
    "config.json of a run": Target(
        0.01,
        lambda rng: _damaged(rng, json.dumps(make.broken_value(rng, _RUN) if rng.random() < 0.7 else _RUN)),
        _in_file("run/config.json", lambda path: runs.read_config(path.parent)),
        (UserError,),
    ),
    "metrics.jsonl": Target(0.01, _make_metrics, _in_file("metrics.jsonl", metrics.read_rows), (UserError,)),
    "kept parts of labels": Target(0.01, _make_partial, _in_file("parts.jsonl", _partial), (UserError,)),
    "presets": Target(
        0.01,
        lambda rng: make.toml(rng, _RUN["config"]).encode("utf-8", "surrogatepass").hex(),
        _in_file("own.toml", lambda path: cli.load_preset(str(path))),
        (UserError,),
    ),
    "command line": Target(0.01, lambda rng: make.options(rng, list(cli._known_options())), _options, (UserError,)),
}


class Overdue(BaseException):
    """An input took longer than the deadline."""


@contextmanager
def deadline() -> Iterator[None]:
    """Interrupt a read of the block that takes too long; `signal.setitimer` starts the clock."""

    def late(signum: int, frame: object) -> None:
        raise Overdue(f"took more than {DEADLINE:g} s")

    before = signal.signal(signal.SIGALRM, late)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def attempt(target: Target, given: Any) -> str:
    """accepted, refused, or the traceback of a crash."""
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        return "accepted" if target.read(given) else "refused"
    except target.refusals:
        return "refused"
    except (Exception, Overdue):
        return traceback.format_exc(limit=-6)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def fuzz(name: str, count: int, seed: int, out: Path, first: int = 0) -> dict[str, int]:
    """Try `count` inputs of a target; crashes are saved below `out`."""
    target, counts = TARGETS[name], {"accepted": 0, "refused": 0, "crashed": 0}
    with deadline():
        for number in range(first, first + count):
            given = target.make(random.Random(f"{seed}/{name}/{number}"))
            result = attempt(target, given)
            if result in counts:
                counts[result] += 1
                continue
            counts["crashed"] += 1
            if counts["crashed"] <= 20:
                out.mkdir(parents=True, exist_ok=True)
                record = {"target": name, "seed": seed, "number": number, "error": result, "input": given}
                path = out / f"{name.replace(' ', '-').replace(',', '')}-{seed}-{number}.json"
                path.write_text(json.dumps(record, indent=1), encoding="utf-8")
                print(f"crash in {path}: {result.strip().splitlines()[-1][:200]}", file=sys.stderr)
    return counts


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit code is 1 when something crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of each target's first input")
    parser.add_argument("--only", choices=list(TARGETS), help="a single target, which gets all inputs")
    parser.add_argument("--out", type=Path, default=Path("fuzz_crashes"), help="folder for inputs that crash")
    parser.add_argument("--replay", type=Path, help="a saved input to run again")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        _folder[:] = [folder]
        if args.replay:
            record = json.loads(args.replay.read_text(encoding="utf-8"))
            with deadline():
                result = attempt(TARGETS[record["target"]], record["input"])
            print(result)
            return int(result not in ("accepted", "refused"))
        totals: dict[str, int] = {"accepted": 0, "refused": 0, "crashed": 0}
        print(f"{'target':<24}{'inputs':>10}{'accepted':>10}{'refused':>10}{'crashed':>9}{'seconds':>9}")
        begin = time.perf_counter()
        for name in [args.only] if args.only else TARGETS:
            count = args.inputs if args.only else max(round(args.inputs * TARGETS[name].share), 1)
            start = time.perf_counter()
            counts = fuzz(name, count, args.seed, args.out, args.first)
            totals = {key: totals[key] + counts[key] for key in totals}
            _line(name, counts, time.perf_counter() - start)
        _line("all", totals, time.perf_counter() - begin)
    return int(totals["crashed"] > 0)


def _line(name: str, counts: dict[str, int], seconds: float) -> None:
    cells = (sum(counts.values()), counts["accepted"], counts["refused"])
    shown = "".join(f"{n:>10,}" for n in cells)
    print(f"{name:<24}{shown}{counts['crashed']:>9,}{seconds:>9.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
