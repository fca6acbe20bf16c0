"""Leases in tables are Optuna's heartbeats: both see each other's dead, and they cost nothing."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
import time
from typing import Any, cast

import optuna
import pytest
import sqlalchemy as sa

from servers import new_database, proxied
from trialstore import RDBStorage, RetryHeartbeatStaleTrialCallback, records as r
from trialstore.logs.relational import TablesLog, statements, tables as t
from trialstore.testing.follower import Follower

DRIVERS = [
    pytest.param(kind, marks=pytest.mark.servers) for kind in ("psycopg", "psycopg2", "pymysql")
]
_LONG_AGO = datetime(2024, 1, 1)
_EARLIER = {
    "sqlite": "datetime(heartbeat, '-100 seconds')",
    "psycopg": "heartbeat - interval '100 seconds'",
    "psycopg2": "heartbeat - interval '100 seconds'",
    "pymysql": "heartbeat - INTERVAL 100 SECOND",
}
_ZONE = {
    "psycopg": {"options": "-c timezone=Asia/Kolkata"},
    "psycopg2": {"options": "-c timezone=Asia/Kolkata"},
    "pymysql": {"init_command": "SET time_zone = '+05:30'"},
}


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is in a zone that is neither UTC nor the database's."""
    monkeypatch.setenv("TZ", "America/St_Johns")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def _age(url: str, kind: str) -> Callable[[], None]:
    engine = sa.create_engine(url, poolclass=sa.NullPool)

    def age() -> None:
        with engine.begin() as connection:
            connection.execute(
                sa.text(f"UPDATE trial_heartbeats SET heartbeat = {_EARLIER[kind]}")
            )

    return age


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("zone", ["database's default", "half an hour off"])
@pytest.mark.parametrize("kind", ["sqlite", *DRIVERS])
def test_optuna_and_we_see_each_others_dead(
    kind: str, zone: str, tmp_path: Path, far_from_utc: None
) -> None:
    url = new_database(kind, tmp_path)
    options: dict[str, Any] = {}
    if zone == "half an hour off" and kind in _ZONE:
        options = {"connect_args": _ZONE[kind]}
    age = _age(url, kind)
    theirs = optuna.storages.RDBStorage(url, options, heartbeat_interval=30, grace_period=60)
    ours = Follower(TablesLog(url, options), "ours")
    study_id = ours.create_study("s")
    ours.log.take_lease("ours")

    def seen_by_us() -> list[int]:
        return ours.log.expired(study_id, dict.fromkeys([mine, other], ""), 60.0)

    mine = ours.create_trial(study_id)
    other = theirs.create_new_trial(study_id)
    assert theirs._get_stale_trial_ids(study_id) == seen_by_us() == []
    theirs.record_heartbeat(other)  # inserts
    assert theirs._get_stale_trial_ids(study_id) == seen_by_us() == []
    age()
    assert theirs._get_stale_trial_ids(study_id) == seen_by_us() == [mine, other]
    theirs.record_heartbeat(other)  # updates
    assert theirs._get_stale_trial_ids(study_id) == seen_by_us() == [mine]
    age()
    ours.log.renew_lease("ours", [mine])
    assert theirs._get_stale_trial_ids(study_id) == seen_by_us() == [other]
    # Either may beat for a trial of the other.
    theirs.record_heartbeat(mine)
    ours.log.renew_lease("ours", [other])
    assert theirs._get_stale_trial_ids(study_id) == seen_by_us() == []
    age()
    theirs.set_trial_state_values(mine, optuna.trial.TrialState.FAIL)
    assert theirs._get_stale_trial_ids(study_id) == seen_by_us() == [other]
    ours.log.withdraw_lease("ours", [other])
    assert theirs._get_stale_trial_ids(study_id) == seen_by_us() == []
    theirs.record_heartbeat(other)
    age()
    assert theirs._get_stale_trial_ids(study_id) == seen_by_us() == [other]
    theirs.engine.dispose()
    ours.log.close()


@pytest.mark.parametrize("kind", DRIVERS)
def test_leases_cost_no_message_more(kind: str, tmp_path: Path) -> None:
    with proxied(new_database(kind, tmp_path)) as (proxy, url):
        log = TablesLog(url)
        ours = Follower(log, "ours")
        study_id = ours.create_study("s")
        ids: list[int] = []

        def trips(call: Callable[[], Any]) -> int:
            before = proxy.n_round_trips
            call()
            return proxy.n_round_trips - before

        def start() -> None:
            ids.append(ours.create_trial(study_id))

        def claim() -> None:
            ours.exchange(ours.state(ids[-1], r.RUNNING))

        def requeue() -> None:
            ours.exchange(ours.state(ids[-1], r.WAITING))

        plain = [trips(call) for call in (start, requeue, claim)]
        log.take_lease("ours")
        leased = [trips(call) for call in (start, requeue, claim)]
        assert leased == plain == [1, 1, 1]
        while len(ids) < 200:
            ours.exchange(
                *(r.CreateTrial(study_id=study_id, datetime_start=None, **ours.mark())
                  for _ in range(66))
            )  # fmt: skip
            ids = [trial._trial_id for trial in ours.trials(study_id)]
        assert trips(lambda: log.renew_lease("ours", ids)) == 1
        running = dict.fromkeys(ids, "")
        assert trips(lambda: log.expired(study_id, running, 60.0)) == 1
        assert trips(lambda: log.withdraw_lease("ours", ids)) == 1
        log.close()


@pytest.mark.servers
def test_a_beat_uses_up_no_row_ids(tmp_path: Path) -> None:
    """An INSERT that finds its row there takes a number from the sequence all the same."""
    url = new_database("psycopg", tmp_path)
    log = TablesLog(url)
    ours = Follower(log, "ours")
    study_id = ours.create_study("s")
    log.take_lease("ours")
    ids = [ours.create_trial(study_id) for _ in range(3)]
    for _ in range(5):
        log.renew_lease("ours", ids)
    with sa.create_engine(url, poolclass=sa.NullPool).connect() as connection:
        sequence = sa.text("SELECT last_value FROM trial_heartbeats_trial_heartbeat_id_seq")
        assert connection.execute(sequence).scalar() == 3
    log.close()


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("kind", ["sqlite", *DRIVERS])
def test_many_stale_trials_are_failed_in_parts(kind: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    retry = RetryHeartbeatStaleTrialCallback()
    storage = RDBStorage(url, heartbeat_interval=60, heartbeat_stale_trial_callback=retry)
    study_id = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "s")
    count = 600
    running = {"study_id": study_id, "state": "RUNNING", "datetime_start": _LONG_AGO}
    with sa.create_engine(url, poolclass=sa.NullPool).begin() as direct:
        direct.execute(sa.insert(t.trials), [{**running, "number": n} for n in range(count)])
        ids = direct.execute(sa.select(t.trials.c.trial_id)).scalars()
        beats = [{"trial_id": trial_id, "heartbeat": _LONG_AGO} for trial_id in ids]
        direct.execute(sa.insert(t.trial_heartbeats), beats)
    connection = cast(TablesLog, storage.log).connection
    before = connection.durable_commits
    assert len(storage.fail_stale_trials()) == count
    assert connection.durable_commits - before == 3
    states = collections.Counter(x.state.name for x in storage.get_all_trials(study_id))
    assert states == {"FAIL": count, "WAITING": count}
    storage.close()


def test_sqlite_looks_for_stale_trials_among_the_beats_alone(tmp_path: Path) -> None:
    log = cast(TablesLog, RDBStorage(f"sqlite:///{tmp_path}/study.db").log)
    step = log._dialect.step(statements.expired, study_id=1, grace_s=60.0)
    with log.engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {step.statement.sql}", step.args)
        assert "SCAN trials" not in [row[3] for row in plan]
