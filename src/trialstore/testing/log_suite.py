"""The contract of ``Log``, as tests that any log can run.

Subclass :class:`LogSuite` under a name that pytest collects and supply the ``open_log`` fixture::

    class TestMyLog(LogSuite):
        @pytest.fixture
        def open_log(self, tmp_path):
            return lambda: MyLog(tmp_path / "log")

Class attributes say what a log can't do; each is a promise that DESIGN.md lets a log off.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from typing import Any

from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.trial import TrialState
import pytest

from trialstore import records as r
from trialstore.log import NEXT_MIN, Log, Wanted
from trialstore.records import Verdict
from trialstore.testing.capability_suites import ConditionalSuite, LeaseSuite, OpenLog, run_threads
from trialstore.testing.contents import plain, trial_contents
from trialstore.testing.follower import Follower
from trialstore.testing.values import ODD_ATTRIBUTES, ODD_FLOATS, ODD_TEXTS

_MINIMIZE = 1
_TIME = "2026-01-02T03:04:05.678901"
_DEADLINE_S = 120.0
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

_UNIT = distribution_to_json(FloatDistribution(0.0, 1.0))
_CHOICES = distribution_to_json(CategoricalDistribution(["a", "b"]))


class LogSuite(ConditionalSuite, LeaseSuite):
    """Every promise of ``Log`` and of the capabilities that a log has; subclass it."""

    keeps_every_text = True
    """NUL and lone surrogates are stored."""
    keeps_every_key = True
    """They are stored as keys of attributes too."""
    shows_whole_batches = True
    """A reader sees all records of an exchange or none; a write to a file may be seen growing."""
    keeps_negative_zero = True
    attribute_bytes_max = 16 << 20

    @pytest.fixture
    def open_log(self) -> OpenLog:
        """Another handle on the same log at each call."""
        raise NotImplementedError("Supply an open_log fixture.")

    @pytest.fixture
    def ours(self, open_log: OpenLog) -> Follower:
        return Follower(open_log(), "ours")

    @pytest.fixture
    def theirs(self, open_log: OpenLog) -> Follower:
        return Follower(open_log(), "theirs")

    # --- order and cursors -----------------------------------------------------------------------

    def test_an_empty_log_has_no_news(self, ours: Follower) -> None:
        assert ours.exchange(wanted=Wanted(catalogue=True)) == []
        assert ours.replica.studies() == []

    def test_an_exchange_of_nothing_changes_nothing(self, ours: Follower) -> None:
        study_id = ours.create_study("s")
        ours.create_trial(study_id)
        before = ours.contents(study_id)
        for _ in range(3):
            assert ours.exchange() == []
        assert ours.contents(study_id) == before

    def test_what_one_handle_appends_the_other_reads(
        self, ours: Follower, theirs: Follower
    ) -> None:
        study_id = ours.create_study("s")
        trial_id = ours.create_trial(study_id)
        ours.exchange(
            ours.param(trial_id, "x", 0.25, _UNIT), ours.user_attr(trial_id, "k", [1, "two"])
        )
        ours.exchange(ours.state(trial_id, r.COMPLETE, [1.5]))
        (trial,) = theirs.trials(study_id)
        assert (trial.params, trial.user_attrs, trial.values) == (
            {"x": 0.25},
            {"k": [1, "two"]},
            [1.5],
        )
        assert theirs.contents(study_id) == ours.contents(study_id)

    def test_parameters_keep_the_order_of_suggestion(
        self, ours: Follower, theirs: Follower
    ) -> None:
        study_id = ours.create_study("s")
        trial_id = ours.create_trial(study_id)
        names = ["z", "a", "m", "B", "10", "9"]
        ours.exchange(*(ours.param(trial_id, name, 0.5, _UNIT) for name in names[:3]))
        ours.exchange(*(ours.param(trial_id, name, 0.5, _UNIT) for name in names[3:]))
        ours.exchange(ours.state(trial_id, r.COMPLETE, [0.0]))
        (trial,) = theirs.trials(study_id)
        assert list(trial.params) == names

    def test_of_two_writes_in_one_batch_the_later_one_stays(
        self, ours: Follower, theirs: Follower
    ) -> None:
        study_id = ours.create_study("s")
        trial_id = ours.create_trial(study_id)
        ours.exchange(*(ours.user_attr(trial_id, "k", value) for value in (1, 2, 3)))
        (trial,) = theirs.trials(study_id)
        assert trial.user_attrs == {"k": 3}

    def test_the_old_cursor_stays_valid(self, ours: Follower, theirs: Follower) -> None:
        study_id = ours.create_study("s")
        ours.create_trial(study_id)
        theirs.trials(study_id)
        ours.exchange(ours.state(ours.create_trial(study_id), r.COMPLETE, [1.0]))
        wanted = Wanted(trials_of=frozenset({study_id}))
        theirs.log.exchange((), theirs.cursor, wanted)  # an answer that got lost
        theirs.take(theirs.log.exchange((), theirs.cursor, wanted))
        assert [trial_contents(t) for t in theirs.replica.trials(study_id, None)] == ours.contents(
            study_id
        )

    def test_a_new_handle_reads_everything_from_the_start(
        self, ours: Follower, open_log: OpenLog
    ) -> None:
        ids = [ours.create_study(f"s{number}") for number in range(3)]
        for study_id in ids:
            for _ in range(3):
                ours.exchange(ours.state(ours.create_trial(study_id), r.PRUNED))
        late = Follower(open_log(), "late")
        for study_id in ids:
            assert late.contents(study_id) == ours.contents(study_id)

    def test_a_batch_is_seen_whole_or_not_at_all(self, open_log: OpenLog) -> None:
        if not self.shows_whole_batches:
            pytest.skip("A batch may be seen growing in this log.")
        writer = Follower(open_log(), "writer")
        reader = Follower(open_log(), "reader")
        study_id = writer.create_study("s")
        trial_id = writer.create_trial(study_id)
        errors: list[BaseException] = []

        def write() -> None:
            try:
                for number in range(100):
                    writer.exchange(
                        *(writer.user_attr(trial_id, key, number) for key in ("a", "b", "c"))
                    )
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=write)
        thread.start()
        seen = -1
        while seen < 99 and not errors:
            (trial,) = reader.trials(study_id)
            values = set(trial.user_attrs.values())
            assert len(values) <= 1, f"half a batch: {trial.user_attrs}"
            now_seen = max(values, default=-1)
            assert now_seen >= seen, "the past came back"
            seen = now_seen
        thread.join(_DEADLINE_S)
        assert not errors

    def test_interleaved_writers_agree_on_one_history(self, open_log: OpenLog) -> None:
        followers = [Follower(open_log(), f"w{number}") for number in range(4)]
        study_id = followers[0].create_study("s")
        errors: list[BaseException] = []

        def work(follower: Follower) -> None:
            try:
                follower.exchange(wanted=Wanted(studies=frozenset({study_id})))
                for number in range(25):
                    trial_id = follower.create_trial(study_id)
                    follower.exchange(follower.user_attr(trial_id, "by", follower.worker_id))
                    follower.exchange(follower.state(trial_id, r.COMPLETE, [float(number)]))
            except BaseException as error:
                errors.append(error)

        run_threads([(work, follower) for follower in followers])
        assert not errors
        first, *others = [follower.contents(study_id) for follower in followers]
        assert all(other == first for other in others)
        assert [trial["number"] for trial in first] == list(range(100))
        assert len({trial["id"] for trial in first}) == 100

    def test_a_large_batch_arrives_in_one_exchange(self, ours: Follower, theirs: Follower) -> None:
        study_id = ours.create_study("s")
        trial_id = ours.create_trial(study_id)
        ours.exchange(
            *(
                r.SetTrialIntermediateValue(
                    trial_id=trial_id, step=step, intermediate_value=float(step), **ours.mark()
                )
                for step in range(3000)
            )
        )
        (trial,) = theirs.trials(study_id)
        assert trial.intermediate_values == {step: float(step) for step in range(3000)}

    # --- verdicts --------------------------------------------------------------------------------

    def test_each_record_of_a_batch_has_its_own_verdict(
        self, ours: Follower, theirs: Follower
    ) -> None:
        study_id = ours.create_study("s")
        finished, running = ours.create_trial(study_id), ours.create_trial(study_id)
        ours.exchange(ours.state(finished, r.COMPLETE, [0.0]))
        outcomes = ours.exchange(
            ours.user_attr(running, "k", 1),
            ours.user_attr(finished, "k", 1),
            ours.user_attr(running, "l", 1),
        )
        assert [outcome.verdict for outcome in outcomes] == [
            Verdict.ACCEPTED,
            Verdict.FINISHED,
            Verdict.ACCEPTED,
        ]
        assert [trial.user_attrs for trial in theirs.trials(study_id)] == [{}, {"k": 1, "l": 1}]

    def test_a_name_is_taken_once(self, ours: Follower, theirs: Follower) -> None:
        ours.create_study("s")
        record = r.CreateStudy(study_name="s", directions=[_MINIMIZE], **theirs.mark())
        (outcome,) = theirs.exchange(record)
        assert outcome.verdict is Verdict.DUPLICATED_STUDY

    def test_a_taken_name_is_taken_beside_a_free_one(
        self, ours: Follower, theirs: Follower
    ) -> None:
        """As when threads create studies together."""
        ours.create_study("taken")
        records = [
            r.CreateStudy(study_name=name, directions=[_MINIMIZE], **theirs.mark())
            for name in ("free", "taken", "also free", "free")
        ]
        outcomes = theirs.exchange(*records)
        accepted, duplicated = Verdict.ACCEPTED, Verdict.DUPLICATED_STUDY
        assert [one.verdict for one in outcomes] == [accepted, duplicated, accepted, duplicated]
        assert outcomes[0].id != outcomes[2].id

    def test_one_of_many_creates_of_one_study_wins(self, open_log: OpenLog) -> None:
        followers = [Follower(open_log(), f"w{number}") for number in range(8)]
        verdicts: list[Verdict] = []

        def work(follower: Follower) -> None:
            record = r.CreateStudy(study_name="s", directions=[_MINIMIZE], **follower.mark())
            verdicts.extend(outcome.verdict for outcome in follower.exchange(record))

        run_threads([(work, follower) for follower in followers])
        assert sorted(verdicts) == [Verdict.ACCEPTED] + [Verdict.DUPLICATED_STUDY] * 7

    def test_a_waiting_trial_is_claimed_once(self, open_log: OpenLog) -> None:
        followers = [Follower(open_log(), f"w{number}") for number in range(4)]
        study_id = followers[0].create_study("s")
        ids = [
            followers[0].create_trial(study_id, state=r.WAITING, datetime_start=None)
            for _ in range(10)
        ]
        won: list[int] = []
        lost: list[Verdict] = []

        def work(follower: Follower) -> None:
            follower.exchange(wanted=Wanted(waiting_of=frozenset({study_id})))
            for trial_id in ids:
                (outcome,) = follower.exchange(follower.state(trial_id, r.RUNNING))
                if outcome.verdict is Verdict.ACCEPTED:
                    won.append(trial_id)
                else:
                    lost.append(outcome.verdict)

        run_threads([(work, follower) for follower in followers])
        assert sorted(won) == ids
        assert lost == [Verdict.LOST] * 30

    def test_a_finished_trial_takes_no_record(self, ours: Follower, theirs: Follower) -> None:
        study_id = ours.create_study("s")
        trial_id = ours.create_trial(study_id)
        theirs.trials(study_id)
        ours.exchange(ours.state(trial_id, r.COMPLETE, [1.0]))
        before = ours.contents(study_id)
        outcomes = theirs.exchange(
            theirs.param(trial_id, "x", 0.5, _UNIT),
            theirs.user_attr(trial_id, "k", 1),
            theirs.state(trial_id, r.FAIL),
        )
        assert {outcome.verdict for outcome in outcomes} == {Verdict.FINISHED}
        assert ours.contents(study_id) == before

    def test_an_incompatible_distribution_is_refused(
        self, ours: Follower, theirs: Follower
    ) -> None:
        study_id = ours.create_study("s")
        first, second = ours.create_trial(study_id), theirs.create_trial(study_id)
        wanted = Wanted(params=frozenset({(study_id, "x")}))
        (outcome,) = ours.exchange(ours.param(first, "x", 0.5, _UNIT), wanted=wanted)
        assert outcome.verdict is Verdict.ACCEPTED
        (outcome,) = theirs.exchange(theirs.param(second, "x", 1.0, _CHOICES), wanted=wanted)
        assert outcome.verdict is Verdict.INCOMPATIBLE
        assert [trial.params for trial in ours.trials(study_id)] == [{"x": 0.5}, {}]

    def test_a_deleted_study_takes_no_record(self, ours: Follower, theirs: Follower) -> None:
        study_id = ours.create_study("s")
        trial_id = ours.create_trial(study_id)
        theirs.trials(study_id)
        ours.exchange(r.DeleteStudy(study_id=study_id, **ours.mark()))
        outcomes = theirs.exchange(
            r.CreateTrial(study_id=study_id, datetime_start=_TIME, **theirs.mark()),
            r.SetStudyUserAttr(study_id=study_id, user_attr={"k": 1}, **theirs.mark()),
            r.DeleteStudy(study_id=study_id, **theirs.mark()),
            theirs.user_attr(trial_id, "k", 1),
        )
        assert [outcome.verdict for outcome in outcomes] == [Verdict.NO_STUDY] * 3 + [
            Verdict.NO_TRIAL
        ]
        for follower in (ours, theirs):
            follower.exchange(wanted=Wanted(catalogue=True))
            assert follower.replica.studies() == []

    def test_a_deleted_name_may_be_used_again(self, ours: Follower, theirs: Follower) -> None:
        study_id = ours.create_study("s")
        ours.create_trial(study_id)
        theirs.trials(study_id)
        ours.exchange(r.DeleteStudy(study_id=study_id, **ours.mark()))
        again = ours.create_study("s")
        theirs.exchange(wanted=Wanted(names=frozenset({"s"})))
        assert theirs.replica.study_id("s") == again
        assert theirs.trials(again) == []

    # --- what an answer covers -------------------------------------------------------------------

    @pytest.fixture
    def stocked(self, ours: Follower) -> dict[str, Any]:
        """Two studies; the first with a COMPLETE, a WAITING and a RUNNING trial."""
        study_id, other_id = ours.create_study("s"), ours.create_study("t")
        ours.exchange(r.SetStudyUserAttr(study_id=study_id, user_attr={"k": 1}, **ours.mark()))
        complete = ours.create_trial(study_id)
        ours.exchange(ours.param(complete, "x", 0.5, _UNIT))
        ours.exchange(ours.state(complete, r.COMPLETE, [1.0]))
        waiting = ours.create_trial(study_id, state=r.WAITING, datetime_start=None)
        running = ours.create_trial(study_id)
        return {
            "study": study_id,
            "other": other_id,
            "complete": complete,
            "waiting": waiting,
            "running": running,
        }

    def test_wanting_the_catalogue_covers_every_study(
        self, theirs: Follower, stocked: dict[str, Any]
    ) -> None:
        theirs.exchange(wanted=Wanted(catalogue=True))
        found = [(study.study_name, study.user_attrs) for study in theirs.replica.studies()]
        assert found == [("s", {"k": 1}), ("t", {})]

    def test_wanting_a_name_covers_the_study_or_its_absence(
        self, theirs: Follower, stocked: dict[str, Any]
    ) -> None:
        theirs.exchange(wanted=Wanted(names=frozenset({"s", "none"})))
        assert theirs.replica.study_id("s") == stocked["study"]
        assert theirs.replica.study_user_attrs(stocked["study"]) == {"k": 1}
        with pytest.raises(KeyError):
            theirs.replica.study_id("none")

    def test_wanting_a_study_covers_its_attributes(
        self, ours: Follower, theirs: Follower, stocked: dict[str, Any]
    ) -> None:
        wanted = Wanted(studies=frozenset({stocked["study"]}))
        theirs.exchange(wanted=wanted)
        assert theirs.replica.study_user_attrs(stocked["study"]) == {"k": 1}
        record = r.SetStudyUserAttr(
            study_id=stocked["study"],
            user_attr={
                "k": 2,
            },
            **ours.mark(),
        )
        ours.exchange(record)
        theirs.exchange(wanted=wanted)
        assert theirs.replica.study_user_attrs(stocked["study"]) == {"k": 2}

    def test_wanting_waiting_trials_covers_them_as_they_come_and_go(
        self, ours: Follower, theirs: Follower, stocked: dict[str, Any]
    ) -> None:
        study_id = stocked["study"]
        wanted = Wanted(waiting_of=frozenset({study_id}))

        def waiting() -> list[int]:
            theirs.exchange(wanted=wanted)
            return [t._trial_id for t in theirs.replica.trials(study_id, (TrialState.WAITING,))]

        assert waiting() == [stocked["waiting"]]
        queued = ours.create_trial(study_id, state=r.WAITING, datetime_start=None)
        assert waiting() == [stocked["waiting"], queued]
        ours.exchange(ours.state(stocked["waiting"], r.RUNNING))
        assert waiting() == [queued]

    @pytest.mark.parametrize("n_left", [0, 1, 60, 150])
    def test_wanting_the_next_of_a_queue_covers_so_many_of_them(
        self, ours: Follower, theirs: Follower, n_left: int
    ) -> None:
        study_id = ours.create_study("s")
        ours.exchange(
            *(
                r.CreateTrial(
                    study_id=study_id, state=r.WAITING, datetime_start=None, **ours.mark()
                )
                for _ in range(200)
            )
        )
        wanted = Wanted(next_of=frozenset({study_id}))

        def waiting(of: Follower) -> list[int]:
            return [t._trial_id for t in of.replica.trials(study_id, (TrialState.WAITING,))]

        theirs.exchange(wanted=wanted)
        queued = waiting(theirs)
        assert len(queued) == 200
        # Some from the beginning, one from the middle of the next.
        gone = queued[: max(n_left - 1, 0)] + queued[n_left + 3 : n_left + 4]
        ours.exchange(*(ours.state(one, r.RUNNING) for one in gone))
        late = ours.create_trial(study_id, state=r.WAITING, datetime_start=None)
        theirs.exchange(wanted=wanted)
        there = [one for one in queued if one not in gone]
        assert waiting(theirs)[:NEXT_MIN] == there[:NEXT_MIN]
        assert waiting(theirs)[-1] == late
        theirs.exchange(wanted=Wanted(waiting_of=frozenset({study_id})))
        assert waiting(theirs) == [*there, late]

    def test_wanting_the_finished_covers_whoever_finishes(
        self, ours: Follower, theirs: Follower, stocked: dict[str, Any]
    ) -> None:
        study_id = stocked["study"]
        wanted = Wanted(finished_of=frozenset({study_id}))

        def finished() -> list[dict[str, Any]]:
            theirs.exchange(wanted=wanted)
            return [trial_contents(x) for x in theirs.replica.trials(study_id, _FINISHED)]

        def truth() -> list[dict[str, Any]]:
            return [trial_contents(x) for x in ours.trials(study_id) if x.state in _FINISHED]

        assert finished() == truth()
        ours.exchange(ours.user_attr(stocked["running"], "late", True))
        assert finished() == truth()
        claimed, ended = ours.create_trial(study_id), ours.create_trial(study_id)
        ours.exchange(ours.state(ended, r.FAIL))
        ours.exchange(ours.state(stocked["waiting"], r.RUNNING))
        assert finished() == truth()
        for one in (stocked["running"], stocked["waiting"], claimed):
            ours.exchange(ours.state(one, r.COMPLETE, [2.0]))
            assert finished() == truth()
        assert len(finished()) == len(ours.trials(study_id))
        ours.exchange(r.DeleteStudy(study_id=study_id, **ours.mark()))
        theirs.exchange(wanted=wanted)
        with pytest.raises(KeyError):
            theirs.replica.trials(study_id, _FINISHED)

    def test_wanting_a_trial_covers_it(self, theirs: Follower, stocked: dict[str, Any]) -> None:
        theirs.exchange(wanted=Wanted(trials=frozenset({stocked["complete"]})))
        trial = theirs.replica.trial(stocked["complete"])
        assert (trial.state, trial.params) == (TrialState.COMPLETE, {"x": 0.5})

    def test_wanting_a_trial_covers_its_absence(
        self, theirs: Follower, stocked: dict[str, Any]
    ) -> None:
        absent = max(stocked.values()) + 1000
        theirs.exchange(wanted=Wanted(trials=frozenset({absent})))
        with pytest.raises(KeyError):
            theirs.replica.trial(absent)

    def test_wanting_a_number_covers_that_trial(
        self, theirs: Follower, stocked: dict[str, Any]
    ) -> None:
        study_id = stocked["study"]
        theirs.exchange(wanted=Wanted(numbers=frozenset({(study_id, 1), (study_id, 7)})))
        assert theirs.replica.trial_id(study_id, 1) == stocked["waiting"]
        with pytest.raises(KeyError):
            theirs.replica.trial_id(study_id, 7)

    def test_wanting_a_parameter_covers_its_distribution(
        self, theirs: Follower, stocked: dict[str, Any]
    ) -> None:
        study_id = stocked["study"]
        theirs.exchange(wanted=Wanted(params=frozenset({(study_id, "x"), (study_id, "y")})))
        assert theirs.replica.distribution(study_id, "x") == FloatDistribution(0.0, 1.0)
        assert theirs.replica.distribution(study_id, "y") is None

    @pytest.mark.parametrize(
        "kind", ["names", "studies", "finished_of", "waiting_of", "next_of", "trials", "params"]
    )
    def test_a_narrow_read_skips_nothing_that_a_wider_one_needs_later(
        self, ours: Follower, theirs: Follower, stocked: dict[str, Any], kind: str
    ) -> None:
        study_id = stocked["study"]
        narrow = {
            "names": Wanted(names=frozenset({"s"})),
            "studies": Wanted(studies=frozenset({study_id})),
            "finished_of": Wanted(finished_of=frozenset({study_id})),
            "waiting_of": Wanted(waiting_of=frozenset({study_id})),
            "next_of": Wanted(next_of=frozenset({study_id})),
            "trials": Wanted(trials=frozenset({stocked["running"]})),
            "params": Wanted(params=frozenset({(study_id, "x")})),
        }[kind]
        theirs.exchange(wanted=narrow)
        ours.exchange(ours.user_attr(stocked["running"], "late", True))
        theirs.exchange(wanted=narrow)
        ours.exchange(ours.state(stocked["running"], r.COMPLETE, [2.0]))
        ours.exchange(ours.state(stocked["waiting"], r.RUNNING))
        theirs.exchange(wanted=narrow)
        assert theirs.contents(study_id) == ours.contents(study_id)

    # --- handles ---------------------------------------------------------------------------------

    def test_a_closed_log_opens_again(self, ours: Follower) -> None:
        study_id = ours.create_study("s")
        ours.log.close()
        ours.create_trial(study_id)
        ours.log.close()
        ours.log.close()
        assert [trial.number for trial in ours.trials(study_id)] == [0]

    def test_a_pickled_log_carries_its_address(self, ours: Follower) -> None:
        if not self.crosses_processes:
            pytest.skip("The log does not leave its process.")
        study_id = ours.create_study("s")
        copy = Follower(pickle.loads(pickle.dumps(ours.log)), "copy")
        copy.create_trial(study_id)
        assert copy.contents(study_id) == ours.contents(study_id)

    def test_a_pickled_log_works_in_a_spawned_process(self, ours: Follower) -> None:
        if not self.crosses_processes:
            pytest.skip("The log does not leave its process.")
        study_id = ours.create_study("s")
        context = multiprocessing.get_context("spawn")
        child = context.Process(target=create_trials, args=(ours.log, "child", study_id, 5))
        child.start()
        child.join(_DEADLINE_S)
        assert child.exitcode == 0
        assert [trial.number for trial in ours.trials(study_id)] == [0, 1, 2, 3, 4]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_parent_and_forked_child_use_one_handle(self, ours: Follower) -> None:
        if not self.crosses_processes:
            pytest.skip("The log does not leave its process.")
        study_id = ours.create_study("s")
        context = multiprocessing.get_context("fork")
        child = context.Process(target=create_trials, args=(ours.log, "child", study_id, 20))
        child.start()
        for _ in range(20):
            ours.create_trial(study_id)
        child.join(_DEADLINE_S)
        assert child.exitcode == 0
        numbers = [trial.number for trial in ours.trials(study_id)]
        assert numbers == list(range(40))

    # --- values ----------------------------------------------------------------------------------

    def test_odd_attributes_come_back_as_they_were(self, ours: Follower, theirs: Follower) -> None:
        study_id = ours.create_study("s")
        trial_id = ours.create_trial(study_id)
        written = dict(ODD_ATTRIBUTES)
        if self.keeps_every_text:
            written |= {f"text {number}": text for number, text in enumerate(ODD_TEXTS)}
        if self.keeps_every_key:
            written |= {text: number for number, text in enumerate(ODD_TEXTS)}
        ours.exchange(*(ours.user_attr(trial_id, key, value) for key, value in written.items()))
        (trial,) = theirs.trials(study_id)
        exact = self.keeps_negative_zero
        assert plain(trial.user_attrs, exact=exact) == plain(written, exact=exact)

    def test_odd_floats_come_back_as_they_were(self, ours: Follower, theirs: Follower) -> None:
        study_id = ours.create_study("s")
        trial_id = ours.create_trial(study_id)
        written = dict(enumerate(ODD_FLOATS))
        ours.exchange(
            *(
                r.SetTrialIntermediateValue(
                    trial_id=trial_id, step=step, intermediate_value=value, **ours.mark()
                )
                for step, value in written.items()
            )
        )
        (trial,) = theirs.trials(study_id)
        exact = self.keeps_negative_zero
        assert plain(trial.intermediate_values, exact=exact) == plain(written, exact=exact)

    def test_large_integer_parameters_are_exact(self, ours: Follower, theirs: Follower) -> None:
        study_id = ours.create_study("s")
        trial_id = ours.create_trial(study_id)
        json = distribution_to_json(IntDistribution(-(2**53), 2**53))
        ours.exchange(
            ours.param(trial_id, "low", float(-(2**53)), json),
            ours.param(trial_id, "high", float(2**53 - 1), json),
        )
        (trial,) = theirs.trials(study_id)
        assert trial.params == {"low": -(2**53), "high": 2**53 - 1}

    def test_a_large_attribute_comes_back_whole(self, ours: Follower, theirs: Follower) -> None:
        study_id = ours.create_study("s")
        trial_id = ours.create_trial(study_id)
        value = "0123456789abcdef" * (self.attribute_bytes_max // 16)
        value = value[: self.attribute_bytes_max - 2]  # the quotes of its JSON
        ours.exchange(ours.user_attr(trial_id, "large", value))
        (trial,) = theirs.trials(study_id)
        assert trial.user_attrs["large"] == value


def create_trials(log: Log, worker_id: str, study_id: int, n_trials: int) -> None:
    """What a child process does."""
    follower = Follower(log, worker_id)
    follower.exchange(wanted=Wanted(studies=frozenset({study_id})))
    for _ in range(n_trials):
        follower.create_trial(study_id)
