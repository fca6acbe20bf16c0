"""What a client asks of a log that it shares with others, what it gets, and who serves it.

A ``Share`` is made by ``sharing.share_of``; there are two kinds, ``sequential.py`` and
``judged.py``, by who judges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeVar

from trialstore.errors import LogUnavailableError
from trialstore.log import LeaseStore, Log, Mark, Wanted
from trialstore.logs.grpc.payload import Packed, payloads, unpack_records
from trialstore.records import AnyOperation, Outcome, Record

_T = TypeVar("_T")


class Request(NamedTuple):
    """What a client asks.

    Args:
        records: To be appended.
        cursor: Packed.
        wanted: As for ``Log.exchange``.
        again: An earlier attempt may have appended the records.
        is_alive: Whether the client still waits. What it has given up must not be appended
            later: it may be sending it again by now, elsewhere.
        leased: The client holds a lease, and what the records create or claim is to be covered.
        expected: Append only if the news after the cursor touch nothing that is wanted, or have
            this digest; None appends whatever is new.
        sender: Who counts its exchanges; empty if nobody does.
        number: Of this exchange; a repetition has the same.
    """

    records: list[AnyOperation]
    cursor: bytes
    wanted: Wanted
    again: bool = False
    is_alive: Callable[[], object] = lambda: True
    leased: bool = False
    expected: bytes | None = None
    sender: str = ""
    number: int = 0


class Answer(NamedTuple):
    """What it gets; ``outcomes`` is None where replay judges.

    Args:
        refused: Nothing was appended; the news are not those that were expected.
    """

    news: list[Packed]
    cursor: bytes
    outcomes: Sequence[Outcome] | None
    refused: bool = False


class Share(Protocol):
    """A log that any number of threads may use."""

    log: Log

    def exchange(self, request: Request) -> Answer:
        """As ``Log.exchange``, errors included."""
        ...

    def alone(self, work: Callable[[], _T]) -> _T:
        """Run something with ``log`` while nobody exchanges on it."""
        ...

    def lease(self, use: Callable[[LeaseStore], _T]) -> _T:
        """Renew leases, or look for what has expired; ``Request.leased`` takes a lease.

        Raises:
            ValueError: The log keeps no leases.
        """
        ...

    def withdraw_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``; raises as ``lease``."""
        ...

    def close(self) -> None: ...


def lease_store(log: Log) -> LeaseStore:
    """The log, which keeps leases. Raises ValueError if it doesn't."""
    if not isinstance(log, LeaseStore):
        raise ValueError("The server's storage keeps no leases: leave heartbeat_interval out.")
    return log


def unpacked(news: Sequence[Packed]) -> Iterator[Record]:
    """The records of an answer."""
    for run in news:
        for payload in payloads([run], 0):
            yield from unpack_records(payload)


def abandoned() -> LogUnavailableError:
    """What is raised for a client that does not wait any more."""
    return LogUnavailableError("The client gave up before its turn came; nothing was appended.")


@contextlib.contextmanager
def marked(
    log: Log, requests: Sequence[Request], known: Mapping[int, Outcome] = MappingProxyType({})
) -> Iterator[None]:
    """Have a log keep, with the records, what becomes of those of each client that counts.

    Args:
        log: Marks or not.
        requests: In the order in which their records are sent.
        known: See ``Mark``.
    """
    marks, begin = [], 0
    for one in requests:
        end = begin + len(one.records)
        if one.number and one.records:
            marks.append(Mark(one.sender, one.number, begin, end, known))
        begin = end
    # Not isinstance: a protocol with methods is slow to be checked, and this is every write.
    marking = getattr(log, "marking", None)
    if marks and marking is not None:
        with marking(marks):
            yield
    else:
        yield


@contextlib.contextmanager
def covered(log: Log, requests: Iterable[Request]) -> Iterator[None]:
    """A log that judges keeps leases by trial, and has to know of an owner's only for as long as
    it takes the records. So it matters to nobody which copy or server that is."""
    owners = {one.records[0].worker_id for one in requests if one.leased and one.records}
    for owner in owners:
        lease_store(log).take_lease(owner)
    try:
        yield
    finally:
        for owner in owners:
            lease_store(log).withdraw_lease(owner, ())
