"""What ``tests/backends.py`` does not cover: ``GrpcLog`` as a log, servers over storages that are
not ours, and Optuna's own client."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import logging
from pathlib import Path
import sqlite3
import threading
from typing import Any
import warnings

import optuna
from optuna.study import StudyDirection
import pytest
import sqlalchemy as sa

from ageing import age_leases_of
from grpc_servers import open_grpc, serve, served_url, serving
import trialstore
from trialstore.log import Batch, Cursor, Wanted
from trialstore.logs.grpc.client import GrpcLog
from trialstore.logs.grpc.sharing import ShareLog
from trialstore.logs.relational.log import TablesLog
from trialstore.storage import Storage
from trialstore.testing.capability_suites import AgeLeases
from trialstore.testing.log_suite import LogSuite, OpenLog

try:
    from optuna.testing.pytest_storages import StorageTestCase
except ImportError:  # ships with Optuna from 4.7 on
    StorageTestCase = None

_servers = pytest.mark.servers

# Optuna's service carries parameters in a map of protobuf's, which has no order.
_NO_ORDER = pytest.mark.skip(reason="a map on the wire has no order")


class TestGrpcLogOnJournal(LogSuite):
    @pytest.fixture
    def open_log(self, tmp_path: Path) -> OpenLog:
        port = serve(served_url("journal", tmp_path))
        return lambda: GrpcLog("localhost", port)

    @pytest.fixture
    def age_leases(self, open_log: OpenLog) -> AgeLeases:
        return functools.partial(age_leases_of, open_log())


class TestGrpcLogOnSQLite(LogSuite):
    keeps_every_key = False
    keeps_negative_zero = False

    @pytest.fixture
    def open_log(self, tmp_path: Path) -> OpenLog:
        port = serve(served_url("sqlite", tmp_path))
        return lambda: GrpcLog("localhost", port)

    @pytest.fixture
    def age_leases(self, open_log: OpenLog) -> AgeLeases:
        return functools.partial(age_leases_of, open_log())


@_servers
class TestGrpcLogOnPostgreSQL(LogSuite):
    keeps_every_text = False
    keeps_every_key = False
    keeps_negative_zero = False

    @pytest.fixture
    def open_log(self, tmp_path: Path) -> OpenLog:
        port = serve(served_url("psycopg", tmp_path))
        return lambda: GrpcLog("localhost", port)

    @pytest.fixture
    def age_leases(self, open_log: OpenLog) -> AgeLeases:
        return functools.partial(age_leases_of, open_log())


if StorageTestCase is not None:

    class TestOptunaSuiteOverForeignStorage(StorageTestCase):
        """Our client, our server, a storage known by its methods only."""

        @pytest.fixture(params=["memory://", "optuna+memory://"])
        def storage(self, request: pytest.FixtureRequest) -> Iterator[Storage]:
            with contextlib.closing(open_grpc(serve(request.param))) as storage:
                yield storage

    class TestOptunaSuiteOfStockClient(StorageTestCase):
        """Optuna's client on our server."""

        @pytest.fixture(params=["journal", "sqlite", pytest.param("psycopg", marks=_servers)])
        def storage(
            self, request: pytest.FixtureRequest, tmp_path: Path
        ) -> Iterator[optuna.storages.BaseStorage]:
            port = serve(served_url(request.param, tmp_path))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                storage = optuna.storages.GrpcStorageProxy(port=port)
            with contextlib.closing(storage):
                yield storage

        @_NO_ORDER
        def test_get_all_trials_params_order(self) -> None: ...


# --- storages that no pickle holds ---------------------------------------------------------------


def _connect(url: str) -> Any:
    """Makes connections; a lambda, as users write it, which can't be pickled."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return lambda: sqlite3.connect(str(parsed.database), check_same_thread=False)
    import psycopg

    address = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
    return lambda: psycopg.connect(address)


@_servers
def test_an_engine_made_with_a_creator_serves_two_at_once(tmp_path: Path) -> None:
    url = served_url("psycopg", tmp_path)
    storage = trialstore.RDBStorage(url, engine_kwargs={"creator": _connect(url)})
    with serving(storage) as server, contextlib.closing(open_grpc(server.port)) as client:
        log: Any = storage._exchanger.log
        assert isinstance(log, ShareLog)

        def create() -> int:
            return client.create_new_study([StudyDirection.MINIMIZE], "s")

        # The first handle is taken, and there has to be another one.
        study_id = log._share.alone(create)
        assert storage.get_study_id_from_name("s") == study_id


class _OneHandle:
    """A log of somebody's who did not think of pickles."""

    def __init__(self, url: str) -> None:
        self._tables = TablesLog(url)
        self._taken = threading.Lock()

    def exchange(self, records: Any, cursor: Cursor, wanted: Wanted) -> Batch:
        assert self._taken.acquire(blocking=False), "two threads use one log"
        try:
            return self._tables.exchange(records, cursor, wanted)
        finally:
            self._taken.release()

    def close(self) -> None:
        self._tables.close()


@pytest.mark.parametrize(
    "kind", ["a log that can't be pickled", "a database in memory", "a file's own creator"]
)
def test_clients_of_what_has_one_handle_take_turns(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "a database in memory":
        storage: Storage = trialstore.RDBStorage("sqlite://")
    elif kind == "a file's own creator":
        url = f"sqlite:///{tmp_path}/a.db"
        storage = trialstore.RDBStorage(url, engine_kwargs={"creator": _connect(url)})
    else:
        storage = Storage(_OneHandle(f"sqlite:///{tmp_path}/a.db"))
    failed: list[BaseException] = []

    def work(port: int) -> None:
        try:
            with contextlib.closing(open_grpc(port)) as client:
                study = optuna.load_study(
                    study_name="s", storage=client, sampler=optuna.samplers.RandomSampler()
                )
                study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=5)
        except BaseException as error:
            failed.append(error)

    with caplog.at_level(logging.WARNING), serving(storage) as server:
        assert "take turns" in caplog.text  # before anybody has come
        study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
        workers = [threading.Thread(target=work, args=(server.port,)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failed
        assert storage.get_n_trials(study_id) == 20
