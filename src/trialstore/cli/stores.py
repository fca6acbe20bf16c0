"""From the arguments of a command to an open store, and closed again."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib

from trialstore.log import Log
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
def existing_storage(url: str) -> Iterator[Storage]:
    """A storage on a store that is there."""
    must_exist(url)
    storage = get_storage(url)
    assert isinstance(storage, Storage)
    try:
        yield storage
    finally:
        storage.close()
