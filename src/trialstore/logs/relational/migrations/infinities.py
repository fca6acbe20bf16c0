"""What two of the versions have in common: a type beside each value that need not be finite."""

from __future__ import annotations

import math
from typing import Any, Final

from alembic import op
import sqlalchemy as sa

from trialstore.logs.relational.migrations import altered, column_names, rows_by_id, update_rows

_FLOAT32_MAX: Final = 3.4028234663852886e38
"""What Optuna stored for infinity until then, as far as a column of single precision keeps it."""
_SUSPECT: Final = 1e16


def add_value_type(
    table: str, row_id: str, column: str, kinds: tuple[str, ...], type_name: str
) -> None:
    """Add the column ``{column}_type`` and let it tell what the value is."""
    type_ = sa.Enum(*kinds, name=type_name)
    type_column = f"{column}_type"
    type_.create(op.get_bind(), checkfirst=True)
    if type_column not in column_names(table):
        op.add_column(
            table, sa.Column(type_column, type_, nullable=False, server_default="FINITE")
        )
    with altered(table) as batch:
        batch.alter_column(
            type_column, existing_type=type_, existing_nullable=False, server_default=None
        )
        batch.alter_column(column, existing_type=sa.Float(precision=53), nullable=True)
    rows = sa.table(
        table,
        sa.column(row_id, sa.Integer),
        sa.column(column, sa.Float),
        sa.column(type_column, type_),
    )
    value = rows.c[column]
    # FINITE only: a row that an interrupted run has done already holds NULL, which is NaN here.
    suspects = sa.select(rows.c[row_id], value).where(
        rows.c[type_column] == "FINITE",
        sa.or_(value > _SUSPECT, value < -_SUSPECT, value.is_(None)),
    )
    for chunk in rows_by_id(suspects, rows.c[row_id]):
        changes: list[dict[str, Any]] = []
        for one, stored in chunk:
            kind = _kind(stored)
            if kind in kinds and kind != "FINITE":
                changes.append({row_id: one, column: None, type_column: kind})
        update_rows(rows, row_id, changes)


def _kind(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "NAN"
    if math.isinf(value) or math.isclose(abs(value), _FLOAT32_MAX, rel_tol=1e-5):
        return "INF_POS" if value > 0 else "INF_NEG"
    return "FINITE"
