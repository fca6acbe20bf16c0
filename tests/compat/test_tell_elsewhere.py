"""``study.tell`` by number from a process that did not ask: no parameter is lost."""

from __future__ import annotations

from pathlib import Path
import subprocess
import sys

import optuna
import pytest

from compat.environments import DEADLINE_S, start
import trialstore
from trialstore.storage import Storage
from trialstore.testing.suites.base import exchanger_of, wait_until

_N_TRIALS = 500
_LINGER_S = 0.002


def _open(kind: str, folder: Path) -> tuple[str, Storage]:
    if kind == "sqlite":
        url = f"sqlite:///{folder / 'store.db'}"
        return url, trialstore.RDBStorage(url, linger_s=_LINGER_S)
    path = folder / "journal.log"
    backend = trialstore.journal.JournalFileBackend(str(path))
    return f"journal:{path}", trialstore.JournalStorage(backend, linger_s=_LINGER_S)


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_500_tells_from_another_process_lose_no_parameter(kind: str, tmp_path: Path) -> None:
    url, storage = _open(kind, tmp_path)
    study = optuna.create_study(study_name="s", storage=storage)
    teller = start(
        sys.executable, "tell", "trialstore", url, "s", _N_TRIALS, stdin=subprocess.PIPE
    )
    assert teller.stdin is not None and teller.stdout is not None
    try:
        for _ in range(_N_TRIALS):
            trial = study.ask()
            for name in ("x", "y", "z"):
                trial.suggest_float(name, 0.0, 1.0)
            # As soon as the last parameter is suggested; the outbox may still hold it. The teller
            # waits for as long as the asker lingers, however long that takes on a busy machine.
            print(trial.number, file=teller.stdin, flush=True)
            assert teller.stdout.readline() == "wait\n"
            wait_until(lambda: not exchanger_of(storage).has_deferred(), "an empty outbox")
            print("go", file=teller.stdin, flush=True)
        _, errors = teller.communicate(timeout=DEADLINE_S)
        assert teller.returncode == 0, errors
    finally:
        if teller.poll() is None:
            teller.kill()
            teller.wait()
    trials = study.get_trials()
    assert [trial.number for trial in trials] == list(range(_N_TRIALS))
    lost = [trial.number for trial in trials if list(trial.params) != ["x", "y", "z"]]
    assert lost == []
    assert all(trial.value == trial.number for trial in trials)
    storage.close()
