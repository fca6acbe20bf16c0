"""Dead workers: found by the log's clock, failed once and retried once, whoever looks or dies.

Nothing waits here. The storages' own clocks stand still, so that they beat only when a test moves
them, and the log's time passes by the fixture ``age_leases``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import os
import pickle
import threading
from typing import Any
import warnings

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

import trialstore
from trialstore.log import Limited
from trialstore.storage import Storage
from trialstore.testing.clock import ManualClock
from trialstore.testing.suites.base import (
    UNIT,
    Capabilities,
    OpenStorage,
    SuiteBase,
    count_exchanges,
    exchanger_of,
    run_threads,
    wait_until,
)

AgeLeases = Callable[[Storage, float], None]
"""Let so many seconds pass by the clock of a storage's log."""

_INTERVAL_S = 60
_GRACE_S = 150
_LONG_S = 1000.0


def _names_of_retry() -> list[Any]:
    kinds = [trialstore.RetryHeartbeatStaleTrialCallback, trialstore.RetryFailedTrialCallback]
    for name in ("RetryHeartbeatStaleTrialCallback", "RetryFailedTrialCallback"):
        theirs = getattr(optuna.storages, name, None)
        if theirs is not None:
            kinds.append(theirs)
    return [pytest.param(kind, id=f"{kind.__module__}.{kind.__name__}") for kind in kinds]


def _quiet(call: Callable[[], Any]) -> Any:
    """Optuna calls its heartbeats experimental, at each use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def _optunas_fail(study: optuna.Study) -> None:
    _quiet(lambda: optuna.storages.fail_stale_trials(study))


def _load(storage: Storage) -> optuna.Study:
    return optuna.load_study(
        study_name="study", storage=storage, sampler=optuna.samplers.RandomSampler(seed=0)
    )


def _history(record: Any) -> Any:
    return (getattr(record, "system_attrs", None) or {}).get("retry_history")


def _states(storage: Storage, study_id: int) -> list[str]:
    return [trial.state.name for trial in storage.get_all_trials(study_id)]


class HeartbeatSuite(SuiteBase):
    """Part of ``StorageSuite``; supply ``age_leases`` where the log keeps leases."""

    @pytest.fixture
    def age_leases(self) -> AgeLeases:
        """Supply it with a storage whose log keeps leases."""
        pytest.skip("No age_leases fixture.")

    @pytest.fixture
    def open_beating(
        self, opened: OpenStorage, capabilities: Capabilities, age_leases: AgeLeases
    ) -> OpenStorage:
        """Opens a storage that beats, by a clock of its own that stands still."""
        if not capabilities.shared:
            pytest.skip("The store has one storage, which never holds itself for dead.")

        def open_one(**options: Any) -> Storage:
            storage = opened(clock=ManualClock(), **options)
            storage.heartbeat_interval = _INTERVAL_S
            storage.grace_period = _GRACE_S
            return storage

        return open_one

    @pytest.fixture
    def worker(self, open_beating: OpenStorage) -> Storage:
        """A storage whose death is only that time passes without its clock."""
        storage = open_beating()
        storage.create_new_study([StudyDirection.MINIMIZE], "study")
        return storage

    @pytest.fixture
    def lost(self, worker: Storage, age_leases: AgeLeases) -> int:
        """Id of a trial whose worker has not been heard of for long."""
        trial_id = worker.create_new_trial(_study_id(worker))
        worker.set_trial_param(trial_id, "x", 0.5, UNIT)
        worker.set_trial_user_attr(trial_id, "user", [1])
        worker.set_trial_system_attr(trial_id, "system", "kept")
        worker.set_trial_intermediate_value(trial_id, 3, 0.25)
        worker.flush()
        age_leases(worker, _LONG_S)
        return trial_id

    @pytest.fixture
    def reaper(self, worker: Storage, open_beating: OpenStorage) -> Storage:
        return open_beating()

    # --- who is stale ----------------------------------------------------------------------------

    def test_a_trial_is_failed_once_when_its_worker_is_dead(
        self, lost: int, reaper: Storage
    ) -> None:
        study_id = _study_id(reaper)
        assert reaper._get_stale_trial_ids(study_id) == [lost]
        assert reaper.fail_stale_trials() == [lost]
        assert reaper.fail_stale_trials() == []
        assert reaper.get_trial(lost).state == TrialState.FAIL
        assert reaper.get_trial(lost).datetime_complete is not None

    def test_looking_everywhere_passes_over_a_study_that_is_deleted_meanwhile(
        self, lost: int, worker: Storage, reaper: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gone = worker.create_new_study([StudyDirection.MINIMIZE], "gone")
        listed = sorted(reaper.get_all_studies(), key=lambda study: -study._study_id)
        assert listed[0]._study_id == gone
        worker.delete_study(gone)
        with pytest.raises(KeyError):
            reaper.fail_stale_trials(gone)
        monkeypatch.setattr(reaper, "get_all_studies", lambda: listed)
        assert reaper.fail_stale_trials() == [lost]

    def test_a_living_worker_beats_for_all_its_trials_with_one_message(
        self, worker: Storage, reaper: Storage, age_leases: AgeLeases
    ) -> None:
        study_id = _study_id(worker)
        counter = count_exchanges(worker)
        clock: Any = worker._clock
        ids = [worker.create_new_trial(study_id) for _ in range(200)]
        for n_beats in (1, 2, 3):
            age_leases(worker, _INTERVAL_S)
            clock.until_waiting()
            clock.advance(_INTERVAL_S)
            wait_until(lambda n=n_beats: counter.used["renew_lease"] == n, "a beat")  # type: ignore[misc]
            clock.until_waiting()
            assert counter.n_exchanges == len(ids)
        age_leases(worker, _GRACE_S - _INTERVAL_S)
        assert reaper.fail_stale_trials(study_id) == []
        age_leases(worker, 2 * _INTERVAL_S)
        assert sorted(reaper.fail_stale_trials(study_id)) == ids

    def test_a_claim_carries_the_first_beat(
        self, worker: Storage, reaper: Storage, age_leases: AgeLeases
    ) -> None:
        study_id = _study_id(worker)
        waiting = optuna.create_trial(state=TrialState.WAITING)
        trial_id = reaper.create_new_trial(study_id, waiting)
        age_leases(reaper, _LONG_S)
        assert worker.set_trial_state_values(trial_id, TrialState.RUNNING)
        age_leases(worker, _GRACE_S - _INTERVAL_S)
        assert reaper.fail_stale_trials(study_id) == []
        age_leases(worker, 2 * _INTERVAL_S)
        assert reaper.fail_stale_trials(study_id) == [trial_id]

    def test_a_worker_without_heartbeat_is_never_stale(
        self, worker: Storage, reaper: Storage, age_leases: AgeLeases
    ) -> None:
        worker.heartbeat_interval = None
        worker.create_new_trial(_study_id(worker))
        age_leases(worker, _LONG_S)
        assert reaper.fail_stale_trials() == []
        assert worker.fail_stale_trials() == []

    def test_a_closed_storage_leaves_nothing_stale(
        self, worker: Storage, reaper: Storage, age_leases: AgeLeases
    ) -> None:
        study_id = _study_id(worker)
        asked = worker.create_new_trial(study_id)
        worker.close()
        age_leases(reaper, _LONG_S)
        assert reaper.fail_stale_trials() == []
        reaper.set_trial_state_values(asked, TrialState.COMPLETE, [1.0])
        worker.create_new_trial(study_id)  # opens it again, and the lease is taken again
        age_leases(reaper, _LONG_S)
        assert len(reaper.fail_stale_trials()) == 1

    def test_a_storage_never_holds_itself_for_dead(self, lost: int, worker: Storage) -> None:
        assert worker.fail_stale_trials() == []

    def test_the_thread_ends_when_there_is_nothing_to_beat_for(
        self, worker: Storage, reaper: Storage, age_leases: AgeLeases
    ) -> None:
        clock: Any = worker._clock
        trial_id = worker.create_new_trial(_study_id(worker))
        clock.until_waiting()
        worker.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        thread = worker._beats()._thread
        assert thread is not None
        clock.advance(_INTERVAL_S)
        thread.join(60.0)
        assert not thread.is_alive() and not worker._beats().is_beating
        trial_id = worker.create_new_trial(_study_id(worker))
        age_leases(worker, _LONG_S)
        assert reaper.fail_stale_trials() == [trial_id]

    def test_record_heartbeat_speaks_for_another_storages_trial(
        self, lost: int, reaper: Storage
    ) -> None:
        reaper.record_heartbeat(lost)
        assert reaper.fail_stale_trials() == []
        with pytest.raises(KeyError):
            reaper.record_heartbeat(lost + 1000)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="There is no fork.")
    def test_a_forked_child_leaves_its_parents_lease(
        self, worker: Storage, reaper: Storage, age_leases: AgeLeases
    ) -> None:
        study_id = _study_id(worker)
        trial_id = worker.create_new_trial(study_id)
        child = os.fork()
        if not child:
            try:
                worker.create_new_trial(study_id)
                worker.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        age_leases(worker, _LONG_S)
        # The child said good-bye for its own trial, not for its parent's.
        assert reaper.fail_stale_trials() == [trial_id]

    def test_a_pickled_storage_has_the_settings_and_no_lease(self, worker: Storage) -> None:
        worker.create_new_trial(_study_id(worker))
        clock, worker._clock = worker._clock, ManualClock()
        try:
            copied: Storage = pickle.loads(pickle.dumps(worker))
        except Exception as error:
            pytest.skip(f"The store can't be pickled: {error}")
        finally:
            worker._clock = clock
        assert (copied.heartbeat_interval, copied.grace_period) == (_INTERVAL_S, _GRACE_S)
        assert not copied._beats().is_beating
        copied.close()

    # --- what is done about it -------------------------------------------------------------------

    @pytest.mark.parametrize("kind", _names_of_retry())
    @pytest.mark.parametrize("fail", [_optunas_fail, trialstore.fail_stale_trials])
    def test_a_lost_trial_is_retried_once(
        self, lost: int, reaper: Storage, kind: Any, fail: Callable[[optuna.Study], Any]
    ) -> None:
        retry = _quiet(lambda: kind(max_retry=3, inherit_intermediate_values=True))
        reaper.heartbeat_stale_trial_callback = retry
        study = _load(reaper)
        for _ in range(3):
            fail(study)
        failed, retried = study.get_trials()
        assert (failed.state, retried.state) == (TrialState.FAIL, TrialState.WAITING)
        assert retried.params == failed.params == {"x": 0.5}
        assert retried.distributions == failed.distributions
        assert retried.user_attrs == {"user": [1]}
        assert retried.intermediate_values == {3: 0.25}
        assert retried.system_attrs == {"system": "kept", "failed_trial": 0, "retry_history": [0]}
        assert _quiet(lambda: kind.retried_trial_number(retried)) == 0
        assert _quiet(lambda: kind.retried_trial_number(failed)) is None
        assert _quiet(lambda: kind.retry_history(retried)) == [0]
        assert _quiet(lambda: kind.retry_history(failed)) == []

    def test_a_trial_is_retried_max_retry_times(
        self, worker: Storage, reaper: Storage, age_leases: AgeLeases
    ) -> None:
        reaper.heartbeat_stale_trial_callback = trialstore.RetryFailedTrialCallback(max_retry=2)
        study = _load(worker)
        for _ in range(3):
            _quiet(study.ask).suggest_float("x", 0.0, 1.0)
            worker.flush()
            age_leases(worker, _LONG_S)
            reaper.fail_stale_trials()
        trials = study.get_trials()
        assert [trial.state.name for trial in trials] == ["FAIL"] * 3
        assert len({trial.params["x"] for trial in trials}) == 1
        assert trials[2].system_attrs["retry_history"] == [0, 1]
        assert all(trial.intermediate_values == {} for trial in trials)

    def test_optimize_runs_what_a_dead_worker_left(self, lost: int, reaper: Storage) -> None:
        reaper.heartbeat_stale_trial_callback = trialstore.RetryHeartbeatStaleTrialCallback()
        study = _load(reaper)
        _quiet(
            lambda: study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=1)
        )
        assert _states(reaper, study._study_id) == ["FAIL", "COMPLETE"]
        assert study.best_value == 0.5

    def test_another_callback_runs_once_however_many_look(
        self, lost: int, open_beating: OpenStorage
    ) -> None:
        called: list[int] = []

        def callback(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            called.append(trial.number)

        studies = []
        for _ in range(6):
            storage = open_beating()
            storage.failed_trial_callback = callback
            studies.append(_load(storage))
        fails = [trialstore.fail_stale_trials, _optunas_fail] * 3
        run_threads(*(lambda s=s, f=f: f(s) for s, f in zip(studies, fails, strict=True)))
        assert called == [0]

    def test_a_dozen_reapers_make_one_failure_and_one_retry(
        self, lost: int, open_beating: OpenStorage
    ) -> None:
        storages = [open_beating() for _ in range(12)]
        barrier = threading.Barrier(len(storages))
        failed: list[int] = []

        def reap(storage: Storage) -> None:
            found = storage._find_stale(_study_id(storage))
            barrier.wait(60.0)
            failed.extend(storage._fail_stale(_study_id(storage), found))

        for storage in storages:
            storage.heartbeat_stale_trial_callback = trialstore.RetryFailedTrialCallback()
        run_threads(*(lambda s=s: reap(s) for s in storages))
        assert failed == [lost]
        assert _states(storages[0], _study_id(storages[0])) == ["FAIL", "WAITING"]

    def test_the_retry_of_a_reaper_that_died_is_not_made_twice(
        self, lost: int, reaper: Storage
    ) -> None:
        """What a batch may leave that was torn after its first record."""
        retry = trialstore.RetryFailedTrialCallback()
        template = retry.retry(reaper.get_trial(lost))
        reaper.create_new_trial(_study_id(reaper), template)
        reaper.heartbeat_stale_trial_callback = retry
        assert reaper.fail_stale_trials() == [lost]
        assert _states(reaper, _study_id(reaper)) == ["FAIL", "WAITING"]

    @pytest.mark.parametrize("who", ["the template", "the log"])
    def test_a_trial_that_no_retry_can_be_made_of_is_failed_with_the_others(
        self,
        worker: Storage,
        reaper: Storage,
        age_leases: AgeLeases,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        who: str,
    ) -> None:
        study = _load(worker)
        # A value outside its distribution, which Optuna runs with no more than a warning.
        study.enqueue_trial({"x": 5.0} if who == "the template" else {"x": 0.5})
        for _ in range(2):
            _quiet(lambda: study.ask().suggest_float("x", 0.0, 1.0))
        worker.flush()
        age_leases(worker, _LONG_S)
        if who == "the log":
            log = exchanger_of(reaper).log
            if not isinstance(log, Limited):
                pytest.skip("The log takes everything.")

            def check(records: Sequence[Any]) -> None:
                if any(_history(record) == [0] for record in records):
                    raise ValueError("It is too large.")

            monkeypatch.setattr(log, "check", check)
        reaper.heartbeat_stale_trial_callback = trialstore.RetryFailedTrialCallback()
        assert sorted(reaper.fail_stale_trials()) == [t._trial_id for t in study.trials[:2]]
        assert _states(reaper, study._study_id) == ["FAIL", "FAIL", "WAITING"]
        assert study.trials[2].system_attrs["retry_history"] == [1]
        assert caplog.text.count("Trial 0 of study 'study' is not retried") == 1

    def test_a_worker_that_has_beaten_since_it_was_found_is_left_alone(
        self, lost: int, worker: Storage, reaper: Storage
    ) -> None:
        study_id = _study_id(reaper)
        found = reaper._find_stale(study_id)
        assert [*found] == [lost]
        reaper.record_heartbeat(lost)
        assert reaper._fail_stale(study_id, found) == []
        assert _states(reaper, study_id) == ["RUNNING"]

    # --- a late worker ---------------------------------------------------------------------------

    def test_a_late_worker_is_refused_and_leaves_nothing(
        self, worker: Storage, reaper: Storage, age_leases: AgeLeases
    ) -> None:
        study = _load(worker)
        trial = _quiet(study.ask)
        trial.suggest_float("x", 0.0, 1.0)
        worker.flush()
        age_leases(worker, _LONG_S)
        assert reaper.fail_stale_trials() == [trial._trial_id]
        trial.report(0.5, 1)
        trial.set_user_attr("late", True)
        with pytest.raises((UpdateFinishedTrialError, ValueError)):
            study.tell(trial, 1.0)
        with pytest.raises(UpdateFinishedTrialError):
            worker.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])
        seen = reaper.get_trial(trial._trial_id)
        assert (seen.state, seen.values) == (TrialState.FAIL, None)
        assert seen.intermediate_values == {} and seen.user_attrs == {}
        worker.flush()

    # --- round trips and settings ----------------------------------------------------------------

    def test_heartbeats_add_at_most_two_round_trips_a_trial(self, worker: Storage) -> None:
        study = _load(worker)
        worker.heartbeat_stale_trial_callback = trialstore.RetryFailedTrialCallback()

        def optimize() -> None:
            study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=1)

        _quiet(optimize)
        counter = count_exchanges(worker)
        counts = []
        for _ in range(5):
            counter.reset()
            _quiet(optimize)
            leases = counter.used["expired"] + counter.used["renew_lease"]
            leases += counter.used["take_lease"] + counter.used["withdraw_lease"]
            counts.append(counter.n_exchanges + counter.used["exchange_if"] + leases)
        assert max(counts) <= 4 + 2, counts

    def test_settings_that_make_no_sense_are_refused(self, storage: Storage) -> None:
        bad: Any
        for bad in (0, -1, float("nan"), float("inf"), "60", True):
            with pytest.raises(ValueError):
                storage.heartbeat_interval = bad
            with pytest.raises(ValueError):
                storage.grace_period = bad
        assert storage.heartbeat_interval is None and not storage.is_heartbeat_enabled()
        with pytest.raises(ValueError, match="heartbeat_interval"):
            storage._get_stale_trial_ids(0)
        assert storage.fail_stale_trials() == []

    def test_the_interface_has_the_names_of_every_optuna(
        self, storage: Storage, age_leases: AgeLeases
    ) -> None:
        assert isinstance(storage, optuna.storages._heartbeat.BaseHeartbeat)
        assert not optuna.storages._heartbeat.is_heartbeat_enabled(storage)
        storage.heartbeat_interval = 7
        assert storage.get_heartbeat_interval() == 7 and storage.is_heartbeat_enabled()
        assert optuna.storages._heartbeat.is_heartbeat_enabled(storage)
        retry = trialstore.RetryFailedTrialCallback()
        storage.failed_trial_callback = retry
        assert storage.heartbeat_stale_trial_callback is retry
        assert storage.get_failed_trial_callback() is retry
        assert storage.get_heartbeat_stale_trial_callback() is retry


def _study_id(storage: Storage) -> int:
    return storage.get_study_id_from_name("study")
