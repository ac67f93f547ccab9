"""coordination.py: fan-out, hedging, worker pool, visited."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import math
import random
import selectors
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, cast

import pytest

import coordination as co
import primitives as pr
from tests.helpers.base import HANG_LIMIT, run_task, ticks, wait_until
from tests.helpers.mechanisms import PrimThread, in_threads

# ------------------------ coordination.py and primitives.py: fan-out, hedging, worker pool, batch, visited, lock order
#
# The time of the event loop is virtual: a deadline of 300 ms is exact to the bit, and takes no time at all.


class FanSelector(selectors.SelectSelector):
    """Never waits: where it would, the clock goes on. Where nothing could ever happen again, it says so."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for ever"
            self.now = round(self.now + max(0.0, timeout), 9)
        return ready


class FanLoop(asyncio.SelectorEventLoop):
    """An event loop whose seconds pass at once."""

    def __init__(self) -> None:
        self._virtual = FanSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def fan_now() -> float:
    return asyncio.get_running_loop().time()


async def elapse(seconds: float) -> None:
    """Wait until so many seconds have passed by the clock of the loop."""
    over = asyncio.Event()
    timer = asyncio.get_running_loop().call_later(seconds, over.set)
    try:
        await over.wait()
    finally:
        timer.cancel()


def fan_run(main: Coroutine[Any, Any, Any]) -> None:
    """Run on virtual time, in debug mode; fails if a task is left, or if the loop had anything to complain of."""
    complaints: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        await main
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with asyncio.Runner(debug=True, loop_factory=FanLoop) as runner:
        runner.run(watched())
    assert complaints == []


class FanCalls:
    """Calls that take their time, and a record of how and when they ended."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, str, float]] = []
        self.running = self.peak = 0

    def make(self, name: str, *tries: tuple[float, Any], cleanup: float = 0.0) -> Callable[[], Awaitable[Any]]:
        """Each call takes the next of the tries: seconds, and what it then returns or raises. The second is name'."""
        numbers = itertools.count()

        async def call() -> Any:
            number, how = next(numbers), "failed"
            seconds, answer = tries[number]
            self.running += 1
            self.peak = max(self.peak, self.running)
            try:
                await elapse(seconds)
                if isinstance(answer, BaseException):
                    raise answer
                how = "done"
                return answer
            except asyncio.CancelledError as error:
                if error is not answer:
                    how = "cancelled"
                    await (elapse(cleanup) if cleanup else ticks(1))
                raise
            finally:
                self.running -= 1
                self.ends.append((name + "'" * number, how, fan_now()))

        return call

    def cancel_at(self, moments: list[float], victim: asyncio.Future[Any]) -> asyncio.Future[Any]:
        for moment in moments:
            asyncio.get_running_loop().call_at(moment, victim.cancel)
        return victim


def fan_check_deadline() -> None:
    """At the deadline, to the bit, an outcome for each; those that were not done were cancelled, and have ended."""

    async def main(latencies: dict[str, float]) -> None:
        calls, late = FanCalls(), co.Outcome[Any]("timeout", None, None)
        made = {name: calls.make(name, (seconds, name))() for name, seconds in latencies.items()}
        outcomes = await co.fan_out(made, 0.3)
        ok = {name: co.Outcome("ok", name, None) for name, seconds in latencies.items() if seconds < 0.3}
        assert list(outcomes.items()) == [(name, ok.get(name, late)) for name in latencies]
        assert fan_now() == min(0.3, max(latencies.values()))
        ends = {name: (name, "done", latencies[name]) for name in ok}
        assert sorted(calls.ends) == [ends.get(name, (name, "cancelled", 0.3)) for name in latencies]

    for seed in range(12):
        choice = random.Random(seed).choice
        fan_run(main({name: choice([*range(50, 300), *range(301, 401)]) / 1000 for name in "abcdefgh"}))
    fan_run(main(dict.fromkeys("abcdefgh", 0.25)))
    fan_run(main(dict.fromkeys("abcdefgh", 0.4)))


def fan_check_stragglers() -> None:
    """Who needs time to clean up gets it, also if the caller is cancelled, even twice, while it waits for that."""

    async def main(cancelled_at: list[float], end: float) -> None:
        calls = FanCalls()
        made = {name: calls.make(name, (9.0, 0), cleanup=after)() for name, after in (("slow", 0.5), ("slower", 0.75))}
        made["quick"] = calls.make("quick", (0.0625, 0))()
        caller = calls.cancel_at(cancelled_at, asyncio.ensure_future(co.fan_out(made, 0.25)))
        if cancelled_at:
            with pytest.raises(asyncio.CancelledError):
                await caller
        else:
            assert [outcome.status for outcome in (await caller).values()] == ["timeout"] * 2 + ["ok"]
        ends = [("quick", "done", 0.0625), ("slow", "cancelled", end - 0.25), ("slower", "cancelled", end)]
        assert (calls.ends, fan_now()) == (ends, end)

    fan_run(main([], 1.0))
    fan_run(main([0.125], 0.875))
    fan_run(main([0.125, 0.25, 0.5], 0.875))
    fan_run(main([0.5, 0.75], 1.0))


@pytest.mark.parametrize("check", [fan_check_deadline, fan_check_stragglers])
def test_fan_out_keeps_its_promises(check: Callable[[], None]) -> None:
    check()


def test_fan_out_reports_every_kind_of_error() -> None:
    refused, sudden = ValueError("no"), OSError("at once")

    async def broken() -> Any:
        raise sudden

    async def main() -> None:
        calls = FanCalls()
        made = {"late": calls.make("late", (0.2, 7)), "error": calls.make("error", (0.1, refused)), "sudden": broken}
        made["self"] = calls.make("self", (0.1, asyncio.CancelledError()))
        outcomes = await co.fan_out({name: call() for name, call in made.items()}, 1.0)
        assert fan_now() == 0.2
        assert [outcome.status for outcome in outcomes.values()] == ["ok"] + ["error"] * 3
        assert outcomes["error"] == ("error", None, refused)
        assert outcomes["sudden"] == ("error", None, sudden)
        assert type(outcomes["self"].error) is asyncio.CancelledError

    fan_run(main())


def test_fan_out_at_the_very_deadline_tells_what_happened() -> None:
    async def survives(error: Exception | None) -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await elapse(9.0)
        await elapse(0.25)
        if error is not None:
            raise error
        return "too late"

    async def main() -> None:
        calls = FanCalls()
        made = {name: calls.make(name, (seconds, 0))() for name, seconds in (("a", 0.25), ("b", 0.25), ("c", 0.249))}
        made |= {str(error): survives(error) for error in (None, OSError("in its clean-up"))}
        outcomes = list((await co.fan_out(made, 0.25)).values())
        status = {name: "ok" if how == "done" else "timeout" for name, how, _ in calls.ends}
        assert [outcome.status for outcome in outcomes[:3]] == [status[name] for name in "abc"]
        assert outcomes[2:] == [("ok", 0, None)] + [("timeout", None, None)] * 2
        assert fan_now() == 0.5

    fan_run(main())


def test_fan_out_of_nothing_and_refusals() -> None:
    async def main() -> None:
        assert await co.fan_out({}, 0.3) == {}
        for deadline in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="must be"):
                await co.fan_out({}, deadline)
        calls = FanCalls()
        with pytest.raises(TypeError):
            await co.fan_out({"a": calls.make("a", (9.0, 0))(), "b": cast(Any, 7)})
        with pytest.raises(TypeError):
            await co.fan_out({}, limit=5 / 2)  # type: ignore[call-arg]

    fan_run(main())


@pytest.mark.parametrize("cancelled", [False, True], ids=["late", "cancelled"])
def test_fan_out_lets_go_on_what_others_wait_for_too(cancelled: bool) -> None:
    async def main() -> None:
        calls = FanCalls()
        made = {name: calls.make(name, (after, name)) for name, after in (("a", 0.1), ("b", 0.5))}
        loads = {name: asyncio.ensure_future(call()) for name, call in made.items()}
        caller = asyncio.ensure_future(co.fan_out(loads, 0.3, cancel=False))
        if cancelled:
            with pytest.raises(asyncio.CancelledError):
                await calls.cancel_at([0.2], caller)
        else:
            assert await caller == {"a": ("ok", "a", None), "b": ("timeout", None, None)}
        assert await co.fan_out(loads) == {"a": ("ok", "a", None), "b": ("ok", "b", None)}
        assert calls.ends == [("a", "done", 0.1), ("b", "done", 0.5)]

    fan_run(main())


def test_fan_out_in_real_time() -> None:
    async def main() -> None:
        calls, began = FanCalls(), time.monotonic()
        outcomes = await co.fan_out({n: calls.make(n, (ord(n) % 2 * 60.0, n))() for n in "abcdefgh"}, 0.3)
        assert time.monotonic() - began >= 0.3
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert [outcome.status for outcome in outcomes.values()] == ["timeout", "ok"] * 4
        assert Counter(how for _, how, _ in calls.ends) == {"done": 4, "cancelled": 4}

    run_task(main())


# ------------------------------------------------------------------------------------------------------------- hedging

FAN_ONE, FAN_TWO = OSError("one"), OSError("two")


@pytest.mark.parametrize(
    ("tries", "answer", "ends"),
    [
        ([(0.05, "A")], "A", ["a done 0.05"]),
        ([(0.5, "A"), (0.1, "B")], "B", ["a' done 0.2", "a cancelled 0.2"]),
        ([(0.15, "A"), (0.5, "B")], "A", ["a done 0.15", "a' cancelled 0.15"]),
        ([(0.15, FAN_ONE), (0.2, "B")], "B", ["a failed 0.15", "a' done 0.3"]),
        ([(0.15, asyncio.CancelledError()), (0.2, "B")], "B", ["a failed 0.15", "a' done 0.3"]),
        ([(0.5, "A"), (0.1, FAN_TWO)], "A", ["a' failed 0.2", "a done 0.5"]),
        ([(0.5, FAN_ONE), (0.1, FAN_TWO)], FAN_ONE, ["a' failed 0.2", "a failed 0.5"]),
        ([(0.15, FAN_ONE), (0.2, FAN_TWO)], FAN_ONE, ["a failed 0.15", "a' failed 0.3"]),
        ([(0.05, FAN_ONE)], FAN_ONE, ["a failed 0.05"]),
    ],
)
def test_fan_hedged(tries: list[tuple[float, Any]], answer: Any, ends: list[str]) -> None:
    async def main() -> None:
        calls = FanCalls()
        given = await asyncio.gather(pr.hedged(calls.make("a", *tries), 0.1), return_exceptions=True)
        assert list(given) == [answer]
        assert [" ".join(map(str, end)) for end in calls.ends] == ends

    fan_run(main())


def test_fan_hedged_asks_its_budget() -> None:
    async def main() -> None:
        budget, calls = pr.RetryBudget(0.5, 0), FanCalls()
        answers = [await pr.hedged(calls.make(name, (0.5, "A"), (0.1, "B")), 0.1, budget) for name in "abcde"]
        assert answers == ["A", "B", "A", "B", "A"]
        assert await pr.hedged(calls.make("quick", (0.05, "A")), 0.1, budget) == "A"  # earns, and spends nothing
        assert budget.stats() == (6, 2, 3, 1.0)

    fan_run(main())


def test_fan_hedged_cancelled_ends_both() -> None:
    async def main(moments: list[float], ends: list[tuple[str, str, float]]) -> None:
        calls = FanCalls()
        hedging = asyncio.ensure_future(pr.hedged(calls.make("a", (9.0, 1), (9.0, 2), cleanup=0.2), 0.1))
        with pytest.raises(asyncio.CancelledError):
            await calls.cancel_at(moments, hedging)
        assert calls.ends == ends

    fan_run(main([0.05], [("a", "cancelled", 0.25)]))
    fan_run(main([0.2, 0.3], [("a", "cancelled", 0.4), ("a'", "cancelled", 0.4)]))


# --------------------------------------------------------------------------------------------------------- worker pool


class PoolShell:
    """Workers of either kind, a gate for their handlers to wait at, and a record of what became of the items."""

    def __init__(self, kind: str, pool_type: type[co.WorkerPool[Any]] = co.WorkerPool) -> None:
        self.threads, self.pool_type = kind == "threads", pool_type
        self.gate, self.agate = threading.Event(), asyncio.Event()
        self.begun: list[Any] = []
        self.ended: list[tuple[Any, str]] = []

    def run(self, main: Coroutine[Any, Any, None]) -> None:
        (run_task if self.threads else fan_run)(main)
        assert [thread for thread in threading.enumerate() if thread.name.startswith("worker-")] == []

    @contextlib.asynccontextmanager
    async def pool(self, handle: Callable[[Any], Any], *sizes: int) -> AsyncIterator[co.WorkerPool[Any]]:
        def to_the_end(item: Any) -> None:  # in one step: in threads the gate blocks
            with contextlib.suppress(StopIteration):
                handle(item).send(None)

        pool = self.pool_type(to_the_end if self.threads else handle, *sizes)
        with pool if self.threads else contextlib.nullcontext():
            async with contextlib.nullcontext() if self.threads else pool:
                yield pool

    async def gated(self, item: Any) -> None:
        self.begun.append(item)
        try:
            assert self.gate.wait(HANG_LIMIT) if self.threads else await self.agate.wait()
            self.ended.append((item, "done"))
        except asyncio.CancelledError:
            self.ended.append((item, "cancelled"))
            raise

    def open_gate(self) -> None:
        self.gate.set()
        self.agate.set()

    async def submit(self, pool: co.WorkerPool[Any], *items: Any) -> None:
        for item in items:
            await (asyncio.to_thread(pool.submit, item) if self.threads else pool.submit_async(item))

    async def close(self, pool: co.WorkerPool[Any], timeout: float | None = None) -> bool:
        return pool.close(timeout) if self.threads else await pool.close_async(timeout)

    async def until(self, predicate: Callable[[], bool]) -> None:
        await ticks()
        if self.threads:
            wait_until(predicate)
        assert predicate()


pool_both = pytest.mark.parametrize("kind", ["threads", "tasks"])


def pool_check_exactly_once(kind: str, pool_type: type[co.WorkerPool[Any]] = co.WorkerPool) -> None:
    """Each accepted item is handled by one of the workers, errors or not, before the block is left."""
    shell = PoolShell(kind, pool_type)

    async def main(workers: int, n: int, every: int, *capacity: int) -> None:
        async def handle(item: int) -> None:
            shell.begun.append(item)
            if item % every == 0:
                raise LookupError(item)

        shell.begun.clear()
        async with shell.pool(handle, workers, *capacity) as pool:
            await asyncio.gather(*(shell.submit(pool, *range(first, n, workers)) for first in range(workers)))
        assert Counter(shell.begun) == Counter(range(n))
        assert pool.stats() == (workers, 0, n, len(range(0, n, every)))
        failed = sorted((item, error.args) for item, error in pool.errors)
        assert failed == [(item, (item,)) for item in range(0, n, every)][-100:]

    shell.run(main(1, 6, 2, 9))
    shell.run(main(1, 130, 1, 130))
    shell.run(main(4, 60, 4))
    shell.run(main(3, 60, 4, 1))


@pool_both
def test_pool_handles_each_item_once(kind: str) -> None:
    pool_check_exactly_once(kind)


@pool_both
@pytest.mark.parametrize("closes", [False, True], ids=["goes on", "closes"])
def test_pool_makes_submitters_wait(kind: str, closes: bool) -> None:
    shell = PoolShell(kind)

    async def main() -> None:
        async with shell.pool(shell.gated, 1) as pool:
            await shell.submit(pool, "in hand")
            await shell.until(lambda: shell.begun == ["in hand"])
            await shell.submit(pool, "a", "b")
            assert repr(pool) == "<WorkerPool workers=1 queued=2 handled=0 failed=0>"
            with pytest.raises(TimeoutError):
                pool.submit("late", timeout=0.0)
            waiting = asyncio.create_task(shell.submit(pool, "c"))
            await shell.until(lambda: pool._channel.stats().putters == 1)
            assert not waiting.done()
            if closes:
                pool._channel.close()
                with pytest.raises(co.ChannelClosed):
                    await waiting
            shell.open_gate()
            if not closes:
                await waiting
            assert [await shell.close(pool) for _ in range(2)] == [True, True]
            with pytest.raises(co.ChannelClosed):
                await shell.submit(pool, "after")
        assert [item for item, _ in shell.ended] == ["in hand", "a", "b", "c"][: 3 if closes else 4]

    shell.run(main())


@pool_both
def test_pool_gives_up_on_a_stuck_handler(kind: str) -> None:
    shell = PoolShell(kind)

    async def main() -> None:
        async with shell.pool(shell.gated, 2, 9) as pool:
            await shell.submit(pool, *range(5))
            await shell.until(lambda: len(shell.begun) == 2)
            assert await shell.close(pool, 0.0 if shell.threads else 0.3) is False
            cut = 0 if shell.threads else 2  # a task that is cut off says so: its item is among the errors
            assert pool.stats() == (2, 3, cut, cut)
            errors = sorted((item, type(error)) for item, error in pool.errors)
            assert errors == [(item, asyncio.CancelledError) for item in range(cut)]
            assert shell.threads or fan_now() == 0.3
            shell.open_gate()
            await shell.until(lambda: not any(thread.is_alive() for thread in pool._threads))
            how = "done" if shell.threads else "cancelled"  # a thread ends after the item in hand
            assert sorted(shell.ended) == [(0, how), (1, how)]
            assert await shell.close(pool) is False  # nobody is left to handle the rest
            assert pool.stats() == (2, 3, 2, cut)

    shell.run(main())


def test_pool_of_tasks_survives_what_is_no_exception_and_ends_with_its_block() -> None:
    class Stop(BaseException):
        pass

    async def stop(item: int) -> None:
        raise Stop

    async def leave(item: int) -> None:
        await pools[0].close_async()

    async def linger(item: int) -> None:
        await elapse(0.25)

    async def main() -> None:
        async with co.WorkerPool(stop, 2) as pool:
            for item in range(20):
                await pool.submit_async(item)
        assert pool.stats() == (2, 0, 20, 20)
        pools.append(pool := co.WorkerPool(leave, 1))
        async with pool:
            await pool.submit_async(0)
        assert "its own pool" in str(pool.errors[0][1])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0), co.WorkerPool(linger, 1, 100) as pool:
                for item in range(20):
                    await pool.submit_async(item)
                await elapse(9.0)
        assert fan_now() == 1.0
        assert pool.stats().queued + pool.stats().handled == 20

    pools: list[co.WorkerPool[int]] = []
    fan_run(main())


def test_pool_worker_that_is_thrown_away_keeps_no_item() -> None:
    async def hang(item: int) -> None:
        await asyncio.sleep(0)

    pool = co.WorkerPool(hang, 1)
    pool._channel.put(7)
    worker = pool._work_async()
    worker.send(None)
    worker.close()
    assert pool.stats() == (1, 0, 0, 0)


@pytest.mark.parametrize("hedge", [None, 9.0])
def test_fan_out_leaves_no_cycle(hedge: float | None) -> None:
    async def fail() -> None:
        raise FanError

    def call() -> Awaitable[None]:
        return fail() if hedge is None else pr.hedged(fail, hedge)

    async def main() -> None:
        gc.collect()
        gc.disable()
        try:
            answer = await co.fan_out({"a": call()}, 1.0)
            error = weakref.ref(answer["a"].error)
            assert error() is not None
            del answer
            assert error() is None
        finally:
            gc.enable()

    asyncio.run(main())


class FanError(Exception):
    pass


def test_pool_whose_closing_is_cancelled_ends_its_tasks() -> None:
    async def main() -> None:
        calls = FanCalls()
        handlers = [calls.make(name, (9.0, None), cleanup=0.2) for name in "ab"]
        async with co.WorkerPool[int](lambda item: handlers[item](), 2) as pool:
            await PoolShell("tasks").submit(pool, 0, 1)
            with pytest.raises(asyncio.CancelledError):
                await calls.cancel_at([0.1, 0.2], asyncio.ensure_future(pool.close_async()))
            assert calls.ends == [("a", "cancelled", 0.3), ("b", "cancelled", 0.3)]

    fan_run(main())


@pytest.mark.parametrize("answer", [OSError("interrupted"), "swallowed"])
def test_pool_that_gave_up_begins_no_other_item(answer: Any) -> None:
    begun = []

    async def stubborn(item: int) -> None:
        begun.append(item)
        with contextlib.suppress(asyncio.CancelledError):
            await elapse(1.0)
        if isinstance(answer, Exception):
            raise answer

    async def main() -> None:
        async with co.WorkerPool(stubborn, 1, 9) as pool:
            await PoolShell("tasks").submit(pool, 0, 1, 2)
            assert await pool.close_async(0.3) is False
            assert (begun, fan_now()) == ([0], 0.3)
            assert pool.stats() == (1, 2, 1, isinstance(answer, Exception))

    fan_run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("kind", "end"), [("threads", SystemExit), ("tasks", asyncio.CancelledError)])
def test_pool_survives_what_is_no_exception(kind: str, end: type[BaseException]) -> None:
    shell = PoolShell(kind)

    async def handle(item: int) -> None:
        if item == 0:
            raise end

    async def main() -> None:
        async with shell.pool(handle, 1, 9) as pool:
            await shell.submit(pool, 0, 1, 2)
        assert pool.stats() == (1, 0, 3, 1)
        assert [(item, type(error)) for item, error in pool.errors] == [(0, end)]

    shell.run(main())


def test_pool_refuses_its_sizes_and_need_not_begin() -> None:
    for workers, capacity in ((0, None), (-1, 5), (1, 0), (1, -1)):
        with pytest.raises(ValueError, match="must be at least 1"):
            co.WorkerPool(print, workers, capacity)
    for sizes in ((5 / 2,), (1, 1.5)):
        with pytest.raises(TypeError):
            co.WorkerPool(print, *sizes)
    pool = co.WorkerPool[Any](print, 1)
    assert pool.close() is True
    fan_run(pool.close_async())


def test_pool_that_nobody_started_takes_nothing() -> None:
    pool = co.WorkerPool(print, 1, 9)
    with pytest.raises(RuntimeError, match="enter it"):
        pool.submit(1)
    with pytest.raises(RuntimeError, match="enter it"):
        asyncio.run(pool.submit_async(1))
    assert pool.stats() == (1, 0, 0, 0)


@pool_both
def test_pool_starts_once(kind: str) -> None:
    shell = PoolShell(kind)

    async def main() -> None:
        async with shell.pool(shell.gated, 2) as pool:
            with pytest.raises(RuntimeError, match="once"):
                pool.start_tasks()
        with pytest.raises(RuntimeError, match="once"):
            (pool.start_threads if shell.threads else pool.start_tasks)()
        with pytest.raises(co.ChannelClosed):
            pool.submit(1)

    shell.run(main())


def test_pool_of_threads_has_no_more_of_them_than_items_came() -> None:
    pool = co.WorkerPool(print, 3, name="idle")
    with pool:
        assert pool._threads == []
        pool.submit("one")
        assert [thread.name for thread in pool._threads] == ["idle-0"]
        pool.submit("two")
        asyncio.run(pool.submit_async("three"))
        pool.submit("four")
        assert len(pool._threads) == 3
    assert pool.stats().handled == 4


def test_pool_of_threads_refuses_coroutines() -> None:
    begun = []

    async def handle(item: int, *_: Any) -> None:
        begun.append(item)

    class Handler:
        async def __call__(self, item: int) -> None:
            begun.append(item)

    for function in (handle, functools.partial(handle, 1), Handler()):
        with pytest.raises(TypeError, match="await"), co.WorkerPool(function, 1):
            pytest.fail("it was entered")
    with co.WorkerPool[int](lambda item: handle(item), 1) as pool:  # that is seen only when it is called
        pool.submit(1)
    assert (pool.stats(), begun) == ((1, 0, 1, 1), [])
    assert [(item, type(error)) for item, error in pool.errors] == [(1, TypeError)]


class PoolItem:
    pass


@pool_both
@pytest.mark.parametrize("error", [None, OSError("handled"), asyncio.CancelledError()], ids=repr)
def test_pool_an_idle_worker_lets_its_last_item_go(kind: str, error: BaseException | None) -> None:
    shell = PoolShell(kind)

    async def handle(item: PoolItem) -> None:
        if error is not None:
            raise error

    async def main() -> None:
        async with shell.pool(handle, 1) as pool:
            item = PoolItem()
            last = weakref.ref(item)
            await shell.submit(pool, item)
            del item
            await shell.until(lambda: pool.stats().handled == 1 and pool._channel.stats().getters == 1)
            pool.errors.clear()
            if error is not None:
                error.__traceback__ = error.__context__ = None
            await shell.until(lambda: last() is None)

    shell.run(main())


def test_pool_of_tasks_gives_way_between_items_that_wait_for_nothing() -> None:
    seen = []

    async def handle(item: int) -> None:
        seen.append(item)

    async def main() -> None:
        async with co.WorkerPool(handle, 1, 100) as pool:
            for item in range(100):
                pool.submit(item, 0)
            await ticks(3)
            assert len(seen) < 5

    fan_run(main())


# ------------------------------------------------------------------------------------------------------------- visited


def test_visited_tells_one_of_many_threads() -> None:
    visited, told = co.Visited[int](), list[int]()
    in_threads([lambda: told.extend(key for key in range(300) if visited.add(key))] * 8)
    assert sorted(told) == list(range(300))
    assert (len(visited), visited.stats()) == (300, (300, 2100))
    assert repr(visited) == "<Visited keys=300 repeats=2100>"


class VisitedKey:
    """Equal to all of its kind. Looked at for the second time, to be added, it calls."""

    def __init__(self, second: Callable[[], Any] = lambda: None) -> None:
        self.second, self.looks = second, 0

    def __hash__(self) -> int:
        self.looks += 1
        if self.looks == 2:
            self.second()
        return 7

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VisitedKey)


def visited_check_one_step(visited_type: type[co.Visited[VisitedKey]]) -> None:
    """Between the question and the mark another one asks: it has to wait."""
    visited, others = visited_type(), list[PrimThread]()

    def intrude() -> None:
        others.append(PrimThread(lambda: visited.add(VisitedKey())))
        wait_until(lambda: others[0].done() or visited._lock.locked())

    assert visited.add(VisitedKey(intrude)) is True
    assert others[0].result() is False
    assert visited.stats() == (1, 1)


def test_visited_asks_and_marks_in_one_step() -> None:
    visited_check_one_step(co.Visited)
