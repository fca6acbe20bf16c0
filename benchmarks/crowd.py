"""Many processes on one store: trials/s together, fairness, and how long a create may take.

Every worker runs trials for the same ``--seconds`` after a common start. Fairness is the slowest
worker's number of trials over the fastest's. Of a journal file the *floor* is what processes reach
that do no more than its format and its lock demand, beside Optuna's own trial in memory: two
appends under the queue and the lock file, two syncs, and what the others wrote decoded, once.
No implementation in Python that can answer what the others' trials are exceeds its factor here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
import os
from pathlib import Path
import statistics
import sys
import time
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import optuna

from benchmarks import harness
from benchmarks.harness import OURS, Report, Row
from trialstore.records import decode_lines


@dataclass
class Crowd:
    trials_per_s: float
    fairness: float
    create_p99_ms: float
    errors: list[str]


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--store", action="append", help="journal, sqlite, or a server's URL")
    parser.add_argument("--processes", type=int, action="append", help="default: 4, then 16")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one sample")
    parser.set_defaults(rounds=1)
    arguments = parser.parse_args()
    with Report("crowd", arguments) as report:
        for store in arguments.store or ("journal", "sqlite"):
            stores = dict.fromkeys(harness.contenders(store), store)
            for n_processes in arguments.processes or (4, 16):
                compare(
                    report,
                    stores,
                    n_processes,
                    arguments.seconds,
                    arguments.rounds,
                    run_floor if store == "journal" and fcntl is not None else None,
                )
    return 0


def compare(
    report: Report,
    stores: Mapping[str, str],
    n_processes: int,
    seconds: float,
    rounds: int,
    floor: Callable[[Path, int, float], Crowd] | None = None,
) -> None:
    """One crowd for each implementation.

    Args:
        report: Takes the rows.
        stores: Where each implementation works, a store of its own if it is a server's URL.
        n_processes: In each crowd.
        seconds: For which it works.
        rounds: How often.
        floor: What the least that is possible reaches.
    """
    samples = harness.in_turn(
        list(stores),
        rounds,
        lambda name: run_crowd(name, stores[name], report.new_folder(), n_processes, seconds),
    )
    label = f"{stores[OURS].partition('://')[0]}, {n_processes} processes"
    errors = {
        name: sorted({error for crowd in taken for error in crowd.errors})
        for name, taken in samples.items()
        if any(crowd.errors for crowd in taken)
    }
    notes: dict[str, Any] = {"errors": errors} if errors else {}
    speed = harness.medians(samples, lambda crowd: crowd.trials_per_s)
    report.add(Row(label, "trials/s", speed, more_is_better=True, notes=notes))
    fairness = harness.medians(samples, lambda crowd: crowd.fairness)
    report.add(Row(label, "slowest/fastest", fairness, more_is_better=True))
    p99 = harness.medians(samples, lambda crowd: crowd.create_p99_ms)
    report.add(Row(label, "create p99 ms", p99))
    if floor is not None:
        floors = [floor(report.new_folder(), n_processes, seconds) for _ in range(rounds)]
        speed[OURS] = statistics.median(crowd.trials_per_s for crowd in floors)
        report.add(Row(f"{label}, the floor", "trials/s", speed, more_is_better=True))


def run_crowd(name: str, store: str, folder: Path, n_processes: int, seconds: float) -> Crowd:
    # In a child, so that no worker inherits an open storage.
    study_name = harness.in_child(create_study, name, store, folder)
    return gather(n_processes, seconds, work, name, store, folder, study_name)


def run_floor(folder: Path, n_processes: int, seconds: float) -> Crowd:
    harness.in_child(create_study, OURS, "journal", folder)
    return gather(n_processes, seconds, work_least, folder)


def gather(n_processes: int, seconds: float, target: Callable[..., None], *args: Any) -> Crowd:
    """``n_processes`` that each call ``target(sender, start, *args, seconds)``."""
    context = harness.context()
    start = context.Barrier(n_processes)
    pipes, workers = [], []
    for _ in range(n_processes):
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=target, args=(sender, start, *args, seconds))
        worker.start()
        sender.close()
        pipes.append(receiver)
        workers.append(worker)
    answers, errors = [], []
    for receiver in pipes:
        try:
            *answer, error = receiver.recv()
            answers.append(answer)
            errors += [error] if error else []
        except EOFError:
            errors.append("died")
    for worker in workers:
        worker.join()
    counts = [count for count, _, _ in answers] or [0]
    creates_ms = sorted(create_ms for _, _, creates in answers for create_ms in creates) or [0.0]
    longest_s = max((elapsed_s for _, elapsed_s, _ in answers), default=seconds)
    return Crowd(
        trials_per_s=sum(counts) / longest_s,
        fairness=min(counts) / max(*counts, 1),
        create_p99_ms=creates_ms[int(0.99 * (len(creates_ms) - 1))],
        errors=errors,
    )


def create_study(name: str, store: str, folder: Path) -> str:
    study = harness.new_study(harness.open_storage(name, store, folder))
    # Rustuna 0.2 does not find another process's study on SQLite while it has no trial.
    study.optimize(harness.objective, n_trials=1)
    return study.study_name


def work(
    sender: Any,
    start: Any,
    name: str,
    store: str,
    folder: Path,
    study_name: str,
    seconds: float,
) -> None:
    optuna.logging.disable_default_handler()
    creates_ms: list[float] = []
    count, elapsed_s, error = 0, seconds, ""
    try:
        storage = harness.open_storage(name, store, folder)
        study = optuna.load_study(
            study_name=study_name, storage=storage, sampler=optuna.samplers.RandomSampler()
        )
        study.optimize(harness.objective, n_trials=1)  # what it opens is not measured
        time_creates(storage, creates_ms)
    except Exception as failure:
        error = f"opening: {failure!r}"[:200]
    start.wait()
    began_s = time.perf_counter()
    try:
        # Trial by trial: one who waits for its lock longer than the others must not run longer.
        while not error and time.perf_counter() - began_s < seconds:
            study.optimize(harness.objective, n_trials=1)
            count += 1
        elapsed_s = time.perf_counter() - began_s
    except Exception as failure:
        error = repr(failure)[:200]
    sender.send((count, elapsed_s, creates_ms, error))


def work_least(sender: Any, start: Any, folder: Path, seconds: float) -> None:
    """Optuna's trial in memory, and the bytes of the journal's first trial appended again."""
    optuna.logging.disable_default_handler()
    study = harness.new_study(optuna.storages.InMemoryStorage())
    # Of a study and one trial; the rest is what the trial put off and its end.
    _, created, *rest = (folder / "journal").read_bytes().splitlines(keepends=True)
    owner, lock = folder / f"owner-{os.getpid()}", folder / "journal.lock"
    owner.write_bytes(b"the one that appends")
    queue = os.open(folder / "queue", os.O_RDWR | os.O_CREAT, 0o666)
    journal = os.open(folder / "journal", os.O_RDWR | os.O_APPEND)
    creates_ms: list[float] = []
    count = read = 0
    start.wait()
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        read = append_least(queue, owner, lock, journal, created, read)
        study.optimize(harness.objective, n_trials=1)
        read = append_least(queue, owner, lock, journal, b"".join(rest), read)
        count += 1
    sender.send((count, time.perf_counter() - began_s, creates_ms, ""))


def append_least(queue: int, owner: Path, lock: Path, journal: int, data: bytes, read: int) -> int:
    """Returns where the next append begins to read."""
    fcntl.flock(queue, fcntl.LOCK_EX)
    os.link(owner, lock)
    news = os.pread(journal, os.fstat(journal).st_size - read, read)
    decode_lines(news)
    os.write(journal, data)
    lock.unlink()
    fcntl.flock(queue, fcntl.LOCK_UN)
    os.fdatasync(journal)
    return read + len(news) + len(data)


def time_creates(storage: Any, taken_ms: list[float]) -> None:
    """From now on, note how long every ``create_new_trial`` of a storage takes."""
    create = storage.create_new_trial

    def timed(*args: Any, **kwargs: Any) -> int:
        began_s = time.perf_counter()
        trial_id: int = create(*args, **kwargs)
        taken_ms.append((time.perf_counter() - began_s) * 1e3)
        return trial_id

    storage.create_new_trial = timed


if __name__ == "__main__":
    sys.exit(main())
