"""The work of `benchmarks.rollout` and `benchmarks.train_step`: a tokenizer, a scripted model, tool episodes.

Contestants sample with their own code and their own random numbers, so their work is equal only if the model decides
what is said. `Script` is a hook on the decoder's output that adds the head's row of one token to every hidden state,
enough for that token to be drawn with certainty at temperature 1. The token follows from the last token and its
position alone, which every contestant knows, so the same model says the same in all of them; all layers, the whole
head and the whole vocabulary are computed and sampled from as ever. Weights are random.

A turn is a mode tag, words that count down, and one tool call. Its length follows from the position it begins at, and
that from the lengths of the tool results before it, which differ from sample to sample. What an episode is to each
contestant (a `Task`, a Python function) is made here; running it is theirs.
"""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from autotool_fast.chat import ChatFormat, ParsedReply, chat_format, chat_template
from autotool_fast.tasks.record import Task

TURNS = 4
STRENGTH = 60.0  # logit of the scripted token; the others' are below 25 (cosine of two random rows of the head)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
OPENING = "[no_think]\n"
CALL = ("<tool_call>", '\n{"name": "look_up", "arguments": {"shelf": "', "oak", '"}}\n', "</tool_call>")
CALL_TOKENS = len(CALL) + 2  # with the mode tag before and the stop token after
ASK = "Find out what lies in box {0} and box {1}, look at shelf {2} before you answer, and say which is heavier."


def look_up(shelf: str) -> str:
    """Read the list of things that lie on one shelf of the store.

    Args:
        shelf: Name of the shelf to read.
    """
    return shelf


@dataclass(frozen=True)
class Work:
    """Sizes of the episodes.

    Attributes:
        prompts, group: episodes are `prompts * group`.
        shortest, longest: sampled tokens of one turn; drawn evenly between them, equal if they are equal.
        result_tokens: longest tool result, in words of one token each; the shortest is a quarter of it.
    """

    prompts: int = 2
    group: int = 16
    shortest: int = 12
    longest: int = 60
    result_tokens: int = 24

    def __post_init__(self) -> None:
        if not CALL_TOKENS < self.shortest <= self.longest:
            raise ValueError(f"a turn has more than {CALL_TOKENS} tokens: got {self.shortest} to {self.longest}")

    @property
    def episodes(self) -> int:
        """Episodes of one rollout."""
        return self.prompts * self.group

    @property
    def most_new_tokens(self) -> int:
        """Tokens that an episode can add to its prompt, those of tool results and turn markers included."""
        return TURNS * (self.longest + self.result_tokens + 16)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model: Qwen2's architecture."""

    hidden: int = 256
    layers: int = 4
    vocab: int = 32768
    heads: int = 4
    kv_heads: int = 2
    max_len: int = 2048
    tied: bool = False  # one matrix for embeddings and head
    intermediate: int | None = None  # width of the gated MLP; four times hidden if not given


def _word(number: int) -> str:
    return f" w{number:03d}"


@functools.cache
def make_tokenizer(words: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's turn markers and our chat template; the words of the script are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = chat_template("qwen")
    corpus = [template, ASK, json.dumps(tool_schema())] * 2  # a merge needs to be seen twice
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=1200,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    added = [OPENING, *CALL, *(_word(number) for number in range(words)), "<tool_response>", "</tool_response>"]
    fast.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    fast.chat_template = template
    # How a reply of this template is read, for libraries that parse replies through the tokenizer.
    fast.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "tool_calls": {
                "open": "<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": "<|im_end|>", "content": "text"},
        },
    }
    return fast


def tool_schema() -> dict[str, Any]:
    """The JSON schema of `look_up`, as transformers derives it from the function."""
    from transformers.utils import get_json_schema

    return get_json_schema(look_up)


def make_chat() -> ChatFormat:
    """Our chat format on the benchmark's tokenizer."""
    return chat_format(make_tokenizer(), "qwen2.5")


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of that shape, the same for the same shape."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate or 4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.max_len,
        tie_word_embeddings=shape.tied,
        eos_token_id=make_tokenizer().eos_token_id,
        pad_token_id=make_tokenizer().pad_token_id,
    )
    return Qwen2ForCausalLM(config).to(device, dtype).eval()


class Script:
    """What the model says: a forward hook on its decoder.

    Args:
        model: gets the hook; `remove` takes it off.
        work: lengths of the turns.
    """

    def __init__(self, model: PreTrainedModel, work: Work) -> None:
        ids = make_tokenizer().convert_tokens_to_ids
        self._opening, stop = ids(OPENING), ids("<|im_end|>")
        words = ids([_word(number) for number in range(work.longest)])
        self._call = [*ids(list(CALL)), stop]
        device = model.device
        following = torch.full((model.config.vocab_size,), self._opening, device=device)
        # Words count down, then comes the call; any other token is followed by the opening of a turn.
        for token, after in itertools.pairwise([*words[::-1], *self._call]):
            following[token] = after
        self._following = following
        make = torch.Generator().manual_seed(1)
        self._length = torch.randint(
            work.shortest, work.longest + 1, (model.config.max_position_embeddings + 1,), generator=make
        ).to(device)
        self._words = torch.tensor(words, device=device)
        self._head = model.get_output_embeddings()
        self._hook = model.base_model.register_forward_hook(self, with_kwargs=True)

    def turn_length(self, position: int) -> int:
        """Sampled tokens, stop token included, of a turn whose first token is at `position`."""
        return int(self._length[position])

    def reply(self, position: int) -> list[int]:
        """The turn whose first token is at `position`, stop token included."""
        words = self._words[: self.turn_length(position) - CALL_TOKENS].flip(0).tolist()
        return [self._opening, *words, *self._call]

    def remove(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Turn every hidden state towards the token that follows."""
        ids, positions = kwargs["input_ids"], kwargs["position_ids"]
        first = self._words[self._length[positions.clamp(0, len(self._length) - 1)] - CALL_TOKENS - 1]
        following = torch.where(ids == self._opening, first, self._following[ids])
        output.last_hidden_state = output.last_hidden_state + self._push(following)
        return output

    def _push(self, tokens: Tensor) -> Tensor:
        rows = self._head.weight.detach()[tokens]
        return STRENGTH * rows / rows.float().square().sum(-1, keepdim=True).to(rows.dtype)


def question(prompt: int) -> list[dict[str, str]]:
    """The first messages of a prompt's episodes; all questions have the same number of tokens."""
    numbers = [10 + (7 * prompt + 13 * i) % 90 for i in range(3)]
    return [{"role": "user", "content": ASK.format(*numbers)}]


def tool_result(work: Work, episode: int, turn: int) -> str:
    """What the tool says to an episode after a turn: a few words, their number drawn from both."""
    low = max(1, work.result_tokens // 4)
    make = torch.Generator().manual_seed(1000 * episode + turn)
    count = int(torch.randint(low, work.result_tokens + 1, (1,), generator=make))
    return "".join(_word(number) for number in torch.randint(work.longest, (count,), generator=make).tolist())


@dataclass
class ToolEpisode:
    """One episode, for our driver: the tool's answer until the last turn."""

    work: Work
    episode: int
    turn: int = 0

    def step(self, reply: ParsedReply) -> list[dict] | None:
        """The tool's message, or None after the last turn."""
        self.turn += 1
        if self.turn == TURNS or len(reply.calls) != 1:
            return None
        return [{"role": "tool", "content": tool_result(self.work, self.episode, self.turn)}]

    def score(self) -> bool:
        """Whether all turns were played."""
        return self.turn == TURNS


def make_tasks(work: Work) -> list[Task]:
    """Tasks for one rollout of ours; each task numbers the samples that it starts."""
    tasks = []
    for prompt in range(work.prompts):
        numbers = itertools.count(prompt * work.group)
        tasks.append(
            Task(
                id=f"store-{prompt}",
                family="store",
                difficulty=TURNS,
                tools=(tool_schema(),),
                messages=tuple(question(prompt)),
                spec={},
                split="train",
                start=lambda task, numbers=numbers: ToolEpisode(work, next(numbers)),
            )
        )
    return tasks


@dataclass(frozen=True)
class Counts:
    """What a contestant sampled: turns and sampled tokens of each episode, in order."""

    turns: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def total(self) -> int:
        """Sampled tokens of all episodes."""
        return sum(self.tokens)


def expected(work: Work, script: Script, chat: ChatFormat) -> Counts:
    """What every contestant has to sample, worked out from the script without a model."""
    tokens = []
    for episode in range(work.episodes):
        position, sampled = len(chat.encode_prompt(question(episode // work.group), [tool_schema()])), 0
        for turn in range(1, TURNS + 1):
            length = script.turn_length(position)
            sampled += length
            message = {"role": "tool", "content": tool_result(work, episode, turn)}
            position += length + len(chat.encode_continuation([message]))
        tokens.append(sampled)
    return Counts((TURNS,) * work.episodes, tuple(tokens))


class Histories:
    """The token ids of all episodes, for contestants that bring no turn loop of their own."""

    def __init__(self, work: Work, chat: ChatFormat) -> None:
        self._work, self._chat = work, chat
        self.ids = [chat.encode_prompt(question(i // work.group), [tool_schema()]) for i in range(work.episodes)]
        self._turns = [0] * work.episodes
        self._sampled = [0] * work.episodes

    def reply(self, episode: int, ids: list[int]) -> list[int]:
        """Take an episode's reply, cut behind its stop token: parse it, call the tool, note both.

        Returns:
            The tool's tokens up to the next turn; empty after the last one.
        """
        text = self._chat.decode(ids[:-1])
        self._turns[episode] += 1
        self._sampled[episode] += len(ids)
        self.ids[episode] += ids
        if len(self._chat.parse(text).calls) != 1 or self._turns[episode] == TURNS:
            return []
        result = tool_result(self._work, episode, self._turns[episode])
        added = self._chat.encode_continuation([{"role": "tool", "content": result}])
        self.ids[episode] += added
        return added

    def counts(self) -> Counts:
        """Turns and sampled tokens so far."""
        return Counts(tuple(self._turns), tuple(self._sampled))
