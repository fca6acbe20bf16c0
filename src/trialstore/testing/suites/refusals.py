"""What is refused is refused at the call, with the same error everywhere, and leaves no byte."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import numpy as np
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial
import pytest

from trialstore.storage import Storage
from trialstore.testing.contents import storage_contents
from trialstore.testing.suites.base import (
    CHOICES,
    MINIMIZE,
    UNIT,
    Capabilities,
    OpenStorage,
    SuiteBase,
    count_exchanges,
)

_Call = Callable[[Storage, int, int], object]
_INT = IntDistribution(0, 10)
_ABSENT = 10_000_000

_CIRCULAR: list[Any] = []
_CIRCULAR.append(_CIRCULAR)


def _template(**fields: Any) -> FrozenTrial:
    """A template that Optuna's own constructor does not judge."""
    trial = create_trial(value=0.0)
    for name, value in fields.items():
        setattr(trial, name, value)
    return trial


# Name of the refusal -> the call on (storage, study id, RUNNING trial id), and its error.
REFUSALS: dict[str, tuple[_Call, type[Exception]]] = {
    "category past the last choice": (
        lambda s, study, trial: s.set_trial_param(trial, "c", 6.0, CHOICES),
        ValueError,
    ),
    "negative category": (
        lambda s, study, trial: s.set_trial_param(trial, "c", -1.0, CHOICES),
        ValueError,
    ),
    "fractional category": (
        lambda s, study, trial: s.set_trial_param(trial, "c", 0.5, CHOICES),
        ValueError,
    ),
    "trial id of numpy": (
        lambda s, study, trial: s.set_trial_user_attr(np.int64(trial), "k", 1),  # type: ignore[arg-type]
        TypeError,
    ),
    "fractional study id": (
        lambda s, study, trial: s.create_new_trial(float(study)),  # type: ignore[arg-type]
        TypeError,
    ),
    "NaN parameter": (
        lambda s, study, trial: s.set_trial_param(trial, "f", math.nan, UNIT),
        ValueError,
    ),
    "NaN integer parameter": (
        lambda s, study, trial: s.set_trial_param(trial, "i", math.nan, _INT),
        ValueError,
    ),
    "infinite integer parameter": (
        lambda s, study, trial: s.set_trial_param(trial, "i", math.inf, _INT),
        ValueError,
    ),
    "incompatible distribution": (
        lambda s, study, trial: s.set_trial_param(trial, "x", 0.0, CHOICES),
        ValueError,
    ),
    "incompatible log scale": (
        lambda s, study, trial: s.set_trial_param(
            trial, "x", 0.5, FloatDistribution(0.1, 1.0, log=True)
        ),
        ValueError,
    ),
    "other choices": (
        lambda s, study, trial: s.set_trial_param(
            trial, "known choices", 0.0, CategoricalDistribution(["b", "a"])
        ),
        ValueError,
    ),
    "parameter name that is no text": (
        lambda s, study, trial: s.set_trial_param(trial, 3, 0.5, UNIT),  # type: ignore[arg-type]
        TypeError,
    ),
    "parameter that is no number": (
        lambda s, study, trial: s.set_trial_param(trial, "f", "x", UNIT),  # type: ignore[arg-type]
        ValueError,
    ),
    "NaN objective value": (
        lambda s, study, trial: s.set_trial_state_values(trial, TrialState.COMPLETE, [math.nan]),
        ValueError,
    ),
    "too many objective values": (
        lambda s, study, trial: s.set_trial_state_values(trial, TrialState.COMPLETE, [1.0, 2.0]),
        ValueError,
    ),
    "no objective value in the list": (
        lambda s, study, trial: s.set_trial_state_values(trial, TrialState.COMPLETE, []),
        ValueError,
    ),
    "objective value that is no number": (
        lambda s, study, trial: s.set_trial_state_values(trial, TrialState.COMPLETE, ["x"]),  # type: ignore[list-item]
        ValueError,
    ),
    "state that is none": (
        lambda s, study, trial: s.set_trial_state_values(trial, 1),  # type: ignore[arg-type]
        TypeError,
    ),
    "intermediate value that is no number": (
        lambda s, study, trial: s.set_trial_intermediate_value(trial, 0, "x"),  # type: ignore[arg-type]
        ValueError,
    ),
    "fractional step": (
        lambda s, study, trial: s.set_trial_intermediate_value(trial, 0.5, 1.0),  # type: ignore[arg-type]
        TypeError,
    ),
    "attribute key that is no text": (
        lambda s, study, trial: s.set_trial_user_attr(trial, 1, "x"),  # type: ignore[arg-type]
        TypeError,
    ),
    "template with NaN value": (
        lambda s, study, trial: s.create_new_trial(study, _template(values=[math.nan])),
        ValueError,
    ),
    "template with two values": (
        lambda s, study, trial: s.create_new_trial(study, _template(values=[1.0, 2.0])),
        ValueError,
    ),
    "template with a parameter without distribution": (
        lambda s, study, trial: s.create_new_trial(study, _template(params={"x": 0.5})),
        ValueError,
    ),
    "template with a choice that does not exist": (
        lambda s, study, trial: s.create_new_trial(
            study, _template(params={"c": "none"}, distributions={"c": CHOICES})
        ),
        ValueError,
    ),
    "no directions": (lambda s, study, trial: s.create_new_study([]), ValueError),
    "study name taken": (
        lambda s, study, trial: s.create_new_study([MINIMIZE], "study"),
        DuplicatedStudyError,
    ),
}

_NO_JSON: dict[str, tuple[Any, type[Exception]]] = {
    "object": (object(), TypeError),
    "set": ({1}, TypeError),
    "bytes": (b"x", TypeError),
    "object inside": ({"a": [object()]}, TypeError),
    "circle": (_CIRCULAR, ValueError),
}

_ABSENT_STUDY: dict[str, Callable[[Storage], object]] = {
    "delete_study": lambda s: s.delete_study(_ABSENT),
    "set_study_user_attr": lambda s: s.set_study_user_attr(_ABSENT, "k", 1),
    "set_study_system_attr": lambda s: s.set_study_system_attr(_ABSENT, "k", 1),
    "get_study_name_from_id": lambda s: s.get_study_name_from_id(_ABSENT),
    "get_study_id_from_name": lambda s: s.get_study_id_from_name("absent"),
    "get_study_directions": lambda s: s.get_study_directions(_ABSENT),
    "get_study_user_attrs": lambda s: s.get_study_user_attrs(_ABSENT),
    "get_study_system_attrs": lambda s: s.get_study_system_attrs(_ABSENT),
    "create_new_trial": lambda s: s.create_new_trial(_ABSENT),
    "create_new_trial of a template": lambda s: s.create_new_trial(
        _ABSENT, create_trial(value=0.0)
    ),
    "get_all_trials": lambda s: s.get_all_trials(_ABSENT),
    "get_n_trials": lambda s: s.get_n_trials(_ABSENT),
    "get_best_trial": lambda s: s.get_best_trial(_ABSENT),
    "get_trial_id_from_study_id_trial_number": (
        lambda s: s.get_trial_id_from_study_id_trial_number(_ABSENT, 0)
    ),
}

_ABSENT_TRIAL: dict[str, Callable[[Storage, int], object]] = {
    "set_trial_param": lambda s, t: s.set_trial_param(t, "x", 0.5, UNIT),
    "set_trial_intermediate_value": lambda s, t: s.set_trial_intermediate_value(t, 0, 1.0),
    "set_trial_user_attr": lambda s, t: s.set_trial_user_attr(t, "k", 1),
    "set_trial_system_attr": lambda s, t: s.set_trial_system_attr(t, "k", 1),
    "tell": lambda s, t: s.set_trial_state_values(t, TrialState.COMPLETE, [1.0]),
    "claim": lambda s, t: s.set_trial_state_values(t, TrialState.RUNNING),
    "get_trial": lambda s, t: s.get_trial(t),
    "get_trial_param": lambda s, t: s.get_trial_param(t, "x"),
    "get_trial_params": lambda s, t: s.get_trial_params(t),
    "get_trial_user_attrs": lambda s, t: s.get_trial_user_attrs(t),
    "get_trial_system_attrs": lambda s, t: s.get_trial_system_attrs(t),
    "get_trial_number_from_id": lambda s, t: s.get_trial_number_from_id(t),
}

_WRITES_ON_A_TRIAL = [
    name for name in _ABSENT_TRIAL if name.startswith("set_") or name in ("tell", "claim")
]


class RefusalSuite(SuiteBase):
    """Part of ``StorageSuite``."""

    @pytest.fixture
    def trial_id(self, storage: Storage, study_id: int) -> int:
        """RUNNING, in a study that knows a float ``x`` and categorical ``known choices``."""
        finished = storage.create_new_trial(study_id)
        storage.set_trial_param(finished, "x", 0.5, UNIT)
        storage.set_trial_param(
            finished, "known choices", 0.0, CategoricalDistribution(["a", "b"])
        )
        storage.set_trial_state_values(finished, TrialState.COMPLETE, [1.0])
        return storage.create_new_trial(study_id)

    def _assert_refused(
        self, storage: Storage, call: Callable[[], object], error: type[Exception]
    ) -> None:
        before = storage_contents(storage)
        counter = count_exchanges(storage)
        with pytest.raises(error):
            call()
        storage.flush()
        assert counter.n_records == 0, f"appended: {counter.appended}"
        assert storage_contents(storage) == before

    @pytest.mark.parametrize("name", REFUSALS)
    def test_refused_at_the_call(
        self, storage: Storage, study_id: int, trial_id: int, name: str
    ) -> None:
        call, error = REFUSALS[name]
        self._assert_refused(storage, lambda: call(storage, study_id, trial_id), error)

    @pytest.mark.parametrize("name", _NO_JSON)
    @pytest.mark.parametrize("whose", ["study user", "study system", "trial user", "trial system"])
    def test_an_attribute_that_is_no_json_is_refused(
        self,
        storage: Storage,
        study_id: int,
        trial_id: int,
        capabilities: Capabilities,
        name: str,
        whose: str,
    ) -> None:
        if capabilities.keeps_objects:
            pytest.skip("The store keeps any object.")
        value, error = _NO_JSON[name]
        set_attr, of = {
            "study user": (storage.set_study_user_attr, study_id),
            "study system": (storage.set_study_system_attr, study_id),
            "trial user": (storage.set_trial_user_attr, trial_id),
            "trial system": (storage.set_trial_system_attr, trial_id),
        }[whose]
        self._assert_refused(storage, lambda: set_attr(of, "k", value), error)

    @pytest.mark.parametrize("name", _ABSENT_STUDY)
    def test_an_absent_study_is_a_key_error(
        self, storage: Storage, trial_id: int, name: str
    ) -> None:
        self._assert_refused(storage, lambda: _ABSENT_STUDY[name](storage), KeyError)

    @pytest.mark.parametrize("name", _ABSENT_TRIAL)
    def test_an_absent_trial_is_a_key_error(
        self, storage: Storage, trial_id: int, name: str
    ) -> None:
        self._assert_refused(storage, lambda: _ABSENT_TRIAL[name](storage, _ABSENT), KeyError)

    @pytest.mark.parametrize("name", _WRITES_ON_A_TRIAL)
    @pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
    def test_a_finished_trial_is_not_updated(
        self, storage: Storage, trial_id: int, name: str, state: TrialState
    ) -> None:
        values = [1.0] if state == TrialState.COMPLETE else None
        storage.set_trial_state_values(trial_id, state, values)
        write = _ABSENT_TRIAL[name]
        self._assert_refused(storage, lambda: write(storage, trial_id), UpdateFinishedTrialError)

    def test_a_finished_trial_is_refused_before_distributions_are_compared(
        self, storage: Storage, trial_id: int
    ) -> None:
        storage.set_trial_state_values(trial_id, TrialState.FAIL)
        with pytest.raises(UpdateFinishedTrialError):
            storage.set_trial_param(trial_id, "x", 0.0, CHOICES)

    @pytest.mark.parametrize("name", _ABSENT_TRIAL)
    def test_a_trial_of_a_deleted_study_is_a_key_error(
        self, storage: Storage, study_id: int, trial_id: int, name: str
    ) -> None:
        storage.delete_study(study_id)
        self._assert_refused(storage, lambda: _ABSENT_TRIAL[name](storage, trial_id), KeyError)

    @pytest.mark.parametrize("name", _ABSENT_TRIAL)
    def test_a_trial_of_a_study_deleted_elsewhere_is_a_key_error(
        self, storage: Storage, other: Storage, study_id: int, trial_id: int, name: str
    ) -> None:
        other.delete_study(study_id)
        storage.get_all_studies()
        self._assert_refused(storage, lambda: _ABSENT_TRIAL[name](storage, trial_id), KeyError)

    def test_no_refused_call_poisons_the_study(
        self,
        storage: Storage,
        study_id: int,
        trial_id: int,
        opened: OpenStorage,
        capabilities: Capabilities,
    ) -> None:
        for call, error in REFUSALS.values():
            with pytest.raises(error):
                call(storage, study_id, trial_id)
        storage.set_trial_param(trial_id, "x", 0.25, UNIT)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.5])
        reader = opened() if capabilities.shared else storage
        assert [trial.params["x"] for trial in reader.get_all_trials(study_id)] == [0.5, 0.25]
        assert reader.get_best_trial(study_id).number == 1

    @pytest.mark.parametrize("whole", [False, True])
    def test_a_queued_template_is_not_what_later_parameters_must_match(
        self, storage: Storage, other: Storage, study_id: int, trial_id: int, whole: bool
    ) -> None:
        """It may have any distribution, and its reader may know no other trial yet."""
        storage.set_trial_param(trial_id, "x", 0.5, UNIT)
        template = create_trial(
            state=TrialState.WAITING, params={"x": "b"}, distributions={"x": CHOICES}
        )
        queued = storage.create_new_trial(study_id, template)
        (trial,) = other.get_all_trials(study_id, states=(TrialState.WAITING,))
        assert trial._trial_id == queued
        if whole:
            other.get_all_trials(study_id)
        running = other.create_new_trial(study_id)
        with pytest.raises(ValueError):
            other.set_trial_param(running, "x", 1.0, CHOICES)
        other.set_trial_param(running, "x", 0.5, UNIT)

    def test_best_trial_of_two_objectives_is_refused(self, storage: Storage) -> None:
        study_id = storage.create_new_study([MINIMIZE, MINIMIZE])
        with pytest.raises(RuntimeError):
            storage.get_best_trial(study_id)

    def test_best_trial_of_nothing_is_refused(self, storage: Storage, study_id: int) -> None:
        storage.create_new_trial(study_id)
        with pytest.raises(ValueError):
            storage.get_best_trial(study_id)
