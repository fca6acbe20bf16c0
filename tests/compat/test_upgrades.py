"""Tables of every earlier version, upgraded: what Optuna's own upgrade gives, or better."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import functools
import logging
import math
import multiprocessing
import os
from pathlib import Path
import signal
from typing import Any
import warnings

import alembic.command
import alembic.config
from alembic.script import ScriptDirectory
import optuna
import pytest
import sqlalchemy as sa

from compat.workers import dump, write
from old_tables import make_old_database
from servers import new_database
import trialstore
from trialstore.errors import IncompatibleSchemaError
from trialstore.logs.relational import schema
from trialstore.logs.relational.schema import VERSIONS
from trialstore.logs.relational.tables import HEAD_VERSION, OPTUNA_TABLES

_OLD = VERSIONS[:-1]
_SERVERS = [pytest.param(x, marks=pytest.mark.servers) for x in ("psycopg", "pymysql")]
_LOOKING = ("SELECT", "SHOW", "PRAGMA", "DESCRIBE", "BEGIN")
_KINDS = ["sqlite", *_SERVERS]


def _old_storage(url: str) -> Any:
    return trialstore.RDBStorage(url, skip_compatibility_check=True)


def _upgrade(url: str) -> None:
    with contextlib.closing(_old_storage(url)) as storage:
        storage.upgrade()


def _upgrade_by_optuna(url: str) -> None:
    """By its scripts alone: its storage would first add the tables of its latest schema, on which
    its script for v2.4.0.a fails if there are intermediate values."""
    folder = Path(optuna.__file__).parent / "storages" / "_rdb"
    config = alembic.config.Config(folder / "alembic.ini")
    config.set_main_option("script_location", str(folder / "alembic"))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alembic.command.upgrade(config, "head")
    # Its scripts configure logging anew, which silences all loggers that are there.
    for logger in logging.Logger.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False


def _seen_by_optuna(url: str) -> list[Any]:
    storage = optuna.storages.RDBStorage(url)
    seen = [dump(storage, f"study {i}") for i in (1, 2)]
    storage.engine.dispose()
    return seen


def _seen_by_us(url: str) -> list[Any]:
    with contextlib.closing(trialstore.RDBStorage(url)) as storage:
        return [dump(storage, f"study {i}") for i in (1, 2)]


def _expected(kind: str, version: str, folder: Path) -> list[Any]:
    """What Optuna reads after an upgrade by its own scripts."""
    if version < "v2.4.0.a":
        # On servers they stop there: PostgreSQL has the type already that the script makes, and
        # MariaDB does not drop one of two columns of a constraint.
        kind = "sqlite"
    url = new_database(kind, folder)
    make_old_database(url, version)
    _upgrade_by_optuna(url)
    return _seen_by_optuna(url)


@functools.cache
def _wanted_shape(kind: str, folder: Path) -> dict[str, Any]:
    url = new_database(kind, folder)
    optuna.storages.RDBStorage(url).engine.dispose()
    return _shape(url)


def _shape(url: str) -> dict[str, Any]:
    """Tables but for the order of columns and the names of constraints, which nobody asks for."""
    engine = sa.create_engine(url)
    look = sa.inspect(engine)
    shape = {}
    for table in (x.name for x in OPTUNA_TABLES):
        shape[table] = {
            "columns": sorted(
                (c["name"], str(c["type"]), getattr(c["type"], "enums", None), c["nullable"])
                for c in look.get_columns(table)
            ),
            # PostgreSQL's numbers have the table's name in their default.
            "defaults": sorted(c["name"] for c in look.get_columns(table) if c["default"]),
            "key": look.get_pk_constraint(table)["constrained_columns"],
            "indexes": sorted(
                (x["column_names"], bool(x["unique"])) for x in look.get_indexes(table)
            ),
            "unique": sorted(x["column_names"] for x in look.get_unique_constraints(table)),
            "foreign": sorted(
                (x["constrained_columns"], x["referred_table"])
                for x in look.get_foreign_keys(table)
            ),
            "checks": [c["sqltext"] for c in look.get_check_constraints(table)],
        }
    engine.dispose()
    return shape


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("version", _OLD)
def test_an_upgrade_gives_what_optunas_gives(
    kind: str, version: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    url = new_database(kind, tmp_path)
    make_old_database(url, version, checks=version < "v2.4.0.a")
    with contextlib.closing(_old_storage(url)) as storage:
        assert storage.get_current_version() == version
        storage.upgrade()
        assert storage.get_current_version() == HEAD_VERSION
        seen = [dump(storage, f"study {i}") for i in (1, 2)]
        assert seen == _seen_by_optuna(url) == _expected(kind, version, tmp_path)
        write(storage, "new")
        written = dump(storage, "new")
    theirs = optuna.storages.RDBStorage(url)
    assert written == dump(theirs, "new")
    if version == VERSIONS[0]:
        write(theirs, "newer")
    theirs.engine.dispose()
    shape, wanted = _shape(url), _wanted_shape(kind, tmp_path_factory.getbasetemp())
    for table in wanted:
        assert shape[table] == wanted[table], table


class _Killed(BaseException):
    pass


def _die() -> None:
    raise _Killed


def _upgrade_until(url: str, n: int, die: Callable[[], None] = _die) -> bool:
    """Upgrade, and die before the ``n``-th statement that changes something; False if there are
    not so many. With ``_die`` SQLAlchemy drops the connection, as the end of a process does."""
    changes = 0

    def before(conn: Any, cursor: Any, statement: str, *_: Any) -> None:
        nonlocal changes
        changes += statement.split()[0] not in _LOOKING
        if changes == n:
            die()

    with contextlib.closing(_old_storage(url)) as storage:
        sa.event.listen(storage._exchanger.log.engine, "before_cursor_execute", before)
        try:
            storage.upgrade()
        except BaseException:
            if changes < n:
                raise
    return changes >= n


@pytest.mark.parametrize("kind", _KINDS)
def test_an_upgrade_that_is_interrupted_again_and_again_comes_to_its_end(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each attempt dies one change later than the one before it."""
    url = new_database(kind, tmp_path)
    make_old_database(url, VERSIONS[0])
    attempts = 1
    while _upgrade_until(url, attempts if kind == "pymysql" else 8 * attempts):
        attempts += 1
    assert attempts > 5
    assert _seen_by_us(url) == _seen_by_optuna(url) == _expected(kind, VERSIONS[0], tmp_path)
    assert _shape(url) == _wanted_shape(kind, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("kind", ["sqlite", _SERVERS[0]])
def test_an_interrupted_upgrade_leaves_nothing_where_the_database_can_take_it_back(
    kind: str, tmp_path: Path
) -> None:
    url = new_database(kind, tmp_path)
    make_old_database(url, VERSIONS[0])
    assert _upgrade_until(url, 30)
    engine = sa.create_engine(url)
    columns = {column["name"] for column in sa.inspect(engine).get_columns("trials")}
    engine.dispose()
    assert "number" not in columns and "value" in columns
    with contextlib.closing(_old_storage(url)) as storage:
        assert storage.get_current_version() == VERSIONS[0]


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", _KINDS)
def test_an_upgrade_interrupted_anywhere_can_be_made_again(kind: str, tmp_path: Path) -> None:
    expected = _expected(kind, VERSIONS[0], tmp_path)
    n = 1
    while True:
        url = new_database(kind, tmp_path)
        make_old_database(url, VERSIONS[0])
        if not _upgrade_until(url, n):
            break
        _upgrade(url)
        assert _seen_by_us(url) == expected, n
        n += 1
    assert n > 30


def _kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", _KINDS)
def test_an_upgrade_killed_with_its_process_can_be_made_again(kind: str, tmp_path: Path) -> None:
    """The lock of the dead one does not stand in the way either."""
    url = new_database(kind, tmp_path)
    make_old_database(url, VERSIONS[2])
    worker = multiprocessing.get_context("spawn").Process(
        target=_upgrade_until, args=(url, 12, _kill_this_process)
    )
    worker.start()
    worker.join(250)
    assert worker.exitcode == -signal.SIGKILL
    _upgrade(url)
    assert _seen_by_us(url) == _expected(kind, VERSIONS[2], tmp_path)


@pytest.mark.parametrize("kind", _KINDS)
def test_several_who_upgrade_at_once_wait_for_each_other(kind: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    make_old_database(url, VERSIONS[0])
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_upgrade, args=(url,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(250)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert _seen_by_us(url) == _expected(kind, VERSIONS[0], tmp_path)


@pytest.mark.parametrize("kind", _KINDS)
def test_tables_that_a_later_optuna_added_are_no_hindrance(kind: str, tmp_path: Path) -> None:
    """It adds those that are missing, in their latest shape, before it looks at the version."""
    url = new_database(kind, tmp_path)
    make_old_database(url, "v1.3.0.a")
    optuna.storages.RDBStorage(url, skip_compatibility_check=True).engine.dispose()
    _upgrade(url)
    assert _seen_by_us(url) == _expected(kind, "v1.3.0.a", tmp_path)


def test_tables_from_before_alembic_are_upgraded(tmp_path: Path) -> None:
    url = new_database("sqlite", tmp_path)
    make_old_database(url, VERSIONS[0])
    _run(url, "DROP TABLE alembic_version", "UPDATE version_info SET schema_version = 11")
    with pytest.raises(IncompatibleSchemaError, match="trialstore upgrade"):
        trialstore.RDBStorage(url)
    _upgrade(url)
    assert _seen_by_us(url) == _expected("sqlite", VERSIONS[0], tmp_path)
    (row,) = _run(url, "SELECT schema_version, library_version FROM version_info")
    assert tuple(row) == (12, optuna.__version__)


def test_nan_that_sqlite_kept_as_null_stays_nan(tmp_path: Path) -> None:
    url = new_database("sqlite", tmp_path)
    make_old_database(url, "v1.3.0.a")
    _run(url, "INSERT INTO trial_values (trial_id, step, value) VALUES (1, 7, NULL)")
    _upgrade(url)
    with contextlib.closing(trialstore.RDBStorage(url)) as storage:
        assert math.isnan(storage.get_trial(1).intermediate_values[7])


def test_a_complete_trial_without_a_value_does_not_stop_the_upgrade(tmp_path: Path) -> None:
    url = new_database("sqlite", tmp_path)
    make_old_database(url, "v1.3.0.a")
    _run(url, "UPDATE trials SET value = NULL WHERE trial_id = 1")
    _upgrade(url)
    with contextlib.closing(trialstore.RDBStorage(url)) as storage:
        states = [trial.state.name for trial in storage.get_all_trials(1)]
    assert states[:2] == ["FAIL", "PRUNED"] and states.count("COMPLETE") == 2


def test_trials_that_nobody_had_numbered_are_numbered_in_order(tmp_path: Path) -> None:
    url = new_database("sqlite", tmp_path)
    make_old_database(url, "v1.2.0.a")
    _run(url, "DELETE FROM trial_system_attributes WHERE key = '_number' AND trial_id > 3")
    _upgrade(url)
    with contextlib.closing(trialstore.RDBStorage(url)) as storage:
        assert [trial.number for trial in storage.get_all_trials(1)] == list(range(7))


@pytest.mark.parametrize("kind", _KINDS)
def test_an_older_version_is_told_to_upgrade_and_a_newer_one_to_update(
    kind: str, tmp_path: Path
) -> None:
    url = new_database(kind, tmp_path)
    trialstore.RDBStorage(url).close()
    _run(url, "UPDATE alembic_version SET version_num = 'v3.0.0.d'")
    with pytest.raises(IncompatibleSchemaError, match=r"v3.0.0.d.*trialstore upgrade"):
        trialstore.RDBStorage(url)
    _run(url, "UPDATE alembic_version SET version_num = 'v9.9.9.a'")
    with pytest.raises(IncompatibleSchemaError, match=r"v9.9.9.a.*newer.*pip install -U"):
        trialstore.RDBStorage(url)
    with contextlib.closing(_old_storage(url)) as storage:
        with pytest.raises(IncompatibleSchemaError, match=r"newer"):
            storage.upgrade()
        assert storage.get_current_version() == "v9.9.9.a"


def test_the_scripts_are_the_versions_and_optunas() -> None:
    scripts = ScriptDirectory(str(schema._MIGRATIONS))
    newest_first = [script.revision for script in scripts.walk_revisions()]
    with contextlib.closing(trialstore.RDBStorage("sqlite:///:memory:")) as storage:
        assert storage.get_all_versions() == newest_first
        assert storage.get_head_version() == newest_first[0] == HEAD_VERSION
    theirs = optuna.storages.RDBStorage("sqlite:///:memory:")
    assert theirs.get_all_versions() == newest_first


def _run(url: str, *statements: str) -> list[Any]:
    """The rows of the last statement."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        results = [connection.execute(sa.text(statement)) for statement in statements]
        rows = list(results[-1]) if results[-1].returns_rows else []
    engine.dispose()
    return rows
