"""The overlap audit: words, n-grams, benchmark shapes, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotool_fast.errors import UserError
from autotool_fast.tasks.example import Example
from autotool_fast.tasks.overlap import Audit, Item, comparable_name, ngrams, read_benchmarks, words

BENCHMARKS = Path(__file__).parent / "fixtures" / "data" / "benchmarks"
NINE = "one two three four five six seven eight nine"


def example(*questions: str, tool: str = "other", id: str = "r-0") -> Example:
    messages = []
    for question in questions:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "x"}]
    return Example.from_json({"id": id, "tools": [{"name": tool}], "messages": messages[:-1], "answer": []})


def audit(items, *examples) -> dict:
    result = Audit([("b", items)])
    for one in examples:
        result.add(one)
    return result.to_json()["benchmarks"][0]


def test_words_ignore_case_and_punctuation_and_split_chinese():
    assert words("It's 5 o'clock_now: 三号池!") == ["it", "s", "5", "o", "clock", "now", "三", "号", "池"]


def test_ngrams():
    assert len(ngrams(NINE)) == 2
    assert ngrams("One, two") == {("one", "two")}
    assert ngrams("?!") == set()


@pytest.mark.parametrize(
    ("question", "ngram", "same"),
    [
        (NINE, 1, 1),
        (NINE.upper() + "!", 1, 1),
        ("zero " + NINE + " ten", 1, 0),
        ("one two three four five six seven eight", 1, 0),
        ("one two three four five six seven", 0, 0),
        ("one two three four FIVE x six seven eight nine", 0, 0),
    ],
)
def test_eight_shared_words_in_a_row_are_an_overlap(question, ngram, same):
    found = audit([Item("q", (NINE,), ())], example(question))
    assert (found["questions_sharing_ngram"], found["questions_identical"]) == (ngram, same)
    assert found["records_sharing_ngram"] == ngram


def test_short_questions_count_only_when_equal():
    item = Item("q", ("Close the door.",), ())
    assert audit([item], example("close the door"))["questions_sharing_ngram"] == 1
    assert audit([item], example("close the door now"))["questions_sharing_ngram"] == 0


def test_every_user_turn_counts_and_no_other():
    item = Item("q", ("a b c d e f g h",), ())
    assert audit([item], example("first", "a b c d e f g h"))["questions_sharing_ngram"] == 1
    assert audit([Item("q", ("x",), ())], example("first", "second"))["questions_sharing_ngram"] == 0


def test_an_entry_is_counted_once_and_names_a_few_records():
    records = [example(NINE, id=f"r-{i}") for i in range(9)]
    found = audit([Item("q", (NINE, NINE), ()), Item("p", ("nothing",), ())], *records)
    assert (found["questions"], found["questions_sharing_ngram"], found["records_sharing_ngram"]) == (2, 1, 9)
    assert found["met"] == {"q": ["r-0", "r-1", "r-2", "r-3", "r-4"]}


def test_tool_names_are_compared_whatever_their_spelling():
    assert len({comparable_name(name) for name in ("getWeather", "get_weather", "Get Weather", "get.weather")}) == 1
    found = audit([Item("q", (), ("get_weather", "getWeather", "other_tool"))], example("x", tool="Get Weather"))
    assert (found["tools"], found["tools_shared"], found["shared_tool_names"]) == (2, 1, ["get_weather"])


def test_benchmark_files_of_every_shape_are_read():
    found = dict(read_benchmarks(BENCHMARKS))
    assert set(found) == {"BFCL_miniature", "ace_miniature", "apibank_miniature"}
    assert found["BFCL_miniature"][1] == Item("simple_1", ("Temperature of pools 3 and 4 in F?",), ("pool.temp",))
    (ace,) = found["ace_miniature"]
    assert [query.split()[0] for query in ace.queries] == ["Sauna", "the"]
    assert ace.tools == ("Book_Sauna",)
    assert [item.queries for item in found["apibank_miniature"]] == [("Pool 3?",), (), ()]
    assert found["apibank_miniature"][2].tools == ("PoolTemp",)


def test_processed_items_and_plain_records_are_read(tmp_path):
    path = tmp_path / "level-1.json"
    item = {"system": "s", "user": "History\n<user> Pool 3? </user>\n<user> Now. </user>", "answer": [{"name": "P"}]}
    path.write_text(json.dumps([item, example("hello").to_json()]))
    ((name, items),) = read_benchmarks(path)
    assert name == "level-1"
    assert [query.strip() for query in items[0].queries] == ["Pool 3?", "Now."]
    assert (items[0].tools, items[1].queries, items[1].tools) == (("P",), ("hello",), ("other",))


def test_a_folder_with_a_file_per_dialogue_is_one_benchmark(tmp_path):
    folder = tmp_path / "level-1"
    folder.mkdir()
    for i in range(50):
        (folder / f"d{i}.jsonl").write_text(json.dumps({"role": "User", "text": f"question {i}"}) + "\n")
    ((name, items),) = read_benchmarks(folder)
    assert (name, len({item.id for item in items})) == ("level-1", 50)


def test_paths_without_questions_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_benchmarks(tmp_path / "none")
    (tmp_path / "a.json").write_text('[{"ground_truth": []}]')
    with pytest.raises(UserError, match="no questions or tools found"):
        read_benchmarks(tmp_path)


def test_the_table_has_one_line_per_benchmark():
    result = Audit(read_benchmarks(BENCHMARKS))
    result.add(example("Temperature of pools 3 and 4 in F?", tool="Get Pool Temp"))
    head, *lines = result.table().splitlines()
    assert len({len(line) for line in (head, *lines)}) == 1
    assert "1 (50.0%)" in lines[0]
    assert len(lines) == 3
