"""Optuna's contract over a replica and a log: judge, exchange, answer.

Every method of ``BaseStorage`` is here once, for every log. A write becomes one record. It is
judged against the replica first, so that what is refused leaves no byte behind, and then either
exchanged at once or put off in the outbox. A read exchanges first and is answered by the replica.
How exchanges run is in ``exchange.py``, the rules about studies and trials are in ``replica.py``,
and which values are taken at all is in ``checks.py``.

*The trial is the unit of durability.* Writes on a study, and those that create a trial or change
its state, are durable when the call returns. A parameter, attribute or intermediate value of a
trial that this storage created or claimed reaches the log with the next exchange, at the latest
``linger_s`` later, and always before or together with the next state write of its trial.

This class asks its log for capabilities (``log.py``), never which log it is.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
import contextlib
import copy
from datetime import datetime
import functools
import logging
import math
from typing import Any, TypeVar, cast
import unicodedata
import uuid
import warnings
import weakref

import optuna
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from trialstore import checks, records as r, stale
from trialstore.callbacks import HAS_NEW_NAMES, StaleTrialCallback, as_retry
from trialstore.clock import CLOCK, Clock
from trialstore.contents import parse_distribution
from trialstore.exchange import Alone, Exchanger
from trialstore.heartbeat import Heartbeat
from trialstore.log import (
    NEXT_MIN,
    NOTHING,
    Audible,
    Catalogue,
    LeaseStore,
    Limited,
    Log,
    Wanted,
)
from trialstore.records import ACCEPTED, Outcome, Verdict
from trialstore.replica import Replica
from trialstore.scan import Scan
from trialstore.waiting import WaitingTrials
from trialstore.watch import POLL_S, Change, watch

_logger = logging.getLogger("trialstore")
# Below Optuna's, whose verbosity and handler decide who sees it: it is how a user without a name
# of their own learns the study's.
_study_logger = logging.getLogger("optuna.storages.trialstore")

_T = TypeVar("_T")

_STUDY_NAME_PREFIX = "no-name-"
_WAITING_ONLY = (TrialState.WAITING,)
_READ_AT_MAX = 4096
_OF_THIS_PROCESS = (
    "_exchanger",
    "_owned",
    "_fresh",
    "_lost_last",
    "_limits",
    "_heartbeat",
    "_followed",
    "_asked",
)
_ASKED_MAX = 32
"""So often a catalogue is asked about a study before its trials are followed instead: a question
there costs a walk over the study, about a thirtieth of reading it once and for all."""


class Storage(BaseStorage, BaseHeartbeat):
    """A storage for ``optuna.create_study(storage=...)`` over any log.

    Args:
        log: Where records are kept.
        linger_s: For how long a deferred write may wait for an exchange to ride along with;
            0 writes everything through.
        max_staleness_s: How old an answer may be; 0 means never older than the call.
        alone: Nothing leaves this process: the log gets no records, and attributes and
            categorical choices may be any objects and are not copied.
        heartbeat_interval: Seconds between two beats for the trials that this storage runs; None
            is without heartbeat. May be set later, as the next two.
        grace_period: Seconds without a beat after which a trial is failed; None is twice the
            interval.
        heartbeat_stale_trial_callback: What is to be done about a failed trial.
        failed_trial_callback: The name of that until Optuna 4.9.
        clock: Time, for tests to replace.

    Raises:
        ValueError: An argument is out of range, or the log can't keep leases.
    """

    def __init__(
        self,
        log: Log,
        *,
        linger_s: float = 0.02,
        max_staleness_s: float = 0.0,
        alone: bool = False,
        heartbeat_interval: int | None = None,
        grace_period: int | None = None,
        heartbeat_stale_trial_callback: StaleTrialCallback | None = None,
        failed_trial_callback: StaleTrialCallback | None = None,
        clock: Clock = CLOCK,
    ) -> None:
        if not (0 <= linger_s < math.inf and max_staleness_s >= 0):
            raise ValueError(
                "linger_s must be 0 or more seconds and finite, max_staleness_s 0 or more; not "
                f"{linger_s} and {max_staleness_s}."
            )
        self._linger_s = linger_s
        self._max_staleness_s = max_staleness_s
        self._is_alone = alone
        # Times are text in records that leave this process; a replica takes both.
        self._now: Callable[[], Any] = datetime.now if alone else r.now_text
        self._time: Callable[[datetime], Any] = _same if alone else r.format_time
        self._attribute_value = checks.any_value if alone else checks.json_value
        self._clock = clock
        self._open(log)
        self._grace_period: int | None = None
        self.heartbeat_interval = heartbeat_interval
        self.grace_period = grace_period
        if failed_trial_callback is not None:
            if heartbeat_stale_trial_callback is not None:
                raise ValueError(
                    "heartbeat_stale_trial_callback and failed_trial_callback are two names of "
                    "one thing; give one."
                )
            if HAS_NEW_NAMES:
                warnings.warn(
                    "failed_trial_callback is called heartbeat_stale_trial_callback since Optuna "
                    "4.9.",
                    FutureWarning,
                    stacklevel=3,
                )
        self.heartbeat_stale_trial_callback = (
            heartbeat_stale_trial_callback or failed_trial_callback
        )

    def _open(self, log: Log) -> None:
        self._exchanger = (
            Alone(log, clock=self._clock)
            if self._is_alone
            else Exchanger(log, linger_s=self._linger_s, clock=self._clock)
        )
        # Trials that this storage created or claimed and that it has not finished; of the fresh
        # ones nothing has been written since.
        self._owned: dict[int, str] = {}
        self._fresh: dict[int, int] = {}  # to the number of exchanges made then
        self._lost_last: int | None = None  # the trial that it could not claim
        self._limits = log if isinstance(log, Limited) else None
        self._heartbeat: Heartbeat | None = None
        # Studies all of whose trials the replica has been given, and how often others were asked
        # about.
        self._followed: set[int] = set()
        self._asked: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        state = self.__dict__.copy()
        for name in _OF_THIS_PROCESS:
            del state[name]
        state["log"] = self._exchanger.log
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        log = state.pop("log")
        self.__dict__.update(state)
        self._open(log)

    @property
    def log(self) -> Log:
        """Where the records are kept."""
        return self._exchanger.log

    @property
    def _replica(self) -> Replica:
        return self._exchanger.replica

    # --- sessions --------------------------------------------------------------------------------

    def flush(self) -> None:
        """Bring every deferred write to the log.

        Raises:
            UpdateFinishedTrialError: Deferred writes were rejected, because their trials were
                finished or deleted by somebody else meanwhile.
            LogUnavailableError: The log was not reached; the writes go on waiting.
        """
        self._exchanger.flush()

    def remove_session(self) -> None:
        """As ``flush``; Optuna calls it at the end of ``optimize``."""
        self.flush()

    def close(self) -> None:
        """``flush``, stop beating, and release connections and files; a later call opens them.

        Trials that are left RUNNING are then not held for those of a dead worker.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self._exchanger.use_log, lambda log: log.close())
            if self._heartbeat is not None:
                stack.callback(self._heartbeat.withdraw)
            self.flush()

    def scan(self) -> Scan:
        """Everything that is stored, for somebody who reads it once and holds little of it."""
        self.flush()
        return Scan(self.log, use=self._exchanger.use_log)

    def watch(
        self, study_id: int, since: str | None = None, *, poll_s: float = POLL_S
    ) -> Iterator[Change]:
        """Changes of a study's trials, endlessly; each shows the trial as it is then.

        Args:
            study_id: The study.
            since: Cursor of the last change that was dealt with, from whatever process; None
                begins with all trials that are there.
            poll_s: How long to wait at most, when nothing is new, before the next look. A journal
                file and a Redis server tell sooner that somebody has written.

        Raises:
            KeyError: There is no such study, or not any more.
            ValueError: ``since`` is no cursor of this study.
            LogUnavailableError: The log is away; go on from the last cursor.
        """
        wanted = Wanted(trials_of=frozenset((study_id,)))
        return watch(
            lambda answer: self._read(wanted, answer), self._listening, study_id, since, poll_s
        )

    def _listening(self) -> contextlib.AbstractContextManager[Callable[[float], None]]:
        log = self._exchanger.log
        if isinstance(log, Audible):
            return log.listening()
        return contextlib.nullcontext(self._clock.sleep)

    def heard_within_s(self, study_id: int) -> dict[int, float]:
        """RUNNING trials with heartbeats, and a number of seconds within which the last one came;
        infinite where it is longer ago than an hour.

        Raises:
            KeyError: There is no such study.
        """
        if not isinstance(self._exchanger.log, LeaseStore):
            return {}
        try:
            return stale.heard_within_s(self._exchanger, study_id)
        except ValueError:  # behind this server nobody keeps leases
            return {}

    # --- the four ways to the log ----------------------------------------------------------------

    def _read(self, wanted: Wanted, answer: Callable[[Replica], _T]) -> _T:
        """Let the replica answer, of a moment after this call began or within the staleness."""
        exchanger = self._exchanger
        if not self._max_staleness_s:
            return self._ask(wanted, answer)
        with exchanger.mutex:
            if self._is_recent(wanted):
                return answer(exchanger.replica)
            read_at_s = exchanger.read_at_s
        began_s = self._clock.now_s()

        def note_and_answer(replica: Replica) -> _T:
            if len(read_at_s) >= _READ_AT_MAX:
                read_at_s.clear()
            read_at_s[wanted] = began_s
            return answer(replica)

        return self._ask(wanted, note_and_answer)

    def _ask(self, wanted: Wanted, answer: Callable[[Replica], _T]) -> _T:
        """Let the replica answer, of a moment after this call began."""
        exchanger = self._exchanger
        while True:
            n_anew = exchanger.n_anew
            # What waits in the outbox is of RUNNING trials: no part of an answer about others.
            exchanger.run((), wanted, carry=not wanted.finished_of)
            with exchanger.mutex:
                if exchanger.n_anew == n_anew:
                    self._followed |= wanted.trials_of | wanted.finished_of
                    return answer(exchanger.replica)
            # Another thread was interrupted meanwhile, and what was read was given up.

    def _catalogue(self, study_id: int) -> Catalogue | None:
        """Who answers about a study whose trials the replica does not hold, if that is cheaper
        than to follow them from now on."""
        log = self._exchanger.log
        if study_id in self._followed or not isinstance(log, Catalogue):
            return None
        asked = self._asked[study_id] = self._asked.get(study_id, 0) + 1
        return log if asked <= _ASKED_MAX else None

    def _is_recent(self, wanted: Wanted) -> bool:
        read_at_s = self._exchanger.read_at_s.get(wanted)
        if read_at_s is None or self._clock.now_s() - read_at_s > self._max_staleness_s:
            return False
        return not self._exchanger.has_deferred()

    def _judge(self, record: r.AnyOperation) -> Outcome:
        """What will become of a record, so that a refused one leaves no byte behind.

        What the replica refuses by what it knows may only be new to it: look before refusing.
        """
        with self._exchanger.mutex:
            outcome = self._replica.judge(record)
        return outcome if outcome is ACCEPTED else self._judge_again(record)

    def _judge_again(self, record: r.AnyOperation) -> Outcome:
        return self._ask(_judged_by(record), lambda replica: replica.judge(record))

    def _write(self, record: r.AnyOperation) -> Outcome:
        """Append a record, unless it would be refused, and say what became of it."""
        if self._limits is not None:
            self._limits.check((record,))
        outcome = self._judge(record)
        if outcome is not ACCEPTED:
            return outcome
        return self._run_write((record,), NOTHING)[0]

    def _run_write(self, records: Sequence[r.AnyOperation], wanted: Wanted) -> list[Outcome]:
        try:
            return self._exchanger.run(records, wanted)
        finally:
            # After it: what others have read meanwhile may be without it.
            self._exchanger.forget_reads()

    def write_if(
        self, decide: Callable[[Replica], Sequence[r.AnyOperation]], wanted: Wanted
    ) -> list[Outcome]:
        """Append what ``decide`` says of the replica, with nothing between that it has not seen.

        Args:
            decide: As ``Exchanger.run_if`` takes it; its records carry ``marks()``.
            wanted: What it looks at.

        Raises:
            RuntimeError: The log can't append on a condition.
            ValueError: A record holds what the log can't keep.
        """

        def decide_and_check(replica: Replica) -> Sequence[r.AnyOperation]:
            records = decide(replica)
            if self._limits is not None:
                self._limits.check(records)
            return records

        try:
            return self._exchanger.run_if(decide_and_check, wanted)
        finally:
            self._exchanger.forget_reads()

    def marks(self) -> dict[str, Any]:
        """What a record of this storage carries, once each."""
        return self._exchanger.marks()

    @property
    def clock(self) -> Clock:
        return self._clock

    def _write_trial(self, record: r.TrialWrite) -> None:
        """A parameter, attribute or intermediate value: put off if the trial is this storage's."""
        exchanger, trial_id = self._exchanger, record.trial_id
        checks.number(trial_id, "trial_id")
        exchanger.raise_rejected(trial_id)
        if self._limits is not None:
            self._limits.check((record,))
        with exchanger.mutex:
            outcome = self._replica.judge(record)
            put_off = outcome is ACCEPTED and self._may_put_off(record)
            if put_off:
                self._fresh.pop(trial_id, None)
                exchanger.forget_reads()
                outbox_is_full = exchanger.defer(record)
        if put_off:
            if outbox_is_full:
                exchanger.run((), NOTHING)
            return
        if outcome is not ACCEPTED:
            outcome = self._judge_again(record)
        if outcome is ACCEPTED:
            self._fresh.pop(trial_id, None)
            outcome = self._run_write((record,), self._first_use(record))[0]
        if outcome.verdict is not Verdict.ACCEPTED:
            raise self._refusal(record, outcome)

    def _may_put_off(self, record: r.TrialWrite) -> bool:
        """Not the first use of a name: it decides for the study what later ones must be
        compatible with, so the log judges it before anything is put off that relies on it."""
        return (
            self._linger_s != 0.0
            and self._owns(record.trial_id)
            and not self._is_first_use(record)
        )

    def _is_first_use(self, record: r.TrialWrite) -> bool:
        return isinstance(record, r.SetTrialParam) and self._replica.is_first_use(
            record.trial_id, record.param_name
        )

    def _first_use(self, record: r.TrialWrite) -> Wanted:
        with self._exchanger.mutex:
            if not isinstance(record, r.SetTrialParam) or not self._is_first_use(record):
                return NOTHING
            study_id = self._replica.study_id_of_trial(record.trial_id)
        return Wanted(params=frozenset(((study_id, record.param_name),)))

    def _owns(self, trial_id: int) -> bool:
        # A forked child shares the memory, but not the ownership: its worker_id is another.
        return self._owned.get(trial_id) == self._exchanger.worker_id

    def _refusal(self, record: Any, outcome: Outcome) -> Exception:
        """The error that Optuna's callers expect for a verdict."""
        verdict = outcome.verdict
        # A refusal says that what is known here is old.
        self._fresh.pop(getattr(record, "trial_id", -1), None)
        if verdict is Verdict.DUPLICATED_STUDY:
            return DuplicatedStudyError(
                f"A study with the name {record.study_name!r} exists already. Choose another "
                "name, or pass load_if_exists=True."
            )
        if verdict is Verdict.NO_STUDY:
            return KeyError(f"There is no study with id {record.study_id}.")
        if verdict is Verdict.NO_TRIAL:
            return KeyError(f"There is no trial with id {record.trial_id}.")
        if verdict is Verdict.INCOMPATIBLE:
            return ValueError(self._why_incompatible(record))
        return UpdateFinishedTrialError(self._why_finished(record.trial_id))

    def _why_incompatible(self, record: r.SetTrialParam) -> str:
        with self._exchanger.mutex:
            try:
                study_id = self._replica.study_id_of_trial(record.trial_id)
                known = self._replica.distribution(study_id, record.param_name)
            except KeyError:
                known = None
        why = "its distribution is incompatible with the one used before."
        if known is not None:
            try:
                check_distribution_compatibility(known, parse_distribution(record.distribution))
            except ValueError as error:
                why = f"{error} The study has {known}."
        return f"Parameter {record.param_name!r}: {why}"

    def _why_finished(self, trial_id: int) -> str:
        with self._exchanger.mutex:
            try:
                name = f"Trial {self._replica.trial_number(trial_id)}"
            except KeyError:
                name = f"The trial with id {trial_id}"
        return f"{name} is finished already and can't be changed any more."

    # --- studies ---------------------------------------------------------------------------------

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        codes = checks.direction_codes(directions)
        if study_name is None:
            study_name = _STUDY_NAME_PREFIX + str(uuid.uuid4())
        name = checks.text(study_name, "study_name")
        record = r.CreateStudy(study_name=name, directions=codes, **self._exchanger.marks())
        outcome = self._write(record)
        if outcome.verdict is not Verdict.ACCEPTED:
            self._refuse_another_spelling(name)
            raise self._refusal(record, outcome)
        _study_logger.info("A new study was created with the name %s.", name)
        return outcome.id

    def _refuse_another_spelling(self, name: str) -> None:
        """A log may hold names equal that are not; who goes on to load the study finds none.

        Raises:
            ValueError: There is a study of another name.
        """
        try:
            self.get_study_id_from_name(name)
        except KeyError:
            names = {study.study_name for study in self.get_all_studies()} - {name}
            alike = [one for one in names if _alike(one, name)]
            if not alike:
                return  # the study of this name was deleted meanwhile
            raise ValueError(
                f"A study can't be called {name!r} here: the log holds it equal to the name of "
                f"another study, {', '.join(map(repr, alike))}. Use that one, or a name that "
                "differs by more than case, accents or spaces at the end."
            ) from None

    def delete_study(self, study_id: int) -> None:
        self._write_study(r.DeleteStudy(study_id=study_id, **self._exchanger.marks()))

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        attr = self._attribute(key, value, "User")
        self._write_study(
            r.SetStudyUserAttr(study_id=study_id, user_attr=attr, **self._exchanger.marks())
        )

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        attr = self._attribute(key, value, "System")
        self._write_study(
            r.SetStudySystemAttr(study_id=study_id, system_attr=attr, **self._exchanger.marks())
        )

    def _attribute(self, key: str, value: Any, whose: str) -> dict[str, Any]:
        key = checks.text(key, f"{whose} attribute key")
        return {key: self._attribute_value(value, f"{whose} attribute {key!r}")}

    def _write_study(
        self, record: r.DeleteStudy | r.SetStudyUserAttr | r.SetStudySystemAttr
    ) -> None:
        checks.number(record.study_id, "study_id")
        outcome = self._write(record)
        if outcome.verdict is not Verdict.ACCEPTED:
            raise self._refusal(record, outcome)

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._read(
            Wanted(names=frozenset((study_name,))), lambda replica: replica.study_id(study_name)
        )

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._read_constant(study_id, lambda replica: replica.study_name(study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        directions = self._read_constant(study_id, lambda replica: replica.directions(study_id))
        if StudyDirection.NOT_SET in directions:
            # Somebody may set them, in the way of Optuna before version 3.
            directions = self._read(
                Wanted(studies=frozenset((study_id,))),
                lambda replica: replica.directions(study_id),
            )
        return directions

    def _read_constant(self, study_id: int, answer: Callable[[Replica], _T]) -> _T:
        """Names and directions never change: once known they need no exchange."""
        with self._exchanger.mutex:
            if self._replica.has_study(study_id):
                return answer(self._replica)
        return self._read(Wanted(studies=frozenset((study_id,))), answer)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        attrs = self._read(
            Wanted(studies=frozenset((study_id,))),
            lambda replica: replica.study_user_attrs(study_id),
        )
        return self._copied_attrs(attrs)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        attrs = self._read(
            Wanted(studies=frozenset((study_id,))),
            lambda replica: replica.study_system_attrs(study_id),
        )
        return self._copied_attrs(attrs)

    def _copied_attrs(self, attrs: dict[str, Any]) -> dict[str, Any]:
        return dict(attrs) if self._is_alone else copy.deepcopy(attrs)

    def get_all_studies(self) -> list[FrozenStudy]:
        return self._studies(Wanted(catalogue=True))

    def _studies(self, wanted: Wanted) -> list[FrozenStudy]:
        """Those that are known, among them the wanted ones."""
        studies = self._read(wanted, Replica.studies)
        for study in studies:
            study.user_attrs = self._copied_attrs(study.user_attrs)
            study.system_attrs = self._copied_attrs(study.system_attrs)
        return studies

    # --- trials ----------------------------------------------------------------------------------

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        checks.number(study_id, "study_id")
        exchanger = self._exchanger
        if template_trial is None:
            record = r.CreateTrial(
                study_id=study_id,
                datetime_start=self._now(),
                worker_id=exchanger.worker_id,
                seq=next(exchanger.seqs),
            )
        else:
            n_objectives = len(self.get_study_directions(study_id))
            fields = self.template_fields(template_trial, n_objectives)
            record = r.CreateTrial(study_id=study_id, **fields, **exchanger.marks())
        outcome = self._start(record) if record.state == r.RUNNING else self._write(record)
        if outcome.verdict is not Verdict.ACCEPTED:
            raise self._refusal(record, outcome)
        return outcome.id

    def template_fields(self, template: FrozenTrial, n_objectives: int) -> dict[str, Any]:
        """The fields of a ``CreateTrial``. Raises TypeError or ValueError for what is refused."""
        attribute = checks.any_copied_value if self._is_alone else checks.json_value
        return checks.template_fields(
            template, n_objectives, attribute, self._is_alone, self._time
        )

    def _start(self, record: r.CreateTrial | r.SetTrialStateValues) -> Outcome:
        """Write the creation or the claim of a trial that this storage is to run."""
        if self._heartbeat_interval is None:
            return self._write_and_own(record)
        return self._beats().covering(lambda: self._write_and_own(record))

    def _write_and_own(self, record: r.CreateTrial | r.SetTrialStateValues) -> Outcome:
        outcome = self._write(record)
        if outcome.verdict is Verdict.ACCEPTED:
            trial_id = outcome.id if isinstance(record, r.CreateTrial) else record.trial_id
            exchanger = self._exchanger
            with exchanger.mutex:
                self._owned[trial_id] = exchanger.worker_id
                self._fresh[trial_id] = exchanger.n_exchanges
        return outcome

    def _beats(self) -> Heartbeat:
        """Made when it is needed. It does not refer to this storage, which nobody need close."""
        exchanger = self._exchanger
        with exchanger.mutex:
            if self._heartbeat is None:
                running = functools.partial(_owned_running, exchanger, self._owned)
                self._heartbeat = Heartbeat(
                    exchanger, self._heartbeat_interval, running, self._clock
                )
                weakref.finalize(self, self._heartbeat.storage_dropped).atexit = False
            return self._heartbeat

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        name = checks.text(param_name, "A parameter name")
        value = checks.internal_value(param_value_internal, distribution, name)
        text = checks.distribution_text(distribution, name, any_choices=self._is_alone)
        exchanger = self._exchanger
        self._write_trial(
            r.SetTrialParam(
                trial_id=trial_id,
                param_name=name,
                param_value_internal=value,
                distribution=text,
                worker_id=exchanger.worker_id,
                seq=next(exchanger.seqs),
            )
        )

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        self._write_trial(
            r.SetTrialIntermediateValue(
                trial_id=trial_id,
                step=checks.step(step),
                intermediate_value=checks.intermediate_value(intermediate_value),
                **self._exchanger.marks(),
            )
        )

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        attr = self._attribute(key, value, "User")
        self._write_trial(
            r.SetTrialUserAttr(trial_id=trial_id, user_attr=attr, **self._exchanger.marks())
        )

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        attr = self._attribute(key, value, "System")
        self._write_trial(
            r.SetTrialSystemAttr(trial_id=trial_id, system_attr=attr, **self._exchanger.marks())
        )

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Claim, tell or requeue a trial.

        Returns:
            True if the state changed; False if the trial to be claimed is RUNNING already.

        Raises:
            KeyError: There is no such trial.
            UpdateFinishedTrialError: It is finished, be it by somebody else a moment ago; or what
                was put off of it was rejected, and its state is as it was.
            ValueError: ``values`` hold NaN or are not one per objective.
        """
        checks.number(trial_id, "trial_id")
        exchanger = self._exchanger
        exchanger.raise_rejected(trial_id)
        code = checks.trial_state(state)
        now = self._now()
        record = r.SetTrialStateValues(
            trial_id=trial_id,
            state=code,
            values=checks.objective_values(values, self._n_objectives(trial_id)),
            datetime_start=now if code == r.RUNNING else None,
            datetime_complete=now if code in r.FINISHED else None,
            worker_id=exchanger.worker_id,
            seq=next(exchanger.seqs),
        )
        if code == r.RUNNING:
            outcome = self._start(record)
            if outcome.verdict is not Verdict.ACCEPTED:
                self._lost_last = trial_id
            if outcome.verdict is Verdict.LOST:
                self._fresh.pop(trial_id, None)
                return False
        else:
            self._wait_for_the_asker(trial_id)
            try:
                outcome = self._write(record)
            except ValueError:
                exchanger.raise_rejected(trial_id)
                raise
        if outcome.verdict is not Verdict.ACCEPTED:
            raise self._refusal(record, outcome)
        if code != r.RUNNING:
            with exchanger.mutex:
                self._owned.pop(trial_id, None)
                self._fresh.pop(trial_id, None)
        return True

    def _n_objectives(self, trial_id: int) -> int:
        exchanger = self._exchanger
        with exchanger.mutex:
            try:
                return exchanger.replica.n_objectives_of_trial(trial_id)
            except KeyError:
                pass
        return self._read(
            Wanted(trials=frozenset((trial_id,))),
            lambda replica: replica.n_objectives_of_trial(trial_id),
        )

    def _wait_for_the_asker(self, trial_id: int) -> None:
        """Of another storage's RUNNING trial: what that one put off must arrive first."""
        if self._is_alone or self._owns(trial_id):
            return
        with self._exchanger.mutex:
            is_running = self._replica.is_running(trial_id)
        if is_running:
            self._clock.sleep(2 * self._linger_s)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        trial = self._trial(trial_id)
        # Not before: this very read may have carried what is rejected, and study.optimize reads a
        # trial that it could not tell once more, and must get an answer then.
        self._exchanger.raise_rejected(trial_id)
        return trial

    def _trial(self, trial_id: int) -> FrozenTrial:
        exchanger = self._exchanger
        with exchanger.mutex:
            just_made = self._fresh.pop(trial_id, None) == exchanger.n_exchanges
            if just_made and self._owns(trial_id):
                return self._replica.trial(trial_id)
            if self._replica.is_finished(trial_id):
                return self._replica.finished_trial(trial_id)
            may_look_ahead = self._owns(trial_id)
            # Of this moment: what leaves the outbox while this reads need not be in what it reads.
            ahead = exchanger.put_off(trial_id)
        wanted = Wanted(trials=frozenset((trial_id,)))
        if may_look_ahead and not self._max_staleness_s:
            # What was put off goes with the trial's state, in one append, and is shown as if it
            # were there. What the log refuses of it keeps the trial from being told.
            exchanger.run((), wanted, carry=False)
            with exchanger.mutex:
                if self._replica.is_running(trial_id):
                    return self._replica.trial(trial_id, ahead)
        return self._read(wanted, lambda replica: replica.trial(trial_id))

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        wanted = _trials_wanted(study_id, states)
        if wanted.waiting_of and not deepcopy:
            # Optuna asks for the queue before each trial, and takes the first: to look over all
            # of it, there or here, would cost more than everything else about that trial.
            queue = self._waiting(_next_of(study_id))
            if queue:
                queue = WaitingTrials(
                    queue,
                    NEXT_MIN,
                    read_above=lambda above: self._waiting(wanted, above),
                    is_lost=lambda trial_id: trial_id == self._lost_last,
                )
            return cast(list[FrozenTrial], queue)
        trials = self._read(wanted, lambda replica: replica.trials(study_id, states))
        if deepcopy:
            return [self._copied_trial(trial) for trial in trials]
        return trials

    def _waiting(self, wanted: Wanted, above: int = -1) -> Sequence[FrozenTrial]:
        exchanger = self._exchanger
        (study_id,) = wanted.waiting_of | wanted.next_of
        return self._read(
            wanted, lambda replica: replica.waiting(study_id, lambda: exchanger.mutex, above)
        )

    def _copied_trial(self, trial: FrozenTrial) -> FrozenTrial:
        """Distributions are never edited by anybody and are shared."""
        return FrozenTrial(
            trial_id=trial._trial_id,
            number=trial.number,
            state=trial.state,
            value=None,
            values=trial.values,
            datetime_start=trial.datetime_start,
            datetime_complete=trial.datetime_complete,
            params=dict(trial.params),
            distributions=dict(trial.distributions),
            user_attrs=copy.deepcopy(trial.user_attrs),
            system_attrs=copy.deepcopy(trial.system_attrs),
            intermediate_values=dict(trial.intermediate_values),
        )

    def get_n_trials(
        self, study_id: int, state: tuple[TrialState, ...] | TrialState | None = None
    ) -> int:
        states = (state,) if isinstance(state, TrialState) else state
        catalogue = self._catalogue(study_id)
        if catalogue is not None:
            counts = self._exchanger.use_log(lambda log: log.counts(study_id))
            if counts is None:
                raise KeyError(f"There is no study with id {study_id}.")
            return sum(n for code, n in counts.items() if states is None or code in states)
        return self._read(
            _trials_wanted(study_id, states), lambda replica: replica.count(study_id, states)
        )

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        directions = self.get_study_directions(study_id)
        if len(directions) == 1 and self._catalogue(study_id) is not None:
            maximize = directions[0] == StudyDirection.MAXIMIZE
            best_id = self._exchanger.use_log(lambda log: log.best_trial_id(study_id, maximize))
            if best_id is not None:
                trial = self.get_trial(best_id)
                if trial.state == TrialState.COMPLETE:
                    return trial
                # Its values can't be read; the replica knows which is the best of the others.
        wanted = _finished_of(study_id)
        if len(directions) > 1:
            wanted = Wanted(studies=frozenset((study_id,)))
        return self._read(wanted, lambda replica: replica.best_trial(study_id))

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        with self._exchanger.mutex:
            try:
                return self._replica.trial_id(study_id, trial_number)
            except KeyError:
                pass
        return self._read(
            Wanted(numbers=frozenset(((study_id, trial_number),))),
            lambda replica: replica.trial_id(study_id, trial_number),
        )

    def get_trial_number_from_id(self, trial_id: int) -> int:
        with self._exchanger.mutex:
            if self._replica.has_trial(trial_id):
                return self._replica.trial_number(trial_id)
        return self.get_trial(trial_id).number

    def get_trial_param(self, trial_id: int, param_name: str) -> float:
        trial = self.get_trial(trial_id)
        if param_name not in trial.distributions:
            raise KeyError(f"Trial {trial.number} has no parameter {param_name!r}.")
        return trial.distributions[param_name].to_internal_repr(trial.params[param_name])

    def check_trial_is_updatable(self, trial_id: int, trial_state: TrialState) -> None:
        """Raises UpdateFinishedTrialError if the given state is a finished one."""
        if trial_state.is_finished():
            raise UpdateFinishedTrialError(self._why_finished(trial_id))

    # --- heartbeats ------------------------------------------------------------------------------

    @property
    def heartbeat_interval(self) -> int | None:
        """Seconds between two beats; None is without heartbeat."""
        return self._heartbeat_interval

    @heartbeat_interval.setter
    def heartbeat_interval(self, interval_s: int | None) -> None:
        checks.duration(interval_s, "heartbeat_interval")
        log = self._exchanger.log
        if interval_s is not None and not isinstance(log, LeaseStore):
            raise ValueError(
                f"heartbeat_interval can't be set: {log!r} keeps no leases. A backend of your own "
                "needs the methods of trialstore.log.LeaseStore for it."
            )
        self._heartbeat_interval = interval_s
        self._warn_of_a_short_grace()
        if self._heartbeat is not None:
            self._heartbeat.set_interval(interval_s)

    @property
    def grace_period(self) -> int | None:
        """Seconds without a beat after which a trial is failed; None is twice the interval."""
        return self._grace_period

    @grace_period.setter
    def grace_period(self, grace_period_s: int | None) -> None:
        checks.duration(grace_period_s, "grace_period")
        self._grace_period = grace_period_s
        self._warn_of_a_short_grace()

    def _warn_of_a_short_grace(self) -> None:
        interval_s = self._heartbeat_interval
        if interval_s is not None and self._grace_period_s() <= interval_s:
            _logger.warning(
                "A grace_period of %s s ends before the next beat of a living worker, whose trial "
                "is then failed; heartbeat_interval is %s s.",
                self._grace_period,
                interval_s,
            )

    @property
    def failed_trial_callback(self) -> StaleTrialCallback | None:
        """The name of ``heartbeat_stale_trial_callback`` until Optuna 4.9."""
        return self.heartbeat_stale_trial_callback

    @failed_trial_callback.setter
    def failed_trial_callback(self, callback: StaleTrialCallback | None) -> None:
        self.heartbeat_stale_trial_callback = callback

    def get_heartbeat_interval(self) -> int | None:
        return self._heartbeat_interval

    def is_heartbeat_enabled(self) -> bool:
        """Whether ``heartbeat_interval`` is set."""
        return self._heartbeat_interval is not None

    def get_heartbeat_stale_trial_callback(self) -> StaleTrialCallback | None:
        return self.heartbeat_stale_trial_callback

    def get_failed_trial_callback(self) -> StaleTrialCallback | None:
        return self.heartbeat_stale_trial_callback

    def record_heartbeat(self, trial_id: int) -> None:
        """Say that a trial's worker lives; of the storage's own trials it says so by itself.

        On a journal that is said of all trials of the worker that created or claimed this one.

        Raises:
            KeyError: There is no such trial.
            ValueError: The log keeps no leases.
        """
        exchanger, heartbeat = self._exchanger, self._beats()
        with exchanger.mutex:
            owns, known = self._owns(trial_id), self._replica.has_trial(trial_id)
        if owns and heartbeat.is_beating:
            return
        if not isinstance(exchanger.log, LeaseStore):
            raise ValueError(f"{exchanger.log!r} keeps no leases.")
        if owns:
            heartbeat.covering(lambda: None)
        elif not known:
            self.get_trial(trial_id)
        with exchanger.mutex:
            owner = self._replica.owner(trial_id)
        heartbeat.speak_for(trial_id, exchanger.worker_id if owns else owner)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Trials whose worker is dead, for ``optuna.storages.fail_stale_trials`` to fail.

        With a retry callback there are none left: they have been failed and queued again.

        Raises:
            KeyError: There is no such study.
            ValueError: Heartbeats are off.
        """
        found = self._find_stale(study_id)
        retry = as_retry(self.heartbeat_stale_trial_callback)
        if found and retry is not None:
            self._fail_stale(study_id, found)
            return []
        return list(found)

    def fail_stale_trials(self, study_id: int | None = None) -> list[int]:
        """Fail the trials whose worker is dead, and queue their retries.

        Args:
            study_id: Where to look; None is everywhere.

        Returns:
            Ids of the trials that this call failed; none while heartbeats are off.

        Raises:
            KeyError: There is no study with the id that is given.
        """
        if not self.is_heartbeat_enabled():
            return []
        if study_id is not None:
            return self._fail_stale(study_id, self._find_stale(study_id))
        failed: list[int] = []
        for study in self.get_all_studies():
            with contextlib.suppress(KeyError):  # deleted meanwhile
                failed += self.fail_stale_trials(study._study_id)
        return failed

    def is_any_covered(self, study_id: int, running: Mapping[int, str]) -> bool:
        """Whether other storages' leases cover any of these: then it ends, or is found dead.

        Args:
            study_id: Of the trials.
            running: RUNNING trials to their owners, "" where unknown.
        """
        others = {id_: owner for id_, owner in running.items() if not self._owns(id_)}
        if not others or not self.is_heartbeat_enabled():
            return False
        return not others.keys().isdisjoint(stale.covered(self._exchanger, study_id, others))

    def _grace_period_s(self) -> float:
        return self._grace_period or 2 * (self._heartbeat_interval or 0)

    def _find_stale(self, study_id: int) -> dict[int, str]:
        if self._heartbeat_interval is None:
            raise ValueError("Heartbeats are off: set heartbeat_interval.")
        found = stale.find(self._exchanger, study_id, self._grace_period_s())
        # This process may have been stopped for so long that its own trials look dead.
        return {id_: owner for id_, owner in found.items() if not self._owns(id_)}

    def _fail_stale(self, study_id: int, found: dict[int, str]) -> list[int]:
        if not found:
            return []
        callback = as_retry(self.heartbeat_stale_trial_callback)
        n_objectives = len(self.get_study_directions(study_id))

        def retry(trial: FrozenTrial) -> dict[str, Any] | None:
            template = callback.retry(trial) if callback is not None else None
            return None if template is None else self.template_fields(template, n_objectives)

        failed = stale.fail(
            self._exchanger, study_id, found, self._grace_period_s(), retry if callback else None
        )
        for trial_id in failed:
            _logger.warning(
                "Trial %d was failed: its worker has not been heard of for the grace period.",
                self.get_trial_number_from_id(trial_id),
            )
        return failed


def storage_of(study: optuna.Study) -> Storage:
    """The storage of a study. Raises TypeError if it is none of trialstore's."""
    storage = study._storage
    if isinstance(storage, Storage):
        return storage
    raise TypeError(
        f"The study is on a {type(storage).__name__}; this needs a storage of trialstore's."
    )


def _judged_by(record: r.AnyOperation) -> Wanted:
    """What has to be known to say what will become of a record."""
    if isinstance(record, r.CreateStudy):
        return Wanted(names=frozenset((record.study_name,)))
    if isinstance(record, r.CreateTrial):
        return _next_of(record.study_id)
    if isinstance(record, (r.DeleteStudy, r.SetStudyUserAttr, r.SetStudySystemAttr)):
        return Wanted(studies=frozenset((record.study_id,)))
    if isinstance(record, r.Ignored):
        return NOTHING
    return Wanted(trials=frozenset((record.trial_id,)))


def _trials_wanted(study_id: int, states: Container[TrialState] | None) -> Wanted:
    if states == _WAITING_ONLY or states == [TrialState.WAITING]:
        return _waiting_of(study_id)
    if states is None or TrialState.RUNNING in states or TrialState.WAITING in states:
        return _trials_of(study_id)
    return _finished_of(study_id)


# Asked for several times a trial, of the same few studies.


@functools.lru_cache
def _waiting_of(study_id: int) -> Wanted:
    return Wanted(waiting_of=frozenset((study_id,)))


@functools.lru_cache
def _next_of(study_id: int) -> Wanted:
    return Wanted(next_of=frozenset((study_id,)))


@functools.lru_cache
def _finished_of(study_id: int) -> Wanted:
    return Wanted(finished_of=frozenset((study_id,)))


@functools.lru_cache
def _trials_of(study_id: int) -> Wanted:
    return Wanted(trials_of=frozenset((study_id,)))


def _owned_running(exchanger: Exchanger, owned: dict[int, str]) -> list[int]:
    """Those of a storage's trials that it runs, as far as it knows; the mutex is held."""
    for trial_id in [id_ for id_ in owned if exchanger.replica.is_finished(id_)]:
        del owned[trial_id]  # told elsewhere
    return [trial_id for trial_id, owner in owned.items() if owner == exchanger.worker_id]


def _same(time: datetime) -> datetime:
    return time


def _alike(one: str, other: str) -> bool:
    """Whether names differ by no more than case, accents and spaces at the end."""

    def bare(name: str) -> str:
        letters = unicodedata.normalize("NFKD", name.casefold().rstrip())
        return "".join(x for x in letters if not unicodedata.combining(x))

    return bare(one) == bare(other)
