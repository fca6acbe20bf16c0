"""Workers on one journal file, killed or stopped at random moments; soak: many times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import itertools
import logging
import os
from pathlib import Path
import random
import signal
import time
import traceback
from typing import Any
import warnings

import optuna
from optuna.storages.journal import JournalFileBackend as OptunaFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

import trialstore
from trialstore.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock
from trialstore.log import NOTHING, START
from trialstore.logs.file import FileLog
from trialstore.records import CreateTrial, SetTrialUserAttr, to_journal_dict

_TIME = "2026-01-02T03:04:05.678901+00:00"
_DEADLINE_S = 120.0
KINDS = {"link": JournalFileSymlinkLock, "o_excl": JournalFileOpenLock}
_MAGIC = b"trialstore-lock-1\n"


def impatient(kind: Any, grace_s: int) -> Callable[[str], Any]:
    """A lock with a short grace period, of which it may warn."""

    def make(path: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(path, grace_period=grace_s)

    return make


# A plain Optuna syncs while it holds the lock, and dies of it if it is evicted meanwhile. A busy
# disk keeps it for more than a second, so beside one the grace period is longer.
HASTY = {f"{name}, 1 s": impatient(kind, 1) for name, kind in KINDS.items()}
PATIENT = {f"{name}, 6 s": impatient(kind, 6) for name, kind in KINDS.items()}
LOCKS: dict[str, Callable[[str], Any]] = {**KINDS, **HASTY, **PATIENT}
OURS = ["ours"] * 4
MIXED = ["ours", "ours", "ours", "a plain Optuna"]

# --- what workers do, for ever, saying what has come back ----------------------------------------

Say = Callable[[str], None]


def append_records(path: str, name: str, lock: str, kind: str, say: Say) -> None:
    """Batches of two records, large and small, through the log; says the last ``seq``."""
    optunas = OptunaFileBackend(path)
    ours = FileLog(path, LOCKS[lock](path))
    cursor = START
    for seq in itertools.count(step=2):
        records = [
            CreateTrial(worker_id=name, seq=seq, study_id=0, datetime_start=_TIME),
            SetTrialUserAttr(
                worker_id=name, seq=seq + 1, trial_id=0, user_attr={"key": "x" * (seq % 5000)}
            ),
        ]
        if kind == "ours":
            cursor = ours.exchange(records, cursor, NOTHING).cursor
        else:
            optunas.append_logs([to_journal_dict(record) for record in records])
        say(f"{seq + 1}")


def tell_trials(path: str, name: str, lock: str, kind: str, say: Say) -> None:
    """Whole trials through the storage; says the id and the value of what was told."""
    if kind == "ours":
        storage = trialstore.JournalStorage(JournalFileBackend(path, LOCKS[lock](path)))
    else:
        storage = optuna.storages.JournalStorage(OptunaFileBackend(path))
    for number in itertools.count():
        trial_id = storage.create_new_trial(0)
        storage.set_trial_user_attr(trial_id, "by", f"{name} {number}")
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [number / 7])
        say(f"{trial_id} {number / 7!r} {name} {number}")


class DiesOfPatience(logging.Handler):
    """Nobody may have waited for a grace period; that is what the lock's warnings say."""

    def emit(self, record: logging.LogRecord) -> None:
        os.write(2, f"{record.getMessage()}\n".encode())
        os._exit(1)


class Worker:
    """A process that works until it is killed. Forked: to start 300 Pythons takes too long."""

    def __init__(self, work: Callable[..., None], folder: Path, name: str, lock: str, kind: str):
        self.name, self.kind = name, kind
        self._said = folder / f"{name}.said"
        self._raised = folder / f"{name}.raised"
        said = os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                if lock in KINDS:
                    logger = logging.getLogger("trialstore.logs.file.filelock")
                    logger.addHandler(DiesOfPatience(logging.WARNING))
                journal = str(folder / "journal")
                work(journal, name, lock, kind, lambda line: os.write(said, f"{line}\n".encode()))
            except BaseException:
                self._raised.write_text(traceback.format_exc())
            finally:
                os._exit(1)
        os.close(said)

    def said(self) -> list[str]:
        """The lines that are whole."""
        return self._said.read_text().split("\n")[:-1]

    def gets_on(self, than: int) -> None:
        """Wait until it has said more than so many lines."""
        give_up_at = time.monotonic() + _DEADLINE_S
        while len(self.said()) <= than:
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), self._why_it_ended()
            assert time.monotonic() < give_up_at, f"{self.name} does not get on"
            time.sleep(0.002)

    def stop(self) -> None:
        """Returns when it stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), self._why_it_ended()

    def _why_it_ended(self) -> str:
        raised = self._raised.read_text() if self._raised.exists() else ""
        return f"{self.name}, {self.kind}, ended by itself: {raised}"

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@dataclass
class Fallen:
    """What a fleet left behind.

    Args:
        said: By worker, every line that it said.
        waits_s: After each kill or stop, how long it took until everybody else had got on.
    """

    said: dict[str, list[str]]
    waits_s: list[float]


class Fleet:
    """Workers on a new journal; killed when it is left.

    Args:
        work: What they do.
        folder: Of the journal.
        lock: Of those that are ours.
        kinds: One worker each.
    """

    def __init__(
        self, work: Callable[..., None], folder: Path, lock: str, kinds: list[str]
    ) -> None:
        self.path = str(folder / "journal")
        storage = trialstore.JournalStorage(JournalFileBackend(self.path))
        storage.create_new_study([StudyDirection.MINIMIZE], "s")
        storage.close()
        names = itertools.count()
        self._start = lambda kind: Worker(work, folder, f"w{next(names)}", lock, kind)
        self.fallen = Fallen({}, [])
        self.workers = [self._start(kind) for kind in kinds]

    def __enter__(self) -> Fleet:
        for worker in self.workers:
            worker.gets_on(0)
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            self._bury(worker)
        # A plain worker's, whose grace period is 30 s.
        Path(f"{self.path}.lock").unlink(missing_ok=True)

    def _bury(self, worker: Worker) -> None:
        worker.kill()
        self.fallen.said[worker.name] = worker.said()

    def replace(self, victim: Worker) -> None:
        """Kill one; another takes its place when all others have got on."""
        self._bury(victim)
        self.others_get_on(victim)
        self.workers[self.workers.index(victim)] = self._start(victim.kind)

    def others_get_on(self, victim: Worker) -> None:
        """What was on its way when the victim fell does not tell, hence one more."""
        others = [worker for worker in self.workers if worker is not victim]
        said = [len(worker.said()) for worker in others]
        began_at = time.monotonic()
        for worker, than in zip(others, said, strict=True):
            worker.gets_on(than + 1)
        self.fallen.waits_s.append(time.monotonic() - began_at)

    def stop_who_holds_the_lock(self) -> Worker:
        """One of ours, at whatever moment of its hold."""
        by_pid = {worker.pid: worker for worker in self.workers}
        give_up_at = time.monotonic() + _DEADLINE_S
        while time.monotonic() < give_up_at:
            holder = by_pid.get(self._who_holds_the_lock())
            if holder is not None:
                holder.stop()
                if self._who_holds_the_lock() == holder.pid:
                    return holder
                holder.go_on()
        raise AssertionError("nobody of ours was caught with the lock")

    def _who_holds_the_lock(self) -> int:
        """The process id that stands in the lock file; 0 if it is not of ours."""
        try:
            fd = os.open(f"{self.path}.lock", os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return 0
        try:
            text = os.read(fd, 512)
        finally:
            os.close(fd)
        return int(text.split(b"pid ")[1]) if text.startswith(_MAGIC) else 0


def run_fleet(
    work: Callable[..., None], folder: Path, lock: str, kinds: list[str], kills: int, seed: str
) -> Fallen:
    """Kill members of a fleet at random moments, and replace them."""
    rng = random.Random(seed)
    with Fleet(work, folder, lock, kinds) as fleet:
        for _ in range(kills):
            time.sleep(rng.uniform(0, 0.02))  # where in its loop the victim is
            # A killed plain Optuna worker may leave its lock file, which stands for 30 s, its
            # grace period. That is not ours to shorten, so it lives to the end. A dead owner's
            # lock of ours keeps nobody waiting.
            ours = [worker for worker in fleet.workers if worker.kind == "ours"]
            fleet.replace(rng.choice(ours))
    return fleet.fallen


def stop_fleet(
    work: Callable[..., None], folder: Path, lock: str, kinds: list[str], stops: int
) -> Fallen:
    """Stop whoever holds the lock until the others have evicted it; then there are two writers."""
    with Fleet(work, folder, lock, kinds) as fleet:
        for _ in range(stops):
            stopped = fleet.stop_who_holds_the_lock()
            said = len(stopped.said())
            fleet.others_get_on(stopped)
            stopped.go_on()
            stopped.gets_on(said + 1)
    return fleet.fallen


def records_are_all_there(folder: Path, fallen: Fallen) -> None:
    path = str(folder / "journal")
    records = read_all(path)
    found: dict[str, list[int]] = {}
    for record in records:
        found.setdefault(record.worker_id, []).append(record.seq)
    for name, said in fallen.said.items():
        seqs, last = found.get(name, []), max(map(int, said), default=-1)
        assert seqs == list(range(len(seqs))), f"{name}: a hole or a double"
        assert len(seqs) > last, f"{name}: record {last} was acknowledged and is lost"
    # What the last victim left goes with the next append, and then Optuna reads it all.
    last_one = CreateTrial(worker_id="last", seq=0, study_id=0, datetime_start=_TIME)
    FileLog(path).exchange([last_one], START, NOTHING)
    assert len(list(OptunaFileBackend(path).read_logs(0))) == len(records) + 1
    optuna.storages.JournalStorage(OptunaFileBackend(path))


def read_all(path: str) -> list[Any]:
    log, found = FileLog(path), []
    batch = log.exchange([], START, NOTHING)
    found += batch.news
    while batch.more:
        batch = log.exchange([], batch.cursor, NOTHING)
        found += batch.news
    return found


def trials_are_all_there(folder: Path, fallen: Fallen) -> None:
    path = str(folder / "journal")
    ours = trialstore.JournalStorage(JournalFileBackend(path))
    trials = ours.get_all_trials(0)
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert len({trial._trial_id for trial in trials}) == len(trials)
    by_id = {trial._trial_id: trial for trial in trials}
    for said in fallen.said.values():
        for line in said:
            trial_id, value, by = line.split(" ", 2)
            trial = by_id[int(trial_id)]
            assert trial.state == TrialState.COMPLETE
            assert (trial.value, trial.user_attrs) == (float(value), {"by": by})
    # What the last victim left goes with the next append, and then Optuna reads it all.
    ours.create_new_trial(0)
    theirs = optuna.storages.JournalStorage(OptunaFileBackend(path))
    assert theirs.get_all_trials(0) == ours.get_all_trials(0)


@pytest.mark.parametrize("lock", KINDS)
@pytest.mark.parametrize("kinds", [OURS, MIXED], ids=["ours", "a plain Optuna among them"])
def test_records_outlive_kills(tmp_path: Path, lock: str, kinds: list[str]) -> None:
    fallen = run_fleet(append_records, tmp_path, lock, kinds, 10, f"{lock} {kinds}")
    records_are_all_there(tmp_path, fallen)


@pytest.mark.parametrize("lock", KINDS)
def test_trials_outlive_kills(tmp_path: Path, lock: str) -> None:
    fallen = run_fleet(tell_trials, tmp_path, lock, MIXED, 10, lock)
    trials_are_all_there(tmp_path, fallen)


WORKS = pytest.mark.parametrize(
    ("work", "check"),
    [(append_records, records_are_all_there), (tell_trials, trials_are_all_there)],
    ids=["records", "trials"],
)


@WORKS
@pytest.mark.parametrize("lock", HASTY)
def test_nothing_is_lost_when_holders_of_the_lock_are_stopped(
    tmp_path: Path, lock: str, work: Callable[..., None], check: Callable[[Path, Fallen], None]
) -> None:
    check(tmp_path, stop_fleet(work, tmp_path, lock, OURS, 1))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("lock", KINDS)
@WORKS
def test_300_kills(
    tmp_path: Path,
    lock: str,
    work: Callable[..., None],
    check: Callable[[Path, Fallen], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    waits_s: list[float] = []
    for part in range(6):  # a file each, so that replaying what is there stays cheap
        folder = tmp_path / str(part)
        folder.mkdir()
        kinds = MIXED if part % 3 == 0 else OURS
        fallen = run_fleet(work, folder, lock, kinds, 50, f"{lock} {part}")
        check(folder, fallen)
        waits_s += fallen.waits_s
    tell(capsys, f"{lock}, {work.__name__}, kills", waits_s)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("lock", "kinds", "stops"),
    [*((lock, OURS, 30) for lock in HASTY), *((lock, MIXED, 6) for lock in PATIENT)],
)
@WORKS
def test_many_stops(
    tmp_path: Path,
    lock: str,
    kinds: list[str],
    stops: int,
    work: Callable[..., None],
    check: Callable[[Path, Fallen], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fallen = stop_fleet(work, tmp_path, lock, kinds, stops)
    check(tmp_path, fallen)
    tell(capsys, f"{lock}, {work.__name__}, stops", fallen.waits_s)


def tell(capsys: pytest.CaptureFixture[str], what: str, waits_s: list[float]) -> None:
    waits_s = sorted(waits_s)
    with capsys.disabled():
        print(
            f"\n{what}: {len(waits_s)}; until all others had got on: "
            f"median {waits_s[len(waits_s) // 2]:.3f} s, longest {waits_s[-1]:.3f} s"
        )
