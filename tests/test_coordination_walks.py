"""Semaphore and Channel: random walks of one loop; cancelled at every step."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test

import coordination as co
from tests.helpers.base import HANG_LIMIT, HUNT, SETTINGS, run_task, ticks
from tests.helpers.mechanisms import LoopMachine


async def prim_cancelled(
    victim: Coroutine[Any, Any, Any],
    event: Callable[[asyncio.Task[Any]], Any],
    event_step: int,
    cancel_step: int,
    event_first: bool,
) -> Any:
    """Run the victim; let the event happen, and cancel the victim, before its given steps. Its result, or its error."""
    task = asyncio.create_task(victim)
    for step in range(9):
        if event_first and step == event_step:
            event(task)
        if step == cancel_step:
            task.cancel()
        if not event_first and step == event_step:
            event(task)
        await asyncio.sleep(0)
    return (await asyncio.gather(task, return_exceptions=True))[0]


def left_in(channel: co.Channel[Any]) -> list[Any]:
    """What is in a closed channel, which must end when that is taken."""
    items = []
    try:
        while True:
            items.append(channel.get(0))
    except TimeoutError:
        raise AssertionError("it never ends") from None
    except co.ChannelClosed:
        return items


ORDERS = list(itertools.product(range(4), range(6), (True, False)))


def check_semaphore_cancel(semaphore_type: type[co.Semaphore], effort: settings | None = None) -> None:
    """No permit is lost and no waiter left, whenever the victim is cancelled; those behind are served in order."""

    async def scenario(event_step: int, cancel_step: int, event_first: bool, how: str, behind: int) -> bool:
        semaphore = semaphore_type(1)
        assert semaphore.try_acquire()
        served: list[int] = []

        async def victim() -> str:
            if how == "plain":
                await semaphore.acquire_async()
                semaphore.release()
            elif how == "timeout":
                await asyncio.wait_for(semaphore.acquire_async(), HANG_LIMIT)
                semaphore.release()
            else:
                async with semaphore:
                    await ticks(2)
            return "served"

        async def other(number: int) -> None:
            async with semaphore:
                served.append(number)

        others: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: others.extend(loop.create_task(other(number)) for number in range(behind)))
        outcome = await prim_cancelled(victim(), lambda _: semaphore.release(), event_step, cancel_step, event_first)
        await ticks()
        assert all(worker.done() for worker in others), "somebody waits for a permit that is lost"
        assert await asyncio.gather(*others, return_exceptions=True) == [None] * behind
        assert outcome == "served" or isinstance(outcome, asyncio.CancelledError)
        assert served == list(range(behind))
        assert semaphore.stats() == co.SemaphoreStats(1, 1, 0)
        return bool(outcome == "served")

    async def all_of_them() -> set[bool]:
        return {
            await scenario(*order, how, behind)
            for order in ORDERS
            for how in ("plain", "timeout", "with")
            for behind in (0, 2)
        }

    assert run_task(all_of_them()) == {True, False}


def check_channel_get_cancel(channel_type: type[co.Channel[Any]], effort: settings | None = None) -> None:
    """Every accepted item is delivered exactly once, whenever a getter is cancelled."""

    async def scenario(event_step: int, cancel_step: int, event_first: bool, how: str, behind: int) -> bool:
        channel = channel_type(1)
        got: list[Any] = []

        async def victim() -> str:
            if how == "plain":
                got.append(await channel.get_async())
            elif how == "timeout":
                got.append(await asyncio.wait_for(channel.get_async(), HANG_LIMIT))
            else:
                async for item in channel:
                    got.append(item)
                    break
            return "served"

        async def other() -> None:
            got.append(await channel.get_async())

        others: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: others.extend(loop.create_task(other()) for _ in range(behind)))
        sent = iter(range(100))

        def event() -> None:
            channel.put(next(sent), 0)

        outcome = await prim_cancelled(victim(), lambda _: event(), event_step, cancel_step, event_first)
        assert outcome == "served" or isinstance(outcome, asyncio.CancelledError)
        while not all(worker.done() for worker in others):
            before = len(got)
            event()
            await ticks(4)
            assert len(got) == before + 1, "an item went to nobody"
        channel.close()
        got.extend(left_in(channel))
        assert sorted(got) == list(range(next(sent)))
        assert channel.stats() == co.ChannelStats(1, 0, 0, 0, True)
        return bool(outcome == "served")

    async def all_of_them() -> set[bool]:
        return {
            await scenario(*order, how, behind)
            for order in ORDERS
            for how in ("plain", "timeout", "for")
            for behind in (0, 2)
        }

    assert run_task(all_of_them()) == {True, False}


def check_channel_put_cancel(channel_type: type[co.Channel[Any]], effort: settings | None = None) -> None:
    """A put that returned is delivered once, one that was cancelled is not, and no putter stays behind."""

    async def scenario(event_step: int, cancel_step: int, event_first: bool, close: bool, behind: int) -> str:
        channel = channel_type(1)
        channel.put("first", 0)
        got: list[Any] = []
        others: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: others.extend(loop.create_task(channel.put_async(n)) for n in range(behind)))

        def event(_: asyncio.Task[Any]) -> None:
            got.append(channel.get(0))
            if close:
                channel.close()

        outcome = await prim_cancelled(channel.put_async("victim"), event, event_step, cancel_step, event_first)
        while channel.stats().items and not close:
            got.append(channel.get(0))
            await ticks(4)
        channel.close()
        refused = await asyncio.gather(*others, return_exceptions=True)
        got.extend(left_in(channel))
        assert got[0] == "first"
        assert got.count("victim") == (outcome is None)
        expected = [n for n, error in enumerate(refused) if error is None]
        assert [item for item in got[1:] if item != "victim"] == expected
        assert close or expected == list(range(behind))
        assert channel.stats() == co.ChannelStats(1, 0, 0, 0, True)
        return type(outcome).__name__

    async def all_of_them() -> set[str]:
        return {
            await scenario(*order, close, behind) for order in ORDERS for close in (True, False) for behind in (0, 2)
        }

    assert run_task(all_of_them()) == {"NoneType", "CancelledError", "ChannelClosed"}


def check_channel_close_cancel(channel_type: type[co.Channel[Any]], effort: settings | None = None) -> None:
    """Nobody is told that all is drained while an item may come back from a getter that is cancelled."""

    async def scenario(acts: tuple[str, ...], behind: int, late: bool) -> None:
        channel = channel_type(1)
        victim, *others = [asyncio.create_task(channel.get_async()) for _ in range(1 + behind)]
        await ticks(2)
        calls: dict[str, Callable[[], Any]] = {
            "cancel": victim.cancel,
            "put": lambda: channel.put("item", 0),
            "close": channel.close,
        }
        if late:  # it comes when the channel is closed, before the victim goes on
            others.append(asyncio.create_task(channel.get_async()))
        for act in acts:
            calls[act]()
        await ticks()
        assert all(task.done() for task in (victim, *others)), "somebody waits for what will never come"
        outcomes = await asyncio.gather(victim, *others, return_exceptions=True)
        assert type(outcomes[0]) is asyncio.CancelledError
        told = [outcome for outcome in outcomes[1:] if outcome != "item"]
        assert [type(outcome) for outcome in told] == [co.ChannelClosed] * (len(others) - 1)
        assert channel.stats() == co.ChannelStats(1, 0, 0, 0, True)

    async def all_of_them() -> None:
        for acts in itertools.permutations(["cancel", "put", "close"]):
            if acts.index("put") < acts.index("close"):
                for behind, late in ((1, False), (3, False), (0, True), (2, True)):
                    await scenario(acts, behind, late)

    run_task(all_of_them())


class SemaphoreMachine(LoopMachine):
    semaphore_type: ClassVar[type[co.Semaphore]] = co.Semaphore

    @initialize(permits=st.integers(1, 3))
    def start(self, permits: int) -> None:
        self.started = True
        self.semaphore = self.semaphore_type(permits)
        self.permits = permits
        self.held = 0  # by try_acquire
        self.order: list[int] = []
        self.released: set[asyncio.Task[Any]] = set()

    @rule()
    def acquire(self) -> None:
        async def worker(number: int) -> None:
            await self.semaphore.acquire_async()
            self.order.append(number)

        self.spawn(worker(len(self.tasks)))

    def holders(self) -> list[asyncio.Task[Any]]:
        return [t for t in self.tasks if t.done() and not t.cancelled() and t not in self.released]

    @rule()
    def try_acquire(self) -> None:
        before = self.semaphore.stats()
        taken = self.now(self.semaphore.try_acquire)
        assert not (taken and before.waiting)
        self.held += taken

    @precondition(lambda self: self.held or self.holders())
    @rule()
    def release(self) -> None:
        self.now(self.act)

    def act(self) -> None:
        holders = self.holders()
        if self.held:
            self.held -= 1
        elif holders:
            self.released.add(holders[0])
        else:
            return
        self.semaphore.release()

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "started"):
            stats = self.semaphore.stats()
            assert self.held + len(self.holders()) <= self.permits - stats.available
            assert stats.waiting == 0 or stats.available == 0

    @invariant()
    def fifo(self) -> None:
        if hasattr(self, "started"):
            assert self.order == sorted(self.order)

    @rule()
    def balance(self) -> None:
        self.settle()
        stats = self.semaphore.stats()
        assert self.held + len(self.holders()) + stats.available == self.permits
        assert stats.waiting == sum(not task.done() for task in self.tasks)

    def finish(self) -> None:
        self.settle()
        self.balance()
        super().finish()
        while self.held or self.holders():
            self.now(self.act)
        self.settle()
        assert self.semaphore.stats() == co.SemaphoreStats(self.permits, self.permits, 0)


class ChannelMachine(LoopMachine):
    channel_type: ClassVar[type[co.Channel[Any]]] = co.Channel

    @initialize(capacity=st.integers(1, 3), waiting=st.integers(-3, 3))
    def start(self, capacity: int, waiting: int) -> None:
        """So many getters wait from the beginning; below 0: putters."""
        self.started = True
        self.channel = self.channel_type(capacity)
        self.sent = itertools.count()
        self.puts: dict[asyncio.Task[Any] | None, list[int]] = {None: []}
        self.arrivals: list[asyncio.Task[Any] | int] = []  # getters, and what was got at once, in order
        self.gets: set[asyncio.Task[Any]] = set()
        self.closed = False
        for _ in range(waiting):
            self.get()
        for _ in range(capacity - waiting if waiting < 0 else 0):
            self.put()

    @rule()
    def put(self) -> None:
        item = next(self.sent)
        task = self.spawn(self.channel.put_async(item))
        self.puts[task] = [item]

    @rule()
    def get(self) -> None:
        task = self.spawn(self.channel.get_async())
        self.gets.add(task)
        self.arrivals.append(task)

    @rule()
    def put_nowait(self) -> None:
        self.now(self.act)

    def act(self) -> None:
        item = next(self.sent)
        try:
            self.channel.put(item, 0)
        except TimeoutError:
            return
        except co.ChannelClosed:
            assert self.closed
            return
        assert not self.closed
        self.puts[None].append(item)

    @rule()
    def get_nowait(self) -> None:
        self.now(self.get_at_once)

    def get_at_once(self) -> None:
        try:
            self.arrivals.append(self.channel.get(0))
        except TimeoutError:
            pass
        except co.ChannelClosed:
            assert self.closed

    def told(self) -> bool:
        """Whether anybody has been told that nothing is left."""
        return any(task.done() and not task.cancelled() and task.exception() is not None for task in self.gets)

    @precondition(lambda self: len(self.tasks) > 3)
    @rule()
    def close(self) -> None:
        self.now(self.close_at_once)

    def close_at_once(self) -> None:
        self.closed = True
        self.channel.close()

    def acts(self) -> list[Callable[[], Any]]:
        return [self.act, self.get_at_once, self.close_at_once]

    @precondition(lambda self: not self.closed)
    @rule(order=st.permutations(["late", "put", "cancel", "close"]), length=st.sampled_from([4, 4, 3, 2]))
    def at_once(self, order: list[str], length: int) -> None:
        """In one turn of the loop; the oldest is cancelled."""
        pending = [task for task in self.tasks if not task.done()]
        acts: dict[str, Callable[[], Any]] = {"put": self.act, "close": self.close_at_once, "late": self.late_getter}
        acts |= {"cancel": functools.partial(self.cancel_now, pending[0])} if pending else {}
        self.now(lambda: [acts[name]() for name in order[:length] if name in acts])

    def late_getter(self) -> None:
        """It arrives with its first step, in the next turn."""

        async def get() -> int:
            self.arrivals.append(task)
            return cast("int", await self.channel.get_async())

        task = self.loop.create_task(get())
        self.tasks.append(task)
        self.gets.add(task)

    def delivered(self) -> list[int]:
        items = []
        for arrival in self.arrivals:
            if isinstance(arrival, int):
                items.append(arrival)
            elif arrival.done() and not arrival.cancelled() and arrival.exception() is None:
                items.append(arrival.result())
        return items

    def accepted(self) -> set[int]:
        items = set(self.puts[None])
        for task, sent in self.puts.items():
            if task is not None and task.done() and not task.cancelled() and task.exception() is None:
                items.update(sent)
        return items

    @invariant()
    def exactly_once(self) -> None:
        if hasattr(self, "started"):
            delivered = self.delivered()
            assert len(delivered) == len(set(delivered))
            assert self.cancelled & self.gets or delivered == sorted(delivered)

    @invariant()
    def in_line(self) -> None:
        if hasattr(self, "started"):
            stats = self.channel.stats()
            assert stats.getters == 0 or stats.items == 0
            assert stats.putters == 0 or stats.items >= stats.capacity
            assert self.cancelled & self.gets or stats.items <= stats.capacity
            assert not (self.told() and stats.items)

    @rule()
    def balance(self) -> None:
        self.settle()
        stats = self.channel.stats()
        assert stats.getters == sum(not task.done() for task in self.gets)
        assert stats.putters == sum(not task.done() for task in self.puts if task is not None)
        assert not self.closed or stats.getters == stats.putters == 0
        assert len(self.accepted() - set(self.delivered())) == stats.items

    def finish(self) -> None:
        self.settle()
        self.balance()
        super().finish()
        self.closed = True
        self.now(self.channel.close)
        left: list[int] = self.now(lambda: left_in(self.channel))
        assert self.cancelled & self.gets or left == sorted(left)
        assert not {item for task in self.cancelled - self.gets for item in self.puts[task]} & {*left}
        delivered = self.delivered() + left
        assert len(delivered) == len(set(delivered))
        assert self.accepted() <= set(delivered)
        refused = {
            item
            for task, sent in self.puts.items()
            if task is not None and not task.cancelled() and task.exception() is not None
            for item in sent
        }
        assert not refused & set(delivered)
        assert self.channel.stats() == co.ChannelStats(self.channel.capacity, 0, 0, 0, True)


def check_semaphore_walk(semaphore_type: type[co.Semaphore], effort: settings = SETTINGS) -> None:
    machine = type("Machine", (SemaphoreMachine,), {"semaphore_type": semaphore_type, "debug": effort is not HUNT})
    run_state_machine_as_test(machine, settings=effort)


def check_channel_walk(channel_type: type[co.Channel[Any]], effort: settings = SETTINGS) -> None:
    machine = type("Machine", (ChannelMachine,), {"channel_type": channel_type, "debug": effort is not HUNT})
    run_state_machine_as_test(machine, settings=effort)


WAITING_PROPERTIES: list[tuple[Callable[..., None], type]] = [
    (check_semaphore_cancel, co.Semaphore),
    (check_channel_get_cancel, co.Channel),
    (check_channel_put_cancel, co.Channel),
    (check_channel_close_cancel, co.Channel),
    (check_semaphore_walk, co.Semaphore),
    (check_channel_walk, co.Channel),
]


@pytest.mark.parametrize(("check", "kind"), WAITING_PROPERTIES, ids=lambda x: x.__name__)
def test_waiting_keeps_its_promises(check: Callable[..., None], kind: type) -> None:
    check(kind)


def test_a_coroutine_that_is_closed_leaves_too() -> None:
    """Not every coroutine is run by a task to its end; one that is thrown away must not stay in a queue."""

    async def main() -> None:
        semaphore, channel = co.Semaphore(1), co.Channel[int](1)
        assert semaphore.try_acquire()
        for waiting in (semaphore.acquire_async(), channel.get_async()):
            waiting.send(None)
            waiting.close()
        channel.put(0, 0)
        putting = channel.put_async(1)
        putting.send(None)
        putting.close()
        assert semaphore.stats() == co.SemaphoreStats(1, 0, 0)
        assert channel.stats() == co.ChannelStats(1, 1, 0, 0, False)

    run_task(main())
