"""One log for many clients, where replay judges: every client reads the same records.

So one thread at a time exchanges for all who wait (group commit, ``turns.py``), and what is new is
packed once, into a *tail* that answers every cursor in it.

*A write is applied once.* A client that got no answer sends the same records again, marked as
``again``; their marks (``worker_id``, ``seq``) are looked for among the news, whichever server
appended them.

What a crash leaves: a journal's records are in it or not; this process keeps nothing but copies.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, TypeVar

from trialstore.errors import LogCompactedError, LogUnavailableError, OutcomeUnknownError
from trialstore.log import (
    NOTHING,
    START,
    Compacted,
    ConditionalLog,
    Cursor,
    LeaseStore,
    Log,
    Wanted,
)
from trialstore.logs.grpc.payload import Packed, digest, pack, pack_cursor, unpack_cursor
from trialstore.logs.grpc.share import Answer, Request, abandoned, lease_store, unpacked
from trialstore.logs.grpc.turns import Turns, Waiting
from trialstore.records import AnyOperation, CreateStudy, DeleteStudy, Operation, Record

_T = TypeVar("_T")

_TAIL_BYTES_MAX: Final = 32 << 20
_TAIL_RUNS_MAX: Final = 50_000  # each costs some 400 bytes beside its records
_CLIENTS_MAX: Final = 100_000
"""Whose latest record is remembered."""

Note = Callable[[int], None]
_Mark = tuple[str, int]


def ignore(n_records: int) -> None:
    """Nobody counts."""


def _mark(record: AnyOperation) -> _Mark:
    return record.worker_id, record.seq


class _Call(Waiting):
    __slots__ = ("refused", "request")

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request
        self.refused = False


class SequentialShare:
    """Group commit and a shared tail over a log whose records are the same for all.

    Args:
        log: Used by one thread at a time, and by nobody else.
        head: A packed position that the tail begins at.
        note: See ``share_of``.
    """

    def __init__(self, log: Log, head: bytes, note: Note = ignore) -> None:
        self.log = log
        self._note = note
        self._turns: Turns[_Call] = Turns(self._lead)
        self._tail = _Tail(head)
        self._last_seq: OrderedDict[str, int] = OrderedDict()
        self._leased: set[str] = set()

    def exchange(self, request: Request) -> Answer:
        """See ``Share``."""
        answer: Answer = self._turns.take(_Call(request))
        return answer

    def alone(self, work: Callable[[], _T]) -> _T:
        """See ``Share``."""
        with self._turns.alone():
            return work()

    def lease(self, use: Callable[[LeaseStore], _T]) -> _T:
        """See ``Share``."""
        return self.alone(lambda: use(lease_store(self.log)))

    def withdraw_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``Share``."""

        def withdraw(log: LeaseStore) -> None:
            self._leased.discard(owner)
            log.withdraw_lease(owner, trial_ids)

        self.lease(withdraw)

    def close(self) -> None:
        self.alone(self.log.close)

    def _lead(self, calls: Sequence[_Call]) -> None:
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
        if len(self._last_seq) > _CLIENTS_MAX:
            self._last_seq.popitem(last=False)
        return request.again or first.seq <= before

    def _append(self, calls: list[_Call]) -> None:
        """One exchange for the records of all calls; without any it looks for others' records."""
        alive = []
        for call in calls:
            if call.request.is_alive():
                alive.append(call)
            else:
                call.error = abandoned()
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
            base = self.log.load_base() if isinstance(self.log, Compacted) else None
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
        for record in unpacked(self._since(request.cursor)[0]):
            if isinstance(record, Operation):
                wanted.discard((record.worker_id, record.seq))
        missing = [record for record in request.records if _mark(record) in wanted]
        if not missing and isinstance(self.log, ConditionalLog):
            # An attempt whose sync failed may have put them there: a look with the lock makes
            # that good.
            self.log.exchange_if(lambda *_: (), unpack_cursor(self._tail.head), NOTHING)
        if missing:
            if not request.is_alive():
                raise abandoned()
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
            lease_store(self.log).take_lease(owner)
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
                digest(unpacked(newer), request.wanted) != request.expected
                and _touch(unpacked(newer), request.wanted)
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


def _touch(news: Iterable[Record], wanted: Wanted) -> bool:
    """Whether records may change the truth about what is wanted."""
    studies = {
        *wanted.studies,
        *wanted.trials_of,
        *wanted.finished_of,
        *wanted.waiting_of,
        *wanted.next_of,
        *(study_id for study_id, _ in wanted.numbers),
    }
    # Nothing here knows the study of a trial; any may be of one that is wanted.
    any_trial = bool(
        wanted.trials_of
        or wanted.finished_of
        or wanted.waiting_of
        or wanted.next_of
        or wanted.numbers
        or wanted.params
    )
    for record in news:
        if isinstance(record, (CreateStudy, DeleteStudy)):
            return True
        if any_trial or getattr(record, "trial_id", None) in wanted.trials:
            return True
        if getattr(record, "study_id", None) in studies:
            return True
    return False


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
