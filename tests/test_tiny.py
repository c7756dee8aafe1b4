"""The tiny tokenizer and model: exact text, and ordinary Hugging Face objects on disk."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autotool_fast.chat import ChatFormat, ToolCall, parse_reply, render_reply
from autotool_fast.config import ModelConfig
from autotool_fast.tasks.rendering import compact_fragments, solution
from autotool_fast.tasks.tiny import SPECIAL, build_model, build_tokenizer
from autotool_fast.tasks.world import TOOLS, World

torch.set_num_threads(1)
SMALL = ModelConfig(layers=1, hidden=32, heads=4, kv_heads=2, intermediate=48, max_positions=128)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def conversations(split: str, per_cell: int):
    """Whole conversations of perfect solvers in both modes, as text."""
    chat = ChatFormat(build_tokenizer())
    for task in World().grid(per_cell, split, "tiny"):
        for think in (False, True):
            messages, episode = list(task.messages), task.episode()
            for reply in solution(task, think=think):
                messages.append({"role": "assistant", "content": reply})
                messages += episode.step(parse_reply(reply)) or []
            yield chat.render(messages, list(task.tools), generate=False)


@pytest.mark.parametrize("split", ["train", "test"])
def test_conversations_come_back_from_their_ids_without_unknown_tokens(tokenizer, split):
    for text in conversations(split, 6):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_whatever_a_tool_answers_has_tokens(tokenizer):
    """A wrong call inside a chain is answered too; its answer must not read as unknown."""
    chat = ChatFormat(tokenizer)
    calls = [
        *(ToolCall("read", {"key": key}) for key in "ah"),
        *(ToolCall("set", {"item": "fan", "value": value}) for value in (1, 99)),
        *(ToolCall("goto", {"place": place}) for place in "az"),
        *(ToolCall("pick", {"cup1": cup, "cup2": 2}) for cup in (1, 9)),
        *(ToolCall("submit", {"value": value}) for value in (1, "x")),
        ToolCall("unheard", {}),
    ]
    for i in range(4):
        for call in calls:
            task = World().task("chain", 3, "train", str(i))
            messages = task.episode().step(parse_reply(render_reply(None, (call,))))
            if messages:
                assert tokenizer.unk_token_id not in chat.encode_continuation(messages), (call, messages)


def test_every_fragment_is_one_token_and_ids_are_distinct(tokenizer):
    ids = [tokenizer.encode(piece, add_special_tokens=False) for piece in [*SPECIAL, *compact_fragments()]]
    assert all(len(i) == 1 for i in ids)
    assert sorted({i for (i,) in ids}) == list(range(len(tokenizer)))
    assert len(tokenizer) <= 128


def test_every_tool_can_be_called(tokenizer):
    arguments = {
        "set": {"item": "bell", "value": 9},
        "goto": {"place": "h"},
        "submit": {"value": 0},
        "pick": {"cup1": 5, "cup2": 1},
        "read": {"key": "a"},
    }
    for name in TOOLS:
        text = render_reply(None, (ToolCall(name, arguments[name]),))
        assert tokenizer.unk_token_id not in tokenizer.encode(text), text


def test_text_outside_the_world_is_unknown_and_does_not_raise(tokenizer):
    assert tokenizer.unk_token_id in tokenizer.encode("zebra")


def test_the_tokenizer_survives_the_disk_with_its_template(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token, loaded.pad_token, loaded.unk_token) == ("<|im_end|>", "<|endoftext|>", "<unk>")
    before, after = ChatFormat(tokenizer), ChatFormat(loaded)
    assert before.stop_ids == after.stop_ids
    task = World().task("chain", 2, "test", "disk")
    ids = before.encode_prompt(list(task.messages), list(task.tools))
    assert after.encode_prompt(list(task.messages), list(task.tools)) == ids
    assert after.decode(ids) == before.decode(ids)
    for text in conversations("test", 1):
        assert loaded.encode(text) == tokenizer.encode(text)


def test_the_model_survives_the_disk_and_generates(tokenizer, tmp_path):
    model = build_model(SMALL, tokenizer, 3).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode("map a>b from a hop 2")])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        out = loaded.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(out, model.generate(ids, max_new_tokens=4, do_sample=False))
    assert loaded.config.eos_token_id == tokenizer.eos_token_id
    assert loaded.config.pad_token_id == tokenizer.pad_token_id
    assert next(tmp_path.glob("*.safetensors"))


def test_the_configuration_predicts_the_number_of_parameters(tokenizer):
    for config in (SMALL, ModelConfig()):
        model = build_model(config, tokenizer, 0)
        assert sum(p.numel() for p in model.parameters()) == config.parameters(len(tokenizer))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_seed_decides_the_weights(tokenizer):
    a, b, c = (dict(build_model(SMALL, tokenizer, seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])


def test_query_and_key_norms_start_at_the_configured_gain(tokenizer):
    model = build_model(SMALL, tokenizer, 0)
    gains = [p for name, p in model.named_parameters() if "_norm.weight" in name and "self_attn" in name]
    assert len(gains) == 2 * SMALL.layers
    assert all((gain == SMALL.qk_norm_init).all() for gain in gains)


def test_drawing_tasks_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from autotool_fast.tasks.world import World; World().task('hop', 2, 'train', '0');"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
