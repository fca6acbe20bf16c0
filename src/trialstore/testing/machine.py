"""Random operations on two storages over one log, and on a model; all three must agree.

Where Optuna has a storage for the same store, it takes part: what it reads must be what ours read,
to the last bit, and now and then it is the one who writes.

::

    class MyMachine(StorageMachine):
        def prepare(self):
            self.open_storage = functools.partial(open_my_storage, new_path())

    TestMyMachine = MyMachine.TestCase

Time stands still, so deferred writes wait until something carries them along, and the machine
knows which ones do: before a storage touches a trial of the other one, that one's outbox is
flushed, except in the rules whose very point is that it is not.
"""

from __future__ import annotations

from collections.abc import Callable
import copy
import math
import pickle
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
import pytest

from trialstore.storage import Storage
from trialstore.testing.clock import ManualClock
from trialstore.testing.contents import storage_contents, trial_contents
from trialstore.testing.model import Model
from trialstore.testing.storage_suite import Capabilities, OpenStorage
from trialstore.testing.values import ODD_ATTRIBUTES, ODD_FLOATS

_DISTRIBUTIONS: list[tuple[BaseDistribution, list[float]]] = [
    (FloatDistribution(-1.0, 1.0), [-1.0, -0.0, 5e-324, 0.30000000000000004]),
    (FloatDistribution(0.0, 1.0, step=0.25), [0.0, 0.75]),
    (FloatDistribution(1e-5, 1.0, log=True), [1e-5, 0.5]),
    (IntDistribution(0, 10), [0.0, 10.0]),
    (IntDistribution(-(2**53), 2**53), [-(2.0**53), 2.0**53]),
    (CategoricalDistribution(["a", None, 2.5]), [0.0, 1.0, 2.0]),
    (CategoricalDistribution([1, True, 1.0, "1"]), [0.0, 1.0, 2.0, 3.0]),
    (CategoricalDistribution([math.nan, -0.0, 0]), [0.0, 1.0, 2.0]),
]
_FINISHED = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
_TOLD = [*_FINISHED, TrialState.WAITING]

_who = st.integers(0, 1)
_pick = st.integers(0, 7)
_names = st.sampled_from(["x", "y", "z"])
_study_names = st.sampled_from(["s", "t", "u", ""])
_params = st.sampled_from([(known, value) for known, values in _DISTRIBUTIONS for value in values])
_keys = st.sampled_from(["x", "y", "", "k" * 200, "\u017c \U0001f600"])
_attributes = st.one_of(
    st.sampled_from(list(ODD_ATTRIBUTES.values())),
    st.integers(-(2**63), 2**63 - 1),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.sampled_from(["k", "l"]), st.integers(0, 3), max_size=2),
)
_values = st.sampled_from([value for value in ODD_FLOATS if not math.isnan(value)])
_reports = st.sampled_from(ODD_FLOATS)
_steps = st.sampled_from([-(2**31), -1, 0, 1, 2, 2**31 - 1])


def _template(
    n_objectives: int,
    state: TrialState,
    param: tuple[BaseDistribution, float],
    value: float,
    attribute: Any,
) -> FrozenTrial:
    known, internal = param
    return create_trial(
        state=state,
        values=[value] * n_objectives if state == TrialState.COMPLETE else None,
        params={"x": known.to_external_repr(internal)},
        distributions={"x": known},
        user_attrs={"template": attribute},
        system_attrs={"template": attribute},
        intermediate_values={1: value, 2: math.nan},
    )


class StorageMachine(RuleBasedStateMachine):
    """Override :meth:`prepare`; the rules are Optuna's contract."""

    capabilities = Capabilities()
    open_storage: OpenStorage
    keeps_ids_apart = False
    """Leave something behind before each deletion, so that no database gives its ids again."""
    open_plain: Callable[[], BaseStorage] | None = None
    """Opens the same store as plain Optuna does, where it can."""
    plain_reads = plain_writes = True
    """Whether it then reads, and whether it also writes."""

    def prepare(self) -> None:
        """Make a new empty store and set ``open_storage`` to what opens it."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.prepare()
        self.model = Model()
        self.storages = [self._open(), self._open()]
        self.dead_ids: list[int] = []
        self.n_kept = 0
        self.early: list[tuple[FrozenTrial, Any]] = []
        self.plain: BaseStorage | None = None

    def _open(self) -> Storage:
        # Clocks of their own: a tell that waits must not end the other one's linger.
        return self.open_storage(linger_s=1.0, clock=ManualClock())

    def teardown(self) -> None:
        try:
            self.everybody_agrees_with_the_model()
        finally:
            for storage in self.storages:
                storage.close()
            self._leave_plain()

    def _plain(self) -> BaseStorage:
        """Optuna's storage, when nothing is put off."""
        for storage in self.storages:
            storage.flush()
        if self.plain is None:
            assert self.open_plain is not None
            self.plain = self.open_plain()
        return self.plain

    def _leave_plain(self) -> None:
        engine = getattr(self.plain, "engine", None)
        if self.plain is not None:
            self.plain.remove_session()
            self.plain = None
        if engine is not None:
            engine.dispose()

    # --- choosing --------------------------------------------------------------------------------

    def _study_id(self, pick: int) -> int:
        ids = sorted(self.model.studies)
        return ids[pick % len(ids)]

    def _trial_id(self, pick: int) -> int:
        ids = sorted(self.model.trial_ids())
        return ids[-1 - pick % len(ids)]

    def _settled(self, who: int) -> Storage:
        """The storage, the other one having flushed what it put off."""
        self.storages[1 - who].flush()
        return self.storages[who]

    @staticmethod
    def _same(storage: Storage, expected: Callable[[], Any], got: Callable[[], Any]) -> Any:
        """Both return, or both raise the same kind of error; a deferred write may at its flush."""
        try:
            wanted = expected()
        except (KeyError, ValueError, RuntimeError, OptunaError) as error:
            with pytest.raises(type(error)):
                got()
                storage.flush()
            return None
        answer = got()
        return wanted, answer

    def _read_own(self, storage: Storage, trial_id: int) -> None:
        """What Optuna's ``Trial`` reads, at first without an exchange, must be the truth."""
        how = {**self.capabilities.as_kept(), "exact": False}
        expected = self.model.find(trial_id)[1].contents(**how)
        assert trial_contents(storage.get_trial(trial_id), times=False, **how) == expected

    def _keep_ids_apart(self, storage: Storage) -> None:
        if self.keeps_ids_apart:
            name = f"kept {self.n_kept}"
            self.n_kept += 1
            study_id = storage.create_new_study([StudyDirection.MINIMIZE], name)
            self.model.create_study(study_id, name, [StudyDirection.MINIMIZE])
            trial_id = storage.create_new_trial(study_id)
            self.model.create_trial(study_id, trial_id, None)

    # --- studies ---------------------------------------------------------------------------------

    @rule(who=_who, name=_study_names, n_objectives=st.integers(1, 2), maximize=st.booleans())
    def create_study(self, who: int, name: str, n_objectives: int, maximize: bool) -> None:
        first = StudyDirection.MAXIMIZE if maximize else StudyDirection.MINIMIZE
        directions = [first, StudyDirection.MINIMIZE][:n_objectives]
        storage = self._settled(who)
        created = self._same(
            storage,
            lambda: self.model.check_name(name),
            lambda: storage.create_new_study(directions, name),
        )
        if created is not None:
            self.model.create_study(created[1], name, directions)

    @precondition(lambda self: self.model.studies)
    @rule(who=_who, pick=_pick)
    def delete_study(self, who: int, pick: int) -> None:
        study_id = self._study_id(pick)
        storage = self._settled(who)
        self._keep_ids_apart(storage)
        self.dead_ids += [trial.id for trial in self.model.study(study_id).trials]
        storage.delete_study(study_id)
        self.model.delete_study(study_id)
        with pytest.raises(KeyError):
            self._settled(1 - who).get_all_trials(study_id)

    @precondition(lambda self: self.model.studies)
    @rule(who=_who, pick=_pick, key=_keys, value=_attributes, system=st.booleans())
    def set_study_attr(self, who: int, pick: int, key: str, value: Any, system: bool) -> None:
        study = self.model.study(self._study_id(pick))
        storage = self._settled(who)
        if system:
            storage.set_study_system_attr(study.id, key, value)
            study.system_attrs[key] = value
        else:
            storage.set_study_user_attr(study.id, key, value)
            study.user_attrs[key] = value

    # --- trials ----------------------------------------------------------------------------------

    @precondition(lambda self: self.model.studies)
    @rule(
        who=_who,
        pick=_pick,
        state=st.sampled_from([None, None, *TrialState]),
        param=_params,
        value=_values,
        attribute=_attributes,
    )
    def create_trial(
        self,
        who: int,
        pick: int,
        state: TrialState | None,
        param: tuple[BaseDistribution, float],
        value: float,
        attribute: Any,
    ) -> None:
        study = self.model.study(self._study_id(pick))
        template = None
        if state is not None:
            param = self._kept(param)
            template = _template(len(study.directions), state, param, value, attribute)
        storage = self._settled(who)
        trial_id = storage.create_new_trial(study.id, copy.deepcopy(template))
        self.model.create_trial(study.id, trial_id, template)
        self._read_own(storage, trial_id)

    @precondition(lambda self: self.model.trial_ids())
    @rule(who=_who, pick=_pick, name=_names, param=_params)
    def set_param(
        self, who: int, pick: int, name: str, param: tuple[BaseDistribution, float]
    ) -> None:
        trial_id = self._trial_id(pick)
        self._suggest(self._settled(who), trial_id, name, param)

    def _suggest(
        self, storage: Storage, trial_id: int, name: str, param: tuple[BaseDistribution, float]
    ) -> None:
        study = self.model.find(trial_id)[0]
        known = study.distribution(name)
        if not self.capabilities.templates_bind and known != study.suggested.get(name):
            return  # whether it is compatible depends on what the storage has read
        distribution, internal = self._kept(param)
        self._same(
            storage,
            lambda: self.model.set_param(trial_id, name, internal, distribution),
            lambda: storage.set_trial_param(trial_id, name, internal, distribution),
        )

    def _kept(self, param: tuple[BaseDistribution, float]) -> tuple[BaseDistribution, float]:
        """Of equal choices the one that the store takes them for."""
        distribution, internal = param
        if not self.capabilities.tells_equal_choices_apart:
            external = distribution.to_external_repr(internal)
            internal = distribution.to_internal_repr(external)
        return distribution, internal

    @precondition(lambda self: self.model.trial_ids())
    @rule(who=_who, pick=_pick, key=_keys, value=_attributes, system=st.booleans())
    def set_trial_attr(self, who: int, pick: int, key: str, value: Any, system: bool) -> None:
        trial_id = self._trial_id(pick)
        storage = self._settled(who)
        set_attr = storage.set_trial_system_attr if system else storage.set_trial_user_attr
        found = self._same(
            storage,
            lambda: self.model.updatable(trial_id)[1],
            lambda: set_attr(trial_id, key, value),
        )
        if found is not None:
            (found[0].system_attrs if system else found[0].user_attrs)[key] = value

    @precondition(lambda self: self.model.trial_ids())
    @rule(who=_who, pick=_pick, step=_steps, value=_reports)
    def report(self, who: int, pick: int, step: int, value: float) -> None:
        trial_id = self._trial_id(pick)
        storage = self._settled(who)
        found = self._same(
            storage,
            lambda: self.model.updatable(trial_id)[1],
            lambda: storage.set_trial_intermediate_value(trial_id, step, value),
        )
        if found is not None:
            found[0].intermediate_values[step] = value

    @precondition(lambda self: self.model.trial_ids())
    @rule(who=_who, pick=_pick, state=st.sampled_from(_TOLD), value=_values, told=st.booleans())
    def tell(self, who: int, pick: int, state: TrialState, value: float, told: bool) -> None:
        """Or, with WAITING, queue it again."""
        trial_id = self._trial_id(pick)
        storage = self._settled(who)
        n_objectives = len(self.model.find(trial_id)[0].directions)
        values = [value] * n_objectives if told or state == TrialState.COMPLETE else None
        both = self._same(
            storage,
            lambda: self.model.set_state(trial_id, state, values),
            lambda: storage.set_trial_state_values(trial_id, state, values),
        )
        assert both is None or both[0] is both[1]

    @precondition(lambda self: self.model.trial_ids())
    @rule(who=_who, pick=_pick)
    def claim(self, who: int, pick: int) -> None:
        trial_id = self._trial_id(pick)
        storage = self._settled(who)
        claimed = self._same(
            storage,
            lambda: self.model.set_state(trial_id, TrialState.RUNNING),
            lambda: storage.set_trial_state_values(trial_id, TrialState.RUNNING),
        )
        assert claimed is None or claimed[0] is claimed[1]
        if claimed == (True, True):
            self._read_own(storage, trial_id)

    @precondition(lambda self: self.model.studies)
    @rule(
        who=_who,
        pick=_pick,
        params=st.dictionaries(_names, _params, max_size=2),
        reports=st.dictionaries(_steps, _reports, max_size=2),
        attrs=st.dictionaries(_keys, _attributes, max_size=2),
        state=st.sampled_from(_FINISHED),
        value=_values,
    )
    def run_trial(
        self,
        who: int,
        pick: int,
        params: dict[str, tuple[BaseDistribution, float]],
        reports: dict[int, float],
        attrs: dict[str, Any],
        state: TrialState,
        value: float,
    ) -> None:
        """A whole trial with nobody between, as ``study.optimize`` runs it."""
        study = self.model.study(self._study_id(pick))
        storage = self._settled(who)
        trial_id = storage.create_new_trial(study.id)
        self.model.create_trial(study.id, trial_id, None)
        self._read_own(storage, trial_id)
        for name, param in params.items():
            self._suggest(storage, trial_id, name, param)
        trial = self.model.find(trial_id)[1]
        for step, report in reports.items():
            storage.set_trial_intermediate_value(trial_id, step, report)
            trial.intermediate_values[step] = report
        for key, attr in attrs.items():
            storage.set_trial_user_attr(trial_id, key, attr)
            trial.user_attrs[key] = attr
        self._read_own(storage, trial_id)
        values = [value] * len(study.directions) if state == TrialState.COMPLETE else None
        storage.set_trial_state_values(trial_id, state, values)
        self.model.set_state(trial_id, state, values)

    # --- a write that is overtaken ---------------------------------------------------------------

    @precondition(lambda self: self.model.studies)
    @rule(who=_who, pick=_pick, how=st.sampled_from([*_FINISHED, "delete"]))
    def overtake_a_deferred_write(self, who: int, pick: int, how: TrialState | str) -> None:
        study = self.model.study(self._study_id(pick))
        asker, teller = self._settled(who), self._settled(1 - who)
        trial_id = asker.create_new_trial(study.id)
        self.model.create_trial(study.id, trial_id, None)
        self._read_own(asker, trial_id)
        asker.set_trial_user_attr(trial_id, "late", True)
        if isinstance(how, str):
            self._keep_ids_apart(teller)
            self.dead_ids += [trial.id for trial in study.trials]
            teller.delete_study(study.id)
            self.model.delete_study(study.id)
        else:
            values = [1.0] * len(study.directions) if how == TrialState.COMPLETE else None
            teller.set_trial_state_values(trial_id, how, values)
            self.model.set_state(trial_id, how, values)
        with pytest.raises((UpdateFinishedTrialError, KeyError)):
            asker.flush()
        asker.flush()

    # --- plain Optuna on the same store ----------------------------------------------------------

    @precondition(lambda self: self.open_plain and self.plain_writes and self.model.studies)
    @rule(pick=_pick)
    def plain_optuna_creates_a_trial(self, pick: int) -> None:
        study = self.model.study(self._study_id(pick))
        self.model.create_trial(study.id, self._plain().create_new_trial(study.id), None)

    @precondition(lambda self: self.open_plain and self.plain_writes and self._unfinished_ids())
    @rule(
        pick=_pick,
        key=_keys,
        value=_attributes,
        report=_reports,
        state=st.sampled_from([None, TrialState.COMPLETE, TrialState.FAIL]),
    )
    def plain_optuna_writes(
        self, pick: int, key: str, value: Any, report: float, state: TrialState | None
    ) -> None:
        ids = self._unfinished_ids()
        trial_id = ids[-1 - pick % len(ids)]
        study, trial = self.model.find(trial_id)
        storage = self._plain()
        storage.set_trial_user_attr(trial_id, key, value)
        storage.set_trial_intermediate_value(trial_id, 0, report)
        trial.user_attrs[key] = value
        trial.intermediate_values[0] = report
        if state is not None:
            values = [0.5] * len(study.directions) if state == TrialState.COMPLETE else None
            storage.set_trial_state_values(trial_id, state, values)
            self.model.set_state(trial_id, state, values)

    def _unfinished_ids(self) -> list[int]:
        return sorted(
            trial.id
            for study in self.model.studies.values()
            for trial in study.trials
            if not trial.state.is_finished()
        )

    # --- reads and handles -----------------------------------------------------------------------

    @precondition(lambda self: self.model.studies)
    @rule(who=_who, pick=_pick, states=st.sets(st.sampled_from(list(TrialState))))
    def read_study(self, who: int, pick: int, states: set[TrialState]) -> None:
        study = self.model.study(self._study_id(pick))
        storage = self._settled(who)
        chosen = [trial.number for trial in study.trials if trial.state in states]
        read = storage.get_all_trials(study.id, deepcopy=False, states=tuple(states))
        assert [trial.number for trial in read] == chosen
        assert storage.get_n_trials(study.id, tuple(states)) == len(chosen)
        waiting = storage.get_all_trials(study.id, False, (TrialState.WAITING,))
        assert [trial.number for trial in waiting] == [
            trial.number for trial in study.trials if trial.state == TrialState.WAITING
        ]
        best = self._same(
            storage,
            lambda: self.model.best_number(study.id),
            lambda: storage.get_best_trial(study.id),
        )
        assert best is None or best[0] == best[1].number
        assert storage.get_study_id_from_name(study.name) == study.id
        for trial in study.trials[-2:]:
            number = storage.get_trial_id_from_study_id_trial_number(study.id, trial.number)
            assert number == trial.id

    @precondition(lambda self: self.model.trial_ids())
    @rule(who=_who, pick=_pick)
    def read_trial(self, who: int, pick: int) -> None:
        trial_id = self._trial_id(pick)
        trial = self._settled(who).get_trial(trial_id)
        how = self.capabilities.as_kept()
        expected = self.model.find(trial_id)[1].contents(**how)
        assert trial_contents(trial, times=False, **how) == expected
        self.early.append((trial, trial_contents(trial)))

    @precondition(lambda self: self.dead_ids and not self.capabilities.reuses_ids)
    @rule(who=_who, pick=_pick)
    def touch_a_trial_of_a_deleted_study(self, who: int, pick: int) -> None:
        trial_id = self.dead_ids[pick % len(self.dead_ids)]
        # A finished trial that a storage knows is answered without looking; let it look.
        self._settled(who).get_all_studies()
        with pytest.raises(KeyError):
            self._settled(who).get_trial(trial_id)
        with pytest.raises(KeyError):
            self._settled(who).set_trial_user_attr(trial_id, "k", 1)

    @rule(who=_who)
    def reopen(self, who: int) -> None:
        self.storages[who].close()
        self.storages[who] = self._open()

    @precondition(lambda self: self.capabilities.crosses_processes)
    @rule(who=_who)
    def pickle(self, who: int) -> None:
        copied = pickle.loads(pickle.dumps(self.storages[who]))
        self.storages[who].close()
        self.storages[who] = copied

    @rule()
    def everybody_agrees_with_the_model(self) -> None:
        how = self.capabilities.as_kept()
        expected = self.model.contents(**how)
        for storage in self.storages:
            storage.flush()
        for storage in self.storages:
            assert storage_contents(storage, times=False, **how) == expected
        # Of what a column loses, too, nobody may go on seeing what the others don't.
        first, second = map(storage_contents, self.storages)
        assert first == second
        if self.open_plain and self.plain_reads:
            assert storage_contents(self._plain()) == first

    @invariant()
    def earlier_reads_have_not_changed(self) -> None:
        self.early = self.early[-5:]
        for trial, before in self.early:
            assert trial_contents(trial) == before
