"""The snapshot beside a journal file: a hint, ignored wherever it does not fit the journal.

Source: docs/formats/journal.md, "Snapshot".
"""

# Which system calls are made, and in what order, is the subject here; pathlib hides it.
# ruff: noqa: PTH105, PTH108, PTH123

from __future__ import annotations

from collections.abc import Callable
import contextlib
import hashlib
import os
from typing import Final
import zlib

import msgspec

from trialstore.log import Cursor
from trialstore.logs.file import system
from trialstore.logs.file.journal_file import JournalFile
from trialstore.logs.file.position import Position, cursor_of, mark_of, position_of
from trialstore.logs.modes import share_like

# The sidecar: magic, CRC-32 of the header (4 bytes, big endian), length of the header (likewise),
# header (msgpack of _Header), the snapshot as it was given. No JSON and no pickle begins
# with 0xFF.
_MAGIC: Final = b"\xfftrialstore-file-snapshot-1\n"
# How much of the journal before the cursor has to be the same for a snapshot to belong to it.
_TAIL_BYTES: Final = 4096


class _Header(msgspec.Struct, frozen=True, array_like=True):
    """What a snapshot belongs to.

    Args:
        position: The cursor, a ``Position``; its identity names the journal by its first record.
        tail_digest: BLAKE2b of the last ``_TAIL_BYTES`` before the cursor.
        length: Of the snapshot, in bytes.
        checksum: CRC-32 of the snapshot.
    """

    position: Position
    tail_digest: bytes
    length: int
    checksum: int


def path_beside(journal: JournalFile) -> str:
    """Where the snapshot is."""
    return journal.path + ".snapshot"


def save(journal: JournalFile, make: Callable[[], tuple[bytes, Cursor] | None]) -> bool:
    """See ``SnapshotStore``.

    It is for those who may open the journal. It is not synced: a snapshot that a power loss
    leaves half-written is ignored.

    Raises:
        LogUnavailableError: It can't be written; the one before it is still there.
    """
    path = path_beside(journal)
    unfinished = path + ".new"
    # Not under the mutex: an exchange of another thread must not wait for ``make``.
    with journal.unavailable("can't have a snapshot beside it"):
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | system.BINARY, 0o600)
        try:
            if not system.is_only_writer(fd, unfinished, may_be_mixed=True):
                return False
            # It holds what the journal holds. Whoever of the journal's group can't open it, where
            # the group can't be given to it, replays the journal.
            share_like(fd, journal.path)
            made = make()
            prefix = None if made is None else _prefix(journal, *made)
            if made is None or prefix is None:
                os.unlink(unfinished)
                return True
            # Between here and the rename a crash leaves an unfinished file, which nobody
            # reads and the next one overwrites.
            os.ftruncate(fd, 0)
            for part in (prefix, made[0]):
                system.write_all(fd, part)
            os.replace(unfinished, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise
        finally:
            os.close(fd)
    return True


def _prefix(journal: JournalFile, snapshot: bytes, cursor: Cursor) -> bytes | None:
    """What says which journal a snapshot is of; None if the cursor is of another one."""
    position = position_of(cursor)
    with journal.mutex:
        tail_digest = _tail_digest(journal, position) if position.number else None
    if tail_digest is None:
        return None
    header = msgspec.msgpack.encode(
        _Header(position, tail_digest, len(snapshot), zlib.crc32(snapshot))
    )
    return b"".join(
        (
            _MAGIC,
            zlib.crc32(header).to_bytes(4, "big"),
            len(header).to_bytes(4, "big"),
            header,
        )
    )


def load(journal: JournalFile) -> tuple[memoryview, Cursor] | None:
    """See ``SnapshotStore``; None also for one that is damaged or of another journal.

    Raises:
        LogUnavailableError: The journal itself can't be read.
    """
    try:
        with open(path_beside(journal), "rb") as file:
            stored = file.read()
    except OSError:
        return None
    begin = len(_MAGIC) + 8
    if not stored.startswith(_MAGIC) or len(stored) < begin:
        return None
    checksum = int.from_bytes(stored[begin - 8 : begin - 4], "big")
    end = begin + int.from_bytes(stored[begin - 4 : begin], "big")
    if zlib.crc32(stored[begin:end]) != checksum:
        return None
    try:
        header = msgspec.msgpack.decode(stored[begin:end], type=_Header)
    except msgspec.DecodeError:
        return None
    snapshot = memoryview(stored)[end:]
    if len(snapshot) != header.length or zlib.crc32(snapshot) != header.checksum:
        return None
    position = header.position
    with journal.mutex, journal.unavailable("can't be read"):
        if _tail_digest(journal, position) != header.tail_digest:
            return None
    return snapshot, cursor_of(position)


def _tail_digest(journal: JournalFile, position: Position) -> bytes | None:
    """Digest of the journal's bytes before a cursor; None if the cursor is not of it."""
    end = journal.open()
    if position.identity != journal.identity(end) or not 0 < position.offset <= end:
        return None
    count = min(_TAIL_BYTES, position.offset)
    tail = system.pread(journal.fd, count, position.offset - count)
    if mark_of(tail) != position.mark:
        return None
    return hashlib.blake2b(tail, digest_size=16).digest()
