"""``MaxTrials`` within one process: for whom it waits, and for whom it does not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
import pickle
from typing import Any

import optuna
from optuna.exceptions import TrialPruned
import pytest

import trialstore
from trialstore.journal import JournalFileBackend, JournalStorage
from trialstore.testing.clock import ManualClock
from trialstore.testing.suites.base import run_threads, wait_until


def _study(path: Path, heartbeat_interval: int | None, **options: Any) -> optuna.Study:
    storage = JournalStorage(
        JournalFileBackend(str(path)), heartbeat_interval=heartbeat_interval, **options
    )
    return optuna.create_study(study_name="study", storage=storage, load_if_exists=True)


def _states(study: optuna.Study) -> Counter[str]:
    return Counter(trial.state.name for trial in study.get_trials())


def _objective(trial: optuna.Trial) -> float:
    return 0.0


def test_threads_of_one_storage_wait_for_each_other_without_heartbeats(tmp_path: Path) -> None:
    clock = ManualClock()
    study = _study(tmp_path / "journal", None, clock=clock)
    ran: list[int] = []

    def objective(trial: optuna.Trial) -> float:
        ran.append(trial.number)
        if len(ran) > 1:
            return 0.0
        # The one slot is held until another thread waits for it, or has given up.
        wait_until(
            lambda: clock.slept_s > 0 or "PRUNED" in _states(study), "a thread without a slot"
        )
        raise TrialPruned

    study.optimize(trialstore.MaxTrials(1)(objective), n_jobs=2)
    assert _states(study)["COMPLETE"] == 1


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("interval_s", [None, 60])
def test_who_asked_for_all_slots_gets_none_at_once(tmp_path: Path, interval_s: int | None) -> None:
    study, budget = _study(tmp_path / "journal", interval_s), trialstore.MaxTrials(2)
    assert [budget.ask(study) is not None for _ in range(3)] == [True, True, False]
    study.optimize(budget(lambda trial: 0.0))
    assert [trial.state.name for trial in study.trials] == ["RUNNING"] * 2 + ["PRUNED"] * 2


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_holder_that_is_not_covered_is_not_waited_for(tmp_path: Path) -> None:
    path, budget = tmp_path / "journal", trialstore.MaxTrials(1)
    assert budget.ask(_study(path, None)) is not None
    assert budget.ask(_study(path, 60)) is None


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_study_that_is_stopped_waits_no_more(tmp_path: Path) -> None:
    path, budget = tmp_path / "journal", trialstore.MaxTrials(1)
    assert budget.ask(_study(path, 60)) is not None
    clock = ManualClock()
    study = _study(path, 60, clock=clock)

    def stop() -> None:
        wait_until(lambda: clock.slept_s > 1.0, "somebody who waits")
        study._stop_flag = True  # what ``study.stop`` sets, in a thread of ``optimize``

    run_threads(stop, lambda: study.optimize(budget(lambda trial: 0.0)))
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "PRUNED"]


def test_a_budgeted_objective_looks_like_the_objective() -> None:
    budgeted = pickle.loads(pickle.dumps(trialstore.MaxTrials(1)(_objective)))
    assert (budgeted.__name__, budgeted.__wrapped__) == ("_objective", _objective)
