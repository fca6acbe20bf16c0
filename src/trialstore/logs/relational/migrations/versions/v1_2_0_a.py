"""Trials can be WAITING."""

from __future__ import annotations

from alembic import op
import sqlalchemy as sa

from trialstore.logs.relational.migrations import altered, is_on

revision = "v1.2.0.a"
down_revision = "v0.9.0.a"

_OLD = ("RUNNING", "COMPLETE", "PRUNED", "FAIL")
_NEW = (*_OLD, "WAITING")


def upgrade() -> None:
    if is_on("postgresql"):
        _upgrade_postgresql()
        return
    with altered("trials") as batch:
        batch.alter_column(
            "state",
            type_=sa.Enum(*_NEW, name="trialstate"),
            existing_type=sa.Enum(*_OLD, name="trialstate"),
            existing_nullable=False,
        )


def _upgrade_postgresql() -> None:
    """A new type in place of the old one: ADD VALUE can't be used in its own transaction."""
    labels = op.get_bind().scalars(sa.text("SELECT unnest(enum_range(NULL::trialstate))::text"))
    if "WAITING" in labels.all():
        return
    op.execute("ALTER TYPE trialstate RENAME TO trialstate_before_waiting")
    sa.Enum(*_NEW, name="trialstate").create(op.get_bind())
    op.execute(
        "ALTER TABLE trials ALTER COLUMN state TYPE trialstate USING state::text::trialstate"
    )
    op.execute("DROP TYPE trialstate_before_waiting")
