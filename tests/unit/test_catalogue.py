"""Answers about a study whose trials nobody here has read: by SQL, in few statements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import datetime
from pathlib import Path
from typing import Any

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
import pytest
import sqlalchemy as sa

from backends import Backend, params
from trialstore.log import Catalogue, Wanted
from trialstore.rdb import RDBStorage
from trialstore.storage import _ASKED_MAX
from trialstore.testing.storage_suite import OpenStorage

MINIMIZE, MAXIMIZE = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE


def _is_tables_of_many(backend: Backend) -> bool:
    return (
        backend.name.startswith(("sqlite", "postgresql", "mariadb"))
        and backend.capabilities.shared
    )


@pytest.fixture(params=params(_is_tables_of_many))
def open_storage(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStorage:
    opened: OpenStorage = request.param.prepare(tmp_path)
    return opened


def _filled(
    storage: Any, directions: Sequence[StudyDirection], values: Sequence[float], name: str = "s"
) -> int:
    """A study of COMPLETE trials with these values, one RUNNING and one WAITING."""
    study_id: int = storage.create_new_study(directions, name)
    for value in values:
        template = create_trial(values=[value] * len(directions))
        storage.create_new_trial(study_id, template_trial=template)
    storage.create_new_trial(study_id)
    storage.create_new_trial(study_id, template_trial=create_trial(state=TrialState.WAITING))
    return study_id


@contextlib.contextmanager
def _cold(open_storage: OpenStorage) -> Any:
    """A new storage, and what it sends from now on: the number of statements of each message."""
    with contextlib.closing(open_storage()) as storage:
        session = storage._exchanger.log.connection.session()
        real, sent = session.run, []

        def run(steps: Sequence[Any]) -> Any:
            sent.append(len(steps))
            return real(steps)

        session.run = run
        yield storage, sent


def _sent_few(storage: Any, sent: list[int]) -> bool:
    """On SQLite a message is a statement or two, and costs no round trip."""
    one_message = storage._exchanger.log.connection.dialect.one_message
    messages_max, statements_max = (4, 8) if one_message else (8, 10)
    return len(sent) <= messages_max and sum(sent) <= statements_max


def _n_held(storage: Any) -> int:
    return len(storage._exchanger.replica._places)


def test_trials_are_counted_without_reading_them(open_storage: OpenStorage) -> None:
    with contextlib.closing(open_storage()) as writer:
        study_id = _filled(writer, [MINIMIZE], [1.0, 2.0, 3.0])
        empty_id = writer.create_new_study([MINIMIZE], "empty")
    with _cold(open_storage) as (storage, sent):
        assert storage.get_n_trials(study_id) == 5
        assert sent == [1]
        assert storage.get_n_trials(study_id, TrialState.COMPLETE) == 3
        assert storage.get_n_trials(study_id, (TrialState.RUNNING, TrialState.FAIL)) == 1
        assert storage.get_n_trials(study_id, TrialState.WAITING) == 1
        assert storage.get_n_trials(empty_id) == 0
        with pytest.raises(KeyError):
            storage.get_n_trials(empty_id + 1)
        assert sent == [1] * 6
        assert _n_held(storage) == 0


@pytest.mark.parametrize(
    ("directions", "values", "best"),
    [
        ([MINIMIZE], [3.0, 1.0, 2.0, 1.0], 1),
        ([MAXIMIZE], [3.0, 1.0, 3.0], 0),
        ([MAXIMIZE], [3.0, float("-inf"), float("inf"), float("inf")], 2),
        ([MINIMIZE], [3.0, float("inf"), float("-inf"), -1e300], 2),
        ([MINIMIZE], [float("inf"), float("inf")], 0),
    ],
)
def test_the_best_trial_is_read_alone(
    open_storage: OpenStorage,
    directions: list[StudyDirection],
    values: list[float],
    best: int,
) -> None:
    with contextlib.closing(open_storage()) as writer:
        study_id = _filled(writer, directions, values)
    with _cold(open_storage) as (storage, sent):
        trial = storage.get_best_trial(study_id)
        assert trial.number == best and trial.value == values[best]
        assert _sent_few(storage, sent)
        assert _n_held(storage) == 1
        storage.get_all_trials(study_id)
        assert storage.get_best_trial(study_id) == trial


def test_there_may_be_no_best_trial(open_storage: OpenStorage) -> None:
    with contextlib.closing(open_storage()) as writer:
        empty_id = _filled(writer, [MINIMIZE], [])
        several_id = _filled(writer, [MINIMIZE, MAXIMIZE], [1.0], "t")
    with _cold(open_storage) as (storage, _):
        with pytest.raises(ValueError, match="no COMPLETE trial"):
            storage.get_best_trial(empty_id)
        with pytest.raises(RuntimeError, match="2 objectives"):
            storage.get_best_trial(several_id)
        with pytest.raises(KeyError):
            storage.get_best_trial(several_id + 1)


def test_a_best_trial_that_cannot_be_read_is_passed_over(open_storage: OpenStorage) -> None:
    with contextlib.closing(open_storage()) as writer:
        study_id = _filled(writer, [MINIMIZE], [0.0, 1.0, 2.0])
        first, second, third = (trial._trial_id for trial in writer.get_all_trials(study_id)[:3])
        with writer._exchanger.log.engine.begin() as connection:
            # A value that is NULL, and one objective too many.
            connection.execute(
                sa.text(f"UPDATE trial_values SET value = NULL WHERE trial_id = {first}")
            )
            connection.execute(
                sa.text(
                    "INSERT INTO trial_values (trial_id, objective, value, value_type)"
                    f" VALUES ({second}, 1, 1.0, 'FINITE')"
                )
            )
    with _cold(open_storage) as (storage, _):
        assert storage.get_best_trial(study_id)._trial_id == third


def test_summaries_take_few_messages_for_any_number_of_studies(
    open_storage: OpenStorage,
) -> None:
    with contextlib.closing(open_storage()) as writer:
        for i in range(20):
            _filled(writer, [MAXIMIZE], [1.0, i], f"study {i}")
    with _cold(open_storage) as (storage, sent):
        summaries = storage.get_all_study_summaries()
        assert _sent_few(storage, sent)
        assert [one.best_trial.value for one in summaries] == [1.0, 1.0, *range(2, 20)]
        assert {one.n_trials for one in summaries} == {4}
        assert _n_held(storage) == 20
    with _cold(open_storage) as (storage, sent):
        summary = storage.get_study_summary("study 7")
        assert _sent_few(storage, sent)
        assert vars(summary) == vars(summaries[7])
        assert _n_held(storage) == 1
        with pytest.raises(KeyError, match="another"):
            storage.get_study_summary("another")


def test_the_latest_study_is_found_without_its_trials(open_storage: OpenStorage) -> None:
    with contextlib.closing(open_storage()) as writer:
        assert writer.get_latest_study_name() is None
        names = [f"study {i}" for i in range(3)]
        ids = [writer.create_new_study([MINIMIZE], name) for name in names]
        assert writer.get_latest_study_name() == names[0], "none has trials"
        for study_id, day in ((ids[1], 3), (ids[0], 2), (ids[2], 1)):
            for end in (day, 1):
                writer.create_new_trial(study_id, _ended(datetime.datetime(2026, 1, end)))
            writer.create_new_trial(study_id)
    with _cold(open_storage) as (storage, sent):
        assert storage.get_latest_study_name() == names[1]
        assert _sent_few(storage, sent) and _n_held(storage) == 0


def _ended(at: datetime.datetime) -> FrozenTrial:
    trial = create_trial(value=1.0)
    trial.datetime_start = trial.datetime_complete = at
    return trial


@pytest.mark.parametrize(
    "ask",
    [
        lambda storage, study_id: storage.get_n_trials(study_id),
        lambda storage, study_id: storage.get_best_trial(study_id).number,
    ],
)
def test_a_study_is_followed_once_it_is_read_or_asked_about_often(
    open_storage: OpenStorage, ask: Callable[[RDBStorage, int], Any]
) -> None:
    with contextlib.closing(open_storage()) as writer:
        study_id = _filled(writer, [MINIMIZE], [1.0])
        other_id = _filled(writer, [MINIMIZE], [1.0], "t")
        with _cold(open_storage) as (storage, _):
            assert isinstance(storage._exchanger.log, Catalogue)
            answers = {ask(storage, study_id) for _ in range(_ASKED_MAX)}
            assert _n_held(storage) <= 1
            answers.add(ask(storage, study_id))
            assert len(answers) == 1
            assert _n_held(storage) == 3
            storage.get_all_trials(other_id)
            before = ask(storage, other_id)
            assert storage._asked.get(other_id, 0) == 0
            better = create_trial(value=0.0)
            writer.create_new_trial(other_id, template_trial=better)
            assert ask(storage, other_id) == (4 if before == 3 else 3)


def test_a_read_of_the_trials_of_a_study_that_failed_follows_nothing(
    open_storage: OpenStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(open_storage()) as writer:
        study_id = _filled(writer, [MINIMIZE], [1.0])
    with _cold(open_storage) as (storage, _):

        def broken(records: Any, wanted: Wanted, **how: Any) -> Any:
            raise ConnectionError

        with monkeypatch.context() as patch:
            patch.setattr(storage._exchanger, "run", broken)
            with pytest.raises(ConnectionError):
                storage.get_all_trials(study_id)
        assert not storage._followed
        assert storage.get_n_trials(study_id) == 3
