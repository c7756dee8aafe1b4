"""One command that says how the kernels do on this machine, under the interpreter it is started with.

    PYTHONPATH=.:kernels python3 benchmarks/gpu_check.py --out DIR [--quick | --full] [--only SECTION ...]

Sections: environment (versions, clocks, measured ceilings; builds csrc where there is an nvcc), tests (the kernel
tests that a GPU changes), accuracy (`benchmarks/checks.py`), linear, logits, policy, sample (the four benchmarks),
training (a smoke run of the trainer). Each runs in a process of its own with a time budget, so that a crash or a hang
loses nothing but itself; the quick set (the default) ends within nine minutes. A benchmark that dies is repeated
without the peers. Under DIR: check.json with everything that is not a benchmark, and one JSON file per benchmark,
written as they go. The last thing printed is a short table. Without a GPU the same sections run in a small form on the
CPU, and every line says so. Exit code 1 if anything failed.
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
    "environment": 75,
    "tests": 105,
    "accuracy": 85,
    "linear": 105,
    "logits": 40,
    "policy": 25,
    "sample": 25,
    "training": 65,
}
QUICK_SECONDS = 525
FULL_FACTOR = 8  # of the quick budgets, and no bound on their sum
RETRY_SECONDS = 25  # least time left for a repetition without the peers
# About compiled code, the same on every machine; they need no GPU and would take the whole budget.
OFFLINE_TESTS = ("test_kernels_compile.py", "test_kernels_offline.py")


class Outcome(NamedTuple):
    """How a section ended."""

    section: str
    state: str  # "passed", "failed" or "not run"
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
    record: dict[str, Any] = {"measured_on": where, "set": "full" if args.full else "quick"}
    for name in sections:
        left = float("inf") if args.full else QUICK_SECONDS - (time.monotonic() - begin)
        budget = min(BUDGETS[name] * (FULL_FACTOR if args.full else 1), left)
        print(f"\n== {name} (at most {budget:.0f} s)", flush=True)
        if budget < 5:
            outcomes.append(Outcome(name, "not run", 0.0, "no time left"))
        elif name in BENCHMARKS:
            outcomes.append(_benchmark(name, args, gpu, budget))
        else:
            outcome, details = _section(name, args, budget)
            outcomes.append(outcome)
            record[name] = details
        record["summary"] = [outcome._asdict() for outcome in outcomes]
        (args.out / "check.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\ngpu_check on a {where}: {time.monotonic() - begin:.0f} s")
    for outcome in outcomes:
        print(f"{outcome.section:<12} {outcome.state:<8} {outcome.seconds:5.0f} s  {outcome.detail}")
    for line in _headlines(args.out, [name for name in sections if name in BENCHMARKS]):
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
        state, detail = "failed", f"stopped after {budget:.0f} s; until then: {detail or 'nothing'}"
    elif code != 0:
        state, detail = "failed", detail if found.get("state") == "failed" else f"exit {code}: {_last_line(text)}"
    return Outcome(name, state, seconds, detail), found.get("details")


def _benchmark(name: str, args: argparse.Namespace, gpu: bool, budget: float) -> Outcome:
    """One benchmark script; on a CPU with few contestants, after a failure with ours alone."""
    out = args.out.resolve() / f"{BENCHMARKS[name]}.json"
    command = [sys.executable, "-m", f"benchmarks.{BENCHMARKS[name]}", "--out", str(out)]
    command.append("--full" if args.full and gpu else "--quick")
    command += ["--verl", str(args.verl.resolve())] if name == "linear" and args.verl else []
    begin = time.monotonic()
    code, text = _run(command if gpu else [*command, "--providers", "ours", "eager"], budget)
    notes = []
    left = budget - (time.monotonic() - begin)
    if code not in (None, 0):
        notes.append(f"with the peers: exit {code}, {_last_line(text)}")
        if left > RETRY_SECONDS:
            out = out.with_name(f"{out.stem}_ours.json")
            code, text = _run([*command, "--providers", "ours", "--out", str(out)], left)
            notes.append("repeated with ours alone")
    if code is None:
        notes.append(f"stopped after {budget:.0f} s")
    tables = json.loads(out.read_text(encoding="utf-8"))["tables"] if out.exists() else []
    notes.append(f"{len(tables)} tables in {out.name}")
    failures = [
        f"{row['provider']}: {row['error']}"
        for table in tables
        for row in table["rows"]
        if row.get("error") and row["provider"].startswith("autotool") and not _cannot(row["error"])
    ]
    passed = code == 0 and bool(tables) and not failures
    return Outcome(name, "passed" if passed else "failed", time.monotonic() - begin, "; ".join(failures + notes))


def _cannot(error: str) -> bool:
    """Whether a row says that a backend does not serve here, rather than that it broke."""
    return any(text in error for text in ("cannot serve", "interpreter is for tests", "has no "))


def _headlines(out: Path, names: Sequence[str]) -> list[str]:
    """For each table our best and the peers' best time of every mode."""
    lines = []
    for name in names:
        path = out / f"{BENCHMARKS[name]}.json"
        for table in json.loads(path.read_text(encoding="utf-8"))["tables"] if path.exists() else []:
            lines.append(table["title"])
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
    details["csrc"] = _build() if gpu else "not built: no GPU"
    state = "failed" if details["csrc"].startswith("failed") else "passed"
    _save(args, state, details["csrc"], details)
    details["backends"] = {name: b._asdict() if hasattr(b, "_asdict") else dataclasses.asdict(b)
                           for name, b in autotool_kernels.backends().items()}  # fmt: skip
    ceilings = measure.ceilings(device, quick=True)
    details["ceilings"] = dataclasses.asdict(ceilings)
    text = (
        f"{details['device']}; torch {torch.__version__}; copy {ceilings.copy_gb_s:.4g} GB/s; {ceilings.matmul} "
        f"{ceilings.matmul_tflops:.3g} TFLOP/s; csrc {details['csrc']}"
    )
    _save(args, state, text, details)
    print(json.dumps(details, indent=1))
    return 0


def _build() -> str:
    """csrc, if there is an nvcc; a child, because the extension is looked for when it is first used."""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "csrc/build.py"], capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode == 0:
        return f"built in {time.monotonic() - begin:.0f} s"
    reason = _last_line(done.stderr)
    return f"not built: {reason}" if "nvcc was not found" in done.stderr else f"failed: {reason}"


def kernel_tests(args: argparse.Namespace) -> int:
    """The kernel tests, whose tensors are on the GPU where there is one; without a GPU `make test` runs them."""
    import importlib.util

    import torch

    if not torch.cuda.is_available():
        _save(args, "not run", "no GPU; `make test` runs them in the interpreter", None)
        return 0
    if importlib.util.find_spec("pytest") is None:
        _save(args, "not run", "pytest is not installed; the accuracy section compares every op with float64", None)
        return 0
    files = sorted(str(p) for p in (ROOT / "tests").glob("test_kernels_*.py") if p.name not in OFFLINE_TESTS)
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--strict-markers", "-q", "--tb=line", "-p",
               "no:cacheprovider", *files]  # fmt: skip
    if not args.full:
        command += ["-m", "gpu or not slow"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    lines: list[str] = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines = [*lines, line.rstrip()][-60:]
        _save(args, "failed", f"under way: {_last_line(line)}", lines)
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


def training(args: argparse.Namespace) -> int:
    """The smoke preset, from random weights to the report, on the GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        command = [sys.executable, "-m", "autotool_fast.train", "--preset", "smoke", "--out", str(run)]
        command += ["--device", device]
        with log.open("w") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
            code = None
            while code is None:
                finished = [path.stem for path in (run / "stages").glob("*.json")]
                _save(args, "failed", f"{len(finished)} stages on {device}", finished)
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
        _save(args, "not run", f"the trainer needs {missing[1]}, which this interpreter does not have", None)
        return 0
    detail = f"smoke preset, --device {device}: {len(finished)} stages in {seconds:.0f} s"
    passed = code == 0
    _save(args, "passed" if passed else "failed", detail if passed else f"{detail}; {_last_line(text)}", finished)
    return code


SECTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "environment": environment,
    "tests": kernel_tests,
    "accuracy": accuracy,
    "training": training,
}

if __name__ == "__main__":
    sys.exit(main())
