"""How psycopg is spoken to below its cursors: what is prepared, what is refused, what is left."""

from __future__ import annotations

from collections.abc import Iterator
import os
from pathlib import Path
import signal
import threading
from typing import Any

import psycopg
import pytest
from tests.unit.test_relational_basics import Model, param

from servers import new_database
from trialstore.logs.relational.session import Compiled, Step
from trialstore.testing.suites.base import wait_until

pytestmark = pytest.mark.servers


def one(sql: str, *args: Any, columns: int = 1) -> Step:
    return Step(Compiled(sql, (), columns), args)


def is_prepared(model: Model, sql: str = "%") -> bool:
    look = "SELECT count(*) FROM pg_prepared_statements WHERE NOT from_sql AND statement LIKE $1"
    rows = model.log.connection.session().run([one(look, sql)])[0]
    return bool(rows[0][0])


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(new_database("psycopg", tmp_path))


def with_arguments(tmp_path: Path, **arguments: Any) -> Model:
    url = new_database("psycopg", tmp_path)
    return Model(url, engine_kwargs={"connect_args": arguments})


def test_a_statement_is_prepared_after_as_many_uses_as_the_connection_says(tmp_path: Path) -> None:
    model = with_arguments(tmp_path, prepare_threshold=2)
    session = model.log.connection.session()
    counts = []
    for n in range(4):
        assert session.run([one("SELECT $1::int + 1", n)]) == [[(n + 1,)]]
        counts.append(is_prepared(model, "SELECT $1::int + 1"))
    assert counts == [False, False, True, True]


def test_nothing_is_prepared_where_the_user_says_so(tmp_path: Path) -> None:
    model = with_arguments(tmp_path, prepare_threshold=None)
    study_id = model.study()
    for _ in range(8):
        model.trial(study_id)
    assert not is_prepared(model)


def test_what_a_failed_message_did_not_come_to_is_prepared_by_the_next(tmp_path: Path) -> None:
    session = with_arguments(tmp_path, prepare_threshold=0).log.connection.session()
    fails, follows = one("SELECT 1 / $1::int", 0), one("SELECT 'x' || $1::text", "y")
    for _ in range(2):
        with pytest.raises(psycopg.errors.DivisionByZero):
            session.run([fails, follows])
    assert session.run([follows, follows]) == [[("xy",)], [("xy",)]]


def test_behind_a_pooler_that_loses_prepared_statements_no_more_are_made(tmp_path: Path) -> None:
    model = with_arguments(tmp_path, prepare_threshold=0)
    study_id = model.study()
    trial_id = model.trial(study_id)
    model.log.connection.session().run([one("DEALLOCATE ALL", columns=0)])
    for name in "abc":
        model.do(param(trial_id, name))
    assert not is_prepared(model)
    model.read(study_id)
    assert list(model.trials[trial_id].params) == ["a", "b", "c"]


def test_values_arrive_as_they_are(model: Model) -> None:
    session = model.log.connection.session()
    floats = [0.1, -0.0, 5e-324, 1.7976931348623157e308, float("inf"), float("-inf")]
    sql = "SELECT " + ", ".join(f"${i + 1}::float8" for i in range(len(floats)))
    found = session.run([one(sql, *floats)])[0][0]
    assert [repr(x) for x in found] == [repr(x) for x in floats]
    texts = ["", "ä😀", "%s $1 \\ '", None]
    found = session.run([one("SELECT $1::text, $2::text, $3::text, $4::text", *texts)])[0][0]
    assert list(found) == texts


def test_an_id_beyond_the_column_is_nobodys(model: Model) -> None:
    study_id = model.study()
    assert model.do(trials={2**31, 2**40}) == []
    assert not model.trials
    model.trial(study_id)


def test_a_nul_is_refused_before_anything_is_sent(model: Model) -> None:
    session = model.log.connection.session()
    with pytest.raises(psycopg.DataError, match="NUL"):
        session.run([one("BEGIN", columns=0), one("SELECT $1::text", "a\0b")])
    assert session.run([one("SELECT 1")]) == [[(1,)]]


def test_a_message_larger_than_all_buffers_goes_through(model: Model) -> None:
    text = "x" * (1 << 20)
    steps = [one("SELECT $1::text", text)] * 24
    assert model.log.connection.session().run(steps) == [[(text,)]] * 24


def test_other_threads_run_while_an_answer_is_awaited(model: Model) -> None:
    waiting = model.log.connection.session()
    holding = Model(model.log.url).log.connection.session()
    lock, unlock = one("SELECT pg_advisory_lock(1)::text"), one("SELECT pg_advisory_unlock(1)")
    holding.run([lock])
    waiter = threading.Thread(target=waiting.run, args=([lock, unlock],))
    waiter.start()
    waits = one("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    wait_until(lambda: holding.run([waits]) == [[(1,)]], "the other to wait")
    holding.run([unlock])
    waiter.join()


@pytest.fixture
def interruptible() -> Iterator[None]:
    # A shell starts what it puts in the background with SIGINT ignored, and that is inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_connection(model: Model) -> None:
    study_id = model.study()
    session = model.log.connection.session()
    other = Model(model.log.url).log.connection.session()
    sleeps = one("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")

    def interrupt() -> None:
        wait_until(lambda: other.run([sleeps]) == [[(1,)]], "the statement")
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        session.run([one("SELECT pg_sleep(3600)")])
    interrupter.join()
    assert session.raw.closed
    wait_until(lambda: other.run([sleeps]) == [[(0,)]], "the statement to be cancelled")
    model.trial(study_id)
    assert len(model.trials) == 1
