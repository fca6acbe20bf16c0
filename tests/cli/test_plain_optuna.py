"""Every command that reads works on what plain Optuna wrote, the oldest and the newest."""

from __future__ import annotations

import os
from pathlib import Path
import subprocess
from typing import Any

import optuna
import pytest

from compat.environments import python_with
from stores import Cli
import trialstore
from trialstore.testing.contents import storage_contents

_WRITER = """
import sys, optuna
from optuna.storages import JournalStorage, RDBStorage, journal
optuna.logging.set_verbosity(optuna.logging.ERROR)
path = sys.argv[1]
tables = path.endswith(".db")
storage = (
    RDBStorage("sqlite:///" + path) if tables else JournalStorage(journal.JournalFileBackend(path))
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


@pytest.mark.parametrize("version", ["4.4", "5.0"])
@pytest.mark.parametrize("name", ["old.journal", "old.db"])
def test_what_optuna_wrote(version: str, name: str, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / name
    command = [python_with(version), "-c", _WRITER, str(path)]
    subprocess.run(command, check=True, env={**os.environ, "TZ": "UTC"})
    url = f"sqlite:///{path}" if name.endswith(".db") else str(path)
    assert cli.json("check", url, "--deep")["findings"] == []
    (study,) = cli.json("info", url)["studies"]
    assert study["states"] == {"COMPLETE": 5, "WAITING": 1}
    for target in (f"{tmp_path}/copy.journal", f"sqlite:///{tmp_path}/copy.db"):
        (copied,) = cli.json("copy", url, target, "--verify", "--source-timezone", "UTC")
        assert copied["differences"] == []
        assert _trials(target) == _trials(url)
    cli.json("export", url, "--study", "old", "-o", f"{tmp_path}/a.jsonl")
    cli.json("import", f"{tmp_path}/a.jsonl", f"{tmp_path}/back.journal")
    assert _trials(f"{tmp_path}/back.journal") == _trials(url)
    assert cli.json("upgrade", url)["upgraded"] is False
    assert cli.json("stale", url)["stale"] == []
    assert cli.json("watch", url)[0]["states"] == study["states"]
    repaired = cli.json("repair", url)
    assert repaired["done"] == repaired["given_up"] == repaired["still"] == []
    assert _trials(repaired["repaired"]) == _trials(url)
    cli.json("delete-study", url, "old", "--yes")
    assert optuna.get_all_study_names(trialstore.get_storage(url)) == []


def _trials(url: str) -> Any:
    contents = storage_contents(trialstore.get_storage(url), ids=False, times=False)
    return contents["old"]["trials"]
