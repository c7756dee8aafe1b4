"""The run folder: what is refused, replaced, continued, and never touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autotool_fast import files
from autotool_fast.config import from_dict
from autotool_fast.errors import UserError
from autotool_fast.runs import RunFolder, read_config


def settings(out, **values):
    return from_dict({"out": str(out), **values})


def error_of(config) -> str:
    with pytest.raises(UserError) as caught:
        RunFolder.create(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_folder_records_settings_and_versions(tmp_path):
    config = settings(tmp_path / "a" / "b", rl={"lr": 0.5})
    with RunFolder.create(config) as folder:
        assert read_config(folder.path) == config
        versions = json.loads((folder.path / "config.json").read_text())["versions"]
    assert versions["python"]
    assert versions["torch"] != "none"


def test_an_empty_folder_is_accepted(tmp_path):
    RunFolder.create(settings(tmp_path)).close()
    assert (tmp_path / "config.json").exists()


def begin(path) -> None:
    """A run that has written its first row."""
    with RunFolder.create(settings(path)) as folder:
        folder.metrics.write_text("{}\n")


def test_a_run_that_could_not_begin_gives_way_to_the_next_start(tmp_path):
    with RunFolder.create(settings(tmp_path)) as folder:
        folder.metrics.touch()  # as when the model cannot be loaded
    RunFolder.create(settings(tmp_path, seed=1)).close()
    assert read_config(tmp_path).seed == 1


def test_a_run_is_refused_without_resume_or_overwrite(tmp_path):
    begin(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    message = error_of(settings(tmp_path, seed=1))
    assert "--resume" in message
    assert "--overwrite" in message
    assert (tmp_path / "config.json").read_bytes() == before


def test_overwrite_replaces_a_run_but_not_what_its_links_point_to(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("keep")
    with RunFolder.create(settings(tmp_path / "run")) as folder:
        folder.finish_stage("base")
        folder.metrics.write_text("old")
        (folder.path / "link").symlink_to(elsewhere)
    with RunFolder.create(settings(tmp_path / "run", seed=1, overwrite=True)) as folder:
        assert not folder.is_finished("base")
        assert sorted(p.name for p in folder.path.iterdir()) == [".lock", "config.json"]
        assert read_config(folder.path).seed == 1
    assert (elsewhere / "precious").read_text() == "keep"


@pytest.mark.parametrize("config_json", [None, "{}", "[1]", "not json", '{"format": "something else"}'])
@pytest.mark.parametrize("flag", ["overwrite", "resume", None])
def test_a_folder_that_is_not_a_run_is_never_touched(tmp_path, config_json, flag):
    (tmp_path / "thesis.tex").write_text("years of work")
    if config_json is not None:
        (tmp_path / "config.json").write_text(config_json)
    before = sorted(p.name for p in tmp_path.iterdir())
    message = error_of(settings(tmp_path, **({flag: True} if flag else {})))
    assert "not a run folder" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_interrupted_overwrite_can_be_repeated(tmp_path, monkeypatch):
    with RunFolder.create(settings(tmp_path)) as folder:
        folder.metrics.write_text("old")
    unlink, removed = Path.unlink, []

    def interrupt_after_one(path, **options):
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupt_after_one)
        with pytest.raises(KeyboardInterrupt):
            RunFolder.create(settings(tmp_path, overwrite=True))
    RunFolder.create(settings(tmp_path, overwrite=True)).close()
    assert len(removed) == 1
    assert not (tmp_path / "metrics.jsonl").exists()


def test_unwritable_folders_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in error_of(settings(tmp_path / "file"))
    assert "Not a directory" in error_of(settings(tmp_path / "file" / "run"))
    assert "cannot be written" in error_of(settings("/proc/run"))


def test_resume_needs_a_run(tmp_path):
    assert "no run to resume" in error_of(settings(tmp_path / "new", resume=True))
    assert not (tmp_path / "new").exists()


def test_resume_remembers_finished_stages(tmp_path):
    with RunFolder.create(settings(tmp_path)) as folder:
        folder.finish_stage("base", {"accuracy": 0.5})
    with RunFolder.create(settings(tmp_path, resume=True)) as folder:
        assert folder.is_finished("base")
        assert folder.summary("base") == {"accuracy": 0.5}
        assert not folder.is_finished("rl")


def test_a_stage_is_not_finished_before_its_marker_is_whole(tmp_path, monkeypatch):
    with RunFolder.create(settings(tmp_path)) as folder:
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("killed")))
            with pytest.raises(OSError, match="killed"):
                folder.finish_stage("base")
        assert not folder.is_finished("base")
        assert list((tmp_path / "stages").iterdir()) == []


def test_resume_refuses_other_settings_and_names_them(tmp_path):
    RunFolder.create(settings(tmp_path)).close()
    message = error_of(settings(tmp_path, resume=True, seed=3, rl={"lr": 0.5}))
    assert "seed 0 -> 3" in message
    assert "rl.lr 0.0003 -> 0.5" in message


def test_resume_allows_other_stages_and_threads(tmp_path):
    RunFolder.create(settings(tmp_path, stages=["base"])).close()
    RunFolder.create(settings(tmp_path, stages=["rl"], threads=2, resume=True)).close()
    assert read_config(tmp_path).stages == ("base",)


def test_a_run_of_another_format_version_is_refused_by_name(tmp_path):
    RunFolder.create(settings(tmp_path)).close()
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("run/1", "run/9"))
    assert "autotool_fast.run/9" in error_of(settings(tmp_path, resume=True))


def test_a_run_without_settings_is_one_line(tmp_path):
    RunFolder.create(settings(tmp_path)).close()
    (tmp_path / "config.json").write_text('{"format": "autotool_fast.run/1"}')
    assert "must be a table of settings" in error_of(settings(tmp_path, resume=True))
    (tmp_path / "config.json").write_text("[" * 5000)
    assert "not a run folder" in error_of(settings(tmp_path, resume=True))


def test_a_second_process_is_refused_and_told_the_first(tmp_path):
    script = (
        "import sys; from autotool_fast.config import from_dict; from autotool_fast.runs import RunFolder\n"
        "folder = RunFolder.create(from_dict({'out': sys.argv[1]})); print('ready', flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            assert f"in use by process {other.pid}" in error_of(settings(tmp_path, **flags))
        other.kill()
    RunFolder.create(settings(tmp_path, resume=True)).close()


def test_a_refused_start_leaves_no_lock_behind(tmp_path):
    begin(tmp_path)
    error_of(settings(tmp_path))
    with RunFolder.create(settings(tmp_path, resume=True)) as folder:
        assert (folder.path / ".lock").read_text() == str(os.getpid())
