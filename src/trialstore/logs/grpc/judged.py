"""One log for many clients, where the log judges: each answer is its client's own.

Clients run side by side on copies of the log. Those at ordinary work on one study, the four calls
of a trial, go together, one exchange for all who wait (``lanes.py``).

*A write is applied once.* A client that got no answer sends the same records again, marked as
``again``. This process remembers the outcomes of each client's last exchange, and holds a second
attempt until the first has come to its end. The log keeps them too, in the transaction of the
records (``log.Marking``), for who comes after this process or serves the same log beside it.
Where it has no place for that, what it shows decides (``settle.py``).

What a crash leaves: an exchange is in the log as a whole or not at all, one client's or that of
many. What is remembered of it dies with this process, and each client's records are then looked
for by themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import threading
from types import MappingProxyType
from typing import Final, NamedTuple, TypeVar

from trialstore.clock import CLOCK
from trialstore.errors import LogUnavailableError
from trialstore.log import (
    NOTHING,
    START,
    Combinable,
    ConditionalLog,
    Cursor,
    Followable,
    LeaseStore,
    Log,
    Marking,
    MarkTakenError,
    Wanted,
)
from trialstore.logs.grpc import settle
from trialstore.logs.grpc.lanes import Lane, is_ordinary
from trialstore.logs.grpc.payload import Packed, digest, pack, pack_cursor, unpack_cursor
from trialstore.logs.grpc.share import (
    Answer,
    Request,
    abandoned,
    covered,
    lease_store,
    marked,
    unpacked,
)
from trialstore.records import (
    AnyOperation,
    CreateStudy,
    CreateTrial,
    DeleteStudy,
    Outcome,
    Record,
    SetTrialStateValues,
)

_T = TypeVar("_T")

# Of studies that clients have opened, packed; some 600 bytes a trial.
_OPENINGS_BYTES_MAX: Final = 64 << 20
_FULL_S: Final = 10.0
"""Where a database gives no further connection, another is tried so much later."""
_LANES_MAX: Final = 256
"""An older one is begun anew, which costs an exchange a little more once."""


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
        self._full_until_s = 0.0
        self._available = threading.Condition()
        self._remembered = settle.Remembered()
        self._openings: OrderedDict[int, _Opening] = OrderedDict()
        self._opening = threading.Lock()
        self._lanes: OrderedDict[int, Lane] = OrderedDict()
        self._making_lanes = threading.Lock()
        # Looked at once: a protocol with methods is slow to be checked, and this is every call.
        self._combinable = log if isinstance(log, Combinable) else None

    def exchange(self, request: Request) -> Answer:
        """See ``Share``."""
        records = request.records
        if not records:
            lane = self._lane_for(request)
            answer: Answer | None = None if lane is None else lane.exchange(request).answer
            return self._read(request) if answer is None else answer
        with self._remembered.one_at_a_time(records[0].worker_id):
            known = self._remembered.find(records)
            lane = None if known else self._lane_for(request)
            if lane is not None:
                told = lane.exchange(request)
                if told.outcomes is not None:
                    self._remembered.keep(records, told.outcomes)
                    if told.answer is not None:
                        shared: Answer = told.answer
                        return shared
                    known = dict(enumerate(told.outcomes))
                elif told.is_doubtful:
                    request = request._replace(again=True)
            if not known and request.again:
                known = self._look_for(request)
            try:
                return self._append(request, known)
            except MarkTakenError:
                # An attempt of before has arrived meanwhile, at another server perhaps.
                known = self._look_for(request)
                if not known:
                    raise abandoned() from None  # it is this one that comes late
                return self._append(request, known)

    def _append(self, request: Request, known: dict[int, Outcome]) -> Answer:
        """What is missing of a client's records; ``known`` says what became of the others."""
        records = request.records
        missing = [index for index in range(len(records)) if index not in known]
        if missing and not request.is_alive():
            raise abandoned()
        owed = _owed([(records[index], outcome) for index, outcome in known.items()])
        sent = request._replace(records=[records[index] for index in missing])
        answer = self._exchange(sent, owed, {records[i].seq: known[i] for i in known})
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
            return use(lease_store(log))

    def withdraw_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``Share``."""
        self.lease(lambda log: log.withdraw_lease(owner, trial_ids))

    def close(self) -> None:
        with self._available:
            for log in self._idle:
                log.close()

    def _lane_for(self, request: Request) -> Lane | None:
        """Where a request may go with those of others, if it may."""
        log = self._combinable
        if log is None or not is_ordinary(request):
            return None
        study_id = log.study_at(unpack_cursor(request.cursor))
        if study_id is None:
            return None
        with self._making_lanes:
            lane = self._lanes.get(study_id)
            if lane is None:
                lane = self._lanes[study_id] = Lane(study_id, log, self._copy)
                if len(self._lanes) > _LANES_MAX:
                    self._lanes.popitem(last=False)
        return lane if lane.fits(request) else None

    def _exchange(
        self, request: Request, more: Wanted, known: Mapping[int, Outcome] = MappingProxyType({})
    ) -> Answer:
        cursor, wanted = unpack_cursor(request.cursor), request.wanted | more
        with self._copy() as log, covered(log, [request]), marked(log, [request], known):
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
        whole = wanted.trials_of | wanted.finished_of
        if not whole or not isinstance(log, Followable):
            return self._exchange(request, NOTHING)
        cursor = unpack_cursor(request.cursor)
        kept: dict[int, _Opening] = {}
        for study_id in sorted(whole):
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

    def _look_for(self, request: Request) -> dict[int, Outcome]:
        records = request.records
        if request.number and isinstance(self.log, Marking):
            with self._copy() as log:
                assert isinstance(log, Marking)
                known = log.recall(request.sender, request.number, records)
            if known is not None:
                return known
        wanted = settle.evidence(records)
        if wanted == NOTHING:
            return {}
        with self._copy() as log:
            news, _ = _read_on(log, START, wanted)
        return settle.find_appended(records, list(unpacked(news)))

    @contextlib.contextmanager
    def _copy(self) -> Iterator[Log]:
        log = self._taken()
        try:
            yield log
        finally:
            with self._available:
                self._idle.append(log)
                self._available.notify()

    def _taken(self) -> Log:
        """A handle that is idle, or another; where no other is to be had, wait for one."""
        while True:
            with self._available:
                while not self._idle and not self._may_open():
                    self._available.wait()
                if self._idle:
                    return self._idle.pop()
                self._n_more -= 1
            try:
                return self._copy_log()
            except BaseException as error:
                with self._available:
                    self._n_more += 1
                    self._full_until_s = CLOCK.now_s() + _FULL_S
                    self._available.notify()
                if not isinstance(error, LogUnavailableError):
                    raise

    def _may_open(self) -> bool:
        return self._n_more > 0 and CLOCK.now_s() >= self._full_until_s


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


def _exchange_if(log: Log, request: Request, cursor: Cursor, wanted: Wanted) -> Answer:
    """Images of what is RUNNING come again with each answer, changed or not: the news are compared
    as a whole with those that the client has decided on, but for what such a trial reports."""
    told: list[Packed] = []
    end, refused = cursor, False

    def decide(news: Sequence[Record], after: Cursor) -> Sequence[AnyOperation]:
        nonlocal end, refused
        packed = pack(news)
        told.extend(packed)
        end, refused = after, refused or digest(unpacked(packed), wanted) != request.expected
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
