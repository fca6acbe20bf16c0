"""A compacted journal says the same in fewer records, and those at work on it go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import math
import os
from pathlib import Path
import random
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

from grpc_servers import open_grpc, serve, served_url
from ownership import GROUP, OWNER, as_root, may_not_chown
from redis_servers import OptionsServer, new_prefix, shared_cluster
from servers import find_binary, shared_redis
import trialstore
from trialstore import compaction, journal, records as r
from trialstore.errors import (
    CompactionRefusedError,
    LogCompactedError,
    LogCorruptError,
    LogReplacedError,
    LogUnavailableError,
)
from trialstore.log import NOTHING, START, Marks, Wanted
from trialstore.logs import head as heads
from trialstore.logs.file import FileLog, compacting, system
from trialstore.logs.grpc.client import GrpcLog
from trialstore.records import Outcome, Verdict
from trialstore.testing.contents import storage_contents
from trialstore.testing.faults import ManualClock

redis = pytest.importorskip("redis")

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


class _NoLock:
    """What a lock amounts to once its holder was evicted."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class _Journal:
    """A journal of this test's own.

    Args:
        open_log: Opens it.
        open_optuna: Opens it with plain Optuna's own backend.
    """

    def __init__(self, open_log: Callable[[], Any], open_optuna: Callable[[], Any]) -> None:
        self.open_log = open_log
        self._open_optuna = open_optuna

    def open(self, **options: Any) -> trialstore.JournalStorage:
        return trialstore.JournalStorage(self.open_log(), **options)

    def open_optuna(self) -> Any:
        return optuna.storages.JournalStorage(self._open_optuna())

    def records(self) -> list[Any]:
        log, cursor, news, more = self.open_log(), START, [], True
        while more:
            batch = log.exchange((), cursor, NOTHING)
            news += batch.news
            cursor, more = batch.cursor, batch.more
        return news


def _file(folder: Path) -> _Journal:
    path = str(folder / "journal.log")
    return _Journal(
        lambda: journal.JournalFileBackend(path),
        lambda: optuna.storages.journal.JournalFileBackend(path),
    )


def _redis(url: str, use_cluster: bool, prefix: str) -> _Journal:
    def open_optuna() -> Any:
        theirs = optuna.storages.journal.JournalRedisBackend(url, use_cluster, prefix)
        if use_cluster:  # its own client knows no slots; the flag is for proxies that do
            theirs._redis = redis.RedisCluster.from_url(url)  # type: ignore[assignment]
        return theirs

    return _Journal(lambda: journal.JournalRedisBackend(url, use_cluster, prefix), open_optuna)


_KINDS: dict[str, Callable[[Path], _Journal]] = {
    "file": _file,
    "redis": lambda folder: _redis(shared_redis().url, False, new_prefix()),
    "redis-hash-tag": lambda folder: _redis(shared_cluster().url, True, new_prefix("{p%d}")),
}
_SERVERS = pytest.mark.servers


@pytest.fixture(
    params=["file", *(pytest.param(kind, marks=_SERVERS) for kind in ("redis", "redis-hash-tag"))]
)
def journal_(request: pytest.FixtureRequest, tmp_path: Path) -> _Journal:
    return _KINDS[request.param](tmp_path)


@pytest.fixture(
    params=[pytest.param(kind, marks=_SERVERS) for kind in ("redis", "redis-hash-tag")]
)
def trimmable(request: pytest.FixtureRequest, tmp_path: Path) -> _Journal:
    return _KINDS[request.param](tmp_path)


def _objective(trial: optuna.Trial) -> float:
    value = trial.suggest_float("x", -1.0, 1.0)
    trial.suggest_categorical("c", ["a", None, 2.5])
    trial.set_user_attr("k", "v")
    return value


def _fill(storage: Any) -> None:
    """Studies and trials of every kind, mixed with those of studies that are then deleted."""
    rng = random.Random(0)
    sampler = RandomSampler(seed=0)
    names = ["kept", "gone", "0", "", "gone too"]
    studies = [
        optuna.create_study(storage=storage, study_name=name, sampler=sampler) for name in names
    ]
    two = optuna.create_study(
        storage=storage, study_name="two", directions=["minimize", "maximize"], sampler=sampler
    )
    for _ in range(40):
        rng.choice(studies).optimize(_objective, n_trials=1)
    kept = studies[0]
    kept.set_user_attr("a", [1, {"b": None}])
    kept.set_user_attr("a", "later")
    kept.set_user_attr("ż\ud800", -0.0)
    storage.set_study_system_attr(kept._study_id, "s", 2**70)
    kept.enqueue_trial({"x": 0.25}, user_attrs={"queued": True})
    two.enqueue_trial({"y": 0.5})
    (waiting,) = two.get_trials(states=(TrialState.WAITING,))
    # Optuna's interface allows values before the end.
    assert storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING, [0.5, 1.0])
    running = two.ask()
    running.suggest_float("y", 1e-5, 1.0, log=True)
    storage.set_trial_intermediate_value(running._trial_id, 3, math.nan)
    storage.set_trial_intermediate_value(running._trial_id, 4, -math.inf)
    two.tell(two.ask(), [math.inf, -0.0])
    for state in (TrialState.PRUNED, TrialState.FAIL):
        trial = kept.ask()
        trial.report(1.5, 7)
        kept.tell(trial, state=state)
    for name in ("gone", "gone too"):
        optuna.delete_study(study_name=name, storage=storage)
    storage.flush()


# --- contents ------------------------------------------------------------------------------------


def test_everything_is_equal_and_optuna_opens_it(journal_: _Journal) -> None:
    _fill(journal_.open())
    before = storage_contents(journal_.open())
    assert storage_contents(journal_.open_optuna()) == before
    n_before = len(journal_.records())
    for _ in range(2):  # a compacted journal can be compacted
        report = journal.compact(journal_.open_log())
        assert report.n_records == n_before
        n_before = report.n_kept
        assert len(journal_.records()) == n_before + 1  # and the head
        assert storage_contents(journal_.open()) == before
        assert storage_contents(journal_.open_optuna()) == before


def test_ids_numbers_and_names_go_on_where_they_were(journal_: _Journal, tmp_path: Path) -> None:
    """The same is done to a compacted journal and to one that was not."""
    (tmp_path / "whole").mkdir()
    whole = _file(tmp_path / "whole")
    told: list[Any] = []
    for at in (journal_, whole):
        storage = at.open()
        _fill(storage)
        if at is journal_:
            journal.compact(at.open_log())
            storage = at.open()
        kept, two = (storage.get_study_id_from_name(name) for name in ("kept", "two"))
        again = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "gone")
        ids = [storage.create_new_trial(study_id) for study_id in (two, again, kept)]
        numbers = [storage.get_trial_number_from_id(trial_id) for trial_id in ids]
        told.append((kept, two, again, ids, numbers, storage.get_best_trial(kept)._trial_id))
        waiting = storage.get_all_trials(kept, states=(TrialState.WAITING,))
        told.append([trial._trial_id for trial in waiting])
    assert told[:2] == told[2:]


def test_owners_of_running_trials_stay(journal_: _Journal) -> None:
    storage = journal_.open()
    study = optuna.create_study(storage=storage, study_name="s")
    trial = study.ask()
    study.enqueue_trial({"x": 0.5})
    claimed = study.ask()
    me = storage._exchanger.worker_id
    journal.compact(journal_.open_log())
    again = journal_.open()
    again.get_all_trials(0)
    owners = [again._replica.owner(each._trial_id) for each in (trial, claimed)]
    assert owners == [me, me]


def test_a_placeholder_takes_64_bytes_and_the_rest_no_more_than_before(tmp_path: Path) -> None:
    """The full size is in benchmarks/compaction.py."""
    path, live_path = tmp_path / "journal.log", tmp_path / "live.log"
    n_trials, share = 2000, 5
    _write_trials(path, n_trials, deleted=lambda number: number % share != 0)
    _write_trials(live_path, n_trials // share, deleted=lambda number: False)
    before = storage_contents(_file(tmp_path).open())
    journal.compact(journal.JournalFileBackend(str(path)))
    assert storage_contents(_file(tmp_path).open()) == before
    lines = path.read_bytes().splitlines(keepends=True)
    placeholders = [line for line in lines if b'"op_code":4' in line and b"crc" not in line]
    assert len(placeholders) == n_trials - n_trials // share
    assert max(map(len, placeholders)) <= 64
    n_dropped = len(placeholders) + 1
    assert path.stat().st_size <= 1.5 * live_path.stat().st_size + 64 * n_dropped


def _write_trials(path: Path, n_trials: int, deleted: Callable[[int], bool]) -> None:
    """A journal of trials of 5 parameters in study 0, or in study 1, which is then deleted."""
    lines: list[r.AnyOperation] = [
        r.CreateStudy(study_name=f"s{n}", directions=[1], worker_id="w", seq=n) for n in range(2)
    ]
    distribution = optuna.distributions.distribution_to_json(
        optuna.distributions.FloatDistribution(0, 1)
    )
    for number in range(n_trials):
        mark: dict[str, Any] = {"worker_id": "6f1c0b0e-6b0e-4c36-9d34-5f1a7d1f0a11"}
        time = "2026-01-02T03:04:05.678901+00:00"
        study_id = int(deleted(number))
        lines.append(r.CreateTrial(study_id=study_id, datetime_start=time, seq=9 * number, **mark))
        for n, name in enumerate("abcde"):
            lines.append(
                r.SetTrialParam(
                    trial_id=number, param_name=name, param_value_internal=number / n_trials,
                    distribution=distribution, seq=9 * number + 1 + n, **mark,
                )
            )  # fmt: skip
        lines.append(
            r.SetTrialStateValues(
                trial_id=number, state=r.COMPLETE, values=[0.5], datetime_complete=time,
                seq=9 * number + 8, **mark,
            )
        )  # fmt: skip
    lines.append(r.DeleteStudy(study_id=1, worker_id=mark["worker_id"], seq=9 * n_trials))
    path.write_bytes(b"".join(map(r.encode_line, lines)))


# --- those at work -------------------------------------------------------------------------------


def test_those_who_have_read_everything_go_on_without_reading_it_again(
    journal_: _Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = journal_.open()
    study = optuna.create_study(storage=storage, study_name="s", sampler=RandomSampler(seed=0))
    study.optimize(_objective, n_trials=5)
    trial = study.ask()
    trial.suggest_float("x", -1.0, 1.0)
    storage.flush()
    reader = journal_.open()
    reader.get_all_trials(0)
    journal.compact(journal_.open_log())
    for each in (storage, reader):
        monkeypatch.setattr(each._exchanger, "_read_anew", lambda: pytest.fail("read anew"))
    study.tell(trial, 1.0)
    assert [t.number for t in reader.get_all_trials(0)] == list(range(6))
    study.optimize(_objective, n_trials=2)
    assert storage_contents(storage) == storage_contents(journal_.open())
    assert storage_contents(reader) == storage_contents(storage)


@pytest.mark.parametrize("n_times", [1, 2])
def test_those_who_lag_read_it_anew(journal_: _Journal, n_times: int) -> None:
    storage = journal_.open()
    study = optuna.create_study(storage=storage, study_name="s", sampler=RandomSampler(seed=0))
    lagging, writing = journal_.open(), journal_.open()
    lost = optuna.load_study(study_name="s", storage=writing).ask()
    study.optimize(_objective, n_trials=5)
    for _ in range(n_times):
        journal.compact(journal_.open_log())
        study.optimize(_objective, n_trials=2)
    assert len(lagging.get_all_trials(0)) == 6 + 2 * n_times
    writing.set_trial_state_values(lost._trial_id, TrialState.COMPLETE, [1.5])
    assert writing.get_trial(lost._trial_id).values == [1.5]
    assert storage_contents(lagging) == storage_contents(storage) == storage_contents(writing)
    (contents,) = storage_contents(journal_.open_optuna()).values()
    assert [trial["number"] for trial in contents["trials"]] == list(range(6 + 2 * n_times))


def test_a_conditional_append_of_one_that_lags(tmp_path: Path) -> None:
    journal_ = _file(tmp_path)
    study = optuna.create_study(storage=journal_.open(), study_name="s")
    lagging = journal_.open()
    study.optimize(_objective, n_trials=3)
    journal.compact(journal_.open_log())
    seen: list[int] = []

    def decide(replica: Any) -> Sequence[r.AnyOperation]:
        seen.append(replica.count(0, None))
        marks = lagging._exchanger.marks()
        return [r.SetStudyUserAttr(study_id=0, user_attr={"k": 1}, **marks)]

    assert lagging._exchanger.run_if(decide, NOTHING) == [r.ACCEPTED]
    assert seen[-1] == 3
    assert journal_.open().get_study_user_attrs(0) == {"k": 1}


def test_nobody_waits_while_a_compaction_reads_and_writes(
    journal_: _Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others write between any two of its lines, and all of that stays, in its place."""
    storage = journal_.open()
    study = optuna.create_study(storage=storage, study_name="s", sampler=RandomSampler(seed=0))
    study.optimize(_objective, n_trials=3)
    image = compaction._Reading.image

    def slow_image(reading: Any) -> Iterator[bytes]:
        for line in image(reading):
            study.optimize(_objective, n_trials=1)
            yield line

    monkeypatch.setattr(compaction._Reading, "image", slow_image)
    journal.compact(journal_.open_log())
    assert len(study.trials) > 6
    assert storage_contents(journal_.open()) == storage_contents(storage)
    assert storage_contents(journal_.open_optuna()) == storage_contents(storage)


def test_many_records_that_come_meanwhile(
    journal_: _Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = journal_.open_log()
    cursor = log.exchange([_study(0)], START, NOTHING).cursor
    image = compaction._Reading.image

    def slow_image(reading: Any) -> Iterator[bytes]:
        yield from image(reading)
        log.exchange([_study(1 + n) for n in range(3000)], cursor, NOTHING)

    monkeypatch.setattr(compaction._Reading, "image", slow_image)
    journal.compact(journal_.open_log())
    assert [study.study_name for study in journal_.open().get_all_studies()] == [
        f"w-{n}" for n in range(3001)
    ]
    assert len(log.exchange([], cursor, NOTHING).news) == 3000


def _study(seq: int, worker_id: str = "w") -> r.CreateStudy:
    return r.CreateStudy(
        study_name=f"{worker_id}-{seq}", directions=[1], worker_id=worker_id, seq=seq
    )


@pytest.mark.parametrize("n_known", [0, 5, 60])
def test_a_reader_far_behind_whose_journal_becomes_shorter(
    trimmable: _Journal, n_known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the script's answer and the reading of the records that it told of."""
    monkeypatch.setattr("trialstore.logs.redis.log._NEWS_MAX", 20)
    log = trimmable.open_log()
    cursor = START
    for seq in range(60):
        study_id = seq // 2
        record = _study(seq) if seq % 2 == 0 else r.DeleteStudy(
            study_id=study_id, worker_id="w", seq=seq
        )  # fmt: skip
        cursor = log.exchange([record], cursor, NOTHING).cursor
        if seq + 1 == n_known:
            known = cursor
    reader = trimmable.open_log()
    clock = ManualClock()
    reader._connection.clock = clock
    get = reader._reader.get

    def get_late(numbers: Any) -> Any:
        reader._reader.get = get
        late = compaction.compact

        def image(reading: Any) -> Iterator[bytes]:
            yield r.encode_line(_study(0, "short"))[:-1]

        with monkeypatch.context() as patch:
            patch.setattr(compaction._Reading, "image", image)
            late(trimmable.open_log())
        return get(numbers)

    if n_known == 60:
        # In the middle of what is compacted.
        log.exchange([_study(60 + n) for n in range(40)], cursor, NOTHING)
    reader._reader.get = get_late
    try:
        news = reader.exchange([], known if n_known else START, NOTHING).news
    except LogCompactedError:
        assert n_known
    else:
        assert [record.worker_id for record in news][1:] == ["short"]
    assert clock.slept_s == 0
    ask = reader._connection.ask
    behind = reader._keys.record(ask(reader._reader.last_number) + 1)
    assert not ask(lambda door: door.command("EXISTS", behind))


class _Forgetful:
    """A log whose answer to the first append is lost, and a compaction comes before the next.

    Args:
        log: The real one.
        compact: Compacts it.
    """

    def __init__(self, log: Any, compact: Callable[[], object]) -> None:
        self.log = log
        self.compact = compact
        self.is_armed = False

    def exchange(self, records: Any, cursor: Any, wanted: Any) -> Any:
        if records and self.is_armed:
            self.is_armed = False
            self.log.exchange(records, cursor, wanted)
            self.compact()
        return self.log.exchange(records, cursor, wanted)

    def exchange_if(self, decide: Any, cursor: Any, wanted: Any) -> Any:
        if self.is_armed:
            self.is_armed = False
            self.log.exchange_if(decide, cursor, wanted)
            self.compact()
        return self.log.exchange_if(decide, cursor, wanted)

    def load_base(self) -> Any:
        return self.log.load_base()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.log, name)


def _answers_are_lost(
    journal_: _Journal, change: Callable[[Any], object], opened: Any = None
) -> None:
    storage = journal_.open()
    optuna.create_study(storage=storage, study_name="s").optimize(_objective, n_trials=3)
    log = _Forgetful(opened or journal_.open_log(), lambda: change(journal_.open_log()))
    storage = trialstore.storage.Storage(log)
    storage.get_all_trials(0)
    log.is_armed = True
    trial_id = storage.create_new_trial(0)
    assert trial_id == 3
    log.is_armed = True
    assert storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    log.is_armed = True
    created = storage.write_if(
        lambda replica: [r.CreateTrial(study_id=0, datetime_start=None, **storage.marks())],
        Wanted(trials_of=frozenset((0,))),
    )
    assert created == [Outcome(Verdict.ACCEPTED, 4)]
    assert [trial.number for trial in journal_.open().get_all_trials(0)] == list(range(5))
    assert storage.get_trial(trial_id).values == [1.0]


def test_what_was_sent_before_a_compaction_is_known_after(journal_: _Journal) -> None:
    _answers_are_lost(journal_, journal.compact)


def test_what_was_sent_before_a_trim_is_known_after(trimmable: _Journal) -> None:
    _answers_are_lost(trimmable, journal.trim)


def test_marks_say_what_became_of_each_record() -> None:
    seen = compaction._Seen()
    for seq, outcome in (
        (0, Outcome(Verdict.ACCEPTED, 7)), (1, r.ACCEPTED), (4, r.ACCEPTED),
        (3, Outcome(Verdict.FINISHED)), (6, r.ACCEPTED),
    ):  # fmt: skip
        seen.note(seq, outcome)
    marks = seen.marks()
    assert marks == Marks([(0, 1), (3, 4), (6, 6)], {0: 7}, {3: Verdict.FINISHED})
    assert compaction._Seen(marks).marks() == marks
    assert set(marks.outcomes()) == {0, 1, 3, 4, 6}
    assert marks.outcomes()[0].id == 7
    assert marks.outcomes()[3].verdict is Verdict.FINISHED
    many = compaction._Seen()
    for n in range(10_000):
        many.note(2 * n, Outcome(Verdict.ACCEPTED, n))
    assert list(many.marks().outcomes())[-1] == 19_998
    assert len(many.marks().created) < 1000


def test_clients_of_a_server_go_on(tmp_path: Path) -> None:
    """One that has read further than the compaction, one that lags, and the server lags too."""
    path = served_url("journal", tmp_path)
    port = serve(path)
    clients = [open_grpc(port) for _ in range(2)]
    study = optuna.create_study(storage=clients[0], study_name="s", sampler=RandomSampler())
    study.optimize(_objective, n_trials=3)
    clients[1].get_all_trials(0)
    here = trialstore.JournalStorage(journal.JournalFileBackend(path))
    optuna.load_study(study_name="s", storage=here).optimize(_objective, n_trials=3)
    for _ in range(2):
        journal.compact(journal.JournalFileBackend(path))
        trial_id = clients[0].create_new_trial(0)
        assert clients[0].set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        assert storage_contents(clients[1]) == storage_contents(here)
    assert [trial.number for trial in here.get_all_trials(0)] == list(range(8))


@pytest.fixture
def behind_server(tmp_path: Path) -> tuple[_Journal, int]:
    """A journal that can be trimmed, and the port of a server over it."""
    url, prefix = shared_redis().url, new_prefix()
    return _redis(url, False, prefix), serve(f"{url}?prefix={prefix}")


@pytest.mark.servers
def test_clients_of_a_server_go_on_after_a_trim(behind_server: tuple[_Journal, int]) -> None:
    journal_, port = behind_server
    ahead, lagging, idle = (open_grpc(port) for _ in range(3))
    _fill(ahead)
    idle.get_all_trials(0)
    for _ in range(2):
        optuna.load_study(study_name="kept", storage=journal_.open()).optimize(
            _objective, n_trials=3
        )
        journal.trim(journal_.open_log())
        before = storage_contents(journal_.open())
        for client in (ahead, lagging, idle, open_grpc(port)):
            assert storage_contents(client) == before
        optuna.load_study(study_name="kept", storage=lagging).optimize(_objective, n_trials=3)
    assert storage_contents(journal_.open()) == storage_contents(ahead)


@pytest.mark.servers
@pytest.mark.parametrize("change", [journal.trim, journal.compact])
def test_what_a_client_sent_before_a_trim_or_a_compaction_is_known_after(
    change: Callable[[Any], object], behind_server: tuple[_Journal, int]
) -> None:
    journal_, port = behind_server
    _answers_are_lost(journal_, change, GrpcLog("localhost", port))


# --- refusals ------------------------------------------------------------------------------------


def test_where_plain_optuna_workers_have_written_it_must_be_forced(journal_: _Journal) -> None:
    optuna.create_study(storage=journal_.open(), study_name="ours").optimize(
        _objective, n_trials=2
    )
    optuna.create_study(storage=journal_.open_optuna(), study_name="theirs").optimize(
        _objective, n_trials=3
    )
    before = storage_contents(journal_.open())
    n_records = len(journal_.records())
    with pytest.raises(CompactionRefusedError, match="plain Optuna worker"):
        journal.compact(journal_.open_log())
    assert len(journal_.records()) == n_records
    journal.compact(journal_.open_log(), force=True)
    assert storage_contents(journal_.open()) == before
    assert storage_contents(journal_.open_optuna()) == before
    journal.compact(journal_.open_log())  # nothing of theirs is left


def test_what_is_no_such_journal_is_refused(tmp_path: Path) -> None:
    journal_ = _file(tmp_path)
    for other in (journal_.open(), journal_.open_optuna()):
        for change in (journal.compact, journal.trim):
            with pytest.raises(TypeError, match="JournalRedisBackend"):
                change(other)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="compacted instead"):
        journal.trim(journal_.open_log())


def test_one_compaction_at_a_time(journal_: _Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    optuna.create_study(storage=journal_.open(), study_name="s").optimize(_objective, n_trials=2)
    image = compaction._Reading.image
    refused = []

    def image_with_another(reading: Any) -> Iterator[bytes]:
        with pytest.raises(LogUnavailableError, match="somebody else"):
            journal.compact(journal_.open_log())
        refused.append(True)
        return image(reading)

    monkeypatch.setattr(compaction._Reading, "image", image_with_another)
    journal.compact(journal_.open_log())
    assert refused


def test_large_records_are_not_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _file(tmp_path)
    study = optuna.create_study(storage=file.open(), study_name="s")
    study.optimize(lambda trial: trial.set_user_attr("k", "v" * 1000) or 1.0, n_trials=20)
    write_all, lengths = system.write_all, []

    def noted(fd: int, data: bytes) -> int:
        lengths.append(len(data))
        return write_all(fd, data)

    monkeypatch.setattr(compacting, "_COPIED_BYTES", 3000)
    monkeypatch.setattr(system, "write_all", noted)
    before = storage_contents(file.open())
    journal.compact(file.open_log())
    assert max(lengths) < 6000
    assert storage_contents(file.open()) == before


def test_an_empty_journal_stays_empty(journal_: _Journal) -> None:
    assert journal.compact(journal_.open_log()).n_records == 0
    assert journal_.records() == []
    optuna.create_study(storage=journal_.open(), study_name="s")


def test_optunas_storage_over_our_backend_is_told(journal_: _Journal) -> None:
    theirs = optuna.storages.JournalStorage(journal_.open_log())
    study = optuna.create_study(storage=theirs, study_name="s")
    study.optimize(_objective, n_trials=2)
    journal.compact(journal_.open_log(), force=True)
    with pytest.raises(LogReplacedError):
        study.optimize(_objective, n_trials=1)
    with pytest.raises(LogReplacedError):
        study.set_user_attr("k", 1)
    again = optuna.storages.JournalStorage(journal_.open_log())
    optuna.load_study(study_name="s", storage=again).optimize(_objective, n_trials=1)
    assert [trial.number for trial in journal_.open().get_all_trials(0)] == [0, 1, 2]


@pytest.mark.servers
def test_a_cluster_with_a_plain_prefix_refuses() -> None:
    plain = _redis(shared_cluster().url, True, new_prefix())
    optuna.create_study(storage=plain.open(), study_name="s")
    for change in (journal.compact, journal.trim):
        with pytest.raises(CompactionRefusedError, match="hash tag"):
            change(plain.open_log(), force=True)
    assert len(plain.records()) == 1


@pytest.mark.parametrize("compacted_by", ["link", "path"])
def test_a_journal_behind_symlinks_stays_one(tmp_path: Path, compacted_by: str) -> None:
    (tmp_path / "data").mkdir()
    path, link = tmp_path / "data" / "study-2026.log", tmp_path / "study.log"
    (tmp_path / "data" / "latest.log").symlink_to("study-2026.log")
    link.symlink_to(Path("data") / "latest.log")
    storages = [trialstore.JournalStorage(FileLog(str(each))) for each in (path, link)]
    optuna.create_study(storage=storages[0], study_name="s").optimize(_objective, n_trials=2)
    assert [storage.get_n_trials(0) for storage in storages] == [2, 2]
    inode = path.stat().st_ino
    journal.compact(FileLog(str(link if compacted_by == "link" else path)))
    assert link.is_symlink() and (tmp_path / "data" / "latest.log").is_symlink()
    assert not path.is_symlink()
    assert path.stat().st_ino != inode
    assert [storage.create_new_trial(0) for storage in storages] == [2, 3]
    for storage in (
        *storages,
        *(trialstore.JournalStorage(FileLog(str(p))) for p in (path, link)),
    ):
        assert [trial.number for trial in storage.get_all_trials(0)] == [0, 1, 2, 3]
    assert not list(tmp_path.rglob("*.compacting"))


def test_behind_symlinks_there_is_one_lock_and_one_store_of_leases(tmp_path: Path) -> None:
    (tmp_path / "link.log").symlink_to("journal.log")
    optuna.create_study(storage=_file(tmp_path).open(), study_name="s")
    link, path = FileLog(str(tmp_path / "link.log")), FileLog(str(tmp_path / "journal.log"))
    assert link.path == path.path == str(tmp_path / "journal.log")
    own_lock = journal.JournalFileSymlinkLock(str(tmp_path / "link.log"))
    assert repr(own_lock) == repr(link._file.lock) == repr(path._file.lock)
    link.take_lease("dead")
    assert path.expired(0, {1: "dead"}, -60.0) == [1]


def test_a_file_with_another_name_is_not_compacted(tmp_path: Path) -> None:
    optuna.create_study(storage=_file(tmp_path).open(), study_name="s")
    path = tmp_path / "journal.log"
    (tmp_path / "hard.log").hardlink_to(path)
    before = path.read_bytes(), path.stat().st_ino
    with pytest.raises(CompactionRefusedError, match="hard links"):
        journal.compact(FileLog(str(path)))
    assert (path.read_bytes(), path.stat().st_ino) == before
    (tmp_path / "hard.log").unlink()
    journal.compact(FileLog(str(path)))


def test_by_a_symlink_too_there_is_one_compaction_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.log").symlink_to("journal.log")
    optuna.create_study(storage=_file(tmp_path).open(), study_name="s")
    image = compaction._Reading.image
    refused = []

    def image_with_another(reading: Any) -> Iterator[bytes]:
        with pytest.raises(LogUnavailableError, match="somebody else"):
            journal.compact(FileLog(str(tmp_path / "link.log")))
        refused.append(True)
        return image(reading)

    monkeypatch.setattr(compaction._Reading, "image", image_with_another)
    journal.compact(_file(tmp_path).open_log())
    assert refused


# --- who may open it -----------------------------------------------------------------------------


def _owned_journal(folder: Path, mode: int) -> Path:
    optuna.create_study(storage=_file(folder).open(), study_name="s")
    path = folder / "journal.log"
    os.chown(path, OWNER, GROUP)
    path.chmod(mode)
    return path


def _access(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid, status.st_mode & 0o7777


@as_root
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o666])
def test_owner_group_and_mode_stay(tmp_path: Path, mode: int) -> None:
    path = _owned_journal(tmp_path, mode)
    journal.compact(FileLog(str(path)))
    assert _access(path) == (OWNER, GROUP, mode)


@as_root
@pytest.mark.parametrize("mode", [0o660, 0o664, 0o666])
def test_compacted_by_a_member_of_its_group_it_stays_the_groups(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _owned_journal(tmp_path, mode)
    may_not_chown(monkeypatch, is_of_group=True)
    journal.compact(FileLog(str(path)))
    assert _access(path) == (os.geteuid(), GROUP, mode)


@as_root
@pytest.mark.parametrize("mode", [0o640, 0o664])
def test_where_its_group_would_be_locked_out_it_is_refused(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _owned_journal(tmp_path, mode)
    before = path.read_bytes(), path.stat().st_ino, _access(path)
    may_not_chown(monkeypatch, is_of_group=False)
    with pytest.raises(CompactionRefusedError, match="member of the group"):
        journal.compact(FileLog(str(path)))
    assert (path.read_bytes(), path.stat().st_ino, _access(path)) == before
    assert not (tmp_path / "journal.log.compacting").exists()


@as_root
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666])
def test_a_group_that_may_what_others_may_is_not_needed(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _owned_journal(tmp_path, mode)
    may_not_chown(monkeypatch, is_of_group=False)
    journal.compact(FileLog(str(path)))
    assert path.stat().st_mode & 0o7777 == mode


# --- killed --------------------------------------------------------------------------------------


class _Killed(BaseException):
    pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")
def test_a_kill_at_any_step_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal_ = _file(tmp_path)
    _fill(journal_.open())
    before = storage_contents(journal_.open())
    whole = (tmp_path / "journal.log").read_bytes()
    left = set()
    for step in range(100):
        (tmp_path / "journal.log").write_bytes(whole)
        pid = os.fork()
        if not pid:
            _die_at(step, monkeypatch)
            try:
                journal.compact(journal_.open_log())
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert storage_contents(journal_.open()) == before, f"step {step}"
        left.add((tmp_path / "journal.log").read_bytes() == whole)
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert step > 6
    assert left == {True, False}
    journal.compact(journal_.open_log())
    assert not (tmp_path / "journal.log.compacting").exists()


def _die_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process end before one of the system calls that change something."""
    calls = iter(range(1000))

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            if next(calls) == step:
                os._exit(9)
            return call(*args, **options)

        return called

    for name in ("write_all", "pwrite", "sync_fd", "sync_folder"):
        monkeypatch.setattr(system, name, dying(getattr(system, name)))
    for name in ("ftruncate", "replace", "unlink"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


@pytest.mark.servers
@pytest.mark.parametrize("change", [journal.compact, journal.trim])
@pytest.mark.parametrize("is_answered", [False, True])
def test_a_kill_or_a_lost_answer_at_any_step_on_redis(
    change: Any, is_answered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, or, where ``is_answered`` is not, its answers lost: old or new, never half."""
    monkeypatch.setattr("trialstore.logs.redis.compaction._PIECE_RECORDS", 40)
    monkeypatch.setattr("trialstore.logs.redis.compaction._SWITCH_REMOVES", 25)
    trimmable = _KINDS["redis"](tmp_path)
    storage = trimmable.open()
    _fill(storage)
    before = storage_contents(trimmable.open())
    for step in range(200):
        log = trimmable.open_log()
        run = log._compactor._step
        steps = iter(range(1000))
        reached = False

        def dying(*args: Any, run: Any = run, steps: Any = steps, step: int = step) -> Any:
            nonlocal reached
            if next(steps) == step:
                reached = True
                if is_answered:
                    raise _Killed
                run(*args)
            return run(*args)

        log._compactor._step = dying
        try:
            change(log)
        except _Killed:
            # Nobody is left to release the lock; it expires.
            log._connection.ask(lambda door: door.command("DEL", log._keys.compacting))  # noqa: B023
        assert storage_contents(trimmable.open()) == before, f"step {step}"
        assert storage_contents(storage) == before
        optuna.load_study(study_name="kept", storage=storage).set_user_attr("n", step)
        before = storage_contents(trimmable.open())
        if not reached:
            break
    assert step > 4
    log = trimmable.open_log()
    left = (log._keys.stale, log._keys.new(1))
    assert log._connection.ask(lambda door: door.command("EXISTS", *left)) == 0


@pytest.mark.parametrize("number", [1, 3, -1])
def test_a_new_record_that_was_evicted_leaves_the_old_journal(
    trimmable: _Journal, number: int
) -> None:
    """Nobody reads them between the writing and the switch, so they are the first to go."""
    storage = trimmable.open()
    _fill(storage)
    before, records = storage_contents(trimmable.open()), trimmable.records()
    log = trimmable.open_log()
    switch = log._compactor._switch

    def evict_first(token: bytes, head: bytes, count: int, position: Any) -> None:
        evicted = log._keys.new(number % count)
        assert log._connection.ask(lambda door: door.command("DEL", evicted)) == 1
        switch(token, head, count, position)

    log._compactor._switch = evict_first
    with pytest.raises(LogUnavailableError, match=r"evicted.*Nothing was changed"):
        journal.compact(log)
    assert trimmable.records() == records
    assert storage_contents(trimmable.open()) == storage_contents(storage) == before
    journal.compact(trimmable.open_log())
    assert len(trimmable.records()) < len(records)
    assert storage_contents(trimmable.open()) == storage_contents(storage) == before


def _snapshot(log: Any) -> None:
    cursor = log.exchange((), START, NOTHING).cursor
    log.save_snapshot(lambda: (b"x" * 20_000_000, cursor))


@pytest.mark.servers
@pytest.mark.parametrize("policy", ["noeviction", "allkeys-lru"])
@pytest.mark.parametrize(
    ("write", "room"),
    [
        (journal.compact, 2_000_000),
        (journal.compact, 3_500_000),  # enough for a part
        (journal.trim, 2_000_000),
        (_snapshot, 30_000_000),
    ],
)
def test_what_memory_is_too_short_for_takes_none_from_the_records(
    policy: str, write: Callable[[Any], Any], room: int
) -> None:
    find_binary("redis-server")
    server = OptionsServer("--maxmemory-policy", policy)
    try:
        journal_ = _redis(server.url, False, "")
        storage = journal_.open()
        study = optuna.create_study(storage=storage, study_name="s")
        for number in range(40):
            study.set_user_attr(f"k{number}", "x" * 100_000)
        records = journal_.records()
        client = redis.Redis.from_url(server.url)
        client.config_set("maxmemory", client.info("memory")["used_memory"] + room)
        client.close()
        log = journal_.open_log()
        with pytest.raises(LogUnavailableError, match="more memory"):
            write(log)
        study.set_user_attr("k", 1)
        assert journal_.records()[:-1] == records
        assert not _ask(log, "EXISTS", log._keys.new(1))
    finally:
        server.remove()


def _ask(log: Any, *command: Any) -> Any:
    return log._connection.ask(lambda door: door.command(*command))


def _killed_after_its_switch(trimmable: _Journal) -> None:
    """A compaction that does not get to its sweep."""
    log = trimmable.open_log()
    run = log._compactor._step

    def dying(name: str, *args: Any) -> Any:
        answer = run(name, *args)
        if name == "switch":
            raise _Killed
        return answer

    log._compactor._step = dying
    with pytest.raises(_Killed):
        journal.compact(log)
    _ask(log, "DEL", log._keys.compacting)


def _old_records(log: Any, n_before: int) -> list[int]:
    """Numbers above the last one that hold something."""
    numbers = range(int(_ask(log, "GET", log._keys.number)) + 1, n_before)
    return [number for number in numbers if _ask(log, "EXISTS", log._keys.record(number))]


def test_a_compaction_killed_after_its_switch_leaves_nothing_behind_the_end(
    trimmable: _Journal,
) -> None:
    """A plain Optuna worker that takes a number first has no record there until it sets it."""
    _fill(trimmable.open())
    n_before = len(trimmable.records())
    _killed_after_its_switch(trimmable)
    log = trimmable.open_log()
    assert int(_ask(log, "GET", log._keys.number)) + 1 < n_before
    assert _old_records(log, n_before) == []
    assert _ask(log, "EXISTS", log._keys.stale) == 0


def test_old_records_far_behind_the_end_are_passed_over_and_then_removed(
    trimmable: _Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a very long journal the switch removes a part; older versions of ours removed none."""
    monkeypatch.setattr("trialstore.logs.redis.compaction._SWITCH_REMOVES", 2)
    storage = trimmable.open()
    _fill(storage)
    before, n_before = storage_contents(trimmable.open()), len(trimmable.records())
    _killed_after_its_switch(trimmable)
    log = trimmable.open_log()
    old = _old_records(log, n_before)
    assert old[0] == int(_ask(log, "GET", log._keys.number)) + 3
    assert list(log.findings(deep=False)) == []
    for n in range(5):
        assert storage_contents(trimmable.open()) == storage_contents(storage) == before
        optuna.load_study(study_name="kept", storage=storage).set_user_attr("n", n)
        before = storage_contents(trimmable.open())
    assert _old_records(log, n_before) == old[3:]
    journal.compact(trimmable.open_log())
    assert _old_records(log, n_before) == []
    assert _ask(log, "EXISTS", log._keys.stale) == 0


@pytest.mark.parametrize("also_complete", [False, True])
def test_a_number_lost_after_a_killed_compaction_is_no_empty_journal(
    trimmable: _Journal, also_complete: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trialstore.logs.redis.compaction._SWITCH_REMOVES", 2)
    storage = trimmable.open()
    _fill(storage)
    _killed_after_its_switch(trimmable)
    log = trimmable.open_log()
    records = trimmable.records()
    number = _ask(log, "GET", log._keys.number)
    _ask(log, "DEL", log._keys.number)
    if also_complete:
        _ask(log, "DEL", log._keys.complete)
    for open_worker in (lambda: storage, trimmable.open):
        with pytest.raises(LogCorruptError):
            open_worker().create_new_study([optuna.study.StudyDirection.MINIMIZE], "new")
    (finding,) = log.findings(deep=False)
    assert finding.kind == "counter-behind"
    _ask(log, "SET", log._keys.number, number)
    assert trimmable.records() == records


# --- without exclusion ---------------------------------------------------------------------------


def _unlocked(path: Path) -> FileLog:
    return FileLog(str(path), _NoLock())  # type: ignore[arg-type]


def test_an_evicted_writer_whose_file_is_replaced_writes_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    storage = trialstore.JournalStorage(_unlocked(path))
    study = optuna.create_study(storage=storage, study_name="s")
    log = storage._exchanger.log
    write = log._file._write  # type: ignore[attr-defined]

    def write_late(data: bytes) -> int:
        log._file._write = write  # type: ignore[attr-defined]
        journal.compact(_unlocked(path))
        return write(data)

    log._file._write = write_late  # type: ignore[attr-defined]
    study.set_user_attr("k", 1)
    assert _file(tmp_path).open().get_study_user_attrs(0) == {"k": 1}
    assert storage.get_study_user_attrs(0) == {"k": 1}


@pytest.mark.parametrize("what", ["a torn tail", "a torn prefix", "a batch, space is low"])
def test_what_an_evicted_writer_repairs_is_not_the_file_that_replaced_its_own(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.log"
    _fill(_file(tmp_path).open())
    before = storage_contents(_file(tmp_path).open())
    torn = b'{"op_code":8,"worker_id":"' + b"x" * 500
    if what == "a torn prefix":
        torn += r.encode_line(_study(5, "other"))
    if what == "a batch, space is low":
        torn = b""
        monkeypatch.setattr("trialstore.logs.file.journal_file._SPACE_LOW_BYTES", 1 << 60)
    with path.open("ab") as file:
        file.write(torn)
    log = _unlocked(path)
    opened = log._file._opened_in_place
    replaced = b""

    def open_late() -> Any:
        nonlocal replaced
        log._file._opened_in_place = opened  # type: ignore[method-assign]
        journal.compact(_unlocked(path))
        with path.open("ab") as file:
            file.write(b" " * 1_000_000)  # so that the offsets are in it
        replaced = path.read_bytes()
        return opened()

    log._file._opened_in_place = open_late  # type: ignore[method-assign]
    with pytest.raises(LogUnavailableError, match="was replaced"):
        log.exchange([_study(6, "late"), _study(7, "late")], START, NOTHING)
    assert path.read_bytes() == replaced
    log.exchange([_study(6, "late")], START, NOTHING)
    contents = storage_contents(_file(tmp_path).open())
    assert {name: contents[name] for name in before} == before
    assert "late-6" in contents


@pytest.mark.parametrize("at", ["written", "renamed"])
def test_what_an_evicted_writer_wrote_to_the_old_file_is_there_once(
    tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the compactor reads it, or after it has copied the last record it saw."""
    path = tmp_path / "journal.log"
    storage = trialstore.JournalStorage(_unlocked(path))
    optuna.create_study(storage=storage, study_name="s").optimize(_objective, n_trials=2)
    log = storage._exchanger.log
    ids: list[int] = []
    if at == "written":
        is_in_place = log._file._is_in_place  # type: ignore[attr-defined]

        def look_late() -> bool:
            log._file._is_in_place = is_in_place  # type: ignore[attr-defined]
            journal.compact(_unlocked(path))
            return bool(is_in_place())

        log._file._is_in_place = look_late  # type: ignore[attr-defined]
        ids.append(storage.create_new_trial(0))
    else:
        replace = os.replace

        def replace_late(source: str, target: str) -> None:
            monkeypatch.setattr(os, "replace", replace)
            ids.append(storage.create_new_trial(0))
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_late)
        journal.compact(_unlocked(path))
    assert ids == [2]
    assert [trial.number for trial in storage.get_all_trials(0)] == [0, 1, 2]
    assert storage_contents(_file(tmp_path).open()) == storage_contents(storage)


# --- trim ----------------------------------------------------------------------------------------


def test_a_trimmed_journal_has_everything_and_few_records(trimmable: _Journal) -> None:
    storage, lagging = trimmable.open(), trimmable.open()
    _fill(storage)
    waiting = trimmable.open()
    waiting.get_all_trials(0)
    before = storage_contents(trimmable.open())
    for _ in range(2):
        journal.trim(trimmable.open_log())
        log = trimmable.open_log()
        last = log._connection.ask(log._reader.last_number)
        lines = log._reader.get(range(last + 1))
        assert [n for n, line in enumerate(lines) if line] == [0, 1, last]
        assert storage_contents(trimmable.open()) == before
        assert storage_contents(lagging) == before
        assert storage_contents(waiting) == before
    optuna.load_study(study_name="kept", storage=lagging).optimize(_objective, n_trials=3)
    assert storage_contents(trimmable.open()) == storage_contents(storage)


def test_a_trimmed_journal_stops_optuna_at_once_until_it_is_compacted(
    trimmable: _Journal,
) -> None:
    _fill(trimmable.open())
    before = storage_contents(trimmable.open())
    journal.trim(trimmable.open_log())
    with pytest.raises(KeyError, match="op_code"):
        trimmable.open_optuna()
    with pytest.raises(LogCompactedError, match="trimmed"):
        optuna.storages.JournalStorage(trimmable.open_log())
    journal.compact(trimmable.open_log())
    assert storage_contents(trimmable.open_optuna()) == before
    assert storage_contents(trimmable.open()) == before


def test_a_trial_that_runs_through_a_trim_keeps_its_owner(trimmable: _Journal) -> None:
    storage = trimmable.open()
    study = optuna.create_study(storage=storage, study_name="s")
    study.optimize(_objective, n_trials=2)
    trial = study.ask()
    for change in (journal.trim, journal.compact, journal.compact):
        change(trimmable.open_log())
        again = trimmable.open()
        again.get_all_trials(0)
        assert again._replica.owner(trial._trial_id) == storage._exchanger.worker_id
    study.tell(trial, 1.0)


def test_a_trimmed_journal_without_its_snapshot_says_so(trimmable: _Journal) -> None:
    _fill(trimmable.open())
    journal.trim(trimmable.open_log())
    log = trimmable.open_log()
    log._connection.ask(lambda door: door.command("DEL", log._keys.base))
    with pytest.raises(LogCompactedError, match="trialstore:base"):
        trimmable.open()


def test_a_short_journal_is_not_trimmed(trimmable: _Journal) -> None:
    optuna.create_study(storage=trimmable.open(), study_name="s")
    journal.trim(trimmable.open_log())
    assert len(trimmable.records()) == 1


# --- the first record ----------------------------------------------------------------------------


def test_the_first_record_is_what_it_was_or_nothing() -> None:
    head = heads.Head(["a", "b"], [1, 2], [3, 4], {"w": Marks([(0, 5)], {1: 2}, {3: 4})})
    line = heads.encode_head(head)
    assert heads.decode_head(b"   " + line) == head
    assert heads.encode_head(head) == line
    assert heads.decode_head(line.replace(b'"a"', b'"c"')) is None
    assert heads.decode_head(line[:-1]) is None
    assert heads.decode_head(r.encode_line(_study(0))) is None
    assert isinstance(r.decode_line(line), r.DeleteStudy)


def test_a_snapshot_of_before_is_not_used_after(journal_: _Journal) -> None:
    storage = journal_.open()
    _fill(storage)
    log = journal_.open_log()
    from trialstore.snapshot import catch_up, dump, restore

    restored = catch_up(log, restore(log, None))
    log.save_snapshot(lambda: (dump(*restored), restored.cursor))
    assert journal_.open_log().load_snapshot() is not None
    journal.compact(journal_.open_log())
    assert journal_.open_log().load_snapshot() is None
    assert storage_contents(journal_.open()) == storage_contents(storage)
