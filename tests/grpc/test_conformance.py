"""What every log and storage promises, through our client and server, and through Optuna's."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from pathlib import Path
import warnings

import optuna
import pytest

from grpc_servers import open_grpc, prepare_grpc, serve, served_url
from trialstore.logs.grpc.client import GrpcLog
from trialstore.storage import Storage
from trialstore.testing.log_suite import LogSuite, OpenLog
from trialstore.testing.storage_suite import Capabilities, OpenStorage, StorageSuite

try:
    from optuna.testing.pytest_storages import StorageTestCase
except ImportError:  # ships with Optuna from 4.7 on
    StorageTestCase = None

_servers = pytest.mark.servers

_CAPABILITIES = {
    "journal": Capabilities(),
    "sqlite": Capabilities(keeps_every_key=False, keeps_negative_zero=False, reuses_ids=True),
    "psycopg": Capabilities(
        keeps_every_text=False, keeps_every_key=False, keeps_negative_zero=False
    ),
}


# Optuna's service carries parameters in a map of protobuf's, which has no order.
_NO_ORDER = pytest.mark.skip(reason="a map on the wire has no order")


class TestGrpcLogOnJournal(LogSuite):
    @pytest.fixture
    def open_log(self, tmp_path: Path) -> OpenLog:
        port = serve(served_url("journal", tmp_path))
        return lambda: GrpcLog("localhost", port)


class TestGrpcLogOnSQLite(LogSuite):
    keeps_every_key = False
    keeps_negative_zero = False

    @pytest.fixture
    def open_log(self, tmp_path: Path) -> OpenLog:
        port = serve(served_url("sqlite", tmp_path))
        return lambda: GrpcLog("localhost", port)


@_servers
class TestGrpcLogOnPostgreSQL(LogSuite):
    keeps_every_text = False
    keeps_every_key = False
    keeps_negative_zero = False

    @pytest.fixture
    def open_log(self, tmp_path: Path) -> OpenLog:
        port = serve(served_url("psycopg", tmp_path))
        return lambda: GrpcLog("localhost", port)


class TestStorageSuite(StorageSuite):
    """Our client, our server."""

    @pytest.fixture
    def open_storage(self, open_kind: tuple[OpenStorage, Capabilities]) -> OpenStorage:
        return open_kind[0]

    @pytest.fixture
    def capabilities(self, open_kind: tuple[OpenStorage, Capabilities]) -> Capabilities:
        return open_kind[1]

    @pytest.fixture(params=["journal", "sqlite", pytest.param("psycopg", marks=_servers)])
    def open_kind(
        self, request: pytest.FixtureRequest, tmp_path: Path
    ) -> tuple[OpenStorage, Capabilities]:
        return prepare_grpc(request.param, tmp_path), _CAPABILITIES[request.param]


if StorageTestCase is not None:

    class TestOptunaSuite(StorageTestCase):
        """Optuna's own suite: our client on our server."""

        @pytest.fixture(
            params=["journal", "sqlite", "in-process", pytest.param("psycopg", marks=_servers)]
        )
        def storage(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
            with contextlib.closing(prepare_grpc(request.param, tmp_path)()) as storage:
                yield storage

    class TestOptunaSuiteOnStockServer(StorageTestCase):
        """Our client on Optuna's server."""

        @pytest.fixture
        def storage(self) -> Iterator[Storage]:
            port = serve("optuna+memory://", stock=True)
            with contextlib.closing(open_grpc(port)) as storage:
                yield storage

        @_NO_ORDER
        def test_get_all_trials_params_order(self) -> None: ...

    class TestOptunaSuiteOverForeignStorage(StorageTestCase):
        """Our client, our server, Optuna's storage."""

        @pytest.fixture
        def storage(self) -> Iterator[Storage]:
            port = serve("optuna+memory://")
            with contextlib.closing(open_grpc(port)) as storage:
                yield storage

    class TestOptunaSuiteOfStockClient(StorageTestCase):
        """Optuna's client on our server."""

        @pytest.fixture(params=["journal", "sqlite"])
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
