"""Data files: streaming, telling what they are, and one line for what is wrong with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from autotool_fast.errors import UserError
from autotool_fast.tasks.sources import files
from autotool_fast.tasks.sources.files import rows
from autotool_fast.tasks.sources.load import find_inputs, read_input
from autotool_fast.tasks.sources.rows import RowError

DATA = Path(__file__).parent / "fixtures" / "data"
VALUES = [{"a": "]}, {\n", "b": [1, {"c": "é😀"}]}, 12.5, 1234567, "x", [], {}, None, True, {"d": "y" * 50}]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_arrays_are_read_alike_in_pieces_of_any_size(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    path = tmp_path / "data.json"
    path.write_text(" \n" + json.dumps(VALUES, indent=indent, ensure_ascii=False) + "\n\n")
    assert list(rows(path)) == list(enumerate(VALUES))


def test_an_empty_array_has_no_rows(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("[ ]")
    assert list(rows(path)) == []


def test_a_long_array_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 1000)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": "x" * 100}] * 5000))
    monkeypatch.setattr(files, "_MAX_ROW", 2000)  # a buffer that grew past a few chunks would be refused
    assert sum(1 for _ in rows(path)) == 5000


def test_lines_keep_their_numbers_and_bad_ones_their_place(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n{"a": 2}')
    found = list(rows(path))
    assert [(found[0]), found[2]] == [(0, {"a": 1}), (3, {"a": 2})]
    assert (found[1][0], found[1][1].reason) == (2, "bad_json")
    assert isinstance(found[1][1], RowError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}, {"a": ', r"is cut off after 1 rows; download it again"),
        (b'[{"a": 1}, {"a": 2}', r"is cut off after 1 rows"),
        (b'[{"a": 1},', r"is cut off after 1 rows"),
        (b"[", r"is cut off after 0 rows"),
        (b'[{"a": 1} {"a": 2}]', r"is not valid JSON .* after 0 rows"),
        (b'[{"a": 1}, {"a": b}]', r"is not valid JSON .* after 1 rows"),
        (b"", r"is empty"),
        (b" \n ", r"is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", r"Git LFS pointer.*git lfs pull"),
        (b"<!doctype html><html>", r"web page.*accept its terms"),
        (b'{"error": "Access to dataset x/y is restricted."}', r"server's error.*x/y is restricted.*accept its terms"),
        (b'{\n "error": {"code": 401, "message": "Log in."}\n}\n', r"error message, not data \(Log in.\)"),
        (b"Access to dataset x/y is restricted and you are not logged in.", r"server's error.*accept its terms"),
        (b"Invalid username or password.", r"server's error.*accept its terms"),
        (b"\x1f\x8b\x08\x00", r"compressed \(gzip\); unpack"),
        (b"PK\x03\x04", r"compressed \(zip\)"),
        (b"a,b\n1,2\n", r"neither JSON"),
        (b'[{"a": "\xff"}]', r"not UTF-8"),
    ],
)
def test_a_file_that_is_no_data_is_one_line_with_a_remedy(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(rows(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row", [{"error": "e", "query": "q"}, {"message": "m"}, {"code": 1}])
def test_a_row_that_mentions_errors_is_a_row(tmp_path, row):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert list(rows(path)) == [(0, row)]


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1....PAR1")
    with pytest.raises(UserError, match=r"needs pyarrow.*raw JSON"):
        list(rows(path))


def test_parquet_rows_are_read_where_pyarrow_is_installed(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    raw = json.loads((DATA / "rlla_raw" / "rlla_miniature.json").read_text())[:4]
    parquet.write_table(pyarrow.Table.from_pylist([{"data_source": "rlla", "extra_info": row} for row in raw]),
                        tmp_path / "train.parquet")  # fmt: skip
    (item,) = find_inputs(tmp_path).inputs
    assert [example.kind for example in read_input(item)] == ["call", "call", "no_call", "summary"]
    (tmp_path / "raw.json").write_text(json.dumps(raw))
    found = find_inputs(tmp_path)
    assert [item.path.name for item in found.inputs] == ["raw.json"]
    assert found.skipped == ((tmp_path / "train.parquet", "holds the rows of the JSON files again"),)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(UserError, match="no readable parquet"):
        list(rows(tmp_path / "broken.parquet"))


# Folders


@pytest.mark.parametrize(
    ("name", "source"),
    [("toolace", "toolace"), ("xlam", "xlam"), ("hermes", "hermes"), ("rlla_raw", "rlla"), ("plain.jsonl", "jsonl")],
)
def test_sources_are_told_by_content(name, source):
    assert {item.source for item in find_inputs(DATA / name).inputs} == {source}


def test_a_folder_of_several_sources_can_be_narrowed(tmp_path):
    assert {item.source for item in find_inputs(DATA).inputs} == {"toolace", "xlam", "hermes", "rlla", "jsonl"}
    found = find_inputs(DATA, "xlam")
    assert [item.label for item in found.inputs] == ["xlam-xlam_miniature"]
    assert any("is toolace data" in reason for _, reason in found.skipped)


def test_parquet_beside_the_raw_files_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    raw = (DATA / "rlla_raw" / "rlla_miniature.json").read_text()
    (tmp_path / "rlla.json").write_text(raw)
    (tmp_path / "train.parquet").write_bytes(b"PAR1....PAR1")
    found = find_inputs(tmp_path)
    assert [item.path.name for item in found.inputs] == ["rlla.json"]
    assert [path.name for path, _ in found.skipped] == ["train.parquet"]


def test_hidden_folders_are_not_searched(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "data.json").write_text("[")
    (tmp_path / "own.jsonl").write_text((DATA / "plain.jsonl").read_text())
    assert len(find_inputs(tmp_path).inputs) == 1


@pytest.mark.parametrize(
    ("make", "source", "message"),
    [
        (lambda d: None, "auto", r"no such file or folder"),
        (lambda d: d.mkdir(), "auto", r"no file of this folder holds a data set that is known here; download"),
        (lambda d: (d.mkdir(), (d / "README.md").write_text("x")), "xlam", r"holds xlam data; accept the terms of"),
        (lambda d: (d.mkdir(), (d / "a.json").write_text('[{"text": 1}]')), "auto", r"\(a.json is none of .*text"),
        (lambda d: d.write_text('[{"text": 1}]'), "auto", r"is none of toolace, .*\(its rows have text\)"),
        (lambda d: d.write_text('[{"query": 1, "answers": 2, "tools": 3}]'), "rlla", r"is xlam data, not rlla"),
        (lambda d: d.write_text("[1]"), "auto", r"no objects"),
        (lambda d: d.write_bytes((DATA / "hermes" / "json-mode-miniature.json").read_bytes()), "auto", "JSON mode"),
    ],
)  # fmt: skip
def test_nothing_to_read_is_one_line_with_a_remedy(tmp_path, make, source, message):
    make(tmp_path / "in")
    with pytest.raises(UserError, match=message) as caught:
        find_inputs(tmp_path / "in", source)
    assert ";" in str(caught.value)
