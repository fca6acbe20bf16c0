"""The conditional statements that carry out each operation."""

from __future__ import annotations

from collections.abc import Container, Sequence
import json
import math
from typing import Any

from trialstore import records as r
from trialstore.logs.relational import statements as s, tables as t
from trialstore.logs.relational.dialects import Dialect, Step
from trialstore.records import Operation


def number_and_type(value: float) -> tuple[float | None, str]:
    """A float as Optuna's columns hold it: infinities and NaN as a type without a value."""
    if math.isfinite(value):
        return value, "FINITE"
    if value != value:
        return None, "NAN"
    return None, "INF_POS" if value > 0 else "INF_NEG"


def _dumps(value: Any) -> str:
    return json.dumps(value)


def writes(d: Dialect, record: Operation, known: int, leased: Container[str]) -> list[Step]:
    """The conditional statements that carry out an operation.

    Args:
        known: An id that the newest trial of the operation's study is not below.
        leased: Owners whose trials get their first beat with their creation or claim.
    """
    if isinstance(record, r.SetTrialParam):
        return [
            d.step(
                s.set_param,
                trial_id=record.trial_id,
                name=record.param_name,
                value=record.param_value_internal,
                distribution=record.distribution,
            )
        ]
    if isinstance(record, r.SetTrialIntermediateValue):
        value, kind = number_and_type(record.intermediate_value)
        return [
            d.step(
                s.set_intermediate_value,
                trial_id=record.trial_id,
                step=record.step,
                value=value,
                type=kind,
            )
        ]
    if isinstance(record, r.SetTrialUserAttr | r.SetTrialSystemAttr):
        user = isinstance(record, r.SetTrialUserAttr)
        statement = s.set_trial_user_attr if user else s.set_trial_system_attr
        attrs = record.user_attr if isinstance(record, r.SetTrialUserAttr) else record.system_attr
        return [
            d.step(statement, trial_id=record.trial_id, key=key, value=_dumps(value))
            for key, value in attrs.items()
        ]
    if isinstance(record, r.SetTrialStateValues):
        return _state_writes(d, record, record.worker_id in leased)
    if isinstance(record, r.CreateTrial):
        beats = record.state == r.RUNNING and record.worker_id in leased
        return _create_trial_writes(d, record, known, beats)
    if isinstance(record, r.SetStudyUserAttr | r.SetStudySystemAttr):
        is_user = isinstance(record, r.SetStudyUserAttr)
        of_study = s.set_study_user_attr if is_user else s.set_study_system_attr
        attrs = record.user_attr if isinstance(record, r.SetStudyUserAttr) else record.system_attr
        return [
            d.step(of_study, study_id=record.study_id, key=key, value=_dumps(value))
            for key, value in attrs.items()
        ]
    if isinstance(record, r.CreateStudy):
        args: dict[str, Any] = {"name": record.study_name}
        for i, direction in enumerate(record.directions):
            args[f"direction_{i}"] = t.DIRECTIONS[direction]
        return [d.step(s.insert_directions, len(record.directions), **args)]
    if isinstance(record, r.DeleteStudy):
        study = {"study_id": record.study_id}
        steps = [d.step(s.delete_children, table, **study) for table in t.CHILDREN_OF_TRIALS]
        owned = (
            t.trials,
            t.study_directions,
            t.study_user_attributes,
            t.study_system_attributes,
            t.studies,
        )
        return steps + [d.step(s.delete_of_study, table, **study) for table in owned]
    return []


def _state_writes(d: Dialect, record: r.SetTrialStateValues, beats: bool) -> list[Step]:
    claims = record.state == r.RUNNING
    steps = []
    for objective, one in enumerate(record.values or ()):
        value, kind = number_and_type(one)
        steps.append(
            d.step(
                s.set_value,
                "claim" if claims else "id",
                trial_id=record.trial_id,
                objective=objective,
                value=value,
                type=kind,
            )
        )
    if claims:
        if beats:
            steps.append(d.step(s.first_beat, "claim", trial_id=record.trial_id))
        start = d.time_value(record.datetime_start)
        steps.append(d.step(s.claim_trial, trial_id=record.trial_id, start=start))
    elif record.state == r.WAITING:
        steps.append(d.step(s.requeue_trial, trial_id=record.trial_id))
        # Whoever claims it next may not beat, and would be taken for dead.
        steps.append(d.step(s.forget_beats, 1, id_0=record.trial_id))
    else:
        steps.append(
            d.step(
                s.finish_trial,
                trial_id=record.trial_id,
                state=t.STATES[record.state],
                complete=d.time_value(record.datetime_complete),
            )
        )
        if beats:
            # Who looks for the expired looks at all beats that there are.
            steps.append(d.step(s.forget_beats, 1, id_0=record.trial_id))
    return steps


def _create_trial_writes(d: Dialect, record: r.CreateTrial, known: int, beats: bool) -> list[Step]:
    of = {"study_id": record.study_id, "known": known}
    steps = [
        d.step(
            s.insert_trial,
            **of,
            state=t.STATES[record.state],
            start=d.time_value(record.datetime_start),
            complete=d.time_value(record.datetime_complete),
        )
    ]
    if beats:
        steps.append(d.step(s.first_beat, "newest", **of))
    for name, one in record.params.items():
        distribution = record.distributions[name]
        steps.append(
            d.step(s.set_param, "newest", **of, name=name, value=one, distribution=distribution)
        )
    for key, attr in record.user_attrs.items():
        text = _dumps(attr)
        steps.append(d.step(s.set_trial_user_attr, "newest", **of, key=key, value=text))
    for key, attr in record.system_attrs.items():
        text = _dumps(attr)
        steps.append(d.step(s.set_trial_system_attr, "newest", **of, key=key, value=text))
    for objective, one in enumerate(template_values(record)):
        value, kind = number_and_type(one)
        args = {"objective": objective, "value": value, "type": kind}
        steps.append(d.step(s.set_value, "newest", **of, **args))
    for step, one in record.intermediate_values.items():
        value, kind = number_and_type(one)
        args = {"step": int(step), "value": value, "type": kind}
        steps.append(d.step(s.set_intermediate_value, "newest", **of, **args))
    return steps


def template_values(record: r.CreateTrial) -> Sequence[float]:
    if record.values is not None:
        return record.values
    return () if record.value is None else (record.value,)
