"""The mechanisms of a concurrent program, hand-written on the standard library.

Every mechanism here is a *pure core* with two *thin shells*:

- The core is a decision: ``(now, event) -> what to do``. It never sleeps, awaits, does I/O or calls foreign code.
  Time (``now``, in seconds of a monotonic clock) and randomness (``rng``) are arguments, so that a test can play an
  hour in a millisecond and a failing seed can be played again.
- The thread shell obeys the decision with ``time.sleep``, the async shell with ``await asyncio.sleep``. They differ
  in nothing else.

This file decides *when* something may happen; ``coordination`` has what makes one worker wait for another.

==================  ==============================================================================================
mechanism           promise (and what is not promised)
==================  ==============================================================================================
``RetryPolicy``     bounded attempts, bounded total time; full jitter after the cap. Not promised: idempotence of
                    what is retried; that is the caller's knowledge.
``RetryBudget``     retries <= reserve + ratio * requests, always.
``TokenBucket``     at most ``burst + rate * t`` grants in *any* window of ``t`` seconds; FIFO, also for unequal sizes.
                    Not promised: that a grant which was given back in the middle of the queue is used by others.
``SingleFlight``    one load at a time for each key, whoever asks; a failure is shared, a cancelled leader replaced.
                    Not promised: anything about loads that do not overlap.
``TTLCache``        nothing outside of its windows is served, nothing above its bounds is kept. Not promised: that
                    what is within them is still true.
``CircuitBreaker``  closed, open, half-open; a late result of an earlier state changes nothing; a call that never
                    reports wedges nothing. Not promised: that nobody suffers from a probe; probes are real calls.
``Batch``           full at ``max_items``, due at ``max_age`` of its oldest item. It says when; it flushes nothing.
==================  ==============================================================================================

Each object owns one lock, which guards all its fields, held for the decision only: never while sleeping, never during
a call of the user's (a load runs in the caller's thread or task). So one object serves threads and tasks, of any
number of event loops, at the same time. No lock is taken while another is held: the cache asks its ``SingleFlight``
after it let go of its own. No lock can be re-entered: a destructor or a signal handler that uses the object which was
just being used waits for itself. Nothing in this file starts a thread, a task or a process: what expired is dropped
when it is looked up, or when its place is needed; what is stale is loaded by one of those who want it.

Blocking verbs are for threads: ``SingleFlight.do`` in the thread of an event loop, for a key that a task of this loop
is loading, waits for ever. So does a load that asks for its own key.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import random
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from dataclasses import dataclass
from types import CoroutineType, TracebackType
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

from coordination import Clock, FairCondition, K, Rng, T, Waiter, new_lock, stats_repr

F = TypeVar("F", bound=Callable[..., Any])

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


def _answered(result: T) -> T:
    """Making a coroutine is no success: ``TypeError`` if that is all that a call did."""
    if type(result) is CoroutineType:
        result.close()  # type: ignore[attr-defined]
        raise TypeError("a circuit breaker sees how a coroutine ends by call_async, or by decorating its async def")
    return result


def _matches(error: BaseException, on: RetryOn) -> bool:
    return isinstance(error, on) if isinstance(on, (type, tuple)) else on(error)


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
        self, attempt: int, rng: Rng = random.random, retry_after: float | None = None, elapsed: float = 0.0
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


class RetryBudgetStats(NamedTuple):
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
        with self._lock:
            return RetryBudgetStats(self._requests, self._retries, self._refused, self._saved / self._UNIT)

    __repr__ = stats_repr


class _Attempts:
    """The decision of both retry shells: after a failure, how long to wait; or the failure itself."""

    def __init__(
        self, on: RetryOn, policy: RetryPolicy, budget: RetryBudget | None, clock: Clock, rng: Rng, started: float
    ) -> None:
        self._on, self._policy, self._budget = on, policy, budget
        self._clock, self._rng, self._started = clock, rng, started
        self._made = 0
        self._history: deque[str] = deque(maxlen=10)

    def failed(self, error: Exception) -> float | None:
        """Seconds to wait before the next try; None when there is none: ``error`` now has the history as its note."""
        wanted = _matches(error, self._on)
        self._made += 1
        try:
            self._history.append(f"{type(error).__name__}: {error}")
        except Exception:  # of its __str__
            self._history.append(type(error).__name__)
        if wanted:
            elapsed = self._clock() - self._started
            retry_after = getattr(error, "retry_after", None)
            if not isinstance(retry_after, (int, float)):
                retry_after = None
            delay = self._policy.delay(self._made, self._rng, retry_after, elapsed)
            if delay is not None and (self._budget is None or self._budget.try_retry()):
                return delay
        if self._made > 1:
            error.add_note(f"retry: gave up after {self._made} attempts: " + "; ".join(self._history))
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


# --------------------------------------------------------------------------------------- token bucket


class Reservation(NamedTuple):
    """A place in a bucket's queue: usable ``wait`` seconds after it was made, at ``due`` by the clock."""

    wait: float
    due: float
    before: float
    after: float


class TokenBucketStats(NamedTuple):
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

    __slots__ = (
        *("_clock", "_depth", "_full_at", "_interval", "_lock", "_paused_until", "_reach", "_unpaused"),
        *("burst", "rate"),
    )

    def __init__(self, rate: float, burst: float = 1, *, clock: Clock = time.monotonic) -> None:
        self._check(rate, burst)
        self.rate, self.burst = rate, burst
        self._interval = 1.0 / rate
        self._depth = burst * self._interval
        self._reach = self._depth + NANOSECOND
        self._full_at = -math.inf
        self._paused_until = self._unpaused = -math.inf
        """``_unpaused``: what ``_full_at`` was before a pause moved it."""
        self._clock = clock
        self._lock = new_lock("TokenBucket")

    @staticmethod
    def _check(rate: float, burst: float) -> None:
        if not (0 < rate < math.inf and 1.0 / rate < math.inf):
            raise ValueError(f"rate must be a positive number of tokens per second, not {rate!r}")
        if not (1 <= burst <= sys.float_info.max and burst / rate < math.inf):
            raise ValueError(f"burst must be a number of tokens >= 1, not {burst!r}")

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
        handing the gap to a newcomer would let it overtake them. Call it once for each reservation.
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
        """Book nothing before ``until``, when one token is there and the rest refills (Retry-After).

        What was booked already keeps its time.
        """
        with self._lock:
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
            if now is None:
                now = self._clock()
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
        """Take ``n`` tokens if they are there at once."""
        if not 0 < n <= self.burst:
            raise ValueError(f"can grant between 0 and {self.burst} tokens at once, not {n!r}")
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
        # What try_acquire does: to call it would be a fourth of the time, ``with`` a third. A signal handler that
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

    __repr__ = stats_repr


# -------------------------------------------------------------------------------------- single flight

_LEAD: Any = object()
"""What a follower is granted when the leader left without an answer: to load by itself."""


class _Answer(NamedTuple):
    value: Any = None
    error: Exception | None = None
    traceback: TracebackType | None = None


class SingleFlightStats(NamedTuple):
    flights: int
    waiting: int
    loads: int
    shared: int


class SingleFlight:
    """One load for any number of callers that want the same key at the same time (Go's x/sync/singleflight).

    The first caller leads: it runs its ``load`` in its own thread or task, without any lock. All who come for the key
    meanwhile follow: they wait for the leader's answer, be it a value or an ``Exception``, which is raised in each.
    A leader that is cancelled (or ends with any other ``BaseException``) says nothing about the key: it hands over to
    the oldest follower, which runs its own ``load``. A load that asks for its own key waits for itself for ever.
    Built on one lock, which guards the flights and their queues.
    """

    def __init__(self) -> None:
        self._lock = new_lock("SingleFlight")
        self._flights: dict[Hashable, FairCondition] = {}
        self._loads = self._shared = 0

    def _join(self, key: Hashable, loop: asyncio.AbstractEventLoop | None) -> tuple[FairCondition, Waiter | None]:
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                return flight, flight.park(loop)
            self._loads += 1
            flight = self._flights[key] = FairCondition()
            return flight, None

    def _finish(self, key: Hashable, flight: FairCondition, answer: _Answer | None) -> None:
        """The leader ends: with an answer for all, or without one, and then the oldest follower leads."""
        with self._lock:
            if answer is None and flight.grant_oldest(_LEAD):
                self._loads += 1
                return
            if self._flights.get(key) is flight:
                del self._flights[key]
            while flight.grant_oldest(answer):
                self._shared += 1

    def _leave(self, key: Hashable, flight: FairCondition, waiter: Waiter) -> None:
        with self._lock:
            flight.leave(waiter)
            leads = waiter.granted and waiter.value is _LEAD
            self._loads -= leads
        if leads:
            self._finish(key, flight, None)

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
            try:
                waiter.block(None)
            except BaseException:
                self._leave(key, flight, waiter)
                raise
            if waiter.value is not _LEAD:
                return self._answer(waiter)  # type: ignore[no-any-return]
        answer = None
        try:
            value = load()
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
        flight, waiter = self._join(key, asyncio.get_running_loop())
        if waiter is not None:
            try:
                await waiter.parked()
            except BaseException:
                self._leave(key, flight, waiter)
                raise
            if waiter.value is not _LEAD:
                return self._answer(waiter)  # type: ignore[no-any-return]
        answer = None
        try:
            value = await load()
            answer = _Answer(value)
            return value
        except Exception as error:
            answer = _Answer(None, error, error.__traceback__)
            raise
        finally:
            self._finish(key, flight, answer)
            del answer

    def forget(self, key: Hashable) -> None:
        """Whoever comes from now on loads anew; those who follow already still get the old flight's answer."""
        with self._lock:
            self._flights.pop(key, None)

    def loading(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._flights

    def stats(self) -> SingleFlightStats:
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


class Keep(NamedTuple, Generic[T]):
    """What a load may return instead of a bare value: how ``get_or_load`` is to ``put`` it."""

    value: T
    ttl: float | None = None
    weight: float = 1.0
    negative: bool = False


class _Entry:
    __slots__ = ("cost", "expires_at", "fresh_until", "key", "put_at", "quiet_until", "stale_until", "value", "weight")

    def __init__(self, key: Any, value: Any, put_at: float, fresh_until: float, weight: float, cost: float) -> None:
        self.key = key  # the object that is the key in the map: it is let go with the entry, after the lock
        self.value, self.put_at, self.weight, self.cost = value, put_at, weight, cost
        self.fresh_until = self.stale_until = self.expires_at = fresh_until
        self.quiet_until = -math.inf

    def hit(self, now: float, early: float) -> Hit[Any]:
        state: Literal["fresh", "stale", "expired"] = "expired"
        if now < self.stale_until:
            state = "fresh" if now < self.fresh_until else "stale"
        needs_refresh = now >= self.quiet_until and now + early >= self.fresh_until
        return Hit(self.value, now - self.put_at, state, needs_refresh)


class TTLCacheStats(NamedTuple):
    entries: int
    weight: float
    hits: int
    misses: int
    evicted: int
    failed: int
    """Loads whose failure was covered up by an older value."""


class TTLCache(Generic[K, T]):
    """A bounded map whose entries age: fresh, then stale but of use, then gone.

    An entry is *fresh* for ``ttl`` seconds. After that it is *stale* for ``stale`` seconds: of use at once, while
    somebody loads it anew (stale-while-revalidate); and until ``stale_if_error`` seconds after ``ttl`` it is
    *expired*: of use only if loading fails. Both windows begin where freshness ends, as in RFC 5861. A *negative*
    entry ("there is no such thing") is fresh for ``negative_ttl`` seconds and has no windows.

    At most ``maxsize`` entries of at most ``maxweight`` in sum (of the ``weight`` given to ``put``: bytes, say) are
    kept; the least recently used goes first, and what is gone when it is looked up.

    ``beta`` above 0 spreads the loads of what is in demand: a lookup asks for a refresh while the entry is still
    fresh with a probability that grows towards the end, so that its users do not all find it stale at one moment
    (XFetch: Vattani, Chierichetti and Lowenstein, "Optimal Probabilistic Cache Stampede Prevention", VLDB 2015; 1 is
    optimal). It reckons with the ``cost`` of the load in seconds, as given to ``put``.
    """

    def __init__(
        self,
        maxsize: int = 1024,
        ttl: float = 60.0,
        *,
        stale: float = 0.0,
        stale_if_error: float = 0.0,
        negative_ttl: float = 5.0,
        maxweight: float = math.inf,
        beta: float = 0.0,
        clock: Clock = time.monotonic,
        rng: Rng = random.random,
    ) -> None:
        if maxsize < 1 or not maxweight > 0:
            raise ValueError("maxsize must be at least 1, and maxweight above 0")
        if not (ttl > 0 and negative_ttl > 0 and stale >= 0 and stale_if_error >= 0 and beta >= 0):
            raise ValueError("ttl and negative_ttl must be above 0 s, stale, stale_if_error and beta not below 0")
        self.maxsize, self.maxweight, self.beta = maxsize, maxweight, beta
        self.ttl, self.negative_ttl = ttl, negative_ttl
        self.stale, self.stale_if_error = stale, stale_if_error
        self._clock, self._rng = clock, rng
        self._lock = new_lock("TTLCache")
        self._entries: OrderedDict[K, _Entry] = OrderedDict()
        self._generations = [0] * 64  # by hash: of bounded size, and a key that shares one only loads once more
        self._weight = 0.0
        self._hits = self._misses = self._evicted = self._failed = 0
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
            early = -math.log(1.0 - self._rng()) * self.beta * entry.cost if self.beta and entry.cost else 0.0
            return entry.hit(now, early)

    def put(
        self,
        key: K,
        value: T,
        *,
        ttl: float | None = None,
        weight: float = 1.0,
        cost: float = 0.0,
        negative: bool = False,
        generation: int | None = None,
        now: float | None = None,
    ) -> bool:
        """Keep ``value``; False if it is heavier than the cache, or if ``key`` was invalidated since ``generation``."""
        if ttl is None:
            ttl = self.negative_ttl if negative else self.ttl
        if not (ttl > 0 and weight >= 0):
            raise ValueError("ttl must be above 0 s, weight not below 0")
        dropped = []
        with self._lock:
            if generation is not None and generation != self._generations[hash(key) % 64]:
                return False
            now = self._clock() if now is None else now
            entry = _Entry(key, value, now, now + ttl, weight, cost)
            if not negative:
                entry.stale_until += self.stale
                entry.expires_at += max(self.stale, self.stale_if_error)
            dropped.append(self._remove(key))
            if weight > self.maxweight:
                return False
            while self._entries and (len(self._entries) >= self.maxsize or self._weight + weight > self.maxweight):
                dropped.append(self._remove(next(iter(self._entries))))
                self._evicted += 1
            self._entries[key] = entry
            self._weight += weight
            return True

    def _remove(self, key: K) -> _Entry | None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._weight = self._weight - entry.weight if self._entries else 0.0
        return entry

    def generation(self, key: K) -> int:
        """To be read before a load and given to ``put``, so that what was loaded before ``invalidate`` is not kept."""
        return self._generations[hash(key) % 64]

    def invalidate(self, key: K) -> bool:
        """Forget ``key``, and what is being loaded for it; True if it was there."""
        with self._lock:
            self._generations[hash(key) % 64] += 1
            entry = self._remove(key)
        self._flights.forget(key)
        return entry is not None

    def clear(self) -> None:
        """``invalidate`` everything."""
        with self._lock:
            self._generations = [generation + 1 for generation in self._generations]
            dropped, self._entries, self._weight = self._entries, OrderedDict(), 0.0
            self._flights = SingleFlight()
        dropped.clear()

    def defer(self, key: K, seconds: float, now: float | None = None) -> None:
        """Ask for no refresh of ``key`` for so long: its last one failed."""
        with self._lock:
            if (entry := self._entries.get(key)) is not None:
                entry.quiet_until = (self._clock() if now is None else now) + seconds

    def get_or_load(self, key: K, load: Callable[[], T | Keep[T]]) -> T:
        """The value of ``key``, from ``load()`` if need be: one load at a time, its failure shared by all who wait.

        What is stale is loaded by one caller, while the others go on with it; if that fails, by nobody for the next
        ``negative_ttl`` seconds. What is expired is the answer if loading fails (``stats().failed`` counts that). A
        load that wants another ttl, a weight, or a negative entry returns a ``Keep``.
        """
        known, found = self._decide(key)
        if known:
            return found  # type: ignore[no-any-return]
        try:
            return self._flights.do(key, lambda: self._load(key, load, found))
        except Exception:
            if (spare := self._spare(key)) is None:
                raise
            return spare.value  # type: ignore[no-any-return]

    async def get_or_load_async(self, key: K, load: Callable[[], Awaitable[T | Keep[T]]]) -> T:
        """``get_or_load`` for tasks."""
        known, found = self._decide(key)
        if known:
            return found  # type: ignore[no-any-return]
        try:
            return await self._flights.do_async(key, lambda: self._load_async(key, load, found))
        except Exception:
            if (spare := self._spare(key)) is None:
                raise
            return spare.value  # type: ignore[no-any-return]

    def _spare(self, key: K) -> _Entry | None:
        """What may be served now that loading failed: windows and ``invalidate`` went on while it ran."""
        with self._lock:
            entry, now = self._entries.get(key), self._clock()
            if entry is None or now >= entry.expires_at:
                return None
            entry.quiet_until = now + self.negative_ttl
            self._failed += 1
            return entry

    def _decide(self, key: K) -> tuple[bool, Any]:
        """True and the value to answer with, or False and the entry (if there was one) that is to be loaded anew."""
        with self._lock:  # the usual case: what follows costs three times as much
            entry = self._entries.get(key)
            if entry is not None and not (self.beta and entry.cost) and self._clock() < entry.fresh_until:
                self._entries.move_to_end(key)
                self._hits += 1
                return True, entry.value
        hit = self.lookup(key)
        if hit is None or (hit.needs_refresh and (hit.state == "expired" or not self._flights.loading(key))):
            return False, entry
        return True, hit.value

    def _loaded_meanwhile(self, key: K, seen: _Entry | None) -> _Entry | None:
        """Between a caller's lookup and its own load another one may have come and gone, or failed."""
        with self._lock:
            entry, now = self._entries.get(key), self._clock()
            if entry is None or now >= entry.expires_at:
                return None
            return entry if now < entry.quiet_until or (entry is not seen and now < entry.fresh_until) else None

    def _load(self, key: K, load: Callable[[], T | Keep[T]], seen: _Entry | None) -> T:
        if (entry := self._loaded_meanwhile(key, seen)) is not None:
            return entry.value  # type: ignore[no-any-return]
        generation, started = self.generation(key), self._clock()
        return self._kept(key, load(), started, generation)

    async def _load_async(self, key: K, load: Callable[[], Awaitable[T | Keep[T]]], seen: _Entry | None) -> T:
        if (entry := self._loaded_meanwhile(key, seen)) is not None:
            return entry.value  # type: ignore[no-any-return]
        generation, started = self.generation(key), self._clock()
        return self._kept(key, await load(), started, generation)

    def _kept(self, key: K, loaded: T | Keep[T], started: float, generation: int) -> T:
        keep = loaded if isinstance(loaded, Keep) else Keep(loaded)
        cost = self._clock() - started
        value, ttl, weight, negative = keep
        self.put(key, value, ttl=ttl, weight=weight, negative=negative, cost=cost, generation=generation)
        return value

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        """Whether ``key`` is there and fresh; changes nothing."""
        with self._lock:
            entry = self._entries.get(key)  # type: ignore[arg-type]
            return entry is not None and self._clock() < entry.fresh_until

    def stats(self) -> TTLCacheStats:
        with self._lock:
            counts = self._hits, self._misses, self._evicted, self._failed
            return TTLCacheStats(len(self._entries), self._weight, *counts)

    __repr__ = stats_repr


# ------------------------------------------------------------------------------------ circuit breaker

State = Literal["closed", "open", "half_open"]
Listener = Callable[[str, State, State, int], object]
"""Told the breaker's name, the state before and after, and the generation that begins."""


class Permit:
    """The ticket of one call, closed once: as ``success``, ``failure`` or ``ignore``. What comes later is ignored."""

    __slots__ = ("_breaker", "generation", "settled", "started")

    def __init__(self, breaker: CircuitBreaker, generation: int, started: float) -> None:
        self._breaker, self.generation, self.started = breaker, generation, started
        self.settled = False

    def success(self, now: float | None = None) -> None:
        self._breaker._settle(self, failed=False, now=now)

    def failure(self, now: float | None = None) -> None:
        self._breaker._settle(self, failed=True, now=now)

    def ignore(self) -> None:
        """The call says nothing about the other side: cancelled, or at fault itself."""
        self._breaker._settle(self, failed=None)

    def __enter__(self) -> Permit:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        failed: bool | None = False if error is None else None
        try:
            if error is not None:
                failed = self._breaker._counts(error) or None
        finally:
            self._breaker._settle(self, failed=failed)


class CircuitBreakerStats(NamedTuple):
    name: str
    state: State
    failures: int
    refused: int
    opened: int
    retry_after: float


class CircuitBreaker:
    """Stops calling a dependency that keeps failing (Nygard, "Release It!", 2nd edition, chapter 5).

    *Closed*: calls pass. ``failures`` of them (None: any number) within ``window`` seconds open the circuit; so does,
    if ``ratio`` is given, that share of at least ``minimum`` calls in the window (counted in tenths of it). *Open*:
    calls are refused with ``CircuitOpen`` for ``reset`` seconds; each repeated opening doubles that up to
    ``max_reset``, and then up to ``jitter`` of it is added, so that many clients do not come back together.
    *Half-open*: ``probes`` calls are let through, and close the circuit when all succeed; one failure opens it again.
    A probe that has not reported after ``probe_timeout`` seconds (default: ``reset``) counts as never made.

    What ``on`` names is a failure, a call of ``slow`` seconds or more is one too, whatever it returned. Other errors,
    cancellation and all else that is no ``Exception`` say nothing about the other side and are ignored: so a time
    limit belongs inside of the protected call, where it raises ``TimeoutError``.

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
        slow: float | None = None,
        max_reset: float = 300.0,
        jitter: float = 0.1,
        probe_timeout: float | None = None,
        on: RetryOn = Exception,
        clock: Clock = time.monotonic,
        rng: Rng = random.random,
    ) -> None:
        if min(failures or 1, probes, minimum) < 1 or failures == 0:
            raise ValueError("failures, probes and minimum must be at least 1")
        if not (window > 0 and reset > 0 and max_reset >= reset and jitter >= 0) or (slow is not None and not slow > 0):
            raise ValueError("window, reset and slow must be above 0 s, max_reset not below reset, jitter not below 0")
        if probe_timeout is not None and not probe_timeout > 0:
            raise ValueError(f"probe_timeout must be above 0 s, not {probe_timeout!r}")
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"ratio is a share above 0 and up to 1, not {ratio!r}")
        self.name, self.window, self.reset, self.probes, self.ratio = name, window, reset, probes, ratio
        self.minimum, self.slow, self.max_reset, self.jitter = minimum, slow, max_reset, jitter
        self.probe_timeout = reset if probe_timeout is None else probe_timeout
        self._on, self._clock, self._rng = on, clock, rng
        self._lock = new_lock("CircuitBreaker")
        self._state: State = "closed"
        self._generation = self._refused = self._opened = self._passed = 0
        self._calls = self._failed = 0
        self._openings = 0
        """In a row, without the circuit having been closed between them."""
        self._open_until = -math.inf
        self._failures: deque[float] = deque(maxlen=failures or 0)
        self._tenths: deque[list[int]] = deque()
        """For each tenth of the window: its number, its calls, its failures; their sums are _calls and _failed."""
        self._probing: dict[Permit, float] = {}
        """Probes under way, and when they expire."""
        self._listeners: list[Listener] = []
        self._news: deque[tuple[State, State, int]] = deque()
        self._telling = False
        self._simple = ratio is None and slow is None
        self._unrecorded: int | None = 0 if self._simple else None
        """The generation while a success need not be recorded, and costs no lock; else None."""

    def listen(self, listener: Listener) -> None:
        """Call ``listener`` at each transition from now on, in whatever thread or task brought it about."""
        self._listeners.append(listener)

    @property
    def state(self) -> State:
        return self._state

    def permit(self, now: float | None = None) -> Permit:
        """Admit one call, or raise ``CircuitOpen``. ``with breaker.permit():`` closes the permit by how it ends."""
        refusal = 0.0
        with self._lock:
            now = self._clock() if now is None else now
            if self._state == "open" and self._open_until - now <= NANOSECOND:
                self._turn("half_open")
            permit = Permit(self, self._generation, now)
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

    def _counts(self, error: BaseException) -> bool:
        return isinstance(error, Exception) and _matches(error, self._on)

    def _settle(self, permit: Permit, failed: bool | None, now: float | None = None) -> None:
        with self._lock:
            if permit.settled:
                return
            permit.settled = True
            if permit.generation != self._generation:
                return
            now = self._clock() if now is None else now
            if self.slow is not None and failed is False and now - permit.started >= self.slow:
                failed = True
            if self._state == "half_open":
                if self._probing.pop(permit, -math.inf) <= now or failed is None:
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
        if failed and self._failures.maxlen:
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
        self._unrecorded = self._generation if self._simple and state == "closed" else None

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

    def _note_failure(self, error: BaseException, generation: int) -> None:
        if self._counts(error):
            with self._lock:
                if generation == self._generation:
                    self._record(True, self._clock())
            self._tell()

    def _guarded(self, function: Callable[..., T]) -> Callable[..., T]:
        def guarded(*args: Any, **options: Any) -> T:
            generation = self._unrecorded
            if generation is None:
                with self.permit():
                    return _answered(function(*args, **options))
            try:
                return _answered(function(*args, **options))
            except BaseException as error:
                self._note_failure(error, generation)
                raise

        return guarded

    def _guarded_async(self, function: Callable[..., Awaitable[T]]) -> Callable[..., Coroutine[Any, Any, T]]:
        async def guarded(*args: Any, **options: Any) -> T:
            generation = self._unrecorded
            if generation is None:
                with self.permit():
                    return await function(*args, **options)
            try:
                return await function(*args, **options)
            except BaseException as error:
                self._note_failure(error, generation)
                raise

        return guarded

    def call(self, function: Callable[..., T], /, *args: Any, **options: Any) -> T:
        """``function(*args, **options)``, or ``CircuitOpen``. Nothing is locked while it runs."""
        return self._guarded(function)(*args, **options)

    async def call_async(self, function: Callable[..., Awaitable[T]], /, *args: Any, **options: Any) -> T:
        """``call`` for a coroutine function: its failure is that of the coroutine, not of making one."""
        return await self._guarded_async(function)(*args, **options)

    def __call__(self, function: F) -> F:
        """Decorate a ``def`` or an ``async def``: every call goes through ``call`` or ``call_async``.

        ``TypeError`` for generators: they fail when they are used, not when they are called.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError("a circuit breaker cannot tell how a generator ends: protect what it calls")
        is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        guard: Any = self._guarded_async if is_async else self._guarded
        return cast(F, functools.wraps(function)(guard(function)))

    def stats(self, now: float | None = None) -> CircuitBreakerStats:
        with self._lock:
            now = self._clock() if now is None else now
            wait = max(0.0, self._open_until - now) if self._state == "open" else 0.0
            recent = sum(now - failure < self.window for failure in self._failures)
            return CircuitBreakerStats(self.name, self._state, recent, self._refused, self._opened, wait)

    __repr__ = stats_repr


# ---------------------------------------------------------------------------------------------- batch


class BatchStats(NamedTuple):
    items: int
    age: float


class Batch(Generic[T]):
    """Gathers items until there are ``max_items``, or until the oldest has waited ``max_age`` seconds."""

    def __init__(self, max_items: int, max_age: float, *, clock: Clock = time.monotonic) -> None:
        if max_items < 1 or not max_age > 0:
            raise ValueError("max_items must be at least 1, max_age above 0 s")
        self.max_items, self.max_age = max_items, max_age
        self._clock = clock
        self._lock = new_lock("Batch")
        self._items: list[T] = []
        self._begun = 0.0

    def add(self, item: T, now: float | None = None) -> list[T] | None:
        """Take ``item``; all items if they are enough now: the caller's to flush, nobody else gets them."""
        with self._lock:
            if not self._items:
                self._begun = self._clock() if now is None else now
            self._items.append(item)
            return self._take() if len(self._items) >= self.max_items else None

    def due_in(self, now: float | None = None) -> float:
        """Seconds until the oldest item is ``max_age`` old (0.0: flush), infinity if there is none."""
        with self._lock:
            if not self._items:
                return math.inf
            return max(0.0, self._begun + self.max_age - (self._clock() if now is None else now))

    def take(self, now: float | None = None) -> list[T]:
        """All items if the oldest is due, else none."""
        with self._lock:
            now = self._clock() if now is None else now
            return self._take() if self._items and now >= self._begun + self.max_age else []

    def drain(self) -> list[T]:
        """All items, due or not: at the end."""
        with self._lock:
            return self._take()

    def _take(self) -> list[T]:
        items, self._items = self._items, []
        return items

    def __len__(self) -> int:
        return len(self._items)

    def stats(self, now: float | None = None) -> BatchStats:
        with self._lock:
            now = self._clock() if now is None else now
            return BatchStats(len(self._items), now - self._begun if self._items else 0.0)

    __repr__ = stats_repr
