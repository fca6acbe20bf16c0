"""Clients that go together in one exchange: each gets its own, and is spared others' errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import itertools
from pathlib import Path
import pickle
import random
import threading
import time
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
import pytest

from servers import new_database
from trialstore import records as r
from trialstore.errors import LogUnavailableError
from trialstore.log import NOTHING, START, Batch, Cursor, Wanted
from trialstore.logs.grpc.judged import JudgedShare
from trialstore.logs.grpc.share import Answer, Request, unpacked
from trialstore.logs.grpc.sharing import ShareLog
from trialstore.logs.grpc.turns import Turns, Waiting
from trialstore.logs.relational.log import TablesLog
from trialstore.records import Verdict
from trialstore.storage import Storage
from trialstore.testing.contents import study_contents
from trialstore.testing.counting import CountingLog

pytestmark = pytest.mark.servers

_WAIT_S = 60.0


class _GatedLog(CountingLog):
    """Holds the next exchange until it is let through, and fails the one after as it is told."""

    def __init__(self, inner: TablesLog) -> None:
        super().__init__(inner)
        self.holds = threading.Event()
        self.held = threading.Event()
        self.go_on = threading.Event()
        self.fails_after = False

    def exchange(self, records: Any, cursor: Cursor, wanted: Wanted) -> Batch:
        if self.holds.is_set():
            self.holds.clear()
            self.held.set()
            assert self.go_on.wait(_WAIT_S)
            return super().exchange(records, cursor, wanted)
        batch = super().exchange(records, cursor, wanted)
        if self.fails_after and len(records) > 1:
            self.fails_after = False
            raise RuntimeError("something that nobody has thought of")
        return batch


class _Clients:
    """Clients of one study on one share; ``together`` sends while an exchange is on its way."""

    def __init__(self, tmp_path: Path) -> None:
        self.log = _GatedLog(TablesLog(new_database("psycopg", tmp_path)))
        self.share = JudgedShare(self.log, lambda: self.log, n_copies_max=1)
        self._seqs = itertools.count()
        study = r.CreateStudy(worker_id="w", seq=0, study_name="s", directions=[1])
        (outcome,) = self.send([study]).outcomes or ()
        self.study_id = outcome.id
        self.cursor = self.send([], wanted=Wanted(studies=frozenset((self.study_id,)))).cursor

    def send(
        self, records: list[Any], wanted: Wanted = NOTHING, cursor: bytes = b"", **more: Any
    ) -> Answer:
        return self.share.exchange(Request(records, cursor, wanted, **more))

    def create(self, worker: int, seq: int = 0) -> r.CreateTrial:
        return r.CreateTrial(
            worker_id=f"w{worker}", seq=seq, study_id=self.study_id, datetime_start=r.now_text()
        )

    def together(self, requests: list[Request]) -> list[Answer | Exception]:
        """What each gets; the requests wait while another client's trial is created."""
        answers: dict[int, Answer | Exception] = {}

        def ask(index: int, request: Request) -> None:
            try:
                answers[index] = self.share.exchange(request)
            except Exception as error:
                answers[index] = error

        held = Request([self.create(0, next(self._seqs))], self.cursor, NOTHING)
        lane: Any = self.share._lane_for(held)
        self.log.held.clear()
        self.log.go_on.clear()
        self.log.holds.set()
        threads = [threading.Thread(target=ask, args=(-1, held))]
        threads[0].start()
        assert self.log.held.wait(_WAIT_S)
        for index, request in enumerate(requests):
            threads.append(threading.Thread(target=ask, args=(index, request)))
            threads[-1].start()
            give_up_at = time.monotonic() + _WAIT_S
            while len(lane._turns._gathered) <= index and time.monotonic() < give_up_at:
                time.sleep(0.001)
        self.log.reset()
        self.log.go_on.set()
        for thread in threads:
            thread.join()
        return [answers[index] for index in range(len(requests))]

    def trials(self) -> list[r.PutTrial]:
        wanted = Wanted(trials_of=frozenset((self.study_id,)))
        return [
            one for one in self.log.inner.exchange((), START, wanted).news
            if isinstance(one, r.PutTrial)
        ]  # fmt: skip


@pytest.fixture
def clients(tmp_path: Path) -> Iterator[_Clients]:
    made = _Clients(tmp_path)
    yield made
    made.share.close()


def _outcomes(answer: Answer | Exception) -> list[r.Outcome]:
    assert isinstance(answer, Answer), answer
    return list(answer.outcomes or ())


def test_who_waits_for_an_exchange_goes_with_the_next_one(clients: _Clients) -> None:
    looks = Request([], clients.cursor, Wanted(next_of=frozenset((clients.study_id,))))
    requests = [Request([clients.create(n)], clients.cursor, NOTHING) for n in range(1, 6)]
    answers = clients.together([*requests, looks])
    # The held one, and one for all the others.
    assert [len(records) for records in clients.log.appended] == [1, 5]
    created = [_outcomes(answer)[0].id for answer in answers[:5]]
    assert len(set(created)) == 5
    for answer, trial_id in zip(answers, created, strict=False):
        assert isinstance(answer, Answer)
        (image,) = unpacked(answer.news)
        assert isinstance(image, r.PutTrial)
        assert image.trial_id == trial_id
    assert isinstance(answers[5], Answer) and list(answers[5].news) == []
    assert [trial.number for trial in clients.trials()] == list(range(6))


def test_what_one_can_t_have_kept_fails_nobody_else_s(clients: _Clients) -> None:
    first_of_all = Request([clients.create(1)], clients.cursor, NOTHING)
    (created,) = _outcomes(clients.together([first_of_all])[0])
    bad = r.SetTrialUserAttr(worker_id="w1", seq=1, trial_id=created.id, user_attr={"k\0": 1})
    requests = [
        Request([clients.create(2)], clients.cursor, NOTHING),
        Request([bad], clients.cursor, NOTHING),
        Request([clients.create(3)], clients.cursor, NOTHING),
    ]
    first, refused, last = clients.together(requests)
    assert isinstance(refused, ValueError)
    assert {_outcomes(first)[0].verdict, _outcomes(last)[0].verdict} == {Verdict.ACCEPTED}
    assert [trial.number for trial in clients.trials()] == list(range(5))


def test_after_an_error_nobody_has_foreseen_nothing_is_written_twice(clients: _Clients) -> None:
    clients.log.fails_after = True
    requests = [Request([clients.create(n)], clients.cursor, NOTHING) for n in range(1, 5)]
    answers = clients.together(requests)
    created = {_outcomes(answer)[0].id for answer in answers}
    assert created == {trial.trial_id for trial in clients.trials()[1:]}
    assert len(clients.trials()) == 5


def test_who_has_given_up_is_left_out(clients: _Clients) -> None:
    gone = Request([clients.create(1)], clients.cursor, NOTHING, is_alive=lambda: False)
    error, answer = clients.together([gone, Request([clients.create(2)], clients.cursor, NOTHING)])
    assert isinstance(error, LogUnavailableError)
    assert _outcomes(answer)[0].verdict == Verdict.ACCEPTED
    assert len(clients.trials()) == 2


def test_a_repetition_has_the_outcome_of_the_exchange_it_shared(clients: _Clients) -> None:
    requests = [Request([clients.create(n)], clients.cursor, NOTHING) for n in range(1, 4)]
    answers = clients.together(requests)
    for request, answer in zip(requests, answers, strict=True):
        again = clients.share.exchange(request._replace(again=True))
        assert list(again.outcomes or ()) == _outcomes(answer)
        (image,) = [one for one in unpacked(again.news) if isinstance(one, r.PutTrial)]
        assert image.trial_id == _outcomes(answer)[0].id
    # By a server that was killed meanwhile.
    clients.share = JudgedShare(clients.log, lambda: clients.log, n_copies_max=1)
    for request, answer in zip(requests, answers, strict=True):
        again = clients.share.exchange(request._replace(again=True))
        assert list(again.outcomes or ()) == _outcomes(answer)
    assert len(clients.trials()) == 4


def test_the_loser_of_a_race_within_an_exchange_is_told_so(clients: _Clients) -> None:
    first_of_all = Request([clients.create(1)], clients.cursor, NOTHING)
    (created,) = _outcomes(clients.together([first_of_all])[0])

    def tell(worker: int, value: float) -> r.SetTrialStateValues:
        return r.SetTrialStateValues(
            worker_id=f"w{worker}", seq=1, trial_id=created.id, state=r.COMPLETE, values=[value],
            datetime_complete=r.now_text(),
        )  # fmt: skip

    answers = clients.together(
        [Request([tell(n, float(n))], clients.cursor, NOTHING) for n in (1, 2)]
    )
    verdicts = [_outcomes(answer)[0].verdict for answer in answers]
    assert verdicts == [Verdict.ACCEPTED, Verdict.FINISHED]
    assert clients.trials()[1].values == [1.0]


# --- what a client is told by and by -------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_clients_of_a_lane_read_what_is_in_the_tables(seed: int, tmp_path: Path) -> None:
    """Whatever some of them do, all of them read the same as one who reads the tables anew."""
    log = TablesLog(new_database("psycopg", tmp_path))
    share = JudgedShare(log, lambda: pickle.loads(pickle.dumps(log)), n_copies_max=2)
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:
        storages = [
            stack.enter_context(contextlib.closing(Storage(ShareLog(share), linger_s=0.0)))
            for _ in range(3)
        ]
        outside = stack.enter_context(
            contextlib.closing(Storage(pickle.loads(pickle.dumps(log)), linger_s=0.0))
        )
        study_id = outside.create_new_study([StudyDirection.MINIMIZE], "s")
        for _ in range(120):
            _do_something(rng, rng.choice([*storages, outside]), study_id)
            mine, fresh = rng.choice(storages), Storage(pickle.loads(pickle.dumps(log)))
            with contextlib.closing(fresh):
                _LOOKS[rng.randrange(len(_LOOKS))](rng, mine, fresh, study_id)
        for storage in storages:
            assert study_contents(storage, study_id) == study_contents(outside, study_id)
        outside.delete_study(study_id)
        for storage in storages:
            with pytest.raises(KeyError):
                storage.get_all_trials(study_id, states=(TrialState.WAITING,))
            with pytest.raises(KeyError):
                storage.create_new_trial(study_id)


def _do_something(rng: random.Random, storage: Storage, study_id: int) -> None:
    trials = storage.get_all_trials(study_id) if rng.random() < 0.3 else []
    what = rng.randrange(5)
    if what == 0:
        storage.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
    elif what == 1:
        storage.set_study_user_attr(study_id, "k", rng.random())
    elif what == 2 and trials:
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            trial = rng.choice(trials)
            storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    else:
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_param(trial_id, "x", rng.random(), FloatDistribution(0.0, 1.0))
        if rng.random() < 0.7:
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [rng.random()])


def _look_at_queue(rng: random.Random, mine: Storage, fresh: Storage, study_id: int) -> None:
    queued = (TrialState.WAITING,)
    assert mine.get_all_trials(study_id, states=queued) == fresh.get_all_trials(
        study_id, states=queued
    )


def _look_at_trial(rng: random.Random, mine: Storage, fresh: Storage, study_id: int) -> None:
    trials = fresh.get_all_trials(study_id)
    if trials:
        trial = rng.choice(trials)
        assert mine.get_trial(trial._trial_id) == trial


def _look_at_all(rng: random.Random, mine: Storage, fresh: Storage, study_id: int) -> None:
    if rng.random() < 0.2:
        assert study_contents(mine, study_id) == study_contents(fresh, study_id)


_LOOKS: list[Callable[[random.Random, Storage, Storage, int], None]] = [
    _look_at_queue,
    _look_at_queue,
    _look_at_trial,
    _look_at_all,
]


# --- turns ---------------------------------------------------------------------------------------


def test_each_of_many_threads_has_its_turn_and_whoever_wants_to_be_alone_is() -> None:
    at_work, n_alone, n_led = threading.Lock(), 0, 0

    def lead(all_of_them: Any) -> None:
        nonlocal n_led
        assert at_work.acquire(blocking=False)
        n_led += 1
        for one in all_of_them:
            one.answer = "told"
        at_work.release()

    turns: Turns[Waiting] = Turns(lead)

    def work(number: int) -> None:
        nonlocal n_alone
        for _ in range(200):
            assert turns.take(Waiting()) == "told"
            if number == 0:
                with turns.alone():
                    assert at_work.acquire(blocking=False)
                    n_alone += 1
                    at_work.release()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert n_alone == 200
    assert 200 <= n_led <= 1600


def test_a_leader_that_fails_fails_for_all_it_has_taken() -> None:
    def lead(all_of_them: Any) -> None:
        raise KeyError("lead")

    turns: Turns[Waiting] = Turns(lead)
    for _ in range(2):  # the turn is passed on
        with pytest.raises(KeyError, match="lead"):
            turns.take(Waiting())
