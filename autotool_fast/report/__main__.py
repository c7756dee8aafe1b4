"""`python -m autotool_fast.report RUN_DIR`: write RUN_DIR/report.html and print its path.

What the user can fix is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from autotool_fast.errors import UserError
from autotool_fast.report.build import write_report


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, remedy=f"usage: {self.prog} RUN_DIR")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; returns the exit code."""
    parser = _Parser(
        prog="python -m autotool_fast.report",
        description="Write report.html of a run folder, finished or not.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder that a training run wrote")
    try:
        print(write_report(parser.parse_args(argv).run_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
