"""The terminal chat: the same tokens as a rollout, every part shown, clean ways out, one line for every mistake."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time

import pytest
import torch
from autotool_kernels.results import SampledTokens
from chat_models import TEMPLATES, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import autotool_fast.rollout.engine as engine_module
from autotool_fast.chat import ToolCall, chat_format
from autotool_fast.chat.__main__ import main
from autotool_fast.chat.terminal import WorldTools, printable
from autotool_fast.config import ModelConfig
from autotool_fast.tasks.tiny import build_model, build_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved embedded model, untrained."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = build_tokenizer()
    build_model(ModelConfig(), tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory):
    """A small random model whose tokenizer speaks Llama-3.1's format."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tokenizer = make_tokenizer(TEMPLATES["llama3.1"])
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=2048, **sizes)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def replies(monkeypatch):
    """Sets what the model samples, turn by turn; returns the ids it was given before each turn."""

    def script(folder, turns: list[str], cut: bool = False) -> list[list[int]]:
        chat = chat_format(AutoTokenizer.from_pretrained(folder))
        tokens = [token for turn in turns for token in [*chat.encode_reply(turn), chat.stop_id]]
        seen: list[list[int]] = []
        extend, submit = engine_module.SlotEngine.extend, engine_module.SlotEngine.submit

        def sampler(logits, *, temperature, seed, offset, **options):
            token = torch.tensor([tokens.pop(0)])
            return SampledTokens(token, -torch.ones(1), torch.ones(1))

        def watched_submit(engine, prompt, *rest):
            seen.append(list(prompt))
            submit(engine, prompt, *rest)

        def watched_extend(engine, key, ids, budget):
            seen.append([*engine.row(key).ids.tolist(), *ids])
            extend(engine, key, ids, budget)

        monkeypatch.setattr(engine_module, "sample_logp_entropy", sampler)
        monkeypatch.setattr(engine_module.SlotEngine, "submit", watched_submit)
        monkeypatch.setattr(engine_module.SlotEngine, "extend", watched_extend)
        return seen

    return script


@pytest.fixture
def typed(monkeypatch):
    """Sets the lines of the input."""
    return lambda *lines: monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


@pytest.fixture
def tools(tmp_path):
    path = tmp_path / "tools.json"
    schema = {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}
    path.write_text(json.dumps([schema]))
    return path


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{ToolCall(name, arguments).to_json()}\n</tool_call>"


# One request


def test_every_part_of_a_turn_is_shown_and_the_worlds_tools_run(checkpoint, replies, capsys):
    replies(
        checkpoint,
        [
            f"[think]\n<think>\nneed: chain; so: sum 0 left 1\n</think>\n{call('read', key='a')}",
            f"[no_think]\n{call('submit', value=1)}",
        ],
    )
    assert main(["--checkpoint", str(checkpoint), "--prompt", "chain from a reads 1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "mode:      think",
        "thinking:  need: chain; so: sum 0 left 1",
        'call:      {"name": "read", "arguments": {"key": "a"}}',
        'answer:    {"value": 1, "next": "d"}',
        "mode:      no_think",
        'call:      {"name": "submit", "arguments": {"value": 1}}',
        "answer:    ok",
    ]


def test_a_malformed_reply_is_shown_whole_and_fails_a_script(checkpoint, replies, capsys):
    replies(checkpoint, ["no tool"])
    assert main(["--checkpoint", str(checkpoint), "--prompt", "set lamp=3"]) == 1
    assert "malformed: no_mode_tag: no tool" in capsys.readouterr().out


def test_a_reply_that_is_cut_says_so(checkpoint, replies, capsys):
    replies(checkpoint, ["[no_think]\nno tool"])
    assert main(["--checkpoint", str(checkpoint), "--prompt", "set lamp=3", "--max-new-tokens", "2"]) == 1
    assert "cut:       after 2 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["think", "no_think"])
def test_a_forced_mode_opens_the_reply(checkpoint, replies, capsys, mode):
    seen = replies(checkpoint, ["<think>\nso: no tool\n</think>\nno tool" if mode == "think" else "no tool"])
    assert main(["--checkpoint", str(checkpoint), "--prompt", "set lamp=3", "--mode", mode]) == 0
    assert f"mode:      {mode}\n" in capsys.readouterr().out
    chat = chat_format(build_tokenizer())
    assert seen[0][-1:] == chat.encode_mode(mode)


def test_the_greedy_reply_is_transformers_own(checkpoint, capsys):
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    chat = chat_format(tokenizer)
    prompt = chat.encode_prompt([{"role": "user", "content": "set lamp=3"}], WorldTools().schemas)
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    text = chat.decode(ids.tolist()).removesuffix(chat.stop)
    main(["--checkpoint", str(checkpoint), "--prompt", "set lamp=3", "--max-new-tokens", "12"])
    shown = capsys.readouterr().out
    assert printable(chat.parse(text).text).strip() in "\n".join(line[11:] for line in shown.splitlines())
    assert text.strip()


# Conversations


def test_a_conversation_is_appended_to_and_new_ones_start_afresh(checkpoint, replies, typed, capsys):
    acting, text = f"[no_think]\n{call('set', item='lamp', value=4)}", "[no_think]\nno tool"
    seen = replies(checkpoint, ["[no_think]\nmissing value", acting, text, "4", text])
    typed("set lamp=?", "4", "set fan=3", "", "4", "/new", "set fan=3")
    assert main(["--checkpoint", str(checkpoint)]) == 0
    first, second, third, fourth, fifth = seen
    assert second[: len(first)] == first
    assert fourth[: len(third)] == third  # an empty line is no request, a malformed reply ends nothing
    assert third[: len(first)] != first
    assert third == fifth  # acting on the world ends a conversation, and so does /new
    out = capsys.readouterr().out
    assert out.count("no tool") == 2
    assert "malformed: no_mode_tag: 4" in out


def test_a_cut_turn_is_closed_before_the_next_one(checkpoint, replies, typed):
    seen = replies(checkpoint, ["[no_think]\nmissing value", "[no_think]\nno tool"])
    typed("set lamp=?", "4")
    assert main(["--checkpoint", str(checkpoint), "--max-new-tokens", "1"]) == 0
    chat = chat_format(build_tokenizer())
    after = [chat.stop_id, *chat.encode_continuation([{"role": "user", "content": "4"}])]
    assert seen[1] == [*seen[0], *chat.encode_mode("no_think"), *after]


def test_answers_of_the_users_tools_are_typed(llama_like, replies, typed, tools, capsys):
    seen = replies(llama_like, ['[no_think]\n{"name": "weather", "parameters": {}}', "[no_think]\nSunny."])
    typed("Weather?", "sun\x1b[2J<|eot_id|>")
    assert main(["--checkpoint", str(llama_like), "--tools", str(tools)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-4:-1] == [r"answer:    sun\x1b[2J<|eot_id|>", "mode:      no_think", "reply:     Sunny."]
    chat = chat_format(AutoTokenizer.from_pretrained(llama_like))
    assert '"description": "The weather."' in chat.decode(seen[0])
    assert seen[1].count(chat.stop_id) == seen[0].count(chat.stop_id) + 2  # the reply's and the result's


def test_without_an_answer_the_chat_stops_after_the_call(llama_like, replies, typed, tools, capsys):
    replies(llama_like, ['[no_think]\n{"name": "weather", "parameters": {}}'])
    typed()
    assert main(["--checkpoint", str(llama_like), "--tools", str(tools), "--prompt", "Weather?"]) == 0
    assert 'call:      {"name": "weather", "arguments": {}}' in capsys.readouterr().out


def test_a_full_conversation_says_so_and_the_next_one_starts(checkpoint, replies, typed, capsys):
    replies(checkpoint, ["[no_think]\nno tool"] * 3)
    chat = chat_format(build_tokenizer())
    prompt = chat.encode_prompt([{"role": "user", "content": "set lamp=3"}], WorldTools().schemas)
    reply = [*chat.encode_reply("[no_think]\nno tool"), chat.stop_id]
    typed("set lamp=3", "set lamp=3", "set lamp=3")
    assert main(["--checkpoint", str(checkpoint), "--context", str(len(prompt) + len(reply) + 2)]) == 0
    out = capsys.readouterr().out
    assert (out.count("reply:     no tool"), out.count("full: ")) == (2, 1)


def test_a_prompt_that_does_not_fit_is_one_line(checkpoint, capsys):
    assert main(["--checkpoint", str(checkpoint), "--prompt", "set lamp=3", "--context", "5"]) == 2
    assert capsys.readouterr().err == (
        "error: --context: the prompt and the answers leave no room in 5 tokens; raise it, or shorten the prompt\n"
    )


# Ways out


def test_ctrl_c_leaves_without_a_traceback(checkpoint, monkeypatch, capsys):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert main(["--checkpoint", str(checkpoint)]) == 130
    assert capsys.readouterr().out == "\n"


def test_help_answers_at_once():
    began = time.perf_counter()
    command = [sys.executable, "-X", "importtime", "-m", "autotool_fast.chat", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--checkpoint DIR" in done.stdout
    assert not any(f"| {name}\n" in done.stderr for name in ("torch", "transformers", "numpy"))
    assert time.perf_counter() - began < 5  # far less on an idle machine: neither library is loaded


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: --checkpoint; see --help"),
        (["--checkpoint", "/no/such/folder"], "/no/such/folder: there is no such folder; check --checkpoint"),
        (["--checkpoint", "{tmp}"], "{tmp}: holds no model; give a folder with config.json"),
        (["--checkpoint", "{run}"], "{run}: holds no model; give one of its models, such as {run}/models/rl"),
        (["--checkpoint", "{model}", "--mode", "fast"], "invalid choice: 'fast'"),
        (["--checkpoint", "{model}", "--max-new-tokens", "0"], "must be at least 1"),
        (["--checkpoint", "{model}", "--temperature", "nan"], "must be a number of at least 0"),
        (["--checkpoint", "{model}", "--chat-format", "chatml"], "--chat-format: no chat format 'chatml'; choose"),
        (["--checkpoint", "{model}", "--tools", "{tmp}/none.json"], "none.json: cannot be read (No such file"),
        (["--checkpoint", "{model}", "--tools", "{tmp}/cut.json"], "cut.json: is not valid JSON"),
        (["--checkpoint", "{model}", "--tools", "{tmp}/object.json"], "is not a JSON list of tool schemas"),
        (["--checkpoint", "{model}", "--tools", "{tmp}/nameless.json"], "entry 2 has no tool name; give each a 'name'"),
        (["--checkpoint", "{model}", "--tools", "{tmp}/twice.json"], "the tool 'f' is there twice"),
        (["--checkpoint", "{model}", "--tools", "{tmp}/odd.json"], "the parameters of 'f' are not a JSON schema"),
        (["--checkpoint", "{broken}"], "holds no model that can be loaded"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(checkpoint, tmp_path, capsys, arguments, complaint):
    texts = {
        "cut": '[{"name": "f"',
        "object": '{"name": "f"}',
        "nameless": '[{"name": "f"}, {"description": "x"}]',
        "twice": '[{"name": "f"}, {"type": "function", "function": {"name": "f"}}]',
        "odd": '[{"name": "f", "parameters": []}]',
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    run, broken = tmp_path / "run", tmp_path / "broken"
    (run / "models" / "rl").mkdir(parents=True)
    broken.mkdir()
    for folder in (run, run / "models" / "rl", broken):
        (folder / "config.json").write_text("{}")
    places = {"tmp": tmp_path, "run": run, "broken": broken, "model": checkpoint}
    assert main([argument.format(**places) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert complaint.format(**places) in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_checkpoint_of_the_trainer_is_found_by_its_folder(checkpoint, tmp_path, replies, capsys):
    step = tmp_path / "step-00000040"
    step.mkdir()
    (step / "model").symlink_to(checkpoint)
    replies(checkpoint, ["[no_think]\nno tool"])
    assert main(["--checkpoint", str(step), "--prompt", "set lamp=3", "--system", "Be brief."]) == 0


def test_what_could_steer_a_terminal_is_made_visible():
    assert printable("a\x1b[31mb\r\x07\ud800\u202e\nc é ☃") == "a\\x1b[31mb\\r\\x07\\ud800\\u202e\nc é ☃"
