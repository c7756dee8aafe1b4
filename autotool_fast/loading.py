"""Models and tokenizers of others: weights in safetensors, and no code of theirs that nobody asked for.

Every model folder and hub name that a user may have downloaded is loaded here. transformers closes the ordinary ways to
code, pickled weight files and modules beside the weights. Four more are closed here: a config may name kernels of the
hub for attention and experts (not taken over: what computes is the trainer's choice), a config or an index of
weight files may name pickles (refused), and an adapter beside the config another model altogether (refused).

Anything that is wrong with a folder is one exception, `Unusable`; which setting to blame is left to the callers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from autotool_fast.checkpoint import no_progress_bars

_ERRORS = (
    OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, ImportError, ArithmeticError,
    AssertionError, SafetensorError, StrictDataclassError,
)  # fmt: skip


class Unusable(Exception):
    """A model, config or tokenizer cannot be loaded; why, in one line.

    Attributes:
        absent: whether there is none, or none that can be reached.
        brings_code: whether it needs code of its own, which was not asked for.
    """

    def __init__(self, error: Exception) -> None:
        # A strict dataclass says on its first line where, on the others what.
        text = str(error) if isinstance(error, StrictDataclassError) else str(error).partition("\n")[0]
        super().__init__(" ".join(text.split()) or type(error).__name__)
        self.absent = isinstance(error, OSError)
        self.brings_code = "trust_remote_code" in str(error)

    @property
    def code_remedy(self) -> str | None:
        """What to do about code of its own, or None when it is something else."""
        return "read the model's own code, then add --model.trust-remote-code to run it" if self.brings_code else None


@contextmanager
def _usable() -> Iterator[None]:
    try:
        with no_progress_bars():
            yield
    except _ERRORS as error:
        raise Unusable(error) from error


def read_config(source: str | Path, *, local: bool, own_code: bool = False) -> PreTrainedConfig:
    """The config of a model folder, or of a model of the hub.

    Args:
        local: download nothing.
        own_code: run code that comes with the model, if it has any.

    Raises:
        Unusable: there is none, or a damaged one.
    """
    with _usable():
        config = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=own_code)
        config._attn_implementation = config._experts_implementation = None
        return config


def empty_model(config: PreTrainedConfig, *, own_code: bool = False) -> PreTrainedModel:
    """The model of a config on torch's meta device, which takes no memory.

    Raises:
        Unusable: the config describes no model.
    """
    with _usable(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=own_code)


def read_model(source: str | Path, *, dtype: torch.dtype | str, local: bool, own_code: bool = False) -> PreTrainedModel:
    """A model with its weights, on the CPU; options as in `read_config`.

    Raises:
        Unusable: there is none, or a damaged one, or its weights are not in safetensors.
    """
    config = read_config(source, local=local, own_code=own_code)
    with _usable():
        refuse_adapters(source, local=local)
        refuse_pickles(source, local=local, chosen=getattr(config, "transformers_weights", None))
        return AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            local_files_only=local,
            use_safetensors=True,
            trust_remote_code=own_code,
        )


def read_tokenizer(source: str | Path, *, local: bool, own_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; options as in `read_config`.

    Raises:
        Unusable: there is none, or a damaged one.
    """
    with _usable():
        return AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=own_code)


def refuse_adapters(source: str | Path, *, local: bool) -> None:
    """See to it that a model is not an adapter, for which transformers would load the model that the adapter names.

    Raises:
        ValueError: it is one.
    """
    with suppress(OSError):
        if cached_file(str(source), "adapter_config.json", local_files_only=local):
            raise ValueError("it is an adapter: give the model into which it is merged (a run's are in models/)")


def refuse_pickles(source: str | Path, *, local: bool, chosen: Any = None) -> None:
    """See to it that a model's weights are in safetensors, whatever its index of files says.

    Args:
        chosen: the file or index that the config names, if it does.

    Raises:
        ValueError: they are not.
    """
    name = str(chosen or SAFE_WEIGHTS_INDEX_NAME)
    files = [name]
    if name.endswith(".index.json"):
        index = None
        with suppress(OSError):  # there is none, or what loads the weights says why it cannot be had
            index = cached_file(str(source), name, local_files_only=local)
        found = json.loads(Path(index).read_text(encoding="utf-8")) if index else {"weight_map": {}}
        files = [str(file) for file in found["weight_map"].values()]
    for file in files:
        if not file.endswith(".safetensors"):
            raise ValueError(f"its weights are in {file}, which is no safetensors file")
