"""Every schedule of two threads in a small case: by stepping, and by DPOR over bytecode."""

from __future__ import annotations

import abc
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import coordination as co
import primitives as pr
from tests.absent import needs
from tests.helpers.base import HERE, PROGRAM_LIMIT
from tests.helpers.mechanisms import Turns, TurnsThread


def turns_lock(turns: Callable[[], Turns | None]) -> type:
    class Lock:
        def __init__(self) -> None:
            self.taken = False

        def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
            patient = blocking and timeout < 0
            if (scheduler := turns()) is not None:
                scheduler.pause(lambda: not (patient and self.taken))
            if self.taken and not (scheduler is not None and scheduler.over):
                return False
            self.taken = True
            return True

        def release(self) -> None:
            self.taken = False

        __enter__ = acquire

        def __exit__(self, *_: object) -> None:
            self.release()

    return Lock


class TurnsCase(abc.ABC):
    """A few threads over fresh objects, and what must be true when all of them have ended."""

    threads: list[Callable[[], object]]
    interrupted = False
    """Whether the first thread is interrupted, as by Ctrl-C, when it has waited: woken, or at any other turn."""

    @abc.abstractmethod
    def holds(self) -> bool: ...


def turns_explore(
    make: Callable[[], TurnsCase], monkeypatch: pytest.MonkeyPatch, preemptions: int = 2
) -> tuple[int, str | None]:
    """How many schedules there are, or up to the first that fails; and what failed there."""
    now: list[Turns] = []
    lock = turns_lock(lambda: now[-1] if now else None)
    names = {name: getattr(threading, name) for name in ("TIMEOUT_MAX", "local", "Thread")}
    monkeypatch.setattr(co, "threading", SimpleNamespace(Lock=lock, **names))
    block = co.Waiter.block

    def interrupt(waiter: co.Waiter, timeout: float | None) -> None:
        block(waiter, timeout if threading.current_thread().name != "thread 0" else 1.0)
        if threading.current_thread().name == "thread 0":
            raise KeyboardInterrupt

    choices: list[int] = []
    for explored in range(1, 100_000):
        now.clear()
        case = make()
        monkeypatch.setattr(co.Waiter, "block", interrupt if case.interrupted else block)
        now.append(turns := Turns(choices, preemptions))
        turns.threads = [TurnsThread(turns, work, f"thread {n}") for n, work in enumerate(case.threads)]
        for thread in turns.threads:
            thread.start()
        failure = turns.run()
        for thread in turns.threads:
            thread.join()
        now.clear()
        if failure or not case.holds():
            return explored, failure or "wrong result"
        made = turns.made
        while made and made[-1][0] + 1 == made[-1][1]:
            made.pop()
        if not made:
            return explored, None
        choices = [*(choice for choice, _ in made[:-1]), made[-1][0] + 1]
    raise AssertionError("too many schedules")


class TurnsSemaphore(TurnsCase):
    """Three threads, one permit; the last one may lose patience."""

    kind: type[co.Semaphore] = co.Semaphore

    def __init__(self) -> None:
        self.semaphore = self.kind(1)
        self.inside = self.most = self.entered = 0
        self.threads = [lambda: self.enter(None), lambda: self.enter(None), lambda: self.enter(1.0)]

    def enter(self, timeout: float | None) -> None:
        if self.semaphore.acquire(timeout):
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.entered += 1
            assert self.semaphore.stats().available == 0
            self.inside -= 1
            self.semaphore.release()

    def holds(self) -> bool:
        return self.most == 1 and self.entered >= 2 and self.semaphore.stats() == (1, 1, 0)


class TurnsChannel(TurnsCase):
    """Two putters and a getter over one place; what was accepted is received, once, in the order of each putter."""

    kind: type[co.Channel[Any]] = co.Channel

    def __init__(self) -> None:
        self.channel: co.Channel[Any] = self.kind(1)
        self.got: list[Any] = []
        self.threads = [
            lambda: self.put(("a", 0), ("a", 1)),
            lambda: self.put(("b", 0)),
            lambda: self.got.extend(self.channel.get() for _ in range(3)),
        ]

    def put(self, *items: tuple[str, int]) -> None:
        for item in items:
            self.channel.put(item)

    def holds(self) -> bool:
        return len(self.got) == 3 and [item for item in self.got if item != ("b", 0)] == [("a", 0), ("a", 1)]


class TurnsClose(TurnsCase):
    """A putter, an impatient getter and a close: what ``put`` accepted is got or still there, nobody stays behind."""

    kind: type[co.Channel[Any]] = co.Channel

    def __init__(self) -> None:
        self.channel: co.Channel[Any] = self.kind(1)
        self.accepted: list[int] = []
        self.got: list[int] = []
        self.threads = [self.put, self.get, self.channel.close]

    def put(self) -> None:
        try:
            for n in range(2):
                self.channel.put(n)
                self.accepted.append(n)
        except co.ChannelClosed:
            pass

    def get(self) -> None:
        with contextlib.suppress(co.ChannelClosed, TimeoutError):
            self.got.append(self.channel.get(1.0))

    def holds(self) -> bool:
        rest = list(self.channel)
        stats = self.channel.stats()
        return self.got + rest == self.accepted and (stats.putters, stats.getters) == (0, 0)


class TurnsHandOn(TurnsCase):
    """Two getters, of which one is interrupted, and a thread that puts and closes: the other one gets the item."""

    kind: type[co.Channel[Any]] = co.Channel
    interrupted = True

    def __init__(self) -> None:
        self.channel: co.Channel[Any] = self.kind(1)
        self.got: list[str] = []
        self.threads = [self.get, self.get, self.put_and_close]

    def get(self) -> None:
        with contextlib.suppress(KeyboardInterrupt, co.ChannelClosed):
            self.got.append(self.channel.get())

    def put_and_close(self) -> None:
        self.channel.put("item")
        self.channel.close()

    def holds(self) -> bool:
        return self.got == ["item"] and self.channel.stats() == (1, 0, 0, 0, True)


class TurnsWithdraw(TurnsCase):
    """Two putters over a full channel, of which one is interrupted, and a getter: what is left was put."""

    kind: type[co.Channel[Any]] = co.Channel
    interrupted = True

    def __init__(self) -> None:
        self.channel: co.Channel[Any] = self.kind(1)
        self.channel.put("first")
        self.accepted, self.got = ["first"], list[str]()
        self.threads = [lambda: self.put("victim"), lambda: self.put("other"), self.get]

    def put(self, item: str) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            self.channel.put(item)
            self.accepted.append(item)

    def get(self) -> None:
        self.got.extend(self.channel.get() for _ in range(2))

    def holds(self) -> bool:
        self.channel.close()
        unsure = {*self.got} - {*self.accepted}  # got as its putter was interrupted
        self.got.extend(self.channel)
        return sorted(self.got) == sorted([*self.accepted, *unsure]) and "other" in self.accepted


class TurnsFlight(TurnsCase):
    """Three callers of one key; the first load ends like a killed thread, so another one must load."""

    kind: type[pr.SingleFlight] = pr.SingleFlight
    kills = 1

    def __init__(self) -> None:
        self.flight = self.kind()
        self.loading = self.most = self.loads = 0
        self.answers: list[int] = []
        self.threads = [self.ask, self.ask, self.ask]

    def load(self) -> int:
        self.loading += 1
        self.most = max(self.most, self.loading)
        self.loads += 1
        self.flight.stats()  # a turn for the others
        self.loading -= 1
        if self.loads <= self.kills:
            raise GeneratorExit
        return 7

    def ask(self) -> None:
        with contextlib.suppress(GeneratorExit):
            self.answers.append(self.flight.do("key", self.load))

    def holds(self) -> bool:
        return self.most == 1 and self.answers == [7] * (3 - self.kills) and self.flight.stats()[:2] == (0, 0)


class TurnsCache(TurnsCase):
    """Three callers of one key of a cache: one load, whenever each of them looks."""

    kind: type[pr.TTLCache[Any, Any]] = pr.TTLCache

    def __init__(self) -> None:
        self.cache = self.kind(clock=lambda: 0.0)
        self.loads = 0
        self.answers: list[int] = []
        self.threads = [lambda: self.answers.append(self.cache.get_or_load("key", self.load))] * 3

    def load(self) -> int:
        self.loads += 1
        return self.loads

    def holds(self) -> bool:
        return self.answers == [1, 1, 1]


TURNS_CASES = [TurnsSemaphore, TurnsChannel, TurnsClose, TurnsHandOn, TurnsWithdraw, TurnsFlight, TurnsCache]


@pytest.mark.parametrize("case", TURNS_CASES)
def test_turns_every_schedule_holds(case: type[TurnsCase], monkeypatch: pytest.MonkeyPatch) -> None:
    explored, failure = turns_explore(case, monkeypatch)
    assert failure is None
    assert explored > 50


# ------------------------------------------------------------------- interleavings: every bytecode, by frontrun's DPOR


class NoLock:
    """A lock removed."""

    def acquire(self) -> None:
        pass

    release = acquire

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class CheckThenAct(co.Visited[int]):
    def add(self, key: int) -> bool:
        with self._lock:
            known = key in self._keys
        with self._lock:
            self._keys.add(key)
        return not known


def half_open() -> pr.CircuitBreaker:
    breaker = pr.CircuitBreaker("b", failures=1, reset=1, clock=lambda: 5.0, rng=lambda: 0.0)
    breaker._open(0.0)
    return breaker


def frontrun_permit(breaker: pr.CircuitBreaker) -> bool:
    try:
        breaker.permit(5.0)
    except pr.CircuitOpen:
        return False
    return True


def frontrun_both(locks: tuple[Any, Any], who: int) -> bool:
    with locks[who], locks[1 - who]:
        return True


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any, int], Any], list[Any]]] = {
    # name: what both threads work on, what they do with it, what comes out
    "bucket": (lambda: pr.TokenBucket(1, 1, clock=lambda: 0.0), lambda o, _: o.try_acquire(), [False, True]),
    "budget": (lambda: pr.RetryBudget(0, 1), lambda o, _: o.try_retry(), [False, True]),
    "visited": (co.Visited, lambda o, _: o.add(1), [False, True]),
    "semaphore": (lambda: co.Semaphore(1), lambda o, _: o.try_acquire(), [False, True]),
    "batch": (lambda: pr.Batch(2, 1, clock=lambda: 0.0), lambda o, _: len(o.add(1) or []), [0, 2]),
    "breaker": (half_open, lambda o, _: frontrun_permit(o), [False, True]),
    "planted: check then act": (CheckThenAct, lambda o, _: o.add(1), [False, True]),
    "planted: two orders": (lambda: (threading.Lock(), threading.Lock()), frontrun_both, [True, True]),
}


for frontrun_name in ("bucket", "budget", "visited", "semaphore", "breaker"):
    frontrun_make, frontrun_work, frontrun_out = CASES[frontrun_name]

    def frontrun_unlocked(make: Callable[[], Any] = frontrun_make) -> Any:
        thing = make()
        thing._lock = NoLock()
        return thing

    CASES[f"planted: {frontrun_name} without its lock"] = frontrun_unlocked, frontrun_work, frontrun_out


def frontrun_main() -> None:
    """Runs in a process of its own, under frontrun: it replaces the locks of the whole interpreter."""
    import frontrun

    found: dict[str, str | None] = {}
    for name, (make, work, expected) in CASES.items():

        def thread(state: tuple[Any, list[Any]], who: int, work: Callable[[Any, int], Any] = work) -> None:
            state[1].append(work(state[0], who))

        result = frontrun.explore(
            setup=lambda make=make: (make(), []),
            workers=[lambda state, thread=thread: thread(state, 0), lambda state, thread=thread: thread(state, 1)],
            invariant=lambda state, expected=expected: sorted(state[1]) == expected,
        )
        found[name] = None if result.property_holds else "race" if "Race" in str(result.explanation) else "deadlock"
    print(json.dumps(found))


@pytest.fixture(scope="module")
def frontrun_found() -> Iterator[dict[str, str | None]]:
    program = Path(sys.executable).with_name("frontrun")
    code = f"import {__name__}; {__name__}.frontrun_main()"
    done = subprocess.run(
        [program, sys.executable, "-c", code], capture_output=True, text=True, timeout=PROGRAM_LIMIT, cwd=HERE
    )
    assert done.returncode == 0, done.stderr
    yield json.loads(done.stdout.splitlines()[-1])


@needs("frontrun")
@pytest.mark.parametrize("name", CASES)
def test_frontrun_proves_the_decisions_and_finds_the_planted(name: str, frontrun_found: dict[str, str | None]) -> None:
    expected = ("deadlock" if "orders" in name else "race") if name.startswith("planted") else None
    assert frontrun_found[name] == expected
