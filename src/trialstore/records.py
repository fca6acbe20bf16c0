"""One immutable record per operation, or per image of a study or trial; to and from JSON.

A *record* is what a log keeps and a replica applies. There are two families:

* **operations** say what somebody asked for (``CreateTrial``, ``SetTrialParam`` …). Their field
  names and ``op_code`` are those of Optuna's journal, so one encoded operation is one line of a
  journal. ``worker_id`` and ``seq`` name the storage that issued it and its place in that
  storage's sequence; the pair never repeats.
* **images** say what is (``PutStudy``, ``PutTrial`` …). Rows read from tables, the contents of a
  snapshot and a delta over gRPC are images. They are never appended to a journal.

Times are ISO 8601 text as the journal has them: with ``+00:00`` (Optuna 5), or without an offset
and then local time (Optuna 4). :func:`format_time` and :func:`parse_time` convert from and to the
naive local ``datetime`` that ``FrozenTrial`` carries.

States are the integers of ``optuna.trial.TrialState``; directions those of ``StudyDirection``.

Source: docs/formats/journal.md.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
import contextlib
from datetime import datetime, timedelta, timezone
import enum
import json
import logging
import re
import sys
import time
from typing import Any, ClassVar, Final, get_args
import zlib

import msgspec
import optuna
from optuna.distributions import BaseDistribution

_logger = logging.getLogger("trialstore")

RUNNING: Final = 0
COMPLETE: Final = 1
PRUNED: Final = 2
FAIL: Final = 3
WAITING: Final = 4
FINISHED: Final = frozenset({COMPLETE, PRUNED, FAIL})


class ObjectText(str):
    """Text that stands for a distribution whose choices JSON can't hold.

    Only records that never leave this process carry one.
    """

    distribution: BaseDistribution

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_object_text, (str(self), self.distribution))


def _rebuild_object_text(text: str, distribution: BaseDistribution) -> ObjectText:
    rebuilt = ObjectText(text)
    rebuilt.distribution = distribution
    return rebuilt


# Without gc: nothing in a record refers to it, and decoding is a tenth faster.
class Operation(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="op_code", omit_defaults=True, gc=False
):
    """What every operation carries.

    Args:
        worker_id: Name of the issuing storage, or of a thread of a plain Optuna worker.
        seq: Place in the sequence of that storage; -1 in records of a plain Optuna worker.
    """

    worker_id: str
    seq: int = -1


class CreateStudy(Operation, frozen=True, tag=0):
    """``directions``: one integer of ``StudyDirection`` per objective."""

    study_name: str
    directions: list[int]


class DeleteStudy(Operation, frozen=True, tag=1):
    study_id: int


class SetStudyUserAttr(Operation, frozen=True, tag=2):
    """``user_attr``: exactly one key and its JSON value."""

    study_id: int
    user_attr: dict[str, Any]


class SetStudySystemAttr(Operation, frozen=True, tag=3):
    """``system_attr``: exactly one key and its JSON value."""

    study_id: int
    system_attr: dict[str, Any]


class CreateTrial(Operation, frozen=True, tag=4):
    """A new trial; everything after ``datetime_start`` comes from a template, if there is one.

    ``params`` holds internal representations, ``distributions`` Optuna's JSON of each; one
    objective goes into ``value``, several into ``values``, as Optuna writes them.
    """

    study_id: int
    datetime_start: str | None
    state: int = RUNNING
    value: float | None = None
    values: list[float] | None = None
    datetime_complete: str | None = None
    distributions: dict[str, str] = {}
    params: dict[str, float] = {}
    user_attrs: dict[str, Any] = {}
    system_attrs: dict[str, Any] = {}
    intermediate_values: dict[str, float] = {}


class SetTrialParam(Operation, frozen=True, tag=5):
    trial_id: int
    param_name: str
    param_value_internal: float
    distribution: str


class SetTrialStateValues(Operation, frozen=True, tag=6):
    """``state`` RUNNING claims a WAITING trial and carries ``datetime_start``; a finished state
    carries ``datetime_complete``. ``values``: one float per objective, or None to keep them."""

    trial_id: int
    state: int
    values: list[float] | None
    datetime_start: str | None = None
    datetime_complete: str | None = None


class SetTrialIntermediateValue(Operation, frozen=True, tag=7):
    trial_id: int
    step: int
    intermediate_value: float


class SetTrialUserAttr(Operation, frozen=True, tag=8):
    """``user_attr``: exactly one key and its JSON value."""

    trial_id: int
    user_attr: dict[str, Any]


class SetTrialSystemAttr(Operation, frozen=True, tag=9):
    """``system_attr``: exactly one key and its JSON value."""

    trial_id: int
    system_attr: dict[str, Any]


class Ignored(Operation, frozen=True, tag=10):
    """Op 10 of Rustuna (discard trials), which Optuna's reader ignores, and so do we.

    Args:
        left_out: If it stands for another operation that says nothing we can read: the reason.
            Not stored.
    """

    left_out: str = ""


class Image(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="op_code", omit_defaults=True, gc=False
):
    """A whole thing as it stands; applying it replaces what the replica held of it."""

    worker_id: ClassVar[str] = ""  # nobody's, so that a storage finds its own among all records


class PutStudy(Image, frozen=True, tag=100):
    """A study without its trials."""

    study_id: int
    study_name: str
    directions: list[int]
    user_attrs: dict[str, Any]
    system_attrs: dict[str, Any]


class PutTrial(Image, frozen=True, tag=101):
    """A trial of a study that the replica knows.

    Args:
        params: Name to internal representation, in the order of suggestion.
        distributions: Optuna's JSON of each parameter's distribution, in the order of ``params``.
        values: One float per objective, or None.
        owner: ``worker_id`` of the creator or claimer while RUNNING, where the log knows it.
    """

    trial_id: int
    study_id: int
    number: int
    state: int
    values: list[float] | None = None
    datetime_start: str | None = None
    datetime_complete: str | None = None
    params: dict[str, float] = {}
    distributions: list[str] = []
    user_attrs: dict[str, Any] = {}
    system_attrs: dict[str, Any] = {}
    intermediate_values: dict[int, float] = {}
    owner: str = ""


class PutParam(Image, frozen=True, tag=102):
    """The distribution that later uses of a parameter in a study must be compatible with."""

    study_id: int
    param_name: str
    distribution: str


def first_params(images: Iterable[PutTrial]) -> list[PutParam]:
    """What the trials of a study, by id, say of its parameters: the first one of each name."""
    first: dict[str, PutParam] = {}
    for image in images:
        for name, distribution in zip(image.params, image.distributions, strict=True):
            if name not in first:
                first[name] = PutParam(
                    study_id=image.study_id, param_name=name, distribution=distribution
                )
    return list(first.values())


class PutPositions(Image, frozen=True, tag=103):
    """What a sequential log's replica counts: ids are positions, those of deleted studies too.

    Args:
        next_study_id: Id of the next study to be created.
        runs: Pairs (study id, how many trials in a row were created in it), from trial id 0.
    """

    next_study_id: int
    runs: list[tuple[int, int]]


AnyOperation = (
    CreateStudy
    | DeleteStudy
    | SetStudyUserAttr
    | SetStudySystemAttr
    | CreateTrial
    | SetTrialParam
    | SetTrialStateValues
    | SetTrialIntermediateValue
    | SetTrialUserAttr
    | SetTrialSystemAttr
    | Ignored
)

Record = AnyOperation | PutStudy | PutTrial | PutParam | PutPositions

TrialWrite = (
    SetTrialParam
    | SetTrialStateValues
    | SetTrialIntermediateValue
    | SetTrialUserAttr
    | SetTrialSystemAttr
)

_NEEDED: Final = {
    kind: frozenset(
        {"worker_id", *(f.encode_name for f in msgspec.structs.fields(kind) if f.required)}
    )
    for kind in get_args(AnyOperation)
}
_KIND_OF_CODE: Final = {kind.__struct_config__.tag: kind for kind in _NEEDED}
_ON_ONE_FIELD: Final = (SetTrialParam, SetTrialIntermediateValue)
_NUMBERS: Final = ("value", "param_value_internal", "intermediate_value")

_DURABLE: Final = frozenset(
    {
        CreateStudy,
        DeleteStudy,
        SetStudyUserAttr,
        SetStudySystemAttr,
        CreateTrial,
        SetTrialStateValues,
    }
)


def must_be_durable(records: list[Operation]) -> bool:
    """Whether an exchange of these records has to be on stable storage before it returns.

    The trial is the unit of durability: its creation, its changes of state and everything about
    studies are durable when the call returns; what a RUNNING trial says of itself may be lost
    with the machine until then.
    """
    return any(type(record) in _DURABLE for record in records)


def owners_of_started(records: Sequence[Operation]) -> set[str]:
    """The ``worker_id`` of whoever creates a RUNNING trial or claims one."""
    return {
        record.worker_id
        for record in records
        if isinstance(record, CreateTrial | SetTrialStateValues) and record.state == RUNNING
    }


class Verdict(enum.IntEnum):
    """What became of an operation."""

    ACCEPTED = 0
    DUPLICATED_STUDY = 1
    NO_STUDY = 2
    NO_TRIAL = 3
    FINISHED = 4
    LOST = 5
    """The trial to be claimed is RUNNING already; somebody else has it."""
    INCOMPATIBLE = 6
    """The parameter has an incompatible distribution elsewhere in the study."""


class Outcome(msgspec.Struct, frozen=True):
    """The verdict on one operation; ``id`` is that of the study or trial created, else -1."""

    verdict: Verdict
    id: int = -1


ACCEPTED: Final = Outcome(Verdict.ACCEPTED)


# --- times ---------------------------------------------------------------------------------------

# Optuna 4 writes and reads local time without an offset and would return an aware datetime for
# one with it; Optuna 5 writes UTC. A mixed fleet needs one habit, so we follow the installed one.
STORES_UTC: Final = int(optuna.__version__.split(".")[0]) >= 5


def format_time(local: datetime) -> str:
    """Text for a naive local time (or an aware one), as the installed Optuna writes it."""
    if STORES_UTC:
        local = local.astimezone(timezone.utc)
    elif local.tzinfo is not None:
        local = local.astimezone().replace(tzinfo=None)
    return local.isoformat(timespec="microseconds")


def now_text() -> str:
    """The present, as the installed Optuna writes it."""
    if not STORES_UTC:
        return datetime.now().isoformat(timespec="microseconds")
    global _this_second
    second, fraction = divmod(time.time_ns(), 1_000_000_000)
    known = _this_second
    if known[0] != second:
        moment = datetime.fromtimestamp(second, timezone.utc)
        _this_second = known = (second, moment.isoformat()[:19])
    return f"{known[1]}.{fraction // 1000:06d}+00:00"


# A trial asks for the time twice, and most of a text's cost is in what lasts for a second.
_this_second: tuple[int, str] = (-1, "")


def parse_time(text: str) -> datetime:
    """Naive local time for a text of either kind. Raises ValueError if there is no such time."""
    try:
        if text[26:] == "+00:00":
            offset = _utc_offset(text[:13])
            if offset is not None:
                return datetime.fromisoformat(text[:26]) + offset
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo is None else _local(moment)
    except OverflowError as error:
        raise ValueError(f"{text} is no time here: {error}") from error


def _local(moment: datetime) -> datetime:
    """Naive local time; of one that happens twice, ``fold`` tells which it is."""
    local = moment.astimezone().replace(tzinfo=None)
    try:
        return local if local.astimezone(timezone.utc) == moment else local.replace(fold=1)
    except (ValueError, OverflowError):  # at the ends of the calendar
        return local


_HOURS_MAX: Final = 4096
_utc_offsets: dict[str, timedelta | None] = {}
_utc_offsets_zone = time.tzname


def _utc_offset(hour: str) -> timedelta | None:
    """What to add to any UTC time of this hour, say "2026-03-01T12"; None if that differs.

    Asking the C library for each time of 100,000 trials takes longer than all else about them.
    """
    global _utc_offsets_zone
    if time.tzname is not _utc_offsets_zone:  # time.tzset() was called
        _utc_offsets_zone = time.tzname
        _utc_offsets.clear()
    try:
        return _utc_offsets[hour]
    except KeyError:
        pass
    begin = datetime.fromisoformat(hour + ":00:00+00:00")
    ends = (begin, begin + timedelta(minutes=59, seconds=59))
    local = [_local(end) for end in ends]
    offsets = [at - end.replace(tzinfo=None) for at, end in zip(local, ends, strict=True)]
    # Of a time that happens twice, the fold must be told.
    same = offsets[0] == offsets[1] and not any(at.fold for at in local)
    if len(_utc_offsets) >= _HOURS_MAX:
        _utc_offsets.clear()
    _utc_offsets[hour] = offsets[0] if same else None
    return _utc_offsets[hour]


# --- journal lines -------------------------------------------------------------------------------

_RECORD_START: Final = b'{"op_code":'
RECORD_START: Final = re.compile(re.escape(_RECORD_START))
"""How every line begins, ours and Optuna's."""

_FOLLOWING: Final = re.compile(rb"[^ \0]")

_line_decoder: Final = msgspec.json.Decoder(AnyOperation)
_line_encoder: Final = msgspec.json.Encoder()

# The last field of our lines is a checksum of everything before its comma; Optuna's reader takes
# it for one more unknown field. A fixed width lets a reader find it without parsing the line.
_CHECKSUM_KEY: Final = b',"crc":"'
_CHECKSUM_LEN: Final = len(b',"crc":"00000000"}')
_CHECKSUM_FIELD: Final = re.compile(rb',"crc":"([0-9a-f]{8})"\}\n')


def to_journal_dict(record: Operation) -> dict[str, Any]:
    """The operation as the dictionary that Optuna's journal backends exchange."""
    fields: dict[str, Any] = msgspec.to_builtins(record)
    return fields


def from_journal_dict(fields: dict[str, Any]) -> AnyOperation:
    """The operation in a dictionary of a journal backend. Raises ValueError if it is none."""
    try:
        return _converted(fields)
    except msgspec.ValidationError as error:
        mended = _mended(fields)
        if mended is None:
            raise ValueError(str(error)) from error
        return mended


def _converted(fields: dict[str, Any]) -> AnyOperation:
    record: AnyOperation = msgspec.convert(fields, AnyOperation, strict=False, str_keys=True)
    return record


def _mended(fields: dict[str, Any]) -> AnyOperation | None:
    """An operation whose fields are all there, and of which some hold what Optuna stores although
    it is of another type: a bool for a number, a number for a name.

    A value that means nothing is left out, with a warning; where the operation is about it, the
    operation still counts for its place in the journal.
    """
    code = fields.get("op_code")
    kind = _KIND_OF_CODE.get(code) if isinstance(code, int) else None
    if kind is None or not fields.keys() >= _NEEDED[kind]:
        return None
    mended = {name: _mended_field(name, value) for name, value in fields.items()}
    try:
        return _converted(mended)
    except msgspec.ValidationError as error:
        said = [name for name in ("step", *_NUMBERS) if name in mended]
        if kind not in _ON_ONE_FIELD or not all(_is_number(mended[name]) for name in said):
            return None
        with contextlib.suppress(msgspec.ValidationError):
            # But for what it says, it is an operation.
            _converted({**mended, **dict.fromkeys(said, 0)})
            _logger.warning("A record can't be read and is left out (%s): %s.", error, fields)
            return Ignored(worker_id=mended["worker_id"], left_out=str(error))
        return None


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _mended_field(name: str, value: Any) -> Any:
    if name in ("study_name", "param_name"):
        return value if isinstance(value, str) else str(value)
    if name == "step" or name in _NUMBERS:
        return int(value) if isinstance(value, bool) else value
    if name == "values" and isinstance(value, list):
        return [float(one) if isinstance(one, bool) else one for one in value]
    if name == "intermediate_values" and isinstance(value, dict):
        for step, one in value.items():
            if not _is_float(one):
                _logger.warning("The value %r at step %s of a new trial is left out.", one, step)
        return {step: float(one) for step, one in value.items() if _is_float(one)}
    return value


def _is_float(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)


def encode_line(record: AnyOperation) -> bytes:
    """One journal line, checksum and newline included.

    NaN, infinities, lone surrogates and long integers are values that Optuna's reader takes, but
    only ``json`` writes them. ``msgspec`` refuses the latter two and makes null of the others, so
    a null sends the record the long way as well. (In a distribution's JSON a space precedes it.)
    """
    try:
        body = _line_encoder.encode(record)
        if b":null" in body or b",null" in body or b"[null" in body:
            body = _encode_by_json(record)
    except (UnicodeEncodeError, OverflowError):
        body = _encode_by_json(record)
    return _with_checksum(body)


def encode_dict(fields: dict[str, Any]) -> bytes:
    """As ``encode_line``, of a dictionary with whatever fields; a checksum in it is made anew."""
    fields = {name: value for name, value in fields.items() if name != "crc"}
    return _with_checksum(json.dumps(fields, separators=(",", ":")).encode())


def _encode_by_json(record: AnyOperation) -> bytes:
    return json.dumps(to_journal_dict(record), separators=(",", ":")).encode()


def _with_checksum(body: bytes) -> bytes:
    body = body[:-1]
    return b'%s%s%08x"}\n' % (body, _CHECKSUM_KEY, zlib.crc32(body))


def checksum_matches(line: bytes) -> bool | None:
    """Whether a line without its newline is what was written; None if it carries no checksum."""
    suffix = line[-_CHECKSUM_LEN:]
    if not suffix.startswith(_CHECKSUM_KEY):
        return None
    return suffix == b'%s%08x"}' % (_CHECKSUM_KEY, zlib.crc32(line[:-_CHECKSUM_LEN]))


def whole_records(fragment: bytes) -> Iterator[tuple[int, int, AnyOperation]]:
    """Every whole record in bytes of which others are torn: where it begins and ends, and itself.

    A record may hold others, in an attribute. Those are not records of the journal, and where the
    outer one is torn they are told by what follows them there.
    """
    text = fragment.decode("latin-1")  # keeps offsets, and JSON's structure is ASCII
    end = 0
    after_torn = False
    for start in RECORD_START.finditer(fragment):
        begin = start.start()
        if begin < end:
            continue
        try:
            _, end = json.JSONDecoder().raw_decode(text, begin)
        except (ValueError, RecursionError):
            after_torn = True
            continue
        try:
            record = decode_line(fragment[begin:end])
        except (ValueError, RecursionError):
            continue
        if not (after_torn and _what_follows(fragment, end) in (b",", b"]", b"}")):
            yield begin, end, record


def _what_follows(fragment: bytes, end: int) -> bytes:
    """The next byte behind what our own writes and a lost page leave, spaces and NULs."""
    found = _FOLLOWING.search(fragment, end)
    return found[0] if found is not None else b""


def counts_for_nothing(fragment: bytes) -> bool:
    """Whether bytes that no newline ends are what a crash leaves.

    A record without its newline was never acknowledged: it may be followed by nothing, or by the
    beginning of the next one. A whole record followed by anything else had a newline once, and
    that was damaged.
    """
    return all(
        _what_follows(fragment, end) in (b"", b"{") for _, end, _ in whole_records(fragment)
    )


def may_be_a_torn_record(fragment: bytes) -> bool:
    """Whether bytes without a newline can be what is left of records: the beginning of one is in
    them, or they begin with what a repair or a lost page leaves, spaces or NULs."""
    begin = fragment.rstrip(b" \0")
    is_blank = fragment[:1] in b" \0"
    return is_blank or _RECORD_START in begin or _RECORD_START.startswith(begin)


def checksums_match(lines: bytes, count: int) -> bool:
    """Whether each of ``count`` lines carries a checksum and it matches; False when in doubt."""
    # No bytecode and no tuple per line: this is half of what decoding a journal costs.
    parts = _CHECKSUM_FIELD.split(lines)  # body, checksum, body, checksum, … and nothing
    if len(parts) != 2 * count + 1 or parts[-1]:
        return False
    expected = array("I", bytes.fromhex(b"".join(parts[1::2]).decode()))
    if sys.byteorder == "little":
        expected.byteswap()
    return list(map(zlib.crc32, parts[:-1:2])) == expected.tolist()


def decode_line(line: bytes) -> AnyOperation:
    """The operation in one journal line. Raises ValueError if there is none."""
    try:
        record: AnyOperation = _line_decoder.decode(line)
        return record
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # NaN, Infinity and lone surrogates, which Optuna writes and msgspec refuses.
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError("a journal line must hold one JSON object") from None
        return from_journal_dict(fields)


def decode_lines(lines: bytes) -> list[AnyOperation]:
    """The operations in whole lines, in one call. Raises ValueError if any needs decode_line."""
    try:
        records: list[AnyOperation] = _line_decoder.decode_lines(lines)
        return records
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
