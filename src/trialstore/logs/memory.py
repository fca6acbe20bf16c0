"""A list: the reference for every other log.

Replay judges, records are passed by reference, and nothing is synced. What every reader has seen
is dropped, so that a storage of its own does not hold each trial twice.
"""

from __future__ import annotations

from collections.abc import Sequence
import threading
from typing import Any
import weakref

from trialstore.errors import LogUnavailableError
from trialstore.log import START, Batch, Cursor, Wanted
from trialstore.records import AnyOperation, Record

_DROP_AT = 1024


class _Position:
    """A cursor whose life tells the log that somebody still has to read from there."""

    __slots__ = ("__weakref__", "number")

    def __init__(self, number: int) -> None:
        self.number = number


class MemoryLog:
    """Records in this process, for any number of storages.

    Args:
        records: What the log begins with.
        keep_all: Keep what every reader has seen, so that a new one may begin at ``START``.
    """

    def __init__(self, records: Sequence[Record] = (), *, keep_all: bool = True) -> None:
        self._records: list[Record] = list(records)
        self._first_number = 0  # how many records have been dropped
        self._keep_all = keep_all
        self._positions: weakref.WeakSet[_Position] = weakref.WeakSet()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        if self._first_number:
            raise LogUnavailableError(
                "A memory log that has dropped records can't be pickled; pickle its storage."
            )
        return {"_records": self._records, "_keep_all": self._keep_all}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_records"], keep_all=state["_keep_all"])  # type: ignore[misc]

    def exchange(self, records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``Log.exchange``."""
        with self._lock:
            self._records.extend(records)
            number = 0 if cursor is START else cursor.number
            if number < self._first_number:
                raise LogUnavailableError(
                    "The records before this position were dropped; open the log with "
                    "keep_all=True to let several storages read it from the start."
                )
            news = self._records[number - self._first_number :]
            if not news and cursor is not START:
                return Batch(None, news, cursor)
            position = _Position(number + len(news))
            self._positions.add(position)
            if not self._keep_all and len(self._records) >= _DROP_AT:
                self._drop_seen()
            return Batch(None, news, position)

    def _drop_seen(self) -> None:
        """Up to the slowest cursor that is still held; the caller's old one is among them."""
        slowest = min(position.number for position in self._positions)
        del self._records[: slowest - self._first_number]
        self._first_number = slowest

    def close(self) -> None:
        """Nothing is open."""
