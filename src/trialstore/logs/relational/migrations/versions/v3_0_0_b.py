"""Double precision, and intermediate values that are NaN."""

from __future__ import annotations

from alembic import op
import sqlalchemy as sa

from trialstore.logs.relational.migrations import altered, is_on

revision = "v3.0.0.b"
down_revision = "v3.0.0.a"

_trial_values = sa.table("trial_values", sa.column("value", sa.Float))

_FLOATS = (
    ("trial_intermediate_values", "intermediate_value", True),
    ("trial_params", "param_value", True),
    ("trial_values", "value", False),
)


def upgrade() -> None:
    # Optuna's own step to v2.4.0.a wrote a row for each trial without a value.
    op.get_bind().execute(sa.delete(_trial_values).where(_trial_values.c.value.is_(None)))
    for table, column, nullable in _FLOATS:
        if is_on("sqlite") and table == "trial_params":
            continue  # Every float there is a double, and nothing else changes.
        with altered(table) as batch:
            batch.alter_column(
                column,
                type_=sa.Float(precision=53),
                existing_type=sa.Float(),
                nullable=nullable,
            )
