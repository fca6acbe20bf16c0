"""Spellings of Optuna 3 that still work: a ``FutureWarning`` says what to write instead."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, TypeVar
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


_Class = TypeVar("_Class", bound=type[Any])


def _deprecated(new: str) -> Callable[[_Class], _Class]:
    """Warn when the class is constructed, which takes what ``new`` takes."""

    def decorate(old: _Class) -> _Class:
        init = old.__init__

        @functools.wraps(init)
        def warn_and_init(self: Any, *args: Any, **kwargs: Any) -> None:
            warnings.warn(
                f"trialstore.{old.__name__} is deprecated since Optuna 4.0 and will be removed "
                f"with it; use {new}.",
                FutureWarning,
                stacklevel=2,
            )
            init(self, *args, **kwargs)

        old.__init__ = warn_and_init
        return old

    return decorate


@_deprecated("trialstore.journal.JournalFileBackend")
class JournalFileStorage(JournalFileBackend):
    """The old name of ``trialstore.journal.JournalFileBackend``."""


@_deprecated("trialstore.journal.JournalRedisBackend")
class JournalRedisStorage(JournalRedisBackend):
    """The old name of ``trialstore.journal.JournalRedisBackend``."""


@_deprecated("trialstore.journal.JournalFileSymlinkLock")
class JournalFileSymlinkLock(_JournalFileSymlinkLock):
    """The old import path of ``trialstore.journal.JournalFileSymlinkLock``."""


@_deprecated("trialstore.journal.JournalFileOpenLock")
class JournalFileOpenLock(_JournalFileOpenLock):
    """The old import path of ``trialstore.journal.JournalFileOpenLock``."""
