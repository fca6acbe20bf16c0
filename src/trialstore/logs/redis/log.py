"""A journal in Redis: one key a record, and one script that appends and reads in one round trip.

What a crash may leave behind, and why nothing that was acknowledged is lost or stored twice:

* *One server, or a cluster whose prefix has a hash tag.* The script is atomic, in memory and in
  the append-only file: a batch is there or it is not. Its records carry the writer and a sequence
  number, and the script leaves out those that it finds among the news, so a batch may be sent
  again whenever its answer did not come.
* *A cluster with a plain prefix.* Numbers are reserved with INCRBY, then every record is set if
  its key does not exist. A crash in between leaves a *hole*, which every reader must wait for,
  since the record may be on its way. After a bounded wait one of them fills it, if it still does
  not exist, with a record that means nothing to anybody. A slow writer whose number was filled
  sees that when it reads its own records back, and reserves anew. (``by_hand.py``, and holes in
  ``reading.py``.)
* A key that is missing although it once existed was evicted or deleted. That is told apart from a
  hole by ``{prefix}:trialstore:complete`` and by what stands behind the gap, and never filled.
* A record that can't be decoded is found only when others have been appended behind it, since that
  takes one round trip. From then on a storage reads, and decodes, before it appends.
* A compaction writes beside the journal and switches in one script. Killed before, it leaves the
  old journal, killed after, the new one; of a very long one some old records are left, far behind
  its end, which readers pass over.
  (``compaction.py``.)

Nothing that is found in Redis is unpickled.

Source: docs/formats/redis.md; Optuna ``JournalRedisBackend``; Redis "Scripting with Lua",
"Cluster specification".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import json
import os
import random
from typing import Any, Final, Literal
import uuid
import weakref

from optuna.storages.journal import BaseJournalBackend

from trialstore.clock import CLOCK, Clock
from trialstore.credentials import Secret
from trialstore.errors import LogCompactedError, LogCorruptError
from trialstore.findings import Finding
from trialstore.log import START, Base, Batch, Compaction, Cursor, Decide, Entry, Wanted
from trialstore.logs.head import decode_head
from trialstore.logs.redis import inspection
from trialstore.logs.redis.address import check_url
from trialstore.logs.redis.by_hand import ByHand
from trialstore.logs.redis.compaction import Compactor
from trialstore.logs.redis.connection import Connection
from trialstore.logs.redis.doors import run, send_one
from trialstore.logs.redis.keys import Keys
from trialstore.logs.redis.leases import Leases
from trialstore.logs.redis.listening import Ear
from trialstore.logs.redis.locks import RELEASE_SCRIPT
from trialstore.logs.redis.position import BEGIN, Position, identity_of, position_after
from trialstore.logs.redis.reading import ANSWER_RECORDS, Reader, raise_appended
from trialstore.logs.redis.snapshots import Snapshots
from trialstore.records import AnyOperation, encode_dict, encode_line

# The script that appends and reads. It returns so many records at most: it runs alone, and this
# takes it about a millisecond.
_EXCHANGE: Final = "exchange.lua"
_NEWS_MAX: Final = 1000
# Whoever decides anew what to append on a condition has its turn, which takes a round trip.
_TURN_PAUSE_S: Final = 0.002
# How many places are remembered for those who read through Optuna's two methods.
_READ_POSITIONS_MAX: Final = 16

_logs: weakref.WeakSet[RedisLog] = weakref.WeakSet()


class RedisLog(BaseJournalBackend):
    """A journal in Redis as a ``Log``, and as a backend for Optuna's own ``JournalStorage``.

    Connects when it is first used. A server that goes away and comes back within half a minute is
    not noticed but for the time that it takes.

    Args:
        url: ``redis://[[user]:password@]host:port/db``, ``rediss://…`` for TLS, ``unix://…``, or
            ``redis+sentinel://[…@]host:port,host:port/service/db``. Options of redis-py's
            connections may follow as a query, those of Sentinel's begin with ``sentinel_``.
        use_cluster: The server is a node of a cluster. Give it a prefix with a hash tag
            (``{name}``), which keeps the journal in one slot and each batch atomic.
        prefix: What all keys of the journal begin with.
        durability: "full" expects a server that syncs before it answers, "process" one that
            keeps an append-only file; a server that does not is warned of.
        password: Where the server's password is kept, if it is not in the URL. It is read
            whenever a connection is made.
        clock: Time, for tests to replace.

    Raises:
        ValueError: The URL is none of these.
        ImportError: The ``redis`` package is not installed.
    """

    def __init__(
        self,
        url: str,
        use_cluster: bool = False,
        prefix: str = "",
        *,
        durability: Literal["full", "process"] = "full",
        password: Secret | None = None,
        clock: Clock = CLOCK,
    ) -> None:
        if durability not in ("full", "process"):
            raise ValueError(f"durability must be 'full' or 'process', not {durability!r}.")
        check_url(url)
        self._url = url
        self._use_cluster = use_cluster
        self._prefix = str.__str__(prefix)  # in a key, an enum's member would show its own name
        self._durability = durability
        self._password = password
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        """The state of a log that has nothing open in this process."""
        self._keys = Keys(self._prefix)
        keys = self._keys
        names = (keys.number, keys.complete, keys.leases, keys.stale, keys.turn, keys.records)
        self._script_keys = (b"5", *(name.encode() for name in names))
        self._connection = Connection(
            self._url, self._use_cluster, self._keys, self._durability, self._clock, self._password
        )
        self._reader = Reader(self._connection)
        self._by_hand = ByHand(self._reader)
        self._leases = Leases(self._connection)
        self._snapshots = Snapshots(self._connection)
        self._compactor = Compactor(self._reader, self._snapshots)
        self._read_positions: dict[int, Position] = {}  # for read_logs, by record number
        # A record before this number could not be decoded; 0: none. Those whose place is before
        # it too read again before they append.
        self._damaged_before = 0
        self._mark = f"{uuid.uuid4().hex[:16]}-"
        self._n_marked = 0
        _logs.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "url": self._url,
            "use_cluster": self._use_cluster,
            "prefix": self._prefix,
            "durability": self._durability,
            "password": self._password,
            "clock": self._clock,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._url = state["url"]
        self._use_cluster = state["use_cluster"]
        self._prefix = state["prefix"]
        self._durability = state["durability"]
        self._password = state["password"]
        self._clock = state["clock"]
        self._begin()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection.address!r}, prefix={self._prefix!r})"

    # --- Log ---------------------------------------------------------------------------------

    def exchange(self, records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``Log.exchange``. One round trip but for the first, and for those who lag.

        Raises:
            ValueError: A record is longer than the server takes; nothing was sent.
            LogUnavailableError: The server was not reached in time, or refused; nothing counts.
            OutcomeUnknownError: The records were sent, and the server did not come back to say.
                Or they were appended behind a record that can't be read; no further ones will be.
            LogCorruptError: A record is missing, or is none. Nothing was appended.
            LogReplacedError: The journal is shorter than ``cursor``, or another one. Likewise.
        """
        position = BEGIN if cursor is START else Position(*cursor)
        lines = [encode_line(record)[:-1] for record in records]
        with self._connection.mutex:
            seen: list[bytes] = []
            if lines and position.number < self._damaged_before:
                # Each attempt would append once more to a journal that it can't read then.
                seen, position = self._read_on([], position, more=True)
                self._decode(seen, position)
                self._damaged_before = 0
            news, after, more = self._exchange_lines(
                _without(lines, seen), position, self._leases.owners_of(records)
            )
        news = seen + news
        if not news:
            return Batch(None, (), cursor if after is position else tuple(after))
        return Batch(None, self._decode(news, after, bool(lines)), tuple(after), more)

    def exchange_if(self, decide: Decide, cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``ConditionalLog``, and ``exchange`` for what it raises.

        ``decide`` runs again if somebody else has appended meanwhile, whatever it was. Others
        then wait for their turn; on a cluster with a plain prefix they do not.
        """
        position = BEGIN if cursor is START else Position(*cursor)
        with self._connection.mutex:
            lines: list[bytes] = []
            news, after = self._read_on(*self._exchange_lines(lines, position))
            while set(lines).isdisjoint(news):
                records: Sequence[AnyOperation] = ()
                try:
                    records = decide(self._decode(news, after), tuple(after))
                finally:
                    if lines and not records and not self._connection.in_slots:
                        release = ("EVAL", RELEASE_SCRIPT, 1, self._keys.turn, self._mark)
                        self._connection.ask(functools.partial(send_one, command=release))
                position = after
                if not records:
                    return Batch(None, (), tuple(after))
                lines = [encode_line(record)[:-1] for record in records]
                owners = self._leases.owners_of(records)
                news, after = self._read_on(
                    *self._exchange_lines(lines, position, owners, alone=True)
                )
            return Batch(None, self._decode(news, after, appended=True), tuple(after))

    def _decode(
        self, news: list[bytes], after: Position, appended: bool = False
    ) -> list[AnyOperation]:
        """The records that end at a position.

        Args:
            news: As they are stored.
            after: The position.
            appended: This call's own are among them.
        """
        try:
            return self._reader.decode(news, after.number - len(news))
        except LogCorruptError as damage:
            self._damaged_before = after.number
            if appended and not isinstance(damage, LogCompactedError):
                raise_appended(damage)
            raise

    def _read_on(
        self, news: list[bytes], position: Position, more: bool
    ) -> tuple[list[bytes], Position]:
        """All of an answer that came in pieces."""
        while more:
            further, position, more = self._exchange_lines([], position)
            news = news + further
        return news, position

    def close(self) -> None:
        """Close the connection; a later call opens another."""
        with self._connection.mutex:
            self._connection.hang_up()

    # --- Optuna's backend --------------------------------------------------------------------

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """The records from a number on, as Optuna's ``JournalStorage`` replays them.

        Raises:
            LogUnavailableError, LogCorruptError: As for ``exchange``.
        """
        with self._connection.mutex:
            begin = self._read_positions.get(log_number_from, Position(log_number_from, ""))
            lines, position = self._read_on([], begin, more=True)
            # Optuna counts from where it began to read, and a compaction changes the numbers.
            moved = begin.identity and position.identity != begin.identity
            if moved or (
                log_number_from and not begin.identity and self._reader.head() is not None
            ):
                self._read_positions.clear()
                self._reader.raise_compacted(log_number_from)
            try:
                logs = [
                    self._reader.decode_one(line, number, _decode_dict)
                    for number, line in enumerate(lines, log_number_from)
                ]
            except LogCorruptError:
                self._damaged_before = position.number
                raise
            self._note_read(position)
        return logs

    def _note_read(self, position: Position) -> None:
        """Several storages may read through one backend."""
        self._read_positions.pop(position.number, None)
        self._read_positions[position.number] = position
        if len(self._read_positions) > _READ_POSITIONS_MAX:
            del self._read_positions[next(iter(self._read_positions))]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records, all or none; durable on return.

        Raises:
            ValueError, LogUnavailableError, OutcomeUnknownError, LogCorruptError: As for
                ``exchange``.
        """
        if not logs:
            return
        with self._connection.mutex:
            lines = [self._encode_dict(fields) for fields in logs]
            position = next(reversed(self._read_positions.values()), BEGIN)
            if position.number < self._damaged_before:
                self.read_logs(position.number)
                self._damaged_before = 0
                position = next(reversed(self._read_positions.values()))
            if position.number == 0:
                position = Position(self._connection.ask(self._reader.last_number) + 1, "")
            self._exchange_lines(lines, position)

    def _encode_dict(self, fields: dict[str, Any]) -> bytes:
        """A line that no other is equal to, so that it is known again after a lost answer."""
        if "seq" not in fields:
            self._n_marked += 1
            fields = {**fields, "mark": f"{self._mark}{self._n_marked}"}
        return encode_dict(fields)[:-1]

    # --- exchanging lines --------------------------------------------------------------------

    def _exchange_lines(
        self,
        lines: list[bytes],
        position: Position,
        owners: Sequence[str] = (),
        *,
        alone: bool = False,
    ) -> tuple[list[bytes], Position, bool]:
        """Append lines, each unique; return what is new after ``position``, they included.

        Args:
            owners: Whose leases are renewed with it.
            alone: Append only if nothing is new; else none of the lines is in the answer.

        Returns:
            The news, the position after them, and whether there is more, which is read next.
        """
        self._connection.is_uncertain = False
        # Whether the keys are in one slot is known from here on.
        self._connection.ask(lambda door: None)
        self._connection.check_lengths(lines)
        if self._connection.in_slots:
            if owners:
                self._leases.renew(owners)
            news, more = self._by_hand.exchange(lines, position, alone)
            position = position_after(position, news)
        else:
            news, position, more = self._exchange_by_script(lines, position, owners, alone)
        self._connection.is_uncertain = False
        return news, position, more

    def _exchange_by_script(
        self, lines: list[bytes], position: Position, owners: Sequence[str], alone: bool
    ) -> tuple[list[bytes], Position, bool]:
        news: list[bytes] = []
        # Read without the script: perhaps of two journals, if it was compacted meanwhile.
        unsure: list[bytes] = []
        while True:
            # An attempt whose answer was lost may have appended them. What is not among the
            # records read was not appended: an attempt that comes late sees these as news.
            pending = _without(lines, news + unsure)
            if alone and (news or unsure):
                pending = []
            after = position_after(position, unsure)
            status, number, found = self._run_script(after, pending, owners, alone)
            if status == b"other":
                position, unsure = self._moved(position), []
                continue
            news += unsure
            position, unsure = after, []
            if status == b"moved":
                return news + found, position_after(position, found), False
            if status == b"ok":
                found += _without(pending, found)
                return news + found, position_after(position, found), False
            if status == b"part":
                news += found
                position = position_after(position, found)
                if not pending:
                    return news, position, True
            elif status == b"behind":
                if not pending:
                    if len(news) >= ANSWER_RECORDS:
                        return news, position, True
                    number = min(number, position.number + ANSWER_RECORDS - 1)
                unsure = self._reader.read(position.number, number)
            elif status == b"hole":
                self._reader.close_hole(number)
            elif status == b"turn":
                self._connection.clock.sleep(_TURN_PAUSE_S * random.uniform(0.5, 1.5))
            else:
                self._reader.raise_damaged(status, number, found, position)

    def _run_script(
        self, position: Position, lines: list[bytes], owners: Sequence[str], alone: bool
    ) -> tuple[bytes, int, Any]:
        args = (
            *self._script_keys,
            position.number,
            position.tail.encode("latin-1"),
            position.identity.encode("latin-1"),
            _NEWS_MAX,
            self._mark if alone else "",
            len(owners),
            *owners,
            *lines,
        )
        answer: bytes = self._connection.ask(
            lambda door: run(door, _EXCHANGE, args), appends=bool(lines)
        )
        head, _, records = answer.partition(b"\n")
        status, number, count = head.split(b" ")
        found = records.split(b"\n") if int(count) else []
        if len(found) != int(count):
            # Somebody else's record has a newline in it.
            found = self._reader.read(position.number, position.number + int(count) - 1)
        return status, int(number), found

    def _moved(self, position: Position) -> Position:
        """A position in the journal that this one was compacted from, as one of this one.

        Raises:
            LogCompactedError: It is in the middle of what was compacted.
            LogReplacedError: It is of another journal.
        """
        if not position.number:
            return BEGIN
        first = self._reader.first()
        if first is None:
            self._reader.raise_damaged(b"missing", 0, [], position)
        head = decode_head(first)
        if head is None or position.identity not in head.of:
            self._reader.raise_damaged(b"changed", 0, [], position)
        (end,), (begin,) = head.end, head.begin
        if position.identity != head.of[0] or position.number < end:
            self._reader.raise_compacted(position.number)
        tail = position.tail if position.number > end else ""
        return Position(begin + position.number - end, tail, identity_of(first))

    # --- LeaseStore --------------------------------------------------------------------------

    def take_lease(self, owner: str) -> None:
        """See ``LeaseStore``."""
        with self._connection.mutex:
            self._leases.take(owner)

    def renew_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``; the lease is the owner's, whichever trials it runs.

        Raises:
            LogUnavailableError, LogCorruptError: As for ``exchange``.
        """
        with self._connection.mutex:
            self._leases.renew([owner])

    def withdraw_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``, and ``renew_lease``."""
        with self._connection.mutex:
            self._leases.withdraw(owner)

    def expired(
        self, study_id: int, running: Mapping[int, str], grace_period_s: float
    ) -> Sequence[int]:
        """See ``LeaseStore``, and ``renew_lease``."""
        with self._connection.mutex:
            return self._leases.expired(running, grace_period_s)

    # --- Audible -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def listening(self) -> Iterator[Callable[[float], None]]:
        """See ``Audible``. Told by the server; in a cluster it only sleeps."""
        with contextlib.closing(Ear(self._connection)) as ear:
            yield ear.wait

    # --- SnapshotStore, CompactableLog and TrimmableLog --------------------------------------

    def save_snapshot(self, make: Callable[[], tuple[bytes, Cursor] | None]) -> bool:
        """See ``SnapshotStore``. Optuna's ``{prefix}:snapshot`` is neither read nor written.

        A crash leaves the old snapshot or the new one, and a lock that ends by itself.

        Raises:
            LogUnavailableError, LogCorruptError: As for ``exchange``, or there is no memory.
            ValueError: The snapshot is longer than the server takes.
        """
        return self._snapshots.save(make)

    def load_snapshot(self) -> tuple[memoryview, Cursor] | None:
        """See ``SnapshotStore``; None also for bytes that are not ours, or of another journal.

        Of a trimmed journal the snapshot that stands for the trimmed records, if no other.
        """
        return self._snapshots.load()

    def load_base(self) -> Base:
        """See ``CompactableLog``."""
        return self._compactor.load_base()

    def compact(self, make: Callable[[], Compaction]) -> None:
        """See ``CompactableLog``. A kill at any moment leaves the old journal, or the new one.

        Raises:
            LogUnavailableError, LogCorruptError: Nothing was changed.
            ValueError: A new record is longer than the server takes; likewise.
            CompactionRefusedError: The keys are in several slots of a cluster.
        """
        self._compactor.compact(make)

    def trim(self, make: Callable[[], Compaction]) -> None:
        """See ``TrimmableLog``. A kill at any moment leaves the whole journal, or a trimmed one.

        Raises:
            As ``compact``.
        """
        self._compactor.trim(make)

    # --- Entries, Described and Inspectable --------------------------------------------------

    def entries(self) -> Iterator[Entry]:
        """See ``Entries``; of a trimmed journal those that are left."""
        yield from inspection.entries(self._reader, self.load_base().cursor)

    def facts(self) -> dict[str, Any]:
        """See ``Described``."""
        return inspection.facts(self._reader)

    def findings(self, *, deep: bool) -> Iterator[Finding]:
        """See ``Inspectable``: what is beside the records."""
        return inspection.findings(self._reader, self._snapshots)


def _without(lines: list[bytes], found: list[bytes]) -> list[bytes]:
    if not lines or not found:
        return lines
    known = set(found)
    return [line for line in lines if line not in known]


def _decode_dict(line: bytes) -> dict[str, Any]:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("a record must be one JSON object")
    return fields


def _forget_in_child() -> None:
    # Dropped, not closed: redis-py closes what belongs to its own process only, and the parent
    # goes on with the same connection.
    for log in list(_logs):
        log._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
