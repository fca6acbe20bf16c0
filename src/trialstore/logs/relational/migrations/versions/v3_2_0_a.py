"""An index on the study of a trial, under the name that a new database gives it."""

from __future__ import annotations

from alembic import op
import sqlalchemy as sa

revision = "v3.2.0.a"
down_revision = "v3.0.0.d"

_NAME = "ix_trials_study_id"


def upgrade() -> None:
    indexes = sa.inspect(op.get_bind()).get_indexes("trials")
    if _NAME not in {index["name"] for index in indexes}:
        op.create_index(_NAME, "trials", ["study_id"])
