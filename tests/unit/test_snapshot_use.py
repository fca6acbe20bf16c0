"""How a storage uses snapshots: what it loads, what it passes over, and when it saves one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
import pickle
import threading
from typing import Any

from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

from trialstore import exchange, snapshot
from trialstore.log import Batch, Cursor, Wanted
from trialstore.logs.file import FileLog
from trialstore.records import AnyOperation, Record
from trialstore.storage import Storage

_STUDIES = 5
_TRIALS = 3
_DEADLINE_S = 60.0


class _Journal:
    """A log in this process that keeps a snapshot; its handles share both, as processes would."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.snapshot: tuple[bytes, Cursor] | None = None
        self.lock = threading.Lock()
        self.n_read = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return (_same_journal, (id(self),))

    def exchange(self, records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        with self.lock:
            self.records.extend(records)
            news = self.records[cursor or 0 :]
            self.n_read += len(news)
            return Batch(None, news, len(self.records))

    def close(self) -> None:
        pass

    def save_snapshot(self, make: Callable[[], tuple[bytes, Cursor] | None]) -> bool:
        made = make()
        if made is not None:
            self.snapshot = made
        return True

    def load_snapshot(self) -> tuple[bytes, Cursor] | None:
        return self.snapshot


_journals: dict[int, _Journal] = {}


def _same_journal(key: int) -> _Journal:
    return _journals[key]


@pytest.fixture
def journal() -> _Journal:
    journal = _Journal()
    _journals[id(journal)] = journal
    return journal


def _fill(journal: _Journal) -> Storage:
    storage = Storage(journal, linger_s=0)
    for number in range(_STUDIES):
        storage.create_new_study([StudyDirection.MINIMIZE], f"study {number}")
    for _ in range(_TRIALS):
        for study_id in range(_STUDIES):
            trial_id = storage.create_new_trial(study_id)
            storage.set_trial_user_attr(trial_id, "k", trial_id)
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [float(trial_id)])
    return storage


def _save(journal: _Journal, storage: Storage) -> None:
    exchanger = storage._exchanger
    journal.snapshot = (
        snapshot.dump(exchanger.replica, exchanger._cursor, exchanger._cursor),
        exchanger._cursor,
    )


def test_only_the_study_that_is_wanted_is_loaded(journal: _Journal) -> None:
    writer = _fill(journal)
    _save(journal, writer)
    reader = Storage(journal, linger_s=0)
    assert len(reader.get_all_studies()) == _STUDIES
    assert reader._exchanger.replica.loaded_study_ids() == set()
    assert reader.get_all_trials(3) == writer.get_all_trials(3)
    assert reader._exchanger.replica.loaded_study_ids() == {3}


def test_whoever_wants_study_after_study_gets_all_at_once(
    journal: _Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_STUDIES_APART_MAX", 2)
    writer = _fill(journal)
    _save(journal, writer)
    reader = Storage(journal, linger_s=0)
    for study_id, loaded in ((0, {0}), (3, {0, 3}), (1, set(range(_STUDIES)))):
        assert reader.get_all_trials(study_id) == writer.get_all_trials(study_id)
        assert reader._exchanger.replica.loaded_study_ids() == loaded


def test_ids_and_numbers_go_on_in_studies_that_are_not_loaded(journal: _Journal) -> None:
    writer = _fill(journal)
    _save(journal, writer)
    reader = Storage(journal, linger_s=0)
    reader.get_all_trials(0)
    for study_id in range(_STUDIES):
        writer.create_new_trial(study_id)
    new_id = reader.create_new_trial(0)
    assert new_id == _STUDIES * (_TRIALS + 1)
    assert reader.get_trial(new_id).number == _TRIALS + 1
    for study_id in range(_STUDIES):
        assert reader.get_all_trials(study_id) == writer.get_all_trials(study_id)


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.get_trial(7).user_attrs["k"] == 7,
        lambda s: s.get_trial_number_from_id(7) == 1,
        lambda s: s.get_trial_id_from_study_id_trial_number(2, 1) == 7,
        lambda s: s.get_n_trials(2) == _TRIALS,
        lambda s: s.get_best_trial(2)._trial_id == 2,
        lambda s: s.get_trial(s.create_new_trial(2)).number == _TRIALS,
        lambda s: s.get_all_trials(2, states=(TrialState.WAITING,)) == [],
    ],
)
def test_every_use_of_a_trial_loads_its_study(
    journal: _Journal, use: Callable[[Storage], bool]
) -> None:
    _save(journal, _fill(journal))
    assert use(Storage(journal, linger_s=0))


def test_a_trial_of_an_unloaded_study_can_be_written(journal: _Journal) -> None:
    writer = _fill(journal)
    waiting = writer.create_new_trial(4)
    writer.set_trial_state_values(waiting, TrialState.WAITING)
    _save(journal, writer)
    reader = Storage(journal, linger_s=0)
    assert reader.set_trial_state_values(waiting, TrialState.RUNNING) is True
    reader.set_trial_user_attr(waiting, "k", 1)
    reader.set_trial_state_values(waiting, TrialState.COMPLETE, [0.0])
    assert writer.get_trial(waiting).user_attrs == {"k": 1}
    with pytest.raises(KeyError):
        reader.get_trial(waiting + 1)


def test_a_deleted_study_that_was_not_loaded_is_gone(journal: _Journal) -> None:
    writer = _fill(journal)
    _save(journal, writer)
    reader = Storage(journal, linger_s=0)
    reader.get_all_studies()
    writer.delete_study(2)
    with pytest.raises(KeyError):
        reader.get_all_trials(2)
    with pytest.raises(KeyError):
        reader.get_trial(2)
    assert reader.get_all_trials(1) == writer.get_all_trials(1)


def test_a_damaged_snapshot_is_ignored(
    journal: _Journal, caplog: pytest.LogCaptureFixture
) -> None:
    writer = _fill(journal)
    journal.snapshot = (b"\x80\x04not ours", 0)
    reader = Storage(journal, linger_s=0)
    assert reader.get_all_trials(2) == writer.get_all_trials(2)
    assert "pickle" in caplog.text


def test_a_snapshot_is_saved_once_replaying_has_become_long(
    journal: _Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_RECORDS_MIN", 20)
    storage = Storage(journal, linger_s=0)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE])
    while journal.snapshot is None:
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0])
        saver = storage._exchanger._saver
        assert saver is not None
        saver.join()
        assert len(journal.records) <= 21
    assert journal.n_read == len(journal.records)  # by the storage, once
    journal.n_read = 0
    reader = Storage(journal, linger_s=0)
    assert reader.get_all_trials(study_id) == storage.get_all_trials(study_id)
    assert journal.n_read < 20


def test_nobody_waits_for_a_snapshot(journal: _Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_RECORDS_MIN", 1)
    begun, go_on = threading.Event(), threading.Event()
    save = journal.save_snapshot

    def slow(make: Callable[[], tuple[bytes, Cursor] | None]) -> bool:
        begun.set()
        assert go_on.wait(_DEADLINE_S)
        return save(make)

    monkeypatch.setattr(journal, "save_snapshot", slow)
    storage = Storage(journal, linger_s=0)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE])
    assert begun.wait(_DEADLINE_S)
    for number in range(5):
        assert storage.get_trial(storage.create_new_trial(study_id)).number == number
    assert journal.snapshot is None
    go_on.set()
    saver = storage._exchanger._saver
    assert saver is not None
    saver.join()
    assert journal.snapshot is not None


def _damage(sidecar: Path) -> None:
    image = bytearray(sidecar.read_bytes())
    image[len(image) // 2] ^= 1
    sidecar.write_bytes(image)


@pytest.mark.parametrize(
    "spoil",
    [_damage, lambda sidecar: sidecar.write_bytes(pickle.dumps({})), Path.unlink],
    ids=["damaged", "foreign", "deleted"],
)
def test_a_snapshot_that_cannot_be_used_is_made_anew(
    tmp_path: Path, spoil: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_RECORDS_MIN", 5)
    path = str(tmp_path / "journal")
    sidecar = Path(f"{path}.snapshot")

    def opened() -> Storage:
        return Storage(FileLog(path), linger_s=0)

    def saved(storage: Storage) -> None:
        saver = storage._exchanger._saver
        assert saver is not None
        saver.join()
        assert FileLog(path).load_snapshot() is not None

    writer = opened()
    study_id = writer.create_new_study([StudyDirection.MINIMIZE])
    for value in range(10):
        trial_id = writer.create_new_trial(study_id)
        writer.set_trial_state_values(trial_id, TrialState.COMPLETE, [float(value)])
    saved(writer)
    spoil(sidecar)
    assert FileLog(path).load_snapshot() is None
    reader = opened()
    assert reader.get_all_trials(study_id) == writer.get_all_trials(study_id)
    saved(reader)
    assert opened().get_all_trials(study_id) == writer.get_all_trials(study_id)


def test_who_holds_not_all_studies_saves_all(
    journal: _Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = _fill(journal)
    _save(journal, writer)
    monkeypatch.setattr(snapshot, "_RECORDS_MIN", 1)
    monkeypatch.setattr(snapshot, "_GROWTH_MIN", 0.0)
    partial = Storage(journal, linger_s=0)
    before = journal.snapshot
    trial_id = partial.create_new_trial(1)
    saver = partial._exchanger._saver
    assert saver is not None
    saver.join()
    assert not partial._exchanger.replica.is_complete
    assert journal.snapshot != before
    reader = Storage(journal, linger_s=0)
    assert reader.get_trial(trial_id) == partial.get_trial(trial_id)
    assert reader.get_all_trials(3) == writer.get_all_trials(3)
