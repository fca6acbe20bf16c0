"""The queue and the budget: exactly one, exactly n, whoever races and whoever dies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
import threading
from typing import Any
import warnings

import optuna
from optuna.exceptions import TrialPruned, UpdateFinishedTrialError
from optuna.trial import TrialState
import pytest

import trialstore
from trialstore.log import NEXT_MIN, ConditionalLog
from trialstore.storage import Storage
from trialstore.testing.clock import ManualClock
from trialstore.testing.suites.base import (
    DEADLINE_S,
    MINIMIZE,
    Capabilities,
    OpenStorage,
    count_exchanges,
    exchanger_of,
    run_threads,
)
from trialstore.testing.suites.heartbeats import AgeLeases, HeartbeatSuite

_SETS: list[dict[str, Any]] = [{"x": 0.5}, {"x": 0.5, "y": "a"}, {"x": 1}, {"z": None}]


def _study(storage: Storage) -> optuna.Study:
    return optuna.load_study(
        study_name="study", storage=storage, sampler=optuna.samplers.RandomSampler()
    )


def _objective(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0.0, 1.0)


def _states(storage: Storage) -> Counter[str]:
    study_id = storage.get_study_id_from_name("study")
    return Counter(trial.state.name for trial in storage.get_all_trials(study_id))


class QueueSuite(HeartbeatSuite):
    """Part of ``StorageSuite``."""

    @pytest.fixture
    def conditional(self, storage: Storage, capabilities: Capabilities) -> Storage:
        log = exchanger_of(storage).log
        if not (capabilities.appends_conditionally and isinstance(log, ConditionalLog)):
            pytest.skip("The log can't append on a condition.")
        storage.create_new_study([MINIMIZE], "study")
        return storage

    @pytest.fixture
    def workers(
        self, conditional: Storage, opened: OpenStorage, capabilities: Capabilities
    ) -> list[Storage]:
        """Several storages on the store, or several times the one that there can be."""
        if not capabilities.shared:
            return [conditional] * 6
        return [conditional, *(opened() for _ in range(5))]

    # --- the queue -------------------------------------------------------------------------------

    def test_racing_workers_queue_each_set_of_parameters_once(
        self, workers: list[Storage]
    ) -> None:
        barrier = threading.Barrier(len(workers))
        queued: list[dict[str, Any]] = []

        def work(storage: Storage) -> None:
            study = _study(storage)
            barrier.wait(DEADLINE_S)
            for params in _SETS:
                if trialstore.enqueue_trial(study, params, skip_if_exists=True):
                    queued.append(params)

        run_threads(*(lambda s=s: work(s) for s in workers))
        assert len(queued) == len(_SETS)
        trials = _study(workers[0]).get_trials()
        assert [trial.state for trial in trials] == [TrialState.WAITING] * len(_SETS)
        found = [trial.system_attrs["fixed_params"] for trial in trials]
        assert all(params in found for params in _SETS)

    def test_what_exists_is_what_optuna_takes_for_the_same(self, conditional: Storage) -> None:
        study = _study(conditional)
        study.enqueue_trial({"x": 0.5, "n": float("nan")})
        study.optimize(lambda trial: trial.suggest_int("i", 3, 3), n_trials=2)
        known: list[dict[str, Any]]
        new: list[dict[str, Any]]
        known = [{"x": 0.5, "n": float("nan")}, {"x": 0.5 + 1e-9, "n": float("nan")}, {"i": 3}]
        new = [{"x": 0.5}, {"x": 0.6, "n": float("nan")}, {"i": 3.0}, {"i": "3"}]
        for expected, sets in ((False, known), (True, new)):
            for params in sets:
                assert study._should_skip_enqueue(params) is not expected, params
                assert trialstore.enqueue_trial(study, params, skip_if_exists=True) is expected

    def test_enqueued_trials_are_those_of_optuna(self, conditional: Storage) -> None:
        study = _study(conditional)
        assert trialstore.enqueue_trial(study, {"x": 0.25}, user_attrs={"k": [1]})
        assert trialstore.enqueue_trial(study, {"x": 0.25})
        study.enqueue_trial({"x": 0.25}, user_attrs={"k": [1]})
        ours, _, theirs = study.get_trials()
        assert (ours.system_attrs, ours.user_attrs) == (theirs.system_attrs, theirs.user_attrs)
        study.optimize(_objective, n_trials=1)
        assert study.trials[0].params == {"x": 0.25}
        with pytest.raises(TypeError, match="dict"):
            trialstore.enqueue_trial(study, [1])  # type: ignore[arg-type]

    @pytest.mark.parametrize("skip", [False, True])
    def test_what_can_t_be_queued_leaves_nothing(
        self, conditional: Storage, capabilities: Capabilities, skip: bool
    ) -> None:
        study = _study(conditional)
        bad: Any
        for bad in (None, "x", [("x", 1)], {"x": object()}, {"x": {1, 2}}):
            if isinstance(bad, dict) and capabilities.keeps_objects:
                continue
            with pytest.raises(TypeError, match=r"dict|JSON"):
                trialstore.enqueue_trial(study, bad, skip_if_exists=skip)
        with pytest.raises(TypeError, match="key"):
            trialstore.enqueue_trial(study, {"x": 1}, {1: 2}, skip_if_exists=skip)  # type: ignore[dict-item]
        optuna.delete_study(study_name="study", storage=conditional)
        with pytest.raises(KeyError):
            trialstore.enqueue_trial(study, {"x": 1}, skip_if_exists=skip)
        conditional.create_new_study([MINIMIZE], "study")
        assert _study(conditional).trials == []
        assert trialstore.enqueue_trial(_study(conditional), {"x": 1}, skip_if_exists=skip)

    @pytest.mark.parametrize("n_queued", [10, 300])
    def test_a_claim_costs_the_same_however_long_the_queue(
        self, storage: Storage, n_queued: int, capabilities: Capabilities
    ) -> None:
        if not capabilities.tells_only_news:
            pytest.skip("Optuna's own gRPC service sends every unfinished trial anew.")
        storage.create_new_study([MINIMIZE], "study")
        study = _study(storage)
        for number in range(n_queued):
            study.enqueue_trial({"x": number})
        for _ in range(2):  # over gRPC it may be the second look that reads the queue
            assert study._pop_waiting_trial_id() is not None
        counter = count_exchanges(storage)
        for _ in range(5):
            assert study._pop_waiting_trial_id() is not None
        # A look at the queue, and a claim with the trial's image or the record of it. In memory
        # nothing is exchanged.
        assert counter.n_exchanges <= 10 and counter.n_news <= 10

    def test_a_reader_of_the_queue_reads_what_it_looks_at(
        self, storage: Storage, opened: OpenStorage, capabilities: Capabilities
    ) -> None:
        storage.create_new_study([MINIMIZE], "study")
        other = _study(opened() if capabilities.shared else storage)
        for number in range(3 * NEXT_MIN):
            other.enqueue_trial({"x": number})
        leaving = other.trials[NEXT_MIN - 1]._trial_id
        queue = _study(storage).get_trials(deepcopy=False, states=(TrialState.WAITING,))
        seen = [queue[0], queue[1]]
        for _ in range(3):
            other.ask()
        other._storage.set_trial_state_values(leaving, TrialState.FAIL)
        assert queue and queue[0] is seen[0] and queue[0].state == TrialState.WAITING
        assert [trial.number for trial in queue[2:4]] == [3, 4], "read when it was looked at"
        assert len(queue) == 3 * NEXT_MIN - 2
        assert queue[-1].number == 3 * NEXT_MIN - 1
        numbers = [trial.number for trial in queue]
        assert numbers == sorted({0, 1, *range(3, 3 * NEXT_MIN)} - {NEXT_MIN - 1})
        again = _study(storage).get_trials(deepcopy=False, states=(TrialState.WAITING,))
        assert [trial.number for trial in again] == numbers[2:]
        assert len(again) == len(numbers) - 2

    def test_those_who_read_the_same_queue_lose_few_claims_to_each_other(
        self, storage: Storage, opened: OpenStorage, capabilities: Capabilities
    ) -> None:
        n_readers, n_lost = 8, 0
        storage.create_new_study([MINIMIZE], "study")
        for number in range(NEXT_MIN):
            _study(storage).enqueue_trial({"x": number})
        readers = [opened() if capabilities.shared else storage for _ in range(n_readers)]
        queues = [
            _study(reader).get_trials(deepcopy=False, states=(TrialState.WAITING,))
            for reader in readers
        ]
        claimed = []
        for reader, queue in zip(readers, queues, strict=True):
            for trial in queue:
                if reader.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    claimed.append(trial.number)
                    break
                n_lost += 1
        assert claimed[0] == 0 and len({*claimed}) == n_readers
        # All but one lose the first trial. One after the other in the queue they would lose 28.
        assert n_lost <= 2 * n_readers
        for trial in queues[0]:
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        lost_by_the_last = []
        for trial in queues[-1]:
            lost_by_the_last.append(trial.number)
            with pytest.raises(UpdateFinishedTrialError):
                readers[-1].set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        assert sorted(lost_by_the_last) == list(range(NEXT_MIN)), "each is tried once"

    # --- the budget ------------------------------------------------------------------------------

    @pytest.mark.parametrize("how", ["optimize", "ask"])
    def test_a_budget_is_met_exactly(self, workers: list[Storage], how: str) -> None:
        """Without heartbeats; a third of the trials fail or are pruned and count for nothing."""
        budget, ran = trialstore.MaxTrials(20), []

        def objective(trial: optuna.Trial) -> float:
            ran.append(trial.number)
            if trial.number % 6 == 1:
                raise TrialPruned
            if trial.number % 6 == 4:
                raise ZeroDivisionError
            return _objective(trial)

        def work(storage: Storage) -> None:
            study = _study(storage)
            # One that stops because others hold all slots comes again: they may fail.
            while _states(storage)["COMPLETE"] < budget.n_trials:
                if how == "optimize":
                    study.optimize(budget(objective), catch=(ZeroDivisionError,))
                else:
                    _ask_and_tell(budget, study, objective)

        run_threads(*(lambda s=s: work(s) for s in workers))
        states = _states(workers[0])
        assert states["COMPLETE"] == budget.n_trials
        assert states["RUNNING"] == 0
        trials = _study(workers[0]).get_trials()
        # Who got no slot did not run.
        assert {trial.number for trial in trials if trial.state.name != "PRUNED"} <= set(ran)
        assert all(trial.params == {} for trial in trials if trial.number not in ran)

    def test_a_spent_budget_stops_the_study(self, conditional: Storage) -> None:
        study = _study(conditional)
        study.optimize(_objective, n_trials=3)
        study.optimize(trialstore.MaxTrials(3)(_objective), n_trials=10)
        assert _states(conditional) == {"COMPLETE": 3, "PRUNED": 1}
        assert trialstore.MaxTrials(3).ask(study) is None
        trial = trialstore.MaxTrials(4).ask(study)
        assert trial is not None
        study.tell(trial, 1.0)
        with pytest.raises(TrialPruned):
            trialstore.MaxTrials(4)(_objective)(study.ask())

    def test_the_slot_of_a_dead_worker_is_free_again(
        self, worker: Storage, open_beating: OpenStorage, age_leases: AgeLeases
    ) -> None:
        if not isinstance(exchanger_of(worker).log, ConditionalLog):
            pytest.skip("The log can't append on a condition.")
        budget = trialstore.MaxTrials(1)
        held = _quiet(lambda: budget.ask(_study(worker)))
        assert held is not None and budget.reserve(held), "a holder keeps its slot"

        class Passing(ManualClock):
            """Each time a worker waits for a slot, much time passes for the leases."""

            n_sleeps = 0

            def sleep(self, duration_s: float) -> None:
                self.n_sleeps += 1
                age_leases(worker, 1000.0)

        other = open_beating()
        other._clock = clock = Passing()
        other.heartbeat_stale_trial_callback = trialstore.RetryFailedTrialCallback()
        trial = _quiet(lambda: budget.ask(_study(other)))
        assert trial is not None and clock.n_sleeps == 1
        # The retry of the lost trial inherits its attributes and no slot.
        study = _study(other)
        study.tell(trial, 1.0)
        _quiet(lambda: study.optimize(budget(_objective), n_trials=2))
        assert _states(other) == {"FAIL": 1, "COMPLETE": 1, "PRUNED": 1}

    def test_a_budget_is_a_positive_integer(self) -> None:
        bad: Any
        for bad in (0, -1, 1.0, "3", True, None):
            with pytest.raises(ValueError):
                trialstore.MaxTrials(bad)


def _quiet(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def _ask_and_tell(
    budget: trialstore.MaxTrials, study: optuna.Study, objective: Callable[[optuna.Trial], float]
) -> None:
    while (trial := budget.ask(study)) is not None:
        try:
            study.tell(trial, objective(trial))
        except TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
        except ZeroDivisionError:
            study.tell(trial, state=TrialState.FAIL)
