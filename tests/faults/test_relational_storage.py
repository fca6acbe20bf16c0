"""What a user of ``RDBStorage`` meets on a server: cut cables, a long outage, few rights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
from pathlib import Path
import re
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.exceptions import StorageInternalError
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
import pytest
import sqlalchemy as sa

from servers import new_database, proxied, shared_mariadb
from trialstore import RDBStorage, records as r
from trialstore.clock import Clock
from trialstore.errors import LogUnavailableError
from trialstore.log import NOTHING, START, Wanted, copier
from trialstore.logs.relational import TablesLog, tables as t
from trialstore.testing.contents import study_contents
from trialstore.testing.proxy import CountingProxy

pytestmark = pytest.mark.servers

MINIMIZE = StudyDirection.MINIMIZE
UNIT = FloatDistribution(0.0, 1.0)
Cable = tuple[CountingProxy, Callable[[], RDBStorage]]


@pytest.fixture(params=["psycopg", "psycopg2", "pymysql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_database(request.param, tmp_path)


@pytest.fixture
def direct(url: str) -> Iterator[RDBStorage]:
    with contextlib.closing(RDBStorage(url)) as storage:
        yield storage


@pytest.fixture
def cable(url: str) -> Iterator[Cable]:
    """What cuts, and what opens a storage behind it."""
    with proxied(url) as (proxy, through):
        yield proxy, lambda: RDBStorage(through, linger_s=0.0)


_CALLS: dict[str, Callable[[RDBStorage, int, int, int], object]] = {
    "create a study": lambda s, study, trial, queued: s.create_new_study([MINIMIZE], "new"),
    "delete a study": lambda s, study, trial, queued: s.delete_study(study),
    "create": lambda s, study, trial, queued: s.create_new_trial(study),
    "create from a template": lambda s, study, trial, queued: s.create_new_trial(
        study, create_trial(value=2.0, params={"x": 0.5}, distributions={"x": UNIT})
    ),
    "claim": lambda s, study, trial, queued: s.set_trial_state_values(queued, TrialState.RUNNING),
    "tell": lambda s, study, trial, queued: s.set_trial_state_values(
        trial, TrialState.COMPLETE, [1.0]
    ),
    "first use": lambda s, study, trial, queued: s.set_trial_param(trial, "y", 0.25, UNIT),
    "attribute": lambda s, study, trial, queued: s.set_trial_user_attr(trial, "k", 1),
    "study attribute": lambda s, study, trial, queued: s.set_study_user_attr(study, "k", 1),
}


@pytest.mark.parametrize("name", _CALLS)
def test_each_reply_of_a_call_is_cut_once(direct: RDBStorage, cable: Cable, name: str) -> None:
    proxy, open_storage = cable

    def prepare() -> tuple[RDBStorage, int, int, int]:
        """A storage behind the proxy, and the ids of a study, a RUNNING and a WAITING trial."""
        for study in direct.get_all_studies():
            direct.delete_study(study._study_id)
        storage = open_storage()
        study_id = storage.create_new_study([MINIMIZE], "s")
        trial_id = storage.create_new_trial(study_id)
        queued = storage.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
        return storage, study_id, trial_id, queued

    def contents() -> dict[str, Any]:
        return {
            study.study_name: (
                study.user_attrs,
                study_contents(direct, study._study_id, ids=False, times=False),
            )
            for study in direct.get_all_studies()
        }

    storage, *ids = prepare()
    with contextlib.closing(storage):
        answer = type(_CALLS[name](storage, *ids))
        expected = contents()
    for k in range(1, 20):
        storage, *ids = prepare()
        with contextlib.closing(storage):
            proxy.cut_at_reply(k)
            assert type(_CALLS[name](storage, *ids)) is answer
            was_cut = proxy.was_cut
            assert contents() == expected, f"the {k}th reply"
        if not was_cut:
            break
    assert k > 1 and not was_cut


def test_a_connection_that_was_dropped_while_idle(cable: Cable) -> None:
    proxy, open_storage = cable
    with contextlib.closing(open_storage()) as storage:
        study_id = storage.create_new_study([MINIMIZE])
        for number in range(3):
            proxy.sever()
            trial_id = storage.create_new_trial(study_id)
            proxy.sever()
            assert storage.get_trial(trial_id).number == number
            proxy.sever()
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        proxy.sever()
        trials = storage.get_all_trials(study_id)
        assert [(trial.number, trial.state) for trial in trials] == [
            (number, TrialState.COMPLETE) for number in range(3)
        ]


def test_a_server_that_stays_away_is_told_with_the_cause(cable: Cable) -> None:
    proxy, open_storage = cable
    with contextlib.closing(open_storage()) as storage:
        storage.log.connection.retry_deadline_s = 0.0  # type: ignore[attr-defined]
        study_id = storage.create_new_study([MINIMIZE])
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_user_attr(trial_id, "k", 1)
        proxy.refuse()
        proxy.sever()
        for call in (
            lambda: storage.get_trial(trial_id),
            lambda: storage.get_all_trials(study_id),
            lambda: storage.get_n_trials(study_id),
        ):
            with pytest.raises(StorageInternalError) as caught:
                call()
            assert caught.value.__cause__ is not None
            assert "s3cret" not in f"{caught.value}{caught.value.__cause__}"
        with pytest.raises(StorageInternalError) as caught:
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        assert caught.value.__cause__ is not None
        proxy.refuse(False)
        assert storage.get_trial(trial_id).state == TrialState.RUNNING
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        assert storage.get_best_trial(study_id).value == 1.0


def test_what_plain_optuna_stores_of_a_bad_call_is_read_around(
    url: str, direct: RDBStorage
) -> None:
    theirs = optuna.storages.RDBStorage(url)
    study_id = theirs.create_new_study([MINIMIZE], "s")
    choices = CategoricalDistribution(["a", "b"])
    for value in (1.0, float("nan")):
        trial_id = theirs.create_new_trial(study_id)
        theirs.set_trial_param(trial_id, "c", 9.0 if value == 1.0 else 1.0, choices)
        with contextlib.suppress(Exception):
            theirs.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])
        with contextlib.suppress(Exception):
            theirs.set_trial_state_values(trial_id, TrialState.FAIL)
    theirs.engine.dispose()
    first, second = direct.get_all_trials(study_id)
    assert (first.params, first.value) == ({}, 1.0)
    assert second.params == {"c": "b"}
    assert second.state == TrialState.FAIL
    assert direct.get_best_trial(study_id).number == 0
    study = optuna.load_study(study_name="s", storage=direct)
    study.optimize(lambda trial: len(trial.suggest_categorical("c", ["a", "b"])), n_trials=3)
    assert [trial.state for trial in study.trials[2:]] == [TrialState.COMPLETE] * 3


_OPTUNAS = [table.name for table in t.metadata.sorted_tables if table is not t.sessions]


def _order_mariadb(*orders: str) -> None:
    with shared_mariadb()._connect() as connection, connection.cursor() as cursor:
        for order in orders:
            cursor.execute(order)


def _let_in(url: str, rights: str, tables: Sequence[str] = _OPTUNAS) -> str:
    """URL for somebody who may do so much with these tables, and nothing else."""
    address = sa.make_url(url)
    name = f"u{address.database}"
    if address.get_backend_name() == "postgresql":
        orders = [f"CREATE ROLE {name} LOGIN", "REVOKE CREATE ON SCHEMA public FROM PUBLIC"]
        orders += [f"GRANT {rights} ON {', '.join(tables)} TO {name}"]
        orders += [f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {name}"]
        engine = sa.create_engine(url)
        with engine.begin() as connection:
            for order in orders:
                connection.exec_driver_sql(order)
        engine.dispose()
    else:
        orders = [f"CREATE USER {name}@'127.0.0.1' IDENTIFIED BY 's3cret'"]
        on = [f"{address.database}.{table}" for table in tables]
        orders += [f"GRANT {rights} ON {table} TO {name}@'127.0.0.1'" for table in on]
        _order_mariadb(*orders)
    return address.set(username=name).render_as_string(hide_password=False)


@pytest.mark.parametrize("has_table", [False, True], ids=["absent", "another user's"])
def test_without_rights_on_the_table_of_ours(url: str, has_table: bool) -> None:
    study = optuna.create_study(storage=optuna.storages.RDBStorage(url), study_name="s")
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=3)
    if has_table:
        RDBStorage(url).close()
    with contextlib.closing(RDBStorage(_let_in(url, "SELECT, INSERT, UPDATE, DELETE"))) as ours:
        mine = optuna.load_study(study_name="s", storage=ours)
        mine.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=3)
        assert [trial.number for trial in study.trials] == list(range(6))


@pytest.mark.parametrize("has_table", [False, True], ids=["absent", "another user's"])
def test_who_may_only_read_reads(url: str, has_table: bool) -> None:
    study = optuna.create_study(storage=optuna.storages.RDBStorage(url), study_name="s")
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=3)
    if has_table:
        RDBStorage(url).close()
    with contextlib.closing(RDBStorage(_let_in(url, "SELECT"))) as ours:
        mine = optuna.load_study(study_name="s", storage=ours)
        assert mine.best_value == study.best_value
        assert len(mine.trials) == ours.get_n_trials(mine._study_id) == 3
        with pytest.raises(StorageInternalError, match="denied"):
            mine.ask()
        assert len(mine.trials) == 3


def test_a_table_that_is_altered_meanwhile(direct: RDBStorage) -> None:
    """What the server keeps of our statements is not good any more."""
    study = optuna.create_study(storage=direct)
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=10)
    names = "MODIFY number" if direct.url.startswith("mysql") else "ALTER number TYPE"
    with direct.engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE trials {names} BIGINT")
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=10)
    assert [trial.number for trial in study.trials] == list(range(20))


class _Meanwhile(Clock):
    """Something happens when somebody first waits."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._works = [work]

    def sleep(self, duration_s: float) -> None:
        for work in self._works:
            work()
        self._works = []
        super().sleep(duration_s)


def test_as_many_connections_as_a_user_may_have_are_waited_for(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    RDBStorage(url).close()
    few = _let_in(url, "SELECT, INSERT, UPDATE, DELETE", [*_OPTUNAS, t.sessions.name])
    name = sa.make_url(few).username
    if url.startswith("mysql"):
        _order_mariadb(f"ALTER USER {name}@'127.0.0.1' WITH MAX_USER_CONNECTIONS 1")
    else:
        with sa.create_engine(url, poolclass=sa.NullPool).begin() as connection:
            connection.exec_driver_sql(f"ALTER ROLE {name} CONNECTION LIMIT 1")
    first = TablesLog(few)
    with monkeypatch.context() as patch:
        patch.setattr(Clock, "sleep", lambda *_: pytest.fail("who is connected need not wait"))
        with pytest.raises(LogUnavailableError):
            copier(first)()
    TablesLog(few, clock=_Meanwhile(first.close)).close()


_READ_ONLY = {
    "psycopg": {"options": "-c default_transaction_read_only=on"},
    "psycopg2": {"options": "-c default_transaction_read_only=on"},
    "pymysql": {"init_command": "SET SESSION tx_read_only = 1"},
}


def _reads_and_is_refused(ours: RDBStorage, expected: optuna.Study) -> None:
    mine = optuna.load_study(study_name="s", storage=ours)
    assert mine.best_value == expected.best_value
    assert len(mine.trials) == ours.get_n_trials(mine._study_id) == 3
    with pytest.raises(StorageInternalError, match=re.compile("read.?only", re.IGNORECASE)):
        mine.ask()
    assert len(mine.trials) == 3


@pytest.mark.parametrize("has_table", [False, True], ids=["absent", "there"])
def test_a_read_only_session_reads(url: str, has_table: bool) -> None:
    study = optuna.create_study(storage=optuna.storages.RDBStorage(url), study_name="s")
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=3)
    if has_table:
        RDBStorage(url).close()
    options = {"connect_args": _READ_ONLY[sa.make_url(url).get_driver_name()]}
    with contextlib.closing(RDBStorage(url, engine_kwargs=options)) as ours:
        _reads_and_is_refused(ours, study)


def _set_read_only(url: str, how: str) -> None:
    """For all who connect from now on."""
    if url.startswith("mysql"):
        _order_mariadb(f"SET GLOBAL read_only = {how}")
        return
    name = sa.make_url(url).database
    with sa.create_engine(url, poolclass=sa.NullPool).connect() as connection:
        connection.exec_driver_sql("SET transaction_read_only = off")
        connection.exec_driver_sql(
            f"ALTER DATABASE {name} SET default_transaction_read_only = {how}"
        )
        connection.commit()


@pytest.mark.parametrize("reads", [False, True], ids=["at once", "after it has read there"])
def test_a_moment_between_two_masters_is_waited_out(url: str, reads: bool) -> None:
    RDBStorage(url).close()
    rights = "SELECT, INSERT, UPDATE, DELETE"
    log = TablesLog(
        _let_in(url, rights, [*_OPTUNAS, t.sessions.name]),
        clock=_Meanwhile(lambda: _set_read_only(url, "off")),
    )
    with contextlib.closing(log):
        create = r.CreateStudy(worker_id="w", study_name="s", directions=[1])
        (outcome,) = log.exchange([create], START, NOTHING).outcomes or ()
        _set_read_only(url, "on")
        log.connection.disconnect()
        try:
            if reads:
                log.exchange([], START, Wanted(catalogue=True))
            new = r.CreateTrial(worker_id="w", study_id=outcome.id, datetime_start=None)
            log.exchange([new], START, NOTHING)
        finally:
            _set_read_only(url, "off")
        assert log.connection.has_mark
        news = log.exchange([], START, Wanted(trials_of=frozenset((outcome.id,)))).news
    assert [one.number for one in news if isinstance(one, r.PutTrial)] == [0]


@pytest.mark.parametrize("has_table", [False, True], ids=["absent", "there"])
def test_a_replica_of_mariadb_reads(tmp_path: Path, has_table: bool) -> None:
    url = new_database("pymysql", tmp_path)
    study = optuna.create_study(storage=optuna.storages.RDBStorage(url), study_name="s")
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=3)
    on = [*_OPTUNAS]
    if has_table:
        RDBStorage(url).close()
        on.append(t.sessions.name)
    anybody = _let_in(url, "SELECT, INSERT, UPDATE, DELETE", on)
    _order_mariadb("SET GLOBAL read_only = 1")
    try:
        with contextlib.closing(RDBStorage(anybody)) as ours:
            _reads_and_is_refused(ours, study)
    finally:
        _order_mariadb("SET GLOBAL read_only = 0")
