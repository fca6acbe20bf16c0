"""``OptunaDatabase`` against real servers that look at the password."""

from __future__ import annotations

from collections.abc import Iterator
import datetime
import logging
from pathlib import Path
import pickle
import threading
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

from servers import SECRETIVE, shared_mariadb, shared_postgresql
from trialstore import optuna_db
from trialstore.errors import LogUnavailableError, SecretNotFoundError
from trialstore.optuna_db import PASSWORD_SECRET, OptunaDatabase, get_optuna_db

pytestmark = pytest.mark.servers

_PASSWORD = """p@ss:w/o%rd?#[]{}'"\\ &=+;$,{SCHEMA_VERSION}"""


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / PASSWORD_SECRET).write_text(_PASSWORD + "\n")
    return folder


def _new_database(driver: str) -> sa.URL:
    kind, _, name = driver.partition("+")
    if kind == "postgresql":
        shared_postgresql().let_in(_PASSWORD)
        return sa.make_url(shared_postgresql().new_database(name))
    shared_mariadb().let_in(_PASSWORD)
    return sa.make_url(shared_mariadb().new_database(name))


@pytest.fixture(params=["postgresql+psycopg2", "postgresql+psycopg", "mysql+pymysql"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(driver: str) -> sa.URL:
    return _new_database(driver)


@pytest.fixture
def database(driver: str, url: sa.URL, secrets: Path) -> Iterator[OptunaDatabase]:
    assert url.database
    opened = OptunaDatabase(
        SECRETIVE,
        PASSWORD_SECRET,
        url.database,
        f"{url.host}:{url.port}",
        driver=driver,
        secrets_folder=secrets,
    )
    yield opened
    opened.storage.close()


def _tune(study: optuna.Study, n_trials: int) -> None:
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=n_trials)


def test_every_method_of_the_seed(database: OptunaDatabase, url: sa.URL) -> None:
    assert (database.username, database.db_name) == (SECRETIVE, url.database)
    assert database.hostname == f"{url.host}:{url.port}"
    assert database.num_existing_studies == 0
    assert database.get_latest_study() is None
    assert database.study_summaries == []

    first, second = database.get_study("first"), database.get_study("second")
    assert database.get_study("first")._study_id == first._study_id
    assert database.get_best_params("first") == {}
    assert database.get_last_update_time(first) == datetime.datetime(1, 1, 1)
    _tune(second, 2)
    _tune(first, 3)
    assert database.is_in_db("first") and not database.is_in_db("third")
    assert database.get_best_params("first") == first.best_params
    assert database.get_study_summary("first").n_trials == 3
    assert {s.study_name: s.n_trials for s in database.study_summaries} == {
        "first": 3,
        "second": 2,
    }
    assert [study.study_name for study in database.get_all_studies()] == ["first", "second"]
    assert database.num_existing_studies == 2
    latest = database.get_latest_study()
    assert latest is not None and latest.study_name == "first"
    ends = [trial.datetime_complete for trial in first.trials]
    assert database.get_last_update_time(first) == max(filter(None, ends))
    for absent in (database.get_study_summary, database.get_best_params):
        with pytest.raises(StopIteration, match="third"):
            absent("third")
    assert database.get_best_params(_two_objectives(database)) == {}


def _two_objectives(database: OptunaDatabase) -> str:
    study = optuna.create_study(directions=["minimize"] * 2, storage=database.storage)
    study.optimize(lambda trial: (1.0, 2.0), n_trials=1)
    return study.study_name


def test_the_storage_is_one_and_a_pickle_has_no_password(database: OptunaDatabase) -> None:
    assert database.storage is database.storage
    pickled = pickle.dumps(database)
    assert _PASSWORD.encode() not in pickled
    copy = pickle.loads(pickled)
    copy.get_study("by the copy")
    assert database.is_in_db("by the copy")
    copy.storage.close()


def test_the_password_shows_nowhere(
    database: OptunaDatabase, secrets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    shown = repr(database) + repr(database.storage) + repr(database.storage._exchanger.log)
    wrong = _PASSWORD + "wrong"
    (secrets / PASSWORD_SECRET).write_text(wrong)
    stranger = pickle.loads(pickle.dumps(OptunaDatabase(
        SECRETIVE, PASSWORD_SECRET, database.db_name, database.hostname,
        driver=database._driver, secrets_folder=secrets,
    )))  # fmt: skip
    with pytest.raises(LogUnavailableError) as refused:
        _ = stranger.storage
    for text in (shown, str(refused.value), repr(refused.value), caplog.text):
        assert _PASSWORD not in text
    # Opened again on a password that has been put right meanwhile.
    (secrets / PASSWORD_SECRET).write_text(_PASSWORD)
    assert not stranger.is_in_db("x")
    stranger.storage.close()


def test_a_missing_secret_is_named(secrets: Path) -> None:
    database = OptunaDatabase("u", "no_such_secret", "d", "localhost", secrets_folder=secrets)
    for use in (lambda: database.storage, lambda: database._db_url):
        with pytest.raises(SecretNotFoundError, match="no_such_secret"):
            use()


@pytest.mark.parametrize(
    ("wrong", "value"),
    [
        ("username", None),
        ("username", ""),
        ("db_password_secret", None),
        ("db_name", None),
        ("hostname", None),
        ("hostname", "::1"),
        ("hostname", "localhost:port"),
    ],
)
def test_what_names_no_database_is_refused_by_its_argument(wrong: str, value: str | None) -> None:
    names: dict[str, Any] = {
        "username": "u",
        "db_password_secret": "s",
        "db_name": "d",
        "hostname": "localhost",
        wrong: value,
    }
    with pytest.raises(ValueError, match=f"^{wrong} must be "):
        OptunaDatabase(**names)


# --- the one instance ----------------------------------------------------------------------------


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A process that has no database yet, and no environment file at home."""
    monkeypatch.setattr(optuna_db, "_instance", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("OPTUNA_DB_USER", "OPTUNA_DB_NAME", "OPTUNA_DB_HOST"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_the_instance_is_made_once_from_the_file_at_home(
    only: pytest.MonkeyPatch, secrets: Path
) -> None:
    url = _new_database("postgresql+psycopg2")
    path = optuna_db.default_env_file()
    path.parent.mkdir(parents=True)
    path.write_text(
        f"OPTUNA_DB_USER={SECRETIVE}\nOPTUNA_DB_NAME={url.database}\n"
        f"OPTUNA_DB_HOST={url.host}:{url.port}\n"
    )
    found: list[OptunaDatabase] = []
    threads = [
        threading.Thread(target=lambda: found.append(get_optuna_db(secrets_folder=secrets)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1
    assert found[0].db_name == url.database
    found[0].storage.close()


def test_what_is_missing_is_named_and_the_next_call_tries_again(
    only: pytest.MonkeyPatch, secrets: Path
) -> None:
    with pytest.raises(RuntimeError, match="OPTUNA_DB_USER"):
        get_optuna_db(secrets_folder=secrets)
    url = _new_database("postgresql+psycopg2")
    assert url.database
    only.setenv("OPTUNA_DB_USER", SECRETIVE)
    only.setenv("OPTUNA_DB_NAME", url.database)
    only.setenv("OPTUNA_DB_HOST", f"{url.host}:{url.port}")
    with pytest.raises(RuntimeError, match=PASSWORD_SECRET):
        get_optuna_db(secrets_folder=secrets / "elsewhere")
    with pytest.raises(RuntimeError, match="no environment file"):
        get_optuna_db(secrets_folder=secrets, env_file=secrets / "none.env")
    with pytest.raises(RuntimeError, match="no environment file"):
        get_optuna_db(secrets_folder=secrets, env_file=secrets)
    (secrets / "other.env").write_bytes(b"OPTUNA_DB_USER=\xff")
    with pytest.raises(RuntimeError, match=r"other.env' is no UTF-8"):
        get_optuna_db(secrets_folder=secrets, env_file=secrets / "other.env")
    database = get_optuna_db(secrets_folder=secrets)
    assert database is get_optuna_db() is get_optuna_db(secrets_folder=str(secrets))
    for other in ({"driver": "mysql+pymysql"}, {"heartbeat_interval": 60}):
        with pytest.raises(ValueError, match=f"another {next(iter(other))}"):
            get_optuna_db(**other)
    database.storage.close()
