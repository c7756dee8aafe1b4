"""The run report: `write_report(run_dir)` writes one self-contained report.html; also `python -m autotool_fast.report`."""

from autotool_fast.report.build import write_report

__all__ = ["write_report"]
