"""The contracts of ``ConditionalLog`` and ``LeaseStore``, as parts of ``LogSuite``.

A log says which of them it lacks (``LogCapabilities``), and is held to that: one that has lost a
capability fails instead of being skipped. ``LeaseSuite`` wants one more fixture, ``age_leases``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import multiprocessing
import threading
from typing import Any, cast

import pytest

from trialstore import records as r
from trialstore.log import ConditionalLog, LeaseStore, Log, Wanted
from trialstore.records import AnyOperation, Verdict
from trialstore.testing.follower import Follower

_TIME = "2026-01-02T03:04:05.678901"
_DEADLINE_S = 120.0

OpenLog = Callable[[], Log]
AgeLeases = Callable[[float], None]
"""Makes every lease in the store look renewed so many seconds earlier than it was."""


def run_threads(calls: Sequence[tuple[Callable[[Follower], None], Follower]]) -> None:
    """Each call in a thread of its own; what one of them raises is raised here."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[Follower], None], follower: Follower) -> None:
        try:
            work(follower)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_DEADLINE_S)
        assert not thread.is_alive(), "a writer hangs"
    if errors:
        raise errors[0]


def _of(study_id: int) -> Wanted:
    return Wanted(trials_of=frozenset({study_id}))


def _create(follower: Follower, study_id: int, **fields: Any) -> r.CreateTrial:
    return r.CreateTrial(study_id=study_id, datetime_start=_TIME, **fields, **follower.mark())


def create_while_fewer(follower: Follower, study_id: int, n_max: int) -> int:
    """Append trials one by one, each if there are fewer than ``n_max``; how many it were."""
    n_created = 0

    def decide() -> list[AnyOperation]:
        n_trials = len(follower.replica.trials(study_id, None))
        return [_create(follower, study_id)] if n_trials < n_max else []

    while follower.exchange_if(decide, _of(study_id)):
        n_created += 1
    return n_created


def create_while_fewer_in_child(log: Log, worker_id: str, study_id: int, n_max: int) -> None:
    """What a child process does."""
    create_while_fewer(Follower(log, worker_id), study_id, n_max)


class LogCapabilities:
    """What a log can do; a subclass says what it can't."""

    crosses_processes = True
    """Two processes can open the log."""
    is_conditional = True
    """It is a ``ConditionalLog``."""
    keeps_leases = True
    """It is a ``LeaseStore``."""

    def test_capabilities_are_those_that_it_says(self, ours: Follower) -> None:
        assert isinstance(ours.log, ConditionalLog) == self.is_conditional
        assert isinstance(ours.log, LeaseStore) == self.keeps_leases

    @pytest.fixture
    def conditional(self) -> None:
        """For a test that appends on a condition."""
        if not self.is_conditional:
            pytest.skip("The log is no ConditionalLog.")


class ConditionalSuite(LogCapabilities):
    """Every promise of ``ConditionalLog``."""

    @pytest.fixture(autouse=True)
    def _skip_without_capability(self, request: pytest.FixtureRequest) -> None:
        if request.function.__name__.startswith("test_exchange_if"):
            request.getfixturevalue("conditional")

    def test_exchange_if_decides_on_all_that_is_there(
        self, ours: Follower, theirs: Follower
    ) -> None:
        study_id = theirs.create_study("s")
        ids = [theirs.create_trial(study_id) for _ in range(3)]
        theirs.exchange(theirs.state(ids[0], r.COMPLETE, [1.0]))
        seen: list[tuple[int, str]] = []

        def decide() -> list[AnyOperation]:
            found = ours.replica.trials(study_id, None)
            seen.extend((trial._trial_id, trial.state.name) for trial in found)
            return []

        assert ours.exchange_if(decide, _of(study_id)) == []
        assert seen == list(zip(ids, ["COMPLETE", "RUNNING", "RUNNING"], strict=True))

    def test_exchange_if_appends_what_was_decided(self, ours: Follower, theirs: Follower) -> None:
        study_id = ours.create_study("s")
        trial_id = theirs.create_trial(study_id)

        def decide() -> list[AnyOperation]:
            return [
                ours.user_attr(trial_id, "k", 1),
                ours.state(trial_id, r.FAIL),
                _create(ours, study_id, state=r.WAITING, user_attrs={"of": trial_id}),
            ]

        outcomes = ours.exchange_if(decide, _of(study_id))
        assert [outcome.verdict for outcome in outcomes] == [Verdict.ACCEPTED] * 3
        assert ours.replica.trial(outcomes[2].id).user_attrs == {"of": trial_id}
        assert [(t.state.name, t.user_attrs) for t in theirs.trials(study_id)] == [
            ("FAIL", {"k": 1}),
            ("WAITING", {"of": trial_id}),
        ]
        assert ours.contents(study_id) == theirs.contents(study_id)

    def test_exchange_if_gives_each_record_its_own_verdict(
        self, ours: Follower, theirs: Follower
    ) -> None:
        study_id = ours.create_study("s")
        finished, running = ours.create_trial(study_id), ours.create_trial(study_id)
        theirs.exchange(theirs.state(finished, r.COMPLETE, [0.0]))
        outcomes = ours.exchange_if(
            lambda: [ours.state(finished, r.FAIL), ours.state(running, r.FAIL)], _of(study_id)
        )
        assert [x.verdict for x in outcomes] == [Verdict.FINISHED, Verdict.ACCEPTED]

    def test_exchange_if_that_decides_nothing_leaves_the_log_alone(
        self, ours: Follower, theirs: Follower
    ) -> None:
        study_id = ours.create_study("s")
        ours.create_trial(study_id)
        before = theirs.contents(study_id)
        for _ in range(3):
            assert ours.exchange_if(list, _of(study_id)) == []
        assert theirs.contents(study_id) == before
        assert ours.contents(study_id) == before

    def test_exchange_if_whose_decision_fails_leaves_nothing_behind(
        self, ours: Follower, theirs: Follower
    ) -> None:
        study_id = ours.create_study("s")
        trial_id = ours.create_trial(study_id)
        before = theirs.contents(study_id)

        def fail() -> list[AnyOperation]:
            raise ArithmeticError("undecided")

        with pytest.raises(ArithmeticError, match="undecided"):
            ours.exchange_if(fail, _of(study_id))
        assert theirs.contents(study_id) == before
        # Nobody is kept out by what was left half done.
        theirs.exchange(theirs.user_attr(trial_id, "k", 1))
        ours.exchange_if(lambda: [ours.state(trial_id, r.FAIL)], _of(study_id))
        assert [trial.state.name for trial in theirs.trials(study_id)] == ["FAIL"]

    def test_exchange_if_of_many_threads_stops_at_the_limit(self, open_log: OpenLog) -> None:
        followers = [Follower(open_log(), f"w{number}") for number in range(5)]
        study_id = followers[0].create_study("s")
        created: list[int] = []
        run_threads(
            [
                (lambda one: created.append(create_while_fewer(one, study_id, 20)), follower)
                for follower in followers
            ]
        )
        assert sum(created) == 20
        assert len(followers[0].trials(study_id)) == 20

    def test_exchange_if_of_many_processes_stops_at_the_limit(self, ours: Follower) -> None:
        if not self.crosses_processes:
            pytest.skip("The log does not leave its process.")
        study_id = ours.create_study("s")
        context = multiprocessing.get_context("spawn")
        children = [
            context.Process(
                target=create_while_fewer_in_child, args=(ours.log, f"c{number}", study_id, 30)
            )
            for number in range(3)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(_DEADLINE_S)
        assert [child.exitcode for child in children] == [0] * 3
        assert len(ours.trials(study_id)) == 30

    def test_exchange_if_lets_no_plain_writer_between(self, open_log: OpenLog) -> None:
        followers = [Follower(open_log(), f"w{number}") for number in range(4)]
        study_id = followers[0].create_study("s")

        def create(follower: Follower) -> None:
            for _ in range(15):
                follower.create_trial(study_id)

        def count(follower: Follower) -> None:
            def decide() -> list[AnyOperation]:
                n_trials = len(follower.replica.trials(study_id, None))
                return [_create(follower, study_id, user_attrs={"n_before": n_trials})]

            for _ in range(10):
                follower.exchange_if(decide, _of(study_id))

        run_threads(
            [(work, one) for work, one in zip([create, count] * 2, followers, strict=True)]
        )
        found = followers[0].trials(study_id)
        assert len(found) == 50
        counted = [trial for trial in found if "n_before" in trial.user_attrs]
        assert len(counted) == 20
        assert [t.user_attrs["n_before"] for t in counted] == [t.number for t in counted]

    def test_exchange_if_fails_a_trial_and_queues_its_retry_once(self, open_log: OpenLog) -> None:
        worker, *reapers = [Follower(open_log(), f"w{number}") for number in range(5)]
        study_id = worker.create_study("s")
        ids = [worker.create_trial(study_id) for _ in range(8)]

        def finish(follower: Follower) -> None:
            for trial_id in reversed(ids):
                follower.exchange(follower.state(trial_id, r.COMPLETE, [1.0]))

        def reap(follower: Follower) -> None:
            for trial_id in ids:

                def decide(trial_id: int = trial_id) -> list[AnyOperation]:
                    if follower.replica.trial(trial_id).state.is_finished():
                        return []
                    retry = _create(
                        follower, study_id, state=r.WAITING, user_attrs={"of": trial_id}
                    )
                    return [follower.state(trial_id, r.FAIL), retry]

                outcomes = follower.exchange_if(decide, _of(study_id))
                assert {outcome.verdict for outcome in outcomes} <= {Verdict.ACCEPTED}

        run_threads([(finish, worker), *((reap, reaper) for reaper in reapers)])
        found = worker.trials(study_id)
        failed = [trial._trial_id for trial in found if trial.state.name == "FAIL"]
        retried = [trial.user_attrs["of"] for trial in found if trial.state.name == "WAITING"]
        assert sorted(retried) == failed, "each failed trial has one retry, a finished one none"
        assert len(found) == len(ids) + len(failed)


class LeaseSuite(LogCapabilities):
    """Every promise of ``LeaseStore``. Time passes by ``age_leases`` only."""

    @pytest.fixture
    def age_leases(self) -> AgeLeases:
        """Supply it with a log that keeps leases."""
        if not self.keeps_leases:
            pytest.skip("The log is no LeaseStore.")
        raise NotImplementedError("Supply an age_leases fixture, or say keeps_leases = False.")

    @pytest.fixture
    def leases(self, ours: Follower, age_leases: AgeLeases) -> LeaseStore:
        assert isinstance(ours.log, LeaseStore)
        return ours.log

    def test_a_trial_that_was_never_covered_is_never_stale(
        self, ours: Follower, leases: LeaseStore, age_leases: AgeLeases
    ) -> None:
        study_id = ours.create_study("s")
        ours.create_trial(study_id)
        age_leases(1e6)
        assert stale(ours, study_id) == []

    def test_a_lease_covers_a_trial_from_its_creation(
        self, ours: Follower, theirs: Follower, leases: LeaseStore, age_leases: AgeLeases
    ) -> None:
        study_id = ours.create_study("s")
        leases.take_lease("ours")
        age_leases(1e6)  # an idle worker does not beat
        trial_id = ours.create_trial(study_id)
        assert stale(theirs, study_id) == []
        age_leases(50.0)
        assert stale(theirs, study_id) == []
        age_leases(50.0)
        assert stale(theirs, study_id) == [trial_id]
        assert stale(ours, study_id) == [trial_id]

    def test_a_lease_covers_a_trial_from_its_claim(
        self, ours: Follower, theirs: Follower, leases: LeaseStore, age_leases: AgeLeases
    ) -> None:
        study_id = ours.create_study("s")
        waiting = [theirs.create_trial(study_id, state=r.WAITING) for _ in range(2)]
        leases.take_lease("ours")
        age_leases(1e6)
        for trial_id in waiting:
            ours.exchange(ours.state(trial_id, r.RUNNING), wanted=_of(study_id))
        assert stale(theirs, study_id) == []
        age_leases(100.0)
        assert stale(theirs, study_id) == waiting

    @pytest.mark.usefixtures("conditional")
    def test_a_lease_covers_what_exchange_if_starts(
        self, ours: Follower, theirs: Follower, leases: LeaseStore, age_leases: AgeLeases
    ) -> None:
        study_id = ours.create_study("s")
        leases.take_lease("ours")
        age_leases(1e6)
        ours.exchange_if(lambda: [_create(ours, study_id)], _of(study_id))
        assert stale(theirs, study_id) == []
        age_leases(100.0)
        assert len(stale(theirs, study_id)) == 1

    def test_a_lost_claim_does_not_cover_the_winners_trial(
        self, ours: Follower, theirs: Follower, leases: LeaseStore, age_leases: AgeLeases
    ) -> None:
        study_id = ours.create_study("s")
        trial_id = ours.create_trial(study_id, state=r.WAITING)
        theirs.exchange(theirs.state(trial_id, r.RUNNING))
        leases.take_lease("ours")
        (outcome,) = ours.exchange(ours.state(trial_id, r.RUNNING))
        assert outcome.verdict is Verdict.LOST
        age_leases(1e6)
        assert stale(ours, study_id) == []

    def test_renewed_leases_do_not_expire(
        self, ours: Follower, theirs: Follower, leases: LeaseStore, age_leases: AgeLeases
    ) -> None:
        study_id = ours.create_study("s")
        leases.take_lease("ours")
        ids = [ours.create_trial(study_id) for _ in range(3)]
        for _ in range(3):
            age_leases(50.0)
            leases.renew_lease("ours", ids)
        assert stale(theirs, study_id) == []

    def test_a_renewal_passes_over_what_is_not_running(
        self, ours: Follower, theirs: Follower, leases: LeaseStore, age_leases: AgeLeases
    ) -> None:
        study_id = ours.create_study("s")
        leases.take_lease("ours")
        finished, requeued, running = [ours.create_trial(study_id) for _ in range(3)]
        ours.exchange(ours.state(finished, r.COMPLETE, [1.0]), ours.state(requeued, r.WAITING))
        age_leases(100.0)
        leases.renew_lease("ours", [finished, requeued, running, running + 1000])
        leases.renew_lease("ours", [])
        assert stale(theirs, study_id) == []
        age_leases(100.0)
        assert stale(theirs, study_id) == [running]

    def test_a_renewal_is_of_one_owner(
        self, ours: Follower, theirs: Follower, leases: LeaseStore, age_leases: AgeLeases
    ) -> None:
        study_id = ours.create_study("s")
        for follower in (ours, theirs):
            cast(LeaseStore, follower.log).take_lease(follower.worker_id)
        mine, other = ours.create_trial(study_id), theirs.create_trial(study_id)
        age_leases(100.0)
        leases.renew_lease("ours", [mine])
        assert stale(ours, study_id) == [other]

    def test_a_withdrawn_lease_does_not_expire(
        self, ours: Follower, theirs: Follower, leases: LeaseStore, age_leases: AgeLeases
    ) -> None:
        study_id = ours.create_study("s")
        leases.take_lease("ours")
        trial_id = ours.create_trial(study_id)
        leases.withdraw_lease("ours", [trial_id])
        later = ours.create_trial(study_id)
        age_leases(1e6)
        assert stale(theirs, study_id) == []
        leases.take_lease("ours")
        leases.renew_lease("ours", [trial_id, later])
        age_leases(100.0)
        assert stale(theirs, study_id) == [trial_id, later]

    def test_a_trial_claimed_again_lives_by_its_new_owner(
        self, ours: Follower, theirs: Follower, leases: LeaseStore, age_leases: AgeLeases
    ) -> None:
        study_id = ours.create_study("s")
        for follower in (ours, theirs):
            cast(LeaseStore, follower.log).take_lease(follower.worker_id)
        trial_id = ours.create_trial(study_id)
        age_leases(100.0)
        ours.exchange(ours.state(trial_id, r.WAITING))
        assert stale(theirs, study_id) == []
        theirs.exchange(theirs.state(trial_id, r.RUNNING))
        assert stale(ours, study_id) == []
        age_leases(100.0)
        assert stale(ours, study_id) == [trial_id]

    def test_a_trial_claimed_again_without_a_lease_is_never_stale(
        self, ours: Follower, theirs: Follower, leases: LeaseStore, age_leases: AgeLeases
    ) -> None:
        study_id = ours.create_study("s")
        leases.take_lease("ours")
        trial_id = ours.create_trial(study_id)
        ours.exchange(ours.state(trial_id, r.WAITING))
        theirs.exchange(theirs.state(trial_id, r.RUNNING))
        age_leases(1e6)
        assert stale(ours, study_id) == []

    @pytest.mark.usefixtures("conditional")
    def test_a_dozen_reapers_fail_a_lost_trial_once_and_retry_it_once(
        self, ours: Follower, open_log: OpenLog, leases: LeaseStore, age_leases: AgeLeases
    ) -> None:
        study_id = ours.create_study("s")
        leases.take_lease("ours")
        lost = ours.create_trial(study_id)
        age_leases(100.0)
        barrier = threading.Barrier(12)
        n_failed: list[int] = []

        def reap(reaper: Follower) -> None:
            found = stale(reaper, study_id)
            barrier.wait(_DEADLINE_S)
            assert found == [lost]

            def decide() -> list[AnyOperation]:
                if reaper.replica.trial(lost).state.is_finished():
                    return []
                return [reaper.state(lost, r.FAIL), _create(reaper, study_id, state=r.WAITING)]

            wanted = Wanted(trials=frozenset({lost}))
            n_failed.append(len(reaper.exchange_if(decide, wanted)))

        run_threads([(reap, Follower(open_log(), f"reaper{n}")) for n in range(12)])
        assert sorted(n_failed) == [0] * 11 + [2]
        assert [trial.state.name for trial in ours.trials(study_id)] == ["FAIL", "WAITING"]

    def test_expiry_is_asked_by_study(
        self, ours: Follower, leases: LeaseStore, age_leases: AgeLeases
    ) -> None:
        leases.take_lease("ours")
        first, second = (ours.create_study(name) for name in "st")
        expected = {study_id: [ours.create_trial(study_id)] for study_id in (first, second)}
        age_leases(100.0)
        assert {study_id: stale(ours, study_id) for study_id in (first, second)} == expected


def stale(follower: Follower, study_id: int, grace_period_s: float = 75.0) -> list[int]:
    """What the log of a follower holds expired, of all that the follower sees RUNNING."""
    ids = [trial._trial_id for trial in follower.trials(study_id) if trial.state.name == "RUNNING"]
    running: Mapping[int, str] = {one: follower.replica.owner(one) for one in ids}
    log = cast(LeaseStore, follower.log)
    return sorted(log.expired(study_id, running, grace_period_s))
