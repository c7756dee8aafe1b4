"""Which backend serves a call, and what an unavailable one says."""

from __future__ import annotations

import autotool_kernels
import pytest
import torch
from autotool_kernels import dispatch
from kernels_oracle import DEVICE

OPS = ("linear_logp_entropy", "logits_logp_entropy", "policy_loss", "sample_logp_entropy")


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    dispatch.implementation.cache_clear()
    yield
    dispatch.implementation.cache_clear()


def test_backends_say_what_is_available_and_why():
    state = autotool_kernels.backends()
    assert list(state) == ["torch", "triton", "cuda"]
    assert state["torch"].available
    assert all(s.reason and "\n" not in s.reason for s in state.values())


def test_auto_serves_cpu_tensors_with_torch_even_under_the_interpreter():
    for op in OPS:
        assert autotool_kernels.choose(op, "cpu").name == "torch"


def test_auto_prefers_triton_on_cuda(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton", lambda: dispatch.Backend(True, "pretended"))
    assert {autotool_kernels.choose(op, "cuda").name for op in OPS} == {"triton"}
    double = autotool_kernels.choose("policy_loss", "cuda", dtype=torch.float64)
    assert double.name == "torch"
    assert "float64" in double.reason


@pytest.mark.skipif(DEVICE != "cpu", reason="a CUDA device makes Triton available")
def test_unavailable_backends_name_the_reason(no_interpreter):
    assert not autotool_kernels.backends()["triton"].available
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for backend, reason in (("triton", "no CUDA device"), ("cuda", "(not built|out of date|no CUDA device)")):
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot serve .*{reason}"):
            autotool_kernels.logits_logp_entropy(x, y, backend=backend)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs CPU tensors under Triton's interpreter")
def test_triton_refuses_float64():
    x, y = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="float64"):
        autotool_kernels.logits_logp_entropy(x, y, backend="triton")


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="auto, torch, triton, cuda: got 'tpu'"):
        autotool_kernels.choose("policy_loss", "cpu", "tpu")


def test_unknown_op_lists_the_known_ones():
    for backend in ("auto", "torch", "triton"):
        with pytest.raises(ValueError, match=r"op must be one of linear_logp_entropy.*got 'matmul'"):
            autotool_kernels.choose("matmul", "cpu", backend)
