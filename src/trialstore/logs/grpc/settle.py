"""What became of records whose answer was lost: remembered, or seen in what the log shows now.

For a log that judges and keeps no marks of its clients. A server remembers the outcomes of each
client's last exchange. One that was killed since has forgotten them, and has to look: a state
write carries a time to the microsecond that its client chose, which is as good as a mark;
everything else overwrites, and may be written twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
import contextlib
from datetime import datetime
import threading
from typing import Any, Final

from trialstore import records as r
from trialstore.errors import OutcomeUnknownError
from trialstore.log import Wanted
from trialstore.records import ACCEPTED, AnyOperation, Outcome, Record, Verdict

# Over all clients: each has one exchange at a time, seldom of more than ten records.
_REMEMBERED_MAX: Final = 100_000


class Remembered:
    """The outcomes of each client's last exchange, and a lock for each client."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._outcomes: OrderedDict[str, dict[int, Outcome]] = OrderedDict()
        self._n_outcomes = 0
        self._locks: dict[str, list[Any]] = {}  # worker_id -> lock, how many use it

    @contextlib.contextmanager
    def one_at_a_time(self, worker_id: str) -> Iterator[None]:
        """A client's second attempt waits for what has become of its first."""
        with self._mutex:
            entry = self._locks.setdefault(worker_id, [threading.Lock(), 0])
            entry[1] += 1
        try:
            with entry[0]:
                yield
        finally:
            with self._mutex:
                entry[1] -= 1
                if not entry[1]:
                    del self._locks[worker_id]

    def find(self, records: Sequence[AnyOperation]) -> dict[int, Outcome]:
        """Outcomes of the records that were in the last exchange, by index."""
        with self._mutex:
            known = self._outcomes.get(records[0].worker_id)
            if known is None:
                return {}
            return {
                index: known[record.seq]
                for index, record in enumerate(records)
                if record.seq >= 0 and record.seq in known
            }

    def keep(self, records: Sequence[AnyOperation], outcomes: Sequence[Outcome]) -> None:
        worker_id = records[0].worker_id
        with self._mutex:
            before = self._outcomes.pop(worker_id, None)
            if before is not None:
                self._n_outcomes -= len(before)
            kept = {
                record.seq: outcome for record, outcome in zip(records, outcomes, strict=False)
            }
            self._outcomes[worker_id] = kept
            self._n_outcomes += len(kept)
            while self._n_outcomes > _REMEMBERED_MAX and len(self._outcomes) > 1:
                _, dropped = self._outcomes.popitem(last=False)
                self._n_outcomes -= len(dropped)


# --- what the log shows --------------------------------------------------------------------------


def evidence(records: Sequence[AnyOperation]) -> Wanted:
    """What has to be read to tell whether records have been appended; empty if nothing does."""
    studies: set[int] = set()
    trials_of: set[int] = set()
    trials: set[int] = set()
    for record in records:
        if isinstance(record, r.CreateTrial):
            trials_of.add(record.study_id)
        elif isinstance(record, r.SetTrialStateValues):
            trials.add(record.trial_id)
        elif isinstance(record, r.DeleteStudy):
            studies.add(record.study_id)
    return Wanted(
        studies=frozenset(studies), trials_of=frozenset(trials_of), trials=frozenset(trials)
    )


def find_appended(records: Sequence[AnyOperation], seen: Sequence[Record]) -> dict[int, Outcome]:
    """The outcomes of records that are in the log, by index; of all of them or of none.

    A batch is in the log as a whole or not at all, so one record that is there settles all.

    Args:
        records: The batch.
        seen: From the start of the log, what ``evidence`` wanted.

    Raises:
        OutcomeUnknownError: A trial looks like one of the batch, and nothing tells whether it is.
    """
    trials = {image.trial_id: image for image in seen if isinstance(image, r.PutTrial)}
    studies = {image.study_id for image in seen if isinstance(image, r.PutStudy)}
    found: dict[int, Outcome] = {}
    taken: set[int] = set()
    for index, record in enumerate(records):
        if isinstance(record, r.CreateTrial):
            trial_id = _created(record, trials, taken)
            if trial_id is not None:
                taken.add(trial_id)
                found[index] = Outcome(Verdict.ACCEPTED, trial_id)
        elif isinstance(record, r.SetTrialStateValues):
            image = trials.get(record.trial_id)
            if image is not None and _is_told(record, image):
                found[index] = ACCEPTED
        elif isinstance(record, r.DeleteStudy) and record.study_id not in studies:
            found[index] = ACCEPTED
    if found:
        for index in range(len(records)):
            found.setdefault(index, ACCEPTED)
    return found


def _created(record: r.CreateTrial, trials: dict[int, r.PutTrial], taken: set[int]) -> int | None:
    doubtful = False
    for trial_id, image in trials.items():
        if image.study_id != record.study_id or trial_id in taken:
            continue
        if record.datetime_start is None:
            doubtful = doubtful or _looks_queued(record, image)
        elif image.datetime_start:
            same, exact = _is_same_time(record.datetime_start, image.datetime_start)
            if same and exact:
                return trial_id
            doubtful = doubtful or same
    if doubtful:
        raise OutcomeUnknownError(
            "The answer to the creation of a trial was lost. One that looks the same is in the "
            "study, and nothing tells whether it is the one. Look whether there is one too many "
            "or one too few."
        )
    return None


def _looks_queued(record: r.CreateTrial, image: r.PutTrial) -> bool:
    wanted = (record.study_id, record.state, record.params, record.user_attrs, record.system_attrs)
    return wanted == (
        image.study_id,
        image.state,
        image.params,
        image.user_attrs,
        image.system_attrs,
    )


def _is_told(record: r.SetTrialStateValues, image: r.PutTrial) -> bool:
    if image.state != record.state:
        return False
    if record.state in r.FINISHED:
        ours, theirs = record.datetime_complete, image.datetime_complete
        if record.values is not None and record.values != image.values:
            return False
    else:
        ours, theirs = record.datetime_start, image.datetime_start
    return ours is not None and bool(theirs) and _is_same_time(ours, theirs or "")[0]


def _is_same_time(ours: str, theirs: str) -> tuple[bool, bool]:
    """Whether two times are the same, and whether to the microsecond."""
    mine, seen = _parsed(ours), _parsed(theirs)
    if mine is None or seen is None:
        return False, False
    if mine == seen:
        return True, True
    # MariaDB's DATETIME keeps whole seconds, and rounds or cuts.
    return seen.microsecond == 0 and abs((mine - seen).total_seconds()) < 1, False


def _parsed(text: str) -> datetime | None:
    try:
        return r.parse_time(text).replace(fold=0)
    except ValueError:
        return None
