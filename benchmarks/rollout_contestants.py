"""Who plays the episodes of `benchmarks.rollout`: our engine, and the ways that others do it.

Every contestant plays all episodes at once, at temperature 1 over the whole vocabulary, with its library's settings at
their best for that. One that is not installed or cannot run here is an `Absent` with the reason. Peers are no
dependencies: `pip install trl` brings TRL, `pip install vllm` vLLM.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from autotool_fast.chat import SOURCE_SAMPLED, ChatFormat
from autotool_fast.rollout.driver import RolloutLimits, rollout
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.rollout.late import LateEngine, open_slot_engine
from benchmarks.episodes import (
    TURNS,
    Counts,
    Histories,
    Script,
    Shape,
    Work,
    look_up,
    make_chat,
    make_model,
    make_tasks,
    question,
    tool_result,
    tool_schema,
)
from benchmarks.peers import Absent, Unavailable, collect


@dataclass(frozen=True)
class Contestant:
    """`run(seed)` plays all episodes once and says what it sampled."""

    name: str
    run: Callable[[int], Counts]
    how: str


@dataclass(frozen=True)
class Setting:
    """One contest: the scripted model and its episodes."""

    work: Work
    shape: Shape
    model: PreTrainedModel
    script: Script
    chat: ChatFormat

    @classmethod
    def of(cls, work: Work, shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> Setting:
        """Make the model, with its script."""
        model = make_model(shape, device, dtype)
        return cls(work, shape, model, Script(model, work), make_chat())

    @property
    def max_len(self) -> int:
        """Tokens of the longest possible episode."""
        prompts = (question(prompt) for prompt in range(self.work.prompts))
        return max(len(self.chat.encode_prompt(p, [tool_schema()])) for p in prompts) + self.work.most_new_tokens


def contestants(setting: Setting, wanted: Callable[[str], bool]) -> list[Contestant | Absent]:
    """Those that are wanted, or why one is absent."""
    adapters = {
        "autotool": _ours,
        "generate": _generate,
        "generate_kept": _generate_kept,
        "continuous": _continuous,
        "trl": _trl,
        "vllm": _vllm,
    }
    if setting.model.device.type == "cuda":
        adapters["autotool_no_graphs"] = _without_graphs
    return collect({name: lambda make=make: make(setting) for name, make in adapters.items() if wanted(name)})


def _ours(setting: Setting) -> Contestant:
    if setting.model.device.type == "cuda":
        return _on_gpu(setting, "autotool", cuda_graphs=True)

    def engine() -> SlotEngine:
        return SlotEngine(setting.model, slots=setting.work.episodes, max_len=setting.max_len)

    return _played(setting, "autotool", engine, "SlotEngine")


def _without_graphs(setting: Setting) -> Contestant:
    return _on_gpu(setting, "autotool_no_graphs", cuda_graphs=False)


def _on_gpu(setting: Setting, name: str, cuda_graphs: bool) -> Contestant:
    sizes = {"slots": setting.work.episodes, "max_len": setting.max_len, "prefill_chunk": 512}
    engine = open_slot_engine(setting.model, cuda_graphs=cuda_graphs, **sizes)
    how = "CUDA graphs, captured once" if cuda_graphs else "kernel by kernel"
    kernels = f"attention by {engine.kernels.name}, " if isinstance(engine, LateEngine) else ""
    return _played(setting, name, lambda: engine, f"{type(engine).__name__}, {kernels}{how}")


def _played(setting: Setting, name: str, engine: Callable[[], SlotEngine], what: str) -> Contestant:
    work = setting.work
    limits = RolloutLimits(
        max_turns=TURNS, max_new_tokens=TURNS * work.longest, max_turn_tokens=work.longest, deadline_s=None
    )

    def run(seed: int) -> Counts:
        played = rollout(
            engine(), make_tasks(work), chat=setting.chat, group_size=work.group, seed=seed, step=0, limits=limits
        )
        return Counts(
            tuple(len(t.turn_spans) for t in played), tuple(int((t.source == SOURCE_SAMPLED).sum()) for t in played)
        )

    return Contestant(name, run, f"{what} through the rollout driver; records log-probs and entropies too")


def _sampling(setting: Setting) -> GenerationConfig:
    tokenizer = setting.chat.tokenizer
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=setting.work.longest,
        eos_token_id=setting.chat.stop_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and attention mask, int64 [rows, longest]."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _replies(new: Tensor, stop: int) -> list[list[int]]:
    """Each row's tokens up to its stop token."""
    rows = new.tolist()
    return [row[: row.index(stop) + 1] if stop in row else row for row in rows]


def _generate(setting: Setting) -> Contestant:
    chat, model, sampling = setting.chat, setting.model, _sampling(setting)

    def run(seed: int) -> Counts:
        torch.manual_seed(seed)
        histories = Histories(setting.work, chat)
        for _ in range(TURNS):
            ids, mask = _left_padded(histories.ids, sampling.pad_token_id, model.device)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=sampling)
            for episode, reply in enumerate(_replies(out[:, ids.shape[1] :], chat.stop_id)):
                histories.reply(episode, reply)
        return histories.counts()

    return Contestant("generate", run, "model.generate per turn: left-padded batch, the whole history read again")


def _generate_kept(setting: Setting) -> Contestant:
    chat, model, sampling = setting.chat, setting.model, _sampling(setting)
    pad = sampling.pad_token_id

    def run(seed: int) -> Counts:
        torch.manual_seed(seed)
        histories, cache = Histories(setting.work, chat), DynamicCache(config=model.config)
        ids, mask = _left_padded(histories.ids, pad, model.device)
        for _ in range(TURNS):
            out = model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=sampling
            )
            replies = _replies(out[:, ids.shape[1] :], chat.stop_id)
            added = [histories.reply(episode, reply) for episode, reply in enumerate(replies)]
            said = torch.tensor(
                [[1] * len(reply) + [0] * (out.shape[1] - ids.shape[1] - len(reply)) for reply in replies],
                device=model.device,
            )
            tool, tool_mask = _left_padded(added, pad, model.device)
            ids, mask = torch.cat([out, tool], 1), torch.cat([mask, said, tool_mask], 1)
        return histories.counts()

    return Contestant("generate_kept", run, "model.generate per turn on one cache that is kept, gaps masked")


def _continuous(setting: Setting) -> Contestant:
    from transformers import ContinuousBatchingConfig

    model, work = setting.model, setting.work
    if not hasattr(model, "continuous_batching_context_manager"):
        raise Unavailable("this version of transformers has no continuous batching")
    sampling, page = _sampling(setting), 32
    blocks = 2 * work.episodes * -(-setting.max_len // page)

    def run(seed: int) -> Counts:
        histories = Histories(work, setting.chat)
        config = ContinuousBatchingConfig(
            page_size=page, num_blocks=blocks, max_batch_tokens=max(512, 2 * work.episodes), seed=seed
        )
        implementation, running = model.config._attn_implementation, {}
        try:
            with model.continuous_batching_context_manager(
                generation_config=sampling, continuous_batching_config=config
            ) as manager:
                for episode, ids in enumerate(histories.ids):
                    running[manager.add_request(list(ids), max_new_tokens=work.longest)] = episode
                while running:
                    result = manager.get_result(timeout=1)
                    if result is None:
                        if not manager.is_running():
                            raise RuntimeError("continuous batching stopped by itself")
                        continue
                    episode = running.pop(result.request_id)
                    if result.error:
                        raise RuntimeError(str(result.error))
                    if histories.reply(episode, list(result.generated_tokens)):
                        ids = list(histories.ids[episode])
                        running[manager.add_request(ids, max_new_tokens=work.longest)] = episode
        finally:
            model.set_attn_implementation(implementation)
        return histories.counts()

    return Contestant(
        "continuous", run, f"transformers continuous batching, a turn ends a request; prefix sharing, pages of {page}"
    )


def trl_trainer(model: PreTrainedModel, folder: str, prompts: int, group: int, **changes: Any) -> Any:
    """A `GRPOTrainer` on the benchmark's prompts that reports nowhere and saves nothing.

    Args:
        model: trained in place.
        folder: for its output.
        changes: of its `GRPOConfig`, and `tools`, `reward_funcs` of the trainer.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # its telemetry would wait for a network
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    given = {key: changes.pop(key) for key in ("tools", "reward_funcs") if key in changes}
    config = GRPOConfig(
        output_dir=folder,
        num_generations=group,
        per_device_train_batch_size=prompts * group,
        temperature=1.0,
        use_cpu=model.device.type == "cpu",
        bf16=model.dtype == torch.bfloat16,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **changes,
    )
    trainer = GRPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": question(prompt)} for prompt in range(prompts)]),
        processing_class=make_chat().tokenizer,
        **{"reward_funcs": _no_reward, **given},
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _no_reward(completions: list, **_: Any) -> list[float]:
    return [0.0] * len(completions)


def _trl(setting: Setting) -> Contestant:
    import trl

    work = setting.work
    model = make_model(setting.shape, setting.model.device, setting.model.dtype)  # the trainer changes its model
    Script(model, work)
    folder = tempfile.TemporaryDirectory()
    trainer = trl_trainer(
        model,
        folder.name,
        work.prompts,
        work.group,
        tools=[look_up],
        max_completion_length=work.most_new_tokens,
        max_tool_calling_iterations=TURNS - 1,
    )
    prompts = [question(episode // work.group) for episode in range(work.episodes)]

    def tool(episode: int) -> Callable[[str], str]:
        turns = iter(range(1, TURNS + 1))
        return lambda shelf: tool_result(work, episode, next(turns))

    def run(seed: int) -> Counts:
        torch.manual_seed(seed)
        # What `GRPOTrainer` does before it generates: one set of tools for each episode.
        trainer._sync_tool_dicts = [{"look_up": tool(episode)} for episode in range(work.episodes)]
        trainer._async_tool_dicts = [{} for _ in range(work.episodes)]
        _, _, mask, completions, *_ = trainer._generate(prompts)
        turns = (sum(message["role"] == "assistant" for message in messages) for messages in completions)
        return Counts(tuple(turns), tuple(sum(row) for row in mask))

    run.folder = folder  # deleted with it
    return Contestant("trl", run, f"TRL {trl.__version__} GRPOTrainer's own generation and tool loop")


def _vllm(setting: Setting) -> Contestant:
    import vllm

    work, chat, script = setting.work, setting.chat, setting.script
    folder = tempfile.TemporaryDirectory()
    setting.model.save_pretrained(folder.name)
    chat.tokenizer.save_pretrained(folder.name)
    llm = vllm.LLM(
        model=folder.name,
        dtype=str(setting.model.dtype).removeprefix("torch."),
        max_model_len=setting.max_len,
        max_num_seqs=work.episodes,
        gpu_memory_utilization=0.3,
        enable_prefix_caching=True,
    )

    def run(seed: int) -> Counts:
        histories = Histories(work, chat)
        llm.reset_prefix_cache()  # another step's weights would be others
        for turn in range(TURNS):
            # It runs the model without the script, so what it samples is counted and the script's reply of the same
            # length goes into the history.
            said = [script.reply(len(ids)) for ids in histories.ids]
            params = [
                vllm.SamplingParams(
                    max_tokens=len(reply), ignore_eos=True, logprobs=0, seed=seed + turn, detokenize=False
                )
                for reply in said
            ]
            outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids in histories.ids], params, use_tqdm=False)
            for episode, output in enumerate(outputs):
                histories.reply(episode, said[episode][-len(output.outputs[0].token_ids) :])
        return histories.counts()

    run.folder = folder  # deleted with it
    return Contestant(
        "vllm", run, f"vLLM {vllm.__version__}, a batch per turn, prefix cache; no script: replies of the same lengths"
    )
