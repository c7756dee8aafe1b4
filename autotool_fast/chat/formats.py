"""The chat formats: how tools enter the prompt, how calls and results look, what ends a turn.

A format names its wire syntax and its stop token; the prompt itself is written by the model's own chat template, or by
the one shipped here when the model has none. `recognise` tells the format of a tokenizer by what its template writes.
Rendering and the proof that a template can be appended to are in `rendering`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotool_fast import schema
from autotool_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATES = Path(__file__).parents[1] / "templates"

MODE_INSTRUCTION = (
    "Open every reply with [no_think] when you can answer at once, or with [think] and a <think> block when the "
    "request needs reasoning first."
)
"""What a prompt says about modes. Shipped templates hold it; for others it joins the system message."""

REPLY_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Tags that some tokenizers hold as single tokens and that data must not produce."""


@dataclass(frozen=True)
class WireFormat:
    """One format.

    Attributes:
        name: as in `--chat-format`.
        stops: texts of the tokens that end an assistant turn, the one to be trained first.
        syntax: how calls are written (`reply.SYNTAXES`).
        template: shipped template for models without one.
        options: variables given to the chat template, so that a prompt does not depend on the day it is made.
        one_token_modes: whether each mode tag must be a single token.
    """

    name: str
    stops: tuple[str, ...] = ("<|im_end|>",)
    syntax: str = "tagged"
    template: str = "qwen"
    options: dict[str, Any] = field(default_factory=dict)
    one_token_modes: bool = False


FORMATS: dict[str, WireFormat] = {
    wire.name: wire
    for wire in (
        WireFormat("compact", template="compact", one_token_modes=True),
        WireFormat("qwen2.5"),
        WireFormat("qwen3"),
        WireFormat("hermes", template="hermes"),
        WireFormat(
            "llama3.1",
            stops=("<|eot_id|>", "<|eom_id|>"),
            syntax="bare",
            template="llama3.1",
            options={"date_string": "26 Jul 2024"},  # the value that the family's templates fall back to
        ),
    )
}
FORMAT_NAMES = ("auto", *FORMATS)


def chat_template(name: str) -> str:
    """A chat template shipped with the package.

    `compact` (tool names only, for the embedded model), `qwen` (Qwen2.5, Qwen3), `hermes` or `llama3.1`; all but the
    first show the tools' JSON schemas and say how to open a reply.
    """
    return (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template used when tools are given; empty when the tokenizer has none."""
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):
        template = template.get("tool_use") or template.get("default") or ""
    return template


def recognise(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The name of the format that the tokenizer's template writes, or None.

    Told by the text of the template: its turn markers, the key of a call's arguments, the role of tool results.
    """
    template = template_text(tokenizer)
    for wire in FORMATS.values():
        if template and template == chat_template(wire.template):
            return wire.name
    if "<|start_header_id|>" in template and "<|eot_id|>" in template and '"parameters"' in template:
        return "llama3.1"
    writes_json_calls = '"arguments"' in template or '\\"arguments\\"' in template
    if "<|im_start|>" not in template or "<tool_call>" not in template or not writes_json_calls:
        return None
    if "<|im_start|>tool" in template:
        return "hermes"
    return "qwen3" if "reasoning_content" in template or "message.content is string" in template else "qwen2.5"


def find_format(
    tokenizer: PreTrainedTokenizerBase,
    name: str = "auto",
    *,
    where: str = "model",
    option: str | None = "--chat-format",
) -> WireFormat:
    """The format called `name`, or the recognised one for "auto".

    Args:
        tokenizer: the model's.
        name: of `FORMATS`, or "auto".
        where: what an error about the model names.
        option: the option with which the user names a format; None where there is none.

    Raises:
        UserError: a tokenizer that knows no words, an unknown name, or a template that cannot be recognised.
    """
    # Of a folder that holds none, transformers makes a tokenizer with nothing but its special tokens.
    if len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()):
        remedy = "copy tokenizer.json and tokenizer_config.json beside the weights"
        raise UserError("there is no tokenizer in the model's folder", where=where, remedy=remedy)
    if name != "auto":
        if name in FORMATS:
            return FORMATS[name]
        guess = schema.nearest(name, list(FORMAT_NAMES))
        remedy = f"did you mean '{guess}'?" if guess else f"choose from {', '.join(FORMAT_NAMES)}"
        raise UserError(f"no chat format '{name}'", where=option, remedy=remedy)
    # The compact format is that of the embedded model, which brings its template.
    names = ", ".join(wire.name for wire in FORMATS.values() if not wire.one_token_modes)
    remedy = f"name a format with {option} ({names})" if option else "use a model whose template is known here"
    if not template_text(tokenizer):
        raise UserError("the tokenizer has no chat template", where=where, remedy=remedy)
    found = recognise(tokenizer)
    if found is None:
        problem = "the model's chat template writes tool calls in no known format"
        raise UserError(problem, where=where, remedy=remedy)
    return FORMATS[found]
