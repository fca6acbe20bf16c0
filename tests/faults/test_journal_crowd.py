"""Many processes and threads at one journal file: whoever may win, exactly one does."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
import multiprocessing
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

import trialstore
from trialstore import journal

_DEADLINE_S = 240
_spawn = multiprocessing.get_context("spawn")


def _open(path: str, lock: str) -> trialstore.JournalStorage:
    kind = getattr(journal, lock)
    return trialstore.JournalStorage(journal.JournalFileBackend(path, kind(path)))


@pytest.fixture(params=["JournalFileSymlinkLock", "JournalFileOpenLock"])
def lock(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


def _run(target: Any, n_processes: int, *args: Any) -> list[Any]:
    """What each of so many processes that start together puts into the queue."""
    barrier, results = _spawn.Barrier(n_processes), _spawn.Queue()
    processes = [
        _spawn.Process(target=target, args=(barrier, results, *args)) for _ in range(n_processes)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=_DEADLINE_S) for _ in processes]
    for process in processes:
        process.join(_DEADLINE_S)
        assert process.exitcode == 0
    return found


def _pop_all(barrier: Any, results: Any, path: str, lock: str) -> None:
    storage = _open(path, lock)
    study = optuna.load_study(study_name="queue", storage=storage)
    barrier.wait(_DEADLINE_S)

    def pop() -> list[int]:
        popped = []
        while (trial_id := study._pop_waiting_trial_id()) is not None:
            popped.append(trial_id)
        return popped

    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(pop) for _ in range(8)]
        results.put([trial_id for future in futures for trial_id in future.result()])


def test_2000_waiting_trials_are_popped_once_each(tmp_path: Path, lock: str) -> None:
    path = str(tmp_path / "journal")
    study = optuna.create_study(study_name="queue", storage=_open(path, lock))
    for number in range(2000):
        study.enqueue_trial({"x": number})
    popped = Counter(trial_id for found in _run(_pop_all, 8, path, lock) for trial_id in found)
    assert len(popped) == 2000 and set(popped.values()) == {1}
    states = Counter(trial.state for trial in study.get_trials(deepcopy=False))
    assert states == {TrialState.RUNNING: 2000}


def _create_study(barrier: Any, results: Any, path: str, lock: str) -> None:
    storage = _open(path, lock)
    barrier.wait(_DEADLINE_S)
    try:
        results.put(storage.create_new_study([StudyDirection.MINIMIZE], "only one"))
    except DuplicatedStudyError:
        results.put(None)


def test_of_16_processes_that_create_one_study_one_wins(tmp_path: Path, lock: str) -> None:
    path = str(tmp_path / "journal")
    found = _run(_create_study, 16, path, lock)
    assert Counter(found) == {0: 1, None: 15}
    assert [study.study_name for study in _open(path, lock).get_all_studies()] == ["only one"]
