"""The queue: what it costs to claim the first of many WAITING trials, and of few.

Before each trial ``study.ask`` reads the queue and claims its first; that pair is measured, in a
storage that has read the queue once. The last rows of a store say how it grows with the queue.

Without Rustuna, whose storages nobody else can use at the same time. Optuna is asked to claim
twice, since with 5,000 queued trials that takes it seconds on tables.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import gc
from pathlib import Path
import statistics
import sys
import time
from typing import Any

import optuna
from optuna.trial import TrialState
import redis
import sqlalchemy as sa
from tests.servers import new_database, shared_redis

from benchmarks import grpc_proxy, harness
from benchmarks.harness import OURS, Cost, Report, Row
from trialstore import records as r
from trialstore.log import NOTHING
from trialstore.storage import Storage

_COMPARED = (OURS, "optuna")
_CLAIMS = {OURS: 40, "optuna": 2}
_STORES = ("memory", "journal", "redis", "sqlite", "psycopg", "psycopg2", "pymysql", "grpc")


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--store", action="append", choices=_STORES, help="default: all")
    parser.add_argument("--queued", type=int, nargs=2, default=(50, 5000), metavar=("FEW", "MANY"))
    parser.add_argument("--only-ours", action="store_true")
    arguments = parser.parse_args()
    names = _COMPARED[:1] if arguments.only_ours else _COMPARED
    with Report("queue", arguments) as report:
        for store in arguments.store or _STORES:
            compare(report, names, store, arguments.queued, arguments.rounds)
    return 0


def compare(
    report: Report, names: tuple[str, ...], store: str, lengths: tuple[int, int], rounds: int
) -> None:
    # Both lengths in turn, too: it is their ratio that is asked for.
    cases = {f"{name} {n_queued}": (name, n_queued) for n_queued in lengths for name in names}
    samples = harness.in_turn(
        list(cases), rounds, lambda case: claim(*cases[case], store, report.new_folder())
    )
    for unit, of in (("ms", lambda cost: cost.wall_ms), ("CPU ms", lambda cost: cost.cpu_ms)):
        medians = harness.medians(samples, of)
        few, many = ({name: medians[f"{name} {length}"] for name in names} for length in lengths)
        report.add(Row(f"{store}: claim, {lengths[0]} queued", unit, few))
        report.add(Row(f"{store}: claim, {lengths[1]} queued", unit, many))
        growth = {name: many[name] / few[name] for name in names}
        report.add(Row(f"{store}: the latter over the former, {unit}", "times", growth))


def claim(name: str, n_queued: int, store: str, folder: Path) -> Cost:
    """The median of some claims from a new queue."""
    with new_store(name, store, folder) as (storage, filler):
        study = queue_in_bulk(storage if store == "memory" else filler, n_queued)
        if store in ("psycopg", "psycopg2"):
            analyze(filler)
        study = optuna.load_study(study_name=study.study_name, storage=storage)
        assert study._pop_waiting_trial_id() is not None  # reads the queue
        gc.collect()  # what other samples have left
        costs = []
        for _ in range(_CLAIMS[name]):
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            assert study._pop_waiting_trial_id() is not None
            wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
            costs.append(Cost(wall_s * 1e3, cpu_s * 1e3))
    return Cost(
        statistics.median(cost.wall_ms for cost in costs),
        statistics.median(cost.cpu_ms for cost in costs),
    )


@contextlib.contextmanager
def new_store(name: str, store: str, folder: Path) -> Iterator[tuple[Any, Any]]:
    """Two storages on a new store: the one that is measured, and one of ours that fills it."""
    with contextlib.ExitStack() as stack:
        place = store
        if store in ("psycopg", "psycopg2", "pymysql"):
            place = new_database(store, folder)
        elif store == "redis":
            server = shared_redis()
            redis.Redis.from_url(server.url).flushall()
            place = server.url
        elif store == "grpc":
            port = stack.enter_context(grpc_proxy.server(name, "sqlite", folder))
            filler = harness.open_storage(OURS, "sqlite", folder)
            yield grpc_proxy.connect(name, port), filler
            return
        yield (
            harness.open_storage(name, place, folder),
            harness.open_storage(OURS, place, folder),
        )


def analyze(storage: Any) -> None:
    """What PostgreSQL does by itself within a minute of so many new rows. Until then it takes a
    new table for a small one, and all of a study for the quickest way to what is new in it."""
    with storage.engine.begin() as connection:
        connection.execute(sa.text("ANALYZE"))


def queue_in_bulk(storage: Any, n_queued: int) -> optuna.Study:
    """A study with a queue, as every implementation can read it."""
    study = harness.new_study(storage)
    params = [{"x": float(number)} for number in range(n_queued)]
    if not isinstance(storage, Storage):
        for one in params:
            study.enqueue_trial(one)
        return study
    exchanger = storage._exchanger
    for begin in range(0, n_queued, 500):
        queued = [
            r.CreateTrial(
                study_id=study._study_id,
                datetime_start=None,
                state=int(TrialState.WAITING),
                system_attrs={"fixed_params": one},
                **exchanger.marks(),
            )
            for one in params[begin : begin + 500]
        ]
        exchanger.run(queued, NOTHING)
    return study


if __name__ == "__main__":
    sys.exit(main())
