"""The run folder: one training run's settings, progress and results.

Guarantees: a folder that holds anything but a run is never written to or emptied; a run is replaced only on
`--overwrite` and continued only on `--resume` with the same settings; two processes cannot hold one folder at
the same time; a finished stage stays finished after a crash. Imports no torch. What the stages write is left
to them; checkpoints are `checkpoint.py`'s.

    config.json         resolved settings and package versions; marks the folder as a run
    metrics.jsonl       one row per step
    stages/<stage>.json a finished stage and its summary
    checkpoints/  models/  results.json  transcripts.jsonl  report.html
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from autotool_fast import files
from autotool_fast.config import Stage, TrainConfig, from_dict, to_dict
from autotool_fast.errors import UserError
from autotool_fast.schema import leaf_paths

FORMAT = "autotool_fast.run/1"
PACKAGES = ("autotool_fast", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
MAY_DIFFER_ON_RESUME = frozenset(
    {"preset", "stages", "out", "resume", "overwrite", "dry_run", "threads", "profile", "profile_steps"}
    | {"rollout.slots", "rollout.prefill_chunk", "rl.micro_tokens", "model.gradient_checkpointing"}
    | {"model.attention", "rl.share_prompts", "rollout.cuda_graphs"}
    | {"label.teacher", "label.teacher_model", "rollout.server", "rollout.timeout_s"}
    | {"environment.slow_call_s"}
    | {name for name in leaf_paths(TrainConfig) if name.startswith("alarms.")}
)
"""The second line is memory, the third speed: those settings change results by rounding alone. A server may move;
messages and alarms change nothing."""
LOCK = ".lock"


class RunFolder:
    """An open run folder, made by `create` and locked until `close()` or the end of the `with` block.

    One made without a lock is for the other processes of a job, which only read.
    """

    def __init__(self, path: Path, lock: int | None = None) -> None:
        self.path = path
        self._lock: int | None = lock

    @classmethod
    def create(cls, config: TrainConfig) -> RunFolder:
        """Make, replace or reopen the folder `config.out`, as `config.overwrite` and `config.resume` say.

        Raises:
            UserError: the folder holds a run that has begun and neither flag is set; it holds something else; there is
                nothing to resume, or the run has other settings; it is in use or cannot be written.
        """
        path = Path(config.out)
        folder = None
        try:
            _refuse_foreign(path)
            if config.resume and not (path / "config.json").exists():
                raise UserError("holds no run to resume", where=str(path), remedy="start without --resume")
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, _lock(path))
            folder._prepare(config)
        except BaseException as error:
            if folder:
                folder.close()
            if not isinstance(error, OSError):
                raise
            remedy = "choose another folder with --out"
            raise UserError(f"cannot be written ({error.strerror})", where=str(path), remedy=remedy) from None
        return folder

    def _prepare(self, config: TrainConfig) -> None:
        if config.resume:
            _check_same_settings(config, read_config(self.path), self.path)
            return
        if (self.path / "config.json").exists() and _begun(self.path) and not config.overwrite:
            remedy = "use --resume to continue it, --overwrite to replace it, or another --out"
            raise UserError("already holds a run", where=str(self.path), remedy=remedy)
        # config.json goes last, so that an interrupted removal can be repeated.
        for entry in sorted(_entries(self.path), key=lambda e: e.name == "config.json"):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        record = {"format": FORMAT, "config": to_dict(config), "versions": versions()}
        files.write_json(self.path / "config.json", record)

    @property
    def metrics(self) -> Path:
        """metrics.jsonl."""
        return self.path / "metrics.jsonl"

    def checkpoints(self, stage: Stage) -> Path:
        """Folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    def model(self, name: str) -> Path:
        """Folder of an exported model, such as `base` or `rl`."""
        return self.path / "models" / name

    def finish_stage(self, stage: Stage, summary: dict[str, Any] | None = None) -> None:
        """Record, atomically, that `stage` is complete, with a JSON-able summary."""
        marker = self._marker(stage)
        marker.parent.mkdir(exist_ok=True)
        files.write_json(marker, summary or {})

    def is_finished(self, stage: Stage) -> bool:
        """Whether `stage` was completed, in this process or an earlier one."""
        return self._marker(stage).exists()

    def summary(self, stage: Stage) -> dict[str, Any]:
        """What `finish_stage` recorded; the stage must be finished."""
        return json.loads(self._marker(stage).read_text(encoding="utf-8"))

    def _marker(self, stage: Stage) -> Path:
        return self.path / "stages" / f"{stage}.json"

    def close(self) -> None:
        """Release the lock; the folder stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_config(path: Path) -> TrainConfig:
    """The settings recorded in a run folder.

    Raises:
        UserError: config.json is missing, broken or of another version.
    """
    file = path / "config.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(file)) from None
    except (ValueError, RecursionError):
        raise UserError("is not valid JSON", where=str(file)) from None
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        problem = f"has format {found!r}, this version reads {FORMAT!r}"
        raise UserError(problem, where=str(file), remedy="use --overwrite or another --out")
    return from_dict(record.get("config"), source=str(file))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers; "none" for one not installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def _begun(path: Path) -> bool:
    """Whether a run has got further than its settings: one that could not load its model has not."""
    return any(
        entry.name != "config.json" and (entry.name != "metrics.jsonl" or entry.stat().st_size > 0)
        for entry in _entries(path)
    )


def _entries(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if entry.name != LOCK]


def _refuse_foreign(path: Path) -> None:
    """Refuse a path that holds something other than a run, before anything is written to it."""
    if path.exists() and not path.is_dir():
        raise UserError("is a file", where=str(path), remedy="choose another folder with --out")
    if not path.is_dir() or not _entries(path):
        return
    try:
        record = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        record = None
    named = record.get("format") if isinstance(record, dict) else None
    if not (isinstance(named, str) and named.startswith("autotool_fast.run/")):
        remedy = "choose another folder with --out"
        raise UserError("is not empty and is not a run folder", where=str(path), remedy=remedy)


def _lock(path: Path) -> int:
    """Take the folder's lock; returns the descriptor that holds it."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode() or "unknown"
        os.close(descriptor)
        remedy = "wait for it, or choose another folder with --out"
        raise UserError(f"is in use by process {holder}", where=str(path), remedy=remedy) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _check_same_settings(now: TrainConfig, before: TrainConfig, path: Path) -> None:
    def value(config: Any, name: str) -> Any:
        for part in name.split("."):
            config = getattr(config, part)
        return config

    names = [name for name in leaf_paths(TrainConfig) if name not in MAY_DIFFER_ON_RESUME]
    changed = [
        f"{name} {value(before, name)} -> {value(now, name)}"
        for name in names
        if value(before, name) != value(now, name)
    ]
    if changed:
        shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        remedy = "repeat the first start's options, or use --overwrite or another --out"
        raise UserError(f"was started with other settings: {shown}", where=str(path), remedy=remedy)
