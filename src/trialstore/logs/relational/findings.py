"""What can be wrong in Optuna's tables, each asked of the database in one statement.

Only distributions, attributes and SQLite's times have to be looked at here, row by row; of the
first there are few different ones. Nothing is written, and rows arrive in portions.
"""

from __future__ import annotations

from collections.abc import Iterator
import json
from typing import Any, Final

from optuna.distributions import (
    CategoricalDistribution,
    check_distribution_compatibility,
    json_to_distribution,
)
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from trialstore.findings import Finding
from trialstore.logs.relational import tables as t
from trialstore.logs.relational.dialects import record_time

_FINISHED: Final = ("COMPLETE", "PRUNED", "FAIL")
_SHOWN_MAX: Final = 100
"""Findings of one kind that are told one by one; of more, how many there are."""
_PORTION_ROWS: Final = 2000

# The types of Core follow every column, which is more than a type checker bears here.
_select: Any = sa.select


def findings_in_tables(engine: Engine, *, deep: bool) -> Iterator[Finding]:
    """Everything that is wrong; the tables must be there for all but their own findings."""
    with engine.connect() as connection:
        first = [*_sqlite_file(connection, deep), *_schema(connection)]
        yield from first
        if {finding.kind for finding in first} & {"file-damaged", "table-missing"}:
            return
        for ask in _QUESTIONS:
            yield from _some(ask(connection))


def _some(found: Iterator[Finding]) -> Iterator[Finding]:
    """The first of many, and how many more there are."""
    n = 0
    for finding in found:
        n += 1
        if n <= _SHOWN_MAX:
            last = finding
            yield finding
    if n > _SHOWN_MAX:
        more = f"{n - _SHOWN_MAX} more of the same kind."
        yield Finding(last.kind, "further rows", more, last.severity)


def _rows(connection: Connection, query: Any) -> Iterator[Any]:
    return iter(connection.execution_options(yield_per=_PORTION_ROWS).execute(query))


def _text(column: Any) -> Any:
    """An enumeration or a time as it is stored: SQLAlchemy would refuse what it does not know."""
    return sa.type_coerce(sa.cast(column, sa.Text), sa.Text)


def _char(connection: Connection, column: Any) -> Any:
    kind: Any = sa.CHAR(64) if connection.dialect.name in ("mysql", "mariadb") else sa.Text
    return sa.cast(column, kind)


def _sqlite_file(connection: Connection, deep: bool) -> Iterator[Finding]:
    """The quick check leaves out whether each index has what its table has."""
    if connection.dialect.name != "sqlite":
        return
    file = str(connection.engine.url.database)
    try:
        for (text,) in connection.exec_driver_sql(
            "PRAGMA integrity_check" if deep else "PRAGMA quick_check"
        ):
            if text != "ok":
                yield Finding("file-damaged", file, text)
    except sa.exc.DatabaseError as error:
        yield Finding("file-damaged", file, str(error.orig))


# --- the schema ----------------------------------------------------------------------------------


def missing_constraints(inspector: sa.Inspector, table: sa.Table) -> Iterator[tuple[str, ...]]:
    """The columns of each combination that should be unique in a table and need not be."""
    unique: set[tuple[str | None, ...]] = {
        tuple(one["column_names"]) for one in inspector.get_unique_constraints(table.name)
    }
    unique |= {
        tuple(one["column_names"])
        for one in inspector.get_indexes(table.name)
        if one.get("unique")
    }
    for constraint in table.constraints:
        if isinstance(constraint, sa.UniqueConstraint):
            names = tuple(column.name for column in constraint.columns)
            if names not in unique:
                yield names


def _schema(connection: Connection) -> Iterator[Finding]:
    inspector = sa.inspect(connection)
    there = set(inspector.get_table_names())
    for table in t.OPTUNA_TABLES:
        if table.name not in there:
            yield Finding("table-missing", str(table.name), "The table is not there.")
            continue
        columns = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in columns:
                yield Finding("column-missing", f"{table.name}.{column.name}", "Not there.")
        for names in missing_constraints(inspector, table):
            where = f"{table.name} ({', '.join(names)})"
            yield Finding(
                "constraint-missing", where, "Nothing keeps two rows from being the same one."
            )
    if {"alembic_version", "version_info"} <= there:
        versions = connection.scalars(_select(t.alembic_version.c.version_num)).all()
        if list(versions) != [t.HEAD_VERSION]:
            yield Finding(
                "schema-version",
                "alembic_version",
                f"The tables say version {', '.join(versions) or 'nothing'}; {t.HEAD_VERSION} is "
                "what Optuna and trialstore work on. `trialstore upgrade` brings older ones up.",
            )
        if connection.scalar(_select(sa.func.count()).select_from(t.version_info)) != 1:
            yield Finding("schema-version", "version_info", "It must have exactly one row.")


# --- rows ----------------------------------------------------------------------------------------


def _orphans(connection: Connection) -> Iterator[Finding]:
    """Rows whose trial or study is not there."""
    of_studies = (t.study_directions, t.study_user_attributes, t.study_system_attributes, t.trials)
    pairs = [(table, t.trials, "trial_id") for table in t.CHILDREN_OF_TRIALS]
    pairs += [(table, t.studies, "study_id") for table in of_studies]
    for table, owner, name in pairs:
        key = next(iter(table.primary_key.columns))
        own = table.c[name]
        # Compared with a NULL, nothing is equal: a row of nobody is found as well.
        query = _select(key, own).where(~sa.exists().where(owner.c[name] == own)).order_by(key)
        for row_id, owner_id in _rows(connection, query):
            yield Finding(
                "orphan",
                f"{table.name}, {key.name} {row_id}",
                f"It belongs to {name} {owner_id}, which does not exist.",
                "warning",
            )


def _numbers(connection: Connection) -> Iterator[Finding]:
    """Trial numbers count from 0 without gap or double, in the order of ids."""
    c = t.trials.c
    query = _select(c.study_id, c.trial_id, c.number).order_by(c.study_id, c.number, c.trial_id)
    study, expected = None, 0
    for study_id, trial_id, number in _rows(connection, query):
        if study_id != study:
            study, expected = study_id, 0
        where = f"study {study_id}, trial id {trial_id}"
        if number is None:
            yield Finding("number-missing", where, "The trial has no number.")
        elif number < expected:
            yield Finding("number-double", where, f"Number {number} is there more than once.")
        else:
            if number > expected:
                gap = f"{expected}" + (f" to {number - 1}" if number - 1 > expected else "")
                yield Finding("number-gap", where, f"No trial has number {gap}.", "warning")
            expected = number + 1


def _states(connection: Connection) -> Iterator[Finding]:
    c = t.trials.c
    state = _char(connection, c.state)
    unknown = _select(c.study_id, c.trial_id, state).where(state.not_in(t.STATES))
    for study_id, trial_id, text in _rows(connection, unknown):
        where = f"study {study_id}, trial id {trial_id}"
        yield Finding("state-unknown", where, f"{text!r} is no state; it is shown as FAIL.")
    finished = state.in_(_FINISHED)
    odd = _select(c.study_id, c.trial_id, state).where(
        sa.or_(
            sa.and_(finished, c.datetime_complete.is_(None)),
            sa.and_(state.in_(("RUNNING", "WAITING")), c.datetime_complete.is_not(None)),
        )
    )
    for study_id, trial_id, text in _rows(connection, odd):
        has = "no" if text in _FINISHED else "a"
        yield Finding(
            "completion-time",
            f"study {study_id}, trial id {trial_id}",
            f"The trial is {text} and has {has} time of completion.",
            "warning",
        )


def _times(connection: Connection) -> Iterator[Finding]:
    if connection.dialect.name != "sqlite":
        return  # elsewhere a column of times holds times only
    c = t.trials.c
    for name in ("datetime_start", "datetime_complete"):
        query = _select(c.study_id, c.trial_id, _text(c[name])).where(c[name].is_not(None))
        for study_id, trial_id, text in _rows(connection, query):
            try:
                record_time(text)
            except (ValueError, TypeError):
                where = f"study {study_id}, trial id {trial_id}"
                yield Finding("time-unreadable", where, f"{name} is {text!r}.", "warning")


def _directions(connection: Connection) -> Iterator[Finding]:
    d, s = t.study_directions.c, t.studies.c
    direction = _char(connection, d.direction)
    unknown = _select(d.study_id, direction).where(direction.not_in(t.DIRECTIONS))
    for study_id, text in _rows(connection, unknown):
        yield Finding("direction-unknown", f"study {study_id}", f"{text!r} is no direction.")
    query = (
        _select(s.study_id, sa.func.count(d.objective), sa.func.max(d.objective))
        .select_from(t.studies.outerjoin(t.study_directions, d.study_id == s.study_id))
        .group_by(s.study_id)
    )
    for study_id, n, greatest in _rows(connection, query):
        if n == 0 or greatest != n - 1:
            text = f"{n} directions, the last of objective {greatest}."
            yield Finding("directions-missing", f"study {study_id}", text)


def _values(connection: Connection) -> Iterator[Finding]:
    """A COMPLETE trial has one value for each objective, and every value is a number."""
    c, v, d = t.trials.c, t.trial_values.c, t.study_directions.c
    objectives = (
        _select(d.study_id, sa.func.count().label("n")).group_by(d.study_id).subquery("objectives")
    )
    had = _select(v.trial_id, sa.func.count().label("n")).group_by(v.trial_id).subquery("had")
    state = _char(connection, c.state)
    n = sa.func.coalesce(had.c.n, 0)
    query = (
        _select(c.study_id, c.trial_id, state, n, objectives.c.n)
        .select_from(
            t.trials.join(objectives, objectives.c.study_id == c.study_id).outerjoin(
                had, had.c.trial_id == c.trial_id
            )
        )
        .where(n != objectives.c.n, sa.or_(state == "COMPLETE", n > 0))
    )
    for study_id, trial_id, text, count, expected in _rows(connection, query):
        where = f"study {study_id}, trial id {trial_id}"
        message = f"The trial is {text} and has {count} values for {expected} objectives."
        yield Finding("values-missing" if count < expected else "values-many", where, message)
    for table, key, types in (
        (t.trial_values, "objective", t.value_type.enums),
        (t.trial_intermediate_values, "step", t.intermediate_type.enums),
    ):
        value = table.c["value" if table is t.trial_values else "intermediate_value"]
        kind = _char(connection, table.c[f"{value.name}_type"])
        bad = [kind.not_in(types), sa.and_(kind == "FINITE", value.is_(None))]
        if connection.dialect.name == "sqlite":  # where a column takes anything
            bad.append(
                sa.and_(kind == "FINITE", sa.func.typeof(value).not_in(("real", "integer")))
            )
        query = _select(table.c.trial_id, table.c[key], kind, sa.cast(value, sa.Text)).where(
            sa.or_(*bad)
        )
        if connection.dialect.name in ("mysql", "mariadb"):
            query = _select(table.c.trial_id, table.c[key], kind, value).where(sa.or_(*bad))
        for trial_id, index, text, number in _rows(connection, query):
            where = f"trial id {trial_id}, {key} {index}"
            yield Finding("value-unreadable", where, f"It says {text} {number}.")


def _params(connection: Connection) -> Iterator[Finding]:
    c, p = t.trials.c, t.trial_params.c
    query = (
        _select(
            c.study_id,
            p.param_name,
            p.distribution_json,
            sa.func.min(p.param_value),
            sa.func.max(p.param_value),
            sa.func.count() - sa.func.count(p.param_value),
            sa.func.min(c.trial_id),
        )
        .select_from(t.trial_params.join(t.trials, c.trial_id == p.trial_id))
        .group_by(c.study_id, p.param_name, p.distribution_json)
        .order_by(c.study_id, p.param_name, sa.func.min(c.trial_id))
    )
    first: dict[tuple[int, str], Any] = {}
    for study_id, name, text, low, high, n_missing, trial_id in _rows(connection, query):
        where = f"study {study_id}, parameter {name!r}, trial id {trial_id} and later"
        if n_missing:
            yield Finding("param-value", where, f"{n_missing} of them have no value.")
        try:
            distribution = json_to_distribution(text)
        except Exception:
            # Whatever Optuna raises on what is not its own.
            message = f"The distribution can't be read: {str(text)[:80]!r}."
            yield Finding("distribution-unreadable", where, message)
            continue
        if isinstance(distribution, CategoricalDistribution):
            n = len(distribution.choices)
            if any(end is not None and not 0 <= end < n for end in (low, high)):
                yield Finding("param-value", where, f"{low} to {high} is no index of {n} choices.")
        known = first.setdefault((study_id, name), distribution)
        try:
            check_distribution_compatibility(known, distribution)
        except ValueError as error:
            yield Finding("distribution-incompatible", where, str(error), "warning")


def _doubles(connection: Connection) -> Iterator[Finding]:
    """Rows that a constraint should have kept out."""
    for table in t.OPTUNA_TABLES:
        for constraint in table.constraints:
            if not isinstance(constraint, sa.UniqueConstraint):
                continue
            columns = list(constraint.columns)
            query = (
                _select(*columns, sa.func.count())
                .where(*(column.is_not(None) for column in columns))
                .group_by(*columns)
                .having(sa.func.count() > 1)
            )
            for row in _rows(connection, query):
                key = ", ".join(f"{c.name} {v!r}" for c, v in zip(columns, row, strict=False))
                yield Finding("row-double", f"{table.name}, {key}", f"There are {row[-1]}.")


def _attributes(connection: Connection) -> Iterator[Finding]:
    for table in (
        t.study_user_attributes,
        t.study_system_attributes,
        t.trial_user_attributes,
        t.trial_system_attributes,
    ):
        owner = "study_id" if "study_id" in table.c else "trial_id"
        query = _select(table.c[owner], table.c.key, table.c.value_json)
        for owner_id, key, text in _rows(connection, query):
            try:
                json.loads(text)
            except (ValueError, TypeError, RecursionError):
                where = f"{table.name}, {owner} {owner_id}, key {key!r}"
                message = f"The value is no JSON: {str(text)[:80]!r}; it is not shown."
                yield Finding("attribute-unreadable", where, message, "warning")


_QUESTIONS: Final = (
    _orphans,
    _numbers,
    _states,
    _times,
    _directions,
    _values,
    _params,
    _doubles,
    _attributes,
)
