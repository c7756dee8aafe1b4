"""Several runs in one page: which belong together, differences seed by seed, runs that are unlike or broken."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from report_runs import results, write_run
from test_report import ATTACK, Page, edit_json, svgs

from autotool_fast.errors import UserError
from autotool_fast.report import charts, compare, tables, write_comparison
from autotool_fast.report.__main__ import main
from autotool_fast.report.variants import MAX_LABEL, MAX_VARIANTS, load_variants

STEPS = 40


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> list[Path]:
    """Two arms under seeds 0 and 1, one of them under seed 2 as well."""
    root = tmp_path_factory.mktemp("study")
    runs = [("decoupled", 1), ("none", 0), ("decoupled", 0), ("none", 1), ("none", 2)]
    return [
        write_run(root / f"{arm}-{seed}", STEPS, with_transcripts=False, seed=seed, arm=arm) for arm, seed in runs
    ]


def texts(table: tables.Table) -> dict[str, list[str]]:
    return {label: [cell.text for cell in cells] for label, cells in table.rows}


def figure_of(variants, key: str):
    return compare.curve(variants, "rl", *next(c for c in compare.CURVES if c[1] == key))


def test_two_runs_give_one_self_contained_page_beside_the_first(tmp_path, capsys):
    runs = [write_run(tmp_path / name, 3, arm=arm) for name, arm in (("a", "none"), ("b", "decoupled"))]
    assert main(list(map(str, runs))) == 0
    path = tmp_path / "comparison.html"
    assert capsys.readouterr().out.strip() == str(path)
    html = path.read_text()
    page = Page(html)
    assert page.tags.count("section") == 4
    assert len(svgs(html)) == 1 + len(compare.CURVES) + len(compare.SFT_STAGES)
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "style")
        assert "//" not in value
        if name == "href":
            assert ("id", value[1:]) in page.attributes
    policy = next(value for name, value in page.attributes if value.startswith("default-src"))
    assert policy.startswith("default-src 'none'")


def test_runs_that_differ_in_the_seed_alone_are_one_experiment_in_order_of_seed(study):
    first, second = load_variants(study)
    assert (first.label, second.label) == ("decoupled", "none")
    assert (first.seeds, second.seeds) == (("0", "1"), ("0", "1", "2"))
    assert first.names == ("decoupled-0", "decoupled-1")


def test_single_runs_are_called_by_their_folders_and_paths_where_those_are_the_same(tmp_path):
    runs = [write_run(tmp_path / name / "out", 1, arm=arm) for name, arm in (("x", "none"), ("y", "fixed"))]
    assert [v.label for v in load_variants(runs)] == ["x/out", "y/out"]
    long = [write_run(tmp_path / f"{'long' * 9}{i}", 1, arm=arm) for i, arm in enumerate(("none", "fixed"))]
    labels = [v.label for v in load_variants(long)]
    assert len(set(labels)) == 2
    assert all(len(label) <= MAX_LABEL for label in labels)


def test_long_names_lose_what_all_of_them_share(tmp_path):
    names = ("cold-adaptive+seed=0", "cold-decoupled+seed=0", "cold-none+seed=0")
    runs = [write_run(tmp_path / name, 1, arm=name.split("-")[1].split("+")[0]) for name in names]
    assert [v.label for v in load_variants(runs)] == ["adaptive", "decoupled", "none"]
    other = write_run(tmp_path / "warm-none", 1, arm="fixed")
    assert [v.label for v in load_variants([*runs[:1], other])][1] == "warm-none"
    short = [write_run(tmp_path / name, 1, arm=arm) for name, arm in (("lr-1", "none"), ("lr-2", "fixed"))]
    assert [v.label for v in load_variants(short)] == ["lr-1", "lr-2"]


def test_seeds_that_start_from_base_models_of_their_own_are_one_experiment(tmp_path):
    def run(arm: str, seed: int, base: str) -> Path:
        path = write_run(tmp_path / f"{arm}-{seed}-{base}", 1, seed=seed, arm=arm)
        edit_json(path / "config.json", lambda value: value["config"]["base"].update(reuse=f"runs/{base}/models/base"))
        return path

    own = [run("none", seed, f"base-{seed}") for seed in (1, 2)]
    (variant,) = load_variants(own)
    assert variant.seeds == ("1", "2")
    assert "base.reuse" not in variant.settings
    for base in ("base-30", "base-13"):
        assert len(load_variants([*own, run("none", 3, base)])) == 2
    assert len(load_variants([own[0], run("none", 2, "other-2")])) == 2


def test_the_same_experiment_twice_is_two_columns(tmp_path):
    runs = [write_run(tmp_path / name, 1) for name in "ab"]
    variants = load_variants(runs)
    assert [v.label for v in variants] == ["a", "b"]
    assert "None: all" in Page(write_comparison(runs).read_text()).text


def test_final_figures_are_those_of_the_runs_and_differences_are_paired_by_seed(study):
    variants = load_variants(study)
    table = compare.final_table(variants)
    first, second = (["decoupled, mean of 2", "seed 0", "seed 1"], ["none, mean of 3", "seed 0", "seed 1", "seed 2"])
    assert [label for label, _ in table.rows] == [*first, *second, "none − decoupled"]
    cells = [[cell.text for cell in cells] for _, cells in table.rows]

    def hard(seed: int, arm: str) -> float:
        return 100 * results(seed, arm)["models"]["rl"]["auto"]["bands"]["hard"]["accuracy"]

    assert [row[1] for row in cells[1:3]] == [f"{hard(seed, 'decoupled'):.1f}" for seed in (0, 1)]
    # seed 2 has no partner and stays out of the difference
    paired = sum(hard(seed, "none") - hard(seed, "decoupled") for seed in (0, 1)) / 2
    assert cells[-1][1] == f"{paired:+.1f}".replace("-", "−")
    assert table.rows[-1][1][1].tip == "mean over 2 shared seeds"
    assert table.rows[0][1][1].tip.startswith("2 seeds, ")


def test_an_unpaired_seed_does_not_move_the_difference(study, tmp_path):
    variants = load_variants(study)
    before = compare.difference(variants[1], variants[0], "accuracy", "hard")
    odd = variants[1].runs[2]
    overall = odd.models["rl"]["auto"]["bands"]["hard"]
    kept, overall["accuracy"] = overall["accuracy"], 1.0
    assert compare.difference(variants[1], variants[0], "accuracy", "hard") == before
    overall["accuracy"] = kept
    apart = [write_run(tmp_path / f"s{seed}", 1, seed=seed, arm=arm) for seed, arm in ((5, "none"), (6, "fixed"))]
    new, old, paired = compare.difference(*load_variants(apart), "accuracy", "hard")
    assert paired == 0
    assert new is not None
    assert old is not None


def test_the_headline_says_what_changed_in_which_direction(study):
    variants = load_variants(study)
    new, old, _ = compare.difference(variants[1], variants[0], "accuracy", "hard")
    text = compare.headline(variants)
    assert text.startswith("Against decoupled, none solves ")
    assert f"{100 * (old - new):.1f} points less of the hard tasks" in text
    assert "fewer response tokens (mean over 2 shared seeds)." in text
    back = compare.headline([variants[1], variants[0]])
    assert f"{100 * (old - new):.1f} points more of the hard tasks" in back
    assert "more response tokens" in back


def test_of_many_experiments_the_headline_names_the_best_and_the_worst(tmp_path):
    arms = ("fixed", "none", "adaptive", "decoupled", "decoupled-fixed")
    runs = [write_run(tmp_path / arm, 1, arm=arm) for arm in arms]
    edit_json(
        runs[3] / "results.json", lambda value: value["models"]["rl"]["auto"]["overall"].update(accuracy=0.987)
    )
    variants = load_variants(runs)
    text = compare.headline(variants)
    assert text.startswith("Of 5 experiments decoupled solves most of the test mix (98.7%), none least (")
    assert "fixed, with which the others are compared, solves " in text
    assert compare.headline(variants[:4]).count("Against fixed, ") == 3


def test_a_test_split_without_hard_tasks_has_no_columns_of_dashes(tmp_path):
    runs = [write_run(tmp_path / arm, 1, arm=arm) for arm in ("none", "fixed")]
    heads = compare.final_table(load_variants(runs)).columns
    assert "Solved, hard" in heads
    for run in runs:
        edit_json(run / "results.json", lambda value: value["models"]["rl"]["auto"]["bands"].pop("hard"))
    table = compare.final_table(load_variants(runs))
    assert table.columns == tuple(head for head in heads if "hard" not in head)
    assert {len(cells) for _, cells in table.rows} == {len(table.columns)}


def test_seeds_of_one_experiment_are_a_mean_with_their_range(study):
    decoupled = load_variants(study)[:1]
    figure = figure_of(decoupled, "think_rate/hard")
    assert figure.svg.count('class="line c-v0"') == 1
    assert figure.svg.count('class="band c-v0"') == 1
    values = [row.get("think_rate/hard") for run in decoupled[0].runs for row in run.rows("rl")[:1]]
    assert figure.data.rows[0][1][0].text == charts.percent(sum(values) / 2)
    assert "2 seeds of one experiment" in compare.headline(decoupled)


def test_the_mean_over_seeds_ends_with_the_shortest(tmp_path):
    runs = [write_run(tmp_path / f"s{seed}", steps, seed=seed) for seed, steps in ((0, 5), (1, 9))]
    figure = figure_of(load_variants(runs), "reward/mean")
    assert figure.data.rows[-1][0] == "4"


def test_curves_of_different_length_keep_their_own_steps(tmp_path):
    runs = [
        write_run(tmp_path / name, steps, arm=arm) for name, steps, arm in (("a", 9, "none"), ("b", 4, "fixed"))
    ]
    figure = figure_of(load_variants(runs), "reward/mean")
    rows = texts(figure.data)
    assert rows["8"][1] == "–"
    assert rows["8"][0] != "–"
    assert rows["3"][1] != "–"
    assert re.findall(r'class="direct (c-v\d)"', figure.svg) == ["c-v0", "c-v1"]
    assert 'class="leader c-v1"' in figure.svg


def test_the_overview_names_what_tells_the_runs_apart_and_states_the_rest_once(study):
    table, facts = compare._overview(load_variants(study))
    assert table.columns == ("arm", "seed", "RL steps", "in charts")
    assert texts(table)["none-2"] == ["none", "2", "39 of 240", "none"]
    assert facts == ["start clean", "preset mini"]


def test_settings_that_differ_are_listed_and_the_others_counted(tmp_path):
    runs = [write_run(tmp_path / name, 1) for name in "ab"]

    def change(value):
        value["config"]["rl"] |= {"target_long": 0.2}
        value["config"] |= {"arm": "fixed", "threads": 2}
        value["versions"]["torch"] = "2.12.1"

    edit_json(runs[1] / "config.json", change)
    text = Page(write_comparison(runs).read_text()).text
    settings = text[text.index("Settings that differ", text.index("Distilled SFT")) :]
    own, _, versions = settings.partition("Versions that differ")
    assert own.endswith("settingab armdecoupledfixed rl.target_long0.40.2 ")
    assert versions.strip() == "settingab torch2.13.02.12.1"
    total = len(load_variants(runs)[0].settings)
    assert f"{total - 2} other settings are the same" in settings


def test_unfinished_broken_and_empty_runs_are_compared_with_what_they_have(tmp_path):
    whole = write_run(tmp_path / "whole", 12)
    early = write_run(tmp_path / "early", 0, evaluated=False, with_transcripts=False, arm="none")
    broken = write_run(tmp_path / "broken", 4, evaluated=False, arm="fixed")
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "step": 4, "reward/mean": NaN, "acc/all": "x", "beta/long": 1e300}\n{"stage": "rl"')
    (broken / "results.json").write_text('{"models": {"rl": {"auto": {"overall": 3}}}}')
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    html = write_comparison([whole, early, broken, empty]).read_text()
    page = Page(html)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html)
    assert "broken: metrics.jsonl: 1 unreadable line(s) left out" in page.text
    assert "early: results.json is not there. Not finished: RL, Evaluation." in page.text
    assert "transcripts.jsonl" not in page.text
    settings = page.text[page.text.index("other settings are the same") :]
    assert "settingwholeearlybroken armdecouplednonefixed" in settings
    assert "No two of these experiments have been evaluated" in page.text
    table = texts(compare.final_table(load_variants([whole, early])))
    assert table["early"] == ["–"] * 6
    assert table["early − whole"] == ["–"] * 6


def test_runs_without_any_measurement_give_a_page_that_says_so(tmp_path):
    runs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
        runs.append(tmp_path / name)
    text = Page(write_comparison(runs).read_text()).text
    for says in ("has been evaluated in auto mode yet", "measurements of the RL stage", "No run has a configuration"):
        assert says in text


def test_a_run_is_judged_by_its_last_model_when_it_has_no_rl_model(tmp_path):
    runs = [write_run(tmp_path / name, 1, arm=arm) for name, arm in (("a", "none"), ("b", "fixed"))]
    edit_json(runs[1] / "results.json", lambda value: value["models"].pop("rl"))
    assert "b (Warm-up)" in texts(compare.final_table(load_variants(runs)))


def test_names_and_values_of_runs_cannot_become_markup(tmp_path):
    runs = [write_run(tmp_path / name, 2, arm=arm) for name, arm in (("<b>x", "none"), ("y", "fixed"))]
    edit_json(runs[0] / "config.json", lambda value: value["config"].update({ATTACK: ATTACK, "arm": ATTACK}))
    edit_json(runs[0] / "config.json", lambda value: value["versions"].update({ATTACK: ATTACK}))
    page = Page(write_comparison(runs).read_text())
    assert not {"img", "b"} & set(page.tags)
    assert page.tags.count("script") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(ATTACK) >= 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a", "nowhere"], "nowhere: no such run folder"),
        (["a", "empty"], "empty: not a run folder"),
        (["a", "file"], "file: no such run folder"),
        (["a", "b", "./a"], "a: is given twice"),
        (["a", "b", "--out", "empty"], "cannot write the report"),
        (["a", "b", "--out", "no/such/page.html"], "cannot write the report"),
        (["a", "b", "--best"], "unrecognized arguments: --best"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_run(tmp_path / name, 1, with_transcripts=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err
    assert not list(tmp_path.glob(".*"))


def test_more_experiments_than_can_be_told_apart_are_refused(tmp_path):
    runs = []
    for i in range(MAX_VARIANTS + 1):
        runs.append(tmp_path / str(i))
        runs[-1].mkdir()
        (runs[-1] / "config.json").write_text(json.dumps({"config": {"rl": {"lr": i}}}))
    with pytest.raises(UserError, match="9 different experiments"):
        load_variants(runs)
    assert len(load_variants(runs[1:])) == MAX_VARIANTS


def test_coordinates_are_finite_and_inside_the_charts(study):
    for svg in svgs(write_comparison(study, study[0] / "page.html").read_text()):
        width, height = (float(v) for v in svg.get("viewBox").split()[2:])
        for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", " ".join(p.get("d", "") for p in svg.iter())):
            assert math.isfinite(float(x))
            assert -0.5 <= float(x) <= width + 0.5
            assert -0.5 <= float(y) <= height + 0.5


def test_the_help_answers_at_once():
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "autotool_fast.report", "--help"], capture_output=True, text=True)
    # 0.3 s alone; the rest is room for a busy machine
    assert time.perf_counter() - begin < 3
    assert done.returncode == 0
    assert "RUN_DIR" in done.stdout
