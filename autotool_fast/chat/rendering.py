"""Conversations as token ids, append-only.

`ChatFormat` renders a prompt through the tokenizer's chat template, and what follows an assistant turn as a
continuation of it, so that sampled tokens are never encoded again. Assistant turns that a prompt already holds are
written as the model's replies, joined by the same continuations: a prompt with history has the ids that a rollout
would have left. When a `ChatFormat` is made, the template is tried on probe conversations: it may rewrite its own
assistant turns (they are never rendered), but nothing else.

What a format is stands in `formats`; that data cannot become control tokens is `guard`'s promise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from autotool_fast.chat.formats import (
    FORMATS,
    MODE_INSTRUCTION,
    REPLY_TAGS,
    WireFormat,
    chat_template,
    find_format,
    template_text,
)
from autotool_fast.chat.guard import DataGuard
from autotool_fast.chat.reply import (
    MODES,
    NO_THINK_TAG,
    THINK_TAG,
    ParsedReply,
    ToolCall,
    parse_reply,
    render_reply,
    unwritable,
)
from autotool_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTINEL = "autotool-sentinel-5b1e"  # plain text that no template trims or changes
_CACHED = 4096  # continuations remembered
_USER = {"role": "user", "content": "0"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
    },
}


def _call_message(argument: str) -> dict:
    """An assistant message with a call, as templates take it."""
    call = {"type": "function", "function": {"name": "probe", "arguments": {"x": argument}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


_REPLIES = (
    {"role": "assistant", "content": _SENTINEL},
    _call_message(_SENTINEL),  # some templates want a call before a tool's answer
    {"role": "assistant", "content": f"{THINK_TAG}\n<think>\n1\n</think>\n{_SENTINEL}"},
    {"role": "assistant", "content": _SENTINEL, "reasoning_content": "1"},
)
_OPENINGS = (
    [_USER],
    [{"role": "system", "content": "1"}, _USER],
    [_USER, {"role": "assistant", "content": f"{NO_THINK_TAG}\n1"}, _USER],
    [_USER, _call_message("1"), {"role": "tool", "content": "1"}],
)
_FOLLOWERS = (
    [{"role": "tool", "content": "0"}],
    [{"role": "tool", "content": "0"}, {"role": "tool", "content": "1"}],
    [{"role": "user", "content": "1"}],
)


@dataclass
class ChatFormat:
    """Renders conversations to token ids, append-only.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        stop: text of the token that ends an assistant turn; the format's own by default.
        wire: the format.
        instruction: joins the system message of every prompt.

    Attributes:
        stop_id: id of the stop token, for training.
        stop_ids: ids that end a turn when sampled; holds `stop_id`.

    Raises:
        UserError: when the tokenizer has no chat template, when the stop text is not one token, when mode tags are not
            tokens of their own, or when the template fails, ends turns with another token, has no header for the
            assistant's turn, or does not render a continued conversation as a continuation of the earlier text.
    """

    tokenizer: PreTrainedTokenizerBase
    stop: str | None = None
    wire: WireFormat = FORMATS["qwen2.5"]
    instruction: str = ""
    stop_id: int = field(init=False)
    stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template",
                where="model",
                remedy="give one that has, or set a template",
            )
        self.stop = self.stop or self.wire.stops[0]
        ids = self.encode_text(self.stop)
        if len(ids) != 1:
            raise UserError(
                f"the stop text {self.stop!r} is {len(ids)} tokens, not one",
                where="model",
                remedy="use the format the model was made for, or a tokenizer that holds this token",
            )
        self.stop_id = ids[0]
        others = (self.encode_text(stop) for stop in self.wire.stops[1:])
        self.stop_ids = frozenset([self.stop_id, *(other[0] for other in others if len(other) == 1)])
        self._guard = DataGuard(self.tokenizer, template_text(self.tokenizer) + self.stop, REPLY_TAGS)
        self._modes = self._encode_modes()
        self._continuations: dict[str, list[int]] = {}
        self._prove()

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text, nothing added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_reply(self, text: str) -> list[int]:
        """Token ids of a reply, stop token left out; special tokens spelt out in it are ordinary text."""
        return self._guard.encode(self._guard.cover(text, keep_tags=True))

    def render(self, messages: list[dict], tools: list[dict] | None = None, *, generate: bool = True) -> str:
        """The conversation as text, through the tokenizer's chat template."""
        return self._guard.reveal(self._render(messages, tools, generate=generate))

    def encode_prompt(self, messages: list[dict], tools: list[dict]) -> list[int]:
        """Token ids of the prompt, ending with the header of the assistant's turn.

        Assistant messages become replies: `content`, with `tool_calls` and `reasoning_content` if there are any, or a
        whole reply with its mode tag as `content`.
        """
        first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
        ids = self._guard.encode(self._render(messages[:first], tools))
        while first < len(messages):
            reply, after = messages[first], first + 1
            while after < len(messages) and messages[after]["role"] != "assistant":
                after += 1
            ids += [*self.encode_reply(self.reply_text(reply)), self.stop_id]
            ids += self.encode_continuation(messages[first + 1 : after])
            first = after
        return ids

    def encode_mode(self, mode: str) -> list[int]:
        """Token ids of a forced mode tag, to be put after the assistant header."""
        return list(self._modes[mode])

    def encode_continuation(self, messages: list[dict]) -> list[int]:
        """Token ids between a sampled stop token and the next assistant turn's first token.

        Found by rendering a short conversation whose assistant turn holds a sentinel, and cutting behind the stop text
        that follows it; what the template makes of the assistant's turn itself does not matter.
        """
        key = json.dumps(messages, sort_keys=True)
        cached = self._continuations.get(key)
        if cached is None:
            cached = self._guard.encode(next(self._turns([_USER], messages, [_TOOL]))[1])
            if len(self._continuations) < _CACHED:
                self._continuations[key] = cached
        return list(cached)

    def decode(self, ids: Any) -> str:
        """Text of token ids, special tokens included, nothing cleaned up."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def parse(self, text: str) -> ParsedReply:
        """Parse one assistant turn of this format; see `parse_reply`."""
        return parse_reply(text, self.wire.syntax)

    def write_reply(self, think: str | None, calls: Iterable[ToolCall] = (), text: str = "") -> str:
        """The reply text that `parse` reads back; see `render_reply`."""
        return render_reply(think, tuple(calls), text, self.wire.syntax)

    def unwritable(self, calls: Sequence[ToolCall], text: str) -> str | None:
        """Why `write_reply` refuses calls and text, in a few words; None when it does not."""
        return unwritable(calls, text, self.wire.syntax)

    def unwritable_message(self, message: dict) -> str | None:
        """The same of a conversation's message; only the assistant's are written as replies."""
        if message["role"] != "assistant":
            return None
        return self.unwritable(message.get("tool_calls") or (), message.get("content") or "")

    def reply_text(self, message: dict) -> str:
        """An assistant message as reply text.

        Raises:
            UserError: its calls are not in the shape that templates take, or do not fit into one reply.
        """
        content = message.get("content") or ""
        think, calls = message.get("reasoning_content") or None, message.get("tool_calls") or ()
        if not calls and think is None and content.lstrip().startswith((THINK_TAG, NO_THINK_TAG)):
            return content
        return self.write_reply(think, [_as_call(call) for call in calls], content)

    def _render(self, messages: list[dict], tools: list[dict] | None, *, generate: bool = True) -> str:
        """The conversation as text with the control text of its data covered."""
        covered = [self._guard.cover(message, keep_tags=message["role"] == "assistant") for message in messages]
        try:
            if self.instruction:
                system = covered.pop(0)["content"] + "\n\n" if covered and covered[0]["role"] == "system" else ""
                covered.insert(0, {"role": "system", "content": system + self.instruction})
            return self.tokenizer.apply_chat_template(
                covered,
                tools=self._guard.cover(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=generate,
                **self.wire.options,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the chat template fails: {error}", where="model", remedy="use another one") from None

    def _turns(self, before: list[dict], messages: list[dict], tools: list[dict] | None) -> Iterator[tuple[str, str]]:
        """Covered text of a conversation and what of it follows an assistant's turn between `before` and `messages`.

        One pair for each way to write that turn which the template takes, at least one.
        """
        found, problem = False, self._refusal("leaves out the assistant's words", "does not")
        for reply in _REPLIES:
            try:
                text = self._render([*before, reply, *messages], tools)
            except UserError as error:
                problem = error
                continue
            start = text.find(_SENTINEL)
            if start < 0:
                continue
            stop = text.find(self.stop, start)
            if stop < 0:
                raise self._refusal(f"does not end an assistant turn with {self.stop!r}", "does")
            found = True
            yield text, text[stop + len(self.stop) :]
        if not found:
            raise problem

    def _prove(self) -> None:
        """Refuse a template whose conversations cannot be continued by appending.

        A prompt must open every longer conversation, and a continuation must not depend on what came before it: tools
        or none, a system message, earlier turns, a reply that thinks or calls or does neither.
        """
        prompt = self._render([_USER], [_TOOL])
        if prompt.rstrip().endswith("<think>"):
            raise self._refusal("opens a think block before the reply can name its mode", "does not")
        for messages in _FOLLOWERS:
            expected = next(self._turns([_USER], messages, [_TOOL]))[1]
            for opening in _OPENINGS:
                # Without tools there are no results; some models have another template for such conversations.
                for tools in ([_TOOL],) if messages[0]["role"] == "tool" else ([_TOOL], None):
                    start = self._render(opening[: opening.index(_USER) + 1], tools)
                    for text, continuation in self._turns(opening, messages, tools):
                        if continuation != expected or not text.startswith(start):
                            raise self._refusal("rewrites earlier turns", "appends")
        if prompt == self._render([_USER], [_TOOL], generate=False):
            raise self._refusal("writes no header for the assistant's turn", "does")
        if _TOOL["function"]["name"] not in prompt:
            raise self._refusal("does not show the tools", "does")

    def _refusal(self, problem: str, wanted: str) -> UserError:
        shipped = f"autotool_fast.chat.chat_template('{self.wire.template}')"
        return UserError(
            f"the chat template {problem}", where="model", remedy=f"use one that {wanted}, such as {shipped}"
        )

    def _encode_modes(self) -> dict[str, list[int]]:
        modes = {mode: self.encode_text(f"[{mode}]\n") for mode in MODES}
        for mode, ids in modes.items():
            if self.wire.one_token_modes and len(ids) > 1:
                raise UserError(
                    f"the tokenizer splits the mode tag [{mode}] into {len(ids)} tokens, the format "
                    f"{self.wire.name} needs one",
                    where="model",
                    remedy="use another --chat-format, where tags may be several tokens",
                )
            for follower in ("<think>\n", "<tool_call>\n", "{", "a"):
                if self.encode_text(f"[{mode}]\n{follower}")[: len(ids)] != ids:
                    problem = f"the tokenizer joins the mode tag [{mode}] with the text after it"
                    raise UserError(problem, where="model", remedy="add the tag and its newline to its vocabulary")
        return modes


def _as_call(call: Any) -> ToolCall:
    """A tool call as templates and servers write it: arguments an object, or one as JSON text."""
    try:
        function = call.get("function", call)
        name, arguments = function["name"], function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if isinstance(name, str) and isinstance(arguments, dict):
            return ToolCall(name, arguments)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        pass
    problem = "a tool call of an assistant message is not {name, arguments}"
    raise UserError(problem, where="messages", remedy="give its arguments as an object or as the JSON text of one")


def chat_format(
    tokenizer: PreTrainedTokenizerBase,
    name: str = "auto",
    *,
    where: str = "model",
    option: str | None = "--chat-format",
) -> ChatFormat:
    """The `ChatFormat` of a model.

    Args:
        tokenizer: the model's. One without a chat template is given the shipped one of the format.
        name: of `FORMATS`, or "auto" to recognise it.
        where: what an error about recognising it names.
        option: the option with which the user names a format; None where there is none.

    Raises:
        UserError: see `find_format` and `ChatFormat`.
    """
    wire = find_format(tokenizer, name, where=where, option=option)
    if not template_text(tokenizer):
        tokenizer.chat_template = chat_template(wire.template)
    knows_modes = wire.one_token_modes or NO_THINK_TAG in template_text(tokenizer)
    return ChatFormat(tokenizer, wire=wire, instruction="" if knows_modes else MODE_INSTRUCTION)
