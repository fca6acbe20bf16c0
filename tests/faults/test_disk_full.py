"""A full disk: a clear error, nothing acknowledged lost, and work goes on after."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
import subprocess

from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

import trialstore
from trialstore.errors import LogUnavailableError, OutcomeUnknownError
from trialstore.journal import JournalFileBackend


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("Mounting a small file system needs root.")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_full_disk_loses_nothing_and_work_goes_on_when_there_is_space(small_disk: Path) -> None:
    path = str(small_disk / "journal")
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 100_000)
    storage = trialstore.JournalStorage(JournalFileBackend(path), linger_s=0)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE])
    told: dict[int, float] = {}
    failures = 0
    for value in range(10_000):
        try:
            trial_id = storage.create_new_trial(study_id)
            storage.set_trial_user_attr(trial_id, "k", "v" * 200)
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [float(value)])
            told[trial_id] = float(value)
        except (LogUnavailableError, OutcomeUnknownError) as error:
            assert path in str(error)
            failures += 1
            if failures == 1:
                # Whoever reads meanwhile sees all that was told.
                _assert_told(path, study_id, told)
            if failures == 20:
                break
    assert failures == 20 and told
    filler.unlink()
    for value in range(50):
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [float(value)])
        told[trial_id] = float(value)
    _assert_told(path, study_id, told)


def _assert_told(path: str, study_id: int, told: dict[int, float]) -> None:
    reader = trialstore.JournalStorage(JournalFileBackend(path))
    trials = reader.get_all_trials(study_id, deepcopy=False)
    assert [trial.number for trial in trials] == list(range(len(trials)))
    complete = {t._trial_id: t.value for t in trials if t.state == TrialState.COMPLETE}
    assert complete.items() >= told.items()
