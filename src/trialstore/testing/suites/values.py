"""Values come back exactly as they were, from a fresh storage and from a fresh process."""

from __future__ import annotations

from datetime import datetime
import enum
import math

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
import pytest

from trialstore.storage import Storage
from trialstore.testing.contents import plain, storage_contents
from trialstore.testing.suites.base import (
    MINIMIZE,
    UNIT,
    Capabilities,
    OpenStorage,
    SuiteBase,
    contents_in_a_fresh_process,
)
from trialstore.testing.values import ODD_ATTRIBUTES, ODD_FLOATS, ODD_TEXTS

_PARAMS: dict[str, tuple[BaseDistribution, object]] = {
    "float": (FloatDistribution(-1e300, 1e300), 0.1 + 0.2),
    "subnormal": (FloatDistribution(-1.0, 1.0), 5e-324),
    "log": (FloatDistribution(1e-12, 1e12, log=True), 1 / 3),
    "stepped": (FloatDistribution(0.0, 1.0, step=0.1), 0.3),
    "int": (IntDistribution(-(2**53), 2**53), 2**53 - 1),
    "log int": (IntDistribution(1, 2**40, log=True), 2**39),
    "stepped int": (IntDistribution(0, 100, step=5), 35),
    "choice": (CategoricalDistribution(["a", 1, 2.5, None, True, "ż"]), "ż"),
    "no choice": (CategoricalDistribution([None]), None),
    "name with 'quotes\" % {} \n 日本": (UNIT, 0.5),
}


class _Name(str, enum.Enum):
    """Its own ``str`` says ``_Name.STUDY``; every other storage keeps what it is equal to."""

    STUDY = "a study"
    PARAM = "a param"
    ATTRIBUTE = "an attribute"


class ValueSuite(SuiteBase):
    """Part of ``StorageSuite``."""

    @staticmethod
    def _write_everything(storage: Storage, capabilities: Capabilities) -> None:
        attributes = dict(ODD_ATTRIBUTES)
        if capabilities.keeps_every_text:
            attributes |= {f"text {number}": text for number, text in enumerate(ODD_TEXTS)}
        if capabilities.keeps_every_key:
            attributes |= dict.fromkeys(ODD_TEXTS, "an odd key")
        for name, directions in (
            ("single", [MINIMIZE]),
            ("multiple ☃ '\"%{}", [StudyDirection.MAXIMIZE, MINIMIZE, StudyDirection.MAXIMIZE]),
            ("", [StudyDirection.MAXIMIZE]),
        ):
            study_id = storage.create_new_study(directions, name)
            for key, value in attributes.items():
                storage.set_study_user_attr(study_id, key, value)
            storage.set_study_system_attr(study_id, "s", [1, {"t": None}])
            trial_id = storage.create_new_trial(study_id)
            for key, value in attributes.items():
                storage.set_trial_user_attr(trial_id, key, value)
                storage.set_trial_system_attr(trial_id, key, value)
            for param, (distribution, value) in _PARAMS.items():
                storage.set_trial_param(
                    trial_id, param, distribution.to_internal_repr(value), distribution
                )
            for step, value in enumerate(ODD_FLOATS):
                storage.set_trial_intermediate_value(trial_id, step, value)
            storage.set_trial_intermediate_value(trial_id, -5, 1.0)
            storage.set_trial_state_values(
                trial_id, TrialState.COMPLETE, [math.inf, -math.inf, 5e-324][: len(directions)]
            )
            for value in ODD_FLOATS[1:]:
                told = storage.create_new_trial(study_id)
                storage.set_trial_state_values(
                    told, TrialState.COMPLETE, [value] * len(directions)
                )
            storage.set_trial_state_values(storage.create_new_trial(study_id), TrialState.FAIL)
            storage.create_new_trial(study_id)

    def test_everything_comes_back_from_a_fresh_storage(
        self, storage: Storage, other: Storage, capabilities: Capabilities
    ) -> None:
        self._write_everything(storage, capabilities)
        how = capabilities.as_kept()
        assert storage_contents(other, **how) == storage_contents(storage, **how)

    def test_everything_comes_back_from_a_fresh_process(
        self, storage: Storage, open_storage: OpenStorage, capabilities: Capabilities
    ) -> None:
        if not capabilities.crosses_processes:
            pytest.skip("The store does not leave its process.")
        self._write_everything(storage, capabilities)
        storage.flush()
        how = capabilities.as_kept()
        read = contents_in_a_fresh_process(open_storage, **how)
        assert read == storage_contents(storage, **how)

    def test_attributes_and_steps_are_what_was_written(
        self, storage: Storage, study_id: int, capabilities: Capabilities
    ) -> None:
        trial_id = storage.create_new_trial(study_id)
        attributes = dict(ODD_ATTRIBUTES)
        if capabilities.keeps_every_text:
            attributes |= {f"text {number}": text for number, text in enumerate(ODD_TEXTS)}
        for key, value in attributes.items():
            storage.set_trial_user_attr(trial_id, key, value)
        for step, value in enumerate(ODD_FLOATS):
            storage.set_trial_intermediate_value(trial_id, step, value)
        exact = capabilities.keeps_negative_zero
        trial = storage.get_trial(trial_id)
        assert plain(trial.user_attrs, exact=exact) == plain(attributes, exact=exact)
        steps = dict(enumerate(ODD_FLOATS))
        assert plain(trial.intermediate_values, exact=exact) == plain(steps, exact=exact)

    def test_parameters_are_what_was_written_in_their_order(
        self, storage: Storage, other: Storage, study_id: int, capabilities: Capabilities
    ) -> None:
        trial_id = storage.create_new_trial(study_id)
        for name, (distribution, value) in _PARAMS.items():
            storage.set_trial_param(
                trial_id, name, distribution.to_internal_repr(value), distribution
            )
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0])
        trial = other.get_trial(trial_id)
        assert trial.params == {name: value for name, (_, value) in _PARAMS.items()}
        if capabilities.keeps_order:
            assert list(trial.params) == list(_PARAMS)
        assert trial.distributions == {name: known for name, (known, _) in _PARAMS.items()}

    def test_a_name_that_is_of_an_enum_is_its_text(self, storage: Storage, other: Storage) -> None:
        study_id = storage.create_new_study([MINIMIZE], _Name.STUDY)
        assert storage.get_study_id_from_name(_Name.STUDY) == study_id
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_param(trial_id, _Name.PARAM, 0.5, UNIT)
        storage.set_trial_user_attr(trial_id, _Name.ATTRIBUTE, 1)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        template = create_trial(
            value=1.0,
            params={_Name.PARAM: 0.5},
            distributions={_Name.PARAM: UNIT},
            user_attrs={_Name.ATTRIBUTE: 1},
        )
        storage.create_new_trial(study_id, template)
        assert other.get_study_id_from_name("a study") == study_id
        assert other.get_study_name_from_id(study_id) == "a study"
        for trial in other.get_all_trials(study_id):
            assert (trial.params, trial.user_attrs) == ({"a param": 0.5}, {"an attribute": 1})

    @pytest.mark.parametrize("state", list(TrialState))
    def test_a_template_comes_back_as_it_was(
        self,
        storage: Storage,
        other: Storage,
        study_id: int,
        capabilities: Capabilities,
        state: TrialState,
    ) -> None:
        microsecond = 654321 if capabilities.keeps_microseconds else 0
        template = FrozenTrial(
            number=77,
            trial_id=-1,
            state=state,
            value=0.25 if state == TrialState.COMPLETE else None,
            datetime_start=datetime(2024, 2, 29, 23, 59, 59, microsecond),
            datetime_complete=(
                datetime(2024, 3, 1, 0, 0, 1, microsecond) if state.is_finished() else None
            ),
            params={"b": 0.5, "a": "z"},
            distributions={"b": UNIT, "a": CategoricalDistribution(["y", "z"])},
            user_attrs={"u": [1, 2]},
            system_attrs={"s": {"t": 1.5}},
            intermediate_values={3: 1.0, 1: math.nan},
        )
        trial = other.get_trial(storage.create_new_trial(study_id, template))
        assert trial.number == 0
        for field in (
            "state",
            "values",
            "datetime_start",
            "datetime_complete",
            "params",
            "distributions",
            "user_attrs",
            "system_attrs",
        ):
            assert getattr(trial, field) == getattr(template, field), field
        if capabilities.keeps_order:
            assert list(trial.params) == ["b", "a"]
        assert plain(trial.intermediate_values) == plain(template.intermediate_values)

    def test_the_largest_attribute_comes_back_whole(
        self, storage: Storage, other: Storage, study_id: int, capabilities: Capabilities
    ) -> None:
        trial_id = storage.create_new_trial(study_id)
        value = "x" * (capabilities.attribute_bytes_max - 2)  # the quotes of its JSON
        storage.set_trial_user_attr(trial_id, "large", value)
        storage.flush()
        assert other.get_trial(trial_id).user_attrs["large"] == value

    def test_a_value_that_a_column_can_t_hold_is_refused_at_the_call(
        self, storage: Storage, study_id: int, capabilities: Capabilities
    ) -> None:
        if capabilities.keeps_every_key:
            pytest.skip("The store holds every text.")
        trial_id = storage.create_new_trial(study_id)
        before = storage_contents(storage)
        for text in ("\ud800", "a\x00b"):
            for key, value in ((text, 1), ("k", text), ("k", [text])):
                try:
                    storage.set_trial_user_attr(trial_id, key, value)
                except ValueError:
                    assert storage_contents(storage) == before
                else:
                    assert storage.get_trial(trial_id).user_attrs[key] == value
                    before = storage_contents(storage)
