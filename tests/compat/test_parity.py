"""Samplers, pruners and study functions: the same results as on Optuna's own storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
from pathlib import Path
from typing import Any
import warnings

import optuna
import pytest

from backends import BACKENDS, Backend
from trialstore.storage import Storage
from trialstore.testing.contents import study_contents

_PARITY = ("memory", "journal-file", "sqlite-file")
_N_TRIALS = 30

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@pytest.fixture(params=_PARITY)
def ours(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    (backend,) = (known for known in BACKENDS if known.name == request.param)
    assert isinstance(backend, Backend)
    with contextlib.closing(backend.prepare(tmp_path)()) as storage:
        yield storage


def _grid() -> optuna.samplers.BaseSampler:
    return optuna.samplers.GridSampler(
        {"x": [-1.0, 0.0, 0.5], "k": [0, 1, 2], "c": ["a", "b"]}, seed=1
    )


def _gp() -> optuna.samplers.BaseSampler:
    pytest.importorskip("torch", reason="Optuna's GPSampler needs torch")
    return optuna.samplers.GPSampler(seed=1, n_startup_trials=5)


def _cmaes() -> optuna.samplers.BaseSampler:
    pytest.importorskip("cmaes")
    return optuna.samplers.CmaEsSampler(seed=1, n_startup_trials=3)


_SAMPLERS: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
    "random": lambda: optuna.samplers.RandomSampler(seed=1),
    "tpe": lambda: optuna.samplers.TPESampler(seed=1, n_startup_trials=5),
    "tpe multivariate group": lambda: optuna.samplers.TPESampler(
        seed=1, n_startup_trials=5, multivariate=True, group=True
    ),
    "cmaes": _cmaes,
    "grid": _grid,
    "brute force": lambda: optuna.samplers.BruteForceSampler(seed=1),
    "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=1, population_size=6),
    "gp": _gp,
    "qmc": lambda: optuna.samplers.QMCSampler(seed=1, warn_independent_sampling=False),
}

_PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=3),
    "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=1, max_resource=9),
    "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1),
    "patient": lambda: optuna.pruners.PatientPruner(
        optuna.pruners.MedianPruner(n_startup_trials=3), patience=1
    ),
}


def _objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -1.0, 1.0)
    k = trial.suggest_int("k", 0, 2)
    c = trial.suggest_categorical("c", ["a", "b"])
    trial.set_user_attr("seen", [x, k, c])
    return (x - 0.3) ** 2 + k + (c == "a")


def _continuous(trial: optuna.Trial) -> float:
    return sum((trial.suggest_float(f"x{i}", -1.0, 1.0) - 0.1 * i) ** 2 for i in range(3))


def _discrete(trial: optuna.Trial) -> float:
    k = trial.suggest_int("k", 0, 3)
    return k + (trial.suggest_int("l", 0, 2) if k % 2 else 0)


def _two_objectives(trial: optuna.Trial) -> tuple[float, float]:
    x, y = trial.suggest_float("x", 0.0, 1.0), trial.suggest_float("y", 0.0, 1.0)
    return x, (1 - x) * (1 + y)


def _steps(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -1.0, 1.0)
    for step in range(9):
        # Some trials get worse step by step, for the pruner that is patient with the others.
        trial.report(x * x + (1.0 / (step + 1) if x > 0 else 0.1 * step), step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return x * x


def _results(study: optuna.Study) -> list[dict[str, Any]]:
    results = study_contents(study._storage, study._study_id, ids=False, times=False)
    if isinstance(study.sampler, optuna.samplers.CmaEsSampler):
        # Its pickled optimizer is not the same bytes twice, on Optuna's own storage either.
        for trial in results:
            trial["system_attrs"] = sorted(trial["system_attrs"])
    return results


def _both(
    ours: Storage, run: Callable[[optuna.Study], object], **options: Callable[[], Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    results = []
    for storage in (optuna.storages.InMemoryStorage(), ours):
        made = {name: make() for name, make in options.items()}
        # Hyperband hashes the study's name.
        study = optuna.create_study(storage=storage, study_name="s", **made)
        run(study)
        results.append(_results(study))
    return results[0], results[1]


@pytest.mark.parametrize("name", _SAMPLERS)
def test_a_sampler_draws_the_same(ours: Storage, name: str) -> None:
    objective = {"cmaes": _continuous, "brute force": _discrete, "gp": _continuous}.get(
        name, _objective
    )
    n_trials = 12 if name == "gp" else _N_TRIALS
    theirs, mine = _both(
        ours, lambda study: study.optimize(objective, n_trials=n_trials), sampler=_SAMPLERS[name]
    )
    assert mine == theirs


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_a_sampler_draws_the_same_for_two_objectives(ours: Storage, name: str) -> None:
    theirs, mine = _both(
        ours,
        lambda study: study.optimize(_two_objectives, n_trials=_N_TRIALS),
        sampler=_SAMPLERS[name],
        directions=lambda: ["minimize", "maximize"],
    )
    assert mine == theirs


@pytest.mark.parametrize("name", _PRUNERS)
def test_a_pruner_prunes_the_same(ours: Storage, name: str) -> None:
    theirs, mine = _both(
        ours,
        lambda study: study.optimize(_steps, n_trials=_N_TRIALS),
        sampler=_SAMPLERS["tpe"],
        pruner=_PRUNERS[name],
    )
    assert mine == theirs
    assert any(trial["state"] == "PRUNED" for trial in mine), "nothing was pruned"


def test_enqueued_trials_run_the_same(ours: Storage) -> None:
    def run(study: optuna.Study) -> None:
        study.enqueue_trial({"x": 0.5, "k": 2}, user_attrs={"queued": 1})
        study.enqueue_trial({"x": -0.5, "k": 0, "c": "a"})
        study.enqueue_trial({"x": 0.5, "k": 2}, skip_if_exists=True)
        study.optimize(_objective, n_trials=5)

    theirs, mine = _both(ours, run, sampler=_SAMPLERS["random"])
    assert mine == theirs
    assert [trial["params"][0][1].split()[1] for trial in mine[:2]] == ["0.5", "-0.5"]


def test_callbacks_and_stop_run_the_same(ours: Storage) -> None:
    def run(study: optuna.Study) -> None:
        seen: list[int] = []

        def note(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            seen.append(trial.number)
            study.set_user_attr("seen", seen)
            if study.best_trial.number != trial.number and len(seen) > 8:
                study.stop()

        study.optimize(
            _objective,
            n_trials=_N_TRIALS,
            callbacks=[note, optuna.study.MaxTrialsCallback(20, states=None)],
        )
        assert study.user_attrs["seen"] == seen == [t.number for t in study.trials]

    theirs, mine = _both(ours, run, sampler=_SAMPLERS["random"])
    assert mine == theirs


def test_failed_trials_are_the_same(ours: Storage) -> None:
    def fail(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0.0, 1.0)
        if trial.number % 3 == 1:
            raise ValueError("no")
        return float("nan") if trial.number % 3 == 2 else 1.0

    theirs, mine = _both(
        ours,
        lambda study: study.optimize(fail, n_trials=9, catch=ValueError),
        sampler=_SAMPLERS["random"],
    )
    assert mine == theirs


def test_copy_study_copies_both_ways(ours: Storage) -> None:
    theirs = optuna.storages.InMemoryStorage()
    study = optuna.create_study(
        storage=theirs, study_name="s", sampler=optuna.samplers.RandomSampler(seed=1)
    )
    study.optimize(_objective, n_trials=5)
    study.set_user_attr("k", [1])
    study.enqueue_trial({"x": 0.5})
    back = optuna.storages.InMemoryStorage()
    optuna.copy_study(from_study_name="s", from_storage=theirs, to_storage=ours)
    optuna.copy_study(from_study_name="s", from_storage=ours, to_storage=back)
    for storage in (ours, back):
        copied = optuna.load_study(study_name="s", storage=storage)
        assert copied.user_attrs == {"k": [1]}
        assert study_contents(storage, copied._study_id, ids=False) == study_contents(
            theirs, study._study_id, ids=False
        )


def test_a_trials_dataframe_is_the_same(ours: Storage) -> None:
    pytest.importorskip("pandas")
    frames = []
    for storage in (optuna.storages.InMemoryStorage(), ours):
        study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(seed=1))
        study.optimize(_objective, n_trials=5)
        frames.append(study.trials_dataframe(attrs=("number", "value", "params", "state")))
    assert frames[0].equals(frames[1])


@pytest.mark.parametrize("verbosity", [optuna.logging.INFO, optuna.logging.WARNING])
def test_a_new_studys_name_is_told_where_optuna_tells_it(
    ours: Storage, verbosity: int, caplog: pytest.LogCaptureFixture
) -> None:
    optuna.logging.set_verbosity(verbosity)
    optuna.logging.enable_propagation()
    try:
        names = [
            optuna.create_study(storage=storage).study_name
            for storage in (ours, optuna.storages.InMemoryStorage())
        ]
    finally:
        optuna.logging.disable_propagation()
    told = verbosity == optuna.logging.INFO
    assert [name in caplog.text for name in names] == [told, told]
