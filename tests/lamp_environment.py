"""A training environment for tests: the BFCL stand-in with lamps to switch, and a model that has seen solutions."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from chat_models import QWEN25, make_tokenizer
from eval_stand_ins import STAND_INS
from lamp_data import corpus
from transformers import Qwen2Config, Qwen2ForCausalLM

from autotool_fast.chat import chat_format
from autotool_fast.chat.formats import MODE_INSTRUCTION
from autotool_fast.eval.bfcl import Bfcl
from autotool_fast.eval.policies import Oracle
from autotool_fast.loop import Optimizers
from autotool_fast.warmup import demonstrate, sft_backward

LAMPS = "abcd"


def write_environment(folder: Path, *, tools: Sequence[str] = ("switch", "look")) -> Path:
    """A folder with the package's layout: light two lamps, then look; an entry for every pair."""
    shutil.copytree(STAND_INS / "bfcl", folder)
    data = folder / "bfcl_eval" / "data"
    house = data / "house.json"
    documents = [json.loads(line) for line in house.read_text().splitlines()]
    _write(house, [document for document in documents if document["name"] in tools])
    entries, answers = [], []
    for number, (one, two) in enumerate(itertools.permutations(LAMPS, 2)):
        name = f"multi_turn_base_{number}"
        turns = [f"Light {one} and {two}.", "Show me."]
        entries.append(
            {
                "id": name,
                "question": [[{"role": "user", "content": text}] for text in turns],
                "initial_config": {"House": {"lamps": dict.fromkeys(LAMPS, "off")}},
                "involved_classes": ["House"],
            }
        )
        answers.append({"id": name, "ground_truth": [[f"switch('{one}')", f"switch('{two}')"], ["look()"]]})
    _write(data / "BFCL_v4_multi_turn_base.json", entries)
    _write(data / "possible_answer" / "BFCL_v4_multi_turn_base.json", answers)
    return folder


def _write(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def live_processes(folder: Path) -> list[int]:
    """Processes that serve the environment in `folder`, whoever their parent is by now."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder.resolve()).encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def small_model(vocabulary: int, hidden: int = 32, layers: int = 1, seed: int = 0) -> Qwen2ForCausalLM:
    """A random Qwen2."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=True,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def write_lamp_model(folder: Path) -> None:
    """A random Qwen2 of two layers, and a tokenizer that knows the lamps' words."""
    tokenizer = make_tokenizer(QWEN25, corpus=[MODE_INSTRUCTION, *corpus()])
    small_model(len(tokenizer), hidden=64, layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_model(folder: Path, environment: Path, steps: int) -> Path:
    """A model fine-tuned for `steps` on the environment's own solutions: right now and then."""
    benchmark = Bfcl(environment, ["multi_turn_base"])
    try:
        played = Oracle().play(benchmark.tasks(), "auto")
        words = [json.dumps([one.task.tools, one.task.messages, [r.text for r in one.replies]]) for one in played]
        tokenizer = make_tokenizer(QWEN25, corpus=[MODE_INSTRUCTION, "Show me.", *words])
        chat = chat_format(tokenizer, "auto")
        demos = [demonstrate(one.task, [reply.text for reply in one.replies], chat) for one in played]
    finally:
        benchmark.close()
    model = small_model(len(tokenizer), hidden=64, layers=2)
    optimizers, rng = Optimizers(model, lr=3e-3, weight_decay=0.0), np.random.default_rng(0)
    for step in range(steps):
        loss = sft_backward(model, [demos[i] for i in rng.choice(len(demos), 4, replace=False)])
        optimizers.step(1.0, min(1.0, (step + 1) / 10), measured=(loss,))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
