"""A journal in one file: append under the lock, sync, and read without it.

What a crash may leave behind, and why nothing that was acknowledged is lost:

* A record counts once its newline is in the file, and is acknowledged after that (and after the
  sync). Bytes after the last newline, the *torn tail*, were therefore acknowledged by nobody.
  Readers leave them alone. The next appender overwrites them with spaces, which JSON allows
  before a record, and goes on in the same line. The file never becomes shorter.
* A plain Optuna worker appends behind a torn tail as if it were not there. Such a *glued* line is
  read as the whole record at its end, and its torn prefix overwritten by the next appender.
* Every write is either one ``O_APPEND`` of whole lines, or spaces over bytes that count for
  nothing, or bytes over themselves. None of them harms if the lock was lost in the meantime.
* Anything else that does not decode is damage. It is reported with file, offset and record
  number, and nothing is written to a damaged file.

Source: docs/formats/journal.md; Optuna ``JournalFileBackend``; open(2), write(2), fsync(2).
"""

# Which system calls are made, and in what order, is the subject here; pathlib hides it.
# ruff: noqa: PTH100, PTH105, PTH108, PTH116, PTH120, PTH123

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import errno
import gc
import hashlib
import json
import logging
import math
import os
import stat
import sys
import threading
from typing import Any, Final, Literal, NamedTuple, TypeVar
import weakref
import zlib

import msgspec
from optuna.storages.journal import BaseJournalBackend
from optuna.storages.journal._file import BaseJournalFileLock

from trialstore.errors import (
    LogCompactedError,
    LogCorruptError,
    LogReplacedError,
    LogUnavailableError,
    OutcomeUnknownError,
)
from trialstore.findings import Finding
from trialstore.log import START, Base, Batch, Compaction, Cursor, Decide, Entry, Wanted
from trialstore.logs.beats import Beats
from trialstore.logs.filelock import JournalFileSymlinkLock, file_system_is_local
from trialstore.logs.head import Head, decode_head, encode_head
from trialstore.records import (
    RECORD_START,
    AnyOperation,
    checksum_matches,
    checksums_match,
    counts_for_nothing,
    decode_line,
    decode_lines,
    encode_dict,
    encode_line,
    must_be_durable,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# Large enough that a call per chunk costs nothing, small enough that one odd line (NaN, a torn
# prefix) does not send very many good ones down the slow path with it.
_CHUNK_BYTES: Final = 1 << 18
# Records take more room than their lines. An answer of this size is applied before the next one is
# decoded, so that they lie in the same memory again and not between the trials of a replica.
_ANSWER_BYTES: Final = 1 << 18
# A cursor knows the last bytes before it again. No record is shorter, so that a repair of the
# line (which only touches what is before the record) does not change them.
_MARK_BYTES: Final = 32
# More than this behind, a worker catches up before it takes the lock.
_CATCH_UP_BYTES: Final = 1 << 16
# How many places are remembered for those who read through Optuna's two methods.
_READ_POSITIONS_MAX: Final = 16
# A new file is written in pieces of so many lines.
_COPIED_LINES: Final = 4096
# With less space than this, a batch is first written so that it does not count.
_SPACE_LOW_BYTES: Final = 1 << 24
# What has not been synced is kept, to be written again if a sync fails; so much of it at most.
_UNSYNCED_BYTES_MAX: Final = 1 << 22

_BINARY: Final = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)

# The sidecar: magic, CRC-32 of the header (4 bytes, big endian), length of the header (likewise),
# header (msgpack of _SnapshotHeader), the snapshot as it was given. No JSON and no pickle begins
# with 0xFF.
_SNAPSHOT_MAGIC: Final = b"\xfftrialstore-file-snapshot-1\n"
# How much of the journal before the cursor has to be the same for a snapshot to belong to it.
_SNAPSHOT_TAIL_BYTES: Final = 4096

# --- system calls --------------------------------------------------------------------------------


def sync_fd(fd: int) -> None:
    """Every sync of this module; returns when the bytes written to ``fd`` survive power loss."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    elif hasattr(os, "fdatasync"):
        os.fdatasync(fd)  # leaves out the times only; the size of the file is data
    else:
        os.fsync(fd)


def _sync_folder(path: str) -> None:
    """Make the file's entry in its folder survive power loss."""
    if os.name == "nt":
        return
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync_fd(fd)
    finally:
        os.close(fd)


def _is_only_writer(fd: int, path: str, *, may_be_mixed: bool) -> bool:
    """Whether nobody else writes the file just opened; closing ``fd`` lets the next one in.

    Args:
        may_be_mixed: A mixture of two, where there is no flock, is noticed by its checksum.

    Raises:
        OSError: There is no flock, and that would be needed.
    """
    if fcntl is None:
        return True  # two at once would each fail to rename what the other has open
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if not may_be_mixed:
            raise
    # The file may have been finished and renamed between our opening and locking it; to write it
    # now would be to write into a snapshot in use.
    return _is_at(fd, path)


def _is_at(fd: int, path: str) -> bool:
    """Whether the open file is the one at the path."""
    try:
        there, ours = os.stat(path), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _pread(fd: int, count: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(fd, count, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, count)


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    if not hasattr(os, "pwrite"):
        os.lseek(fd, offset, os.SEEK_SET)
        os.write(fd, data)
        return
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _write_all(fd: int, data: bytes | memoryview) -> int:
    """All of it, and how many bytes that is."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)


def _without_collections(chunks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """The chunks; over many bytes with the garbage collector paused.

    Nothing decoded from a line is garbage or part of a cycle, and the collector would look at
    each record many times: it doubled the time of a replay.
    """
    if count < _CHUNK_BYTES or not gc.isenabled():
        yield from chunks
        return
    gc.disable()
    try:
        yield from chunks
    finally:
        gc.enable()


# --- lines ---------------------------------------------------------------------------------------


def _decode_checked(line: bytes, decode: Callable[[bytes], _T]) -> _T:
    """What a line without its newline says. Raises ValueError, also for a wrong checksum."""
    line = line.lstrip(b" ")
    if checksum_matches(line) is False:
        raise ValueError("the checksum does not match")
    return decode(line)


def _glued_at(line: bytes) -> int:
    """Where the one whole record of a line with a torn prefix begins; 0 if it is no such line."""
    for start in RECORD_START.finditer(line, 1):
        try:
            _decode_checked(line[start.start() :], decode_line)
        except (ValueError, RecursionError):
            continue
        return start.start() if counts_for_nothing(line[: start.start()]) else 0
    return 0


class _Position(NamedTuple):
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


_BEGIN: Final = _Position(0, 0, 0, 0)


class _Lines(NamedTuple):
    """What is appended in one write.

    Args:
        data: Whole lines.
        decoded: What a reader will make of them; to find that out later would be too late.
        durable: They have to be synced.
    """

    data: bytes
    decoded: list[Any]
    durable: bool


class _SnapshotHeader(msgspec.Struct, frozen=True, array_like=True):
    """What a snapshot belongs to.

    Args:
        position: The cursor, a ``_Position``; its identity names the journal by its first record.
        tail_digest: BLAKE2b of the last ``_SNAPSHOT_TAIL_BYTES`` before the cursor.
        length: Of the snapshot, in bytes.
        checksum: CRC-32 of the snapshot.
    """

    position: _Position
    tail_digest: bytes
    length: int
    checksum: int


_logs: weakref.WeakSet[FileLog] = weakref.WeakSet()


class FileLog(BaseJournalBackend):
    """A journal file as a ``Log``, and as a backend for Optuna's own ``JournalStorage``.

    Args:
        file_path: Path of the journal; created if it does not exist.
        lock_obj: What every process that appends to the file takes before it does; by default a
            ``JournalFileSymlinkLock``. Optuna's lock classes, or one of your own, work as well.
        durability: "full" survives power loss; "process" only the death of processes.

    Raises:
        LogUnavailableError: The file can't be opened or created.
    """

    def __init__(
        self,
        file_path: str,
        lock_obj: BaseJournalFileLock | None = None,
        *,
        durability: Literal["full", "process"] = "full",
    ) -> None:
        if durability not in ("full", "process"):
            raise ValueError(f"durability must be 'full' or 'process', not {durability!r}.")
        # A later chdir must not make two files of one.
        self._path = os.path.abspath(os.fspath(file_path))
        self._lock = lock_obj if lock_obj is not None else JournalFileSymlinkLock(self._path)
        self._durability = durability
        self._beats = self._make_beats()
        self._begin()
        with self._unavailable("can't be opened"):
            self._open(create=True)

    def _begin(self) -> None:
        """The state of a log that has nothing open in this process."""
        self._mutex = threading.RLock()
        self._fd = -1
        self._writable = False
        self._local = False
        self._inode: tuple[int, int] | None = None
        self._identity = 0
        self._head: Head | None = None  # known with the identity
        self._glued: set[tuple[int, int]] = set()  # (offset, length) of torn prefixes
        self._unsynced: list[tuple[int, bytes]] = []  # (offset, what we wrote there)
        self._sync_failed = False
        self._read_positions: dict[int, _Position] = {}  # for read_logs, by record number
        _logs.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self._path, "lock": self._lock, "durability": self._durability}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._path = state["path"]
        self._lock = state["lock"]
        self._durability = state["durability"]
        self._beats = self._make_beats()
        self._begin()

    def _make_beats(self) -> Beats:
        return Beats(self._path, _sync_folder if self._durability == "full" else None)

    def __del__(self) -> None:
        fd = getattr(self, "_fd", -1)
        if fd >= 0:
            os.close(fd)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._path!r})"

    @property
    def path(self) -> str:
        """Absolute path of the journal."""
        return self._path

    # --- Log ---------------------------------------------------------------------------------

    def exchange(self, records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``Log.exchange``. Without records it takes no lock.

        Raises:
            LogUnavailableError: The file or its lock can't be opened or written; nothing counts.
            OutcomeUnknownError: A sync failed, or the disk was full in the middle of a batch.
            LogCorruptError: Damage before the tail. Nothing was appended.
            LogReplacedError: The file is not the one that ``cursor`` comes from.
        """
        with self._mutex:
            position = _position_of(cursor)
            if not records:
                before = position
                news, position = self._read_unlocked(position, _decode_chunk, _ANSWER_BYTES)
                # The offsets of two files are not compared: look once more.
                moved = before.number and position.identity != before.identity
                more = moved or position.offset - before.offset >= _ANSWER_BYTES
                return Batch(None, news, _cursor_of(position), bool(more))
            lines = self._lines_of(records)
            self._beats.cover(records)

            def lines_of(seen: list[Any], position: _Position) -> _Lines | None:
                fresh = _without(records, seen)
                if len(fresh) < len(records):
                    return self._lines_of(fresh) if fresh else None
                return lines

            seen, own, position = self._append(lines_of, position, _decode_chunk)
            return Batch(None, seen + own, _cursor_of(position))

    def _lines_of(self, records: Sequence[AnyOperation]) -> _Lines:
        data = b"".join(map(encode_line, records))
        durable = self._durability == "full" and must_be_durable(list(records))
        return _Lines(data, _decode_chunk(None, data, 0, 0), durable)

    def close(self) -> None:
        """Close the file; a later call opens it again."""
        with self._mutex:
            self._close()
            self._inode = None  # without our descriptor, another file may get its number

    # --- ConditionalLog ----------------------------------------------------------------------

    def exchange_if(self, decide: Decide, cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``ConditionalLog``; ``decide`` runs once, under the lock of the file.

        Raises:
            As ``exchange``.
        """

        def lines_of(news: list[Any], position: _Position) -> _Lines | None:
            records = decide(news, _cursor_of(position))
            self._beats.cover(records)
            return self._lines_of(records) if records else None

        with self._mutex:
            _, own, position = self._append(lines_of, _position_of(cursor), _decode_chunk)
            return Batch(None, own, _cursor_of(position))

    # --- LeaseStore --------------------------------------------------------------------------
    # Beside the journal, without its lock.

    def take_lease(self, owner: str) -> None:
        """See ``LeaseStore``."""
        self._beats.take_lease(owner)

    def renew_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``."""
        self._beats.renew_lease(owner, trial_ids)

    def withdraw_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``."""
        self._beats.withdraw_lease(owner, trial_ids)

    def expired(
        self, study_id: int, running: Mapping[int, str], grace_period_s: float
    ) -> Sequence[int]:
        """See ``LeaseStore``."""
        return self._beats.expired(study_id, running, grace_period_s)

    # --- Optuna's backend --------------------------------------------------------------------

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """The records from a number on, as Optuna's ``JournalStorage`` replays them.

        Raises:
            LogUnavailableError, LogCorruptError: As for ``exchange``.
        """
        with self._mutex:
            begin = self._read_positions.get(log_number_from, _BEGIN)
            logs, position = self._read_unlocked(begin, _decode_dicts)
            # Optuna counts from where it began to read, and a compaction changes the numbers.
            moved = begin.number and position.identity != begin.identity
            if moved or (log_number_from > begin.number and self._head is not None):
                self._read_positions.clear()
                raise self._replaced(begin)
            self._note_read(position)
            return logs[log_number_from - begin.number :]

    def _note_read(self, position: _Position) -> None:
        """Several storages may read through one backend."""
        self._read_positions.pop(position.number, None)
        self._read_positions[position.number] = position
        if len(self._read_positions) > _READ_POSITIONS_MAX:
            del self._read_positions[next(iter(self._read_positions))]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records; durable on return.

        Raises:
            LogUnavailableError, OutcomeUnknownError, LogCorruptError: As for ``exchange``.
        """
        if not logs:
            return
        data = b"".join(map(encode_dict, logs))
        lines = _Lines(data, _decode_dicts(None, data, 0, 0), self._durability == "full")
        with self._mutex:
            position = next(reversed(self._read_positions.values()), _BEGIN)
            if position is _BEGIN:
                _, position = self._read_unlocked(position, _decode_dicts)
            self._append(lambda seen, position: lines, position, _decode_dicts)

    # --- SnapshotStore -----------------------------------------------------------------------

    def save_snapshot(self, make: Callable[[], tuple[bytes, Cursor] | None]) -> bool:
        """See ``SnapshotStore``.

        It is not synced: a snapshot that a power loss leaves half-written is ignored.

        Raises:
            LogUnavailableError: It can't be written; the one before it is still there.
        """
        unfinished = self._snapshot_path + ".new"
        # Not under the mutex: an exchange of another thread must not wait for ``make``.
        with self._unavailable("can't have a snapshot beside it"):
            fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | _BINARY, 0o666)
            try:
                if not _is_only_writer(fd, unfinished, may_be_mixed=True):
                    return False
                made = make()
                prefix = None if made is None else self._snapshot_prefix(*made)
                if made is None or prefix is None:
                    os.unlink(unfinished)
                    return True
                # Between here and the rename a crash leaves an unfinished file, which nobody
                # reads and the next one overwrites.
                os.ftruncate(fd, 0)
                for part in (prefix, made[0]):
                    _write_all(fd, part)
                os.replace(unfinished, self._snapshot_path)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(unfinished)
                raise
            finally:
                os.close(fd)
        return True

    def _snapshot_prefix(self, snapshot: bytes, cursor: Cursor) -> bytes | None:
        """What says which journal a snapshot is of; None if the cursor is of another one."""
        position = _position_of(cursor)
        with self._mutex:
            tail_digest = self._tail_digest(position) if position.number else None
        if tail_digest is None:
            return None
        header = msgspec.msgpack.encode(
            _SnapshotHeader(position, tail_digest, len(snapshot), zlib.crc32(snapshot))
        )
        return b"".join(
            (
                _SNAPSHOT_MAGIC,
                zlib.crc32(header).to_bytes(4, "big"),
                len(header).to_bytes(4, "big"),
                header,
            )
        )

    def load_snapshot(self) -> tuple[memoryview, Cursor] | None:
        """See ``SnapshotStore``; None also for one that is damaged or of another journal.

        Raises:
            LogUnavailableError: The journal itself can't be read.
        """
        try:
            with open(self._snapshot_path, "rb") as file:
                stored = file.read()
        except OSError:
            return None
        begin = len(_SNAPSHOT_MAGIC) + 8
        if not stored.startswith(_SNAPSHOT_MAGIC) or len(stored) < begin:
            return None
        checksum = int.from_bytes(stored[begin - 8 : begin - 4], "big")
        end = begin + int.from_bytes(stored[begin - 4 : begin], "big")
        if zlib.crc32(stored[begin:end]) != checksum:
            return None
        try:
            header = msgspec.msgpack.decode(stored[begin:end], type=_SnapshotHeader)
        except msgspec.DecodeError:
            return None
        snapshot = memoryview(stored)[end:]
        if len(snapshot) != header.length or zlib.crc32(snapshot) != header.checksum:
            return None
        position = header.position
        with self._mutex, self._unavailable("can't be read"):
            if self._tail_digest(position) != header.tail_digest:
                return None
        return snapshot, _cursor_of(position)

    # --- Entries and Inspectable -------------------------------------------------------------

    def entries(self) -> Iterator[Entry]:
        """See ``Entries``.

        Raises:
            LogUnavailableError: The file can't be read.
        """
        with self._mutex, self._unavailable("can't be read"):
            end = self._open()
            offset = number = 0
            for lines in self._whole_lines(0, end):
                parts = lines.split(b"\n")
                for index, line in enumerate(parts):
                    ended = index < len(parts) - 1
                    if ended or line:
                        where = f"{self._path}, record {number}, byte offset {offset}"
                        yield Entry(where, line, ended)
                    offset += len(line) + ended
                    number += 1
                number -= 1

    def facts(self) -> dict[str, Any]:
        """See ``Described``."""
        return {
            "kind": "journal in a file",
            "address": self._path,
            "size_bytes": self._open(),
            "snapshot_bytes": _size(self._snapshot_path),
            "file_system_is_local": self._local,
        }

    def findings(self, *, deep: bool) -> Iterator[Finding]:
        """See ``Inspectable``: what is beside the journal."""
        if _size(self._snapshot_path) is not None and self.load_snapshot() is None:
            yield Finding(
                "snapshot-unusable",
                self._snapshot_path,
                "The snapshot is damaged or of another journal. It is ignored and replaced in "
                "time; nothing is lost.",
                "note",
            )

    @property
    def _snapshot_path(self) -> str:
        return self._path + ".snapshot"

    def _tail_digest(self, position: _Position) -> bytes | None:
        """Digest of the journal's bytes before a cursor; None if the cursor is not of it."""
        end = self._open()
        if not self._identity:
            self._identity = self._read_identity(end)
        if position.identity != self._identity or not 0 < position.offset <= end:
            return None
        count = min(_SNAPSHOT_TAIL_BYTES, position.offset)
        tail = _pread(self._fd, count, position.offset - count)
        if zlib.crc32(tail[-_MARK_BYTES:]) != position.mark:
            return None
        return hashlib.blake2b(tail, digest_size=16).digest()

    # --- CompactableLog ----------------------------------------------------------------------

    def load_base(self) -> Base:
        """See ``CompactableLog``."""
        with self._mutex, self._unavailable("can't be read"):
            end = self._open()
            if not self._identity:
                self._identity = self._read_identity(end)
            return Base(self._head.marks if self._head is not None else {})

    def compact(self, make: Callable[[], Compaction]) -> None:
        """See ``CompactableLog``. A kill at any moment leaves the old file, or the new one.

        Others wait while the last few records are copied, synced and renamed into place.

        Raises:
            LogUnavailableError, LogCorruptError: Nothing was changed.
        """
        unfinished = self._path + ".compacting"
        with self._unavailable("can't be compacted"):
            fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | _BINARY, 0o600)
            try:
                if not _is_only_writer(fd, unfinished, may_be_mixed=False):
                    raise LogUnavailableError(f"{self._path}: somebody else is compacting it.")
                try:
                    position = self._write_compacted(fd, make())
                    if position.number:
                        self._put_in_place(fd, unfinished, position)
                finally:
                    # Else it is the journal by now, and there may be another one's.
                    if _is_at(fd, unfinished):
                        os.unlink(unfinished)
            finally:
                os.close(fd)

    def _write_compacted(self, fd: int, made: Compaction) -> _Position:
        """The new file but for the records after the cursor, which is returned."""
        position = _position_of(made.cursor)
        of = [str(position.identity)]
        with self._mutex:
            if self._head is not None:
                of += self._head.of
        end = [position.offset, position.number]
        # Spaces may stand before a record, so room is kept for one whose numbers are not known.
        longest = [sys.maxsize, sys.maxsize]
        room = len(encode_head(Head(of, end, longest, dict(made.marks))))
        os.ftruncate(fd, 0)
        _write_all(fd, b" " * room + b"\n")
        offset, number = room + 1, 1
        lines: list[bytes] = []
        for line in made.lines:
            lines.append(line)
            if len(lines) == _COPIED_LINES:
                offset += _write_all(fd, b"\n".join(lines) + b"\n")
                number, lines = number + len(lines), []
        if lines:
            offset += _write_all(fd, b"\n".join(lines) + b"\n")
            number += len(lines)
        head = encode_head(Head(of, end, [offset, number], dict(made.marks)))
        _pwrite(fd, head.rjust(room), 0)
        return position

    def _put_in_place(self, fd: int, unfinished: str, position: _Position) -> None:
        """Let the new file take the place of the journal, with what came after ``position``."""
        with self._mutex:
            status = os.stat(self._path)
            if hasattr(os, "fchmod"):
                os.fchmod(fd, stat.S_IMODE(status.st_mode))
                with contextlib.suppress(PermissionError):
                    os.fchown(fd, status.st_uid, status.st_gid)
            n_copied = sys.maxsize
            while n_copied > _CATCH_UP_BYTES:
                # Nobody waits for the bulk of it, and each round leaves less.
                _, after = self._read_unlocked(position, _decode_chunk)
                n_copied = self._copy(fd, position, after)
                sync_fd(fd)
                position = after
            self._acquire()
            try:
                _, after, _ = self._read(position, self._open(), _decode_chunk)
                self._check_writable()
                self._copy(fd, position, after)
                sync_fd(fd)
                if not _is_at(fd, unfinished):
                    raise OSError(errno.ENOENT, "was removed", unfinished)
                if os.name == "nt":
                    self._close()  # what is open can't be replaced there
                os.replace(unfinished, self._path)
                # A crash before the sync may bring the old file back, in which nothing is missing
                # as long as nobody could append to the new one.
                _sync_folder(self._path)
                self._copy_late(after)
                with contextlib.suppress(OSError):
                    os.unlink(self._snapshot_path)  # of the old file
            finally:
                self._release()
                self.close()

    def _copy(self, fd: int, begin: _Position, end: _Position) -> int:
        """Append the journal's bytes between two positions to the new file; returns how many."""
        if end.identity != begin.identity:
            raise self._replaced(begin)
        offset = begin.offset
        while offset < end.offset:
            chunk = _pread(self._fd, min(_CHUNK_BYTES, end.offset - offset), offset)
            offset += _write_all(fd, chunk)
        return end.offset - begin.offset

    def _copy_late(self, after: _Position) -> None:
        """What a holder of the lock who was evicted appended to the old file meanwhile.

        One that comes later still sees that the file was replaced; see ``_append``.
        """
        if self._fd < 0:
            return
        late = b"".join(self._whole_lines(after.offset, os.fstat(self._fd).st_size))
        late = late[: late.rfind(b"\n") + 1]
        if late:
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | _BINARY)
            try:
                _write_all(fd, late)
                sync_fd(fd)
            finally:
                os.close(fd)

    # --- reading -----------------------------------------------------------------------------

    def _read_unlocked(
        self, position: _Position, decode: _Decode[_T], bytes_max: float = math.inf
    ) -> tuple[list[_T], _Position]:
        """Everything whole after ``position``, as of a moment after the call.

        Args:
            bytes_max: Stop soon after so many bytes.
        """
        with self._unavailable("can't be read"):
            try:
                end = self._open()
                news, position, _ = self._read(position, end, decode, bytes_max)
                return news, position
            except LogReplacedError:
                raise
            except LogCorruptError:
                # A repair in progress, or another machine's write of which half has arrived, may
                # look like damage to those who do not wait. Nobody writes while we hold the lock.
                try:
                    self._acquire()
                except LogUnavailableError:
                    _logger.debug("Damage seen without the lock, which can't be taken.")
                else:
                    try:
                        end = self._open()
                        news, position, _ = self._read(position, end, decode, bytes_max)
                        return news, position
                    finally:
                        self._release()
                raise

    def _read(
        self,
        position: _Position,
        end: int,
        decode: _Decode[_T],
        bytes_max: float = math.inf,
    ) -> tuple[list[_T], _Position, bytes]:
        """Whole records between ``position`` and byte ``end``, where they lead, and the tail."""
        position = self._here(position, end)
        _, offset, number, mark = position
        if number and end < offset:
            raise self._replaced(position)
        if number and end == offset and self._local:
            return [], position, b""
        news: list[_T] = []
        lead = min(_MARK_BYTES, offset)
        last = _pread(self._fd, lead, offset - lead) if offset else b""
        if offset and zlib.crc32(last) != mark:
            raise self._replaced(position)
        tail = b""
        for lines in _without_collections(self._whole_lines(offset, end), end - offset):
            if not lines.endswith(b"\n"):
                tail = lines
                break
            found = decode(self, lines, offset, number)
            news += found
            number += len(found)
            offset += len(lines)
            last = lines[-_MARK_BYTES:] if len(lines) >= _MARK_BYTES else last + lines
            if offset - position.offset >= bytes_max:
                break
        if tail and not counts_for_nothing(tail):
            raise self._corrupt("a record without its newline", offset, number)
        if not number:
            return news, _BEGIN, tail
        mark = zlib.crc32(last[-_MARK_BYTES:])
        return news, _Position(self._identity, offset, number, mark), tail

    def _here(self, position: _Position, end: int) -> _Position:
        """A cursor as one of the file at the path, also if that was compacted since.

        Raises:
            LogCompactedError: It is in the middle of what was compacted.
            LogReplacedError: It is of another journal.
        """
        if not self._identity:
            self._identity = self._read_identity(end)
        if not position.number or position.identity == self._identity:
            return position
        head = self._head
        if head is None or str(position.identity) not in head.of:
            raise self._replaced(position)
        end_offset, end_number = head.end
        if str(position.identity) != head.of[0] or position.number < end_number:
            raise LogCompactedError(
                "the journal was compacted behind what was read; read it anew",
                source=self._path,
                record_number=position.number,
            )
        begin, number = head.begin
        offset, mark = begin + position.offset - end_offset, position.mark
        if position.number == end_number:
            mark = zlib.crc32(_pread(self._fd, _MARK_BYTES, offset - _MARK_BYTES))
        return _Position(self._identity, offset, number + position.number - end_number, mark)

    def _whole_lines(self, offset: int, end: int) -> Iterator[bytes]:
        """Chunks of whole lines, and at last what no newline ends, if there is any."""
        parts: list[bytes] = []
        while offset < end:
            chunk = _pread(self._fd, min(_CHUNK_BYTES, end - offset), offset)
            if not chunk:
                break
            offset += len(chunk)
            cut = chunk.rfind(b"\n") + 1
            if not cut:
                parts.append(chunk)
                continue
            yield b"".join((*parts, chunk[:cut]))
            parts = [chunk[cut:]] if cut < len(chunk) else []
        if parts:
            yield b"".join(parts)

    def _decode_lines_one_by_one(
        self, lines: bytes, offset: int, number: int, decode: Callable[[bytes], _T]
    ) -> list[_T]:
        """Decode lines of which some are odd; notes those with a torn prefix.

        Raises:
            LogCorruptError: One holds no record.
        """
        decoded: list[_T] = []
        for line in lines.split(b"\n")[:-1]:
            try:
                decoded.append(_decode_checked(line, decode))
            except (ValueError, RecursionError) as error:
                begin = _glued_at(line)
                if not begin:
                    raise self._corrupt(str(error), offset, number + len(decoded)) from error
                self._glued.add((offset, begin))
                decoded.append(decode(line[begin:]))
            offset += len(line) + 1
        return decoded

    def _read_identity(self, end: int) -> int:
        """A digest of the first record; 0 while there is none."""
        for lines in self._whole_lines(0, end):
            if not lines.endswith(b"\n"):
                return 0
            line = lines[: lines.index(b"\n")].lstrip(b" ")
            self._head = decode_head(line)
            # A repair overwrites a torn prefix; the identity must not depend on it.
            if line[:1] != b"{" or RECORD_START.search(line, 1):
                line = line[_glued_at(line) :]
            return int.from_bytes(hashlib.blake2b(line, digest_size=7).digest(), "big") or 1
        return 0

    # --- appending ---------------------------------------------------------------------------

    def _append(
        self,
        lines_of: Callable[[list[_T], _Position], _Lines | None],
        position: _Position,
        decode: _Decode[_T],
    ) -> tuple[list[_T], list[_T], _Position]:
        """Append the lines that are said for what is new after ``position``, under the lock.

        Returns:
            What ``lines_of`` was told, what followed (the appended lines among it), and where
            that leads.
        """
        with self._unavailable("can't be appended to"):
            end, caught_up, position = self._lock_and_catch_up(position, decode)
            try:
                news, position, tail = self._read(position, end, decode)
                seen = caught_up + news
                lines = lines_of(seen, position)
                if lines is None:
                    return seen, [], position
                data, own, durable = lines
                self._check_writable()
                # A crash from here to the write leaves a tail of spaces.
                self._repair(position.offset, tail)
                if not end and self._durability == "full":
                    # Before the first byte, so that no record can be in a file without a name.
                    _sync_folder(self._path)
                start = self._write(data, end)
                is_in_place = self._is_in_place()
                # A crash from here on leaves the records, which may count or be lost together
                # with the machine; nobody has been told yet.
                self._note_unsynced(start, data)
                durable = durable or self._unsynced_is_long()
                if durable and not self._local:
                    # Other machines see what the file server has, so it must have it before
                    # the next appender looks.
                    self._sync()
            finally:
                self._release()
            if not is_in_place:
                # This writer was evicted, and the file compacted before it wrote. What went to
                # the old file counts only if it was copied, which is seen with the lock.
                again, own, position = self._append(lines_of, position, decode)
                return seen + again, own, position
            if durable and self._local:
                # Without the lock, so that processes share syncs: one that covers a later byte
                # covers every earlier one.
                self._sync()
            try:
                if start > end:
                    # An evicted holder wrote in between.
                    more, position, _ = self._read(position, start + len(data), decode)
                    return seen, more, position
                if not self._identity:
                    self._identity = self._read_identity(end + len(data))
            except (OSError, LogCorruptError) as error:
                raise OutcomeUnknownError(
                    f"{self._path}: appended, but what is there can't be read: {error}"
                ) from error
            offset, number = end + len(data), position.number + len(own)
            mark = zlib.crc32(data[-_MARK_BYTES:])
            return seen, own, _Position(self._identity, offset, number, mark)

    def _lock_and_catch_up(
        self, position: _Position, decode: _Decode[_T]
    ) -> tuple[int, list[_T], _Position]:
        """Take the lock with little left to read; returns the size, and what has been read."""
        # A journal that was removed while we worked on it must not begin anew.
        create = not position.number
        caught_up: list[_T] = []
        self._acquire()
        try:
            end = self._open(create=create)
            far_behind = end - position.offset > _CATCH_UP_BYTES
        except BaseException:
            self._release()
            raise
        if far_behind:
            self._release()
            caught_up, position = self._read_unlocked(position, decode)
            self._acquire()
            try:
                end = self._open(create=create)
            except BaseException:
                self._release()
                raise
        return end, caught_up, position

    def _is_in_place(self) -> bool:
        """Whether the file that is open is still the one at the path."""
        try:
            if self._local:
                status = os.stat(self._path)
            else:  # only a fresh open asks the server
                fd = os.open(self._path, os.O_RDONLY | _BINARY)
                try:
                    status = os.fstat(fd)
                finally:
                    os.close(fd)
        except FileNotFoundError:
            return False
        return (status.st_dev, status.st_ino) == self._inode

    def _repair(self, offset: int, tail: bytes) -> None:
        """Overwrite with spaces what counts for nothing: the tail, and torn prefixes."""
        if not tail and not self._glued and not self._sync_failed:
            return
        # Not through O_APPEND: there, Linux appends whatever the offset says.
        fd = os.open(self._path, os.O_RDWR | _BINARY)
        try:
            for begin, length in sorted(self._glued):
                # Somebody else may have repaired it since we read it.
                if _pread(fd, length, begin).strip(b" "):
                    _pwrite(fd, b" " * length, begin)
            self._glued.clear()
            if tail:
                _pwrite(fd, b" " * len(tail), offset)
            if self._sync_failed:
                # After a failed sync the kernel calls the pages clean although the disk may not
                # have them. Only writing them again makes a later sync mean something.
                for begin, data in self._unsynced:
                    _pwrite(fd, data, begin)
        finally:
            os.close(fd)

    def _write(self, data: bytes, end: int) -> int:
        """Append ``data`` in one write; returns where it begins.

        Raises:
            LogUnavailableError: Nothing of it counts.
            OutcomeUnknownError: The disk was full; the first records count, the last do not.
        """
        if data.count(b"\n") > 1 and self._space_is_low(len(data)):
            return self._write_reserved(data)
        written = os.write(self._fd, data)
        start = os.lseek(self._fd, 0, os.SEEK_CUR) - written
        if written < len(data):
            whole = data.rfind(b"\n", 0, written) + 1
            self._blank(start + whole, written - whole)
            if whole:
                count = data.count(b"\n", 0, whole)
                raise OutcomeUnknownError(
                    f"{self._path}: the disk was full in the middle of a batch; its first "
                    f"{count} records count, the others do not."
                )
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return start

    def _write_reserved(self, data: bytes) -> int:
        """Append a batch all or none: first so that it does not count, then over itself."""
        reserved = data.replace(b"\n", b" ")
        fd = os.open(self._path, os.O_WRONLY | _BINARY)
        try:
            written = os.write(self._fd, reserved)
            start = os.lseek(self._fd, 0, os.SEEK_CUR) - written
            if written < len(data):
                self._blank(start, written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                _pwrite(fd, data, start)
            except OSError as error:
                raise OutcomeUnknownError(
                    f"{self._path}: failed in the middle of a batch: {error}"
                ) from error
        finally:
            os.close(fd)
        return start

    def _blank(self, offset: int, count: int) -> None:
        """Overwrite our own torn bytes; if that fails, the next appender does it."""
        with contextlib.suppress(OSError):
            fd = os.open(self._path, os.O_WRONLY | _BINARY)
            try:
                _pwrite(fd, b" " * count, offset)
            finally:
                os.close(fd)

    def _space_is_low(self, count: int) -> bool:
        if not hasattr(os, "fstatvfs"):
            return False
        status = os.fstatvfs(self._fd)
        return status.f_bavail * status.f_frsize < _SPACE_LOW_BYTES + 2 * count

    def _note_unsynced(self, start: int, data: bytes) -> None:
        if self._durability == "full":
            self._unsynced.append((start, data))

    def _unsynced_is_long(self) -> bool:
        return (
            len(self._unsynced) > 1
            and sum(len(data) for _, data in self._unsynced) > _UNSYNCED_BYTES_MAX
        )

    def _sync(self) -> None:
        try:
            sync_fd(self._fd)
        except OSError as error:
            self._sync_failed = True
            raise OutcomeUnknownError(
                f"{self._path}: written, but not synced to the disk: {error}. It is written "
                "again before the next append."
            ) from error
        self._sync_failed = False
        self._unsynced.clear()

    # --- the file ----------------------------------------------------------------------------

    def _open(self, *, create: bool = False) -> int:
        """Have the file at the path open, whatever was there before; returns its size in bytes."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            self.close()
            if not create:
                return 0
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            status = os.stat(self._path)
        inode = (status.st_dev, status.st_ino)
        # On a network file system only a fresh open asks the server for the size.
        if self._fd >= 0 and inode == self._inode and self._local:
            return status.st_size
        self._close()
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | _BINARY)
            self._writable = True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            self._fd = os.open(self._path, os.O_RDONLY | _BINARY)
            self._writable = False
        status = os.fstat(self._fd)
        inode = (status.st_dev, status.st_ino)
        if inode != self._inode:
            self._inode = inode
            self._identity = 0
            self._head = None
            self._glued.clear()
            self._unsynced.clear()
            self._sync_failed = False
            self._local = file_system_is_local(self._path)
        return status.st_size

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _check_writable(self) -> None:
        if not self._writable:
            raise LogUnavailableError(f"{self._path}: may be read but not written by this user.")

    def _acquire(self) -> None:
        if self._lock.acquire() is False:
            raise LogUnavailableError(f"{self._path}: {self._lock!r} was not acquired.")

    def _release(self) -> None:
        try:
            self._lock.release()
        except Exception as error:
            # Optuna's locks raise when they were evicted. What we wrote counts all the same.
            _logger.warning("Releasing the lock of %s failed: %s", self._path, error)

    # --- errors ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _unavailable(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogUnavailableError(f"{self._path} {what}: {error}") from error

    def _corrupt(self, reason: str, offset: int, number: int) -> LogCorruptError:
        return LogCorruptError(
            f"{reason}. Nothing is written to a damaged journal; `trialstore check` shows it.",
            source=self._path,
            offset=offset,
            record_number=number,
        )

    def _replaced(self, position: _Position) -> LogReplacedError:
        return LogReplacedError(
            "the file is not the one that was read up to here; open a new storage on it.",
            source=self._path,
            offset=position.offset,
            record_number=position.number,
        )


# --- decoders ------------------------------------------------------------------------------------

# (log to tell about odd lines, whole lines, their offset, number of the first) -> one each
_Decode = Callable[["FileLog | None", bytes, int, int], list[_T]]


def _decode_chunk(log: FileLog | None, lines: bytes, offset: int, number: int) -> list[Any]:
    """The operations in whole lines."""
    count = lines.count(b"\n")
    try:
        records = decode_lines(lines)
        if len(records) == count and (log is None or checksums_match(lines, count)):
            return records
    except ValueError:
        pass
    if log is None:
        return [decode_line(line) for line in lines.split(b"\n")[:-1]]
    return log._decode_lines_one_by_one(lines, offset, number, decode_line)


def _decode_dicts(
    log: FileLog | None, lines: bytes, offset: int, number: int
) -> list[dict[str, Any]]:
    """The dictionaries in whole lines, with every field that they have."""
    if log is None:
        return [json.loads(line) for line in lines.split(b"\n")[:-1]]
    return log._decode_lines_one_by_one(lines, offset, number, json.loads)


def _without(records: Sequence[AnyOperation], seen: list[Any]) -> Sequence[AnyOperation]:
    """Those that are not among the records seen, where an attempt before this one put them."""
    known = {(record.worker_id, record.seq) for record in seen if record.seq >= 0}
    return [record for record in records if (record.worker_id, record.seq) not in known]


def _position_of(cursor: Cursor) -> _Position:
    return _BEGIN if cursor is START else _Position(*cursor)


def _cursor_of(position: _Position) -> Cursor:
    return tuple(position) if position.number else START


def _forget_in_child() -> None:
    for log in list(_logs):
        fd = log._fd
        log._begin()
        if fd >= 0:
            os.close(fd)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
