"""A list: the reference for every other log.

Replay judges, records are passed by reference, and nothing is synced. What every reader has seen
is dropped, so that a storage of its own does not hold each trial twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import threading
from typing import Any
import weakref

from trialstore.clock import CLOCK, Clock
from trialstore.errors import LogUnavailableError
from trialstore.log import START, Batch, Cursor, Decide, Wanted
from trialstore.records import AnyOperation, Record, owners_of_started

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
        clock: What leases expire by; for tests to replace.
    """

    def __init__(
        self, records: Sequence[Record] = (), *, keep_all: bool = True, clock: Clock = CLOCK
    ) -> None:
        self._records: list[Record] = list(records)
        self._first_number = 0  # how many records have been dropped
        self._keep_all = keep_all
        self._positions: weakref.WeakSet[_Position] = weakref.WeakSet()
        self._clock = clock
        self._renewed_s: dict[str, float] = {}  # owner to when its lease was last renewed
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        if self._first_number:
            raise LogUnavailableError(
                "A memory log that has dropped records can't be pickled; pickle its storage."
            )
        # Without leases: their owners are not in the process that unpickles.
        return {"records": self._records, "keep_all": self._keep_all, "clock": self._clock}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def exchange(self, records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``Log.exchange``."""
        with self._lock:
            self._append(records)
            return self._read(cursor)

    def exchange_if(self, decide: Decide, cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``ConditionalLog``; ``decide`` runs once, and must not use this log."""
        with self._lock:
            seen = self._read(cursor)
            self._append(decide(seen.news, seen.cursor))
            return self._read(seen.cursor)

    def _append(self, records: Sequence[AnyOperation]) -> None:
        self._records.extend(records)
        if self._renewed_s:
            now_s = self._clock.now_s()
            for owner in owners_of_started(records) & self._renewed_s.keys():
                self._renewed_s[owner] = now_s

    def _read(self, cursor: Cursor) -> Batch:
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

    # --- leases ----------------------------------------------------------------------------------

    def take_lease(self, owner: str) -> None:
        """See ``LeaseStore``."""
        with self._lock:
            self._renewed_s[owner] = self._clock.now_s()

    def renew_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``; the lease is the owner's, whichever trials it runs."""
        with self._lock:
            self._renewed_s[owner] = self._clock.now_s()

    def withdraw_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``."""
        with self._lock:
            self._renewed_s.pop(owner, None)

    def expired(
        self, study_id: int, running: Mapping[int, str], grace_period_s: float
    ) -> Sequence[int]:
        """See ``LeaseStore``."""
        with self._lock:
            now_s = self._clock.now_s()
            return [
                trial_id
                for trial_id, owner in running.items()
                if now_s - self._renewed_s.get(owner, now_s) > grace_period_s
            ]
