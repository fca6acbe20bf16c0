"""What ``RDBStorage`` could do before Optuna 3, on every database."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import inspect
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

from backends import Backend, params
from servers import new_database
from trialstore.rdb import RDBStorage

MINIMIZE, MAXIMIZE, NOT_SET = (
    StudyDirection.MINIMIZE,
    StudyDirection.MAXIMIZE,
    StudyDirection.NOT_SET,
)


def _is_tables(backend: Backend) -> bool:
    return backend.name.startswith(("sqlite", "postgresql", "mariadb"))


def _is_shared(backend: Backend) -> bool:
    return _is_tables(backend) and backend.capabilities.shared


@pytest.fixture(params=params(_is_tables))
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RDBStorage]:
    with contextlib.closing(request.param.prepare(tmp_path)()) as opened:
        yield opened


@pytest.fixture(params=params(_is_shared))
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[RDBStorage, RDBStorage]]:
    """Two storages over one database."""
    open_storage = request.param.prepare(tmp_path)
    with contextlib.closing(open_storage()) as one, contextlib.closing(open_storage()) as other:
        yield one, other


def test_a_study_is_made_without_directions_and_gets_them_later(
    two: tuple[RDBStorage, RDBStorage],
) -> None:
    one, other = two
    study_id = one.create_new_study("s")
    assert one.create_new_study() != one.create_new_study(study_name="t")
    assert one.get_study_directions(study_id) == other.get_study_directions(study_id) == [NOT_SET]
    one.set_study_directions(study_id, [NOT_SET])
    one.set_study_directions(study_id, (MAXIMIZE, MINIMIZE))
    assert one.get_study_directions(study_id) == [MAXIMIZE, MINIMIZE]
    assert other.get_study_directions(study_id) == [MAXIMIZE, MINIMIZE]
    trial_id = other.create_new_trial(study_id)
    other.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0, 2.0])
    assert one.get_trial(trial_id).values == [1.0, 2.0]


def test_a_study_keeps_the_directions_that_it_has(storage: RDBStorage) -> None:
    study_id = storage.create_new_study([MINIMIZE], "s")
    storage.set_study_directions(study_id, [MINIMIZE])
    for other in ([MAXIMIZE], [NOT_SET], [MINIMIZE, MINIMIZE]):
        with pytest.raises(ValueError, match="MINIMIZE"):
            storage.set_study_directions(study_id, other)
    assert storage.get_study_directions(study_id) == [MINIMIZE]
    with pytest.raises(KeyError):
        storage.set_study_directions(study_id + 1, [MINIMIZE])
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        storage.create_new_study("s")
    with pytest.raises(TypeError):
        storage.create_new_study("s", "s")


def test_directions_that_come_after_the_trials_decide_which_is_best(
    two: tuple[RDBStorage, RDBStorage],
) -> None:
    one, other = two
    study_id = one.create_new_study("s")
    for value in (1.0, 3.0, 2.0):
        trial_id = one.create_new_trial(study_id)
        one.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])
    assert len(other.get_all_trials(study_id)) == 3
    assert other.get_best_trial(study_id).value == 1.0
    one.set_study_directions(study_id, [MAXIMIZE])
    assert other.get_best_trial(study_id).value == one.get_best_trial(study_id).value == 3.0


def test_values_are_set_apart_from_the_state(two: tuple[RDBStorage, RDBStorage]) -> None:
    one, other = two
    study_id = one.create_new_study([MINIMIZE])
    trial_id = one.create_new_trial(study_id)
    one.set_trial_values(trial_id, [5.0])
    other.set_trial_values(trial_id, (float("inf"),))
    assert one.get_trial(trial_id).value == float("inf")
    one.set_trial_values(trial_id, [0.25])
    for storage in two:
        trial = storage.get_trial(trial_id)
        assert trial.value == 0.25 and trial.state == TrialState.RUNNING
    assert one.set_trial_state(trial_id, TrialState.RUNNING) is False
    assert one.set_trial_state(trial_id, TrialState.COMPLETE) is True
    for storage in two:
        assert storage.get_trial(trial_id).value == 0.25
        assert storage.get_best_trial(study_id)._trial_id == trial_id


def test_a_finished_trial_and_none_at_all_are_refused(storage: RDBStorage) -> None:
    study_id = storage.create_new_study([MINIMIZE])
    trial_id = storage.create_new_trial(study_id)
    with pytest.raises(ValueError, match="objectives"):
        storage.set_trial_values(trial_id, [1.0, 2.0])
    with pytest.raises(ValueError, match="NaN"):
        storage.set_trial_values(trial_id, [float("nan")])
    storage.set_trial_state(trial_id, TrialState.FAIL)
    with pytest.raises(RuntimeError, match="finished"):
        storage.set_trial_values(trial_id, [1.0])
    with pytest.raises(RuntimeError, match="finished"):
        storage.set_trial_state(trial_id, TrialState.COMPLETE)
    assert storage.get_trial(trial_id).values is None
    with pytest.raises(KeyError):
        storage.set_trial_values(trial_id + 1, [1.0])
    with pytest.raises(KeyError):
        storage.set_trial_state(trial_id + 1, TrialState.COMPLETE)


def test_a_trial_finished_by_another_meanwhile_keeps_its_values(
    two: tuple[RDBStorage, RDBStorage],
) -> None:
    one, other = two
    study_id = one.create_new_study([MINIMIZE])
    trial_id = one.create_new_trial(study_id)
    get_trial = one.get_trial

    def finished_after_the_look(trial_id: int) -> Any:
        trial = get_trial(trial_id)
        other.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        return trial

    one.get_trial = finished_after_the_look  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="finished"):
        one.set_trial_values(trial_id, [2.0])
    assert get_trial(trial_id).values == [1.0]


def test_a_trial_tells_its_study(storage: RDBStorage) -> None:
    study_id = storage.create_new_study([MINIMIZE])
    trial_id = storage.create_new_trial(study_id)
    assert storage.get_study_id_from_trial_id(trial_id) == study_id
    with pytest.raises(KeyError):
        storage.get_study_id_from_trial_id(trial_id + 1)
    storage.read_trials_from_remote_storage(study_id)
    with pytest.raises(KeyError):
        storage.read_trials_from_remote_storage(study_id + 1)


def test_summaries_are_optunas(storage: RDBStorage) -> None:
    directions = ([MINIMIZE], [MAXIMIZE], [MINIMIZE, MAXIMIZE], [NOT_SET], [MAXIMIZE], [MINIMIZE])
    for i, ones in enumerate(directions):
        study_id = storage.create_new_study(ones, f"study {i}")
        storage.set_study_user_attr(study_id, "i", i)
        if i == 4:
            continue
        for value in (2.0, 3.0, float("inf"), -float("inf"), 3.0) if i < 4 else ():
            trial_id = storage.create_new_trial(study_id)
            values = [value] * len(ones)
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, values)
        storage.create_new_trial(study_id)
        queued = optuna.trial.create_trial(state=TrialState.WAITING)
        storage.create_new_trial(study_id, queued)
    summaries = storage.get_all_study_summaries()
    expected = optuna.get_all_study_summaries(storage)
    assert len(expected) == len(directions)
    for mine, wanted in zip(summaries, expected, strict=True):
        assert vars(mine) == vars(wanted), mine.study_name


def test_the_schema_tells_its_version(storage: RDBStorage) -> None:
    assert storage.get_current_version() == storage.get_head_version() == "v3.2.0.a"
    assert storage.get_all_versions()[0] == "v3.2.0.a"
    storage.upgrade()
    assert storage.get_current_version() == "v3.2.0.a"
    assert storage.get_n_trials(storage.create_new_study([MINIMIZE])) == 0


# Seed 002: the methods of Optuna 2.10, and their arguments in order.
_OLDER = """
check_trial_is_updatable(trial_id, trial_state)
create_new_trial(study_id, template_trial)
delete_study(study_id)
fail_stale_trials()
get_all_study_summaries()
get_all_trials(study_id, deepcopy, states)
get_all_versions()
get_best_trial(study_id)
get_current_version()
get_head_version()
get_heartbeat_interval()
get_n_trials(study_id, state)
get_study_directions(study_id)
get_study_id_from_name(study_name)
get_study_id_from_trial_id(trial_id)
get_study_name_from_id(study_id)
get_study_system_attrs(study_id)
get_study_user_attrs(study_id)
get_trial(trial_id)
get_trial_id_from_study_id_trial_number(study_id, trial_number)
get_trial_number_from_id(trial_id)
get_trial_param(trial_id, param_name)
get_trial_params(trial_id)
get_trial_system_attrs(trial_id)
get_trial_user_attrs(trial_id)
is_heartbeat_enabled()
read_trials_from_remote_storage(study_id)
record_heartbeat(trial_id)
remove_session()
set_study_directions(study_id, directions)
set_study_system_attr(study_id, key, value)
set_study_user_attr(study_id, key, value)
set_trial_intermediate_value(trial_id, step, intermediate_value)
set_trial_param(trial_id, param_name, param_value_internal, distribution)
set_trial_state(trial_id, state)
set_trial_system_attr(trial_id, key, value)
set_trial_user_attr(trial_id, key, value)
set_trial_values(trial_id, values)
upgrade()
"""


@pytest.mark.parametrize("line", _OLDER.split("\n")[1:-1])
def test_every_older_method_takes_its_arguments_in_their_order(line: str) -> None:
    name, _, rest = line.rstrip(")").partition("(")
    wanted = [one for one in rest.split(", ") if one]
    signature = inspect.signature(getattr(RDBStorage, name))
    ours = list(signature.parameters.values())[1:]
    assert [one.name for one in ours[: len(wanted)]] == wanted
    for one in ours[len(wanted) :]:
        assert one.default is not inspect.Parameter.empty


def test_the_constructor_takes_its_arguments_in_their_order() -> None:
    ours = list(inspect.signature(RDBStorage).parameters)
    assert ours[:5] == [
        "url",
        "engine_kwargs",
        "skip_compatibility_check",
        "heartbeat_interval",
        "grace_period",
    ]


def test_what_users_read_from_optunas_storage_is_there(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/{{SCHEMA_VERSION}}.db"
    options = {"pool_pre_ping": True}
    storage = RDBStorage(url, options, True)
    optunas = optuna.storages.RDBStorage(url, options, True)
    for name in ("url", "engine_kwargs", "skip_compatibility_check", "heartbeat_interval"):
        assert getattr(storage, name) == getattr(optunas, name), name
    assert str(storage.engine.url) == str(optunas.engine.url)
    optunas.engine.dispose()
    storage.close()


def test_the_example_of_older_documentation_runs() -> None:
    storage = RDBStorage(
        url="sqlite:///:memory:",
        engine_kwargs={"pool_size": 20, "connect_args": {"timeout": 10}},
    )
    with contextlib.closing(storage):
        study = optuna.create_study(storage=storage)
        study.optimize(lambda trial: trial.suggest_float("x", -100, 100) ** 2, n_trials=10)
        assert [trial.number for trial in storage.get_all_trials(study._study_id)] == [*range(10)]


@pytest.mark.servers
@pytest.mark.parametrize("kind", ["psycopg", "psycopg2", "pymysql"])
def test_engine_kwargs_reach_the_engine_and_the_driver(kind: str, tmp_path: Path) -> None:
    url = new_database(kind, tmp_path)
    engine_kwargs = {"pool_size": 3, "pool_recycle": 60, "connect_args": {"connect_timeout": 7}}
    with contextlib.closing(RDBStorage(url, engine_kwargs)) as storage:
        study = optuna.create_study(storage=storage)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
        assert storage.engine.pool.size() == 3  # type: ignore[attr-defined]
        raw = storage.log.connection.session().raw  # type: ignore[attr-defined]
        if kind == "pymysql":
            assert raw.connect_timeout == 7
        elif kind == "psycopg":
            assert raw.info.get_parameters()["connect_timeout"] == "7"
        else:
            assert raw.info.dsn_parameters["connect_timeout"] == "7"
    assert engine_kwargs == {
        "pool_size": 3,
        "pool_recycle": 60,
        "connect_args": {"connect_timeout": 7},
    }


@pytest.mark.servers
def test_mysql_asks_its_pooled_connections_unless_told_not_to(tmp_path: Path) -> None:
    url = new_database("pymysql", tmp_path)
    for given, wanted in (({}, True), ({"pool_pre_ping": False}, False)):
        with contextlib.closing(RDBStorage(url, given)) as storage:
            assert storage.engine.pool._pre_ping is wanted
