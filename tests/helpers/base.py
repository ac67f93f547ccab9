"""Time, patience, and what every test file may need."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import Phase, settings

T = TypeVar("T")

HANG_LIMIT = 60.0  # seconds for what must come; reached only by a failing test
PROGRAM_LIMIT = 5 * HANG_LIMIT  # seconds for a whole program, which may have to set up a database first


SETTINGS = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)


HUNT = settings(SETTINGS, max_examples=3000, phases=(Phase.generate,))  # for planted bugs: found is enough


def wait_until(predicate: Callable[[], bool]) -> None:
    """Let the other threads run until the predicate holds."""
    began, nap = time.monotonic(), threading.Event()
    while not predicate():
        waited = time.monotonic() - began
        assert waited < HANG_LIMIT, "it never came"
        nap.wait(pause(waited, 0.0005))


def pause(waited: float, least: float) -> float:
    """Seconds until the next look: few beside those that it took so far, for a look may cost a processor's time."""
    return min(max(least, waited / 20), 0.02)


async def until_async(look: Callable[[], T | Awaitable[T | None] | None]) -> T:
    """Let other processes, and this loop, run until what ``look`` gives, awaited if it has to be, is true."""
    began = time.monotonic()
    while True:
        seen = look()
        if found := await seen if isinstance(seen, Awaitable) else seen:
            return found
        waited = time.monotonic() - began
        assert waited < HANG_LIMIT, "it never came"
        await asyncio.sleep(pause(waited, 0.002))


def of_a_library(context: dict[str, Any]) -> bool:
    """A future of asyncpg's that nobody awaits: cancelled while it connects, or cut off in a transaction.

    A connection that aiokafka leaves behind when it is cancelled while it connects.
    """
    if context["message"] == "Unclosed AIOKafkaConnection":
        return True
    error = context.get("exception")
    its = type(error).__module__.startswith("asyncpg") or str(error) == "unexpected connection_lost() call"
    return its and context["message"] == "Future exception was never retrieved"


WATCH = """if True:
    import asyncio, os, resource, sys, time
    from asyncio.base_events import _format_handle

    def delays():
        found = {}
        for thread in os.listdir("/proc/self/task"):
            try:
                with open(f"/proc/self/task/{thread}/schedstat") as file:
                    found[thread] = int(file.read().split()[1]) / 1e9
            except OSError:
                pass  # it has just ended
        return found

    def timed(handle, run=asyncio.Handle._run):
        before, slept = delays(), resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        began, computed = time.monotonic(), time.thread_time()
        run(handle)
        held = time.thread_time() - computed
        if resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw > slept:
            whole = time.monotonic() - began
            held = max(held, whole - sum(now - before.get(thread, 0) for thread, now in delays().items()))
        if held >= 0.05:
            print("Held by", _format_handle(handle), file=sys.stderr)

    def watch_the_loop():
        sys.setswitchinterval(1e-5)
        asyncio.Handle._run = timed
"""


def holds_the_loop(program: str, says: str, given: str = "") -> set[tuple[str, ...]]:
    """Tasks and handles that, in each of six runs of ``program``, held its loop once it had called ``watch_the_loop``.

    50 ms of computing hold it, or as long a call in which the thread slept; not that a thread here, which may be one
    that has the interpreter's lock, waited for a processor. What blocks does so each time.
    """
    found: set[tuple[str, ...]] | None = None
    for _ in range(6):
        command = [sys.executable, "-c", WATCH + program]
        child = subprocess.run(command, input=given, capture_output=True, text=True, cwd=HERE, timeout=PROGRAM_LIMIT)
        assert child.stdout.strip() == says, child.stderr
        held = [line for line in child.stderr.splitlines() if line.startswith("Held by")]
        these: set[tuple[str, ...]] = set()
        for line in held:
            name, task = re.search(r"name='(?!Task-)([^']*)'", line), re.search(r"coro=<([^ >]*)", line)
            these.add((name[1] if name else "", task[1] if task else re.sub(r"0x\w+|created at.*", "", line)))
        found = these if found is None else found & these
        if not found:
            break
    return found or set()


def run_task(
    main: Coroutine[Any, Any, T], excused: Callable[[dict[str, Any]], bool] = of_a_library, **runner: Any
) -> T:
    """``asyncio.run`` in debug mode; fails if the loop had anything to complain of that is not excused."""
    complaints: list[dict[str, Any]] = []
    with asyncio.Runner(**{"debug": True, **runner}) as loop:
        loop.get_loop().set_exception_handler(lambda _, context: complaints.append(context))
        result = loop.run(main)
    assert [each for each in complaints if not excused(each)] == []
    return result


async def ticks(n: int = 8) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def pass_time(seconds: float) -> None:
    """Move this loop's clock on, and give what had been waiting for that time its turns."""
    loop = asyncio.get_running_loop()
    before = loop.time
    loop.time = lambda: before() + seconds  # type: ignore[method-assign]
    await ticks()


@contextlib.contextmanager
def limits(seconds: float) -> Iterator[Callable[[], None]]:
    """What waits in ``asyncio.timeout(seconds)`` meanwhile is told that its time is up by what this gives."""
    timeout, scopes = asyncio.timeout, list[asyncio.Timeout]()

    def scope(given: float | None) -> asyncio.Timeout:
        scopes.append(timeout(HANG_LIMIT if given == seconds else given))
        return scopes.pop() if given != seconds else scopes[-1]

    def up() -> None:
        for each in scopes:
            with contextlib.suppress(RuntimeError):  # it is over
                each.reschedule(asyncio.get_running_loop().time())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "timeout", scope)
        yield up


class World:
    """A clock that moves when somebody sleeps, and a record of the sleeps."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.naps: list[float] = []
        self.interrupt: BaseException | None = None

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        if self.interrupt is not None:
            raise self.interrupt
        self.now += seconds

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)


HERE = Path(__file__).resolve().parents[2]
"""The project."""


def texts(svg: str) -> list[str]:
    return [part.text or "" for part in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


_ports = itertools.count(20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]))


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """A port of this process's share, below those that the system gives out: no other test gets it meanwhile."""
    while True:
        with socket.socket(socket.AF_INET, kind) as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port := next(_ports)))
            return port
