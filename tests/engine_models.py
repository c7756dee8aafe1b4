"""Small random models for the tests of the rollout engines, a loop that plays rows, GPU attention in loops."""

from __future__ import annotations

import numpy as np
import torch
from autotool_kernels import linear_logp_entropy
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from autotool_fast.rollout.kv_attention import Kernels, flash_kernel, sdpa_kernel, varlen_kernel
from autotool_fast.rollout.rng import row_seeds

VOCAB = 40
STOP = 3
# Log-probs of the engine and of a full forward differ by summation order only: a few roundings (2^-24,
# relative) of logits of size 5 or so, about 3e-6. 1e-5 is the bar set for decode against trainer.
ATOL = 1e-5

ARCHITECTURES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 8}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}


def make_model(architecture="qwen3", **changes):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config_class, model_class, extra = ARCHITECTURES[architecture]
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **{"initializer_range": 0.2, **extra, **changes},
    )
    return model_class(config).eval()


def prompts_of(*lengths):
    generator = np.random.default_rng(0)
    return [generator.integers(4, VOCAB, length) for length in lengths]


def run_engine(engine, prompts, *, group_size=1, new=20, temperature=1.0, turns=1, tool=(), stop=()):
    """Sample every row to its end; each turn but the last is followed by the `tool` tokens."""
    rows, left = {}, {}
    with engine.session(stop_ids=stop, temperature=temperature):
        for group, prompt in enumerate(prompts):
            keys = range(group * group_size, (group + 1) * group_size)
            left.update(dict.fromkeys(keys, turns))
            engine.submit(prompt, keys, row_seeds(1, 2, group, np.arange(group_size)), new)
        while engine.busy:
            for key, _ in engine.step():
                left[key] -= 1
                if left[key]:
                    engine.extend(key, tool, new)
                else:
                    row = engine.row(key)
                    rows[key] = (row.ids.copy(), row.logp.copy(), row.entropy.copy())
                    engine.release(key)
    return [rows[key] for key in sorted(rows)]


def full_forward(model, ids, temperature=1.0):
    """Log-prob and entropy of tokens 1.. from one uncached forward."""
    ids = torch.from_numpy(ids)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
        weight = model.get_output_embeddings().weight
        return linear_logp_entropy(hidden, weight, ids[1:], temperature=temperature or 1.0)


def attention_of_one(query, key, value, scale):
    """Queries [t, H, D], the last of the positions of key and value [n, KV, D], each seeing all up to its own."""
    (t, heads, dim), (n, kv_heads, _) = query.shape, key.shape
    key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    scores = torch.einsum("thd,nhd->htn", query, key) * (dim**-0.5 if scale is None else scale)
    hidden = torch.arange(n) > torch.arange(n - t, n)[:, None]
    return torch.einsum("htn,nhd->thd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value)


def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, softmax_scale=None):
    """flash-attn's function of that name, as far as the engine uses it."""
    b, one, _, dim = q.shape
    assert one == 1
    assert k_cache.shape == v_cache.shape
    assert (k_cache.shape[0], k_cache.shape[3]) == (b, dim)
    assert k_cache.is_contiguous()
    assert (cache_seqlens.dtype, cache_seqlens.shape) == (torch.int32, (b,))
    rows = zip(q, k_cache, v_cache, cache_seqlens.tolist(), strict=True)
    return torch.stack([attention_of_one(row, k[:n], v[:n], softmax_scale) for row, k, v, n in rows])


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
    *, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None,
):  # fmt: skip
    """torch's function of that name: sequences end to end, of whose keys the first `seqused_k` count."""
    assert key.is_contiguous()
    assert all(x.dtype == torch.int32 for x in (cu_seq_q, cu_seq_k, seqused_k))
    assert enable_gqa == (query.shape[1] != key.shape[1])
    starts, ends, slots, slot_ends, used = (
        x.tolist() for x in (cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], seqused_k)
    )
    out = torch.full_like(query, float("nan"))
    for start, end, slot, slot_end, n in zip(starts, ends, slots, slot_ends, used, strict=True):
        assert end - start <= max_q
        assert n <= min(max_k, slot_end - slot)
        assert window_size == (-1, 0) or max_q == 1
        out[start:end] = attention_of_one(query[start:end], key[slot : slot + n], value[slot : slot + n], scale)
    assert slot_ends[-1] <= key.shape[0]
    assert ends[-1] == query.shape[0]
    return out


KERNELS = {
    "sdpa": Kernels("sdpa", sdpa_kernel(torch.float32), bounded=True),
    "flash-attn": Kernels("flash-attn", flash_kernel(flash_attn_with_kvcache), varlen=varlen_attn),
    "varlen": Kernels("varlen", varlen_kernel(varlen_attn), varlen=varlen_attn),
}
