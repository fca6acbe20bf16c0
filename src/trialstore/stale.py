"""Trials whose worker is dead: found by its lease, failed once, and retried together with that.

The failing and the retry are one conditional append, the retry first. Of many trials, so many are
done in one append (nothing connects them) and the others in the next. Where a crash can tear a
batch, on a journal file, what may be left is a retry without its failing: the trial is still found
RUNNING and without a living worker, and the next look, which sees that its retry is there, only
fails it. A failing without its retry can't be left, except where no retry can be made at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import itertools
import logging
import math
from typing import Any, Final

from optuna.trial import FrozenTrial

from trialstore import records as r
from trialstore.callbacks import retried_number
from trialstore.exchange import Exchanger
from trialstore.log import NOTHING, ConditionalLog, LeaseStore, Limited, Wanted
from trialstore.records import AnyOperation, Verdict
from trialstore.replica import Replica

_logger = logging.getLogger("trialstore")

# A beat is never in the future by this much, whatever the log's clock did.
_BEFORE_ANY_BEAT_S = -1e6

_HEARD_WITHIN_S = (5.0, 15.0, 60.0, 120.0, 300.0, 900.0, 3600.0)

_TRIALS_AT_ONCE: Final = 256
"""When a whole cluster has died: what a server's mark and a packet to it have room for, and others
need not wait until all are done."""

Retry = Callable[[FrozenTrial], dict[str, Any] | None]
"""The fields of the ``CreateTrial`` that queues a trial again; None where it is not to be. What it
raises is the reason why there is no retry."""


def find(exchanger: Exchanger, study_id: int, grace_period_s: float) -> dict[int, str]:
    """RUNNING trials of a study whose lease has expired, and their owners, "" where unknown.

    Raises:
        KeyError: There is no such study.
    """
    # Of tables this reads next to nothing; of a journal everything, which it would do anyway.
    exchanger.run((), Wanted(next_of=frozenset((study_id,))))
    with exchanger.mutex:
        running = exchanger.replica.running(study_id)
    expired = _expired(exchanger, study_id, running, grace_period_s)
    return {trial_id: running.get(trial_id, "") for trial_id in expired}


def _expired(
    exchanger: Exchanger, study_id: int, running: Mapping[int, str], grace_period_s: float
) -> list[int]:
    def ask(log: LeaseStore) -> list[int]:
        return list(log.expired(study_id, running, grace_period_s))

    return exchanger.use_log(ask)


def covered(exchanger: Exchanger, study_id: int, running: Mapping[int, str]) -> list[int]:
    """Those of the RUNNING trials that have a lease, be it expired or not.

    Args:
        exchanger: Of the storage.
        study_id: Of the trials.
        running: Trial id to owner, as ``LeaseStore.expired`` takes them.
    """
    return _expired(exchanger, study_id, running, _BEFORE_ANY_BEAT_S)


def heard_within_s(exchanger: Exchanger, study_id: int) -> dict[int, float]:
    """Every RUNNING trial that has a lease, and a time within which its worker was heard of.

    The shortest of a few times that is long enough, infinite if none is: an answer for people,
    which every log that keeps leases can give.

    Raises:
        KeyError: There is no such study.
    """
    heard: dict[int, float] = {}
    running = find(exchanger, study_id, _BEFORE_ANY_BEAT_S)
    for time_s in _HEARD_WITHIN_S:
        if not running:
            break
        expired = {*_expired(exchanger, study_id, running, time_s)}
        heard |= dict.fromkeys(running.keys() - expired, time_s)
        running = {id_: owner for id_, owner in running.items() if id_ in expired}
    return heard | dict.fromkeys(running, math.inf)


def fail(
    exchanger: Exchanger,
    study_id: int,
    stale: Mapping[int, str],
    grace_period_s: float,
    retry: Retry | None,
) -> list[int]:
    """Fail those that are still RUNNING for the owner that was found dead, if it still is.

    Args:
        exchanger: Of the storage.
        study_id: Of the trials.
        stale: Trial id to owner, as ``find`` returns.
        grace_period_s: As for ``find``. It may be long ago: a worker that was only slow has
            beaten since.
        retry: What to queue together with the failing of a trial, if it is not there yet.

    Returns:
        Ids of the trials that were failed by this call.
    """
    expired = frozenset(_expired(exchanger, study_id, stale, grace_period_s))
    owners = iter([(trial_id, owner) for trial_id, owner in stale.items() if trial_id in expired])
    failed: list[int] = []
    while part := dict(itertools.islice(owners, _TRIALS_AT_ONCE)):
        failed += _fail_part(exchanger, study_id, part, retry)
    return failed


def _fail_part(
    exchanger: Exchanger, study_id: int, stale: Mapping[int, str], retry: Retry | None
) -> list[int]:
    wanted = Wanted(trials=frozenset(stale))
    reasons: dict[int, Exception] = {}  # why a trial gets no retry
    if isinstance(exchanger.log, ConditionalLog):
        decided: list[AnyOperation] = []

        def decide(replica: Replica) -> list[AnyOperation]:
            decided.clear()
            reasons.clear()
            running = _still_running(replica, stale)
            retries = (
                _retries(exchanger, replica, study_id, running, retry, reasons) if retry else {}
            )
            for trial_id in running:
                if trial_id in retries:
                    decided.append(retries[trial_id])
                decided.append(_failing(exchanger, trial_id))
            return decided

        outcomes = exchanger.run_if(decide, wanted)
        failed = _accepted(decided, outcomes)
        _warn_of_the_lost(exchanger, study_id, failed, reasons)
        return failed
    # Two methods of a backend: whoever fails a trial queues its retry, and a crash between the
    # two loses the retry, as with Optuna's own storages.
    exchanger.run((), wanted)
    with exchanger.mutex:
        failings = [_failing(exchanger, id_) for id_ in _still_running(exchanger.replica, stale)]
    failed = _accepted(failings, exchanger.run(failings, NOTHING)) if failings else []
    if retry is not None and failed:
        with exchanger.mutex:
            retries = _retries(exchanger, exchanger.replica, study_id, failed, retry, reasons)
        exchanger.run([*retries.values()], NOTHING)
        _warn_of_the_lost(exchanger, study_id, failed, reasons)
    return failed


def _still_running(replica: Replica, stale: Mapping[int, str]) -> list[int]:
    """Somebody may have failed it meanwhile, or a living worker have it from the queue."""
    return [
        trial_id
        for trial_id, owner in stale.items()
        if replica.is_running(trial_id) and owner in ("", replica.owner(trial_id))
    ]


def _retries(
    exchanger: Exchanger,
    replica: Replica,
    study_id: int,
    trial_ids: Sequence[int],
    retry: Retry,
    reasons: dict[int, Exception],
) -> dict[int, r.CreateTrial]:
    """The records that queue trials again, unless one has: it is known by the retry history.

    A trial whose retry can't be made, such as one with a value outside its distribution, is failed
    all the same: it would keep all others from being failed, for ever.
    """
    retries: dict[int, r.CreateTrial] = {}
    trials = [replica.trial(trial_id) for trial_id in trial_ids]
    retried_by = _retried_by(replica, study_id, min((x.number for x in trials), default=0))
    for trial in trials:
        if retried_by.get(trial.number, -1) > trial.number:
            continue
        try:
            fields = retry(trial)
            if fields is None:
                continue
            record = r.CreateTrial(study_id=study_id, **fields, **exchanger.marks())
            if isinstance(exchanger.log, Limited):
                exchanger.log.check((record,))
        except Exception as error:
            reasons[trial._trial_id] = error
            continue
        retries[trial._trial_id] = record
    return retries


def _retried_by(replica: Replica, study_id: int, number: int) -> dict[int, int]:
    """Numbers of trials to that of the last retry of each, of the retries after a trial.

    One walk for all, since each may be over all the trials of a study.
    """
    newer = itertools.takewhile(lambda one: one.number > number, replica.newest_first(study_id))
    found: dict[int, int] = {}
    for one in newer:
        retried = retried_number(one.system_attrs)
        if retried is not None:
            found.setdefault(retried, one.number)
    return found


def _warn_of_the_lost(
    exchanger: Exchanger, study_id: int, failed: list[int], reasons: Mapping[int, Exception]
) -> None:
    with exchanger.mutex:
        lost = [
            (exchanger.replica.trial_number(id_), exchanger.replica.study_name(study_id), why)
            for id_, why in reasons.items()
            if id_ in failed
        ]
    for number, study_name, why in lost:
        _logger.warning(
            "Trial %d of study %r is not retried, since no retry of it can be made: %s",
            number,
            study_name,
            why,
        )


def _failing(exchanger: Exchanger, trial_id: int) -> r.SetTrialStateValues:
    return r.SetTrialStateValues(
        trial_id=trial_id,
        state=r.FAIL,
        values=None,
        datetime_complete=r.now_text(),
        **exchanger.marks(),
    )


def _accepted(records: list[Any], outcomes: list[r.Outcome]) -> list[int]:
    return [
        record.trial_id
        for record, outcome in zip(records, outcomes, strict=True)
        if isinstance(record, r.SetTrialStateValues) and outcome.verdict is Verdict.ACCEPTED
    ]
