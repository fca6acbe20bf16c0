"""A URL to a storage: one scheme, one kind of storage, imported when it is asked for."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from optuna.storages import BaseStorage

_REDIS = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "sentinel")
_SCHEMES = (
    "sqlite:///file.db, postgresql+psycopg://..., mysql+pymysql://..., redis://..., "
    "grpc://host:port, grpcs://host:port, journal:///path or a path, memory://"
)


def get_storage(storage: str | BaseStorage | None, **options: Any) -> BaseStorage:
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
    if not isinstance(storage, str):
        if options:
            raise ValueError("Options go with a URL, not with a storage that exists already.")
        return storage
    scheme, separator, rest = storage.partition("://")
    if not separator:
        return _journal_file(storage, options)
    if scheme in _REDIS:
        return _journal_in_redis(storage, options)
    kind = scheme.partition("+")[0]
    if kind in ("sqlite", "postgresql", "mysql", "mariadb"):
        from trialstore.rdb import RDBStorage

        return RDBStorage(storage, **options)
    if kind in ("grpc", "grpcs"):
        return _grpc_proxy(storage, kind == "grpcs", options)
    if kind == "journal":
        return _journal_file(rest, options)
    if kind == "memory":
        from trialstore.in_memory import InMemoryStorage

        return InMemoryStorage(**options)
    raise ValueError(
        f"No storage answers to a URL that begins with {scheme!r}. Known: {_SCHEMES}."
    )


def _journal_file(path: str, options: dict[str, Any]) -> BaseStorage:
    from trialstore.journal import JournalFileBackend, JournalStorage

    if not path:
        raise ValueError(f"The URL names no file. Known: {_SCHEMES}.")
    return JournalStorage(JournalFileBackend(path), **options)


def _journal_in_redis(url: str, options: dict[str, Any]) -> BaseStorage:
    from trialstore.journal import JournalRedisBackend, JournalStorage

    of_backend = ("use_cluster", "prefix", "durability")
    backend = JournalRedisBackend(url, **{n: v for n, v in options.items() if n in of_backend})
    return JournalStorage(backend, **{n: v for n, v in options.items() if n not in of_backend})


def _grpc_proxy(url: str, tls: bool, options: dict[str, Any]) -> BaseStorage:
    from trialstore.grpc import GrpcStorageProxy

    parts = urlsplit(url)
    if tls:
        options.setdefault("tls", True)
    return GrpcStorageProxy(
        host=parts.hostname or "localhost", port=parts.port or 13000, **options
    )
