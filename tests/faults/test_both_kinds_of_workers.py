"""Workers of Optuna and of ours that are killed, stopped or just slow, with clocks hours apart.

Nothing waits for a lease to expire: the test makes the leases in the store look older, and then
waits until those who live have said so again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

import optuna
import pytest

from ageing import age_leases, signal_and_wait, stop_and_wait
from faults.beating_worker import GRACE_S, open_storage
from redis_servers import new_prefix, shared_cluster
from servers import new_database, shared_redis
import trialstore
from trialstore.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

_WORKER = Path(__file__).parent / "beating_worker.py"
_DEADLINE_S = 60.0
_HOUR_S = 3600

_SERVERS = ("psycopg", "pymysql", "redis", "redis-cluster")
_KINDS = ["sqlite", *(pytest.param(kind, marks=pytest.mark.servers) for kind in _SERVERS)]


class Worker:
    """A process of ``beating_worker.py``."""

    def __init__(self, kind: str, address: Sequence[str], shift_s: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(_WORKER), kind, *address, "s", str(shift_s)],
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def finish(self) -> str:
        """Let it tell, and what it says of that."""
        assert self.process.stdin is not None
        self.process.stdin.write("go on\n")
        self.process.stdin.flush()
        return self.line()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def start_one(*arguments: Any) -> Worker:
        workers.append(Worker(*arguments))
        return workers[-1]

    yield start_one
    for worker in workers:
        worker.end()


def _address(kind: str, folder: Path) -> tuple[str, str]:
    if kind == "redis":
        return shared_redis().url, new_prefix()
    if kind == "redis-cluster":
        return shared_cluster().url, new_prefix("cluster-p%d")
    return new_database(kind, folder), ""


@pytest.mark.parametrize("kind", _KINDS)
def test_the_dead_are_found_and_the_living_are_left_alone(
    kind: str, tmp_path: Path, start: Callable[..., Worker]
) -> None:
    address = _address(kind, tmp_path)
    retry = trialstore.RetryFailedTrialCallback(max_retry=1)
    ours = open_storage("ask", *address, heartbeat_stale_trial_callback=retry)
    study = optuna.create_study(study_name="s", storage=ours)
    workers = {
        "killed": start("ask", address, -_HOUR_S),
        "stopped": start("optimize", address, _HOUR_S),
        "living": start("ask", address, _HOUR_S),
        "living too": start("optimize", address, -_HOUR_S),
    }
    first, fail = study, trialstore.fail_stale_trials
    if not kind.startswith("redis"):
        workers["Optuna's, killed"] = start("optuna", address, _HOUR_S)
        workers["Optuna's, living"] = start("optuna", address, -_HOUR_S)
        # Optuna's own storage with Optuna's own callback finds and retries our dead.
        theirs = open_storage("optuna", *address, heartbeat_stale_trial_callback=_optunas_retry())
        first, fail = optuna.load_study(study_name="s", storage=theirs), _optunas_fail
    ids = {name: int(worker.line()) for name, worker in workers.items()}

    signal_and_wait(workers["killed"].process.pid, signal.SIGKILL)
    age_leases(ours, 2.0 * GRACE_S)
    _wait_until_stale(ours, study, [ids["killed"]])
    fail(first)
    fail(study)

    # And ours finds and retries Optuna's.
    dead = [name for name in workers if "killed" in name or name == "stopped"]
    for name in dead:
        if name == "stopped":
            stop_and_wait(workers[name].process.pid, ours)
        else:
            signal_and_wait(workers[name].process.pid, signal.SIGKILL)
    age_leases(ours, 2.0 * GRACE_S)
    expected = sorted(ids[name] for name in dead)
    _wait_until_stale(ours, study, [one for one in expected if one != ids["killed"]])
    fail(study)
    fail(first)

    workers["stopped"].process.send_signal(signal.SIGCONT)
    said = {name: worker.finish() for name, worker in workers.items() if name not in dead}
    assert set(said.values()) == {"told"}
    assert workers["stopped"].finish().startswith(("UpdateFinishedTrialError", "ValueError"))

    trials = study.get_trials()
    states = {trial._trial_id: trial.state.name for trial in trials}
    assert {name: states[ids[name]] for name in ids} == {
        name: "FAIL" if name in dead else "COMPLETE" for name in ids
    }
    retries = [trial for trial in trials if trial.state.name == "WAITING"]
    assert len(trials) == len(ids) + len(retries)
    of = {trial.number: trial._trial_id for trial in trials}
    histories = [trial.system_attrs["retry_history"] for trial in retries]
    assert sorted(of[number] for (number,) in histories) == expected
    assert all(trial.values is None for trial in trials if trial.state.name == "FAIL")
    ours.close()


def _wait_until_stale(storage: Storage, study: optuna.Study, expected: list[int]) -> None:
    """Who is held for dead, without doing anything about it, once those who live beat again."""
    give_up_at = time.monotonic() + _DEADLINE_S
    late = set(expected)
    while (found := sorted(storage._find_stale(study._study_id))) != expected:
        assert time.monotonic() < give_up_at, (found, expected)
        # A beat that was on its way when its worker died may have come after the ageing; once.
        if came := late.difference(found):
            late -= came
            age_leases(storage, 2.0 * GRACE_S)
        time.sleep(0.05)


def _optunas_retry() -> Any:
    new = getattr(optuna.storages, "RetryHeartbeatStaleTrialCallback", None)
    return (new or optuna.storages.RetryFailedTrialCallback)(max_retry=1)


def _optunas_fail(study: optuna.Study) -> None:
    optuna.storages.fail_stale_trials(study)
