"""Run by an interpreter of its own: a worker of plain Optuna or of trialstore, on one store.

``python workers.py create|optimize|write|tell|dump KIND URL STUDY [NUMBERS]`` where KIND is
``optuna`` or ``trialstore`` and URL is ``journal:path``, ``redis://host:port#prefix`` or that of a
database. Prints JSON.
Imports nothing from the tests, so that any environment with Optuna can run it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any
import warnings

import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore")


def open_storage(kind: str, url: str, **options: Any) -> Any:
    is_journal = url.startswith(("journal:", "redis:"))
    if kind == "trialstore":
        import trialstore

        if not is_journal:
            return trialstore.RDBStorage(url, **options)
        return trialstore.JournalStorage(_backend(trialstore.journal, url), **options)
    if not is_journal:
        waits = {"connect_args": {"timeout": 120}} if url.startswith("sqlite") else {}
        return optuna.storages.RDBStorage(url, engine_kwargs=waits)
    return optuna.storages.JournalStorage(_backend(optuna.storages.journal, url))


def _backend(module: Any, url: str) -> Any:
    if url.startswith("journal:"):
        return module.JournalFileBackend(url.partition(":")[2])
    server, _, prefix = url.partition("#")
    return module.JournalRedisBackend(server, prefix=prefix)


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -10.0, 10.0)
    n = trial.suggest_int("n", 1, 1000, log=True)
    choice = trial.suggest_categorical("choice", ["a", "b", None, 1.5])
    trial.set_user_attr("pid", os.getpid())
    trial.set_user_attr("echo", {"x": x, "n": [n], "choice": choice})
    for step in range(2):
        trial.report(x + step, step)
    if n % 7 == 0:
        raise optuna.TrialPruned
    return x * x + n


def optimize(storage: Any, study_name: str, seed: int, n_trials: int) -> None:
    study = optuna.load_study(
        study_name=study_name, storage=storage, sampler=optuna.samplers.RandomSampler(seed=seed)
    )
    study.optimize(objective, n_trials=n_trials)


def write(storage: Any, study_name: str) -> None:
    """One trial of each kind, through the public calls."""
    study = optuna.create_study(
        study_name=study_name, storage=storage, directions=["minimize", "maximize"]
    )
    study.set_user_attr("nested", {"a": [1, 2.5, None, "ż"]})
    trial = study.ask()
    trial.suggest_float("float", 1e-5, 1.0, log=True)
    trial.suggest_float("step", 0.0, 1.0, step=0.1)
    trial.suggest_int("int", -5, 5)
    trial.suggest_categorical("choice", [None, True, 1, 2.5, "text"])
    trial.set_user_attr("attr", {"b": [math.inf, -1e-320]})
    study.tell(trial, [math.inf, -0.5])
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    pruned = study.ask()
    study.tell(pruned, state=optuna.trial.TrialState.PRUNED)
    study.enqueue_trial({"float": 0.5}, user_attrs={"queued": True})
    study.ask()
    study.enqueue_trial({"int": 3})
    study.add_trial(
        optuna.trial.create_trial(
            values=[1.0, 2.0],
            params={"z": 0.25, "a": "q"},
            distributions={
                "z": optuna.distributions.FloatDistribution(0.0, 1.0),
                "a": optuna.distributions.CategoricalDistribution(["p", "q"]),
            },
            intermediate_values={0: 1.0, 5: math.nan},
            system_attrs={"s": 1},
        )
    )


def dump(storage: Any, study_name: str) -> dict[str, Any]:
    """What a user of this storage sees, as JSON; floats by their digits."""
    study = optuna.load_study(study_name=study_name, storage=storage)
    return {
        "directions": [direction.name for direction in study.directions],
        "user_attrs": study.user_attrs,
        "system_attrs": storage.get_study_system_attrs(study._study_id),
        "trials": [
            {
                "id": trial._trial_id,
                "number": trial.number,
                "state": trial.state.name,
                "values": None if trial.values is None else [repr(v) for v in trial.values],
                "start": str(trial.datetime_start),
                "complete": str(trial.datetime_complete),
                "params": [[name, repr(value)] for name, value in trial.params.items()],
                "distributions": {
                    name: optuna.distributions.distribution_to_json(known)
                    for name, known in sorted(trial.distributions.items())
                },
                "user_attrs": trial.user_attrs,
                "system_attrs": trial.system_attrs,
                "intermediate_values": sorted(
                    [step, repr(value)] for step, value in trial.intermediate_values.items()
                ),
            }
            for trial in study.get_trials(deepcopy=False)
        ],
    }


def tell(url: str, study_name: str, n_trials: int) -> None:
    """Tell by number each trial whose number comes in on standard input.

    Where the storage waits for the asker, ``wait`` goes out, and ``go`` has to come in.
    """
    from trialstore.clock import Clock

    class Pipes(Clock):
        def sleep(self, duration_s: float) -> None:
            print("wait", flush=True)
            assert sys.stdin.readline() == "go\n"

    storage = open_storage("trialstore", url, clock=Pipes())
    study = optuna.load_study(study_name=study_name, storage=storage)
    for _ in range(n_trials):
        number = int(sys.stdin.readline())
        study.tell(number, float(number))


def main(argv: list[str]) -> None:
    task, kind, url, study_name, *numbers = argv
    if task == "tell":
        tell(url, study_name, int(numbers[0]))
        return
    storage = open_storage(kind, url)
    if task == "create":
        optuna.create_study(study_name=study_name, storage=storage)
    elif task == "optimize":
        optimize(storage, study_name, *map(int, numbers))
    elif task == "write":
        write(storage, study_name)
    else:
        json.dump(dump(storage, study_name), sys.stdout)
    storage.remove_session()


if __name__ == "__main__":
    main(sys.argv[1:])
