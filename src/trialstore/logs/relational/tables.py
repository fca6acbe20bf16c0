"""The schema on one screen: Optuna's tables at version v3.2.0.a, and one table of ours.

Optuna's workers use these tables at the same time, so not a column, index or constraint may
differ; a test compares them by reflection with a database that Optuna makes.

Source: docs/formats/tables.md; the tables that Optuna 4.4 and 5.0 create.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

HEAD_VERSION: Final = "v3.2.0.a"
SCHEMA_VERSION: Final = 12
"""What Optuna writes into ``version_info`` and fills into the URL template; frozen there."""

NAME_LEN_MAX: Final = 512
STATES: Final = ("RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING")
DIRECTIONS: Final = ("NOT_SET", "MINIMIZE", "MAXIMIZE")

state_type: Final = sa.Enum(*STATES, name="trialstate")
direction_type: Final = sa.Enum(*DIRECTIONS, name="studydirection")
value_type: Final = sa.Enum("FINITE", "INF_POS", "INF_NEG", name="trialvaluetype")
intermediate_type: Final = sa.Enum(
    "FINITE", "INF_POS", "INF_NEG", "NAN", name="trialintermediatevaluetype"
)

metadata: Final = sa.MetaData()

studies = sa.Table(
    "studies",
    metadata,
    sa.Column("study_id", sa.Integer, primary_key=True),
    sa.Column("study_name", sa.String(NAME_LEN_MAX), index=True, unique=True, nullable=False),
)

study_directions = sa.Table(
    "study_directions",
    metadata,
    sa.Column("study_direction_id", sa.Integer, primary_key=True),
    sa.Column("direction", direction_type, nullable=False),
    sa.Column("study_id", sa.Integer, sa.ForeignKey("studies.study_id"), nullable=False),
    sa.Column("objective", sa.Integer, nullable=False),
    sa.UniqueConstraint("study_id", "objective"),
)


def _attributes(table: str, owner: str, owner_table: str) -> sa.Table:
    return sa.Table(
        table,
        metadata,
        sa.Column(f"{table[:-1]}_id", sa.Integer, primary_key=True),
        sa.Column(owner, sa.Integer, sa.ForeignKey(f"{owner_table}.{owner}")),
        sa.Column("key", sa.String(NAME_LEN_MAX)),
        sa.Column("value_json", sa.Text),
        sa.UniqueConstraint(owner, "key"),
    )


study_user_attributes = _attributes("study_user_attributes", "study_id", "studies")
study_system_attributes = _attributes("study_system_attributes", "study_id", "studies")

trials = sa.Table(
    "trials",
    metadata,
    sa.Column("trial_id", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer),
    sa.Column("study_id", sa.Integer, sa.ForeignKey("studies.study_id"), index=True),
    sa.Column("state", state_type, nullable=False),
    sa.Column("datetime_start", sa.DateTime),
    sa.Column("datetime_complete", sa.DateTime),
)

trial_user_attributes = _attributes("trial_user_attributes", "trial_id", "trials")
trial_system_attributes = _attributes("trial_system_attributes", "trial_id", "trials")

trial_params = sa.Table(
    "trial_params",
    metadata,
    sa.Column("param_id", sa.Integer, primary_key=True),
    sa.Column("trial_id", sa.Integer, sa.ForeignKey("trials.trial_id")),
    sa.Column("param_name", sa.String(NAME_LEN_MAX)),
    sa.Column("param_value", sa.Float(precision=53)),
    sa.Column("distribution_json", sa.Text),
    sa.UniqueConstraint("trial_id", "param_name"),
)

trial_values = sa.Table(
    "trial_values",
    metadata,
    sa.Column("trial_value_id", sa.Integer, primary_key=True),
    sa.Column("trial_id", sa.Integer, sa.ForeignKey("trials.trial_id"), nullable=False),
    sa.Column("objective", sa.Integer, nullable=False),
    sa.Column("value", sa.Float(precision=53)),
    sa.Column("value_type", value_type, nullable=False),
    sa.UniqueConstraint("trial_id", "objective"),
)

trial_intermediate_values = sa.Table(
    "trial_intermediate_values",
    metadata,
    sa.Column("trial_intermediate_value_id", sa.Integer, primary_key=True),
    sa.Column("trial_id", sa.Integer, sa.ForeignKey("trials.trial_id"), nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("intermediate_value", sa.Float(precision=53)),
    sa.Column("intermediate_value_type", intermediate_type, nullable=False),
    sa.UniqueConstraint("trial_id", "step"),
)

trial_heartbeats = sa.Table(
    "trial_heartbeats",
    metadata,
    sa.Column("trial_heartbeat_id", sa.Integer, primary_key=True),
    sa.Column("trial_id", sa.Integer, sa.ForeignKey("trials.trial_id"), nullable=False),
    sa.Column("heartbeat", sa.DateTime, nullable=False),
    sa.UniqueConstraint("trial_id"),
)

version_info = sa.Table(
    "version_info",
    metadata,
    sa.Column("version_info_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("schema_version", sa.Integer),
    sa.Column("library_version", sa.String(256)),
    sa.CheckConstraint("version_info_id=1"),
)

alembic_version = sa.Table(
    "alembic_version",
    metadata,
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)

OPTUNA_TABLES: Final = tuple(metadata.sorted_tables)

CHILDREN_OF_TRIALS: Final = (
    trial_params,
    trial_user_attributes,
    trial_system_attributes,
    trial_values,
    trial_intermediate_values,
    trial_heartbeats,
)

# Ours. Not in `metadata`, because everything there is compared with what Optuna makes.
# ``facts`` is what the last exchange found before it wrote, from which every outcome follows;
# ``number`` the greatest trial number then. Not on SQLite: its COMMIT has no answer to lose.
# MySQL's TEXT ends at 64 KiB, which the facts of some thousand trials do not fit.
sessions = sa.Table(
    "trialstore_sessions",
    sa.MetaData(),
    sa.Column("session_id", sa.String(64), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("number", sa.Integer),
    sa.Column("facts", sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")),
    sa.Column("updated_at", sa.DateTime, nullable=False, server_default=sa.func.now()),
)

SESSION_DAYS_MAX: Final = 30
"""A row that was not updated for longer belonged to a storage that was killed, and is removed."""
