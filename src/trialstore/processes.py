"""When a process forks, and when it ends: for whatever has state of this process alone."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
import contextlib
from multiprocessing import util as multiprocessing_util
import os
import threading
from typing import Final, Generic, Protocol, TypeVar
import weakref

_T = TypeVar("_T")

_one_fork = threading.RLock()
"""At a time: all hooks of a fork run in one thread."""
_work_ended = threading.Condition(_one_fork)
_at_work: set[int] = set()
"""Threads in ``before_any_fork``."""
_LOOK_S: Final = 1.0
"""Then it is looked again, lest an interrupt has kept the end of some work from being told."""
_exits_registered: dict[Callable[[], None], int] = {}
"""What is done at the end, by whom: a process id."""


class Holdable(Protocol):
    def hold_for_fork(self) -> None: ...

    def go_on_in_parent(self) -> None: ...


class LetsGo(Protocol):
    def let_go(self) -> None: ...


_letting_go: weakref.WeakSet[LetsGo] = weakref.WeakSet()


def let_go_before_a_fork(one: LetsGo) -> None:
    """Have something closed before each fork, that no child must inherit, once all are held."""
    _letting_go.add(one)


_H = TypeVar("_H", bound=Holdable)


class Fork(Generic[_H]):
    """What must not be at work while the process forks.

    Args:
        members: Who is held.
    """

    def __init__(self, members: weakref.WeakSet[_H]) -> None:
        self._members = members
        self._held: list[_H] = []

    def hold(self) -> None:
        """Before it. An interrupt ends this, and ``os.fork`` goes on all the same: whoever was not
        reached is not held."""
        _one_fork.acquire()
        while _at_work - {threading.get_ident()}:
            _work_ended.wait(_LOOK_S)
        for member in living(self._members):
            member.hold_for_fork()
            self._held.append(member)

    def holds(self, member: _H) -> bool:
        return any(member is held for held in self._held)

    def release(self) -> None:
        """After it, in the parent."""
        try:
            for member in reversed(self._held):
                member.go_on_in_parent()
        finally:
            self.forget()

    def forget(self) -> None:
        """After it, where what was held is the parent's."""
        self._held.clear()
        _one_fork.release()


@contextlib.contextmanager
def before_any_fork() -> Iterator[None]:
    """A fork waits for what is done in here, by someone of whom ``Fork`` does not know yet."""
    me = threading.get_ident()
    is_inside = me in _at_work
    try:
        with _one_fork:
            _at_work.add(me)
        yield
    finally:
        if not is_inside:
            _at_work.discard(me)
            with _work_ended:
                _work_ended.notify_all()


def unless_forking(act: Callable[[], object]) -> None:
    """Do something that a fork has to wait for, or leave it if one is near.

    For finalizers: they come at any moment, and a fork may wait for what they interrupt.
    """
    if _one_fork.acquire(blocking=False):
        try:
            act()
        finally:
            _one_fork.release()


def _let_go() -> None:
    for one in living(_letting_go):
        one.let_go()


def _begin_in_child() -> None:
    """Where there is one thread, whoever was not waited for, after an interrupt, is not there."""
    _at_work.intersection_update((threading.get_ident(),))


if hasattr(os, "register_at_fork"):
    # Before the hooks of whoever holds: what was registered first is called last, before a fork.
    os.register_at_fork(before=_let_go, after_in_child=_begin_in_child)


def living(members: weakref.WeakSet[_T]) -> list[_T]:
    """Those of a weak set, which another thread may be adding to."""
    while True:
        try:
            return list(members)
        except RuntimeError:  # which it did
            continue


def at_exit(act: Callable[[], None], priority: int) -> None:
    """Have something done at the end of this process, once, however often this is called.

    A multiprocessing child runs finalizers, its own only, but no ``atexit``.

    Args:
        act: What.
        priority: What has a greater one is done before, in such a child.
    """
    if _exits_registered.get(act) != os.getpid():
        _exits_registered[act] = os.getpid()
        multiprocessing_util.Finalize(None, act, exitpriority=priority)
        atexit.register(act)
