"""The compose file is one, its references hold, and what it starts works, as processes."""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any
from urllib.request import urlopen

import optuna
import pytest
import sqlalchemy as sa
import yaml

from ageing import age_leases
from servers import SECRETIVE, free_port, shared_postgresql
from trialstore.optuna_db import PASSWORD_SECRET, OptunaDatabase
from trialstore.testing.suites.base import wait_until

_DEPLOY = Path(__file__).parent.parent.parent / "deploy"
_PASSWORD = """p@ss:w/o%rd?#[]{}'"\\ &=+;$,"""
_DEADLINE_S = 120.0


@pytest.fixture
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((_DEPLOY / "compose.yaml").read_text())
    return loaded


def _env_file() -> dict[str, str]:
    lines = (_DEPLOY / "optuna_db.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and line[0] != "#")


def test_the_compose_file_is_of_the_specification() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    subprocess.run([*check, str(_DEPLOY / "compose.yaml")], check=True)


def test_what_the_compose_file_names_is_there(compose: dict[str, Any]) -> None:
    database = compose["services"]["database"]["environment"]
    variables = _env_file()
    assert database["POSTGRES_USER"] == variables["OPTUNA_DB_USER"]
    assert database["POSTGRES_DB"] == variables["OPTUNA_DB_NAME"]
    assert variables["OPTUNA_DB_HOST"].split(":")[0] in compose["services"]
    assert database["POSTGRES_PASSWORD_FILE"] == f"/run/secrets/{PASSWORD_SECRET}"
    assert set(compose["secrets"]) == {PASSWORD_SECRET}
    for service in compose["services"].values():
        assert service["secrets"] == [PASSWORD_SECRET]
        assert all((_DEPLOY / name).is_file() for name in service.get("env_file", ()))
        if "build" in service:
            context = (_DEPLOY / service["build"]["context"]).resolve()
            dockerfile = context / service["build"]["dockerfile"]
            copied = [
                name
                for line in dockerfile.read_text().splitlines()
                if line.startswith("COPY ")
                for name in line.split()[1:-1]
            ]
            assert copied and all((context / name).exists() for name in copied)
            assert f"deploy/{service['command'][-1]}" in copied


# --- the parts, as processes ---------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a container, but for where things are on this machine."""
    server = shared_postgresql()
    server.let_in(_PASSWORD)
    address = sa.make_url(server.new_database())
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / PASSWORD_SECRET).write_text(f"{_PASSWORD}\n")
    return {
        **os.environ,
        **_env_file(),
        "HOME": str(tmp_path),
        "SECRETS_FOLDER": str(secrets),
        "OPTUNA_DB_USER": SECRETIVE,
        "OPTUNA_DB_NAME": str(address.database),
        "OPTUNA_DB_HOST": f"{address.host}:{address.port}",
        "N_TRIALS": "6",
        "HOST": "127.0.0.1",
        "PORT": str(free_port()),
    }


@pytest.fixture
def database(environment: dict[str, str]) -> Iterator[OptunaDatabase]:
    """As somebody who looks at it from outside."""
    opened = OptunaDatabase(
        environment["OPTUNA_DB_USER"],
        PASSWORD_SECRET,
        environment["OPTUNA_DB_NAME"],
        environment["OPTUNA_DB_HOST"],
        secrets_folder=environment["SECRETS_FOLDER"],
    )
    yield opened
    opened.storage.close()


def _start(name: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(_DEPLOY / name)],
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
    )


def _said(process: subprocess.Popen[str]) -> str:
    _, said = process.communicate(timeout=_DEADLINE_S)
    assert _PASSWORD not in said
    return said


@pytest.mark.servers
def test_workers_and_the_dashboard_share_a_study(
    environment: dict[str, str], database: OptunaDatabase
) -> None:
    workers = [_start("worker.py", environment) for _ in range(2)]
    for worker in workers:
        said = _said(worker)
        assert worker.returncode == 0, said
    trials = database.get_study("example").get_trials()
    assert [trial.state.name for trial in trials].count("COMPLETE") == 6

    dashboard = _start("dashboard.py", environment)
    try:
        studies = _get(f"http://127.0.0.1:{environment['PORT']}/api/studies", dashboard)
        (summary,) = studies["study_summaries"]
        assert summary["study_name"] == "example"
        url = f"http://127.0.0.1:{environment['PORT']}/api/studies/{summary['study_id']}?after=0"
        shown = _get(url, dashboard)
        assert [trial["number"] for trial in shown["trials"]] == [t.number for t in trials]
    finally:
        dashboard.terminate()
        _said(dashboard)


def _get(url: str, server: subprocess.Popen[str]) -> Any:
    give_up_at = time.monotonic() + _DEADLINE_S
    while True:
        try:
            with urlopen(url, timeout=_DEADLINE_S) as answer:
                return json.load(answer)
        except OSError:
            assert server.poll() is None and time.monotonic() < give_up_at
            time.sleep(0.05)


@pytest.mark.servers
def test_a_worker_that_is_asked_to_stop_finishes_its_trial(
    environment: dict[str, str], database: OptunaDatabase
) -> None:
    study = database.get_study("example")
    worker = _start("worker.py", {**environment, "N_TRIALS": "1000000"})
    give_up_at = time.monotonic() + _DEADLINE_S
    while not study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
        assert worker.poll() is None and time.monotonic() < give_up_at
        time.sleep(0.02)
    worker.send_signal(signal.SIGTERM)
    said = _said(worker)
    assert worker.returncode == 0, said
    assert {trial.state.name for trial in study.get_trials()} == {"COMPLETE"}


@pytest.mark.servers
def test_what_a_killed_worker_ran_is_run_again(
    environment: dict[str, str], database: OptunaDatabase
) -> None:
    study = database.get_study("example")
    running = (optuna.trial.TrialState.RUNNING,)
    lost: list[int] = []
    while not lost:
        n_sessions = _n_sessions(database)
        worker = _start("worker.py", {**environment, "N_TRIALS": "1000000"})
        give_up_at = time.monotonic() + _DEADLINE_S
        while not study.get_trials(states=running):
            assert worker.poll() is None and time.monotonic() < give_up_at
            time.sleep(0.02)
        worker.kill()
        _said(worker)
        # What it had sent is carried out all the same; perhaps that was the end of its trial.
        wait_until(lambda n=n_sessions: _n_sessions(database) <= n, "its sessions have ended")  # type: ignore[misc]
        lost = [trial.number for trial in study.get_trials(states=running)]
    age_leases(database.storage, 1000.0)
    enough = len(study.get_trials()) + 2
    second = _start("worker.py", {**environment, "N_TRIALS": str(enough)})
    said = _said(second)
    assert second.returncode == 0, said
    trials = study.get_trials()
    assert [trial.number for trial in trials if trial.state.name == "FAIL"] == lost
    retries = [trial for trial in trials if "retry_history" in trial.system_attrs]
    assert [trial.system_attrs["retry_history"] for trial in retries] == [lost]
    assert [trial.state.name for trial in retries] == ["COMPLETE"]
    assert [trial.state.name for trial in trials].count("COMPLETE") == enough


def _n_sessions(database: OptunaDatabase) -> int:
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    engine: sa.Engine = database.storage.engine
    with engine.connect() as connection:
        return int(connection.exec_driver_sql(sessions).scalar_one())


@pytest.mark.servers
@pytest.mark.parametrize("missing", ["secret", "variable"])
def test_what_is_missing_is_named(environment: dict[str, str], missing: str) -> None:
    if missing == "secret":
        (Path(environment["SECRETS_FOLDER"]) / PASSWORD_SECRET).unlink()
    else:
        del environment["OPTUNA_DB_HOST"]
    worker = _start("worker.py", environment)
    said = _said(worker)
    assert worker.returncode != 0
    assert (PASSWORD_SECRET if missing == "secret" else "OPTUNA_DB_HOST") in said
