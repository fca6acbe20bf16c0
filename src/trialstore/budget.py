"""``MaxTrials``: exactly so many COMPLETE trials, however many workers there are and how many die.

Optuna's ``MaxTrialsCallback`` counts after a trial has ended, when the other workers are already
busy with the next one: it overshoots by up to one trial a worker. Here a trial takes one of *n*
slots before its objective runs, in a conditional append that counts what is COMPLETE and what
holds a slot. A slot is held by a RUNNING trial, so it is free again when the trial ends in any
other way than COMPLETE, also when it is failed because its worker died.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import enum
import functools
import logging
import threading
from typing import Any, Final
import weakref

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import TrialPruned, UpdateFinishedTrialError
from optuna.trial import Trial, TrialState

from trialstore import records as r
from trialstore.callbacks import fail_stale_trials
from trialstore.log import Wanted
from trialstore.records import AnyOperation
from trialstore.replica import Replica
from trialstore.storage import Storage, storage_of

_logger = logging.getLogger("trialstore")

Objective = Callable[[Trial], float | Sequence[float]]

# A system attribute of the trial that holds a slot. Its value is the trial's own number, so that
# a retry, which inherits the attributes, holds none.
_SLOT: Final = "trialstore:slot"

# By storage: the holders whose objective runs, or ran, within ``optimize``, and in which thread.
# Only ever touched by a ``decide``, which has the mutex of the storage.
_runners: weakref.WeakKeyDictionary[Storage, dict[int, threading.Thread]] = (
    weakref.WeakKeyDictionary()
)

_PAUSE_MIN_S: Final = 0.01
_PAUSE_MAX_S: Final = 1.0


class _Answer(enum.Enum):
    TAKEN = enum.auto()
    HELD = enum.auto()
    """Every slot that is left is held by a RUNNING trial."""
    SPENT = enum.auto()


class MaxTrials:
    """A budget of COMPLETE trials, shared by all workers of a study that name the same number.

    ::

        study.optimize(trialstore.MaxTrials(500)(objective))

    A trial that gets no slot ends PRUNED, before its objective runs, and its worker stops. While
    all slots that are left are held by RUNNING trials, a worker waits, since one of them may fail;
    with heartbeats it also fails those whose worker is dead. It waits for holders that another
    thread of its ``optimize`` runs, and for those that are covered by heartbeats. Whether any
    other holder lives nobody can tell, so it does not wait: it stops, and fewer than ``n_trials``
    may end COMPLETE.

    ``study.stop()`` ends the waiting. A ``timeout`` of ``optimize`` does not: Optuna looks at it
    between trials only, and tells nobody what it is.

    Args:
        n_trials: How many trials of the study shall be COMPLETE, those of before included.

    Raises:
        ValueError: ``n_trials`` is no positive integer.
    """

    def __init__(self, n_trials: int) -> None:
        if isinstance(n_trials, bool) or not isinstance(n_trials, int) or n_trials < 1:
            raise ValueError(f"n_trials must be a positive integer, not {n_trials!r}.")
        self.n_trials = n_trials

    def __call__(self, objective: Objective) -> Objective:
        """The objective for ``study.optimize``, within the budget."""
        return _Budgeted(self, objective)

    def ask(
        self,
        study: optuna.Study,
        fixed_distributions: dict[str, BaseDistribution] | None = None,
    ) -> Trial | None:
        """As ``study.ask``, for who tells by itself.

        None when the budget is spent, or when what is left of it is held by trials for which
        ``reserve`` does not wait, such as those that were asked for here and are yet to be told.
        """
        trial = study.ask(fixed_distributions)
        if self.reserve(trial):
            return trial
        study.tell(trial, state=TrialState.PRUNED)
        return None

    def reserve(self, trial: Trial) -> bool:
        """Take a slot for a RUNNING trial; waits while all are held and one may become free.

        Not for trials of the same storage, unless another thread runs them in ``optimize``: they
        may be the caller's own, who can't tell them while it waits.

        Returns:
            Whether the objective may run. If not, the trial has to end PRUNED.

        Raises:
            UpdateFinishedTrialError: The trial was finished by somebody else.
            RuntimeError: The log can't append on a condition.
            TypeError: The study is on a storage that is none of trialstore's.
        """
        return self._reserve(trial, is_run_here=False)

    def _reserve(self, trial: Trial, *, is_run_here: bool) -> bool:
        """``is_run_here``: by this thread, within ``optimize``, which somebody may stop."""
        storage, pause_s = storage_of(trial.study), _PAUSE_MIN_S
        while True:
            answer, holders = self._try(storage, trial, is_run_here)
            if answer is not _Answer.HELD:
                return answer is _Answer.TAKEN
            if not _may_become_free(storage, trial.study, holders):
                _logger.info(
                    "All slots are held by running trials of which nobody can tell whether their "
                    "workers live; this worker stops."
                )
                return False
            if is_run_here and trial.study._stop_flag:
                return False
            if not fail_stale_trials(trial.study):
                storage.clock.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)

    def _try(
        self, storage: Storage, trial: Trial, is_run_here: bool
    ) -> tuple[_Answer, dict[int, str]]:
        """The answer, and the holders: trial id to owner, "" where unknown."""
        study_id, trial_id = trial.study._study_id, trial._trial_id
        answer = _Answer.TAKEN
        holders: dict[int, str] = {}

        def decide(replica: Replica) -> Sequence[AnyOperation]:
            nonlocal answer, holders
            if not replica.is_running(trial_id):
                raise UpdateFinishedTrialError(f"Trial {trial.number} is not running any more.")
            holders = {
                running._trial_id: replica.owner(running._trial_id)
                for running in replica.trials(study_id, (TrialState.RUNNING,))
                if running.system_attrs.get(_SLOT) == running.number
            }
            runners = _runners.setdefault(storage, {})
            for id_ in runners.keys() - holders.keys():
                runners.pop(id_, None)  # its own thread may have ended it meanwhile
            n_complete = replica.count(study_id, (TrialState.COMPLETE,))
            if trial_id in holders:
                answer = _Answer.TAKEN
            elif n_complete + len(holders) < self.n_trials:
                answer = _Answer.TAKEN
                if is_run_here:
                    runners[trial_id] = threading.current_thread()
                slot = {_SLOT: trial.number}
                marks: dict[str, Any] = storage.marks()
                return (r.SetTrialSystemAttr(trial_id=trial_id, system_attr=slot, **marks),)
            else:
                answer = _Answer.SPENT if n_complete >= self.n_trials else _Answer.HELD
            return ()

        storage.write_if(decide, Wanted(trials_of=frozenset((study_id,))))
        return answer, holders


def _may_become_free(storage: Storage, study: optuna.Study, holders: dict[int, str]) -> bool:
    """Whether one of these slots will, without the calling thread's doing."""
    runners = _runners.get(storage, {})
    threads = {runners.get(trial_id) for trial_id in holders} - {None, threading.current_thread()}
    if any(thread is not None and thread.is_alive() for thread in threads):
        return True
    return storage.is_any_covered(study._study_id, holders)


class _Budgeted:
    """An objective within a budget; can be pickled where the objective can."""

    def __init__(self, budget: MaxTrials, objective: Objective) -> None:
        functools.update_wrapper(self, objective)
        self._budget = budget
        self._objective = objective

    def __call__(self, trial: Trial) -> float | Sequence[float]:
        if self._budget._reserve(trial, is_run_here=True):
            try:
                return self._objective(trial)
            except Exception:
                raise
            except BaseException:
                # ``sys.exit``: Optuna leaves the trial RUNNING, for which nobody is to wait.
                _runners.get(storage_of(trial.study), {}).pop(trial._trial_id, None)
                raise
        with contextlib.suppress(RuntimeError):  # not in optimize
            trial.study.stop()
        raise TrialPruned(f"{self._budget.n_trials} trials are COMPLETE or running.")
