"""One log for many clients: two ways, by who judges.

Where replay judges (journals), every client reads the same records, so that one thread at a time
exchanges for all who wait (group commit), and what is new is packed once, into a *tail* that
answers every cursor in it. Where the log judges (tables), each answer is its client's own; clients
run side by side on copies of the log.

*A write is applied once.* A client that got no answer sends the same records again, marked as
``again``; their marks (``worker_id``, ``seq``) tell whether they are there. On a journal they are
found among the news, whichever server appended them. Where the log judges, this process remembers
the outcomes of each client's last exchange, and after a restart what the log shows decides
(``settle.py``).

What a crash leaves: a journal's records are in it or not; this process keeps nothing but copies
and the outcomes just mentioned.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import functools
from itertools import islice
import threading
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from trialstore.errors import LogCompactedError, LogUnavailableError, OutcomeUnknownError
from trialstore.log import (
    NOTHING,
    START,
    Batch,
    CompactableLog,
    ConditionalLog,
    Cursor,
    Decide,
    Followable,
    LeaseStore,
    Limited,
    Log,
    SnapshotStore,
    Wanted,
)
from trialstore.logs.grpc import settle
from trialstore.logs.grpc.payload import (
    Packed,
    digest,
    pack,
    pack_cursor,
    payloads,
    unpack_cursor,
    unpack_records,
)
from trialstore.records import (
    AnyOperation,
    CreateStudy,
    CreateTrial,
    DeleteStudy,
    Operation,
    Outcome,
    Record,
    SetTrialStateValues,
)

_T = TypeVar("_T")

_TAIL_BYTES_MAX: Final = 32 << 20
_TAIL_RUNS_MAX: Final = 50_000  # each costs some 400 bytes beside its records
# Of studies that clients have opened, packed; some 600 bytes a trial.
_OPENINGS_BYTES_MAX: Final = 64 << 20
# Of outcomes, over all clients: each has one exchange at a time, seldom of more than ten records.
_REMEMBERED_MAX: Final = 100_000

_Mark = tuple[str, int]


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
    """

    records: list[AnyOperation]
    cursor: bytes
    wanted: Wanted
    again: bool = False
    is_alive: Callable[[], object] = lambda: True
    leased: bool = False
    expected: bytes | None = None


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


def _lease_store(log: Log) -> LeaseStore:
    if not isinstance(log, LeaseStore):
        raise ValueError("The server's storage keeps no leases: leave heartbeat_interval out.")
    return log


class ShareLog:
    """A share as a log again, for the storage whose log it was."""

    def __init__(self, share: Share) -> None:
        self._share = share
        log = share.log
        if isinstance(log, SnapshotStore):
            # On the instance: protocols that are checked at run time don't see __getattr__.
            self.__dict__["load_snapshot"] = lambda: share.alone(log.load_snapshot)
            self.__dict__["save_snapshot"] = log.save_snapshot
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
        return Batch(answer.outcomes, list(_unpack(answer.news)), unpack_cursor(answer.cursor))

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


def _ignore(n_records: int) -> None:
    """Nobody counts."""


def share_of(
    log: Log,
    cursor: Cursor,
    copy_log: Callable[[], Log],
    *,
    n_copies_max: int,
    note: Callable[[int], None] = _ignore,
) -> Share:
    """The way that suits a log; asks it for nothing and sees whether it would judge.

    Args:
        log: From now on used by the share alone.
        cursor: A position near the end.
        copy_log: Makes another handle on the same log.
        n_copies_max: So many handles at most, the first included.
        note: Told of so many new records of a journal, for whoever saves snapshots of it.
    """
    batch = log.exchange((), cursor, NOTHING)
    if batch.outcomes is None:
        return SequentialShare(log, pack_cursor(batch.cursor), note)
    return JudgedShare(log, copy_log, n_copies_max=n_copies_max)


def _mark(record: AnyOperation) -> _Mark:
    return record.worker_id, record.seq


def _abandoned() -> LogUnavailableError:
    return LogUnavailableError("The client gave up before its turn came; nothing was appended.")


# --- replay judges -------------------------------------------------------------------------------


class _Call:
    __slots__ = ("answer", "done", "error", "refused", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        self.refused = False
        self.done = False


class SequentialShare:
    """Group commit and a shared tail over a log whose records are the same for all.

    Args:
        log: Used by one thread at a time, and by nobody else.
        head: A packed position that the tail begins at.
        note: See ``share_of``.
    """

    def __init__(self, log: Log, head: bytes, note: Callable[[int], None] = _ignore) -> None:
        self.log = log
        self._note = note
        self._turn = threading.Condition()
        self._gathered: list[_Call] = []
        self._leads = False
        self._tail = _Tail(head)
        self._last_seq: OrderedDict[str, int] = OrderedDict()
        self._leased: set[str] = set()

    def exchange(self, request: Request) -> Answer:
        """See ``Share``."""
        call = _Call(request)
        with self._turn:
            self._gathered.append(call)
            while self._leads and not call.done:
                self._turn.wait()
            if call.done:
                return _result(call)
            self._leads = True
            calls, self._gathered = self._gathered, []
        try:
            self._lead(calls)
        except BaseException as error:
            for other in calls:
                if other.answer is None and other.error is None:
                    other.error = error
        finally:
            with self._turn:
                for other in calls:
                    other.done = True
                self._leads = False
                self._turn.notify_all()
        return _result(call)

    def alone(self, work: Callable[[], _T]) -> _T:
        """See ``Share``."""
        with self._turn:
            while self._leads:
                self._turn.wait()
            self._leads = True
        try:
            return work()
        finally:
            with self._turn:
                self._leads = False
                self._turn.notify_all()

    def lease(self, use: Callable[[LeaseStore], _T]) -> _T:
        """See ``Share``."""
        return self.alone(lambda: use(_lease_store(self.log)))

    def withdraw_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``Share``."""

        def withdraw(log: LeaseStore) -> None:
            self._leased.discard(owner)
            log.withdraw_lease(owner, trial_ids)

        self.lease(withdraw)

    def close(self) -> None:
        self.alone(self.log.close)

    def _lead(self, calls: list[_Call]) -> None:
        """One exchange for all; then what has to be looked for first; then everybody's news."""
        fresh: list[_Call] = []
        alone: list[_Call] = []
        for call in calls:
            if call.request.records:
                doubtful = self._is_doubtful(call) or call.request.expected is not None
                (alone if doubtful else fresh).append(call)
        self._append(fresh)
        for call in alone:
            try:
                self._append_what_is_missing(call)
            except Exception as error:
                call.error = error
        for call in calls:
            if call.error is None:
                try:
                    news, cursor = self._since(call.request.cursor)
                    call.answer = Answer(news, cursor, None, call.refused)
                except Exception as error:
                    call.error = error

    def _is_doubtful(self, call: _Call) -> bool:
        """Whether records may be in the log already: said to be, or late to arrive."""
        request = call.request
        first, last = request.records[0], request.records[-1]
        before = self._last_seq.get(first.worker_id, -1)
        self._last_seq[first.worker_id] = max(before, last.seq)
        self._last_seq.move_to_end(first.worker_id)
        if len(self._last_seq) > _REMEMBERED_MAX:
            self._last_seq.popitem(last=False)
        return request.again or first.seq <= before

    def _append(self, calls: list[_Call]) -> None:
        """One exchange for the records of all calls; without any it looks for others' records."""
        alive = []
        for call in calls:
            if call.request.is_alive():
                alive.append(call)
            else:
                call.error = _abandoned()
        records = [record for call in alive for record in call.request.records]
        try:
            for call in alive:
                self._cover(call.request)
            self._advance(records)
        except (LogUnavailableError, OutcomeUnknownError) as error:
            for call in alive:
                call.error = error
            if not alive:
                raise
        except Exception as error:
            if len(alive) <= 1:
                for call in alive:
                    call.error = error
                if not alive:
                    raise
                return
            for call in alive:  # whose it is does not matter to the others
                self._append([call])

    def _advance(self, records: Sequence[AnyOperation]) -> None:
        try:
            self._extend_tail(records)
        except LogCompactedError:
            # The tail leads nowhere any more, and nothing was appended. A client who has read
            # further than it goes on from there, the others are told to read anew.
            base = self.log.load_base() if isinstance(self.log, CompactableLog) else None
            head = pack_cursor(START if base is None else base.cursor)
            for _, end in self._portions((), head):
                head = end
            self._tail = _Tail(head)
            self._extend_tail(records)

    def _extend_tail(self, records: Sequence[AnyOperation]) -> None:
        for news, end in self._portions(records, self._tail.head):
            self._tail.add(news, end)
            self._note(sum(run.n_records for run in news))

    def _portions(
        self, records: Sequence[AnyOperation], cursor: bytes
    ) -> Iterator[tuple[list[Packed], bytes]]:
        """An exchange, and those that a long answer takes after it: news, and where they end."""
        more = True
        while more:
            batch = self.log.exchange(records, unpack_cursor(cursor), NOTHING)
            records, cursor, more = (), pack_cursor(batch.cursor), batch.more
            yield pack(batch.news), cursor

    def _append_what_is_missing(self, call: _Call) -> None:
        request = call.request
        self._advance(())
        wanted = {_mark(record) for record in request.records}
        for record in _unpack(self._since(request.cursor)[0]):
            if isinstance(record, Operation):
                wanted.discard((record.worker_id, record.seq))
        missing = [record for record in request.records if _mark(record) in wanted]
        if missing:
            if not request.is_alive():
                raise _abandoned()
            self._cover(request)
            if request.expected is None:
                self._advance(missing)
            else:
                call.refused = not self._append_if(missing, request)

    def _cover(self, request: Request) -> None:
        """Have the log know of the client's lease before it takes its records."""
        if not request.leased:
            return
        owner = request.records[0].worker_id
        if owner not in self._leased:
            _lease_store(self.log).take_lease(owner)
            self._leased.add(owner)

    def _append_if(self, records: Sequence[AnyOperation], request: Request) -> bool:
        """Whether nothing that touches what is wanted has come after the client's cursor."""
        head = unpack_cursor(self._tail.head)
        appended: Sequence[AnyOperation] = ()

        def decide(news: Sequence[Record], cursor: Cursor) -> Sequence[AnyOperation]:
            nonlocal appended
            self._tail.add(pack(news), pack_cursor(cursor))
            newer = self._tail.since(request.cursor)
            refused = newer is None or (
                digest(newer) != request.expected and _touch(_unpack(newer), request.wanted)
            )
            appended = () if refused else records
            return appended

        if isinstance(self.log, ConditionalLog):
            batch = self.log.exchange_if(decide, head, request.wanted)
            self._tail.add(pack(batch.news), pack_cursor(batch.cursor))
        else:
            # Two methods of a backend: nobody comes between who goes through this server.
            self._advance(())
            if decide((), unpack_cursor(self._tail.head)):
                self._advance(records)
        return bool(appended)

    def _since(self, cursor: bytes) -> tuple[list[Packed], bytes]:
        news = self._tail.since(cursor)
        if news is not None:
            return news, self._tail.head
        # Older than the tail, or from another server that read in other portions: read for this
        # client alone, and hope to meet the tail's head.
        missed: list[Packed] = []
        end = cursor
        for portion, reached in self._portions((), cursor):
            missed += portion
            end = reached
        if end != self._tail.head:
            self._advance(())
        return missed, end


def _unpack(news: Sequence[Packed]) -> Iterator[Record]:
    for run in news:
        for payload in payloads([run], 0):
            yield from unpack_records(payload)


def _touch(news: Iterable[Record], wanted: Wanted) -> bool:
    """Whether records may change the truth about what is wanted."""
    studies = {
        *wanted.studies,
        *wanted.trials_of,
        *wanted.waiting_of,
        *(study_id for study_id, _ in wanted.numbers),
    }
    # Nothing here knows the study of a trial; any may be of one that is wanted.
    any_trial = bool(wanted.trials_of or wanted.waiting_of or wanted.numbers or wanted.params)
    for record in news:
        if isinstance(record, (CreateStudy, DeleteStudy)):
            return True
        if any_trial or getattr(record, "trial_id", None) in wanted.trials:
            return True
        if getattr(record, "study_id", None) in studies:
            return True
    return False


def _result(call: _Call) -> Answer:
    if call.error is not None:
        raise call.error
    assert call.answer is not None
    return call.answer


class _Tail:
    """The last records, packed, by the positions that answers ended at."""

    def __init__(self, head: bytes) -> None:
        self.head = head
        self._runs: deque[tuple[bytes, list[Packed]]] = deque()  # with the position before them
        self._numbers: dict[bytes, int] = {}  # position -> number of the run after it
        self._first = 0
        self._n_bytes = 0

    def add(self, news: list[Packed], head: bytes) -> None:
        if head == self.head:
            return
        self._numbers[self.head] = self._first + len(self._runs)
        self._runs.append((self.head, news))
        self._n_bytes += sum(run.size for run in news)
        self.head = head
        while self._n_bytes > _TAIL_BYTES_MAX or len(self._runs) > _TAIL_RUNS_MAX:
            before, dropped = self._runs.popleft()
            self._n_bytes -= sum(run.size for run in dropped)
            self._first += 1
            del self._numbers[before]

    def since(self, cursor: bytes) -> list[Packed] | None:
        """What is after a position; None if the tail does not know it."""
        if cursor == self.head:
            return []
        number = self._numbers.get(cursor)
        if number is None:
            return None
        newer = list(islice(reversed(self._runs), self._first + len(self._runs) - number))
        return [run for _, runs in reversed(newer) for run in runs]


# --- the log judges ------------------------------------------------------------------------------


class JudgedShare:
    """Copies of a log that judges, side by side.

    Args:
        log: The first of them.
        copy_log: Makes another.
        n_copies_max: So many at most; more clients wait for their turn.
    """

    def __init__(self, log: Log, copy_log: Callable[[], Log], *, n_copies_max: int) -> None:
        self.log = log
        self._copy_log = copy_log
        self._n_more = n_copies_max - 1
        self._idle = [log]
        self._available = threading.Condition()
        self._remembered = _Remembered()
        self._openings: OrderedDict[int, _Opening] = OrderedDict()
        self._opening = threading.Lock()

    def exchange(self, request: Request) -> Answer:
        """See ``Share``."""
        records = request.records
        if not records:
            return self._read(request)
        with self._remembered.one_at_a_time(records[0].worker_id):
            known = self._remembered.find(records)
            if not known and request.again:
                known = self._look_for(records)
            missing = [index for index in range(len(records)) if index not in known]
            if missing and not request.is_alive():
                raise _abandoned()
            owed = _owed([(records[index], outcome) for index, outcome in known.items()])
            answer = self._exchange(
                request._replace(records=[records[index] for index in missing]), owed
            )
            if answer.refused:
                return answer
            new = dict(zip(missing, answer.outcomes or (), strict=True))
            outcomes = [known[i] if i in known else new[i] for i in range(len(records))]
            self._remembered.keep(records, outcomes)
            return answer._replace(outcomes=outcomes)

    def alone(self, work: Callable[[], _T]) -> _T:
        """See ``Share``; waits until the first handle is idle."""
        with self._available:
            while self.log not in self._idle:
                self._available.wait()
            self._idle.remove(self.log)
        try:
            return work()
        finally:
            with self._available:
                self._idle.append(self.log)
                self._available.notify_all()

    def lease(self, use: Callable[[LeaseStore], _T]) -> _T:
        """See ``Share``."""
        with self._copy() as log:
            return use(_lease_store(log))

    def withdraw_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``Share``."""
        self.lease(lambda log: log.withdraw_lease(owner, trial_ids))

    def close(self) -> None:
        with self._available:
            for log in self._idle:
                log.close()

    def _exchange(self, request: Request, more: Wanted) -> Answer:
        cursor, wanted = unpack_cursor(request.cursor), request.wanted | more
        with self._copy() as log, _covered(log, request):
            if request.records and request.expected is not None:
                return _exchange_if(log, request, cursor, wanted)
            if not request.records:
                news, cursor = _read_on(log, cursor, wanted)
                return Answer(news, pack_cursor(cursor), ())
            batch = log.exchange(request.records, cursor, wanted)
        return Answer(pack(batch.news), pack_cursor(batch.cursor), batch.outcomes)

    def _read(self, request: Request) -> Answer:
        """With whole studies as they were when somebody opened them last, and what came since."""
        wanted, log = request.wanted, self.log
        if not wanted.trials_of or not isinstance(log, Followable):
            return self._exchange(request, NOTHING)
        cursor = unpack_cursor(request.cursor)
        kept: dict[int, _Opening] = {}
        for study_id in sorted(wanted.trials_of):
            if log.is_unread(cursor, study_id):
                opening = self._opened(study_id)
                joined = log.joined(cursor, opening.cursor, study_id)
                if joined is None:
                    self._forget_opening(study_id)
                else:
                    kept[study_id], cursor = opening, joined
        with self._copy() as copy:
            news, cursor = _read_on(copy, cursor, wanted)
        if kept and sum(run.size for run in news) * 4 > sum(one.size for one in kept.values()):
            # Too much of it is old, or the study is gone; the next one reads it anew.
            for study_id in kept:
                self._forget_opening(study_id)
        runs = [run for opening in kept.values() for run in opening.news]
        return Answer(runs + news, pack_cursor(cursor), ())

    def _forget_opening(self, study_id: int) -> None:
        with self._opening:
            self._openings.pop(study_id, None)

    def _opened(self, study_id: int) -> _Opening:
        with self._opening:
            kept = self._openings.get(study_id)
            if kept is None:
                with self._copy() as log:
                    wanted = Wanted(trials_of=frozenset((study_id,)))
                    kept = self._openings[study_id] = _Opening(*_read_on(log, START, wanted))
            self._openings.move_to_end(study_id)
            while sum(one.size for one in self._openings.values()) > _OPENINGS_BYTES_MAX:
                self._openings.popitem(last=False)
        return kept

    def _look_for(self, records: list[AnyOperation]) -> dict[int, Outcome]:
        wanted = settle.evidence(records)
        if wanted == NOTHING:
            return {}
        with self._copy() as log:
            news, _ = _read_on(log, START, wanted)
        return settle.find_appended(records, list(_unpack(news)))

    @contextlib.contextmanager
    def _copy(self) -> Iterator[Log]:
        with self._available:
            while not self._idle and self._n_more <= 0:
                self._available.wait()
            if self._idle:
                log = self._idle.pop()
            else:
                self._n_more -= 1
                log = None
        try:
            if log is None:
                log = self._copy_log()
            yield log
        finally:
            with self._available:
                if log is None:
                    self._n_more += 1
                else:
                    self._idle.append(log)
                self._available.notify()


def _read_on(log: Log, cursor: Cursor, wanted: Wanted) -> tuple[list[Packed], Cursor]:
    """What is new, in as many exchanges as it takes, and where it ends."""
    news: list[Packed] = []
    more = True
    while more:
        batch = log.exchange((), cursor, wanted)
        news += pack(batch.news)
        cursor, more = batch.cursor, batch.more
    return news, cursor


class _Opening(NamedTuple):
    """What a client that knows nothing is told of a study."""

    news: list[Packed]
    cursor: Cursor

    @property
    def size(self) -> int:
        return sum(run.size for run in self.news)


@contextlib.contextmanager
def _covered(log: Log, request: Request) -> Iterator[None]:
    """A log that judges keeps leases by trial, and has to know of an owner's only for as long as
    it takes the records. So it matters to nobody which copy or server that is."""
    if not (request.leased and request.records):
        yield
        return
    owner = request.records[0].worker_id
    _lease_store(log).take_lease(owner)
    try:
        yield
    finally:
        _lease_store(log).withdraw_lease(owner, ())


def _exchange_if(log: Log, request: Request, cursor: Cursor, wanted: Wanted) -> Answer:
    """Images of what is RUNNING come again with each answer, changed or not: the news are compared
    as a whole with those that the client has decided on."""
    told: list[Packed] = []
    end, refused = cursor, False

    def decide(news: Sequence[Record], after: Cursor) -> Sequence[AnyOperation]:
        nonlocal end, refused
        packed = pack(news)
        told.extend(packed)
        end, refused = after, refused or digest(packed) != request.expected
        return () if refused else request.records

    if isinstance(log, ConditionalLog):
        batch = log.exchange_if(decide, cursor, wanted)
    else:
        # Somebody's methods: there is nothing atomic about them.
        batch = log.exchange((), cursor, wanted)
        if decide(batch.news, batch.cursor):
            batch = log.exchange(request.records, batch.cursor, wanted)
    if refused:
        return Answer(told, pack_cursor(end), (), refused=True)
    return Answer(told + pack(batch.news), pack_cursor(batch.cursor), batch.outcomes)


def _owed(known: Sequence[tuple[AnyOperation, Outcome]]) -> Wanted:
    """What a log that judges adds to its news: all that was created, claimed or deleted."""
    studies: set[int] = set()
    trials: set[int] = set()
    for record, outcome in known:
        if isinstance(record, CreateStudy):
            studies.add(outcome.id)
        elif isinstance(record, DeleteStudy):
            studies.add(record.study_id)
        elif isinstance(record, CreateTrial):
            studies.add(record.study_id)
            trials.add(outcome.id)
        elif isinstance(record, SetTrialStateValues):
            trials.add(record.trial_id)
    return Wanted(studies=frozenset(studies - {-1}), trials=frozenset(trials - {-1}))


class _Remembered:
    """The outcomes of each client's last exchange, and a lock for each client."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._outcomes: OrderedDict[str, dict[int, Outcome]] = OrderedDict()
        self._n_outcomes = 0
        self._locks: dict[str, list[Any]] = {}  # worker_id -> lock, how many use it

    @contextlib.contextmanager
    def one_at_a_time(self, worker_id: str) -> Iterator[None]:
        """A client's second attempt waits for what has become of its first."""
        with self._mutex:
            entry = self._locks.setdefault(worker_id, [threading.Lock(), 0])
            entry[1] += 1
        try:
            with entry[0]:
                yield
        finally:
            with self._mutex:
                entry[1] -= 1
                if not entry[1]:
                    del self._locks[worker_id]

    def find(self, records: Sequence[AnyOperation]) -> dict[int, Outcome]:
        """Outcomes of the records that were in the last exchange, by index."""
        with self._mutex:
            known = self._outcomes.get(records[0].worker_id)
            if known is None:
                return {}
            return {
                index: known[record.seq]
                for index, record in enumerate(records)
                if record.seq >= 0 and record.seq in known
            }

    def keep(self, records: Sequence[AnyOperation], outcomes: Sequence[Outcome]) -> None:
        worker_id = records[0].worker_id
        with self._mutex:
            before = self._outcomes.pop(worker_id, None)
            if before is not None:
                self._n_outcomes -= len(before)
            kept = {
                record.seq: outcome for record, outcome in zip(records, outcomes, strict=False)
            }
            self._outcomes[worker_id] = kept
            self._n_outcomes += len(kept)
            while self._n_outcomes > _REMEMBERED_MAX and len(self._outcomes) > 1:
                _, dropped = self._outcomes.popitem(last=False)
                self._n_outcomes -= len(dropped)
