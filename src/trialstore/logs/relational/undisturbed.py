"""What an exchange may leave out while nobody else writes to the file.

SQLite tells a connection whether others have committed since it last looked
(``Dialect.others_wrote``). As long as they have not, what the last exchange answered is still
true, but for what this log has written since. Then nothing needs to be read back, neither what
decides nor what is wanted: the operations are accepted, and are the news themselves.

This holds for whoever goes on from the very cursor that the last exchange gave out, and for that
part of the store only which has been read since others last wrote; all else is read as ever.

Source: https://www.sqlite.org/pragma.html#pragma_data_version
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import math
from typing import cast

import msgspec

from trialstore import records as r
from trialstore.log import Wanted
from trialstore.logs.relational.cursor import Probe, Studies, StudyCursor
from trialstore.logs.relational.dialects import Dialect, record_time
from trialstore.logs.relational.writing import FIELDS, is_bare
from trialstore.records import Operation, PutTrial, Record

_NONE, _NEXT, _WAITING, _FINISHED, _ALL = range(5)
"""How much of a study's trials is known: nothing, the next that are WAITING, which are WAITING,
that and the finished ones, all of them."""
_ON_RUNNING = (*FIELDS, r.SetTrialStateValues)


class Created(msgspec.Struct):
    """A trial that an operation has created, as the database numbered it."""

    record: r.CreateTrial
    trial_id: int
    number: int


class Standing:
    """What still stands of the answers since others last wrote.

    Args:
        version: Of the file, as ``Dialect.others_wrote`` told it.
        cursor: The very object that the last exchange gave out.
        studies: Study ids to how much of each one's trials is known.
        rows: Studies whose own rows have been read; a look for WAITING trials may leave them out.
        running: RUNNING trials whose images have been sent, to the ids of their studies.
    """

    __slots__ = ("cursor", "rows", "running", "studies", "version")

    def __init__(
        self,
        version: int,
        cursor: Studies,
        studies: dict[int, int],
        rows: frozenset[int],
        running: dict[int, int],
    ) -> None:
        self.version = version
        self.cursor = cursor
        self.studies = studies
        self.rows = rows
        self.running = running

    @classmethod
    def after_reading(
        cls,
        version: int,
        cursor: Studies,
        wanted: Wanted,
        images: Iterable[PutTrial],
        before: Standing | None,
    ) -> Standing:
        """What stands after an answer that was read.

        Args:
            before: What stood until then, if that exchange wrote nothing.
        """
        studies: dict[int, int] = {}
        rows = wanted.studies | wanted.finished_of | wanted.trials_of
        running: dict[int, int] = {}
        if before is not None and before.version == version:
            studies.update(before.studies)
            rows |= before.rows
            running.update(before.running)
        for ids, known in (
            (wanted.studies, _NONE),
            (wanted.next_of, _NEXT),
            (wanted.waiting_of, _WAITING),
            (wanted.finished_of, _FINISHED),
            (wanted.trials_of, _ALL),
        ):
            for study_id in ids:
                if study_id in cursor:
                    studies[study_id] = max(known, studies.get(study_id, known))
        for image in images:
            if image.state == r.RUNNING and image.study_id in cursor:
                running[image.trial_id] = image.study_id
        return cls(version, cursor, studies, rows & cursor.keys(), running)

    def covers(self, wanted: Wanted) -> bool:
        """Whether all that is wanted is known."""
        if wanted.catalogue or wanted.names or wanted.numbers or wanted.params:
            return False
        studies = self.studies
        return (
            all(studies.get(one) == _ALL for one in wanted.trials_of)
            and all(studies.get(one, _NONE) >= _FINISHED for one in wanted.finished_of)
            and all(studies.get(one, _NONE) >= _WAITING for one in wanted.waiting_of)
            and all(studies.get(one, _NONE) >= _NEXT for one in wanted.next_of)
            and wanted.studies <= self.rows
            and wanted.trials <= self.running.keys()
        )

    def allows(self, records: Sequence[Operation]) -> bool:
        """Whether the operations are accepted by what is known, and their effect is known too."""
        finished: set[int] = set()
        for record in records:
            if isinstance(record, r.CreateTrial):
                if record.study_id not in self.studies or not is_bare(record):
                    return False
                continue
            if not isinstance(record, _ON_RUNNING):
                return False
            if record.trial_id in finished or record.trial_id not in self.running:
                return False
            if any(value == 0.0 and math.copysign(1.0, value) < 0.0 for value in _floats(record)):
                return False  # SQLite's file drops the sign
            if isinstance(record, r.SetTrialStateValues):
                if record.state not in r.FINISHED:
                    return False
                finished.add(record.trial_id)
        return True

    def advance(
        self, d: Dialect, records: Sequence[Operation], created: Iterable[Created]
    ) -> list[Record]:
        """Take in what has been committed, and say it as news."""
        news: list[Record] = []
        after = dict(self.cursor)
        made = iter(created)
        for record in records:
            if isinstance(record, r.CreateTrial):
                one = next(made)
                start = d.time_value(record.datetime_start)
                news.append(
                    PutTrial(
                        trial_id=one.trial_id,
                        study_id=record.study_id,
                        number=one.number,
                        state=r.RUNNING,
                        datetime_start=record_time(start),
                    )
                )
                after[record.study_id] = self._created(after[record.study_id], one, start or "")
                self.running[one.trial_id] = record.study_id
                continue
            news.append(cast(Record, record))
            if isinstance(record, r.SetTrialStateValues):
                study_id = self.running.pop(record.trial_id)
                study = after[study_id]
                held = tuple([one for one in study.held if one != record.trial_id])
                after[study_id] = msgspec.structs.replace(study, held=held)
        self.cursor = after
        return news

    def _created(self, study: StudyCursor, one: Created, start: str) -> StudyCursor:
        """Where the follower stands after the image of a trial that is newer than all others."""
        known = self.studies[one.record.study_id]
        probe = study.probe
        if probe is None or probe.rank == 0:
            probe = Probe(one.trial_id, one.number, start, 1)
        return msgspec.structs.replace(
            study,
            all_id=one.trial_id if known >= _FINISHED else study.all_id,
            seen_id=study.seen_id if known == _NONE else one.trial_id,
            last_id=one.trial_id,
            held=(*study.held, one.trial_id),
            probe=probe,
        )


def _floats(record: Operation) -> Sequence[float]:
    """What is kept in columns of floats."""
    if isinstance(record, r.SetTrialParam):
        return (record.param_value_internal,)
    if isinstance(record, r.SetTrialIntermediateValue):
        return (record.intermediate_value,)
    if isinstance(record, r.SetTrialStateValues):
        return record.values or ()
    return ()
