"""The one connection of a log to its database: opened, healed, and asked until it answers.

Optuna's tables are created and checked when it is first opened. Source: docs/formats/tables.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import os
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import parse_qs
import uuid

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.pool import StaticPool
from sqlalchemy.util import asbool

from trialstore.clock import Clock
from trialstore.credentials import Secret
from trialstore.errors import (
    LogCorruptError,
    LogReplacedError,
    LogUnavailableError,
    SecretNotFoundError,
)
from trialstore.logs.relational import statements as s, tables as t
from trialstore.logs.relational.dialects import (
    Dialect,
    Fault,
    dialect_type,
    is_local,
    passwords,
    shown_url,
)
from trialstore.logs.relational.images import Decoder
from trialstore.logs.relational.schema import Schema
from trialstore.logs.relational.session import Session
from trialstore.logs.relational.undisturbed import Standing
from trialstore.patience import Patience
from trialstore.processes import before_any_fork, let_go_before_a_fork, unless_forking

_Answer = TypeVar("_Answer")

_PAUSE_FIRST_S: Final = 0.005
_PAUSE_MAX_S: Final = 1.0
_OPENING_DEADLINE_S: Final = 30.0
"""A wrong address or port shows when the storage is constructed; don't let a user wait long."""

_MARK_IDLE_S: Final = 86_400.0
"""Who has written nothing for a day begins a new session, long before others take its mark for
one that was left behind (``tables.SESSION_DAYS_MAX``)."""

_ANY_TABLE: Final = "SELECT 1 FROM sqlite_master LIMIT 1"

_inherited: list[Any] = []
"""Connections opened by a parent process. Closing one, which collecting it would do, ends the
parent's session (libpq says goodbye to the server, SQLite drops the parent's file locks)."""

_left: list[Callable[[], None]] = []
"""What closes connections that nobody has any more."""

_dropped: dict[str, list[str]] = {}
"""By URL the sessions of storages that nobody closed, and nobody has any more. The next one that
this process opens removes their rows, with the message that puts in its own."""


class Connection:
    """A connection that opens and heals by itself, in the process that uses it.

    Its arguments are those of ``TablesLog``, the ``folder`` that the path of a SQLite file begins
    in, the ``contents`` that a database in memory begins with, as a script, and for how long it is
    tried to open it.

    Attributes:
        session_id: Names its row in ``trialstore_sessions``, the mark.
        seq: The greatest number that an exchange has taken for the mark.
        has_mark: Whether there is such a row.
        had_mark: Whether there has ever been, so that the database is one to write to.
        others_wrote: Asks whether another connection has committed, where the database can tell.
        standing: What is known as long as none has.
        durable_commits: How many transactions were committed with a sync; for tests.
    """

    def __init__(
        self,
        url: str,
        engine_kwargs: dict[str, Any],
        *,
        skip_compatibility_check: bool,
        skip_table_creation: bool,
        durability: str,
        password: Secret | None,
        retry_deadline_s: float,
        clock: Clock,
        folder: str = "",
        contents: str | None = None,
        opening_deadline_s: float = _OPENING_DEADLINE_S,
    ) -> None:
        self.url = url
        self.engine_kwargs = engine_kwargs
        self.skip_compatibility_check = skip_compatibility_check
        self.skip_table_creation = skip_table_creation
        self.durability = durability
        self.password = password
        self.retry_deadline_s = retry_deadline_s
        self.folder = folder
        self._clock = clock
        self._contents = contents
        address = self._address()
        kind = dialect_type(address)
        self.engine: Engine = _create_engine(address, kind, engine_kwargs)
        self.dialect: Dialect = kind(self.engine)
        self.schema = Schema(self.engine, self.dialect)
        self._session: Session | None = None
        self._fairy: Any = None
        self._file: tuple[int, int] | None = None  # device and inode of what was opened first
        self._pid = os.getpid()
        self.session_id = uuid.uuid4().hex
        self.seq = 0
        self.has_mark = self.had_mark = False
        self._must_warn_of_no_mark = False
        self._marked_at_s = clock.now_s()
        self._synchronous = ""
        # It does not tell of those who use this very connection.
        self.others_wrote = None if self.is_shared else self.dialect.others_wrote
        self.standing: Standing | None = None
        self.decoder = Decoder()
        self.durable_commits = 0
        self._prepared = False
        self._is_asked = False
        with self._opening():
            self.persistently(self.session, min(retry_deadline_s, opening_deadline_s))

    def __repr__(self) -> str:
        return f"TablesLog({shown_url(sa.make_url(self.url))!r})"

    @property
    def in_memory(self) -> bool:
        """Whether the connection is the database."""
        return in_memory(self.engine.url, self.engine_kwargs)

    @property
    def is_shared(self) -> bool:
        """Whether others may use this very connection: everybody does so in memory, and a file's
        that the user makes may be for others as well."""
        if self.dialect.name != "sqlite":
            return False
        return self.in_memory or bool(_makers(self.engine_kwargs))

    def _address(self) -> sa.URL:
        """The URL, with the password as it is now if that is kept elsewhere, and the same file
        whatever folder the process has moved to."""
        url = in_folder(parsed(self.url), self.folder)
        return url if self.password is None else url.set(password=self.password.read())

    def close(self) -> None:
        """Give it back; ``session`` opens it again."""
        if self._pid != os.getpid():
            self._leave_inherited()
            return
        if self.in_memory:
            return
        try:
            if self._session is not None and self.has_mark:
                with contextlib.suppress(Exception):
                    step = self.dialect.step(s.forget_session, session=self.session_id)
                    self._session.run([step])
        finally:
            # Whether the row is gone, or about to go, is not known.
            self.renew_session()
            self.engine.dispose()

    def _opening(self) -> contextlib.AbstractContextManager[None]:
        """What SQLite has locked, it holds for locked in a forked child, for ever."""
        if self.dialect.name == "sqlite":
            let_go_before_a_fork(self)
            return before_any_fork()
        return contextlib.nullcontext()

    def let_go(self) -> None:
        """Close a file before a fork.

        SQLite keeps in memory that the process has it open, and does not lock it again for a
        child's own connection. Then the parent, if it closes its last one, holds itself for the
        last there is and deletes the write-ahead log, to which the child goes on to write.

        Source: SQLite, "How To Corrupt An SQLite Database File", 2.6; ``os_unix.c``, ``unixLock``.
        """
        if not self._is_asked and not self.is_shared and self._pid == os.getpid():
            self.disconnect()
            self.engine.dispose()
        _close_left()

    def __del__(self) -> None:
        """Users need not close a storage, and a connection of sqlite3, which refers to itself,
        stays open until a collection."""
        session = getattr(self, "_session", None)
        if session is None:
            return
        is_own = self._pid == os.getpid()
        if self.dialect.name != "sqlite":
            if is_own and self.has_mark:  # and nothing is under way, or it would be disconnected
                _dropped.setdefault(self.url, []).append(self.session_id)
        elif is_own:
            _left.append(functools.partial(self._end, session))
            unless_forking(_close_left)
        else:
            _inherited.append((session, self._fairy, self.engine))

    def about_to_write(self) -> None:
        """Be another session if this one's mark has become old, or could not be put back while the
        database was read-only; say so, once, if there has never been one."""
        if self.had_mark and not self.has_mark:
            self.disconnect()
        if self.has_mark and self._clock.now_s() - self._marked_at_s > _MARK_IDLE_S:
            self.renew_session()
        if self._must_warn_of_no_mark and not self.had_mark:
            self._must_warn_of_no_mark = False
            self.schema.warn_of_no_mark()
        self._marked_at_s = self._clock.now_s()

    def _leave_inherited(self) -> None:
        self._pid = os.getpid()
        if self.in_memory:
            return  # The child's copy of the contents; there is no file to share.
        _inherited.append((self._session, self._fairy, self.engine))
        self.engine.dispose(close=False)
        self._make_engine(self.engine.url)
        self._session = self._fairy = None
        self.session_id = uuid.uuid4().hex
        self.has_mark = False

    def _make_engine(self, address: sa.URL) -> None:
        """Another one in place of that of before."""
        self.engine = _create_engine(address, type(self.dialect), self.engine_kwargs)
        self.dialect.engine = self.engine
        self.schema = Schema(self.engine, self.dialect)

    def _renew_password(self) -> None:
        """Connect with what is kept elsewhere now: it may have been changed since."""
        if self.password is None:
            return
        with contextlib.suppress(SecretNotFoundError):  # the one of before may still do
            address = self._address()
            if address != self.engine.url:
                self.engine.dispose()
                self._make_engine(address)

    def disconnect(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._end(session)

    def _end(self, session: Session) -> None:
        """Close a connection, which may be broken."""
        with contextlib.suppress(Exception):
            if self._fairy is not None:
                self._fairy.close()  # The one connection of the pool holds the contents.
            elif self.is_shared:
                session.rollback()  # The last who knows the connection closes it.
            else:
                session.close()

    def _open_connection(self) -> Any:
        """A connection of the driver's own, not from the engine's pool, which would ask the
        server half a dozen questions whose answers nobody needs here."""
        engine = self.engine
        if self.in_memory or (self.dialect.name == "sqlite" and "pool" in self.engine_kwargs):
            self._fairy = engine.raw_connection()
            return self._fairy.driver_connection
        options = self.dialect.engine_options(engine.url, self.engine_kwargs)
        if "creator" in options:
            return options["creator"]()
        positional, named = engine.dialect.create_connect_args(engine.url)
        named.update(options.get("connect_args", {}), **self.dialect.session_arguments)
        return engine.dialect.connect(*positional, **named)

    def session(self, *, puts_mark: bool = True) -> Session:
        """The session of this process; connects, and on first use creates and checks tables.

        Args:
            puts_mark: Whether a mark that is gone is put back where we connect again. Not before
                it was asked: a new one would tell that nothing has happened.

        Raises:
            LogReplacedError: Another file, a restored backup perhaps, is at the path of SQLite's,
                or none. What goes to the one that is open would be lost with it.
        """
        if self._pid != os.getpid():
            self._leave_inherited()
        if self._file is not None and self._file_there() != self._file:
            raise LogReplacedError(
                "the file is not the one that was read up to here; open a new storage on it.",
                source=str(self.engine.url.database),
            )
        if self._session is None:
            self._connect(puts_mark)
            self._file = self._file or self._file_there()
        assert self._session is not None
        return self._session

    def _file_there(self) -> tuple[int, int] | None:
        """Which file is at the path now; None if there is none, or this is about no file."""
        path = self.engine.url.database
        if self.dialect.name != "sqlite" or self.is_shared or not path or is_uri(self.engine.url):
            return None
        try:
            status = os.stat(path)  # noqa: PTH116
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _connect(self, puts_mark: bool) -> None:
        fresh = self.dialect.name == "sqlite" and _wants_wal(self.engine.url, self.engine_kwargs)
        self.standing = None
        self._renew_password()
        raw = self._open_connection()
        session = self.dialect.session(raw)
        lacks_mark = self.dialect.keeps_marks and (puts_mark or not self.has_mark)
        try:
            self.dialect.prepare(raw)
            if self.dialect.name == "sqlite":
                self._synchronous = ""
                if fresh:
                    raw.execute("PRAGMA journal_mode=WAL").fetchall()
                if self._contents is not None:
                    self._fill(raw, self._contents)
            if not self._prepared and self.dialect.keeps_marks:
                self._prepared = self.has_mark = self.schema.open_at_once(
                    session, self.session_id, _dropped.pop(self.url, ())
                )
                lacks_mark = not self.has_mark
            if not self._prepared:
                self.schema.prepare(
                    session,
                    create=not self.skip_table_creation,
                    check=not self.skip_compatibility_check,
                )
                self._prepared = True
            if lacks_mark:
                self.has_mark = self.schema.open_mark(
                    session, self.session_id, not self.skip_table_creation
                )
                self._must_warn_of_no_mark = not self.has_mark
        except BaseException:
            self._end(session)
            raise
        self.had_mark = self.had_mark or self.has_mark
        self._session = session

    def _fill(self, raw: Any, contents: str) -> None:
        """Give a database in memory its contents, unless it has some: those who open one that has
        a name share it, and it may still be there, and be ahead."""
        if not raw.execute(_ANY_TABLE).fetchall():
            raw.executescript(contents)
        self._contents = None

    def renew_session(self) -> None:
        """Be another session from now on, whose mark no earlier exchange can touch."""
        self.disconnect()
        self.has_mark = False
        self.session_id = uuid.uuid4().hex

    def next_seq(self) -> int:
        """A number that no other exchange of this process takes for the session's mark."""
        self.seq += 1
        return self.seq

    def persistently(
        self, attempt: Callable[[], _Answer], deadline_s: float | None = None
    ) -> _Answer:
        """Try again while the database rolls back or is away, until the deadline.

        Raises:
            LogUnavailableError: With the driver's error as its cause.
            LogCorruptError: The file is no database, or damaged.
        """
        deadline_s = self.retry_deadline_s if deadline_s is None else deadline_s
        self._is_asked = True
        try:
            return self._until_it_answers(attempt, deadline_s)
        except Exception:
            raise
        except BaseException:
            # An interrupt, of a rollback too: a transaction, its locks or a message must not
            # outlive it.
            self.disconnect()
            raise
        finally:
            self._is_asked = False

    def _until_it_answers(self, attempt: Callable[[], _Answer], deadline_s: float) -> _Answer:
        give_up_at = self._clock.now_s() + deadline_s
        patience = Patience(self, self._clock, first_s=_PAUSE_FIRST_S, longest_s=_PAUSE_MAX_S)
        while True:
            try:
                return attempt()
            except Exception as error:
                driver_error = driver_error_of(error)
                fault = self.fault(driver_error)
                # Who has written here meets a moment between two masters.
                is_moved = fault is Fault.READ_ONLY and self.had_mark
                if is_moved or fault in (Fault.LOST, Fault.FENCED):
                    self.disconnect()
                elif fault in (Fault.AGAIN, Fault.EXISTS):
                    self.rollback()
                else:
                    self.rollback()
                    with self.translating():
                        raise
                why = f"{type(driver_error).__name__}: {self.clean(driver_error)}"
                if not patience.pause(give_up_at, why):
                    raise self.unavailable(driver_error) from driver_error

    @contextlib.contextmanager
    def translating(self) -> Iterator[None]:
        """Raise what a driver says, or SQLAlchemy of it, as our own."""
        try:
            yield
        except Exception as error:
            driver_error = driver_error_of(error)
            if self.fault(driver_error) is Fault.CORRUPT:
                raise self._corrupt(driver_error) from driver_error
            # PyMySQL says as an OSError that a certificate is not there.
            if self._is_drivers(driver_error) or isinstance(driver_error, OSError):
                raise self.unavailable(driver_error) from driver_error
            raise

    @staticmethod
    def _is_drivers(error: BaseException) -> bool:
        module = type(error).__module__.split(".")[0]
        return module in ("sqlite3", "psycopg", "psycopg2", "pymysql", "MySQLdb")

    def fault(self, error: BaseException) -> Fault:
        if self._is_drivers(error) or isinstance(error, OSError):
            return self.dialect.fault(error)
        return Fault.OTHER

    def rollback(self) -> None:
        if self._session is not None:
            try:
                self._session.rollback()
            except Exception as error:
                # SQLite says so if there is no transaction, which is what we want.
                if "no transaction" not in str(error):
                    self.disconnect()

    def unavailable(self, error: BaseException) -> LogUnavailableError:
        """The error for a database that was not reached, naming the cause but no password."""
        return LogUnavailableError(
            f"{self!r} could not be used, nothing was stored; the call may be made "
            f"again. Cause: {type(error).__name__}: {self.clean(error)}"
        )

    def _corrupt(self, error: BaseException) -> LogCorruptError:
        return LogCorruptError(
            f"SQLite can't read this file ({self.clean(error)}). Restore a backup, or save what "
            "can be read with `sqlite3 FILE .recover`.",
            source=self.engine.url.database or repr(self),
        )

    def clean(self, error: BaseException) -> str:
        text = " ".join(str(error).split())
        for password in passwords(self.engine.url, self.engine_kwargs.get("connect_args", {})):
            text = text.replace(password, "***")
        return text

    def be_durable(self, session: Session, durable: bool) -> None:
        """SQLite syncs by connection, and can't be told within a transaction."""
        if self.dialect.name != "sqlite":
            return
        level = "FULL" if durable and self.durability == "full" else "NORMAL"
        if self._synchronous != level:
            session.raw.execute(f"PRAGMA synchronous={level}")
            self._synchronous = level


# --- addresses -----------------------------------------------------------------------------------


def fill_template(url: str) -> str:
    """The URL with Optuna's one placeholder filled in; other braces are the user's own."""
    return url.replace("{SCHEMA_VERSION}", str(t.SCHEMA_VERSION))


def working_folder() -> str:
    """The folder of the process; "" if it is not there any more, which few have a need of."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def in_folder(url: sa.URL, folder: str) -> sa.URL:
    """The same with the relative path of a SQLite file made absolute."""
    path = url.database
    if url.get_backend_name() != "sqlite" or not path or in_memory(url, {}):
        return url
    if not is_uri(url):
        return url.set(database=str(Path(folder, path)))
    path = path.removeprefix("file:")
    if not path or path.startswith("/"):
        return url
    return url.set(database=f"{Path(folder).as_uri()}/{path}")


def driver_error_of(error: BaseException) -> BaseException:
    """What the driver said, below what SQLAlchemy made of it."""
    original = getattr(error, "orig", None)
    return original if isinstance(original, BaseException) else error


def in_memory(url: sa.URL, engine_kwargs: Mapping[str, Any]) -> bool:
    """Whether a database ends with the connections to it; nobody knows of one that the user makes.

    A path may have any letters in it: what SQLite is to understand has to be a URI, and said to be
    one (``uri=true``).
    """
    if url.get_backend_name() != "sqlite" or _makers(engine_kwargs):
        return False
    name = url.database or ":memory:"
    if not is_uri(url):
        return name == ":memory:"
    path, _, query = name.partition("?")  # SQLAlchemy adds the URL's
    modes = (url.query.get("mode"), *parse_qs(query).get("mode", ()))
    return path == "file::memory:" or "memory" in modes


def is_uri(url: sa.URL) -> bool:
    """Whether SQLite is given a URI, with a query of its own, rather than a path."""
    return (url.database or "").startswith("file:") and asbool(url.query.get("uri", False))


def _close_left() -> None:
    while _left:
        _left.pop()()


def _makers(engine_kwargs: Mapping[str, Any]) -> set[str]:
    """What makes the user's own connections."""
    return {"creator", "pool"} & engine_kwargs.keys()


def parsed(url: str) -> sa.URL:
    """SQLAlchemy's URL of a text.

    Raises:
        ValueError: It is none. What SQLAlchemy says of it may hold a piece of a password.
    """
    try:
        place = sa.make_url(url)
        # Behind the first @ of a password everything is the host, which errors name.
        if "@" in (place.host or ""):
            raise ValueError
        return place
    except (sa.exc.ArgumentError, ValueError):
        raise ValueError(
            "This is no URL of a database; the forms are dialect+driver://user:password@host:port"
            "/database and sqlite:///file.db. Reserved characters in a password must be "
            "percent-encoded."
        ) from None


def sqlite_path(url: str) -> str | None:
    """The file that a URL names; None for a server, and for a database in memory.

    Raises:
        ValueError: It is no URL.
    """
    made = parsed(fill_template(url))
    if made.get_backend_name() != "sqlite" or in_memory(made, {}):
        return None
    path = made.database or ""
    return path.removeprefix("file:") if is_uri(made) else path


def _wants_wal(url: sa.URL, engine_kwargs: Mapping[str, Any]) -> bool:
    """Whether this is a local file that does not hold a database yet."""
    if in_memory(url, engine_kwargs) or not url.database or is_uri(url):
        return False
    path = Path(url.database)
    try:
        empty = path.stat().st_size == 0
    except OSError:
        empty = True
    return empty and is_local(path)


def _create_engine(url: sa.URL, kind: type[Dialect], engine_kwargs: dict[str, Any]) -> Engine:
    try:
        dialect = object.__new__(kind)
        options = dialect.engine_options(url, engine_kwargs)
        if in_memory(url, engine_kwargs) and "poolclass" not in options:
            # One connection for all threads; each would see a database of its own otherwise.
            for sizing in ("pool_size", "max_overflow", "pool_timeout", "pool_recycle"):
                options.pop(sizing, None)
            options["poolclass"] = StaticPool
        return sa.create_engine(url, **options)
    except ImportError as error:
        raise ImportError(
            "Failed to import DB access module for the specified storage URL. "
            f"Please install appropriate one: {error.name or error}. trialstore's extra postgres "
            "brings psycopg, and mysql brings pymysql, for mysql+pymysql://."
        ) from error
    except sa.exc.ArgumentError as error:
        raise ValueError(str(error)) from None
