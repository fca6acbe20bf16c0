"""Every error that is ours, in one tree; where Optuna defines an error, Optuna's is raised.

::

    TrialstoreError
    ├── LogUnavailableError      (also StorageInternalError)  nothing stored, safe to retry
    ├── OutcomeUnknownError      (also StorageInternalError)  stored or not, nobody can say
    ├── LogCorruptError          (also StorageInternalError)  undecodable bytes, and where
    │   └── LogReplacedError                                  another log than the one read before
    │       └── LogCompactedError                             the same, in fewer records
    ├── SnapshotRefusedError     (also ValueError)            bytes that are no snapshot of ours
    ├── CompactionRefusedError   (also ValueError)            somebody would lose by a compaction
    ├── SecretNotFoundError      (also LookupError)           a password is not where it should be
    └── IncompatibleSchemaError  (also RuntimeError)          the message says what to run

Optuna's own: ``DuplicatedStudyError``, ``UpdateFinishedTrialError``, ``KeyError`` (no such study,
trial or parameter), ``ValueError`` and ``TypeError`` (a value refused at the call). Callers'
existing ``except`` clauses keep working.
"""

from __future__ import annotations

from optuna.exceptions import StorageInternalError


class TrialstoreError(Exception):
    """Base of every error that trialstore defines."""


class LogUnavailableError(TrialstoreError, StorageInternalError):
    """The log was not reached and nothing was appended; the same call may be made again."""


class OutcomeUnknownError(TrialstoreError, StorageInternalError):
    """A write was sent, its answer was lost, and the log can't be asked what became of it."""


class LogCorruptError(TrialstoreError, StorageInternalError):
    """The log holds bytes that are no record.

    Args:
        reason: What is wrong and what to do about it, in a sentence.
        source: The file, key or table.
        offset: Byte offset of the damage in ``source``, where that means something.
        record_number: Number of the damaged record, counted from 0.
    """

    def __init__(
        self,
        reason: str,
        *,
        source: str,
        offset: int | None = None,
        record_number: int | None = None,
    ) -> None:
        where = source
        if record_number is not None:
            where += f", record {record_number}"
        if offset is not None:
            where += f", byte offset {offset}"
        super().__init__(f"{where}: {reason}")
        self.reason = reason
        self.source = source
        self.offset = offset
        self.record_number = record_number

    def __reduce__(self) -> tuple[object, ...]:
        return (
            _rebuild_log_corrupt,
            (type(self), self.reason, self.source, self.offset, self.record_number),
        )


def _rebuild_log_corrupt(
    kind: type[LogCorruptError],
    reason: str,
    source: str,
    offset: int | None,
    record_number: int | None,
) -> LogCorruptError:
    return kind(reason, source=source, offset=offset, record_number=record_number)


class LogReplacedError(LogCorruptError):
    """The log is not the one that was read before: replaced, truncated or removed.

    What was read from the old one does not fit; a new storage reads the new one.
    """


class LogCompactedError(LogReplacedError):
    """The records that follow the cursor are not kept one by one any more; nothing was appended.

    A storage reads the journal anew and goes on. Who reads it through Optuna's two methods opens
    a new storage.
    """


class CompactionRefusedError(TrialstoreError, ValueError):
    """To compact or trim this journal would harm somebody; the message says whom, and nothing was
    changed."""


class SnapshotRefusedError(TrialstoreError, ValueError):
    """Bytes offered as a snapshot are not one, are damaged, or are of an unknown version."""


class IncompatibleSchemaError(TrialstoreError, RuntimeError):
    """The tables or the file are of a version that this trialstore does not read as they are."""


class SecretNotFoundError(TrialstoreError, LookupError):
    """A secret's file or an environment variable is missing; the message names it."""
