"""Whatever is in a journal: a snapshot changes nothing, and junk is refused or right."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given, settings, strategies as st

from journals import operations as journal_operations
from trialstore import snapshot
from trialstore.errors import SnapshotRefusedError
from trialstore.records import AnyOperation, decode_line, encode_line, from_journal_dict
from trialstore.replica import Replica


def _record(fields: dict[str, Any], number: int) -> AnyOperation:
    return from_journal_dict({"worker_id": "somebody", "seq": number, **copy.deepcopy(fields)})


def _contents(replica: Replica) -> list[str]:
    # repr, because NaN is not equal to itself; it shows every field and the order of parameters.
    return [
        *(repr(vars(study)) for study in replica.studies()),
        *(repr(replica.trials(study_id, None)) for study_id in replica.study_ids()),
        *(repr(image) for id_ in replica.study_ids() for image in replica.param_images(id_)),
        repr(replica.positions()),
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(journal_operations, max_size=40), st.integers(0, 40), st.booleans())
def test_a_snapshot_plus_the_later_records_is_the_full_replay(
    operations: list[dict[str, Any]], position: int, read_before: bool
) -> None:
    records = [_record(fields, number) for number, fields in enumerate(operations)]
    full, first = Replica(), Replica()
    for record in records:
        full.apply(record)
    for record in records[:position]:
        first.apply(record)
    if read_before:
        _contents(first)
    restored = snapshot.load(snapshot.dump(first, ("at", position), position)).replica
    for number, record in enumerate(records[position:], start=position):
        outcome = restored.apply(record)
        assert outcome == _outcome(records, number)
    assert _contents(restored) == _contents(full)


def _outcome(records: list[AnyOperation], number: int) -> Any:
    replica = Replica()
    for record in records[:number]:
        replica.apply(record)
    return replica.apply(records[number])


@settings(max_examples=200, deadline=None)
@given(st.lists(journal_operations, min_size=1, max_size=10), st.data())
def test_a_fuzzed_snapshot_is_refused_or_right(
    operations: list[dict[str, Any]], data: st.DataObject
) -> None:
    replica = Replica()
    for number, fields in enumerate(operations):
        replica.apply(_record(fields, number))
    fuzzed = bytearray(snapshot.dump(replica, None, len(operations)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(fuzzed) - 1))
        fuzzed[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        restored = snapshot.load(bytes(fuzzed)).replica
    except SnapshotRefusedError:
        return
    assert _contents(restored) == _contents(replica)


@settings(max_examples=300, deadline=None)
@given(journal_operations, st.data())
def test_a_fuzzed_line_is_a_value_error_or_a_record_that_replays(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    line = bytearray(encode_line(_record(fields, 0))[:-1])
    place = data.draw(st.integers(0, len(line) - 1))
    line[place : place + data.draw(st.integers(0, 6))] = data.draw(st.binary(max_size=6))
    try:
        record = decode_line(bytes(line))
    except ValueError:
        return
    replica = Replica()
    replica.apply(_record({"op_code": 0, "study_name": "s", "directions": [1]}, 1))
    replica.apply(_record({"op_code": 4, "study_id": 0, "datetime_start": None}, 2))
    replica.apply(record)
    for study_id in replica.study_ids():
        replica.trials(study_id, None)
