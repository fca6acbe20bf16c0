"""``copy``: whatever the two stores are, the target says the same as the source."""

from __future__ import annotations

import contextlib
from datetime import datetime, timedelta
import itertools
from pathlib import Path
import signal
import sqlite3
import subprocess
import sys
import time
from typing import Any
from zoneinfo import ZoneInfo

import optuna
import pytest

import stores
from stores import KINDS, Cli, new_url
import trialstore
from trialstore import records as r
from trialstore.stores.transfer import copy
from trialstore.testing.contents import storage_contents


def _contents(url_or_storage: Any) -> Any:
    """What plain Optuna is told, apart from ids."""
    storage = url_or_storage
    if isinstance(storage, str):
        storage = trialstore.get_storage(storage)
    return storage_contents(storage, ids=False, exact=False)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database that plain Optuna has written, with whole seconds, which MariaDB can hold."""
    path = tmp_path_factory.mktemp("origin") / "plain.db"
    url = f"sqlite:///{path}"
    stores.fill(optuna.storages.RDBStorage(url))
    connection = sqlite3.connect(path)
    for name in ("datetime_start", "datetime_complete"):
        connection.execute(f"UPDATE trials SET {name} = substr({name}, 1, 19) || '.000000'")
    connection.commit()
    connection.close()
    return url


@pytest.mark.servers
def test_once_around_and_back(origin: str, tmp_path: Path, cli: Cli) -> None:
    before = _contents(optuna.storages.RDBStorage(origin))
    urls = [
        origin,
        *(new_url(kind, tmp_path) for kind in ("psycopg", "journal", "redis", "mariadb", "grpc")),
        f"sqlite:///{tmp_path}/back.db",
    ]
    for source, target in itertools.pairwise(urls):
        copied = cli.json("copy", source, target, "--verify")
        assert [one["differences"] for one in copied] == [[], [], []], target
        assert sum(one["n_new"] for one in copied) == sum(one["n_trials"] for one in copied) > 0
    assert _contents(optuna.storages.RDBStorage(urls[-1])) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_copy_has_nothing_to_do(kind: str, origin: str, tmp_path: Path, cli: Cli) -> None:
    target = new_url(kind, tmp_path)
    cli.json("copy", origin, target)
    again = cli.json("copy", origin, target, "--verify")
    assert [one["n_new"] for one in again] == [0, 0, 0]
    assert _contents(target) == _contents(origin)
    # Who goes on with the copy sees ids, numbers and the queue as it should.
    study = optuna.load_study(study_name="colours", storage=trialstore.get_storage(target))
    study.optimize(lambda trial: trial.suggest_float("x", -1, 1), n_trials=2)
    numbers = [trial.number for trial in study.trials]
    assert numbers == list(range(len(numbers)))
    assert cli("check", target).code == 0


def test_one_study_of_several(origin: str, tmp_path: Path, cli: Cli) -> None:
    target = str(tmp_path / "one.journal")
    cli.json("copy", origin, target, "--study", "colours, several")
    assert list(_contents(target)) == ["colours, several"]
    assert cli("copy", origin, target, "--study", "nobody").code == 2
    # A copy of all of them goes on from there.
    assert [one["n_new"] for one in cli.json("copy", origin, target)][1] == 0
    assert _contents(target) == _contents(origin)


def test_another_study_of_that_name_is_left_alone(origin: str, tmp_path: Path, cli: Cli) -> None:
    target = str(tmp_path / "other.journal")
    storage = trialstore.get_storage(target)
    study = optuna.create_study(study_name="colours", storage=storage)
    study.optimize(lambda trial: 1.0, n_trials=1)
    before = _contents(storage)["colours"]["trials"]
    result = cli("copy", origin, target)
    assert result.code == 2
    assert "another study" in result.err
    assert _contents(storage)["colours"]["trials"] == before


def test_an_altered_copy_does_not_pass(origin: str, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "altered.db"
    url = f"sqlite:///{path}"
    cli.json("copy", origin, url)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE study_user_attributes SET value_json = '\"x\"' WHERE key = 'who'")
    connection.execute("UPDATE trial_params SET param_value = 0.5 WHERE param_id = 2")
    connection.commit()
    connection.close()
    result = cli("copy", origin, url)
    assert result.code == 2
    assert "trial 0 differs in params" in result.err


def test_in_memory_both_ways(origin: str) -> None:
    memory, back = trialstore.InMemoryStorage(), trialstore.InMemoryStorage()
    copy(trialstore.get_storage(origin), memory, verify=True)
    copied = copy(memory, back, verify=True)
    assert [one.differences for one in copied] == [[], [], []]
    assert _contents(back) == _contents(origin)


def test_local_times_of_optuna_4_are_converted(tmp_path: Path, cli: Cli) -> None:
    """The tables say 12:00 and mean 12:00 in Tokyo."""
    if not r.STORES_UTC:
        pytest.skip("Optuna 4 has no other times")
    source = f"sqlite:///{tmp_path}/old.db"
    study = optuna.create_study(study_name="old", storage=trialstore.get_storage(source))
    study.optimize(lambda trial: 1.0, n_trials=1)
    connection = sqlite3.connect(tmp_path / "old.db")
    connection.execute("UPDATE trials SET datetime_start = '2024-01-01 12:00:00.000000'")
    connection.commit()
    connection.close()
    target = str(tmp_path / "new.journal")
    cli.json("copy", source, target, "--source-timezone", "Asia/Tokyo", "--verify")
    study = optuna.load_study(study_name="old", storage=trialstore.get_storage(target))
    start = study.trials[0].datetime_start
    assert start is not None
    moment = datetime(2024, 1, 1, 12, tzinfo=ZoneInfo("Asia/Tokyo"))
    assert start == moment.astimezone().replace(tzinfo=None)
    assert start.astimezone() - moment == timedelta(0)
    assert cli("copy", source, target, "--source-timezone", "Mars/Base").code == 2


def test_a_value_that_the_target_cannot_hold_is_named(tmp_path: Path, cli: Cli) -> None:
    source, target = str(tmp_path / "s.journal"), f"sqlite:///{tmp_path}/t.db"
    study = optuna.create_study(study_name="long", storage=trialstore.get_storage(source))
    study.optimize(lambda trial: 1.0, n_trials=2)
    study.ask().set_user_attr("k" * 600, 1)
    study._storage.flush()
    result = cli("copy", source, target)
    assert result.code == 2
    assert "Trial number 2" in result.err
    assert "600 letters" in result.err


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_killed_five_times_and_started_again(kind: str, tmp_path: Path, cli: Cli) -> None:
    source = str(tmp_path / "source.journal")
    storage: Any = trialstore.get_storage(source)
    study = optuna.create_study(study_name="long", storage=storage)
    log = storage.log
    log.exchange(
        [
            r.CreateTrial(
                study_id=study._study_id,
                datetime_start=r.now_text(),
                state=r.COMPLETE,
                value=float(number),
                datetime_complete=r.now_text(),
                user_attrs={"n": number},
                worker_id="w",
                seq=number,
            )
            for number in range(6_000)
        ],
        None,
        trialstore.log.NOTHING,
    )
    target = new_url(kind, tmp_path)
    command = [sys.executable, "-m", "trialstore", "copy", source, target]
    reached = 0
    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        # Killed in the middle of a batch: as soon as it has written something.
        deadline_s = time.monotonic() + 60
        while process.poll() is None and _bytes(target) <= reached:
            assert time.monotonic() < deadline_s
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached = _bytes(target) + 1
    cli.json("copy", source, target, "--verify")
    assert _contents(target) == _contents(source)
    assert not [
        finding
        for finding in cli("check", target, "--json").json["findings"]
        if finding["severity"] != "note"
    ]


def _bytes(url: str) -> int:
    """Of the store with what belongs to it."""
    path = Path(url.partition("//")[2].removeprefix("/") if "sqlite" in url else url[10:])
    path = path if path.is_absolute() else Path("/") / path
    total = 0
    for one in path.parent.glob(path.name + "*"):
        with contextlib.suppress(FileNotFoundError):  # SQLite comes and goes with its own
            total += one.stat().st_size
    return total
