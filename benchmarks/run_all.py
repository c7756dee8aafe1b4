"""`make bench`: every benchmark of this folder, one after the other, each in a process of its own.

Those with a quick form run in it; the full forms of the kernels' are for a machine with a GPU.
"""

from __future__ import annotations

import subprocess
import sys

SCRIPTS = (
    ("linear_logp_entropy", "--quick"),
    ("logits_logp_entropy", "--quick"),
    ("policy_loss", "--quick"),
    ("sample_logp_entropy", "--quick"),
    ("rollout", "--quick"),
    ("train_step", "--quick"),
    ("scaling", "--quick"),
    ("collapse",),
    ("default_run",),
)


def main() -> int:
    """Run them all; the exit code is the first one that is not 0."""
    codes = []
    for name, *options in SCRIPTS:
        print(f"\n== benchmarks.{name}", flush=True)
        codes.append(subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=False).returncode)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
