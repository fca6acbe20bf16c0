"""A journal file as a log: the door of this package.

What counts, and why nothing acknowledged is lost, is in ``journal_file.py``. Here is that a record
which an earlier attempt appended is not appended again.

Source: docs/formats/journal.md; Optuna ``JournalFileBackend``.
"""

# ruff: noqa: PTH116

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import os
from typing import Any, Final, Literal

from optuna.storages.journal import BaseJournalBackend
from optuna.storages.journal._file import BaseJournalFileLock

from trialstore.clock import CLOCK
from trialstore.findings import Finding
from trialstore.log import Base, Batch, Compaction, Cursor, Decide, Entry, Wanted
from trialstore.logs.beats import Beats
from trialstore.logs.file import compacting, sidecar, system
from trialstore.logs.file.filelock import JournalFileSymlinkLock
from trialstore.logs.file.journal_file import JournalFile, Lines
from trialstore.logs.file.lines import decode_chunk, decode_dicts
from trialstore.logs.file.position import BEGIN, Position, cursor_of, position_of
from trialstore.records import AnyOperation, encode_dict, encode_line, must_be_durable

# Records take more room than their lines. An answer of this size is applied before the next one is
# decoded, so that they lie in the same memory again and not between the trials of a replica.
_ANSWER_BYTES: Final = 1 << 18
# How many places are remembered for those who read through Optuna's two methods.
_READ_POSITIONS_MAX: Final = 16
# How often who listens looks at the file's size; all those looks take a hundredth of a core.
_LOOK_S: Final = 0.01


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
        # Neither a later chdir nor a symlink must make two journals of one, with two locks.
        path = os.path.realpath(os.fspath(file_path))
        lock = lock_obj if lock_obj is not None else JournalFileSymlinkLock(path)
        self._begin(path, lock, durability)
        with self._file.unavailable("can't be opened"):
            self._file.open(create=True)

    def _begin(
        self, path: str, lock: BaseJournalFileLock, durability: Literal["full", "process"]
    ) -> None:
        """The state of a log that has nothing open in this process."""
        self._file = JournalFile(path, lock, durability)
        self._beats = Beats(path, system.sync_folder if durability == "full" else None)
        self._read_positions: dict[int, Position] = {}  # for read_logs, by record number

    def __getstate__(self) -> dict[str, Any]:
        file = self._file
        return {"path": file.path, "lock": file.lock, "durability": file.durability}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin(**state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._file.path!r})"

    @property
    def path(self) -> str:
        """Absolute path of the journal, behind all symlinks."""
        return self._file.path

    # --- Log ---------------------------------------------------------------------------------

    def exchange(self, records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``Log.exchange``. Without records it takes no lock.

        Raises:
            ValueError: The records are too much for one write; nothing was written.
            LogUnavailableError: The file or its lock can't be opened or written; nothing counts.
            OutcomeUnknownError: A sync failed, or the disk was full in the middle of a batch.
            LogCorruptError: Damage before the tail. Nothing was appended.
            LogReplacedError: The file is not the one that ``cursor`` comes from.
        """
        with self._file.mutex:
            position = position_of(cursor)
            if not records:
                before = position
                news, position = self._file.read_unlocked(position, decode_chunk, _ANSWER_BYTES)
                # The offsets of two files are not compared: look once more.
                moved = before.number and position.identity != before.identity
                more = moved or position.offset - before.offset >= _ANSWER_BYTES
                return Batch(None, news, cursor_of(position), bool(more))
            lines = self._lines_of(records)
            self._beats.cover(records)

            def lines_of(seen: list[Any], position: Position) -> Lines:
                fresh = _without(records, seen)
                if len(fresh) < len(records):
                    return self._lines_of(fresh) if fresh else Lines(b"", [], lines.durable)
                return lines

            seen, own, position = self._file.append(lines_of, position, decode_chunk)
            return Batch(None, seen + own, cursor_of(position))

    def _lines_of(self, records: Sequence[AnyOperation]) -> Lines:
        data = b"".join(map(encode_line, records))
        durable = self._file.durability == "full" and must_be_durable(list(records))
        return Lines(data, decode_chunk(data, None), durable)

    def close(self) -> None:
        """Close the file; a later call opens it again."""
        with self._file.mutex:
            self._file.close()

    # --- ConditionalLog ----------------------------------------------------------------------

    def exchange_if(self, decide: Decide, cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``ConditionalLog``; ``decide`` runs once, under the lock of the file.

        Raises:
            As ``exchange``.
        """

        def lines_of(news: list[Any], position: Position) -> Lines | None:
            records = decide(news, cursor_of(position))
            self._beats.cover(records)
            return self._lines_of(records) if records else None

        with self._file.mutex:
            _, own, position = self._file.append(lines_of, position_of(cursor), decode_chunk)
            return Batch(None, own, cursor_of(position))

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

    # --- Audible -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def listening(self) -> Iterator[Callable[[float], None]]:
        """See ``Audible``. Looks at the file's size, for which nothing is opened."""
        seen: object = None

        def wait(timeout_s: float) -> None:
            nonlocal seen
            give_up_at_s = CLOCK.now_s() + timeout_s
            while (now := self._look()) == seen and CLOCK.now_s() < give_up_at_s:
                CLOCK.sleep(min(timeout_s, _LOOK_S))
            seen = now

        yield wait

    def _look(self) -> object:
        try:
            status = os.stat(self._file.path)
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    # --- Optuna's backend --------------------------------------------------------------------

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """The records from a number on, as Optuna's ``JournalStorage`` replays them.

        Raises:
            LogUnavailableError, LogCorruptError: As for ``exchange``.
        """
        with self._file.mutex:
            begin = self._read_positions.get(log_number_from, BEGIN)
            logs, position = self._file.read_unlocked(begin, decode_dicts)
            # Optuna counts from where it began to read, and a compaction changes the numbers.
            moved = begin.number and position.identity != begin.identity
            if moved or (log_number_from > begin.number and self._file.head is not None):
                self._read_positions.clear()
                raise self._file.replaced(begin)
            self._note_read(position)
            return logs[log_number_from - begin.number :]

    def _note_read(self, position: Position) -> None:
        """Several storages may read through one backend."""
        self._read_positions.pop(position.number, None)
        self._read_positions[position.number] = position
        if len(self._read_positions) > _READ_POSITIONS_MAX:
            del self._read_positions[next(iter(self._read_positions))]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records; durable on return.

        Raises:
            ValueError, LogUnavailableError, OutcomeUnknownError, LogCorruptError: As for
                ``exchange``.
        """
        if not logs:
            return
        data = b"".join(map(encode_dict, logs))
        lines = Lines(data, decode_dicts(data, None), self._file.durability == "full")
        with self._file.mutex:
            position = next(reversed(self._read_positions.values()), BEGIN)
            if position is BEGIN:
                _, position = self._file.read_unlocked(position, decode_dicts)
            self._file.append(lambda seen, position: lines, position, decode_dicts)

    # --- SnapshotStore -----------------------------------------------------------------------

    def save_snapshot(self, make: Callable[[], tuple[bytes, Cursor] | None]) -> bool:
        """See ``SnapshotStore`` and ``sidecar.save``."""
        return sidecar.save(self._file, make)

    def load_snapshot(self) -> tuple[memoryview, Cursor] | None:
        """See ``SnapshotStore`` and ``sidecar.load``."""
        return sidecar.load(self._file)

    # --- Entries and Inspectable -------------------------------------------------------------

    def entries(self) -> Iterator[Entry]:
        """See ``Entries``.

        Raises:
            LogUnavailableError: The file can't be read.
            LogCorruptError: It is no journal at all.
        """
        with self._file.mutex, self._file.unavailable("can't be read"):
            end = self._file.open()
            offset = number = 0
            for lines in self._file.whole_lines(0, end):
                parts = lines.split(b"\n")
                for index, line in enumerate(parts):
                    ended = index < len(parts) - 1
                    if line and not (ended or offset):
                        self._file.check_is_torn(line)
                    if ended or line:
                        where = f"{self._file.path}, record {number}, byte offset {offset}"
                        yield Entry(where, line, ended)
                    offset += len(line) + ended
                    number += 1
                number -= 1

    def facts(self) -> dict[str, Any]:
        """See ``Described``."""
        return {
            "kind": "journal in a file",
            "address": self._file.path,
            "size_bytes": self._file.open(),
            "snapshot_bytes": system.size(sidecar.path_beside(self._file)),
            "file_system_is_local": self._file.local,
        }

    def findings(self, *, deep: bool) -> Iterator[Finding]:
        """See ``Inspectable``: what is beside the journal."""
        path = sidecar.path_beside(self._file)
        if system.size(path) is not None and self.load_snapshot() is None:
            yield Finding(
                "snapshot-unusable",
                path,
                "The snapshot is damaged or of another journal. It is ignored and replaced in "
                "time; nothing is lost.",
                "note",
            )

    # --- CompactableLog ----------------------------------------------------------------------

    def load_base(self) -> Base:
        """See ``CompactableLog``."""
        with self._file.mutex, self._file.unavailable("can't be read"):
            self._file.identity(self._file.open())
            head = self._file.head
            return Base(head.marks if head is not None else {})

    def compact(self, make: Callable[[], Compaction]) -> None:
        """See ``CompactableLog`` and ``compacting.compact``."""
        compacting.compact(self._file, make)


def _without(records: Sequence[AnyOperation], seen: list[Any]) -> Sequence[AnyOperation]:
    """Those that are not among the records seen, where an attempt before this one put them."""
    writers = {record.worker_id for record in records}
    known = {
        (record.worker_id, record.seq)
        for record in seen
        if record.worker_id in writers and record.seq >= 0
    }
    if not known:
        return records
    return [record for record in records if (record.worker_id, record.seq) not in known]
