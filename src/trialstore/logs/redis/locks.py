"""Locks in Redis, for what one at a time should do. They end by themselves if the holder dies."""

from __future__ import annotations

import logging
from typing import Final
import uuid

from trialstore.errors import LogCorruptError, LogUnavailableError
from trialstore.logs.redis.connection import Connection
from trialstore.logs.redis.doors import Door
from trialstore.logs.redis.driver import as_bytes

_logger = logging.getLogger(__package__)

# Deletes the lock only if it is still the one that was taken.
RELEASE_SCRIPT: Final = (
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
)


class Lock:
    """A lock that was not taken yet.

    Args:
        connection: Its ``mutex`` is held by who calls a method.
        key: Whose existence says that somebody has it.
        lasts_s: How long a dead holder keeps others out.

    Attributes:
        token: What the key holds while this one has the lock.
    """

    def __init__(self, connection: Connection, key: str, lasts_s: int) -> None:
        self.token = uuid.uuid4().hex.encode()
        self._connection = connection
        self._key = key
        self._lasts_s = lasts_s

    def take(self) -> bool:
        """Whether nobody else had it."""

        def take(door: Door) -> bool:
            if door.command("SET", self._key, self.token, "NX", "EX", self._lasts_s):
                return True
            # Ours all the same, if the answer to the first attempt was lost.
            return as_bytes(door.command("GET", self._key)) == self.token

        return self._connection.ask(take)

    def is_held(self) -> bool:
        """Whether it is still the one that was taken."""
        stored = self._connection.ask(lambda door: door.command("GET", self._key))
        return as_bytes(stored) == self.token

    def release(self) -> None:
        try:
            release = ("EVAL", RELEASE_SCRIPT, 1, self._key, self.token)
            self._connection.ask(lambda door: door.command(*release))
        except (LogUnavailableError, LogCorruptError) as error:
            _logger.debug("The lock is left to its expiry: %s", error)
