"""``repair`` brings back whatever was not destroyed, and leaves the damaged store alone."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
import random
import shutil
import sqlite3
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
import pytest

from damages import (
    JOURNAL_DAMAGES,
    REDIS_DAMAGES,
    SQLITE_DAMAGES,
    damage_journal,
    damage_redis,
    damage_tables,
)
from ownership import GROUP, OWNER, as_root, may_not_chown
import stores
from stores import Cli
import trialstore
from trialstore import records as r
from trialstore.log import Entry
from trialstore.stores.salvage import read_entry
from trialstore.testing.contents import storage_contents

# Of a journal: where nothing was destroyed.
_NOTHING_LOST = {
    "a line of another program",
    "the file ends in a record",
    "the last newline is another byte",
    "a record glued on a torn one",
    "a newline is another byte",
    "a record twice",
}

# Of tables: in what a trial or study differs from before, which is what the damage destroyed.
_DIFFERENT: dict[str, set[str]] = {
    "a trial is gone": {"missing"},
    "a study is gone": {"name"},
    "a number is missing": {"missing", "new"},  # nothing tells that it was another
    "a number is there twice": set(),
    "a trial without a number": set(),
    "an unknown state": {"state"},
    "finished without a time": {"datetime_complete"},
    "an unknown time": {"datetime_start"},
    "a study without directions": {"directions"},
    "an unknown direction": {"directions"},
    "COMPLETE without values": {"state", "values"},
    "too many values": set(),
    "a value that is no number": {"state", "values"},
    "a report that is nothing": {"intermediate_values"},
    "a choice that does not exist": {"params"},
    "an unknown distribution": {"params"},
    "a distribution of another kind": {"params"},
    "an attribute that is no JSON": {"user_attrs"},
    "a table is gone": {"state", "values"},
    "a column is gone": set(),
    "a constraint is gone, and a row is there twice": set(),
}
# What is still wrong afterwards, because nothing tells what is right.
_STAYS = {"number-gap", "distribution-incompatible", "column-missing"}


def _contents(url: str) -> Any:
    storage: Any = trialstore.get_storage(url)
    contents = storage_contents(storage, ids=False)
    storage.close()
    return contents


def _trials(contents: Any) -> dict[tuple[str, int], Any]:
    return {
        (name, trial["number"]): trial
        for name, study in contents.items()
        for trial in study["trials"]
    }


def _differences(before: Any, after: Any) -> set[str]:
    """Names of fields that differ; of attributes, reports and parameters none may be new."""
    found = set()
    for name, old in before.items():
        found |= {key for key in old if key != "trials" and old[key] != after[name][key]}
    old_trials, new_trials = _trials(before), _trials(after)
    found |= {"missing"} if old_trials.keys() - new_trials.keys() else set()
    found |= {"new"} if new_trials.keys() - old_trials.keys() else set()
    for key in old_trials.keys() & new_trials.keys():
        old, new = old_trials[key], new_trials[key]
        found |= {field for field in old if old[field] != new[field]}
        for field in ("user_attrs", "system_attrs", "intermediate_values"):
            assert new[field].items() <= old[field].items()
    return found


@pytest.mark.parametrize("name", JOURNAL_DAMAGES)
def test_a_journal(name: str, filled: Path, tmp_path: Path, cli: Cli) -> None:
    kind = JOURNAL_DAMAGES[name][1]
    before = _contents(str(filled / "a.journal"))
    path = tmp_path / "damaged.journal"
    damage_journal(name, filled / "a.journal", path)
    damaged = path.read_bytes()
    result = cli("repair", str(path), "--json")
    told = result.json
    assert path.read_bytes() == damaged
    assert result.code == (1 if told["given_up"] or told["still"] else 0)
    # Whole lines are left as they are, and so is a wrong field in one of them.
    assert told["done"] or told["given_up"] or {one["kind"] for one in told["still"]} == {kind}
    after = _contents(f"{path}.repaired")
    old, new = _trials(before), _trials(after)
    # Every trial is there, under its number, and at most one says less than before.
    assert new.keys() == old.keys()
    different = [key for key in new if new[key] != old[key]]
    if name in _NOTHING_LOST:
        assert after == before
    else:
        assert len(different) == (0 if name == "an unknown direction" else 1), different
    again = cli("repair", str(path))
    assert again.code == 2
    assert "exists already" in again.err


@pytest.mark.parametrize("name", SQLITE_DAMAGES)
def test_tables(name: str, filled: Path, tmp_path: Path, cli: Cli) -> None:
    kind = SQLITE_DAMAGES[name][1]
    url = damage_tables(name, filled / "a.db", tmp_path / "damaged.db")
    assert kind in {one["kind"] for one in cli.json("check", url, code=1)["findings"]}
    result = cli("repair", url, "--json")
    if name == "a version from the future":
        assert result.code == 4
        assert "trialstore upgrade" in result.json["error"]
        return
    told = result.json
    left = {"number-gap"} if name == "a trial is gone" else {kind} & _STAYS
    assert {finding["kind"] for finding in told["still"]} == left
    before, after = _contents(f"sqlite:///{filled}/a.db"), _contents(told["repaired"])
    expected = _DIFFERENT[name]
    if "name" in expected:
        after["colours"] = after.pop("lost-study-1")
    assert _differences(before, after) == expected - {"name"}
    assert result.code == (1 if told["given_up"] or told["still"] else 0)
    assert result.code == 1 or not expected


@pytest.mark.servers
@pytest.mark.parametrize("name", REDIS_DAMAGES)
def test_a_journal_in_redis(name: str, tmp_path: Path, cli: Cli) -> None:
    url = stores.new_url("redis", tmp_path)
    storage: Any = trialstore.get_storage(url)
    stores.fill(storage)
    before = _contents(url)
    storage.close()
    damage_redis(name, url)
    target = str(tmp_path / "repaired.journal")
    told = cli("repair", url, "--output", target, "--json").json
    assert told["still"] == []
    after = _contents(target)
    old, new = _trials(before), _trials(after)
    assert new.keys() == old.keys()
    different = [key for key in old if old[key] != new[key]]
    assert len(different) == (1 if name in ("a key is gone", "bytes of a record") else 0)
    assert bool(told["given_up"]) == bool(different)


def test_tables_without_the_trials_are_left_alone(filled: Path, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "damaged.db"
    shutil.copy(filled / "a.db", path)
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE trials")
    connection.close()
    before = path.read_bytes()
    assert cli("repair", f"sqlite:///{path}", "--in-place").code == 2
    assert path.read_bytes() == before
    assert cli("repair", f"sqlite:///{path}").code == 2
    assert not (tmp_path / "damaged.db.repaired").exists()


def test_a_sqlite_file_in_place_keeps_the_damaged_one(
    filled: Path, tmp_path: Path, cli: Cli
) -> None:
    path = tmp_path / "damaged.db"
    url = f"sqlite:///{path}"
    shutil.copy(filled / "a.db", path)
    # Held open: the newest transaction is beside the file.
    connection = sqlite3.connect(path)
    connection.executescript("PRAGMA journal_mode=WAL; UPDATE trials SET number=0 WHERE number=1")
    assert cli("repair", url, "--in-place").code == 0
    connection.close()
    assert _contents(url) == _contents(f"sqlite:///{filled}/a.db")
    kept = sqlite3.connect(f"{path}.damaged")
    assert kept.execute("SELECT count(*) FROM trials WHERE number = 1").fetchone() == (0,)
    kept.close()
    assert cli("repair", url, "--in-place").out == "Nothing to repair.\n"
    connection = sqlite3.connect(path)
    connection.executescript("UPDATE trials SET number=0 WHERE number=1")
    connection.close()
    again = cli("repair", url, "--in-place")
    assert again.code == 2
    assert "exists already" in again.err


def test_in_place_keeps_the_damaged_one(filled: Path, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "j"
    damage_journal("a newline is another byte", filled / "a.journal", path)
    damaged = path.read_bytes()
    assert cli("repair", str(path), "--in-place").code == 0
    assert (tmp_path / "j.damaged").read_bytes() == damaged
    assert cli("check", str(path)).code == 0
    assert _contents(str(path)) == _contents(str(filled / "a.journal"))


def _glued(filled: Path, path: Path) -> bytes:
    damage_journal("a newline is another byte", filled / "a.journal", path)
    return path.read_bytes()


def test_in_place_and_a_copy_are_not_asked_for_at_once(
    filled: Path, tmp_path: Path, cli: Cli
) -> None:
    path = tmp_path / "j"
    damaged = _glued(filled, path)
    refused = cli("repair", str(path), "--in-place", "-o", str(tmp_path / "copy"))
    assert (refused.code, path.read_bytes()) == (2, damaged)
    assert "--output" in refused.err
    assert list(tmp_path.iterdir()) == [path]


def test_in_place_there_is_a_journal_at_the_path_whatever_fails(
    filled: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j"
    damaged = _glued(filled, path)

    def fail(source: Path, target: Path) -> None:
        assert path.read_bytes() == damaged
        raise OSError(18, "Invalid cross-device link", str(source))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        assert cli("repair", str(path), "--in-place").code == 3
    assert path.read_bytes() == damaged
    assert list(tmp_path.iterdir()) == [path]
    # Neither an earlier copy nor a file system without links is in the way.
    assert cli("repair", str(path)).code == 0
    monkeypatch.setattr(os, "link", fail)
    assert cli("repair", str(path), "--in-place").code == 0
    assert (tmp_path / "j.damaged").read_bytes() == damaged
    assert path.read_bytes() == (tmp_path / "j.repaired").read_bytes()


@as_root
@pytest.mark.parametrize("mode", [0o600, 0o664])
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_who_may_open_the_damaged_store_may_open_what_is_made_of_it(
    kind: str, mode: int, filled: Path, tmp_path: Path, cli: Cli
) -> None:
    path = tmp_path / "damaged"
    url = str(path)
    if kind == "journal":
        _glued(filled, path)
    else:
        url = damage_tables("a number is there twice", filled / "a.db", path)
    os.chown(path, OWNER, GROUP)
    path.chmod(mode)
    assert cli("repair", url).code == 0
    assert cli("repair", url, "--in-place").code == 0
    made = [one for one in tmp_path.iterdir() if one.name.startswith(path.name)]
    assert {one.name for one in made} >= {"damaged", "damaged.damaged", "damaged.repaired"}
    for one in made:
        status = one.stat()
        assert (status.st_uid, status.st_gid) == (OWNER, GROUP), one
        assert status.st_mode & 0o7777 == mode, one


@as_root
def test_in_place_locks_no_group_out(
    filled: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j"
    damaged = _glued(filled, path)
    os.chown(path, OWNER, GROUP)
    path.chmod(0o660)
    may_not_chown(monkeypatch, is_of_group=False)
    refused = cli("repair", str(path), "--in-place")
    assert (refused.code, path.read_bytes()) == (3, damaged)
    assert "member of the group" in refused.err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("options", [[], ["--in-place"]])
@pytest.mark.parametrize("name", ["a.journal", "a.db"])
def test_of_a_whole_store_nothing_is_written(
    name: str, options: list[str], filled: Path, tmp_path: Path, cli: Cli
) -> None:
    path = tmp_path / name
    shutil.copy(filled / name, path)
    before = path.read_bytes(), path.stat().st_ino
    url = f"sqlite:///{path}" if name == "a.db" else str(path)
    assert cli.json("repair", url, *options)["repaired"] is None
    assert cli("repair", url, *options).out == "Nothing to repair.\n"
    assert (path.read_bytes(), path.stat().st_ino) == before
    assert not [one for one in tmp_path.iterdir() if "damaged" in one.name or "rep" in one.name]


def test_a_name_that_looks_like_markup_is_printed_as_it_is(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "j"
    storage: Any = trialstore.get_storage(str(path))
    study = optuna.create_study(study_name="s", storage=storage)
    study.ask({"[/evil]": FloatDistribution(0, 1)})
    storage.close()
    lines = path.read_bytes().splitlines(keepends=True)
    (param,) = (json.loads(line) for line in lines if b"evil" in line)
    unreadable = r.encode_dict({**param, "seq": param["seq"] + 1, "distribution": "{}"})
    path.write_bytes(b"".join([*lines, unreadable]))
    for command in ("check", "repair"):
        result = cli(command, str(path))
        assert (result.code, "[/evil]" in result.out) == (1, True), result


@pytest.mark.servers
def test_a_journal_in_redis_that_is_not_there_is_not_repaired(tmp_path: Path, cli: Cli) -> None:
    target = tmp_path / "repaired.journal"
    refused = cli("repair", stores.new_url("redis", tmp_path), "-o", str(target))
    assert (refused.code, target.exists()) == (3, False)
    assert "There is no" in refused.err


def test_records_in_an_attribute_of_a_damaged_one_are_not_taken_for_the_journals(
    tmp_path: Path, cli: Cli
) -> None:
    path = tmp_path / "j"
    storage: Any = trialstore.get_storage(str(path))
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
    trial_id = storage.create_new_trial(study_id)
    found = [{"op_code": 1, "worker_id": "w", "study_id": study_id}] * 2
    storage.set_trial_user_attr(trial_id, "found", found)
    storage.set_trial_user_attr(trial_id, "more", 1)
    storage.close()
    whole = path.read_bytes()
    for damage in (whole.replace(b'"found":', b'"found";'), whole.replace(b"}]}", b"}]]")):
        assert damage != whole
        path.write_bytes(damage)
        result = cli("check", str(path), "--json")
        assert [one["kind"] for one in result.json["findings"]] == ["record-damaged"]
        assert cli("repair", str(path)).code == 1
        (trial,) = _contents(f"{path}.repaired")["s"]["trials"]
        assert trial["user_attrs"] == {"more": 1}
        Path(f"{path}.repaired").unlink()


def _interleaved(path: Path) -> None:
    """Trials of which others are begun before they are told."""
    storage = trialstore.JournalStorage(trialstore.journal.JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name="s")
    running = []
    for number in range(30):
        running.append(study.ask())
        running[-1].suggest_float("x", 0.0, 1.0)
        running[-1].set_user_attr("n", number)
        if number > 2:
            study.tell(running.pop(number % 3), number)
    for trial in running:
        study.tell(trial, 0.5)
    storage.close()


def _trials_of(lines: list[bytes]) -> list[int]:
    """The trial that each line is about, or -1."""
    records = [r.decode_line(line) for line in lines]
    created = iter(range(len(records)))
    return [
        next(created) if isinstance(record, r.CreateTrial) else getattr(record, "trial_id", -1)
        for record in records
    ]


@pytest.mark.parametrize("n_bytes", [512, 2048])
@pytest.mark.parametrize("what", ["zeros", "garbage", "nothing"])
def test_a_block_of_a_journal_costs_what_was_in_it(
    what: str, n_bytes: int, tmp_path: Path, cli: Cli
) -> None:
    """And not all that was written behind it, whose ids are by the trials created before."""
    path = tmp_path / "j"
    _interleaved(path)
    before = _trials(_contents(str(path)))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    ends = list(itertools.accumulate(map(len, lines)))
    rng = random.Random(0)
    replacement = {"zeros": bytes(n_bytes), "garbage": rng.randbytes(n_bytes), "nothing": b""}
    for begin in range(2 * ends[0], len(whole) - 4 * n_bytes, 3001):
        end = begin + n_bytes
        path.write_bytes(whole[:begin] + replacement[what] + whole[end:])
        # What is cut out may leave what reads as one record, or as what a crash leaves.
        cut = path.read_bytes()[whole.rfind(b"\n", 0, begin) + 1 :].partition(b"\n")[0]
        loses = read_entry(Entry("", cut, ended=True)).loses
        assert cli("repair", str(path)).code == 1 or not loses
        after = _trials(_contents(f"{path}.repaired"))
        Path(f"{path}.repaired").unlink()
        assert after.keys() == before.keys()
        hit = {
            trial_id
            for trial_id, line, line_end in zip(_trials_of(lines), lines, ends, strict=True)
            if line_end > begin and line_end - len(line) < end
        }
        assert {number for _, number in before if before["s", number] != after["s", number]} <= hit


def test_records_that_are_gone_without_a_trace_are_stood_in_for(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "j"
    _interleaved(path)
    before = _trials(_contents(str(path)))
    lines = path.read_bytes().splitlines(keepends=True)
    created = [
        index for index, line in enumerate(lines) if isinstance(r.decode_line(line), r.CreateTrial)
    ]
    gone = slice(created[10] - 1, created[10] + 2)
    hit = set(_trials_of(lines)[gone])
    del lines[gone]
    path.write_bytes(b"".join(lines))

    result = cli("repair", str(path))

    assert result.code == 1
    assert "records before it are missing" in result.out
    after = _trials(_contents(f"{path}.repaired"))
    assert after.keys() == before.keys()
    assert {number for _, number in before if before["s", number] != after["s", number]} <= hit


def test_what_a_stand_in_does_not_say_is_told_as_lost(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "j"
    storage = trialstore.JournalStorage(trialstore.journal.JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name="s")
    study.enqueue_trial({"x": 0.5}, user_attrs={"who": "me"})
    study.ask()
    storage.close()
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"user_attrs":{', b'"user_attrs"}{')
    path.write_bytes(b"".join(lines))

    result = cli("repair", str(path))

    assert result.code == 1
    assert "put a stand-in" in result.out
    assert "What else it said is lost" in result.out
    assert list(_trials(_contents(f"{path}.repaired"))) == [("s", 0)]


def test_a_symlink_in_place_stays_one(filled: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "data").mkdir()
    path, link = tmp_path / "data" / "j", tmp_path / "link"
    link.symlink_to(path)
    damage_journal("a newline is another byte", filled / "a.journal", path)
    damaged = path.read_bytes()
    assert cli("repair", str(link), "--in-place").code == 0
    assert link.is_symlink()
    assert (tmp_path / "data" / "j.damaged").read_bytes() == damaged
    assert _contents(str(link)) == _contents(str(path)) == _contents(str(filled / "a.journal"))


@pytest.mark.servers
@pytest.mark.parametrize("kind", ["psycopg", "mariadb"])
def test_tables_on_a_server_in_place(kind: str, tmp_path: Path, cli: Cli) -> None:
    import sqlalchemy as sa

    url = stores.new_url(kind, tmp_path)
    storage: Any = trialstore.get_storage(url)
    stores.fill(storage)
    before = _contents(url)
    with storage.log.engine.begin() as connection:
        for statement in (
            "UPDATE trial_user_attributes SET value_json = '[1' WHERE key_column = 'note'",
            "UPDATE trials SET number = 1 WHERE number = 2",
            "UPDATE trial_params SET param_value = 17 WHERE param_name = 'colour'",
        ):
            key = '"key"' if kind == "psycopg" else "`key`"
            connection.execute(sa.text(statement.replace("key_column", key)))
    assert cli("repair", url).code == 2
    assert cli("check", url).code == 1
    told = cli.json("repair", url, "--in-place", code=1)
    assert len(told["given_up"]) == 2 and len(told["done"]) == 1
    assert cli("check", url, "--deep").code == 0
    assert _differences(before, _contents(url)) == {"user_attrs", "params"}
