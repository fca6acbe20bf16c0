"""What plain Optuna lets into a journal although it is of another type than the field's."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
import logging
import os
from pathlib import Path
import time
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage as OptunasStorage
from optuna.storages.journal import JournalFileBackend as OptunasBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
import pytest

from trialstore import InMemoryStorage, JournalStorage, get_storage
from trialstore.errors import LogCorruptError
from trialstore.journal import JournalFileBackend

_STUDY = 0


def _template(**fields: Any) -> Callable[[OptunasStorage], object]:
    return lambda storage: storage.create_new_trial(_STUDY, create_trial(**fields))


def _on_a_new_trial(method: str, *args: Any) -> Callable[[OptunasStorage], object]:
    return lambda storage: getattr(storage, method)(storage.create_new_trial(_STUDY), *args)


# What is done, and which field of the trial then reads how.
_CASES: dict[str, tuple[Callable[[OptunasStorage], object], str, Any]] = {
    "bool value": (_template(value=True), "values", [1.0]),
    "no step value": (
        _template(value=0.5, intermediate_values={0: None, 1: 0.25}),
        "intermediate_values",
        {1: 0.25},
    ),
    "bool step value": (
        _template(value=0.5, intermediate_values={0: True}),
        "intermediate_values",
        {0: 1.0},
    ),
    "bool told": (
        _on_a_new_trial("set_trial_state_values", TrialState.COMPLETE, [True]),
        "values",
        [1.0],
    ),
    "bool parameter": (
        _on_a_new_trial("set_trial_param", "x", True, FloatDistribution(0, 1)),
        "params",
        {"x": 1.0},
    ),
    "name of a parameter": (
        _on_a_new_trial("set_trial_param", 1, 0.5, FloatDistribution(0, 1)),
        "params",
        {"1": 0.5},
    ),
    "bool reported": (
        _on_a_new_trial("set_trial_intermediate_value", 0, True),
        "intermediate_values",
        {0: 1.0},
    ),
    "nothing reported": (
        _on_a_new_trial("set_trial_intermediate_value", 0, None),
        "intermediate_values",
        {},
    ),
    "bool step": (
        _on_a_new_trial("set_trial_intermediate_value", True, 0.5),
        "intermediate_values",
        {1: 0.5},
    ),
    "step value beyond all floats": (
        _template(value=0.5, intermediate_values={0: 10**400, 1: 0.25}),
        "intermediate_values",
        {1: 0.25},
    ),
    "half a step": (
        _on_a_new_trial("set_trial_intermediate_value", 0.5, 1.0),
        "intermediate_values",
        {},
    ),
}


@pytest.mark.parametrize("case", _CASES)
def test_a_value_of_another_type_is_read_or_left_out(tmp_path: Path, case: str) -> None:
    act, field, expected = _CASES[case]
    path = str(tmp_path / "journal")
    theirs = OptunasStorage(OptunasBackend(path))
    theirs.create_new_study([StudyDirection.MINIMIZE], "study")
    running = JournalStorage(JournalFileBackend(path))
    running.create_new_trial(_STUDY, create_trial(value=0.5))
    act(theirs)
    theirs.create_new_trial(_STUDY, create_trial(value=0.75))
    for storage in (running, JournalStorage(JournalFileBackend(path))):
        _, odd, behind = storage.get_all_trials(_STUDY)
        assert getattr(odd, field) == expected
        assert (behind.number, behind.values) == (2, [0.75])


def test_the_name_of_a_study_may_have_been_a_number(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    optuna.create_study(
        storage=OptunasStorage(OptunasBackend(path)),
        study_name=2024,  # type: ignore[arg-type]
    )
    assert JournalStorage(JournalFileBackend(path)).get_study_id_from_name("2024") == _STUDY


def test_what_is_left_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(tmp_path / "journal")
    theirs = OptunasStorage(OptunasBackend(path))
    theirs.create_new_study([StudyDirection.MINIMIZE], "study")
    trial_id = theirs.create_new_trial(_STUDY)
    theirs.set_trial_intermediate_value(trial_id, 0.5, 1.0)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, logger="trialstore"):
        JournalStorage(JournalFileBackend(path)).get_trial(trial_id)
    assert "left out" in caplog.text
    assert "step" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        b'{"op_code":7,"worker_id":"w","trial_id":1.5,"step":0,"intermediate_value":1.0}',
        b'{"op_code":7,"worker_id":1,"trial_id":0,"step":0.5,"intermediate_value":1.0}',
        b'{"op_code":7,"worker_id":"w","trial_id":0,"step":"x","intermediate_value":1.0}',
        b'{"op_code":[],"worker_id":"w"}',
        b'{"op_code":{},"worker_id":"w"}',
    ],
)
def test_what_says_not_even_of_what_it_is_said_is_damage(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "journal"
    theirs = OptunasStorage(OptunasBackend(str(path)))
    theirs.create_new_study([StudyDirection.MINIMIZE], "study")
    theirs.create_new_trial(_STUDY)
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(LogCorruptError, match="record 2"):
        JournalStorage(JournalFileBackend(str(path))).get_all_trials(_STUDY)


def test_a_trial_of_the_end_of_time_is_read_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "journal")
    end = create_trial(value=0.5)
    end.datetime_complete = datetime(9999, 12, 31, 23, 0)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    try:
        storage = JournalStorage(JournalFileBackend(path))
        study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
        storage.create_new_trial(study_id, end)
        os.environ["TZ"] = "Asia/Tokyo"
        time.tzset()
        (trial,) = JournalStorage(JournalFileBackend(path)).get_all_trials(study_id)
        assert trial.values == [0.5]
    finally:
        monkeypatch.undo()
        time.tzset()


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_what_is_nested_too_deep_is_refused_at_the_call(tmp_path: Path) -> None:
    """How deep JSON can be read depends on how deep its reader is already."""
    for storage in (
        get_storage(str(tmp_path / "journal")),
        get_storage(f"sqlite:///{tmp_path}/db"),
    ):
        study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
        trial_id = storage.create_new_trial(study_id)
        for depth in (201, 985):
            with pytest.raises(ValueError, match=r"\bnested deeper|recursion"):
                storage.set_trial_user_attr(trial_id, "k", _nested(depth))
            with pytest.raises(ValueError, match=r"\bnested deeper|recursion"):
                storage.create_new_trial(
                    study_id, create_trial(value=0.5, user_attrs={"k": _nested(depth)})
                )
        storage.set_trial_user_attr(trial_id, "k", _nested(200))
        wide = [[number] for number in range(1000)]
        storage.set_trial_user_attr(trial_id, "wide", wide)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.5])
        assert storage.get_trial(trial_id).user_attrs == {"k": _nested(200), "wide": wide}


def test_in_memory_any_depth_is_kept() -> None:
    storage = InMemoryStorage()
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    storage.set_study_user_attr(study_id, "k", _nested(900))
    assert storage.get_study_user_attrs(study_id) == {"k": _nested(900)}


@pytest.mark.parametrize(
    "time",
    [datetime(1, 1, 1), datetime(9999, 12, 31, 23), datetime(2026, 1, 1, tzinfo=timezone.utc)],
    ids=str,
)
def test_in_memory_any_time_is_kept(time: datetime) -> None:
    storage = InMemoryStorage()
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    template = create_trial(value=0.5)
    template.datetime_start = template.datetime_complete = time
    trial = storage.get_trial(storage.create_new_trial(study_id, template))
    assert trial.datetime_start == trial.datetime_complete == time
    assert trial.datetime_start.tzinfo == time.tzinfo
