"""``InMemoryStorage``: a storage for one process; its replica is all there is."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
from typing import Any, TypeVar

from optuna.trial import FrozenTrial

from trialstore import checks
from trialstore.callbacks import StaleTrialCallback
from trialstore.clock import CLOCK, Clock
from trialstore.log import Wanted
from trialstore.logs.memory import MemoryLog
from trialstore.records import ACCEPTED, AnyOperation, Outcome, Record, TrialWrite
from trialstore.replica import Replica
from trialstore.scan import Scan
from trialstore.storage import Storage

_T = TypeVar("_T")
_LOOK_S = 0.01


class InMemoryStorage(Storage):
    """Studies that live as long as this object; pickling it carries them along.

    Attributes and categorical choices may be any objects. For one process; ``JournalStorage`` on
    a file serves several.

    Args:
        heartbeat_interval: Seconds between two beats for the trials that this storage runs; None
            is without heartbeat. A process that dies takes its trials along; this is for
            threads that share the code of other storages.
        grace_period: Seconds without a beat after which a trial is failed; None is twice the
            interval.
        heartbeat_stale_trial_callback: What is done about a failed trial, such as
            ``RetryHeartbeatStaleTrialCallback``.
        failed_trial_callback: The name of that until Optuna 4.9.
    """

    def __init__(
        self,
        *,
        heartbeat_interval: int | None = None,
        grace_period: int | None = None,
        heartbeat_stale_trial_callback: StaleTrialCallback | None = None,
        failed_trial_callback: StaleTrialCallback | None = None,
        clock: Clock = CLOCK,
    ) -> None:
        super().__init__(
            MemoryLog(clock=clock),
            linger_s=0.0,
            alone=True,
            heartbeat_interval=heartbeat_interval,
            grace_period=grace_period,
            heartbeat_stale_trial_callback=heartbeat_stale_trial_callback,
            failed_trial_callback=failed_trial_callback,
            clock=clock,
        )

    # Nobody else writes, so a record is judged by applying it, and what the replica says is new.

    def _read(self, wanted: Wanted, answer: Callable[[Replica], _T]) -> _T:
        exchanger = self._exchanger
        with exchanger.mutex:
            return answer(exchanger.replica)

    def _write(self, record: AnyOperation) -> Outcome:
        exchanger = self._exchanger
        with exchanger.mutex:
            return exchanger.replica.apply(record)

    def _write_trial(self, record: TrialWrite) -> None:
        if type(record.trial_id) is not int:
            checks.number(record.trial_id, "trial_id")
        exchanger = self._exchanger
        with exchanger.mutex:
            outcome = exchanger.replica.apply(record)
        if outcome is not ACCEPTED:
            raise self._refusal(record, outcome)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        exchanger = self._exchanger
        with exchanger.mutex:
            return exchanger.replica.trial(trial_id)

    def scan(self) -> Scan:
        return Scan(None, self._replica)

    def _listening(self) -> contextlib.AbstractContextManager[Callable[[float], None]]:
        # A look costs no more than to be told.
        return contextlib.nullcontext(lambda s: self._clock.sleep(min(s, _LOOK_S)))

    def __getstate__(self) -> dict[str, Any]:
        with self._exchanger.mutex:
            still = self._replica.still()  # other threads go on while this is pickled
        images: list[Record] = [study for study, _, _ in still.studies]
        images.append(still.positions)
        for _, params, trials in still.studies:
            images += params
            images += trials
        return {**super().__getstate__(), "images": images}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        images = state.pop("images")
        super().__setstate__(state)
        for image in images:
            self._replica.apply(image)
