"""The data command: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autotool_fast.data import main
from autotool_fast.tasks.sources.rows import NOTES, REASONS

DATA = Path(__file__).parent / "fixtures" / "data"


def refused(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_inspect_prints_counts_and_samples(capsys, tmp_path):
    rejects = tmp_path / "rejects.jsonl"
    assert main(["inspect", str(DATA / "toolace"), "--samples", "2", "--rejects", str(rejects)]) == 0
    out = capsys.readouterr().out
    assert "toolace  " in out
    assert "6 rows, 9 records, 3 rejects (25.0% of 12)" in out
    assert "call: 5  no_call: 2  summary: 2" in out
    assert "1 positional_argument: a call in Python syntax" in out
    assert out.count("-> answer") >= 2
    assert [json.loads(line)["row"] for line in rejects.read_text().splitlines()] == [4, 4, 5]


def test_inspect_samples_do_not_change_between_runs_and_follow_the_seed(capsys):
    def sampled(*options) -> str:
        assert main(["inspect", str(DATA / "xlam"), "--samples", "1", *options]) == 0
        return capsys.readouterr().out.split("\n\n", 1)[1]

    assert sampled() == sampled()
    assert len({sampled("--seed", str(seed)) for seed in range(6)}) > 1


def test_control_characters_of_a_sample_do_not_reach_the_terminal(capsys, tmp_path):
    record = {"tools": [{"name": "dim", "parameters": {}}], "messages": [{"role": "user", "content": "\x1b[2J\x07 x"}]}
    (tmp_path / "own.jsonl").write_text(json.dumps({**record, "answer": []}) + "\n")
    assert main(["inspect", str(tmp_path / "own.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "user       ?[2J? x" in out
    assert out.replace("\n", "").isprintable()


def test_inspect_reports_files_that_were_left_out(capsys):
    assert main(["inspect", str(DATA / "hermes"), "--samples", "0"]) == 0
    captured = capsys.readouterr()
    assert "json-mode-miniature.json: left out" in captured.err
    assert "-> answer" not in captured.out


def test_prepare_then_audit(capsys, tmp_path):
    out, result = tmp_path / "set", tmp_path / "audit.json"
    options = ["--max-rejects", "0.6", "--take", "xlam=4", "--test-share", "0.1"]
    assert main(["prepare", str(DATA), "--out", str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert "left out: duplicate 1, not_taken 1, summary 4" in printed
    assert "fewer records than asked for" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json", "rejects.jsonl", "rl.jsonl", "sft.jsonl", "test.jsonl",
    ]  # fmt: skip
    assert json.loads((out / "manifest.json").read_text())["settings"]["take"] == {"xlam": 4}

    assert main(["audit", str(out), "--benchmark", str(DATA / "benchmarks"), "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("20 records\n")
    found = {one["benchmark"]: one for one in json.loads(result.read_text())["benchmarks"]}
    assert found["ace_miniature"]["questions_sharing_ngram"] == 1
    assert found["ace_miniature"]["met"] == {"ace_0": ["toolace-toolace-data-1-t0"]}
    assert found["apibank_miniature"]["questions_identical"] == 1


def test_a_prepared_set_without_held_out_records_can_be_audited_an_empty_download_cannot(capsys, tmp_path):
    out = tmp_path / "set"
    assert main(["prepare", str(DATA / "xlam"), "--out", str(out), "--test-share", "0"]) == 0
    assert (out / "test.jsonl").read_bytes() == b""
    capsys.readouterr()
    assert main(["audit", str(out), "--benchmark", str(DATA / "benchmarks")]) == 0
    assert " records\n" in capsys.readouterr().out
    (out / "manifest.json").unlink()
    assert main(["audit", str(out), "--benchmark", str(DATA / "benchmarks")]) == 2
    assert "test.jsonl: is empty; download it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["look", "x"], "invalid choice"),
        (["inspect"], "required: PATH"),
        (["inspect", "nowhere"], "nowhere: no such file or folder; download"),
        (["inspect", "nowhere", "--source", "xlam"], "accept the terms of Salesforce/xlam-function-calling-60k"),
        (["inspect", DATA, "--samples", "-1"], "at least 0"),
        (["inspect", DATA / "xlam", "--source", "rlla"], "holds rlla data"),
        (["inspect", DATA / "hermes" / "json-mode-miniature.json"], "JSON mode"),
        (["prepare", DATA], "required: --out"),
        (["prepare", DATA, "--out", "x", "--take", "xlam"], "--take: cannot read 'xlam'; write SOURCE=N"),
        (["prepare", DATA / "xlam", "--out", "x", "--take", "xlan=1"], "no record has the source 'xlan'; use xlam"),
        (["prepare", DATA, "--out", "x", "--names", "short"], "invalid choice"),
        (["audit", DATA], "required: --benchmark"),
        (["audit", DATA, "--benchmark", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_a_run_with_many_rejects_names_where_they_are(capsys, tmp_path):
    rows = [{"query": "x", "answers": "[", "tools": "[]"}] * 30
    (tmp_path / "xlam.json").write_text(json.dumps(rows))
    line = refused(capsys, "prepare", tmp_path / "xlam.json", "--out", tmp_path / "out")
    assert "100% of its records are rejected" in line
    assert (tmp_path / "out.rejects.jsonl").exists()


def test_a_file_cut_off_is_one_line(capsys, tmp_path):
    text = (DATA / "xlam" / "xlam_miniature.json").read_text()
    (tmp_path / "xlam.json").write_text(text[:-40])
    for arguments in (["inspect", tmp_path], ["prepare", tmp_path, "--out", tmp_path.parent / "out-cut"]):
        assert "is cut off after 8 rows; download it again" in refused(capsys, *arguments)
    assert not (tmp_path.parent / "out-cut").exists()


def test_output_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    inside = tmp_path / "file" / "x"
    assert "cannot be written" in refused(capsys, "prepare", DATA, "--max-rejects", "1", "--out", inside)
    missing = tmp_path / "no" / "r.jsonl"
    assert main(["inspect", str(DATA / "xlam"), "--rejects", str(missing)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_guide_lists_every_reason_and_note():
    guide = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    for code, meaning in {**REASONS, **NOTES}.items():
        assert f"| `{code}` | {meaning} |" in guide


def test_help_and_mistakes_answer_without_torch(tmp_path):
    code = (
        "import sys; from autotool_fast.data import main\n"
        "try: main(['prepare', '--help'])\n"
        "except SystemExit: pass\n"
        f"assert main(['inspect', {str(tmp_path / 'none')!r}]) == 2\n"
        "assert not {'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules), sorted(sys.modules)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 10  # well under a second on a calm machine; shared ones are slower
