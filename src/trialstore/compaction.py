"""The shortest journal that says what a long one does, with the same ids, numbers and times.

Ids are positions, so nothing that was created can vanish: a trial of a deleted study leaves a
*placeholder*, and a deleted study two short records. All else that was superseded goes; a trial
is one record. What running storages rely on stays: the owner of each RUNNING trial, and the marks
by which a storage that got no answer knows what became of its records.

What is compacted is what trialstore reads: a field that nobody can read, of which a storage warns,
does not come back.

Source: docs/formats/journal.md, "Compaction"; Optuna ``JournalStorageReplayResult``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Final, NamedTuple, Protocol

from trialstore import records as r
from trialstore.errors import CompactionRefusedError
from trialstore.log import NOTHING, CompactableLog, Compaction, Log, Marks, TrimmableLog
from trialstore.logs.head import WORKER_ID
from trialstore.records import AnyOperation, Outcome, Verdict
from trialstore.snapshot import dump, restore_base

# A storage may send again what it last sent, at most its outbox; of its records before that
# nobody asks any more.
_MARKED_MAX: Final = 256
_RUNS_MAX: Final = 64
# Storages that appended nothing for so long that this many others came have ended.
_WORKERS_MAX: Final = 1000


class Compacted(NamedTuple):
    """How many records a journal had when it was read, and how many stand for them now; a head is
    none of them."""

    n_records: int
    n_kept: int


class _CompactableLog(Log, CompactableLog, Protocol):
    pass


class _TrimmableLog(_CompactableLog, TrimmableLog, Protocol):
    pass


def compact(log: _CompactableLog, *, force: bool = False) -> Compacted:
    """Let a journal say the same in fewer records; storages at work on it go on.

    Args:
        log: The journal. Nobody waits for longer than it takes to put the result in place.
        force: Also if plain Optuna workers have written to it. They must have been stopped.

    Raises:
        CompactionRefusedError: Plain Optuna workers have written to it; it is kept where that
            can't be done atomically; or the group of the file would be locked out.
        LogUnavailableError: It can't be written, or is being compacted by somebody else.
        LogCorruptError: It is damaged; nothing was changed.
        TypeError: It is no journal that can be compacted.
    """
    if not isinstance(log, CompactableLog):
        raise TypeError(
            "Only a JournalFileBackend or JournalRedisBackend of trialstore can be compacted, not "
            f"{type(log).__name__}."
        )
    counts = [0, 0]

    def make() -> Compaction:
        reading = _read(log, force=force)
        counts[0] = reading.n_records - reading.has_head
        return Compaction(_counted(reading.image(), counts), reading.cursor, reading.marks())

    log.compact(make)
    return Compacted(*counts)


def trim(log: _TrimmableLog, *, force: bool = False) -> Compacted:
    """Remove the records of a journal that a snapshot, made now, stands for.

    Storages at work on it go on, those that lag from the snapshot, which is then part of the
    journal. No Optuna can open a trimmed journal, until it is compacted.

    Args:
        log: The journal.
        force: Also if plain Optuna workers have written to it. They must have been stopped.

    Raises:
        CompactionRefusedError, LogUnavailableError: As ``compact``.
    """
    if not isinstance(log, TrimmableLog):
        raise TypeError(
            f"Only a JournalRedisBackend of trialstore can be trimmed, not {type(log).__name__}; "
            "a journal file is compacted instead."
        )
    counts = [0, 0]

    def make() -> Compaction:
        reading = _read(log, force=force)
        counts[0] = reading.n_records - reading.has_head
        snapshot = dump(reading.replica, reading.cursor, reading.n_records)
        return Compaction([snapshot], reading.cursor, reading.marks())

    log.trim(make)
    return Compacted(*counts)


def _counted(lines: Iterator[bytes], counts: list[int]) -> Iterator[bytes]:
    for line in lines:
        counts[1] += 1
        yield line


def _read(log: _CompactableLog, *, force: bool) -> _Reading:
    reading = _Reading(log)
    if reading.plain_worker and not force:
        raise CompactionRefusedError(
            f"A plain Optuna worker ({reading.plain_worker}) has written to {log!r}. One that is "
            "still running would misread it afterwards. Stop all of them, and force it."
        )
    return reading


class _Reading:
    """Everything that a journal says.

    Args:
        log: The journal; read to its end.
    """

    def __init__(self, log: _CompactableLog) -> None:
        (self.replica, self.cursor, self.n_records), marks = restore_base(log)
        self.plain_worker = ""
        self.has_head = False
        self._workers = {worker_id: _Seen(known) for worker_id, known in marks.items()}
        self._n_noted = 0
        # Of each RUNNING trial, the record that created or claimed it.
        self._started_by: dict[int, int] = {}
        more = True
        while more:
            batch = log.exchange((), self.cursor, NOTHING)
            for record in batch.news:
                assert isinstance(record, r.Operation)
                self._note(record, self.replica.apply(record))
            self.cursor, more = batch.cursor, batch.more
            self.n_records += len(batch.news)

    def _note(self, record: AnyOperation, outcome: Outcome) -> None:
        if isinstance(record, r.CreateTrial):
            if record.state == r.RUNNING and outcome.id >= 0:
                self._started_by[outcome.id] = record.seq
        elif isinstance(record, r.SetTrialStateValues) and outcome.verdict is Verdict.ACCEPTED:
            if record.state == r.RUNNING:
                self._started_by[record.trial_id] = record.seq
            else:
                self._started_by.pop(record.trial_id, None)
        self._n_noted += 1
        self.has_head |= record.worker_id == WORKER_ID
        if record.seq >= 0:
            worker = self._workers.get(record.worker_id)
            if worker is None:
                worker = self._workers[record.worker_id] = _Seen()
            worker.note(record.seq, outcome)
            worker.n_before = self._n_noted
        # A trial that ran when its journal was trimmed has no seq any more, but its owner.
        elif record.worker_id not in self._workers and not _is_nobodys(record):
            self.plain_worker = record.worker_id

    def marks(self) -> dict[str, Marks]:
        latest = sorted(self._workers.items(), key=lambda item: item[1].n_before)
        return {worker_id: seen.marks() for worker_id, seen in latest[-_WORKERS_MAX:]}

    def image(self) -> Iterator[bytes]:
        """The lines of the shortest journal that comes to the same."""
        replica = self.replica
        positions = replica.positions()
        live = set(replica.study_ids())
        names = {replica.study_name(study_id) for study_id in live}
        unused = (name for name in map(str, count()) if name not in names)
        placeholder_name, deleted_name = next(unused), next(unused)
        has_placeholders = any(study_id not in live for study_id, _ in positions.runs)
        placeholder_study: int | None = None
        for study_id in range(positions.next_study_id):
            if study_id in live:
                yield from self._study_lines(study_id)
            elif has_placeholders and placeholder_study is None:
                placeholder_study = study_id
                yield _line(_created(placeholder_name))
            else:
                yield _line(_created(deleted_name))
                yield _line(r.DeleteStudy(worker_id="", study_id=study_id))
        trials = {study_id: replica.trial_images(study_id) for study_id in live}
        placeholder = b'{"op_code":4,"study_id":%d,"datetime_start":null,"worker_id":""}' % (
            placeholder_study or 0
        )
        for study_id, n_trials in positions.runs:
            for _ in range(n_trials):
                if study_id in live:
                    yield self._trial_line(next(trials[study_id]))
                else:
                    yield placeholder
        if placeholder_study is not None:
            yield _line(r.DeleteStudy(worker_id="", study_id=placeholder_study))

    def _study_lines(self, study_id: int) -> Iterator[bytes]:
        study = self.replica.study_image(study_id)
        yield _line(
            r.CreateStudy(worker_id="", study_name=study.study_name, directions=study.directions)
        )
        # Optuna takes one attribute a record.
        for key, value in study.user_attrs.items():
            yield _line(
                r.SetStudyUserAttr(worker_id="", study_id=study_id, user_attr={key: value})
            )
        for key, value in study.system_attrs.items():
            yield _line(
                r.SetStudySystemAttr(worker_id="", study_id=study_id, system_attr={key: value})
            )

    def _trial_line(self, trial: r.PutTrial) -> bytes:
        values = trial.values
        is_single = values is not None and len(values) == 1
        is_running = trial.state == r.RUNNING
        return _line(
            r.CreateTrial(
                # Of a trial that runs, the pair names its owner, who may ask what became of it.
                worker_id=trial.owner if is_running else "",
                seq=self._started_by.get(trial.trial_id, -1) if is_running else -1,
                study_id=trial.study_id,
                datetime_start=trial.datetime_start,
                state=trial.state,
                value=values[0] if values is not None and is_single else None,
                values=None if is_single else values,
                datetime_complete=trial.datetime_complete,
                distributions=dict(zip(trial.params, trial.distributions, strict=True)),
                params=trial.params,
                user_attrs=trial.user_attrs,
                system_attrs=trial.system_attrs,
                intermediate_values={
                    str(step): value for step, value in trial.intermediate_values.items()
                },
            )
        )


def _is_nobodys(record: AnyOperation) -> bool:
    """Whether a record without a ``seq`` was put there by a compaction, or in place of a hole."""
    return not record.worker_id or (isinstance(record, r.DeleteStudy) and record.study_id < 0)


class _Seen:
    """What became of the records of one storage; see ``Marks``.

    ``n_before``: how many records are before its last one.
    """

    __slots__ = ("_created", "_refused", "_runs", "n_before")

    def __init__(self, known: Marks | None = None) -> None:
        self.n_before = 0
        self._runs = [list(run) for run in known.applied] if known else []
        self._created = dict(known.created) if known else {}
        self._refused = dict(known.refused) if known else {}

    def note(self, seq: int, outcome: Outcome) -> None:
        runs = self._runs
        if runs and runs[-1][1] + 1 == seq:
            runs[-1][1] = seq
        elif not runs or runs[-1][1] < seq:
            runs.append([seq, seq])
        else:
            # Threads take their numbers before they are written, so that some come late.
            self._runs = _merged([*runs, [seq, seq]])
        if outcome.id >= 0:
            self._created[seq] = outcome.id
        elif outcome.verdict is not Verdict.ACCEPTED:
            self._refused[seq] = outcome.verdict

    def marks(self) -> Marks:
        return Marks(
            [(first, last) for first, last in self._runs[-_RUNS_MAX:]],
            dict(list(self._created.items())[-_MARKED_MAX:]),
            dict(list(self._refused.items())[-_MARKED_MAX:]),
        )


def _merged(runs: list[list[int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for first, last in sorted(runs):
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return merged


def _created(name: str) -> r.CreateStudy:
    return r.CreateStudy(worker_id="", study_name=name, directions=[1])


def _line(record: AnyOperation) -> bytes:
    return r.encode_line(record)[:-1]
