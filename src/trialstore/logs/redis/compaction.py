"""Compaction and trim: other records in place of a journal's, written beside it and switched.

Killed before the switch, it leaves the old journal, killed after, the new one, and of a very long
one old records far behind its end, which readers pass over and the next compaction removes.

Source: docs/formats/redis.md, "Compaction".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import contextlib
import functools
from typing import Any, Final, NoReturn

from trialstore.errors import CompactionRefusedError, LogCorruptError, LogUnavailableError
from trialstore.log import START, Base, Compaction
from trialstore.logs.head import Head, encode_head
from trialstore.logs.redis.doors import run, send_one
from trialstore.logs.redis.locks import Lock
from trialstore.logs.redis.position import BEGIN, Position, position_after
from trialstore.logs.redis.reading import TRIMMED, Reader
from trialstore.logs.redis.snapshots import Snapshots, pack

# The script of the steps.
_COMPACT: Final = "compact.lua"
# A compaction writes beside the journal in pieces of so many records and bytes, and removes as
# many keys at a time. It switches when no more than that came meanwhile.
_PIECE_RECORDS: Final = 2000
_PIECE_BYTES: Final = 1 << 20
# The switch removes so many old records behind the new journal's end, at one or two microseconds
# each, while others wait. If the compactor is killed before it has removed the rest, nobody gets
# there before so many more were appended.
_SWITCH_REMOVES: Final = 50_000
# A killed compactor keeps others from compacting for so long.
_COMPACT_LOCK_S: Final = 300
_TRIMMED_MIN: Final = 4  # of less than so many records, none can go


class Compactor:
    """Replaces the records of a journal.

    Args:
        reader: Of the journal.
        snapshots: Of the same.
    """

    def __init__(self, reader: Reader, snapshots: Snapshots) -> None:
        self._reader = reader
        self._snapshots = snapshots
        self._connection = reader.connection
        self._keys = reader.keys

    def load_base(self) -> Base:
        """See ``CompactableLog``."""
        with self._connection.mutex:
            stored = self._snapshots.stored(self._keys.base)
            if stored is not None:
                return Base(stored.marks, stored.snapshot, tuple(stored.position))
            head = self._reader.head()
            return Base(head.marks if head is not None else {})

    def compact(self, make: Callable[[], Compaction]) -> None:
        """See ``RedisLog.compact``.

        The new records are written beside the old ones, and one script puts all of them in place.
        """
        with self._compacting() as token:
            made = make()
            if made.cursor is START:
                return
            position = Position(*made.cursor)
            count = 1 + self._put(token, 1, made.lines)
            with self._connection.mutex:
                old = self._reader.head()
            of = [position.identity, *(old.of if old is not None else [])]
            head = encode_head(Head(of, [position.number], [count], dict(made.marks)))
            self._switch(token, head, count, position)
            self._sweep(token)

    def _switch(self, token: bytes, head: bytes, count: int, position: Position) -> None:
        """Put the new journal in place, with what came after ``position``.

        Args:
            token: Of the lock.
            head: The new record 0.
            count: How many records the new journal has, that one included.
            position: In the old journal, after the last record that they stand for.
        """
        while True:
            status, number = self._step(
                "switch", token, *_check_args(position), head, count, _SWITCH_REMOVES
            )
            if status == b"ok":
                return
            with self._connection.mutex:
                if status == b"behind":
                    # What came meanwhile stays as it is; most of it can be moved before.
                    lines = self._reader.read(position.number, number)
                    count += self._put(token, count, lines)
                    position = position_after(position, lines)
                elif status == b"hole":
                    self._reader.close_hole(number)
                elif self._reader.first() == head:
                    return  # and the answer to that was lost
                else:
                    self._raise_not_done(status, number, position)

    def trim(self, make: Callable[[], Compaction]) -> None:
        """See ``RedisLog.trim``. One script makes the journal a trimmed one, then records go."""
        with self._compacting() as token:
            made = make()
            # Record 0 names the journal, the last one is what a cursor knows its place by.
            if made.cursor is START or made.cursor[0] < _TRIMMED_MIN:
                return
            position = Position(*made.cursor)
            (snapshot,) = made.lines
            trimmed = b"%s%d}" % (TRIMMED, position.number)
            base = pack(snapshot, made.cursor, made.marks)
            with self._connection.mutex:
                self._connection.check_memory(len(base))
            status, number = self._step("trim", token, *_check_args(position), trimmed, base)
            if status != b"ok":
                with self._connection.mutex:
                    self._raise_not_done(status, number, position)
            end = position.number - 1
            for first in range(2, end, _PIECE_RECORDS):
                self._step("drop", token, trimmed, first, min(first + _PIECE_RECORDS, end) - 1)

    @contextlib.contextmanager
    def _compacting(self) -> Iterator[bytes]:
        """Keep other compactors out; gives the token that says who is in."""
        lock = Lock(self._connection, self._keys.compacting, _COMPACT_LOCK_S)
        with self._connection.mutex:
            self._connection.is_uncertain = False
            self._connection.ask(lambda door: None)
            if self._connection.in_slots:
                raise CompactionRefusedError(
                    f"{self._connection.name}: the records are in several slots of the "
                    "cluster, so they can't be replaced in one step. Copy the journal to a prefix "
                    "with a hash tag, say {name}, while nobody works on it."
                )
            if not lock.take():
                raise LogUnavailableError(
                    f"{self._connection.name}: somebody else is compacting it, or was killed "
                    f"while doing so less than {_COMPACT_LOCK_S} s ago."
                )
        try:
            self._sweep(lock.token)
            yield lock.token
        finally:
            with (
                self._connection.mutex,
                contextlib.suppress(LogUnavailableError, LogCorruptError),
            ):
                if lock.is_held():
                    # Of one that failed they may be what takes the memory that others need.
                    self._remove_new()
                    lock.release()

    def _put(self, token: bytes, number: int, lines: Iterable[bytes]) -> int:
        """Write records beside the journal, the first with this number; returns how many."""
        count = 0
        for piece in _pieces(lines):
            with self._connection.mutex:
                self._connection.check_memory(2 * sum(map(len, piece)))
            status, _ = self._step("put", token, _COMPACT_LOCK_S, number + count, *piece)
            if status != b"ok":
                self._raise_not_done(status, number, BEGIN)
            count += len(piece)
        return count

    def _sweep(self, token: bytes) -> None:
        """Remove what this compaction, or a killed one, has left, a little at a time."""
        status, _ = self._step("sweep", token, _PIECE_RECORDS)
        while status == b"behind":
            status, _ = self._step("sweep", token, _PIECE_RECORDS)
        with self._connection.mutex:
            self._remove_new()

    def _remove_new(self) -> None:
        """Remove the records that were written beside the journal."""
        number, removed = 1, 1
        while removed:
            keys = [self._keys.new(number + index) for index in range(_PIECE_RECORDS)]
            unlink = functools.partial(send_one, command=("UNLINK", *keys))
            removed = self._connection.ask(unlink)
            number += _PIECE_RECORDS

    def _step(self, name: str, token: bytes, *args: Any) -> tuple[bytes, int]:
        """A step of compact.lua."""
        keys = (
            self._keys.number,
            self._keys.compacting,
            self._keys.stale,
            self._keys.complete,
            self._keys.base,
            self._keys.optuna_snapshot,
        )
        full = (len(keys), *keys, name, self._keys.records, self._keys.new(""), token, *args)
        with self._connection.mutex:
            self._connection.check_lengths(arg for arg in args if isinstance(arg, bytes))
            status, number = self._connection.ask(lambda door: run(door, _COMPACT, full))
            return status, number

    def _raise_not_done(self, status: bytes, number: int, position: Position) -> NoReturn:
        if status == b"lost":
            raise LogUnavailableError(
                f"{self._connection.name}: this took so long that somebody else may compact it "
                "by now; nothing was changed."
            )
        if status == b"evicted":
            raise LogUnavailableError(
                f"{self._connection.address} {self._keys.new(number)}: this new record is not "
                "there any more: evicted by a maxmemory policy, or deleted. Nothing was changed. "
                "Set maxmemory-policy to noeviction, or give Redis more memory, and compact again."
            )
        self._reader.raise_damaged(
            b"changed" if status == b"other" else status, number, [], position
        )


def _check_args(position: Position) -> tuple[Any, ...]:
    """What tells the steps of a compaction that a journal is the one that was read."""
    tail, identity = position.tail.encode("latin-1"), position.identity.encode("latin-1")
    return position.number, tail, identity, _PIECE_RECORDS


def _pieces(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """The same, in lists that a server takes without being noticed."""
    piece: list[bytes] = []
    n_bytes = 0
    for line in lines:
        piece.append(line)
        n_bytes += len(line)
        if len(piece) == _PIECE_RECORDS or n_bytes >= _PIECE_BYTES:
            yield piece
            piece, n_bytes = [], 0
    if piece:
        yield piece
