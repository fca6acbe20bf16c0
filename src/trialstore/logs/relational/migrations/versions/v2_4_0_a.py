"""Several objectives: directions and values get tables of their own.

The old ``trial_values`` held intermediate values. They are copied, the table is dropped and made
anew for the values of trials, which stay in ``trials.value`` until they are copied in turn. So
every value is in at least one place between any two statements, and what is there tells how far
an interrupted run came.
"""

from __future__ import annotations

from typing import Any

from alembic import op
import sqlalchemy as sa

from trialstore.logs.relational.migrations import altered, column_names, has_table

revision = "v2.4.0.a"
down_revision = "v1.3.0.a"

_metadata = sa.MetaData()
_direction_type = sa.Enum("NOT_SET", "MINIMIZE", "MAXIMIZE", name="studydirection")

_studies = sa.Table(
    "studies",
    _metadata,
    sa.Column("study_id", sa.Integer, primary_key=True),
    sa.Column("direction", _direction_type),
)
_study_directions = sa.Table(
    "study_directions",
    _metadata,
    sa.Column("study_direction_id", sa.Integer, primary_key=True),
    sa.Column("direction", _direction_type, nullable=False),
    sa.Column("study_id", sa.Integer, sa.ForeignKey("studies.study_id"), nullable=False),
    sa.Column("objective", sa.Integer, nullable=False),
    sa.UniqueConstraint("study_id", "objective"),
)
_trials = sa.Table(
    "trials",
    _metadata,
    sa.Column("trial_id", sa.Integer, primary_key=True),
    sa.Column("value", sa.Float),
)
_trial_values = sa.Table(
    "trial_values",
    _metadata,
    sa.Column("trial_value_id", sa.Integer, primary_key=True),
    sa.Column("trial_id", sa.Integer, sa.ForeignKey("trials.trial_id"), nullable=False),
    sa.Column("objective", sa.Integer, nullable=False),
    sa.Column("value", sa.Float, nullable=False),
    sa.UniqueConstraint("trial_id", "objective"),
)
_trial_intermediate_values = sa.Table(
    "trial_intermediate_values",
    _metadata,
    sa.Column("trial_intermediate_value_id", sa.Integer, primary_key=True),
    sa.Column("trial_id", sa.Integer, sa.ForeignKey("trials.trial_id"), nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    # Optuna allows NULL from v3.0.0.b on, but SQLite has always kept NaN so.
    sa.Column("intermediate_value", sa.Float),
    sa.UniqueConstraint("trial_id", "step"),
)
_old_trial_values = sa.table(
    "trial_values",
    sa.column("trial_value_id", sa.Integer),
    sa.column("trial_id", sa.Integer),
    sa.column("step", sa.Integer),
    sa.column("value", sa.Float),
)
_type_of_later = sa.Enum("FINITE", "INF_POS", "INF_NEG", "NAN", name="trialintermediatevaluetype")


def upgrade() -> None:
    bind = op.get_bind()
    _study_directions.create(bind, checkfirst=True)
    _trial_intermediate_values.create(bind, checkfirst=True)
    if "direction" in column_names("studies"):
        _copy_directions()
    if has_table("trial_values") and "step" in column_names("trial_values"):
        _copy_intermediate_values()
        op.drop_table("trial_values")
    _trial_values.create(bind, checkfirst=True)
    if "value" in column_names("trials"):
        _copy_values()
    for table, column in (("studies", "direction"), ("trials", "value")):
        if column in column_names(table):
            with altered(table) as batch:
                batch.drop_column(column)


def _copy_directions() -> None:
    done = sa.exists().where(_study_directions.c.study_id == _studies.c.study_id)
    source = sa.select(_studies.c.direction, _studies.c.study_id, sa.literal(0))
    _insert(_study_directions, ["direction", "study_id", "objective"], source.where(~done))


def _copy_intermediate_values() -> None:
    old, new = _old_trial_values.c, _trial_intermediate_values.c
    done = sa.exists().where(new.trial_id == old.trial_id, new.step == old.step)
    columns: list[Any] = [old.trial_id, old.step, old.value]
    names = ["trial_id", "step", "intermediate_value"]
    if "intermediate_value_type" in column_names("trial_intermediate_values"):
        # The table is one that a later Optuna made; v3.0.0.c looks at the values.
        columns.append(sa.cast(sa.literal("FINITE"), _type_of_later))
        names.append("intermediate_value_type")
    whole = sa.and_(old.trial_id.is_not(None), old.step.is_not(None))
    source = sa.select(*columns).where(whole, ~done).order_by(old.trial_value_id)
    _insert(sa.table("trial_intermediate_values", *map(sa.column, names)), names, source)


def _copy_values() -> None:
    done = sa.exists().where(_trial_values.c.trial_id == _trials.c.trial_id)
    source = sa.select(_trials.c.trial_id, _trials.c.value, sa.literal(0))
    source = source.where(_trials.c.value.is_not(None), ~done).order_by(_trials.c.trial_id)
    _insert(_trial_values, ["trial_id", "value", "objective"], source)


def _insert(table: Any, names: list[str], source: Any) -> None:
    op.get_bind().execute(sa.insert(table).from_select(names, source))
