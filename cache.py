"""What was fetched once is not fetched again: one load for many callers, kept while it is good enough.

==================  ==============================================================================================
mechanism           promise (and what is not promised)
==================  ==============================================================================================
``SingleFlight``    one load at a time for each key, whoever asks; a failure is shared, a cancelled leader replaced.
                    Not promised: anything about loads that do not overlap.
``TTLCache``        nothing outside of its windows is served, nothing above its bounds is kept. Not promised: that
                    what is within them is still true.
==================  ==============================================================================================

Both serve threads and tasks at the same time. Each has one lock, held for the decision only: loads, which are the
caller's, run without it, in the caller's thread or task. The cache asks its ``SingleFlight`` after it let go of its
own lock, so the two are never nested. Nothing here starts a thread or a task: there is no sweeper, what is gone is
dropped when it is looked up or when its place is needed; and what is stale is loaded by one of those who want it.

Blocking verbs are for threads: ``do`` in the thread of an event loop, for a key that a task of this loop is loading,
waits for ever. So does a load that asks for its own key. No lock here can be re-entered: a destructor or a signal
handler that uses the object which was just being used waits for itself.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from types import TracebackType
from typing import Any, Generic, Literal, NamedTuple

from coordination import Clock, K, Rng, T, _FairCondition, _Waiter, new_lock, telling

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
        self._flights: dict[Hashable, _FairCondition] = {}
        self._loads = self._shared = 0

    def _board(self, key: Hashable, loop: asyncio.AbstractEventLoop | None) -> tuple[_FairCondition, _Waiter | None]:
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                return flight, flight.park(loop)
            self._loads += 1
            flight = self._flights[key] = _FairCondition()
            return flight, None

    def _land(self, key: Hashable, flight: _FairCondition, answer: _Answer | None) -> None:
        """The leader ends: with an answer for all, or without one, and then the oldest follower leads."""
        with self._lock:
            if answer is None and flight.grant_oldest(_LEAD):
                self._loads += 1
                return
            if self._flights.get(key) is flight:
                del self._flights[key]
            while flight.grant_oldest(answer):
                self._shared += 1

    def _desert(self, key: Hashable, flight: _FairCondition, waiter: _Waiter) -> None:
        with self._lock:
            flight.leave(waiter)
            leads = waiter.granted and waiter.value is _LEAD
            self._loads -= leads
        if leads:
            self._land(key, flight, None)

    def _answer(self, waiter: _Waiter) -> Any:
        answer, waiter.value = waiter.value, None
        if answer.error is None:
            return answer.value
        try:  # the traceback of the load: else each of a thousand followers would lengthen it
            raise answer.error.with_traceback(answer.traceback)
        finally:
            del answer

    def do(self, key: Hashable, load: Callable[[], T]) -> T:
        """The answer of the one load of ``key`` that is under way, or of ``load()``."""
        flight, waiter = self._board(key, None)
        if waiter is not None:
            try:
                waiter.block(None)
            except BaseException:
                self._desert(key, flight, waiter)
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
            self._land(key, flight, answer)
            del answer

    async def do_async(self, key: Hashable, load: Callable[[], Awaitable[T]]) -> T:
        """``do`` for tasks; threads and tasks may share a flight."""
        flight, waiter = self._board(key, asyncio.get_running_loop())
        if waiter is not None:
            try:
                await waiter.parked()
            except BaseException:
                self._desert(key, flight, waiter)
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
            self._land(key, flight, answer)
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

    __repr__ = telling


# ---------------------------------------------------------------------------------------------- cache


class Hit(NamedTuple, Generic[T]):
    """What a cache knows: ``age`` in seconds; ``expired`` is for use only if loading fails; ``refresh``: load it."""

    value: T
    age: float
    state: Literal["fresh", "stale", "expired"]
    refresh: bool


class Keep(NamedTuple, Generic[T]):
    """What a load may return instead of a bare value: how ``get_or_load`` is to ``put`` it."""

    value: T
    ttl: float | None = None
    weight: float = 1.0
    negative: bool = False


class _Entry:
    __slots__ = ("cost", "fresh_until", "gone_at", "key", "put_at", "quiet_until", "stale_until", "value", "weight")

    def __init__(self, key: Any, value: Any, put_at: float, fresh_until: float, weight: float, cost: float) -> None:
        self.key = key  # the object that is the key in the map: it is let go with the entry, after the lock
        self.value, self.put_at, self.weight, self.cost = value, put_at, weight, cost
        self.fresh_until = self.stale_until = self.gone_at = fresh_until
        self.quiet_until = -math.inf

    def hit(self, now: float, early: float) -> Hit[Any]:
        state: Literal["fresh", "stale", "expired"] = "expired"
        if now < self.stale_until:
            state = "fresh" if now < self.fresh_until else "stale"
        refresh = now >= self.quiet_until and now + early >= self.fresh_until
        return Hit(self.value, now - self.put_at, state, refresh)


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
            if entry is None or now >= entry.gone_at:
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
                entry.gone_at += max(self.stale, self.stale_if_error)
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
            if entry is None or now >= entry.gone_at:
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
        if hit is None or (hit.refresh and (hit.state == "expired" or not self._flights.loading(key))):
            return False, entry
        return True, hit.value

    def _loaded_meanwhile(self, key: K, seen: _Entry | None) -> _Entry | None:
        """Between a caller's lookup and its own load another one may have come and gone, or failed."""
        with self._lock:
            entry, now = self._entries.get(key), self._clock()
            if entry is None or now >= entry.gone_at:
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

    __repr__ = telling
