"""Exchange by exchange, the tables log says what a dict that does the same would say.

``Model`` is a replica in a dozen lines: it holds what the news said, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
from datetime import datetime, timedelta
import functools
import gc
import importlib
import json
import math
import multiprocessing
import os
from pathlib import Path
import pickle
import sqlite3
import sys
import threading
from types import FrameType
from typing import Any

import msgspec
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, distribution_to_json
from optuna.study import StudyDirection
import pytest
import sqlalchemy as sa

from servers import new_database
import trialstore
from trialstore import records as r
from trialstore.errors import LogCorruptError, LogReplacedError, LogUnavailableError
from trialstore.log import NOTHING, Wanted
from trialstore.logs.relational import TablesLog, reading, statements, tables as t
from trialstore.rdb import RDBStorage
from trialstore.records import Outcome, Verdict
from trialstore.testing.clock import ManualClock

X = distribution_to_json(FloatDistribution(0, 1))
CHOICES = distribution_to_json(CategoricalDistribution(["a", "b"]))
OTHER_CHOICES = distribution_to_json(CategoricalDistribution(["a", "c"]))
START = datetime(2026, 3, 4, 5, 6, 7, 890123)

SERVERS = [
    pytest.param(kind, marks=pytest.mark.servers) for kind in ("psycopg", "psycopg2", "pymysql")
]


@pytest.fixture(params=["sqlite", "memory", *SERVERS])
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(params=["sqlite", *SERVERS])
def shared_kind(request: pytest.FixtureRequest) -> str:
    """Kinds that two logs can meet on."""
    found: str = request.param
    return found


@pytest.fixture
def url(kind: str, tmp_path: Path) -> str:
    return new_database(kind, tmp_path)


@pytest.fixture
def shared_url(shared_kind: str, tmp_path: Path) -> str:
    return new_database(shared_kind, tmp_path)


class Model:
    """What a replica holds, by the news alone; the cursor goes through msgpack each time."""

    def __init__(self, url: str, **options: Any) -> None:
        self.log = TablesLog(url, **options)
        self.cursor: Any = None
        self.studies: dict[int, r.PutStudy] = {}
        self.trials: dict[int, r.PutTrial] = {}
        self.params: dict[tuple[int, str], str] = {}
        self.n_news = 0

    def do(self, *records: r.Operation, **wanted: Any) -> list[Outcome]:
        sets = {k: frozenset(v) if isinstance(v, set) else v for k, v in wanted.items()}
        batch = self.log.exchange(list(records), self.cursor, Wanted(**sets) if sets else NOTHING)
        self.n_news = len(batch.news)
        last = (0, 0)
        for record in batch.news:
            if isinstance(record, r.DeleteStudy):
                assert record.study_id in self.studies
                del self.studies[record.study_id]
                gone = [x.trial_id for x in self.trials.values() if x.study_id == record.study_id]
                for trial_id in gone:
                    del self.trials[trial_id]
            elif isinstance(record, r.PutStudy):
                self.studies[record.study_id] = record
            elif isinstance(record, r.PutTrial):
                assert record.study_id in self.studies
                assert last < (record.study_id, record.trial_id)
                last = (record.study_id, record.trial_id)
                self.trials[record.trial_id] = record
            elif isinstance(record, r.PutParam):
                self.params[record.study_id, record.param_name] = record.distribution
        self.cursor = msgspec.msgpack.decode(msgspec.msgpack.encode(batch.cursor), strict=False)
        assert batch.outcomes is not None
        return list(batch.outcomes)

    def study(self, name: str = "s", directions: tuple[int, ...] = (1,)) -> int:
        made = self.do(r.CreateStudy(worker_id="w", study_name=name, directions=list(directions)))
        assert made[0].verdict == Verdict.ACCEPTED
        return made[0].id

    def trial(self, study_id: int, **template: Any) -> int:
        record = r.CreateTrial(
            worker_id="w", study_id=study_id, datetime_start=time(0), **template
        )
        made = self.do(record)
        assert made[0].verdict == Verdict.ACCEPTED
        return made[0].id

    def queue(self, study_id: int, **template: Any) -> int:
        record = r.CreateTrial(
            worker_id="w", study_id=study_id, datetime_start=None, state=r.WAITING, **template
        )
        return self.do(record)[0].id

    def read(self, study_id: int) -> list[r.PutTrial]:
        self.do(trials_of={study_id})
        found = [x for x in self.trials.values() if x.study_id == study_id]
        return sorted(found, key=lambda x: x.number)


def time(second: int) -> str:
    return r.format_time(START + timedelta(seconds=second))


def tell(trial_id: int, *values: float, state: int = r.COMPLETE) -> r.SetTrialStateValues:
    return r.SetTrialStateValues(
        worker_id="w",
        trial_id=trial_id,
        state=state,
        values=list(values) or None,
        datetime_complete=time(9),
    )


def claim(trial_id: int) -> r.SetTrialStateValues:
    return r.SetTrialStateValues(
        worker_id="w", trial_id=trial_id, state=r.RUNNING, values=None, datetime_start=time(5)
    )


def param(trial_id: int, name: str, value: float = 0.5, of: str = X) -> r.SetTrialParam:
    return r.SetTrialParam(
        worker_id="w",
        trial_id=trial_id,
        param_name=name,
        param_value_internal=value,
        distribution=of,
    )


def verdicts(outcomes: list[Outcome]) -> list[str]:
    return [outcome.verdict.name for outcome in outcomes]


def test_a_trial_comes_back_as_it_was_written(url: str, kind: str) -> None:
    one = Model(url)
    study_id = one.study(directions=(1, 2))
    trial_id = one.trial(study_id)
    one.do(
        param(trial_id, "z", 0.25),
        param(trial_id, "a", 1.0, CHOICES),
        r.SetTrialUserAttr(worker_id="w", trial_id=trial_id, user_attr={"k": [1, None, "é\0"]}),
        r.SetTrialSystemAttr(worker_id="w", trial_id=trial_id, system_attr={"s": math.inf}),
        *[
            r.SetTrialIntermediateValue(
                worker_id="w", trial_id=trial_id, step=step, intermediate_value=value
            )
            for step, value in ((3, math.nan), (1, math.inf), (2, -math.inf), (7, 1e-310))
        ],
    )
    assert verdicts(one.do(tell(trial_id, math.inf, 5e-324))) == ["ACCEPTED"]
    (trial,) = Model(url).read(study_id) if kind != "memory" else one.read(study_id)
    assert list(trial.params.items()) == [("z", 0.25), ("a", 1.0)]
    assert trial.distributions == [X, CHOICES]
    assert trial.user_attrs == {"k": [1, None, "é\0"]}
    assert trial.system_attrs == {"s": math.inf}
    steps = trial.intermediate_values
    assert math.isnan(steps.pop(3))
    assert steps == {1: math.inf, 2: -math.inf, 7: 1e-310}
    assert trial.values == [math.inf, 5e-324]
    assert (trial.number, trial.state) == (0, r.COMPLETE)
    if kind != "pymysql":  # DATETIME there keeps whole seconds.
        assert (trial.datetime_start, trial.datetime_complete) == (time(0), time(9))
    (study,) = one.studies.values()
    assert study.directions == [1, 2]


def test_a_template_comes_back_as_it_was_written(url: str, kind: str) -> None:
    one = Model(url)
    study_id = one.study()
    made = one.do(
        r.CreateTrial(
            worker_id="w",
            study_id=study_id,
            datetime_start=time(1),
            datetime_complete=time(2),
            state=r.COMPLETE,
            value=0.5,
            params={"b": 0.1, "a": 0.2},
            distributions={"a": X, "b": X},
            user_attrs={"u": 1},
            system_attrs={"s": {"x": [1]}},
            intermediate_values={"4": 0.5},
        ),
        r.CreateTrial(worker_id="w", study_id=study_id, datetime_start=None, state=r.WAITING),
    )
    assert verdicts(made) == ["ACCEPTED", "ACCEPTED"]
    first, second = one.read(study_id)
    assert [first.trial_id, second.trial_id] == [outcome.id for outcome in made]
    assert (first.number, second.number) == (0, 1)
    assert list(first.params.items()) == [("b", 0.1), ("a", 0.2)]
    assert first.values == [0.5]
    assert first.user_attrs == {"u": 1}
    assert first.system_attrs == {"s": {"x": [1]}}
    assert first.intermediate_values == {4: 0.5}
    assert (second.state, second.datetime_start) == (r.WAITING, None)


def test_verdicts(url: str) -> None:
    one = Model(url)
    study_id = one.study()
    again = r.CreateStudy(worker_id="w", study_name="s", directions=[2, 2])
    assert one.do(again) == [Outcome(Verdict.DUPLICATED_STUDY)]
    running, queued = one.trial(study_id), one.queue(study_id)
    attr = {"user_attr": {"a": 1}}
    assert verdicts(
        one.do(
            claim(running),
            claim(queued),
            claim(queued),
            param(999, "x"),
            r.CreateTrial(worker_id="w", study_id=999, datetime_start=None),
            r.SetStudyUserAttr(worker_id="w", study_id=999, **attr),
            r.SetStudyUserAttr(worker_id="w", study_id=study_id, **attr),
            r.DeleteStudy(worker_id="w", study_id=999),
            tell(running),
            tell(running, 1.0),
            param(running, "x"),
            r.SetTrialUserAttr(worker_id="w", trial_id=running, **attr),
        )
    ) == [
        "LOST",
        "ACCEPTED",
        "LOST",
        "NO_TRIAL",
        "NO_STUDY",
        "NO_STUDY",
        "ACCEPTED",
        "NO_STUDY",
        "ACCEPTED",
        "FINISHED",
        "FINISHED",
        "FINISHED",
    ]
    first, second = one.read(study_id)
    assert (first.state, first.values, first.params, first.user_attrs) == (1, None, {}, {})
    assert second.state == r.RUNNING and second.datetime_start is not None
    assert one.studies[study_id].directions == [1]
    assert one.studies[study_id].user_attrs == {"a": 1}


def test_a_parameter_is_judged_where_that_is_wanted(url: str) -> None:
    one = Model(url)
    study_id = one.study()
    first, second = one.trial(study_id), one.trial(study_id)
    pair = {(study_id, "c")}
    assert verdicts(one.do(param(first, "c", 0.0, CHOICES), params=pair)) == ["ACCEPTED"]
    assert one.params[study_id, "c"] == CHOICES
    outcomes = one.do(param(second, "c", 0.0, OTHER_CHOICES), param(second, "d"), params=pair)
    assert verdicts(outcomes) == ["INCOMPATIBLE", "ACCEPTED"]
    assert one.read(study_id)[1].params == {"d": 0.5}


def test_a_parameter_set_twice_overwrites_and_keeps_its_place(url: str) -> None:
    one = Model(url)
    study_id = one.study()
    trial_id = one.trial(study_id)
    one.do(param(trial_id, "b", 0.1), param(trial_id, "a", 0.2))
    one.do(param(trial_id, "b", 0.3), trials={trial_id})
    assert list(one.trials[trial_id].params.items()) == [("b", 0.3), ("a", 0.2)]


def test_what_is_named_and_does_not_exist(url: str) -> None:
    one = Model(url)
    one.do(studies={5}, names={"no"}, trials={7}, numbers={(5, 0)}, trials_of={6}, waiting_of={7})
    assert (one.studies, one.trials) == ({}, {})


def test_the_study_of_a_trial_comes_with_it(shared_url: str) -> None:
    one, two = Model(shared_url), Model(shared_url)
    trial_id = one.trial(one.study())
    two.do(trials={trial_id})
    assert set(two.studies) == {two.trials[trial_id].study_id}
    three = Model(shared_url)
    study_id = two.trials[trial_id].study_id
    three.do(numbers={(study_id, 0)})
    assert set(three.trials) == {trial_id}


def test_two_logs_follow_each_other(shared_url: str) -> None:
    one, two = Model(shared_url), Model(shared_url)
    study_id = one.study()
    trials = [one.trial(study_id) for _ in range(3)]
    assert [x.number for x in two.read(study_id)] == [0, 1, 2]
    theirs = two.trial(study_id)
    one.do(param(trials[0], "x"), tell(trials[1], 1.0))
    states = [x.state for x in two.read(study_id)]
    assert states == [r.RUNNING, r.COMPLETE, r.RUNNING, r.RUNNING]
    assert two.trials[trials[0]].params == {"x": 0.5}
    assert one.read(study_id) == two.read(study_id)
    two.do(tell(theirs, 2.0), tell(trials[0], 3.0))
    assert one.read(study_id) == two.read(study_id)
    one.do(*[tell(trials[2], 3.0)])
    assert one.read(study_id) == two.read(study_id)
    two.do(trials_of={study_id})
    assert two.n_news == 0, "a poll after which nothing changed"


def test_a_waiting_check_pulls_only_the_queue(shared_url: str) -> None:
    one, two = Model(shared_url), Model(shared_url)
    study_id = one.study()
    for _ in range(3):
        one.do(tell(one.trial(study_id), 1.0))
    queued = [one.queue(study_id, user_attrs={"n": i}) for i in range(4)]
    two.do(waiting_of={study_id})
    assert set(two.trials) == set(queued)
    one.do(claim(queued[1]), tell(queued[3], state=r.FAIL))
    running = one.trial(study_id)
    two.do(waiting_of={study_id})
    waiting = {x.trial_id for x in two.trials.values() if x.state == r.WAITING}
    assert waiting == {queued[0], queued[2]}
    assert running not in two.trials
    requeue = r.SetTrialStateValues(worker_id="w", trial_id=running, state=r.WAITING, values=None)
    one.do(requeue)
    two.do(waiting_of={study_id})
    assert two.trials[running].state == r.WAITING
    one.do(r.SetTrialUserAttr(worker_id="w", trial_id=queued[0], user_attr={"k": 1}))
    two.do(waiting_of={study_id})
    assert two.n_news == 3
    assert two.trials[queued[0]].user_attrs == {"n": 0, "k": 1}
    two.do(next_of={study_id})
    assert two.n_news == 0
    assert two.read(study_id) == one.read(study_id)


def test_who_asks_for_the_finished_is_sent_no_others_twice(shared_url: str) -> None:
    one, two = Model(shared_url), Model(shared_url)
    study_id = one.study()
    running, queued = one.trial(study_id), one.queue(study_id)
    two.do(finished_of={study_id})
    note = [
        r.SetTrialUserAttr(worker_id="w", trial_id=trial_id, user_attr={"k": 1})
        for trial_id in (running, queued)
    ]
    one.do(*note)
    two.do(finished_of={study_id})
    assert two.n_news == 0
    one.do(tell(running, 1.0))
    two.do(finished_of={study_id})
    assert (two.n_news, two.trials[running].state) == (1, r.COMPLETE)
    assert two.read(study_id) == one.read(study_id)


def test_narrow_reads_never_skip_what_a_wide_one_needs(shared_url: str) -> None:
    one, two = Model(shared_url), Model(shared_url)
    study_id = one.study()
    first = one.trial(study_id)
    two.read(study_id)
    second = one.trial(study_id)
    two.do(waiting_of={study_id})
    own = two.trial(study_id)
    one.do(tell(first, 1.0), tell(second, 2.0))
    two.do(waiting_of={study_id})
    two.do(trials={own})
    assert [x.state for x in two.read(study_id)] == [r.COMPLETE, r.COMPLETE, r.RUNNING]
    assert two.read(study_id) == one.read(study_id)


def test_a_deleted_study_is_told(shared_url: str) -> None:
    one, two = Model(shared_url), Model(shared_url)
    study_id, other_id = one.study(), one.study("other")
    trial_id = one.trial(study_id)
    two.read(study_id)
    two.do(catalogue=True)
    assert set(two.studies) == {study_id, other_id}
    deleted = one.do(
        r.DeleteStudy(worker_id="w", study_id=study_id),
        r.CreateTrial(worker_id="w", study_id=study_id, datetime_start=None),
    )
    assert verdicts(deleted) == ["ACCEPTED", "NO_STUDY"]
    assert set(one.studies) == {other_id}
    for wanted in ({"trials_of": {study_id}}, {"trials": {trial_id}}, {"catalogue": True}):
        three = Model(shared_url)
        three.cursor, three.studies, three.trials = two.cursor, {**two.studies}, {**two.trials}
        three.do(**wanted)
        assert set(three.studies) == {other_id}, wanted


def test_deleted_and_created_again_under_the_same_name(shared_url: str) -> None:
    one, two = Model(shared_url), Model(shared_url)
    study_id = one.study()
    for _ in range(3):
        one.do(tell(one.trial(study_id), 1.0))
    two.read(study_id)
    again = r.CreateStudy(worker_id="w", study_name="s", directions=[1])
    outcomes = one.do(r.DeleteStudy(worker_id="w", study_id=study_id), again)
    new_id = outcomes[1].id
    for second in range(4):
        made = r.CreateTrial(worker_id="w", study_id=new_id, datetime_start=time(60 + second))
        one.do(made)
    assert [x.state for x in one.read(new_id)] == [r.RUNNING] * 4
    assert [x.state for x in two.read(new_id)] == [r.RUNNING] * 4
    two.do(studies={study_id})
    assert two.read(new_id) == one.read(new_id)
    assert set(two.studies) == {new_id}


def test_an_id_given_to_a_study_of_another_name(tmp_path: Path) -> None:
    url = new_database("sqlite", tmp_path)
    one, two = Model(url), Model(url)
    study_id = one.study()
    one.trial(study_id)
    two.read(study_id)
    one.do(r.DeleteStudy(worker_id="w", study_id=study_id))
    assert one.study("other") == study_id
    two.do(catalogue=True)
    assert [x.study_name for x in two.studies.values()] == ["other"]
    assert two.trials == {}
    assert two.read(study_id) == []


def test_study_attributes_are_read_again(shared_url: str) -> None:
    one, two = Model(shared_url), Model(shared_url)
    study_id = one.study()
    two.do(names={"s"})
    for value in (1, 2):
        one.do(
            r.SetStudyUserAttr(worker_id="w", study_id=study_id, user_attr={"k": value}),
            r.SetStudySystemAttr(worker_id="w", study_id=study_id, system_attr={"k": [value]}),
        )
        two.do(studies={study_id})
        assert two.studies[study_id].user_attrs == {"k": value}
        assert two.studies[study_id].system_attrs == {"k": [value]}
    two.do(studies={study_id})
    assert two.n_news == 0


def test_numbers_have_no_gap_and_no_double_between_threads(shared_url: str) -> None:
    study_id = Model(shared_url).study()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            mine = Model(shared_url)
            for _ in range(20):
                trial_id = mine.trial(study_id)
                mine.do(param(trial_id, "x"), tell(trial_id, 1.0))
            mine.log.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    trials = Model(shared_url).read(study_id)
    assert [x.number for x in trials] == list(range(80))
    assert [x.trial_id for x in trials] == sorted(x.trial_id for x in trials)
    assert {x.state for x in trials} == {r.COMPLETE}


def test_a_queued_trial_is_claimed_once(shared_url: str) -> None:
    one = Model(shared_url)
    study_id = one.study()
    queued = [one.queue(study_id) for _ in range(20)]
    won: list[int] = []

    def work() -> None:
        mine = Model(shared_url)
        for trial_id in queued:
            if mine.do(claim(trial_id))[0].verdict == Verdict.ACCEPTED:
                won.append(trial_id)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == queued


def test_beside_a_plain_optuna_worker(shared_url: str) -> None:
    theirs = optuna.storages.RDBStorage(shared_url)
    plain = optuna.create_study(study_name="s", storage=theirs)
    mine = Model(shared_url)
    mine.do(names={"s"})
    (study_id,) = mine.studies
    for i in range(5):
        trial_id = mine.trial(study_id)
        asked = plain.ask()
        x = asked.suggest_float("x", 0, 1)
        c = asked.suggest_categorical("c", ["a", "b"])
        asked.set_user_attr("k", {"i": i})
        asked.report(0.5, 1)
        mine.do(param(trial_id, "x", i / 10), waiting_of={study_id})
        plain.tell(asked, i)
        mine.do(tell(trial_id, float(i)))
        trial = mine.read(study_id)[-1]
        assert trial.params == {"x": x, "c": ["a", "b"].index(c)}
        assert (trial.values, trial.user_attrs) == ([i], {"k": {"i": i}})
        assert trial.intermediate_values == {1: 0.5}
    read = plain.get_trials()
    assert [t.number for t in read] == list(range(10))
    for ours, trial in zip(mine.read(study_id), read, strict=True):
        assert ours.values == trial.values
        assert ours.state == trial.state.value
        assert ours.datetime_start is not None and ours.datetime_complete is not None
        assert r.parse_time(ours.datetime_start) == trial.datetime_start
        assert r.parse_time(ours.datetime_complete) == trial.datetime_complete
        assert ours.user_attrs == trial.user_attrs


def test_values_that_no_column_holds_are_refused_by_name(url: str, kind: str) -> None:
    one = Model(url)
    study_id = one.study()
    trial_id = one.trial(study_id)

    def attr(key: str) -> r.SetTrialUserAttr:
        return r.SetTrialUserAttr(worker_id="w", trial_id=trial_id, user_attr={key: 1})

    bad: list[r.Operation] = [
        attr("\ud800"),
        param(trial_id, "p", math.nan),
        tell(trial_id, math.nan),
        r.SetTrialIntermediateValue(
            worker_id="w", trial_id=trial_id, step=2**63, intermediate_value=0.0
        ),
    ]
    long = [
        attr("k" * 513),
        param(trial_id, "p" * 513),
        r.CreateStudy(worker_id="w", study_name="n" * 513, directions=[1]),
    ]
    if kind in ("psycopg", "psycopg2"):
        bad += [attr("a\0b")]
    if kind not in ("sqlite", "memory"):
        bad += long
    if kind == "pymysql":
        big = {"big": "x" * 70_000}
        bad += [r.SetTrialUserAttr(worker_id="w", trial_id=trial_id, user_attr=big)]
    for record in bad:
        with pytest.raises(ValueError):
            one.do(param(trial_id, "ok"), record)
    (trial,) = one.read(study_id)
    assert (trial.params, trial.user_attrs, trial.state) == ({}, {}, r.RUNNING)
    one.do(attr("k" * 512), attr("é" * 512))
    assert set(one.read(study_id)[0].user_attrs) == {"k" * 512, "é" * 512}
    if kind in ("sqlite", "memory"):
        assert verdicts(one.do(*long)) == ["ACCEPTED"] * 3
        (trial,) = one.read(study_id)
        assert (len(trial.user_attrs), list(trial.params)) == (3, ["p" * 513])


@pytest.mark.servers
def test_keys_that_mysql_holds_equal_are_refused(tmp_path: Path) -> None:
    one = Model(new_database("pymysql", tmp_path))
    trial_id = one.trial(one.study())
    one.do(r.SetTrialUserAttr(worker_id="w", trial_id=trial_id, user_attr={"LR": 1}))
    for key in ("lr", "LR "):
        with pytest.raises(ValueError, match=f"Trial {trial_id}.*{key!r}"):
            one.do(
                param(trial_id, "x"),
                r.SetTrialUserAttr(worker_id="w", trial_id=trial_id, user_attr={key: 2}),
            )
    one.do(trials={trial_id})
    assert one.trials[trial_id].user_attrs == {"LR": 1}
    assert one.trials[trial_id].params == {}


def test_rows_that_nobody_can_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = Model(new_database("sqlite", tmp_path))
    study_id = one.study()
    trials = [one.trial(study_id) for _ in range(3)]
    for trial_id in trials:
        one.do(
            param(trial_id, "x"),
            param(trial_id, "c", 1.0, CHOICES),
            r.SetTrialUserAttr(worker_id="w", trial_id=trial_id, user_attr={"k": 1}),
            tell(trial_id, 1.0),
        )
    raw = sqlite3.connect(one.log.engine.url.database or "")
    raw.execute("UPDATE trial_user_attributes SET value_json='{' WHERE trial_id=1")
    raw.execute("UPDATE trial_params SET param_value=9 WHERE trial_id=1 AND param_name='c'")
    raw.execute("UPDATE trial_params SET distribution_json='?' WHERE trial_id=2")
    raw.execute("UPDATE trial_values SET value=NULL WHERE trial_id=2")
    raw.execute("UPDATE trials SET state='ODD', datetime_start='never' WHERE trial_id=3")
    raw.commit()
    for _ in range(2):
        two = Model(str(one.log.url))
        first, second, third = two.read(study_id)
        assert (first.params, first.user_attrs, first.values) == ({"x": 0.5}, {}, [1.0])
        assert (second.params, second.values, second.state) == ({}, None, r.FAIL)
        assert (third.state, third.datetime_start) == (r.FAIL, None)
    text = caplog.text
    for part in ("trial 1: user attribute 'k'", "trial 1: parameter 'c'", "trial 2: its values"):
        assert part in text


_ODD = {
    "trials.number": ["NULL", "'abc'", "''", "X'FF'", "-1"],
    "trial_values.value": ["NULL", "'abc'", "''", "X'FF'"],
    "trial_params.param_name": ["NULL", "X'FF'"],
    "trial_params.param_value": ["NULL", "'abc'", "''", "X'FF'"],
    "trial_intermediate_values.step": ["'abc'", "''", "X'FF'"],
    "trial_intermediate_values.intermediate_value": ["NULL", "'abc'", "''", "X'FF'"],
    "trial_user_attributes.key": ["NULL", "X'FF'"],
}


@pytest.mark.parametrize(("field", "odd"), [(x, odd) for x in _ODD for odd in _ODD[x]])
def test_an_odd_field_is_left_out(
    field: str,
    odd: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(reading, "TRIALS_MAX", 2)
    one = Model(new_database("sqlite", tmp_path))
    study_id = one.study()
    for _ in range(3):
        template = {"params": {"x": 0.5}, "distributions": {"x": X}, "user_attrs": {"k": 1}}
        one.trial(study_id, state=r.COMPLETE, value=1.0, intermediate_values={"1": 1}, **template)
    with one.log.engine.begin() as connection:
        table, column = field.split(".")
        connection.exec_driver_sql(f"UPDATE {table} SET {column} = {odd} WHERE trial_id = 1")
    two = RDBStorage(one.log.url)
    for _ in range(2):
        *_, last = two.get_all_trials(study_id)
    assert (last.number, last.values, last.params) == (2, [1.0], {"x": 0.5})
    assert len(caplog.records) == 1


def test_a_file_that_is_no_database_or_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_text("a text of some length, " * 100)
    with pytest.raises(LogCorruptError, match=f"{path}: .*backup"):
        TablesLog(f"sqlite:///{path}")
    path.unlink()
    one = Model(f"sqlite:///{path}")
    study_id = one.study()
    one.log.close()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    with pytest.raises(LogCorruptError, match=f"{path}: "):
        Model(f"sqlite:///{path}").read(study_id)


def test_the_catalogue_counts_without_loading(url: str) -> None:
    one = Model(url)
    study_id, empty_id = one.study(), one.study("empty")
    for value in (1.0, math.inf, -math.inf, -math.inf, 3.0):
        one.do(tell(one.trial(study_id), value))
    ids = [x.trial_id for x in one.read(study_id)]
    one.queue(study_id)
    assert one.log.counts(study_id) == {r.COMPLETE: 5, r.WAITING: 1}
    assert one.log.counts(empty_id) == {}
    assert one.log.best_trial_id(study_id, False) == ids[2]
    assert one.log.best_trial_id(study_id, True) == ids[1]
    assert one.log.best_trial_id(empty_id, True) is None
    assert one.log.counts(empty_id + 1) is None
    (summary,) = one.log.summaries().values()
    assert one.log.summaries(study_id) == {study_id: summary} and not one.log.summaries(empty_id)
    assert summary.counts == {r.COMPLETE: 5, r.WAITING: 1}
    start = summary.datetime_start
    assert start is not None and start[:19] in (time(0)[:19], time(1)[:19])
    assert summary.best_trial_id == ids[2]


def test_pickled_it_carries_its_address(shared_url: str) -> None:
    one = TablesLog(shared_url)
    two = pickle.loads(pickle.dumps(one))
    assert two.url == one.url
    assert two.exchange([], None, Wanted(catalogue=True)).news == []
    assert len(pickle.dumps(one)) < 1000


def test_the_memory_database_is_one_for_all_threads() -> None:
    one = Model("sqlite:///:memory:")
    study_id = one.study()
    thread = threading.Thread(target=lambda: one.trial(study_id))
    thread.start()
    thread.join()
    assert len(one.read(study_id)) == 1


def test_only_the_literal_template_is_filled_in(tmp_path: Path) -> None:
    log = TablesLog(f"sqlite:///{tmp_path}/{{SCHEMA_VERSION}}-{{x}}-50%.db")
    assert (tmp_path / "12-{x}-50%.db").exists()
    log.close()


def test_a_missing_driver_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="Failed to import DB access module"):
        TablesLog("mysql+mysqldb://u:secret@127.0.0.1/x")


def test_json_is_as_optuna_writes_it(tmp_path: Path) -> None:
    one = Model(new_database("sqlite", tmp_path))
    trial_id = one.trial(one.study())
    value = {"b": [1.5, "é"], "a": None}
    one.do(r.SetTrialUserAttr(worker_id="w", trial_id=trial_id, user_attr={"k": value}))
    raw = sqlite3.connect(one.log.engine.url.database or "")
    assert raw.execute("SELECT value_json FROM trial_user_attributes").fetchall() == [
        (json.dumps(value),)
    ]


def test_what_others_write_on_many_queued_trials_is_read(shared_url: str) -> None:
    one, two = Model(shared_url), Model(shared_url)
    study_id = one.study()
    new = r.CreateTrial(
        worker_id="w", study_id=study_id, datetime_start=None, state=r.WAITING, user_attrs={"k": 0}
    )
    queued = [outcome.id for outcome in one.do(*[new] * 100)]
    assert len(two.read(study_id)) == 100
    for trial_id in queued[::40]:
        one.do(r.SetTrialUserAttr(worker_id="w", trial_id=trial_id, user_attr={"k": 1}))
    assert [x.trial_id for x in two.read(study_id) if x.user_attrs["k"] == 1] == queued[::40]


@pytest.mark.parametrize("kind", SERVERS)
def test_sessions_left_behind_are_removed(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    url = new_database(kind, tmp_path)
    left, one = Model(url, clock=clock), Model(url, clock=clock)

    def sessions() -> set[str]:
        with one.log.engine.connect() as connection:
            return set(connection.scalars(sa.select(t.sessions.c.session_id)))

    study_id = one.study()
    assert sessions() == {left.log.connection.session_id, one.log.connection.session_id}
    long_ago = datetime.now() - timedelta(days=t.SESSION_DAYS_MAX + 2)
    with one.log.engine.begin() as connection:
        mine = t.sessions.c.session_id == left.log.connection.session_id
        connection.execute(sa.update(t.sessions).where(mine).values(updated_at=long_ago))
    two = Model(url)
    assert sessions() == {one.log.connection.session_id, two.log.connection.session_id}
    left.trial(study_id)
    assert left.log.connection.session_id in sessions()
    # A storage that was not used for long makes itself another row before it writes.
    before = one.log.connection.session_id
    clock.advance(90_000.0)
    one.trial(study_id)
    assert sessions() >= {before, one.log.connection.session_id}
    assert one.log.connection.session_id != before


@pytest.mark.parametrize("kind", SERVERS)
def test_sessions_of_dropped_storages_are_removed_by_the_next_one(
    kind: str, tmp_path: Path
) -> None:
    url = new_database(kind, tmp_path)
    kept = Model(url)
    study_id = kept.study()
    ids = []
    for _ in range(3):
        one = Model(url)
        one.trial(study_id)
        ids.append(one.log.connection.session_id)
        del one  # nobody closes it
    last = Model(url)
    with kept.log.engine.connect() as connection:
        found = set(connection.scalars(sa.select(t.sessions.c.session_id)))
    assert found == {kept.log.connection.session_id, last.log.connection.session_id}
    assert found.isdisjoint(ids)


def test_a_large_read_comes_in_parts(shared_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "TRIALS_MAX", 3)
    one, two = Model(shared_url), Model(shared_url)
    study_id = one.study()
    trials = [one.trial(study_id) for _ in range(7)]
    one.do(tell(trials[0], 1.0), tell(trials[5], 1.0), param(trials[4], "x"))
    wanted = Wanted(trials_of=frozenset({study_id}), trials=frozenset({trials[5]}))
    parts, more = [], True
    while more:
        batch = two.log.exchange((), two.cursor, wanted)
        two.cursor, more = batch.cursor, batch.more
        parts.append([x.trial_id for x in batch.news if isinstance(x, r.PutTrial)])
        two.trials |= {x.trial_id: x for x in batch.news if isinstance(x, r.PutTrial)}
    last = trials[5]
    held = [trials[1:3], [*trials[1:5]]]
    assert parts == [[*trials[:3], last], [*held[0], *trials[3:6]], [*held[1], *trials[5:]]]
    monkeypatch.undo()
    assert [two.trials[one] for one in trials] == Model(shared_url).read(study_id)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_message_of_many_megabytes(kind: str, tmp_path: Path) -> None:
    one = Model(new_database(kind, tmp_path))
    study_id = one.study()
    trial_id = one.trial(study_id)
    long = "x" * 60_000
    attrs = [{f"k{i}": long} for i in range(300)]
    outcomes = one.do(
        *[r.SetTrialUserAttr(worker_id="w", trial_id=trial_id, user_attr=x) for x in attrs],
        tell(trial_id, 1.0),
    )
    assert set(verdicts(outcomes)) == {"ACCEPTED"}
    (trial,) = one.read(study_id)
    assert len(trial.user_attrs) == 300


@pytest.mark.servers
def test_a_message_that_fails_is_not_logged_by_the_driver(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A new database has no tables yet, which is found out by asking."""
    url = new_database("psycopg", tmp_path)
    Model(url)
    assert [record.name for record in caplog.records if record.name.startswith("psycopg")] == []


@pytest.mark.servers
def test_what_was_loaded_is_known_to_the_planner(tmp_path: Path) -> None:
    """Until then PostgreSQL takes ten times as long for a trial, and a minute to find out."""
    one = Model(new_database("psycopg", tmp_path))
    study_id = one.study()
    trial = r.CreateTrial(worker_id="w", study_id=study_id, datetime_start=None, state=1)
    one.log.load_trials([trial] * 1_100, 0, 0)
    with sa.create_engine(one.log.url).connect() as connection:
        query = sa.text("SELECT reltuples FROM pg_class WHERE relname = 'trials'")
        assert connection.scalar(query) == 1_100


def test_a_study_is_followed_past_another_that_has_grown(shared_url: str) -> None:
    """By whichever way there is less to look at; the third time both ways have been taken."""
    writer, follower, watcher = Model(shared_url), Model(shared_url), Model(shared_url)
    study_id, other_id = writer.study("s"), writer.study("t")
    trial = r.CreateTrial(worker_id="w", study_id=other_id, datetime_start=None, state=r.COMPLETE)
    greatest, made, queued = 0, [], set()
    for n_loaded in (1_100, 0, 1_100):
        if n_loaded:
            number = 0 if greatest == 0 else 1_100
            greatest = writer.log.load_trials([trial] * n_loaded, number, greatest)
        for _ in range(3):
            made.append(writer.trial(study_id))
            queued.add(writer.queue(study_id))
            assert {x.trial_id for x in follower.read(study_id)} == {*made, *queued}
            watcher.do(waiting_of={study_id})
            assert {x.trial_id for x in watcher.trials.values()} == queued


def _n_trials(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as direct:
        found: int = direct.execute("SELECT count(*) FROM trials").fetchone()[0]
    return found


@pytest.mark.parametrize(
    ("way", "is_closed"),
    # A file made anew may get the number of one that nobody has open.
    [
        ("restored", False),
        ("restored", True),
        ("removed", False),
        ("removed", True),
        ("new", False),
    ],
)
def test_a_file_that_another_has_taken_the_place_of_is_not_written_to(
    way: str, is_closed: bool, tmp_path: Path
) -> None:
    """It has no name any more, and would be gone with its last connection."""
    path, backup = tmp_path / "a.db", tmp_path / "backup.db"
    url = f"sqlite:///{path}"
    one = Model(url)
    study_id = one.study()
    one.trial(study_id)
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute("VACUUM INTO ?", [str(backup)])
    one.trial(study_id)
    if is_closed:
        one.log.close()
    for name in ("a.db", "a.db-wal", "a.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    if way == "restored":
        backup.rename(path)
    elif way == "new":
        Model(url).study("another")
    for ask in (lambda: one.trial(study_id), lambda: one.read(study_id)):
        with pytest.raises(
            LogReplacedError, match=r"a\.db: the file is not the one that was read"
        ):
            ask()
    assert path.exists() == (way != "removed")
    if way == "restored":
        two = Model(url)
        two.trial(study_id)
        assert [x.number for x in two.read(study_id)] == [0, 1]


def test_a_file_may_be_called_as_if_it_were_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "lr=0.1,mode=memory.db"
    one = Model(f"sqlite:///{path}")
    study_id = one.study()
    pickled = pickle.dumps(one.log)
    one.trial(study_id)
    pickle.loads(pickled)
    assert _n_trials(path) == 1


class _Creator:
    """A user's way to a file, for a URL that names none."""

    def __init__(self, path: Path, check_same_thread: bool = True) -> None:
        self.path = path
        self.check_same_thread = check_same_thread

    def __call__(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, check_same_thread=self.check_same_thread)


def test_what_a_creator_opens_is_not_emptied_by_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    one = Model("sqlite://", engine_kwargs={"creator": _Creator(path)})
    study_id = one.study()
    pickled = pickle.dumps(one.log)
    one.trial(study_id)
    again = pickle.loads(pickled)
    assert _n_trials(path) == 1
    assert len(again.exchange([], None, Wanted(trials_of=frozenset((study_id,)))).news) == 2


def test_a_pickle_joins_a_named_database_in_memory_that_is_still_there() -> None:
    one = Model("sqlite:///file:joined?mode=memory&cache=shared&uri=true")
    study_id = one.study()
    pickled = pickle.dumps(one.log)
    one.trial(study_id)
    again = pickle.loads(pickled)
    assert len(again.exchange([], None, Wanted(trials_of=frozenset((study_id,)))).news) == 2
    assert len(one.read(study_id)) == 1


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file::memory:?uri=true",
        "sqlite:///file:brought?mode=memory&cache=shared&uri=true",
    ],
)
def test_a_pickle_brings_a_database_in_memory_along(url: str) -> None:
    one = Model(url)
    study_id = one.study()
    one.trial(study_id)
    pickled = pickle.dumps(one.log)
    one.log.engine.dispose()
    del one
    gc.collect()
    again = pickle.loads(pickled)
    assert len(again.exchange([], None, Wanted(trials_of=frozenset((study_id,)))).news) == 2


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///{path}"])
def test_threads_take_turns_with_a_creator_that_binds_to_one(url: str, tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    one = Model(url.format(path=path), engine_kwargs={"creator": _Creator(path)})
    study_id = one.study()
    for _ in range(3):
        thread = threading.Thread(target=lambda: one.trial(study_id))
        thread.start()
        thread.join()
        one.trial(study_id)
    assert [x.number for x in one.read(study_id)] == list(range(6))


def _connect_as(url: str) -> Callable[[], Any]:
    """What users write who get their connections from elsewhere, such as a cloud's connector."""
    address = sa.make_url(url)
    driver = importlib.import_module(address.get_driver_name())
    names = {"user": address.username, "password": address.password, "database": address.database}
    if address.get_driver_name() == "psycopg":
        names["dbname"] = names.pop("database")
    return functools.partial(driver.connect, host=address.host, port=address.port, **names)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_creator_need_not_know_how_we_connect(kind: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    bare = sa.make_url(url).set(host=None, port=None, username=None, password=None)
    one = Model(str(bare), engine_kwargs={"creator": _connect_as(url)})
    study_id = one.study()
    one.trial(study_id)
    one.log.connection.disconnect()
    one.trial(study_id)
    assert [x.number for x in Model(url).read(study_id)] == [0, 1]


def test_a_connection_of_the_users_stays_open() -> None:
    mine = sqlite3.connect(":memory:", check_same_thread=False)
    one = Model("sqlite://", engine_kwargs={"creator": lambda: mine})
    other = Model("sqlite://", engine_kwargs={"creator": lambda: mine})
    study_id = one.study()
    assert other.read(study_id) == []
    one.trial(study_id)
    one.log.close()
    one.trial(study_id)
    assert len(other.read(study_id)) == 2
    mine.close()


def test_a_pool_of_the_users_gives_the_connection(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    pool = sa.pool.QueuePool(_Creator(path, check_same_thread=False))
    one = Model("sqlite://", engine_kwargs={"pool": pool})
    study_id = one.study()
    one.trial(study_id)
    assert _n_trials(path) == 1
    one.log.close()
    one.trial(study_id)
    assert _n_trials(path) == 2


def _ask_in_child(log: TablesLog, study_id: int, folder: Path) -> None:
    os.chdir(folder)
    record = r.CreateTrial(worker_id="w", study_id=study_id, datetime_start=time(0))
    assert log.exchange([record], None, NOTHING).outcomes


@pytest.mark.parametrize("url", ["sqlite:///x y.db", "sqlite:///file:x%20y.db?uri=true"])
@pytest.mark.parametrize("how", ["close", "fork", "pickle"])
def test_a_relative_path_stays_where_it_was(
    url: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    there = tmp_path / "50% ?#"  # as a URI has it, it is written otherwise
    run.mkdir()
    there.mkdir()
    monkeypatch.chdir(there)
    one = Model(url)
    study_id = one.study()
    if how == "fork":
        child = multiprocessing.get_context("fork").Process(
            target=_ask_in_child, args=(one.log, study_id, run)
        )
        child.start()
        child.join()
        assert child.exitcode == 0
    elif how == "pickle":
        pickled = pickle.dumps(one.log)
        monkeypatch.chdir(run)
        one.log = pickle.loads(pickled)
        one.trial(study_id)
    else:
        monkeypatch.chdir(run)
        one.log.close()
        one.trial(study_id)
    assert _n_trials(there / "x y.db") == 1
    assert not list(run.iterdir())
    assert one.log.url == url and str(there) not in repr(one.log)


def _insert_running(url: str, study_id: int, count: int) -> None:
    running = {"study_id": study_id, "state": "RUNNING", "datetime_start": START}
    with sa.create_engine(url, poolclass=sa.NullPool).begin() as direct:
        direct.execute(sa.insert(t.trials), [{**running, "number": n} for n in range(count)])


def test_more_running_trials_than_a_statement_takes(
    shared_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Model(shared_url)
    studies = [one.study(), one.study("other")]
    count = statements.IDS_MAX + 1
    monkeypatch.setattr(reading, "TRIALS_MAX", 3 * count)
    for study_id in studies:
        _insert_running(shared_url, study_id, count)
    one.do(waiting_of=set(studies))
    one.do(waiting_of=set(studies))
    assert not one.trials
    one.do(trials_of=set(studies))
    assert len(one.trials) == 2 * count
    ids = sorted(one.trials)
    requeued = r.SetTrialStateValues(worker_id="w", trial_id=ids[-1], state=r.WAITING, values=None)
    other = Model(shared_url)
    assert verdicts(other.do(tell(ids[0], 1.0), requeued)) == ["ACCEPTED", "ACCEPTED"]
    one.do(waiting_of=set(studies))
    assert one.trials[ids[-1]].state == r.WAITING
    one.do(finished_of=set(studies))
    assert one.trials[ids[0]].state == r.COMPLETE
    one.do(trials_of=set(studies))
    assert sum(x.state == r.RUNNING for x in one.trials.values()) == 2 * count - 2


def test_more_than_a_statement_takes_in_one_exchange(
    shared_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statements, "IDS_MAX", 4)
    monkeypatch.setattr(statements, "_SIZES", (0, 1, 4))
    one = Model(shared_url)
    studies = [one.study(name) for name in "abcdef"]
    ids = [one.trial(study_id) for study_id in studies for _ in range(2)]
    told = one.do(*[tell(trial_id, 1.0) for trial_id in ids], trials=set(ids))
    assert verdicts(told) == ["ACCEPTED"] * len(ids)
    assert all(one.trials[trial_id].state == r.COMPLETE for trial_id in ids)
    other = Model(shared_url)
    other.do(studies=set(studies), names=set("abcdefg"))
    assert sorted(other.studies) == studies
    for study_id in studies[:2]:
        one.do(r.DeleteStudy(worker_id="w", study_id=study_id))
    other.do(trials_of=set(studies))
    assert sorted(other.studies) == studies[2:]
    assert sorted(other.trials) == ids[4:]


@pytest.mark.parametrize("kind", SERVERS)
def test_the_mark_has_room_for_the_facts_of_thousands(kind: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    one = Model(url)
    study_id = one.study()
    _insert_running(url, study_id, 5_000)
    ids = sorted(x.trial_id for x in one.read(study_id))
    assert verdicts(one.do(*[tell(trial_id, 1.0) for trial_id in ids])) == ["ACCEPTED"] * len(ids)


@pytest.mark.servers
@pytest.mark.parametrize(
    "setting",
    [
        "sql_safe_updates = 1",
        "sql_mode = 'ORACLE,EMPTY_STRING_IS_NULL,PAD_CHAR_TO_FULL_LENGTH'",
        "sql_mode = 'ANSI_QUOTES,NO_BACKSLASH_ESCAPES,NO_AUTO_VALUE_ON_ZERO'",
    ],
)
def test_whatever_a_session_of_mysql_begins_with(setting: str, tmp_path: Path) -> None:
    url = new_database("pymysql", tmp_path)
    one = Model(url, engine_kwargs={"connect_args": {"init_command": f"SET {setting}"}})
    study_id = one.study("")
    trial_id = one.trial(study_id, user_attrs={"": "a\\b'c\"d"})
    (trial,) = Model(url).read(study_id)
    assert (trial.trial_id, trial.user_attrs) == (trial_id, {"": "a\\b'c\"d"})


@pytest.mark.parametrize("kind", SERVERS[:2])
def test_floats_keep_their_digits_whatever_a_database_is_set_to(url: str) -> None:
    with sa.create_engine(url, isolation_level="AUTOCOMMIT").connect() as theirs:
        name = sa.make_url(url).database
        theirs.exec_driver_sql(f"ALTER DATABASE {name} SET extra_float_digits TO 0")
    one = Model(url)
    study_id = one.study()
    one.do(tell(one.trial(study_id), 0.1 + 0.2))
    (trial,) = Model(url).read(study_id)
    assert trial.values == [0.1 + 0.2]


@pytest.mark.parametrize("kind", SERVERS[:2])
@pytest.mark.parametrize("style", ["German, DMY", "SQL, MDY", "Postgres, YMD"])
def test_times_are_the_same_however_a_session_shows_them(
    url: str, style: str, caplog: pytest.LogCaptureFixture
) -> None:
    with sa.create_engine(url, isolation_level="AUTOCOMMIT").connect() as theirs:
        name = sa.make_url(url).database
        theirs.exec_driver_sql(f"ALTER DATABASE {name} SET datestyle TO '{style}'")
    one = Model(url)
    study_id = one.study()
    trial_id = one.trial(study_id)
    one.do(tell(trial_id, 1.0))
    two = Model(url)
    # As a pooler lends it, whatever the driver has set at first.
    raw = two.log.connection.session().raw
    raw.cursor().execute(f"SET datestyle TO '{style}'")
    (trial,) = two.read(study_id)
    assert (trial.datetime_start, trial.datetime_complete) == (time(0), time(9))
    summary = two.log.summaries()[study_id]
    assert (summary.datetime_start, summary.datetime_complete) == (time(0), time(9))
    overview = two.log.overview(study_id, False)
    assert (overview.first_at, overview.last_at) == (time(0), time(9))
    two.log.renew_lease("w", [two.trial(study_id)])
    assert two.log.facts()["heartbeats"]["newest_at"] > time(0)
    assert not caplog.text


@pytest.mark.parametrize("kind", ["sqlite", *SERVERS[:2]])
def test_a_time_that_cannot_be_read_is_left_out_with_one_warning(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    one = Model(url)
    study_id = one.study()
    trial_id = one.trial(study_id)
    one.do(tell(trial_id, 1.0))
    with one.log.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trials SET datetime_start = 'infinity'")
    two = Model(url)
    (trial,) = two.read(study_id)
    assert (trial.datetime_start, trial.datetime_complete) == (None, time(9))
    for _ in range(2):
        assert two.log.summaries()[study_id].datetime_complete == time(9)
        assert two.log.overview(study_id, False).first_at is None
    warnings = [one.getMessage() for one in caplog.records]
    assert warnings == [
        f"Study {study_id}, trial {trial_id}: a time can't be read and is left out.",
        f"Study {study_id}: a time can't be read and is left out.",
    ]


@pytest.mark.parametrize("kind", SERVERS)
def test_only_who_writes_is_warned_that_there_is_no_mark(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    optuna.create_study(study_name="plain", storage=optuna.storages.RDBStorage(url))
    storage = trialstore.RDBStorage(url, skip_table_creation=True)
    study = optuna.load_study(study_name="plain", storage=storage)
    assert study.trials == []
    assert "trialstore_sessions" not in caplog.text
    for _ in range(2):
        study.ask()
    assert caplog.text.count("trialstore_sessions") == 1
    storage.close()


def test_a_certificate_that_is_not_there_is_told_of_like_a_server_that_is_not() -> None:
    with pytest.raises(LogUnavailableError, match="No such file"):
        TablesLog("mysql+pymysql://user@127.0.0.1:1/studies?ssl_ca=/no/such/file")


def test_a_read_does_not_walk_over_all_studies_that_are_followed(tmp_path: Path) -> None:
    def n_lines(n_studies: int) -> int:
        """Run by the logs of tables to read the trials of one study more."""
        storage = RDBStorage(f"sqlite:///{tmp_path}/{n_studies}.db")
        for number in range(n_studies + 1):
            study_id = storage.create_new_study([StudyDirection.MINIMIZE], str(number))
            storage.create_new_trial(study_id)
        reader = RDBStorage(f"sqlite:///{tmp_path}/{n_studies}.db")
        *others, last = [study._study_id for study in reader.get_all_studies()]
        for study_id in others:
            reader.get_all_trials(study_id)
        n = 0

        def count(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal n
            n += event == "line"
            return count if "relational" in frame.f_code.co_filename else None

        before = sys.gettrace()
        sys.settrace(count)
        try:
            assert len(reader.get_all_trials(last)) == 1
        finally:
            sys.settrace(before)
        return n

    n_lines(1)  # statements are compiled once
    assert n_lines(200) < 1.1 * n_lines(10)
