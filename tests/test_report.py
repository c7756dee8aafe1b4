"""The run report: charts, computed numbers, escaping, and runs that are incomplete."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_runs import metric_rows, results, transcript_rows, write_run

from autotool_fast.config import TrainConfig
from autotool_fast.errors import UserError
from autotool_fast.report import charts, figures, settings, tables, times, transcripts, write_report
from autotool_fast.report.__main__ import main
from autotool_fast.report.load import load_run
from autotool_fast.report.scatter import Point

ATTACK = "</script><img src=x onerror=alert(1)><b onclick='x'>\"'&"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """What a browser would build: tags, attributes, text and script bodies; fails on unbalanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in self.raw:
            self.raw[self._open[-1]].append(data)
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def build(path: Path) -> str:
    return write_report(path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    path = write_run(tmp_path_factory.mktemp("runs") / "full")
    write_report(path)
    return path


@pytest.fixture(scope="module")
def html(full) -> str:
    return (full / "report.html").read_text(encoding="utf-8")


def svgs(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r'<svg class="chart".*?</svg>', html, re.S)]


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_complete_run_gives_one_small_self_contained_page(html):
    assert len(html.encode()) < 1_000_000
    page = Page(html)
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "style"), (name, value)
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
            assert ("id", value[1:]) in page.attributes
        assert "//" not in value
    assert re.search(r"https?://|@import|url\(", "".join(page.raw["style"] + page.raw["script"])) is None
    assert page.tags.count("section") == 9
    assert "missing" not in [value for name, value in page.attributes if name == "class"]


def test_the_policy_of_the_page_allows_exactly_its_own_style_and_script(html):
    page = Page(html)
    policy = next(value for name, value in page.attributes if value.startswith("default-src"))
    assert policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        (body,) = page.raw[tag]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy


def test_the_headline_states_the_evaluated_numbers(full, html):
    models = results()["models"]
    rl, distilled = models["rl"]["auto"], models["distilled"]["auto"]
    sentence = tables.headline(load_run(full))
    for value in (
        rl["overall"]["accuracy"],
        rl["bands"]["hard"]["think_rate"],
        rl["bands"]["easy"]["think_rate"],
        rl["bands"]["hard"]["accuracy"],
        distilled["overall"]["accuracy"],
        1 - rl["overall"]["tokens"] / distilled["overall"]["tokens"],
    ):
        assert charts.percent(value) in sentence
    assert "fewer" in sentence
    assert "more" not in sentence
    assert sentence in Page(html).text


def test_the_headline_says_more_when_rl_uses_more_tokens(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=1)

    def longer(value):
        value["models"]["rl"]["auto"]["overall"]["tokens"] = (
            2 * value["models"]["distilled"]["auto"]["overall"]["tokens"]
        )

    edit_json(path / "results.json", longer)
    assert "uses 100% more" in tables.headline(load_run(path))


def test_the_final_table_has_every_model_by_band_and_the_change_in_points(full):
    run = load_run(full)
    accuracy = tables.final_tables(run)[0]
    assert [label for label, _ in accuracy.rows] == ["Base", "Distilled", "Warm-up", "RL", "RL − distilled"]
    rl, distilled = (results()["models"][m]["auto"]["bands"]["hard"]["accuracy"] for m in ("rl", "distilled"))
    assert accuracy.rows[3][1][3].text == f"{100 * rl:.1f}"
    assert accuracy.rows[4][1][3].text == f"{100 * (rl - distilled):+.1f}".replace("-", "−")
    assert "n = 900" in accuracy.rows[3][1][3].tip


def test_the_premise_puts_both_forced_modes_of_a_family_at_its_difficulties(full):
    first, second, *_ = tables.premise_tables(load_run(full))
    assert (first.title, second.title) == ("Base", "RL")
    rows = dict(first.rows)
    assert [cell.text for cell in rows["hop · no_think"]] == ["", "50", "12", "12", "12", "12", "12"]
    assert [cell.text for cell in rows["set · think"]] == ["95", "", "", "", "", "", ""]


def test_labels_and_refinement_are_shown_by_difficulty(full):
    run = load_run(full)
    labels, refined = tables.label_table(run), tables.refine_table(run)
    assert labels.columns == ("k=0", "k=1", "k=2", "k=3", "k=4", "k=5", "k=6", "all")
    rows = {label: [cell.text for cell in cells] for label, cells in labels.rows}
    assert rows["labelled short"][:3] == ["170", "97", "26"]
    assert rows["no_think accuracy, %"][:3] == ["100", "57", "15"]
    assert rows["prompts"][-1] == "1,190"
    rows = {label: [cell.text for cell in cells] for label, cells in refined.rows}
    assert rows["pool"] == ["90"] * 7 + ["630"]


def test_stages_that_were_not_asked_for_are_not_missed(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=0, evaluated=False)
    edit_json(path / "config.json", lambda value: value["config"].update(stages=["base", "label"]))
    assert "Not finished" not in Page(build(path)).text


def test_model_output_and_names_cannot_become_markup(tmp_path):
    path = write_run(tmp_path / "<b>run", rl_steps=3)
    row = {"stage": ATTACK, "step": 1, "task_id": ATTACK, "family": ATTACK, "difficulty": 1, "mode": ATTACK}
    row |= {"correct": True, "reward": 1, "stop_reason": ATTACK}
    texts = [{"text": ATTACK, "source": s, "logp": -0.1, "entropy": 0.3} for s in (0, 1, 2)]
    (path / "transcripts.jsonl").write_text(json.dumps(row | {"tokens": texts}))
    with (path / "metrics.jsonl").open("a") as file:
        extra = {"seconds": 1.0, f"time/{ATTACK}": 3.0, ATTACK: 1.0, f"{ATTACK}/k1": 1.0}
        file.write(json.dumps({"stage": ATTACK, "step": 0} | extra) + "\n")
    (path / "config.json").write_text(
        json.dumps({"config": {ATTACK: ATTACK, "arm": ATTACK}, "versions": {ATTACK: ATTACK}})
    )

    def poison(value):
        value["acu_unit"] = ATTACK
        value["models"][ATTACK] = value["models"]["base"]
        for cell in value["models"]["base"]["think"]["cells"]:
            cell["family"] = ATTACK

    edit_json(path / "results.json", poison)
    edit_json(path / "stages" / "label.json", lambda value: value.update(rule=ATTACK))
    html = build(path)
    page = Page(html)
    assert not {"img", "b"} & set(page.tags)
    assert page.tags.count("script") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert ATTACK not in "".join(page.raw["script"] + page.raw["style"])
    # prompt, sampled and tool text arrive whole, as text
    assert page.text.count(ATTACK) >= 3
    for svg in svgs(html):
        assert not svg.findall(".//img")


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl", "results.json", "transcripts.jsonl"])
def test_a_missing_file_is_named_and_the_rest_is_shown(tmp_path, missing):
    path = write_run(tmp_path / "run", rl_steps=5)
    (path / missing).unlink()
    text = Page(build(path)).text
    assert f"{missing} is not there." in text
    assert text.count("is not there.") == 1


def test_an_interrupted_run_is_summarised_from_its_last_steps(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=37, evaluated=False, with_transcripts=False)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "step": 37, "reward/me')
    text = Page(build(path)).text
    assert "RL is at step 36 of 240 and has not been evaluated" in text
    tail = [row["think_rate/hard"] for row in metric_rows(37) if row["stage"] == "rl"][-10:]
    assert charts.percent(sum(tail) / 10) in tables.headline(load_run(path))
    assert "metrics.jsonl: 1 unreadable line(s) left out" in text


def test_a_run_stopped_before_rl_says_so(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=0, evaluated=False, with_transcripts=False)
    text = Page(build(path)).text
    assert "This run has no RL result" in text
    assert "Not finished: RL, Evaluation." in text
    assert "the run did not reach this stage" in text


def test_a_folder_with_only_a_configuration_gives_a_report(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {}, "versions": {}}')
    assert "nothing has been measured yet" in Page(build(tmp_path)).text


GARBAGE = (
    None,
    3,
    "x",
    [],
    [1],
    {},
    {"auto": None},
    {"auto": []},
    {"auto": {"overall": 1, "bands": [], "cells": 4}},
)


@pytest.mark.parametrize("value", GARBAGE, ids=repr)
def test_results_of_the_wrong_shape_do_not_stop_the_report(tmp_path, value):
    path = write_run(tmp_path / "run", rl_steps=2, evaluated=False)
    (path / "results.json").write_text(json.dumps({"models": {"rl": value, "base": value}}))
    rows = [{"stage": "rl", "step": 1, "tokens": value}, {"tokens": [value]}, value]
    (path / "transcripts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for stage, key in (("label", "table"), ("refine", "by_difficulty")):
        (path / "stages" / f"{stage}.json").write_text(json.dumps({key: value, "kept": value}))
    with (path / "metrics.jsonl").open("a") as file:
        row = {"stage": "rl", "step": 2, "seconds": value, "reward/mean": value, "time/rollout": value}
        file.write(json.dumps(row) + "\n" + json.dumps({"stage": value, "step": 0}) + "\n")
    assert "Reinforcement learning" in Page(build(path)).text


def test_a_diverged_run_is_drawn(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=2)
    with (path / "metrics.jsonl").open("a") as file:
        for step, value in enumerate(("NaN", "Infinity", "1e300", "-1e300", "0", "1e-300"), start=2):
            keys = ("reward/mean", "loss/policy", "grad_norm", "mismatch/max", "acc/k1")
            file.write(
                f'{{"stage": "rl", "step": {step}, {", ".join(f"{json.dumps(k)}: {value}" for k in keys)}}}\n'
            )
    page = build(path)
    assert len(svgs(page)) > 10
    assert not re.search(r'="[^"]*\b(nan|inf)\b', page)


def test_every_chart_is_well_formed_labelled_and_inside_its_box(html):
    drawings = svgs(html)
    assert len(drawings) == 19
    for svg in drawings:
        assert svg.get("aria-label")
        assert len([t for t in svg.iter() if t.get("class") == "label" and t.text]) == 2
        width, height = (float(v) for v in svg.get("viewBox").split()[2:])
        for text in (t for t in svg.iter() if t.tag.endswith("text")):
            assert 0 <= float(text.get("x")) <= width
            assert 0 <= float(text.get("y")) <= height
        # 0.5: coordinates are rounded to a tenth
        for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", " ".join(p.get("d", "") for p in svg.iter())):
            assert -0.5 <= float(x) <= width + 0.5
            assert -0.5 <= float(y) <= height + 0.5


def test_wilson_interval_matches_published_values():
    # 0 of 10 has the closed form z^2 / (n + z^2); 81 of 263 is an example of Newcombe 1998, method 3
    assert tables.wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=2e-4)
    assert tables.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=2e-4)


def test_lines_of_equal_acu_go_through_points_with_that_acu(full):
    run = load_run(full)
    figure = figures.trade_figure(run)
    assert "lines of equal ACU" in figure.caption
    cell = run.cell("rl")
    points = [Point(cell["tokens"], cell["accuracy"], "c-rl", "circle", "")]
    factor = cell["acu"] * cell["tokens"] / cell["accuracy"]
    for line in figures.iso_lines(points, [factor]):
        acu = float(line.label.removeprefix("ACU "))
        # a point on the line at 10 tokens has the accuracy that gives this ACU
        assert factor * (line.slope * 10) / 10 == pytest.approx(acu)


def test_acu_that_no_single_factor_explains_gets_no_lines(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=1)

    def other_size(value):
        value["models"]["rl"]["auto"]["overall"]["acu"] *= 1.5

    edit_json(path / "results.json", other_size)
    figure = figures.trade_figure(load_run(path))
    assert "No ACU lines" in figure.caption
    assert 'class="iso"' not in figure.svg


def test_a_resumed_run_counts_each_step_once_and_all_of_its_time(tmp_path):
    rows = [{"stage": "rl", "step": s, "seconds": 10.0 * (s + 1), "reward/mean": 0.0} for s in range(3)]
    rows += [{"stage": "rl", "step": s, "seconds": 4.0 * (s - 1), "reward/mean": 1.0} for s in (2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = load_run(tmp_path)
    assert [row["reward/mean"] for row in run.rows("rl")] == [0.0, 0.0, 1.0, 1.0]
    # 20 s up to the checkpoint, then 8 s after the restart of the clock
    assert times.stage_seconds(run.rows("rl")) == 28.0


def test_phase_shares_are_of_the_stage_and_sparse_stages_have_none(full):
    timing = {t.stage: t for t in times.timings(load_run(full))}
    rollout = next(phase for phase in timing["RL"].phases if phase[0] == "rollout")
    rows = [row for row in metric_rows(200) if row["stage"] == "rl"]
    assert rollout[3] == f"{100 * sum(r['time/rollout'] for r in rows) / 1000 / (0.62 * 200):.1f}%"
    assert [phase[1:] for phase in timing["Warm-up SFT"].phases] == [
        ("–", timing["Warm-up SFT"].phases[0][2], "–", "")
    ]


def test_recovery_reports_the_dip_and_the_return(tmp_path):
    rates = [0.9] * 20 + [0.0] * 30 + [1.0] * 40
    rows = [{"stage": "rl", "step": s, "think_rate/hard": r} for s, r in enumerate(rates)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = tables.recovery(load_run(tmp_path))
    # the first window of 15 zeros ends at step 34; 11 of 15 ones (0.73) are reached at step 60
    assert (found["low"], found["low_step"], found["step"], found["last"]) == (0.0, 34.0, 60.0, 1.0)


def test_transcripts_are_spread_over_the_run_and_stay_in_budget():
    rows = transcript_rows(200)
    chosen = transcripts.choose(rows)
    steps = {row["step"] for row in chosen}
    assert len(chosen) <= transcripts.MAX_SHOWN
    assert {0, rows[-1]["step"]} <= steps
    assert chosen[0]["step"] == rows[-1]["step"]
    long = {"text": "x", "source": 1, "logp": -0.1, "entropy": 0.3}
    chosen = transcripts.choose([row | {"tokens": [long] * 5000} for row in rows])
    pieces = [piece for row in chosen for piece in transcripts.transcript(row).pieces]
    assert len(pieces) <= transcripts.MAX_TOTAL_TOKENS + len(chosen)
    assert any(piece.text == f"… {5000 - transcripts.MAX_TOKENS} tokens left out …" for piece in pieces)


def test_transcript_tokens_keep_source_and_entropy():
    tokens = [
        {"text": "ask", "source": 0},
        {"text": "a", "source": 1, "logp": math.log(0.5), "entropy": 0.2},
        {"text": "b", "source": 1, "logp": 0.0, "entropy": 0.0},
        {"text": "res", "source": 2},
        {"text": "ult", "source": 2},
    ]
    view = transcripts.transcript({"stage": "rl", "step": 3, "tokens": tokens, "reward": -0.5})
    assert [(p.kind, p.text, p.shade) for p in view.pieces] == [
        ("prompt", "ask", 0),
        ("sampled", "a", 4),
        ("sampled", "b", 0),
        ("tool", "result", 0),
    ]
    assert view.pieces[1].tip == "p = 0.5, H = 0.200 nats"
    assert view.pieces[3].fold == "tool result, 2 tokens"
    assert (view.n_sampled, view.entropy, view.reward, view.correct) == (2, "0.100", "-0.5", None)


def test_half_a_surrogate_pair_in_a_token_is_written(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=1)
    row = '{"stage": "rl", "step": 1, "tokens": [{"text": "\\ud83d ok", "source": 1}]}'
    (path / "transcripts.jsonl").write_text(row)
    assert "ok" in Page(build(path)).text


def test_the_report_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=1)
    before = {p.name for p in path.iterdir()}
    (path / "report.html").write_text("old")
    assert write_report(path) == path / "report.html"
    assert (path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert {p.name for p in path.iterdir()} == before | {"report.html"}


def test_the_command_prints_the_path_of_the_report(tmp_path, capsys):
    path = write_run(tmp_path / "run", rl_steps=1)
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path / "report.html")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere: no such run folder"),
        (["."], "not a run folder"),
        ([], "required: RUN_DIR"),
        ([".", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err


def test_a_report_that_cannot_be_written_is_a_user_error(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=1)
    (path / "report.html").mkdir()
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(path)
    assert [p.name for p in path.iterdir() if p.name.startswith(".")] == []


def test_the_report_needs_neither_torch_nor_transformers():
    code = (
        "import sys, autotool_fast.report; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("scope", "text"),
    [
        ("reply", "Per reply, over sampled tokens."),
        ("think", "Per reply, over the sampled tokens of the thinking."),
        ("mode", "Per reply, over the sampled mode tag."),
        ("blend", "Per reply, half over the sampled mode tag, half over all sampled tokens."),
    ],
)
def test_the_entropy_chart_says_over_which_tokens(tmp_path, scope, text):
    path = write_run(tmp_path / "run", rl_steps=3)
    record = json.loads((path / "config.json").read_text())
    record["config"]["rl"]["entropy_scope"] = scope
    (path / "config.json").write_text(json.dumps(record))
    assert text in write_report(path).read_text()


def test_settings_that_differ_from_the_preset_are_listed_with_both_values(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=1)
    assert "Every setting is that of preset mini." in Page(build(path)).text

    def change(value):
        value["config"]["rl"] |= {"steps": 60, "target_long": 0.2, "lr": 1e-3}
        value["config"]["rollout"]["max_calls"] = 3

    edit_json(path / "config.json", change)
    table, note = settings.preset_table(load_run(path))
    assert {key: [cell.text for cell in cells] for key, cells in table.rows} == {
        # the first two are set in the preset's file, the others are defaults
        "rl.steps": ["60", "240"],
        "rl.target_long": ["0.2", "0.4"],
        "rl.lr": ["0.001", str(TrainConfig().rl.lr)],
        "rollout.max_calls": ["3", str(TrainConfig().rollout.max_calls)],
    }
    assert note == "4 settings differ from preset mini."
    assert note in Page(build(path)).text


def test_a_preset_that_is_not_here_is_named_and_not_taken_for_no_difference(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=1)
    edit_json(path / "config.json", lambda value: value["config"].update(preset="gone/mine.toml"))
    table, note = settings.preset_table(load_run(path))
    assert table is None
    assert note.startswith("What differs from the preset is not known: gone/mine.toml")


def test_the_phases_of_a_profiled_run_are_shown(tmp_path):
    path = write_run(tmp_path / "run", rl_steps=1)
    assert "Profile" not in Page(build(path)).text
    phases = [
        {"phase": "rollout", "seconds": 6.0, "share": 0.75, "ms_per_step": 600.0, "calls": 10},
        {"phase": "rollout / tool wait", "seconds": 0.05, "share": 0.00625, "ms_per_step": 5.0, "calls": 31},
        {"phase": "other", "seconds": 1.95, "share": 0.24375, "ms_per_step": None, "calls": 0},
    ]
    (path / "profile").mkdir()
    entry = {"seconds": 8.0, "steps": 10, "phases": phases}
    (path / "profile" / "phases.json").write_text(json.dumps({"rl": entry, "base": "broken"}))
    (table,) = times.profile_tables(load_run(path))
    assert (table.title, table.note) == ("RL", "8.0 s in 10 steps")
    assert {label: [cell.text for cell in cells] for label, cells in table.rows} == {
        "rollout": ["6.0 s", "75.0%", "600.0", "10"],
        "rollout / tool wait": ["50 ms", "0.6%", "5.0", "31"],
        "other": ["1.9 s", "24.4%", "–", "–"],
    }
    assert "rollout / tool wait" in Page(build(path)).text


def test_every_chart_over_steps_has_its_values_as_a_table(full, html):
    run = load_run(full)
    for figure in (
        *figures.rl_figures(run),
        *figures.held_out_figures(run),
        *figures.heat_figures(run),
        *figures.sft_figures(run),
    ):
        assert len(figure.data.rows) == figures.DATA_ROWS or figure.title.startswith("Held-out"), figure.title
    coefficients = next(f for f in figures.rl_figures(run) if f.title == "Entropy coefficients").data
    assert coefficients.columns == ("β long", "β short")
    rows = [row for row in metric_rows(200) if row["stage"] == "rl"]
    assert (coefficients.rows[0][0], coefficients.rows[-1][0]) == ("0", "199")
    assert coefficients.rows[0][1][0].text == tables.significant(rows[0]["beta/long"])
    assert coefficients.rows[-1][1][0].text == tables.significant(rows[-1]["beta/long"])
    assert html.count('<details class="data">') == len(svgs(html)) - 1  # the table of the scatter plot stands beside it


def test_tokens_are_mapped_by_difficulty_where_they_were_logged(full, tmp_path):
    titles = [f.title for f in figures.heat_figures(load_run(full))]
    assert titles == [
        "Thinking rate by step and difficulty",
        "Accuracy by step and difficulty",
        "Response tokens by step and difficulty",
    ]
    figure = figures.heat_figures(load_run(full))[2]
    rows = [row for row in metric_rows(200) if row["stage"] == "rl"]
    part = charts.bins(200, figures.DATA_ROWS)[-1]
    expected = sum(rows[i]["tokens/k6"] for i in part) / len(part)
    assert figure.data.rows[-1][1][6].text == tables.tokens(expected)
    row = {"stage": "rl", "step": 1, "think_rate/k0": 0.5, "acc/k0": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
    assert len(figures.heat_figures(load_run(tmp_path))) == 2


def reply(*texts: str) -> list[transcripts.Piece]:
    tokens = [{"text": text, "source": 1, "logp": -0.1, "entropy": 0.3 * (text == "x")} for text in texts]
    return list(transcripts.transcript({"tokens": tokens}).pieces)


def test_a_tool_call_is_folded_with_its_tokens_and_its_highest_shade():
    # the tags are parts of tokens here and whole tokens there
    call = ('<tool_call>\n{"name": "go", ', "x", '"}\n</tool', "_call>\n")
    pieces = reply("[no_think]\n", *call, "<tool_call>", "y", " z")
    assert [p.kind for p in pieces] == ["sampled", "call", "call"]
    first, cut_off = pieces[1:]
    assert tuple(p.text for p in first.inside) == call
    assert first.fold == "tool call, 4 tokens"
    assert first.glimpse == '{"name": "go", x"}'
    assert first.shade == transcripts.entropy_shade(0.3) == 4
    assert [p.text for p in cut_off.inside] == ["<tool_call>", "y", " z"]
    assert cut_off.shade == 0


def test_a_bare_call_is_folded_too():
    pieces = reply("[think]", "hm ", '{"name": "go"', ', "parameters": {}}', "<|eot_id|>")
    assert [(p.kind, len(p.inside)) for p in pieces] == [("sampled", 0), ("sampled", 0), ("call", 2), ("sampled", 0)]


def test_a_turn_of_the_user_is_not_called_a_tool_result():
    def fold(text: str) -> str:
        return transcripts.transcript({"tokens": [{"text": text, "source": 2}]}).pieces[0].fold

    assert fold("<|im_start|>user\n4<|im_end|>") == "next user turn, 1 token"
    assert fold("<|im_start|>user\n<tool_response>4</tool_response>") == "tool result, 1 token"
    assert fold("<|im_start|>tool\n4") == "tool result, 1 token"


def test_the_report_can_be_written_elsewhere(tmp_path, capsys):
    path = write_run(tmp_path / "run", rl_steps=1)
    out = tmp_path / "page.html"
    assert main([str(path), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert "AutoTool run report" in out.read_text()
    assert not (path / "report.html").exists()
