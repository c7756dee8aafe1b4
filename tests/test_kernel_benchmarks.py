"""The kernels' benchmarks: what they measure is what they say, a broken contestant is seen, and gpu_check runs here."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import kernels_oracle
import pytest
import torch
from autotool_kernels import chunked, dispatch
from rich.console import Console

from benchmarks import (
    checks,
    linear_logp_entropy,
    logits_logp_entropy,
    measure,
    peers,
    policy_loss,
    problems,
    report,
    sample_logp_entropy,
)
from benchmarks.peers import Absent, Outputs, Provider

CPU = torch.device("cpu")
SCRIPTS = {
    linear_logp_entropy: ["--shapes", "32x300", "--tokens", "64", "--modes", "nograd", "both"],
    logits_logp_entropy: ["--vocab", "300", "--rows", "32", "--data", "random"],
    policy_loss: ["--tokens", "256", "--sequences", "8"],
    sample_logp_entropy: ["--vocab", "300", "--batch", "4"],
}


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """Canary and copy of a size that costs nothing; what they measure is tested by itself."""
    monkeypatch.setitem(measure.CANARY_SIZE, "cpu", 32)
    monkeypatch.setattr(measure, "copy_gb_s", lambda device, size: 10.0)
    monkeypatch.setitem(measure.CACHES, "cpu", 1 << 16)
    yield
    measure.keep_freed_memory(False)


def problem(data: str = "random", active: float = 1.0, zero: float = 0.0, n: int = 96) -> problems.Problem:
    return problems.make_problem(n, 32, 300, torch.float32, CPU, data, active, zero)


def contest(providers: list, modes=("both",), gradients=("logp+entropy",), case=None) -> dict[str, dict]:
    case = case or problem(active=0.55, zero=0.3)
    reference = problems.Reference(case)
    rows = linear_logp_entropy.run_contest(case, reference, providers, modes, gradients, 2, 60.0)
    return {row["provider"]: row for row in rows}


def eager(name: str = "eager", **changes) -> Provider:
    return Provider(name, changes.pop("run", peers.eager_linear), "", **changes)


def test_peaked_rows_have_the_entropies_they_promise():
    """Median near 0.3 nat and about 20 % above 1 nat: 3000 rows give the median to 0.02 and the share to 0.01; the
    rest is the approximation of the other tokens' entropy."""
    reference = problems.Reference(problems.make_problem(3000, 256, 4000, torch.float32, CPU, "peaked"))
    assert reference.median_entropy == pytest.approx(0.3, abs=0.05)
    assert reference.above_one_nat == pytest.approx(0.2, abs=0.05)
    assert reference.logp.exp().mean().item() > 0.5  # targets are mostly the row's own token


def test_random_rows_are_near_uniform():
    assert problems.Reference(problem()).median_entropy > 4.5  # ln 300 - 1/2 = 5.2


def test_shares_are_those_asked_for_and_inactive_rows_get_no_gradient():
    case = problem(active=0.55, zero=0.3, n=2000)
    assert len(case.live) / 2000 == pytest.approx(0.55, abs=0.04)  # whole spans of 64
    off = case.target == problems.IGNORE
    assert torch.equal(off.nonzero()[:, 0], torch.tensor(sorted(set(range(2000)) - set(case.live.tolist()))))
    assert case.paid[case.live].mean().item() == pytest.approx(0.7, abs=0.06)
    for entropy, per_token in ((True, True), (False, False)):
        assert not case.upstream(entropy, per_token).logp[off].any()
    assert linear_logp_entropy.useful_flops(case, "both") == pytest.approx(
        (2 * len(case.live) + 4 * case.paid.sum().item()) * 32 * 300
    )


def test_the_reference_is_autograd_in_float64():
    case = problem("peaked", 0.55, 0.3)
    reference = problems.Reference(case, rows=1000, columns=1000)
    hidden, weight = (t.double().requires_grad_() for t in (case.hidden, case.weight))
    log_p = (hidden @ weight.t()).log_softmax(-1)
    logp = log_p.gather(1, case.target.clamp(min=0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    up = case.upstream(True, True)
    grads = torch.autograd.grad([logp, entropy], [hidden, weight], [up.logp.double(), up.entropy.double()])
    dx, dw = reference.gradients(True, True)
    assert problems.max_error(reference.logp, logp.detach()[case.live]) < 1e-12
    assert problems.max_error(reference.entropy, entropy.detach()[case.live]) < 1e-12
    assert problems.relative_error(dx, grads[0][reference.rows]) < 1e-12
    assert problems.relative_error(dw, grads[1][reference.columns]) < 1e-12


def test_ours_and_eager_agree_with_float64_and_schedules_that_are_missing_are_said(monkeypatch):
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 20 * 300 * 4)  # several chunks of 20 tokens
    case = problem("peaked", 0.55, 0.3)
    ours = linear_logp_entropy.own_providers(case)
    assert {p.name for p in ours} == {"autotool_recompute", "autotool_store", "autotool_chunked"}
    rows = contest([*ours, eager()], case=case)
    for provider in (*ours, eager()):
        row = rows[provider.name]
        if isinstance(provider, Absent):
            assert row["error"] == provider.why
            continue
        assert "error" not in row, row
        # float32: logits of order 10 round to 1e-6, gradients are sums of a few hundred such terms
        limits = {"dlogp": 1e-5, "dentropy": 2e-5, "dx": 1e-5, "dw": 1e-5}
        assert all(row[key] < limit for key, limit in limits.items() if key in row), row
        assert row["dx"] >= 0
        assert row["dw"] >= 0


def shifted(key: str):
    """Eager, with one result off by a hundredth: values absolutely, gradients relatively."""

    def run(hidden, weight, target, entropy):
        if key == "dx":
            hidden = 1.01 * hidden - 0.01 * hidden.detach()
        if key == "dw":
            weight = 1.01 * weight - 0.01 * weight.detach()
        out = peers.eager_linear(hidden, weight, target, entropy)
        return Outputs(out.logp + 1e-2 * (key == "dlogp"), out.entropy + 1e-2 * (key == "dentropy"))

    return run


@pytest.mark.parametrize("key", ["dlogp", "dentropy", "dx", "dw"])
def test_an_error_of_a_hundredth_shows_in_its_column_alone(key):
    row = contest([eager("wrong", run=shifted(key))])["wrong"]
    assert row[key] == pytest.approx(1e-2, rel=0.01)  # float32 leaves 1e-5
    assert all(row[other] < 1e-4 for other in {"dlogp", "dentropy", "dx", "dw"} - {key})


def test_a_nan_is_no_small_error():
    row = contest([eager("nan", run=lambda h, w, t, e: peers.eager_linear(h * torch.nan, w, t, e))])["nan"]
    assert report.plain(row)["dlogp"] == "nan"
    assert report.plain(row)["dw"] == "nan"
    assert not checks._within({"dlogp": float("nan")}, torch.float32)[0]


def test_an_op_with_a_gradient_for_the_sum_only_is_compared_with_that_gradient():
    def total(hidden, weight, target, entropy):
        return Outputs(None, total=peers.eager_linear(hidden, weight, target, False).logp.sum())

    rows = contest([eager("sum", run=total, per_token=False, entropy=False)], gradients=("logp",))
    assert rows["sum"]["dx"] < 1e-5
    assert rows["sum"]["dw"] < 1e-5
    assert "dlogp" not in rows["sum"]


def test_a_failing_peer_is_a_row_and_the_others_are_measured():
    def late(hidden, weight, target, entropy, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of something\nmore")
        return peers.eager_linear(hidden, weight, target, entropy)

    def broken(*_):
        raise ValueError("never works")

    rows = contest([eager("late", run=late), eager("broken", run=broken), Absent("gone", "not installed: x"), eager()])
    assert rows["late"]["error"] == "RuntimeError: out of something"
    assert rows["broken"]["error"] == "ValueError: never works"
    assert rows["gone"]["error"] == "not installed: x"
    assert rows["eager"]["ms"] > 0


def test_a_peer_without_an_entropy_gradient_stays_out_of_that_table():
    assert set(contest([eager("no", entropy=False), eager()])) == {"eager"}
    assert set(contest([eager("no", entropy=False), eager()], gradients=("logp",))) == {"no", "eager"}


def test_adapters_turn_what_is_missing_into_a_reason():
    def absent():
        import a_package_that_is_not_there  # noqa: F401

    def unavailable():
        raise peers.Unavailable("needs a CUDA device")

    def explodes():
        raise OSError("libcuda.so.1: cannot open")

    found = peers.collect({"a": absent, "b": unavailable, "c": explodes, "d": eager})
    assert [p.why for p in found[:3]] == [
        "not installed: a_package_that_is_not_there",
        "needs a CUDA device",
        "OSError: libcuda.so.1: cannot open",
    ]
    assert found[3].name == "eager"


def test_every_peer_is_a_provider_or_says_why_not():
    found = peers.linear_peers(CPU, torch.float32) + peers.logits_peers(CPU)
    assert {"eager", "compile", "liger", "cce", "trl", "verl", "quack", "fla", "gemm3", "gemm4", "torch_lce"} <= {
        p.name for p in found
    }
    assert all(p.why if isinstance(p, Absent) else p.how for p in found)
    assert any(p.name == "verl" and "--verl" in p.why for p in found if isinstance(p, Absent))


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="torch before 2.13")
def test_torchs_own_op_gets_chunks_that_suit_the_device():
    hows = {
        dtype: next(p.how for p in peers.linear_peers(CPU, dtype) if p.name == "torch_lce")
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert "chunks of 256 rows" in hows[torch.float32]
    assert "automatic chunks" in hows[torch.bfloat16]
    case = problem(n=300)  # more than a chunk
    chosen = [p for p in peers.linear_peers(CPU, torch.float32) if p.name.startswith("torch_lce")]
    rows = contest(chosen, gradients=("logp",), case=case)
    assert all(rows[p.name]["dx"] < 1e-5 and rows[p.name]["dw"] < 1e-5 for p in chosen)


def test_verl_is_loaded_from_its_files_without_its_package(tmp_path):
    folder = tmp_path / "verl" / "utils" / "kernel"
    folder.mkdir(parents=True)
    (tmp_path / "verl" / "__init__.py").write_text("raise ImportError('the whole of verl')")
    (folder / "kernels.py").write_text("from verl.utils.device import NAME\n")
    (tmp_path / "verl" / "utils" / "device.py").write_text("NAME = 'x'\n")
    (folder / "linear_cross_entropy.py").write_text("from . import kernels\nclass LinearCrossEntropy:\n    pass\n")
    names = ("verl", "verl.utils", "verl.utils.kernel", "verl.utils.device")
    try:
        for path in (tmp_path, folder, folder / "kernels.py"):
            assert peers.load_verl(path).__name__ == "LinearCrossEntropy"
        with pytest.raises(peers.Unavailable, match="no verl/utils/kernel"):
            peers.load_verl(tmp_path / "elsewhere")
    finally:
        for name in [n for n in sys.modules if n in names or n.startswith("verl.")]:
            del sys.modules[name]
        sys.modules.pop("verl", None)


def test_contestants_take_turns_and_the_first_of_a_repetition_changes():
    log: list[str] = []
    calls = {name: measure.Call(lambda _, name=name: log.append(name)) for name in "abc"}
    times = measure.interleaved(calls, CPU, 4)
    assert log[3:] == list("abc") + list("bca") + list("cab") + list("abc")
    assert all(t.repetitions == 4 and t.p20 <= t.ms <= t.p80 for t in times.values())


def test_time_is_of_the_call_alone_and_per_contained_call():
    import time

    calls = {
        "slow": measure.Call(lambda _: time.sleep(0.02), lambda i: time.sleep(0.05)),
        "four": measure.Call(lambda _: time.sleep(0.02), count=4),
    }
    times = measure.interleaved(calls, CPU, 3)
    assert 20 <= times["slow"].ms < 65  # 70 with the preparation
    assert 5 <= times["four"].ms < 19
    assert times["slow"].cpu_ms < 5  # asleep


def test_processor_time_is_that_of_the_work():
    import time

    def work(_):
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass

    assert 50 <= measure.interleaved({"work": measure.Call(work)}, CPU, 3)["work"].cpu_ms < 60


def test_a_contest_ends_at_its_bound_but_not_before_three_repetitions():
    assert measure.interleaved({"a": measure.Call(lambda _: None)}, CPU, 50, seconds=0.0)["a"].repetitions == 3


def test_no_contestant_gets_the_input_that_another_has_just_read():
    seen: list[int] = []
    calls = {name: measure.Call(seen.append) for name in "abc"}
    measure.interleaved(calls, CPU, 4)
    assert len(set(seen[3:])) == 12  # after one warm-up each


def test_copies_fill_the_caches(monkeypatch):
    """However small the input; up to a number."""
    monkeypatch.setitem(measure.CACHES, "cpu", 1000)
    for size, count in ((1, 1000), (300, 4), (1000, 1), (5000, 1)):
        copies = measure.copies_beyond_caches(torch.ones(size, dtype=torch.uint8))
        assert len(copies) == count
        assert len({t.data_ptr() for t in copies}) == count
    monkeypatch.setattr(measure, "MOST_COPIES", 7)
    assert len(measure.copies_beyond_caches(torch.ones(1, dtype=torch.uint8))) == 7


class FakeCapture:
    """torch.cuda as a capture sees it: where it fails, the stream stays the capture's and the generator records on."""

    def __init__(self, monkeypatch):
        self.stream, self.recording = "user's", False
        fakes = {
            "current_stream": lambda: self.stream, "set_stream": lambda s: setattr(self, "stream", s),
            "current_device": lambda: 0, "default_generators": [self], "CUDAGraph": object, "graph": self.graph,
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def clone_state(self) -> bool:
        return self.recording

    def graphsafe_set_state(self, state: bool) -> None:
        self.recording = state

    @contextlib.contextmanager
    def graph(self, graph):
        self.stream, self.recording = "capture's", True
        try:
            yield
        except BaseException:
            raise RuntimeError("capture_end: operation failed due to a previous error during capture") from None
        self.stream, self.recording = "user's", False


def test_a_failed_capture_leaves_stream_and_random_numbers_as_they_were(monkeypatch):
    fake = FakeCapture(monkeypatch)
    assert measure.captured(lambda: 5)[1] == 5
    with pytest.raises(RuntimeError, match="previous error"):
        measure.captured(lambda: 1 / 0)
    assert (fake.stream, fake.recording) == ("user's", False)


def test_ceilings_need_no_default_generator(monkeypatch):
    """After a broken contestant it may refuse."""

    def refuse(*_, generator=None, **__):
        assert generator is not None
        return true(*_, generator=generator, **__)

    true = torch.randn
    monkeypatch.setattr(torch, "randn", refuse)
    assert measure.matmul_tflops(CPU, 16) > 0


def test_a_sampler_that_stops_the_host_is_not_captured(monkeypatch):
    captures = []
    monkeypatch.setattr(
        sample_logp_entropy, "graphed", lambda run, count: captures.append(count) or measure.Call(lambda _: run())
    )
    copies = [torch.randn(2, 50) for _ in range(33)]
    args = sample_logp_entropy.parser().parse_args(["--repetitions", "1"])
    found = {"eager": sample_logp_entropy.plain_sample, "other": sample_logp_entropy.plain_gumbel}
    kept: list[list[dict]] = []
    rows = sample_logp_entropy.run_contest(copies, found, ("nograd", "graph"), args, lambda r: kept.append(list(r)))
    errors = {(r["provider"], r["mode"]): r.get("error") for r in rows}
    assert captures == [33]  # a graph goes once through every copy
    assert "torch.multinomial" in errors["eager", "graph"]
    assert errors["other", "graph"] is None
    assert errors["eager", "nograd"] is None
    assert [len(r) for r in kept] == [2, 4]  # saved after each mode


def test_peak_memory_is_that_of_the_call():
    """64 MiB held at once and 64 MiB freed before: the peak is 64, not 0 and not 128. Pages and the interpreter's own
    blocks are the tolerance."""
    size = 64 << 20

    def run():
        for _ in range(2):
            torch.ones(size, dtype=torch.uint8)

    peak = measure.peak_extra_bytes(run, CPU)
    if peak is None:
        pytest.skip("no high-water mark of the resident set on this system")
    assert peak == pytest.approx(size, rel=0.05)
    held = [torch.ones(size, dtype=torch.uint8)]
    assert measure.peak_extra_bytes(lambda: len(held), CPU) < size // 16


def test_peak_memory_does_not_depend_on_holes_left_in_the_heap():
    """A loop over 4 MiB blocks takes at most 8 MiB, also where earlier calls left 256 MiB of holes to wander in."""
    if not measure.keep_freed_memory(True):
        pytest.skip("not glibc")
    blocks = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(64)]
    pins = [torch.ones(1 << 10, dtype=torch.uint8) for _ in range(64)]
    del blocks

    def run():
        for i in range(64):
            block = torch.ones(4 << 20, dtype=torch.uint8)
            pins[i] = torch.ones(1 << 16, dtype=torch.uint8)
        return block

    peak = measure.peak_extra_bytes(run, CPU)
    if peak is None:
        pytest.skip("no high-water mark of the resident set on this system")
    assert peak < 16 << 20


def test_ceilings_are_positive_rates():
    assert 0 < measure.matmul_tflops(CPU, 64) < 1e3
    assert 0 < measure.ceilings(CPU).matmul_tflops < 1e3


def text_of(columns, rows) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200, highlight=False, markup=False).print(report.render(columns, rows))
    return stream.getvalue()


def test_a_table_writes_the_rows_numbers_and_marks_what_is_missing():
    rows = [
        {"provider": "a", "ms": 12.345, "dx": 1.26e-3, "extra_gb": None},
        {"provider": "b", "ms": 0.5, "dx": "nan"},
        {"provider": "c", "error": "not installed: c"},
    ]
    lines = [line.split() for line in text_of(linear_logp_entropy.COLUMNS, rows).splitlines()]
    assert lines == [["provider", "ms", "rel", "dX"], ["a", "12.3", "1.3e-03"], ["b", "0.500", "nan"]]
    assert report.not_measured(rows) == ["c: not measured: not installed: c"]


def test_a_table_is_on_disk_as_soon_as_it_is_printed(tmp_path, capsys):
    out = tmp_path / "early.json"
    written = report.Report("op", CPU, measure.Ceilings(1.0, 1.0, 1, "x"), out)
    written.add("first", {}, linear_logp_entropy.COLUMNS, [{"provider": "a", "ms": 1.0}])
    assert [t["rows"] for t in json.loads(out.read_text())["tables"]] == [[{"provider": "a", "ms": 1.0}]]
    assert "first" in capsys.readouterr().out


def readings(monkeypatch, *values: float) -> None:
    found = iter(values)
    monkeypatch.setattr(measure, "matmul_tflops", lambda device: next(found))


def rated(written: report.Report) -> dict:
    written.add("a table", {}, linear_logp_entropy.COLUMNS, [{"provider": "a", "ms": 1.0, "tflops": 4.5}])
    return written.tables[-1]


def test_shares_are_of_the_larger_reading_and_left_out_where_the_ceiling_moved(monkeypatch, capsys):
    written = report.Report("op", CPU, measure.Ceilings(1.0, 5.0, 1, "x"), None)
    readings(monkeypatch, 4.8, 4.9, 2.0, 4.0)
    assert rated(written)["rows"][0]["roofline"] == pytest.approx(4.5 / 5.0)
    assert rated(written)["rows"][0]["roofline"] == pytest.approx(4.5 / 4.9)
    for _ in range(2):
        table = rated(written)
        assert "roofline" not in table["rows"][0]
        assert "no shares of a ceiling" in table["notes"][0]
    assert "no shares of a ceiling that read 4.9 TFLOP/s before and 2 after" in capsys.readouterr().out


def test_a_mode_is_on_disk_before_the_next_one_runs(tmp_path):
    out = tmp_path / "early.json"
    written = report.Report("op", CPU, measure.Ceilings(1.0, 1.0, 1, "x"), out)
    written.add("first", {}, linear_logp_entropy.COLUMNS, [{"provider": "a", "ms": 1.0}])
    written.keep("second", {}, [{"provider": "b", "ms": 2.0}])
    found = json.loads(out.read_text())["tables"]
    assert [t.get("unfinished", False) for t in found] == [False, True]
    assert found[1]["rows"] == [{"provider": "b", "ms": 2.0}]
    written.add("second", {}, linear_logp_entropy.COLUMNS, [{"provider": "b", "ms": 2.0}])
    assert len(json.loads(out.read_text())["tables"]) == 2


def test_parts_are_disjoint_and_together_everything():
    gpu, parse = torch.device("cuda"), linear_logp_entropy.parser().parse_args
    problems_of = lambda *part: report.in_part(linear_logp_entropy.cases(parse(["--full"]), gpu), part)  # noqa: E731
    parts = [problems_of(i, 8) for i in range(1, 9)]
    assert sorted(case for cases in parts for case in cases) == sorted(problems_of(1, 1))
    assert max(map(len, parts)) == 5
    assert parse(["--part", "2/8"]).part == (2, 8)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__.rpartition(".")[2])
def test_a_script_prints_the_table_that_it_writes_and_says_cpu(script, tmp_path, capsys):
    out = tmp_path / "table.json"
    names = ["--providers", "ours", "eager", "copy", "gemm3"]
    options = ["--quick", "--device", "cpu", *names, "--repetitions", "2", "--out", str(out), *SCRIPTS[script]]
    assert script.main(options) == 0
    printed = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert results["benchmark"] == script.__name__.rpartition(".")[2]
    assert results["provenance"]["versions"]["torch"] == torch.__version__
    assert results["ceilings"]["matmul_tflops_after"] > 0
    assert results["tables"]
    for table in results["tables"]:
        assert f"on CPU ({results['provenance']['device']}" in table["title"]
        assert table["title"] in printed
        assert {row["provider"] for row in table["rows"]} >= {"eager"}
        rendered = [line.split() for line in text_of(script.COLUMNS, table["rows"]).splitlines()]
        lines = [line.split() for line in printed.splitlines()]
        assert all(line in lines for line in rendered)
        for row in table["rows"]:
            if "error" in row:
                assert f"{row['provider']}: not measured: {row['error']}" in printed
            else:
                assert row["ms"] > 0
    assert "NVIDIA" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "896"], "two numbers"),
        (["--shapes", "0x5"], "must be positive"),
        (["--active", "120"], "0 to 100"),
        (["--part", "3"], "two numbers"),
        (["--part", "3/2"], "1 <= I <= K"),
        (["--modes", "sideways"], "invalid choice"),
        (["--quick", "--full"], "not allowed with"),
    ],
)
def test_bad_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        linear_logp_entropy.main(options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_form_runs_without_a_gpu():
    for script, options in (
        (linear_logp_entropy, ["--device", "cuda"]),
        (policy_loss, ["--modes", "graph"]),
        (sample_logp_entropy, ["--modes", "graph"]),
    ):
        with pytest.raises(SystemExit, match="there is no CUDA device"):
            script.main(options)


def test_the_sets_of_a_gpu_hold_the_shapes_and_shares_of_the_protocol():
    gpu = torch.device("cuda")
    parse = linear_logp_entropy.parser().parse_args
    full = linear_logp_entropy.cases(parse(["--full"]), gpu)
    assert {(c.hidden, c.vocab) for c in full} == set(linear_logp_entropy.SHAPES)
    assert {c.tokens for c in full} == {1024, 8192, 65536}
    assert {(c.active, c.zero_advantage) for c in full} == {(a, z) for a in (1.0, 0.55, 0.25) for z in (0.0, 0.3)}
    assert {c.data for c in full} == {"random", "peaked"}
    quick = linear_logp_entropy.cases(parse(["--quick"]), gpu)
    assert [(c.hidden, c.vocab, c.tokens) for c in quick] == [(3584, 152064, 8192), (896, 151936, 8192)]
    chosen = linear_logp_entropy.cases(parse(["--shapes", "8x9", "--active", "25", "--tokens", "7"]), CPU)
    assert {(c.hidden, c.vocab, c.tokens, c.active) for c in chosen} == {(8, 9, 7, 0.25)}


def test_the_plain_policy_loss_is_the_documented_one():
    """The contestants' formula against a loop over sequences."""
    batch = policy_loss.make_batch(200, 7, CPU)
    loss, _ = kernels_oracle.policy_loss(
        batch.logp.double(), batch.old_logp.double(), batch.entropy.double(), batch.advantages.double(),
        batch.cu_seqlens, batch.mask, batch.is_short, target_short=policy_loss.TARGET_SHORT,
        target_long=policy_loss.TARGET_LONG, beta_short=policy_loss.BETA_SHORT, beta_long=policy_loss.BETA_LONG,
    )  # fmt: skip
    value = policy_loss.plain_step(policy_loss.plain_loss, batch, torch.float64).loss
    assert value.item() == pytest.approx(loss.item(), abs=1e-12)


def test_the_checks_pass_here_and_a_wrong_op_fails_them(monkeypatch):
    where = checks.Setting(CPU, torch.float32, ((16, 50),), 24)
    monkeypatch.setattr(checks, "REPEATS", 3)
    found = list(checks.run_checks(where))
    assert not [c for c in found if c.passed is False]
    assert [c.passed for c in found if "chosen backend" in c.name] == [None] * 4
    assert sum(c.passed is True for c in found) >= 6
    assert [c.detail for c in found if c.name.startswith("CUDA graph")] == ["needs a GPU"] * 4
    true = checks.autotool_kernels.linear_logp_entropy

    def wrong(*args, **options):
        out = true(*args, **options)
        return out._replace(entropy=out.entropy + 1e-2)

    monkeypatch.setattr(checks.autotool_kernels, "linear_logp_entropy", wrong)
    failed = {c.name for c in checks.run_checks(where) if c.passed is False}
    assert {"linear accuracy, autotool_recompute, H=16 V=50 peaked"} <= failed
    assert not [name for name in failed if not name.startswith("linear accuracy")]


def test_a_gpu_on_which_triton_does_not_serve_fails_the_checks(monkeypatch):
    """The torch backend's results are right as well, so nothing else would show it."""
    where = checks.Setting(torch.device("cuda"), torch.bfloat16, (), 0)
    for name, passed in (("triton", True), ("torch", False)):
        choice = dispatch.Choice(name, "why")
        monkeypatch.setattr(checks.autotool_kernels, "choose", lambda *_, choice=choice, **__: choice)
        assert checks._chosen("policy_loss", where).passed is passed
