"""What ``tests/backends.py`` does not cover: ``GrpcLog`` as a log, servers over storages that are
not ours, and Optuna's own client."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
from pathlib import Path
import warnings

import optuna
import pytest

from ageing import age_leases_of
from grpc_servers import open_grpc, serve, served_url
from trialstore.logs.grpc.client import GrpcLog
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
