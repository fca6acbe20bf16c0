"""Who may append to a journal file: a queue among ours, then Optuna's lock file against everyone.

**Queue.** ``<path>.lock.queue`` is a file that is only ever flocked. The kernel gives the lock
back when its holder dies, so whoever holds it knows that every earlier holder has gone.

**Lock file.** ``<path>.lock`` exists while somebody may append; plain Optuna workers know only
this one. Ours is a regular file that says who owns it, and appears by ``link`` with its contents
in place, so that no crash leaves an owner without a name. (It can't be a symlink whose text is
the owner: Optuna's waiters ``stat`` through it, and expect to see its age.)

**Eviction.** A lock file of ours, of this boot, whose owner queued on this local file system, is
that of a dead process as soon as we hold the queue: it goes at once. Every other lock file goes
when it has not changed for ``grace_period`` seconds of our looking at it. So does the queue
itself, when its holder is stopped rather than dead: a fresh queue file takes its place.

Exclusion can thus fail in one way: a holder was stopped for longer than the grace period, was
evicted, and goes on. That is why ``journal_file.py`` writes nothing that would harm without the
lock.

Durations are of this process' monotonic clock, and a process that was itself stopped does not
count the time it missed. No two machines' clocks are compared, and no process id is asked
about: containers on one journal have process ids of their own.

Source: docs/formats/journal.md, "Locks"; flock(2), link(2); Optuna ``JournalFileSymlinkLock``.
"""

# Which system calls are made, and in what order, is the subject here; pathlib hides it.
# ruff: noqa: PTH104, PTH108, PTH116, PTH118, PTH120, PTH123, PTH208

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import errno
import functools
import logging
import math
import os
import random
import secrets
import stat
import sys
import threading
from typing import Any, Final
import warnings
import weakref

from optuna.storages.journal._file import BaseJournalFileLock

from trialstore.clock import CLOCK, Clock
from trialstore.errors import LogUnavailableError
from trialstore.logs.modes import share_beside

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)

_NO_FLOCK: Final = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_NO_LINK: Final = {
    errno.EPERM,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EMLINK,
    errno.EINVAL,
    errno.EACCES,  # some FUSE mounts; a folder that is really read-only fails again below
}

# Names from linux/magic.h. On these, flock is one kernel's own business, and fsync by one process
# covers what another has written. Everything else (NFS, SMB, FUSE, 9p, Lustre …) is shared.
_LOCAL_FILE_SYSTEMS: Final = {
    0xEF53,  # ext2, ext3, ext4
    0x58465342,  # xfs
    0x9123683E,  # btrfs
    0x01021994,  # tmpfs
    0x858458F6,  # ramfs
    0x794C7630,  # overlayfs
    0xF2F52010,  # f2fs
    0x2FC12FC1,  # zfs
    0xCA451A4E,  # bcachefs
    0x3153464A,  # jfs
    0x52654973,  # reiserfs
    0x4D44,  # vfat
    0x2011BAB0,  # exfat
    0x7366746E,  # ntfs3
}

# A holder needs some 0.1 ms on a local disk and some round trips elsewhere; with 16 processes on 2
# cores, trying five times as often takes a third of the throughput, and half or a quarter as often
# gains none of it. The interval does not grow with the wait: a waiter of long standing must not be
# the one that tries least often.
_POLL_LOCAL_S: Final = 0.001
_POLL_SHARED_S: Final = 0.002
# With a hundred processes such tries are more than two cores can do, and nobody gets on any more.
# So whoever has waited for long, in its last waits and not in this one, tries less often: some ten
# times a wait, however many wait.
_TRIES_A_WAIT: Final = 10
_POLL_MAX_S: Final = 0.025
# Between two looks at what stands in the way, a try is one system call, at 31 us of CPU with the
# sleep; with a look each time it was 47.
_LOOK_S: Final = 0.02
# A holder of the queue waits for a stale lock file as long as those behind it wait for the
# holder. It must come first, or it would be taken for a stopped one.
_QUEUE_PATIENCE: Final = 1.25
_WARN_AFTER_S: Final = 10.0
# Nobody is evicted sooner: grace periods are whole seconds, ours and Optuna's.
_EVICTION_S_MIN: Final = 0.5

_OWNER_MAGIC: Final = b"trialstore-lock-1"
_OWNER_BYTES_MAX: Final = 512


def file_system_is_local(path: str) -> bool:
    """Whether one kernel alone keeps the file or folder; False when in doubt.

    Source: statfs(2); Python has no ``statfs``, and ``statvfs`` does not tell the kind.
    """
    if not sys.platform.startswith("linux"):
        return os.name == "nt" and not path.startswith("\\\\")
    try:
        buffer = _Buffer()
        if _libc().statfs(os.fsencode(path), buffer) != 0:
            return False
        # The first member of struct statfs is the kind, a word on every Linux that Python runs on.
        kind = ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF
    except (OSError, AttributeError, ValueError):
        return False
    return kind in _LOCAL_FILE_SYSTEMS


# Both are made once: what ctypes makes refers to itself, and stays until a collection.
_Buffer: Final = ctypes.c_char * 512


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _read_boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


_BOOT_ID: Final = _read_boot_id()

# (device, inode, mtime in ns): two sightings with equal ones are the same lock file. The inode
# alone does not do: the next file often gets that of the one just removed.
_Identity = tuple[int, int, int]


def _identity_of(status: os.stat_result) -> _Identity:
    return (status.st_dev, status.st_ino, status.st_mtime_ns)


def _identity(path: str) -> _Identity | None:
    """What is at ``path`` itself, a symlink not followed; None if nothing is."""
    try:
        return _identity_of(os.lstat(path))
    except FileNotFoundError:
        return None


def _write_new(path: str, contents: bytes, share: Callable[[int], None] | None = None) -> None:
    """Create a file that must not exist yet; nothing stays behind if it can't be written."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    fd = os.open(path, flags, 0o666)
    try:
        os.write(fd, contents)
        if share is not None:
            share(fd)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


_locks: weakref.WeakSet[_FileLock] = weakref.WeakSet()


_NOTHING: Final = object()


class _Patience:
    """For how long one lock file has been seen unchanged.

    Time counts only while we look: of a gap between two looks (we were stopped, the machine
    slept) at most ``_GAP_S_MAX`` counts.
    """

    _GAP_S_MAX: Final = 1.0

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen: object = _NOTHING
        self._looked_at = 0.0
        self.waited_s = 0.0

    def look(self, seen: object) -> float:
        """Seconds for which ``seen`` has been the same."""
        now = self._clock.now_s()
        if seen != self._seen:
            self._seen = seen
            self.waited_s = 0.0
        else:
            self.waited_s += min(now - self._looked_at, self._GAP_S_MAX)
        self._looked_at = now
        return self.waited_s

    def forget(self) -> None:
        self._seen = _NOTHING


class _FileLock(BaseJournalFileLock):
    """What both public locks do; they differ in how the lock file comes to be.

    Threads of one process may share a lock, and may also use several on the same path.
    """

    _may_link = True

    def __init__(
        self, filepath: str, grace_period: int | None = 30, *, clock: Clock = CLOCK
    ) -> None:
        if grace_period is not None:
            if grace_period <= 0:
                raise ValueError(f"grace_period must be positive, not {grace_period}.")
            if grace_period < 3:
                warnings.warn(
                    f"A grace_period of {grace_period} s may evict a holder that is only slow.",
                    stacklevel=2,
                )
        self.grace_period = grace_period
        # Neither a later chdir nor a symlink to the journal must make two locks of one.
        self._lock_path = os.path.realpath(filepath) + ".lock"
        self._queue_path = self._lock_path + ".queue"
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        """The state of a lock that nobody in this process holds or waits for."""
        self._thread_lock = threading.RLock()  # tells whether it is this thread's
        self._queue_fd = -1
        self._queued = False  # whether we hold the queue
        self._has_flock = fcntl is not None
        self._local: bool | None = None
        self._poll_s = 0.0  # at least; by what the last waits for the queue have been
        self._held = False
        self._owner: _Identity | None = None  # of the lock file that we made
        self._owner_path = ""  # of the owner file, once we have made one
        self._owner_text = b""
        self._at_end: weakref.finalize[Any, Any] | None = None
        self._swept = False
        self._claims_seen: set[str] = set()
        _locks.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"lock_path": self._lock_path, "grace_period": self.grace_period}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._lock_path = state["lock_path"]
        self._queue_path = self._lock_path + ".queue"
        self.grace_period = state["grace_period"]
        self._clock = CLOCK
        self._begin()

    def __del__(self) -> None:
        fd = getattr(self, "_queue_fd", -1)
        if fd >= 0:
            os.close(fd)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._lock_path!r}, grace_period={self.grace_period})"

    def acquire(self) -> bool:
        """Wait until nobody else may append.

        Returns:
            True.

        Raises:
            LogUnavailableError: No lock file can be made in this folder.
        """
        try:
            self._thread_lock.acquire()
            self._acquire()
        except BaseException as error:
            self.abandon()
            if isinstance(error, OSError):
                raise LogUnavailableError(
                    f"{self._lock_path}: the journal can't be locked for writing: {error}. The "
                    "folder must be writable, and its file system support hard links or O_EXCL."
                ) from error
            raise
        return True

    def release(self) -> None:
        """Let the next one append; another's lock file, if we were evicted, is left alone.

        Raises:
            RuntimeError: This thread does not hold the lock.
        """
        if not self._held or not self._thread_lock.acquire(blocking=False):
            raise RuntimeError(f"{self._lock_path} is not held by this thread and lock object.")
        try:
            self._remove_own_lock_file()
        finally:
            self._held = False
            self._owner = None
            self._leave_queue()
            self._thread_lock.release()
            self._thread_lock.release()

    def abandon(self) -> None:
        """Give back whatever this thread has, if anything.

        For who was interrupted in ``acquire``, in ``release``, or between the two, where what
        there is may not have been noted yet.
        """
        if not self._thread_lock.acquire(blocking=False):
            return  # another thread's
        if self._owner is None and self._owner_path:
            self._owner = _identity(self._owner_path)
        if self._owner is not None and _identity(self._lock_path) == self._owner:
            self._remove_own_lock_file()
        self._held = False
        self._owner = None
        self._close_queue()
        with contextlib.suppress(RuntimeError):
            while True:
                self._thread_lock.release()  # until it is nobody's

    # --- waiting -----------------------------------------------------------------------------

    def _acquire(self) -> None:
        if self._local is None:
            self._local = file_system_is_local(os.path.dirname(self._lock_path))
        patience = _Patience(self._clock)
        while True:
            began_s = self._clock.now_s()
            self._wait_until(
                self._enter_queue, patience, self._replace_queue, _QUEUE_PATIENCE, self._poll_s
            )
            waited_s = self._clock.now_s() - began_s
            self._poll_s += (min(waited_s / _TRIES_A_WAIT, _POLL_MAX_S) - self._poll_s) / 4
            if self._queued and not self._swept:
                self._sweep()
            self._wait_until(self._make_lock_file, patience, self._evict, 1.0)
            # While we waited in front of a stale lock file, those behind us may have taken us for
            # stopped and begun another queue. Then its members think that we are dead.
            if not self._queued or self._queue_is_current():
                return
            self._remove_own_lock_file()
            self._held = False
            self._close_queue()

    def _wait_until(
        self,
        attempt: Callable[[], bool],
        patience: _Patience,
        evict: Callable[[_Identity | None], bool],
        patience_factor: float,
        interval_min_s: float = 0.0,
    ) -> None:
        """Try until ``attempt`` succeeds; ``evict`` when the lock file does not change.

        Where ``evict`` returns False, the wait for the grace period begins anew.
        """
        grace_s = None if self.grace_period is None else self.grace_period * patience_factor
        look_at, warn_at = -math.inf, math.inf
        while not attempt():
            now = self._clock.now_s()
            warn_at = min(warn_at, now + _WARN_AFTER_S)
            if now >= look_at:
                look_at = now + _LOOK_S
                self._leave_replaced_queue()
                seen = _identity(self._lock_path)
                waited_s = patience.look(seen)
                if grace_s is not None and waited_s > grace_s:
                    if not evict(seen):
                        patience.forget()
                    continue
            if now > warn_at:
                _logger.warning("Still waiting for the journal's lock %s.", self._lock_path)
                warn_at = now + _WARN_AFTER_S
            interval_s = _POLL_LOCAL_S if self._local else _POLL_SHARED_S
            # Jitter, lest waiters march in step and the same one always comes first.
            self._clock.sleep(max(interval_s, interval_min_s) * random.uniform(0.5, 1.5))

    # --- the queue ---------------------------------------------------------------------------

    def _enter_queue(self) -> bool:
        """Take the flock if it is free; True also where there is none to take."""
        if not self._has_flock:
            return True
        if self._queue_fd < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            try:
                self._queue_fd = os.open(self._queue_path, flags, 0o666)
                self._share(self._queue_fd)
            except PermissionError:
                # Another user's; a reader may flock as well, on a local disk.
                self._queue_fd = os.open(self._queue_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._queue_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            if error.errno not in _NO_FLOCK:
                raise
            self._has_flock = False
            self._close_queue()
            return True
        # Whether it is still the current queue is asked once, when the lock file is made.
        self._queued = True
        return True

    def _share(self, fd: int) -> None:
        """Let those open a file of the lock who may open the journal, whatever our umask is.

        They must queue in the one, and read in the other who is dead.
        """
        share_beside(fd, self._lock_path.removesuffix(".lock"))

    def _leave_replaced_queue(self) -> None:
        """Of a waiter: another queue may have taken the place of the one that it waits in."""
        if self._queue_fd >= 0 and not self._queued and not self._queue_is_current():
            self._close_queue()  # the next attempt opens the new one

    def _queue_is_current(self) -> bool:
        try:
            there = os.stat(self._queue_path)
        except FileNotFoundError:
            return False
        ours = os.fstat(self._queue_fd)
        return (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev)

    def _leave_queue(self) -> None:
        if self._queued:
            self._queued = False
            fcntl.flock(self._queue_fd, fcntl.LOCK_UN)

    def _close_queue(self) -> None:
        # Closing the last descriptor of it also gives the flock back.
        fd, self._queue_fd = self._queue_fd, -1
        self._queued = False
        if fd >= 0:
            os.close(fd)

    def _replace_queue(self, seen: _Identity | None) -> bool:
        """Put a fresh queue in place of one whose holder has not moved for too long.

        Returns:
            Whether it was replaced; the holder's lock file has then been stale as long.
        """
        if self._queue_fd < 0:
            return False
        stuck = os.fstat(self._queue_fd)
        with self._claim(f"queue-{stuck.st_ino:x}-{stuck.st_ctime_ns:x}") as claimed:
            if not claimed or not self._queue_is_current() or _identity(self._lock_path) != seen:
                return False
            _logger.warning(
                "The holder of %s has not moved for %s s; going on without it.",
                self._queue_path,
                self.grace_period,
            )
            fresh_path = f"{self._queue_path}.{secrets.token_hex(8)}"
            fd = os.open(fresh_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._share(fd)
            # Whoever waits sees by the inode that its queue is no longer the one at the path.
            os.rename(fresh_path, self._queue_path)
            self._close_queue()
            self._queue_fd = fd
            return True

    # --- the lock file -----------------------------------------------------------------------

    def _make_lock_file(self) -> bool:
        """Create the lock file if there is none; evict a dead owner first."""
        if self._may_link or (self._queued and self._local):
            try:
                created = self._link_lock_file()
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
                created = self._open_lock_file()
        else:
            created = self._open_lock_file()
        if created is not None:
            self._held = True
            self._owner = created
            return True
        # Only the members of the current queue may judge: if we were stopped and it was replaced,
        # the owner we see is alive in the new one.
        if self._queued and self._local and self._owner_is_dead() and self._queue_is_current():
            _logger.info("Evicting the dead owner of %s.", self._lock_path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._lock_path)
            return self._make_lock_file()
        return False

    def _owner_contents(self, token: str) -> bytes:
        return b"%s\nboot %s\ntoken %s\nqueued %d\npid %d\n" % (
            _OWNER_MAGIC,
            _BOOT_ID.encode(),
            token.encode(),
            self._queued,
            os.getpid(),
        )

    def _link_lock_file(self) -> _Identity | None:
        """Link the owner file to the lock's name: cheaper by far than a new file each time."""
        if not self._owner_path or b"queued %d\n" % self._queued not in self._owner_text:
            # Not below: a folder that is not there any more is no file that was swept.
            self._make_owner_file()
        try:
            # By the time of the file, which is the file server's, waiters tell this hold from the
            # one before.
            os.utime(self._owner_path)
            made = _identity_of(os.stat(self._owner_path))
            try:
                os.link(self._owner_path, self._lock_path)
            except FileExistsError:
                # On NFS a link that was made is reported as failed when its answer was lost. The
                # number of links does not tell: an evictor that died may have left one aside.
                return made if _identity(self._lock_path) == made else None
            return made
        except FileNotFoundError:
            self._owner_path = ""  # swept; the next attempt makes another
            return None

    def _make_owner_file(self) -> None:
        if self._owner_path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._owner_path)
        token = secrets.token_hex(8)
        self._owner_text = self._owner_contents(token)
        self._owner_path = f"{self._lock_path}.{token}.owner"
        _write_new(self._owner_path, self._owner_text, self._share)
        if self._at_end is not None:
            self._at_end.detach()
        self._at_end = weakref.finalize(self, _remove_at_end, self._owner_path, os.getpid())

    def _open_lock_file(self) -> _Identity | None:
        # Killed in the middle of it, we leave a lock file without a name, which is evicted after
        # the grace period.
        try:
            _write_new(self._lock_path, self._owner_contents(secrets.token_hex(8)))
        except FileExistsError:
            return None
        except PermissionError:
            # Windows, while another handle to a deleted file of this name is still open.
            if os.name != "nt":
                raise
            return None
        return _identity(self._lock_path)

    def _owner_is_dead(self) -> bool:
        """Whether the lock file is of ours, of this boot, and its owner was in the queue.

        Only asked while we hold the queue on a local file system.
        """
        try:
            fd = os.open(
                self._lock_path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
            )
        except OSError:
            return False  # gone, or a symlink of Optuna's
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return False
            lines = os.read(fd, _OWNER_BYTES_MAX).split(b"\n")
        finally:
            os.close(fd)
        return (
            lines[0] == _OWNER_MAGIC
            and bool(_BOOT_ID)
            and b"boot " + _BOOT_ID.encode() in lines
            and b"queued 1" in lines
        )

    def _remove_own_lock_file(self) -> None:
        """Remove the lock file if it is still the one that we made.

        It is moved first, because a move can be undone: if we were stopped between looking and
        moving for so long that we were evicted, it is another's. A plain Optuna worker does not
        survive that its lock file is gone.
        """
        began_at_s = self._clock.now_s()
        if self._owner is None or _identity(self._lock_path) != self._owner:
            _logger.warning("The lock %s was taken from us while we held it.", self._lock_path)
            return
        # So named that it is swept if we are killed before it is removed.
        aside = f"{self._lock_path}.{secrets.token_hex(8)}.owner"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._lock_path, aside)
            was_stopped = self._clock.now_s() - began_at_s > _EVICTION_S_MIN
            self._remove_aside(aside, self._owner if was_stopped else None)

    def _remove_aside(self, aside: str, expected: _Identity | None) -> None:
        """Remove a lock file that was moved aside, or give it back if it is not the expected one.

        Args:
            aside: Where it is now.
            expected: What was to be moved; None if nothing else can have been.
        """
        if expected is not None and _identity(aside) != expected:
            with contextlib.suppress(OSError):
                os.link(aside, self._lock_path, follow_symlinks=False)
        os.unlink(aside)

    # --- eviction ----------------------------------------------------------------------------

    def _evict(self, seen: _Identity | None) -> bool:
        """Remove the lock file that was seen, and no other, whoever else is about to."""
        if seen is None:
            return False
        with self._claim(f"{seen[1]:x}-{seen[2]:x}") as claimed:
            if not claimed or _identity(self._lock_path) != seen:
                return False
            _logger.warning(
                "The lock file %s has not changed for %s s; evicting its owner.",
                self._lock_path,
                self.grace_period,
            )
            aside = f"{self._lock_path}.{secrets.token_hex(8)}.evicted"
            try:
                os.rename(self._lock_path, aside)
            except FileNotFoundError:
                return False
            # A plain Optuna worker may have evicted it and taken the lock in between.
            self._remove_aside(aside, seen)
            return False

    @contextlib.contextmanager
    def _claim(self, what: str) -> Iterator[bool]:
        """Be the only one to evict ``what``; yields False if somebody else is at it.

        Who dies with a claim leaves it behind. Whoever finds it a second time, a whole grace
        period after the first, removes it.
        """
        claim_path = f"{self._lock_path}.{what}.claim"
        try:
            os.close(os.open(claim_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            if claim_path in self._claims_seen:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(claim_path)
            self._claims_seen ^= {claim_path}
            yield False
            return
        try:
            yield True
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(claim_path)

    def _sweep(self) -> None:
        """Remove the owner files that killed processes left behind.

        Those of the living go with them: they are used in the queue only, which we hold, and
        whoever finds its file gone makes another.
        """
        self._swept = True
        if not self._local:
            return
        folder, name = os.path.split(self._lock_path)
        for entry in os.listdir(folder):
            if entry.startswith(name + ".") and entry.endswith(".owner"):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, entry))


class JournalFileSymlinkLock(_FileLock):
    """A lock for any number of processes and machines; works on NFS of every version.

    The lock file appears as a hard link, or by ``O_EXCL`` where the file system has none. The
    class keeps the name of Optuna's, whose symlinks it respects.

    Args:
        filepath: Path of the journal; the lock is ``<filepath>.lock``.
        grace_period: Seconds for which the lock file of a process that may live must not change
            before it is removed; None never removes one. Dead owners on a local file system are
            noticed at once.

    Raises:
        ValueError: ``grace_period`` is not positive.
    """


class JournalFileOpenLock(_FileLock):
    """A lock whose file appears by ``O_EXCL``, for file systems where links are a nuisance.

    On a local file system that lets processes queue it is the same as
    ``JournalFileSymlinkLock``; both may be used on one journal.

    Args:
        filepath: Path of the journal; the lock is ``<filepath>.lock``.
        grace_period: As for ``JournalFileSymlinkLock``.

    Raises:
        ValueError: ``grace_period`` is not positive.
    """

    _may_link = False


def _remove_at_end(path: str, pid: int) -> None:
    """Of a lock object or its process; a forked child leaves alone what is its parent's."""
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _forget_in_child() -> None:
    """Close what a forked child inherited: its copies would keep the dead parent's flock alive.

    Closing a copy does not give the parent's flock back; only its own unlock, or the last close.
    """
    for lock in list(_locks):
        fd = lock._queue_fd
        lock._begin()
        if fd >= 0:
            os.close(fd)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
