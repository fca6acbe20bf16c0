"""The journal file: what readers see, what appenders repair, what is damage."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from pathlib import Path
import pickle
import random
from typing import Any

import msgspec
import optuna
from optuna.distributions import CategoricalDistribution, distribution_to_json
from optuna.storages.journal import (
    JournalFileBackend as OptunaFileBackend,
    JournalFileOpenLock as OptunaOpenLock,
)
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import TrialState
import pytest

from ownership import GROUP, OWNER, as_root, may_not_chown
import trialstore
from trialstore.errors import LogCorruptError, LogReplacedError, LogUnavailableError
from trialstore.log import NOTHING, START, SnapshotStore
from trialstore.logs.file import FileLog, filelock, journal_file, system
from trialstore.logs.file.lines import glued_at
from trialstore.logs.file.position import MARK_BYTES
from trialstore.records import (
    AnyOperation,
    CreateStudy,
    CreateTrial,
    SetTrialIntermediateValue,
    SetTrialStateValues,
    SetTrialUserAttr,
    counts_for_nothing,
    encode_line,
)
from trialstore.testing.clock import ManualClock
from trialstore.testing.syncs import SyncCounter

_TIME = "2026-01-02T03:04:05.678901+00:00"


def study(seq: int = 0) -> CreateStudy:
    return CreateStudy(worker_id="w", seq=seq, study_name="s", directions=[1])


def trial(seq: int) -> CreateTrial:
    return CreateTrial(worker_id="w", seq=seq, study_id=0, datetime_start=_TIME)


def attr(seq: int, value: Any) -> SetTrialUserAttr:
    return SetTrialUserAttr(worker_id="w", seq=seq, trial_id=0, user_attr={"key": value})


def complete(seq: int) -> SetTrialStateValues:
    return SetTrialStateValues(
        worker_id="w", seq=seq, trial_id=0, state=1, values=[0.5], datetime_complete=_TIME
    )


def optuna_line(record: AnyOperation) -> bytes:
    """The line that a plain Optuna worker writes: no checksum, no sequence number."""
    fields = msgspec.to_builtins(record)
    fields.pop("seq", None)
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def read_all(path: Path) -> list[AnyOperation]:
    return list(FileLog(str(path)).exchange([], START, NOTHING).news)  # type: ignore[arg-type]


def seqs(records: Any) -> list[int]:
    return [record.seq for record in records]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def log(path: Path) -> FileLog:
    return FileLog(str(path))


# --- appending and reading -----------------------------------------------------------------------


def test_the_cursor_is_a_value_that_msgpack_carries(log: FileLog, path: Path) -> None:
    first = log.exchange([study()], START, NOTHING)
    carried = msgspec.msgpack.decode(msgspec.msgpack.encode(first.cursor))
    log.exchange([trial(1)], first.cursor, NOTHING)
    assert seqs(FileLog(str(path)).exchange([], carried, NOTHING).news) == [1]
    assert first.outcomes is None
    hash(first.cursor)


def test_what_is_read_back_equals_what_the_appender_got(log: FileLog, path: Path) -> None:
    records = [study(), trial(1), attr(2, [math.inf, {"a": -0.0}, "\ud800", None, 2**70])]
    news = log.exchange(records, START, NOTHING).news
    assert repr(news) == repr(read_all(path)) == repr(records)
    assert news[2] is not records[2], "a later change to the caller's value must not be seen"


def test_nan_among_many_lines_is_read(log: FileLog, path: Path) -> None:
    records: list[AnyOperation] = [study(), trial(1)]
    for step in range(100):
        value = math.nan if step % 7 == 0 else 0.5
        records.append(
            SetTrialIntermediateValue(
                worker_id="w", seq=step, trial_id=0, step=step, intermediate_value=value
            )
        )
    log.exchange(records, START, NOTHING)
    assert repr(read_all(path)) == repr(records)


def test_files_larger_than_a_chunk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "CHUNK_BYTES", 128)
    records = [study(), trial(1), *(attr(seq, "x" * (seq * 17)) for seq in range(2, 60))]
    path.write_bytes(b"".join(map(encode_line, records)))
    assert read_all(path) == records


def test_an_append_returns_what_others_wrote_first(log: FileLog, path: Path) -> None:
    cursor = log.exchange([study()], START, NOTHING).cursor
    FileLog(str(path)).exchange([trial(1)], START, NOTHING)
    assert seqs(log.exchange([trial(2)], cursor, NOTHING).news) == [1, 2]


def test_a_far_behind_appender_catches_up(log: FileLog, path: Path) -> None:
    big = [study(), trial(1), attr(2, "x" * 100_000), attr(3, 0)]
    FileLog(str(path)).exchange(big, START, NOTHING)
    assert seqs(log.exchange([trial(4)], START, NOTHING).news) == [0, 1, 2, 3, 4]


def test_an_evicted_holder_that_wrote_in_between_is_seen(
    log: FileLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cursor = log.exchange([study()], START, NOTHING).cursor
    original = log._file._write

    def late(data: bytes) -> int:
        with path.open("ab") as file:
            file.write(encode_line(trial(7)))
        return original(data)

    monkeypatch.setattr(log._file, "_write", late)
    batch = log.exchange([trial(8)], cursor, NOTHING)
    assert seqs(batch.news) == [7, 8]
    assert batch.cursor == FileLog(str(path)).exchange([], START, NOTHING).cursor


def test_reading_takes_no_lock(path: Path) -> None:
    class Refuses(BaseJournalFileLock):
        def acquire(self) -> bool:
            raise AssertionError("a reader took the lock")

        def release(self) -> None:
            raise AssertionError

    FileLog(str(path)).exchange([study()], START, NOTHING)
    reader = FileLog(str(path), Refuses())
    assert seqs(reader.exchange([], START, NOTHING).news) == [0]
    assert seqs(reader.read_logs(0)[0:0]) == []


def test_nothing_new_costs_one_system_call(log: FileLog, monkeypatch: pytest.MonkeyPatch) -> None:
    cursor = log.exchange([study()], START, NOTHING).cursor

    def refuse(*args: Any) -> bytes:
        raise AssertionError("read although nothing is new")

    monkeypatch.setattr(system, "pread", refuse)
    assert log.exchange([], cursor, NOTHING).news == []


def test_only_what_is_new_is_read(
    log: FileLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [study(), trial(1), attr(2, "x" * 100_000)]
    cursor = log.exchange(records, START, NOTHING).cursor
    FileLog(str(path)).exchange([trial(3)], START, NOTHING)
    n_bytes = 0
    original = system.pread

    def counted(fd: int, count: int, offset: int) -> bytes:
        nonlocal n_bytes
        found = original(fd, count, offset)
        n_bytes += len(found)
        return found

    monkeypatch.setattr(system, "pread", counted)
    assert seqs(log.exchange([], cursor, NOTHING).news) == [3]
    assert n_bytes == len(encode_line(trial(3))) + MARK_BYTES


def test_an_append_is_one_write(log: FileLog, monkeypatch: pytest.MonkeyPatch) -> None:
    cursor = log.exchange([study()], START, NOTHING).cursor
    written = []
    original = os.write

    def traced(fd: int, data: bytes) -> int:
        written.append((fd, bytes(data)))
        return original(fd, data)

    monkeypatch.setattr(os, "write", traced)
    records = [trial(1), attr(2, 1), complete(3)]
    log.exchange(records, cursor, NOTHING)
    lines = b"".join(map(encode_line, records))
    assert [data for fd, data in written if fd == log._file.fd] == [lines]


def test_more_than_one_write_takes_is_refused_whole(
    log: FileLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cursor = log.exchange([study(), trial(1)], START, NOTHING).cursor
    before = path.read_bytes()
    monkeypatch.setattr(journal_file, "_WRITE_BYTES_MAX", 2000)
    with pytest.raises(ValueError, match="in one write"):
        log.exchange([attr(seq, "x" * 300) for seq in range(2, 9)], cursor, NOTHING)
    with pytest.raises(ValueError, match="in one write"):
        log.append_logs([{"op_code": 10, "worker_id": "w", "note": "x" * 2000}])
    assert path.read_bytes() == before
    log.exchange([attr(2, "x")], cursor, NOTHING)
    assert seqs(read_all(path)) == [0, 1, 2]


def test_deferred_records_that_are_too_much_for_one_write_are_written_one_by_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = trialstore.JournalStorage(FileLog(str(path)), linger_s=1000)
    trials = [optuna.create_study(storage=storage, study_name="s").ask()]
    trials.append(trials[0].study.ask())
    monkeypatch.setattr(journal_file, "_WRITE_BYTES_MAX", 2000)
    trials[0].set_user_attr("too large", "x" * 2000)
    for number in range(9):
        trials[number % 2].set_user_attr(str(number), "x" * 300)
    trials[0].study.tell(trials[1], 1.0)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError, match="in one write"):
        trials[0].study.tell(trials[0], 1.0)
    storage.close()
    storage = trialstore.JournalStorage(FileLog(str(path)))
    found = optuna.load_study(storage=storage, study_name="s").trials
    assert [sorted(trial.user_attrs) for trial in found] == [list("02468"), list("1357")]


def test_any_lock_object_will_do(path: Path) -> None:
    calls = []

    class Mine(BaseJournalFileLock):
        def acquire(self) -> bool:
            calls.append("acquire")
            return True

        def release(self) -> None:
            calls.append("release")
            raise RuntimeError("evicted")  # as Optuna's does; the record counts all the same

    FileLog(str(path), Mine()).exchange([study()], START, NOTHING)
    FileLog(str(path), OptunaOpenLock(str(path))).exchange([trial(1)], START, NOTHING)
    assert calls == ["acquire", "release"]
    assert seqs(read_all(path)) == [0, 1]


def test_a_lock_that_says_no_is_an_error(path: Path) -> None:
    class No(BaseJournalFileLock):
        def acquire(self) -> bool:
            return False

        def release(self) -> None:
            raise AssertionError

    with pytest.raises(LogUnavailableError, match="not acquired"):
        FileLog(str(path), No()).exchange([study()], START, NOTHING)
    assert path.read_bytes() == b""


# --- syncs ---------------------------------------------------------------------------------------


def test_one_sync_per_durable_exchange_and_none_otherwise(log: FileLog, path: Path) -> None:
    with SyncCounter() as syncs:
        cursor = log.exchange([study()], START, NOTHING).cursor
        assert syncs.by_file == {str(path.parent): 1, str(path): 1}
        for records, more in (
            ([trial(1)], 1),
            ([attr(2, 1)], 0),
            ([attr(3, 1), complete(4)], 1),
            ([], 0),
        ):
            before = syncs.total
            cursor = log.exchange(records, cursor, NOTHING).cursor
            assert syncs.total - before == more, records


def test_the_folder_that_is_synced_has_the_file_and_not_a_symlink_to_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "journal").touch()
    (tmp_path / "link").symlink_to(tmp_path / "data" / "journal")
    with SyncCounter() as syncs:
        FileLog(str(tmp_path / "link")).exchange([study()], START, NOTHING)
    assert set(syncs.by_file) == {str(tmp_path / "data"), str(tmp_path / "data" / "journal")}


def test_durability_process_never_syncs(path: Path) -> None:
    with SyncCounter() as syncs:
        FileLog(str(path), durability="process").exchange([study()], START, NOTHING)
    assert syncs.total == 0


@pytest.mark.parametrize("where", ["_remove_own_lock_file", "_leave_queue"])
def test_what_a_signals_handler_raises_in_a_release_leaves_no_lock(
    where: str, log: FileLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cursor = log.exchange([study()], START, NOTHING).cursor
    lock = log._file.lock

    def late(*args: object) -> None:
        monkeypatch.undo()
        raise TimeoutError

    monkeypatch.setattr(lock, where, late)
    cursor = log.exchange([trial(1)], cursor, NOTHING).cursor
    assert not Path(f"{path}.lock").exists()
    with contextlib.closing(FileLog(str(path))) as other:
        other.exchange([trial(2)], cursor, NOTHING)
    log.exchange([trial(3)], cursor, NOTHING)


@pytest.mark.parametrize("local", [True, False])
def test_sync_after_the_release_on_a_local_file_system_and_before_it_elsewhere(
    path: Path, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "file_system_is_local", lambda path: local)
    events = []

    class Traced(BaseJournalFileLock):
        def acquire(self) -> bool:
            events.append("acquire")
            return True

        def release(self) -> None:
            events.append("release")

    log = FileLog(str(path), Traced())
    cursor = log.exchange([study()], START, NOTHING).cursor
    monkeypatch.setattr(system, "sync_fd", lambda fd: events.append("sync"))
    events.clear()
    batch = log.exchange([trial(1)], cursor, NOTHING)
    assert events == ["acquire", *(["release", "sync"] if local else ["sync", "release"])]
    assert FileLog(str(path)).exchange([], cursor, NOTHING) == batch


def test_a_network_drive_of_macos_is_synced_as_it_can_be(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, command: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    synced = []
    monkeypatch.setattr(system.sys, "platform", "darwin")
    monkeypatch.setattr(system.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(system.fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", synced.append)
    FileLog(str(path)).exchange([study()], START, NOTHING)
    assert synced


# --- torn tails and glued records ----------------------------------------------------------------


# Attributes of somebody who keeps what he found in another journal, as JSON and as text.
_NESTED = [{"op_code": 1, "worker_id": "w", "study_id": 3}, {"op_code": 1, "study_id": 4}]
_LOOKS_LIKE_RECORDS: dict[str, Any] = {
    "nothing like it": {"op_code": 4, "b": [1, {}]},
    "a list": [*_NESTED, _NESTED],
    "a dict": {"a": _NESTED[0], "b": {"c": _NESTED[0]}},
    "one in another": {"op_code": 8, "worker_id": "w", "trial_id": 1, "user_attr": {"k": _NESTED}},
    "strings": [json.dumps(_NESTED), json.dumps(json.dumps(_NESTED)), "{", json.dumps(_NESTED[0])],
    "lines of ours": [json.loads(encode_line(trial(i))) for i in range(2)],
}


def acknowledged(path: Path) -> list[AnyOperation]:
    records = [study(), trial(1), attr(2, {"op_code": 4, "a": ['{"op_code":']}), complete(3)]
    path.write_bytes(b"".join(map(encode_line, records)))
    return records


@pytest.mark.parametrize("optuna_first", [False, True], ids=["ours", "plain Optuna, then ours"])
@pytest.mark.parametrize("torn_by", [encode_line, optuna_line], ids=["our line", "Optuna's line"])
@pytest.mark.parametrize("padding", [b"", b"\0" * 100], ids=["", "then NULs"])
@pytest.mark.parametrize("value", ["nothing like it", "a list"])
def test_cut_at_every_byte_nothing_acknowledged_is_lost(
    path: Path, optuna_first: bool, torn_by: Any, padding: bytes, value: str
) -> None:
    records = acknowledged(path)
    whole = path.read_bytes()
    torn = torn_by(attr(4, _LOOKS_LIKE_RECORDS[value]))
    for cut in range(len(torn)):
        path.write_bytes(whole + torn[:cut] + padding)
        expected = list(records)
        assert read_all(path) == expected
        reader = FileLog(str(path))
        cursor = reader.exchange([], START, NOTHING).cursor
        assert path.read_bytes() == whole + torn[:cut] + padding, "readers leave the tail alone"
        if optuna_first:
            OptunaFileBackend(str(path)).append_logs([json.loads(optuna_line(trial(5)))])
            expected.append(msgspec.structs.replace(trial(5), seq=-1))
            assert read_all(path) == expected, cut
        size = path.stat().st_size
        log = FileLog(str(path))
        appended = log.exchange([trial(6)], START, NOTHING)
        expected.append(trial(6))
        assert list(appended.news) == expected, cut
        asked = not optuna_first and cut + len(padding) > 0  # by a space, whether it is torn
        assert path.stat().st_size == size + asked + len(encode_line(trial(6)))
        # Fresh readers, old readers, the appender, and Optuna agree.
        assert read_all(path) == expected, cut
        assert list(reader.exchange([], cursor, NOTHING).news) == expected[len(records) :]
        assert log.exchange([], appended.cursor, NOTHING).news == []
        logs = list(OptunaFileBackend(str(path)).read_logs(0))
        assert [fields["op_code"] for fields in logs] == [
            json.loads(optuna_line(record))["op_code"] for record in expected
        ]


@pytest.mark.parametrize("value", _LOOKS_LIKE_RECORDS)
@pytest.mark.parametrize("torn_by", [encode_line, optuna_line], ids=["our line", "Optuna's line"])
def test_whatever_is_in_it_a_torn_record_counts_for_nothing(value: str, torn_by: Any) -> None:
    torn, whole = torn_by(attr(4, _LOOKS_LIKE_RECORDS[value])), encode_line(trial(5))[:-1]
    for cut in range(len(torn)):
        for behind in (b"", b" ", b"\0" * 9, b"\0 "):
            assert counts_for_nothing(torn[:cut] + behind), cut
            glued = torn[:cut] + behind
            assert glued_at(glued + whole) == len(glued), cut


def test_a_write_under_way_is_no_torn_tail(
    log: FileLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a holder that was evicted, and goes on."""
    cursor = log.exchange([study()], START, NOTHING).cursor
    line = encode_line(trial(1))
    with path.open("ab") as file:
        file.write(line[:40])

    class Continues(ManualClock):
        def sleep(self, duration_s: float) -> None:
            if not path.read_bytes().endswith(b"\n"):
                with path.open("ab") as file:
                    file.write(line[40:])

    monkeypatch.setattr(journal_file, "CLOCK", Continues())
    assert seqs(log.exchange([trial(2)], cursor, NOTHING).news) == [1, 2]
    assert seqs(read_all(path)) == [0, 1, 2]


class _WriteUnderWay:
    """A kernel in the middle of a write, of one that our lock does not keep out.

    Of the write, ``begun`` can be seen, and for long nothing more. Whoever else writes to the file
    waits until it has come to its end.
    """

    def __init__(
        self, path: Path, begun: bytes, rest: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._path = path
        self._rest = rest
        self._write = os.write
        self._append(begun)
        monkeypatch.setattr(os, "write", self._after(os.write))
        monkeypatch.setattr(system, "pwrite", self._after(system.pwrite))
        monkeypatch.setattr(journal_file, "CLOCK", ManualClock())

    def _append(self, data: bytes) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._write(fd, data)
        os.close(fd)

    def _after(self, call: Any) -> Any:
        def called(fd: int, *args: Any) -> Any:
            if self._rest and os.path.samestat(os.fstat(fd), self._path.stat()):
                rest, self._rest = self._rest, b""
                self._append(rest)
            return call(fd, *args)

        return called


@pytest.mark.parametrize("n_seen", [1, 40, 150])
@pytest.mark.parametrize("by", [encode_line, optuna_line], ids=["ours", "plain Optuna"])
def test_a_write_that_the_lock_does_not_keep_out_is_not_overwritten(
    log: FileLog, path: Path, n_seen: int, by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer was evicted, or came by another path, which has another lock."""
    cursor = log.exchange([study()], START, NOTHING).cursor
    whole = by(attr(1, "x" * 50)) + by(trial(2))
    assert n_seen < len(whole) - 1
    _WriteUnderWay(path, whole[:n_seen], whole[n_seen:], monkeypatch)
    news = list(log.exchange([trial(3)], cursor, NOTHING).news)
    assert len(news) == 3, "what was acknowledged came first"
    assert news[-1] == trial(3)
    assert read_all(path) == [study(), *news]
    assert path.read_bytes().endswith(whole + b" " + encode_line(trial(3)))
    assert len(list(OptunaFileBackend(str(path)).read_logs(0))) == 4


def test_a_write_that_came_to_a_short_end_is_a_torn_tail(
    log: FileLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer was killed, or the disk was full."""
    cursor = log.exchange([study()], START, NOTHING).cursor
    whole = encode_line(trial(1))
    _WriteUnderWay(path, whole[:40], whole[40:70], monkeypatch)
    assert seqs(log.exchange([trial(2)], cursor, NOTHING).news) == [2]
    assert path.read_bytes() == encode_line(study()) + b" " * 72 + encode_line(trial(2))


def test_a_space_that_a_crash_left_is_no_reason_for_another(log: FileLog, path: Path) -> None:
    cursor = log.exchange([study()], START, NOTHING).cursor
    with path.open("ab") as file:
        file.write(b" ")
    assert log.exchange([], cursor, NOTHING).news == []
    log.exchange([trial(1)], cursor, NOTHING)
    assert path.read_bytes() == encode_line(study()) + b" " + encode_line(trial(1))


def test_a_torn_tail_that_may_only_be_read_is_left(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = acknowledged(path)
    with path.open("ab") as file:
        file.write(b'{"op_code":5,"wor')
    before = path.read_bytes()
    original = os.open

    def read_only(name: Any, flags: int, *args: Any, **options: Any) -> int:
        if name == str(path) and flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(13, "Permission denied", name)
        return original(name, flags, *args, **options)

    monkeypatch.setattr(os, "open", read_only)
    log = FileLog(str(path))
    assert log.exchange_if(lambda news, _: list(news)[:0], START, NOTHING).news == []
    with pytest.raises(LogUnavailableError, match="not written by this user"):
        log.exchange([trial(9)], START, NOTHING)
    assert path.read_bytes() == before
    assert read_all(path) == records


def test_garbage_behind_the_last_newline_goes(path: Path) -> None:
    records = acknowledged(path)
    for garbage in (b"\xff\xfe garbage", b"\0" * 5000, b"[1,", b"   ", os.urandom(64)):
        path.write_bytes(path.read_bytes() + garbage.replace(b"\n", b""))
        assert read_all(path) == records
        records.append(trial(len(records)))
        FileLog(str(path)).exchange([records[-1]], START, NOTHING)
        assert read_all(path) == records
        assert len(list(OptunaFileBackend(str(path)).read_logs(0))) == len(records)


def test_two_torn_prefixes_in_one_line(path: Path) -> None:
    records = acknowledged(path)
    with path.open("ab") as file:
        file.write(encode_line(trial(4))[:-1] + optuna_line(trial(5))[:40] + encode_line(trial(6)))
    records.append(trial(6))
    assert read_all(path) == records
    records.append(trial(7))
    FileLog(str(path)).exchange([trial(7)], START, NOTHING)
    assert len(list(OptunaFileBackend(str(path)).read_logs(0))) == len(records)


@pytest.mark.parametrize("value", _LOOKS_LIKE_RECORDS)
@pytest.mark.parametrize("at", ["end", "middle"])
@pytest.mark.parametrize("torn", [b"", b'{"op_code":5,"wor'], ids=["", "behind a torn prefix"])
def test_a_newline_that_became_another_byte_is_damage(
    path: Path, value: str, at: str, torn: bytes
) -> None:
    whole = encode_line(study()) + torn + encode_line(attr(1, _LOOKS_LIKE_RECORDS[value]))[:-1]
    after = encode_line(trial(2)) if at == "middle" else b""
    for byte in set(range(256)) - set(b"\n{ \0"):
        if torn and byte in b",]}":
            continue  # it might be what was torn that goes on: a crash and damage in one place
        path.write_bytes(whole + bytes([byte]) + after)
        with pytest.raises(LogCorruptError, match="record 1"):
            read_all(path)


def test_a_torn_first_line_does_not_change_the_identity(path: Path) -> None:
    path.write_bytes(b'{"op_code":0,"worker' + encode_line(study()))
    cursor = FileLog(str(path)).exchange([], START, NOTHING).cursor
    FileLog(str(path)).exchange([trial(1)], START, NOTHING)
    assert path.read_bytes().startswith(b" " * 20 + b'{"op_code":0,')
    assert seqs(FileLog(str(path)).exchange([], cursor, NOTHING).news) == [1]


@pytest.mark.parametrize("data", [b"my notes", b'{"a":1}', pickle.dumps([1])])
def test_a_file_of_something_else_is_not_taken_for_a_torn_record(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    log = FileLog(str(path))
    for use in (lambda: log.exchange([study()], START, NOTHING), lambda: list(log.entries())):
        with pytest.raises(LogCorruptError, match="no journal"):
            use()
    assert path.read_bytes() == data


@pytest.mark.parametrize("torn", [b" ", b"{", b'{"op{"op_code":0,', b"\0" * 9 + b"ker", b" ker"])
def test_a_torn_first_record_is_repaired_whatever_is_left_of_it(path: Path, torn: bytes) -> None:
    path.write_bytes(torn)
    FileLog(str(path)).exchange([study()], START, NOTHING)
    assert read_all(path) == [study()]


def test_the_repair_waits_for_an_appender_that_saw_the_line_without_the_lock(
    log: FileLog, path: Path
) -> None:
    acknowledged(path)
    with path.open("ab") as file:
        file.write(b'{"op_code":5,"wor' + optuna_line(trial(4)))
    cursor = log.exchange([], START, NOTHING).cursor
    before = path.read_bytes()
    assert b'"wor{' in before
    log.exchange([trial(5)], cursor, NOTHING)
    assert path.read_bytes().startswith(before.replace(b'{"op_code":5,"wor{', b" " * 17 + b"{"))


# --- damage --------------------------------------------------------------------------------------


def test_every_bit_flip_is_harmless_or_located(path: Path) -> None:
    records = acknowledged(path)
    whole = path.read_bytes()
    starts = [0]
    for line in whole.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    located = 0
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            number = max(i for i, start in enumerate(starts) if start <= position)
            try:
                found = read_all(path)
            except LogCorruptError as error:
                located += 1
                assert error.source == str(path)
                assert error.record_number == number, (position, bit)
                assert error.offset == starts[number]
                with pytest.raises(LogCorruptError):
                    FileLog(str(path)).exchange([trial(9)], START, NOTHING)
                assert path.read_bytes() == damaged, "the file is left alone"
            else:
                assert found == records, (position, bit)
    assert located > 7 * len(whole)


@pytest.mark.parametrize(
    "line", [b"\n", b"   \n", b"[]\n", b"{}\n", b"null\n", b'{"op_code":99}\n', b"\0" * 50 + b"\n"]
)
def test_a_line_that_is_no_record_is_damage(path: Path, line: bytes) -> None:
    records = acknowledged(path)
    offset = path.stat().st_size
    with path.open("ab") as file:
        file.write(line + encode_line(trial(9)))
    with pytest.raises(LogCorruptError, match="record 4") as caught:
        read_all(path)
    assert (caught.value.offset, caught.value.record_number) == (offset, len(records))
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), LogCorruptError)


def test_fuzzed_lines_give_our_error_or_what_was_written(path: Path) -> None:
    """Whole lines may have gone without a trace; what is read is what they said, in order."""
    records = acknowledged(path)
    whole = path.read_bytes()
    rng = random.Random(20)
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(damaged))
            what = rng.random()
            if what < 0.4:
                damaged[at] = rng.randrange(256)
            elif what < 0.7:
                del damaged[at : at + rng.randint(1, 40)]
            else:
                damaged[at:at] = rng.randbytes(rng.randint(1, 40))
            damaged = damaged or bytearray(b"\n")
        path.write_bytes(damaged)
        try:
            found = read_all(path)
        except LogCorruptError:
            assert path.read_bytes() == damaged
        else:
            written = iter(records)
            assert all(record in written for record in found)


def test_what_others_stored_and_nobody_can_read_is_left_out(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choices = distribution_to_json(CategoricalDistribution(["a", "b"]))

    def param(trial_id: int, internal: float, distribution: str) -> dict[str, Any]:
        return {
            "op_code": 5,
            "trial_id": trial_id,
            "param_name": f"p{trial_id}",
            "param_value_internal": internal,
            "distribution": distribution,
        }

    def told(trial_id: int, *values: float, at: str = _TIME) -> dict[str, Any]:
        fields = {"op_code": 6, "trial_id": trial_id, "state": 1, "values": list(values)}
        return {**fields, "datetime_complete": at}

    OptunaFileBackend(str(path)).append_logs(
        [
            {"worker_id": "somebody", **fields}
            for fields in (
                {"op_code": 0, "study_name": "s", "directions": [1]},
                *[{"op_code": 4, "study_id": 0, "datetime_start": _TIME}] * 6,
                param(0, 7, choices),
                told(0, 0.5),
                param(1, 0.5, '{"name": "OddDistribution", "attributes": {}}'),
                told(1, 0.5),
                told(2, math.nan),
                told(3, 0.5, 0.5),
                told(4, 0.5, at="yesterday"),
                param(5, 1, choices),
                told(5, 0.25),
            )
        ]
    )
    storage = trialstore.JournalStorage(FileLog(str(path)))
    for _ in range(2):
        trials = storage.get_all_trials(0)
        assert [trial.params for trial in trials] == [{}] * 5 + [{"p5": "b"}]
        assert [trial.values for trial in trials] == [[0.5], [0.5], None, None, [0.5], [0.25]]
        states = [TrialState.COMPLETE, TrialState.FAIL]
        assert [states.index(trial.state) for trial in trials] == [0, 0, 1, 1, 0, 0]
        assert trials[4].datetime_complete is None
        assert storage.get_best_trial(0).number == 5
    assert storage.get_trial(storage.create_new_trial(0)).number == 6
    for where in (
        "trial 0: its parameter 'p0'",
        "trial 1: its parameter 'p1'",
        "trial 2: its values",
        "trial 3: its values",
        "trial 4: its datetime_complete",
    ):
        assert caplog.text.count(f"Study 's', {where} can't be read") == 1


def test_damage_seen_without_the_lock_is_looked_at_again_with_it(
    log: FileLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = acknowledged(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:150] + b"\0" * 20 + whole[170:])
    original = log._file.acquire

    def arrives() -> None:
        original()
        path.write_bytes(whole)

    monkeypatch.setattr(log._file, "acquire", arrives)
    assert list(log.exchange([], START, NOTHING).news) == records


@pytest.mark.parametrize("may_lock", [True, False])
def test_a_batch_that_is_being_written_over_itself_has_no_torn_prefix(
    log: FileLog, path: Path, may_lock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a nearly full disk; who reads meanwhile may see later newlines and not those before."""
    records = acknowledged(path)
    whole = path.read_bytes()
    newline = whole.index(b"\n", whole.index(b"\n") + 1)
    path.write_bytes(whole[:newline] + b" " + whole[newline + 1 :])
    original = log._file.acquire

    def arrives() -> None:
        path.write_bytes(whole)
        if not may_lock:
            raise LogUnavailableError("not now")
        original()

    with monkeypatch.context() as patch:
        patch.setattr(log._file, "acquire", arrives)
        batch = log.exchange([], START, NOTHING)
    assert list(batch.news) == records
    log.exchange([trial(9)], batch.cursor, NOTHING)
    assert path.read_bytes() == whole + encode_line(trial(9))


# --- the file itself -----------------------------------------------------------------------------


def test_a_replaced_file_is_noticed(log: FileLog, path: Path) -> None:
    acknowledged(path)
    cursor = log.exchange([], START, NOTHING).cursor
    other = path.with_name("other")
    FileLog(str(other)).exchange([study(9), *map(trial, range(10))], START, NOTHING)
    os.replace(other, path)  # noqa: PTH105
    for records in ([], [trial(4)]):
        with pytest.raises(LogReplacedError, match="new storage"):
            log.exchange(records, cursor, NOTHING)
    assert len(log.exchange([], START, NOTHING).news) == 11


def test_a_copy_of_the_same_journal_in_its_place_goes_on(log: FileLog, path: Path) -> None:
    acknowledged(path)
    cursor = log.exchange([], START, NOTHING).cursor
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.replace(copy, path)  # noqa: PTH105
    assert seqs(log.exchange([trial(4)], cursor, NOTHING).news) == [4]
    assert seqs(read_all(path)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("how", ["truncated", "removed", "rewritten"])
def test_a_file_that_lost_what_was_read_is_noticed(log: FileLog, path: Path, how: str) -> None:
    acknowledged(path)
    cursor = log.exchange([], START, NOTHING).cursor
    if how == "truncated":
        os.truncate(path, 100)
    elif how == "removed":
        path.unlink()
    else:
        path.write_bytes(b"".join(map(encode_line, [study(), *map(trial, range(5, 20))])))
    with pytest.raises(LogReplacedError):
        log.exchange([], cursor, NOTHING)
    with pytest.raises(LogReplacedError):
        log.exchange([trial(4)], cursor, NOTHING)
    assert path.exists() == (how != "removed"), "a journal must not begin anew in the middle"


def test_the_file_stays_open_and_closes(log: FileLog) -> None:
    cursor = log.exchange([study()], START, NOTHING).cursor
    fd = log._file.fd
    log.exchange([trial(1)], cursor, NOTHING)
    assert log._file.fd == fd
    log.close()
    with pytest.raises(OSError):
        os.fstat(fd)
    assert seqs(log.exchange([], cursor, NOTHING).news) == [1]


def test_relative_paths_do_not_follow_chdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = FileLog("journal")
    monkeypatch.chdir("/")
    log.exchange([study()], START, NOTHING)
    assert seqs(read_all(tmp_path / "journal")) == [0]


def test_pickle_carries_path_lock_and_options(path: Path) -> None:
    log = FileLog(str(path), OptunaOpenLock(str(path)), durability="process")
    cursor = log.exchange([study()], START, NOTHING).cursor
    copy = pickle.loads(pickle.dumps(log))
    assert type(copy._file.lock) is OptunaOpenLock
    assert copy._file.durability == "process"
    assert seqs(copy.exchange([trial(1)], cursor, NOTHING).news) == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_opens_for_itself(log: FileLog, path: Path) -> None:
    cursor = log.exchange([study()], START, NOTHING).cursor
    log._file.mutex.acquire()  # as if another thread were in an exchange
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if log._file.fd < 0 and seqs(log.exchange([trial(1)], cursor, NOTHING).news) == [1]:
                status = 0
        finally:
            os._exit(status)
    log._file.mutex.release()
    assert os.waitpid(child, 0)[1] == 0
    assert seqs(log.exchange([trial(2)], cursor, NOTHING).news) == [1, 2]


def test_a_path_that_cannot_be_a_file(tmp_path: Path) -> None:
    for bad in (tmp_path, tmp_path / "missing" / "journal"):
        with pytest.raises(LogUnavailableError):
            FileLog(str(bad))


def test_a_file_that_may_only_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acknowledged(path)
    original = os.open

    def read_only(name: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(13, "Permission denied", name)
        return original(name, flags, *args, **options)

    monkeypatch.setattr(os, "open", read_only)
    log = FileLog(str(path))
    batch = log.exchange([], START, NOTHING)
    assert seqs(batch.news) == [0, 1, 2, 3]
    with pytest.raises(LogUnavailableError, match="can't be locked for writing"):
        log.exchange([trial(4)], batch.cursor, NOTHING)
    monkeypatch.undo()
    log.close()
    os.chmod(path, 0o444)  # noqa: PTH101
    assert seqs(log.exchange([], START, NOTHING).news) == [0, 1, 2, 3]


# --- Optuna's two methods ------------------------------------------------------------------------


def test_optunas_methods_keep_every_field(log: FileLog, path: Path) -> None:
    logs = [{"op_code": 10, "worker_id": "w", "extra": None}, {"op_code": 4, "worker_id": "w"}]
    log.append_logs(logs[:1])
    log.append_logs([])
    OptunaFileBackend(str(path)).append_logs(logs[1:])
    for _ in range(2):
        read = [{k: v for k, v in f.items() if k != "crc"} for f in log.read_logs(0)]
        assert read == logs
    assert log.read_logs(1) == logs[1:]
    assert log.read_logs(2) == []
    with SyncCounter() as syncs:
        log.append_logs([{"op_code": 9, "worker_id": "w"}])
    assert syncs.total == 1, "Optuna's storage relies on it"
    assert len(log.read_logs(2)) == 1
    assert len(log.read_logs(1)) == 2


def test_optunas_storage_works_over_it(path: Path) -> None:
    over_ours = optuna.storages.JournalStorage(FileLog(str(path)))
    study = optuna.create_study(storage=over_ours, study_name="s")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=12, n_jobs=3)
    all_theirs = optuna.storages.JournalStorage(OptunaFileBackend(str(path)))
    all_ours = trialstore.JournalStorage(FileLog(str(path)))
    assert len(study.trials) == 12
    assert study.trials == all_theirs.get_all_trials(0) == all_ours.get_all_trials(0)


@pytest.mark.skipif(os.name == "nt", reason="the folder decides there")
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o664])
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_whoever_may_open_the_journal_may_queue_and_beat(
    path: Path, mode: int, umask: int
) -> None:
    """Else the first one to come would lock the others of its group out, or hide its death."""
    path.touch()
    path.chmod(mode)
    before = os.umask(umask)
    try:
        log = FileLog(str(path))
        cursor = log.exchange([study()], START, NOTHING).cursor
        log.take_lease("w")
        log.exchange([trial(1)], cursor, NOTHING)
        log.expired(0, {0: "w"}, 1.0)
    finally:
        os.umask(before)
    (owner,) = path.parent.glob("*.owner")
    beats = Path(f"{path}.beats")
    for beside in (Path(f"{path}.lock.queue"), owner, beats / "w.beat", beats / "now"):
        assert beside.stat().st_mode & 0o7777 == mode
    assert beats.stat().st_mode & 0o7777 == mode | (mode & 0o444) >> 2


@as_root
def test_a_journals_group_has_what_is_beside_it(path: Path) -> None:
    path.touch()
    os.chown(path, OWNER, GROUP)
    path.chmod(0o660)
    log = FileLog(str(path))
    log.take_lease("w")
    log.exchange([study()], START, NOTHING)
    for beside in (f"{path}.lock.queue", f"{path}.beats", f"{path}.beats/w.beat"):
        assert Path(beside).stat().st_gid == GROUP


def test_a_platform_without_modes_and_flock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows; Python has ``os.fchmod`` there since 3.13."""
    for module in (filelock, system):
        monkeypatch.setattr(module, "fcntl", None)
    for name in ("fchown", "fchmod", "fdatasync", "pread", "pwrite"):
        monkeypatch.delattr(os, name, raising=False)
    log = FileLog(str(path))
    log.take_lease("w")
    cursor = log.exchange([study(), trial(1)], START, NOTHING).cursor
    assert log.save_snapshot(lambda: (b"contents", cursor))
    assert FileLog(str(path)).load_snapshot() == (b"contents", cursor)
    assert len(FileLog(str(path)).exchange([], START, NOTHING).news) == 2


# --- the snapshot beside it ----------------------------------------------------------------------


def test_snapshots_come_back(log: FileLog, path: Path) -> None:
    assert isinstance(log, SnapshotStore)
    assert log.load_snapshot() is None
    assert log.save_snapshot(lambda: (b"nothing yet", START))
    assert log.save_snapshot(lambda: None)
    assert log.load_snapshot() is None
    cursor = log.exchange([study(), trial(1)], START, NOTHING).cursor
    assert log.save_snapshot(lambda: (b"contents", cursor))
    log.exchange([trial(2)], cursor, NOTHING)
    assert FileLog(str(path)).load_snapshot() == (b"contents", cursor)
    assert Path(f"{path}.snapshot").read_bytes()[0] == 0xFF
    assert not Path(f"{path}.snapshot.new").exists()


@pytest.mark.skipif(os.name == "nt", reason="the folder decides there")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_snapshot_is_for_those_who_may_open_the_journal(
    log: FileLog, path: Path, mode: int
) -> None:
    cursor = log.exchange([study()], START, NOTHING).cursor
    path.chmod(mode)
    for left in (None, 0o666):  # by one that was killed, in a version that let everybody read it
        if left is not None:
            Path(f"{path}.snapshot.new").touch()
            Path(f"{path}.snapshot.new").chmod(left)
        seen = []

        def make(seen: list[int] = seen) -> Any:
            seen.append(Path(f"{path}.snapshot.new").stat().st_mode & 0o7777)
            return b"contents", cursor

        assert log.save_snapshot(make)
        assert seen == [mode], "before there is anything in it"
        assert Path(f"{path}.snapshot").stat().st_mode & 0o7777 == mode


@as_root
@pytest.mark.parametrize("is_of_group", [True, False])
def test_a_snapshot_is_for_the_journals_group_or_for_its_owner_alone(
    log: FileLog, path: Path, is_of_group: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cursor = log.exchange([study()], START, NOTHING).cursor
    os.chown(path, OWNER, GROUP)
    path.chmod(0o660)
    may_not_chown(monkeypatch, is_of_group=is_of_group)
    assert log.save_snapshot(lambda: (b"contents", cursor))
    status = Path(f"{path}.snapshot").stat()
    assert status.st_mode & 0o7777 == (0o660 if is_of_group else 0o600)
    assert (status.st_gid == GROUP) is is_of_group


def test_foreign_stale_and_damaged_snapshots_are_ignored(log: FileLog, path: Path) -> None:
    sidecar = Path(f"{path}.snapshot")
    cursor = log.exchange([study(), trial(1)], START, NOTHING).cursor
    assert log.save_snapshot(lambda: (b"contents", cursor))
    good = sidecar.read_bytes()
    for position in range(len(good)):
        sidecar.write_bytes(good[:position])
        assert log.load_snapshot() is None
        flipped = bytearray(good)
        flipped[position] ^= 4
        sidecar.write_bytes(flipped)
        assert log.load_snapshot() is None
    for foreign in (b"", pickle.dumps({"a": 1}), b"\xff", good + b"more", os.urandom(500)):
        sidecar.write_bytes(foreign)
        assert log.load_snapshot() is None
    sidecar.write_bytes(good)
    assert log.load_snapshot() == (b"contents", cursor)
    path.write_bytes(encode_line(study(5)) + encode_line(trial(1)))
    assert FileLog(str(path)).load_snapshot() is None
    path.unlink()
    assert log.load_snapshot() is None


def test_a_snapshot_of_a_journal_with_other_records_is_ignored(log: FileLog, path: Path) -> None:
    before, after = [study(), attr(1, "a"), trial(2)], [study(), attr(1, "b"), trial(2)]
    cursor = log.exchange(before, START, NOTHING).cursor
    assert log.save_snapshot(lambda: (b"contents", cursor))
    assert log.load_snapshot() is not None
    # The first record, the size and the last bytes are the same.
    path.write_bytes(b"".join(map(encode_line, after)))
    assert log.load_snapshot() is None


def test_one_writer_of_a_snapshot_at_a_time(log: FileLog, path: Path) -> None:
    cursor = log.exchange([study()], START, NOTHING).cursor
    busy = os.open(f"{path}.snapshot.new", os.O_WRONLY | os.O_CREAT)
    system.fcntl.flock(busy, system.fcntl.LOCK_EX)
    assert not log.save_snapshot(pytest.fail)
    assert log.load_snapshot() is None
    os.close(busy)
    assert log.save_snapshot(lambda: (b"contents", cursor))
    assert log.load_snapshot() == (b"contents", cursor)
