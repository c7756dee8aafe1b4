"""A checkpoint as a policy: whole episodes in the local engine, figures as the training-time evaluation has them."""

import json
import os
import shutil

import pytest
from eval_stand_ins import STAND_INS, CharacterChat, ScriptedEngine, reply_text
from transformers import AutoModelForCausalLM, Qwen3Config

from autotool_fast.chat import FORMATS, ChatFormat
from autotool_fast.checkpoint import no_progress_bars
from autotool_fast.config import ModelConfig
from autotool_fast.errors import UserError
from autotool_fast.eval.__main__ import main
from autotool_fast.eval.acebench import AceBench
from autotool_fast.eval.apibank import ApiBank
from autotool_fast.eval.bfcl import Bfcl
from autotool_fast.eval.embedded import Embedded
from autotool_fast.eval.engine_policy import EngineSettings, LocalEngine, content_hash, most_positions
from autotool_fast.eval.harness import run
from autotool_fast.evaluate import cell_weights, evaluate
from autotool_fast.rollout.driver import RolloutLimits
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.tasks.tiny import build_model, build_tokenizer
from autotool_fast.tasks.world import World

FAMILIES = ("set", "missing")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    config = ModelConfig(layers=1, hidden=16, heads=2, kv_heads=2, intermediate=16, max_positions=90_000)
    with no_progress_bars():
        build_model(config, tokenizer, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def policy(checkpoint, **settings):
    small = {"slots": 4, "max_len": 96, "max_turn_tokens": 8, "max_new_tokens": 16}
    return LocalEngine(EngineSettings(checkpoint=str(checkpoint), **{**small, **settings}))


@pytest.mark.parametrize("mode", ["auto", "think", "no_think"])
def test_figures_are_those_of_the_training_time_evaluation(checkpoint, tmp_path, mode):
    benchmark = Embedded(FAMILIES, per_cell=3)
    rows = run(benchmark, policy(checkpoint), tmp_path, modes=(mode,))
    tokenizer = build_tokenizer()
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
    seen = []
    evaluate(
        SlotEngine(model, slots=4, max_len=96),
        ChatFormat(tokenizer),
        benchmark.tasks(),
        cell_weights(World(FAMILIES), 0.5),
        limits=RolloutLimits(max_turns=256, max_calls=4096, max_new_tokens=16, max_turn_tokens=8, deadline_s=None),
        modes=(mode,),
        on_mode=lambda _, trajectories: seen.extend(trajectories),
    )
    assert len(rows) == len(seen) == 6
    for row, t in zip(rows, seen, strict=True):
        assert row["id"] == t.task.id
        assert row["output_tokens"] == t.n_response_tokens
        assert row["think_tokens"] == t.n_think_tokens
        assert row["prompt_tokens"] == t.n_prompt
        assert row["stop"] == t.stop_reason.value
        assert row["correct"] >= t.correct
    if mode != "auto":
        assert all(reply.startswith(f"[{mode}]\n") for row in rows for reply in row["replies"])


def test_the_configuration_names_what_replies_depend_on(checkpoint):
    config = policy(checkpoint).config()
    assert config["max_len"] == 96
    assert config != policy(checkpoint, temperature=1.0).config()


def test_a_model_trained_on_is_not_reported_with_the_old_ones_results(checkpoint, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    benchmark = Embedded(("set",), per_cell=1)
    run(benchmark, policy(model), tmp_path / "out")
    run(benchmark, policy(model), tmp_path / "out")  # the same model: the folder is continued
    weights = model / "model.safetensors"
    before, times = weights.read_bytes(), weights.stat()
    middle = len(before) // 2
    weights.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights.stat().st_size == times.st_size
    with pytest.raises(UserError, match="another configuration"):
        run(benchmark, policy(model), tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_results_depend_on_what_is_beside_the_weights(checkpoint, tmp_path, name):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    before = content_hash(model)
    assert before == content_hash(checkpoint)
    (model / name).write_text((model / name).read_text() + "\n")
    assert content_hash(model) != before


def test_more_tokens_than_the_model_takes_are_refused(checkpoint, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100}))
    with pytest.raises(UserError, match="101 is more than the model's 100 positions; give at most 100") as caught:
        policy(model, max_len=101)
    assert caught.value.where == "--max-len"
    for settings in ({"max_len": 100}, {"max_len": 0}, {"max_len": 101, "shorten": True}):
        assert policy(model, **settings).config()["max_len"] == 100


def test_positions_that_are_stretched_count():
    stretched = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    assert most_positions(Qwen3Config(max_position_embeddings=100, rope_parameters=stretched)) == 400
    assert most_positions(Qwen3Config(max_position_embeddings=400, rope_parameters=stretched)) == 400
    assert most_positions(Qwen3Config(max_position_embeddings=100)) == 100


def test_a_reply_that_was_cut_is_wrong_even_where_silence_is_right(checkpoint, tmp_path):
    made = policy(checkpoint, max_len=250, max_turn_tokens=2)
    rows = run(Embedded(("irrelevant",), per_cell=2), made, tmp_path)
    assert {(row["stop"], row["correct"], row["reason"]) for row in rows} == {
        ("max_turn_tokens", False, "max_turn_tokens")
    }


def test_a_prompt_without_room_for_a_reply_is_wrong_and_not_fatal(checkpoint, tmp_path):
    benchmark = Embedded((*FAMILIES, "irrelevant"), per_cell=2)
    rows = run(benchmark, policy(checkpoint, max_len=20, max_new_tokens=10), tmp_path)
    assert {row["stop"] for row in rows} == {"prompt_too_long"}
    assert {row["correct"] for row in rows} == {False}
    assert {row["output_tokens"] for row in rows} == {0}


def test_a_policy_that_could_not_reply_is_not_right_where_silence_is(checkpoint, tmp_path):
    benchmark = Bfcl(STAND_INS / "bfcl", ["irrelevance"])
    (row,) = run(benchmark, policy(checkpoint, max_len=20, max_new_tokens=10), tmp_path)
    benchmark.close()
    assert (row["correct"], row["reason"]) == (False, "prompt_too_long")


def test_histories_with_calls_reach_the_model(checkpoint, tmp_path):
    rows = run(ApiBank(STAND_INS / "apibank"), policy(checkpoint, max_len=900), tmp_path)
    assert len(rows) == 5
    assert all(row["output_tokens"] > 0 for row in rows)


BROKEN = "[no_think]\n<tool_call>\n{"


def scripted(checkpoint, *replies):
    """The policy with a model that writes `replies`."""
    made = policy(checkpoint, max_turn_tokens=1000, max_new_tokens=9000, max_len=90_000)
    made._engine, made._chat = ScriptedEngine([replies]), CharacterChat()
    made._chat.wire = FORMATS["qwen2.5"]
    return made


def test_a_dialogue_of_bfcl_goes_on_after_a_malformed_reply(checkpoint, tmp_path):
    hall, desk = reply_text(("switch", {"lamp": "hall"})), reply_text(("switch", {"lamp": "desk"}), ("look", {}))
    benchmark = Bfcl(STAND_INS / "bfcl", ["multi_turn_base"])
    (row,) = run(benchmark, scripted(checkpoint, hall, BROKEN, desk, reply_text(text="Done.")), tmp_path)
    benchmark.close()
    assert (row["correct"], row["malformed"], row["stop"], len(row["replies"])) == (True, True, "finished", 4)


def test_what_an_episode_did_before_it_was_cut_is_judged_on_its_simulators(checkpoint, tmp_path):
    on, note = reply_text(("turn_on", {})), reply_text(("add_note", {"text": "Ann's tea"}))
    benchmark = AceBench(STAND_INS / "acebench", ["agent_multi_step"])
    (row,) = run(benchmark, scripted(checkpoint, on, note, BROKEN), tmp_path, limit=1)
    benchmark.close()
    assert (row["correct"], row["malformed"], row["stop"]) == (True, True, "malformed")


def test_the_command_plays_a_checkpoint(checkpoint, tmp_path, capsys):
    argv = ["--benchmark", "world", "--categories", "set", "--limit", "2", "--policy", "engine"]
    argv += ["--checkpoint", str(checkpoint), "--max-len", "96", "--max-new-tokens", "16", "--out", str(tmp_path / "o")]
    assert main(argv) == 0
    assert "ACU" in capsys.readouterr().out


def test_a_folder_that_cannot_be_loaded_is_one_line(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        policy(tmp_path)
    assert caught.value.where == f"--checkpoint ({tmp_path})"
    assert "save_pretrained" in caught.value.remedy


def test_a_folder_without_a_tokenizer_says_so(checkpoint, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, tmp_path / name)
    for format_name in ("auto", "qwen3"):
        with pytest.raises(UserError, match="no tokenizer") as caught:
            policy(tmp_path, chat_format=format_name)
        assert "tokenizer.json" in caught.value.remedy
