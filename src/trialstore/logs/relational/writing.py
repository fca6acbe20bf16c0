"""The conditional statements that carry out each operation."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
import itertools
import json
import math
from typing import Any, Final, NamedTuple

from trialstore import records as r
from trialstore.logs.relational import statements as s, tables as t
from trialstore.logs.relational.dialects import Dialect
from trialstore.logs.relational.session import Step
from trialstore.records import Operation


def number_and_type(value: float) -> tuple[float | None, str]:
    """A float as Optuna's columns hold it: infinities and NaN as a type without a value."""
    if math.isfinite(value):
        return value, "FINITE"
    if value != value:
        return None, "NAN"
    return None, "INF_POS" if value > 0 else "INF_NEG"


def dumps(value: Any) -> str:
    """What a column holds of an attribute."""
    return json.dumps(value)


FIELDS: Final = (
    r.SetTrialParam,
    r.SetTrialIntermediateValue,
    r.SetTrialUserAttr,
    r.SetTrialSystemAttr,
)
ROWS_MAX: Final = 16
"""Rows that one statement writes at most; each number of them is a statement of its own."""


class _Field(NamedTuple):
    """A row of a child table of a trial."""

    statement: Callable[..., Any]
    key: Any
    args: dict[str, Any]


def _param(name: str, value: float, distribution: str) -> _Field:
    args = {"name": name, "value": value, "distribution": distribution}
    return _Field(s.set_params, name, args)


def _attr(statement: Callable[..., Any], key: str, value: Any) -> _Field:
    return _Field(statement, key, {"key": key, "value": dumps(value)})


def _intermediate(step: int, value: float) -> _Field:
    finite, kind = number_and_type(value)
    args = {"step": step, "value": finite, "type": kind}
    return _Field(s.set_intermediate_values, step, args)


def _field(record: Operation) -> _Field:
    if isinstance(record, r.SetTrialParam):
        return _param(record.param_name, record.param_value_internal, record.distribution)
    if isinstance(record, r.SetTrialIntermediateValue):
        return _intermediate(record.step, record.intermediate_value)
    if isinstance(record, r.SetTrialUserAttr):
        return _attr(s.set_trial_user_attrs, *next(iter(record.user_attr.items())))
    assert isinstance(record, r.SetTrialSystemAttr)
    return _attr(s.set_trial_system_attrs, *next(iter(record.system_attr.items())))


def _fields_step(d: Dialect, of: dict[str, int], whose: str, rows: Sequence[_Field]) -> Step:
    args: dict[str, Any] = dict(of)
    for i, row in enumerate(rows):
        for name, value in row.args.items():
            args[f"{name}_{i}"] = value
    return d.step(rows[0].statement, whose, len(rows), **args)


def runs(records: Sequence[Operation]) -> Iterator[Sequence[Operation]]:
    """The operations in order; those in a row that one statement can carry out, together.

    A statement must not write a row twice, so a key that repeats begins another run.
    """
    run: list[Operation] = []
    keys: set[Any] = set()
    for record in records:
        key = _field(record).key if isinstance(record, FIELDS) else None
        first = run[0] if run else None
        if first is not None and (
            not isinstance(record, FIELDS)
            or type(first) is not type(record)
            or first.trial_id != record.trial_id
            or key in keys
            or len(run) == ROWS_MAX
        ):
            yield run
            run, keys = [], set()
        run.append(record)
        keys.add(key)
    if run:
        yield run


def writes_together(d: Dialect, run: Sequence[Operation]) -> Step:
    """The statement that carries out a run of several operations."""
    of = {"trial_id": run[0].trial_id}  # type: ignore[attr-defined]
    return _fields_step(d, of, "id", [_field(record) for record in run])


def writes(
    d: Dialect,
    record: Operation,
    known: int,
    leased: Container[str],
    numbered: tuple[str, int] | None = None,
) -> list[Step]:
    """The conditional statements that carry out an operation.

    Args:
        known: An id that the newest trial of the operation's study is not below.
        leased: Owners whose trials get their first beat with their creation or claim.
        numbered: Of a trial to be created, where the mark has the number before: the session,
            and how many-eth after that number.
    """
    if isinstance(record, FIELDS):
        return [_fields_step(d, {"trial_id": record.trial_id}, "id", [_field(record)])]
    if isinstance(record, r.SetTrialStateValues):
        return _state_writes(d, record, record.worker_id in leased)
    if isinstance(record, r.CreateTrial):
        beats = record.state == r.RUNNING and record.worker_id in leased
        return _create_trial_writes(d, record, known, beats, numbered)
    if isinstance(record, r.SetStudyUserAttr | r.SetStudySystemAttr):
        is_user = isinstance(record, r.SetStudyUserAttr)
        of_study = s.set_study_user_attr if is_user else s.set_study_system_attr
        attrs = record.user_attr if isinstance(record, r.SetStudyUserAttr) else record.system_attr
        return [
            d.step(of_study, study_id=record.study_id, key=key, value=dumps(value))
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


def _create_trial_writes(
    d: Dialect,
    record: r.CreateTrial,
    known: int,
    beats: bool,
    numbered: tuple[str, int] | None,
) -> list[Step]:
    of = {"study_id": record.study_id, "known": known}
    session, nth = numbered or ("", 0)
    steps = [
        d.step(
            s.insert_trial,
            numbered is not None,
            **of,
            session=session,
            nth=nth,
            state=t.STATES[record.state],
            start=d.time_value(record.datetime_start),
            complete=d.time_value(record.datetime_complete),
        )
    ]
    if beats:
        steps.append(d.step(s.first_beat, "newest", **of))
    fields = [_param(name, x, record.distributions[name]) for name, x in record.params.items()]
    fields += [_attr(s.set_trial_user_attrs, key, x) for key, x in record.user_attrs.items()]
    fields += [_attr(s.set_trial_system_attrs, key, x) for key, x in record.system_attrs.items()]
    fields += [_intermediate(int(step), x) for step, x in record.intermediate_values.items()]
    for _, alike in itertools.groupby(fields, lambda field: field.statement):
        rows = list(alike)
        for start in range(0, len(rows), ROWS_MAX):
            steps.append(_fields_step(d, of, "newest", rows[start : start + ROWS_MAX]))
    for objective, one in enumerate(template_values(record)):
        value, kind = number_and_type(one)
        args = {"objective": objective, "value": value, "type": kind}
        steps.append(d.step(s.set_value, "newest", **of, **args))
    return steps


def is_bare(record: r.CreateTrial) -> bool:
    """Whether it creates a RUNNING trial with nothing else to it, as ``study.ask`` does."""
    return record.state == r.RUNNING and not (
        record.datetime_complete
        or record.params
        or record.user_attrs
        or record.system_attrs
        or record.intermediate_values
        or template_values(record)
    )


def template_values(record: r.CreateTrial) -> Sequence[float]:
    if record.values is not None:
        return record.values
    return () if record.value is None else (record.value,)
