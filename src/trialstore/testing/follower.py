"""A log's reader and writer of the least size: a handle, a replica, and a sequence of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from trialstore import records as r
from trialstore.log import NOTHING, START, Batch, ConditionalLog, Cursor, Log, Wanted
from trialstore.records import AnyOperation, Outcome, Record, Verdict
from trialstore.replica import Replica
from trialstore.testing.contents import trial_contents

_MINIMIZE = 1
_TIME = "2026-01-02T03:04:05.678901"


class Follower:
    """One handle on a log, and the replica that its news keep up to date.

    Args:
        log: A handle of its own.
        worker_id: Unique among the followers of one log.
    """

    def __init__(self, log: Log, worker_id: str) -> None:
        self.log = log
        self.worker_id = worker_id
        self.replica = Replica()
        self.cursor: Cursor = START
        self._seq = 0

    def mark(self) -> dict[str, Any]:
        """``worker_id`` and the next ``seq``."""
        self._seq += 1
        return {"worker_id": self.worker_id, "seq": self._seq}

    def exchange(self, *records: AnyOperation, wanted: Wanted = NOTHING) -> list[Outcome]:
        """Append, apply the news, and say what became of each record."""
        batch = self.log.exchange(records, self.cursor, wanted)
        return self.take(batch, records)

    def exchange_if(
        self, decide: Callable[[], Sequence[AnyOperation]], wanted: Wanted
    ) -> list[Outcome]:
        """Let ``decide`` look at the replica, append what it says, and what became of that."""
        decided: tuple[AnyOperation, ...] = ()

        def told(news: Sequence[Record], cursor: Cursor) -> Sequence[AnyOperation]:
            nonlocal decided
            for record in news:
                self.replica.apply(record)
            self.cursor = cursor
            decided = tuple(decide())
            return decided

        assert isinstance(self.log, ConditionalLog)
        batch = self.log.exchange_if(told, self.cursor, wanted)
        return self.take(batch, decided)

    def take(self, batch: Batch, records: tuple[AnyOperation, ...] = ()) -> list[Outcome]:
        """Apply an answer."""
        replayed: dict[int, Outcome] = {}
        for record in batch.news:
            outcome = self.replica.apply(record)
            if isinstance(record, r.Operation) and record.worker_id == self.worker_id:
                replayed[record.seq] = outcome
        self.cursor = batch.cursor
        if batch.outcomes is not None:
            assert len(batch.outcomes) == len(records), "one outcome per appended record"
            return list(batch.outcomes)
        return [replayed[record.seq] for record in records]

    # Records, with ids that the log gives.

    def create_study(self, name: str) -> int:
        record = r.CreateStudy(study_name=name, directions=[_MINIMIZE], **self.mark())
        (outcome,) = self.exchange(record)
        assert outcome.verdict is Verdict.ACCEPTED
        return outcome.id

    def create_trial(self, study_id: int, **fields: Any) -> int:
        record = r.CreateTrial(
            study_id=study_id, **{"datetime_start": _TIME, **fields}, **self.mark()
        )
        (outcome,) = self.exchange(record)
        assert outcome.verdict is Verdict.ACCEPTED
        return outcome.id

    def param(self, trial_id: int, name: str, value: float, json: str) -> r.SetTrialParam:
        return r.SetTrialParam(
            trial_id=trial_id,
            param_name=name,
            param_value_internal=value,
            distribution=json,
            **self.mark(),
        )

    def user_attr(self, trial_id: int, key: str, value: Any) -> r.SetTrialUserAttr:
        return r.SetTrialUserAttr(trial_id=trial_id, user_attr={key: value}, **self.mark())

    def state(
        self, trial_id: int, state: int, values: list[float] | None = None
    ) -> r.SetTrialStateValues:
        return r.SetTrialStateValues(
            trial_id=trial_id,
            state=state,
            values=values,
            datetime_start=_TIME if state == r.RUNNING else None,
            datetime_complete=_TIME if state in r.FINISHED else None,
            **self.mark(),
        )

    # What the replica says.

    def trials(self, study_id: int) -> list[FrozenTrial]:
        """All of them, after an exchange that wants them."""
        self.exchange(wanted=Wanted(trials_of=frozenset({study_id})))
        return self.replica.trials(study_id, None)

    def contents(self, study_id: int) -> list[dict[str, Any]]:
        return [trial_contents(trial) for trial in self.trials(study_id)]
