"""Deferred writes: when they reach the log, what may not overtake them, where they raise."""

from __future__ import annotations

import pickle
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState, create_trial
import pytest

from trialstore.errors import LogUnavailableError
from trialstore.log import NOTHING
from trialstore.storage import Storage
from trialstore.testing.clock import ManualClock
from trialstore.testing.suites.base import (
    MINIMIZE,
    UNIT,
    Capabilities,
    OpenStorage,
    SuiteBase,
    count_exchanges,
    exchanger_of,
    wait_until,
)


class OutboxSuite(SuiteBase):
    """Part of ``StorageSuite``; time stands still unless a test advances it."""

    @pytest.fixture
    def asked(self, lingering: Storage) -> int:
        """A RUNNING trial of ``lingering`` in a study that knows the float ``x``."""
        study_id = lingering.create_new_study([MINIMIZE], "study")
        first = lingering.create_new_trial(study_id)
        lingering.set_trial_param(first, "x", 0.5, UNIT)
        lingering.set_trial_state_values(first, TrialState.COMPLETE, [0.0])
        return lingering.create_new_trial(study_id)

    @pytest.fixture
    def reader(self, opened: OpenStorage, lingering: Storage) -> Storage:
        """Another storage, with a clock of its own that stands still as well."""
        return opened(linger_s=1.0, clock=ManualClock())

    @staticmethod
    def _write_all(storage: Storage, trial_id: int) -> None:
        storage.set_trial_param(trial_id, "x", 0.25, UNIT)
        storage.set_trial_intermediate_value(trial_id, 1, 2.0)
        storage.set_trial_user_attr(trial_id, "k", 1)
        storage.set_trial_system_attr(trial_id, "s", 2)

    # --- when ------------------------------------------------------------------------------------

    def test_writes_on_an_own_trial_wait_for_the_next_exchange(
        self, lingering: Storage, asked: int
    ) -> None:
        counter = count_exchanges(lingering)
        self._write_all(lingering, asked)
        assert counter.n_exchanges == 0
        lingering.get_all_studies()
        assert [len(records) for records in counter.appended] == [4]

    def test_a_read_of_an_own_trial_and_its_tell_append_once(
        self, lingering: Storage, reader: Storage, asked: int
    ) -> None:
        counter = count_exchanges(lingering)
        self._write_all(lingering, asked)
        lingering.get_trial(asked)
        lingering.set_trial_state_values(asked, TrialState.COMPLETE, [1.0])
        assert [len(records) for records in counter.appended] == [0, 5]
        trial = reader.get_trial(asked)
        assert (trial.params, trial.intermediate_values) == ({"x": 0.25}, {1: 2.0})
        assert (trial.user_attrs, trial.system_attrs) == ({"k": 1}, {"s": 2})

    def test_what_is_deferred_is_not_what_a_reader_edits(
        self, lingering: Storage, reader: Storage, asked: int
    ) -> None:
        lingering.set_trial_user_attr(asked, "k", {"inner": [1]})
        lingering.get_trial(asked).user_attrs["k"]["inner"].append(2)
        lingering.flush()
        assert reader.get_trial(asked).user_attrs == {"k": {"inner": [1]}}

    def test_a_read_of_the_trial_sees_what_was_deferred(
        self, lingering: Storage, asked: int
    ) -> None:
        self._write_all(lingering, asked)
        trial = lingering.get_trial(asked)
        assert (trial.params, trial.intermediate_values) == ({"x": 0.25}, {1: 2.0})
        assert (trial.user_attrs, trial.system_attrs) == ({"k": 1}, {"s": 2})

    def test_a_read_sees_what_leaves_the_outbox_while_it_reads(
        self, lingering: Storage, asked: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._write_all(lingering, asked)
        exchanger = exchanger_of(lingering)
        run = exchanger.run

        def run_and_linger(*args: Any, **how: Any) -> Any:
            outcomes = run(*args, **how)
            run((), NOTHING)  # as the thread of the linger does
            return outcomes

        monkeypatch.setattr(exchanger, "run", run_and_linger)
        trial = lingering.get_trial(asked)
        assert (trial.params, trial.intermediate_values) == ({"x": 0.25}, {1: 2.0})
        assert (trial.user_attrs, trial.system_attrs) == ({"k": 1}, {"s": 2})

    def test_a_pruner_that_reads_does_not_wait_for_what_was_reported(
        self, lingering: Storage, reader: Storage, asked: int
    ) -> None:
        study_id = lingering.get_study_id_from_name("study")
        counter = count_exchanges(lingering)
        self._write_all(lingering, asked)
        assert len(lingering.get_all_trials(study_id, states=(TrialState.COMPLETE,))) == 1
        assert [len(records) for records in counter.appended] == [0]
        shown = lingering.get_all_trials(study_id)
        assert [t.intermediate_values for t in shown if t._trial_id == asked] == [{1: 2.0}]
        assert reader.get_trial(asked).intermediate_values == {1: 2.0}

    def test_other_reads_carry_the_outbox_along(
        self, lingering: Storage, reader: Storage, asked: int
    ) -> None:
        self._write_all(lingering, asked)
        assert reader.get_trial(asked).params == {}
        lingering.get_all_studies()
        assert reader.get_trial(asked).params == {"x": 0.25}

    @pytest.mark.parametrize("how", ["flush", "remove_session", "close", "pickle"])
    def test_an_orderly_end_brings_deferred_writes(
        self,
        lingering: Storage,
        reader: Storage,
        asked: int,
        how: str,
        capabilities: Capabilities,
    ) -> None:
        if how == "pickle" and not capabilities.crosses_processes:
            pytest.skip("The store does not leave its process.")
        self._write_all(lingering, asked)
        assert reader.get_trial(asked).user_attrs == {}
        if how == "pickle":
            pickle.dumps(lingering)
        else:
            getattr(lingering, how)()
        assert reader.get_trial(asked).user_attrs == {"k": 1}

    def test_deferred_writes_arrive_when_the_linger_ends(
        self, lingering: Storage, reader: Storage, asked: int, clock: ManualClock
    ) -> None:
        self._write_all(lingering, asked)
        clock.until_waiting()
        assert reader.get_trial(asked).params == {}
        clock.advance(1.0)
        # What was written last; some stores show a batch in part.
        wait_until(
            lambda: reader.get_trial(asked).system_attrs == {"s": 2}, "the linger's exchange"
        )
        trial = reader.get_trial(asked)
        assert (trial.params, trial.user_attrs) == ({"x": 0.25}, {"k": 1})

    def test_the_linger_counts_from_the_first_deferred_write(
        self, lingering: Storage, reader: Storage, asked: int, clock: ManualClock
    ) -> None:
        lingering.set_trial_user_attr(asked, "first", 1)
        clock.until_waiting()
        clock.advance(0.75)
        lingering.set_trial_user_attr(asked, "second", 1)
        clock.advance(0.25)
        wait_until(
            lambda: set(reader.get_trial(asked).user_attrs) == {"first", "second"},
            "the linger's exchange",
        )

    def test_without_linger_every_write_is_written_through(
        self, opened: OpenStorage, capabilities: Capabilities
    ) -> None:
        if not (capabilities.shared and capabilities.lingers):
            pytest.skip("The store has one storage, or does not linger.")
        storage, reader = opened(linger_s=0.0), opened()
        trial_id = storage.create_new_trial(storage.create_new_study([MINIMIZE]))
        storage.set_trial_user_attr(trial_id, "k", 1)
        assert reader.get_trial(trial_id).user_attrs == {"k": 1}

    def test_the_first_use_of_a_name_is_written_through(
        self, lingering: Storage, reader: Storage, asked: int
    ) -> None:
        lingering.set_trial_param(asked, "new", 0.5, UNIT)
        assert reader.get_trial(asked).params == {"new": 0.5}

    def test_a_write_on_another_storage_s_trial_is_written_through(
        self, opened: OpenStorage, reader: Storage, asked: int
    ) -> None:
        reader.set_trial_user_attr(asked, "k", 1)
        reader.set_trial_param(asked, "x", 0.75, UNIT)
        trial = opened().get_trial(asked)
        assert (trial.user_attrs, trial.params) == ({"k": 1}, {"x": 0.75})

    def test_a_claimed_trial_is_an_own_trial(self, lingering: Storage, asked: int) -> None:
        study_id = lingering.get_study_id_from_name("study")
        trial_id = lingering.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
        lingering.set_trial_state_values(trial_id, TrialState.RUNNING)
        counter = count_exchanges(lingering)
        self._write_all(lingering, trial_id)
        assert counter.n_exchanges == 0

    # --- what may not overtake -------------------------------------------------------------------

    def test_deferred_writes_arrive_with_the_state_write_of_their_trial(
        self, lingering: Storage, reader: Storage, asked: int
    ) -> None:
        counter = count_exchanges(lingering)
        self._write_all(lingering, asked)
        lingering.set_trial_state_values(asked, TrialState.COMPLETE, [1.0])
        assert [len(records) for records in counter.appended if records] == [5]
        trial = reader.get_trial(asked)
        assert (trial.state, trial.params) == (TrialState.COMPLETE, {"x": 0.25})

    def test_a_tell_elsewhere_waits_twice_the_linger_for_the_asker(
        self, opened: OpenStorage, lingering: Storage, asked: int
    ) -> None:
        clock = ManualClock()
        teller = opened(linger_s=1.0, clock=clock)
        teller.set_trial_state_values(asked, TrialState.COMPLETE, [1.0])
        assert clock.slept_s == 2.0

    def test_an_own_tell_waits_for_nobody(
        self, lingering: Storage, asked: int, clock: ManualClock
    ) -> None:
        lingering.set_trial_state_values(asked, TrialState.COMPLETE, [1.0])
        assert clock.slept_s == 0.0

    def test_a_tell_elsewhere_loses_no_parameter(
        self, opened: OpenStorage, lingering: Storage, asked: int, clock: ManualClock
    ) -> None:
        """The teller's wait is the asker's time as well; only the order is left to chance."""
        teller = opened(linger_s=1.0, clock=_SharedTime(clock, lingering))
        study_id = lingering.get_study_id_from_name("study")
        for number in range(20):
            trial_id = lingering.create_new_trial(study_id)
            lingering.set_trial_param(trial_id, "x", 0.25, UNIT)
            lingering.set_trial_user_attr(trial_id, "k", number)
            teller.set_trial_state_values(trial_id, TrialState.COMPLETE, [float(number)])
            trial = teller.get_trial(trial_id)
            assert (trial.params, trial.user_attrs) == ({"x": 0.25}, {"k": number})

    # --- where a rejected one raises -------------------------------------------------------------

    @pytest.fixture
    def rejected(self, lingering: Storage, reader: Storage, asked: int) -> int:
        """A trial finished by force while its asker's write waits; the write has been sent."""
        lingering.set_trial_user_attr(asked, "late", 1)
        reader.set_trial_state_values(asked, TrialState.FAIL)
        lingering.get_all_studies()
        return asked

    def test_a_rejected_write_never_shows(
        self, lingering: Storage, reader: Storage, rejected: int
    ) -> None:
        assert reader.get_trial(rejected).user_attrs == {}

    def test_a_rejected_write_does_not_raise_in_another_trial_s_call(
        self, lingering: Storage, rejected: int
    ) -> None:
        study_id = lingering.get_study_id_from_name("study")
        trial_id = lingering.create_new_trial(study_id)
        lingering.set_trial_param(trial_id, "x", 0.5, UNIT)
        lingering.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        lingering.get_all_trials(study_id)

    @pytest.mark.parametrize("how", ["write", "tell", "get_trial", "flush", "close"])
    def test_a_rejected_write_raises_once(
        self, lingering: Storage, rejected: int, how: str
    ) -> None:
        calls = {
            "write": lambda: lingering.set_trial_user_attr(rejected, "again", 1),
            "tell": lambda: lingering.set_trial_state_values(rejected, TrialState.FAIL),
            "get_trial": lambda: lingering.get_trial(rejected),
            "flush": lingering.flush,
            "close": lingering.close,
        }
        with pytest.raises(UpdateFinishedTrialError):
            calls[how]()
        lingering.flush()

    def test_a_read_of_a_trial_finished_elsewhere_tells_what_became_of_deferred_writes(
        self, lingering: Storage, reader: Storage, asked: int
    ) -> None:
        lingering.set_trial_user_attr(asked, "late", 1)
        reader.set_trial_state_values(asked, TrialState.FAIL)
        with pytest.raises(UpdateFinishedTrialError):
            lingering.get_trial(asked)
        trial = lingering.get_trial(asked)
        assert (trial.state, trial.user_attrs) == (TrialState.FAIL, {})

    def test_a_write_rejected_by_deletion_raises_at_flush(
        self, lingering: Storage, reader: Storage, asked: int
    ) -> None:
        lingering.set_trial_user_attr(asked, "late", 1)
        reader.delete_study(reader.get_study_id_from_name("study"))
        with pytest.raises((UpdateFinishedTrialError, KeyError)):
            lingering.flush()
        lingering.flush()

    # --- failures --------------------------------------------------------------------------------

    def test_deferred_writes_survive_a_log_that_is_away(
        self, lingering: Storage, reader: Storage, asked: int
    ) -> None:
        counter = count_exchanges(lingering)
        self._write_all(lingering, asked)
        counter.fail_before()
        with pytest.raises(LogUnavailableError):
            lingering.flush()
        assert reader.get_trial(asked).params == {}
        lingering.flush()
        assert reader.get_trial(asked).params == {"x": 0.25}

    def test_a_write_that_did_not_reach_the_log_is_not_there(
        self, lingering: Storage, reader: Storage, asked: int
    ) -> None:
        counter = count_exchanges(lingering)
        counter.fail_before()
        with pytest.raises(LogUnavailableError):
            lingering.set_trial_state_values(asked, TrialState.COMPLETE, [1.0])
        assert reader.get_trial(asked).state == TrialState.RUNNING
        lingering.set_trial_state_values(asked, TrialState.COMPLETE, [1.0])
        assert reader.get_trial(asked).values == [1.0]


class _SharedTime(ManualClock):
    """Sleeping here moves another storage's clock, until what was due there has arrived."""

    def __init__(self, clock: ManualClock, storage: Storage) -> None:
        super().__init__()
        self._clock = clock
        self._storage = storage

    def sleep(self, duration_s: float) -> None:
        self._clock.advance(duration_s)
        exchanger = exchanger_of(self._storage)
        wait_until(lambda: not exchanger._outbox and exchanger._leader is None, "the linger's end")
