"""HTML reports: `write_report(run_dir)` explains one run, `write_comparison(run_dirs)` sets several side by side.

Also on the command line: `python -m autotool_fast.report RUN_DIR [RUN_DIR ...]`.
"""

from autotool_fast.report.build import write_report
from autotool_fast.report.compare import write_comparison

__all__ = ["write_comparison", "write_report"]
