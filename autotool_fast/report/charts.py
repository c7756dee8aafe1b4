"""Charts as inline SVG: line chart, heat map, scatter plot, share bar.

Pure functions from numbers to an SVG string. Colours are CSS classes of style.css, so a chart follows dark
mode and print; nothing uses a style attribute, so the page can forbid them. All text is escaped here. Values
that are None or not finite are gaps, never zeros. Every mark has a <title>, which is its tooltip.
Leaves to others: captions, choice of data, smoothing (`smooth` is offered; the caller applies it).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 480
MAX_POINTS = 400
MAX_HOVER = 80
HEAT_LEVELS = 11
_TEXT = 6.4  # mean width in user units of a 12-unit sans-serif character
_LINE = 14

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """One line. `colour` is a class of style.css; `raw` (same x) is drawn thin behind `y`."""

    label: str
    x: Sequence[float]
    y: Values
    colour: str
    raw: Values | None = None
    dashed: bool = False


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


def finite(value: float | None) -> bool:
    """Whether a value can be drawn."""
    return value is not None and math.isfinite(value)


def smooth(values: Values, window: int) -> list[float | None]:
    """Mean over `window` (odd) neighbouring values, fewer at the ends; gaps stay gaps."""
    half = window // 2
    return [
        mean(values[max(0, i - half) : i + half + 1]) if finite(value) else None
        for i, value in enumerate(values)
    ]


def bins(n: int, at_most: int) -> list[range]:
    """Cut range(n) into at most `at_most` runs whose lengths differ by one at most."""
    count = min(n, at_most)
    return [range(i * n // count, (i + 1) * n // count) for i in range(count)]


def mean(values: Values) -> float | None:
    """Mean of the finite values, None if there are none."""
    part = [v for v in values if finite(v)]
    return sum(part) / len(part) if part else None


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round tick positions (steps of 1, 2, 2.5 or 5 times a power of ten) that cover [low, high]."""
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Tick positions for a logarithmic axis: 1-2-5 over few decades, else every n-th power of ten."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if high <= 100 * low:
        ticks = [t for e in range(first, last + 1) for m in (1, 2, 5) if low <= (t := m * 10.0**e) <= high]
        return ticks if len(ticks) > 1 else [t for t in nice_ticks(low, high) if t > 0 and low <= t <= high]
    stride = max(1, (last - first) // 5)
    return [t for e in range(first, last + 1, stride) if low <= (t := 10.0**e) <= high]


def plain(value: float) -> str:
    """A short number: at most three significant digits, no padded exponent."""
    if value < 0:
        return "−" + plain(-value)
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if size >= 100 else f"{value:.3g}"


def percent(value: float) -> str:
    """A share in [0, 1] as a percentage, one decimal where it has one."""
    return f"{100 * value:.1f}".removesuffix(".0") + "%"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _text(x: float, y: float, content: str, css: str, anchor: str = "start") -> str:
    return f'<text class="{css}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(content)}</text>'


def _svg(height: float, description: str, parts: list[str]) -> str:
    body = "".join(parts)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {_n(height)}" role="img" '
        f'aria-label="{escape(description)}">{body}</svg>'
    )


@dataclass(frozen=True)
class _Frame:
    """Plot area and the two scales; x and y ticks include the ends of the y range."""

    left: float
    right: float
    top: float
    bottom: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log_x: bool = False
    log_y: bool = False

    @staticmethod
    def _share(value: float, low: float, high: float, log: bool) -> float:
        if log:
            value, low, high = math.log(max(value, low * 1e-9)), math.log(low), math.log(high)
        return (value - low) / (high - low)

    def x(self, value: float) -> float:
        share = self._share(value, self.x_low, self.x_high, self.log_x)
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        share = self._share(value, self.y_low, self.y_high, self.log_y)
        return self.bottom - share * (self.bottom - self.top)

    def axes(
        self,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        x_label: str,
        y_label: str,
        y_format: Callable[[float], str],
    ) -> list[str]:
        parts = []
        for tick in y_ticks:
            y = self.y(tick)
            parts.append(f'<path class="grid" d="M{_n(self.left)} {_n(y)}H{_n(self.right)}"/>')
            parts.append(_text(self.left - 6, y + 4, y_format(tick), "tick", "end"))
        for tick in x_ticks:
            x = self.x(tick)
            parts.append(f'<path class="axis" d="M{_n(x)} {_n(self.bottom)}v4"/>')
            parts.append(_text(x, self.bottom + 17, plain(tick), "tick", "middle"))
        parts.append(f'<path class="axis" d="M{_n(self.left)} {_n(self.bottom)}H{_n(self.right)}"/>')
        parts.append(_text(self.left, self.top - 10, y_label, "label"))
        parts.append(_text((self.left + self.right) / 2, self.bottom + 35, x_label, "label", "middle"))
        return parts


def _spread(positions: Sequence[float], low: float, high: float) -> list[float]:
    """Move label positions apart to one text line each, inside [low, high], keeping their order."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [0.0] * len(positions)
    floor = low
    for i in order:
        placed[i] = max(positions[i], floor)
        floor = placed[i] + _LINE
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - _LINE
    return placed


def _path(frame: _Frame, x: Sequence[float], y: Values, css: str) -> str:
    """A polyline that breaks at gaps; a lone point between gaps becomes a dot."""
    runs: list[list[tuple[float, float]]] = [[]]
    for xv, yv in zip(x, y, strict=True):
        if finite(yv) and not (frame.log_y and yv <= 0):
            runs[-1].append((frame.x(xv), frame.y(yv)))
        elif runs[-1]:
            runs.append([])
    d = "".join("M" + "L".join(f"{_n(px)} {_n(py)}" for px, py in run) for run in runs if len(run) > 1)
    dots = "".join(
        f'<circle class="dot {css}" cx="{_n(run[0][0])}" cy="{_n(run[0][1])}" r="2.5"/>'
        for run in runs
        if len(run) == 1
    )
    return (f'<path class="line {css}" d="{d}"/>' if d else "") + dots


def _thin(series: Series) -> Series:
    if len(series.x) <= MAX_POINTS:
        return series
    parts = bins(len(series.x), MAX_POINTS)

    def reduce(values: Values) -> list[float | None]:
        return [mean([values[i] for i in part]) for part in parts]

    x = [float(series.x[part[-1]]) for part in parts]
    raw = reduce(series.raw) if series.raw is not None else None
    return Series(series.label, x, reduce(series.y), series.colour, raw, series.dashed)


def _x_ticks(low: float, high: float, whole: bool) -> list[float]:
    ticks = [t for t in nice_ticks(low, high, 6) if low <= t <= high]
    return [t for t in ticks if t == int(t)] if whole else ticks


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    description: str,
    y_range: tuple[float, float] | None = None,
    log_y: bool = False,
    as_percent: bool = False,
    height: float = 270,
) -> str | None:
    """A line chart with a direct label at the end of each line; None if no series has a finite value.

    Args:
        series: lines in drawing order. More than `MAX_POINTS` points are averaged in equal bins.
        y_range: fixed limits; otherwise the data's, with 0 included when it is near.
        log_y: logarithmic y axis; values <= 0 become gaps.
        as_percent: y values are shares in [0, 1], written as percentages.
    """
    drawn = [_thin(s) for s in series if any(finite(v) and not (log_y and v <= 0) for v in s.y)]
    if not drawn:
        return None
    pairs = [(x, v) for s in drawn for vs in (s.y, s.raw or ()) for x, v in zip(s.x, vs, strict=False)]
    ys = [v for _, v in pairs if finite(v) and not (log_y and v <= 0)]
    xs = [x for s in drawn for x in s.x]
    x_low, x_high = min(xs), max(xs)
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high = y_range or _y_range(ys, log_y)
    y_ticks = log_ticks(y_low, y_high) if log_y else nice_ticks(y_low, y_high)
    if not log_y:
        y_low, y_high = y_ticks[0], y_ticks[-1]
    write = percent if as_percent else plain
    left = 14 + _TEXT * max(len(write(t)) for t in y_ticks)
    right = WIDTH - 14 - _TEXT * max(len(s.label) for s in drawn)
    frame = _Frame(left, right, 30, height - 44, x_low, x_high, y_low, y_high, log_y=log_y)
    parts = frame.axes(_x_ticks(x_low, x_high, whole=True), y_ticks, x_label, y_label, write)
    parts += [_path(frame, s.x, s.raw, f"raw {s.colour}") for s in drawn if s.raw is not None]
    parts += [_path(frame, s.x, s.y, s.colour + (" dashed" if s.dashed else "")) for s in drawn]
    ends = [next(v for v in reversed(s.y) if finite(v) and not (log_y and v <= 0)) for s in drawn]
    places = _spread([frame.y(v) for v in ends], frame.top + 2, frame.bottom - 2)
    parts += [
        _text(frame.right + 8, y + 4, s.label, f"direct {s.colour}")
        for s, y in zip(drawn, places, strict=True)
    ]
    parts += _hover_columns(frame, drawn, x_label, write)
    return _svg(height, description, parts)


def _y_range(ys: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(ys), max(ys)
    if log:
        return (low, high) if high > 1.01 * low else (low / 2, high * 2)
    if 0 < low < 0.5 * high:
        low = 0.0
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        low, high = (0.0, high + pad) if low >= 0 else (low - pad, high + pad)
    return low, high


def _hover_columns(
    frame: _Frame, series: Sequence[Series], x_label: str, write: Callable[[float], str]
) -> list[str]:
    """Invisible columns over the plot whose <title> lists every series there."""
    xs = sorted({x for s in series for x in s.x})
    shown = [xs[part[len(part) // 2]] for part in bins(len(xs), MAX_HOVER)]
    edges = [frame.left, *((frame.x(a) + frame.x(b)) / 2 for a, b in itertools.pairwise(shown)), frame.right]
    tables = [
        ({x: (v, r) for x, v, r in zip(s.x, s.y, s.raw or [None] * len(s.x), strict=True)}, s.label)
        for s in series
    ]
    parts = []
    for i, x in enumerate(shown):
        lines = [f"{x_label} {plain(x)}"]
        for table, label in tables:
            value, raw = table.get(x, (None, None))
            if finite(value):
                lines.append(f"{label}: {write(value)}" + (f" (step {write(raw)})" if finite(raw) else ""))
        width = edges[i + 1] - edges[i]
        parts.append(
            f'<rect class="hit" x="{_n(edges[i])}" y="{_n(frame.top)}" width="{_n(width)}" '
            f'height="{_n(frame.bottom - frame.top)}"><title>{escape(chr(10).join(lines))}</title></rect>'
        )
    return parts


def heat_level(value: float) -> int:
    """Colour level 0 .. `HEAT_LEVELS` - 1 of a share in [0, 1]."""
    return min(HEAT_LEVELS - 1, max(0, round(value * (HEAT_LEVELS - 1))))


def heat_map(
    rows: Sequence[tuple[str, Values]],
    x: Sequence[float],
    *,
    x_label: str,
    y_label: str,
    description: str,
    max_columns: int = 60,
) -> str | None:
    """Shares in [0, 1] by row and x, averaged in equal bins beyond `max_columns`; None if all are gaps.

    Args:
        rows: (label, value per x), the first at the bottom.
        x: one position per column, ascending.
    """
    if not any(finite(v) for _, values in rows for v in values):
        return None
    parts_of_x = bins(len(x), max_columns)
    left, right, top = 14 + _TEXT * max(len(label) for label, _ in rows), WIDTH - 12, 34
    row_height = min(30, max(14, 190 / len(rows)))
    bottom = top + row_height * len(rows)
    width = (right - left) / len(parts_of_x)
    parts = [_text(left, top - 12, y_label, "label")]
    for i, (label, values) in enumerate(rows):
        y = bottom - row_height * (i + 1)
        parts.append(_text(left - 6, y + row_height / 2 + 4, label, "tick", "end"))
        for j, part in enumerate(parts_of_x):
            value = mean([values[c] for c in part])
            span = plain(x[part[0]]) if len(part) == 1 else f"{plain(x[part[0]])} to {plain(x[part[-1]])}"
            css = "gap" if value is None else f"h{heat_level(value)}"
            tip = f"{label}, {x_label} {span}: {'no sample' if value is None else percent(value)}"
            parts.append(
                f'<rect class="hit cell {css}" x="{_n(left + j * width)}" y="{_n(y)}" width="{_n(width)}" '
                f'height="{_n(row_height)}"><title>{escape(tip)}</title></rect>'
            )
            if value is None:
                parts.append(
                    f'<path class="axis" d="M{_n(left + j * width)} {_n(y)}l{_n(width)} {_n(row_height)}"/>'
                )
    wanted = _x_ticks(x[0], x[-1], whole=True) if x[-1] > x[0] else [x[0]]
    for tick in wanted:
        j = next(j for j, part in enumerate(parts_of_x) if x[part[-1]] >= tick)
        centre = left + (j + 0.5) * width
        parts.append(f'<path class="axis" d="M{_n(centre)} {_n(bottom)}v4"/>')
        parts.append(_text(centre, bottom + 17, plain(tick), "tick", "middle"))
    parts.append(_text((left + right) / 2, bottom + 35, x_label, "label", "middle"))
    parts += _colour_bar(right, top - 22)
    return _svg(bottom + 44, description, parts)


def _colour_bar(right: float, y: float) -> list[str]:
    size = 12
    start = right - HEAT_LEVELS * size - 36
    parts = [_text(start - 5, y + 10, "0%", "tick", "end")]
    parts += [
        f'<rect class="cell h{i}" x="{_n(start + i * size)}" y="{_n(y)}" width="{size}" height="{size}"/>'
        for i in range(HEAT_LEVELS)
    ]
    return [*parts, _text(start + HEAT_LEVELS * size + 5, y + 10, "100%", "tick")]


def _mark(shape: str, x: float, y: float, css: str, tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    if shape == "circle":
        return f'<circle class="{css}" cx="{_n(x)}" cy="{_n(y)}" r="5.5">{title}</circle>'
    corners = {
        "triangle": ((0, -6.5), (6, 4.5), (-6, 4.5)),
        "square": ((-5, -5), (5, -5), (5, 5), (-5, 5)),
    }[shape]
    d = "M" + "L".join(f"{_n(x + dx)} {_n(y + dy)}" for dx, dy in corners) + "Z"
    return f'<path class="{css}" d="{d}">{title}</path>'


def scatter(
    points: Sequence[Point],
    iso_lines: Sequence[IsoLine],
    *,
    x_label: str,
    y_label: str,
    description: str,
    legend: Sequence[Sequence[tuple[str, str, str]]],
    height: float = 380,
) -> str | None:
    """Shares in [0, 1] (y) against a positive quantity (x); None without points.

    The x axis starts at 0, or is logarithmic when the data span more than a factor of 12.

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
    frame = _Frame(52, WIDTH - 16, top, height - 44, x_low, x_high, 0, 1.05, log_x=log_x)
    parts = _draw_legend(legend)
    parts += frame.axes(x_ticks, [0, 0.2, 0.4, 0.6, 0.8, 1], x_label, y_label, percent)
    boxes = [(frame.x(p.x) - 7, frame.y(p.y) - 7, frame.x(p.x) + 7, frame.y(p.y) + 7) for p in points]
    parts += [_draw_iso(frame, line, boxes) for line in iso_lines]
    for p in points:
        parts.append(_mark(p.shape, frame.x(p.x), frame.y(p.y), f"hit mark {p.colour}", p.tip))
    for p in sorted(points, key=lambda p: p.x):
        if p.label:
            parts.append(_place_label(frame, p, boxes))
    return _svg(height, description, parts)


def _draw_legend(rows: Sequence[Sequence[tuple[str, str, str]]]) -> list[str]:
    parts = []
    for i, row in enumerate(rows):
        x, y = 8.0, 12 + 20 * i
        for label, colour, shape in row:
            parts.append(_mark(shape, x + 6, y, f"mark {colour}"))
            parts.append(_text(x + 16, y + 4, label, "tick"))
            x += 34 + _TEXT * len(label)
    return parts


def _overlaps(
    box: tuple[float, float, float, float], others: Sequence[tuple[float, float, float, float]]
) -> bool:
    return any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in others)


def _draw_iso(frame: _Frame, line: IsoLine, boxes: list[tuple[float, float, float, float]]) -> str:
    # y = slope * x leaves the plot at the top or at the right, whichever comes first
    end = min(frame.x_high, frame.y_high / line.slope)
    start = frame.x_low if frame.log_x else 0.0
    if end <= start:
        return ""
    steps = [i / 32 for i in range(33)]
    xs = [start * (end / start) ** s if frame.log_x else start + (end - start) * s for s in steps]
    d = "M" + "L".join(f"{_n(frame.x(x))} {_n(frame.y(line.slope * x))}" for x in xs)
    out = f'<path class="iso" d="{d}"/>'
    width = _TEXT * len(line.label)
    for value in (xs[i] for i in (30, 26, 21, 16, 11)):
        x = min(frame.x(value), frame.right - width / 2)
        y = frame.y(line.slope * value)
        box = (x - width / 2, y - 8, x + width / 2, y + 8)
        if box[0] > frame.left and box[3] < frame.bottom and not _overlaps(box, boxes):
            boxes.append(box)
            return out + _text(x, y + 4, line.label, "iso-label", "middle")
    return out


def _place_label(frame: _Frame, point: Point, boxes: list[tuple[float, float, float, float]]) -> str:
    """Write the label at the first free place around the mark; leave it out if there is none."""
    x, y, width = frame.x(point.x), frame.y(point.y), 1.15 * _TEXT * len(point.label) + 2  # bold
    spots = [(x + 10, y), (x - 10 - width, y)]
    spots += [(x - width / 2 + dx, y + dy) for dy in (16, -16, 30, -30) for dx in (0, width / 2, -width / 2)]
    for left, centre in spots:
        box = (left, centre - 7, left + width, centre + 7)
        inside = left >= frame.left and left + width <= WIDTH and frame.top - 8 < centre < frame.bottom - 6
        if inside and not _overlaps(box, boxes):
            boxes.append(box)
            return _text(left, centre + 4, point.label, f"direct {point.colour}")
    return ""


def share_bar(share: float) -> str:
    """A small horizontal bar for a share in [0, 1], to stand in a table cell beside its number."""
    width = max(0.0, min(1.0, share)) * 100
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="10"/><rect class="fill" width="{width:.1f}" height="10"/>'
        "</svg>"
    )
