"""The beating of one storage: when it begins and ends, what stops it, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import gc
import itertools
import multiprocessing
import os
from pathlib import Path
import subprocess
import sys
import threading
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
import pytest

from ageing import age_beats, age_leases
from backends import ListBackend
from interrupts import is_interrupted_at
import trialstore
from trialstore import heartbeat
from trialstore.callbacks import HAS_NEW_NAMES
from trialstore.clock import Clock
from trialstore.errors import LogUnavailableError
from trialstore.journal import JournalFileBackend, JournalStorage
from trialstore.replica import Replica
from trialstore.testing.clock import ManualClock
from trialstore.testing.suites.base import count_exchanges, run_threads, wait_until

_ASK = """
import sys, optuna, trialstore
backend = trialstore.journal.JournalFileBackend(sys.argv[1])
storage = trialstore.JournalStorage(backend, heartbeat_interval=60)
trial_id = storage.create_new_trial(storage.get_study_id_from_name("study"))
"""
_TELL = "storage.set_trial_state_values(trial_id, optuna.trial.TrialState.FAIL)"
_RETRY = trialstore.RetryFailedTrialCallback()
_EXIT = """
import signal, os
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
study = optuna.load_study(study_name="study", storage=storage)
study.optimize(lambda trial: os.kill(os.getpid(), signal.SIGTERM) or 0.0)
"""


def _open(path: Path, **options: Any) -> JournalStorage:
    options = {"heartbeat_interval": 60, "clock": ManualClock(), **options}
    return JournalStorage(JournalFileBackend(str(path)), **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    _open(path).create_new_study([StudyDirection.MINIMIZE], "study")
    return path


def _n_leases(path: Path) -> int:
    return len(list(Path(f"{path}.beats").glob("*.beat")))


# --- the end of a process ------------------------------------------------------------------------


def _ask_in_child(path: Path, tells: bool) -> None:
    storage = _open(path)
    trial_id = storage.create_new_trial(0)
    if tells:
        storage.set_trial_state_values(trial_id, TrialState.FAIL)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_withdraws_its_lease_if_it_leaves_no_trial(path: Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"There is no {method}.")
    for tells, n_leases in ((True, 0), (False, 1)):
        context = multiprocessing.get_context(method)
        child: Any = context.Process(target=_ask_in_child, args=(path, tells))  # type: ignore[attr-defined]
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert _n_leases(path) == n_leases


@pytest.mark.parametrize(
    ("end", "n_lost"),
    [
        (f"{_TELL}", 0),
        (f"{_TELL}; raise KeyboardInterrupt", 0),
        ("storage.close()", 0),
        (f"{_TELL}; sys.exit(1)", 0),
        ("sys.exit(1)", 1),
        (f"{_TELL}\n{_EXIT}", 1),
    ],
)
def test_a_trial_that_a_program_leaves_at_its_end_is_found(
    path: Path, end: str, n_lost: int
) -> None:
    program = [sys.executable, "-c", f"{_ASK}\n{end}", str(path)]
    subprocess.run(program, check=False, capture_output=True, timeout=60)
    assert _n_leases(path) == n_lost
    age_beats(Path(f"{path}.beats"), 1000)
    assert len(_open(path).fail_stale_trials()) == n_lost


# --- the thread ----------------------------------------------------------------------------------


def test_a_beat_that_fails_is_tried_again_soon(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = _open(path)
    clock: Any = storage._clock
    storage.create_new_trial(0)
    log: Any = storage._exchanger.log
    beats: list[bool] = []

    def renew(owner: str, trial_ids: Sequence[int]) -> None:
        beats.append(len(beats) >= 2)
        if not beats[-1]:
            raise LogUnavailableError("It is away.")

    monkeypatch.setattr(log, "renew_lease", renew)
    for pause_s in (60, 1, 1, 60):
        clock.until_waiting()
        n_beats = len(beats)
        clock.advance(pause_s)
        wait_until(lambda n=n_beats: len(beats) == n + 1, "a beat")  # type: ignore[misc]
    clock.until_waiting()
    assert beats == [False, False, True, True]
    assert caplog.text.count("It is away.") == 1
    storage.close()


def test_one_thread_beats_for_all_threads_that_create_trials(path: Path) -> None:
    storage = _open(path)
    taken: list[str] = []
    log: Any = storage._exchanger.log
    take = log.take_lease
    log.take_lease = lambda owner: (taken.append(owner), take(owner))
    run_threads(*[lambda: storage.create_new_trial(0)] * 8)
    storage._clock.until_waiting(1)  # type: ignore[attr-defined]
    assert {*taken} == {storage._exchanger.worker_id} and _n_leases(path) == 1
    storage.close()
    assert _n_leases(path) == 0


def test_the_thread_ends_where_its_trial_was_told_through_another_storage(path: Path) -> None:
    storage = _open(path)
    clock: Any = storage._clock
    trial_id = storage.create_new_trial(0)
    clock.until_waiting()
    counter = count_exchanges(storage)
    _open(path, heartbeat_interval=None).set_trial_state_values(trial_id, TrialState.COMPLETE, [1])
    for n_beats in range(1, 2 * heartbeat._BEATS_A_LOOK):
        clock.advance(60)
        wait_until(
            lambda n=n_beats: counter.used["renew_lease"] == n or _n_leases(path) == 0,  # type: ignore[misc]
            "a beat",
        )
        if _n_leases(path) == 0:
            break
        clock.until_waiting()
    assert n_beats > heartbeat._BEATS_A_LOOK and _n_leases(path) == 0
    assert len(counter.wanted) == 1 and not storage._beats().is_beating


def test_a_storage_that_is_dropped_ends_its_thread(path: Path) -> None:
    n_before = threading.active_count()
    gc.disable()
    try:
        for _ in range(5):
            storage = _open(path, clock=Clock())
            trial_id = storage.create_new_trial(0)
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        del storage
        wait_until(lambda: _n_leases(path) == 0, "the leases are withdrawn")
        wait_until(lambda: threading.active_count() <= n_before, "the threads end")
    finally:
        gc.enable()


def test_a_trial_that_a_dropped_storage_leaves_is_beaten_for(path: Path) -> None:
    storage = _open(path)
    clock: Any = storage._clock
    storage.create_new_trial(0)
    clock.until_waiting()
    counter, beating = count_exchanges(storage), storage._beats()
    del storage
    wait_until(lambda: counter.used["renew_lease"] == 1, "a beat as it is dropped")
    clock.until_waiting()
    clock.advance(60)
    wait_until(lambda: counter.used["renew_lease"] == 2, "the next one")
    assert _n_leases(path) == 1
    beating.withdraw()


def test_nothing_is_created_where_no_lease_can_be_taken(path: Path) -> None:
    Path(f"{path}.beats").write_text("in the way")
    with pytest.raises(LogUnavailableError, match="no lease can be kept"):
        _open(path).create_new_trial(0)
    assert _open(path).get_all_trials(0) == []


def test_a_trial_from_before_the_interval_was_set_is_covered_by_its_first_beat(path: Path) -> None:
    storage, other = _open(path, heartbeat_interval=None), _open(path)
    trial_id = storage.create_new_trial(0)
    storage.heartbeat_interval = 60
    storage.record_heartbeat(trial_id)
    storage._clock.until_waiting(1)  # type: ignore[attr-defined]
    age_beats(Path(f"{path}.beats"), 1000)
    assert other.fail_stale_trials() == [trial_id]
    storage.close()


def test_where_no_thread_can_be_started_there_is_no_trial_and_no_lease(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = _open(path)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="can't start"):
                storage.create_new_trial(0)
    assert storage.get_all_trials(0) == [] and _n_leases(path) == 0
    storage.create_new_trial(0)
    storage._clock.until_waiting(1)  # type: ignore[attr-defined]
    storage.close()


def test_a_shorter_interval_counts_at_once(path: Path) -> None:
    storage = _open(path, heartbeat_interval=600)
    clock: Any = storage._clock
    storage.create_new_trial(0)
    clock.until_waiting()
    counter = count_exchanges(storage)
    storage.heartbeat_interval = 1
    clock.advance(1)
    wait_until(lambda: counter.used["renew_lease"] == 1, "a beat")
    storage.close()


def test_a_trial_that_is_being_created_during_close_is_covered(path: Path) -> None:
    storage = _open(path)
    storage.create_new_trial(0)

    def close() -> None:
        storage.close()
        assert _n_leases(path) == 1 and storage._beats().is_beating

    storage._beats().covering(close)
    storage.close()
    assert _n_leases(path) == 0 and not storage._beats().is_beating


def test_after_an_interrupt_of_a_creation_close_withdraws_the_lease(path: Path) -> None:
    storage = _open(path)
    create = functools.partial(storage.create_new_trial, 0)
    for moment in itertools.count(1):
        interrupted = is_interrupted_at(moment, create, heartbeat.__file__, contextlib.__file__)
        create()
        storage.close()
        assert _n_leases(path) == 0
        if not interrupted:
            break
    assert moment > 10


@pytest.mark.parametrize("interval_s", [60, None])
def test_a_beat_for_a_trial_of_nobody_leaves_no_lease(path: Path, interval_s: int | None) -> None:
    storage = _open(path, heartbeat_interval=interval_s)
    theirs = JournalFileBackend(str(path))
    created = {"op_code": 4, "worker_id": "", "study_id": 0}
    theirs.append_logs([{**created, "datetime_start": "2024-01-01T00:00:00.000000"}])
    storage.record_heartbeat(0)
    assert _n_leases(path) == 0
    storage.close()


def test_an_owner_in_a_journal_is_no_path(path: Path) -> None:
    storage = _open(path)
    outside = path.parent / "outside.beat"
    outside.touch()
    os.utime(outside, (0, 0))
    assert storage._exchanger.log.expired(0, {0: "../outside", 1: "", 2: "a" * 999}, 1.0) == []  # type: ignore[attr-defined]


def test_a_grace_period_that_fails_the_living_is_told_of(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for options in ({"grace_period": 61}, {"heartbeat_interval": None, "grace_period": 1}, {}):
        _open(path, **options)
    assert not caplog.records
    for too_short_s in (10, 60):
        storage = _open(path, grace_period=too_short_s)
    storage.heartbeat_interval = 90
    assert caplog.text.count("is then failed; heartbeat_interval is 60 s") == 2
    assert caplog.text.count("is then failed; heartbeat_interval is 90 s") == 1


# --- backends of one's own -----------------------------------------------------------------------


class LeasedBackend(ListBackend):
    """Optuna's two methods, and those of ``LeaseStore``; time is what a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.beats: dict[str, float] = {}

    def take_lease(self, owner: str) -> None:
        self.beats[owner] = self.now_s

    def renew_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        self.beats[owner] = self.now_s

    def withdraw_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        self.beats.pop(owner, None)

    def expired(
        self, study_id: int, running: Mapping[int, str], grace_period_s: float
    ) -> Sequence[int]:
        last = {id_: self.beats.get(owner, self.now_s) for id_, owner in running.items()}
        return [id_ for id_, beat_s in last.items() if self.now_s - beat_s > grace_period_s]


def test_a_backend_that_keeps_leases_has_heartbeats() -> None:
    backend, retry = LeasedBackend(), trialstore.RetryFailedTrialCallback()
    worker, reaper = (
        JournalStorage(
            backend,
            heartbeat_interval=60,
            heartbeat_stale_trial_callback=retry,
            clock=ManualClock(),
        )
        for _ in range(2)
    )
    study_id = worker.create_new_study([StudyDirection.MINIMIZE])
    trial_id = worker.create_new_trial(study_id)
    backend.now_s = 1000.0
    assert reaper.fail_stale_trials() == [trial_id] and reaper.fail_stale_trials() == []
    states = [trial.state.name for trial in reaper.get_all_trials(study_id)]
    assert states == ["FAIL", "WAITING"]
    worker.close()
    assert backend.beats == {}


def test_the_trials_of_a_dead_crowd_are_not_each_looked_for_among_the_others(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_trials, walks = 300, []
    newest_first = Replica.newest_first

    def counted(replica: Replica, study_id: int) -> Iterator[Any]:
        walks.append(study_id)
        return newest_first(replica, study_id)

    monkeypatch.setattr(Replica, "newest_first", counted)
    worker = _open(path)
    lost = [worker.create_new_trial(0) for _ in range(n_trials)]
    age_leases(worker, 1000.0)
    reaper = _open(path, heartbeat_stale_trial_callback=_RETRY)
    assert reaper.fail_stale_trials() == lost
    retries = reaper.get_all_trials(0, states=(TrialState.WAITING,))
    retried = [trial.system_attrs["retry_history"] for trial in retries]
    assert retried == [[number] for number in range(n_trials)]
    assert len(walks) == 2, "one for each append"


def test_a_backend_of_two_methods_says_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="LeaseStore"):
        JournalStorage(ListBackend(), heartbeat_interval=60)
    storage = JournalStorage(ListBackend())
    with pytest.raises(ValueError, match="keeps no leases"):
        storage.record_heartbeat(0)
    study = optuna.create_study(storage=storage)
    assert trialstore.enqueue_trial(study, {"x": 1})
    with pytest.raises(RuntimeError, match="on a condition"):
        trialstore.enqueue_trial(study, {"x": 1}, skip_if_exists=True)
    with pytest.raises(RuntimeError, match="on a condition"):
        trialstore.MaxTrials(1).ask(study)


# --- callbacks -----------------------------------------------------------------------------------


def test_a_callback_has_one_name_at_a_time(path: Path) -> None:
    retry = trialstore.RetryFailedTrialCallback()
    warned = pytest.warns(FutureWarning, match="heartbeat_stale_trial_callback")
    # Before Optuna 4.9 it is the only name, and warnings are errors here.
    with warned if HAS_NEW_NAMES else contextlib.nullcontext():
        assert _open(path, failed_trial_callback=retry).heartbeat_stale_trial_callback is retry
    with pytest.raises(ValueError, match="two names"):
        _open(path, failed_trial_callback=retry, heartbeat_stale_trial_callback=retry)
    with pytest.raises(ValueError, match="max_retry"):
        trialstore.RetryFailedTrialCallback(max_retry=-1)


class _Recording(trialstore.RetryHeartbeatStaleTrialCallback):
    def __init__(self) -> None:
        super().__init__(max_retry=1)
        self.seen: list[int] = []

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.seen.append(trial.number)
        super().__call__(study, trial)


def test_a_subclass_that_does_something_else_is_called(path: Path) -> None:
    worker, reaper = _open(path), _open(path, heartbeat_stale_trial_callback=_Recording())
    worker.create_new_trial(0)
    age_beats(Path(f"{path}.beats"), 1000)
    study = optuna.load_study(study_name="study", storage=reaper)
    assert trialstore.fail_stale_trials(study) == [0]
    callback: Any = reaper.heartbeat_stale_trial_callback
    assert callback.seen == [0]
    assert [trial.state.name for trial in study.trials] == ["FAIL", "WAITING"]


class _Marking(trialstore.RetryHeartbeatStaleTrialCallback):
    def retry(self, trial: FrozenTrial) -> FrozenTrial | None:
        template = super().retry(trial)
        assert template is not None
        template.set_user_attr("retried", True)
        return template


def test_a_subclass_says_what_its_retries_are(path: Path) -> None:
    worker, reaper = _open(path), _open(path, heartbeat_stale_trial_callback=_Marking())
    worker.create_new_trial(0)
    age_beats(Path(f"{path}.beats"), 1000)
    assert reaper.fail_stale_trials() == [0]
    assert reaper.get_trial(1).user_attrs == {"retried": True}


def test_storages_that_are_not_trialstores_are_refused_by_name() -> None:
    study = optuna.create_study(storage=optuna.storages.InMemoryStorage())
    for call in (
        lambda: trialstore.fail_stale_trials(study),
        lambda: trialstore.enqueue_trial(study, {}),
        lambda: trialstore.MaxTrials(1).ask(study),
    ):
        with pytest.raises(TypeError, match="InMemoryStorage"):
            call()
