"""The journal in Redis while answers are lost, servers die, and writers stop half-way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
import contextlib
import itertools
import math
import multiprocessing
import os
from pathlib import Path
import threading
import time
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

from redis_servers import OptionsServer, new_prefix, shared_cluster
from servers import RedisServer, find_binary, shared_redis
import trialstore
from trialstore import records as r
from trialstore.clock import Clock
from trialstore.errors import LogCorruptError, LogUnavailableError, OutcomeUnknownError
from trialstore.log import NOTHING, START
from trialstore.logs.redis import RedisLog
from trialstore.logs.redis.doors import settings_of
from trialstore.testing.contents import storage_contents
from trialstore.testing.faults import CountingProxy, ManualClock
from trialstore.testing.follower import Follower

redis = pytest.importorskip("redis")

pytestmark = [
    pytest.mark.servers,
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]

_DEADLINE_S = 240.0


def _study(seq: int, worker_id: str = "w") -> r.CreateStudy:
    return r.CreateStudy(
        study_name=f"{worker_id}-{seq}", directions=[1], worker_id=worker_id, seq=seq
    )


def _seqs(log: RedisLog, worker_id: str = "w") -> list[int]:
    """The sequence numbers of a worker's records, in log order."""
    news: Sequence[Any] = log.exchange([], START, NOTHING).news
    return [record.seq for record in news if record.worker_id == worker_id]


class _LossyDoor:
    """Passes everything on, and lets a test decide about each request.

    Args:
        inner: The real one.
        rule: Gets what would send the request; sends it, or not, and returns or raises.
    """

    def __init__(self, inner: Any, rule: Callable[[Callable[[], Any]], Any]) -> None:
        self._inner = inner
        self._rule = rule

    def command(self, *args: Any) -> Any:
        return self._rule(lambda: self._inner.command(*args))

    def pipeline(self, commands: Any) -> Any:
        return self._rule(lambda: self._inner.pipeline(commands))

    def ask_each(self, ask: Callable[[Any], Any]) -> Any:
        if ask is settings_of:  # as part of opening
            return self._inner.ask_each(ask)
        return self._rule(lambda: self._inner.ask_each(ask))

    def close(self) -> None:
        self._inner.close()


class _LossyLog(RedisLog):
    rule: Any = staticmethod(lambda send: send())

    def _begin(self) -> None:
        super()._begin()
        open_door = self._connection.open_door
        self._connection.open_door = lambda: _LossyDoor(  # type: ignore[method-assign]
            open_door(), lambda send: self.rule(send)
        )


def _drop_instead_of_closing(log: RedisLog) -> None:
    connection = log._connection
    connection.hang_up = lambda: setattr(connection, "door", None)  # type: ignore[method-assign]


class _Where:
    def __init__(self, url: str, use_cluster: bool, prefix: str) -> None:
        self.args = (url, use_cluster, prefix)

    def open(self, **options: Any) -> RedisLog:
        return RedisLog(*self.args, **options)

    def lossy(self, rule: Any = None, **options: Any) -> _LossyLog:
        log = _LossyLog(*self.args, **options)
        if rule is not None:
            log.rule = rule
        return log


_KINDS: dict[str, Callable[[], _Where]] = {
    "standalone": lambda: _Where(shared_redis().url, False, new_prefix()),
    "cluster-hash-tag": lambda: _Where(shared_cluster().url, True, new_prefix("{p%d}")),
    "cluster-plain-prefix": lambda: _Where(shared_cluster().url, True, new_prefix()),
}


@pytest.fixture(params=list(_KINDS))
def where(request: pytest.FixtureRequest) -> _Where:
    return _KINDS[request.param]()


@pytest.fixture(params=["standalone", "cluster-hash-tag"])
def atomic(request: pytest.FixtureRequest) -> _Where:
    return _KINDS[request.param]()


@pytest.fixture
def slots() -> _Where:
    return _KINDS["cluster-plain-prefix"]()


@pytest.fixture
def proxy() -> Iterator[CountingProxy]:
    server = shared_redis()
    with CountingProxy("127.0.0.1", server.port) as proxy:
        yield proxy


# --- lost answers --------------------------------------------------------------------------------


def test_every_answer_lost_one_by_one_over_a_real_connection(proxy: CountingProxy) -> None:
    for k in itertools.count(1):
        prefix = new_prefix()
        log = RedisLog(f"redis://127.0.0.1:{proxy.port}", prefix=prefix)
        proxy.cut_at_reply(k)
        cursor = START
        for first in range(0, 9, 3):
            batch = log.exchange([_study(first + n) for n in range(3)], cursor, NOTHING)
            cursor = batch.cursor
        assert _seqs(RedisLog(shared_redis().url, prefix=prefix)) == list(range(9)), f"answer {k}"
        if not proxy.was_cut:
            break
    assert k > 3


def test_every_answer_lost_one_by_one(where: _Where) -> None:
    for k in itertools.count(1):
        worker = f"w{k}"
        calls = itertools.count(1)
        was_lost = False

        def lose(send: Callable[[], Any], calls: Any = calls, k: int = k) -> Any:
            nonlocal was_lost
            answer = send()
            if next(calls) == k:
                was_lost = True
                raise redis.ConnectionError("the test lost this answer")
            return answer

        # A reservation whose answer is lost leaves a hole, which takes its wait.
        log = where.lossy(lose, clock=ManualClock())
        cursor = START
        for first in range(0, 9, 3):
            records = [_study(first + n, worker) for n in range(3)]
            cursor = log.exchange(records, cursor, NOTHING).cursor
        assert _seqs(where.open(), worker) == list(range(9)), f"answer {k}"
        if not was_lost:
            break
    assert k > 3


def test_a_storage_that_loses_an_answer_makes_no_ghost(proxy: CountingProxy) -> None:
    for k in itertools.count(1):
        prefix = new_prefix()
        storage = trialstore.JournalStorage(
            RedisLog(f"redis://127.0.0.1:{proxy.port}", prefix=prefix), linger_s=60
        )
        study = optuna.create_study(storage=storage, sampler=RandomSampler(seed=0))
        proxy.cut_at_reply(k)
        study.optimize(_objective, n_trials=3)
        there = trialstore.JournalStorage(RedisLog(shared_redis().url, prefix=prefix))
        (contents,) = storage_contents(there).values()
        assert [trial["state"] for trial in contents["trials"]] == ["COMPLETE"] * 3
        assert storage_contents(storage) == storage_contents(there)
        if not proxy.was_cut:
            break
    assert k > 10


def test_an_attempt_that_arrives_after_its_retry_changes_nothing(atomic: _Where) -> None:
    late: list[Callable[[], Any]] = []
    delays = iter([True])

    def delay(send: Callable[[], Any]) -> Any:
        if log._n_appends and next(delays, False):
            late.append(send)
            raise redis.TimeoutError("the test holds this request up")
        return send()

    class Log(_LossyLog):
        _n_appends = 0

        def _run_script(self, position: Any, lines: list[bytes], *rest: Any) -> Any:
            self._n_appends += bool(lines)
            return super()._run_script(position, lines, *rest)

    log = Log(*atomic.args)
    cursor = log.exchange([], START, NOTHING).cursor
    log.rule = delay
    # The delayed request keeps its own connection, as one in a server's buffer does.
    _drop_instead_of_closing(log)
    cursor = log.exchange([_study(0), _study(1)], cursor, NOTHING).cursor
    atomic.open().exchange([_study(0, "other")], START, NOTHING)
    (send,) = late
    send()
    assert _seqs(atomic.open()) == [0, 1]
    assert len(log.exchange([], cursor, NOTHING).news) == 1


def test_deferred_records_that_are_sent_again_are_stored_once(atomic: _Where) -> None:
    def lose(send: Callable[[], Any]) -> Any:
        send()
        raise redis.ConnectionError("the test lost this answer")

    log = atomic.lossy(clock=ManualClock())
    cursor = log.exchange([_study(0)], START, NOTHING).cursor
    log.rule = lose
    with pytest.raises(OutcomeUnknownError):
        log.exchange([_study(1), _study(2)], cursor, NOTHING)
    log.rule = lambda send: send()
    batch = log.exchange([_study(1), _study(3)], cursor, NOTHING)
    assert [record.seq for record in batch.news] == [1, 2, 3]  # type: ignore[union-attr]
    assert _seqs(atomic.open()) == [0, 1, 2, 3]


def test_an_answer_lost_while_others_write_thousands(standalone_pair: Any) -> None:
    where, busy = standalone_pair
    cursor = where.open().exchange([_study(0)], START, NOTHING).cursor
    once = iter([True])

    def lose(send: Callable[[], Any]) -> Any:
        answer = send()
        if answer is not None and next(once, False):
            busy.exchange([_study(n, "busy") for n in range(1500)], START, NOTHING)
            raise redis.ConnectionError("the test lost this answer")
        return answer

    log = where.lossy()
    log.exchange([], cursor, NOTHING)
    log.rule = lose
    batch = log.exchange([_study(1), _study(2)], cursor, NOTHING)
    assert Counter(record.worker_id for record in batch.news) == {"w": 2, "busy": 1500}
    assert _seqs(where.open()) == [0, 1, 2]


@pytest.fixture
def standalone_pair() -> tuple[_Where, RedisLog]:
    where = _KINDS["standalone"]()
    return where, where.open()


def test_optunas_storage_over_our_log_loses_an_answer(proxy: CountingProxy) -> None:
    for k in itertools.count(1):
        prefix = new_prefix()
        log = RedisLog(f"redis://127.0.0.1:{proxy.port}", prefix=prefix)
        log.read_logs(0)
        proxy.cut_at_reply(k)
        fields = {"op_code": 0, "worker_id": "o", "study_name": "s", "directions": [1]}
        for _ in range(2):
            log.append_logs([fields])  # equal twice, and not the same
        there = RedisLog(shared_redis().url, prefix=prefix).read_logs(0)
        assert len(there) == 2
        assert len({line["mark"] for line in there}) == 2
        if not proxy.was_cut:
            break
    assert k > 2


# --- servers that do not come back ---------------------------------------------------------------


def test_a_server_that_stays_away_is_unavailable_within_a_bound(proxy: CountingProxy) -> None:
    clock = ManualClock()
    log = RedisLog(f"redis://127.0.0.1:{proxy.port}", prefix=new_prefix(), clock=clock)
    cursor = log.exchange([_study(0)], START, NOTHING).cursor
    proxy.refuse()
    proxy.sever()
    with pytest.raises(LogUnavailableError):
        log.exchange([], cursor, NOTHING)
    assert 28 <= clock.slept_s <= 30
    proxy.refuse(False)
    assert log.exchange([_study(1)], cursor, NOTHING).news


def test_records_whose_answer_never_comes_have_an_unknown_outcome(proxy: CountingProxy) -> None:
    prefix = new_prefix()
    log = RedisLog(f"redis://127.0.0.1:{proxy.port}", prefix=prefix, clock=ManualClock())
    cursor = log.exchange([_study(0)], START, NOTHING).cursor
    proxy.cut_at_reply(1)
    proxy.refuse()
    with pytest.raises(OutcomeUnknownError, match="answer was lost"):
        log.exchange([_study(1)], cursor, NOTHING)
    assert _seqs(RedisLog(shared_redis().url, prefix=prefix)) == [0, 1]


@pytest.mark.parametrize("come_back_after_s", [1.0, math.inf])
def test_a_master_without_enough_replicas_is_waited_for(come_back_after_s: float) -> None:
    find_binary("redis-server")
    server = OptionsServer()
    client = redis.Redis(port=server.port)

    class Clock(ManualClock):
        def sleep(self, duration_s: float) -> None:
            super().sleep(duration_s)
            if self.slept_s >= come_back_after_s:
                client.config_set("min-replicas-to-write", 0)

    try:
        clock = Clock()
        log = RedisLog(server.url, clock=clock)
        cursor = log.exchange([_study(0)], START, NOTHING).cursor
        client.config_set("min-replicas-to-write", 1)
        if come_back_after_s == 1.0:
            log.exchange([_study(1)], cursor, NOTHING)
            assert clock.slept_s < 10
        else:
            with pytest.raises(LogUnavailableError, match="NOREPLICAS"):
                log.exchange([_study(1)], cursor, NOTHING)
            assert 28 <= clock.slept_s <= 30
        client.config_set("min-replicas-to-write", 0)
        assert _seqs(RedisLog(server.url)) == list(range(1 + (come_back_after_s == 1.0)))
    finally:
        client.close()
        server.remove()


@pytest.mark.parametrize("why", ["READONLY", "LOADING"])
def test_what_a_server_refuses_until_time_is_up_was_not_stored(why: str) -> None:
    kinds = redis.exceptions.ReadOnlyError, redis.exceptions.BusyLoadingError
    error = kinds[why == "LOADING"](why)
    log = _LossyLog(shared_redis().url, prefix=new_prefix(), clock=ManualClock())
    cursor = log.exchange([_study(0)], START, NOTHING).cursor

    def refuse(send: Any) -> Any:
        raise error

    log.rule = refuse
    with pytest.raises(LogUnavailableError, match=why):
        log.exchange([_study(1)], cursor, NOTHING)
    log.rule = lambda send: send()
    assert log.exchange([_study(1)], cursor, NOTHING).news == [_study(1)]


def test_a_network_that_drops_everything_is_noticed(proxy: CountingProxy) -> None:
    url = f"redis://127.0.0.1:{proxy.port}?socket_timeout=0.05&socket_connect_timeout=0.5"
    prefix = new_prefix()

    class PassingOn(Clock):
        """The machine's: to a busy one the timeout is short even then."""

        def sleep(self, duration_s: float) -> None:
            proxy.pass_on()
            super().sleep(duration_s)

    log = RedisLog(url, prefix=prefix, clock=PassingOn())
    cursor = log.exchange([_study(0)], START, NOTHING).cursor
    for n, way in enumerate([{"requests": False}, {"replies": False}, {}]):
        proxy.swallow(**way)
        cursor = log.exchange([_study(1 + n)], cursor, NOTHING).cursor
    assert _seqs(RedisLog(shared_redis().url, prefix=prefix)) == [0, 1, 2, 3]


# --- writers that stop half-way, on a plain prefix -----------------------------------------------


class _Killed(BaseException):
    """What ends a writer without letting it do anything more."""


def test_a_record_lost_before_those_just_written_leaves_an_unknown_outcome(slots: _Where) -> None:
    log, other = slots.open(), slots.open()
    cursor = log.exchange([_study(0)], START, NOTHING).cursor

    def last() -> int:
        return other._connection.ask(other._reader.last_number)

    reserve = log._by_hand._reserve

    def reserve_late(door: Any, count: int) -> int:
        """Before it a plain Optuna worker appends three records, the first of which it reads
        before the second, and which is evicted then."""
        log._by_hand._reserve = reserve  # type: ignore[method-assign]
        fields = {"op_code": 0, "worker_id": "o", "study_name": "s", "directions": [1]}
        other.append_logs([fields, fields, fields])
        other._connection.ask(lambda door: door.command("DEL", other._keys.record(1)))
        return reserve(door, count)

    log._by_hand._reserve = reserve_late  # type: ignore[method-assign]
    with pytest.raises(OutcomeUnknownError, match=r"record 1.*stand behind it"):
        log.exchange([_study(1)], cursor, NOTHING)
    assert last() == 4
    for _ in range(2):
        with pytest.raises(LogCorruptError):
            log.exchange([_study(1)], cursor, NOTHING)
    assert last() == 4


def test_a_writer_killed_between_reserving_and_writing_stops_nobody(slots: _Where) -> None:
    log = slots.lossy()
    cursor = log.exchange([_study(0)], START, NOTHING).cursor
    reserve = log._by_hand._reserve

    def reserve_and_die(door: Any, count: int) -> int:
        reserve(door, count)
        raise _Killed

    log._by_hand._reserve = reserve_and_die  # type: ignore[method-assign]
    with pytest.raises(_Killed):
        log.exchange([_study(1), _study(2)], cursor, NOTHING)
    other = slots.open(clock=ManualClock())
    assert other.exchange([_study(0, "other")], START, NOTHING).news
    assert (_seqs(slots.open()), _seqs(slots.open(), "other")) == ([0], [0])


def test_a_stopped_writer_whose_numbers_were_filled_gets_others(slots: _Where) -> None:
    log = slots.lossy()
    cursor = log.exchange([_study(0)], START, NOTHING).cursor
    once = iter([True])
    reserve = log._by_hand._reserve

    def reserve_and_stop(door: Any, count: int) -> int:
        number = reserve(door, count)
        if next(once, False):
            slots.open(clock=ManualClock()).exchange([], START, NOTHING)
        return number

    log._by_hand._reserve = reserve_and_stop  # type: ignore[method-assign]
    batch = log.exchange([_study(1), _study(2)], cursor, NOTHING)
    kinds = [type(record).__name__ for record in batch.news]
    assert kinds == ["DeleteStudy", "DeleteStudy", "CreateStudy", "CreateStudy"]
    assert _seqs(slots.open()) == [0, 1, 2]


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_batch_that_was_filled_in_part_is_never_stored_twice(
    slots: _Where, written: int
) -> None:
    log = slots.lossy()
    cursor = log.exchange([_study(0)], START, NOTHING).cursor
    once = iter([True])
    inner_connect = log._connection.open_door

    def open_door() -> Any:
        door = inner_connect()
        pipeline = door.pipeline

        def stop_half_way(commands: Any) -> Any:
            if commands[0][0] == "SET" and next(once, False):
                pipeline([commands[written]])
                slots.open(clock=ManualClock()).exchange([], START, NOTHING)
            return pipeline(commands)

        door.pipeline = stop_half_way
        return door

    log.close()
    log._connection.open_door = open_door  # type: ignore[method-assign]
    records = [_study(1), _study(2), _study(3)]
    if written == 0:
        log.exchange(records, cursor, NOTHING)
        assert _seqs(slots.open()) == [0, 1, 2, 3]
    else:
        with pytest.raises(OutcomeUnknownError, match="stopped"):
            log.exchange(records, cursor, NOTHING)
        assert _seqs(slots.open()) == [0, 1 + written]


# --- appends on a condition ----------------------------------------------------------------------


class _Counter:
    """Appends one record with the next number, if nobody has come between.

    Args:
        log: Whose records are counted, all of them.
    """

    def __init__(self, log: RedisLog) -> None:
        self.log = log
        self.n_seen = 0
        self.n_decisions = 0
        self.cursor: Any = START
        self.between: Callable[[], None] = lambda: None

    def add(self) -> int:
        """The number that was decided on last, which is where the record should be."""

        def decide(news: Sequence[Any], cursor: Any) -> list[r.CreateStudy]:
            self.n_seen += len(news)
            self.n_decisions += 1
            self.between()
            return [_study(self.n_seen, "counter")]

        batch = self.log.exchange_if(decide, self.cursor, NOTHING)
        number = self.n_seen
        assert batch.news[0].seq == number, "the record is the first after what was seen"
        self.n_seen += len(batch.news)
        self.cursor = batch.cursor
        return number


def _numbers(log: RedisLog) -> list[tuple[int, int]]:
    """Place in the log and decided number of each record of a ``_Counter``."""
    news: Sequence[Any] = log.exchange([], START, NOTHING).news
    return [(n, x.seq) for n, x in enumerate(news) if x.worker_id == "counter"]


def test_every_answer_to_a_conditional_append_lost_one_by_one(where: _Where) -> None:
    for k in itertools.count(1):
        calls = itertools.count(1)
        was_lost = False

        def lose(send: Callable[[], Any], calls: Any = calls, k: int = k) -> Any:
            nonlocal was_lost
            answer = send()
            if next(calls) == k:
                was_lost = True
                raise redis.ConnectionError("the test lost this answer")
            return answer

        before = len(_numbers(where.open()))
        counter = _Counter(where.lossy(lose, clock=ManualClock()))
        for _ in range(3):
            counter.add()
        numbers = _numbers(where.open())
        assert len(numbers) == before + 3, f"answer {k}"
        assert all(place == number for place, number in numbers), f"answer {k}"
        if not was_lost:
            break
    assert k > 3


def test_a_conditional_append_whose_answer_is_lost_while_others_write_thousands(
    standalone_pair: Any,
) -> None:
    where, busy = standalone_pair
    once = iter([True])

    def lose(send: Callable[[], Any]) -> Any:
        answer = send()
        if counter.n_decisions and next(once, False):
            busy.exchange([_study(n, "busy") for n in range(1500)], START, NOTHING)
            raise redis.ConnectionError("the test lost this answer")
        return answer

    counter = _Counter(where.lossy(lose))
    assert counter.add() == 0
    assert (counter.n_seen, counter.n_decisions) == (1501, 1)
    assert _numbers(where.open()) == [(0, 0)]


@pytest.mark.parametrize("n_others", [1, 1500])
def test_what_came_between_is_told_before_it_is_decided_again(
    where: _Where, n_others: int
) -> None:
    others = where.open()
    records = [_study(n, "other") for n in range(n_others)]
    once = iter([records])
    counter = _Counter(where.open())
    counter.add()
    counter.between = lambda: None if (new := next(once, None)) is None else _append(others, new)
    assert counter.add() == 1 + n_others
    assert counter.n_decisions == 3
    assert _numbers(where.open()) == [(0, 0), (1 + n_others, 1 + n_others)]


def _append(log: RedisLog, records: Sequence[Any]) -> None:
    log.exchange(records, START, NOTHING)


def test_a_conditional_append_that_arrives_after_its_retry_changes_nothing(atomic: _Where) -> None:
    late: list[Callable[[], Any]] = []
    others = atomic.open()

    def delay(send: Callable[[], Any]) -> Any:
        if counter.n_decisions and not late:
            late.append(send)
            _append(others, [_study(0, "other")])
            raise redis.TimeoutError("the test holds this request up")
        return send()

    counter = _Counter(atomic.lossy(delay))
    # The delayed request keeps its own connection, as one in a server's buffer does.
    _drop_instead_of_closing(counter.log)
    assert counter.add() == 1
    late[0]()
    assert _numbers(atomic.open()) == [(1, 1)]


def test_a_conditional_append_comes_through_a_crowd_of_plain_ones(atomic: _Where) -> None:
    stop = threading.Event()

    def append() -> None:
        log, cursor = atomic.open(), START
        for seq in itertools.count():
            if stop.is_set():
                return
            cursor = log.exchange([_study(seq, threading.current_thread().name)], cursor,
                                  NOTHING).cursor  # fmt: skip

    crowd = [threading.Thread(target=append) for _ in range(4)]
    for thread in crowd:
        thread.start()
    counter = _Counter(atomic.open())
    numbers = [counter.add() for _ in range(20)]
    stop.set()
    for thread in crowd:
        thread.join(_DEADLINE_S)
    assert _numbers(atomic.open()) == [(number, number) for number in numbers]
    assert counter.n_decisions <= 3 * len(numbers), "it waits for nobody's pause"


@pytest.mark.parametrize("how", ["nothing", "an error"])
def test_a_turn_that_is_not_used_is_given_back(atomic: _Where, how: str) -> None:
    others, counter = atomic.open(), _Counter(atomic.open(clock=ManualClock()))
    decisions = itertools.count()

    def decide(news: Sequence[Any], cursor: Any) -> list[r.CreateStudy]:
        if next(decisions):
            if how == "an error":
                raise ArithmeticError
            return []
        _append(others, [_study(0, "other")])
        return [_study(0, "late")]

    with contextlib.suppress(ArithmeticError):
        counter.log.exchange_if(decide, START, NOTHING)
    clock = ManualClock()
    atomic.open(clock=clock).exchange([_study(1, "other")], START, NOTHING)
    assert clock.slept_s == 0.0, "nobody had to wait"


def test_a_conditional_append_that_was_filled_is_decided_again(slots: _Where) -> None:
    counter = _Counter(slots.open())
    reserve = counter.log._by_hand._reserve_after
    once = iter([True])

    def reserve_and_stop(last: int, count: int) -> bool:
        taken = reserve(last, count)
        if next(once, False):
            slots.open(clock=ManualClock()).exchange([], START, NOTHING)
        return taken

    counter.log._by_hand._reserve_after = reserve_and_stop  # type: ignore[method-assign]
    assert counter.add() == 1
    assert counter.n_decisions == 2
    assert _numbers(slots.open()) == [(1, 1)]


# --- leases --------------------------------------------------------------------------------------


def test_leases_and_conditional_appends_cost_few_round_trips(proxy: CountingProxy) -> None:
    log = RedisLog(f"redis://127.0.0.1:{proxy.port}", prefix=new_prefix())
    follower = Follower(log, "w")
    study_id = follower.create_study("s")
    trips: dict[str, int] = {}

    def count(name: str, call: Callable[[], Any]) -> None:
        call()  # a script that the server does not know yet takes one more
        before = proxy.n_round_trips
        call()
        trips[name] = proxy.n_round_trips - before

    count("create", lambda: follower.create_trial(study_id))
    log.take_lease("w")
    count("create with a lease", lambda: follower.create_trial(study_id))
    ids = list(range(200))
    count("renew", lambda: log.renew_lease("w", ids))
    count("expired", lambda: log.expired(study_id, dict.fromkeys(ids, "w"), 60.0))
    count("append on a condition", lambda: _Counter(log).add())
    assert trips == {
        "create": 1,
        "create with a lease": 1,
        "renew": 1,
        "expired": 1,
        "append on a condition": 2,
    }


def test_a_key_of_leases_that_holds_something_else_leaves_nothing_appended(
    atomic: _Where,
) -> None:
    log = atomic.open()
    follower = Follower(log, "w")
    study_id = follower.create_study("s")
    log.take_lease("w")
    url, use_cluster, prefix = atomic.args
    client = redis.RedisCluster.from_url(url) if use_cluster else redis.Redis.from_url(url)
    client.set(f"{prefix}:trialstore:leases", "no hash")
    with pytest.raises(LogCorruptError, match="something else"):
        follower.create_trial(study_id)
    with pytest.raises(LogCorruptError, match="something else"):
        log.renew_lease("w", [])
    assert Follower(atomic.open(), "late").trials(study_id) == []
    client.delete(f"{prefix}:trialstore:leases")
    follower.create_trial(study_id)
    client.close()


# --- fork ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_leaves_its_parents_connection_alone(proxy: CountingProxy) -> None:
    log = RedisLog(f"redis://127.0.0.1:{proxy.port}", prefix=new_prefix())
    cursor = log.exchange([_study(0)], START, NOTHING).cursor
    n_before = proxy.n_connections
    child = multiprocessing.get_context("fork").Process(
        target=_append_and_close, args=(log, cursor)
    )
    child.start()
    child.join(_DEADLINE_S)
    assert child.exitcode == 0
    assert proxy.n_connections == n_before + 1
    assert len(log.exchange([_study(1)], cursor, NOTHING).news) == 2
    assert proxy.n_connections == n_before + 1


def _append_and_close(log: RedisLog, cursor: Any) -> None:
    log.exchange([_study(0, "child")], cursor, NOTHING)
    log.close()


# --- servers that die ----------------------------------------------------------------------------


def _objective(trial: optuna.Trial) -> float:
    for name in "abcde":
        trial.suggest_float(name, 0.0, 1.0)
    trial.set_user_attr("k", "v")
    return trial.params["a"]


def _work(where: tuple[Any, ...], kind: str, n_trials: int, told: str) -> None:
    """A worker; notes each trial that was acknowledged."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage: Any
    if kind == "ours":
        storage = trialstore.JournalStorage(RedisLog(*where))
    else:
        storage = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalRedisBackend(*where)
        )
    study = optuna.load_study(study_name="s", storage=storage, sampler=RandomSampler())
    for _ in range(n_trials):
        trial = study.ask()
        value = _objective(trial)
        study.tell(trial, value)
        with Path(told).open("a") as file:
            file.write(f"{trial.number} {value!r}\n")


def _told(files: list[Path]) -> dict[int, float]:
    told: dict[int, float] = {}
    for file in files:
        for line in file.read_text().splitlines(keepends=True) if file.exists() else []:
            if line.endswith("\n"):
                number, value = line.split()
                assert int(number) not in told, "two workers were given one trial"
                told[int(number)] = float(value)
    return told


def _start(
    where: tuple[Any, ...], kinds: list[str], n_trials: int, folder: Path
) -> tuple[list[Any], list[Path]]:
    storage = trialstore.JournalStorage(RedisLog(*where))
    optuna.create_study(study_name="s", storage=storage)
    files = [folder / f"told-{index}" for index in range(len(kinds))]
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_work, args=(where, kind, n_trials, str(file)))
        for kind, file in zip(kinds, files, strict=True)
    ]
    for worker in workers:
        worker.start()
    return workers, files


def _finish(workers: list[Any], files: list[Path], where: tuple[Any, ...], n_trials: int) -> None:
    for worker in workers:
        worker.join(_DEADLINE_S)
        assert worker.exitcode == 0
    told = _told(files)
    storage = trialstore.JournalStorage(RedisLog(*where))
    trials = optuna.load_study(study_name="s", storage=storage).trials
    assert {trial.number: trial.value for trial in trials} == told
    assert [trial.number for trial in trials] == list(range(len(workers) * n_trials))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert all(len(trial.params) == 5 and trial.user_attrs == {"k": "v"} for trial in trials)


def _wait_for(n_told: int, files: list[Path], workers: list[Any]) -> None:
    give_up_at = time.monotonic() + _DEADLINE_S
    while len(_told(files)) < n_told:
        assert any(worker.is_alive() for worker in workers), "the workers died"
        assert time.monotonic() < give_up_at, "no worker gets on"
        time.sleep(0.01)


def test_a_server_killed_and_restarted_five_times(tmp_path: Path) -> None:
    find_binary("redis-server")
    server = RedisServer()
    try:
        where = (server.url, False, "")
        workers, files = _start(where, ["ours"] * 3, 80, tmp_path)
        for round_ in range(5):
            _wait_for(30 + 35 * round_, files, workers)
            server.kill()
            server.start()
        _finish(workers, files, where, 80)
    finally:
        server.remove()


@pytest.mark.parametrize("kind", ["cluster-hash-tag", "cluster-plain-prefix"])
def test_a_node_of_a_cluster_killed_and_restarted(kind: str, tmp_path: Path) -> None:
    where = _KINDS[kind]().args
    cluster = shared_cluster()
    workers, files = _start(where, ["ours"] * 2, 30, tmp_path)
    for index, node in enumerate(cluster.nodes):
        _wait_for(10 + 10 * index, files, workers)
        node.kill()
        node.start()
        cluster.wait()
    _finish(workers, files, where, 30)


def test_optuna_workers_and_ours_on_one_journal(tmp_path: Path) -> None:
    where = _KINDS["standalone"]().args
    workers, files = _start(where, ["ours", "optuna", "ours", "optuna"], 150, tmp_path)
    _finish(workers, files, where, 150)
