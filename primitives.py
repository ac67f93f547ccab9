"""The mechanisms of a concurrent program, hand-written on the standard library: *when* something may happen.

Each is a *pure core* with two *thin shells*. The core is a decision, ``(now, event) -> what to do``: it never sleeps,
awaits, does I/O or calls foreign code. Time (``now``, in seconds of a monotonic clock) and randomness (``rng``) are
arguments, so that a test can play an hour in a millisecond and a failing seed again. The thread shell obeys with
``time.sleep``, the async shell with ``await asyncio.sleep``; they differ in nothing else. ``coordination`` has what
makes one worker wait for another; docs/primitives.md says what is promised and what is not.

``RetryPolicy``     bounded attempts, bounded total time; full jitter after the cap.
``Backoff``         the waits of a loop that never gives up, jittered in the same way.
``RetryBudget``     retries <= reserve + ratio * requests, always.
``TokenBucket``     at most ``burst + rate * t`` grants in *any* window of ``t`` seconds; FIFO, also for unequal sizes.
``SingleFlight``    one load at a time for each key, whoever asks; it ends when nobody wants it any more.
``TTLCache``        nothing outside of its windows is served, nothing above its bounds is kept; what is gone goes first.
``CircuitBreaker``  closed, open, half-open; a late result changes nothing; a call that never reports wedges nothing.
``Batch``           full at ``max_items`` or ``max_bytes``, due at ``max_age`` of its oldest item. It flushes nothing.

Each object owns one lock, which guards all its fields, held for the decision only: never while sleeping, never during
a call of the user's. So one object serves threads and tasks, of any number of event loops, at the same time (but a
``Backoff``, which has no lock and belongs to its loop). No lock is taken while another is held: the cache asks its
``SingleFlight`` after it let go of its own. No lock can be re-entered: a destructor or a signal handler that uses the
object which was just being used waits for itself. Nothing in this file starts a thread or a process; only ``hedged``
starts tasks, and ``SingleFlight``, one for each load that a task asks for.

Blocking verbs are for threads: ``SingleFlight.do`` in the thread of an event loop, for a key that a task of this loop
is loading, waits for ever. So does a load that asks for its own key.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import math
import random
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from types import CoroutineType, TracebackType
from typing import Any, Generic, Literal, NamedTuple, NoReturn

from coordination import Clock, FairCondition, K, Rng, T, Waiter, cancel_all, check_count, new_lock, stats_repr

RetryOn = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]
"""Which errors are meant: an exception type, several, or a predicate."""

NANOSECOND = 1e-9
"""The resolution of the clocks: a wait shorter than this is none (rounding would make one of it that never ends)."""


class CircuitOpen(Exception):
    """The breaker ``name`` refused a call; ask again in ``retry_after`` seconds (``retry`` waits for so long)."""

    def __init__(self, name: str, retry_after: float) -> None:
        super().__init__(name, retry_after)
        self.name, self.retry_after = name, retry_after

    def __str__(self) -> str:
        return f"circuit {self.name} is open for another {self.retry_after:.3g} s"


def _refuse(coroutine: Any, verb: str) -> NoReturn:
    """Making a coroutine is no answer, if that is all that a call did."""
    coroutine.close()
    raise TypeError(f"the call made a coroutine, which nobody awaits: use {verb}")


def _matches(error: BaseException, on: RetryOn) -> bool:
    return isinstance(error, on) if isinstance(on, (type, tuple)) else on(error)


def _check_on(on: object) -> None:
    """``TypeError`` for what is neither exception types nor a predicate: an error is no time to find that out."""
    if not callable(on) and not (isinstance(on, tuple) and all(isinstance(kind, type) for kind in on)):
        raise TypeError(f"on must be an exception type, a tuple of them, or a predicate, not {on!r}")


# ---------------------------------------------------------------------------------------------- retry


def _jittered(attempt: int, base: float, cap: float, rng: Rng) -> float:
    """Full jitter *after* the cap, so that capped waits still spread (Brooker, "Exponential Backoff And Jitter", AWS
    2015): uniform in [0, min(cap, base * 2**(attempt-1))]."""
    return rng() * min(cap, base * 2.0 ** min(attempt - 1, 62))


class Backoff:
    """The waits of a loop that tries for ever; the n-th since ``reset`` is uniform in [0, min(cap, base * 2**(n-1))].

    ``base`` and ``cap`` are seconds. It belongs to the loop that waits, and has no lock.
    """

    def __init__(self, base: float, cap: float, rng: Rng = random.random) -> None:
        if not (base >= 0 and cap >= 0):
            raise ValueError("base and cap are seconds, not below 0")
        self.base, self.cap, self._rng = base, cap, rng
        self.failures = 0  # in a row: how often ``next`` was asked since ``reset``

    def next(self) -> float:
        """Seconds to wait now that it failed once more."""
        self.failures += 1
        return _jittered(self.failures, self.base, self.cap, self._rng)

    def reset(self) -> None:
        """It went well: the next failure is the first."""
        self.failures = 0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again: exponential back-off with full jitter, bounded in attempts and in time.

    ``attempts`` counts all tries, the first included. The n-th wait is uniform in [0, min(cap, base * 2**(n-1))].
    ``base``, ``cap`` and ``total`` are seconds; no retry starts later than ``total`` after the first try.
    """

    attempts: int = 3
    base: float = 0.5
    cap: float = 30.0
    total: float = 120.0

    def __post_init__(self) -> None:
        check_count("attempts", self.attempts)
        if not (self.base >= 0 and self.cap >= 0 and self.total >= 0):
            raise ValueError("base, cap and total are seconds, not below 0")

    def delay(
        self, attempt: int, rng: Rng = random.random, retry_after: float | None = None, elapsed: float = 0.0
    ) -> float | None:
        """Seconds to wait after try number ``attempt`` (from 1) failed, or None: give up.

        A ``retry_after`` (seconds, from the server) replaces the back-off. ``elapsed`` is the time since the first
        try began.
        """
        if attempt >= self.attempts:
            return None
        delay = _jittered(attempt, self.base, self.cap, rng) if retry_after is None else max(0.0, retry_after)
        return delay if elapsed + delay <= self.total else None


class RetryBudgetStats(NamedTuple):
    """First calls, retries, those that were refused, and the retries that are saved up."""

    requests: int
    retries: int
    refused: int
    saved: float


class RetryBudget:
    """Caps retries to a share of the requests: retries <= reserve + ratio * requests.

    Every request earns ``ratio`` of a retry, up to ``reserve`` saved ones; every retry spends one. In an outage the
    load thus grows by ``ratio`` and not by the number of attempts (Finagle's retry budgets; the Google SRE book,
    chapter 22). It starts with ``reserve`` saved, for callers with little traffic.
    """

    _UNIT = 1_000_000  # whole numbers: no rounding error ever adds up to a retry

    def __init__(self, ratio: float = 0.1, reserve: int = 10) -> None:
        if not 0 <= ratio <= 1 or reserve < 0:
            raise ValueError("ratio is a share between 0 and 1, reserve a number of retries not below 0")
        self.ratio, self.reserve = ratio, reserve
        self._earn = int(ratio * self._UNIT)
        self._limit = max(reserve, 1) * self._UNIT
        self._saved = reserve * self._UNIT
        self._requests = self._retries = self._refused = 0
        self._lock = new_lock("RetryBudget")

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
        """The counts of this moment."""
        with self._lock:
            return RetryBudgetStats(self._requests, self._retries, self._refused, self._saved / self._UNIT)

    __repr__ = stats_repr


def _begun(on: RetryOn, budget: RetryBudget | None, clock: Clock) -> float:
    """When the first try begins."""
    if not callable(on):
        _check_on(on)
    if budget is not None:
        budget.request()
    return clock()


_GAVE_UP = "retry: gave up after"


def _after(
    error: Exception,
    history: list[str],
    on: RetryOn,
    policy: RetryPolicy,
    budget: RetryBudget | None,
    elapsed: float,
    rng: Rng,
) -> float | None:
    """The decision of both retry shells: seconds to wait before the next try; None when there is none: ``error`` now
    has the history as its note."""
    wanted = _matches(error, on)
    try:
        history.append(f"{type(error).__name__}: {error}")
    except Exception:  # of its __str__
        history.append(type(error).__name__)
    if wanted:
        retry_after = getattr(error, "retry_after", None)
        if not isinstance(retry_after, (int, float)):
            retry_after = None
        delay = policy.delay(len(history), rng, retry_after, elapsed)
        if delay is not None and (budget is None or budget.try_retry()):
            return delay
    if len(history) > 1:
        notes = getattr(error, "__notes__", [])
        notes[:] = [note for note in notes if not note.startswith(_GAVE_UP)]  # an error that is raised again and again
        error.add_note(f"{_GAVE_UP} {len(history)} attempts: " + "; ".join(history[-10:]))
    return None


_DEFAULT_POLICY = RetryPolicy()


def retry(
    call: Callable[[], T],
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
    ``TypeError`` if ``on`` is something else, or ``call`` a coroutine function.
    """
    started = _begun(on, budget, clock)
    history: list[str] = []
    while True:
        try:
            result = call()
        except Exception as error:
            delay = _after(error, history, on, policy, budget, clock() - started, rng)
            if delay is None:
                raise
        else:
            if type(result) is CoroutineType:
                _refuse(result, "retry_async")
            return result
        sleep(delay)


async def retry_async(
    call: Callable[[], Awaitable[T]],
    on: RetryOn,
    policy: RetryPolicy = _DEFAULT_POLICY,
    budget: RetryBudget | None = None,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    rng: Rng = random.random,
) -> T:
    """``retry`` for an async call. Cancellation is never retried."""
    started = _begun(on, budget, clock)
    history: list[str] = []
    while True:
        try:
            return await call()
        except Exception as error:
            delay = _after(error, history, on, policy, budget, clock() - started, rng)
            if delay is None:
                raise
        await sleep(delay)


async def hedged(call: Callable[[], Awaitable[T]], delay: float, budget: RetryBudget | None = None) -> T:
    """The first answer of two equal calls, the second of which starts if the first has not answered after ``delay``
    seconds and ``budget`` allows it (Dean and Barroso, "The Tail at Scale", CACM 2013). The other is cancelled and
    awaited. If both fail, the first one's error is raised. For calls that may be made twice only.
    """
    if budget is not None:
        budget.request()
    first = task = asyncio.ensure_future(_awaited(call))
    tasks = [first]
    done = pending = set(tasks)
    try:
        done, _ = await asyncio.wait(tasks, timeout=delay)
        if not done and (budget is None or budget.try_retry()):
            tasks.append(asyncio.ensure_future(_awaited(call)))
        pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled() and task.exception() is None:
                    return task.result()
        return await first
    finally:
        try:
            await cancel_all(tasks)
        finally:
            del first, tasks, done, pending, task


async def _awaited(call: Callable[[], Awaitable[T]]) -> T:
    return await call()


# --------------------------------------------------------------------------------------- token bucket


class _Place:
    """One who waits for ``n`` tokens: parked while its time depends on those ahead, then asleep until ``due``."""

    __slots__ = ("after", "due", "n", "waiter")

    def __init__(self, n: float, loop: asyncio.AbstractEventLoop | None) -> None:
        self.n, self.waiter = n, Waiter(loop)
        self.due = math.nan
        self.after = math.nan  # when the bucket will be full again after it

    def is_told(self) -> bool:
        return self.due == self.due

    def tell(self, due: float, after: float) -> bool:
        """False if its event loop is closed, and it will never go."""
        told, self.due, self.after = self.is_told(), due, after
        return told or self.waiter.wake()


class TokenBucketStats(NamedTuple):
    """Tokens a second, tokens at most, and those of now."""

    rate: float
    burst: float
    tokens: float  # what could be had at once; negative while reservations wait


class TokenBucket:
    """At most ``burst + rate * t`` tokens in any window of ``t`` seconds, granted first come, first served.

    Virtual scheduling, the continuous form of GCRA (ITU-T I.371, annex A): the whole state is one float, the
    time at which the bucket will be full again. Taking n tokens moves it n intervals ahead of the later of itself
    and now; the grant is due when it is no more than ``burst`` intervals away. A larger request thus never starves
    behind smaller ones: its place is booked when it asks. Should the clock step backwards, the bound still holds.

    ``acquire`` waits in a queue, the first of which sleeps until it is due and then wakes the next. One that leaves
    (cancelled, interrupted) hands its place to those behind, and all of them move up. Nobody is ever due later than
    it was told: what is fixed (``reserve``, ``pause``, ``set_rate``) leaves the times of those who wait as they are.

    ``rate`` is in tokens per second, ``burst`` in tokens (>= 1). Asking for more than ``burst`` at once is a
    ``ValueError``: it could only be granted by breaking the bound.
    """

    __slots__ = (
        *("_clock", "_depth", "_full_at", "_interval", "_lock", "_paused_until", "_queue", "_queued", "_reach"),
        *("_unpaused", "burst", "rate"),
    )

    def __init__(self, rate: float, burst: float = 1, *, clock: Clock = time.monotonic) -> None:
        self._check(rate, burst)
        self.rate, self.burst = rate, burst
        self._interval = 1.0 / rate
        self._depth = burst * self._interval
        self._reach = self._depth + NANOSECOND
        self._full_at = -math.inf
        self._paused_until = self._unpaused = -math.inf  # ``_unpaused``: what ``_full_at`` was before a pause moved it
        self._queue: deque[_Place] = deque()
        self._queued = 0.0  # tokens of those in the queue, which are in ``_full_at`` already
        self._clock = clock
        self._lock = new_lock("TokenBucket")

    @staticmethod
    def _check(rate: float, burst: float) -> None:
        if not (0 < rate < math.inf and 1.0 / rate < math.inf):
            raise ValueError(f"rate must be a positive number of tokens per second, not {rate!r}")
        if not (1 <= burst <= sys.float_info.max and burst / rate < math.inf):
            raise ValueError(f"burst must be a number of tokens >= 1, not {burst!r}")

    def reserve(self, n: float = 1, now: float | None = None) -> float:
        """Book ``n`` tokens and return the seconds to wait before using them (0.0: go)."""
        self._check_size(n)
        with self._lock:
            self._settle()
            wait, self._full_at = self._look(n, self._clock() if now is None else now)
            return wait

    def _check_size(self, n: float) -> None:
        if not 0 < n <= self.burst:
            raise ValueError(f"can grant between 0 and {self.burst} tokens at once, not {n!r}")

    def _look(self, n: float, now: float) -> tuple[float, float]:
        """Seconds until ``n`` tokens are due, and what ``_full_at`` is once they are taken."""
        after = max(self._full_at, now) + n * self._interval
        wait = max(after - self._depth, self._paused_until) - now
        return wait if wait > NANOSECOND else 0.0, after

    def wait_for(self, n: float = 1, now: float | None = None) -> float:
        """Seconds until ``n`` tokens could be had if nobody else asked; books nothing. ``n`` may exceed ``burst``."""
        with self._lock:
            if now is None:
                now = self._clock()
            due = max(self._full_at, now) + n * self._interval - self._depth
            wait = (due if due > self._paused_until else self._paused_until) - now
        return wait if wait > NANOSECOND else 0.0

    def pause(self, until: float) -> None:
        """Book nothing before ``until``, when one token is there and the rest refills (Retry-After).

        What was booked already keeps its time.
        """
        with self._lock:
            self._settle()
            if self._full_at != self._paused_until + self._depth - self._interval:
                self._unpaused = self._full_at
            self._paused_until = max(self._paused_until, until)
            self._full_at = max(self._full_at, self._paused_until + self._depth - self._interval)

    def set_rate(self, rate: float, now: float | None = None, burst: float | None = None) -> None:
        """Refill with ``rate`` tokens a second from ``now`` on, and hold at most ``burst`` (None: as before).

        The tokens that are there stay (as many as the new burst holds), none are given: over a window that spans the
        change at most the larger burst and what each rate refilled in its time is granted. What was booked for later
        keeps its time; then the new rate begins at the last of those times. A pause stays as it is.
        """
        burst = self.burst if burst is None else burst
        self._check(rate, burst)
        with self._lock:
            now = self._clock() if now is None else now
            self._settle()
            held = now < self._paused_until and self._full_at == self._paused_until + self._depth - self._interval
            full_at = self._unpaused if held else self._full_at
            interval, depth = 1.0 / rate, burst / rate
            tokens = (self._depth - max(0.0, full_at - now)) / self._interval
            if tokens < 0:  # what is booked ends when the bucket has just nothing left
                full_at += depth - self._depth
            elif full_at > now or burst > self.burst:
                full_at = now + max(0.0, burst - tokens) * interval
            self.rate, self.burst, self._interval, self._depth = rate, burst, interval, depth
            self._reach = depth + NANOSECOND
            self._full_at = full_at
            if now < self._paused_until:
                self._unpaused = full_at
                self._full_at = max(full_at, self._paused_until + depth - interval)

    def try_acquire(self, n: float = 1, now: float | None = None) -> bool:
        """Take ``n`` tokens if they are there at once, and nobody waits for them."""
        if not 0 < n <= self.burst:
            self._check_size(n)
        with self._lock:
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

    # Those who wait: their tokens are in ``_full_at``, so nobody comes before them.

    def _enter(self, n: float, timeout: float | None, loop: asyncio.AbstractEventLoop | None) -> _Place | bool:
        """A place in the queue; or, if there is nothing to wait for, whether the tokens were there."""
        self._check_size(n)
        with self._lock:
            now = self._clock()
            wait, after = self._look(n, now)
            if timeout is not None and wait > timeout:
                return False
            self._full_at = after
            if not wait:
                return True
            place = _Place(n, loop)
            self._queue.append(place)
            self._queued += n
            self._advance(now)
            return place

    def _advance(self, now: float) -> None:
        """Those who are due go, in order; the first of the others is told its time."""
        while self._queue:
            place = self._queue[0]
            after = self._full_at - (self._queued - place.n) * self._interval
            there = place.tell(max(after - self._depth, self._paused_until), after)
            if there and place.due - now > NANOSECOND:
                return
            self._remove(place, back=not there)

    def _remove(self, place: _Place, back: bool) -> None:
        self._queue.remove(place)
        self._queued = self._queued - place.n if self._queue else 0.0
        self._full_at -= place.n * self._interval if back else 0.0

    def _settle(self) -> None:
        """What does not move comes behind those who wait: they keep the times that they have now."""
        after = self._full_at - self._queued * self._interval
        for place in self._queue:
            after += place.n * self._interval
            place.tell(max(after - self._depth, self._paused_until), after)
        self._queue.clear()
        self._queued = 0.0

    def _leave(self, place: _Place, back: bool) -> None:
        """It goes; or it gives its place back: to those behind, else to the bucket."""
        with self._lock:
            if place in self._queue:
                self._remove(place, back)
            elif back and self._full_at == place.after:
                floor = self._paused_until + self._depth - self._interval
                self._full_at = max(place.after - place.n * self._interval, floor)
            self._advance(self._clock())

    def acquire(self, n: float = 1, timeout: float | None = None) -> bool:
        """Take ``n`` tokens, sleeping until they are due; False, at once, if that is not within ``timeout`` seconds."""
        if self.try_acquire(n):
            return True
        place = self._enter(n, timeout, None)
        if isinstance(place, bool):
            return place
        back = True
        try:
            if not place.is_told():
                place.waiter.block(None)
            while (wait := place.due - self._clock()) > NANOSECOND:
                time.sleep(wait)
            back = False
        finally:
            self._leave(place, back)
        return True

    async def acquire_async(self, n: float = 1, timeout: float | None = None) -> bool:
        """``acquire`` for tasks. A cancelled one has taken nothing."""
        # What try_acquire does: to call it would be a third of the time, ``with`` another. A signal handler that
        # raises between the next two lines would leave the lock held; in a thread that matters, here the loop ends.
        lock = self._lock
        lock.acquire()
        try:
            now = self._clock()
            after = self._full_at
            if after < now:
                after = now
            after += n * self._interval
            if after <= now + self._reach and now >= self._paused_until and 0 < n <= self.burst:
                self._full_at = after
                return True
        finally:
            lock.release()
        place = self._enter(n, timeout, asyncio.get_running_loop())
        if isinstance(place, bool):
            return place
        back = True
        try:
            if not place.is_told():
                await place.waiter.parked()
            while (wait := place.due - self._clock()) > NANOSECOND:  # noqa: ASYNC110
                await asyncio.sleep(wait)
            back = False
        finally:
            self._leave(place, back)
        return True

    def stats(self, now: float | None = None) -> TokenBucketStats:
        """The counts of ``now`` (seconds by its clock; None: of this moment)."""
        with self._lock:
            now = self._clock() if now is None else now
            tokens = self.burst - max(0.0, self._full_at - now) * self.rate
            return TokenBucketStats(self.rate, self.burst, tokens)

    __repr__ = stats_repr


# -------------------------------------------------------------------------------------- single flight

_ABSENT: Any = object()
_LEAD: Any = object()  # what a follower is granted when the leader left without an answer: to load by itself


class _Answer(NamedTuple):
    value: Any = None
    error: BaseException | None = None
    traceback: TracebackType | None = None


class _Flight(FairCondition):
    """One load: those who follow, in order; and, if tasks load, the load's own task and the one that began it."""

    __slots__ = ("leader", "task")

    def __init__(self) -> None:
        self._waiters = deque()
        self.leader: Waiter | None = None
        self.task: asyncio.Task[None] | None = None


class SingleFlightStats(NamedTuple):
    """Loads that run and who waits for them; loads begun since the start, and calls that shared one."""

    flights: int
    waiting: int
    loads: int
    shared: int


class SingleFlight:
    """One load for any number of callers that want the same key at the same time (Go's x/sync/singleflight).

    The first caller leads, the others follow: all get the answer of its ``load``, be it a value or an ``Exception``,
    which is raised in each. A task leads by a task of its own for the load, which goes on when it leaves, as long as
    anybody waits; who leaves last cancels it, and goes when it has ended. A thread loads by itself. A load that is
    killed (cancelled, interrupted: any other ``BaseException``) says nothing about the key: its leader has that from
    it, and the oldest follower runs its own ``load``. A load that asks for its own key waits for itself for ever.
    Built on one lock, which guards the flights and their queues.
    """

    def __init__(self) -> None:
        self._lock = new_lock("SingleFlight")
        self._flights: dict[Hashable, _Flight] = {}
        self._loads = self._shared = 0

    def _join(self, key: Hashable, loop: asyncio.AbstractEventLoop | None) -> tuple[_Flight, Waiter | None]:
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                return flight, flight.park(loop)
            self._loads += 1
            flight = self._flights[key] = _Flight()
            return flight, None

    def _finish(self, key: Hashable, flight: _Flight, answer: _Answer | None) -> None:
        """The load ends: with an answer for all, or without one, and then the oldest follower leads."""
        with self._lock:
            leader, flight.leader, flight.task = flight.leader, None, None
            if leader is not None:
                leader.granted, leader.value = True, answer or _Answer(None, asyncio.CancelledError())
                leader.wake()
            if answer is None and flight.grant_oldest(_LEAD):
                self._loads += 1
                return
            if self._flights.get(key) is flight:
                del self._flights[key]
            while flight.grant_oldest(answer):
                self._shared += 1

    def _leave(self, key: Hashable, flight: _Flight, waiter: Waiter) -> asyncio.Task[None] | None:
        """It waits no longer. If nobody does, the task of the load, which is told to end."""
        with self._lock:
            flight.leave(waiter)
            if flight.leader is waiter:
                flight.leader = None
            leads = waiter.granted and waiter.value is _LEAD
            self._loads -= leads
            task = flight.task if flight.leader is None and not len(flight) else None
            if task is not None and self._flights.get(key) is flight:
                del self._flights[key]
        if leads:
            self._finish(key, flight, None)
        if task is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                task.get_loop().call_soon_threadsafe(task.cancel)
        return task

    def _answer(self, waiter: Waiter) -> Any:
        answer, waiter.value = waiter.value, None
        if answer.error is None:
            return answer.value
        try:  # the traceback of the load: else each of a thousand followers would lengthen it
            raise answer.error.with_traceback(answer.traceback)
        finally:
            del answer

    def do(self, key: Hashable, load: Callable[[], T]) -> T:
        """The answer of the one load of ``key`` that is under way, or of ``load()``."""
        flight, waiter = self._join(key, None)
        if waiter is not None:
            waiter.block_or(lambda waiter: self._leave(key, flight, waiter), None)
            if waiter.value is not _LEAD:
                return self._answer(waiter)  # type: ignore[no-any-return]
        answer = None
        try:
            value = load()
            if type(value) is CoroutineType:
                _refuse(value, "do_async")
            answer = _Answer(value)
            return value
        except Exception as error:
            answer = _Answer(None, error, error.__traceback__)
            raise
        finally:
            self._finish(key, flight, answer)
            del answer

    async def do_async(self, key: Hashable, load: Callable[[], Awaitable[T]]) -> T:
        """``do`` for tasks; threads and tasks may share a flight."""
        loop = asyncio.get_running_loop()
        flight, waiter = self._join(key, loop)
        if waiter is not None:
            await self._parked(key, flight, waiter)
        if waiter is None or waiter.value is _LEAD:
            waiter = flight.leader = Waiter(loop)
            task = flight.task = loop.create_task(self._run(key, flight, load))
            task.add_done_callback(lambda _: self._finish(key, flight, None) if flight.task is task else None)
            await self._parked(key, flight, waiter)
        return self._answer(waiter)  # type: ignore[no-any-return]

    async def _parked(self, key: Hashable, flight: _Flight, waiter: Waiter) -> None:
        try:
            await waiter.parked()
        except BaseException as error:
            load = self._leave(key, flight, waiter)
            if load and isinstance(error, asyncio.CancelledError) and load.get_loop() is asyncio.get_running_loop():
                await asyncio.wait((load,))
            raise

    async def _run(self, key: Hashable, flight: _Flight, load: Callable[[], Awaitable[T]]) -> None:
        answer = None
        try:
            answer = _Answer(await load())
        except Exception as error:
            answer = _Answer(None, error, error.__traceback__)
        finally:
            self._finish(key, flight, answer)
            del answer

    def forget(self, key: Hashable) -> None:
        """Whoever comes from now on loads anew; those who follow already still get the old flight's answer."""
        with self._lock:
            self._flights.pop(key, None)

    def clear(self) -> None:
        """``forget`` every key."""
        with self._lock:
            self._flights = {}

    def stats(self) -> SingleFlightStats:
        """The counts of this moment."""
        with self._lock:
            waiting = sum(map(len, self._flights.values()))
            return SingleFlightStats(len(self._flights), waiting, self._loads, self._shared)

    __repr__ = stats_repr


# ---------------------------------------------------------------------------------------------- cache


class Hit(NamedTuple, Generic[T]):
    """What a cache knows: ``age`` in seconds; ``expired`` is for use only if loading fails."""

    value: T
    age: float
    state: Literal["fresh", "stale", "expired"]
    needs_refresh: bool


class _Entry:
    __slots__ = ("expires_at", "fresh_until", "key", "put_at", "quiet_until", "stale_until", "value", "weight")

    def __init__(self, key: Any, value: Any, put_at: float, fresh_until: float, weight: float) -> None:
        self.key = key  # the object that is the key in the map: it is let go with the value, after the lock
        self.value, self.put_at, self.weight = value, put_at, weight
        self.fresh_until = self.stale_until = self.expires_at = fresh_until
        self.quiet_until = -math.inf


class TTLCacheStats(NamedTuple):
    """Living entries and their weight, and counts since the start."""

    entries: int
    weight: float
    hits: int
    misses: int  # of ``get`` and ``lookup``
    evicted: int
    loading: int


class TTLCache(Generic[K, T]):
    """A bounded map whose entries age: fresh, then stale but of use, then gone.

    An entry is *fresh* for ``ttl`` seconds. After that it is *stale* for ``stale`` seconds: of use at once, while
    somebody loads it anew (stale-while-revalidate); and until ``stale_if_error`` seconds after ``ttl`` it is
    *expired*: of use only if loading fails. Both windows begin where freshness ends, as in RFC 5861.

    At most ``maxsize`` entries of at most ``maxweight`` in sum (of the ``weight`` given to ``put``: bytes, say) are
    kept; what is gone goes first, then the least recently used. What is gone is not counted.
    """

    def __init__(
        self,
        maxsize: int = 1024,
        ttl: float = 60.0,
        *,
        stale: float = 0.0,
        stale_if_error: float = 0.0,
        maxweight: float = math.inf,
        clock: Clock = time.monotonic,
    ) -> None:
        check_count("maxsize", maxsize)
        if not maxweight > 0:
            raise ValueError("maxweight must be above 0")
        if not (ttl > 0 and stale >= 0 and stale_if_error >= 0):
            raise ValueError("ttl must be above 0 s, stale and stale_if_error not below 0")
        self.maxsize, self.maxweight = maxsize, maxweight
        self.ttl, self.stale, self.stale_if_error = ttl, stale, stale_if_error
        self._clock = clock
        self._lock = new_lock("TTLCache")
        self._entries: OrderedDict[K, _Entry] = OrderedDict()
        self._gone_from = math.inf  # no entry is gone before
        self._endings: list[tuple[float, int, _Entry]] | None = None
        """A heap of when each entry is gone; None until that matters. Entries that were replaced may still be in it."""
        self._serial = itertools.count()
        self._generations = [0] * 64  # by hash: of bounded size, and a key that shares one only loads once more
        self._weight = 0.0
        self._hits = self._misses = self._evicted = 0
        self._flights = SingleFlight()

    def get(self, key: K, default: T | None = None) -> T | None:
        """The value while it is fresh, else ``default``."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or self._clock() >= entry.fresh_until:
                self._misses += 1
                return default
            self._entries.move_to_end(key)
            self._hits += 1
            return entry.value  # type: ignore[no-any-return]

    def lookup(self, key: K, now: float | None = None) -> Hit[T] | None:
        """What is known of ``key``, whatever its state; None if it is gone or never was."""
        dropped = []  # let go after the lock: a destructor is foreign code
        with self._lock:
            now = self._clock() if now is None else now
            entry = self._entries.get(key)
            if entry is None or now >= entry.expires_at:
                self._misses += 1
                dropped.append(self._remove(key))
                return None
            self._entries.move_to_end(key)
            self._hits += 1
            state: Literal["fresh", "stale", "expired"] = "expired"
            if now < entry.stale_until:
                state = "fresh" if now < entry.fresh_until else "stale"
            return Hit(entry.value, now - entry.put_at, state, state != "fresh" and now >= entry.quiet_until)

    def put(
        self,
        key: K,
        value: T,
        *,
        ttl: float | None = None,
        weight: float = 1.0,
        generation: int | None = None,
        now: float | None = None,
    ) -> bool:
        """Keep ``value``; False if it is heavier than the cache, or if ``key`` was invalidated since ``generation``."""
        if ttl is None:
            ttl = self.ttl
        if not (ttl > 0 and weight >= 0):
            raise ValueError("ttl must be above 0 s, weight not below 0")
        dropped = []
        with self._lock:
            if generation is not None and generation != self._generations[hash(key) % 64]:
                return False
            now = self._clock() if now is None else now
            entry = _Entry(key, value, now, now + ttl, weight)
            entry.stale_until += self.stale
            entry.expires_at += max(self.stale, self.stale_if_error)
            dropped.append(self._remove(key))
            if weight > self.maxweight:
                return False
            if len(self._entries) >= self.maxsize or self._weight + weight > self.maxweight:
                if now >= self._gone_from:
                    dropped += self._expire(now)
                while self._entries and (len(self._entries) >= self.maxsize or self._weight + weight > self.maxweight):
                    dropped.append(self._remove(next(iter(self._entries))))
                    self._evicted += 1
            self._entries[key] = entry
            self._weight += weight
            if entry.expires_at < self._gone_from:
                self._gone_from = entry.expires_at
            if self._endings is not None:
                heapq.heappush(self._endings, (entry.expires_at, next(self._serial), entry))
                if len(self._endings) > 2 * len(self._entries) + 64:
                    self._endings = None
            return True

    def _expire(self, now: float) -> list[tuple[Any, Any] | None]:
        """Let go what is gone. The caller has the lock, and keeps the answer until after it."""
        dropped: list[tuple[Any, Any] | None] = []
        if now < self._gone_from:
            return dropped
        if self._endings is None:
            self._endings = [(entry.expires_at, next(self._serial), entry) for entry in self._entries.values()]
            heapq.heapify(self._endings)
        while self._endings and self._endings[0][0] <= now:
            entry = heapq.heappop(self._endings)[2]
            if self._entries.get(entry.key) is entry:
                dropped.append(self._remove(entry.key))
        self._gone_from = self._endings[0][0] if self._endings else math.inf
        return dropped

    def _remove(self, key: K) -> tuple[Any, Any] | None:
        """Its key and its value, which the entry does not keep: ``_endings`` may have it for long."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self._weight = self._weight - entry.weight if self._entries else 0.0
        removed = entry.key, entry.value
        entry.key = entry.value = None
        return removed

    def generation(self, key: K) -> int:
        """To be read before a load and given to ``put``, so that what was loaded before ``invalidate`` is not kept."""
        return self._generations[hash(key) % 64]

    def invalidate(self, key: K) -> bool:
        """Forget ``key``, and what is being loaded for it; True if it was there."""
        with self._lock:
            self._generations[hash(key) % 64] += 1
            removed = self._remove(key)
        self._flights.forget(key)
        return removed is not None

    def clear(self) -> None:
        """``invalidate`` everything."""
        with self._lock:
            self._generations = [generation + 1 for generation in self._generations]
            dropped = self._entries, self._endings
            self._entries, self._endings, self._weight = OrderedDict(), None, 0.0
        self._flights.clear()
        del dropped

    def defer(self, key: K, seconds: float, now: float | None = None) -> None:
        """Ask for no refresh of ``key`` for so long: its last one failed."""
        with self._lock:
            if (entry := self._entries.get(key)) is not None:
                entry.quiet_until = (self._clock() if now is None else now) + seconds

    def get_or_load(self, key: K, load: Callable[[], T]) -> T:
        """The value while it is fresh, else that of ``load()``, which is kept: one load at a time, whoever asks.

        If it fails, all who wait get the error; nothing is kept of that.
        """
        found = self._fresh(key)
        return self._flights.do(key, lambda: self._load(key, load)) if found is _ABSENT else found

    async def get_or_load_async(self, key: K, load: Callable[[], Awaitable[T]], *, anew: bool = False) -> T:
        """``get_or_load`` for tasks. ``anew``: load though it is fresh, unless that is under way."""
        found = _ABSENT if anew else self._fresh(key)
        if found is not _ABSENT:
            return found  # type: ignore[no-any-return]
        return await self._flights.do_async(key, lambda: self._load_async(key, load, anew))

    def _fresh(self, key: K) -> Any:
        """Its value, or ``_ABSENT``: asked for by who leads, too, since another load may have come and gone."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or self._clock() >= entry.fresh_until:
                return _ABSENT
            self._entries.move_to_end(key)
            self._hits += 1
            return entry.value

    def _load(self, key: K, load: Callable[[], T]) -> T:
        generation, value = self.generation(key), self._fresh(key)
        if value is _ABSENT:
            value = load()
            if type(value) is CoroutineType:
                _refuse(value, "get_or_load_async")
            self.put(key, value, generation=generation)
        return value  # type: ignore[no-any-return]

    async def _load_async(self, key: K, load: Callable[[], Awaitable[T]], anew: bool) -> T:
        generation, value = self.generation(key), _ABSENT if anew else self._fresh(key)
        if value is _ABSENT:
            value = await load()
            self.put(key, value, generation=generation)
        return value  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return self.stats().entries

    def __contains__(self, key: K) -> bool:
        """Whether ``key`` is there and fresh; changes nothing."""
        with self._lock:
            entry = self._entries.get(key)
            return entry is not None and self._clock() < entry.fresh_until

    def stats(self) -> TTLCacheStats:
        """The counts of this moment."""
        loading = self._flights.stats().flights
        with self._lock:
            gone = self._expire(self._clock())
            counts = self._hits, self._misses, self._evicted, loading
            found = TTLCacheStats(len(self._entries), self._weight, *counts)
        del gone
        return found

    __repr__ = stats_repr


# ------------------------------------------------------------------------------------ circuit breaker

State = Literal["closed", "open", "half_open"]
Listener = Callable[[str, State, State, int], object]
"""Told the breaker's name, the state before and after, and the generation that begins."""


class Permit:
    """The ticket of one call, closed once: as ``success``, ``failure`` or ``ignore``. What comes later is ignored."""

    __slots__ = ("_breaker", "generation", "settled")

    def __init__(self, breaker: CircuitBreaker, generation: int) -> None:
        self._breaker, self.generation, self.settled = breaker, generation, False

    def success(self, now: float | None = None) -> None:
        """The call came to a good end."""
        self._breaker._settle(self, failed=False, now=now)

    def failure(self, now: float | None = None) -> None:
        """The other side failed."""
        self._breaker._settle(self, failed=True, now=now)

    def ignore(self) -> None:
        """The call says nothing about the other side: cancelled, or at fault itself."""
        self._breaker._settle(self, failed=None)

    def __enter__(self) -> Permit:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        failed: bool | None = False if error is None else None
        try:
            if isinstance(error, Exception):
                failed = _matches(error, self._breaker._on) or None
        finally:
            self._breaker._settle(self, failed=failed)


class CircuitBreakerStats(NamedTuple):
    """Its state, failures in the window, calls refused, times opened, and seconds until it may be called again."""

    name: str
    state: State
    failures: int
    refused: int
    opened: int
    retry_after: float


class CircuitBreaker:
    """Stops calling a dependency that keeps failing (Nygard, "Release It!", 2nd edition, chapter 5).

    *Closed*: calls pass. ``failures`` in a row (None: any number) within ``window`` seconds open the circuit; so does,
    if ``ratio`` is given, that share of at least ``minimum`` calls in the window (counted in tenths of it). *Open*:
    calls are refused with ``CircuitOpen`` for ``reset`` seconds; each repeated opening doubles that up to
    ``max_reset``, and then up to ``jitter`` of it is added, so that many clients do not come back together.
    *Half-open*: ``probes`` calls are let through, and close the circuit when all succeed; one failure opens it again.
    A probe that has not reported after ``probe_timeout`` seconds (default: ``reset``) makes room for another; whatever
    it reports later still counts, if the circuit is half-open as it was.

    What ``on`` names is a failure. Other errors, cancellation and all else that is no ``Exception`` say nothing about
    the other side and are ignored: so a time limit belongs inside of the protected call, where it raises
    ``TimeoutError``.

    A result counts only for the state in which the call was admitted: each transition begins a new generation.
    Listeners are told after the lock is released.
    """

    def __init__(
        self,
        name: str,
        *,
        failures: int | None = 5,
        window: float = 10.0,
        reset: float = 30.0,
        probes: int = 1,
        ratio: float | None = None,
        minimum: int = 20,
        max_reset: float = 300.0,
        jitter: float = 0.1,
        probe_timeout: float | None = None,
        on: RetryOn = Exception,
        clock: Clock = time.monotonic,
        rng: Rng = random.random,
    ) -> None:
        if min(failures or 1, probes, minimum) < 1 or failures == 0:
            raise ValueError("failures, probes and minimum must be at least 1")
        if not (window > 0 and reset > 0 and max_reset >= reset and jitter >= 0):
            raise ValueError("window and reset must be above 0 s, max_reset not below reset, jitter not below 0")
        if probe_timeout is not None and not probe_timeout > 0:
            raise ValueError(f"probe_timeout must be above 0 s, not {probe_timeout!r}")
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"ratio is a share above 0 and up to 1, not {ratio!r}")
        self.name, self.window, self.reset, self.probes, self.ratio = name, window, reset, probes, ratio
        self.minimum, self.max_reset, self.jitter = minimum, max_reset, jitter
        self.probe_timeout = reset if probe_timeout is None else probe_timeout
        _check_on(on)
        self._on, self._clock, self._rng = on, clock, rng
        self._lock = new_lock("CircuitBreaker")
        self._state: State = "closed"
        self._generation = self._refused = self._opened = self._passed = 0
        self._calls = self._failed = 0
        self._openings = 0  # in a row, without the circuit having been closed between them
        self._open_until = -math.inf
        self._failures: deque[float] = deque(maxlen=failures or 0)  # when, since the last success
        self._tenths: deque[list[int]] = deque()
        """For each tenth of the window: its number, its calls, its failures; their sums are _calls and _failed."""
        self._probing: dict[Permit, float] = {}  # probes under way, and when they expire
        self._listeners: list[Listener] = []
        self._news: deque[tuple[State, State, int]] = deque()
        self._telling = False
        self._unrecorded: int | None = 0 if ratio is None else None
        """The generation while it is closed and a success changes nothing, and so neither costs a lock; else None."""

    def listen(self, listener: Listener) -> None:
        """Call ``listener`` at each transition from now on, in whatever thread or task brought it about."""
        self._listeners.append(listener)

    @property
    def state(self) -> State:
        """What whoever asks now would find: half open once the reset has passed, though no probe was made yet."""
        return self.stats().state

    def permit(self, now: float | None = None) -> Permit:
        """Admit one call, or raise ``CircuitOpen``. ``with breaker.permit():`` closes the permit by how it ends."""
        generation, refusal = self._unrecorded, 0.0
        if generation is not None:
            return Permit(self, generation)
        with self._lock:
            now = self._clock() if now is None else now
            if self._state == "open" and self._open_until - now <= NANOSECOND:
                self._turn("half_open")
            permit = Permit(self, self._generation)
            if self._state == "open":
                refusal = self._open_until - now
            elif self._state == "half_open":
                self._probing = {probe: end for probe, end in self._probing.items() if end - now > NANOSECOND}
                if len(self._probing) + self._passed < self.probes:
                    self._probing[permit] = now + self.probe_timeout
                else:
                    refusal = min(self._probing.values()) - now
            self._refused += refusal > 0
        self._tell()
        if refusal > 0:
            raise CircuitOpen(self.name, refusal)
        return permit

    def trip(self, now: float | None = None) -> None:
        """Open the circuit, if it is closed: somebody else has seen the failures."""
        with self._lock:
            if self._state == "closed":
                self._open(self._clock() if now is None else now)
        self._tell()

    def _settle(self, permit: Permit, failed: bool | None, now: float | None = None) -> None:
        if failed is False and permit.generation == self._unrecorded:
            permit.settled = True
            return
        with self._lock:
            if permit.settled:
                return
            permit.settled = True
            if permit.generation != self._generation:
                return
            now = self._clock() if now is None else now
            if self._state == "half_open":
                self._probing.pop(permit, None)
                if failed is None:
                    return
                if failed:
                    self._open(now)
                else:
                    self._passed += 1
                    if self._passed == self.probes:
                        self._turn("closed")
            elif failed is not None:
                self._record(failed, now)
        self._tell()

    def _record(self, failed: bool, now: float) -> None:
        """Count a call of the closed circuit, and open it if that was one too many."""
        if self.ratio is not None:
            tenth = math.floor(now / self.window * 10)
            if not self._tenths or self._tenths[-1][0] < tenth:
                self._tenths.append([tenth, 0, 0])
            while self._tenths[0][0] <= tenth - 10:
                _, calls, failures = self._tenths.popleft()
                self._calls -= calls
                self._failed -= failures
            self._tenths[-1][1] += 1
            self._tenths[-1][2] += failed
            self._calls += 1
            self._failed += failed
            if self._calls >= self.minimum and self._failed >= self.ratio * self._calls:
                self._open(now)
                return
        if not failed:
            self._failures.clear()
            self._unrecorded = self._generation if self.ratio is None else None
        elif self._failures.maxlen:
            self._unrecorded = None
            while self._failures and now - self._failures[0] >= self.window:
                self._failures.popleft()
            self._failures.append(now)
            if len(self._failures) == self._failures.maxlen and now - self._failures[0] < self.window:
                self._open(now)

    def _open(self, now: float) -> None:
        pause = min(self.max_reset, self.reset * 2.0 ** min(self._openings, 62))
        self._openings += 1
        self._opened += 1
        self._open_until = now + pause * (1.0 + self.jitter * self._rng())
        self._turn("open")

    def _turn(self, state: State) -> None:
        self._generation += 1
        self._news.append((self._state, state, self._generation))
        self._state = state
        self._failures.clear()
        self._tenths.clear()
        self._calls = self._failed = 0
        self._probing.clear()
        self._passed = 0
        if state == "closed":
            self._openings = 0
        self._unrecorded = self._generation if self.ratio is None and state == "closed" else None

    def _tell(self) -> None:
        """One teller at a time, or listeners would hear of transitions in another order; it also tells what comes up
        meanwhile."""
        while self._news:
            with self._lock:
                if self._telling or not self._news:
                    return
                self._telling = True
                before, after, generation = self._news.popleft()
            try:
                for listener in self._listeners:
                    try:
                        listener(self.name, before, after, generation)
                    except Exception:
                        logging.getLogger(__name__).exception("listener of circuit %s", self.name)
            finally:
                self._telling = False

    async def call_async(self, function: Callable[..., Awaitable[T]], /, *args: Any, **options: Any) -> T:
        """``await function(*args, **options)``, or ``CircuitOpen``. Nothing is locked while it runs."""
        generation = self._unrecorded
        if generation is None:
            with self.permit():
                return await function(*args, **options)
        try:
            result = await function(*args, **options)
        except BaseException as error:
            Permit(self, generation).__exit__(None, error, None)
            raise
        if generation != self._unrecorded:  # others failed meanwhile
            self._settle(Permit(self, generation), failed=False)
        return result

    def stats(self, now: float | None = None) -> CircuitBreakerStats:
        """The counts of ``now`` (seconds by its clock; None: of this moment)."""
        with self._lock:
            now = self._clock() if now is None else now
            wait = max(0.0, self._open_until - now) if self._state == "open" else 0.0
            state: State = "half_open" if self._state == "open" and wait <= NANOSECOND else self._state
            recent = sum(now - failure < self.window for failure in self._failures)
            return CircuitBreakerStats(self.name, state, recent, self._refused, self._opened, wait)

    __repr__ = stats_repr


# ---------------------------------------------------------------------------------------------- batch


class BatchStats(NamedTuple):
    """What waits."""

    items: int
    age: float  # seconds that the oldest has waited


class Batch(Generic[T]):
    """Gathers items until there are ``max_items`` of them, or ``max_bytes``, or the oldest has waited ``max_age`` s.

    A batch never has more than ``max_bytes``, unless it is of one item.
    """

    def __init__(
        self, max_items: int, max_age: float, max_bytes: float = math.inf, *, clock: Clock = time.monotonic
    ) -> None:
        check_count("max_items", max_items)
        if not max_age > 0 or not max_bytes > 0:
            raise ValueError("max_age must be above 0 s, max_bytes above 0")
        self.max_items, self.max_age, self.max_bytes = max_items, max_age, max_bytes
        self._clock = clock
        self._lock = new_lock("Batch")
        self._items: list[T] = []
        self._begun = 0.0
        self._bytes: float = 0

    def add(self, item: T, now: float | None = None, size: float = 0) -> list[T] | None:
        """Take ``item``, of ``size`` bytes. A batch if one is full: the caller's to flush, nobody else gets it.

        It has ``item``, unless that would be too many bytes: then this is the first of the next one.
        """
        with self._lock:
            full = self._take() if size and self._items and self._bytes + size > self.max_bytes else None
            self._bytes += size
            items = self._items
            if not items:
                self._begun = self._clock() if now is None else now
            items.append(item)
            if full is None and (len(items) >= self.max_items or (size and self._bytes >= self.max_bytes)):
                return self._take()
            return full

    def due_in(self, now: float | None = None) -> float:
        """Seconds until ``take`` has something: the oldest is ``max_age`` old then; infinity if there is none."""
        with self._lock:
            if not self._items:
                return math.inf
            return max(0.0, self._due() - (self._clock() if now is None else now))

    def take(self, now: float | None = None) -> list[T]:
        """All items if they are due, else none."""
        with self._lock:
            now = self._clock() if now is None else now
            return self._take() if self._items and now >= self._due() else []

    def _due(self) -> float:
        return self._begun + self.max_age if self._bytes < self.max_bytes else -math.inf

    def drain(self) -> list[T]:
        """All items, due or not: at the end."""
        with self._lock:
            return self._take()

    def _take(self) -> list[T]:
        items, self._items, self._bytes = self._items, [], 0
        return items

    def __len__(self) -> int:
        return len(self._items)

    def stats(self, now: float | None = None) -> BatchStats:
        """The counts of ``now`` (seconds by its clock; None: of this moment)."""
        with self._lock:
            now = self._clock() if now is None else now
            return BatchStats(len(self._items), now - self._begun if self._items else 0.0)

    __repr__ = stats_repr
