"""Of a call that is not served: pauses that grow until a deadline, and a word about it.

Pauses have jitter, or those who collided, or whose server came back, would all come at once.
"""

from __future__ import annotations

import logging
import random
from typing import Final

from trialstore.clock import Clock

_logger = logging.getLogger("trialstore")

_LONG_S: Final = 5.0
"""Who waits longer is told what for; once a call."""


class Patience:
    """Of one call.

    Args:
        server: With whose name the warning begins.
        clock: Time.
        first_s: About so long is the first pause, and each further one twice as long.
        longest_s: But no longer than about this.
    """

    __slots__ = ("_began_s", "_clock", "_is_told", "_longest_s", "_pause_s", "_server")

    def __init__(self, server: object, clock: Clock, *, first_s: float, longest_s: float) -> None:
        self._server = server
        self._clock = clock
        self._pause_s = first_s
        self._longest_s = longest_s
        self._began_s: float | None = None
        self._is_told = False

    def pause(self, until_s: float, why: object) -> bool:
        """Sleep before another attempt.

        Args:
            until_s: When to give up, by the clock.
            why: What the last attempt failed with.

        Returns:
            Whether to make one; False, and at once, if it would come after ``until_s``.
        """
        now_s = self._clock.now_s()
        pause_s = self._pause_s * random.uniform(0.5, 1.5)
        if now_s + pause_s > until_s:
            return False
        if self._began_s is None:
            self._began_s = now_s
        if not self._is_told and now_s - self._began_s >= _LONG_S:
            self._is_told = True
            _logger.warning(
                "%s can't be used now (%s); trying again for %.0f s.",
                self._server,
                why,
                until_s - now_s,
            )
        self._clock.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, self._longest_s)
        return True
