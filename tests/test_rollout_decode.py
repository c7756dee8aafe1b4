"""A decoding step reads static tensors only, writes nothing that another row sees, and can be captured."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from engine_models import ARCHITECTURES, KERNELS, STOP, make_model, prompts_of, run_engine
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from autotool_fast.rollout.attention import ATTENTION_NAME
from autotool_fast.rollout.decode import CudaGraphs, batch_bucket, length_bucket
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.rollout.kv_attention import Kernels, flash_kernel, sdpa_kernel, varlen_kernel
from autotool_fast.rollout.late import LateEngine
from autotool_fast.rollout.rng import row_seeds

HOST_READS = ("_local_scalar_dense", "item", "nonzero", "equal.default")


class Trace(TorchDispatchMode):
    """The ops of a step with every argument that is not a tensor, and the layout of those that are."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        layout = tree_map_only(torch.Tensor, lambda t: (t.shape, t.stride(), t.dtype, t.device), (args, kwargs))
        self.ops.append((str(op), layout))
        return op(*args, **(kwargs or {}))


def trace(engine, key):
    engine.model.config._attn_implementation = ATTENTION_NAME
    with Trace() as traced, torch.inference_mode():
        engine.decoder.step(*key)
    return traced.ops


def traced_kernels(dtype, numbers):
    """A GPU's kernels without their computation; the numbers that they are called with go to `numbers`."""

    def call(query, *args, **kwargs):
        numbers.append([x for x in (*args, *kwargs.values()) if not isinstance(x, torch.Tensor)])
        return torch.empty_like(query)

    return {
        "sdpa": Kernels("sdpa", sdpa_kernel(dtype), bounded=True),
        "flash-attn": Kernels("flash-attn", flash_kernel(call)),
        "varlen": Kernels("varlen", varlen_kernel(call), varlen=call),
    }


@pytest.mark.parametrize("kernels", ["sdpa", "flash-attn", "varlen"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_no_value_of_a_step_reaches_the_host(architecture, kernels):
    """On tensors without data any such read is an error; transfers between devices are looked for by name."""
    model = make_model(architecture).to("meta", torch.bfloat16)
    engine = LateEngine(model, slots=8, max_len=64, kernels=traced_kernels(torch.bfloat16, [])[kernels])
    ops = trace(engine, (4, 64))
    assert any("sample_logp_entropy" in op for op, _ in ops)
    for op, (args, kwargs) in ops:
        moved = {str(x) for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.device)} - {"meta"}
        assert not moved, op
        assert not any(name in op for name in HOST_READS), op


def test_the_trace_finds_a_read():
    engine = LateEngine(make_model().to("meta"), slots=8, max_len=64, kernels=KERNELS["sdpa"])
    logits = engine.decoder._logits
    engine.decoder._logits = lambda hidden: logits(hidden) / hidden.amax().item()
    with pytest.raises(RuntimeError, match="item"):
        trace(engine, (4, 64))


def some_state(engine, seed):
    """Put the engine's device state where a rollout might have left it."""
    draw, slots, state = np.random.default_rng(seed), engine.slots, engine.decoder.state
    active = draw.random(slots) < 0.6
    active[0] = True
    state.set_plan(active, draw.integers(1, engine.max_len - 2, slots), draw.integers(-(2**62), 2**62, slots))
    state.token.copy_(torch.from_numpy(draw.integers(4, 30, slots)))
    engine._cache.kv.copy_(torch.from_numpy(draw.normal(size=engine._cache.kv.shape)))
    return active


@pytest.mark.parametrize("kernels", ["sdpa", "flash-attn", "varlen"])
def test_steps_of_one_key_differ_in_tensors_only(kernels):
    numbers, traces = [], {}
    engine = LateEngine(make_model(), slots=9, max_len=300, kernels=traced_kernels(torch.float32, numbers)[kernels])
    for key in ((4, 300), (9, 300), (9, 256)):
        for seed in (1, 2):
            some_state(engine, seed)
            engine.decoder.state.temperature.fill_(0.5 * seed)
            numbers.clear()
            traces.setdefault(key, []).append((trace(engine, key), str(numbers)))
    for one, other in traces.values():
        assert one == other
    kinds = {str(one) for one, _ in traces.values()}
    # Rows and, for a bounded attention, positions are all that a key says.
    assert len(kinds) == (3 if engine.kernels.bounded else 2)


def test_inactive_slots_write_where_no_row_reads():
    engine = LateEngine(make_model(), slots=6, max_len=32, kernels=KERNELS["sdpa"])
    engine.model.config._attn_implementation = ATTENTION_NAME
    active = some_state(engine, 0)
    assert 0 < active.sum() < 6
    state, kv = engine.decoder.state, engine._cache.kv
    before, position, token = kv.clone(), state.position.clone(), state.token.clone()
    with torch.inference_mode():
        engine.decoder.step(6, 32)
    touched = (kv != before).any(0).any(0).any(1).any(-1)  # [slots, max_len]
    for slot in range(6):
        expected = int(position[slot]) if active[slot] else 31
        assert touched[slot].nonzero().flatten().tolist() == [expected]
    assert (state.position - position).tolist() == active.astype(int).tolist()
    assert state.results[0].tolist() == state.token.tolist()
    assert state.token.tolist() != token.tolist()


def test_inactive_slots_look_at_one_position():
    seen = []

    def decode(lengths, longest):
        seen.append(lengths.tolist())
        return KERNELS["sdpa"].decode(lengths, longest)

    engine = LateEngine(make_model(), slots=6, max_len=32, kernels=Kernels("seen", decode))
    engine.model.config._attn_implementation = ATTENTION_NAME
    active = some_state(engine, 0)
    lengths = (engine.decoder.state.position + 1).tolist()
    with torch.inference_mode():
        engine.decoder.step(6, 32)
    assert seen == [[n if a else 1 for n, a in zip(lengths, active, strict=True)]]


def test_a_rows_step_does_not_depend_on_the_inactive_ones():
    engine = LateEngine(make_model(), slots=6, max_len=32, kernels=KERNELS["sdpa"])
    engine.model.config._attn_implementation = ATTENTION_NAME
    results = []
    for filling in (0.0, 3.0):
        active = some_state(engine, 0)
        engine._cache.kv[:, :, ~torch.from_numpy(active)] = filling
        engine.decoder.state.token[~torch.from_numpy(active)] = int(filling)
        with torch.inference_mode():
            engine.decoder.step(6, 32)
        results.append(engine.decoder.state.results[:, torch.from_numpy(active)].clone())
    assert torch.equal(*results)


class Recorder:
    """A capture without a GPU: warms up as `CudaGraphs` does, and repeats the function."""

    def __init__(self):
        self.captures = 0
        self.replays = 0

    def __call__(self, run):
        self.captures += 1
        for _ in range(2):
            run()

        def replay():
            self.replays += 1
            run()

        return replay


def test_a_graph_is_captured_behind_two_warm_runs_on_the_same_stream_and_pool(monkeypatch):
    log = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            log.append("replay")

    @contextmanager
    def within(what):
        log.append(what)
        yield
        log.append(f"end of {what}")

    def graph(graph, *, pool, stream, **_):
        assert isinstance(graph, Graph)
        return within(f"capture in {pool} on {stream.name}")

    for name, stand_in in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "current_stream": lambda: Stream("current"),
        "stream": lambda stream: within(stream.name),
        "graph": graph,
        "graph_pool_handle": lambda: "pool",
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    CudaGraphs()(lambda: log.append("run"))()
    warm = ["side waits for current", "side", "run", "run", "end of side", "current waits for side"]
    capture = "capture in pool on side"
    assert log == [*warm, capture, "run", f"end of {capture}", "replay"]


def test_capturing_moves_no_row_on():
    model, prompts, tool = make_model(), prompts_of(1, 7, 12, 20), prompts_of(5)[0]
    kwargs = {"group_size": 5, "turns": 3, "tool": tool, "stop": [STOP, 4, 5]}
    expected = run_engine(SlotEngine(model, slots=12, max_len=96, prefill_chunk=8), prompts, **kwargs)
    recorder = Recorder()
    engine = LateEngine(model, slots=12, max_len=96, prefill_chunk=8, capture=recorder)
    for (ids, _, _), (other, _, _) in zip(run_engine(engine, prompts, **kwargs), expected, strict=True):
        assert ids.tolist() == other.tolist()
    # 12 slots: the last bucket is cut to them.
    assert engine.decoder.captured == [(1, 96), (2, 96), (4, 96), (8, 96), (12, 96)]
    assert recorder.captures == 5 < recorder.replays


def test_steps_are_captured_again_only_when_weights_have_moved():
    model, recorder = make_model(), Recorder()
    engine = LateEngine(model, slots=4, max_len=64, capture=recorder)
    run_engine(engine, prompts_of(6), new=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    run_engine(engine, prompts_of(6), new=4)
    assert recorder.captures == 1
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    run_engine(engine, prompts_of(6), new=4)
    assert recorder.captures == 2


def test_greedy_and_sampling_share_a_captured_step():
    recorder = Recorder()
    engine = LateEngine(make_model(), slots=4, max_len=64, capture=recorder)
    greedy, drawn = (run_engine(engine, prompts_of(6), temperature=t)[0][0].tolist() for t in (0.0, 2.0))
    assert recorder.captures == 1
    assert greedy != drawn


def test_a_bounded_attention_looks_at_more_positions_as_rows_grow():
    engine = LateEngine(make_model(), slots=1, max_len=400, capture=Recorder(), kernels=KERNELS["sdpa"])
    prompt = prompts_of(250)[0]
    ids = run_engine(engine, [prompt], new=20)[0][0]
    assert engine.decoder.captured == [(1, 256), (1, 400)]
    expected = run_engine(SlotEngine(engine.model, slots=1, max_len=400), [prompt], new=20)[0][0]
    assert ids.tolist() == expected.tolist()


def test_buckets_are_few_and_large_enough():
    sizes = sorted({batch_bucket(rows, 1000) for rows in range(1, 1001)})
    assert sizes[:6] == [1, 2, 4, 8, 16, 24]
    assert sizes[-2:] == [992, 1000]
    assert len(sizes) < 64
    assert all(rows <= batch_bucket(rows, 1000) <= max(2 * rows, rows + 31) for rows in range(1, 1001))
    assert {length_bucket(n, 5000) for n in range(1, 5001)} == {256, 512, 1024, 2048, 4096, 5000}
    assert all(n <= length_bucket(n, 5000) for n in range(1, 5001))


def test_seeds_of_all_64_bits_reach_the_device():
    engine = LateEngine(make_model(), slots=4, max_len=32)
    seeds = row_seeds(0, 0, 0, np.arange(4))
    engine.decoder.state.set_plan(np.ones(4, bool), np.arange(4), seeds)
    assert engine.decoder.state.seed.tolist() == seeds.tolist()
