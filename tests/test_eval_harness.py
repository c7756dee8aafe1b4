"""Results that can be continued, figures by hand, and the command line's one-line errors."""

import json
import subprocess
import sys
import time

import pytest
from eval_stand_ins import STAND_INS, Scripted, reply_text

from autotool_fast.errors import UserError
from autotool_fast.eval.__main__ import main
from autotool_fast.eval.embedded import Embedded
from autotool_fast.eval.harness import EPISODES, Results, fingerprint, run
from autotool_fast.eval.policies import Null, Oracle
from autotool_fast.eval.records import mean, weighted
from autotool_fast.eval.table import describe, figures, summarise

APIBANK = ["--benchmark", "apibank", "--apibank", str(STAND_INS / "apibank")]


def world(**options):
    return Embedded(("set", "irrelevant", "missing"), per_cell=3, **options)


def lines(folder):
    return (folder / EPISODES).read_text().splitlines()


def test_oracle_and_null_on_the_embedded_world(tmp_path):
    benchmark = Embedded(per_cell=1)
    assert all(row["correct"] for row in run(benchmark, Oracle(), tmp_path / "a", modes=("auto", "think")))
    rows = run(benchmark, Null(), tmp_path / "b")
    assert {row["category"] for row in rows if row["correct"]} == {"irrelevant"} == set(benchmark.quiet)


def test_rows_stand_in_task_order_whatever_the_chunk(tmp_path):
    ids = [task.id for task in world().tasks()]
    for chunk in (1, 4, 100):
        run(world(), Oracle(), tmp_path / str(chunk), chunk=chunk)
        assert [json.loads(line)["id"] for line in lines(tmp_path / str(chunk))] == ids


def test_a_stopped_run_continues_where_it_stopped(tmp_path):
    class Stopping(Oracle):
        left = 2

        def play(self, tasks, mode):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return super().play(tasks, mode)

    with pytest.raises(KeyboardInterrupt):
        run(world(), Stopping(), tmp_path / "out", chunk=2)
    kept = lines(tmp_path / "out")
    assert len(kept) == 4
    played = []

    class Watched(Oracle):
        def play(self, tasks, mode):
            played.extend(task.id for task in tasks)
            return super().play(tasks, mode)

    rows = run(world(), Watched(), tmp_path / "out", chunk=2)
    assert lines(tmp_path / "out")[:4] == kept
    assert [row["id"] for row in rows] == [task.id for task in world().tasks()]
    assert played == [row["id"] for row in rows[4:]]


def test_a_line_cut_off_by_a_crash_is_played_again(tmp_path):
    run(world(), Oracle(), tmp_path)
    path = tmp_path / EPISODES
    whole = path.read_text()
    path.write_text(whole[:-30])
    rows = run(world(), Oracle(), tmp_path)
    assert len(rows) == 9
    assert [json.loads(line)["id"] for line in lines(tmp_path)] == [row["id"] for row in rows]


def test_another_mode_is_added_to_the_folder(tmp_path):
    run(world(), Oracle(), tmp_path)
    rows = run(world(), Oracle(), tmp_path, modes=("auto", "think"))
    assert [row["mode"] for row in rows] == ["auto"] * 9 + ["think"] * 9
    assert len(lines(tmp_path)) == 18


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"policy": Null()}, "policy"),
        ({"limit": 1}, "limit"),
        ({"benchmark": Embedded(("set",), per_cell=3)}, "benchmark"),
        ({"chunk": 5}, "chunk"),
    ],
)
def test_results_of_another_configuration_are_refused(tmp_path, change, word):
    settings = {"benchmark": world(), "policy": Oracle(), "limit": None, "chunk": 64}

    def play(benchmark, policy, limit, chunk):
        run(benchmark, policy, tmp_path, limit=limit, chunk=chunk)

    play(**settings)
    before = lines(tmp_path)
    with pytest.raises(UserError, match=rf"another configuration \(.*{word}.* differ\)"):
        play(**{**settings, **change})
    assert lines(tmp_path) == before


def test_changed_prompts_are_another_configuration():
    tasks = world().tasks()
    other = Embedded(("set", "irrelevant", "missing"), per_cell=3, style="natural").tasks()
    assert fingerprint(tasks) == fingerprint(world().tasks()) != fingerprint(other)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is no results folder"):
        Results(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:-10],
        lambda line: "{}",
        lambda line: "[1]",
        lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != "id"}),
        lambda line: json.dumps({**json.loads(line), "details": None}),
        lambda line: json.dumps({**json.loads(line), "output_tokens": "many"}),
        lambda line: "\udcff" + line,
    ],
    ids=["cut", "empty", "list", "no id", "no details", "no count", "not UTF-8"],
)
def test_a_damaged_row_is_one_line_and_nothing_is_lost(tmp_path, damage):
    run(world(), Oracle(), tmp_path)
    path = tmp_path / EPISODES
    rows = path.read_text().splitlines()
    damaged = "\n".join([*rows[:3], damage(rows[3]), *rows[4:]]).encode(errors="surrogateescape") + b"\nhalf a line"
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"line 4 is damaged: it .*; repair the line, or delete it") as caught:
        run(world(), Oracle(), tmp_path)
    assert str(caught.value).startswith(str(path))
    assert path.read_bytes() == damaged
    path.write_text("\n".join([*rows[:3], *rows[4:]]) + "\n")  # the remedy
    assert [row["id"] for row in run(world(), Oracle(), tmp_path)] == [json.loads(row)["id"] for row in rows]


def test_a_row_of_a_task_that_is_not_played_is_one_line(tmp_path):
    run(world(), Oracle(), tmp_path)
    path = tmp_path / EPISODES
    path.write_text(path.read_text() + json.dumps({**json.loads(lines(tmp_path)[0]), "id": "strange"}) + "\n")
    with pytest.raises(UserError, match=r"not played here \(strange\); delete its line"):
        run(world(), Oracle(), tmp_path)


@pytest.mark.parametrize("content", ["[]", "", "{", "3"])
def test_a_damaged_configuration_is_one_line_and_nothing_is_lost(tmp_path, content):
    run(world(), Oracle(), tmp_path)
    before = lines(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json: is damaged.*restore it, or give another --out"):
        run(world(), Oracle(), tmp_path)
    assert lines(tmp_path) == before


def test_figures_by_hand():
    def row(**values):
        base = {
            "correct": True,
            "strict": True,
            "thinks": False,
            "malformed": False,
            "seconds": 1.0,
            "details": {},
            "replies": ["x"],
        }
        return {**base, "prompt_tokens": 10, "output_tokens": 20, "think_tokens": 0, **values}

    rows = [
        row(details={"process": 1.0}),
        row(
            correct=False,
            strict=False,
            thinks=True,
            output_tokens=60,
            think_tokens=30,
            details={"process": 0.5, "x": "y"},
        ),
    ]
    assert figures(rows, 2_000_000) == {
        "n": 2,
        "accuracy": 0.5,
        "strict": 0.5,
        "think_rate": 0.5,
        "malformed": 0.0,
        "prompt_tokens": 10,
        "output_tokens": 40,
        "think_tokens": 15,
        "acu": 50 / (2 * 40),
        "seconds": 2.0,
        "details": {"process": 0.75},
    }
    unknown = figures([row(), row(output_tokens=None)], 2_000_000)
    assert (unknown["output_tokens"], unknown["acu"]) == (None, None)
    assert figures(rows, None)["acu"] is None


def test_the_summary_counts_reasons_and_keeps_modes_apart(tmp_path):
    policy = Scripted(lambda request: reply_text(text="no"), tokens=5)
    rows = run(world(), policy, tmp_path, modes=("auto", "think"))
    summary = summarise(world(), rows, ("auto", "think"), 1_000_000)
    assert list(summary["modes"]) == ["auto", "think"]
    auto = summary["modes"]["auto"]
    assert auto["failures_by_reason"] == {"not_solved": 6}
    assert {name: values["accuracy"] for name, values in auto["categories"].items()} == {
        "set": 0.0,
        "irrelevant": 1.0,
        "missing": 0.0,
    }
    assert auto["overall"]["acu"] == pytest.approx(100 / 3 / auto["overall"]["output_tokens"])


def test_parts_that_were_not_run_keep_their_weight():
    row = weighted("score", {"a": 0.5, "b": None}, {"a": 0.25, "b": 0.75})
    assert (row["value"], row["of"], row["not_run"]) == (0.125, 0.25, ["b"])
    assert describe(row) == "score: 12.50 of 25.0 (25.0 % a 50.00; 75.0 % b not run)"
    assert (mean([0.5, None]), mean([]), mean([0.5, 1.0])) == (None, None, 0.75)


def test_the_command_prints_a_table_and_writes_a_summary(tmp_path, capsys):
    assert main([*APIBANK, "--policy", "oracle", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "level-2-search" in shown
    assert "levels 1 and 2: 100.00 of 100.0" in shown
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["modes"]["auto"]["overall"]["accuracy"] == 1.0
    assert main([*APIBANK, "--policy", "null", "--out", str(tmp_path / "out")]) == 2
    assert "another configuration" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_done(tmp_path, capsys, monkeypatch):
    def stop(self, tasks, mode):
        raise KeyboardInterrupt

    monkeypatch.setattr(Oracle, "play", stop)
    assert main([*APIBANK, "--policy", "oracle", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "stopped; the same command continues\n"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("", ("--benchmark: is missing", "bfcl, apibank")),
        ("--benchmark world", ("--policy: is missing", "oracle")),
        ("--benchmark wrld --policy oracle", ("invalid choice: 'wrld'",)),
        ("--benchmark world --policy oracle --mode auto", ("unknown option --mode", "did you mean --modes?")),
        ("--benchmark world --policy oracle --modes think,fast", ("unknown mode 'fast'",)),
        ("--benchmark world --policy oracle --categories st", ("unknown category 'st'", "choose from set")),
        ("--benchmark world --policy oracle --limit 0", ("--limit", "must be at least 1")),
        ("--benchmark acebench --policy oracle", ("--acebench: is missing", "acebench needs it")),
        ("--benchmark acebench --acebench nowhere --policy oracle", ("holds no data_all", "chenchen0103/ACEBench")),
        ("--benchmark apibank --apibank nowhere --policy oracle", ("holds no lv1-lv2-samples", "DAMO-ConvAI")),
        ("--benchmark bfcl --bfcl nowhere --policy oracle", ("no such folder", "pip download")),
        ("--benchmark world --policy engine", ("--checkpoint: is missing",)),
        ("--benchmark world --policy engine --checkpoint nowhere", ("no such folder",)),
        ("--benchmark world --policy endpoint --endpoint http://x", ("--endpoint-model: is missing",)),
        ("--benchmark world --policy endpoint --endpoint x --endpoint-model y", ("must start with http",)),
        ("--benchmark world --policy oracle --export-bfcl x", ("--export-bfcl", "needs --benchmark bfcl")),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error
    assert list(tmp_path.iterdir()) == []


def test_help_and_mistakes_are_quick_and_light():
    script = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('HEAVY', sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))))\n"
        "from autotool_fast.eval.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    elapsed = []
    for argv in (["--help"], ["--benchmark", "bfcl", "--policy", "oracle", "--bfcl", "nowhere"]) * 2:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)
        elapsed.append(time.perf_counter() - began)
        assert "HEAVY []" in done.stdout, argv
    assert min(elapsed) < 1.0
