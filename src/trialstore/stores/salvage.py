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
        record: The operation; None if there is none that readers may take.
        kind: What is wrong with it, or "".
        message: The same in a sentence.
        severity: The same in a word.
        kept: What a repair writes in its place: the record; of a damaged line the whole records
            that are in it; of one that created something a stand-in, so that later ids stay.
        stands_in: What is kept is such a stand-in, and first of what was there.
        loses: More was there than what is kept says.
    """

    entry: Entry
    record: AnyOperation | None = None
    kind: str = ""
    message: str = ""
    severity: Severity = "error"
    kept: tuple[AnyOperation, ...] = ()
    stands_in: bool = False
    loses: bool = False


def read_entry(entry: Entry) -> Salvaged:
    """The record of an entry, or what is wrong with it."""
    if entry.data is None:
        message = "The record is missing: evicted, deleted, or its writer was killed."
        return Salvaged(entry, kind="record-missing", message=message, loses=True)
    line = entry.data.lstrip(b" ")
    record, why = _read(line)
    if not entry.ended:
        return _read_tail(entry, line)
    if record is not None and not why:
        return Salvaged(entry, record, kept=(record,))
    glued = _glued(line)
    if glued is not None:
        message = "A torn prefix before a whole record; nothing acknowledged is missing."
        return Salvaged(entry, glued, "glued-record", message, "note", (glued,))
    if record is not None:
        # Where only its place matters, a record whose bytes can't be trusted is better than none.
        kept = (record,) if isinstance(record, _CREATIONS) else ()
        return Salvaged(entry, None, "checksum", why, kept=kept, loses=True)
    return _damaged(entry, line, why)


def _glued(line: bytes) -> AnyOperation | None:
    """The whole record at the end of a line that begins with a torn one."""
    for begin, end, record in _whole_records(line)[-1:]:
        if not line[end:].strip(b" ") and r.counts_for_nothing(line[:begin]):
            return record
    return None


def _damaged(entry: Entry, line: bytes, why: str) -> Salvaged:
    whole = _whole_records(line)
    if whole:
        why = f"{why} {len(whole)} whole records are in it."
        kept = tuple(record for *_, record in whole)
        # A byte behind each was its newline.
        n_others = len(line.strip(b" ")) - sum(end - begin for begin, end, _ in whole)
        loses = n_others > len(whole)
        return Salvaged(entry, None, "record-damaged", why, kept=kept, loses=loses)
    stand_in = _stand_in(line)
    kept = () if stand_in is None else (stand_in,)
    return Salvaged(
        entry, None, "record-damaged", why, kept=kept, stands_in=bool(kept), loses=True
    )


def _read(line: bytes) -> tuple[AnyOperation | None, str]:
    """The operation in a line, and what is wrong with it."""
    try:
        record = r.decode_line(line)
    except (ValueError, RecursionError) as error:
        return None, f"There is no record: {error}."
    if r.checksum_matches(line) is False:
        return record, "The checksum does not match: some byte of the record was changed."
    return record, ""


def _whole_records(line: bytes) -> list[tuple[int, int, AnyOperation]]:
    """Every undamaged record somewhere in a damaged line, and where it begins and ends."""
    return [
        found
        for found in r.whole_records(line)
        if r.checksum_matches(line[found[0] : found[1]]) is not False
    ]


def _read_tail(entry: Entry, line: bytes) -> Salvaged:
    if r.counts_for_nothing(line):
        message = "Bytes behind the last newline; they were acknowledged to nobody."
        return Salvaged(entry, None, "torn-tail", message, "note")
    return _damaged(entry, line, "Behind the last newline, a record that had one once.")


_CREATIONS: Final = (r.CreateStudy, r.CreateTrial)


def _stand_in(line: bytes) -> AnyOperation | None:
    """What a line that created something is replaced by, from the fields that can be read."""
    found = _field(line, b"worker_id")
    worker_id = found if isinstance(found, str) else "lost"
    op_code = _field(line, b"op_code")
    if op_code == 4:
        study_id = _field(line, b"study_id")
        start = _field(line, b"datetime_start")
        if isinstance(study_id, int):
            return lost_trial(study_id, start if isinstance(start, str) else None, worker_id)
    if op_code == 0:
        name, directions = _field(line, b"study_name"), _field(line, b"directions")
        if isinstance(name, str) and isinstance(directions, list):
            return r.CreateStudy(study_name=name, directions=directions, worker_id=worker_id)
    return None


def lost_trial(study_id: int, start: str | None = None, worker_id: str = "lost") -> r.CreateTrial:
    """What stands for a trial of which nothing else is known; the records after it fill it."""
    return r.CreateTrial(study_id=study_id, datetime_start=start, worker_id=worker_id)


def _field(line: bytes, name: bytes) -> Any:
    found = re.search(_FIELD % name, line)
    if found is None:
        return None
    try:
        return json.loads(found[1])
    except ValueError:
        return None
