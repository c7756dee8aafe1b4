"""`python -m autotool_fast.report RUN_DIR [RUN_DIR ...]`: write the report of a run, or the comparison of several.

Prints the path of the page. What the user can fix is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from autotool_fast.errors import UserError, readers_may_leave
from autotool_fast.report import write_comparison, write_report


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, remedy=f"usage: {self.prog} RUN_DIR [RUN_DIR ...] [--out FILE]")


@readers_may_leave
def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit code."""
    parser = _Parser(
        prog="python -m autotool_fast.report",
        description="Write report.html of a run folder, finished or not, or one page that compares several of them.",
    )
    parser.add_argument(
        "run_dirs",
        metavar="RUN_DIR",
        nargs="+",
        type=Path,
        help="folder that a training run wrote; with several, the others are compared with the first, and runs that "
        "differ in the seed alone are shown as one experiment",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="HTML file to write; RUN_DIR/report.html if not given, comparison.html beside the first of several",
    )
    try:
        options = parser.parse_args(argv)
        if len(options.run_dirs) == 1:
            print(write_report(options.run_dirs[0], options.out))
        else:
            print(write_comparison(options.run_dirs, options.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
