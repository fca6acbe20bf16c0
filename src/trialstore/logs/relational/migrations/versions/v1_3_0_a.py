"""A trial's number moves from a system attribute into a column."""

from __future__ import annotations

from collections import Counter
import json
from typing import Any

from alembic import op
import sqlalchemy as sa

from trialstore.logs.relational.migrations import column_names, rows_by_id, update_rows

revision = "v1.3.0.a"
down_revision = "v1.2.0.a"

_trials = sa.table(
    "trials",
    sa.column("trial_id", sa.Integer),
    sa.column("study_id", sa.Integer),
    sa.column("number", sa.Integer),
)
_attributes = sa.table(
    "trial_system_attributes",
    sa.column("trial_id", sa.Integer),
    sa.column("key", sa.String(512)),
    sa.column("value_json", sa.String(2048)),
)


def upgrade() -> None:
    if "number" not in column_names("trials"):
        op.add_column("trials", sa.Column("number", sa.Integer(), nullable=True))
    query = sa.select(
        _trials.c.trial_id, _trials.c.study_id, _trials.c.number, _attributes.c.value_json
    ).select_from(
        _trials.outerjoin(
            _attributes,
            sa.and_(_attributes.c.trial_id == _trials.c.trial_id, _attributes.c.key == "_number"),
        )
    )
    older: Counter[int] = Counter()
    for rows in rows_by_id(query, _trials.c.trial_id):
        changes: list[dict[str, Any]] = []
        for trial_id, study_id, number, text in rows:
            if number is None:
                # Optuna numbered a trial when its number was first asked for: by those before.
                number = older[study_id] if text is None else json.loads(text)
                changes.append({"trial_id": trial_id, "number": number})
            older[study_id] += 1
        update_rows(_trials, "trial_id", changes)
    op.get_bind().execute(sa.delete(_attributes).where(_attributes.c.key == "_number"))
