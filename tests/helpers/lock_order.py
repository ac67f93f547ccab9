"""Which lock is taken while which is held, recorded over a test: two orders are a deadlock that could happen."""

from __future__ import annotations

import threading
from typing import cast

import coordination

PLAIN = coordination.plain_lock


class LockOrderError(RuntimeError):
    """Two locks are taken in both orders somewhere: a deadlock that could happen."""


class LockOrder:
    """Records which lock is taken while which is held, and raises before a cycle closes (as Linux's lockdep does).

    Locks are known by name, so one run that takes A then B and another one, at any other time, that takes B then A
    are enough: the deadlock itself need not happen. While ``with LockOrder():`` lasts, ``new_lock`` makes locks that
    report to it; otherwise plain ones, at no cost.
    """

    def __init__(self) -> None:
        self._after: dict[str, set[str]] = {}
        self._held = threading.local()
        self._lock = threading.Lock()

    def __enter__(self) -> LockOrder:
        coordination.make_lock = lambda name: cast(threading.Lock, RecordedLock(name, self))
        return self

    def __exit__(self, *_: object) -> None:
        coordination.make_lock = PLAIN

    def taking(self, name: str) -> None:
        """A thread is about to take the lock ``name``; ``LockOrderError`` if it could wait for ever."""
        with self._lock:
            for holding in self._stack():
                if self._leads(name, holding):
                    raise LockOrderError(f"{name} is taken while {holding} is held, elsewhere the other way round")
                self._after.setdefault(holding, set()).add(name)
        self._stack().append(name)

    def released(self, name: str) -> None:
        self._stack().remove(name)

    def _stack(self) -> list[str]:
        stack: list[str] = self._held.__dict__.setdefault("names", [])
        return stack

    def _leads(self, start: str, goal: str) -> bool:
        return start == goal or any(self._leads(following, goal) for following in self._after.get(start, ()))

    def stats(self) -> dict[str, set[str]]:
        """For each lock, those that were taken while it was held."""
        with self._lock:
            return {name: set(after) for name, after in self._after.items()}


class RecordedLock:
    def __init__(self, name: str, order: LockOrder) -> None:
        self._name, self._order, self._lock = name, order, threading.Lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if blocking:
            self._order.taking(self._name)
        taken = self._lock.acquire(blocking, timeout)
        if blocking and not taken:
            self._order.released(self._name)
        elif taken and not blocking:
            self._order._stack().append(self._name)
        return taken

    def release(self) -> None:
        self._lock.release()
        self._order.released(self._name)

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self.release()
