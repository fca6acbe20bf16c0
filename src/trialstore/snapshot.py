"""A replica as versioned bytes, and back, never a pickle; and when to save them.

Layout, after the magic (first byte 0xFF, which no pickle and no UTF-8 text begins with)::

    magic  8 bytes   FF 't' 's' 's' 'n' 'a' 'p' version
    header length    4 bytes, big endian
    header checksum  4 bytes, CRC-32 of the header
    header           positions, cursor, and for each study its image and where its sections lie
    sections         some trials of one study, with what is needed to read them alone

Everything is msgpack; a header or section that holds what msgpack can't (lone surrogates, integers
beyond 64 bits) is JSON instead, told apart by its first byte.

Source: docs/formats/snapshot.md.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
import gc
import itertools
import json
import logging
import threading
from typing import Any, Final, NamedTuple, Protocol, TypeVar, cast
import zlib

import msgspec

from trialstore.errors import SnapshotRefusedError
from trialstore.log import NOTHING, START, Compacted, Cursor, Log, Marks, SnapshotStore, copier
from trialstore.records import PutParam, PutPositions, PutStudy, PutTrial, Record
from trialstore.replica import Replica, Still

_logger = logging.getLogger("trialstore")

_MANY_RECORDS: Final = 500  # below this the collector's passes cost nothing

_MAGIC: Final = b"\xfftssnap\x01"
_PREFIX_LEN: Final = len(_MAGIC) + 8

# What a section is decoded into is freed only when all of it has been applied: in larger ones,
# that stays in the process's memory between the trials.
_SECTION_TRIALS: Final = 1000

_T = TypeVar("_T")


class _Place(msgspec.Struct, frozen=True, array_like=True):
    offset: int
    length: int
    checksum: int


class _StudyInfo(msgspec.Struct, frozen=True, array_like=True):
    study: PutStudy
    sections: list[_Place]


class _Header(msgspec.Struct, frozen=True, array_like=True):
    n_records: int
    cursor: Any
    positions: PutPositions
    studies: list[_StudyInfo]


class _TrialRow(msgspec.Struct, frozen=True, array_like=True):
    """A ``PutTrial`` with its distributions as indexes into those of the section."""

    trial_id: int
    number: int
    state: int
    values: list[float] | None
    datetime_start: str | None
    datetime_complete: str | None
    params: dict[str, float]
    distributions: list[int]
    user_attrs: dict[str, Any]
    system_attrs: dict[str, Any]
    intermediate_values: dict[int, float]
    owner: str


class _Section(msgspec.Struct, frozen=True, array_like=True):
    """Trials of a study, by id; ``params`` are those of the study, in its first section."""

    distributions: list[str]
    params: list[PutParam]
    trials: list[_TrialRow]


_header_decoder: Final = msgspec.msgpack.Decoder(_Header)
_section_decoder: Final = msgspec.msgpack.Decoder(_Section)


class Restored(NamedTuple):
    """A replica, where it stands, and how many records a replay up to there would take."""

    replica: Replica
    cursor: Cursor
    n_records: int


def dump(replica: Replica, cursor: Cursor, n_records: int) -> bytes:
    """The contents of a complete replica that stands at ``cursor``, after ``n_records``."""
    return dump_still(replica.still(), cursor, n_records)


def dump_still(still: Still, cursor: Cursor, n_records: int) -> bytes:
    """As ``dump``, while the replica may already be elsewhere."""
    infos: list[_StudyInfo] = []
    bodies: list[bytes] = []
    offset = 0
    for study, params, trials in still.studies:
        places: list[_Place] = []
        for section in _sections(params, trials):
            body = pack(section)
            places.append(_Place(offset, len(body), zlib.crc32(body)))
            bodies.append(body)
            offset += len(body)
        infos.append(_StudyInfo(study, places))
    header = pack(_Header(n_records, cursor, still.positions, infos))
    prefix = _MAGIC + len(header).to_bytes(4, "big") + zlib.crc32(header).to_bytes(4, "big")
    return b"".join([prefix, header, *bodies])


def _sections(params: list[PutParam], images: Iterator[PutTrial]) -> Iterator[_Section]:
    while True:
        indexes: dict[str, int] = {}
        rows = [
            _TrialRow(
                image.trial_id,
                image.number,
                image.state,
                image.values,
                image.datetime_start,
                image.datetime_complete,
                image.params,
                [indexes.setdefault(text, len(indexes)) for text in image.distributions],
                image.user_attrs,
                image.system_attrs,
                image.intermediate_values,
                image.owner,
            )
            for image in itertools.islice(images, _SECTION_TRIALS)
        ]
        if not rows and not params:
            return
        yield _Section(list(indexes), params, rows)
        params = []


def load(snapshot: bytes | memoryview, focus: Container[int] | None = None) -> Restored:
    """What was dumped.

    Args:
        snapshot: What ``dump`` returned.
        focus: Ids of the studies whose sections are read; None reads all.

    Raises:
        SnapshotRefusedError: The bytes are no snapshot, are damaged, or are of another version.
    """
    replica = Replica(focus)
    header, body = _read_header(memoryview(snapshot))
    for record in _records(header, body, focus):
        replica.apply(record)
    return Restored(replica, _hashable(header.cursor), header.n_records)


def _records(header: _Header, body: memoryview, focus: Container[int] | None) -> Iterator[Record]:
    for info in header.studies:
        yield info.study
    yield header.positions
    for info in header.studies:
        if focus is None or info.study.study_id in focus:
            for place in info.sections:
                part = body[place.offset : place.offset + place.length]
                part = _checked(part, place.length, place.checksum)
                section = unpack(part, _section_decoder, _Section)
                yield from _section_records(section, info.study.study_id)


def _section_records(section: _Section, study_id: int) -> Iterator[Record]:
    yield from section.params
    texts = section.distributions
    for row in section.trials:
        yield PutTrial(
            trial_id=row.trial_id,
            study_id=study_id,
            number=row.number,
            state=row.state,
            values=row.values,
            datetime_start=row.datetime_start,
            datetime_complete=row.datetime_complete,
            params=row.params,
            distributions=[texts[index] for index in row.distributions],
            user_attrs=row.user_attrs,
            system_attrs=row.system_attrs,
            intermediate_values=row.intermediate_values,
            owner=row.owner,
        )


def _read_header(snapshot: memoryview) -> tuple[_Header, memoryview]:
    if len(snapshot) < _PREFIX_LEN or bytes(snapshot[: len(_MAGIC) - 1]) != _MAGIC[:-1]:
        raise SnapshotRefusedError(
            "These bytes are no trialstore snapshot. Optuna's snapshots are pickles, which are "
            "never loaded: they can run code."
        )
    if bytes(snapshot[: len(_MAGIC)]) != _MAGIC:
        raise SnapshotRefusedError(
            f"The snapshot is of format version {snapshot[len(_MAGIC) - 1]}, this trialstore "
            f"reads version {_MAGIC[-1]}. Delete it; nothing but time is lost."
        )
    length = int.from_bytes(snapshot[len(_MAGIC) : len(_MAGIC) + 4], "big")
    checksum = int.from_bytes(snapshot[len(_MAGIC) + 4 : _PREFIX_LEN], "big")
    header = _checked(snapshot[_PREFIX_LEN : _PREFIX_LEN + length], length, checksum)
    return unpack(header, _header_decoder, _Header), snapshot[_PREFIX_LEN + length :]


def _checked(part: memoryview, length: int, checksum: int) -> memoryview:
    if len(part) != length or zlib.crc32(part) != checksum:
        raise SnapshotRefusedError(
            "The snapshot is damaged or cut short. Delete it; nothing but time is lost."
        )
    return part


def pack(value: msgspec.Struct) -> bytes:
    """The value as bytes; whatever a record may hold."""
    try:
        return b"M" + msgspec.msgpack.encode(value)
    except (UnicodeEncodeError, OverflowError):
        return b"J" + json.dumps(msgspec.to_builtins(value, str_keys=True)).encode()


def unpack(part: bytes | memoryview, decoder: msgspec.msgpack.Decoder[_T], kind: type[_T]) -> _T:
    try:
        if bytes(part[:1]) == b"M":
            return decoder.decode(part[1:])
        return msgspec.convert(json.loads(bytes(part[1:])), kind, strict=False, str_keys=True)
    except (msgspec.DecodeError, ValueError, IndexError) as error:
        raise SnapshotRefusedError(f"The snapshot can't be read: {error}.") from error


def _hashable(cursor: Any) -> Cursor:
    """Cursors are tuples where they are sequences; msgpack and JSON know lists only."""
    return tuple(_hashable(part) for part in cursor) if isinstance(cursor, list) else cursor


# --- when to save --------------------------------------------------------------------------------

# Replaying this many records takes a few tens of milliseconds; below that a snapshot is not worth
# its file. Bytes do not count: large records take two thirds of their replay from a snapshot too.
_RECORDS_MIN: Final = 20_000
# A snapshot costs time in proportion to everything, so the next one waits for everything to have
# grown in proportion; the sum of all saves then stays in proportion to the journal.
_GROWTH_MIN: Final = 0.25


class _SnapshotLog(Log, SnapshotStore, Protocol):
    pass


def restore(log: _SnapshotLog, focus: Container[int] | None) -> Restored:
    """The stored snapshot, or an empty replica where there is none that can be used."""
    stored = log.load_snapshot()
    if stored is not None:
        try:
            return load(stored[0], focus)._replace(cursor=stored[1])
        except SnapshotRefusedError as error:
            _logger.warning("The snapshot is ignored, and rebuilt in time: %s", error)
    return Restored(Replica(), START, 0)


def _n_records_of(stored: tuple[bytes | memoryview, Cursor] | None) -> int:
    """How many records a stored snapshot covers; 0 if it can't be used."""
    if stored is None:
        return 0
    try:
        return _read_header(memoryview(stored[0]))[0].n_records
    except SnapshotRefusedError:
        return 0


def restore_base(log: Log) -> tuple[Restored, Mapping[str, Marks]]:
    """What a reader of every record that is kept begins with, and the marks of the others."""
    if not isinstance(log, Compacted):
        return Restored(Replica(), START, 0), {}
    base = log.load_base()
    if base.snapshot is None:
        return Restored(Replica(), base.cursor, 0), base.marks
    return load(base.snapshot)._replace(cursor=base.cursor), base.marks


def catch_up(log: Log, restored: Restored) -> Restored:
    """The same replica with everything that the log has after it."""
    replica, cursor, n_records = restored
    while True:
        batch = log.exchange((), cursor, NOTHING)
        apply_all(replica, batch.news)
        cursor, n_records = batch.cursor, n_records + len(batch.news)
        if not batch.more:
            return Restored(replica, cursor, n_records)


# What a storage holds, of which moment, if it holds the trials of every study.
_TakeStill = Callable[[], tuple[Still, Cursor, int] | None]


class Saver:
    """Saves a snapshot when replaying what is newer has become slow, never in front of a user.

    A thread of its own writes what the storage held at one moment, without a copy of it, and
    through a log of its own, so that nobody waits. Where the storage does not hold everything the
    thread reads it. A kill at any moment leaves the old snapshot, or the new one.

    Args:
        log: Copied for the thread.
        n_covered: How many records the stored snapshot covers.

    Attributes:
        n_records: How many records the storage stands after.
    """

    def __init__(self, log: _SnapshotLog, n_covered: int) -> None:
        self._log = log
        self._n_covered = n_covered
        self.n_records = n_covered
        self._n_since = 0
        self._thread: threading.Thread | None = None

    def note(self, n_records: int) -> None:
        """So many more records came in."""
        self._n_since += n_records
        self.n_records += n_records

    def save_if_due(self, take_still: _TakeStill) -> None:
        """Begin to save, unless it is too early or under way.

        Not to be called in the middle of opening a journal: both would take turns.
        """
        if self._is_due(self._n_since) and (self._thread is None or not self._thread.is_alive()):
            thread = threading.Thread(
                target=self._save, args=(take_still,), name="trialstore-snapshot", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # there are too many
                _logger.warning("No snapshot was saved: %s", error)
                self._n_since = 0
            else:
                self._thread = thread

    def _is_due(self, n_since: int) -> bool:
        return n_since >= max(_RECORDS_MIN, _GROWTH_MIN * self._n_covered)

    def _save(self, take_still: _TakeStill) -> None:
        try:
            log = cast(_SnapshotLog, copier(self._log)())
            try:
                log.save_snapshot(lambda: self._make(log, take_still))
            finally:
                log.close()
        except Exception as error:
            _logger.warning("No snapshot was saved: %s", error)
        finally:
            # Saved, or somebody else is at it: count anew either way.
            self._n_since = 0

    def _make(self, log: _SnapshotLog, take_still: _TakeStill) -> tuple[bytes, Cursor] | None:
        """The bytes of a new snapshot; None if a recent one has appeared meanwhile."""
        self._n_covered = _n_records_of(log.load_snapshot())
        taken = take_still()
        if taken is None:
            restored = catch_up(log, restore(log, None))
            taken = restored.replica.still(), restored.cursor, restored.n_records
        still, cursor, n_records = taken
        if not self._is_due(n_records - self._n_covered):
            return None
        self._n_covered = n_records
        return dump_still(still, cursor, n_records), cursor

    def begin_in_child(self) -> None:
        """A save that is under way is the parent's."""
        self._thread = None

    def join(self) -> None:
        """Wait for a save that is under way."""
        thread = self._thread
        if thread is not None:
            thread.join()


def apply_all(replica: Replica, records: Sequence[Record]) -> None:
    """Records whose outcomes nobody waits for."""
    pause_gc = len(records) > _MANY_RECORDS and gc.isenabled()
    if pause_gc:
        # Nothing of what is being loaded is garbage, and each full pass looks at all of it.
        gc.disable()
    try:
        replica.apply_all(records)
    finally:
        if pause_gc:
            gc.enable()
