"""`python -m autotool_fast.data inspect|prepare|audit`: look at tool-calling data, build a training set, compare it.

    inspect PATH...             counts by kind, calls, turn, language and reason, and a few samples
    prepare PATH... --out DIR   sft.jsonl, rl.jsonl, test.jsonl, rejects.jsonl and manifest.json
    audit PATH... --benchmark PATH...   shared tools and questions with benchmark files

Only the command line is here; the work is in `tasks.inspection`, `tasks.preparation`, `tasks.overlap` and
`tasks.sources`. What the user can fix is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from autotool_fast.errors import UserError, readers_may_leave

_SOURCES = ("auto", "toolace", "xlam", "hermes", "rlla", "jsonl")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, remedy=f"see {self.prog} --help")


@readers_may_leave
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 a user's error, 130 interrupted."""
    try:
        options = _parser().parse_args(argv)
        options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m autotool_fast.data", description="Tool-calling data sets from local files.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    inspect = commands.add_parser("inspect", help="counts and samples", description="Counts and a few samples.")
    _add_inputs(inspect)
    inspect.add_argument("--samples", type=_count, default=3, metavar="N", help="examples shown (default 3)")
    inspect.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    inspect.add_argument("--rejects", type=Path, metavar="FILE", help="write rejected rows there, as JSONL")
    inspect.set_defaults(run=_inspect)

    prepare = commands.add_parser(
        "prepare", help="build a training set", description="Read, de-duplicate, down-sample, split and write."
    )
    _add_inputs(prepare)
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    prepare.add_argument(
        "--take", action="append", default=[], metavar="SOURCE=N", help="at most N records of a source; repeatable"
    )
    prepare.add_argument("--sft", type=_count, default=8200, metavar="N", help="records for warm-up (default 8200)")
    prepare.add_argument("--rl", type=_count, default=21000, metavar="N", help="records for RL (default 21000)")
    prepare.add_argument(
        "--test-share", type=float, default=0.05, metavar="X", help="share of questions held out (default 0.05)"
    )
    prepare.add_argument("--seed", type=int, default=0, help="of the down-sampling (default 0)")
    prepare.add_argument(
        "--names", choices=("as-is", "safe"), default="as-is", help="safe: tool names every chat endpoint accepts"
    )
    prepare.add_argument("--schema-valid", action="store_true", help="leave out answers that do not fit the schema")
    prepare.add_argument(
        "--max-rejects", type=float, default=0.25, metavar="X", help="largest share of rejects in a file (default 0.25)"
    )
    prepare.add_argument("--overwrite", action="store_true", help="replace a prepared folder")
    prepare.set_defaults(run=_prepare)

    audit = commands.add_parser(
        "audit", help="overlap with benchmarks", description="Shared tool names and 8-grams with benchmark questions."
    )
    _add_inputs(audit)
    audit.add_argument(
        "--benchmark", nargs="+", action="extend", type=Path, required=True, metavar="PATH", help="question files"
    )
    audit.add_argument("--json", type=Path, metavar="FILE", help="write the full result there")
    audit.set_defaults(run=_audit)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="data files or folders")
    parser.add_argument("--source", choices=_SOURCES, default="auto", help="what they are (default: told by content)")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return value


def _inspect(options: argparse.Namespace) -> None:
    from autotool_fast.files import write_text
    from autotool_fast.tasks.inspection import Samples, Tally, describe, describe_example, read_counted
    from autotool_fast.tasks.sources.load import find_inputs
    from autotool_fast.tasks.sources.rows import Reject

    samples = Samples(options.samples, options.seed)
    rejects: list[str] = []
    for path in options.paths:
        found = find_inputs(path, options.source)
        _report_skipped(found.skipped)
        for item in found.inputs:
            tally = Tally()
            for example in read_counted(item, tally):
                if not isinstance(example, Reject):
                    samples.add(example)
                elif options.rejects is not None:
                    rejects.append(json.dumps(example.to_json(), ensure_ascii=False) + "\n")
            print(describe(f"{item.source}  {item.path}", tally))
    for example in samples:
        print("\n" + describe_example(example))
    if options.rejects is not None:
        _write(options.rejects, lambda: write_text(options.rejects, "".join(rejects)))


def _prepare(options: argparse.Namespace) -> None:
    from autotool_fast.tasks.preparation import PARTS, Settings, prepare

    settings = Settings(
        inputs=tuple(options.paths),
        out=options.out,
        source=options.source,
        take=dict(map(_read_take, options.take)),
        sft=options.sft,
        rl=options.rl,
        test_share=options.test_share,
        seed=options.seed,
        names=options.names,
        schema_valid=options.schema_valid,
        max_rejects=options.max_rejects,
        overwrite=options.overwrite,
    )
    manifest = prepare(settings)
    for item in manifest["inputs"]:
        print(f"{item['source']:<8} {item['file']}: {item['records']} records, {item['rejects']} rejects")
    dropped = ", ".join(f"{name} {n}" for name, n in manifest["dropped"].items())
    print(f"left out: {dropped or 'none'}")
    for part in PARTS:
        output = manifest["outputs"][f"{part}.jsonl"]
        sources = ", ".join(f"{name} {n}" for name, n in output["sources"].items())
        print(f"{options.out / f'{part}.jsonl'}: {output['records']} records ({sources or 'none'})")
    made = [manifest["outputs"][f"{part}.jsonl"]["records"] for part in ("sft", "rl")]
    if made != [settings.sft, settings.rl]:
        print(f"fewer records than asked for: {made[0]} of {settings.sft} sft, {made[1]} of {settings.rl} rl")


def _audit(options: argparse.Namespace) -> None:
    from autotool_fast.files import write_json
    from autotool_fast.tasks.inspection import Tally, read_counted
    from autotool_fast.tasks.overlap import Audit, read_benchmarks
    from autotool_fast.tasks.sources.load import find_inputs
    from autotool_fast.tasks.sources.rows import Reject

    audit = Audit([benchmark for path in options.benchmark for benchmark in read_benchmarks(path)])
    for path in options.paths:
        found = find_inputs(path, options.source)
        _report_skipped(found.skipped)
        for item in found.inputs:
            for example in read_counted(item, Tally()):
                if not isinstance(example, Reject):
                    audit.add(example)
    print(f"{audit.seen} records")
    print(audit.table())
    if options.json is not None:
        _write(options.json, lambda: write_json(options.json, audit.to_json()))


def _read_take(text: str) -> tuple[str, int]:
    name, equals, number = text.partition("=")
    if not equals or not number.isdigit():
        raise UserError(f"cannot read '{text}'", where="--take", remedy="write SOURCE=N, for instance toolace=5000")
    return name, int(number)


def _report_skipped(skipped: Sequence[tuple[Path, str]]) -> None:
    for path, reason in skipped:
        print(f"{path}: left out, {reason}", file=sys.stderr)


def _write(path: Path, write) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=str(path)) from None


if __name__ == "__main__":
    sys.exit(main())
