"""Finished parts of a stage on disk: kept, continued, refused when they belong to something else."""

import json

import pytest

from autotool_fast.errors import UserError
from autotool_fast.partial import PartialResults

OWNER = {"prompts": "abc", "k": 2}


def never():
    raise AssertionError("a kept part is made once")


def test_a_part_is_made_once_and_found_again(tmp_path):
    path = tmp_path / "parts.jsonl"
    made = PartialResults(path, OWNER)
    assert made.part("a", lambda: [1, (2, None)]) == [1, [2, None]]  # as it will be read
    assert made.part("a", never) == [1, [2, None]]
    again = PartialResults(path, OWNER)
    assert len(again) == 1
    assert again.part("a", never) == [1, [2, None]]
    assert again.part("b", lambda: 3) == 3
    assert PartialResults(path, OWNER).part("b", never) == 3
    again.remove()
    assert not path.exists()


def test_what_fails_while_a_part_is_made_leaves_the_others(tmp_path):
    path = tmp_path / "parts.jsonl"
    parts = PartialResults(path, OWNER)
    parts.part("a", lambda: 1)
    with pytest.raises(AssertionError):
        parts.part("b", never)
    assert list(PartialResults(path, OWNER)._parts) == ["a"]


def test_without_a_part_there_is_no_file(tmp_path):
    parts = PartialResults(tmp_path / "parts.jsonl", OWNER)
    parts.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lost", [1, 5, 40])
def test_a_line_cut_off_by_a_crash_is_made_again(tmp_path, lost):
    path = tmp_path / "parts.jsonl"
    parts = PartialResults(path, OWNER)
    parts.part("a", lambda: 1)
    parts.part("b", lambda: "y" * 60)
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    again = PartialResults(path, OWNER)
    assert len(again) == 1
    again.part("b", lambda: "y" * 60)
    assert path.read_bytes() == whole


def test_a_first_line_cut_off_by_a_crash_starts_anew(tmp_path):
    path = tmp_path / "parts.jsonl"
    path.write_text('{"format": 1, "pro')
    assert PartialResults(path, OWNER).part("a", lambda: 1) == 1
    assert PartialResults(path, OWNER).part("a", never) == 1


def test_parts_of_something_else_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "parts.jsonl"
    PartialResults(path, OWNER).part("a", lambda: 1)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"made with something else \(k\); put back .*or delete the file"):
        PartialResults(path, {**OWNER, "k": 3})
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["{", "[]", '{"part": "a"}', "3", '{"part": [], "value": 1}', "[" * 5000])
def test_a_damaged_line_is_named_and_left_alone(tmp_path, line):
    path = tmp_path / "parts.jsonl"
    PartialResults(path, OWNER).part("a", lambda: 1)
    path.write_text(path.read_text() + line + "\n" + json.dumps({"part": "b", "value": 1}) + "\n")
    before = path.read_bytes()
    with pytest.raises(UserError, match="line 3 is damaged; delete that line"):
        PartialResults(path, OWNER)
    assert path.read_bytes() == before
