"""What the benchmarks share: who is compared, on which stores, in which order, and the table.

Samples are taken in turn, A B C A B C ..., so that a busy neighbour slows all of them; medians are
compared. The workload is 5 float parameters and one user attribute, with RandomSampler.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
import gc
import itertools
import json
import logging
import multiprocessing
import os
from pathlib import Path
import statistics
import sys
import tempfile
import time
from typing import Any, Final, TypeVar
import uuid

import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

import trialstore
from trialstore import records as r, snapshot
from trialstore.log import NOTHING

OURS: Final = "trialstore"
IMPLEMENTATIONS: Final = (OURS, "optuna", "rustuna")
_LOGGERS: Final = ("optuna", "trialstore")
N_PARAMS: Final = 5
RANGE: Final = FloatDistribution(-10.0, 10.0)

_T = TypeVar("_T")


# --- storages ------------------------------------------------------------------------------------


def has(implementation: str, store: str) -> bool:
    """Whether an implementation has a storage for ``memory``, ``journal``, ``sqlite`` or a URL."""
    if implementation == "rustuna":
        return "://" not in store and _rustuna() is not None
    return True


def contenders(store: str) -> list[str]:
    return [implementation for implementation in IMPLEMENTATIONS if has(implementation, store)]


def _rustuna() -> Any:
    try:
        import rustuna
        import rustuna.converter
    except ImportError:
        return None
    return rustuna


def open_storage(implementation: str, store: str, folder: Path) -> BaseStorage:
    """A storage over files in ``folder``, or over the server at a URL."""
    return {OURS: _open_ours, "optuna": _open_optuna, "rustuna": _open_rustuna}[implementation](
        store, folder
    )


def _open_ours(store: str, folder: Path) -> BaseStorage:
    if store == "memory":
        return trialstore.InMemoryStorage()
    if store == "journal":
        backend = trialstore.journal.JournalFileBackend(str(folder / "journal"))
        return trialstore.JournalStorage(backend)
    return trialstore.get_storage(_sqlite(folder) if store == "sqlite" else store)


def _open_optuna(store: str, folder: Path) -> BaseStorage:
    from optuna.storages import journal

    if store == "memory":
        return optuna.storages.InMemoryStorage()
    if store == "journal":
        return optuna.storages.JournalStorage(journal.JournalFileBackend(str(folder / "journal")))
    if store.startswith("redis"):
        return optuna.storages.JournalStorage(journal.JournalRedisBackend(store))
    if store.startswith("grpc://"):
        host, _, port = store.removeprefix("grpc://").partition(":")
        return optuna.storages.GrpcStorageProxy(host=host, port=int(port or 13000))
    # Optuna wraps its own relational storage in a cache; without it, it would be slower still.
    return optuna.storages.get_storage(_sqlite(folder) if store == "sqlite" else store)


def _open_rustuna(store: str, folder: Path) -> BaseStorage:
    rustuna = _rustuna()
    inner = {
        "memory": lambda: rustuna.storages.InMemoryStorage(),
        "journal": lambda: rustuna.storages.JournalFileStorage(str(folder / "journal")),
        "sqlite": lambda: rustuna.storages.SQLite3Storage(str(folder / "sqlite.db")),
    }[store]()
    return rustuna.converter.ToOptunaStorage(inner)


def _sqlite(folder: Path) -> str:
    return f"sqlite:///{folder / 'sqlite.db'}"


# --- the workload --------------------------------------------------------------------------------


def objective(trial: optuna.Trial) -> float:
    total = sum(trial.suggest_float(f"x{index}", RANGE.low, RANGE.high) for index in range(5))
    trial.set_user_attr("total", total)
    return total


def new_study(storage: BaseStorage) -> optuna.Study:
    return optuna.create_study(
        storage=storage,
        study_name=f"bench-{uuid.uuid4()}",
        sampler=optuna.samplers.RandomSampler(seed=1),
    )


@dataclass
class Cost:
    """Of one trial: milliseconds of wall time, and of this process's CPU, its threads included."""

    wall_ms: float
    cpu_ms: float


def optimize(study: optuna.Study, n_trials: int) -> Cost:
    gc.collect()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    study.optimize(objective, n_trials=n_trials)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return Cost(wall_s / n_trials * 1e3, cpu_s / n_trials * 1e3)


def fill(storage: BaseStorage, study_id: int, n_trials: int) -> None:
    """Add finished trials of the workload in any storage, a call each."""
    template = optuna.trial.create_trial(
        params={f"x{index}": float(index) for index in range(N_PARAMS)},
        distributions={f"x{index}": RANGE for index in range(N_PARAMS)},
        user_attrs={"total": 10.0},
        value=10.0,
    )
    for _ in range(n_trials):
        storage.create_new_trial(study_id, template)


def fill_in_bulk(
    storage: trialstore.JournalStorage | trialstore.RDBStorage,
    n_trials: int,
    *,
    n_steps: int = 0,
    n_attrs: int = 1,
    batch: int = 500,
) -> str:
    """Write a study as its workers would have, many trials in one exchange; returns its name.

    Every implementation can read what this leaves on the disk.
    """
    name = f"bench-{uuid.uuid4()}"
    storage.create_new_study([StudyDirection.MINIMIZE], name)
    study_id = storage.get_study_id_from_name(name)
    exchanger = storage._exchanger
    text = optuna.distributions.distribution_to_json(RANGE)
    numbers = iter(range(n_trials))
    while chunk := list(itertools.islice(numbers, batch)):
        now = r.format_time(datetime.now())
        created = exchanger.run(
            [
                r.CreateTrial(study_id=study_id, datetime_start=now, **exchanger.marks())
                for _ in chunk
            ],
            NOTHING,
        )
        rows: list[r.AnyOperation] = []
        for number, outcome in zip(chunk, created, strict=True):
            for body in _life(outcome.id, number, text, now, n_steps, n_attrs):
                rows.append(body(exchanger.marks()))
        exchanger.run(rows, NOTHING)
    return name


def save_snapshot(storage: trialstore.JournalStorage) -> None:
    """Leave a snapshot of all that is in a journal beside it."""
    exchanger = storage._exchanger
    if exchanger._saver is not None:
        exchanger._saver.join()
    image = snapshot.dump(exchanger.replica, exchanger._cursor, 0)
    assert exchanger.log.save_snapshot(lambda: (image, exchanger._cursor))


def _life(
    trial_id: int, number: int, text: str, now: str, n_steps: int, n_attrs: int
) -> Iterable[Callable[[dict[str, Any]], r.AnyOperation]]:
    """What becomes of a trial after its creation, record by record."""
    for index in range(N_PARAMS):
        value = ((number * 7919 + index * 104729) % 20000) / 1000 - 10
        yield lambda marks, index=index, value=value: r.SetTrialParam(
            trial_id=trial_id,
            param_name=f"x{index}",
            param_value_internal=value,
            distribution=text,
            **marks,
        )
    for step in range(n_steps):
        yield lambda marks, step=step: r.SetTrialIntermediateValue(
            trial_id=trial_id, step=step, intermediate_value=number / (step + 1), **marks
        )
    for index in range(n_attrs):
        yield lambda marks, index=index: r.SetTrialUserAttr(
            trial_id=trial_id, user_attr={f"attr{index}": number + 0.5}, **marks
        )
    yield lambda marks: r.SetTrialStateValues(
        trial_id=trial_id,
        state=int(TrialState.COMPLETE),
        values=[float(number)],
        datetime_complete=now,
        **marks,
    )


# --- samples -------------------------------------------------------------------------------------


def in_turn(names: Sequence[str], rounds: int, sample: Callable[[str], _T]) -> dict[str, list[_T]]:
    """``rounds`` samples of each, taken A B C A B C ..."""
    samples: dict[str, list[_T]] = {name: [] for name in names}
    for number in range(rounds):
        # Turned round every other time: no one always follows the slowest.
        for name in names if number % 2 == 0 else reversed(names):
            samples[name].append(sample(name))
    return samples


def medians(samples: dict[str, list[_T]], of: Callable[[_T], float]) -> dict[str, float]:
    return {name: statistics.median(map(of, taken)) for name, taken in samples.items()}


def in_child(function: Callable[..., _T], *args: Any) -> _T:
    """Call a function in a process of its own, that has imported everything and measured nothing.

    Raises:
        RuntimeError: The child ended without an answer.
    """
    receiver, sender = context().Pipe(duplex=False)
    child = context().Process(target=_answer, args=(sender, function, args))
    child.start()
    sender.close()
    try:
        answer: _T = receiver.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"The child for {function.__name__}{args} failed.") from None
    child.join()
    return answer


def _answer(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    sender.send(function(*args))
    sender.close()


def context() -> Any:
    """Forked where that exists: 16 imports of Optuna would take longer than what is measured."""
    kind = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    return multiprocessing.get_context(kind)


# --- the table -----------------------------------------------------------------------------------


@dataclass
class Row:
    """One quantity, by implementation.

    Args:
        more_is_better: True for throughput.
    """

    what: str
    unit: str
    values: dict[str, float]
    more_is_better: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    def factor(self, other: str) -> float | None:
        """How many times better ours is than another's."""
        ours, theirs = self.values.get(OURS), self.values.get(other)
        if not ours or not theirs:
            return None
        return ours / theirs if self.more_is_better else theirs / ours


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    made.add_argument("--rounds", type=int, default=5, help="samples of each")
    made.add_argument("--folder", type=Path, help="where files go: a disk that is worth measuring")
    return made


class Report:
    """Collects rows; prints them as they come, or all as JSON at the end. Inside, nothing below
    an error is logged."""

    def __init__(self, title: str, arguments: argparse.Namespace) -> None:
        self._as_json = arguments.json
        self._title = title
        self._rows: list[Row] = []
        if arguments.folder is not None:
            arguments.folder.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(
            prefix="trialstore-bench-", dir=arguments.folder
        )
        self.folder = Path(self._scratch.name)
        self._n_folders = itertools.count()
        self._machine = {
            "python": sys.version.split()[0],
            "optuna": optuna.__version__,
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "sync_ms": round(_sync_ms(self.folder), 3),
        }
        if not self._as_json:
            print(f"\n{title}   {self._machine}")
            print(f"{'':44}" + "".join(f"{name:>12}" for name in IMPLEMENTATIONS), end="")
            print(f"{'x optuna':>12}{'x rustuna':>12}")

    def __enter__(self) -> Report:
        self._levels = [(logger, logger.level) for logger in map(logging.getLogger, _LOGGERS)]
        for logger, _ in self._levels:
            logger.setLevel(logging.ERROR)
        return self

    def __exit__(self, *error: object) -> None:
        for logger, level in self._levels:
            logger.setLevel(level)
        self._scratch.cleanup()
        if self._as_json and error[0] is None:
            rows = [
                {
                    "what": row.what,
                    "unit": row.unit,
                    **row.values,
                    "times_better_than": {
                        name: row.factor(name)
                        for name in IMPLEMENTATIONS[1:]
                        if row.factor(name) is not None
                    },
                    **row.notes,
                }
                for row in self._rows
            ]
            print(json.dumps({"benchmark": self._title, **self._machine, "rows": rows}))

    def new_folder(self) -> Path:
        folder = self.folder / str(next(self._n_folders))
        folder.mkdir()
        return folder

    def add(self, row: Row) -> None:
        self._rows.append(row)
        if self._as_json:
            return
        print(f"{row.what + ', ' + row.unit:44}", end="")
        for name in IMPLEMENTATIONS:
            value = row.values.get(name)
            print(f"{'-' if value is None else format(value, '.4g'):>12}", end="")
        for name in IMPLEMENTATIONS[1:]:
            factor = row.factor(name)
            print(f"{'-' if factor is None else format(factor, '.2f'):>12}", end="")
        print("   " + str(row.notes) if row.notes else "", flush=True)


def _sync_ms(folder: Path) -> float:
    """What one sync of a small append costs here; on a RAM disk all wall times are flattered."""
    taken = []
    with (folder / "sync-probe").open("wb", buffering=0) as probe:
        for _ in range(20):
            probe.write(b"x" * 200)
            began_s = time.perf_counter()
            os.fsync(probe.fileno())
            taken.append((time.perf_counter() - began_s) * 1e3)
    return statistics.median(taken)
