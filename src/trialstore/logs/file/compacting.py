"""A compacted journal takes the place of the file, while others go on appending.

Source: docs/formats/journal.md, "Compaction"; rename(2).
"""

# Which system calls are made, and in what order, is the subject here; pathlib hides it.
# ruff: noqa: PTH105, PTH108, PTH116

from __future__ import annotations

from collections.abc import Callable
import contextlib
import errno
import os
import sys
from typing import Final

from trialstore.errors import CompactionRefusedError, LogUnavailableError
from trialstore.log import Compaction
from trialstore.logs.file import system
from trialstore.logs.file.journal_file import CATCH_UP_BYTES, CHUNK_BYTES, JournalFile
from trialstore.logs.file.lines import decode_chunk
from trialstore.logs.file.position import Position, position_of
from trialstore.logs.file.sidecar import path_beside
from trialstore.logs.head import Head, encode_head
from trialstore.logs.modes import share_like

# A new file is written in pieces of so many lines, or as soon as those are so long.
_COPIED_LINES: Final = 4096
_COPIED_BYTES: Final = 1 << 22


def compact(journal: JournalFile, make: Callable[[], Compaction]) -> None:
    """See ``CompactableLog``. A kill at any moment leaves the old file, or the new one.

    Others wait while the last few records are copied, synced and renamed into place.

    Raises:
        LogUnavailableError, LogCorruptError: Nothing was changed.
        CompactionRefusedError: Likewise; the journal's group would be locked out, or the file has
            another name, which would lead to the old one.
    """
    unfinished = journal.path + ".compacting"
    with journal.unavailable("can't be compacted"):
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | system.BINARY, 0o600)
        try:
            if not system.is_only_writer(fd, unfinished, may_be_mixed=False):
                raise LogUnavailableError(f"{journal.path}: somebody else is compacting it.")
            try:
                position = _write_compacted(journal, fd, make())
                if position.number:
                    _put_in_place(journal, fd, position, unfinished)
            finally:
                # Else it is the journal by now, and there may be another one's.
                if system.is_at(fd, unfinished):
                    os.unlink(unfinished)
        finally:
            os.close(fd)


def _write_compacted(journal: JournalFile, fd: int, made: Compaction) -> Position:
    """The new file but for the records after the cursor, which is returned."""
    position = position_of(made.cursor)
    of = [str(position.identity)]
    with journal.mutex:
        if journal.head is not None:
            of += journal.head.of
    end = [position.offset, position.number]
    # Spaces may stand before a record, so room is kept for one whose numbers are not known.
    longest = [sys.maxsize, sys.maxsize]
    room = len(encode_head(Head(of, end, longest, dict(made.marks))))
    os.ftruncate(fd, 0)
    system.write_all(fd, b" " * room + b"\n")
    offset, number = room + 1, 1
    lines: list[bytes] = []
    n_bytes = 0
    for line in made.lines:
        lines.append(line)
        n_bytes += len(line)
        if len(lines) == _COPIED_LINES or n_bytes >= _COPIED_BYTES:
            offset += system.write_all(fd, b"\n".join(lines) + b"\n")
            number, lines, n_bytes = number + len(lines), [], 0
    if lines:
        offset += system.write_all(fd, b"\n".join(lines) + b"\n")
        number += len(lines)
    head = encode_head(Head(of, end, [offset, number], dict(made.marks)))
    system.pwrite(fd, head.rjust(room), 0)
    return position


def _put_in_place(journal: JournalFile, fd: int, position: Position, unfinished: str) -> None:
    """Let the new file take the place of the journal, with what came after ``position``."""
    with journal.mutex:
        if os.stat(journal.path).st_nlink > 1:
            raise CompactionRefusedError(
                f"{journal.path}: the file has more names than this one (hard links), under which "
                "the old one would be kept and written to. Remove them first."
            )
        if not share_like(fd, journal.path):
            raise CompactionRefusedError(
                f"{journal.path}: its group has rights that this user can't give to the new file, "
                "and would be locked out. Let a member of the group compact it."
            )
        n_copied = sys.maxsize
        while n_copied > CATCH_UP_BYTES:
            # Nobody waits for the bulk of it, and each round leaves less.
            _, after = journal.read_unlocked(position, decode_chunk)
            n_copied = _copy(journal, fd, position, after)
            system.sync_fd(fd)
            position = after
        journal.acquire()
        try:
            _, after, _ = journal.read(position, journal.open(), decode_chunk)
            journal.check_writable()
            _copy(journal, fd, position, after)
            system.sync_fd(fd)
            if not system.is_at(fd, unfinished):
                raise OSError(errno.ENOENT, "was removed", unfinished)
            if os.name == "nt":
                journal.release_descriptor()  # what is open can't be replaced there
            os.replace(unfinished, journal.path)
            # A crash before the sync may bring the old file back, in which nothing is missing
            # as long as nobody could append to the new one.
            system.sync_folder(journal.path)
            _copy_late(journal, after)
            with contextlib.suppress(OSError):
                os.unlink(path_beside(journal))  # of the old file
        finally:
            journal.release()
            journal.close()


def _copy(journal: JournalFile, fd: int, begin: Position, end: Position) -> int:
    """Append the journal's bytes between two positions to the new file; returns how many."""
    if end.identity != begin.identity:
        raise journal.replaced(begin)
    offset = begin.offset
    while offset < end.offset:
        chunk = system.pread(journal.fd, min(CHUNK_BYTES, end.offset - offset), offset)
        offset += system.write_all(fd, chunk)
    return end.offset - begin.offset


def _copy_late(journal: JournalFile, after: Position) -> None:
    """What a holder of the lock who was evicted appended to the old file meanwhile.

    One that comes later still sees that the file was replaced; see ``JournalFile.append``.
    """
    if journal.fd < 0:
        return
    late = b"".join(journal.whole_lines(after.offset, os.fstat(journal.fd).st_size))
    late = late[: late.rfind(b"\n") + 1]
    if late:
        fd = os.open(journal.path, os.O_WRONLY | os.O_APPEND | system.BINARY)
        try:
            system.write_all(fd, late)
            system.sync_fd(fd)
        finally:
            os.close(fd)
