"""Ctrl-C at any moment of a call: nothing hangs, nothing is lost, and the storage goes on.

Who works in a notebook interrupts a cell and goes on with the same storage.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import itertools
from pathlib import Path
import random

from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

import backends
from backends import Backend
from interrupts import is_interrupted_at
import trialstore
from trialstore.storage import Storage
from trialstore.testing.suites.base import run_threads

_X = FloatDistribution(0, 1)
_SITE = Path(pytest.__file__).parents[1]
_FOLDERS = (
    str(Path(trialstore.__file__).parent),
    *(str(_SITE / driver) for driver in ("redis", "psycopg", "pymysql")),
)
_N_MOMENTS = 40
"""Tried where each costs a new connection; which ones differs from run to run."""

_CALLS: dict[str, Callable[[Storage, int, int], object]] = {
    "create": lambda storage, study_id, trial_id: storage.create_new_trial(study_id),
    "tell": lambda storage, study_id, trial_id: storage.set_trial_state_values(
        trial_id, TrialState.COMPLETE, [0.5]
    ),
    "read": lambda storage, study_id, trial_id: storage.get_trial(trial_id),
    "look": lambda storage, study_id, trial_id: storage.get_all_trials(
        study_id, deepcopy=False, states=(TrialState.WAITING,)
    ),
}


@pytest.mark.parametrize("call", _CALLS.values(), ids=_CALLS)
@pytest.mark.parametrize("backend", backends.params(lambda one: one.capabilities.shared))
def test_ctrl_c_at_any_moment(
    backend: Backend, call: Callable[[Storage, int, int], object], tmp_path: Path
) -> None:
    open_storage = backend.prepare(tmp_path)
    storage, other = open_storage(), open_storage()
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    storage.set_trial_param(storage.create_new_trial(study_id), "x", 0.5, _X)

    def is_interrupted(moment: int) -> bool:
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_param(trial_id, "x", 0.25, _X)
        storage.set_trial_user_attr(trial_id, "k", moment)
        use = functools.partial(call, storage, study_id, trial_id)
        was_interrupted = is_interrupted_at(moment, use, *_FOLDERS)
        # In other threads and another storage, which a lock that is left behind would stop.
        run_threads(storage.flush)
        run_threads(lambda: other.set_study_user_attr(study_id, "k", moment))
        trial = storage.get_trial(trial_id)
        assert (trial.params, trial.user_attrs) == ({"x": 0.25}, {"k": moment})
        trials = storage.get_all_trials(study_id, deepcopy=False)
        assert [one.number for one in trials] == list(range(len(trials)))
        assert other.get_all_trials(study_id, deepcopy=False) == trials
        return was_interrupted

    if backend.needs_server or backend.name.startswith("grpc"):
        for _ in range(_N_MOMENTS):
            is_interrupted(random.randrange(1, 500))
    else:
        last = next(moment for moment in itertools.count(1) if not is_interrupted(moment))
        assert last > 10
    storage.close()
    other.close()
