"""Memory and time of ``copy``, ``check`` and ``export`` on a large store, as commands of their own.

Peak resident memory is what the kernel says of the finished process, imports included.
"""

from __future__ import annotations

import os
from pathlib import Path
import sys

from benchmarks import harness
from benchmarks.harness import OURS, Report, Row

_SUFFIXES = {"journal": ".log", "sqlite": ".db"}


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--trials", type=int, default=100_000)
    parser.set_defaults(rounds=1)
    arguments = parser.parse_args()
    with Report("moving", arguments) as report:
        urls = {}
        for store in ("journal", "sqlite"):
            folder = report.new_folder()
            harness.in_child(fill, store, folder, arguments.trials)
            urls[store] = url_of(store, folder)
        study = "--study=" + harness.in_child(study_name, urls["sqlite"])
        for source, url in urls.items():
            commands: dict[str, list[str]] = {
                "check": ["check", url],
                "check --deep": ["check", url, "--deep"],
            }
            for target in urls:
                other = new_url(target, report.new_folder())
                commands[f"copy to {target}"] = ["copy", url, other]
                commands[f"copy --verify of it ({target})"] = ["copy", url, other, "--verify"]
            del study
            for name, command in commands.items():
                cost = run(command)
                what = f"{name}, {source}, {arguments.trials:,} trials"
                report.add(Row(what, "MB", {OURS: cost[0]}))
                report.add(Row(what, "ms per trial", {OURS: cost[1] / arguments.trials}))
    return 0


def fill(store: str, folder: Path, n_trials: int) -> None:
    harness.fill_in_bulk(harness.open_storage(OURS, store, folder), n_trials)


def run(command: list[str]) -> tuple[float, float]:
    """Peak memory in MB and CPU time in ms of ``trialstore`` with these arguments."""
    print(" ".join(command), file=sys.stderr)
    arguments = [sys.executable, "-m", "trialstore", *command]
    pid = os.posix_spawn(sys.executable, arguments, os.environ)
    _, status, usage = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{arguments} failed")
    return usage.ru_maxrss / 1024, (usage.ru_utime + usage.ru_stime) * 1000


if __name__ == "__main__":
    sys.exit(main())
