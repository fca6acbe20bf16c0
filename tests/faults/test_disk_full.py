"""A full disk, and one that may only be read: a clear error, and work goes on after."""

from __future__ import annotations

from collections.abc import Iterator
import gc
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


def test_a_read_only_disk_is_read_and_not_written(small_disk: Path) -> None:
    path = str(small_disk / "journal")

    def write() -> tuple[int, int]:
        storage = trialstore.JournalStorage(JournalFileBackend(path), linger_s=0)
        study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
        return study_id, storage.create_new_trial(study_id)

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    study_id, trial_id = write()
    gc.collect()  # what is open for writing would keep the disk from being remounted
    remount("ro")
    before = sorted(small_disk.iterdir())
    try:
        reader = trialstore.JournalStorage(JournalFileBackend(path), linger_s=0)
        assert reader.get_study_id_from_name("s") == study_id
        assert reader.get_trial(trial_id).state == TrialState.RUNNING
        with pytest.raises(LogUnavailableError, match="folder must be writable") as caught:
            reader.create_new_trial(study_id)
        assert path in str(caught.value)
        with pytest.raises(LogUnavailableError, match="missing"):
            JournalFileBackend(str(small_disk / "missing"))
        assert sorted(small_disk.iterdir()) == before
    finally:
        remount("rw")
    # The same storage goes on as soon as it may.
    assert reader.create_new_trial(study_id) == trial_id + 1


def _assert_told(path: str, study_id: int, told: dict[int, float]) -> None:
    reader = trialstore.JournalStorage(JournalFileBackend(path))
    trials = reader.get_all_trials(study_id, deepcopy=False)
    assert [trial.number for trial in trials] == list(range(len(trials)))
    complete = {t._trial_id: t.value for t in trials if t.state == TrialState.COMPLETE}
    assert complete.items() >= told.items()
