"""Optuna's tables as they were at each version of their schema, and a study in them.

The facts are those of Optuna's migration history. Written down here and not made by running it,
because its scripts do not run from the start on every database.
"""

from __future__ import annotations

from datetime import datetime
import json
from typing import Any

import sqlalchemy as sa

from trialstore.logs.relational.schema import VERSIONS

FLOAT32_MAX = 3.4028234663852886e38
_START = datetime(2021, 3, 4, 5, 6, 7)
_COMPLETE = datetime(2021, 3, 4, 5, 7, 8)

OLD_DISTRIBUTIONS: dict[str, tuple[str, dict[str, Any], float]] = {
    "uniform": ("UniformDistribution", {"low": -1.0, "high": 2.0}, 0.5),
    "loguniform": ("LogUniformDistribution", {"low": 0.125, "high": 8.0}, 0.25),
    "discrete": ("DiscreteUniformDistribution", {"low": 0.0, "high": 1.0, "q": 0.25}, 0.75),
    "discrete cut": ("DiscreteUniformDistribution", {"low": 0.0, "high": 1.1, "q": 0.5}, 1.0),
    "int": ("IntUniformDistribution", {"low": 1, "high": 9, "step": 2}, 3.0),
    "int of old": ("IntUniformDistribution", {"low": 1, "high": 9}, 4.0),
    "intlog": ("IntLogUniformDistribution", {"low": 1, "high": 64, "step": 1}, 16.0),
    "choice": ("CategoricalDistribution", {"choices": ["a", None, 1.5]}, 2.0),
}
NEW_DISTRIBUTIONS: dict[str, tuple[str, dict[str, Any], float]] = {
    "float": ("FloatDistribution", {"step": None, "low": 0.0, "high": 1.0, "log": False}, 0.5),
    "int": ("IntDistribution", {"log": False, "step": 1, "low": 0, "high": 9}, 3.0),
    "choice": ("CategoricalDistribution", {"choices": ["a", None, 1.5]}, 2.0),
}


def old_metadata(version: str, *, checks: bool = False) -> sa.MetaData:
    """The tables of a version.

    Args:
        version: One of ``VERSIONS``.
        checks: Enumerations have a CHECK where the database has no such type, as SQLAlchemy
            made it before 1.4.
    """

    def since(first: str) -> bool:
        return VERSIONS.index(version) >= VERSIONS.index(first)

    def enum(*labels: str, name: str) -> sa.Enum:
        return sa.Enum(*labels, name=name, create_constraint=checks)

    metadata = sa.MetaData()
    text: Any = sa.Text if since("v2.6.0.a") else sa.String(2048)
    real = sa.Float(precision=53) if since("v3.0.0.b") else sa.Float()
    direction = enum("NOT_SET", "MINIMIZE", "MAXIMIZE", name="studydirection")
    waiting = ("WAITING",) if since("v1.2.0.a") else ()

    def key(name: str) -> sa.Column[Any]:
        return sa.Column(name, sa.Integer, primary_key=True)

    def owner(of: str, *, nullable: bool = True, **options: Any) -> sa.Column[Any]:
        table = "studies" if of == "study_id" else "trials"
        foreign = sa.ForeignKey(f"{table}.{of}")
        return sa.Column(of, sa.Integer, foreign, nullable=nullable, **options)

    study_columns = [
        key("study_id"),
        sa.Column("study_name", sa.String(512), index=True, unique=True, nullable=False),
    ]
    trial_columns = [
        key("trial_id"),
        owner("study_id", index=since("v3.2.0.a")),
        sa.Column(
            "state",
            enum("RUNNING", "COMPLETE", "PRUNED", "FAIL", *waiting, name="trialstate"),
            nullable=False,
        ),
        sa.Column("datetime_start", sa.DateTime),
        sa.Column("datetime_complete", sa.DateTime),
    ]
    if since("v1.3.0.a"):
        trial_columns.append(sa.Column("number", sa.Integer))
    if since("v2.4.0.a"):
        sa.Table(
            "study_directions",
            metadata,
            key("study_direction_id"),
            sa.Column("direction", direction, nullable=False),
            owner("study_id", nullable=False),
            sa.Column("objective", sa.Integer, nullable=False),
            sa.UniqueConstraint("study_id", "objective"),
        )
        values = [
            key("trial_value_id"),
            owner("trial_id", nullable=False),
            sa.Column("objective", sa.Integer, nullable=False),
            sa.Column("value", real, nullable=since("v3.0.0.d")),
            sa.UniqueConstraint("trial_id", "objective"),
        ]
        if since("v3.0.0.d"):
            kinds = enum("FINITE", "INF_POS", "INF_NEG", name="trialvaluetype")
            values.append(sa.Column("value_type", kinds, nullable=False))
        steps = [
            key("trial_intermediate_value_id"),
            owner("trial_id", nullable=False),
            sa.Column("step", sa.Integer, nullable=False),
            sa.Column("intermediate_value", real, nullable=since("v3.0.0.b")),
            sa.UniqueConstraint("trial_id", "step"),
        ]
        if since("v3.0.0.c"):
            kinds = enum("FINITE", "INF_POS", "INF_NEG", "NAN", name="trialintermediatevaluetype")
            steps.append(sa.Column("intermediate_value_type", kinds, nullable=False))
        sa.Table("trial_intermediate_values", metadata, *steps)
    else:
        study_columns.append(sa.Column("direction", direction, nullable=False))
        trial_columns.append(sa.Column("value", real))
        values = [
            key("trial_value_id"),
            owner("trial_id"),
            sa.Column("step", sa.Integer),
            sa.Column("value", real),
            sa.UniqueConstraint("trial_id", "step"),
        ]
    sa.Table("trial_values", metadata, *values)
    sa.Table("studies", metadata, *study_columns)
    sa.Table("trials", metadata, *trial_columns)
    for of in ("study", "trial"):
        for kind in ("user", "system"):
            sa.Table(
                f"{of}_{kind}_attributes",
                metadata,
                key(f"{of}_{kind}_attribute_id"),
                owner(f"{of}_id"),
                sa.Column("key", sa.String(512)),
                sa.Column("value_json", text),
                sa.UniqueConstraint(f"{of}_id", "key"),
            )
    sa.Table(
        "trial_params",
        metadata,
        key("param_id"),
        owner("trial_id"),
        sa.Column("param_name", sa.String(512)),
        sa.Column("param_value", real),
        sa.Column("distribution_json", text),
        sa.UniqueConstraint("trial_id", "param_name"),
    )
    sa.Table(
        "version_info",
        metadata,
        sa.Column("version_info_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("schema_version", sa.Integer),
        sa.Column("library_version", sa.String(256)),
        sa.CheckConstraint("version_info_id=1"),
    )
    sa.Table(
        "alembic_version",
        metadata,
        sa.Column("version_num", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
    )
    return metadata


def make_old_database(url: str, version: str, *, checks: bool = False) -> None:
    """Tables of a version with a study of seven trials, and an empty study; ids count from 1."""
    metadata = old_metadata(version, checks=checks)
    tables = metadata.tables
    engine = sa.create_engine(url)
    metadata.create_all(engine)
    with engine.begin() as connection:

        def put(table: str, **row: Any) -> None:
            names = tables[table].columns.keys()
            known = {name: value for name, value in row.items() if name in names}
            connection.execute(sa.insert(tables[table]).values(**known))

        put("alembic_version", version_num=version)
        put("version_info", version_info_id=1, schema_version=12, library_version="0.9.0")
        for study_id, direction in ((1, "MAXIMIZE"), (2, "MINIMIZE")):
            put("studies", study_name=f"study {study_id}", direction=direction)
            if "study_directions" in tables:
                put("study_directions", study_id=study_id, direction=direction, objective=0)
            for kind in ("user", "system"):
                put(
                    f"study_{kind}_attributes",
                    study_id=study_id,
                    key=kind,
                    value_json=json.dumps({"a": [study_id, None]}),
                )
        queued = "WAITING" if version >= "v1.2.0.a" else "RUNNING"
        states = ("COMPLETE", "PRUNED", "FAIL", "RUNNING", queued, "COMPLETE", "COMPLETE")
        for number, state in enumerate(states):
            _put_trial(put, tables, version, number, state)
    engine.dispose()


def _put_trial(put: Any, tables: Any, version: str, number: int, state: str) -> None:
    trial_id = number + 1
    value = {0: 0.5, 5: FLOAT32_MAX, 6: -(2.0**70)}.get(number)
    times = {
        "datetime_start": None if state == "WAITING" else _START,
        "datetime_complete": None if state in ("WAITING", "RUNNING") else _COMPLETE,
    }
    put("trials", study_id=1, number=number, state=state, value=value, **times)
    if "number" not in tables["trials"].columns:
        put("trial_system_attributes", trial_id=trial_id, key="_number", value_json=str(number))
    for kind in ("user", "system"):
        put(f"trial_{kind}_attributes", trial_id=trial_id, key=kind, value_json=f"[{number}]")
    if "objective" in tables["trial_values"].columns:
        typed = "value_type" in tables["trial_values"].columns
        infinite = typed and number == 5
        row = {"value": None if infinite else value}
        if typed:
            row["value_type"] = "INF_POS" if infinite else "FINITE"
        if value is not None:
            put("trial_values", trial_id=trial_id, objective=0, **row)
    put_step = "trial_intermediate_values" if "trial_intermediate_values" in tables else None
    for step, reported in enumerate((0.25, FLOAT32_MAX, -FLOAT32_MAX, 2.0**66)):
        if number != 1:
            break
        kind = ("FINITE", "INF_POS", "INF_NEG", "FINITE")[step]
        if put_step is None:
            put("trial_values", trial_id=trial_id, step=step, value=reported)
            continue
        typed = "intermediate_value_type" in tables[put_step].columns
        stored = None if typed and kind != "FINITE" else reported
        put(
            put_step,
            trial_id=trial_id,
            step=step,
            intermediate_value=stored,
            intermediate_value_type=kind,
        )
    known = OLD_DISTRIBUTIONS if version < "v3.0.0.a" else NEW_DISTRIBUTIONS
    for name, (kind, attributes, internal) in known.items():
        if state != "WAITING":
            text = json.dumps({"name": kind, "attributes": attributes})
            put(
                "trial_params",
                trial_id=trial_id,
                param_name=name,
                param_value=internal,
                distribution_json=text,
            )
