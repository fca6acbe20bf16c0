"""``check`` finds every damage, by its name and place, and nothing in healthy stores."""

from __future__ import annotations

import itertools
from pathlib import Path
import re
import shutil
import sqlite3
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

from damages import (
    JOURNAL_DAMAGES,
    REDIS_DAMAGES,
    SQLITE_DAMAGES,
    damage_journal,
    damage_redis,
    damage_tables,
)
import stores
from stores import KINDS, Cli, new_url
import trialstore


def _kinds(report: Any) -> set[str]:
    return {finding["kind"] for finding in report["findings"]}


def test_there_are_enough_damages() -> None:
    assert len(JOURNAL_DAMAGES) + len(SQLITE_DAMAGES) + len(REDIS_DAMAGES) >= 30


@pytest.mark.parametrize("name", JOURNAL_DAMAGES)
def test_a_damaged_journal(name: str, filled: Path, tmp_path: Path, cli: Cli) -> None:
    kind = JOURNAL_DAMAGES[name][1]
    path = tmp_path / "damaged.journal"
    before, after = damage_journal(name, filled / "a.journal", path)
    damaged = path.read_bytes()
    report = cli.json("check", str(path), code=1)
    assert kind in _kinds(report)
    if name != "the creation of a trial is gone":  # which shows where the trial is missed
        pairs = itertools.zip_longest(before, after)
        changed = next(i for i, (one, other) in enumerate(pairs) if one != other)
        place = next(one["where"] for one in report["findings"] if one["kind"] == kind)
        assert str(sum(map(len, after[:changed]))) in re.findall(r"\d+", place), place
    assert all(str(path) in finding["where"] for finding in report["findings"])
    text = cli("check", str(path))
    assert text.code == 1
    assert kind in text.out
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("name", SQLITE_DAMAGES)
def test_damaged_tables(name: str, filled: Path, tmp_path: Path, cli: Cli) -> None:
    url = damage_tables(name, filled / "a.db", tmp_path / "damaged.db")
    report = cli.json("check", url, code=1)
    assert SQLITE_DAMAGES[name][1] in _kinds(report)
    assert cli.json("check", url, "--deep", code=1)["findings"] == report["findings"], "once each"


def test_a_damaged_page_of_a_database(filled: Path, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "damaged.db"
    connection = sqlite3.connect(filled / "a.db")
    name = "ix_trials_study_id"
    page = connection.execute(f"SELECT rootpage FROM sqlite_master WHERE name = '{name}'")
    at = (page.fetchone()[0] - 1) * connection.execute("PRAGMA page_size").fetchone()[0]
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    contents = bytearray((filled / "a.db").read_bytes())
    contents[at + 8 : at + 12] = b"\xff\xff\xff\xff"
    path.write_bytes(contents)
    assert "file-damaged" in _kinds(cli.json("check", f"sqlite:///{path}", "--deep", code=1))


@pytest.mark.servers
@pytest.mark.parametrize("name", REDIS_DAMAGES)
def test_a_damaged_journal_in_redis(name: str, tmp_path: Path, cli: Cli) -> None:
    url = new_url("redis", tmp_path)
    stores.fill(trialstore.get_storage(url))
    damage_redis(name, url)
    assert REDIS_DAMAGES[name][1] in _kinds(cli.json("check", url, code=1))


def test_a_snapshot_of_another_journal(filled: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copy(filled / "a.journal", tmp_path)
    (tmp_path / "a.journal.snapshot").write_bytes(b"\xfftrialstore-file-snapshot-1\n" + bytes(99))
    report = cli.json("check", f"{tmp_path}/a.journal", code=1)
    assert _kinds(report) == {"snapshot-unusable"}
    assert report["findings"][0]["severity"] == "note"


# --- healthy stores ------------------------------------------------------------------------------


def _fill(storage: Any) -> None:
    stores.fill(storage)


def _empty(storage: Any) -> None:
    pass


def _after_deletions(storage: Any) -> None:
    """Records of a worker that did not know yet are in a journal; ids have gaps."""
    study = stores.fill(storage)
    late = study.ask()
    study_id = study._study_id
    stores.fill(storage, "second")
    storage.delete_study(study_id)
    with pytest.raises(KeyError):
        storage.set_trial_user_attr(late._trial_id, "too", "late")


def _lost_races(storage: Any) -> None:
    study = optuna.create_study(study_name="races", storage=storage)
    trial = study.ask()
    study.tell(trial, 1.0)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        storage.set_trial_user_attr(trial._trial_id, "too", "late")
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        optuna.create_study(study_name="races", storage=storage)


_HISTORIES = {"filled": _fill, "empty": _empty, "deleted": _after_deletions, "races": _lost_races}


@pytest.mark.parametrize("history", _HISTORIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_store(kind: str, history: str, tmp_path: Path, cli: Cli) -> None:
    url = new_url(kind, tmp_path)
    storage: Any = trialstore.get_storage(url)
    _HISTORIES[history](storage)
    n_trials = [storage.get_n_trials(one._study_id) for one in storage.get_all_studies()]
    storage.close()
    report = cli.json("check", url, "--deep")
    assert report["findings"] == []
    assert (report["n_studies"], report["n_trials"]) == (len(n_trials), sum(n_trials))


def test_a_killed_writer_of_plain_optuna(tmp_path: Path, cli: Cli) -> None:
    path = str(tmp_path / "plain.journal")
    backend = optuna.storages.journal.JournalFileBackend(path)
    plain = optuna.storages.JournalStorage(backend)
    stores.fill(plain)
    assert cli.json("check", path)["findings"] == []
    with Path(path).open("ab") as file:
        file.write(b'{"op_code": 8, "worker_id": "k')
    backend.append_logs([{"op_code": 2, "worker_id": "w", "study_id": 0, "user_attr": {"a": 1}}])
    assert _kinds(cli.json("check", path, code=1)) == {"glued-record"}


def test_tables_of_plain_optuna(tmp_path: Path, cli: Cli) -> None:
    url = f"sqlite:///{tmp_path}/plain.db"
    stores.fill(optuna.storages.RDBStorage(url))
    assert cli.json("check", url, "--deep")["findings"] == []


@pytest.mark.servers
@pytest.mark.parametrize("command", [["check"], ["check", "--deep"], ["repair", "--in-place"]])
def test_what_may_not_be_read_is_not_called_damaged(
    command: list[str], tmp_path: Path, cli: Cli
) -> None:
    url = new_url("psycopg", tmp_path)
    trialstore.RDBStorage(url).close()
    address = sa.make_url(url)
    name = f"u{address.database}"
    with sa.create_engine(url, poolclass=sa.NullPool).begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN")
        connection.exec_driver_sql(f"GRANT SELECT ON alembic_version, studies TO {name}")
    few = address.set(username=name).render_as_string(hide_password=False)
    result = cli(command[0], few, *command[1:])
    assert result.code == 3
    assert "permission denied" in result.err
