"""Bytes that a process holds per trial of 5 parameters once a study has been read.

Resident memory of a fresh process before and after; what the files cost is not counted. Ours opens
a journal from the snapshot beside it, if there is one; without one it replays the journal, and
saves a snapshot meanwhile. At ``--trials 100000`` Optuna takes minutes to read them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from pathlib import Path
import sys

import optuna

from benchmarks import harness
from benchmarks.harness import OURS, Report, Row


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--store", action="append", help="journal or sqlite; default: both")
    parser.add_argument("--trials", type=int, default=20_000)
    parser.add_argument("--only-ours", action="store_true")
    parser.set_defaults(rounds=1)
    arguments = parser.parse_args()
    with Report("memory", arguments) as report:
        for store in arguments.store or ("journal", "sqlite"):
            folder = report.new_folder()
            study = harness.in_child(fill, store, folder, arguments.trials)
            names = [OURS] if arguments.only_ours else harness.contenders(store)
            samples = harness.in_turn(
                names,
                arguments.rounds,
                lambda name, store=store, folder=folder, study=study: harness.in_child(
                    held_bytes, name, store, folder, study, arguments.trials
                ),
            )
            what = f"{store}, {arguments.trials:,} trials"
            report.add(Row(what, "bytes per trial", harness.medians(samples, float)))
            if store == "journal":
                taken = harness.in_turn(
                    [OURS],
                    arguments.rounds,
                    lambda name, folder=folder, study=study: harness.in_child(
                        held_after_replay, folder, study, arguments.trials
                    ),
                )
                report.add(Row(f"{what}, replayed", "bytes", harness.medians(taken, float)))
    return 0


def fill(store: str, folder: Path, n_trials: int) -> str:
    storage = harness.open_storage(OURS, store, folder)
    name = harness.fill_in_bulk(storage, n_trials)
    if store == "journal":
        harness.save_snapshot(storage)
    return name


def held_after_replay(folder: Path, study_name: str, n_trials: int) -> float:
    (folder / "journal.snapshot").unlink(missing_ok=True)
    return held_bytes(OURS, "journal", folder, study_name, n_trials)


def held_bytes(name: str, store: str, folder: Path, study_name: str, n_trials: int) -> float:
    # Whatever opening imports and caches is not held per trial.
    other = folder / f"warm-{name}"
    other.mkdir(exist_ok=True)
    warm = harness.new_study(harness.open_storage(name, store, other))
    warm.optimize(harness.objective, n_trials=2)
    before = resident_bytes()
    storage = harness.open_storage(name, store, folder)
    study = optuna.load_study(study_name=study_name, storage=storage)
    trials = study.get_trials(deepcopy=False)
    assert len(trials) == n_trials
    del trials
    saver = getattr(getattr(storage, "_exchanger", None), "_saver", None)
    if saver is not None:
        saver.join()  # it holds a second copy while it saves a snapshot
    return (resident_bytes() - before) / n_trials


def resident_bytes() -> int:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        # What was freed counts as free, for everyone.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
