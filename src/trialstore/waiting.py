"""The queue of a study: its WAITING trials, read and claimed at a cost that does not grow with it.

Optuna asks for all WAITING trials before each trial and claims the first. With thousands of them a
list of their ``FrozenTrial`` objects, made anew after each claim, costs far more than the claim.
So what a reader gets is a *stretch* of one list that only grows at its end; it builds what it is
asked for, and a claim moves the beginning of the next stretch.

An earlier read never changes: whoever leaves the queue, or changes in it, is replaced in the
stretches that somebody still has by what it was then.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol, overload
from weakref import WeakValueDictionary

from optuna.trial import FrozenTrial

# How many that have left may stand before the first; moving the others costs once for so many.
_LEFT_MAX: Final = 1024


class _Waiting(Protocol):
    """A trial as the replica holds it."""

    id: int

    def shared_view(self) -> FrozenTrial:
        """The trial as it stands."""
        ...


class WaitingTrials(Sequence[FrozenTrial]):
    """The WAITING trials of a study as of one moment, for reading.

    Args:
        slots: What is shared with other stretches of the list.
        begin: Where this one begins, and
        end: where it ends.
        mutex: Gives what keeps the replica from changing while a trial is built; asked each time,
            since a forked child has another.
    """

    def __init__(
        self,
        slots: list[_Waiting | FrozenTrial],
        begin: int,
        end: int,
        mutex: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._slots = slots
        self._begin = begin
        self._end = end
        self._mutex = mutex

    def __len__(self) -> int:
        return self._end - self._begin

    @overload
    def __getitem__(self, index: int) -> FrozenTrial: ...

    @overload
    def __getitem__(self, index: slice) -> list[FrozenTrial]: ...

    def __getitem__(self, index: int | slice) -> FrozenTrial | list[FrozenTrial]:
        if isinstance(index, slice):
            return [self._at(at) for at in range(self._begin, self._end)[index]]
        return self._at(range(self._begin, self._end)[index])

    def _at(self, index: int) -> FrozenTrial:
        with self._mutex():
            trial = self._slots[index]
            return trial if isinstance(trial, FrozenTrial) else trial.shared_view()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    # Where a list is expected, it becomes one.

    def __add__(self, other: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        return [*self, *other]

    def __radd__(self, other: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        return [*other, *self]

    def copy(self) -> list[FrozenTrial]:
        return list(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return (list, (list(self),))


class Waiting:
    """The index of a study's WAITING trials."""

    def __init__(self) -> None:
        self._slots: list[_Waiting | FrozenTrial] = []
        self._ids: list[int] = []
        self._begin = 0
        self._stretches: WeakValueDictionary[int, WaitingTrials] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._ids) - self._begin

    def __iter__(self) -> Iterator[Any]:
        for index in range(self._begin, len(self._ids)):
            yield self._slots[index]

    def trials(self, mutex: Callable[[], AbstractContextManager[Any]]) -> WaitingTrials:
        """All of them, in O(1)."""
        stretch = WaitingTrials(self._slots, self._begin, len(self._ids), mutex)
        self._stretches[id(stretch)] = stretch
        return stretch

    def add(self, trial: _Waiting) -> None:
        """Nearly always the latest there is."""
        at = len(self._ids)
        if len(self) and trial.id < self._ids[-1]:
            at = bisect_left(self._ids, trial.id, self._begin) - self._move()
        self._slots.insert(at, trial)
        self._ids.insert(at, trial.id)

    def remove(self, trial: _Waiting) -> None:
        """Nearly always the first. Call it while the trial is as it was."""
        at = bisect_left(self._ids, trial.id, self._begin)
        if self._stretches:
            self._slots[at] = trial.shared_view()
        if at == self._begin:
            self._begin += 1
            if self._begin > _LEFT_MAX and self._begin > len(self):
                self._move()
        else:
            at -= self._move()
            del self._slots[at], self._ids[at]

    def renew(self, trial: _Waiting, before: FrozenTrial) -> None:
        """It has changed and goes on waiting; who has read it sees it as it was before."""
        if self._stretches:
            at = bisect_left(self._ids, trial.id, self._begin)
            given_out = self._slots
            self._move()
            given_out[at] = before

    def _move(self) -> int:
        """To a list that nobody has a stretch of; by how much all are further to the front."""
        given_out = self._slots
        n_left, self._begin = self._begin, 0
        self._slots = given_out[n_left:]
        self._ids = self._ids[n_left:]
        if self._stretches:
            self._stretches = WeakValueDictionary()
            given_out[n_left:] = [
                trial if isinstance(trial, FrozenTrial) else trial.shared_view()
                for trial in self._slots
            ]
        return n_left
