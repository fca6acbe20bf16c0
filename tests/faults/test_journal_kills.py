"""Workers on one journal file, killed at random moments; soak: 300 times with each lock."""

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
OURS = ["ours"] * 4
MIXED = ["ours", "ours", "ours", "a plain Optuna"]

# --- what workers do, for ever, saying what has come back ----------------------------------------

Say = Callable[[str], None]


def append_records(path: str, name: str, lock: str, kind: str, say: Say) -> None:
    """Batches of two records, large and small, through the log; says the last ``seq``."""
    optunas = OptunaFileBackend(path)
    ours = FileLog(path, KINDS[lock](path))
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
        storage = trialstore.JournalStorage(JournalFileBackend(path, KINDS[lock](path)))
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
        said = os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                logger = logging.getLogger("trialstore.logs.file.filelock")
                logger.addHandler(DiesOfPatience(logging.WARNING))
                journal = str(folder / "journal")
                work(journal, name, lock, kind, lambda line: os.write(said, f"{line}\n".encode()))
            except BaseException:
                traceback.print_exc()
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
            assert os.waitpid(self._pid, os.WNOHANG) == (0, 0), f"{self.name} ended by itself"
            assert time.monotonic() < give_up_at, f"{self.name} does not get on"
            time.sleep(0.002)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


@dataclass
class Fallen:
    """What a fleet left behind.

    Args:
        said: By worker, every line that it said.
        waits_s: After each kill, how long it took until everybody else had got on.
    """

    said: dict[str, list[str]]
    waits_s: list[float]


def run_fleet(
    work: Callable[..., None], folder: Path, lock: str, kinds: list[str], kills: int, seed: str
) -> Fallen:
    """Kill members of a fleet at random moments, and replace them."""
    path = str(folder / "journal")
    storage = trialstore.JournalStorage(JournalFileBackend(path))
    storage.create_new_study([StudyDirection.MINIMIZE], "s")
    storage.close()
    rng = random.Random(seed)
    names = itertools.count()
    fallen = Fallen({}, [])

    def start(kind: str) -> Worker:
        return Worker(work, folder, f"w{next(names)}", lock, kind)

    def bury(worker: Worker) -> None:
        worker.kill()
        fallen.said[worker.name] = worker.said()

    fleet = [start(kind) for kind in kinds]
    try:
        for worker in fleet:
            worker.gets_on(0)
        for _ in range(kills):
            time.sleep(rng.uniform(0, 0.02))  # where in its loop the victim is
            # A killed plain Optuna worker may leave its lock file, which stands for 30 s, its
            # grace period. That is not ours to shorten, so it lives to the end.
            victim = rng.choice([worker for worker in fleet if worker.kind == "ours"])
            bury(victim)
            others = [worker for worker in fleet if worker is not victim]
            said = [len(worker.said()) for worker in others]
            # Everybody else gets on: a dead owner's lock keeps nobody waiting. What was on its
            # way when it was killed does not tell, hence one more.
            began_at = time.monotonic()
            for worker, than in zip(others, said, strict=True):
                worker.gets_on(than + 1)
            fallen.waits_s.append(time.monotonic() - began_at)
            fleet[fleet.index(victim)] = start(victim.kind)
    finally:
        for worker in fleet:
            bury(worker)
    Path(f"{path}.lock").unlink(missing_ok=True)  # of the plain worker, whose grace is 30 s
    return fallen


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


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("lock", KINDS)
@pytest.mark.parametrize(
    ("work", "check"),
    [(append_records, records_are_all_there), (tell_trials, trials_are_all_there)],
    ids=["records", "trials"],
)
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
    waits_s.sort()
    with capsys.disabled():
        print(
            f"\n{lock}, {work.__name__}: {len(waits_s)} kills; until all others had got on: "
            f"median {waits_s[len(waits_s) // 2]:.3f} s, longest {waits_s[-1]:.3f} s"
        )
