"""Servers that are killed: the log tells what became of their clients' calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import itertools
from pathlib import Path
import pickle
import threading
import time
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest
import sqlalchemy as sa

from grpc_servers import KillableServer, open_grpc
from servers import new_database
from trialstore import records as r
from trialstore.errors import LogUnavailableError
from trialstore.log import NOTHING, START, Mark, MarkTakenError, Wanted
from trialstore.logs.grpc.judged import JudgedShare
from trialstore.logs.grpc.payload import digest
from trialstore.logs.grpc.share import Answer, Request
from trialstore.logs.relational import callers, tables as t
from trialstore.logs.relational.log import TablesLog
from trialstore.records import ACCEPTED, Outcome, Verdict
from trialstore.storage import Storage
from trialstore.testing.proxy import CountingProxy

_SERVERS = [
    pytest.param(kind, marks=pytest.mark.servers) for kind in ("psycopg", "psycopg2", "pymysql")
]
_KINDS = ["sqlite", *_SERVERS]
_DEADLINE_S = 120.0


# --- a server that dies between the commit and its reply -----------------------------------------


class _Mortal:
    """A server that is killed in the middle of a write whenever told so, and what comes after it:
    the same server again, or another one over the same database."""

    def __init__(self, url: str, folder: Path, successor: str) -> None:
        self._order = folder / "die"
        self._servers = [KillableServer(url, dies_by=self._order)]
        if successor == "another":
            self._servers.append(KillableServer(url, dies_by=self._order))
        self._proxy = CountingProxy("127.0.0.1", self._servers[0].port).start()
        self.n_deaths = 0

    def open(self) -> Storage:
        return open_grpc(
            self._proxy.port, linger_s=0.0, call_timeout_s=5.0, retry_deadline_s=600.0
        )

    def dying(self, write: Callable[[], Any]) -> Any:
        """What a write returns whose first answer was lost with its server."""
        self._order.touch()
        follower = threading.Thread(target=self._follow)
        follower.start()
        try:
            return write()
        finally:
            follower.join()
            assert not self._order.exists(), "nobody died"

    def _follow(self) -> None:
        dying = self._servers[0]
        dying.process.join(_DEADLINE_S)
        assert dying.process.exitcode == -9
        self.n_deaths += 1
        self._servers.append(self._servers.pop(0))
        if len(self._servers) == 1:
            dying.start()
        self._proxy._target = ("127.0.0.1", self._servers[0].port)
        self._proxy.sever()
        if len(self._servers) > 1:
            dying.start(wait=False)  # for the next time

    def close(self) -> None:
        self._proxy.stop()
        for server in self._servers:
            server.kill()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("successor", ["the same", "another"])
@pytest.mark.parametrize("kind", _KINDS)
def test_a_write_whose_answer_died_with_its_server_is_applied_once(
    kind: str, successor: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    long = request.config.getoption("--soak")
    if successor == "the same" and kind != "sqlite" and not long:
        pytest.skip("what comes after it knows no more of it than another server; see --soak")
    mortal = _Mortal(new_database(kind, tmp_path), tmp_path, successor)
    with contextlib.closing(mortal), contextlib.closing(mortal.open()) as storage:
        sometimes = mortal.dying if long else lambda write: write()
        study_id = mortal.dying(
            lambda: storage.create_new_study([StudyDirection.MINIMIZE], "mine")
        )
        running = sometimes(lambda: storage.create_new_trial(study_id))
        template = optuna.trial.create_trial(state=TrialState.WAITING)
        # Of which nothing but a mark tells that it is this very one.
        storage.create_new_trial(study_id, template)
        queued = mortal.dying(lambda: storage.create_new_trial(study_id, template))
        assert sometimes(lambda: storage.set_trial_state_values(queued, TrialState.RUNNING))
        storage.set_trial_param(running, "x", 0.5, FloatDistribution(0.0, 1.0))
        assert mortal.dying(
            lambda: storage.set_trial_state_values(running, TrialState.COMPLETE, [1.0])
        )
        assert mortal.n_deaths == (5 if long else 3)
        trials = storage.get_all_trials(study_id)
        states = [TrialState.COMPLETE, TrialState.WAITING, TrialState.RUNNING]
        assert [trial.state for trial in trials] == states
        assert [trials[0]._trial_id, trials[2]._trial_id] == [running, queued]
        assert (trials[0].values, trials[0].params) == ([1.0], {"x": 0.5})


# --- who comes after a server, without one -------------------------------------------------------


class _Log:
    """Tables, and shares over them as if servers came and went."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.log = TablesLog(new_database(kind, folder))
        self._shares: list[JudgedShare] = []
        self._numbers = itertools.count(1)

    def share(self) -> JudgedShare:
        copy = self.copy
        self._shares.append(JudgedShare(copy(), copy, n_copies_max=2))
        return self._shares[-1]

    def copy(self) -> TablesLog:
        copied: TablesLog = pickle.loads(pickle.dumps(self.log))
        return copied

    def request(self, *records: Any, cursor: bytes = b"", **more: Any) -> Request:
        number = more.pop("number", None) or next(self._numbers)
        return Request(list(records), cursor, NOTHING, sender="one", number=number, **more)

    def send(self, *records: Any, **more: Any) -> list[Outcome]:
        return _outcomes(self.share().exchange(self.request(*records, **more)))

    def trials(self, study_id: int) -> list[r.PutTrial]:
        wanted = Wanted(trials_of=frozenset((study_id,)))
        news = self.log.exchange((), START, wanted).news
        return [one for one in news if isinstance(one, r.PutTrial)]

    def close(self) -> None:
        for share in self._shares:
            share.close()
        self.log.close()


@pytest.fixture(params=_KINDS)
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[_Log]:
    with contextlib.closing(_Log(request.param, tmp_path)) as made:
        yield made


def _outcomes(answer: Answer) -> list[Outcome]:
    return list(answer.outcomes or ())


def _study(name: str = "s", seq: int = 0) -> r.CreateStudy:
    return r.CreateStudy(worker_id="w", seq=seq, study_name=name, directions=[1])


def _create(seq: int, study_id: int, **more: Any) -> r.CreateTrial:
    return r.CreateTrial(
        worker_id="w", seq=seq, study_id=study_id, datetime_start=r.now_text(), **more
    )


def _tell(seq: int, trial_id: int, value: float = 1.0, worker: str = "w") -> r.SetTrialStateValues:
    return r.SetTrialStateValues(
        worker_id=worker,
        seq=seq,
        trial_id=trial_id,
        state=r.COMPLETE,
        values=[value],
        datetime_complete=r.now_text(),
    )


def test_another_server_tells_every_outcome_that_the_first_one_told(tables: _Log) -> None:
    (study,) = tables.send(_study())
    batches: list[list[Any]] = [
        [_create(1, study.id), _create(2, study.id), _create(3, 987)],
        [_study("other", 4)],
        [_study("s", 5)],
        [r.SetStudyUserAttr(worker_id="w", seq=6, study_id=study.id, user_attr={"k": 1})],
    ]
    told = []
    for batch in batches:
        request = tables.request(*batch)
        told.append(_outcomes(tables.share().exchange(request)))
        assert _outcomes(tables.share().exchange(request._replace(again=True))) == told[-1]
    verdicts = [[one.verdict for one in outcomes] for outcomes in told]
    assert verdicts == [
        [Verdict.ACCEPTED, Verdict.ACCEPTED, Verdict.NO_STUDY],
        [Verdict.ACCEPTED],
        [Verdict.DUPLICATED_STUDY],
        [Verdict.ACCEPTED],
    ]
    first = told[0][0].id
    attr = r.SetTrialUserAttr(worker_id="w", seq=7, trial_id=first, user_attr={"k": 1})
    finishing = tables.request(attr, _tell(8, first), _tell(9, first, 2.0))
    outcomes = _outcomes(tables.share().exchange(finishing))
    assert [one.verdict for one in outcomes] == [*[Verdict.ACCEPTED] * 2, Verdict.FINISHED]
    assert _outcomes(tables.share().exchange(finishing._replace(again=True))) == outcomes
    assert [trial.trial_id for trial in tables.trials(study.id)] == [one.id for one in told[0][:2]]


def test_what_was_appended_on_a_condition_is_not_refused_when_it_comes_again(
    tables: _Log,
) -> None:
    (study,) = tables.send(_study())
    wanted = Wanted(trials_of=frozenset((study.id,)))
    cursor = tables.share().exchange(Request([], b"", wanted)).cursor
    request = tables.request(_create(1, study.id), cursor=cursor, expected=digest((), wanted))
    request = request._replace(wanted=wanted)
    first = tables.share().exchange(request)
    # The condition does not hold any more, because of this very record.
    again = tables.share().exchange(request._replace(again=True))
    assert not first.refused and not again.refused
    assert _outcomes(again) == _outcomes(first)
    assert [trial.trial_id for trial in tables.trials(study.id)] == [_outcomes(first)[0].id]


def test_a_deletion_that_was_carried_out_is_not_refused_when_it_comes_again(tables: _Log) -> None:
    (study,) = tables.send(_study())
    delete = tables.request(r.DeleteStudy(worker_id="w", seq=1, study_id=study.id))
    for again in (False, True):
        answer = tables.share().exchange(delete._replace(again=again))
        assert _outcomes(answer) == [ACCEPTED]


def test_an_attempt_that_arrives_after_its_repetition_is_turned_away(tables: _Log) -> None:
    (study,) = tables.send(_study())
    late = tables.request(_create(1, study.id))
    tables.share().exchange(late._replace(again=True))
    (created,) = tables.trials(study.id)
    # The same, at a server that has not seen it: what is there already is its outcome.
    assert _outcomes(tables.share().exchange(late))[0].id == created.trial_id
    tables.send(_create(2, study.id))
    # Its client has gone on since; nobody waits for this one.
    with pytest.raises(LogUnavailableError):
        tables.share().exchange(late)
    assert len(tables.trials(study.id)) == 2


def test_what_was_given_up_and_is_sent_again_with_more_is_not_refused_by_its_own_end(
    tables: _Log,
) -> None:
    (study,) = tables.send(_study())
    (created,) = tables.send(_create(1, study.id))
    attr = r.SetTrialUserAttr(worker_id="w", seq=2, trial_id=created.id, user_attr={"k": 1})
    tables.send(attr)  # the answer is lost, and the client gives up
    both = tables.request(attr, _tell(3, created.id), again=True)
    assert _outcomes(tables.share().exchange(both)) == [ACCEPTED] * 2
    # That answer is lost as well. The attribute could not be written any more.
    assert _outcomes(tables.share().exchange(both)) == [ACCEPTED] * 2


@pytest.mark.parametrize("kind", _SERVERS)
def test_a_transaction_that_is_still_under_way_is_waited_for_or_turned_away(
    kind: str, tmp_path: Path
) -> None:
    """The server that began it is dead; what it has sent runs on in the database."""
    with contextlib.closing(_Log(kind, tmp_path)) as tables:
        (study,) = tables.send(_study())
        request = tables.request(_create(1, study.id))
        orphan = tables.copy()
        taken: list[Any] = []

        def run() -> None:
            try:
                with orphan.marking([Mark("one", request.number, 0, 1)]):
                    taken.append(orphan.exchange(request.records, START, NOTHING))
            except MarkTakenError as error:
                taken.append(error)

        with tables.log.engine.connect() as blocker:
            # It waits for the study's row, before it has touched its mark.
            lock = sa.select(t.studies.c.study_id).where(t.studies.c.study_id == study.id)
            blocker.execute(lock.with_for_update())
            thread = threading.Thread(target=run)
            thread.start()
            successor = tables.copy()
            assert successor.recall("one", request.number, request.records) == {}
            answers: list[Any] = []
            share = tables.share()
            repeating = threading.Thread(
                target=lambda: answers.append(share.exchange(request._replace(again=True)))
            )
            repeating.start()
            time.sleep(0.2)  # either may be first at the lock; both are right
            blocker.rollback()
        thread.join()
        repeating.join()
        (trial,) = tables.trials(study.id)
        assert _outcomes(answers[0])[0].id == trial.trial_id
        assert len(taken) == 1
        orphan.close()
        successor.close()


def test_each_client_of_a_shared_exchange_has_its_own_mark(tables: _Log) -> None:
    (study,) = tables.send(_study())
    records = [_create(n, study.id) for n in range(5)]
    marks = [Mark(f"c{n}", 1, n, n + 1) for n in range(5)]
    with contextlib.closing(tables.copy()) as log, log.marking(marks):
        outcomes = log.exchange(records, START, NOTHING).outcomes or ()
    with contextlib.closing(tables.copy()) as other:
        for n in range(5):
            assert other.recall(f"c{n}", 1, [records[n]]) == {0: outcomes[n]}


def test_marks_that_nobody_can_ask_for_any_more_are_removed(tables: _Log) -> None:
    (study,) = tables.send(_study())
    tables.send(_create(1, study.id))
    mine = sa.func.substr(t.sessions.c.session_id, 1, len(callers.PREFIX)) == callers.PREFIX
    count = sa.select(sa.func.count()).where(mine)
    with tables.log.engine.begin() as connection:
        assert connection.scalar(count) == 1
        old = tables.log._dialect.days_ago(callers.DAYS_MAX + 1)
        connection.execute(sa.update(t.sessions).where(mine).values(updated_at=old))
    late = tables.copy()
    assert late.recall("another", 1, []) == {}
    late.close()
    with tables.log.engine.begin() as connection:
        assert connection.scalar(count) == 1  # that of the one who has just asked


def test_where_no_table_may_be_made_a_repetition_is_known_by_what_it_did(tmp_path: Path) -> None:
    url = new_database("sqlite", tmp_path)
    TablesLog(url).close()
    log = TablesLog(url, skip_table_creation=True)
    create = _create(1, 1)
    shares = [JudgedShare(log, lambda: log, n_copies_max=1) for _ in range(3)]
    for share, record in zip(shares, (_study(), create, create), strict=True):
        again = share is shares[-1]
        request = Request([record], b"", NOTHING, sender="one", number=record.seq + 1, again=again)
        (outcome,) = _outcomes(share.exchange(request))
        assert outcome == Outcome(Verdict.ACCEPTED, 1)
    with log.engine.connect() as connection:
        assert not sa.inspect(connection).has_table(t.sessions.name)
    log.close()
