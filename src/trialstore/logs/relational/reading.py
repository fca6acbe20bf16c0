"""What an exchange reads after it wrote: a plan of statements, and their answers as news.

A reading plans at most three statements for everything that was wanted, whatever the number of
studies, plus one for each study that is polled for WAITING trials. Where the answers show that
more is needed (a trial of an unknown study, a study that is gone, a first WAITING trial where
there were none), it plans once more; that is rare, and each plan is one message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
import itertools
from typing import Any, Final

import msgspec

from trialstore.log import NEXT_MIN, Wanted
from trialstore.logs.relational import statements as s
from trialstore.logs.relational.cursor import (
    Probe,
    Ranges,
    Studies,
    StudyCursor,
    holds_id,
    n_ids,
    split,
    with_ids,
    without_ids,
)
from trialstore.logs.relational.dialects import Dialect
from trialstore.logs.relational.images import NO_NUMBER, Decoder
from trialstore.logs.relational.session import Rows, Step
from trialstore.records import (
    RUNNING,
    WAITING,
    DeleteStudy,
    PutParam,
    PutStudy,
    PutTrial,
    Record,
    first_params,
)

_UNKNOWN: Final = StudyCursor("", b"", ())

TRIALS_MAX: Final = 1_200
"""New trials of a study in one answer: some 5 MB of rows, a twentieth of a second. Rows lie among
what is kept of them, so that their room is never given back to the system."""

# So much of a queue is looked over for those that have left it, when the next of it are wanted:
# enough if some dozens have left since the last look, and then so many more, and then all.
_LOOKED_AT: Final = 2 * NEXT_MIN
_LOOKED_AT_THEN: Final = 32 * NEXT_MIN


class Written(msgspec.Struct):
    """What the writing part of an exchange did that the reading part has to answer for.

    Args:
        trials: Ids of trials created or claimed.
        studies: Ids of studies created.
        names: Names of studies created, where their ids are not known yet.
        created: Study ids to (greatest id known before, how many), where the ids of the trials
            created are not known yet and the mark tells their numbers.
        is_bare: Whether those began RUNNING with nothing else to them, so that the mark is read
            together with all that there is to say of them.
        deleted: Ids of studies deleted.
        session: Whose mark tells it.
    """

    trials: list[int] = []
    studies: list[int] = []
    names: list[str] = []
    created: dict[int, tuple[int, int]] = {}
    is_bare: bool = False
    deleted: list[int] = []
    session: str = ""


class Reading:
    """One reading: ``plan``, run the steps, ``take`` the answers, until ``plan`` is empty."""

    def __init__(
        self,
        dialect: Dialect,
        decoder: Decoder,
        before: Studies,
        wanted: Wanted,
        wrote: Written,
        *,
        splits: bool = False,
    ) -> None:
        self._dialect = dialect
        self._decoder = decoder
        self._after: Studies = dict(before)
        self._wanted = wanted
        self._whole = wanted.trials_of | wanted.finished_of
        """Studies that are followed trial by trial."""
        self._wrote = wrote
        self._splits = splits
        self.more = False
        """Whether there are more new trials than one answer should hold."""
        self._gone: list[int] = []
        self._put_studies: dict[int, PutStudy] = {}
        self._put_trials: dict[int, PutTrial] = {}
        self._put_params: list[PutParam] = []
        self._unnumbered: dict[int, list[int]] = {}
        """Ids of trials that are left out, by study, so that nobody waits for them."""
        self._starts: dict[int, str] = {}  # of images, where ids are used again
        self._takes: list[Any] = []
        self._asked: set[int] = set()
        self._watched: dict[int, Rows] = {}
        self._queued: set[int] = set()
        """Studies that turn out to have WAITING trials, which are still to be read."""
        # Of queues of which only the next are wanted: where they were looked over, and the rest.
        self._looked: dict[int, tuple[Ranges, Ranges]] = {}
        self._round = 0
        for study_id in wrote.deleted:
            self.forget(study_id)

    # --- results ---

    @property
    def trials(self) -> dict[int, PutTrial]:
        return self._put_trials

    @property
    def studies(self) -> dict[int, PutStudy]:
        return self._put_studies

    def news(self) -> list[Record]:
        """Deletions, then studies, then trials in order of study and id, then parameters."""
        trials = [x for x in self._put_trials.values() if x.study_id in self._after]
        trials.sort(key=lambda x: (x.study_id, x.trial_id))
        gone = [DeleteStudy(worker_id="", study_id=one) for one in self._gone]
        params = [x for x in self._put_params if x.study_id in self._after]
        for study_id in self._whole & self._after.keys():
            all_id = self._after[study_id].all_id
            params += first_params(
                x for x in trials if x.study_id == study_id and x.trial_id <= all_id
            )
        return [*gone, *self._put_studies.values(), *trials, *params]

    def cursor(self) -> Studies:
        return self._after

    def forget(self, study_id: int) -> None:
        """Say that a study which the replica may hold is gone, and follow it no more."""
        if self._after.pop(study_id, None) is not None:
            self._gone.append(study_id)
        self._put_studies.pop(study_id, None)
        self._queued.discard(study_id)

    # --- the plan ---

    def plan(self) -> list[Step]:
        """The statements still to be run; empty when everything wanted is known."""
        self._takes = []
        self._round += 1
        if self._round == 1:
            return self._plan_first()
        return self._plan_rest()

    def _add(self, steps: list[Step], step: Step, take: Any) -> None:
        steps.append(step)
        self._takes.append(take)

    def _plan_first(self) -> list[Step]:
        w = self._wanted
        steps: list[Step] = []
        for study_id in sorted(w.waiting_of | w.next_of):
            self._plan_watch(steps, study_id)
        self._plan_trials(steps)
        polled = w.waiting_of | w.next_of
        studies = w.studies | self._whole | {x for x in polled if not self._is_quiet(x)}
        involved = {one for one, _ in w.numbers} | {one for one, _ in w.params}
        involved |= set(self._wrote.created)
        studies |= {one for one in involved if one not in self._after}
        studies |= set(self._wrote.studies)
        names = w.names | set(self._wrote.names)
        self._plan_studies(steps, studies, names, w.catalogue)
        for study_id, name in sorted(w.params):
            self._plan_param(steps, study_id, name)
        return steps

    def _is_quiet(self, study_id: int) -> bool:
        """Whether watching a study shows all that a poll for WAITING trials wants to know of it:
        it has trials, so it is gone if they are, and none of them is WAITING as far as we know."""
        known = self._after.get(study_id)
        polled = study_id not in self._whole
        return polled and known is not None and known.last_id > 0 and not known.waiting

    def _plan_rest(self) -> list[Step]:
        """What the first answers left open."""
        steps: list[Step] = []
        if self._round == 2 and self._queued:
            self._plan_queued(steps)
        self._plan_further(steps)
        unknown = {x.study_id for x in self._put_trials.values()}
        missing = set(self._wanted.trials) - set(self._put_trials)
        found = {(x.study_id, x.number) for x in self._put_trials.values()}
        unanswered = {one for one, _ in self._wanted.numbers - found}
        doubtful = unanswered | {one for one, _ in self._wanted.params}
        doubtful -= {x.study_id for x in self._put_params}
        if missing:
            # It may have belonged to any study that the replica holds.
            doubtful |= set(self._after)
        # No greatest id: without its trials.
        doubtful |= {
            one for one, rows in self._watched.items() if (None, None) in map(tuple, rows)
        }
        ask = {one for one in unknown if one not in self._after}
        ask |= {one for one in doubtful if one in self._after}
        ask -= self._asked
        self._plan_studies(steps, ask, frozenset(), False)
        return steps

    def _plan_studies(
        self,
        steps: list[Step],
        ids: set[int] | frozenset[int],
        names: set[str] | frozenset[str],
        everything: bool,
    ) -> None:
        if not (ids or names or everything):
            return
        self._asked |= ids
        if everything:
            step = self._dialect.step(s.studies_selected, 0, 0, True)
            self._add(steps, step, lambda rows: self._take_studies(rows, set(ids), names, True))
            return
        for listed, called in itertools.zip_longest(
            s.chunks(sorted(ids)), s.chunks(sorted(names)), fillvalue=()
        ):
            args: dict[str, Any] = {}
            shape = (s.pad("study", listed, args), s.pad("name", called, args), False)
            step = self._dialect.step(s.studies_selected, *shape, **args)
            take = partial(
                self._take_studies, ids=set(listed), names=set(called), everything=False
            )
            self._add(steps, step, take)

    def _plan_watch(self, steps: list[Step], study_id: int) -> None:
        known = self._after.get(study_id)
        seen_id, held = (known.seen_id, known.held) if known else (0, ())
        # Each looks at what is new as well, so that its greatest id is of its own moment.
        for some in s.chunks(held) or [()]:
            args: dict[str, Any] = {"study_id": study_id, "seen": seen_id}
            step = self._dialect.step(s.watch, s.pad("held", some, args), **args)
            self._add(steps, step, lambda rows: self._take_watch(rows, study_id))

    def _plan_trials(self, steps: list[Step]) -> None:
        w = self._wanted
        ids = set(w.trials) | set(self._wrote.trials)
        turned: set[int] = set()
        ended: set[int] = set()
        above: list[tuple[int, int]] = []
        within: list[tuple[int, int, int]] = []
        left: list[tuple[int, int, int]] = []
        queued: list[tuple[int, int]] = []
        for study_id in sorted(self._whole | w.waiting_of | w.next_of):
            if self._is_quiet(study_id):
                continue
            known = self._after.get(study_id) or _UNKNOWN
            of_the_queue = known.waiting
            if study_id not in self._whole | w.waiting_of and not known.has_gaps:
                of_the_queue, others = split(known.waiting, _LOOKED_AT)
                if others:
                    self._looked[study_id] = of_the_queue, others
            ranges = [(study_id, low, high) for low, high in of_the_queue]
            if study_id in w.trials_of:
                above.append((study_id, known.all_id))
                ids |= {one for one in known.held if one <= known.all_id}
                # Attributes may be written on a WAITING trial, too, and nothing else tells.
                within += ranges
            elif study_id in w.finished_of:
                above.append((study_id, known.all_id))
                ended |= {one for one in known.held if one <= known.all_id}
                left += ranges
            else:
                # Who asks for the next ones claims one, and is told then what it has become.
                (within if study_id in w.waiting_of else left).extend(ranges)
                queued.append((study_id, known.seen_id))
                turned |= set(known.held)
        args: dict[str, Any] = {"session": self._wrote.session}
        if self._splits:
            args["others"] = TRIALS_MAX - 1
        for i, (study_id, low) in enumerate(above):
            args[f"above_study_{i}"], args[f"above_{i}"] = study_id, low
        for i, (study_id, low) in enumerate(queued):
            args[f"queued_study_{i}"], args[f"queued_{i}"] = study_id, low
        numbers = sorted(w.numbers)
        for i, (study_id, number) in enumerate(numbers):
            args[f"number_study_{i}"], args[f"number_{i}"] = study_id, number
        created = {} if self._wrote.is_bare else self._wrote.created
        for i, (study_id, (low, count)) in enumerate(sorted(created.items())):
            args[f"created_study_{i}"], args[f"created_known_{i}"] = study_id, low
            args[f"created_count_{i}"] = count
        ids_at_once = self._plan_beyond(steps, "id", ids)
        turned_at_once = self._plan_beyond(steps, "turned", turned)
        ended_at_once = self._plan_beyond(steps, "ended", ended)
        shape = s.Selection(
            ids=s.pad("id", ids_at_once, args),
            above=len(above),
            bounded=self._splits and bool(above),
            within=s.pad_ranges("within", within, args),
            left=s.pad_ranges("left", left, args),
            queued=len(queued),
            turned=s.pad("turned", turned_at_once, args),
            ended=s.pad("ended", ended_at_once, args),
            numbers=len(numbers),
            created=len(created),
        )
        if any(shape):
            step = self._dialect.step(s.trials_selected, shape, **args)
            self._add(steps, step, self._take_trials)

    def _plan_beyond(self, steps: list[Step], name: str, ids: set[int]) -> Sequence[int]:
        """As many ids as fit a statement; of the others, one for each part."""
        first, *others = s.chunks(sorted(ids)) or [()]
        for some in others:
            args: dict[str, Any] = {}
            size: dict[str, Any] = {"ids" if name == "id" else name: s.pad(name, some, args)}
            step = self._dialect.step(s.trials_selected, s.Selection(**size), **args)
            self._add(steps, step, self._take_trials)
        return first

    def _plan_queued(self, steps: list[Step]) -> None:
        args: dict[str, Any] = {}
        turned: set[int] = set()
        for i, study_id in enumerate(sorted(self._queued)):
            known = self._after[study_id]
            args[f"queued_study_{i}"], args[f"queued_{i}"] = study_id, known.seen_id
            turned |= set(known.held)
        n_turned = s.pad("turned", self._plan_beyond(steps, "turned", turned), args)
        shape = s.Selection(queued=len(self._queued), turned=n_turned)
        self._add(steps, self._dialect.step(s.trials_selected, shape, **args), self._take_trials)

    def _plan_further(self, steps: list[Step]) -> None:
        """Where so many have left a queue that those still there are too few: the others."""
        left: list[tuple[int, int, int]] = []
        gone = [x.trial_id for x in self._put_trials.values() if x.state != WAITING]
        for study_id, (looked, others) in list(self._looked.items()):
            if not others or n_ids(without_ids(looked, gone)) >= NEXT_MIN:
                del self._looked[study_id]
                continue
            if self._round == 2:
                further, others = split(others, _LOOKED_AT_THEN)
            else:
                further, others = others, ()
            self._looked[study_id] = (*looked, *further), others
            left += [(study_id, low, high) for low, high in further]
        if left:
            args: dict[str, Any] = {}
            shape = s.Selection(left=s.pad_ranges("left", left, args))
            step = self._dialect.step(s.trials_selected, shape, **args)
            self._add(steps, step, self._take_trials)

    def _plan_param(self, steps: list[Step], study_id: int, name: str) -> None:
        def take(rows: Rows) -> None:
            if rows and rows[0][0] is not None:
                self._put_params.append(
                    PutParam(study_id=study_id, param_name=name, distribution=rows[0][0])
                )

        step = self._dialect.step(s.first_param, study_id=study_id, name=name)
        self._add(steps, step, take)

    # --- the answers ---

    def take(self, answers: Sequence[Rows]) -> None:
        """The answers to the steps of the last plan, in their order."""
        for take, rows in zip(self._takes, answers, strict=True):
            take(rows)
        first = 2 if self._queued else 1
        if self._round == first:
            self._move_marks(self._watched)
        elif self._round > first and self._looked:
            self._move_marks({}, self._looked)

    def take_created(self, study_id: int, rows: Rows) -> None:
        """Trials that the exchange created bare, as it created them: rows (id, number, start).

        What became of them since is read whenever the RUNNING ones are.
        """
        known = [row for row in rows if row[0] is not None]
        self._take_trials(
            [
                (s.TRIAL, one, number, start, study_id, "RUNNING", None)
                for one, number, start in known
            ]
        )

    def _take_watch(self, rows: Rows, study_id: int) -> None:
        self._watched.setdefault(study_id, []).extend(rows)
        if self._is_quiet(study_id) and any(row[1] == "WAITING" for row in rows):
            self._queued.add(study_id)

    def _take_trials(self, rows: Rows) -> None:
        for row in self._decoder.trials(rows):
            if row.image.number == NO_NUMBER:
                self._unnumbered.setdefault(row.image.study_id, []).append(row.image.trial_id)
                continue
            self._put_trials[row.image.trial_id] = row.image
            if self._dialect.ids_reused:
                self._starts[row.image.trial_id] = row.start

    def _take_studies(
        self, rows: Rows, ids: set[int], names: set[str] | frozenset[str], everything: bool
    ) -> None:
        found = self._decoder.studies(rows)
        asked: Iterable[int] = ids
        if everything or names:
            asked = [
                study_id
                for study_id, followed in self._after.items()
                if everything or study_id in ids or followed.name in names
            ]
        for study_id in asked:
            if study_id not in found:
                self.forget(study_id)
        for study_id, row in sorted(found.items()):
            known = self._after.get(study_id)
            identity = (row.image.study_name, row.directions)
            if known is not None and (known.name, known.directions) != identity:
                # Deleted, and its id given to another study; nothing of the old one is true.
                self.forget(study_id)
                known = None
            if known is None:
                self._after[study_id] = StudyCursor(
                    row.image.study_name, row.digest, row.directions
                )
            elif known.digest == row.digest:
                continue
            else:
                self._after[study_id] = msgspec.structs.replace(known, digest=row.digest)
            self._put_studies[study_id] = row.image

    def _move_marks(self, watched: Mapping[int, Rows], only: Iterable[int] = ()) -> None:
        by_study: dict[int, list[PutTrial]] = {}
        for image in self._put_trials.values():
            by_study.setdefault(image.study_id, []).append(image)
        for study_id in only or {*by_study, *watched, *self._unnumbered}:
            known = self._after.get(study_id)
            if known is not None:
                images = by_study.get(study_id, [])
                self._after[study_id] = self._moved(study_id, known, images, watched.get(study_id))

    def _moved(
        self, study_id: int, known: StudyCursor, images: list[PutTrial], watched: Rows | None
    ) -> StudyCursor:
        all_id, seen_id, last_id = known.all_id, known.seen_id, known.last_id
        held = set(known.held)
        if images:
            last_id = max(last_id, max(x.trial_id for x in images))
        if study_id in self._whole:
            read = [*(x.trial_id for x in images), *self._unnumbered.get(study_id, ())]
            new = sorted(trial_id for trial_id in read if trial_id > all_id)
            if self._splits and len(new) >= TRIALS_MAX:
                # Those beyond, if there are any, came for other reasons.
                del new[TRIALS_MAX:]
                self.more = True
            all_id = new[-1] if new else all_id
        seen_id = max(seen_id, all_id)
        if watched is not None:
            state_of = {row[0]: row[1] for row in watched if row[1] is not None}
            greatest = max((row[0] or 0 for row in watched if row[1] is None), default=0)
            seen_id = max(seen_id, greatest)
            last_id = max(last_id, greatest)
            for one, state in state_of.items():
                if state in ("RUNNING", "WAITING") and not holds_id(known.waiting, one):
                    # WAITING without an image: claimed between the two reads; watch it.
                    held.add(one)
                elif one > all_id:
                    # Finished and never to be asked for by id: it comes with those above.
                    held.discard(one)
        gone = [x.trial_id for x in images if x.state != WAITING]
        waiting = without_ids(known.waiting, gone) if known.waiting else known.waiting
        has_gaps = known.has_gaps and bool(waiting)
        queued = []
        for image in images:
            if image.state == RUNNING:
                held.add(image.trial_id)
            else:
                held.discard(image.trial_id)
                if image.state == WAITING:
                    queued.append(image.trial_id)
        if queued:
            waiting, are_merged = with_ids(waiting, queued)
            has_gaps = has_gaps or are_merged
        return msgspec.structs.replace(
            known,
            all_id=all_id,
            seen_id=seen_id,
            last_id=last_id,
            held=tuple(sorted(held)),
            waiting=waiting,
            probe=self._probe(known.probe, images) if self._dialect.ids_reused else None,
            has_gaps=has_gaps,
        )

    def _probe(self, probe: Probe | None, images: list[PutTrial]) -> Probe | None:
        for image in images:
            rank = {RUNNING: 1, WAITING: 0}.get(image.state, 2)
            if (
                probe is None
                or image.trial_id == probe.trial_id
                or (rank, image.trial_id) > (probe.rank, probe.trial_id)
            ):
                start = self._starts.get(image.trial_id, "") if rank else ""
                probe = Probe(image.trial_id, image.number, start, rank)
        return probe
