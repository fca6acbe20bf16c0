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


@pytest.fixture(params=["psycopg", "psycopg2"])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[optuna.Study]:
    """Of many trials, whose every statement has been used often enough to be prepared."""
    storage = RDBStorage(new_database(request.param, tmp_path), linger_s=600.0)
    study = optuna.create_study(storage=storage, sampler=RandomSampler(seed=1))
    params = {f"x{i}": 0.5 for i in range(_N_PARAMS)}
    known = r.CreateTrial(
        worker_id="",
        study_id=study._study_id,
        datetime_start="2026-01-01T00:00:00.000000",
        datetime_complete="2026-01-01T00:00:01.000000",
        state=int(optuna.trial.TrialState.COMPLETE),
        value=1.0,
        params=params,
        distributions=dict.fromkeys(params, _X),
        user_attrs={"note": 1},
    )
    log: Any = storage._exchanger.log
    log.load_trials([known] * _N_KNOWN, 0, 0)
    with storage.engine.begin() as connection:
        connection.execute(sa.text("ANALYZE"))  # by itself within a minute
    _run(study, 12)
    yield study
    storage.close()


def _answer(study: optuna.Study, sql: str) -> list[Any]:
    """By the storage's own connection, which is the one that has plans."""
    storage: Any = study._storage
    cursor = storage._exchanger.log.connection.session().raw.cursor()
    cursor.execute(sql)
    return list(cursor.fetchall())


def test_a_statement_is_planned_once_and_not_for_each_of_its_values(study: optuna.Study) -> None:
    _run(study, _N_TRIALS)
    sql = "SELECT custom_plans, statement FROM pg_prepared_statements WHERE custom_plans + "
    used = _answer(study, f"{sql} generic_plans >= {_N_TRIALS}")
    assert used
    # PostgreSQL makes five, to compare what they promise with one plan for all.
    assert [statement for n_plans, statement in used if n_plans > 5] == []


def test_a_look_reads_what_is_new_and_not_whole_tables(study: optuna.Study) -> None:
    def n_rows() -> int:
        _answer(study, "SELECT 1 FROM pg_stat_force_next_flush()")
        counts = "sum(seq_tup_read + coalesce(idx_tup_fetch, 0))"
        ((found,),) = _answer(study, f"SELECT {counts} FROM pg_stat_user_tables")
        return int(found)

    before = n_rows()
    _run(study, _N_TRIALS)
    assert n_rows() - before < _N_TRIALS * 60


@pytest.mark.parametrize(("pooled", "setting"), [(False, "off"), (True, "on")])
def test_only_a_session_of_our_own_is_set(study: optuna.Study, pooled: bool, setting: str) -> None:
    storage: Any = study._storage
    raw = storage.engine.raw_connection().driver_connection
    # A pooler answers for many sessions and calls itself by another number.
    shown = SimpleNamespace(cursor=raw.cursor, info=SimpleNamespace(backend_pid=-1))
    storage._exchanger.log.connection.dialect.prepare(shown if pooled else raw)
    cursor = raw.cursor()
    for name in ("enable_seqscan", "jit"):
        cursor.execute(f"SHOW {name}")
        assert cursor.fetchone() == (setting,)
