"""Records, outcomes, wishes and cursors as bytes, and back.

The first byte says how: ``M`` for msgpack, ``J`` for JSON, which takes what msgpack refuses, lone
surrogates and integers beyond 64 bits. NaN and infinities are in both. Lists of records that were
packed alone can be joined without unpacking, so that what many clients read is packed once.

Source: docs/formats/grpc.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import hashlib
import json
import operator
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from trialstore.log import NOTHING, START, Cursor, Marks, Wanted
from trialstore.records import RUNNING, AnyOperation, Outcome, PutParam, PutTrial, Record

_T = TypeVar("_T")

_ARRAY: Final = b"M\xdd"  # msgpack's array with a length of 4 bytes, so that lengths can be added


def _plain(value: Any) -> str | int:
    """What numpy's text or integer, as a caller may have it of a name or an id, is equal to."""
    return str.__str__(value) if isinstance(value, str) else operator.index(value)


_encoder: Final = msgspec.msgpack.Encoder()
_wanted_encoder: Final = msgspec.msgpack.Encoder(enc_hook=_plain)
_operations_decoder: Final = msgspec.msgpack.Decoder(list[AnyOperation])
_records_decoder: Final = msgspec.msgpack.Decoder(list[Record])
_wanted_decoder: Final = msgspec.msgpack.Decoder(Wanted)
_marks_decoder: Final = msgspec.msgpack.Decoder(dict[str, Marks])
_outcomes_decoder: Final = msgspec.msgpack.Decoder(list[Outcome])


class Packed(NamedTuple):
    """Records, packed: how many, and either the msgpack of each, joined, or a JSON payload."""

    n_records: int
    joined: bytes
    json: bytes = b""

    @property
    def size(self) -> int:
        return len(self.joined) + len(self.json)


def pack(records: Sequence[Record]) -> list[Packed]:
    """Runs of records; JSON is for those alone that need it."""
    try:
        return [Packed(len(records), b"".join(map(_encoder.encode, records)))] if records else []
    except (UnicodeEncodeError, OverflowError):
        if len(records) == 1:
            return [Packed(1, b"", _json([records[0]]))]
        return [one for record in records for one in pack([record])]


def payloads(runs: Iterable[Packed], n_bytes_max: int) -> Iterable[bytes]:
    """Payloads for runs, neighbours joined up to a size; a larger record has one of its own."""
    count, size = 0, 0
    parts: list[bytes] = []
    for run in runs:
        if parts and (run.json or size + run.size > n_bytes_max):
            yield _ARRAY + count.to_bytes(4, "big") + b"".join(parts)
            count, parts, size = 0, [], 0
        if run.json:
            yield run.json
        elif run.n_records:
            count, size = count + run.n_records, size + run.size
            parts.append(run.joined)
    if parts:
        yield _ARRAY + count.to_bytes(4, "big") + b"".join(parts)


def digest(news: Iterable[Record], wanted: Wanted) -> bytes:
    """What a client says of the news that it has decided on; see ``log.proto``.

    Args:
        news: As they come out of payloads, on either side: unpacked, a whole number may have
            become a float.
        wanted: Names the trials of which everything counts, and parameters.
    """
    found = hashlib.sha256()
    for record in news:
        for run in pack(_decisive(record, wanted)):
            found.update(run.joined or run.json)
    return found.digest()


def _decisive(record: Record, wanted: Wanted) -> list[Record]:
    """What of a record can change a decision: what a RUNNING trial reports of itself counts as
    later, unless it is asked about."""
    if isinstance(record, PutParam):
        return [record] if (record.study_id, record.param_name) in wanted.params else []
    if (
        not isinstance(record, PutTrial)
        or record.state != RUNNING
        or record.trial_id in wanted.trials
        or (record.study_id, record.number) in wanted.numbers
    ):
        return [record]
    decisive = msgspec.structs.replace(
        record, params={}, distributions=[], user_attrs={}, intermediate_values={}
    )
    return [decisive]


def pack_records(records: Sequence[Record]) -> bytes:
    """All of them as one payload; empty for none."""
    if not records:
        return b""
    try:
        return b"M" + _encoder.encode(records)
    except (UnicodeEncodeError, OverflowError):
        return _json(records)


def unpack_operations(payload: bytes) -> list[AnyOperation]:
    """Raises ValueError if the bytes are no list of operations."""
    return _unpack(payload, _operations_decoder, list[AnyOperation]) if payload else []


def unpack_records(payload: bytes) -> list[Record]:
    """Raises ValueError if the bytes are no list of records."""
    return _unpack(payload, _records_decoder, list[Record]) if payload else []


def pack_wanted(wanted: Wanted) -> bytes:
    if wanted is NOTHING:
        return b""
    fields = {
        name: value
        for name in wanted.__struct_fields__
        if (value := getattr(wanted, name)) not in (False, frozenset())
    }
    try:
        return b"M" + _wanted_encoder.encode(fields)
    except (UnicodeEncodeError, OverflowError):
        return _json({k: v if v is True else list(v) for k, v in fields.items()})


def unpack_wanted(payload: bytes) -> Wanted:
    """Raises ValueError if the bytes are no ``Wanted``."""
    return _unpack(payload, _wanted_decoder, Wanted) if payload else NOTHING


def pack_outcomes(outcomes: Sequence[Outcome] | None) -> bytes:
    return b"" if outcomes is None else b"M" + _encoder.encode(outcomes)


def unpack_outcomes(payload: bytes) -> list[Outcome] | None:
    """Raises ValueError if the bytes are no outcomes."""
    return _unpack(payload, _outcomes_decoder, list[Outcome]) if payload else None


def pack_marks(marks: Mapping[str, Marks]) -> bytes:
    try:
        return b"M" + _encoder.encode(marks)
    except (UnicodeEncodeError, OverflowError):
        return _json(marks)


def unpack_marks(payload: bytes) -> dict[str, Marks]:
    """Raises ValueError if the bytes are no marks."""
    return _unpack(payload, _marks_decoder, dict[str, Marks]) if payload else {}


def pack_cursor(cursor: Cursor) -> bytes:
    return b"" if cursor is START else b"M" + _encoder.encode(cursor)


def unpack_cursor(payload: bytes) -> Cursor:
    """Sequences come back as tuples, whatever they were. Raises ValueError for no cursor."""
    if not payload:
        return START
    try:
        if payload[:1] != b"M":
            raise ValueError("it does not begin with M")
        return _hashable(msgspec.msgpack.decode(payload[1:]))
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"These bytes are no cursor: {error}.") from error


def _hashable(cursor: Any) -> Cursor:
    if isinstance(cursor, list):
        return tuple(_hashable(part) for part in cursor)
    return cursor


def _json(value: Any) -> bytes:
    return b"J" + json.dumps(msgspec.to_builtins(value, str_keys=True)).encode()


def _unpack(payload: bytes, decoder: msgspec.msgpack.Decoder[_T], kind: Any) -> _T:
    how = payload[:1]
    try:
        if how == b"M":
            return decoder.decode(memoryview(payload)[1:])
        if how == b"J":
            loaded = json.loads(payload[1:])
            converted: _T = msgspec.convert(loaded, kind, strict=False, str_keys=True)
            return converted
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"The payload can't be read: {error}.") from error
    raise ValueError(f"The payload begins with {how!r}, which says nothing about how to read it.")
