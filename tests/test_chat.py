"""Replies as text: what the parser accepts and refuses, and that rendering only ever appends."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from autotool_fast.chat import ChatFormat, ToolCall, chat_template, parse_reply, render_reply
from autotool_fast.errors import UserError
from autotool_fast.tasks.rendering import solution
from autotool_fast.tasks.tiny import build_tokenizer
from autotool_fast.tasks.world import World

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def with_json(text: str) -> str:
    return f"[no_think]\n<tool_call>\n{text}\n</tool_call>"


# What a well-formed reply says


def test_a_thinking_reply_is_read_in_all_its_parts():
    reply = parse_reply(f"[think]\n<think>\nwhy not\n</think>\nHere:\n{CALL}")
    assert (reply.mode, reply.think.strip(), reply.text) == ("think", "why not", "Here:")
    assert reply.calls == (ToolCall("f", {"a": 1}),)
    assert reply.errors == ()
    assert reply.length_class == 0


def test_a_direct_reply_is_short():
    reply = parse_reply(f"[no_think]\n{CALL}")
    assert (reply.mode, reply.think, reply.text, reply.length_class) == ("no_think", None, "", 1)
    assert reply.calls == (ToolCall("f", {"a": 1}),)


def test_plain_text_is_a_reply_without_calls():
    reply = parse_reply("[no_think]\nWhich level?")
    assert (reply.calls, reply.text, reply.length_class) == ((), "Which level?", 1)


@pytest.mark.parametrize("space", ["", " ", "\n", "\t\r\n  "])
def test_white_space_is_free_around_tags_and_json(space):
    for text in (
        f"{space}[no_think]{space}<tool_call>{space}" + '{"name": "f", "arguments": {"a": 1}}' + f"{space}</tool_call>",
        f"{space}[think]{space}<think>x</think>{space}{CALL}{space}",
    ):
        reply = parse_reply(text)
        assert reply.errors == (), text
        assert reply.calls == (ToolCall("f", {"a": 1}),)


def test_text_before_between_and_after_calls_is_kept():
    reply = parse_reply(f"[no_think]\nfirst {CALL} second {CALL} third")
    assert len(reply.calls) == 2
    assert reply.text.split() == ["first", "second", "third"]


@pytest.mark.parametrize("block", ["<think></think>", "<think>\n \t\n</think>"])
@pytest.mark.parametrize("tag", ["think", "no_think"])
def test_an_empty_think_block_counts_as_short(tag, block):
    reply = parse_reply(f"[{tag}]\n{block}\n{CALL}")
    assert (reply.errors, reply.length_class, reply.mode) == ((), 1, tag)


@pytest.mark.parametrize("tag", ["</tool_call>", "<tool_call>", "<think>", "</think>", "[think]"])
def test_a_tag_inside_a_json_string_is_part_of_the_string(tag):
    call = ToolCall("f" + tag, {"x" + tag: [f"{tag} {{}}", {"y": tag}]})
    reply = parse_reply(render_reply(None, (call, call)))
    assert (reply.errors, reply.calls) == ((), (call, call))


def test_tags_inside_the_thinking_are_thought_only():
    reply = parse_reply(f"[think]\n<think>\nmaybe {CALL} or [no_think]\n</think>\n{CALL}")
    assert len(reply.calls) == 1
    assert CALL in reply.think


def test_key_order_is_free_and_names_need_not_be_identifiers():
    reply = parse_reply(with_json('{"arguments": {"class": 1, "a-b": 2, "c d": 3}, "name": "Pool Temperature/2?"}'))
    assert reply.calls == (ToolCall("Pool Temperature/2?", {"class": 1, "a-b": 2, "c d": 3}),)


def test_integers_and_floats_stay_what_was_written():
    (call,) = parse_reply(with_json('{"name": "f", "arguments": {"a": 3, "b": 3.0, "c": true}}')).calls
    assert [type(v) for v in call.arguments.values()] == [int, float, bool]


# What is malformed, and under which name

MALFORMED = [
    ("", "no_mode_tag"),
    ("hello", "no_mode_tag"),
    (CALL, "no_mode_tag"),
    (f"[Think]\n<think>x</think>{CALL}", "no_mode_tag"),
    (f"x [no_think]\n{CALL}", "no_mode_tag"),
    (f"<think>\nx\n</think>\n[think]\n{CALL}", "no_mode_tag"),
    (f"[think]\n{CALL}", "no_think_block"),
    (f"[think]\nhm <think>x</think>\n{CALL}", "no_think_block"),
    ("[think]", "no_think_block"),
    (f"[think]\n<think>\nx\n{CALL}", "unclosed_think"),
    ("[no_think]\n<think>", "unclosed_think"),
    (f"[no_think]\n<think>\nx\n</think>\n{CALL}", "think_in_no_think"),
    (f"[no_think]\n{CALL}</tool_call>", "stray_tag"),
    (f"[no_think]\n{CALL}<think>x</think>", "stray_tag"),
    (f"[think]\n<think>x</think>\n</think>{CALL}", "stray_tag"),
    (f"[no_think]\n[think]\n<think>x</think>{CALL}", "stray_tag"),
    ("[no_think]\n", "empty_reply"),
    ("[think]\n<think>\nx\n</think>\n", "empty_reply"),
    ("[no_think]\n<tool_call>", "bad_json"),
    (with_json(""), "bad_json"),
    (with_json("{'name': 'f', 'arguments': {}}"), "bad_json"),
    (with_json('{"name": "f", "arguments": {"a": 01}}'), "bad_json"),
    (with_json('{"name": "f", "arguments": {"a": 1,}}'), "bad_json"),
    (with_json('{"name": "f", "arguments": {"a": 1}'), "bad_json"),
    (with_json('{"name": "f", "arguments": {"a": "one\ntwo"}}'), "bad_json"),
    (with_json('{"name": "f", "arguments": {"a": "one\ttwo"}}'), "bad_json"),
    (with_json('{"name": "f", "arguments": {"a": "one\x00two"}}'), "bad_json"),
    (with_json('{"name": "f\x1f", "arguments": {}}'), "bad_json"),
    *((with_json(f'{{"name": "f", "arguments": {{"a": [{n}]}}}}'), "non_finite_number")
      for n in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400 + ".0")),
    (with_json('{"name": "f", "arguments": {"a": 1, "a": 1}}'), "duplicate_key"),
    (with_json('{"name": "f", "arguments": {"a": {"b": 1, "\\u0062": 2}}}'), "duplicate_key"),
    (with_json('{"name": "f", "name": "g", "arguments": {}}'), "duplicate_key"),
    ('[no_think]\n<tool_call>\n{"name": "f", "arguments": {}}', "unclosed_call"),
    ('[no_think]\n<tool_call>\n{"name": "f", "arguments": {}}\n', "unclosed_call"),
    (with_json('{"name": "f", "arguments": {}}\n{"name": "f", "arguments": {}}'), "trailing_text_in_call"),
    (with_json('{"name": "f", "arguments": {}},'), "trailing_text_in_call"),
    ('[no_think]\n<tool_call>\n{"name": "f", "arguments": {}}<tool_call>', "trailing_text_in_call"),
    (with_json('[{"name": "f", "arguments": {}}]'), "bad_call_shape"),
    (with_json('{"name": "f", "arguments": {}, "id": 1}'), "bad_call_shape"),
    (with_json('{"name": "f", "parameters": {}}'), "bad_call_shape"),
    *((with_json(json), "bad_call_shape") for json in ("null", "3", '"f"', "true", "[]")),
    (with_json("{}"), "bad_name"),
    (with_json('{"arguments": {}}'), "bad_name"),
    (with_json('{"name": "", "arguments": {}}'), "bad_name"),
    (with_json('{"name": 3, "arguments": {}}'), "bad_name"),
    (with_json('{"name": "f"}'), "bad_arguments"),
    (with_json('{"name": "f", "arguments": null}'), "bad_arguments"),
    (with_json('{"name": "f", "arguments": "{}"}'), "bad_arguments"),
    (with_json('{"name": "f", "arguments": [1]}'), "bad_arguments"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind"), MALFORMED)
def test_malformed_replies_are_named(text, kind):
    reply = parse_reply(text)
    assert reply.errors == (kind,)
    assert reply.length_class == -1


def test_every_documented_error_kind_has_an_example():
    documented = set(parse_reply.__doc__.split("Error kinds:")[1].replace(".", "").replace(",", "").split())
    assert documented == {kind for _, kind in MALFORMED}


def test_the_first_bad_call_ends_the_reading():
    reply = parse_reply(f"[no_think]\n{CALL}{with_json('null')[11:]}{CALL}")
    assert (reply.errors, len(reply.calls)) == (("bad_call_shape",), 1)


@pytest.mark.parametrize("bomb", ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000])
def test_nesting_and_numbers_beyond_the_interpreter_are_bad_json(bomb):
    assert parse_reply(with_json(f'{{"name": "f", "arguments": {{"a": {bomb}')).errors == ("bad_json",)


# Fuzzing

PIECES = st.sampled_from(
    [
        *("[think]", "[no_think]", "<think>", "</think>", "<tool_call>", "</tool_call>", "\n", " ", "NaN", "1e999"),
        *('{"name": "f", "arguments": {}}', '{"name": ', '"', "\\u", "\\", *"{}[]:,", '"a"', "\x00", "\ud800"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=20).map("".join))
def test_no_text_makes_the_parser_raise(text):
    for head in ("", "[no_think]\n", "[think]\n<think>x</think>"):
        reply = parse_reply(head + text)
        assert (reply.length_class == -1) == bool(reply.errors)
        assert all(isinstance(call.arguments, dict) and call.name for call in reply.calls)


ANY_TEXT = st.text(st.characters(codec=None), max_size=8)  # lone surrogates included: JSON can escape them
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.builds(ToolCall, ANY_TEXT.filter(bool), st.dictionaries(ANY_TEXT, JSON_VALUES, max_size=3))


def _no_pairs(text: str) -> bool:
    """JSON joins two surrogate halves that make up a pair, so only text without such a pair survives."""
    return json.loads(json.dumps(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(CALLS, max_size=3), st.none() | st.just("some thought"), st.sampled_from(["", "a word"]))
def test_what_is_rendered_is_read_back(calls, think, text):
    assume(all(_no_pairs(word) for call in calls for word in _strings([call.name, call.arguments])))
    rendered = render_reply(think, tuple(calls), text)
    rendered.encode()  # fit for a tokenizer and a file
    reply = parse_reply(rendered)
    if not calls and not text:
        assert reply.errors == ("empty_reply",)
        return
    assert reply.errors == ()
    assert [json.dumps(vars(call)) for call in reply.calls] == [json.dumps(vars(call)) for call in calls]
    assert (reply.think or "").strip() == (think or "")
    assert (reply.mode, reply.text) == ("no_think" if think is None else "think", text)


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


# Rendering to ids


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML tokens, trained on the natural rendering: a real model's tokenizer in small."""
    tasks = World(rendering="natural").grid(1, "train", "bpe")
    texts = [task.messages[0]["content"] for task in tasks]
    texts += [reply for task in tasks for reply in solution(task, think=True)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = chat_template("qwen")
    return fast


@pytest.fixture(scope="module", params=["compact", "natural"])
def setting(request):
    compact = request.param == "compact"
    return World(rendering=request.param), ChatFormat(build_tokenizer() if compact else bpe_tokenizer())


@pytest.mark.parametrize("think", [False, True])
def test_appended_ids_equal_the_encoding_of_the_whole_conversation(setting, think):
    world, chat = setting
    for task in world.grid(1, "test", "append"):
        messages, tools = list(task.messages), list(task.tools)
        ids = chat.encode_prompt(messages, tools)
        episode = task.episode()
        for reply in solution(task, think=think):
            ids += [*chat.encode_text(reply), *chat.stop_ids]
            messages.append({"role": "assistant", "content": reply})
            answer = episode.step(parse_reply(reply))
            if answer is None:
                break
            messages += answer
            ids += chat.encode_continuation(answer)
            whole = chat.render(messages, tools)
            assert ids == chat.encode_text(whole), task.id
            assert chat.decode(ids) == whole
        whole = chat.render(messages, tools, generate=False)
        assert chat.encode_text(whole)[: len(ids)] == ids


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "tool", "content": "3"}],
        [{"role": "tool", "content": "3"}, {"role": "tool", "content": "4"}],
        [{"role": "user", "content": "3"}],
        [{"role": "tool", "content": "3"}, {"role": "user", "content": "4"}],
    ],
)
def test_a_continuation_reaches_from_the_stop_token_to_the_next_header(setting, messages):
    _, chat = setting
    opening = [{"role": "user", "content": "3"}, {"role": "assistant", "content": "no tool"}]
    before = chat.render(opening, generate=False)
    before = before[: before.rindex(chat.stop) + len(chat.stop)]
    text = chat.decode(chat.encode_continuation(messages))
    assert before + text == chat.render([*opening, *messages])
    assert text.endswith("<|im_start|>assistant\n")
    for message in messages:
        assert message["content"] in text


def test_a_continuation_is_the_callers_own_list(setting):
    _, chat = setting
    messages = [{"role": "user", "content": "3"}]
    chat.encode_continuation(messages).append(-1)
    assert -1 not in chat.encode_continuation(messages)
    chat.encode_mode("think").append(-1)
    assert -1 not in chat.encode_mode("think")


def test_a_forced_tag_continues_the_header_as_the_written_tag_would(setting):
    world, chat = setting
    for mode in ("think", "no_think"):
        task = world.task("parallel", 0, "test", "tag")
        (reply,) = solution(task, think=mode == "think")
        forced = chat.encode_mode(mode)
        assert chat.decode(forced) == f"[{mode}]\n"
        assert [*forced, *chat.encode_text(reply.removeprefix(f"[{mode}]\n"))] == chat.encode_text(reply)


def test_the_prompt_ends_with_the_assistants_header(setting):
    world, chat = setting
    task = world.task("hop", 2, "test", "x")
    text = chat.decode(chat.encode_prompt(list(task.messages), list(task.tools)))
    assert text.endswith("<|im_start|>assistant\n")
    assert task.messages[0]["content"] in text


def test_the_compact_prompt_is_chatml_and_names_every_tool_in_order():
    task = World().task("hop", 2, "test", "x")
    text = ChatFormat(build_tokenizer()).render(list(task.messages), list(task.tools))
    names = "".join(tool["function"]["name"] + " " for tool in task.tools)
    turns = [("system", names), ("user", task.messages[0]["content"])]
    whole = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert text == whole + "<|im_start|>assistant\n"


def test_the_qwen_prompt_holds_every_schema_as_one_json_line():
    task = World(rendering="natural").task("hop", 2, "test", "x")
    text = ChatFormat(bpe_tokenizer()).render(list(task.messages), list(task.tools))
    lines = text.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    assert [json.loads(line) for line in lines] == list(task.tools)


def test_the_qwen_template_keeps_a_system_message_and_merges_tool_results():
    chat = ChatFormat(bpe_tokenizer())
    text = chat.render(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Go."},
            {"role": "assistant", "content": "x"},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
        ]
    )
    assert text.startswith("<|im_start|>system\nBe brief.\n")
    assert text.count("<|im_start|>system") == 1
    responses = "".join(f"\n<tool_response>\n{n}\n</tool_response>" for n in (1, 2))
    assert f"<|im_start|>user{responses}<|im_end|>\n<|im_start|>assistant\n" in text


def test_the_stop_token_is_one_id(setting):
    _, chat = setting
    (stop,) = chat.stop_ids
    assert chat.decode([stop]) == "<|im_end|>"


# What a tokenizer must bring

TURN = "<|im_start|>user\n{{ m.content }}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("{% for %}", "template fails"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not end an assistant turn"),
        ("{{ messages | length }}{% for m in messages %}" + TURN + "{% endfor %}", "rewrites earlier turns"),
    ],
)
def test_an_unfit_template_is_one_clear_line(template, complaint):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=complaint) as raised:
        ChatFormat(tokenizer)
    assert "\n" not in str(raised.value)


def test_a_stop_text_of_several_tokens_is_refused():
    with pytest.raises(UserError, match="not one"):
        ChatFormat(bpe_tokenizer(), stop="</tool_call>")


def test_numbers_survive_rendering_exactly():
    call = ToolCall("f", {"a": 0.1 + 0.2, "b": -0.0, "c": 2**80, "d": 5e-324})
    (read,) = parse_reply(render_reply(None, (call,))).calls
    assert read == call
    assert math.copysign(1, read.arguments["b"]) == -1
