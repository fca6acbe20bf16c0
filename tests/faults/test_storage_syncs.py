"""Two syncs a trial, counted in a process of its own: one for its creation, one for its tell."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
import sys

from optuna.study import StudyDirection
import pytest

from faults.sync_worker import N_COUNTED
import trialstore
from trialstore.testing.faults import SyncCounter, count_syncs

_WORKER = Path(__file__).parent / "sync_worker.py"


def _counted(folder: Path, url: str) -> Counter[str]:
    trace = count_syncs([sys.executable, str(_WORKER), url], folder)
    return trace.by_file(after="begin", before="end")


def test_a_trial_in_a_journal_file_takes_two_syncs(tmp_path: Path) -> None:
    syncs = _counted(tmp_path, str(tmp_path / "journal.log"))
    assert syncs == {"journal.log": 2 * N_COUNTED}


def test_a_trial_in_sqlite_takes_two_syncs_checkpoints_apart(tmp_path: Path) -> None:
    syncs = _counted(tmp_path, f"sqlite:///{tmp_path / 'store.db'}")
    # A checkpoint syncs the write-ahead log, then the database; the log's next header again.
    n_checkpoints = syncs.pop("store.db", 0)
    extra = syncs["store.db-wal"] - 2 * N_COUNTED
    assert n_checkpoints <= extra <= 2 * n_checkpoints, syncs
    assert set(syncs) == {"store.db-wal"}


def test_without_power_loss_in_mind_a_journal_file_is_not_synced(tmp_path: Path) -> None:
    backend = trialstore.journal.JournalFileBackend(
        str(tmp_path / "journal.log"), durability="process"
    )
    storage = trialstore.JournalStorage(backend)
    with SyncCounter() as counter:
        study_id = storage.create_new_study([StudyDirection.MINIMIZE])
        storage.create_new_trial(study_id)
    assert counter.total == 0
    storage.close()


def test_the_counter_in_process_sees_what_the_child_s_sees(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    storage = trialstore.JournalStorage(trialstore.journal.JournalFileBackend(str(path)))
    study_id = storage.create_new_study([StudyDirection.MINIMIZE])
    with SyncCounter() as counter:
        storage.create_new_trial(study_id)
    assert counter.by_file == {str(path): 1}
    storage.close()


def test_a_failing_program_tells_its_errors(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such study"):
        count_syncs([sys.executable, "-c", "raise SystemExit('no such study')"], tmp_path)
