"""A journal file's locks: one at a time; the dead evicted at once, the stopped in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import errno
import logging
import os
from pathlib import Path
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from typing import Any
import warnings

from optuna.storages.journal import (
    JournalFileBackend as OptunaFileBackend,
    JournalFileOpenLock as OptunaOpenLock,
    JournalFileSymlinkLock as OptunaSymlinkLock,
)
import pytest

from trialstore.errors import LogUnavailableError
from trialstore.logs.file import filelock
from trialstore.logs.file.filelock import JournalFileOpenLock, JournalFileSymlinkLock
from trialstore.testing.clock import ManualClock

OURS = [JournalFileSymlinkLock, JournalFileOpenLock]
OPTUNAS = [OptunaSymlinkLock, OptunaOpenLock]
_DEADLINE_S = 60.0

_HOLD = """
import os, sys, time
from trialstore.logs.file import filelock
lock = getattr(filelock, sys.argv[1])(sys.argv[2])
lock.acquire()
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(params=OURS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "journal")


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform without it (Windows)."""
    monkeypatch.setattr(filelock, "fcntl", None)


@contextlib.contextmanager
def holder(kind: Any, path: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, kind.__name__, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def say(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def owner_files(path: str) -> list[str]:
    """What lies in the folder besides the queue and the owner files of living lock objects."""
    folder = Path(path).parent
    alive = {lock._owner_path for lock in filelock._locks}
    return [
        p.name for p in folder.iterdir() if not p.name.endswith(".queue") and str(p) not in alive
    ]


class Overlap:
    """Counts how many are inside at once."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.entered = 0

    def visit(self) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered += 1
        time.sleep(0)  # offers the others the moment
        self.inside -= 1


def run_threads(targets: list[Any]) -> None:
    errors: list[BaseException] = []

    def guarded(target: Any) -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads), "a waiter never got the lock"
    assert not errors


# --- one at a time -------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["one object", "an object each"])
def test_threads_exclude_each_other(kind: Any, path: str, shared: bool) -> None:
    overlap = Overlap()
    one = kind(path)

    def work() -> None:
        lock = one if shared else kind(path)
        for _ in range(50):
            assert lock.acquire() is True
            overlap.visit()
            lock.release()

    run_threads([work] * 6)
    assert (overlap.most, overlap.entered) == (1, 300)


@pytest.mark.parametrize("optunas", OPTUNAS, ids=lambda kind: kind.__name__)
def test_plain_optuna_locks_exclude_ours(kind: Any, optunas: Any, path: str) -> None:
    overlap = Overlap()

    def work(make: Any) -> None:
        lock = make(path)
        for _ in range(30):
            lock.acquire()
            overlap.visit()
            lock.release()

    run_threads([lambda make=make: work(make) for make in (kind, optunas, kind, optunas)])
    assert (overlap.most, overlap.entered) == (1, 120)


def test_without_flock_threads_exclude_each_other(kind: Any, path: str, no_flock: None) -> None:
    test_threads_exclude_each_other(kind, path, shared=False)


class OptunasTime:
    """What the module of Optuna's locks takes for ``time``; moves when it sleeps.

    Args:
        at_sleep: Called with the time, each time that it does.
    """

    def __init__(self, at_sleep: Callable[[float], None] = lambda now_s: None) -> None:
        self._at_sleep = at_sleep
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s
        self._at_sleep(self.now_s)


def optuna_acquires(lock: Any, now: OptunasTime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optuna.storages.journal._file.time", now)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns when it evicts
        lock.acquire()


@pytest.mark.parametrize("optunas", OPTUNAS, ids=lambda kind: kind.__name__)
def test_a_plain_optuna_waiter_sees_how_old_our_lock_file_is(
    kind: Any, optunas: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = kind(path)
    lock.acquire()
    now = OptunasTime()
    optuna_acquires(optunas(path, grace_period=7), now, monkeypatch)
    assert 7 < now.now_s < 9
    theirs = os.lstat(path + ".lock").st_ino
    lock.release()
    assert os.lstat(path + ".lock").st_ino == theirs


@pytest.mark.parametrize("optunas", OPTUNAS, ids=lambda kind: kind.__name__)
def test_a_plain_optuna_waiter_evicts_nobody_while_our_lock_changes_hands(
    kind: Any, optunas: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = kind(path)
    lock.acquire()

    def hand_over(now_s: float) -> None:
        before = os.lstat(path + ".lock")
        lock.release()
        if now_s > 20:
            return
        while True:  # a file's time moves in steps of some milliseconds
            lock.acquire()
            now = os.lstat(path + ".lock")
            if (now.st_ino, now.st_mtime) != (before.st_ino, before.st_mtime):
                return
            lock.release()

    now = OptunasTime(hand_over)
    optuna_acquires(optunas(path, grace_period=7), now, monkeypatch)
    assert now.now_s > 20


def test_the_lock_file_is_a_regular_one_that_names_its_owner(kind: Any, path: str) -> None:
    lock, another = kind(path), kind(path)
    texts = []
    for one in (lock, another):
        one.acquire()
        assert stat.S_ISREG(os.lstat(path + ".lock").st_mode)
        texts.append(Path(path + ".lock").read_text().splitlines())
        one.release()
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.exists():
        assert all(f"boot {boot.read_text().strip()}" in text for text in texts)
    tokens = [line for text in texts for line in text if line.startswith("token ")]
    assert len(set(tokens)) == 2


def test_optunas_own_backend_works_with_our_lock(kind: Any, path: str) -> None:
    backend = OptunaFileBackend(path, kind(path))
    backend.append_logs([{"op_code": 0}])
    assert list(backend.read_logs(0)) == [{"op_code": 0}]
    assert owner_files(path) == ["journal"]


# --- the dead and the stopped --------------------------------------------------------------------


def test_a_dead_owner_is_evicted_at_once(kind: Any, path: str) -> None:
    with holder(kind, path) as process:
        process.kill()
        process.wait()
        assert Path(path + ".lock").exists()
        clock = ManualClock()
        lock = kind(path, clock=clock)
        lock.acquire()
        assert clock.slept_s == 0
        lock.release()
    assert owner_files(path) == []


def test_who_has_waited_for_long_lately_tries_less_often(path: str) -> None:
    """A hundred that try every millisecond are more than two cores can do."""
    fcntl = filelock.fcntl
    sleeps: list[float] = []
    free_at_s = 0.0

    class HeldUntil(ManualClock):
        def sleep(self, duration_s: float) -> None:
            super().sleep(duration_s)
            sleeps.append(duration_s)
            if self.now_s() > free_at_s:
                fcntl.flock(queue, fcntl.LOCK_UN)

    clock = HeldUntil()
    lock = JournalFileSymlinkLock(path, clock=clock)
    with Path(path + ".lock.queue").open("w", encoding="utf-8") as queue:

        def wait(duration_s: float) -> list[float]:
            nonlocal free_at_s
            sleeps.clear()
            free_at_s = clock.now_s() + duration_s
            fcntl.flock(queue, fcntl.LOCK_EX)
            lock.acquire()
            lock.release()
            return list(sleeps)

        assert 60 < len(wait(0.1)) < 210, "it has not waited before"
        for _ in range(20):
            wait(0.1)
        assert 6 < len(wait(0.1)) < 25
        for _ in range(20):
            wait(10.0)
        assert max(wait(10.0)) < 0.05
        for _ in range(30):
            wait(0.001)
        assert max(wait(0.001)) < 0.002, "and soon as often as before"


def test_a_live_owner_is_waited_for(kind: Any, path: str) -> None:
    with holder(kind, path) as process:
        looked = threading.Event()

        class Watched(ManualClock):
            def sleep(self, duration_s: float) -> None:
                looked.set()
                time.sleep(duration_s)

        lock = kind(path, clock=Watched())
        waiter = threading.Thread(target=lambda: lock.acquire() and lock.release())
        waiter.start()
        assert looked.wait(_DEADLINE_S)
        say(process)
        waiter.join(_DEADLINE_S)
        assert not waiter.is_alive()


def test_a_stopped_owner_is_evicted_after_the_grace_period(
    kind: Any, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with holder(kind, path) as process:
        process.send_signal(signal.SIGSTOP)
        clock = ManualClock()
        lock = kind(path, grace_period=30, clock=clock)
        lock.acquire()
        assert 30 < clock.now_s() < 40
        # The next ones don't wait for the stopped one at all.
        lock.release()
        next_clock = ManualClock()
        next_lock = kind(path, clock=next_clock)
        next_lock.acquire()
        assert next_clock.slept_s == 0
        # When it goes on, it leaves the lock of its successor alone, and finds the new queue.
        ours = os.lstat(path + ".lock").st_ino
        process.send_signal(signal.SIGCONT)
        say(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "released\n"
        assert os.lstat(path + ".lock").st_ino == ours
        next_lock.release()


@pytest.mark.parametrize("optunas", OPTUNAS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no flock"])
def test_what_a_plain_optuna_left_behind_goes_after_the_grace_period(
    kind: Any, optunas: Any, flock: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flock:
        monkeypatch.setattr(filelock, "fcntl", None)
    Path(path).touch()
    optunas(path).acquire()
    clock = ManualClock()
    lock = kind(path, grace_period=7, clock=clock)
    lock.acquire()
    assert 7 < clock.now_s() < 8
    lock.release()
    assert owner_files(path) == ["journal"]


def test_grace_period_none_never_evicts(kind: Any, path: str) -> None:
    OptunaSymlinkLock(path).acquire()

    class Enough(Exception):
        pass

    class LongClock(ManualClock):
        def sleep(self, duration_s: float) -> None:
            self.advance(0.9)
            if self.now_s() > 10_000:
                raise Enough

    with pytest.raises(Enough):
        kind(path, grace_period=None, clock=LongClock()).acquire()
    assert Path(path + ".lock").is_symlink()


def test_a_waiter_that_was_stopped_itself_does_not_count_that_time(path: str) -> None:
    clock = ManualClock()
    patience = filelock._Patience(clock)
    assert patience.look("a") == 0
    clock.advance(3600)
    assert patience.look("a") == 1
    assert patience.look("b") == 0


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no flock"])
def test_12_break_one_stale_lock_and_one_at_a_time_wins(
    kind: Any, flock: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flock:
        monkeypatch.setattr(filelock, "fcntl", None)
    OptunaSymlinkLock(path).acquire()
    overlap = Overlap()

    class FastClock(ManualClock):
        def sleep(self, duration_s: float) -> None:
            self.advance(0.5)
            time.sleep(0.0001)

    def work() -> None:
        lock = kind(path, grace_period=20, clock=FastClock())
        lock.acquire()
        overlap.visit()
        lock.release()

    run_threads([work] * 12)
    assert (overlap.most, overlap.entered) == (1, 12)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_12_processes_break_one_stale_lock_and_one_evicts_it(kind: Any, path: str) -> None:
    OptunaSymlinkLock(path).acquire()

    class Evictions(logging.Handler):
        n = 0

        def emit(self, record: logging.LogRecord) -> None:
            self.n += "evicting" in record.getMessage()

    def work() -> int:
        """How many it evicted; 100 if somebody else was inside."""
        evictions = Evictions(logging.WARNING)
        logging.getLogger("trialstore.logs.file.filelock").addHandler(evictions)
        lock = kind(path, grace_period=3)
        lock.acquire()
        try:
            os.close(os.open(path + ".inside", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return 100
        os.unlink(path + ".inside")  # noqa: PTH108
        lock.release()
        return evictions.n

    children = []
    for _ in range(12):
        child = os.fork()
        if child == 0:
            status = 101
            try:
                status = work()
            finally:
                os._exit(status)
        children.append(child)
    said = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(said) == [0] * 11 + [1]
    assert not os.path.lexists(path + ".lock")


def test_a_claim_that_a_dead_evictor_left_delays_but_does_not_block(path: str) -> None:
    OptunaSymlinkLock(path).acquire()
    seen = os.lstat(path + ".lock")
    claim = Path(f"{path}.lock.{seen.st_ino:x}-{seen.st_mtime_ns:x}.claim")
    claim.touch()
    clock = ManualClock()
    lock = JournalFileSymlinkLock(path, grace_period=7, clock=clock)
    lock.acquire()
    assert 21 < clock.now_s() < 23
    lock.release()
    assert owner_files(path) == []


def test_an_owner_of_another_boot_gets_the_grace_period(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filelock, "_BOOT_ID", "another boot")
    left = JournalFileSymlinkLock(path)
    left.acquire()
    left._leave_queue()
    monkeypatch.undo()
    clock = ManualClock()
    JournalFileSymlinkLock(path, grace_period=7, clock=clock).acquire()
    assert 7 < clock.now_s() < 8


def test_on_a_shared_file_system_the_dead_get_the_grace_period(
    kind: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(kind, path) as process:
        process.kill()
        process.wait()
        monkeypatch.setattr(filelock, "file_system_is_local", lambda path: False)
        clock = ManualClock()
        lock = kind(path, grace_period=7, clock=clock)
        lock.acquire()
        assert 7 < clock.now_s() < 8
        lock.release()


# --- release -------------------------------------------------------------------------------------


def test_release_leaves_anothers_lock_alone(kind: Any, path: str) -> None:
    lock = kind(path)
    lock.acquire()
    OptunaSymlinkLock(path).release()  # as its waiters do after their grace period
    OptunaSymlinkLock(path).acquire()
    lock.release()
    assert Path(path + ".lock").is_symlink()


@pytest.mark.parametrize("optunas", OPTUNAS, ids=lambda kind: kind.__name__)
def test_a_holder_stopped_in_the_middle_of_its_release_gives_anothers_lock_back(
    kind: Any, optunas: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    lock, theirs = kind(path, clock=clock), optunas(path)
    lock.acquire()
    rename = os.rename
    taken: list[int] = []

    def stopped(*args: Any) -> None:
        if not taken:
            monkeypatch.setattr(os, "rename", rename)
            theirs.release()  # as its waiters do after their grace period
            theirs.acquire()
            taken.append(os.lstat(path + ".lock").st_ino)
            clock.advance(31)
        rename(*args)

    monkeypatch.setattr(os, "rename", stopped)
    lock.release()
    assert [os.lstat(path + ".lock").st_ino] == taken
    theirs.release()
    assert owner_files(path) == []


def test_release_without_acquire_is_an_error(kind: Any, path: str) -> None:
    with pytest.raises(RuntimeError):
        kind(path).release()


def test_owner_files_of_the_killed_are_swept(path: str) -> None:
    Path(path + ".lock.0123456789abcdef.owner").touch()
    lock = JournalFileSymlinkLock(path)
    lock.acquire()
    lock.release()
    assert owner_files(path) == []


def test_a_lock_file_left_aside_by_a_dead_evictor_confuses_nobody(path: str) -> None:
    lock = JournalFileSymlinkLock(path)
    lock.acquire()
    os.rename(path + ".lock", path + ".lock.0.evicted")  # noqa: PTH104
    lock.release()
    OptunaSymlinkLock(path).acquire()
    assert not lock._make_lock_file(), "another's lock stands there"
    OptunaSymlinkLock(path).release()
    lock.acquire()
    lock.release()
    assert not Path(path + ".lock").exists()


def test_an_interrupted_wait_leaves_nothing(kind: Any, path: str) -> None:
    OptunaSymlinkLock(path).acquire()

    class Interrupted(ManualClock):
        def sleep(self, duration_s: float) -> None:
            raise KeyboardInterrupt

    lock = kind(path, clock=Interrupted())
    with pytest.raises(KeyboardInterrupt):
        lock.acquire()
    OptunaSymlinkLock(path).release()
    lock.acquire()
    lock.release()


# --- forks, pickles, paths -----------------------------------------------------------------------

_FORK = """
import os, sys, time
from trialstore.logs.file.filelock import JournalFileSymlinkLock
lock = JournalFileSymlinkLock(sys.argv[1])
lock.acquire()
child = os.fork()
if child == 0:
    print("child", os.getpid(), flush=True)
    time.sleep(600)
sys.stdin.readline()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_does_not_keep_the_lock_of_its_dead_parent(path: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _FORK, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline().split()[1])
    try:
        parent.kill()
        parent.wait()
        clock = ManualClock()
        lock = JournalFileSymlinkLock(path, clock=clock)
        lock.acquire()
        assert clock.slept_s == 0
        lock.release()
    finally:
        os.kill(child_pid, signal.SIGKILL)
        parent.stdout.close()
        if parent.stdin is not None:
            parent.stdin.close()


def test_pickle_carries_path_and_grace_period(kind: Any, path: str) -> None:
    lock = kind(path, grace_period=17)
    lock.acquire()
    copy = pickle.loads(pickle.dumps(lock))
    lock.release()
    assert (type(copy), copy.grace_period) == (kind, 17)
    copy.acquire()
    copy.release()


def test_relative_paths_do_not_follow_chdir(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lock = kind("journal")
    monkeypatch.chdir("/")
    lock.acquire()
    assert (tmp_path / "journal.lock").exists()
    lock.release()


# --- what file systems can't do ------------------------------------------------------------------


def test_where_links_fail_o_excl_does(
    kind: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    test_threads_exclude_each_other(kind, path, shared=False)
    assert owner_files(path) == []


def test_no_symlink_is_made(
    kind: Any, path: str, no_flock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows they need a privilege."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("made a symlink")

    monkeypatch.setattr(os, "symlink", refuse)
    test_threads_exclude_each_other(kind, path, shared=False)


def test_where_nothing_works_the_error_says_so(
    kind: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    lock = kind(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(LogUnavailableError, match="folder must be writable"):
            lock.acquire()
    lock.acquire()  # and it works again as soon as it can
    lock.release()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "link", "open"])
def test_a_disk_that_fails_is_told_of_and_leaves_nothing(
    kind: Any, path: str, call: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> int:
        raise OSError(code, os.strerror(code))

    lock = kind(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(LogUnavailableError, match=os.strerror(code)):
            lock.acquire()
    assert not os.path.lexists(path + ".lock")
    lock.acquire()
    lock.release()
    assert owner_files(path) == []


def test_a_folder_that_is_gone_is_told_of(kind: Any, tmp_path: Path) -> None:
    class Impatient(ManualClock):
        def sleep(self, duration_s: float) -> None:
            super().sleep(duration_s)
            assert self.slept_s < 1, "waits for nobody"

    folder = tmp_path / "folder"
    folder.mkdir()
    lock = kind(str(folder / "journal"), clock=Impatient())
    lock.acquire()
    lock.release()
    shutil.rmtree(folder)
    with pytest.raises(LogUnavailableError, match="No such file"):
        lock.acquire()
    folder.mkdir()
    lock.acquire()
    lock.release()


def test_no_flock_on_this_file_system(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.fcntl, "flock", refuse)
    test_threads_exclude_each_other(JournalFileSymlinkLock, path, shared=False)


def test_grace_period_is_checked_as_optuna_does(kind: Any, path: str) -> None:
    with pytest.raises(ValueError, match="positive"):
        kind(path, 0)
    with pytest.warns(UserWarning, match="grace_period"):
        kind(path, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(path, 3)
        kind(path, None)


def test_local_file_systems_are_known(tmp_path: Path) -> None:
    assert filelock.file_system_is_local("/proc") is False
    assert filelock.file_system_is_local(str(tmp_path / "missing")) is False
