"""The one list of backends, and what each of them can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
import functools
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.storages.journal import BaseJournalBackend
import pytest

from grpc_servers import prepare_grpc
from redis_servers import new_prefix, shared_cluster
from servers import new_database, shared_redis
import trialstore
from trialstore import journal
from trialstore.storage import Storage
from trialstore.testing.storage_suite import Capabilities, OpenStorage

_JOURNAL = Capabilities()
_SQLITE = Capabilities(keeps_every_key=False, keeps_negative_zero=False, reuses_ids=True)
_POSTGRESQL = Capabilities(
    keeps_every_text=False, keeps_every_key=False, keeps_negative_zero=False
)
_MARIADB = Capabilities(
    keeps_every_text=False,
    keeps_every_key=False,
    keeps_negative_zero=False,
    keeps_microseconds=False,
    attribute_bytes_max=65_535,
)
# What protobuf does to it: messages end at 4 MiB, names are UTF-8, a map has no order. What the
# service does: it turns a choice into a value and looks for that among the choices again, of equal
# ones it finds the first. And what Optuna's storage in memory does, which judges there: of a
# template's parameters it takes no notice.
_STOCK_SERVER = Capabilities(
    tells_equal_choices_apart=False,
    templates_bind=False,
    keeps_every_key=False,
    keeps_order=False,
    keeps_leases=False,
    appends_conditionally=False,
    tells_only_news=False,
    attribute_bytes_max=(4 << 20) - 1024,
)


@dataclass(frozen=True)
class Backend:
    """A kind of store.

    Args:
        name: Of the test parameter.
        prepare: Makes a new store in a folder and returns what opens it, any number of times;
            picklable where the store crosses processes.
        capabilities: Of the store.
        needs_server: A database server has to be started.
        machine_runs: How many runs of the stateful machine it is worth.
        open_plain: Opens the same store with Optuna's own storage, where there is one; takes the
            arguments of what ``prepare`` returned.
    """

    name: str
    prepare: Callable[[Path], OpenStorage]
    capabilities: Capabilities = _JOURNAL
    needs_server: bool = False
    marks: tuple[Any, ...] = field(default=())
    machine_runs: int = 40
    open_plain: Callable[..., BaseStorage] | None = None


def open_memory(**options: Any) -> Storage:
    options.pop("linger_s", None)
    options.pop("max_staleness_s", None)
    return trialstore.InMemoryStorage(**options)


def open_journal(path: str, lock: str, **options: Any) -> Storage:
    kinds = {
        "symlink": journal.JournalFileSymlinkLock,
        "open": journal.JournalFileOpenLock,
    }
    lock_obj = kinds[lock](path) if lock != "default" else None
    backend = journal.JournalFileBackend(path, lock_obj)
    return trialstore.JournalStorage(backend, **options)


def open_optuna_backend(path: str, **options: Any) -> Storage:
    backend = optuna.storages.journal.JournalFileBackend(path)
    return trialstore.JournalStorage(backend, **options)


class ListBackend(BaseJournalBackend):
    """What a user writes: Optuna's two methods, over a list."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        return self.logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.logs.extend(logs)


def open_plain_journal(path: str, lock: str = "default") -> BaseStorage:
    lock_obj = optuna.storages.journal.JournalFileOpenLock(path) if lock == "open" else None
    backend = optuna.storages.journal.JournalFileBackend(path, lock_obj)
    return optuna.storages.JournalStorage(backend)


def open_plain_tables(url: str) -> BaseStorage:
    return optuna.storages.RDBStorage(url)


def open_plain_redis(url: str, use_cluster: bool, prefix: str) -> BaseStorage:
    backend = optuna.storages.journal.JournalRedisBackend(url, use_cluster, prefix)
    return optuna.storages.JournalStorage(backend)


def open_backend(backend: BaseJournalBackend, **options: Any) -> Storage:
    return trialstore.JournalStorage(backend, **options)


def open_tables(url: str, **options: Any) -> Storage:
    return trialstore.RDBStorage(url, **options)


def _journal(lock: str) -> Callable[[Path], OpenStorage]:
    return lambda folder: functools.partial(open_journal, str(folder / "journal.log"), lock)


def open_redis(url: str, use_cluster: bool, prefix: str, **options: Any) -> Storage:
    backend = journal.JournalRedisBackend(url, use_cluster, prefix)
    return trialstore.JournalStorage(backend, **options)


def _redis(folder: Path) -> OpenStorage:
    return functools.partial(open_redis, shared_redis().url, False, new_prefix())


def _redis_cluster(pattern: str) -> Callable[[Path], OpenStorage]:
    return lambda folder: functools.partial(
        open_redis, shared_cluster().url, True, new_prefix(pattern)
    )


def _tables(kind: str) -> Callable[[Path], OpenStorage]:
    return lambda folder: functools.partial(open_tables, new_database(kind, folder))


def _grpc(kind: str, **options: Any) -> Callable[[Path], OpenStorage]:
    """Our client on a server over a store of another kind."""
    return lambda folder: prepare_grpc(kind, folder, **options)


def _server(
    name: str,
    prepare: Callable[[Path], OpenStorage],
    capabilities: Capabilities,
    machine_runs: int,
    open_plain: Callable[..., BaseStorage] | None = None,
) -> Backend:
    marks = (pytest.mark.servers,)
    return Backend(name, prepare, capabilities, True, marks, machine_runs, open_plain)


BACKENDS = [
    Backend(
        "memory",
        lambda folder: open_memory,
        Capabilities(shared=False, crosses_processes=False, lingers=False, keeps_objects=True),
    ),
    Backend("journal-file", _journal("default"), open_plain=open_plain_journal),
    Backend("journal-file-symlink-lock", _journal("symlink"), open_plain=open_plain_journal),
    Backend("journal-file-open-lock", _journal("open"), open_plain=open_plain_journal),
    Backend(
        "journal-optuna-file",
        lambda folder: functools.partial(open_optuna_backend, str(folder / "journal.log")),
        open_plain=open_plain_journal,
    ),
    Backend(
        "journal-custom-backend",
        lambda folder: functools.partial(open_backend, ListBackend()),
        Capabilities(crosses_processes=False, keeps_leases=False),
    ),
    Backend("sqlite-file", _tables("sqlite"), _SQLITE, open_plain=open_plain_tables),
    Backend(
        "sqlite-memory",
        _tables("memory"),
        Capabilities(
            shared=False,
            crosses_processes=False,
            keeps_every_key=False,
            keeps_negative_zero=False,
            reuses_ids=True,
        ),
    ),
    Backend("grpc-journal", _grpc("journal")),
    Backend("grpc-sqlite", _grpc("sqlite"), _SQLITE),
    Backend("grpc-stock-server", _grpc("in-process", stock=True), _STOCK_SERVER),
]

SERVER_BACKENDS = [
    _server("journal-redis", _redis, _JOURNAL, 40, open_plain_redis),
    # Optuna's own needs one server for all keys.
    _server("journal-redis-hash-tag", _redis_cluster("{p%d}"), _JOURNAL, 10),
    _server("journal-redis-plain-prefix", _redis_cluster("p%d"), _JOURNAL, 10),
    _server("postgresql-psycopg", _tables("psycopg"), _POSTGRESQL, 25, open_plain_tables),
    _server("postgresql-psycopg2", _tables("psycopg2"), _POSTGRESQL, 25, open_plain_tables),
    _server("mariadb-pymysql", _tables("pymysql"), _MARIADB, 25, open_plain_tables),
    _server("grpc-postgresql", _grpc("psycopg"), _POSTGRESQL, 40),
]


def params(choose: Callable[[Backend], bool] = lambda backend: True) -> list[Any]:
    """For ``pytest.mark.parametrize`` or a fixture's ``params``."""
    return [
        pytest.param(backend, id=backend.name, marks=backend.marks)
        for backend in (*BACKENDS, *SERVER_BACKENDS)
        if choose(backend)
    ]
