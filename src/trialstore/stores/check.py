"""Every invariant of a store that can be checked, without writing a byte to it.

A journal is read record by record, past whatever is damaged, and followed with as little as is
needed to judge a record: who has been created, and what state it is in. Tables answer questions
in SQL (``logs/relational/findings.py``). What is behind a gRPC server is checked as it is told.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
import math
from typing import Any, Final

import msgspec
from optuna.distributions import BaseDistribution, CategoricalDistribution

from trialstore import records as r
from trialstore.contents import parse_distribution
from trialstore.findings import Finding
from trialstore.log import Entries, Inspectable, Log
from trialstore.replica import Replica
from trialstore.scan import Scan
from trialstore.snapshot import restore_base
from trialstore.stores.salvage import Salvaged, read_entry


class Report(msgspec.Struct, frozen=True):
    """What a check found, and how much it looked at.

    Args:
        findings: In the order of the store.
        n_studies: That are there.
        n_trials: Of those studies.
        n_records: Of a journal; 0 for tables.
        not_counted: Why no studies and trials are told of, in a sentence.
    """

    findings: list[Finding]
    n_studies: int
    n_trials: int
    n_records: int
    not_counted: str | None = None

    @property
    def by_severity(self) -> dict[str, int]:
        return dict(Counter(finding.severity for finding in self.findings))


def check(
    log: Log, *, deep: bool = False, progress: Callable[[int], None] = lambda n: None
) -> Report:
    """Look at everything that a log keeps.

    Args:
        log: Read only; others may go on writing to it.
        deep: Also what takes long: every page of a SQLite file, every trial of tables.
        progress: Called now and then with how many records or trials were looked at.

    Raises:
        LogUnavailableError: The log was not reached.
    """
    findings = list(log.findings(deep=deep)) if isinstance(log, Inspectable) else []
    if isinstance(log, Entries):
        audit = Audit(restore_base(log)[0].replica)
        for n, entry in enumerate(log.entries(), 1):
            findings += audit.take(read_entry(entry))
            if n % 10_000 == 0:
                progress(n)
        return Report(findings, len(audit.studies), audit.n_trials, audit.n_records)
    kinds = {finding.kind for finding in findings}
    if not kinds.isdisjoint(_UNREADABLE):
        return Report(findings, 0, 0, 0, _OLDER if "schema-version" in kinds else _DAMAGED)
    scan = Scan(log)
    n_trials = 0
    if deep or not isinstance(log, Inspectable):
        for study in scan.studies:
            for _ in scan.trials(study.study_id):
                n_trials += 1
                if n_trials % 10_000 == 0:
                    progress(n_trials)
    else:
        n_trials = sum(map(scan.n_trials, scan.studies))
    return Report(findings, len(scan.studies), n_trials, 0)


_UNREADABLE: Final = ("file-damaged", "table-missing", "column-missing")

_DAMAGED: Final = "Studies are not counted: what is damaged holds them."
_OLDER: Final = (
    "Studies are not counted: the tables are of another version. "
    "`trialstore upgrade` brings older ones up."
)


# --- journals ------------------------------------------------------------------------------------

_SEQS_MAX: Final = 4096


class _Study:
    __slots__ = ("id", "n_objectives", "n_trials", "name")

    def __init__(self, study_id: int, name: str, n_objectives: int) -> None:
        self.id = study_id
        self.name = name
        self.n_objectives = n_objectives
        self.n_trials = 0


class Audit:
    """Follows a journal and says what is wrong with each record; 9 bytes a trial are held.

    What loses a race is no damage: a record on a finished trial or a deleted study, a name that
    is taken.

    Args:
        replica: What the records that were trimmed away had come to.
    """

    def __init__(self, replica: Replica) -> None:
        self.n_records = 0
        self.studies: dict[int, _Study] = {}
        self._names: set[str] = set()
        self._n_studies = 0
        self._study_of = array("q")
        self._states = bytearray()
        self._distributions: dict[str, BaseDistribution | None] = {}
        self._seqs: dict[str, dict[int, None]] = {}
        self._begin(replica)

    def _begin(self, replica: Replica) -> None:
        positions = replica.positions()
        self._n_studies = positions.next_study_id
        for study_id, length in positions.runs:
            self._study_of.extend([study_id] * length)
        self._states = bytearray([r.FAIL]) * len(self._study_of)
        for study_id in replica.study_ids():
            image = replica.study_image(study_id)
            study = _Study(study_id, image.study_name, len(image.directions))
            self.studies[study_id] = study
            self._names.add(image.study_name)
            for trial in replica.trial_images(study_id):
                study.n_trials += 1
                self._states[trial.trial_id] = trial.state

    @property
    def newest_study(self) -> int | None:
        """Id of the study that the last trial was created in, or of the last one that is there."""
        if self._study_of and self._study_of[-1] in self.studies:
            return self._study_of[-1]
        return next(reversed(self.studies), None)

    @property
    def n_created(self) -> int:
        """Trials, those of deleted studies as well."""
        return len(self._study_of)

    @property
    def n_trials(self) -> int:
        """Of studies that are there."""
        return sum(study.n_trials for study in self.studies.values())

    def take(self, salvaged: Salvaged) -> Iterator[Finding]:
        """What is wrong with the next record."""
        self.n_records += 1
        where = salvaged.entry.where
        if salvaged.kind:
            yield Finding(salvaged.kind, where, salvaged.message, salvaged.severity)
        record = salvaged.record
        if record is None:
            return
        if not self._is_new(record):
            message = f"Record {record.seq} of {record.worker_id} is there twice."
            yield Finding("record-double", where, message)
        for kind, message in self._judge(record):
            yield Finding(kind, where, message, _SEVERITIES.get(kind, "warning"))

    def _is_new(self, record: r.Operation) -> bool:
        if record.seq < 0:
            return True
        recent = self._seqs.setdefault(record.worker_id, {})
        if record.seq in recent:
            return False
        recent[record.seq] = None
        if len(recent) > _SEQS_MAX:
            del recent[next(iter(recent))]
        return True

    def _judge(self, record: Any) -> Iterator[tuple[str, str]]:
        if isinstance(record, r.CreateStudy):
            yield from self._create_study(record)
        elif isinstance(record, _ON_STUDY):
            if self._is_missing_study(record.study_id):
                yield "study-unknown", f"There never was a study with id {record.study_id}."
            elif isinstance(record, r.DeleteStudy) and record.study_id in self.studies:
                self._names.discard(self.studies.pop(record.study_id).name)
            elif isinstance(record, r.CreateTrial) and record.study_id in self.studies:
                yield from self._create_trial(record, self.studies[record.study_id])
        elif not isinstance(record, r.Ignored):
            yield from self._write_trial(record)
        elif record.left_out:
            yield "value-unreadable", f"What it says is left out: {record.left_out}."

    def _create_study(self, record: r.CreateStudy) -> Iterator[tuple[str, str]]:
        if record.study_name in self._names:
            return
        self._names.add(record.study_name)
        study_id = self._n_studies
        self._n_studies += 1
        self.studies[study_id] = _Study(study_id, record.study_name, len(record.directions))
        if not record.directions:
            yield "directions-missing", f"Study {record.study_name!r} has no direction."
        for direction in record.directions:
            if direction not in (0, 1, 2):
                yield "direction-unknown", f"{direction} is no direction."

    def _is_missing_study(self, study_id: int) -> bool:
        # -1 is what fills a hole in Redis: a study that nobody can have meant.
        return study_id >= self._n_studies or study_id < -1

    def _create_trial(self, record: r.CreateTrial, study: _Study) -> Iterator[tuple[str, str]]:
        self._study_of.append(study.id)
        study.n_trials += 1
        values = record.values if record.value is None else [record.value]
        self._states.append(r.FAIL)
        yield from self._state(len(self._states) - 1, record.state, values, study)
        for name, internal in record.params.items():
            yield from self._param(name, internal, record.distributions.get(name))
        for step in record.intermediate_values:
            if not step.lstrip("-").isdigit():
                yield "step-unreadable", f"{step!r} is no step."
        yield from _times(record.datetime_start, record.datetime_complete)

    def _write_trial(self, record: Any) -> Iterator[tuple[str, str]]:
        trial_id = record.trial_id
        if not 0 <= trial_id < len(self._states):
            yield "trial-unknown", f"There is no trial with id {trial_id} before this record."
            return
        study = self.studies.get(self._study_of[trial_id])
        if study is None or self._states[trial_id] in r.FINISHED:
            return
        if isinstance(record, r.SetTrialParam):
            yield from self._param(
                record.param_name, record.param_value_internal, record.distribution
            )
        elif isinstance(record, r.SetTrialStateValues):
            yield from self._state(trial_id, record.state, record.values, study)
            yield from _times(record.datetime_start, record.datetime_complete)

    def _state(
        self, trial_id: int, state: int, values: list[float] | None, study: _Study
    ) -> Iterator[tuple[str, str]]:
        if not 0 <= state <= r.WAITING:
            yield "state-unknown", f"{state} is no state."
            return
        self._states[trial_id] = state
        if values is not None and len(values) != study.n_objectives:
            yield "values-many", f"{len(values)} values for {study.n_objectives} objectives."
        elif values is not None and any(math.isnan(value) for value in values):
            yield "value-unreadable", f"The values {values} hold NaN."
        elif state == r.COMPLETE and values is None:
            yield "values-missing", f"Trial id {trial_id} is COMPLETE and has no values."

    def _param(self, name: str, internal: float, text: str | None) -> Iterator[tuple[str, str]]:
        if text is None:
            yield "distribution-unreadable", f"Parameter {name!r} has no distribution."
            return
        if text not in self._distributions:
            try:
                self._distributions[text] = parse_distribution(text)
            except Exception:
                # Whatever Optuna raises on what is not its own.
                self._distributions[text] = None
        distribution = self._distributions[text]
        if distribution is None:
            yield "distribution-unreadable", f"Parameter {name!r}: {text[:80]!r}."
        elif isinstance(distribution, CategoricalDistribution):
            n = len(distribution.choices)
            if not 0 <= internal < n:
                yield "param-value", f"Parameter {name!r}: {internal} is no index of {n} choices."
        elif not math.isfinite(internal):
            yield "param-value", f"Parameter {name!r} is {internal}."


_ON_STUDY: Final = (
    r.DeleteStudy,
    r.SetStudyUserAttr,
    r.SetStudySystemAttr,
    r.CreateTrial,
)
_SEVERITIES: Final[dict[str, Any]] = {"trial-unknown": "error", "study-unknown": "error"}


def _times(*texts: str | None) -> Iterator[tuple[str, str]]:
    for text in texts:
        if text is None:
            continue
        try:
            r.parse_time(text)
        except ValueError:
            yield "time-unreadable", f"{text!r} is no time."
