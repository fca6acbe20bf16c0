"""Hearing from the server that somebody has written to the journal, whoever it was.

The server is asked for the journal's counter by a connection that it tracks, and then tells
another one, which only listens, as soon as the counter is written. Nothing depends on it: what
can't be heard is found by the next look.

Source: Redis, "Client-side caching", "Two connections mode".
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

from trialstore.logs.redis.connection import Connection
from trialstore.logs.redis.doors import Server
from trialstore.logs.redis.driver import driver, kind_of

_CHANNEL: Final = "__redis__:invalidate"


class Ear:
    """Two connections of its own, opened when it is first listened with.

    Args:
        connection: Of the log; only its address is used.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._doors: tuple[Server, Server] | None = None
        self._is_deaf = False
        self._counter: Any = None

    def wait(self, timeout_s: float) -> None:
        """Until something is written, or was since the last call; at most for so long."""
        try:
            if not self._is_deaf:
                self._listen(timeout_s)
                return
        except Exception as error:
            kind = kind_of(error)
            if kind is None:
                raise
            # A server older than 6, or a user who may not; else it is away for a while.
            self._is_deaf = kind.what == "refused"
            self.close()
        self._connection.clock.sleep(timeout_s)

    def _listen(self, timeout_s: float) -> None:
        if self._doors is None:
            self._doors = self._open()
        asking, hearing = self._doors
        counter = asking.command("GET", self._connection.keys.number)
        if counter != self._counter:
            self._counter = counter
        elif hearing.can_read(timeout_s):
            hearing.read()

    def _open(self) -> tuple[Server, Server]:
        with contextlib.ExitStack() as doors:
            asking, hearing = (
                doors.enter_context(contextlib.closing(self._connection.open_door()))
                for _ in range(2)
            )
            if not isinstance(asking, Server) or not isinstance(hearing, Server):
                raise driver().ResponseError("A cluster's client hides its connections.")
            number = hearing.command("CLIENT", "ID")
            hearing.command("SUBSCRIBE", _CHANNEL)
            asking.command("CLIENT", "TRACKING", "ON", "REDIRECT", number)
            doors.pop_all()
            return asking, hearing

    def close(self) -> None:
        """Close both connections."""
        doors, self._doors = self._doors, None
        for door in doors or ():
            door.close()
