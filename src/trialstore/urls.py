"""A URL to a storage: one scheme, one kind of storage, imported when it is asked for."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload
from urllib.parse import parse_qsl, urlencode, urlsplit

from optuna.storages import BaseStorage

from trialstore.errors import LogCorruptError, LogUnavailableError
from trialstore.log import Log

if TYPE_CHECKING:
    from trialstore.storage import Storage

_REDIS = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "sentinel")
_TABLES = ("sqlite", "postgresql", "mysql", "mariadb")
_KINDS = (*_REDIS, *_TABLES, "grpc", "grpcs", "journal", "memory")
_IN_MEMORY = "A store in memory lives in the process that made it, not here."
_SQLITE_HEADER = b"SQLite format 3\0"
_SCHEMES = (
    "sqlite:///file.db, postgresql+psycopg://..., mysql+pymysql://..., redis://..., "
    "grpc://host:port, grpcs://host:port, journal:///path or a path, memory://"
)


@overload
def get_storage(storage: str | os.PathLike[str] | None, **options: Any) -> Storage: ...
@overload
def get_storage(storage: BaseStorage) -> BaseStorage: ...
def get_storage(
    storage: str | os.PathLike[str] | BaseStorage | None, **options: Any
) -> BaseStorage:
    """The storage that a URL names; a storage is returned as it is, None is a new one in memory.

    Args:
        storage: ``sqlite:///…``, ``postgresql…://…``, ``mysql…://…``, ``redis://…``,
            ``grpc://host:port``, ``journal:///path``, a path, or ``memory://``.
        options: Keyword arguments for the storage's constructor.

    Raises:
        ValueError: No storage answers to the URL; the message lists the forms.
    """
    if storage is None:
        storage = "memory://"
    if isinstance(storage, os.PathLike):
        storage = os.fspath(storage)
    if not isinstance(storage, str):
        if options:
            raise ValueError("Options go with a URL, not with a storage that exists already.")
        return storage
    scheme, separator, _ = storage.partition("://")
    kind = scheme.partition("+")[0]
    if not separator or kind == "journal":
        return _journal_file(storage, options)
    if scheme in _REDIS:
        return _journal_in_redis(storage, options)
    if kind in _TABLES:
        from trialstore.rdb import RDBStorage

        return RDBStorage(storage, **options)
    if kind in ("grpc", "grpcs"):
        return _grpc_proxy(storage, kind == "grpcs", options)
    if kind == "memory":
        from trialstore.in_memory import InMemoryStorage

        return InMemoryStorage(**options)
    raise _unknown(scheme)


def open_log(url: str, *, create: bool = False, any_version: bool = False, **options: Any) -> Log:
    """The log of a store, for who does not want a storage; nothing of it is read yet.

    Args:
        url: As for ``get_storage``.
        create: Make the store if it is not there.
        any_version: Take tables of another schema version as they are.
        options: Keyword arguments for the log's constructor.

    Raises:
        ValueError: No storage answers to the URL, or it names one in memory.
        LogUnavailableError: There is no such file, or the server was not reached.
        IncompatibleSchemaError: The tables are of another version, or not there.
    """
    if not create:
        must_exist(url)
    scheme, separator, _ = url.partition("://")
    kind = scheme.partition("+")[0]
    if kind == "memory":
        raise ValueError(_IN_MEMORY)
    if not separator or kind == "journal":
        from trialstore.journal import JournalFileBackend

        return JournalFileBackend(_journal_path(url), **options)
    if kind in _TABLES:
        from trialstore.logs.relational.log import TablesLog

        return TablesLog(
            url,
            skip_compatibility_check=any_version,
            skip_table_creation=not create,
            **options,
        )
    if scheme in _REDIS:
        backend: Log = _redis_backend(url, options)
        return backend
    return get_storage(url, **options).log


def must_exist(url: str) -> None:
    """Where a URL names a file: it is there.

    Raises:
        LogUnavailableError: It is not.
        LogCorruptError: It is no SQLite database, where the URL says so.
        ValueError: It is one, and the URL says otherwise; or the URL names no file at all, or what
            lives in another process' memory.
    """
    scheme, separator, _ = url.partition("://")
    kind = scheme.partition("+")[0]
    path: str | None = None
    if not separator or kind == "journal":
        path = _journal_path(url)
    elif kind == "sqlite":
        from trialstore.logs.relational.connection import sqlite_path

        path = sqlite_path(url)
    elif kind == "memory":
        raise ValueError(_IN_MEMORY)
    if path is None:
        return
    if not Path(path).is_file():
        raise LogUnavailableError(f"There is no file {path}.")
    if kind == "sqlite" and not _is_sqlite(path):
        raise LogCorruptError(
            "This is no SQLite database. The URL of a journal is journal:// and its path.",
            source=path,
        )


def _is_sqlite(path: str) -> bool:
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(len(_SQLITE_HEADER)) == _SQLITE_HEADER


def _unknown(scheme: str) -> ValueError:
    return ValueError(
        f"No storage answers to a URL that begins with {scheme!r}. Known: {_SCHEMES}."
    )


def _journal_path(url: str) -> str:
    """The path in the URL of a journal file, or that is given in its place.

    Raises:
        ValueError: It is empty, or rather the URL of something else.
    """
    _, separator, rest = url.partition("://")
    path = rest if separator else url
    if not path:
        raise ValueError(f"The URL names no file. Known: {_SCHEMES}.")
    kind, colon, _ = path.partition(":")
    if colon and kind.partition("+")[0] in _KINDS:
        raise ValueError(f"What begins with {kind + ':'!r} is no path. Known: {_SCHEMES}.")
    with contextlib.suppress(OSError):  # whoever opens it is told
        if _is_sqlite(path):
            raise ValueError(f"{path} is a SQLite database: its URL is sqlite:///{path}.")
    return path


def _journal_file(url: str, options: dict[str, Any]) -> Storage:
    from trialstore.journal import JournalFileBackend, JournalStorage

    path = _journal_path(url)
    of_backend = ("durability", "lock_obj")
    backend = JournalFileBackend(path, **{n: v for n, v in options.items() if n in of_backend})
    return JournalStorage(backend, **{n: v for n, v in options.items() if n not in of_backend})


def _journal_in_redis(url: str, options: dict[str, Any]) -> Storage:
    from trialstore.journal import JournalStorage

    of_backend = ("use_cluster", "prefix", "durability", "password_file", "password_env")
    backend = _redis_backend(url, {n: v for n, v in options.items() if n in of_backend})
    return JournalStorage(backend, **{n: v for n, v in options.items() if n not in of_backend})


def _redis_backend(url: str, options: dict[str, Any]) -> Any:
    """``prefix`` and ``use_cluster`` may also stand in the URL's query, beside redis-py's own."""
    from trialstore.journal import JournalRedisBackend

    address, mark, query = url.partition("?")
    rest = []
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name == "prefix":
            options = {"prefix": value, **options}
        elif name == "use_cluster":
            options = {"use_cluster": value.lower() in ("1", "true", "yes"), **options}
        else:
            rest.append((name, value))
    if len(rest) == len(parse_qsl(query, keep_blank_values=True)):
        return JournalRedisBackend(url, **options)
    return JournalRedisBackend(address + (mark + urlencode(rest) if rest else ""), **options)


def _grpc_proxy(url: str, tls: bool, options: dict[str, Any]) -> Storage:
    from trialstore.grpc import GrpcStorageProxy

    parts = urlsplit(url)
    try:
        port = parts.port or 13000
    except ValueError as error:
        raise ValueError(f"The URL of a gRPC server is grpc://host:port. {error}.") from None
    if "@" in parts.netloc or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(
            "The URL of a gRPC server is grpc://host:port and nothing else. A token is in the "
            "environment (TRIALSTORE_GRPC_TOKEN), or in the file that token_file names."
        )
    if tls:
        options.setdefault("tls", True)
    return GrpcStorageProxy(host=parts.hostname or "localhost", port=port, **options)
