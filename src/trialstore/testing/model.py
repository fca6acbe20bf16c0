"""What a store must say, in plain dictionaries: an oracle that shares no code with the replica.

Every method takes the call's arguments and either changes the model and returns, or raises the
error that the storage has to raise. Ids are those that the storage gave.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
)
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from trialstore.testing.contents import Contents, plain


@dataclass
class ModelTrial:
    """A trial; ``params`` are pairs of external value and distribution, in order."""

    id: int
    number: int
    state: TrialState = TrialState.RUNNING
    values: list[float] | None = None
    params: dict[str, tuple[Any, BaseDistribution]] = field(default_factory=dict)
    user_attrs: dict[str, Any] = field(default_factory=dict)
    system_attrs: dict[str, Any] = field(default_factory=dict)
    intermediate_values: dict[int, float] = field(default_factory=dict)

    def contents(self, *, exact: bool = True, in_order: bool = True) -> Contents:
        """As ``trial_contents`` of the same trial, times apart."""
        names = self.params if in_order else sorted(self.params)
        return {
            "number": self.number,
            "state": self.state.name,
            "values": plain(self.values, exact=exact),
            "params": [
                (
                    name,
                    plain(self.params[name][0], exact=exact),
                    distribution_to_json(self.params[name][1]),
                )
                for name in names
            ],
            "user_attrs": plain(self.user_attrs, exact=exact),
            "system_attrs": plain(self.system_attrs, exact=exact),
            "intermediate_values": plain(self.intermediate_values, exact=exact),
            "id": self.id,
        }


@dataclass
class ModelStudy:
    id: int
    name: str
    directions: list[StudyDirection]
    trials: list[ModelTrial] = field(default_factory=list)
    user_attrs: dict[str, Any] = field(default_factory=dict)
    system_attrs: dict[str, Any] = field(default_factory=dict)
    suggested: dict[str, BaseDistribution] = field(default_factory=dict)
    """Of those names that were set on a trial, which a template's were not."""

    def distribution(self, name: str) -> BaseDistribution | None:
        """Of the first trial that has the parameter."""
        for trial in self.trials:
            if name in trial.params:
                return trial.params[name][1]
        return None


class Model:
    """A store."""

    def __init__(self) -> None:
        self.studies: dict[int, ModelStudy] = {}

    # --- look-up ---------------------------------------------------------------------------------

    def study(self, study_id: int) -> ModelStudy:
        return self.studies[study_id]

    def study_named(self, name: str) -> ModelStudy | None:
        return next((study for study in self.studies.values() if study.name == name), None)

    def find(self, trial_id: int) -> tuple[ModelStudy, ModelTrial]:
        for study in self.studies.values():
            for trial in study.trials:
                if trial.id == trial_id:
                    return study, trial
        raise KeyError(trial_id)

    def updatable(self, trial_id: int) -> tuple[ModelStudy, ModelTrial]:
        study, trial = self.find(trial_id)
        if trial.state.is_finished():
            raise UpdateFinishedTrialError(trial.number)
        return study, trial

    def trial_ids(self) -> set[int]:
        return {trial.id for study in self.studies.values() for trial in study.trials}

    def contents(self, *, exact: bool = True, in_order: bool = True) -> dict[str, Contents]:
        """As ``storage_contents``, times apart."""
        return {
            study.name: {
                "id": study.id,
                "directions": [direction.name for direction in study.directions],
                "user_attrs": plain(study.user_attrs, exact=exact),
                "system_attrs": plain(study.system_attrs, exact=exact),
                "trials": [
                    trial.contents(exact=exact, in_order=in_order) for trial in study.trials
                ],
            }
            for study in self.studies.values()
        }

    # --- studies ---------------------------------------------------------------------------------

    def check_name(self, name: str) -> None:
        if self.study_named(name) is not None:
            raise DuplicatedStudyError(name)

    def create_study(self, study_id: int, name: str, directions: list[StudyDirection]) -> None:
        assert study_id not in self.studies, "the id of a living study was given again"
        self.studies[study_id] = ModelStudy(study_id, name, directions)

    def delete_study(self, study_id: int) -> None:
        del self.studies[study_id]

    # --- trials ----------------------------------------------------------------------------------

    def create_trial(self, study_id: int, trial_id: int, template: FrozenTrial | None) -> None:
        assert trial_id not in self.trial_ids(), "the id of a living trial was given again"
        study = self.studies[study_id]
        trial = ModelTrial(trial_id, len(study.trials))
        if template is not None:
            trial.state = template.state
            trial.values = template.values
            # Of choices that are equal, such as 1 and True, the first is meant.
            trial.params = {
                name: (known.to_external_repr(known.to_internal_repr(value)), known)
                for name, value in template.params.items()
                for known in (template.distributions[name],)
            }
            trial.user_attrs = dict(template.user_attrs)
            trial.system_attrs = dict(template.system_attrs)
            trial.intermediate_values = dict(template.intermediate_values)
        study.trials.append(trial)

    def set_param(
        self, trial_id: int, name: str, internal: float, distribution: BaseDistribution
    ) -> None:
        study, trial = self.updatable(trial_id)
        known = study.distribution(name)
        if known is not None:
            check_distribution_compatibility(known, distribution)
        study.suggested.setdefault(name, distribution)
        trial.params[name] = (distribution.to_external_repr(internal), distribution)

    def set_state(
        self, trial_id: int, state: TrialState, values: list[float] | None = None
    ) -> bool:
        _, trial = self.updatable(trial_id)
        if state == trial.state == TrialState.RUNNING:
            return False
        trial.state = state
        if values is not None:
            trial.values = values
        return True

    # --- answers ---------------------------------------------------------------------------------

    def best_number(self, study_id: int) -> int:
        """Raises as ``get_best_trial`` does."""
        study = self.studies[study_id]
        if len(study.directions) > 1:
            raise RuntimeError
        scored = [
            (trial.values[0], trial.number)
            for trial in study.trials
            if trial.state == TrialState.COMPLETE and trial.values is not None
        ]
        if not scored:
            raise ValueError
        maximize = study.directions[0] == StudyDirection.MAXIMIZE
        return min((-value if maximize else value, number) for value, number in scored)[1]
