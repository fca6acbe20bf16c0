"""Many whole trials at once, in a few statements with many rows each.

An exchange writes trial by trial, each statement under conditions; who copies 100,000 trials into
a study that nobody else writes needs none of them but one: that the numbers are still free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
from datetime import datetime
import io
import json
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from trialstore.logs.relational import tables as t
from trialstore.logs.relational.connection import driver_error_of
from trialstore.logs.relational.dialects import Dialect, Fault
from trialstore.logs.relational.limits import refusal
from trialstore.logs.relational.writing import number_and_type, template_values
from trialstore.records import CreateTrial

_TAKEN = (
    "Somebody else writes to the study in the target, whose trials go up to number {greatest} "
    "where {number} is to be the next. Let nobody use it until the copy is complete."
)

_ANALYZE: Final = f"ANALYZE {', '.join(table.name for table in (t.trials, *t.CHILDREN_OF_TRIALS))}"


def load_trials(
    engine: Engine, d: Dialect, records: Sequence[CreateTrial], number: int, above: int
) -> int:
    """Write trials of one study in one transaction, the first with ``number``.

    Safe to repeat: what is there already is left as it is.

    Args:
        engine: Gives the connection.
        d: Of the engine.
        records: At least one, of one study.
        number: Of the first; the study's trials end below it.
        above: An id that all newer trials of the study are above; 0 if none is known.

    Returns:
        The greatest id that was written.

    Raises:
        KeyError: There is no such study.
        ValueError: The study has other trials, or a column can't hold what one has.
    """
    try:
        return _load_trials(engine, d, records, number, above, at_once=len(records))
    except _OneOfThemError:  # of which one, the next attempt tells
        return _load_trials(engine, d, records, number, above, at_once=1)


class _OneOfThemError(Exception):
    """A column can't hold what one of several trials has."""


def _load_trials(
    engine: Engine,
    d: Dialect,
    records: Sequence[CreateTrial],
    number: int,
    above: int,
    *,
    at_once: int,
) -> int:
    c = t.trials.c
    study_id = records[0].study_id
    last = number + len(records) - 1
    newest = sa.select(sa.func.max(c.number)).where(c.study_id == study_id, c.trial_id > above)
    if d.name != "sqlite":
        # A transaction, whatever the user's engine begins with, and not by a snapshot that is
        # older than the lock.
        engine = engine.execution_options(isolation_level="READ COMMITTED")
    with engine.begin() as connection:
        if d.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        lock = sa.select(t.studies.c.study_id).where(t.studies.c.study_id == study_id)
        if connection.execute(lock.with_for_update()).first() is None:
            raise KeyError(f"There is no study with id {study_id}.")
        greatest = connection.scalar(newest)
        if greatest is not None and greatest not in (number - 1, last):
            raise ValueError(_TAKEN.format(greatest=greatest, number=number))
        if greatest != last:
            _insert(
                connection,
                t.trials,
                [
                    {
                        "number": number + index,
                        "study_id": study_id,
                        "state": t.STATES[record.state],
                        "datetime_start": _time(d, record.datetime_start),
                        "datetime_complete": _time(d, record.datetime_complete),
                    }
                    for index, record in enumerate(records)
                ],
            )
        found = sa.select(c.number, c.trial_id).where(
            c.study_id == study_id, c.trial_id > above, c.number.between(number, last)
        )
        ids: dict[int, int] = {row[0]: row[1] for row in connection.execute(found)}
        if greatest != last:
            for i in range(0, len(records), at_once):
                some = records[i : i + at_once]
                with _naming(d, number + i, some):
                    _insert_children(
                        connection, [(ids[number + i + j], one) for j, one in enumerate(some)]
                    )
        if d.name == "postgresql" and _is_half_new(min(ids.values()), max(ids.values())):
            # It has no idea yet of what is in there, and would look for one trial among all of
            # its study. Left to itself it finds out after a minute.
            connection.exec_driver_sql(_ANALYZE)
    return max(ids.values())


@contextlib.contextmanager
def _naming(d: Dialect, number: int, records: Sequence[CreateTrial]) -> Iterator[None]:
    """Say of a trial, if it is only one, that it has what a column can't hold."""
    try:
        yield
    except Exception as error:
        cause = driver_error_of(error)
        fault = d.fault(cause)
        # Keys that the collation holds equal. A sequence that has fallen behind is PostgreSQL's.
        are_equal = fault is Fault.EXISTS and d.name == "mysql"
        if fault is not Fault.VALUE and not are_equal:
            raise
        if len(records) > 1:
            raise _OneOfThemError from error
        told = refusal(records[0], str(cause))
        raise ValueError(f"Trial number {number}: {told}") from error


def _is_half_new(first_id: int, last_id: int) -> bool:
    """Whether a power of two thousand trials or so has been reached with these."""
    return (first_id >> 10).bit_length() < (last_id >> 10).bit_length()


def _insert_children(connection: Connection, trials: list[tuple[int, CreateTrial]]) -> None:
    params: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    user_attrs: list[dict[str, Any]] = []
    system_attrs: list[dict[str, Any]] = []
    for trial_id, record in trials:
        of = {"trial_id": trial_id}
        for name, internal in record.params.items():
            text = record.distributions[name]
            row = {"param_name": name, "param_value": internal, "distribution_json": text}
            params.append({**of, **row})
        for objective, value in enumerate(template_values(record)):
            number, kind = number_and_type(value)
            row = {"objective": objective, "value": number, "value_type": kind}
            values.append({**of, **row})
        for step, value in record.intermediate_values.items():
            number, kind = number_and_type(value)
            row = {"intermediate_value": number, "intermediate_value_type": kind}
            steps.append({**of, "step": int(step), **row})
        for rows, attrs in ((user_attrs, record.user_attrs), (system_attrs, record.system_attrs)):
            rows += [{**of, "key": k, "value_json": json.dumps(v)} for k, v in attrs.items()]
    _insert(connection, t.trial_params, params)
    _insert(connection, t.trial_values, values)
    _insert(connection, t.trial_intermediate_values, steps)
    _insert(connection, t.trial_user_attributes, user_attrs)
    _insert(connection, t.trial_system_attributes, system_attrs)


def _insert(connection: Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    if connection.dialect.name == "postgresql":
        _copy_in(connection, table, rows)
    elif connection.dialect.driver == "pymysql":
        _insert_as_text(connection, table, rows)
    else:
        connection.execute(sa.insert(table), rows)


def _copy_in(connection: Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    """By COPY, which costs the client a third of what as many INSERTs do.

    Source: PostgreSQL, COPY, "Text Format".
    """
    names = ",".join(f'"{name}"' for name in rows[0])
    sql = f"COPY {table.name} ({names}) FROM STDIN"
    text = "".join(["\t".join(map(_field, row.values())) + "\n" for row in rows])
    cursor: Any = connection.connection.cursor()
    if hasattr(cursor, "copy_expert"):  # psycopg2
        cursor.copy_expert(sql, io.StringIO(text))
    else:
        with cursor.copy(sql) as copy:
            copy.write(text)
    cursor.close()


# As PyMySQL's own; a server refuses more than max_allowed_packet, by default 16 MiB.
_STATEMENT_LEN: Final = 1_000_000


def _insert_as_text(connection: Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    """As ``executemany``, which makes the same text in three times the CPU: names, states and
    distributions are the same in most rows, and are escaped once here."""
    driver: Any = connection.connection.driver_connection
    escaped: dict[str, str] = {}

    def literal(value: Any) -> str:
        if type(value) is not str:
            text: str = driver.escape(value)
            return text
        if value not in escaped:
            escaped[value] = driver.escape(value)
        return escaped[value]

    names = ",".join(f"`{name}`" for name in rows[0])
    begin = f"INSERT INTO {table.name} ({names}) VALUES "
    tuples: list[str] = []
    length = 0
    cursor: Any = connection.connection.cursor()
    for row in rows:
        text = f"({','.join(map(literal, row.values()))})"
        if tuples and length + len(text) > _STATEMENT_LEN:
            cursor.execute(begin + ",".join(tuples))
            tuples, length = [], 0
        tuples.append(text)
        length += len(text) + 1
    cursor.execute(begin + ",".join(tuples))
    cursor.close()


_ESCAPES: Final = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def _field(value: Any) -> str:
    if isinstance(value, str):
        return value.translate(_ESCAPES)
    return r"\N" if value is None else str(value)


def _time(d: Dialect, text: str | None) -> datetime | None:
    column = d.time_value(text)
    return None if column is None else datetime.fromisoformat(column)
