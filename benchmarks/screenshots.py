"""Pictures of the report for the README, taken from real runs.

`python -m benchmarks.screenshots RUN --compare RUN RUN` writes docs/images/report.png (outcome and cost of a run),
report_training.png (its RL stage) and, given runs to compare, report_compare.png. Needs Chromium on the PATH; the run
folders are only read.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from autotool_fast.errors import UserError
from autotool_fast.report import write_comparison, write_report
from benchmarks.browser import Browser, find_chromium
from benchmarks.provenance import ROOT

IMAGES = ROOT / "docs" / "images"
WIDTH = 1000
MARGIN = 8
ROWS_OF_CURVES = 3


def take(run: Path, compared: Sequence[Path], images: Path) -> list[Path]:
    """Write the pictures of a run, and of the comparison of others if there are any, into the folder `images`.

    Returns:
        The paths of the pictures.

    Raises:
        UserError: no Chromium, or a folder that is no run.
    """
    if find_chromium() is None:
        raise UserError("no Chromium on the PATH", remedy="install it, for instance the package chromium")
    with tempfile.TemporaryDirectory() as scratch:
        report = write_report(run, Path(scratch) / "report.html")
        comparison = write_comparison(compared, Path(scratch) / "comparison.html") if compared else None
        images.mkdir(parents=True, exist_ok=True)
        with Browser() as browser:
            browser.open(report, WIDTH)
            pictures = {
                "report.png": browser.picture(0, _bottom(browser, "#trade")),
                "report_training.png": _section(browser, "#rl > h2", "#rl > .columns"),
            }
            if comparison is not None:
                browser.open(comparison, WIDTH)
                last = f"#training figure:nth-of-type({2 * ROWS_OF_CURVES})"
                end = last if browser.evaluate(f"document.querySelector({last!r}) !== null") else "#final"
                pictures["report_compare.png"] = browser.picture(0, _bottom(browser, end))
    for name, data in pictures.items():
        (images / name).write_bytes(data)
    return [images / name for name in pictures]


def _section(browser: Browser, first: str, last: str) -> bytes:
    top = browser.evaluate(f"scrollY + document.querySelector({first!r}).getBoundingClientRect().top") - MARGIN
    present = browser.evaluate(f"document.querySelector({last!r}) !== null")
    return browser.picture(top, _bottom(browser, last if present else first) - top)


def _bottom(browser: Browser, selector: str) -> float:
    """Where an element ends on the page, with a margin, in CSS pixels."""
    end = browser.evaluate(f"scrollY + document.querySelector({selector!r}).getBoundingClientRect().bottom")
    return end + MARGIN


def main(argv: Sequence[str] | None = None) -> int:
    """Take the pictures; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.screenshots", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder that is shown alone")
    parser.add_argument("--compare", metavar="RUN", nargs="+", type=Path, default=[], help="run folders to compare")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder to write to (default: docs/images)")
    options = parser.parse_args(argv)
    try:
        for path in take(options.run, options.compare, options.images):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
