"""Ways to damage a store, and what ``check`` has to call each of them.

A damage of a journal edits the list of its lines, one of SQLite's tables is a script, one of a
journal in Redis a function on the client. All of them are done to the store of ``stores.fill``.
"""

from __future__ import annotations

from collections.abc import Callable
import json
from pathlib import Path
import shutil
import sqlite3
from typing import Any
from urllib.parse import parse_qs, urlsplit

Lines = list[bytes]


def damage_journal(name: str, source: Path, target: Path) -> tuple[Lines, Lines]:
    """Write the damaged lines of one journal to another; returns them as they were and are."""
    before = source.read_bytes().splitlines(keepends=True)
    after = JOURNAL_DAMAGES[name][0](before)
    target.write_bytes(b"".join(after))
    return before, after


def damage_tables(name: str, source: Path, target: Path) -> str:
    """Damage a copy of a SQLite file; returns its URL."""
    shutil.copy(source, target)
    connection = sqlite3.connect(target)
    connection.executescript(SQLITE_DAMAGES[name][0])
    connection.close()
    return f"sqlite:///{target}"


def damage_redis(name: str, url: str) -> None:
    """Damage a journal in Redis where it is."""
    import redis

    prefix = parse_qs(urlsplit(url).query)["prefix"][0]
    with redis.Redis.from_url(url.partition("?")[0]) as client:
        REDIS_DAMAGES[name][0](client, prefix)


def _index(lines: Lines, op_code: int, which: int = -1) -> int:
    """Where the first, or another, record of a kind is."""
    found = [i for i, line in enumerate(lines) if json.loads(line)["op_code"] == op_code]
    return found[which]


def _change(of: int, **fields: Any) -> Callable[[Lines], Lines]:
    """A record as somebody else may have written it: no checksum, other fields."""

    def damage(lines: Lines) -> Lines:
        i = _index(lines, of)
        record = {**json.loads(lines[i]), **fields}
        record.pop("crc")
        return [*lines[:i], json.dumps(record).encode() + b"\n", *lines[i + 1 :]]

    return damage


def _flip_a_digit(lines: Lines) -> Lines:
    i = _index(lines, 5)
    begin = lines[i].index(b'"param_value_internal":') + len(b'"param_value_internal":')
    line = bytearray(lines[i])
    place = next(k for k in range(begin, len(line)) if chr(line[k]) in "012345678")
    line[place] += 1
    return [*lines[:i], bytes(line), *lines[i + 1 :]]


def _without_end(lines: Lines) -> Lines:
    i = _index(lines, 8)
    return [*lines[:i], lines[i][: len(lines[i]) // 2] + b"\n", *lines[i + 1 :]]


def _zeros(lines: Lines) -> Lines:
    i = _index(lines, 7)
    return [*lines[:i], bytes(len(lines[i]) - 1) + b"\n", *lines[i + 1 :]]


def _foreign(lines: Lines) -> Lines:
    return [*lines[:5], b"Traceback (most recent call last):\n", *lines[5:]]


def _twice(lines: Lines) -> Lines:
    i = _index(lines, 7)
    return [*lines[: i + 1], lines[i], *lines[i + 1 :]]


def _glued(lines: Lines) -> Lines:
    i = _index(lines, 7)
    return [*lines[:i], lines[i][:20] + lines[i], *lines[i + 1 :]]


def _two_in_a_line(lines: Lines) -> Lines:
    i = _index(lines, 7)
    return [*lines[:i], lines[i][:-1] + b"#" + lines[i + 1], *lines[i + 2 :]]


def _without_a_trial(lines: Lines) -> Lines:
    i = _index(lines, 4)
    return [*lines[:i], *lines[i + 1 :]]


JOURNAL_DAMAGES: dict[str, tuple[Callable[[Lines], Lines], str]] = {
    "a digit of a value": (_flip_a_digit, "checksum"),
    "half a record": (_without_end, "record-damaged"),
    "a page of zeros": (_zeros, "record-damaged"),
    "a line of another program": (_foreign, "record-damaged"),
    "the file ends in a record": (lambda lines: [*lines, lines[-1][:30]], "torn-tail"),
    "the last newline is another byte": (
        lambda lines: [*lines[:-1], lines[-1][:-1] + b"\r"],
        "record-damaged",
    ),
    "a record glued on a torn one": (_glued, "glued-record"),
    "a newline is another byte": (_two_in_a_line, "record-damaged"),
    "a record twice": (_twice, "record-double"),
    "the creation of a trial is gone": (_without_a_trial, "trial-unknown"),
    "an unknown operation": (_change(7, op_code=42), "record-damaged"),
    "a field of another type": (_change(7, step="three"), "record-damaged"),
    "a study that never was": (_change(4, study_id=99), "study-unknown"),
    "a trial that never was": (_change(8, trial_id=999), "trial-unknown"),
    "too many values": (_change(6, values=[1.0, 2.0, 3.0]), "values-many"),
    "half a step": (_change(7, step=0.5), "value-unreadable"),
    "a value that is no number": (_change(6, values=[float("nan"), 1.0]), "value-unreadable"),
    "COMPLETE without values": (_change(6, values=None), "values-missing"),
    "an unknown state": (_change(6, state=9), "state-unknown"),
    "an unknown time": (_change(6, datetime_complete="yesterday"), "time-unreadable"),
    "an unknown distribution": (_change(5, distribution="{}"), "distribution-unreadable"),
    "an unknown direction": (_change(0, directions=[7]), "direction-unknown"),
}

_A_TRIAL = "(SELECT min(trial_id) FROM trials WHERE state = 'COMPLETE')"

SQLITE_DAMAGES: dict[str, tuple[str, str]] = {
    "a trial is gone": (f"DELETE FROM trials WHERE trial_id = {_A_TRIAL} + 1", "orphan"),
    "a study is gone": ("DELETE FROM studies WHERE study_id = 1", "orphan"),
    "a number is missing": (
        "UPDATE trials SET number = 99 WHERE trial_id = (SELECT max(trial_id) FROM trials)",
        "number-gap",
    ),
    "a number is there twice": ("UPDATE trials SET number = 0 WHERE number = 1", "number-double"),
    "a trial without a number": (
        "UPDATE trials SET number = NULL WHERE number = 2",
        "number-missing",
    ),
    "an unknown state": (
        f"UPDATE trials SET state = 'LOST' WHERE trial_id = {_A_TRIAL}",
        "state-unknown",
    ),
    "finished without a time": (
        f"UPDATE trials SET datetime_complete = NULL WHERE trial_id = {_A_TRIAL}",
        "completion-time",
    ),
    "an unknown time": (
        f"UPDATE trials SET datetime_start = 'yesterday' WHERE trial_id = {_A_TRIAL}",
        "time-unreadable",
    ),
    "a study without directions": ("DELETE FROM study_directions", "directions-missing"),
    "an unknown direction": (
        "UPDATE study_directions SET direction = 'SIDEWAYS'",
        "direction-unknown",
    ),
    "COMPLETE without values": (
        f"DELETE FROM trial_values WHERE trial_id = {_A_TRIAL}",
        "values-missing",
    ),
    "too many values": (
        "INSERT INTO trial_values (trial_id, objective, value, value_type) "
        f"VALUES ({_A_TRIAL}, 1, 2.0, 'FINITE')",
        "values-many",
    ),
    "a value that is no number": (
        f"UPDATE trial_values SET value = 'NaN' WHERE trial_id = {_A_TRIAL}",
        "value-unreadable",
    ),
    "a report that is nothing": (
        "UPDATE trial_intermediate_values SET intermediate_value = NULL "
        "WHERE intermediate_value_type = 'FINITE'",
        "value-unreadable",
    ),
    "a choice that does not exist": (
        "UPDATE trial_params SET param_value = 17 WHERE param_name = 'colour'",
        "param-value",
    ),
    "an unknown distribution": (
        "UPDATE trial_params SET distribution_json = '{' WHERE param_name = 'x'",
        "distribution-unreadable",
    ),
    "a distribution of another kind": (
        "UPDATE trial_params SET distribution_json = (SELECT distribution_json FROM trial_params "
        f"WHERE param_name = 'n') WHERE param_name = 'x' AND trial_id = {_A_TRIAL} + 1",
        "distribution-incompatible",
    ),
    "an attribute that is no JSON": (
        "UPDATE trial_user_attributes SET value_json = '[1, 2' WHERE key = 'note'",
        "attribute-unreadable",
    ),
    "a version from the future": (
        "UPDATE alembic_version SET version_num = 'v9.0.0.a'",
        "schema-version",
    ),
    "a table is gone": ("DROP TABLE trial_values", "table-missing"),
    "a column is gone": (
        "ALTER TABLE trial_heartbeats RENAME COLUMN heartbeat TO pulse",
        "column-missing",
    ),
    "a constraint is gone, and a row is there twice": (
        "CREATE TABLE p AS SELECT * FROM trial_params; DROP TABLE trial_params; "
        "ALTER TABLE p RENAME TO trial_params; "
        "INSERT INTO trial_params SELECT * FROM trial_params WHERE param_name = 'x'",
        "row-double",
    ),
}


def _damage_record(client: Any, prefix: str) -> None:
    client.setrange(f"{prefix}:log:7", 5, "###")


REDIS_DAMAGES: dict[str, tuple[Callable[[Any, str], Any], str]] = {
    "a key is gone": (lambda client, prefix: client.delete(f"{prefix}:log:9"), "record-missing"),
    "bytes of a record": (_damage_record, "record-damaged"),
    "the counter fell behind": (
        lambda client, prefix: client.decrby(f"{prefix}:log_number", 3),
        "counter-behind",
    ),
    "a snapshot of nothing": (
        lambda client, prefix: client.set(f"{prefix}:trialstore:snapshot", b"\xff nothing"),
        "snapshot-unusable",
    ),
}
