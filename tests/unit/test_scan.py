"""What reading a whole store once costs, and that nothing of it is missed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

from trialstore.journal import JournalFileBackend, JournalStorage
from trialstore.replica import Replica


def test_a_study_is_not_looked_at_for_each_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_studies, looks = 100, []
    take_finished = Replica.take_finished

    def counted(replica: Replica, study_id: int) -> Iterator[Any]:
        looks.append(study_id)
        return take_finished(replica, study_id)

    monkeypatch.setattr(Replica, "take_finished", counted)
    path = str(tmp_path / "journal")
    storage = JournalStorage(JournalFileBackend(path), linger_s=0)
    study_ids = [
        storage.create_new_study([StudyDirection.MINIMIZE], str(number))
        for number in range(n_studies)
    ]
    for study_id in study_ids:
        _finish_one(storage, study_id)
    scan = JournalStorage(JournalFileBackend(path)).scan()
    for study in scan.studies:
        # Somebody is at work meanwhile.
        _finish_one(storage, study.study_id)
        _finish_one(storage, study_ids[-1])
        n_later = n_studies if study.study_id == study_ids[-1] else 0
        assert scan.n_trials(study) == 2 + n_later
        states = [image.state for image in scan.trials(study.study_id)]
        assert states == [int(TrialState.COMPLETE)] * (2 + n_later)
    assert len(looks) <= 5 * n_studies


def _finish_one(storage: JournalStorage, study_id: int) -> None:
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
