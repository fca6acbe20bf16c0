"""The records by their numbers: read, waited for where a number was reserved, and decoded.

Whoever reserves a number and dies leaves a *hole*, which is filled after a bounded wait. A record
that once was there and is not any more is damage, and never filled.

Source: docs/formats/redis.md, Optuna ``JournalRedisBackend``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import logging
from typing import Any, Final, NoReturn, TypeVar

from trialstore.errors import (
    LogCompactedError,
    LogCorruptError,
    LogReplacedError,
    OutcomeUnknownError,
)
from trialstore.logs.head import Head, decode_head
from trialstore.logs.redis.connection import Connection
from trialstore.logs.redis.doors import Door
from trialstore.logs.redis.position import BEGIN, Position
from trialstore.records import (
    AnyOperation,
    DeleteStudy,
    checksum_matches,
    decode_line,
    decode_lines,
    encode_line,
)

_logger = logging.getLogger(__package__)
_T = TypeVar("_T")

# A worker that is further behind reads in chunks of so many keys, which others may interrupt.
CHUNK_RECORDS: Final = 2000
# But about so many bytes, judged by the records before; few at first, then twice as many at most.
_CHUNK_BYTES: Final = 1 << 24
_FIRST_RECORDS: Final = 100
# An answer holds so many records at most, so that opening needs not all of them in memory twice.
ANSWER_RECORDS: Final = 20_000
# A writer between its INCR and its SET takes milliseconds. One that was stopped for longer and
# then goes on finds its number taken (ours) or overwrites the filler (Optuna's).
_HOLE_WAIT_S: Final = 10.0
_HOLE_PAUSE_S: Final = 0.001
_HOLE_PAUSE_MAX_S: Final = 0.25
# Fills a hole, unless the journal has become shorter meanwhile and ends before it.
_FILL_SCRIPT: Final = (
    "if tonumber(redis.call('GET', KEYS[2]) or '-1') < tonumber(ARGV[2]) then return false end "
    "return redis.call('SET', KEYS[1], ARGV[1], 'NX')"
)
# A record about a study that can't exist: replayed by any Optuna, it changes nothing.
_FILLER_RECORD: Final = DeleteStudy(worker_id="trialstore-hole", study_id=-1)
_FILLER: Final = encode_line(_FILLER_RECORD)[:-1]
# Record 1 of a trimmed journal. Without an op_code, so that an Optuna that opens it stops with an
# error; at a missing record it would wait for ever.
TRIMMED: Final = b'{"trialstore":"trimmed, only trialstore can open this journal","before":'


class Reader:
    """Reads records; whoever calls holds the connection's ``mutex``.

    Args:
        connection: By which.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.keys = connection.keys

    def last_number(self, door: Door) -> int:
        """Number of the last record; -1 if there is none."""
        stored = door.command("GET", self.keys.number)
        try:
            last = -1 if stored is None else int(stored)
        except ValueError:
            self.raise_damaged(b"number", 0, [stored], BEGIN)
        if not -1 <= last <= 1 << 53:
            self.raise_damaged(b"number", 0, [stored], BEGIN)
        return last

    def number_in(self, key: str) -> int:
        """What a key of ours says; -1 if nothing, or no number, as exchange.lua takes it."""
        stored = self.connection.ask(lambda door: door.command("GET", key))
        try:
            return int(stored or -1)
        except ValueError:
            return -1

    def first(self) -> bytes | None:
        """Record 0."""
        record: bytes | None = self.connection.ask(
            lambda door: door.command("GET", self.keys.record(0))
        )
        return record

    def head(self) -> Head | None:
        """What record 0 says of the journal that this one was compacted from."""
        return decode_head(self.first() or b"")

    def read(self, number: int, last: int) -> list[bytes]:
        """The records from one number to another, once all are there.

        Fewer, if the journal was compacted meanwhile; those read are then of no use either.
        """
        lines: list[bytes] = []
        count = _FIRST_RECORDS
        while number <= last:
            begin, n_bytes = number, 1
            end = min(number + count, last + 1)
            for line in self.get(range(number, end)):
                if line is None:
                    break
                lines.append(line)
                n_bytes += len(line)
                number += 1
            if number < end and not self.close_hole(number):
                break
            count = min(2 * count, CHUNK_RECORDS, _CHUNK_BYTES * (number - begin) // n_bytes) or 1
        return lines

    def get(self, numbers: Iterable[int]) -> list[bytes | None]:
        """The records of these numbers, None where there is none."""
        keys = [self.keys.record(number) for number in numbers]
        if not keys:
            return []
        if self.connection.in_slots:
            gets = [("GET", key) for key in keys]
            return self.connection.ask(lambda door: door.pipeline(gets))
        values: list[bytes | None] = self.connection.ask(lambda door: door.command("MGET", *keys))
        return values

    # --- holes -------------------------------------------------------------------------------

    def close_hole(self, number: int) -> bool:
        """Wait until there is a record of this number: the writer's, or one that says nothing.

        Returns:
            False if there need not be one any more, because a compaction has made the journal
            shorter.

        Raises:
            LogCorruptError: There was one; it was evicted or deleted.
        """
        key = self.keys.record(number)

        def exists() -> bool:
            # Unlike EXISTS, an error for what is no record although it is there.
            return bool(self.connection.ask(lambda door: door.command("STRLEN", key)))

        def is_reserved() -> bool:
            return self.connection.in_slots or self.connection.ask(self.last_number) >= number

        # First what tells of the past, then whether the record is there: in the other order it
        # may be written, or filled by another reader, and built upon, between the two.
        if self.was_written(number) and not exists():
            self.raise_damaged(b"missing", number, [], BEGIN)
        give_up_s = self.connection.clock.now_s() + _HOLE_WAIT_S
        pause_s = _HOLE_PAUSE_S
        while self.connection.clock.now_s() < give_up_s:
            if exists():
                return True
            if not is_reserved():
                return False
            self.connection.clock.sleep(pause_s)
            pause_s = min(2 * pause_s, _HOLE_PAUSE_MAX_S)
        if self.was_written(number) and not exists():
            self.raise_damaged(b"missing", number, [], BEGIN)
        fill: tuple[Any, ...] = ("SET", key, _FILLER, "NX")
        if not self.connection.in_slots:
            fill = ("EVAL", _FILL_SCRIPT, 2, key, self.keys.number, _FILLER, number)
        if self.connection.ask(lambda door: door.command(*fill)):
            _logger.warning(
                "%s: %s was reserved and never written; its writer was killed. The record is "
                "skipped.", self.connection.address, key,
            )  # fmt: skip
        return True

    def was_written(self, number: int) -> bool:
        """Whether there was a record of this number at some time, as far as can be told."""
        if number <= self.number_in(self.keys.complete):
            return True
        # Optuna's workers read up to their own record after each append, and wait at a hole. So
        # none of them has two records behind one; and our script appends nothing behind one.
        last = self.connection.ask(self.last_number)
        seen: set[str] = set()
        for line in self.get(range(number + 1, min(number + CHUNK_RECORDS, last + 1))):
            try:
                record = decode_line(line or b"")
            except (ValueError, RecursionError):
                continue  # told of when it is read
            if record == _FILLER_RECORD:
                continue
            if record.worker_id in seen or (record.seq >= 0 and not self.connection.in_slots):
                return True
            if record.seq < 0:
                seen.add(record.worker_id)
        return False

    # --- decoding and errors -----------------------------------------------------------------

    def decode(self, lines: list[bytes], number: int) -> list[AnyOperation]:
        """The operations in lines of which the first has this number."""
        try:
            records = decode_lines(b"\n".join(lines))
            if len(records) == len(lines) and False not in map(checksum_matches, lines):
                return records
        except ValueError:
            pass
        return [
            self.decode_one(line, number + index, decode_line) for index, line in enumerate(lines)
        ]

    def decode_one(self, line: bytes, number: int, decode: Callable[[bytes], _T]) -> _T:
        """What ``decode`` makes of a line; it may raise ValueError."""
        try:
            if checksum_matches(line) is False:
                raise ValueError("the checksum does not match")
            return decode(line)
        except (ValueError, RecursionError) as error:
            if trimmed_before(line):
                self.raise_compacted(number)
            raise LogCorruptError(
                f"no record, or a damaged one: {error}. Restore the key from a backup; until then "
                "nothing more is written to this journal.",
                source=self.key_name(number),
                record_number=number,
            ) from error

    def key_name(self, number: int) -> str:
        """A record's place, for messages."""
        return f"{self.connection.address} {self.keys.record(number)}"

    def raise_compacted(self, number: int) -> NoReturn:
        """Somebody's place in the journal, at this number, is not in it any more."""
        raise LogCompactedError(
            "the journal was compacted or trimmed behind what was read; read it anew, with a "
            f"trialstore storage, which begins a trimmed one at {self.keys.base}",
            source=self.connection.name,
            record_number=number,
        )

    def raise_damaged(
        self, status: bytes, number: int, found: list[Any], position: Position
    ) -> NoReturn:
        """What was found in place of the journal, as exchange.lua's status says it.

        Args:
            status: See exchange.lua, as ``number`` and ``found``.
            number: Of the record.
            found: What is there instead.
            position: Of who reads.
        """
        if status in (b"changed", b"missing") and not self.connection.in_slots:
            second = self.connection.ask(lambda door: door.command("GET", self.keys.record(1)))
            if number < trimmed_before(second or b""):
                self.raise_compacted(number)
        if status == b"number":
            reason = f"holds {found[0]!r} instead of the number of the last record."
            raise LogCorruptError(reason, source=self.connection.name)
        reasons = {
            b"missing": (
                "the record is not there any more: evicted by a maxmemory policy, or deleted. "
                "Restore the key from a backup; nothing is written to a damaged journal."
            ),
            b"changed": (
                "the record is not the one that was read before: changed, deleted, or of another "
                "journal. Open a new storage to read what is there now."
            ),
            b"beyond": (
                f"the record was written, but {self.keys.number} ends before it: that key was "
                "evicted, deleted or set back. Restore it; nothing is written to a damaged "
                "journal."
            ),
        }
        if status == b"short":
            raise LogReplacedError(
                f"the journal ends with record {number} and had {position.number} records: it "
                "was deleted, or a restart or failover lost the last ones. Open a new storage to "
                "read what is left.",
                source=self.connection.name,
                record_number=max(number + 1, 0),
            )
        error = LogReplacedError if status == b"changed" else LogCorruptError
        raise error(reasons[status], source=self.key_name(number), record_number=number)


def raise_appended(damage: LogCorruptError) -> NoReturn:
    """Damage was found when records had been appended behind it, which nobody can judge now."""
    raise OutcomeUnknownError(
        f"{damage} The records of this call stand behind it; what they mean is known once it is "
        "mended."
    ) from damage


def trimmed_before(line: bytes) -> int:
    """Number of the first record that a trim left, if this is record 1 of a trimmed journal."""
    return int(line[len(TRIMMED) : -1]) if line.startswith(TRIMMED) else 0
