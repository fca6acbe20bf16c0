"""``enqueue_trial``: what ``Study.enqueue_trial`` does, exactly once where it should be once.

Optuna's method with ``skip_if_exists`` reads all trials and then adds one, so that workers that
start together each add theirs. Here the looking and the adding are one conditional append.
"""

from __future__ import annotations

from collections.abc import Sequence
import math
from numbers import Real
from typing import Any, Final

import optuna
from optuna.trial import TrialState, create_trial

from trialstore import records as r
from trialstore.log import Wanted
from trialstore.records import AnyOperation
from trialstore.replica import Replica
from trialstore.storage import storage_of

# As close as Optuna takes two numbers for the same.
_RELATIVE_TOLERANCE: Final = 1e-5


def enqueue_trial(
    study: optuna.Study,
    params: dict[str, Any],
    user_attrs: dict[str, Any] | None = None,
    skip_if_exists: bool = False,
) -> bool:
    """Queue a trial whose parameters are given, for the next worker that asks.

    Args:
        study: On a storage of trialstore's.
        params: Name to value; parameters that are not in it are sampled.
        user_attrs: Of the trial.
        skip_if_exists: Queue nothing if the study has a trial with the same parameters, however
            many workers call this at the same moment.

    Returns:
        Whether a trial was queued.

    Raises:
        TypeError: ``params`` is no dict, or the study is on another storage.
        RuntimeError: The log can't append on a condition, which ``skip_if_exists`` needs.
    """
    if not isinstance(params, dict):
        raise TypeError(f"params must be a dict, not {type(params).__name__}.")
    storage, study_id = storage_of(study), study._study_id
    template = create_trial(
        state=TrialState.WAITING,
        system_attrs={"fixed_params": params},
        user_attrs=user_attrs,
    )
    if not skip_if_exists:
        storage.create_new_trial(study_id, template)
        return True
    fields = storage.template_fields(template, len(study.directions))

    def decide(replica: Replica) -> Sequence[AnyOperation]:
        for trial in replica.newest_first(study_id):
            if _are_same(params, trial.system_attrs.get("fixed_params", trial.params)):
                return ()
        return (r.CreateTrial(study_id=study_id, **fields, **storage.marks()),)

    return bool(storage.write_if(decide, Wanted(trials_of=frozenset((study_id,)))))


def _are_same(params: dict[str, Any], others: Any) -> bool:
    """Optuna's rule: the same names, and values of one type that are equal or almost so."""
    return (
        isinstance(others, dict)
        and params.keys() == others.keys()
        and all(_is_same(value, others[name]) for name, value in params.items())
    )


def _is_same(value: Any, other: Any) -> bool:
    if not isinstance(value, type(other)):
        return False
    if isinstance(value, Real) and isinstance(other, Real):
        a, b = float(value), float(other)
        return (a != a and b != b) or math.isclose(a, b, rel_tol=_RELATIVE_TOLERANCE)
    return bool(value == other)
