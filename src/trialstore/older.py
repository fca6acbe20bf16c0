"""What Optuna's ``RDBStorage`` could do before version 3, and what it tells of its schema.

Its callers made a study without directions and set them later, and a trial's values apart from its
state. Here each of these is a write of its own, seen by everybody at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import inspect
import itertools
from typing import Any, Final

from optuna.study import StudyDirection, StudySummary
from optuna.study._frozen import FrozenStudy
from optuna.trial import TrialState

from trialstore import checks, records as r
from trialstore.log import Wanted
from trialstore.records import Verdict
from trialstore.storage import Storage

_TRIALS_AT_ONCE: Final = 4_096
_HAS_SYSTEM_ATTRS: Final = "system_attrs" in inspect.signature(StudySummary).parameters
"""Whether a summary takes them, as before Optuna 5."""


class OlderMethods(Storage):
    """A storage with the older spellings as well; its log is ``Piecewise``, ``Versioned`` and has
    a ``Catalogue``."""

    # --- studies ---------------------------------------------------------------------------------

    def create_new_study(
        self,
        directions: Sequence[StudyDirection] | str | None = None,
        study_name: str | None = None,
    ) -> int:
        """Create a study.

        Args:
            directions: One per objective. The older spelling is without: the study has one
                objective, whose direction is NOT_SET until ``set_study_directions``; a name may
                then come first.
            study_name: Its name; generated if None.

        Raises:
            DuplicatedStudyError: A study has this name.
        """
        if isinstance(directions, str):
            if study_name is not None:
                raise TypeError("directions must be StudyDirection values, not a text.")
            directions, study_name = None, directions
        if directions is None:
            directions = (StudyDirection.NOT_SET,)
        return super().create_new_study(directions, study_name)

    def set_study_directions(self, study_id: int, directions: Sequence[StudyDirection]) -> None:
        """Give a study its directions, where they are NOT_SET yet.

        Raises:
            KeyError: There is no such study.
            ValueError: It has other directions already.
        """
        codes = checks.direction_codes(directions)
        verdict = self._exchanger.use_log(lambda log: log.set_directions(study_id, codes))
        if verdict is Verdict.NO_STUDY:
            raise KeyError(f"There is no study with id {study_id}.")
        self._exchanger.run((), Wanted(studies=frozenset((study_id,))))
        if verdict is Verdict.INCOMPATIBLE:
            known = ", ".join(known.name for known in self.get_study_directions(study_id))
            raise ValueError(f"The study with id {study_id} has directions already: {known}.")

    def get_all_study_summaries(self) -> list[StudySummary]:
        """A summary of each study, in order of id, without reading its trials but the best."""
        return self._summarized(self.get_all_studies(), None)

    def get_study_summary(self, study_name: str) -> StudySummary:
        """The same of one study, without looking at the others.

        Raises:
            KeyError: There is no study of that name.
        """
        known = self._studies(Wanted(names=frozenset((study_name,))))
        studies = [study for study in known if study.study_name == study_name]
        if not studies:
            raise KeyError(f"There is no study with the name {study_name!r}.")
        return self._summarized(studies, studies[0]._study_id)[0]

    def get_latest_study_name(self) -> str | None:
        """Of the study whose last trial ended last, the oldest of equals; None without a study."""
        summaries = self._exchanger.use_log(lambda log: log.summaries())
        ends = {study_id: one.datetime_complete or "" for study_id, one in summaries.items()}
        studies = self.get_all_studies()
        latest = max(studies, key=lambda study: ends.get(study._study_id, ""), default=None)
        return None if latest is None else latest.study_name

    def _summarized(
        self, studies: Sequence[FrozenStudy], study_id: int | None
    ) -> list[StudySummary]:
        summaries = self._exchanger.use_log(lambda log: log.summaries(study_id))
        found_ids = (one.best_trial_id for one in summaries.values())
        best_ids = [trial_id for trial_id in found_ids if trial_id is not None]
        for some in _parts(best_ids):
            self._exchanger.run((), Wanted(trials=frozenset(some)))
        found = []
        for study in studies:
            summary = summaries.get(study._study_id)
            start = summary.datetime_start if summary else None
            more: Any = {"system_attrs": study.system_attrs} if _HAS_SYSTEM_ATTRS else {}
            found.append(
                StudySummary(
                    study_name=study.study_name,
                    direction=None,
                    directions=study.directions,
                    best_trial=self._complete(summary.best_trial_id) if summary else None,
                    user_attrs=study.user_attrs,
                    n_trials=sum(summary.counts.values()) if summary else 0,
                    datetime_start=r.parse_time(start) if start else None,
                    study_id=study._study_id,
                    **more,
                )
            )
        return found

    def _complete(self, trial_id: int | None) -> Any:
        """A COMPLETE trial that the replica holds; None if it is none, or gone meanwhile."""
        if trial_id is None:
            return None
        with self._exchanger.mutex:
            try:
                trial = self._replica.finished_trial(trial_id)
            except KeyError:
                return None
        return trial if trial.state == TrialState.COMPLETE else None

    def read_trials_from_remote_storage(self, study_id: int) -> None:
        """Read what is new in a study; other methods do so by themselves.

        Raises:
            KeyError: There is no such study.
        """
        self._read(
            Wanted(trials_of=frozenset((study_id,))),
            lambda replica: replica.directions(study_id),
        )

    # --- trials ----------------------------------------------------------------------------------

    def set_trial_state(self, trial_id: int, state: TrialState) -> bool:
        """As ``set_trial_state_values`` without values; those set before stay.

        Returns:
            True if the state changed; False for a RUNNING trial that is to be RUNNING.

        Raises:
            KeyError: There is no such trial.
            RuntimeError: It is finished.
        """
        return self.set_trial_state_values(trial_id, state)

    def set_trial_values(self, trial_id: int, values: Sequence[float]) -> None:
        """Set the values of an unfinished trial, in place of any that it has.

        Raises:
            KeyError: There is no such trial.
            RuntimeError: It is finished.
            ValueError: The values hold NaN or are not one per objective.
        """
        self.get_trial(trial_id)
        checked = checks.objective_values(values, self._n_objectives(trial_id))
        verdict = self._exchanger.use_log(lambda log: log.set_values(trial_id, checked))
        if verdict is not Verdict.ACCEPTED:
            raise self._refusal(
                r.SetTrialStateValues(
                    trial_id=trial_id, state=r.RUNNING, values=checked, **self._exchanger.marks()
                ),
                r.Outcome(verdict),
            )
        self._exchanger.forget_reads()

    def get_study_id_from_trial_id(self, trial_id: int) -> int:
        """The study that a trial belongs to. Raises KeyError if there is no such trial."""
        self.get_trial_number_from_id(trial_id)
        with self._exchanger.mutex:
            return self._replica.study_id_of_trial(trial_id)

    # --- schema ----------------------------------------------------------------------------------

    def get_current_version(self) -> str:
        """The version of the tables as they are."""
        return str(self._exchanger.use_log(lambda log: log.get_current_version()))

    def get_head_version(self) -> str:
        """The latest version, on which this storage works."""
        return str(self._exchanger.use_log(lambda log: log.get_head_version()))

    def get_all_versions(self) -> list[str]:
        """All versions that there ever were, newest first."""
        return list(self._exchanger.use_log(lambda log: log.get_all_versions()))

    def upgrade(self) -> None:
        """Bring the tables to the latest version. Make a backup and stop all workers before.

        A storage over older tables opens with ``skip_compatibility_check=True``. Interrupted, the
        upgrade may be made again.

        Raises:
            IncompatibleSchemaError: The tables are of a newer version than this trialstore.
        """
        self._exchanger.use_log(lambda log: log.upgrade())


def _parts(items: list[int]) -> Iterator[list[int]]:
    rest = iter(items)
    return iter(lambda: list(itertools.islice(rest, _TRIALS_AT_ONCE)), [])
