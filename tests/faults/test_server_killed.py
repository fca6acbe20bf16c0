"""A database server killed again and again under running studies: they go on by themselves."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
import time
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

from servers import new_database, shared_mariadb, shared_postgresql
from trialstore import RDBStorage
from trialstore.testing.suites.base import wait_until

_N_WORKERS = 3
_N_KILLS = 5
_TRIALS_BETWEEN = 8
_DOWN_S = 3.0
"""Long enough for every worker to fail at reaching the server, several times over."""


def _work(url: str, stop: Any, events: Any) -> None:
    """Tell of each trial as it begins and once it is acknowledged."""

    def objective(trial: optuna.Trial) -> float:
        events.put(("began", trial.number, 0.0))
        x = trial.suggest_float("x", -1.0, 1.0)
        trial.set_user_attr("x", x)
        return x

    def acknowledge(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        events.put(("acknowledged", trial.number, trial.value))
        if stop.is_set():
            study.stop()

    try:
        storage = RDBStorage(url)
        study = optuna.load_study(study_name="s", storage=storage, sampler=RandomSampler())
        study.optimize(objective, callbacks=[acknowledge])
        storage.close()
        events.put(("ended", -1, 0.0))
    except BaseException as error:
        events.put((repr(error), -1, 0.0))


@pytest.mark.servers
@pytest.mark.parametrize("kind", ["psycopg", "psycopg2", "pymysql"])
def test_a_server_killed_five_times(kind: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    server = shared_mariadb() if kind == "pymysql" else shared_postgresql()
    storage = RDBStorage(url)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
    context = multiprocessing.get_context("fork")
    stop, events = context.Event(), context.Queue()
    workers = [context.Process(target=_work, args=(url, stop, events)) for _ in range(_N_WORKERS)]
    for worker in workers:
        worker.start()
    told: list[tuple[str, int, float]] = []

    def acknowledged() -> dict[int, float]:
        while not events.empty():
            told.append(events.get())
        return {number: value for what, number, value in told if what == "acknowledged"}

    try:
        for _ in range(_N_KILLS):
            n = len(acknowledged()) + _TRIALS_BETWEEN
            wait_until(lambda n=n: len(acknowledged()) >= n, f"{n} trials; told {told[-5:]}")  # type: ignore[misc]
            server.kill()
            up_at = time.monotonic() + _DOWN_S
            wait_until(lambda up_at=up_at: time.monotonic() >= up_at, "the end of the outage")  # type: ignore[misc]
            server.start()
        n = len(acknowledged()) + _TRIALS_BETWEEN
        wait_until(lambda: len(acknowledged()) >= n, f"{n} trials; told {told[-5:]}")
    finally:
        stop.set()
    while sum(number < 0 for _, number, _ in told) < _N_WORKERS:
        told.append(events.get(timeout=120))
    for worker in workers:
        worker.join()
    assert [what for what, number, _ in told if number < 0] == ["ended"] * _N_WORKERS
    trials = storage.get_all_trials(study_id)
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert {trial.number: trial.value for trial in trials} == acknowledged(), "a loss"
    began = [number for what, number, _ in told if what == "began"]
    assert sorted(began) == [trial.number for trial in trials], "a ghost, or one number twice"
    assert all(trial.params == trial.user_attrs for trial in trials)
    storage.close()
