"""Building a training set: what is left out, what goes where, and that the result is whole and repeatable."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from autotool_fast.errors import UserError
from autotool_fast.tasks import preparation
from autotool_fast.tasks.example import Example, read_examples, to_task
from autotool_fast.tasks.preparation import Settings, duplicate_key, in_test, normalise, prepare, question_key

DATA = Path(__file__).parent / "fixtures" / "data"
TOOL = {"name": "dim", "parameters": {"lamp": {"type": "str"}, "level": {"type": "int", "default": 5}}}


def record(question="Dim lamp 1.", lamp="1", tools=(TOOL,), **change) -> dict:
    answer = [{"name": "dim", "arguments": {"lamp": lamp}}]
    return {"tools": list(tools), "messages": [{"role": "user", "content": question}], "answer": answer, **change}


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def run(tmp_path, records=None, **options) -> tuple[dict, dict[str, list[Example]]]:
    inputs = options.pop("inputs", None) or (write(tmp_path / "own.jsonl", records),)
    settings = Settings(inputs=inputs, out=tmp_path / "out", **{"test_share": 0.0, "overwrite": True, **options})
    manifest = prepare(settings)
    parts = {part: list(read_examples(settings.out / f"{part}.jsonl")) for part in preparation.PARTS}
    for name, output in manifest["outputs"].items():
        assert output["records"] == len(parts[name.removesuffix(".jsonl")])
        assert output["sha256"] == hashlib.sha256((settings.out / name).read_bytes()).hexdigest()
    return manifest, parts


def questions(examples) -> list[str]:
    return [example.messages[-1]["content"] for example in examples]


MANY = [record(f"Dim lamp {i}.", str(i)) for i in range(200)]


def test_the_miniatures_of_every_source_become_one_set(tmp_path):
    manifest, parts = run(tmp_path, inputs=(DATA,), max_rejects=0.6)
    everything = [example for part in parts.values() for example in part]
    assert Counter(example.source for example in everything) == {
        "toolace": 7, "xlam": 5, "hermes": 4, "rlla": 3, "own": 2,
    }  # fmt: skip
    assert manifest["dropped"] == {"duplicate": 1, "summary": 4}
    assert len(manifest["inputs"]) == 5
    for example in everything:
        to_task(example)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == sum(item["rejects"] for item in manifest["inputs"]) == 11
    assert {"file", "row", "turn", "reason", "detail", "excerpt"} == set(rejects[0])
    for item in manifest["inputs"]:
        assert item["sha256"] == hashlib.sha256(Path(item["file"]).read_bytes()).hexdigest()
        assert item["records"] + item["rejects"] == sum(item["kinds"].values()) + sum(item["reasons"].values())
    assert len(everything) + sum(manifest["dropped"].values()) == sum(item["records"] for item in manifest["inputs"])


def test_duplicates_are_told_by_question_tools_and_step(tmp_path):
    other_tool = {**TOOL, "name": "switch"}
    later = record()["messages"] + [{"role": "assistant", "content": "x"}, {"role": "tool", "content": "ok"}]
    manifest, parts = run(
        tmp_path,
        [
            record(),
            record("  dim LAMP\n1. "),
            record(lamp="2"),
            record(tools=(TOOL, other_tool)),
            record(messages=later),
            record("Dim lamp 2."),
        ],
    )
    assert manifest["dropped"] == {"duplicate": 1, "duplicate_with_another_answer": 1}
    assert sum(map(len, parts.values())) == 4


def test_parts_have_the_sizes_asked_for_and_share_no_question(tmp_path):
    manifest, parts = run(tmp_path, MANY, sft=50, rl=80)
    assert {name: len(part) for name, part in parts.items()} == {"sft": 50, "rl": 80, "test": 0}
    assert manifest["dropped"] == {"not_needed": 70}
    assert not set(questions(parts["sft"])) & set(questions(parts["rl"]))


def test_too_few_records_are_shared_out_in_the_ratio_asked_for(tmp_path):
    _, parts = run(tmp_path, MANY, sft=1000, rl=3000)
    assert {name: len(part) for name, part in parts.items()} == {"sft": 50, "rl": 150, "test": 0}


def test_the_test_split_is_a_function_of_the_question_alone(tmp_path):
    _, parts = run(tmp_path, MANY, test_share=0.3, sft=100, rl=100)
    held = set(questions(parts["test"]))
    assert 30 <= len(held) <= 90  # 60 expected, 6.5 standard deviation
    assert {example.meta["split"] for example in parts["test"]} == {"test"}
    assert {example.meta["split"] for example in parts["sft"] + parts["rl"]} == {"train"}
    changed = [{**one, "tools": [TOOL, {**TOOL, "name": "x"}], "id": f"n-{i}"} for i, one in enumerate(reversed(MANY))]
    _, again = run(tmp_path, changed, test_share=0.3, seed=7, sft=10, rl=10)
    assert set(questions(again["test"])) == held


def test_all_turns_of_a_dialogue_stay_in_one_part(tmp_path):
    records = []
    for one in MANY[:60]:
        records.append(one)
        records.append({**one, "messages": [*one["messages"], {"role": "assistant", "content": "x"},
                                            {"role": "user", "content": "And lamp 9."}]})  # fmt: skip
    _, parts = run(tmp_path, records, test_share=0.3, sft=30, rl=90)
    homes = {}
    for name, part in parts.items():
        for example in part:
            homes.setdefault(question_key(example), []).append(name)
    split = [home for home in homes.values() if len(set(home)) > 1]
    assert len(split) <= 1  # the dialogue at the border between sft and rl
    assert not any("test" in home for home in split)


def test_down_sampling_is_per_source_and_by_seed(tmp_path):
    records = [*MANY[:100], *({**one, "source": "toolace"} for one in MANY[100:])]
    _, parts = run(tmp_path, records, take={"toolace": 10})
    assert Counter(e.source for part in parts.values() for e in part) == {"jsonl": 100, "toolace": 10}
    picks = []
    for seed in (0, 0, 1):
        _, parts = run(tmp_path, records, take={"toolace": 10, "jsonl": 0}, seed=seed)
        picks.append({question for part in parts.values() for question in questions(part)})
    assert picks[0] == picks[1] != picks[2]


def test_a_source_to_be_down_sampled_must_be_there_and_may_be_one_s_own(tmp_path):
    records = [{**one, "source": "mine"} for one in MANY[:40]]
    _, parts = run(tmp_path, records, take={"mine": 10})
    assert sum(map(len, parts.values())) == 10
    with pytest.raises(UserError, match="--take: no record has the source 'jsonl'; use mine"):
        run(tmp_path, records, take={"jsonl": 10})


def test_the_result_does_not_depend_on_the_order_of_rows(tmp_path):
    records = [{**one, "id": f"r-{i}"} for i, one in enumerate(MANY)]
    hashes = []
    for seed in (0, 1):
        random.Random(seed).shuffle(records)
        manifest, parts = run(tmp_path, records, test_share=0.2, take={"jsonl": 120}, sft=20, rl=60)
        hashes.append(manifest["outputs"])
    assert hashes[0] == hashes[1]
    assert questions(parts["rl"]) != sorted(questions(parts["rl"]))


def test_a_second_run_writes_the_same_bytes(tmp_path):
    run(tmp_path, MANY)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run(tmp_path, MANY)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_answers_that_do_not_fit_their_schema_can_be_left_out(tmp_path):
    bad = record("Dim lamp 3.", answer=[{"name": "dim", "arguments": {"lamp": 3}}])
    manifest, _ = run(tmp_path, [record(), bad], schema_valid=True)
    assert manifest["dropped"] == {"schema_invalid": 1}
    assert sum(map(len, run(tmp_path, [record(), bad])[1].values())) == 2


def test_safe_names_are_written_on_request(tmp_path):
    _, parts = run(tmp_path, inputs=(DATA / "toolace",), names="safe")
    tools = {t["function"]["name"] for part in parts.values() for e in part for t in e.tools}
    assert "Pool_Temperature" in tools
    assert all(name.replace("_", "").replace("-", "").isalnum() for name in tools)


# Nothing is lost, nothing is half


def test_an_existing_output_is_kept_without_overwrite(tmp_path):
    run(tmp_path, MANY)
    before = (tmp_path / "out" / "rl.jsonl").read_bytes()
    with pytest.raises(UserError, match="exists already; give --overwrite"):
        run(tmp_path, MANY[:5], overwrite=False)
    assert (tmp_path / "out" / "rl.jsonl").read_bytes() == before


def test_a_folder_that_prepare_did_not_write_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="was not written by prepare"):
        run(tmp_path, MANY)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_an_output_around_its_own_input_is_refused(tmp_path):
    inside = tmp_path / "out"
    inside.mkdir()
    source = write(inside / "own.jsonl", MANY)
    with pytest.raises(UserError, match="holds an input"):
        run(tmp_path, inputs=(source,))
    assert source.exists()


def test_too_many_rejects_stop_the_run_and_are_kept(tmp_path):
    broken = [*MANY[:70], *({"tools": [], "messages": [], "answer": []} for _ in range(30))]
    with pytest.raises(UserError, match=r"30% .* most of them \(30\) for no_tools; see .*rejects.jsonl, or") as caught:
        run(tmp_path, broken)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert len((tmp_path / "out.rejects.jsonl").read_text().splitlines()) == 30
    assert run(tmp_path, broken, max_rejects=0.3)[0]["inputs"][0]["rejects"] == 30


def test_a_failure_leaves_the_old_output_and_no_scratch(tmp_path, monkeypatch):
    run(tmp_path, MANY)
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    monkeypatch.setattr(preparation, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, MANY[:50])
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "own.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sft": -1}, "at least 0"),
        ({"sft": 0, "rl": 0}, "above 0"),
        ({"test_share": 1.0}, "less than 1"),
        ({"max_rejects": 2.0}, "from 0 to 1"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        Settings(inputs=(), out=Path("x"), **options)


def test_ids_must_not_clash(tmp_path):
    with pytest.raises(UserError, match="two different records have the id a"):
        run(tmp_path, [record(id="a"), record("Dim lamp 2.", id="a")])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(DATA / "toolace" / "data.json", tmp_path / name / "data.json")
    with pytest.raises(UserError, match="would give the same ids"):
        run(tmp_path, inputs=(tmp_path / "one", tmp_path / "two"))


def test_an_empty_result_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no record is left"):
        run(tmp_path, [record(answer=[], no_call=False)])


def test_the_keys_of_a_record():
    example = Example.from_json(record("A  b\nC"))
    assert question_key(example) == normalise("a B c")
    assert duplicate_key(example) == duplicate_key(replace(example, id="other", source="other"))
    assert not in_test(example, 0.0)
