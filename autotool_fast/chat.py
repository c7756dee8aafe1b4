"""Chat text: modes, the strict reply parser, and append-only rendering.

`parse_reply` is the one parser of the project: reward, rollout, evaluation and chat all read replies through it. It
accepts any string and never raises; what it cannot accept it reports as stable error kinds. `ChatFormat` turns
messages into token ids through the tokenizer's own chat template, and renders what follows an assistant turn as a
suffix, so that sampled tokens are never encoded again. What a tool call does is left to `tools` and the tasks.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from autotool_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE_PROMPT, SOURCE_SAMPLED, SOURCE_TOOL = 0, 1, 2
"""Where a token came from: the prompt (forced mode tags included), the policy, or a tool or user after turn one."""

MODES = ("think", "no_think")
THINK_TAG, NO_THINK_TAG = "[think]", "[no_think]"
_TAGS = {THINK_TAG: "think", NO_THINK_TAG: "no_think"}

_WHITESPACE = re.compile(r"[ \t\r\n]*")
_BODY_TAG = re.compile(r"</?tool_call>|</?think>")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class ToolCall:
    """One call: the tool's name and its arguments (a JSON object)."""

    name: str
    arguments: dict[str, Any]

    def to_json(self) -> str:
        """The call as the JSON object the model is asked to write."""
        text = json.dumps({"name": self.name, "arguments": self.arguments}, ensure_ascii=False)
        return _SURROGATE.sub(lambda half: f"\\u{ord(half.group()):04x}", text)  # half a pair has no UTF-8 form


@dataclass(frozen=True)
class ParsedReply:
    """What one assistant turn says. `errors` is empty exactly when the reply is well formed."""

    mode: str | None
    think: str | None
    calls: tuple[ToolCall, ...]
    text: str
    errors: tuple[str, ...] = ()

    @property
    def length_class(self) -> int:
        """1 short, 0 long, -1 malformed. An empty think block counts as short."""
        if self.errors:
            return -1
        return 0 if self.mode == "think" and self.think and self.think.strip() else 1


class _BadCall(ValueError):
    """A tool call that is not acceptable; the argument is the error kind."""


def _reject_constant(name: str) -> Any:
    raise _BadCall("non_finite_number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _BadCall("non_finite_number")
    return value


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _BadCall("duplicate_key")
    return result


_DECODER = json.JSONDecoder(
    parse_constant=_reject_constant, parse_float=_finite_float, object_pairs_hook=_unique_object, strict=True
)


def _read_call(text: str, start: int) -> tuple[ToolCall, int]:
    """Read one JSON call at `start` up to and including its closing tag; returns it and the end position.

    The JSON is decoded before the closing tag is looked for, so a tag inside a string is part of the string.
    """
    start = _WHITESPACE.match(text, start).end()
    try:
        value, end = _DECODER.raw_decode(text, start)
    except _BadCall:
        raise
    except (ValueError, RecursionError):
        raise _BadCall("bad_json") from None
    end = _WHITESPACE.match(text, end).end()
    if not text.startswith("</tool_call>", end):
        raise _BadCall("unclosed_call" if end == len(text) else "trailing_text_in_call")
    if not isinstance(value, dict) or not set(value) <= {"name", "arguments"}:
        raise _BadCall("bad_call_shape")
    if not isinstance(value.get("name"), str) or not value["name"]:
        raise _BadCall("bad_name")
    if not isinstance(value.get("arguments"), dict):
        raise _BadCall("bad_arguments")
    return ToolCall(value["name"], value["arguments"]), end + len("</tool_call>")


def _read_body(body: str) -> tuple[list[ToolCall], str, list[str]]:
    calls: list[ToolCall] = []
    texts: list[str] = []
    position = 0
    while True:
        tag = _BODY_TAG.search(body, position)
        if tag is None:
            texts.append(body[position:])
            return calls, "".join(texts).strip(), []
        texts.append(body[position : tag.start()])
        if tag.group() != "<tool_call>":
            return calls, "".join(texts).strip(), ["stray_tag"]
        try:
            call, position = _read_call(body, tag.end())
        except _BadCall as error:
            return calls, "".join(texts).strip(), [str(error)]
        calls.append(call)


def parse_reply(text: str) -> ParsedReply:
    """Parse one assistant turn (stop token removed). Never raises.

    Accepted: `[think]` followed by a `<think>` block, or `[no_think]`; then text and any number of
    `<tool_call>` blocks, each holding one JSON object with `name` and `arguments`. White space before the tag, text
    around calls and an empty think block are accepted. Error kinds: no_mode_tag, no_think_block, unclosed_think,
    think_in_no_think, stray_tag, bad_json, non_finite_number, duplicate_key, unclosed_call, trailing_text_in_call,
    bad_call_shape, bad_name, bad_arguments, empty_reply.
    """
    start = _WHITESPACE.match(text).end()
    tag = next((tag for tag in _TAGS if text.startswith(tag, start)), None)
    if tag is None:
        return ParsedReply(None, None, (), text.strip(), ("no_mode_tag",))
    mode = _TAGS[tag]
    position = _WHITESPACE.match(text, start + len(tag)).end()
    think = None
    if text.startswith("<think>", position):
        end = text.find("</think>", position)
        if end < 0:
            return ParsedReply(mode, text[position + len("<think>") :], (), "", ("unclosed_think",))
        think = text[position + len("<think>") : end]
        position = end + len("</think>")
        if mode == "no_think" and think.strip():
            return ParsedReply(mode, think, (), text[position:].strip(), ("think_in_no_think",))
    elif mode == "think":
        return ParsedReply(mode, None, (), text[position:].strip(), ("no_think_block",))
    calls, body, errors = _read_body(text[position:])
    if not errors and not calls and not body:
        errors = ["empty_reply"]
    return ParsedReply(mode, think, tuple(calls), body, tuple(errors))


def render_reply(think: str | None, calls: tuple[ToolCall, ...] = (), text: str = "") -> str:
    """The reply text that `parse_reply` reads back: think None gives a `[no_think]` reply."""
    head = f"{NO_THINK_TAG}\n" if think is None else f"{THINK_TAG}\n<think>\n{think}\n</think>\n"
    blocks = [f"<tool_call>\n{call.to_json()}\n</tool_call>" for call in calls]
    return head + "\n".join(([text] if text else []) + blocks)


_TEMPLATES = Path(__file__).parent / "templates"


def chat_template(name: str) -> str:
    """A chat template shipped with the package: `compact` (tool names only) or `qwen` (full JSON schemas)."""
    return (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass
class ChatFormat:
    """Renders conversations to token ids, append-only.

    Args:
        tokenizer: a Hugging Face tokenizer with a ChatML-like chat template.
        stop: text of the token that ends an assistant turn.

    Raises:
        UserError: when the tokenizer has no chat template, when the stop text is not one token, or when the template
            fails, ends turns with another token, or does not render a continued conversation as a continuation of
            the earlier text.
    """

    tokenizer: PreTrainedTokenizerBase
    stop: str = "<|im_end|>"
    stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template",
                where="model",
                remedy="give one that has, or set a template",
            )
        ids = self.encode_text(self.stop)
        if len(ids) != 1:
            raise UserError(f"the stop text {self.stop!r} is {len(ids)} tokens, not one", where="model")
        self.stop_ids = frozenset(ids)
        self._modes = {mode: self.encode_text(f"[{mode}]\n") for mode in MODES}
        self._continuations: dict[str, list[int]] = {}
        self.encode_continuation([{"role": "tool", "content": "0"}])

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text, nothing added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def render(self, messages: list[dict], tools: list[dict] | None = None, *, generate: bool = True) -> str:
        """The conversation as text, through the tokenizer's chat template."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except TemplateError as error:
            raise UserError(f"the chat template fails: {error}", where="model", remedy="use another one") from None

    def encode_prompt(self, messages: list[dict], tools: list[dict]) -> list[int]:
        """Token ids of the prompt, ending with the header of the assistant's turn."""
        return self.encode_text(self.render(messages, tools))

    def encode_mode(self, mode: str) -> list[int]:
        """Token ids of a forced mode tag, to be put after the assistant header."""
        return list(self._modes[mode])

    def encode_continuation(self, messages: list[dict]) -> list[int]:
        """Token ids between a sampled stop token and the next assistant turn's first token.

        Found by rendering a two-message conversation with and without `messages` and taking the difference, which
        must be a suffix: a template that rewrites earlier turns is refused.
        """
        key = json.dumps(messages, sort_keys=True)
        cached = self._continuations.get(key)
        if cached is None:
            opening = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "0"}]
            before = self.render(opening, generate=False)
            after = self.render([*opening, *messages])
            if self.stop not in before:
                raise UserError(
                    f"the chat template does not end an assistant turn with {self.stop!r}",
                    where="model",
                    remedy="use one that does",
                )
            end = before.rindex(self.stop) + len(self.stop)
            if not after.startswith(before[:end]):
                raise UserError(
                    "the chat template rewrites earlier turns", where="model", remedy="use one that appends"
                )
            cached = self.encode_text(after[end:])
            if len(self._continuations) < 4096:
                self._continuations[key] = cached
        return list(cached)

    def decode(self, ids: Any) -> str:
        """Text of token ids, special tokens included, nothing cleaned up."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
