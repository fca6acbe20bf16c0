"""Says for all running trials of a storage, once an interval, that their worker lives.

One message covers every trial that the storage created or claimed, whoever runs it: a thread of
``study.optimize`` or a caller of ``ask`` and ``tell``. The thread that beats exists only while
there is something to beat for, and does not keep the storage: as that is dropped, the thread ends,
or goes on for a trial that is left RUNNING. That a trial was told through another storage it
learns with what the storage reads, or asks after some beats. Who dies is found out in
``stale.py``, by the log's clock.

What a crash leaves behind: a lease that nobody renews, which is the point; without a trial that it
covers it means nothing. ``close`` withdraws it, and so does the end of a process that leaves no
trial RUNNING; one that it leaves is lost, and found by the lease that is left with it.
"""

from __future__ import annotations

from collections.abc import Callable
import logging
import math
import threading
from typing import Final, TypeVar
import weakref

from trialstore.clock import Clock
from trialstore.exchange import Exchanger
from trialstore.log import LeaseStore, Wanted
from trialstore.processes import at_exit, living

_logger = logging.getLogger("trialstore")
_T = TypeVar("_T")

_RETRY_PAUSE_S: Final = 1.0
_BEATS_A_LOOK: Final = 10


class Heartbeat:
    """The beats of one storage.

    Args:
        exchanger: Whose log keeps the lease, and in whose name it is taken.
        interval_s: Seconds between beats; None is no heartbeat.
        running: Ids of the trials to beat for; called with the exchanger's mutex held. It must not
            refer to the storage.
        clock: Time, for tests to replace.
    """

    def __init__(
        self,
        exchanger: Exchanger,
        interval_s: float | None,
        running: Callable[[], list[int]],
        clock: Clock,
    ) -> None:
        self._exchanger = exchanger
        self._interval_s = interval_s
        self._running = running
        self._clock = clock
        self._begin()
        _alive.add(self)

    def _begin(self) -> None:
        """State that belongs to this process alone, and to its ``worker_id``."""
        self._worker_id = self._exchanger.worker_id
        self._changed = threading.Condition(self._exchanger.mutex)
        self._is_taken = False
        self._starting: set[object] = set()  # a token for each that is being created or claimed
        self._thread: threading.Thread | None = None
        self._due_s = 0.0
        self._n_beats = 0

    def _is_of_this_process(self) -> bool:
        return self._worker_id == self._exchanger.worker_id

    @property
    def is_beating(self) -> bool:
        """Whether the trials of this storage are covered, now and from now on."""
        return self._is_taken and self._is_of_this_process()

    def covering(self, start: Callable[[], _T]) -> _T:
        """Create or claim a trial, so that its first beat comes with it.

        Raises:
            LogUnavailableError: No lease can be taken; nothing was created.
            RuntimeError: The system starts no more threads; likewise.
        """
        if self._interval_s is None:
            return start()
        token = object()
        try:
            with self._exchanger.mutex:
                if not self._is_of_this_process():
                    self._begin()  # forked: the lease, the thread and the mutex are the parent's
                self._starting.add(token)  # keeps the thread from withdrawing
                is_taken = self._is_taken
            if not is_taken:
                self._exchanger.use_log(self._take)
            return start()
        finally:
            self._starting.discard(token)

    def _take(self, log: LeaseStore) -> None:
        log.take_lease(self._worker_id)
        try:
            with self._exchanger.mutex:
                self._due_s = self._clock.now_s() + (self._interval_s or 0.0)
                if self._thread is None:
                    at_exit(_end_all, priority=90)
                    thread = threading.Thread(
                        target=self._beat, name="trialstore-heartbeat", daemon=True
                    )
                    thread.start()
                    self._thread = thread
                self._is_taken = True
        except BaseException:
            # A lease that nobody renews would have the next trial failed while it runs.
            if not self._is_taken:
                log.withdraw_lease(self._worker_id, ())
            raise

    def set_interval(self, interval_s: float | None) -> None:
        """The next beat comes by the new interval, if that is sooner."""
        with self._exchanger.mutex:
            self._interval_s = interval_s
            if self.is_beating:
                due_s = self._clock.now_s() + (self._interval_s or 0.0)
                self._due_s = min(self._due_s, due_s)
                self._changed.notify_all()

    def speak_for(self, trial_id: int, owner: str) -> None:
        """One beat for somebody else's trial; ``owner`` is "" where it is unknown."""

        def speak(log: LeaseStore) -> None:
            me = self._exchanger.worker_id
            log.renew_lease(owner or me, (trial_id,))
            if not owner and not self.is_beating:
                # Where leases are by owner that was one of this storage, which covers nothing.
                log.withdraw_lease(me, ())

        self._exchanger.use_log(speak)

    def storage_dropped(self) -> None:
        """The next beat comes at once, and is the last if no trial is left RUNNING.

        Called by a finalizer, at any moment: it does not wait for the mutex. If it is missed, the
        beat comes when it is due.
        """
        if not self._is_of_this_process():
            return
        self._due_s = -math.inf
        if self._changed.acquire(blocking=False):
            try:
                self._changed.notify_all()
            finally:
                self._changed.release()

    def withdraw(self) -> None:
        """Beat no more, until the next trial; what is RUNNING is then nobody's loss.

        While another thread creates or claims a trial, that is the next trial: it goes on.
        """
        with self._exchanger.mutex:
            if not self.is_beating:
                return
        self._exchanger.use_log(self._withdraw)

    def _withdraw(self, log: LeaseStore) -> None:
        with self._exchanger.mutex:
            if self._starting:
                return
            self._stop()
            trial_ids = self._running()
        log.withdraw_lease(self._worker_id, trial_ids)

    def end(self) -> None:
        """``withdraw`` at the end of the process, unless it leaves a trial RUNNING."""
        with self._exchanger.mutex:
            leaves_trials = self.is_beating and (self._running() or self._starting)
        if not leaves_trials:
            self.withdraw()

    def _stop(self) -> None:
        """Whoever starts a trial from now on takes the lease anew; the mutex is held."""
        self._is_taken = False
        self._thread = None
        self._changed.notify_all()

    # --- the thread ------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Beat until there is nothing to beat for, or somebody withdraws."""
        fails = False
        while True:
            with self._exchanger.mutex:
                if self._thread is not threading.current_thread():
                    return
                remaining_s = self._due_s - self._clock.now_s()
                if remaining_s > 0:
                    self._clock.wait(self._changed, remaining_s)
                    continue
            try:
                self._exchanger.use_log(self._beat_once)
                self._look_now_and_then()
                fails = False
            except Exception as error:
                if not fails:
                    _logger.warning("The heartbeat waits for the log to come back: %s", error)
                fails = True
            with self._exchanger.mutex:
                pause_s = self._interval_s or 0.0
                if fails:
                    pause_s = min(pause_s, _RETRY_PAUSE_S)
                self._due_s = self._clock.now_s() + pause_s

    def _beat_once(self, log: LeaseStore) -> None:
        with self._exchanger.mutex:
            if self._thread is not threading.current_thread():
                return
            trial_ids = self._running()
            go_on = self._interval_s is not None and (trial_ids or self._starting)
            if not go_on:
                self._stop()
        if go_on:
            log.renew_lease(self._worker_id, trial_ids)
        else:
            log.withdraw_lease(self._worker_id, trial_ids)

    def _look_now_and_then(self) -> None:
        """What became of the trials, where nothing else brings it here: the next beat is told."""
        with self._exchanger.mutex:
            self._n_beats += 1
            if self._n_beats % _BEATS_A_LOOK or self._thread is not threading.current_thread():
                return
            trial_ids = frozenset(self._running())
        if trial_ids:
            self._exchanger.run((), Wanted(trials=trial_ids))


# --- exit ----------------------------------------------------------------------------------------

_alive: weakref.WeakSet[Heartbeat] = weakref.WeakSet()


def _end_all() -> None:
    for heartbeat in living(_alive):
        try:
            heartbeat.end()
        except Exception as error:
            _logger.warning("Running trials will be held for those of a dead worker: %s", error)
