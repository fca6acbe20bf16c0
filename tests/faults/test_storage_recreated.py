"""A study deleted, and created again under its name, while another storage holds it."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from pathlib import Path

from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
import pytest

from backends import Backend, params
from trialstore.storage import Storage
from trialstore.testing.clock import ManualClock

MINIMIZE, MAXIMIZE = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE


@pytest.fixture(params=params(lambda backend: backend.capabilities.shared))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Storage, Storage]]:
    backend: Backend = request.param
    open_storage = backend.prepare(tmp_path)
    with (
        contextlib.closing(open_storage(linger_s=1.0, clock=ManualClock())) as ours,
        contextlib.closing(open_storage(linger_s=1.0, clock=ManualClock())) as others,
    ):
        yield ours, others


def _fill(storage: Storage, name: str, n_trials: int) -> int:
    study_id = storage.create_new_study([MINIMIZE], name)
    for number in range(n_trials):
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [float(number)])
    return study_id


def test_the_name_is_free_again(pair: tuple[Storage, Storage]) -> None:
    ours, others = pair
    others.delete_study(_fill(ours, "s", 2))
    new_id = ours.create_new_study([MAXIMIZE], "s")
    assert ours.get_study_id_from_name("s") == others.get_study_id_from_name("s") == new_id


@pytest.mark.parametrize("is_queued", [False, True])
def test_a_trial_that_bears_the_id_of_a_deleted_one_is_written_on(
    pair: tuple[Storage, Storage], is_queued: bool
) -> None:
    ours, others = pair
    kept, deleted = _fill(ours, "kept", 1), _fill(ours, "deleted", 1)
    ours.create_new_trial(deleted)
    if is_queued:
        ours.create_new_trial(deleted, create_trial(state=TrialState.WAITING))
        assert len(ours.get_all_trials(deleted, states=(TrialState.WAITING,))) == 1
    others.delete_study(deleted)
    for name in ("x", "y", "z"):
        # Where ids are given again, the last ones that ours knows of the deleted study.
        trial_id = ours.create_new_trial(kept)
        ours.set_trial_param(trial_id, name, 0.5, FloatDistribution(0, 1))
        ours.set_trial_user_attr(trial_id, "k", 1)
        ours.flush()
        assert ours.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.5])
        assert others.get_trial(trial_id).user_attrs == {"k": 1}


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


@pytest.mark.parametrize("directions", [[MINIMIZE], [MAXIMIZE]])
def test_what_was_put_off_for_the_old_study_does_not_reach_the_new_one(
    pair: tuple[Storage, Storage], directions: list[StudyDirection]
) -> None:
    ours, others = pair
    old_id = _fill(ours, "s", 0)
    ours.set_trial_user_attr(ours.create_new_trial(old_id), "late", True)
    others.delete_study(old_id)
    new_id = others.create_new_study(directions, "s")
    trial_id = others.create_new_trial(new_id)
    with pytest.raises(UpdateFinishedTrialError):
        ours.flush()
    assert ours.get_study_directions(new_id) == directions
    # Where ids are given again, this is the very trial that ours took for its own.
    ours.set_trial_user_attr(trial_id, "new", True)
    ours.flush()
    assert others.get_all_trials(new_id)[0].user_attrs == {"new": True}
    others.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0])
    with pytest.raises(UpdateFinishedTrialError):
        ours.set_trial_state_values(trial_id, TrialState.FAIL)


def test_fewer_queued_trials_in_the_new_study(pair: tuple[Storage, Storage]) -> None:
    ours, others = pair
    queued = create_trial(state=TrialState.WAITING)
    old_id = _fill(ours, "s", 0)
    for _ in range(3):
        others.create_new_trial(old_id, queued)
    assert ours.get_n_trials(old_id) == 3
    others.delete_study(old_id)
    new_id = _fill(others, "s", 0)
    others.create_new_trial(new_id, queued)
    assert ours.get_study_id_from_name("s") == new_id
    assert ours.get_n_trials(new_id, TrialState.WAITING) == 1
    assert len(ours.get_all_trials(new_id)) == 1


def test_a_queued_trial_that_somebody_claims_is_no_new_study(
    pair: tuple[Storage, Storage],
) -> None:
    """Claiming changes the start by which a RUNNING trial is known."""
    ours, others = pair
    study_id = _fill(ours, "s", 0)
    running = ours.create_new_trial(study_id)
    queued = ours.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
    assert ours.get_n_trials(study_id) == 2
    assert others.set_trial_state_values(queued, TrialState.RUNNING)
    assert ours.set_trial_state_values(running, TrialState.COMPLETE, [1.0])
    assert [trial.number for trial in ours.get_all_trials(study_id)] == [0, 1]
