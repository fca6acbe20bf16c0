"""System calls as this package makes them: all the bytes, to the disk, on every platform.

They are called through this module (``system.pwrite``), so that tests can stand between.

Source: pread(2), fdatasync(2), flock(2), fcntl(2) of macOS, ``F_FULLFSYNC``.
"""

# Which system calls are made, and in what order, is the subject here; pathlib hides it.
# ruff: noqa: PTH116, PTH120

from __future__ import annotations

import errno
import os
import sys
from typing import Final

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BINARY: Final = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def sync_fd(fd: int) -> None:
    """Every sync of this package; returns when the bytes written to ``fd`` survive power loss."""
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            os.fsync(fd)  # of a network drive
    elif hasattr(os, "fdatasync"):
        os.fdatasync(fd)  # leaves out the times only; the size of the file is data
    else:
        os.fsync(fd)


def sync_folder(path: str) -> None:
    """Make the file's entry in its folder survive power loss."""
    if os.name == "nt":
        return
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync_fd(fd)
    finally:
        os.close(fd)


def is_only_writer(fd: int, path: str, *, may_be_mixed: bool) -> bool:
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
    return is_at(fd, path)


def is_at(fd: int, path: str) -> bool:
    """Whether the open file is the one at the path."""
    try:
        there, ours = os.stat(path), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def pread(fd: int, count: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(fd, count, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, count)


def pwrite(fd: int, data: bytes, offset: int) -> None:
    if not hasattr(os, "pwrite"):
        os.lseek(fd, offset, os.SEEK_SET)
        os.write(fd, data)
        return
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def write_all(fd: int, data: bytes | memoryview) -> int:
    """All of it, and how many bytes that is."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)
