"""A disk that refuses to be written: one line that names the file, nothing half-written, a run that goes on."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from eval_stand_ins import STAND_INS
from small_rl import options, when
from small_runs import tensors_of
from test_faults_kill import assert_is, save
from test_faults_resume import SMALL, files_of

from autotool_fast import checkpoint, files
from autotool_fast.errors import UserError
from autotool_fast.eval.__main__ import main as eval_main
from autotool_fast.metrics import MetricsWriter, read_rows, strip_timings
from autotool_fast.partial import PartialResults
from autotool_fast.report import write_report
from autotool_fast.train import main

torch.set_num_threads(1)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond `size` bytes, a real error of a write that needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture(autouse=True)
def unlimited() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def mounted(folder: Path, *how: str) -> Iterator[Path]:
    """A file system of its own at `folder`; skips the test where mounting is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(["mount", *how, str(folder)], capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(options(folder, folder / "run")) == 0
    return folder / "run"


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def assert_same(run: Path, whole: Path) -> None:
    assert tensors_of(run / "models" / "rl") == tensors_of(whole / "models" / "rl")
    rows = [[strip_timings(row) for row in read_rows(folder / "metrics.jsonl")] for folder in (run, whole)]
    assert rows[0] == rows[1]


def fill(folder: Path) -> Path:
    """Take what space there is."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return path


@pytest.mark.slow
def test_a_disk_that_runs_full_ends_the_run_and_freeing_space_continues_it(whole, tmp_path, capsys):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=16m", "tmpfs") as disk:
        argv = options(tmp_path, disk / "run")
        with when("rl", 3, lambda: fill(disk)):
            assert main(argv) == 2
        line = last_line(capsys)
        assert line.startswith(f"error: {disk / 'run'}/")
        assert "No space left on device" in line
        assert "free some space" in line
        assert "--resume" in line
        found = checkpoint.latest(disk / "run" / "checkpoints" / "rl")
        assert found is not None
        assert found.step == 2
        (disk / "filler").unlink()
        assert main([*argv, "--resume"]) == 0
        assert_same(disk / "run", whole)


FULL_AT = [("label", 2), ("label", 48), ("warmup", 6), ("distill", 6), ("refine", 3), ("refine", 6)]
FULL_AT += [("rl", 1), ("rl", 4), ("rl", 6), ("eval", 1), ("eval", 4)]


@pytest.mark.slow
def test_a_disk_that_runs_full_in_every_stage_changes_nothing_in_the_end(trained, tmp_path, capsys):
    (tmp_path / "small.toml").write_text(SMALL.format(preset="mini", reuse=f'reuse = "{trained}"'))
    argv = ["--preset", str(tmp_path / "small.toml")]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    named = set()
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=16m", "tmpfs") as disk:
        argv += ["--out", str(disk / "run")]
        for number, (stage, step) in enumerate(FULL_AT):
            with when(stage, step, lambda: fill(disk)):
                assert main([*argv, *(["--resume"] if number else [])]) == 2
            line = last_line(capsys)
            assert "(No space left on device); free some space" in line
            named.add(line.removeprefix(f"error: {disk / 'run'}/").partition(":")[0])
            (disk / "filler").unlink()
        assert main([*argv, "--resume"]) == 0
        assert files_of(disk / "run") == files_of(tmp_path / "whole")
    assert named >= {"label.partial.jsonl", "labels.jsonl", "refined.json", "transcripts.jsonl", "results.json"}
    assert named >= {"models/warmup", "models/distilled", "models/rl"}


def test_a_disk_that_is_full_at_any_point_of_a_save_leaves_the_checkpoint_before(tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        folder = disk / "checkpoints"
        save(folder, 1)
        refused: list[UserError] = []
        while True:
            (disk / "filler").write_bytes(bytes(_free(disk) - len(refused) * 4096))
            try:
                save(folder, 2)
                break
            except UserError as error:
                refused.append(error)
            assert [path.name for path in folder.iterdir()] == ["step-00000001"]
            assert_is(checkpoint.latest(folder), 1)
            (disk / "filler").unlink()
        assert len(refused) >= 8  # at least a page for each file
        assert {error.what for error in refused} == {"cannot be written (No space left on device)"}
        assert {error.where for error in refused} == {str(folder / "step-00000002")}
        assert_is(checkpoint.latest(folder), 2)


def _free(disk: Path) -> int:
    return os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize


def test_a_tokenizer_that_cannot_be_written_is_one_line_like_everything_else(tmp_path):
    """Its library reports a full disk by a bare Exception."""
    save(tmp_path, 1)
    model = tmp_path / "step-00000001" / "model"
    weights, tokenizer = ((model / name).stat().st_size for name in ("model.safetensors", "tokenizer.json"))
    assert weights < tokenizer
    with largest_file((weights + tokenizer) // 2), pytest.raises(UserError) as caught:
        save(tmp_path, 2)
    assert caught.value.what == "cannot be written (File too large)"
    assert_is(checkpoint.latest(tmp_path), 1)


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_ends_the_run_with_its_name(whole, tmp_path, capsys):
    run = tmp_path / "run"
    folder = run / "checkpoints" / "rl"
    argv = options(tmp_path, run)
    with when("rl", 3, lambda: _bind_read_only(folder)):
        code = main(argv)
    subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)
    assert code == 2
    line = last_line(capsys)
    assert line.startswith(f"error: {folder / 'step-00000004'}: cannot be written (")
    assert "check the permissions" in line
    assert checkpoint.latest(folder).step == 2
    assert main([*argv, "--resume"]) == 0
    assert_same(run, whole)


def _bind_read_only(folder: Path) -> None:
    for how in (["--bind", str(folder)], ["-o", "remount,bind,ro"]):
        done = subprocess.run(["mount", *how, str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")


@pytest.mark.parametrize(
    ("stage", "step", "size", "named", "kept"),
    [
        ("base", 12, 20_000, "models/base", None),
        ("rl", 3, 20_000, "checkpoints/rl/step-00000004", 2),
        ("rl", 5, 20_000, "models/rl", 4),
        ("rl", 3, 1_000, "metrics.jsonl", 2),
    ],
)
@pytest.mark.slow
def test_whatever_cannot_be_written_is_named_and_the_run_goes_on(
    whole, tmp_path, capsys, stage, step, size, named, kept
):
    run = tmp_path / "run"
    argv = options(tmp_path, run)
    with when(stage, step, lambda: limit(size)):
        assert main(argv) == 2
    limit(resource.RLIM_INFINITY)
    line = last_line(capsys)
    assert line.startswith(f"error: {run / named}: cannot be ")
    assert "--resume" in line
    if kept is not None:
        assert checkpoint.latest(run / "checkpoints" / "rl").step == kept
    assert not [path for path in run.rglob(".*tmp*") if path.is_dir()]
    assert main([*argv, "--resume"]) == 0
    assert_same(run, whole)


def test_a_labelled_run_that_cannot_keep_a_part_names_the_file(tmp_path, capsys):
    argv = [*options(tmp_path, tmp_path / "run"), "--stages", "base,label"]
    with when("label", 1, lambda: limit(100)):
        assert main(argv) == 2
    limit(resource.RLIM_INFINITY)
    assert last_line(capsys).startswith(f"error: {tmp_path / 'run' / 'label.partial.jsonl'}: cannot be ")
    assert main([*argv, "--resume"]) == 0


def test_a_metrics_row_that_was_cut_off_is_dropped_when_the_file_is_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write("rl", 1, {"loss": 1.0}, seconds=0.0)
    with largest_file(path.stat().st_size + 10), pytest.raises(OSError, match="too large") as caught:
        writer.write("rl", 2, {"loss": 1.0}, seconds=0.0)
    assert caught.value.filename == str(path)
    assert len(path.read_text().splitlines()) == 2
    again = MetricsWriter.open(path, lambda row: True)
    again.write("rl", 2, {"loss": 3.0}, seconds=0.0)
    again.close()
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(1, 1.0), (2, 3.0)]


def test_a_file_that_cannot_be_replaced_keeps_what_it_held(tmp_path):
    path = tmp_path / "labels.jsonl"
    files.write_text(path, "old")
    with largest_file(10), pytest.raises(OSError, match="too large") as caught:
        files.write_text(path, "new" * 100)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_parts_that_were_kept_survive_one_that_could_not_be(tmp_path):
    path = tmp_path / "label.partial.jsonl"
    kept = PartialResults(path, {"k": 1})
    assert kept.part("a", lambda: 1) == 1
    with largest_file(path.stat().st_size + 10), pytest.raises(OSError, match="too large") as caught:
        kept.part("b", lambda: "x" * 100)
    assert caught.value.filename == str(path)
    again = PartialResults(path, {"k": 1})
    assert len(again) == 1
    assert again.part("b", lambda: 2) == 2


def test_a_report_that_cannot_be_written_leaves_the_old_one(whole):
    report = whole / "report.html"
    write_report(whole)
    before = report.read_bytes()
    with largest_file(1000), pytest.raises(UserError, match="cannot write the report: File too large") as caught:
        write_report(whole)
    assert caught.value.where == str(report)
    assert report.read_bytes() == before


def test_an_evaluation_names_the_file_it_could_not_write_and_continues(tmp_path, capsys):
    argv = ["--benchmark", "apibank", "--apibank", str(STAND_INS / "apibank"), "--policy", "oracle"]
    argv += ["--out", str(tmp_path / "eval")]
    with largest_file(700):
        assert eval_main(argv) == 2
    assert "cannot be read or written (File too large); free some space" in last_line(capsys)
    assert eval_main(argv) == 0
