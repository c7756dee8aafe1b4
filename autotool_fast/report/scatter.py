"""Scatter plot of shares against a positive quantity, with lines through the origin.

Pure functions to an SVG string, in the manner of `charts`, which has the axes. A label without a free place is left
out: its mark keeps its tooltip.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from autotool_fast.report.charts import (
    BOLD,
    TEXT,
    WIDTH,
    Frame,
    draw_svg,
    draw_text,
    finite,
    log_ticks,
    nice_ticks,
    percent,
    short,
)

MARK = 7.0
"""Marks nearer than this, in user units, hide each other."""


@dataclass(frozen=True)
class Point:
    """One mark of a scatter plot: shape circle, triangle or square, and its label if it has one."""

    x: float
    y: float
    colour: str
    shape: str
    tip: str
    label: str = ""


@dataclass(frozen=True)
class IsoLine:
    """The line y = slope * x."""

    slope: float
    label: str


def _mark(shape: str, x: float, y: float, css: str, tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    if shape == "circle":
        return f'<circle class="{css}" cx="{short(x)}" cy="{short(y)}" r="5.5">{title}</circle>'
    corners = {
        "triangle": ((0, -6.5), (6, 4.5), (-6, 4.5)),
        "square": ((-5, -5), (5, -5), (5, 5), (-5, 5)),
    }[shape]
    d = "M" + "L".join(f"{short(x + dx)} {short(y + dy)}" for dx, dy in corners) + "Z"
    return f'<path class="{css}" d="{d}">{title}</path>'


def frontier(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats, from left to right: none has at most their x and more than their y."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def scatter(
    points: Sequence[Point],
    iso_lines: Sequence[IsoLine],
    *,
    x_label: str,
    y_label: str,
    description: str,
    legend: Sequence[Sequence[tuple[str, str, str]]],
    height: float = 330,
) -> str | None:
    """Shares in [0, 1] (y) against a positive quantity (x); None without points.

    The x axis starts at 0, or is logarithmic when the data span more than a factor of 12. A dotted stair joins the
    `frontier`; the tooltip of a mark also says what lies beneath it.

    Args:
        iso_lines: lines through the origin, labelled where they leave the plot.
        legend: rows of (label, colour class, shape) entries, drawn above the plot.
    """
    points = [p for p in points if finite(p.x) and finite(p.y) and p.x > 0]
    if not points:
        return None
    x_min, x_max = min(p.x for p in points), max(p.x for p in points)
    log_x = x_max > 12 * x_min
    if log_x:
        x_low, x_high = x_min / 1.4, x_max * 1.4
        x_ticks = log_ticks(x_low, x_high)
    else:
        x_ticks = nice_ticks(0, x_max * 1.08, 6)
        x_low, x_high = 0.0, x_ticks[-1]
    top = 34 + 20 * len(legend)
    frame = Frame(48, WIDTH - 16, top, height - 44, x_low, x_high, 0, 1.05, log_x=log_x)
    parts = _draw_legend(legend)
    parts += frame.axes(x_ticks, [0, 0.2, 0.4, 0.6, 0.8, 1], x_label, y_label, percent)
    boxes = [(frame.x(p.x) - 7, frame.y(p.y) - 7, frame.x(p.x) + 7, frame.y(p.y) + 7) for p in points]
    boxes.append((frame.left, frame.top - 22, frame.left + TEXT * len(y_label), frame.top - 4))
    best = frontier(points)
    if len(best) > 1:
        stair = "".join(f"H{short(frame.x(p.x))}V{short(frame.y(p.y))}" for p in best[1:])
        parts.append(f'<path class="frontier" d="M{short(frame.x(best[0].x))} {short(frame.y(best[0].y))}{stair}"/>')
        for p, q in itertools.pairwise(best):
            corner, foot, head = frame.x(q.x), frame.y(p.y), frame.y(q.y)
            boxes += [(frame.x(p.x), foot - 2, corner, foot + 2), (corner - 2, head, corner + 2, foot)]
    labels = [_place_label(frame, p, boxes) for p in sorted(points, key=lambda p: p.x) if p.label]
    parts += [_draw_iso(frame, line, boxes) for line in iso_lines]
    for p in points:
        near = [q.tip for q in points if _distance(frame, p, q) < MARK]
        parts.append(_mark(p.shape, frame.x(p.x), frame.y(p.y), f"hit mark {p.colour}", "\n".join(near)))
    return draw_svg(height, description, [*parts, *labels])


def _distance(frame: Frame, p: Point, q: Point) -> float:
    return math.hypot(frame.x(p.x) - frame.x(q.x), frame.y(p.y) - frame.y(q.y))


def _draw_legend(rows: Sequence[Sequence[tuple[str, str, str]]]) -> list[str]:
    parts = []
    for i, row in enumerate(rows):
        x, y = 8.0, 12 + 20 * i
        for label, colour, shape in row:
            parts.append(_mark(shape, x + 6, y, f"mark {colour}"))
            parts.append(draw_text(x + 16, y + 4, label, "tick"))
            x += 34 + TEXT * len(label)
    return parts


def _overlaps(
    box: tuple[float, float, float, float], others: Sequence[tuple[float, float, float, float]]
) -> bool:
    return any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in others)


def _draw_iso(frame: Frame, line: IsoLine, boxes: list[tuple[float, float, float, float]]) -> str:
    # y = slope * x leaves the plot at the top or at the right, whichever comes first
    end = min(frame.x_high, frame.y_high / line.slope)
    start = frame.x_low if frame.log_x else 0.0
    if end <= start:
        return ""
    steps = [i / 32 for i in range(33)]
    xs = [start * (end / start) ** s if frame.log_x else start + (end - start) * s for s in steps]
    d = "M" + "L".join(f"{short(frame.x(x))} {short(frame.y(line.slope * x))}" for x in xs)
    out = f'<path class="iso" d="{d}"/>'
    width = TEXT * len(line.label)
    for value in (xs[i] for i in (30, 26, 21, 16, 11)):
        x = min(frame.x(value), frame.right - width / 2)
        y = frame.y(line.slope * value)
        box = (x - width / 2, y - 8, x + width / 2, y + 8)
        if box[0] > frame.left and box[3] < frame.bottom and not _overlaps(box, boxes):
            boxes.append(box)
            return out + draw_text(x, y + 4, line.label, "iso-label", "middle")
    return out


def _place_label(frame: Frame, point: Point, boxes: list[tuple[float, float, float, float]]) -> str:
    """Write the label at the first free place around the mark; leave it out if there is none."""
    x, y, width = frame.x(point.x), frame.y(point.y), BOLD * len(point.label) + 4
    spots = [(x + 10, y), (x - 10 - width, y)]
    spots += [(x - width / 2 + dx, y + dy) for dy in (16, -16, 30, -30) for dx in (0, width / 2, -width / 2)]
    for left, centre in spots:
        box = (left, centre - 7, left + width, centre + 7)
        inside = left >= frame.left and left + width <= WIDTH and frame.top - 8 < centre < frame.bottom - 6
        if inside and not _overlaps(box, boxes):
            boxes.append(box)
            return draw_text(left, centre + 4, point.label, f"direct {point.colour}")
    return ""
