"""Shared test set-up: one thread, Triton's interpreter where there is no GPU, and skips for GPU tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HAS_GPU = Path("/dev/nvidiactl").exists()
# Read when a kernel is defined, so before anything imports triton.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA device"))
