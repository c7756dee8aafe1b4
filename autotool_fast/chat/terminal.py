"""The terminal chat: one conversation in one slot of the rollout engine.

A conversation is what a rollout is: a prompt, sampled turns, and continuations appended to them; keys and values stay
in the slot, nothing is encoded twice. What models and tools write is shown with control characters made visible. The
command line is `__main__`'s.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

import numpy as np

from autotool_fast.chat.rendering import ChatFormat, chat_format
from autotool_fast.chat.reply import ParsedReply, ToolCall
from autotool_fast.errors import UserError
from autotool_fast.rollout.rng import row_seeds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from autotool_fast.rollout.engine import SlotEngine

_ROW = 0  # the engine's only row


@dataclass(frozen=True)
class Turn:
    """One assistant turn: its text (a forced tag included), what it says, whether it ended with a stop token."""

    text: str
    reply: ParsedReply
    stopped: bool
    tokens: int


class ContextFull(Exception):
    """The conversation does not fit into the engine's slot any more."""


class Conversation:
    """Turns of one model, appended to one another in one slot.

    Args:
        engine: with at least one slot, inside a session that stops at `chat.stop_ids`.
        chat: the model's format.
        mode: "auto", or the mode that opens every turn.
        max_new_tokens: of one turn.
        seed: with the number of the conversation it fixes every draw.
    """

    def __init__(self, engine: SlotEngine, chat: ChatFormat, *, mode: str, max_new_tokens: int, seed: int) -> None:
        self._engine, self._chat, self._max_new_tokens, self._seed = engine, chat, max_new_tokens, seed
        self._tag = [] if mode == "auto" else chat.encode_mode(mode)
        self._number = 0
        self._open = False
        self._stopped = True

    def start(self, messages: list[dict], tools: list[dict]) -> Turn:
        """Forget what was said and let the model answer `messages`.

        Raises:
            ContextFull: the prompt leaves no room for a reply.
        """
        self.close()
        prompt = [*self._chat.encode_prompt(messages, tools), *self._tag]
        budget = self._budget(self._engine.max_len - len(prompt))
        seeds = row_seeds(self._seed, 0, self._number, np.arange(1))
        self._number += 1
        self._engine.submit(prompt, [_ROW], seeds, budget)
        self._open = True
        return self._sample(len(prompt))

    def go_on(self, messages: list[dict]) -> Turn:
        """Append what tools or the user said, and let the model answer.

        Raises:
            ContextFull: there is no room left.
        """
        ids = [] if self._stopped else [self._chat.stop_id]
        ids += [*self._chat.encode_continuation(messages), *self._tag]
        budget = self._budget(self._engine.room(_ROW) - len(ids))
        start = len(self._engine.row(_ROW).ids) + len(ids)
        self._engine.extend(_ROW, ids, budget)
        return self._sample(start)

    def close(self) -> None:
        """Give the slot back."""
        if self._open:
            self._engine.release(_ROW)
        self._open = False

    @property
    def open(self) -> bool:
        """Whether there is a conversation to go on with."""
        return self._open

    def _budget(self, room: int) -> int:
        if room < 1:
            raise ContextFull
        return min(self._max_new_tokens, room)

    def _sample(self, start: int) -> Turn:
        ended: list[tuple[int, bool]] = []
        while not ended:
            ended = self._engine.step()
        self._stopped = ended[0][1]
        ids = self._engine.row(_ROW).ids[start:].tolist()
        text = self._chat.decode([*self._tag, *(ids[:-1] if self._stopped else ids)])
        return Turn(text, self._chat.parse(text), self._stopped, len(ids))


class Tools(Protocol):
    """What answers the model's calls."""

    schemas: list[dict]

    def answer(self, calls: tuple[ToolCall, ...]) -> tuple[list[str], bool]:
        """The answers in order, and whether the model is to go on with them. Raises EOFError when there are none."""


class TypedTools:
    """Tools whose answers the user types."""

    def __init__(self, schemas: list[dict]) -> None:
        self.schemas = schemas

    def answer(self, calls: tuple[ToolCall, ...]) -> tuple[list[str], bool]:
        """Ask for the answer of each call."""
        return [_ask(f"answer of {printable(call.name)}> ") for call in calls], True


class WorldTools:
    """The embedded world's tools, executed on a state of their own.

    As in training, reading leaves a conversation open and acting on the world ends it.
    """

    def __init__(self) -> None:
        from autotool_fast.tasks.families import PLACES
        from autotool_fast.tasks.world import TOOLS, WorldState
        from autotool_fast.tools import Toolbox

        self.schemas = [tool.schema for tool in TOOLS.values()]
        self._toolbox = Toolbox(TOOLS.values())
        following = dict(zip(PLACES, PLACES[3:] + PLACES[:3], strict=True))
        self._state = WorldState(cells={place: [1 + i % 3, following[place]] for i, place in enumerate(PLACES)})

    def answer(self, calls: tuple[ToolCall, ...]) -> tuple[list[str], bool]:
        """Execute the calls; a call that does not fit its schema is answered with "error", as in training."""
        results = [self._toolbox.execute(call, self._state) for call in calls]
        values = ["error" if result.error else result.value for result in results]
        answers = [value if isinstance(value, str) else json.dumps(value) for value in values]
        return answers, all(call.name == "read" for call in calls)


def printable(text: str) -> str:
    """Text with control characters and half surrogate pairs escaped, so that it cannot steer a terminal."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )


def show(turn: Turn) -> None:
    """Print what a turn says, each part under its name."""
    reply = turn.reply
    _line("mode", reply.mode or "none")
    if reply.think and reply.think.strip():
        _line("thinking", reply.think.strip())
    for call in reply.calls:
        _line("call", call.to_json())
    if reply.text:
        _line("reply", reply.text)
    if not turn.stopped:
        _line("cut", f"after {turn.tokens} tokens")
    elif reply.errors:
        _line("malformed", f"{', '.join(reply.errors)}: {turn.text}")


def _line(name: str, text: str) -> None:
    first, *rest = printable(text).split("\n")
    print(f"{name + ':':<10} {first}", *(f"{'':<10} {line}" for line in rest), sep="\n", flush=True)


def _ask(prompt: str) -> str:
    """A line from the user; without a terminal, the next line of the input, and the prompt stays unsaid."""
    return input(prompt if sys.stdin.isatty() else "")


class Chat:
    """The loop between the user, the model and the tools."""

    def __init__(self, conversation: Conversation, tools: Tools, system: str | None) -> None:
        self._conversation, self._tools = conversation, tools
        self._system = [{"role": "system", "content": system}] if system else []

    def request(self, text: str) -> bool:
        """Answer one request, calls and all; returns whether the model's last reply was well formed.

        Raises:
            ContextFull: there is no room left for a reply.
            EOFError: the user gives no more answers.
        """
        message = {"role": "user", "content": text}
        if self._conversation.open:
            turn = self._conversation.go_on([message])
        else:
            turn = self._conversation.start([*self._system, message], self._tools.schemas)
        while True:
            show(turn)
            if not turn.stopped or turn.reply.errors:
                return False
            if not turn.reply.calls:
                return True
            answers, more = self._tools.answer(turn.reply.calls)
            for answer in answers:
                _line("answer", answer)
            if not more:
                self._conversation.close()
                return True
            turn = self._conversation.go_on([{"role": "tool", "content": answer} for answer in answers])

    def loop(self) -> NoReturn:
        """Read requests until the input ends, which is an EOFError."""
        while True:
            text = _ask("\nyou> ")
            if text.strip() == "/new":
                self._conversation.close()
            elif text.strip():
                try:
                    self.request(text)
                except ContextFull:
                    self._conversation.close()
                    _line("full", "the conversation is too long to go on; the next request starts a new one")


def run(options: argparse.Namespace) -> int:
    """The chat as the command line asks for it; returns the exit code."""
    model, chat = load(options.model, options.chat_format)

    from autotool_fast.rollout.engine import SlotEngine

    positions = getattr(model.config, "max_position_embeddings", None) or options.context
    engine = SlotEngine(model, slots=1, max_len=min(options.context, positions))
    tools = _choose_tools(options, chat)
    with engine.session(stop_ids=chat.stop_ids, temperature=options.temperature):
        conversation = Conversation(
            engine, chat, mode=options.mode, max_new_tokens=options.max_new_tokens, seed=options.seed
        )
        talk = Chat(conversation, tools, options.system)
        if options.prompt is None:
            talk.loop()
        try:
            return 0 if talk.request(options.prompt) else 1
        except ContextFull:
            problem = f"the prompt and the answers leave no room in {engine.max_len} tokens"
            raise UserError(problem, where="--context", remedy="raise it, or shorten the prompt") from None


def load(folder: Path, name: str) -> tuple[PreTrainedModel, ChatFormat]:
    """A saved model, on the GPU if there is one, and its chat format. Nothing is downloaded, no code of it is run.

    Raises:
        UserError: the folder holds no model or tokenizer that can be loaded, or no format fits.
    """
    import torch

    from autotool_fast import loading

    try:
        tokenizer = loading.read_tokenizer(folder, local=True)
        model = loading.read_model(folder, dtype="auto", local=True)
    except loading.Unusable as error:
        remedy = "give a folder that save_pretrained wrote, tokenizer included"
        raise UserError(f"holds no model that can be loaded ({error})", where=str(folder), remedy=remedy) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), chat_format(tokenizer, name)


def _choose_tools(options: argparse.Namespace, chat: ChatFormat) -> Tools:
    if options.schemas is not None:
        return TypedTools(options.schemas)
    return WorldTools() if options.tools or chat.wire.name == "compact" else TypedTools([])
