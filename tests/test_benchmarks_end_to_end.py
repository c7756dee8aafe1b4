"""The rollout and training-step benchmarks: every contestant does the work it should, and other work is seen."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
import torch

from autotool_fast.rollout.late import LateEngine
from autotool_fast.tasks.record import Task
from benchmarks import (
    end_to_end,
    episodes,
    measure,
    rollout,
    rollout_contestants,
    run_all,
    scaling,
    train_contestants,
    train_step,
)
from benchmarks.episodes import Counts, Shape, Work
from benchmarks.peers import Absent
from benchmarks.rollout_contestants import Setting, contestants

CPU = torch.device("cpu")
WORK = Work(prompts=2, group=2, shortest=8, longest=20, result_tokens=6)
SHAPE = Shape(hidden=64, layers=1, vocab=2048, max_len=1024)
SIZES = ["--prompts", "2", "--group", "2", "--hidden", "64", "--layers", "1", "--repetitions", "1"]


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """Canary and copy of a size that costs nothing."""
    monkeypatch.setitem(measure.CANARY_SIZE, "cpu", 32)
    monkeypatch.setattr(measure, "copy_gb_s", lambda device, size=None: 10.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    measure.keep_freed_memory(False)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting.of(WORK, SHAPE, CPU)


def present(found):
    """The contestant; skips the test where its package is not installed."""
    if isinstance(found, Absent):
        assert found.why.startswith("not installed"), found.why
        pytest.skip(found.why)
    return found


def only(setting: Setting, name: str):
    (found,) = contestants(setting, lambda other: other == name)
    return present(found)


def test_the_expected_work_varies_between_samples_and_has_four_turns(setting):
    want = episodes.expected(WORK, setting.script, setting.chat)
    assert want.turns == (4,) * 4
    assert len(set(want.tokens)) > 1
    assert all(4 * WORK.shortest <= tokens <= 4 * WORK.longest for tokens in want.tokens)


@pytest.mark.parametrize("name", ["autotool", "generate", "generate_kept", "continuous", "trl"])
def test_contestants_sample_what_the_script_says_whatever_their_seed(setting, name):
    contestant, want = only(setting, name), episodes.expected(WORK, setting.script, setting.chat)
    for seed in (0, 1):
        assert contestant.run(seed) == want


@pytest.mark.parametrize(("graphs", "how"), [(True, "CUDA graphs"), (False, "kernel by kernel")])
def test_the_engine_for_a_gpu_plays_the_same_episodes(setting, monkeypatch, graphs, how):
    def engine(model, *, cuda_graphs, **sizes):
        assert cuda_graphs == graphs
        return LateEngine(model, **sizes)

    monkeypatch.setattr(rollout_contestants, "open_slot_engine", engine)
    contestant = rollout_contestants._on_gpu(setting, "autotool", cuda_graphs=graphs)
    want = episodes.expected(WORK, setting.script, setting.chat)
    assert [contestant.run(seed) for seed in (0, 1)] == [want, want]
    assert "attention by sdpa" in contestant.how
    assert how in contestant.how


def test_a_published_shape_is_taken_whole(monkeypatch):
    compared = []
    monkeypatch.setattr(rollout, "compare", lambda args, shape, *rest: compared.append((args.dtype, shape)))
    assert rollout.main(["--shape", "qwen2.5-0.5b", "--turn-tokens", "12", "12"]) == 0
    ((dtype, shape),) = compared
    assert dtype == "bfloat16"
    with torch.device("meta"):
        model = episodes.make_model(shape, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == 494_032_768  # of the published model


def test_equal_turns_are_equally_long():
    work = Work(prompts=1, group=2, shortest=9, longest=9)
    setting = Setting.of(work, SHAPE, CPU)
    assert only(setting, "generate").run(0) == Counts((4, 4), (36, 36))


def test_a_script_that_is_taken_off_leaves_a_model_that_says_something_else():
    setting = Setting.of(WORK, SHAPE, CPU)
    contestant, want = only(setting, "autotool"), episodes.expected(WORK, setting.script, setting.chat)
    setting.script.remove()
    assert contestant.run(0) != want


def test_all_contestants_start_from_the_same_prompt_tokens(setting):
    chat, messages = setting.chat, episodes.question(1)
    template = chat.tokenizer.apply_chat_template(
        messages, tools=[episodes.look_up], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert chat.encode_prompt(messages, [episodes.tool_schema()]) == list(template)


def test_the_script_spells_out_the_turn_it_pushes_to(setting):
    ids = setting.script.reply(300)
    assert len(ids) == setting.script.turn_length(300)
    call = setting.chat.parse(setting.chat.decode(ids[:-1])).calls
    assert [c.name for c in call] == ["look_up"]
    assert ids[-1] == setting.chat.stop_id


class StandIn(types.ModuleType):
    """As much of vLLM as its contestant uses: it samples exactly as many tokens as it is told to."""

    __version__ = "0"

    class LLM:
        def __init__(self, **options) -> None:
            self.options = options

        def reset_prefix_cache(self) -> None:
            pass

        def generate(self, prompts, params, use_tqdm):
            said = [types.SimpleNamespace(token_ids=[7] * p.max_tokens) for p in params]
            return [types.SimpleNamespace(outputs=[reply]) for _, reply in zip(prompts, said, strict=True)]

    class SamplingParams(types.SimpleNamespace):
        pass


def test_vllm_is_asked_for_turns_of_the_scripts_lengths(setting, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", StandIn("vllm"))
    assert only(setting, "vllm").run(0) == episodes.expected(WORK, setting.script, setting.chat)


def test_peers_that_are_not_installed_say_so(setting, monkeypatch):
    for name in ("trl", "vllm"):
        monkeypatch.setitem(sys.modules, name, None)
        (found,) = contestants(setting, lambda other, name=name: other == name)
        assert found == Absent(name, f"not installed: {name}")


def test_other_work_has_no_time_and_the_ratio_is_of_medians():
    def cheat(i: int) -> int:
        end_to_end.checked("cheat", Counts((4,), (10,)), Counts((4,), (20,)))
        return 10

    spin = torch.randn(200, 200)
    runs = {"autotool": lambda i: 100, "slow": lambda i: int((spin @ spin).numel() * 0) + 100, "cheat": cheat}
    rows = {row["provider"]: row for row in end_to_end.contest(runs, CPU, 3, 60.0, memory=False)}
    assert "did other work" in rows["cheat"]["error"]
    assert "tokens_s" not in rows["cheat"]
    assert rows["slow"]["ours_faster"] == pytest.approx(rows["slow"]["ms"] / rows["autotool"]["ms"])
    assert rows["slow"]["tokens_s"] == pytest.approx(1e5 / rows["slow"]["ms"])
    assert "ours_faster" not in rows["autotool"]


def test_rollout_prints_ratios_and_writes_what_it_measured(tmp_path, capsys):
    out = tmp_path / "rollout.json"
    options = ["--providers", "ours", "generate", "--vocab", "2048", "--turn-tokens", "8", "12", "--out", str(out)]
    assert rollout.main([*SIZES, *options]) == 0
    written = json.loads(out.read_text())
    assert len(written["tables"]) == 2  # equal turns, then mixed ones
    for table in written["tables"]:
        rows = {row["provider"]: row for row in table["rows"]}
        assert set(rows) == {"autotool", "generate", "generate_kept"}
        assert {row["tokens"] for row in rows.values()} == {table["sampled_tokens"]}
        assert rows["generate"]["ours_faster"] > 0
        assert table["problem"]["threads"] == 1
    printed = capsys.readouterr().out
    assert "ours faster" in printed
    assert "on CPU" in printed


BATCH = train_contestants.Batch(prompts=2, group=2, tokens=6)


def trained(name: str):
    shape = Shape(hidden=64, layers=1, vocab=2048, max_len=1024, tied=True)
    (found,) = train_contestants.contestants(BATCH, shape, CPU, torch.float32, lambda other: other == name)
    return present(found)


@pytest.mark.parametrize("name", ["autotool", "trl", "trl_stored"])
def test_a_step_samples_equally_long_replies_and_an_update_samples_none(name, monkeypatch):
    models = []
    make = train_contestants.make_model
    monkeypatch.setattr(train_contestants, "make_model", lambda *given: models.append(make(*given)) or models[-1])
    contestant = trained(name)
    weights = models[0].get_input_embeddings().weight
    before = weights.detach().clone()
    assert contestant.step(0) == BATCH.sampled == 24
    assert not torch.equal(weights, before)
    after = weights.detach().clone()
    monkeypatch.setattr("autotool_fast.rl.rollout_over_ranks", None)
    monkeypatch.setattr(models[0], "generate", None)
    assert contestant.update(1) == 24
    assert not torch.equal(weights, after)


def test_the_tasks_of_a_step_reward_every_other_sample():
    tasks: list[Task] = train_contestants._tasks(BATCH)
    assert [task.episode().score() for task in tasks for _ in range(2)] == [True, False, True, False]


def test_train_step_writes_step_and_update(tmp_path):
    out = tmp_path / "step.json"
    assert train_step.main([*SIZES, "--quick", "--vocab", "2048", "--tokens", "5", "--out", str(out)]) == 0
    tables = json.loads(out.read_text())["tables"]
    assert [table["measures"] for table in tables] == ["step", "update"]
    assert [row["tokens"] for table in tables for row in table["rows"]] == [20, 20]
    assert all(row["peak_bytes"] > 0 for table in tables for row in table["rows"])


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (rollout, ["--turn-tokens", "5", "60"]),
        (rollout, ["--turn-tokens", "60", "12"]),
        (rollout, ["--providers", "ours", "genrate"]),
        (rollout, ["--providers", "autotool_no_graphs"]),
        (rollout, ["--hidden", "64", "--heads", "3"]),
        (rollout, ["--heads", "4", "--kv-heads", "3"]),
        (train_step, ["--providers", "generate"]),
        (rollout, ["--prompts", "0"]),
        (rollout, ["--sped"]),
        (train_step, ["--tokens", "2"]),
        (train_step, ["--group", "1"]),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(script, options, capsys):
    assert script.main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_options_know_the_contestants(setting):
    found: list[str] = []
    contestants(setting, found.append)
    assert tuple(found) == rollout.CONTESTANTS
    found.clear()
    train_contestants.contestants(train_contestants.Batch(1, 2, 3), SHAPE, CPU, torch.float32, found.append)
    assert tuple(found) == train_step.CONTESTANTS
    assert rollout.SHORTEST_TURN == episodes.CALL_TOKENS + 1


@pytest.mark.parametrize("script", [rollout, train_step, scaling])
def test_results_that_cannot_be_written_are_noticed_before_anything_is_measured(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "ceilings", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert script.main(["--quick", "--out", str(tmp_path / "file" / "x.json")]) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert error.count("\n") == 1


def test_options_are_read_without_torch():
    code = "import sys, benchmarks.rollout as r, benchmarks.train_step as t; t.parser()\n"
    code += "assert r.main(['--providers', 'none']) == r.main(['--turn-tokens', '9', '8']) == 2\n"
    code += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_make_bench_runs_both():
    assert {"rollout", "train_step"} <= {name for name, *_ in run_all.SCRIPTS}


def test_a_trainer_of_trl_gets_the_prompts_of_ours(tmp_path):
    pytest.importorskip("trl")
    model = episodes.make_model(SHAPE, CPU)
    trainer = rollout_contestants.trl_trainer(model, str(tmp_path), 2, 2, tools=[episodes.look_up])
    ids, *_ = trainer._tokenize_prompts([episodes.question(0)])
    chat = episodes.make_chat()
    assert list(ids[0]) == chat.encode_prompt(episodes.question(0), [episodes.tool_schema()])
