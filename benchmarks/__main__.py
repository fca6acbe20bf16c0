"""All benchmarks one after the other, or those that are named: ``python -m benchmarks crowd``."""

from __future__ import annotations

import subprocess
import sys

NAMES = (
    "per_trial",
    "known_trials",
    "crowd",
    "opening",
    "one_of_many",
    "catalogue",
    "queue",
    "memory",
    "redis_journal",
    "tables",
    "moving",
    "compaction",
)


def main() -> int:
    names = [argument for argument in sys.argv[1:] if argument in NAMES] or list(NAMES)
    options = [argument for argument in sys.argv[1:] if argument not in NAMES]
    worst = 0
    for name in names:
        # Each in a process of its own: what one leaves in memory must not slow the next.
        worst |= subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *options])
    return worst


if __name__ == "__main__":
    sys.exit(main())
