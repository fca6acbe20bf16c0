"""Let time pass by a log's own clock: whatever has been beaten so far is further back."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
import signal
from typing import Any

import pytest
import sqlalchemy as sa

from grpc_servers import open_served, url_behind
from trialstore.log import LeaseStore
from trialstore.logs.grpc.client import GrpcLog
from trialstore.logs.redis import RedisLog
from trialstore.logs.relational.write_queue import WriteQueue
from trialstore.storage import Storage

_EARLIER = {
    "sqlite": "datetime(heartbeat, '-' || :s || ' seconds')",
    "postgresql": "heartbeat - make_interval(secs => :s)",
    "mysql": "heartbeat - INTERVAL :s SECOND",
}


def age_leases(storage: Storage, duration_s: float) -> None:
    """For any storage of ``backends.py``; skips where its log keeps no leases."""
    log: Any = storage._exchanger.log
    age_leases_of(getattr(log, "inner", log), duration_s)


def age_leases_of(log: Any, duration_s: float) -> None:
    """Likewise, for a log."""
    if not isinstance(log, LeaseStore):
        pytest.skip(f"{log!r} keeps no leases.")
    beats = getattr(log, "_beats", None)
    if beats is not None:
        age_beats(Path(beats._folder), duration_s)
    elif hasattr(log, "engine"):
        age_heartbeats(log.engine, duration_s)
    elif isinstance(log, RedisLog):
        age_hash(log, duration_s)
    elif isinstance(log, GrpcLog):
        url = url_behind(int(log._target.rpartition(":")[2]))
        with contextlib.closing(open_served(url)) as served:
            age_leases(served, duration_s)
    else:
        raise NotImplementedError(f"How does time pass in {log!r}?")


def signal_and_wait(child: int, how: signal.Signals) -> None:
    """Kill or stop a child, and wait until it is: what it may be beating now is aged, then."""
    os.kill(child, how)
    came = os.WSTOPPED if how == signal.SIGSTOP else os.WEXITED
    os.waitid(os.P_PID, child, came | os.WNOWAIT)


def stop_and_wait(child: int, storage: Storage) -> None:
    """Stop a child that is not writing: it would keep SQLite's lock from everybody, for good."""
    log: Any = storage._exchanger.log
    engine = getattr(getattr(log, "inner", log), "engine", None)
    with contextlib.ExitStack() as turn:
        if engine is not None and engine.dialect.name == "sqlite":
            queue = WriteQueue(Path(engine.url.database))
            queue.enter()
            turn.callback(queue.close)
            assert queue.is_first
        signal_and_wait(child, signal.SIGSTOP)


def age_beats(folder: Path, duration_s: float) -> None:
    """Beats beside a journal file."""
    for path in folder.glob("*.beat"):
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - int(duration_s * 1e9)))


def age_heartbeats(engine: sa.Engine, duration_s: float) -> None:
    """Rows of Optuna's table."""
    statement = f"UPDATE trial_heartbeats SET heartbeat = {_EARLIER[engine.dialect.name]}"
    with engine.begin() as connection:
        connection.execute(sa.text(statement), {"s": int(duration_s)})


def age_hash(log: RedisLog, duration_s: float) -> None:
    """The fields of our hash in Redis."""
    key, ms = log._keys.leases, int(duration_s * 1000)
    ask = log._connection.ask
    for owner in ask(lambda door: door.command("HKEYS", key)):
        change = ("HINCRBY", key, owner, -ms)
        ask(lambda door, change=change: door.command(*change))  # type: ignore[misc]
