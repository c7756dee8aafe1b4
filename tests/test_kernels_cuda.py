"""The CUDA C++ extension without a GPU: it builds without warnings, loads, and refuses clearly.

Where there is a GPU and the extension is built, the tests of the two ops on logits also run it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from autotool_kernels import backends, cuda, logits_logp_entropy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402


@pytest.fixture(scope="module")
def extension():
    nvcc, reason = build.find_nvcc()
    if nvcc is None:
        pytest.skip(reason)
    path = build.build()  # kept as long as its sources do not change
    cuda.load.cache_clear()
    return path


@pytest.mark.slow
def test_builds_and_loads_without_a_gpu(extension):
    assert cuda.load() is None
    state = backends()["cuda"]
    assert state.available == torch.cuda.is_available()
    if not state.available:
        assert "built and loads" in state.reason
    schemas = {name: str(getattr(torch.ops.autotool_kernels_cuda, name).default._schema) for name in (
        "logits_forward", "logits_backward", "sample",
    )}  # fmt: skip
    assert all(s.endswith("-> ()") for s in schemas.values())
    assert "Tensor(a!) out" in schemas["logits_backward"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cpu_tensors_are_refused(extension):
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"cannot serve logits_logp_entropy: .*no CUDA device"):
        logits_logp_entropy(x, y, backend="cuda")
    with pytest.raises(NotImplementedError, match="CPU"):
        cuda.logits_forward(x, y, 1.0, None, -100)


def test_missing_compiler_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "csrc" / "build.py"), "--force"]
    env = {**os.environ, "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "nvcc was not found" in done.stderr


def test_a_changed_source_makes_another_library(monkeypatch, tmp_path):
    before = cuda.library_path()
    for source in cuda._SOURCES.iterdir():
        if source.is_file():
            (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(cuda, "_SOURCES", tmp_path)
    assert cuda.library_path() == before
    with (tmp_path / "common.cuh").open("a") as f:
        f.write("// changed\n")
    assert cuda.library_path() != before
