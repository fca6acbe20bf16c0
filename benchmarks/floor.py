"""The least that any client must do for a trial in Optuna's tables, with the same driver.

Four messages, because Optuna looks for a queued trial, creates, reads and finishes; the bare
writes, no condition, no lock, no mark, nothing read back but an id and a state; prepared where the
driver's session prepares. Optuna's own trial in memory comes on top. It is no storage: two of it
would hand out numbers twice. In a crowd each has a study to itself, and nobody reads what others
wrote.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
import re
import time
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import optuna
import sqlalchemy as sa

from benchmarks import harness
from benchmarks.crowd import Crowd, gather
from benchmarks.harness import Cost
from trialstore.logs.relational import TablesLog
from trialstore.logs.relational.session import Compiled, Session, Step, plain

_QUEUED = "SELECT max(trial_id) FROM trials WHERE study_id = $1 AND state = 'WAITING'"
_CREATE = (
    "INSERT INTO trials (number, study_id, state, datetime_start)"
    " VALUES ($1, $2, 'RUNNING', '2026-01-01')"
)
_ID = "SELECT max(trial_id) FROM trials WHERE study_id = $1"
_PARAMS = (
    "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) VALUES "
    + ", ".join(f"($1, 'x{i}', 0.5, $2)" for i in range(harness.N_PARAMS))
)
_ATTR = "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES ($1, 'total', '0.5')"
_STATE = "SELECT number FROM trials WHERE trial_id = $1"
_VALUE = (
    "INSERT INTO trial_values (trial_id, objective, value, value_type)"
    " VALUES ($1, 0, 0.5, 'FINITE')"
)
_FINISH = (
    "UPDATE trials SET state = 'COMPLETE', datetime_complete = '2026-01-01' WHERE trial_id = $1"
)


def run_crowd(url: str, folder: Path, n_processes: int, seconds: float) -> Crowd:
    """What so many processes reach in one database; ``folder`` is not used."""
    return gather(n_processes, seconds, _work, url)


def _work(sender: Any, start: Any, url: str, seconds: float) -> None:
    optuna.logging.disable_default_handler()
    bare = Floor(url, os.getpid())
    start.wait()
    began_s, count = time.perf_counter(), 0
    while time.perf_counter() - began_s < seconds:
        bare.run()
        count += 1
    sender.send((count, time.perf_counter() - began_s, [], ""))


class _Turn:
    """Of the writers of one SQLite file, which else try again and again; a server queues them."""

    def __init__(self, url: sa.URL) -> None:
        is_file = url.get_backend_name() == "sqlite"
        self._fd = os.open(f"{url.database}.turn", os.O_CREAT | os.O_RDWR) if is_file else None

    def __enter__(self) -> None:
        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)


class Floor:
    """Bare trials in a study that nobody else uses, in an empty database or one of floors."""

    def __init__(self, url: str, study_id: int = 1) -> None:
        self._log = TablesLog(url)
        self._session: Session = self._log.connection.session()
        self._study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
        dialect = self._log.connection.dialect
        self._begin, self._commit = dialect.begin_write, dialect.commit
        self._study_id = study_id
        self._turn: Any = contextlib.nullcontext() if fcntl is None else _Turn(sa.make_url(url))
        study = f"({study_id}, 'floor {study_id}')"
        with self._turn:
            self._session.run(
                [plain(f"INSERT INTO studies (study_id, study_name) VALUES {study}")]
            )
        self._n = 0
        self.measure(10)

    def measure(self, n_trials: int) -> Cost:
        """What a trial costs, with Optuna's own part of it."""
        memory = harness.optimize(self._study, n_trials)
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        for _ in range(n_trials):
            self._run_trial()
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        return Cost(
            wall_s / n_trials * 1e3 + memory.wall_ms, cpu_s / n_trials * 1e3 + memory.cpu_ms
        )

    def run(self) -> None:
        """One trial, with Optuna's own part of it."""
        self._study.optimize(harness.objective, n_trials=1)
        self._run_trial()

    def _run_trial(self) -> None:
        run = self._session.run
        study_id = self._study_id
        run([self._step(_QUEUED, study_id, columns=1)])
        created = [self._begin, self._step(_CREATE, self._n, study_id), self._commit]
        with self._turn:
            one = int(run([*created, self._step(_ID, study_id, columns=1)])[-1][0][0])
        run([self._step(_STATE, one, columns=1)])
        fields = [self._step(_PARAMS, one, "{}"), self._step(_ATTR, one)]
        told = [self._step(_VALUE, one), self._step(_FINISH, one)]
        with self._turn:
            run([self._begin, *fields, *told, self._commit])
        self._n += 1

    def _step(self, sql: str, *args: object, columns: int = 0) -> Step:
        if self._log.connection.dialect.paramstyle == "format":
            args = tuple([args[int(n) - 1] for n in re.findall(r"\$(\d)", sql)])
            sql = re.sub(r"\$\d", "%s", sql).replace(" key,", " `key`,")
        return Step(Compiled(sql, (), columns), args)
