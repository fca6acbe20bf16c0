"""A user's own journal backend as a log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import math
from pathlib import Path
import pickle
from typing import Any

from optuna.storages.journal import JournalFileBackend as OptunaFileBackend, JournalRedisBackend
from optuna.storages.journal._base import BaseJournalBackend, BaseJournalSnapshot
import pytest

from trialstore.errors import (
    LogCorruptError,
    LogUnavailableError,
    OutcomeUnknownError,
    TrialstoreError,
)
from trialstore.log import NOTHING, START, SnapshotStore
from trialstore.logs.backend import BackendLog
from trialstore.logs.file import FileLog
from trialstore.records import CreateStudy, CreateTrial, SetTrialUserAttr


class ListBackend(BaseJournalBackend):
    """The least that Optuna asks for."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return iter(self.logs[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.logs += logs


class SnapshotBackend(ListBackend, BaseJournalSnapshot):
    def __init__(self) -> None:
        super().__init__()
        self.snapshot: bytes | None = None

    def save_snapshot(self, snapshot: bytes) -> None:
        self.snapshot = snapshot

    def load_snapshot(self) -> bytes | None:
        return self.snapshot


def study() -> CreateStudy:
    return CreateStudy(worker_id="w", seq=0, study_name="s", directions=[1])


def trial(seq: int) -> CreateTrial:
    return CreateTrial(worker_id="w", seq=seq, study_id=0, datetime_start="2026-01-02T03:04:05")


def test_the_cursor_counts_records() -> None:
    log = BackendLog(ListBackend())
    first = log.exchange([study(), trial(1)], START, NOTHING)
    assert (first.outcomes, first.news, first.cursor) == (None, [study(), trial(1)], 2)
    assert log.exchange([], first.cursor, NOTHING).news == []
    second = log.exchange([trial(2)], first.cursor, NOTHING)
    assert (second.news, second.cursor) == ([trial(2)], 3)
    assert len(log.exchange([], START, NOTHING).news) == 3


def test_appended_dictionaries_are_not_the_callers() -> None:
    backend = ListBackend()
    value = {"deep": [1.5, math.inf, None]}
    record = SetTrialUserAttr(worker_id="w", seq=1, trial_id=0, user_attr={"key": value})
    BackendLog(backend).exchange([record], START, NOTHING)
    value["deep"].clear()
    assert backend.logs[0]["user_attr"] == {"key": {"deep": [1.5, math.inf, None]}}


@pytest.mark.parametrize("make", [OptunaFileBackend, FileLog])
def test_file_backends_by_their_two_methods(tmp_path: Path, make: Any) -> None:
    log = BackendLog(make(str(tmp_path / "journal")))
    cursor = log.exchange([study()], START, NOTHING).cursor
    copy = pickle.loads(pickle.dumps(log))
    assert copy.exchange([trial(1)], cursor, NOTHING).news == [trial(1)]
    assert log.exchange([], cursor, NOTHING).news == [trial(1)]
    assert not isinstance(log, SnapshotStore)


def test_errors_of_the_backend() -> None:
    class Broken(ListBackend):
        appends = True

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            if not self.appends:
                raise ConnectionError("gone")

        def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
            raise ConnectionError("gone")
            yield

    backend = Broken()
    log = BackendLog(backend)
    with pytest.raises(LogUnavailableError, match="Broken: reading failed"):
        log.exchange([], START, NOTHING)
    with pytest.raises(OutcomeUnknownError, match="reading failed"):
        log.exchange([study()], START, NOTHING)
    backend.appends = False
    with pytest.raises(OutcomeUnknownError, match="appending failed") as caught:
        log.exchange([study()], START, NOTHING)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_our_own_errors_pass() -> None:
    class Ours(ListBackend):
        def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
            raise TrialstoreError("as it is")

    with pytest.raises(TrialstoreError, match=r"^as it is$"):
        BackendLog(Ours()).exchange([study()], START, NOTHING)


@pytest.mark.parametrize("bad", [{}, {"op_code": 99}, {"op_code": 4}, {"op_code": 0, "a": 1}])
def test_what_is_no_record_is_located(bad: dict[str, Any]) -> None:
    backend = ListBackend()
    log = BackendLog(backend)
    cursor = log.exchange([study()], START, NOTHING).cursor
    backend.logs.append(bad)
    with pytest.raises(LogCorruptError, match="ListBackend, record 1") as caught:
        log.exchange([], cursor, NOTHING)
    assert caught.value.record_number == 1


def test_snapshots_where_the_backend_keeps_them() -> None:
    backend = SnapshotBackend()
    log = BackendLog(backend)
    assert isinstance(log, SnapshotStore)
    assert isinstance(pickle.loads(pickle.dumps(log)), SnapshotStore)
    assert log.load_snapshot() is None
    assert log.save_snapshot(lambda: (b"nothing", START))
    assert log.save_snapshot(lambda: None)
    assert backend.snapshot is None
    cursor = log.exchange([study(), trial(1)], START, NOTHING).cursor
    assert log.save_snapshot(lambda: (b"contents", cursor))
    log.exchange([trial(2)], cursor, NOTHING)
    assert log.load_snapshot() == (b"contents", cursor)
    good = backend.snapshot
    assert good is not None
    with pytest.raises(pickle.UnpicklingError):  # which Optuna's own storage survives
        pickle.loads(good)
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1
        backend.snapshot = bytes(damaged)
        assert log.load_snapshot() is None
        backend.snapshot = good[:position]
        assert log.load_snapshot() is None
    backend.snapshot = pickle.dumps("of a plain Optuna worker")
    assert log.load_snapshot() is None
    backend.snapshot = good
    backend.logs = [dict(backend.logs[0]), {**backend.logs[1], "seq": 7}]
    assert log.load_snapshot() is None, "the journal has been replaced"
    backend.logs.clear()
    assert log.load_snapshot() is None


def test_optunas_pickled_snapshots_are_left_alone() -> None:
    class MyRedis(JournalRedisBackend):
        def __init__(self) -> None:
            pass

    log = BackendLog(MyRedis())
    assert not isinstance(log, SnapshotStore)
