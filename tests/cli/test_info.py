"""``info`` and ``delete-study``, the exit codes, and what all commands have in common."""

from __future__ import annotations

import io
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import optuna
import pytest
from rich.console import Console

import stores
from stores import KINDS, Cli, new_url
import trialstore
from trialstore.cli import output


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
    assert {one["n_with_heartbeats"] for one in told["studies"]} == {0}
    assert "newest at" not in cli("info", url).out  # nobody has beaten
    beating: Any = trialstore.get_storage(url, heartbeat_interval=1000)
    optuna.load_study(study_name="colours, empty", storage=beating).ask()
    beats = [one["n_with_heartbeats"] for one in cli.json("info", url)["studies"]]
    assert beats == [0, 0, 1]
    beating.close()
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


def test_what_is_wrong_is_said_and_nothing_is_made(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    journal, database = f"{tmp_path}/a.journal", tmp_path / "a.db"
    stores.fill(trialstore.get_storage(journal))
    database.write_bytes(b"")
    for code, said, *arguments in (
        (2, "no study with the name 'nobody'", "stale", journal, "--study", "nobody"),
        (2, "no study with the name 'nobody'", "watch", journal, "--study", "nobody"),
        (2, "Invalid value", "serve", journal, "--port", "99999"),
        (2, "Invalid value", "dashboard", journal, "--port", "0"),
        (3, "no folder", "export", journal, "--study", "colours", "-o", f"{tmp_path}/b/c.csv"),
        (3, "c.jsonl: No such file", "import", f"{tmp_path}/c.jsonl", journal),
        (2, "sqlite:///relative/path", "check", "sqlite://a.db"),
        (4, "no SQLite database", "check", f"sqlite:///{database}"),
        (4, "no SQLite database", "info", f"sqlite:///{journal}"),
        (130, "Interrupted", "delete-study", journal, "colours"),  # nobody answers
    ):
        result = cli(*arguments)
        assert (result.code, said in result.err) == (code, True), result
    assert {path.name for path in tmp_path.iterdir() if "journal" not in path.name} == {"a.db"}
    assert database.read_bytes() == b""


def test_a_declined_question_deletes_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{tmp_path}/a.journal"
    stores.fill(trialstore.get_storage(url))
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    declined = cli("delete-study", url, "colours")
    assert (declined.code, "Nothing was deleted." in declined.err) == (130, True), declined
    assert "colours" in optuna.get_all_study_names(trialstore.get_storage(url))


def test_in_a_narrow_terminal_nothing_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "stdout", Console(width=40, soft_wrap=True))
    name = "a-study-with-a-name-that-is-longer-than-the-terminal-is-wide"
    output.print_table(("study", "trials"), [(name, "12345")])
    lines = capsys.readouterr().out.splitlines()
    assert "".join(line.partition(" ")[0] for line in lines[1:]) == name


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_script_may_read_little_or_nothing_or_in_another_encoding(
    options: list[str], tmp_path: Path
) -> None:
    """The exit code is as ever; of a pipe that is closed, of no stdout, in an ASCII locale."""
    path = tmp_path / "a.journal"
    storage = trialstore.get_storage(str(path))
    optuna.create_study(study_name="Größe \udc80", storage=storage)
    storage.close()
    command = [sys.executable, "-m", "trialstore", "info", str(path), *options]
    reader, closed = os.pipe()
    os.close(reader)
    ran = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE)
    os.close(closed)
    assert (ran.returncode, ran.stderr) == (0, b"")
    ran = subprocess.run(command, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (ran.returncode, ran.stderr) == (0, b"")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run(command, capture_output=True, env=environment)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert b"\\udc80" in ran.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_is_no_finding(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    trialstore.get_storage(str(path)).close()
    command = [sys.executable, "-m", "trialstore", "check", str(path), *options]
    with Path("/dev/full").open("wb") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 3
    assert "No space left" in ran.stderr
    assert "Traceback" not in ran.stderr


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


@pytest.mark.servers
def test_a_database_is_the_same_one_by_its_other_name(cli: Cli, tmp_path: Path) -> None:
    url = new_url("mariadb", tmp_path)
    stores.fill(trialstore.get_storage(url))
    other = url.replace("mysql+", "mariadb+", 1)
    told, told_other = cli.json("info", url), cli.json("info", other)
    assert told_other.pop("address") == told.pop("address").replace("mysql+", "mariadb+", 1)
    assert told_other == told
    figures = cli.json("bench", other, "--trials", "2", "--seconds", "0", "--optuna")
    assert [one["name"] for one in figures] == ["trialstore", "optuna"]
