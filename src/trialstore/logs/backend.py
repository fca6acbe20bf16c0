"""A journal backend of the user's own, Optuna's two methods, as a log.

``read_logs`` and ``append_logs`` are two round trips where a log has one; nothing can be done
about that without knowing what is behind them. For the same reason nothing is appended on a
condition, and leases are kept only where the backend keeps them itself, or is Optuna's on a file:
two methods have no clock, and a beat among the records would be there for ever.

Source: Optuna ``BaseJournalBackend``, ``BaseJournalSnapshot``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
import json
import os
from typing import Any, Final
import zlib

import msgspec
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.storages.journal._base import BaseJournalSnapshot

from trialstore.errors import (
    LogCorruptError,
    LogUnavailableError,
    OutcomeUnknownError,
    TrialstoreError,
)
from trialstore.log import START, Batch, Cursor, Entry, LeaseStore, Wanted
from trialstore.logs.beats import Beats
from trialstore.records import AnyOperation, from_journal_dict, to_journal_dict

# Optuna unpickles what it finds in a backend's snapshot, and survives only an UnpicklingError,
# which is what it gets for a first byte of 0xFF.
_MAGIC: Final = b"\xfftrialstore-backend-1\n"


class BackendLog:
    """Any ``BaseJournalBackend`` as a ``Log``; with ``SnapshotStore`` where it can keep ours.

    The cursor is the number of records read.

    Args:
        backend: The backend. Optuna's own work as well, without their snapshots, which are
            pickles that other workers share. One that has the methods of ``LeaseStore`` makes
            this log a ``LeaseStore``; it finds a record's owner in the field ``worker_id``.
    """

    def __new__(cls, backend: BaseJournalBackend) -> BackendLog:
        if cls is BackendLog and _keeps_foreign_snapshots(backend):
            cls = _SnapshotBackendLog
        return super().__new__(cls)

    def __init__(self, backend: BaseJournalBackend) -> None:
        self._backend = backend
        self._beats = _beats_beside(backend)
        leases = self._beats or backend
        if isinstance(leases, LeaseStore):
            # On the instance: only some have the capability, whatever their class.
            for name in ("take_lease", "renew_lease", "withdraw_lease", "expired"):
                setattr(self, name, getattr(leases, name))

    def __reduce__(self) -> tuple[Any, ...]:
        return (BackendLog, (self._backend,))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._backend!r})"

    def exchange(self, records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``Log.exchange``.

        Raises:
            LogUnavailableError: The backend could not be read; nothing was appended.
            OutcomeUnknownError: ``append_logs``, or the reading after it, failed.
            LogCorruptError: It returned something that is no record.
        """
        if records:
            if self._beats is not None:
                self._beats.cover(records)
            try:
                self._backend.append_logs([to_journal_dict(record) for record in records])
            except TrialstoreError:
                raise
            except Exception as error:
                raise OutcomeUnknownError(f"{self._name}: appending failed: {error!r}") from error
        number = 0 if cursor is START else int(cursor)
        news: list[AnyOperation] = []
        try:
            for fields in self._backend.read_logs(number):
                news.append(self._decode(fields, number + len(news)))
        except TrialstoreError:
            raise
        except Exception as error:
            message = f"{self._name}: reading failed: {error!r}"
            if records:
                raise OutcomeUnknownError(message) from error
            raise LogUnavailableError(message) from error
        return Batch(None, news, number + len(news))

    def entries(self) -> Iterator[Entry]:
        """See ``Entries``; raises whatever the backend raises where it can't read."""
        for number, fields in enumerate(self._backend.read_logs(0)):
            yield Entry(f"{self._name}, record {number}", json.dumps(fields).encode())

    def close(self) -> None:
        """Nothing to release: a backend has no method for it."""

    def _decode(self, fields: dict[str, Any], number: int) -> AnyOperation:
        try:
            return from_journal_dict(fields)
        except ValueError as error:
            raise LogCorruptError(str(error), source=self._name, record_number=number) from error

    @property
    def _name(self) -> str:
        return type(self._backend).__qualname__


class _SnapshotBackendLog(BackendLog):
    """A ``BackendLog`` that is also a ``SnapshotStore``."""

    _backend: Any

    def save_snapshot(self, make: Callable[[], tuple[bytes, Cursor] | None]) -> bool:
        """See ``SnapshotStore``; two may save at once here, and the later one stays."""
        made = make()
        if made is not None and made[1]:
            snapshot, cursor = made
            header = msgspec.msgpack.encode((cursor, self._digest(cursor), zlib.crc32(snapshot)))
            prefix = _MAGIC + len(header).to_bytes(4, "big") + header
            self._backend.save_snapshot(prefix + snapshot)
        return True

    def load_snapshot(self) -> tuple[bytes, Cursor] | None:
        """See ``SnapshotStore``; None also for bytes that are not ours, or of another journal."""
        stored = self._backend.load_snapshot()
        if not isinstance(stored, bytes) or not stored.startswith(_MAGIC):
            return None
        begin = len(_MAGIC) + 4
        end = begin + int.from_bytes(stored[len(_MAGIC) : begin], "big")
        try:
            cursor, digest, checksum = msgspec.msgpack.decode(
                stored[begin:end], type=tuple[int, int, int]
            )
        except msgspec.DecodeError:
            return None
        snapshot = stored[end:]
        if zlib.crc32(snapshot) != checksum or cursor < 1 or self._digest(cursor) != digest:
            return None
        return snapshot, cursor

    def _digest(self, number: int) -> int:
        """A checksum of the last record before ``number``; -1 if there is none."""
        logs: Iterable[dict[str, Any]] = self._backend.read_logs(number - 1)
        for fields in islice(logs, 1):
            return zlib.crc32(json.dumps(fields, sort_keys=True).encode())
        return -1


def _keeps_foreign_snapshots(backend: BaseJournalBackend) -> bool:
    """Whether ours may be put there; not where Optuna's code would put it beside its pickles."""
    return isinstance(backend, BaseJournalSnapshot) and not any(
        method.__module__.split(".")[0] == "optuna"
        for method in (type(backend).save_snapshot, type(backend).load_snapshot)
    )


def _beats_beside(backend: BaseJournalBackend) -> Beats | None:
    """Leases beside the file of Optuna's own backend, shared with our ``FileLog`` on it."""
    path = getattr(backend, "_file_path", None)
    if not isinstance(backend, JournalFileBackend) or not isinstance(path, str):
        return None
    return Beats(os.path.realpath(path))
