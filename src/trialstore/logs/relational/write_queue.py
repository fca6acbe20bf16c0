"""A queue before SQLite's write lock, so that whoever waits longest is next.

SQLite's own waiting is a sleep that grows: of 16 processes, the one that has waited longest looks
least often. Ours wait in ``<database>.queue`` instead, a file beside it that is only ever
flocked: the kernel wakes them in order, and gives the lock back when its holder dies. It keeps
nobody from writing, SQLite's lock alone does that; plain Optuna workers, which do not queue, meet
the head of the queue there.

Source: flock(2); docs/decisions/0012-a-queue-before-sqlites-lock.md.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
import threading
from typing import Final
import weakref

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_WAIT_MAX_S: Final = 60.0
"""As long as SQLite's own waiting. Only a holder that is stopped, not dead, takes so long."""


class _File:
    """Open until it is closed, or nobody knows it any more: users need not close a storage."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except PermissionError:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # another user's

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close


class WriteQueue:
    """One process' place; it has none, and nothing waits, where the file can't be flocked.

    Args:
        path: Of the database, on a local file system.
        wait_max_s: After so long, go on out of turn; and from then on at once, until the holder
            has moved.
    """

    def __init__(self, path: Path, wait_max_s: float = _WAIT_MAX_S) -> None:
        self._path = path.with_name(f"{path.name}.queue")
        self._wait_max_s = wait_max_s
        self._file: _File | None = None
        self._late: threading.Thread | None = None  # waits on, for a turn that was given up
        self._works = fcntl is not None
        self.is_first = False
        _queues.add(self)

    def enter(self) -> None:
        """Wait until it is this process' turn."""
        if self.is_first or not self._works:
            return
        if self._late is not None and self._late.is_alive():
            return  # whoever was too slow still is
        try:
            if self._file is None:
                self._file = _File(self._path)
            self.is_first = self._wait(self._file)
        except OSError:
            # A folder that may not be written, a file system without flock.
            self._works = False

    def _wait(self, file: _File) -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        # Only a thread of its own can be waited for with a deadline.
        waiter = threading.Thread(
            target=fcntl.flock, args=(file, fcntl.LOCK_EX), name="trialstore-queue", daemon=True
        )
        try:
            waiter.start()
        except RuntimeError:  # none, at the end of a process (Python 3.12), or there are too many
            return False
        try:
            waiter.join(self._wait_max_s)
        finally:
            is_late = waiter.is_alive()
            if is_late:
                # Out of turn from here. The file closes with the last who knows it, the waiter.
                self._file, self._late = None, waiter
        return not is_late

    def leave(self) -> None:
        """Let the next one in, if it was this process' turn."""
        if self.is_first and self._file is not None:
            self.is_first = False
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give the place back; ``enter`` takes a new one."""
        self.is_first = False
        if self._file is not None:
            self._file.close()
            self._file = None


_queues: weakref.WeakSet[WriteQueue] = weakref.WeakSet()


def _close_inherited() -> None:
    """A forked child's copies would keep the flock of a parent that dies while it holds it."""
    for queue in list(_queues):
        queue.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
