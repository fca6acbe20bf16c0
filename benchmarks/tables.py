"""The tables on database servers beside Optuna's: round trips, time and CPU per trial, pruning,
many processes.

Starts a private PostgreSQL and MariaDB for each run, as the tests do. Beside a trial and a crowd
stands the ``floor``. (More of SQLite is in ``per_trial``, ``crowd`` and ``opening``.)
"""

from __future__ import annotations

import functools
from pathlib import Path
import statistics
import sys
import time
from typing import Any

import optuna
from optuna.storages import BaseStorage
import sqlalchemy as sa
from tests.servers import new_database

from benchmarks import crowd, harness
from benchmarks.floor import Floor, run_crowd
from benchmarks.harness import OURS, Cost, Report, Row
from trialstore.testing.faults import CountingProxy

_NAMES = (OURS, "optuna")
_FLOOR = "floor"
_DELAY_S = 0.005
_N_DELAYED = 5


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument(
        "--driver",
        action="append",
        help="sqlite, psycopg, psycopg2, pymysql; default: the servers'",
    )
    parser.add_argument("--trials", type=int, default=30, help="in one sample")
    parser.add_argument("--known", type=int, default=100, help="trials and steps, for pruning")
    parser.add_argument("--processes", type=int, default=16, help="0 leaves the crowd out")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a crowd's sample")
    parser.set_defaults(rounds=3)
    arguments = parser.parse_args()
    with Report("tables", arguments) as report:
        for driver in arguments.driver or ("psycopg", "psycopg2", "pymysql"):
            if driver != "sqlite":
                compare_trips(report, driver)
                compare_trials(report, driver, arguments.trials, arguments.rounds)
            compare_pruning(report, driver, arguments.known)
            if arguments.processes:
                stores = {name: new_database(driver, report.new_folder()) for name in _NAMES}
                bare = functools.partial(run_crowd, new_database(driver, report.new_folder()))
                crowd.compare(report, stores, arguments.processes, arguments.seconds, 1, bare)
    return 0


def open_storage(name: str, url: str) -> BaseStorage:
    return harness.open_storage(name, url, Path())


def warm_study(name: str, url: str) -> optuna.Study:
    study = harness.new_study(open_storage(name, url))
    study.optimize(harness.objective, n_trials=5)
    return study


def compare_trips(report: Report, driver: str) -> None:
    trips: dict[str, float] = {}
    delayed_ms: dict[str, float] = {}
    for name in _NAMES:
        url = sa.make_url(new_database(driver, report.folder))
        assert url.host is not None and url.port is not None
        with CountingProxy(url.host, url.port) as proxy:
            through = url.set(host=proxy.host, port=proxy.port)
            study = warm_study(name, through.render_as_string(hide_password=False))
            proxy.reset()
            study.optimize(harness.objective, n_trials=20)
            trips[name] = proxy.n_round_trips / 20
            proxy.delay_s = _DELAY_S
            delayed_ms[name] = harness.optimize(study, _N_DELAYED).wall_ms
            proxy.delay_s = 0.0
    report.add(Row(f"{driver}, a trial", "round trips", trips))
    report.add(Row(f"{driver}, a trial, 5 ms each way", "ms", delayed_ms))


def compare_trials(report: Report, driver: str, n_trials: int, rounds: int) -> None:
    studies = {name: warm_study(name, new_database(driver, report.folder)) for name in _NAMES}
    bare = Floor(new_database(driver, report.folder))

    def sample(name: str) -> Cost:
        if name == _FLOOR:
            return bare.measure(n_trials)
        return harness.optimize(studies[name], n_trials)

    costs: dict[str, list[Cost]] = harness.in_turn((*_NAMES, _FLOOR), rounds, sample)
    for unit, of in (("wall ms", _wall_ms), ("CPU ms", _cpu_ms)):
        medians = harness.medians(costs, of)
        floor = medians.pop(_FLOOR)
        notes = {"floor": round(floor, 2), "its factor": round(medians["optuna"] / floor, 1)}
        report.add(Row(f"{driver}, a trial", unit, medians, notes=notes))


def _wall_ms(cost: Cost) -> float:
    return cost.wall_ms


def _cpu_ms(cost: Cost) -> float:
    return cost.cpu_ms


def compare_pruning(report: Report, driver: str, n_known: int) -> None:
    """``report`` and ``should_prune``, the median step of a trial, with so many trials of as many
    steps known."""
    wall_ms: dict[str, float] = {}
    notes: dict[str, Any] = {}
    for name in (*_NAMES, "in memory"):
        url = new_database(driver, report.folder)
        storage = optuna.storages.InMemoryStorage() if name == "in memory" else None
        storage = storage or open_storage(name, url)
        if name == OURS:
            notes["an empty exchange, ms"] = round(empty_ms(storage), 2)
        study = harness.new_study(storage)
        study.pruner = optuna.pruners.MedianPruner()
        steps = {step: float(step) for step in range(n_known)}
        template = optuna.trial.create_trial(value=1.0, intermediate_values=steps)
        study.add_trials([template] * n_known)
        trial = study.ask()
        trial.report(0.0, 0)
        trial.should_prune()
        steps_ms = []
        for step in range(1, n_known):
            began_s = time.perf_counter()
            trial.report(0.0, step)
            trial.should_prune()
            steps_ms.append((time.perf_counter() - began_s) * 1e3)
        taken_ms = statistics.median(steps_ms)
        if name == "in memory":
            notes["the pruner's own, ms"] = round(taken_ms, 2)
        else:
            wall_ms[name] = taken_ms
    row = Row(f"{driver}, report + should_prune", "ms", wall_ms, notes=notes)
    report.add(row)


def empty_ms(storage: Any) -> float:
    """What the driver and the server take for a transaction that does nothing."""
    connection = storage.log.connection
    session = connection.session()
    steps = [connection.dialect.begin_write, connection.dialect.commit]
    began_s = time.perf_counter()
    for _ in range(50):
        session.run(steps)
    return (time.perf_counter() - began_s) / 50 * 1e3


if __name__ == "__main__":
    sys.exit(main())
