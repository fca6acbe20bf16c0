"""Studies and trials in memory, as the records say; every rule about them is in this file.

``apply(record) -> Outcome`` is deterministic: no I/O, no clock, no randomness, so that replicas
fed by one log agree. Other storages' records never raise here; the storage raises what was said
of its own. On a journal replay alone judges, and it judges exactly as Optuna's replay does; where
we are stricter, ``storage.py`` refuses before anything is appended.

What reads need is indexed: trials by id and number, unfinished and WAITING ones, counts by state,
the best trial, one distribution per parameter. What is held of one study or trial, and how it is
handed out, is in ``contents.py``.

Not thread-safe: its storage holds a lock.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from json import dumps
import logging
import math
import sys
from typing import Any, Final, NamedTuple

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    check_distribution_compatibility,
)
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from trialstore import records as r
from trialstore.contents import STATES, StudyContents, TrialContents, internal_value, slot_id
from trialstore.log import Wanted
from trialstore.records import ACCEPTED, Outcome, Record, Verdict

_logger = logging.getLogger("trialstore")

_NO_STUDY: Final = Outcome(Verdict.NO_STUDY)
_NO_TRIAL: Final = Outcome(Verdict.NO_TRIAL)
_FINISHED: Final = Outcome(Verdict.FINISHED)
_LOST: Final = Outcome(Verdict.LOST)
_INCOMPATIBLE: Final = Outcome(Verdict.INCOMPATIBLE)
_DUPLICATED: Final = Outcome(Verdict.DUPLICATED_STUDY)

# A trial's place is one integer, study id and index in the study's slots: at 100,000 trials a
# tuple each would cost 6 MB.
_INDEX_BITS: Final = 40
_INDEX_MASK: Final = (1 << _INDEX_BITS) - 1


def _is_better(study: StudyContents, value: float, trial_id: int) -> bool:
    """Whether a COMPLETE trial beats the best; of equals the earlier created one is best."""
    if study.best_id is None:
        return True
    if value == study.best_value:
        return trial_id < study.best_id
    if study.directions[0] == StudyDirection.MAXIMIZE:
        return value > study.best_value
    return value < study.best_value


def compatible(known: BaseDistribution, new: BaseDistribution) -> bool:
    """Optuna's rule for two distributions of one parameter name in a study; an equivalence."""
    try:
        check_distribution_compatibility(known, new)
    except ValueError:
        return False
    return True


class Still(NamedTuple):
    """Everything that a replica holds, as images: what it was when it was asked for.

    Args:
        positions: Of all trials.
        studies: By id: the study, its parameters and its trials, which are made one by one.
    """

    positions: r.PutPositions
    studies: list[tuple[r.PutStudy, list[r.PutParam], Iterator[r.PutTrial]]]


def readable_result(
    state: int, values: list[float] | None, n_objectives: int
) -> tuple[int, list[float] | None, list[tuple[str, str]]]:
    """State and values as they are shown: a COMPLETE trial without readable values is a FAIL.

    Returns:
        Both, and each field that can't be read with the reason.
    """
    unreadable = []
    if not 0 <= state < len(STATES):
        unreadable.append(("state", f"{state} is no state"))
        state = r.FAIL
    if values is not None:
        if any(map(math.isnan, values)):
            unreadable.append(("values", f"{values} holds NaN"))
            values = None
        elif len(values) != n_objectives:
            unreadable.append(("values", f"{len(values)} for {n_objectives} objectives"))
            values = None
    if state == r.COMPLETE and values is None:
        unreadable.append(("state", "COMPLETE without values, shown as FAIL"))
        state = r.FAIL
    return state, values, unreadable


class Replica:
    """The contents of a store, or of the part of it that somebody wanted.

    Args:
        focus: Ids of the studies whose trials are held when images of studies arrive; None holds
            all. Of other studies names, attributes and the positions of trials are kept, so that
            ids and numbers go on counting. Studies created later are always held.
    """

    def __init__(self, focus: Container[int] | None = None) -> None:
        self._focus = focus
        self._n_unloaded = 0
        self._studies: dict[int, StudyContents] = {}
        self._study_ids: dict[str, int] = {}
        self._places: dict[int, int] = {}  # trial id -> place, of loaded studies
        self._unfinished: dict[int, TrialContents] = {}  # trial id -> contents, of loaded studies
        self._next_study_id = 0
        self._next_trial_id = 0
        # Which study each position belongs to, run-length encoded: deleted and unloaded studies'
        # trials keep their ids.
        self._run_studies = array("q")
        self._run_starts = array("q")

    def __del__(self) -> None:
        """Studies and their trials refer to each other, and would stay until a collection."""
        for study in self._studies.values():
            study.let_go()

    # --- records ---------------------------------------------------------------------------------

    def apply(self, record: Record) -> Outcome:
        """Take a record in and say what became of it; nothing changes unless it is ACCEPTED."""
        return _APPLY[type(record)](self, record)

    def apply_all(self, records: Sequence[Record]) -> list[Outcome]:
        """Take records in, in order, and say what became of each."""
        return [_APPLY[type(record)](self, record) for record in records]

    def judge(self, record: Record) -> Outcome:
        """What ``apply`` would say now, without applying.

        Ids that apply would give out are not told. ``NO_STUDY`` and ``NO_TRIAL`` may only mean
        that nobody has wanted them yet.
        """
        if isinstance(record, _ON_TRIAL):
            trial = self._unfinished.get(record.trial_id)
            if trial is None:
                return self._not_updatable(record.trial_id)
            if isinstance(record, r.SetTrialParam):
                return self._judge_param(trial.study, record.param_name, record.distribution)
            if isinstance(record, r.SetTrialStateValues):
                return _LOST if record.state == trial.state == r.RUNNING else ACCEPTED
            return ACCEPTED
        if isinstance(record, r.CreateTrial):
            study = self._studies.get(record.study_id)
            return ACCEPTED if study is not None and study.loaded else _NO_STUDY
        if isinstance(record, r.CreateStudy):
            return _DUPLICATED if record.study_name in self._study_ids else ACCEPTED
        if isinstance(record, _ON_STUDY):
            return ACCEPTED if record.study_id in self._studies else _NO_STUDY
        return ACCEPTED

    def _judge_param(self, study: StudyContents, name: str, json: str) -> Outcome:
        known = study.distributions.get(name)
        if known is None:
            return ACCEPTED
        new = study.intern(json)
        return ACCEPTED if known is new or compatible(known, new) else _INCOMPATIBLE

    def _not_updatable(self, trial_id: int) -> Outcome:
        return _FINISHED if trial_id in self._places else _NO_TRIAL

    # Studies.

    def _apply_create_study(self, record: r.CreateStudy) -> Outcome:
        if record.study_name in self._study_ids:
            return _DUPLICATED
        study_id = self._next_study_id
        self._next_study_id = study_id + 1
        self._add_study(study_id, record.study_name, record.directions)
        return Outcome(Verdict.ACCEPTED, study_id)

    def _add_study(self, study_id: int, name: str, directions: list[int]) -> StudyContents:
        study = StudyContents(study_id, name, _readable_directions(name, directions))
        self._studies[study_id] = study
        self._study_ids[name] = study_id
        return study

    def _apply_delete_study(self, record: r.DeleteStudy) -> Outcome:
        study = self._studies.pop(record.study_id, None)
        if study is None:
            return _NO_STUDY
        if self._study_ids.get(study.name) == study.id:
            del self._study_ids[study.name]
        self._n_unloaded -= not study.loaded
        self._drop_trials(study)
        return ACCEPTED

    def _drop_trials(self, study: StudyContents) -> None:
        for slot in study.slots:
            del self._places[slot_id(slot)]
        for trial_id in study.unfinished:
            del self._unfinished[trial_id]

    def _apply_set_study_user_attr(self, record: r.SetStudyUserAttr) -> Outcome:
        study = self._studies.get(record.study_id)
        if study is None:
            return _NO_STUDY
        study.user_attrs = {**study.user_attrs, **record.user_attr}
        return ACCEPTED

    def _apply_set_study_system_attr(self, record: r.SetStudySystemAttr) -> Outcome:
        study = self._studies.get(record.study_id)
        if study is None:
            return _NO_STUDY
        study.system_attrs = {**study.system_attrs, **record.system_attr}
        return ACCEPTED

    # Trials.

    def _apply_create_trial(self, record: r.CreateTrial) -> Outcome:
        study = self._studies.get(record.study_id)
        if study is None:
            return _NO_STUDY
        trial_id = self._next_trial_id
        self._next_trial_id = trial_id + 1
        if not self._run_studies or self._run_studies[-1] != study.id:
            self._run_studies.append(study.id)
            self._run_starts.append(trial_id)
        number = study.n_created
        study.n_created = number + 1
        if study.loaded:
            trial = TrialContents(trial_id, number, study)
            trial.start = record.datetime_start
            # Every record brings a string of its own; kept until the trial is read, they would
            # leave holes between what stays.
            trial.owner = sys.intern(record.worker_id)
            values = record.values
            if values is None and record.value is not None:
                values = [record.value]
            is_bare = values is None and not record.params and not record.intermediate_values
            if record.state != r.RUNNING or not is_bare:
                trial.complete = record.datetime_complete
                self._set_state(trial, record.state, values)
                for name, internal in record.params.items():
                    self._use_param(trial, name, internal, record.distributions.get(name))
                trial.intermediate_values = _readable_steps(trial, record.intermediate_values)
            if record.user_attrs or record.system_attrs:
                trial.user_attrs = dict(record.user_attrs)
                trial.system_attrs = dict(record.system_attrs)
            self._add_trial(trial)
        return Outcome(Verdict.ACCEPTED, trial_id)

    def _apply_set_trial_param(self, record: r.SetTrialParam) -> Outcome:
        trial = self._unfinished.get(record.trial_id)
        if trial is None:
            return self._not_updatable(record.trial_id)
        study, name, json = trial.study, record.param_name, record.distribution
        known = study.distributions.get(name)
        if known is not None and study.interned.get(json) is known:
            # As in nearly every trial of a study: there is nothing to compare.
            if trial.state == r.WAITING or trial.view is not None:
                trial.about_to_change()
            if type(known) is FloatDistribution:  # what is stored is the value
                name = sys.intern(name)
                trial.params[name], trial.distributions[name] = record.param_value_internal, known
            else:
                self._set_param(trial, name, record.param_value_internal, json, known)
            return ACCEPTED
        try:
            outcome = self._judge_param(study, name, json)
        except Exception as error:
            trial.warn_unreadable(f"distribution of {name!r}", error)
            return ACCEPTED
        if outcome is ACCEPTED:
            trial.about_to_change()
            self._use_param(trial, name, record.param_value_internal, json)
        return outcome

    def _set_param(
        self,
        trial: TrialContents,
        name: str,
        internal: float,
        json: str | None,
        known: BaseDistribution | None = None,
    ) -> None:
        """``known``: the distribution, by who has looked it up."""
        try:
            if json is None:
                raise ValueError("it has no distribution")
            distribution = known or trial.study.intern(json)
            external = distribution.to_external_repr(internal)
            if internal < 0 and type(distribution) is CategoricalDistribution:
                raise ValueError(f"choice {internal} does not exist")
        except Exception as error:
            # Whatever Optuna raises on a distribution or an index that somebody else stored: one
            # bad record must not make the study unreadable.
            trial.warn_unreadable(f"parameter {name!r}", error)
            return
        # Every record brings a string of its own, twice as large as the value. (Keys of attributes
        # are shared by msgspec.)
        name = sys.intern(name)
        trial.params[name] = external
        trial.distributions[name] = distribution

    def _use_param(
        self, trial: TrialContents, name: str, internal: float, json: str | None
    ) -> None:
        """As an operation does, which others follow; an image may be of any trial, and only a
        ``PutParam`` beside it tells whose distribution was the study's first."""
        self._set_param(trial, name, internal, json)
        if name in trial.distributions:
            trial.study.distributions.setdefault(name, trial.distributions[name])

    def _apply_set_trial_state_values(self, record: r.SetTrialStateValues) -> Outcome:
        trial = self._unfinished.get(record.trial_id)
        if trial is None:
            return self._not_updatable(record.trial_id)
        state = record.state
        if state == r.RUNNING:
            if trial.state == r.RUNNING:
                return _LOST
        elif not 0 <= state < len(STATES):
            trial.warn_unreadable("state", f"{state} is no state")
            return ACCEPTED
        self._remove_from_indexes(trial)
        if state == r.RUNNING:
            trial.start = record.datetime_start
            trial.owner = sys.intern(record.worker_id)
        elif state in r.FINISHED:
            trial.complete = record.datetime_complete
        self._set_state(trial, state, trial.values if record.values is None else record.values)
        self._add_to_indexes(trial)
        return ACCEPTED

    def _set_state(self, trial: TrialContents, state: int, values: list[float] | None) -> None:
        n_objectives = len(trial.study.directions)
        trial.state, trial.values, unreadable = readable_result(state, values, n_objectives)
        for field, why in unreadable:
            trial.warn_unreadable(field, why)

    def _apply_set_trial_intermediate_value(self, record: r.SetTrialIntermediateValue) -> Outcome:
        trial = self._unfinished.get(record.trial_id)
        if trial is None:
            return self._not_updatable(record.trial_id)
        trial.about_to_change()
        trial.intermediate_values[record.step] = record.intermediate_value
        return ACCEPTED

    def _apply_set_trial_user_attr(self, record: r.SetTrialUserAttr) -> Outcome:
        trial = self._unfinished.get(record.trial_id)
        if trial is None:
            return self._not_updatable(record.trial_id)
        trial.about_to_change()
        trial.user_attrs.update(record.user_attr)
        return ACCEPTED

    def _apply_set_trial_system_attr(self, record: r.SetTrialSystemAttr) -> Outcome:
        trial = self._unfinished.get(record.trial_id)
        if trial is None:
            return self._not_updatable(record.trial_id)
        trial.about_to_change()
        trial.system_attrs.update(record.system_attr)
        return ACCEPTED

    def _apply_ignored(self, record: r.Ignored) -> Outcome:
        return ACCEPTED

    # Images.

    def _apply_put_study(self, record: r.PutStudy) -> Outcome:
        namesake = self._study_ids.get(record.study_name)
        if namesake is not None and namesake != record.study_id:
            self._apply_delete_study(r.DeleteStudy(worker_id="", study_id=namesake))
        study = self._studies.get(record.study_id)
        if study is not None and study.name != record.study_name:
            # The id was given out again after a deletion, which SQLite does.
            self._apply_delete_study(r.DeleteStudy(worker_id="", study_id=study.id))
            study = None
        if study is None:
            study = self._add_study(record.study_id, record.study_name, record.directions)
            if self._focus is not None and record.study_id not in self._focus:
                study.loaded = False
                self._n_unloaded += 1
        else:
            self._set_directions(study, _readable_directions(study.name, record.directions))
        study.user_attrs = record.user_attrs
        study.system_attrs = record.system_attrs
        return ACCEPTED

    def _set_directions(self, study: StudyContents, directions: list[StudyDirection]) -> None:
        """Of a study that was made without, as it was done before Optuna 3."""
        if directions == study.directions:
            return
        study.directions, study.best_id = directions, None
        for slot in study.slots:
            if slot.state == r.COMPLETE and slot.values and len(directions) == 1:
                self._note_best(study, slot.values[0], slot_id(slot))

    def _apply_put_trial(self, record: r.PutTrial) -> Outcome:
        study = self._studies.get(record.study_id)
        if study is None:
            return _NO_STUDY
        place = self._places.get(record.trial_id)
        if place is not None and place >> _INDEX_BITS != study.id:
            # The id was given out again, which SQLite does: its old study was deleted.
            self._apply_delete_study(r.DeleteStudy(worker_id="", study_id=place >> _INDEX_BITS))
            place = None
        trial = TrialContents(record.trial_id, record.number, study)
        trial.start = record.datetime_start
        trial.complete = record.datetime_complete
        trial.owner = record.owner
        self._set_state(trial, record.state, record.values)
        for (name, internal), json in zip(
            record.params.items(), record.distributions, strict=False
        ):
            self._set_param(trial, name, internal, json)
        trial.user_attrs = record.user_attrs
        trial.system_attrs = record.system_attrs
        trial.intermediate_values = record.intermediate_values
        if place is None:
            study.n_created = max(study.n_created, record.number + 1)
            self._add_trial(trial)
        elif record.trial_id in self._unfinished:
            self._remove_from_indexes(self._unfinished[record.trial_id])
            trial.index = place & _INDEX_MASK
            study.slots[trial.index] = trial
            self._add_to_indexes(trial)
        # A finished trial never changes again; an image of it says nothing new.
        return ACCEPTED

    def _apply_put_param(self, record: r.PutParam) -> Outcome:
        study = self._studies.get(record.study_id)
        if study is None:
            return _NO_STUDY
        if record.param_name not in study.distributions:
            try:
                study.distributions[record.param_name] = study.intern(record.distribution)
            except Exception as error:
                _logger.warning(
                    "Study %r: the distribution of parameter %r can't be read (%s).",
                    study.name,
                    record.param_name,
                    error,
                )
        return ACCEPTED

    def _apply_put_positions(self, record: r.PutPositions) -> Outcome:
        self._next_study_id = record.next_study_id
        self._run_studies = array("q", [study_id for study_id, _ in record.runs])
        self._run_starts = array("q")
        next_trial_id = 0
        for study_id, length in record.runs:
            self._run_starts.append(next_trial_id)
            next_trial_id += length
            if study_id in self._studies:
                self._studies[study_id].n_created += length
        self._next_trial_id = next_trial_id
        return ACCEPTED

    # Indexes.

    def _add_trial(self, trial: TrialContents) -> None:
        study = trial.study
        trial.index = len(study.slots)
        if study.slots and slot_id(study.slots[-1]) > trial.id:
            study.in_order = False
        study.slots.append(trial)
        self._places[trial.id] = study.id << _INDEX_BITS | trial.index
        self._add_to_indexes(trial)

    def _add_to_indexes(self, trial: TrialContents) -> None:
        study, state = trial.study, trial.state
        study.counts[state] += 1
        trial.view = None
        if state in r.FINISHED:
            study.share_distributions(trial)
            study.unread.add(trial.index)
            if state == r.COMPLETE and len(study.directions) == 1:
                assert trial.values is not None
                self._note_best(study, trial.values[0], trial.id)
        else:
            self._unfinished[trial.id] = study.unfinished[trial.id] = trial
            if state == r.WAITING:
                study.waiting.add(trial)

    @staticmethod
    def _note_best(study: StudyContents, value: float, trial_id: int) -> None:
        if _is_better(study, value, trial_id):
            study.best_id, study.best_value = trial_id, value

    def _remove_from_indexes(self, trial: TrialContents) -> None:
        """Of an unfinished trial; a finished one stays where it is."""
        study = trial.study
        study.counts[trial.state] -= 1
        del self._unfinished[trial.id], study.unfinished[trial.id]
        if trial.state == r.WAITING:
            study.waiting.remove(trial)

    def _put_in_order(self, study: StudyContents) -> None:
        """Images may arrive in any order; lists of trials are by id."""
        study.slots.sort(key=slot_id)
        study.unread.clear()
        for index, slot in enumerate(study.slots):
            self._places[slot_id(slot)] = study.id << _INDEX_BITS | index
            if isinstance(slot, TrialContents):
                slot.index = index
                if slot.state in r.FINISHED:
                    study.unread.add(index)
        study.in_order = True

    # --- reads -----------------------------------------------------------------------------------
    # KeyError means: not among what has been wanted so far, or not there at all.

    def _study(self, study_id: int) -> StudyContents:
        study = self._studies.get(study_id)
        if study is None:
            raise KeyError(f"There is no study with id {study_id}.")
        return study

    @property
    def is_complete(self) -> bool:
        """Whether the trials of every study are held."""
        return self._n_unloaded == 0

    def loaded_study_ids(self) -> set[int]:
        return {study.id for study in self._studies.values() if study.loaded}

    def unloaded(self, wanted: Wanted) -> set[int]:
        """Ids of the studies whose trials are wanted and not held."""
        study_ids = {*wanted.trials_of, *wanted.finished_of}
        study_ids.update(wanted.waiting_of, wanted.next_of)
        study_ids.update(study_id for study_id, _ in (*wanted.numbers, *wanted.params))
        for trial_id in wanted.trials:
            if 0 <= trial_id < self._next_trial_id:
                study_ids.add(self._run_studies[bisect_right(self._run_starts, trial_id) - 1])
        return {
            study_id
            for study_id in study_ids
            if study_id in self._studies and not self._studies[study_id].loaded
        }

    def has_study(self, study_id: int) -> bool:
        return study_id in self._studies

    def study_id(self, name: str) -> int:
        study_id = self._study_ids.get(name)
        if study_id is None:
            raise KeyError(f"There is no study with the name {name!r}.")
        return study_id

    def study_name(self, study_id: int) -> str:
        return self._study(study_id).name

    def directions(self, study_id: int) -> list[StudyDirection]:
        return list(self._study(study_id).directions)

    def n_objectives_of_trial(self, trial_id: int) -> int:
        trial = self._unfinished.get(trial_id)
        if trial is not None:
            return len(trial.study.directions)
        return len(self._studies[self.study_id_of_trial(trial_id)].directions)

    def study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._study(study_id).user_attrs

    def study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._study(study_id).system_attrs

    def studies(self) -> list[FrozenStudy]:
        """By id."""
        return [study.frozen() for _, study in sorted(self._studies.items())]

    def distribution(self, study_id: int, name: str) -> BaseDistribution | None:
        """What later uses of a parameter name must be compatible with, if that is known."""
        study = self._studies.get(study_id)
        return None if study is None else study.distributions.get(name)

    def is_first_use(self, trial_id: int, name: str) -> bool:
        """Whether a parameter name is new to the study of a trial, as far as is known."""
        trial = self._unfinished.get(trial_id)
        return trial is None or name not in trial.study.distributions

    def has_trial(self, trial_id: int) -> bool:
        return trial_id in self._places

    def is_running(self, trial_id: int) -> bool:
        trial = self._unfinished.get(trial_id)
        return trial is not None and trial.state == r.RUNNING

    def is_finished(self, trial_id: int) -> bool:
        return trial_id in self._places and trial_id not in self._unfinished

    def study_id_of_trial(self, trial_id: int) -> int:
        place = self._places.get(trial_id)
        if place is None:
            raise KeyError(f"There is no trial with id {trial_id}.")
        return place >> _INDEX_BITS

    def trial(self, trial_id: int, ahead: Sequence[r.TrialWrite] = ()) -> FrozenTrial:
        """A trial; an unfinished one with containers of its own.

        Args:
            trial_id: Which.
            ahead: Records on it that are not applied yet, to be shown as if they were.
        """
        trial = self._unfinished.get(trial_id)
        if trial is None:
            return self.finished_trial(trial_id)
        if not ahead:
            return trial.build(own_containers=True)
        shown = trial.apart()
        for record in ahead:
            if isinstance(record, r.SetTrialParam):
                name, internal = record.param_name, record.param_value_internal
                self._set_param(shown, name, internal, record.distribution)
            elif isinstance(record, r.SetTrialUserAttr):
                shown.user_attrs.update(deepcopy(record.user_attr))
            elif isinstance(record, r.SetTrialSystemAttr):
                shown.system_attrs.update(deepcopy(record.system_attr))
            elif isinstance(record, r.SetTrialIntermediateValue):
                shown.intermediate_values[record.step] = record.intermediate_value
        return shown.build(own_containers=False)

    def says(self, record: r.TrialWrite) -> bool:
        """Whether a trial reads as this record would have it, whoever wrote that."""
        if not self.has_trial(record.trial_id):
            return False
        trial = self.trial(record.trial_id)
        held: object = None
        wanted: object = None
        if isinstance(record, r.SetTrialParam):
            name, wanted = record.param_name, record.param_value_internal
            if name in trial.params:
                held = internal_value(trial.distributions[name], trial.params[name])
        elif isinstance(record, r.SetTrialIntermediateValue):
            held, wanted = trial.intermediate_values.get(record.step), record.intermediate_value
        elif isinstance(record, r.SetTrialUserAttr):
            wanted, attrs = record.user_attr, trial.user_attrs
            held = {key: attrs[key] for key in wanted if key in attrs}
        elif isinstance(record, r.SetTrialSystemAttr):
            wanted, attrs = record.system_attr, trial.system_attrs
            held = {key: attrs[key] for key in wanted if key in attrs}
        # As JSON, to which a tuple is a list, and in which NaN equals itself.
        return wanted is not None and dumps(held) == dumps(wanted)

    def finished_trial(self, trial_id: int) -> FrozenTrial:
        """A finished trial. Raises KeyError for all others."""
        place = self._places.get(trial_id)
        if place is None or trial_id in self._unfinished:
            raise KeyError(f"There is no trial with id {trial_id}.")
        return self._studies[place >> _INDEX_BITS].finished_trial(place & _INDEX_MASK)

    def trial_number(self, trial_id: int) -> int:
        place = self._places.get(trial_id)
        if place is None:
            raise KeyError(f"There is no trial with id {trial_id}.")
        return self._studies[place >> _INDEX_BITS].slots[place & _INDEX_MASK].number

    def trial_id(self, study_id: int, number: int) -> int:
        slots = self._study(study_id).slots
        if 0 <= number < len(slots) and slots[number].number == number:
            return slot_id(slots[number])
        for slot in slots:
            if slot.number == number:
                return slot_id(slot)
        raise KeyError(f"There is no trial number {number} in the study with id {study_id}.")

    def trials(self, study_id: int, states: Container[TrialState] | None) -> list[FrozenTrial]:
        """Trials by id; those of the given states, or all."""
        study = self._study(study_id)
        if not study.in_order:
            self._put_in_order(study)
        return study.trials(states)

    def waiting(
        self, study_id: int, mutex: Callable[[], AbstractContextManager[Any]], above: int = -1
    ) -> Sequence[FrozenTrial]:
        """The WAITING trials by id, however many, at the cost of the few that are looked at.

        Args:
            study_id: Their study.
            mutex: Gives what keeps this replica from changing.
            above: Only those with greater ids.
        """
        waiting = self._study(study_id).waiting
        return waiting.trials(mutex, above) if waiting else []

    def count(self, study_id: int, states: Container[TrialState] | None) -> int:
        counts = self._study(study_id).counts
        return sum(counts[state] for state in STATES if states is None or state in states)

    def best_trial(self, study_id: int) -> FrozenTrial:
        """Raises RuntimeError with several objectives, ValueError without a COMPLETE trial."""
        study = self._study(study_id)
        if len(study.directions) > 1:
            raise RuntimeError(
                f"Study {study.name!r} has {len(study.directions)} objectives and no single best "
                "trial; use study.best_trials."
            )
        if study.best_id is None:
            raise ValueError(f"Study {study.name!r} has no COMPLETE trial yet.")
        return self.finished_trial(study.best_id)

    def running(self, study_id: int) -> dict[int, str]:
        """RUNNING trials of a study, and the owner of each."""
        unfinished = self._study(study_id).unfinished
        return {trial.id: trial.owner for trial in unfinished.values() if trial.state == r.RUNNING}

    def newest_first(self, study_id: int) -> Iterator[TrialContents | FrozenTrial]:
        """The trials of a study as they are held; for looking at, not for keeping."""
        study = self._study(study_id)
        if not study.in_order:
            self._put_in_order(study)
        return reversed(study.slots)

    def owner(self, trial_id: int) -> str:
        """``worker_id`` of who created or claimed a RUNNING trial; empty if that is not known."""
        trial = self._unfinished.get(trial_id)
        return "" if trial is None or trial.state != r.RUNNING else trial.owner

    # --- images ----------------------------------------------------------------------------------

    def positions(self) -> r.PutPositions:
        ends = [*self._run_starts[1:], self._next_trial_id]
        runs = [
            (study_id, end - start)
            for study_id, start, end in zip(
                self._run_studies, self._run_starts, ends, strict=False
            )
        ]
        return r.PutPositions(next_study_id=self._next_study_id, runs=runs)

    def study_ids(self) -> list[int]:
        return sorted(self._studies)

    def study_image(self, study_id: int) -> r.PutStudy:
        return self._study(study_id).image()

    def param_images(self, study_id: int) -> list[r.PutParam]:
        return self._study(study_id).param_images()

    def trial_images(self, study_id: int) -> Iterator[r.PutTrial]:
        study = self._study(study_id)
        if not study.in_order:
            self._put_in_order(study)
        return study.trial_images()

    def still(self) -> Still:
        """What is held now. That costs little; the images of trials cost when they are made."""
        studies = [self._studies[study_id] for study_id in self.study_ids()]
        for study in studies:
            if not study.in_order:
                self._put_in_order(study)
        return Still(
            self.positions(),
            [(study.image(), study.param_images(), study.still_images()) for study in studies],
        )

    def unfinished_images(self, study_id: int) -> Iterator[r.PutTrial]:
        """By id."""
        return self._study(study_id).unfinished_images()

    def take_finished(self, study_id: int) -> Iterator[r.PutTrial]:
        """Images of the trials that have finished since the last call; what they say is dropped,
        so that nobody may read trials of the study here any more."""
        return self._study(study_id).take_finished()


def _readable_directions(name: str, directions: list[int]) -> list[StudyDirection]:
    readable = []
    for direction in directions:
        try:
            readable.append(StudyDirection(direction))
        except ValueError:
            _logger.warning("Study %r: %r is no direction, shown as NOT_SET.", name, direction)
            readable.append(StudyDirection.NOT_SET)
    return readable


def _readable_steps(trial: TrialContents, values: dict[str, float]) -> dict[int, float]:
    readable = {}
    for step, value in values.items():
        try:
            readable[int(step)] = value
        except ValueError as error:
            trial.warn_unreadable("intermediate value", error)
    return readable


_ON_STUDY: Final = (r.DeleteStudy, r.SetStudyUserAttr, r.SetStudySystemAttr)
_ON_TRIAL: Final = (
    r.SetTrialParam,
    r.SetTrialStateValues,
    r.SetTrialIntermediateValue,
    r.SetTrialUserAttr,
    r.SetTrialSystemAttr,
)

_APPLY: Final[dict[Any, Callable[[Replica, Any], Outcome]]] = {
    r.CreateStudy: Replica._apply_create_study,
    r.DeleteStudy: Replica._apply_delete_study,
    r.SetStudyUserAttr: Replica._apply_set_study_user_attr,
    r.SetStudySystemAttr: Replica._apply_set_study_system_attr,
    r.CreateTrial: Replica._apply_create_trial,
    r.SetTrialParam: Replica._apply_set_trial_param,
    r.SetTrialStateValues: Replica._apply_set_trial_state_values,
    r.SetTrialIntermediateValue: Replica._apply_set_trial_intermediate_value,
    r.SetTrialUserAttr: Replica._apply_set_trial_user_attr,
    r.SetTrialSystemAttr: Replica._apply_set_trial_system_attr,
    r.Ignored: Replica._apply_ignored,
    r.PutStudy: Replica._apply_put_study,
    r.PutTrial: Replica._apply_put_trial,
    r.PutParam: Replica._apply_put_param,
    r.PutPositions: Replica._apply_put_positions,
}
