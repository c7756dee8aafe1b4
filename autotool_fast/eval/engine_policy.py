"""The policy that is a checkpoint: the local engine plays whole episodes through the rollout driver.

Episodes run as in training: token ids are append-only, the cache is kept across tool turns, and a mode is forced by its
tag. Tools that a benchmark adds later reach the model in the message that announces them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotool_fast.chat import ChatFormat, chat_format
from autotool_fast.errors import UserError
from autotool_fast.eval.records import PROMPT_TOO_LONG, EvalEpisode, Played, Reply
from autotool_fast.tasks.record import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from autotool_fast.rollout.records import Trajectory

_CONTENT = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}


@dataclass(frozen=True)
class EngineSettings:
    """How a checkpoint is sampled.

    Attributes:
        checkpoint: a model folder with its tokenizer.
        slots: episodes decoded at once.
        max_len: tokens of an episode, prompt and tool results included; 0 takes the model's own limit, at most 32768.
        shorten: whether a `max_len` beyond the model's limit is lowered to it; else it is refused.
        max_turn_tokens, max_new_tokens: sampled tokens of one reply and of an episode.
        temperature, seed: of sampling; 0 is greedy.
        deadline_s: seconds of an episode; 0 for no limit.
        chat_format: of `chat.FORMATS`, or "auto" to recognise it.
        device: where the model runs; empty picks the GPU where there is one.
    """

    checkpoint: str
    slots: int = 32
    max_len: int = 0
    shorten: bool = False
    max_turn_tokens: int = 1024
    max_new_tokens: int = 8192
    temperature: float = 0.0
    seed: int = 0
    deadline_s: float = 0.0
    chat_format: str = "auto"
    device: str = ""


class LocalEngine:
    """See the module.

    Args:
        settings: how the checkpoint is sampled.
        where: what an error about the checkpoint names.
        format_option: the option that names a chat format; None where there is none.

    Raises:
        UserError: the folder holds no model or tokenizer that can be loaded, no chat format fits, or `max_len` is more
            than the model takes.
    """

    name = "engine"

    def __init__(
        self, settings: EngineSettings, *, where: str = "--checkpoint", format_option: str | None = "--chat-format"
    ) -> None:
        self.settings = settings
        named = f"{where} ({settings.checkpoint})"
        model, tokenizer = load_checkpoint(Path(settings.checkpoint), settings.device, where=named)
        self._attach(model, chat_format(tokenizer, settings.chat_format, where=named, option=format_option))

    def _attach(self, model: PreTrainedModel, chat: ChatFormat) -> None:
        from autotool_fast.rollout.driver import RolloutLimits
        from autotool_fast.rollout.late import open_slot_engine

        settings = self.settings
        positions = most_positions(model.config)
        if settings.max_len > positions and not settings.shorten:
            problem = f"{settings.max_len} is more than the model's {positions} positions"
            raise UserError(problem, where="--max-len", remedy=f"give at most {positions}")
        max_len = min(settings.max_len or 32768, positions)
        turn = min(settings.max_turn_tokens, max_len // 2)
        self._chat = chat
        self._engine = open_slot_engine(model, slots=settings.slots, max_len=max_len, prefill_chunk=512)
        self._limits = RolloutLimits(
            max_turns=256,
            max_calls=4096,
            max_new_tokens=max(min(settings.max_new_tokens, max_len // 2), turn),
            max_turn_tokens=turn,
            deadline_s=settings.deadline_s or None,
        )
        self.parameters = sum(p.numel() for p in model.parameters())

    def config(self) -> dict[str, Any]:
        """What the replies depend on: settings and the model's content."""
        settings = self.settings
        folder = Path(settings.checkpoint)
        return {
            "policy": self.name,
            "checkpoint": str(folder.resolve()),
            "content": content_hash(folder),
            "chat_format": self._chat.wire.name,
            "temperature": settings.temperature,
            "seed": settings.seed,
            "max_len": self._engine.max_len,
            "max_turn_tokens": self._limits.max_turn_tokens,
            "max_new_tokens": self._limits.max_new_tokens,
        }

    def play(self, tasks: Sequence[Task], mode: str) -> list[Played]:
        """One episode of each task. A task whose prompt leaves no room for a reply is not played: it is wrong."""
        from autotool_fast.rollout.driver import rollout

        episodes: dict[str, EvalEpisode] = {}

        def remember(task: Task) -> EvalEpisode:
            episodes[task.id] = starts[task.id](task)
            return episodes[task.id]

        starts = {task.id: task.start for task in tasks}
        ready = [replace(task, start=remember) for task in tasks]
        lengths = {task.id: self._prompt_length(task, mode) for task in ready}
        room = self._engine.max_len - self._limits.max_new_tokens
        fitting = [task for task in ready if lengths[task.id] <= room]
        began = time.perf_counter()
        trajectories = rollout(
            self._engine,
            fitting,
            chat=self._chat,
            group_size=1,
            seed=self.settings.seed,
            step=0,
            mode=mode,
            temperature=self.settings.temperature,
            limits=self._limits,
            malformed_ends=False,
            close=False,  # the harness does, when it has judged
        )
        seconds = (time.perf_counter() - began) / max(len(fitting), 1)
        played = {t.task.id: self._played(t, episodes[t.task.id], seconds) for t in trajectories}
        return [played.get(task.id) or Played(task, task.episode(), (), PROMPT_TOO_LONG, 0.0) for task in tasks]

    def _prompt_length(self, task: Task, mode: str) -> int:
        tag = 0 if mode == "auto" else len(self._chat.encode_mode(mode))
        return len(self._chat.encode_prompt(list(task.messages), list(task.tools))) + tag

    def _played(self, trajectory: Trajectory, episode: EvalEpisode, seconds: float) -> Played:
        forced = trajectory.n_forced_tokens // max(len(trajectory.replies), 1)
        replies = []
        for index, (parsed, (start, end)) in enumerate(zip(trajectory.replies, trajectory.turn_spans, strict=True)):
            text = self._chat.decode(trajectory.ids[start - forced : end].tolist())
            thinking = sum(b - a for a, b in trajectory.think_spans if start <= a < end)
            replies.append(
                Reply(
                    parsed=parsed,
                    text=text,
                    prompt_tokens=trajectory.n_prompt if index == 0 else start,
                    output_tokens=end - start + forced,
                    think_tokens=thinking,
                )
            )
        return Played(trajectory.task, episode, replies, trajectory.stop_reason.value, seconds)


def most_positions(config: Any) -> int:
    """Tokens that a model takes, stretched rotary positions included; 32768 where its configuration does not say."""
    positions = getattr(config, "max_position_embeddings", None) or 32768
    rope = getattr(config, "rope_parameters", None) or {}
    trained = rope.get("original_max_position_embeddings") or positions
    return max(positions, int(trained * (rope.get("factor") or 1)))


def content_hash(folder: Path) -> str:
    """SHA-256 over the files of a model folder: weights, configuration, tokenizer and chat template.

    Weights are read in full. Names, sizes and times tell two models of one shape apart only by luck, and so does a
    sample of the bytes: an adapter, or a small step in bfloat16, leaves most of them alone. The cost is one pass over
    files that have just been loaded.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _CONTENT and path.is_file()):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def load_checkpoint(folder: Path, device: str = "", *, where: str) -> tuple[PreTrainedModel, Any]:
    """A model in inference mode and its tokenizer.

    Raises:
        UserError: one of them cannot be loaded; it names `where`.
    """
    import torch

    from autotool_fast import loading

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if chosen == "cpu" else "auto"
    try:
        tokenizer = loading.read_tokenizer(folder, local=True)
        model = loading.read_model(folder, dtype=dtype, local=True)
    except loading.Unusable as error:
        remedy = "give a folder that save_pretrained wrote, tokenizer included, or copy it again"
        raise UserError(f"cannot be loaded ({error})", where=where, remedy=remedy) from error
    return model.to(chosen).eval(), tokenizer
