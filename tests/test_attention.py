"""Backends of the packed attention: which one serves, what kernels are told, and that all compute the same.

flash-attn and torch's variable-length attention need a GPU. Stand-ins with their signatures, which compute dense
attention segment by segment, show on any machine that the plans handed to them are right, gradients included.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types

import numpy as np
import pytest
import torch
from test_policy import EXACT, MODELS, distance, gradients, make_groups, make_model, mark, packed
from torch.nn.attention import varlen

from autotool_fast import attention
from autotool_fast.config import from_dict
from autotool_fast.errors import UserError
from autotool_fast.packing import pack
from autotool_fast.policy import packed_hidden, packed_logp_entropy
from autotool_fast.train import main

torch.set_num_threads(1)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def dense(query, key, value, cu_q, cu_k, scale):
    """Attention of segment to segment, causal from their ends; key-value heads are repeated."""
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))
    key, value = (states.repeat_interleave(len(query) // len(states), 0) for states in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    pieces = []
    for q, q_end, k, k_end in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        scores = query[:, q:q_end] @ key[:, k:k_end].transpose(1, 2) * scale
        visible = torch.ones(scores.shape[1:], dtype=torch.bool).tril(int((k_end - k) - (q_end - q)))
        pieces.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value[:, k:k_end])
    return torch.cat(pieces, 1).transpose(0, 1)


def check_plan(query, key, cu_q, cu_k, max_q, max_k) -> None:
    assert type(max_q) is type(max_k) is int
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(query), len(key))
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))


def flash_attn_2(  # parameters as in flash_attn/flash_attn_interface.py, release 2.8
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert causal
    assert dropout_p == softcap == 0.0
    check_plan(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return dense(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)


def flash_attn_3(  # parameters as in hopper/flash_attn_interface.py
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
):  # fmt: skip
    assert causal
    assert seqused_q is seqused_k is None
    check_plan(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return dense(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale), None  # as earlier releases, which add more


def varlen_211(  # parameters as in torch 2.11
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size == (-1, 0)
    check_plan(query, key, cu_seq_q, cu_seq_k, max_q, max_k)
    return dense(query, key, value, cu_seq_q, cu_seq_k, scale)


def varlen_213(  # parameters as in torch 2.13
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa
    return varlen_211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


STAND_INS = {
    "flash-attn 2": ("flash", (8, 0), "flash_attn", "flash_attn_varlen_func", flash_attn_2),
    "flash-attn 2 on Hopper": ("flash", (9, 0), "flash_attn", "flash_attn_varlen_func", flash_attn_2),
    "flash-attn 3": ("flash", (9, 0), "flash_attn_interface", "flash_attn_varlen_func", flash_attn_3),
    "torch 2.11": ("varlen", (8, 0), "torch.nn.attention.varlen", "varlen_attn", varlen_211),
    "torch 2.13": ("varlen", (8, 0), "torch.nn.attention.varlen", "varlen_attn", varlen_213),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No choice is remembered from one test to the next; no flash-attn is there, unless a test puts it."""
    forget = attention.select.cache_clear
    forget()
    for module in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)
    yield
    forget()


def offer(patch, module: str, name: str, function) -> None:
    stand_in = types.ModuleType(module)
    setattr(stand_in, name, function)
    patch.setitem(sys.modules, module, stand_in)


def gpu(patch, capability=(8, 0)) -> None:
    """A GPU seems to be there."""
    patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    patch.setattr(torch.cuda, "get_device_name", lambda device: "a card")


@pytest.fixture(params=STAND_INS)
def served(request, monkeypatch) -> str:
    """The packed attention is computed by a stand-in, on the CPU and in float64."""
    setting, capability, module, name, function = STAND_INS[request.param]
    gpu(monkeypatch, capability)
    offer(monkeypatch, module, name, function)
    calls = []
    found = attention._find(setting, CUDA)
    assert found is not None

    def counted(*args):
        calls.append(1)
        return found(*args)

    monkeypatch.setattr(attention, "select", lambda *rest: attention.Choice(setting, counted))
    yield setting
    assert calls


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shared", [False, True])
def test_kernels_compute_what_padded_attention_does(served, name, shared, monkeypatch):
    model = make_model(name)
    sequences, prompts = make_groups()
    marks = mark(sequences)
    result = packed(model, sequences, marks, prompts if shared else None)
    ours = gradients(model, result.logp.sum() - 2 * result.entropy.sum())
    with monkeypatch.context() as patch:
        patch.setattr(attention, "select", lambda *rest: attention.Choice("sdpa", None))
        expected = packed(model, sequences, marks)
    torch.testing.assert_close(tuple(result), tuple(expected), **EXACT)
    for key, gradient in gradients(model, expected.logp.sum() - 2 * expected.entropy.sum()).items():
        assert distance(ours[key], gradient) <= 1e-6, key  # the models' norms compute in float32


def test_a_models_own_scale_reaches_the_kernel(served):
    model = make_model("qwen3")
    sequences, prompts = make_groups()
    with torch.no_grad():
        before = packed_hidden(model, pack(sequences, prompts=prompts))
        for layer in model.model.layers:
            layer.self_attn.scaling *= 3
        after = packed_hidden(model, pack(sequences, prompts=prompts))
    assert (after - before).abs().max() > 1e-3


@pytest.mark.skipif("enable_gqa" not in inspect.signature(varlen.varlen_attn).parameters, reason="an older torch")
def test_the_call_fits_the_installed_torch():
    """And the stand-in for it has its signature."""
    own, stand_in = (inspect.signature(f).parameters for f in (varlen.varlen_attn, varlen_213))
    assert list(own) == list(stand_in)
    assert [p.kind for p in own.values()] == [p.kind for p in stand_in.values()]
    assert own["window_size"].default == (-1, -1)


# Which one serves


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_first_backend_that_is_there_serves_on_a_gpu(monkeypatch, dtype):
    gpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    choice = attention.select("auto", CUDA, dtype, 64)
    assert (choice.name, choice.kernel) == ("sdpa", None)
    assert str(choice) == "sdpa (flash cannot be loaded, varlen cannot be loaded)"
    attention.select.cache_clear()
    offer(monkeypatch, "torch.nn.attention.varlen", "varlen_attn", varlen_211)
    assert str(attention.select("auto", CUDA, dtype, 64)) == "varlen (flash cannot be loaded)"
    attention.select.cache_clear()
    offer(monkeypatch, "flash_attn", "flash_attn_varlen_func", flash_attn_2)
    assert str(attention.select("auto", CUDA, dtype, 64)) == "flash"
    assert attention.select("auto", CUDA, dtype, 64).kernel is not None
    assert attention.select("varlen", CUDA, dtype, 64).name == "varlen"
    assert attention.select("sdpa", CUDA, dtype, 64).kernel is None


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "why"),
    [
        (CPU, torch.bfloat16, 64, (9, 0), "needs a GPU, not device cpu"),
        (CUDA, torch.float32, 64, (9, 0), "needs 16-bit weights .*, not float32"),
        (CUDA, torch.bfloat16, 512, (9, 0), "multiple of 8 up to 256 dimensions, not 512"),
        (CUDA, torch.bfloat16, 20, (9, 0), "multiple of 8 up to 256 dimensions, not 20"),
        (CUDA, torch.bfloat16, 64, (7, 5), "compute capability 8.0 or more, not a card"),
    ],
)
def test_what_kernels_do_not_take_goes_to_sdpa_unless_one_was_asked_for(
    monkeypatch, device, dtype, head_dim, capability, why
):
    gpu(monkeypatch, capability)
    offer(monkeypatch, "flash_attn", "flash_attn_varlen_func", flash_attn_2)
    choice = attention.select("auto", device, dtype, head_dim)
    assert choice.kernel is None
    for setting in ("flash", "varlen"):
        with pytest.raises(UserError, match=f"^model.attention {setting}: .*{why}; use auto$"):
            attention.select(setting, device, dtype, head_dim)


def broken_import(name: str):
    raise OSError("undefined symbol")  # what a library compiled for another torch says


def test_a_backend_that_was_asked_for_and_cannot_be_loaded_is_an_error(monkeypatch):
    gpu(monkeypatch)
    for setting, tip in (("flash", 'pip install "autotool_fast'), ("varlen", "install torch for CUDA")):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "import_module", broken_import)
            with pytest.raises(UserError, match=f"^model.attention {setting}: cannot be loaded; .*{tip}"):
                attention.select(setting, CUDA, torch.bfloat16)


def test_settings_that_cannot_work_are_refused_before_anything_is_loaded():
    for setting in ("flash", "varlen"):
        for values in ({}, {"device": "cuda"}):
            with pytest.raises(UserError, match=f"model.attention: {setting} needs a GPU and 16-bit weights"):
                from_dict({"model": {"attention": setting}, **values})
        config = from_dict({"model": {"attention": setting, "dtype": "bfloat16"}, "device": "cuda"})
        assert config.model.attention == setting


def test_flash_attn_is_missed_before_anything_is_loaded(capsys, monkeypatch):
    options = ["--model.attention", "flash", "--device", "cuda", "--model.dtype", "bfloat16", "--dry-run"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(options) == 2
    message = 'error: model.attention: flash needs flash-attn; install it with pip install "autotool_fast[flash]"'
    assert capsys.readouterr().err.startswith(message)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flash_attn")
    assert main(options) == 0


def test_the_setting_reaches_the_choice(monkeypatch):
    asked = []

    def select(setting, device, dtype, head_dim):
        asked.append((setting, device.type, dtype, head_dim))
        return attention.Choice("sdpa", None)

    monkeypatch.setattr(attention, "select", select)
    packed_hidden(make_model("qwen3-gqa-tied").float(), pack([np.arange(3)], attention="varlen"))
    assert set(asked) == {("varlen", "cpu", torch.float32, 8)}


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["flash", "varlen"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_backends_agree_on_a_gpu(monkeypatch, setting, head_dim):
    """In bfloat16, against SDPA in float32 on the same rounded weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    for module in ("flash_attn", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, module)  # what is installed may be imported
    try:
        attention.select(setting, CUDA, torch.bfloat16, head_dim)
    except UserError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(vocab_size=512, **sizes, num_key_value_heads=2, head_dim=head_dim, tie_word_embeddings=False)
    model = Qwen3ForCausalLM(config).to(CUDA, torch.bfloat16)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 512, 200)
    sequences = [np.concatenate([prompt, rng.integers(0, 512, int(n))]) for n in rng.integers(1, 130, 8)]
    trained = torch.from_numpy(np.concatenate([np.arange(len(s)) >= 200 for s in sequences]))

    def result(model, setting, prompts):
        batch = pack(sequences, CUDA, prompts=prompts, attention=setting)
        logp, _ = packed_logp_entropy(model, batch, trained)
        return logp.detach().float(), gradients(model, logp.sum())

    own = {s: result(model, s, [200] * 8) for s in ("sdpa", setting)}
    exact = result(model.float(), "sdpa", None)
    # Nothing that a backend rounds may be worse than what the other one does, by more than chance.
    for name, wanted in exact[1].items():
        error = {s: distance(own[s][1][name].float(), wanted) for s in own}
        assert error[setting] <= 1.5 * error["sdpa"] + 2.0**-8, name
    error = {s: float((own[s][0] - exact[0]).abs().max()) for s in own}
    assert error[setting] <= 2 * error["sdpa"] + 2.0**-8


