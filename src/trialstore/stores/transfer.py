"""From one storage into another: same studies, same numbers, times, states, values, attributes.

Ids are the target's own. A trial is written by one ``CreateTrial`` that carries all of it, in
order of number, so whatever a kill leaves in the target is the beginning of the copy. A copy
that is started again compares that beginning with the source and goes on behind it; nothing is
kept beside it.

In memory there is a batch of trials, 40 bytes for each trial that is compared, and what a
``Scan`` holds of either side.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta, tzinfo
import functools
import itertools
import json
from typing import Any, Final
import uuid
import zlib

import msgspec
from optuna.distributions import distribution_to_json
from optuna.study import StudyDirection

from trialstore import records as r
from trialstore.contents import parse_distribution
from trialstore.in_memory import InMemoryStorage
from trialstore.log import NOTHING, START, Bulk, Cursor, Limited, Log
from trialstore.logs.relational.log import TablesLog
from trialstore.scan import Scan
from trialstore.snapshot import pack
from trialstore.storage import Storage

# So many trials are written at once, and no further one where those are already so large: some
# have megabytes, and a batch is in memory several times.
_BATCH_TRIALS: Final = 500
_BATCH_BYTES: Final = 1 << 24
_DIFFERENCES_MAX: Final = 100


class Difference(msgspec.Struct, frozen=True):
    """Where two copies of a study are not the same.

    Args:
        study: Its name.
        number: Of the trial; -1 for the study itself.
        fields: What differs.
    """

    study: str
    number: int
    fields: list[str]


class CopiedStudy(msgspec.Struct, frozen=True):
    """What became of one study.

    Args:
        name: In both storages.
        n_trials: That are in the target now.
        n_new: Of those, how many this call has written.
        differences: What a verification found, the first hundred.
        whole_seconds: How many trials lost the fractions of their seconds, which a DATETIME of
            MySQL does not hold.
    """

    name: str
    n_trials: int
    n_new: int
    differences: list[Difference] = []
    whole_seconds: int = 0


def receive(
    target: Store,
    study: r.PutStudy,
    images: Iterator[r.PutTrial],
    *,
    progress: Callable[[int], None] = lambda n: None,
) -> CopiedStudy:
    """Write one study whose trials come from somewhere else; as ``copy`` does."""
    ids, there = _open_studies(target, [study])
    counted = _counted(images, itertools.count(1), progress)
    name = study.study_name
    return _copy_trials(counted, study, there[name], _Writer(target), ids[name])


Store = Storage | Log
"""A storage, or its log; a log is read without being held by anybody."""


def copy(
    source: Store,
    target: Store,
    *,
    study: str | None = None,
    verify: bool = False,
    source_timezone: tzinfo | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[CopiedStudy]:
    """Copy one study, or all, or go on with a copy that was interrupted.

    Args:
        source: Read only. What is written to it meanwhile may or may not be copied.
        target: A study of the same name in it must be the beginning of a copy.
        study: Name of the one to copy.
        verify: Read both again in the end and compare.
        source_timezone: Where the source was written by Optuna 4, which stores local times: the
            zone that its workers lived in. Times that say their offset are not touched.
        progress: Called now and then with how many trials have been dealt with.

    Raises:
        KeyError: The source has no study of that name.
        ValueError: The target has another study of that name, or can't hold a value; the numbers
            of the source have gaps; both are one store.
        LogUnavailableError: Either was not reached. Call again to go on.
    """
    studies = [one for one in _scan(source).studies if study is None or one.study_name == study]
    if study is not None and not studies:
        raise KeyError(f"There is no study with the name {study!r}.")
    convert = _times_from(source, source_timezone)
    # One side after the other, so that at most one is held.
    ids, there = _open_studies(target, studies)
    writer = _Writer(target)
    scan = _scan(source)
    done = itertools.count(1)
    copied = []
    for one in studies:
        images = map(convert, _counted(scan.trials(one.study_id), done, progress))
        known = there.pop(one.study_name)
        copied.append(_copy_trials(images, one, known, writer, ids[one.study_name]))
    del scan
    if verify:
        copied = _verified(studies, copied, source, target, convert)
    return copied


def _scan(store: Store) -> Scan:
    return store.scan() if isinstance(store, Storage) else Scan(store)


def _log(store: Store) -> Log:
    return store.log if isinstance(store, Storage) else store


def _counted(
    images: Iterator[r.PutTrial], done: Iterator[int], progress: Callable[[int], None]
) -> Iterator[r.PutTrial]:
    for image in images:
        n = next(done)
        if n % _BATCH_TRIALS == 0:
            progress(n)
        yield image


def _open_studies(
    target: Store, studies: Iterable[r.PutStudy]
) -> tuple[dict[str, int], dict[str, Fingerprints]]:
    """Ids of the studies in the target, made if they are not there, and what they hold."""
    scan = _scan(target)
    known = {one.study_name: one for one in scan.studies}
    storage = target if isinstance(target, Storage) else Storage(target)
    ids, there = {}, {}
    for study in studies:
        name = study.study_name
        existing = known.get(name)
        if existing is None:
            directions = [StudyDirection(code) for code in study.directions]
            ids[name] = storage.create_new_study(directions, name)
            existing = r.PutStudy(
                study_id=ids[name],
                study_name=name,
                directions=study.directions,
                user_attrs={},
                system_attrs={},
            )
            there[name] = Fingerprints(())
        else:
            ids[name] = existing.study_id
            there[name] = Fingerprints(scan.trials(existing.study_id))
        if existing.directions != study.directions:
            raise ValueError(f"{_other(study)}: its directions are others.")
        for key, value in _changed(existing.user_attrs, study.user_attrs):
            storage.set_study_user_attr(ids[name], key, value)
        for key, value in _changed(existing.system_attrs, study.system_attrs):
            storage.set_study_system_attr(ids[name], key, value)
    return ids, there


def _changed(known: dict[str, Any], attrs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in attrs.items():
        if key not in known or _json(known[key]) != _json(value):
            yield key, value


def _other(study: r.PutStudy) -> str:
    return (
        f"The target has another study with the name {study.study_name!r}. Delete it there, or "
        "copy into another store"
    )


def _copy_trials(
    images: Iterator[r.PutTrial],
    study: r.PutStudy,
    there: Fingerprints,
    writer: _Writer,
    study_id: int,
) -> CopiedStudy:
    n = 0
    for image in itertools.islice(images, len(there)):
        _must_be_number(image, n, study)
        fields, _ = there.differences(n, image)
        if fields:
            raise ValueError(f"{_other(study)}: trial {n} differs in {', '.join(fields)}.")
        n += 1
    if n < len(there):
        raise ValueError(f"{_other(study)}: it has more trials, {len(there)}.")
    for batch in _batches(images):
        for image in batch:
            _must_be_number(image, n, study)
            n += 1
        writer.create(study_id, len(study.directions), batch, n - len(batch))
    return CopiedStudy(study.study_name, n, n - len(there))


def _batches(images: Iterator[r.PutTrial]) -> Iterator[list[r.PutTrial]]:
    batch: list[r.PutTrial] = []
    n_bytes = 0
    for image in images:
        batch.append(image)
        n_bytes += len(pack(image))
        if len(batch) == _BATCH_TRIALS or n_bytes >= _BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


def _must_be_number(image: r.PutTrial, number: int, study: r.PutStudy) -> None:
    if image.number != number:
        raise ValueError(
            f"Study {study.study_name!r}: trial number {image.number} stands where {number} is "
            "expected. A copy keeps numbers, so they may have no gaps; `trialstore check` shows "
            "them."
        )


class _Writer:
    """Appends trials to a storage's log without anybody holding them."""

    def __init__(self, target: Store) -> None:
        self._target = target
        self._log = _log(target)
        self._worker_id = str(uuid.uuid4())
        self._seqs = itertools.count()
        self._cursor: Cursor = START
        self._above: dict[int, int] = {}
        if not isinstance(target, InMemoryStorage) and not isinstance(self._log, Bulk):
            self._skip_what_is_there()

    def _skip_what_is_there(self) -> None:
        while True:
            batch = self._log.exchange((), self._cursor, NOTHING)
            self._cursor = batch.cursor
            if not batch.more:
                return

    def create(
        self, study_id: int, n_objectives: int, images: Sequence[r.PutTrial], number: int
    ) -> None:
        """Write trials to the end of a study; the first will have ``number``."""
        records = [self._record(study_id, n_objectives, image) for image in images]
        if isinstance(self._target, InMemoryStorage):
            for record in records:
                self._target._write(record)
            return
        log = self._log
        try:
            if isinstance(log, Bulk):
                above = self._above.get(study_id, 0)
                self._above[study_id] = log.load_trials(records, number, above)
                return
            batch = log.exchange(records, self._cursor, NOTHING)
        except ValueError:
            if isinstance(log, Limited):
                _name_the_trial(log, images, records)
            raise
        self._cursor = batch.cursor
        for outcome in batch.outcomes or ():
            if outcome.verdict is not r.Verdict.ACCEPTED:
                raise KeyError("The study was deleted in the target while it was copied.")

    def _record(self, study_id: int, n_objectives: int, image: r.PutTrial) -> r.CreateTrial:
        single = image.values is not None and n_objectives == 1
        return r.CreateTrial(
            study_id=study_id,
            datetime_start=image.datetime_start,
            datetime_complete=image.datetime_complete,
            state=image.state,
            value=image.values[0] if image.values is not None and single else None,
            values=None if single else image.values,
            params=image.params,
            distributions=dict(zip(image.params, image.distributions, strict=True)),
            user_attrs=image.user_attrs,
            system_attrs=image.system_attrs,
            intermediate_values={
                str(step): value for step, value in image.intermediate_values.items()
            },
            worker_id=self._worker_id,
            seq=next(self._seqs),
        )


def _name_the_trial(
    log: Limited, images: Sequence[r.PutTrial], records: Sequence[r.CreateTrial]
) -> None:
    """Raises ValueError for the first record that the log can't hold."""
    for image, record in zip(images, records, strict=True):
        try:
            log.check((record,))
        except ValueError as error:
            raise ValueError(f"Trial number {image.number}: {error}") from error


# --- times ---------------------------------------------------------------------------------------


def _times_from(source: Store, zone: tzinfo | None) -> Callable[[r.PutTrial], r.PutTrial]:
    """What makes every time of an image one that says its moment."""
    # Tables have no offsets: the text has the one that the installed Optuna takes for granted.
    always = isinstance(_log(source), TablesLog)

    def moved(text: str | None) -> str | None:
        if text is None or zone is None:
            return text
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None and not always:
            return text
        return r.format_time(moment.replace(tzinfo=zone))

    def convert(image: r.PutTrial) -> r.PutTrial:
        if zone is None:
            return image
        return msgspec.structs.replace(
            image,
            datetime_start=moved(image.datetime_start),
            datetime_complete=moved(image.datetime_complete),
        )

    return convert


# --- comparing -----------------------------------------------------------------------------------

_FIELDS: Final = (
    "state",
    "values",
    "params",
    "user_attrs",
    "system_attrs",
    "intermediate_values",
    "number",
    "times",
    "times",
)


class Fingerprints:
    """A checksum of each field of each trial, by number; 36 bytes a trial.

    Two trials with the same ones are the same to a user, but for one chance in 4 billion a field:
    a negative zero counts as zero, and NaN as itself. The last two are of the times, exact and in
    whole seconds, cut.
    """

    def __init__(self, images: Iterable[r.PutTrial]) -> None:
        self._checksums = array("I")
        for image in images:
            self._checksums.extend(_fingerprint(image))

    def __len__(self) -> int:
        return len(self._checksums) // len(_FIELDS)

    def differences(self, index: int, image: r.PutTrial) -> tuple[list[str], bool]:
        """In which fields an image differs from the one at ``index``, and whether the one at
        ``index`` is the same but for the fractions of its seconds."""
        width = len(_FIELDS)
        mine = self._checksums[index * width : (index + 1) * width]
        other = _fingerprint(image)
        fields = [name for name, a, b in zip(_FIELDS[:-2], mine, other, strict=False) if a != b]
        if mine[-2] == other[-2]:
            return fields, False
        is_whole = mine[-2] == mine[-1] and mine[-1] in (other[-1], _rounded_times(image))
        return (fields if is_whole else [*fields, "times"]), is_whole


def _fingerprint(image: r.PutTrial) -> tuple[int, ...]:
    start, complete = _times(image)
    return (
        image.state,
        _crc([value + 0.0 for value in image.values or ()] if image.values else None),
        _crc(
            [
                (name, value + 0.0, _canonical(text))
                for (name, value), text in zip(
                    image.params.items(), image.distributions, strict=True
                )
            ]
        ),
        zlib.crc32(_json(image.user_attrs)),
        zlib.crc32(_json(image.system_attrs)),
        _crc(sorted((step, v + 0.0) for step, v in image.intermediate_values.items())),
        image.number,
        _crc((start, complete)),
        _crc((_cut(start), _cut(complete))),
    )


def _rounded_times(image: r.PutTrial) -> int:
    """As MySQL keeps them, where MariaDB cuts."""
    half = timedelta(seconds=0.5)
    return _crc(tuple([time and _cut(time + half) for time in _times(image)]))


def _times(image: r.PutTrial) -> tuple[datetime | None, datetime | None]:
    return _moment(image.datetime_start), _moment(image.datetime_complete)


def _cut(moment: datetime | None) -> datetime | None:
    return moment and moment.replace(microsecond=0)


def _crc(value: Any) -> int:
    return zlib.crc32(repr(value).encode("utf-8", "surrogatepass"))


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _moment(text: str | None) -> datetime | None:
    return None if text is None else r.parse_time(text)


@functools.lru_cache(maxsize=4096)
def _canonical(text: str) -> str:
    """Equal distributions as equal text, whichever Optuna wrote it."""
    return distribution_to_json(parse_distribution(text))


def _verified(
    studies: Sequence[r.PutStudy],
    copied: Sequence[CopiedStudy],
    source: Store,
    target: Store,
    convert: Callable[[r.PutTrial], r.PutTrial],
) -> list[CopiedStudy]:
    # Each side is read once, however many studies there are.
    scan = _scan(target)
    found = {one.study_name: one for one in scan.studies}
    there = {
        one.study_name: Fingerprints(scan.trials(found[one.study_name].study_id))
        for one in studies
    }
    del scan
    scan = _scan(source)
    verified = []
    for one, result in zip(studies, copied, strict=True):
        # As many as were copied: the source may have grown since.
        images = itertools.islice(scan.trials(one.study_id), result.n_trials)
        name = one.study_name
        verified.append(_compared(one, found[name], map(convert, images), there.pop(name), result))
    return verified


def _compared(
    study: r.PutStudy,
    found: r.PutStudy,
    images: Iterator[r.PutTrial],
    there: Fingerprints,
    copied: CopiedStudy,
) -> CopiedStudy:
    name = study.study_name
    differences = []
    for field in ("directions", "user_attrs", "system_attrs"):
        if _json(getattr(found, field)) != _json(getattr(study, field)):
            differences.append(Difference(name, -1, [field]))
    whole_seconds = 0
    n = 0
    for index, image in enumerate(images):
        n += 1
        fields, is_whole = (
            there.differences(index, image) if index < len(there) else (["all"], False)
        )
        whole_seconds += is_whole
        if fields and len(differences) < _DIFFERENCES_MAX:
            differences.append(Difference(name, image.number, fields))
    if len(there) != n:
        differences.append(Difference(name, -1, ["number of trials"]))
    return msgspec.structs.replace(copied, differences=differences, whole_seconds=whole_seconds)
