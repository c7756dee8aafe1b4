"""Chat formats: recognised by their templates, continued by appending, whatever the template does to old turns."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import get_type_hints

import pytest
from chat_models import TEMPLATES, make_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from autotool_fast.chat import (
    FORMATS,
    MODE_INSTRUCTION,
    ChatFormat,
    ToolCall,
    chat_format,
    chat_template,
    find_format,
    parse_reply,
    recognise,
)
from autotool_fast.config import ModelConfig
from autotool_fast.errors import UserError
from autotool_fast.tasks.tiny import build_tokenizer

NAMES = list(TEMPLATES)
USER = {"role": "user", "content": "How warm is pool 3?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "pool_temp",
        "description": "Water temperature.",
        "parameters": {"type": "object", "properties": {"pool_id": {"type": "integer"}}, "required": ["pool_id"]},
    },
}
CALL = ToolCall("pool_temp", {"pool_id": 3})
RESULT = {"role": "tool", "content": '{"t": 26}'}


@pytest.fixture(params=[*NAMES, "qwen", "hermes shipped", "llama3.1 shipped"])
def chat(request):
    name = request.param
    own = TEMPLATES.get(name)
    return chat_format(make_tokenizer(own or chat_template(name.removesuffix(" shipped"))))


# Which format a model has


@pytest.mark.parametrize("name", NAMES)
def test_a_template_is_recognised_by_what_it_writes(name):
    assert recognise(make_tokenizer(TEMPLATES[name])) == name
    assert find_format(make_tokenizer(TEMPLATES[name])) is FORMATS[name]


@pytest.mark.parametrize(
    ("template", "name"),
    [("qwen", "qwen2.5"), ("hermes", "hermes"), ("llama3.1", "llama3.1"), ("compact", "compact")],
)
def test_shipped_templates_are_recognised(template, name):
    assert recognise(make_tokenizer(chat_template(template))) == name


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_a_template_gets_the_shipped_one_of_the_named_format(name):
    tokenizer = make_tokenizer(None)
    chat = chat_format(tokenizer, name)
    assert tokenizer.chat_template == chat_template(FORMATS[name].template)
    assert chat.wire.name == name


@pytest.mark.parametrize(
    ("template", "name", "complaint"),
    [
        (None, "auto", r"no chat template; name a format with --chat-format \(qwen2.5, .*llama3.1\)"),
        ("{{ messages[0].content }}", "auto", "no known format; name a format with --chat-format"),
        (TEMPLATES["qwen3"].replace('"arguments"', "'").replace("\\\"arguments\\\"", ""), "auto", "no known format"),
        (None, "qwen25", "no chat format 'qwen25'; did you mean 'qwen2.5'"),
    ],
)
def test_an_unknown_format_is_one_line_with_the_remedy(template, name, complaint):
    with pytest.raises(UserError, match=complaint) as raised:
        chat_format(make_tokenizer(template), name)
    assert "\n" not in str(raised.value)


def test_advice_names_the_callers_own_option_and_no_format_that_it_lacks():
    tokenizer = make_tokenizer(None)
    with pytest.raises(UserError) as caught:
        chat_format(tokenizer, option="--model.chat-format")
    assert caught.value.remedy.startswith("name a format with --model.chat-format (")
    offered = caught.value.remedy.partition("(")[2].rstrip(")").split(", ")
    assert {"auto", *offered} == set(get_type_hints(ModelConfig)["chat_format"].__args__)
    with pytest.raises(UserError) as caught:
        chat_format(tokenizer, where="label.teacher (x)", option=None)
    assert caught.value.where == "label.teacher (x)"
    assert "name a format" not in caught.value.remedy


def test_a_model_without_a_tokenizer_is_told_from_one_without_a_template():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<|endoftext|>")
    for name in ("auto", "qwen2.5"):
        with pytest.raises(UserError, match=r"there is no tokenizer in the model's folder; copy tokenizer\.json"):
            chat_format(tokenizer, name)


def test_a_missing_stop_token_is_named():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"stop text '<\|eot_id\|>' is \d+ tokens, not one; use the format"):
        chat_format(tokenizer, "llama3.1")


def test_mode_tags_may_be_several_tokens_but_not_in_the_compact_format():
    chat = chat_format(make_tokenizer(TEMPLATES["qwen2.5"]))
    assert len(chat.encode_mode("no_think")) > 1
    with pytest.raises(UserError, match=r"splits the mode tag \[think\] into \d tokens, the format compact needs one"):
        chat_format(make_tokenizer(None), "compact")
    assert len(chat_format(build_tokenizer()).encode_mode("think")) == 1


def test_a_tokenizer_that_joins_the_tag_with_what_follows_is_refused():
    tokenizer = make_tokenizer(TEMPLATES["qwen2.5"], tags=("k]\n{",))
    with pytest.raises(UserError, match="joins the mode tag"):
        chat_format(tokenizer)


def test_the_stop_tokens_are_the_formats():
    tokenizer = make_tokenizer(TEMPLATES["llama3.1"])
    chat = chat_format(tokenizer)
    assert chat.stop_ids == set(tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|eom_id|>"]))
    assert chat.decode([chat.stop_id]) == chat.stop == "<|eot_id|>"


# What a prompt says


def test_a_prompt_shows_the_tools_and_the_modes(chat):
    text = chat.decode(chat.encode_prompt([USER], [TOOL]))
    assert USER["content"] in text
    assert text.count(MODE_INSTRUCTION) == 1
    squeezed = text.replace("\n", "").replace(" ", "")
    assert json.dumps(TOOL).replace(" ", "") in squeezed
    assert text.endswith(("<|im_start|>assistant\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"))


def test_the_instruction_joins_the_users_own_system_message(chat):
    text = chat.render([{"role": "system", "content": "Be brief."}, USER], [TOOL])
    assert text.index("Be brief.") < text.index(MODE_INSTRUCTION)
    assert text.count(MODE_INSTRUCTION) == 1


def test_no_prompt_depends_on_the_day():
    text = chat_format(make_tokenizer(TEMPLATES["llama3.1"])).render([USER], [TOOL])
    assert "Today: 26 Jul 2024\n" in text


def test_exactly_one_beginning_of_text():
    chat = chat_format(make_tokenizer(TEMPLATES["llama3.1"]))
    ids = chat.encode_prompt([USER], [TOOL])
    assert chat.decode(ids).count("<|begin_of_text|>") == 1
    assert "<|begin_of_text|>" not in chat.decode(chat.encode_continuation([RESULT]))


# Appending


RESULTS = {
    "qwen2.5": "\n<|im_start|>user\n<tool_response>\n{A}\n</tool_response>\n<tool_response>\n{B}\n</tool_response>"
    "<|im_end|>\n<|im_start|>assistant\n",
    "hermes": "\n<|im_start|>tool\n<tool_response>\n{A}\n</tool_response>\n<tool_response>\n{B}\n</tool_response>"
    "<|im_end|>\n<|im_start|>assistant\n",
    "llama3.1": '<|start_header_id|>ipython<|end_header_id|>\n\n"{A}"<|eot_id|>'
    '<|start_header_id|>ipython<|end_header_id|>\n\n"{B}"<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
RESULTS["qwen3"] = RESULTS["qwen2.5"]


@pytest.mark.parametrize("name", NAMES)
def test_results_look_as_the_family_writes_them(name):
    chat = chat_format(make_tokenizer(TEMPLATES[name]))
    ids = chat.encode_continuation([{"role": "tool", "content": "26"}, {"role": "tool", "content": "27"}])
    assert chat.decode(ids) == RESULTS[name].replace("{A}", "26").replace("{B}", "27")


def play(chat: ChatFormat, turns: list[tuple[str, list[dict]]]) -> list[int]:
    """Ids of a rollout: the prompt, then replies as they are with what follows each."""
    ids = chat.encode_prompt([USER], [TOOL])
    for reply, messages in turns:
        ids += [*chat.encode_text(reply), chat.stop_id, *chat.encode_continuation(messages)]
    return ids


def test_a_conversation_grows_by_appending_only(chat):
    think = chat.write_reply("Look it up.", [CALL])
    turns = [
        (think, [RESULT]),
        (chat.write_reply(None, [CALL]), [RESULT] if chat.wire.syntax == "bare" else [RESULT, RESULT]),
        (chat.write_reply(None, text="26 C."), [{"role": "user", "content": "And pool 4?"}]),
        (chat.write_reply("Another one.", [CALL]), [RESULT]),
    ]
    for count in range(len(turns)):
        shorter, longer = play(chat, turns[:count]), play(chat, turns[: count + 1])
        assert longer[: len(shorter)] == shorter
    text = chat.decode(longer)
    for reply, messages in turns:
        assert reply in text  # thinking of earlier turns included
        assert all(message["content"].strip('"') in text.replace('\\"', '"') for message in messages)


def test_a_prompt_with_history_is_what_a_rollout_would_have_left(chat):
    thinking = chat.write_reply("Look it up.", [CALL])
    call = {"type": "function", "function": {"name": CALL.name, "arguments": CALL.arguments}}
    follow_up = {"role": "user", "content": "And pool 4?"}
    turns = [(thinking, [RESULT]), (chat.write_reply(None, text="26 C."), [follow_up])]
    for first in (
        {"role": "assistant", "content": thinking},
        {"role": "assistant", "reasoning_content": "Look it up.", "content": None, "tool_calls": [call]},
        {"role": "assistant", "reasoning_content": "Look it up.", "content": "", "tool_calls": [call["function"]]},
    ):
        history = [USER, first, RESULT, {"role": "assistant", "content": "26 C."}, follow_up]
        assert chat.encode_prompt(history, [TOOL]) == play(chat, turns)


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1"])
def test_appended_ids_are_the_templates_own_where_it_appends(name):
    chat = chat_format(make_tokenizer(TEMPLATES[name]))
    reply = chat.write_reply(None, [CALL])
    messages = [USER, {"role": "assistant", "content": reply}, RESULT]
    assert play(chat, [(reply, [RESULT])]) == chat.encode_text(chat.render(messages, [TOOL]))


def test_calls_of_a_template_are_the_calls_of_our_replies():
    call = {"type": "function", "function": {"name": CALL.name, "arguments": CALL.arguments}}
    for name in NAMES:
        chat = chat_format(make_tokenizer(TEMPLATES[name]))
        text = chat.render([USER, {"role": "assistant", "content": "", "tool_calls": [call]}, RESULT], [TOOL])
        assert chat.write_reply(None, [CALL]).removeprefix("[no_think]\n") in text


def test_old_thoughts_that_the_template_drops_stay_in_the_ids():
    chat = chat_format(make_tokenizer(TEMPLATES["qwen3"]))
    reply = chat.write_reply("secret plan", text="Done.")
    follow_up = {"role": "user", "content": "Next."}
    messages = [USER, {"role": "assistant", "content": reply}, follow_up]
    assert "secret plan" not in chat.render(messages, [TOOL])
    assert "secret plan" in chat.decode(chat.encode_prompt(messages, [TOOL]))


def test_a_call_in_the_history_that_is_no_call_is_one_line():
    chat = chat_format(make_tokenizer(TEMPLATES["qwen2.5"]))
    for call in ({"name": "f"}, {"name": "f", "arguments": "{"}, {"name": "f", "arguments": "[]"}, 3):
        with pytest.raises(UserError, match="tool call of an assistant message"):
            chat.encode_prompt([USER, {"role": "assistant", "tool_calls": [call]}, RESULT], [TOOL])


def test_llama_cannot_write_two_calls_in_one_reply():
    chat = chat_format(make_tokenizer(TEMPLATES["llama3.1"]))
    for calls, text in (((CALL, CALL), ""), ((CALL,), "First:"), ((), '{"a": 1}')):
        with pytest.raises(UserError, match="takes one call, or plain text"):
            chat.write_reply(None, calls, text)


# Templates that cannot be appended to

Q = TEMPLATES["qwen2.5"]
COUNT = "messages | length | string"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (Q.replace("'House rules.'", COUNT), "rewrites earlier turns"),
        (Q.replace("'\n</tool_response>'", COUNT), "rewrites earlier turns"),
        (Q.replace("user'", "user' + messages[0].role"), "rewrites earlier turns"),
        (Q.replace("assistant\n' }}{%- endif", "assistant\n<think>\n' }}{%- endif"), "opens a think block"),
        (Q.replace("{%- if add_generation_prompt %}", "{%- if false %}"), "writes no header"),
        (Q.replace("(tool | tojson)", "'a tool'"), "does not show the tools"),
        (Q.replace("+ message.content", "").replace("(call.function.arguments | tojson)", "'{'"), "leaves out"),
        (Q + "{{ undefined_function() }}", "template fails: 'undefined_function' is undefined"),
    ],
    ids=["length", "results", "system", "think block", "header", "tools", "words", "fails"],
)
def test_a_template_that_cannot_be_continued_is_one_line_with_the_remedy(template, complaint):
    with pytest.raises(UserError, match=complaint) as raised:
        ChatFormat(make_tokenizer(template))
    assert "\n" not in str(raised.value)
    assert "use" in raised.value.remedy


def trl_templates() -> Path | None:
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else None
    return folder if folder and folder.is_dir() else None


@pytest.mark.skipif(trl_templates() is None, reason="the families' own templates come with trl, which is not installed")
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("qwen2_5", "qwen2.5"),
        ("qwen2_5_training", "qwen2.5"),
        ("qwen3", "qwen3"),
        ("qwen3_training", "qwen3"),
        ("qwen3_instruct_2507", "qwen3"),
        ("llama3_1", "llama3.1"),
        ("llama3_2", "llama3.1"),
    ],
)
def test_the_families_own_templates_are_recognised_and_continued(file, name):
    tokenizer = make_tokenizer((trl_templates() / f"{file}.jinja").read_text(encoding="utf-8"))
    assert recognise(tokenizer) == name
    chat = chat_format(tokenizer)
    expected = RESULTS[name].replace("{A}", "26").replace("{B}", "27")
    messages = [{"role": "tool", "content": "26"}, {"role": "tool", "content": "27"}]
    assert chat.decode(chat.encode_continuation(messages)) == expected
    reply = chat.write_reply("Look it up.", [CALL])
    ids = chat.encode_prompt([USER, {"role": "assistant", "content": reply}, RESULT], [TOOL])
    assert reply in chat.decode(ids)
    assert chat.parse(reply).calls == (CALL,)
    assert (name == "llama3.1") == (parse_reply(reply).calls == ())


@pytest.mark.skipif(trl_templates() is None, reason="the families' own templates come with trl, which is not installed")
@pytest.mark.parametrize("file", ["qwen3_5_think", "qwen3_8", "gemma3", "qwen2_5_vl"])
def test_other_templates_are_not_mistaken_for_known_ones(file):
    template = (trl_templates() / f"{file}.jinja").read_text(encoding="utf-8")
    assert recognise(make_tokenizer(template)) is None
    with pytest.raises(UserError):
        chat_format(make_tokenizer(template), "qwen3")
