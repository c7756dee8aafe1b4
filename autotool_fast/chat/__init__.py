"""Chat text: modes, the strict reply parser, chat formats, and append-only rendering.

    reply      what an assistant turn says: `parse_reply`, the one parser of the project, and `render_reply`
    formats    Qwen2.5, Qwen3, Hermes, Llama-3.1 and the embedded model's compact one
    rendering  `ChatFormat`: messages to token ids through the model's own chat template, never re-encoding a turn
    guard      what keeps data from becoming control tokens
    terminal   `python -m autotool_fast.chat`

What a tool call does is left to `tools` and the tasks.
"""

from autotool_fast.chat.formats import (
    FORMAT_NAMES,
    FORMATS,
    MODE_INSTRUCTION,
    WireFormat,
    chat_template,
    find_format,
    recognise,
)
from autotool_fast.chat.rendering import ChatFormat, chat_format
from autotool_fast.chat.reply import (
    ERROR_KINDS,
    MODES,
    NO_THINK_TAG,
    SYNTAXES,
    THINK_TAG,
    ParsedReply,
    ToolCall,
    parse_reply,
    render_reply,
)

SOURCE_PROMPT, SOURCE_SAMPLED, SOURCE_TOOL = 0, 1, 2
"""Where a token came from: the prompt (forced mode tags included), the policy, or a tool or user after turn one."""

__all__ = [
    "ERROR_KINDS",
    "FORMATS",
    "FORMAT_NAMES",
    "MODES",
    "MODE_INSTRUCTION",
    "NO_THINK_TAG",
    "SOURCE_PROMPT",
    "SOURCE_SAMPLED",
    "SOURCE_TOOL",
    "SYNTAXES",
    "THINK_TAG",
    "ChatFormat",
    "ParsedReply",
    "ToolCall",
    "WireFormat",
    "chat_format",
    "chat_template",
    "find_format",
    "parse_reply",
    "recognise",
    "render_reply",
]
