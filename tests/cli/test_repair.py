"""``repair`` brings back whatever was not destroyed, and leaves the damaged store alone."""

from __future__ import annotations

from pathlib import Path
import shutil
import sqlite3
from typing import Any

import pytest

from damages import JOURNAL_DAMAGES, SQLITE_DAMAGES
import stores
from stores import Cli
import trialstore
from trialstore.testing.contents import storage_contents

# What no repair can know.
_LOST_FOR_GOOD = {
    "the creation of a trial is gone",  # not even a gap tells where
    "a study that never was",  # nor was the trial in it
    "a study without directions",
    "a version from the future",
    "a table is gone",
    "a column is gone",
    "a constraint is gone, and a row is there twice",  # the rows are mended, the tables stay
    "an unknown direction",
    "a number is missing",
    "a distribution of another kind",
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    for url in (f"{folder}/a.journal", f"sqlite:///{folder}/a.db"):
        storage: Any = trialstore.get_storage(url)
        stores.fill(storage)
        storage.close()
    return folder


def _trials(url: str) -> dict[tuple[str, int], Any]:
    contents = storage_contents(trialstore.get_storage(url), ids=False)
    return {
        (name, trial["number"]): trial
        for name, study in contents.items()
        for trial in study["trials"]
    }


@pytest.mark.parametrize("name", JOURNAL_DAMAGES)
def test_a_journal(name: str, filled: Path, tmp_path: Path, cli: Cli) -> None:
    damage, _ = JOURNAL_DAMAGES[name]
    before = _trials(str(filled / "a.journal"))
    lines = (filled / "a.journal").read_bytes().splitlines(keepends=True)
    path = tmp_path / "damaged.journal"
    path.write_bytes(b"".join(damage(lines)))
    damaged = path.read_bytes()
    result = cli("repair", str(path))
    assert result.code in (0, 1)
    assert path.read_bytes() == damaged
    after = _trials(f"{path}.repaired")
    if name in _LOST_FOR_GOOD:
        return
    # Every trial is there, under its number, and at most one says less than before.
    assert after.keys() == before.keys()
    different = [key for key in before if after[key] != before[key]]
    assert len(different) <= 1, different
    again = cli("repair", str(path))
    assert again.code == 2
    assert "exists already" in again.err


@pytest.mark.parametrize("name", SQLITE_DAMAGES)
def test_tables(name: str, filled: Path, tmp_path: Path, cli: Cli) -> None:
    script, kind = SQLITE_DAMAGES[name]
    path = tmp_path / "damaged.db"
    shutil.copy(filled / "a.db", path)
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()
    if name in _LOST_FOR_GOOD:
        return
    told = cli("repair", f"sqlite:///{path}", "--json")
    repaired = told.json["repaired"]
    left = {finding["kind"] for finding in told.json["still"]}
    assert kind not in left
    before, after = _trials(f"sqlite:///{filled}/a.db"), _trials(repaired)
    if name != "a study is gone":
        assert len(before.keys() - after.keys()) <= 1
    assert kind in {
        finding["kind"] for finding in cli.json("check", f"sqlite:///{path}", code=1)["findings"]
    }


def test_in_place_keeps_the_damaged_one(filled: Path, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "j"
    damage, _ = JOURNAL_DAMAGES["a newline is another byte"]
    lines = (filled / "a.journal").read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(damage(lines)))
    damaged = path.read_bytes()
    assert cli("repair", str(path), "--in-place").code == 0
    assert (tmp_path / "j.damaged").read_bytes() == damaged
    assert cli("check", str(path)).code == 0
    assert _trials(str(path)) == _trials(str(filled / "a.journal"))


@pytest.mark.servers
@pytest.mark.parametrize("kind", ["psycopg", "mariadb"])
def test_tables_on_a_server_in_place(kind: str, tmp_path: Path, cli: Cli) -> None:
    import sqlalchemy as sa

    url = stores.new_url(kind, tmp_path)
    storage: Any = trialstore.get_storage(url)
    stores.fill(storage)
    before = _trials(url)
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
    assert cli("repair", url, "--in-place").code == 0
    assert cli("check", url, "--deep").code == 0
    assert _trials(url).keys() == before.keys()
