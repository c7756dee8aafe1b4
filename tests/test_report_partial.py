"""Reports of runs that lack a model, a band or a stage, that raised alarms, or whose files may not be read."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from report_runs import write_run
from test_report import Page, build, edit_json

from autotool_fast.report import load, tables, transcripts
from autotool_fast.report.__main__ import main
from autotool_fast.report.load import load_run


def anchors(page: Page) -> list[str]:
    return [value[1:] for name, value in page.attributes if name == "href"]


def keep_models(path: Path, *kept: str) -> None:
    def change(results):
        results["models"] = {name: results["models"][name] for name in kept}

    edit_json(path / "results.json", change)


def drop_bands(path: Path, *dropped: str) -> None:
    def change(results):
        for modes in results["models"].values():
            for mode in modes.values():
                mode["bands"] = {band: cell for band, cell in mode["bands"].items() if band not in dropped}

    edit_json(path / "results.json", change)


def test_alarms_are_said_with_their_steps_and_not_mentioned_where_there_were_none(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=40)
    assert "Alarms" not in Page(build(path)).text
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["stage"] == "rl":
            row |= {"alarm/truncation": 1} if 5 <= row["step"] <= 9 else {}
            row |= {"alarm/<b>new": 1} if row["step"] >= 30 else {}
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Page(build(path)).text
    assert "Alarms were on: truncated responses, steps 5 to 9; <b>new, steps 30 to 39." in text
    assert text.index("Reinforcement learning") < text.index("Alarms") < text.index("Response length")


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (("base", "warmup", "rl"), "Before RL, the warm-up model solves"),
        (("base", "rl"), "Before RL, the base model solves"),
        (("rl",), "There is no other model to compare it with."),
    ],
)
def test_without_an_always_think_model_rl_is_compared_with_what_it_began_with(tmp_path, models, says):
    path = write_run(tmp_path / "run", rl_steps=1)
    keep_models(path, *models)
    run = load_run(path)
    assert says in tables.headline(run)
    reference = models[-2] if len(models) > 1 else None
    before = run.cell(reference)["accuracy"] if reference else None
    expected = "" if before is None else f"{tables.model_name(reference).lower()} {100 * before:.1f}%"
    assert tables.tiles(run)[0][2] == expected


def test_bands_without_test_tasks_are_not_mentioned(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=1)
    drop_bands(path, "hard")
    run = load_run(path)
    assert "of the medium and" in tables.headline(run)
    assert tables.DASH not in tables.headline(run)
    assert [label for label, *_ in tables.tiles(run)][1:4] == ["Accuracy, medium", "Thinks on medium", "Thinks on easy"]
    assert all(table.columns == ("All", "Easy", "Medium") for table in tables.final_tables(run))
    assert "hard" not in tables.band_note(run)
    drop_bands(path, "easy", "medium")
    run = load_run(path)
    assert "of the test tasks, solves" in tables.headline(run)
    assert [label for label, *_ in tables.tiles(run)] == ["Accuracy", "Response tokens", "ACU"]
    assert tables.band_note(run).startswith("All: the test mix")


@pytest.mark.parametrize("change", [{"data": {"path": "d"}}, {"environment": {"kind": "tools"}}])
def test_the_share_of_easy_families_is_not_claimed_of_the_user_s_own_problems(tmp_path, change):
    path = write_run(tmp_path / "run", rl_steps=1)
    assert "60%" in tables.band_note(load_run(path))

    def own(config):
        for section, values in change.items():
            config["config"][section] |= values

    edit_json(path / "config.json", own)
    assert "60%" not in tables.band_note(load_run(path))


def base_alone(folder: Path) -> Path:
    """A run that has finished stage base and nothing else."""
    path = write_run(folder, rl_steps=0, evaluated=False, with_transcripts=False)
    for name in ("label", "refine", "warmup", "distill"):
        (path / "stages" / f"{name}.json").unlink()
    rows = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(row for row in rows if '"base"' in row))
    return path


def test_what_was_not_asked_for_has_no_section_and_is_not_missed(tmp_path):
    path = base_alone(tmp_path / "run")
    edit_json(path / "config.json", lambda value: value["config"].update(stages=["base"]))
    page = Page(build(path))
    assert anchors(page) == ["sft", "time", "config"]
    assert page.tags.count("section") == 3
    assert "Not in this report" not in page.text
    assert "Warm-up and distilled SFT" not in page.text


def test_what_was_asked_for_and_has_not_come_yet_is_said(tmp_path):
    path = base_alone(tmp_path / "run")
    page = Page(build(path))
    assert anchors(page) == ["result", "rl", "sft", "data", "time", "transcripts", "config"]
    for text in ("No evaluation in auto mode", "no RL rows", "no loss of these stages yet", "has not finished"):
        assert text in page.text


def test_a_reused_base_model_leaves_no_empty_chart(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=2)
    rows = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(row for row in rows if '"rl"' in row))
    page = Page(build(path))
    assert "sft" not in anchors(page)
    assert "Base training" not in page.text


def test_one_step_is_not_called_steps(tmp_path):
    run = load_run(write_run(tmp_path / "run", rl_steps=1, evaluated=False))
    assert "In that step it thinks" in tables.headline(run)


def test_an_uncertain_line_break_can_be_seen(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=1)
    tokens = [{"text": "\n", "source": 1, "entropy": e} for e in (0.7, 0.0)]
    (path / "transcripts.jsonl").write_text(json.dumps({"stage": "rl", "step": 1, "tokens": tokens}))
    shade = f"s e{transcripts.entropy_shade(0.7)} break"
    found = [value for name, value in Page(build(path)).attributes if name == "class" and value.split()[0] == "s"]
    assert found == [shade, "s"]


def refuse(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_folder_that_may_not_be_listed_is_a_user_error(tmp_path, monkeypatch, capsys):
    path = write_run(tmp_path / "run", rl_steps=1)
    monkeypatch.setattr(load.os, "listdir", refuse)
    assert main([str(path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {path}: the run folder cannot be read: Permission denied; check its permissions\n"
    )


def test_files_that_may_not_be_looked_at_are_named_and_the_rest_is_shown(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", rl_steps=1)
    monkeypatch.setattr(load.Path, "exists", refuse)
    monkeypatch.setattr(load.Path, "read_bytes", refuse)
    problems = load_run(path).problems
    assert "rl.json could not be read: Permission denied." in problems
    assert "metrics.jsonl could not be read: Permission denied." in problems


def test_a_folder_that_may_not_be_written_names_the_way_out(tmp_path, monkeypatch, capsys):
    path = write_run(tmp_path / "run", rl_steps=1)
    monkeypatch.setattr(load.Path, "write_bytes", refuse)
    assert main([str(path)]) == 2
    err = capsys.readouterr().err
    assert "Permission denied" in err
    assert "--out" in err
