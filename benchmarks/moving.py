"""Peak memory and CPU time of ``check``, ``copy`` and ``export`` on a large store.

Each command is a process of its own, imports included; the kernel says what it took.
"""

from __future__ import annotations

import os
from pathlib import Path
import sys

from benchmarks import harness
from benchmarks.harness import OURS, Report, Row


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--trials", type=int, default=100_000)
    parser.set_defaults(rounds=1)
    arguments = parser.parse_args()
    with Report("moving", arguments) as report:
        for store in ("journal", "sqlite"):
            folder = report.new_folder()
            name = harness.in_child(fill, store, folder, arguments.trials)
            url = f"{folder}/journal" if store == "journal" else f"sqlite:///{folder}/sqlite.db"
            commands = {
                "check": ["check", url],
                "copy to a journal": ["copy", url, f"{folder}/copy.log"],
                "copy to SQLite": ["copy", url, f"sqlite:///{folder}/copy.db"],
                "export to CSV": ["export", url, "--study", name, "-o", f"{folder}/a.csv"],
                "export to Parquet": ["export", url, "--study", name, "-o", f"{folder}/a.parquet"],
            }
            for what, command in commands.items():
                megabytes, ms = run(command)
                row = f"{what}, {store}, {arguments.trials:,} trials"
                report.add(Row(row, "MB", {OURS: megabytes}))
                report.add(Row(row, "ms of CPU per trial", {OURS: ms / arguments.trials}))
    return 0


def fill(store: str, folder: Path, n_trials: int) -> str:
    return harness.fill_in_bulk(harness.open_storage(OURS, store, folder), n_trials)


def run(command: list[str]) -> tuple[float, float]:
    """Peak memory in MB and CPU time in ms of ``trialstore`` with these arguments."""
    arguments = [sys.executable, "-m", "trialstore", *command, "--json"]
    nowhere = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawn(sys.executable, arguments, os.environ, file_actions=nowhere)
    _, status, usage = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{arguments} failed")
    return usage.ru_maxrss / 1024, (usage.ru_utime + usage.ru_stime) * 1000


if __name__ == "__main__":
    sys.exit(main())
