"""Every command on every kind of store, on what plain Optuna wrote, and on every old schema."""

from __future__ import annotations

from importlib.metadata import entry_points
import os
from pathlib import Path
import subprocess
from typing import Any

import optuna
import pytest
import typer

from compat.environments import python_with
from old_tables import make_old_database
import stores
from stores import KINDS, Cli, fetch, new_url, read, running
import trialstore
from trialstore.cli import main
from trialstore.cli.app import app
from trialstore.logs.relational.schema import VERSIONS
from trialstore.testing.contents import storage_contents

pytest.importorskip("pyarrow")

_DEADLINE_S = 100.0

# What a command refuses, with exit code 2 and the store unharmed: it has no meaning there.
_REFUSED = {
    "sqlite": {"compact"},
    "psycopg": {"compact"},
    "psycopg2": {"compact"},
    "mariadb": {"compact"},
    "grpc": {"compact", "repair"},
}


def test_the_console_script_is_what_the_tests_call() -> None:
    (script,) = entry_points(group="console_scripts", name="trialstore")
    assert script.load() is main


@pytest.mark.parametrize("kind", KINDS)
def test_on_every_kind(kind: str, tmp_path: Path, cli: Cli) -> None:
    url = new_url(kind, tmp_path)
    storage: Any = trialstore.get_storage(url)
    stores.fill(storage)
    storage.close()
    _go_through(url, kind, "colours", tmp_path, cli)


@pytest.mark.parametrize("version", ["4.4", "5.0"])
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_on_what_plain_optuna_wrote(version: str, kind: str, tmp_path: Path, cli: Cli) -> None:
    url = new_url(kind, tmp_path)
    path = url.partition("://")[2].removeprefix("/" if kind == "sqlite" else "")
    command = [python_with(version), "-c", _WRITER, kind, path]
    subprocess.run(command, check=True, env={**os.environ, "TZ": "UTC"})
    (study,) = cli.json("info", url)["studies"]
    assert study["states"] == {"COMPLETE": 5, "WAITING": 1}
    _go_through(url, kind, "old", tmp_path, cli, "--force")


_WRITER = """
import sys, optuna
from optuna.storages import JournalStorage, RDBStorage, journal
optuna.logging.set_verbosity(optuna.logging.ERROR)
kind, path = sys.argv[1:]
storage = (
    RDBStorage("sqlite:///" + path)
    if kind == "sqlite"
    else JournalStorage(journal.JournalFileBackend(path))
)
study = optuna.create_study(study_name="old", storage=storage)
def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    trial.suggest_categorical("c", ["a", None, 2])
    trial.set_user_attr("n", trial.number)
    for step in range(2):
        trial.report(float("nan") if step else x, step)
    return float("inf") if trial.number == 2 else x
study.optimize(objective, n_trials=5)
study.enqueue_trial({"x": 0.5})
optuna.create_study(study_name="gone", storage=storage)
optuna.delete_study(study_name="gone", storage=storage)
"""


@pytest.mark.parametrize("version", VERSIONS[:-1])
def test_on_every_schema_there_was(version: str, tmp_path: Path, cli: Cli) -> None:
    url = f"sqlite:///{tmp_path}/old.db"
    make_old_database(url, version)
    before = (tmp_path / "old.db").read_bytes()
    told = cli.json("info", url)
    assert (told["schema_version"], told["studies"]) == (version, [])
    checked = cli.json("check", url, code=1)
    assert "schema-version" in {finding["kind"] for finding in checked["findings"]}
    for command, why in (("info", told["not_shown"]), ("check", checked["not_counted"])):
        assert "`trialstore upgrade`" in why
        assert why in cli(command, url).out
    assert cli.json("upgrade", url, "--dry-run")["from"] == version
    reading = (["copy", url, f"{tmp_path}/x"], ["watch", url], ["stale", url], ["bench", url])
    for command in reading:
        result = cli(*command)
        assert result.code == 4, command
        assert "trialstore upgrade" in result.err
    assert (tmp_path / "old.db").read_bytes() == before
    assert cli.json("upgrade", url)["upgraded"] is True
    _go_through(url, "sqlite", "study 1", tmp_path, cli)


def _go_through(url: str, kind: str, name: str, folder: Path, cli: Cli, *force: str) -> None:
    """Run all commands on a store that has a study of this name."""
    before = _contents(url)[name]
    folder = folder / "out"
    folder.mkdir()
    used = set()

    def run(command: str, *arguments: str) -> Any:
        used.add(command)
        if command in _REFUSED.get(kind, ()):
            assert "error" in cli.json(command, *arguments, code=2)
            return None
        return cli.json(command, *arguments)

    assert name in {study["name"] for study in run("info", url)["studies"]}
    assert run("check", url, "--deep")["findings"] == []
    assert run("export", url, "--study", name, "-o", f"{folder}/a.jsonl")["n_trials"] > 0
    assert run("import", f"{folder}/a.jsonl", url, "--study", "again")["n_new"] > 0
    assert _contents(url)["again"] == before
    copied = run("copy", url, f"{folder}/copy.journal", "--verify")
    assert copied[0]["differences"] == []
    assert _contents(f"{folder}/copy.journal")[name] == before
    assert run("upgrade", url)["upgraded"] is False
    assert run("stale", url, "--fail") == {"stale": [], "failed": True}
    (shown,) = run("watch", url, "--study", name)
    assert sum(shown["states"].values()) == len(before["trials"])
    assert run("bench", url, "--trials", "3", "--seconds", "0")[0]["n_trials"] == 3
    for command, ask in (("serve", _ask_server), ("dashboard", _ask_dashboard)):
        used.add(command)
        with running(command, url) as port:
            assert ask(port, name) == len(before["trials"])
    compacted = run("compact", url, *force)
    assert compacted is None or compacted["n_kept"] <= compacted["n_records"]
    assert _contents(url)[name] == before
    if kind in ("psycopg", "psycopg2", "mariadb"):
        repaired = run("repair", url, "--in-place")
    else:
        repaired = run("repair", url, "-o", f"{folder}/repaired")
    if repaired is not None:
        assert repaired == {"repaired": None, "done": [], "given_up": [], "still": []}
    run("delete-study", url, name, "--yes")
    assert name not in _contents(url)
    assert used == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def _contents(url: str) -> Any:
    storage: Any = trialstore.get_storage(url)
    contents = storage_contents(storage, ids=False, exact=False)
    storage.close()
    return contents


def _ask_server(port: int, name: str) -> int:
    proxy = trialstore.GrpcStorageProxy(port=port)
    proxy.wait_server_ready(int(_DEADLINE_S))
    study = optuna.load_study(study_name=name, storage=proxy)
    n_trials = len(study.trials)
    proxy.close()
    return n_trials


def _ask_dashboard(port: int, name: str) -> int:
    """What the page's own script asks for: the studies, then the trials of one."""
    (study,) = [
        one for one in fetch(port, "/api/studies")["study_summaries"] if one["study_name"] == name
    ]
    detail = fetch(port, f"/api/studies/{study['study_id']}?after=0")
    assert read(port, "/dashboard/").startswith(b"<!DOCTYPE html>")
    return len(detail["trials"])
