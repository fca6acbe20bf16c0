"""The figures of a user's own store: what a trial costs there, in a minute at most.

A study of its own is made, filled and deleted. CPU and exchanges are counted of this process.
"""

from __future__ import annotations

from collections.abc import Callable
import time
from typing import Any
import uuid

import msgspec
import optuna
from optuna.storages import BaseStorage

_WARM_UP_TRIALS = 3
_TRIALS_MIN = 10


class Figures(msgspec.Struct, frozen=True):
    """What was measured.

    Args:
        name: Of the implementation.
        n_trials: How many were run.
        ms_per_trial: Wall time.
        cpu_ms_per_trial: Of this process.
        exchanges_per_trial: Round trips, where the storage counts them.
        read_ms_per_trial: Wall time to open the store anew and read all trials, by their number.
    """

    name: str
    n_trials: int
    ms_per_trial: float
    cpu_ms_per_trial: float
    exchanges_per_trial: float | None
    read_ms_per_trial: float


def bench(
    name: str, open_storage: Callable[[], BaseStorage], *, n_trials: int, seconds_max: float
) -> Figures:
    """Run trials of 5 parameters and an attribute that cost nothing by themselves.

    Args:
        name: For the result.
        open_storage: Opens the store; called twice.
        n_trials: How many trials.
        seconds_max: Stop earlier after so long, but not before 10 trials.
    """
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage()
    study = optuna.create_study(
        study_name=f"trialstore-bench-{uuid.uuid4()}",
        storage=storage,
        sampler=optuna.samplers.RandomSampler(seed=1),
    )
    try:
        study.optimize(_objective, n_trials=_WARM_UP_TRIALS)
        n = 0
        exchanges = _n_exchanges(storage)
        began_s, cpu_s = time.perf_counter(), time.process_time()
        while n < n_trials and (n < _TRIALS_MIN or time.perf_counter() - began_s < seconds_max):
            study.optimize(_objective, n_trials=1)
            n += 1
        wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
        if exchanges is not None:
            exchanges = (_n_exchanges(storage) or 0) - exchanges
        began_s = time.perf_counter()
        reader = open_storage()
        reader.get_all_trials(reader.get_study_id_from_name(study.study_name), deepcopy=False)
        read_s = time.perf_counter() - began_s
        _close(reader)
    finally:
        optuna.delete_study(study_name=study.study_name, storage=storage)
        _close(storage)
        optuna.logging.set_verbosity(verbosity)
    return Figures(
        name=name,
        n_trials=n,
        ms_per_trial=wall_s / n * 1e3,
        cpu_ms_per_trial=cpu_s / n * 1e3,
        exchanges_per_trial=None if exchanges is None else exchanges / n,
        read_ms_per_trial=read_s / (n + _WARM_UP_TRIALS) * 1e3,
    )


def _objective(trial: optuna.Trial) -> float:
    total = sum(trial.suggest_float(f"x{index}", -10, 10) for index in range(5))
    trial.set_user_attr("total", total)
    return total


def _n_exchanges(storage: Any) -> int | None:
    exchanger = getattr(storage, "_exchanger", None)
    return None if exchanger is None else exchanger.n_exchanges


def _close(storage: Any) -> None:
    getattr(storage, "close", storage.remove_session)()
