"""What the project promises in docs/security.md, as far as it can be read off the code or tried."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest
import torch
from chat_models import QWEN25, make_tokenizer
from jinja2.exceptions import SecurityError
from lamp_environment import small_model
from transformers import AutoTokenizer

from autotool_fast import memory
from autotool_fast.chat import chat_format
from autotool_fast.checkpoint import Checkpoint
from autotool_fast.config import RolloutConfig, from_dict
from autotool_fast.errors import UserError
from autotool_fast.pipeline import load_model, load_tokenizer
from autotool_fast.tasks.example import Example

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("autotool_fast", "kernels", "csrc") for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "torch.load", "np.load",
    "numpy.load", "joblib.load", "yaml.load", "marshal.loads", "shelve.open", "pd.read_pickle", "runpy.run_path",
}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "http.server", "socketserver"}


def calls_in(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_is_unpickled_and_no_text_becomes_code():
    assert len(SOURCES) > 80
    found = [(path.name, name) for path in SOURCES for name, _ in calls_in(path) if name in FORBIDDEN_CALLS]
    assert found == []


def test_no_module_that_unpickles_or_listens_is_imported():
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path.name, name) for name in names if name in FORBIDDEN_MODULES]
    assert found == []


def test_no_shell_is_asked():
    options = [
        (path.name, name)
        for path in SOURCES
        for name, call in calls_in(path)
        for keyword in call.keywords
        if keyword.arg == "shell"
    ]
    assert options == []


def test_every_model_is_loaded_without_pickles_and_without_code_of_its_own():
    seen = 0
    for path in SOURCES:
        for name, call in calls_in(path):
            if not name.endswith(".from_pretrained"):
                continue
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            seen += 1
            if "Auto" in name:
                assert options.get("trust_remote_code") in ("False", "own_code"), (path.name, name)
            if "Model" in name or name.startswith("type("):
                assert options.get("use_safetensors") == "True", (path.name, name)
    assert seen >= 4


def test_files_of_a_user_s_choice_are_imported_in_the_sandbox_alone():
    found = {
        path.parent.name
        for path in SOURCES
        for name, _ in calls_in(path)
        if name.endswith(("spec_from_file_location", "exec_module"))
    }
    assert found <= {"sandbox", "autotool_kernels"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(QWEN25)
    small_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_code(source: Path, folder: Path) -> Path:
    """The model with code of its own, which leaves a mark when it runs."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_kind", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\n"
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
        "class OwnConfig(Qwen2Config):\n    model_type = 'own_kind'\n"
        "class Own(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    )
    return folder


def test_a_model_s_own_code_runs_only_when_asked_for(model, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = with_code(model, tmp_path / "own")
    for load in (load_model, lambda path: memory.shape_of(str(path))):
        with pytest.raises(UserError, match=r"add --model\.trust-remote-code") as caught:
            load(folder)
        assert len(str(caught.value).splitlines()) == 1
    assert not (folder / "ran").exists()
    load_model(folder, own_code=True)
    assert (folder / "ran").exists()
    assert from_dict({}).model.trust_remote_code is False


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickled_weights_are_refused_unread(model, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save({"model.embed_tokens.weight": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no model that can be loaded"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def copied(model: Path, folder: Path, **config: object) -> Path:
    """The model with other settings in its config."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_pickles_that_an_index_or_a_config_names_are_refused_unread(model, tmp_path):
    indexed = copied(model, tmp_path / "a")
    named = copied(model, tmp_path / "b", transformers_weights="adapter_model.bin")
    (indexed / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.embed_tokens.weight": "more.bin"}}
    (indexed / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder, name in ((indexed, "more.bin"), (named, "adapter_model.bin")):
        torch.save({"model.embed_tokens.weight": torch.zeros(1)}, folder / name)
        with pytest.raises(UserError, match=f"its weights are in {name}, which is no safetensors file"):
            load_model(folder)
    checkpoint = Checkpoint(tmp_path / "c", step=1)
    checkpoint.path.mkdir()
    indexed.rename(checkpoint.model)
    with pytest.raises(ValueError, match=r"more\.bin, which is no safetensors file"):
        checkpoint.load_weights(load_model(model))


def test_a_folder_cannot_send_the_trainer_to_another_model(model, tmp_path):
    other = copied(model, tmp_path / "other")
    folder = copied(model, tmp_path / "own")
    pointer = {"base_model_name_or_path": str(other), "peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(pointer))
    with pytest.raises(UserError, match="it is an adapter: give the model into which it is merged"):
        load_model(folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_that_a_config_names_are_not_fetched(model, tmp_path, key):
    folder = copied(model, tmp_path / "own", **{key: "someone/kernel"})
    assert load_model(folder).config._attn_implementation == load_model(model).config._attn_implementation
    assert memory.shape_of(str(folder)) == memory.shape_of(str(model))


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
)
def test_a_config_that_makes_no_model_is_one_line(model, tmp_path, config):
    folder = copied(model, tmp_path / "own", **config)
    with pytest.raises(UserError, match="holds no model that can be loaded") as caught:
        load_model(folder)
    assert len(str(caught.value).splitlines()) == 1
    if "quantization_config" not in config:
        with pytest.raises(UserError, match=r"a config\.json that cannot be read"):
            memory.shape_of(str(folder))


def test_a_template_cannot_reach_the_interpreter(model, tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    mark = tmp_path / "ran"
    attack = f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    (folder / "chat_template.jinja").write_text(QWEN25 + attack)
    with pytest.raises((UserError, SecurityError)):
        chat_format(load_tokenizer(str(folder)), "qwen2.5").encode_prompt([{"role": "user", "content": "x"}], [])
    assert not mark.exists()


def test_templates_and_paths_in_data_are_text(model, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    texts = ["{{ 7 * 191 }}", "{% include 'x' %}", str(secret), f"file://{secret}", "http://127.0.0.1:9/x"]
    chat = chat_format(AutoTokenizer.from_pretrained(model), "auto")
    tool = {
        "name": "look",
        "description": texts[0],
        "parameters": {"type": "object", "properties": {"x": {"$ref": texts[3]}}},
    }
    example = Example.from_json(
        {
            "tools": [{"type": "function", "function": tool}],
            "messages": [{"role": "user", "content": " ".join(texts)}],
            "answer": [{"name": "look", "arguments": {"x": texts[2]}}],
        }
    )
    shown = chat.decode(chat.encode_prompt(list(example.messages), list(example.tools)))
    assert all(text in shown for text in texts)
    assert "1337" not in shown
    assert "the secret" not in shown


def test_addresses_that_have_a_default_are_on_this_machine():
    assert RolloutConfig().server.startswith("http://127.0.0.1:")
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert "0.0.0.0" not in text
