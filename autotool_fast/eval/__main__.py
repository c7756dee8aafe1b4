"""`python -m autotool_fast.eval --benchmark bfcl --bfcl DIR --policy oracle --out runs/oracle`.

Parses options, plays, prints the tables. Errors that the user can fix are one line and exit code 2; Ctrl-C keeps what
is done and exits with 130. Nothing heavy is imported before the options are known to be good.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from autotool_fast import schema
from autotool_fast.errors import UserError, readers_may_leave

if TYPE_CHECKING:
    from autotool_fast.eval.records import Benchmark, Policy

PROGRAM = "python -m autotool_fast.eval"
BENCHMARKS = ("bfcl", "apibank", "acebench", "world")
POLICIES = ("oracle", "null", "engine", "endpoint")
MODES = ("auto", "think", "no_think")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if unknown != message.split()[0]:
            known = [name.lstrip("-") for action in self._actions for name in action.option_strings]
            guess = schema.nearest(unknown.lstrip("-"), known)
            remedy = f"did you mean --{guess}?" if guess else "see --help"
            raise UserError(f"unknown option {unknown}", remedy=remedy)
        raise UserError(message, remedy="see --help")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError("must be a positive number of seconds")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = _Parser(prog=PROGRAM, description=__doc__.partition("\n\n")[2], allow_abbrev=False)
    p.add_argument("--benchmark", choices=BENCHMARKS, help="required")
    p.add_argument("--policy", choices=POLICIES, help="required")
    p.add_argument("--out", type=Path, help="results folder, continued (default: runs/eval-BENCHMARK-POLICY)")
    p.add_argument("--modes", default="auto", help="comma list of auto, think, no_think (default: auto)")
    p.add_argument("--categories", default="", help="comma list of categories or groups (default: all)")
    p.add_argument("--limit", type=_positive, help="tasks of each category")
    p.add_argument("--chunk", type=_positive, default=64, help="tasks played side by side (default: 64)")
    p.add_argument("--deadline", type=_seconds, default=20.0, help="seconds one call of a simulator may take")
    data = p.add_argument_group("where the benchmarks are")
    data.add_argument("--bfcl", type=Path, help="folder of the unzipped bfcl-eval wheel (default: the installed one)")
    data.add_argument("--apibank", type=Path, help="the folder api-bank of a DAMO-ConvAI checkout")
    data.add_argument("--apibank-rule", choices=("match", "execute"), default="match", help="what counts as correct")
    data.add_argument("--acebench", type=Path, help="an ACEBench checkout")
    data.add_argument("--language", choices=("en", "zh"), default="en", help="of ACEBench (default: en)")
    data.add_argument("--rendering", choices=("compact", "natural"), default="compact", help="of the embedded world")
    engine = p.add_argument_group("policy engine")
    engine.add_argument("--checkpoint", help="model folder")
    engine.add_argument("--chat-format", default="auto", help="of the model (default: recognised)")
    engine.add_argument("--slots", type=_positive, default=32, help="episodes decoded at once (default: 32)")
    engine.add_argument("--max-len", type=_positive, default=None, help="tokens of an episode (default: the model's)")
    engine.add_argument("--max-new-tokens", type=_positive, default=8192, help="sampled tokens of an episode")
    engine.add_argument("--device", default="", help="cpu, cuda, ... (default: the GPU if there is one)")
    remote = p.add_argument_group("policy endpoint")
    remote.add_argument("--endpoint", help="address of an OpenAI-compatible server, such as http://localhost:8000/v1")
    remote.add_argument("--endpoint-model", help="name the server knows the model by")
    remote.add_argument("--mode-switch", choices=("none", "tag", "enable_thinking"), default="none")
    remote.add_argument("--timeout", type=_seconds, default=120.0, help="seconds for one request (default: 120)")
    remote.add_argument("--retries", type=int, default=7, help="after failures that may pass (default: 7, a minute)")
    remote.add_argument("--concurrency", type=_positive, default=8, help="requests at once (default: 8)")
    remote.add_argument("--key-variable", default="OPENAI_API_KEY", help="environment variable with the API key")
    remote.add_argument("--parameters", type=float, default=0.0, help="of the model, for ACU")
    both = p.add_argument_group("sampling")
    both.add_argument("--max-turn-tokens", type=_positive, default=1024, help="tokens of one reply (default: 1024)")
    both.add_argument("--temperature", type=float, default=0.0)
    both.add_argument("--seed", type=int, default=0)
    export = p.add_argument_group("BFCL result files")
    export.add_argument("--export-bfcl", type=Path, help="write files for `bfcl evaluate` under this folder")
    export.add_argument("--bfcl-model", default="Qwen/Qwen3-8B-FC", help="registry name to write them as")
    return p


@readers_may_leave
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        return _run(parser().parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    for name, choices in (("benchmark", BENCHMARKS), ("policy", POLICIES)):
        if getattr(options, name) is None:
            raise UserError("is missing", where=f"--{name}", remedy=f"choose from {', '.join(choices)}")
    modes = _list(options.modes)
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise UserError(f"unknown mode '{unknown[0]}'", where="--modes", remedy=f"choose from {', '.join(MODES)}")
    if options.export_bfcl and (options.benchmark != "bfcl" or len(modes) != 1):
        raise UserError("needs --benchmark bfcl and one mode", where="--export-bfcl")
    benchmark = _benchmark(options)
    try:
        policy = _policy(options)
        return _evaluate(options, benchmark, policy, modes)
    except OSError as error:
        if not (error.strerror and error.filename):
            raise
        remedy = "free some space or check the permissions, then repeat the command"
        raise UserError(f"cannot be read or written ({error.strerror})", where=error.filename, remedy=remedy) from error
    finally:
        benchmark.close()


def _list(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for item in text.replace(" ", ",").split(",") if item))


def _needed(options: argparse.Namespace, name: str) -> Any:
    value = getattr(options, name)
    if value is None:
        chosen = options.benchmark if name in BENCHMARKS else options.policy
        raise UserError("is missing", where=f"--{name.replace('_', '-')}", remedy=f"{chosen} needs it")
    return value


def _benchmark(options: argparse.Namespace) -> Benchmark:
    categories = _list(options.categories)
    if options.benchmark == "bfcl":
        from autotool_fast.eval.bfcl import Bfcl

        return Bfcl(options.bfcl, categories, deadline_s=options.deadline)
    if options.benchmark == "apibank":
        from autotool_fast.eval.apibank import ApiBank

        folder = _needed(options, "apibank")
        return ApiBank(folder, categories, rule=options.apibank_rule, deadline_s=options.deadline)
    if options.benchmark == "acebench":
        from autotool_fast.eval.acebench import AceBench

        folder = _needed(options, "acebench")
        return AceBench(folder, categories, language=options.language, deadline_s=options.deadline)
    from autotool_fast.eval.embedded import Embedded

    return Embedded(categories, style=options.rendering)


def _policy(options: argparse.Namespace) -> Policy:
    if options.policy == "engine":
        from autotool_fast.chat.__main__ import find_model

        checkpoint = find_model(Path(_needed(options, "checkpoint")))
        from autotool_fast.eval.engine_policy import EngineSettings, LocalEngine

        settings = EngineSettings(
            checkpoint=str(checkpoint),
            chat_format=options.chat_format,
            slots=options.slots,
            max_len=options.max_len or 0,
            max_turn_tokens=options.max_turn_tokens,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            device=options.device,
        )
        return LocalEngine(settings)
    if options.policy == "endpoint":
        from autotool_fast.eval.endpoint import Endpoint, EndpointSettings

        remote = EndpointSettings(
            url=_needed(options, "endpoint"),
            model=_needed(options, "endpoint_model"),
            mode_switch=options.mode_switch,
            max_tokens=options.max_turn_tokens,
            temperature=options.temperature,
            seed=options.seed,
            timeout_s=options.timeout,
            retries=options.retries,
            concurrency=options.concurrency,
            key_variable=options.key_variable,
            parameters=int(options.parameters),
        )
        return Endpoint(remote)
    from autotool_fast.eval.policies import Null, Oracle

    return Oracle() if options.policy == "oracle" else Null()


def _evaluate(options: argparse.Namespace, benchmark: Benchmark, policy: Policy, modes: tuple[str, ...]) -> int:
    from autotool_fast import files
    from autotool_fast.eval.harness import run
    from autotool_fast.eval.table import print_tables, summarise

    folder = options.out or Path("runs") / f"eval-{options.benchmark}-{options.policy}"
    shown = sys.stderr.isatty()

    def progress(mode: str, done: int, total: int) -> None:
        if shown:
            print(f"\r{mode} {done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)

    rows = run(
        benchmark, policy, folder, modes=modes, limit=options.limit, chunk=options.chunk, on_progress=progress
    )
    if refusals := getattr(policy, "refusals", None):
        print(f"{len(refusals)} requests refused, their episodes are wrong: {refusals[0]}", file=sys.stderr)
    summary = summarise(benchmark, rows, modes, policy.parameters)
    files.write_json(folder / "summary.json", summary)
    print_tables(f"{benchmark.name}, policy {policy.name}", summary)
    if policy.name == "oracle":
        _list_failures(rows)
    if options.export_bfcl:
        from autotool_fast.eval.bfcl_scores import export

        written = export(rows, options.export_bfcl, options.bfcl_model)
        print(f"{len(written)} result files under {options.export_bfcl}")
    print(f"results: {folder}")
    return 0


def _list_failures(rows: Sequence[dict[str, Any]]) -> None:
    """Name the entries whose own ground truth does not pass."""
    failures = [row for row in rows if not row["correct"]]
    for row in failures:
        detail = json.dumps(row["details"].get("error", ""))[:160] if row["details"] else ""
        print(f"ground truth fails: {row['id']} ({row['mode']}): {row['reason']} {detail}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
