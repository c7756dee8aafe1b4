"""A GPU's attention over the slots, with its kernels replaced by loops, against attention written out per row."""

from __future__ import annotations

import inspect
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from engine_models import KERNELS, attention_of_one, flash_attn_with_kvcache, varlen_attn

from autotool_fast.rollout import kv_attention
from autotool_fast.rollout.attention import SlotCache
from autotool_fast.rollout.kv_attention import choose_kernels, flash_kernel, plan_chunks, varlen_kernel

SLOTS, KV_HEADS, MAX_LEN, DIM, HEADS = 5, 2, 12, 8, 4


def layer():
    torch.manual_seed(0)
    cache = SlotCache((1, 2, SLOTS, KV_HEADS, MAX_LEN, DIM), torch.float32, torch.device("cpu"), True)
    cache.kv.copy_(torch.randn(cache.kv.shape))
    return cache, *cache.kv[0]


def of_slot(keys, values, slot, length):
    return keys[slot, :, :length].transpose(0, 1), values[slot, :, :length].transpose(0, 1)


@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize("scale", [None, 0.3])
def test_decoding_reads_each_slot_up_to_its_length(name, scale):
    _, keys, values = layer()
    lengths = torch.tensor([1, 9, 4], dtype=torch.int32)
    query = torch.randn(3, HEADS, DIM)
    out = KERNELS[name].decode(lengths, 10)(query, keys, values, scale)
    for slot, length in enumerate(lengths.tolist()):
        expected = attention_of_one(query[slot : slot + 1], *of_slot(keys, values, slot, length), scale)
        torch.testing.assert_close(out[slot : slot + 1], expected)


def test_chunks_read_their_slots_in_place_up_to_their_own_position():
    cache, keys, values = layer()
    chunk_slots, lengths, before = np.array([1, 4]), np.array([3, 5]), np.array([6, 0])
    positions = np.concatenate([b + np.arange(n) for b, n in zip(before, lengths, strict=True)])
    batch = plan_chunks(np.repeat(chunk_slots, lengths), positions, chunk_slots, lengths, cache, varlen_attn)
    query = torch.randn(8, HEADS, DIM)
    out = batch.attend(query, keys, values, None)
    for slot, first, end, used in ((1, 0, 3, 9), (4, 3, 8, 5)):
        expected = attention_of_one(query[first:end], *of_slot(keys, values, slot, used), None)
        torch.testing.assert_close(out[first:end], expected)


def test_a_cache_that_would_have_to_be_copied_is_refused():
    keys = torch.randn(SLOTS, KV_HEADS, MAX_LEN, DIM)  # heads first
    decode = KERNELS["varlen"].decode(torch.ones(SLOTS, dtype=torch.int32), MAX_LEN)
    with pytest.raises(RuntimeError, match="view"):
        decode(torch.randn(SLOTS, HEADS, DIM), keys, keys, None)


def test_the_stand_in_takes_what_torchs_function_takes():
    from torch.nn.attention import varlen

    real = inspect.signature(varlen.varlen_attn).parameters
    mine = inspect.signature(varlen_attn).parameters
    if "seqused_k" not in real:
        pytest.skip("this torch's varlen_attn takes no cache lengths")
    assert [(name, real[name].kind) for name in mine] == [(name, p.kind) for name, p in mine.items()]


def test_the_stand_in_takes_what_flash_attns_function_takes():
    real = inspect.signature(pytest.importorskip("flash_attn").flash_attn_with_kvcache).parameters
    assert inspect.signature(flash_attn_with_kvcache).parameters.keys() <= real.keys()


class Old:
    """`varlen_attn` before it took cache lengths."""

    @staticmethod
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        raise AssertionError("not to be called")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as the choice of kernels looks, with what is installed on its machine."""

    def machine(*, flash=None, varlen=varlen_attn, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
        package = None
        if flash is not None:
            package = ModuleType("flash_attn")
            package.__spec__ = ModuleSpec("flash_attn", None)
            vars(package).update(flash)
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        return torch.device("cuda")

    return machine


def test_flash_attn_is_taken_first(gpu):
    package = {"flash_attn_with_kvcache": flash_attn_with_kvcache}
    kernels = choose_kernels(gpu(flash=package), torch.bfloat16, 64)
    assert (kernels.name, kernels.varlen, kernels.bounded, kernels.reason) == ("flash-attn", varlen_attn, False, "")
    kernels = choose_kernels(gpu(flash={}), torch.bfloat16, 64)
    assert kernels.name == "varlen"
    assert kernels.reason.startswith("flash-attn cannot be imported")


def test_torchs_own_kernel_is_taken_where_it_knows_cache_lengths(gpu):
    kernels = choose_kernels(gpu(), torch.float16, 128)
    assert (kernels.name, kernels.varlen, kernels.reason) == ("varlen", varlen_attn, "flash-attn is not installed")
    kernels = choose_kernels(gpu(varlen=Old.varlen_attn), torch.float16, 128)
    assert (kernels.name, kernels.varlen, kernels.bounded) == ("sdpa", None, True)
    assert "flash-attn is not installed; varlen_attn of torch" in kernels.reason


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "reason"),
    [
        (torch.float32, 64, (9, 0), "float32"),
        (torch.bfloat16, 20, (9, 0), "heads of 20"),
        (torch.bfloat16, 288, (9, 0), "heads of 288"),
        (torch.bfloat16, 64, (7, 5), "sm_75"),
    ],
)
def test_what_the_fast_kernels_cannot_do_is_said(gpu, dtype, head_dim, capability, reason):
    kernels = choose_kernels(gpu(capability=capability), dtype, head_dim)
    assert kernels.name == "sdpa"
    assert reason in kernels.reason


def test_a_cpu_has_one_kernel():
    kernels = choose_kernels(torch.device("cpu"), torch.bfloat16, 64)
    assert (kernels.name, kernels.varlen) == ("sdpa", None)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["flash-attn", "varlen"])
def test_the_real_kernels_compute_what_the_stand_ins_do(kind):
    real = kv_attention._flash()[0] if kind == "flash-attn" else kv_attention._varlen()[0]
    if real is None:
        pytest.skip(f"{kind} cannot serve here")
    make = flash_kernel if kind == "flash-attn" else varlen_kernel
    torch.manual_seed(0)
    cache = SlotCache((1, 2, SLOTS, KV_HEADS, 64, 64), torch.bfloat16, torch.device("cuda"), True)
    cache.kv.copy_(torch.randn(cache.kv.shape))
    keys, values = cache.kv[0]
    lengths = torch.tensor([1, 40, 64], dtype=torch.int32, device="cuda")
    query = torch.randn(3, HEADS, 64, device="cuda", dtype=torch.bfloat16)
    out = make(real)(lengths, 64)(query, keys, values, None)
    query, keys_cpu, values_cpu = (x.cpu().float() for x in (query, keys, values))
    expected = KERNELS[kind].decode(lengths.cpu(), 64)(query, keys_cpu, values_cpu, None)
    # Inputs are equal; the output is rounded to bfloat16 (2^-9 of values below 4), and so are the weights before.
    torch.testing.assert_close(out.cpu().float(), expected, atol=3e-2, rtol=0)
    if kind == "varlen":
        chunk_slots, counts = np.array([0, 3]), np.array([7, 20])
        positions = np.concatenate([np.arange(30, 37), np.arange(20)])
        query = torch.randn(27, HEADS, 64, device="cuda", dtype=torch.bfloat16)
        batch = plan_chunks(np.repeat(chunk_slots, counts), positions, chunk_slots, counts, cache, real)
        out = batch.attend(query, keys, values, None).cpu().float()
        for slot, first, end, used in ((0, 0, 7, 37), (3, 7, 27, 20)):
            mine = of_slot(keys_cpu, values_cpu, slot, used)
            torch.testing.assert_close(
                out[first:end], attention_of_one(query[first:end].cpu().float(), *mine, None), atol=3e-2, rtol=0
            )
