"""``info`` and ``delete-study``, the exit codes, and what all commands have in common."""

from __future__ import annotations

from pathlib import Path
import subprocess
import sys

import optuna
import pytest

import stores
from stores import KINDS, Cli, new_url
import trialstore


@pytest.mark.parametrize("kind", KINDS)
def test_info_tells_what_is_there_and_delete_study_takes_it_away(
    kind: str, cli: Cli, tmp_path: Path
) -> None:
    url = new_url(kind, tmp_path)
    storage = trialstore.get_storage(url)
    study = stores.fill(storage)
    best = study.best_trial
    told = cli.json("info", url)
    assert [one["name"] for one in told["studies"]] == [
        "colours",
        "colours, several",
        "colours, empty",
    ]
    one = told["studies"][0]
    states = [trial.state.name for trial in study.trials]
    assert one["states"] == {name: states.count(name) for name in set(states)}
    assert one["best_trial"] == best.number
    assert one["best_value"] == best.value
    assert one["first_start_at"] == study.trials[0].datetime_start.isoformat()
    assert one["directions"] == ["MINIMIZE"]
    assert told["studies"][1]["best_value"] is None
    text = cli("info", url)
    assert text.code == 0
    assert "colours, several" in text.out

    assert cli("delete-study", url, "nobody", "--yes").code == 2
    assert cli.json("delete-study", url, "colours", "--yes") == {
        "deleted": "colours",
        "n_trials": len(states),
    }
    assert "colours" not in optuna.get_all_study_names(trialstore.get_storage(url))
    assert cli("check", url).code == 0


@pytest.mark.parametrize("command", ["info", "check"])
@pytest.mark.parametrize("scheme", ["journal://", "sqlite:///"])
def test_what_only_reads_makes_nothing(
    command: str, scheme: str, cli: Cli, tmp_path: Path
) -> None:
    result = cli(command, f"{scheme}{tmp_path}/absent")
    assert result.code == 3
    assert "There is no file" in result.err
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_one_json_document_as_well(cli: Cli, tmp_path: Path) -> None:
    assert "There is no file" in cli.json("info", f"{tmp_path}/absent", code=3)["error"]
    assert cli.json("info", "gopher://x", code=2)["type"] == "ValueError"


def test_as_a_module_and_without_the_extra(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trialstore", "info", str(tmp_path / "absent")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 3
    assert ran.stdout == ""
    (tmp_path / "typer.py").write_text("raise ImportError('no', name='typer')")
    command = [
        sys.executable, "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import trialstore.cli as c; c.main()",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "pip install 'trialstore[cli]'" in ran.stderr
