"""One command that says how the kernels do on this machine, under the interpreter it is started with.

    PYTHONPATH=.:kernels python3 benchmarks/gpu_check.py --out DIR [--quick | --full] [--only SECTION ...] [--part I/K]

Sections: environment (versions, clocks, measured ceilings; builds csrc where there is an nvcc), tests (the kernel
tests that a GPU changes), accuracy (`benchmarks/checks.py`), linear, logits, policy, sample (the four benchmarks),
rollout (the rollout engine's GPU tests, and tokens per second with CUDA graphs on and off), training (a smoke run of
the trainer). Each runs in a process of its own with a time budget, so that a crash or a hang
loses nothing but itself; the quick set (the default) ends within nine minutes. A section that runs out of time is
"stopped": what it found until then is kept, and counts as failed only if it had failed, or had found nothing. A
benchmark that dies, or is stopped before it has timed our kernels, is repeated without the peers.

The full set is no single call: each of its sections may take FULL_SECONDS, and its benchmarks take more than that.
`--only linear --part 1/8`, 2/8 and so on measure an eighth of the tables each, in files of their own.

Under DIR: check.json with everything that is not a benchmark, and one JSON file per benchmark, written as they go;
older files of these names are removed first. The last thing printed is a short table. Without a GPU the same sections
run in a small form on the CPU, and every line says so. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = {
    "linear": "linear_logp_entropy",
    "logits": "logits_logp_entropy",
    "policy": "policy_loss",
    "sample": "sample_logp_entropy",
}
# Seconds, in the order in which sections run. The quick ones sum to QUICK_SECONDS.
BUDGETS = {
    "environment": 70,
    "tests": 95,
    "accuracy": 80,
    "linear": 85,
    "logits": 40,
    "policy": 25,
    "sample": 30,
    "rollout": 45,
    "training": 55,
}
QUICK_SECONDS = 525
FULL_SECONDS = 570  # of each section of the full set, and no bound on their sum
RETRY_SHARE = 0.3  # of a benchmark's budget, kept back for a repetition without the peers
CONTESTS = 10  # a benchmark's budget over this bounds one contest: there are four, and warming up costs as much
FULL_CONTEST_SECONDS = 10
BUILD_SECONDS = 50
TEST_PROCESSES = 8
# About compiled code, the same on every machine; they need no GPU and would take the whole budget.
OFFLINE_TESTS = ("test_kernels_compile.py", "test_kernels_offline.py")
FULL_TESTS = ("test_kernels_tune.py",)  # of a tool, and many
ENGINE_TESTS = ("test_rollout_kv_attention.py", "test_rollout_late.py")
# Options of benchmarks.rollout. A GPU plays 256 episodes of a published shape; the quick set 64, short turns alone.
ROLLOUT_GPU = ("--device", "cuda", "--shape", "qwen2.5-0.5b", "--prompts", "16", "--no-memory")
ROLLOUT_GPU_QUICK = ("--prompts", "4", "--turn-tokens", "20", "20")
ROLLOUT_CPU = ("--prompts", "1", "--group", "2", "--hidden", "64", "--layers", "1", "--vocab", "2048")
FAILING_LINE = re.compile(r"[.sxX]*[FE][.sxXFE]*(\s|$)|FAILED|ERROR")  # of pytest's progress, or a name
# The smoke preset without the command line's parser, which not every machine with a GPU has.
SMOKE_RUN = """
import dataclasses, sys
from autotool_fast.cli import load_preset
from autotool_fast.plan import check
from autotool_fast.runs import RunFolder
config = dataclasses.replace(load_preset("smoke"), out=sys.argv[1], device=sys.argv[2])
check(config)
with RunFolder.create(config) as run:
    from autotool_fast.stages import run_stages
    sys.exit(run_stages(config, run))
"""


class Outcome(NamedTuple):
    """How a section ended."""

    section: str
    state: str  # "passed", "failed", "stopped" (passed as far as it came) or "not run"
    seconds: float
    detail: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections, print the table."""
    args = parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section:
        return SECTIONS[args.section](args)
    begin = time.monotonic()
    sections = [name for name in BUDGETS if not args.only or name in args.only]
    gpu = _probe()
    where = "GPU" if gpu else "CPU, small forms: no GPU here"
    print(f"gpu_check on a {where}; {sys.executable}; {'full' if args.full else 'quick'} set", flush=True)
    outcomes: list[Outcome] = []
    written: list[Path] = []
    record: dict[str, Any] = {"measured_on": where, "set": "full" if args.full else "quick"}
    for name in sections:
        left = float("inf") if args.full else QUICK_SECONDS - (time.monotonic() - begin)
        budget = min(FULL_SECONDS if args.full else BUDGETS[name], left)
        print(f"\n== {name} (at most {budget:.0f} s)", flush=True)
        if budget < 5:
            outcomes.append(Outcome(name, "not run", 0.0, "no time left"))
        elif name in BENCHMARKS:
            outcome, path = _benchmark(name, args, gpu, budget)
            outcomes.append(outcome)
            written.append(path)
        else:
            outcome, details = _section(name, args, budget)
            outcomes.append(outcome)
            record[name] = details
        record["summary"] = [outcome._asdict() for outcome in outcomes]
        (args.out / "check.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\ngpu_check on a {where}: {time.monotonic() - begin:.0f} s")
    for outcome in outcomes:
        print(f"{outcome.section:<12} {outcome.state:<8} {outcome.seconds:5.0f} s  {outcome.detail}")
    for line in _headlines(written):
        print(line)
    return int(any(outcome.state == "failed" for outcome in outcomes))


def parser() -> argparse.ArgumentParser:
    """Options of this script."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON files")
    size = p.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="under nine minutes (the default)")
    size.add_argument("--full", action="store_true", help="every shape, mode and share")
    p.add_argument("--only", nargs="+", choices=tuple(BUDGETS), metavar="SECTION", help=", ".join(BUDGETS))
    p.add_argument("--part", default="1/1", metavar="I/K", help="every K-th table of a benchmark from the I-th on")
    p.add_argument("--verl", type=Path, help="a checkout of verl, passed on to the linear benchmark")
    p.add_argument("--section", choices=tuple(SECTIONS), help=argparse.SUPPRESS)
    p.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return p


def _environment() -> dict[str, str]:
    """The children's: our folders first, and compiled kernels even where the caller interprets them."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    return env | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONUNBUFFERED": "1"}


def _run(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit code (None: out of time) and the end of the output, which is also shown; the process group is ended."""
    with tempfile.TemporaryFile("w+b") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=_environment(), start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        text = log.read().decode("utf-8", errors="replace")
    print(text[-6000:], flush=True)
    return code, text


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"


def _probe() -> bool:
    """Whether torch sees a GPU, asked of a child: this process stays free of torch and of its crashes."""
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], env=_environment(), check=False).returncode == 0


def _section(name: str, args: argparse.Namespace, budget: float) -> tuple[Outcome, Any]:
    """Runs a section of this file in a child, which writes its outcome and details as it goes."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--section", name]
        command += ["--out", str(args.out.resolve()), "--result", str(result)] + ["--full"] * args.full
        begin = time.monotonic()
        code, text = _run(command, budget)
        seconds = time.monotonic() - begin
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    state, detail = found.get("state", "failed"), found.get("detail", "")
    if code is None:
        state = "stopped" if state in ("passed", "under way") else "failed"
        detail = f"stopped after {budget:.0f} s; until then: {detail or 'nothing'}"
    elif code != 0:
        state, detail = "failed", detail if found.get("state") == "failed" else f"exit {code}: {_last_line(text)}"
    return Outcome(name, state, seconds, detail), found.get("details")


def _benchmark(name: str, args: argparse.Namespace, gpu: bool, budget: float) -> tuple[Outcome, Path]:
    """One benchmark script and the file of its tables; on a CPU with few contestants, after a failure ours alone."""
    part = "" if args.part == "1/1" else f"_{args.part.replace('/', 'of')}"
    out = args.out.resolve() / f"{BENCHMARKS[name]}{part}.json"
    spare = out.with_name(f"{out.stem}_ours.json")
    for old in (out, spare):
        old.unlink(missing_ok=True)
    contest = FULL_CONTEST_SECONDS if args.full else budget / CONTESTS
    command = [sys.executable, "-m", f"benchmarks.{BENCHMARKS[name]}", "--out", str(out)]
    command += ["--full" if args.full and gpu else "--quick", "--part", args.part, "--seconds", f"{contest:.1f}"]
    command += ["--verl", str(args.verl.resolve())] if name == "linear" and args.verl else []
    begin = time.monotonic()
    first = budget if args.full else budget * (1 - RETRY_SHARE)
    code, text = _run(command if gpu else [*command, "--providers", "ours", "eager"], first)
    notes = [] if code == 0 else [_ending(code, first, text)]
    if code != 0 and not _times_of_ours(out):
        left = budget - (time.monotonic() - begin)
        if left >= RETRY_SHARE * budget - 1:
            code, text = _run([*command, "--providers", "ours", "--out", str(spare)], left)
            notes.append("repeated with ours alone" + (f": {_ending(code, left, text)}" if code != 0 else ""))
            out = spare
    tables = _tables(out)
    notes.append(f"{len(tables)} tables in {out.name}")
    failures = [
        f"{row['provider']}: {row['error']}"
        for table in tables
        for row in table["rows"]
        if row.get("error") and row["provider"].startswith("autotool") and not row.get("absent")
    ]
    state = "failed"
    if _times_of_ours(out) and not failures:
        state = {0: "passed", None: "stopped"}.get(code, "failed")
    return Outcome(name, state, time.monotonic() - begin, "; ".join(failures + notes)), out


def _ending(code: int | None, seconds: float, text: str) -> str:
    return f"stopped after {seconds:.0f} s" if code is None else f"exit {code}, {_last_line(text)}"


def _tables(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["tables"] if path.exists() else []


def _times_of_ours(path: Path) -> bool:
    rows = [row for table in _tables(path) for row in table["rows"]]
    return any("ms" in row and row["provider"].startswith("autotool") for row in rows)


def _headlines(paths: Sequence[Path]) -> list[str]:
    """For each table our best and the peers' best time of every mode."""
    lines = []
    for path in paths:
        for table in _tables(path):
            lines.append(table["title"] + " (unfinished)" * table.get("unfinished", False))
            rows = [row for row in table["rows"] if "ms" in row and not row["provider"].startswith(("gemm", "copy"))]
            for mode, gradients in dict.fromkeys((row["mode"], row.get("gradients", "")) for row in rows):
                same = [row for row in rows if (row["mode"], row.get("gradients", "")) == (mode, gradients)]
                same.sort(key=lambda row: row["ms"])
                best = [
                    next((r for r in same if r["provider"].startswith("autotool") == own), None)
                    for own in (True, False)
                ]
                text = "; ".join(f"{r['provider']} {r['ms']:.4g} ms{_rate(r)}" for r in best if r)
                lines.append(f"  {mode} {gradients}: {text}")
    return lines


def _rate(row: dict[str, Any]) -> str:
    rate = f" {row['tflops']:.3g} TFLOP/s" if "tflops" in row else f" {row['gb_s']:.4g} GB/s" if "gb_s" in row else ""
    return rate + (f" {100 * row['roofline']:.0f}%" if "roofline" in row else "")


def _save(args: argparse.Namespace, state: str, detail: str, details: Any) -> None:
    """A child's result so far."""
    text = json.dumps({"state": state, "detail": detail, "details": details})
    part = args.result.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(args.result)


def environment(args: argparse.Namespace) -> int:
    """Versions, device, backends, ceilings, and the C++ extension built."""
    import dataclasses
    import shutil

    import autotool_kernels
    import torch

    from benchmarks import measure
    from benchmarks.provenance import provenance

    details: dict[str, Any] = provenance()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if gpu:
        properties = torch.cuda.get_device_properties(device)
        details["capability"] = f"{properties.major}.{properties.minor}"
        details["multiprocessors"] = properties.multi_processor_count
        details["memory_gb"] = round(properties.total_memory / 1e9, 1)
        details["cuda"] = torch.version.cuda
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        details["nvidia_smi"] = f"{fields}: {asked.stdout.strip() or asked.stderr.strip()}"
    ceilings = measure.ceilings(device, quick=True)
    details["ceilings"] = dataclasses.asdict(ceilings)
    text = (
        f"{details['device']}; torch {torch.__version__}; copy {ceilings.copy_gb_s:.4g} GB/s; {ceilings.matmul} "
        f"{ceilings.matmul_tflops:.3g} TFLOP/s"
    )
    _save(args, "passed", text, details)
    details["csrc"] = _build(args.full) if gpu else "not built: no GPU"
    details["backends"] = {name: b._asdict() if hasattr(b, "_asdict") else dataclasses.asdict(b)
                           for name, b in autotool_kernels.backends().items()}  # fmt: skip
    state = "failed" if details["csrc"].startswith("failed") else "passed"
    _save(args, state, f"{text}; csrc {details['csrc']}", details)
    print(json.dumps(details, indent=1))
    return 0


def _build(full: bool) -> str:
    """csrc, if there is an nvcc; a child, because the extension is looked for when it is first used."""
    begin = time.monotonic()
    seconds = FULL_SECONDS / 2 if full else BUILD_SECONDS
    code, text = _run([sys.executable, "csrc/build.py"], seconds)
    if code == 0:
        return f"built in {time.monotonic() - begin:.0f} s"
    if code is None:
        return f"not built: stopped after {seconds:.0f} s"
    return f"not built: {_last_line(text)}" if "nvcc was not found" in text else f"failed: {_last_line(text)}"


def kernel_tests(args: argparse.Namespace) -> int:
    """The tests of kernels and attention, whose tensors are on the GPU where there is one; without a GPU `make test`
    runs them."""
    import importlib.util

    import torch

    if not torch.cuda.is_available():
        _save(args, "not run", "no GPU; `make test` runs them in the interpreter", None)
        return 0
    if importlib.util.find_spec("pytest") is None:
        _save(args, "not run", "pytest is not installed; the accuracy section compares every op with float64", None)
        return 0
    left_out = OFFLINE_TESTS if args.full else OFFLINE_TESTS + FULL_TESTS
    files = sorted(str(p) for p in (ROOT / "tests").glob("test_kernels_*.py") if p.name not in left_out)
    if importlib.util.find_spec("transformers"):
        files.append(str(ROOT / "tests" / "test_attention.py"))
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--strict-markers", "-q", "--tb=line", *files]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(TEST_PROCESSES)]
    if not args.full:
        command += ["-m", "gpu or not slow"]
    lines: list[str] = []
    state = "under way"
    with tempfile.TemporaryDirectory() as folder:
        command += ["-o", f"cache_dir={folder}"]  # the checkout is left as it is
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        for line in process.stdout:
            print(line, end="", flush=True)
            lines = [*lines, line.rstrip()][-60:]
            state = "failed" if FAILING_LINE.match(line) else state
            _save(args, state, f"under way: {_last_line(line)}", lines)
        code = process.wait()
    summary = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "no summary")
    _save(args, "passed" if code == 0 else "failed", summary, lines)
    return code


def accuracy(args: argparse.Namespace) -> int:
    """`benchmarks/checks.py`, saved after each check."""
    import torch

    from benchmarks.checks import run_checks, setting

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    done: list[dict[str, Any]] = []
    failed: list[str] = []
    for check in run_checks(setting(device, args.full)):
        done.append(check._asdict())
        verdict = {True: "passed", False: "FAILED", None: "not run"}[check.passed]
        print(f"{verdict:<8} {check.name}: {check.detail}", flush=True)
        failed = [c["name"] for c in done if c["passed"] is False]
        detail = f"{sum(c['passed'] is True for c in done)} checks passed, {len(failed)} failed"
        detail += f", {sum(c['passed'] is None for c in done)} not possible on this {device.type.upper()}"
        _save(args, "failed" if failed else "passed", "; ".join([detail, *failed[:3]]), done)
    return int(bool(failed))


def rollouts(args: argparse.Namespace) -> int:
    """The rollout engine: on a GPU its tests that need one, then `benchmarks.rollout` with our engines alone."""
    import importlib.util

    import torch

    gpu = torch.cuda.is_available()
    missing = [name for name in ("transformers", "tokenizers", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        _save(args, "not run", f"the engine needs packages that are not here: {', '.join(missing)}", None)
        return 0
    tested = "no GPU tests on a CPU"
    state = "passed"
    if gpu and importlib.util.find_spec("pytest"):
        files = [str(ROOT / "tests" / name) for name in ENGINE_TESTS]
        command = [sys.executable, "-m", "pytest", "-o", "addopts=--strict-markers", "-q", "--tb=line", "-m", "gpu"]
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [*command, "-o", f"cache_dir={folder}", *files], capture_output=True, text=True, cwd=ROOT, check=False
            )
        print(done.stdout[-3000:], done.stderr[-1000:], flush=True)
        tested = f"tests: {_last_line(done.stdout)}"
        state = "passed" if done.returncode == 0 else "failed"
    _save(args, "failed" if state == "failed" else "under way", tested, None)
    out = args.out.resolve() / "rollout.json"
    out.unlink(missing_ok=True)
    options = [*ROLLOUT_GPU, *(() if args.full else ROLLOUT_GPU_QUICK)] if gpu else ROLLOUT_CPU
    command = [sys.executable, "-m", "benchmarks.rollout", "--providers", "ours", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    print(done.stdout[-4000:], done.stderr[-1000:], flush=True)
    rows = [row for table in _tables(out) for row in table["rows"]]
    rates = [f"{r['provider']} {r['tokens_s']:.0f} tokens/s" if "tokens_s" in r else f"{r['provider']}: {r['error']}"
             for r in rows]  # fmt: skip
    if done.returncode or not rows or any(row.get("error") for row in rows):
        state = "failed"
        rates = rates or [_last_line(done.stdout + done.stderr)]
    _save(args, state, "; ".join([tested, *rates]), rows)
    return int(state == "failed")


def training(args: argparse.Namespace) -> int:
    """The smoke preset, from random weights to the report, on the GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        command = [sys.executable, "-c", SMOKE_RUN, str(run), device]
        with log.open("w") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
            code = None
            while code is None:
                finished = [path.stem for path in (run / "stages").glob("*.json")]
                _save(args, "under way", f"{len(finished)} stages on {device}", finished)
                try:
                    code = process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    continue
        finished = sorted(path.stem for path in (run / "stages").glob("*.json"))
        text = log.read_text(encoding="utf-8", errors="replace")
    seconds = time.monotonic() - begin
    print(text[-3000:])
    missing = re.search(r"No module named '([^']+)'", text)
    if missing:
        remedy = f"{sys.executable} -m pip install {missing[1].partition('.')[0]}"
        _save(args, "not run", f"the trainer needs a package that is not here: {remedy}", None)
        return 0
    detail = f"smoke preset, --device {device}: {len(finished)} stages in {seconds:.0f} s"
    passed = code == 0
    _save(args, "passed" if passed else "failed", detail if passed else f"{detail}; {_last_line(text)}", finished)
    return code


SECTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "environment": environment,
    "tests": kernel_tests,
    "accuracy": accuracy,
    "rollout": rollouts,
    "training": training,
}

if __name__ == "__main__":
    sys.exit(main())
