"""Time as the storage uses it, in one place that a test can replace.

Durations only: nothing here is compared between machines or written to a log.
"""

from __future__ import annotations

import threading
import time


class Clock:
    """The machine's monotonic clock. ``trialstore.testing`` has one that a test moves by hand."""

    def now_s(self) -> float:
        """Seconds since some fixed moment of this process."""
        return time.monotonic()

    def sleep(self, duration_s: float) -> None:
        """Block the calling thread."""
        time.sleep(duration_s)

    def wait(self, condition: threading.Condition, timeout_s: float) -> None:
        """Wait on a held condition until it is notified or the time has passed."""
        condition.wait(timeout_s)


CLOCK = Clock()
