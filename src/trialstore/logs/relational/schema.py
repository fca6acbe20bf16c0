"""The tables' creation and version: made race-free, checked, upgraded.

Source: docs/formats/tables.md, "Versions".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
import logging
from pathlib import Path
import threading
from typing import Any, Final

from alembic import command
from alembic.config import Config
import optuna
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.schema import CreateIndex, CreateTable

from trialstore.errors import IncompatibleSchemaError, LogUnavailableError
from trialstore.logs.relational import statements as s, tables as t
from trialstore.logs.relational.dialects import Dialect, Fault, shown_url
from trialstore.logs.relational.session import Session, Step

_logger = logging.getLogger(__name__)

VERSIONS: Final = (
    "v0.9.0.a",
    "v1.2.0.a",
    "v1.3.0.a",
    "v2.4.0.a",
    "v2.6.0.a",
    "v3.0.0.a",
    "v3.0.0.b",
    "v3.0.0.c",
    "v3.0.0.d",
    "v3.2.0.a",
)
"""Every version that Optuna's tables ever had, oldest first."""

_LOCK_NAME: Final = "trialstore-schema"
_LOCK_NUMBER: Final = 0x7472_6961_6C73_746F  # "trialsto"
_LOCK_WAIT_S: Final = 60

_NOT_ALLOWED: Final = (Fault.DENIED, Fault.READ_ONLY)

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_one_upgrade: Final = threading.Lock()
"""Alembic keeps the migration that is running in module globals."""


class Schema:
    """The version of the tables behind an engine."""

    def __init__(self, engine: Engine, dialect: Dialect) -> None:
        self._engine = engine
        self._dialect = dialect
        self._name = dialect.name

    @property
    def _shown_url(self) -> str:
        return shown_url(self._engine.url)

    # --- opening ---

    def prepare(self, session: Session, *, create: bool, check: bool) -> None:
        """Create what is missing and check the version, on a fresh connection.

        Raises:
            IncompatibleSchemaError: The tables are of another version.
        """
        version = self._version(session)
        if version is None and create:
            if self._name == "sqlite":
                self._create_on_sqlite(session)
            else:
                self._create_on_server()
            version = self._version(session)
        if check and version != t.HEAD_VERSION:
            raise IncompatibleSchemaError(self._advice(version))

    def _version(self, session: Session) -> str | None:
        cursor = session.raw.cursor()
        try:
            cursor.execute("SELECT version_num FROM alembic_version")
            row = cursor.fetchone()
        except Exception as error:
            if self._dialect.fault(error) is not Fault.NO_TABLE:
                raise
            return None
        return None if row is None else str(row[0])

    def _advice(self, version: str | None) -> str:
        url = self._shown_url
        if version is None:
            return (
                f"{url} holds no tables of Optuna. A storage that is opened without "
                "skip_table_creation makes them."
            )
        if version in VERSIONS:
            return (
                f"The tables of {url} are of version {version}, this trialstore works on "
                f"{t.HEAD_VERSION}. Make a backup, stop all workers, and run "
                "`trialstore upgrade URL` or `optuna storage upgrade --storage URL`."
            )
        return (
            f"The tables of {url} are of version {version}, which is newer than what this "
            f"trialstore knows ({t.HEAD_VERSION}). Run `pip install -U trialstore`."
        )

    # --- creation ---

    def _create_on_sqlite(self, session: Session) -> None:
        """All tables in one transaction: another process finds all or nothing."""
        raw = session.raw
        dialect: Any = self._engine.dialect
        run = raw.cursor().execute
        run("BEGIN IMMEDIATE")
        try:
            made = {row[0] for row in raw.execute("SELECT name FROM sqlite_master")}
            known = None
            if t.version_info.name in made:
                known = raw.execute("SELECT schema_version FROM version_info").fetchone()
            for table in _missing_at(known):
                if table.name in made:
                    continue
                run(str(CreateTable(table).compile(dialect=dialect)))
                for index in table.indexes:
                    run(str(CreateIndex(index).compile(dialect=dialect)))
            if raw.execute("SELECT count(*) FROM alembic_version").fetchone()[0] == 0:
                version = _version_of(known)
                run("INSERT INTO alembic_version (version_num) VALUES (?)", (version,))
                if known is None:
                    run(
                        "INSERT INTO version_info VALUES (1, ?, ?)",
                        (t.SCHEMA_VERSION, optuna.__version__),
                    )
            run("COMMIT")
        except BaseException:
            run("ROLLBACK")
            raise

    def _create_on_server(self) -> None:
        """Under a lock of the server's that creators share, because IF NOT EXISTS is no
        protection: two sessions may both find nothing and collide in the catalogue."""
        with self._locked() as connection:
            known = None
            if sa.inspect(connection).has_table(t.version_info.name):
                known = connection.execute(sa.select(t.version_info.c.schema_version)).first()
            t.metadata.create_all(connection, tables=_missing_at(known))
            rows = sa.select(sa.func.count()).select_from(t.alembic_version)
            if connection.scalar(rows) == 0:
                version = _version_of(known)
                connection.execute(sa.insert(t.alembic_version).values(version_num=version))
                if known is None:
                    self._write_version_info(connection)
            t.sessions.create(connection, checkfirst=True)

    @staticmethod
    def _write_version_info(connection: Connection) -> None:
        """What Optuna writes into its own table beside Alembic's."""
        row = t.version_info.c.version_info_id == 1  # said, because of safe updates on MySQL
        connection.execute(sa.delete(t.version_info).where(row))
        connection.execute(
            sa.insert(t.version_info).values(
                version_info_id=1,
                schema_version=t.SCHEMA_VERSION,
                library_version=optuna.__version__,
            )
        )

    @contextmanager
    def _locked(self) -> Iterator[Connection]:
        """A connection to a server that holds the lock of all who create or alter tables, and
        commits what is done with it.

        PostgreSQL's lock is the first statement of the one transaction in which all is done, and
        ends with it: a pooler lends each transaction another session. Its isolation is not the
        server's default, or the tables would be looked for as they were before the lock was had.
        MySQL commits with each statement that makes a table, so its lock is the session's.
        """
        with self._engine.connect() as connection:
            if self._name == "postgresql":
                connection.execution_options(isolation_level="READ COMMITTED")
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_NUMBER)))
                yield connection
                connection.commit()
                return
            if connection.scalar(sa.select(sa.func.get_lock(_LOCK_NAME, _LOCK_WAIT_S))) != 1:
                raise LogUnavailableError(
                    f"Somebody has been creating or upgrading the tables of {self._shown_url} for "
                    f"more than {_LOCK_WAIT_S} s; try again when that is done."
                )
            connection.commit()
            try:
                yield connection
                connection.commit()
            finally:
                connection.rollback()
                connection.execute(sa.select(sa.func.release_lock(_LOCK_NAME)))
                connection.commit()

    def open_at_once(self, session: Session, session_id: str, dropped: Sequence[str]) -> bool:
        """``prepare`` and ``open_mark`` in one message, where tables and version are right.

        Args:
            session: To the database.
            session_id: Names the row of the one that is opened.
            dropped: Sessions whose rows nobody needs any more.

        Returns:
            False, with nothing done, where they may not be.
        """
        version = self._dialect.step(s.schema_version)
        forget = [self._dialect.step(s.forget_session, session=one) for one in dropped]
        try:
            rows, *_ = session.run([version, *self._mark_steps(session_id), *forget])
        except Exception as error:
            if self._dialect.fault(error) not in (Fault.NO_TABLE, *_NOT_ALLOWED):
                raise
            return False
        return bool(rows) and rows[0][0] == t.HEAD_VERSION

    def _mark_steps(self, session_id: str) -> list[Step]:
        return [
            self._dialect.step(s.insert_session, session=session_id, seq=0),
            self._dialect.step(s.forget_abandoned, t.SESSION_DAYS_MAX),
        ]

    def open_mark(self, session: Session, session_id: str, create: bool) -> bool:
        """Put the session's row into our own table; False where there is none and may be none."""
        steps = self._mark_steps(session_id)
        try:
            session.run(steps)
            return True
        except Exception as error:
            fault = self._dialect.fault(error)
            if fault not in (Fault.NO_TABLE, *_NOT_ALLOWED):
                raise
            # A database that is read-only takes no COMMIT of ours either.
            if fault in _NOT_ALLOWED or not create:
                return False
        try:
            with self._locked() as connection:
                t.sessions.create(connection, checkfirst=True)
        except sa.exc.DBAPIError as error:
            if error.orig is None or self._dialect.fault(error.orig) not in _NOT_ALLOWED:
                raise
            return False
        session.run(steps)
        return True

    def warn_of_no_mark(self) -> None:
        """For who is about to write; to who only reads it is nothing."""
        _logger.warning(
            "The table %s of %s is not there and may not be created, or may not be written: if "
            "the connection breaks during a COMMIT, the outcome of that call can't be told.",
            t.sessions.name,
            self._shown_url,
        )

    # --- versions ---

    def is_there(self) -> bool:
        """Whether there are tables that say their version."""
        return sa.inspect(self._engine).has_table(t.alembic_version.name)

    def get_current_version(self) -> str:
        """The version of the tables as they are.

        Raises:
            IncompatibleSchemaError: There are none.
        """
        with self._engine.connect() as connection:
            if not sa.inspect(connection).has_table(t.alembic_version.name):
                raise IncompatibleSchemaError(self._advice(None))
            version = connection.scalar(sa.select(t.alembic_version.c.version_num))
        if version is None:
            raise IncompatibleSchemaError(self._advice(None))
        return str(version)

    def get_head_version(self) -> str:
        """The version that this trialstore works on."""
        return t.HEAD_VERSION

    def get_all_versions(self) -> list[str]:
        """All versions, newest first."""
        return list(reversed(VERSIONS))

    def upgrade(self) -> None:
        """Bring the tables to the latest version; interrupted, it goes on where it stopped.

        Where the database can, all is one transaction. MySQL commits with each statement that
        alters a table, and keeps the version of the last script that came to its end.

        Raises:
            IncompatibleSchemaError: There are no tables, or they are of a newer version.
        """
        version = self.get_current_version()
        if version not in VERSIONS:
            raise IncompatibleSchemaError(self._advice(version))
        _logger.info("Upgrading %s from %s to %s.", self._shown_url, version, t.HEAD_VERSION)
        with _one_upgrade:
            if self._name == "sqlite":
                with self._engine.connect() as connection, connection.begin():
                    # The driver begins no transaction by itself for statements that alter tables.
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                    self._migrate(connection)
            else:
                with self._locked() as connection:
                    self._migrate(connection)

    def _migrate(self, connection: Connection) -> None:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        command.upgrade(config, "head")
        # Optuna's history has no step for tables that it added later: it creates what is missing.
        t.metadata.create_all(connection)
        self._write_version_info(connection)


def _version_of(known: Any) -> str:
    """Tables from before Alembic have a ``version_info`` row of an older number, and are at the
    first version that Alembic knows of."""
    return VERSIONS[0] if known and known[0] != t.SCHEMA_VERSION else t.HEAD_VERSION


def _missing_at(known: Any) -> list[sa.Table]:
    """What to create, given the row of ``version_info``: of old tables none but their version."""
    return list(t.OPTUNA_TABLES) if _version_of(known) == t.HEAD_VERSION else [t.alembic_version]


def database_bytes(engine: Engine, dialect: Dialect) -> int | None:
    """What the database takes on its disk; None where nobody tells."""
    with engine.connect() as connection:
        size = connection.exec_driver_sql(dialect.size_query).scalar()
    return None if size is None else int(size)
