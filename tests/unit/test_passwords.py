"""The password of a database is in no repr, log line or exception."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import contextlib
import logging
import multiprocessing
from pathlib import Path
import traceback
from typing import Any

from optuna.study import StudyDirection
import pytest
import sqlalchemy as sa

from servers import SECRETIVE, free_port, new_database, shared_mariadb, shared_postgresql
from trialstore.clock import Clock
from trialstore.errors import IncompatibleSchemaError, LogUnavailableError
from trialstore.logs.relational import TablesLog
from trialstore.logs.relational.dialects import shown_url
from trialstore.rdb import RDBStorage

pytestmark = pytest.mark.servers

_RIGHT = "s3cret"
_WRONG = "hunter2@{x}/%"


class _SteppingClock(Clock):
    """Sleeping moves it and takes no time."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def now_s(self) -> float:
        return self.time_s

    def sleep(self, duration_s: float) -> None:
        self.time_s += duration_s


@pytest.fixture(params=["psycopg", "psycopg2", "pymysql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    url = new_database(request.param, tmp_path)
    assert _RIGHT in url
    return url


@pytest.fixture(autouse=True)
def _no_log_line_tells(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    for name in ("sqlalchemy.engine", "sqlalchemy.pool", "alembic", "psycopg", "trialstore"):
        caplog.set_level(logging.DEBUG, logger=name)
    yield
    _check(caplog.text)


def _check(text: str) -> None:
    for password in (_RIGHT, _WRONG, "hunter2"):
        assert password not in text


def _text(error: BaseException) -> str:
    """All that is printed of an exception, with its causes; without the lines of this file."""
    printed = traceback.TracebackException.from_exception(error)
    return (
        "".join(printed.format_exception_only())
        + (_text(error.__cause__) if error.__cause__ else "")
        + (_text(error.__context__) if error.__context__ else "")
    )


def _refused(kind: type[BaseException], url: str, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        TablesLog(url, clock=_SteppingClock(), **options)
    _check(_text(caught.value))


def test_of_an_open_storage(url: str) -> None:
    with contextlib.closing(RDBStorage(url)) as storage:
        log = storage._exchanger.log
        _check(f"{storage!r} {log!r} {log.engine!r} {log.facts()}")
        study_id = storage.create_new_study([StudyDirection.MINIMIZE])
        with pytest.raises(ValueError) as caught:
            storage.set_study_user_attr(study_id, "k" * 1000, 1)
        _check(_text(caught.value))
        storage.upgrade()


def test_of_a_schema_that_does_not_fit(url: str) -> None:
    TablesLog(url).close()
    engine = sa.create_engine(url)
    for version in ("v3.0.0.d", "v9.9.9.a"):
        with engine.begin() as connection:
            connection.execute(sa.text(f"UPDATE alembic_version SET version_num = '{version}'"))
        _refused(IncompatibleSchemaError, url)
    engine.dispose()


def test_of_a_server_that_refuses(url: str) -> None:
    parts = sa.make_url(url)
    wrong = parts.set(password=_WRONG, database="no_such_database")
    _refused(LogUnavailableError, wrong.render_as_string(hide_password=False))


def test_of_a_server_that_is_not_there(url: str) -> None:
    parts = sa.make_url(url).set(port=free_port(), password=_WRONG)
    _refused(LogUnavailableError, parts.render_as_string(hide_password=False))


def test_of_a_password_elsewhere_than_in_its_place(url: str) -> None:
    parts = sa.make_url(url).set(port=free_port(), password=None)
    in_query = parts.update_query_dict({"password": _WRONG})
    _refused(LogUnavailableError, in_query.render_as_string(hide_password=False))
    connect_args = {"password": _WRONG}
    _refused(
        LogUnavailableError,
        parts.render_as_string(),
        engine_kwargs={"connect_args": connect_args},
    )


def test_of_one_in_the_query_with_every_sqlalchemy(monkeypatch: pytest.MonkeyPatch) -> None:
    current = sa.URL.difference_update_query

    def as_in_2_0(self: sa.URL, names: Iterable[str]) -> sa.URL:
        """It walks over the names twice; 2.1 makes a set of them first."""
        if not set(names).intersection(self.query):
            return self
        return current(self, names)

    monkeypatch.setattr(sa.URL, "difference_update_query", as_in_2_0)
    shown = shown_url(sa.make_url(f"mysql+pymysql://u@h/db?password={_WRONG}&charset=utf8mb4"))
    assert shown == "mysql+pymysql://u@h/db?charset=utf8mb4"


def test_one_that_is_changed_is_read_again(url: str, tmp_path: Path) -> None:
    server = shared_mariadb() if url.startswith("mysql") else shared_postgresql()
    address = sa.make_url(url).set(username=SECRETIVE, password=None)
    file = tmp_path / "password"

    def change(password: str) -> None:
        server.let_in(password)
        file.write_text(password)

    change(_RIGHT)
    storage = RDBStorage(address.render_as_string(), password_file=str(file))
    with contextlib.closing(storage):
        study_id = storage.create_new_study([StudyDirection.MINIMIZE])
        connection = storage._tables.connection
        session: Any = connection.session()
        change(_WRONG)
        session.raw.close()
        storage.create_new_trial(study_id)
        storage._tables.facts()
        assert _WRONG not in connection.clean(ValueError(_WRONG))
        file.unlink()
        connection.disconnect()
        assert storage.get_n_trials(study_id) == 1, "the password of before is still good"
        child = multiprocessing.get_context("fork").Process(
            target=storage.create_new_trial, args=(study_id,)
        )
        child.start()
        child.join()
        assert child.exitcode == 0
