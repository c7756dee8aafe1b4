"""The late engine plays the same rows as the slot engine, whatever is under way when turns end."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_models import ARCHITECTURES, ATOL, KERNELS, STOP, VOCAB, full_forward, make_model, prompts_of, run_engine

import autotool_fast.rollout.late as late_module
from autotool_fast.rollout.decode import CudaGraphs
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.rollout.kv_attention import Kernels, sdpa_kernel
from autotool_fast.rollout.late import LateEngine, open_slot_engine, uncapturable
from autotool_fast.rollout.rng import row_seeds

STOPS = [STOP, 4, 5]  # turns of some thirteen tokens


@pytest.fixture(scope="module")
def model():
    return make_model()


def same_rows(rows, others, atol=ATOL):
    for (ids, logp, entropy), (other_ids, other_logp, other_entropy) in zip(rows, others, strict=True):
        assert ids.tolist() == other_ids.tolist()
        np.testing.assert_allclose(logp, other_logp, atol=atol)
        np.testing.assert_allclose(entropy, other_entropy, atol=atol)


@pytest.mark.parametrize("kernels", list(KERNELS))
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_rows_are_those_of_the_slot_engine(architecture, kernels):
    model = make_model(architecture)
    prompts, tool = prompts_of(1, 7, 12, 20), prompts_of(5)[0]
    kwargs = {"group_size": 5, "turns": 3, "tool": tool, "stop": STOPS, "temperature": 0.8}
    expected = run_engine(SlotEngine(model, slots=6, max_len=96, prefill_chunk=8), prompts, **kwargs)
    assert len({len(ids) for ids, _, _ in expected}) > 8
    engine = LateEngine(model, slots=6, max_len=96, prefill_chunk=8, kernels=KERNELS[kernels])
    same_rows(run_engine(engine, prompts, **kwargs), expected)


@pytest.mark.parametrize(("slots", "chunk"), [(1, 16), (3, 3), (7, 64), (64, 64)])
def test_rows_do_not_depend_on_the_layout(model, slots, chunk):
    prompts, tool = prompts_of(1, 7, 12, 20), prompts_of(5)[0]
    kwargs = {"group_size": 6, "turns": 2, "tool": tool, "stop": STOPS}
    expected = run_engine(SlotEngine(model, slots=24, max_len=96), prompts, **kwargs)
    same_rows(run_engine(LateEngine(model, slots=slots, max_len=96, prefill_chunk=chunk), prompts, **kwargs), expected)


def test_greedy_equals_generate():
    model = make_model(initializer_range=0.8)  # less prone to repeat one token
    prompts = prompts_of(1, 2, 5, 9, 17, 30)
    rows = run_engine(LateEngine(model, slots=4, max_len=64, prefill_chunk=8), prompts, temperature=0.0)
    for prompt, (ids, _, _) in zip(prompts, rows, strict=True):
        inputs = torch.from_numpy(prompt)[None]
        assert ids.tolist() == model.generate(inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)[0].tolist()


def test_statistics_after_tool_turns_are_those_of_a_full_forward(model):
    prompts, tool = prompts_of(5, 14), prompts_of(11)[0]
    engine = LateEngine(model, slots=3, max_len=128, prefill_chunk=4)
    for ids, logp, entropy in run_engine(engine, prompts, group_size=3, new=12, turns=3, tool=tool, stop=STOPS):
        expected = full_forward(model, ids)
        sampled = np.flatnonzero(logp)
        np.testing.assert_allclose(logp[sampled], expected.logp[sampled - 1], atol=ATOL)
        np.testing.assert_allclose(entropy[sampled], expected.entropy[sampled - 1], atol=ATOL)


def play(engine, prompts, seed, *, cut_after=None):
    """Rows that go on with tool results of 0 to 9 tokens or end, as their key and turn say; some are cut mid-turn.

    Returns the finished rows, the tokens of the cut ones, and how each turn ended.
    """
    rows, cut, ends, turn = {}, {}, {}, {}
    with engine.session(stop_ids=STOPS, temperature=1.0):
        for group, prompt in enumerate(prompts):
            keys = range(4 * group, 4 * group + 4)
            engine.submit(prompt, keys, row_seeds(seed, 0, group, np.arange(4)), 14)
        steps = 0
        while engine.busy:
            steps += 1
            for key, stopped in engine.step():
                turn[key] = turn.get(key, 0) + 1
                ends.setdefault(key, []).append(stopped)
                draw = np.random.default_rng([seed, key, turn[key]])
                if draw.random() < 0.4 or engine.room(key) < 30:
                    row = engine.row(key)
                    rows[key] = (row.ids.copy(), row.logp.copy(), row.entropy.copy())
                    engine.release(key)
                else:
                    engine.extend(key, draw.integers(6, VOCAB, draw.integers(10)), int(draw.integers(1, 14)))
            if cut_after is not None and steps % cut_after == 0:
                for key in engine.older_than(0.0)[:1]:
                    cut[key] = engine.row(key).ids.copy()
                    engine.release(key)
    return rows, cut, ends


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slots", [2, 5])
def test_random_turns_end_alike(model, seed, slots):
    prompts = prompts_of(3, 18, 1, 7, 30)
    kwargs = {"slots": slots, "max_len": 128, "prefill_chunk": 6}
    rows, _, ends = play(SlotEngine(model, **kwargs), prompts, seed)
    late_rows, _, late_ends = play(LateEngine(model, **kwargs), prompts, seed)
    assert late_ends == ends
    assert {True, False} == {stopped for turns in ends.values() for stopped in turns}
    same_rows([late_rows[key] for key in sorted(rows)], [rows[key] for key in sorted(rows)])


def test_cutting_rows_in_the_middle_of_a_turn_changes_nothing_for_the_others(model):
    prompts = prompts_of(3, 18, 1, 7, 30)
    kwargs = {"slots": 5, "max_len": 128, "prefill_chunk": 6}
    rows, _, _ = play(SlotEngine(model, **kwargs), prompts, 0)
    late_rows, cut, _ = play(LateEngine(model, **kwargs), prompts, 0, cut_after=9)
    assert len(cut) > 3
    assert len(late_rows) > 5
    assert late_rows.keys() | cut.keys() == rows.keys()
    same_rows(late_rows.values(), [rows[key] for key in late_rows])
    for key, ids in cut.items():
        assert len(ids) > len(prompts[key // 4])
        assert ids.tolist() == rows[key][0][: len(ids)].tolist()


def test_the_next_step_is_under_way_when_a_turn_is_handed_out(model):
    engine = LateEngine(model, slots=8, max_len=96)
    started = []
    run = engine.decoder.run
    engine.decoder.run = lambda key: (started.append(key), run(key))
    overlapped = 0
    with engine.session(stop_ids=STOPS, temperature=1.0):
        engine.submit(prompts_of(6)[0], range(8), row_seeds(0, 0, 0, np.arange(8)), 40)
        while engine.busy:
            ended = engine.step()
            known = max((len(engine.row(key).ids) - 6 for key in range(8) if key in engine._slot), default=0)
            if ended and len(ended) < len(engine._slot):
                # The first token comes from the prompt, every other from a step.
                assert len(started) == known
                overlapped += 1
            for key, _ in ended:
                engine.release(key)
    assert overlapped > 2


def test_a_row_counts_as_old_only_once_a_token_of_it_has_arrived(model):
    engine = LateEngine(model, slots=2, max_len=64, prefill_chunk=4)
    with engine.session(stop_ids=[], temperature=1.0):
        engine.submit(prompts_of(9)[0], [7], row_seeds(0, 0, 0, np.arange(1)), 5)
        seen = []
        for _ in range(5):
            engine.step()
            seen.append(engine.older_than(-1.0))
            assert bool(seen[-1]) == (len(engine.row(7).ids) > 9)
    assert seen == [[], [], [], [7], [7]]  # three chunks; the token of the third is taken in the step after


def test_a_row_that_reaches_its_limit_takes_part_in_no_further_step(model):
    engine = LateEngine(model, slots=2, max_len=16)
    run_engine(engine, prompts_of(6), new=10)
    assert engine.stats.decode_tokens == 9


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_leaving_a_session_with_a_step_under_way_leaves_no_trace(model, steps):
    engine = LateEngine(model, slots=4, max_len=64)
    prompts = prompts_of(6, 9, 3)
    expected = run_engine(engine, prompts, group_size=3)

    def interrupted():
        with engine.session(stop_ids=[], temperature=0.5):
            engine.submit(prompts[1], range(9), row_seeds(5, 5, 5, np.arange(9)), 30)
            for _ in range(steps):
                engine.step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not engine.busy
    assert not engine._flights
    same_rows(run_engine(engine, prompts, group_size=3), expected)


def test_non_finite_logits_stop_the_run_and_leave_no_trace():
    model = make_model()
    engine = LateEngine(model, slots=2, max_len=64)
    prompts = prompts_of(2)
    expected = run_engine(engine, prompts)
    weight = model.model.layers[0].self_attn.v_proj.weight
    saved = weight.detach().clone()
    weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        run_engine(engine, prompts_of(12))
    weight.data.copy_(saved)
    same_rows(run_engine(engine, prompts), expected)


def test_a_dropped_token_that_is_not_finite_stops_the_run_too():
    model = make_model()
    engine = LateEngine(model, slots=2, max_len=64)
    weight = model.model.layers[0].self_attn.v_proj.weight

    def poisoned():
        with engine.session(stop_ids=range(VOCAB), temperature=1.0):
            engine.submit(prompts_of(4)[0], [0], row_seeds(0, 0, 0, np.arange(1)), 9)
            engine.step()
            weight.data.fill_(float("nan"))
            assert engine.step() == [(0, True)]  # its second token is under way
            engine.release(0)
            engine.step()

    with pytest.raises(FloatingPointError):
        poisoned()
    assert engine._cache.kv.isfinite().all()


def test_engine_sees_new_weights():
    model = make_model()
    engine = LateEngine(model, slots=4, max_len=64)
    run_engine(engine, prompts_of(6), temperature=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids, logp, _ = run_engine(engine, prompts_of(6), temperature=0.0)[0]
    np.testing.assert_allclose(logp[6:], full_forward(model, ids).logp[5:], atol=ATOL)


def test_bfloat16_weights_keep_float32_statistics():
    """Log-probs of bfloat16 logits would be multiples of 2^-8 or so; of float32 ones hardly any is."""
    model = make_model().to(torch.bfloat16)
    kernels = late_module.choose_kernels(torch.device("cpu"), torch.bfloat16, 8)
    rows = run_engine(LateEngine(model, slots=4, max_len=64, kernels=kernels), prompts_of(6), group_size=4)
    logp = np.concatenate([logp[6:] for _, logp, _ in rows])
    assert np.mean(logp == torch.from_numpy(logp).bfloat16().float().numpy()) < 0.1


def test_a_cpu_gets_the_slot_engine_and_what_cannot_be_captured_is_said(model):
    assert type(open_slot_engine(model, slots=2, max_len=32)) is SlotEngine
    assert not uncapturable(model)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "dynamic" in uncapturable(make_model("llama", rope_parameters=rope))
    looking = make_model()
    looking._can_compile_fullgraph = False
    assert "Qwen3ForCausalLM" in uncapturable(looking)


def test_a_gpu_gets_the_late_engine_and_hears_once_what_it_does_without(monkeypatch, caplog):
    made = []

    def engine(model, **options):
        made.append(options)
        return SimpleNamespace(kernels=Kernels("sdpa", sdpa_kernel(torch.float32), reason="the test says so"))

    late_module._warn_once.cache_clear()
    monkeypatch.setattr(late_module, "LateEngine", engine)
    monkeypatch.setattr(late_module, "CudaGraphs", lambda: "graphs")
    config = SimpleNamespace(rope_parameters={"full_attention": {"rope_type": "longrope"}})
    model = SimpleNamespace(device=torch.device("cuda"), config=config, _can_compile_fullgraph=True)
    for _ in range(2):
        open_slot_engine(model, slots=3, max_len=9)
    config.rope_parameters = {"rope_type": "default"}
    open_slot_engine(model, slots=3, max_len=9, prefill_chunk=2)
    open_slot_engine(model, slots=3, max_len=9, cuda_graphs=False)
    assert [options["capture"] for options in made] == [None, None, "graphs", None]
    assert made[2] == {"slots": 3, "max_len": 9, "prefill_chunk": 2, "capture": "graphs"}
    assert len(caplog.messages) == 2
    assert "longrope" in caplog.messages[0]
    assert "the test says so" in caplog.messages[1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_compute_what_the_kernels_one_by_one_do(dtype):
    model = make_model(head_dim=64).to("cuda", dtype)
    prompts, tool = prompts_of(1, 7, 12, 20), prompts_of(5)[0]
    kwargs = {"group_size": 5, "turns": 3, "tool": tool, "stop": STOPS}
    plain, graphs = (LateEngine(model, slots=6, max_len=96, capture=c) for c in (None, CudaGraphs()))
    expected = run_engine(plain, prompts, **kwargs)
    same_rows(run_engine(graphs, prompts, **kwargs), expected, atol=0.0)
    assert graphs.decoder.captured
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    same_rows(run_engine(graphs, prompts, **kwargs), run_engine(plain, prompts, **kwargs), atol=0.0)
    if dtype == torch.float32:
        eager = SlotEngine(make_model(head_dim=64).cuda(), slots=6, max_len=96)
        same_rows(expected, run_engine(eager, prompts, **kwargs), atol=1e-4)


@pytest.mark.gpu
def test_no_step_waits_for_the_device():
    model = make_model(head_dim=64).to("cuda", torch.bfloat16)
    prompts, tool = prompts_of(1, 7, 12, 20), prompts_of(5)[0]
    kwargs = {"group_size": 5, "turns": 3, "tool": tool, "stop": STOPS}
    engine = open_slot_engine(model, slots=6, max_len=96)
    run_engine(engine, prompts, **kwargs)  # captures
    step = engine.step

    def strict():
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.step = strict
    run_engine(engine, prompts, **kwargs)
