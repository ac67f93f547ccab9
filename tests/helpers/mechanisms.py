"""One suite over threads and tasks: how each waits."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import itertools
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

import coordination as co
import primitives as pr
from tests.helpers.base import HANG_LIMIT, World, wait_until

STEPS = st.integers(0, 320).map(lambda k: k / 64)


def error_of(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except BaseException as error:
        return error
    return None


async def error_of_task(awaitable: Awaitable[Any]) -> BaseException | None:
    try:
        await awaitable
    except BaseException as error:
        return error
    return None


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """What the calls, all at once with the smallest time slices, return; the first error of theirs is raised."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
            return [future.result(HANG_LIMIT) for future in [pool.submit(call) for call in calls]]
    finally:
        sys.setswitchinterval(interval)


def settle(outcome: concurrent.futures.Future[Any], call: Callable[[], Any]) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:
        outcome.set_exception(error)


prim_local = threading.local()


BLOCK = co.Waiter.block


def gated_block(waiter: co.Waiter, timeout: float | None) -> None:
    """Block as told: a worker that is to be interrupted or to time out does so when the test says, not the clock."""
    worker: PrimThread | None = getattr(prim_local, "worker", None)
    if worker is None or not worker.gated:
        return BLOCK(waiter, timeout)
    assert worker.gate.wait(HANG_LIMIT)
    if worker.interrupt is not None:
        raise worker.interrupt
    return None


class PrimThread:
    """A blocking call in a thread of its own."""

    def __init__(self, call: Callable[[], Any], gated: bool = False) -> None:
        self.gated = gated
        self.gate = threading.Event()
        self.interrupt: BaseException | None = None
        self.outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self.thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        prim_local.worker = self
        settle(self.outcome, call)

    def done(self) -> bool:
        return self.outcome.done()

    def result(self) -> Any:
        self.thread.join(HANG_LIMIT)
        return self.outcome.result(HANG_LIMIT)

    def cancel(self, after: Callable[[], Any] = lambda: None) -> None:
        """Interrupt the wait, as Ctrl-C does, right after the given call."""
        after()
        self.interrupt = KeyboardInterrupt()
        self.gate.set()
        assert isinstance(self.outcome.exception(HANG_LIMIT), KeyboardInterrupt)

    def expire(self, after: Callable[[], Any] = lambda: None) -> Any:
        """Let the wait time out right after the given call."""
        after()
        self.gate.set()
        return self.result()


class PrimTask:
    """An awaited call in a task of a loop that runs in another thread."""

    def __init__(self, loop: Loop, call: Callable[[], Awaitable[Any]]) -> None:
        self.loop = loop
        self.outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.task = loop.do(lambda: loop.loop.create_task(self._run(call)))

    async def _run(self, call: Callable[[], Awaitable[Any]]) -> None:
        try:
            self.outcome.set_result(await call())
        except BaseException as error:
            self.outcome.set_exception(error)

    def done(self) -> bool:
        return self.outcome.done()

    def result(self) -> Any:
        return self.outcome.result(HANG_LIMIT)

    def cancel(self, after: Callable[[], Any] = lambda: None) -> None:
        def both() -> None:
            after()
            self.task.cancel()

        self.loop.do(both)
        assert isinstance(self.outcome.exception(HANG_LIMIT), asyncio.CancelledError)


class Loop:
    """An event loop in debug mode in a thread of its own."""

    def __init__(self) -> None:
        self.complaints: list[dict[str, Any]] = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_debug(True)
        self.loop.slow_callback_duration = HANG_LIMIT
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def do(self, call: Callable[[], Any]) -> Any:
        """Run the call in the loop's thread."""
        outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.loop.call_soon_threadsafe(settle, outcome, call)
        return outcome.result(HANG_LIMIT)

    def close(self) -> None:
        for task in self.do(lambda: asyncio.all_tasks(self.loop)):
            self.do(task.cancel)
        wait_until(lambda: not self.do(lambda: asyncio.all_tasks(self.loop)))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(HANG_LIMIT)
        self.loop.close()
        assert self.complaints == []


class Shell:
    """Starts each call in a thread, in a task, or in turns in a thread and in tasks of two loops."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.loops = [Loop() for _ in range({"threads": 0, "tasks": 1, "mixed": 2}[kind])]
        homes: list[Loop | None] = [*self.loops] if kind == "tasks" else [None, *self.loops]
        self.homes = itertools.cycle(homes)

    def start(
        self, call: Callable[[], Any], acall: Callable[[], Awaitable[Any]], gated: bool = False
    ) -> PrimThread | PrimTask:
        home = next(self.homes)
        return PrimThread(call, gated) if home is None else PrimTask(home, acall)

    def do(self, call: Callable[[], Any]) -> Any:
        """What does not wait: in the loop if there is one only, else from outside."""
        return self.loops[0].do(call) if self.kind == "tasks" else call()

    def acquire(self, semaphore: co.Semaphore, gated: bool = False) -> PrimThread | PrimTask:
        return self.start(semaphore.acquire, semaphore.acquire_async, gated)

    def put(self, channel: co.Channel[Any], item: Any, gated: bool = False) -> PrimThread | PrimTask:
        return self.start(lambda: channel.put(item), lambda: channel.put_async(item), gated)

    def get(self, channel: co.Channel[Any], gated: bool = False) -> PrimThread | PrimTask:
        return self.start(channel.get, channel.get_async, gated)

    def drain(self, channel: co.Channel[Any]) -> PrimThread | PrimTask:
        async def adrain() -> list[Any]:
            return [item async for item in channel]

        return self.start(lambda: list(channel), adrain)


@pytest.fixture(params=["threads", "tasks", "mixed"])
def prim_shell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    monkeypatch.setattr(co.Waiter, "block", gated_block)
    shell = Shell(request.param)
    yield shell
    for loop in shell.loops:
        loop.close()


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is a world's: where it would sleep, that goes on."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self._look = world, self._selector.select  # type: ignore[attr-defined]
        self._selector.select = self._jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.world.now

    def _jump(self, timeout: float | None) -> Any:
        assert timeout is not None, "nothing will ever happen"
        self.world.now += timeout
        return self._look(0)


def simulated(main: Callable[[World], Coroutine[Any, Any, Any]]) -> Any:
    """``main(world)`` in a loop of its own, which takes no time."""
    world = World(0.0)
    with asyncio.Runner(loop_factory=lambda: SimulatedLoop(world)) as runner:
        return runner.run(main(world))


def prim_stranded(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task that waits, in a loop that was closed."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # "destroyed but pending": that is what is tested
    task = loop.create_task(coroutine)
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    return task


class LoopMachine(RuleBasedStateMachine):
    """Tasks of a loop that takes one step at a time."""

    debug: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.complaints: list[dict[str, Any]] = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_debug(self.debug)
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.tasks: list[asyncio.Task[Any]] = []
        self.cancelled: set[asyncio.Task[Any]] = set()

    def now(self, call: Callable[[], Any]) -> Any:
        """Run the call inside the loop, and one step of everybody else with it."""
        outcome: list[Any] = []
        self.loop.call_soon(lambda: outcome.append(call()))
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()
        assert outcome, self.complaints
        return outcome[0]

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = self.now(lambda: self.loop.create_task(coroutine))
        self.tasks.append(task)
        self.now(lambda: None)
        return task

    def settle(self) -> None:
        for _ in range(6):
            self.now(lambda: None)

    @rule()
    def step(self) -> None:
        self.now(lambda: None)

    @precondition(lambda self: any(not task.done() for task in self.tasks))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        pending = [task for task in self.tasks if not task.done()]
        victim = data.draw(st.just(0) | st.sampled_from(range(len(pending))))  # the oldest is the next to be granted
        cancel: Callable[[], Any] = functools.partial(self.cancel_now, pending[victim])
        orders = [order for n in (1, 2, 3) for order in itertools.permutations([cancel, *self.acts()], n)]
        order = data.draw(st.sampled_from([order for order in orders if cancel in order]))
        self.now(lambda: [act() for act in order])

    def cancel_now(self, task: asyncio.Task[Any]) -> None:
        """It may have ended in this very turn."""
        if task.cancel():
            self.cancelled.add(task)

    def acts(self) -> list[Callable[[], Any]]:
        """What may wake somebody up in the turn in which he is cancelled."""
        return [self.act]

    def act(self) -> None:
        """The first of it."""

    def finish(self) -> None:
        self.settle()
        for task in self.tasks:
            if not task.done():
                task.cancel()
        self.settle()

    def teardown(self) -> None:
        try:
            if hasattr(self, "started"):
                self.finish()
                assert self.complaints == []
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.settle()
            for task in self.tasks:
                if task.done() and not task.cancelled():
                    task.exception()
            self.loop.close()


class FlightError(Exception):
    pass


class FlightLoad:
    """A load, blocking and awaited, each call of which waits until its gate gives it a result or an error."""

    def __init__(self) -> None:
        self.gates: list[concurrent.futures.Future[Any]] = []

    def __call__(self) -> Any:
        self.gates.append(concurrent.futures.Future())
        return self.gates[-1].result(HANG_LIMIT)

    async def aload(self) -> Any:
        self.gates.append(concurrent.futures.Future())
        return await asyncio.wrap_future(self.gates[-1])

    def begun(self, n: int) -> concurrent.futures.Future[Any]:
        """The gate of the n-th call, once it is made; there must be no further one."""
        wait_until(lambda: len(self.gates) >= n)
        assert len(self.gates) == n
        return self.gates[-1]


class FlightDesk:
    """Asks a ``SingleFlight``, or a ``TTLCache`` that has one, in the workers of a shell."""

    def __init__(self, shell: Shell, kind: str) -> None:
        self.shell, self.kind, self.world = shell, kind, World(0.0)
        self.cache: pr.TTLCache[Any, Any] = pr.TTLCache(16, 10.0, stale=5.0, clock=self.world.clock)
        self.flights = self.cache._flights
        self.many = 99 if shell.kind == "mixed" else 999

    def ask(self, load: FlightLoad, key: str = "key", gated: bool = False) -> PrimThread | PrimTask:
        if self.kind == "cache":
            do, do_async = self.cache.get_or_load, self.cache.get_or_load_async
        else:
            do, do_async = self.flights.do, self.flights.do_async  # type: ignore[assignment]
        return self.shell.start(lambda: do(key, load), lambda: do_async(key, load.aload), gated)

    def crowd(self, load: FlightLoad, followers: int, gated: bool = False) -> list[PrimThread | PrimTask]:
        """A leader, and so many who wait for it, in this order."""
        workers = [self.ask(load)]
        load.begun(1)
        for number in range(followers):
            workers.append(self.ask(load, gated=gated))
            if followers < 10:
                self.waiting(number + 1)
        self.waiting(followers)
        return workers

    def waiting(self, n: int) -> None:
        wait_until(lambda: self.flights.stats().waiting == n)

    def kill(self, leader: PrimThread | PrimTask, gate: concurrent.futures.Future[Any]) -> None:
        """End the leader's load as Ctrl-C or a cancellation does; that of a task ends a little later."""
        if isinstance(leader, PrimThread):
            gate.set_exception(KeyboardInterrupt())
            assert isinstance(leader.outcome.exception(HANG_LIMIT), KeyboardInterrupt)
        else:
            gate.cancel()

    def idle(self) -> bool:
        wait_until(lambda: self.flights.stats().flights == 0)
        return self.flights.stats().waiting == 0


class TurnsOver(BaseException):
    """Ends the threads of a schedule that is stuck."""


class Turns:
    """Runs threads one at a time and chooses, at every taking of a lock, who goes on: exhaustively, over many runs.

    Stateless search with bounded preemption (Musuvathi and Qadeer, "Iterative context bounding", PLDI 2007): all
    choices of who goes on where a thread stops by itself, and up to ``preemptions`` where it need not. What locks
    guard is touched only between them, so these points are enough; code without its lock is frontrun's business.
    Parked waiters are threads that take a lock which another one releases; a time limit may pass at any of its turns.
    """

    def __init__(self, choices: list[int], preemptions: int) -> None:
        self.choices, self.left = choices, preemptions
        self.made: list[tuple[int, int]] = []
        self.stopped = threading.Semaphore(0)
        self.threads: list[TurnsThread] = []
        self.running: TurnsThread | None = None
        self.over = False

    def pause(self, ready: Callable[[], bool]) -> None:
        thread = self.running
        if self.over or thread is None:
            return
        thread.ready = ready
        self.stopped.release()
        thread.go.acquire()
        if self.over:
            raise TurnsOver

    def run(self) -> str | None:
        """Runs all threads to their end; why that was not possible, or None."""
        last: TurnsThread | None = None
        while alive := [thread for thread in self.threads if not thread.ended]:
            able = [thread for thread in alive if thread.ready()]
            if last in able and last is not None:
                able.remove(last)
                able = [last, *able] if self.left else [last]
            if not able:
                self.over = True
                for thread in alive:
                    thread.go.release()
                    thread.join()
                return f"deadlock of {[thread.name for thread in alive]}"
            place = len(self.made)
            choice = self.choices[place] if place < len(self.choices) else 0
            self.made.append((choice, len(able)))
            if last in able and choice:
                self.left -= 1
            self.running = last = able[choice]
            last.go.release()
            self.stopped.acquire()
            self.running = None
        errors = [thread.error for thread in self.threads if thread.error]
        return repr(errors[0]) if errors else None


class TurnsThread(threading.Thread):
    def __init__(self, turns: Turns, work: Callable[[], object], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.turns, self.work = turns, work
        self.go = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.ended = False
        self.error: BaseException | None = None

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.turns.over:
                self.work()
        except TurnsOver:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self.stopped_for_good()

    def stopped_for_good(self) -> None:
        self.turns.stopped.release()
