"""The run report: `write_report(run_dir)` writes one self-contained report.html.

Also on the command line: `python -m autotool_fast.report RUN_DIR`.
"""

from autotool_fast.report.build import write_report

__all__ = ["write_report"]
