"""Storages for Optuna: one in-memory replica, fed by interchangeable logs.

The nouns: a **Storage** answers Optuna; it feeds a **Replica**, the contents in memory, from a
**Log**, which keeps **Records** in order and knows positions in them, **Cursors**. Where a log
can, it also keeps a **Snapshot** and **Leases**.

The public names are those of ``optuna.storages``; each is imported when it is first used, so
that a driver is needed only by who uses it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from optuna.storages import BaseStorage

if TYPE_CHECKING:
    from trialstore import journal as journal
    from trialstore.budget import MaxTrials
    from trialstore.callbacks import (
        RetryFailedTrialCallback,
        RetryHeartbeatStaleTrialCallback,
        fail_stale_trials,
    )
    from trialstore.deprecated import (
        BaseJournalLogStorage,
        JournalFileOpenLock,
        JournalFileStorage,
        JournalFileSymlinkLock,
        JournalRedisStorage,
    )
    from trialstore.enqueue import enqueue_trial
    from trialstore.grpc import GrpcStorageProxy, run_grpc_proxy_server
    from trialstore.in_memory import InMemoryStorage
    from trialstore.journal import JournalStorage
    from trialstore.rdb import RDBStorage
    from trialstore.stores.arrow import to_arrow
    from trialstore.urls import get_storage

__version__ = "0.1.0"

_MODULES = ("grpc", "journal", "optuna_db", "testing")

_HOMES = {
    "BaseJournalLogStorage": "deprecated",
    "GrpcStorageProxy": "grpc",
    "InMemoryStorage": "in_memory",
    "JournalFileOpenLock": "deprecated",
    "JournalFileStorage": "deprecated",
    "JournalFileSymlinkLock": "deprecated",
    "JournalRedisStorage": "deprecated",
    "JournalStorage": "journal",
    "MaxTrials": "budget",
    "RDBStorage": "rdb",
    "RetryFailedTrialCallback": "callbacks",
    "RetryHeartbeatStaleTrialCallback": "callbacks",
    "enqueue_trial": "enqueue",
    "fail_stale_trials": "callbacks",
    "get_storage": "urls",
    "run_grpc_proxy_server": "grpc",
    "to_arrow": "stores.arrow",
}

__all__ = [
    "BaseJournalLogStorage",
    "BaseStorage",
    "GrpcStorageProxy",
    "InMemoryStorage",
    "JournalFileOpenLock",
    "JournalFileStorage",
    "JournalFileSymlinkLock",
    "JournalRedisStorage",
    "JournalStorage",
    "MaxTrials",
    "RDBStorage",
    "RetryFailedTrialCallback",
    "RetryHeartbeatStaleTrialCallback",
    "enqueue_trial",
    "fail_stale_trials",
    "get_storage",
    "journal",
    "run_grpc_proxy_server",
    "to_arrow",
]
# ``import *`` and ``help`` ask for each of these names, and some are there with an extra only.
for _name, _driver in (
    ("GrpcStorageProxy", "grpc"),
    ("run_grpc_proxy_server", "grpc"),
    ("to_arrow", "pyarrow"),
):
    if find_spec(_driver) is None:
        __all__.remove(_name)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"trialstore.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'trialstore' has no attribute {name!r}")
    return getattr(import_module(f"trialstore.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
