"""What is left of a journal's record: whole, whole behind a torn prefix, or damaged.

A record's place decides the ids of all that come after it, so of a damaged one the first question
is whether it created a study or a trial. That and what else can be read of it is in the result.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import msgspec

from trialstore import records as r
from trialstore.findings import Severity
from trialstore.log import Entry
from trialstore.records import AnyOperation

_FIELD: Final = rb'"%s": ?("(?:[^"\\]|\\.)*"|-?\d+|\[[-\d, ]*\]|null)'


class Salvaged(msgspec.Struct, frozen=True):
    """An entry as it was read.

    Args:
        entry: What was read.
        record: The operation; None if there is none, or if its bytes can't be trusted.
        kind: What is wrong with it, or "".
        message: The same in a sentence.
        severity: The same in a word.
        replacement: Of a damaged record that created something: what keeps the ids after it as
            they are.
        is_torn_tail: Nothing was acknowledged of it.
    """

    entry: Entry
    record: AnyOperation | None = None
    kind: str = ""
    message: str = ""
    severity: Severity = "error"
    replacement: AnyOperation | None = None
    is_torn_tail: bool = False


def read_entry(entry: Entry) -> Salvaged:
    """The record of an entry, or what is wrong with it."""
    if entry.data is None:
        message = "The record is missing: evicted, deleted, or its writer was killed."
        return Salvaged(entry, kind="record-missing", message=message)
    line = entry.data.lstrip(b" ")
    if not entry.ended:
        return _read_tail(entry, line)
    record, why = _read(line)
    if record is not None and not why:
        return Salvaged(entry, record)
    for start in r.RECORD_START.finditer(line, 1):
        glued, wrong = _read(line[start.start() :])
        if glued is not None and not wrong:
            if r.counts_for_nothing(line[: start.start()]):
                message = "A torn prefix before a whole record; nothing acknowledged is missing."
                return Salvaged(entry, glued, "glued-record", message, "note")
            message = "Damaged bytes, and a whole record behind them in the same line."
            return Salvaged(entry, glued, "record-damaged", message, replacement=_stand_in(line))
    if record is not None:
        return Salvaged(entry, None, "checksum", why, replacement=_trusted(record))
    return Salvaged(entry, None, "record-damaged", why, replacement=_stand_in(line))


def _read(line: bytes) -> tuple[AnyOperation | None, str]:
    """The operation in a line, and what is wrong with it."""
    try:
        record = r.decode_line(line)
    except (ValueError, RecursionError) as error:
        return None, f"There is no record: {error}."
    if r.checksum_matches(line) is False:
        return record, "The checksum does not match: some byte of the record was changed."
    return record, ""


def _read_tail(entry: Entry, line: bytes) -> Salvaged:
    if not line.strip(b" \0"):
        message = "Spaces or zeros after the last record; the next writer goes on behind them."
        return Salvaged(entry, None, "torn-tail", message, "note", is_torn_tail=True)
    if not r.counts_for_nothing(line):
        record, _ = _read(line[: line.rfind(b"}") + 1])
        message = "Damaged bytes behind the last newline, in a record that had one once."
        return Salvaged(entry, record, "record-damaged", message, replacement=_stand_in(line))
    message = "A record without its newline; it was acknowledged to nobody."
    return Salvaged(entry, None, "torn-tail", message, "note", is_torn_tail=True)


def _trusted(record: AnyOperation) -> AnyOperation | None:
    """Of a readable record with a wrong checksum: itself, where its place matters."""
    return record if isinstance(record, (r.CreateStudy, r.CreateTrial)) else None


def _stand_in(line: bytes) -> AnyOperation | None:
    """What a line that created something is replaced by, from the fields that can be read."""
    found = _field(line, b"worker_id")
    worker_id = found if isinstance(found, str) else "lost"
    op_code = _field(line, b"op_code")
    if op_code == 4:
        study_id = _field(line, b"study_id")
        start = _field(line, b"datetime_start")
        if isinstance(study_id, int):
            return r.CreateTrial(
                study_id=study_id,
                datetime_start=start if isinstance(start, str) else None,
                state=r.FAIL,
                worker_id=worker_id,
            )
    if op_code == 0:
        name, directions = _field(line, b"study_name"), _field(line, b"directions")
        if isinstance(name, str) and isinstance(directions, list):
            return r.CreateStudy(study_name=name, directions=directions, worker_id=worker_id)
    return None


def _field(line: bytes, name: bytes) -> Any:
    found = re.search(_FIELD % name, line)
    if found is None:
        return None
    try:
        return json.loads(found[1])
    except ValueError:
        return None
