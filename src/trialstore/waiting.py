"""The queue of a study: its WAITING trials, read and claimed at a cost that does not grow with it.

Optuna asks for all WAITING trials before each trial and claims the first. With thousands of them a
list of their ``FrozenTrial`` objects, made anew after each claim, costs far more than the claim.
So what a reader gets is a *stretch* of one list that only grows at its end; it builds what it is
asked for, and a claim moves the beginning of the next stretch. Of many workers that claim at one
moment most take one behind the first; who leaves from there leaves a *hole*, which later stretches
pass over.

An earlier read never changes: whoever leaves the queue, or changes in it, is replaced in the
stretches that somebody still has by what it was then.

Nor does a log look over the whole queue for whom only the next few concern: those are what a read
covers, and whoever looks beyond them reads again.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
import random
from typing import Any, Final, Protocol, overload
from weakref import WeakValueDictionary

from optuna.trial import FrozenTrial

# How many that have left may stand before the first, and how many be holes behind it; moving the
# others costs once for so many.
_LEFT_MAX: Final = 1024

_random = random.SystemRandom()  # not the user's, whom a seed promises what comes next


class _Waiting(Protocol):
    """A trial as the replica holds it."""

    id: int

    def shared_view(self) -> FrozenTrial:
        """The trial as it stands."""
        ...


class Stretch(Sequence[FrozenTrial]):
    """The WAITING trials of a study as a replica holds them at one moment, for reading.

    Args:
        slots: What is shared with other stretches of the list.
        begin: Where this one begins, and
        end: where it ends.
        holes: Indexes from ``begin`` on, in order, of those that had left by then.
        mutex: Gives what keeps the replica from changing while a trial is built; asked each time,
            since a forked child has another.
    """

    def __init__(
        self,
        slots: list[_Waiting | FrozenTrial],
        begin: int,
        end: int,
        holes: Sequence[int],
        mutex: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._slots = slots
        self._begin = begin
        self._end = end
        self._holes = holes
        self._mutex = mutex

    def __len__(self) -> int:
        return self._end - self._begin - len(self._holes)

    @overload
    def __getitem__(self, index: int) -> FrozenTrial: ...

    @overload
    def __getitem__(self, index: slice) -> list[FrozenTrial]: ...

    def __getitem__(self, index: int | slice) -> FrozenTrial | list[FrozenTrial]:
        if isinstance(index, slice):
            return [self._at(at) for at in range(len(self))[index]]
        return self._at(range(len(self))[index])

    def _at(self, index: int) -> FrozenTrial:
        holes, at = self._holes, self._begin + index
        # Before the hole with number n stand so many others, n of them holes.
        at += bisect_right(range(len(holes)), at, key=lambda n: holes[n] - n)
        with self._mutex():
            trial = self._slots[at]
            return trial if isinstance(trial, FrozenTrial) else trial.shared_view()


class WaitingTrials(Sequence[FrozenTrial]):
    """What a reader of the WAITING trials gets in place of a list of them.

    The first few are those of the read. If there are more, the others, and how many, are read
    when they are first asked for, and are those of that moment; it may raise what a read raises.

    Args:
        trials: The WAITING trials, by id.
        n_read: So many of them, from the first on, are surely those of the read.
        read_above: Reads those with greater ids than this one.
        is_lost: Whether a trial could not be claimed, because somebody else was quicker.
    """

    def __init__(
        self,
        trials: Sequence[FrozenTrial],
        n_read: int,
        read_above: Callable[[int], Sequence[FrozenTrial]],
        is_lost: Callable[[int], bool],
    ) -> None:
        self._trials = trials
        self._n_read = n_read
        self._is_lost = is_lost
        self._is_whole = len(trials) <= n_read
        self._read_above = read_above
        self._n_shown = 0
        self._shown: list[FrozenTrial] = []  # before the others were read

    def __bool__(self) -> bool:
        return bool(self._shown) or len(self._trials) > 0

    def __len__(self) -> int:
        self._read_the_others()
        return len(self._shown) + len(self._trials)

    @overload
    def __getitem__(self, index: int) -> FrozenTrial: ...

    @overload
    def __getitem__(self, index: slice) -> list[FrozenTrial]: ...

    def __getitem__(self, index: int | slice) -> FrozenTrial | list[FrozenTrial]:
        if isinstance(index, slice):
            return [self[at] for at in range(len(self))[index]]
        if not self._is_whole and 0 <= index < self._n_read:
            self._n_shown = max(self._n_shown, index + 1)
            return self._trials[index]
        at = range(len(self))[index]
        n_shown = len(self._shown)
        return self._shown[at] if at < n_shown else self._trials[at - n_shown]

    def __iter__(self) -> Iterator[FrozenTrial]:
        """In order, until one is claimed by somebody else before the reader could.

        All workers that read the queue at one moment claim its first trial, and all but one lose
        it. If they tried the second then, and so on, each would lose about as often as there are
        others, and each time costs an exchange. So a loser goes on at a random place.
        """
        begin = 0
        while begin < self._n_read or begin < len(self):
            end = begin + self._n_read
            ahead = deque(range(begin, min(end, len(self)) if self._is_whole else end))
            while ahead:
                try:
                    trial = self[ahead.popleft()]
                except IndexError:
                    break  # some had left when the others were read
                yield trial
                if ahead and self._is_lost(trial._trial_id):
                    ahead.rotate(-_random.randrange(len(ahead)))
            begin = end

    def _read_the_others(self) -> None:
        if not self._is_whole:
            shown = list(self._trials[: self._n_shown])
            self._trials = self._read_above(shown[-1]._trial_id if shown else -1)
            self._shown, self._is_whole = shown, True

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
        self._holes: tuple[int, ...] = ()  # behind the beginning; replaced, never edited
        self._stretches: WeakValueDictionary[int, Stretch] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._ids) - self._begin - len(self._holes)

    def __iter__(self) -> Iterator[Any]:
        begin = self._begin
        for end in (*self._holes, len(self._ids)):
            for index in range(begin, end):
                yield self._slots[index]
            begin = end + 1

    def trials(self, mutex: Callable[[], AbstractContextManager[Any]], above: int = -1) -> Stretch:
        """All of them, in O(1), or those with ids above one."""
        begin = self._begin if above < 0 else bisect_right(self._ids, above, self._begin)
        holes = self._holes[bisect_left(self._holes, begin) :]
        stretch = Stretch(self._slots, begin, len(self._ids), holes, mutex)
        self._stretches[id(stretch)] = stretch
        return stretch

    def add(self, trial: _Waiting) -> None:
        """Nearly always the latest there is."""
        at = len(self._ids)
        if len(self) and trial.id <= self._ids[-1]:  # it may be a hole there
            self._move()
            at = bisect_left(self._ids, trial.id)
        self._slots.insert(at, trial)
        self._ids.insert(at, trial.id)

    def remove(self, trial: _Waiting) -> None:
        """Nearly always one of the first few. Call it while the trial is as it was."""
        at = bisect_left(self._ids, trial.id, self._begin)
        if self._stretches:
            self._slots[at] = trial.shared_view()
        if at == self._begin:
            n_holes = 0
            for n_holes, hole in enumerate((*self._holes, -1)):
                if hole != at + 1 + n_holes:
                    break
            self._begin += 1 + n_holes
            self._holes = self._holes[n_holes:]
            if self._begin > _LEFT_MAX and self._begin > len(self):
                self._move()
        else:
            behind = bisect_left(self._holes, at)
            self._holes = (*self._holes[:behind], at, *self._holes[behind:])
            if len(self._holes) > _LEFT_MAX:
                self._move()

    def renew(self) -> None:
        """One is about to change and goes on waiting; who has read it sees it as it was before."""
        if self._stretches:
            self._move()

    def _move(self) -> None:
        """To a list that nobody has a stretch of, without those that have left."""
        given_out, n_left = self._slots, self._begin
        self._slots, self._ids = given_out[n_left:], self._ids[n_left:]
        for hole in reversed(self._holes):
            del self._slots[hole - n_left], self._ids[hole - n_left]
        self._begin, self._holes = 0, ()
        if self._stretches:
            self._stretches = WeakValueDictionary()
            given_out[n_left:] = [
                trial if isinstance(trial, FrozenTrial) else trial.shared_view()
                for trial in given_out[n_left:]
            ]
