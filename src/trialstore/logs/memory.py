"""A list: the reference for every other log.

Replay judges, records are passed by reference, and nothing is synced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import threading
from typing import Any

from trialstore.clock import CLOCK, Clock
from trialstore.log import START, Batch, Cursor, Decide, Wanted
from trialstore.records import AnyOperation, Record, owners_of_started


class MemoryLog:
    """Records in this process, for any number of storages.

    Args:
        records: What the log begins with.
        clock: What leases expire by; for tests to replace.
    """

    def __init__(self, records: Sequence[Record] = (), *, clock: Clock = CLOCK) -> None:
        self._records: list[Record] = list(records)
        self._clock = clock
        self._renewed_s: dict[str, float] = {}  # owner to when its lease was last renewed
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # Without leases: their owners are not in the process that unpickles.
        return {"records": self._records, "clock": self._clock}

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
        number = 0 if cursor is START else cursor
        return Batch(None, self._records[number:], len(self._records))

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
                if owner in self._renewed_s and now_s - self._renewed_s[owner] > grace_period_s
            ]
