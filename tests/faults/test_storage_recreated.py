"""A study deleted, and created again under its name, while another storage holds it."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from pathlib import Path

from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

from backends import Backend, params
from trialstore.storage import Storage


@pytest.fixture(params=params(lambda backend: backend.capabilities.shared))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Storage, Storage]]:
    backend: Backend = request.param
    open_storage = backend.prepare(tmp_path)
    with (
        contextlib.closing(open_storage()) as ours,
        contextlib.closing(open_storage()) as others,
    ):
        yield ours, others


def _fill(storage: Storage, name: str, n_trials: int) -> int:
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], name)
    for number in range(n_trials):
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [float(number)])
    return study_id


def test_the_name_is_free_again(pair: tuple[Storage, Storage]) -> None:
    ours, others = pair
    others.delete_study(_fill(ours, "s", 2))
    new_id = ours.create_new_study([StudyDirection.MAXIMIZE], "s")
    assert ours.get_study_id_from_name("s") == others.get_study_id_from_name("s") == new_id


@pytest.mark.parametrize("n_trials", [0, 1, 5])
def test_a_trial_goes_to_the_new_study(pair: tuple[Storage, Storage], n_trials: int) -> None:
    ours, others = pair
    old_id = _fill(others, "s", 3)
    assert len(ours.get_all_trials(old_id)) == 3
    others.delete_study(old_id)
    new_id = _fill(others, "s", n_trials)
    assert ours.get_study_id_from_name("s") == new_id
    trial_id = ours.create_new_trial(new_id)
    assert ours.get_trial(trial_id).number == n_trials
    for storage in pair:
        trials = storage.get_all_trials(new_id)
        assert [trial.number for trial in trials] == list(range(n_trials + 1))
        assert trials[-1].state == TrialState.RUNNING
