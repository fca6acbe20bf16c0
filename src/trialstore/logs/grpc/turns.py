"""One leads for all who wait.

While a leader is at work others gather; the first of them leads next, and takes them all. A
leader that is done wakes those it has worked for and the next leader, nobody else: to wake all of
64 threads so that 60 of them sleep on costs more than an exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import threading
from typing import Any, Generic, TypeVar


class Waiting:
    """Who waits for a turn; made anew for each. The leader puts down an answer or an error."""

    __slots__ = ("_leads", "_stays_alone", "_wake", "answer", "error")

    def __init__(self) -> None:
        self.answer: Any = None
        self.error: BaseException | None = None
        self._leads = False
        self._stays_alone = False
        self._wake = threading.Lock()
        self._wake.acquire()


_W = TypeVar("_W", bound=Waiting)


class Turns(Generic[_W]):
    """Takes turns at something that one thread at a time may use.

    Args:
        lead: Puts down an answer or an error for each that it is given.
    """

    def __init__(self, lead: Callable[[Sequence[_W]], None]) -> None:
        self._lead = lead
        self._mutex = threading.Lock()
        self._gathered: list[Waiting] = []
        self._is_led = False

    def take(self, one: _W) -> Any:
        """Take part in a turn that begins after this call; returns the answer.

        Raises:
            The error.
        """
        if self._leads(one):
            taken: Sequence[_W] = (one,)
            try:
                taken = self._all_gathered(one)
                self._lead(taken)
            except BaseException as error:
                # A failure that ``lead`` has not foreseen, or an interrupt.
                for other in taken:
                    if other.answer is None and other.error is None:
                        other.error = error
            finally:
                for other in taken:
                    if other is not one:
                        other._wake.release()
                self._pass_on()
        if one.error is not None:
            raise one.error
        return one.answer

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the turn to oneself."""
        one = Waiting()
        one._stays_alone = True
        self._leads(one)
        try:
            yield
        finally:
            self._pass_on()

    def _leads(self, one: Waiting) -> bool:
        """Wait for a turn; whether it is for ``one`` to lead, and not over."""
        with self._mutex:
            if not self._is_led:
                self._is_led = one._leads = True
                return True
            self._gathered.append(one)
        try:
            one._wake.acquire()
        except BaseException:  # an interrupt; nobody may be left waiting for this one to lead
            with self._mutex:
                if one in self._gathered:
                    self._gathered.remove(one)
            if one._leads:
                self._pass_on()
            raise
        return one._leads

    def _all_gathered(self, leader: _W) -> Sequence[_W]:
        """The leader and who has come since the last turn began, up to one who stays alone."""
        with self._mutex:
            alone = (n for n, other in enumerate(self._gathered) if other._stays_alone)
            end = next(alone, len(self._gathered))
            taken, self._gathered = self._gathered[:end], self._gathered[end:]
        return [leader, *taken]  # type: ignore[list-item]

    def _pass_on(self) -> None:
        with self._mutex:
            if self._gathered:
                following = self._gathered.pop(0)
                following._leads = True
                following._wake.release()
            else:
                self._is_led = False
