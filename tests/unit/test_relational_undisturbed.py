"""SQLite: what is left out while nobody else writes, and that nothing is once somebody does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
import pytest

import trialstore
from trialstore.testing.contents import storage_contents

MINIMIZE = StudyDirection.MINIMIZE
RANGE = FloatDistribution(0.0, 1.0)
Sent = list[str]


def _counted(storage: Any) -> Sent:
    """The statements that the storage runs from now on."""
    session = storage.log.connection.session()
    real, sent = session.run, Sent()

    def run(steps: Sequence[Any]) -> Any:
        sent.extend(step.statement.sql.split()[0] for step in steps)
        return real(steps)

    session.run = run
    return sent


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'a.db'}"


@pytest.fixture
def storage(url: str) -> Iterator[Any]:
    # Nothing lingers: what is put off goes with the next call, on every machine.
    with contextlib.closing(trialstore.RDBStorage(url, linger_s=60.0)) as made:
        yield made


def _known(storage: Any) -> tuple[int, int]:
    """A study and a RUNNING trial that the storage has followed up to now."""
    study_id = storage.create_new_study([MINIMIZE], "s")
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_param(trial_id, "x", 0.5, RANGE)
    storage.get_all_trials(study_id)
    return study_id, trial_id


def _waiting(storage: Any, study_id: int) -> list[int]:
    found = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.WAITING,))
    return [trial._trial_id for trial in found]


def test_alone_a_trial_reads_nothing_back(storage: Any) -> None:
    study_id, _ = _known(storage)
    sent = _counted(storage)

    assert _waiting(storage, study_id) == []
    assert sent == ["PRAGMA"]
    sent.clear()

    trial_id = storage.create_new_trial(study_id)
    assert sent == ["BEGIN", "PRAGMA", "INSERT", "SELECT", "COMMIT"]
    sent.clear()

    storage.set_trial_param(trial_id, "x", 0.25, RANGE)
    storage.set_trial_user_attr(trial_id, "note", {"a": [1, 2]})
    trial = storage.get_trial(trial_id)
    assert (trial.params, trial.user_attrs) == ({"x": 0.25}, {"note": {"a": [1, 2]}})
    assert sent == ["PRAGMA"]
    sent.clear()

    assert storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.5])
    assert sent == ["BEGIN", "PRAGMA", "INSERT", "INSERT", "INSERT", "UPDATE", "COMMIT"]
    sent.clear()

    assert [trial.state.name for trial in storage.get_all_trials(study_id)] == [
        "RUNNING",
        "COMPLETE",
    ]
    assert sent == ["PRAGMA"]


def test_what_was_not_read_back_is_what_others_read(storage: Any, url: str) -> None:
    study = optuna.create_study(storage=storage, study_name="s")
    study.optimize(
        lambda trial: trial.suggest_float("x", 0, 1) + trial.suggest_int("n", 1, 3), n_trials=20
    )
    with contextlib.closing(trialstore.RDBStorage(url)) as other:
        theirs = optuna.load_study(storage=other, study_name="s").get_trials()
    plain = optuna.load_study(storage=optuna.storages.RDBStorage(url), study_name="s").get_trials()
    assert study.get_trials() == theirs == plain


def test_the_sign_that_the_file_drops_is_dropped_at_once(storage: Any, url: str) -> None:
    study = optuna.create_study(storage=storage, study_name="s", directions=["minimize"] * 2)
    trial = study.ask()
    trial.suggest_float("x", -0.0, -0.0)
    trial.set_user_attr("kept", -0.0)
    storage.set_trial_intermediate_value(trial._trial_id, 0, -0.0)
    study.tell(trial, [1.0, -0.0])
    with contextlib.closing(trialstore.RDBStorage(url)) as other:
        theirs = storage_contents(other)
    assert storage_contents(storage) == theirs


def _attribute(other: Any, study_id: int, trial_id: int) -> None:
    other.set_trial_user_attr(trial_id, "theirs", 1)


def _new_trial(other: Any, study_id: int, trial_id: int) -> None:
    other.create_new_trial(study_id)


def _queued(other: Any, study_id: int, trial_id: int) -> None:
    other.create_new_trial(study_id, create_trial(state=TrialState.WAITING))


def _study_attribute(other: Any, study_id: int, trial_id: int) -> None:
    other.set_study_user_attr(study_id, "theirs", 1)


@pytest.mark.parametrize("act", [_attribute, _new_trial, _queued, _study_attribute])
@pytest.mark.parametrize("open_other", [trialstore.RDBStorage, optuna.storages.RDBStorage])
def test_what_another_writes_is_seen_at_once(
    storage: Any,
    url: str,
    act: Callable[[Any, int, int], None],
    open_other: Callable[[str], Any],
) -> None:
    study_id, trial_id = _known(storage)
    other = open_other(url)
    storage.get_all_trials(study_id)
    sent = _counted(storage)
    storage.get_all_trials(study_id)
    assert sent == ["PRAGMA"]
    act(other, study_id, trial_id)
    assert storage.get_all_trials(study_id) == other.get_all_trials(study_id)
    assert storage.get_study_user_attrs(study_id) == other.get_study_user_attrs(study_id)
    assert _waiting(storage, study_id) == _waiting(other, study_id)
    other.remove_session()


@pytest.mark.parametrize("by_another", [False, True])
def test_an_attribute_of_a_study_is_read_after_a_look_for_waiting_trials(
    storage: Any, url: str, by_another: bool
) -> None:
    """Such a look, as in ``ask``, may read trials alone and says nothing of the study's rows."""
    study_id, _ = _known(storage)
    with contextlib.closing(trialstore.RDBStorage(url)) as other:
        writer = other if by_another else storage
        for value in range(3):
            writer.set_study_user_attr(study_id, "note", value)
            writer.set_study_system_attr(study_id, "note", -value)
            assert _waiting(storage, study_id) == []
            storage.create_new_trial(study_id)
            assert storage.get_study_user_attrs(study_id) == {"note": value}
            assert storage.get_study_system_attrs(study_id) == {"note": -value}
            sent = _counted(storage)
            assert storage.get_study_user_attrs(study_id) == {"note": value}
            assert sent == ["PRAGMA"]


def test_what_another_finished_can_not_be_written_on(storage: Any, url: str) -> None:
    study_id, trial_id = _known(storage)
    with contextlib.closing(trialstore.RDBStorage(url)) as other:
        other.set_trial_state_values(trial_id, TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    assert storage.get_trial(trial_id).state == TrialState.FAIL
    assert storage.create_new_trial(study_id) != trial_id


def test_a_study_in_the_place_of_a_deleted_one_is_another(storage: Any, url: str) -> None:
    study_id, trial_id = _known(storage)
    with contextlib.closing(trialstore.RDBStorage(url)) as other:
        other.delete_study(study_id)
        assert other.create_new_study([MINIMIZE], "s") == study_id
        assert other.create_new_trial(study_id) == trial_id
    with pytest.raises(KeyError):
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    assert storage.get_all_trials(study_id)[0].state == TrialState.RUNNING


def test_long_alone_the_next_look_at_others_reads_little(storage: Any, url: str) -> None:
    """What was not read back has been seen all the same."""
    study_id, _ = _known(storage)
    for _ in range(30):
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    with contextlib.closing(trialstore.RDBStorage(url)) as other:
        other.create_new_trial(study_id)
        decoder, read = storage.log.connection.decoder, list[int]()
        real = decoder.trials
        decoder.trials = lambda rows: read.append(len(rows)) or real(rows)
        assert len(storage.get_all_trials(study_id)) == 32
    assert sum(read) == 3  # two RUNNING trials, and a parameter of one
