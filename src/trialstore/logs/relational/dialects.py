"""Every question about which database and which driver it is, answered in one place.

A ``Dialect`` renders what differs in SQL and compiles statements. A ``Session`` wraps one
connection of the driver and runs steps on it: in one message where the driver allows, else one
after the other. ``Dialect.fault`` sorts a driver's errors into the few kinds that the log treats
differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
from datetime import datetime, timezone
import enum
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import (
    mysql as mysql_sql,
    postgresql as postgresql_sql,
    sqlite as sqlite_sql,
)
from sqlalchemy.engine import Engine

from trialstore.logs.relational.write_queue import WriteQueue
from trialstore.records import STORES_UTC, parse_time


class Compiled(NamedTuple):
    """The text of a statement for a driver, and the names of its arguments in their order."""

    sql: str
    names: tuple[str, ...]
    columns: int
    """How many columns it answers; 0 for a write."""


class Step(NamedTuple):
    """One statement of an exchange with its arguments."""

    statement: Compiled
    args: tuple[Any, ...]

    def unread(self) -> Step:
        """The same for its effect alone, in its place, whatever it answers."""
        return Step(self.statement._replace(columns=0), self.args)


def plain(sql: str) -> Step:
    return Step(Compiled(sql, (), 0), ())


Rows = list[Any]


class Fault(enum.Enum):
    """What an error of the driver means to the exchange."""

    AGAIN = "rolled back by the database; the same exchange may be made again at once"
    LOST = "the connection is gone; what was sent may have been stored or not"
    FENCED = "another transaction took the mark's sequence number"
    VALUE = "a value does not fit its column"
    NO_TABLE = "a table is missing"
    DENIED = "the user may not do this"
    EXISTS = "somebody else has just created it"
    OTHER = "anything else"


class Session:
    """One connection, in the driver's autocommit; transactions are statements like others."""

    def __init__(self, raw: Any, dialect: Dialect) -> None:
        self.raw = raw
        self.dialect = dialect

    def run(self, steps: Sequence[Step]) -> list[Rows]:
        """The rows that each step answers (none for writes), one step after the other."""
        answers: list[Rows] = []
        cursor = self.raw.cursor()
        for statement, args in steps:
            cursor.execute(statement.sql, args)
            answers.append(cursor.fetchall() if statement.columns else [])
        cursor.close()
        return answers

    def rollback(self) -> None:
        """End a transaction that failed; nothing of it stays."""
        self.raw.cursor().execute("ROLLBACK")

    def close(self) -> None:
        self.raw.close()


class Dialect:
    """What differs between databases; the base answers as standard SQL would."""

    name = ""
    paramstyle = "format"
    one_message = True
    """Whether ``Session.run`` sends all steps in one message."""
    keeps_marks = True
    ids_reused = False
    begin_write = plain("BEGIN")
    begin_read: Step | None = None
    """None where each statement may be a transaction of its own."""
    commit = plain("COMMIT")
    integer_max = 2**31 - 1
    nul_in_text = True
    whole_seconds = False
    """Whether a heartbeat is kept in whole seconds, rounded down."""
    session_type: type[Session] = Session
    session_arguments: Mapping[str, Any] = {}
    """What a session's connection is opened with, beside the URL's and the user's arguments."""

    def __init__(self, engine: Engine) -> None:
        sql_dialect: Any = type(engine.dialect)
        self._sql: Any = sql_dialect(paramstyle=self.paramstyle)
        self._compiled: dict[Any, Compiled] = {}

    # --- compilation ---

    def compiled(self, statement: Callable[..., Any], *shape: Any) -> Compiled:
        key = (statement, shape)
        found = self._compiled.get(key)
        if found is None:
            built = statement(self, *shape)
            text = built.compile(dialect=self._sql)
            columns = (
                len(list(built.selected_columns)) if hasattr(built, "selected_columns") else 0
            )
            unnamed = [name for name in text.positiontup or () if not name.startswith("p_")]
            assert not unnamed, f"constants are written with literal_column: {text}"
            found = Compiled(
                str(text), tuple([name[2:] for name in text.positiontup or ()]), columns
            )
            self._compiled[key] = found
        return found

    def step(self, statement: Callable[..., Any], *shape: Any, **args: Any) -> Step:
        compiled = self.compiled(statement, *shape)
        return Step(compiled, tuple([args[name] for name in compiled.names]))

    # --- pieces of SQL ---

    def text_arg(self, value: Any) -> Any:
        return value

    def float_arg(self, value: Any) -> Any:
        return value

    def int_arg(self, value: Any) -> Any:
        return value

    def time_arg(self, value: Any) -> Any:
        return value

    def enum_arg(self, value: Any, of: sa.Enum) -> Any:
        return value

    def as_text(self, column: Any) -> Any:
        return sa.cast(column, sa.Text)

    def as_float(self, column: Any) -> Any:
        return column

    def same_text(self, column: Any, value: Any) -> Any:
        return column == value

    def divide(self, value: Any, by: Any) -> Any:
        """An error where ``by`` is 0."""
        return value / by

    def concat(self, *parts: Any) -> Any:
        joined: Any = sa.func.coalesce(parts[0], sa.literal_column("''"))
        for part in parts[1:]:
            joined = joined.op("||")(sa.literal_column("';'")).op("||")(
                sa.func.coalesce(part, sa.literal_column("''"))
            )
        return joined

    def join_text(self, *columns: Any) -> Any:
        joined = self.as_text(columns[0])
        for column in columns[1:]:
            one = sa.func.coalesce(self.as_text(column), sa.literal_column("''"))
            joined = joined.op("||")(sa.literal_column("':'")).op("||")(one)
        return joined

    def aggregate(self, column: Any) -> Any:
        return sa.func.string_agg(column, sa.literal_column("','"))

    def beat_time(self) -> Any:
        """The time as Optuna's workers write it as a heartbeat, in the session's time zone."""
        return sa.func.current_timestamp()

    def since_beat_s(self, column: Any) -> Any:
        """Seconds from a heartbeat to now; whole ones where the column holds such."""
        raise NotImplementedError

    def days_ago(self, days: int) -> Any:
        """A moment by the database's clock."""
        return sa.literal_column(f"CURRENT_TIMESTAMP - INTERVAL '{days}' DAY")

    def or_ignore(self, table: sa.Table, values: dict[str, Any], unique: Any) -> Any:
        raise NotImplementedError

    def upsert(self, table: sa.Table, names: list[str], source: Any, keys: int) -> Any:
        """Insert, or replace what stands under the first ``keys`` columns, keeping its row id."""
        raise NotImplementedError

    # --- values ---

    def time_value(self, text: str | None) -> str | None:
        """A record's time as the column's text."""
        if text is None:
            return None
        if STORES_UTC and len(text) == 32 and text.endswith("+00:00"):
            return f"{text[:10]} {text[11:26]}"
        return column_time(text)

    # --- connections ---

    def prepare(self, raw: Any) -> None:
        """Bring a fresh connection into the state that ``Session`` expects."""

    def engine_options(self, url: sa.URL, options: dict[str, Any]) -> dict[str, Any]:
        """The user's ``engine_kwargs`` and what we need beside them."""
        return options

    def fault(self, error: BaseException) -> Fault:
        raise NotImplementedError


def column_time(text: str) -> str:
    """Naive time text of a column, in UTC or local as the installed Optuna stores."""
    local = parse_time(text)
    if STORES_UTC:
        local = local.astimezone(timezone.utc).replace(tzinfo=None)
    return local.isoformat(sep=" ", timespec="microseconds")


_OFFSET: Final = "+00:00" if STORES_UTC else ""


def record_time(raw: str | None) -> str | None:
    """A column's time text as records carry it. Raises ValueError if it is none."""
    if raw is None:
        return None
    if len(raw) == 26:
        return f"{raw[:10]}T{raw[11:]}{_OFFSET}"
    if len(raw) > 19:  # PostgreSQL leaves out zeros at the end, which Python 3.10 can't read.
        raw = raw.ljust(26, "0")
    return datetime.fromisoformat(raw).isoformat() + _OFFSET


def _code_table(*rows: tuple[Fault, str]) -> dict[str, Fault]:
    return {code: fault for fault, codes in rows for code in codes.split()}


# --- URLs ----------------------------------------------------------------------------------------


def shown_url(url: sa.URL) -> str:
    """A URL as anybody may see it: without passwords, of which its query can hold some too."""
    return url.difference_update_query(filter(_is_secret, url.query)).render_as_string()


def passwords(url: sa.URL, connect_args: Mapping[str, Any]) -> list[str]:
    """All that a driver is given and could repeat in an error."""
    given = [*url.query.items(), *connect_args.items()]
    values = [url.password, *(value for key, value in given if _is_secret(key))]
    return [str(value) for value in values if value]


def _is_secret(key: str) -> bool:
    return "pass" in key.lower() or key.lower() == "pwd"


# --- SQLite --------------------------------------------------------------------------------------

BUSY_TIMEOUT_S: Final = 60.0
# File systems on which processes of several machines may meet; WAL needs memory shared by all.
_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs")


def is_local(path: Path) -> bool:
    """Whether the file is on this machine; True where the operating system does not tell."""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return True
    best, kind = "", ""
    for line in mounts:
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        inside = point == "/" or f"{path}/".startswith(f"{point}/")
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind not in _REMOTE and not kind.startswith(("fuse.sshfs", "fuse.gluster"))


class QueueingSession(Session):
    """Writes in its turn among those of ours that wait for the file."""

    def __init__(self, raw: Any, dialect: Dialect) -> None:
        super().__init__(raw, dialect)
        path = raw.execute("PRAGMA database_list").fetchone()[2]
        self._queue = WriteQueue(Path(path)) if path and is_local(Path(path)) else None

    def run(self, steps: Sequence[Step]) -> list[Rows]:
        if self._queue is None:
            return super().run(steps)
        if steps and steps[0] is self.dialect.begin_write:
            self._queue.enter()
        try:
            return super().run(steps)
        finally:
            self._leave()

    def rollback(self) -> None:
        try:
            super().rollback()
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._queue is not None and self._queue.is_first and not self.raw.in_transaction:
            self._queue.leave()

    def close(self) -> None:
        super().close()
        if self._queue is not None:
            self._queue.close()


class SQLite(Dialect):
    """The driver of the standard library; no server, hence no round trips and no lost answers."""

    name = "sqlite"
    session_type = QueueingSession
    paramstyle = "qmark"
    one_message = False
    keeps_marks = False
    ids_reused = True
    # IMMEDIATE takes the write lock before reading: a read transaction that wants to write later
    # fails at once, whatever the timeout, if somebody wrote in between.
    begin_write = plain("BEGIN IMMEDIATE")
    begin_read = plain("BEGIN")
    integer_max = 2**63 - 1
    whole_seconds = True

    def since_beat_s(self, column: Any) -> Any:
        # Beats are UTC, whatever the zone of the machine.
        seconds: Any = sa.literal_column("'%s'")
        now = sa.cast(sa.func.strftime(seconds, sa.literal_column("'now'")), sa.Integer)
        return now - sa.cast(sa.func.strftime(seconds, column), sa.Integer)

    def as_text(self, column: Any) -> Any:
        # Columns hold text, and CAST(… AS TEXT) costs time for each row.
        return column

    def join_text(self, *columns: Any) -> Any:
        joined = columns[0]
        for column in columns[1:]:
            one = sa.func.coalesce(column, sa.literal_column("''"))
            joined = joined.op("||")(sa.literal_column("':'")).op("||")(one)
        return joined

    def aggregate(self, column: Any) -> Any:
        return sa.func.group_concat(column, sa.literal_column("','"))

    def or_ignore(self, table: sa.Table, values: dict[str, Any], unique: Any) -> Any:
        made = sqlite_sql.insert(table).values(values)
        return made.on_conflict_do_nothing(index_elements=[unique])

    def upsert(self, table: sa.Table, names: list[str], source: Any, keys: int) -> Any:
        made = sqlite_sql.insert(table).from_select(names, source)
        return made.on_conflict_do_update(
            index_elements=names[:keys], set_={n: made.excluded[n] for n in names[keys:]}
        )

    def engine_options(self, url: sa.URL, options: dict[str, Any]) -> dict[str, Any]:
        arguments = {"timeout": BUSY_TIMEOUT_S, "check_same_thread": False}
        arguments.update(options.get("connect_args", {}))
        arguments["check_same_thread"] = False
        return {**options, "connect_args": arguments}

    def prepare(self, raw: Any) -> None:
        raw.isolation_level = None

    def fault(self, error: BaseException) -> Fault:
        text = str(error)
        if "locked" in text or "busy" in text:
            return Fault.AGAIN
        if "no such table" in text:
            return Fault.NO_TABLE
        if "already exists" in text:
            return Fault.EXISTS
        return Fault.OTHER


# --- PostgreSQL ----------------------------------------------------------------------------------

_POSTGRESQL_FAULTS: Final = _code_table(
    (Fault.AGAIN, "40001 40P01 55P03 23503"),
    # 26000: psycopg takes a statement for prepared that a failed pipeline did not come to.
    (Fault.LOST, "57P01 57P02 57P03 57P05 25P03 25P04 26000"),
    (Fault.FENCED, "22012"),
    (Fault.NO_TABLE, "42P01"),
    (Fault.DENIED, "42501 25006"),
    (Fault.EXISTS, "42P07 42710 23505"),
)


class PostgreSQL(Dialect):
    """What both drivers share. Parameters get types, because a SELECT list infers none."""

    name = "postgresql"
    nul_in_text = False

    def text_arg(self, value: Any) -> Any:
        return sa.cast(value, sa.Text)

    def float_arg(self, value: Any) -> Any:
        return sa.cast(value, sa.Float(53))

    def int_arg(self, value: Any) -> Any:
        return sa.cast(value, sa.Integer)

    def time_arg(self, value: Any) -> Any:
        return sa.cast(value, sa.DateTime)

    def enum_arg(self, value: Any, of: sa.Enum) -> Any:
        return sa.cast(value, of)

    def as_float(self, column: Any) -> Any:
        return sa.cast(column, sa.Float(53))

    def beat_time(self) -> Any:
        # Not the time at which the transaction began: it may have waited for a lock since.
        return sa.cast(sa.func.clock_timestamp(), sa.DateTime)

    def since_beat_s(self, column: Any) -> Any:
        return sa.extract("epoch", self.beat_time() - column)

    def divide(self, value: Any, by: Any) -> Any:
        return sa.cast(value, sa.BigInteger).op("/")(by)

    def or_ignore(self, table: sa.Table, values: dict[str, Any], unique: Any) -> Any:
        made = postgresql_sql.insert(table).values(values)
        return made.on_conflict_do_nothing(index_elements=[unique])

    def upsert(self, table: sa.Table, names: list[str], source: Any, keys: int) -> Any:
        made = postgresql_sql.insert(table).from_select(names, source)
        return made.on_conflict_do_update(
            index_elements=names[:keys], set_={n: made.excluded[n] for n in names[keys:]}
        )

    def fault(self, error: BaseException) -> Fault:
        code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        if code is None:
            kind = type(error).__name__
            refused = ("authentication failed", "does not exist", "no pg_hba.conf entry")
            if any(part in str(error) for part in refused):
                return Fault.OTHER
            lost = kind in ("OperationalError", "InterfaceError", "PipelineAborted")
            return Fault.LOST if lost or isinstance(error, OSError) else Fault.OTHER
        known = _POSTGRESQL_FAULTS.get(code)
        if known is not None:
            return known
        if code.startswith(("08", "53")):
            return Fault.LOST
        return Fault.VALUE if code.startswith("22") else Fault.OTHER


class PipelineSession(Session):
    """psycopg: all steps go out at once, answers come back together."""

    def run(self, steps: Sequence[Step]) -> list[Rows]:
        raw = self.raw
        cursors = []
        first: Exception | None = None
        try:
            with raw.pipeline():
                try:
                    for statement, args in steps:
                        cursor = raw.cursor()
                        cursor.execute(statement.sql, args)
                        cursors.append(cursor)
                except Exception as error:
                    # Let through, it would be logged together with what follows from it.
                    first = error
        except Exception as error:
            raise first or error from None
        if first is not None:
            raise first
        return [
            cursor.fetchall() if step.statement.columns else []
            for cursor, step in zip(cursors, steps, strict=True)
        ]


class Psycopg(PostgreSQL):
    session_type = PipelineSession

    def prepare(self, raw: Any) -> None:
        raw.autocommit = True


class MessageSession(Session):
    """psycopg2: one text of many statements, whose last answers for all that read.

    libpq gives the driver only the last answer of a message, so every read becomes one element of
    a JSON array that the last statement returns.
    """

    def run(self, steps: Sequence[Step]) -> list[Rows]:
        cursor = self.raw.cursor()
        writes: list[bytes] = []
        reads: list[bytes] = []
        for statement, args in steps:
            sql = cursor.mogrify(statement.sql, args or None)
            if not statement.columns:
                writes.append(sql)
                continue
            names = ",".join(f"c{i}" for i in range(statement.columns)).encode()
            reads.append(
                b"(SELECT coalesce(json_agg(json_build_array(%s)),'[]') FROM (%s) AS s(%s))"
                % (names, sql, names)
            )
        if reads:
            writes.append(b"SELECT json_build_array(%s)::text" % b",".join(reads))
        cursor.execute(b";".join(writes))
        answered = msgspec.json.decode(cursor.fetchone()[0]) if reads else []
        cursor.close()
        rest = iter(answered)
        return [next(rest) if step.statement.columns else [] for step in steps]


class Psycopg2(PostgreSQL):
    session_type = MessageSession

    def prepare(self, raw: Any) -> None:
        raw.autocommit = True


# --- MySQL and MariaDB ---------------------------------------------------------------------------

_MYSQL_FAULTS: Final = _code_table(
    (Fault.AGAIN, "1213 1205 1020 1451 1452"),
    (Fault.LOST, "0 2006 2013 2014 2003 2002 1053 1927 4031 1040 1152 1158 1159 1160 1161 1184"),
    (Fault.FENCED, "1048 1365"),
    (Fault.VALUE, "1406 1366 1264 1242 1265 1292 1153 3988"),
    (Fault.NO_TABLE, "1146"),
    (Fault.DENIED, "1142 1044 1370 1227"),
    (Fault.EXISTS, "1050 1062"),
)


class MultiStatementSession(Session):
    """PyMySQL and mysqlclient: one text of many statements, an answer for each."""

    def run(self, steps: Sequence[Step]) -> list[Rows]:
        cursor = self.raw.cursor()
        texts = []
        for statement, args in steps:
            sql = cursor.mogrify(statement.sql, args) if args else statement.sql
            texts.append(sql.decode() if isinstance(sql, bytes) else sql)
        answers: list[Rows] = []
        cursor.execute(";".join(texts))
        for step in steps:
            if answers:
                cursor.nextset()
            answers.append(list(cursor.fetchall()) if step.statement.columns else [])
        cursor.close()
        return answers


class MySQL(Dialect):
    name = "mysql"
    begin_write = plain("START TRANSACTION")
    session_type = MultiStatementSession
    # Set later it costs two round trips.
    session_arguments: Mapping[str, Any] = {"autocommit": True}
    whole_seconds = True

    def since_beat_s(self, column: Any) -> Any:
        return sa.func.timestampdiff(sa.text("SECOND"), column, self.beat_time())

    def as_text(self, column: Any) -> Any:
        return sa.cast(column, sa.CHAR)

    def same_text(self, column: Any, value: Any) -> Any:
        # The collation holds "LR" and "lr" equal; the second condition uses no index.
        return sa.and_(column == value, sa.func.binary(column) == sa.func.binary(value))

    def divide(self, value: Any, by: Any) -> Any:
        # A division by zero is NULL here, which the column refuses.
        return sa.func.nullif(
            value, sa.case((by == sa.literal_column("0"), value), else_=sa.literal_column("-1"))
        )

    def concat(self, *parts: Any) -> Any:
        return sa.func.concat_ws(
            sa.literal_column("';'"),
            *[sa.func.coalesce(part, sa.literal_column("''")) for part in parts],
        )

    def join_text(self, *columns: Any) -> Any:
        return sa.func.concat_ws(
            sa.literal_column("':'"),
            *[sa.func.coalesce(column, sa.literal_column("''")) for column in columns],
        )

    def aggregate(self, column: Any) -> Any:
        return sa.func.group_concat(column)

    def or_ignore(self, table: sa.Table, values: dict[str, Any], unique: Any) -> Any:
        made = mysql_sql.insert(table).values(values)
        return made.on_duplicate_key_update({unique.name: unique})

    def upsert(self, table: sa.Table, names: list[str], source: Any, keys: int) -> Any:
        made = mysql_sql.insert(table).from_select(names, source)
        key = names[keys - 1]
        update: dict[str, Any] = {}
        for name in names[keys:]:
            if key in ("key", "param_name"):
                # A key that only the collation holds equal is another key: refuse (the
                # subquery of two rows fails) rather than overwrite.
                update[name] = sa.literal_column(
                    f"IF(BINARY {table.name}.`{key}` = BINARY VALUES(`{key}`), "
                    f"VALUES(`{name}`), (SELECT 1 UNION SELECT 2))"
                )
            else:
                update[name] = sa.literal_column(f"VALUES(`{name}`)")
        return made.on_duplicate_key_update(update)

    def engine_options(self, url: sa.URL, options: dict[str, Any]) -> dict[str, Any]:
        options = {"pool_pre_ping": True, **options}
        arguments = dict(options.get("connect_args", {}))
        if url.get_driver_name() == "pymysql":
            from pymysql.constants import CLIENT  # type: ignore[import-untyped]

            flags = arguments.get("client_flag", 0)
            arguments["client_flag"] = flags | CLIENT.MULTI_STATEMENTS
        return {**options, "connect_args": arguments}

    def prepare(self, raw: Any) -> None:
        # READ COMMITTED: a snapshot kept for the whole transaction is older than the locks.
        # Strict: a value that does not fit fails instead of being cut.
        raw.cursor().execute(
            "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED;"
            "SET SESSION sql_mode = CONCAT_WS(',', @@sql_mode, 'STRICT_ALL_TABLES'),"
            "group_concat_max_len = 1048576, innodb_lock_wait_timeout = 50"
        )
        with contextlib.suppress(AttributeError):
            raw.next_result()

    def fault(self, error: BaseException) -> Fault:
        code = error.args[0] if error.args and isinstance(error.args[0], int) else None
        if code is None:
            kind = type(error).__name__
            lost = kind == "InterfaceError" or isinstance(error, OSError)
            return Fault.LOST if lost else Fault.OTHER
        return _MYSQL_FAULTS.get(str(code), Fault.OTHER)


_DIALECTS: Final[dict[tuple[str, str], type[Dialect]]] = {
    ("sqlite", "pysqlite"): SQLite,
    ("postgresql", "psycopg"): Psycopg,
    ("postgresql", "psycopg2"): Psycopg2,
    ("mysql", "pymysql"): MySQL,
    ("mysql", "mysqldb"): MySQL,
    ("mariadb", "pymysql"): MySQL,
    ("mariadb", "mysqldb"): MySQL,
}


def dialect_type(url: sa.URL) -> type[Dialect]:
    """The dialect for a URL. Raises ValueError for a database or driver that we don't serve."""
    driver = url.get_driver_name()
    found = _DIALECTS.get((url.get_backend_name(), driver))
    if found is None:
        served = ", ".join(sorted({f"{name}+{by}" for name, by in _DIALECTS}))
        raise ValueError(f"No tables log for {url.get_backend_name()}+{driver}; use {served}.")
    return found
