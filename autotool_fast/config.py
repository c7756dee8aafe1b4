"""Every setting of a training run, as frozen dataclasses.

Guarantees: a `TrainConfig` that exists is valid (types, ranges and combinations are checked on construction,
as `UserError` with the dotted name of the setting), and importing this module loads neither torch nor
transformers nor numpy. Presets and the command line are in `cli.py`, the plan of `--dry-run` in `plan.py`.

To add a setting, add its line and the docstring under it: the command line, the presets, the help text, the
bounds check and config.json follow from that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from autotool_fast import schema
from autotool_fast.schema import Section, number

Stage = Literal["base", "label", "warmup", "distill", "refine", "rl", "eval"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Arm = Literal["none", "fixed", "adaptive", "decoupled-fixed", "decoupled"]
Start = Literal["cold", "noisy", "clean"]
OptimizerKind = Literal["adamw", "adamw-8bit", "offload"]
Family = Literal["set", "parallel", "irrelevant", "missing", "hop", "reg", "cups", "chain"]
LabelRule = Literal["any", "threshold"]
Dialogues = Literal["multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context"]
MULTI_TURN: tuple[Dialogues, ...] = get_args(Dialogues)
FLASH_MODULES = ("flash_attn_interface", "flash_attn")
"""What flash-attn is imported by: its third version, and the second."""


@dataclass(frozen=True)
class WorldConfig(Section):
    """The embedded tool world: which tasks are drawn and how hard they are."""

    section: ClassVar[str] = "world"

    families: tuple[Family, ...] = ("set", "hop", "reg", "irrelevant")
    """Task families to draw from."""
    max_difficulty: int = number(6, low=0)
    """Largest difficulty k drawn."""
    easy_share: float = number(0.6, low=0.0, high=1.0)
    """Share of tasks of difficulty 0 among label, refinement and RL prompts."""

    def validate(self) -> None:
        self.require(bool(self.families), "families", "must name at least one family")
        self.require(len(set(self.families)) == len(self.families), "families", "names a family twice")


@dataclass(frozen=True)
class DataConfig(Section):
    """Prepared data sets, in place of the embedded world; they need a pretrained model."""

    section: ClassVar[str] = "data"

    path: str = ""
    """Folder that `python -m autotool_fast.data prepare` wrote; empty: the embedded world. Short form: --data."""
    strict: bool = False
    """Tell 3 from 3.0 when arguments are compared."""


@dataclass(frozen=True)
class EnvironmentConfig(Section):
    """Simulators or your own tools as a source of RL prompts and held-out tasks; they need a pretrained model. What is
    labelled and warmed up on is prepared data in any case."""

    section: ClassVar[str] = "environment"

    kind: Literal["none", "bfcl", "tools"] = "none"
    """bfcl: the multi-turn entries of a folder with the layout of the bfcl-eval package; tools: your own tools and
    problems. Short form: --environment."""
    path: str = ""
    """bfcl: that folder; empty: the installed package."""
    categories: tuple[Dialogues, ...] = ("multi_turn_base",)
    """bfcl: which entries."""
    tools: str = ""
    """tools: a Python file of functions. It is run, in a sandbox (docs/security.md); nothing else names code to run."""
    problems: str = ""
    """tools: a JSONL file of problems (docs/tools.md)."""
    share: float = number(1.0, above=0.0, high=1.0)
    """Share of the RL prompts that come from the environment; the rest comes from prepared data."""
    test_share: float = number(0.2, above=0.0, below=1.0)
    """Share of the entries held out for evaluation."""
    call_deadline_s: float = number(5.0, above=0.0)
    """Seconds that a call may take (bfcl: all calls of one reply); then the episode is over and wrong."""
    result_chars: int = number(4000, low=100)
    """tools: characters of a result that the model reads; a longer one is cut in the middle."""
    memory_mib: int = number(1024, low=128)
    """tools: address space of an episode's process, MiB, with what the file imports."""
    network: bool = False
    """tools: let them use the network."""
    slow_call_s: float = number(2.0, above=0.0)
    """Seconds with nothing to do but wait for calls, after which progress names problems and tools."""

    def validate(self) -> None:
        self.require(bool(self.categories), "categories", "must name at least one category")
        for name in ("tools", "problems"):
            given, wanted = bool(getattr(self, name)), self.kind == "tools"
            self.require(given or not wanted, name, "is needed with environment.kind tools", "name a file")
            remedy = "add --environment tools"
            self.require(wanted or not given, name, f"has no effect with environment.kind {self.kind}", remedy)


@dataclass(frozen=True)
class ModelConfig(Section):
    """A pretrained model, or the embedded one: a Qwen3 decoder trained from scratch, embeddings tied."""

    section: ClassVar[str] = "model"

    path: str = ""
    """Folder or hub name of a pretrained decoder; empty: the embedded model. Short form: --model."""
    chat_format: Literal["auto", "qwen2.5", "qwen3", "hermes", "llama3.1"] = "auto"
    """Chat format of a pretrained model; auto: recognised by its template and special tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. With bfloat16 the optimizer keeps float32 copies and gradients are summed in float32."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """Attention of the training forward. flash: flash-attn; varlen: torch's variable-length attention, both for 16-bit
    weights on a GPU; sdpa: torch's padded one, anywhere; auto: the first of them that is there and fits."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model's files. Without it a model that needs such code is refused."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for one more forward pass."""
    layers: int = number(2, low=1)
    """Decoder layers, here and below of the embedded model."""
    hidden: int = number(64, low=8)
    """Hidden size."""
    heads: int = number(4, low=1)
    """Attention heads."""
    head_dim: int = number(32, low=2)
    """Size of a head, an even number."""
    kv_heads: int = number(4, low=1)
    """Key-value heads."""
    intermediate: int = number(192, low=8)
    """Width of the gated MLP."""
    max_positions: int = number(256, low=16)
    """Longest sequence, in tokens; also the length of a rollout slot."""
    rope_theta: float = number(3_000.0, above=0.0)
    """Base of the rotary position frequencies."""
    initializer_range: float = number(0.1, above=0.0)
    """Standard deviation of the initial weights."""
    qk_norm_init: float = number(1.2, above=0.0)
    """Initial gain of the query and key norms."""

    def validate(self) -> None:
        self.require(self.heads % self.kv_heads == 0, "heads", "must be a multiple of model.kv_heads")
        self.require(self.head_dim % 2 == 0, "head_dim", "must be even")

    def parameters(self, vocab: int) -> int:
        """Number of parameters of the Qwen3 model with `vocab` tokens and tied embeddings."""
        head = self.head_dim
        attention = 2 * self.hidden * head * (self.heads + self.kv_heads) + 2 * head
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return vocab * self.hidden + self.layers * layer + self.hidden


@dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank adapters for a pretrained model (needs peft): far less memory for gradients and optimizer."""

    section: ClassVar[str] = "lora"

    rank: int = number(0, low=0)
    """Rank of the adapters of every linear layer but the head; 0: all weights are trained."""
    alpha: float = number(32.0, above=0.0)
    """Scale: the addition is multiplied by alpha / rank."""


@dataclass(frozen=True)
class OptimConfig(Section):
    """Memory of the optimizer, in every stage that trains."""

    section: ClassVar[str] = "optim"

    kind: OptimizerKind = "adamw"
    """adamw: float32 moments; adamw-8bit: 8-bit ones, a quarter of the memory (needs torchao); offload: moments,
    gradients and float32 copies in the machine's memory instead of the GPU's, slower steps, one process."""


@dataclass(frozen=True)
class SftConfig(Section):
    """Supervised training: linear warm-up, constant rate, linear decay over the last 30 % of the steps."""

    steps: int = number(150, low=0)
    """Optimizer steps."""
    batch: int = number(96, low=1)
    """Sequences per step."""
    lr: float = number(1e-3, above=0.0)
    """Peak learning rate."""
    warmup_steps: int = number(10, low=0)
    """Steps of linear warm-up."""
    weight_decay: float = number(0.01, low=0.0)
    """Decoupled weight decay."""
    grad_clip: float = number(1.0, above=0.0)
    """Largest gradient norm."""
    checkpoint_every: int = number(0, low=0)
    """Steps between checkpoints; 0: only on Ctrl-C."""

    def validate(self) -> None:
        if self.steps:
            limit = f"must be less than {self.dotted('steps')}"
            self.require(self.warmup_steps < self.steps, "warmup_steps", limit)


@dataclass(frozen=True)
class BaseConfig(SftConfig):
    """Stage base: the tiny model learns both modes on every task, tags drawn 50/50."""

    section: ClassVar[str] = "base"

    steps: int = number(1400, low=0)
    """Optimizer steps."""
    lr: float = number(2e-3, above=0.0)
    """Peak learning rate."""
    warmup_steps: int = number(50, low=0)
    """Steps of linear warm-up."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """adamw; or Muon for the decoder's weight matrices, with AdamW for the rest."""
    easy_share: float = number(0.15, low=0.0, high=1.0)
    """Share of easy tasks: they are learnt long before the others."""
    reuse: str = ""
    """A trained base model folder (models/base of another run) to take over instead of training one."""


@dataclass(frozen=True)
class LabelConfig(Section):
    """Stage label: k samples per prompt and forced mode decide between the short and the long answer."""

    section: ClassVar[str] = "label"

    prompts: int = number(1200, low=1)
    """Prompts to label."""
    k: int = number(8, low=1)
    """Samples per prompt and mode."""
    rule: Literal["start", "any", "threshold"] = "start"
    """any: short if one no-think sample is right; threshold: short if the share of right ones reaches
    label.threshold; start: the rule that --start names."""
    threshold: float = number(0.5, above=0.0, high=1.0)
    """Share of right samples from which the short answer is the label."""
    unsolved: Literal["drop", "short"] = "drop"
    """Prompts that neither mode solves. drop: left out of the warm-up; short: labelled with the reference answer."""
    teacher: str = ""
    """Who thinks for the long labels: a model folder, the http address of an OpenAI-compatible server (up to /v1),
    or data for the data set's own reasoning; empty: the base model itself."""
    teacher_model: str = ""
    """Name the server knows the teacher by."""
    teacher_switch: Literal["tag", "enable_thinking"] = "enable_thinking"
    """How a server's model is made to think: by the mode tag, or by its chat template's own switch."""
    teacher_temperature: float = number(1.0, low=0.0)
    """Sampling temperature of the teacher."""


@dataclass(frozen=True)
class WarmupConfig(SftConfig):
    """Stage warmup: SFT on the labelled mix of long and short answers."""

    section: ClassVar[str] = "warmup"


@dataclass(frozen=True)
class DistillConfig(SftConfig):
    """Stage distill: the always-think SFT baseline, on the same prompts as the warm-up."""

    section: ClassVar[str] = "distill"

    steps: int = number(0, low=0)
    """Optimizer steps; 0: as many as warm-up and RL together."""


@dataclass(frozen=True)
class RefineConfig(Section):
    """Stage refine: choose the RL prompts by difficulty and by reward variance over short GRPO rounds."""

    section: ClassVar[str] = "refine"

    enabled: bool = True
    """Off: RL draws from the whole pool."""
    prompts: int = number(960, low=1)
    """Size of the prompt pool, before refinement."""
    rounds: int = number(3, low=2)
    """GRPO rounds over which the reward variance of a prompt is measured."""
    drop_easy: float = number(0.5, low=0.0, high=1.0)
    """Share dropped of the prompts whose samples are all right."""
    drop_hard: float = number(0.5, low=0.0, high=1.0)
    """Share dropped of the prompts whose samples are all wrong."""
    keep: float = number(0.5, above=0.0, high=1.0)
    """Share kept of the rest, lowest variance over rounds first."""
    rank: Literal["all", "informative"] = "informative"
    """all: every remaining prompt is ranked by its variance; informative: those whose reward never moved come
    last."""


@dataclass(frozen=True)
class RLConfig(Section):
    """Stage rl: GRPO with the entropy arm that --arm names."""

    section: ClassVar[str] = "rl"

    steps: int = number(240, low=0)
    """Optimizer steps, one per rollout batch."""
    prompts_per_step: int = number(24, low=1)
    """Prompts (groups) per step."""
    group_size: int = number(8, low=2)
    """Responses per prompt."""
    lr: float = number(3e-4, above=0.0)
    """Peak learning rate."""
    warmup_steps: int = number(0, low=0)
    """Steps of linear warm-up."""
    decay: float = number(0.0, low=0.0, high=1.0)
    """Share of the steps, at the end, over which the rate falls linearly; 0: constant."""
    weight_decay: float = number(0.0, low=0.0)
    """Decoupled weight decay."""
    grad_clip: float = number(1.0, above=0.0)
    """Largest gradient norm."""
    clip_low: float = number(0.2, above=0.0, below=1.0)
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: float = number(0.2, above=0.0)
    """The probability ratio is clipped above at 1 + clip_high."""
    importance_cap: float = number(2.0, low=1.0)
    """With rollout.backend vllm, in place of the clip: each token's policy gradient is weighted by the ratio of the
    trainer's probability to the server's, cut to this."""
    normalize: Literal["sequences", "tokens"] | float = number("tokens", above=0.0)  # type: ignore[arg-type]
    """sequences: mean per response, then over responses; tokens: mean over all trained tokens; a number: the
    sum over trained tokens divided by it."""
    constant_groups: Literal["entropy", "exclude"] = "entropy"
    """Groups without a reward difference. entropy: they keep their entropy term; exclude: they leave the loss
    and its normaliser."""
    temperature: float = number(1.0, above=0.0)
    """Sampling temperature of the rollouts."""
    correct_short: float = 1.0
    """Reward of a right answer without thinking."""
    correct_long: float = 0.5
    """Reward of a right answer with thinking."""
    wrong_long: float = -0.5
    """Reward of a wrong answer with thinking."""
    wrong_short: float = -1.0
    """Reward of a wrong answer without thinking."""
    malformed: float = -1.5
    """Reward of a reply that breaks the format or runs out of budget."""
    format_mode: Literal["gate", "add"] = "gate"
    """gate: rl.malformed replaces the reward of the answer; add: it is added to it."""
    entropy_scope: Literal["reply", "think", "mode", "blend"] = "reply"
    """Tokens over which a response's entropy is averaged: all sampled ones, the thinking, the mode tag, or
    half the mode tag and half the reply."""
    target_mode: Literal["absolute", "relative"] = "absolute"
    """absolute: the targets are rl.target_short and rl.target_long; relative: rl.target_ratio times the
    entropies measured before the first step."""
    target_short: float = number(0.1, low=0.0)
    """Entropy target H_s of short responses, nats."""
    target_long: float = number(0.2, low=0.0)
    """Entropy target H_l of long responses, nats."""
    target_ratio: float = number(1.0, above=0.0)
    """Factor on the measured entropies when rl.target_mode is relative."""
    beta_short: float = number(0.0, low=0.0)
    """Entropy coefficient of short responses."""
    beta_long: float = number(0.01, low=0.0)
    """Entropy coefficient of long responses; where it starts, if the arm adapts it."""
    beta_lr: float = number(0.01, above=0.0)
    """Step size of the decoupled controller: change of beta per nat of missing entropy and step."""
    beta_delta: float = number(0.005, above=0.0)
    """Step of the single-coefficient adaptive arm, towards its target."""
    beta_max: float = number(0.5, above=0.0)
    """Upper clamp of an adapted coefficient; the lower one is 0."""
    micro_tokens: int = number(8192, low=1)
    """Most tokens in one forward pass of the update, a shared prompt counted once; the loss does not depend on it."""
    share_prompts: bool = True
    """Compute the prompt of a group once for all of its responses that share a forward pass."""
    old_logp: Literal["auto", "sampler", "trainer"] = "auto"
    """Log-probs that the probability ratio is taken to. sampler: those recorded in the rollout; trainer: its own before
    the update; auto: the sampler's while they agree within rl.mismatch_limit. A rollout server's are always used."""
    mismatch_limit: float = number(0.02, low=0.0)
    """Largest mean distance between sampler's and trainer's log-probs, nats, at which auto uses the sampler's."""
    eval_every: int = number(20, low=0)
    """Steps between evaluations on a small test sample; 0: never."""
    checkpoint_every: int = number(40, low=0)
    """Steps between checkpoints; 0: only on Ctrl-C."""
    keep_checkpoints: int = number(2, low=1)
    """Checkpoints kept, newest first."""

    def validate(self) -> None:
        self.require(self.correct_short > self.wrong_short, "correct_short", "must be greater than rl.wrong_short")
        self.require(self.beta_long <= self.beta_max, "beta_long", "must be at most rl.beta_max")
        self.require(self.beta_short <= self.beta_max, "beta_short", "must be at most rl.beta_max")


@dataclass(frozen=True)
class RolloutConfig(Section):
    """Budgets of one episode, what generates, and its size."""

    section: ClassVar[str] = "rollout"

    backend: Literal["engine", "vllm"] = "engine"
    """engine: the trainer's own, on the same weights; vllm: a vLLM server, which a pretrained model can use."""
    server: str = "http://127.0.0.1:8000"
    """Address of the vLLM server. Its API key, if any, is read from the environment variable VLLM_API_KEY."""
    served_model: str = ""
    """Name the server knows the model by; empty: that of model.path."""
    sync: Literal["folder", "nccl"] = "folder"
    """How weights get to the server. folder: through the run folder, which it must see; nccl: from GPU to GPU, with
    vLLM installed here too."""
    timeout_s: float = number(600.0, above=0.0)
    """Seconds that the server may take for one answer."""
    slots: int = number(96, low=1)
    """Sequences decoded at once; with a server, requests under way at once."""
    prefill_chunk: int = number(64, low=1)
    """Tokens entering the cache per prefill call and sequence."""
    cuda_graphs: bool = True
    """On a GPU the trainer's own engine decodes by captured CUDA graphs; off: kernel by kernel."""
    max_turns: int = number(6, low=1)
    """Assistant replies per episode."""
    max_new_tokens: int = number(128, low=1)
    """Sampled tokens per episode."""
    max_turn_tokens: int = number(64, low=1)
    """Sampled tokens per reply."""
    max_calls: int = number(12, low=1)
    """Tool calls per episode."""
    deadline_s: float = number(60.0, above=0.0)
    """Wall-clock limit of one episode, seconds."""

    def validate(self) -> None:
        fits = self.max_turn_tokens <= self.max_new_tokens
        self.require(fits, "max_turn_tokens", "must be at most rollout.max_new_tokens")
        address = self.server.startswith(("http://", "https://")) and bool(self.server.partition("://")[2])
        self.require(address, "server", f"{self.server!r} is no http address", "write it like http://127.0.0.1:8000")


@dataclass(frozen=True)
class EvalConfig(Section):
    """Stage eval, and the smaller evaluations during RL."""

    section: ClassVar[str] = "eval"

    per_cell: int = number(20, low=1)
    """Held-out tasks per family and difficulty in the final evaluation."""
    interim_per_cell: int = number(4, low=1)
    """Held-out tasks per family and difficulty in an evaluation during RL."""
    temperature: float = number(0.0, low=0.0)
    """Sampling temperature; 0 is greedy."""


@dataclass(frozen=True)
class AlarmsConfig(Section):
    """When the RL stage says that something goes wrong (docs/metrics.md); the training is not changed by it."""

    section: ClassVar[str] = "alarms"

    enabled: bool = True
    """Off: nothing is watched."""
    window: int = number(10, low=1)
    """Steps whose means are judged; also how long an alarm outlasts its condition."""
    entropy_high: float = number(0.6, above=0.0)
    """Explosion: mean entropy from which it is one, nats, ..."""
    entropy_rise: float = number(4.0, low=1.0)
    """... if it is also this many times that of the first steps."""
    entropy_low: float = number(0.005, low=0.0)
    """Collapse: mean entropy below which it is one, nats, ..."""
    entropy_fall: float = number(0.05, low=0.0, below=1.0)
    """... or this share of that of the first steps."""
    accuracy_drop: float = number(0.1, above=0.0, high=1.0)
    """Reward without answers: share of solved tasks lost since the best steps while reward or form gained."""
    format_change: float = number(0.2, above=0.0, high=1.0)
    """Share of responses whose form must have changed: malformed since the first steps (loss of format), or well formed
    since the best ones."""
    truncated: float = number(0.2, above=0.0, high=1.0)
    """Share of responses that run out of a budget."""
    mismatch: float = number(0.05, above=0.0)
    """Mean distance between the sampler's and the trainer's log-probs, nats."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """Train a model that learns when to think before it calls a tool."""

    preset: str = "mini"
    """Named preset (mini, smoke, mini-full, qwen2.5-7b, ...) or the path of a .toml file."""
    arm: Arm = "decoupled"
    """Entropy arm of the RL stage; none is plain GRPO."""
    start: Start = "clean"
    """Where RL starts: cold, from the base model without warm-up; noisy, after a warm-up on any-of-k labels;
    clean, after a warm-up on threshold labels."""
    stages: tuple[Stage, ...] = STAGES
    """Stages to run, always in this order; distill is the always-think SFT baseline."""
    seed: int = number(0, low=0, below=2**31)
    """Seed of everything random."""
    out: str = ""
    """Run folder; runs/<preset> if not given."""
    resume: bool = False
    """Continue the run in the run folder."""
    overwrite: bool = False
    """Replace the run in the run folder."""
    dry_run: bool = False
    """Check the settings, print the plan and stop."""
    profile: bool = False
    """Write a trace of a few steps of each stage and a table of where its time goes into the run's profile/."""
    profile_steps: int = number(1, low=1)
    """Steps in the trace of a stage, after the first two."""
    threads: int = number(1, low=1)
    """CPU threads per process."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where models live. The embedded model is too small to gain from a GPU."""
    world: WorldConfig = field(default_factory=WorldConfig)
    data: DataConfig = field(default_factory=DataConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)

    def validate(self) -> None:
        self.require(bool(self.stages), "stages", "must name at least one stage")
        self.require(not (self.resume and self.overwrite), "resume", "cannot be combined with --overwrite")
        object.__setattr__(self, "stages", tuple(s for s in STAGES if s in self.stages))
        if not self.out:
            object.__setattr__(self, "out", f"runs/{Path(self.preset).name.removesuffix('.toml') or 'run'}")
        able = bool(self.model.path) or not self.data.path
        self.require(able, "data.path", "needs a pretrained model", "add --model")
        able = bool(self.model.path) or not self.lora.rank
        self.require(able, "lora.rank", "needs a pretrained model", "add --model")
        able = bool(self.model.path) or self.rollout.backend == "engine"
        self.require(able, "rollout.backend", "vllm needs a pretrained model", "add --model")
        able = self.device == "cuda" or self.rollout.backend == "engine" or self.rollout.sync != "nccl"
        self.require(able, "rollout.sync", "nccl needs a GPU here too", "add --device cuda, or use folder")
        able = self.model.attention in ("auto", "sdpa") or (self.device == "cuda" and self.model.dtype == "bfloat16")
        remedy = "add --device cuda --model.dtype bfloat16, or use auto"
        self.require(able, "model.attention", f"{self.model.attention} needs a GPU and 16-bit weights", remedy)
        able = self.device == "cuda" or self.optim.kind != "offload"
        remedy = "add --device cuda, or use adamw-8bit"
        self.require(able, "optim.kind", "offload moves state away from a GPU, and there is none", remedy)
        self._check_environment()
        budget = self.rollout.max_new_tokens
        fits = budget < self.model.max_positions
        self.require(fits, "rollout.max_new_tokens", "must be less than model.max_positions")
        pool = self.refine.prompts >= self.rl.prompts_per_step
        self.require(pool, "refine.prompts", "must be at least rl.prompts_per_step")

    def _check_environment(self) -> None:
        if self.environment.kind == "none":
            return
        self.require(bool(self.model.path), "environment.kind", "needs a pretrained model", "add --model")
        if self.data.path:
            return
        share = self.environment.share == 1.0
        self.require(share, "environment.share", "must be 1 without prepared data", "add --data")
        learn = {"label", "distill"} | ({"warmup"} if self.start != "cold" else set())
        for stage in self.stages:
            source = "simulators give" if self.environment.kind == "bfcl" else "your problems give"
            problem = f"stage {stage} needs prepared data: {source} no replies to learn from"
            remedy = "add --data, or train without a warm-up: --start cold --stages refine,rl,eval"
            self.require(stage not in learn, "stages", problem, remedy)

    @property
    def label_rule(self) -> LabelRule:
        """The labelling rule in force: `label.rule`, or the one that `start` names."""
        if self.label.rule != "start":
            return self.label.rule
        return "any" if self.start == "noisy" else "threshold"

    @property
    def distill_steps(self) -> int:
        """Updates of the always-think baseline: `distill.steps`, or as many as warm-up and RL together."""
        warmup = 0 if self.start == "cold" else self.warmup.steps
        return self.distill.steps or warmup + self.rl.steps


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The settings as nested JSON-able dicts."""
    return schema.to_dict(config)


def from_dict(values: dict[str, Any], *, source: str | None = None) -> TrainConfig:
    """Settings from nested dicts; `source` (a file name) is named when a key is unknown.

    Raises:
        UserError: an unknown key, a bad type or value, or settings that do not fit together.
    """
    return schema.from_dict(TrainConfig, values, source=source)


def parse_args(argv: Sequence[str] | None = None) -> TrainConfig:
    """Settings from the command line: defaults < preset < options.

    Raises:
        UserError: anything wrong with the options or the preset.
        SystemExit: code 0, after printing the help text.
    """
    from autotool_fast.cli import parse

    return parse(argv)
