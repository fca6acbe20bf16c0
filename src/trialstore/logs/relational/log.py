"""The tables log: connections, retries, and the catalogue; an exchange is in ``exchange.py``.

Source: docs/formats/tables.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import logging
import math
import os
from pathlib import Path
import random
from typing import Any, Final, TypeVar
import uuid

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.pool import StaticPool

from trialstore.clock import CLOCK, Clock
from trialstore.credentials import Secret
from trialstore.errors import LogUnavailableError
from trialstore.findings import Finding
from trialstore.log import START, Batch, Cursor, Decide, Overview, Summary, Wanted
from trialstore.logs.relational import statements as s, tables as t
from trialstore.logs.relational.conditional import ConditionalExchange
from trialstore.logs.relational.cursor import read_cursor
from trialstore.logs.relational.dialects import (
    Dialect,
    Fault,
    Rows,
    Session,
    Step,
    dialect_type,
    is_local,
    passwords,
    record_time,
    shown_url,
)
from trialstore.logs.relational.exchange import Exchange
from trialstore.logs.relational.findings import findings_in_tables
from trialstore.logs.relational.images import Decoder
from trialstore.logs.relational.limits import check_values
from trialstore.logs.relational.loading import load_trials
from trialstore.logs.relational.pieces import set_directions, set_values
from trialstore.logs.relational.schema import Schema, database_bytes
from trialstore.records import CreateTrial, Operation, PutTrial, Verdict

_logger = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

RETRY_DEADLINE_S: Final = 60.0
_BACKOFF_FIRST_S: Final = 0.005
_BACKOFF_MAX_S: Final = 1.0
_OPENING_DEADLINE_S: Final = 30.0
"""A wrong address or port shows when the storage is constructed; don't let a user wait long."""

_MARK_IDLE_S: Final = 86_400.0
"""Who has written nothing for a day begins a new session, long before others take its mark for
one that was left behind (``tables.SESSION_DAYS_MAX``)."""

_TABLE_NAMES: Final = "SELECT name FROM sqlite_master WHERE type = 'table'"

_inherited: list[Any] = []
"""Connections opened by a parent process. Closing one, which collecting it would do, ends the
parent's session (libpq says goodbye to the server, SQLite drops the parent's file locks)."""


def fill_template(url: str) -> str:
    """The URL with Optuna's one placeholder filled in; other braces are the user's own."""
    return url.replace("{SCHEMA_VERSION}", str(t.SCHEMA_VERSION))


class TablesLog:
    """Records in the tables of Optuna, on SQLite, PostgreSQL, MySQL or MariaDB.

    Args:
        url: SQLAlchemy URL; the literal ``{SCHEMA_VERSION}`` in it becomes 12.
        engine_kwargs: Passed to ``sqlalchemy.create_engine``.
        skip_compatibility_check: Accept tables of another schema version.
        skip_table_creation: Expect the tables to be there already.
        durability: "full" survives power loss, "process" only the death of the process.
        password: Where the password is kept, if it is not in the URL.
        retry_deadline_s: How long an exchange tries again before it gives up.
        clock: Replaced in tests.

    Raises:
        ImportError: The driver that the URL names is not installed.
        IncompatibleSchemaError: The tables are of another schema version.
    """

    def __init__(
        self,
        url: str,
        engine_kwargs: dict[str, Any] | None = None,
        *,
        skip_compatibility_check: bool = False,
        skip_table_creation: bool = False,
        durability: str = "full",
        password: Secret | None = None,
        retry_deadline_s: float = RETRY_DEADLINE_S,
        clock: Clock = CLOCK,
    ) -> None:
        if durability not in ("full", "process"):
            raise ValueError(f"durability must be 'full' or 'process', not {durability!r}.")
        self.url = fill_template(url)
        self.engine_kwargs = dict(engine_kwargs or {})
        self.skip_compatibility_check = skip_compatibility_check
        self.skip_table_creation = skip_table_creation
        self.durability = durability
        self.password = password
        self.retry_deadline_s = retry_deadline_s
        self.durable_commits = 0
        """How many transactions were committed with a sync; for tests and ``info``."""
        self.leased: set[str] = set()
        """Owners whose trials are covered by a lease."""
        self._clock = clock
        self._open()

    def _open(self) -> None:
        url = self._address()
        kind = dialect_type(url)
        self.engine: Engine = _create_engine(url, kind, self.engine_kwargs)
        self._dialect: Dialect = kind(self.engine)
        self._decoder = Decoder()
        self._session: Session | None = None
        self._fairy: Any = None
        self._pid = os.getpid()
        self._session_id = uuid.uuid4().hex
        self._seq = 0
        self._has_mark = False
        self._marked_at_s = self._clock.now_s()
        self._synchronous = ""
        self.schema = Schema(self.engine, self._dialect.name)
        self._prepared = False
        self._persistently(self._connected, min(self.retry_deadline_s, _OPENING_DEADLINE_S))

    def _address(self) -> sa.URL:
        """The URL, with the password as it is now if that is kept elsewhere."""
        url = sa.make_url(self.url)
        return url if self.password is None else url.set(password=self.password.read())

    def __repr__(self) -> str:
        return f"TablesLog({shown_url(self.engine.url)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "engine_kwargs": self.engine_kwargs,
            "skip_compatibility_check": self.skip_compatibility_check,
            "skip_table_creation": self.skip_table_creation,
            "durability": self.durability,
            "password": self.password,
            "retry_deadline_s": self.retry_deadline_s,
            "contents": self._contents(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        contents = state.pop("contents")
        self.__init__(state.pop("url"), state.pop("engine_kwargs"), **state)  # type: ignore[misc]
        if contents is not None:
            raw = self._connected().raw
            for table in reversed(raw.execute(_TABLE_NAMES).fetchall()):
                raw.execute(f'DROP TABLE "{table[0]}"')
            raw.executescript(contents)

    def _contents(self) -> str | None:
        """A database in memory as a script, because it has no address; None for all others."""
        if not _in_memory(self.engine.url):
            return None
        return "\n".join(self._connected().raw.iterdump())

    # --- the log ---

    def check(self, records: Sequence[Operation]) -> None:
        """See ``Limited``."""
        check_values(self._dialect, records)

    def exchange(self, records: Sequence[Operation], cursor: Cursor, wanted: Wanted) -> Batch:
        """Write ``records`` and read what ``wanted`` needs after ``cursor``; see ``Log``.

        Raises:
            ValueError: A column can't hold a value; nothing was written.
            LogUnavailableError: Not reached within ``retry_deadline_s``; nothing was written.
            OutcomeUnknownError: The answer to COMMIT was lost, and the mark can't be read.
        """
        studies = read_cursor(cursor)
        if records:
            if self._has_mark and self._clock.now_s() - self._marked_at_s > _MARK_IDLE_S:
                self._renew_session()
            self._marked_at_s = self._clock.now_s()
            check_values(self._dialect, records)
        return Exchange(self, list(records), studies, wanted).run()

    def exchange_if(self, decide: Decide, cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``ConditionalLog``, and ``exchange`` for what it raises.

        ``decide`` runs while the studies and trials that ``wanted`` names are locked.
        """
        return ConditionalExchange(self, decide, read_cursor(cursor), wanted).run()

    def close(self) -> None:
        """Give back the connection; a later exchange opens one again."""
        if self._pid != os.getpid():
            self._leave_inherited()
            return
        if self._session is not None and self._has_mark:
            with contextlib.suppress(Exception):
                step = self._dialect.step(s.forget_session, session=self._session_id)
                self._session.run([step])
        self._has_mark = False
        self._seq = 0
        if _in_memory(self.engine.url):
            return  # the connection is the database
        self._disconnect()
        self.engine.dispose()

    # --- the catalogue: answers by SQL, without loading trials ---

    def _ask(self, *steps: Step) -> list[Rows]:
        return self._persistently(lambda: self._connected().run(steps))

    def counts(self, study_id: int) -> dict[int, int] | None:
        """See ``Catalogue``."""
        *states, (_, exists) = self._ask(self._dialect.step(s.counts, study_id=study_id))[0]
        if not exists:
            return None
        return {t.STATES.index(state): n for state, n in states if state in t.STATES}

    def best_trial_id(self, study_id: int, maximize: bool) -> int | None:
        """See ``Catalogue``."""
        rows = self._ask(self._dialect.step(s.best_trial, maximize, study_id=study_id))[0]
        return rows[0][0] if rows else None

    def summaries(self) -> dict[int, Summary]:
        """See ``Catalogue``."""
        d = self._dialect
        states, bests = self._ask(d.step(s.summaries), d.step(s.best_trials))
        best_of = dict(bests)
        counts: dict[int, dict[int, int]] = {}
        starts: dict[int, str | None] = {}
        for study_id, state, n, start in states:
            known = counts.setdefault(study_id, {})
            if state in t.STATES:
                known[t.STATES.index(state)] = n
            both = (starts.get(study_id), record_time(start))
            starts[study_id] = min((time for time in both if time is not None), default=None)
        return {
            study_id: Summary(known, starts[study_id], best_of.get(study_id))
            for study_id, known in counts.items()
        }

    # --- pieces of operations, for callers of older methods ---

    def set_directions(self, study_id: int, directions: Sequence[int]) -> Verdict:
        """See ``Piecewise``."""
        return self._set_piece(lambda session: set_directions(session, study_id, directions))

    def set_values(self, trial_id: int, values: Sequence[float]) -> Verdict:
        """See ``Piecewise``."""
        return self._set_piece(lambda session: set_values(session, trial_id, values))

    def _set_piece(self, write: Callable[[Session], Verdict]) -> Verdict:
        def attempt() -> Verdict:
            session = self._connected()
            self._be_durable(session, True)
            return write(session)

        return self._persistently(attempt)

    # --- reading past everything that a storage expects ---

    def page(self, study_id: int, above: int, count_max: int) -> list[PutTrial]:
        """See ``Paged``."""
        args = {"study_id": study_id, "above": above, "count": count_max}
        rows = self._ask(self._dialect.step(s.ids_above, **args))[0]
        if not rows:
            return []
        wanted = Wanted(trials=frozenset(row[0] for row in rows))
        news = self.exchange((), START, wanted).news
        return [image for image in news if isinstance(image, PutTrial)]

    def overview(self, study_id: int, maximize: bool) -> Overview:
        """See ``Paged``."""
        best_id = self.best_trial_id(study_id, maximize)
        first, last = self._ask(self._dialect.step(s.times, study_id=study_id))[0][0]
        best = None
        if best_id is not None:
            news = self.exchange((), START, Wanted(trials=frozenset((best_id,)))).news
            best = next((x for x in news if isinstance(x, PutTrial)), None)
        return Overview(self.counts(study_id) or {}, best, record_time(first), record_time(last))

    def facts(self) -> dict[str, Any]:
        """See ``Described``."""
        url = self.engine.url
        version = self.get_current_version() if self.schema.is_there() else None
        found: dict[str, Any] = {
            "kind": f"tables in {self._dialect.name}",
            "address": shown_url(url),
            "schema_version": version,
            "schema_version_expected": self.get_head_version(),
            "size_bytes": database_bytes(self.engine),
        }
        if version is not None:
            n, newest = self._ask(self._dialect.step(s.beats))[0][0]
            found["heartbeats"] = {"n_trials": n, "newest_at": record_time(newest)}
        return found

    def load_trials(self, records: Sequence[CreateTrial], number: int, above: int) -> int:
        """See ``Bulk``."""
        check_values(self._dialect, records)
        return self._persistently(
            lambda: load_trials(self.engine, self._dialect, records, number, above)
        )

    def findings(self, *, deep: bool) -> Iterator[Finding]:
        """See ``Inspectable``."""
        yield from findings_in_tables(self.engine, deep=deep)

    # --- cursors, for who reads on behalf of others ---

    def is_unread(self, cursor: Cursor, study_id: int) -> bool:
        """See ``Followable``."""
        study = read_cursor(cursor).get(study_id)
        return study is None or study.last_id == study.all_id == 0

    def joined(self, cursor: Cursor, other: Cursor, study_id: int) -> Cursor | None:
        """See ``Followable``."""
        studies = read_cursor(cursor)
        own, theirs = studies.get(study_id), read_cursor(other).get(study_id)
        if theirs is None:
            return None  # deleted, which whoever has it is yet to be told
        if own is not None and (own.name, own.directions) != (theirs.name, theirs.directions):
            return None  # another study, of the same id
        return {**studies, study_id: theirs}

    # --- leases: Optuna's heartbeats, a row per trial ---

    def take_lease(self, owner: str) -> None:
        """See ``LeaseStore``; the first beat of a trial is written with it."""
        self.leased.add(owner)

    def renew_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``."""
        self._beat([s.beat, s.missing_beat], trial_ids)

    def withdraw_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``."""
        self.leased.discard(owner)
        self._beat([s.forget_beats], trial_ids)

    def expired(
        self, study_id: int, running: Mapping[int, str], grace_period_s: float
    ) -> Sequence[int]:
        """See ``LeaseStore``. Looks for itself; beats of Optuna's workers count as well."""
        # Of two times that were rounded down to whole seconds the difference may be almost one
        # too large, which a whole grace period that has to be exceeded makes up for.
        grace_s = math.ceil(grace_period_s) if self._dialect.whole_seconds else grace_period_s
        step = self._dialect.step(s.expired, study_id=study_id, grace_s=grace_s)
        return [row[0] for row in self._ask(step)[0]]

    def _beat(self, statements: Sequence[Any], trial_ids: Sequence[int]) -> None:
        """Statements on the beats of trials, in one message."""
        d = self._dialect
        steps = []
        for ids in _chunks(sorted(trial_ids)):
            args: dict[str, Any] = {}
            n = s.pad("id", ids, args)
            steps += [d.step(statement, n, **args) for statement in statements]
        if not steps:
            return

        def run() -> None:
            session = self._connected()
            self._be_durable(session, False)
            session.run([d.begin_write, *steps, d.commit])

        self._persistently(run)

    # --- schema versions ---

    def get_current_version(self) -> str:
        """The version of the tables as they are."""
        return self.schema.get_current_version()

    def get_head_version(self) -> str:
        """The version that this trialstore works on."""
        return self.schema.get_head_version()

    def get_all_versions(self) -> list[str]:
        """All versions that there ever were, newest first."""
        return self.schema.get_all_versions()

    def upgrade(self) -> None:
        """Bring the tables to the latest version; see ``Schema.upgrade``."""
        self._persistently(self.schema.upgrade)
        # What this connection has prepared is of the old tables.
        self._disconnect()

    # --- connections ---

    def _leave_inherited(self) -> None:
        memory = self._dialect.name == "sqlite" and _in_memory(self.engine.url)
        self._pid = os.getpid()
        if memory:
            return  # The child's copy of the contents; there is no file to share.
        _inherited.append((self._session, self._fairy, self.engine))
        self.engine.dispose(close=False)
        url = self._address()
        self.engine = _create_engine(url, dialect_type(url), self.engine_kwargs)
        self.schema = Schema(self.engine, self._dialect.name)
        self._session = self._fairy = None
        self._session_id = uuid.uuid4().hex
        self._seq = 0
        self._has_mark = False

    def _disconnect(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._end(session)

    def _end(self, session: Session) -> None:
        """Close a connection, which may be broken."""
        with contextlib.suppress(Exception):
            if self._fairy is None:
                session.close()
            else:
                self._fairy.close()  # The one connection of the pool holds the contents.

    def _open_connection(self) -> Any:
        """A connection of the driver's own, not from the engine's pool, which would ask the
        server half a dozen questions whose answers nobody needs here."""
        engine = self.engine
        if _in_memory(engine.url):
            self._fairy = engine.raw_connection()
            return self._fairy.driver_connection
        options = self._dialect.engine_options(engine.url, self.engine_kwargs)
        if "creator" in options:
            return options["creator"]()
        positional, named = engine.dialect.create_connect_args(engine.url)
        named.update(options.get("connect_args", {}), **self._dialect.session_arguments)
        return engine.dialect.connect(*positional, **named)

    def _connected(self) -> Session:
        """The session of this process; connects, and on first use creates and checks tables."""
        if self._pid != os.getpid():
            self._leave_inherited()
        if self._session is None:
            self._connect()
        assert self._session is not None
        return self._session

    def _connect(self) -> None:
        fresh = self._dialect.name == "sqlite" and _wants_wal(self.engine.url)
        raw = self._open_connection()
        session = self._dialect.session_type(raw, self._dialect)
        try:
            self._dialect.prepare(raw)
            if self._dialect.name == "sqlite":
                self._synchronous = ""
                if fresh:
                    raw.execute("PRAGMA journal_mode=WAL").fetchall()
            if not self._prepared and self._dialect.keeps_marks:
                self._prepared = self._has_mark = self.schema.open_at_once(
                    session, self._dialect, self._session_id
                )
            if not self._prepared:
                self.schema.prepare(
                    session,
                    create=not self.skip_table_creation,
                    check=not self.skip_compatibility_check,
                )
                self._prepared = True
            if self._dialect.keeps_marks and not self._has_mark:
                self._has_mark = self.schema.open_mark(
                    session, self._dialect, self._session_id, not self.skip_table_creation
                )
                self._seq = 0 if self._has_mark else self._seq
        except BaseException:
            self._end(session)
            raise
        self._session = session

    def _renew_session(self) -> None:
        """Be another session from now on, whose mark no earlier exchange can touch."""
        self._disconnect()
        self._session_id = uuid.uuid4().hex
        self._seq = 0
        self._has_mark = False

    def _persistently(
        self, attempt: Callable[[], _Answer], deadline_s: float | None = None
    ) -> _Answer:
        """Try again while the database rolls back or is away, until the deadline.

        Raises:
            LogUnavailableError: With the driver's error as its cause.
        """
        deadline_s = self.retry_deadline_s if deadline_s is None else deadline_s
        give_up_at = self._clock.now_s() + deadline_s
        backoff_s = _BACKOFF_FIRST_S
        while True:
            try:
                return attempt()
            except Exception as error:
                driver_error = driver_error_of(error)
                fault = self._fault(driver_error)
                if fault in (Fault.LOST, Fault.FENCED):
                    self._disconnect()
                elif fault in (Fault.AGAIN, Fault.EXISTS):
                    self._rollback()
                else:
                    self._rollback()
                    if self._is_drivers(driver_error):
                        raise self.unavailable(driver_error) from driver_error
                    raise
                if self._clock.now_s() + backoff_s > give_up_at:
                    raise self.unavailable(driver_error) from driver_error
            # Jitter, or those who collided meet again.
            self._clock.sleep(backoff_s * (0.5 + random.random()))
            backoff_s = min(backoff_s * 2, _BACKOFF_MAX_S)

    @staticmethod
    def _is_drivers(error: BaseException) -> bool:
        module = type(error).__module__.split(".")[0]
        return module in ("sqlite3", "psycopg", "psycopg2", "pymysql", "MySQLdb")

    def _fault(self, error: BaseException) -> Fault:
        if self._is_drivers(error) or isinstance(error, OSError):
            return self._dialect.fault(error)
        return Fault.OTHER

    def _rollback(self) -> None:
        if self._session is not None:
            try:
                self._session.rollback()
            except Exception as error:
                # SQLite says so if there is no transaction, which is what we want.
                if "no transaction" not in str(error):
                    self._disconnect()

    def unavailable(self, error: BaseException) -> LogUnavailableError:
        """The error for a database that was not reached, naming the cause but no password."""
        return LogUnavailableError(
            f"{self!r} could not be used, nothing was stored; the call may be made "
            f"again. Cause: {type(error).__name__}: {self._clean(error)}"
        )

    def _clean(self, error: BaseException) -> str:
        text = " ".join(str(error).split())
        for password in passwords(self.engine.url, self.engine_kwargs.get("connect_args", {})):
            text = text.replace(password, "***")
        return text

    def _be_durable(self, session: Session, durable: bool) -> None:
        """SQLite syncs by connection, and can't be told within a transaction."""
        if self._dialect.name != "sqlite":
            return
        level = "FULL" if durable and self.durability == "full" else "NORMAL"
        if self._synchronous != level:
            session.raw.execute(f"PRAGMA synchronous={level}")
            self._synchronous = level


def _chunks(ids: Sequence[int]) -> list[Sequence[int]]:
    return [ids[i : i + s.IDS_MAX] for i in range(0, len(ids), s.IDS_MAX)]


# --- connections ---------------------------------------------------------------------------------


def driver_error_of(error: BaseException) -> BaseException:
    """What the driver said, below what SQLAlchemy made of it."""
    original = getattr(error, "orig", None)
    return original if isinstance(original, BaseException) else error


def _in_memory(url: sa.URL) -> bool:
    if url.get_backend_name() != "sqlite":
        return False
    name = url.database or ":memory:"
    return (
        name == ":memory:"
        or "mode=memory" in f"{name}{url.query.get('mode', '')}"
        or (url.query.get("mode") == "memory")
    )


def sqlite_path(url: str) -> str | None:
    """The file that a URL names; None for a server, and for a database in memory.

    Raises:
        ValueError: It is no URL.
    """
    try:
        made = sa.make_url(fill_template(url))
    except sa.exc.ArgumentError as error:
        raise ValueError(str(error)) from None
    if made.get_backend_name() != "sqlite" or _in_memory(made):
        return None
    return (made.database or "").removeprefix("file:")


def _wants_wal(url: sa.URL) -> bool:
    """Whether this is a local file that does not hold a database yet."""
    if _in_memory(url) or (url.database or "").startswith("file:"):
        return False
    path = Path(url.database or "").absolute()
    try:
        empty = path.stat().st_size == 0
    except OSError:
        empty = True
    return empty and is_local(path)


def _create_engine(url: sa.URL, kind: type[Dialect], engine_kwargs: dict[str, Any]) -> Engine:
    try:
        dialect = object.__new__(kind)
        options = dialect.engine_options(url, engine_kwargs)
        if _in_memory(url) and not {"poolclass", "creator", "pool"} & set(options):
            # One connection for all threads; each would see a database of its own otherwise.
            for sizing in ("pool_size", "max_overflow", "pool_timeout", "pool_recycle"):
                options.pop(sizing, None)
            options["poolclass"] = StaticPool
        return sa.create_engine(url, **options)
    except ImportError as error:
        raise ImportError(
            "Failed to import DB access module for the specified storage URL. "
            f"Please install appropriate one: {error.name or error}."
        ) from error


__all__ = ["TablesLog"]
