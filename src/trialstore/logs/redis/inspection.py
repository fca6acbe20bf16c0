"""What a journal in Redis says about itself: its records as they are, facts, what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from trialstore.findings import Finding
from trialstore.log import START, Cursor, Entry
from trialstore.logs.redis.driver import as_bytes
from trialstore.logs.redis.position import Position
from trialstore.logs.redis.reading import CHUNK_RECORDS, Reader
from trialstore.logs.redis.snapshots import Snapshots

# So many numbers behind the last one are looked at.
_BEYOND_MAX: Final = 1000


def entries(reader: Reader, cursor: Cursor) -> Iterator[Entry]:
    """The records after ``cursor``, as they are; also those that the counter has fallen behind."""
    first = 0 if cursor is START else Position(*cursor).number
    last = reader.connection.ask(reader.last_number)
    for begin in range(first, last + 1, CHUNK_RECORDS):
        numbers = range(begin, min(begin + CHUNK_RECORDS, last + 1))
        with reader.connection.mutex:
            lines = reader.get(numbers)
        for number, line in zip(numbers, lines, strict=True):
            yield Entry(reader.key_name(number), None if line is None else as_bytes(line))
    for number, line in _ahead(reader, last):
        yield Entry(reader.key_name(number), None if line is None else as_bytes(line))


def _ahead(reader: Reader, last: int) -> list[tuple[int, Any]]:
    """Records that stand behind the last one, up to the last of those that exist."""
    first = last + 1
    if 0 <= reader.number_in(reader.keys.complete) <= last:
        # What a killed compaction has left is passed over, and removed by the next one.
        first = max(first, reader.number_in(reader.keys.stale) + 1)
    numbers = range(first, last + 1 + _BEYOND_MAX)
    with reader.connection.mutex:
        found = list(zip(numbers, reader.get(numbers), strict=True))
    while found and found[-1][1] is None:
        found.pop()
    return found


def facts(reader: Reader) -> dict[str, Any]:
    """See ``Described``."""
    stored = reader.connection.ask(lambda door: door.command("STRLEN", reader.keys.snapshot))
    return {
        "kind": "journal in Redis",
        "address": reader.connection.address,
        "prefix": reader.keys.prefix,
        "n_records": reader.connection.ask(reader.last_number) + 1,
        "snapshot_bytes": int(stored) or None,
    }


def findings(reader: Reader, snapshots: Snapshots) -> Iterator[Finding]:
    """See ``Inspectable``: what is beside the records."""
    last = reader.connection.ask(reader.last_number)
    ahead = _ahead(reader, last)
    written = ahead[-1][0] if ahead else reader.number_in(reader.keys.complete)
    if written > last:
        yield Finding(
            "counter-behind",
            reader.connection.name,
            f"The counter says {last}, but there were records up to {written}; new records would "
            "overwrite them.",
        )
    stored = reader.connection.ask(lambda door: door.command("GET", reader.keys.snapshot))
    if stored is not None and snapshots.load() is None:
        yield Finding(
            "snapshot-unusable",
            f"{reader.connection.address} {reader.keys.snapshot}",
            "The snapshot is damaged or of another journal. It is ignored and replaced in "
            "time; nothing is lost.",
            "note",
        )
