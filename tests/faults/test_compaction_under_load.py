"""Four processes write while a journal is compacted or trimmed: nothing is lost, nobody stops."""

from __future__ import annotations

from collections.abc import Callable
import multiprocessing
from pathlib import Path
import time
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

from redis_servers import new_prefix
from servers import shared_redis
import trialstore
from trialstore import journal
from trialstore.testing.contents import storage_contents

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

_N_WORKERS = 4
_N_CHANGES = 3
_DEADLINE_S = 240.0


def _open_file(path: str) -> Any:
    return journal.JournalFileBackend(path)


def _open_redis(url: str, prefix: str) -> Any:
    return journal.JournalRedisBackend(url, prefix=prefix)


def _work(open_log: Callable[..., Any], args: tuple[Any, ...], is_done: Any, told: Any) -> None:
    """Trials until the test says that it has seen enough; tells which, and its longest pause."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = trialstore.JournalStorage(open_log(*args))
    study = optuna.load_study(study_name="s", storage=storage, sampler=RandomSampler())
    mine, longest_s = [], 0.0
    while not is_done.is_set() or len(mine) < 20:
        began_s = time.monotonic()
        trial = study.ask()
        value = trial.suggest_float("x", 0, 1)
        trial.set_user_attr("value", value)
        study.tell(trial, value)
        longest_s = max(longest_s, time.monotonic() - began_s)
        mine.append((trial._trial_id, trial.number, value))
    storage.close()
    told.put((mine, longest_s))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("file", journal.compact),
        pytest.param("redis", journal.compact, marks=pytest.mark.servers),
        pytest.param("redis", journal.trim, marks=pytest.mark.servers),
    ],
)
def test_nothing_is_lost_and_nobody_stops(kind: str, change: Any, tmp_path: Path) -> None:
    if kind == "file":
        open_log, args = _open_file, (str(tmp_path / "journal.log"),)
    else:
        open_log, args = _open_redis, (shared_redis().url, new_prefix())  # type: ignore[assignment]
    storage = trialstore.JournalStorage(open_log(*args))
    for name in ("gone", "s"):
        study = optuna.create_study(storage=storage, study_name=name, sampler=RandomSampler())
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=100)
    optuna.delete_study(study_name="gone", storage=storage)
    context = multiprocessing.get_context("spawn")
    is_done, told = context.Event(), context.Queue()
    workers = [
        context.Process(target=_work, args=(open_log, args, is_done, told))
        for _ in range(_N_WORKERS)
    ]
    for worker in workers:
        worker.start()
    try:
        n_done = 0
        give_up_at = time.monotonic() + _DEADLINE_S
        for _ in range(_N_CHANGES):
            # In the middle of their work, each time.
            while len(study.trials) < n_done + 10 * _N_WORKERS:
                assert time.monotonic() < give_up_at
                time.sleep(0.01)
            change(open_log(*args))
            n_done = len(study.trials)
        is_done.set()
        answers = [told.get(timeout=_DEADLINE_S) for _ in workers]
    finally:
        is_done.set()
        for worker in workers:
            worker.join()
    assert [worker.exitcode for worker in workers] == [0] * _N_WORKERS
    print(f"longest trial of each worker: {[f'{s:.2f} s' for _, s in answers]}")
    trials = {trial._trial_id: trial for trial in study.trials}
    assert [trial.number for trial in trials.values()] == list(range(len(trials)))
    mine = [each for part, _ in answers for each in part]
    assert len(mine) == len(trials) - 100
    for trial_id, number, value in mine:
        trial = trials[trial_id]
        assert (trial.number, trial.value, trial.params) == (number, value, {"x": value})
        assert trial.user_attrs == {"value": value}
        assert trial.state == TrialState.COMPLETE
    again = trialstore.JournalStorage(open_log(*args))
    assert storage_contents(again) == storage_contents(storage)
