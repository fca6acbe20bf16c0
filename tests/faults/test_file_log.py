"""The journal file under kills, stops, full disks and failing syncs; soak: more of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import errno
import itertools
import json
import os
from pathlib import Path
import resource
import signal
import subprocess
import sys
from typing import Any

import optuna
from optuna.storages.journal import (
    JournalFileBackend as OptunaFileBackend,
    JournalFileSymlinkLock as OptunaSymlinkLock,
)
import pytest

from trialstore.errors import LogUnavailableError, OutcomeUnknownError
from trialstore.log import NOTHING, START
from trialstore.logs.file import FileLog, filelock, journal_file, system
from trialstore.logs.file.filelock import JournalFileOpenLock, JournalFileSymlinkLock
from trialstore.records import (
    AnyOperation,
    CreateStudy,
    CreateTrial,
    SetTrialUserAttr,
    encode_line,
)

_TIME = "2026-01-02T03:04:05.678901+00:00"
_DEADLINE_S = 120.0
KINDS = {"link": JournalFileSymlinkLock, "o_excl": JournalFileOpenLock}


def study() -> CreateStudy:
    return CreateStudy(worker_id="w", seq=0, study_name="s", directions=[1])


def trial(seq: int, worker: str = "w") -> CreateTrial:
    return CreateTrial(worker_id=worker, seq=seq, study_id=0, datetime_start=_TIME)


def attr(seq: int, value: Any) -> SetTrialUserAttr:
    return SetTrialUserAttr(worker_id="w", seq=seq, trial_id=0, user_attr={"key": value})


def read_all(path: Path) -> list[AnyOperation]:
    return list(FileLog(str(path)).exchange([], START, NOTHING).news)  # type: ignore[arg-type]


def assert_optuna_reads(path: Path, count: int) -> None:
    """A plain Optuna worker opens the journal and sees as many records, or more by now."""
    assert len(list(OptunaFileBackend(str(path)).read_logs(0))) >= count
    optuna.storages.JournalStorage(OptunaFileBackend(str(path)))


def left_over(path: Path, lock: Any) -> set[str]:
    """What lies beside the journal that should not."""
    expected = {str(path), f"{path}.lock.queue", lock._owner_path}
    return {str(other) for other in path.parent.iterdir()} - expected


# --- a crash between any two system calls --------------------------------------------------------

_WRITING = ("open", "write", "pwrite", "link", "unlink", "rename", "replace", "fdatasync")


class Crash:
    """In a forked child: end the process before its n-th call that changes something.

    The call itself may be done by half first, if it writes.
    """

    def __init__(self, after: int, by_half: bool) -> None:
        self._left = after
        self._by_half = by_half
        for name in _WRITING:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self._left == 0:
                if self._by_half and name in ("write", "pwrite"):
                    fd, data, *rest = args
                    original(fd, bytes(data)[: len(data) // 2], *rest)
                os._exit(77)
            self._left -= 1
            return original(*args, **options)

        return call


def crashes(act: Callable[[], None], prepare: Callable[[], None]) -> Iterator[bool]:
    """Let a child ``act`` and crash ever later, until it does not; yields whether it crashed."""
    for by_half in (False, True):
        for after in itertools.count():
            prepare()
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    Crash(after, by_half)
                    act()
                    status = 0
                finally:
                    os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (0, 77)
            yield status == 77
            if status == 0:
                break


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("torn", [b"", b'{"op_code":8,"worker_id":"w', b"glued"])
@pytest.mark.parametrize("space_low", [False, True])
def test_a_crash_between_any_two_calls_of_an_append(
    tmp_path: Path, kind: str, torn: bytes, space_low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if space_low:
        monkeypatch.setattr(journal_file, "_SPACE_LOW_BYTES", 1 << 60)
    path = tmp_path / "journal"
    before: list[AnyOperation] = [study(), trial(1)]
    if torn == b"glued":
        torn = b'{"op_code":8,"wor' + encode_line(trial(2))
        before.append(trial(2))
    new = [trial(3), attr(4, "x" * 300), trial(5)]

    def prepare() -> None:
        for left in tmp_path.iterdir():
            left.unlink()
        path.write_bytes(encode_line(study()) + encode_line(trial(1)) + torn)

    def act() -> None:
        FileLog(str(path), KINDS[kind](str(path))).exchange(new, START, NOTHING)

    for crashed in crashes(act, prepare):
        found = read_all(path)
        count = len(found) - len(before)
        assert found == before + new[:count]
        if not crashed:
            assert count == len(new)
        # The next one waits for nobody, repairs, and everybody reads the same.
        lock = KINDS[kind](str(path))
        lock._clock = Impatient()
        FileLog(str(path), lock).exchange([trial(9)], START, NOTHING)
        assert read_all(path) == [*found, trial(9)]
        assert_optuna_reads(path, len(found) + 1)
        assert left_over(path, lock) == set()


class Impatient(filelock.Clock):
    def sleep(self, duration_s: float) -> None:
        raise AssertionError("waited for a dead process")


def test_a_crash_between_any_two_calls_of_a_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    cursor = FileLog(str(path)).exchange([study()], START, NOTHING).cursor

    def prepare() -> None:
        assert FileLog(str(path)).save_snapshot(lambda: (b"old" * 1000, cursor))

    def act() -> None:
        FileLog(str(path)).save_snapshot(lambda: (b"new" * 1000, cursor))

    for crashed in crashes(act, prepare):
        loaded = FileLog(str(path)).load_snapshot()
        assert loaded is not None
        assert bytes(loaded[0]) in (
            (b"old" * 1000, b"new" * 1000) if crashed else (b"new" * 1000,)
        )


# --- stops ---------------------------------------------------------------------------------------

_STOPPED_IN_THE_MIDDLE = """
import sys
from trialstore.log import NOTHING, START
from trialstore.logs.file import FileLog, filelock
from trialstore.records import CreateTrial
path = sys.argv[1]
log = FileLog(path, getattr(filelock, sys.argv[2])(path))
original = log._file._write
def write(data):
    print("holding", flush=True)
    sys.stdin.readline()
    return original(data)
log._file._write = write
time = "2026-01-02T03:04:05.678901+00:00"
batch = log.exchange(
    [CreateTrial(worker_id="stopped", seq=0, study_id=0, datetime_start=time)], START, NOTHING
)
print(len(batch.news), flush=True)
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("evictor", ["ours", "plain Optuna"])
def test_a_holder_stopped_past_the_grace_period_loses_nothing(
    tmp_path: Path, kind: str, evictor: str
) -> None:
    path = tmp_path / "journal"
    FileLog(str(path)).exchange([study()], START, NOTHING)
    with path.open("ab") as file:
        file.write(b'{"op_code":5,"tor')  # which the stopped one has found and repaired
    stopped = subprocess.Popen(
        [sys.executable, "-c", _STOPPED_IN_THE_MIDDLE, str(path), KINDS[kind].__name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert stopped.stdout is not None
        assert stopped.stdout.readline() == "holding\n"
        stopped.send_signal(signal.SIGSTOP)
        if evictor == "ours":
            with pytest.warns(UserWarning, match="grace_period"):
                lock = KINDS[kind](str(path), grace_period=1)
            FileLog(str(path), lock).exchange([trial(1)], START, NOTHING)
        else:
            OptunaSymlinkLock(str(path)).release()  # as its waiters do after their grace period
            OptunaFileBackend(str(path)).append_logs([json.loads(encode_line(trial(1)))])
        stopped.send_signal(signal.SIGCONT)
        output, _ = stopped.communicate("\n", timeout=_DEADLINE_S)
        assert output == "3\n", "it sees what came before it"
    finally:
        stopped.kill()
        stopped.communicate()
    assert [record.worker_id for record in read_all(path)] == ["w", "w", "stopped"]
    assert_optuna_reads(path, 3)


# --- full disks and failing calls ----------------------------------------------------------------


def fill(path: Path, records: list[AnyOperation], room: int) -> BaseException | None:
    """Append in a child whose files may grow by ``room`` bytes only; the error's name and text.

    ``RLIMIT_FSIZE`` makes the kernel write as much as fits and fail then, as a full disk does.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            limit = path.stat().st_size + room
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            log = FileLog(str(path))
            log._file.acquire()  # the lock's own small files are not limited here
            log._file.release()
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                log.exchange(records, START, NOTHING)  # type: ignore[arg-type]
                os.write(write_end, b"none")
            except BaseException as error:
                os.write(write_end, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as said:
        name = said.read()
    os.waitpid(child, 0)
    errors = {"none": None, "LogUnavailableError": LogUnavailableError("")}
    errors["OutcomeUnknownError"] = OutcomeUnknownError("")
    return errors[name]


@pytest.mark.parametrize("space_low", [False, True], ids=["surprise", "seen coming"])
def test_full_at_every_byte_of_a_batch(
    tmp_path: Path, space_low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "_SPACE_LOW_BYTES", 1 << 60 if space_low else 0)
    path = tmp_path / "journal"
    before: list[AnyOperation] = [study(), attr(0, "x" * 2000)]  # larger than a lock file
    new: list[AnyOperation] = [trial(1), trial(2)]
    whole = b"".join(map(encode_line, before))
    lengths = list(itertools.accumulate(len(encode_line(record)) for record in new))
    for room in range(0, lengths[-1] + 1, 7):
        path.write_bytes(whole)
        error = fill(path, new, room)
        count = sum(length <= room for length in lengths)
        if room >= lengths[-1]:
            assert error is None
        elif space_low or not count:
            assert isinstance(error, LogUnavailableError)
            count = 0
        else:
            assert isinstance(error, OutcomeUnknownError)
        assert read_all(path) == before + new[:count]
        # Work goes on when there is space.
        FileLog(str(path)).exchange([trial(9)], START, NOTHING)
        assert read_all(path) == [*before, *new[:count], trial(9)]
        assert_optuna_reads(path, len(before) + count + 1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_is_unavailable(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    log = FileLog(str(path))
    cursor = log.exchange([study()], START, NOTHING).cursor
    original = os.write

    def refuse(fd: int, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(LogUnavailableError, match=str(path)):
        log.exchange([trial(1)], cursor, NOTHING)
    monkeypatch.setattr(os, "write", original)
    assert left_over(path, log._file.lock) == set()
    assert log.exchange([trial(2)], cursor, NOTHING).news == [trial(2)]


def test_a_failed_sync_is_no_success_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    log = FileLog(str(path))
    cursor = log.exchange([study()], START, NOTHING).cursor
    events: list[tuple[str, Any]] = []
    fails = True

    def sync(fd: int) -> None:
        events.append(("sync", fails))
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    pwrite = os.pwrite

    def traced(fd: int, data: bytes, offset: int) -> int:
        events.append(("again", bytes(data)))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(system, "sync_fd", sync)
    monkeypatch.setattr(os, "pwrite", traced)
    cursor = log.exchange([attr(1, 1)], cursor, NOTHING).cursor  # not synced by itself
    with pytest.raises(OutcomeUnknownError, match="not synced"):
        log.exchange([trial(2)], cursor, NOTHING)
    with pytest.raises(OutcomeUnknownError, match="not synced"):
        log.exchange([trial(3)], cursor, NOTHING)
    fails = False
    events.clear()
    news = log.exchange([trial(4)], cursor, NOTHING).news
    assert news == [trial(2), trial(3), trial(4)]
    # Whatever the failed syncs left out is dirty again before the one that succeeds.
    again = [encode_line(record) for record in (attr(1, 1), trial(2), trial(3))]
    assert events == [*(("again", line) for line in again), ("sync", False)]
    events.clear()
    log.exchange([trial(5)], cursor, NOTHING)
    assert events == [("sync", False)]
    assert len(read_all(path)) == 6


def test_an_attempt_that_finds_its_records_there_syncs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = FileLog(str(tmp_path / "journal"))
    cursor = log.exchange([study()], START, NOTHING).cursor
    syncs = []

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(system, "sync_fd", fail)
        with pytest.raises(OutcomeUnknownError, match="not synced"):
            log.exchange([trial(1)], cursor, NOTHING)
        with pytest.raises(OutcomeUnknownError, match="not synced"):
            log.exchange([trial(1)], cursor, NOTHING)
        with pytest.raises(OutcomeUnknownError, match="not synced"):
            log.exchange_if(lambda news, cursor: (), cursor, NOTHING)
    monkeypatch.setattr(system, "sync_fd", syncs.append)
    assert log.exchange([trial(1)], cursor, NOTHING).news == [trial(1)]
    assert len(syncs) == 1
    # Of one that was killed or interrupted between its write and its sync, nobody knows.
    assert log.exchange([trial(1)], cursor, NOTHING).news == [trial(1)]
    assert len(syncs) == 2


def test_a_snapshot_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    log = FileLog(str(path))
    cursor = log.exchange([study()], START, NOTHING).cursor
    log.save_snapshot(lambda: (b"old", cursor))

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(LogUnavailableError, match="snapshot"):
            log.save_snapshot(lambda: (b"new", cursor))
    assert log.load_snapshot() == (b"old", cursor)
    assert not (tmp_path / "journal.snapshot.new").exists()


# --- crowds --------------------------------------------------------------------------------------


def run_crowd(path: Path, count: int) -> None:
    """So many processes open the journal together, and each appends a record of its own."""
    wait_end, go_end = os.pipe()
    children = []
    for name in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(go_end)
                os.read(wait_end, 1)  # until the parent, and thus nobody, has the other end
                record = CreateStudy(worker_id=f"{name}", seq=0, study_name="s", directions=[1])
                FileLog(str(path)).exchange([record], START, NOTHING)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    os.close(go_end)
    os.close(wait_end)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count
    assert sorted(int(record.worker_id) for record in read_all(path)) == list(range(count))
    assert_optuna_reads(path, count)


def test_12_processes_meet_the_lock_of_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    child = os.fork()
    if child == 0:
        JournalFileSymlinkLock(str(path)).acquire()
        os._exit(0)
    os.waitpid(child, 0)
    assert Path(f"{path}.lock").exists()
    run_crowd(path, 12)


def test_50_processes_open_a_path_that_does_not_exist_yet(tmp_path: Path) -> None:
    run_crowd(tmp_path / "journal", 50)


def test_a_read_that_fails_after_the_write_is_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = FileLog(str(tmp_path / "journal"))

    def broken(end: int) -> int:
        if end:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return 0

    monkeypatch.setattr(log._file, "_read_identity", broken)
    with pytest.raises(OutcomeUnknownError, match="appended, but"):
        log.exchange([study()], START, NOTHING)
    monkeypatch.undo()
    assert log.exchange([], START, NOTHING).news == [study()]


@pytest.mark.parametrize("local", [True, False])
def test_a_path_that_cant_be_looked_at_after_the_write_is_no_refusal(
    tmp_path: Path, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "file_system_is_local", lambda path: local)
    path = tmp_path / "journal"
    log = FileLog(str(path))
    cursor = log.exchange([study()], START, NOTHING).cursor
    write = log._file._write

    def write_and_break(data: bytes) -> int:
        start = write(data)
        refuse = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        name = "stat" if local else "open"
        original = getattr(os, name)

        def refused_once(*args: Any, **options: Any) -> Any:
            setattr(os, name, original)
            raise refuse

        monkeypatch.setattr(os, name, refused_once)
        return start

    monkeypatch.setattr(log._file, "_write", write_and_break)
    with pytest.raises(OutcomeUnknownError, match="appended, but"):
        log.exchange([trial(1)], cursor, NOTHING)
    monkeypatch.undo()
    assert log.exchange([trial(1)], cursor, NOTHING).news == [trial(1)]
    assert read_all(path) == [study(), trial(1)]
