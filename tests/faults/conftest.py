"""What several tests of failures start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import PRESET

from autotool_fast.train import main


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A base model that solves some easy tasks in both modes."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "base.toml").write_text(PRESET)
    assert main(["--preset", str(folder / "base.toml"), "--stages", "base", "--out", str(folder / "run")]) == 0
    return folder / "run" / "models" / "base"
