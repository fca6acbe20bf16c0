"""A journal in one file: append under the lock, sync, and read without it.

What a crash may leave behind, and why nothing that was acknowledged is lost:

* A record counts once its newline is in the file, and is acknowledged after that (and after the
  sync). Bytes after the last newline, the *torn tail*, were therefore acknowledged by nobody.
  Readers leave them alone. The next appender overwrites them with spaces, which JSON allows
  before a record, and goes on in the same line. The file never becomes shorter.
* What looks like a torn tail may also be a write under way, of one that was evicted or took
  another lock (another path to the same file). So the appender first appends a space: the kernel
  lets it wait for that write. Only a tail with nothing behind it but this space is torn for ever.
* A plain Optuna worker appends behind a torn tail as if it were not there. Such a *glued* line is
  read as the whole record at its end, and its torn prefix overwritten by the next appender.
* Every write is either one ``O_APPEND`` of whole lines or of a space, or spaces over bytes that
  count for nothing, or bytes over themselves. None of them harms if the lock was lost in the
  meantime, but for ``_write_reserved`` on a nearly full disk.
* Anything else that does not decode is damage. It is reported with file, offset and record
  number, and nothing is written to a damaged file.

Source: docs/formats/journal.md; Optuna ``JournalFileBackend``; open(2), write(2), fsync(2).
"""

# Which system calls are made, and in what order, is the subject here; pathlib hides it.
# ruff: noqa: PTH116

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import errno
from functools import partial
import gc
import hashlib
import logging
import math
import os
import threading
from typing import Any, Final, Literal, NamedTuple, TypeVar
import weakref

from optuna.storages.journal._file import BaseJournalFileLock

from trialstore.clock import CLOCK
from trialstore.errors import (
    LogCompactedError,
    LogCorruptError,
    LogReplacedError,
    LogUnavailableError,
    OutcomeUnknownError,
)
from trialstore.logs.file import system
from trialstore.logs.file.filelock import (
    JournalFileOpenLock,
    JournalFileSymlinkLock,
    file_system_is_local,
)
from trialstore.logs.file.lines import Decode, decode_checked, glued_at
from trialstore.logs.file.position import BEGIN, MARK_BYTES, Position, mark_of
from trialstore.logs.head import Head, decode_head
from trialstore.records import RECORD_START, counts_for_nothing, may_be_a_torn_record

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# Large enough that a call per chunk costs nothing, small enough that one odd line (NaN, a torn
# prefix) does not send very many good ones down the slow path with it.
CHUNK_BYTES: Final = 1 << 18
# More than this behind, a worker catches up before it takes the lock.
CATCH_UP_BYTES: Final = 1 << 16
# A torn tail is a crash's, and rare; a write under way takes microseconds.
_TAIL_SETTLES_S: Final = 0.005
# With less space than this, a batch is first written so that it does not count.
_SPACE_LOW_BYTES: Final = 1 << 24
# What has not been synced is kept, to be written again if a sync fails; so much of it at most.
_UNSYNCED_BYTES_MAX: Final = 1 << 22
# So much Linux takes in one write, and macOS about as much; see write(2).
_WRITE_BYTES_MAX: Final = 0x7FFFF000

_journals: weakref.WeakSet[JournalFile] = weakref.WeakSet()


class Lines(NamedTuple):
    """What is appended in one write.

    Args:
        data: Whole lines; none if they are there already.
        decoded: What a reader will make of them; to find that out later would be too late.
        durable: They have to be synced.
    """

    data: bytes
    decoded: list[Any]
    durable: bool


class JournalFile:
    """The file, as this process has it open. Callers hold ``mutex``.

    ``append`` and ``read_unlocked`` open the file, and take ``lock`` where they need it; all that
    has an argument ``end`` wants the size that ``open`` returned.

    Args:
        path: Absolute, and behind all symlinks.
        lock: What whoever appends takes.
        durability: "full" survives power loss; "process" only the death of processes.
    """

    def __init__(
        self, path: str, lock: BaseJournalFileLock, durability: Literal["full", "process"]
    ) -> None:
        self.path = path
        self.lock = lock
        self.durability = durability
        self._begin()

    def _begin(self) -> None:
        """The state with nothing open in this process."""
        self.mutex = threading.RLock()
        self.fd = -1
        self.local = False
        self.head: Head | None = None  # known with the identity
        self._writable = False
        self._inode: tuple[int, int] | None = None
        self._identity = 0
        self._glued: set[tuple[int, int]] = set()  # (offset, length) of torn prefixes
        self._unsynced: list[tuple[int, bytes]] = []  # (offset, what we wrote there)
        self._sync_failed = False
        _journals.add(self)

    def __del__(self) -> None:
        fd = getattr(self, "fd", -1)
        if fd >= 0:
            os.close(fd)

    # --- reading -----------------------------------------------------------------------------

    def read_unlocked(
        self, position: Position, decode: Decode[_T], bytes_max: float = math.inf
    ) -> tuple[list[_T], Position]:
        """Everything whole after ``position``, as of a moment after the call.

        Args:
            bytes_max: Stop soon after so many bytes.
        """
        with self.unavailable("can't be read"):
            glued = self._glued.copy()
            try:
                end = self.open()
                news, after, _ = self.read(position, end, decode, bytes_max)
                if self._glued <= glued:
                    return news, after
            except LogReplacedError:
                raise
            except LogCorruptError:
                pass
            # A repair in progress, a batch that is being written over itself, or another machine's
            # write of which half has arrived, may look like damage, or like a torn prefix that
            # counts for nothing, to those who do not wait. Nobody writes while we hold the lock.
            self._glued &= glued
            with contextlib.ExitStack() as held:
                try:
                    self.acquire()
                    held.callback(self.release)
                except LogUnavailableError:
                    _logger.debug("Odd lines seen without the lock, which can't be taken.")
                    held.callback(self._glued.intersection_update, glued)
                end = self.open()
                news, after, _ = self.read(position, end, decode, bytes_max)
                return news, after

    def read(
        self,
        position: Position,
        end: int,
        decode: Decode[_T],
        bytes_max: float = math.inf,
    ) -> tuple[list[_T], Position, bytes]:
        """Whole records between ``position`` and byte ``end``, where they lead, and the tail."""
        position = self._here(position, end)
        _, offset, number, mark = position
        if number and end < offset:
            raise self.replaced(position)
        if number and end == offset and self.local:
            return [], position, b""
        news: list[_T] = []
        lead = min(MARK_BYTES, offset)
        last = system.pread(self.fd, lead, offset - lead) if offset else b""
        if offset and mark_of(last) != mark:
            raise self.replaced(position)
        tail = b""
        for lines in _without_collections(self.whole_lines(offset, end), end - offset):
            if not lines.endswith(b"\n"):
                tail = lines
                break
            found = decode(lines, partial(self._decode_one_by_one, lines, offset, number))
            news += found
            number += len(found)
            offset += len(lines)
            last = lines[-MARK_BYTES:] if len(lines) >= MARK_BYTES else last + lines
            if offset - position.offset >= bytes_max:
                break
        if tail and not counts_for_nothing(tail):
            raise self._corrupt("a record without its newline", offset, number)
        if tail and not offset:
            self.check_is_torn(tail)
        if not number:
            return news, BEGIN, tail
        mark = mark_of(last)
        return news, Position(self._identity, offset, number, mark), tail

    def _here(self, position: Position, end: int) -> Position:
        """A cursor as one of the file at the path, also if that was compacted since.

        Raises:
            LogCompactedError: It is in the middle of what was compacted.
            LogReplacedError: It is of another journal.
        """
        identity = self.identity(end)
        if not position.number or position.identity == identity:
            return position
        head = self.head
        if head is None or str(position.identity) not in head.of:
            raise self.replaced(position)
        end_offset, end_number = head.end
        if str(position.identity) != head.of[0] or position.number < end_number:
            raise LogCompactedError(
                "the journal was compacted behind what was read; read it anew",
                source=self.path,
                record_number=position.number,
            )
        begin, number = head.begin
        offset, mark = begin + position.offset - end_offset, position.mark
        if position.number == end_number:
            mark = mark_of(system.pread(self.fd, MARK_BYTES, offset - MARK_BYTES))
        return Position(identity, offset, number + position.number - end_number, mark)

    def whole_lines(self, offset: int, end: int) -> Iterator[bytes]:
        """Chunks of whole lines, and at last what no newline ends, if there is any."""
        parts: list[bytes] = []
        while offset < end:
            chunk = system.pread(self.fd, min(CHUNK_BYTES, end - offset), offset)
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

    def _decode_one_by_one(
        self, lines: bytes, offset: int, number: int, decode: Callable[[bytes], _T]
    ) -> list[_T]:
        """Decode lines of which some are odd; notes those with a torn prefix.

        Raises:
            LogCorruptError: One holds no record.
        """
        decoded: list[_T] = []
        for line in lines.split(b"\n")[:-1]:
            try:
                decoded.append(decode_checked(line, decode))
            except (ValueError, RecursionError) as error:
                begin = glued_at(line)
                if not begin:
                    raise self._corrupt(str(error), offset, number + len(decoded)) from error
                self._glued.add((offset, begin))
                decoded.append(decode(line[begin:]))
            offset += len(line) + 1
        return decoded

    def identity(self, end: int) -> int:
        """A digest of the first record; 0 while there is none before byte ``end``."""
        if not self._identity:
            self._identity = self._read_identity(end)
        return self._identity

    def _read_identity(self, end: int) -> int:
        for lines in self.whole_lines(0, end):
            if not lines.endswith(b"\n"):
                return 0
            line = lines[: lines.index(b"\n")].lstrip(b" ")
            self.head = decode_head(line)
            # A repair overwrites a torn prefix; the identity must not depend on it.
            if line[:1] != b"{" or RECORD_START.search(line, 1):
                line = line[glued_at(line) :]
            return int.from_bytes(hashlib.blake2b(line, digest_size=7).digest(), "big") or 1
        return 0

    # --- appending ---------------------------------------------------------------------------

    def append(
        self,
        lines_of: Callable[[list[_T], Position], Lines | None],
        position: Position,
        decode: Decode[_T],
    ) -> tuple[list[_T], list[_T], Position]:
        """Append the lines that are said for what is new after ``position``, under the lock.

        Returns:
            What ``lines_of`` was told, what followed (the appended lines among it), and where
            that leads.
        """
        with self.unavailable("can't be appended to"):
            end, caught_up, position = self._lock_and_catch_up(position, decode)
            try:
                news, position, end = self._read_and_settle(position, end, decode)
                seen = caught_up + news
                lines = lines_of(seen, position)
                if lines is None or not lines.data:
                    # What is there already may not be on the disk: an attempt before this one may
                    # have come as far as that.
                    if self._sync_failed or (lines is not None and lines.durable):
                        self._repair()
                        self._sync()
                    return seen, [], position
                data, own, durable = lines
                self.check_writable()
                self._repair()
                if not end and self.durability == "full":
                    # Before the first byte, so that no record can be in a file without a name.
                    system.sync_folder(self.path)
                start = self._write(data)
                is_in_place = self._is_in_place()
                # A crash from here on leaves the records, which may count or be lost together
                # with the machine; nobody has been told yet.
                self._note_unsynced(start, data)
                durable = durable or self._unsynced_is_long()
                if durable and not self.local:
                    # Other machines see what the file server has, so it must have it before
                    # the next appender looks.
                    self._sync()
            finally:
                self.release()
            if not is_in_place:
                # This writer was evicted, and the file compacted before it wrote. What went to
                # the old file counts only if it was copied, which is seen with the lock.
                again, own, position = self.append(lines_of, position, decode)
                return seen + again, own, position
            if durable and self.local:
                # Without the lock, so that processes share syncs: one that covers a later byte
                # covers every earlier one.
                self._sync()
            try:
                if start > end:
                    # An evicted holder wrote in between.
                    more, position, _ = self.read(position, start + len(data), decode)
                    return seen, more, position
                identity = self.identity(end + len(data))
            except (OSError, LogCorruptError) as error:
                raise OutcomeUnknownError(
                    f"{self.path}: appended, but what is there can't be read: {error}"
                ) from error
            offset, number = end + len(data), position.number + len(own)
            mark = mark_of(data)
            return seen, own, Position(identity, offset, number, mark)

    def _lock_and_catch_up(
        self, position: Position, decode: Decode[_T]
    ) -> tuple[int, list[_T], Position]:
        """Take the lock with little left to read; returns the size, and what has been read."""
        # A journal that was removed while we worked on it must not begin anew.
        create = not position.number
        caught_up: list[_T] = []
        self.acquire()
        try:
            if not self._writable:
                self.release_descriptor()  # by now it may be
            end = self.open(create=create)
            far_behind = end - position.offset > CATCH_UP_BYTES
        except BaseException:
            self.release()
            raise
        if far_behind:
            self.release()
            caught_up, position = self.read_unlocked(position, decode)
            self.acquire()
            try:
                end = self.open(create=create)
            except BaseException:
                self.release()
                raise
        return end, caught_up, position

    def _read_and_settle(
        self, position: Position, end: int, decode: Decode[_T]
    ) -> tuple[list[_T], Position, int]:
        """What is new, where it leads, and the size; then nothing but spaces is behind that.

        A tail may be the write under way of one whom our lock does not keep out. To overwrite that
        would wait in the kernel for the write's end, and destroy what was acknowledged since. An
        append waits as well, and shows what came of it: the tail is torn if our space is all that
        was added to it. Nobody's write can add to it any more, since each begins behind the space.
        """
        news, position, tail = self.read(position, end, decode)
        torn = None
        while self._writable and tail.strip(b" "):
            if tail == torn:
                # A crash from here to the write leaves a tail of spaces.
                self._overwrite(position.offset, len(tail))
                break
            torn = None
            if not self._is_growing(end):
                # A crash after it leaves a tail with one more space, which counts for nothing
                # either. Behind a write that came to its end, it stands before the next record.
                os.write(self.fd, b" ")
                torn = tail + b" "
            end = os.fstat(self.fd).st_size
            more, position, tail = self.read(position, end, decode)
            news += more
        return news, position, end

    def _is_growing(self, end: int) -> bool:
        """Whether the tail is seen to become longer, so that there is no need to append to it.

        A file grows page by page while it is written, and readers see that. Where a later append
        does not wait for it (another machine's write, Windows), nothing else tells.
        """
        CLOCK.sleep(_TAIL_SETTLES_S)
        return os.fstat(self.fd).st_size != end

    def _is_in_place(self) -> bool:
        """Whether the file that is open, and was appended to, is still the one at the path.

        Raises:
            OutcomeUnknownError: The path can't be looked at.
        """
        try:
            if self.local:
                status = os.stat(self.path)
            else:  # only a fresh open asks the server
                fd = os.open(self.path, os.O_RDONLY | system.BINARY)
                try:
                    status = os.fstat(fd)
                finally:
                    os.close(fd)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise OutcomeUnknownError(
                f"{self.path}: appended, but whether that file is still the journal can't be "
                f"told: {error}"
            ) from error
        return (status.st_dev, status.st_ino) == self._inode

    def _repair(self) -> None:
        """Overwrite torn prefixes with spaces, and what may not be on the disk with itself."""
        if not self._glued and not self._sync_failed:
            return
        with self._opened_in_place() as fd:
            for begin, length in sorted(self._glued):
                # Somebody else may have repaired it since we read it.
                if system.pread(fd, length, begin).strip(b" "):
                    system.pwrite(fd, b" " * length, begin)
            self._glued.clear()
            if self._sync_failed:
                # After a failed sync the kernel calls the pages clean although the disk may not
                # have them. Only writing them again makes a later sync mean something.
                for begin, data in self._unsynced:
                    system.pwrite(fd, data, begin)

    def _write(self, data: bytes) -> int:
        """Append ``data`` in one write; returns where it begins.

        Raises:
            ValueError: It is too much for one write; nothing was written.
            LogUnavailableError: Nothing of it counts.
            OutcomeUnknownError: The disk was full; the first records count, the last do not.
        """
        if len(data) > _WRITE_BYTES_MAX:
            raise ValueError(
                f"{self.path}: {len(data):,} bytes can't be appended in one write "
                f"({_WRITE_BYTES_MAX:,} can). Keep what is large elsewhere, for example in "
                "Optuna's artifact store."
            )
        if data.count(b"\n") > 1 and self._space_is_low(len(data)):
            return self._write_reserved(data)
        written = os.write(self.fd, data)
        start = os.lseek(self.fd, 0, os.SEEK_CUR) - written
        if written < len(data):
            whole = data.rfind(b"\n", 0, written) + 1
            self._blank(start + whole, written - whole)
            if whole:
                count = data.count(b"\n", 0, whole)
                raise OutcomeUnknownError(
                    f"{self.path}: the disk was full in the middle of a batch; its first "
                    f"{count} records count, the others do not."
                )
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return start

    def _write_reserved(self, data: bytes) -> int:
        """Append a batch all or none: first so that it does not count, then over itself.

        An eviction between the two writes may harm: another repairs what is there as a torn tail
        and goes on behind it, and the second write makes it count all the same.
        """
        reserved = data.replace(b"\n", b" ")
        with self._opened_in_place() as fd:
            written = os.write(self.fd, reserved)
            start = os.lseek(self.fd, 0, os.SEEK_CUR) - written
            if written < len(data):
                self._blank(start, written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                system.pwrite(fd, data, start)
            except OSError as error:
                raise OutcomeUnknownError(
                    f"{self.path}: failed in the middle of a batch: {error}"
                ) from error
        return start

    def _blank(self, offset: int, count: int) -> None:
        """Overwrite our own torn bytes; if that fails, the next appender does it."""
        with contextlib.suppress(OSError):
            self._overwrite(offset, count)

    def _overwrite(self, offset: int, count: int) -> None:
        """Write spaces over bytes that count for nothing."""
        with self._opened_in_place() as fd:
            system.pwrite(fd, b" " * count, offset)

    @contextlib.contextmanager
    def _opened_in_place(self) -> Iterator[int]:
        """The file opened once more, without O_APPEND: there, Linux appends whatever the offset.

        Raises:
            OSError: The path leads to another file by now, whose bytes at our offsets are others.
        """
        fd = os.open(self.path, os.O_RDWR | system.BINARY)
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) != self._inode:
                raise OSError(errno.ENOENT, "was replaced", self.path)
            yield fd
        finally:
            os.close(fd)

    def _space_is_low(self, count: int) -> bool:
        if not hasattr(os, "fstatvfs"):
            return False
        status = os.fstatvfs(self.fd)
        return status.f_bavail * status.f_frsize < _SPACE_LOW_BYTES + 2 * count

    def _note_unsynced(self, start: int, data: bytes) -> None:
        if self.durability == "full":
            self._unsynced.append((start, data))

    def _unsynced_is_long(self) -> bool:
        return (
            len(self._unsynced) > 1
            and sum(len(data) for _, data in self._unsynced) > _UNSYNCED_BYTES_MAX
        )

    def _sync(self) -> None:
        try:
            system.sync_fd(self.fd)
        except OSError as error:
            self._sync_failed = True
            raise OutcomeUnknownError(
                f"{self.path}: written, but not synced to the disk: {error}. It is written "
                "again before the next append."
            ) from error
        self._sync_failed = False
        self._unsynced.clear()

    # --- the file ----------------------------------------------------------------------------

    def open(self, *, create: bool = False) -> int:
        """Have the file at the path open, whatever was there before; returns its size in bytes."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            self.close()
            if not create:
                return 0
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            status = os.stat(self.path)
        inode = (status.st_dev, status.st_ino)
        # On a network file system only a fresh open asks the server for the size.
        if self.fd >= 0 and inode == self._inode and self.local:
            return status.st_size
        self.release_descriptor()
        try:
            self.fd = os.open(self.path, os.O_RDWR | os.O_APPEND | system.BINARY)
            self._writable = True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            self.fd = os.open(self.path, os.O_RDONLY | system.BINARY)
            self._writable = False
        status = os.fstat(self.fd)
        inode = (status.st_dev, status.st_ino)
        if inode != self._inode:
            self._inode = inode
            self._identity = 0
            self.head = None
            self._glued.clear()
            self._unsynced.clear()
            self._sync_failed = False
            self.local = file_system_is_local(self.path)
        return status.st_size

    def close(self) -> None:
        """Close the file; whatever needs it opens it again."""
        self.release_descriptor()
        self._inode = None  # without our descriptor, another file may get its number

    def release_descriptor(self) -> None:
        """Have nothing open, but know the file again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def check_writable(self) -> None:
        if not self._writable:
            raise LogUnavailableError(f"{self.path}: may be read but not written by this user.")

    def acquire(self) -> None:
        if self.lock.acquire() is False:
            raise LogUnavailableError(f"{self.path}: {self.lock!r} was not acquired.")

    def release(self) -> None:
        try:
            self.lock.release()
        except Exception as error:
            # Optuna's locks raise when they were evicted; a signal's handler may raise within
            # ours. What we wrote counts all the same.
            self._abandon()
            _logger.warning("Releasing the lock of %s failed: %s", self.path, error)

    # --- errors ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def unavailable(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogUnavailableError(f"{self.path} {what}: {error}") from error
        except Exception:
            raise
        except BaseException:
            # An interrupt, which may strike between the lock and whatever gives it back.
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Give back what an interrupt may have left of a lock of ours."""
        if isinstance(self.lock, (JournalFileSymlinkLock, JournalFileOpenLock)):
            self.lock.abandon()

    def check_is_torn(self, tail: bytes) -> None:
        """Of a file without a newline: somebody's own, named by mistake, is not overwritten."""
        if not may_be_a_torn_record(tail):
            raise LogCorruptError("this is no journal; name another file.", source=self.path)

    def _corrupt(self, reason: str, offset: int, number: int) -> LogCorruptError:
        return LogCorruptError(
            f"{reason}. Nothing is written to a damaged journal; `trialstore check` shows it.",
            source=self.path,
            offset=offset,
            record_number=number,
        )

    def replaced(self, position: Position) -> LogReplacedError:
        return LogReplacedError(
            "the file is not the one that was read up to here; open a new storage on it.",
            source=self.path,
            offset=position.offset,
            record_number=position.number,
        )


def _without_collections(chunks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """The chunks; over many bytes with the garbage collector paused.

    Nothing decoded from a line is garbage or part of a cycle, and the collector would look at
    each record many times: it doubled the time of a replay.
    """
    if count < CHUNK_BYTES or not gc.isenabled():
        yield from chunks
        return
    gc.disable()
    try:
        yield from chunks
    finally:
        gc.enable()


def _forget_in_child() -> None:
    for journal in list(_journals):
        fd = journal.fd
        journal._begin()
        if fd >= 0:
            os.close(fd)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
