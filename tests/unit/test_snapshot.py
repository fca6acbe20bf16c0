"""A snapshot is the replica again, or refused; nothing in it is ever run."""

from __future__ import annotations

import pickle
from typing import Any

from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    distribution_to_json,
)
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

import trialstore
from trialstore import snapshot
from trialstore.errors import SnapshotRefusedError
from trialstore.log import NOTHING, START
from trialstore.logs.memory import MemoryLog
from trialstore.records import CreateStudy, CreateTrial, Record
from trialstore.replica import Replica
from trialstore.storage import Storage

_ODD_VALUES: list[Any] = [
    None,
    float("inf"),
    -0.0,
    5e-324,
    2**70,
    "\ud800 lone",
    "nul \x00",
    {"a": [1, {"b": None}]},
]


def _storage_with_contents(log: MemoryLog) -> Storage:
    storage = Storage(log, linger_s=0)
    deleted = storage.create_new_study([StudyDirection.MINIMIZE], "deleted")
    study_id = storage.create_new_study([StudyDirection.MAXIMIZE], "one \ud800")
    storage.create_new_trial(deleted)
    for value in _ODD_VALUES:
        storage.set_study_user_attr(study_id, f"{value!r}", value)
        trial_id = storage.create_new_trial(study_id)
        storage.create_new_trial(deleted)
        storage.set_trial_param(trial_id, "x", 0.25, FloatDistribution(0, 1))
        storage.set_trial_param(trial_id, "c", 1, CategoricalDistribution([1, "b", None]))
        storage.set_trial_user_attr(trial_id, "k", value)
        storage.set_trial_intermediate_value(trial_id, -3, float("nan"))
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.5])
    storage.create_new_trial(study_id)
    storage.delete_study(deleted)
    return storage


def _replayed(records: list[Record]) -> Replica:
    replica = Replica()
    for record in records:
        replica.apply(record)
    return replica


def _contents(replica: Replica) -> list[Any]:
    # repr, because NaN is not equal to itself; it shows every field and the order of parameters.
    return [
        *(repr(vars(study)) for study in replica.studies()),
        *(repr(replica.trials(study_id, None)) for study_id in replica.study_ids()),
        *(repr(image) for id_ in replica.study_ids() for image in replica.trial_images(id_)),
        *(repr(image) for id_ in replica.study_ids() for image in replica.param_images(id_)),
        repr(replica.positions()),
    ]


@pytest.fixture
def records() -> list[Record]:
    log = MemoryLog()
    _storage_with_contents(log)
    return list(log.exchange([], START, NOTHING).news)


def test_a_snapshot_plus_the_later_records_is_the_full_replay(records: list[Record]) -> None:
    for position in range(0, len(records) + 1, 3):
        restored, cursor, n_records = snapshot.load(
            snapshot.dump(_replayed(records[:position]), ("id", position), position)
        )
        assert (cursor, n_records) == (("id", position), position)
        for record in records[position:]:
            restored.apply(record)
        assert _contents(restored) == _contents(_replayed(records))


def test_what_is_still_does_not_follow_later_records(records: list[Record]) -> None:
    for position in range(0, len(records) + 1, 3):
        replica = _replayed(records[:position])
        still = replica.still()
        for record in records[position:]:
            replica.apply(record)
        for study_id in replica.study_ids():
            replica.trials(study_id, None)
        expected = snapshot.dump(_replayed(records[:position]), None, position)
        assert snapshot.dump_still(still, None, position) == expected


def test_a_value_outside_of_its_distribution_is_kept() -> None:
    """Others may have stored it; a snapshot is saved all the same."""
    log = FloatDistribution(0.1, 9, log=True)
    study = CreateStudy(worker_id="w", seq=0, study_name="s", directions=[1])
    trial = CreateTrial(
        worker_id="w",
        seq=1,
        study_id=0,
        datetime_start=None,
        params={"x": 0.0},
        distributions={"x": distribution_to_json(log)},
    )
    replica = _replayed([study, trial])
    restored = snapshot.load(snapshot.dump(replica, None, 2)).replica
    assert _contents(restored) == _contents(replica)
    assert restored.trials(0, None)[0].params == {"x": 0.0}


def test_a_study_of_several_sections_comes_back(
    records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_SECTION_TRIALS", 2)
    replica = _replayed(records)
    whole = snapshot.dump(replica, None, 0)
    assert _contents(snapshot.load(whole).replica) == _contents(replica)
    one, unloaded = snapshot.load(whole, {1}).replica, snapshot.load(whole, set()).replica
    assert repr(one.trials(1, None)) == repr(replica.trials(1, None))
    assert not unloaded.is_complete


def test_the_owner_of_a_running_trial_is_kept(records: list[Record]) -> None:
    replica = _replayed(records)
    (running,) = replica.trials(1, (TrialState.RUNNING,))
    restored = snapshot.load(snapshot.dump(replica, None, 0)).replica
    assert restored.owner(running._trial_id) == replica.owner(running._trial_id) != ""


def test_reading_before_the_dump_changes_nothing(records: list[Record]) -> None:
    read, unread = _replayed(records), _replayed(records)
    read.trials(1, None)
    assert snapshot.dump(read, None, 0) == snapshot.dump(unread, None, 0)


def test_a_pickle_is_refused_and_not_loaded(tmp_path: Any) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "written"), "w"))

    with pytest.raises(SnapshotRefusedError, match="pickle"):
        snapshot.load(pickle.dumps(Malicious()))
    assert not (tmp_path / "written").exists()


def test_every_cut_and_every_flip_is_refused(records: list[Record]) -> None:
    whole = snapshot.dump(_replayed(records), ("id", 1), 1)
    for length in range(len(whole)):
        with pytest.raises(SnapshotRefusedError):
            snapshot.load(whole[:length])
    for position in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[position] ^= 0x10
        with pytest.raises(SnapshotRefusedError):
            snapshot.load(bytes(flipped))


def test_a_later_format_version_is_refused_by_number(records: list[Record]) -> None:
    whole = bytearray(snapshot.dump(_replayed(records), None, 0))
    whole[7] = 9
    with pytest.raises(SnapshotRefusedError, match="version 9"):
        snapshot.load(bytes(whole))


def test_choices_that_are_equal_and_of_different_types_stay_what_they_were() -> None:
    choices = CategoricalDistribution((1, True, 1.0, "a"))
    storage = trialstore.InMemoryStorage()
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    for index in range(4):
        storage.set_trial_param(storage.create_new_trial(study_id), "c", index, choices)
    copied = pickle.loads(pickle.dumps(storage))
    shown = [trial.params["c"] for trial in copied.get_all_trials(study_id)]
    assert [(type(value), value) for value in shown] == [
        (int, 1),
        (bool, True),
        (float, 1.0),
        (str, "a"),
    ]
