"""The queue before SQLite's write lock: fair, and never in the way."""

from __future__ import annotations

import gc
import multiprocessing
import os
from pathlib import Path
import signal
import sqlite3
import threading
import time
from typing import Any
import warnings

import pytest
from tests.unit.test_relational_basics import Model

from servers import new_database
from trialstore import RDBStorage, processes
from trialstore.logs.relational.write_queue import WriteQueue

_DEADLINE_S = 60.0
_context = multiprocessing.get_context("fork")


def _hold_until_killed(path: Path, holds: Any, forks: bool) -> None:
    queue = WriteQueue(path, _DEADLINE_S)
    queue.enter()
    queue.leave()
    # A child inherits the file, and outlives its parent.
    child = os.fork() if forks else 0
    if forks and child == 0:
        signal.pause()
    raw = sqlite3.connect(path, isolation_level=None)
    queue.enter()
    raw.execute("BEGIN IMMEDIATE")
    holds.put(child)
    signal.pause()


@pytest.mark.parametrize("forks", [False, True])
def test_a_killed_holder_holds_nobody_up(tmp_path: Path, forks: bool) -> None:
    url = new_database("sqlite", tmp_path)
    one = Model(url)
    study_id = one.study()
    path = Path(one.log.engine.url.database or "")
    holds = _context.SimpleQueue()
    holder = _context.Process(target=_hold_until_killed, args=(path, holds, forks))
    holder.start()
    child = holds.get()
    waiting = threading.Thread(target=one.trial, args=(study_id,))
    waiting.start()
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    waiting.join(_DEADLINE_S / 2)
    if forks:
        os.kill(child, signal.SIGKILL)
    assert not waiting.is_alive(), "it waited for one who is dead"
    holder.join()
    assert [x.number for x in one.read(study_id)] == [0]


def test_the_next_one_is_let_in_when_a_call_ends_well_or_badly(tmp_path: Path) -> None:
    url = new_database("sqlite", tmp_path)
    one, two = Model(url), Model(url)
    study_id = one.study()
    path = Path(one.log.engine.url.database or "")
    for model in (one, two):
        model.trial(study_id)
        raw = model.log.connection.session().raw
        raw.execute("CREATE TEMP TRIGGER fails BEFORE INSERT ON trials "
                    "BEGIN SELECT RAISE(ABORT, 'by the test'); END")  # fmt: skip
        with pytest.raises(Exception, match="by the test"):
            model.trial(study_id)
        raw.execute("DROP TRIGGER fails")
        other = WriteQueue(path, _DEADLINE_S)
        other.enter()
        assert other.is_first
        other.close()
    assert [x.number for x in one.read(study_id)] == [0, 1]


def test_a_stopped_holder_is_waited_for_within_a_bound(tmp_path: Path) -> None:
    first, second, third = (WriteQueue(tmp_path / "x.db", wait_s) for wait_s in (1, 0.01, 60))
    first.enter()
    second.enter()
    assert (first.is_first, second.is_first) == (True, False)
    first.leave()
    third.enter()
    assert third.is_first, "who gave up waiting does not keep the place"
    for queue in (first, second, third):
        queue.close()


def _waiters() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "trialstore-queue"]


def test_a_stopped_holder_is_waited_for_once(tmp_path: Path) -> None:
    first, late = (WriteQueue(tmp_path / "x.db", wait_s) for wait_s in (_DEADLINE_S, 0.01))
    others = _waiters()
    first.enter()
    for _ in range(3):
        late.enter()
        assert not late.is_first
    (waiter,) = set(_waiters()) - set(others)
    first.leave()
    waiter.join(_DEADLINE_S)
    late.enter()
    assert late.is_first, "it queues again when the holder has moved"
    for queue in (first, late):
        queue.close()


def test_writers_that_do_not_queue_are_waited_for(tmp_path: Path) -> None:
    """As plain Optuna workers."""
    one = Model(new_database("sqlite", tmp_path))
    study_id = one.study()
    theirs = sqlite3.connect(
        one.log.engine.url.database or "", isolation_level=None, check_same_thread=False
    )
    theirs.execute("BEGIN IMMEDIATE")
    theirs.execute(
        "INSERT INTO trials (number, study_id, state) VALUES (0, ?, 'FAIL')", [study_id]
    )
    threading.Timer(0.05, theirs.execute, ["COMMIT"]).start()
    one.trial(study_id)
    assert [x.number for x in one.read(study_id)] == [0, 1]


def test_where_no_thread_can_be_started_nobody_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the end of a process, when what was put off is written."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    one = Model(new_database("sqlite", tmp_path))
    study_id = one.study()
    first = WriteQueue(Path(one.log.engine.url.database or ""), _DEADLINE_S)
    first.enter()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        one.trial(study_id)
    first.leave()
    one.trial(study_id)
    first.close()
    assert [x.number for x in one.read(study_id)] == [0, 1]


class _Told(threading.Condition):
    """Tells that somebody waits."""

    def __init__(self, lock: Any) -> None:
        super().__init__(lock)
        self.is_waited_for = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.is_waited_for.set()
        return super().wait(timeout)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_opens_a_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What that one has locked, SQLite would hold for locked in the child for ever."""
    work_ended = _Told(processes._one_fork)
    monkeypatch.setattr(processes, "_work_ended", work_ended)
    url = new_database("sqlite", tmp_path)
    path = url.removeprefix("sqlite:///")
    Model(url).study()
    is_open, is_forked = threading.Event(), threading.Event()

    def make() -> sqlite3.Connection:
        raw = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        raw.execute("BEGIN IMMEDIATE")
        is_open.set()
        while not (work_ended.is_waited_for.is_set() or is_forked.is_set()):
            time.sleep(0.001)
        raw.execute("ROLLBACK")
        return raw

    opening = threading.Thread(target=RDBStorage, args=(url, {"creator": make}))
    opening.start()
    assert is_open.wait(_DEADLINE_S)
    child = os.fork()
    if child == 0:
        try:
            sqlite3.connect(path, 0, isolation_level=None).execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            os._exit(1)
        os._exit(0)
    is_forked.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    opening.join(_DEADLINE_S)


def test_a_folder_that_takes_no_queue(tmp_path: Path) -> None:
    url = new_database("sqlite", tmp_path)
    path = Path(url.removeprefix("sqlite:///"))
    path.with_name(f"{path.name}.queue").mkdir()
    one = Model(url)
    one.trial(one.study())


def test_no_queue_in_memory() -> None:
    one = Model("sqlite://")
    one.trial(one.study())
    assert not list(Path().glob("*.queue"))


def test_a_storage_that_nobody_closes_is_no_matter(tmp_path: Path) -> None:
    """Optuna's can't be closed at all, so its users don't."""
    url = new_database("sqlite", tmp_path)
    path = tmp_path / "elsewhere"
    others = set(threading.enumerate())
    gc.collect()  # what other tests left is warned of here
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        Model(url).study()
        # One that has waited long enough leaves the file to a thread that still waits.
        first, late = WriteQueue(path, _DEADLINE_S), WriteQueue(path, 0.01)
        first.enter()
        late.enter()
        assert first.is_first and not late.is_first
        started = set(threading.enumerate()) - others
        (waiter,) = (one for one in started if one.name == "trialstore-queue")
        first.close()
        waiter.join(_DEADLINE_S)
        del first, late, waiter
        gc.collect()
    assert [str(one.message) for one in warned if str(tmp_path) in str(one.message)] == []


def test_a_storage_that_nobody_closes_leaves_no_file_open(tmp_path: Path) -> None:
    """Not until a collection either."""
    storage = RDBStorage(new_database("sqlite", tmp_path), linger_s=0.0)
    raw = storage._exchanger.log.connection.session().raw  # type: ignore[attr-defined]
    gc.disable()
    try:
        del storage
        with pytest.raises(sqlite3.ProgrammingError):
            raw.execute("SELECT 1")
    finally:
        gc.enable()
