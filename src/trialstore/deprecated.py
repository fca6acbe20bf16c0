"""Spellings of Optuna 3 that still work: a ``FutureWarning`` says what to write instead."""

from __future__ import annotations

from typing import Any
import warnings

from optuna.storages import BaseJournalLogStorage

from trialstore.journal import (
    JournalFileBackend,
    JournalFileOpenLock as _JournalFileOpenLock,
    JournalFileSymlinkLock as _JournalFileSymlinkLock,
    JournalRedisBackend,
)

__all__ = [
    "BaseJournalLogStorage",
    "JournalFileOpenLock",
    "JournalFileStorage",
    "JournalFileSymlinkLock",
    "JournalRedisStorage",
]


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is deprecated since Optuna 4.0 and will be removed with it; use {new}.",
        FutureWarning,
        stacklevel=3,
    )


class JournalFileStorage(JournalFileBackend):
    """The old name of ``trialstore.journal.JournalFileBackend``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _warn("JournalFileStorage", "trialstore.journal.JournalFileBackend")
        super().__init__(*args, **kwargs)


class JournalRedisStorage(JournalRedisBackend):
    """The old name of ``trialstore.journal.JournalRedisBackend``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _warn("JournalRedisStorage", "trialstore.journal.JournalRedisBackend")
        super().__init__(*args, **kwargs)


class JournalFileSymlinkLock(_JournalFileSymlinkLock):
    """The old import path of ``trialstore.journal.JournalFileSymlinkLock``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _warn("trialstore.JournalFileSymlinkLock", "trialstore.journal.JournalFileSymlinkLock")
        super().__init__(*args, **kwargs)


class JournalFileOpenLock(_JournalFileOpenLock):
    """The old import path of ``trialstore.journal.JournalFileOpenLock``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _warn("trialstore.JournalFileOpenLock", "trialstore.journal.JournalFileOpenLock")
        super().__init__(*args, **kwargs)
