"""Who may open what is beside a journal file: those who may open the journal.

Source: chown(2), chmod(2).
"""

# Which system calls are made is the subject here; pathlib hides it.
# ruff: noqa: PTH116

from __future__ import annotations

import contextlib
import os
import stat


def share_like(fd: int, path: str) -> bool:
    """Let those open the file just made for us alone who may open the one at ``path``.

    Only the superuser can give it to another owner, who is taken for a member of the group.

    Returns:
        False: The group of the file at ``path`` has rights that others have not, and can't be
        given to this one, which is left to its owner alone.
    """
    if not hasattr(os, "fchown"):
        return True  # Windows: the folder decides
    status = os.stat(path)
    for owner in (status.st_uid, -1):
        # Before the mode, or members of our own group could open it.
        with contextlib.suppress(OSError):  # what came of it is looked at
            os.fchown(fd, owner, status.st_gid)
            break
    mode, ours = stat.S_IMODE(status.st_mode), os.fstat(fd)
    is_group_special = (mode & stat.S_IRWXG) >> 3 != mode & stat.S_IRWXO
    is_shared = ours.st_gid == status.st_gid or not is_group_special
    if not is_shared:
        mode &= stat.S_IRWXU
    if stat.S_IMODE(ours.st_mode) != mode:  # some file systems have one mode, and refuse to set it
        os.fchmod(fd, mode)
    return is_shared


def share_beside(fd: int, path: str) -> None:
    """Let those use the file or folder just made who may open the one at ``path``, whatever our
    umask is; nothing that is secret may be in it."""
    if not hasattr(os, "fchown"):
        return  # Windows: the folder decides
    with contextlib.suppress(OSError):  # it is another's, or there is nothing at the path
        if not share_like(fd, path):
            os.fchmod(fd, 0o644)
        status = os.fstat(fd)
        mode = stat.S_IMODE(status.st_mode) | 0o600
        if stat.S_ISDIR(status.st_mode):
            mode |= (mode & 0o444) >> 2  # who may read it may look into it
        os.fchmod(fd, mode)
