"""What sets damaged tables right: one statement for each finding that has a cure.

Nothing that a reader could make sense of is touched. What is taken away are rows that belong to
nothing, and values that nobody can read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import json
from typing import Any, Final

from optuna.distributions import CategoricalDistribution, json_to_distribution
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from trialstore.logs.relational import tables as t
from trialstore.logs.relational.dialects import record_time

_select: Any = sa.select
_FINISHED: Final = ("COMPLETE", "PRUNED", "FAIL")


def mend_tables(engine: Engine) -> list[str]:
    """Set right what can be, in one transaction.

    Args:
        engine: Of a database that nobody else writes to.

    Returns:
        What was done, a sentence each.
    """
    done: list[str] = []
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            connection.exec_driver_sql("REINDEX")
            connection.commit()
    with engine.begin() as connection:
        for mend in _MENDINGS:
            for what, n in mend(connection):
                if n:
                    done.append(f"{what}: {n}.")
    return done


_Counted = Iterator[tuple[str, int]]


def _n(connection: Connection, statement: Any) -> int:
    return connection.execute(statement).rowcount


def _orphans(connection: Connection) -> _Counted:
    # Trials first: their children are orphans then.
    of_study = (t.trials, t.study_directions, t.study_user_attributes, t.study_system_attributes)
    pairs = [(table, t.studies, "study_id") for table in of_study]
    pairs += [(table, t.trials, "trial_id") for table in t.CHILDREN_OF_TRIALS]
    for table, owner, name in pairs:
        missing = ~sa.exists().where(owner.c[name] == table.c[name])
        statement = sa.delete(table).where(missing)
        yield f"rows of {table.name} that belonged to nothing, deleted", _n(connection, statement)


def _states(connection: Connection) -> _Counted:
    c = t.trials.c
    kind: Any = sa.CHAR(64) if connection.dialect.name in ("mysql", "mariadb") else sa.Text
    state = sa.cast(c.state, kind)
    failed = sa.update(t.trials).values(state="FAIL").where(state.not_in(t.STATES))
    yield "trials of an unknown state, now FAIL", _n(connection, failed)
    objectives = (
        _select(sa.func.count())
        .where(t.study_directions.c.study_id == c.study_id)
        .correlate(t.trials)
        .scalar_subquery()
    )
    had = _select(sa.func.count()).where(t.trial_values.c.trial_id == c.trial_id).scalar_subquery()
    without = sa.update(t.trials).values(state="FAIL").where(state == "COMPLETE", had < objectives)
    yield "COMPLETE trials without all values, now FAIL", _n(connection, without)
    ended = sa.update(t.trials).values(datetime_complete=c.datetime_start)
    late = ended.where(state.in_(_FINISHED), c.datetime_complete.is_(None))
    yield "finished trials without a time, now that of their start", _n(connection, late)
    early = sa.update(t.trials).values(datetime_complete=None)
    running = state.in_(("RUNNING", "WAITING"))
    statement = early.where(running, c.datetime_complete.is_not(None))
    yield "times of completion of unfinished trials, removed", _n(connection, statement)


def _times(connection: Connection) -> _Counted:
    if connection.dialect.name != "sqlite":
        return
    for name in ("datetime_start", "datetime_complete"):
        column = t.trials.c[name]
        bad = []
        text = sa.type_coerce(column, sa.Text)
        for trial_id, value in connection.execute(_select(t.trials.c.trial_id, text)):
            try:
                record_time(value)
            except (ValueError, TypeError):
                bad.append(trial_id)
        for trial_id in bad:
            statement = sa.update(t.trials).values({name: None})
            connection.execute(statement.where(t.trials.c.trial_id == trial_id))
        yield f"values of {name} that were no time, removed", len(bad)


def _values(connection: Connection) -> _Counted:
    v, d = t.trial_values.c, t.study_directions.c
    n = (
        _select(sa.func.count())
        .select_from(t.trials.join(t.study_directions, d.study_id == t.trials.c.study_id))
        .where(t.trials.c.trial_id == v.trial_id)
        .correlate(t.trial_values)
        .scalar_subquery()
    )
    statement = sa.delete(t.trial_values).where(v.objective >= n)
    yield "values beyond the objectives, deleted", _n(connection, statement)
    for table, name in ((t.trial_values, "value"), (t.trial_intermediate_values, None)):
        value = table.c[name or "intermediate_value"]
        kind = table.c[f"{value.name}_type"]
        bad: list[Any] = [sa.and_(kind == "FINITE", value.is_(None))]
        if connection.dialect.name == "sqlite":
            odd = sa.func.typeof(value).not_in(("real", "integer"))
            bad.append(sa.and_(kind == "FINITE", odd))
        statement = sa.delete(table).where(sa.or_(*bad))
        yield f"rows of {table.name} without a number, deleted", _n(connection, statement)


def _params(connection: Connection) -> _Counted:
    p = t.trial_params.c
    n = 0
    for (text,) in connection.execute(_select(p.distribution_json).distinct()).all():
        same = p.distribution_json.is_(None) if text is None else p.distribution_json == text
        bad: Any = p.param_value.is_(None)
        try:
            distribution = json_to_distribution(text)
        except Exception:
            bad = sa.true()  # whatever Optuna raises on what is not its own
        else:
            if isinstance(distribution, CategoricalDistribution):
                top = len(distribution.choices)
                bad = sa.or_(bad, p.param_value < 0, p.param_value >= top)
        n += _n(connection, sa.delete(t.trial_params).where(same, bad))
    yield "parameters that nobody can read, deleted", n


def _doubles(connection: Connection) -> _Counted:
    for table in t.OPTUNA_TABLES:
        key = next(iter(table.primary_key.columns))
        for constraint in table.constraints:
            if not isinstance(constraint, sa.UniqueConstraint):
                continue
            columns = list(constraint.columns)
            latest = _select(sa.func.max(key)).group_by(*columns)
            keep = [
                row[0]
                for row in connection.execute(
                    _select(key).where(key.not_in(latest), *(c.is_not(None) for c in columns))
                )
            ]
            for row_id in keep:
                connection.execute(sa.delete(table).where(key == row_id))
            yield f"rows of {table.name} that were there twice, deleted", len(keep)


def _attributes(connection: Connection) -> _Counted:
    for table in (
        t.study_user_attributes,
        t.study_system_attributes,
        t.trial_user_attributes,
        t.trial_system_attributes,
    ):
        key = next(iter(table.primary_key.columns))
        bad = []
        for row_id, text in connection.execute(_select(key, table.c.value_json)):
            try:
                json.loads(text)
            except (ValueError, TypeError, RecursionError):
                bad.append(row_id)
        for row_id in bad:
            connection.execute(sa.delete(table).where(key == row_id))
        yield f"values in {table.name} that were no JSON, deleted", len(bad)


def _numbers(connection: Connection) -> _Counted:
    """Of trials with one number the first keeps it; the others get new ones, at the end."""
    c = t.trials.c
    rows = connection.execute(
        _select(c.study_id, c.trial_id, c.number).order_by(c.study_id, c.trial_id)
    ).all()
    taken: dict[int, set[int]] = {}
    homeless = []
    for study_id, trial_id, number in rows:
        numbers = taken.setdefault(study_id, set())
        if number is None or number in numbers:
            homeless.append((study_id, trial_id))
        else:
            numbers.add(number)
    for study_id, trial_id in homeless:
        numbers = taken[study_id]
        number = next(one for one in range(len(numbers) + 1) if one not in numbers)
        numbers.add(number)
        connection.execute(sa.update(t.trials).values(number=number).where(c.trial_id == trial_id))
    yield "trials without a number of their own, now with a free one", len(homeless)


_MENDINGS: Final[tuple[Callable[[Connection], _Counted], ...]] = (
    _orphans,
    _doubles,
    _values,
    _states,
    _times,
    _params,
    _attributes,
    _numbers,
)
