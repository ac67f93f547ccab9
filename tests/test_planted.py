"""The tests, tested: bugs are planted, by overriding private methods, and each has to be refused."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import coordination as co
import primitives as pr
from logs import event_queue
from logs.parse import Event
from tests.helpers.base import HUNT, World
from tests.helpers.mechanisms import FlightError, error_of
from tests.test_batch import check_machine
from tests.test_cache import check_cache
from tests.test_circuit_breaker import check_breaker
from tests.test_coordination import VisitedKey, fan_check_stragglers, pool_check_exactly_once, visited_check_one_step
from tests.test_coordination_walks import (
    check_channel_close_cancel,
    check_channel_get_cancel,
    check_channel_put_cancel,
    check_channel_walk,
    check_semaphore_cancel,
    check_semaphore_walk,
)
from tests.test_intake import intake_check_queue
from tests.test_interleavings import (
    TurnsCache,
    TurnsCase,
    TurnsChannel,
    TurnsFlight,
    TurnsHandOn,
    TurnsSemaphore,
    TurnsWithdraw,
    turns_explore,
)
from tests.test_lock_order import order_check_nothing_nests
from tests.test_retry import (
    Flaky,
    Outcome,
    check_backoff,
    check_budget,
    check_delays,
    check_never_retried,
    check_spread,
)
from tests.test_single_flight import check_flights
from tests.test_token_bucket import (
    check_any_window,
    check_bucket_machine,
    check_cancel_is_never_booked,
    check_debt,
    check_fifo,
    check_pause,
)


class BucketOneTooMany(pr.TokenBucket):
    """Burst and refill off by one: "N per period" that lets N + 1 through."""

    def __init__(self, rate: float, burst: float = 1, **options: Any) -> None:
        super().__init__(rate, burst, **options)
        self._depth = (burst + 1) * self._interval


class BucketWindow(pr.TokenBucket):
    """Counts per fixed window: twice the burst around its edge."""

    def reserve(self, n: float = 1, now: float | None = None) -> float:
        now = self._clock() if now is None else now
        length = self.burst / self.rate
        start = max(self._full_at, now // length * length)
        used = self._depth if start == self._full_at else 0.0
        spent = (used if used < 1e9 else 0.0) + n
        wait = 0.0
        if spent > self.burst:
            start, spent, wait = start + length, n, max(0.0, start + length - now)
        self._full_at, self._depth = start, spent
        return wait


class BucketStarves(pr.TokenBucket):
    """A large request that has to wait books nothing, so small ones go first."""

    def reserve(self, n: float = 1, now: float | None = None) -> float:
        before = self._full_at
        wait = super().reserve(n, now)
        if wait and n > 1:
            self._full_at = before
        return wait


class BucketRewinds(pr.TokenBucket):
    """Believes a clock that steps back, and forgets the debt."""

    __slots__ = ("_last",)

    def reserve(self, n: float = 1, now: float | None = None) -> float:
        now = self._clock() if now is None else now
        if now < getattr(self, "_last", now):
            self._full_at = now
        self._last = now
        return super().reserve(n, now)


class BucketGivesBackTwice(pr.TokenBucket):
    """Gives back although something fixed was booked behind."""

    def _leave(self, place: Any, back: bool) -> None:
        if place not in self._queue and back:
            self._full_at -= place.n * self._interval
        super()._leave(place, back)


class BucketKeeps(pr.TokenBucket):
    """Never gives back."""

    def _leave(self, place: Any, back: bool) -> None:
        super()._leave(place, False)


class BucketStandsStill(pr.TokenBucket):
    """Who leaves the middle of the queue leaves a gap: the others keep the times that they had."""

    def _leave(self, place: Any, back: bool) -> None:
        if back:
            self._settle()
        super()._leave(place, back)


class BucketTellsNobody(pr.TokenBucket):
    """Who leaves wakes nobody."""

    def _leave(self, place: Any, back: bool) -> None:
        if back and place in self._queue:
            self._remove(place, back)
        else:
            super()._leave(place, back)


class BucketSkips(pr.TokenBucket):
    """The second in the queue is told first."""

    def _advance(self, now: float) -> None:
        if len(self._queue) > 1:
            self._queue.rotate(1)
        super()._advance(now)


class BucketWaitsTooLong(pr.TokenBucket):
    """The time limit is that of the one ahead."""

    def _enter(self, n: float, timeout: float | None, loop: Any) -> Any:
        return super()._enter(n, None if timeout is None else timeout + n * self._interval, loop)


class BucketPausesShort(pr.TokenBucket):
    """Forgets that a pause has to swallow the burst too."""

    def pause(self, until: float) -> None:
        self._full_at = max(self._full_at, until)


class BucketPeeks(pr.TokenBucket):
    """``wait_for`` that books."""

    def wait_for(self, n: float = 1, now: float | None = None) -> float:
        wait = super().wait_for(n, now)
        self._full_at += 1e-3
        return wait


class BackoffHerd(pr.Backoff):
    """Jitter before the cap."""

    def next(self) -> float:
        self.failures += 1
        return min(self.cap, self._rng() * self.base * 2.0 ** min(self.failures - 1, 62))


class BackoffNeverResets(pr.Backoff):
    def reset(self) -> None:
        pass


class PolicyHerd(pr.RetryPolicy):
    """Jitter before the cap: the capped waits are all equal."""

    def delay(
        self, attempt: int, rng: co.Rng = random.random, retry_after: float | None = None, elapsed: float = 0.0
    ) -> float | None:
        if attempt >= self.attempts:
            return None
        delay = min(self.cap, rng() * self.base * 2.0 ** min(attempt - 1, 62)) if retry_after is None else retry_after
        return delay if elapsed + delay <= self.total else None


class PolicyPastTotal(pr.RetryPolicy):
    """Looks at the time before the wait only."""

    def delay(
        self, attempt: int, rng: co.Rng = random.random, retry_after: float | None = None, elapsed: float = 0.0
    ) -> float | None:
        if attempt >= self.attempts or elapsed > self.total:
            return None
        return rng() * min(self.cap, self.base * 2.0 ** min(attempt - 1, 62)) if retry_after is None else retry_after


class PolicyUncapped(pr.RetryPolicy):
    """Equal jitter that forgets the cap."""

    def delay(
        self, attempt: int, rng: co.Rng = random.random, retry_after: float | None = None, elapsed: float = 0.0
    ) -> float | None:
        delay = super().delay(attempt, rng, retry_after, elapsed)
        return delay if delay is None or retry_after is not None else min(delay + self.cap / 2, self.total - elapsed)


class BudgetHoards(pr.RetryBudget):
    """Earns more than it was told to."""

    def request(self) -> None:
        super().request()
        self._saved += 1


class BudgetForgets(pr.RetryBudget):
    """Pays from an empty purse."""

    def try_retry(self) -> bool:
        return super().try_retry() or bool(self._requests)


def retry_too_eager(flaky: Flaky, world: World, on: Any, **options: Any) -> Outcome:
    """Retries whatever ``on`` names, Ctrl-C included."""
    for _ in range(3):
        error = error_of(flaky)
        if error is None:
            return "done", None
        if not isinstance(error, on):
            break
    return None, error


class SemaphoreLoses(co.Semaphore):
    """Cancelled after the grant: the permit is gone."""

    def _abandon(self, waiter: co.Waiter) -> None:
        with self._lock:
            self._released.leave(waiter)


class SemaphoreGhosts(co.Semaphore):
    """A cancelled waiter stays in the queue and is granted a permit that it will never use."""

    def _abandon(self, waiter: co.Waiter) -> None:
        if waiter.granted:
            super()._abandon(waiter)


class SemaphoreDoubles(co.Semaphore):
    """Cancelled before the grant: a permit out of nothing."""

    def _abandon(self, waiter: co.Waiter) -> None:
        super()._abandon(waiter)
        self._available = min(self.permits, self._available + 1)


class SemaphoreBarges(co.Semaphore):
    """A permit passes through the count, so whoever comes first takes it."""

    async def acquire_async(self) -> bool:
        while not self.try_acquire():
            with self._lock:
                waiter = self._released.park(asyncio.get_running_loop())
            try:
                await waiter.parked()
            except BaseException:
                with self._lock:
                    self._released.leave(waiter)
                if waiter.granted and self._released:
                    self._released.grant_oldest()
                raise
        return True

    def release(self) -> None:
        with self._lock:
            self._available += 1
            if self._released:
                self._released.grant_oldest()


class SemaphoreStack(co.Semaphore):
    """Last come, first served."""

    def release(self) -> None:
        self._released._waiters.reverse()
        super().release()
        self._released._waiters.reverse()


class ChannelLoses(co.Channel[Any]):
    """Cancelled after it was handed an item: the item is gone."""

    def _hand_on(self, getter: co.Waiter) -> None:
        with self._lock:
            self._not_empty.leave(getter)
            self._grants -= getter.granted


class ChannelGhosts(co.Channel[Any]):
    """A cancelled getter stays in the queue and is handed the next item."""

    def _hand_on(self, getter: co.Waiter) -> None:
        if getter.granted:
            super()._hand_on(getter)


class ChannelDoubles(co.Channel[Any]):
    """Cancelled after it was handed an item: one to the next getter, and one into the buffer."""

    def _hand_on(self, getter: co.Waiter) -> None:
        super()._hand_on(getter)
        if getter.granted and not self._items:
            self._items.append(getter.value)


class ChannelTellsTooSoon(co.Channel[Any]):
    """Closing tells the getters that all is drained while one of them, which may be cancelled, has a grant."""

    def _end_if_drained(self) -> None:
        if self._closed:
            self._not_empty.wake_all_empty_handed()


class ChannelTellsLatecomers(co.Channel[Any]):
    """So does a get that comes when the channel is closed."""

    def _park_getter(self, loop: Any) -> co.Waiter:
        if self._closed:
            raise co.ChannelClosed
        return super()._park_getter(loop)


class ChannelKeepsGetters(co.Channel[Any]):
    """Nobody tells the getters when the last grant has been taken."""

    def _receive(self, getter: co.Waiter) -> Any:
        with self._lock:
            self._check(self._not_empty, getter)
            self._grants -= 1
        return getter.value


class ChannelKeepsItem(co.Channel[Any]):
    """Cancelled after its place came free: the item stays."""

    def _withdraw(self, putter: co.Waiter) -> None:
        with self._lock:
            self._not_full.leave(putter)


class ChannelKeepsPlace(co.Channel[Any]):
    """Cancelled after its place came free: the item is taken out, and the place stays empty."""

    def _withdraw(self, putter: co.Waiter) -> None:
        with self._lock:
            self._not_full.leave(putter)
            if putter in self._items:
                self._items.remove(putter)


class ChannelGhostPutter(co.Channel[Any]):
    """A cancelled putter stays in the queue, and its place in the buffer with it."""

    def _withdraw(self, putter: co.Waiter) -> None:
        if putter.granted:
            super()._withdraw(putter)


class ChannelOverfull(co.Channel[Any]):
    """One more than it can hold."""

    def _offer(self, item: Any) -> bool:
        accepted = super()._offer(item)
        if not accepted and len(self._items) == self.capacity:
            self._items.append(item)
            return True
        return accepted


class ChannelForgetful(co.Channel[Any]):
    """Closing drops what is in the buffer."""

    def close(self) -> None:
        super().close()
        self._items.clear()


class ChannelStack(co.Channel[Any]):
    """Last in, first out."""

    def _take(self) -> Any:
        self._items.rotate(1)
        return super()._take()


class ChannelForgetsPutters(co.Channel[Any]):
    """A place that is freed is given to nobody."""

    def _take(self) -> Any:
        return self._items.popleft()


class ChannelLeavesGetters(co.Channel[Any]):
    """Closing wakes the putters only."""

    def _end_if_drained(self) -> None:
        pass


@pytest.mark.parametrize(
    ("check", "planted"),
    [
        (check_any_window, BucketOneTooMany),
        (check_debt, BucketOneTooMany),
        (check_bucket_machine, BucketOneTooMany),
        (check_any_window, BucketWindow),
        (check_any_window, BucketStarves),
        (check_fifo, BucketStarves),
        (check_debt, BucketStarves),
        (check_any_window, BucketRewinds),
        (check_any_window, BucketGivesBackTwice),
        (check_bucket_machine, BucketGivesBackTwice),
        (check_cancel_is_never_booked, BucketKeeps),
        (check_bucket_machine, BucketKeeps),
        (check_bucket_machine, BucketStandsStill),
        (check_any_window, BucketTellsNobody),
        (check_bucket_machine, BucketTellsNobody),
        (check_fifo, BucketSkips),
        (check_bucket_machine, BucketSkips),
        (check_bucket_machine, BucketWaitsTooLong),
        (check_backoff, BackoffHerd),
        (check_backoff, BackoffNeverResets),
        (check_pause, BucketPausesShort),
        (check_bucket_machine, BucketPausesShort),
        (check_bucket_machine, BucketPeeks),
        (check_spread, PolicyHerd),
        (check_delays, PolicyPastTotal),
        (check_delays, PolicyUncapped),
        (check_spread, PolicyUncapped),
        (check_budget, BudgetHoards),
        (check_budget, BudgetForgets),
        (check_semaphore_cancel, SemaphoreLoses),
        (check_semaphore_walk, SemaphoreLoses),
        (check_semaphore_cancel, SemaphoreGhosts),
        (check_semaphore_walk, SemaphoreGhosts),
        (check_semaphore_cancel, SemaphoreDoubles),
        (check_semaphore_walk, SemaphoreDoubles),
        (check_semaphore_walk, SemaphoreBarges),
        (check_semaphore_walk, SemaphoreStack),
        (check_channel_get_cancel, ChannelLoses),
        (check_channel_walk, ChannelLoses),
        (check_channel_get_cancel, ChannelGhosts),
        (check_channel_walk, ChannelGhosts),
        (check_channel_get_cancel, ChannelDoubles),
        (check_channel_walk, ChannelDoubles),
        (check_channel_close_cancel, ChannelLoses),
        (check_channel_close_cancel, ChannelTellsTooSoon),
        (check_channel_walk, ChannelTellsTooSoon),
        (check_channel_close_cancel, ChannelTellsLatecomers),
        (check_channel_walk, ChannelTellsLatecomers),
        (check_channel_close_cancel, ChannelKeepsGetters),
        (check_channel_walk, ChannelKeepsGetters),
        (check_channel_put_cancel, ChannelKeepsItem),
        (check_channel_walk, ChannelKeepsItem),
        (check_channel_put_cancel, ChannelKeepsPlace),
        (check_channel_walk, ChannelKeepsPlace),
        (check_channel_put_cancel, ChannelGhostPutter),
        (check_channel_walk, ChannelGhostPutter),
        (check_channel_walk, ChannelOverfull),
        (check_channel_walk, ChannelForgetful),
        (check_channel_walk, ChannelStack),
        (check_channel_walk, ChannelForgetsPutters),
        (check_channel_walk, ChannelLeavesGetters),
    ],
    ids=lambda x: x.__name__,
)
def test_a_planted_bug_is_found(check: Callable[..., None], planted: type) -> None:
    with pytest.raises(AssertionError):
        check(planted, HUNT)


def test_a_planted_retry_is_found() -> None:
    with pytest.raises(AssertionError):
        check_never_retried(retry_too_eager)


# ------------------------------------------------------------------------------------------ the tests, tested: planted


class PoolDies(co.WorkerPool[Any]):
    """A worker's first error is the last thing that it does."""

    def _done(self, item: Any, error: Any) -> None:
        super()._done(item, error)
        if error is not None:
            raise co.ChannelClosed

    def _work(self) -> None:
        with contextlib.suppress(co.ChannelClosed):
            super()._work()


class PoolNests(co.WorkerPool[Any]):
    """Looks at the channel while it holds its own lock."""

    def stats(self) -> co.WorkerPoolStats:
        with self._lock:
            return co.WorkerPoolStats(self._workers, self._channel.stats().items, self._handled, self._failed)


class BatchDoubles(pr.Batch[int]):
    """Due by age: given away, and kept."""

    def take(self, now: float | None = None) -> list[int]:
        items = super().take(now)
        self._items = [*items, *self._items]
        return items


class BatchAgesAnew(pr.Batch[int]):
    """Every item makes the batch young again."""

    def add(self, item: int, now: float | None = None, size: float = 0) -> list[int] | None:
        self._begun = self._clock()
        return super().add(item, now, size)


class BatchTooHeavy(pr.Batch[int]):
    """Takes one more when it would be too heavy."""

    def add(self, item: int, now: float | None = None, size: float = 0) -> list[int] | None:
        self.max_bytes, most = self.max_bytes + size, self.max_bytes
        try:
            return super().add(item, now, size)
        finally:
            self.max_bytes = most


class BatchHeavyWaits(pr.Batch[int]):
    """One that is too heavy for any batch waits until it is old."""

    def _due(self) -> float:
        return self._begun + self.max_age


class VisitedChecksThenActs(co.Visited[VisitedKey]):
    """Two steps, and no lock."""

    def add(self, key: VisitedKey) -> bool:
        known = key in self._keys
        self._keys.add(key)
        self._repeats += known
        return not known


@pytest.mark.parametrize(
    "check",
    [
        functools.partial(pool_check_exactly_once, "threads", PoolDies),
        functools.partial(pool_check_exactly_once, "tasks", PoolDies),
        functools.partial(order_check_nothing_nests, PoolNests),
        functools.partial(check_machine, BatchDoubles, HUNT),
        functools.partial(check_machine, BatchAgesAnew, HUNT),
        functools.partial(check_machine, BatchTooHeavy, HUNT),
        functools.partial(check_machine, BatchHeavyWaits, HUNT),
        functools.partial(visited_check_one_step, VisitedChecksThenActs),
    ],
)
def test_fan_a_planted_bug_is_found(check: Callable[[], None]) -> None:
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("waits", [False, True], ids=["never waits", "waits until it is cancelled"])
def test_fan_out_that_leaves_stragglers_is_found(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def end(tasks: list[asyncio.Future[Any]]) -> None:
        for task in tasks:
            task.cancel()
        if waits and tasks:
            await asyncio.wait(tasks)

    monkeypatch.setattr(co, "cancel_all", end)
    with pytest.raises(AssertionError):
        fan_check_stragglers()


def put(target: object, **fields: Any) -> bool:
    for name, value in fields.items():
        setattr(target, name, value)
    return True


def keeps_failures(breaker: Any, do: Callable[..., None], failed: bool, now: float) -> None:
    before = list(breaker._failures)
    do(failed, now)
    if not failed and breaker._state == "closed":
        breaker._failures.extend(before)


# The method that is replaced, and by what: do is the real one.
PLANTED_BREAKERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "generation ignored": ("_settle", lambda b, do, p, f: (put(p, generation=b._generation), do(p, f))),
    "a new probe ousts the others": ("permit", lambda b, do: (b._probing.clear(), do())[1]),
    "expired probes wedge": ("permit", lambda b, do: (do(), b._probing.update(dict.fromkeys(b._probing, 9e9)))[0]),
    "a late report counts": (
        "_settle",
        lambda b, do, p, f: (p in b._probing and b._probing.update({p: 9e9}), do(p, f)),
    ),
    "an ignored probe stays": ("_settle", lambda b, do, p, f: (f is None and b._state == "half_open") or do(p, f)),
    "one success closes": ("_settle", lambda b, do, p, f: (do(p, f), b._passed and b._turn("closed"))),
    "the window too wide": ("_record", lambda b, do, f, now: (put(b, window=math.nextafter(8, 9)), do(f, now))),
    "the minimum too low": ("_record", lambda b, do, f, now: (put(b, minimum=2), do(f, now))),
    "a success clears nothing": (
        "_record",
        lambda b, do, f, now: (
            n := list(b._failures),
            do(f, now),
            b._failures or b._state != "closed" or b._failures.extend(n[1 - f :] if f else n),
        ),
    ),
    "ignored is failed": ("_settle", lambda b, do, p, f: do(p, f is not False)),
    "settled again": ("_settle", lambda b, do, p, f: (put(p, settled=False), do(p, f))),
    "open until somebody asks": ("stats", lambda b, do: do()._replace(state=b._state)),
    "the reset never lengthens": ("_open", lambda b, do, now: (put(b, _openings=0), do(now))),
    "the reset never shortens": ("_turn", lambda b, do, to: (n := b._openings, do(to), put(b, _openings=n))),
    "jitter within the cap": (
        "_open",
        lambda b, do, t: (do(t), put(b, _open_until=min(b._open_until, t + 12))),
    ),
    "closing forgives nothing": ("_turn", lambda b, do, to: (n := list(b._failures), do(to), b._failures.extend(n))),
}


@pytest.mark.parametrize("name", PLANTED_BREAKERS)
def test_a_planted_bug_of_the_breaker_is_found(name: str) -> None:
    method, replacement = PLANTED_BREAKERS[name]

    def planted(self: pr.CircuitBreaker, *args: Any, **options: Any) -> Any:
        real = functools.partial(getattr(pr.CircuitBreaker, method), self)
        options.pop("now", None)  # not given here
        return replacement(self, real, *args, *options.values())

    with pytest.raises(AssertionError):
        check_breaker(type("Planted", (pr.CircuitBreaker,), {method: planted}), HUNT)


def lands(answer_for: Callable[[Any], Any]) -> dict[str, Any]:
    land = pr.SingleFlight._finish
    return {"_finish": lambda self, key, flight, answer: land(self, key, flight, answer_for(answer))}


def lands_another(self: Any, key: Any, flight: Any, answer: Any) -> None:
    pr.SingleFlight._finish(self, key, flight, answer)
    if not len(flight):
        self._flights.pop(key, None)


def stays(self: Any, key: Any, flight: Any, waiter: Any) -> None:
    """Nobody tells the load that nobody waits any more."""
    task, flight.task = flight.task, None
    pr.SingleFlight._leave(self, key, flight, waiter)
    flight.task = task


def takes_along(self: Any, key: Any, flight: Any, waiter: Any) -> Any:
    if flight.leader is waiter and flight.task is not None:
        flight.task.cancel()
    return pr.SingleFlight._leave(self, key, flight, waiter)


def lingers(self: Any, key: Any, flight: Any, waiter: Any) -> Any:
    task = pr.SingleFlight._leave(self, key, flight, waiter)
    if task is not None:
        self._flights[key] = flight
    return task


PLANTED_FLIGHTS: dict[str, dict[str, Any]] = {
    "the last one leaves the load behind": {"_leave": stays},
    "the leader takes the load along": {"_leave": takes_along},
    "a load that nobody wants can be joined": {"_leave": lingers},
    "a failure is not shared": lands(lambda answer: None if answer and answer.error else answer),
    "a cancelled leader poisons": lands(lambda answer: answer or pr._Answer(None, FlightError("cancelled"))),
    "a granted follower takes the lead along": {"_leave": lambda self, key, flight, waiter: flight.leave(waiter)},
    "a cancelled follower stays in the queue": {"_leave": lambda *_: None},
    "a forgotten flight ends its successor": {"_finish": lands_another},
    "forget does nothing": {"forget": lambda *_: None},
}


@pytest.mark.parametrize("planted", PLANTED_FLIGHTS)
def test_a_planted_bug_of_single_flight_is_found(planted: str) -> None:
    with pytest.raises(AssertionError):
        check_flights(type("Planted", (pr.SingleFlight,), PLANTED_FLIGHTS[planted]), HUNT)


def tick_late(self: Any, key: int, value: int, **how: Any) -> bool:
    kept = PUTS(self, key, value, **how)
    for entry in self._entries.values():
        entry.fresh_until = math.nextafter(entry.put_at + (how.get("ttl") or 4.0), math.inf)
    return kept


def fifo(self: Any, key: int, now: float | None = None) -> Any:
    order, hit = [*self._entries], LOOKUP(self, key, now)
    for other in filter(self._entries.__contains__, order):
        self._entries.move_to_end(other)
    return hit


PUTS, LOOKUP, STATS, EXPIRE = pr.TTLCache.put, pr.TTLCache.lookup, pr.TTLCache.stats, pr.TTLCache._expire


def in_use_order(self: Any, *args: Any, **how: Any) -> bool:
    """Room is made in the order of use, whatever is gone."""
    self._expire = lambda now: []
    try:
        return PUTS(self, *args, **how)
    finally:
        del self._expire


def counted_all(self: Any) -> pr.TTLCacheStats:
    self._expire = lambda now: []
    try:
        return STATS(self)
    finally:
        del self._expire


def gone_too_soon(self: Any, now: float) -> list[Any]:
    """What is stale is taken for gone."""
    gone = [entry.key for entry in self._entries.values() if now >= entry.fresh_until]
    return [self._remove(key) for key in gone]


PLANTED_CACHES: dict[str, dict[str, Any]] = {
    "<= at ttl": {"put": tick_late},
    "a lookup refreshes nothing": {"lookup": fifo},
    "the weight of what goes is not subtracted": {"_remove": lambda self, key: self._entries.pop(key, None)},
    "stale served as fresh": {"lookup": lambda *a: (hit := LOOKUP(*a)) and hit._replace(state="fresh")},
    "invalidate leaves the generation": {"invalidate": lambda self, key: self._remove(key) is not None},
    "the refused leaves the old value": {
        "put": lambda self, key, value, **how: (
            how.get("weight", 1.0) <= self.maxweight and PUTS(self, key, value, **how)
        )
    },
    "what is gone keeps its place": {"put": in_use_order},
    "what is stale makes room": {"_expire": gone_too_soon},
    "what is gone is not counted out": {"stats": counted_all},
    "defer does nothing": {"defer": lambda *_: None},
}


@pytest.mark.parametrize("planted", PLANTED_CACHES)
def test_a_planted_bug_of_the_cache_is_found(planted: str) -> None:
    with pytest.raises(AssertionError):
        check_cache(type("Planted", (pr.TTLCache,), PLANTED_CACHES[planted]), HUNT)


class TurnsLostWakeUp(co.Semaphore):
    """Looks, and parks in a second step: a release between the two wakes nobody."""

    def acquire(self, timeout: float | None = None) -> bool:
        if self.try_acquire():
            return True
        with self._lock:
            waiter = self._released.park(None)
        waiter.block(None)
        return True


class TurnsLostGrant(co.Semaphore):
    """A waiter that lost patience does not look whether it had been granted meanwhile."""

    def acquire(self, timeout: float | None = None) -> bool:
        with self._lock:
            if self._available:
                self._available -= 1
                return True
            waiter = self._released.park(None)
        if timeout is None:
            waiter.block(None)
            return True
        waiter.block(timeout)
        granted = waiter.granted
        with self._lock:
            self._released.leave(waiter)
        return granted


class TurnsItemLost(co.Channel[Any]):
    def _offer(self, item: Any) -> bool:
        if self._closed:
            raise co.ChannelClosed("closed")
        self._items.append(item)
        return len(self._items) <= self.capacity or bool(self._items.popleft())


class TurnsPoisoned(pr.SingleFlight):
    """A killed leader takes its followers with it."""

    def _finish(self, key: Any, flight: co.FairCondition, answer: Any) -> None:
        with self._lock:
            self._flights.pop(key, None)
            while answer is not None and flight.grant_oldest(answer):
                pass


class TurnsLoadsAgain(pr.TTLCache[Any, Any]):
    """Does not look again once it leads."""

    def _fresh(self, key: Any) -> Any:
        return pr._ABSENT


def turns_planted(case: type[Any], planted: type) -> type[TurnsCase]:
    return type(planted.__name__, (case,), {"kind": planted})


class TurnsTwoOrders(TurnsCase):
    def __init__(self) -> None:
        one, two = co.new_lock("one"), co.new_lock("two")
        self.threads = [lambda: self.both(one, two), lambda: self.both(two, one)]

    def both(self, first: Any, second: Any) -> None:
        with first, second:
            pass

    def holds(self) -> bool:
        return True


@pytest.mark.parametrize(
    "planted",
    [
        turns_planted(TurnsSemaphore, TurnsLostWakeUp),
        turns_planted(TurnsSemaphore, TurnsLostGrant),
        turns_planted(TurnsChannel, TurnsItemLost),
        turns_planted(TurnsHandOn, ChannelTellsTooSoon),
        turns_planted(TurnsHandOn, ChannelTellsLatecomers),
        turns_planted(TurnsHandOn, ChannelLoses),
        turns_planted(TurnsWithdraw, ChannelKeepsItem),
        turns_planted(TurnsWithdraw, ChannelKeepsPlace),
        turns_planted(TurnsFlight, TurnsPoisoned),
        turns_planted(TurnsCache, TurnsLoadsAgain),
        TurnsTwoOrders,
    ],
    ids=lambda case: case.__name__,
)
def test_turns_a_planted_bug_is_found(planted: type[TurnsCase], monkeypatch: pytest.MonkeyPatch) -> None:
    assert turns_explore(planted, monkeypatch)[1] is not None


class IntakeQueueForgets(event_queue.EventQueue):
    """What gave way is not counted."""

    def _make_room(self, level: int, size: int) -> bool:
        before = self._dropped["less severe"]
        done = super()._make_room(level, size)
        self._dropped["less severe"] = before
        return done


class IntakeQueueInVain(event_queue.EventQueue):
    """Drops what is less severe though it is not enough."""

    def _make_room(self, level: int, size: int) -> bool:
        for least in range(7, level if len(self._levels) > 1 else 7, -1):
            while self._levels[least] and self._refusal(size) is not None:
                super()._make_room(least - 1, min(size, 1))
                if self._refusal(0) is None:
                    break
        return super()._make_room(level, size)


class IntakeQueueOldestFirst(event_queue.EventQueue):
    """Of the least severe the oldest goes."""

    def _make_room(self, level: int, size: int) -> bool:
        for positions in self._levels:
            positions.reverse()
        done = super()._make_room(level, size)
        for positions in self._levels:
            positions.reverse()
        return done


class IntakeQueueLate(event_queue.EventQueue):
    """Takes the time of what came last for that of all."""

    def _oldest_since(self) -> float:
        return max(waiting[-1] for waiting in self._levels if waiting)[1]


class IntakeQueueUnordered(event_queue.EventQueue):
    """The most severe come first."""

    def _admit(self, events: Sequence[Event], sizes: Sequence[int], size: int, now: float) -> None:
        self._serial = events[0].severity * 1000 + self._received if events else 0
        super()._admit(events, sizes, size, now)


class IntakeQueueTooMuch(event_queue.EventQueue):
    """A batch may be larger than it should."""

    def drain(self) -> list[Event]:
        self.batch_bytes += 500
        try:
            return super().drain()
        finally:
            self.batch_bytes -= 500


class IntakeQueueOneMore(event_queue.EventQueue):
    """Holds more bytes than it may."""

    def _refusal(self, size: int) -> event_queue.Cause | None:
        cause = super()._refusal(size)
        return None if cause == "queue bytes" and self._bytes + size < self.max_bytes * 1.5 else cause


@pytest.mark.parametrize(
    "queue_type",
    [
        IntakeQueueForgets,
        IntakeQueueInVain,
        IntakeQueueOldestFirst,
        IntakeQueueUnordered,
        IntakeQueueLate,
        IntakeQueueTooMuch,
        IntakeQueueOneMore,
    ],
)
def test_queue_the_checker_finds_planted_bugs(queue_type: type[event_queue.EventQueue]) -> None:
    with pytest.raises((AssertionError, IndexError)):
        intake_check_queue(queue_type, HUNT)
