"""The tiny model of the embedded world: tokenizer and from-scratch `Qwen3ForCausalLM`.

Both are ordinary Hugging Face objects: they save, load, generate and carry a chat template, so everything that runs on
them runs on a real checkpoint too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from autotool_fast.chat import chat_template
from autotool_fast.tasks.rendering import compact_fragments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

    from autotool_fast.config import ModelConfig

SPECIAL = (
    "<|endoftext|>",
    "<|im_end|>",
    "<unk>",
    *(f"<|im_start|>{r}\n" for r in ("system", "user", "assistant", "tool")),
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose tokens are the compact rendering's fragments; decoding concatenates them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*SPECIAL, *compact_fragments()]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = "|".join(re.escape(token) for token in sorted(vocabulary, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>"
    )
    fast.chat_template = chat_template("compact")
    return fast


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 decoder in float32.

    Query and key norms start at `config.qk_norm_init`: with a gain g and heads of d dimensions attention logits are at
    most g^2 sqrt(d). Where that is small attention is too flat to pick one token out of a prompt, and training spends
    its first half raising it.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        initializer_range=config.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(settings).float()
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(parameter, config.qk_norm_init)
    return model
