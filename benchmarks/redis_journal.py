"""The Redis journal beside Optuna's: round trips, time and CPU per trial, opening, many processes.

Starts a private redis-server (append-only file, synced before each answer) unless ``--url`` names
one; its database should be empty. The *floor* is Optuna's own trial in memory beside four plain
commands on a bare connection, two of which append a trial's records, which the server syncs, and
two fetch what the others appended, which is decoded once. No implementation in Python can exceed
its factor here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import functools
import gc
import itertools
from pathlib import Path
import shutil
import socket
import subprocess
import sys
import time
from typing import Any
from urllib.parse import urlsplit
import warnings

import optuna
from optuna.storages import BaseStorage

from benchmarks import crowd, harness
from benchmarks.harness import OURS, Cost, Report, Row
import trialstore
from trialstore import snapshot
from trialstore.logs.redis import RedisLog
from trialstore.logs.redis.address import pool_of
from trialstore.logs.redis.doors import Server
from trialstore.records import decode_lines
from trialstore.testing.faults import CountingProxy

_NAMES = (OURS, "optuna")
_DELAY_S = 0.005
_prefixes = (f"bench{number}" for number in itertools.count())
_databases = itertools.count(1)


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--url", help="redis://host:port")
    parser.add_argument("--trials", type=int, default=100, help="in one sample")
    parser.add_argument("--known", type=int, default=1_000, help="trials in the journal to open")
    parser.add_argument("--processes", type=int, action="append", help="default: 4, then 16")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a crowd's sample")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    with Report("redis journal", arguments) as report, contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(private_server(report.new_folder()))
        compare_trials(report, url, arguments.trials, arguments.rounds)
        compare_opening(report, url, arguments.known, arguments.rounds)
        for n_processes in arguments.processes or (4, 16):
            # A journal of its own for each crowd; numbers of databases, since URLs have no prefix.
            stores = {name: f"{url}/{next(_databases)}" for name in _NAMES}
            floor = functools.partial(run_floor, f"{url}/{next(_databases)}")
            crowd.compare(report, stores, n_processes, arguments.seconds, 1, floor)
    return 0


@contextlib.contextmanager
def private_server(folder: Path) -> Iterator[str]:
    binary = shutil.which("redis-server")
    if binary is None:
        sys.exit("redis-server is not installed; name a server with --url.")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "",
         "--appendonly", "yes", "--appendfsync", "always", "--logfile", "log"],
    )  # fmt: skip
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                if server.poll() is not None:
                    sys.exit((folder / "log").read_text())
                time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def open_storage(name: str, url: str, prefix: str) -> BaseStorage:
    if name == OURS:
        return trialstore.JournalStorage(RedisLog(url, prefix=prefix))
    backend = optuna.storages.journal.JournalRedisBackend(url, prefix=prefix)
    return optuna.storages.JournalStorage(backend)


# --- a trial -------------------------------------------------------------------------------------


def compare_trials(report: Report, url: str, n_trials: int, rounds: int) -> None:
    parts = urlsplit(url)
    with CountingProxy(parts.hostname or "localhost", parts.port or 6379) as proxy:
        proxied = f"redis://127.0.0.1:{proxy.port}"

        def trips(name: str) -> float:
            study = warm_study(name, proxied)
            proxy.reset()
            study.optimize(harness.objective, n_trials=20)
            return proxy.n_round_trips / 20

        def delayed_ms(name: str) -> float:
            study = warm_study(name, proxied)
            proxy.delay_s = _DELAY_S
            try:
                return harness.optimize(study, 5).wall_ms
            finally:
                proxy.delay_s = 0.0

        add(report, "a trial", "round trips", harness.in_turn(_NAMES, 1, trips))
        add(report, "a trial, 5 ms each way", "ms", harness.in_turn(_NAMES, 1, delayed_ms))
    studies = {name: warm_study(name, url) for name in _NAMES}
    costs: dict[str, list[Cost]] = harness.in_turn(
        _NAMES, rounds, lambda name: harness.optimize(studies[name], n_trials)
    )
    wall_ms = harness.medians(costs, lambda cost: cost.wall_ms)
    cpu_ms = harness.medians(costs, lambda cost: cost.cpu_ms)
    report.add(Row("a trial", "ms", wall_ms))
    report.add(Row("a trial", "client CPU ms", cpu_ms))
    floor = run_floor(f"{url}/{next(_databases)}", report.new_folder(), 1, 1.0)
    report.add(Row("a trial, the floor", "ms", {**wall_ms, OURS: 1e3 / floor.trials_per_s}))


def run_floor(url: str, folder: Path, n_processes: int, seconds: float) -> crowd.Crowd:
    harness.in_child(crowd.create_study, OURS, "journal", folder)
    # Of a study and one trial; the rest is what the trial put off and its end.
    _, created, *rest = (folder / "journal").read_bytes().splitlines(keepends=True)
    return crowd.gather(n_processes, seconds, work_least, url, created, b"".join(rest))


def work_least(
    sender: Any, start: Any, url: str, created: bytes, rest: bytes, seconds: float
) -> None:
    """Optuna's trial in memory, and the records of a journal's first trial, one value a batch."""
    optuna.logging.disable_default_handler()
    study = harness.new_study(optuna.storages.InMemoryStorage())
    door = Server(pool_of(url))
    count = read = 0
    start.wait()
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        for data in (created, rest):
            news = door.command("LRANGE", "floor", read, -1)
            decode_lines(b"".join(news))
            read += len(news)
            if data is rest:
                study.optimize(harness.objective, n_trials=1)
            door.command("RPUSH", "floor", data)
        count += 1
    sender.send((count, time.perf_counter() - began_s, [], ""))


def warm_study(name: str, url: str) -> optuna.Study:
    study = harness.new_study(open_storage(name, url, next(_prefixes)))
    study.optimize(harness.objective, n_trials=2)
    return study


def add(report: Report, what: str, unit: str, samples: dict[str, list[float]]) -> None:
    report.add(Row(what, unit, harness.medians(samples, float)))


# --- opening -------------------------------------------------------------------------------------


def compare_opening(report: Report, url: str, n_trials: int, rounds: int) -> None:
    prefix = next(_prefixes)
    ours = trialstore.JournalStorage(RedisLog(url, prefix=prefix))
    study_name = harness.fill_in_bulk(ours, n_trials, n_steps=10, n_attrs=2)
    drop_snapshot(ours)

    def open_us(name: str) -> float:
        gc.collect()
        began_s = time.process_time()
        read(open_storage(name, url, prefix), study_name, n_trials)
        return (time.process_time() - began_s) / n_trials * 1e6

    parts = urlsplit(url)
    with CountingProxy(parts.hostname or "localhost", parts.port or 6379) as proxy:
        log = RedisLog(f"redis://127.0.0.1:{proxy.port}", prefix=prefix)
        n_records = snapshot.catch_up(log, snapshot.restore_base(log)[0]).n_records
        trips = {OURS: float(proxy.n_round_trips), "optuna": float(n_records)}
    report.add(Row(f"opening {n_records:,} records", "round trips", trips))
    replayed = harness.in_turn(_NAMES, rounds, in_child(open_us))
    add(report, "opening, replayed", "CPU us per trial", replayed)
    save(url, prefix, study_name, n_trials)
    restored = harness.in_turn(_NAMES, rounds, in_child(open_us))
    add(report, "opening from its own snapshot", "CPU us per trial", restored)


def drop_snapshot(storage: trialstore.JournalStorage) -> None:
    """Filling it may have been worth one; a replay is measured first."""
    saver = storage._exchanger._saver
    if saver is not None:
        saver.join()
    log: Any = storage._exchanger.log
    log._connection.ask(lambda door: door.command("DEL", log._keys.snapshot))


def in_child(sample: Callable[[str], float]) -> Callable[[str], float]:
    return functools.partial(harness.in_child, sample)


def read(storage: BaseStorage, study_name: str, n_trials: int) -> None:
    study_id = storage.get_study_id_from_name(study_name)
    assert len(storage.get_all_trials(study_id, deepcopy=False)) == n_trials


def save(url: str, prefix: str, study_name: str, n_trials: int) -> None:
    """Both snapshots: ours, and the pickle that Optuna keeps under a key of its own."""
    log = RedisLog(url, prefix=prefix)
    restored = snapshot.catch_up(log, snapshot.restore(log, None))
    log.save_snapshot(lambda: (snapshot.dump(*restored), restored.cursor))
    theirs: Any = open_storage("optuna", url, prefix)
    read(theirs, study_name, n_trials)
    import pickle

    theirs._backend.save_snapshot(pickle.dumps(theirs._replay_result))


if __name__ == "__main__":
    sys.exit(main())
