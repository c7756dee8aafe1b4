"""How cost grows: with tokens, vocabulary, sequences, episodes, context and ranks; fits and a figure.

    python -m benchmarks.scaling [--only update head] [--repetitions 3] [--out FILE] [--figure FILE]
    python -m benchmarks.scaling --plot-only

Each series is fitted by t = a + b x (least squares) and by a power, t ~ x^n (least squares of the logarithms, with the
standard error of n). On a CPU t is processor time, which other work on the machine lengthens less, the median of
repetitions in which the points take turns; on a GPU it is the time between events. Several ranks are gloo processes of
one thread each, and their time is that of the clock. The figure is drawn from the file of results alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotool_fast.errors import UserError
from benchmarks import end_to_end
from benchmarks.provenance import RESULTS, ROOT

if TYPE_CHECKING:
    from benchmarks.report import Report
    from benchmarks.scaling_work import Series, Sizes

PARTS = ("update", "head", "rollout", "ranks")
FIGURE = ROOT / "docs" / "images" / "scaling.svg"


def parser() -> argparse.ArgumentParser:
    """Options of this script."""
    p = end_to_end.Parser(prog="python -m benchmarks.scaling", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; writes what is named")
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    p.add_argument("--vocab", type=end_to_end.positive, default=32768, metavar="N", help="vocabulary (default 32768)")
    p.add_argument("--hidden", type=end_to_end.positive, default=256, metavar="N", help="width (default 256)")
    p.add_argument("--layers", type=end_to_end.positive, default=4, metavar="N", help="layers (default 4)")
    p.add_argument("--repetitions", type=end_to_end.positive, default=3, metavar="N", help="timed ones (default 3)")
    p.add_argument("--seconds", type=float, default=60.0, metavar="S", help="bound of a series (default 60)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=end_to_end.positive, default=1, metavar="N", help="CPU threads (default 1)")
    p.add_argument("--out", type=Path, metavar="FILE", help="default benchmarks/results/scaling_DEVICE.json")
    p.add_argument("--figure", type=Path, metavar="FILE", help=f"default {FIGURE.relative_to(ROOT)}")
    p.add_argument("--plot-only", action="store_true", help="draw the figure from the results that are there")
    p.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write, draw; returns the exit code."""
    try:
        given = list(sys.argv[1:] if argv is None else argv)
        args = parser().parse_args(given)
        if not args.quick or args.plot_only:
            args.out = args.out or RESULTS / f"scaling_{args.device}.json"
            args.figure = args.figure or FIGURE
        if args.rank_out is not None:
            return _rank(args)
        if not args.plot_only:
            end_to_end.check_out(args.out)
            _measure(args)
        if args.out and args.figure:
            plot(read_results(args.out), args.figure)
            print(f"drawn: {args.figure}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def fit(x: Sequence[float], t: Sequence[float]) -> dict[str, float]:
    """Least squares of t = intercept + slope x, its R^2, and the exponent of t ~ x^n with its standard error.

    Needs three points, all positive, not all x the same.
    """
    intercept, slope, squares, total, _ = _line(x, t)
    _, exponent, *_, error = _line([math.log(v) for v in x], [math.log(v) for v in t])
    r2 = 1.0 - squares / total if total else 1.0
    return {"intercept": intercept, "slope": slope, "r2": r2, "exponent": exponent, "exponent_error": error}


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float, float, float]:
    """Intercept and slope, squared deviations from the line and from the mean, standard error of the slope."""
    n, mx, my = len(x), statistics.fmean(x), statistics.fmean(y)
    spread = sum((a - mx) ** 2 for a in x)
    assert n >= 3, "a fit with an error needs three points"
    assert spread > 0, "a fit needs different sizes"
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / spread
    intercept = my - slope * mx
    squares = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return intercept, slope, squares, sum((b - my) ** 2 for b in y), math.sqrt(squares / (n - 2) / spread)


def _shape_and_sizes(args: argparse.Namespace) -> tuple[Any, Sizes]:
    from benchmarks.episodes import Shape
    from benchmarks.scaling_work import SMALL, Sizes

    return Shape(hidden=args.hidden, layers=args.layers, vocab=args.vocab, tied=True), SMALL if args.quick else Sizes()


def _rank(args: argparse.Namespace) -> int:
    """One process of the series over ranks."""
    import torch

    from autotool_fast import distributed
    from benchmarks.scaling_work import rank_step

    torch.set_num_threads(1)
    with distributed.processes("cpu"):
        times = rank_step(*_shape_and_sizes(args), args.repetitions)
        if distributed.is_main():
            args.rank_out.write_text(json.dumps(times), encoding="utf-8")
    return distributed.leave(0)


def _measure(args: argparse.Namespace) -> None:
    from benchmarks import measure
    from benchmarks.report import Report, set_up
    from benchmarks.scaling_work import series

    device = set_up(args)
    shape, sizes = _shape_and_sizes(args)
    note = "t = a + b x, t ~ x^n by least squares; times are medians, on a CPU of processor time (ranks: of the clock)."
    report = Report("scaling", device, measure.ceilings(device, quick=True), args.out, note)
    model = f"Qwen2, {shape.layers} layers of {shape.hidden}, vocabulary {shape.vocab}, tied, float32"
    for part in (part for part in PARTS[:-1] if part in args.only):
        for one in series(part, sizes, shape, device):
            calls = {str(x): call for x, call in one.calls.items()}
            add(report, one, model, measure.interleaved(calls, device, args.repetitions, args.seconds))
    if "ranks" in args.only and device.type == "cpu":
        _add_ranks(args, report, sizes, model)
    report.finish()


def add(report: Report, one: Series, model: str, times: dict[str, Any]) -> None:
    """One table: the points of a series and, where there are three, their fit."""
    from benchmarks.report import Column, milliseconds, timed

    rows = []
    for x in one.calls:
        row = {"provider": str(x), "x": x, **timed(times[str(x)])}
        if "error" not in row:
            row["t"] = row.get("cpu_ms", row["ms"])
            row["us_per"] = 1e3 * row["t"] / one.units[x]
        rows.append(row)
    points = [(row["x"], row["t"]) for row in rows if "t" in row]
    found = fit(*zip(*points, strict=True)) if len(points) >= 3 else None
    columns = (
        Column("x", one.x),
        Column("ms", "ms", milliseconds),
        Column("cpu_ms", "CPU ms", milliseconds),
        Column("us_per", f"us per {one.per}", milliseconds),
    )
    facts = {"series": one.name, "x": one.x, "per": one.per, "model": model, "fit": found}
    report.add(f"{one.name}: {one.what}; {model}", facts, columns, rows, [_sentence(one.name, found)] if found else [])


def _sentence(name: str, f: dict[str, float]) -> str:
    return (
        f"{name}: t = {f['intercept']:.3g} ms {1e3 * f['slope']:+.3g} us x, R^2 {f['r2']:.4f}; "
        f"t ~ x^({f['exponent']:.2f} +- {f['exponent_error']:.2f})"
    )


def _add_ranks(args: argparse.Namespace, report: Report, sizes: Sizes, model: str) -> None:
    import os

    from benchmarks.report import Column, milliseconds
    from benchmarks.scaling_work import measure_ranks

    options = [f"--{name}={getattr(args, name)}" for name in ("vocab", "hidden", "layers", "repetitions")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in sizes.ranks:
            found = measure_ranks(ranks, options + ["--quick"] * args.quick, Path(folder) / f"{ranks}.json")
            row: dict[str, Any] = {"provider": f"{ranks} ranks", "x": ranks}
            if isinstance(found, str):
                row["error"] = found
            else:
                row["t"] = row["ms"] = statistics.median(found)
                alone = next((r["t"] for r in rows if r["x"] == 1 and "t" in r), None)
                row |= {"faster": alone / row["t"]} if alone else {}
            rows.append(row)
    cores = os.cpu_count() or 1
    notes = [f"more ranks than the {cores} cores share them" for row in rows[-1:] if row["x"] > cores]
    what = (
        f"optimizer step on {sizes.rank_sequences} sequences of {sizes.length} tokens, FSDP2 over gloo, one thread each"
    )
    columns = (
        Column("x", "ranks"),
        Column("ms", "ms", milliseconds),
        Column("faster", "faster", lambda value: f"{value:.2f}x"),
    )
    facts = {"series": "ranks", "x": "ranks", "per": "step", "model": model, "fit": None, "cores": cores}
    report.add(f"ranks: {what}; {model}", facts, columns, rows, notes)


def read_results(path: Path) -> dict[str, Any]:
    """A file of this script.

    Raises:
        UserError: it is not there, or is something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["benchmark"] != "scaling":
            raise KeyError
    except OSError:
        raise UserError("there are no results yet", where=str(path), remedy="run without --plot-only") from None
    except (ValueError, KeyError, TypeError):
        raise UserError("not a file of results of this script", where=str(path)) from None
    return results


def plot(results: dict[str, Any], path: Path) -> None:
    """One panel a series: times and their fit, or over ranks the times and the ideal.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("the figure needs matplotlib", remedy="pip install matplotlib, or the extra `bench`") from None

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tables = [table for table in results["tables"] if any("t" in row for row in table["rows"])]
    columns = min(4, max(1, len(tables)))
    lines = -(-len(tables) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.3 * columns, 2.9 * lines), layout="constrained", squeeze=False, facecolor="white"
    )
    for axis, table in zip(axes.flat, tables, strict=False):
        _panel(axis, table)
    for axis in list(axes.flat)[len(tables) :]:
        axis.set_axis_off()
    figure.suptitle(f"{results['measured_on']}, {results['provenance']['date']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same file from the same results: no date, and names that do not change.
    with matplotlib.rc_context({"svg.hashsalt": "scaling"}):
        figure.savefig(path, dpi=140, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _panel(axis: Any, table: dict[str, Any]) -> None:
    rows = [row for row in table["rows"] if "t" in row]
    x, t = [row["x"] for row in rows], [row["t"] for row in rows]
    axis.plot(x, t, "o", color="#1f77b4", markersize=5, clip_on=False, zorder=3)
    found = table["fit"]
    if found:
        ends = [0, max(x)]
        axis.plot(ends, [found["intercept"] + found["slope"] * v for v in ends], color="#d62728", linewidth=1.2)
        text = f"$x^{{{found['exponent']:.2f} \\pm {found['exponent_error']:.2f}}}$, $R^2$ {found['r2']:.3f}"
        axis.locator_params(axis="x", nbins=4)
        axis.text(0.04, 0.95, text, transform=axis.transAxes, fontsize=8, va="top")
    elif table["series"] == "ranks":
        axis.plot(x, [t[0] * x[0] / v for v in x], "--", color="0.6", linewidth=1.0, label="ideal")
        axis.legend(frameon=False, fontsize=8)
        axis.set_xticks(x)
    axis.set_title(table["series"], fontsize=10)
    axis.set_xlabel(table["x"], fontsize=9)
    axis.set_ylabel("ms of processor time" if "cpu_ms" in rows[0] else "ms", fontsize=9)
    axis.set_ylim(0, 1.25 * max(t))
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
