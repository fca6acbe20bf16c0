"""One exchange at a time: the outbox, what waiting threads want, and the news into the replica.

While an exchange is on the wire, other threads' records and wishes gather; the next leader takes
them all (group commit), and a read joins an exchange that begins after the read did. Records put
off in the *outbox* ride along with the next exchange, or with one that the linger thread starts.
Whatever else needs the log (a conditional append, a lease, a scan, a fork) takes turns with them.

What a crash leaves behind, line by line of :meth:`Exchanger._lead`: before ``log.exchange``
nothing of this exchange exists; inside it the log answers for all or nothing; after it every
record is in the log and only this process's memory is behind, which dies with the process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import itertools
import logging
import os
import threading
from typing import Any, Final, TypeVar, cast
import uuid
import weakref

from optuna.exceptions import UpdateFinishedTrialError

from trialstore.clock import Clock
from trialstore.errors import LogCompactedError, LogUnavailableError, OutcomeUnknownError
from trialstore.log import (
    NOTHING,
    START,
    Batch,
    ConditionalLog,
    Cursor,
    Log,
    SnapshotStore,
    Wanted,
)
from trialstore.processes import Fork, at_exit, living
from trialstore.records import (
    AnyOperation,
    Operation,
    Outcome,
    Record,
    SetTrialStateValues,
    TrialWrite,
    Verdict,
)
from trialstore.replica import Replica, Still
from trialstore.snapshot import Restored, Saver, apply_all, catch_up, restore, restore_base

_logger = logging.getLogger("trialstore")
_T = TypeVar("_T")

_RETRY_PAUSE_MAX_S = 1.0
_OUTBOX_MAX = 4096
_IDLE_ROUNDS = 10
"""So many lingers the thread stays when nothing waits. With others at work a trial takes longer
than one linger, and a new thread for each of them would cost it milliseconds."""
_INTERRUPTS_MAX = 8
"""So many in a row, and what must not be left out is left out."""
# Each load reads the whole snapshot and builds again what is held. Whoever has wanted so many
# studies one after the other is about to want them all.
_STUDIES_APART_MAX = 16


class _Call:
    """What one thread asks of the next exchange."""

    __slots__ = ("done", "error", "outcomes", "records", "wanted")

    def __init__(self, records: Sequence[AnyOperation], wanted: Wanted) -> None:
        self.records = records
        self.wanted = wanted
        self.outcomes: list[Outcome] = []
        self.error: BaseException | None = None
        self.done = False


_NO_CALLS: Final[Sequence[_Call]] = ()


class Exchanger:
    """Feeds one replica from one log, for any number of threads.

    Args:
        log: Where records are kept.
        linger_s: For how long a deferred record may wait for an exchange to ride along with.
        clock: Time, for tests to replace.
    """

    def __init__(self, log: Log, *, linger_s: float, clock: Clock) -> None:
        self.log = log
        self.replica = Replica()
        # How often all that the replica held was given up, which concerns who has exchanged and
        # is not answered yet.
        self.n_anew = 0
        self.forget_reads()
        self._linger_s = linger_s
        self._clock = clock
        self._cursor: Cursor = START
        self._saver: Saver | None = None
        self._renew()
        _alive.add(self)

    def _renew(self) -> None:
        """State that belongs to this process alone."""
        self.mutex = threading.RLock()
        self._exchanged = threading.Condition(self.mutex)
        self._lingering = threading.Condition(self.mutex)
        self.worker_id = str(uuid.uuid4())
        self.seqs = itertools.count()  # never twice the same in a ``worker_id``'s records
        self._gathered: Sequence[_Call] = _NO_CALLS
        self._leader: int | None = None  # thread that has an exchange on the wire
        # Who waits for the wire for something that can't go with an exchange; a token each. They
        # and the calls take turns, or a thread that calls again and again would keep it.
        self._waiting: set[object] = set()
        self._turn_of_calls = True
        self._outbox: list[TrialWrite] = []
        # What the leader has taken out of the outbox and the log has not taken yet.
        self._sending: list[TrialWrite] = []
        # Of those, by seq, what was given back without an answer: it may have been taken.
        self._doubtful: set[int] = set()
        self._outbox_due_s = 0.0
        self._linger_thread: threading.Thread | None = None
        self._rejected: dict[int, list[str]] = {}
        self.n_exchanges = 0

    def forget_reads(self) -> None:
        """Serve nothing that was read before; nor what is being read, whose reader has the old
        table."""
        self.read_at_s: dict[Wanted, float] = {}  # when the log was asked about what

    # --- sequence and outbox ---------------------------------------------------------------------

    def marks(self) -> dict[str, Any]:
        """``worker_id`` and a ``seq`` that no other record of it has.

        Records of which every trial has some are made without this dictionary, which costs as
        much as the record itself.
        """
        return {"worker_id": self.worker_id, "seq": next(self.seqs)}

    def defer(self, record: TrialWrite) -> bool:
        """Put a record off until the next exchange, at most for the linger; hold the mutex.

        Returns:
            Whether the caller has to run an exchange: the outbox is full, or nobody else would.
        """
        if not self._outbox:
            self._outbox_due_s = self._clock.now_s() + self._linger_s
        self._outbox.append(record)
        return not self._lingers() or len(self._outbox) >= _OUTBOX_MAX

    def put_off(self, trial_id: int) -> list[TrialWrite]:
        """Deferred records on a trial that the log has not taken yet; hold the mutex."""
        deferred = (*self._sending, *self._outbox)
        return [record for record in deferred if record.trial_id == trial_id]

    def _lingers(self) -> bool:
        """Whether a thread sees to the outbox, which is started if there is none; hold the
        mutex."""
        if self._linger_thread is None:
            at_exit(_flush_all, priority=100)
            thread = threading.Thread(target=self._linger, name="trialstore-linger", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # there are too many
                return False
            self._linger_thread = thread
        return True

    def has_deferred(self) -> bool:
        """Whether a deferred record may be waiting or be on the wire."""
        with self.mutex:
            return bool(self._outbox or self._sending)

    def _linger(self) -> None:
        """Exchange what has waited for the linger; ends when nothing has for some lingers.

        Whatever is put off while it waits is not due before it looks again.
        """
        pause_s = self._linger_s
        n_idle, seen_due_s = 0, self._outbox_due_s
        while True:
            with self.mutex:
                if not self._outbox:
                    # What came and went meanwhile has moved this.
                    n_idle = n_idle + 1 if self._outbox_due_s == seen_due_s else 0
                    seen_due_s = self._outbox_due_s
                    if n_idle > _IDLE_ROUNDS:
                        self._linger_thread = None
                        return
                    self._clock.wait(self._lingering, self._linger_s)
                    continue
                n_idle = 0
                remaining_s = self._outbox_due_s - self._clock.now_s()
                if remaining_s > 0:
                    self._clock.wait(self._lingering, remaining_s)
                    continue
            try:
                self.run((), NOTHING)
                pause_s = self._linger_s
            except Exception as error:
                if pause_s == self._linger_s:
                    _logger.warning("Deferred records wait for the log to come back: %s", error)
                pause_s = min(pause_s * 2 or _RETRY_PAUSE_MAX_S, _RETRY_PAUSE_MAX_S)
                with self.mutex:
                    self._outbox_due_s = self._clock.now_s() + pause_s

    def flush(self) -> None:
        """Empty the outbox.

        Raises:
            UpdateFinishedTrialError: Deferred records were rejected since they were last told of.
        """
        if self.has_deferred():
            # One exchange that begins now takes all of it, also what a failing one gives back.
            self.run((), NOTHING)
        with self.mutex:
            rejected = [text for texts in self._rejected.values() for text in texts]
            self._rejected.clear()
        if rejected:
            raise UpdateFinishedTrialError(" ".join(rejected))

    def raise_rejected(self, trial_id: int) -> None:
        """Tell, once, of deferred records on this trial that the log did not take."""
        if self._rejected:
            with self.mutex:
                rejected = self._rejected.pop(trial_id, None)
            if rejected:
                raise UpdateFinishedTrialError(" ".join(rejected))

    # --- exchanges -------------------------------------------------------------------------------

    def run(
        self, records: Sequence[AnyOperation], wanted: Wanted, *, carry: bool = True
    ) -> list[Outcome]:
        """Take part in an exchange that begins after this call, and wait for it.

        Args:
            records: Appended in order, together; each with a ``seq`` of its own.
            wanted: What the replica must tell the truth about afterwards.
            carry: Take the outbox along; False leaves that to the exchange.

        Returns:
            One outcome per record.

        Raises:
            As ``Log.exchange``.
        """
        outcomes = self._take_part(records, wanted, carry)
        if not self.replica.is_complete:
            self._load(wanted)
        return outcomes

    def _take_part(
        self, records: Sequence[AnyOperation], wanted: Wanted, carry: bool
    ) -> list[Outcome]:
        """Lead the next exchange, or let the next leader send this call's records too."""
        calls: Sequence[_Call] = _NO_CALLS
        deferred: list[TrialWrite] = []
        leads = False
        try:
            with self.mutex:
                if not self._is_free_for_calls():
                    self._refuse_reentry()
                    call = _Call(records, wanted)
                    self._gather(call)
                    if call.error is not None:
                        raise call.error
                    if call.done:
                        return call.outcomes
                self._turn_of_calls = False
                self._leader = threading.get_ident()
                leads = True
                calls, self._gathered = self._gathered, _NO_CALLS
                if carry or calls:
                    self._sending = deferred = self._outbox
                    self._outbox = []
            return self._lead(records, wanted, calls, deferred)
        except BaseException as error:
            # A failure, or an interrupt between any two lines above or in ``_lead``.
            if leads:
                try:
                    self._give_up(calls, error)
                finally:  # again, if an interrupt came as that began
                    self._give_up(calls, error)
            raise

    def _is_free_for_calls(self) -> bool:
        return self._leader is None and (self._turn_of_calls or not self._waiting)

    def _gather(self, call: _Call) -> None:
        """Until somebody has exchanged for a call, or it is its thread's turn to lead; hold the
        mutex."""
        try:
            self._gathered = [*self._gathered, call]
            while not (call.done or self._is_free_for_calls()):
                self._exchanged.wait()
        finally:
            # Calls that nobody comes back for must not have a turn.
            self._gathered = [other for other in self._gathered if other is not call]
            self._exchanged.notify_all()

    def _wait_for_the_wire(self) -> None:
        """Until no exchange is on it, and it is not the turn of those that gathered; hold the
        mutex."""
        token = object()
        try:
            self._waiting.add(token)
            while self._leader is not None or (self._turn_of_calls and self._gathered):
                self._exchanged.wait()
            self._turn_of_calls = True
        finally:
            self._waiting.discard(token)
            self._exchanged.notify_all()

    def _refuse_reentry(self) -> None:
        """Waiting for this very thread would last for ever."""
        if self._leader == threading.get_ident():
            raise RuntimeError(
                "The storage is used from within its own exchange, by a signal handler or a "
                "callback of its log. Set a flag there, and use the storage afterwards."
            )

    def _give_up(self, calls: Sequence[_Call], error: BaseException) -> None:
        """Of this thread's lead, if it still has it: nothing was appended, or nobody knows."""
        self._certainly(lambda: self._give_back(calls, error))

    def _give_back(self, calls: Sequence[_Call], error: BaseException) -> None:
        if self._leader != threading.get_ident():
            return  # given back already, and another's perhaps
        # Deferred records may be sent again either way: they overwrite, and keep the seq that
        # marks them as the same ones.
        sending = {record.seq for record in self._sending}
        self._doubtful |= sending
        later = [record for record in self._outbox if record.seq not in sending]
        self._outbox = [*self._sending, *later]
        again = []
        for call in calls:
            if not call.done and (call.records or isinstance(error, Exception)):
                call.error = _for_followers(error)
                call.done = True
            elif not call.done:
                again.append(call)  # of one who only reads, and need not hear of an interrupt
        self._gathered = [*again, *self._gathered]
        self._release_lead()
        if self._outbox:
            self._lingers()

    def _certainly(self, act: Callable[[], None]) -> None:
        """Do what must not be left out, with the mutex, although an interrupt may come while this
        waits for it or at work; then it is done again.

        Args:
            act: What may be done twice.
        """
        interrupts: list[BaseException] = []
        while len(interrupts) < _INTERRUPTS_MAX:
            try:
                with self.mutex:
                    act()
                break
            except BaseException as interrupt:
                interrupts.append(interrupt)
        if interrupts:
            raise interrupts[0]

    def run_if(
        self, decide: Callable[[Replica], Sequence[AnyOperation]], wanted: Wanted
    ) -> list[Outcome]:
        """Append what ``decide`` says of the replica, with nothing between that it has not seen.

        Args:
            decide: Looks at the replica, which tells the truth about ``wanted``, and returns
                records, each with a ``seq`` of its own, or none. It may be called again, and what
                it returned before is then void: it was not appended. It must not use the storage.
            wanted: What ``decide`` looks at.

        Returns:
            One outcome per record that ``decide`` returned last.

        Raises:
            RuntimeError: The log can't append conditionally.
            As ``Log.exchange``; whatever ``decide`` raises, with nothing appended.
        """
        if not isinstance(self.log, ConditionalLog):
            raise RuntimeError(f"{self.log!r} can't append on a condition; use another backend.")
        with self.mutex:
            behind = self._outbox or self._cursor is START or self.replica.unloaded(wanted)
        if behind:
            # The outbox goes first, and what is not loaded is read without holding the log.
            self.run((), wanted)
        decided: list[AnyOperation] = []
        known: dict[int, Outcome] = {}

        def are_known() -> bool:
            """An attempt whose answer was lost has appended them, all in one; this is replay."""
            return bool(decided) and all(record.seq in known for record in decided)

        def told(news: Sequence[Record], cursor: Cursor) -> Sequence[AnyOperation]:
            with self.mutex:
                known.update(self._take_in(news, cursor))
                if are_known():
                    return ()
                decided[:] = decide(self.replica)
            return decided

        def append(log: ConditionalLog) -> list[Outcome]:
            while True:
                try:
                    batch = log.exchange_if(told, self._cursor, wanted)
                    break
                except LogCompactedError:
                    known.update(self._read_anew())
                    if are_known():
                        return _outcomes_of(decided, known)
            with self.mutex:
                self.n_exchanges += 1
                replayed = self._take_in(batch.news, batch.cursor)
                if are_known():
                    return _outcomes_of(decided, known)
                return _outcomes_in(batch, decided, replayed)

        return self.use_log(append)

    def use_log(self, use: Callable[[Any], _T]) -> _T:
        """Call something else that the log can do, while no exchange is on the wire.

        Others' records and wishes gather meanwhile. (As a context manager this would keep the
        lead if an interrupt came between its beginning and the block.)
        """
        self._refuse_reentry()
        try:
            with self.mutex:
                self._wait_for_the_wire()
                self._leader = threading.get_ident()
            return use(self.log)
        finally:
            try:
                self._certainly(self._release_own_lead)
            finally:  # again, if an interrupt came as that began
                self._certainly(self._release_own_lead)

    def _lead(
        self,
        records: Sequence[AnyOperation],
        wanted: Wanted,
        calls: Sequence[_Call],
        deferred: list[TrialWrite],
    ) -> list[Outcome]:
        """One exchange for the leader's own records, the outbox and the calls that gathered."""
        parts: list[Sequence[AnyOperation]] = [records]
        if deferred:
            parts.insert(0, deferred)
        for call in calls:
            parts.append(call.records)
            wanted |= call.wanted
        try:
            outcomes: list[list[Outcome] | Exception] = list(self._exchange(parts, wanted))
        except ValueError:
            # The log can't keep one of the records, and nothing was appended. One record must
            # not keep the others out, least of all for ever.
            parts = [*([record] for record in deferred), *parts[bool(deferred) :]]
            outcomes = self._exchange_one_by_one(parts, len(deferred), wanted)
        first = len(outcomes) - len(calls) - 1
        refused = [
            (part, told)
            for part, told in zip(parts[:first], outcomes[:first], strict=True)
            if isinstance(told, Exception) or any(outcome.verdict for outcome in told)
        ]
        if refused and self._doubtful:
            self._look_at_refused(refused)
        with self.mutex:
            for part, told in refused:
                self._note_rejected(part, told)
            if self._doubtful:
                self._doubtful.difference_update(record.seq for record in deferred)
            for call, told in zip(calls, outcomes[first + 1 :], strict=True):
                if isinstance(told, Exception):
                    call.error = told
                else:
                    call.outcomes = told
                call.done = True
            self._release_lead()
        mine = outcomes[first]
        if isinstance(mine, Exception):
            raise mine
        return mine

    def _exchange(
        self, parts: Sequence[Sequence[AnyOperation]], wanted: Wanted
    ) -> list[list[Outcome]]:
        """One exchange for all parts; the outcomes of each."""
        sent = [record for part in parts for record in part]
        if self._cursor is START and isinstance(self.log, SnapshotStore):
            self._open_from_snapshot(self.log)
        known: dict[int, Outcome] = {}
        while True:
            fresh = [record for record in sent if record.seq not in known] if known else sent
            try:
                batch = self.log.exchange(fresh, self._cursor, wanted)
                break
            except LogCompactedError:
                # An attempt before this one, whose answer was lost, may have appended them.
                known = self._read_anew()
        with self.mutex:
            self.n_exchanges += 1
            replays = batch.outcomes is None and bool(fresh)
            replayed = self._take_in(batch.news, batch.cursor, replays)
            outcomes = _outcomes_in(batch, fresh, replayed)
            if known:
                known.update(zip((record.seq for record in fresh), outcomes, strict=True))
                outcomes = [known[record.seq] for record in sent]
            self._note_taken(sent, outcomes)
        while batch.more:
            try:
                batch = self.log.exchange((), self._cursor, wanted)
            except LogCompactedError:
                self._read_anew()
                break
            with self.mutex:
                self._take_in(batch.news, batch.cursor, replays=False)
                self.n_exchanges += 1
        if self._saver is not None:
            self._saver.save_if_due(self._take_still)
        if len(parts) == 1:
            return [outcomes]
        ends = itertools.accumulate(map(len, parts))
        return [outcomes[end - len(part) : end] for part, end in zip(parts, ends, strict=True)]

    def _exchange_one_by_one(
        self, parts: Sequence[Sequence[AnyOperation]], n_deferred: int, wanted: Wanted
    ) -> list[list[Outcome] | Exception]:
        """An exchange for each part, so that what the log can't keep is told apart.

        A trial whose deferred record, one of the first parts, is refused keeps its state. If the
        log goes away, what was appended before has its outcomes; the parts after are not sent.

        Raises:
            Exception: The log's, while it was given deferred records; no other part was sent.
        """
        told: list[list[Outcome] | Exception] = []
        lacking: dict[int, ValueError] = {}
        for part in parts:
            try:
                for record in part:
                    if isinstance(record, SetTrialStateValues) and record.trial_id in lacking:
                        raise lacking[record.trial_id]
                told += self._exchange([part], wanted)
            except ValueError as error:
                if len(told) < n_deferred:
                    lacking[cast(TrialWrite, part[0]).trial_id] = error
                told.append(error)
            except Exception as error:
                if len(told) < n_deferred:
                    raise
                told.append(error)
                told += [_not_sent(error)] * (len(parts) - len(told))
                break
        return told

    def _release_own_lead(self) -> None:
        if self._leader == threading.get_ident():
            self._release_lead()

    def _release_lead(self) -> None:
        self._leader = None
        self._sending = []
        self._exchanged.notify_all()

    def _take_in(
        self, news: Sequence[Record], cursor: Cursor, replays: bool = True
    ) -> dict[int, Outcome]:
        """News into the replica, which then stands at the cursor; hold the mutex.

        Returns:
            What became of this storage's records among them, by ``seq``; nothing if it is the
            log that judges, or nobody asks.
        """
        known: dict[int, Outcome] = {}
        try:
            if self._saver is not None:
                self._saver.note(len(news))
            if replays:
                me = self.worker_id
                known = {
                    cast(Operation, record).seq: outcome
                    for record, outcome in zip(news, self.replica.apply_all(news), strict=True)
                    if record.worker_id == me
                }
            elif news:
                apply_all(self.replica, news)
            self._cursor = cursor
        except BaseException:
            # An interrupt. How much of the news was taken in nobody knows; all is read anew.
            self._begin_anew()
            raise
        return known

    def _begin_anew(self) -> None:
        self.replica, self._cursor, self._saver = Replica(), START, None
        self.n_anew += 1
        self.forget_reads()

    def _note_taken(self, sent: Sequence[AnyOperation], outcomes: Sequence[Outcome]) -> None:
        """What the log holds is not sent again, nor any more put off."""
        if self._sending:
            taken = {
                record.seq
                for record, outcome in zip(sent, outcomes, strict=True)
                if outcome.verdict is Verdict.ACCEPTED
            }
            self._sending = [record for record in self._sending if record.seq not in taken]

    def _look_at_refused(
        self, refused: Sequence[tuple[Sequence[AnyOperation], list[Outcome] | Exception]]
    ) -> None:
        """Have the replica show what the trials of refused deferred records say by now."""
        unseen = {
            cast(TrialWrite, record).trial_id
            for part, outcomes in refused
            if not isinstance(outcomes, Exception)
            for record, outcome in zip(part, outcomes, strict=True)
            if outcome.verdict is Verdict.FINISHED
        }
        unseen = {trial_id for trial_id in unseen if not self.replica.is_finished(trial_id)}
        if unseen:
            with contextlib.suppress(Exception):  # then they count as not stored
                self._exchange([()], Wanted(trials=frozenset(unseen)))

    def _note_rejected(
        self, deferred: Sequence[AnyOperation], told: list[Outcome] | Exception
    ) -> None:
        if isinstance(told, Exception):
            verdicts = [str(told)] * len(deferred)
        else:
            verdicts = [outcome.verdict.name if outcome.verdict else "" for outcome in told]
        for record, verdict in zip(cast("Sequence[TrialWrite]", deferred), verdicts, strict=True):
            if not verdict:
                continue
            # One that was sent again, after an interrupt that hid the answer, may have been taken
            # the first time and its trial have been finished since.
            if record.seq not in self._doubtful or not self.replica.says(record):
                text = _rejection(record, verdict)
                _logger.warning(text)
                self._rejected.setdefault(record.trial_id, []).append(text)

    # --- snapshots -------------------------------------------------------------------------------

    def _open_from_snapshot(self, log: Any) -> None:
        """Names and positions only: trials of a study are loaded when somebody wants them.

        But for who opens it again, after an interrupt: he has put off records on such trials.
        """
        restored = restore(log, None if self.n_exchanges else frozenset())
        with self.mutex:
            self._go_on_from(restored)

    def _take_still(self) -> tuple[Still, Cursor, int] | None:
        """What is held now, and of when; None if that is not everything."""
        with self.mutex:
            if not self.replica.is_complete or self._saver is None:
                return None
            return self.replica.still(), self._cursor, self._saver.n_records

    def _read_anew(self) -> dict[int, Outcome]:
        """Everything, after the records behind the cursor were compacted or trimmed away.

        Not from a snapshot of today: it would not say what became of this storage's records.

        Returns:
            The outcomes of this storage's records, by ``seq``, as far as anybody may ask.
        """
        while True:
            (replica, cursor, n_records), marks = restore_base(self.log)
            outcomes = marks[self.worker_id].outcomes() if self.worker_id in marks else {}
            try:
                more = True
                while more:
                    batch = self.log.exchange((), cursor, NOTHING)
                    for record in batch.news:
                        outcome = replica.apply(record)
                        if record.worker_id == self.worker_id:
                            outcomes[cast(Operation, record).seq] = outcome
                    cursor, more = batch.cursor, batch.more
                    n_records += len(batch.news)
            except LogCompactedError:
                if cursor is START:
                    raise
                continue  # once more, meanwhile
            with self.mutex:
                self._go_on_from(Restored(replica, cursor, n_records))
            return outcomes

    def _load(self, wanted: Wanted) -> None:
        """Trials of wanted studies that the replica passed over so far.

        They are read again, with those it holds, from the snapshot and the records after it.
        """
        with self.mutex:
            if not self.replica.unloaded(wanted):
                return

        def load(log: Any) -> None:
            with self.mutex:
                focus = self.replica.loaded_study_ids() | self.replica.unloaded(wanted)
            apart = focus if len(focus) <= _STUDIES_APART_MAX else None
            try:
                restored = catch_up(log, restore(log, apart))
            except LogCompactedError:
                self._read_anew()
                return
            with self.mutex:
                self.replica, self._cursor = restored.replica, restored.cursor

        self.use_log(load)

    def restore(self, restored: Restored) -> None:
        """Go on from other contents, of the same log."""
        with self.mutex:
            self._wait_for_the_wire()
            self._go_on_from(restored)

    def _go_on_from(self, restored: Restored) -> None:
        self.replica, self._cursor, n_records = restored
        if isinstance(self.log, SnapshotStore):
            self._saver = Saver(self.log, n_records)

    # --- fork ------------------------------------------------------------------------------------

    def hold_for_fork(self) -> None:
        """Let a running exchange come to its end, and start none until the fork is made."""
        try:
            self.mutex.acquire()
            if self._leader != threading.get_ident():
                self._wait_for_the_wire()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # not acquired yet
                self.mutex.release()
            raise

    def go_on_in_parent(self) -> None:
        self.mutex.release()

    def begin_in_child(self, *, held: bool) -> None:
        """What was read stays; the outbox, the sequence and the threads are the parent's.

        Args:
            held: No exchange was running; of one that was nobody knows how far it had come.
        """
        self._renew()
        if not held:
            self._begin_anew()
        if self._saver is not None:
            self._saver.begin_in_child()


class Alone(Exchanger):
    """The same for a store that nobody else reads or writes: the replica is all there is.

    A record is applied when it is written, and what the replica says is never old.

    Args:
        log: Gets no records; only what it can do beside keeping them is used.
        clock: Time, for tests to replace.
    """

    def __init__(self, log: Log, *, clock: Clock) -> None:
        super().__init__(log, linger_s=0.0, clock=clock)

    def _begin_anew(self) -> None:
        """There is nothing to begin with: what is held stays."""

    def run(
        self, records: Sequence[AnyOperation], wanted: Wanted, *, carry: bool = True
    ) -> list[Outcome]:
        with self.mutex:
            return [self.replica.apply(record) for record in records]

    def run_if(
        self, decide: Callable[[Replica], Sequence[AnyOperation]], wanted: Wanted
    ) -> list[Outcome]:
        with self.mutex:
            return self.run(decide(self.replica), wanted)


def _outcomes_in(
    batch: Batch, sent: list[AnyOperation], replayed: dict[int, Outcome]
) -> list[Outcome]:
    """The log's, or the replay's."""
    return _outcomes_of(sent, replayed) if batch.outcomes is None else list(batch.outcomes)


def _outcomes_of(sent: Sequence[AnyOperation], replayed: dict[int, Outcome]) -> list[Outcome]:
    try:
        return [replayed[record.seq] for record in sent]
    except KeyError as missing:
        raise OutcomeUnknownError(
            f"The log took record {missing} of {sent[0].worker_id} and did not return it. Check "
            "that no other program writes to it."
        ) from None


def _not_sent(error: Exception) -> Exception:
    """What those are told whose turn came after an error of the log."""
    if isinstance(error, OutcomeUnknownError):
        return LogUnavailableError(f"Not sent, because the log had gone away: {error}")
    return error


def _for_followers(error: BaseException) -> BaseException:
    """What the other threads of a failed exchange get to see."""
    if isinstance(error, Exception):
        return error
    return OutcomeUnknownError(
        f"The thread that exchanged for this one was interrupted by {type(error).__name__}."
    )


def _rejection(record: TrialWrite, why: str) -> str:
    return (
        f"{type(record).__name__} on the trial with id {record.trial_id} was put off and then not "
        f"stored: {why}. The trial may have been finished or deleted by somebody else meanwhile."
    )


# --- fork and exit -------------------------------------------------------------------------------

_alive: weakref.WeakSet[Exchanger] = weakref.WeakSet()
_fork = Fork(_alive)


def _begin_all() -> None:
    try:
        for exchanger in living(_alive):
            exchanger.begin_in_child(held=_fork.holds(exchanger))
    finally:
        _fork.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_fork.hold, after_in_parent=_fork.release, after_in_child=_begin_all
    )


def _flush_all() -> None:
    for exchanger in living(_alive):
        try:
            exchanger.flush()
        except UpdateFinishedTrialError:
            pass  # logged when it was rejected
        except Exception as error:  # of one storage; the others have theirs to save
            _logger.error("Deferred records are lost with this process: %s", error)
