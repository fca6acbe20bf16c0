"""The names of ``optuna.storages``: all there, called in the same way, deprecated as there."""

from __future__ import annotations

import contextlib
import functools
import inspect
from pathlib import Path
import pickle
import subprocess
import sys
from typing import Any
import warnings

import optuna
from optuna.storages import BaseStorage
from optuna.storages.journal import _base, _file
from optuna.study import StudyDirection
import pytest

import trialstore
from trialstore import journal, snapshot
from trialstore.errors import LogReplacedError, SnapshotRefusedError
from trialstore.testing.contents import storage_contents
from trialstore.urls import open_log

_NAMES = [name for name in optuna.storages.__all__ if not name.startswith("_")]
_JOURNAL_NAMES = optuna.storages.journal.__all__
_DEPRECATED = ("JournalFileStorage", "JournalFileSymlinkLock", "JournalFileOpenLock")


def _parameters(function: Any, kind: Any) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is kind
    }


def _assert_called_alike(optunas: Any, ours: Any) -> None:
    """Whatever call Optuna's takes, ours takes, with the same meaning; options are ours alone."""
    for kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
        theirs, own = _parameters(optunas, kind), _parameters(ours, kind)
        if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            assert list(own) == list(theirs)
        for name, parameter in theirs.items():
            if parameter.default is not inspect.Parameter.empty:
                assert own[name].default == parameter.default, name
        for name in own.keys() - theirs.keys():
            assert own[name].default is not inspect.Parameter.empty, name


def _methods(kind: Any) -> set[str]:
    return {
        name
        for name, member in inspect.getmembers(kind)
        if callable(member) and not name.startswith("_")
    }


@pytest.mark.parametrize("name", _NAMES)
def test_every_name_of_optuna_storages_is_there_and_called_alike(name: str) -> None:
    optunas, ours = getattr(optuna.storages, name), getattr(trialstore, name)
    assert name in trialstore.__all__
    _assert_called_alike(optunas, ours)
    if inspect.isclass(optunas) and issubclass(optunas, BaseStorage):
        assert _methods(optunas) <= _methods(ours)
        for method in _methods(optunas):
            _assert_called_alike(getattr(optunas, method), getattr(ours, method))


@pytest.mark.parametrize("name", _JOURNAL_NAMES)
def test_every_name_of_optuna_storages_journal_is_there_and_called_alike(name: str) -> None:
    assert name in journal.__all__
    _assert_called_alike(getattr(optuna.storages.journal, name), getattr(journal, name))


def test_the_abstract_classes_of_journals_are_optunas_own() -> None:
    assert journal.BaseJournalBackend is optuna.storages.journal.BaseJournalBackend
    assert journal.BaseJournalSnapshot is _base.BaseJournalSnapshot
    assert journal.BaseJournalFileLock is _file.BaseJournalFileLock
    assert trialstore.BaseJournalLogStorage is optuna.storages.BaseJournalLogStorage
    for ours in (journal.JournalFileBackend, journal.JournalRedisBackend):
        assert issubclass(ours, journal.BaseJournalBackend)
    for lock in (journal.JournalFileSymlinkLock, journal.JournalFileOpenLock):
        assert issubclass(lock, journal.BaseJournalFileLock)


@pytest.mark.parametrize("name", _DEPRECATED)
def test_an_old_spelling_works_and_warns_when_it_is_constructed(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / "journal.log")
    with pytest.warns(FutureWarning) as optunas:
        getattr(optuna.storages, name)(path)
    with pytest.warns(FutureWarning, match=name) as ours:
        made = getattr(trialstore, name)(path)
    assert len(ours) == len(optunas)
    assert ours[0].filename == __file__
    assert name not in journal.__all__ or type(made) is not getattr(journal, name)


def test_a_journal_made_by_its_old_spellings_is_a_journal(tmp_path: Path) -> None:
    path = str(tmp_path / "journal.log")
    with pytest.warns(FutureWarning):
        lock = trialstore.JournalFileOpenLock(path)
        backend = trialstore.JournalFileStorage(path, lock)
    with contextlib.closing(trialstore.JournalStorage(backend)) as storage:
        study = optuna.create_study(storage=storage)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
        plain = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))
        assert storage_contents(plain) == storage_contents(storage)


def test_nothing_but_an_old_spelling_warns(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = str(tmp_path / "journal.log")
        lock = journal.JournalFileSymlinkLock(path)
        trialstore.JournalStorage(journal.JournalFileBackend(path, lock)).close()
        trialstore.RDBStorage(f"sqlite:///{tmp_path}/tables.db").close()
        trialstore.InMemoryStorage().close()


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("journal:///{}/a.log", trialstore.JournalStorage),
        ("{}/b.log", trialstore.JournalStorage),
        ("sqlite:///{}/c.db", trialstore.RDBStorage),
        ("memory://", trialstore.InMemoryStorage),
    ],
)
def test_a_url_names_a_storage(form: str, kind: type[Any], tmp_path: Path) -> None:
    with contextlib.closing(trialstore.get_storage(form.format(tmp_path))) as storage:  # type: ignore[type-var]
        assert type(storage) is kind
        study = optuna.create_study(storage=storage)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
        assert len(study.trials) == 1


def test_a_storage_names_itself_and_nothing_a_new_one_in_memory() -> None:
    for storage in (optuna.storages.InMemoryStorage(), trialstore.InMemoryStorage()):
        assert trialstore.get_storage(storage) is storage
        with pytest.raises(ValueError, match="Options go with a URL"):
            trialstore.get_storage(storage, linger_s=0)
    assert type(trialstore.get_storage(None)) is trialstore.InMemoryStorage
    with pytest.raises(ValueError, match="sqlite:///"):
        trialstore.get_storage("oracle://host/db")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "names no file"),
        ("journal://", "names no file"),
        ("sqlite:a.db", "'sqlite:' is no path"),
        ("mysql+pymysql:/h/x", "'mysql\\+pymysql:' is no path"),
        ("there.db", "its URL is sqlite:///there.db"),
        ("journal://there.db", "its URL is sqlite:///there.db"),
        ("sqlite://a.db", "sqlite:///relative/path"),
        ("postgresql+psycopg://u:pass@h:s3cret/x", "percent-encoded"),
        ("postgresql+psycopg://u:pass@s3cret@h/x", "percent-encoded"),
        ("grpc://h:port", "is grpc://host:port"),
        ("grpc://s3cret@h", "TRIALSTORE_GRPC_TOKEN"),
        ("grpc://h/study", "nothing else"),
    ],
)
def test_a_url_that_names_no_storage_is_refused_with_the_reason(
    url: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trialstore.RDBStorage("sqlite:///there.db").close()
    there = set(tmp_path.iterdir())
    for open_it in (trialstore.get_storage, functools.partial(open_log, create=True), open_log):
        with pytest.raises(ValueError, match=said) as refused:
            open_it(url)
        assert "s3cret" not in str(refused.value)
    assert set(tmp_path.iterdir()) == there


def test_without_an_extra_the_other_names_can_be_imported_and_read_about() -> None:
    script = (
        "import sys; sys.modules.update(grpc=None, pyarrow=None)\n"
        "from trialstore import *\n"
        "import pydoc, trialstore\n"
        "assert 'JournalStorage' in pydoc.render_doc(trialstore)\n"
        "trialstore.GrpcStorageProxy\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stderr.endswith("pip install 'trialstore[grpc]'.\n"), ran.stderr
    assert "line 5" in ran.stderr


# --- restore_replay_result -----------------------------------------------------------------------


def _filled(path: Path, n_trials: int) -> trialstore.JournalStorage:
    storage = trialstore.JournalStorage(journal.JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=n_trials)
    storage.set_study_user_attr(study._study_id, "k", [1.5, None])
    return storage


def _snapshot_of(storage: trialstore.JournalStorage) -> bytes:
    exchanger = storage._exchanger
    return snapshot.dump(exchanger.replica, exchanger._cursor, 0)


def test_a_storage_begins_from_a_snapshot_and_reads_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    with contextlib.closing(_filled(path, 3)) as storage:
        early = _snapshot_of(storage)
        storage.create_new_study([StudyDirection.MAXIMIZE], "later")
        expected = storage_contents(storage)
    with contextlib.closing(
        trialstore.JournalStorage(journal.JournalFileBackend(str(path)))
    ) as restored:
        restored.restore_replay_result(early)
        assert storage_contents(restored) == expected
        study = optuna.load_study(study_name="s", storage=restored)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
        assert [trial.number for trial in study.trials] == [0, 1, 2, 3]


def test_a_snapshot_that_is_a_pickle_or_of_another_journal_is_refused(tmp_path: Path) -> None:
    with (
        contextlib.closing(_filled(tmp_path / "one.log", 2)) as one,
        contextlib.closing(_filled(tmp_path / "two.log", 3)) as two,
    ):
        expected = storage_contents(one)
        with pytest.raises(SnapshotRefusedError):
            one.restore_replay_result(pickle.dumps({"anything": 1}))
        assert storage_contents(one) == expected
        one.restore_replay_result(_snapshot_of(two))
        with pytest.raises(LogReplacedError):
            one.get_all_studies()
