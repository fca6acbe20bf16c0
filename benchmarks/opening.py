"""CPU to open a store and read its trials: 5 parameters, 10 steps and 2 attributes each.

A journal is replayed record by record; a snapshot is our journal's contents in one piece.
"""

from __future__ import annotations

import gc
from pathlib import Path
import sys
import time

from optuna.storages import BaseStorage

from benchmarks import harness
from benchmarks.harness import OURS, Report, Row
from trialstore import snapshot


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--store", action="append", help="journal or sqlite; default: both")
    parser.add_argument("--trials", type=int, default=1_000)
    arguments = parser.parse_args()
    with Report("opening", arguments) as report:
        for store in arguments.store or ("journal", "sqlite"):
            compare(report, store, arguments.trials, arguments.rounds)
    return 0


def compare(report: Report, store: str, n_trials: int, rounds: int) -> None:
    folder = report.new_folder()
    ours = harness.open_storage(OURS, store, folder)
    study_name = harness.fill_in_bulk(ours, n_trials, n_steps=10, n_attrs=2)
    samples = harness.in_turn(
        harness.contenders(store),
        rounds,
        lambda name: open_and_read_us(name, store, folder, study_name, n_trials),
    )
    what = "journal, replayed" if store == "journal" else store
    report.add(Row(what, "CPU us per trial", harness.medians(samples, float)))
    if store == "journal":
        image = image_of(ours)
        taken = harness.in_turn([OURS], rounds, lambda _: load_us(image, n_trials))
        report.add(Row("snapshot", "CPU us per trial", harness.medians(taken, float)))
    ours.close()


def open_and_read_us(name: str, store: str, folder: Path, study_name: str, n_trials: int) -> float:
    gc.collect()
    began_s = time.process_time()
    storage = harness.open_storage(name, store, folder)
    read(storage, study_name, n_trials)
    return (time.process_time() - began_s) / n_trials * 1e6


def read(storage: BaseStorage, study_name: str, n_trials: int) -> None:
    study_id = storage.get_study_id_from_name(study_name)
    trials = storage.get_all_trials(study_id, deepcopy=False)
    assert len(trials) == n_trials
    assert len(trials[-1].params) == harness.N_PARAMS
    assert len(trials[-1].intermediate_values) == 10


def image_of(storage: BaseStorage) -> bytes:
    storage.get_all_studies()
    exchanger = storage._exchanger
    return snapshot.dump(exchanger.replica, exchanger._cursor, 0)


def load_us(image: bytes, n_trials: int) -> float:
    gc.collect()
    began_s = time.process_time()
    replica = snapshot.load(image).replica
    trials = replica.trials(replica.study_ids()[-1], None)
    assert len(trials) == n_trials
    return (time.process_time() - began_s) / n_trials * 1e6


if __name__ == "__main__":
    sys.exit(main())
