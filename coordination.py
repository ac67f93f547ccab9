"""Where threads and tasks meet: who waits for whom, and in which order they go on. Hand-written on one lock each.

Every object works for threads and for tasks of any number of event loops at the same time: a waiter is a parked thread
(blocked on a lock of its own) or a parked task (awaiting a future of its loop), and both stand in the same queue.

``Semaphore``   at most ``permits`` holders; FIFO, nobody barges past a queue, a cancelled holder loses nothing.
``Channel``     a bounded FIFO between workers; what ``put`` accepted is delivered, exactly once, also after ``close``;
                a cancelled ``put`` leaves nothing in it. Not promised: that nobody has got the item of one that is
                cancelled in the moment in which it is accepted.
``Visited``     of any number of workers that ask, exactly one is told that it is the first.
``fan_out``     an outcome for every call at the deadline; no task is left behind.
``WorkerPool``  every accepted item is handled once, errors or not; closing drains.

Each object owns one lock, which guards all its fields and is held for the decision only: never while waiting, never
during a call of the user's. No lock is taken while another is held, so no order between them can be got wrong. Only
``fan_out`` (tasks) and ``WorkerPool`` (threads or tasks) start anything, and they end what they started. ``async``
verbs run in the caller's event loop.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import operator
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Generic, Literal, NamedTuple, TypeVar

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

Clock = Callable[[], float]  # returns monotonic seconds
Rng = Callable[[], float]  # returns a uniformly distributed number in [0, 1)


class ChannelClosed(Exception):
    """The channel was closed: nothing more can be put, or nothing is left to get."""


def stats_repr(self: Any) -> str:
    """The ``repr`` of every mechanism: its ``stats()``."""
    fields = self.stats()._asdict().items()
    shown = (f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in fields)
    return f"<{type(self).__name__} {' '.join(shown)}>"


def plain_lock(_: str) -> threading.Lock:
    """A lock of the standard library."""
    return threading.Lock()


make_lock: Callable[[str], threading.Lock] = plain_lock
"""Makes every lock of the project. Replaced by whoever records in which order locks are taken."""


def new_lock(name: str) -> threading.Lock:
    """A lock that is known by this name."""
    return make_lock(name)


def check_count(name: str, value: int) -> int:
    """``value``. Raises TypeError if it is not whole, ValueError if it is below 1."""
    if operator.index(value) < 1:
        raise ValueError(f"{name} must be at least 1, not {value!r}")
    return value


# -------------------------------------------------------------------------------------------- waiting


class Waiter:
    """One parked thread or task. ``granted`` and ``value`` belong to whoever holds the owner's lock."""

    __slots__ = ("_future", "_lock", "_loop", "granted", "value")

    def __init__(self, loop: asyncio.AbstractEventLoop | None, value: Any = None) -> None:
        self.granted = False
        self.value = value
        self._loop = loop
        if loop is None:
            self._lock = threading.Lock()
            self._lock.acquire()
        else:
            self._future: asyncio.Future[None] = loop.create_future()

    def wake(self) -> bool:
        """False if nobody will ever wake up: the event loop of the task is closed."""
        if self._loop is None:
            self._lock.release()
        elif asyncio._get_running_loop() is self._loop:
            self._resolve()
        else:
            try:
                self._loop.call_soon_threadsafe(self._resolve)
            except RuntimeError:
                return False
        return True

    def _resolve(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def block(self, timeout: float | None) -> None:
        """Block the thread until it is woken, or ``timeout`` seconds are over."""
        if timeout is None:
            self._lock.acquire()
        else:
            self._lock.acquire(timeout=max(0.0, min(timeout, threading.TIMEOUT_MAX)))

    async def parked(self) -> None:
        """Park the task until it is woken."""
        await self._future

    def block_or(self, undo: Callable[[Waiter], object], timeout: float | None) -> None:
        """``block``; if that is interrupted, ``undo`` what was granted meanwhile."""
        try:
            self.block(timeout)
        except BaseException:
            undo(self)
            raise

    async def parked_or(self, undo: Callable[[Waiter], object]) -> None:
        """``parked``; if that is cancelled, ``undo`` what was granted meanwhile."""
        try:
            await self._future
        except BaseException:
            undo(self)
            raise


class FairCondition:
    """A condition variable for threads and tasks that hands over in the order of arrival.

    What ``threading.Condition`` is inside (a queue of locks), with one difference: a notification goes to the oldest
    waiter *by name* and carries what it waited for, so nobody who comes later can take it away (no barging), and
    a waiter that was cancelled after its grant can hand the grant on. Guarded by the lock of its owner.
    """

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: deque[Waiter] = deque()

    def __len__(self) -> int:
        return len(self._waiters)

    def park(self, loop: asyncio.AbstractEventLoop | None, value: Any = None) -> Waiter:
        """The last in the queue: a task of ``loop``, or a thread (None). It then has to ``block``, or be ``parked``."""
        waiter = Waiter(loop, value)
        self._waiters.append(waiter)
        return waiter

    def grant_oldest(self, value: Any = None) -> Waiter | None:
        """Hand ``value`` (if it is not None, it takes the place of what the waiter brought) to the oldest waiter."""
        while self._waiters:
            waiter = self._waiters.popleft()
            brought, waiter.granted = waiter.value, True
            if value is not None:
                waiter.value = value
            if waiter.wake():
                return waiter
            waiter.granted, waiter.value = False, brought
        return None

    def wake_all_empty_handed(self) -> None:
        """Nothing will be granted any more."""
        while self._waiters:
            self._waiters.popleft().wake()

    def leave(self, waiter: Waiter) -> bool:
        """Whether it was still in the queue: neither granted, nor woken empty-handed."""
        found = not waiter.granted and waiter in self._waiters
        if found:
            self._waiters.remove(waiter)
        return found


# ------------------------------------------------------------------------------------------ semaphore


class SemaphoreStats(NamedTuple):
    """Permits in all, those that nobody holds, and how many wait for one."""

    permits: int
    available: int
    waiting: int


class Semaphore:
    """At most ``permits`` holders at a time, threads and tasks alike (Dijkstra, EWD 123).

    Built on one lock, which guards the count and the queue, and one condition, notified when a permit is released.
    Fairness: strictly FIFO. A released permit is handed to the oldest waiter and never passes through the count, so
    a newcomer cannot barge in. A waiter that is cancelled or times out leaves the queue; if its permit had already
    been handed over, it hands it on. Invariant: waiting > 0 implies available == 0.
    """

    def __init__(self, permits: int) -> None:
        self.permits = self._available = check_count("permits", permits)
        self._lock = new_lock("Semaphore")
        self._released = FairCondition()

    def try_acquire(self) -> bool:
        """Take a permit if one is free and nobody waits for it."""
        with self._lock:
            if self._available:
                self._available -= 1
                return True
            return False

    def acquire(self, timeout: float | None = None) -> bool:
        """Take a permit, blocking the thread; False after ``timeout`` seconds without one."""
        with self._lock:
            if self._available:
                self._available -= 1
                return True
            waiter = self._released.park(None)
        waiter.block_or(self._abandon, timeout)
        with self._lock:
            self._released.leave(waiter)
            return waiter.granted

    async def acquire_async(self) -> bool:
        """Take a permit, parking the task; always True. Cancelled, it takes none."""
        with self._lock:
            if self._available:
                self._available -= 1
                return True
            waiter = self._released.park(asyncio.get_running_loop())
        await waiter.parked_or(self._abandon)
        return True

    def release(self) -> None:
        """Give a permit back: to the oldest waiter, else to the count. ``ValueError`` if none was out."""
        with self._lock:
            if self._released.grant_oldest():
                return
            if self._available == self.permits:
                raise ValueError("released more often than acquired")
            self._available += 1

    def _abandon(self, waiter: Waiter) -> None:
        with self._lock:
            self._released.leave(waiter)
        if waiter.granted:
            self.release()

    def __enter__(self) -> Semaphore:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    async def __aenter__(self) -> Semaphore:
        await self.acquire_async()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def stats(self) -> SemaphoreStats:
        """The counts of this moment."""
        with self._lock:
            return SemaphoreStats(self.permits, self._available, len(self._released))

    __repr__ = stats_repr


# -------------------------------------------------------------------------------------------- channel


class ChannelStats(NamedTuple):
    """Places, items in them, who waits to put and to get, and whether it is closed."""

    capacity: int
    items: int
    putters: int
    getters: int
    closed: bool


class Channel(Generic[T]):
    """A bounded FIFO queue between workers, threads and tasks alike, that can be closed (Hoare, CSP; Go's channels).

    Built on one lock, which guards the buffer and both queues, and two conditions: ``_not_empty``, notified when an
    item comes or nothing will come any more; ``_not_full``, notified when a place in the buffer is freed or the channel
    closes. Fairness: FIFO on both sides; an item goes to the oldest getter, a place to the oldest putter.
    Invariants: getters wait only while the buffer is empty, putters only while it is full.

    ``close()`` refuses every further ``put`` (waiting ones included: they had not been accepted) and lets the getters
    drain what is left; then they get ``ChannelClosed``, and ``for item in channel`` ends. What was granted to a getter
    that has not gone on yet is still left: cancelled, it hands its item to the next one, who must not have gone.

    A cancelled ``get`` takes nothing. A cancelled ``put`` takes its item out again, unless somebody has got it already.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = check_count("capacity", capacity)
        self._items: deque[Any] = deque()  # or, of a putter that had to wait, its Waiter, which knows the item
        self._grants = 0  # to getters that have not gone on yet
        self._closed = False
        self._lock = new_lock("Channel")
        self._not_empty = FairCondition()
        self._not_full = FairCondition()

    def _offer(self, item: T) -> bool:
        if self._closed:
            raise ChannelClosed("the channel is closed")
        if self._not_empty.grant_oldest(item):
            self._grants += 1
            return True
        if len(self._items) < self.capacity:
            self._items.append(item)
            return True
        return False

    def _refill(self) -> None:
        if len(self._items) < self.capacity and (putter := self._not_full.grant_oldest()):
            self._items.append(putter)

    def _take(self) -> Any:
        item = self._items.popleft()
        self._refill()
        return item.value if type(item) is Waiter else item

    def close(self) -> None:
        """Refuse further puts; getters drain what is there. May be called again."""
        with self._lock:
            self._closed = True
            self._not_full.wake_all_empty_handed()
            self._end_if_drained()

    def _end_if_drained(self) -> None:
        if self._closed and not self._grants:
            self._not_empty.wake_all_empty_handed()

    def put(self, item: T, timeout: float | None = None) -> None:
        """Put, blocking the thread while the buffer is full. ``TimeoutError`` after ``timeout`` seconds (0: at once,
        also for tasks), ``ChannelClosed``."""
        with self._lock:
            if self._offer(item):
                return
            waiter = self._not_full.park(None, item)
        waiter.block_or(self._withdraw, timeout)
        with self._lock:
            self._check(self._not_full, waiter)

    async def put_async(self, item: T) -> None:
        """Put, parking the task while the buffer is full. Raises ``ChannelClosed``."""
        with self._lock:
            if self._offer(item):
                return
            waiter = self._not_full.park(asyncio.get_running_loop(), item)
        await waiter.parked_or(self._withdraw)
        with self._lock:
            self._check(self._not_full, waiter)

    def _withdraw(self, putter: Waiter) -> None:
        with self._lock:
            self._not_full.leave(putter)
            for place, item in enumerate(self._items):
                if item is putter:
                    del self._items[place]
                    self._refill()
                    return

    def get(self, timeout: float | None = None) -> T:
        """Get, blocking the thread while the buffer is empty. ``TimeoutError`` after ``timeout`` seconds (0: at once,
        also for tasks), ``ChannelClosed`` when it is closed and drained."""
        with self._lock:
            if self._items:
                return self._take()  # type: ignore[no-any-return]
            waiter = self._park_getter(None)
        waiter.block_or(self._hand_on, timeout)
        return self._receive(waiter)

    async def get_async(self) -> T:
        """Get, parking the task while the buffer is empty. ``ChannelClosed`` when it is closed and drained."""
        with self._lock:
            if self._items:
                return self._take()  # type: ignore[no-any-return]
            waiter = self._park_getter(asyncio.get_running_loop())
        await waiter.parked_or(self._hand_on)
        return self._receive(waiter)

    def _park_getter(self, loop: asyncio.AbstractEventLoop | None) -> Waiter:
        if self._closed and not self._grants:
            raise ChannelClosed("the channel is closed and drained")
        return self._not_empty.park(loop)

    def _receive(self, getter: Waiter) -> T:
        with self._lock:
            self._check(self._not_empty, getter)
            self._grants -= 1
            self._end_if_drained()
        return getter.value  # type: ignore[no-any-return]

    def _hand_on(self, getter: Waiter) -> None:
        with self._lock:
            self._not_empty.leave(getter)
            if getter.granted and not self._not_empty.grant_oldest(getter.value):
                self._items.appendleft(getter.value)
                self._grants -= 1

    def _check(self, condition: FairCondition, waiter: Waiter) -> None:
        if condition.leave(waiter):
            raise TimeoutError("the channel did not move")
        if not waiter.granted:
            raise ChannelClosed("the channel is closed")

    def __iter__(self) -> Iterator[T]:
        try:
            while True:
                yield self.get()
        except ChannelClosed:
            return

    async def __aiter__(self) -> AsyncIterator[T]:
        try:
            while True:
                yield await self.get_async()
        except ChannelClosed:
            return

    def stats(self) -> ChannelStats:
        """The counts of this moment."""
        with self._lock:
            waiting = len(self._not_full), len(self._not_empty)
            return ChannelStats(self.capacity, len(self._items), *waiting, self._closed)

    __repr__ = stats_repr


# -------------------------------------------------------------------------------------------- visited


class VisitedStats(NamedTuple):
    """Keys, and how often one was added that was there."""

    keys: int
    repeats: int


class Visited(Generic[K]):
    """The set of what was seen. To ask and to mark are one step under the lock: between "is it there?" and "then I
    add it" another worker could ask too, and both would go."""

    def __init__(self) -> None:
        self._lock = new_lock("Visited")
        self._keys: set[K] = set()
        self._repeats = 0

    def add(self, key: K) -> bool:
        """Mark ``key``; True for exactly one of all callers, the first."""
        with self._lock:
            if key in self._keys:
                self._repeats += 1
                return False
            self._keys.add(key)
            return True

    def __contains__(self, key: K) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def stats(self) -> VisitedStats:
        """The counts of this moment."""
        with self._lock:
            return VisitedStats(len(self._keys), self._repeats)

    __repr__ = stats_repr


# -------------------------------------------------------------------------------------------- fan-out


class Outcome(NamedTuple, Generic[T]):
    """What became of one call: at the deadline it had a ``value``, an ``error``, or neither yet."""

    status: Literal["ok", "error", "timeout"]
    value: T | None
    error: BaseException | None


async def wait_for_event(event: asyncio.Event, seconds: float) -> bool:
    """Wait for ``event``, at most so many ``seconds`` (infinity: for ever). Whether it is set."""
    try:
        async with asyncio.timeout(None if seconds == math.inf else seconds):
            await event.wait()
    except TimeoutError:
        pass
    return event.is_set()


async def fan_out(
    calls: Mapping[K, Awaitable[T]], deadline: float = math.inf, *, cancel: bool = True
) -> dict[K, Outcome[T]]:
    """Await all ``calls`` at once; the ``Outcome`` of each, by name, after ``deadline`` seconds at the latest.

    What is not done by then is a ``timeout``; it is cancelled and awaited, as all are when the caller is cancelled. (A
    call that goes on all the same holds up the answer: there is no other way to leave no task behind.) With
    ``cancel=False`` they go on: tasks that others wait for too. Raises nothing of theirs.
    """
    if not deadline > 0:
        raise ValueError(f"deadline must be a positive number of seconds, not {deadline!r}")
    tasks: dict[K, asyncio.Future[T]] = {}
    try:
        for name, call in calls.items():
            tasks[name] = asyncio.ensure_future(call)
        if tasks:
            await asyncio.wait(tasks.values(), timeout=None if deadline == math.inf else deadline)
        return {name: _outcome(task) for name, task in tasks.items()}
    finally:
        if cancel:
            await cancel_all(tasks.values())


def _outcome(task: asyncio.Future[T]) -> Outcome[T]:
    if not task.done():
        return Outcome("timeout", None, None)
    error = asyncio.CancelledError() if task.cancelled() else task.exception()
    return Outcome("ok", task.result(), None) if error is None else Outcome("error", None, error)


async def cancel_all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel the tasks and wait until each has ended, also if that is cancelled meanwhile. Their errors are dropped."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    interrupted = None
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError as error:
            interrupted = error
    for task in tasks:
        if not task.cancelled():
            task.exception()
    if interrupted is not None:
        raise interrupted


# ---------------------------------------------------------------------------------------- worker pool


class WorkerPoolStats(NamedTuple):
    """Workers, items that wait, and items that were handled or failed."""

    workers: int
    queued: int
    handled: int
    failed: int


class WorkerPool(Generic[T]):
    """``workers`` threads or tasks that hand each submitted item to ``handle``, through a ``Channel`` of ``capacity``.

    ``with WorkerPool(handle, 4) as pool: pool.submit(item)`` runs threads, which start as items come; ``async with``
    runs tasks, and ``handle`` is a coroutine function. Both may be fed by threads (``submit``) and by tasks
    (``submit_async``). A full channel makes the submitter wait: that is the back-pressure.
    What ``handle`` raises is counted and kept in ``errors`` (the last 100, with their items), and the worker goes on:
    one that died would leave the others with its share, and at the end a queue that nobody empties.
    Leaving the block drains: what was accepted is handled. ``close(timeout)`` gives up after ``timeout`` seconds and
    returns False; threads then end after the item in hand (leaving the block does not wait for them again), tasks are
    cancelled, and ``stats().queued`` items are left. A cancelled ``async with`` block does not drain.
    """

    def __init__(
        self, handle: Callable[[T], Any], workers: int, capacity: int | None = None, *, name: str = "worker"
    ) -> None:
        self.errors: deque[tuple[T, BaseException]] = deque(maxlen=100)
        self._handle, self._workers, self._name = handle, check_count("workers", workers), name
        self._channel: Channel[T] = Channel(2 * workers if capacity is None else capacity)
        self._lock = new_lock("WorkerPool")
        self._handled = self._failed = 0
        self._started = self._abandoned = False
        self._missing = 0  # threads that have not been needed yet
        self._threads: list[threading.Thread] = []
        self._tasks: list[asyncio.Future[Any]] = []

    def _start(self) -> None:
        if self._started:
            raise RuntimeError("a worker pool is started once")
        self._started = True

    def start_threads(self) -> WorkerPool[T]:
        """What ``with`` does first; ``close`` ends it. ``TypeError`` if ``handle`` is a coroutine function."""
        if any(map(inspect.iscoroutinefunction, (self._handle, type(self._handle).__call__))):
            raise TypeError("threads cannot await what handles the items: use async with, or start_tasks")
        self._start()
        self._missing = self._workers
        return self

    def start_tasks(self) -> WorkerPool[T]:
        """What ``async with`` does first, in the running event loop; ``close_async`` ends it."""
        self._start()
        for number in range(self._workers):
            self._tasks.append(asyncio.create_task(self._work_async(), name=f"{self._name}-{number}"))
        return self

    def _begin(self) -> None:
        """An item comes."""
        if not self._started:
            raise RuntimeError("nobody works in this pool: enter it, or start it")
        if self._missing:
            with self._lock:
                if self._missing:
                    number = self._workers - self._missing
                    thread = threading.Thread(target=self._work, name=f"{self._name}-{number}", daemon=True)
                    thread.start()
                    self._threads.append(thread)
                    self._missing -= 1

    def _done(self, item: T, error: BaseException | None) -> None:
        with self._lock:
            self._handled += 1
            if error is not None:
                self._failed += 1
                self.errors.append((item, error))

    def _work(self) -> None:
        for item in self._channel:
            error = None
            try:
                self._call(item)
            except BaseException as raised:  # SystemExit too: it would end this thread only, and silently
                error = raised
            self._done(item, error)
            del item, error  # an idle worker keeps nothing alive
            if self._abandoned:
                return

    def _call(self, item: T) -> None:
        if inspect.iscoroutine(made := self._handle(item)):
            made.close()
            raise TypeError("a coroutine was made that nobody awaits")

    async def _work_async(self) -> None:
        async for item in self._channel:
            error = None
            try:
                await self._handle(item)
            except (GeneratorExit, KeyboardInterrupt, SystemExit):
                raise
            except BaseException as raised:  # cancelled may be what it waited for
                error = raised
            self._done(item, error)
            del item, error
            worker = asyncio.current_task()
            if worker is None or worker.cancelling():
                return
            await asyncio.sleep(0)  # else items that wait for nothing would keep the loop until there are no more

    def submit(self, item: T, timeout: float | None = None) -> None:
        """``TimeoutError`` if there was no place in time (0: at once, also for tasks), ``ChannelClosed`` after
        ``close``, ``RuntimeError`` if the pool was not started."""
        self._begin()
        self._channel.put(item, timeout)

    async def submit_async(self, item: T) -> None:
        """``submit``, parking the task while there is no place."""
        self._begin()
        await self._channel.put_async(item)

    __enter__ = start_threads

    def __exit__(self, *_: object) -> None:
        self.close(0.0 if self._abandoned else None)

    def close(self, timeout: float | None = None) -> bool:
        """Take no more, and wait until all is handled: True, or False after ``timeout`` seconds."""
        self._channel.close()
        give_up = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(None if give_up is None else max(0.0, give_up - time.monotonic()))
        stuck = any(thread.is_alive() for thread in threads)
        self._abandoned = self._abandoned or stuck
        return not stuck and not self.stats().queued

    async def __aenter__(self) -> WorkerPool[T]:
        return self.start_tasks()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        cancelled = kind is not None and issubclass(kind, asyncio.CancelledError)
        await self.close_async(0.0 if cancelled else None)

    async def close_async(self, timeout: float | None = None) -> bool:
        """``close`` for tasks; those that are not done in time are cancelled and awaited."""
        if asyncio.current_task() in self._tasks:
            raise RuntimeError("a worker cannot wait for its own pool to end")
        self._channel.close()
        try:
            pending = (await asyncio.wait(self._tasks, timeout=timeout))[1] if self._tasks else set()
        finally:
            await cancel_all(self._tasks)
        return not pending and not self.stats().queued

    def stats(self) -> WorkerPoolStats:
        """The counts of this moment."""
        queued = self._channel.stats().items
        with self._lock:
            return WorkerPoolStats(self._workers, queued, self._handled, self._failed)

    __repr__ = stats_repr
