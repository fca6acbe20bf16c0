"""Every question about which database and which driver it is, answered in one place.

A ``Dialect`` renders what differs in SQL and compiles statements. Its ``session_type`` runs them
on a connection of the driver: in one message where it allows, else one after the other.
``Dialect.fault`` sorts a driver's errors into the few kinds that the log treats differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
from datetime import datetime, timezone
import enum
import math
import os
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import (
    mysql as mysql_sql,
    postgresql as postgresql_sql,
    sqlite as sqlite_sql,
)
from sqlalchemy.engine import Engine

from trialstore.logs.relational import tables as t
from trialstore.logs.relational.message import MessageSession
from trialstore.logs.relational.session import Compiled, Rows, Server, Session, Step, plain
from trialstore.logs.relational.write_queue import WriteQueue
from trialstore.records import STORES_UTC, parse_time


class Fault(enum.Enum):
    """What an error of the driver means to the exchange."""

    AGAIN = "rolled back by the database; the same exchange may be made again at once"
    LOST = "the connection is gone; what was sent may have been stored or not"
    FENCED = "another transaction took the mark's sequence number"
    VALUE = "a value does not fit its column"
    NO_TABLE = "a table is missing"
    DENIED = "the user may not do this"
    READ_ONLY = "the database takes no writes, or not yet: a replica"
    EXISTS = "somebody else has just created it"
    CORRUPT = "the file is no database, or damaged"
    OTHER = "anything else"


IdOf = Callable[[Any], Any]
"""The id of a trial, of the columns of its table, for a condition on it."""

_COMPILED: Final[dict[type[Any], dict[Any, Compiled]]] = {}
"""By SQLAlchemy's dialect. For the whole process: compiling what it takes to open a study costs as
much as reading two hundred trials."""


class Dialect:
    """What differs between databases; the base answers as standard SQL would."""

    name = ""
    paramstyle = "format"
    one_message = True
    """Whether ``Session.run`` sends all steps in one message."""
    answers_each = True
    """Whether each step of a message is answered in its place, not all after COMMIT."""
    keeps_marks = True
    ids_reused = False
    counts_rows = True
    """Whether the database knows by itself which of two tables is the small one."""
    begin_write = plain("BEGIN")
    begin_read: Step | None = None
    """None where each statement may be a transaction of its own."""
    commit = plain("COMMIT")
    others_wrote: Step | None = None
    """Asks for a number that stays the same until another connection commits something; None
    where the database does not tell."""
    size_query = ""
    """Asks for the bytes that the database takes on its disk."""
    integer_max = 2**31 - 1
    nul_in_text = True
    name_len_max: int | None = t.NAME_LEN_MAX
    """So many letters fit a column of names or keys; None where they have no end."""
    text_bytes_sure: int | None = None
    """So many bytes fit every column of text; None where they have no end."""
    whole_seconds = False
    """Whether a heartbeat is kept in whole seconds, rounded down."""
    session_type: type[Session] = Session
    session_arguments: Mapping[str, Any] = {}
    """What a session's connection is opened with, beside the URL's and the user's arguments."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        sql_dialect: Any = type(engine.dialect)
        self._sql: Any = sql_dialect(paramstyle=self.paramstyle)
        self._compiled = _COMPILED.setdefault(sql_dialect, {})
        self._server = Server()

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

    def time_as_text(self, column: Any) -> Any:
        """As ``record_time`` reads it."""
        return self.as_text(column)

    def as_float(self, column: Any) -> Any:
        return column

    def same_text(self, column: Any, value: Any) -> Any:
        return column == value

    def value_if(self, condition: Any, value: Any) -> Any:
        """A number for a column that takes no NULL; an error where the condition fails."""
        return sa.case((condition, value))

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

    def chosen(self, ids: Any) -> Any:
        """What a query selects, for the head of a statement of many parts."""
        return ids.cte("chosen")

    def of_chosen(self, query: Any, table: sa.Table, chosen: Any) -> Any:
        """``query``, of those rows of a table whose trials were chosen."""
        return query.select_from(chosen.join(table, table.c.trial_id == chosen.c.trial_id))

    def whichever(self, query: Callable[[IdOf], Any], low: Any) -> list[Any]:
        """A query for trials of a study above an id, as queries of which one finds them."""
        return [query(_trial_id)]

    def one_of(self, query: Callable[[IdOf], Any], low: Any) -> Any:
        """The same for a query that answers one value."""
        return query(_trial_id).scalar_subquery()

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

    def upsert(
        self, table: sa.Table, names: list[str], source: Any, keys: int, *, fence: str = ""
    ) -> Any:
        """Insert, or replace what stands under the first ``keys`` columns, keeping its row id; an
        error where the column ``fence`` would not become greater."""
        raise NotImplementedError

    def _replaced(self, made: Any, table: sa.Table, names: list[str], fence: str) -> Any:
        """What ``names`` become where a row stands."""
        new = {name: made.excluded[name] for name in names}
        if fence:
            greater = made.excluded[fence]
            new[fence] = self.value_if(table.c[fence] < greater, greater)
        return new

    # --- values ---

    def time_value(self, text: str | None) -> str | None:
        """A record's time as the column's text."""
        if text is None:
            return None
        if STORES_UTC and len(text) == 32 and text.endswith("+00:00"):
            return f"{text[:10]} {text[11:26]}"
        return column_time(text)

    def text_bytes_max(self, table: sa.Table) -> int:
        """What a column of text in a table holds, where there is an end to it."""
        raise NotImplementedError

    def message_bytes_max(self) -> float:
        """How long a message the server takes; it hangs up on a much longer one."""
        return math.inf

    # --- connections ---

    def prepare(self, raw: Any) -> None:
        """Bring a fresh connection into the state that ``Session`` expects."""

    def session(self, raw: Any) -> Session:
        """What runs steps on a connection of the driver."""
        return self.session_type(raw, self._server)

    def engine_options(self, url: sa.URL, options: dict[str, Any]) -> dict[str, Any]:
        """The user's ``engine_kwargs`` and what we need beside them."""
        return options

    def fault(self, error: BaseException) -> Fault:
        raise NotImplementedError


def _trial_id(columns: Any) -> Any:
    return columns.trial_id


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
    # A list, since SQLAlchemy 2.0 walks over the names twice.
    return url.difference_update_query(list(filter(_is_secret, url.query))).render_as_string()


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

    def __init__(self, raw: Any, server: Server) -> None:
        super().__init__(raw, server)
        path = raw.execute("PRAGMA database_list").fetchone()[2]
        self._queue = WriteQueue(Path(path)) if path and is_local(Path(path)) else None

    def run(self, steps: Sequence[Step]) -> list[Rows]:
        if self._queue is None:
            return super().run(steps)
        if steps and steps[0] is SQLite.begin_write:
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


# SQLite's texts for NOTADB and CORRUPT, whose codes Python tells from 3.11 on.
_SQLITE_CORRUPT: Final = ("not a database", "disk image is malformed", "malformed database schema")


class SQLite(Dialect):
    """The driver of the standard library; no server, hence no round trips and no lost answers."""

    name = "sqlite"
    size_query = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
    session_type = QueueingSession
    paramstyle = "qmark"
    one_message = False
    keeps_marks = False
    ids_reused = True
    counts_rows = False
    # IMMEDIATE takes the write lock before reading: a read transaction that wants to write later
    # fails at once, whatever the timeout, if somebody wrote in between.
    begin_write = plain("BEGIN IMMEDIATE")
    begin_read = plain("BEGIN")
    others_wrote = Step(Compiled("PRAGMA data_version", (), 1), ())
    integer_max = 2**63 - 1
    name_len_max = None
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

    def days_ago(self, days: int) -> Any:
        return sa.literal_column(f"datetime('now', '-{days} days')")

    def or_ignore(self, table: sa.Table, values: dict[str, Any], unique: Any) -> Any:
        made = sqlite_sql.insert(table).values(values)
        return made.on_conflict_do_nothing(index_elements=[unique])

    def upsert(
        self, table: sa.Table, names: list[str], source: Any, keys: int, *, fence: str = ""
    ) -> Any:
        made = sqlite_sql.insert(table).from_select(names, source)
        return made.on_conflict_do_update(
            index_elements=names[:keys], set_=self._replaced(made, table, names[keys:], fence)
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
        if "only be used in that same thread" in text:
            return Fault.LOST  # to this thread; the user's creator makes one for it
        if "no such table" in text:
            return Fault.NO_TABLE
        if f"NOT NULL constraint failed: {t.sessions.name}.seq" in text:
            return Fault.FENCED
        if "already exists" in text:
            return Fault.EXISTS
        if any(part in text for part in _SQLITE_CORRUPT):
            return Fault.CORRUPT
        return Fault.OTHER


# --- PostgreSQL ----------------------------------------------------------------------------------

_POSTGRESQL_FAULTS: Final = _code_table(
    (Fault.AGAIN, "40001 40P01 55P03 23503"),
    # 26000 42P05: a prepared statement is not where it was, or is where it was not. 0A000: it is
    # of a table that has been altered since.
    (Fault.LOST, "57P01 57P02 57P03 57P05 25P03 25P04 26000 42P05 0A000"),
    (Fault.FENCED, "22012"),
    (Fault.NO_TABLE, "42P01"),
    (Fault.DENIED, "42501"),
    (Fault.READ_ONLY, "25006"),
    (Fault.EXISTS, "42P07 42710 23505"),
)


CONNECT_TIMEOUT_S: Final = 10
"""As long as PyMySQL gives a server that takes a connection and says nothing; libpq has no end."""


class PostgreSQL(Dialect):
    """What both drivers share. Parameters get types, because a SELECT list infers none."""

    name = "postgresql"
    size_query = "SELECT pg_database_size(current_database())"
    paramstyle = "numeric_dollar"
    nul_in_text = False
    # Whatever the server, the database or the user begins with otherwise: by the snapshot of a
    # whole transaction, which is older than the locks, two trials get one number.
    begin_write = plain("BEGIN ISOLATION LEVEL READ COMMITTED")

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

    def time_as_text(self, column: Any) -> Any:
        # The same in every session, where a cast goes by its DateStyle. Of an infinite time there
        # is no such text.
        form: Any = sa.literal_column("'YYYY-MM-DD HH24:MI:SS.US'")
        return sa.func.coalesce(sa.func.to_char(column, form), self.as_text(column))

    def as_float(self, column: Any) -> Any:
        return sa.cast(column, sa.Float(53))

    # An array is taken for ten ids, whatever it comes from: each is looked up in the table's
    # index, and the plan is kept. A join is planned anew each time, and reads the whole of a table
    # that has some thousand rows.
    def chosen(self, ids: Any) -> Any:
        return sa.select(sa.func.array(ids.scalar_subquery()).label("ids")).cte("chosen")

    def of_chosen(self, query: Any, table: sa.Table, chosen: Any) -> Any:
        ids = sa.cast(sa.select(chosen.c.ids).scalar_subquery(), sa.ARRAY(sa.Integer))
        return query.where(table.c.trial_id == sa.any_(ids))

    # No index has the study and the trial, so it is one or the other: all trials above the id, or
    # all of the study, whichever are fewer. Those of the study are about as many as the number of
    # the one with that id. A sum is in no index.
    def whichever(self, query: Callable[[IdOf], Any], low: Any) -> list[Any]:
        by_id, by_study = query(_trial_id), query(_trial_id_by_study)
        return [by_id.where(_is_near(low)), by_study.where(~_is_near(low))]

    def one_of(self, query: Callable[[IdOf], Any], low: Any) -> Any:
        by_id, by_study = query(_trial_id), query(_trial_id_by_study)
        return sa.case((_is_near(low), by_id.scalar_subquery()), else_=by_study.scalar_subquery())

    def beat_time(self) -> Any:
        # Not the time at which the transaction began: it may have waited for a lock since.
        return sa.cast(sa.func.clock_timestamp(), sa.DateTime)

    def since_beat_s(self, column: Any) -> Any:
        return sa.extract("epoch", self.beat_time() - column)

    def value_if(self, condition: Any, value: Any) -> Any:
        one: Any = sa.literal_column("1")
        zero: Any = sa.literal_column("0")
        return sa.cast(value, sa.BigInteger).op("/")(sa.case((condition, one), else_=zero))

    def or_ignore(self, table: sa.Table, values: dict[str, Any], unique: Any) -> Any:
        made = postgresql_sql.insert(table).values(values)
        return made.on_conflict_do_nothing(index_elements=[unique])

    def upsert(
        self, table: sa.Table, names: list[str], source: Any, keys: int, *, fence: str = ""
    ) -> Any:
        made = postgresql_sql.insert(table).from_select(names, source)
        return made.on_conflict_do_update(
            index_elements=names[:keys], set_=self._replaced(made, table, names[keys:], fence)
        )

    def engine_options(self, url: sa.URL, options: dict[str, Any]) -> dict[str, Any]:
        arguments = dict(options.get("connect_args", {}))
        if not ("connect_timeout" in url.query or "PGCONNECT_TIMEOUT" in os.environ):
            arguments.setdefault("connect_timeout", CONNECT_TIMEOUT_S)
        return {**options, "connect_args": arguments}

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


def _trial_id_by_study(columns: Any) -> Any:
    return columns.trial_id + sa.literal_column("0")


_NEAR_AT_LEAST: Final = 1000
"""So few trials are near whatever the study has; to look them over takes some 0.2 ms."""


def _is_near(low: Any) -> Any:
    """Whether fewer trials are above an id than its study has below, as their numbers say."""
    c, newest = t.trials.c, t.trials.alias().c
    greatest = sa.select(sa.func.max(newest.trial_id)).scalar_subquery()
    number = sa.select(c.number).where(c.trial_id == low).correlate(None).scalar_subquery()
    least: Any = sa.literal_column(str(_NEAR_AT_LEAST))
    return greatest - low < sa.func.coalesce(number, sa.literal_column("0")) + least


class Psycopg(PostgreSQL):
    def session(self, raw: Any) -> Session:
        from trialstore.logs.relational.pipeline import PipelineSession

        return PipelineSession(raw, self._server)

    def prepare(self, raw: Any) -> None:
        raw.autocommit = True
        raw.execute(_settings(raw), prepare=False)


class Psycopg2(PostgreSQL):
    session_type = MessageSession
    answers_each = False

    def prepare(self, raw: Any) -> None:
        raw.autocommit = True
        raw.cursor().execute(_settings(raw))


def _settings(raw: Any) -> str:
    """Have no table read as a whole: a plan made while it was small would go on to. Have floats
    come with all their digits.

    Only where the session is ours. A pooler lends it to others as well, and calls itself by
    another number; that of PgBouncer is a random one.
    """
    return (
        "SELECT set_config('enable_seqscan', 'off', false), set_config('jit', 'off', false), "
        "set_config('extra_float_digits', '3', false) "
        f"WHERE pg_backend_pid() = {raw.info.backend_pid}"
    )


# --- MySQL and MariaDB ---------------------------------------------------------------------------

_MYSQL_FAULTS: Final = _code_table(
    (Fault.AGAIN, "1213 1205 1020 1451 1452"),
    (
        Fault.LOST,
        # 1203 1226: as many connections as the user may have; one may end. 1047: a node of a
        # Galera cluster that is not part of it for the moment.
        "0 2006 2013 2014 2003 2002 1053 1927 4031 1040 1047 1152 1158 1159 1160 1161 1184 "
        "1203 1226",
    ),
    (Fault.FENCED, "1048 1365"),
    (Fault.VALUE, "1406 1366 1264 1242 1265 1267 1292 1153 3988"),
    (Fault.NO_TABLE, "1146"),
    (Fault.DENIED, "1142 1044 1370 1227"),
    # A replica, a read-only transaction, a read-only InnoDB.
    (Fault.READ_ONLY, "1290 1792 1836"),
    (Fault.EXISTS, "1050 1062"),
)


_TEXT_COLUMNS: Final = (
    "SELECT table_name, MIN(character_octet_length) FROM information_schema.columns "
    "WHERE table_schema = DATABASE() AND data_type LIKE '%text' GROUP BY table_name"
)


_MULTI_STATEMENTS: Final = 1 << 16
"""Among the flags with which a client connects."""


def _allow_multi_statements(raw: Any) -> None:
    """PyMySQL has no method for it; mysqlclient allows them by itself.

    Source: MySQL's protocol, COM_SET_OPTION.
    """
    raw._execute_command(0x1B, bytes(2))
    raw._read_packet()


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
    size_query = (
        "SELECT sum(data_length + index_length) FROM information_schema.tables "
        "WHERE table_schema = database()"
    )
    begin_write = plain("START TRANSACTION")
    session_type = MultiStatementSession
    # Set later it costs two round trips.
    session_arguments: Mapping[str, Any] = {"autocommit": True}
    text_bytes_sure = 65_535
    whole_seconds = True

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._text_bytes: dict[str, int] = {}
        self._message_bytes = 0  # until the server has been asked

    def text_bytes_max(self, table: sa.Table) -> int:
        # Administrators make columns longer.
        if not self._knows_limits():
            return 2**32 - 1  # the exchange will tell
        return self._text_bytes.get(table.name, self.text_bytes_sure)

    def message_bytes_max(self) -> float:
        return self._message_bytes if self._knows_limits() else math.inf

    def _knows_limits(self) -> bool:
        """Asked on a connection of its own, because the session's is in use by another thread
        perhaps, and only once there is a long value."""
        if not self._message_bytes:
            try:
                with self.engine.connect() as connection:
                    rows = connection.execute(sa.text(_TEXT_COLUMNS))
                    self._text_bytes = {name: int(length) for name, length in rows}
                    packet = connection.scalar(sa.text("SELECT @@max_allowed_packet"))
                    self._message_bytes = int(packet)
            except sa.exc.DBAPIError:
                return False
        return True

    def since_beat_s(self, column: Any) -> Any:
        return sa.func.timestampdiff(sa.text("SECOND"), column, self.beat_time())

    def as_text(self, column: Any) -> Any:
        return sa.cast(column, sa.CHAR)

    def same_text(self, column: Any, value: Any) -> Any:
        # The collation holds "LR" and "lr" equal; the second condition uses no index.
        return sa.and_(column == value, sa.func.binary(column) == sa.func.binary(value))

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

    def upsert(
        self, table: sa.Table, names: list[str], source: Any, keys: int, *, fence: str = ""
    ) -> Any:
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
            elif name == fence:
                update[name] = sa.literal_column(  # which takes no NULL
                    f"IF({table.name}.`{name}` < VALUES(`{name}`), VALUES(`{name}`), NULL)"
                )
            else:
                update[name] = sa.literal_column(f"VALUES(`{name}`)")
        return made.on_duplicate_key_update(update)

    def engine_options(self, url: sa.URL, options: dict[str, Any]) -> dict[str, Any]:
        options = {"pool_pre_ping": True, **options}
        arguments = dict(options.get("connect_args", {}))
        if url.get_driver_name() == "pymysql":
            arguments["client_flag"] = arguments.get("client_flag", 0) | _MULTI_STATEMENTS
        return {**options, "connect_args": arguments}

    def prepare(self, raw: Any) -> None:
        # What a user's creator opens may have neither; where it has, this asks nothing.
        raw.autocommit(True)
        if not getattr(raw, "client_flag", _MULTI_STATEMENTS) & _MULTI_STATEMENTS:
            _allow_multi_statements(raw)
        # READ COMMITTED: a snapshot kept for the whole transaction is older than the locks.
        # Strict: a value that does not fit fails instead of being cut. No other mode, whatever the
        # server begins with: one takes "" for NULL. Safe updates refuse a DELETE by time.
        raw.cursor().execute(
            "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED;"
            "SET SESSION sql_mode = 'STRICT_ALL_TABLES', sql_safe_updates = 0,"
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
