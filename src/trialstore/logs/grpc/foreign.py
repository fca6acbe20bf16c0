"""A storage that is none of ours, known by its methods only, as a ``Log``.

Each record becomes a call, which judges; what is new becomes images. There is nothing atomic
about it and no round trip is saved: it is for a server over somebody else's storage, and for our
client on a plain Optuna server.

Source: Optuna ``BaseStorage``; docs/formats/grpc.md, "Foreign storages".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
import operator
from typing import Any, Final, Protocol

import msgspec
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from trialstore import records as r
from trialstore.errors import LogCorruptError, OutcomeUnknownError
from trialstore.log import START, Batch, Cursor, Wanted
from trialstore.records import ACCEPTED, AnyOperation, Outcome, Record, Verdict

_STATES: Final = {int(state): state for state in TrialState}
_FINISHED: Final = Outcome(Verdict.FINISHED)


class Methods(Protocol):
    """What ``StorageLog`` needs of a storage: part of ``BaseStorage``, and one call more."""

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int: ...
    def delete_study(self, study_id: int) -> None: ...
    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None: ...
    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None: ...
    def get_study_id_from_name(self, study_name: str) -> int: ...
    def get_study_name_from_id(self, study_id: int) -> str: ...
    def get_study_directions(self, study_id: int) -> list[StudyDirection]: ...
    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]: ...
    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]: ...
    def get_all_studies(self) -> list[FrozenStudy]: ...
    def create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> int: ...
    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: Any
    ) -> None: ...
    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool: ...
    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None: ...
    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None: ...
    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None: ...
    def get_trial(self, trial_id: int) -> FrozenTrial: ...
    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int: ...
    def trials_after(
        self, study_id: int, after_id: int, and_ids: Collection[int]
    ) -> Iterable[FrozenTrial]:
        """Trials of a study with a greater id, and those of the given ids."""
        ...


class LocalMethods:
    """The methods of a storage in this process."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def trials_after(
        self, study_id: int, after_id: int, and_ids: Collection[int]
    ) -> Iterable[FrozenTrial]:
        """See ``Methods``."""
        ids = frozenset(and_ids)
        for trial in self._storage.get_all_trials(study_id, deepcopy=False):
            if trial._trial_id > after_id or trial._trial_id in ids:
                yield trial


class _StudyCursor(msgspec.Struct, frozen=True, array_like=True):
    """How far a study has been followed.

    Args:
        study_id: Its id.
        name: Its name, which never changes.
        finished_id: The greatest id of a finished trial; every trial up to it has been sent.
        held: Ids of trials sent unfinished.
        directions: Of the study; by them and the name it is known again, for SQLite gives the id
            of a deleted study out again.
    """

    study_id: int
    name: str
    finished_id: int = -1
    held: tuple[int, ...] = ()
    directions: tuple[int, ...] = ()


class _Cursor(msgspec.Struct, frozen=True, array_like=True):
    epoch: str
    studies: tuple[_StudyCursor, ...]


class StorageLog:
    """A storage, by its methods, as a log that judges.

    Args:
        methods: ``LocalMethods(storage)``, or a connection to a plain Optuna server.
        epoch: Names the contents where they die with their process; a cursor of another epoch
            is refused.
    """

    def __init__(self, methods: Methods, *, epoch: str = "") -> None:
        self._methods = methods
        self._epoch = epoch
        self._constants: dict[int, tuple[str, list[int]]] = {}

    def exchange(self, records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``Log.exchange``; a batch is written record by record.

        Raises:
            LogCorruptError: The cursor is of contents that are gone.
            OutcomeUnknownError: A record failed after others were written.
        """
        known = self._known(cursor)
        outcomes: list[Outcome] = []
        for record in records:
            try:
                outcomes.append(self._write(record))
            except Exception as error:
                if not outcomes or isinstance(error, OutcomeUnknownError):
                    raise
                written = records[: len(outcomes)]
                if isinstance(error, ValueError) and all(map(_overwrites, written)):
                    raise  # as if nothing had been written: it may be written again
                raise OutcomeUnknownError(
                    f"{len(outcomes)} of {len(records)} records were stored, then: {error!r}"
                ) from error
        reading = _Reading(self._methods, self._constants, known)
        for record, outcome in zip(records, outcomes, strict=True):
            if isinstance(record, r.CreateStudy) and outcome.verdict is Verdict.ACCEPTED:
                reading.forget(outcome.id)  # what bore this id before was deleted elsewhere
        reading.read(_more_wanted(records, outcomes, wanted))
        after = _Cursor(self._epoch, tuple(reading.known.values()))
        return Batch(outcomes, reading.news, msgspec.to_builtins(after, enc_hook=operator.index))

    def close(self) -> None:
        """Nothing is open here."""

    def _known(self, cursor: Cursor) -> dict[int, _StudyCursor]:
        if cursor is START:
            return {}
        before = msgspec.convert(cursor, _Cursor, strict=False)
        if before.epoch != self._epoch:
            raise LogCorruptError(
                "the server was restarted, and what it held was in its memory only. Open a new "
                "storage; to survive a restart, serve a journal or a database.",
                source="the storage behind the server",
            )
        return {study.study_id: study for study in before.studies}

    # --- writing ---------------------------------------------------------------------------------

    def _write(self, record: AnyOperation) -> Outcome:
        """One call of the storage's, its errors as verdicts."""
        try:
            return self._call(record)
        except DuplicatedStudyError:
            return Outcome(Verdict.DUPLICATED_STUDY)
        except UpdateFinishedTrialError:
            return _FINISHED
        except KeyError:
            return Outcome(Verdict.NO_TRIAL if isinstance(record, _ON_TRIAL) else Verdict.NO_STUDY)
        except ValueError:
            if isinstance(record, r.SetTrialParam):
                return Outcome(Verdict.INCOMPATIBLE)
            raise

    def _call(self, record: AnyOperation) -> Outcome:
        methods = self._methods
        if isinstance(record, r.CreateStudy):
            directions = [StudyDirection(code) for code in record.directions]
            study_id = methods.create_new_study(directions, record.study_name)
            return Outcome(Verdict.ACCEPTED, study_id)
        if isinstance(record, r.CreateTrial):
            # Always from a template, for its start: by that a creation whose answer was lost is
            # known again.
            trial_id = methods.create_new_trial(record.study_id, template_of(record))
            return Outcome(Verdict.ACCEPTED, trial_id)
        if isinstance(record, r.SetTrialStateValues):
            state = _STATES[record.state]
            updated = methods.set_trial_state_values(record.trial_id, state, record.values)
            return ACCEPTED if updated else Outcome(Verdict.LOST)
        if isinstance(record, r.SetTrialParam):
            methods.set_trial_param(
                record.trial_id,
                record.param_name,
                record.param_value_internal,
                json_to_distribution(record.distribution),
            )
        elif isinstance(record, r.SetTrialIntermediateValue):
            methods.set_trial_intermediate_value(
                record.trial_id, record.step, record.intermediate_value
            )
        elif isinstance(record, r.SetTrialUserAttr):
            for key, value in record.user_attr.items():
                methods.set_trial_user_attr(record.trial_id, key, value)
        elif isinstance(record, r.SetTrialSystemAttr):
            for key, value in record.system_attr.items():
                methods.set_trial_system_attr(record.trial_id, key, value)
        elif isinstance(record, r.SetStudyUserAttr):
            for key, value in record.user_attr.items():
                methods.set_study_user_attr(record.study_id, key, value)
        elif isinstance(record, r.SetStudySystemAttr):
            for key, value in record.system_attr.items():
                methods.set_study_system_attr(record.study_id, key, value)
        elif isinstance(record, r.DeleteStudy):
            methods.delete_study(record.study_id)
            self._constants.pop(record.study_id, None)
        return ACCEPTED


def _overwrites(record: AnyOperation) -> bool:
    return not isinstance(
        record, (r.CreateStudy, r.CreateTrial, r.DeleteStudy, r.SetTrialStateValues)
    )


_ON_TRIAL: Final = (
    r.SetTrialParam,
    r.SetTrialStateValues,
    r.SetTrialIntermediateValue,
    r.SetTrialUserAttr,
    r.SetTrialSystemAttr,
)


def template_of(record: r.CreateTrial) -> FrozenTrial:
    """The trial that a ``CreateTrial`` asks for."""
    distributions = {
        name: json_to_distribution(text) for name, text in record.distributions.items()
    }
    values = record.values
    if values is None and record.value is not None:
        values = [record.value]
    return FrozenTrial(
        number=-1,
        trial_id=-1,
        state=_STATES[record.state],
        value=None,
        values=values,
        datetime_start=None
        if record.datetime_start is None
        else r.parse_time(record.datetime_start),
        datetime_complete=(
            None if record.datetime_complete is None else r.parse_time(record.datetime_complete)
        ),
        params={
            name: distributions[name].to_external_repr(internal)
            for name, internal in record.params.items()
        },
        distributions=distributions,
        user_attrs=dict(record.user_attrs),
        system_attrs=dict(record.system_attrs),
        intermediate_values={
            int(step): value for step, value in record.intermediate_values.items()
        },
    )


def trial_image(trial: FrozenTrial, study_id: int) -> r.PutTrial:
    """A trial as the record that says what it is."""
    return r.PutTrial(
        trial_id=trial._trial_id,
        study_id=study_id,
        number=trial.number,
        state=int(trial.state),
        values=None if trial.values is None else list(trial.values),
        datetime_start=None
        if trial.datetime_start is None
        else r.format_time(trial.datetime_start),
        datetime_complete=(
            None if trial.datetime_complete is None else r.format_time(trial.datetime_complete)
        ),
        params={
            name: trial.distributions[name].to_internal_repr(external)
            for name, external in trial.params.items()
        },
        distributions=[distribution_to_json(trial.distributions[name]) for name in trial.params],
        user_attrs=dict(trial.user_attrs),
        system_attrs=dict(trial.system_attrs),
        intermediate_values=dict(trial.intermediate_values),
    )


def _more_wanted(
    records: Sequence[AnyOperation], outcomes: Sequence[Outcome], wanted: Wanted
) -> Wanted:
    """With what a log that judges owes unasked: what was created and claimed, and how."""
    studies: set[int] = set()
    numbers: set[int] = set()
    trials: set[int] = set()
    for record, outcome in zip(records, outcomes, strict=True):
        if outcome.verdict is not Verdict.ACCEPTED:
            continue
        if isinstance(record, r.CreateStudy):
            studies.add(outcome.id)
        elif isinstance(record, r.DeleteStudy):
            studies.add(record.study_id)
        elif isinstance(record, r.CreateTrial):
            numbers.add(record.study_id)
            trials.add(outcome.id)
        elif isinstance(record, r.SetTrialStateValues) and record.state == r.RUNNING:
            trials.add(record.trial_id)
    return (
        wanted
        | Wanted(studies=frozenset(studies), trials=frozenset(trials))
        | Wanted(waiting_of=frozenset(numbers))
    )


class _Reading:
    """The news for what is wanted."""

    def __init__(
        self,
        methods: Methods,
        constants: dict[int, tuple[str, list[int]]],
        known: dict[int, _StudyCursor],
    ) -> None:
        self._methods = methods
        self._constants = constants
        self.known = known
        self.news: list[Record] = []
        self._sent: set[int] = set()

    def read(self, wanted: Wanted) -> None:
        if wanted.catalogue:
            self._read_catalogue()
        for name in wanted.names:
            self._read_name(name)
        followed = {*wanted.trials_of, *wanted.finished_of}
        followed |= {*wanted.waiting_of, *wanted.next_of}
        followed |= {one for one, _ in wanted.params}
        for study_id in sorted(wanted.studies):
            self._read_study(study_id)
        for study_id in sorted(followed):
            self._follow(study_id)
        for study_id, number in sorted(wanted.numbers):
            try:
                trial_id = self._methods.get_trial_id_from_study_id_trial_number(study_id, number)
            except KeyError:
                continue
            if study_id in self.known or self._read_study(study_id):
                self._read_trial(trial_id, study_id)
        for trial_id in sorted(wanted.trials):
            self._read_trial(trial_id, self._study_of_held(trial_id))

    # Studies.

    def _read_catalogue(self) -> None:
        there = self._methods.get_all_studies()
        for study_id in {*self.known} - {study._study_id for study in there}:
            self.forget(study_id)
        for study in there:
            self._put_study(
                study._study_id,
                study.study_name,
                [int(direction) for direction in study.directions],
                study.user_attrs,
                study.system_attrs,
            )

    def _read_name(self, name: str) -> None:
        try:
            study_id = self._methods.get_study_id_from_name(name)
        except KeyError:
            for study in list(self.known.values()):
                if study.name == name:
                    self.forget(study.study_id)
        else:
            self._constants.pop(study_id, None)  # they may be of a study that was deleted
            self._read_study(study_id)

    def _read_study(self, study_id: int) -> bool:
        """Returns whether it is there."""
        methods = self._methods
        try:
            if study_id not in self._constants or study_id not in self.known:
                name = methods.get_study_name_from_id(study_id)
                directions = [int(one) for one in methods.get_study_directions(study_id)]
                self._constants[study_id] = (name, directions)
            self._put_study(
                study_id,
                *self._constants[study_id],
                methods.get_study_user_attrs(study_id),
                methods.get_study_system_attrs(study_id),
            )
        except KeyError:
            self.forget(study_id)
            return False
        return True

    def _put_study(
        self,
        study_id: int,
        name: str,
        directions: list[int],
        user_attrs: dict[str, Any],
        system_attrs: dict[str, Any],
    ) -> None:
        known = self.known.get(study_id)
        if known is not None and (known.name, [*known.directions]) != (name, directions):
            self.forget(study_id)
        self._constants[study_id] = (name, directions)
        if study_id not in self.known:
            self.known[study_id] = _StudyCursor(study_id, name, directions=(*directions,))
        self.news.append(
            r.PutStudy(
                study_id=study_id,
                study_name=name,
                directions=directions,
                user_attrs=dict(user_attrs),
                system_attrs=dict(system_attrs),
            )
        )

    def forget(self, study_id: int) -> None:
        self._constants.pop(study_id, None)
        if self.known.pop(study_id, None) is not None:
            self.news.append(r.DeleteStudy(worker_id="", study_id=study_id))

    # Trials.

    def _follow(self, study_id: int) -> None:
        """All trials that are new or may have changed."""
        if study_id not in self.known and not self._read_study(study_id):
            return
        before = self.known[study_id]
        finished_id, held = before.finished_id, []
        n_before = len(self.news)
        try:
            for trial in self._methods.trials_after(study_id, finished_id, before.held):
                self._put_trial(trial, study_id)
                if not trial.state.is_finished():
                    held.append(trial._trial_id)
                else:
                    finished_id = max(finished_id, trial._trial_id)
        except KeyError:
            self.forget(study_id)
            return
        self.known[study_id] = msgspec.structs.replace(
            before, finished_id=finished_id, held=tuple(held)
        )
        images = [x for x in self.news[n_before:] if isinstance(x, r.PutTrial)]
        self.news += r.first_params(images)

    def _study_of_held(self, trial_id: int) -> int | None:
        for study in self.known.values():
            if trial_id in study.held:
                return study.study_id
        return None

    def _read_trial(self, trial_id: int, study_id: int | None) -> None:
        if trial_id in self._sent:
            return
        try:
            trial = self._methods.get_trial(trial_id)
        except KeyError:
            if study_id is not None:
                self._read_study(study_id)  # deleted, with its trials
            return
        if study_id is None:
            study_id = self._study_of(trial)
        if study_id is None:
            return
        self._put_trial(trial, study_id)
        known = self.known[study_id]
        if not trial.state.is_finished() and trial_id not in known.held:
            self.known[study_id] = msgspec.structs.replace(known, held=(*known.held, trial_id))

    def _study_of(self, trial: FrozenTrial) -> int | None:
        """No storage tells the study of a trial, but the trial of a study and a number."""
        for study in self._methods.get_all_studies():
            try:
                found = self._methods.get_trial_id_from_study_id_trial_number(
                    study._study_id, trial.number
                )
            except KeyError:
                continue
            if found == trial._trial_id:
                if study._study_id not in self.known:
                    self._read_study(study._study_id)
                return study._study_id
        return None

    def _put_trial(self, trial: FrozenTrial, study_id: int) -> None:
        self._sent.add(trial._trial_id)
        self.news.append(trial_image(trial, study_id))
