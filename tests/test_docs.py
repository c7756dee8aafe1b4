"""What the documents say can be done: links lead somewhere, commands are taken, code runs, extras and presets exist."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from autotool_fast.config import parse_args

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "kernels" / "README.md"], key=lambda p: p.as_posix()
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LAUNCHED = re.compile(
    r"(?:python3?|torchrun)\b.*?\s-m\s+(?:--\s+)?((?:autotool_fast|autotool_kernels|benchmarks)[\w.]*)(.*)"
)
MODULES = ("autotool_fast.train", "autotool_fast.eval", "autotool_fast.data", "benchmarks.rollout")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return {slug(match) for match in re.findall(r"^#+\s+(.*)$", text, re.MULTILINE)}


def commands(path: Path) -> list[str]:
    """Command lines of a document: in fenced blocks without a language, and in inline code."""
    text = path.read_text(encoding="utf-8")
    lines = [re.sub(r"\\\n\s*", "", body) for language, body in FENCE.findall(text) if language in ("", "bash", "sh")]
    found = [line for body in lines for line in body.splitlines()]
    found += re.findall(r"`((?:python|torchrun|make)\b[^`\n]*)`", FENCE.sub("", text))
    return [part.strip() for line in found for part in line.split(";")]


def launched(command: str) -> tuple[str, list[str]] | None:
    """(module, options) of a command that runs one of ours; its comment and placeholders for paths left out."""
    if made := re.match(r'make (train|test|bench)\s+ARGS="([^"]*)"', command):
        return ("autotool_fast.train" if made[1] == "train" else made[1]), shlex.split(made[2])
    match = LAUNCHED.search(command)
    return (match[1], shlex.split(match[2], comments=True)) if match else None


EVERY = [(name(path), *found) for path in DOCUMENTS for command in commands(path) if (found := launched(command))]


@cache
def help_of(module: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, f"python -m {module} --help: {done.stderr[-300:]}"
    return done.stdout


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{name(path)} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{name(path)} links to {target}: no such heading"


def test_enough_commands_are_found():
    count = {module: sum(m == module for _, m, _ in EVERY) for module in MODULES}
    assert all(count[module] >= 2 for module in MODULES), count
    assert count["autotool_fast.train"] >= 10


@pytest.mark.parametrize(
    ("document", "options"),
    [pytest.param(d, o, id=f"{d}-{' '.join(o)}") for d, module, o in EVERY if module == "autotool_fast.train"],
)
def test_commands_of_the_trainer_are_taken(document, options):
    if "--help" in options:
        assert "--rl.steps" in help_of("autotool_fast.train")
        return
    assert parse_args(options).stages


@pytest.mark.parametrize(
    ("document", "module", "options"),
    [
        pytest.param(d, m, o, id=f"{d}-{m} {' '.join(o)}")
        for d, m, o in EVERY
        if m not in ("autotool_fast.train", "test", "bench")
    ],
)
def test_options_of_other_commands_exist(document, module, options):
    text = help_of(module)
    if module == "autotool_fast.data" and options and not options[0].startswith("-"):
        assert options[0] in text
        text = subprocess.run(
            [sys.executable, "-m", module, options[0], "--help"], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout
    for option in options:
        if option.startswith("--") and option != "--":
            assert re.search(rf"{re.escape(option.partition('=')[0])}\b", text), f"{module} has no {option}"


def test_the_first_run_guide_works_as_printed(tmp_path):
    text = (ROOT / "docs" / "first_run.md").read_text(encoding="utf-8")
    lines = [line for language, body in FENCE.findall(text) if language == "sh" for line in body.splitlines()]
    assert len(lines) >= 8
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    written = {}
    for line in lines:
        module, options = launched(line)
        done = subprocess.run(
            [sys.executable, "-m", module, *options],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-1000:]}"
        written[line] = done.stdout
    answers = [text for line, text in written.items() if "autotool_fast.chat" in line]
    assert "thinking:" in answers[1]
    assert "call:" in answers[1]
    assert (tmp_path / "runs" / "comparison.html").exists()
    folder = tmp_path / "runs" / "smoke"
    for name in re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE):
        for file in re.findall(r"`([\w./]+)`", name):
            assert (folder / file).exists() or (folder / "models" / file).exists(), file
    staged = json.loads((tmp_path / "runs" / "staged" / "results.json").read_text(encoding="utf-8"))
    whole = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert staged["models"]["rl"] == whole["models"]["rl"]


def test_extras_and_presets_that_are_named_exist():
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    presets = {path.stem for path in (ROOT / "autotool_fast" / "presets").glob("*.toml")}
    seen = 0
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for extra in re.findall(r"autotool_fast\[(\w+)\]", text):
            seen += 1
            assert extra in extras, f"{name(path)} names the extra {extra}"
        for preset in re.findall(r"--preset ([\w.-]+)", text):
            seen += 1
            assert preset in presets or preset.endswith(".toml"), f"{name(path)} names the preset {preset}"
    assert seen > 10


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {target for path in DOCUMENTS for c in commands(path) for target in re.findall(r"^make ([a-z]+)", c)}
    assert {"train", "test"} <= named <= targets


@pytest.mark.parametrize("document", ["README.md", "kernels/README.md"])
def test_kernel_examples_run(document):
    blocks = [body for lang, body in FENCE.findall((ROOT / document).read_text(encoding="utf-8")) if lang == "python"]
    example = next(body for body in blocks if "linear_logp_entropy" in body)
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lm_head = torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32, bias=False)

        def model(self, ids):
            return type("Output", (), {"last_hidden_state": self.embed(ids)})

    model, rows = Model(), 6
    weight = torch.nn.Parameter(torch.randn(32, 8))
    names = {
        "model": model,
        "input_ids": torch.arange(rows),
        "response_rows": torch.arange(rows),
        "hidden": torch.randn(rows, 8),
        "lm_head": type("Head", (), {"weight": weight}),
        "target": torch.arange(rows),
        "labels": torch.arange(rows),
        "old_logp": torch.full((rows,), -3.0),
        "advantages": torch.tensor([1.0, -1.0]),
        "cu_seqlens": torch.tensor([0, 3, rows], dtype=torch.int32),
        "mask": torch.ones(rows, dtype=torch.bool),
        "is_short": torch.tensor([0, 1]),
        "logits": torch.randn(2, 32),
        "seed": torch.tensor([1, 2]),
        "offset": torch.tensor([0, 0]),
    }
    exec(compile(example, document, "exec"), names)
    loss = names["loss"] if "loss" in names else names["out"].loss
    assert loss.isfinite()
    if "loss" in names:
        loss.backward()
        assert weight.grad.abs().sum() > 0
    else:
        assert model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if "```python" in p.read_text(encoding="utf-8")], ids=name)
def test_examples_import_what_exists(path):
    for language, body in FENCE.findall(path.read_text(encoding="utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("autotool"):
                module = __import__(node.module, fromlist=["_"])
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


OVERRIDES = {"validate", "error"}
"""Methods of a base class that documents them."""


def undocumented(tree: ast.Module) -> list[str]:
    """Public classes and functions of a module without a docstring; kernels have comments in their place."""
    found = []

    def walk(node: ast.Module | ast.ClassDef, prefix: str) -> None:
        for child in node.body:
            if not isinstance(child, (ast.ClassDef, ast.FunctionDef)) or child.name.startswith("_"):
                continue
            decorators = " ".join(map(ast.unparse, child.decorator_list))
            exempt = "overload" in decorators or "jit" in decorators or child.name in {"main", *OVERRIDES}
            if not exempt and not ast.get_docstring(child):
                found.append(prefix + child.name)
            protocol = isinstance(child, ast.ClassDef) and any("Protocol" in ast.unparse(b) for b in child.bases)
            if isinstance(child, ast.ClassDef) and not protocol:
                walk(child, f"{prefix}{child.name}.")

    walk(tree, "")
    return found


@pytest.mark.parametrize("folder", ["autotool_fast", "kernels/autotool_kernels", "benchmarks", "csrc"])
def test_every_public_function_is_documented(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    missing = {}
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = undocumented(tree) + ([] if ast.get_docstring(tree) or not tree.body else ["the module"])
        if names:
            missing[name(path)] = names
    assert not missing


def test_messages_in_the_troubleshooting_guide_are_those_of_the_code():
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "autotool_fast").rglob("*.py"))]
    code = re.sub(r"""["']\s*\n\s*f?["']""", "", "\n".join(sources))
    rows = re.findall(r"^\| ([^|]*`[^|]*) \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    quoted = [message for row in rows if "of torch" not in row for message in re.findall(r"`([^`]+)`", row)]
    messages = [m for m in quoted if not m.startswith("--") and " " in m]
    assert len(messages) > 25
    for message in messages:
        for part in re.split(r"\.\.\.|\b[NPXY]\b", message):
            if len(part.strip(" (")) > 3:
                assert part.strip(" (") in code, f"no such message: {message}"
