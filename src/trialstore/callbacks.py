"""What happens to a trial whose worker died: ``RetryHeartbeatStaleTrialCallback`` queues it again.

A storage that knows such a callback, Optuna's or ours, fails the trial and queues its retry in
one append (``stale.py``), and does not call it. Any other callback is called, at most once, by
whoever failed the trial.
"""

from __future__ import annotations

from collections.abc import Callable
import copy
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

_OPTUNAS: Any = getattr(optuna.storages, "RetryHeartbeatStaleTrialCallback", None)
HAS_NEW_NAMES = _OPTUNAS is not None
"""Whether Optuna says "heartbeat stale" for what was "failed" before its version 4.9."""
if not HAS_NEW_NAMES:
    _OPTUNAS = optuna.storages.RetryFailedTrialCallback

StaleTrialCallback = Callable[["optuna.Study", FrozenTrial], None]

# Optuna's names; its own callback and its dashboard read them.
_ORIGINAL = "failed_trial"
_HISTORY = "retry_history"


class RetryHeartbeatStaleTrialCallback:
    """Queue a trial again after its worker died.

    The retry has the parameters and attributes of the trial, and a number of its own.

    Args:
        max_retry: How many times a trial may be retried; None is without end, 0 never.
        inherit_intermediate_values: The retry begins with what the trial has reported.

    Raises:
        ValueError: ``max_retry`` is negative.
    """

    def __init__(
        self, max_retry: int | None = None, inherit_intermediate_values: bool = False
    ) -> None:
        if max_retry is not None and max_retry < 0:
            raise ValueError(f"max_retry must be None or at least 0, not {max_retry}.")
        self._max_retry = max_retry
        self._inherit_intermediate_values = inherit_intermediate_values

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        template = self.retry(trial)
        if template is not None:
            study.add_trial(template)

    def retry(self, trial: FrozenTrial) -> FrozenTrial | None:
        """The template of a trial's retry; None when it has been retried often enough."""
        history = [*self.retry_history(trial), trial.number]
        if self._max_retry is not None and len(history) > self._max_retry:
            return None
        system_attrs = copy.deepcopy(trial.system_attrs)
        system_attrs.setdefault(_ORIGINAL, trial.number)
        system_attrs[_HISTORY] = history
        return create_trial(
            state=TrialState.WAITING,
            params=dict(trial.params),
            distributions=dict(trial.distributions),
            user_attrs=copy.deepcopy(trial.user_attrs),
            system_attrs=system_attrs,
            intermediate_values=(
                dict(trial.intermediate_values) if self._inherit_intermediate_values else None
            ),
        )

    @staticmethod
    def retried_trial_number(trial: FrozenTrial) -> int | None:
        """Number of the trial that was lost first; None if this one is no retry."""
        number: int | None = trial.system_attrs.get(_ORIGINAL)
        return number

    @staticmethod
    def retry_history(trial: FrozenTrial) -> list[int]:
        """Numbers of the trials that were lost before this one, the first one first."""
        return list(trial.system_attrs.get(_HISTORY, ()))


class RetryFailedTrialCallback(RetryHeartbeatStaleTrialCallback):
    """The name until Optuna 4.9."""


def retried_number(system_attrs: dict[str, Any]) -> int | None:
    """Number of the trial that one with these attributes is the retry of; None if it is none."""
    history = system_attrs.get(_HISTORY)
    number = history[-1] if isinstance(history, list) and history else None
    return number if isinstance(number, int) else None


def as_retry(callback: StaleTrialCallback | None) -> RetryHeartbeatStaleTrialCallback | None:
    """A callback, ours or Optuna's, of which is known what it does; None for any other.

    A subclass that overrides the call does something else. One of ours may override ``retry`` and
    ``retry_history``.
    """
    ours = RetryHeartbeatStaleTrialCallback
    if isinstance(callback, ours) and type(callback).__call__ is ours.__call__:
        return callback
    if isinstance(callback, _OPTUNAS) and type(callback).__call__ is _OPTUNAS.__call__:
        return ours(callback._max_retry, callback._inherit_intermediate_values)
    return None


def fail_stale_trials(study: optuna.Study) -> list[int]:
    """Fail the trials of a study whose worker is dead; retry them, or call the callback.

    ``study.optimize`` does this before each trial. A service that asks and tells, or a process
    that only cleans up, calls it by itself.

    Returns:
        Ids of the trials that this call failed; none while heartbeats are off.

    Raises:
        TypeError: The study's storage is none of trialstore's.
    """
    storage: Any = study._storage
    if not hasattr(storage, "fail_stale_trials"):
        raise TypeError(
            f"The study is on a {type(storage).__name__}; use optuna.storages.fail_stale_trials."
        )
    failed: list[int] = storage.fail_stale_trials(study._study_id)
    callback = storage.get_heartbeat_stale_trial_callback()
    if callback is not None and as_retry(callback) is None:
        for trial_id in failed:
            callback(study, copy.deepcopy(storage.get_trial(trial_id)))
    return failed
