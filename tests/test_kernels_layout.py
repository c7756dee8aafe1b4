"""The folder `kernels/` must not shadow Hugging Face's package of that name; packages import one way."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("autotool_fast", "kernels", "benchmarks", "tests", "csrc")


def imports(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_kernels_is_a_bare_folder():
    assert (ROOT / "kernels" / "autotool_kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "kernels").glob("*.py"))


def test_nothing_imports_a_module_named_kernels():
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 10
    assert [str(p) for p in files if "kernels" in imports(p)] == []


def test_autotool_kernels_does_not_import_the_trainer():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not imports(path) & {"autotool_fast", "transformers"}, path


def test_transformers_imports_with_the_repository_root_on_the_path():
    version = tuple(int(part) for part in metadata.version("transformers").split(".")[:3])
    assert version >= (5, 10, 1)
    code = "import transformers; from transformers import Qwen3ForCausalLM; print(transformers.__version__)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_leaves_triton_and_the_compiler_unloaded():
    code = (
        "import sys, torch; before = set(sys.modules); import autotool_kernels;"
        "print([m for m in ('triton', 'torch._dynamo', 'transformers') if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
