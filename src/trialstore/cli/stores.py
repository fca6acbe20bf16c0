"""From the arguments of a command to an open store, and closed again."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib

from trialstore.log import Log
from trialstore.storage import Storage
from trialstore.urls import get_storage, must_exist, open_log


@contextlib.contextmanager
def existing_log(url: str) -> Iterator[Log]:
    """The log of a store that is there, whatever its condition."""
    log = open_log(url)
    try:
        yield log
    finally:
        log.close()


@contextlib.contextmanager
def existing_storage(url: str) -> Iterator[Storage]:
    """A storage on a store that is there."""
    must_exist(url)
    with any_storage(url) as storage:
        yield storage


@contextlib.contextmanager
def any_storage(url: str) -> Iterator[Storage]:
    """A storage, made if it was not there."""
    storage = get_storage(url)
    assert isinstance(storage, Storage)
    try:
        yield storage
    finally:
        storage.close()
