"""Exchanges: one on the wire, the rest gathers; the outbox rides along, and survives failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import gc
import itertools
import math
import os
from pathlib import Path
import pickle
import subprocess
import sys
import threading
from typing import Any, cast
import weakref

from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
import pytest

from interrupts import is_interrupted_at
from trialstore import exchange, processes, replica
from trialstore.clock import Clock
from trialstore.errors import LogUnavailableError, OutcomeUnknownError
from trialstore.in_memory import InMemoryStorage
from trialstore.journal import JournalFileBackend, JournalStorage
from trialstore.log import Batch, Cursor, Decide, Wanted
from trialstore.logs.memory import MemoryLog
from trialstore.logs.relational.log import TablesLog
from trialstore.records import AnyOperation, CreateTrial, Outcome, Verdict
from trialstore.scan import Scan
from trialstore.storage import Storage
from trialstore.testing.clock import ManualClock
from trialstore.testing.suites.base import run_threads, wait_until

_DEADLINE_S = 60
_X = FloatDistribution(0, 1)


class _Tap:
    """A memory log that records what it is asked, and fails or waits where it is told to."""

    def __init__(self, log: MemoryLog) -> None:
        self.log = log
        self.sent: list[list[AnyOperation]] = []
        self.before: Callable[[Sequence[AnyOperation]], None] = lambda records: None
        self.after: Callable[[Sequence[AnyOperation]], None] = lambda records: None

    def exchange(self, records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        self.sent.append(list(records))
        self.before(records)
        batch = self.log.exchange(records, cursor, wanted)
        self.after(records)
        return batch

    def close(self) -> None:
        self.log.close()


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog()


@pytest.fixture
def tap(log: MemoryLog) -> _Tap:
    return _Tap(log)


@pytest.fixture
def storage(tap: _Tap) -> Storage:
    """Deferred writes wait for ever, so that only exchanges asked for here happen."""
    return Storage(tap, clock=ManualClock())


@pytest.fixture
def study_id(storage: Storage) -> int:
    return storage.create_new_study([StudyDirection.MINIMIZE], "study")


def _started_trial(storage: Storage, study_id: int) -> int:
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_param(trial_id, "x", 0.5, _X)
    return trial_id


def test_the_first_use_of_a_name_is_written_through_and_later_ones_ride_along(
    storage: Storage, tap: _Tap, study_id: int
) -> None:
    _started_trial(storage, study_id)
    assert [len(records) for records in tap.sent] == [1, 1, 1]
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_param(trial_id, "x", 0.25, _X)
    storage.set_trial_user_attr(trial_id, "k", 1)
    storage.set_trial_intermediate_value(trial_id, 0, 1.0)
    assert len(tap.sent) == 4
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0])
    assert [len(records) for records in tap.sent[4:]] == [4]
    trial = storage.get_trial(trial_id)
    assert (trial.params, trial.user_attrs, trial.intermediate_values) == (
        {"x": 0.25},
        {"k": 1},
        {0: 1.0},
    )


def test_a_failed_exchange_keeps_the_outbox_and_loses_nothing(
    storage: Storage, tap: _Tap, study_id: int
) -> None:
    trial_id = _started_trial(storage, study_id)
    storage.set_trial_user_attr(trial_id, "k", 1)

    def fail(records: Sequence[AnyOperation]) -> None:
        raise LogUnavailableError("away")

    tap.before = fail
    with pytest.raises(LogUnavailableError):
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0])
    tap.before = lambda records: None
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0])
    assert storage.get_trial(trial_id).user_attrs == {"k": 1}


def test_an_exchange_of_unknown_fate_sends_the_same_records_again(
    storage: Storage, tap: _Tap, study_id: int
) -> None:
    trial_id = _started_trial(storage, study_id)
    storage.set_trial_user_attr(trial_id, "k", 1)

    def lose_the_answer(records: Sequence[AnyOperation]) -> None:
        raise OutcomeUnknownError("no answer")

    tap.after = lose_the_answer
    with pytest.raises(OutcomeUnknownError):
        storage.flush()
    tap.after = lambda records: None
    storage.flush()
    assert tap.sent[-1] == tap.sent[-2] != []
    assert storage.get_trial(trial_id).user_attrs == {"k": 1}


class _InterruptedSaver:
    """Ctrl-C where only a snapshot is still to be thought of."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def note(self, n_news: int) -> None:
        pass

    def save_if_due(self, take: Any) -> None:
        self.look()
        raise KeyboardInterrupt


def test_what_the_log_has_taken_is_neither_shown_as_put_off_nor_sent_again(
    storage: Storage, tap: _Tap, study_id: int
) -> None:
    trial_id = _started_trial(storage, study_id)
    storage.set_trial_user_attr(trial_id, "k", 1)
    exchanger, put_off = storage._exchanger, []
    exchanger._saver = cast(
        Any, _InterruptedSaver(lambda: put_off.append(exchanger.put_off(trial_id)))
    )
    with pytest.raises(KeyboardInterrupt):
        storage.flush()
    exchanger._saver = None
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0])
    assert put_off == [[]]
    assert [len(records) for records in tap.sent[-2:]] == [1, 1]


def test_a_rejection_is_told_though_the_exchange_was_interrupted(
    storage: Storage, log: MemoryLog, study_id: int
) -> None:
    trial_id = _started_trial(storage, study_id)
    storage.set_trial_user_attr(trial_id, "k", 1)
    Storage(log, linger_s=0).set_trial_state_values(trial_id, TrialState.FAIL)
    storage._exchanger._saver = cast(Any, _InterruptedSaver(lambda: None))
    with pytest.raises(KeyboardInterrupt):
        storage.flush()
    storage._exchanger._saver = None
    with pytest.raises(UpdateFinishedTrialError):
        storage.flush()


def test_a_rejected_deferred_write_raises_once_and_only_on_its_own_trial(
    storage: Storage, log: MemoryLog, study_id: int
) -> None:
    other = Storage(log, linger_s=0)
    mine, bystander = _started_trial(storage, study_id), _started_trial(storage, study_id)
    other.set_trial_state_values(mine, TrialState.FAIL)
    storage.set_trial_user_attr(mine, "k", 1)
    storage.set_trial_user_attr(bystander, "k", 1)
    storage.get_all_trials(study_id)
    assert storage.get_trial(bystander).user_attrs == {"k": 1}
    with pytest.raises(UpdateFinishedTrialError, match="FINISHED"):
        storage.set_trial_user_attr(mine, "k2", 1)
    assert storage.get_trial(mine).user_attrs == {}
    storage.flush()


def test_a_rejected_write_of_what_somebody_else_has_written_raises(
    storage: Storage, log: MemoryLog, study_id: int
) -> None:
    trial_id = _started_trial(storage, study_id)
    storage.flush()
    storage.set_trial_user_attr(trial_id, "k", 1)
    other = Storage(log, linger_s=0)
    other.set_trial_user_attr(trial_id, "k", 1)
    other.set_trial_state_values(trial_id, TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        storage.flush()
    storage.flush()


@pytest.mark.parametrize("end", ["flush", "close"])
def test_a_rejected_deferred_write_raises_at_the_end(
    storage: Storage, log: MemoryLog, study_id: int, end: str
) -> None:
    trial_id = _started_trial(storage, study_id)
    Storage(log, linger_s=0).set_trial_state_values(trial_id, TrialState.FAIL)
    storage.set_trial_user_attr(trial_id, "k", 1)
    with pytest.raises(UpdateFinishedTrialError):
        getattr(storage, end)()
    getattr(storage, end)()


def test_threads_share_the_exchange_that_begins_next(
    storage: Storage, tap: _Tap, study_id: int
) -> None:
    first_is_on_the_wire, go_on = threading.Event(), threading.Event()

    def hold_the_first(records: Sequence[AnyOperation]) -> None:
        tap.before = lambda records: None
        first_is_on_the_wire.set()
        assert go_on.wait(_DEADLINE_S)

    tap.before = hold_the_first
    made: list[int] = []
    threads = [
        threading.Thread(target=lambda: made.append(storage.create_new_trial(study_id)))
        for _ in range(9)
    ]
    threads[0].start()
    assert first_is_on_the_wire.wait(_DEADLINE_S)
    for thread in threads[1:]:
        thread.start()
    while len(storage._exchanger._gathered) < 8:
        threads[1].join(0.001)
    go_on.set()
    for thread in threads:
        thread.join(_DEADLINE_S)
    assert sorted(made) == list(range(9))
    assert [len(records) for records in tap.sent[1:]] == [1, 8]


def test_a_read_shows_what_another_thread_has_on_the_wire(
    storage: Storage, tap: _Tap, study_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial_id = _started_trial(storage, study_id)
    storage.set_trial_user_attr(trial_id, "k", 1)
    is_on_the_wire, go_on = threading.Event(), threading.Event()
    flusher = threading.Thread(target=storage.flush)

    def hold(records: Sequence[AnyOperation]) -> None:
        is_on_the_wire.set()
        assert go_on.wait(_DEADLINE_S)

    run = storage._exchanger.run

    def run_and_be_overtaken(*args: Any, **options: Any) -> Any:
        outcomes = run(*args, **options)
        monkeypatch.undo()
        tap.before = hold
        flusher.start()
        assert is_on_the_wire.wait(_DEADLINE_S)
        return outcomes

    monkeypatch.setattr(storage._exchanger, "run", run_and_be_overtaken)
    assert storage.get_trial(trial_id).user_attrs == {"k": 1}
    assert not storage._exchanger._outbox
    go_on.set()
    flusher.join(_DEADLINE_S)
    assert [len(records) for records in tap.sent[-2:]] == [0, 1]


class _ToldTwice(_Tap):
    """A log that could not tell whether it had appended, and finds what it appended as news."""

    def exchange_if(self, decide: Decide, cursor: Cursor, wanted: Wanted) -> Batch:
        records = decide((), cursor)
        batch = self.log.exchange(records, cursor, wanted)
        assert not decide(batch.news, batch.cursor)
        return Batch(None, (), batch.cursor)


@contextlib.contextmanager
def _gathered(
    storage: Storage, tap: _Tap, calls: Sequence[Callable[[], object]]
) -> Iterator[None]:
    """The calls have gathered, in order, behind an exchange that ends with the block; then they
    are waited for."""
    on_the_wire, go_on = threading.Event(), threading.Event()

    def wait(records: Sequence[AnyOperation]) -> None:
        on_the_wire.set()
        assert go_on.wait(_DEADLINE_S)

    tap.before = wait
    threads = [threading.Thread(target=storage.get_all_studies)]
    threads[0].start()
    assert on_the_wire.wait(_DEADLINE_S)
    exchanger = storage._exchanger
    for call in calls:
        n_before = len(exchanger._gathered) + len(exchanger._waiting)
        threads.append(threading.Thread(target=call))
        threads[-1].start()
        wait_until(
            lambda n=n_before: len(exchanger._gathered) + len(exchanger._waiting) > n, "a call"
        )
    try:
        yield
    finally:
        go_on.set()
    for thread in threads:
        thread.join(_DEADLINE_S)
        assert not thread.is_alive()


def test_those_who_need_the_wire_for_themselves_and_calls_take_turns(
    storage: Storage, tap: _Tap, study_id: int
) -> None:
    """Else a thread that calls again and again leaves it to nobody, a heartbeat or a fork."""
    order: list[str] = []

    def call_twice() -> None:
        for _ in range(2):
            storage.get_n_trials(study_id)

    def use(log: object) -> None:
        order.append("use")

    use_log = functools.partial(storage._exchanger.use_log, use)
    with _gathered(storage, tap, [use_log, use_log, use_log, call_twice]):
        tap.after = lambda records: order.append("exchange")
    assert order == ["exchange", "use", "exchange", "use", "exchange", "use"]


def test_nobody_scans_or_closes_the_log_beside_an_exchange(
    storage: Storage, tap: _Tap, study_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "flush", lambda: None)  # which waits, but not for the next one
    scans: list[Scan] = []
    with _gathered(storage, tap, [storage.close, lambda: scans.append(storage.scan())]):
        assert not scans
        tap.before = lambda records: None
    (scan,) = scans
    trials = functools.partial(list, scan.trials(study_id))
    with _gathered(storage, tap, [trials]):
        tap.before = lambda records: None


class _Contended:
    """A mutex that another thread has, and an interrupt comes while this one waits for it."""

    def __init__(self, mutex: Any) -> None:
        self._mutex = mutex
        self.interrupts = False

    def __enter__(self) -> None:
        if self.interrupts:
            self.interrupts = False
            raise KeyboardInterrupt
        self._mutex.acquire()

    def __exit__(self, *error: object) -> None:
        self._mutex.release()


@pytest.mark.parametrize("error", [None, LogUnavailableError("away")], ids=repr)
def test_an_interrupt_while_the_lead_is_given_back_leaves_it_to_others(
    storage: Storage, tap: _Tap, study_id: int, error: Exception | None
) -> None:
    exchanger = storage._exchanger
    mutex = exchanger.mutex
    contended = _Contended(mutex)

    def fail(records: object) -> None:
        contended.interrupts = True
        if error is not None:
            raise error

    tap.before = fail
    exchanger.mutex = cast(Any, contended)
    with pytest.raises(KeyboardInterrupt):
        if error is None:
            exchanger.use_log(fail)
        else:
            storage.set_study_user_attr(study_id, "k", 1)
    tap.before = lambda records: None
    exchanger.mutex = mutex
    run_threads(storage.flush)
    assert exchanger._leader is None


def test_what_a_lost_conditional_append_decided_is_not_decided_again(log: MemoryLog) -> None:
    storage = Storage(_ToldTwice(log))
    study_id = storage.create_new_study([StudyDirection.MINIMIZE])
    outcomes = storage.write_if(
        lambda replica: [CreateTrial(study_id=study_id, datetime_start=None, **storage.marks())],
        Wanted(trials_of=frozenset((study_id,))),
    )
    assert outcomes == [Outcome(Verdict.ACCEPTED, 0)]
    assert len(Storage(log).get_all_trials(study_id)) == 1


def test_a_failure_reaches_every_thread_that_took_part(
    storage: Storage, tap: _Tap, study_id: int
) -> None:
    first_is_on_the_wire, go_on = threading.Event(), threading.Event()

    def hold_then_fail(records: Sequence[AnyOperation]) -> None:
        if not first_is_on_the_wire.is_set():
            first_is_on_the_wire.set()
            assert go_on.wait(_DEADLINE_S)
        raise LogUnavailableError("away")

    tap.before = hold_then_fail
    errors: list[BaseException] = []

    def create() -> None:
        try:
            storage.create_new_trial(study_id)
        except LogUnavailableError as error:
            errors.append(error)

    threads = [threading.Thread(target=create) for _ in range(5)]
    threads[0].start()
    assert first_is_on_the_wire.wait(_DEADLINE_S)
    for thread in threads[1:]:
        thread.start()
    while len(storage._exchanger._gathered) < 4:
        threads[1].join(0.001)
    go_on.set()
    for thread in threads:
        thread.join(_DEADLINE_S)
    assert len(errors) == 5
    tap.before = lambda records: None
    assert storage.get_n_trials(study_id) == 0


def test_a_write_on_somebody_elses_trial_is_written_through(
    storage: Storage, log: MemoryLog, tap: _Tap, study_id: int
) -> None:
    other = Storage(log, linger_s=0)
    trial_id = _started_trial(other, study_id)
    storage.set_trial_user_attr(trial_id, "k", 1)
    assert other.get_trial(trial_id).user_attrs == {"k": 1}


def test_telling_somebody_elses_trial_waits_out_the_linger(log: MemoryLog) -> None:
    slept: list[float] = []

    class Slept(Clock):
        def sleep(self, duration_s: float) -> None:
            slept.append(duration_s)
            asker.flush()  # what the asker's linger thread does meanwhile

    asker = Storage(log, clock=ManualClock())
    teller = Storage(log, linger_s=0.5, clock=Slept())
    study_id = asker.create_new_study([StudyDirection.MINIMIZE], "study")
    trial_id = _started_trial(asker, study_id)
    asker.set_trial_user_attr(trial_id, "k", 1)
    teller.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0])
    assert slept == [1.0]
    assert teller.get_trial(trial_id).user_attrs == {"k": 1}


def test_a_refused_value_sends_nothing(storage: Storage, tap: _Tap, study_id: int) -> None:
    trial_id = _started_trial(storage, study_id)
    n_exchanges = len(tap.sent)
    refused: list[tuple[type[Exception], Callable[[], Any]]] = [
        (TypeError, lambda: storage.set_trial_user_attr(trial_id, "k", object())),
        (TypeError, lambda: storage.set_trial_user_attr(trial_id, 3, 1)),  # type: ignore[arg-type]
        (ValueError, lambda: storage.set_trial_param(trial_id, "x", float("nan"), _X)),
        (
            ValueError,
            lambda: storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [float("nan")]),
        ),
        (
            ValueError,
            lambda: storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0, 2.0]),
        ),
        (TypeError, lambda: storage.set_trial_intermediate_value(trial_id, 0.5, 1.0)),  # type: ignore[arg-type]
        (TypeError, lambda: storage.create_new_study(["minimize"])),  # type: ignore[list-item]
        (ValueError, lambda: storage.create_new_study([])),
    ]
    for error, call in refused:
        with pytest.raises(error):
            call()
    assert len(tap.sent) == n_exchanges


def _refuse_bad(records: Sequence[AnyOperation]) -> None:
    if any("bad" in getattr(record, "user_attr", {}) for record in records):
        raise ValueError("bad does not fit")


def test_a_record_that_the_log_can_t_keep_does_not_keep_others_out(
    storage: Storage, tap: _Tap, study_id: int
) -> None:
    tap.before = _refuse_bad
    first, second = _started_trial(storage, study_id), _started_trial(storage, study_id)
    storage.set_trial_user_attr(first, "bad", 1)
    storage.set_trial_user_attr(first, "good", 1)
    storage.set_trial_user_attr(second, "good", 1)
    storage.set_trial_state_values(second, TrialState.COMPLETE, [0.0])
    assert storage.get_trial(second).user_attrs == {"good": 1}
    with pytest.raises(UpdateFinishedTrialError, match="bad does not fit"):
        storage.get_trial(first)
    assert storage.get_trial(first).user_attrs == {"good": 1}


def test_whose_record_was_stored_before_the_log_went_away_is_told_so(
    storage: Storage, tap: _Tap, log: MemoryLog, study_id: int
) -> None:
    told: dict[str, object] = {}
    stored: list[object] = []

    def go_away(records: Sequence[AnyOperation]) -> None:
        _refuse_bad(records)
        if stored and records:
            raise LogUnavailableError("away")
        stored.extend(records)

    def call(key: str) -> None:
        try:
            told[key] = storage.set_study_user_attr(study_id, key, 1)
        except Exception as error:
            told[key] = error

    # Whoever of them leads, at least one comes after the one that is stored.
    with _gathered(storage, tap, [functools.partial(call, key) for key in ("bad", "a", "b")]):
        tap.before = go_away
    assert Storage(log).get_study_user_attrs(study_id).keys() == {
        key for key, answer in told.items() if answer is None
    }
    assert sorted(type(answer).__name__ for key, answer in told.items() if key != "bad") == [
        "LogUnavailableError",
        "NoneType",
    ]
    assert isinstance(told["bad"], (ValueError, LogUnavailableError))


def test_who_is_refused_takes_the_lead_from_nobody(
    storage: Storage, tap: _Tap, study_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its end of the lead and its error, another thread may have begun to lead."""
    exchanger = storage._exchanger
    release = exchanger._release_lead
    another = -1

    def release_and_lose() -> None:
        release()
        exchanger._leader = another

    tap.before = _refuse_bad
    monkeypatch.setattr(exchanger, "_release_lead", release_and_lose)
    with pytest.raises(ValueError, match="does not fit"):
        storage.set_study_user_attr(study_id, "bad", 1)
    leader, exchanger._leader = exchanger._leader, None  # or a fork would wait for it
    assert leader == another


def test_a_trial_is_not_told_without_what_the_log_can_t_keep(
    storage: Storage, tap: _Tap, study_id: int
) -> None:
    tap.before = _refuse_bad
    trial_id = _started_trial(storage, study_id)
    storage.set_trial_user_attr(trial_id, "good", 1)
    storage.set_trial_user_attr(trial_id, "bad", 1)
    assert storage.get_trial(trial_id).user_attrs == {"good": 1, "bad": 1}
    with pytest.raises(UpdateFinishedTrialError, match="bad does not fit"):
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0])
    trial = storage.get_trial(trial_id)
    assert (trial.state, trial.user_attrs) == (TrialState.RUNNING, {"good": 1})
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0])
    assert storage.get_trial(trial_id).state == TrialState.COMPLETE


def _stale_reader(tap: _Tap, clock: ManualClock) -> Storage:
    # Its linger ends by the same clock; no test here advances that far.
    return Storage(tap, linger_s=60.0, max_staleness_s=10.0, clock=clock)


def test_an_answer_may_be_as_old_as_the_staleness_and_no_older(log: MemoryLog, tap: _Tap) -> None:
    writer, clock = Storage(log, linger_s=0), ManualClock()
    reader = _stale_reader(tap, clock)
    study_id = writer.create_new_study([StudyDirection.MINIMIZE], "study")
    assert reader.get_n_trials(study_id) == 0
    writer.create_new_trial(study_id)
    n_exchanges = len(tap.sent)
    clock.advance(10.0)
    assert (reader.get_n_trials(study_id), len(tap.sent)) == (0, n_exchanges)
    clock.advance(0.5)
    assert (reader.get_n_trials(study_id), len(tap.sent)) == (1, n_exchanges + 1)


def test_a_stale_reader_sees_its_own_writes_also_those_on_the_wire(
    tap: _Tap, study_id: int
) -> None:
    storage = _stale_reader(tap, ManualClock())
    trial_id = _started_trial(storage, study_id)
    storage.get_all_trials(study_id)
    storage.set_trial_user_attr(trial_id, "k", 1)
    assert storage.get_all_trials(study_id)[0].user_attrs == {"k": 1}

    storage.set_trial_user_attr(trial_id, "k", 2)
    on_the_wire, go_on = threading.Event(), threading.Event()

    def wait(records: Sequence[AnyOperation]) -> None:
        if records:
            on_the_wire.set()
            assert go_on.wait(_DEADLINE_S)

    tap.before = wait
    flusher = threading.Thread(target=storage.flush)
    flusher.start()
    assert on_the_wire.wait(_DEADLINE_S)
    seen: list[object] = []
    reader = threading.Thread(
        target=lambda: seen.append(storage.get_all_trials(study_id)[0].user_attrs)
    )
    reader.start()
    # Not answered while the write is away; served by the next exchange.
    while not storage._exchanger._gathered and reader.is_alive():
        pass
    go_on.set()
    flusher.join(_DEADLINE_S)
    reader.join(_DEADLINE_S)
    assert seen == [{"k": 2}]


def test_a_stale_reader_sees_its_own_writes_though_another_thread_read_before_them(
    tmp_path: Path,
) -> None:
    """On tables, whose news are only what was wanted."""
    url = f"sqlite:///{tmp_path}/tables.db"
    tap = _Tap(cast(Any, TablesLog(url)))
    storage, other = _stale_reader(tap, ManualClock()), Storage(TablesLog(url))
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    other.set_study_user_attr(study_id, "others", 1)  # so that storage reads back what it writes
    read, go_on = threading.Event(), threading.Event()

    def wait(records: Sequence[AnyOperation]) -> None:
        tap.after = lambda records: None
        read.set()
        assert go_on.wait(_DEADLINE_S)

    tap.after = wait
    reader = threading.Thread(target=storage.get_study_user_attrs, args=(study_id,))
    reader.start()
    assert read.wait(_DEADLINE_S)
    writer = threading.Thread(target=storage.set_study_user_attr, args=(study_id, "k", 1))
    writer.start()
    while not storage._exchanger._gathered and writer.is_alive():
        pass
    go_on.set()
    reader.join(_DEADLINE_S)
    writer.join(_DEADLINE_S)
    assert storage.get_study_user_attrs(study_id) == {"others": 1, "k": 1}
    storage.close()
    other.close()


def test_a_flush_of_nothing_waits_for_nobody(storage: Storage, study_id: int) -> None:
    """Whoever has the log may have it for long: a beat, when the log is away."""
    has_it, go_on = threading.Event(), threading.Event()

    def use(log: object) -> None:
        has_it.set()
        go_on.wait(_DEADLINE_S)

    user = threading.Thread(target=storage._exchanger.use_log, args=(use,))
    user.start()
    assert has_it.wait(_DEADLINE_S)
    storage.flush()
    assert user.is_alive()
    go_on.set()
    user.join(_DEADLINE_S)


def test_an_interrupt_at_any_moment_leaves_the_lead_to_others(
    storage: Storage, study_id: int
) -> None:
    trial_id = _started_trial(storage, study_id)
    for moment in itertools.count(1):
        storage.set_trial_user_attr(trial_id, "k", moment)
        if not is_interrupted_at(moment, storage.flush, exchange.__file__):
            break
        run_threads(storage.flush)
        assert storage.get_trial(trial_id).user_attrs == {"k": moment}
    assert moment > 20


@pytest.mark.parametrize("error", [None, LogUnavailableError("away")], ids=repr)
def test_an_interrupt_at_any_moment_of_another_use_of_the_log_leaves_the_lead_to_others(
    storage: Storage, tap: _Tap, error: Exception | None
) -> None:
    """A lease, a scan, ``close``; and of an exchange that fails."""

    def fail(records: object) -> None:
        if error is not None:
            raise error

    def use() -> None:
        with contextlib.suppress(LogUnavailableError):
            storage._exchanger.use_log(fail)
        with contextlib.suppress(LogUnavailableError):
            storage.get_all_studies()

    for moment in itertools.count(1):
        tap.before = fail
        interrupted = is_interrupted_at(moment, use, exchange.__file__, contextlib.__file__)
        tap.before = lambda records: None
        assert storage._exchanger._leader is None
        if not interrupted:
            break
    assert moment > 20


def test_who_only_reads_does_not_hear_of_the_interrupt_of_another_thread(
    storage: Storage, tap: _Tap, study_id: int
) -> None:
    """The exchange that takes them along is interrupted, whoever leads; the others go again."""
    answers: list[object] = []

    def read() -> None:
        try:
            answers.append(storage.get_n_trials(study_id))
        except KeyboardInterrupt as interrupt:
            answers.append(interrupt)

    def interrupt(records: Sequence[AnyOperation]) -> None:
        tap.before = lambda records: None
        raise KeyboardInterrupt

    with _gathered(storage, tap, [read, read, read]):
        tap.before = interrupt
    assert sorted(map(repr, answers)) == ["0", "0", "KeyboardInterrupt()"]


def _give_up_what_is_held(storage: Storage, log: MemoryLog) -> None:
    """As an interrupt does while news are taken in."""
    Storage(log).create_new_study([StudyDirection.MINIMIZE])
    for moment in itertools.count(1):
        use = functools.partial(storage._exchanger.run, (), Wanted())
        assert is_interrupted_at(moment, use, exchange.__file__, replica.__file__)
        if not storage._replica.study_ids():
            return


def test_a_thread_is_answered_though_another_was_interrupted_before(
    storage: Storage, log: MemoryLog, study_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = storage._exchanger.run

    def run_and_be_overtaken(*args: Any, **options: Any) -> Any:
        outcomes = run(*args, **options)
        monkeypatch.undo()
        run_threads(functools.partial(_give_up_what_is_held, storage, log))
        return outcomes

    for ask, answer in [
        (lambda: storage.get_n_trials(study_id), 0),
        (lambda: len(storage.get_all_studies()) > 0, True),
        (lambda: storage.set_study_user_attr(study_id, "k", 1), None),
    ]:
        with monkeypatch.context() as patch:
            # As if it was not known yet, so that a write looks as well.
            patch.setattr(storage._replica, "judge", lambda record: Outcome(Verdict.NO_STUDY))
            monkeypatch.setattr(storage._exchanger, "run", run_and_be_overtaken)
            assert ask() == answer


def test_an_answer_of_before_an_interrupt_is_not_given_from_what_is_left(log: MemoryLog) -> None:
    storage = Storage(log, max_staleness_s=60.0, clock=ManualClock())
    storage.create_new_study([StudyDirection.MINIMIZE])
    assert len(storage.get_all_studies()) == 1
    _give_up_what_is_held(storage, log)
    assert len(storage.get_all_studies()) == 2


_WRITES: dict[str, Callable[[Storage, int], None]] = {
    "param": lambda storage, trial_id: storage.set_trial_param(trial_id, "x", 0.25, _X),
    "value": lambda storage, trial_id: storage.set_trial_intermediate_value(trial_id, 0, math.nan),
    "user_attr": lambda storage, trial_id: storage.set_trial_user_attr(trial_id, "k", (1, [2])),
    "system_attr": lambda storage, trial_id: storage.set_trial_system_attr(trial_id, "k", None),
}


@pytest.mark.parametrize("write", _WRITES.values(), ids=_WRITES)
def test_what_was_stored_before_an_interrupt_is_not_told_as_lost(
    storage: Storage, study_id: int, write: Callable[[Storage, int], None]
) -> None:
    """The tell took the write along; whether it did is not known after an interrupt."""
    _started_trial(storage, study_id)
    n_finished = 0
    for moment in itertools.count(1):
        trial_id = storage.create_new_trial(study_id)
        write(storage, trial_id)
        told = storage.get_trial(trial_id)
        tell = functools.partial(storage.set_trial_state_values, trial_id, TrialState.COMPLETE)
        if not is_interrupted_at(moment, functools.partial(tell, [0.0]), exchange.__file__):
            break
        storage.flush()
        trial = storage.get_trial(trial_id)
        n_finished += trial.state.is_finished()
        assert repr(trial.params) == repr(told.params)
        assert repr(trial.intermediate_values) == repr(told.intermediate_values)
        assert (trial.user_attrs, trial.system_attrs) == (told.user_attrs, told.system_attrs)
    assert 0 < n_finished < moment > 20


def _until_the_linger_ends(storage: Storage, clock: ManualClock) -> None:
    while storage._exchanger._linger_thread is not None:
        clock.advance(1.0)


def test_one_thread_lingers_for_trials_in_a_row_and_ends(storage: Storage, log: MemoryLog) -> None:
    clock = ManualClock()
    storage = Storage(log, linger_s=1.0, clock=clock)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    threads = set()
    for number in range(3):
        trial_id = _started_trial(storage, study_id)
        storage.set_trial_user_attr(trial_id, "k", number)
        threads.add(storage._exchanger._linger_thread)
        clock.until_waiting()
        clock.advance(1.0)
        while storage._exchanger.has_deferred():
            pass
        clock.until_waiting()
    assert len(threads) == 1
    _until_the_linger_ends(storage, clock)


def test_what_a_failed_lead_gives_back_lingers_again(log: MemoryLog, tap: _Tap) -> None:
    """The linger thread may have ended while the outbox was on the wire."""
    clock = ManualClock()
    storage = Storage(tap, linger_s=1.0, clock=clock)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    trial_id = _started_trial(storage, study_id)
    storage.set_trial_user_attr(trial_id, "k", 1)
    exchanger = storage._exchanger

    def fail(records: Sequence[AnyOperation]) -> None:
        tap.before = lambda records: None
        _until_the_linger_ends(storage, clock)  # it finds nothing, since all is on the wire
        raise LogUnavailableError("away")

    tap.before = fail
    clock.until_waiting()
    with pytest.raises(LogUnavailableError):
        storage.get_all_trials(study_id)
    clock.advance(60.0)
    while exchanger.has_deferred():
        pass
    assert Storage(log).get_trial(trial_id).user_attrs == {"k": 1}


def test_without_a_thread_to_linger_a_write_goes_through(
    storage: Storage, log: MemoryLog, study_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial_id = _started_trial(storage, study_id)

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        storage.set_trial_user_attr(trial_id, "k", 1)
    assert Storage(log).get_trial(trial_id).user_attrs == {"k": 1}
    storage.set_trial_user_attr(trial_id, "k", 2)
    assert storage._exchanger._linger_thread is not None
    assert storage._exchanger.has_deferred()


def test_news_are_applied_once_though_an_own_record_is_missing_in_them(
    log: MemoryLog, tap: _Tap
) -> None:
    other, storage = Storage(log, linger_s=0), Storage(tap, linger_s=0)
    study_id = other.create_new_study([StudyDirection.MINIMIZE], "study")
    storage.get_all_studies()
    other.create_new_trial(study_id)
    exchange = tap.exchange

    def late(records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        batch = exchange(records, cursor, wanted)
        return Batch(batch.outcomes, batch.news[:-1], batch.cursor - 1)

    tap.exchange = late  # type: ignore[method-assign]
    with pytest.raises(OutcomeUnknownError):
        storage.create_new_trial(study_id)
    tap.exchange = exchange  # type: ignore[method-assign]
    for reader in (storage, other):
        assert [trial.number for trial in reader.get_all_trials(study_id)] == [0, 1]


def test_a_flush_ends_though_others_go_on_exchanging(
    storage: Storage, tap: _Tap, study_id: int
) -> None:
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            storage.get_n_trials(study_id)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    try:
        run_threads(*[storage.flush] * 20)
    finally:
        stop.set()
        for reader in readers:
            reader.join(_DEADLINE_S)


def test_use_from_within_an_own_exchange_is_refused(
    storage: Storage, tap: _Tap, study_id: int
) -> None:
    refused: list[Exception] = []

    def use(records: Sequence[AnyOperation]) -> None:
        tap.before = lambda records: None
        try:
            storage.get_n_trials(study_id)
        except RuntimeError as error:
            refused.append(error)

    tap.before = use
    storage.create_new_trial(study_id)
    assert len(refused) == 1 and "own exchange" in str(refused[0])
    assert storage.get_n_trials(study_id) == 1


def test_a_storage_that_can_not_flush_at_exit_does_not_keep_others_from_it(
    log: MemoryLog, tap: _Tap, study_id: int, storage: Storage
) -> None:
    trial_id = _started_trial(storage, study_id)
    storage.set_trial_user_attr(trial_id, "k", 1)
    broken = Storage(_Tap(MemoryLog()), clock=ManualClock())
    broken_id = _started_trial(broken, broken.create_new_study([StudyDirection.MINIMIZE], "study"))
    broken.set_trial_user_attr(broken_id, "k", 1)

    def fail(records: Sequence[AnyOperation]) -> None:
        raise ValueError("whatever")

    broken._exchanger.log.before = fail  # type: ignore[attr-defined]
    alive = exchange._alive
    try:
        exchange._alive = [broken._exchanger, storage._exchanger]  # type: ignore[assignment]
        exchange._flush_all()
    finally:
        exchange._alive = alive
    assert Storage(log).get_trial(trial_id).user_attrs == {"k": 1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="There is no fork here.")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_threads_may_fork_at_once(storage: Storage, study_id: int) -> None:
    worker_id = storage._exchanger.worker_id

    def fork() -> None:
        for _ in range(50):
            child = os.fork()
            if child == 0:
                os._exit(storage._exchanger.worker_id == worker_id)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    run_threads(fork, fork, fork)
    assert storage.get_n_trials(study_id) == 0


class _Growing(weakref.WeakSet[Any]):
    """Another thread adds to it while it is gone through for the first time."""

    is_grown = False

    def __iter__(self) -> Iterator[Any]:
        members = super().__iter__()
        yield next(members)
        if not self.is_grown:
            self.is_grown = True
            raise RuntimeError("Set changed size during iteration")
        yield from members


def test_a_storage_that_is_opened_during_a_fork_keeps_no_other_from_being_held(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor from bringing what it has put off to the log at the end of the process."""
    members = [Storage(MemoryLog())._exchanger, storage._exchanger]
    monkeypatch.setattr(exchange._fork, "_members", _Growing(members))
    exchange._fork.hold()
    held = set(exchange._fork._held)
    exchange._fork.release()
    assert held == set(members)


def test_in_memory_everything_stays_in_a_child_of_a_fork_that_did_not_wait() -> None:
    storage = InMemoryStorage()
    study_id = storage.create_new_study([StudyDirection.MINIMIZE])
    storage._exchanger.begin_in_child(held=False)
    assert storage.get_n_trials(study_id) == 0


class _Overtaken:
    """An attribute; while it is pickled another thread writes."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write

    def __reduce__(self) -> tuple[Any, ...]:
        self._write()
        return (int, (1,))


def test_in_memory_others_may_write_while_the_storage_is_pickled() -> None:
    storage = InMemoryStorage()
    trial_id = storage.create_new_trial(storage.create_new_study([StudyDirection.MINIMIZE]))
    write = functools.partial(storage.set_trial_user_attr, trial_id)
    write("k", _Overtaken(lambda: write("late", 2)))
    write("l", 3)
    copied = pickle.loads(pickle.dumps(storage))
    assert copied.get_trial(trial_id).user_attrs == {"k": 1, "l": 3}


def test_an_interrupt_while_a_fork_waits_leaves_nothing_held(
    storage: Storage, tap: _Tap, study_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``os.fork`` goes on after it, and runs the hooks that come after."""
    others = [Storage(MemoryLog(), clock=ManualClock()) for _ in range(2)]
    exchanger = storage._exchanger
    on_the_wire, go_on = threading.Event(), threading.Event()

    def wait(records: Sequence[AnyOperation]) -> None:
        on_the_wire.set()
        assert go_on.wait(_DEADLINE_S)

    tap.before = wait
    reader = threading.Thread(target=storage.get_n_trials, args=(study_id,))
    reader.start()
    assert on_the_wire.wait(_DEADLINE_S)

    def interrupt() -> None:
        raise KeyboardInterrupt

    for first in ([exchanger], [others[0]._exchanger, exchanger, others[1]._exchanger]):
        with monkeypatch.context() as patch:
            patch.setattr(exchange._fork, "_members", set(first))
            patch.setattr(exchanger._exchanged, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                exchange._fork.hold()
            exchange._fork.release()
    go_on.set()
    reader.join(_DEADLINE_S)
    tap.before = lambda records: None
    run_threads(storage.flush, *(other.flush for other in others))
    assert storage.get_n_trials(study_id) == 0


def test_an_interrupt_at_any_moment_of_a_fork_leaves_nothing_held(
    storage: Storage, study_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Storage(MemoryLog(), clock=ManualClock())
    monkeypatch.setattr(exchange._fork, "_members", {storage._exchanger, other._exchanger})
    for moment in itertools.count(1):
        interrupted = is_interrupted_at(
            moment, exchange._fork.hold, exchange.__file__, processes.__file__
        )
        with contextlib.suppress(RuntimeError):  # not even begun
            exchange._fork.release()
        run_threads(storage.flush, other.flush)
        if not interrupted:
            break
    assert moment > 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="There is no fork here.")
def test_a_child_of_a_fork_that_did_not_wait_reads_anew(storage: Storage, study_id: int) -> None:
    trial_id = _started_trial(storage, study_id)
    exchanger = storage._exchanger
    exchanger.mutex = threading.RLock()
    other = threading.Thread(target=exchanger.mutex.acquire)
    other.start()
    other.join(_DEADLINE_S)  # as in the middle of an exchange, for ever
    processes._one_fork.acquire()
    exchange._begin_all()  # what runs in the child
    assert storage.get_trial(trial_id).params == {"x": 0.5}


# --- what is dropped -----------------------------------------------------------------------------


def _storage_with_a_running_trial(path: Path | None) -> tuple[Any, Any]:
    """And its finished trial, as the replica holds it."""
    storage: Any = InMemoryStorage() if path is None else _on_a_file(path)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    finished = storage.create_new_trial(study_id)
    storage.set_trial_state_values(finished, TrialState.COMPLETE, [1.0])
    storage.create_new_trial(study_id)
    trials = storage.get_all_trials(study_id, deepcopy=False)
    assert storage.get_trial(finished) is trials[0]
    return storage, weakref.ref(trials[0])


def _on_a_file(path: Path) -> Storage:
    return JournalStorage(JournalFileBackend(str(path)), linger_s=0)


@pytest.mark.parametrize("on_file", [False, True])
def test_a_dropped_storage_is_freed_without_a_collection(on_file: bool, tmp_path: Path) -> None:
    path = tmp_path / "journal" if on_file else None
    gc.collect()
    gc.disable()
    try:
        storage, trial = _storage_with_a_running_trial(path)
        assert trial() is not None
        del storage
        assert trial() is None
    finally:
        gc.enable()


_LEAVES = """
import gc, sys, optuna
from trialstore.journal import JournalFileBackend, JournalStorage

def use(path):
    storage = JournalStorage(JournalFileBackend(path), linger_s=0)
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler())
    study.tell(study.ask(), 1.0)
    study.ask()

optuna.logging.set_verbosity(optuna.logging.ERROR)
use(sys.argv[1])
gc.collect()
gc.disable()
use(sys.argv[2])
gc.set_debug(gc.DEBUG_SAVEALL)
gc.collect()
print(*{type(left).__module__.partition(".")[0] for left in gc.garbage})
"""


def test_a_storage_on_a_journal_file_leaves_nothing_to_collect(tmp_path: Path) -> None:
    """In a process of its own, where nobody else leaves anything."""
    program = [sys.executable, "-c", _LEAVES, f"{tmp_path}/one", f"{tmp_path}/other"]
    told = subprocess.run(program, check=True, capture_output=True, text=True, timeout=60)
    assert {"trialstore", "ctypes", "_ctypes"}.isdisjoint(told.stdout.split())


def test_what_was_read_of_the_queue_outlives_the_storage() -> None:
    storage = InMemoryStorage()
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    template = create_trial(state=TrialState.WAITING, system_attrs={"a": 1})
    storage.create_new_trial(study_id, template)
    waiting = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.WAITING,))
    del storage
    assert [trial.system_attrs for trial in waiting] == [{"a": 1}]
