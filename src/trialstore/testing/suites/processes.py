"""Threads, forks, pickles and exits: nothing that was promised is lost, nobody hangs."""

from __future__ import annotations

import contextlib
import multiprocessing
from multiprocessing.synchronize import Event
import os
import pickle
from typing import Any

import optuna
from optuna.trial import TrialState
import pytest

from trialstore.storage import Storage
from trialstore.testing.contents import storage_contents, study_contents
from trialstore.testing.suites.base import (
    DEADLINE_S,
    MINIMIZE,
    UNIT,
    Capabilities,
    OpenStorage,
    SuiteBase,
    run_threads,
)

_METHODS = [name for name in ("fork", "spawn") if name in multiprocessing.get_all_start_methods()]


def _objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -10, 10)
    y = trial.suggest_int("y", 0, 5)
    trial.set_user_attr("pid", os.getpid())
    trial.report(x, 1)
    return x * x + y


def optimize(storage: Storage, study_name: str, n_trials: int, seed: int) -> None:
    """What a worker process does with a storage that it was given."""
    study = optuna.load_study(
        study_name=study_name, storage=storage, sampler=optuna.samplers.RandomSampler(seed=seed)
    )
    study.optimize(_objective, n_trials=n_trials)


def leave_with_filled_outbox(open_storage: OpenStorage, study_id: int) -> None:
    """A child that ends while its writes wait; the linger is longer than any test."""
    storage = open_storage(linger_s=100_000.0)
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_param(trial_id, "x", 0.5, UNIT)
    storage.set_trial_user_attr(trial_id, "k", "kept")
    storage.set_trial_intermediate_value(trial_id, 1, 1.5)


def _assert_whole(storage: Storage, study_id: int, n_trials: int) -> None:
    trials = storage.get_all_trials(study_id)
    assert [trial.number for trial in trials] == list(range(n_trials))
    for trial in trials:
        assert trial.state == TrialState.COMPLETE, f"trial {trial.number}"
        assert set(trial.params) == {"x", "y"}, f"trial {trial.number}"
        assert "pid" in trial.user_attrs, f"trial {trial.number}"
        assert trial.intermediate_values == {1: trial.params["x"]}, f"trial {trial.number}"
        assert trial.values == [trial.params["x"] * trial.params["x"] + trial.params["y"]]


class ProcessSuite(SuiteBase):
    """Part of ``StorageSuite``."""

    def test_n_jobs_share_one_storage(self, storage: Storage) -> None:
        study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(seed=0))
        study.optimize(_objective, n_trials=80, n_jobs=8)
        _assert_whole(storage, study._study_id, 80)

    def test_sixteen_threads_share_one_storage(self, storage: Storage, study_id: int) -> None:
        def work() -> None:
            for _ in range(10):
                trial_id = storage.create_new_trial(study_id)
                storage.set_trial_param(trial_id, "x", 0.5, UNIT)
                storage.set_trial_user_attr(trial_id, "id", trial_id)
                assert storage.get_trial(trial_id).user_attrs == {"id": trial_id}
                storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])

        run_threads(*[work] * 16)
        trials = storage.get_all_trials(study_id)
        assert [trial.number for trial in trials] == list(range(160))
        assert all(trial.user_attrs == {"id": trial._trial_id} for trial in trials)
        assert all(trial.params == {"x": 0.5} for trial in trials)

    def test_a_pickled_storage_is_the_same_store(
        self, storage: Storage, study_id: int, capabilities: Capabilities
    ) -> None:
        if not capabilities.crosses_processes:
            pytest.skip("The store does not leave its process.")
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_user_attr(trial_id, "k", 1)
        with contextlib.closing(pickle.loads(pickle.dumps(storage))) as copy:
            assert storage_contents(copy) == storage_contents(storage)
            copy.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        assert storage.get_trial(trial_id).values == [1.0]

    def test_a_storage_is_used_after_it_was_closed(self, storage: Storage, study_id: int) -> None:
        trial_id = storage.create_new_trial(study_id)
        storage.close()
        storage.set_trial_user_attr(trial_id, "k", 1)
        storage.remove_session()
        assert storage.get_trial(trial_id).user_attrs == {"k": 1}

    @pytest.mark.parametrize("method", _METHODS)
    def test_workers_that_were_given_the_storage_lose_nothing(
        self, storage: Storage, study_id: int, capabilities: Capabilities, method: str
    ) -> None:
        if not capabilities.crosses_processes:
            pytest.skip("The store does not leave its process.")
        context: Any = multiprocessing.get_context(method)
        workers = [
            context.Process(target=optimize, args=(storage, "study", 15, seed))
            for seed in range(2)
        ]
        for worker in workers:
            worker.start()
        optimize(storage, "study", 15, 2)
        for worker in workers:
            worker.join(DEADLINE_S)
        assert [worker.exitcode for worker in workers] == [0, 0]
        _assert_whole(storage, study_id, 45)

    @pytest.mark.parametrize("method", _METHODS)
    def test_a_child_that_exits_with_a_filled_outbox_loses_nothing(
        self,
        storage: Storage,
        study_id: int,
        open_storage: OpenStorage,
        capabilities: Capabilities,
        method: str,
    ) -> None:
        if not (capabilities.crosses_processes and capabilities.lingers):
            pytest.skip("The store does not leave its process.")
        context: Any = multiprocessing.get_context(method)
        child = context.Process(target=leave_with_filled_outbox, args=(open_storage, study_id))
        child.start()
        child.join(DEADLINE_S)
        assert child.exitcode == 0
        (trial,) = storage.get_all_trials(study_id)
        assert (trial.params, trial.user_attrs) == ({"x": 0.5}, {"k": "kept"})
        assert trial.intermediate_values == {1: 1.5}

    @pytest.mark.skipif("fork" not in _METHODS, reason="needs fork")
    def test_a_fork_does_not_take_the_parent_s_outbox_along(
        self, opened: OpenStorage, capabilities: Capabilities
    ) -> None:
        if not (capabilities.crosses_processes and capabilities.lingers):
            pytest.skip("The store does not leave its process.")
        storage = opened(linger_s=100_000.0)
        study_id = storage.create_new_study([MINIMIZE], "study")
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_user_attr(trial_id, "whose", "parent")
        child = multiprocessing.get_context("fork").Process(
            target=overwrite_then_exit, args=(storage, trial_id)
        )
        child.start()
        child.join(DEADLINE_S)
        assert child.exitcode == 0
        reader = opened()
        assert reader.get_trial(trial_id).user_attrs == {"child": True}
        storage.flush()
        assert reader.get_trial(trial_id).user_attrs == {"child": True, "whose": "parent"}

    @pytest.mark.skipif("fork" not in _METHODS, reason="needs fork")
    def test_a_fork_during_exchanges_of_other_threads_hangs_nobody(
        self, storage: Storage, study_id: int, capabilities: Capabilities
    ) -> None:
        if not capabilities.crosses_processes:
            pytest.skip("The store does not leave its process.")
        context = multiprocessing.get_context("fork")
        children = []

        def write() -> None:
            for _ in range(40):
                storage.set_trial_state_values(
                    storage.create_new_trial(study_id), TrialState.COMPLETE, [0.0]
                )

        def fork() -> None:
            for _ in range(4):
                child = context.Process(target=create_one_trial, args=(storage, study_id))
                child.start()
                children.append(child)

        run_threads(write, write, fork)
        for child in children:
            child.join(DEADLINE_S)
        assert [child.exitcode for child in children] == [0] * 4
        contents = study_contents(storage, study_id)
        assert [trial["number"] for trial in contents] == list(range(84))

    @pytest.mark.skipif("fork" not in _METHODS, reason="needs fork")
    def test_a_forked_child_goes_on_after_its_parent_has_closed(
        self, storage: Storage, study_id: int, capabilities: Capabilities
    ) -> None:
        if not capabilities.crosses_processes:
            pytest.skip("The store does not leave its process.")
        context = multiprocessing.get_context("fork")
        is_at_work, is_closed = context.Event(), context.Event()
        storage.create_new_trial(study_id)
        child = context.Process(
            target=create_before_and_after, args=(storage, study_id, is_at_work, is_closed)
        )
        child.start()
        assert is_at_work.wait(DEADLINE_S)
        storage.close()
        is_closed.set()
        child.join(DEADLINE_S)
        assert child.exitcode == 0
        contents = study_contents(storage, study_id)
        assert [trial["number"] for trial in contents] == [0, 1, 2]


def create_before_and_after(
    storage: Storage, study_id: int, is_at_work: Event, is_closed: Event
) -> None:
    storage.create_new_trial(study_id)
    is_at_work.set()
    assert is_closed.wait(DEADLINE_S)
    storage.create_new_trial(study_id)


def overwrite_then_exit(storage: Storage, trial_id: int) -> None:
    """What a forked child does with its parent's storage."""
    storage.set_trial_user_attr(trial_id, "child", True)
    storage.flush()


def create_one_trial(storage: Storage, study_id: int) -> None:
    """Likewise."""
    storage.set_trial_state_values(storage.create_new_trial(study_id), TrialState.COMPLETE, [1.0])
