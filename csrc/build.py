"""Builds the CUDA C++ extension into the autotool_kernels package (`make ext`).

Needs nvcc and the torch headers; no GPU. The library is for sm_80 and sm_90a and uses torch's stable ABI
only. Its source hash stands in its name, so an unchanged build is kept and a stale one is never loaded.
Exit code 2 with one line when there is no suitable nvcc.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from autotool_kernels import cuda

SOURCES = ("logits.cu", "sample.cu", "register.cu")
ARCHITECTURES = ("80", "90a")


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


def command(nvcc: str, output: Path) -> list[str]:
    torch_folder = Path(torch.__file__).parent
    here = Path(__file__).parent
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    flags = ["-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return [
        nvcc, *flags, "-Werror", "all-warnings", f"-DTORCH_TARGET_VERSION={cuda.TARGET_VERSION}",
        "-isystem", str(torch_folder / "include"), "-I", str(here), *targets, "--threads", "2",
        "-o", str(output), *(str(here / s) for s in SOURCES),
        f"-L{torch_folder / 'lib'}", "-ltorch_cpu",
    ]  # fmt: skip


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
        done = subprocess.run(command(nvcc, partial), capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed:\n{done.stdout}{done.stderr}")
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
