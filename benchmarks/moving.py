"""Peak memory and CPU time of ``check``, ``copy`` and ``export`` on a large store of each kind.

Each command is a process of its own, imports included; the kernel says what it took. What a
database server takes is its own. Private servers are started as the tests do.
"""

from __future__ import annotations

from collections.abc import Iterator
import os
from pathlib import Path
import sys
import uuid

from tests.servers import new_database, shared_redis

from benchmarks import harness
from benchmarks.harness import OURS, Report, Row
import trialstore

_FILES = ("journal", "sqlite")
_STORES = (*_FILES, "psycopg", "psycopg2", "pymysql", "redis")


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument(
        "--store", action="append", choices=_STORES, help="again for more; default: the files"
    )
    parser.set_defaults(rounds=1)
    arguments = parser.parse_args()
    with Report("moving", arguments) as report:
        journal = new_url("journal", report.new_folder())
        fill(journal, arguments.trials)
        for store in arguments.store or _FILES:
            url = new_url(store, report.new_folder())
            name = fill(url, arguments.trials)
            for what, command in commands(store, url, name, journal, report.new_folder()):
                megabytes, ms = run(command)
                row = f"{what}, {store}, {arguments.trials:,} trials"
                report.add(Row(row, "MB", {OURS: megabytes}))
                report.add(Row(row, "ms of CPU per trial", {OURS: ms / arguments.trials}))
    return 0


def commands(
    store: str, url: str, name: str, journal: str, folder: Path
) -> Iterator[tuple[str, list[str]]]:
    """What is measured of a store, whose study ``name`` is: a word, and the arguments."""
    yield "check", ["check", url]
    yield "export to CSV", ["export", url, "--study", name, "-o", f"{folder}/a.csv"]
    yield "export to Parquet", ["export", url, "--study", name, "-o", f"{folder}/a.parquet"]
    yield "copy out", ["copy", url, f"{folder}/copy.journal"]
    yield "copy in", ["copy", journal, new_url(store, folder)]


def new_url(store: str, folder: Path) -> str:
    """URL of a new, empty store."""
    if store == "journal":
        return str(folder / "study.journal")
    if store == "redis":
        return f"{shared_redis().url}/0?prefix={uuid.uuid4()}"
    return new_database(store, folder)


def fill(url: str, n_trials: int) -> str:
    """Write a study as its workers would have; returns its name."""
    return harness.in_child(_fill, url, n_trials)


def _fill(url: str, n_trials: int) -> str:
    return harness.fill_in_bulk(trialstore.get_storage(url), n_trials)


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
