"""Machine code of every Triton kernel and shipped configuration: no spills, shared memory fits, tensor cores are used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("kernels_offline.py")


@lru_cache
def offline(*arguments: str) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], env=env, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)
