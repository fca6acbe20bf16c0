"""Lost answers, killed servers, forks and crowds: applied exactly once, and nobody the wiser.

A fault is put between the log and its driver: ``Session.run`` does the work, or does not, and then
the connection is gone. That is what a cut cable looks like from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import itertools
import multiprocessing
from pathlib import Path
import threading
from typing import Any

import optuna
from optuna.trial import TrialState
import pytest
import sqlalchemy as sa
from tests.unit.test_relational_basics import Model, claim, param, tell, time, verdicts

from compat.workers import write
from interrupts import is_interrupted_at
from poolers import pooled
from servers import new_database, proxied, shared_mariadb, shared_postgresql
from trialstore import records as r
from trialstore.clock import Clock
from trialstore.errors import LogUnavailableError, OutcomeUnknownError
from trialstore.log import NOTHING, Wanted
from trialstore.logs.relational import TablesLog, connection, dialects, exchange
from trialstore.logs.relational.session import Rows, Session, Step, plain
from trialstore.rdb import RDBStorage
from trialstore.testing.suites.base import run_threads, wait_until

DRIVERS = [
    pytest.param(kind, marks=pytest.mark.servers) for kind in ("psycopg", "psycopg2", "pymysql")
]
KINDS = ["sqlite", *DRIVERS]


class SteppingClock(Clock):
    """Sleeping moves it and takes no time."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def now_s(self) -> float:
        return self.time_s

    def sleep(self, duration_s: float) -> None:
        self.time_s += duration_s


def cut(
    model: Model, at: int, *, applied: bool, error: BaseException | None = None
) -> Callable[[], bool]:
    """Break the connection at the ``at``-th message from now, before or after it is applied.

    Args:
        error: Raised instead, with the connection as it is.

    Returns:
        Whether it has happened.
    """
    log = model.log
    session = log.connection.session()
    count = [0]
    real = type(session).run

    def run(self: Session, steps: Sequence[Step]) -> list[Rows]:
        count[0] += 1
        if count[0] != at:
            return real(self, steps)
        if applied:
            real(self, steps)
        if error is not None:
            raise error
        self.raw.close()
        raise ConnectionResetError("cut by the test")

    session.run = run.__get__(session)  # type: ignore[method-assign]
    return lambda: count[0] >= at


@contextlib.contextmanager
def locked_table(name: str, url: str) -> Iterator[None]:
    """Nobody else reads the table, as while an administrator works on it."""
    lock = f"LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE"
    if url.startswith("mysql"):
        lock = f"LOCK TABLES {name} WRITE"
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(lock)
        yield


_WAITING = {
    "postgresql": "SELECT pg_cancel_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND wait_event_type = 'Lock'",
    "mysql": "SELECT id FROM information_schema.processlist "
    "WHERE db = database() AND state LIKE '%%metadata lock%%'",
}


@contextlib.contextmanager
def cancelling(url: str) -> Iterator[list[int]]:
    """Cancel whatever waits for a lock in the database, and count it."""
    n_cancelled = [0]
    done = threading.Event()
    waiting = _WAITING[sa.make_url(url).get_backend_name()]
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")

    def cancel() -> None:
        with engine.connect() as connection:
            while not done.wait(0.01):
                for (found,) in connection.exec_driver_sql(waiting).fetchall():
                    n_cancelled[0] += 1
                    if url.startswith("mysql"):
                        connection.exec_driver_sql(f"KILL QUERY {found}")

    canceller = threading.Thread(target=cancel)
    canceller.start()
    try:
        yield n_cancelled
    finally:
        done.set()
        canceller.join()
        engine.dispose()


@pytest.mark.parametrize("kind", DRIVERS)
@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("stepwise", [False, True])
def test_each_message_of_a_call_is_lost_once(
    kind: str, applied: bool, stepwise: bool, tmp_path: Path
) -> None:
    url = new_database(kind, tmp_path)
    one = Model(url)
    study_id = one.study()
    pair = {"params": {(study_id, "x")}} if stepwise else {}
    at = 0
    while True:
        at += 1
        queued = one.queue(study_id)
        running = one.trial(study_id)
        happened = cut(one, at, applied=applied)
        new = r.CreateTrial(worker_id="w", study_id=study_id, datetime_start=time(1))
        made = r.CreateStudy(worker_id="w", study_name=f"n{at}", directions=[1])
        outcomes = one.do(
            made, new, claim(queued), param(running, "x"), tell(running, 1.0), **pair
        )
        assert verdicts(outcomes) == ["ACCEPTED"] * 5
        assert one.studies[outcomes[0].id].study_name == f"n{at}"
        assert one.trials[outcomes[1].id].study_id == study_id
        assert one.trials[queued].state == r.RUNNING
        if not happened():
            break
    assert at >= (3 if stepwise else 2)
    trials = Model(url).read(study_id)
    assert [x.number for x in trials] == list(range(3 * at)), "no ghost and no gap"
    assert sum(x.state == r.COMPLETE for x in trials) == at


@pytest.mark.parametrize("kind", DRIVERS)
def test_a_transaction_given_up_for_lost_and_run_later_is_turned_away(
    kind: str, tmp_path: Path
) -> None:
    url = new_database(kind, tmp_path)
    one = Model(url)
    study_id = one.study()
    session = one.log.connection.session()
    late: list[Sequence[Step]] = []
    real = type(session).run

    def run(self: Session, steps: Sequence[Step]) -> list[Rows]:
        late.append(steps)
        self.raw.close()
        raise ConnectionResetError("cut by the test")

    session.run = run.__get__(session)  # type: ignore[method-assign]
    one.trial(study_id)
    with pytest.raises(Exception):  # noqa: B017 - the driver's own
        real(one.log.connection.session(), late[0])
    one.log.connection.rollback()
    assert [x.number for x in one.read(study_id)] == [0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("applied", [True, False])
def test_what_follows_an_interrupt_is_not_taken_for_it(
    kind: str, applied: bool, tmp_path: Path
) -> None:
    url = new_database(kind, tmp_path)
    one = Model(url)
    study_id = one.study()
    first, *others = [one.trial(study_id) for _ in range(9)]
    for at, trial_id in enumerate(others, 1):
        happened = cut(one, at, applied=applied, error=KeyboardInterrupt())
        with contextlib.suppress(KeyboardInterrupt):
            one.do(param(first, "x"))
        if not happened():
            break
        assert verdicts(one.do(tell(trial_id, 1.0))) == ["ACCEPTED"]
    else:
        pytest.fail("there are not so many messages in an exchange")
    told = [x.trial_id for x in Model(url).read(study_id) if x.state == r.COMPLETE]
    assert told == others[: at - 1]
    assert told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stepwise", [False, True])
def test_ctrl_c_between_any_two_lines_of_an_exchange(
    kind: str, stepwise: bool, tmp_path: Path
) -> None:
    one = Model(new_database(kind, tmp_path))
    study_id = one.study()
    told = []
    for moment in itertools.count(1):
        first, second = one.trial(study_id), one.trial(study_id)
        pair = {"params": {(study_id, f"x{moment}")}} if stepwise else {}
        write = functools.partial(one.do, param(first, f"x{moment}"), **pair)
        if not is_interrupted_at(moment, write, exchange.__file__):
            break
        assert verdicts(one.do(tell(second, 1.0))) == ["ACCEPTED"]
        told.append(second)
    assert len(told) > 10
    trials = one.read(study_id)
    assert [x.trial_id for x in trials if x.state == r.COMPLETE] == told


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        pytest.param("psycopg", "55P03", marks=pytest.mark.servers),
        pytest.param("psycopg2", "55P03", marks=pytest.mark.servers),
        pytest.param("pymysql", "1205", marks=pytest.mark.servers),
    ],
)
def test_ctrl_c_while_a_refused_exchange_is_rolled_back(
    kind: str, code: str, tmp_path: Path
) -> None:
    """MySQL commits a transaction that is left open when the next begins."""
    one = Model(new_database(kind, tmp_path), retry_deadline_s=0.0, clock=SteppingClock())
    study_id = one.study()
    trial_id = one.trial(study_id)
    for moment in itertools.count(1):
        write = functools.partial(
            one.do, param(trial_id, f"x{moment}"), params={(study_id, f"x{moment}")}
        )

        def refused(write: Callable[[], object] = write) -> None:
            with contextlib.suppress(LogUnavailableError):
                write()

        one.log.connection.persistently(one.log.connection.session)
        with refusing(one, kind, code, after=False, always=False):
            was_interrupted = is_interrupted_at(moment, refused, connection.__file__)
        one.do(r.SetTrialUserAttr(worker_id="w", trial_id=trial_id, user_attr={"k": moment}))
        if not was_interrupted:
            break
    assert moment > 5
    (trial,) = one.read(study_id)
    assert (trial.params, trial.user_attrs) == ({}, {"k": moment})


_REFUSE = {
    "psycopg": "DO $$ BEGIN RAISE EXCEPTION 'test' USING ERRCODE = '{0}'; END $$",
    "psycopg2": "DO $$ BEGIN RAISE EXCEPTION 'test' USING ERRCODE = '{0}'; END $$",
    "pymysql": "SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {0}, MESSAGE_TEXT = 'test'",
}
_REFUSALS = {
    "psycopg": ("57014", "55P03", "22003", "42P01"),
    "psycopg2": ("57014", "55P03", "22003", "42P01"),
    "pymysql": ("1317", "1205", "1264", "1146"),
}
"""Cancelled, waited too long for a lock, a value out of range, a table gone."""


@contextlib.contextmanager
def refusing(model: Model, kind: str, code: str, *, after: bool, always: bool) -> Iterator[None]:
    """Have the server refuse a statement before or after the next COMMIT; then, if ``always``, any
    message that only reads."""
    session = model.log.connection.session()
    real = type(session).run
    refusal = plain(_REFUSE[kind].format(code))
    committed = [False]

    def run(self: Session, steps: Sequence[Step]) -> list[Rows]:
        commit = model.log.connection.dialect.commit
        if commit in steps and not committed[0]:
            committed[0] = True
            at = steps.index(commit) + after
        elif commit not in steps and committed[0] and always:
            at = 0
        else:
            return real(self, steps)
        return real(self, [*steps[:at], refusal, *steps[at:]])

    session.run = run.__get__(session)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del session.run


_EACH_REFUSAL = pytest.mark.parametrize(
    ("kind", "code"),
    [
        pytest.param(kind, code, marks=pytest.mark.servers, id=f"{kind}-{code}")
        for kind, codes in _REFUSALS.items()
        for code in codes
    ],
)


@_EACH_REFUSAL
def test_what_is_refused_after_commit_is_read_again(kind: str, code: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    one = Model(url)
    study_id = one.study()
    first, second = one.trial(study_id), one.trial(study_id)
    with refusing(one, kind, code, after=True, always=False):
        new = r.CreateTrial(worker_id="w", study_id=study_id, datetime_start=time(1))
        outcomes = one.do(tell(first, 1.0), new, trials_of={study_id})
    assert verdicts(outcomes) == ["ACCEPTED"] * 2
    assert one.trials[outcomes[1].id].number == 2
    assert verdicts(one.do(tell(second, 2.0))) == ["ACCEPTED"]
    trials = Model(url).read(study_id)
    assert [x.values for x in trials] == [[1.0], [2.0], None]


@_EACH_REFUSAL
def test_what_is_refused_before_commit_is_not_stored(kind: str, code: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    one = Model(url, retry_deadline_s=0.0, clock=SteppingClock())
    study_id = one.study()
    first, second = one.trial(study_id), one.trial(study_id)
    with refusing(one, kind, code, after=False, always=False):
        if code in ("22003", "1264"):  # step by step nothing is refused any more
            assert verdicts(one.do(tell(first, 1.0))) == ["ACCEPTED"]
        else:
            with pytest.raises(LogUnavailableError, match="nothing was stored"):
                one.do(tell(first, 1.0))
    stored = Model(url).read(study_id)[0].state == r.COMPLETE
    assert stored == (code in ("22003", "1264"))
    assert verdicts(one.do(tell(second, 2.0))) == ["ACCEPTED"]
    assert Model(url).read(study_id)[1].values == [2.0]


@pytest.mark.parametrize("kind", DRIVERS)
def test_a_read_that_is_cancelled_loses_no_write(kind: str, tmp_path: Path) -> None:
    """As by an administrator's time limit, while somebody else holds the lock of a table."""
    url = new_database(kind, tmp_path)
    storage = RDBStorage(url, linger_s=3600)
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr("k", 1)
    with (
        locked_table("trial_intermediate_values", url),
        cancelling(url) as n_cancelled,
        pytest.raises(OutcomeUnknownError, match="committed"),
    ):
        study.get_trials(deepcopy=False)
    assert n_cancelled[0] >= 2
    study.tell(trial, 1.0)
    fresh = RDBStorage(url)
    (told,) = fresh.get_all_trials(study._study_id)
    assert (told.state, told.user_attrs) == (TrialState.COMPLETE, {"k": 1})
    storage.close()
    fresh.close()


@pytest.mark.parametrize("kind", DRIVERS)
def test_a_server_that_goes_away_for_good_after_commit(kind: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    with proxied(url) as (proxy, through):
        one = Model(through, clock=SteppingClock())
        study_id = one.study()
        trial_id = one.trial(study_id)
        session = one.log.connection.session()
        commit = one.log.connection.dialect.commit
        real = type(session).run
        committed = [False]

        def run(self: Session, steps: Sequence[Step]) -> list[Rows]:
            if committed[0]:
                proxy.refuse(True)
                self.raw.close()
                raise ConnectionResetError("cut by the test")
            committed[0] = commit in steps
            return real(self, steps)

        session.run = run.__get__(session)  # type: ignore[method-assign]
        with pytest.raises(OutcomeUnknownError, match="committed"):
            one.do(param(trial_id, "x"), params={(study_id, "x")}, trials_of={study_id})
        proxy.refuse(False)
        assert verdicts(one.do(tell(trial_id, 1.0))) == ["ACCEPTED"]
    (trial,) = Model(url).read(study_id)
    assert (trial.params, trial.values) == ({"x": 0.5}, [1.0])


@pytest.mark.parametrize("kind", DRIVERS)
@pytest.mark.parametrize("n_writes", [1, 2])
def test_a_storage_closed_after_its_connection_was_dropped_goes_on(
    kind: str, n_writes: int, tmp_path: Path
) -> None:
    """Its row can't be removed, and no later exchange is taken for one that stands there."""
    url = new_database(kind, tmp_path)
    asker = Model(url)
    study_id = asker.study()
    first, *others = [asker.trial(study_id) for _ in range(3)]
    with proxied(url) as (proxy, through):
        one = Model(through, clock=SteppingClock())
        for i in range(n_writes):
            one.do(param(first, f"x{i}"))
        proxy.sever()
        one.log.close()
        for trial_id in others:
            assert verdicts(one.do(tell(trial_id, 1.0))) == ["ACCEPTED"]
        one.log.close()
    told = [x.trial_id for x in asker.read(study_id) if x.state == r.COMPLETE]
    assert told == others


def _forget_sessions(url: str) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        assert connection.exec_driver_sql("DELETE FROM trialstore_sessions").rowcount


@pytest.mark.parametrize("kind", DRIVERS)
@pytest.mark.parametrize("stepwise", [False, True])
def test_a_mark_that_is_gone_is_put_back(kind: str, stepwise: bool, tmp_path: Path) -> None:
    """As after a failover: nothing is stored without it, and so no trial without a number."""
    url = new_database(kind, tmp_path)
    one = Model(url)
    study_id = one.study()
    trial_id = one.trial(study_id)
    pair = {"params": {(study_id, "x")}} if stepwise else {}
    new = r.CreateTrial(worker_id="w", study_id=study_id, datetime_start=time(1))
    for records in ([new, param(trial_id, "x")], [param(trial_id, "x"), tell(trial_id, 1.0)]):
        _forget_sessions(url)
        assert verdicts(one.do(*records, **pair)) == ["ACCEPTED"] * 2
    _forget_sessions(url)  # it was put back for the last, too
    trials = Model(url).read(study_id)
    assert [(x.number, x.state) for x in trials] == [(0, r.COMPLETE), (1, r.RUNNING)]


@pytest.mark.parametrize("kind", DRIVERS)
def test_a_mark_that_is_gone_is_not_put_back_before_it_is_asked(kind: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    one = Model(url)
    study_id = one.study()
    cut(one, 1, applied=False)
    _forget_sessions(url)
    with pytest.raises(OutcomeUnknownError):
        one.trial(study_id)
    one.trial(study_id)
    assert [x.number for x in one.read(study_id)] == [0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stepwise", [False, True])
def test_numbers_go_on_where_the_newest_trial_is_gone(
    kind: str, stepwise: bool, tmp_path: Path
) -> None:
    """As after a failover that lost it."""
    one = Model(new_database(kind, tmp_path))
    study_id = one.study()
    *_, lost = [one.trial(study_id) for _ in range(3)]
    with one.log.engine.begin() as connection:
        connection.exec_driver_sql(f"DELETE FROM trials WHERE trial_id = {lost}")
    pair = {"params": {(study_id, "x")}} if stepwise else {}
    new = r.CreateTrial(worker_id="w", study_id=study_id, user_attrs={"k": 1}, datetime_start=None)
    for _ in range(2):
        assert verdicts(one.do(new, **pair)) == ["ACCEPTED"]
    trials = Model(one.log.url).read(study_id)
    assert [x.number for x in trials] == list(range(4))
    assert [x.user_attrs for x in trials] == [{}, {}, {"k": 1}, {"k": 1}]


@pytest.mark.parametrize("kind", DRIVERS)
def test_without_the_mark_nothing_is_tried_again_blindly(kind: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    one = Model(url)
    study_id = one.study()
    for at in (1, 2, 3, 4):
        one.log.connection.session()
        one.log.connection.has_mark = one.log.connection.had_mark = False
        happened = cut(one, at, applied=True)
        new = r.CreateTrial(worker_id="w", study_id=study_id, datetime_start=time(1))
        try:
            one.do(new)
        except OutcomeUnknownError:
            assert happened()
            break
    else:
        pytest.fail("the COMMIT was among these messages")


@pytest.mark.parametrize("kind", DRIVERS)
def test_unreachable_for_good_names_the_cause_and_no_password(kind: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    port = url.split("127.0.0.1:")[1].split("/")[0]
    with pytest.raises(LogUnavailableError) as caught:
        TablesLog(url.replace(port, "1"), clock=SteppingClock())
    assert caught.value.__cause__ is not None
    assert "s3cret" not in f"{caught.value!r}{caught.value.__cause__!r}"
    wrong = url.replace("s3cret", "wr0ng-pass").replace("optuna:", "nobody:")
    with pytest.raises(LogUnavailableError) as caught:
        TablesLog(wrong, clock=SteppingClock())
    assert "wr0ng-pass" not in str(caught.value)
    assert "s3cret" not in repr(TablesLog(url))


@pytest.mark.parametrize("kind", DRIVERS[:2])
def test_a_server_that_says_nothing_is_not_waited_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is frozen, to whom the kernel makes the connection."""
    monkeypatch.setattr(dialects, "CONNECT_TIMEOUT_S", 2)  # the least of libpq
    with proxied(new_database(kind, tmp_path)) as (proxy, through):
        proxy.swallow()
        with pytest.raises(LogUnavailableError, match="timeout"):
            TablesLog(through, retry_deadline_s=0.001)


@pytest.mark.parametrize("kind", DRIVERS)
def test_a_killed_server_that_comes_back(kind: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    server = shared_mariadb() if kind == "pymysql" else shared_postgresql()
    one = Model(url)
    study_id = one.study()
    for i in range(3):
        trial_id = one.trial(study_id)
        server.kill()
        server.start()
        assert verdicts(one.do(param(trial_id, "x"), tell(trial_id, float(i)))) == ["ACCEPTED"] * 2
    trials = Model(url).read(study_id)
    assert [(x.number, x.state, x.values) for x in trials] == [
        (i, r.COMPLETE, [float(i)]) for i in range(3)
    ]


def _in_child(log: TablesLog, study_id: int, answers: Any) -> None:
    made = log.exchange(
        [r.CreateTrial(worker_id="c", study_id=study_id, datetime_start=time(1))], None, NOTHING
    )
    log.close()
    answers.put(made.outcomes[0].id if made.outcomes else None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_with_an_open_log(kind: str, tmp_path: Path) -> None:
    one = Model(new_database(kind, tmp_path))
    study_id = one.study()
    one.trial(study_id)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_child, args=(one.log, study_id, answers))
    child.start()
    theirs = answers.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    mine = one.trial(study_id)
    assert theirs != mine
    assert [x.number for x in one.read(study_id)] == [0, 1, 2]


def _open_and_create(url: str, gate: Any, answers: Any) -> None:
    try:
        gate.wait()
        log = TablesLog(url)
        made = log.exchange(
            [r.CreateStudy(worker_id="w", study_name="s", directions=[1])], None, NOTHING
        )
        log.close()
        answers.put(made.outcomes[0].verdict.name if made.outcomes else "?")
    except BaseException as error:
        answers.put(repr(error))


@pytest.mark.parametrize("kind", KINDS)
def test_many_processes_open_an_empty_database(kind: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    n = 50
    context = multiprocessing.get_context("fork")
    gate, answers = context.Barrier(n), context.Queue()
    args = (url, gate, answers)
    children = [context.Process(target=_open_and_create, args=args) for _ in range(n)]
    for child in children:
        child.start()
    found = sorted(answers.get(timeout=120) for _ in children)
    for child in children:
        child.join()
    assert found == ["ACCEPTED", *["DUPLICATED_STUDY"] * (n - 1)]


@pytest.mark.parametrize("kind", DRIVERS[:2])
def test_an_empty_database_is_opened_by_many_through_a_pooler(kind: str, tmp_path: Path) -> None:
    """Whoever takes a lock in one transaction can't give it back in the next."""
    url = new_database(kind, tmp_path)
    with pooled(url, 5) as through:
        run_threads(*[functools.partial(_open_and_close, through) for _ in range(8)])
    with sa.create_engine(url).connect() as connection:
        held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        assert connection.exec_driver_sql(held).scalar() == 0


def _open_and_close(url: str) -> None:
    with contextlib.closing(TablesLog(url)) as log:
        log.exchange([], None, Wanted(catalogue=True))


@pytest.mark.parametrize("default", ["repeatable read", "serializable"])
@pytest.mark.parametrize("kind", DRIVERS[:2])
@pytest.mark.parametrize("how", ["message", "stepwise", "load"])
def test_no_number_is_given_twice_whatever_isolation_is_the_default(
    kind: str, default: str, how: str, tmp_path: Path
) -> None:
    """Somebody else's trial is committed while ours waits for the lock of the study."""
    url = new_database(kind, tmp_path)
    setting = f"default_transaction_isolation TO '{default}'"
    name = sa.make_url(url).database
    with sa.create_engine(url, isolation_level="AUTOCOMMIT").connect() as theirs:
        theirs.exec_driver_sql(f"ALTER DATABASE {name} SET {setting}")
    one = Model(url)
    study_id = one.study()
    new = r.CreateTrial(
        worker_id="w", study_id=study_id, datetime_start=time(1), datetime_complete=time(2)
    )

    def create() -> None:
        if how == "load":
            with pytest.raises(ValueError, match="Somebody else writes"):
                one.log.load_trials([new], 0, 0)
            return
        pair = {"params": {(study_id, "x")}} if how == "stepwise" else {}
        assert verdicts(one.do(new, **pair)) == ["ACCEPTED"]

    with sa.create_engine(url).connect() as theirs:
        theirs.exec_driver_sql("SELECT 1 FROM studies FOR UPDATE")
        theirs.exec_driver_sql(
            "INSERT INTO trials (number, study_id, state) "
            f"SELECT n, {study_id}, 'WAITING' FROM generate_series(0, 1) AS n"
        )

        def commit() -> None:
            wait_until(lambda: _n_waiting(url) == 1, "ours waits for the lock")
            theirs.commit()

        run_threads(create, commit)
    numbers = [x.number for x in Model(url).read(study_id)]
    assert numbers == ([0, 1] if how == "load" else [0, 1, 2])


def _n_waiting(url: str) -> int:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    waiting = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    with engine.connect() as connection:
        return int(connection.exec_driver_sql(waiting).scalar_one())


def _work(url: str, study_id: int, n: int, answers: Any) -> None:
    try:
        log = TablesLog(url)
        cursor = None
        for _ in range(n):
            new = r.CreateTrial(worker_id="w", study_id=study_id, datetime_start=time(1))
            batch = log.exchange([new], cursor, Wanted(waiting_of=frozenset({study_id})))
            assert batch.outcomes is not None
            trial_id = batch.outcomes[0].id
            batch = log.exchange(
                [param(trial_id, "x"), tell(trial_id, 1.0)], batch.cursor, NOTHING
            )
            cursor = batch.cursor
        log.close()
        answers.put("done")
    except BaseException as error:
        answers.put(repr(error))


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_processes_on_one_study(kind: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    one = Model(url)
    study_id = one.study()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    args = (url, study_id, 10, answers)
    children = [context.Process(target=_work, args=args) for _ in range(16)]
    for child in children:
        child.start()
    assert [answers.get(timeout=200) for _ in children] == ["done"] * 16
    for child in children:
        child.join()
    trials = one.read(study_id)
    assert [x.number for x in trials] == list(range(160))
    assert {x.state for x in trials} == {r.COMPLETE}


def test_two_durable_commits_a_trial_on_sqlite(tmp_path: Path) -> None:
    one = Model(new_database("sqlite", tmp_path))
    study_id = one.study()
    before = one.log.connection.durable_commits
    trial_id = one.trial(study_id)
    one.do(param(trial_id, "x"))
    one.do(trials={trial_id})
    one.do(tell(trial_id, 1.0))
    assert one.log.connection.durable_commits - before == 2
    raw = one.log.connection.session().raw
    assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_an_existing_file_keeps_its_journal_mode(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "old.db"
    raw = sqlite3.connect(path)
    raw.execute("CREATE TABLE mine (x)")
    raw.commit()
    raw.close()
    log = TablesLog(f"sqlite:///{path}")
    assert log.connection.session().raw.execute("PRAGMA journal_mode").fetchone() == ("delete",)


@pytest.mark.parametrize("kind", KINDS)
def test_another_version_is_refused_with_what_to_run(kind: str, tmp_path: Path) -> None:
    import sqlalchemy as sa

    url = new_database(kind, tmp_path)
    log = TablesLog(url)
    for version, advice in (("v3.0.0.d", "storage upgrade"), ("v9.9.9.a", "pip install -U")):
        with log.engine.begin() as connection:
            connection.execute(sa.text(f"UPDATE alembic_version SET version_num='{version}'"))
        with pytest.raises(RuntimeError, match=advice):
            TablesLog(url)
        TablesLog(url, skip_compatibility_check=True).close()


@pytest.mark.parametrize("kind", DRIVERS[:2])
def test_ids_that_the_sequence_does_not_know_of_are_passed_over(kind: str, tmp_path: Path) -> None:
    """As after rows were copied with their ids. Each attempt fails and takes the next id; those
    that fail step by step make psycopg lose what it has prepared."""
    url = new_database(kind, tmp_path)
    one = Model(url)
    study_id = one.study()
    for _ in range(7):
        one.trial(study_id)
    with one.log.engine.begin() as connection:
        connection.exec_driver_sql("SELECT setval('trials_trial_id_seq', 1, false)")
    with contextlib.closing(RDBStorage(url)) as storage:
        write(storage, "new")
        new_id = storage.get_study_id_from_name("new")
        assert [x.number for x in storage.get_all_trials(new_id)] == list(range(6))
        assert [x.number for x in storage.get_all_trials(study_id)] == list(range(7))


_FAIL_TWICE = {
    "psycopg": """
        CREATE SEQUENCE tries;
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF nextval('tries') <= 2 THEN RAISE EXCEPTION 'test' USING ERRCODE = '{code}'; END IF;
            RETURN NEW; END $$;
        CREATE TRIGGER fails BEFORE INSERT ON trials FOR EACH ROW EXECUTE FUNCTION fail();
    """,
    "pymysql": """
        CREATE TABLE tries (n INT) ENGINE = MyISAM;
        INSERT INTO tries VALUES (0);
        CREATE TRIGGER fails BEFORE INSERT ON trials FOR EACH ROW BEGIN
            UPDATE tries SET n = n + 1;
            IF (SELECT n FROM tries) <= 2 THEN
                SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {code}, MESSAGE_TEXT = 'test';
            END IF; END;
    """,
}
_FAIL_TWICE["psycopg2"] = _FAIL_TWICE["psycopg"]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        pytest.param(kind, code, marks=pytest.mark.servers, id=f"{kind}-{code}")
        for kind, codes in (
            ("psycopg", ("40P01", "40001", "55P03")),
            ("psycopg2", ("40P01", "40001")),
            ("pymysql", ("1213", "1205", "1047")),
        )
        for code in codes
    ],
)
@pytest.mark.parametrize("stepwise", [False, True])
def test_a_deadlock_or_a_serialization_failure_is_tried_again(
    kind: str, code: str, stepwise: bool, tmp_path: Path
) -> None:
    """Raised by the server itself, twice."""
    one = Model(new_database(kind, tmp_path), clock=SteppingClock())
    study_id = one.study()
    running = one.trial(study_id)
    cursor = one.log.connection.session().raw.cursor()
    cursor.execute(_FAIL_TWICE[kind].format(code=code))
    while kind == "pymysql" and cursor.nextset():
        pass
    new = r.CreateTrial(worker_id="w", study_id=study_id, datetime_start=time(1))
    pair = {"params": {(study_id, "x")}} if stepwise else {}
    outcomes = one.do(param(running, "x"), new, tell(running, 1.0), **pair)
    assert verdicts(outcomes) == ["ACCEPTED"] * 3
    assert [x.number for x in one.read(study_id)] == [0, 1]


def test_a_locked_sqlite_file_is_tried_again(tmp_path: Path) -> None:
    import sqlite3

    class ReleasingClock(SteppingClock):
        def sleep(self, duration_s: float) -> None:
            super().sleep(duration_s)
            if self.time_s > 1.0:
                theirs.rollback()

    url = new_database("sqlite", tmp_path)
    options = {"engine_kwargs": {"connect_args": {"timeout": 0.001}}}
    one = Model(url, clock=ReleasingClock(), **options)
    study_id = one.study()
    theirs = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    theirs.execute("BEGIN IMMEDIATE")
    one.trial(study_id)
    theirs.execute("BEGIN IMMEDIATE")
    two = Model(url, clock=SteppingClock(), **options)
    with pytest.raises(LogUnavailableError, match="locked"):
        two.do(r.CreateTrial(worker_id="w", study_id=study_id, datetime_start=time(1)))
    theirs.rollback()
    assert [x.number for x in one.read(study_id)] == [0]
