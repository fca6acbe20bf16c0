"""All benchmarks one after the other, or those that are named: ``python -m benchmarks crowd``.

Names come before options, which all that run are given.
"""

from __future__ import annotations

import itertools
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
    "grpc_proxy",
    "tables",
    "moving",
    "compaction",
)


def main() -> int:
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    options = sys.argv[1 + len(names) :]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.exit(f"There is no benchmark {', '.join(unknown)}. There are: {', '.join(NAMES)}.")
    worst = 0
    for name in names or NAMES:
        # Each in a process of its own: what one leaves in memory must not slow the next.
        worst |= subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *options])
    return worst


if __name__ == "__main__":
    sys.exit(main())
