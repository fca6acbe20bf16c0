"""The first record of a compacted journal: what it was before, so that those who read that go on.

To any Optuna the record deletes a study that can't exist, and changes nothing.

Source: docs/formats/journal.md, "Compaction".
"""

from __future__ import annotations

from typing import Final
import uuid
import zlib

import msgspec

from trialstore.log import Marks
from trialstore.records import checksum_matches

WORKER_ID: Final = "trialstore-compaction"
_START: Final = b'{"op_code":1,"study_id":-1,"worker_id":"%s",' % WORKER_ID.encode()


class Head(msgspec.Struct, frozen=True):
    """What a compacted journal says of itself.

    Args:
        of: Names of the journals that it was before, the latest first.
        end: Position in the latest of them after the last record that the lines stand for.
        begin: The same position here; the records from there on are the same in both.
        marks: By ``worker_id``, of the records that the lines stand for.
        token: Makes the record, whose digest names the journal, another than every other one.
    """

    of: list[str]
    end: list[int]
    begin: list[int]
    marks: dict[str, Marks]
    token: str = msgspec.field(default_factory=lambda: uuid.uuid4().hex)


class _Record(msgspec.Struct, frozen=True):
    compacted: Head


def encode_head(head: Head) -> bytes:
    """The record as a line without its newline."""
    body = _START + msgspec.json.encode(_Record(head))[1:-1]
    return b'%s,"crc":"%08x"}' % (body, zlib.crc32(body))


def decode_head(line: bytes) -> Head | None:
    """What the first line of a journal says if it is such a record, and whole."""
    line = line.strip()
    if not line.startswith(_START) or not checksum_matches(line):
        return None
    try:
        return msgspec.json.decode(line, type=_Record).compacted
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
