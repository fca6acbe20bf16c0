"""What psycopg2 is given to send: what is prepared, and what a failure leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psycopg2.errors
import pytest
from tests.unit.test_pipeline import one
from tests.unit.test_relational_basics import Model, param

from servers import new_database
from trialstore.logs.relational.message import MessageSession
from trialstore.logs.relational.session import Step

pytestmark = pytest.mark.servers


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(new_database("psycopg2", tmp_path))


def is_prepared(model: Model, sql: str) -> bool:
    # It shows the whole message that prepared a statement.
    look = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%" + sql + "%'"
    return bool(model.log.connection.session().run([one(look)])[0][0][0])


def test_a_text_that_comes_again_is_prepared(model: Model) -> None:
    session = model.log.connection.session()
    steps = [one("SELECT set_config('a.b', $1, false)", "x", columns=0)]
    steps += [one("SELECT $1::int + 10 * $2::int", 1, 2), one("SELECT $1::text", "%s ' $1")]
    counts = []
    for _ in range(4):
        assert session.run(steps) == [[], [[21]], [["%s ' $1"]]]
        counts.append(is_prepared(model, "$1::int + 10"))
    assert counts == [False, False, True, True]


def test_what_a_failed_message_may_have_prepared_is_prepared_anew(model: Model) -> None:
    session = model.log.connection.session()
    for _ in range(4):
        with pytest.raises(psycopg2.errors.DivisionByZero):
            session.run([one("SELECT 1 / $1::int", 0)])
    for n in range(4):
        assert session.run([one("SELECT 1 / $1::int", 1), one("SELECT $1::int", n)]) == [
            [[1]],
            [[n]],
        ]


def test_behind_a_pooler_that_loses_prepared_statements_no_more_are_made(model: Model) -> None:
    study_id = model.study()
    trial_id = model.trial(study_id)
    for name in "abcd":
        model.do(param(trial_id, name))
    assert is_prepared(model, "INTO trial_params")
    model.log.connection.session().run([one("DEALLOCATE ALL", columns=0)])
    for name in "efgh":
        model.do(param(trial_id, name))
    assert not is_prepared(model, "INTO trial_params")
    model.read(study_id)
    assert list(model.trials[trial_id].params) == list("abcdefgh")


@pytest.fixture
def answers_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server refuses to make one answer to several statements that read."""
    join = MessageSession._join

    def too_long(session: MessageSession, reads: Sequence[Step]) -> str:
        joined = join(session, reads)
        if len(reads) == 1:
            return joined
        return f"SELECT repeat('xx', 1073741823) WHERE ({joined}) IS NOT NULL"

    monkeypatch.setattr(MessageSession, "_join", too_long)


@pytest.mark.usefixtures("answers_too_long")
def test_an_answer_that_is_too_long_for_one_value_comes_in_rows(model: Model) -> None:
    session = model.log.connection.session()
    steps = [one("SELECT generate_series($1::int, 3), 'a%s', 0.5::float8", 1, columns=3)]
    steps += [one("SELECT NULL::int WHERE false"), one("SELECT $1::text", "%s ' $1")]
    for _ in range(4):
        rows = [[[n, "a%s", 0.5] for n in (1, 2, 3)], [], [["%s ' $1"]]]
        assert session.run(steps) == rows
    with pytest.raises(psycopg2.errors.ProgramLimitExceeded):
        session.run([one("CREATE TABLE a_ (b int)", columns=0), *steps])


def test_what_was_written_before_such_an_answer_is_stored_once(
    model: Model, request: pytest.FixtureRequest
) -> None:
    study_id = model.study()
    model.read(study_id)
    request.getfixturevalue("answers_too_long")
    trial_id = model.trial(study_id)
    model.do(param(trial_id, "a"), trials={trial_id})
    model.read(study_id)
    assert list(model.trials) == [trial_id]
    assert list(model.trials[trial_id].params) == ["a"]


def test_an_id_beyond_the_column_is_nobodys(model: Model) -> None:
    study_id = model.study()
    for _ in range(4):
        assert model.do(trials={2**31, 2**40}) == []
        assert not model.trials
    model.trial(study_id)
