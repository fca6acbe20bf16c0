"""From the arguments of a command to an open store, and closed again."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib

from trialstore.log import Log, Versioned
from trialstore.storage import Storage
from trialstore.urls import get_storage, must_exist, open_log


@contextlib.contextmanager
def existing_log(url: str, *, any_version: bool = False) -> Iterator[Log]:
    """The log of a store that is there; it may be damaged."""
    log = open_log(url, any_version=any_version)
    try:
        yield log
    finally:
        log.close()


@contextlib.contextmanager
def any_log(url: str) -> Iterator[Log]:
    """A log, made if it was not there."""
    log = open_log(url, create=True)
    try:
        yield log
    finally:
        log.close()


@contextlib.contextmanager
def existing_storage(url: str, *, create: bool = False) -> Iterator[Storage]:
    """A storage on a store that is there, or is made where that is wanted."""
    if not create:
        _must_have_tables(url)
    storage = get_storage(url)
    try:
        yield storage
    finally:
        storage.close()


def _must_have_tables(url: str) -> None:
    """A storage would make them, also in a database that somebody else uses for something else."""
    must_exist(url)
    with existing_log(url, any_version=True) as log:
        if isinstance(log, Versioned):
            log.get_current_version()
