"""Machine code of every Triton kernel in every shipped configuration: no spills, it fits, it uses the tensor cores."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from kernels_offline import CACHE, MAIN, SECONDARY, package_sources

triton = pytest.importorskip("triton")

# The kernels of the linear op that multiply matrices; the rest of the package only streams.
PRODUCTS = ("triton_gemm.forward_kernel", "triton_gemm.dlogits_kernel", "triton_gemm.product_kernel")


@lru_cache
def offline(*arguments: str) -> dict:
    """What kernels_offline.py reports, from a process in which Triton does not interpret."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("kernels_offline.py")), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def listed() -> list[dict]:
    """The cases to parametrize over, kept by the sources that decide them: collecting tests must stay quick."""
    sources = [p.read_bytes() for p in (*package_sources(), Path(__file__).with_name("kernels_offline.py"))]
    digest = hashlib.sha256(b"\0".join([triton.__version__.encode(), *sources])).hexdigest()[:24]
    path = CACHE / f"list-{digest}.json"
    if not path.exists():
        try:
            report = offline("--list")
        except (AssertionError, json.JSONDecodeError) as error:
            return [{"key": "", "kernel": "none", "architecture": 0, "problems": [], "error": str(error)}]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report))
    return json.loads(path.read_text())["cases"]


def label(case: dict) -> str:
    return f"{case['kernel']}-sm_{case['architecture']}-{' '.join(case['problems'][:1])}"


@pytest.mark.slow
@pytest.mark.parametrize("case", listed(), ids=label)
def test_machine_code(case):
    assert case["key"], case.get("error")
    done = {found["key"]: found for found in offline()["cases"]}[case["key"]]
    assert not done["wrong"], f"{label(done)} [{done['configuration']}]: {'; '.join(done['wrong'])}"


@pytest.mark.slow
def test_every_kernel_is_launched_by_a_problem():
    assert offline()["unlaunched"] == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MAIN + SECONDARY)
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_products_ask_for_tensor_cores(kernel, architecture):
    """A product written without tl.dot, or all upcast, would have nothing to show and nothing to miss."""
    found = [c for c in offline()["cases"] if (c["kernel"], c["architecture"]) == (kernel, architecture)]
    low_precision = [c for c in found if "bf16" in c["configuration"]]
    assert low_precision
    assert all(c["figures"]["tensor_cores"] for c in low_precision if "figures" in c)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ("spilling", "bytes per thread in local memory"),
        ("crowded", "registers and shared memory: 1 of 2 programs with 1024 threads of "),
        ("half a warpgroup", "no wgmma instruction, but mma"),
        ("float32 product", "no mma instruction, but none of any kind"),
        ("greedy", "shared memory: "),
        ("host stop", "item() cannot be called on meta tensors"),
    ],
)
def test_gate_reports(problem, reason):
    (case,) = [c for c in offline("--faulty")["cases"] if c["problems"] == [problem]]
    assert [text for text in case["wrong"] if reason in text], case["wrong"]
    assert len(case["wrong"]) == 1


@pytest.mark.slow
def test_gate_names_a_kernel_that_nothing_launches():
    assert offline("--faulty")["unlaunched"] == ["kernels_faulty._forgotten"]


@pytest.mark.slow
def test_second_run_compiles_nothing():
    offline("--faulty")
    before = {path: path.stat().st_mtime_ns for path in CACHE.glob("*.json")}
    offline("--faulty", "--workers", "1")
    assert {path: path.stat().st_mtime_ns for path in CACHE.glob("*.json")} == before
