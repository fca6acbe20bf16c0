"""The journal in Redis: its keys, its round trips, its holes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import enum
import json
import logging
import os
from pathlib import Path
import pickle
import re
import time
import traceback
from typing import Any
from urllib.parse import quote

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

from ageing import age_hash
from redis_servers import (
    ClusterNode,
    OptionsServer,
    Sentinel,
    TLSServer,
    new_prefix,
    shared_cluster,
)
from servers import find_binary, shared_redis
import trialstore
from trialstore import records as r
from trialstore.errors import (
    LogCorruptError,
    LogReplacedError,
    LogUnavailableError,
    OutcomeUnknownError,
    SecretNotFoundError,
)
from trialstore.journal import JournalRedisBackend
from trialstore.log import NOTHING, START, SnapshotStore
from trialstore.logs.redis import RedisLog, reading
from trialstore.logs.redis.address import pool_of
from trialstore.logs.redis.keys import has_hash_tag
from trialstore.logs.redis.reading import Reader
from trialstore.testing.capability_suites import AgeLeases
from trialstore.testing.contents import storage_contents
from trialstore.testing.faults import CountingProxy, ManualClock
from trialstore.testing.log_suite import LogSuite, OpenLog
from trialstore.urls import open_log

redis = pytest.importorskip("redis")

pytestmark = [
    pytest.mark.servers,
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]

_TIME = "2026-01-02T03:04:05.678901"


def _study(name: str, seq: int, worker_id: str = "w") -> r.CreateStudy:
    return r.CreateStudy(study_name=name, directions=[1], worker_id=worker_id, seq=seq)


class _Where:
    """A journal of this test's own.

    Args:
        url: Of the server.
        prefix: Of the keys.
        use_cluster: The server is a cluster.
        client: redis-py's, to look at the keys and damage them.
    """

    def __init__(self, url: str, prefix: str, use_cluster: bool, client: Any) -> None:
        self.url = url
        self.prefix = prefix
        self.use_cluster = use_cluster
        self.client = client

    def open(self, **options: Any) -> RedisLog:
        return RedisLog(self.url, self.use_cluster, self.prefix, **options)

    def key(self, number: int) -> str:
        return f"{self.prefix}:log:{number}"

    def line(self, number: int) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(self.client.get(self.key(number)))
        return fields

    def last(self) -> int:
        return int(self.client.get(f"{self.prefix}:log_number"))

    def keys(self) -> set[str]:
        return {key.decode() for key in self.client.scan_iter(f"{self.prefix}:*")}

    def hole(self) -> int:
        """What a writer leaves that dies between its INCR and its SET; returns the number."""
        self.client.setnx(f"{self.prefix}:log_number", -1)
        number: int = self.client.incr(f"{self.prefix}:log_number")
        return number

    def optuna_append(self, number: int, worker_id: str) -> None:
        """What a plain Optuna worker sets."""
        fields = {"op_code": 0, "worker_id": worker_id, "study_name": f"{number}-{worker_id}",
                  "directions": [1]}  # fmt: skip
        self.client.set(self.key(number), json.dumps(fields))


def _standalone() -> _Where:
    url = shared_redis().url
    return _Where(url, new_prefix(), False, redis.Redis.from_url(url))


def _cluster(pattern: str) -> _Where:
    url = shared_cluster().url
    return _Where(url, new_prefix(pattern), True, redis.RedisCluster.from_url(url))


_KINDS: dict[str, Callable[[], _Where]] = {
    "standalone": _standalone,
    "cluster-hash-tag": lambda: _cluster("{p%d}"),
    "cluster-plain-prefix": lambda: _cluster("p%d"),
}


@pytest.fixture(params=list(_KINDS))
def where(request: pytest.FixtureRequest) -> Iterator[_Where]:
    """A journal on each kind of server."""
    where = _KINDS[request.param]()
    yield where
    where.client.close()


@pytest.fixture
def standalone() -> Iterator[_Where]:
    where = _standalone()
    yield where
    where.client.close()


@pytest.fixture
def plain_prefix() -> Iterator[_Where]:
    where = _cluster("p%d")
    yield where
    where.client.close()


@pytest.fixture
def proxied(standalone: _Where) -> Iterator[tuple[_Where, CountingProxy]]:
    server = shared_redis()
    with CountingProxy("127.0.0.1", server.port) as proxy:
        standalone.url = f"redis://127.0.0.1:{proxy.port}"
        yield standalone, proxy


# --- conformance ---------------------------------------------------------------------------------


class OnRedis(LogSuite):
    """Time passes for leases by what each of them says."""

    kind: str

    @pytest.fixture
    def journal(self) -> Iterator[_Where]:
        where = _KINDS[self.kind]()
        yield where
        where.client.close()

    @pytest.fixture
    def open_log(self, journal: _Where) -> OpenLog:
        return journal.open

    @pytest.fixture
    def age_leases(self, journal: _Where) -> AgeLeases:
        return lambda duration_s: age_hash(journal.open(), duration_s)


class TestRedisLog(OnRedis):
    kind = "standalone"


class TestRedisLogOnClusterWithHashTag(OnRedis):
    kind = "cluster-hash-tag"


class TestRedisLogOnClusterWithPlainPrefix(OnRedis):
    kind = "cluster-plain-prefix"


# --- keys and JSON -------------------------------------------------------------------------------


def test_keys_and_json_are_optunas(where: _Where) -> None:
    log = where.open()
    log.exchange([_study("a", 0), _study("b", 1)], START, NOTHING)
    assert where.last() == 1
    assert where.keys() == {
        f"{where.prefix}:log_number", where.key(0), where.key(1),
        f"{where.prefix}:trialstore:complete",
    }  # fmt: skip
    line = where.line(1)
    assert (line["op_code"], line["study_name"], line["worker_id"]) == (0, "b", "w")


def test_optuna_reads_what_we_write_and_we_what_it_writes(standalone: _Where) -> None:
    ours = optuna.create_study(
        storage=trialstore.JournalStorage(standalone.open()), study_name="s",
        sampler=RandomSampler(seed=1),
    )  # fmt: skip
    theirs = optuna.load_study(
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalRedisBackend(standalone.url, prefix=standalone.prefix)
        ),
        study_name="s",
        sampler=RandomSampler(seed=2),
    )
    for _ in range(3):
        ours.optimize(_objective, n_trials=5)
        theirs.optimize(_objective, n_trials=5)
    assert [trial.number for trial in ours.trials] == list(range(30))
    assert storage_contents(ours._storage) == storage_contents(theirs._storage)


def test_a_prefix_that_is_of_an_enum_is_its_text(standalone: _Where) -> None:
    prefix = enum.Enum("Prefix", {"TUNING": standalone.prefix}, type=str)["TUNING"]
    RedisLog(standalone.url, prefix=prefix).exchange([_study("a", 0)], START, NOTHING)
    assert standalone.line(0)["study_name"] == "a"


def test_our_log_inside_optunas_journal_storage(where: _Where) -> None:
    storage = optuna.storages.JournalStorage(where.open())
    study = optuna.create_study(storage=storage, sampler=RandomSampler())
    study.optimize(_objective, n_trials=5)
    again = optuna.storages.JournalStorage(pickle.loads(pickle.dumps(where.open())))
    assert storage_contents(again) == storage_contents(storage)
    assert storage_contents(trialstore.JournalStorage(where.open())) == storage_contents(storage)


def _objective(trial: optuna.Trial) -> float:
    for name in "abcde":
        trial.suggest_float(name, 0.0, 1.0)
    trial.set_user_attr("k", "v")
    return trial.params["a"]


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "at_most"), [(RandomSampler(), 4), (TPESampler(n_startup_trials=2), 6)]
)
def test_round_trips_of_a_trial(
    proxied: tuple[_Where, CountingProxy], sampler: Any, at_most: int
) -> None:
    where, proxy = proxied
    # With the linger at a minute, no slow machine makes exchanges of its own.
    storage = trialstore.JournalStorage(where.open(), linger_s=60)
    study = optuna.create_study(storage=storage, sampler=sampler)
    study.optimize(_objective, n_trials=3)
    proxy.reset()
    study.optimize(_objective, n_trials=20)
    assert proxy.n_round_trips <= at_most * 20


def test_round_trips_of_opening_a_long_journal(proxied: tuple[_Where, CountingProxy]) -> None:
    where, proxy = proxied
    n_records = 100_000
    lines = [
        r.encode_line(r.DeleteStudy(study_id=-1, worker_id="w", seq=seq))[:-1]
        for seq in range(n_records)
    ]
    for first in range(0, n_records, 10_000):
        where.client.mset(
            {where.key(first + n): line for n, line in enumerate(lines[first : first + 10_000])}
        )
    where.client.set(f"{where.prefix}:log_number", n_records - 1)
    proxy.reset()
    log, cursor, seqs, more = where.open(), START, [], True
    while more:
        batch = log.exchange([], cursor, NOTHING)
        assert len(batch.news) < n_records / 2, "in pieces"
        cursor, more = batch.cursor, batch.more
        seqs += [record.seq for record in batch.news]  # type: ignore[union-attr]
    assert seqs == list(range(n_records))
    print(f"{proxy.n_round_trips} round trips")
    assert proxy.n_round_trips <= 120


def test_one_that_lags_far_behind_appends_once(where: _Where) -> None:
    lagging, busy = where.open(), where.open()
    lagging.exchange([_study("a", 0)], START, NOTHING)
    cursor = lagging.exchange([], START, NOTHING).cursor
    for first in range(0, 3000, 500):
        busy.exchange([_study("b", first + n, "busy") for n in range(500)], START, NOTHING)
    batch = lagging.exchange([_study("c", 1), _study("d", 2)], cursor, NOTHING)
    assert [record.seq for record in batch.news] == [*range(3000), 1, 2]  # type: ignore[union-attr]


def test_a_batch_longer_than_a_script_may_pass_on_at_once(where: _Where) -> None:
    log = where.open()
    cursor = log.exchange([_study("a", 0)], START, NOTHING).cursor
    batch = log.exchange([_study("b", seq) for seq in range(1, 5001)], cursor, NOTHING)
    assert [record.seq for record in batch.news] == list(range(1, 5001))  # type: ignore[union-attr]
    assert where.last() == 5000
    assert [record.seq for record in where.open().exchange([], START, NOTHING).news] == [  # type: ignore[union-attr]
        *range(5001)
    ]


def test_a_record_with_a_newline_is_read_like_any_other(standalone: _Where) -> None:
    log = standalone.open()
    log.exchange([_study(f"s{n}", n) for n in range(3)], START, NOTHING)
    fields = {"op_code": 0, "worker_id": "other", "study_name": "x", "directions": [1]}
    standalone.client.set(standalone.key(1), json.dumps(fields, indent=1))
    names = [record.study_name for record in standalone.open().exchange([], START, NOTHING).news]  # type: ignore[union-attr]
    assert names == ["s0", "x", "s2"]


# --- holes and missing keys ----------------------------------------------------------------------


def test_a_hole_is_waited_for_and_then_skipped(
    where: _Where, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock()
    log = where.open(clock=clock)
    cursor = log.exchange([_study("a", 0)], START, NOTHING).cursor
    number = where.hole()
    batch = log.exchange([_study("b", 1)], cursor, NOTHING)
    assert clock.slept_s >= 10
    assert [type(record).__name__ for record in batch.news] == ["DeleteStudy", "CreateStudy"]
    assert where.key(number) in caplog.text
    # Another reader has nothing to wait for.
    other_clock = ManualClock()
    where.open(clock=other_clock).exchange([], START, NOTHING)
    assert other_clock.slept_s == 0


def test_optuna_reads_past_a_filled_hole(standalone: _Where) -> None:
    study = optuna.create_study(storage=trialstore.JournalStorage(standalone.open()))
    standalone.hole()
    trialstore.JournalStorage(standalone.open(clock=ManualClock()))
    theirs = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalRedisBackend(standalone.url, prefix=standalone.prefix)
    )
    assert [study.study_name for study in theirs.get_all_studies()] == [study.study_name]


def test_a_record_that_arrives_late_is_waited_for(where: _Where) -> None:
    log = where.open()
    cursor = log.exchange([_study("a", 0)], START, NOTHING).cursor
    number = where.hole()

    class Arriving(ManualClock):
        def sleep(self, duration_s: float) -> None:
            super().sleep(duration_s)
            if self.slept_s > 3:
                where.optuna_append(number, "slow")

    batch = where.open(clock=Arriving()).exchange([], cursor, NOTHING)
    assert [record.worker_id for record in batch.news] == ["slow"]  # type: ignore[union-attr]


def test_a_record_that_arrives_while_its_absence_is_judged(where: _Where) -> None:
    """Seen missing, written, built upon by others, and only then looked up."""
    log = where.open()
    cursor = log.exchange([_study("a", 0)], START, NOTHING).cursor
    number = where.hole()
    was_written = log._reader.was_written

    def arrive_first(missing: int) -> bool:
        where.optuna_append(number, "slow")
        where.open().exchange([_study("b", 0, "busy"), _study("c", 1, "busy")], cursor, NOTHING)
        where.open().exchange([_study("d", 2, "busy")], cursor, NOTHING)
        assert was_written(missing)
        return True

    log._reader.was_written = arrive_first  # type: ignore[method-assign]
    batch = log.exchange([], cursor, NOTHING)
    assert batch.news[0].worker_id == "slow"  # type: ignore[union-attr]


def test_holes_among_records_of_plain_optuna_workers_are_filled(where: _Where) -> None:
    log = where.open(clock=ManualClock())
    log.exchange([_study("a", 0)], START, NOTHING)
    for worker in ("o1", "o2"):
        where.hole()
        where.optuna_append(where.hole(), worker)
    batch = log.exchange([], START, NOTHING)
    kinds = [type(record).__name__ for record in batch.news]
    assert kinds == ["CreateStudy", "DeleteStudy", "CreateStudy", "DeleteStudy", "CreateStudy"]


@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_deleted_record_is_corruption_with_its_number(where: _Where, number: int) -> None:
    log = where.open()
    log.exchange([_study("a", 0)], START, NOTHING)
    log.exchange([_study("b", 1 + n) for n in range(3)], START, NOTHING)
    log.exchange([_study("c", 4 + n) for n in range(3)], START, NOTHING)
    if where.use_cluster and "{" not in where.prefix:
        log.exchange([_study("d", 7)], START, NOTHING)  # what is known complete lags one behind
    where.client.delete(where.key(number))
    clock = ManualClock()
    with pytest.raises(LogCorruptError, match="evicted") as caught:
        where.open(clock=clock).exchange([], START, NOTHING)
    assert caught.value.record_number == number
    assert where.key(number) in str(caught.value)
    assert clock.slept_s == 0
    assert not where.client.exists(where.key(number))


def test_a_deleted_record_of_plain_optuna_workers_is_corruption(standalone: _Where) -> None:
    for _ in range(10):
        standalone.optuna_append(standalone.hole(), "o1")
    standalone.client.delete(standalone.key(4))
    with pytest.raises(LogCorruptError) as caught:
        standalone.open().exchange([], START, NOTHING)
    assert caught.value.record_number == 4


def test_a_deleted_number_key_is_corruption(where: _Where) -> None:
    log = where.open()
    cursor = log.exchange([_study("a", 0), _study("b", 1)], START, NOTHING).cursor
    where.client.delete(f"{where.prefix}:log_number")
    with pytest.raises(LogCorruptError):
        where.open().exchange([_study("c", 2)], START, NOTHING)
    with pytest.raises(LogCorruptError):
        log.exchange([_study("c", 2)], cursor, NOTHING)
    assert where.client.get(f"{where.prefix}:log_number") is None


def _between_two_looks(log: RedisLog, happens: Callable[[], object]) -> None:
    """Have something happen right after a log on a plain prefix has read the number."""
    look = log._reader.last_number

    def look_once(door: Any) -> int:
        log._reader.last_number = look  # type: ignore[method-assign]
        last = look(door)
        happens()
        return last

    log._reader.last_number = look_once  # type: ignore[method-assign]


@pytest.mark.parametrize("n_before", [0, 2])
def test_a_writer_that_comes_between_two_looks_is_no_damage(
    plain_prefix: _Where, n_before: int
) -> None:
    log, other = plain_prefix.open(), plain_prefix.open()
    cursor = START
    for seq in range(n_before):
        cursor = log.exchange([_study("a", seq)], cursor, NOTHING).cursor
    _between_two_looks(log, lambda: other.exchange([_study("b", 0, "busy")], cursor, NOTHING))
    batch = log.exchange([_study("c", n_before)], cursor, NOTHING)
    assert [record.worker_id for record in batch.news] == ["busy", "w"]  # type: ignore[union-attr]
    assert plain_prefix.last() == n_before + 1


def test_a_number_that_is_lost_between_two_looks_overwrites_nothing(plain_prefix: _Where) -> None:
    log = plain_prefix.open()
    cursor = log.exchange([_study("a", 0), _study("b", 1)], START, NOTHING).cursor
    lines = [plain_prefix.line(number) for number in range(2)]
    _between_two_looks(
        log, lambda: plain_prefix.client.delete(f"{plain_prefix.prefix}:log_number")
    )
    with pytest.raises(LogCorruptError, match="evicted"):
        log.exchange([_study("c", 2)], cursor, NOTHING)
    assert [plain_prefix.line(number) for number in range(2)] == lines


def test_a_journal_that_became_shorter_is_not_written_to(where: _Where) -> None:
    log = where.open()
    cursor = log.exchange([_study("a", 0), _study("b", 1)], START, NOTHING).cursor
    where.client.set(f"{where.prefix}:log_number", 0)
    where.client.delete(where.key(1))
    with pytest.raises(LogReplacedError, match="restart or failover"):
        log.exchange([_study("c", 2)], cursor, NOTHING)
    assert where.last() == 0


def test_a_journal_that_became_another_one_is_not_written_to(where: _Where) -> None:
    log = where.open()
    cursor = log.exchange([_study("a", 0), _study("b", 1)], START, NOTHING).cursor
    where.optuna_append(1, "o1")
    with pytest.raises(LogReplacedError, match="not the one"):
        log.exchange([_study("c", 2)], cursor, NOTHING)
    assert where.last() == 1


def test_a_plain_journal_made_anew_under_the_same_name_is_another_one(standalone: _Where) -> None:
    log = standalone.open()
    standalone.client.set(f"{standalone.prefix}:log_number", 1)
    standalone.optuna_append(1, "o1")
    cursor = START
    for writer in ("a", "b"):
        fields = {
            "op_code": 0,
            "worker_id": writer * 36,
            "study_name": "s" * 99,
            "directions": [1],
        }
        standalone.client.set(standalone.key(0), json.dumps({**fields, "directions": [1]}))
        if writer == "a":
            cursor = log.exchange((), START, NOTHING).cursor
    with pytest.raises(LogReplacedError, match="not the one"):
        log.exchange([_study("c", 2)], cursor, NOTHING)
    assert standalone.last() == 1


@pytest.mark.parametrize("damage", [b"{", b"{\n", b"[1]", b"\xff\xfe", b'{"op_code":77}', None])
def test_a_damaged_record_is_corruption_with_its_number(
    standalone: _Where, damage: bytes | None
) -> None:
    log = standalone.open()
    log.exchange([_study(f"s{n}", n) for n in range(3)], START, NOTHING)
    whole = standalone.client.get(standalone.key(1))
    # One flipped bit in a name decodes all right; the checksum tells.
    standalone.client.set(standalone.key(1), damage or whole.replace(b"s1", b"s3"))
    with pytest.raises(LogCorruptError) as caught:
        standalone.open().exchange([], START, NOTHING)
    assert caught.value.record_number == 1
    if damage != b'{"op_code":77}':  # Optuna decides itself what it knows
        with pytest.raises(LogCorruptError) as caught:
            standalone.open().read_logs(0)
        assert caught.value.record_number == 1


def test_only_one_attempt_is_appended_behind_a_record_that_cant_be_read(where: _Where) -> None:
    log = where.open()
    cursor = log.exchange([_study("a", 0)], START, NOTHING).cursor
    damaged = where.hole()
    where.client.set(where.key(damaged), '{"op_code":0,"study_name":2024,"directions":[1]}')
    with pytest.raises(OutcomeUnknownError, match=f"record {damaged}.*stand behind it"):
        log.exchange([_study("b", 1)], cursor, NOTHING)
    last = where.last()
    for seq in (1, 2):
        with pytest.raises(LogCorruptError, match="nothing more is written") as caught:
            log.exchange([_study("b", seq)], cursor, NOTHING)
        assert caught.value.record_number == damaged
    with pytest.raises(LogCorruptError):
        log.exchange_if(lambda news, cursor: [_study("c", 3)], cursor, NOTHING)
    assert where.last() == last == damaged + 1

    # Another one behind it is found before anything is appended, too.
    also_damaged = where.hole()
    where.client.set(where.key(also_damaged), "{}")
    where.optuna_append(damaged, "o1")
    with pytest.raises(LogCorruptError):
        log.exchange([_study("b", 1)], cursor, NOTHING)
    assert where.last() == also_damaged

    where.optuna_append(also_damaged, "o1")
    batch = log.exchange([_study("b", 1), _study("c", 4)], cursor, NOTHING)
    assert [record.seq for record in batch.news] == [-1, 1, -1, 4]  # type: ignore[union-attr]
    batch = log.exchange([_study("d", 5)], batch.cursor, NOTHING)
    assert [record.seq for record in batch.news] == [5]  # type: ignore[union-attr]
    assert where.last() == also_damaged + 2


def test_a_storage_makes_one_ghost_at_most_behind_a_record_that_cant_be_read(
    standalone: _Where,
) -> None:
    storage = trialstore.JournalStorage(standalone.open())
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
    damaged = standalone.hole()
    standalone.client.set(standalone.key(damaged), "{}")
    for error in (OutcomeUnknownError, LogCorruptError, LogCorruptError):
        with pytest.raises(error):
            storage.create_new_trial(study_id)
    standalone.optuna_append(damaged, "o1")
    there = trialstore.JournalStorage(standalone.open())
    assert len(there.get_all_trials(study_id)) == len(storage.get_all_trials(study_id)) == 1


def test_optunas_storage_appends_no_more_to_what_it_cant_read(standalone: _Where) -> None:
    storage = optuna.storages.JournalStorage(standalone.open())
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
    damaged = standalone.hole()
    standalone.client.set(standalone.key(damaged), "{")
    for _ in range(3):
        with pytest.raises(LogCorruptError, match="nothing more is written"):
            storage.create_new_trial(study_id)
    assert standalone.last() == damaged + 1
    standalone.optuna_append(damaged, "o1")
    storage.create_new_trial(study_id)
    assert len(storage.get_all_trials(study_id)) == 2


def test_keys_of_another_type_are_corruption(standalone: _Where) -> None:
    standalone.client.set(f"{standalone.prefix}:log_number", "many")
    with pytest.raises(LogCorruptError, match="many"):
        standalone.open().exchange([], START, NOTHING)
    standalone.client.delete(f"{standalone.prefix}:log_number")
    standalone.client.lpush(f"{standalone.prefix}:log_number", 1)
    with pytest.raises(LogCorruptError, match="something else"):
        standalone.open().exchange([], START, NOTHING)


@pytest.mark.parametrize("number", [1, 2])
def test_a_record_of_another_type_is_corruption(where: _Where, number: int) -> None:
    """It is there, and no record can be got of it."""
    log = where.open()
    cursor = log.exchange([_study("a", 0)], START, NOTHING).cursor
    log.exchange([_study("b", 1), _study("c", 2)], cursor, NOTHING)
    where.client.delete(where.key(number))
    where.client.rpush(where.key(number), "x")
    for begin in (START, cursor):
        with pytest.raises(LogCorruptError, match="something else"):
            where.open().exchange([], begin, NOTHING)


def test_what_was_written_is_not_known_where_that_key_holds_no_number(where: _Where) -> None:
    log = where.open()
    log.exchange([_study(name, seq) for seq, name in enumerate("abcd")], START, NOTHING)
    where.client.set(f"{where.prefix}:trialstore:complete", "many")
    assert list(log.findings(deep=False)) == []
    where.hole()
    batch = where.open(clock=ManualClock()).exchange([], START, NOTHING)
    assert type(batch.news[-1]).__name__ == "DeleteStudy"  # the hole, filled


@pytest.mark.parametrize("text", ["inf", "nan", "1e3", "3.5", "-5", "9" * 20])
def test_a_number_that_counts_no_records_is_corruption(where: _Where, text: str) -> None:
    """At once: some of them would have a reader wait for records without end."""
    log, clock = where.open(), ManualClock()
    cursor = log.exchange([_study("a", 0)], START, NOTHING).cursor
    where.client.set(f"{where.prefix}:log_number", text)
    for reader, begin in ((where.open(clock=clock), START), (log, cursor)):
        with pytest.raises(LogCorruptError, match=re.escape(text)):
            reader.exchange([_study("b", 1)], begin, NOTHING)
    assert clock.slept_s == 0


# --- snapshots -----------------------------------------------------------------------------------


def test_a_snapshot_has_a_key_of_its_own(where: _Where) -> None:
    log = where.open()
    assert isinstance(log, SnapshotStore)
    assert log.load_snapshot() is None
    where.client.set(f"{where.prefix}:snapshot", b"theirs")
    cursor = log.exchange([_study("a", 0)], START, NOTHING).cursor
    assert log.save_snapshot(lambda: (b"ours", cursor))
    loaded = where.open().load_snapshot()
    assert loaded is not None
    assert (bytes(loaded[0]), loaded[1]) == (b"ours", cursor)
    assert where.open().exchange([], loaded[1], NOTHING).news == ()
    assert where.client.get(f"{where.prefix}:snapshot") == b"theirs"
    assert not where.client.exists(f"{where.prefix}:trialstore:snapshot_lock")


def test_one_saver_at_a_time(where: _Where) -> None:
    log, other = where.open(), where.open()
    cursor = log.exchange([_study("a", 0)], START, NOTHING).cursor

    def make() -> tuple[bytes, Any]:
        assert not other.save_snapshot(lambda: pytest.fail("called while another one saves"))
        assert 0 < where.client.ttl(f"{where.prefix}:trialstore:snapshot_lock") <= 300
        return b"first", cursor

    assert log.save_snapshot(make)
    assert other.save_snapshot(lambda: None)
    loaded = log.load_snapshot()
    assert loaded is not None
    assert bytes(loaded[0]) == b"first"


def test_a_saver_that_lost_its_lock_saves_nothing(standalone: _Where) -> None:
    log = standalone.open()
    cursor = log.exchange([_study("a", 0)], START, NOTHING).cursor
    lock = f"{standalone.prefix}:trialstore:snapshot_lock"

    def make() -> tuple[bytes, Any]:
        standalone.client.set(lock, b"another's")
        return b"late", cursor

    assert not log.save_snapshot(make)
    assert log.load_snapshot() is None
    assert standalone.client.get(lock) == b"another's"


@pytest.mark.parametrize("what", ["damaged", "of another journal", "foreign", "short"])
def test_a_snapshot_that_does_not_fit_is_ignored(where: _Where, what: str) -> None:
    log = where.open()
    cursor = log.exchange([_study("a", 0)], START, NOTHING).cursor
    log.save_snapshot(lambda: (b"ours", cursor))
    key = f"{where.prefix}:trialstore:snapshot"
    stored = where.client.get(key)
    if what == "damaged":
        where.client.set(key, stored[:-1] + b"!")
    elif what == "of another journal":
        where.optuna_append(0, "o1")
    elif what == "foreign":
        where.client.set(key, pickle.dumps("a pickle"))
    else:
        where.client.set(key, stored[:20])
    assert log.load_snapshot() is None


class _Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_malicious_pickle_is_never_loaded(where: _Where, tmp_path: Path) -> None:
    bomb = pickle.dumps(_Bomb(tmp_path / "exploded"))
    for key in ("snapshot", "trialstore:snapshot"):
        where.client.set(f"{where.prefix}:{key}", bomb)
    storage = trialstore.JournalStorage(where.open())
    study = optuna.create_study(storage=storage, sampler=RandomSampler())
    study.optimize(_objective, n_trials=2)
    assert len(optuna.load_study(study_name=study.study_name, storage=storage).trials) == 2
    assert where.open().load_snapshot() is None
    assert not (tmp_path / "exploded").exists()
    assert where.client.get(f"{where.prefix}:snapshot") == bomb


def test_a_storage_opens_from_the_snapshot_that_another_saved(
    where: _Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trialstore import snapshot

    monkeypatch.setattr(snapshot, "_RECORDS_MIN", 20)
    storage = trialstore.JournalStorage(where.open())
    study = optuna.create_study(storage=storage, sampler=RandomSampler(), study_name="s")
    study.optimize(_objective, n_trials=20)
    saver = storage._exchanger._saver
    assert saver is not None
    saver.join()
    loaded = where.open().load_snapshot()
    assert loaded is not None
    assert loaded[1][0] > 20
    again = trialstore.JournalStorage(where.open())
    assert storage_contents(again) == storage_contents(storage)


# --- settings, URLs, secrets ---------------------------------------------------------------------


def _warnings_of(
    options: Sequence[str], durability: Any, caplog: pytest.LogCaptureFixture
) -> list[str]:
    find_binary("redis-server")
    server = OptionsServer(*options)
    try:
        caplog.clear()
        for _ in range(2):
            RedisLog(server.url, durability=durability).exchange([], START, NOTHING)
        return [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING]
    finally:
        server.remove()


@pytest.mark.parametrize(
    ("options", "durability", "words"),
    [
        ([], "full", []),
        (["--maxmemory", "100mb", "--maxmemory-policy", "noeviction"], "full", []),
        (["--maxmemory", "100mb", "--maxmemory-policy", "volatile-lru"], "full", []),
        (["--maxmemory-policy", "allkeys-lru"], "full", []),
        (["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"], "full", ["noeviction"]),
        (["--appendonly", "no"], "full", ["appendonly yes"]),
        (["--appendonly", "no"], "process", ["appendonly yes"]),
        (["--appendfsync", "everysec"], "full", ["appendfsync everysec"]),
        (["--appendfsync", "everysec"], "process", []),
        (["--no-appendfsync-on-rewrite", "yes"], "full", ["no-appendfsync-on-rewrite"]),
        (
            ["--maxmemory", "9mb", "--maxmemory-policy", "allkeys-random", "--appendonly", "no"],
            "full",
            ["allkeys-random", "appendonly yes"],
        ),
        (["--rename-command", "CONFIG", "", "--appendfsync", "everysec"], "full", []),
    ],
)  # fmt: skip
def test_settings_that_can_lose_a_journal_are_told_of_once(
    options: list[str], durability: str, words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    told = _warnings_of(options, durability, caplog)
    assert len(told) == bool(words)
    assert all(word in told[0] for word in words)


def test_memory_that_runs_out_leaves_nothing_of_a_batch() -> None:
    find_binary("redis-server")
    server = OptionsServer("--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
    try:
        log = RedisLog(server.url)
        cursor = START
        for number in range(100):
            big = r.SetStudyUserAttr(
                study_id=0, user_attr={"k": "x" * 300_000}, worker_id="w", seq=2 * number
            )
            small = _study("s", 2 * number + 1)
            try:
                cursor = log.exchange([big, small], cursor, NOTHING).cursor
            except LogUnavailableError as error:
                assert "more memory" in str(error)
                break
        else:
            pytest.fail("the memory did not run out")
        assert len(RedisLog(server.url).exchange([], START, NOTHING).news) == 2 * number
    finally:
        server.remove()


def test_large_records_come_in_parts() -> None:
    url, prefix = shared_redis().url, new_prefix()
    log = RedisLog(url, prefix=prefix)
    cursor = log.exchange([_study("a", 0)], START, NOTHING).cursor
    long = [
        r.SetStudyUserAttr(study_id=0, user_attr={"k": "x" * (2 << 20)}, worker_id="w", seq=seq)
        for seq in range(1, 25)
    ]
    writer = RedisLog(url, prefix=prefix)
    writer.exchange(long, cursor, NOTHING)
    counts, more = [], True
    reader, position = RedisLog(url, prefix=prefix), START
    while more:
        batch = reader.exchange((), position, NOTHING)
        counts.append(len(batch.news))
        position, more = batch.cursor, batch.more
    assert counts == [10, 10, 5]
    # Who has something to append reads all of them first, and appends it once.
    batch = log.exchange([_study("b", 25)], cursor, NOTHING)
    assert [record.seq for record in batch.news] == list(range(1, 26))
    batch = log.exchange_if(lambda news, at: [_study("c", 26)], cursor, NOTHING)
    assert [record.seq for record in reader.exchange((), position, NOTHING).news] == [25, 26]


def test_who_is_far_behind_reads_large_records_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, prefix = shared_redis().url, new_prefix()
    cursor = RedisLog(url, prefix=prefix).exchange([_study("a", 0)], START, NOTHING).cursor
    lengths = [10] * 3000 + [4000] * 2000
    records = [
        r.SetStudyUserAttr(study_id=0, user_attr={"k": "x" * length}, worker_id="w", seq=seq)
        for seq, length in enumerate(lengths, 1)
    ]
    RedisLog(url, prefix=prefix).exchange(records, cursor, NOTHING)
    asked: list[int] = []
    get = Reader.get

    def counted(reader: Reader, numbers: range) -> list[bytes | None]:
        asked.append(len(numbers))
        return get(reader, numbers)

    monkeypatch.setattr(Reader, "get", counted)
    monkeypatch.setattr(reading, "_CHUNK_BYTES", 400_000)
    news = RedisLog(url, prefix=prefix).exchange((), START, NOTHING).news
    assert [record.seq for record in news] == list(range(len(records) + 1))
    assert asked[:5] == [100, 200, 400, 800, 1600]
    assert 90 < asked[6] < 100, "the answer before held large ones"
    monkeypatch.setattr(reading, "_CHUNK_BYTES", 1)
    asked.clear()
    news = RedisLog(url, prefix=prefix).exchange((), START, NOTHING).news
    assert len(news) == len(records) + 1 and {*asked[1:]} == {1}


@pytest.fixture
def narrow() -> Iterator[OptionsServer]:
    """A server that takes values of 1 MiB at most."""
    find_binary("redis-server")
    server = OptionsServer("--proto-max-bulk-len", "1mb")
    yield server
    server.remove()


# The server hangs up in both cases; of the longer one the client can't even send all before.
@pytest.mark.parametrize("n_bytes", [2 << 20, 20 << 20])
def test_a_record_that_is_longer_than_the_server_takes_is_refused(
    narrow: OptionsServer, n_bytes: int
) -> None:
    clock = ManualClock()
    log = RedisLog(narrow.url, clock=clock)
    cursor = log.exchange([_study("a", 0)], START, NOTHING).cursor
    long = r.SetStudyUserAttr(study_id=0, user_attr={"k": "x" * n_bytes}, worker_id="w", seq=1)
    with pytest.raises(ValueError, match="proto-max-bulk-len"):
        log.exchange([long, _study("b", 2)], cursor, NOTHING)
    with pytest.raises(ValueError, match="1,048,576"):
        log.append_logs([{"op_code": 2, "worker_id": "o", "user_attr": {"k": "x" * n_bytes}}])
    with pytest.raises(ValueError, match="proto-max-bulk-len"):
        log.save_snapshot(lambda: (bytes(n_bytes), cursor))
    line = len(r.encode_line(long)) - 1
    short = "x" * (n_bytes - line + (1 << 20))
    longest = r.SetStudyUserAttr(study_id=0, user_attr={"k": short}, worker_id="w", seq=1)
    assert len(log.exchange([longest], cursor, NOTHING).news) == 1
    assert clock.slept_s == 0


def test_a_record_that_is_too_long_keeps_no_others_out(narrow: OptionsServer) -> None:
    storage = trialstore.JournalStorage(RedisLog(narrow.url, clock=ManualClock()), linger_s=60)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
    lacking, whole = (storage.create_new_trial(study_id) for _ in range(2))
    storage.set_trial_user_attr(lacking, "long", "x" * (2 << 20))
    storage.set_trial_user_attr(whole, "short", "x")
    assert storage.set_trial_state_values(whole, TrialState.COMPLETE, [1.0])
    storage.create_new_trial(study_id)
    with pytest.raises(UpdateFinishedTrialError, match="proto-max-bulk-len"):
        storage.set_trial_user_attr(lacking, "short", "x")
    with pytest.raises(ValueError, match="proto-max-bulk-len"):
        storage.set_study_user_attr(study_id, "long", "x" * (2 << 20))
    storage.close()
    there = trialstore.JournalStorage(RedisLog(narrow.url)).get_all_trials(study_id)
    assert [trial.user_attrs for trial in there] == [{}, {"short": "x"}, {}]
    assert [trial.state for trial in there][1] == TrialState.COMPLETE


def test_a_server_that_tells_no_settings_is_asked_to_take_what_most_take() -> None:
    find_binary("redis-server")
    server = OptionsServer("--rename-command", "CONFIG", "")
    try:
        log = RedisLog(server.url)
        long = r.SetStudyUserAttr(
            study_id=0, user_attr={"k": "x" * (2 << 20)}, worker_id="w", seq=1
        )
        assert len(log.exchange([_study("a", 0), long], START, NOTHING).news) == 2
    finally:
        server.remove()


def test_a_password_is_in_no_text(caplog: pytest.LogCaptureFixture) -> None:
    find_binary("redis-server")
    secret = "s3cret/%{x}"
    server = OptionsServer("--requirepass", secret)
    try:
        good = RedisLog(
            f"redis://:{quote(secret, safe='')}@127.0.0.1:{server.port}/1?socket_timeout=5"
        )
        assert good.exchange([_study("a", 0)], START, NOTHING).news
        assert repr(good) == f"RedisLog('redis://127.0.0.1:{server.port}/1', prefix='')"
        bad = RedisLog(f"redis://user:wr0ng-pass@127.0.0.1:{server.port}", clock=ManualClock())
        with caplog.at_level(logging.DEBUG), pytest.raises(LogUnavailableError) as caught:
            bad.exchange([], START, NOTHING)
        assert "password" in str(caught.value)  # says what to look at
        texts = f"{caught.value!r} {caught.value.__cause__!r} {bad!r} {caplog.text}"
        assert "wr0ng" not in texts
    finally:
        server.remove()


@pytest.mark.parametrize("kind", ["server", "sentinel", "cluster"])
def test_a_password_that_is_kept_elsewhere(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find_binary("redis-server")
    secret = "s3cret/%{x} @:#?&é+%41"
    is_cluster = kind == "cluster"
    server = (ClusterNode if is_cluster else OptionsServer)("--requirepass", secret)
    sentinel = Sentinel(server, secret) if kind == "sentinel" else None
    try:
        url = f"redis://default@127.0.0.1:{server.port}/0"
        if is_cluster:
            client = redis.Redis(port=server.port, password=secret)
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
                time.sleep(0.05)
        elif sentinel is not None:
            url = f"redis+sentinel://127.0.0.1:{sentinel.port}/journals/0"
        file = tmp_path / "secret"
        file.write_text(f"{secret}\n", encoding="utf-8")
        monkeypatch.setenv("REDIS_SECRET", secret)
        caplog.set_level(logging.DEBUG)

        log = JournalRedisBackend(url, is_cluster, password_file=str(file))
        assert len(log.exchange([_study("a", 0)], START, NOTHING).news) == 1
        other = JournalRedisBackend(url, is_cluster, password_env="REDIS_SECRET")
        assert len(other.exchange([], START, NOTHING).news) == 1
        with contextlib.closing(
            open_log(url, use_cluster=is_cluster, password_env="REDIS_SECRET")
        ) as opened:
            assert len(opened.exchange([], START, NOTHING).news) == 1
        pickled = pickle.dumps((log, other))
        assert b"s3cret" not in pickled
        for copy in pickle.loads(pickled):
            assert len(copy.exchange([], START, NOTHING).news) == 1

        file.write_text("wr0ng", encoding="utf-8")
        late = JournalRedisBackend(url, is_cluster, password_file=str(file), clock=ManualClock())
        with pytest.raises(LogUnavailableError) as caught:
            late.exchange([], START, NOTHING)
        file.unlink()
        with pytest.raises(SecretNotFoundError, match="can't be read"):
            late.exchange([], START, NOTHING)
        file.write_text(secret, encoding="utf-8")
        assert len(late.exchange([], START, NOTHING).news) == 1
        error = "".join(traceback.format_exception(caught.value))
        texts = f"{error} {late!r} {log!r} {log.facts()} {caplog.text}"
        assert "s3cret" not in texts and "wr0ng" not in texts
    finally:
        if sentinel is not None:
            sentinel.remove()
        server.remove()


def test_a_password_has_one_place() -> None:
    with pytest.raises(ValueError, match="not both"):
        JournalRedisBackend("redis://host", password_file="a", password_env="B")


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cret/x@host:6379",
        "redis://:s3cret#x@host:port",
        "http://:s3cret@host",
        "redis://:s3cret@host:6379?no_such_option=1&socket_timeout=long",
        "redis+sentinel://:s3cret@host:x/service",
        "redis://:s3cret@host:6379?no_such_option=1",
        "redis+sentinel://:s3cret@host:6379/service?no_such_option=1",
        "",
    ],
)
def test_a_wrong_url_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(ValueError, match=re.escape("redis+sentinel://")) as caught:
        RedisLog(url)
    error: BaseException | None = caught.value
    assert "s3cret" not in str(error)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_url_may_ask_for_text(standalone: _Where) -> None:
    """Which redis-py's clients then return; a journal is bytes all the same."""
    url = f"{standalone.url}/0?decode_responses=True"
    log = RedisLog(url, prefix=standalone.prefix)
    assert len(log.exchange([_study("a", 0)], START, NOTHING).news) == 1


def test_a_pickle_carries_the_address_and_the_options_only(standalone: _Where) -> None:
    log = standalone.open(durability="process")
    log.exchange([_study("a", 0)], START, NOTHING)
    assert set(log.__getstate__()) == {
        "url", "use_cluster", "prefix", "durability", "password", "clock"
    }  # fmt: skip
    copy = pickle.loads(pickle.dumps(log))
    assert len(copy.exchange([], START, NOTHING).news) == 1


def test_tls_with_a_password() -> None:
    find_binary("redis-server")
    server = TLSServer()
    try:
        secret = quote(server.password, safe="")
        url = f"rediss://:{secret}@localhost:{server.port}/0"
        log = RedisLog(f"{url}?ssl_ca_certs={server.certificate}")
        assert len(log.exchange([_study("a", 0)], START, NOTHING).news) == 1
        clock = ManualClock()
        with pytest.raises(LogUnavailableError, match="certificate verify failed"):
            RedisLog(url, clock=clock).exchange([], START, NOTHING)
        assert clock.slept_s == 0, "no certificate becomes good by waiting"
    finally:
        server.remove()


def test_the_master_is_found_through_sentinel(standalone: _Where) -> None:
    sentinel = Sentinel(shared_redis())
    try:
        url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/journals/0"
        log = RedisLog(url, prefix=standalone.prefix)
        assert len(log.exchange([_study("a", 0)], START, NOTHING).news) == 1
        assert len(standalone.open().exchange([], START, NOTHING).news) == 1
        copy = pickle.loads(pickle.dumps(log))
        assert len(copy.exchange([], START, NOTHING).news) == 1
    finally:
        sentinel.remove()


def test_a_sentinel_url_says_what_is_asked_of_whom() -> None:
    url = (
        "rediss+sentinel://ann:s%40cret@one:1,two,[::1]:3/service/4"
        "?ssl_ca_certs=/ca.pem&sentinel_password=other"
    )
    pool = pool_of(url)
    assert pool.service_name == "service"
    assert "SSL" in pool.connection_class.__name__
    server = pool.connection_kwargs
    assert (server["username"], server["password"], server["db"]) == ("ann", "s@cret", 4)
    assert server["ssl_ca_certs"] == "/ca.pem"
    asked = [
        client.connection_pool.connection_kwargs for client in pool.sentinel_manager.sentinels
    ]
    hosts = [(each["host"], each["port"], each["password"]) for each in asked]
    assert hosts == [("one", 1, "other"), ("two", 26379, "other"), ("::1", 3, "other")]


def test_a_server_without_a_cluster_takes_the_cluster_flag(standalone: _Where) -> None:
    log = RedisLog(standalone.url, use_cluster=True, prefix=standalone.prefix)
    log.exchange([_study("a", 0)], START, NOTHING)
    assert len(standalone.open().exchange([], START, NOTHING).news) == 1


def test_a_cluster_without_the_flag_is_told_of() -> None:
    cluster = shared_cluster()
    refused = 0
    for node in cluster.nodes:
        try:
            RedisLog(node.url, prefix="{elsewhere}").exchange([], START, NOTHING)
        except LogUnavailableError as error:
            assert "use_cluster=True" in str(error)
            refused += 1
    assert refused == 2


def test_a_wrong_address_is_told_of_soon() -> None:
    clock = ManualClock()
    with pytest.raises(LogUnavailableError, match=r"127\.0\.0\.1:1"):
        RedisLog("redis://127.0.0.1:1", clock=clock).exchange([], START, NOTHING)
    assert 3 <= clock.slept_s <= 5


def test_hash_tags() -> None:
    assert all(map(has_hash_tag, ["{a}", "x{a}b", "{a}{b}"]))
    assert not any(map(has_hash_tag, ["", "a", "{}", "{}a", "{a", "a}", "}{", "{}{a}"]))


def test_trials_of_all_states_survive_a_new_process(where: _Where) -> None:
    storage = trialstore.JournalStorage(where.open(), linger_s=0)
    study = optuna.create_study(storage=storage, sampler=RandomSampler())
    study.enqueue_trial({"a": 0.5})
    study.ask()
    study.tell(study.ask(), state=TrialState.FAIL)
    again = trialstore.JournalStorage(where.open())
    assert storage_contents(again) == storage_contents(storage)
