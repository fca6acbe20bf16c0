"""``dashboard``, looked at with a real browser, and the example of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
import signal
import socket
import subprocess
import sys
from typing import Any

import optuna
import pytest

from browser import Browser
from servers import free_port
from stores import fetch, new_url, running
import trialstore

pytest.importorskip("optuna_dashboard")

_DEADLINE_S = 100.0
_EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "dashboard.py"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.mark.parametrize("kind", ["journal", "sqlite", "grpc"])
def test_the_pages_show_a_study_and_its_trials(
    kind: str, tmp_path: Path, browser: Browser
) -> None:
    url = new_url(kind, tmp_path)
    storage: Any = trialstore.get_storage(url)
    optuna.create_study(study_name="valleys", storage=storage)
    study = optuna.create_study(study_name="hills", storage=storage)
    study.optimize(lambda trial: trial.suggest_float("height", 0, 1) + 7, n_trials=3)
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    with running("dashboard", url) as port:
        page = f"http://localhost:{port}/dashboard"
        browser.open(page)
        browser.wait_for("hills")
        browser.wait_for("valleys")
        browser.open(f"{page}/studies/{study._study_id}")
        browser.wait_for("hills", "Best Trial", f"number={study.best_trial.number}", "height")
        trials = f"{page}/studies/{study._study_id}/trials"
        browser.open(trials)
        browser.wait_for("Trial 0", "Complete", "Trial 1", "Trial 2", "Trial 3", "Fail")
        browser.wait_for("Trial 0 (trial_id=", "Value", str(study.trials[0].value), "height")
        study.add_trial(optuna.create_trial(value=8.0))
        browser.open(trials)
        browser.wait_for("Trial 3", "Trial 4")
    storage.close()


def test_the_example_runs_a_study_behind_a_proxy_until_it_is_interrupted() -> None:
    port, proxy_port = free_port(), free_port()
    command = [sys.executable, str(_EXAMPLE), "--port", str(port), "--proxy-port", str(proxy_port)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert len(fetch(port, "/api/studies/0?after=0")["trials"]) == 60
        _wait_until_idle(port)
        process.send_signal(signal.SIGINT)
        process.wait(_DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    with socket.socket() as probe:  # the server behind the proxy is gone as well
        assert probe.connect_ex(("127.0.0.1", proxy_port)) != 0


def _wait_until_idle(port: int) -> None:
    """An interrupt while it answers is swallowed by wsgiref; it answers one after the other."""
    with socket.create_connection(("127.0.0.1", port), _DEADLINE_S) as asked:
        asked.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
        while asked.recv(4_096):
            pass
