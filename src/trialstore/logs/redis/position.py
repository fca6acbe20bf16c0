"""Where a reader of a journal is: a cursor's inside.

Source: docs/formats/redis.md.
"""

from __future__ import annotations

from typing import Final, NamedTuple

# A cursor knows the last bytes before it again. A record of ours ends with its checksum.
_TAIL_BYTES: Final = 32
# A journal's name is in front of the study's name in the record of a plain Optuna worker.
_IDENTITY_BYTES: Final = 256


class Position(NamedTuple):
    """A cursor.

    Args:
        number: Of the next record, counted from 0.
        tail: The last bytes of the record before it, each as one character.
        identity: Those of record 0, more of them, which name the journal; empty if not known.
    """

    number: int
    tail: str
    identity: str = ""


BEGIN: Final = Position(0, "")


def position_after(position: Position, lines: list[bytes]) -> Position:
    if not lines:
        return position
    identity = position.identity if position.number else identity_of(lines[0])
    return Position(position.number + len(lines), tail_of(lines[-1]), identity)


def identity_of(line: bytes) -> str:
    """Of record 0."""
    return line[-_IDENTITY_BYTES:].decode("latin-1")


def tail_of(line: bytes) -> str:
    return line[-_TAIL_BYTES:].decode("latin-1")
