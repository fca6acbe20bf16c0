"""Reads are values: never older than the call, never changed afterwards, claims given once."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState, create_trial
import pytest

from trialstore.storage import Storage
from trialstore.testing.contents import storage_contents, trial_contents
from trialstore.testing.suites.base import (
    CHOICES,
    MINIMIZE,
    UNIT,
    Capabilities,
    OpenStorage,
    SuiteBase,
    run_threads,
)


class ReadSuite(SuiteBase):
    """Part of ``StorageSuite``."""

    # --- values ----------------------------------------------------------------------------------

    def test_an_earlier_read_never_changes(self, storage: Storage, study_id: int) -> None:
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_user_attr(trial_id, "k", {"a": [1]})
        reads = [
            storage.get_trial(trial_id),
            *storage.get_all_trials(study_id, deepcopy=False),
            *storage.get_all_trials(study_id, deepcopy=True),
        ]
        before = [trial_contents(trial) for trial in reads]
        storage.set_trial_param(trial_id, "x", 0.5, UNIT)
        storage.set_trial_intermediate_value(trial_id, 1, 2.0)
        storage.set_trial_user_attr(trial_id, "k", {"a": [2]})
        storage.set_trial_system_attr(trial_id, "s", 1)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        storage.get_all_trials(study_id)
        assert [trial_contents(trial) for trial in reads] == before

    def test_an_id_or_a_name_of_numpy_is_what_it_is_equal_to(
        self, storage: Storage, opened: OpenStorage, study_id: int, capabilities: Capabilities
    ) -> None:
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        study: Any = np.int64(study_id)
        trial: Any = np.int32(trial_id)
        for read, expected in (
            (lambda s: s.get_study_id_from_name(np.str_("study")), study_id),
            (lambda s: s.get_study_name_from_id(study), "study"),
            (lambda s: s.get_n_trials(study), 1),
            (lambda s: len(s.get_all_trials(study)), 1),
            (lambda s: s.get_best_trial(study).value, 1.0),
            (lambda s: s.get_trial(trial).value, 1.0),
            (lambda s: s.get_trial_id_from_study_id_trial_number(study, np.int64(0)), trial_id),
        ):
            # One that knows nothing yet, so that its log is asked.
            assert read(opened() if capabilities.shared else storage) == expected

    @pytest.mark.parametrize("finished", [False, True])
    def test_editing_what_was_read_does_not_reach_the_storage(
        self, storage: Storage, study_id: int, finished: bool
    ) -> None:
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_param(trial_id, "x", 0.5, UNIT)
        storage.set_trial_user_attr(trial_id, "k", {"a": [1]})
        if finished:
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        before = storage_contents(storage)
        (copied,) = storage.get_all_trials(study_id, deepcopy=True)
        copied.user_attrs["k"]["a"].append(2)
        trials = [copied] if finished else [copied, storage.get_trial(trial_id)]
        for trial in trials:
            trial.params["y"] = 1
            trial.user_attrs["new"] = 1
            trial.system_attrs["new"] = 1
            trial.intermediate_values[7] = 1.0
        assert storage_contents(storage) == before

    def test_editing_study_attributes_does_not_reach_the_storage(
        self, storage: Storage, study_id: int
    ) -> None:
        storage.set_study_user_attr(study_id, "k", 1)
        storage.get_study_user_attrs(study_id)["k"] = 2
        storage.get_study_system_attrs(study_id)["s"] = 2
        storage.get_all_studies()[0].user_attrs["k"] = 2
        assert storage.get_study_user_attrs(study_id) == {"k": 1}
        assert storage.get_study_system_attrs(study_id) == {}

    def test_the_writer_may_go_on_editing_what_it_wrote(
        self, storage: Storage, study_id: int, capabilities: Capabilities
    ) -> None:
        if capabilities.keeps_objects:
            pytest.skip("The store keeps the very object.")
        trial_id = storage.create_new_trial(study_id)
        value: dict[str, Any] = {"a": [1]}
        storage.set_trial_user_attr(trial_id, "k", value)
        value["a"].append(2)
        assert storage.get_trial(trial_id).user_attrs == {"k": {"a": [1]}}

    def test_the_writer_may_go_on_editing_a_template(
        self, storage: Storage, study_id: int
    ) -> None:
        study = optuna.load_study(study_name="study", storage=storage)
        params: dict[str, Any] = {"x": 0, "y": [1]}
        attrs: dict[str, Any] = {"a": [1]}
        for number in range(3):
            params["x"] = number
            study.enqueue_trial(params, user_attrs=attrs)
        params["y"].append(2)
        attrs["a"].append(2)
        trials = study.get_trials()
        queued = [trial.system_attrs["fixed_params"] for trial in trials]
        assert queued == [{"x": number, "y": [1]} for number in range(3)]
        assert [trial.user_attrs for trial in trials] == [{"a": [1]}] * 3

    def test_a_parameter_set_twice_is_overwritten(self, storage: Storage, study_id: int) -> None:
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_param(trial_id, "x", 0.25, UNIT)
        storage.set_trial_param(trial_id, "x", 0.75, UNIT)
        assert storage.get_trial(trial_id).params == {"x": 0.75}

    def test_a_template_with_an_incompatible_distribution_is_accepted(
        self, storage: Storage, study_id: int
    ) -> None:
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_param(trial_id, "x", 0.25, UNIT)
        template = create_trial(value=1.0, params={"x": "b"}, distributions={"x": CHOICES})
        added = storage.create_new_trial(study_id, template)
        assert storage.get_trial(added).params == {"x": "b"}
        storage.set_trial_param(storage.create_new_trial(study_id), "x", 0.5, UNIT)

    def test_complete_without_values_is_accepted_and_shown_as_fail(
        self, storage: Storage, study_id: int
    ) -> None:
        """docs/decisions/0006: a COMPLETE trial without values makes samplers raise."""
        trial_id = storage.create_new_trial(study_id)
        assert storage.set_trial_state_values(trial_id, TrialState.COMPLETE) is True
        trial = storage.get_trial(trial_id)
        assert (trial.state, trial.values) == (TrialState.FAIL, None)
        with pytest.raises(UpdateFinishedTrialError):
            storage.set_trial_user_attr(trial_id, "k", 1)
        with pytest.raises(ValueError):
            storage.get_best_trial(study_id)

    def test_of_equal_values_the_earlier_trial_is_best(
        self, storage: Storage, study_id: int
    ) -> None:
        ids = [storage.create_new_trial(study_id) for _ in range(3)]
        for trial_id, value in zip(reversed(ids), (1.0, 1.0, 2.0), strict=True):
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])
        assert storage.get_best_trial(study_id).number == 1

    def test_a_study_without_a_name_gets_one_that_is_new(self, storage: Storage) -> None:
        names = {
            storage.get_study_name_from_id(storage.create_new_study([MINIMIZE])) for _ in range(3)
        }
        assert len(names) == 3
        assert all(name.startswith("no-name-") for name in names)

    def test_the_start_of_a_queued_trial_is_its_claim(
        self, storage: Storage, study_id: int
    ) -> None:
        trial_id = storage.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
        assert storage.get_trial(trial_id).datetime_start is None
        assert storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        assert storage.get_trial(trial_id).datetime_start is not None

    # --- freshness -------------------------------------------------------------------------------

    def test_a_read_is_never_older_than_the_call(
        self, storage: Storage, other: Storage, study_id: int
    ) -> None:
        for number in range(20):
            trial_id = other.create_new_trial(study_id)
            assert storage.get_n_trials(study_id) == number + 1
            assert storage.get_trial_id_from_study_id_trial_number(study_id, number) == trial_id
            other.set_trial_param(trial_id, "x", 0.5, UNIT)
            other.flush()
            assert storage.get_trial(trial_id).params == {"x": 0.5}
            other.set_trial_state_values(trial_id, TrialState.COMPLETE, [float(-number)])
            assert storage.get_best_trial(study_id).number == number
            assert storage.get_all_trials(study_id, states=(TrialState.RUNNING,)) == []
            other.set_study_user_attr(study_id, "n", number)
            assert storage.get_study_user_attrs(study_id) == {"n": number}

    def test_both_storages_say_the_same(
        self, storage: Storage, other: Storage, study_id: int
    ) -> None:
        for one in (storage, other, storage, other):
            trial_id = one.create_new_trial(study_id)
            one.set_trial_param(trial_id, "x", 0.5, UNIT)
            one.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        assert storage_contents(storage) == storage_contents(other)

    # --- claims ----------------------------------------------------------------------------------

    def test_a_claim_is_given_once(self, storage: Storage, study_id: int) -> None:
        trial_id = storage.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
        assert storage.set_trial_state_values(trial_id, TrialState.RUNNING) is True
        assert storage.set_trial_state_values(trial_id, TrialState.RUNNING) is False

    def test_a_claim_is_given_to_one_storage(
        self, storage: Storage, other: Storage, study_id: int
    ) -> None:
        trial_id = storage.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
        (waiting,) = other.get_all_trials(study_id, states=(TrialState.WAITING,))
        assert storage.set_trial_state_values(trial_id, TrialState.RUNNING) is True
        assert other.set_trial_state_values(waiting._trial_id, TrialState.RUNNING) is False

    def test_a_claim_of_a_finished_trial_is_refused(
        self, storage: Storage, other: Storage, study_id: int
    ) -> None:
        trial_id = storage.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
        other.get_all_trials(study_id)
        storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        with pytest.raises(UpdateFinishedTrialError):
            other.set_trial_state_values(trial_id, TrialState.RUNNING)

    def test_what_another_claims_is_no_longer_queued_for_who_has_queued_it(
        self, storage: Storage, other: Storage, study_id: int
    ) -> None:
        queued = (TrialState.WAITING,)
        assert storage.get_all_trials(study_id, states=queued) == []
        trial_id = storage.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
        assert other.set_trial_state_values(trial_id, TrialState.RUNNING) is True
        assert storage.get_all_trials(study_id, states=queued) == []

    def test_of_two_tells_one_is_refused(
        self, storage: Storage, other: Storage, study_id: int
    ) -> None:
        trial_id = storage.create_new_trial(study_id)
        other.get_trial(trial_id)
        other.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        with pytest.raises(UpdateFinishedTrialError):
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [2.0])
        assert storage.get_trial(trial_id).values == [1.0]

    def test_queued_trials_are_popped_once_each(
        self,
        storage: Storage,
        study_id: int,
        opened: OpenStorage,
        capabilities: Capabilities,
    ) -> None:
        n_trials = 60
        for _ in range(n_trials):
            storage.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
        popped: list[int] = []

        def pop_all(mine: Storage) -> None:
            while waiting := mine.get_all_trials(study_id, False, (TrialState.WAITING,)):
                for trial in waiting:
                    try:
                        if mine.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                            popped.append(trial.number)
                            break
                    except UpdateFinishedTrialError:
                        continue

        storages = [storage] * 2
        if capabilities.shared:
            storages += [opened()] * 2
        run_threads(*(lambda mine=mine: pop_all(mine) for mine in storages))
        assert sorted(popped) == list(range(n_trials))

    # --- deletion --------------------------------------------------------------------------------

    def test_ids_are_never_used_again(
        self, storage: Storage, study_id: int, capabilities: Capabilities
    ) -> None:
        if capabilities.reuses_ids:
            pytest.skip("The tables give ids again.")
        trial_id = storage.create_new_trial(study_id)
        storage.delete_study(study_id)
        again = storage.create_new_study([MINIMIZE], "study")
        assert again != study_id
        assert storage.create_new_trial(again) != trial_id

    def test_a_study_created_again_under_its_name_is_empty_for_everybody(
        self, storage: Storage, other: Storage, study_id: int
    ) -> None:
        for _ in range(3):
            storage.set_trial_state_values(
                storage.create_new_trial(study_id), TrialState.COMPLETE, [1.0]
            )
        assert other.get_n_trials(study_id) == 3
        storage.delete_study(study_id)
        again = storage.create_new_study([MINIMIZE], "study")
        assert other.get_study_id_from_name("study") == again
        assert other.get_all_trials(again) == []
        trial_id = other.create_new_trial(again)
        assert other.get_trial(trial_id).number == 0
        assert storage_contents(other) == storage_contents(storage)

    def test_one_of_many_creates_of_one_study_wins(
        self, opened: OpenStorage, storage: Storage, capabilities: Capabilities
    ) -> None:
        storages = [opened() if capabilities.shared else storage for _ in range(6)]
        studies: list[optuna.Study] = []
        run_threads(
            *(
                lambda mine=mine: studies.append(
                    optuna.create_study(storage=mine, study_name="s", load_if_exists=True)
                )
                for mine in storages
            )
        )
        assert len({study._study_id for study in studies}) == 1
        assert len(storage.get_all_studies()) == 1
