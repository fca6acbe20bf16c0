"""Changes of a study's trials, one after the other, for a program that reacts to them.

A cursor says which trials have been told of and what the unfinished ones looked like, so it is
good on every log, in another process, and after a journal was compacted. Each look is one
exchange, of what is new; in between a log that is ``Audible`` says when there is something to see.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
import itertools
from typing import Any, Final, NamedTuple
import zlib

import msgspec
from optuna.trial import FrozenTrial

from trialstore.contents import slot_id
from trialstore.replica import Replica

POLL_S: Final = 0.5


class Change(NamedTuple):
    """A trial that is new, or another than before, as it is now.

    Args:
        trial: Of what happened to it between two looks only the result is told.
        cursor: Pass it as ``since`` to go on behind this change.
    """

    trial: FrozenTrial
    cursor: str


class _Position(msgspec.Struct):
    """What has been told.

    Args:
        study_id: Of which study.
        number: The greatest trial number.
        unfinished: Id of each trial that may still change, and a checksum of what it looked like.
    """

    study_id: int
    number: int
    unfinished: dict[int, int]


Read = Callable[[Callable[[Replica], Any]], Any]
"""Lets the replica answer after an exchange that wanted the study's trials."""


Listen = Callable[[], AbstractContextManager[Callable[[float], None]]]
"""As ``Audible.listening``; where a log is not, what is entered just sleeps."""


def watch(
    read: Read, listen: Listen, study_id: int, since: str | None, poll_s: float
) -> Iterator[Change]:
    """Every change behind a cursor, and then every change to come; see ``Storage.watch``."""
    position = _Position(study_id, -1, {}) if since is None else _position_of(since, study_id)

    def news(replica: Replica) -> list[FrozenTrial]:
        replica.study_name(study_id)  # or KeyError
        newer = itertools.takewhile(
            lambda slot: slot.number > position.number, replica.newest_first(study_id)
        )
        ids = sorted({*position.unfinished, *map(slot_id, newer)})
        return [replica.trial(trial_id) for trial_id in ids]

    with listen() as wait:
        while True:
            told = False
            for trial in read(news):
                look = _checksum(trial)
                if position.unfinished.get(trial._trial_id) == look:
                    continue
                if trial.state.is_finished():
                    position.unfinished.pop(trial._trial_id, None)
                else:
                    position.unfinished[trial._trial_id] = look
                position.number = max(position.number, trial.number)
                told = True
                yield Change(trial, _cursor_of(position))
            if not told:
                wait(poll_s)


def _checksum(trial: FrozenTrial) -> int:
    parts = (
        trial.state,
        trial.values,
        trial.params,
        trial.user_attrs,
        trial.system_attrs,
        trial.intermediate_values,
        trial.datetime_start,
    )
    return zlib.crc32(repr(parts).encode("utf-8", "surrogatepass"))


def _cursor_of(position: _Position) -> str:
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(position)).decode()


def _position_of(cursor: str, study_id: int) -> _Position:
    """Raises ValueError for what is no cursor, or one of another study."""
    try:
        packed = base64.urlsafe_b64decode(cursor)
        position = msgspec.msgpack.decode(packed, type=_Position)
    except (ValueError, msgspec.DecodeError):
        raise ValueError(f"{cursor[:40]!r} is no cursor of a watch.") from None
    if position.study_id != study_id:
        raise ValueError(f"The cursor is of the study with id {position.study_id}.")
    return position
