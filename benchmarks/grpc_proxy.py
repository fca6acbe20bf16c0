"""Our client on our server beside Optuna's on Optuna's: calls, time and CPU per trial, opening,
polls with many trials known, many processes.

Both servers stand on stores of the same kind: ``--store`` is journal, sqlite, or the URL of an
empty database, in which each gets a study of its own. Optuna's proxy does not work on a journal,
and is measured on SQLite then.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import gc
import logging
import multiprocessing
from pathlib import Path
import socket
import statistics
import sys
import time
from typing import Any
import warnings

import grpc
import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState
import sqlalchemy as sa

from benchmarks import crowd, harness
from benchmarks.harness import OURS, Cost, Report, Row
import trialstore
from trialstore.grpc import GrpcStorageProxy, run_grpc_proxy_server
from trialstore.testing.faults import CountingProxy

_NAMES = (OURS, "optuna")
_DELAY_S = 0.005
_CALLS = 4
"""Of a trial with RandomSampler."""


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--store", default="sqlite", help="journal, sqlite, or a database's URL")
    parser.add_argument("--trials", type=int, default=50, help="in one sample")
    parser.add_argument("--known", type=int, default=1_000, help="trials in the study to open")
    parser.add_argument("--processes", type=int, action="append", help="default: 4, then 16")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a crowd's sample")
    parser.add_argument(
        "--polls", type=int, nargs=2, default=(1_000, 100_000), help="trials known to polls"
    )
    arguments = parser.parse_args()
    # Before there is a channel: gRPC's threads and a fork do not go together.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    with Report(f"grpc proxy on {arguments.store.partition('://')[0]}", arguments) as report:
        with contextlib.ExitStack() as stack:
            ports, filled = {}, {}
            for name in _NAMES:
                # Optuna's proxy does not work on a journal.
                is_journal = arguments.store == "journal" and name != OURS
                store, folder = "sqlite" if is_journal else arguments.store, report.new_folder()
                ports[name] = stack.enter_context(server(name, store, folder))
                filled[name] = harness.in_child(fill, store, folder, arguments.known)
            stores = {name: f"grpc://localhost:{port}" for name, port in ports.items()}
            for n_processes in arguments.processes or (4, 16):
                least = functools.partial(floor_of_crowd, ports[OURS])
                crowd.compare(report, stores, n_processes, arguments.seconds, 1, least)
            compare_trials(report, ports, arguments.trials, arguments.rounds)
            if "://" in arguments.store:
                appends = {OURS: append_ms(arguments.store, arguments.trials)}
                report.add(Row("two appends of the database alone", "ms", appends))
            compare_opening(report, ports, filled, arguments.known)
        if arguments.polls[0]:
            compare_polls(report, *arguments.polls)
    return 0


# --- servers -------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(name: str, store: str, folder: Path, n_trials: int = 0) -> Iterator[int]:
    """A server in a process of its own; yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(name, store, folder, port, n_trials), daemon=True
    )
    process.start()
    try:
        while True:
            try:
                socket.create_connection(("localhost", port), timeout=5).close()
                break
            except OSError:
                if not process.is_alive():
                    sys.exit(f"The server of {name} ended.")
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.join()


def serve(name: str, store: str, folder: Path, port: int, n_trials: int) -> None:
    """What the server's process does."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("trialstore").setLevel(logging.ERROR)
    storage: Any = harness.open_storage(name, store, folder)
    if n_trials:
        harness.fill_in_bulk(storage, n_trials)
    if name == OURS:
        run_grpc_proxy_server(storage, port=port)
    else:
        optuna.storages.run_grpc_proxy_server(storage, port=port)


def connect(name: str, port: int) -> BaseStorage:
    return harness.open_storage(name, f"grpc://localhost:{port}", Path())


# --- a trial -------------------------------------------------------------------------------------


class _CallCounter(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    def __init__(self) -> None:
        self.n_calls = 0

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        self.n_calls += 1
        return continuation(details, request)


def compare_trials(report: Report, ports: dict[str, int], n_trials: int, rounds: int) -> None:
    samplers = {
        "a trial": lambda: optuna.samplers.RandomSampler(seed=1),
        "a trial of TPE": lambda: optuna.samplers.TPESampler(seed=1, n_startup_trials=2),
    }
    for what, sampler in samplers.items():
        calls = {}
        for name in _NAMES:
            counter = _CallCounter()
            study = warm_study(name, ports[name], sampler())
            with counted(study._storage, name, counter):
                study.optimize(harness.objective, n_trials=20)
            calls[name] = counter.n_calls / 20
        report.add(Row(what, "calls", calls))
    studies = {name: warm_study(name, ports[name]) for name in _NAMES}
    costs: dict[str, list[Cost]] = harness.in_turn(
        _NAMES, rounds, lambda name: harness.optimize(studies[name], n_trials)
    )
    report.add(Row("a trial", "ms", harness.medians(costs, lambda cost: cost.wall_ms)))
    report.add(Row("a trial", "client CPU ms", harness.medians(costs, lambda cost: cost.cpu_ms)))
    floors = [floor(ports[OURS], n_trials) for _ in range(rounds)]
    for unit, of in (("ms", "wall_ms"), ("client CPU ms", "cpu_ms")):
        least = statistics.median(getattr(cost, of) for cost in floors)
        report.add(Row("the floor of a trial", unit, {OURS: least}))
    delayed = {}
    for name in _NAMES:
        with CountingProxy("localhost", ports[name]) as proxy:
            study = warm_study(name, proxy.port)
            proxy.delay_s = _DELAY_S
            delayed[name] = harness.optimize(study, 5).wall_ms
    report.add(Row("a trial, 5 ms each way", "ms", delayed))
    with CountingProxy("localhost", ports[OURS], delay_s=_DELAY_S) as proxy:
        least = floor(proxy.port, 5).wall_ms
    report.add(Row("the floor of a trial, 5 ms each way", "ms", {OURS: least}))


def floor_of_crowd(port: int, folder: Path, n_processes: int, seconds: float) -> crowd.Crowd:
    return crowd.gather(n_processes, seconds, work_least, port)


def work_least(sender: Any, start: Any, port: int, seconds: float) -> None:
    """As ``floor``, of many clients at once."""
    study = harness.new_study(optuna.storages.InMemoryStorage())
    count = 0
    with grpc.insecure_channel(f"localhost:{port}") as channel:
        call = channel.unary_unary("/grpc.health.v1.Health/Check")
        call(b"")
        start.wait()
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < seconds:
            study.optimize(harness.objective, n_trials=1)
            for _ in range(_CALLS):
                call(b"")
            count += 1
        sender.send((count, time.perf_counter() - began_s, [], ""))


def append_ms(url: str, n_trials: int) -> float:
    """What two rows, each in a transaction of its own, take a database."""
    engine = sa.create_engine(url)
    rows = sa.Table("bench_floor", sa.MetaData(), sa.Column("value", sa.Integer))
    rows.create(engine)
    with engine.connect() as connection:
        began_s = time.perf_counter()
        for _ in range(2 * n_trials):
            connection.execute(rows.insert(), {"value": 1})
            connection.commit()
        took_s = time.perf_counter() - began_s
    rows.drop(engine)
    engine.dispose()
    return took_s / n_trials * 1e3


def floor(port: int, n_trials: int) -> Cost:
    """What no client can go below: the calls of a trial, saying nothing, beside a trial of
    Optuna's that is kept in its own memory."""
    study = harness.new_study(optuna.storages.InMemoryStorage())
    study.optimize(harness.objective, n_trials=3)
    alone = harness.optimize(study, n_trials)
    with grpc.insecure_channel(f"localhost:{port}") as channel:
        call = channel.unary_unary("/grpc.health.v1.Health/Check")
        call(b"")
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        for _ in range(n_trials * _CALLS):
            call(b"")
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    each_ms = 1e3 / n_trials
    return Cost(alone.wall_ms + wall_s * each_ms, alone.cpu_ms + cpu_s * each_ms)


@contextlib.contextmanager
def counted(storage: Any, name: str, counter: _CallCounter) -> Iterator[None]:
    """Count the calls of a client, which each of the two makes in its own way."""
    if name == OURS:
        log = storage._exchanger.log
        call = log._unary

        def unary(*arguments: Any) -> Any:
            counter.n_calls += 1
            return call(*arguments)

        log._unary = log._stream = unary
        yield
        del log._unary, log._stream
        return
    from optuna.storages._grpc.auto_generated import api_pb2_grpc

    stub = storage._stub
    channel = grpc.intercept_channel(storage._channel, counter)
    storage._stub = storage._cache.grpc_client = api_pb2_grpc.StorageServiceStub(channel)
    yield
    storage._stub = storage._cache.grpc_client = stub


def warm_study(
    name: str, port: int, sampler: optuna.samplers.BaseSampler | None = None
) -> optuna.Study:
    study = harness.new_study(connect(name, port))
    study.sampler = sampler or study.sampler
    study.optimize(harness.objective, n_trials=3)
    return study


# --- opening and polling -------------------------------------------------------------------------


def compare_opening(
    report: Report, ports: dict[str, int], names: dict[str, str], n_trials: int
) -> None:
    def open_ms(name: str) -> float:
        gc.collect()
        began_s = time.perf_counter()
        storage = connect(name, ports[name])
        study_id = storage.get_study_id_from_name(names[name])
        assert len(storage.get_all_trials(study_id, deepcopy=False)) == n_trials
        return (time.perf_counter() - began_s) * 1e3

    first = {name: open_ms(name) for name in _NAMES}
    report.add(Row(f"opening {n_trials:,} trials, the first client", "ms", first))
    samples = harness.in_turn(_NAMES, 3, open_ms)
    report.add(
        Row(f"opening {n_trials:,} trials, each later one", "ms", harness.medians(samples, float))
    )


def fill(store: str, folder: Path, n_trials: int) -> str:
    """Past the servers, since a call for each trial would take minutes."""
    storage: Any = harness.open_storage(OURS, store, folder)
    return harness.fill_in_bulk(storage, n_trials)


def compare_polls(report: Report, few: int, many: int) -> None:
    """A look for WAITING trials and one for all, by how many trials are known."""
    for store in ("journal", "sqlite"):
        took_us = {}
        for n_trials in (few, many):
            with server(OURS, store, report.new_folder(), n_trials) as port:
                storage = GrpcStorageProxy(port=port)
                study_id = storage.get_all_studies()[0]._study_id
                assert storage.get_n_trials(study_id) == n_trials
                took_us[n_trials] = statistics.median(
                    poll_us(storage, study_id) for _ in range(300)
                )
        for n_trials, took in took_us.items():
            report.add(Row(f"a poll, {store}, {n_trials:,} known", "us", {OURS: took}))


def poll_us(storage: trialstore.storage.Storage, study_id: int) -> float:
    began_s = time.perf_counter()
    storage.get_n_trials(study_id)
    storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.WAITING,))
    return (time.perf_counter() - began_s) / 2 * 1e6


if __name__ == "__main__":
    sys.exit(main())
