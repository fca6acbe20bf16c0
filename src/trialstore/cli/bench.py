"""``trialstore bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
import optuna
from optuna.storages import BaseStorage
import typer

from trialstore.cli.output import Exit, Json, Url, command, fail, print_json, print_table, progress
from trialstore.stores.bench import bench as measure
from trialstore.urls import get_storage

Trials = Annotated[int, typer.Option("--trials", min=1, help="At most so many.")]
Seconds = Annotated[float, typer.Option("--seconds", min=0.0, help="For about so long, each.")]
Beside = Annotated[bool, typer.Option("--optuna", help="Also Optuna's own storage, to compare.")]


@command
def bench(
    url: Url,
    trials: Trials = 500,
    seconds: Seconds = 15.0,
    beside: Beside = False,
    as_json: Json = False,
) -> Exit | None:
    """Measure what a trial costs on this store, in a study that is deleted afterwards."""
    contenders: dict[str, Callable[[], BaseStorage]] = {"trialstore": lambda: get_storage(url)}
    if beside:
        contenders["optuna"] = _optunas(url)
    figures = []
    for name, open_storage in contenders.items():
        with progress(f"Measuring {name}", None, quiet=as_json):
            figures.append(measure(name, open_storage, n_trials=trials, seconds_max=seconds))
    if as_json:
        print_json([msgspec.to_builtins(one) for one in figures])
        return None
    columns = ("", "trials", "ms/trial", "CPU ms/trial", "exchanges/trial", "read ms/trial")
    print_table(
        columns,
        (
            (
                one.name,
                str(one.n_trials),
                f"{one.ms_per_trial:.2f}",
                f"{one.cpu_ms_per_trial:.2f}",
                "" if one.exchanges_per_trial is None else f"{one.exchanges_per_trial:.1f}",
                f"{one.read_ms_per_trial:.3f}",
            )
            for one in figures
        ),
    )
    return None


def _optunas(url: str) -> Callable[[], BaseStorage]:
    """What opens Optuna's own storage. Raises ValueError at once where there is none."""
    kind, separator, rest = url.partition("://")
    if not separator or kind == "journal":
        from optuna.storages import journal

        path = rest if separator else url
        return lambda: optuna.storages.JournalStorage(journal.JournalFileBackend(path))
    if kind.partition("+")[0] in ("sqlite", "postgresql", "mysql", "mariadb"):
        return lambda: optuna.storages.get_storage(url)
    fail("Optuna's own storage is measured on journal files, SQLite, PostgreSQL and MySQL.")
