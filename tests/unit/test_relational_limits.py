"""What no column can hold names nothing: it is absent on every database, and no driver's error."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

from backends import Backend, params
from trialstore.rdb import RDBStorage


def _is_tables(backend: Backend) -> bool:
    return backend.name.startswith(("sqlite", "postgresql", "mariadb"))


@pytest.fixture(params=params(_is_tables))
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RDBStorage]:
    with contextlib.closing(request.param.prepare(tmp_path)()) as opened:
        yield opened


@pytest.fixture
def study_id(storage: RDBStorage) -> int:
    return storage.create_new_study([StudyDirection.MINIMIZE], "s")


@pytest.mark.parametrize("absent", [2**31, 2**63, 2**70, -1, -(2**70), 1.5])
def test_what_can_be_no_id(storage: RDBStorage, study_id: int, absent: Any) -> None:
    for read in (
        storage.get_trial,
        storage.get_trial_user_attrs,
        storage.get_n_trials,
        storage.get_all_trials,
        storage.get_best_trial,
        storage.get_study_name_from_id,
        storage.get_study_user_attrs,
        lambda id_: storage.get_all_trials(id_, states=(TrialState.COMPLETE,)),
        lambda id_: storage.get_all_trials(id_, deepcopy=False, states=(TrialState.WAITING,)),
        lambda id_: storage.get_trial_id_from_study_id_trial_number(id_, 0),
        lambda number: storage.get_trial_id_from_study_id_trial_number(study_id, number),
    ):
        with pytest.raises(KeyError):
            read(absent)
    assert storage.get_n_trials(study_id) == 0


@pytest.mark.parametrize("absent", ["a\0b", "\ud800", "x" * 5_000, "", "S", "s ", None])
def test_what_can_be_no_name(storage: RDBStorage, study_id: int, absent: Any) -> None:
    with pytest.raises(KeyError):
        storage.get_study_id_from_name(absent)
    assert storage.get_study_id_from_name("s") == study_id


def test_an_id_of_numpy_is_that_integer(storage: RDBStorage, study_id: int) -> None:
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    assert storage.get_n_trials(np.int64(study_id)) == 1  # type: ignore[arg-type]
    (trial,) = storage.get_all_trials(np.int64(study_id))  # type: ignore[arg-type]
    assert storage.get_trial(np.int32(trial_id)).value == trial.value == 1.0  # type: ignore[arg-type]
