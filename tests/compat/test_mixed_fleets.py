"""Plain Optuna workers and ours on one journal or in one database, at the same time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compat.environments import finish, has_module, python_with, run, start
from redis_servers import new_prefix
from servers import new_database, shared_redis

_N_TRIALS = 300
_ZONES = {"4.4": "America/New_York", "5.0": "Asia/Kolkata"}


@pytest.fixture(params=["4.4", "5.0"])
def version(request: pytest.FixtureRequest) -> str:
    version: str = request.param
    return version


_PACKAGES = ("redis", "psycopg", "pymysql")  # of the drivers of the same name
_SERVERS = [pytest.param(kind, marks=pytest.mark.servers) for kind in _PACKAGES]


@pytest.fixture(params=["journal", "sqlite", *_SERVERS])
def store(request: pytest.FixtureRequest) -> str:
    store: str = request.param
    return store


@pytest.fixture
def python(version: str, store: str) -> str:
    python = python_with(version)
    if store in _PACKAGES and not has_module(python, store):
        pytest.skip(f"the environment with Optuna {version} has no {store}")
    return python


@pytest.fixture
def url(python: str, store: str, tmp_path: Path) -> str:
    if store == "redis":
        return f"{shared_redis().url}#{new_prefix()}"
    return f"journal:{tmp_path / 'log'}" if store == "journal" else new_database(store, tmp_path)


def _both_dumps(python: str, url: str, zone: str, study: str = "s") -> tuple[Any, Any]:
    return (
        run(python, "dump", "optuna", url, study, zone=zone),
        run(python, "dump", "trialstore", url, study, zone=zone),
    )


@pytest.mark.parametrize("creator", ["optuna", "trialstore"])
def test_a_fleet_of_both_loses_nothing(
    python: str, version: str, store: str, url: str, creator: str
) -> None:
    if creator == "optuna" and store in _PACKAGES:
        pytest.skip("Both make the same records or tables, as other tests show; these are slow.")
    zone = _ZONES[version]
    run(python, "create", creator, url, "s", zone=zone)
    finish(
        [
            start(python, "optimize", kind, url, "s", seed, _N_TRIALS, zone=zone)
            for seed, kind in enumerate(("optuna", "trialstore"))
        ]
    )
    theirs, ours = _both_dumps(python, url, zone)
    assert theirs == ours
    trials = ours["trials"]
    assert [trial["number"] for trial in trials] == list(range(2 * _N_TRIALS))
    assert len({trial["id"] for trial in trials}) == 2 * _N_TRIALS
    by_worker: dict[int, int] = {}
    for trial in trials:
        params = dict(trial["params"])
        echo = trial["user_attrs"]["echo"]
        expected = {"x": repr(echo["x"]), "n": repr(echo["n"][0]), "choice": repr(echo["choice"])}
        assert params == expected, f"trial {trial['number']}"
        assert list(params) == ["x", "n", "choice"]
        assert [step for step, _ in trial["intermediate_values"]] == [0, 1]
        assert trial["state"] == ("PRUNED" if echo["n"][0] % 7 == 0 else "COMPLETE")
        pid = trial["user_attrs"]["pid"]
        by_worker[pid] = by_worker.get(pid, 0) + 1
    assert sorted(by_worker.values()) == [_N_TRIALS, _N_TRIALS]


@pytest.mark.parametrize("writer", ["optuna", "trialstore"])
def test_what_one_writes_the_other_reads_equal(
    python: str, version: str, url: str, writer: str
) -> None:
    zone = _ZONES[version]
    run(python, "write", writer, url, "s", zone=zone)
    theirs, ours = _both_dumps(python, url, zone)
    assert ours == theirs
    assert len(ours["trials"]) == 6


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Kolkata"])
def test_times_mean_the_same_moment_in_both(
    python: str, version: str, url: str, zone: str
) -> None:
    """Written by ours in one zone, read by both in another."""
    run(python, "write", "trialstore", url, "s", zone="Europe/Warsaw")
    theirs, ours = _both_dumps(python, url, zone)
    assert ours == theirs
