"""What heartbeats and a budget cost on the wire, counted there, on every log that has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
from pathlib import Path
from typing import Any

import optuna
import pytest

from grpc_servers import prepare_grpc
from redis_servers import new_prefix
from servers import new_database, proxied, shared_redis
import trialstore
from trialstore.journal import JournalRedisBackend
from trialstore.logs.grpc.client import GrpcLog
from trialstore.storage import Storage
from trialstore.testing.clock import ManualClock
from trialstore.testing.suites.base import wait_until

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

_INTERVAL_S = 60
_N_TRIALS = 10
_TABLES = ("psycopg", "psycopg2", "pymysql")
_GRPC = ("grpc-journal", "grpc-sqlite")
_KINDS = [
    *_GRPC,
    *(
        pytest.param(kind, marks=pytest.mark.servers)
        for kind in (*_TABLES, "redis", "grpc-psycopg")
    ),
]

Opened = tuple[Storage, Callable[[], int]]
"""A storage whose clock stands still, and how many round trips it has made."""


@pytest.fixture(params=_KINDS)
def opened(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Opened]:
    kind: str = request.param
    # Nothing lingers: on a busy machine that costs an exchange in the middle of a trial.
    options: dict[str, Any] = {"linger_s": 600.0, "clock": ManualClock()}
    with contextlib.ExitStack() as stack:
        if kind.startswith("grpc-"):
            n_calls = _count_calls(monkeypatch)
            storage = prepare_grpc(kind.removeprefix("grpc-"), tmp_path)(**options)
            yield storage, n_calls
        else:
            url = shared_redis().url if kind == "redis" else new_database(kind, tmp_path)
            proxy, through = stack.enter_context(proxied(url))
            storage = _open(kind, through, options)
            yield storage, lambda: proxy.n_round_trips
        storage.close()


def _open(kind: str, url: str, options: dict[str, Any]) -> Storage:
    if kind == "redis":
        return trialstore.JournalStorage(JournalRedisBackend(url, False, new_prefix()), **options)
    return trialstore.RDBStorage(url, **options)


def _count_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """In the client, since a server talks HTTP/2 unasked."""
    names: list[str] = []
    inner = GrpcLog._call

    def call(log: GrpcLog, name: str) -> Any:
        names.append(name)
        return inner(log, name)

    monkeypatch.setattr(GrpcLog, "_call", call)
    return lambda: len(names)


def test_all_running_trials_beat_with_one_round_trip_an_interval(opened: Opened) -> None:
    storage, n_trips = opened
    clock: Any = storage.clock
    study = optuna.create_study(storage=storage)
    storage.heartbeat_interval = _INTERVAL_S
    for _ in range(200):
        storage.create_new_trial(study._study_id)
    clock.until_waiting()

    def beat() -> None:
        before = n_trips()
        clock.advance(_INTERVAL_S)
        wait_until(lambda: n_trips() > before, "a beat")
        clock.until_waiting()

    beat()  # of a script that the server does not know yet it is told first
    before = n_trips()
    for _ in range(3):
        beat()
    assert n_trips() - before == 3


def _trips(opened: Opened, study: optuna.Study, objective: Any) -> int:
    _, n_trips = opened
    study.optimize(objective, n_trials=2)
    before = n_trips()
    study.optimize(objective, n_trials=_N_TRIALS)
    return n_trips() - before


def test_heartbeats_add_at_most_two_round_trips_a_trial(opened: Opened) -> None:
    storage, _ = opened
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler())
    storage.heartbeat_stale_trial_callback = trialstore.RetryFailedTrialCallback()
    without = _trips(opened, study, _objective)
    storage.heartbeat_interval = _INTERVAL_S
    assert 0 <= _trips(opened, study, _objective) - without <= 2 * _N_TRIALS


def test_a_slot_of_a_budget_adds_at_most_three_round_trips_a_trial(opened: Opened) -> None:
    study = optuna.create_study(storage=opened[0], sampler=optuna.samplers.RandomSampler())
    without = _trips(opened, study, _objective)
    budgeted = trialstore.MaxTrials(10 * _N_TRIALS)(_objective)
    assert 0 < _trips(opened, study, budgeted) - without <= 3 * _N_TRIALS


def _objective(trial: optuna.Trial) -> float:
    trial.set_user_attr("note", trial.number)
    return trial.suggest_float("x", 0.0, 1.0)
