"""Charts as inline SVG: line chart, heat map, share bar, and the axes they share with `scatter`.

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

WIDTH = 400
MAX_POINTS = 400
MAX_HOVER = 80
HEAT_LEVELS = 11
TEXT = 6.4  # mean width in user units of a 12-unit sans-serif character
BOLD = 7.4  # the same in bold
LINE = 14

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """One line. `colour` is a class of style.css; `raw` (same x) is drawn thin behind `y`, the space between the two
    limits of `band` (same x) shaded."""

    label: str
    x: Sequence[float]
    y: Values
    colour: str
    raw: Values | None = None
    dashed: bool = False
    band: tuple[Values, Values] | None = None


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


def short(value: float) -> str:
    """A coordinate in tenths of a user unit."""
    return f"{value:.1f}".removesuffix(".0")


def draw_text(x: float, y: float, content: str, css: str, anchor: str = "start") -> str:
    """A line of text, escaped."""
    return f'<text class="{css}" x="{short(x)}" y="{short(y)}" text-anchor="{anchor}">{escape(content)}</text>'


def draw_svg(height: float, description: str, parts: list[str]) -> str:
    """The parts as one drawing, `WIDTH` wide."""
    body = "".join(parts)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {short(height)}" role="img" '
        f'aria-label="{escape(description)}">{body}</svg>'
    )


@dataclass(frozen=True)
class Frame:
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
        """Position of a value on the x axis."""
        share = self._share(value, self.x_low, self.x_high, self.log_x)
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        """Position of a value on the y axis."""
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
        """Grid lines, ticks and the names of both axes."""
        parts = []
        for tick in y_ticks:
            y = self.y(tick)
            parts.append(f'<path class="grid" d="M{short(self.left)} {short(y)}H{short(self.right)}"/>')
            parts.append(draw_text(self.left - 6, y + 4, y_format(tick), "tick", "end"))
        for tick in x_ticks:
            x = self.x(tick)
            parts.append(f'<path class="axis" d="M{short(x)} {short(self.bottom)}v4"/>')
            parts.append(draw_text(x, self.bottom + 17, plain(tick), "tick", "middle"))
        parts.append(f'<path class="axis" d="M{short(self.left)} {short(self.bottom)}H{short(self.right)}"/>')
        parts.append(draw_text(self.left, self.top - 10, y_label, "label"))
        parts.append(draw_text((self.left + self.right) / 2, self.bottom + 35, x_label, "label", "middle"))
        return parts


def _spread(positions: Sequence[float], low: float, high: float) -> list[float]:
    """Move label positions apart to one text line each, inside [low, high], keeping their order."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [0.0] * len(positions)
    floor = low
    for i in order:
        placed[i] = max(positions[i], floor)
        floor = placed[i] + LINE
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - LINE
    return placed


def _path(frame: Frame, x: Sequence[float], y: Values, css: str) -> str:
    """A polyline that breaks at gaps; a lone point between gaps becomes a dot."""
    runs: list[list[tuple[float, float]]] = [[]]
    for xv, yv in zip(x, y, strict=True):
        if finite(yv) and not (frame.log_y and yv <= 0):
            runs[-1].append((frame.x(xv), frame.y(yv)))
        elif runs[-1]:
            runs.append([])
    d = "".join("M" + "L".join(f"{short(px)} {short(py)}" for px, py in run) for run in runs if len(run) > 1)
    dots = "".join(
        f'<circle class="dot {css}" cx="{short(run[0][0])}" cy="{short(run[0][1])}" r="2.5"/>'
        for run in runs
        if len(run) == 1
    )
    return (f'<path class="line {css}" d="{d}"/>' if d else "") + dots


def _end(series: Series, log_y: bool) -> tuple[float, float]:
    """The last point that can be drawn."""
    points = zip(reversed(series.x), reversed(series.y), strict=True)
    return next((x, v) for x, v in points if finite(v) and not (log_y and v <= 0))


def _area(frame: Frame, series: Series, low: Values, high: Values) -> str:
    """The shaded stretches between two limits; gaps end a stretch."""
    runs: list[list[tuple[float, float, float]]] = [[]]
    for x, a, b in zip(series.x, low, high, strict=True):
        if finite(a) and finite(b) and not (frame.log_y and a <= 0):
            runs[-1].append((frame.x(x), frame.y(a), frame.y(b)))
        elif runs[-1]:
            runs.append([])
    outlines = ([(x, b) for x, _, b in run] + [(x, a) for x, a, _ in reversed(run)] for run in runs if len(run) > 1)
    d = "".join("M" + "L".join(f"{short(x)} {short(y)}" for x, y in outline) + "Z" for outline in outlines)
    return f'<path class="band {series.colour}" d="{d}"/>' if d else ""


def _thin(series: Series) -> Series:
    if len(series.x) <= MAX_POINTS:
        return series
    parts = bins(len(series.x), MAX_POINTS)

    def reduce(values: Values) -> list[float | None]:
        return [mean([values[i] for i in part]) for part in parts]

    x = [float(series.x[part[-1]]) for part in parts]
    raw = reduce(series.raw) if series.raw is not None else None
    band = (reduce(series.band[0]), reduce(series.band[1])) if series.band is not None else None
    return Series(series.label, x, reduce(series.y), series.colour, raw, series.dashed, band)


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
    height: float = 240,
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
    pairs = [(x, v) for s in drawn for vs in (s.y, s.raw or (), *(s.band or ())) for x, v in zip(s.x, vs, strict=False)]
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
    left = 14 + TEXT * max(len(write(t)) for t in y_ticks)
    right = WIDTH - 12 - BOLD * max(len(s.label) for s in drawn)
    frame = Frame(left, right, 30, height - 44, x_low, x_high, y_low, y_high, log_y=log_y)
    parts = frame.axes(_x_ticks(x_low, x_high, whole=True), y_ticks, x_label, y_label, write)
    parts += [_area(frame, s, *s.band) for s in drawn if s.band is not None]
    parts += [_path(frame, s.x, s.raw, f"raw {s.colour}") for s in drawn if s.raw is not None]
    parts += [_path(frame, s.x, s.y, s.colour + (" dashed" if s.dashed else "")) for s in drawn]
    ends = [_end(s, log_y) for s in drawn]
    places = _spread([frame.y(v) for _, v in ends], frame.top + 2, frame.bottom - 2)
    for s, (last_x, last_y), y in zip(drawn, ends, places, strict=True):
        start, level = frame.x(last_x), frame.y(last_y)
        if abs(y - level) > 3 or start < frame.right - 3:
            d = f"M{short(start + 1)} {short(level)}H{short(frame.right + 1)}L{short(frame.right + 9)} {short(y)}"
            parts.append(f'<path class="leader {s.colour}" d="{d}"/>')
        parts.append(draw_text(frame.right + 11, y + 4, s.label, f"direct {s.colour}"))
    parts += _hover_columns(frame, drawn, x_label, write)
    return draw_svg(height, description, parts)


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
    frame: Frame, series: Sequence[Series], x_label: str, write: Callable[[float], str]
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
            f'<rect class="hit" x="{short(edges[i])}" y="{short(frame.top)}" width="{short(width)}" '
            f'height="{short(frame.bottom - frame.top)}"><title>{escape(chr(10).join(lines))}</title></rect>'
        )
    return parts


def heat_level(value: float, low: float = 0.0, high: float = 1.0) -> int:
    """Colour level 0 .. `HEAT_LEVELS` - 1 of a value in [low, high]."""
    share = (value - low) / (high - low) if high > low else 0.0
    return min(HEAT_LEVELS - 1, max(0, round(share * (HEAT_LEVELS - 1))))


def heat_map(
    rows: Sequence[tuple[str, Values]],
    x: Sequence[float],
    *,
    x_label: str,
    y_label: str,
    description: str,
    limits: tuple[float, float] = (0.0, 1.0),
    write: Callable[[float], str] = percent,
    max_columns: int = 60,
) -> str | None:
    """Values by row and x, averaged in equal bins beyond `max_columns`; None if all are gaps.

    Args:
        rows: (label, value per x), the first at the bottom.
        x: one position per column, ascending.
        limits: values of the lightest and the darkest colour.
        write: how a value reads in tooltips and beside the colour bar.
    """
    if not any(finite(v) for _, values in rows for v in values):
        return None
    columns = bins(len(x), max_columns)
    left, right, top = 14 + TEXT * max(len(label) for label, _ in rows), WIDTH - 12, 34
    row_height = min(30, max(14, 170 / len(rows)))
    bottom = top + row_height * len(rows)
    width = (right - left) / len(columns)
    parts = [draw_text(left, top - 12, y_label, "label")]
    for i, (label, values) in enumerate(rows):
        y = bottom - row_height * (i + 1)
        parts.append(draw_text(left - 6, y + row_height / 2 + 4, label, "tick", "end"))
        for j, part in enumerate(columns):
            value = mean([values[c] for c in part])
            span = plain(x[part[0]]) if len(part) == 1 else f"{plain(x[part[0]])} to {plain(x[part[-1]])}"
            css = "gap" if value is None else f"h{heat_level(value, *limits)}"
            tip = f"{label}, {x_label} {span}: {'no sample' if value is None else write(value)}"
            box = f'x="{short(left + j * width)}" y="{short(y)}" width="{short(width)}" height="{short(row_height)}"'
            parts.append(f'<rect class="hit cell {css}" {box}><title>{escape(tip)}</title></rect>')
            if value is None:
                d = f"M{short(left + j * width)} {short(y)}l{short(width)} {short(row_height)}"
                parts.append(f'<path class="axis" d="{d}"/>')
    for tick in _x_ticks(x[0], x[-1], whole=True) if x[-1] > x[0] else [x[0]]:
        j = next(j for j, part in enumerate(columns) if x[part[-1]] >= tick)
        centre = left + (j + 0.5) * width
        parts.append(f'<path class="axis" d="M{short(centre)} {short(bottom)}v4"/>')
        parts.append(draw_text(centre, bottom + 17, plain(tick), "tick", "middle"))
    parts.append(draw_text((left + right) / 2, bottom + 35, x_label, "label", "middle"))
    parts += _colour_bar(right, top - 22, [write(value) for value in limits])
    return draw_svg(bottom + 44, description, parts)


def _colour_bar(right: float, y: float, ends: Sequence[str]) -> list[str]:
    size = 10
    start = right - HEAT_LEVELS * size - 5 - TEXT * len(ends[1])
    parts = [draw_text(start - 5, y + 10, ends[0], "tick", "end")]
    parts += [
        f'<rect class="cell h{i}" x="{short(start + i * size)}" y="{short(y)}" width="{size}" height="12"/>'
        for i in range(HEAT_LEVELS)
    ]
    return [*parts, draw_text(start + HEAT_LEVELS * size + 5, y + 10, ends[1], "tick")]


def share_bar(share: float) -> str:
    """A small horizontal bar for a share in [0, 1], to stand in a table cell beside its number."""
    width = max(0.0, min(1.0, share)) * 100
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="10"/><rect class="fill" width="{width:.1f}" height="10"/>'
        "</svg>"
    )
