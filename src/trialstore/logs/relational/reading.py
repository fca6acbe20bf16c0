"""What an exchange reads after it wrote: a plan of statements, and their answers as news.

A reading plans at most three statements for everything that was wanted, whatever the number of
studies, plus one for each study that is polled for WAITING trials. Where the answers show that
more is needed (a trial of an unknown study, a study that is gone), it plans once more; that is
rare, and each plan is one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from trialstore.log import Wanted
from trialstore.logs.relational import statements as s
from trialstore.logs.relational.cursor import (
    Probe,
    Studies,
    StudyCursor,
    holds_id,
    with_ids,
    without_ids,
)
from trialstore.logs.relational.dialects import Dialect, Rows, Step
from trialstore.logs.relational.images import Decoder
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

TRIALS_MAX: Final = 5_000
"""New trials of a study in one answer: some 20 MB of rows, most of a second."""


class Written(msgspec.Struct):
    """What the writing part of an exchange did that the reading part has to answer for.

    Args:
        trials: Ids of trials created or claimed.
        studies: Ids of studies created.
        names: Names of studies created, where their ids are not known yet.
        created: Study ids to (greatest id known before, how many), where the ids of the trials
            created are not known yet and the mark tells their numbers.
        deleted: Ids of studies deleted.
        session: Whose mark tells it.
    """

    trials: list[int] = []
    studies: list[int] = []
    names: list[str] = []
    created: dict[int, tuple[int, int]] = {}
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
        self._wrote = wrote
        self._splits = splits
        self.more = False
        """Whether there are more new trials than one answer should hold."""
        self._gone: list[int] = []
        self._put_studies: dict[int, PutStudy] = {}
        self._put_trials: dict[int, PutTrial] = {}
        self._put_params: list[PutParam] = []
        self._starts: dict[int, str] = {}  # of images, where ids are used again
        self._takes: list[Any] = []
        self._asked: set[int] = set()
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
        for study_id in self._wanted.trials_of & self._after.keys():
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
        for study_id in sorted(w.waiting_of):
            self._plan_watch(steps, study_id)
        self._plan_trials(steps)
        studies = w.studies | w.trials_of | w.waiting_of
        involved = {one for one, _ in w.numbers} | {one for one, _ in w.params}
        involved |= set(self._wrote.created)
        studies |= {one for one in involved if one not in self._after}
        studies |= set(self._wrote.studies)
        names = w.names | set(self._wrote.names)
        self._plan_studies(steps, studies, names, w.catalogue)
        for study_id, name in sorted(w.params):
            self._plan_param(steps, study_id, name)
        return steps

    def _plan_rest(self) -> list[Step]:
        """What the first answers left open."""
        steps: list[Step] = []
        unknown = {x.study_id for x in self._put_trials.values()} - set(self._after)
        unknown -= self._asked
        missing = set(self._wanted.trials) - set(self._put_trials)
        found = {(x.study_id, x.number) for x in self._put_trials.values()}
        unanswered = {one for one, _ in self._wanted.numbers - found}
        doubtful = unanswered | {one for one, _ in self._wanted.params}
        doubtful -= {x.study_id for x in self._put_params}
        if missing:
            # It may have belonged to any study that the replica holds.
            doubtful |= set(self._after)
        ask = (unknown | (doubtful & set(self._after))) - self._asked
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
        args: dict[str, Any] = {}
        shape = (0, 0, True)
        if not everything:
            listed = sorted(ids)[: s.IDS_MAX]
            shape = (s.pad("study", listed, args), s.pad("name", sorted(names), args), False)
        self._asked |= ids
        step = self._dialect.step(s.studies_selected, *shape, **args)
        self._add(
            steps, step, lambda rows: self._take_studies(rows, set(ids), set(names), everything)
        )

    def _plan_watch(self, steps: list[Step], study_id: int) -> None:
        known = self._after.get(study_id)
        args: dict[str, Any] = {"study_id": study_id, "seen": known.seen_id if known else 0}
        held = s.pad("held", known.held, args) if known else 0
        step = self._dialect.step(s.watch, held, **args)
        self._add(steps, step, lambda rows: self._take_watch(rows, study_id))

    def _plan_trials(self, steps: list[Step]) -> None:
        w = self._wanted
        ids = set(w.trials) | set(self._wrote.trials)
        turned: set[int] = set()
        above: list[tuple[int, int]] = []
        within: list[tuple[int, int, int]] = []
        left: list[tuple[int, int, int]] = []
        queued: list[tuple[int, int]] = []
        for study_id in sorted(w.trials_of | w.waiting_of):
            known = self._after.get(study_id) or _UNKNOWN
            ranges = [(study_id, low, high) for low, high in known.waiting]
            if study_id in w.trials_of:
                above.append((study_id, known.all_id))
                ids |= {one for one in known.held if one <= known.all_id}
                # Attributes may be written on a WAITING trial, too, and nothing else tells.
                within += ranges
            else:
                left += ranges
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
        for i, (study_id, (low, count)) in enumerate(sorted(self._wrote.created.items())):
            args[f"created_study_{i}"], args[f"created_known_{i}"] = study_id, low
            args[f"created_count_{i}"] = count
        shape = s.Selection(
            ids=s.pad("id", sorted(ids), args),
            above=len(above),
            bounded=self._splits and bool(above),
            within=s.pad_ranges("within", within, args),
            left=s.pad_ranges("left", left, args),
            queued=len(queued),
            turned=s.pad("turned", sorted(turned), args),
            numbers=len(numbers),
            created=len(self._wrote.created),
        )
        if any(shape):
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
        watched: list[tuple[int, Rows]] = []
        takes = list(zip(self._takes, answers, strict=True))
        self._watched = watched
        for take, rows in takes:
            take(rows)
        if self._round == 1:
            self._move_marks(watched)

    def _take_watch(self, rows: Rows, study_id: int) -> None:
        self._watched.append((study_id, rows))

    def _take_trials(self, rows: Rows) -> None:
        for row in self._decoder.trials(rows):
            self._put_trials[row.image.trial_id] = row.image
            if self._dialect.ids_reused:
                self._starts[row.image.trial_id] = row.start

    def _take_studies(self, rows: Rows, ids: set[int], names: set[str], everything: bool) -> None:
        found = self._decoder.studies(rows)
        for study_id, followed in list(self._after.items()):
            asked = everything or study_id in ids or followed.name in names
            if asked and study_id not in found:
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

    def _move_marks(self, watched: list[tuple[int, Rows]]) -> None:
        by_study: dict[int, list[PutTrial]] = {}
        for image in self._put_trials.values():
            by_study.setdefault(image.study_id, []).append(image)
        seen = dict(watched)
        for study_id in {*by_study, *seen}:
            known = self._after.get(study_id)
            if known is not None:
                images = by_study.get(study_id, [])
                self._after[study_id] = self._moved(study_id, known, images, seen.get(study_id))

    def _moved(
        self, study_id: int, known: StudyCursor, images: list[PutTrial], watched: Rows | None
    ) -> StudyCursor:
        all_id, seen_id, last_id = known.all_id, known.seen_id, known.last_id
        held = set(known.held)
        if images:
            last_id = max(last_id, max(x.trial_id for x in images))
        if study_id in self._wanted.trials_of:
            new = sorted(x.trial_id for x in images if x.trial_id > all_id)
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
        queued = []
        for image in images:
            if image.state == RUNNING:
                held.add(image.trial_id)
            else:
                held.discard(image.trial_id)
                if image.state == WAITING and image.trial_id <= seen_id:
                    queued.append(image.trial_id)
        if queued:
            waiting = with_ids(waiting, queued)
        return msgspec.structs.replace(
            known,
            all_id=all_id,
            seen_id=seen_id,
            last_id=last_id,
            held=tuple(sorted(held)),
            waiting=waiting,
            probe=self._probe(known.probe, images) if self._dialect.ids_reused else None,
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
