"""The exchange with a cluster whose prefix has no hash tag: several requests, not one script.

A crash after the reservation leaves holes, one in the middle of the writing leaves some of the
records and holes; the caller was told neither. ``reading.py`` has what becomes of holes.

Source: docs/formats/redis.md; Redis "Cluster specification".
"""

from __future__ import annotations

import functools
from typing import Any, Final

from trialstore.errors import LogCorruptError, OutcomeUnknownError
from trialstore.logs.redis.doors import Door, send
from trialstore.logs.redis.driver import as_bytes
from trialstore.logs.redis.position import Position
from trialstore.logs.redis.reading import ANSWER_RECORDS, Reader, raise_appended

# Taken only if nobody has taken it since; what a cluster with a plain prefix does on a condition.
_RESERVE_SCRIPT: Final = (
    "if (redis.call('GET', KEYS[1]) or '-1') ~= ARGV[1] then return 0 end "
    "redis.call('SET', KEYS[1], ARGV[2]) return 1"
)


class ByHand:
    """What ``exchange.lua`` does in one step, in several.

    Args:
        reader: Of the journal.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._connection = reader.connection
        self._keys = reader.keys

    def exchange(
        self, lines: list[bytes], position: Position, alone: bool
    ) -> tuple[list[bytes], bool]:
        """Append lines and read what is new after ``position``, they included.

        Args:
            lines: Each unique.
            position: Where the caller is.
            alone: Append only if nothing is new.

        Raises:
            OutcomeUnknownError: Others filled a part of the numbers meanwhile, or a record before
                them was lost.
            LogCorruptError, LogReplacedError: As ``RedisLog.exchange``.

        Returns:
            The news, and whether there is more.
        """
        last = self._check(position)
        if not lines and last - position.number >= ANSWER_RECORDS:
            return self._reader.read(position.number, position.number + ANSWER_RECORDS - 1), True
        news = self._reader.read(position.number, last)
        while lines:
            number = position.number + len(news)
            # Nobody is told of a reservation whose answer is lost; it becomes a hole.
            if not alone:
                last = self._connection.ask(functools.partial(self._reserve, count=len(lines)))
            elif not news and self._reserve_after(number - 1, len(lines)):
                last = number - 1 + len(lines)
            else:
                last = self._connection.ask(self._reader.last_number)
                return news + self._reader.read(number, last), False
            end, first = last + 1, last + 1 - len(lines)
            if first < number:
                # The number was lost since it was looked at, and the reservation began it anew.
                self._reader.raise_damaged(b"beyond", number - 1, [], position)
            commands: list[tuple[Any, ...]] = [
                ("SET", self._keys.record(first + index), line, "NX")
                for index, line in enumerate(lines)
            ]
            # What was read before was there; a hint, so it need not be exact.
            commands.append(("SET", self._keys.complete, number - 1))
            self._connection.ask(functools.partial(send, commands=commands), appends=True)
            try:
                found = self._reader.read(number, end - 1)
            except LogCorruptError as damage:
                raise_appended(damage)
            news += found
            mine = found[len(found) - len(lines) :]
            kept = sum(line == own for line, own in zip(mine, lines, strict=True))
            if mine[:kept] != lines[:kept] or (alone and 0 < kept < len(lines)):
                raise OutcomeUnknownError(
                    f"{self._connection.address}: this writer was stopped for so long in the "
                    "middle of a batch that others filled some of its records, "
                    f"{self._keys.record(first)} and later ones. The rest of them count."
                )
            # Filled, all or the last ones: they were given up in this place, and get another.
            lines = lines[kept:]
        return news, False

    def _reserve(self, door: Door, count: int) -> int:
        """Take the next numbers; returns the last of them."""
        door.command("SET", self._keys.number, -1, "NX")
        return int(door.command("INCRBY", self._keys.number, count))

    def _reserve_after(self, last: int, count: int) -> bool:
        """Take the next numbers, unless somebody has taken any after ``last``."""
        command = ("EVAL", _RESERVE_SCRIPT, 1, self._keys.number, last, last + count)
        return bool(self._connection.ask(lambda door: door.command(*command)))

    def _check(self, position: Position) -> int:
        """What the script checks before anything else; returns the number of the last record."""
        tail = position.tail.encode("latin-1")
        last = self._connection.ask(self._reader.last_number)
        if position.number > last + 1:
            self._reader.raise_damaged(b"short", last, [], position)
        before = position.number - 1
        if tail:
            ask = ("GETRANGE", self._keys.record(before), -len(tail), -1)
            found = self._connection.ask(lambda door: door.command(*ask))
            if as_bytes(found) != tail:
                self._reader.raise_damaged(b"changed", before, [], position)
        first = ("EXISTS", self._keys.record(0))
        if last < 0 and self._connection.ask(lambda door: door.command(*first)):
            # Everybody reserves before writing, so the number says something about a record only
            # if it is read after the record was seen: the first writer may have come in between.
            last = self._connection.ask(self._reader.last_number)
            if last < 0:
                self._reader.raise_damaged(b"beyond", 0, [], position)
        return last
