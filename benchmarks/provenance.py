"""What every results file says about where its numbers come from."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

from autotool_fast import files
from autotool_fast.runs import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def provenance() -> dict[str, Any]:
    """Date, device and versions."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "device": gpu or f"{_cpu()}, {os.cpu_count()} cores",
        "versions": versions(),
    }


def write_results(name: str, results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `results` with their provenance to `<folder>/<name>.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    files.write_json(path, {"provenance": provenance(), **results})
    return path
