"""What a replica holds of studies and trials, and the forms in which it is handed out.

There is no rule here about what may happen to a trial; those are in ``replica.py``.

``FrozenTrial`` objects are built when somebody reads them, once for a finished trial, and
replaced, never edited, so an earlier read never changes. A finished trial's slot holds the working
contents until then and the ``FrozenTrial`` afterwards, not both.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from datetime import datetime
import functools
import logging
import math
from typing import Any, Final

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from trialstore import records as r
from trialstore.waiting import Waiting

_logger = logging.getLogger("trialstore")

# Trials of more kinds than this (which parameters, and their distributions) share no more.
_KINDS_MAX: Final = 1024

STATES: Final = tuple(TrialState(code) for code in range(len(TrialState)))
_DROPPED: Final[dict[Any, Any]] = {}
_UNFINISHED: Final = frozenset({TrialState.RUNNING, TrialState.WAITING})


class TrialContents:
    """Working contents of a trial; ``params`` are external representations."""

    __slots__ = (
        "complete",
        "distributions",
        "id",
        "index",
        "intermediate_values",
        "number",
        "owner",
        "params",
        "start",
        "state",
        "study",
        "system_attrs",
        "user_attrs",
        "values",
        "view",
    )

    def __init__(self, trial_id: int, number: int, study: StudyContents) -> None:
        self.id = trial_id
        self.number = number
        self.study = study
        self.index = -1
        self.state = r.RUNNING
        self.values: list[float] | None = None
        # Text until somebody reads the trial: most that are replayed are never read.
        self.start: str | datetime | None = None
        self.complete: str | datetime | None = None
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}
        self.user_attrs: dict[str, Any] = {}
        self.system_attrs: dict[str, Any] = {}
        self.intermediate_values: dict[int, float] = {}
        self.owner = ""
        self.view: FrozenTrial | None = None  # an unfinished trial as get_all_trials shows it

    def warn_unreadable(self, field: str, why: object) -> None:
        _logger.warning(
            "Study %r, trial %d: its %s can't be read and is left out (%s).",
            self.study.name,
            self.number,
            field,
            why,
        )

    def build(self, *, own_containers: bool) -> FrozenTrial:
        """The trial as Optuna wants it.

        ``Trial`` edits the dictionaries of the unfinished trial that it was given, so such a
        trial gets its own; a finished one is never edited and shares them.
        """
        if isinstance(self.start, str):
            self.start = self._parsed("datetime_start", self.start)
        if isinstance(self.complete, str):
            self.complete = self._parsed("datetime_complete", self.complete)
        own = own_containers
        return FrozenTrial(
            trial_id=self.id,
            number=self.number,
            state=STATES[self.state],
            value=None,
            values=self.values,
            datetime_start=self.start,
            datetime_complete=self.complete,
            params=self.params.copy() if own else self.params,
            distributions=self.distributions.copy() if own else self.distributions,
            user_attrs=self.user_attrs.copy() if own else self.user_attrs,
            system_attrs=self.system_attrs.copy() if own else self.system_attrs,
            intermediate_values=(
                self.intermediate_values.copy() if own else self.intermediate_values
            ),
        )

    def apart(self) -> TrialContents:
        """A copy with containers of its own."""
        apart = TrialContents(self.id, self.number, self.study)
        apart.index, apart.state, apart.owner = self.index, self.state, self.owner
        apart.values, apart.start, apart.complete = self.values, self.start, self.complete
        apart.params, apart.distributions = dict(self.params), dict(self.distributions)
        apart.user_attrs, apart.system_attrs = dict(self.user_attrs), dict(self.system_attrs)
        apart.intermediate_values = dict(self.intermediate_values)
        return apart

    def shared_view(self) -> FrozenTrial:
        """The unfinished trial as it stands, one object for all readers until it changes."""
        if self.view is None:
            self.view = self.build(own_containers=True)
        return self.view

    def about_to_change(self) -> None:
        """To be called before a change of the unfinished trial: who has read the queue may look
        at its trials later, and sees them as they were; readers from now on see the change."""
        if self.state == r.WAITING:
            self.study.waiting.renew()
        self.view = None

    def _parsed(self, field: str, text: str) -> datetime | None:
        try:
            return r.parse_time(text)
        except ValueError as error:
            self.warn_unreadable(field, error)
            return None


class StudyContents:
    """A study and the indexes over its trials."""

    __slots__ = (
        "best_id",
        "best_value",
        "counts",
        "directions",
        "distributions",
        "id",
        "in_order",
        "interned",
        "kinds",
        "loaded",
        "n_created",
        "name",
        "slots",
        "system_attrs",
        "unfinished",
        "unread",
        "user_attrs",
        "waiting",
    )

    def __init__(self, study_id: int, name: str, directions: list[StudyDirection]) -> None:
        self.id = study_id
        self.name = name
        self.directions = directions
        self.user_attrs: dict[str, Any] = {}
        self.system_attrs: dict[str, Any] = {}
        # Whether trials are held; if not, only n_created is kept.
        self.loaded = True
        self.n_created = 0
        # By trial id once in_order; on a sequential log the index is the trial number.
        self.slots: list[TrialContents | FrozenTrial] = []
        self.in_order = True
        self.unread: set[int] = set()  # indexes of finished trials that are not built yet
        self.unfinished: dict[int, TrialContents] = {}  # by trial id
        self.waiting = Waiting()
        self.counts = [0] * len(STATES)
        self.best_id: int | None = None
        self.best_value = math.nan
        self.distributions: dict[str, BaseDistribution] = {}  # of the first use of each name
        self.interned: dict[str, BaseDistribution] = {}  # by JSON: equal ones are one object
        self.kinds: dict[tuple[object, ...], dict[str, BaseDistribution]] = {}

    def let_go(self) -> None:
        """Of its trials, when nobody reads it any more; whoever has some of them keeps those."""
        self.slots, self.unfinished, self.waiting = [], {}, Waiting()

    def intern(self, json: str) -> BaseDistribution:
        """The one object for a distribution. Raises if the text holds none."""
        distribution = self.interned.get(json)
        if distribution is None:
            distribution = self.interned[json] = parse_distribution(json)
        return distribution

    def share_distributions(self, trial: TrialContents) -> None:
        """Let a finished trial have one dictionary with those of the same kind.

        A dictionary each would be a sixth of what a trial with 5 parameters takes.
        """
        distributions = trial.distributions
        kind = (*distributions, *map(id, distributions.values()))  # interned: they stay alive
        if len(self.kinds) < _KINDS_MAX:
            trial.distributions = self.kinds.setdefault(kind, distributions)
        else:
            trial.distributions = self.kinds.get(kind, distributions)

    # --- as Optuna wants it ----------------------------------------------------------------------

    def frozen(self) -> FrozenStudy:
        return FrozenStudy(
            study_name=self.name,
            direction=None,
            directions=list(self.directions),
            user_attrs=dict(self.user_attrs),
            system_attrs=dict(self.system_attrs),
            study_id=self.id,
        )

    def finished_trial(self, index: int) -> FrozenTrial:
        """The finished trial in a slot, which from now on holds what is returned."""
        slot = self.slots[index]
        if isinstance(slot, TrialContents):
            self.slots[index] = slot = slot.build(own_containers=False)
            self.unread.discard(index)
        return slot

    def trials(self, states: Container[TrialState] | None) -> list[FrozenTrial]:
        """Trials in the order of the slots; those of the given states, or all."""
        if states is not None:
            held = [state for state in STATES if self.counts[state] and state in states]
            if not held:
                return []
            if _UNFINISHED.issuperset(held):
                if TrialState.RUNNING not in held:
                    return [trial.shared_view() for trial in self.waiting]
                return [
                    trial.shared_view()
                    for _, trial in sorted(self.unfinished.items())
                    if STATES[trial.state] in states
                ]
        unread, self.unread = self.unread, set()  # a set that was emptied keeps its room
        for index in unread:
            self.finished_trial(index)
        found: list[Any] = self.slots.copy()
        for trial in self.unfinished.values():
            found[trial.index] = trial.shared_view()
        if states is None:
            return found
        return [trial for trial in found if trial.state in states]

    # --- as images -------------------------------------------------------------------------------

    def image(self) -> r.PutStudy:
        return r.PutStudy(
            study_id=self.id,
            study_name=self.name,
            directions=[int(direction) for direction in self.directions],
            user_attrs=self.user_attrs,
            system_attrs=self.system_attrs,
        )

    def param_images(self) -> list[r.PutParam]:
        """The first use of each name need not be that of the first trial that holds it."""
        texts = self._distribution_texts()
        return [
            r.PutParam(
                study_id=self.id,
                param_name=name,
                distribution=texts.get(id(known)) or distribution_to_json(known),
            )
            for name, known in self.distributions.items()
        ]

    def trial_images(self) -> Iterator[r.PutTrial]:
        texts = self._distribution_texts()
        return (_trial_image(slot, self.id, texts) for slot in self.slots)

    def still_images(self) -> Iterator[r.PutTrial]:
        """As ``trial_images``, of this moment, however late they are asked for."""
        texts = self._distribution_texts()
        slots: list[Any] = self.slots.copy()  # a finished trial never changes
        for trial in self.unfinished.values():
            slots[trial.index] = _trial_image(trial.apart(), self.id, texts)
        return (
            slot if isinstance(slot, r.PutTrial) else _trial_image(slot, self.id, texts)
            for slot in slots
        )

    def unfinished_images(self) -> Iterator[r.PutTrial]:
        """By id."""
        texts = self._distribution_texts()
        return (
            _trial_image(trial, self.id, texts) for _, trial in sorted(self.unfinished.items())
        )

    def take_finished(self) -> Iterator[r.PutTrial]:
        """Images of the trials that have finished since the last call; what they say is dropped.

        For who hands a study on and holds little of it. Nobody may read its trials any more.
        """
        texts = self._distribution_texts()
        for index in sorted(self.unread):
            trial = self.slots[index]
            assert isinstance(trial, TrialContents)
            yield _trial_image(trial, self.id, texts)
            trial.params = trial.distributions = trial.user_attrs = trial.system_attrs = _DROPPED
            trial.intermediate_values = _DROPPED
            trial.start = trial.complete = trial.values = trial.view = None
        self.unread.clear()

    def _distribution_texts(self) -> dict[int, str]:
        """The JSON of each interned distribution, by ``id`` of the object."""
        return {id(known): json for json, known in self.interned.items()}


def slot_id(slot: TrialContents | FrozenTrial) -> int:
    return slot.id if isinstance(slot, TrialContents) else slot._trial_id


def internal_value(distribution: BaseDistribution, external: Any) -> float:
    # A number is its own representation; Optuna's conversion refuses those that others stored
    # although the distribution forbids them.
    if isinstance(distribution, CategoricalDistribution):
        for index, choice in enumerate(distribution.choices):
            if choice is external:
                return index  # 1, 1.0 and True are equal, and are choices of their own
        return distribution.to_internal_repr(external)
    return float(external)


def parse_distribution(json: str) -> BaseDistribution:
    """Raises what Optuna raises for a text that holds none."""
    return json.distribution if isinstance(json, r.ObjectText) else _parsed(json)


# Studies of one process often search the same space, and json takes longer than all else about it.
_parsed = functools.lru_cache(maxsize=1024)(json_to_distribution)


def _trial_image(
    slot: TrialContents | FrozenTrial, study_id: int, texts: dict[int, str]
) -> r.PutTrial:
    if isinstance(slot, TrialContents):
        state, values = slot.state, slot.values
        owner = slot.owner if state == r.RUNNING else ""
        start, complete = slot.start, slot.complete
    else:
        state, values, owner = int(slot.state), slot.values, ""
        start, complete = slot.datetime_start, slot.datetime_complete
    distributions = slot.distributions
    return r.PutTrial(
        trial_id=slot_id(slot),
        study_id=study_id,
        number=slot.number,
        state=state,
        values=values,
        datetime_start=_time_text(start),
        datetime_complete=_time_text(complete),
        params={
            name: internal_value(distributions[name], external)
            for name, external in slot.params.items()
        },
        distributions=[
            texts.get(id(distribution)) or distribution_to_json(distribution)
            for distribution in distributions.values()
        ],
        user_attrs=slot.user_attrs,
        system_attrs=slot.system_attrs,
        intermediate_values=slot.intermediate_values,
        owner=owner,
    )


def _time_text(time: str | datetime | None) -> str | None:
    return r.format_time(time) if isinstance(time, datetime) else time
