"""What PostgreSQL makes of the statements of a trial in a study of many, by its own statistics.

The reader here follows the whole study, as TPE does, and Optuna's log of the best trial.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest
import sqlalchemy as sa

from servers import new_database
from trialstore import RDBStorage, records as r

pytestmark = pytest.mark.servers

_N_KNOWN = 300
_N_TRIALS = 30
_N_PARAMS = 5
_X = optuna.distributions.distribution_to_json(optuna.distributions.FloatDistribution(0, 1))


def _objective(trial: optuna.Trial) -> float:
    trial.set_user_attr("note", trial.number)
    return sum(trial.suggest_float(f"x{i}", 0.0, 1.0) for i in range(_N_PARAMS))


def _run(study: optuna.Study, n_trials: int) -> None:
    for _ in range(n_trials):
        study.optimize(_objective, n_trials=1)
        assert study.get_trials(deepcopy=False)[-1].value is not None
        assert study.best_value <= 5.0


def _load(study: optuna.Study, n_trials: int) -> None:
    params = {f"x{i}": 0.5 for i in range(_N_PARAMS)}
    trial = r.CreateTrial(
        worker_id="",
        study_id=study._study_id,
        datetime_start="2026-01-01T00:00:00.000000",
        datetime_complete="2026-01-01T00:00:01.000000",
        state=int(TrialState.COMPLETE),
        value=1.0,
        params=params,
        distributions=dict.fromkeys(params, _X),
        user_attrs={"note": 1},
    )
    storage: Any = study._storage
    storage._exchanger.log.load_trials([trial] * n_trials, 0, 0)
    with storage.engine.begin() as connection:
        # By itself within a minute; and what this connection has counted is told with the commit.
        connection.execute(sa.text("ANALYZE"))
        connection.execute(sa.text("SELECT pg_stat_force_next_flush()"))


@pytest.fixture(params=["psycopg", "psycopg2"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RDBStorage]:
    storage = RDBStorage(new_database(request.param, tmp_path), linger_s=600.0)
    yield storage
    storage.close()


@pytest.fixture
def study(storage: RDBStorage) -> optuna.Study:
    """Of many trials, whose every statement has been used often enough to be prepared."""
    study = optuna.create_study(storage=storage, sampler=RandomSampler(seed=1))
    _load(study, _N_KNOWN)
    _run(study, 12)
    return study


def _answer(storage: RDBStorage, sql: str) -> list[Any]:
    """By the storage's own connection, which is the one that has plans."""
    log: Any = storage._exchanger.log
    cursor = log.connection.session().raw.cursor()
    cursor.execute(sql)
    return list(cursor.fetchall())


def _n_rows(storage: RDBStorage) -> int:
    """Rows that were looked at, in all tables."""
    _answer(storage, "SELECT 1 FROM pg_stat_force_next_flush()")
    counts = "sum(seq_tup_read + coalesce(idx_tup_fetch, 0))"
    ((found,),) = _answer(storage, f"SELECT {counts} FROM pg_stat_user_tables")
    return int(found)


def test_a_statement_is_planned_once_and_not_for_each_of_its_values(
    storage: RDBStorage, study: optuna.Study
) -> None:
    _run(study, _N_TRIALS)
    sql = "SELECT custom_plans, statement FROM pg_prepared_statements WHERE custom_plans + "
    used = _answer(storage, f"{sql} generic_plans >= {_N_TRIALS}")
    assert used
    # PostgreSQL makes five, to compare what they promise with one plan for all.
    assert [statement for n_plans, statement in used if n_plans > 5] == []


def test_a_look_reads_what_is_new_and_not_whole_tables(
    storage: RDBStorage, study: optuna.Study
) -> None:
    before = _n_rows(storage)
    _run(study, _N_TRIALS)
    assert _n_rows(storage) - before < _N_TRIALS * 100


def test_a_look_at_a_study_does_not_read_what_another_has_grown_by(
    storage: RDBStorage, study: optuna.Study
) -> None:
    _load(optuna.create_study(storage=storage), 20 * _N_KNOWN)
    before = _n_rows(storage)
    for _ in range(_N_TRIALS):
        assert len(study.get_trials(deepcopy=False)) == _N_KNOWN + 12
        assert study.get_trials(deepcopy=False, states=(TrialState.WAITING,)) == []
    assert _n_rows(storage) - before < _N_TRIALS * 4 * (_N_KNOWN + 12)


@pytest.mark.parametrize(("pooled", "setting"), [(False, "off"), (True, "on")])
def test_only_a_session_of_our_own_is_set(storage: RDBStorage, pooled: bool, setting: str) -> None:
    raw: Any = storage.engine.raw_connection().driver_connection
    # A pooler answers for many sessions and calls itself by another number.
    info = SimpleNamespace(backend_pid=-1)
    shown = SimpleNamespace(cursor=raw.cursor, execute=getattr(raw, "execute", None), info=info)
    log: Any = storage._exchanger.log
    log.connection.dialect.prepare(shown if pooled else raw)
    cursor = raw.cursor()
    for name in ("enable_seqscan", "jit"):
        cursor.execute(f"SHOW {name}")
        assert cursor.fetchone() == (setting,)
