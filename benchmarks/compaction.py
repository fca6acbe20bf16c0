"""What a compaction makes of a journal of many trials, most of them of a deleted study.

Prints the bytes before and after, what may be left (1.5 times the records of the trials that are
still there, plus 64 bytes for each one that is not), and the CPU and the time that it takes; in
Redis also for how long the server did nothing else.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
import sys
import time
from typing import Any

import optuna

from benchmarks import harness
from benchmarks.harness import OURS, Report, Row
from benchmarks.redis_journal import private_server
import trialstore
from trialstore import journal, records as r
from trialstore.log import NOTHING, START
from trialstore.testing.contents import storage_contents

_TIME = "2026-01-02T03:04:05.678901+00:00"
_WORKER_ID = "6f1c0b0e-6b0e-4c36-9d34-5f1a7d1f0a11"
_KEPT_SHARE = 5
_BATCH = 4_000


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--redis", action="store_true", help="also a journal in Redis")
    arguments = parser.parse_args()
    with Report("compaction", arguments) as report, contextlib.ExitStack() as stack:
        path = str(report.new_folder() / "journal.log")
        measure(report, "file", journal.JournalFileBackend(path), arguments.trials)
        if arguments.redis:
            url = stack.enter_context(private_server(report.new_folder()))
            measure(report, "Redis", journal.JournalRedisBackend(url), arguments.trials)
    return 0


def measure(report: Report, where: str, log: Any, n_trials: int) -> None:
    n_live = fill(log, n_trials)
    before = storage_contents(trialstore.JournalStorage(log))
    n_before = n_bytes(log)
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    journal.compact(log)
    took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    assert storage_contents(trialstore.JournalStorage(log)) == before
    n_dropped = n_trials - len(before["kept"]["trials"]) + 1
    label = f"{where}, {n_trials:,} trials"

    def add(what: str, unit: str, value: float) -> None:
        report.add(Row(f"{label}: {what}", unit, {OURS: value}))

    add("before", "MB", n_before / 1e6)
    add("after", "MB", n_bytes(log) / 1e6)
    add("may be left", "MB", (1.5 * n_live + 64 * n_dropped) / 1e6)
    add("compaction, CPU", "s", cpu_s)
    add("compaction", "s", took_s)


def fill(log: Any, n_trials: int) -> int:
    """Trials of 5 parameters, one in five in a study that stays; returns the bytes of those."""
    distribution = optuna.distributions.distribution_to_json(
        optuna.distributions.FloatDistribution(0, 1)
    )
    records: list[Any] = []
    n_live = seq = 0

    def mark() -> dict[str, Any]:
        nonlocal seq
        seq += 1
        return {"worker_id": _WORKER_ID, "seq": seq}

    cursor = START
    for name in ("kept", "gone"):
        records.append(r.CreateStudy(study_name=name, directions=[1], **mark()))
    for trial_id in range(n_trials):
        is_kept = trial_id % _KEPT_SHARE == 0
        trial: list[r.AnyOperation] = [
            r.CreateTrial(study_id=int(not is_kept), datetime_start=_TIME, **mark())
        ]
        for name in "abcde":
            trial.append(
                r.SetTrialParam(
                    trial_id=trial_id, param_name=name, distribution=distribution,
                    param_value_internal=trial_id / n_trials, **mark(),
                )
            )  # fmt: skip
        trial.append(r.SetTrialUserAttr(trial_id=trial_id, user_attr={"k": "v"}, **mark()))
        trial.append(
            r.SetTrialStateValues(
                trial_id=trial_id, state=r.COMPLETE, values=[0.5], datetime_complete=_TIME,
                **mark(),
            )
        )  # fmt: skip
        if is_kept:
            n_live += sum(len(r.encode_line(record)) for record in trial)
        records += trial
        if len(records) >= _BATCH:
            cursor = log.exchange(records, cursor, NOTHING).cursor
            records.clear()
    records.append(r.DeleteStudy(study_id=1, **mark()))
    log.exchange(records, cursor, NOTHING)
    return n_live


def n_bytes(log: Any) -> int:
    """Of all records."""
    if isinstance(log, journal.JournalFileBackend):
        return Path(log.path).stat().st_size
    return sum(len(entry.data or b"") for entry in log.entries())


if __name__ == "__main__":
    sys.exit(main())
