"""Our tables are Optuna's, column by column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

from servers import new_database
from trialstore.logs.relational import TablesLog
from trialstore.logs.relational.tables import sessions

SERVERS = [pytest.param(kind, marks=pytest.mark.servers) for kind in ("psycopg", "pymysql")]


def _reflected(url: str) -> dict[str, Any]:
    engine = sa.create_engine(url)
    look = sa.inspect(engine)
    found: dict[str, Any] = {}
    for table in sorted(set(look.get_table_names()) - {sessions.name}):
        found[table] = {
            "columns": [
                (
                    c["name"],
                    str(c["type"]),
                    getattr(c["type"], "enums", None),
                    c["nullable"],
                    c["default"],
                    c.get("autoincrement"),
                )
                for c in look.get_columns(table)
            ],
            "options": look.get_table_options(table),
            "key": look.get_pk_constraint(table),
            "indexes": sorted(look.get_indexes(table), key=lambda x: str(x["name"])),
            "unique": sorted(look.get_unique_constraints(table), key=lambda x: str(x["name"])),
            "foreign": sorted(look.get_foreign_keys(table), key=lambda x: str(x["name"])),
            "checks": [c["sqltext"] for c in look.get_check_constraints(table)],
        }
    with engine.connect() as connection:
        for name in ("alembic_version", "version_info"):
            found[f"rows of {name}"] = connection.execute(sa.text(f"SELECT * FROM {name}")).all()
    engine.dispose()
    return found


@pytest.mark.parametrize("kind", ["sqlite", *SERVERS])
def test_our_tables_are_optunas(kind: str, tmp_path: Path) -> None:
    ours, theirs = new_database(kind, tmp_path), new_database(kind, tmp_path)
    TablesLog(ours).close()
    optuna.storages.RDBStorage(theirs)
    mine, wanted = _reflected(ours), _reflected(theirs)
    assert set(mine) == set(wanted)
    for name in wanted:
        expected = repr(wanted[name]).replace(theirs.rsplit("/", 1)[1], "DB")
        assert repr(mine[name]).replace(ours.rsplit("/", 1)[1], "DB") == expected, name
