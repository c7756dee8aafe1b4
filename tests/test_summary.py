"""The tables at the end of a run: every figure where it belongs, on any width."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from autotool_fast.summary import outcome_table, premise_table, print_summary


def values(accuracy, think_rate, tokens, acu=1.0):
    return {"accuracy": accuracy, "think_rate": think_rate, "tokens": tokens, "acu": acu}


def model(auto, bands, cells=()):
    modes = {
        mode: {
            "overall": auto,
            "bands": bands,
            "cells": [
                {"family": family, "difficulty": k, **values(accuracy, 0, 0)}
                for family, k, *pair in cells
                for accuracy in [pair[mode == "think"]]
            ],
        }
        for mode in ("auto", "no_think", "think")
    }
    return modes


CELLS = [("set", 0, 1.0, 0.99), ("hop", 1, 0.48, 1.0), ("hop", 4, 0.07, 0.97), ("reg", 1, 0.6, 0.5)]


@pytest.fixture
def results():
    bands = {"easy": values(0.91, 0.02, 11.25), "hard": values(0.83, 0.94, 51.75)}
    return {
        "acu_unit": "percent per unit",
        "models": {
            "base": model(values(0.5, 0.4, 30.04, 7.77), bands, CELLS),
            "rl": model(values(0.876, 0.354, 21.96, 12.34), bands, CELLS),
        },
    }


def columns(table):
    return [list(column.cells) for column in table.columns]


def rows(table):
    return [list(row) for row in zip(*columns(table), strict=True)]


def test_the_outcome_has_one_row_per_model_in_the_order_of_the_method(results):
    results["models"]["warmup"] = results["models"]["base"]
    results["models"] = dict(reversed(results["models"].items()))
    assert columns(outcome_table(results))[0] == ["base", "warm-up SFT", "AutoTool RL"]


def test_the_outcome_shows_auto_mode_over_the_mix_and_by_band(results):
    row = " ".join(rows(outcome_table(results))[-1])
    assert row.split()[:2] == ["AutoTool", "RL"]
    assert row.split()[2:6] == ["88%", "35%", "22.0", "12.3"]
    assert row.split()[6:] == ["-", "91%", "2%", "11.2", "-", "83%", "94%", "51.8"]


def test_the_premise_shows_both_forced_modes_of_the_base_model_by_cell(results):
    table = premise_table(results)
    assert [str(column.header) for column in table.columns] == ["family", "k=0", "k=1", "k=4"]
    assert rows(table) == [
        ["set", "100 / 99", "", ""],
        ["hop", "", "48 / 100", "7 / 97"],
        ["reg", "", "60 / 50", ""],
    ]
    assert "base" in str(table.title)


def test_without_a_base_model_the_premise_is_that_of_the_first(results):
    del results["models"]["base"]
    table = premise_table(results)
    assert "AutoTool RL" in str(table.title)
    assert len(rows(table)) == 3


def test_the_printed_summary_names_the_run_the_report_and_the_unit(results, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results))
    console = Console(file=io.StringIO(), width=200)
    print_summary(tmp_path, tmp_path / "report.html", console)
    text = console.file.getvalue()
    for part in ("AutoTool RL", "48 / 100", "percent per unit", f"run folder: {tmp_path}", f"{tmp_path}/report.html"):
        assert part in text


def test_a_run_without_an_evaluation_says_where_it_is(tmp_path):
    console = Console(file=io.StringIO(), width=20)
    print_summary(tmp_path, None, console)
    assert console.file.getvalue() == f"run folder: {tmp_path}\n"


def test_no_figure_is_cut_on_a_narrow_terminal(results, tmp_path, monkeypatch, capsys):
    widest = values(1.0, 1.0, 151.75, 127.77)
    results["models"] = {
        key: model(
            widest, dict.fromkeys(("easy", "medium", "hard"), widest), [("irrelevant", k, 1, 1) for k in range(7)]
        )
        for key in ("base", "distilled", "warmup", "rl")
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    monkeypatch.setenv("COLUMNS", "80")
    print_summary(tmp_path, None)
    text = capsys.readouterr().out
    assert "…" not in text
    assert text.count("100% 100% 151.8") == 4 * 4
    assert text.count("100 / 100") == 7
    for title in ("base", "always-think SFT", "warm-up SFT", "AutoTool RL", "whole mix", "127.8"):
        assert title in text
