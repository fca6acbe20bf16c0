"""Conditional exchanges with tables: what they cost, and that a fault leaves no half of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
import threading
from typing import Any

import pytest
import sqlalchemy as sa
from tests.faults.test_relational_faults import DRIVERS, KINDS, cut

from servers import new_database, proxied
from trialstore import records as r
from trialstore.log import Wanted
from trialstore.logs.relational import TablesLog
from trialstore.records import AnyOperation, Outcome, Verdict
from trialstore.testing.follower import Follower

_DEADLINE_S = 60.0


class _Reaper(Follower):
    """Fails a trial and queues its retry, if it is RUNNING.

    Attributes:
        n_decisions: How often it was asked.
    """

    def __init__(self, url: str, worker_id: str = "reaper") -> None:
        super().__init__(TablesLog(url), worker_id)
        self.n_decisions = 0

    def reap(self, study_id: int, trial_id: int, **wanted: Any) -> list[Outcome]:
        def decide() -> Sequence[AnyOperation]:
            self.n_decisions += 1
            if self.replica.trial(trial_id).state.is_finished():
                return []
            retry = r.CreateTrial(
                study_id=study_id,
                datetime_start=None,
                state=r.WAITING,
                system_attrs={"of": trial_id},
                **self.mark(),
            )
            return [self.state(trial_id, r.FAIL), retry]

        return self.exchange_if(decide, Wanted(trials_of=frozenset({study_id}), **wanted))

    def is_exact(self, study_id: int) -> bool:
        """Whether each trial that failed has one retry, and no other has."""
        trials = self.trials(study_id)
        failed = [x._trial_id for x in trials if x.state.name == "FAIL"]
        return failed == [x.system_attrs["of"] for x in trials if x.state.name == "WAITING"]


@pytest.mark.parametrize("kind", DRIVERS)
def test_what_is_known_to_be_written_on_costs_two_round_trips(kind: str, tmp_path: Path) -> None:
    with proxied(new_database(kind, tmp_path)) as (proxy, url):
        one = _Reaper(url)
        study_id = one.create_study("s")
        trips: list[int] = []
        for named in (True, False):
            trial_id = one.create_trial(study_id)
            before = proxy.n_round_trips
            assert len(one.reap(study_id, trial_id, **_named(trial_id, named))) == 2
            trips.append(proxy.n_round_trips - before)
            assert one.reap(study_id, trial_id, **_named(trial_id, named)) == []
        assert trips == [2, 3]
        assert one.n_decisions == 1 + 1 + 2 + 1, "asked again where a lock was missing"
        one.log.close()


def _named(trial_id: int, named: bool) -> dict[str, Any]:
    return {"trials": frozenset({trial_id})} if named else {}


@pytest.mark.parametrize("kind", DRIVERS)
@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("way", ["two messages", "three messages", "stepwise"])
def test_each_message_of_a_conditional_exchange_is_lost_once(
    kind: str, applied: bool, way: str, tmp_path: Path
) -> None:
    one = _Reaper(new_database(kind, tmp_path))
    study_id = one.create_study("s")
    at = 0
    while True:
        at += 1
        trial_id = one.create_trial(study_id)
        if way == "stepwise":
            one.log.connection.dialect.one_message = False
        happened = cut(one, at, applied=applied)
        outcomes = one.reap(study_id, trial_id, **_named(trial_id, way == "two messages"))
        assert [x.verdict for x in outcomes] == [Verdict.ACCEPTED] * 2
        assert one.replica.trial(outcomes[1].id).system_attrs == {"of": trial_id}
        if not happened():
            break
    assert at > {"two messages": 2, "three messages": 3, "stepwise": 5}[way]
    late = _Reaper(one.log.url, "late")
    assert late.is_exact(study_id)
    assert len(late.trials(study_id)) == 2 * at, "no ghost"


@pytest.mark.parametrize("kind", DRIVERS[:2])
def test_a_deadlock_has_it_decided_again(kind: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    one = _Reaper(url)
    study_id = one.create_study("s")
    trial_id = one.create_trial(study_id)
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    holds, ended = threading.Event(), threading.Event()

    def other() -> None:
        """Takes the trial before the study, which nobody should."""
        with engine.begin() as connection:
            connection.execute(sa.text("SET deadlock_timeout = '60s'"))  # we shall be the victim
            connection.execute(sa.text("SELECT 1 FROM trials FOR UPDATE"))
            holds.set()
            connection.execute(sa.text("SELECT 1 FROM studies FOR UPDATE"))
            attr = "INSERT INTO trial_user_attributes (trial_id, key, value_json)"
            connection.execute(sa.text(f"{attr} VALUES ({trial_id}, 'k', '1')"))
        ended.set()

    seen: list[dict[str, Any]] = []
    thread = threading.Thread(target=other)

    def decide() -> Sequence[AnyOperation]:
        seen.append(one.replica.trial(trial_id).user_attrs)
        if len(seen) == 1:
            thread.start()
            assert holds.wait(_DEADLINE_S)
        return [one.state(trial_id, r.FAIL)]

    (outcome,) = one.exchange_if(decide, Wanted(trials_of=frozenset({study_id})))
    assert ended.wait(_DEADLINE_S)
    thread.join()
    assert outcome.verdict is Verdict.ACCEPTED
    assert seen[0] == {}
    assert seen[-1] == {"k": 1}, "decided on what the other one wrote"
    engine.dispose()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_decision_raises_is_not_taken_for_the_databases(kind: str, tmp_path: Path) -> None:
    one = _Reaper(new_database(kind, tmp_path))
    study_id = one.create_study("s")
    raised: list[BaseException] = [ConnectionResetError("the caller's own"), KeyboardInterrupt()]
    for error in raised:

        def decide(error: BaseException = error) -> Sequence[AnyOperation]:
            one.n_decisions += 1
            raise error

        with pytest.raises(type(error)) as caught:
            one.exchange_if(decide, Wanted(trials_of=frozenset({study_id})))
        assert caught.value is error
        _holds_nothing(one.log.url, study_id)
    assert one.n_decisions == 2
    one.create_trial(study_id)


def _holds_nothing(url: str, study_id: int) -> None:
    other = _Reaper(url, "other")
    other.exchange(wanted=Wanted(studies=frozenset({study_id})))
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(other.create_trial(study_id)))
    thread.start()
    thread.join(_DEADLINE_S)
    assert done, "something is locked"
    other.log.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_no_column_holds_leaves_nothing_decided(kind: str, tmp_path: Path) -> None:
    one = _Reaper(new_database(kind, tmp_path))
    study_id = one.create_study("s")
    trial_id = one.create_trial(study_id)
    for bad in (one.user_attr(trial_id, "\ud800", 1), _step(one, trial_id, 2**70)):
        with pytest.raises(ValueError):
            one.exchange_if(
                lambda bad=bad: [one.user_attr(trial_id, "good", 1), bad],
                Wanted(trials_of=frozenset({study_id})),
            )
    assert [x.user_attrs for x in one.trials(study_id)] == [{}]
    _holds_nothing(one.log.url, study_id)


def _step(one: Follower, trial_id: int, step: int) -> r.SetTrialIntermediateValue:
    return r.SetTrialIntermediateValue(
        trial_id=trial_id, step=step, intermediate_value=0.0, **one.mark()
    )
