"""Machine code of every Triton kernel of the package, as the launchers launch it, without a GPU.

    python tests/kernels_offline.py --table [--only forward] [--arch 90] [--workers 2]

Runs the package's host code on meta tensors for representative sizes and for every shipped configuration, compiles
each distinct launch once per architecture, and reads registers, spills, shared memory and matrix instructions. The
results are kept under .pytest_cache by the hash of everything that decides them. test_kernels_offline.py runs this
file in a process of its own, because kernels imported under Triton's interpreter cannot be compiled.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kernels" / "autotool_kernels"
CACHE = ROOT / ".pytest_cache" / "d" / "machine_code"
MAIN, SECONDARY = (80, 90, 100), (86, 120)  # sm_89 has the instructions and the shared memory of sm_86
HEADS = {"7b": (3584, 152064), "0.5b": (896, 151936)}


class Problem(NamedTuple):
    """Host code to run on meta tensors, and the architectures for which its launches must compile."""

    name: str
    run: Callable[[], Any]
    architectures: tuple[int, ...] = MAIN


def linear(
    h: int, v: int, n: int, dtype: str, store_rows: int = 0, weight_sum: bool = False, **head
) -> Callable[[], None]:
    """Forward and backward of the linear op: a recomputed backward, or one that also reads stored logits.

    `weight_sum`: dW is added to a sum, as in the chunked step.
    """

    def run():
        import torch
        from autotool_kernels import reference, triton_linear

        def new(*shape, kind=dtype):
            return torch.empty(shape, dtype=getattr(torch, kind), device="meta")

        hidden, weight, target = new(n, h), new(v, h), new(n, kind="int64")
        tensors = {"bias": (v,), "row_temperature": (n,)}
        settings = {k: new(*tensors[k], kind=s) if k in tensors else s for k, s in head.items()}
        options = reference.Head(**settings)
        stats, store = triton_linear.linear_forward(hidden, weight, target, options, store_rows * v * 3)
        grads = new(n, kind="float32"), new(n, kind="float32")
        triton_linear.linear_backward(
            *grads, hidden, weight, target, stats, store, options, need_bias=options.bias is not None,
            weight_sum=new(v, h, kind="float32") if weight_sum else None,
        )  # fmt: skip

    return run


def logits(n: int, v: int, dtype: str, stride: int = 1, inplace: bool = False) -> Callable[[], None]:
    def run():
        import torch
        from autotool_kernels import triton_logits

        x = torch.empty((n, v * stride), dtype=getattr(torch, dtype), device="meta")[:, ::stride]
        target = torch.empty(n, dtype=torch.int64, device="meta")
        stats = triton_logits.logits_forward(x, target, 1.0, None, -100)
        g, h = torch.empty((2, n), device="meta")
        arguments = (g, h, x, target, stats, 1.0, None, -100)
        triton_logits.logits_backward(*arguments, **({"out": x} if inplace else {}))

    return run


def sample(rows: int, v: int, dtype: str) -> Callable[[], None]:
    def run():
        import torch
        from autotool_kernels import triton_sample

        x = torch.empty((rows, v), dtype=getattr(torch, dtype), device="meta")
        seed, offset = torch.empty((2, rows), dtype=torch.int64, device="meta")
        triton_sample.sample_forward(x, 1.0, None, seed, offset)

    return run


def policy(tokens: int, sequences: int, gate_tensor: bool = False, normalize: int = 0) -> Callable[[], None]:
    def run():
        import torch
        from autotool_kernels import triton_policy

        logp, old, entropy = (torch.empty(tokens, device="meta") for _ in range(3))
        advantages = torch.empty(sequences, device="meta")
        cu_seqlens = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
        mask = torch.empty(tokens, dtype=torch.bool, device="meta")
        is_short = torch.empty(sequences, dtype=torch.int8, device="meta")
        gate = torch.empty(4, device="meta") if gate_tensor else None
        triton_policy.policy_forward(
            logp, old, entropy, advantages, cu_seqlens, mask, is_short, [0.1, 0.2, 0.0, 0.01], gate, 0.2, 0.28,
            normalize, 1.0,
        )  # fmt: skip

    return run


def problems() -> list[Problem]:
    """Sizes whose launches differ, then every entry of tuned/*.json on its architecture.

    Not every size on every architecture: a cold run should stay within some minutes of two cores.
    """
    h, v = HEADS["0.5b"]
    ragged = 4096, 128259  # a vocabulary that ends inside a group of 128 columns
    options = {"bias": "bfloat16", "logit_scale": 0.5, "softcap": 30.0, "row_temperature": "float32"}
    stored = {"store_rows": 4096, "weight_sum": True}
    options32 = {**options, "bias": "float32"}
    out = [
        Problem("linear 0.5b N8192 bf16", linear(h, v, 8192, "bfloat16"), MAIN + SECONDARY),
        Problem("linear 7b N8192 bf16", linear(*HEADS["7b"], 8192, "bfloat16")),
        Problem("linear 7b N64 bf16", linear(*HEADS["7b"], 64, "bfloat16"), (90,)),  # narrower rows
        Problem("linear 7b N65536 bf16", linear(*HEADS["7b"], 65536, "bfloat16"), (90,)),
        Problem("linear 7b N8192 fp16", linear(*HEADS["7b"], 8192, "float16"), (90,)),
        Problem("linear 0.5b N8192 fp32", linear(h, v, 8192, "float32"), (80, 90)),
        Problem("linear 0.5b N8192 bf16 all options", linear(h, v, 8192, "bfloat16", **options)),
        Problem("linear 0.5b N8192 bf16 half stored", linear(h, v, 8192, "bfloat16", store_rows=4096), (80, 90)),
        Problem("linear H897 N8192 bf16", linear(897, v, 8192, "bfloat16")),  # rows TMA cannot address
        # Every class of tile with its heaviest epilogues: stored logits with options, with missing columns, with both.
        Problem("linear 7b N8192 bf16 half stored", linear(*HEADS["7b"], 8192, "bfloat16", **stored)),
        Problem("linear 7b N8192 bf16 softcap", linear(*HEADS["7b"], 8192, "bfloat16", softcap=30.0)),
        Problem("linear 7b N8192 bf16 options, stored", linear(*HEADS["7b"], 8192, "bfloat16", **stored, **options)),
        Problem("linear H2048 N8192 bf16 softcap, stored", linear(2048, v, 8192, "bfloat16", **stored, softcap=30.0)),
        Problem("linear V128259 N8192 bf16", linear(*ragged, 8192, "bfloat16")),
        Problem("linear V128259 N8192 bf16 stored", linear(*ragged, 8192, "bfloat16", **stored), MAIN + SECONDARY),
        Problem(
            "linear V128259 N8192 bf16 options, stored", linear(*ragged, 8192, "bfloat16", **stored, **options),
            MAIN + SECONDARY,
        ),
        Problem("linear V128259 N8192 bf16 softcap", linear(*ragged, 8192, "bfloat16", softcap=30.0), (90,)),
        Problem("linear V128259 N64 bf16 options, stored", linear(*ragged, 64, "bfloat16", 64, **options), (90,)),
        Problem("linear V128259 H896 N8192 bf16 stored", linear(896, 128259, 8192, "bfloat16", **stored), (90,)),
        Problem("linear V128259 H897 N8192 bf16 stored", linear(897, 128259, 8192, "bfloat16", **stored)),
        Problem(
            "linear V128259 H897 N8192 bf16 options, stored", linear(897, 128259, 8192, "bfloat16", **stored, **options)
        ),
        Problem("linear V128259 N8192 fp32 stored", linear(*ragged, 8192, "float32", **stored)),
        Problem(
            "linear V128259 N8192 fp32 options, stored", linear(*ragged, 8192, "float32", **stored, **options32),
            MAIN + SECONDARY,
        ),
        Problem("logits N8192 bf16", logits(8192, v, "bfloat16")),
        Problem("logits N4 bf16", logits(4, v, "bfloat16")),
        Problem("logits N8192 fp32 in place", logits(8192, v, "float32", inplace=True)),
        Problem("logits N8192 bf16 strided", logits(8192, v, "bfloat16", stride=3), (90,)),
        Problem("sample B4 bf16", sample(4, v, "bfloat16")),
        Problem("sample B256 fp32", sample(256, v, "float32")),
        Problem("policy T65536 B512", policy(65536, 512)),
        Problem("policy T512 B4 gate tensor", policy(512, 4, gate_tensor=True, normalize=1), (90,)),
    ]
    return out + tuned_problems()


def tuned_problems() -> list[Problem]:
    found = {}
    for path in sorted(PACKAGE.glob("tuned/*.json")):
        data = json.loads(path.read_text())
        capability = int(data["architecture"].removeprefix("sm_"))
        for entry in data["entries"]:
            size = tuple(entry[k] for k in ("hidden", "vocab", "tokens", "dtype"))
            found[capability, size] = Problem(
                "linear tuned H{} V{} N{} {}".format(*size), linear(*size), (capability,)
            )
    return list(found.values())


def cases(chosen: list[Problem], architectures: set[int] | None = None) -> list[dict]:
    """One record per distinct launch (no figures yet); one with an error per problem whose host code fails."""
    from autotool_kernels import machine_code

    found: dict[str, dict] = {}
    for problem in chosen:
        for capability in problem.architectures:
            if architectures and capability not in architectures:
                continue
            try:
                with machine_code.recording(capability) as launches:
                    problem.run()
            except Exception as error:  # one broken launcher must not hide the other kernels' figures
                key = f"{problem.name} {capability}"
                found[key] = {
                    "kernel": "host code", "architecture": capability, "configuration": "", "key": key,
                    "problems": [problem.name], "error": f"{one_line(error)} at {innermost(error)}",
                }  # fmt: skip
                continue
            for launch in launches:
                case = found.setdefault(
                    launch.key,
                    {
                        "kernel": launch.name, "architecture": capability, "configuration": launch.configuration,
                        "key": launch.key, "problems": [], "programs": launch.programs, "launch": launch,
                    },
                )  # fmt: skip
                if problem.name not in case["problems"]:
                    case["problems"].append(problem.name)
    return list(found.values())


def unlaunched(modules: list[str], found: list[dict]) -> list[str]:
    """Kernels of the modules that no problem launched; helpers that kernels call are not launched by design."""
    from autotool_kernels import machine_code
    from triton.runtime.jit import JITFunction

    kernels = {
        id(x): x for name in modules for x in vars(importlib.import_module(name)).values() if isinstance(x, JITFunction)
    }.values()
    called = {
        node.id for kernel in kernels for node in ast.walk(kernel.parse()) if isinstance(node, ast.Name)
    }  # a kernel's own name is not a Name node of its source
    names = {machine_code.kernel_name(k) for k in kernels if k.fn.__name__ not in called and k.fn.__module__ in modules}
    return sorted(names - {case["kernel"] for case in found})


def package_modules() -> list[str]:
    return [f"autotool_kernels.{path.stem}" for path in sorted(PACKAGE.glob("triton_*.py"))]


def package_sources() -> list[Path]:
    """Every file that decides what is launched."""
    return sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("tuned/*.json")])


def measure(case: dict) -> dict:
    """Figures of one case, or the compiler's error, from the cache or by compilation."""
    from autotool_kernels import machine_code

    if "error" in case:
        return case
    path = CACHE / f"{case['key']}.json"
    if path.exists():
        return case | {"figures": json.loads(path.read_text())}
    try:
        found = machine_code.figures(case["launch"]).as_dict()
    except Exception as error:  # ptxas, LLVM and Triton raise what they like; the case reports it
        return case | {"error": one_line(error)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(found))
    part.replace(path)
    return case | {"figures": found}


_WORK: list[dict] = []  # what the forked workers compile: launches hold functions that cannot be pickled


def _measure_index(index: int) -> tuple[int, dict]:
    done = measure(_WORK[index])
    return index, {k: x for k, x in done.items() if k != "launch"}


def measure_all(work: list[dict], workers: int) -> Iterator[dict]:
    """Each case with figures or an error and what is wrong, in order of completion."""
    from autotool_kernels import machine_code

    _WORK[:] = work
    with tempfile.TemporaryDirectory() as folder:
        # Triton's own cache is left alone: the figures are what is kept.
        os.environ["TRITON_CACHE_DIR"] = folder
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for _, case in pool.imap_unordered(_measure_index, range(len(work))):
                if "figures" in case:
                    found = machine_code.Figures(**case["figures"])
                    case["wrong"] = machine_code.shortcomings(found, case["architecture"], case["programs"])
                else:
                    case["wrong"] = [case["error"]]
                yield case


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


def innermost(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def table(done: list[dict]) -> str:
    header = ("kernel", "arch", "regs", "spill B", "shared", "threads", "instructions", "configuration", "first of")
    rows = [header]
    for case in sorted(done, key=lambda c: (c["kernel"], c["architecture"], c["configuration"])):
        f = case.get("figures")
        label = f"{case['problems'][0]} (+{len(case['problems']) - 1})" if case["problems"][1:] else case["problems"][0]
        numbers = ("-",) * 4
        shown = "; ".join(case["wrong"])
        if f:
            numbers = (f["registers"], f["local_bytes"], f["shared"], f["threads"])
            shown = " ".join(f"{k}:{n}" for k, n in f["instructions"].items() if k not in ("BAR", "FFMA", "LDG", "STG"))
            shown += f" !! {'; '.join(case['wrong'])}" if case["wrong"] else ""
        place = (case["kernel"], f"sm_{case['architecture']}")
        rows.append((*place, *map(str, numbers), shown, case["configuration"], label))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print a table (default: JSON)")
    parser.add_argument("--list", action="store_true", help="list the cases without compiling")
    parser.add_argument("--only", default="", help="problems or kernels whose name contains this")
    parser.add_argument("--arch", type=int, nargs="+", help="architectures, for example 80 90")
    parser.add_argument("--faulty", action="store_true", help="the kernels that must fail, from kernels_faulty.py")
    parser.add_argument("--workers", type=int, default=2, help="compiler processes")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("kernels imported under TRITON_INTERPRET cannot be compiled")
    if args.faulty:
        import kernels_faulty

        chosen, modules = kernels_faulty.problems(), ["kernels_faulty"]
    else:
        chosen, modules = problems(), package_modules()
    found = cases(chosen, set(args.arch or ()))
    forgotten = [] if args.arch else unlaunched(modules, found)
    found = [c for c in found if args.only in f"{c['kernel']} {' '.join(c['problems'])}"]
    if args.list:
        done = [{k: x for k, x in case.items() if k != "launch"} | {"wrong": []} for case in found]
    else:
        done = list(measure_all(found, args.workers))
    if args.table:
        print(table(done))
        print(*(f"{name}: launched by no problem" for name in forgotten), sep="\n", end="")
    else:
        json.dump({"cases": done, "unlaunched": forgotten}, sys.stdout)
    return int(bool(forgotten) or any(case["wrong"] for case in done))


if __name__ == "__main__":
    sys.exit(main())
