"""Attributes and distributions longer than 2,048 letters."""

from __future__ import annotations

import sqlalchemy as sa

from trialstore.logs.relational.migrations import altered

revision = "v2.6.0.a"
down_revision = "v2.4.0.a"

_TEXTS = (
    ("study_user_attributes", "value_json"),
    ("study_system_attributes", "value_json"),
    ("trial_user_attributes", "value_json"),
    ("trial_system_attributes", "value_json"),
    ("trial_params", "distribution_json"),
)


def upgrade() -> None:
    for table, column in _TEXTS:
        with altered(table) as batch:
            batch.alter_column(
                column, type_=sa.Text(), existing_type=sa.String(2048), existing_nullable=True
            )
