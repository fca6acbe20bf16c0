"""One exchange for several clients that work on one study, where the log judges.

While an exchange is on its way the calls of others gather; the next leader takes them all: their
records in order, their wishes united, at a cursor of the lane's own, which follows the study from
exchange to exchange. So the lock on the study, the commit, its sync, and the look for WAITING
trials are paid for once for all of them.

*What each gets* is its own: its outcomes, and of the news the images of the trials that it asked
for, created or claimed. Its cursor stays where it is, which is right for all that an ordinary call
asks: images of RUNNING and finished trials come again by any cursor that may be behind them, and a
look for WAITING trials has no news if the lane, which has just looked, has been told the same as
the client. Wherever it is not that simple (a record was refused, a trial or the study is gone, a
trial is WAITING, something has changed in the queue) the client reads by itself, at its own
cursor, what its records are owed.

*What each is spared* is the others' errors. If the log can't keep something, nothing was appended,
and everybody sends alone. After an error that nobody has foreseen each looks for its records
before it sends them.

What a crash leaves: an exchange is in the log as a whole or not at all. The lane's cursor may be
lost or be behind; it is only ever read from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final

from trialstore.errors import LogUnavailableError, OutcomeUnknownError
from trialstore.log import NOTHING, START, Batch, Combinable, Cursor, Log, Wanted
from trialstore.logs.grpc.payload import pack, unpack_cursor
from trialstore.logs.grpc.share import Answer, Request, abandoned, covered, marked
from trialstore.logs.grpc.turns import Turns, Waiting
from trialstore.records import (
    ACCEPTED,
    RUNNING,
    WAITING,
    AnyOperation,
    CreateTrial,
    Outcome,
    PutTrial,
    SetTrialIntermediateValue,
    SetTrialParam,
    SetTrialStateValues,
    SetTrialSystemAttr,
    SetTrialUserAttr,
    TrialWrite,
)

_FIELDS: Final = (
    SetTrialParam,
    SetTrialUserAttr,
    SetTrialSystemAttr,
    SetTrialIntermediateValue,
)
_UNWATCHED_MAX: Final = 64
"""So many exchanges without a look at the queue. It is what makes the lane forget the trials that
others have finished, and which it would ask for by id at the next."""


class Call(Waiting):
    """A request, and what became of it; without ``outcomes`` it is yet to be sent.

    Attributes:
        answer: None if the client has to read by itself.
        is_doubtful: Its records may have been appended.
    """

    __slots__ = ("is_doubtful", "outcomes", "request")

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request
        self.outcomes: Sequence[Outcome] | None = None
        self.is_doubtful = False


def is_ordinary(request: Request) -> bool:
    """Whether a request is one that a lane takes, if it is of its study."""
    if request.again or request.expected is not None:
        return False
    wanted = request.wanted
    if request.records:
        if wanted is not NOTHING and wanted != Wanted(trials=wanted.trials):
            return False
        return all(map(_is_ordinary, request.records))
    if wanted.next_of:
        return len(wanted.next_of) == 1 and wanted == Wanted(next_of=wanted.next_of)
    return bool(wanted.trials) and wanted == Wanted(trials=wanted.trials)


def _is_ordinary(record: AnyOperation) -> bool:
    if isinstance(record, (CreateTrial, SetTrialStateValues)):
        return record.state != WAITING
    return isinstance(record, _FIELDS)


class Lane:
    """The calls of those who work on one study.

    Args:
        study_id: The study.
        log: Knows about cursors; used for nothing else.
        copy_log: Lends a handle on the same log.
    """

    def __init__(
        self, study_id: int, log: Combinable, copy_log: Callable[[], AbstractContextManager[Log]]
    ) -> None:
        self._study_id = study_id
        self._log = log
        self._copy_log = copy_log
        self._turns: Turns[Call] = Turns(self._lead)
        self._cursor: Cursor = START
        self._n_unwatched = 0

    def fits(self, request: Request) -> bool:
        """Whether an ordinary request is of this study, as far as it names one."""
        if not request.wanted.next_of <= {self._study_id}:
            return False
        return all(
            record.study_id == self._study_id
            for record in request.records
            if isinstance(record, CreateTrial)
        )

    def exchange(self, request: Request) -> Call:
        """Go with others.

        Raises:
            LogUnavailableError, OutcomeUnknownError: As ``Log.exchange``; all have it alike.
        """
        call = Call(request)
        self._turns.take(call)
        return call

    def _lead(self, calls: Sequence[Call]) -> None:
        sent = []
        touched: set[int] = set()
        for call in calls:
            if call.request.records and not call.request.is_alive():
                call.error = abandoned()
                continue
            trials = {one.trial_id for one in call.request.records if isinstance(one, TrialWrite)}
            # Whose records touch a trial after another's sends alone: what a log keeps of a
            # client's has to follow from what there was before.
            if touched.isdisjoint(trials):
                touched |= trials
                sent.append(call)
        if not sent:
            return
        watches = self._n_unwatched >= _UNWATCHED_MAX
        wanted: set[int] = set()
        for call in sent:
            wanted |= call.request.wanted.trials
            watches = watches or bool(call.request.wanted.next_of)
        try:
            batch = self._exchange(
                [call.request for call in sent],
                Wanted(
                    trials=frozenset(wanted),
                    next_of=frozenset((self._study_id,) if watches else ()),
                ),
            )
        except (LogUnavailableError, OutcomeUnknownError) as error:
            for call in sent:
                call.error = error
        except ValueError:
            pass  # nothing was appended
        except Exception:
            # Of whom, nobody knows; it shows when each sends alone.
            for call in sent:
                call.is_doubtful = True
        else:
            self._n_unwatched = 0 if watches else self._n_unwatched + 1
            self._answer(sent, batch)

    def _exchange(self, requests: list[Request], wanted: Wanted) -> Batch:
        records = [record for request in requests for record in request.records]
        with self._copy_log() as log, covered(log, requests), marked(log, requests):
            batch = log.exchange(records, self._cursor, wanted)
        self._cursor = batch.cursor
        return batch

    def _answer(self, calls: Sequence[Call], batch: Batch) -> None:
        images = {
            one.trial_id: one
            for one in batch.news
            if isinstance(one, PutTrial)
            and one.study_id == self._study_id
            and one.state != WAITING
        }
        outcomes = batch.outcomes or ()
        begin = 0
        for call in calls:
            request = call.request
            end = begin + len(request.records)
            call.outcomes = outcomes[begin:end]
            begin = end
            owed = _owed(request, call.outcomes)
            if owed is None or (request.wanted.next_of and not self._says_the_same(request)):
                continue
            if owed <= images.keys():
                news = [images[trial_id] for trial_id in sorted(owed)]
                call.answer = Answer(pack(news), request.cursor, call.outcomes)

    def _says_the_same(self, request: Request) -> bool:
        """Whether the client has been told of the queue, and of the study, what the lane has."""
        return self._log.tell_the_same(unpack_cursor(request.cursor), self._cursor, self._study_id)


def _owed(request: Request, outcomes: Sequence[Outcome]) -> set[int] | None:
    """Trials that an answer has to show; None if it has to show more."""
    owed: set[int] = set(request.wanted.trials)
    for record, outcome in zip(request.records, outcomes, strict=True):
        if outcome.verdict != ACCEPTED.verdict:
            return None
        if isinstance(record, CreateTrial):
            owed.add(outcome.id)
        elif isinstance(record, SetTrialStateValues) and record.state == RUNNING:
            owed.add(record.trial_id)
    return owed
