"""What sets damaged tables right: one statement for each finding that has a cure.

Nothing that a reader could make sense of is touched. What is taken away are rows that belong to
nothing, and values that nobody can read. Where a table, a study or its directions are gone, as
little as possible takes their place, so that what hangs on them can be read again.
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
from trialstore.logs.relational.findings import missing_constraints

_select: Any = sa.select
_FINISHED: Final = ("COMPLETE", "PRUNED", "FAIL")
_NOT_SET: Final = t.DIRECTIONS[0]


def mend_tables(engine: Engine) -> tuple[list[str], list[str]]:
    """Set right what can be, in one transaction; tables that are missing are made before it.

    Args:
        engine: Of a database that nobody else writes to, at the latest schema version.

    Returns:
        What was done without losing more, and what was given up; a sentence each.

    Raises:
        ValueError: The table of the trials is gone, and what hangs on it means nothing.
    """
    done: list[str] = []
    given_up: list[str] = []
    missing = {*t.metadata.tables} - {*sa.inspect(engine).get_table_names()}
    if t.trials.name in missing:
        raise ValueError("The table trials is gone, and the rest means nothing without it.")
    t.metadata.create_all(engine)
    given_up += [f"table {name}, now empty." for name in sorted(missing)]
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            connection.exec_driver_sql("REINDEX")
            connection.commit()
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # by itself only before a row changes
        for mend in _MENDINGS:
            for what, n, is_lost in mend(connection):
                if n:
                    (given_up if is_lost else done).append(f"{what}: {n}.")
    return done, given_up


_LOST: Final = True
_KEPT: Final = False
_Counted = Iterator[tuple[str, int, bool]]
"""What was mended, in how many rows, and whether anything was lost with that."""


def _n(connection: Connection, statement: Any) -> int:
    return connection.execute(statement).rowcount


def _constraints(connection: Connection) -> _Counted:
    """Tables without them are written anew, each row once, the latest of doubles."""
    if connection.dialect.name != "sqlite":
        return
    for table in t.OPTUNA_TABLES:
        inspector = sa.inspect(connection)
        if table is t.trials or not any(missing_constraints(inspector, table)):
            continue
        for index in inspector.get_indexes(table.name):
            connection.execute(sa.text(f'DROP INDEX "{index["name"]}"'))
        connection.execute(sa.text(f"ALTER TABLE {table.name} RENAME TO damaged"))
        table.create(connection)
        key = next(iter(table.primary_key.columns)).name
        names = ", ".join(f'"{column.name}"' for column in table.columns)
        constraints = [one for one in table.constraints if isinstance(one, sa.UniqueConstraint)]
        unique = ", ".join(f'"{column.name}"' for one in constraints for column in one.columns)
        rows = f"SELECT max(rowid) FROM damaged GROUP BY {unique or key}"
        written = f"INSERT INTO {table.name} ({names}) SELECT {names} FROM damaged"
        kept = _n(connection, sa.text(f"{written} WHERE rowid IN ({rows})"))
        connection.execute(sa.text("DROP TABLE damaged"))
        yield f"{table.name} had lost a constraint, rows written anew", kept, _KEPT


def _studies(connection: Connection) -> _Counted:
    """Trials whose study is gone get one by another name; without trials nothing is missed."""
    c = t.trials.c
    missing = ~sa.exists().where(t.studies.c.study_id == c.study_id)
    lost = connection.scalars(_select(c.study_id).where(missing).distinct()).all()
    for study_id in lost:
        row = {"study_id": study_id, "study_name": f"lost-study-{study_id}"}
        connection.execute(sa.insert(t.studies).values(row))
    yield "studies of trials that were gone, now lost-study-ID", len(lost), _LOST


def _directions(connection: Connection) -> _Counted:
    """How many objectives a study has is told by its values, if not by its directions."""
    d, c = t.study_directions.c, t.trials.c
    studies = connection.scalars(_select(t.studies.c.study_id))
    known: dict[int, set[int]] = {study_id: set() for study_id in studies}
    for study_id, objective in connection.execute(_select(d.study_id, d.objective)):
        known.setdefault(study_id, set()).add(objective)
    of_values = (
        _select(c.study_id, sa.func.max(t.trial_values.c.objective))
        .select_from(t.trials.join(t.trial_values))
        .group_by(c.study_id)
    )
    greatest: dict[int, int] = {row[0]: row[1] for row in connection.execute(of_values)}
    n = 0
    for study_id, objectives in known.items():
        last = max(objectives) if objectives else greatest.get(study_id, 0)
        for objective in {*range(last + 1)} - objectives:
            row = {"study_id": study_id, "objective": objective, "direction": _NOT_SET}
            connection.execute(sa.insert(t.study_directions).values(row))
            n += 1
    direction = sa.type_coerce(d.direction, sa.Text)
    if connection.dialect.name == "sqlite":  # elsewhere the column's type refuses them
        unknown = sa.update(t.study_directions).where(direction.not_in(t.DIRECTIONS))
        n += _n(connection, unknown.values(direction=_NOT_SET))
    yield "directions that were gone or unknown, now NOT_SET", n, _LOST


def _orphans(connection: Connection) -> _Counted:
    # Trials first: their children are orphans then.
    of_study = (t.trials, t.study_directions, t.study_user_attributes, t.study_system_attributes)
    pairs = [(table, t.studies, "study_id") for table in of_study]
    pairs += [(table, t.trials, "trial_id") for table in t.CHILDREN_OF_TRIALS]
    for table, owner, name in pairs:
        missing = ~sa.exists().where(owner.c[name] == table.c[name])
        n = _n(connection, sa.delete(table).where(missing))
        yield f"rows of {table.name} that belonged to nothing, deleted", n, _LOST


def _states(connection: Connection) -> _Counted:
    c = t.trials.c
    kind: Any = sa.CHAR(64) if connection.dialect.name in ("mysql", "mariadb") else sa.Text
    state = sa.cast(c.state, kind)
    failed = sa.update(t.trials).values(state="FAIL").where(state.not_in(t.STATES))
    yield "trials of an unknown state, now FAIL", _n(connection, failed), _LOST
    objectives = (
        _select(sa.func.count())
        .where(t.study_directions.c.study_id == c.study_id)
        .correlate(t.trials)
        .scalar_subquery()
    )
    had = _select(sa.func.count()).where(t.trial_values.c.trial_id == c.trial_id).scalar_subquery()
    without = sa.update(t.trials).values(state="FAIL").where(state == "COMPLETE", had < objectives)
    yield "COMPLETE trials without all values, now FAIL", _n(connection, without), _LOST
    ended = sa.update(t.trials).values(datetime_complete=c.datetime_start)
    late = ended.where(state.in_(_FINISHED), c.datetime_complete.is_(None))
    yield "finished trials without a time, now that of their start", _n(connection, late), _LOST
    early = sa.update(t.trials).values(datetime_complete=None)
    running = state.in_(("RUNNING", "WAITING"))
    statement = early.where(running, c.datetime_complete.is_not(None))
    yield "times of completion of unfinished trials, removed", _n(connection, statement), _KEPT


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
        yield f"values of {name} that were no time, removed", len(bad), _LOST


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
    yield "values beyond the objectives, deleted", _n(connection, statement), _LOST
    for table, name in ((t.trial_values, "value"), (t.trial_intermediate_values, None)):
        value = table.c[name or "intermediate_value"]
        kind = table.c[f"{value.name}_type"]
        bad: list[Any] = [sa.and_(kind == "FINITE", value.is_(None))]
        if connection.dialect.name == "sqlite":
            odd = sa.func.typeof(value).not_in(("real", "integer"))
            bad.append(sa.and_(kind == "FINITE", odd))
        statement = sa.delete(table).where(sa.or_(*bad))
        yield f"rows of {table.name} without a number, deleted", _n(connection, statement), _LOST


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
    yield "parameters that nobody can read, deleted", n, _LOST


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
            yield f"rows of {table.name} that were there twice, deleted", len(keep), _KEPT


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
        yield f"values in {table.name} that were no JSON, deleted", len(bad), _LOST


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
    yield "trials without a number of their own, now with a free one", len(homeless), _KEPT


_MENDINGS: Final[tuple[Callable[[Connection], _Counted], ...]] = (
    _constraints,
    _studies,
    _orphans,
    _doubles,
    _directions,
    _values,
    _states,
    _times,
    _params,
    _attributes,
    _numbers,
)
