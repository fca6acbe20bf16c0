"""From facts that were read under locks to one verdict per operation.

An exchange locks the trials and studies that it writes on, reads what decides (the *facts*), and
writes conditionally. Everything that happens after the lock is our own, so the verdicts follow
from the facts alone; a lost answer needs only the facts, which the mark keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna.distributions import check_distribution_compatibility, json_to_distribution

from trialstore import records as r
from trialstore.records import Operation, Outcome, Verdict

NO_STUDY = Outcome(Verdict.NO_STUDY)
NO_TRIAL = Outcome(Verdict.NO_TRIAL)
FINISHED = Outcome(Verdict.FINISHED)
LOST = Outcome(Verdict.LOST)
INCOMPATIBLE = Outcome(Verdict.INCOMPATIBLE)
DUPLICATED = Outcome(Verdict.DUPLICATED_STUDY)

STATE_NAMES = ("RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING")

_TRIAL_WRITES = (
    r.SetTrialParam,
    r.SetTrialStateValues,
    r.SetTrialIntermediateValue,
    r.SetTrialUserAttr,
    r.SetTrialSystemAttr,
)
_STUDY_WRITES = (r.CreateTrial, r.DeleteStudy, r.SetStudyUserAttr, r.SetStudySystemAttr)


class Touched:
    """The trials, studies and names that operations write on, each once and in order."""

    def __init__(self, records: Sequence[Operation]) -> None:
        self.trials = sorted({x.trial_id for x in records if isinstance(x, _TRIAL_WRITES)})
        self.studies = sorted({x.study_id for x in records if isinstance(x, _STUDY_WRITES)})
        self.names = list(
            dict.fromkeys(x.study_name for x in records if isinstance(x, r.CreateStudy))
        )
        self.numbered = sorted({x.study_id for x in records if isinstance(x, r.CreateTrial)})


class Facts:
    """What stood in the tables under our locks, kept up to date with what we write."""

    def __init__(self, text: str) -> None:
        """
        Args:
            text: Answer of ``statements.facts``.
        """
        trials, studies, names = text.split(";")
        self.trials: dict[int, list[str]] = {}
        for row in trials.split(",") if trials else ():
            trial_id, study_id, state = row.split(":")
            self.trials[int(trial_id)] = [study_id, state]
        self.studies = {int(one) for one in studies.split(",") if one}
        self.new_studies = [int(one) for one in names.split(",") if one]
        self.made: set[str] = set()
        self.first_params: dict[tuple[int, str], str | None] = {}

    @classmethod
    def of_trials(cls, rows: Sequence[tuple[int, int, str]]) -> Facts:
        """Facts about trials alone, as rows of ``statements.lock_trials``."""
        return cls(f"{','.join([f'{one}:{study}:{state}' for one, study, state in rows])};;")

    def judge(self, record: Operation) -> Outcome:
        """The verdict on the next operation; ids of what it creates are filled in later."""
        if isinstance(record, r.CreateStudy):
            if not self.new_studies or record.study_name in self.made:
                return DUPLICATED
            self.made.add(record.study_name)
            return r.ACCEPTED
        if isinstance(record, _STUDY_WRITES):
            if record.study_id not in self.studies:
                return NO_STUDY
            if isinstance(record, r.DeleteStudy):
                self.studies.discard(record.study_id)
            return r.ACCEPTED
        if not isinstance(record, _TRIAL_WRITES):
            return r.ACCEPTED
        trial = self.trials.get(record.trial_id)
        if trial is None:
            return NO_TRIAL
        study_id, state = trial
        if state not in ("RUNNING", "WAITING"):
            return FINISHED
        if isinstance(record, r.SetTrialStateValues):
            if record.state == r.RUNNING and state == "RUNNING":
                return LOST
            trial[1] = STATE_NAMES[record.state]
        elif isinstance(record, r.SetTrialParam):
            return self._judge_param(record, (int(study_id), record.param_name))
        return r.ACCEPTED

    def _judge_param(self, record: r.SetTrialParam, pair: tuple[int, str]) -> Outcome:
        if pair not in self.first_params:
            return r.ACCEPTED
        first = self.first_params[pair]
        if first is None:
            self.first_params[pair] = record.distribution
        elif not compatible(first, record.distribution):
            return INCOMPATIBLE
        return r.ACCEPTED


def compatible(first: str, other: str) -> bool:
    """Whether Optuna lets both be distributions of one parameter; an unreadable first forbids
    nothing."""
    if first == other:
        return True
    try:
        known = json_to_distribution(first)
    except Exception:
        return True
    try:
        check_distribution_compatibility(known, json_to_distribution(other))
    except ValueError:
        return False
    return True
