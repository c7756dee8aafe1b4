"""The report's charts: what is drawn for given numbers, and where its labels go."""

from __future__ import annotations

import itertools
import math
import re

import pytest

from autotool_fast.report import charts
from autotool_fast.report.scatter import IsoLine, Point, frontier, scatter


def test_not_finite_values_are_gaps_and_not_zeros():
    y = [1.0, 2.0, math.nan, 3.0, 4.0, None, 5.0]
    svg = charts.line_chart(
        [charts.Series("a", range(7), y, "c-ink")], x_label="step", y_label="value", description="d"
    )
    paths = re.findall(r'<path class="line c-ink" d="([^"]*)"', svg)
    assert [path.count("M") for path in paths] == [2]
    assert svg.count('<circle class="dot') == 1
    assert (
        charts.line_chart([charts.Series("a", [0], [None], "c-ink")], x_label="", y_label="", description="")
        is None
    )


@pytest.mark.parametrize("level", [0.0, 0.5, 0.99])
def test_direct_labels_of_close_lines_do_not_overlap(level):
    series = [charts.Series(name, [0, 1], [0.5, level + i / 1000], "c-ink") for i, name in enumerate("abcd")]
    svg = charts.line_chart(series, x_label="x", y_label="y", description="d", y_range=(0, 1))
    heights = sorted(float(y) for y in re.findall(r'class="direct c-ink" x="[\d.]+" y="([\d.]+)"', svg))
    # 12 is the font size in user units
    assert all(b - a >= 12 for a, b in itertools.pairwise(heights))
    assert len(heights) == 4
    # the plot of a 240 high chart reaches from 30 to 196
    assert heights[0] >= 30
    assert heights[-1] <= 200


def test_tooltips_name_the_step_and_every_line():
    series = [
        charts.Series("a", [0, 1], [0.25, 0.5], "c-ink", raw=[0.2, 0.6]),
        charts.Series("b", [1], [1.0], "c-ink"),
    ]
    svg = charts.line_chart(
        series, x_label="RL step", y_label="y", description="d", as_percent=True, y_range=(0, 1)
    )
    assert "<title>RL step 1\na: 50% (step 60%)\nb: 100%</title>" in svg


def test_smoothing_is_a_centred_mean_that_skips_gaps():
    assert charts.smooth([0.0, 3.0, 6.0, None, 10.0], 3) == [1.5, 3.0, 4.5, None, 10.0]


def test_long_runs_are_averaged_in_bins_that_cover_every_step():
    parts = charts.bins(1003, 400)
    assert [i for part in parts for i in part] == list(range(1003))
    assert {len(part) for part in parts} == {2, 3}


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.13, 0.82), (3e-7, 9e-6), (17, 1740), (0.6931, 0.6932)])
def test_ticks_cover_the_range_with_a_handful_of_round_steps(low, high):
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 3 <= len(ticks) <= 8
    mantissa = (ticks[1] - ticks[0]) / 10 ** math.floor(math.log10(ticks[1] - ticks[0]) + 1e-6)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-3


def test_the_heat_map_colours_by_value_and_crosses_out_gaps():
    svg = charts.heat_map(
        [("k=0", [0.0, 1.0]), ("k=1", [None, 0.58])], [3, 4], x_label="step", y_label="k", description="d"
    )
    cells = re.findall(r'<rect class="hit cell (\w+)" .*?<title>(.*?)</title>', svg)
    assert cells == [
        ("h0", "k=0, step 3: 0%"),
        ("h10", "k=0, step 4: 100%"),
        ("gap", "k=1, step 3: no sample"),
        ("h6", "k=1, step 4: 58%"),
    ]


def test_a_heat_map_of_counts_spreads_its_colours_over_the_limits():
    svg = charts.heat_map(
        [("k=0", [0.0, 15.0, 30.0])],
        [1, 2, 3],
        x_label="step",
        y_label="k",
        description="d",
        limits=(0, 30),
        write="{:.0f} tokens".format,
    )
    cells = re.findall(r'<rect class="hit cell (\w+)" .*?<title>(.*?)</title>', svg)
    assert cells == [
        ("h0", "k=0, step 1: 0 tokens"),
        ("h5", "k=0, step 2: 15 tokens"),
        ("h10", "k=0, step 3: 30 tokens"),
    ]
    assert ">30 tokens</text>" in svg


def test_a_line_that_ends_early_is_led_to_its_label():
    long = charts.Series("long", [0, 10], [0.0, 0.0], "c-ink")
    early = charts.Series("early", [0, 5], [1.0, 1.0], "c-mode")
    svg = charts.line_chart([long, early], x_label="x", y_label="y", description="d", y_range=(0, 1))
    ((start, level),) = re.findall(r'<path class="leader c-mode" d="M([\d.]+) ([\d.]+)H', svg)
    (line,) = re.findall(r'<path class="line c-mode" d="[^"]*L([\d.]+) ([\d.]+)"', svg)
    assert float(start) == pytest.approx(float(line[0]) + 1, abs=0.11)
    assert level == line[1]
    assert 'class="leader c-ink"' not in svg


def test_a_range_is_shaded_between_its_limits_and_broken_at_gaps():
    band = ([0.0, 0.0, None, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0])
    series = charts.Series("a", range(5), [0.5] * 5, "c-ink", band=band)
    svg = charts.line_chart([series], x_label="x", y_label="y", description="d", y_range=(0, 1))
    (outline,) = re.findall(r'<path class="band c-ink" d="([^"]*)"', svg)
    assert outline.count("Z") == 2
    heights = {y for _, y in re.findall(r"([\d.]+) ([\d.]+)", outline)}
    # the plot of a 240 high chart reaches from 30 to 196
    assert heights == {"30", "196"}


def test_labels_of_marks_in_one_place_do_not_overlap():
    points = [Point(10 + i / 100, 0.5, "c-ink", "circle", "", f"label {i}") for i in range(4)]
    svg = scatter(points, [IsoLine(0.05, "ACU 1")], x_label="x", y_label="y", description="d", legend=())
    found = re.findall(r'class="direct c-ink" x="([\d.]+)" y="([\d.]+)"', svg)
    boxes = [(float(x), float(y) - 9, float(x) + 7 * charts.BOLD, float(y) + 3) for x, y in found]
    assert len(boxes) == 4
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for left, top, right, bottom in boxes:
        # the marks lie on one spot
        assert not (left < 210 < right and top < 150 < bottom)


def test_the_frontier_is_what_no_other_point_beats():
    spots = ((3, 0.6), (1, 0.5), (2, 0.4), (3, 0.9), (4, 0.9))
    points = [Point(x, y, "c-ink", "circle", f"{x}, {y}") for x, y in spots]
    assert [(p.x, p.y) for p in frontier(points)] == [(1, 0.5), (3, 0.9)]
    axes = {"x_label": "x", "y_label": "y", "description": "d", "legend": ()}
    assert scatter(points, (), **axes).count('class="frontier"') == 1
    assert 'class="frontier"' not in scatter(points[:1], (), **axes)


def test_labels_keep_off_the_frontier():
    points = [Point(x, y, "c-ink", "circle", "", "label") for x, y in ((10, 0.5), (20, 0.9))]
    svg = scatter(points, (), x_label="x", y_label="y", description="d", legend=())
    stair = re.search(r'class="frontier" d="M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)"', svg)
    left, level, right, _ = map(float, stair.groups())
    for x, y in re.findall(r'class="direct c-ink" x="([\d.]+)" y="([\d.]+)"', svg):
        over = float(x) < right and float(x) + 5 * charts.BOLD > left
        assert not (over and float(y) - 9 < level < float(y) + 1)


def test_marks_that_hide_each_other_tell_of_both():
    points = [Point(x, 0.5, "c-ink", "circle", tip) for x, tip in ((10, "below"), (10.01, "above"), (20, "apart"))]
    svg = scatter(points, (), x_label="x", y_label="y", description="d", legend=())
    assert re.findall(r"<title>([^<]*)</title>", svg) == ["below\nabove", "below\nabove", "apart"]
