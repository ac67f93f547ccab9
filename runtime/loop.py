"""Around an event loop: which loop, how late it is, tasks that last, and the signals that stop a program.

What is called for a signal tells a first one (drain) from a second (force) by itself. All earlier handlers come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

from coordination import cancel_all

STOPPING = (signal.SIGINT, signal.SIGTERM)  # the signals that stop a program
PAUSE = 0.5  # seconds after which a task that failed in a way that nobody had foreseen goes on
SHOWN = 10  # such failures in the log with their tracebacks


def new_loop() -> asyncio.AbstractEventLoop:
    """An event loop: uvloop's, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, Any], name: str) -> AsyncIterator[None]:
    """Run ``work`` in a task while this is entered; it is cancelled at the end. What it raises is lost."""
    task = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        await cancel_all([task])


async def ends_before(work: Awaitable[Any], event: asyncio.Event, seconds: float = math.inf) -> bool:
    """Whether ``work`` ended before ``event`` was set, and in so many ``seconds``; it is cancelled otherwise. What it
    raises is raised here."""
    task, other = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    limit = None if seconds == math.inf else max(0.0, seconds)
    try:
        await asyncio.wait((task, other), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended = task.done()
        await cancel_all([task, other])
    error = None if task.cancelled() else task.exception()
    if isinstance(error, Exception):  # that of a ``gather`` which was cancelled is none
        raise error
    return ended and not task.cancelled()


class Lag:
    """How late the event loop wakes a sleeper, in seconds: what a call that blocks it would cost everybody."""

    def __init__(self) -> None:
        self.recent = deque([0.0], maxlen=1200)  # of the last minute

    @property
    def longest(self) -> float:
        """The longest of the last minute."""
        return max(self.recent)

    async def watch(self) -> None:
        """Measure, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 0.05
            await asyncio.sleep(0.05)
            self.recent.append(max(0.0, loop.time() - due))


class TaskSupervisor:
    """Tasks that last as long as their program. One that fails is begun again; ``faults`` counts how often that was."""

    def __init__(self, log: logging.Logger) -> None:
        self._log, self.faults, self._off = log, 0, 0
        self.running: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """A task of that name: ``work()``, until it returns or is cancelled; after an error, once more."""

        async def kept() -> None:
            while True:
                try:
                    return await work()
                except Exception as error:
                    self.fault(name, error)
                    await asyncio.sleep(PAUSE)

        self.running[name] = asyncio.create_task(kept(), name=name)

    def fault(self, where: str, error: BaseException | None) -> None:
        """Count a failure that nobody had foreseen; the first ones are in the log, with their tracebacks."""
        self.faults += 1
        if self.faults <= SHOWN:
            self._log.error("%s failed", where, exc_info=error)

    def balance(self, off: int, counts: object) -> None:
        """Count it as a failure if ``counts`` are ``off``, and were not by as much when they were looked at last."""
        if off and off != self._off:
            self.faults += 1
            self._log.error("the counts do not balance: %d events are not accounted for: %s", off, counts)
        self._off = off

    async def end(self) -> None:
        """Cancel all of them, and wait until they have ended."""
        await cancel_all(self.running.values())


@contextlib.contextmanager
def blocked(*numbers: signal.Signals) -> Iterator[None]:
    """Block these signals in this thread, and so in each process that is started meanwhile until it wants them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Have ``handler`` called by the main thread for SIGINT and SIGTERM."""
    before = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            if signal.getsignal(number) is handler:  # else somebody who does not give it back has come after us
                signal.signal(number, earlier)


def stopped_by_signals(stop: Callable[[], object]) -> AbstractContextManager[None]:
    """In a running loop: SIGINT and SIGTERM call ``stop`` there."""
    loop = asyncio.get_running_loop()
    return _handled(lambda *_: loop.call_soon_threadsafe(stop))


@contextlib.contextmanager
def stopped_by_signals_in_a_thread(stop: Callable[[], object]) -> Iterator[None]:
    """Without a loop: SIGINT and SIGTERM call ``stop`` in a thread of their own.

    Each is a byte in a pipe that the thread reads: a handler in Python runs in the main thread only, and a signal that
    comes as that one begins to wait would not wake it.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def read() -> None:
        while os.read(reader, 1):
            stop()

    thread = threading.Thread(target=read, name="signals")
    thread.start()
    try:
        with _handled(lambda *_: None):
            earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            try:
                yield
            finally:
                signal.set_wakeup_fd(earlier)
    finally:
        os.close(writer)
        thread.join()
        os.close(reader)


@contextlib.contextmanager
def handled_before_the_server(call: Callable[[], object]) -> Iterator[Callable[[], object]]:
    """Have ``call`` called in the running loop at SIGINT and SIGTERM, before the server that waits for them too.

    Gives a function that is for the server as one more SIGINT, after which it waits for nobody."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in STOPPING}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(call)
        following = before[signal.Signals(number)]
        if callable(following):
            following(number, frame)

    forced = before[signal.SIGINT]
    with _handled(handle):
        yield lambda: forced(signal.SIGINT, None) if callable(forced) else None
