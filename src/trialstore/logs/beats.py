"""Leases beside a journal file: a folder with one file per owner, whose mtime is its last beat.

Beats are not in the journal, so that Optuna's reader never meets an operation that it does not
know, and a beat costs no lock, no write and no sync.

Every mtime here is set by whoever keeps the file system, as ``utimensat`` without a time asks for,
also over NFS. They are compared with that of a file touched a moment ago, so no worker's clock is
looked at, and workers whose clocks are hours apart agree on who is dead.

Source: docs/formats/journal.md, "Beats"; utimensat(2).
"""

# Which system calls are made is the subject here; pathlib hides it.
# ruff: noqa: PTH102, PTH108, PTH112, PTH118

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import os
from typing import Final
from urllib.parse import quote

from trialstore.errors import LogUnavailableError
from trialstore.logs.modes import share_beside
from trialstore.records import Operation, owners_of_started

_FLAGS: Final = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NOW: Final = "now"  # no owner's file: those have a suffix
_SUFFIX: Final = ".beat"


class Beats:
    """The leases on one journal file, as ``LeaseStore`` wants them.

    Args:
        journal_path: Absolute path of the journal; the folder is ``<journal_path>.beats``.
        sync_folder: Makes the entries of a folder survive power loss; None leaves that out.
    """

    def __init__(
        self, journal_path: str, sync_folder: Callable[[str], None] | None = None
    ) -> None:
        self._journal_path = journal_path
        self._folder = journal_path + ".beats"
        self._sync_folder = sync_folder
        self._taken: set[str] = set()

    def cover(self, records: Sequence[Operation]) -> None:
        """The first beat of what is about to be appended, by owners that have taken a lease.

        Raises:
            LogUnavailableError: The beat can't be kept.
        """
        if self._taken:
            for owner in owners_of_started(records) & self._taken:
                self._touch(self._path(owner))

    def take_lease(self, owner: str) -> None:
        """See ``LeaseStore``; a beat then precedes every record that starts a trial."""
        self._make_folder()
        self._touch(self._path(owner))
        if self._sync_folder is not None:
            # A trial must not outlive, through power loss, the lease that covers it.
            with self._unavailable():
                self._sync_folder(self._path(owner))
        self._taken.add(owner)

    def renew_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``; the lease is the owner's, whichever trials it runs."""
        self._make_folder()
        self._touch(self._path(owner))

    def withdraw_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``."""
        self._taken.discard(owner)
        with self._unavailable(), contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(owner))

    def expired(
        self, study_id: int, running: Mapping[int, str], grace_period_s: float
    ) -> list[int]:
        """See ``LeaseStore``."""
        owners = {*running.values()} - {""}
        if not owners or not os.path.isdir(self._folder):
            return []
        # Before the beats are read: however long that takes, nobody gets older by it.
        oldest_ns = self._touch(os.path.join(self._folder, _NOW)) - grace_period_s * 1e9
        beats = {owner: self._beat_ns(owner) for owner in owners}
        return [
            trial_id
            for trial_id, owner in running.items()
            if (beat_ns := beats.get(owner)) is not None and beat_ns < oldest_ns
        ]

    def _path(self, owner: str) -> str:
        # An owner may be anything that stands in a journal; a path must not come of it.
        return os.path.join(self._folder, quote(owner, safe="") + _SUFFIX)

    def _make_folder(self) -> None:
        with self._unavailable():
            try:
                os.mkdir(self._folder)
            except FileExistsError:
                return
            if os.name != "nt":
                fd = os.open(self._folder, os.O_RDONLY | _FLAGS)
                try:
                    share_beside(fd, self._journal_path)
                finally:
                    os.close(fd)

    def _touch(self, path: str) -> int:
        """Set a file's mtime to the file system's present; returns it, in ns."""
        with self._unavailable():
            is_new = False
            try:
                fd = os.open(path, os.O_WRONLY | _FLAGS)
            except FileNotFoundError:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | _FLAGS, 0o666)
                is_new = True
            try:
                if is_new:
                    share_beside(fd, self._journal_path)
                os.utime(fd if os.utime in os.supports_fd else path)
                return os.fstat(fd).st_mtime_ns
            finally:
                os.close(fd)

    def _beat_ns(self, owner: str) -> int | None:
        """When an owner was last heard of; None if it has no lease."""
        try:
            # Opened rather than only looked at: NFS may answer a stat from a cache that is older
            # than the grace period, and asks the server at an open.
            fd = os.open(self._path(owner), os.O_RDONLY | _FLAGS)
        except OSError:
            return None
        try:
            return os.fstat(fd).st_mtime_ns
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _unavailable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogUnavailableError(f"{self._folder}: no lease can be kept: {error}") from error
