"""`make bench`: every benchmark of this folder, one after the other, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

SCRIPTS = ("collapse", "default_run")


def main() -> int:
    """Run them all; the exit code is the first one that is not 0."""
    codes = []
    for name in SCRIPTS:
        print(f"\n== benchmarks.{name}", flush=True)
        codes.append(subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
