"""``copy``: whatever the two stores are, the target says the same as the source."""

from __future__ import annotations

from datetime import datetime, timedelta
import itertools
from pathlib import Path
import signal
import sqlite3
import subprocess
import sys
from typing import Any
from zoneinfo import ZoneInfo

import optuna
from optuna.distributions import FloatDistribution, distribution_to_json
import pytest

from damages import damage_tables
import stores
from stores import KINDS, Cli, new_url
import trialstore
from trialstore import records as r
from trialstore.stores import transfer
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


@pytest.mark.parametrize("name", ["COMPLETE without values", "too many values"])
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_what_cannot_be_read_is_copied_as_it_is_shown(
    name: str, kind: str, filled: Path, tmp_path: Path, cli: Cli
) -> None:
    damaged = damage_tables(name, filled / "a.db", tmp_path / "damaged.db")
    target = new_url(kind, tmp_path)
    for _ in range(2):  # the second one goes on with the first
        copied = cli.json("copy", damaged, target, "--verify")
        assert [one["differences"] for one in copied] == [[], [], []]
    assert _contents(target) == _contents(damaged)
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
    study.ask().report(1.0, 2**63)
    study._storage.flush()
    result = cli("copy", source, target)
    assert result.code == 2
    assert "Trial number 2" in result.err
    assert "the step 9223372036854775808" in result.err


@pytest.mark.servers
@pytest.mark.parametrize("options", [{}, {"isolation_level": "AUTOCOMMIT"}])
def test_a_trial_whose_keys_the_target_holds_equal_is_named(
    options: dict[str, Any], tmp_path: Path
) -> None:
    source = optuna.create_study(storage=trialstore.InMemoryStorage())
    for keys in ([], ["LR"], ["LR", "lr"], []):
        source.add_trial(optuna.create_trial(value=0.0, user_attrs=dict.fromkeys(keys, 1)))
    target = trialstore.RDBStorage(new_url("mariadb", tmp_path), engine_kwargs=options)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Trial number 2: .* 'LR', 'lr'"):
            copy(source._storage, target)
        (study,) = target.get_all_studies()
        assert target.get_n_trials(study._study_id) == 0


@pytest.mark.servers
@pytest.mark.parametrize("mode", ["", "TIME_ROUND_FRACTIONAL"], ids=["MariaDB", "MySQL"])
def test_times_that_the_target_cuts_or_rounds(mode: str, tmp_path: Path) -> None:
    source = optuna.create_study(storage=trialstore.InMemoryStorage())
    for microsecond in (0, 100_000, 500_000, 999_999):
        trial = optuna.create_trial(value=0.0)
        trial.datetime_start = datetime(2026, 12, 31, 23, 59, 59, microsecond)
        source.add_trial(trial)
    connect_args = {"init_command": f"SET SESSION sql_mode = '{mode}'"}
    target = trialstore.RDBStorage(
        new_url("mariadb", tmp_path), engine_kwargs={"connect_args": connect_args}
    )
    for n_new in (4, 0):
        (copied,) = copy(source._storage, target, verify=True)
        assert (copied.n_new, copied.differences) == (n_new, [])


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_means_something_to_a_protocol(kind: str, tmp_path: Path, cli: Cli) -> None:
    source, target = str(tmp_path / "odd.journal"), new_url(kind, tmp_path)
    texts = ["\\N", "a\tb", "line\nline", "\r\n", "\\", "\\.", "'; --", "%s %(a)s {0}", "№", ""]
    study = optuna.create_study(study_name="odd", storage=trialstore.get_storage(source))
    study.add_trial(
        optuna.create_trial(
            values=[float("-inf")],
            params={f"p{text}": 1e-308 for text in texts},
            distributions={f"p{text}": FloatDistribution(0, 1) for text in texts},
            user_attrs={f"k{i}{text}": text for i, text in enumerate(texts)},
            system_attrs={"none": None},
            intermediate_values={0: float("nan"), 1: -0.0, 2: float("inf"), -3: 5e-324},
        )
    )
    study.enqueue_trial({})
    (copied,) = cli.json("copy", source, target, "--verify")
    assert copied["differences"] == []
    if kind != "mariadb":  # which holds whole seconds
        assert _contents(target) == _contents(source)


@pytest.mark.servers
@pytest.mark.parametrize("kind", ["psycopg", "psycopg2", "mariadb"])
def test_a_connection_that_ends_in_the_middle(
    kind: str, origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    from trialstore.logs.relational import loading

    insert, n_calls = loading._insert, itertools.count()

    def cut_off(connection: Any, *args: Any) -> None:
        if next(n_calls) == 3:
            connection.connection.driver_connection.close()
        insert(connection, *args)

    monkeypatch.setattr(loading, "_insert", cut_off)
    target = new_url(kind, tmp_path)
    cli.json("copy", origin, target, "--verify")
    assert next(n_calls) > 9
    assert _contents(target) == _contents(origin)


@pytest.mark.servers
def test_rows_that_need_several_statements(
    origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    from trialstore.logs.relational import loading

    monkeypatch.setattr(loading, "_STATEMENT_LEN", 200)
    target = new_url("mariadb", tmp_path)
    cli.json("copy", origin, target, "--verify")
    assert _contents(target) == _contents(origin)


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_large_trials_are_not_gathered(
    kind: str, origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    create, lengths = transfer._Writer.create, []

    def noted(self: Any, study_id: int, n: int, images: Any, number: int) -> None:
        lengths.append(len(images))
        create(self, study_id, n, images, number)

    monkeypatch.setattr(transfer, "_BATCH_BYTES", 1)
    monkeypatch.setattr(transfer._Writer, "create", noted)
    target = new_url(kind, tmp_path)
    cli.json("copy", origin, target, "--verify")
    assert set(lengths) == {1}
    assert _contents(target) == _contents(origin)


# The command, killed in the middle of a batch that it is told.
_KILLED = """
import os, signal, sys, threading, time
from trialstore.cli import main
from trialstore.stores import transfer

transfer._BATCH_TRIALS = 25
batch, share = int(sys.argv.pop(1)), float(sys.argv.pop(1))
create, durations_s = transfer._Writer.create, []

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def until_killed(self, *args):
    if len(durations_s) == batch:
        threading.Timer(min(durations_s) * share, kill).start()
    elif len(durations_s) > batch:
        kill()
    began_s = time.perf_counter()
    create(self, *args)
    durations_s.append(time.perf_counter() - began_s)

transfer._Writer.create = until_killed
main()
"""


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(["journal", "sqlite"], id="files"),
        pytest.param(
            ["psycopg", "journal", "redis", "mariadb", "sqlite"],
            id="all",
            marks=pytest.mark.servers,
        ),
    ],
)
def test_killed_ten_times_on_the_way_around_and_back(
    kinds: list[str], origin: str, tmp_path: Path, cli: Cli
) -> None:
    start = f"sqlite:///{tmp_path}/start.db"
    cli.json("copy", origin, start)
    _add_a_long_study(start)
    before = _contents(optuna.storages.RDBStorage(start))
    n_trials = sum(len(study["trials"]) for study in before.values())
    n_kills = 0
    source = start
    for kind in kinds:
        target = new_url(kind, tmp_path)
        reached = 0
        for kill in range(10 // len(kinds)):
            command = [sys.executable, "-c", _KILLED, str(3 + kill % 2), f"{(1 + kill) / 6}"]
            killed = subprocess.run([*command, "copy", source, target], stdout=subprocess.DEVNULL)
            assert killed.returncode == -signal.SIGKILL
            now = sum(len(study["trials"]) for study in _contents(target).values())
            assert reached < now < n_trials
            reached, n_kills = now, n_kills + 1
        copied = cli.json("copy", source, target, "--verify")
        assert [one["differences"] for one in copied] == [[]] * len(before)
        assert sum(one["n_new"] for one in copied) == n_trials - reached
        findings = cli("check", target, "--json").json["findings"]
        assert [one for one in findings if one["severity"] != "note"] == []
        source = target
    assert n_kills == 10
    assert _contents(optuna.storages.RDBStorage(source)) == before


def _add_a_long_study(url: str) -> None:
    """Of 1,000 trials of whole seconds, in one exchange."""
    storage: Any = trialstore.get_storage(url)
    study = optuna.create_study(study_name="long", storage=storage)
    text = distribution_to_json(FloatDistribution(0, 1))
    storage.log.exchange(
        [
            r.CreateTrial(
                study_id=study._study_id,
                datetime_start="2026-11-21T10:00:00+00:00",
                datetime_complete="2026-11-21T10:00:01+00:00",
                state=r.COMPLETE,
                value=float(number),
                params={"x": number / 1_000},
                distributions={"x": text},
                user_attrs={"n": number},
                intermediate_values={"0": float(number)},
                worker_id="w",
                seq=number,
            )
            for number in range(1_000)
        ],
        None,
        trialstore.log.NOTHING,
    )
    storage.close()


def test_a_store_is_not_read_again_for_each_of_its_studies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_scans, scan = [], transfer._scan
    monkeypatch.setattr(transfer, "_scan", lambda store: n_scans.append(store) or scan(store))
    source, target = (
        trialstore.get_storage(str(tmp_path / f"{name}.journal")) for name in ("from", "to")
    )
    for number in range(10):
        study = optuna.create_study(storage=source, study_name=str(number))
        study.add_trial(optuna.create_trial(value=float(number)))
    copied = copy(source, target, verify=True)
    assert [(one.n_new, one.differences) for one in copied] == [(1, [])] * 10
    assert len(n_scans) == 5
