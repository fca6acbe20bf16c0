"""Optimizes a store that its argument names and marks the trials in the trace of syncs."""

from __future__ import annotations

import sys

import optuna

import trialstore
from trialstore.storage import Storage
from trialstore.testing.clock import ManualClock
from trialstore.testing.faults import mark_syncs

N_WARM = 1
N_COUNTED = 30


def objective(trial: optuna.Trial) -> float:
    total = sum(trial.suggest_float(f"x{number}", -1.0, 1.0) for number in range(5))
    trial.set_user_attr("k", total)
    return total


def main(url: str) -> None:
    # The linger never ends by itself: no exchange but those of the calls.
    storage: Storage
    if url.startswith("sqlite"):
        storage = trialstore.RDBStorage(url, clock=ManualClock())
    else:
        backend = trialstore.journal.JournalFileBackend(url)
        storage = trialstore.JournalStorage(backend, clock=ManualClock())
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=N_WARM)
    mark_syncs("begin")
    study.optimize(objective, n_trials=N_COUNTED)
    mark_syncs("end")


if __name__ == "__main__":
    main(sys.argv[1])
