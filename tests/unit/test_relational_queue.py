"""What a claim makes a database look at, counted by the database: as much of a long queue as of a
short one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
import pytest
import sqlalchemy as sa

from servers import new_database
from trialstore import RDBStorage, records as r
from trialstore.log import NEXT_MIN, NOTHING
from trialstore.logs.relational.cursor import RANGES_MAX, n_ids, split, with_ids, without_ids

_FEW, _MANY = 2 * NEXT_MIN, 3_000


def _queue(storage: RDBStorage, n_trials: int) -> optuna.Study:
    study = optuna.create_study(storage=storage)
    exchanger = storage._exchanger
    trials = [
        r.CreateTrial(
            study_id=study._study_id,
            datetime_start=None,
            state=int(TrialState.WAITING),
            system_attrs={"fixed_params": {"x": number}},
            **exchanger.marks(),
        )
        for number in range(n_trials)
    ]
    exchanger.run(trials, NOTHING)
    return study


def _raw(storage: RDBStorage) -> Any:
    log: Any = storage._exchanger.log
    return log.connection.session().raw


def _instructions(storage: RDBStorage, work: Callable[[], object]) -> int:
    """Of SQLite's machine."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1

    _raw(storage).set_progress_handler(step, 1)
    work()
    _raw(storage).set_progress_handler(None, 1)
    return count


def _answer(storage: RDBStorage, sql: str) -> list[Any]:
    cursor = _raw(storage).cursor()
    cursor.execute(sql)
    return list(cursor.fetchall())


def _rows_of_mariadb(storage: RDBStorage, work: Callable[[], object]) -> int:
    """Rows that its storage engine was asked for."""

    def count() -> int:
        rows = _answer(storage, "SHOW SESSION STATUS LIKE 'Handler_read%'")
        return sum(int(value) for _, value in rows)

    before = count()
    work()
    return count() - before


def _rows_of_postgresql(storage: RDBStorage, work: Callable[[], object]) -> int:
    """Rows of trials that were looked at, by its statistics."""

    def count() -> int:
        _answer(storage, "SELECT 1 FROM pg_stat_force_next_flush()")
        sql = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = "
        ((found,),) = _answer(storage, sql + "'trials'")
        return int(found)

    # By itself within a minute of so many new rows; before, it can't know its way.
    with storage.engine.begin() as connection:
        connection.execute(sa.text("ANALYZE"))
    before = count()
    work()
    return count() - before


_COUNTS = {
    "sqlite": _instructions,
    "psycopg": _rows_of_postgresql,
    "psycopg2": _rows_of_postgresql,
    "pymysql": _rows_of_mariadb,
}


@pytest.mark.parametrize(
    "kind",
    ["sqlite", *(pytest.param(one, marks=pytest.mark.servers) for one in list(_COUNTS)[1:])],
)
def test_a_claim_looks_at_as_much_of_a_long_queue_as_of_a_short_one(
    kind: str, tmp_path: Path
) -> None:
    costs = {}
    for n_queued in (_FEW, _MANY):
        storage = RDBStorage(new_database(kind, tmp_path))
        study = _queue(storage, n_queued)
        assert study._pop_waiting_trial_id() is not None

        def claim(study: optuna.Study = study) -> None:
            for _ in range(10):
                assert study._pop_waiting_trial_id() is not None

        costs[n_queued] = _COUNTS[kind](storage, claim)
        storage.close()
    assert 0 < costs[_MANY] <= 1.2 * costs[_FEW]


def test_the_next_of_a_queue_are_known_among_the_trials_of_another_study(tmp_path: Path) -> None:
    """Its ids are then more ranges than a cursor keeps."""
    url = new_database("sqlite", tmp_path)
    ours, theirs = RDBStorage(url), RDBStorage(url)
    study, other = (optuna.create_study(storage=ours) for _ in range(2))
    for number in range(2 * RANGES_MAX):
        study.enqueue_trial({"x": number})
        other.enqueue_trial({"x": number})
    watching = optuna.load_study(study_name=study.study_name, storage=theirs)

    def numbers() -> list[int]:
        trials = watching.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return [trials[at].number for at in range(NEXT_MIN)]

    assert numbers() == list(range(NEXT_MIN))
    for _ in range(RANGES_MAX):
        study.ask()
    assert numbers() == list(range(RANGES_MAX, RANGES_MAX + NEXT_MIN))


def test_ranges_of_ids() -> None:
    ranges, are_merged = with_ids((), [1, 2, 3, 7, 9, 8])
    assert (ranges, are_merged) == (((1, 3), (7, 9)), False)
    assert n_ids(ranges) == 6
    assert split(ranges, 2) == (((1, 2),), ((3, 3), (7, 9)))
    assert split(ranges, 3) == (((1, 3),), ((7, 9),))
    assert split(ranges, 4) == (((1, 3), (7, 7)), ((8, 9),))
    assert split(ranges, 6) == split(ranges, 7) == (ranges, ())
    assert without_ids(ranges, [2, 5, 7]) == ((1, 1), (3, 3), (8, 9))
    ranges, are_merged = with_ids((), range(0, 4 * RANGES_MAX, 2))
    assert are_merged and len(ranges) == RANGES_MAX
