"""Stores by URL, one of each kind, and the command line called as its console script does."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple
import urllib.error
import urllib.request

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial
import pytest

from grpc_servers import serve
from redis_servers import new_prefix
from servers import free_port, new_database, shared_redis
from trialstore.cli import main

_SERVERS = pytest.mark.servers
_DEADLINE_S = 100.0


def _redis(folder: Path) -> str:
    return f"{shared_redis().url}/0?prefix={new_prefix()}"


def _grpc(folder: Path) -> str:
    return f"grpc://localhost:{serve(new_database('sqlite', folder))}"


_MAKERS = {
    "journal": lambda folder: f"journal://{folder}/{len(list(folder.iterdir()))}.journal",
    "sqlite": lambda folder: new_database("sqlite", folder),
    "redis": _redis,
    "psycopg": lambda folder: new_database("psycopg", folder),
    "psycopg2": lambda folder: new_database("psycopg2", folder),
    "mariadb": lambda folder: new_database("pymysql", folder),
    "grpc": _grpc,
}

KINDS = [
    pytest.param(kind, marks=() if kind in ("journal", "sqlite", "grpc") else (_SERVERS,))
    for kind in _MAKERS
]


def new_url(kind: str, folder: Path) -> str:
    """URL of a new, empty store."""
    return _MAKERS[kind](folder)


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Cli:
    """``trialstore``, in this process, by the function that the console script calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Result:
        self._monkeypatch.setattr(sys, "argv", ["trialstore", *arguments])
        self._capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        captured = self._capsys.readouterr()
        return Result(code, captured.out, captured.err)

    def json(self, *arguments: str, code: int = 0) -> Any:
        """The one document that a command prints."""
        result = self(*arguments, "--json")
        assert result.code == code, result
        return result.json


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[int]:
    """``trialstore`` with a command that runs until it is ended; yields the port it listens on."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "trialstore", *arguments, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield port
        process.terminate()
        assert process.wait(_DEADLINE_S) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def fetch(port: int, path: str) -> Any:
    """What a web server on this machine answers, from JSON."""
    return json.loads(read(port, path))


def read(port: int, path: str) -> bytes:
    """The same as bytes; tried again until the server listens."""
    give_up_at = time.monotonic() + _DEADLINE_S
    while True:
        try:
            with urllib.request.urlopen(
                f"http://localhost:{port}{path}", timeout=_DEADLINE_S
            ) as answer:
                body: bytes = answer.read()
                return body
        except urllib.error.HTTPError:
            raise
        except OSError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.05)


def fill(storage: BaseStorage, name: str = "colours", n_trials: int = 12) -> optuna.Study:
    """A study with every state, and whatever a trial can hold; whole seconds, for MariaDB."""
    study = optuna.create_study(
        study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler(seed=1)
    )
    study.set_user_attr("who", "Ä. Nonymous")
    study.set_user_attr("tags", ["a", {"b": None}])

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", -1, 1)
        n = trial.suggest_int("n", 1, 9, log=True)
        colour = trial.suggest_categorical("colour", ["red", "green", None, 3])
        trial.set_user_attr("note", f"№ {trial.number}")
        for step in range(3):
            trial.report(float("nan") if step == 1 else x * step, step)
        if trial.number % 5 == 3:
            raise optuna.TrialPruned
        return x + n + (colour == "red")

    study.optimize(objective, n_trials=n_trials)
    study.tell(study.ask(), state=TrialState.FAIL)
    study.add_trial(create_trial(value=float("inf"), params={}, distributions={}))
    study.enqueue_trial({"x": 0.25}, user_attrs={"by": "hand"})
    running = study.ask(
        {
            "y": FloatDistribution(0, 1),
            "k": IntDistribution(0, 8),
            "z": CategoricalDistribution([1]),
        }
    )
    running.set_user_attr("still", "running")
    study.enqueue_trial({"x": 0.5})
    several = optuna.create_study(
        study_name=f"{name}, several",
        storage=storage,
        directions=["maximize", "minimize"],
        sampler=optuna.samplers.RandomSampler(seed=2),
    )
    several.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 1.0), n_trials=3)
    optuna.create_study(study_name=f"{name}, empty", storage=storage)
    getattr(storage, "flush", lambda: None)()
    assert {trial.state for trial in study.trials} == set(TrialState)
    return study
