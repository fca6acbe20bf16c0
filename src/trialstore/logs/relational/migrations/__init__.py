"""From each earlier version of Optuna's tables to the next, as Alembic scripts of our own.

SQLite and PostgreSQL run all scripts in one transaction. MySQL commits with every DDL statement
and can be stopped between any two, so each script looks at what is there before it changes
anything, and can be run again from its beginning. Looking also serves databases at an old version
that a newer Optuna has opened: it adds the tables that it misses, in their latest shape.

Version names are Optuna's, because the table ``alembic_version`` is; the contents of each version
are facts of Optuna's migration history. What is here only helps the scripts to look and to alter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from alembic import op
from alembic.operations import BatchOperations
import sqlalchemy as sa

CHUNK: Final = 5_000
"""Rows that are held in memory and written by one statement."""


def has_table(name: str) -> bool:
    return sa.inspect(op.get_bind()).has_table(name)


def column_names(table: str) -> set[str]:
    return {column["name"] for column in sa.inspect(op.get_bind()).get_columns(table)}


def is_on(database: str) -> bool:
    """Whether this is "sqlite", "postgresql" or "mysql", which stands for MariaDB too."""
    name = op.get_bind().dialect.name
    return name == database or (database == "mysql" and name == "mariadb")


@contextmanager
def altered(table: str) -> Iterator[BatchOperations]:
    """Alter a table, which SQLite does by writing it anew, without the CHECK on each enumeration
    that SQLAlchemy added before 1.4 and that nothing keeps up to date."""
    with op.batch_alter_table(table) as batch:
        if is_on("sqlite"):
            for check in sa.inspect(op.get_bind()).get_check_constraints(table):
                if check["name"]:
                    batch.drop_constraint(check["name"], type_="check")
        yield batch


def rows_by_id(query: Any, row_id: Any) -> Iterator[Sequence[Any]]:
    """The rows of a query in chunks, in order of ``row_id``, which is its first column."""
    last = None
    while True:
        after = query if last is None else query.where(row_id > last)
        rows = op.get_bind().execute(after.order_by(row_id).limit(CHUNK)).all()
        if not rows:
            return
        last = rows[-1][0]
        yield rows


def update_rows(table: Any, row_id: str, changes: Sequence[dict[str, Any]]) -> None:
    """Set columns of rows, each given with its id."""
    if not changes:
        return
    names = [name for name in changes[0] if name != row_id]
    statement = (
        sa.update(table)
        .where(table.c[row_id] == sa.bindparam(f"old_{row_id}"))
        .values({name: sa.bindparam(f"new_{name}", type_=table.c[name].type) for name in names})
    )
    rows = [
        {f"old_{row_id}": change[row_id], **{f"new_{name}": change[name] for name in names}}
        for change in changes
    ]
    op.get_bind().execute(statement, rows)
