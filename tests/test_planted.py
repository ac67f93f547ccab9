"""The tests, tested: bugs are planted, by overriding private methods, and each has to be refused."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections.abc import Callable
from typing import Any

import pytest

import coordination as co
import primitives as pr
from tests.helpers.base import HUNT, World
from tests.helpers.mechanisms import error_of
from tests.test_batch import check_machine
from tests.test_coordination import VisitedKey, fan_check_stragglers, pool_check_exactly_once, visited_check_one_step
from tests.test_coordination_walks import (
    check_channel_get_cancel,
    check_channel_put_cancel,
    check_channel_walk,
    check_semaphore_cancel,
    check_semaphore_walk,
)
from tests.test_lock_order import order_check_nothing_nests
from tests.test_retry import (
    Flaky,
    Outcome,
    check_budget,
    check_delays,
    check_never_retried,
    check_spread,
)
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

    def book(self, n: float = 1, now: float | None = None) -> pr.Reservation:
        now = self._clock() if now is None else now
        length = self.burst / self.rate
        start = max(self._full_at, now // length * length)
        used = self._depth if start == self._full_at else 0.0
        spent = (used if used < 1e9 else 0.0) + n
        wait = 0.0
        if spent > self.burst:
            start, spent, wait = start + length, n, max(0.0, start + length - now)
        self._full_at, self._depth = start, spent
        return pr.Reservation(wait, now + wait, start, start)


class BucketStarves(pr.TokenBucket):
    """A large request that has to wait books nothing, so small ones go first."""

    def book(self, n: float = 1, now: float | None = None) -> pr.Reservation:
        before = self._full_at
        reservation = super().book(n, now)
        if reservation.wait and n > 1:
            self._full_at = before
        return reservation


class BucketRewinds(pr.TokenBucket):
    """Believes a clock that steps back, and forgets the debt."""

    __slots__ = ("_last",)

    def book(self, n: float = 1, now: float | None = None) -> pr.Reservation:
        now = self._clock() if now is None else now
        if now < getattr(self, "_last", now):
            self._full_at = now
        self._last = now
        return super().book(n, now)


class BucketGivesBackTwice(pr.TokenBucket):
    """Gives back although others were booked behind."""

    def cancel(self, reservation: pr.Reservation) -> bool:
        self._full_at -= reservation.after - reservation.before
        return True


class BucketKeeps(pr.TokenBucket):
    """Never gives back."""

    def cancel(self, reservation: pr.Reservation) -> bool:
        return self._full_at == reservation.after


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

    def _give_back(self, waiter: co.Waiter) -> None:
        self._leave(self._not_empty, waiter)


class ChannelGhosts(co.Channel[Any]):
    """A cancelled getter stays in the queue and is handed the next item."""

    def _give_back(self, waiter: co.Waiter) -> None:
        if waiter.granted:
            super()._give_back(waiter)


class ChannelDoubles(co.Channel[Any]):
    """Cancelled after it was handed an item: one to the next getter, and one into the buffer."""

    def _give_back(self, waiter: co.Waiter) -> None:
        super()._give_back(waiter)
        if waiter.granted and not self._items:
            self._items.append(waiter.value)


class ChannelGhostPutter(co.Channel[Any]):
    """A cancelled putter stays in the queue, and its place in the buffer with it."""

    def _leave(self, condition: co.FairCondition, waiter: co.Waiter) -> None:
        if condition is not self._not_full:
            super()._leave(condition, waiter)


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

    def close(self) -> None:
        self._closed = True
        self._not_full.wake_all_empty_handed()


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
            return co.WorkerPoolStats(self._workers, len(self._channel), self._handled, self._failed)


class BatchDoubles(pr.Batch[int]):
    """Due by age: given away, and kept."""

    def take(self, now: float | None = None) -> list[int]:
        items = super().take(now)
        self._items = [*items, *self._items]
        return items


class BatchAgesAnew(pr.Batch[int]):
    """Every item makes the batch young again."""

    def add(self, item: int, now: float | None = None) -> list[int] | None:
        self._begun = self._clock()
        return super().add(item, now)


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

    monkeypatch.setattr(co, "_end", end)
    with pytest.raises(AssertionError):
        fan_check_stragglers()
