"""Any record comes back from its line equal, for us and for whoever reads it by ``json``."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import assume, given, strategies as st

from trialstore.records import (
    AnyOperation,
    CreateTrial,
    SetTrialIntermediateValue,
    SetTrialParam,
    SetTrialStateValues,
    SetTrialUserAttr,
    checksum_matches,
    counts_for_nothing,
    decode_line,
    encode_line,
    to_journal_dict,
)

_floats = st.floats()
_texts = st.text(st.characters(exclude_categories=()), max_size=8)  # lone surrogates and NUL too
_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**80), 2**80), _floats, _texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(_texts, inner, max_size=3)
    ),
    max_leaves=8,
)
_marks: dict[str, Any] = {"worker_id": st.just("w"), "seq": st.integers(0, 2**60)}
_records = st.one_of(
    st.builds(
        SetTrialParam,
        trial_id=st.integers(0, 9),
        param_name=_texts,
        param_value_internal=_floats,
        distribution=st.just('{"name": "FloatDistribution", "attributes": {"step": null}}'),
        **_marks,
    ),
    st.builds(
        SetTrialIntermediateValue,
        trial_id=st.integers(0, 9),
        step=st.integers(-(2**63), 2**63 - 1),
        intermediate_value=_floats,
        **_marks,
    ),
    st.builds(
        SetTrialStateValues,
        trial_id=st.integers(0, 9),
        state=st.integers(0, 4),
        values=st.none() | st.lists(_floats, max_size=2),
        **_marks,
    ),
    st.builds(
        SetTrialUserAttr,
        trial_id=st.integers(0, 9),
        user_attr=st.dictionaries(_texts, _values, min_size=1, max_size=1),
        **_marks,
    ),
    st.builds(
        CreateTrial,
        study_id=st.integers(0, 9),
        datetime_start=st.none() | st.just("2026-03-01T12:00:00.000001+00:00"),
        user_attrs=st.dictionaries(_texts, _values, max_size=2),
        intermediate_values=st.dictionaries(st.sampled_from(["0", "-1"]), _floats),
        **_marks,
    ),
)

_with_records_inside = st.builds(
    SetTrialUserAttr,
    trial_id=st.integers(0, 9),
    user_attr=st.fixed_dictionaries({"k": st.lists(_records.map(to_journal_dict), max_size=2)}),
    **_marks,
)


@given(_records)
def test_a_record_comes_back_from_its_line(record: AnyOperation) -> None:
    line = encode_line(record)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert checksum_matches(line[:-1]) is True
    # repr, because NaN is not equal to itself and -0.0 is equal to 0.0.
    assert repr(decode_line(line[:-1])) == repr(record)
    fields = json.loads(line)
    del fields["crc"]
    assert repr(sorted(fields.items())) == repr(sorted(to_journal_dict(record).items()))


@given(_records, st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_is_noticed(record: AnyOperation, position: int, flip: int) -> None:
    line = bytearray(encode_line(record)[:-1])
    line[position % len(line)] ^= flip
    assert checksum_matches(bytes(line)) is not True


@given(_records | _with_records_inside, st.integers(0, 10**6))
def test_a_record_cut_anywhere_counts_for_nothing(record: AnyOperation, position: int) -> None:
    line = encode_line(record)[:-1]
    assert counts_for_nothing(line[: position % (len(line) + 1)])


@given(_records | _with_records_inside, _records, st.integers(0, 255))
def test_a_record_that_lost_its_newline_to_another_byte_counts(
    record: AnyOperation, following: AnyOperation, other: int
) -> None:
    assume(other not in b"\n{ \0")
    damaged = encode_line(record)[:-1] + bytes([other])
    assert not counts_for_nothing(damaged)
    assert not counts_for_nothing(damaged + encode_line(following)[:-1])
