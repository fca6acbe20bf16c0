"""A watch is woken by its log: none of these would end if it had to wait for the next look."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from pathlib import Path
import threading
from typing import Any

import optuna
from optuna.storages import journal
import pytest

from redis_servers import OptionsServer, new_prefix, shared_cluster
from servers import RedisServer, shared_redis
import stores
import trialstore
from trialstore.journal import JournalRedisBackend
from trialstore.log import Audible
from trialstore.testing.faults import ManualClock

_POLL_S = 10_000.0


def _journal(folder: Path) -> tuple[Any, Any, Any]:
    path = str(folder / "j")
    plain = optuna.storages.JournalStorage(journal.JournalFileBackend(path))
    return trialstore.get_storage(path), trialstore.get_storage(path), plain


def _redis(folder: Path) -> tuple[Any, Any, Any]:
    url, prefix = shared_redis().url, new_prefix()
    plain = optuna.storages.JournalStorage(journal.JournalRedisBackend(url, prefix=prefix))
    ours = f"{url}?prefix={prefix}"
    return trialstore.get_storage(ours), trialstore.get_storage(ours), plain


def _memory(folder: Path) -> tuple[Any, Any, Any]:
    storage = trialstore.InMemoryStorage()
    return storage, storage, storage


@pytest.mark.parametrize(
    "open_three", [_memory, _journal, pytest.param(_redis, marks=pytest.mark.servers)]
)
def test_a_write_wakes_a_watch(open_three: Any, tmp_path: Path) -> None:
    reader, ours, plain = open_three(tmp_path)
    study = optuna.create_study(study_name="s", storage=ours)
    same = optuna.load_study(study_name="s", storage=plain)
    changes = reader.watch(reader.get_study_id_from_name("s"), poll_s=_POLL_S)
    for number, writer in enumerate((study, same, study, same)):
        with _soon(lambda writer=writer: writer.add_trial(optuna.create_trial(value=1.0))):
            assert next(changes).trial.number == number
    changes.close()


@contextlib.contextmanager
def _soon(do: Any) -> Iterator[None]:
    """Run it when the watch is likely to wait already."""
    timer = threading.Timer(0.1, do)
    timer.start()
    yield
    timer.join()


@pytest.mark.servers
def test_a_server_that_comes_back_is_heard_again() -> None:
    server = RedisServer()
    try:
        clock = ManualClock()
        log: Any = JournalRedisBackend(server.url, clock=clock)
        with log.listening() as wait:
            wait(7.0)
            server.restart()
            wait(7.0)  # finds the connections gone
            assert clock.now_s() == 7.0
            storage: Any = trialstore.get_storage(server.url)
            storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "s")
            wait(_POLL_S)
            with _soon(lambda: storage.set_study_user_attr(0, "a", 1)):
                wait(_POLL_S)
            assert clock.now_s() == 7.0
        storage.close()
    finally:
        server.remove()


@pytest.mark.servers
@pytest.mark.parametrize("kind", ["forbidden", "cluster"])
def test_who_cannot_be_told_looks_now_and_then(kind: str) -> None:
    clock = ManualClock()
    if kind == "cluster":
        url, server = shared_cluster().url, None
    else:
        rights = ("on", "nopass", "~*", "&*", "+@all", "-client")
        server = OptionsServer("--user", "deaf", *rights)
        url = server.url.replace("://", "://deaf:x@")
    log: Any = JournalRedisBackend(
        url, use_cluster=kind == "cluster", prefix=new_prefix(), clock=clock
    )
    try:
        with log.listening() as wait:
            wait(7.0)
            wait(7.0)
        assert clock.now_s() == 14.0
    finally:
        if server is not None:
            server.remove()


def test_tables_cannot_tell(tmp_path: Path) -> None:
    storage: Any = trialstore.get_storage(stores.new_url("sqlite", tmp_path))
    assert not isinstance(storage.log, Audible)
