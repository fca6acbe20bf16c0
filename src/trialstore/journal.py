"""``JournalStorage`` and its backends: the names of ``optuna.storages.journal``.

``BaseJournalBackend``, ``BaseJournalSnapshot`` and ``BaseJournalFileLock`` are Optuna's own
abstract classes, so that backends and locks written for Optuna work here.
"""

from __future__ import annotations

from typing import Literal, cast

from optuna.storages.journal import BaseJournalBackend
from optuna.storages.journal._base import BaseJournalSnapshot
from optuna.storages.journal._file import BaseJournalFileLock

from trialstore import snapshot as snapshots
from trialstore.callbacks import StaleTrialCallback
from trialstore.clock import CLOCK, Clock
from trialstore.compaction import Compacted, compact, trim
from trialstore.credentials import secret
from trialstore.log import Log, Wanted
from trialstore.logs.backend import BackendLog
from trialstore.logs.file import FileLog
from trialstore.logs.file.filelock import JournalFileOpenLock, JournalFileSymlinkLock
from trialstore.logs.redis import RedisLog
from trialstore.storage import Storage

__all__ = [
    "BaseJournalBackend",
    "BaseJournalFileLock",
    "BaseJournalSnapshot",
    "Compacted",
    "JournalFileBackend",
    "JournalFileOpenLock",
    "JournalFileSymlinkLock",
    "JournalRedisBackend",
    "JournalStorage",
    "compact",
    "trim",
]


class JournalFileBackend(FileLog):
    """A journal in one file, for any number of processes; also on NFS.

    Args:
        file_path: Path of the journal; created if it does not exist.
        lock_obj: A lock that every process on this file uses, by default a
            ``JournalFileSymlinkLock`` on ``file_path``.
        durability: "full" survives power loss, "process" only the death of processes.
    """


class JournalRedisBackend(RedisLog):
    """A journal in Redis, on one server, behind Sentinel, or on a cluster.

    Args:
        url: ``redis://``, ``rediss://``, ``unix://`` or ``redis+sentinel://``.
        use_cluster: The URL is that of a cluster's node. One round trip an exchange needs a
            prefix with a hash tag, say ``{study}``.
        prefix: Of every key.
        durability: "full" warns of settings under which the server may lose what it acknowledged.
        password_file: File that holds the server's password, if it is not in the URL; a pickle
            carries the file's name, not the password.
        password_env: Environment variable that holds it, likewise.

    Raises:
        ImportError: The ``redis`` package is not installed.
        ValueError: The URL can't be used, or a password has two places.
    """

    def __init__(
        self,
        url: str,
        use_cluster: bool = False,
        prefix: str = "",
        *,
        durability: Literal["full", "process"] = "full",
        password_file: str | None = None,
        password_env: str | None = None,
        clock: Clock = CLOCK,
    ) -> None:
        super().__init__(
            url,
            use_cluster,
            prefix,
            durability=durability,
            password=secret(password_file, password_env),
            clock=clock,
        )


class JournalStorage(Storage):
    """A storage over a journal.

    Args:
        log_storage: A ``JournalFileBackend``, a ``JournalRedisBackend``, or any
            ``BaseJournalBackend`` of your own.
        heartbeat_interval: Seconds between two beats for the trials that this storage runs; None
            is without heartbeat. docs/heartbeats.md has this and the next three.
        grace_period: Seconds without a beat after which a trial is failed; None is twice the
            interval.
        heartbeat_stale_trial_callback: What is done about a failed trial, such as
            ``RetryHeartbeatStaleTrialCallback``.
        failed_trial_callback: The name of that until Optuna 4.9.
        linger_s: For how long a write on a running trial may wait for an exchange to ride along
            with; 0 writes everything through.
        max_staleness_s: How old an answer may be; 0 means never older than the call.

    Raises:
        LogCorruptError: The journal is damaged; the error says where.
        LogUnavailableError: It can't be opened.
    """

    def __init__(
        self,
        log_storage: BaseJournalBackend,
        *,
        heartbeat_interval: int | None = None,
        grace_period: int | None = None,
        heartbeat_stale_trial_callback: StaleTrialCallback | None = None,
        failed_trial_callback: StaleTrialCallback | None = None,
        linger_s: float = 0.02,
        max_staleness_s: float = 0.0,
        clock: Clock = CLOCK,
    ) -> None:
        if hasattr(log_storage, "exchange"):
            log = cast(Log, log_storage)
        elif isinstance(log_storage, BaseJournalBackend):
            log = BackendLog(log_storage)
        else:
            raise TypeError(
                "log_storage must be a JournalFileBackend or another BaseJournalBackend, not "
                f"{type(log_storage).__name__}."
            )
        super().__init__(
            log,
            heartbeat_interval=heartbeat_interval,
            grace_period=grace_period,
            heartbeat_stale_trial_callback=heartbeat_stale_trial_callback,
            failed_trial_callback=failed_trial_callback,
            linger_s=linger_s,
            max_staleness_s=max_staleness_s,
            clock=clock,
        )
        # A damaged or unreachable journal is told of here, not in the middle of a study.
        self._exchanger.run((), Wanted(catalogue=True))

    def restore_replay_result(self, snapshot: bytes) -> None:
        """Begin from a snapshot of this journal instead of replaying it from the start.

        Raises:
            SnapshotRefusedError: The bytes are no snapshot of trialstore's, or damaged. A pickle
                of Optuna's is refused: loading one can run code.
        """
        self._exchanger.restore(snapshots.load(snapshot))
