"""A whole store, read once and handed on: no ``FrozenTrial`` is built, and little is held.

A log that is ``Paged`` is read in portions. Of any other one each trial is packed as soon as it
is finished, about 0.4 KB, because the operations on a trial may be anywhere in a journal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
import heapq
from operator import attrgetter
from typing import Any, Final, NamedTuple

import msgspec
from optuna.study import StudyDirection

from trialstore.log import START, Cursor, Log, Overview, Paged, Wanted
from trialstore.records import COMPLETE, RUNNING, PutStudy, PutTrial
from trialstore.replica import Replica, readable_result
from trialstore.snapshot import apply_all, pack, restore_base, unpack

_PAGE_TRIALS: Final = 1000
# To look whether trials of a study have finished costs what a few records cost; all studies are
# looked at once for so many records each.
_RECORDS_A_STUDY: Final = 16
_MAXIMIZE: Final = int(StudyDirection.MAXIMIZE)

_Use = Callable[[Callable[[Any], Any]], Any]
_decoder: Final = msgspec.msgpack.Decoder(PutTrial)


class _Packed(NamedTuple):
    """A finished trial without its distributions, and those."""

    trial_id: int
    image: bytes
    distributions: tuple[str, ...]


class Scan:
    """The contents of a store, each part as of the moment when it is read.

    Args:
        log: Read only; None where ``replica`` is all there is.
        replica: What to go on from.
        use: Calls something with the log while nobody else uses it; None if there is nobody else.

    Raises:
        As ``Log.exchange``.
    """

    def __init__(
        self, log: Log | None, replica: Replica | None = None, use: _Use | None = None
    ) -> None:
        self._log = log
        self._use: _Use = use or (lambda call: call(log))
        self._cursor: Cursor = START
        if replica is not None:
            self._replica = replica
        elif log is not None:
            (self._replica, self._cursor, _), _ = self._use(restore_base)
        self._packed: dict[int, list[_Packed]] = {}
        self._n_unpacked = self._pack_at = 0  # records
        self._texts: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._catch_up(Wanted(catalogue=True))

    def _catch_up(self, wanted: Wanted) -> None:
        while self._log is not None:
            batch = self._use(lambda log: log.exchange((), self._cursor, wanted))
            apply_all(self._replica, batch.news)
            self._cursor = batch.cursor
            self._n_unpacked += len(batch.news)
            more = batch.more
            del batch
            if self._n_unpacked >= self._pack_at:
                study_ids = self._replica.loaded_study_ids()
                self._pack_finished(study_ids)
                self._n_unpacked, self._pack_at = 0, _RECORDS_A_STUDY * len(study_ids)
            if not more:
                self._pack_finished(wanted.trials_of)
                return

    def _pack_finished(self, study_ids: Iterable[int]) -> None:
        for study_id in study_ids:
            packed = self._packed.setdefault(study_id, [])
            packed += map(self._pack, self._replica.take_finished(study_id))

    def _pack(self, image: PutTrial) -> _Packed:
        # Most trials of a study have the same distributions, which are most of an image.
        texts = tuple(image.distributions)
        image.distributions.clear()
        return _Packed(image.trial_id, pack(image), self._texts.setdefault(texts, texts))

    @property
    def studies(self) -> list[PutStudy]:
        """By id."""
        return [self._replica.study_image(study_id) for study_id in self._replica.study_ids()]

    def n_trials(self, study: PutStudy) -> int:
        """How many trials a study has."""
        if isinstance(self._log, Paged):
            return sum(self.overview(study).counts.values())
        self._catch_up(Wanted(trials_of=frozenset((study.study_id,))))
        return self._replica.count(study.study_id, None)

    def overview(self, study: PutStudy) -> Overview:
        """What there is to say of a study in a line; of several objectives the first is meant."""
        maximize = study.directions[:1] == [_MAXIMIZE]
        if isinstance(self._log, Paged):
            told: Overview = self._use(lambda log: log.overview(study.study_id, maximize))
            return told
        counts: Counter[int] = Counter()
        best: PutTrial | None = None
        starts, ends, running = [], [], {}
        for image in self.trials(study.study_id):
            counts[image.state] += 1
            starts.append(image.datetime_start)
            ends.append(image.datetime_complete)
            if image.state == RUNNING:
                running[image.trial_id] = image.owner
            if image.state == COMPLETE and (best is None or _is_better(image, best, maximize)):
                best = image
        first = min((text for text in starts if text), default=None)
        last = max((text for text in ends if text), default=None)
        return Overview(counts, best, first, last, running)

    def trials(self, study_id: int) -> Iterator[PutTrial]:
        """The trials of a study, in order of id."""
        if isinstance(self._log, Paged):
            above = -1
            n_objectives = len(self._replica.study_image(study_id).directions)
            while page := self._page(study_id, above):
                # Of the others the replica has seen to it.
                yield from (_readable(image, n_objectives) for image in page)
                above = page[-1].trial_id
            return
        if self._log is None:
            yield from self._replica.trial_images(study_id)
            return
        self._catch_up(Wanted(trials_of=frozenset((study_id,))))
        finished = sorted(self._packed.get(study_id, ()), key=attrgetter("trial_id"))
        yield from heapq.merge(
            map(_unpack, finished),
            self._replica.unfinished_images(study_id),
            key=attrgetter("trial_id"),
        )

    def _page(self, study_id: int, above: int) -> Sequence[PutTrial]:
        page: Sequence[PutTrial] = self._use(lambda log: log.page(study_id, above, _PAGE_TRIALS))
        return page


def _readable(image: PutTrial, n_objectives: int) -> PutTrial:
    state, values, unreadable = readable_result(image.state, image.values, n_objectives)
    return msgspec.structs.replace(image, state=state, values=values) if unreadable else image


def _unpack(packed: _Packed) -> PutTrial:
    image = unpack(packed.image, _decoder, PutTrial)
    image.distributions.extend(packed.distributions)
    return image


def _is_better(image: PutTrial, best: PutTrial, maximize: bool) -> bool:
    assert image.values is not None and best.values is not None
    value, known = image.values[0], best.values[0]
    return value > known if maximize else value < known
