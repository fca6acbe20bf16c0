"""What no column can hold names nothing: it is absent on every database, and no driver's error."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest
import sqlalchemy as sa

from backends import Backend, params
from servers import new_database
from trialstore import records as r
from trialstore.logs.grpc.client import _is_unusual
from trialstore.rdb import RDBStorage


def _is_tables(backend: Backend) -> bool:
    return backend.name.startswith(("sqlite", "postgresql", "mariadb"))


@pytest.fixture(params=params(_is_tables))
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RDBStorage]:
    with contextlib.closing(request.param.prepare(tmp_path)()) as opened:
        yield opened


@pytest.fixture
def study_id(storage: RDBStorage) -> int:
    return storage.create_new_study([StudyDirection.MINIMIZE], "s")


@pytest.mark.parametrize("absent", [2**31, 2**63, 2**70, -1, -(2**70), 1.5])
def test_what_can_be_no_id(storage: RDBStorage, study_id: int, absent: Any) -> None:
    for read in (
        storage.get_trial,
        storage.get_trial_user_attrs,
        storage.get_n_trials,
        storage.get_all_trials,
        storage.get_best_trial,
        storage.get_study_name_from_id,
        storage.get_study_user_attrs,
        lambda id_: storage.get_all_trials(id_, states=(TrialState.COMPLETE,)),
        lambda id_: storage.get_all_trials(id_, deepcopy=False, states=(TrialState.WAITING,)),
        lambda id_: storage.get_trial_id_from_study_id_trial_number(id_, 0),
        lambda number: storage.get_trial_id_from_study_id_trial_number(study_id, number),
    ):
        with pytest.raises(KeyError):
            read(absent)
    assert storage.get_n_trials(study_id) == 0


@pytest.mark.parametrize("absent", ["a\0b", "\ud800", "x" * 5_000, "", "S", "s ", None])
def test_what_can_be_no_name(storage: RDBStorage, study_id: int, absent: Any) -> None:
    with pytest.raises(KeyError):
        storage.get_study_id_from_name(absent)
    assert storage.get_study_id_from_name("s") == study_id


@pytest.fixture
def on_mariadb(tmp_path: Path) -> Iterator[RDBStorage]:
    with contextlib.closing(RDBStorage(new_database("pymysql", tmp_path))) as opened:
        yield opened


_LONG = {"letters": "x" * 70_000, "escapes": "\u6f22" * 15_000, "numbers": [1.5] * 20_000}


@pytest.mark.servers
@pytest.mark.parametrize("value", _LONG.values(), ids=_LONG)
def test_a_long_attribute_is_refused_by_the_call_that_has_it(
    on_mariadb: RDBStorage, value: Any
) -> None:
    study = optuna.create_study(storage=on_mariadb)

    def objective(trial: optuna.Trial) -> float:
        with pytest.raises(ValueError, match=f"Trial {trial._trial_id}: attribute 'big'.*65535"):
            trial.set_user_attr("big", value)
        with pytest.raises(ValueError, match="attribute 'big'"):
            study.set_user_attr("big", value)
        with pytest.raises(ValueError, match="attribute 'big'"):
            study.enqueue_trial({}, {"big": value})
        return 1.0

    study.optimize(objective, n_trials=1)
    assert study.best_value == 1.0


@pytest.mark.servers
def test_a_column_that_was_made_longer_takes_more(on_mariadb: RDBStorage) -> None:
    with on_mariadb.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE trial_user_attributes MODIFY value_json LONGTEXT"))
    study = optuna.create_study(storage=on_mariadb)
    trial = study.ask()
    trial.set_user_attr("big", _LONG["letters"])
    study.tell(trial, 1.0)
    # The driver puts a backslash before each quotation mark, and before each backslash.
    for too_long in ("x" * (17 << 20), "x" * ((16 << 20) - 100), '"' * (5 << 20)):
        with pytest.raises(ValueError, match="max_allowed_packet"):
            study.ask().set_user_attr("big", too_long)
    assert study.trials[0].user_attrs == {"big": _LONG["letters"]}


@pytest.mark.parametrize("value", _LONG.values(), ids=_LONG)
def test_a_server_is_asked_about_a_long_attribute(value: Any) -> None:
    assert _is_unusual(r.SetTrialUserAttr(worker_id="w", trial_id=1, user_attr={"b": value}))


@pytest.mark.servers
@pytest.mark.parametrize("name", ["lr", "LR "])
def test_a_study_that_the_collation_holds_equal_is_refused_by_name(
    on_mariadb: RDBStorage, name: str
) -> None:
    optuna.create_study(storage=on_mariadb, study_name="LR")
    for load_if_exists in (False, True):
        with pytest.raises(ValueError, match=f"{name!r}.*'LR'"):
            optuna.create_study(storage=on_mariadb, study_name=name, load_if_exists=load_if_exists)


@pytest.mark.servers
def test_a_name_that_the_character_set_lacks(tmp_path: Path) -> None:
    url = new_database("pymysql", tmp_path)
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text(f"ALTER DATABASE {engine.url.database} CHARACTER SET latin1"))
    with contextlib.closing(RDBStorage(url)) as storage:
        study = optuna.create_study(storage=storage, study_name="ok")
        trial = study.ask()
        for load_if_exists in (False, True):
            with pytest.raises(ValueError, match="'\u6f22'"):
                optuna.create_study(
                    storage=storage, study_name="\u6f22", load_if_exists=load_if_exists
                )
        with pytest.raises(ValueError, match="'\u6f22'"):
            trial.suggest_float("\u6f22", 0, 1)
        with pytest.raises(ValueError, match="'\u6f22'"):
            study.set_user_attr("\u6f22", 1)
        study.tell(trial, 1.0)
