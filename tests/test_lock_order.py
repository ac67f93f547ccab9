"""In which order locks are taken: of each mechanism, and of a recorded program."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from typing import Any

import pytest

import coordination as co
import primitives as pr
from tests.helpers import lock_order
from tests.helpers.base import HANG_LIMIT, World, run_task
from tests.helpers.mechanisms import PrimThread


def order_nest(*locks: threading.Lock) -> None:
    with contextlib.ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)


def test_order_of_locks_in_one_thread_and_in_many() -> None:
    def in_a_thread(*locks: threading.Lock) -> None:
        PrimThread(functools.partial(order_nest, *locks)).result()

    for nest in (order_nest, in_a_thread):
        with lock_order.LockOrder() as order:
            a, b, c, d = (co.new_lock(name) for name in "abcd")
            for locks in ((a, b), (a, b), (b, c), (a, d), (d, c), (a, b, c), (a, c)):
                nest(*locks)
            known = {"a": {"b", "c", "d"}, "b": {"c"}, "d": {"c"}}
            assert order.stats() == known
            for locks in ((b, a), (c, a), (c, d), (a, a), (a, co.new_lock("a"))):  # the last: two of one kind
                with pytest.raises(lock_order.LockOrderError, match="elsewhere the other way round"):
                    nest(*locks)
            nest(a, b, c)  # of the attempts nothing is held
            assert order.stats() == known
    with a, b:
        assert co.make_lock is lock_order.PLAIN
        assert type(co.new_lock("a")) is type(threading.Lock())


def test_order_of_attempts_that_fail_and_of_odd_releases() -> None:
    with lock_order.LockOrder() as order:
        a, b, c = (co.new_lock(name) for name in "abc")
        with b:
            assert a.acquire(False) is True  # who does not wait cannot deadlock
            assert (a.acquire(False), b.acquire(blocking=False)) == (False, False)
            assert PrimThread(lambda: [b.acquire(timeout=0.0), b.acquire(True, 0.001)]).result() == [False, False]
            a.release()
        assert order.stats() == {}
        with c:
            a.acquire()
            assert b.acquire(False) is True
            a.release()  # not the last one taken
            with a:
                pass
            b.release()
        assert order.stats() == {"c": {"a"}, "b": {"a"}}
        with pytest.raises(RuntimeError):
            a.release()
        order_nest(c, b, a)


def test_order_serves_a_condition() -> None:
    with lock_order.LockOrder() as order:
        outer, condition, told = co.new_lock("outer"), threading.Condition(co.new_lock("inner")), list[int]()

        def wait() -> bool:
            with condition:
                return condition.wait_for(lambda: told, HANG_LIMIT) == [1]

        waiting = PrimThread(wait)
        with outer, condition:
            told.append(1)
            condition.notify_all()
        assert waiting.result() is True
        with pytest.raises(lock_order.LockOrderError), condition:
            outer.acquire()
        assert order.stats() == {"outer": {"inner"}}


def order_check_nothing_nests(pool_type: type[co.WorkerPool[Any]] = co.WorkerPool) -> None:
    """Every mechanism at work, for threads and tasks that wait for one another: no lock is taken under another."""

    async def main() -> None:
        world, semaphore, channel, flight = World(), co.Semaphore(1), co.Channel[int](1), pr.SingleFlight()
        cache, bucket, budget = pr.TTLCache[int, Any](4, clock=world.clock), pr.TokenBucket(1e6), pr.RetryBudget(1.0)
        breaker = pr.CircuitBreaker("b", failures=1, reset=1.0, clock=world.clock)
        batch, visited = pr.Batch[int](2, 1.0), co.Visited[int]()
        breaker.listen(lambda *_: breaker.stats())

        def handle(item: int) -> Any:
            visited.add(item)
            bucket.acquire()
            with semaphore:
                batch.add(item)
            return cache.get_or_load(item % 2, lambda: pr.retry(lambda: item, on=OSError, budget=budget))

        async def handle_async(item: int) -> Any:
            async with semaphore:
                await bucket.acquire_async()
                await channel.put_async(item)
            return await cache.get_or_load_async(9, lambda: flight.do_async("k", channel.get_async))

        async with pool_type(handle_async, 3) as tasks:
            with pool_type(handle, 3) as threads:
                for item in range(9):
                    await asyncio.to_thread(threads.submit, item)
                    await tasks.submit_async(item)
                    if item:  # the other one is loaded
                        await asyncio.to_thread(channel.get)
                await asyncio.to_thread(threads.close)
            gets = {str(n): pr.hedged(channel.get_async, 0.0, budget) for n in range(3)}
            await co.fan_out(gets, 0.01)
        for function in (breaker.stats, channel.put, print):  # passes; fails, opens; is refused
            with contextlib.suppress(TypeError, pr.CircuitOpen), breaker.permit():
                function()  # type: ignore[call-arg]
        world.now += 9.0
        await breaker.call_async(asyncio.sleep, 0)
        cache.invalidate(9)
        channel.close()
        for mechanism in (semaphore, channel, flight, cache, bucket, budget, breaker, batch, visited, tasks, threads):
            assert isinstance(mechanism._lock, lock_order.RecordedLock), repr(mechanism)
            mechanism.stats()
        assert (batch.take(), len(batch.drain()), breaker.state, threads.stats()) == ([], 1, "closed", (3, 0, 9, 0))

    with lock_order.LockOrder() as order:
        run_task(main())
    assert order.stats() == {}


def test_order_no_mechanism_nests_its_lock() -> None:
    order_check_nothing_nests()
