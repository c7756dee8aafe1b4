"""The slot engine against plain Hugging Face forwards and `generate`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_models import ARCHITECTURES, ATOL, STOP, VOCAB, full_forward, make_model, prompts_of, run_engine
from transformers import Gemma2Config, Gemma2ForCausalLM

from autotool_fast.errors import UserError
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.rollout.rng import row_seeds


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_greedy_equals_generate(architecture):
    model = make_model(architecture, initializer_range=0.8)  # less prone to repeat one token
    prompts = prompts_of(1, 2, 5, 9, 17, 30)
    # 4 slots for 6 prompts: refill; chunks of 8: long prompts take several steps while others decode.
    engine = SlotEngine(model, slots=4, max_len=64, prefill_chunk=8)
    rows = run_engine(engine, prompts, temperature=0.0)
    seen = set()
    for prompt, (ids, _, _) in zip(prompts, rows, strict=True):
        inputs = torch.from_numpy(prompt)[None]
        expected = model.generate(inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
        assert ids.tolist() == expected.tolist()
        seen.update(ids[len(prompt) :].tolist())
    assert len(seen) > 10  # a model that always says the same would prove nothing


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_recorded_statistics_equal_a_full_forward(architecture, temperature):
    model = make_model(architecture)
    prompts = prompts_of(3, 12, 20)
    engine = SlotEngine(model, slots=5, max_len=64, prefill_chunk=8)
    rows = run_engine(engine, prompts, group_size=4, temperature=temperature)
    for index, (ids, logp, entropy) in enumerate(rows):
        start = len(prompts[index // 4])
        expected = full_forward(model, ids, temperature)
        np.testing.assert_allclose(logp[start:], expected.logp[start - 1 :], atol=ATOL)
        np.testing.assert_allclose(entropy[start:], expected.entropy[start - 1 :], atol=ATOL)
        assert not logp[:start].any()
        assert not entropy[:start].any()


@pytest.mark.parametrize("slots", [1, 3, 4, 16])
def test_every_token_enters_the_model_once(model, slots):
    prompts, tool = prompts_of(3, 12, 20), prompts_of(11)[0]
    engine = SlotEngine(model, slots=slots, max_len=96, prefill_chunk=4)
    fed = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: fed.extend(args[0].flatten().tolist())
    )
    rows = run_engine(engine, prompts, group_size=4, new=10, turns=3, tool=tool)
    hook.remove()
    expected = [token for prompt in prompts for token in prompt.tolist()]
    for index, (ids, _, _) in enumerate(rows):
        expected += ids[len(prompts[index // 4]) : -1].tolist()  # nothing follows the last sampled token
    assert sorted(fed) == sorted(expected)
    assert engine.stats.prefill_tokens + engine.stats.decode_tokens == len(expected)


def test_cache_kept_across_turns_agrees_with_a_full_forward(model):
    prompts, tool = prompts_of(5, 14), prompts_of(11)[0]
    engine = SlotEngine(model, slots=3, max_len=128, prefill_chunk=4)
    for index, (ids, logp, entropy) in enumerate(
        run_engine(engine, prompts, group_size=3, new=12, turns=3, tool=tool, stop=[STOP])
    ):
        expected = full_forward(model, ids)
        sampled = np.flatnonzero(logp)
        assert sampled[0] == len(prompts[index // 3])
        np.testing.assert_allclose(logp[sampled], expected.logp[sampled - 1], atol=ATOL)
        np.testing.assert_allclose(entropy[sampled], expected.entropy[sampled - 1], atol=ATOL)


def test_rows_do_not_depend_on_batch_layout(model):
    prompts, tool = prompts_of(1, 7, 12, 20), prompts_of(5)[0]
    kwargs = {"group_size": 6, "turns": 2, "tool": tool, "stop": [STOP]}
    wide = run_engine(SlotEngine(model, slots=64, max_len=96, prefill_chunk=64), prompts, **kwargs)
    assert len({tuple(ids) for ids, _, _ in wide}) == len(wide)  # different seeds give different rows
    for slots, chunk in ((4, 64), (7, 3), (1, 16)):
        other = run_engine(SlotEngine(model, slots=slots, max_len=96, prefill_chunk=chunk), prompts, **kwargs)
        for (ids, logp, _), (other_ids, other_logp, _) in zip(wide, other, strict=True):
            assert ids.tolist() == other_ids.tolist()
            np.testing.assert_allclose(logp, other_logp, atol=ATOL)


def test_stop_token_ends_a_turn_and_is_part_of_it(model):
    engine = SlotEngine(model, slots=8, max_len=96)
    prompt = prompts_of(4)[0]
    reasons = set()
    with engine.session(stop_ids=[STOP], temperature=2.0):
        engine.submit(prompt, range(32), row_seeds(0, 0, 0, np.arange(32)), 30)
        while engine.busy:
            for key, stopped in engine.step():
                sampled = engine.row(key).ids[4:]
                assert STOP not in sampled[:-1]
                assert (sampled[-1] == STOP) == stopped
                assert len(sampled) == 30 or stopped
                reasons.add(stopped)
                engine.release(key)
    assert reasons == {True, False}


def test_session_leaves_the_model_as_it_was():
    model = make_model()
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    before = model.config._attn_implementation
    engine = SlotEngine(model, slots=4, max_len=64)

    def interrupted():
        with engine.session(stop_ids=[], temperature=1.0):
            engine.submit([5, 6, 7], range(6), row_seeds(0, 0, 0, np.arange(6)), 5)
            engine.step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.config._attn_implementation == before
    assert [module.training for module in model.modules()] == flags
    assert not engine.busy
    loss = model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_a_model_in_training_samples_as_in_evaluation():
    model = make_model(attention_dropout=0.5)
    expected = run_engine(SlotEngine(model, slots=4, max_len=64), prompts_of(6), temperature=0.0)
    model.gradient_checkpointing_enable()  # in training mode it would drop the cache
    model.train()
    rows = run_engine(SlotEngine(model, slots=4, max_len=64), prompts_of(6), temperature=0.0)
    assert rows[0][0].tolist() == expected[0][0].tolist()


def test_a_long_prompt_enters_in_chunks_while_others_decode(model):
    engine = SlotEngine(model, slots=2, max_len=96, prefill_chunk=8)
    prompts = prompts_of(2, 40)
    sizes = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: sizes.append(args[0].numel())
    )
    run_engine(engine, prompts, new=20)
    hook.remove()
    assert sizes[:6] == [2 + 8, 1 + 8, 1 + 8, 1 + 8, 1 + 8, 1 + 1]
    assert engine.stats.steps == len(sizes) == 24  # the second row: 5 chunks, then 19 of 20 sampled tokens


def test_engine_sees_new_weights():
    model = make_model()
    engine = SlotEngine(model, slots=4, max_len=64)
    prompts = prompts_of(6)
    run_engine(engine, prompts, temperature=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids, logp, _ = run_engine(engine, prompts, temperature=0.0)[0]
    np.testing.assert_allclose(logp[6:], full_forward(model, ids).logp[5:], atol=ATOL)


class ScaledHead(torch.nn.Linear):
    """A head that does more than its product, as one with an adapter."""

    def forward(self, hidden):
        return 2.0 * super().forward(hidden)


@pytest.mark.parametrize("kind", ["plain", "bias", "scaled"])
def test_a_large_heads_logits_are_the_heads_own(kind):
    """64 x 32 x 16,384 is where a CPU takes another product; sums of 32 terms round to 1e-5."""
    model = make_model()
    model.lm_head = (ScaledHead if kind == "scaled" else torch.nn.Linear)(32, 16384, bias=kind == "bias")
    hidden = torch.randn(64, 32)
    with torch.inference_mode():
        logits = SlotEngine(model, slots=1, max_len=8)._logits(hidden)
        torch.testing.assert_close(logits, model.lm_head(hidden), rtol=1e-5, atol=2e-5)


def test_new_weights_of_a_large_head_reach_the_next_session(monkeypatch):
    monkeypatch.setattr("autotool_kernels.products.ONEDNN_FLOPS", 1)
    model = make_model("qwen3")
    engine = SlotEngine(model, slots=2, max_len=8)
    hidden = torch.randn(2, model.config.hidden_size)
    for _ in range(2):
        with engine.session(stop_ids=[], temperature=1.0), torch.no_grad():
            wanted = hidden @ model.get_output_embeddings().weight.T
            assert engine._logits(hidden).sub(wanted).abs().max() <= 1e-5 * wanted.abs().max()
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(-3.0)


def test_non_finite_logits_stop_the_run_and_leave_no_trace():
    model = make_model()
    engine = SlotEngine(model, slots=2, max_len=64)
    prompts = prompts_of(2)
    expected = run_engine(engine, prompts)
    weight = model.model.layers[0].self_attn.v_proj.weight
    saved = weight.detach().clone()
    weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        run_engine(engine, prompts_of(12))  # reaches positions that the next run masks but does not overwrite
    weight.data.copy_(saved)
    assert run_engine(engine, prompts)[0][0].tolist() == expected[0][0].tolist()


def test_models_it_cannot_serve_are_refused():
    sliding = make_model(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(UserError, match="full attention"):
        SlotEngine(sliding, slots=2, max_len=64)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["full_attention"] * 2,
    )
    with pytest.raises(UserError, match="attn_logit_softcapping"):
        SlotEngine(Gemma2ForCausalLM(config), slots=2, max_len=64)


def test_attention_refuses_to_run_outside_the_engine(model):
    model.config._attn_implementation = "autotool_slots"
    try:
        with pytest.raises(ValueError, match="slot engine"):
            model(torch.tensor([[5, 6]]))
    finally:
        model.config._attn_implementation = "sdpa"


def test_row_seeds_are_pure_and_distinct():
    seeds = [
        row_seeds(seed, step, group, np.arange(8))
        for seed in (0, 1)
        for step in (0, 1, 2)
        for group in range(4)
    ]
    assert all(s.dtype == np.int64 for s in seeds)
    assert len(np.unique(np.concatenate(seeds))) == 2 * 3 * 4 * 8
    np.testing.assert_array_equal(seeds[0][[2, 5]], row_seeds(0, 0, 0, np.array([2, 5])))
    # All bits in use: over 192 seeds, a fair bit's mean is within 5 standard deviations, 5 * 0.5 / sqrt(192).
    bits = np.unpackbits(np.concatenate(seeds).view(np.uint8)).reshape(-1, 64)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.18
