"""Semaphore and Channel: one suite over threads, tasks, and tasks of several loops."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import signal
import sys
import threading
from collections.abc import Awaitable
from typing import Any

import pytest

import coordination as co
from tests.helpers.base import HANG_LIMIT, run_task, ticks, wait_until
from tests.helpers.mechanisms import (
    BLOCK,
    Loop,
    PrimTask,
    PrimThread,
    Shell,
    gated_block,
    in_threads,
    prim_stranded,
)


def waiting_on(semaphore: co.Semaphore, n: int) -> None:
    wait_until(lambda: semaphore.stats().waiting == n)


def putters_of(channel: co.Channel[Any], n: int) -> None:
    wait_until(lambda: channel.stats().putters == n)


def getters_of(channel: co.Channel[Any], n: int) -> None:
    wait_until(lambda: channel.stats().getters == n)


def test_semaphore_free_permits_are_taken_at_once(prim_shell: Shell) -> None:
    semaphore = co.Semaphore(3)
    for taken in range(1, 4):
        assert prim_shell.acquire(semaphore).result() is True
        assert semaphore.stats() == co.SemaphoreStats(3, 3 - taken, 0)
    assert prim_shell.do(semaphore.try_acquire) is False
    prim_shell.do(semaphore.release)
    assert prim_shell.do(semaphore.try_acquire) is True


def test_semaphore_is_fifo(prim_shell: Shell) -> None:
    semaphore = co.Semaphore(1)
    assert semaphore.try_acquire()
    workers = []
    for number in range(12):
        workers.append(prim_shell.acquire(semaphore))
        waiting_on(semaphore, number + 1)
    for number, worker in enumerate(workers):
        prim_shell.do(semaphore.release)
        assert worker.result() is True
        assert not any(later.done() for later in workers[number + 1 :])
        assert semaphore.stats() == co.SemaphoreStats(1, 0, 11 - number)


def test_semaphore_nobody_barges(prim_shell: Shell) -> None:
    semaphore = co.Semaphore(1)
    assert semaphore.try_acquire()
    first, second = prim_shell.acquire(semaphore), None
    waiting_on(semaphore, 1)
    second = prim_shell.acquire(semaphore)
    waiting_on(semaphore, 2)

    def release_and_try() -> bool:
        semaphore.release()
        return semaphore.try_acquire() or semaphore.acquire(timeout=0)

    assert prim_shell.do(release_and_try) is False
    assert first.result() is True
    assert prim_shell.do(release_and_try) is False
    assert second.result() is True
    prim_shell.do(semaphore.release)
    assert prim_shell.do(semaphore.try_acquire) is True


def test_semaphore_a_cancelled_waiter_leaves(prim_shell: Shell) -> None:
    semaphore = co.Semaphore(1)
    assert semaphore.try_acquire()
    workers = []
    for number in range(6):
        workers.append(prim_shell.acquire(semaphore, gated=number in (0, 2, 5)))
        waiting_on(semaphore, number + 1)
    for left, number in ((5, 2), (4, 0), (3, 5)):
        workers[number].cancel()
        waiting_on(semaphore, left)
    for number in (1, 3, 4):
        prim_shell.do(semaphore.release)
        assert workers[number].result() is True
    prim_shell.do(semaphore.release)
    assert semaphore.stats() == co.SemaphoreStats(1, 1, 0)


def test_semaphore_cancelled_after_the_grant_hands_it_on(prim_shell: Shell) -> None:
    for behind in (0, 2):
        semaphore = co.Semaphore(1)
        assert semaphore.try_acquire()
        victim = prim_shell.acquire(semaphore, gated=True)
        waiting_on(semaphore, 1)
        workers = []
        for number in range(behind):
            workers.append(prim_shell.acquire(semaphore))
            waiting_on(semaphore, number + 2)
        victim.cancel(after=semaphore.release)
        for worker in workers:
            assert worker.result() is True
            prim_shell.do(semaphore.release)
        assert semaphore.stats() == co.SemaphoreStats(1, 1, 0)


def test_semaphore_time_outs(prim_shell: Shell) -> None:
    async def acquire_now(semaphore: co.Semaphore) -> bool:
        try:
            async with asyncio.timeout(0):
                return await semaphore.acquire_async()
        except TimeoutError:
            return False

    semaphore = co.Semaphore(1)
    assert semaphore.try_acquire()
    for timeout in (0, -1.0, 0.001):
        late = prim_shell.start(lambda t=timeout: semaphore.acquire(t), lambda: acquire_now(semaphore))  # type: ignore[misc]
        assert late.result() is False
        assert semaphore.stats() == co.SemaphoreStats(1, 0, 0)
    prim_shell.do(semaphore.release)
    assert prim_shell.start(lambda: semaphore.acquire(1e12), lambda: acquire_now(semaphore)).result() is True


def test_semaphore_a_grant_at_the_last_moment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(co.Waiter, "block", gated_block)
    semaphore = co.Semaphore(1)
    assert semaphore.try_acquire()
    late, later = PrimThread(semaphore.acquire, gated=True), PrimThread(semaphore.acquire, gated=True)
    waiting_on(semaphore, 2)
    assert late.expire(after=semaphore.release) is (not later.expire())
    assert semaphore.stats() == co.SemaphoreStats(1, 0, 0)


def test_semaphore_context_managers(prim_shell: Shell) -> None:
    semaphore = co.Semaphore(1)

    def hold() -> co.SemaphoreStats:
        with semaphore as inside:
            assert inside is semaphore
            return semaphore.stats()

    async def ahold() -> co.SemaphoreStats:
        async with semaphore as inside:
            assert inside is semaphore
            return semaphore.stats()

    def fail() -> None:
        with semaphore:
            raise LookupError

    async def afail() -> None:
        async with semaphore:
            raise LookupError

    for _ in range(3):
        assert prim_shell.start(hold, ahold).result() == co.SemaphoreStats(1, 0, 0)
        with pytest.raises(LookupError):
            prim_shell.start(fail, afail).result()
        assert semaphore.stats() == co.SemaphoreStats(1, 1, 0)


def test_semaphore_refuses_misuse_and_says_what_it_does() -> None:
    for permits in (0, -1):
        with pytest.raises(ValueError, match="permits must be at least 1"):
            co.Semaphore(permits)
    for no_number in (1.5, 2.0, math.inf, "2"):
        with pytest.raises(TypeError):
            co.Semaphore(no_number)  # type: ignore[arg-type]
    semaphore = co.Semaphore(2)
    with pytest.raises(ValueError, match="released more often than acquired"):
        semaphore.release()
    assert semaphore.acquire()
    semaphore.release()
    with pytest.raises(ValueError, match="released more often than acquired"):
        semaphore.release()
    assert semaphore.try_acquire()
    assert repr(semaphore) == "<Semaphore permits=2 available=1 waiting=0>"
    assert semaphore.stats() == co.SemaphoreStats(permits=2, available=1, waiting=0)
    with pytest.raises(AttributeError):
        semaphore.stats().available = 2  # type: ignore[misc]


def test_semaphore_never_more_holders_than_permits(prim_shell: Shell) -> None:
    semaphore, holders, most, lock = co.Semaphore(3), [0], [0], threading.Lock()

    def enter() -> None:
        with lock:
            holders[0] += 1
            most[0] = max(most[0], holders[0])

    def leave() -> None:
        with lock:
            holders[0] -= 1

    def work() -> int:
        for _ in range(40):
            with semaphore:
                enter()
                os.sched_yield()
                leave()
        return 40

    async def awork() -> int:
        for _ in range(40):
            async with semaphore:
                enter()
                await asyncio.sleep(0)
                leave()
        return 40

    workers = [prim_shell.start(work, awork) for _ in range(9)]
    assert sum(worker.result() for worker in workers) == 360
    assert semaphore.stats() == co.SemaphoreStats(3, 3, 0)
    assert (holders, 1 <= most[0] <= 3) == ([0], True)


def test_semaphore_loses_no_permit_to_a_loop_that_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    """A waiter whose loop was closed without cancelling it can never be woken; the permit goes to the next."""
    semaphore = co.Semaphore(1)
    assert semaphore.try_acquire()
    task = prim_stranded(semaphore.acquire_async())
    assert semaphore.stats().waiting == 1
    semaphore.release()
    assert semaphore.try_acquire() is True
    del task


def test_channel_is_fifo_and_bounded(prim_shell: Shell) -> None:
    channel: co.Channel[Any] = co.Channel(3)
    for item in (0, None, 2):
        assert prim_shell.put(channel, item).result() is None
    putters = []
    for number in range(5):
        putters.append(prim_shell.put(channel, 3 + number))
        putters_of(channel, number + 1)
    assert channel.stats() == co.ChannelStats(3, 3, 5, 0, False)
    for number, item in enumerate((0, None, 2, 3, 4, 5, 6, 7)):
        assert prim_shell.get(channel).result() == item
        if number < 5:
            assert putters[number].result() is None
            assert not any(later.done() for later in putters[number + 1 :])
    assert channel.stats() == co.ChannelStats(3, 0, 0, 0, False)


def test_channel_getters_wait_in_line(prim_shell: Shell) -> None:
    channel: co.Channel[Any] = co.Channel(2)
    getters = []
    for number in range(6):
        getters.append(prim_shell.get(channel))
        getters_of(channel, number + 1)
    for number, getter in enumerate(getters):
        if number % 2:
            prim_shell.do(lambda n=number: channel.put(n, 0))  # type: ignore[misc]
        else:
            assert prim_shell.put(channel, number).result() is None
        assert getter.result() == number
        assert not any(later.done() for later in getters[number + 1 :])


def test_channel_nobody_barges(prim_shell: Shell) -> None:
    channel: co.Channel[Any] = co.Channel(1)
    getter = prim_shell.get(channel)
    getters_of(channel, 1)

    def put_and_get() -> Any:
        channel.put("mine", 0)
        return channel.get(0)

    with pytest.raises(TimeoutError):
        prim_shell.do(put_and_get)
    assert getter.result() == "mine"

    channel.put(1, 0)
    putter = prim_shell.put(channel, 2)
    putters_of(channel, 1)

    def get_and_put() -> None:
        assert channel.get(0) == 1
        channel.put(3, 0)

    with pytest.raises(TimeoutError):
        prim_shell.do(get_and_put)
    assert putter.result() is None
    assert channel.get(0) == 2


def test_channel_close_refuses_putters_and_drains_to_getters(prim_shell: Shell) -> None:
    channel: co.Channel[Any] = co.Channel(2)
    channel.put(0, 0)
    channel.put(None, 0)
    putters = [prim_shell.put(channel, "never"), prim_shell.put(channel, "never")]
    putters_of(channel, 2)
    prim_shell.do(channel.close)
    for putter in [*putters, prim_shell.put(channel, "late")]:
        with pytest.raises(co.ChannelClosed):
            putter.result()
    with pytest.raises(co.ChannelClosed):
        channel.put("late", 0)
    assert channel.stats() == co.ChannelStats(2, 2, 0, 0, True)
    assert prim_shell.get(channel).result() == 0
    assert prim_shell.drain(channel).result() == [None]
    assert prim_shell.drain(channel).result() == []
    with pytest.raises(co.ChannelClosed):
        prim_shell.get(channel).result()
    with pytest.raises(co.ChannelClosed):
        channel.get(0)
    prim_shell.do(channel.close)
    assert channel.stats() == co.ChannelStats(2, 0, 0, 0, True)


def test_channel_close_ends_waiting_getters_and_iteration(prim_shell: Shell) -> None:
    channel: co.Channel[Any] = co.Channel(2)
    drains, getters = [], []
    for number in range(3):
        drains.append(prim_shell.drain(channel))
        getters_of(channel, 2 * number + 1)
        getters.append(prim_shell.get(channel))
        getters_of(channel, 2 * number + 2)
    prim_shell.do(lambda: channel.put("one", 0))
    wait_until(lambda: channel.stats().getters == 6)
    prim_shell.do(channel.close)
    assert [drain.result() for drain in drains] == [["one"], [], []]
    for getter in getters:
        with pytest.raises(co.ChannelClosed):
            getter.result()


def test_channel_accepted_before_the_close_is_delivered(prim_shell: Shell) -> None:
    """The place in the buffer, and the item, were handed over before the channel closed."""
    channel: co.Channel[Any] = co.Channel(1)
    channel.put(0, 0)
    putter = prim_shell.put(channel, 1)
    putters_of(channel, 1)

    def take_and_close() -> None:
        assert channel.get(0) == 0
        channel.close()

    prim_shell.do(take_and_close)
    assert putter.result() is None
    assert prim_shell.drain(channel).result() == [1]

    channel = co.Channel(1)
    getter = prim_shell.get(channel)
    getters_of(channel, 1)

    def put_and_close() -> None:
        channel.put(2, 0)
        channel.close()

    prim_shell.do(put_and_close)
    assert getter.result() == 2


def test_channel_a_cancelled_getter_leaves_or_gives_back(prim_shell: Shell) -> None:
    channel: co.Channel[Any] = co.Channel(2)
    victims, getters = [], []
    for number in range(3):
        victims.append(prim_shell.get(channel, gated=True))
        getters_of(channel, 2 * number + 1)
        getters.append(prim_shell.get(channel))
        getters_of(channel, 2 * number + 2)
    victims[1].cancel()
    getters_of(channel, 5)
    victims[0].cancel(after=lambda: channel.put("a", 0))  # to the next
    assert getters[0].result() == "a"
    channel.put("b", 0)
    assert getters[1].result() == "b"

    def put_three() -> None:
        for item in "cde":
            channel.put(item, 0)

    victims[2].cancel(after=put_three)  # c was his, d went to the next, e waits
    assert getters[2].result() == "d"
    assert prim_shell.do(lambda: (channel.get(0), channel.get(0))) == ("c", "e")
    assert channel.stats() == co.ChannelStats(2, 0, 0, 0, False)


def test_channel_a_returned_item_goes_to_the_front(prim_shell: Shell) -> None:
    channel: co.Channel[Any] = co.Channel(2)
    victim = prim_shell.get(channel, gated=True)
    getters_of(channel, 1)

    def put_three() -> None:
        for item in range(3):
            channel.put(item, 0)

    victim.cancel(after=put_three)
    putter = prim_shell.put(channel, 3)
    putters_of(channel, 1)
    assert prim_shell.get(channel).result() == 0
    assert prim_shell.get(channel).result() == 1
    assert putter.result() is None
    channel.close()
    assert prim_shell.drain(channel).result() == [2, 3]


def test_channel_an_item_returned_after_the_close_is_still_there(prim_shell: Shell) -> None:
    channel: co.Channel[Any] = co.Channel(1)
    victim = prim_shell.get(channel, gated=True)
    getters_of(channel, 1)

    def put_and_close() -> None:
        channel.put("mine", 0)
        channel.close()

    victim.cancel(after=put_and_close)
    assert prim_shell.drain(channel).result() == ["mine"]


def test_channel_a_cancelled_putter_leaves(prim_shell: Shell) -> None:
    channel: co.Channel[Any] = co.Channel(1)
    channel.put(0, 0)
    putters = []
    for number in range(4):
        putters.append(prim_shell.put(channel, number + 1, gated=number in (0, 2)))
        putters_of(channel, number + 1)
    putters[2].cancel()
    putters[0].cancel()
    putters_of(channel, 2)
    assert prim_shell.get(channel).result() == 0
    assert putters[1].result() is None
    assert prim_shell.get(channel).result() == 2
    assert putters[3].result() is None
    assert prim_shell.get(channel).result() == 4
    assert channel.stats() == co.ChannelStats(1, 0, 0, 0, False)


def test_channel_a_putter_cancelled_as_its_place_came_free_has_not_put(prim_shell: Shell) -> None:
    for taken in (False, True):
        channel: co.Channel[Any] = co.Channel(1)
        channel.put(0, 0)
        victim = prim_shell.put(channel, 1, gated=True)
        putters_of(channel, 1)
        behind = prim_shell.put(channel, 2)
        putters_of(channel, 2)
        got = list[Any]()
        victim.cancel(after=lambda: got.extend(channel.get(0) for _ in range(1 + taken)))  # noqa: B023
        assert behind.result() is None
        assert got == [0, 1][: 1 + taken]  # got already, it cannot be taken back
        channel.close()
        assert prim_shell.drain(channel).result() == [2]


def test_channel_of_equal_items_takes_out_the_one_that_was_withdrawn() -> None:
    async def main() -> None:
        channel: co.Channel[Any] = co.Channel(3)
        for item in ("same", "x", "y"):
            await channel.put_async(item)
        victim, later = (asyncio.create_task(channel.put_async(item)) for item in ("same", "same"))
        await ticks(2)
        assert [channel.get(0), channel.get(0)] == ["same", "x"]
        victim.cancel()
        await asyncio.wait([victim, later])
        channel.put("z", 0)
        channel.close()
        assert [item async for item in channel] == ["y", "same", "z"]

    run_task(main())


def test_channel_nobody_is_told_that_it_is_drained_while_an_item_may_come_back(prim_shell: Shell) -> None:
    channel: co.Channel[Any] = co.Channel(1)
    victim = prim_shell.get(channel, gated=True)
    getters_of(channel, 1)
    getters = [prim_shell.get(channel)]
    getters_of(channel, 2)
    getters.append(prim_shell.get(channel))
    getters_of(channel, 3)

    def put_and_close() -> None:
        channel.put("item", 0)
        channel.close()
        assert channel.stats().getters == 2
        with pytest.raises(TimeoutError):  # it is not drained yet
            channel.get(0)

    victim.cancel(after=put_and_close)
    assert getters[0].result() == "item"
    with pytest.raises(co.ChannelClosed):
        getters[1].result()
    assert channel.stats() == co.ChannelStats(1, 0, 0, 0, True)


def put_and_close(channel: co.Channel[Any]) -> None:
    channel.put("item")
    channel.close()


def test_channel_a_thread_puts_and_closes_as_a_getter_of_a_loop_is_cancelled() -> None:
    async def main() -> None:
        channel: co.Channel[Any] = co.Channel(1)
        victim, other = (asyncio.create_task(channel.get_async()) for _ in range(2))
        await ticks(2)
        in_threads([lambda: put_and_close(channel)])  # this loop learns of it later
        victim.cancel()
        assert await other == "item"
        with pytest.raises(asyncio.CancelledError):
            await victim
        with pytest.raises(co.ChannelClosed):
            await channel.get_async()

    run_task(main())


def test_channel_time_outs(prim_shell: Shell) -> None:
    channel: co.Channel[Any] = co.Channel(1)

    async def now(awaitable: Awaitable[Any]) -> Any:
        async with asyncio.timeout(0):
            return await awaitable

    for timeout in (0, -1.0, 0.001):
        with pytest.raises(TimeoutError):
            prim_shell.start(lambda t=timeout: channel.get(t), lambda: now(channel.get_async())).result()  # type: ignore[misc]
        assert channel.stats() == co.ChannelStats(1, 0, 0, 0, False)
    assert prim_shell.start(lambda: channel.put(1, 0), lambda: now(channel.put_async(1))).result() is None
    for timeout in (0, -1.0, 0.001):
        with pytest.raises(TimeoutError):
            prim_shell.start(lambda t=timeout: channel.put(2, t), lambda: now(channel.put_async(2))).result()  # type: ignore[misc]
        assert channel.stats() == co.ChannelStats(1, 1, 0, 0, False)
    assert prim_shell.start(lambda: channel.get(0), lambda: now(channel.get_async())).result() == 1


def test_channel_a_hand_over_at_the_last_moment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(co.Waiter, "block", gated_block)
    channel: co.Channel[Any] = co.Channel(1)
    getter = PrimThread(channel.get, gated=True)
    getters_of(channel, 1)
    assert getter.expire(after=lambda: channel.put(None, 0)) is None
    channel.put(0, 0)
    putter = PrimThread(lambda: channel.put(1), gated=True)
    putters_of(channel, 1)
    assert putter.expire(after=lambda: channel.get(0)) is None
    assert channel.get(0) == 1

    getter = PrimThread(channel.get, gated=True)
    getters_of(channel, 1)
    with pytest.raises(co.ChannelClosed):
        getter.expire(after=channel.close)
    assert channel.stats() == co.ChannelStats(1, 0, 0, 0, True)


def test_channel_delivers_each_item_once(prim_shell: Shell) -> None:
    channel: co.Channel[tuple[int, int]] = co.Channel(2)

    def produce(name: int) -> None:
        for number in range(60):
            channel.put((name, number))

    async def aproduce(name: int) -> None:
        for number in range(60):
            await channel.put_async((name, number))

    producers = [prim_shell.start(lambda n=n: produce(n), lambda n=n: aproduce(n)) for n in range(6)]  # type: ignore[misc]
    consumers = [prim_shell.drain(channel) for _ in range(5)]
    for producer in producers:
        producer.result()
    prim_shell.do(channel.close)
    shares = [consumer.result() for consumer in consumers]
    assert sorted(itertools.chain(*shares)) == [(name, number) for name in range(6) for number in range(60)]
    for share, name in itertools.product(shares, range(6)):
        mine = [number for producer, number in share if producer == name]
        assert mine == sorted(mine)


def test_channel_loses_nothing_in_a_storm_of_time_outs_and_cancellations() -> None:
    """Threads that time out and tasks that are cancelled, of two loops: what was accepted is delivered once."""
    channel: co.Channel[tuple[str, int]] = co.Channel(2)
    accepted: list[tuple[str, int]] = []
    delivered: list[tuple[str, int]] = []
    unsure: list[tuple[str, int]] = []
    loops = [Loop(), Loop()]

    def produce(name: str) -> None:
        for number in range(80):
            try:
                channel.put((name, number), timeout=0 if number % 3 else HANG_LIMIT)
                accepted.append((name, number))
            except TimeoutError:
                pass

    async def aproduce(name: str, rng: random.Random) -> None:
        for number in range(80):
            put = asyncio.create_task(channel.put_async((name, number)))
            await ticks(rng.randrange(4))
            if rng.random() < 0.3:
                put.cancel()
            (outcome,) = await asyncio.gather(put, return_exceptions=True)
            (unsure if outcome else accepted).append((name, number))

    def consume(number: int) -> None:
        try:
            while True:
                with_time = number % 2 == 0
                try:
                    delivered.append(channel.get(timeout=0 if with_time else HANG_LIMIT))
                except TimeoutError:
                    os.sched_yield()
        except co.ChannelClosed:
            return

    async def aconsume(rng: random.Random) -> None:
        while True:
            get = asyncio.create_task(channel.get_async())
            await ticks(rng.randrange(4))
            if rng.random() < 0.3:
                get.cancel()
            (outcome,) = await asyncio.gather(get, return_exceptions=True)
            if isinstance(outcome, co.ChannelClosed):
                return
            if not isinstance(outcome, asyncio.CancelledError):
                assert not isinstance(outcome, BaseException)
                delivered.append(outcome)

    consumers: list[Any] = [PrimThread(lambda n=n: consume(n)) for n in range(2)]  # type: ignore[misc]
    producers: list[Any] = [PrimThread(lambda n=n: produce(f"t{n}")) for n in range(2)]  # type: ignore[misc]
    for seed, loop in enumerate(loops):
        consumers.append(PrimTask(loop, lambda s=seed: aconsume(random.Random(s))))  # type: ignore[misc]
        producers.append(PrimTask(loop, lambda s=seed: aproduce(f"a{s}", random.Random(s))))  # type: ignore[misc]
    for producer in producers:
        producer.result()
    channel.close()
    for consumer in consumers:
        consumer.result()
    for loop in loops:
        loop.close()
    delivered.extend(channel)  # what a getter gave back after the others had gone
    assert len(delivered) == len(set(delivered))
    assert set(accepted) <= set(delivered) <= set(accepted) | set(unsure)
    assert channel.stats() == co.ChannelStats(2, 0, 0, 0, True)


def test_channel_loses_no_item_to_a_loop_that_is_gone() -> None:
    channel: co.Channel[str] = co.Channel(1)
    getter = prim_stranded(channel.get_async())
    channel.put("item", 0)
    assert channel.get(0) == "item"
    channel.put("first", 0)
    putter = prim_stranded(channel.put_async("never accepted"))
    assert channel.get(0) == "first"
    channel.put("second", 0)
    assert channel.get(0) == "second"
    getter, putter = prim_stranded(channel.get_async()), getter
    channel.close()
    assert channel.stats() == co.ChannelStats(1, 0, 0, 0, True)
    del getter, putter


def test_channel_refuses_misuse_and_says_what_it_does() -> None:
    for capacity in (0, -1):
        with pytest.raises(ValueError, match="capacity must be at least 1"):
            co.Channel(capacity)
    with pytest.raises(TypeError):
        co.Channel(1.5)  # type: ignore[arg-type]
    channel: co.Channel[int] = co.Channel(2)
    with pytest.raises(TimeoutError):
        channel.get(0)
    channel.put(1, 0)
    assert repr(channel) == "<Channel capacity=2 items=1 putters=0 getters=0 closed=False>"
    channel.put(2, 0)
    with pytest.raises(TimeoutError):
        channel.put(3, 0)
    channel.close()
    assert repr(channel) == "<Channel capacity=2 items=2 putters=0 getters=0 closed=True>"
    assert channel.stats() == co.ChannelStats(capacity=2, items=2, putters=0, getters=0, closed=True)
    with pytest.raises(AttributeError):
        channel.stats().closed = False  # type: ignore[misc]
    assert list(channel) == [1, 2]


@pytest.mark.parametrize("what", ["acquire", "put", "get"])
def test_ctrl_c_ends_a_blocked_thread_and_leaves_no_waiter(what: str) -> None:
    """A real signal, sent once the main thread is inside the blocking call."""
    semaphore, channel = co.Semaphore(1), co.Channel[int](1)
    assert semaphore.try_acquire()
    if what == "put":
        channel.put(0, 0)
    main = threading.main_thread().ident
    assert main is not None and main == threading.get_ident()

    def interrupt() -> None:
        frames = sys._current_frames
        wait_until(lambda: frames()[main].f_code is BLOCK.__code__)
        signal.pthread_kill(main, signal.SIGINT)

    helper = PrimThread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        if what == "acquire":
            semaphore.acquire()
        elif what == "put":
            channel.put(1)
        else:
            channel.get()
    helper.result()
    assert semaphore.stats() == co.SemaphoreStats(1, 0, 0)
    assert channel.stats() == co.ChannelStats(1, int(what == "put"), 0, 0, False)
