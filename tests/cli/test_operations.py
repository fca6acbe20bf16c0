"""``upgrade``, ``compact``, ``stale``, ``serve``, ``watch``, ``bench``; ``storage.watch``."""

from __future__ import annotations

import fcntl
import itertools
import os
from pathlib import Path
import re
import select
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import time
from typing import Any

import optuna
from optuna.trial import TrialState
import pytest

from servers import free_port
import stores
from stores import KINDS, Cli, new_url, running
import trialstore
from trialstore.cli.watch import Board

_DEADLINE_S = 120.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_watch_tells_of_every_trial_and_goes_on_from_its_cursor(
    kind: str, tmp_path: Path, cli: Cli
) -> None:
    url = new_url(kind, tmp_path)
    worker: Any = trialstore.get_storage(url)
    study = stores.fill(worker)
    reader: Any = trialstore.get_storage(url)
    study_id = reader.get_study_id_from_name("colours")
    n = len(study.trials)
    told = list(itertools.islice(reader.watch(study_id, poll_s=0.01), n))
    assert [change.trial.number for change in told] == list(range(n))
    assert [change.trial.state for change in told] == [trial.state for trial in study.trials]
    # Meanwhile a queued trial is run, and one is new; another process reads on.
    study.optimize(lambda trial: 1.0, n_trials=1)
    late = study.ask()
    late.set_user_attr("late", True)
    worker.flush()
    other: Any = trialstore.get_storage(url)
    news = other.watch(study_id, since=told[-1].cursor, poll_s=0.01)
    changes = [next(news), next(news)]
    assert [change.trial.state for change in changes] == [TrialState.COMPLETE, TrialState.RUNNING]
    assert changes[1].trial.number == late.number
    assert changes[1].trial.user_attrs == {"late": True}
    # From the middle: the rest once more, and nothing before.
    again = other.watch(study_id, since=changes[0].cursor, poll_s=0.01)
    assert next(again).trial.number == late.number
    study.tell(late, 2.0)
    assert next(again).trial.state == TrialState.COMPLETE
    shown = cli.json("watch", url, "--study", "colours")
    assert shown[0]["states"]["RUNNING"] == 1
    assert cli("watch", url, "--once").code == 0
    worker.delete_study(study_id)
    with pytest.raises(KeyError):
        next(again)


def test_a_watch_refuses_what_is_no_cursor_of_its_study() -> None:
    storage = trialstore.InMemoryStorage()
    study = stores.fill(storage)
    change = next(storage.watch(study._study_id))
    with pytest.raises(ValueError, match="is of the study"):
        next(storage.watch(study._study_id + 1, since=change.cursor))
    with pytest.raises(ValueError, match="no cursor"):
        next(storage.watch(study._study_id, since="!"))


def test_upgrade(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "old.db"
    url = f"sqlite:///{path}"
    stores.fill(trialstore.get_storage(url))
    assert cli.json("upgrade", url)["upgraded"] is False
    connection = sqlite3.connect(path)
    # The step from v3.0.0.d to v3.2.0.a adds an index, nothing else.
    connection.execute("UPDATE alembic_version SET version_num = 'v3.0.0.d'")
    connection.execute("DROP INDEX ix_trials_study_id")
    connection.commit()
    assert cli("export", url, "--study", "colours", "-o", f"{tmp_path}/a.csv").code == 4
    assert cli("check", url).code == 1
    told = cli.json("upgrade", url, "--dry-run")
    assert told == {"from": "v3.0.0.d", "to": "v3.2.0.a", "upgraded": False}
    assert cli.json("upgrade", url)["upgraded"] is True
    assert cli("check", url, "--deep").code == 0
    assert cli.json("upgrade", str(_journal(tmp_path)))["upgraded"] is False


def _journal(folder: Path) -> Path:
    path = folder / "a.journal"
    stores.fill(trialstore.get_storage(str(path)))
    return path


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("journal", []),
        pytest.param("redis", [], marks=pytest.mark.servers),
        pytest.param("redis", ["--trim"], marks=pytest.mark.servers),
    ],
)
def test_compact(kind: str, options: list[str], tmp_path: Path, cli: Cli) -> None:
    url = new_url(kind, tmp_path)
    storage: Any = trialstore.get_storage(url)
    study = stores.fill(storage)
    numbers = [trial.number for trial in study.trials]
    done = cli.json("compact", url, *options)
    assert done["n_kept"] < done["n_records"]
    assert cli("check", url).code == 0
    assert cli.json("repair", url, "--output", f"{tmp_path}/repaired")["repaired"] is None
    target = str(tmp_path / "copy.journal")
    assert cli("copy", url, target, "--verify").code == 0
    copied = optuna.load_study(study_name="colours", storage=trialstore.get_storage(target))
    assert [trial.number for trial in copied.trials] == numbers
    assert cli("compact", f"sqlite:///{_sqlite(tmp_path)}").code == 2


def _sqlite(folder: Path) -> Path:
    path = folder / "a.db"
    stores.fill(trialstore.get_storage(f"sqlite:///{path}"))
    return path


def test_stale_trials_are_shown_and_failed(tmp_path: Path, cli: Cli) -> None:
    path = _sqlite(tmp_path)
    url = f"sqlite:///{path}"
    assert cli.json("stale", url) == {"stale": [], "failed": False}
    assert "no beat for 90 s" in cli("stale", url, "--grace-period", "90").out
    connection = sqlite3.connect(path)
    connection.execute(
        "INSERT INTO trial_heartbeats (trial_id, heartbeat) "
        "SELECT trial_id, '2020-01-01 00:00:00' FROM trials WHERE state = 'RUNNING' LIMIT 1"
    )
    connection.commit()
    connection.close()
    shown = cli.json("stale", url, code=1)["stale"]
    assert len(shown) == 1
    watched = cli.json("watch", url, "--study", "colours")[0]["running"]
    beats = {one["trial"]: one["last_beat"] for one in watched}
    assert beats.pop(shown[0]["trial"]) == "more than an hour ago"
    assert set(beats.values()) <= {None}
    assert cli.json("stale", url, "--fail")["stale"] == shown
    study = optuna.load_study(study_name="colours", storage=trialstore.get_storage(url))
    assert study.trials[shown[0]["trial"]].state == TrialState.FAIL
    assert cli.json("stale", url) == {"stale": [], "failed": False}


def test_serve_with_a_token(tmp_path: Path, cli: Cli) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    port = free_port()
    command = [
        sys.executable, "-m", "trialstore", "serve", f"sqlite:///{_sqlite(tmp_path)}",
        "--port", str(port), "--token-file", str(token),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        proxy = trialstore.GrpcStorageProxy(port=port, token_file=str(token))
        proxy.wait_server_ready(int(_DEADLINE_S))
        assert "colours" in optuna.get_all_study_names(proxy)
        stranger = trialstore.GrpcStorageProxy(port=port)
        with pytest.raises(Exception, match="token"):
            stranger.get_all_studies()
        proxy.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(_DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("command", ["serve", "watch", "stale", "dashboard"])
def test_what_is_not_there_is_not_made(command: str, tmp_path: Path, cli: Cli) -> None:
    for name in ("missing.journal", "sqlite:///missing.db"):
        refused = cli(command, name.replace("missing", f"{tmp_path}/missing"))
        assert (refused.code, "There is no file" in refused.err) == (3, True), refused
    assert list(tmp_path.iterdir()) == []
    # A database of another program: it gets no tables of ours.
    connection = sqlite3.connect(tmp_path / "foreign.db")
    connection.execute("CREATE TABLE theirs (id)")
    refused = cli(command, f"sqlite:///{tmp_path}/foreign.db")
    assert (refused.code, "no tables of Optuna" in refused.err) == (4, True), refused
    tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
    connection.close()
    assert tables == [("theirs",)]


@pytest.mark.parametrize("options", [("sqlite:///%s/new.db", "--create"), ("memory://",)])
def test_serve_makes_a_store_that_is_asked_for(options: tuple[str, ...], tmp_path: Path) -> None:
    url, *rest = options
    with running("serve", url.replace("%s", str(tmp_path)), *rest) as port:
        proxy = trialstore.GrpcStorageProxy(port=port)
        proxy.wait_server_ready(int(_DEADLINE_S))
        assert optuna.get_all_study_names(proxy) == []
        proxy.close()
    assert (tmp_path / "new.db").exists() == bool(rest)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--host", "0.0.0.0"], ["--certificate", "--key", "--token-file", "--allow-insecure"]),
        (["--certificate", "c"], ["--certificate", "--key"]),
        (["--client-ca", "c"], ["--client-ca", "--certificate", "--key"]),
    ],
)
def test_serve_refuses_in_the_words_of_its_options(
    options: list[str], named: list[str], tmp_path: Path, cli: Cli
) -> None:
    refused = cli("serve", f"{tmp_path}/j", "--create", *options, "--port", str(free_port()))
    assert refused.code == 2
    assert set(re.findall(r"--[a-z-]+", refused.err)) == set(named)
    assert "_file" not in refused.err
    assert "=True" not in refused.err


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_bench_leaves_nothing_behind(kind: str, tmp_path: Path, cli: Cli) -> None:
    url = new_url(kind, tmp_path)
    figures = cli.json("bench", url, "--trials", "12", "--seconds", "0", "--optuna")
    assert [one["name"] for one in figures] == ["trialstore", "optuna"]
    # Where the machine is busy, the linger thread makes one more now and then.
    assert figures[0]["exchanges_per_trial"] >= 4.0
    assert 10 <= figures[0]["n_trials"] <= 12
    assert trialstore.get_storage(url).get_all_studies() == []
    assert cli("bench", url, "--trials", "0").code == 2
    # Before anything is measured, or even reached.
    assert cli("bench", "redis://127.0.0.1:1", "--optuna").code == 2


def _hear_sigint() -> None:
    """A shell starts what it puts in the background with SIGINT ignored, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_live_watch_shows_new_trials_and_studies_until_it_is_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    storage = trialstore.get_storage(str(path))
    study = optuna.create_study(study_name="first [one]", storage=storage)
    terminal, other_end = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "trialstore", "watch", str(path), "--every", "0.1"],
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        env=environment,
        preexec_fn=_hear_sigint,
    )
    shown = b""

    def wait_for(text: bytes) -> None:
        nonlocal shown
        give_up_at = time.monotonic() + _DEADLINE_S
        while text not in shown:
            assert time.monotonic() < give_up_at, shown[-2_000:]
            if select.select([terminal], [], [], 1.0)[0]:
                shown += os.read(terminal, 65_536)

    try:
        wait_for(b"first [one]")
        wait_for(b"no trials")
        study.add_trial(optuna.create_trial(value=0.25))
        wait_for(b"best 0.25 in trial 0")
        optuna.create_study(study_name="second", storage=storage).ask()
        wait_for(b"second")
        wait_for(b"1 RUNNING")
        process.send_signal(signal.SIGINT)
        assert process.wait(_DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
        os.close(other_end)


def test_a_watch_goes_on_past_what_cannot_be_read_and_what_is_deleted(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    storage: Any = trialstore.get_storage(url)
    for name in ("unreadable", "gone", "whole"):
        study = optuna.create_study(study_name=name, storage=storage)
        # The one COMPLETE trial that there is has no values.
        tell = {"unreadable": None, "gone": [1.0], "whole": [2.0]}[name]
        trial_id = storage.create_new_trial(study._study_id)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, tell)
    look = Board.look

    def look_when_it_is_gone(board: Board) -> None:
        if board.document()["study"] == "gone":
            storage.delete_study(storage.get_study_id_from_name("gone"))
        look(board)

    monkeypatch.setattr(Board, "look", look_when_it_is_gone)
    shown = {one["study"]: one["best"] for one in cli.json("watch", url)}
    assert shown == {"unreadable": None, "whole": {"trial": 0, "value": 2.0}}


def test_ctrl_c_ends_a_command_with_130(tmp_path: Path) -> None:
    path = _journal(tmp_path)
    command = [
        sys.executable, "-m", "trialstore", "bench", str(path), "--trials", "1000000",
        "--seconds", "1000",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=_hear_sigint,
    )
    size = path.stat().st_size
    deadline_s = time.monotonic() + _DEADLINE_S
    try:
        while path.stat().st_size < size + 5_000:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=_DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 130, err
