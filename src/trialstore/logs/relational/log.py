"""The tables log: what a storage asks of it. An exchange is in ``exchange.py``.

Source: docs/formats/tables.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
import math
from typing import Any, Final

from sqlalchemy.engine import Engine

from trialstore.clock import CLOCK, Clock
from trialstore.credentials import Secret
from trialstore.findings import Finding
from trialstore.log import START, Batch, Cursor, Decide, Mark, Overview, Summary, Wanted
from trialstore.logs.relational import statements as s, tables as t
from trialstore.logs.relational.callers import Callers
from trialstore.logs.relational.conditional import ConditionalExchange
from trialstore.logs.relational.connection import Connection, fill_template, working_folder
from trialstore.logs.relational.cursor import read_cursor
from trialstore.logs.relational.dialects import Dialect, record_time, shown_url
from trialstore.logs.relational.exchange import Exchange
from trialstore.logs.relational.findings import findings_in_tables
from trialstore.logs.relational.limits import check_values, possible, possible_id
from trialstore.logs.relational.loading import load_trials
from trialstore.logs.relational.pieces import set_directions, set_values
from trialstore.logs.relational.schema import database_bytes
from trialstore.logs.relational.session import Rows, Session, Step
from trialstore.records import (
    AnyOperation,
    CreateTrial,
    Operation,
    Outcome,
    PutTrial,
    Record,
    Verdict,
)

RETRY_DEADLINE_S: Final = 60.0


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
        options: dict[str, Any] = {
            "url": fill_template(url),
            "engine_kwargs": dict(engine_kwargs or {}),
            "skip_compatibility_check": skip_compatibility_check,
            "skip_table_creation": skip_table_creation,
            "durability": durability,
            "password": password,
            "retry_deadline_s": retry_deadline_s,
        }
        self._open(options, clock, folder=working_folder())

    def _open(self, options: dict[str, Any], clock: Clock, **more: Any) -> None:
        self._options = options
        self.leased: set[str] = set()
        """Owners whose trials are covered by a lease."""
        self.connection = Connection(**options, clock=clock, **more)
        self._callers = Callers(self.connection, clock)
        self._dialect = self.connection.dialect

    def __repr__(self) -> str:
        return repr(self.connection)

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the database."""
        return self.connection.url

    @property
    def engine(self) -> Engine:
        """SQLAlchemy's engine for the database, as this process uses it."""
        return self.connection.engine

    def __getstate__(self) -> dict[str, Any]:
        # A journal's pickle names its file by the absolute path, too.
        return {
            **self._options,
            "folder": self.connection.folder,
            "contents": self._contents(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        options = dict(state)
        folder, contents = options.pop("folder"), options.pop("contents")
        self._open(options, CLOCK, folder=folder, contents=contents)

    def _contents(self) -> str | None:
        """A database in memory as a script, because it has no address; None for all others."""
        if not self.connection.in_memory:
            return None
        return "\n".join(self.connection.session().raw.iterdump())

    def copier(self) -> Callable[[], TablesLog]:
        """See ``Copyable``: an engine may be made with what no pickle holds, such as a creator."""
        if self.connection.is_shared:
            raise ValueError("It may be in reach of one connection only.")
        return self._copied

    def _copied(self) -> TablesLog:
        """At one attempt: who is connected already has better to do than to wait for more."""
        made = object.__new__(TablesLog)
        made._open(self._options, CLOCK, folder=self.connection.folder, opening_deadline_s=0.0)
        return made

    # --- the log ---

    def check(self, records: Sequence[Operation]) -> None:
        """See ``Limited``."""
        check_values(self._dialect, records)

    def exchange(self, records: Sequence[Operation], cursor: Cursor, wanted: Wanted) -> Batch:
        """Write ``records`` and read what ``wanted`` needs after ``cursor``; see ``Log``.

        Raises:
            ValueError: A column can't hold a value; nothing was written.
            LogUnavailableError: Not reached within ``retry_deadline_s``; nothing was written.
            OutcomeUnknownError: The answer to COMMIT was lost, and the mark can't be read. Or what
                was written is committed, as the message says, and what is wanted can't be read.
        """
        studies = read_cursor(cursor)
        if records:
            self.connection.about_to_write()
            check_values(self._dialect, records)
        wanted = possible(self._dialect, wanted)
        return Exchange(
            self.connection, self.leased, self._callers, list(records), studies, wanted
        ).run()

    def exchange_if(self, decide: Decide, cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``ConditionalLog``, and ``exchange`` for what it raises.

        ``decide`` runs while the studies and trials that ``wanted`` names are locked.
        """
        return ConditionalExchange(
            self.connection, self.leased, self._callers, decide, read_cursor(cursor), wanted
        ).run()

    def close(self) -> None:
        """Give back the connection; a later exchange opens one again."""
        self.connection.close()

    # --- marks of those for whom records are sent ---

    def marking(self, marks: Sequence[Mark]) -> AbstractContextManager[None]:
        """See ``Marking``."""
        return self._callers.marking(marks)

    def recall(
        self, caller: str, number: int, records: Sequence[AnyOperation]
    ) -> dict[int, Outcome] | None:
        """See ``Marking``."""

        def read(wanted: Wanted) -> Sequence[Record]:
            return self.exchange((), START, wanted).news

        return self._callers.recall(caller, number, records, read)

    # --- the catalogue: answers by SQL, without loading trials ---

    def _ask(self, *steps: Step) -> list[Rows]:
        return self.connection.persistently(lambda: self.connection.session().run(steps))

    def counts(self, study_id: int) -> dict[int, int] | None:
        """See ``Catalogue``."""
        known_id = possible_id(self._dialect, study_id)
        if known_id is None:
            return None
        *states, (_, exists) = self._ask(self._dialect.step(s.counts, study_id=known_id))[0]
        if not exists:
            return None
        return {t.STATES.index(state): n for state, n in states if state in t.STATES}

    def best_trial_id(self, study_id: int, maximize: bool) -> int | None:
        """See ``Catalogue``."""
        known_id = possible_id(self._dialect, study_id)
        rows = self._ask(self._dialect.step(s.best_trial, maximize, study_id=known_id))[0]
        return rows[0][0] if rows else None

    def summaries(self, study_id: int | None = None) -> dict[int, Summary]:
        """See ``Catalogue``."""
        d, of_one = self._dialect, study_id is not None
        args = {"study_id": study_id} if of_one else {}
        states, bests = self._ask(
            d.step(s.summaries, of_one, **args), d.step(s.best_trials, of_one, **args)
        )
        rows_of: dict[int, list[Any]] = {}
        for one, *row in states:
            rows_of.setdefault(one, []).append(row)
        best_of = dict(bests)
        return {
            one: Summary(
                {t.STATES.index(state): n for state, n, *_ in rows if state in t.STATES},
                min(self._times(one, (row[2] for row in rows)), default=None),
                max(self._times(one, (row[3] for row in rows)), default=None),
                best_of.get(one),
            )
            for one, rows in rows_of.items()
        }

    def _times(self, study_id: int, raw: Iterable[str | None]) -> list[str]:
        times = (self.connection.decoder.time(one, study_id) for one in raw)
        return [time for time in times if time is not None]

    # --- pieces of operations, for callers of older methods ---

    def set_directions(self, study_id: int, directions: Sequence[int]) -> Verdict:
        """See ``Piecewise``."""
        return self._set_piece(lambda session, d: set_directions(session, d, study_id, directions))

    def set_values(self, trial_id: int, values: Sequence[float]) -> Verdict:
        """See ``Piecewise``."""
        return self._set_piece(lambda session, d: set_values(session, d, trial_id, values))

    def _set_piece(self, write: Callable[[Session, Dialect], Verdict]) -> Verdict:
        def attempt() -> Verdict:
            session = self.connection.session()
            self.connection.standing = None
            self.connection.be_durable(session, True)
            return write(session, self._dialect)

        return self.connection.persistently(attempt)

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
        time = self.connection.decoder.time
        counts = self.counts(study_id) or {}
        return Overview(counts, best, time(first, study_id), time(last, study_id))

    def facts(self) -> dict[str, Any]:
        """See ``Described``."""
        url = self.engine.url
        version = self.get_current_version() if self.connection.schema.is_there() else None
        head = self.get_head_version()
        found: dict[str, Any] = {
            "kind": f"tables in {self._dialect.name}",
            "address": shown_url(url),
            "schema_version": version,
            "schema_version_expected": head,
            "size_bytes": database_bytes(self.engine, self._dialect),
        }
        if version == head:  # older ones may lack the table
            n, newest = self._ask(self._dialect.step(s.beats))[0][0]
            found["heartbeats"] = {"n_trials": n, "newest_at": record_time(newest)}
        return found

    def load_trials(self, records: Sequence[CreateTrial], number: int, above: int) -> int:
        """See ``Bulk``."""
        check_values(self._dialect, records)
        return self.connection.persistently(
            lambda: load_trials(self.engine, self._dialect, records, number, above)
        )

    def findings(self, *, deep: bool) -> Iterator[Finding]:
        """See ``Inspectable``."""
        with self.connection.translating():
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

    def study_at(self, cursor: Cursor) -> int | None:
        """See ``Combinable``; where ids are used again, a cursor tells which trial is meant."""
        studies = read_cursor(cursor)
        return next(iter(studies)) if len(studies) == 1 and not self._dialect.ids_reused else None

    def tell_the_same(self, cursor: Cursor, other: Cursor, study_id: int) -> bool:
        """See ``Combinable``."""
        one, two = read_cursor(cursor).get(study_id), read_cursor(other).get(study_id)
        if one is None or two is None or one.has_gaps or two.has_gaps:
            return False  # there are others than WAITING ones between
        told = (one.name, one.digest, one.directions, one.waiting)
        return told == (two.name, two.digest, two.directions, two.waiting)

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
        for ids in s.chunks(sorted(trial_ids)):
            args: dict[str, Any] = {}
            n = s.pad("id", ids, args)
            steps += [d.step(statement, n, **args) for statement in statements]
        if not steps:
            return

        def run() -> None:
            session = self.connection.session()
            self.connection.be_durable(session, False)
            session.run([d.begin_write, *steps, d.commit])

        self.connection.persistently(run)

    # --- schema versions ---

    def get_current_version(self) -> str:
        """The version of the tables as they are."""
        return self.connection.schema.get_current_version()

    def get_head_version(self) -> str:
        """The version that this trialstore works on."""
        return self.connection.schema.get_head_version()

    def get_all_versions(self) -> list[str]:
        """All versions that there ever were, newest first."""
        return self.connection.schema.get_all_versions()

    def upgrade(self) -> None:
        """Bring the tables to the latest version; see ``Schema.upgrade``."""
        self.connection.persistently(self.connection.schema.upgrade)
        # What this connection has prepared is of the old tables.
        self.connection.disconnect()
