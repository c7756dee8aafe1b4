"""A tokenizer like a real model's, and chat templates that behave as those of the model families do."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>")
SPECIAL += ("<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CORPUS = (
    "the tool gives an answer to the user",
    '{"name": "f", "arguments": {"a": 1}}',
    "<|im_end|> [think] [no_think]",
)

TOOLS_BLOCK = """
{{- 'Tools:\n<tools>' }}{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}{{- '\n</tools>\n' }}
{{- 'Form: <tool_call>\n{\"name\": .., \"arguments\": ..}\n</tool_call>' }}
"""
TOOL_TURN = """
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
"""
CALLS = """
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\n</tool_call>' }}
{%- endfor %}
"""

# A system message of its own where the conversation has none.
QWEN25 = (
    """{{- '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'House rules.') }}
{%- if tools %}{{- '\n\n' }}"""
    + TOOLS_BLOCK
    + """{%- endif %}{{- '<|im_end|>\n' }}
{%- for message in messages %}
{%- if message.role == 'tool' %}"""
    + TOOL_TURN
    + """{%- elif not (message.role == 'system' and loop.first) %}
{{- '<|im_start|>' + message.role }}{%- if message.content %}{{- '\n' + message.content }}{%- endif %}"""
    + CALLS
    + """{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
)

# Thoughts before the last request of the user are dropped, an empty think block is added to the last reply.
QWEN3 = (
    """{%- if tools or messages[0].role == 'system' %}{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{%- if tools %}"""
    + TOOLS_BLOCK
    + """{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}
{%- set seen = namespace(last=0) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set seen.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'tool' %}"""
    + TOOL_TURN
    + """{%- elif message.role == 'assistant' %}
{%- set content = message.content or '' %}
{%- set thought = message.reasoning_content or '' %}
{%- if not thought and '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > seen.last and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
{%- endif %}
{{- content }}"""
    + CALLS
    + """{{- '<|im_end|>\n' }}
{%- elif not (message.role == 'system' and loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
)

# Two templates by name; results in turns of their own role, closed differently at the end of the conversation.
HERMES = {
    "default": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "tool_use": """{{- bos_token + '<|im_start|>system\nYou call functions.\n' }}"""
    + TOOLS_BLOCK
    + """{{- '<|im_end|>\n' }}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.previtem and loop.previtem.role != 'tool' %}{{- '<|im_start|>tool\n' }}{%- endif %}
{{- '<tool_response>\n' + message.content + ('\n</tool_response>' if loop.last else '\n</tool_response>\n') }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}"""
    + CALLS
    + """{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
}

# Tools in the first user message, trimmed text, one call per reply, results as JSON.
LLAMA31 = """{{- bos_token }}
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' + ('Environment: ipython\n' if tools else '') }}
{{- 'Today: ' + (date_string if date_string is defined else strftime_now('%d %b %Y')) + '\n\n' }}
{{- system + '<|eot_id|>' }}
{%- for message in turns %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- (call.arguments | tojson) + '}<|eot_id|>' }}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (message.content | tojson) + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{%- if tools and loop.first %}{%- for tool in tools %}{{- (tool | tojson(indent=4)) + '\n\n' }}{%- endfor %}{%- endif %}
{{- message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

TEMPLATES = {"qwen2.5": QWEN25, "qwen3": QWEN3, "hermes": HERMES, "llama3.1": LLAMA31}

_SHARED: list[str] = []


def _trained(corpus: Sequence[str], size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


def make_tokenizer(
    template: str | dict | None, tags: tuple[str, ...] = TAGS, corpus: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with turn markers as special tokens and `tags` as added ones that are not special.

    With a `corpus` its words are tokens, so that prompts made of them are short.
    """
    if not corpus and not _SHARED:
        _SHARED.append(_trained(CORPUS, 420))
    text = _trained([*CORPUS, *corpus], 1000) if corpus else _SHARED[0]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), eos_token="<|im_end|>", bos_token="<|begin_of_text|>"
    )
    fast.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    fast.chat_template = template
    return fast
