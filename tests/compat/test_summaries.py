"""Summaries of studies are those of the Optuna that is installed, the oldest and this one."""

from __future__ import annotations

from pathlib import Path
import subprocess

import pytest

from compat.environments import DEADLINE_S, python_with

_PROGRAM = """
import sys, optuna, trialstore
optuna.logging.set_verbosity(optuna.logging.ERROR)
ours = trialstore.RDBStorage(sys.argv[1])
for number in range(3):
    study = optuna.create_study(study_name=f"s{number}", storage=ours)
    study.set_user_attr("k", number)
    study.set_metric_names(["loss"])
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=number)
theirs = optuna.get_all_study_summaries(optuna.storages.RDBStorage(sys.argv[1]))
found = ours.get_all_study_summaries()
assert len(found) == 3
assert found == sorted(theirs, key=lambda one: one._study_id), [vars(one) for one in found]
assert found[2] == ours.get_study_summary("s2")
"""


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("version", ["4.4", "5"])
def test_a_summary_is_optunas(version: str, tmp_path: Path) -> None:
    command = [python_with(version), "-W", "ignore", "-c", _PROGRAM]
    subprocess.run([*command, f"sqlite:///{tmp_path / 'db'}"], check=True, timeout=DEADLINE_S)
