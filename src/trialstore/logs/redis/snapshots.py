"""Snapshots of a replica, each in a key with a checksum and the position that it stands for.

Source: docs/formats/redis.md, "Snapshots".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple
import zlib

import msgspec

from trialstore.log import START, Cursor, Marks
from trialstore.logs.redis.connection import Connection
from trialstore.logs.redis.driver import as_bytes
from trialstore.logs.redis.locks import Lock
from trialstore.logs.redis.position import Position

# Saving takes seconds. A killed saver keeps the others from saving for so long.
_SAVE_LOCK_S: Final = 300
_SNAPSHOT_MAGIC: Final = b"\xfftrialstore-redis-1\n"


class Snapshots:
    """Those of one journal.

    Args:
        connection: To the server that keeps them.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._keys = connection.keys

    def save(self, make: Callable[[], tuple[bytes, Cursor] | None]) -> bool:
        """See ``SnapshotStore.save_snapshot``."""
        lock = Lock(self._connection, self._keys.lock, _SAVE_LOCK_S)
        with self._connection.mutex:
            if not lock.take():
                return False
        try:
            made = make()
            if made is None or made[1] is START:
                return True
            value = pack(*made)
            with self._connection.mutex:
                # Another saver that comes between these two lines has a snapshot as good.
                if not lock.is_held():
                    return False
                self._connection.check_lengths([value])
                # What is free is the records' as well.
                self._connection.check_memory(2 * len(value))
                self._connection.ask(lambda door: door.command("SET", self._keys.snapshot, value))
            return True
        finally:
            with self._connection.mutex:
                lock.release()

    def load(self) -> tuple[memoryview, Cursor] | None:
        """See ``RedisLog.load_snapshot``."""
        with self._connection.mutex:
            for key in (self._keys.snapshot, self._keys.base):
                stored = self.stored(key)
                if stored is not None:
                    return stored.snapshot, tuple(stored.position)
        return None

    def stored(self, key: str) -> Stored | None:
        """The snapshot in a key; None for bytes that are not ours, or of another journal."""
        value = self._connection.ask(lambda door: door.command("GET", key))
        stored = unpack(value or b"")
        if stored is None:
            return None
        position = stored.position
        expected = [position.identity.encode("latin-1"), position.tail.encode("latin-1")]
        asks = [
            ("GETRANGE", self._keys.record(number), -len(tail), -1)
            for number, tail in zip((0, position.number - 1), expected, strict=True)
        ]
        found = self._connection.ask(lambda door: door.pipeline(asks))
        return stored if [as_bytes(value) for value in found] == expected else None


class Stored(NamedTuple):
    """A snapshot as it is stored, with marks if it stands for trimmed records."""

    snapshot: memoryview
    position: Position
    marks: dict[str, Marks]


def pack(
    snapshot: bytes, cursor: Cursor, marks: Mapping[str, Marks] = MappingProxyType({})
) -> bytes:
    header = msgspec.msgpack.encode((tuple(cursor), zlib.crc32(snapshot), dict(marks)))
    return b"".join((_SNAPSHOT_MAGIC, len(header).to_bytes(4, "big"), header, snapshot))


def unpack(stored: bytes) -> Stored | None:
    """None for anything that is not whole and ours."""
    if not stored.startswith(_SNAPSHOT_MAGIC):
        return None
    begin = len(_SNAPSHOT_MAGIC) + 4
    end = begin + int.from_bytes(stored[begin - 4 : begin], "big")
    try:
        fields, checksum, marks = msgspec.msgpack.decode(
            stored[begin:end], type=tuple[tuple[int, str, str], int, dict[str, Marks]]
        )
        position = Position(*fields)
        (position.tail + position.identity).encode("latin-1")
    except (msgspec.DecodeError, UnicodeEncodeError):
        return None
    snapshot = memoryview(stored)[end:]
    if zlib.crc32(snapshot) != checksum or position.number < 1 or not position.tail:
        return None
    return Stored(snapshot, position, marks)
