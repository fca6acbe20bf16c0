"""One log for many clients: two ways, by who judges.

Where replay judges (journals), every client reads the same records: ``sequential.py``. Where the
log judges (tables), each answer is its client's own: ``judged.py``. Which way is found out by
asking the log, not by its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import logging
from typing import Any

from trialstore.log import (
    NOTHING,
    Batch,
    Compacted,
    ConditionalLog,
    Cursor,
    Decide,
    LeaseStore,
    Limited,
    Log,
    SnapshotStore,
    Wanted,
    copier,
)
from trialstore.logs.grpc.judged import JudgedShare
from trialstore.logs.grpc.payload import pack_cursor, unpack_cursor
from trialstore.logs.grpc.sequential import Note, SequentialShare, ignore
from trialstore.logs.grpc.share import Request, Share, unpacked
from trialstore.records import AnyOperation

_logger = logging.getLogger(__name__)


def share_of(
    log: Log,
    cursor: Cursor,
    copy_log: Callable[[], Log] | None,
    *,
    n_copies_max: int,
    note: Note = ignore,
) -> Share:
    """The way that suits a log; asks it for nothing and sees whether it would judge.

    Args:
        log: From now on used by the share alone.
        cursor: A position near the end.
        copy_log: Makes another handle on the same log; None leaves that to the log, and if it
            can't, clients take turns.
        n_copies_max: So many handles at most, the first included.
        note: Told of so many new records of a journal, for whoever saves snapshots of it.
    """
    batch = log.exchange((), cursor, NOTHING)
    if batch.outcomes is None:
        return SequentialShare(log, pack_cursor(batch.cursor), note)
    if copy_log is None:
        try:
            # Asked now, and not when a second client comes.
            copy_log = copier(log)
        except Exception as error:
            _logger.warning(
                "Clients take turns at %r, which can't be opened twice: %s", log, error
            )
            copy_log, n_copies_max = lambda: log, 1
    return JudgedShare(log, copy_log, n_copies_max=n_copies_max)


class ShareLog:
    """A share as a log again, for the storage whose log it was."""

    def __init__(self, share: Share) -> None:
        self._share = share
        log = share.log
        if isinstance(log, SnapshotStore):
            # On the instance: protocols that are checked at run time don't see __getattr__.
            self.__dict__["load_snapshot"] = lambda: share.alone(log.load_snapshot)
            self.__dict__["save_snapshot"] = log.save_snapshot
        if isinstance(log, Compacted):
            self.__dict__["load_base"] = lambda: share.alone(log.load_base)
        if isinstance(log, Limited):
            self.__dict__["check"] = log.check
        if isinstance(log, ConditionalLog):
            self.__dict__["exchange_if"] = self._exchange_if
        if isinstance(log, LeaseStore):
            for name in ("take_lease", "renew_lease", "withdraw_lease", "expired"):
                self.__dict__[name] = functools.partial(self._lease, name)
        self._leased: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self._share.log,)

    def __repr__(self) -> str:
        return f"ShareLog({self._share.log!r})"

    def exchange(self, records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``Log.exchange``."""
        leased = bool(self._leased) and any(one.worker_id in self._leased for one in records)
        answer = self._share.exchange(
            Request(list(records), pack_cursor(cursor), wanted, leased=leased)
        )
        return Batch(answer.outcomes, list(unpacked(answer.news)), unpack_cursor(answer.cursor))

    def close(self) -> None:
        """See ``Log.close``."""
        self._share.close()

    def _exchange_if(self, decide: Decide, cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``ConditionalLog``; others wait for the first handle meanwhile."""
        log: Any = self._share.log
        batch: Batch = self._share.alone(lambda: log.exchange_if(decide, cursor, wanted))
        return batch

    def _lease(self, name: str, *args: Any) -> Any:
        """See ``LeaseStore``."""
        if name == "take_lease":
            self._leased.add(args[0])
            return None
        if name == "withdraw_lease":
            self._leased.discard(args[0])
            return self._share.withdraw_lease(*args)
        return self._share.lease(lambda log: getattr(log, name)(*args))


def _same(log: Log) -> Log:
    return log
