"""What a log is: a place that keeps records, and tells what is new, in one round trip.

``Log`` is two methods. What only some logs can do stands beside it, each as a protocol of its
own; a log that can't simply lacks the method. A log imports records, never the replica, and
never another log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
import pickle
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol, cast, runtime_checkable

import msgspec

from trialstore.findings import Finding
from trialstore.records import AnyOperation, CreateTrial, Outcome, PutTrial, Record, Verdict

Cursor = Any
"""Position after the last record applied; opaque outside its log; ``START`` is before the first.

A cursor is an immutable value that msgpack can carry. Where a log answers less than everything,
its cursor also records what has been covered, so that a narrow read never skips what a later,
wider one needs.
"""

START: Cursor = None

_NONE: frozenset[Any] = frozenset()

NEXT_MIN: Final = 32
"""So many WAITING trials are those that a worker looks at: the first, and those after it that it
tries while other workers are quicker. The whole queue may be thousands."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer of an exchange must cover; it may cover more. ``a | b`` covers both.

    After the news are applied, the replica says the truth about what was wanted, as of a moment
    after the exchange began. Whatever names a study or trial covers also that it does not exist.

    Args:
        catalogue: Every study, without trials.
        studies: Ids of studies: name, directions, attributes.
        names: Names of studies, likewise.
        trials_of: Ids of studies: the study and all of its trials.
        finished_of: Ids of studies: the study and those of its trials that are finished.
        waiting_of: Ids of studies: the study and which of its trials are WAITING.
        next_of: Ids of studies: the study and the first ``NEXT_MIN`` of its WAITING trials, by id.
        trials: Ids of trials.
        numbers: Pairs (study id, trial number): that trial.
        params: Pairs (study id, parameter name): the distribution that later uses of the name
            must be compatible with. A ``SetTrialParam`` in the same exchange whose pair is in
            here is judged for compatibility; others are known to be compatible.
    """

    catalogue: bool = False
    studies: frozenset[int] = _NONE
    names: frozenset[str] = _NONE
    trials_of: frozenset[int] = _NONE
    finished_of: frozenset[int] = _NONE
    waiting_of: frozenset[int] = _NONE
    next_of: frozenset[int] = _NONE
    trials: frozenset[int] = _NONE
    numbers: frozenset[tuple[int, int]] = _NONE
    params: frozenset[tuple[int, str]] = _NONE

    def __or__(self, other: Wanted) -> Wanted:
        if other is NOTHING or other is self:
            return self
        if self is NOTHING:
            return other
        return Wanted(
            catalogue=self.catalogue or other.catalogue,
            studies=self.studies | other.studies,
            names=self.names | other.names,
            trials_of=self.trials_of | other.trials_of,
            finished_of=self.finished_of | other.finished_of,
            waiting_of=self.waiting_of | other.waiting_of,
            next_of=self.next_of | other.next_of,
            trials=self.trials | other.trials,
            numbers=self.numbers | other.numbers,
            params=self.params | other.params,
        )


NOTHING = Wanted()


class Batch(msgspec.Struct, frozen=True):
    """The answer of an exchange.

    Args:
        outcomes: One per appended record, where the log judges; None where replay does, and then
            every appended record is among the news, known by its ``worker_id`` and ``seq``.
        news: The new records in log order. A log that judges adds the image of every trial that
            the appended records created or claimed, and may say what they did to others by the
            records themselves.
        cursor: Position after ``news``.
        more: There is more than an answer should hold; exchange again from ``cursor``, until
            there is not, to know the truth about what was wanted. Never where records were sent.
    """

    outcomes: Sequence[Outcome] | None
    news: Sequence[Record]
    cursor: Cursor
    more: bool = False


class Log(Protocol):
    """An ordered sequence of records.

    A log may be used by one thread at a time. It is usable in a forked child without further
    ado: it notices the new process by itself, opens what it needs anew, and neither uses nor
    closes what it inherited. Pickled, it carries its address, not its connections.
    """

    def exchange(self, records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        """Append ``records`` and return what is new after ``cursor``, in one round trip.

        Args:
            records: 0 or more operations, in order, all or none appended; durable on return if
                ``must_be_durable`` says so.
            cursor: Position after the last record applied; ``START`` reads all.
            wanted: What the answer must cover at least.

        Returns:
            Outcomes, news and the new cursor. The old cursor stays valid.

        Raises:
            LogUnavailableError: Not reached, nothing appended; safe to retry.
            OutcomeUnknownError: Appended or not, and the mark can't be read.
            LogCorruptError: Undecodable bytes before the tail, with their offset.
            ValueError: A record holds what this log can't keep; nothing was appended.
        """
        ...

    def close(self) -> None:
        """Release connections and files; a later exchange opens them again."""
        ...


@runtime_checkable
class Copyable(Protocol):
    """A log that makes other handles on its store itself, also where it can't be pickled."""

    def copier(self) -> Callable[[], Log]:
        """What makes another handle, for another thread. Raises ValueError if there can be one
        only."""
        ...


def copier(log: Log) -> Callable[[], Log]:
    """What makes other handles on a log's store, in this process.

    Raises:
        Exception: There can be one only, or the log would have to be pickled and can't.
    """
    if isinstance(log, Copyable):
        return log.copier()
    pickled = pickle.dumps(log)
    return lambda: cast(Log, pickle.loads(pickled))


@runtime_checkable
class Limited(Protocol):
    """A log that can't hold every value, and says so without a round trip."""

    def check(self, records: Sequence[AnyOperation]) -> None:
        """Raises ValueError for a record that can't be kept, saying what to do instead."""
        ...


class Summary(msgspec.Struct, frozen=True):
    """What a catalogue says of a study that has trials.

    Args:
        counts: State to number of trials; states without trials may be missing.
        datetime_start: When the first of its trials began; None if none did.
        datetime_complete: When the last of them ended, likewise.
        best_trial_id: As ``Catalogue.best_trial_id``; None with several objectives.
    """

    counts: Mapping[int, int]
    datetime_start: str | None
    datetime_complete: str | None
    best_trial_id: int | None


@runtime_checkable
class Catalogue(Protocol):
    """A log that can answer about studies without handing out their trials.

    Each is one round trip, and as true as an exchange that began with the call.
    """

    def counts(self, study_id: int) -> Mapping[int, int] | None:
        """State to number of trials, as in ``Summary``; None for a study that does not exist."""
        ...

    def best_trial_id(self, study_id: int, maximize: bool) -> int | None:
        """Id of the COMPLETE trial with the best first value, the oldest of equals, if any."""
        ...

    def summaries(self, study_id: int | None = None) -> Mapping[int, Summary]:
        """The study, or every one, by its id, if it has trials."""
        ...


@runtime_checkable
class Versioned(Protocol):
    """A log whose store has a schema, which has versions."""

    def get_current_version(self) -> str:
        """The version of the store as it is. Raises IncompatibleSchemaError if it has none."""
        ...

    def get_head_version(self) -> str:
        """The version that this log works on."""
        ...

    def get_all_versions(self) -> Sequence[str]:
        """All versions that there ever were, newest first."""
        ...

    def upgrade(self) -> None:
        """Bring the store to the latest version; interrupted, it may be called again.

        Raises:
            IncompatibleSchemaError: There is nothing to upgrade, or it is of a newer version.
        """
        ...


class Piecewise(Protocol):
    """A log that can set alone what is part of one operation since Optuna 3."""

    def set_directions(self, study_id: int, directions: Sequence[int]) -> Verdict:
        """Directions of a study whose directions are NOT_SET; INCOMPATIBLE if it has others."""
        ...

    def set_values(self, trial_id: int, values: Sequence[float]) -> Verdict:
        """Values of an unfinished trial, whose state stays as it is."""
        ...


@runtime_checkable
class SnapshotStore(Protocol):
    """A log that can keep one snapshot of a replica beside its records.

    The store keeps and returns bytes; ``snapshot.py`` gives them their meaning. Losing a snapshot
    loses nothing but time.
    """

    def save_snapshot(self, make: Callable[[], tuple[bytes, Cursor] | None]) -> bool:
        """Replace the stored snapshot, atomically, by what ``make`` returns.

        ``make`` runs while no other process saves one, and returns the bytes and the position
        that they are at, or None to leave things as they are.

        Returns:
            False, without calling ``make``, while somebody else is saving one.
        """
        ...

    def load_snapshot(self) -> tuple[bytes | memoryview, Cursor] | None:
        """The stored snapshot and its cursor; None if there is none that belongs to this log."""
        ...


@runtime_checkable
class Followable(Protocol):
    """A log whose cursors say for each study how far it was followed, and can be put together.

    So somebody who has read a study once can hand it to others, and have them go on from there.
    """

    def is_unread(self, cursor: Cursor, study_id: int) -> bool:
        """Whether a cursor covers no trial of a study."""
        ...

    def joined(self, cursor: Cursor, other: Cursor, study_id: int) -> Cursor | None:
        """``cursor``, which has not read a study, with what ``other`` covers of it; None if they
        do not go together."""
        ...


@runtime_checkable
class Combinable(Protocol):
    """A log that judges, and takes the records of several callers in one exchange, at a cursor of
    none of them: that it accepts or refuses a record does not depend on the cursor. Both methods
    are about cursors alone, and for any thread."""

    def study_at(self, cursor: Cursor) -> int | None:
        """The study that a cursor knows, if it knows one alone; None also where a record is
        judged by what the cursor says."""
        ...

    def tell_the_same(self, cursor: Cursor, other: Cursor, study_id: int) -> bool:
        """Whether whoever is at one of two cursors has been told the same of a study and of
        which of its trials are WAITING; False if it can't be said."""
        ...


class Mark(NamedTuple):
    """A caller's records among those of an exchange.

    Args:
        caller: Who has sent them.
        number: Of the caller's exchange; a later one has a greater number, a repetition the same.
        begin: Where they begin among the records.
        end: Where they end.
        known: Outcomes, by ``seq``, of records of this exchange that an earlier one has appended.
    """

    caller: str
    number: int
    begin: int
    end: int
    known: Mapping[int, Outcome] = MappingProxyType({})


class MarkTakenError(Exception):
    """An exchange of a caller's with this number, or a later one, is in the log; nothing was
    appended."""


@runtime_checkable
class Marking(Protocol):
    """A log that judges, and keeps with the records what became of each caller's.

    So that whoever passes on the records of others can tell, after a crash or in another
    process, whether they have been appended, and with what outcome. No two callers' records of an
    exchange may touch the same trial.
    """

    def marking(self, marks: Sequence[Mark]) -> AbstractContextManager[None]:
        """While entered, exchanges keep these marks, in the same transaction.

        They raise MarkTakenError where one of them is taken.
        """
        ...

    def recall(
        self, caller: str, number: int, records: Sequence[AnyOperation]
    ) -> dict[int, Outcome] | None:
        """Outcomes, by index, of those records that the caller's last exchange has appended; None
        if there is no place to keep them.

        It waits for an exchange of the caller's that is under way, and one with a lesser number
        can't be appended from now on.
        """
        ...


Decide = Callable[[Sequence[Record], Cursor], Sequence[AnyOperation]]
"""Given the news and the cursor after them, the operations to append; none leaves the log alone.

It may be called again, with the news since its last call; what it returned before is then void.
"""


@runtime_checkable
class ConditionalLog(Protocol):
    """A log that can append on the condition that its caller has seen everything before."""

    def exchange_if(self, decide: Decide, cursor: Cursor, wanted: Wanted) -> Batch:
        """Append what ``decide`` says, with nothing between what it was told and its records.

        "Nothing" that changes the truth about ``wanted``; a log may be stricter. Where exclusion
        is cheap, ``decide`` runs once, inside it; elsewhere the append is tried and, if somebody
        came between, ``decide`` runs again with what is new.

        Returns:
            As ``exchange``, of what followed the news that ``decide`` saw last; without records
            to append, outcomes are empty.

        Raises:
            As ``exchange``; whatever ``decide`` raises, with nothing appended.
        """
        ...


@runtime_checkable
class LeaseStore(Protocol):
    """A log that knows which workers are alive, by its own clock, never by a worker's.

    A *lease* is a worker's claim on the trials that it runs. A journal keeps one per owner (the
    ``worker_id`` of a trial's creator or claimer), tables keep Optuna's heartbeat per trial. A
    trial that was never covered by a lease is never stale.
    """

    def take_lease(self, owner: str) -> None:
        """From now on every trial that ``owner`` creates or claims here is covered from its
        first moment: the lease is kept before, or together with, that record."""
        ...

    def renew_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """Say, in one message, that ``owner`` lives and runs ``trial_ids``; those that are not
        RUNNING any more are passed over."""
        ...

    def withdraw_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """Cover nothing any more, at an orderly end; the trials are then not stale either."""
        ...

    def expired(
        self, study_id: int, running: Mapping[int, str], grace_period_s: float
    ) -> Sequence[int]:
        """RUNNING trials of a study whose lease was not renewed for ``grace_period_s``.

        Args:
            study_id: Where to look.
            running: Trial id to owner of what the replica holds RUNNING, "" where unknown; a log
                that keeps leases by trial may look for itself instead.
            grace_period_s: By the log's clock. A negative one asks for all that are covered.
        """
        ...


@runtime_checkable
class Audible(Protocol):
    """A log that notices, for less than an exchange, that somebody has written to it."""

    def listening(self) -> AbstractContextManager[Callable[[float], None]]:
        """While entered, what waits for a write.

        It takes the longest time to wait, in seconds, and returns sooner if anything was written
        since it was last called. It may be called while another thread uses the log, and raises
        nothing: whoever waits looks for himself afterwards.
        """
        ...


class Overview(NamedTuple):
    """A study in a line.

    Args:
        counts: State to number of trials, of those states that have any.
        best: The COMPLETE trial with the best first value, if there is one.
        first_at: The earliest start, as text of a record.
        last_at: The latest completion.
        running: For ``LeaseStore.expired``, where the log does not look for itself.
    """

    counts: Mapping[int, int]
    best: PutTrial | None
    first_at: str | None
    last_at: str | None
    running: Mapping[int, str] = MappingProxyType({})


@runtime_checkable
class Paged(Protocol):
    """A log that can show a part of a study, so that who reads it once need not hold it."""

    def page(self, study_id: int, above: int, count_max: int) -> Sequence[PutTrial]:
        """Images of the trials with the least ids above ``above``, in order of id; none at the
        end. It moves no cursor, and each page is of a moment of its own."""
        ...

    def overview(self, study_id: int, maximize: bool) -> Overview:
        """What there is to say of a study without its trials."""
        ...


@runtime_checkable
class Bulk(Protocol):
    """A log that takes many whole trials faster than an exchange does."""

    def load_trials(self, records: Sequence[CreateTrial], number: int, above: int) -> int:
        """Write trials of one study, all or none, the first with ``number``; durable on return.

        Args:
            records: At least one, of one study that nobody else writes to.
            number: Of the first; the study's trials end below it.
            above: What the last call for the study returned, or 0.

        Returns:
            Something for the next call.

        Raises:
            As ``Log.exchange``; KeyError if there is no such study, ValueError if it has others'
            trials. A call that raised may be repeated.
        """
        ...


class Entry(NamedTuple):
    """A record of a journal as its bytes are, before anybody has tried to read them.

    Args:
        where: For a person to find it.
        data: Without the newline; None where there should be one and is none.
        ended: Whether a newline follows; always where records are no lines.
    """

    where: str
    data: bytes | None
    ended: bool = True


@runtime_checkable
class Entries(Protocol):
    """A sequential log that can be read past a damage; it takes no lock and repairs nothing."""

    def entries(self) -> Iterator[Entry]:
        """Every record's bytes, from the first on."""
        ...


@runtime_checkable
class Inspectable(Protocol):
    """A log that knows what can be wrong with its own format."""

    def findings(self, *, deep: bool) -> Iterator[Finding]:
        """What is wrong, beside what ``Entries`` shows.

        Args:
            deep: Also what takes a reading of everything.
        """
        ...


@runtime_checkable
class Described(Protocol):
    """A log that can say what it is."""

    def facts(self) -> dict[str, Any]:
        """``kind``, ``address`` (without secrets), ``size_bytes`` where known, and what else is
        worth knowing of this kind; JSON values."""
        ...


class Marks(msgspec.Struct, frozen=True, array_like=True):
    """What became of the records of one storage, for those of them that it may send again.

    Args:
        applied: First and last ``seq``, in order, of every run of records that are in the log.
        created: ``seq`` to the id of what it created; of the latest ones only.
        refused: ``seq`` to its ``Verdict``, where that is not ACCEPTED; likewise.
    """

    applied: list[tuple[int, int]]
    created: dict[int, int] = {}
    refused: dict[int, int] = {}

    def outcomes(self) -> dict[int, Outcome]:
        """By ``seq``."""
        return {
            seq: Outcome(Verdict(self.refused.get(seq, 0)), self.created.get(seq, -1))
            for first, last in self.applied
            for seq in range(first, last + 1)
        }


class Base(msgspec.Struct, frozen=True):
    """What stands in a journal for the records that were compacted or trimmed away.

    Args:
        marks: By ``worker_id``.
        snapshot: What the records before ``cursor`` came to, if they are gone.
        cursor: Where the records begin; ``START`` without a snapshot.
    """

    marks: Mapping[str, Marks]
    snapshot: bytes | memoryview | None = None
    cursor: Cursor = START


class Compaction(msgspec.Struct, frozen=True):
    """What is to take the place of the records before a cursor.

    Args:
        lines: Journal lines without their newlines, or, for a trim, one snapshot.
        cursor: Position after the last record that they stand for.
        marks: By ``worker_id``, of the records that they stand for.
    """

    lines: Iterable[bytes]
    cursor: Cursor
    marks: Mapping[str, Marks]


@runtime_checkable
class Compacted(Protocol):
    """A journal whose first records may have been compacted or trimmed away, by whomever."""

    def load_base(self) -> Base:
        """What a reader of everything begins with."""
        ...


@runtime_checkable
class CompactableLog(Compacted, Protocol):
    """A journal in which fewer records can take the place of many."""

    def compact(self, make: Callable[[], Compaction]) -> None:
        """Replace the records before a cursor, atomically, by the lines that ``make`` returns.

        Records after the cursor stay as they are, also those that come while this runs. ``make``
        runs while no other process compacts; nobody waits for it. Whoever has read up to the
        cursor or further goes on without noticing; others get ``LogCompactedError``.

        Raises:
            CompactionRefusedError: It can't be done atomically where this journal is kept.
            LogUnavailableError: Somebody else compacts it, or it can't be written.
        """
        ...


@runtime_checkable
class TrimmableLog(Protocol):
    """A journal whose first records can be given up for a snapshot."""

    def trim(self, make: Callable[[], Compaction]) -> None:
        """Remove the records before a cursor and keep a snapshot of what they came to.

        Raises:
            As ``CompactableLog.compact``.
        """
        ...
