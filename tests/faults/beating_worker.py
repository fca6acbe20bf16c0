"""A worker in a process of its own that runs one trial, with a wall clock that is wrong.

``python beating_worker.py KIND URL PREFIX STUDY SHIFT_S`` where KIND is ``optimize`` or ``ask``
(of trialstore), or ``optuna``. Prints the trial's id when it runs, finishes it when it reads a
line, and prints what became of that.
"""

from __future__ import annotations

from datetime import datetime, timedelta
import sys
import time
from typing import Any
import warnings

import optuna

import trialstore
from trialstore.journal import JournalRedisBackend

INTERVAL_S = 1
GRACE_S = 500


def open_storage(kind: str, url: str, prefix: str, **options: Any) -> Any:
    """What both the workers and the test open; a cluster's prefix begins with ``cluster-``."""
    options = {"heartbeat_interval": INTERVAL_S, "grace_period": GRACE_S, **options}
    if kind == "optuna":
        return optuna.storages.RDBStorage(url, **options)
    if url.startswith("redis"):
        backend = JournalRedisBackend(url, prefix.startswith("cluster-"), prefix)
        return trialstore.JournalStorage(backend, **options)
    return trialstore.RDBStorage(url, **options)


def be_off_by(shift: timedelta) -> None:
    """Every clock of this process that counts from an epoch."""
    real_s = time.time

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + shift

    time.time = lambda: real_s() + shift.total_seconds()
    for name, module in list(sys.modules.items()):
        if (
            name.split(".")[0] in ("optuna", "trialstore")
            and vars(module).get("datetime") is datetime
        ):
            module.datetime = Shifted  # type: ignore[attr-defined]


def _run(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0.0, 1.0)
    print(trial._trial_id, flush=True)
    sys.stdin.readline()
    return x


def main(kind: str, url: str, prefix: str, study_name: str, shift_s: str) -> None:
    be_off_by(timedelta(seconds=float(shift_s)))
    study = optuna.load_study(study_name=study_name, storage=open_storage(kind, url, prefix))
    try:
        if kind == "ask":
            trial = study.ask()
            study.tell(trial, _run(trial))
        else:
            study.optimize(_run, n_trials=1)
    except Exception as error:
        # Optuna's `optimize` does not expect a trial that somebody else has failed: an
        # AssertionError covers what the storage raised.
        first: BaseException = error
        while first.__context__ is not None:
            first = first.__context__
        print(f"{type(first).__name__}: {first}", flush=True)
    else:
        print("told", flush=True)


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
