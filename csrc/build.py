"""Builds the CUDA C++ extension into the autotool_kernels package (`make ext`).

Needs nvcc and the torch headers; no GPU. The library is for sm_80, sm_90a and, where nvcc knows it, sm_100, and
uses torch's stable ABI only. Its source hash stands in its name, so an unchanged build is kept and a stale one is
never loaded. Exit code 2 with one line when there is no suitable nvcc.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from autotool_kernels import cuda

SOURCES = ("logits.cu", "sample.cu", "policy.cu", "register.cu")
ARCHITECTURES = ("80", "90a")  # no instruction of the a variant is used yet, but it is what Hopper's may need
OPTIONAL_ARCHITECTURES = ("100",)


def find_nvcc() -> tuple[str | None, str]:
    """nvcc from CUDA_HOME if set, else from PATH; None and the reason if none can build this."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if nvcc is None:
        return None, "nvcc was not found; install the CUDA toolkit or set CUDA_HOME to it"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None or int(release[1]) < 12:
        return None, f"{nvcc} is too old for sm_90a; CUDA 12 or newer is needed"
    return nvcc, ""


def architectures(nvcc: str) -> list[str]:
    """Architectures to build for: those every nvcc of the supported range knows, and newer ones that this one does."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [*ARCHITECTURES, *(a for a in OPTIONAL_ARCHITECTURES if f"compute_{a}" in known)]


def compile_command(nvcc: str, source: str, built: list[str], output: Path) -> list[str]:
    """nvcc's command that compiles `source`, a file beside this one, to the object `output` for the architectures
    `built`.
    """
    here = Path(__file__).parent
    return [
        nvcc, "-c", "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Werror", "all-warnings",
        f"-DTORCH_TARGET_VERSION={cuda.TARGET_VERSION}", f'-DAUTOTOOL_ARCHITECTURES="{" ".join(built)}"',
        "-isystem", str(Path(torch.__file__).parent / "include"), "-I", str(here),
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in built), "-o", str(output), str(here / source),
    ]  # fmt: skip


def link_command(nvcc: str, objects: list[Path], output: Path) -> list[str]:
    """nvcc's command that links objects to the shared library `output`, against torch's stable ABI alone."""
    libraries = Path(torch.__file__).parent / "lib"
    return [nvcc, "--shared", "-o", str(output), *map(str, objects), f"-L{libraries}", "-ltorch_cpu"]


def run(command: list[str]) -> None:
    """Run a command; RuntimeError with what it printed if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed:\n{done.stdout}{done.stderr}")


def build(force: bool = False) -> Path:
    """Path of the library, built if it is missing or `force`; RuntimeError says why not, with what nvcc printed."""
    library = cuda.library_path()
    if library.exists() and not force:
        return library
    nvcc, reason = find_nvcc()
    if nvcc is None:
        raise RuntimeError(reason)
    # Built aside and moved into place, so that no process ever loads half a library.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        partial = Path(folder) / library.name
        objects = {source: Path(folder) / f"{source}.o" for source in SOURCES}
        built = architectures(nvcc)
        with ThreadPoolExecutor(min(len(SOURCES), os.cpu_count() or 1)) as pool:
            list(pool.map(lambda o: run(compile_command(nvcc, o[0], built, o[1])), objects.items()))
        run(link_command(nvcc, list(objects.values()), partial))
        for old in library.parent.glob(cuda.LIBRARY_GLOB):
            old.unlink()
        os.replace(partial, library)
    return library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="build even if the library is up to date")
    try:
        print(f"built {build(parser.parse_args().force)}")
    except RuntimeError as error:
        print(f"make ext: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
