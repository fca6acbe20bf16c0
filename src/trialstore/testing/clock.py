"""A clock that stands still until a test moves it."""

from __future__ import annotations

import threading
from typing import Any

from trialstore.clock import Clock

_DEADLINE_S = 60.0


class ManualClock(Clock):
    """Time that passes only by :meth:`advance`.

    Give each storage a clock of its own where one storage's ``sleep`` must not end another one's
    linger.

    Args:
        now_s: What the clock says at first, in seconds.
        sleep_advances: ``sleep`` moves the time itself and returns at once; otherwise it blocks
            until somebody has advanced far enough.
    """

    def __init__(self, now_s: float = 0.0, *, sleep_advances: bool = True) -> None:
        self._now_s = now_s
        self._sleep_advances = sleep_advances
        self.slept_s = 0.0
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, threading.Condition]] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process begins where this one stands and is moved there."""
        return {"now_s": self._now_s, "sleep_advances": self._sleep_advances}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def now_s(self) -> float:
        return self._now_s

    def advance(self, duration_s: float) -> None:
        """Move the time and wake whoever has waited long enough."""
        with self._changed:
            self._now_s += duration_s
            due = [condition for due_s, condition in self._waiting if due_s <= self._now_s]
            self._changed.notify_all()
        for condition in due:
            with condition:
                condition.notify_all()

    def sleep(self, duration_s: float) -> None:
        self.slept_s += duration_s
        if self._sleep_advances:
            self.advance(duration_s)
            return
        with self._changed:
            due_s = self._now_s + duration_s
            self._changed.wait_for(lambda: self._now_s >= due_s)

    def wait(self, condition: threading.Condition, timeout_s: float) -> None:
        """Return when notified or advanced past the timeout; the caller holds ``condition``."""
        with self._changed:
            entry = (self._now_s + timeout_s, condition)
            self._waiting.append(entry)
            self._changed.notify_all()
        try:
            # Whoever advances has to take the condition to notify it, hence no wake-up is lost
            # between the line above and this one.
            if timeout_s > 0:
                condition.wait()
        finally:
            with self._changed:
                self._waiting.remove(entry)

    def until_waiting(self, n_threads: int = 1, deadline_s: float = _DEADLINE_S) -> None:
        """Block until so many threads are in ``wait``, in real time.

        Raises:
            TimeoutError: They were not within ``deadline_s``.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._waiting) >= n_threads, deadline_s):
                raise TimeoutError(f"{len(self._waiting)} of {n_threads} threads wait.")
