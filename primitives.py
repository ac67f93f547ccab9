"""The mechanisms of a concurrent program, hand-written on the standard library.

Every mechanism here is a *pure core* with two *thin shells*:

- The core is a decision: ``(now, event) -> what to do``. It never sleeps, awaits, does I/O or calls foreign code.
  Time (``now``, in seconds of a monotonic clock) and randomness (``rng``) are arguments, so that a test can play an
  hour in a millisecond and a failing seed can be played again.
- The thread shell obeys the decision with ``time.sleep`` or by blocking on a lock, the async shell with
  ``await asyncio.sleep`` or by awaiting a future. They differ in nothing else.

Each object owns one ``threading.Lock``, held for the decision only: never while sleeping, never during a call of
the user's. So one object serves threads and tasks (of any number of event loops) at the same time. Locks are never
nested, so no order between them can be got wrong.

==================  ==============================================================================================
mechanism           promise (and what is not promised)
==================  ==============================================================================================
``TokenBucket``     at most ``burst + rate * t`` grants in *any* window of ``t`` seconds; FIFO, also for unequal sizes.
                    Not promised: that a grant which was given back in the middle of the queue is used by others.
``RetryPolicy``     bounded attempts, bounded total time; full jitter after the cap. Not promised: idempotence of
                    what is retried; that is the caller's knowledge.
``RetryBudget``     retries <= reserve + ratio * requests, always.
``Semaphore``       at most ``permits`` holders; FIFO, nobody barges past a queue, a cancelled holder loses nothing.
``Channel``         a bounded FIFO between workers; what ``put`` accepted is delivered, exactly once, also after
                    ``close()``. Not promised: anything about items whose ``put`` had not returned yet.
==================  ==============================================================================================

Nothing in this file starts a thread, a task or a process: all its work runs in the caller's.
"""

from __future__ import annotations

import asyncio
import calendar
import contextlib
import math
import queue
import random
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")

Clock = Callable[[], float]
"""Returns monotonic seconds."""
Rng = Callable[[], float]
"""Returns a uniformly distributed number in [0, 1)."""
RetryOn = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]
"""Which errors to try again: an exception type, several, or a predicate."""


NANOSECOND = 1e-9
"""The resolution of the clocks: a wait shorter than this is none (rounding would make one of it that never ends)."""


class ChannelClosed(Exception):
    """The channel was closed: nothing more can be put, or nothing is left to get."""


# ---------------------------------------------------------------------------------------- Retry-After

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_TIME = r"(?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d)"
_HTTP_DATES = (
    re.compile(rf"[A-Z][a-z]{{2}}, (?P<day>\d\d) (?P<month>[A-Z][a-z]{{2}}) (?P<year>\d{{4}}) {_TIME} GMT", re.A),
    re.compile(rf"[A-Z][a-z]+day, (?P<day>\d\d)-(?P<month>[A-Z][a-z]{{2}})-(?P<year>\d\d) {_TIME} GMT", re.A),
    re.compile(rf"[A-Z][a-z]{{2}} (?P<month>[A-Z][a-z]{{2}}) (?P<day>[ \d]\d) {_TIME} (?P<year>\d{{4}})", re.A),
)


def parse_http_date(value: str, now: float) -> float | None:
    """Unix time of an HTTP date in any of its three forms, or None if it is none of them.

    IMF-fixdate, RFC 850 and asctime (RFC 9110, section 5.6.7), always UTC whatever the local time zone. The
    two-digit year of the RFC 850 form is the one that lies at most 50 years after ``now`` (Unix time).
    """
    for pattern in _HTTP_DATES:
        match = pattern.fullmatch(value)
        if match is None or match["month"] not in _MONTHS:
            continue
        year, month, day = int(match["year"]), _MONTHS.index(match["month"]) + 1, int(match["day"])
        clock = int(match["hour"]), int(match["minute"]), int(match["second"])
        if len(match["year"]) == 2:
            today = time.gmtime(now)
            limit = (today.tm_year + 50, *today[1:6])
            year += limit[0] - limit[0] % 100
            if (year, month, day, *clock) > limit:
                year -= 100
        if not (year >= 1 and clock <= (23, 59, 60) and clock[1] <= 59 and clock[2] <= 60):
            return None
        if not 1 <= day <= calendar.monthrange(year, month)[1]:
            return None
        return float(calendar.timegm((year, month, day, *clock)))
    return None


def parse_retry_after(value: str | None, now: float | None = None, maximum: float = 3600.0) -> float | None:
    """Seconds to wait, between 0 and ``maximum``, that a ``Retry-After`` header asks for; None if it is invalid.

    Both forms of RFC 9110, section 10.2.3: delay seconds, or an HTTP date. ``now`` is Unix time (default: the
    system's). A date in the past means 0.
    """
    text = (value or "").strip(" \t")
    if text.isascii() and text.isdigit():
        return maximum if len(text.lstrip("0")) > 9 else min(maximum, float(text))
    now = time.time() if now is None else now
    date = parse_http_date(text, now)
    return None if date is None else min(maximum, max(0.0, date - now))


# --------------------------------------------------------------------------------------- token bucket


class Reservation(NamedTuple):
    """A place in a bucket's queue: usable ``wait`` seconds after it was made, at ``due`` by the clock."""

    wait: float
    due: float
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class TokenBucketStats:
    rate: float
    burst: float
    tokens: float
    """What could be had at once; negative while reservations wait."""


class TokenBucket:
    """At most ``burst + rate * t`` tokens in any window of ``t`` seconds, granted first come, first served.

    Virtual scheduling, the continuous form of GCRA (ITU-T I.371, annex A): the whole state is one float, the
    time at which the bucket will be full again. Taking n tokens moves it n intervals ahead of the later of itself
    and now; the grant is due when it is no more than ``burst`` intervals away. A larger request thus never starves
    behind smaller ones: its place is booked when it asks. Should the clock step backwards, the bound still holds.

    ``rate`` is in tokens per second, ``burst`` in tokens (>= 1). Asking for more than ``burst`` at once is a
    ``ValueError``: it could only be granted by breaking the bound.
    """

    __slots__ = ("_clock", "_depth", "_full_at", "_interval", "_lock", "_paused_until", "_reach", "burst", "rate")

    def __init__(self, rate: float, burst: float = 1, *, clock: Clock = time.monotonic) -> None:
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"rate must be a positive number of tokens per second, not {rate!r}")
        if not (burst >= 1 and math.isfinite(burst)):
            raise ValueError(f"burst must be a number of tokens >= 1, not {burst!r}")
        self.rate, self.burst = rate, burst
        self._interval = 1.0 / rate
        self._depth = burst * self._interval
        self._reach = self._depth + NANOSECOND
        self._full_at = -math.inf
        self._paused_until = -math.inf
        self._clock = clock
        self._lock = threading.Lock()

    def _due(self, n: float, now: float) -> tuple[float, float, float]:
        """When ``n`` tokens can be had, and the state before and after taking them."""
        if not 0 < n <= self.burst:
            raise ValueError(f"can grant between 0 and {self.burst} tokens at once, not {n!r}")
        before = self._full_at
        if before < now:
            before = now
        after = before + n * self._interval
        due = after - self._depth
        if due < self._paused_until:
            due = self._paused_until
        return (due if due > now + NANOSECOND else now), before, after

    def book(self, n: float = 1, now: float | None = None) -> Reservation:
        """Book ``n`` tokens; the reservation can be given back with ``cancel``."""
        with self._lock:
            if now is None:
                now = self._clock()
            due, before, after = self._due(n, now)
            self._full_at = after
        return Reservation(due - now, due, before, after)

    def reserve(self, n: float = 1, now: float | None = None) -> float:
        """Book ``n`` tokens and return the seconds to wait before using them (0.0: go)."""
        return self.book(n, now).wait

    def cancel(self, reservation: Reservation) -> bool:
        """Give a reservation back; True if its tokens can serve others.

        That is so while nothing was booked behind it. Otherwise those behind keep the times they were told, and
        handing the gap to a newcomer would let it overtake them.
        """
        with self._lock:
            if self._full_at != reservation.after:
                return False
            self._full_at = max(reservation.before, self._paused_until + self._depth - self._interval)
            return True

    def wait_for(self, n: float = 1, now: float | None = None) -> float:
        """Seconds until ``n`` tokens could be had if nobody else asked; books nothing. ``n`` may exceed ``burst``."""
        with self._lock:
            if now is None:
                now = self._clock()
            due = max(self._full_at, now) + n * self._interval - self._depth
            wait = max(due, self._paused_until) - now
        return wait if wait > NANOSECOND else 0.0

    def pause(self, until: float) -> None:
        """Grant nothing before ``until``, when one token is there and the rest refills (Retry-After)."""
        with self._lock:
            self._paused_until = max(self._paused_until, until)
            self._full_at = max(self._full_at, until + self._depth - self._interval)

    def try_acquire(self, n: float = 1, now: float | None = None) -> bool:
        """Take ``n`` tokens if they are there at once."""
        if not 0 < n <= self.burst:
            raise ValueError(f"can grant between 0 and {self.burst} tokens at once, not {n!r}")
        lock = self._lock
        lock.acquire()  # ``with`` would be a fifth of what this method takes
        try:
            if now is None:
                now = self._clock()
            after = self._full_at
            if after < now:
                after = now
            after += n * self._interval
            if after > now + self._reach or now < self._paused_until:
                return False
            self._full_at = after
            return True
        finally:
            lock.release()

    def acquire(self, n: float = 1) -> None:
        """Take ``n`` tokens, sleeping until they are due."""
        if self.try_acquire(n):
            return
        reservation = self.book(n)
        wait = reservation.wait
        try:
            while wait > NANOSECOND:
                time.sleep(wait)
                wait = reservation.due - self._clock()
        except BaseException:
            self.cancel(reservation)
            raise

    async def acquire_async(self, n: float = 1) -> None:
        """Take ``n`` tokens, awaiting until they are due; a cancelled waiter gives them back where possible."""
        lock = self._lock
        lock.acquire()  # what try_acquire does: to call it would be a fourth of the time
        try:
            now = self._clock()
            after = self._full_at
            if after < now:
                after = now
            after += n * self._interval
            if after <= now + self._reach and now >= self._paused_until and 0 < n <= self.burst:
                self._full_at = after
                return
        finally:
            lock.release()
        reservation = self.book(n)
        wait = reservation.wait
        try:
            while wait > NANOSECOND:
                await asyncio.sleep(wait)
                wait = reservation.due - self._clock()
        except BaseException:
            self.cancel(reservation)
            raise

    def stats(self, now: float | None = None) -> TokenBucketStats:
        with self._lock:
            if now is None:
                now = self._clock()
            tokens = self.burst - max(0.0, self._full_at - now) * self.rate
        return TokenBucketStats(self.rate, self.burst, tokens)

    def __repr__(self) -> str:
        s = self.stats()
        return f"<TokenBucket {s.rate:g}/s burst {s.burst:g}: {s.tokens:.3g} tokens>"


# ---------------------------------------------------------------------------------------------- retry


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again: exponential back-off with full jitter, bounded in attempts and in time.

    ``attempts`` counts all tries, the first included. The n-th wait is uniform in [0, min(cap, base * 2**(n-1))]:
    the jitter comes *after* the cap, so that capped waits still spread (Brooker, "Exponential Backoff And Jitter",
    AWS 2015). ``base``, ``cap`` and ``total`` are seconds; no retry starts later than ``total`` after the first try.
    """

    attempts: int = 3
    base: float = 0.5
    cap: float = 30.0
    total: float = 120.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, not {self.attempts!r}")
        if not (self.base >= 0 and self.cap >= 0 and self.total >= 0):
            raise ValueError("base, cap and total are seconds, not below 0")

    def delay(
        self,
        attempt: int,
        rng: Rng = random.random,
        retry_after: float | None = None,
        elapsed: float = 0.0,
    ) -> float | None:
        """Seconds to wait after try number ``attempt`` (from 1) failed, or None: give up.

        A ``retry_after`` (seconds, from the server) replaces the back-off. ``elapsed`` is the time since the first
        try began.
        """
        if attempt >= self.attempts:
            return None
        if retry_after is None:
            ceiling = min(self.cap, self.base * 2.0 ** min(attempt - 1, 62))
            delay = rng() * ceiling
        else:
            delay = max(0.0, retry_after)
        return delay if elapsed + delay <= self.total else None


class RetryBudget:
    """Caps retries to a share of the requests: retries <= reserve + ratio * requests.

    Every request earns ``ratio`` of a retry, up to ``reserve`` saved ones; every retry spends one. In an outage the
    load thus grows by ``ratio`` and not by the number of attempts (Finagle's retry budgets; the Google SRE book,
    chapter 22). It starts with ``reserve`` saved, for callers with little traffic.
    """

    _UNIT = 1000

    def __init__(self, ratio: float = 0.1, reserve: int = 10) -> None:
        if not 0 <= ratio <= 1 or reserve < 0:
            raise ValueError("ratio is a share between 0 and 1, reserve a number of retries not below 0")
        self.ratio, self.reserve = ratio, reserve
        self._earn = int(ratio * self._UNIT)
        self._limit = max(reserve, 1) * self._UNIT
        self._saved = reserve * self._UNIT
        self._requests = self._retries = self._refused = 0
        self._lock = threading.Lock()

    def request(self) -> None:
        """Count a first try."""
        with self._lock:
            self._requests += 1
            self._saved = min(self._limit, self._saved + self._earn)

    def try_retry(self) -> bool:
        """Spend one retry, if there is one."""
        with self._lock:
            if self._saved < self._UNIT:
                self._refused += 1
                return False
            self._saved -= self._UNIT
            self._retries += 1
            return True

    def stats(self) -> RetryBudgetStats:
        with self._lock:
            return RetryBudgetStats(self._requests, self._retries, self._refused, self._saved / self._UNIT)

    def __repr__(self) -> str:
        s = self.stats()
        return f"<RetryBudget {self.ratio:g}: {s.saved:.3g} saved, {s.retries} of {s.requests} retried>"


@dataclass(frozen=True, slots=True)
class RetryBudgetStats:
    requests: int
    retries: int
    refused: int
    saved: float


class _Attempts:
    """The decision of both retry shells: after a failure, how long to wait; or the failure itself."""

    def __init__(
        self,
        on: RetryOn,
        policy: RetryPolicy,
        budget: RetryBudget | None,
        clock: Clock,
        rng: Rng,
        started: float,
    ) -> None:
        self._on, self._policy, self._budget = on, policy, budget
        self._clock, self._rng, self._started = clock, rng, started
        self._made = 0
        self._history: list[str] = []

    def failed(self, error: Exception) -> float | None:
        """Seconds to wait before the next try; None when there is none: ``error`` now has the history as its note."""
        on = self._on
        wanted = isinstance(error, on) if isinstance(on, (type, tuple)) else on(error)
        self._made += 1
        self._history.append(f"{type(error).__name__}: {error}")
        if wanted:
            elapsed = self._clock() - self._started
            retry_after = getattr(error, "retry_after", None)
            delay = self._policy.delay(self._made, self._rng, retry_after, elapsed)
            if delay is not None and (self._budget is None or self._budget.try_retry()):
                return delay
        if self._made > 1:
            error.add_note(f"retry: gave up after {self._made} attempts: " + "; ".join(self._history[-10:]))
        return None


_DEFAULT_POLICY = RetryPolicy()


def retry(
    call: Callable[[], T],
    *,
    on: RetryOn,
    policy: RetryPolicy = _DEFAULT_POLICY,
    budget: RetryBudget | None = None,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    rng: Rng = random.random,
) -> T:
    """Return ``call()``, trying again as ``policy`` and ``budget`` allow when it fails with an error that ``on`` names.

    ``on`` has no default: what is safe to repeat, only the caller knows. An error's ``retry_after`` attribute
    (seconds) replaces the back-off. The last error is raised as it is, the history of the attempts as its note.
    """
    if budget is not None:
        budget.request()
    started = clock()
    attempts: _Attempts | None = None
    while True:
        try:
            return call()
        except Exception as error:
            attempts = attempts or _Attempts(on, policy, budget, clock, rng, started)
            delay = attempts.failed(error)
            if delay is None:
                raise
        sleep(delay)


async def retry_async(
    call: Callable[[], Awaitable[T]],
    *,
    on: RetryOn,
    policy: RetryPolicy = _DEFAULT_POLICY,
    budget: RetryBudget | None = None,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    rng: Rng = random.random,
) -> T:
    """``retry`` for an async call. Cancellation is never retried."""
    if budget is not None:
        budget.request()
    started = clock()
    attempts: _Attempts | None = None
    while True:
        try:
            return await call()
        except Exception as error:
            attempts = attempts or _Attempts(on, policy, budget, clock, rng, started)
            delay = attempts.failed(error)
            if delay is None:
                raise
        await sleep(delay)


# -------------------------------------------------------------------------------------------- waiting


class _Waiter:
    """One parked thread or task. ``granted`` and ``value`` belong to whoever holds the owner's lock."""

    __slots__ = ("_future", "_lock", "_loop", "granted", "value")

    def __init__(self, loop: asyncio.AbstractEventLoop | None, value: Any = None) -> None:
        self.granted = False
        self.value = value
        self._loop = loop
        if loop is None:
            self._lock = threading.Lock()
            self._lock.acquire()
        else:
            self._future: asyncio.Future[None] = loop.create_future()

    def wake(self) -> bool:
        """False if nobody will ever wake up: the event loop of the task is closed."""
        if self._loop is None:
            self._lock.release()
        elif asyncio._get_running_loop() is self._loop:
            self._resolve()
        else:
            try:
                self._loop.call_soon_threadsafe(self._resolve)
            except RuntimeError:
                return False
        return True

    def _resolve(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def block(self, timeout: float | None) -> None:
        self._lock.acquire(timeout=-1 if timeout is None else max(0.0, min(timeout, threading.TIMEOUT_MAX)))

    async def parked(self) -> None:
        await self._future


class _FairCondition:
    """A condition variable for threads and tasks that hands over in the order of arrival.

    What ``threading.Condition`` is inside (a queue of locks), with one difference: a notification goes to the oldest
    waiter *by name* and carries what it waited for, so nobody who comes later can take it away (no barging), and
    a waiter that was cancelled after its grant can hand the grant on. Guarded by the lock of its owner.
    """

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: deque[_Waiter] = deque()

    def __len__(self) -> int:
        return len(self._waiters)

    def park(self, loop: asyncio.AbstractEventLoop | None, value: Any = None) -> _Waiter:
        waiter = _Waiter(loop, value)
        self._waiters.append(waiter)
        return waiter

    def grant_oldest(self, value: Any = None) -> _Waiter | None:
        """Hand ``value`` (if it is not None, it takes the place of what the waiter brought) to the oldest waiter."""
        while self._waiters:
            waiter = self._waiters.popleft()
            brought, waiter.granted = waiter.value, True
            if value is not None:
                waiter.value = value
            if waiter.wake():
                return waiter
            waiter.granted, waiter.value = False, brought
        return None

    def wake_all_empty_handed(self) -> None:
        while self._waiters:
            self._waiters.popleft().wake()

    def leave(self, waiter: _Waiter) -> None:
        if not waiter.granted:
            with contextlib.suppress(ValueError):
                self._waiters.remove(waiter)


# ------------------------------------------------------------------------------------------ semaphore


@dataclass(frozen=True, slots=True)
class SemaphoreStats:
    permits: int
    available: int
    waiting: int


class Semaphore:
    """At most ``permits`` holders at a time, threads and tasks alike (Dijkstra, EWD 123).

    Built on one lock, which guards the count and the queue, and one condition, notified when a permit is released.
    Fairness: strictly FIFO. A released permit is handed to the oldest waiter and never passes through the count, so
    a newcomer cannot barge in. A waiter that is cancelled or times out leaves the queue; if its permit had already
    been handed over, it hands it on. Invariant: waiting > 0 implies available == 0.
    """

    def __init__(self, permits: int) -> None:
        if permits < 1:
            raise ValueError(f"permits must be at least 1, not {permits!r}")
        self.permits = permits
        self._available = permits
        self._lock = threading.Lock()
        self._released = _FairCondition()

    def try_acquire(self) -> bool:
        """Take a permit if one is free and nobody waits for it."""
        with self._lock:
            if self._available:
                self._available -= 1
                return True
            return False

    def acquire(self, timeout: float | None = None) -> bool:
        """Take a permit, blocking the thread; False after ``timeout`` seconds without one."""
        with self._lock:
            if self._available:
                self._available -= 1
                return True
            waiter = self._released.park(None)
        try:
            waiter.block(timeout)
        except BaseException:
            self._abandon(waiter)
            raise
        with self._lock:
            self._released.leave(waiter)
            return waiter.granted

    async def acquire_async(self) -> bool:
        """Take a permit, parking the task; always True."""
        with self._lock:
            if self._available:
                self._available -= 1
                return True
            waiter = self._released.park(asyncio.get_running_loop())
        try:
            await waiter.parked()
        except BaseException:
            self._abandon(waiter)
            raise
        return True

    def release(self) -> None:
        """Give a permit back: to the oldest waiter, else to the count. ``ValueError`` if none was out."""
        with self._lock:
            if self._released.grant_oldest():
                return
            if self._available == self.permits:
                raise ValueError("released more often than acquired")
            self._available += 1

    def _abandon(self, waiter: _Waiter) -> None:
        with self._lock:
            self._released.leave(waiter)
            granted = waiter.granted
        if granted:
            self.release()

    def __enter__(self) -> Semaphore:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    async def __aenter__(self) -> Semaphore:
        await self.acquire_async()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()

    def stats(self) -> SemaphoreStats:
        with self._lock:
            return SemaphoreStats(self.permits, self._available, len(self._released))

    def __repr__(self) -> str:
        s = self.stats()
        return f"<Semaphore {s.available} of {s.permits} free, {s.waiting} waiting>"


# -------------------------------------------------------------------------------------------- channel


@dataclass(frozen=True, slots=True)
class ChannelStats:
    capacity: int
    items: int
    putters: int
    getters: int
    closed: bool


class Channel(Generic[T]):
    """A bounded FIFO queue between workers, threads and tasks alike, that can be closed (Hoare, CSP; Go's channels).

    Built on one lock, which guards the buffer and both queues, and two conditions: ``_not_empty``, notified when an
    item comes or the channel closes; ``_not_full``, notified when a place in the buffer is freed or the channel
    closes. Fairness: FIFO on both sides; an item goes to the oldest getter, a place to the oldest putter.
    Invariants: getters wait only while the buffer is empty, putters only while it is full.

    ``close()`` refuses every further ``put`` (waiting ones included: they had not been accepted) and lets the
    getters drain what is in the buffer; then they get ``ChannelClosed``, and ``for item in channel`` ends.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity!r}")
        self.capacity = capacity
        self._items: deque[T] = deque()
        self._closed = False
        self._lock = threading.Lock()
        self._not_empty = _FairCondition()
        self._not_full = _FairCondition()

    def _offer(self, item: T) -> bool:
        if self._closed:
            raise ChannelClosed("the channel is closed")
        if self._not_empty.grant_oldest(item):
            return True
        if len(self._items) < self.capacity:
            self._items.append(item)
            return True
        return False

    def _take(self) -> T:
        item = self._items.popleft()
        if len(self._items) < self.capacity and (putter := self._not_full.grant_oldest()):
            self._items.append(putter.value)
        return item

    def put_nowait(self, item: T) -> None:
        """Put at once, or raise ``queue.Full`` or ``ChannelClosed``."""
        with self._lock:
            if not self._offer(item):
                raise queue.Full

    def get_nowait(self) -> T:
        """Get at once, or raise ``queue.Empty``, or ``ChannelClosed`` when it is closed and drained."""
        with self._lock:
            if self._items:
                return self._take()
            if self._closed:
                raise ChannelClosed("the channel is closed and drained")
            raise queue.Empty

    def close(self) -> None:
        """Refuse further puts; getters drain what is there. May be called again."""
        with self._lock:
            self._closed = True
            self._not_full.wake_all_empty_handed()
            self._not_empty.wake_all_empty_handed()

    def put(self, item: T, timeout: float | None = None) -> None:
        """Put, blocking the thread while the buffer is full. Raises ``TimeoutError`` or ``ChannelClosed``."""
        with self._lock:
            if self._offer(item):
                return
            waiter = self._not_full.park(None, item)
        try:
            waiter.block(timeout)
        finally:
            self._leave(self._not_full, waiter)
        self._check(waiter)

    async def put_async(self, item: T) -> None:
        """Put, parking the task while the buffer is full. A cancelled put is delivered at most once."""
        with self._lock:
            if self._offer(item):
                return
            waiter = self._not_full.park(asyncio.get_running_loop(), item)
        try:
            await waiter.parked()
        finally:
            self._leave(self._not_full, waiter)
        self._check(waiter)

    def get(self, timeout: float | None = None) -> T:
        """Get, blocking the thread while the buffer is empty. Raises ``TimeoutError`` or ``ChannelClosed``."""
        with self._lock:
            if self._items:
                return self._take()
            if self._closed:
                raise ChannelClosed("the channel is closed and drained")
            waiter = self._not_empty.park(None)
        try:
            waiter.block(timeout)
        except BaseException:
            self._give_back(waiter)
            raise
        self._leave(self._not_empty, waiter)
        self._check(waiter)
        return waiter.value  # type: ignore[no-any-return]

    async def get_async(self) -> T:
        """Get, parking the task while the buffer is empty. A cancelled get takes nothing."""
        with self._lock:
            if self._items:
                return self._take()
            if self._closed:
                raise ChannelClosed("the channel is closed and drained")
            waiter = self._not_empty.park(asyncio.get_running_loop())
        try:
            await waiter.parked()
        except BaseException:
            self._give_back(waiter)
            raise
        self._check(waiter)
        return waiter.value  # type: ignore[no-any-return]

    def _leave(self, condition: _FairCondition, waiter: _Waiter) -> None:
        with self._lock:
            condition.leave(waiter)

    def _check(self, waiter: _Waiter) -> None:
        if not waiter.granted:
            raise (ChannelClosed("the channel is closed") if self._closed else TimeoutError("the channel did not move"))

    def _give_back(self, waiter: _Waiter) -> None:
        with self._lock:
            self._not_empty.leave(waiter)
            if not waiter.granted:
                return
            if not self._not_empty.grant_oldest(waiter.value):
                self._items.appendleft(waiter.value)

    def __iter__(self) -> Iterator[T]:
        try:
            while True:
                yield self.get()
        except ChannelClosed:
            return

    async def __aiter__(self) -> AsyncIterator[T]:
        try:
            while True:
                yield await self.get_async()
        except ChannelClosed:
            return

    def __len__(self) -> int:
        with self._lock:
            return len(self._items)

    def stats(self) -> ChannelStats:
        with self._lock:
            return ChannelStats(
                self.capacity, len(self._items), len(self._not_full), len(self._not_empty), self._closed
            )

    def __repr__(self) -> str:
        s = self.stats()
        state = "closed" if s.closed else "open"
        return f"<Channel {state} {s.items}/{s.capacity}, {s.putters} putting, {s.getters} getting>"
