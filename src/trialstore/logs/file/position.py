"""A place between two records of a journal file: what a cursor says, and how it is known again."""

from __future__ import annotations

from typing import Final, NamedTuple
import zlib

from trialstore.log import START, Cursor

# A cursor knows the last bytes before it again. No record is shorter, so that a repair of the
# line (which only touches what is before the record) does not change them.
MARK_BYTES: Final = 32


class Position(NamedTuple):
    """A cursor.

    Args:
        identity: Digest of the file's first record, as an integer.
        offset: In bytes; the next line begins here.
        number: Of the next record, counted from 0.
        mark: CRC-32 of the last bytes before ``offset``.
    """

    identity: int
    offset: int
    number: int
    mark: int


BEGIN: Final = Position(0, 0, 0, 0)


def position_of(cursor: Cursor) -> Position:
    return BEGIN if cursor is START else Position(*cursor)


def cursor_of(position: Position) -> Cursor:
    return tuple(position) if position.number else START


def mark_of(before: bytes) -> int:
    """The mark of a position, from at least ``MARK_BYTES`` before it, or all there are."""
    return zlib.crc32(before[-MARK_BYTES:])
